"""Brain correlation finds the regions that respond to images, and nothing in the reconstructions of other images."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.scoring.metrics import brain_correlation as brain
from tests.references import CLOSE, assert_close


def correlate(model, rounds, measured, **options):
    """Correlate what the model expects of each round with what was measured."""
    return brain.correlate_responses(
        [brain.predict_responses(model, one) for one in rounds], measured, **options
    )


RIDGE = RidgeConfig(alphas=(1.0, 100.0), n_inner_folds=3, device="cpu")


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((160, 6))
    weights = np.concatenate([rng.standard_normal((6, 10)), np.zeros((6, 15))], axis=1)
    responses = features @ weights + 1.5 * rng.standard_normal((160, 25))
    responses[:, 24] = 3.0  # a dead voxel
    ids = np.array([f"i{i}" for i in range(160)], dtype=object)
    training = Embeddings(features[:120].astype(np.float32), ids[:120], "toy")
    true = Embeddings(features[120:].astype(np.float32), ids[120:], "toy")
    regions = {"visual": np.arange(25) < 10, "other": (np.arange(25) >= 10) & (np.arange(25) < 24)}
    model = brain.fit_encoding_model(training, responses[:120], ridge=RIDGE)
    return model, true, responses[120:], regions


def test_it_equals_one_correlation_per_voxel_and_finds_the_region(world):
    model, true, measured, regions = world
    blurred = Embeddings(true.vectors + np.float32(0.5), true.ids, "toy")
    noisy = Embeddings(
        true.vectors + np.random.default_rng(1).standard_normal(true.vectors.shape).astype(np.float32),
        true.ids,
        "toy",
    )
    found = correlate(model, [blurred, noisy], measured, regions=regions, n_boot=300)
    fit = model.fitted
    expected = np.zeros(25)
    for one in (blurred, noisy):
        predicted = fit.zscore.apply(one.vectors) @ fit.weights + fit.target_mean
        expected[:24] += [np.corrcoef(predicted[:, v], measured[:, v])[0, 1] / 2 for v in range(24)]
    np.testing.assert_allclose(found.by_voxel, expected, atol=1e-6)
    assert found.regions["visual"].value == pytest.approx(expected[:10].mean(), abs=1e-6)
    assert found.regions["all"].value == pytest.approx(expected.mean(), abs=1e-6)
    visual, other = found.regions["visual"], found.regions["other"]
    assert visual.p_value < 0.01
    assert visual.interval.low > 0.3
    assert visual.interval.low < visual.value < visual.interval.high
    assert other.p_value > 0.01
    assert abs(visual.chance) < 1e-12  # a correlation has mean zero over all assignments
    assert found.n_images == 40


@pytest.mark.parametrize("unit", [1e-13, 1.0, 1e9], ids=["tesla", "z", "counts"])
def test_standardising_knows_no_unit_and_takes_rounding_for_none(unit):
    """A constant column is one up to rounding, however large; one of tiny numbers is not."""
    rows = np.random.default_rng(0).normal(size=(200, 4))
    rows[:, 2] = 1 / 3 + 1e-16 * rows[:, 2]
    rows[:, 3] = 0
    found = brain._standardise(unit * (rows + np.array([0, 10, 0, 0])))
    expected = rows[:, :2] - rows[:, :2].mean(axis=0)
    assert_close(found[:, :2], expected / np.sqrt((expected**2).sum(axis=0)))
    assert (found[:, 2:] == 0).all()


def test_blocks_of_voxels_change_nothing(world, monkeypatch):
    model, true, measured, regions = world
    expected = correlate(model, [true], measured, regions=regions, n_boot=50, n_permutations=50)
    monkeypatch.setattr(brain, "BLOCK_VOXELS", 7)
    found = correlate(model, [true], measured, regions=regions, n_boot=50, n_permutations=50)
    assert_close(found.by_voxel, expected.by_voxel)
    for name in ("all", "visual", "other"):
        assert found.regions[name].value == pytest.approx(expected.regions[name].value, rel=CLOSE)
        assert found.regions[name].interval.low == pytest.approx(
            expected.regions[name].interval.low, rel=CLOSE
        )


def test_the_bootstrap_equals_one_resample_at_a_time():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 9, 3))
    rows = rng.integers(0, 9, 9)
    weights = np.bincount(rows, minlength=9)[None].astype(float)
    expected = [np.corrcoef(left[rows, v], right[rows, v])[0, 1] for v in range(3)]
    assert_close(brain._correlate_weighted(left, right, weights)[0], expected)


def test_the_reconstructions_of_other_images_score_nothing(world):
    model, true, measured, regions = world
    order = np.roll(np.arange(40), 7)
    swapped = Embeddings(true.vectors[order], true.ids, "toy")
    found = correlate(model, [swapped], measured, regions=regions, n_boot=50)
    assert found.regions["visual"].p_value > 0.01
    assert abs(found.regions["visual"].value) < 0.3


def test_what_does_not_fit_is_refused(world):
    model, true, measured, _ = world
    with pytest.raises(DataError, match="do not fit"):
        correlate(model, [true], measured[:-1])
    with pytest.raises(DataError, match="region 'empty'"):
        correlate(model, [true], measured, regions={"empty": np.zeros(25, dtype=bool)})
    with pytest.raises(DataError, match="one response vector per embedding"):
        brain.fit_encoding_model(true, measured[:3])


def test_maps_of_responses_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(30, 6))
    predicted = measured * [1, 1, 1, 0, 0, 1] + rng.normal(size=(30, 6)) * [0.2, 1, 3, 1, 1, 0]
    predicted[:, 4] = 2.0  # says nothing
    found = brain.map_responses(predicted, measured, n_boot=300, n_permutations=400, seed=1)
    for n in range(6):
        expected = 0 if n == 4 else np.corrcoef(predicted[:, n], measured[:, n])[0, 1]
        assert found.correlation[n] == pytest.approx(expected)
        error = ((measured[:, n] - predicted[:, n]) ** 2).sum()
        assert found.explained[n] == pytest.approx(
            1 - error / ((measured[:, n] - measured[:, n].mean()) ** 2).sum()
        )
    assert found.p_value[[0, 5]].tolist() == [pytest.approx(1 / 401)] * 2
    assert found.p_value[4] == 1
    assert (found.ci_low[:4] < found.correlation[:4]).all()
    from scipy.stats import false_discovery_control

    np.testing.assert_allclose(found.q_value, false_discovery_control(found.p_value))
    # Whole groups are drawn together, and blocks change nothing.
    grouped = brain.map_responses(
        predicted, measured, n_boot=300, n_permutations=400, seed=1, clusters=np.arange(30) // 10, unit="run"
    )
    np.testing.assert_array_equal(grouped.correlation, found.correlation)
    assert found.resampled.tolist() == [*["images"] * 6]
    # Three runs have Student's t with two degrees of freedom, and what does not vary has none.
    assert grouped.resampled[0] == "3 runs (t)"
    assert grouped.resampled[4] == "no interval: all values are equal"
    assert np.isnan(grouped.ci_low[4])
    assert ((grouped.ci_high - grouped.ci_low)[:3] > (found.ci_high - found.ci_low)[:3]).all()


def test_correlations_of_few_groups_and_after_folds():
    """Two groups have no interval; after folds limits are wider by sqrt 2 and so is the null behind p."""
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(40, 3))
    predicted = 0.3 * measured + rng.normal(size=(40, 3))
    options = {"n_boot": 300, "n_permutations": 400, "seed": 1}
    plain = brain.correlate_responses([predicted], measured, **options).regions["all"]
    wide = brain.correlate_responses([predicted], measured, over_folds=True, **options).regions["all"]
    assert (wide.value, wide.chance) == (plain.value, plain.chance)
    assert wide.p_value > plain.p_value
    assert wide.interval.resampled == "images, widened by sqrt 2 after folds"
    assert wide.interval.low - wide.value == pytest.approx(2**0.5 * (plain.interval.low - plain.value))
    few = brain.correlate_responses(
        [predicted], measured, clusters=np.arange(40) % 2, unit="group", **options
    )
    assert few.regions["all"].interval.low is None
    assert few.regions["all"].interval.resampled.startswith("no interval: 2 groups")
    maps = [brain.map_responses(predicted, measured, over_folds=over, **options) for over in (False, True)]
    np.testing.assert_allclose(
        maps[1].ci_high - maps[1].correlation, 2**0.5 * (maps[0].ci_high - maps[0].correlation)
    )
    above = maps[0].p_value < 0.4  # what lies at the middle of the null stays there
    assert (maps[1].p_value[above] > maps[0].p_value[above]).all()


def test_maps_refuse_too_few_images():
    measured = predicted = np.zeros((30, 2))
    with pytest.raises(DataError, match="at least three images"):
        brain.map_responses(predicted[:2], measured[:2])
