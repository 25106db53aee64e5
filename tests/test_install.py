"""What an installation holds: the core without any extra, what each extra brings, and the size of the wheel."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import braindecode_vis
from braindecode_vis.base.checks import EXTRAS, ConfigError, describe_missing, require
from braindecode_vis.scoring.caption_scores import CaptionScoresConfig

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Packages that nobody can install by an extra of ours, each asked for by hand where it is used.
BY_HAND = {"dreamsim", "lpips", "resource", "fcntl", "torchaudio", "neuralset", "neuraltrain"}
BLOCK = (
    "import importlib.machinery as m\n"
    "find = m.PathFinder.find_spec\n"
    f"lacks = {set(EXTRAS)!r}\n"
    "m.PathFinder.find_spec = classmethod(\n"
    "    lambda cls, name, *rest: None if name.partition('.')[0] in lacks else find(name, *rest)\n"
    ")\n"
)


def name_of(requirement):
    return (
        requirement.split(";")[0].split("[")[0].split(">")[0].split("=")[0].strip().lower().replace("_", "-")
    )


def list_extra(extra):
    return {name_of(entry) for entry in PROJECT["optional-dependencies"][extra]}


def test_every_extra_brings_what_it_is_named_for():
    for module, (package, extra) in EXTRAS.items():
        assert name_of(package) in list_extra(extra), module
    bundled = PROJECT["optional-dependencies"]["all"][0].partition("[")[2].rstrip("]").split(",")
    assert {"generate", "clip", "eeg"} <= set(bundled) <= set(PROJECT["optional-dependencies"])


def test_every_import_is_of_the_core_or_of_an_extra():
    """A package that only the developers have would fail for everyone else, and only where it is used."""
    core = {name_of(entry) for entry in PROJECT["dependencies"]}
    owners = metadata.packages_distributions()
    strays = {}
    for path in (ROOT / "braindecode_vis").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in {name.partition(".")[0] for name in modules}:
                if module in sys.stdlib_module_names | set(EXTRAS) | BY_HAND | {"braindecode_vis", "isal"}:
                    continue
                if not {name_of(owner) for owner in owners.get(module, [])} & core:
                    strays.setdefault(module, []).append(path.name)
    # These come with pydantic, Jinja and Matplotlib, and IPython with every notebook.
    assert set(strays) <= {"pydantic_core", "markupsafe", "cycler", "IPython"}, strays


def test_the_core_alone_decodes_and_reports(tmp_path):
    """The light install: arrays to scores and a page, with none of the packages that extras bring."""
    code = BLOCK + (
        "import numpy as np, braindecode_vis as bdv\n"
        "rng = np.random.default_rng(0)\n"
        "pictures = rng.random((12, 8, 8, 3), dtype=np.float32)\n"
        "shown = np.repeat(np.arange(12), 3)\n"
        "X = pictures[shown].reshape(36, -1)[:, :20] + 0.1 * rng.standard_normal((36, 20))\n"
        "data = bdv.from_arrays(X, images=pictures, shown=shown)\n"
        "few = {'evaluation.n_bootstrap': 100, 'evaluation.n_permutations': 100, 'encoder.alphas': [1.0, 10.0]}\n"
        f"run = bdv.decode(data, target='pixels', out={str(tmp_path / 'run')!r}, settings=few)\n"
        "print(len(run.scores))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 5
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "setting", "package", "extra"),
    [
        ("synthetic_digits", "target={kind: transformers, architecture: dinov2}", "transformers", "generate"),
        ("synthetic_digits", "target={kind: openclip, architecture: RN50, pretrained: openai}",
         "open_clip_torch", "clip"),
        ("synthetic_digits", f"evaluation.suite={{weights: {{clip: {ROOT / 'pyproject.toml'}}}}}",
         "open_clip_torch", "clip"),
        ("synthetic_digits", "prior={kind: diffusion}", "diffusers", "generate"),
    ],
)  # fmt: skip
def test_a_run_that_needs_an_extra_says_so_before_it_starts(tmp_path, name, setting, package, extra):
    code = BLOCK + "from braindecode_vis.cli import main\nmain()\n"
    command = [
        sys.executable,
        "-c",
        code,
        "run",
        name,
        "--out",
        str(tmp_path / "run"),
        "--set",
        setting,
        "--set",
        "generator.kind=nearest",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    sentence = done.stderr.strip().splitlines()[-1]
    assert f"needs {package}, which is not installed: pip install 'braindecode_vis[{extra}]'" in sentence
    assert not (tmp_path / "run" / "stages").exists()


def test_captions_say_so_before_they_are_written(tmp_path, monkeypatch):
    """Without transformers a captioner was missed after the training, in the last stage."""
    (tmp_path / "bank.csv").write_text("id,caption\n1,a dog\n2,a cat\n")
    (tmp_path / "config.json").write_text("{}")
    settings = CaptionScoresConfig(bank=tmp_path / "bank.csv", captioner=tmp_path)
    settings.check_files()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"captions\.captioner needs transformers, which .*\[generate\]'"):
        settings.check_files()


def test_the_image_keeps_every_cache_where_anybody_may_write():
    """Weights of the hub went below the home of its own user, where ``docker run --user`` may not write."""
    (line,) = re.findall(r"^ENV (.*)", (ROOT / "deploy" / "Dockerfile").read_text(), re.M)
    places = dict(word.split("=") for word in line.split())
    assert {"BRAINDECODE_VIS_CACHE", "HF_HOME", "MPLCONFIGDIR"} <= set(places)
    assert all(place.startswith("/cache") for place in places.values())


def test_require_tells_a_package_that_is_there_and_broken_from_one_that_lacks(monkeypatch):
    assert require("json", "nothing").dumps([]) == "[]"
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ConfigError, match=r"x needs captum.*\[attribution\]', or use y\."):
        require("captum.attr", "x", otherwise="use y")
    assert (
        describe_missing("zarr", "z")
        == "z needs zarr, which is not installed: pip install 'braindecode_vis[export]'."
    )


def test_the_wheel_is_small_and_holds_what_a_run_reads(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 13e6  # the embedded generator's weights are 9 MB of it
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "configs/phantom_eeg.yaml",
        "data_manifests/digits69.yaml",
        "py.typed",
        "latent_diffusion.safetensors",
    ):
        assert any(name.endswith(part) for name in names), part
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]
    about = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("/METADATA"))).decode()
    targets = re.findall(r"\]\(([^)]+)\)", about)
    assert len(targets) > 10
    assert not [target for target in targets if not target.startswith(("https://", "#"))]


def test_what_stands_beside_the_package_says_the_same():
    """Version, dependencies and commands are written in several files; one that lags behind misleads."""
    version = PROJECT["version"]
    assert version == braindecode_vis.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    recipe = yaml.safe_load((ROOT / "deploy" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == version
    conda = {"torch": "pytorch", "matplotlib": "matplotlib-base", "mne": "mne-base"}
    needed = {
        entry for entry in PROJECT["dependencies"] if not entry.startswith("efficientnet")
    }  # not on conda
    written = {re.sub(r"^[\w-]+", lambda found: conda.get(found[0], found[0]), entry) for entry in needed}
    assert {entry.replace(" ", "") for entry in recipe["requirements"]["run"]} == written | {"python>=3.11"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (ROOT / ".github").rglob("*.yml"):
        content = yaml.safe_load(path.read_text())
        for job in content.get("jobs", {}).values():
            for step in job["steps"]:
                for line in re.findall(r"^make (.*)", step.get("run", "")):
                    asked = re.sub(r"\S+=.*", "", line).split()
                    assert {target for target in asked if not target.startswith(".venv/")} <= targets
