"""One retrieval metric of many decodings of the same test trials, with intervals, chance and a common null.

Owns what every analysis by retrieval shares: fitting on changed trials fold by fold, the metric of each test trial, and
a null that permutes which image belongs to which prediction. All decodings of one analysis see the same permutations,
so that curves and matrices can be tested as a whole. The time of all fits is reported before they begin, and what was
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
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.base.locks import BeingMade
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.study import Change, Study, fit_picked, rank_trials
from braindecode_vis.scoring.crossed import (
    NO_INTERVAL,
    CrossedInterval,
    PairedDifference,
    interval_of_rows,
    interval_without_each,
    paired_difference,
)
from braindecode_vis.scoring.metrics.identification import join_left_out, sum_without_each
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.retrieval import Retrieval, compute_similarity
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import (
    compute_p_value,
    correct_holm,
    correct_maximum,
    permute_within,
    widen_about,
)
from braindecode_vis.scoring.units import Units

RetrievalMetric = Annotated[str, Field(pattern=r"^(two_way|top[1-9]\d*|([2-9]|[1-9]\d+)_way)$")]
LARGEST_GALLERY = 2000  # images whose labels are permuted; the tables of more would not fit
_WORTH_TELLING_S = 60.0  # of all fits of an analysis; for less, a bar is enough
Key = TypeVar("Key", bound=Hashable)


class RetrievalAnalysis(Analysis):
    """An analysis that asks how well images are found.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    """

    metric: RetrievalMetric = "top1"


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
    left_out : array of shape (2, n_images + 1) or None
        Identification without each image of the gallery, in the order of their names; see
        `identification.sum_without_each`.
    """

    values: np.ndarray
    ids: np.ndarray
    subjects: np.ndarray
    clusters: np.ndarray
    chance: float
    table_sum: float
    null: np.ndarray | None
    left_out: np.ndarray | None = None


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
        Means under permuted images, after folds wider by sqrt 2; None if they were not asked for or the gallery is
        too large.
    left_out : array of shape (n_images,) or None
        Identification without each image in turn, as query and as distractor; None for hits, several subjects, and
        where images are no units.
    """

    values: np.ndarray
    ids: np.ndarray
    subjects: np.ndarray
    clusters: np.ndarray
    chance: float
    observed: float
    null: np.ndarray | None
    left_out: np.ndarray | None = None

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
        if self.left_out is None:
            low, high, words = compute_interval(
                study, self.values, self.clusters, self.subjects, self.ids, shares=True
            )
        else:
            low, high, words = _bound(
                interval_without_each(self.value, self.left_out, over_folds=len(study.folds) > 1)
            )
        return {
            "value": self.value, "ci_low": low, "ci_high": high, "chance": self.chance, "n": len(self.values),
            "p_value": self.p_value, "resampled": words,
        }  # fmt: skip

    def compare(self, study: Study, other: np.ndarray) -> PairedDifference | None:
        """Return the paired difference to other values of the same rows; None for a single image or group."""
        several = len(set(self.subjects.tolist())) > 1
        if not several and len(set(self.clusters.tolist())) < 2:
            return None
        return paired_difference(
            self.values, other, **find_row_units(study, self.clusters, self.subjects, self.ids),
            n_boot=study.n_bootstrap, seed=study.seed, over_folds=len(study.folds) > 1,
        )  # fmt: skip

    def as_difference(self, study: Study, other: Measured) -> dict[str, Any]:
        """Return `difference` to the same rows under another condition, with `_low`, `_high`, `_resampled` and
        `p_difference`.
        """
        low, high, p, words = bound_difference(self.compare(study, other.values))
        return {
            "difference": self.value - other.value, "difference_low": low, "difference_high": high, "p_difference": p,
            "difference_resampled": words,
        }  # fmt: skip


def bound_difference(found: PairedDifference | None) -> tuple[float, float, float, str]:
    """Return limits and p of a paired difference, NaN where there are none, and of what they speak or why not."""
    if found is None:
        return np.nan, np.nan, np.nan, ""
    low, high, p = found.interval.low, found.interval.high, found.p_value
    numbers = [np.nan if number is None else float(number) for number in (low, high, p)]
    return numbers[0], numbers[1], numbers[2], found.interval.resampled


def compute_interval(
    study: Study,
    values: np.ndarray,
    clusters: np.ndarray,
    subjects: np.ndarray,
    ids: np.ndarray | None = None,
    *,
    shares: bool = False,
) -> tuple[float, float, str]:
    """Return the 95 % interval of the mean, crossed where there are several subjects, and what it resampled.

    Parameters
    ----------
    study
        What `clusters` are, the resamples of one subject, and the folds: with several, limits are wider by sqrt 2.
    values, clusters, subjects : arrays of shape (n_rows,)
        As in `Measured`.
    ids : array of shape (n_rows,), optional
        Images, where `clusters` may be groups that do not hold whole images.
    shares
        Whether the values are hits and misses, or shares of them.

    Returns
    -------
    low, high
        NaN where there is none.
    words
        In the words of the table of scores, or why there is no interval.
    """
    # One subject's hits keep the bootstrap; of several, a mean near its end needs the logit.
    several = len(set(subjects.tolist())) > 1
    found = interval_of_rows(
        values, **find_row_units(study, clusters, subjects, ids), n_boot=study.n_bootstrap, seed=study.seed,
        proportion=shares and several, over_folds=len(study.folds) > 1,
    )  # fmt: skip
    return _bound(found)


def _bound(found: CrossedInterval) -> tuple[float, float, str]:
    """Return limits, NaN where there are none, and what was resampled or why not."""
    low, high = (np.nan if limit is None else limit for limit in (found.low, found.high))
    return low, high, found.resampled


def find_row_units(
    study: Study, clusters: np.ndarray, subjects: np.ndarray, ids: np.ndarray | None
) -> dict[str, Any]:
    """Return what rows are resampled with: their units and, where there are several, their subjects."""
    if len(set(subjects.tolist())) < 2:
        return {"clusters": clusters, "unit": study.unit}
    units = Units(study.unit, clusters)
    if ids is not None and units.select(np.arange(len(ids)), ids) is None:
        return {"clusters": ids, "unit": "image", "subjects": subjects}
    return {"clusters": clusters, "unit": study.unit, "subjects": subjects}


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
        subjects, similarity = test.trials["subject"].to_numpy(dtype=object), None
        # Computed only where it is used: of a large gallery it would not fit.
        if (permute or self._leaves_images_out(subjects)) and 1 < len(gallery) <= LARGEST_GALLERY:
            similarity = compute_similarity(queries, gallery.select(sorted(gallery.ids, key=str)))
        return self.measure_similarity(
            similarity,
            retrieval,
            test.stimulus_ids,
            subjects,
            self.study.find_clusters(test),
            permute=permute,
        )

    def measure_similarity(
        self,
        similarity: np.ndarray | None,
        retrieval: Retrieval,
        ids: np.ndarray,
        subjects: np.ndarray,
        clusters: np.ndarray,
        *,
        permute: bool = True,
    ) -> FoldValues:
        """Measure ranks, and permute the columns of similarities, which are in the order of the names of images.

        Parameters
        ----------
        similarity : array of shape (n_rows, n_gallery) or None
            None if there are too many images to permute.
        retrieval
            The ranks of the same rows.
        ids, subjects, clusters : arrays of shape (n_rows,)
            As in `FoldValues`.
        """
        values = compute_hits(retrieval, self.metric)
        chance = compute_chance(self.metric, gallery_size=retrieval.gallery_size)
        total, null, left_out = float(values.sum()), None, None
        if similarity is not None:
            names = _name_gallery(retrieval.gallery_ids)
            own = pd.Index(names).get_indexer(pd.Index([str(i) for i in ids]))
            # The table is of rounded similarities, so its own sum, and not that of the values, meets the null.
            if permute:
                total, null = self._permute(similarity, own, names)
            if self._leaves_images_out(subjects):
                left_out = sum_without_each(similarity, own, find_metric(self.metric)[1], ties="shared")
        return FoldValues(values, ids, subjects, clusters, chance, total, null, left_out)

    def _leaves_images_out(self, subjects: np.ndarray) -> bool:
        """Say whether the interval is a jackknife: of identification by one subject, whose units are images."""
        identifies = self.metric.endswith("_way")
        return identifies and self.study.unit == "image" and len(set(subjects.tolist())) == 1

    def _permute(
        self, similarity: np.ndarray, own: np.ndarray, names: tuple[str, ...]
    ) -> tuple[float, np.ndarray]:
        metric, n, *_ = find_metric(self.metric)
        assert metric.tabulate is not None
        table = metric.tabulate(similarity, n)  # (n_queries, n_gallery)
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
            kept["left_out"][row] if "left_out" in kept else None,
        )  # fmt: skip

    @staticmethod
    def join(folds: Sequence[FoldValues]) -> Measured:
        """Put the folds of one condition together.

        Folds train each other, so that a null of permutations within them is widened; see `widen_null`.
        """
        sizes = [len(fold.values) for fold in folds]
        nulls = [fold.null for fold in folds if fold.null is not None]
        null = None
        # A null of some folds only would be narrower than the score that it judges.
        if len(nulls) == len(folds):
            null = np.sum(nulls, axis=0) / sum(sizes)
            null = null if len(folds) < 2 else widen_about(null, null.mean())
        sums = [fold.left_out for fold in folds if fold.left_out is not None]
        left_out = None
        if len(sums) == len(folds) and len({subject for fold in folds for subject in fold.subjects}) == 1:
            names = [_name_gallery(pd.unique(fold.ids)) for fold in folds]
            left_out = join_left_out(sums, names, sorted({name for own in names for name in own}))
        return Measured(
            values=np.concatenate([fold.values for fold in folds]),
            ids=np.concatenate([fold.ids for fold in folds]),
            subjects=np.concatenate([fold.subjects for fold in folds]),
            clusters=np.concatenate([fold.clusters for fold in folds]),
            chance=float(np.average([fold.chance for fold in folds], weights=sizes)),
            observed=sum(fold.table_sum for fold in folds) / sum(sizes),
            null=null,
            left_out=left_out,
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
            """Report the time that the fits will take, and open the bar."""
            nonlocal advance
            if n_left * seconds >= _WORTH_TELLING_S:
                kept = f", of which {n_kept} are kept from an earlier call" if n_kept else ""
                study.tell(
                    f"{what}: {len(names)} fits{kept}; {'the others' if n_kept else 'they'} take about "
                    f"{_describe_time(n_left * seconds)}, at {_describe_time(seconds)} each; finished work is kept "
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
    """Fit and measure every test, unless an earlier process has; None if another process is at it.

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
        optional = [name for name in ("null", "left_out") if getattr(found[0], name) is not None]
        columns = ("values", "chance", "table_sum", *optional)
        study.kept.write(name, **{key: np.stack([getattr(each, key) for each in found]) for key in columns})
    return found


