"""Sweeps: which runs there are, what is shared, and what a failed run leaves."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.studies import compare
from braindecode_vis.parts.studies import sweep as sweeping
from braindecode_vis.parts.studies.compare import compare_runs, read_items
from braindecode_vis.parts.studies.sweep import list_combinations, parse_axes, summarise, sweep
from braindecode_vis.pipeline.runs import read_scores
from braindecode_vis.pipeline.together import THREAD_LIMITS, describe_thread_limits, limit_threads
from braindecode_vis.scoring.retrieval import Retrieval, compute_top_k_hits

QUICK = [
    "evaluation.n_bootstrap=200",
    "evaluation.n_permutations=200",
    "dataset.n_train=40",
    "dataset.n_test=20",
]


@pytest.mark.parametrize(
    "text, values",
    [
        ("seed=0..2", ["0", "1", "2"]),
        ("a.b=[1, 2],[3]", ["[1, 2]", "[3]"]),
        ("x={a: 1, b: 2}", ["{a: 1, b: 2}"]),
    ],
)
def test_axes_are_read_as_written(text, values):
    assert list(parse_axes([text]).values()) == [values]


@pytest.mark.parametrize(
    "texts", [["seed"], ["seed="], ["seed=1,,2"], ["seed=1", "seed=2"], ["seed=3..1"], ["seed=0,1,0"]]
)
def test_axes_that_mean_nothing_are_refused(texts):
    with pytest.raises(ConfigError):
        parse_axes(texts)


def test_every_combination_has_a_folder_of_its_own(tmp_path):
    axes = {"seed": ["0", "1"], "encoder.alphas": ["[1]", "[ 1 ]"]}
    folders = [c.folder for c in list_combinations(axes, tmp_path)]
    assert len(set(folders)) == 4


def test_names_of_folders_are_cut_at_80_letters(tmp_path):
    """At `_LONGEST_NAME` of them, since file systems allow 255 bytes and a run adds to its name."""
    for n, length in ((70, 79), (71, 80), (72, 80), (300, 80)):
        (entry,) = list_combinations({"encoder.weights": ["w" * n]}, tmp_path)
        assert len(entry.folder.name) == len(f"weights-{'w' * n}"[:80]), (n, length)


def test_a_sweep_runs_one_after_the_other_unless_more_are_asked_for(tmp_path, monkeypatch):
    """What starts a run knows how many share the machine; all of them fail here."""
    told = []
    monkeypatch.setattr(
        sweeping, "_run_one", lambda folder, n_jobs, consents: told.append(n_jobs) or "no run"
    )
    for options in ({}, {"n_jobs": 2}):
        with pytest.raises(DataError, match="no run"):
            sweep("synthetic_digits", {"seed": ["0"]}, tmp_path / f"{len(told)}", overrides=QUICK, **options)
    assert told == [1, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ["2"] * 3), ({"OMP_NUM_THREADS": "1"}, ["1"] * 3), ({"MKL_NUM_THREADS": "3"}, ["2", "2", "3"])],
)
def test_runs_of_a_sweep_keep_the_threads_that_the_user_has_set(monkeypatch, given, expected):
    for name in THREAD_LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = limit_threads(4)
    assert [found[name] for name in THREAD_LIMITS] == expected
    assert describe_thread_limits() == "".join(
        f"every process keeps your {name}={value}" for name, value in given.items()
    )


def test_a_run_of_a_sweep_that_was_killed_is_told_with_both_causes_and_its_memory(tmp_path, monkeypatch):
    line = "import os; print('fold 1'); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(sweeping, "make_command", lambda words: [sys.executable, "-S", "-c", line])
    said = sweeping._run_one(tmp_path, 1)
    assert "by somebody (kill -9, a scheduler) or by the system because memory ran out; it used up to" in said
    assert "are the limit here" in said


def test_folders_name_kinds_and_weights_of_objectives(tmp_path):
    """Cut after 80 letters, a list of objectives with options lost the kinds at its end."""
    first = "{kind: clip, scale: softplus, learn_temperature: false, normalise_brain: false}"
    axes = {"encoder.objectives": ["[{kind: clip}]", f"[{first}, {{kind: mmd, weight: 0.5}}]"]}
    names = [c.folder.name for c in list_combinations(axes, tmp_path)]
    assert names == ["objectives-clip", "objectives-clip-0.5-mmd"]
    (tmp_path / "objectives-kind-clip").mkdir()  # a sweep of an earlier version goes on in its folders
    assert list_combinations(axes, tmp_path)[0].folder.name == "objectives-kind-clip"
    (entry,) = list_combinations({"encoder.objectives.1.weight": ["0.5"]}, tmp_path)
    assert entry.folder.name == "objectives-1-weight-0.5"


def test_the_summary_averages_over_seeds_only():
    runs = [
        ("decoded", 0, "a", 0.2),
        ("decoded", 1, "a", 0.4),
        ("decoded", 2, "a", 0.6),
        ("decoded", 0, "b", 0.9),
        ("decoded", 0, "c", 0.2),
        ("decoded", 1, "c", 0.3),
        ("oracle", 0, "a", 1),
    ]
    rows = [
        {"method": m, "error": "", "seed": s, "k": k, "metric": "top1", "subject": "1", "value": v, "ci_low": v - 0.1,
         "ci_high": v + 0.1, "chance": 0.1, "n_queries": 9}
        for m, s, k, v in runs
    ]  # fmt: skip
    table = summarise(pd.DataFrame(rows), ["seed", "k"]).set_index("k")
    values = [0.2, 0.4, 0.6]
    assert table.loc["a", "value"] == pytest.approx(0.4)
    assert table.loc["a", "sd"] == pytest.approx(np.std(values, ddof=1))
    low, high = stats.t.interval(0.95, 2, loc=0.4, scale=stats.sem(values))
    assert table.loc["a", ["ci_low", "ci_high"]].tolist() == pytest.approx([low, high])
    assert table.loc["b", "n_seeds"] == 1
    assert np.isnan(table.loc["b", "sd"])
    assert table.loc["b", ["ci_low", "ci_high"]].tolist() == pytest.approx([0.8, 1.0])  # of the run
    assert table.loc["c", "value"] == pytest.approx(0.25)
    assert np.isnan(
        table.loc["c", ["ci_low", "ci_high"]].astype(float)
    ).all()  # two seeds say more as they are


def test_the_spread_over_seeds_is_that_of_the_mean_over_subjects():
    """The mean of single runs' intervals, as it was once written here, spoke of stimuli and not of seeds."""
    values = {"1": (0.1, 0.3, 0.2), "2": (0.3, 0.1, 0.3), "all": (0.9, 0.9, 0.9)}
    rows = [
        {"method": "decoded", "error": "", "seed": s, "metric": "top1", "subject": who, "value": of[s], "ci_low": 0.0,
         "ci_high": 1.0, "chance": 0.005, "n_queries": 9, "split": split}
        for who, of in values.items() for s in range(3) for split in ("test", "test, imagery")
    ]  # fmt: skip
    table = summarise(pd.DataFrame(rows), ["seed"]).set_index(["split", "subject"])
    assert (table["n_seeds"] == 3).all()  # conditions of one run are no seeds
    mean = table.loc["test", "mean"]
    assert mean["value"] == pytest.approx(np.mean([0.2, 0.2, 0.25]))
    assert mean["sd"] == pytest.approx(np.std([0.2, 0.2, 0.25], ddof=1))
    low, high = stats.t.interval(0.95, 2, loc=mean["value"], scale=stats.sem([0.2, 0.2, 0.25]))
    assert (mean["ci_low"], mean["ci_high"]) == (pytest.approx(low), pytest.approx(high))
    assert table.loc["test", "1"]["sd"] == pytest.approx(0.1)
    assert set(table.loc["test"].index) == {"1", "2", "all", "mean"}


