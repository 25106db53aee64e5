"""The page of many runs: what it reads of them, what it says of damaged ones, and how fast it is."""

import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.cli import main
from braindecode_vis.parts.studies.board import find_runs, list_differing, make_board
from braindecode_vis.pipeline.runs import read_scores

N = 12


def write_run(folder, *, gain=0.0, name="toy", scores=True, ids="i", **settings):
    """Write what the board reads of a run: settings, scores, differences, values per item and pictures."""
    folder.mkdir(parents=True)
    config = {
        "name": name, "seed": 0, "dataset": {"kind": "digits69", "root": str(folder)}, "target": {"kind": "pixels"},
        "encoder": {"kind": "ridge", "alphas": [10.0]},
    }  # fmt: skip
    for key, value in settings.items():
        part = config
        *parents, last = key.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if not scores:
        return folder
    rng = np.random.default_rng(0)
    values = np.clip(rng.normal(0.5, 0.1, N) + gain, -1, 1)
    rows = [
        Score(
            method, "pixcorr", value, 0.1, N, "toy", "01", "test", 0, ci_low=value - 0.1, ci_high=value + 0.1,
            fingerprint="abc123",
        ).as_row()
        for method, value in (("decoded", float(values.mean())), ("mean_image", 0.3))
    ]  # fmt: skip
    known = {"metric": "pixcorr", "control": "mean_image", "subject": "01", "split": "test"}
    with store.record_results(
        folder,
        "scores.json",
        "differences.json",
        about={"stages": {"reconstruct": {"fingerprint": "def456"}}},
    ):
        store.write_json(folder / "scores.json", rows)
        store.write_json(
            folder / "differences.json", [known | {"difference": 0.2, "ci_low": 0.1, "ci_high": 0.3}]
        )
    evaluated, images = (
        folder / "stages" / "evaluate" / "abc123",
        folder / "stages" / "reconstruct" / "def456",
    )
    evaluated.mkdir(parents=True)
    images.mkdir(parents=True)
    names = [f"{ids}{n}" for n in range(N)]
    pd.DataFrame({"stimulus_id": names, "subject": "01", "pixcorr": values}).to_parquet(
        evaluated / "items.parquet"
    )
    for kind in ("seen", "decoded"):
        np.save(images / f"{kind}.npy", rng.integers(0, 256, (N, 8, 8, 3), dtype=np.uint8))
    (folder / "report.html").write_text("<html></html>")
    return folder


@pytest.fixture
def runs(tmp_path):
    top = tmp_path / "runs"
    write_run(top / "a")
    write_run(top / "deep" / "er" / "b", gain=0.1, encoder__alphas=[100.0])
    write_run(top / "c", ids="other", encoder__alphas=[1000.0])
    return top


def test_runs_are_found_at_any_depth_and_once(runs):
    (runs / "sweep" / "stages").mkdir(parents=True)
    write_run(runs / "sweep" / "stages" / "hidden")  # the store of a sweep holds no runs
    write_run(runs / "a" / "stages" / "inner")
    assert find_runs([runs, runs / "a"]) == [runs / "a", runs / "c", runs / "deep" / "er" / "b"]


def test_the_page_holds_every_run_with_scores_verdict_pairs_and_pictures(runs):
    rows = make_board([runs], runs / "board.html")
    first, other, third = rows
    assert (first.name, first.encoder, first.target) == ("a", "ridge, penalty 10", "pixels")
    assert first.pairs == "reference"
    assert first.scores["pixcorr"]["verdict"] == "above chance and every control"
    found = third.pairs["pixcorr"]
    assert found["difference"] == pytest.approx(0.1)
    assert found["ci_low"] <= 0.1 <= found["ci_high"]
    assert other.pairs == "other test items"
    assert first.settings == {"encoder.alphas": 10.0}
    page = (runs / "board.html").read_text()
    assert re.findall(r'<a href="([^"#]+)">', page) == [
        "a/report.html",
        "c/report.html",
        "deep/er/b/report.html",
    ]
    assert page.count('alt="decoded"') == 3
    assert "Pixel correlation by encoder.alphas" in page
    assert "polyline" in page  # a list of one number is a number, so the setting has a curve
    assert not re.findall(r"\b(?:src|srcset|action)=[\"'](?!data:)", page)


def test_rows_for_own_use_lie_beside_the_page(runs):
    make_board([runs], runs / "board.html")
    rows = json.loads((runs / "experiment.json").read_text())
    assert [row["settings"]["encoder.alphas"] for row in rows] == [10.0, 1000.0, 100.0]
    assert rows[0]["path"] == str(runs / "a")
    assert rows[0]["scores"]["pixcorr"]["ci_low"] < rows[0]["scores"]["pixcorr"]["value"]


def test_the_reference_can_be_chosen(runs):
    rows = make_board([runs], runs / "board.html", reference=runs / "deep" / "er" / "b")
    assert [row.pairs if isinstance(row.pairs, str) else "pairs" for row in rows] == [
        "pairs",
        "other test items",
        "reference",
    ]
    with pytest.raises(DataError, match="not among the runs"):
        make_board([runs], runs / "board.html", reference=runs)


def damage_config(folder):
    (folder / "config.yaml").write_text("a: [")


def damage_scores(folder):
    (folder / "scores.json").write_text("[]")


def make_other_json(folder):
    (folder / "scores.json").write_text('[{"metric": "pixcorr"}, 3]')
    (folder / "provenance.json").unlink()


