"""What one user's run wrote, another user may read by every verb that reads, as far as the umask lets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import braindecode_vis as bv
from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.ending import finish_run
from braindecode_vis.pipeline.runs import open_run
from tests.parts.live.small_run import make_run

QUICK = [
    "evaluation.n_bootstrap=100", "evaluation.n_permutations=100", "dataset.n_train=40", "dataset.n_test=20",
    "dataset.n_voxels=50",
]  # fmt: skip
OWNER = 1234
#: Root that may not read what others closed, as any other user: Python itself may lie where root alone reads.
OTHER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]

#: Each verb that reads a run, one after the other in one process, which would import for seconds each time.
READ = """
import contextlib, io, json, os, sys
os.environ["COLUMNS"] = "1000"
from pathlib import Path

runs, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir()
from braindecode_vis.cli import main

found = {}
def call(name, *words):
    sys.argv = ["braindecode-vis", *map(str, words)]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said if name == "audit" else io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    found[name] = [code, said.getvalue()]

def ask(name, what):
    try:
        what()
        found[name] = [0, ""]
    except Exception as error:
        found[name] = [2, f"error: {type(error).__name__}: {error}"]

def load_decoder():
    import braindecode_vis as bv
    bv.Decoder.from_run(bv.open_run(run))
    bv.Decoder.load(runs / "decoder")

def open_live():
    from braindecode_vis.base.consent import give_consent
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder
    from braindecode_vis.pipeline.finished_run import open_finished
    with give_consent(code=["tests"]):
        RunStreamDecoder(open_finished(runs / "live"), session="02")

run = runs / "run"
call("predict", "predict", run, "--on", runs / "trials.npy", "--out", out / "predicted")
call("compare", "compare", run, runs / "other", "--out", out / "compared.csv")
call("board", "board", run, runs / "other", "--out", out / "board.html")
if found["board"][0] == 0:  # its rows say what may not be read
    troubles = [row["trouble"] for row in json.loads((out / "experiment.json").read_text())]
    found["board"][1] += "".join(troubles)
