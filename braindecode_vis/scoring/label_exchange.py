"""Tests of labels that belong to whole subjects or groups: patient or control, trained or not.

Trials of one subject carry one label, so that they are no independent evidence of it: whole subjects change labels, and
the decoder is fitted again on the changed labels, since a decoder that left a subject out leans toward the other class.
That lean puts chance below one half, which is why chance is the mean of the null and never assumed. The area under the
ROC curve compares subjects that one fit has not seen: one of each class is left out together. Knows no decoder: what
fits and decides is a function.

References
----------
Airola et al. (2011), doi:10.1016/j.csda.2010.11.018: leave-pair-out.
Chaibub Neto et al. (2019), doi:10.1038/s41746-019-0178-x: labels of subjects, not of trials.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from braindecode_vis.scoring.uncertainty import compute_p_value, logit_limits

#: Takes training rows, the label code of each, and test rows; returns decisions of shape (n_test, n_classes).
Refit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
#: Fits for the null of one metric; beyond, labels are drawn, between the two numbers of times below.
MOST_FITS = 20_000
FEWEST_DRAWS, MOST_DRAWS = 99, 999
#: Pairs that are left out together; of more, some in which every owner of the larger class is equally often.
MOST_PAIRS = 100


@dataclass(frozen=True)
class Exchange:
    """Label sets over owners (subjects or groups), the observed one first.

    Parameters
    ----------
    labels : int array of shape (n_sets, n_owners)
        Label of each owner.
    weights : int array of shape (n_sets,)
        How many label sets each one stands for: two where exchanging the names of two classes gives the same decoder.
    is_complete
        Whether these are all label sets, not draws.
    smallest_p
        That any score can have.
    """

    labels: np.ndarray
    weights: np.ndarray
    is_complete: bool
    smallest_p: float

    def test(self, scores: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Return p and chance of the first score, and the null, from the score of each label set (or the first ones).

        Chance is the mean of the null. Of a complete set of labels the observed one is part of it; of draws it is not.
        """
        weights = self.weights[: len(scores)]
        others = np.repeat(scores, weights)[1:]
        p = float(compute_p_value(scores[0], others))
        return p, float(np.average(scores, weights=weights) if self.is_complete else others.mean()), others

    def describe(self, unit: str, *, refits: bool) -> str:
        """Return in words what chance and p come from, and what p can be at the least.

        Parameters
        ----------
        unit
            What an owner is, in one word.
        refits
            Whether decoders were fitted again.
        """
        n = int(self.weights.sum())
        how = f"in all {n:,} ways" if self.is_complete else f"{n - 1:,} times by lot"
        fits = "decoders fitted again" if refits else "decisions kept, without refits"
        return f"labels of whole {unit}s exchanged {how}, {fits}: no p below {self.smallest_p:.2g}"

    def first(self, n: int) -> Exchange:
        """Return the first label sets as draws; all of them where there are no more than `n`."""
        if n >= len(self.labels):
            return self
        smallest = max(self.smallest_p, 1 / n)
        return Exchange(self.labels[:n], np.ones(n, int), False, smallest)


@dataclass(frozen=True)
class ExchangedLabels:
    """What was decided for each label set, for `braindecode_vis.scoring.category_scores`.

    Parameters
    ----------
    unit
        What an owner is, in one word: ``subject``, ``group``, ``session`` or ``run``.
    owners : int array of shape (n_trials,)
        Owner of each tested trial.
    exchange
        The label sets.
    decided : int array of shape (n_sets, n_trials)
        Class of each tested trial by the decoders of each label set; of shape (1, n_trials) without refits.
    areas, wins
        As from `compare_left_pairs`, of the label sets `paired`; None if no pairs were left out.
    margins : array of shape (1, n_owners), optional
        Of two classes without refits: decision of each owner, from which an area is computed.
    paired
        The label sets of `areas`.
    refits
        Whether decoders were fitted again.
    """

    unit: str
    owners: np.ndarray
    exchange: Exchange
    decided: np.ndarray
    areas: np.ndarray | None = None
    wins: np.ndarray | None = None
    margins: np.ndarray | None = None
    paired: Exchange | None = None
    refits: bool = False


