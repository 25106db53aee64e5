"""What a notebook shows of data, runs and predictions without being asked: self-contained, quick, in any theme."""

import re

import numpy as np
import pytest

import braindecode_vis as bdv

FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}
N = 12


def make_trials():
    rng = np.random.default_rng(0)
    pictures = rng.random((N, 6, 6))
    return (pictures.reshape(N, -1) @ rng.normal(size=(36, 20))).astype(np.float32), pictures


@pytest.fixture(scope="module")
def data():
    X, pictures = make_trials()
    return bdv.from_arrays(X, images=pictures, title="Mine <b>", unit="microvolt")


@pytest.fixture(scope="module")
def run(data):
    return bdv.decode(
        data, split=3, encoder="auto", settings={**FEW, "encoder.candidates": [{"kind": "ridge"}]}
    )


@pytest.fixture(scope="module")
def classes():
    rng = np.random.default_rng(0)
    labels = np.array(["face", "house"])[np.arange(24) % 2]
    X = (labels == "face")[:, None] + rng.normal(size=(24, 5))
    return bdv.decode(bdv.from_arrays(X, labels=labels, run=np.arange(24) // 6), encoder="auto", settings=FEW)


def show(thing, n_pictures, *words):
    """Return what a notebook shows of a thing, after what is asked of all of them."""
    html = thing._repr_html_()
    assert not re.search(r"<script|<link|<style|https?:|color|background", html)
    assert html.count("<img") == html.count('src="data:image/') == html.count("alt=") == n_pictures
    for tag in ("p", "table", "td", "th", "tr"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>")
    for word in words:
        assert word in html
    assert len(html) < 100_000
    return html


def test_data_show_their_facts_and_pictures(data):
    html = show(
        data, 4, "12 trials x 20 features", "microvolt", "not declared; decode makes folds", "Mine &lt;b&gt;"
    )
    assert "The first 4 of 12 pictures" in html


def test_data_that_were_not_read_stay_unread():
    data = bdv.load("synthetic_digits")
    show(data, 0, "not read yet")
    assert "_read" not in data.__dict__


def test_classes_have_no_pictures():
    X, _ = make_trials()
    data = bdv.from_arrays(X, labels=list("ab") * 6, split=["train"] * 8 + ["test"] * 4)
    show(data, 0, "trials per class", "8 train trials, 4 test trials")


def test_a_run_shows_scores_pictures_and_the_encoder_that_auto_chose(run):
    html = show(
        run,
        8,
        "<td>top1</td>",
        "chance",
        "ci_low",
        "The first 4 of 12 test items",
        "encoder: auto chose ridge",
    )
    assert html.count("<td>top1</td>") == 1
    assert "encoder: auto chose ridge" in str(run)


def test_a_run_of_classes_names_the_choice_too(classes):
    show(classes, 0, "<td>accuracy</td>", "encoder: auto chose")
    assert "encoder: auto chose" in str(classes)


def test_leaks_and_hints_are_shown(run, monkeypatch):
    monkeypatch.setitem(run.__dict__, "leaks", ("a trial <x> is in both",))
    html = show(run, 8, "<strong>LEAK: a trial &lt;x&gt; is in both</strong>")
    assert html.startswith("<p><strong>LEAK")
    for hint in run.hints:
        assert "hint: " in html, hint


def test_predictions_show_the_ranking_and_compute_nothing(run):
    X, _ = make_trials()
    found = run.predict(X[:6], k=2, fold=0)
    html = show(
        found, 8, "place 1", "place 2", "scores and reconstructions: computed when you first use them"
    )
    assert "_decoded" not in found.__dict__
    assert "seen" not in html
    found.reconstructions, found.scores  # noqa: B018
    show(found, 12, "decoded", "The first 4 of 6 trials")


def test_predictions_whose_pictures_are_known_show_scores_and_what_was_seen(run, data):
    X, _ = make_trials()
    found = run.predict(X, k=1, fold=0, shown=list(data.stimuli.ids))
    found.scores  # noqa: B018
    show(found, 12, "<td>top1</td>", "seen", "decoded")


def test_predicted_classes_are_a_table(classes):
    show(classes.predict(np.random.default_rng(1).normal(size=(5, 5)), fold=0), 0, "<td>3</td>", "face")
