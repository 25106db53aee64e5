"""Settings over subjects and seeds: what is pooled, what an interval resamples, and what validation may choose."""

import json
import sys
import types

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Score
from braindecode_vis.cli import main
from braindecode_vis.parts.studies.board import log_board, make_board, pool_runs
from braindecode_vis.parts.studies.settings_table import (
    RunSummary,
    _pick_items,
    as_frame,
    describe_choice,
    tabulate_settings,
)
from braindecode_vis.scoring.crossed import crossed_interval
from tests.parts.studies.test_board import write_run

N = 30


def make_run(folder, seed=0, subject="01", value=0.5, **encoder):
    """Return a run of one subject with items around a value."""
    config = {
        "seed": seed, "dataset": {"kind": "nsd", "subjects": [subject], "root": str(folder)},
        "encoder": {"kind": "network", "selection": {"kind": "last"}, **encoder}, "target": {"kind": "clip"},
    }  # fmt: skip
    items = value + np.random.default_rng(3).normal(0, 0.1, N)
    row = Score(
        "decoded", "top1", float(items.mean()), 0.1, N, "toy", subject, "test", seed, ci_low=0.2, ci_high=0.8
    ).as_row()
    table = pd.DataFrame({"subject": subject, "stimulus_id": [f"i{n}" for n in range(N)], "top1": items})
    return RunSummary(folder, config, [row]), table


def tabulate(*made):
    runs = [run for run, _ in made]
    items = {run.folder: table for run, table in made}
    return tabulate_settings(runs, [run.folder.name for run in runs], items, ["top1"])


def test_runs_that_differ_in_seed_and_subject_are_one_setting(tmp_path):
    made = [
        make_run(tmp_path / f"{lr}{subject}{seed}", seed, subject, 0.3 + 10 * lr + 0.02 * seed, lr=lr)
        for lr in (0.01, 0.02) for subject in ("01", "02", "03") for seed in range(2)
    ]  # fmt: skip
    table = tabulate(*made)
    assert list(table.keys) == ["encoder.lr"]
    assert [len(row.runs) for row in table.rows] == [6, 6]
    score = table.rows[0].scores["top1"]
    assert score["value"] == pytest.approx(np.mean([run.scores[0]["value"] for run, _ in made[:6]]))
    assert score["resampled"] == "3 subjects and 30 images (crossed); mean of 2 seeds each"
    means = np.array([items["top1"].to_numpy() for _, items in made[:6]]).reshape(3, 2, N).mean(axis=1)
    found = crossed_interval(means)
    assert (score["ci_low"], score["ci_high"]) == pytest.approx((found.low, found.high))
    # Runs of several folds, whose own rows say so.
    for run, _ in made:
        run.scores[0]["resampled"] = "images, widened by sqrt 2 after folds"
    wide = tabulate(*made).rows[0].scores["top1"]
    assert wide["resampled"] == f"{score['resampled']}, widened by sqrt 2 after folds"
    assert wide["ci_high"] - wide["value"] == pytest.approx(2**0.5 * (found.high - score["value"]))
    assert as_frame(table)["n_subjects"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("subjects", "n_seeds", "words"),
    [
        (["01"], 3, "3 seeds and 30 images (crossed); not subjects"),
        (["01"], 2, "no interval: 2 seeds, and an interval over seeds needs at least 3 (0.506 and 0.526)"),
        (
            ["01", "02"],
            3,
            "no interval: 2 subjects, and an interval over subjects needs at least 3 (0.526 and 0.526)",
        ),
        (["01", "02", "03"], 1, "3 subjects and 30 images (crossed); not seeds"),
    ],
)
def test_what_a_pooled_interval_speaks_of(tmp_path, subjects, n_seeds, words):
    made = [
        make_run(tmp_path / f"{subject}{seed}", seed, subject, 0.5 + 0.02 * seed)
        for subject in subjects for seed in range(n_seeds)
    ]  # fmt: skip
    score = tabulate(*made).rows[0].scores["top1"]
    assert score["resampled"] == words
    assert (score["ci_low"] is None) == words.startswith("no interval")


