"""The data to score, and the rows of one subject or of all, with the statistics that their scores share.

`ScoredGroup.permute` is the permutation test of decoded images and classes, `ScoredGroup.score` makes a row. Retrieval
has a test of its own in `score_table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import LARGEST_IN_MEMORY, ImageRows, Images, find_comparison_size
from braindecode_vis.scoring.metrics.image import ImageTable, check_stack, make_image_table
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.refits import Refits
from braindecode_vis.scoring.retrieval import Retrieval, compute_similarity
from braindecode_vis.scoring.score_row import POOLED, make_score
from braindecode_vis.scoring.uncertainty import PermutationResult, move_null, permutation_test, widen_null
from braindecode_vis.scoring.units import Units, find_exchangeable

if TYPE_CHECKING:
    from braindecode_vis.scoring.metrics.suite import MetricSuite

LARGEST_TABLE = 4_000_000  # cells of a query-by-gallery table that is permuted
SHUFFLES = "one shuffle; the interval holds 95 % of all shuffles"
#: What a protocol says where permutations of a few images allow no small p.
FEW_ORDERS = "permuted images change places"
#: Values of a table in single precision differ by less, in parts of one, from those of pairs in double precision.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Folding:
    """Folds that train each other: what is predicted of a test image leans towards the others, which it was taught.

    Parameters
    ----------
    numbers
        Fold of each of `ScoringTask.retrievals`.
    taught
        For each of them, the training images of the fold. What they have in common is taken off before images are
        identified: a weak prediction is near it, and it holds every candidate but the right one.
    within
        Whether candidates are those of the own fold alone.
    remembered
        Whether some gallery holds training images of its fold, so that ranks lie below chance.
    words
        The same for the protocol of a row.
    refits
        Ranks after refits on relabelled images, for p-values of retrieval; without them, and of images, p-values come
        from permutations within folds, whose null is widened by sqrt 2.
    """

    numbers: Sequence[int]
    taught: Sequence[frozenset[str]]
    within: bool = False
    remembered: bool = False
    words: str = ""
    refits: Refits | None = None


class Group(NamedTuple):
    """Rows that are scored together: of one subject or of all, under one condition or (None) under all."""

    subject: str
    condition: str | None
    rows: np.ndarray


@dataclass(frozen=True)
class ScoringTask:
    """What is to be scored.

    Parameters
    ----------
    retrievals
        Predictions, gallery and ranks of each fold; their rows in order are the rows below. None if images alone
        are scored.
    seen : uint8 array of shape (n_rows, height, width, 3), or `ImageRows`
    images
        Method to uint8 images of the shape of `seen`, or of shape (n_rows, n_draws, height, width, 3), or `ImageRows`.
        Several draws are scored one round at a time and the rounds averaged; they are never pooled. Rows that are read
        from files may be of any size: metrics with a size of their own read them in full, few at a time, and all others
        at `size`.
    ids, concepts, subjects : arrays of shape (n_rows,)
        Stimulus, its concept and the subject of each row.
    decoded_concepts : array of shape (n_rows,), optional
        Decoded class of each row.
    feature_encoder
        Image encoder for the identification in feature space, or None.
    feature_name
        What follows the ``@`` of metrics in that space.
    protocol, split, seed
        As in `Score`.
    n_bootstrap, n_permutations
        Resamples and shuffles.
    ceilings
        Metric to the best value that the noise of the recording allows, where that is known.
    suite
        Further rows that compare images in networks, or None.
    best_of
        Add, where the decoded system has several draws, the best draw of each image as judged by the metric itself, as
        ``best_of_<n>_<metric>``: another protocol, whose chance level is that of its own permutation null.
    conditions : array of shape (n_rows,), optional
        A further label of each row, for example task and stimulus set of an imagery experiment. Each condition of each
        subject is scored as well, among the stimuli of that condition, and named in the column `split`.
    units
        What intervals resample, if not images.
    metrics
        Names of further metrics of images or embeddings, of the package or from outside (see
        `braindecode_vis.scoring.metrics.metric_registry.register_metric`), scored with interval, chance, p-value and
        controls.
    similarities
        For each fold an array of shape (n_queries, n_gallery), where ranks come from similarities that were computed
        elsewhere; the embeddings of `retrievals` may then be empty. By default cosines.
    folding
        Of a run with several folds; None if there is one test set.
    design
        For each fold the ranks of predictions from the design alone, the control ``design`` (see `design_control`);
        empty without one.
    size
        Height and width at which rows that are read from files are compared (see `find_comparison_size`); by default
        those of the first seen image. Where they are equal, images of another aspect are cropped to their centre square
        for every metric. Arrays are compared as they are.
    known_features
        What `feature_encoder` gives for images that were encoded before, by the hash of their pixels; what is encoded
        for the task is added.
    pair_nulls
        Whether metrics that look at one pair of images at a time (ssim) get a permutation null, which takes most of the
        time of a large test set. Without one, their chance is the mean against the next stimulus.
    """

    retrievals: Sequence[tuple[Embeddings, Embeddings, Retrieval]]
    seen: Images
    images: Mapping[str, Images]
    ids: np.ndarray
    concepts: np.ndarray
    subjects: np.ndarray
    decoded_concepts: np.ndarray | None
    feature_encoder: Any
    feature_name: str
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    ceilings: Mapping[str, float] = field(default_factory=dict)
    suite: MetricSuite | None = None
    best_of: bool = False
    conditions: np.ndarray | None = None
    units: Units | None = None
    metrics: Sequence[str] = ()
    similarities: Sequence[np.ndarray] | None = None
    folding: Folding | None = None
    design: Sequence[Retrieval] = ()
    pair_nulls: bool = True
    known_features: dict[str, np.ndarray] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    _small: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _last: dict[tuple[str, bytes], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    #: What metrics of pairs of images gave, by their names and the pair, and tables of them; see `image_scores`.
    compared: dict[tuple[str, ...], dict[tuple[int, int], np.ndarray]] = field(
        default_factory=dict, init=False, repr=False
    )
    tabulated: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        rows = np.concatenate([self.ids[:0], *(predicted.ids for predicted, _, _ in self.retrievals)])
        if self.retrievals and (len(rows) != len(self.ids) or (rows != self.ids).any()):
            raise DataError("retrieval and reconstruction list different test items; run both again.")
        for method, images in self.images.items():
            check_stack(images, self.seen, method)
        if self.conditions is not None and len(self.conditions) != len(self.ids):
            raise DataError(f"{len(self.ids)} test items came with {len(self.conditions)} conditions.")

    def show_whole(self, name: str) -> Images:
        """Return the images of a method, or the ``seen`` ones, in their own size."""
        images = self.seen if name == "seen" else self.images[name]
        if not isinstance(images, ImageRows):
            return images
        height, width = self._find_size()
        return images.crop() if height == width else images

    def show_small(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the images of a method, or the ``seen`` ones, at the size of comparison, as one array.

        Parameters
        ----------
        name
            The method.
        rows
            Some rows alone; by default all. Where all images of all methods would take much memory, only the last rows
            of a method are kept.
        """
        images = self.seen if name == "seen" else self.images[name]
        if not isinstance(images, ImageRows):
            return images if rows is None else take_rows(images, rows)
        if rows is None or name == "seen" or self._keeps_small:
            if name not in self._small:
                self._small[name] = images.resize(*self._find_size())
            whole = self._small[name]
            return whole if rows is None else take_rows(whole, rows)
        asked = (name, rows.tobytes())
        if asked not in self._last:
            self._last.clear()
            self._last[asked] = images[rows].resize(*self._find_size())
        return self._last[asked]

    @cached_property
    def _keeps_small(self) -> bool:
        stacks = [one.index.size for one in self.images.values() if isinstance(one, ImageRows)]
        return 3 * sum(stacks) * math.prod(self._find_size()) <= LARGEST_IN_MEMORY

    def _find_size(self) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        height, width = self.seen.shape[1:3]
        return find_comparison_size(height, width)

    @cached_property
    def pictures(self) -> ImageTable:
        """Which images are known to be the same: subjects share the seen ones, and those of some controls."""
        return make_image_table(self.seen, self.images, reads=False)

    @property
    def controls(self) -> list[str]:
        """Methods with images of their own, but for the decoded system."""
        return [name for name in self.images if name not in ("decoded", "shuffled")]

    def list_asked(self, on: str) -> list[str]:
        """Return the further metrics of ``images`` or of ``embeddings``."""
        return [name for name in self.metrics if find_metric(name).metric.on == on]

    @property
    def n_steps(self) -> int:
        """Number of calls of `advance` to expect."""
        return len(self.groups) * (len(self.images) + 1) + self.n_suite_steps

    @property
    def n_suite_steps(self) -> int:
        """Calls of `advance` that the suite makes: one per network, one for the classifier."""
        return 0 if self.suite is None else len(self.suite.available) + 1

    @property
    def not_computed(self) -> list[str]:
        """One sentence for each row of the suite that lacks its weights, and for what the test set cannot show."""
        sentences = [] if self.suite is None else list(self.suite.not_computed)
        if len(np.unique(self.ids.astype(str))) == 1:
            sentences.append(
                "identification and p-values not computed: there is only one test image; its rank is always 1."
            )
        elif self.folding is not None and len(self.ids) == len(np.unique(self.fold_numbers)):
            sentences.append(
                "p-values of images not computed: every fold tests one image, so images cannot be "
                "permuted within folds; use fewer folds to get p-values."
            )
        large = [
            (len(predicted), len(gallery))
            for (predicted, gallery, _), table in zip(self.retrievals, self.tables, strict=True)
            if table is None
        ]
        if large:
            sentences.append(
                f"p-values of retrieval not computed: {large[0][0]} predictions in a gallery of {large[0][1]} are more "
                f"than {LARGEST_TABLE:,} pairs."
            )
        return sentences

    @cached_property
    def groups(self) -> list[Group]:
        """Rows of each subject, of all subjects if there are several, then the same for each condition."""
        subjects = list_subjects(self.subjects)
        groups = [Group(name, None, rows) for name, rows in subjects]
        labels = [] if self.conditions is None else sorted({str(label) for label in self.conditions})
        if len(labels) < 2 or self.conditions is None:
            return groups
        given = np.array([str(label) for label in self.conditions])  # (n_rows,)
        for label in labels:
            parts = [(name, rows[given[rows] == label]) for name, rows in subjects]
            groups += [Group(name, label, rows) for name, rows in parts if len(rows)]
        return groups

    @cached_property
    def folds(self) -> np.ndarray:
        """Fold of each row."""
        return np.repeat(
            np.arange(len(self.retrievals)), [len(predicted) for predicted, _, _ in self.retrievals]
        )

    @cached_property
    def fold_numbers(self) -> np.ndarray:
        """Number of the fold of each row, the same for the galleries of one fold; 0 without folds."""
        if self.folding is None:
            return np.zeros(len(self.ids), np.intp)
        return np.asarray(self.folding.numbers)[self.folds]

    def find_centre(self, fold: int) -> np.ndarray:
        """Return rows that show each training image of a fold once, if it is tested in another fold."""
        if self.folding is None:
            return np.empty(0, np.intp)
        names = self.ids.astype(str)
        _, first = np.unique(names, return_index=True)
        taught = self.folding.taught[list(self.folding.numbers).index(fold)]
        return np.array([row for row in np.sort(first) if names[row] in taught], np.intp)

    @cached_property
    def tables(self) -> list[np.ndarray | None]:
        """Similarity of the queries of each fold to its gallery; None if it would be too large."""
        return [
            None if len(predicted) * len(gallery) > LARGEST_TABLE
            else compute_similarity(predicted, gallery) if self.similarities is None
            # Places in the row, since a tolerance for cosines would tie small probabilities.
            else _rank_densely(self.similarities[fold])
            for fold, (predicted, gallery, _) in enumerate(self.retrievals)
        ]  # fmt: skip


