"""One retrieval metric of many decodings of the same test trials, with intervals, chance and a common null.

Owns what every analysis by retrieval shares: fitting on changed trials fold by fold, the metric of each test trial, and
a null that permutes which image belongs to which prediction. All decodings of one analysis see the same permutations,
so that curves and matrices can be tested as a whole. What all fits will take is told before they begin, and what was
measured of each is kept until the analysis is complete. Fits nothing itself: encoders come from the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.locks import BeingMade
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.study import Change, Study, fit_picked, rank_trials
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.retrieval import Retrieval, compute_similarity
from braindecode_vis.scoring.score_row import name_units
from braindecode_vis.scoring.uncertainty import (
    FOLD_FACTOR,
    PairedDifference,
    bootstrap_interval,
    compute_p_value,
    paired_difference,
    permute_within,
)

RetrievalMetric = Annotated[str, Field(pattern=r"^(two_way|top[1-9]\d*|([2-9]|[1-9]\d+)_way)$")]
LARGEST_GALLERY = 2000  # images whose labels are permuted; the tables of more would not fit
_WORTH_TELLING_S = 60.0  # of all fits of an analysis; for less, a bar is enough
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class FoldValues:
    """One metric of the test trials of one fold.

    Parameters
    ----------
    values : array of shape (n_rows,)
        Of each test trial.
    ids, subjects, clusters : arrays of shape (n_rows,)
        Image and subject of each, and what it is resampled with (see `Study.find_clusters`).
    chance
        Level without information.
    table_sum
        Sum of the values by the table that is permuted.
    null : array of shape (n_permutations,) or None
        The same sum under each permutation of the images.
    """

    values: np.ndarray
    ids: np.ndarray
    subjects: np.ndarray
    clusters: np.ndarray
    chance: float
    table_sum: float
    null: np.ndarray | None


@dataclass(frozen=True)
class Measured:
    """One metric of all test trials under one condition.

    Parameters
    ----------
    values, ids, subjects, clusters : arrays of shape (n_rows,)
        As in `FoldValues`, over all folds.
    chance
        Level without information.
    observed
        Mean that the null is compared with.
    null : array of shape (n_permutations,) or None
        Means under permuted images, after folds wider by sqrt 2; None where they were not asked for or the gallery is
        too large.
    """

    values: np.ndarray
    ids: np.ndarray
    subjects: np.ndarray
    clusters: np.ndarray
    chance: float
    observed: float
    null: np.ndarray | None

    @property
    def value(self) -> float:
        """Mean over trials; with several subjects, the mean of their means."""
        return float(pd.Series(self.values).groupby(self.subjects.astype(str)).mean().mean())

    @property
    def p_value(self) -> float | None:
        """One-sided, from the permuted images."""
        if self.null is None:
            return None
        return float(compute_p_value(self.observed, self.null))

    def as_row(self, study: Study) -> dict[str, Any]:
        """Return `value`, `ci_low`, `ci_high`, `chance`, `n`, `p_value`, and what the interval has `resampled`."""
        low, high = compute_interval(study, self.values, self.clusters, self.subjects)
        return {
            "value": self.value, "ci_low": low, "ci_high": high, "chance": self.chance, "n": len(self.values),
            "p_value": self.p_value, "resampled": name_resampled(study, self.clusters, self.subjects),
        }  # fmt: skip

    def compare(self, study: Study, other: np.ndarray) -> PairedDifference | None:
        """Return the paired difference to other values of the same rows; None for a single image or group."""
        several = len(set(self.subjects.tolist())) > 1
        if not several and len(set(self.clusters.tolist())) < 2:
            return None
        return paired_difference(
            self.values, other, clusters=self.clusters, subjects=self.subjects if several else None,
            n_boot=study.n_bootstrap, seed=study.seed,
        )  # fmt: skip

    def as_difference(self, study: Study, other: Measured) -> dict[str, float]:
        """Return `difference` to the same rows under another condition, with `_low`, `_high` and `p_difference`."""
        found = self.compare(study, other.values)
        low, high, p = (found.interval.low, found.interval.high, found.p_value) if found else [np.nan] * 3
        return {
            "difference": self.value - other.value, "difference_low": low, "difference_high": high, "p_difference": p,
        }  # fmt: skip


def name_resampled(study: Study, clusters: np.ndarray, subjects: np.ndarray) -> str:
    """Return what an interval of `compute_interval` resampled, in the words of the table of scores."""
    if len(set(subjects.tolist())) < 2:
        return name_units(study.unit, len(set(clusters.tolist())))
    n_subjects = len(set(subjects.tolist()))
    return name_units("subject", n_subjects) if study.unit == "subject" else f"subjects, then {study.unit}s"


def compute_interval(
    study: Study, values: np.ndarray, clusters: np.ndarray, subjects: np.ndarray
) -> tuple[float, float]:
    """Return the 95 % interval of the mean, over subjects first where there are several; NaN for a single cluster."""
    several = len(set(subjects.tolist())) > 1
    if not several and len(set(clusters.tolist())) < 2:
        return float("nan"), float("nan")
    interval = bootstrap_interval(
        values,
        clusters=clusters,
        subjects=subjects if several else None,
        n_boot=study.n_bootstrap,
        seed=study.seed,
    )
    return interval.low, interval.high


class Meter:
    """Measures one metric under permutations of the images that all decodings share.

    Parameters
    ----------
    study
        Trials, number of permutations and seed.
    metric
        ``two_way``, ``<k>_way`` or ``top<k>``.
    """

    def __init__(self, study: Study, metric: str) -> None:
        self.study, self.metric = study, metric
        self._shuffles: dict[tuple[str, ...], np.ndarray] = {}

    def measure_fold(self, number: int, test: Responses, encoder: Any, *, permute: bool = True) -> FoldValues:
        """Predict the test trials of a fold, rank them, and permute their images."""
        ranked = rank_trials(self.study, number, test, encoder)
        return self.measure_ranked(test, *ranked, permute=permute)

    def measure_ranked(
        self,
        test: Responses,
        queries: Embeddings,
        gallery: Embeddings,
        retrieval: Retrieval,
        *,
        permute: bool = True,
    ) -> FoldValues:
        """Measure what `braindecode_vis.parts.analyses.study.rank_trials` gave."""
        values = compute_hits(retrieval, self.metric)
        chance = compute_chance(self.metric, gallery_size=retrieval.gallery_size)
        total, null = float(values.sum()), None
        # The table is of rounded similarities, so its own sum, and not that of the values, meets the null.
        if permute and 1 < len(gallery) <= LARGEST_GALLERY:
            total, null = self._permute(queries, gallery)
        subjects = test.trials["subject"].to_numpy(dtype=object)
        clusters = self.study.find_clusters(test)
        return FoldValues(values, test.stimulus_ids, subjects, clusters, chance, total, null)

    def _permute(self, queries: Embeddings, gallery: Embeddings) -> tuple[float, np.ndarray]:
        names = _name_gallery(gallery.ids)
        ordered = gallery.select(sorted(gallery.ids, key=str))
        metric, n, *_ = find_metric(self.metric)
        assert metric.tabulate is not None
        table = metric.tabulate(compute_similarity(queries, ordered), n)  # (n_queries, n_gallery)
        own = pd.Index(names).get_indexer(pd.Index([str(i) for i in queries.ids]))
        # Rows of one image move together, so they are summed before any permutation.
        sums = np.zeros((len(names), len(names)))
        np.add.at(sums, own, table)
        rows = np.arange(len(names))
        # (n_permutations, n_images): the image that stands in the place of each; all decodings share them.
        return float(np.trace(sums)), sums[rows, self._shuffle(names)].sum(axis=1)

    def _shuffle(self, names: tuple[str, ...]) -> np.ndarray:
        """Return the permutations of a gallery, which galleries are given in the order in which they come."""
        if names not in self._shuffles:
            generator = make_generator(self.study.seed, "image labels", len(self._shuffles))
            order = np.arange(len(names), dtype=np.int32)  # half the memory: these are kept for all decodings
            self._shuffles[names] = permute_within(order, [order], self.study.n_permutations, generator)
        return self._shuffles[names]

    def restore(self, test: Responses, kept: Mapping[str, np.ndarray], row: int) -> FoldValues:
        """Return what `measure_fold` gave an earlier process for the same trials."""
        null = kept["null"][row] if "null" in kept else None
        if (
            null is not None
        ):  # the next gallery must meet the same permutations as in a process that was not stopped
            self._shuffle(_name_gallery(pd.unique(test.stimulus_ids)))
        return FoldValues(
            kept["values"][row], test.stimulus_ids, test.trials["subject"].to_numpy(dtype=object),
            self.study.find_clusters(test), float(kept["chance"][row]), float(kept["table_sum"][row]), null,
        )  # fmt: skip

    @staticmethod
    def join(folds: Sequence[FoldValues]) -> Measured:
        """Put the folds of one condition together.

        Folds train each other, so that a null of permutations within them is too narrow by `FOLD_FACTOR`.
        """
        sizes = [len(fold.values) for fold in folds]
        nulls = [fold.null for fold in folds if fold.null is not None]
        null = None
        # A null of some folds only would be narrower than the score that it judges.
        if len(nulls) == len(folds):
            null = np.sum(nulls, axis=0) / sum(sizes)
            null = null if len(folds) < 2 else null.mean() + FOLD_FACTOR * (null - null.mean())
        return Measured(
            values=np.concatenate([fold.values for fold in folds]),
            ids=np.concatenate([fold.ids for fold in folds]),
            subjects=np.concatenate([fold.subjects for fold in folds]),
            clusters=np.concatenate([fold.clusters for fold in folds]),
            chance=float(np.average([fold.chance for fold in folds], weights=sizes)),
            observed=sum(fold.table_sum for fold in folds) / sum(sizes),
            null=null,
        )


def _name_gallery(ids: Any) -> tuple[str, ...]:
    return tuple(sorted(str(i) for i in ids))


def compute_hits(retrieval: Retrieval, name: str) -> np.ndarray:
    """Return one value per query: ``top<k>`` hits (ties lost) or ``<k>_way`` accuracy (ties shared)."""
    metric, n, *_ = find_metric(name)
    assert metric.compare is not None
    if n > retrieval.gallery_size:
        raise DataError(
            f"the metric {name} needs {n} test images, but a fold has {retrieval.gallery_size}; choose a smaller one."
        )
    return metric.compare(retrieval, n)


def measure_changes(
    study: Study,
    changes: Mapping[Key, Change | None],
    metric: str,
    *,
    permute: Callable[[Key], bool] = lambda key: True,
    what: str = "decoding",
) -> dict[Key, Measured]:
    """Fit and test once per change and fold; the trials of a fold are picked once for all changes.

    Parameters
    ----------
    study
        Trials and encoders.
    changes
        What is done to training and test trials; None leaves them.
    metric
        As for `Meter`.
    permute
        Whether a condition needs a null of its own.
    what
        As for `refit`.
    """
    meter = Meter(study, metric)
    parts: dict[Key, list[FoldValues]] = {key: [] for key in changes}
    with refit(study, meter, what, changes) as measure:
        for number, fold in enumerate(study.folds):
            # Picked once: averaging repetitions of large recordings takes longer than a ridge.
            train, test = study.pick(fold.train, "train"), study.pick(fold.test, "test")
            for key, change in changes.items():
                altered = test if change is None else change(test)
                parts[key] += measure(number, key, train, change, [altered], permute=permute(key))
    return {key: meter.join(folds) for key, folds in parts.items()}


@contextmanager
def refit(
    study: Study, meter: Meter, what: str, keys: Collection[Hashable]
) -> Iterator[Callable[..., list[FoldValues]]]:
    """Yield ``measure(number, key, train, change, tests, permute=True)``, which fits once and measures every test.

    What an earlier process measured before it was stopped is not fitted again. Where processes share the fits, one that
    another makes measures nothing, and the block ends with `locks.BeingMade`.

    Parameters
    ----------
    study
        Trials and encoders.
    meter
        The metric.
    what
        What the fits are for, in words.
    keys
        One per fit of a fold, of plain values.
    """
    call = study.kept.number_group()  # an analysis may ask the same of other trials or of another metric
    names = {(n, key): f"{call}, fold {n}, {key!r}" for n in range(len(study.folds)) for key in keys}
    n_kept = sum(study.kept.holds(name) for name in names.values())
    n_left, n_elsewhere = len(names) - n_kept, 0
    with ExitStack() as stack:
        advance: Callable[[int], None] | None = None

        def begin(seconds: float) -> None:
            """Tell what the fits will take, and open the bar."""
            nonlocal advance
            if n_left * seconds >= _WORTH_TELLING_S:
                kept = f", of which {n_kept} are kept from an earlier call" if n_kept else ""
                study.tell(
                    f"{what}: {len(names)} fits{kept}; {'the others' if n_kept else 'they'} take about "
                    f"{_describe_time(n_left * seconds)}, at {_describe_time(seconds)} each; what is finished is kept "
                    "if they are stopped"
                )
            advance = stack.enter_context(study.progress(what, n_left))

        if study.fit_seconds is not None:
            begin(study.fit_seconds)

        def measure(
            number: int,
            key: Hashable,
            train: Responses,
            change: Change | None,
            tests: Sequence[Responses],
            *,
            permute: bool = True,
        ) -> list[FoldValues]:
            nonlocal n_elsewhere
            started, is_kept = time.perf_counter(), study.kept.holds(names[number, key])
            found = measure_once(
                study, meter, names[number, key], number, tests,
                lambda: fit_picked(study, number, train if change is None else change(train), change),
                permute=permute,
            )  # fmt: skip
            if found is None:
                n_elsewhere += 1
                return []
            if is_kept:
                return found
            if advance is None:
                begin(time.perf_counter() - started)
            assert advance is not None
            advance(1)
            return found

        yield measure
        if n_elsewhere:
            raise BeingMade(f"{n_elsewhere} of {len(names)} fits of {what} are being made by other processes")


def measure_once(
    study: Study,
    meter: Meter,
    name: str,
    number: int,
    tests: Sequence[Responses],
    fit: Callable[[], Any],
    *,
    permute: bool = True,
) -> list[FoldValues] | None:
    """Fit and measure every test, unless an earlier process has; None where another process is at it.

    Parameters
    ----------
    study, meter
        As for `refit`.
    name
        Of the fit, among those of the analysis.
    number
        Of the fold.
    tests
        Test trials.
    fit
        Returns the fitted encoder.
    permute
        Whether a null is made.
    """
    with study.kept.claim(name) as mine:
        kept = study.kept.read(name)
        if kept is not None:
            return [meter.restore(test, kept, row) for row, test in enumerate(tests)]
        if not mine:
            return None
        encoder = fit()
        found = [meter.measure_fold(number, test, encoder, permute=permute) for test in tests]
        columns = ("values", "chance", "table_sum", *(["null"] if found[0].null is not None else []))
        study.kept.write(name, **{key: np.stack([getattr(each, key) for each in found]) for key in columns})
    return found


def average_draws(measured: Sequence[Measured]) -> Measured:
    """Return the mean over draws, row by row and permutation by permutation."""
    nulls = [m.null for m in measured if m.null is not None]
    first = measured[0]
    return Measured(
        np.mean([m.values for m in measured], axis=0), first.ids, first.subjects, first.clusters, first.chance,
        float(np.mean([m.observed for m in measured])),
        np.mean(nulls, axis=0) if len(nulls) == len(measured) else None,
    )  # fmt: skip


def _describe_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def check_retrieval(study: Study, kind: str) -> None:
    """Raise `DataError` unless the study knows which image was seen."""
    if not study.banks:
        raise DataError(
            f"the analysis {kind} needs to know which image was seen, but this run decodes categories; use "
            "time_resolved_categories or confusion, or an encoder that predicts embeddings."
        )


def find_best(table: pd.DataFrame) -> pd.Series:
    """Return the row with the largest `value`; rows without one do not count."""
    return table.iloc[int(np.nanargmax(table["value"].to_numpy(float)))]


def describe_result(row: Any, metric: str) -> str:
    """Return a value with interval, chance and p-value as text."""
    p = row.get("p_value")
    tail = "" if p is None or pd.isna(p) else f", p = {p:.2g}"
    return (
        f"{metric} {row['value']:.3f} (95 % interval {row['ci_low']:.3f} to {row['ci_high']:.3f}, chance "
        f"{row['chance']:.3f}, n = {row['n']:.0f}{tail})"
    )
