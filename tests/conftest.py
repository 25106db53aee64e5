"""Runtime checks of types for the typed core, and the fixtures that many tests share."""

import gc
import hashlib
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.annotations import enforce

# The workers have the cores; threads of one would wait for those of the other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Compiled modules are kept even where a container's settings say otherwise: every command that a test starts would
# compile the package once more, and every worker the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Every stage waits until the disk has its files, in case the power is cut, which no test does.
os.fsync = lambda file: None

# Annotations of these modules are enforced at every call while the tests run.
enforce(
    (
        "braindecode_vis.base.arrays",
        "braindecode_vis.base.checks",
        "braindecode_vis.base.seeds",
        "braindecode_vis.base.stimuli",
        "braindecode_vis.base.store",
        "braindecode_vis.scoring.retrieval",
        "braindecode_vis.encoders",
        "braindecode_vis.scoring.metrics",
        "braindecode_vis.scoring.score_row",
        "braindecode_vis.scoring.uncertainty",
        "braindecode_vis.parts.foundation.models",
        "braindecode_vis.preprocessing",
    )
)

SHARED = Path(__file__).resolve().parents[2] / "shared"

#: Files that take longest by default or in `make test-further`, with the longest first. One that comes last keeps a
#: worker alone while the others wait.
LONGEST = (
    "test_config_runs.py", "test_contributing.py", "test_notebooks.py", "test_calibration.py", "api/test_decode.py",
    "parts/phantom/test_assemble.py", "test_pipeline.py", "test_parts.py", "parts/audit/test_plants.py",
    "test_cli.py", "api/test_predict.py", "report/test_page_browser.py", "base/test_digests.py",
    "api/test_exports.py", "test_outside.py", "test_two_users.py", "api/test_plain_module.py", "test_install.py",
    "parts/phantom/test_assemble_resume.py", "test_together.py", "test_hints.py", "api/test_submission.py",
    "parts/audit/test_results.py", "test_structure.py", "test_low_level.py", "parts/studies/test_tracks.py",
    "test_examples.py", "parts/cluster/test_jobs.py", "parts/cluster/test_slurm.py",
    "generation/test_dual_diffusion.py", "parts/audit/test_near_copies.py", "test_out_of_fold.py", "test_ending.py",
    "generation/test_latent_diffusion.py", "datasets/test_mosaic.py", "test_reality.py",
    "parts/live/test_page_browser.py", "parts/studies/test_sweep.py", "test_config.py",
    "generation/priors/test_joint.py", "base/test_remote_ranges.py",
)  # fmt: skip
_RANKS = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}


def pytest_addoption(parser):
    parser.addoption(
        "--allowed-skips", type=Path, metavar="FILE",
        help="fail if a test is skipped for a reason that no regular expression of this file matches",
    )  # fmt: skip
    parser.addoption(
        "--core", action="store_true",
        help="the quick loop: neither tests of parts, nor files that import one, nor what is marked `whole`",
    )  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """Leave out of the core's tests what needs a part; None leaves the choice to pytest."""
    if not config.getoption("core"):
        return None
    if collection_path.is_dir():
        return collection_path == Path(__file__).parent / "parts" or None
    text = collection_path.read_text()
    return "braindecode_vis.parts" in text or "tests.parts" in text or None


def pytest_configure(config):
    if config.getoption("core"):
        config.option.markexpr = "not slow and not further and not whole"
    if config.getoption("allowed_skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(RefusedSkips(config.getoption("allowed_skips")))
    if hasattr(config.option, "loadscopereorder"):  # which would sort by the number of tests
        config.option.loadscopereorder = False


class RefusedSkips:
    """Fails a run in which a test was skipped for a reason that is not allowed.

    Without it, a machine that lost its browser or its recordings passes with fewer tests.
    """

    def __init__(self, path):
        lines = (line.strip() for line in path.read_text().splitlines())
        self.allowed = [line for line in lines if line and not line.startswith("#")]
        self.refused = {}

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.judge(report)

    def pytest_collectreport(self, report):
        if report.skipped:
            self.judge(report)

    def judge(self, report):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(re.search(pattern, reason) for pattern in self.allowed):
            self.refused[report.nodeid] = reason

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.refused and session.exitstatus in (0, 5):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for name, reason in self.refused.items():
            terminalreporter.write_line(f"SKIPPED, which is not allowed: {name}: {reason}", red=True)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _RANKS.get(item.path, len(_RANKS)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Spare the garbage collector what stays to the end: most of its time went into imported modules."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real recordings beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the real recordings in ../shared are not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _lead_fields_of_all_workers(tmp_path_factory):
    """Compute the lead fields of a cap or a helmet in one worker, up to five seconds, and read them in the others."""
    import numpy as np

    forward = sys.modules.get("braindecode_vis.parts.phantom.forward")
    if forward is None or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent / "lead-fields"
    folder.mkdir(exist_ok=True)
    compute = forward._compute_forward

    def share(info, head, transform, positions, normals):
        places = [(channel["loc"].tobytes(), int(channel["coil_type"])) for channel in info["chs"]]
        arguments = repr((places, info["dev_head_t"], positions.tobytes(), normals.tobytes()))
        path = folder / f"{hashlib.sha256(arguments.encode()).hexdigest()}.npy"
        if not path.exists():
            made = path.with_name(f"{os.getpid()}-{path.name}")
            np.save(made, compute(info, head, transform, positions, normals))
            made.replace(path)
        return np.load(path)

    forward._compute_forward = share
    yield
    forward._compute_forward = compute


@pytest.fixture(autouse=True)
def consent_ends():
    """What one test allowed, code of others or a download, must not last into the next."""
    from braindecode_vis.base import consent

    before = consent._GIVEN.get()
    yield
    left = consent._GIVEN.get()
    consent._GIVEN.set(before)
    assert left == before


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Keep every test away from the user's cache folder."""
    monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of one server of S3 on this machine, for all tests that ask for it."""
    pytest.importorskip("moto", reason="moto is not installed")
    from tests.loopback_servers import serve_s3

    with serve_s3() as url:
        yield url


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    """A bucket of its own for a test, which reads it anonymously through a cache of its own."""
    from braindecode_vis.base import remote
    from tests.loopback_servers import Bucket

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("BRAINDECODE_VIS_REMOTE_CACHE", str(tmp_path / "remote"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield Bucket(s3_server, f"bucket-{zlib.crc32(str(tmp_path).encode())}")
    remote.forget_listings()
    remote.release_files()
    remote._TAKEN.clear()
    remote._CHOSEN.clear()


@pytest.fixture(autouse=True)
def _same_draws(request):
    """Seed torch's global generator by the test's name, so that a test draws the same numbers in any order."""
    if "torch" in sys.modules:
        from braindecode_vis.base.devices import seed_device

        seed_device("cpu", zlib.crc32(request.node.name.encode()))


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Call the command in this process, where a new one would import for two seconds: exit code and both streams."""

    def call(*words) -> subprocess.CompletedProcess:
        from braindecode_vis.cli import main

        monkeypatch.setattr(sys, "argv", ["braindecode-vis", *map(str, words)])
        capsys.readouterr()  # what was said before
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, code, out, err)

    return call
