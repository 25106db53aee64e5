"""Checks the order of presentation: whether concepts go together with runs, with time, or with their place in a run.

In a block design all pictures of a category follow each other. Slow drifts then distinguish blocks, and if
training and test trials come from the same block, a decoder of drifts looks like a decoder of pictures: EEG-ImageNet is
built like that. Nothing here looks at responses.

References
----------
Li et al. (2021), The perils and pitfalls of block design for EEG classification experiments, IEEE TPAMI 43, 316-333.
doi:10.1109/TPAMI.2020.2973153
Bergsma (2013), A bias-correction for Cramér's V and Tschuprow's T, J. Korean Stat. Soc. 42, 323-328.
doi:10.1016/j.jkss.2012.10.002
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.pipeline.leaks.findings import AuditFinding, Level
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, list_first
from braindecode_vis.preprocessing.splits import find_shared, make_groups
from braindecode_vis.scoring.design_control import ORDER_COLUMNS
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import compute_p_value

N_PERMUTATIONS = 199
LARGEST_P = 0.01
LEAST_V = 0.3  # Cramér's V of a strong association
LEAST_EXCESS = 0.1  # of neighbours with the same concept, over what chance gives
N_PLACES = 5


@dataclass(frozen=True)
class Association:
    """A statistic, what it is by chance, and how rarely chance reaches it.

    Parameters
    ----------
    value
        Of the data.
    chance
        Mean over permutations.
    p
        Share of permutations, the data among them, that reach the value.
    """

    value: float
    chance: float
    p: float


def check_design(run: AuditedRun) -> list[AuditFinding]:
    """Warn where concept is confounded with run, with time, or with the place in a run.

    Only concepts that are on both sides of a fold count: where none does, no block can be known from training.
    """
    trials, names = run.trials, run.concepts.astype(str)
    shared: set[str] = set()
    for fold in run.folds:
        shared |= set(names[fold.train].tolist()) & set(names[fold.test].tolist())
    rows = np.flatnonzero(np.isin(names, sorted(shared)))
    if len(shared) < 2:
        return _find("ok", "no two concepts are in both training and test, so no block can be recognised.")
    runs = np.unique(make_groups(trials, "run").astype(str), return_inverse=True)[1]
    subjects = np.unique(trials["subject"].astype(str), return_inverse=True)[1]
    order, how = find_order(run)
    rows = rows[np.lexsort((order[rows], runs[rows]))]
    codes = np.unique(names[rows], return_inverse=True)[1]
    within = [set(runs[f.train].tolist()) & set(runs[f.test].tolist()) for f in run.folds]
    is_within = any(within)
    findings = [
        *_check_runs(names[rows], codes, runs[rows], subjects[rows], is_within, run.seed),
        *_check_order(codes, runs[rows], how, is_within, run.seed),
        *_check_places(codes, runs[rows], run.seed),
    ]
    findings += _check_subjects(run, rows)
    text = f"{len(shared)} concepts are spread over runs and time as chance spreads them."
    return findings or _find("ok", text)


def _find(level: Level, text: str) -> list[AuditFinding]:
    return [AuditFinding("design", level, text)]


def _check_subjects(run: AuditedRun, rows: np.ndarray) -> list[AuditFinding]:
    """Shuffles within subjects test no concept that only one subject has; see `identity`."""
    names, subjects = run.concepts.astype(str)[rows], run.trials["subject"].astype(str).to_numpy()[rows]
    pairs = set(zip(subjects.tolist(), names.tolist(), strict=True))
    if len(pairs) > len(set(subjects.tolist())) or len(set(names.tolist())) < 2:
        return []
    text = f"concept and subject go together: each of {len(pairs)} subjects shows one concept"
    if any(
        set(subjects.tolist()) & set(find_shared(make_groups(run.trials, "subject"), f)) for f in run.folds
    ):
        return _find("warning", f"{text}, and is in both training and test: see identity.")
    text += (
        "; no subject is in both training and test, but another difference between these subjects can predict the "
        "class"
    )
    return _find("ok", f"{text}.")


def find_order(run: AuditedRun) -> tuple[np.ndarray, str]:
    """Return the order of presentation of each trial and how it is known: by a column, or else by the rows."""
    for name in ORDER_COLUMNS:
        if name in run.responses.trials:
            values = run.responses.trials[name]
            if values.dtype.kind in "iuf" and not values.isna().any():
                return values.to_numpy(dtype=float), f"by {name}"
    rows = np.arange(run.responses.n_trials, dtype=float)
    return rows, "in the order of the rows, which may differ from the order of presentation"


def _check_runs(
    names: np.ndarray, codes: np.ndarray, runs: np.ndarray, subjects: np.ndarray, is_within: bool, seed: int
) -> list[AuditFinding]:
    if len(np.unique(runs)) < 2:
        return []
    found = permute(lambda c: compute_cramers_v(c, runs), codes, subjects, seed, "runs")
    if found.p > LARGEST_P or found.value < LEAST_V:
        return []
    single = [str(name) for name in np.unique(names) if len(np.unique(runs[names == name])) == 1]
    only = f"; {len(single)} concept(s) are in one run only, first {list_first(single)}" if single else ""
    text = f"concept and run go together: Cramér's V {found.value:.2f} ({format_p_value(found.p, in_words=True)}){only}"
    if is_within:
        return _find("warning", f"{text}; trials of one run are in both training and test (block design).")
    return _find("ok", f"{text}; but no run is in both training and test, so this does not help.")


def _check_order(
    codes: np.ndarray, runs: np.ndarray, how: str, is_within: bool, seed: int
) -> list[AuditFinding]:
    def share(permuted: np.ndarray) -> float:
        neighbours = runs[1:] == runs[:-1]
        return float((permuted[1:] == permuted[:-1])[neighbours].mean()) if neighbours.any() else 0.0

    found = permute(share, codes, runs, seed, "order")
    if found.p > LARGEST_P or found.value < found.chance + LEAST_EXCESS:
        return []
    text = (
        f"{found.value:.0%} of neighbouring trials show one concept, {found.chance:.0%} by chance "
        f"({format_p_value(found.p, in_words=True)}, {how}): concepts come in blocks"
    )
    if is_within:
        return _find("warning", f"{text}, whose trials are in both training and test (block design).")
    return _find("ok", f"{text}; but no run is in both training and test, so this does not help.")


def _check_places(codes: np.ndarray, runs: np.ndarray, seed: int) -> list[AuditFinding]:
    """The place of a concept in its run is the same in all runs."""
    places = np.empty(len(runs), dtype=int)
    for run in np.unique(runs):
        rows = np.flatnonzero(runs == run)
        places[rows] = np.arange(len(rows)) * N_PLACES // len(rows)
    if len(np.unique(runs)) < 2:
        return []  # with one run, this is its order
    # Number of the stretch of neighbouring trials of one concept that each trial lies in: stretches stay whole.
    blocks = np.cumsum(np.r_[True, (codes[1:] != codes[:-1]) | (runs[1:] != runs[:-1])]) - 1
    found = permute(lambda c: compute_cramers_v(c, places), codes, runs, seed, "places", blocks)
    if found.p > LARGEST_P or found.value < LEAST_V:
        return []
    text = (
        f"concept and place in the run go together: Cramér's V {found.value:.2f}, {found.chance:.2f} by chance "
        f"({format_p_value(found.p, in_words=True)}); drift within a run can predict the seen image, in "
        "other runs too."
    )
    return _find("warning", text)


def compute_cramers_v(first: np.ndarray, second: np.ndarray) -> float:
    """Return the bias-corrected Cramér's V of two integer codes, 0 to 1.

    Examples
    --------
    >>> round(compute_cramers_v(np.array([0, 0, 1, 1] * 9), np.array([1, 1, 0, 0] * 9)), 6)
    1.0
    """
    shape = (int(first.max()) + 1, int(second.max()) + 1)
    table = np.bincount(first * shape[1] + second, minlength=shape[0] * shape[1]).reshape(shape)
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    n, (r, k) = table.sum(), table.shape
    if min(r, k) < 2:
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / n
    phi = float((np.square(table - expected) / expected).sum() / n)
    phi = max(0.0, phi - (r - 1) * (k - 1) / (n - 1))
    smaller = min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1
    return float(min(1.0, np.sqrt(phi / smaller))) if smaller > 0 else 0.0


def permute(
    statistic: Callable[[np.ndarray], float],
    codes: np.ndarray,
    groups: np.ndarray,
    seed: int,
    name: str,
    blocks: np.ndarray | None = None,
) -> Association:
    """Compare a statistic of the concepts with its values when they are shuffled.

    Parameters
    ----------
    statistic
        Of concepts, shape (n_trials,).
    codes : int array of shape (n_trials,)
        Concept of each trial.
    groups : int array of shape (n_trials,), ascending
        Shuffled within each.
    seed, name
        Of the shuffles.
    blocks : int array of shape (n_trials,), ascending, optional
        Stretches of trials that stay together and change places with stretches of their group; single trials without.
    """
    generator = make_generator(seed, "audit", name)
    starts = np.arange(len(codes)) if blocks is None else np.unique(blocks, return_index=True)[1]
    lengths = np.diff(np.append(starts, len(codes)))
    truth, shuffled = statistic(codes), np.empty(N_PERMUTATIONS)
    for turn in range(N_PERMUTATIONS):
        order = np.lexsort((generator.random(len(starts)), groups[starts]))
        taken = lengths[order]
        shift = starts[order] - np.cumsum(taken) + taken
        shuffled[turn] = statistic(codes[np.repeat(shift, taken) + np.arange(len(codes))])
    return Association(truth, float(shuffled.mean()), float(compute_p_value(truth, shuffled)))