@pytest.mark.parametrize(("kind", "words"), [
    ("published", "3 subjects, 3 seeds and 30 images (crossed)"),
    ("leave_one_subject_out", "3 subjects and 30 images (crossed); mean of 3 seeds each"),
])  # fmt: skip
def test_a_seed_of_one_network_for_all_subjects_is_a_factor(tmp_path, kind, words):
    """A lucky seed lifts all subjects that one network decodes; networks of their own share no luck."""
    made = []
    for seed in range(3):
        run, items = make_run(tmp_path / str(seed), seed, "01", 0.5 + 0.05 * seed)
        several = pd.concat(
            [items.assign(subject=name, top1=items["top1"] + 0.02 * k) for k, name in enumerate("abc")]
        )
        row = run.scores[0]
        run.scores[:] = [{**row, "subject": name, "value": float(several[several["subject"] == name]["top1"].mean())}
                         for name in "abc"]  # fmt: skip
        run.config["split"] = {"kind": kind}
        made.append((run, several))
    score = tabulate(*made).rows[0].scores["top1"]
    assert score["resampled"] == words
    cube = np.array([several["top1"].to_numpy().reshape(3, N) for _, several in made]).swapaxes(0, 1)
    found = crossed_interval(cube if kind == "published" else cube.mean(axis=1))
    assert (score["value"], score["ci_low"], score["ci_high"]) == pytest.approx(
        (found.value, found.low, found.high)
    )


def test_a_subject_decoded_alone_and_with_others_is_two_settings(tmp_path):
    alone, items = make_run(tmp_path / "a")
    together, _ = make_run(tmp_path / "b")
    together.config["dataset"]["subjects"] = ["01", "02"]
    table = tabulate((alone, items), (together, items))
    assert list(table.keys) == ["dataset.subjects"]
    assert [row.runs for row in table.rows] == [["a"], ["b"]]
    # One run says its interval itself.
    assert table.rows[0].scores["top1"]["ci_low"] == 0.2
    several = pd.concat([items, items.assign(subject="02")])
    one = tabulate((alone, None), (make_run(tmp_path / "c", seed=1)[0], several))
    assert one.rows[0].scores["top1"]["resampled"].startswith("no interval: 2 seeds, and")


def add_fits(folder, values, **more):
    """Write what a run keeps of its fits, with the validation scores of its folds."""
    stages = {"retrieve": {"fingerprint": "eee555"}}
    upstream = {}
    for number, value in enumerate(values):
        upstream[f"train{number}"] = f"abc{number}"
        at = folder / "stages" / "train" / f"fold{number:02d}-abc{number}"
        at.mkdir(parents=True)
        early = {"validation_top5": 1.0, "n_validation_images": 50}
        record = {"history": [early, {"validation_top5": value, "n_validation_images": 50, **more}]}
        (at / "network.json").write_text(json.dumps(record))
    at = folder / "stages" / "retrieve" / "eee555"
    at.mkdir(parents=True)
    (at / store.PROVENANCE).write_text(json.dumps({"upstream": upstream}))
    path = folder / store.PROVENANCE
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"stages": stages}))


@pytest.fixture
def swept(tmp_path):
    """Two settings of two seeds, of which the one that does better on the test does worse on validation."""
    for epochs, gain, validation in ((5, 0.3, 0.4), (50, 0.0, 0.6)):
        for seed in (0, 1):
            folder = tmp_path / f"e{epochs}s{seed}"
            write_run(
                folder, gain=gain, seed=seed,
                encoder={"kind": "network", "epochs": epochs, "selection": {"kind": "last"}},
            )  # fmt: skip
            add_fits(folder, [validation, validation + 0.1 * seed])
    return tmp_path


def test_validation_alone_chooses_and_the_page_says_so(swept):
    make_board([swept], swept / "board.html")
    page = (swept / "board.html").read_text()
    table = pd.read_csv(swept / "settings.csv").set_index("encoder.epochs")
    assert table["best_on_validation"].to_dict() == {5: False, 50: True}
    assert table.loc[50, "validation_value"] == pytest.approx(
        0.625
    )  # of the last epoch, over folds and seeds
    assert table.loc[5, "value"] > table.loc[50, "value"]
    assert page.count("best on validation</span>") == 1
    assert "Chosen by validation alone" in page
    assert page.count("<polyline points=") == 2
    assert 'aria-label="Parallel coordinates of 2 settings over epochs, validation: top5' in page


