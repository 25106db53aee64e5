import dataclasses
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Prior
from braindecode_vis.base.seeds import make_torch_generator
from braindecode_vis.generation.priors import prior_training
from braindecode_vis.generation.priors.diffusion_config import DiffusionPriorConfig
from braindecode_vis.generation.priors.prior_training import CHECKPOINT, PriorTraining, compute_loss
from braindecode_vis.generation.priors.sampling import NoiseSchedule
from braindecode_vis.generation.priors.scales import fit_scale
from braindecode_vis.generation.priors.simulated_predictions import ConditionSource
from tests.constants import replace_constants
from tests.references import frechet

SMALL = {
    "widths": (64, 32), "time_features": 16, "batch_size": 128, "epochs": 1, "min_steps": 200, "warmup_steps": 20,
    "dropout": 0.0, "guidance": 1.0, "steps": 20, "device": "cpu", "prediction": "v_prediction", "ema_decay": 0.98,
}  # fmt: skip


def make_pairs(n=400, *, seed=0):
    """Images in eight clusters of the plane; predictions are shrunken and noisy."""
    rng = np.random.default_rng(seed)
    angle = rng.integers(8, size=n) * np.pi / 4
    centres = (
        0.03 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.5
    )  # as small as unit vectors' values
    target = centres + 0.001 * rng.normal(size=(n, 2))
    predicted = 0.5 + 0.5 * (centres - 0.5) + 0.002 * rng.normal(size=(n, 2))
    ids = [f"{seed}-{k}" for k in range(n)]
    return (
        Embeddings(predicted.astype(np.float32), ids, "toy"),
        Embeddings(target.astype(np.float32), ids, "toy"),
    )


@pytest.fixture(scope="module")
def fitted():
    return DiffusionPriorConfig(**SMALL).build(seed=1).fit(*make_pairs())


def test_samples_lie_where_images_lie_and_keep_their_identity(fitted):
    predicted, target = make_pairs(seed=5)
    drawn = fitted.sample(predicted, n_draws=1, seed=0)
    assert isinstance(fitted, Prior)
    assert frechet(drawn, target) < 0.1 * frechet(predicted, target)
    angles = [np.arctan2(*(rows.vectors - 0.5).T) for rows in (drawn, target)]
    apart = np.abs(np.angle(np.exp(1j * (angles[0] - angles[1]))))
    assert (
        apart < np.pi / 8
    ).mean() > 0.75  # one draw in eight clusters, chance 0.125; the training is short


def test_draws_lie_next_to_each_other_and_follow_the_seed(fitted):
    predicted, _ = make_pairs(6)
    one, again = (fitted.sample(predicted, n_draws=3, seed=4) for _ in range(2))
    other = fitted.sample(predicted, n_draws=3, seed=5)
    np.testing.assert_array_equal(one.vectors, again.vectors)
    assert np.abs(one.vectors - other.vectors).max() > 0
    assert one.ids.tolist() == np.repeat(predicted.ids, 3).tolist()
    assert np.abs(one.vectors[0] - one.vectors[1]).max() > 0


def test_pulled_samples_are_as_long_as_images_whatever_their_unit(fitted):
    """A length divided by the images' spread passed where that spread was near 1; here it is 0.02."""
    predicted, _ = make_pairs(40, seed=5)
    pulled = dataclasses.replace(fitted.drawing, pull=0.3)
    prior = DiffusionPriorConfig(**SMALL).build(seed=1)
    prior.fitted, prior.drawing = fitted.fitted, pulled
    drawn = prior.sample(predicted, n_draws=2, seed=0).vectors
    mean, spread = fitted.fitted.target.mean, np.linalg.norm(make_pairs()[1].vectors.std(axis=0))
    np.testing.assert_allclose(np.linalg.norm(drawn - mean, axis=1), spread, rtol=1e-3)
    # Each lies between its prediction and what is drawn without a pull, nearer to the former.
    whole = fitted.sample(predicted, n_draws=2, seed=0).vectors
    own = np.repeat(predicted.vectors, 2, axis=0) - fitted.fitted.condition.mean
    # Without a pull each keeps its own length.
    assert np.linalg.norm(whole - mean, axis=1).std() > 0.01 * spread
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    expected = unit(0.7 * unit(own) + 0.3 * unit(whole - mean))
    np.testing.assert_allclose(unit(drawn - mean), expected, atol=2e-3)


