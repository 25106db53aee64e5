"""Hints appear where a default costs much, and nowhere else."""

import numpy as np
import pytest

import braindecode_vis as bdv
from braindecode_vis.pipeline.hints import describe_objective_values

pytestmark = pytest.mark.whole

QUICK = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100}


def make_experiment(*, n_pictures=20, n_repeats=1, noise=1.0):
    rng = np.random.default_rng(0)
    pictures = rng.random((n_pictures, 6, 6))
    shown = np.tile(np.arange(n_pictures), n_repeats)
    X = pictures.reshape(n_pictures, -1)[shown] @ rng.normal(size=(36, 50))
    return (X + noise * rng.normal(size=X.shape)).astype(np.float32), pictures, shown


def decode(X, pictures, shown, *, group=None, **settings):
    data = bdv.from_arrays(X, images=pictures, shown=shown, group=group)
    return bdv.decode(data, split=4, settings={**QUICK, **settings})


def test_a_sound_run_has_no_hint():
    assert decode(*make_experiment(), **{"encoder.alphas": [0.1, 10.0, 1e5]}).hints == []


@pytest.mark.parametrize(("n_repeats", "hinted"), [(1, False), (2, True)])
def test_few_pictures_that_were_shown_twice(n_repeats, hinted):
    """Of 40 simulated pictures shown twice, averages found 0.34 and single trials 0.79; the hint began at six."""
    hints = decode(*make_experiment(n_repeats=n_repeats), **{"encoder.alphas": [10.0]}).hints
    assert any("repetitions of 15 training images are averaged" in hint for hint in hints) == hinted


def test_few_pictures_with_many_repetitions_that_are_averaged():
    """On real fMRI of few pictures, averages gave top-1 0.45 and single trials 0.75."""
    X, pictures, shown = make_experiment(n_repeats=8)
    alphas = {"encoder.alphas": [10.0]}
    run = decode(X, pictures, shown, **alphas)
    (hint,) = run.hints
    assert "8 repetitions of 15 training images" in hint
    assert 'settings={"repeats.train": "single"}' in hint
    assert f"hint: {hint}" in str(run)
    assert "<p><span>hint: 8 repetitions of 15 training images" in run._repr_html_()
    page = run.report().read_text()  # the page speaks of the command line
    assert "Hint: 8 repetitions of 15 training images" in page
    assert "--set repeats.train=single" in page
    assert decode(X, pictures, shown, **alphas, **{"repeats.train": "single"}).hints == []


@pytest.mark.parametrize(
    ("alphas", "noise", "word"), [([1e3, 1e6], 0.1, "smallest"), ([1e-3, 1.0], 5.0, "largest")]
)
def test_a_penalty_at_the_edge_of_the_grid(alphas, noise, word):
    hints = decode(*make_experiment(noise=noise), **{"encoder.alphas": alphas}).hints
    assert sum(f"is the {word} that was tried" in hint for hint in hints) == 1


def test_a_smallest_penalty_that_is_next_to_none_is_no_hint():
    """Of 15 trials with 50 features, any small penalty interpolates: 0.01 was the smallest, and nothing lay beyond."""
    hints = decode(*make_experiment(noise=0.01), **{"encoder.alphas": [1e-4, 1e-3, 1e3]}).hints
    assert not any("the smallest that was tried" in hint for hint in hints)


def test_images_of_other_folds_push_the_true_one_off_the_first_place():
    """Of 80 random pictures decoded nearly perfectly among unseen ones (top-1 0.98), none came first among all."""
    rng = np.random.default_rng(0)
    pictures = rng.random((40, 16, 16))
    X = (pictures.reshape(40, -1) - 0.5) @ rng.normal(size=(256, 100)) + 2 * rng.normal(size=(40, 100))
    top1 = {}
    for gallery in ("auto", "all", "fold"):
        run = decode(X, pictures, np.arange(40), **{"retrieval.gallery": gallery, "encoder.alphas": [100.0]})
        top1[gallery] = run.scores.query("metric == 'top1' and method == 'decoded'").iloc[0]
        hints = [hint for hint in run.hints if "top-1 is below chance" in hint]
        assert len(hints) == (gallery == "all")
    assert top1["all"]["value"] < 1 / 40
    # Its level is that of refits on relabelled images, to which the same happens.
    assert top1["all"]["chance"] < 1 / 40
    assert top1["auto"]["value"] == top1["fold"]["value"] > 2 * top1["fold"]["chance"]
    assert top1["fold"]["chance"] == 1 / 10


def test_ties_and_a_first_choice_that_queries_share_are_explained():
    """By a penalty that leaves nothing but the mean of the training pictures."""
    hints = decode(*make_experiment(n_pictures=40), **{"encoder.alphas": [1e30]}).hints
    (hint,) = [hint for hint in hints if "100% of the queries tie" in hint]
    assert "would be up to 1.00 higher" in hint
    assert any("10 of 10 queries have" in hint for hint in hints)


CLIP = {"kind": "clip"}


@pytest.mark.parametrize(
    "own, settings, found",
    [
        ([0.0, 0.0, 0.0], {"kind": "mmd"}, "the objective mmd stays 0 in all 3 epochs"),
        ([4.09, 4.1, 4.1], {"kind": "hydra"}, "the objective hydra stays 4.1"),
        (
            [12575.0, 9000.0, 8000.0],
            {"kind": "salient"},
            "salient is 4500 times as large as all others together",
        ),
        ([-2.0, -900.0, -950.0], {"kind": "uniformity"}, "uniformity is 450 times as large"),
        ([12575.0, 9000.0, 8000.0], {"kind": "salient", "weight": 0.01}, ""),
        ([5.0, 4.0, 3.0], {"kind": "tcl"}, ""),
        ([3.0, 4.0, 5.0], {"kind": "tcl"}, "tcl rises from 3 to 5: its queue"),
        ([3.0, 4.0, 5.0], {"kind": "mse"}, "mse rises from 3 to 5: the other objectives outweigh it"),
        # Only the first epoch lies in its phase.
        ([5.0, 0.0, 0.0], {"kind": "captioning", "phase": [0, 0.34]}, ""),
        ([5.0, 4.0, 3.0], {"kind": "bimixco"}, "half of each batch are mixtures of two trials"),
    ],
)
def test_objectives_that_do_nothing_or_leave_nothing(own, settings, found):
    history = [{"objectives": {"clip": 3.0 - epoch, "own": value}} for epoch, value in enumerate(own)]
    sentences = describe_objective_values(history, [CLIP, settings])
    assert len(sentences) == bool(found)
    assert found in "".join(sentences)


def test_folds_of_one_class():
    X, _, _ = make_experiment()
    groups = np.repeat(["a", "b", "c", "d"], 5)
    # Two groups have one class, two have both.
    labels = np.where(np.arange(20) % 10 < 5, "face", "house")
    labels[[2, 8]] = ["house", "face"]
    run = bdv.decode(
        bdv.from_arrays(X, labels=labels, group=groups), split="leave-one-group-out", settings=QUICK
    )
    assert any("2 of 4 folds test trials of only one class" in hint for hint in run.hints)


def test_test_images_that_have_few_orders():
    X, pictures, shown = make_experiment(n_pictures=23)
    split = ["train"] * 20 + ["test"] * 3
    data = bdv.from_arrays(X, images=pictures, shown=shown, split=split)
    hints = bdv.decode(data, settings=QUICK).hints
    (hint,) = [hint for hint in hints if "too few test images for a small p" in hint]
    assert "in only 6 ways, so no p can be much below 0.17" in hint