def average_draws(measured: Sequence[Measured]) -> Measured:
    """Return the mean over draws, row by row and permutation by permutation."""
    nulls = [m.null for m in measured if m.null is not None]
    left = [m.left_out for m in measured if m.left_out is not None]
    first = measured[0]
    return Measured(
        np.mean([m.values for m in measured], axis=0), first.ids, first.subjects, first.clusters, first.chance,
        float(np.mean([m.observed for m in measured])),
        np.mean(nulls, axis=0) if len(nulls) == len(measured) else None,
        np.mean(left, axis=0) if len(left) == len(measured) else None,
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


def add_holm(table: pd.DataFrame, by: str, p_value: str = "p_value") -> pd.DataFrame:
    """Return the table with `p_holm`: p-values corrected for the rows of one `by`, among which a page names one.

    Parameters
    ----------
    p_value
        Column that is corrected; rows without one stay without.
    """
    corrected = pd.Series(np.nan, index=table.index)
    for _, own in table[table[p_value].notna()].groupby(by, sort=False):
        corrected[own.index] = correct_holm(own[p_value].to_numpy(float))
    return table.assign(p_holm=corrected)


def add_maximum(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with `p_maximum`: p-values corrected for the rows, among which a page names the best.

    Parameters
    ----------
    rows
        With `observed` and its `null`, of shape (n_permutations,), by permutations that all rows share; both are
        replaced. Where a row has no null, none has a corrected p-value.
    """
    nulls = [row["null"] for row in rows]
    p_values = np.full(len(rows), np.nan)
    if rows and all(null is not None for null in nulls):
        p_values = correct_maximum(np.array([row["observed"] for row in rows]), np.stack(nulls, axis=1))
    kept = [{key: value for key, value in row.items() if key not in ("observed", "null")} for row in rows]
    return [row | {"p_maximum": float(p)} for row, p in zip(kept, p_values, strict=True)]


def find_best(table: pd.DataFrame) -> pd.Series:
    """Return the row with the largest `value`; rows without one do not count."""
    return table.iloc[int(np.nanargmax(table["value"].to_numpy(float)))]


def describe_result(row: Any, metric: str, p_value: str = "p_value") -> str:
    """Return a value with interval, chance and p-value (of this column) as text."""
    p = row.get(p_value)
    tail = "" if p is None or pd.isna(p) else f", {format_p_value(p, in_words=True)}"
    return f"{metric} {row['value']:.3f} ({describe_limits(row)}, chance {row['chance']:.3f}, n = {row['n']:.0f}{tail})"


def describe_limits(row: Any, decimals: int = 3, *, what: str = "95 % interval ", sign: str = "") -> str:
    """Return the interval of a row as text after the word `what`, or why there is none."""
    if pd.isna(row["ci_low"]):
        return str(row.get("resampled") or NO_INTERVAL)
    form = f"{sign}.{decimals}f"
    return f"{what}{row['ci_low']:{form}} to {row['ci_high']:{form}}"


def pick_limits(row: Any) -> dict[str, Any]:
    """Return the limits of a row, and what they resample, as a `Score` takes them."""
    limits = {key: None if pd.isna(row[key]) else float(row[key]) for key in ("ci_low", "ci_high")}
    return {**limits, "resampled": str(row["resampled"])}
