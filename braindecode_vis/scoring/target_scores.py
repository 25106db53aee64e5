"""Scores of the parts of a target: the decoded value of each attribute, and the correlation of each dimension.

Owns two kinds of rows. Of a conditional target, the value is named whose training images have the most similar answer
(cosine, after the training mean): balanced accuracy of each attribute, beside what the head says of the seen image
itself (``oracle``). Of a table of dimensions: the correlation of each dimension over test images, with a ceiling from
how well predictions of two halves of the repetitions agree. P-values are Holm's over attributes, and over dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Score, normalise_rows
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.embeddings.attribute_table import AttributeTable, TargetParts
from braindecode_vis.preprocessing.noise_ceiling import find_root
from braindecode_vis.preprocessing.reliability import boost_correlation
from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
from braindecode_vis.scoring.crossed import (
    CrossedInterval,
    groups_interval,
    half_width_of_parts,
    resampled_interval,
    widen_interval,
)
from braindecode_vis.scoring.score_row import POOLED
from braindecode_vis.scoring.scoring_task import list_subjects
from braindecode_vis.scoring.uncertainty import compute_p_value, correct_holm, permute_within, widen_about
from braindecode_vis.scoring.units import Units, find_exchangeable

BALANCED, CORRELATION = "balanced_accuracy", "dimension_correlation"
_CHUNK = 500  # permutations or resamples at once


@dataclass(frozen=True)
class TargetTask:
    """Predictions in the target's own space, and what its parts mean.

    Parameters
    ----------
    parts
        Names of tokens or dimensions.
    predicted, banks, training : sequences, one entry per fold
        Predictions of the test rows, the embeddings of all images in the same space, and the ids of training images.
    ids, concepts, subjects : arrays of shape (n_rows,)
        Stimulus, its concept and the subject of each test row, fold by fold.
    concept_of
        Concept of every image.
    halves : array of shape (n_splits, 2, n_rows, n_dimensions) or None
        Predictions from two halves of the repetitions of each row, split several times.
    protocol, split, seed, n_bootstrap, n_permutations, units
        As in `scoring_task.ScoringTask`.
    """

    parts: TargetParts
    predicted: Sequence[Embeddings]
    banks: Sequence[Embeddings]
    training: Sequence[Sequence[str]]
    ids: np.ndarray
    concepts: np.ndarray
    subjects: np.ndarray
    concept_of: dict[str, str]
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    units: Units | None = None
    halves: np.ndarray | None = None

    @property
    def over_folds(self) -> bool:
        """Whether several folds train each other."""
        return len(self.predicted) > 1

    @property
    def folds(self) -> np.ndarray:
        """Fold of each row."""
        return np.repeat(np.arange(len(self.predicted)), [len(one) for one in self.predicted])

    def find_units(self, truth: np.ndarray, rows: np.ndarray) -> Units:
        """Return what is resampled of some rows: images, or concepts where `truth` is the same for all images of one.

        Images of a concept that share the answer are not independent evidence of it.
        """
        if self.units is not None and (own := self.units.select(rows)) is not None:
            return own
        concepts, ids = self.concepts[rows].astype(str), self.ids[rows].astype(str)
        known = np.unique(concepts, return_inverse=True)[1]
        first = np.unique(known, return_index=True)[1]
        shared = (truth == truth[first][known]).all() and len(first) < len(set(ids.tolist()))
        return Units("concept", concepts) if shared and len(first) > 1 else Units("image", ids)


def score_target(task: TargetTask) -> tuple[list[Score], list[str]]:
    """Return the rows of each part, and a sentence for each that cannot be scored."""
    if task.parts.attributes is not None:
        return _score_attributes(task, task.parts.attributes)
    return _score_dimensions(task)


# --- attributes -----------------------------------------------------------------------------------------------


def _score_attributes(task: TargetTask, table: AttributeTable) -> tuple[list[Score], list[str]]:
    found: dict[str, list[Score]] = {}
    lacking = []
    for position, name in enumerate(table.names):
        decided = _decide(task, table, position)
        if decided is None:
            lacking.append(
                f"{BALANCED}@{name} not computed: fewer than two of its values are known of test images and were "
                "trained on."
            )
            continue
        decoded, oracle = decided
        rows, _ = compute_category_scores(decoded)
        seen, _ = compute_category_scores(oracle)
        chance = {score.subject: score.chance for score in rows if score.metric == BALANCED}
        found[name] = [
            replace(score, metric=f"{BALANCED}@{name}") for score in rows if score.metric == BALANCED
        ] + [
            replace(
                score,
                method="oracle",
                metric=f"{BALANCED}@{name}",
                chance=chance[score.subject],
                p_value=None,
            )
            for score in seen
            if score.metric == BALANCED and score.method == "decoded"
        ]
    return _correct([score for rows in found.values() for score in rows], "attributes"), lacking


def _decide(
    task: TargetTask, table: AttributeTable, position: int
) -> tuple[CategoryTask, CategoryTask] | None:
    """Return the decisions on one attribute, from predictions and from the seen images; None if there are none."""
    name = table.names[position]
    prototypes, means, trained = [], [], []
    for bank, ids in zip(task.banks, task.training, strict=True):
        tokens = bank.select(list(ids)).vectors[:, position]
        codes = table.codes_of(list(ids), [task.concept_of[str(i)] for i in ids])[:, position]
        own, counts = np.unique(codes[codes >= 0], return_counts=True)
        trained.append(own[counts > 1])
        means.append(tokens.mean(axis=0))
        prototypes.append({int(code): tokens[codes == code].mean(axis=0) for code in trained[-1]})
    # A value that some fold never trained on could not be decided there.
    shared = sorted(set.intersection(*(set(own.tolist()) for own in trained)))
    truth = table.codes_of(task.ids.astype(str).tolist(), task.concepts.astype(str).tolist())[:, position]
    rows = np.flatnonzero(np.isin(truth, shared))
    if len(shared) < 2 or len(np.unique(truth[rows])) < 2:
        return None
    decisions: dict[str, list[np.ndarray]] = {"decoded": [], "oracle": []}
    for number, predicted in enumerate(task.predicted):
        values = np.stack([prototypes[number][code] for code in shared])
        seen = task.banks[number].select(list(predicted.ids))
        for method, given in (("decoded", predicted), ("oracle", seen)):
            decisions[method].append(compare_answers(given.vectors[:, position], values, means[number]))
    classes = tuple(table.values[name][code] for code in shared)
    labels = np.array([table.values[name][code] for code in truth[rows]], dtype=object)
    decoded = CategoryTask(
        decisions=np.concatenate(decisions["decoded"])[rows], classes=classes, labels=labels,
        runs=task.folds[rows], subjects=task.subjects[rows], protocol=task.protocol, split=task.split, seed=task.seed,
        n_bootstrap=task.n_bootstrap, n_permutations=task.n_permutations, units=task.find_units(truth[rows], rows),
        over_folds=task.over_folds,
    )  # fmt: skip
    return decoded, replace(decoded, decisions=np.concatenate(decisions["oracle"])[rows], n_permutations=1)


def compare_answers(tokens: np.ndarray, prototypes: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return how alike each token is to the mean answer of each value, cosines of shape (n_rows, n_values).

    Parameters
    ----------
    tokens : array of shape (n_rows, n_features)
        Answers to one question.
    prototypes : array of shape (n_values, n_features)
        Mean answer of the training images of each value.
    mean : array of shape (n_features,)
        Mean answer of all training images, which is taken off both.
    """
    similar: np.ndarray = normalise_rows(tokens - mean) @ normalise_rows(prototypes - mean).T
    return similar


