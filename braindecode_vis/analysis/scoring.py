"""The table of scores of a run: retrieval and reconstruction, system and controls, with chance and intervals.

Owns which metric is asked of which method. Everything comes as plain arrays: predictions with their galleries,
and images row by row. Statistics are those of `braindecode_vis.metrics`; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Embeddings, Score
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.identification import (
    classification_accuracy,
    compute_correlations,
    identify_from_scores,
)
from braindecode_vis.metrics.image import compute_image_metric
from braindecode_vis.metrics.score import compute_chance, make_score
from braindecode_vis.metrics.uncertainty import (
    PermutationResult,
    make_rank_table,
    make_top_k_table,
    make_two_way_table,
    permutation_test,
)
from braindecode_vis.retrieval import (
    Retrieval,
    compute_k_way_hits,
    compute_reciprocal_ranks,
    compute_similarity,
    compute_top_k_hits,
)

K_WAY = (2, 4, 10, 50, 100)
LARGEST_TABLE = 4_000_000  # cells of a query-by-gallery table that is permuted
LARGEST_SSIM_TABLE = 10_000_000  # pixels of all image pairs whose SSIM is computed for a null
SMALLEST_SSIM = 11  # pixels, the window of the metric
SMALLEST_425 = 200  # pixels
POOLED = "all"


@dataclass(frozen=True)
class ScoringTask:
    """What is to be scored.

    Parameters
    ----------
    retrievals
        Predictions, gallery and ranks of each fold; their rows in order are the rows below.
    seen : uint8 array of shape (n_rows, height, width, 3)
    images
        Method to uint8 images of the shape of `seen`.
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
    """

    retrievals: Sequence[tuple[Embeddings, Embeddings, Retrieval]]
    seen: np.ndarray
    images: dict[str, np.ndarray]
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

    def __post_init__(self) -> None:
        rows = np.concatenate([predicted.ids for predicted, _, _ in self.retrievals])
        if len(rows) != len(self.ids) or (rows != self.ids).any():
            raise DataError("retrieval and reconstruction list different test items; run both again.")

    @property
    def n_steps(self) -> int:
        """Number of calls of `advance` to expect."""
        return len(self.groups) * (len(self.images) + 1)

    @cached_property
    def groups(self) -> list[tuple[str, np.ndarray]]:
        """Name and rows of each subject, and of all of them if there are several."""
        names = sorted(set(self.subjects.tolist()))
        groups = [(str(name), np.flatnonzero(self.subjects == name)) for name in names]
        return groups if len(groups) == 1 else [*groups, (POOLED, np.arange(len(self.ids)))]

    @cached_property
    def folds(self) -> np.ndarray:
        """Fold of each row."""
        return np.repeat(
            np.arange(len(self.retrievals)), [len(predicted) for predicted, _, _ in self.retrievals]
        )

    @cached_property
    def tables(self) -> list[np.ndarray | None]:
        """Similarity of the queries of each fold to its gallery; None where it would be too large."""
        return [
            compute_similarity(predicted, gallery) if len(predicted) * len(gallery) <= LARGEST_TABLE else None
            for predicted, gallery, _ in self.retrievals
        ]


def compute_scores(
    task: ScoringTask, *, advance: Callable[[int], None] = lambda n: None
) -> tuple[list[Score], pd.DataFrame]:
    """Score a task.

    Returns
    -------
    scores
        Method ``decoded`` first within each metric, then the controls; one block per subject.
    items : DataFrame of n_rows rows
        The decoded system's value of every metric for every item.
    """
    scores: list[Score] = []
    items = pd.DataFrame({"stimulus_id": task.ids, "concept": task.concepts, "subject": task.subjects})
    items["rank"] = np.concatenate([retrieval.ranks for _, _, retrieval in task.retrievals])
    items["gallery_size"] = np.concatenate(
        [np.full(r.n_queries, r.gallery_size) for _, _, r in task.retrievals]
    )
    features = _encode_images(task)
    for subject, rows in task.groups:
        context = _Context(task, subject, rows)
        scores += [*_score_retrieval(context), *_score_classes(context)]
        advance(1)
        for method, images in task.images.items():
            if method == "shuffled":  # shown in the gallery; its scores are those of the permutation null
                advance(1)
                continue
            for score, values in _score_images(context, method, images[rows]):
                scores.append(score)
                if score.method == "decoded" and subject != POOLED:
                    items.loc[rows, score.metric] = values
            if features is not None:
                scores += _score_features(context, method, features["seen"][rows], features[method][rows])
            advance(1)
    return scores, items


class _Context:
    """The rows of one subject and what every score of theirs shares."""

    def __init__(self, task: ScoringTask, subject: str, rows: np.ndarray) -> None:
        self.task, self.subject, self.rows = task, subject, rows
        self.ids, self.concepts = task.ids[rows], task.concepts[rows]
        self.columns, self.truth = np.unique(self.ids.astype(str), return_inverse=True)
        self.first = np.array([int(np.flatnonzero(self.truth == c)[0]) for c in range(len(self.columns))])

    def score(self, values: np.ndarray, metric: str, method: str, **details: Any) -> Score:
        """Return the score of one value per row."""
        task = self.task
        pooled = task.subjects[self.rows] if self.subject == POOLED else None
        if details.get("statistic") == "median":
            pooled = None
        if method == "decoded":
            details["noise_ceiling"] = task.ceilings.get(metric)
        return make_score(
            values, metric=metric, method=method, protocol=task.protocol, subject=self.subject, split=task.split,
            seed=task.seed, stimulus_ids=[str(i) for i in self.ids], subjects=pooled, n_boot=task.n_bootstrap,
            **details,
        )  # fmt: skip

    def score_shuffled(
        self, null: PermutationResult, metric: str, n_queries: int, *, gallery_size: int | None = None
    ) -> Score:
        """Return the score of one brain whose rows are shuffled, its interval that of all shuffles."""
        task = self.task
        return Score(
            method="shuffled", metric=metric, value=float(null.null[0]), chance=null.null_mean, n_queries=n_queries,
            protocol=task.protocol, subject=self.subject, split=task.split, seed=task.seed,
            ci_low=null.null_low, ci_high=null.null_high, gallery_size=gallery_size,
        )  # fmt: skip

    def permute(
        self, table: np.ndarray, *, groups: Any = None, alternative: Any = "greater"
    ) -> PermutationResult:
        """Test a table of rows by distinct stimuli."""
        return permutation_test(
            table, truth=self.truth, groups=groups, alternative=alternative,
            n_permutations=self.task.n_permutations, seed=self.task.seed,
        )  # fmt: skip


def _score_retrieval(context: _Context) -> Iterator[Score]:
    task = context.task
    parts = []
    for fold, (_, _, retrieval) in enumerate(task.retrievals):
        local = context.rows[task.folds[context.rows] == fold] - int(np.flatnonzero(task.folds == fold)[0])
        if len(local):
            parts.append((retrieval, local, task.tables[fold]))
    sizes = {retrieval.gallery_size for retrieval, _, _ in parts}
    smallest, common = min(sizes), (sizes.pop() if len(sizes) == 1 else None)

    def collect(compute: Callable[[Retrieval], np.ndarray]) -> np.ndarray:
        return np.concatenate([compute(retrieval)[local] for retrieval, local, _ in parts])

    def chance(metric: str) -> float:
        weights = [len(local) for _, local, _ in parts]
        levels = [compute_chance(metric, gallery_size=retrieval.gallery_size) for retrieval, _, _ in parts]
        return float(np.average(levels, weights=weights))

    def both(
        metric: str,
        compute: Callable[[Retrieval], np.ndarray],
        tabulate: Callable[[np.ndarray], np.ndarray] | None = None,
        **details: Any,
    ) -> Iterator[Score]:
        level = chance(metric)
        null = None if tabulate is None else _permute_retrieval(context, parts, tabulate, metric)
        yield context.score(
            collect(compute), metric, "decoded", chance=level, gallery_size=common,
            p_value=None if null is None else null.p_value, **details,
        )  # fmt: skip
        if null is not None:
            yield context.score_shuffled(null, metric, len(context.rows), gallery_size=common)

    for k in (1, 5):
        if k < smallest:
            yield from both(
                f"top{k}",
                lambda r, k=k: compute_top_k_hits(r, k).astype(float),
                lambda t, k=k: make_top_k_table(t, k),
            )
    for k in K_WAY:
        if 2 <= k < smallest:
            yield from both(f"{k}_way", lambda r, k=k: compute_k_way_hits(r, k))
    yield from both("mean_reciprocal_rank", compute_reciprocal_ranks)
    yield from both("mean_rank", lambda r: r.ranks, make_rank_table)
    yield from both("median_rank", lambda r: r.ranks, statistic="median")


def _permute_retrieval(
    context: _Context,
    parts: list[tuple[Retrieval, np.ndarray, np.ndarray | None]],
    tabulate: Callable[[np.ndarray], np.ndarray],
    metric: str,
) -> PermutationResult | None:
    """Permute stimuli over the queries of all folds that share a gallery; None where nothing can be permuted."""
    task = context.task
    alternative: Any = "less" if "rank" in metric and "reciprocal" not in metric else "greater"
    galleries = {tuple(retrieval.gallery_ids) for retrieval, _, _ in parts}
    groups = [parts] if len(galleries) == 1 else [[part] for part in parts]
    results, weights, n_shown = [], [], 0
    for number, group in enumerate(groups):
        tables = [tabulate(similarity[local]) for _, local, similarity in group if similarity is not None]
        if len(tables) < len(group):
            return None
        names = np.concatenate([retrieval.query_ids[local] for retrieval, local, _ in group])
        position = pd.Index(group[0][0].gallery_ids).get_indexer(pd.Index(names))
        n_shown = max(n_shown, len(np.unique(position)))
        results.append(
            permutation_test(
                np.concatenate(tables), truth=position, alternative=alternative,
                n_permutations=task.n_permutations, seed=task.seed + number,
            )
        )  # fmt: skip
        weights.append(len(position))
    if n_shown < 2:
        return None
    return _pool_permutations(results, np.array(weights) / sum(weights), alternative)


def _pool_permutations(
    results: list[PermutationResult], weights: np.ndarray, alternative: Any
) -> PermutationResult:
    """Return the null of the weighted mean of independent permutation tests."""
    null = weights @ np.stack([result.null for result in results])
    observed = float(weights @ [result.observed for result in results])
    slack = 1e-12 * max(1.0, abs(observed))
    extreme = null >= observed - slack if alternative == "greater" else null <= observed + slack
    low, high = (float(q) for q in np.quantile(null, [0.025, 0.975]))
    mean = float(weights @ [result.null_mean for result in results])
    p_value = float((extreme.sum() + 1) / (len(null) + 1))
    return PermutationResult(observed, mean, low, high, p_value, alternative, null)


def _score_classes(context: _Context) -> Iterator[Score]:
    decoded = context.task.decoded_concepts
    if decoded is None:
        return
    own = decoded[context.rows]
    names = context.concepts[context.first]
    null = context.permute((own[:, None] == names[None]).astype(float)) if len(names) > 1 else None
    yield context.score(
        classification_accuracy(own, context.concepts), "accuracy", "decoded",
        chance=1 / len(set(context.concepts.tolist())) if null is None else null.null_mean,
        p_value=None if null is None else null.p_value,
    )  # fmt: skip


def _score_images(context: _Context, method: str, images: np.ndarray) -> Iterator[tuple[Score, np.ndarray]]:
    seen = context.task.seen[context.rows]
    distinct = seen[context.first]
    correlations = compute_correlations(images, distinct)  # (n_rows, n_stimuli)
    errors = _compute_errors(images, distinct)
    own = np.arange(len(images)), context.truth

    for metric, table, alternative in (
        ("pixcorr", correlations, "greater"),
        ("mse", errors, "less"),
        # A table of all pairs is dear, so only the system under test gets a permutation null of it.
        ("ssim", _tabulate_ssim(images, distinct) if method == "decoded" else None, "greater"),
    ):
        if table is not None:
            null = context.permute(table, alternative=alternative) if len(distinct) > 1 else None
            level, p_value = (None, None) if null is None else (null.null_mean, null.p_value)
            yield context.score(table[own], metric, method, chance=level, p_value=p_value), table[own]
            if method == "decoded" and null is not None:
                yield context.score_shuffled(null, metric, len(images)), table[own]
        elif min(seen.shape[1:3]) >= SMALLEST_SSIM:
            yield _score_pairs(context, method, "ssim@native", "ssim", seen, images)
    # Enlarged thumbnails compare the smoothness of the resize, not the images.
    for metric in ("pixcorr@425", "ssim@425") if min(seen.shape[1:3]) >= SMALLEST_425 else ():
        yield _score_pairs(context, method, metric, metric, seen, images)
    if len(distinct) > 1:
        yield from _score_identification(context, method, correlations, "")


def _score_pairs(
    context: _Context, method: str, protocol: str, metric: str, seen: np.ndarray, images: np.ndarray
) -> tuple[Score, np.ndarray]:
    """Score each image against its own stimulus; chance is its mean against the next stimulus."""
    values, level = compute_image_metric(protocol, seen, images), None
    if len(context.columns) > 1:
        following = np.roll(context.first, -1)[context.truth]
        level = float(compute_image_metric(protocol, seen[following], images).mean())
    return context.score(values, metric, method, chance=level), values


def _score_identification(
    context: _Context, method: str, similarity: np.ndarray, suffix: str
) -> Iterator[tuple[Score, np.ndarray]]:
    size = len(context.columns)
    yield from _score_two_way(
        context, method, make_two_way_table(similarity), f"two_way_identification{suffix}"
    )
    square = similarity[:, context.truth]
    ids = context.ids
    for n in (10, 50):
        if n < size:
            values = identify_from_scores(square, n, ids=ids)
            metric = f"{n}_way_identification{suffix}"
            yield context.score(values, metric, method, gallery_size=size), values
    names = context.concepts[context.first]
    counts = pd.Series(names).value_counts()
    if len(counts) > 1 and counts.min() > 1:
        table = make_two_way_table(similarity, groups=list(names))
        metric = f"two_way_identification_within_class{suffix}"
        yield from _score_two_way(context, method, table, metric, groups=list(names))


def _score_two_way(
    context: _Context, method: str, table: np.ndarray, metric: str, *, groups: list[Any] | None = None
) -> Iterator[tuple[Score, np.ndarray]]:
    values, size = table[np.arange(len(table)), context.truth], len(context.columns)
    null = context.permute(table, groups=groups)
    yield context.score(values, metric, method, gallery_size=size, p_value=null.p_value), values
    if method == "decoded":
        yield context.score_shuffled(null, metric, len(table), gallery_size=size), values


def _compute_errors(images: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """Return the mean squared error of every image against every stimulus, values in 0..1."""
    left = images.reshape(len(images), -1).astype(np.float64) / 255
    right = distinct.reshape(len(distinct), -1).astype(np.float64) / 255
    squared = (left**2).sum(1)[:, None] - 2 * left @ right.T + (right**2).sum(1)[None]
    return np.maximum(squared, 0) / left.shape[1]


def _tabulate_ssim(images: np.ndarray, distinct: np.ndarray) -> np.ndarray | None:
    """Return the SSIM of every image against every stimulus, or None if that is too much work."""
    n, m = len(images), len(distinct)
    if min(images.shape[1:3]) < SMALLEST_SSIM or n * m * images[0, ..., 0].size > LARGEST_SSIM_TABLE:
        return None
    table = np.empty((n, m))
    for column in range(m):
        table[:, column] = compute_image_metric(
            "ssim@native", np.repeat(distinct[column : column + 1], n, axis=0), images
        )
    return table


def _score_features(context: _Context, method: str, seen: np.ndarray, made: np.ndarray) -> list[Score]:
    similarity = compute_correlations(made, seen[context.first])
    metric = f"two_way_identification@{context.task.feature_name}"
    return [score for score, _ in _score_two_way(context, method, make_two_way_table(similarity), metric)]


def _encode_images(task: ScoringTask) -> dict[str, np.ndarray] | None:
    """Return the features of seen and made images, each distinct image encoded once."""
    if task.feature_encoder is None:
        return None
    stacks = {"seen": task.seen, **task.images}
    everything = np.concatenate(list(stacks.values()))
    distinct, inverse = np.unique(everything.reshape(len(everything), -1), axis=0, return_inverse=True)
    features = task.feature_encoder.encode(distinct.reshape(-1, *task.seen.shape[1:]))[inverse.ravel()]
    return dict(zip(stacks, np.split(features, len(stacks)), strict=True))
