"""The notebooks run from top to bottom, are kept without outputs, and hold no logic of their own."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.whole

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(path):
    """Return a notebook with the outputs of a fresh run; the file stays as it is."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One folder for all notebooks, so that the simulated recording is made once."""
    return tmp_path_factory.mktemp("notebooks")


def test_every_subject_has_its_notebook():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart", "02_things_eeg2", "03_things_meg", "04_nsd_fmri", "05_v4_spikes",
        "06_bring_your_own_data", "07_own_eeg", "08_own_fmri",
        "09_digits_fmri", "10_faces_eeg", "11_categories_fmri", "12_live",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert len(path.read_bytes()) < 20_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_explained(path):
    """What would need a function belongs into the package, with a test."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        tree = ast.parse(cell.source)
        made = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.While, ast.Try)
        assert not [node for node in ast.walk(tree) if isinstance(node, made)], cell.source
        assert len(cell.source.splitlines()) <= 35
        assert max(map(len, cell.source.splitlines())) <= 110
    assert len(cells) <= 9
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert texts[0].startswith("# ")
    assert len(texts) >= len(cells) - 2
    assert all(max(map(len, text.splitlines())) <= 130 for text in texts)
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(texts)):
        assert (FOLDER / link).exists(), link


REAL = [path for path in NOTEBOOKS if "09" <= path.stem < "12"]  # recordings that a user's machine fetches
# A minute and a half together; `make docs` runs them too.
LONG = [path for path in NOTEBOOKS if "02" <= path.stem < "09"]


@pytest.fixture
def settings(workspace, monkeypatch):
    """What notebooks read from the environment."""
    monkeypatch.setenv("BRAINDECODE_VIS_NOTEBOOKS", str(workspace))
    monkeypatch.setenv("BRAINDECODE_VIS_NOTEBOOK_SIZE", "tiny")
    monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(workspace / "cache"))


@pytest.mark.usefixtures("settings")
def test_cells_run_without_a_warning(capsys):
    """In this process, where a kernel would start and import for longer than the cells take."""
    names: dict = {}
    for cell in nbformat.read(FOLDER / "07_own_eeg.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)  # a warning is an error here
    assert capsys.readouterr().err == ""
    assert len(names["found"].classes) == 60


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    "path",
    [
        *(pytest.param(path, marks=pytest.mark.further) for path in NOTEBOOKS if path not in REAL + LONG),
        *(pytest.param(path, marks=pytest.mark.slow) for path in LONG),
        *(pytest.param(path, marks=[pytest.mark.slow, pytest.mark.shared]) for path in REAL),
    ],
    ids=lambda path: path.stem,
)
def test_notebook_runs(path, monkeypatch, request):
    if path in REAL:
        monkeypatch.setenv("BRAINDECODE_VIS_DATA", str(request.getfixturevalue("shared") / "data"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    before = path.read_bytes()
    notebook = execute(path)
    assert path.read_bytes() == before
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert errors == [], "a notebook warns nobody: " + "".join(errors)
    drawn = [o.data for o in outputs if "data" in o and o.data.get("text/plain", "").startswith("<Figure")]
    assert all("image/png" in data for data in drawn), "a figure is shown as text"
    assert sum(output.output_type == "execute_result" or "data" in output for output in outputs) >= 1


@pytest.mark.usefixtures("settings")
def test_the_command_shows_the_demo_of_the_quickstart(workspace, command_line):
    """What the notebook above has made is reused; where this test is run alone, the command makes it."""
    words = ("demo", "--size", "tiny", "--snr", "0.3", "--out", workspace / "demo")
    done = command_line(*words, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["scores"]
    (top,) = [r for r in rows if r["metric"] == "mean_rank" and r["method"] == "decoded"]
    assert 1 <= top["value"] <= top["gallery_size"]
    assert (workspace / "demo" / "report.html").is_file()
    again = command_line(*words)
    assert "computed" not in again.stderr
    assert "unseen concepts" in again.stdout
    assert "follow mixture" in again.stdout
