"""Scaling of trials on disk, channel by channel, with statistics of training trials."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.cleaning_options import ScalingConfig
from braindecode_vis.preprocessing.array_file import ArrayFile
from braindecode_vis.preprocessing.cutting import BLOCK_TRIALS
from braindecode_vis.preprocessing.epochs import RobustScaler, fit_channel_zscore, fit_robust_scaler


@dataclass(frozen=True)
class Scales:
    """What was subtracted from the channels of each group of trials, and what they were divided by.

    Parameters
    ----------
    groups
        Subject, or subject and session.
    centre, scale : float32 arrays of shape (n_groups, n_channels)
    unit
        ``z``, or ``IQR`` (interquartile ranges).
    """

    groups: tuple[tuple[str, ...], ...]
    centre: np.ndarray
    scale: np.ndarray
    unit: str


def scale_trials(held: ArrayFile, target: ArrayFile, trials: pd.DataFrame, config: ScalingConfig) -> Scales:
    """Scale the trials of `held`, group by group, into the same rows of `target`, which may be the same file.

    Raises
    ------
    DataError
        If a group has no training trial.
    """
    keys = ["subject"] if config.per == "subject" else ["subject", "session"]
    is_train = trials["split"].to_numpy() == "train"
    data = np.load(held.path, mmap_mode="r", allow_pickle=False)
    groups, centres, scales = [], [], []
    for group, rows in trials.groupby(keys, sort=False).indices.items():
        name = tuple(map(str, group)) if isinstance(group, tuple) else (str(group),)
        teaching = rows[is_train[rows]]
        if not len(teaching):
            raise DataError(
                f"{' '.join(f'{k} {v}' for k, v in zip(keys, name, strict=True))} has no training trial to scale by; "
                "leave dataset.scaling out, or set dataset.scaling.per to subject."
            )
        scaler = _fit(data, np.sort(teaching), config)
        for start, stop in _iterate_runs(np.sort(rows)):
            target.write(start, scaler.apply(held.read(start, stop)))
        groups.append(name)
        centres.append(scaler.centre)
        scales.append(scaler.scale)
    unit = "z" if config.method == "zscore" else "IQR"
    return Scales(tuple(groups), np.stack(centres), np.stack(scales), unit)


def _fit(data: np.ndarray, rows: np.ndarray, config: ScalingConfig) -> RobustScaler:
    if config.method == "robust":
        return fit_robust_scaler(data, rows, clamp=config.clamp)
    score = fit_channel_zscore(data, rows)
    return RobustScaler(score.mean[:, 0], score.std[:, 0], config.clamp)


def _iterate_runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Return the bounds of blocks of neighbouring rows."""
    blocks = []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        first, last = int(run[0]), int(run[-1]) + 1
        blocks += [(start, min(start + BLOCK_TRIALS, last)) for start in range(first, last, BLOCK_TRIALS)]
    return blocks
