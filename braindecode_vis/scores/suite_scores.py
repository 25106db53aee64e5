"""Scores of the metric suite for every group and method of a task, network by network.

A network is loaded once, sees each distinct image once and is let go before the next one comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from braindecode_vis.arrays import Score
from braindecode_vis.metrics.image_table import ImageTable, make_image_table, split_rounds
from braindecode_vis.metrics.semantic import name_semantic_metric
from braindecode_vis.metrics.suite import (
    MetricSuite,
    Network,
    classify,
    list_pixel_metrics,
    name_comparison,
    name_lpips,
    tabulate_semantic,
)
from braindecode_vis.scores.image_scores import SMALLEST_425, score_identification, score_pairs
from braindecode_vis.scores.scoring_task import POOLED, Context, Group, ScoringTask, average

Rows = dict[tuple[int, str], list[tuple[Score, np.ndarray]]]


def score_suite(
    task: ScoringTask, contexts: Sequence[Context], *, advance: Callable[[int], None] = lambda n: None
) -> Rows:
    """Return the scores of the suite, with one value per row of the group.

    Parameters
    ----------
    task
        Its suite says which rows are computed.
    contexts
        The groups.
    advance
        Called once per network and once for the classifier.

    Returns
    -------
    dict
        (number of the group, method) to scores with their values, in the order of the suite.
    """
    found: Rows = defaultdict(list)
    if task.suite is None:
        return found
    suite = task.suite
    table = make_image_table(
        task.seen, {name: made for name, made in task.images.items() if name != "shuffled"}
    )
    places = [(number, method) for number in range(len(contexts)) for method in table.made]
    for number, method in places:
        found[number, method] += _score_pixels(contexts[number], method, suite)
    for network in suite.available:
        if network.startswith("lpips_"):
            distances, mismatched = _compute_lpips(
                suite, network, table, Context(task, Group(POOLED, None, np.arange(len(task.ids))))
            )
            for number, method in places:
                found[number, method].append(
                    _score_distances(
                        contexts[number], method, name_lpips(network), distances[method], mismatched
                    )
                )
        else:
            for space, matrix in suite.correlate(network, table).items():
                metric, is_two_way = name_comparison(network, space)
                for number, method in places:
                    similarities = _select(contexts[number], matrix, table, method)
                    found[number, method] += _score_space(
                        contexts[number], method, metric, similarities, is_two_way
                    )
        advance(1)
    if suite.config.semantic_ways:
        logits = classify(table)
        for method in table.made:
            tables = tabulate_semantic(table, method, suite.config.semantic_ways, logits)
            for number, context in enumerate(contexts):
                for n, rounds in tables.items():
                    own = [one[context.rows][:, table.column[context.rows][context.first]] for one in rounds]
                    metric = name_semantic_metric(n, 1, "efficientnet-lite0")
                    found[number, method] += context.score_table(method, metric, own)
    advance(1)
    return found


def _score_pixels(context: Context, method: str, suite: MetricSuite) -> Iterator[tuple[Score, np.ndarray]]:
    large = min(context.task.seen.shape[1:3]) >= SMALLEST_425  # then these rows are in every table
    rounds = split_rounds(context.task.images[method][context.rows])
    for metric in list_pixel_metrics(suite.config):
        if not large or metric not in ("pixcorr@425", "ssim@425"):
            yield from score_pairs(context, method, metric, metric, rounds)


def _select(context: Context, matrix: np.ndarray, table: ImageTable, method: str) -> list[np.ndarray]:
    """Return for each round the correlations of the group's images with the group's stimuli."""
    columns = table.column[context.rows][context.first]
    return [matrix[one[context.rows]][:, columns] for one in table.made[method]]


def _score_space(
    context: Context, method: str, metric: str, similarities: list[np.ndarray], is_two_way: bool
) -> Iterator[tuple[Score, np.ndarray]]:
    if not is_two_way:
        yield from context.score_table(method, metric, [1 - one for one in similarities], "less")
    elif len(context.columns) > 1:
        yield from score_identification(context, method, similarities, metric)


def _compute_lpips(
    suite: MetricSuite, network: Network, table: ImageTable, everything: Context
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return each image's distance to its own stimulus and to the next one, method to shape (n_draws, n_rows)."""
    following = table.seen[np.roll(everything.first, -1)[everything.truth]]
    asked = {
        (name, which): np.stack([np.broadcast_to(target, rounds.shape), rounds], axis=-1)
        for name, rounds in table.made.items()
        for which, target in (("own", table.seen), ("next", following))
    }
    pairs = np.concatenate([block.reshape(-1, 2) for block in asked.values()])
    distinct, inverse = np.unique(pairs, axis=0, return_inverse=True)
    values = suite.compute_lpips(network, table.images, distinct)[inverse.ravel()]
    ends = np.cumsum([block[..., 0].size for block in asked.values()])[:-1]
    parts = {
        key: part.reshape(block.shape[:-1])
        for (key, block), part in zip(asked.items(), np.split(values, ends), strict=True)
    }
    return (
        {name: part for (name, which), part in parts.items() if which == "own"},
        {name: part for (name, which), part in parts.items() if which == "next"},
    )


def _score_distances(
    context: Context, method: str, metric: str, distances: np.ndarray, mismatched: dict[str, np.ndarray]
) -> tuple[Score, np.ndarray]:
    values = average(list(distances[:, context.rows]))
    level = float(mismatched[method][:, context.rows].mean()) if len(context.columns) > 1 else None
    return context.score(values, metric, method, chance=level), values
