"""The table of scores of a run: retrieval and reconstruction, system and controls, with chance and intervals.

Owns which metric is asked of which method, and the scores of retrieval, of decoded classes and of embeddings beside
their targets. Everything comes as plain arrays: predictions with their galleries, and images row by row. Statistics are
those of `braindecode_vis.scoring.uncertainty`; nothing is fitted here. `score_retrieval` gives the rows of top-k, and
`_permute_retrieval` their p-values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.scoring.image_scores import encode_images, score_features, score_images, score_suite
from braindecode_vis.scoring.metrics.identification import (
    Order,
    classification_accuracy,
    count_order,
    leave_out_images,
)
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric, tabulate_items
from braindecode_vis.scoring.refits import Refits
from braindecode_vis.scoring.retrieval import Retrieval
from braindecode_vis.scoring.score_row import POOLED
from braindecode_vis.scoring.scoring_task import LARGEST_TABLE, ScoredGroup, ScoringTask, cross_labels
from braindecode_vis.scoring.uncertainty import (
    PermutationResult,
    compute_p_value,
    permutation_test_folds,
    widen_null,
)

K_WAY = (2, 4, 10, 50, 100)
RANK_METRICS = ("mean_reciprocal_rank", "mean_rank", "median_rank")


def compute_scores(
    task: ScoringTask,
    *,
    advance: Callable[[int], None] = lambda n: None,
    differences: list[dict[str, Any]] | None = None,
) -> tuple[list[Score], pd.DataFrame]:
    """Score a task.

    Parameters
    ----------
    task
        What is scored.
    advance
        Called with the number of steps done.
    differences
        Is given, if it is there, the paired difference of the decoded system to every control; see
        `ScoredGroup.compare`.

    Returns
    -------
    scores
        Method ``decoded`` first within each metric, then the controls; one block per subject.
    items : DataFrame of n_rows rows
        The decoded system's value of every metric for every item, draws averaged. Ties share the mean `rank`, and are
        lost in `worst_rank`, which decides top-k.
    """
    scores: list[Score] = []
    items = pd.DataFrame({"stimulus_id": task.ids, "concept": task.concepts, "subject": task.subjects})
    if task.folding is not None:
        items["fold"] = task.fold_numbers
    ranked = [retrieval for _, _, retrieval in task.retrievals]
    if ranked:
        items["rank"] = np.concatenate([retrieval.ranks for retrieval in ranked])
        items["worst_rank"] = np.concatenate([retrieval.worst_ranks for retrieval in ranked])
        items["gallery_size"] = np.concatenate([np.full(r.n_queries, r.gallery_size) for r in ranked])
    features = encode_images(task)  # before the groups, so that each distinct image is encoded once
    scored_groups = [ScoredGroup(task, group) for group in task.groups]
    of_suite = score_suite(task, scored_groups, advance=advance)
    for number, (group, scored) in enumerate(zip(task.groups, scored_groups, strict=True)):
        kept = group.condition is None and group.subject != POOLED
        known: dict[str, dict[str, np.ndarray]] = {}  # values per row, by metric and method

        if ranked:
            _keep(score_retrieval(scored), scores, known)
        scores += score_classes(scored)
        columns = _keep(score_embeddings(scored), scores, known)
        advance(1)
        for method in task.images:
            if method == "shuffled":  # shown in the gallery; its scores are those of the permutation null
                advance(1)
                continue
            columns += _keep(score_images(scored, method), scores, known)
            columns += _keep(of_suite.get((number, method), []), scores, known)
            if features is not None:
                _keep(score_features(scored, method, features), scores, known)
            advance(1)
        if kept:
            for metric in columns:
                items.loc[group.rows, metric] = known[metric]["decoded"]
        if differences is not None:
            differences += scored.compare(known)
    return scores, items


def _keep(
    found: Iterable[tuple[Score, np.ndarray]], scores: list[Score], known: dict[str, dict[str, np.ndarray]]
) -> list[str]:
    """Add scores and their values per row to what is known; return the metrics of the decoded system among them."""
    metrics = []
    for score, values in found:
        scores.append(score)
        if score.method == "shuffled":  # the values beside it are those of the decoded system
            continue
        known.setdefault(score.metric, {})[score.method] = values
        if score.method == "decoded":
            metrics.append(score.metric)
    return metrics


class _Part(NamedTuple):
    """The rows of a group that one fold retrieved: ranks, their places in it, and the order of its similarities."""

    fold: int
    retrieval: Retrieval
    local: np.ndarray
    order: Order | None


def score_retrieval(scored: ScoredGroup) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield top-k, exact k-way accuracy and rank statistics with one value per query, and the controls of each."""
    task = scored.task
    parts = []
    for fold, (_, _, retrieval) in enumerate(task.retrievals):
        local = scored.rows[task.folds[scored.rows] == fold] - int(np.flatnonzero(task.folds == fold)[0])
        if len(local):
            similarity = task.tables[fold]
            parts.append(
                _Part(fold, retrieval, local, None if similarity is None else count_order(similarity[local]))
            )
    # Folds may have galleries of different sizes; a common one is named in the row, otherwise none.
    sizes = {part.retrieval.gallery_size for part in parts}
    smallest, common = min(sizes), (sizes.pop() if len(sizes) == 1 else None)
    names = [f"top{k}" for k in (1, 5) if k < smallest]
    names += [f"{k}_way" for k in K_WAY if k < smallest]
    for name in [*names, *RANK_METRICS]:
        metric, n, *_ = find_metric(name)
        assert metric.compare is not None
        values = np.concatenate([metric.compare(part.retrieval, n)[part.local] for part in parts])
        levels = [compute_chance(name, gallery_size=part.retrieval.gallery_size) for part in parts]
        null = _permute_retrieval(scored, parts, name)
        chance = float(np.average(levels, weights=[len(part.local) for part in parts]))
        # Training images in the gallery push the true one back, so that the level is that of the null.
        if null is not None and task.folding is not None and task.folding.remembered:
            chance = null.null_mean
        details: dict[str, Any] = {"gallery_size": common, "statistic": metric.statistic, "chance": chance}
        left_out, orders = None, [part.order for part in parts if part.order is not None]
        if name.endswith("_way") and scored.leaves_images_out and len(orders) == len(parts):
            truths = [
                pd.Index(part.retrieval.gallery_ids).get_indexer(part.retrieval.query_ids[part.local])
                for part in parts
            ]
            galleries = [part.retrieval.gallery_ids for part in parts]
            left_out = leave_out_images(orders, truths, galleries, n, ties="shared")
        p_value = None if null is None else null.p_value
        score = scored.score(
            values.astype(float), name, "decoded", p_value=p_value, left_out=left_out, **details
        )
        yield score, values
        if null is not None:
            yield scored.score_shuffled(null, name, len(scored.rows), gallery_size=common), values
        if task.design:
            found = [metric.compare(task.design[part.fold], n)[part.local] for part in parts]
            blind = np.concatenate(found).astype(float)
            yield scored.score(blind, name, "design", **details), blind


