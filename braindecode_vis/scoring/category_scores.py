"""Scores of category decoding: which class was seen, if the image is unknown or not of interest.

Owns accuracy and balanced accuracy over held-out trials and the mean over held-out runs of the AUC (each run has a
decoder of its own, whose scores need not share a scale), with intervals and a null that permutes the true labels
within each run, so that no drift between runs can pass for a decoded category. Labels that belong to whole subjects
or groups are exchanged as wholes; see `label_exchange`. Everything comes as plain arrays; nothing is fitted here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.scoring.crossed import (
    NO_INTERVAL,
    CrossedInterval,
    groups_interval,
    name_units,
    resampled_interval,
    widen_interval,
)
from braindecode_vis.scoring.label_exchange import (
    Exchange,
    ExchangedLabels,
    spread_of_owners,
    spread_of_pairs,
)
from braindecode_vis.scoring.score_row import POOLED
from braindecode_vis.scoring.scoring_task import SHUFFLES
from braindecode_vis.scoring.uncertainty import (
    FOLD_FACTOR,
    WIDENED,
    compute_p_value,
    permute_within,
    widen_about,
    wilson_interval,
)
from braindecode_vis.scoring.units import Units

#: What the interval of the control ``shuffled`` is, where labels of whole owners were exchanged.
LABEL_SETS = "one exchange of labels; the interval holds 95 % of all that were made"


@dataclass(frozen=True)
class CategoryTask:
    """Held-out decisions and what is needed to judge them.

    Parameters
    ----------
    decisions : array of shape (n_trials, n_classes)
        A score per class from a decoder that has not seen the trial's run; higher is more likely.
    classes : sequence of length n_classes
        Names of the columns.
    labels, runs, subjects : arrays of shape (n_trials,)
        True class, run and subject of each trial.
    protocol, split, seed, n_bootstrap, n_permutations
        As in `braindecode_vis.base.arrays.Score` and the evaluation settings.
    units
        What intervals resample, if not single trials.
    top
        Further numbers of classes that may be named: ``top5`` is the share of trials whose class is among the five
        highest decisions, ties lost.
    design : array of shape (n_trials, n_classes), optional
        Decisions from the design alone, the control ``design``; see `design_control`.
    exchanged
        What was decided for exchanged labels, where each owner (subject, group, ...) has one label and is tested by
        decoders that have not seen it.
    over_folds
        Whether the decoders of several folds have learnt from each other's trials: limits, and the null of permuted
        labels without refits, are then wider by sqrt 2.
    """

    decisions: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray
    runs: np.ndarray
    subjects: np.ndarray
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    units: Units | None = None
    top: tuple[int, ...] = ()
    design: np.ndarray | None = None
    exchanged: ExchangedLabels | None = None
    over_folds: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.labels.tolist()) - set(self.classes))
        if unknown:
            raise DataError(f"the class {unknown[0]!r} was tested but never trained on; check the split.")


def compute_category_scores(
    task: CategoryTask, *, differences: list[dict[str, Any]] | None = None
) -> tuple[list[Score], pd.DataFrame]:
    """Return the score rows and one row per trial (`label`, `decoded`, `run`, `subject` and the decisions).

    Several subjects get a row ``all`` beside their own: the mean of their scores, whose interval is Student's t of
    these, since trials are their own. Where each subject has one label, classes are balanced, and an area is measured,
    over subjects: a subject alone has neither. `differences`, where it is there, is given the difference of the
    decoded system to the control of the design: in the same resamples, or subject by subject.
    """
    codes = np.array([task.classes.index(label) for label in task.labels])
    subjects = sorted(set(task.subjects.tolist()))
    rows_of = {str(subject): np.flatnonzero(task.subjects == subject) for subject in subjects}
    found = {name: _measure_subject(task, codes, rows) for name, rows in rows_of.items()}
    # Without permutations: chance is what it is for the decoded system. Its resamples are the same trials.
    blind = None if task.design is None else _replace_decisions(task, task.design)
    controls = {} if blind is None else {n: _measure_subject(blind, codes, r) for n, r in rows_of.items()}
    if len(subjects) > 1 and task.exchanged is not None:
        found[POOLED] = _measure_all_owned(task, codes, list(found.values()))
        if blind is not None:
            controls[POOLED] = _measure_all_owned(blind, codes, list(controls.values()))
    elif len(subjects) > 1:
        for measured in (found, controls):
            parts = [[one for many in measured.values() for one in many if one.metric == name]
                     for name in [one.metric for one in next(iter(measured.values()), [])]]  # fmt: skip
            if measured:
                measured[POOLED] = [_pool(task, same) for same in parts if len(same) == len(subjects)]
    scores: list[Score] = []
    for subject, measured_ones in found.items():
        others = {one.metric: one for one in controls.get(subject, [])}
        for one in measured_ones:
            scores += _make_scores(task, subject, one)
            if (other := others.get(one.metric)) is None:
                continue
            scores.append(_make_control(task, subject, one, other))
            if differences is not None:
                low, high = _bound_difference(task, one, other)
                differences.append(
                    {
                        "metric": one.metric, "control": "design", "subject": subject, "split": task.split,
                        "difference": one.value - other.value, "ci_low": low, "ci_high": high,
                    }
                )  # fmt: skip
    decoded = np.array(task.classes, dtype=object)[task.decisions.argmax(axis=1)]
    items = pd.DataFrame(
        {"label": task.labels, "decoded": decoded, "run": task.runs, "subject": task.subjects}
        | {f"decision_{name}": task.decisions[:, column] for column, name in enumerate(task.classes)}
    )
    return scores, items


@dataclass(frozen=True)
class _Measured:
    """One metric of one subject or of all: its value, its values in every resample, those under every permutation.

    Of all subjects `draws` are empty and `of_subjects` holds their values.
    """

    metric: str
    value: float
    n_trials: int
    draws: np.ndarray
    null: np.ndarray
    resampled: str
    bounds: tuple[float | None, float | None] = (None, None)
    of_subjects: np.ndarray | None = None
    chance: float | None = None  # where it is not the mean of the null
    about: str = ""  # what the null is, where it is none of single trials


def _bound_difference(
    task: CategoryTask, one: _Measured, other: _Measured
) -> tuple[float | None, float | None]:
    if one.of_subjects is not None and other.of_subjects is not None:
        pairs = one.of_subjects - other.of_subjects
        found = groups_interval(pairs, np.arange(len(pairs)), unit="subject")
        found = widen_interval(found, (-1.0, 1.0)) if task.over_folds else found
    else:
        draws = one.draws - other.draws
        found = resampled_interval(
            one.value - other.value,
            draws,
            len(draws),
            unit="trial",
            ends=(-1.0, 1.0),
            over_folds=task.over_folds,
        )
    return found.low, found.high


def _replace_decisions(task: CategoryTask, decisions: np.ndarray) -> CategoryTask:
    """Return the task of a control, whose chance is that of the decoded system."""
    exchanged = task.exchanged
    if exchanged is not None:
        exchanged = replace(
            exchanged, exchange=exchanged.exchange.first(1), decided=decisions.argmax(axis=1)[None], areas=None,
            wins=None, margins=None,
        )  # fmt: skip
    return replace(task, decisions=decisions, n_permutations=1, exchanged=exchanged)


def _make_scores(task: CategoryTask, subject: str, found: _Measured) -> Iterator[Score]:
    common: dict[str, Any] = {
        "metric": found.metric, "chance": float(found.null.mean()) if found.chance is None else found.chance,
        "n_queries": found.n_trials, "protocol": _describe_protocol(task, found), "subject": subject,
        "split": task.split, "seed": task.seed,
        "gallery_size": len(task.classes),
    }  # fmt: skip
    low, high = found.bounds
    # Decisions were not made again on permuted labels, unless the row says so.
    widen = task.over_folds and not found.about
    null = widen_about(found.null, found.null.mean()) if widen else found.null
    yield Score(
        method="decoded", value=found.value, ci_low=low, ci_high=high, resampled=found.resampled,
        p_value=float(compute_p_value(found.value, null)), **common,
    )  # fmt: skip
    null_low, null_high = (float(q) for q in np.quantile(found.null, [0.025, 0.975]))
    yield Score(
        method="shuffled", value=float(found.null[0]), ci_low=null_low, ci_high=null_high,
        resampled=LABEL_SETS if found.about else SHUFFLES, **common
    )  # fmt: skip


def _describe_protocol(task: CategoryTask, found: _Measured) -> str:
    permuted = "p-values: labels are permuted without refits, the null widened by sqrt 2 (conservative)"
    return "; ".join(filter(None, [task.protocol, found.about or permuted * task.over_folds]))


def _make_control(task: CategoryTask, subject: str, found: _Measured, other: _Measured) -> Score:
    low, high = other.bounds
    return Score(
        method="design", metric=other.metric, value=other.value, ci_low=low, ci_high=high, resampled=other.resampled,
        chance=float(found.null.mean()) if found.chance is None else found.chance, n_queries=other.n_trials,
        protocol=_describe_protocol(task, found), subject=subject, split=task.split, seed=task.seed,
        gallery_size=len(task.classes),
    )  # fmt: skip


def _pool(task: CategoryTask, parts: list[_Measured]) -> _Measured:
    """Return the mean over subjects, with Student's t over subjects."""
    generator = make_generator(task.seed, "category_subjects")
    values = np.array([part.value for part in parts])
    n_trials = sum(part.n_trials for part in parts)
    found = groups_interval(values, np.arange(len(parts)), unit="subject")
    found = widen_interval(found, (0.0, 1.0)) if task.over_folds else found
    bounds = (None, None) if found.low is None else tuple(np.clip([found.low, found.high], 0, 1).tolist())
    # The permutations of subjects are drawn alike; in another order for each, they are independent.
    null = np.mean([generator.permutation(part.null) for part in parts], axis=0)
    return _Measured(
        parts[0].metric, found.value, n_trials, np.empty(0), null, found.resampled,
        bounds, values,
    )  # fmt: skip