@dataclass(frozen=True)
class ToldExchange:
    """What the rows of a run say of exchanged labels: `unit` and `smallest_p`, and all of it in `words`."""

    unit: str
    smallest_p: float
    words: str


def find_exchange(rows: Sequence[Mapping[str, Any]]) -> ToldExchange | None:
    """Return what score rows say of exchanged labels; None if labels of trials were permuted.

    Examples
    --------
    >>> exchange = make_exchange(np.array([0, 0, 1, 1]), [np.arange(4)], refits=True, fits_each=4, most=999,
    ...                          generator=np.random.default_rng(0))
    >>> found = find_exchange([{"protocol": "toy; " + exchange.describe("subject", refits=True)}])
    >>> found.unit, found.smallest_p
    ('subject', 0.33)
    """
    for row in rows:
        found = re.search(r"labels of whole (\w+)s exchanged .*no p below ([\d.e-]+)", str(row["protocol"]))
        if found is not None:
            return ToldExchange(found[1], float(found[2]), found[0])
    return None


def keep_decisions(
    unit: str, owners: np.ndarray, truth: np.ndarray, blocks: Sequence[np.ndarray], decisions: np.ndarray, *, most: int,
    generator: np.random.Generator,
) -> ExchangedLabels:  # fmt: skip
    """Return label sets over decisions as they are, without refits.

    Parameters
    ----------
    unit
        As in `ExchangedLabels`.
    owners : int array of shape (n_trials,)
        Owner of each trial, from 0; each has one trial at least.
    truth : int array of shape (n_owners,)
        Label of each owner.
    blocks, most, generator
        As for `make_exchange`.
    decisions : array of shape (n_trials, n_classes)

    Examples
    --------
    >>> found = keep_decisions("subject", np.array([0, 0, 1, 2, 3]), np.array([0, 0, 1, 1]), [np.arange(4)],
    ...                        np.eye(2)[[0, 1, 0, 1, 1]], most=99, generator=np.random.default_rng(0))
    >>> found.decided.tolist(), found.margins.tolist(), found.exchange.smallest_p
    ([[0, 1, 0, 1, 1]], [[0.0, -1.0, 1.0, 1.0]], 0.16666666666666666)
    """
    sets = make_exchange(truth, blocks, refits=False, fits_each=0, most=most, generator=generator)
    margins = None
    if decisions.shape[1] == 2:
        margins = (np.bincount(owners, decisions[:, 1] - decisions[:, 0]) / np.bincount(owners))[None]
    decided = decisions.argmax(axis=1)[None]
    return ExchangedLabels(unit, owners, sets, decided, margins=margins)


def exchange_subjects(
    subjects: np.ndarray, labels: np.ndarray, classes: Sequence[str], decisions: np.ndarray, *, most: int,
    generator: np.random.Generator,
) -> ExchangedLabels | None:  # fmt: skip
    """Return label sets of whole subjects over decisions that are given; None if some subject has two labels.

    Parameters
    ----------
    subjects, labels : arrays of shape (n_trials,)
    classes
        Columns of the decisions.
    decisions, most, generator
        As for `keep_decisions`.
    """
    first, owners = np.unique(subjects.astype(str), return_index=True, return_inverse=True)[1:]
    truth = np.array([list(classes).index(label) for label in labels[first]])
    if len(set(truth.tolist())) < 2 or (labels != labels[first][owners]).any():
        return None
    whole = [np.arange(len(truth))]
    return keep_decisions("subject", owners, truth, whole, decisions, most=most, generator=generator)


