"""Scores of retrieval and of decoded classes for the rows of one group, with permutation nulls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Score
from braindecode_vis.metrics.identification import classification_accuracy
from braindecode_vis.metrics.pair_tables import (
    Order,
    count_order,
    make_k_way_table,
    make_rank_table,
    make_reciprocal_rank_table,
    make_top_k_table,
)
from braindecode_vis.metrics.score import compute_chance
from braindecode_vis.metrics.uncertainty import PermutationResult, permutation_test_folds
from braindecode_vis.retrieval import (
    Retrieval,
    compute_k_way_hits,
    compute_reciprocal_ranks,
    compute_top_k_hits,
)
from braindecode_vis.scores.scoring_task import Context

K_WAY = (2, 4, 10, 50, 100)


def score_retrieval(context: Context) -> Iterator[Score]:
    """Yield top-k, exact k-way accuracy and rank statistics of the queries, with the shuffled control."""
    task = context.task
    parts = []
    for fold, (_, _, retrieval) in enumerate(task.retrievals):
        local = context.rows[task.folds[context.rows] == fold] - int(np.flatnonzero(task.folds == fold)[0])
        if len(local):
            similarity = task.tables[fold]
            parts.append((retrieval, local, None if similarity is None else count_order(similarity[local])))
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
        tabulate: Callable[[Order], np.ndarray],
        **details: Any,
    ) -> Iterator[Score]:
        level = chance(metric)
        null = _permute_retrieval(context, parts, tabulate, metric)
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
            yield from both(
                f"{k}_way", lambda r, k=k: compute_k_way_hits(r, k), lambda t, k=k: make_k_way_table(t, k)
            )
    yield from both("mean_reciprocal_rank", compute_reciprocal_ranks, make_reciprocal_rank_table)
    yield from both("mean_rank", lambda r: r.ranks, make_rank_table)
    yield from both("median_rank", lambda r: r.ranks, make_rank_table, statistic="median")


def _permute_retrieval(
    context: Context,
    parts: list[tuple[Retrieval, np.ndarray, Order | None]],
    tabulate: Callable[[Order], np.ndarray],
    metric: str,
) -> PermutationResult | None:
    """Permute stimuli over the queries of all folds that share a gallery; None where nothing can be permuted."""
    task = context.task
    alternative: Any = "less" if "rank" in metric and "reciprocal" not in metric else "greater"
    galleries = {tuple(retrieval.gallery_ids) for retrieval, _, _ in parts}
    groups = [parts] if len(galleries) == 1 else [[part] for part in parts]
    tables, truths = [], []
    for group in groups:
        known = [tabulate(order) for _, _, order in group if order is not None]
        if len(known) < len(group):
            return None
        names = np.concatenate([retrieval.query_ids[local] for retrieval, local, _ in group])
        tables.append(np.concatenate(known))
        truths.append(pd.Index(group[0][0].gallery_ids).get_indexer(pd.Index(names)))
    if max(len(np.unique(truth)) for truth in truths) < 2:
        return None
    return permutation_test_folds(
        tables, truths, alternative=alternative, n_permutations=task.n_permutations, seed=task.seed,
        statistic="median" if metric == "median_rank" else "mean",
    )  # fmt: skip


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