def test_nothing_is_called_best_without_validation_scores_of_one_kind(swept):
    folders = sorted(path for path in swept.iterdir() if path.is_dir())
    assert describe_choice(pool_runs(folders)).startswith(
        "best on validation: encoder.epochs=50 (0.625). Chosen"
    )
    history = folders[0] / "stages" / "train" / "fold00-abc0" / "network.json"
    written = history.read_text()
    history.write_text(written.replace('"n_validation_images": 50', '"n_validation_images": 500'))
    assert "whose chance levels differ" in pool_runs(folders).reason
    history.write_text(written.replace("validation_top5", "validation_top1"))
    assert pool_runs(folders).best is None
    ridge = {"choices": [{"alpha": 1.0, "mse": 0.3}, {"alpha": 2.0, "mse": 0.2}]}
    for folder in folders[:2]:
        for path in folder.glob("stages/train/*/network.json"):
            path.write_text(json.dumps(ridge))
    assert "measure different things" in pool_runs(folders).reason
    for path in folders[0].glob("stages/train/*/network.json"):
        path.write_text(json.dumps({"choices": []}))
    found = pool_runs(folders)
    assert found.best is None
    assert "1 of 2 have no validation score" in found.reason
    assert "encoder.selection.hold_out" in found.reason


def test_settings_of_other_subjects_or_data_are_not_compared(tmp_path):
    """Of a sweep that was half done, the setting that had the easy subject alone was called best."""
    made = []
    for lr, subject in ((0.01, "01"), (0.01, "02"), (0.02, "01"), (0.02, "02")):
        folder = tmp_path / f"{lr}-{subject}"
        folder.mkdir()
        (folder / store.PROVENANCE).write_text("{}")
        add_fits(folder, [lr * 10])
        made.append(make_run(folder, subject=subject, lr=lr))
    assert tabulate(*made).best == 1
    half = tabulate(*made[:3])
    assert half.best is None
    assert "1 of 2 have runs of only some subjects" in half.reason
    for run, _ in made[2:]:
        run.config["dataset"]["kind"] = "god"
    assert "for different data or targets" in tabulate(*made).reason


def test_trackers_get_settings_and_scores(swept, monkeypatch, capsys):
    rows, told = make_board([swept], swept / "board.html"), []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def add_hparams(self, settings, scores, run_name):
            told.append((settings["encoder.epochs"], list(scores), run_name))

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert log_board(rows, "tensorboard", swept) == swept / "tensorboard"
    assert sorted(told)[0] == (5, ["score/pixcorr"], "e5s0")
    monkeypatch.setattr(sys, "argv", ["braindecode-vis", "board", str(swept), "--log", "mlflow"])
    with pytest.raises(SystemExit):
        main()
    assert "--log" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metric", "subject", "value", "n_items"),
    [
        ("top1", "01", 0.25, 4),
        ("top1", "01", 0.25 * (1 + 1e-6), 4),  # written with fewer digits
        ("top1", "01", 0.25 * (1 + 1e-4), None),  # another score than that of these items
        ("top1", "01", 0.5, None),
        ("top1", "all", 0.5, 8),
        ("top1", "03", 0.5, None),
        ("top5", "01", 0.25, None),
    ],
)
def test_items_stand_for_a_score_that_is_their_mean(metric, subject, value, n_items):
    items = pd.DataFrame(
        {
            "subject": np.repeat(["01", "02"], 4),
            "stimulus_id": list("abcdabcd"),
            "top1": [0, 0, 0, 1.0, 1, 1, 1, 0],
        }
    )
    found = _pick_items(items, metric, subject, value, seed=0)
    assert (found and len(found.values)) == n_items
    assert _pick_items(None, metric, subject, value, seed=0) is None
    assert _pick_items(items.assign(top1=np.nan), metric, subject, value, seed=0) is None