def _correct(scores: Sequence[Score], what: str) -> list[Score]:
    """Return the scores with p-values that are Holm's over the parts of each subject."""
    tested: dict[str, list[int]] = {}
    for place, score in enumerate(scores):
        if score.p_value is not None:
            tested.setdefault(score.subject, []).append(place)
    out = list(scores)
    for places in tested.values():
        corrected = correct_holm(np.array([scores[place].p_value for place in places], dtype=float))
        for place, p_value in zip(places, corrected, strict=True):
            out[place] = replace(out[place], p_value=float(p_value))
    n_parts = max(map(len, tested.values()), default=0)
    return [replace(s, protocol=f"{s.protocol}; p by Holm over {n_parts} {what}") for s in out]


# --- dimensions -----------------------------------------------------------------------------------------------


def _score_dimensions(task: TargetTask) -> tuple[list[Score], list[str]]:
    names = np.array(task.parts.names, dtype=object)
    predicted = np.concatenate([one.flat() for one in task.predicted]).astype(np.float64)
    truth = np.concatenate(
        [bank.select(list(one.ids)).flat() for bank, one in zip(task.banks, task.predicted, strict=True)]
    ).astype(np.float64)
    training = [bank.select(list(ids)).flat() for bank, ids in zip(task.banks, task.training, strict=True)]
    learnt = np.all([np.ptp(one, axis=0) > 0 for one in training], axis=0)
    varies = np.all(
        [np.ptp(values[rows], axis=0) > 0 for values in (truth,) for _, rows in list_subjects(task.subjects)],
        axis=0,
    )
    lacking = [
        f"{CORRELATION}@{name} not computed: it is the same for all {'test' if there else 'training'} images."
        for name, there, shown in zip(names, learnt, varies, strict=True)
        if not (there and shown)
    ]
    kept = np.flatnonzero(learnt & varies)
    if not len(kept):
        return [], [f"{CORRELATION} not computed: no dimension varies among training images and test images."]
    if task.halves is None:
        lacking.append(
            f"noise ceilings of {CORRELATION} not computed: test images are shown once, or not averaged."
        )
    scores: list[Score] = []
    parts: list[_Correlations] = []
    for subject, rows in list_subjects(task.subjects):
        if subject == POOLED:
            found = _pool(task, parts)
        else:
            halves = None if task.halves is None else task.halves[:, :, rows][..., kept]
            found = _correlate(task, predicted[rows][:, kept], truth[rows][:, kept], rows, halves)
            parts.append(found)
        mean = found.average()
        scores += _make_rows(task, subject, mean, [CORRELATION])
        # Of several subjects single dimensions are told for all of them together.
        if subject == POOLED or len(set(task.subjects.tolist())) == 1:
            scores += _correct(
                list(_make_rows(task, subject, found, [f"{CORRELATION}@{name}" for name in names[kept]])),
                "dimensions",
            )
    return scores, lacking


