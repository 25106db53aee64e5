"""Many tests at once: p-values that hold for the whole family.

Holm and the maximum statistic bound the chance of a single false claim; Benjamini and Hochberg bound the expected
share of false claims among those that are made. Which family is meant is the caller's decision and belongs into the
text beside the numbers.

References
----------
Holm (1979), Scandinavian Journal of Statistics 6, 65-70. Benjamini and Hochberg (1995),
doi:10.1111/j.2517-6161.1995.tb02031.x. Nichols and Holmes (2002), doi:10.1002/hbm.1058 (maximum statistic).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from braindecode_vis.checks import DataError, check_option


def correct_holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm's step-down adjusted p-values, shape (n_tests,).

    Parameters
    ----------
    p_values : array of shape (n_tests,)

    Examples
    --------
    >>> correct_holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    values, order = _check(p_values)
    scaled = values[order] * (len(values) - np.arange(len(values)))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted


def correct_benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for the false discovery rate, shape (n_tests,).

    Valid for independent or positively dependent tests.

    Parameters
    ----------
    p_values : array of shape (n_tests,)

    Examples
    --------
    >>> correct_benjamini_hochberg(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    values, order = _check(p_values)
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return adjusted


def correct_by_maximum(
    observed: np.ndarray,
    null: np.ndarray,
    *,
    alternative: Literal["greater", "less", "two-sided"] = "greater",
) -> np.ndarray:
    """Return p-values of each test against the null of the most extreme of all tests, shape (n_tests,).

    Parameters
    ----------
    observed : array of shape (n_tests,)
        One statistic per test, on scales that can be compared (standardise them first if they differ).
    null : array of shape (n_permutations, n_tests)
        The statistics under the same permutations for every test: row by row one shuffle of the labels.
    alternative
        ``two-sided`` takes absolute values, so statistics must be centred on their null.

    Raises
    ------
    DataError
        If the shapes do not fit.

    Examples
    --------
    >>> null = np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    >>> correct_by_maximum(np.array([3.0, 1.5]), null).tolist()
    [0.25, 0.5]
    """
    check_option("alternative", alternative, ("greater", "less", "two-sided"))
    observed = np.asarray(observed, dtype=float)
    if null.ndim != 2 or null.shape[1:] != observed.shape or not len(null):
        raise DataError(
            f"{observed.shape} statistics need a null of shape (n_permutations, n_tests), not {null.shape}."
        )
    if not np.isfinite(null).all() or not np.isfinite(observed).all():
        raise DataError("a statistic or its null is not finite; leave out tests that are not defined.")
    if alternative == "two-sided":
        observed, null = np.abs(observed), np.abs(null)
    elif alternative == "less":
        observed, null = -observed, -null
    extreme = null.max(axis=1)
    slack = 1e-12 * np.maximum(1.0, np.abs(observed))
    return ((extreme[:, None] >= observed - slack).sum(axis=0) + 1) / (len(null) + 1)


def _check(p_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(p_values, dtype=float)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise DataError("p-values to correct must be one number between 0 and 1 per test.")
    return values, np.argsort(values, kind="stable")