def _permute_retrieval(scored: ScoredGroup, parts: list[_Part], name: str) -> PermutationResult | None:
    """Permute stimuli over the queries of all folds that share a gallery; None if nothing can be permuted.

    After folds that train each other the null is that of refits, or else that of permutations within folds, widened.
    """
    task, (metric, n, *_) = scored.task, find_metric(name)
    assert metric.tabulate is not None
    if scored.over_folds and task.folding is not None and task.folding.refits is not None:
        return _judge_refits(scored, task.folding.refits, parts, name)
    if not scored.can_permute:
        return None
    galleries = {tuple(part.retrieval.gallery_ids) for part in parts}
    groups = [parts] if len(galleries) == 1 else [[part] for part in parts]
    tables, truths = [], []
    for group in groups:
        known = [metric.tabulate(part.order, n) for part in group if part.order is not None]
        if len(known) < len(group):
            return None
        # Queries of several folds that rank one gallery share its columns, so their tables are one.
        names = np.concatenate([part.retrieval.query_ids[part.local] for part in group])
        tables.append(np.concatenate(known))
        truths.append(pd.Index(group[0].retrieval.gallery_ids).get_indexer(pd.Index(names)))
    if max(len(np.unique(truth)) for truth in truths) < 2:
        return None
    classes = [scored.find_classes(group[0].retrieval.gallery_ids) for group in groups]
    if scored.column_folds is not None:
        fold_of = dict(zip(scored.columns.tolist(), scored.column_folds.tolist(), strict=True))
        for number, group in enumerate(groups):
            folds = [fold_of.get(str(name), -1) for name in group[0].retrieval.gallery_ids]
            classes[number] = cross_labels(classes[number], folds)
    found = permutation_test_folds(
        tables, truths, groups=classes, alternative=metric.alternative, n_permutations=task.n_permutations,
        seed=task.seed, statistic=metric.statistic,
    )  # fmt: skip
    return widen_null(found) if scored.over_folds else found


