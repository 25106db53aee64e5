"""Python shows its progress where somebody watches, and nothing anywhere else."""

import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis.pipeline import progress
from braindecode_vis.pipeline.runs import SilentListener

FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}


def make_data():
    rng = np.random.default_rng(0)
    pictures = rng.random((12, 6, 6))
    return bdv.from_arrays(pictures.reshape(12, -1) @ rng.normal(size=(36, 20)), images=pictures)


class Output:
    """What a cell of a notebook shows: one table, which later ones replace."""

    def __init__(self):
        self.tables, self.n_outputs = [], 0

    def display(self, table, *, display_id):
        assert display_id is True
        self.n_outputs += 1
        self.update(table)
        return self

    def update(self, table):
        self.tables.append(table._repr_mimebundle_((), ())["text/plain"])


@pytest.fixture
def notebook(monkeypatch):
    output, kernel = Output(), MagicMock()
    output.kernel = kernel
    kernel.execution_count = 1
    monkeypatch.setattr("IPython.get_ipython", lambda: kernel)
    monkeypatch.setattr("IPython.display.display", output.display)
    monkeypatch.setattr(progress, "_SECONDS_A_DRAWING", 0.0)
    return output


@pytest.fixture
def terminal(monkeypatch):
    watch_with(monkeypatch, "stdout", "stderr")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # for rich, which writes to what pytest captures


def watch_with(monkeypatch, *names):
    streams = {name: SimpleNamespace(isatty=lambda name=name: name in names) for name in ("stdout", "stderr")}
    monkeypatch.setattr(progress, "sys", SimpleNamespace(**streams, modules=sys.modules))


def test_a_notebook_gets_one_output_that_ends_as_one_line(notebook, capsys):
    bdv.decode(make_data(), split=3, settings=FEW)
    assert notebook.n_outputs == 1
    assert any("encoders of folds" in table and "1/3" in table for table in notebook.tables)
    words = " ".join(notebook.tables[-1].split())  # in one line, where the browser is wide enough
    assert re.fullmatch(
        r"preprocess [\d.]+ s, embed .* train [\d.]+ s \(3 parts\), .* evaluate [\d.]+ s", words
    )
    assert capsys.readouterr() == ("", "")


def test_a_notebook_keeps_messages(notebook):
    with progress.NotebookListener().watch("train:") as show:
        show(1, 4, "loss 0.5")
        show(0, 0, "the batch was halved [/at 4]")  # brackets are no markup
    assert "loss 0.5" in notebook.tables[0]
    assert notebook.tables[-1].strip() == "train: the batch was halved [/at 4]"


def test_another_cell_gets_an_output_of_its_own(notebook):
    """What a run did later was added to the output of the cell that had made the run."""
    listener = progress.NotebookListener()
    with listener.watch("train:") as show:
        show(0, 0, "first")
        notebook.kernel.execution_count = 2
        show(0, 0, "second")
    assert notebook.n_outputs == 2
    assert notebook.tables[-1].strip() == "train: second"


def test_a_terminal_gets_lines_of_stages(terminal, capsys):
    run = bdv.decode(make_data(), split=3, settings=FEW)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "train fold02" in shown.err
    bdv.open_run(run.folder).scores  # noqa: B018
    assert "reused" in capsys.readouterr().err


def test_a_decoder_shows_the_epochs_of_its_fit(terminal, capsys):
    data = np.random.default_rng(0).normal(size=(20, 4, 16)).astype(np.float32)
    pictures = np.random.default_rng(1).random((20, 4, 4))
    network = {"kind": "network", "network": {"kind": "eegproject"}, "epochs": 1, "device": "cpu"}
    bdv.Decoder(encoder=network).fit(data, pictures)
    assert "epoch 1/1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["notebook", "terminal"])
def test_verbose_false_shows_nothing(where, request, capsys):
    watched = request.getfixturevalue(where)
    run = bdv.decode(make_data(), split=3, settings=FEW, verbose=False)
    bdv.open_run(run.folder, verbose=False).scores  # noqa: B018
    bdv.Decoder(verbose=False).fit(np.arange(36.0).reshape(12, 3), np.eye(16).reshape(16, 4, 4)[:12])
    assert capsys.readouterr() == ("", "")
    assert watched is None or not watched.tables


@pytest.mark.parametrize("watched", ["stdout", "stderr"])
def test_a_script_whose_output_or_messages_go_to_a_file_is_silent(watched, monkeypatch):
    watch_with(monkeypatch, watched)
    assert isinstance(progress.find_listener(), SilentListener)


@pytest.mark.parametrize(
    "seconds, words", [(0.2, "0 s"), (89, "89 s"), (120, "2 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_durations_have_a_unit_that_fits(seconds, words):
    assert progress.describe_seconds(seconds) == words


def test_the_setting_is_copied_and_not_saved(tmp_path):
    import pickle

    fitted = bdv.Decoder(verbose=False).fit(np.arange(36.0).reshape(12, 3), np.eye(16).reshape(16, 4, 4)[:12])
    assert not pickle.loads(pickle.dumps(fitted)).verbose
    assert bdv.Decoder.load(fitted.save(tmp_path / "decoder")).verbose
