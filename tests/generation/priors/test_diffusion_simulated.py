"""A diffusion prior that learns from images alone, seen through simulated encoders."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings, normalise_rows
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.generation.priors.diffusion_config import DiffusionPriorConfig
from braindecode_vis.generation.priors.scales import fit_components
from braindecode_vis.generation.priors.simulated_predictions import Direction
from tests.references import frechet

SMALL = {
    "condition": "simulated", "widths": (64, 32), "time_features": 16, "batch_size": 128, "epochs": 1,
    "min_steps": 400, "warmup_steps": 20, "dropout": 0.0, "guidance": 2.0, "steps": 20, "device": "cpu",
    "prediction": "v_prediction", "betas": "squaredcos_cap_v2", "sampler": "ddim", "ema_decay": 0.98,
}  # fmt: skip


def make_images(n=500, *, seed=0):
    """Images in four clusters of twelve dimensions, off the origin."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(3).normal(size=(4, 12))
    centres -= centres.mean(axis=0)
    which = rng.integers(4, size=n)
    vectors = 2 + centres[which] + 0.1 * rng.normal(size=(n, 12))
    return Embeddings(vectors.astype(np.float32), [f"{seed}-{k}" for k in range(n)], "toy"), which


def predict(images, *, length):
    """What an encoder might give: of any length, and mixed with another image."""
    away = images.vectors - 2
    away = away + 0.3 * np.roll(away, 1, axis=0)
    return Embeddings((2 + length * away).astype(np.float32), images.ids, images.space)


@pytest.fixture(scope="module")
def fitted():
    return DiffusionPriorConfig(**SMALL).build(seed=1).fit(None, make_images()[0])


def test_samples_lie_where_images_lie_whatever_the_length_of_a_prediction(fitted):
    seen, which = make_images(300, seed=5)
    centres = np.stack([seen.vectors[which == k].mean(axis=0) for k in range(4)])
    for length in (0.1, 7.0):
        predicted = predict(seen, length=length)
        drawn = fitted.sample(predicted, n_draws=1, seed=0)
        assert frechet(drawn, seen) < 0.5 * frechet(predicted, seen)
        nearest = ((drawn.vectors[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == which).mean() > 0.7  # one draw, chance 0.25


def test_it_survives_disk_and_says_what_it_is(fitted, tmp_path):
    predicted = predict(make_images(10, seed=5)[0], length=0.3)
    fitted.write(tmp_path)
    again = DiffusionPriorConfig(**SMALL).read(tmp_path)
    np.testing.assert_array_equal(
        again.sample(predicted, n_draws=2, seed=0).vectors,
        fitted.sample(predicted, n_draws=2, seed=0).vectors,
    )
    assert fitted.describe()["n_rows"] == 450  # a tenth is held out


def test_directions_are_measured_from_the_images_of_the_run(fitted):
    shown = Embeddings(make_images(200, seed=4)[0].vectors + 1, [f"s{k}" for k in range(200)], "toy")
    config = DiffusionPriorConfig(**(SMALL | {"min_steps": 2}))
    moved = config.build(seed=1).fit(None, shown, images=make_images()[0])
    np.testing.assert_allclose(moved.fitted.condition.mean, shown.vectors.mean(axis=0), rtol=1e-5)
    assert np.abs(moved.fitted.target.mean - shown.vectors.mean(axis=0)).min() > 0.5


def test_the_mean_of_draws_is_another_protocol_and_nearer_to_the_seen(fitted):
    seen, _ = make_images(200, seed=5)
    predicted = predict(seen, length=0.5)
    config = DiffusionPriorConfig(**SMALL, select="mean", candidates=8)
    averaging = config.build(seed=1)
    averaging.fitted = fitted.fitted
    one, mean = (prior.sample(predicted, n_draws=1, seed=0) for prior in (fitted, averaging))
    errors = [((rows.vectors - seen.vectors) ** 2).mean() for rows in (one, mean)]
    assert errors[1] < errors[0]
    assert config.describe_choices() == ["images from the mean of 8 draws"]


def test_part_of_the_way_lies_between_prediction_and_sample_and_is_as_long_as_images_are(fitted):
    seen, _ = make_images(200, seed=5)
    predicted, origin = predict(seen, length=0.5), fitted.fitted.condition.mean
    config = DiffusionPriorConfig(**SMALL, pull=0.25)
    apart = config.build(seed=0)
    apart.fitted = fitted.fitted
    whole, part = (p.sample(predicted, n_draws=2, seed=1) for p in (fitted, apart))
    rows = [normalise_rows(v - origin) for v in (np.repeat(predicted.vectors, 2, axis=0), whole.vectors)]
    turned = part.vectors - origin
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=1), np.linalg.norm(fitted.fitted.target.std), rtol=1e-3
    )
    goal = normalise_rows(0.75 * rows[0] + 0.25 * rows[1])
    np.testing.assert_allclose(normalise_rows(turned), goal, atol=1e-3)
    assert config.describe_choices() == ["images from embeddings 25 % of the way to the prior's"]


