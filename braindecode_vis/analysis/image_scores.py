"""Scores of images beside the seen ones, in pixels and in the features of one image encoder.

Every function takes the rounds of a method, one per draw, and averages over them; a draw is never pooled with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.analysis.scoring_task import Context, ScoringTask, average
from braindecode_vis.arrays import Score
from braindecode_vis.metrics.identification import compute_correlations, identify_from_scores
from braindecode_vis.metrics.image import compute_image_metric
from braindecode_vis.metrics.image_table import make_image_table, split_rounds
from braindecode_vis.metrics.uncertainty import make_two_way_table

LARGEST_SSIM_TABLE = 10_000_000  # pixels of all image pairs whose SSIM is computed for a null
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
    # A table of all pairs is dear, so only the system under test gets a permutation null of it.
    tables = _tabulate_ssim(rounds, distinct) if method == "decoded" else None
    if tables is not None:
        yield from context.score_table(method, "ssim", tables)
    elif min(seen.shape[1:3]) >= SMALLEST_SSIM:
        yield score_pairs(context, method, "ssim@native", "ssim", rounds)
    # Enlarged thumbnails compare the smoothness of the resize, not the images.
    for metric in ("pixcorr@425", "ssim@425") if min(seen.shape[1:3]) >= SMALLEST_425 else ():
        yield score_pairs(context, method, metric, metric, rounds)
    if len(distinct) > 1:
        yield from _score_identification(context, method, correlations)


def score_pairs(
    context: Context, method: str, protocol: str, metric: str, rounds: np.ndarray
) -> tuple[Score, np.ndarray]:
    """Score each image against its own stimulus; chance is its mean against the next stimulus.

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
    seen, level = context.task.seen[context.rows], None
    values = average([compute_image_metric(protocol, seen, one) for one in rounds])
    if len(context.columns) > 1:
        following = np.roll(context.first, -1)[context.truth]
        level = average([compute_image_metric(protocol, seen[following], one) for one in rounds]).mean()
    return context.score(values, metric, method, chance=None if level is None else float(level)), values


def _score_identification(
    context: Context, method: str, similarities: Sequence[np.ndarray]
) -> Iterator[tuple[Score, np.ndarray]]:
    size = len(context.columns)
    yield from score_two_way(context, method, similarities, "two_way_identification")
    for n in (10, 50):
        if n < size:
            values = average(
                [identify_from_scores(one[:, context.truth], n, ids=context.ids) for one in similarities]
            )
            metric = f"{n}_way_identification"
            yield context.score(values, metric, method, gallery_size=size), values
    names = context.concepts[context.first]
    counts = pd.Series(names).value_counts()
    if len(counts) > 1 and counts.min() > 1:
        yield from score_two_way(
            context, method, similarities, "two_way_identification_within_class", groups=list(names)
        )


def score_two_way(
    context: Context,
    method: str,
    similarities: Sequence[np.ndarray],
    metric: str,
    *,
    groups: list[Any] | None = None,
) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield two-way identification from the similarity of every image to every stimulus, round by round.

    Parameters
    ----------
    context, method, metric
        Rows and names.
    similarities
        For each round an array of shape (n_rows, n_stimuli).
    groups : list of length n_stimuli, optional
        Class of each stimulus, for identification within the class.
    """
    tables = [make_two_way_table(one, groups=groups) for one in similarities]
    table, size = average(tables), len(context.columns)
    values, null = context.own(table), context.permute(table, groups=groups)
    yield context.score(values, metric, method, gallery_size=size, p_value=null.p_value), values
    if method == "decoded":
        yield context.score_shuffled(null, metric, len(table), gallery_size=size), values
    yield from context.score_best(method, metric, tables, "greater", groups=groups)


def _compute_errors(images: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """Return the mean squared error of every image against every stimulus, values in 0..1."""
    left = images.reshape(len(images), -1).astype(np.float64) / 255
    right = distinct.reshape(len(distinct), -1).astype(np.float64) / 255
    squared = (left**2).sum(1)[:, None] - 2 * left @ right.T + (right**2).sum(1)[None]
    return np.maximum(squared, 0) / left.shape[1]


def _tabulate_ssim(rounds: np.ndarray, distinct: np.ndarray) -> list[np.ndarray] | None:
    """Return the SSIM of every image against every stimulus, or None if that is too much work."""
    n, m = rounds.shape[1], len(distinct)
    work = rounds.shape[0] * n * m * rounds[0, 0, ..., 0].size
    if min(rounds.shape[2:4]) < SMALLEST_SSIM or work > LARGEST_SSIM_TABLE:
        return None
    tables = []
    for images in rounds:
        table = np.empty((n, m))
        for column in range(m):
            table[:, column] = compute_image_metric(
                "ssim@native", np.repeat(distinct[column : column + 1], n, axis=0), images
            )
        tables.append(table)
    return tables


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
    yield from score_two_way(context, method, similarities, metric)


def encode_images(task: ScoringTask) -> dict[str, np.ndarray] | None:
    """Return features of shape (n_draws, n_rows, ...) of seen and made images, each distinct image encoded once."""
    if task.feature_encoder is None:
        return None
    table = make_image_table(task.seen, task.images)
    features = task.feature_encoder.encode(table.images)
    return {"seen": features[table.seen][None]} | {name: features[rows] for name, rows in table.made.items()}
