"""Parts can be taken away, and parts of other packages enter by the same door.

Each part is removed in turn from a copy of the package. What is left must run with the same scores, and name what is
missing, with the part that brings it, in one sentence.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from braindecode_vis.base.parts import SHIPPED, find_parts
from braindecode_vis.cli import EXAMPLES

ROOT = Path(__file__).resolve().parents[1]
PARTS = sorted(SHIPPED)
#: What a person gives to ask for something that only this part brings.
ASKED = {
    "analyses": [["analyze", "--list"], ["encode", "synthetic_digits"], ["describe", "rsa"]],
    "audit": [["audit", "run"]],
    "cluster": [["plan", "synthetic_digits"], ["status", "run"]],
    "foundation": [["corpus", "rest"], ["describe", "labram"]],
    "live": [["live", "run"], ["stream", "phantom"]],
    "phantom": [["phantom", "nsd", "--out", "there"]],
    "studies": [
        ["demo"],
        ["sweep", "synthetic_digits"],
        ["compare", "run"],
        ["score", "a.npy", "--targets", "b.npy"],
        ["tracks"],
        ["submit", "entry", "--track", "digits69"],
    ],
}
#: Verbs of every installation, and of `analyses` where it is there.
KEPT = [["configs"], ["describe", "synthetic_digits"], ["describe", "encoder"], ["datasets"], ["--help"]]

WORK = """
import contextlib, io, json, sys
from pathlib import Path
import numpy as np
import braindecode_vis as bdv
from braindecode_vis.cli import main

def call(words):
    sys.argv, out, err = ["braindecode-vis", *words], io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()

asked, kept, runs = json.loads(sys.argv[1])
found = {"kept": [call(words) for words in kept], "asked": [call(words) for words in asked]}
if not runs:
    sys.__stdout__.write("FOUND" + json.dumps(found))
    sys.exit()
few = [x for name in ("n_bootstrap", "n_permutations") for x in ("--set", f"evaluation.{name}=100")]
found["run"] = call(["run", "synthetic_digits", "--out", "run", *few])
found["scores"] = json.loads(Path("run/scores.json").read_text())
rng = np.random.default_rng(0)
images = rng.integers(0, 255, (24, 8, 8, 3), dtype=np.uint8)
X = images.reshape(24, -1) @ rng.standard_normal((192, 20)) / 1000
settings = {"evaluation.n_bootstrap": 100, "evaluation.n_permutations": 100}
run = bdv.decode(bdv.from_arrays(X, images=images), split=4, settings=settings)
found["arrays"] = json.loads(run.scores.to_json(orient="records"))
sys.__stdout__.write("FOUND" + json.dumps(found))
"""


def _copy_without(parts: list[str], folder: Path) -> None:
    """Copy the package without some parts."""
    for name in ("configs", "data_manifests"):
        shutil.copytree(ROOT / name, folder / name, copy_function=os.link)
    shutil.copytree(ROOT / "braindecode_vis", folder / "braindecode_vis", copy_function=os.link)
    for part in parts:
        shutil.rmtree(folder / "braindecode_vis" / "parts" / part)


def _work_without(parts: list[str], folder: Path, asked: list[list[str]], *, runs: bool = True) -> dict:
    """Do `WORK` with a copy of the package that lacks some parts."""
    _copy_without(parts, folder)
    there = folder / "there"
    there.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", WORK, json.dumps([asked, KEPT, runs])],
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}, cwd=there,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ModuleNotFoundError" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("FOUND")[2])


def _drop_names(rows: list[dict]) -> list[dict]:
    """Leave out where rows come from; fingerprints hash no paths and stay."""
    return [{key: value for key, value in row.items() if key != "created"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the whole package finds."""
    return _work_without([], tmp_path_factory.mktemp("whole"), [])


def _check_sentences(found: dict, parts: list[str], asked: list[list[str]]) -> None:
    for words, (code, out, err) in zip(KEPT, found["kept"], strict=True):
        assert code == 0, (words, err)
        assert "Traceback" not in out + err
    for words, (code, _, err) in zip(asked, found["asked"], strict=True):
        assert code == 2, (words, err)
        assert re.fullmatch(
            r"error: .*braindecode_vis\.parts\.\w+, which is not installed; reinstall .*\.\n", err
        ), words
        assert any(f"parts.{name}," in err for name in parts), (words, err)


@pytest.mark.parametrize(
    "part", [PARTS[0], *(pytest.param(part, marks=pytest.mark.further) for part in PARTS[1:])]
)
def test_without_a_part_its_verbs_and_kinds_are_named_with_it(part, tmp_path):
    _check_sentences(_work_without([part], tmp_path, ASKED[part], runs=False), [part], ASKED[part])