def test_simulated_predictions_pass_on_the_leading_components_best():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(4000, 30)) * np.linspace(3, 0.5, 30) + 1).astype(np.float32)
    scale = fit_components(vectors, 30)
    direction = Direction(scale.mean, scale.basis, scale.std)
    targets = scale.apply(vectors)
    drawn = direction.simulate(targets, np.random.default_rng(1))
    np.testing.assert_allclose(
        np.linalg.norm(drawn * scale.std, axis=1), np.linalg.norm(scale.std), rtol=1e-4
    )
    correlation = [np.corrcoef(drawn[:, k], targets[:, k])[0, 1] for k in range(30)]
    assert correlation[0] > correlation[10] > correlation[25] > 0.05


def test_simulated_encoders_follow_a_curve_roughly_and_pass_on_from_six_components_to_all():
    """How many components an encoder passes on is spread evenly over the logarithm; gains scatter by a quarter."""
    n, k = 4000, 512
    direction = Direction(np.zeros(k), np.eye(k), np.ones(k))
    targets = np.full((n, k), 1e9)  # the noise of predictions is nothing beside them
    gains = np.log(np.maximum(direction.simulate(targets, np.random.default_rng(0)), 1e-30))
    # Along the tail the curve is smooth, so that neighbours differ by the scatter.
    scatter = np.diff(gains[:, -200:], axis=1).std(axis=1) / np.sqrt(2)
    assert np.median(scatter) == pytest.approx(0.25, rel=0.05)
    kept = np.exp(gains[:, 80:120].mean(axis=1) - gains[:, :4].mean(axis=1))
    # Of six to 512 components a third of all encoders passes on more than a hundred, and others have a floor.
    assert (kept > 0.5).mean() == pytest.approx(0.56, abs=0.05)


def test_no_prediction_gives_no_sample(fitted):
    """A fold whose test trials have no picture."""
    nothing = fitted.sample(make_images(5)[0].select([]), n_draws=2, seed=0)
    assert nothing.vectors.shape == (0, 12)


def test_components_come_back_and_a_direction_forgets_the_length_only():
    rows = np.random.default_rng(0).normal(size=(50, 5)) * [3, 2, 1, 0.5, 1e-6] + 4
    scale = fit_components(rows, 10)
    assert scale.basis.shape == (4, 5)  # what hardly varies is left at its mean
    np.testing.assert_allclose(scale.undo(scale.apply(rows)), rows, atol=1e-4)
    direction = Direction(scale.mean, scale.basis, scale.std)
    far = scale.mean + 7 * (rows - scale.mean)
    np.testing.assert_allclose(direction.apply(rows), direction.apply(far), rtol=1e-3, atol=1e-4)
    assert (direction.apply(scale.mean[None]) == 0).all()  # the mean itself has none


def test_tokens_and_few_images_are_refused():
    images, _ = make_images(40)
    tokens = Embeddings(images.vectors.reshape(40, 3, 4), images.ids, "toy")
    with pytest.raises(ConfigError, match=r"is 3 tokens; set prior\.condition to noised_targets"):
        DiffusionPriorConfig(**SMALL).build().fit(None, tokens)
    with pytest.raises(DataError, match="cannot learn from 2 image"):
        DiffusionPriorConfig(**SMALL).build().fit(None, images.select(images.ids[:2]))
    pairs = DiffusionPriorConfig(**(SMALL | {"condition": "predicted"}))
    with pytest.raises(DataError, match="learns from predictions, but there are none"):
        pairs.build().fit(None, images)
