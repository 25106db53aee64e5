"""The verb `corpus`, on tables of parcels: made, described, grown, proved, estimated; killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from braindecode_vis.cli import app
from braindecode_vis.datasets.corpus.reader import open_corpus
from braindecode_vis.parts.foundation.corpus import growing
from tests.killing import PYTHON_ROOT

N = 100


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two data sets of tables: ten people of one, three of the other, of whom one is also in the first."""
    folder = tmp_path_factory.mktemp("data")
    rows = [f"{k}\t7Networks_LH_Vis_{k}\tVis\t{k}\t0\t1\n" for k in range(1, N + 1)]
    (folder / "names.tsv").write_text("index\tname\tnetwork\tx\ty\tz\n" + "".join(rows))
    rng = np.random.default_rng(0)
    for source, t_r, subjects in (("movies", 2.0, range(10)), ("rest", 1.5, range(20, 23))):
        root = folder / source
        for number in subjects:
            func = root / f"sub-{number:02d}"
            func.mkdir(parents=True)
            for run in (1, 2):
                series = rng.standard_normal((60, N)).astype(np.float32)
                np.save(func / f"sub-{number:02d}_task-rest_run-{run}_timeseries.npy", series)
        (root / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": t_r}))
        (root / "dataset_description.json").write_text(json.dumps({"Name": source, "License": "CC0"}))
    (folder / "people.csv").write_text("source,subject,person\nmovies,03,Ada\nrest,sub-21,Ada\n")
    return folder


def words(folder: Path, data: Path, *sources: str) -> list[str]:
    added = [word for source in sources for word in ("--add", str(data / source))]
    settings = ("channels.atlas=schaefer100", f"channels.labels={data / 'names.tsv'}", "shard_mb=0.05")
    return ["corpus", str(folder), *added, *(word for text in settings for word in ("--set", text))]


def call(*words: str):
    return CliRunner().invoke(app, [*map(str, words)])


def test_a_corpus_is_estimated_made_grown_described_and_proved(tmp_path, data):
    folder = tmp_path / "corpus"
    told = json.loads(call(*words(folder, data, "movies"), "--dry-run", "--json").stdout)["estimate"]
    assert (told["n_new"], told["n_subjects"]) == (20, 10)
    assert told["n_bytes"] == pytest.approx(20 * 60 * N * 2)
    assert told["bytes_of_10000_hours"] == pytest.approx(10_000 * 1800 * N * 2)
    assert not folder.exists()
    made = call(*words(folder, data, "movies"))
    assert made.exit_code == 0, made.output
    assert "added 20 runs, 0.6667 h, 10 new persons" in made.stdout
    assert "held out: 1 persons" in made.stdout
    grown = call("corpus", folder, "--add", data / "rest", "--people", data / "people.csv", "--json")
    told = json.loads(grown.stdout)
    assert (told["added"]["n_new"], told["corpus"]["persons"], told["corpus"]["runs"]) == (6, 12, 26)
    assert [source["interval_s"] for source in told["corpus"]["sources"]] == [[2.0], [2.0]]
    call("corpus", folder, "--hold-out", "Ada")
    told = json.loads(call("corpus", folder, "--check", "--json").stdout)
    assert told["checked"]
    assert "Ada" in told["corpus"]["held_out"]["persons"]
    assert set(open_corpus(folder).runs.query("held_out")["subject"]) >= {"03", "21"}


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--dry-run"], "--dry-run shows the effect of --add"),
        (["--check", "--hold-out", "x"], "--check only checks a corpus"),
        (["--hold-out", "x"], "is not a corpus"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, more, sentence):
    result = call("corpus", tmp_path / "nothing", *more)
    assert result.exit_code != 0
    assert sentence in str(result.exception)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "table, sentence",
    [
        ("source\tsubject\nmovies\t1\n", "person"),
        ("source\tsubject\tperson\nmovies\t1\tA\nmovies\tsub-1\tB\n", "calls movies/1 both 'A' and 'B'"),
        ("source\tsubject\tperson\nmovies\t1\t\n", "has no person for movies/1"),
        ("\0\x01", "table of people"),
    ],
)
def test_a_wrong_table_of_people_is_one_sentence(tmp_path, data, table, sentence):
    (tmp_path / "people.tsv").write_text(table)
    result = call(*words(tmp_path / "corpus", data, "rest"), "--people", tmp_path / "people.tsv")
    assert sentence in str(result.exception)
    assert not (tmp_path / "corpus" / "corpus.json").exists()


def start(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "braindecode_vis", *words], env=environment,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_processes_side_by_side_and_a_killed_one_leave_the_same_corpus(tmp_path, data):
    whole = words(tmp_path / "whole", data, "movies", "rest")
    assert call(*whole).exit_code == 0
    want = open_corpus(tmp_path / "whole")
    both = start([*words(tmp_path / "both", data, "movies", "rest"), "--jobs", "2"])
    assert both.wait() == 0
    assert open_corpus(tmp_path / "both").digest == want.digest
    folder = tmp_path / "killed"
    n_killed = 0
    for n_shards in (1, 3):
        process = start(words(folder, data, "movies", "rest"))
        while process.poll() is None and len(list(folder.glob("stages/shard/[!.]*"))) < n_shards:
            time.sleep(0.001)
        n_killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert n_killed
    n_before = len(list(folder.glob("stages/shard/[!.]*")))
    assert call(*words(folder, data, "movies", "rest")).exit_code == 0
    assert n_before > 0
    now = open_corpus(folder)
    now.verify(read=True)
    assert now.digest == want.digest
    assert not list(folder.rglob(".tmp-*"))


def test_states_that_a_killed_call_left_go_with_the_next_call(tmp_path, data, monkeypatch):
    """Each shard writes a state as large as the manifest; the next call took those of a kill for finished ones."""
    given, states = words(tmp_path / "corpus", data, "movies"), tmp_path / "corpus" / "earlier"
    with monkeypatch.context() as patch:
        patch.setattr(growing, "forget_states", lambda *_: 1 / 0)  # as a kill just before the end
        assert call(*given).exit_code
    assert len(list(states.iterdir())) > 3
    assert call(*given).exit_code == 0
    assert [path.stem for path in states.iterdir()] == [open_corpus(tmp_path / "corpus").digest]