def _judge_refits(scored: ScoredGroup, refits: Refits, parts: list[_Part], name: str) -> PermutationResult:
    """Return a metric of retrieval beside its values after refits on relabelled images."""
    metric, n, *_ = find_metric(name)
    assert metric.compare is not None
    own = np.concatenate([metric.compare(part.retrieval, n)[part.local] for part in parts])
    # The trials of the parts, in their order, are the rows of the group.
    sizes = np.concatenate([np.full(len(part.local), part.retrieval.gallery_size) for part in parts])
    null = refits.score(metric, n, scored.rows, sizes)
    observed = float(np.median(own) if metric.statistic == "median" else np.mean(own))
    low, high = np.quantile(null, [0.025, 0.975])
    p_value = float(compute_p_value(observed, null, alternative=metric.alternative))
    return PermutationResult(
        observed, float(null.mean()), float(low), float(high), p_value, metric.alternative, null
    )


def score_embeddings(scored: ScoredGroup) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield the metrics of predictions beside their targets that the task asks for, with one value per row.

    Each fold has a space of its own (its training images decide the centre), so stimuli are permuted within folds.
    """
    task = scored.task
    for name in task.list_asked("embeddings"):
        metric = find_metric(name).metric
        tables, truths, classes = [], [], []
        for fold, (queries, gallery, _) in enumerate(task.retrievals):
            local = scored.rows[task.folds[scored.rows] == fold] - int(np.flatnonzero(task.folds == fold)[0])
            if not len(local):
                continue
            own = queries.take(local)
            stimuli, truth = np.unique(own.ids.astype(str), return_inverse=True)
            target = gallery.select(list(stimuli))
            if len(own) * len(target) > LARGEST_TABLE:
                raise DataError(
                    f"{name} compares {len(own)} predictions with {len(target)} targets, more than {LARGEST_TABLE:,} "
                    "pairs; remove it from evaluation.metrics."
                )
            tables.append(tabulate_items(metric, own.flat(), target.flat()))
            truths.append(truth)
            classes.append(scored.find_classes(stimuli))
        values = np.concatenate(
            [table[np.arange(len(table)), truth] for table, truth in zip(tables, truths, strict=True)]
        )
        if max(len(np.unique(truth)) for truth in truths) < 2:
            yield scored.score(values, name, "decoded", chance=None), values
            continue
        null = permutation_test_folds(
            tables, truths, groups=classes, alternative=metric.alternative, n_permutations=task.n_permutations,
            seed=task.seed,
        )  # fmt: skip
        null = widen_null(null) if scored.over_folds else null
        score = scored.score(values, name, "decoded", chance=null.null_mean, p_value=null.p_value)
        yield score, values
        yield scored.score_shuffled(null, name, len(values)), values


def score_classes(scored: ScoredGroup) -> Iterator[Score]:
    """Yield the accuracy of the decoded class, where one was decoded."""
    decoded = scored.task.decoded_concepts
    if decoded is None:
        return
    own = decoded[scored.rows]
    names = scored.concepts[scored.first]
    null = scored.permute((own[:, None] == names[None]).astype(float)) if scored.can_permute else None
    yield scored.score(
        classification_accuracy(own, scored.concepts), "accuracy", "decoded",
        chance=1 / len(set(scored.concepts.tolist())) if null is None else null.null_mean,
        p_value=None if null is None else null.p_value,
    )  # fmt: skip