@dataclass(frozen=True)
class _Correlations:
    """Correlations, reliabilities (n_dimensions,), and correlations of resamples and permutations (n, n_dimensions).

    A noise ceiling is the root of a reliability, which is averaged unclipped before: a mean of roots lies above 0 where
    nothing but noise is.
    """

    values: np.ndarray
    draws: np.ndarray
    null: np.ndarray
    reliability: np.ndarray | None
    n_items: int
    unit: str
    over_folds: bool
    units: tuple[str, ...] = ()
    parts: tuple[_Correlations, ...] = ()

    def average(self) -> _Correlations:
        """Return the mean over dimensions."""
        reliability = None if self.reliability is None else self.reliability.mean(keepdims=True)
        return _Correlations(
            self.values.mean(keepdims=True), self.draws.mean(axis=1, keepdims=True),
            self.null.mean(axis=1, keepdims=True), reliability, self.n_items, self.unit, self.over_folds, self.units,
            tuple(part.average() for part in self.parts),
        )  # fmt: skip

    def bound(self, number: int) -> tuple[float | None, float | None, str]:
        """Return the limits of one dimension, and what they resample."""
        found = self._bound(number)
        return found.low, found.high, found.resampled

    def _bound(self, number: int) -> CrossedInterval:
        n_units, ends = len(self.units), (-1.0, 1.0)
        if not self.parts:
            value, draws = float(self.values[number]), self.draws[:, number]
            return resampled_interval(
                value, draws, n_units, unit=self.unit, ends=ends, over_folds=self.over_folds
            )
        values = np.array([part.values[number] for part in self.parts])
        n_subjects = len(self.parts)
        found = groups_interval(values, np.arange(n_subjects), unit="subject")
        if found.half_width is not None and len({part.units for part in self.parts}) == 1:
            # All subjects saw the same units and each resample drew the same of them.
            draws = np.array([part.draws[:, number] for part in self.parts])  # subjects, resamples
            columns = float(draws.mean(axis=0).var())
            cells = max(0.0, (float(draws.var(axis=1).mean()) / n_subjects - columns) / (n_subjects - 1))
            rows = float(values.var(ddof=1)) / n_subjects
            half = half_width_of_parts(rows, columns, cells, n_subjects, n_units)
            low, high = max(-1.0, found.value - half), min(1.0, found.value + half)
            words = f"{n_subjects} subjects and {n_units} {self.unit}s (crossed)"
            found = CrossedInterval(found.value, low, high, half, words)
        return widen_interval(found, ends) if self.over_folds else found


