"""Reconstructions that explain the measured responses score; those of other images, and blank ones, do not."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.preprocessing.noise_ceiling import ResponseCeiling
from braindecode_vis.scoring.response_scores import (
    BrainScoresConfig,
    BrainTask,
    find_response_ceilings,
    score_brain,
    tabulate_ceilings,
)

N, SIZE, N_VOXELS, N_REPETITIONS = 90, 6, 20, 3


def make_recording(signal=1.0, subject="01", dims=("trial", "voxel")):
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 255, (N, SIZE, SIZE, 1), dtype=np.uint8), 3, axis=-1)
    ids = [f"i{k:02d}" for k in range(N)]
    table = pd.DataFrame(
        {"stimulus_id": ids, "concept": "noise", "path": "", "sha256": [hash_pixels(p) for p in pixels]}
    )
    clean = (pixels[..., 0].reshape(N, -1) / 255 - 0.5) @ rng.normal(size=(SIZE * SIZE, N_VOXELS))
    data = np.concatenate([signal * clean + rng.normal(size=clean.shape) for _ in range(N_REPETITIONS)])
    trials = pd.DataFrame(
        {
            "subject": subject, "session": "1", "run": "1", "stimulus_id": ids * N_REPETITIONS,
            "repetition": np.repeat(np.arange(N_REPETITIONS), N), "split": "train",
        }
    )  # fmt: skip
    if len(dims) == 3:
        data = data[..., None]
    responses = Responses(data.astype(np.float32), dims, trials, "arbitrary")
    return responses, StimulusSet(table, pixels=pixels), pixels


def pick(responses, numbers):
    from braindecode_vis.preprocessing.selection import average_repetitions

    rows = np.flatnonzero(np.isin(responses.stimulus_ids, [f"i{k:02d}" for k in numbers]))
    return average_repetitions(responses, rows), rows


def make_task(folds, images, seen, stimuli, ids, *, ceilings=None, subjects=None, **changes):
    config = BrainScoresConfig(features={"kind": "pixels"}, **changes)
    return BrainTask(
        config, folds, stimuli, np.array(ids, dtype=object),
        np.full(len(ids), "01", dtype=object) if subjects is None else subjects,
        seen, images, ceilings or {}, "toy", "test", 0, 200, 200,
    )  # fmt: skip


def test_the_true_image_explains_the_response_and_another_does_not():
    responses, stimuli, pixels = make_recording()
    train, _ = pick(responses, range(60))
    test, rows = pick(responses, range(60, 90))
    seen = pixels[60:]
    images = {
        "decoded": np.stack([seen, seen], axis=1),  # two draws
        "mean_image": np.full_like(seen, 128),
        "other": np.roll(seen, 1, axis=0),
        "shuffled": seen,
    }
    ceilings, lacking = find_response_ceilings(responses, rows, measure="ncsnr", averaged=True, seed=0)
    assert not lacking
    scores, lacking = score_brain(
        make_task([(train, test)], images, seen, stimuli, test.stimulus_ids, ceilings=ceilings)
    )
    assert not lacking
    found = {score.method: score for score in scores}
    assert set(found) == {"seen", "decoded", "mean_image", "other"}
    assert found["decoded"].value == pytest.approx(found["seen"].value)
    assert found["decoded"].value > 0.5
    assert found["decoded"].ci_low < found["decoded"].value < found["decoded"].ci_high
    assert abs(found["decoded"].chance) < 0.1
    assert found["decoded"].p_value == pytest.approx(1 / 201)  # 200 permutations and the true assignment
    assert all(score.p_value is not None for score in scores)
    assert found["decoded"].value < found["decoded"].noise_ceiling < 1
    assert found["mean_image"].value == pytest.approx(0, abs=1e-6)
    assert found["other"].value < 0.2
    assert found["decoded"].resampled == "images"
    row = tabulate_ceilings(ceilings)[0]
    assert row["ceiling"] == pytest.approx(found["decoded"].noise_ceiling)
    assert row["ceiling from"] < row["ceiling"] < row["ceiling to"]
    assert row["ceiling"] == pytest.approx(row["share of signal"] ** 0.5)
    assert row["images"] == 30


def test_folds_are_centred_before_they_meet():
    """Without it, noise scores below chance: a fold whose test mean is high has a training mean that is low."""
    responses, stimuli, pixels = make_recording(signal=0.0)
    folds = []
    for part in np.array_split(np.arange(N), 10):
        folds.append((pick(responses, np.setdiff1d(np.arange(N), part))[0], pick(responses, part)[0]))
    ids = np.concatenate([test.stimulus_ids for _, test in folds])
    scores, _ = score_brain(make_task(folds, {"decoded": pixels}, pixels, stimuli, ids))
    decoded = next(s for s in scores if s.method == "decoded")
    assert decoded.n_queries == N
    assert abs(decoded.value) < 0.08
    assert decoded.p_value > 0.05
    assert decoded.resampled == "images, widened by sqrt 2 after folds"


def test_what_cannot_be_computed_is_said():
    responses, stimuli, pixels = make_recording()
    train, _ = pick(responses, range(60))
    test, _ = pick(responses, range(60, 90))
    other = np.full(30, "02", dtype=object)
    scores, lacking = score_brain(
        make_task([(train, test)], {}, pixels[60:], stimuli, test.stimulus_ids, subjects=other)
    )
    assert not scores
    assert "subject 02 not computed" in lacking[0]
    twice = np.concatenate([test.stimulus_ids, test.stimulus_ids])
    scores, lacking = score_brain(
        make_task([(train, test)], {}, np.concatenate([pixels[60:]] * 2), stimuli, twice)
    )
    assert "repeats.test to averaged" in lacking[0]
    once = responses.select(np.arange(N))
    ceilings, lacking = find_response_ceilings(
        once, np.arange(60, 90), measure="ncsnr", averaged=True, seed=0
    )
    assert not ceilings
    assert "not computed" in lacking[0]
    with pytest.raises(ConfigError, match="regions"):
        score_brain(
            make_task([(train, test)], {}, pixels[60:], stimuli, test.stimulus_ids, regions=("streams",))
        )
    waves, stimuli, _ = make_recording(dims=("trial", "channel", "time"))
    with pytest.raises(ConfigError, match="voxels or parcels"):
        score_brain(make_task([(waves, waves)], {}, pixels, stimuli, waves.stimulus_ids[:N]))
    with pytest.raises(ValueError, match="n_features"):
        BrainScoresConfig(ridge={"kind": "ridge", "n_features": [10]})


def test_a_ceiling_without_an_interval_has_none_in_the_table():
    """A published map comes without the images that a jackknife would leave out."""
    share = np.array([0.0, 0.04, 0.25, 0.64])
    known = ResponseCeiling("01", share, 0.1, 0.4, "ours", 30, 3.0)
    unknown = ResponseCeiling("02", share, np.nan, np.nan, "published", 0, 1.0)
    first, second = tabulate_ceilings({"01": known, "02": unknown})
    assert (first["share from"], first["share to"]) == (0.1, 0.4)
    np.testing.assert_allclose([first["ceiling from"], first["ceiling to"]], np.sqrt([0.1, 0.4]))
    limits = ("share from", "share to", "ceiling from", "ceiling to")
    assert [second[name] for name in limits] == [None] * 4
    for row in (first, second):
        assert row["share of signal"] == pytest.approx(share.mean())
        assert row["columns above 0.3"] == 0.5  # the roots are 0, 0.2, 0.5 and 0.8
        assert (row["columns"], row["median of columns"]) == (4, pytest.approx(0.35))
