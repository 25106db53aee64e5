"""In-context decoding: a new person's pairs are enough, voxels have no order, and what cannot be decoded is named."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import braindecode_vis as bdv
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.base.roles import build, read
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.foundation.models.in_context import InContextConfig, InContextEncoder
from braindecode_vis.parts.foundation.models.voxel_context import make_context
from braindecode_vis.pipeline.new_trials import check_axes

N_FEATURES, N_VOXELS, N_IMAGES, N_TEST = 24, 120, 600, 150
QUICK = InContextConfig(simulated_steps=6, people_steps=6, width=16, n_blocks=1)
LINEAR = InContextConfig(simulated_steps=0, people_steps=0)


def draw_images():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(N_IMAGES, N_FEATURES)) * np.linspace(1, 0.2, N_FEATURES) + 0.5
    return Embeddings(vectors.astype(np.float32), [f"i{n:03d}" for n in range(N_IMAGES)], "toy")


def make_person(name, n, *, seed, test=False, snr=0.4, n_voxels=N_VOXELS):
    """Return trials of one person: random voxel weights, bias and noise; test images are the last ones."""
    draw, bank = np.random.default_rng(seed), draw_images()
    weights = draw.normal(size=(n_voxels, N_FEATURES)) * np.linspace(1, 0.1, N_FEATURES)
    weights *= snr * draw.gamma(1, 1, (n_voxels, 1)) / np.linalg.norm(weights, axis=1, keepdims=True)
    bias = draw.normal(size=n_voxels)
    rows = draw.permutation(N_IMAGES - N_TEST)[:n]
    rows = np.arange(N_IMAGES - N_TEST, N_IMAGES) if test else rows
    noise = np.random.default_rng([seed, test]).normal(size=(len(rows), n_voxels))
    data = bank.vectors[rows] @ weights.T + bias + noise
    columns = {
        "subject": name, "session": "1", "run": "1", "stimulus_id": bank.ids[rows], "repetition": 0,
        "split": "test" if test else "train", "concept": bank.ids[rows],
    }  # fmt: skip
    coords = {"subjects": [name], "n_voxels_of": {name: n_voxels}}
    return Responses(data.astype(np.float32), ("trial", "voxel"), pd.DataFrame(columns), "z", coords)


def join(parts):
    counts = {name: n for part in parts for name, n in part.coords["n_voxels_of"].items()}
    table = pd.concat([part.trials for part in parts], ignore_index=True)
    coords = {"subjects": list(counts), "n_voxels_of": counts}
    return Responses(np.concatenate([part.data for part in parts]), ("trial", "voxel"), table, "z", coords)


def select(responses):
    return draw_images().select(list(responses.stimulus_ids))


def fit(config=LINEAR):
    people = join([make_person(str(n), 300, seed=n) for n in range(3)])
    return build(BrainEncoder, config, seed=0).fit(people, select(people))


@pytest.fixture(scope="module")
def fitted():
    return fit(QUICK)


def find_share(predicted, truth):
    """Return how often the true image is preferred to each other one, by cosines around the mean."""
    centre = draw_images().vectors[: N_IMAGES - N_TEST].mean(axis=0)
    a, b = predicted - centre, truth - centre
    similar = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
        b / np.linalg.norm(b, axis=1, keepdims=True)
    ).T
    return (similar < np.diag(similar)[:, None]).sum(axis=1) / (len(similar) - 1)


def invert_by_least_squares(own, test):
    """Return the shares of each image for several penalties; weights by ridge on the context."""
    x, truth = select(own).vectors, select(test).vectors
    mean, centre = own.data.mean(axis=0), x.mean(axis=0)
    shown = x - centre
    found = []
    for alpha in (1, 10, 100):
        weights = np.linalg.solve(shown.T @ shown + alpha * np.eye(N_FEATURES), shown.T @ (own.data - mean)).T
        for penalty in (0.01, 0.1, 1, 10):
            inverse = np.linalg.solve(weights.T @ weights + penalty * np.eye(N_FEATURES), weights.T)
            found.append(find_share((test.data - mean) @ inverse.T + centre, truth))
    return np.array(found)


def test_people_who_saw_none_of_the_held_out_images_are_learnt_from_and_do_not_judge():
    people = join([make_person(str(n), 6, seed=n, n_voxels=20) for n in range(8)])
    encoder = build(BrainEncoder, QUICK, seed=0).fit(people, select(people))
    assert np.isfinite(list(encoder.judged.values())).all()
    assert np.isfinite(encoder.predict(people).vectors).all()


@pytest.mark.parametrize("n", [60, 200])
def test_a_context_beats_ridge_and_least_squares_on_the_same_pairs(fitted, n):
    """Intervals are over images, of means over people.

    Least squares gets the penalties that are best for the test, which favours it: with 60 pairs nothing is above it.
    """
    found, ridge, inverted = [], [], []
    for seed in range(4):
        own, test = make_person("new", n, seed=50 + seed), make_person("new", 0, seed=50 + seed, test=True)
        truth = select(test).vectors
        found.append(find_share(fitted.adapt(own, select(own)).predict(test).vectors, truth))
        alone = build(BrainEncoder, RidgeConfig(), seed=0).fit(own, select(own))
        ridge.append(find_share(alone.predict(test).vectors, truth))
        inverted.append(invert_by_least_squares(own, test))
    of_penalties = np.mean(inverted, axis=0)  # (n_penalties, n_images)
    others = [np.mean(ridge, axis=0), of_penalties[of_penalties.mean(axis=1).argmax()]]
    for other in others[: 2 if n == 200 else 1]:
        gain = np.mean(found, axis=0) - other
        assert gain.mean() - 1.96 * gain.std() / np.sqrt(len(gain)) > 0


def test_voxels_have_no_order(fitted):
    """Sums run in another order, and the network turns rounding into rounding."""
    own, test = make_person("new", 60, seed=9), make_person("new", 0, seed=9, test=True)
    order = np.random.default_rng(1).permutation(N_VOXELS)
    fitted.gain = 1.0
    found = fitted.adapt(own, select(own)).predict(test).vectors
    moved = fitted.adapt(replace(own, data=own.data[:, order]), select(own)).predict(
        replace(test, data=test.data[:, order])
    )
    np.testing.assert_allclose(moved.vectors, found, rtol=1e-3, atol=1e-4)


def test_without_signal_a_context_is_chance(fitted):
    own, test = (make_person("new", 200, seed=3, snr=0.0, test=test) for test in (False, True))
    found = find_share(fitted.adapt(own, select(own)).predict(test).vectors, select(test).vectors)
    assert abs(found.mean() - 0.5) < 3 * found.std() / np.sqrt(len(found))


def test_a_context_grows_by_later_trials_around_their_own_mean():
    """Two halves of a recording, the second with another baseline, are nearly as good as one recording."""
    encoder = fit()
    own, test = make_person("new", 200, seed=4), make_person("new", 0, seed=4, test=True)
    half = [own.select(np.arange(100)), own.select(np.arange(100, 200))]
    shifted = replace(half[1], data=half[1].data + 3.0)
    grown = encoder.adapt(half[0], select(half[0])).adapt(shifted, select(shifted))
    later = replace(test, data=test.data + 3.0)
    truth = select(test).vectors
    whole = find_share(encoder.adapt(own, select(own)).predict(test).vectors, truth).mean()
    one = find_share(encoder.adapt(half[0], select(half[0])).predict(test).vectors, truth).mean()
    both = find_share(grown.predict(later).vectors, truth).mean()
    assert both > one
    assert abs(both - whole) < 0.01
    assert "new" not in encoder.people  # the fitted encoder stays as it is


def test_features_in_common_need_no_trial():
    people = [make_person(str(n), 200, seed=7) for n in range(2)]
    table = pd.concat([one.trials.assign(subject=str(n)) for n, one in enumerate(people)], ignore_index=True)
    data = np.concatenate([one.data for one in people])
    train = Responses(data, ("trial", "parcel"), table, "z", {})
    encoder = build(BrainEncoder, LINEAR, seed=0).fit(train, select(train))
    test = make_person("new", 0, seed=7, test=True)
    test = Responses(test.data, ("trial", "parcel"), test.trials, "z", {})
    assert find_share(encoder.predict(test).vectors, select(test).vectors).mean() > 0.9


def test_what_is_written_is_read(fitted, tmp_path):
    own, test = make_person("new", 60, seed=9), make_person("new", 0, seed=9, test=True)
    adapted = fitted.adapt(own, select(own))
    adapted.gain = 0.5
    adapted.write(tmp_path)
    again = read(BrainEncoder, QUICK, tmp_path)
    # The files hold what is in memory; products of arrays at another place in memory may be rounded otherwise.
    np.testing.assert_allclose(
        again.predict(test).vectors, adapted.predict(test).vectors, rtol=1e-4, atol=1e-5
    )
    assert again.judged == adapted.judged
    assert set(again.judged) == {"linear", "corrected"}


def test_the_same_seed_learns_the_same(fitted):
    again = fit(QUICK)
    for name, value in fitted.network.state_dict().items():
        np.testing.assert_allclose(again.network.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_subjects_who_saw_none_of_the_held_out_images_do_not_judge():
    """Each subject saw images of its own, and one of ten images is held out: most subjects saw none of these."""
    parts = []
    for n in range(5):
        one = make_person(str(n), 300, seed=n)
        rows = np.flatnonzero(np.isin(one.stimulus_ids, draw_images().ids[8 * n : 8 * n + 8]))
        parts.append(one.select(rows))
    people = join(parts)
    encoder = build(BrainEncoder, QUICK, seed=0).fit(people, select(people))
    assert np.isfinite(list(encoder.judged.values())).all()
    assert encoder.judged


def test_what_a_context_cannot_give_is_said(fitted):
    test = make_person("new", 0, seed=9, test=True)
    with pytest.raises(DataError, match=r"no context of subject new, only of 0, 1, 2: give pairs"):
        fitted.predict(test)
    one = make_person("new", 1, seed=9)
    with pytest.raises(DataError, match="context of subject new shows 1 picture, which says nothing"):
        fitted.adapt(one, select(one))
    own, other = make_person("new", 60, seed=9), make_person("new", 60, seed=9, n_voxels=100)
    adapted = fitted.adapt(own, select(own))
    with pytest.raises(DataError, match="100 voxels of subject new do not match the 120 of the context"):
        adapted.predict(other)
    with pytest.raises(DataError, match="100 voxels of subject new do not match the 120"):
        adapted.adapt(other, select(other))
    with pytest.raises(DataError, match="not been fitted"):
        InContextEncoder(QUICK).predict(test)
    with pytest.raises(DataError, match="one target per trial"):
        InContextEncoder(QUICK).fit(own, select(own).take(slice(0, 3)))


def test_a_context_is_a_sum():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 3)), draw.normal(size=(40, 5))
    context = make_context(x, y)
    np.testing.assert_allclose(context.products, (x - x.mean(0)).T @ (y - y.mean(0)))
    twice = context.add(context)
    np.testing.assert_allclose(twice.gram, 2 * context.gram)
    assert twice.n == 80
    few = context.count_as(10.0)
    np.testing.assert_allclose(few.power, context.power / 4)
    leaned = make_context(x + 1, y).lean_on(few)
    assert leaned.n == 50
    np.testing.assert_allclose(leaned.vector_mean, x.mean(0) + 0.8)


# --- in a run -------------------------------------------------------------------------------------------------


def test_a_new_person_of_a_padded_run_may_have_any_number_of_voxels():
    people = join([make_person(str(n), 20, seed=n) for n in range(2)])
    for width in (70, 150):
        check_axes(people, make_person("new", 20, seed=5, n_voxels=width))
        with pytest.raises(DataError, match=f"have 120 voxels, but these have {width} voxels"):
            check_axes(people, make_person("1", 20, seed=5, n_voxels=width))


def make_data(subjects="abc", n=60, seed=0):
    draw = np.random.default_rng(0)
    pictures = draw.random((n, 4, 4))
    shown = np.tile(np.arange(n), len(subjects))
    data = []
    for name in subjects:
        weights = np.random.default_rng(ord(name)).normal(size=(16, 40))
        data.append(
            pictures.reshape(n, -1) @ weights
            + 0.3 * np.random.default_rng([seed, ord(name)]).normal(size=(n, 40))
        )
    return pictures, shown, np.concatenate(data)


FEW = {"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100, "evaluation.features": None}
STEPS = {"encoder.simulated_steps": 2, "encoder.people_steps": 2, "encoder.width": 16, "encoder.n_blocks": 1}


def test_decode_takes_a_context_and_a_finished_run_one_of_a_new_person(tmp_path):
    pictures, shown, X = make_data()
    subject = np.repeat(list("abc"), 60)
    data = bdv.from_arrays(
        X, images=pictures, shown=shown, subject=subject, split=np.where(shown < 40, "train", "test")
    )
    run = bdv.decode(data, context=30, out=tmp_path / "run", settings={**FEW, **STEPS})
    assert run.config.encoder.kind == "in_context"
    assert run.config.split.own_trials == 30
    top = run.scores.query("metric == 'top5' and method == 'decoded'").iloc[-1]
    assert "few-shot: 30 training trials" in top["protocol"]
    assert top["value"] > top["chance"]
    # Another person, whose pairs are read and not trained on.
    _, _, new = make_data("d")
    pairs = bdv.from_arrays(new[:40], images=pictures[:40], subject="d")
    options = {"gallery": pictures[40:], "subject": "d", "fold": 0}
    found = run.predict(new[40:], context=pairs, **options)
    assert "few-shot: a context of 40 trials" in found.protocol
    assert "pictures that are decoded" not in found.protocol
    seen = run.predict(bdv.from_arrays(new[35:], images=pictures[35:], subject="d"), context=pairs, fold=0)
    assert "a context of 40 trials, which shows 5 of the pictures that are decoded" in seen.protocol
    first = found.retrieved.query("place == 1")["picture"].astype(int).to_numpy()
    without = run.predict(new[40:], **options).retrieved.query("place == 1")["picture"].astype(int).to_numpy()
    assert (first == np.arange(20)).mean() > 0.3 > (without == np.arange(20)).mean()
    with pytest.raises(DataError, match="context shows the picture '0' alone"):
        run.predict(new[40:], context=bdv.from_arrays(new[:1], images=pictures[:1], subject="d"), **options)
    with pytest.raises(
        DataError, match="context is of subject d, but the trials are of subject e, who would be"
    ):
        run.predict(new[40:], context=pairs, **{**options, "subject": "e"})
    with pytest.raises(DataError, match="needs the picture of each of its trials"):
        run.predict(new[40:], context=new[:40], **options)
    for wrong in (1, True, "60"):
        with pytest.raises(ConfigError, match="must be a number of pairs of picture and response, 2 or more"):
            bdv.decode(data, context=wrong)
    with pytest.raises(ConfigError, match="leave split out"):
        bdv.decode(data, context=30, split="published")