class ScoredGroup:
    """The rows of one group and what every score of theirs shares.

    Parameters
    ----------
    task
        All rows.
    group
        The rows in question.
    """

    def __init__(self, task: ScoringTask, group: Group) -> None:
        self.task, self.subject, self.rows = task, group.subject, group.rows
        self.split = task.split if group.condition is None else f"{task.split}, {group.condition}"
        self.has_ceiling = group.condition is None
        self.ids, self.concepts = task.ids[group.rows], task.concepts[group.rows]
        self.columns, self.truth = np.unique(self.ids.astype(str), return_inverse=True)
        # One row for each stimulus, from which its picture and its concept are taken.
        self.units = None if task.units is None else task.units.select(group.rows)
        self.exchangeable = find_exchangeable(self.ids, self.units)
        self.first = np.array([int(np.flatnonzero(self.truth == c)[0]) for c in range(len(self.columns))])
        self.fold_numbers = task.fold_numbers[group.rows]
        #: Whether the rows are tested in several folds that train each other.
        self.over_folds = len(np.unique(self.fold_numbers)) > 1

    @cached_property
    def protocol(self) -> str:
        """What rows say of how they were made."""
        words = "" if self.task.folding is None else self.task.folding.words
        classes = self.find_classes(self.columns, self.column_folds)
        counts = (
            [len(self.columns)] if classes is None else np.unique(classes, return_counts=True)[1].tolist()
        )
        # Of five images or more there are enough orders.
        n_orders = math.prod(math.factorial(min(n, 5)) for n in counts)
        few = f"{FEW_ORDERS} in {n_orders} ways: no p much below {1 / n_orders:.2g}"
        return "; ".join(filter(None, [self.task.protocol, words, few * (1 < n_orders < 20)]))

    @cached_property
    def column_folds(self) -> np.ndarray | None:
        """The fold of each stimulus; None if there is one fold, or some stimulus is tested in several."""
        pairs = np.unique(np.stack([self.truth, self.fold_numbers]), axis=1)
        return pairs[1] if self.over_folds and pairs.shape[1] == len(self.columns) else None

    @property
    def candidates(self) -> np.ndarray | None:
        """Within what images are identified, a label for each stimulus; None if all are candidates."""
        folds, folding = self.column_folds, self.task.folding
        if folds is None or folding is None or not folding.within:
            return None
        # Of one condition, a fold may test a single image.
        return folds if np.unique(folds, return_counts=True)[1].min() > 1 else None

    @cached_property
    def following(self) -> np.ndarray:
        """The next stimulus of each, beside which a metric is at its chance level: of the same fold, if it has two."""
        found = (np.arange(len(self.columns)) + 1) % len(self.columns)
        for fold in np.unique([] if self.column_folds is None else self.column_folds):
            own = np.flatnonzero(self.column_folds == fold)
            if len(own) > 1:
                found[own] = np.roll(own, -1)
        return found

    @property
    def leaves_images_out(self) -> bool:
        """Whether intervals of identification come from leaving images out: of one subject, whose images are drawn."""
        return self.units is None and self.subject != POOLED

    @property
    def can_permute(self) -> bool:
        """Whether some stimuli may change places under a null."""
        folds = self.column_folds
        n_blocks = 1 if folds is None else len(np.unique(folds))
        return len(self.columns) > n_blocks

    def score(self, values: np.ndarray, metric: str, method: str, **details: Any) -> Score:
        """Return the score of one value per row."""
        task, pooled, units = self.task, None, self.units
        if self.subject == POOLED:
            pooled = task.subjects[self.rows]
            units = None if task.units is None else task.units.select(self.rows, self.ids)
        # A ceiling is of all test trials; that of one condition is not known.
        if method == "decoded" and self.has_ceiling:
            details["noise_ceiling"] = task.ceilings.get(metric)
        return make_score(
            values, metric=metric, method=method, protocol=self.protocol, subject=self.subject, split=self.split,
            seed=task.seed, stimulus_ids=[str(i) for i in (self.ids if units is None else units.labels)],
            unit="image" if units is None else units.unit, subjects=pooled,
            n_boot=task.n_bootstrap, over_folds=self.over_folds, **details,
        )  # fmt: skip

    def find_classes(self, stimuli: Any, groups: Any = None) -> Any:
        """Return within what a null exchanges these stimuli: within `groups`, and within what the units allow."""
        if self.exchangeable is None:
            return groups
        known = self.exchangeable
        classes = [
            known.get(str(i), -1) for i in stimuli
        ]  # -1: further items of a gallery, which stay in place
        return cross_labels(groups, classes)

    def score_shuffled(
        self, null: PermutationResult, metric: str, n_queries: int, *, gallery_size: int | None = None
    ) -> Score:
        """Return the score of one brain whose rows are shuffled, its interval that of all shuffles."""
        task = self.task
        return Score(
            # The value is one shuffle, as one brain would give it; its interval is the spread of all of them.
            method="shuffled", metric=metric, value=float(null.null[0]), chance=null.null_mean, n_queries=n_queries,
            protocol=self.protocol, subject=self.subject, split=self.split, seed=task.seed,
            ci_low=null.null_low, ci_high=null.null_high, gallery_size=gallery_size, resampled=SHUFFLES,
        )  # fmt: skip

    def compare(self, known: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
        """Yield the paired difference of the decoded system to each control, with a 95 % interval.

        Parameters
        ----------
        known
            Values per row, shape (n_rows,), by metric and method. Shuffles have none of their own and the oracle is no
            control, so neither is compared; nor is a median, whose difference is none of the values.
        """
        for metric, values in known.items():
            if "decoded" not in values or find_metric(metric).metric.statistic == "median":
                continue
            for method in values:
                if method in ("decoded", "oracle"):
                    continue
                pair = values["decoded"], values[method]
                # Equal images tie, whichever of a table in single precision and of pairs in double a value is from.
                tied = np.isclose(*pair, rtol=ROUNDING, atol=ROUNDING / 10)
                found = self.score(
                    np.where(tied, 0.0, pair[0] - pair[1]), metric, method, chance=None, differs=True
                )
                yield {
                    "metric": metric, "control": method, "subject": self.subject, "split": self.split,
                    "difference": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high,
                }  # fmt: skip

    def permute(
        self, table: np.ndarray, *, groups: Any = None, blocks: Any = None, alternative: Any = "greater"
    ) -> PermutationResult:
        """Test a table of rows by distinct stimuli; after folds within each, by a wider null.

        With `blocks`, chosen at random within what may change places, the table holds only the pairs within them; see
        `move_null`.
        """
        if self.column_folds is not None:
            groups = cross_labels(groups, self.column_folds)
        classes = self.find_classes(self.columns, groups)
        found = permutation_test(
            table, truth=self.truth, groups=classes if blocks is None else blocks, alternative=alternative,
            n_permutations=self.task.n_permutations, seed=self.task.seed,
        )  # fmt: skip
        found = widen_null(found) if self.over_folds else found
        return found if blocks is None else move_null(found, table, self.truth, blocks, classes)

    def score_table(
        self,
        method: str,
        metric: str,
        tables: Sequence[np.ndarray],
        *,
        blocks: Any = None,
    ) -> Iterator[tuple[Score, np.ndarray]]:
        """Yield the scores of a metric known for all pairs of images and stimuli, chance from its permutation null.

        Parameters
        ----------
        method, metric
            As in `Score`.
        tables
            For each round an array of shape (n_rows, n_stimuli): the value if that stimulus were the row's own.
        blocks : sequence of length n_stimuli, optional
            Random blocks, outside of which nothing is known.
        """
        several = self.can_permute
        table = average(tables)
        alternative = find_metric(metric).metric.alternative
        null = self.permute(table, blocks=blocks, alternative=alternative) if several else None
        level, p_value = (None, None) if null is None else (null.null_mean, null.p_value)
        yield self.score(self.own(table), metric, method, chance=level, p_value=p_value), self.own(table)
        # Shuffles of blocks keep too many in place.
        if method == "decoded" and null is not None and blocks is None:
            yield self.score_shuffled(null, metric, len(table)), self.own(table)
        if several:
            yield from self.score_best(method, metric, tables, blocks=blocks)

    def score_best(
        self,
        method: str,
        metric: str,
        tables: Sequence[np.ndarray],
        *,
        groups: Any = None,
        blocks: Any = None,
    ) -> Iterator[tuple[Score, np.ndarray]]:
        """Yield the score of the best of several draws, if that is asked for."""
        if not self.task.best_of or method != "decoded" or len(tables) < 2:
            return
        alternative = find_metric(metric).metric.alternative
        # Of each pair of image and stimulus the best draw: then the null chooses as freely as the score does.
        best = np.max(tables, axis=0) if alternative == "greater" else np.min(tables, axis=0)
        null = self.permute(best, alternative=alternative, groups=groups, blocks=blocks)
        yield (
            self.score(
                self.own(best), f"best_of_{len(tables)}_{metric}", method,
                chance=null.null_mean, p_value=null.p_value,
            ),
            self.own(best),
        )  # fmt: skip

    def own(self, table: np.ndarray) -> np.ndarray:
        """Return the value of each row against its own stimulus."""
        return table[np.arange(len(table)), self.truth]


def cross_labels(groups: Any, others: Any) -> list[Any]:
    """Return a label for each pair of labels; those of `others` where `groups` is None."""
    return list(others) if groups is None else [f"{a} {b}" for a, b in zip(others, groups, strict=True)]


def _rank_densely(similarity: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks: np.ndarray = rankdata(similarity, method="dense", axis=1)
    return ranks.astype(np.float64)


def average(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over rounds; one round is returned as it is."""
    return tables[0] if len(tables) == 1 else np.mean(tables, axis=0)


def take_rows(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return some rows; all of them, in their order, without a copy."""
    return images if np.array_equal(rows, np.arange(len(images))) else images[rows]


def list_subjects(subjects: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return each subject with its rows, and `POOLED` with all rows where there are several subjects."""
    names = subjects.astype(str)
    groups = [(str(name), np.flatnonzero(names == name)) for name in np.unique(names)]
    return [*groups, (POOLED, np.arange(len(names)))] if len(groups) > 1 else groups
