"""Scores of images beside the seen ones, in pixels and in the features of one image encoder.

Every function takes the rounds of a method, one per draw, and averages over them; a draw is never pooled with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Score
from braindecode_vis.metrics.identification import compute_correlations
from braindecode_vis.metrics.image import compute_image_metric, tabulate_image_metric
from braindecode_vis.metrics.image_table import make_image_table, split_rounds
from braindecode_vis.metrics.pair_tables import make_identification_table
from braindecode_vis.scores.scoring_task import Context, ScoringTask, average
from braindecode_vis.seeds import make_generator

LARGEST_PAIR_TABLE = (
    500_000_000  # pixels of the image pairs that are compared for a null, half a minute of SSIM
)
SMALLEST_SSIM = 11  # pixels, the window of the metric
SMALLEST_425 = 200  # pixels


def score_images(context: Context, method: str, images: np.ndarray) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield every pixel metric of a method with its value per row.

    Parameters
    ----------
    context
        The rows.
    method
        Name in the table.
    images : uint8 array of shape (n_rows, height, width, 3) or (n_rows, n_draws, height, width, 3)
        Of these rows.
    """
    rounds = split_rounds(images)
    seen = context.task.seen[context.rows]
    distinct = seen[context.first]
    correlations = [compute_correlations(one, distinct) for one in rounds]  # (n_rows, n_stimuli) each
    yield from context.score_table(method, "pixcorr", correlations)
    yield from context.score_table(method, "mse", [_compute_errors(one, distinct) for one in rounds], "less")
    if min(seen.shape[1:3]) >= SMALLEST_SSIM:
        yield from score_pairs(context, method, "ssim@native", "ssim", rounds)
    # Enlarged thumbnails compare the smoothness of the resize, not the images.
    for metric in ("pixcorr@425", "ssim@425") if min(seen.shape[1:3]) >= SMALLEST_425 else ():
        yield from score_pairs(context, method, metric, metric, rounds)
    if len(distinct) > 1:
        yield from _score_identification(context, method, correlations)