def test_every_setting_reaches_the_prior():
    recipe = {"checkpoint_every": 7, "weight_decay": 0.5, "gradient_clip": 2.5, "condition_dropout": 0.3}
    config = replace_constants(DiffusionPriorConfig, **recipe)(
        precision="bfloat16", condition="noised_targets", held_out=0.2, restandardise=False,
        select="mean", candidates=5, guidance=1.5, pull=0.4, steps=11, batch_size=33, epochs=44, min_steps=55,
        learning_rate=0.25, warmup_steps=66, ema_decay=0.75,
    )  # fmt: skip
    prior = config.build(seed=3)
    assert prior.bfloat16
    assert not DiffusionPriorConfig(precision="float32").build().bfloat16
    for name in ("condition", "held_out", "restandardise", "checkpoint_every", "clip"):
        assert getattr(prior, name) == getattr(config, name)
    assert prior.seed == 3
    drawing, recipe = dataclasses.asdict(prior.drawing), dataclasses.asdict(prior.recipe)
    assert drawing == {
        "sampler": config.sampler, "n_steps": 11, "guidance": 1.5, "select": "mean", "n_candidates": 5, "pull": 0.4,
    }  # fmt: skip
    for name in (
        "batch_size", "epochs", "min_steps", "learning_rate", "warmup_steps", "weight_decay", "gradient_clip",
        "condition_dropout", "ema_decay",
    ):  # fmt: skip
        assert recipe[name] == getattr(config, name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_losses_are_rounded_only_where_that_is_asked_for(precision, monkeypatch):
    rounded = []

    def record(*words, **named):
        rounded.append(torch.is_autocast_enabled("cpu"))
        return compute_loss(*words, **named)

    monkeypatch.setattr("braindecode_vis.generation.priors.prior_training.compute_loss", record)
    config = DiffusionPriorConfig(**(SMALL | {"min_steps": 2, "held_out": 0}), precision=precision)
    config.build(seed=0).fit(*make_pairs(40))
    assert set(rounded) == {precision == "bfloat16"}


def test_a_unit_clip_is_of_the_embedding_and_not_of_its_standardised_values():
    prior = DiffusionPriorConfig(**(SMALL | {"min_steps": 2, "clip": "unit", "spacing": "leading"})).build(
        seed=0
    )
    prior.fit(*make_pairs())
    np.testing.assert_allclose(prior.fitted.target.undo(prior.fitted.bounds), [[-1, -1], [1, 1]], atol=1e-4)
    assert prior.sample(make_pairs(4)[0], n_draws=2, seed=0).vectors.shape == (8, 2)
    assert not {"clip", "spacing"} & set(DiffusionPriorConfig().hashed_fields())
    with pytest.raises(ValidationError, match="leave clip out"):
        DiffusionPriorConfig(clip="unit", condition="simulated")


def test_global_random_state_is_left_alone_and_fits_repeat():
    config = DiffusionPriorConfig(**(SMALL | {"min_steps": 12, "dropout": 0.2}))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = config.build(seed=3).fit(*make_pairs()).fitted.network.state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    two = config.build(seed=3).fit(*make_pairs()).fitted.network.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    three = config.build(seed=4).fit(*make_pairs()).fitted.network.state_dict()
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_reading_gives_the_same_samples(fitted, tmp_path):
    fitted.write(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    again = DiffusionPriorConfig(**SMALL).read(tmp_path)
    predicted, _ = make_pairs(10)
    np.testing.assert_array_equal(
        again.sample(predicted, n_draws=2, seed=0).vectors,
        fitted.sample(predicted, n_draws=2, seed=0).vectors,
    )
    assert again.describe() == fitted.describe()


def test_a_stopped_training_resumes_to_the_same_weights(tmp_path):
    often = replace_constants(DiffusionPriorConfig, checkpoint_every=2)
    config = often(**(SMALL | {"min_steps": 24, "dropout": 0.1}))
    whole = config.build(seed=0).fit(*make_pairs())

    class Stop(Exception):
        pass

    def make(limit):
        prior, done = config.build(seed=0), []
        prior.workspace = tmp_path

        def advance(n):
            done.append(n)
            if len(done) == limit:
                raise Stop

        prior.advance = advance
        return prior, done

    with pytest.raises(Stop):
        make(3)[0].fit(*make_pairs())
    assert (tmp_path / CHECKPOINT).is_file()
    resumed, done = make(100)
    resumed.fit(*make_pairs())
    assert len(done) == whole.describe()["epochs"] - 2  # the third epoch came after the checkpoint
    left, right = whole.fitted.network.state_dict(), resumed.fitted.network.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert resumed.describe() == whole.describe()
    with pytest.raises(DataError, match=r"belongs to other training data .* delete it"):
        make(100)[0].fit(*make_pairs(seed=9))


def test_a_diverging_training_stops_with_its_place():
    config = DiffusionPriorConfig(**(SMALL | {"learning_rate": 1e30, "warmup_steps": 0, "min_steps": 50}))
    with pytest.raises(DataError, match=r"loss of the diffusion prior is (nan|inf) at step \d+"):
        config.build().fit(*make_pairs())


def test_the_condition_is_dropped_sample_by_sample():
    """A tenth of every batch learns without a condition, not a tenth of the batches."""
    seen = []

    def network(noised, steps, condition, keep):
        seen.append(keep)
        return noised

    rows = np.zeros((1000, 2), np.float32)
    for k in range(3):
        compute_loss(
            network, rows, rows, NoiseSchedule(), make_torch_generator(k), dropout=0.1,
        )  # fmt: skip
    shares = [1 - float(keep.mean()) for keep in seen]
    assert all(0.06 < share < 0.14 for share in shares)
    assert len({tuple(keep.tolist()) for keep in seen}) == 3


def test_test_predictions_change_no_statistic(fitted):
    """Samples of one row do not depend on which other rows are asked for: restandardising is not transductive."""
    predicted, _ = make_pairs(4)
    poisoned = Embeddings(
        np.concatenate([predicted.vectors[:1], 50 + predicted.vectors[1:]]), predicted.ids, "toy"
    )
    left = fitted.sample(predicted, n_draws=1, seed=0).vectors[0]
    np.testing.assert_allclose(fitted.sample(poisoned, n_draws=1, seed=0).vectors[0], left, rtol=1e-5)


def test_samples_of_training_predictions_have_the_targets_moments(fitted):
    predicted, target = make_pairs()
    drawn = fitted.sample(predicted, n_draws=2, seed=11).vectors
    np.testing.assert_allclose(drawn.mean(0), target.vectors.mean(0), atol=0.003)
    np.testing.assert_allclose(drawn.std(0), target.vectors.std(0), rtol=0.06)


def test_best_of_is_nearer_to_the_prediction_and_says_so(fitted):
    predicted, _ = make_pairs(60, seed=6)
    config = DiffusionPriorConfig(**SMALL, select="best_of", candidates=8)
    chooser = config.build()
    chooser.fitted = fitted.fitted
    drawn = fitted.sample(predicted, n_draws=1, seed=0)
    chosen = chooser.sample(predicted, n_draws=1, seed=0)
    mean, centre = fitted.fitted.target.mean, fitted.fitted.condition.mean

    def similarity(rows):
        left, right = rows.vectors - mean, predicted.vectors - centre
        return np.mean((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1))

    assert similarity(chosen) > similarity(drawn)
    assert config.describe_choices() == ["images from the best of 8 draws"]
    assert DiffusionPriorConfig(**SMALL).describe_choices() == []


def test_it_learns_from_all_training_images_where_few_were_shown():
    predicted, target = make_pairs(100)
    _, images = make_pairs(600, seed=2)
    everything = Embeddings(
        np.concatenate([target.vectors, images.vectors]), np.concatenate([target.ids, images.ids]), "toy"
    )
    config = DiffusionPriorConfig(
        **(SMALL | {"condition": "noised_targets", "held_out": 0.1, "min_steps": 120})
    )
    prior = config.build(seed=0).fit(predicted, target, images=everything)
    assert prior.describe()["n_rows"] == 690  # ten images of the pairs are held out
    queries, truth = make_pairs(seed=5)
    drawn = prior.sample(queries, n_draws=1, seed=0)
    assert frechet(drawn, truth) < 0.25 * frechet(queries, truth)


def test_tokens_go_through_the_transformer(tmp_path):
    rng = np.random.default_rng(0)
    target = rng.normal(size=(40, 3, 8)).astype(np.float32)
    ids = [f"i{k}" for k in range(40)]
    rows = Embeddings(target, ids, "tokens")
    config = replace_constants(DiffusionPriorConfig, depth=1)(
        heads=2, min_steps=6, epochs=1, batch_size=16, steps=3, device="cpu",
        sampler="dpm-solver++", guidance=2.0, time_features=8,
    )  # fmt: skip
    prior = config.build().fit(Embeddings(0.5 * target, ids, "tokens"), rows)
    drawn = prior.sample(rows, n_draws=2, seed=0)
    assert drawn.vectors.shape == (80, 3, 8)
    prior.write(tmp_path)
    np.testing.assert_array_equal(
        config.read(tmp_path).sample(rows, n_draws=2, seed=0).vectors, drawn.vectors
    )
    vectors = Embeddings(target[:, 0], ids, "v")
    one = config.model_copy(update={"network": "transformer"}).build().fit(vectors, vectors)
    assert one.sample(vectors, n_draws=1, seed=0).vectors.shape == (40, 8)


def test_a_value_that_never_varies_stays_what_it_is():
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    rows[:, 1] = 0.1
    scale = fit_scale(rows)
    np.testing.assert_allclose(scale.apply(rows)[:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(scale.undo(scale.apply(rows)), rows, atol=1e-6)
    np.testing.assert_allclose(scale.apply(rows)[:, [0, 2]].std(0), 1, rtol=1e-5)


def test_the_learning_rate_rises_and_falls():
    recipe = DiffusionPriorConfig(**(SMALL | {"warmup_steps": 500})).build().recipe
    rates = [recipe.compute_rate(step, 5000) for step in range(5000)]
    assert rates[0] == pytest.approx(1 / 500)
    assert rates[499] == 1.0
    assert rates[2750] == pytest.approx(0.5, abs=0.01)
    assert 0 <= rates[-1] < 1e-5
    assert recipe.compute_rate(4, 50) == 1.0  # a short training does not end in its warm-up
    assert [recipe.compute_rate(step, 29) for step in (0, 1)] == [0.5, 1.0]  # whole steps


def test_misuse_is_refused(fitted):
    predicted, target = make_pairs(20)
    with pytest.raises(DataError, match="one target per prediction"):
        DiffusionPriorConfig(**SMALL).build().fit(predicted, target.select(predicted.ids[::-1]))
    with pytest.raises(DataError, match="fitted in the space 'toy'"):
        fitted.sample(Embeddings(predicted.vectors, predicted.ids, "clip"), n_draws=1, seed=0)
    with pytest.raises(ConfigError, match="leaves one side empty"):
        DiffusionPriorConfig(**(SMALL | {"held_out": 0.01})).build().fit(predicted, target)
    with pytest.raises(ConfigError, match="cannot have 3 heads"):
        DiffusionPriorConfig(**(SMALL | {"network": "transformer", "heads": 3})).build().fit(
            predicted, target
        )
    tokens = Embeddings(np.zeros((4, 2, 2), np.float32), list("abcd"), "t")
    with pytest.raises(ConfigError, match="each embedding is 2 tokens"):
        DiffusionPriorConfig(**(SMALL | {"network": "mlp", "held_out": 0.0})).build().fit(tokens, tokens)


def test_what_enters_the_fingerprint():
    fields = DiffusionPriorConfig().hashed_fields()
    assert "device" not in fields
    assert "checkpoint_every" not in fields
    assert {"guidance", "sampler", "select", "condition", "ema_decay"} <= set(fields)
    assert {f.name for f in dataclasses.fields(PriorTraining)} >= {"epoch", "step", "best_epoch", "history"}


def test_samples_are_brought_back_to_the_images_unless_that_is_switched_off(fitted):
    assert fitted.fitted.samples is not None
    plain = (
        DiffusionPriorConfig(**(SMALL | {"min_steps": 5}), restandardise=False)
        .build(seed=1)
        .fit(*make_pairs(60))
    )
    assert plain.fitted.samples is None


def test_the_schedule_has_its_steps_and_cannot_be_shorter_than_the_sampling():
    schedule = DiffusionPriorConfig(timesteps=250).schedule
    assert schedule.compute_signal(torch.device("cpu")).shape == (250,)
    with pytest.raises(ValidationError, match=r"prior\.steps is 60, more than the 50 of prior\.timesteps"):
        DiffusionPriorConfig(timesteps=50, steps=60)


def test_gradients_are_cut_at_their_bound():
    def fit(bound):
        config = replace_constants(DiffusionPriorConfig, gradient_clip=bound)(**(SMALL | {"min_steps": 5}))
        return config.build(seed=1).fit(*make_pairs(60)).sample(make_pairs(6)[0], n_draws=1, seed=0).vectors

    np.testing.assert_array_equal(fit(1e6), fit(1e7))  # never reached
    assert np.abs(fit(1e-6) - fit(1e6)).max() > 0


@pytest.mark.parametrize(("n_rows", "n_seen"), [(3, 510), (200, 400), (600, 600)])
def test_the_loss_of_held_out_images_is_their_mean_under_many_noises(monkeypatch, n_rows, n_seen):
    """Batches weigh by their rows; a constant loss is that constant."""
    sizes, losses = [], []

    def compute(network, conditions, targets, *rest, **options):
        sizes.append(len(conditions))
        losses.append(float(targets.mean()))
        return torch.tensor(losses[-1])

    monkeypatch.setattr(prior_training, "compute_loss", compute)
    rows = torch.arange(float(n_rows))[:, None] + 1
    recipe = Mock(spec=prior_training.PriorRecipe, seed=0, batch_size=64, schedule=None)
    held_out = MagicMock(spec=ConditionSource, conditions=rows, targets=rows)
    held_out.__len__.return_value = n_rows
    found = prior_training.measure_held_out(torch.nn.Identity(), held_out, recipe, torch.device("cpu"))
    assert found == pytest.approx((n_rows + 1) / 2)
    assert (sum(sizes), max(sizes)) == (n_seen, 64)