def _make_rows(
    task: TargetTask, subject: str, found: _Correlations, metrics: Sequence[str]
) -> Iterator[Score]:
    for number, metric in enumerate(metrics):
        null = found.null[:, number]
        low, high, resampled = found.bound(number)
        chance = float(null.mean())
        judged = widen_about(null, chance) if found.over_folds else null
        yield Score(
            method="decoded", metric=metric, value=float(found.values[number]), chance=chance,
            n_queries=found.n_items, protocol=task.protocol, subject=subject, split=task.split, seed=task.seed,
            ci_low=low, ci_high=high, resampled=resampled,
            p_value=float(compute_p_value(float(found.values[number]), judged)),
            noise_ceiling=None if found.reliability is None else float(find_root(found.reliability[number])),
        )  # fmt: skip


def _correlate(
    task: TargetTask, predicted: np.ndarray, truth: np.ndarray, rows: np.ndarray, halves: np.ndarray | None
) -> _Correlations:
    """Return correlations over the rows of one subject, arrays of shape (n_rows, n_dimensions)."""
    codes = np.unique(truth, axis=0, return_inverse=True)[1].ravel()
    units = task.find_units(codes, rows)
    names, labels = np.unique(units.labels.astype(str), return_inverse=True)
    n_units = len(names)
    generator = make_generator(
        task.seed, "target dimensions"
    )  # of all subjects, who thus share their resamples
    counts = generator.multinomial(n_units, np.full(n_units, 1 / n_units), size=task.n_bootstrap)[:, labels]
    draws = np.concatenate(
        [
            weigh_correlations(predicted, truth, part)
            for part in np.array_split(counts, -(-len(counts) // _CHUNK))
        ]
    )
    null = _permute(task, predicted, truth, rows, units, generator)
    reliability = None if halves is None else compute_reliability(halves)
    value = weigh_correlations(predicted, truth, np.ones((1, len(rows))))[0]
    return _Correlations(
        value, draws, null, reliability, len(rows), units.unit, task.over_folds, tuple(names.tolist())
    )  # fmt: skip


def weigh_correlations(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return correlations of the columns of `x` and `y` under weights of the rows; 0 where a column does not vary.

    Parameters
    ----------
    x, y : arrays of shape (n_rows, n_columns)
    weights : array of shape (n_draws, n_rows)

    Returns
    -------
    array of shape (n_draws, n_columns)

    Examples
    --------
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> weigh_correlations(x, -x, np.ones((1, 3))).tolist()
    [[-1.0]]
    """
    weights = weights / weights.sum(axis=1, keepdims=True)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)  # far from zero, sums of squares would lose digits
    mean_x, mean_y = weights @ x, weights @ y
    shared = weights @ (x * y) - mean_x * mean_y
    spread = (weights @ x**2 - mean_x**2) * (weights @ y**2 - mean_y**2)
    tiny = spread <= 1e-18 * np.maximum((x**2).mean(axis=0) * (y**2).mean(axis=0), 1e-300)
    found: np.ndarray = np.where(tiny, 0.0, shared / np.sqrt(np.where(tiny, 1.0, spread)))
    return found


def _permute(
    task: TargetTask, predicted: np.ndarray, truth: np.ndarray, rows: np.ndarray, units: Units,
    generator: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return correlations where truths change places among images, or among concepts where these are resampled."""
    kept = units.labels if units.unit == "concept" else task.ids[rows]
    names, first, code = np.unique(kept.astype(str), return_index=True, return_inverse=True)
    exchangeable = find_exchangeable(
        task.ids[rows], task.units.select(rows) if task.units is not None else None
    )
    within = np.zeros(len(names), int)
    if exchangeable is not None and units.unit != "concept":
        within = np.array([exchangeable[name] for name in names])
    blocks = [np.flatnonzero(within == one) for one in np.unique(within)]
    orders = permute_within(np.arange(len(names)), blocks, task.n_permutations, generator)
    own = truth[first]  # (n_names, n_dimensions)
    sums = np.zeros_like(own)
    np.add.at(sums, code, predicted - predicted.mean(axis=0))
    counts = np.bincount(code).astype(float)
    spread = predicted.std(axis=0) * np.sqrt(len(rows))
    null = np.empty((len(orders), own.shape[1]))
    for start in range(0, len(orders), _CHUNK):
        drawn = own[orders[start : start + _CHUNK]]  # permutations, names, dimensions
        shared = np.einsum("pnd,nd->pd", drawn, sums)
        mean = np.einsum("pnd,n->pd", drawn, counts) / len(rows)
        square = np.einsum("pnd,n->pd", drawn**2, counts) - len(rows) * mean**2
        scale = np.sqrt(np.maximum(square, 0)) * spread
        null[start : start + _CHUNK] = np.where(
            scale > 1e-12, shared / np.where(scale > 1e-12, scale, 1), 0.0
        )
    return null


def compute_reliability(halves: np.ndarray) -> np.ndarray:
    """Return the reliability of predictions, the square of the highest correlation with any truth that noise allows.

    It is the correlation of predictions from two halves of the repetitions, averaged over splits and brought to all
    repetitions by Spearman and Brown; shape (n_dimensions,), below 0 where halves disagree.

    Parameters
    ----------
    halves : array of shape (n_splits, 2, n_rows, n_dimensions)
    """
    n_rows = halves.shape[2]
    agreement = np.mean(
        [weigh_correlations(one, other, np.ones((1, n_rows)))[0] for one, other in halves], axis=0
    )
    return boost_correlation(agreement)


def _pool(task: TargetTask, parts: Sequence[_Correlations]) -> _Correlations:
    """Return the mean over subjects, whose limits are those of `_Correlations.bound`."""
    generator = make_generator(task.seed, "target subjects")
    reliability = [part.reliability for part in parts if part.reliability is not None]
    null = np.mean([part.null[generator.permutation(len(part.null))] for part in parts], axis=0)
    return _Correlations(
        np.mean([part.values for part in parts], axis=0), parts[0].draws[:0], null,
        np.mean(reliability, axis=0) if len(reliability) == len(parts) else None,
        sum(part.n_items for part in parts), parts[0].unit, task.over_folds, parts[0].units, tuple(parts),
    )  # fmt: skip
