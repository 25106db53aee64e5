"""Scores of retrieval and of decoded classes for the rows of one group, with permutation nulls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.analysis.scoring_task import Context
from braindecode_vis.arrays import Score
from braindecode_vis.metrics.identification import classification_accuracy
from braindecode_vis.metrics.score import compute_chance
from braindecode_vis.metrics.uncertainty import (
    PermutationResult,
    make_rank_table,
    make_top_k_table,
    permutation_test,
)
from braindecode_vis.retrieval import (
    Retrieval,
    compute_k_way_hits,
    compute_reciprocal_ranks,
    compute_top_k_hits,
)

K_WAY = (2, 4, 10, 50, 100)


def score_retrieval(context: Context) -> Iterator[Score]:
    """Yield top-k, exact k-way accuracy and rank statistics of the queries, with the shuffled control."""
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
    context: Context,
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


def score_classes(context: Context) -> Iterator[Score]:
    """Yield the accuracy of the decoded class, where one was decoded."""
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