call("score", "score", runs / "guessed.npy", "--targets", runs / "true.npy", "--out", out / "scored")
call("audit", "audit", run)
call("scores", "export", run, "--what", "scores", "--to", "csv", "--out", out / "scores.csv")
call("encoder", "export", run, "--what", "encoder", "--to", "safetensors", "--out", out / "encoder")
ask("decoder", load_decoder)
ask("live", open_live)
call("report", "report", run)
print(json.dumps(found))
"""


def own(folder, user):
    for path in (folder, *folder.rglob("*")):
        os.lchown(path, user, user)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, a run to decode live from, a saved decoder, and arrays: all another's."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root with setpriv can be another user")
    folder = tmp_path_factory.mktemp("two") / "shared"
    before = os.umask(0o022)
    store._read_umask.cache_clear()
    try:
        for name, alpha in (("run", 1.0), ("other", 1000.0)):
            config = read_config("synthetic_digits", [*QUICK, f"encoder.alphas=[{alpha}]"])
            finish_run(open_run(config, folder / name))
        make_run(folder / "live")
        bv.Decoder.from_run(bv.open_run(folder / "run")).save(folder / "decoder")
        (data,) = folder.glob("run/stages/preprocess/*/responses/data.npy")
        np.save(folder / "trials.npy", np.load(data)[:5])
        for name in ("guessed", "true"):
            np.save(folder / f"{name}.npy", np.random.default_rng(0).normal(size=(20, 8)))
    finally:
        os.umask(before)
        store._read_umask.cache_clear()
    own(folder, OWNER)
    return folder


def read_as_another(runs, out):
    env = {**os.environ, "BRAINDECODE_VIS_CACHE": str(out.parent / "cache")}
    done = subprocess.run(
        [*OTHER, sys.executable, "-P", "-c", READ, runs, out],
        capture_output=True, text=True, timeout=600, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_whoever_may_read_a_run_reads_it_by_every_verb(runs, tmp_path):
    """Weights had mode 0600 whatever the umask, so that nobody but their owner could predict, load or compare."""
    closed = [path for path in runs.rglob("*") if path.stat().st_mode & 0o044 != 0o044]
    assert closed == []
    found = read_as_another(runs, tmp_path / "out")
    code, said = found.pop("report")  # which is written into the run
    assert (code, "cannot be written (Permission denied)" in said) == (2, True)
    assert {name: (code, said[-300:]) for name, (code, said) in found.items() if code} == {}
    # What the other one made has an owner and a umask of its own.
    assert (tmp_path / "out" / "board.html").stat().st_uid == 0


@pytest.mark.parametrize(
    ("pattern", "blind"),
    [
        ("**/ridge.safetensors", {"score", "compare", "board", "scores", "report"}),
        ("*/config.yaml", {"score", "decoder", "board"}),
        *(
            pytest.param(pattern, blind, marks=pytest.mark.further)
            for pattern, blind in (
                ("**/data.npy", {"score", "compare", "board", "scores", "report"}),
                ("*/stages", {"score"}),
            )
        ),
    ],
)
def test_what_may_not_be_read_is_called_so(pattern, blind, runs, tmp_path):
    """safetensors says of a file that may not be read that there is none."""
    shut = {path: path.stat().st_mode for path in runs.glob(pattern)}
    assert shut
    for path in shut:
        path.chmod(0o700 if path.is_dir() else 0o600)
    try:
        found = read_as_another(runs, tmp_path / "out")
    finally:
        for path, mode in shut.items():
            path.chmod(mode)
    assert "ermission" in found.pop("audit")[1]
    if pattern == "*/config.yaml":  # a page of other runs is of use without these
        assert found["board"][0] == 0
        assert found["board"][1].count("closed: permission was denied at ") == 2, found["board"][1]
        assert "damaged" not in found["board"][1]
    for name, (code, said) in found.items():
        if name not in blind:
            assert (code, "ermission" in said, "Traceback" in said) == (2, True, False), (name, said[-500:])


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_every_file_has_the_mode_that_the_umask_says(umask, tmp_path):
    class Outside:
        """A component from outside, which writes as safetensors does."""

        def write(self, folder):
            save_file({"x": np.arange(3.0)}, folder / "outside.safetensors")

    def compute(folder):
        Outside().write(folder)
        store.write_tensors(folder / "ours.safetensors", {"x": np.arange(3.0)}, {"of": "a test"})
        store.write_json(folder / "about.json", {})
        np.save(folder / "array.npy", np.arange(3))

    before = os.umask(umask)
    store._read_umask.cache_clear()
    try:
        folder = store.RunFolder(tmp_path / "run")
        made = folder.produce("train", version=1, fields={}, upstream={}, compute=compute)
    finally:
        os.umask(before)
        store._read_umask.cache_clear()
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.path.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert len(modes) == 5
    assert store.load_tensors(made.path / "ours.safetensors")["x"].tolist() == [0, 1, 2]


def test_a_file_that_is_linked_from_somebody_else_keeps_its_mode(tmp_path, monkeypatch):
    """Only its owner may set the mode of a file, and what took a day must not be lost for it."""

    chmod = Path.chmod

    def refuse(path, mode):
        if path.name == "outside.safetensors":
            raise PermissionError(1, "Operation not permitted", str(path))
        chmod(path, mode)

    def compute(folder):
        save_file({"x": np.arange(3.0)}, folder / "outside.safetensors")

    monkeypatch.setattr(Path, "chmod", refuse)
    folder = store.RunFolder(tmp_path / "run")
    made = folder.produce("train", version=1, fields={}, upstream={}, compute=compute)
    assert (made.path / "outside.safetensors").is_file()


def test_tensors_have_one_writer_and_one_reader():
    """Whoever calls the library writes files that nobody else may read, and takes a closed file for a missing one."""
    top = Path(pipeline.__file__).parents[1]
    found = {
        path.relative_to(top).as_posix()
        for path in top.rglob("*.py")
        if any(word in path.read_text() for word in ("save_file", "load_file", "safe_open"))
    }
    assert found == {"base/store.py"}