def test_a_wrong_value_starts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="seed"):
        sweep("synthetic_digits", {"seed": ["0", "-1"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_more_runs_than_anybody_waits_for_is_refused(tmp_path):
    """A range of 10^12 seeds filled the memory, and one of thousands of digits ended in a traceback."""
    for last in (10**4, 10**12, "9" * 5000):
        with pytest.raises(ConfigError, match="has more than 10000 values"):
            parse_axes([f"seed=0..{last}"])
    axes = {"seed": [*map(str, range(101))], "encoder.alphas": [f"[{n}]" for n in range(1, 101)]}
    with pytest.raises(ConfigError, match="has 10100 combinations"):
        sweep("synthetic_digits", axes, tmp_path / "out")


def test_a_wrong_value_is_told_with_its_combination(tmp_path):
    axes = {"seed": ["3"], "target.kind": ["pixels", "efficientnet-lite0"]}
    with pytest.raises(ConfigError, match=r"seed=3, target\.kind=efficientnet-lite0 cannot run.*latents"):
        sweep("synthetic_digits", axes, tmp_path / "out")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    axes = {"encoder.alphas": ["[0.1]", "[1000000]"]}
    return out, sweep("synthetic_digits", axes, out, overrides=QUICK, n_jobs=2)


def test_runs_of_a_sweep_share_what_does_not_differ(swept):
    out, table = swept
    assert set(table["run"]) == {"alphas-0.1", "alphas-1000000"}
    assert len(list((out / "stages" / "preprocess").glob("*/provenance.json"))) == 1
    assert len(list((out / "stages" / "train").glob("*/provenance.json"))) == 2
    assert (pd.read_parquet(out / "sweep.parquet")["value"].notna()).all()


def test_runs_are_compared_item_by_item(swept):
    out, _ = swept
    weak, strong = out / "alphas-1000000", out / "alphas-0.1"
    table = compare_runs([weak, strong], n_boot=500).set_index("metric")
    items = [read_items(folder)["pixcorr"].mean() for folder in (strong, weak)]
    assert table.loc["pixcorr", "difference"] == pytest.approx(items[0] - items[1])
    assert table.loc["pixcorr", "ci_low"] > 0
    assert (table["p_holm"] >= table["p_value"]).all()
    reported = {row["metric"]: row["value"] for row in read_scores(strong) if row["method"] == "decoded"}
    for metric in ("top1", "top5", "pixcorr"):
        assert table.loc[metric, "value"] == pytest.approx(reported[metric])
    copy = Path(shutil.copytree(weak, out.parent / "copy", symlinks=False))
    same = compare_runs([weak, copy], n_boot=200)
    assert (same["difference"] == 0).all()
    assert (same["p_value"] == 1).all()


def test_ties_are_lost_as_in_the_table_of_scores():
    """Mean ranks would call a true image at rank 4 to 6, tied with two others, one of the best five."""
    names = np.array(list("abcdefgh"), dtype=object)
    retrieval = Retrieval(
        names[:4], names, np.array([3, 0, 0, 2]), np.array([2, 1, 0, 2]), np.zeros(4), np.zeros((4, 1), int),
        np.zeros((4, 1)), "toy",
    )  # fmt: skip
    items = pd.DataFrame(
        {
            "subject": "01",
            "stimulus_id": list("abcd"),
            "rank": retrieval.ranks,
            "worst_rank": retrieval.worst_ranks,
            "gallery_size": 8,
        }
    )
    table = compare.tabulate_items(items)
    for k in (1, 5):
        assert table[f"top{k}"].tolist() == compute_top_k_hits(retrieval, k).tolist()
    assert table["top5"].tolist() == [0, 1, 1, 1]
    assert "top5" not in compare.tabulate_items(items.assign(gallery_size=5))


def test_ranks_in_galleries_of_other_sizes_are_not_compared(swept, monkeypatch):
    out, _ = swept
    first, second = read_items(out / "alphas-0.1"), read_items(out / "alphas-1000000")
    tables = iter([first, second.assign(gallery_size=50.0)])
    monkeypatch.setattr(compare, "read_items", lambda folder: next(tables))
    with pytest.raises(DataError, match="among 50 and 20 images"):
        compare_runs([out / "alphas-0.1", out / "alphas-1000000"])


def test_one_run_is_no_comparison(swept):
    with pytest.raises(DataError, match="at least two"):
        compare_runs([swept[0]])


def test_failed_runs_are_named(tmp_path):
    """Without its data no run can start; the sweep says so instead of writing an empty table."""
    with pytest.raises(DataError, match="every run of the sweep failed"):
        sweep("digits69_ridge", {"seed": ["0"]}, tmp_path, root=tmp_path)
    assert "Traceback" not in (tmp_path / "seed-0" / "log.txt").read_text()


def test_places_that_cannot_be_swept_or_compared_are_named(tmp_path):
    """An empty range and a file in the place of a folder once ended in tracebacks; a shipped name made a run folder."""
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is a run folder"):
        sweep("synthetic_digits", {"seed": ["0"]}, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        sweep("synthetic_digits", {"seed": ["0"]}, tmp_path / "file")
    with pytest.raises(DataError, match="is not a run folder"):
        compare_runs([tmp_path, Path("synthetic_digits")])
    with pytest.raises(DataError, match="named twice"):
        compare_runs([tmp_path, tmp_path / ".." / tmp_path.name])