def score_pairs(
    context: Context, method: str, protocol: str, metric: str, rounds: np.ndarray
) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield the score of each image against its own stimulus, by a metric that looks at one pair of images at a time.

    Pairs are dear, so only the system under test gets a permutation null, and only of as many pairs as
    `LARGEST_PAIR_TABLE` allows: beyond that, stimuli are permuted within random blocks of equal size, which is as valid
    as permuting all of them and a little less sensitive. The chance level of a control is its mean against the next
    stimulus.

    Parameters
    ----------
    context, method
        The rows and whose images they are.
    protocol
        Name that `compute_image_metric` knows.
    metric
        Name in the table.
    rounds : uint8 array of shape (n_draws, n_rows, height, width, 3)
        Images of these rows.
    """
    seen = context.task.seen[context.rows]
    n_stimuli = len(context.columns)
    if method == "decoded" and n_stimuli > 1:
        n_pixels = 425**2 if protocol.endswith("@425") else int(np.prod(seen.shape[1:3]))
        blocks = make_blocks(
            n_stimuli, LARGEST_PAIR_TABLE // (rounds[..., 0, 0, 0].size * n_pixels), context.task.seed
        )
        tables = [
            _tabulate_within(protocol, seen[context.first], one, context.truth, blocks) for one in rounds
        ]
        alternative = "less" if metric.startswith("mse") else "greater"
        yield from context.score_table(method, metric, tables, alternative, groups=blocks)
        return
    level = None
    values = average([compute_image_metric(protocol, seen, one) for one in rounds])
    if n_stimuli > 1:
        following = np.roll(context.first, -1)[context.truth]
        level = average([compute_image_metric(protocol, seen[following], one) for one in rounds]).mean()
    yield context.score(values, metric, method, chance=None if level is None else float(level)), values


def make_blocks(n_stimuli: int, size: int, seed: int) -> np.ndarray:
    """Return the block of each stimulus: random blocks of about `size` stimuli, at least two in each.

    Examples
    --------
    >>> np.bincount(make_blocks(10, 3, seed=0)).tolist()
    [4, 3, 3]
    """
    n_blocks = max(1, n_stimuli // max(2, size))
    labels = np.empty(n_stimuli, dtype=int)
    order = make_generator(seed, "permutation blocks").permutation(n_stimuli)
    for label, members in enumerate(np.array_split(order, n_blocks)):
        labels[members] = label
    return labels


def _tabulate_within(
    protocol: str, distinct: np.ndarray, images: np.ndarray, truth: np.ndarray, blocks: np.ndarray
) -> np.ndarray:
    """Return a metric of every image against the stimuli of its own block, (n_rows, n_stimuli); 0 elsewhere."""
    table = np.zeros((len(images), len(distinct)))
    for label in np.unique(blocks):
        columns, rows = np.flatnonzero(blocks == label), np.flatnonzero(blocks[truth] == label)
        table[np.ix_(rows, columns)] = tabulate_image_metric(protocol, distinct[columns], images[rows])
    return table


def _score_identification(
    context: Context, method: str, similarities: Sequence[np.ndarray]
) -> Iterator[tuple[Score, np.ndarray]]:
    yield from score_identification(context, method, similarities, "two_way_identification")
    for n in (10, 50):
        if n < len(context.columns):
            yield from score_identification(context, method, similarities, f"{n}_way_identification", n=n)
    names = context.concepts[context.first]
    counts = pd.Series(names).value_counts()
    if len(counts) > 1 and counts.min() > 1:
        yield from score_identification(
            context, method, similarities, "two_way_identification_within_class", groups=list(names)
        )


def score_identification(
    context: Context,
    method: str,
    similarities: Sequence[np.ndarray],
    metric: str,
    *,
    n: int = 2,
    groups: list[Any] | None = None,
) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield n-way identification from the similarity of every image to every stimulus, round by round.

    Parameters
    ----------
    context, method, metric
        Rows and names.
    similarities
        For each round an array of shape (n_rows, n_stimuli).
    n
        Number of alternatives.
    groups : list of length n_stimuli, optional
        Class of each stimulus, for identification within the class.
    """
    tables = [make_identification_table(one, n, groups=groups) for one in similarities]
    table, size = average(tables), len(context.columns)
    values, null = context.own(table), context.permute(table, groups=groups)
    yield context.score(values, metric, method, gallery_size=size, p_value=null.p_value), values
    if method == "decoded":
        yield context.score_shuffled(null, metric, len(table), gallery_size=size), values
    if n == 2:
        yield from context.score_best(method, metric, tables, "greater", groups=groups)


def _compute_errors(images: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """Return the mean squared error of every image against every stimulus, values in 0..1."""
    left = images.reshape(len(images), -1).astype(np.float64) / 255
    right = distinct.reshape(len(distinct), -1).astype(np.float64) / 255
    squared = (left**2).sum(1)[:, None] - 2 * left @ right.T + (right**2).sum(1)[None]
    return np.maximum(squared, 0) / left.shape[1]


def score_features(
    context: Context, method: str, features: dict[str, np.ndarray]
) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield two-way identification in the space of the task's image encoder.

    Parameters
    ----------
    context, method
        The rows and whose images they are.
    features
        From `encode_images`.
    """
    if len(context.columns) < 2:
        return
    seen = features["seen"][0][context.rows][context.first]
    similarities = [compute_correlations(one[context.rows], seen) for one in features[method]]
    metric = f"two_way_identification@{context.task.feature_name}"
    yield from score_identification(context, method, similarities, metric)


def encode_images(task: ScoringTask) -> dict[str, np.ndarray] | None:
    """Return features of shape (n_draws, n_rows, ...) of seen and made images, each distinct image encoded once."""
    if task.feature_encoder is None:
        return None
    table = make_image_table(task.seen, task.images)
    features = task.feature_encoder.encode(table.images)
    return {"seen": features[table.seen][None]} | {name: features[rows] for name, rows in table.made.items()}