def _measure_all_owned(
    task: CategoryTask, codes: np.ndarray, parts: list[list[_Measured]]
) -> list[_Measured]:
    """Return the row ``all``: over subjects that have one label each, or the mean of subjects of several owners."""
    assert task.exchanged is not None
    first, subjects, counts = np.unique(
        task.subjects.astype(str), return_index=True, return_inverse=True, return_counts=True
    )[1:]
    if (codes == codes[first][subjects]).all():  # one label each
        # Subjects weigh alike, whatever their numbers of trials.
        return _measure_owned(task, codes, np.arange(len(codes)), 1 / (len(counts) * counts[subjects]))
    pooled = []
    for same in zip(*parts, strict=False):  # a subject of more than two classes has no area, and stands last
        if len({part.metric for part in same}) > 1:
            break
        found = _pool(task, list(same))
        # Of one label set all subjects, so that the mean of subjects is a score of that set.
        null = np.mean([part.null for part in same], axis=0)
        chances = [part.chance for part in same if part.chance is not None]  # none of a control
        chance = float(np.mean(chances)) if chances else None
        pooled.append(replace(found, null=null, chance=chance, about=same[0].about))
    return pooled


def _measure_owned(
    task: CategoryTask, codes: np.ndarray, rows: np.ndarray, weights: np.ndarray | None = None
) -> list[_Measured]:
    """Measure trials whose labels belong to whole owners, with the null of exchanged labels.

    Parameters
    ----------
    task, codes
        The task, and the label of each of its trials.
    rows
        Trials that are measured.
    weights : array of shape (n_rows,), optional
        Of each trial, together 1; the same by default.
    """
    exchanged = task.exchanged
    assert exchanged is not None
    exchange, truth = exchanged.exchange, codes[rows]
    known, owners = np.unique(exchanged.owners[rows], return_inverse=True)
    weights = np.full(len(rows), 1 / len(rows)) if weights is None else weights
    labels = exchange.labels[:, known]  # (n_sets, n_owners)
    hits = exchanged.decided[:, rows] == labels[:, owners]  # (n_sets, n_rows)
    # Of each owner: how much it weighs, and how much of that is right.
    mass = np.bincount(owners, weights, minlength=len(known))
    right = np.stack([np.bincount(owners, weights * hit, minlength=len(known)) for hit in hits])
    counted = exchange.describe(exchanged.unit, refits=exchanged.refits)
    own = np.array([truth[owners == owner][0] for owner in range(len(known))])
    words = f"{name_units(exchanged.unit, len(known))} (t)" + WIDENED * task.over_folds
    # Resamples of owners, or of the trials of a single one: how much each weighs and how much of it is right.
    alone = len(known) == 1
    parts = (weights, weights * hits[0]) if alone else (mass, right[0])
    n_parts = len(parts[0])
    generator = make_generator(task.seed, "category_units")
    drawn = generator.multinomial(n_parts, np.full(n_parts, 1 / n_parts), size=task.n_bootstrap)
    found = []
    for name in ("accuracy", "balanced_accuracy"):
        classes = [np.full(labels.shape, True)]
        if name == "balanced_accuracy" and not alone:
            classes = [labels == code for code in np.unique(labels)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a set or a resample without a class
            scores = np.nanmean(
                [(right * each).sum(axis=1) / _keep_positive((mass * each).sum(axis=1)) for each in classes],
                axis=0,
            )  # (n_sets,)
            chosen = [np.ones(n_parts)] if alone else [each[0] for each in classes]
            draws = np.nanmean(
                [(drawn @ (parts[1] * each)) / _keep_positive(drawn @ (parts[0] * each)) for each in chosen],
                axis=0,
            )
        chance, null = _describe_null(exchange, scores)
        present = (
            [np.full(len(known), True)] if len(classes) == 1 else [own == code for code in np.unique(own)]
        )
        bounds: Any = spread_of_owners(
            right[0], mass, present, len(rows), FOLD_FACTOR if task.over_folds else 1.0
        )
        told = words
        if bounds is None:
            sizes = [int(inside.sum()) for inside in present]
            bounds, told = (None, None), _tell_no_spread(sizes, exchanged.unit, 3 if len(sizes) == 1 else 2)
        if len(known) == 1:  # the trials of one subject
            own_trials = _bound_hits(task, int(hits[0].sum()), len(rows))
            bounds, told = (own_trials.low, own_trials.high), own_trials.resampled
        found.append(
            _Measured(
                name, float(scores[0]), len(rows), draws, null, told, bounds, chance=chance, about=counted
            )
        )
    if len(task.classes) == 2 and len(known) == exchange.labels.shape[1]:
        found += _measure_area(task, len(rows))
    return found


def _bound_hits(task: CategoryTask, n_hits: int, n: int) -> CrossedInterval:
    """Return Wilson's interval of single trials."""
    wilson = wilson_interval(n_hits, n)
    found = CrossedInterval(n_hits / n, wilson.low, wilson.high, None, "trials (Wilson)")
    return widen_interval(found, (0.0, 1.0)) if task.over_folds else found


def _measure_area(task: CategoryTask, n_trials: int) -> list[_Measured]:
    """Return the area under the ROC curve over owners: of pairs left out, or without refits of the decisions as are."""
    exchanged = task.exchanged
    assert exchanged is not None
    exchange = exchanged.exchange
    if len(np.unique(exchange.labels[0])) < 2:  # one class was tested
        return []
    if exchanged.areas is not None and exchanged.wins is not None:
        areas, wins = exchanged.areas, exchanged.wins
        n_pairs = int(np.isfinite(wins).sum())
        all_pairs = int(np.prod(np.unique(exchange.labels[0], return_counts=True)[1]))
        several = f"{n_pairs} pairs" if n_pairs == all_pairs else f"{n_pairs} of {all_pairs} pairs"
        how = f"one {exchanged.unit} of each class left out together, {several}"
        exchange = exchanged.paired or exchange
    elif exchanged.margins is not None:
        margin = exchanged.margins[0]
        areas = compute_auc(np.broadcast_to(margin, exchange.labels.shape), exchange.labels)
        above = margin[:, None] - margin[None]
        pair = (exchange.labels[0] == 1)[:, None] & (exchange.labels[0] == 0)[None]
        wins = np.where(pair, (above > 0) + 0.5 * (above == 0), np.nan)
        how = f"decisions of {exchanged.unit}s left out by different decoders compared"
    else:
        return []
    chance, null = _describe_null(exchange, areas)
    bounds: Any = spread_of_pairs(wins, FOLD_FACTOR if task.over_folds else 1.0)
    told = f"{name_units(exchanged.unit, exchange.labels.shape[1])} (t)" + WIDENED * task.over_folds
    if bounds is None:
        sizes = np.unique(exchange.labels[0], return_counts=True)[1].tolist()
        bounds, told = (None, None), _tell_no_spread(sizes, exchanged.unit, 3)
    about = f"{how}; {exchange.describe(exchanged.unit, refits=exchanged.refits)}"
    return [
        _Measured(
            "auc", float(areas[0]), n_trials, np.array([]), null, told, bounds, chance=chance, about=about
        )
    ]


def _tell_no_spread(sizes: list[int], unit: str, fewest: int) -> str:
    """Return why there is no spread of owners, of which there are so many in each class: too few, or all alike."""
    n, of = min(sizes), " of a class" if len(sizes) > 1 else ""
    if n < fewest:
        owners = f"{n} {unit}" if n == 1 else f"{n} {unit}s"
        return f"{NO_INTERVAL}: {owners}{of}, and an interval over {unit}s needs at least {fewest}"
    return f"{NO_INTERVAL}: all {unit}s{of} are alike"


def _describe_null(exchange: Exchange, scores: np.ndarray) -> tuple[float | None, np.ndarray]:
    """Return chance and the null; of the observed labels alone, as a control has them, neither."""
    if len(scores) < 2:
        return None, scores
    _, chance, null = exchange.test(scores)
    return chance, null


def _keep_positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _measure_subject(task: CategoryTask, codes: np.ndarray, rows: np.ndarray) -> list[_Measured]:
    if task.exchanged is not None:
        return _measure_owned(task, codes, rows)
    n_classes = len(task.classes)
    decisions, truth, runs = task.decisions[rows], codes[rows], task.runs[rows]
    units = None if task.units is None or task.units.unit in ("trial", "subject") else task.units.select(rows)
    permuted = _permute_labels(task, truth, runs, units)  # (n_permutations, n_trials)
    blocks = [np.flatnonzero(runs == run) for run in pd.unique(runs)]
    decoded = decisions.argmax(axis=1)
    metrics: list[tuple[str, np.ndarray, Callable[..., np.ndarray]]] = [
        ("accuracy", decoded, compute_accuracy),
        ("balanced_accuracy", decoded, compute_balanced_accuracy),
    ]
    usable = [block for block in blocks if len(set(truth[block].tolist())) == 2]
    if n_classes == 2 and usable:

        def auc_over_runs(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
            found = [compute_auc(predicted[:, block], labels[:, block]) for block in usable]
            # Labels of whole units may leave a run with one class; such a run says nothing under that permutation.
            return np.mean(found, axis=0) if units is None else np.nanmean(found, axis=0)

        metrics.append(("auc", decisions[:, 1] - decisions[:, 0], auc_over_runs))
    hits = {"": (decoded == truth).astype(float)}
    for k in task.top:
        table = _tabulate_top_hits(decisions, k)  # (n_trials, n_classes)
        hits[f"top{k}"] = table[np.arange(len(rows)), truth].astype(float)
        # Which class was seen is looked up under every permutation, trial by trial.
        metrics.append((f"top{k}", np.arange(len(rows)), partial(_look_up, table)))
    resampled: dict[str, tuple[np.ndarray, int, str]]
    if units is None:
        # Trials of one run share a decoder, so an AUC of a run is resampled within it; accuracy has one scale for all.
        everywhere, within_runs = (
            _resample(truth, [np.arange(len(rows))], task),
            _resample(truth, blocks, task),
        )
        resampled = {
            name: (
                metric(predicted[within_runs], truth[within_runs]) if name == "auc"
                else metric(predicted[everywhere], truth[everywhere]),
                len(rows), "trial",
            )
            for name, predicted, metric in metrics
        }  # fmt: skip
    else:
        resampled = _resample_units(task, units, truth, hits, decisions[:, -1] - decisions[:, 0], usable)
    fixed = np.arange(len(rows))[None]  # (1, n_trials): the sample itself as one more resample
    found = []
    for name, predicted, metric in metrics:
        value = float(metric(predicted[fixed], truth[fixed])[0])
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over no run
            null = metric(np.broadcast_to(predicted, permuted.shape), permuted)
        draws, n_units, unit = resampled[name]
        # A bootstrap of few hits is too narrow, and has no width at all where every trial is a hit.
        if name == "accuracy" and units is None and (len(rows) < 40 or value in (0, 1)):
            bound = _bound_hits(task, round(value * len(rows)), len(rows))
        else:
            bound = resampled_interval(value, draws, n_units, unit=unit, over_folds=task.over_folds)
            if len(draws) and np.ptp(draws) == 0:  # every pair is in order, or no trial is a hit
                bound = CrossedInterval(value, None, None, None, f"{NO_INTERVAL}: all values are equal")
        words = bound.resampled
        if name == "auc" and units is None and len(blocks) > 1:
            words = words.replace("trials", "trials within runs", 1)
        bounds = (bound.low, bound.high)
        found.append(_Measured(name, value, len(rows), draws, null[np.isfinite(null)], words, bounds))
    return found


def _tabulate_top_hits(decisions: np.ndarray, k: int) -> np.ndarray:
    """Return whether each class is among the k highest decisions of each trial, ties lost; (n_trials, n_classes)."""
    n_classes = decisions.shape[1]
    if k >= n_classes:
        raise DataError(f"top-{k} of {n_classes} classes names all of them.")
    # Only what is above the next one is surely among the k: whatever equals it could stand in its place.
    next_best = np.partition(decisions, n_classes - k - 1, axis=1)[:, n_classes - k - 1]
    table: np.ndarray = decisions > next_best[:, None]
    return table


def _look_up(table: np.ndarray, trials: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of trials whose label is marked in their row of the table, shape (n_sets,)."""
    shares: np.ndarray = table[trials, labels].mean(axis=1)
    return shares


def _permute_labels(
    task: CategoryTask, truth: np.ndarray, runs: np.ndarray, units: Units | None
) -> np.ndarray:
    """Return permuted labels, shape (n_permutations, n_trials): within each run, and as units allow.

    Where every unit shows one class (blocks), labels of whole units change places: single trials of a block are no
    independent evidence, and a null that exchanged them would be far too narrow. Otherwise labels stay within a unit.
    """
    generator = make_generator(task.seed, "category_permutation")
    names = runs.astype(str)
    if units is None:
        by_name = [np.flatnonzero(names == run) for run in np.unique(names)]
        return permute_within(truth, by_name, task.n_permutations, generator)
    labels = units.labels.astype(str)
    known, first, code = np.unique(labels, return_index=True, return_inverse=True)
    if (truth == truth[first][code]).all():
        unit_truth, unit_run = truth[first], names[first]
        nested = (names == unit_run[code]).all()
        blocks = [np.flatnonzero(unit_run == run) for run in np.unique(unit_run)]
        if not nested or all(len(set(unit_truth[block].tolist())) < 2 for block in blocks):
            blocks = [np.arange(len(known))]  # a run has one class, or units reach over runs
        return permute_within(unit_truth, blocks, task.n_permutations, generator)[:, code]
    pairs = np.unique(np.stack([names, labels]), axis=1, return_inverse=True)[1].ravel()
    within = [np.flatnonzero(pairs == pair) for pair in np.unique(pairs)]
    return permute_within(truth, within, task.n_permutations, generator)


def _resample_units(
    task: CategoryTask,
    units: Units,
    truth: np.ndarray,
    hits: Mapping[str, np.ndarray],
    decision: np.ndarray,
    usable: list[np.ndarray],
) -> dict[str, tuple[np.ndarray, int, str]]:
    """Return each metric in resamples of whole units, shape (n_bootstrap,), and how many of what were resampled.

    A resample is how often each unit was drawn, so that every metric is a ratio of sums over units. `hits` are those of
    the decided class, under an empty name, and of metrics that count others.
    """
    known, code = np.unique(units.labels.astype(str), return_inverse=True)
    n_units = len(known)
    generator = make_generator(task.seed, "category_units")
    drawn = generator.multinomial(n_units, np.full(n_units, 1 / n_units), size=task.n_bootstrap).astype(float)
    words = n_units, units.unit

    def average(rows: np.ndarray, name: str = "") -> np.ndarray:
        counts = drawn @ np.bincount(code[rows], minlength=n_units)
        sums = drawn @ np.bincount(code[rows], hits[name][rows], minlength=n_units)
        return np.divide(sums, counts, out=np.full(len(drawn), np.nan), where=counts > 0)

    recalls = [average(np.flatnonzero(truth == label)) for label in np.unique(truth)]
    found = {
        "accuracy": (average(np.arange(len(truth))), *words),
        "balanced_accuracy": (np.nanmean(recalls, axis=0), *words),  # classes that were drawn
        **{name: (average(np.arange(len(truth)), name), *words) for name in hits if name},
    }
    if not usable:
        return found
    if len(usable) > 1 and len({unit for block in usable for unit in set(code[block].tolist())}) == sum(
        len(set(code[block].tolist())) for block in usable
    ):
        # Units within runs: a run may have one unit of each class, which alone has no spread, so runs are drawn.
        of_runs = np.concatenate([compute_auc(decision[block][None], truth[block][None]) for block in usable])
        turns = generator.integers(0, len(usable), (task.n_bootstrap, len(usable)))
        # Where several decoders test trials of one run, the parts are folds.
        part = "fold" if str(task.runs[0]).startswith("fold ") else "run"
        found["auc"] = (of_runs[turns].mean(axis=1), len(usable), part)
        return found
    areas = []
    for block in usable:
        high, low = block[truth[block] == 1], block[truth[block] == 0]
        wins = np.zeros((n_units, n_units))  # pairs that are in order, by the units of their two trials
        member = np.eye(n_units)[code[low]]  # (n_low, n_units)
        for start in range(0, len(high), 512):
            part = high[start : start + 512]
            above = decision[part][:, None] - decision[low][None]  # (n_part, n_low)
            np.add.at(wins, code[part], ((above > 0) + 0.5 * (above == 0)) @ member)
        n_high, n_low = (np.bincount(code[rows], minlength=n_units) for rows in (high, low))
        n_pairs = (drawn @ n_high) * (drawn @ n_low)
        sums = ((drawn @ wins) * drawn).sum(axis=1)
        areas.append(np.divide(sums, n_pairs, out=np.full(len(drawn), np.nan), where=n_pairs > 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        means = np.nanmean(areas, axis=0)
    found["auc"] = (means[np.isfinite(means)], *words)
    return found


def _resample(truth: np.ndarray, blocks: list[np.ndarray], task: CategoryTask) -> np.ndarray:
    """Return row numbers resampled within each block and class, shape (n_bootstrap, n_trials).

    Every block keeps its number of trials of every class, in the order of the rows.
    """
    generator = make_generator(task.seed, "category_bootstrap")
    drawn = np.empty((task.n_bootstrap, len(truth)), dtype=np.int64)
    for block in blocks:
        for code in np.unique(truth[block]):
            own = block[truth[block] == code]
            drawn[:, own] = own[generator.integers(0, len(own), (task.n_bootstrap, len(own)))]
    return drawn


def compute_accuracy(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the share of hits of each row, shape (n_sets,)."""
    return (predicted == truth).mean(axis=1)


def compute_balanced_accuracy(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean over classes of the share of hits, shape (n_sets,)."""
    hits = predicted == truth
    n_sets, n_classes = len(truth), int(truth.max()) + 1
    if n_classes > 50:  # one pass over the trials, where one for every class would take minutes
        sets = np.arange(n_sets)[:, None]
        counts = np.bincount((truth + n_classes * sets).ravel(), minlength=n_sets * n_classes)
        counts = counts.reshape(n_sets, n_classes)
        return (hits / counts[sets, truth]).sum(axis=1) / (counts > 0).sum(axis=1)
    recalls = [
        (hits & (truth == code)).sum(axis=1) / (truth == code).sum(axis=1) for code in np.unique(truth)
    ]
    return np.mean(recalls, axis=0)


def compute_auc(decision: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each row, ties shared, shape (n_sets,)."""
    from scipy.stats import rankdata

    n_positive = (truth == 1).sum(axis=1)
    n_negative = truth.shape[1] - n_positive
    areas = np.empty(len(truth))
    step = max(1, 4_000_000 // truth.shape[1])  # 32 MB of ranks at a time
    for start in range(0, len(truth), step):
        part = slice(start, start + step)
        ranks = rankdata(decision[part], axis=1)
        areas[part] = (ranks * (truth[part] == 1)).sum(axis=1)
    # The Mann-Whitney statistic: rank sum of the positives less its smallest value, over the number of pairs.
    return (areas - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
