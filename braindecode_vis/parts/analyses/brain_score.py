"""Brain-Score's measure of how well images predict responses, for the analysis ``encoding``.

Owns the judge's rule for train and test splits, as its benchmarks of LAION-fMRI have it: ridge on features as they are
with one penalty for all responses, chosen by leaving out one image at a time; the median correlation of the responses
whose noise ceiling is high enough, divided by their median ceiling and squared; the mean over subjects, with an error
by resampling subjects. One thing differs: the judge's square makes a negative median a positive score, which keeps its
sign here. Knows nothing of runs. `encoding_model` differs: it z-scores features and chooses a penalty
for every response.

References
----------
Schrimpf et al. (2020), doi:10.1016/j.neuron.2020.07.040; code brain-score/vision@0fba98b,
``benchmarks/laion_fmri/benchmark.py`` and ``benchmark_helpers/multi_subject.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: The judge's penalties, from 1e-10 to 1e10.
PENALTIES = tuple(10.0**power for power in range(-10, 11))
#: Responses with a smaller share of signal are left out.
LEAST_SHARE = 0.3
N_BOOTSTRAP = 200


@dataclass(frozen=True)
class SubjectScore:
    """What the judge says of some responses of one subject.

    Parameters
    ----------
    score
        ``(raw / ceiling) ** 2`` with the sign of `raw`.
    raw, ceiling
        Median correlation of predicted and measured responses, and median ceiling of the same responses.
    n_responses
        How many were reliable enough.
    """

    score: float
    raw: float
    ceiling: float
    n_responses: int


def correlate_predictions(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the correlation over test images of every response with its prediction, shape (n_responses,).

    Parameters
    ----------
    train, test : pairs of arrays of shape (n_images, n_features) and (n_images, n_responses)
        Features and responses, one row per image.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> features, weights = rng.normal(size=(60, 4)), rng.normal(size=(4, 3))
    >>> responses = features @ weights
    >>> correlate_predictions((features[:40], responses[:40]), (features[40:], responses[40:])).round(3).tolist()
    [1.0, 1.0, 1.0]
    """
    from sklearn.linear_model import RidgeCV

    model = RidgeCV(alphas=PENALTIES).fit(*(np.asarray(part, np.float64) for part in train))
    measured = np.asarray(test[1], np.float64)
    predicted = model.predict(np.asarray(test[0], np.float64)).reshape(measured.shape)
    predicted, measured = predicted - predicted.mean(axis=0), measured - measured.mean(axis=0)
    norms = np.linalg.norm(predicted, axis=0) * np.linalg.norm(measured, axis=0)
    # A response that is constant, or predicted as such, has no correlation.
    return np.asarray((predicted * measured).sum(axis=0) / np.where(norms > 0, norms, np.nan))


def score_groups(
    correlation: np.ndarray, share: np.ndarray, groups: Mapping[str, np.ndarray]
) -> dict[str, SubjectScore]:
    """Return the scores of one subject by group of responses, without groups that have no reliable response.

    Parameters
    ----------
    correlation : array of shape (n_responses,)
        Of `correlate_predictions`.
    share : array of shape (n_responses,)
        Share of the variance of each measured response that is signal.
    groups
        Which responses belong to each group.

    Examples
    --------
    >>> groups = {"V1": np.array([True, True, True, True]), "V2": np.array([True, False, False, False])}
    >>> scores = score_groups(np.array([0.9, 0.1, 0.3, 0.8]), np.array([0.2, 0.36, 0.49, 0.81]), groups)
    >>> list(scores), scores["V1"].n_responses, round(scores["V1"].score, 3)
    (['V1'], 3, 0.184)
    >>> round(score_groups(np.array([-0.3]), np.array([0.49]), {"V1": np.array([True])})["V1"].score, 3)
    -0.184
    """
    found = {}
    for name, group in groups.items():
        kept = group & (share > LEAST_SHARE) & np.isfinite(correlation)
        if kept.any():
            raw = float(np.median(correlation[kept]))
            ceiling = float(np.median(np.sqrt(np.minimum(share[kept], 1))))
            found[name] = SubjectScore(raw * abs(raw) / ceiling**2, raw, ceiling, int(kept.sum()))
    return found


def pool_subjects(scores: Mapping[str, SubjectScore]) -> tuple[SubjectScore, float | None]:
    """Return the means over subjects, and the error of the score.

    The error is the standard deviation of the score over resamples of the subjects; None for one subject.
    """
    table = np.array([(one.score, one.raw, one.ceiling, one.n_responses) for one in scores.values()])
    score, raw, ceiling, n_responses = table.mean(axis=0).tolist()
    pooled = SubjectScore(score, raw, ceiling, round(n_responses))
    if len(table) < 2:
        return pooled, None
    generator = np.random.default_rng(0)
    draws = [table[generator.integers(0, len(table), len(table)), 0].mean() for _ in range(N_BOOTSTRAP)]
    return pooled, float(np.std(draws, ddof=1))