# Without all parts by default; each alone takes as long and finds the same.
@pytest.mark.parametrize("part", ["all", *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS)])
def test_without_parts_a_run_scores_the_same(part, tmp_path, whole):
    parts = PARTS if part == "all" else [part]
    asked = [words for name in parts for words in ASKED[name]]
    found = _work_without(parts, tmp_path, asked)
    _check_sentences(found, parts, asked)
    assert found["run"][0] == 0, found["run"]
    assert _drop_names(found["scores"]) == _drop_names(whole["scores"])
    assert _drop_names(found["arrays"]) == _drop_names(whole["arrays"])


@pytest.mark.slow
def test_the_tests_of_the_core_pass_without_parts(tmp_path):
    """Tests that name no part, and no verb of one, know nothing of parts: they pass where all parts are gone."""
    _copy_without(PARTS, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("parts", "fuzz"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    words = [
        "braindecode_vis.parts",
        "tests.parts",
        "parts/",
        '"parts',
        *(verb for part in find_parts() for verb in part.verbs),
    ]
    names = re.compile("|".join(rf"{re.escape(word)}\b" for word in words))
    core = [
        str(path.relative_to(tmp_path))
        for folder in (
            "base",
            "config",
            "datasets",
            "embeddings",
            "encoders",
            "generation",
            "preprocessing",
            "scoring",
        )
        for path in sorted((tmp_path / "tests" / folder).rglob("test_*.py"))
        if not names.search(path.read_text())
    ]
    assert len(core) > 40
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *core,
         # Their shipped configurations name analyses, which are then missing in one sentence.
         "-k", "not test_atm_is_configured_as_released"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_verbs_that_go_on_when_they_are_given_again():
    """Who stops another verb is not promised that it goes on."""
    verbs = {name: verb for part in find_parts() for name, verb in part.verbs.items()}
    assert {name for name, verb in verbs.items() if not verb.starts_anew} == {
        "analyze", "encode", "corpus", "phantom", "demo", "pretrain", "train-generator", "sweep",
    }  # fmt: skip


def test_parts_register_what_the_core_says_of_them():
    """The table of `parts` serves the sentence for missing parts alone; it must not promise anything else."""
    registered = {
        part.name: {*part.verbs, *part.abilities, *(kind for kinds in part.kinds.values() for kind in kinds)}
        for part in find_parts()
        if part.distribution is None
    }
    assert registered == {part: set(names.split()) for part, names in SHIPPED.items()}


@pytest.mark.parametrize("part", find_parts(), ids=lambda part: part.name)
def test_every_reference_of_a_part_leads_somewhere(part):
    verbs = {verb.call for verb in part.verbs.values()}
    kinds = {reference for known in part.kinds.values() for reference in known.values()}
    for reference in {*verbs, *kinds, *part.abilities.values(), *filter(None, [part.page])}:
        assert callable(part.load(reference)), reference
    for module in filter(None, part.reduce):
        assert find_spec(f"{part.package}.{module}") is not None
    assert set(part.verbs) <= set(EXAMPLES)


OUTSIDE = """
import typer
from typing import Literal
from braindecode_vis.base.parts import Part, Verb
from braindecode_vis.base.settings import Settings

PART = Part(
    name="greetings", says="says hello", package="greetings",
    verbs={"greet": Verb("work:greet", examples=("greet you",))},
    kinds={"analysis": {"count_rows": "work:CountRowsConfig"}},
    page="work:add_greeting",
)
"""
OUTSIDE_WORK = '''
from typing import Annotated, Literal
import pandas as pd
import typer
from braindecode_vis.base.settings import Settings

def greet(name: Annotated[str, typer.Argument()]):
    """Say hello."""
    typer.echo(f"hello {name}")

def greet_oddly(name: int | str):
    """Take what typer cannot read."""

class CountRowsConfig(Settings):
    """Count the trials."""
    kind: Literal["count_rows"] = "count_rows"

    def compute(self, study):
        from braindecode_vis.parts.analyses.study import Findings
        n = len(study.responses.trials)
        return Findings(title="Rows", summary=f"{n} rows.", table=pd.DataFrame({"n": [n]}), scores=[], plots=[])

def add_greeting(run):
    from braindecode_vis.report.page import Addition, ExtraSection
    return Addition(shows=["hello"], make=lambda: [ExtraSection("A greeting", "Hello from outside.")])

def fail_at_once(run):
    raise KeyError("who")

def fail_late(run):
    from braindecode_vis.report.page import Addition
    return Addition(shows=["hello"], make=lambda: [1 / 0])
'''


FEW = "--set evaluation.n_bootstrap=100 --set evaluation.n_permutations=100"


def _install(site: Path, modules: dict[str, str], entry: str) -> None:
    """Write a package and the metadata that pip would write."""
    for name, text in modules.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    about = site / "greetings_part-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: greetings-part\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[braindecode_vis.parts]\ngreetings = {entry}\n")


CALLS = """
import sys
from braindecode_vis.cli import main
for line in sys.argv[1:]:
    sys.argv = ["braindecode-vis", *line.split()]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def _call(site: Path, cwd: Path, *lines: str) -> subprocess.CompletedProcess:
    """Call the command line by line in one process, which imports for longer than they take."""
    return subprocess.run(
        [sys.executable, "-P", "-c", CALLS, *lines], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{site}:{ROOT}"},
    )  # fmt: skip


def test_a_part_of_another_package_brings_a_verb_an_analysis_and_a_section(tmp_path):
    site, there = tmp_path / "site", tmp_path / "there"
    there.mkdir()
    modules = {
        "greetings/__init__.py": "",
        "greetings/register.py": OUTSIDE,
        "greetings/work.py": OUTSIDE_WORK,
    }
    _install(site, modules, "greetings.register:PART")
    asked = f"analyze synthetic_digits --out run --analysis count_rows {FEW}"
    done = _call(site, there, "greet you", "greet --help", asked)
    assert done.returncode == 0, done.stderr
    said, _, others = done.stdout.partition("\n")
    assert said == "hello you"
    assert "greet you" in others
    assert "rows." in others
    assert "Hello from outside." in (there / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "register, said",
    [
        ("import missing_library", "fails at import with ModuleNotFoundError"),
        ("import sys; sys.exit('no licence')", "fails at import with SystemExit: no licence"),
        ("PART = 3", "is no braindecode_vis.base.parts.Part"),
        *(
            pytest.param(OUTSIDE.replace(old, new), said, marks=pytest.mark.further)
            for old, new, said in (
                ('"greet"', '"audit"', "provides audit, which another part provides already"),
                ('"greet"', '"run"', "braindecode_vis has a verb of that name"),
                ("work:greet", "lost:greet", "the verb greet of the part greetings cannot be used"),
                ("work:greet", "work:greet_oddly", "the verb greet of the part greetings cannot be used"),
            )
        ),
    ],
)
def test_a_broken_part_of_another_package_is_named_and_the_rest_works(register, said, tmp_path):
    _install(
        tmp_path / "site",
        {"greetings/__init__.py": "", "greetings/register.py": register, "greetings/work.py": OUTSIDE_WORK},
        "greetings.register:PART",
    )
    done = _call(tmp_path / "site", tmp_path, "describe run", "run --help")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: ")
    assert said in done.stderr
    # The help of a verb of the same name stays as it is.
    assert "braindecode-vis run" in done.stdout
    assert "greet you" not in done.stdout


@pytest.mark.further
def test_a_section_that_fails_costs_a_run_no_report(tmp_path):
    """The page is written without it, and once more when the part is mended."""
    site, page = tmp_path / "site", tmp_path / "run" / "report.html"
    modules = {"greetings/__init__.py": "", "greetings/work.py": OUTSIDE_WORK}
    _install(site, {**modules, "greetings/register.py": OUTSIDE}, "greetings.register:PART")
    for name, said in (
        ("fail_at_once", "the part greetings adds nothing to the report: KeyError: 'who'"),
        ("fail_late", "the part greetings adds nothing to the report: ZeroDivisionError: division by zero"),
        ("add_greeting", ""),
    ):
        (site / "greetings" / "register.py").write_text(OUTSIDE.replace("work:add_greeting", f"work:{name}"))
        done = _call(site, tmp_path, f"run synthetic_digits --out run {FEW}")
        assert done.returncode == 0, done.stderr
        assert said in " ".join(done.stderr.split())
        assert ("Hello from outside." in page.read_text()) == (not said)


def test_metadata_in_the_current_folder_bring_no_part(tmp_path):
    """A folder that was downloaded may hold such metadata; its code must not run."""
    _install(tmp_path, {"greetings/__init__.py": "raise SystemExit('ran')"}, "greetings.register:PART")
    done = _call(tmp_path, tmp_path, "describe run")
    assert done.returncode == 0, done.stderr
    assert "ran" not in done.stderr
