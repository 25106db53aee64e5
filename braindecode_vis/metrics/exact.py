"""Exact p-values for few items: every assignment is looked at, none is drawn.

With ten digits, six imagined images or four subjects, random shuffles repeat themselves; the whole null is small
enough to enumerate. The observed assignment is one of it, so the p-value is never below one over its size.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np

from braindecode_vis.checks import ConfigError, DataError, check_finite, check_option
from braindecode_vis.metrics.uncertainty import Alternative, Labels, PermutationResult

LARGEST_NULL = 1_000_000  # assignments
LARGEST_SIGNS = 20  # units whose signs are flipped: 2^20 combinations


def count_assignments(n_stimuli: int, *, groups: Labels | None = None) -> int:
    """Return how many assignments of stimuli to predictions there are, within groups if they are given.

    Examples
    --------
    >>> count_assignments(6), count_assignments(6, groups=["a", "a", "a", "b", "b", "b"])
    (720, 36)
    """
    return math.prod(math.factorial(len(block)) for block in _find_blocks(n_stimuli, groups))


def exact_permutation_test(
    table: np.ndarray, *, groups: Labels | None = None, alternative: Alternative = "greater"
) -> PermutationResult:
    """Test whether predictions fit their own ground truth better, against all assignments.

    Parameters
    ----------
    table : array of shape (n_stimuli, n_stimuli)
        Value of each prediction (row) if each stimulus (column) were its ground truth; the truth is the diagonal.
        Several predictions of one stimulus are averaged first.
    groups : sequence of length n_stimuli, optional
        Class of each stimulus; assignments then stay within the class.
    alternative
        ``greater``, ``less`` or ``two-sided`` (distance from the mean of the null).

    Returns
    -------
    PermutationResult
        `null` holds every assignment, the observed one included; the p-value is the share that is as extreme.

    Raises
    ------
    ConfigError
        If there are more than a million assignments: use `uncertainty.permutation_test`.

    Examples
    --------
    >>> exact_permutation_test(np.eye(4)).p_value == 1 / 24
    True
    """
    check_option("alternative", alternative, ("greater", "less", "two-sided"))
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise DataError(f"an exact test needs one row and one column per stimulus, not {table.shape}.")
    check_finite(table, what="the table to permute", row_names=range(len(table)), unit="prediction")
    blocks = _find_blocks(len(table), groups)
    n_assignments = count_assignments(len(table), groups=groups)
    if n_assignments > LARGEST_NULL:
        raise ConfigError(
            f"{len(table)} stimuli have {n_assignments} assignments, too many to look at each; draw some of them with "
            "permutation_test."
        )
    null = np.zeros(1)
    for block in blocks:  # blocks are assigned independently, so sums combine all with all
        orders = np.array(list(permutations(block)))  # (n_orders, n_block)
        sums = table[np.array(block)[None], orders].astype(float).sum(axis=1)
        null = (null[:, None] + sums[None]).ravel()
    null /= len(table)
    observed = float(np.trace(table) / len(table))
    centre = float(null.mean())
    low, high = (float(q) for q in np.quantile(null, [0.025, 0.975]))
    return PermutationResult(
        observed, centre, low, high, _share(observed, null, centre, alternative), alternative, null
    )


def exact_sign_flip(differences: np.ndarray, *, alternative: Alternative = "two-sided") -> float:
    """Return the p-value of the mean of paired differences against all combinations of signs.

    Parameters
    ----------
    differences : array of shape (n_units,)
        One independent difference per unit, for example per subject.
    alternative
        ``greater``, ``less`` or ``two-sided``.

    Raises
    ------
    ConfigError
        If there are more than 20 units.

    Examples
    --------
    >>> exact_sign_flip(np.array([1.0, 2.0, 3.0, 4.0]))
    0.125
    """
    check_option("alternative", alternative, ("greater", "less", "two-sided"))
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(f"a sign-flip test needs one finite difference per unit, not {values.shape}.")
    if len(values) > LARGEST_SIGNS:
        raise ConfigError(f"{len(values)} units have too many combinations of signs; use paired_difference.")
    null = np.zeros(1)
    for value in values:
        null = np.concatenate([null + value, null - value])
    return _share(float(values.sum()), null, 0.0, alternative)


def _share(observed: float, null: np.ndarray, centre: float, alternative: Alternative) -> float:
    slack = 1e-12 * max(1.0, abs(observed))
    if alternative == "greater":
        extreme = null >= observed - slack
    elif alternative == "less":
        extreme = null <= observed + slack
    else:
        extreme = np.abs(null - centre) >= abs(observed - centre) - slack
    return float(extreme.mean())


def _find_blocks(n: int, groups: Labels | None) -> list[list[int]]:
    if groups is None:
        return [list(range(n))]
    if len(groups) != n:
        raise DataError(f"{n} stimuli came with {len(groups)} group labels.")
    blocks: dict[str, list[int]] = {}
    for row, label in enumerate(groups):
        blocks.setdefault(str(label), []).append(row)
    return list(blocks.values())
