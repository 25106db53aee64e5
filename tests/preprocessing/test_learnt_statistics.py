"""What preprocessing has learnt is kept, and gives new trials the numbers that it gave its own."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import store
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.scaling import RobustScaler
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
    assert learnt.used["subject 01, session 09"].endswith("statistics of the one session of its subject")


def test_a_run_of_a_version_that_kept_none_says_so(tmp_path):
    source, _ = make_source(("tttttTT",))
    write_fmri_source(source, tmp_path)
    meta = store.read_json(tmp_path / "responses" / "meta.json")
    del meta["provenance"]["standardised_groups"]
    store.write_json(tmp_path / "responses" / "meta.json", meta)
    with pytest.raises(DataError, match="kept no mean and variance"):
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
        "does not know: statistics of 2 sessions, averaged, of its subject"
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