def make_exchange(
    truth: np.ndarray, blocks: Sequence[np.ndarray], *, refits: bool, fits_each: int, most: int,
    generator: np.random.Generator,
) -> Exchange:  # fmt: skip
    """Return all ways to hand out the labels within each block, or draws where these are too many.

    Parameters
    ----------
    truth : int array of shape (n_owners,)
        Label of each owner.
    blocks
        Owners that may change labels with each other; every owner is in one block.
    refits
        Whether a decoder is fitted for each label set, so that a set and its complement score alike.
    fits_each
        How many fits a label set takes.
    most
        Draws at the most.
    generator
        Of the draws.

    Examples
    --------
    >>> found = make_exchange(np.array([0, 0, 0, 1, 1, 1]), [np.arange(6)], refits=True, fits_each=6, most=999,
    ...                       generator=np.random.default_rng(0))
    >>> found.labels.shape, found.is_complete, found.smallest_p
    ((10, 6), True, 0.1)
    """
    n_ways = math.prod(count_arrangements(truth[block]) for block in blocks)
    # With refits, sets that differ by the names of equally frequent classes score alike.
    alike = _count_renamings(truth, blocks) if refits else 1
    mirrored = alike > 1 and len(np.unique(truth)) == 2
    step = 2 if mirrored else 1
    # Without refits a label set costs next to nothing.
    affordable = max(FEWEST_DRAWS, MOST_FITS // max(1, fits_each)) if refits else most + 1
    if n_ways // step <= min(most + 1, affordable):
        found = np.array(list(_iterate_arrangements(truth, blocks)))
        if mirrored:  # of each set and its complement, the one in which the first owner keeps its label
            found = found[found[:, 0] == truth[0]]
        own = np.flatnonzero((found == truth).all(axis=1))[0]
        order = np.r_[own, generator.permutation(np.delete(np.arange(len(found)), own))]
        return Exchange(found[order], np.full(len(found), step), True, alike / n_ways)
    most = min(most, affordable, MOST_DRAWS) if refits else most
    draws = np.tile(truth, (most + 1, 1))
    for block in blocks:
        draws[1:, block] = generator.permuted(draws[1:, block], axis=1)
    return Exchange(draws, np.ones(most + 1, int), False, max(1 / (most + 1), alike / n_ways))


def count_arrangements(truth: np.ndarray) -> int:
    """Return in how many ways labels can be handed out.

    Examples
    --------
    >>> count_arrangements(np.array([0, 0, 0, 1, 1, 1])), count_arrangements(np.array([0, 0, 0, 1, 1, 1, 1, 1]))
    (20, 56)
    """
    counts = np.unique(truth, return_counts=True)[1]
    return math.factorial(len(truth)) // math.prod(math.factorial(int(n)) for n in counts)


def _count_renamings(truth: np.ndarray, blocks: Sequence[np.ndarray]) -> int:
    """Return in how many ways classes can change names with others that are as frequent in every block."""
    known = np.unique(truth)
    counts = np.array([[(truth[block] == name).sum() for block in blocks] for name in known])
    return math.prod(math.factorial(int(n)) for n in np.unique(counts, axis=0, return_counts=True)[1])


def _iterate_arrangements(truth: np.ndarray, blocks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for parts in product(*[list(_arrange(truth[block])) for block in blocks]):
        labels = np.empty_like(truth)
        for block, part in zip(blocks, parts, strict=True):
            labels[block] = part
        yield labels


def _arrange(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield every distinct order of these labels."""
    names, counts = np.unique(labels, return_counts=True)
    if len(names) == 1:
        yield labels
        return
    for places in combinations(range(len(labels)), int(counts[0])):
        others = np.setdiff1d(np.arange(len(labels)), places)
        for rest in _arrange(np.repeat(names[1:], counts[1:])):
            arranged = np.empty_like(labels)
            arranged[list(places)], arranged[others] = names[0], rest
            yield arranged


def decide_left_out(
    exchange: Exchange,
    owners: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    refit: Refit,
    *,
    tell: Callable[[int], None] = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit every fold on every label set, and decide what it leaves out.

    Parameters
    ----------
    exchange
        The label sets.
    owners : int array of shape (n_rows,)
        Owner of each row.
    folds
        Training and test rows. Rows that no fold tests keep class 0 and a margin of 0.
    refit
        Fits and decides.
    tell
        Called with the number of fits after each.

    Returns
    -------
    decided : int array of shape (n_sets, n_rows)
        Class of each row.
    margins : array of shape (n_sets, n_owners)
        Of two classes, the mean over the rows of an owner of the decision for the second less that for the first.
    """
    decided = np.zeros((len(exchange.labels), len(owners)), np.int16)
    margins = np.zeros((len(exchange.labels), exchange.labels.shape[1]))
    n_tested = np.zeros(exchange.labels.shape[1])
    for _, test in folds:
        n_tested += np.bincount(owners[test], minlength=len(n_tested))
    for number, labels in enumerate(exchange.labels):
        for train, test in folds:
            found = refit(train, labels[owners[train]], test)
            decided[number, test] = found.argmax(axis=1)
            sums = np.bincount(owners[test], found[:, 1] - found[:, 0], minlength=len(n_tested))
            margins[number] += sums / np.maximum(n_tested, 1)
            tell(1)
    return decided, margins


def compare_left_pairs(
    exchange: Exchange,
    owners: np.ndarray,
    refit: Refit,
    *,
    tell: Callable[[int], None] = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Leave one owner of each of two classes out together, for every label set, and compare them.

    Parameters
    ----------
    exchange, owners, refit, tell
        As for `decide_left_out`; labels are 0 and 1.

    Returns
    -------
    areas : array of shape (n_sets,)
        Share of pairs in order, ties counted half: the area under the ROC curve.
    wins : array of shape (n_owners, n_owners)
        Of the observed labels: 1, .5 or 0 for an owner of the second class (row) beside one of the first (column); NaN
        where they were not compared.
    """
    rows_of = [np.flatnonzero(owners == owner) for owner in range(exchange.labels.shape[1])]
    everything = np.arange(len(owners))
    wins = np.full((len(rows_of), len(rows_of)), np.nan)
    areas = np.empty(len(exchange.labels))
    for number, labels in enumerate(exchange.labels):
        total, pairs = 0.0, list_pairs(labels)
        for high, low in pairs:
            test = np.r_[rows_of[high], rows_of[low]]
            train = np.delete(everything, test)
            found = refit(train, labels[owners[train]], test)
            margin = found[:, 1] - found[:, 0]
            n_high = len(rows_of[high])
            difference = margin[:n_high].mean() - margin[n_high:].mean()
            won = 0.5 + 0.5 * float(np.sign(difference))
            total += won
            if number == 0:
                wins[high, low] = won
            tell(1)
        areas[number] = total / len(pairs)
    return areas, wins


def spread_of_owners(
    right: np.ndarray, mass: np.ndarray, classes: Sequence[np.ndarray], n_trials: int, widening: float = 1.0
) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over classes of the share that is right, by Student's t over owners.

    It is made on the logit scale, so that it stays between 0 and 1.

    Parameters
    ----------
    right, mass : arrays of shape (n_owners,)
        How much of each owner is right, and how much it weighs.
    classes
        Which owners are in each class; one class of all owners for a plain share.
    n_trials
        That the share was counted in.
    widening
        Factor of the standard error: `FOLD_FACTOR` where owners were left out fold by fold, whose decoders have
        learnt from each other's owners.

    Returns
    -------
    interval
        None below three owners, with one owner of a class, or where all are alike.

    Examples
    --------
    >>> everyone = [np.full(4, True)]
    >>> low, high = spread_of_owners(np.array([0.1, 0.2, 0.25, 0.2]), np.full(4, 0.25), everyone, 4)
    >>> round(low, 6), round(high, 6)
    (0.257385, 0.94015)
    """
    share, variance, n_owners = [], 0.0, 0
    for inside in classes:
        n, total = int(inside.sum()), float(mass[inside].sum())
        if n < (2 if len(classes) > 1 else 3):
            return None
        mean = float(right[inside].sum()) / total
        # A ratio of sums over owners: its error is that of the sum of what each owner adds to it.
        residual = (right[inside] - mean * mass[inside]) / total
        variance += n / (n - 1) * float((residual**2).sum())
        share.append(mean)
        n_owners += n
    if n_owners < 3 or variance < 1e-24:
        return None
    from scipy.stats import t

    error = widening * math.sqrt(variance) / len(classes)
    half = float(t.ppf(0.975, n_owners - len(classes))) * error
    return logit_limits(float(np.mean(share)), half, n_trials)


def spread_of_pairs(wins: np.ndarray, widening: float = 1.0) -> tuple[float, float] | None:
    """Return the 95 % interval of the share of pairs in order, from the spread of owners on either side.

    The squared errors of the two sides are added. Both hold that of single pairs, so that it counts twice: with five
    owners on each side the interval is wide. It is taken off where the rest is widened.

    Parameters
    ----------
    wins
        As from `compare_left_pairs`.
    widening
        As for `spread_of_owners`: decoders that left a pair out have learnt from the owners of the other pairs.

    Returns
    -------
    interval
        On the logit scale, so that it stays between 0 and 1; where all pairs are in order, what as many owners as the
        smaller class has would still allow. None below three owners of a class.

    Examples
    --------
    >>> won = np.array([[1, 1, 0.5], [1, 0, 1], [1, 1, 1.0]])
    >>> low, high = spread_of_pairs(won)
    >>> round(low, 6), round(high, 6)
    (0.273861, 0.976971)

    References
    ----------
    DeLong, DeLong, Clarke-Pearson (1988), doi:10.2307/2531595.
    """
    made = np.isfinite(wins)
    sides = [
        np.nanmean(np.where(made.any(axis=axis, keepdims=True), wins, 0), axis=axis)[made.any(axis=axis)]
        for axis in (1, 0)
    ]
    sizes = [len(side) for side in sides]
    if min(sizes) < 3:
        return None
    area = float(np.nanmean(wins))
    from scipy.stats import t

    parts = [float(np.var(side, ddof=1)) / len(side) for side in sides]
    variance = sum(parts)
    if variance < 1e-24:
        bound = 0.025 ** (widening**2 / min(sizes))
        return (bound, 1.0) if area == 1 else (0.0, 1 - bound) if area == 0 else None
    if widening > 1 and made.sum() == math.prod(sizes):
        table = wins[np.ix_(made.any(axis=1), made.any(axis=0))]
        rest = table - sides[0][:, None] - sides[1] + area
        single = float((rest**2).sum()) / math.prod(size * (size - 1) for size in sizes)
        variance = widening**2 * max(*parts, variance - single)
    else:
        variance *= widening**2
    return logit_limits(area, float(t.ppf(0.975, sum(sizes) - 2)) * math.sqrt(variance), int(made.sum()))


def list_pairs(labels: np.ndarray, most: int = MOST_PAIRS) -> list[tuple[int, int]]:
    """Return pairs of an owner of class 1 and one of class 0: all, or as many rounds as `most` allows.

    In a round every owner of the larger class is in one pair, so that each of them counts as often.

    Examples
    --------
    >>> list_pairs(np.array([1, 0, 1, 0]))
    [(0, 1), (2, 3), (0, 3), (2, 1)]
    """
    high, low = np.flatnonzero(labels == 1).tolist(), np.flatnonzero(labels == 0).tolist()
    larger, smaller = max(len(high), len(low)), min(len(high), len(low))
    n_rounds = min(smaller, max(1, most // larger))
    return [
        (high[i], low[(i + turn) % smaller])
        if len(high) >= len(low)
        else (high[(i + turn) % smaller], low[i])
        for turn in range(n_rounds)
        for i in range(larger)
    ]