def cut_items(folder):
    path = folder / "stages" / "evaluate" / "abc123" / "items.parquet"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_config, "damaged: its config.yaml cannot be read"),
        (damage_scores, "damaged: "),
        (make_other_json, "damaged: its scores.json holds rows that are not scores"),
        (cut_items, ""),
    ],
)
def test_damaged_runs_are_listed_with_a_word(runs, damage, words, capsys):
    """One folder that cannot be read must not keep the page of all others from being written."""
    damage(runs / "deep" / "er" / "b")
    write_run(runs / "unfinished", scores=False)
    main_ok(["board", str(runs)])
    rows = json.loads((runs / "experiment.json").read_text())
    assert len(rows) == 4
    assert rows[2]["trouble"].startswith(words)
    assert rows[3]["trouble"] == "unfinished: it has no scores yet"
    if damage is cut_items:
        assert rows[2]["pairs"] == "no values per item"
    assert rows[3]["trouble"] in (runs / "board.html").read_text()


def main_ok(arguments):
    import sys

    before, sys.argv = sys.argv, ["braindecode-vis", *arguments]
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    assert end.value.code in (0, None)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="no run below"):
        make_board([tmp_path], tmp_path / "board.html")
    with pytest.raises(DataError, match="is not a folder"):
        make_board([tmp_path / "missing"], tmp_path / "board.html")


def test_names_of_runs_are_text(runs):
    shutil.copytree(runs / "a", runs / "<img src=x onerror=alert(1)>")
    make_board([runs], runs / "board.html")
    page = (runs / "board.html").read_text()
    assert "<img src=x" not in page
    assert "%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E/report.html" in page


@pytest.mark.parametrize(
    "configs, expected",
    [
        ([{"a": 1}, {"a": 1}], []),
        ([{"a": {"b": 1, "device": "cpu"}}, {"a": {"b": 2, "device": "cuda"}}], ["a.b"]),
        ([{"a": 1, "b": 1}, {"a": 2}], ["a", "b"]),
        ([{"name": "x", "dataset": {"root": "here"}}, {"name": "y", "dataset": {"root": "there"}}], []),
        ([{}, {"a": 1}], []),
    ],
)
def test_settings_that_differ(configs, expected):
    assert list_differing(configs) == expected


def test_many_runs_make_a_small_page(tmp_path):
    top = tmp_path / "many"
    for number in range(40):
        write_run(top / f"run{number:03d}", gain=number / 1000, seed=number)
    rows = make_board([top], top / "board.html")
    assert len(rows) == 40
    assert (top / "board.html").stat().st_size < 400_000


def _change(folder, **values):
    """Change the first score of a run that recorded no digests, as earlier versions did."""
    rows = json.loads((folder / "scores.json").read_text())
    (folder / "provenance.json").unlink()
    (folder / "scores.json").write_text(json.dumps([{**rows[0], **values}, *rows[1:]]))


def _set(folder, text):
    (folder / "config.yaml").write_text(text)


def _empty_image(folder):
    next(folder.glob("stages/reconstruct/*/seen.npy")).write_bytes(b"")


#: The same list a billion times.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("damage", "trouble"),
    [
        (lambda folder: _change(folder, value=10**400), "rows that are not scores"),
        (lambda folder: _change(folder, metric=["a"]), "rows that are not scores"),
        (lambda folder: _set(folder, "seed: .inf"), ""),
        (lambda folder: _set(folder, "seed: .nan"), ""),
        (lambda folder: _set(folder, "seed: 1" + "0" * 400), ""),
        (lambda folder: _set(folder, "encoder: {kind: ridge, alphas: [a]}"), ""),
        (lambda folder: _set(folder, BOMB), ""),
        (lambda folder: (folder / "provenance.json").unlink() or (folder / "differences.json").write_text(
            '[{"control": "mean_image", "ci_low": 0}]'), ""),
        (_empty_image, ""),
        (lambda folder: folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff")), ""),
    ],
)  # fmt: skip
def test_one_odd_run_does_not_cost_the_page_of_the_others(tmp_path, damage, trouble):
    """Numbers without bound, texts for numbers, rows that lack a name and names of other bytes ended all of it."""
    write_run(tmp_path / "a")
    damage(write_run(tmp_path / "b", seed=1))
    rows = make_board([tmp_path], tmp_path / "board.html")
    assert len(rows) == 2
    assert trouble in rows[1].trouble
    assert "Infinity" not in (tmp_path / "experiment.json").read_text()


def test_the_table_names_each_run_beside_long_words(tmp_path, capsys):
    """The words on a damaged file took the width of the table, and the names of all runs were cut to nothing."""
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad") / "config.yaml").write_text("{" + "\n" * 9 + "a: " * 200)
    main_ok(["board", str(tmp_path)])
    told = capsys.readouterr().out
    assert "damaged" in told
    assert {"good", "bad"} <= set(told.split())


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (6, "subjects, then images (method of 0.2.0)"),
        (7, "subjects, then images"),
        (None, "subjects, then images"),
    ],
)
def test_rows_of_an_earlier_version_say_which_method_made_them(tmp_path, version, words):
    """Their intervals took images that all subjects saw for independent; the scores are unchanged."""
    folder = write_run(tmp_path / "run")
    rows = [row | {"resampled": "subjects, then images"} for row in store.read_json(folder / "scores.json")]
    shuffled = {**rows[0], "method": "shuffled", "resampled": "one shuffle"}
    with store.record_results(folder, "scores.json"):
        store.write_json(folder / "scores.json", [*rows, shuffled])
    if version is not None:
        store.write_json(folder / "stages" / "evaluate" / "abc123" / store.PROVENANCE, {"version": version})
    found = read_scores(folder)
    assert [row["resampled"] for row in found] == [words, words, "one shuffle"]
    assert [row["value"] for row in found] == [row["value"] for row in [*rows, shuffled]]
    (row,) = make_board([folder], tmp_path / "board.html")
    assert row.scores["pixcorr"]["resampled"] == words
