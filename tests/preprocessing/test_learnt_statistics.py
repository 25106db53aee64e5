"""What preprocessing has learnt is kept, and gives new trials the numbers that it gave its own."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics, ZScoreGroup
from braindecode_vis.preprocessing.scaling import FeatureStatistics, RobustScaler
from tests.preprocessing.test_betas import make_source


@pytest.mark.parametrize("zscore", ["session", "run", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sessions_of_the_run_are_standardised_to_the_same_bits(tmp_path, zscore, dtype):
    """The last session has no training trial: it waits for the others, and does so again."""
    source, _ = make_source(("ttttTTtttt", "TTtttttttt", "TTTT"), zscore=zscore, dtype=dtype)
    write_fmri_source(source, tmp_path / "old")
    learnt = LearntStatistics.read(tmp_path / "old" / "responses")
    assert learnt.is_empty == (zscore == "none")
    write_fmri_source(source, tmp_path / "new", learnt=learnt)
    old, new = (store.read_responses(tmp_path / name / "responses") for name in ("old", "new"))
    np.testing.assert_array_equal(old.data, new.data)
    assert old.data.dtype == new.data.dtype


def test_every_part_of_a_session_comes_to_its_own_rows(tmp_path):
    """A session may lie in one file for each run."""
    source, _ = make_source(("ttttTTtttt", "TTttttttt"))

    def cut(part, start, stop):
        trials = part.trials[start:stop].reset_index(drop=True)
        return replace(part, trials=trials, read=lambda a, b: part.read(a + start, b + start))

    pieces = [cut(part, *ends) for part in source.parts for ends in ((0, 2), (2, 5), (5, len(part.trials)))]
    source = replace(source, parts=tuple(pieces))
    write_fmri_source(source, tmp_path / "old")
    learnt = LearntStatistics.read(tmp_path / "old" / "responses")
    write_fmri_source(source, tmp_path / "new", learnt=learnt)
    old, new = (np.load(tmp_path / name / "responses" / "data.npy") for name in ("old", "new"))
    np.testing.assert_array_equal(old, new)
    assert (np.abs(new).sum(axis=1) > 0).all()


def test_a_session_of_its_own_test_trials_is_never_pooled(tmp_path):
    source, _ = make_source(("tttttTT", "TTTTTT"), untrained="own")
    write_fmri_source(source, tmp_path / "old")
    learnt = LearntStatistics.read(tmp_path / "old" / "responses")
    write_fmri_source(source, tmp_path / "new", learnt=learnt)
    old, new = (np.load(tmp_path / name / "responses" / "data.npy") for name in ("old", "new"))
    np.testing.assert_array_equal(old, new)
    (first,) = (statistics for group, statistics in learnt.zscores.items() if not group.own)
    block = np.ones((2, 6), np.float32)
    np.testing.assert_array_equal(learnt.apply(block, "01", "09"), first.apply(block))
    assert learnt.used["subject 01, session 09"].endswith("statistics over the one session of its subject")


def test_a_run_of_a_version_that_kept_none_says_so(tmp_path):
    source, _ = make_source(("tttttTT",))
    write_fmri_source(source, tmp_path)
    meta = store.read_json(tmp_path / "responses" / "meta.json")
    del meta["provenance"]["standardised_groups"]
    store.write_json(tmp_path / "responses" / "meta.json", meta)
    with pytest.raises(DataError, match="did not keep mean and variance"):
        LearntStatistics.read(tmp_path / "responses")


def test_unknown_sessions_get_the_average_covariance_and_not_the_average_matrix():
    covariances = [np.diag([1.0, 4.0]), np.diag([9.0, 4.0])]
    matrices = [np.diag(1 / np.sqrt(np.diag(c))).astype(np.float32) for c in covariances]
    learnt = LearntStatistics(whitening={("01", "a"): matrices[0], ("01", "b"): matrices[1]}, unit="whitened")
    block = np.ones((1, 2, 3), np.float32)
    np.testing.assert_array_equal(learnt.apply(block, "01", "b"), matrices[1] @ block)
    expected = np.array([1 / np.sqrt(5), 0.5])  # of the mean covariance diag(5, 4)
    np.testing.assert_allclose(learnt.apply(block, "01", "c")[0, :, 0], expected, rtol=1e-6)
    assert (
        "new session: using mean statistics over 2 sessions of its subject"
        in learnt.used["subject 01, session c"]
    )


def test_statistics_learnt_anew_are_those_of_the_trials_themselves():
    data = np.random.default_rng(0).normal(3.0, 2.0, (40, 4, 50)).astype(np.float32)
    trials = pd.DataFrame(
        {"subject": "02", "session": ["a", "b"] * 20, "run": "1", "stimulus_id": [str(n) for n in range(40)]}
    )
    known = LearntStatistics(
        whitening={("01", "x"): np.eye(4, dtype=np.float32)},
        scaling={("01",): RobustScaler(np.zeros(4, np.float32), np.ones(4, np.float32), 20.0)}, unit="z",
    )  # fmt: skip
    anew = known.learn_anew(data, trials)
    made = anew.apply_to_trials(data, trials)
    for session in ("a", "b"):
        part = made[(trials["session"] == session).to_numpy()]
        np.testing.assert_allclose(part.mean(axis=(0, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(part.std(axis=(0, 2)), 1, atol=1e-4)


def make_scaler(centre, scale, clamp=20.0):
    return RobustScaler(np.full(2, centre, np.float32), np.full(2, scale, np.float32), clamp)


def test_scales_come_from_the_session_then_its_subject_then_all_others():
    block = np.full((1, 2, 3), 10.0, np.float32)
    learnt = LearntStatistics(
        scaling={("01", "a"): make_scaler(1, 3), ("01", "b"): make_scaler(3, 1), ("02", "a"): make_scaler(2, 8)},
        unit="IQR",
    )  # fmt: skip
    for subject, session, centre, scale in (
        ("01", "a", 1, 3), ("01", "b", 3, 1), ("01", "c", 2, 2), ("02", "c", 2, 8), ("03", "a", 2, 4),
    ):  # fmt: skip
        np.testing.assert_allclose(learnt.apply(block, subject, session), (10 - centre) / scale, rtol=1e-6)
    assert "mean statistics over 2 sessions of its subject" in learnt.used["subject 01, session c"]
    assert "statistics over the one session of its subject" in learnt.used["subject 02, session c"]
    assert "new subject: using mean statistics over 3 sessions" in learnt.used["subject 03, session a"]
    by_subject = LearntStatistics(scaling={("01",): make_scaler(1, 3, 2.0), ("02",): make_scaler(3, 1, 2.0)})
    np.testing.assert_allclose(by_subject.apply(block, "02", "x"), 2)  # cut
    np.testing.assert_allclose(by_subject.apply(block, "03", "x"), 2)


def test_zscores_come_from_the_run_then_the_mean_over_sessions_with_training_trials():
    def make(mean, variance):
        return FeatureStatistics(np.full(2, float(mean)), np.full(2, float(variance)))

    learnt = LearntStatistics(
        zscores={
            ZScoreGroup("01", "a", "1"): make(1, 4), ZScoreGroup("01", "a", "2"): make(3, 16),
            ZScoreGroup("01", "b", "1", own=True): make(100, 1), ZScoreGroup("02", "a"): make(7, 1),
        }
    )  # fmt: skip
    block = np.full((1, 2), 11.0, np.float32)
    for where, mean, variance in (
        (("01", "a", "1"), 1, 4), (("01", "a", "2"), 3, 16), (("01", "b", "1"), 100, 1), (("02", "a", "9"), 7, 1),
        (("01", "a", "3"), 2, 10), (("01", "c", "1"), 2, 10), (("03", "a", "1"), 11 / 3, 7),
    ):  # fmt: skip
        np.testing.assert_allclose(learnt.apply(block, *where), (11 - mean) / variance**0.5, rtol=1e-5)
    assert "by the run's test trials of this session" in learnt.used["subject 01, session b"]
    assert "by this session's training trials" in learnt.used["subject 01, session a"]
    # Voxels of another person are other voxels: means of the run do not fit them.
    with pytest.raises(
        DataError, match=r"subject 03, session a has 3 voxels, but .* are 2, .* with --whiten-new"
    ):
        learnt.apply(np.full((1, 3), 11.0, np.float32), "03", "a", "1")
    alone = LearntStatistics(zscores={ZScoreGroup("01", "b", own=True): make(0, 1)})
    with pytest.raises(DataError, match="every session by its own trials"):
        alone.apply(block, "01", "c")


@pytest.mark.parametrize("unit", ["z", "IQR"])
def test_learning_anew_takes_the_kind_of_scale_that_the_run_has(unit):
    data = np.random.default_rng(0).exponential(2.0, (12, 2, 40)).astype(np.float32)
    trials = pd.DataFrame(
        {"subject": "02", "session": "a", "run": ["1", "2"] * 6, "stimulus_id": [str(n) for n in range(12)]}
    )
    anew = LearntStatistics(
        scaling={("01",): make_scaler(0, 1, 4.0)}, unit=unit, dtype=np.float16
    ).learn_anew(data, trials)
    scaler = anew.scaling["02", "a"]
    wide = data.astype(float)
    centre, scale = (
        (wide.mean(axis=(0, 2)), wide.std(axis=(0, 2))) if unit == "z"
        else (np.median(wide, axis=(0, 2)), np.subtract(*np.percentile(wide, [75, 25], axis=(0, 2))))
    )  # fmt: skip
    np.testing.assert_allclose(scaler.centre, centre, rtol=1e-5)
    np.testing.assert_allclose(scaler.scale, scale, rtol=1e-5)
    assert (scaler.clamp, anew.unit, anew.apply(data, "02", "a").dtype) == (4.0, unit, np.float16)


def test_learning_anew_standardises_by_run_where_the_run_did():
    data = np.random.default_rng(0).normal(5, 3, (12, 4)).astype(np.float32)
    trials = pd.DataFrame(
        {"subject": "02", "session": "a", "run": ["1", "2"] * 6, "stimulus_id": [str(n) for n in range(12)]}
    )
    statistics = FeatureStatistics(np.zeros(4), np.ones(4))
    for run, rows in (("", [slice(None)]), ("7", [slice(0, None, 2), slice(1, None, 2)])):
        anew = LearntStatistics(zscores={ZScoreGroup("01", "x", run): statistics}).learn_anew(data, trials)
        assert all(group.own for group in anew.zscores)
        assert len(anew.zscores) == len(rows)
        made = anew.apply_to_trials(data, trials)
        for part in rows:
            np.testing.assert_allclose(made[part].mean(axis=0), 0, atol=1e-5)
            np.testing.assert_allclose(made[part].std(axis=0), 1, atol=1e-5)
    anew = LearntStatistics(zscores={ZScoreGroup("01", "x", "7"): statistics})
    with pytest.raises(DataError, match="02 a 1 has one trial"):
        anew.learn_anew(data[:2], trials.iloc[:2])
