"""CONTRIBUTING.md is true: its examples, done to the letter in a copy of the package, run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from braindecode_vis.pipeline.runs import read_scores

pytestmark = pytest.mark.whole

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK = re.compile(
    r"^```(?:python|yaml|text)\n# (\S+?)(?:, (under \"\w+\"|at the end))?\n(.*?)^```$", re.M | re.S
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Do every step of the five tables that writes code."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("braindecode_vis", "configs", "data_manifests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall(TEXT)
    assert len(blocks) == 16
    for name, place, code in blocks:
        path = root / name
        if place == "at the end":
            path.write_text(f"{path.read_text().rstrip()}\n\n\n{code}")
        elif place:
            name = place.split()[1].strip('"')
            content = path.read_text()
            head = next(h for h in (f'    "{name}": {{\n', f"\n{name} = (\n") if h in content)
            path.write_text(content.replace(head, head + code, 1))
        else:
            assert not path.exists()
            path.write_text(code)
    return root


def call(copy, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


# Several commands in one process, which imports for two seconds.
COMMANDS = """
import json, sys
from braindecode_vis.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["braindecode-vis", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def call_commands(copy, *commands):
    return call(copy, "-c", COMMANDS, json.dumps([[str(word) for word in words] for words in commands]))


def test_files_that_the_tables_name_are_there():
    """Whatever is no example of a new file must exist."""
    new = {name for name, place, _ in BLOCK.findall(TEXT) if not place}
    named = set(
        re.findall(r"`((?:braindecode_vis|docs|tests|configs|data_manifests)/[\w/]*(?:\.\w+)?)`", TEXT)
    )
    missing = {name for name in named - new if not (ROOT / name).exists() and "my_" not in name}
    assert not missing


def test_a_data_set_costs_what_the_page_says():
    """The files that name the example are those of the tables of steps, and its lines are counted."""
    start = TEXT.index("## A data set")
    section = TEXT[start : TEXT.index("```python", start)]
    steps = set(re.findall(r"`((?:braindecode_vis|tests|configs|data_manifests)/[\w/]+\.\w+)`", section))
    listed = {name.replace("my_lab", "v4_photographs") for name in steps}
    folders = ("braindecode_vis", "configs", "data_manifests", "tests")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".tsv")
    ]
    texts = {path.relative_to(ROOT).as_posix(): f"{path.name}\n{path.read_text()}" for path in files}
    naming = {name for name, text in texts.items() if re.search("v4[-_]photographs", text)}
    further = ("configs/", "data_manifests/tracks/")  # recipes and a question beside the first one
    others = {name for name in naming - listed if not name.startswith(further)}
    beside = (
        "test_contributing",
        "report/test_simulated",
        "parts/studies/test_tracks",
        "parts/audit/test_near_copies",
    )
    assert others == {f"tests/{name}.py" for name in beside}
    assert _count_lines_of("v4_photographs") <= 253
    costs = re.findall(r"`(\w+)` (\d{3,4})\b", section[section.index("**What it costs.**") :])
    assert len(costs) == 4
    for kind, n in costs:
        assert abs(_count_lines_of(kind) - int(n)) < 0.1 * int(n), kind
    shared = [name for name in naming & listed if "v4_photographs" not in name]
    # Presets of a phantom are a line for each of four sizes, and one that closes them.
    n_lines = sum(len(re.findall("^.*v4[-_]photographs.*$", texts[name], re.M)) for name in shared) + 5
    assert f"and {n_lines} in the files of steps" in section


def _count_lines_of(kind):
    """Lines of reader, writer of the phantom and tests."""
    places = ("braindecode_vis/datasets/{}.py", "braindecode_vis/parts/phantom/formats/{}_format.py")
    files = [ROOT / place.format(kind) for place in (*places, "tests/datasets/test_{}.py")]
    return sum(len(path.read_text().splitlines()) for path in files)


@pytest.mark.further
def test_the_examples_run_together(copy, tmp_path):
    rng = np.random.default_rng(0)
    light = rng.uniform(0.2, 1, size=(40, 1, 1))  # so that brightness can be decoded
    pictures = (light * rng.integers(0, 256, (40, 8, 8))).astype(np.uint8)
    shown = np.repeat(np.arange(40), 2)
    voxels = pictures.reshape(40, -1)[shown] @ rng.normal(size=(64, 60)) / 1000
    with h5py.File(tmp_path / "gratings.h5", "w") as file:
        for key, values in (("voxels", voxels), ("pictures", pictures), ("shown", shown)):
            file[key] = values
    out = tmp_path / "run"
    asked = ["--set", "evaluation.metrics=[{kind: brightness_gap}]"]
    network = "{kind: network, network: {kind: my_net}, objectives: [{kind: fourth_power}], epochs: 2, batch_size: 16}"
    trained = ["--root", tmp_path, "--out", tmp_path / "n", "--set", f"encoder={network}"]
    told = call_commands(
        copy,
        ["check", "my_lab", "--root", tmp_path],
        ["run", "my_lab_ridge", "--root", tmp_path, "--out", out, *asked],
        ["analyze", out, "--analysis", "my_question"],
        ["train", "my_lab_ridge", *trained],
    )
    assert "80 as declared" in told
    metrics = {row["metric"]: row for row in read_scores(out) if row["method"] == "decoded"}
    assert metrics["top1"]["value"] > 0.5
    assert metrics["brightness_gap"]["p_value"] < 0.05
    page = (out / "report.html").read_text()
    assert "Gratings seen in my lab" in page
    assert "Brightness gap" in page


def test_the_examples_are_typed_and_formatted(copy):
    """Examples teach by what they look like."""
    files = [str(copy / name) for name, place, _ in BLOCK.findall(TEXT) if name.endswith(".py") and not place]
    call(copy, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", *files)
    call(copy, "-m", "ruff", "format", "--check", "--config", ROOT / "pyproject.toml", *files)


def test_mutation_testing_looks_at_files_that_are_there():
    """Files moved, and `make mutate` went on without them."""
    from tests.mutate import SCOPE

    for pattern in SCOPE:
        assert list(ROOT.glob(pattern)), pattern
