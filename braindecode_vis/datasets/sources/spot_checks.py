"""A look at the samples of a file of EEG or MEG in bounded time: a few short pieces, whatever its length.

Owns what such a look can tell: values that are not finite, channels that do not move, a sampling rate that is not the
published one. What lies between the pieces is checked when trials are cut.
"""

from __future__ import annotations

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, EpochedPart

N_PIECES = 4
_PIECE_S = 1.0
_PIECE_TRIALS = 4


def sample_part(part: ContinuousPart | EpochedPart, *, sfreq: float | None = None) -> None:
    """Read a few evenly spaced pieces of a part.

    Parameters
    ----------
    sfreq
        The published sampling rate in Hz; None if there is none to compare with.

    Raises
    ------
    DataError
        If the rate is another one, the times are not evenly spaced, a value is not finite, or a channel is flat in all
        pieces; names subject, file and channels.
    """
    found = _find_rate(part)
    if sfreq is not None and found is not None and abs(found / sfreq - 1) > 1e-3:
        raise DataError(
            f"{part.where} has a sampling rate of {found:g} Hz, where {sfreq:g} Hz is published: it was resampled or "
            "is of another data set; fetch it again."
        )
    low = np.full(len(part.ch_names), np.inf)
    high = -low
    n_seen = 0
    for start, stop in _choose_pieces(part):
        # (n_trials, n_channels, n_times) -> (n_channels, n_trials * n_times)
        block = np.asarray(part.read(start, stop), dtype=np.float64)
        if isinstance(part, EpochedPart):
            block = np.moveaxis(block, 1, 0).reshape(block.shape[1], -1)
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            unit = "epochs" if isinstance(part, EpochedPart) else "samples"
            raise DataError(
                f"{part.where}: {int((~np.isfinite(block)).sum())} values are not finite in the {unit} {start} to "
                f"{stop}, channel(s) {_list(part, bad)}; repair the file, or leave the channels out."
            )
        low, high = np.minimum(low, block.min(axis=1)), np.maximum(high, block.max(axis=1))
        n_seen += block.shape[1]
    flat = np.flatnonzero(low == high)
    if n_seen > 1 and len(flat):
        raise DataError(
            f"{part.where}: the channel(s) {_list(part, flat)} are flat in {N_PIECES} pieces of the file; leave them "
            "out, or drop or interpolate them (dataset.bads)."
        )


def _find_rate(part: ContinuousPart | EpochedPart) -> float | None:
    if isinstance(part, ContinuousPart):
        return part.sfreq
    if len(part.times) < 3:
        return None
    steps = np.diff(part.times)
    if steps.min() <= 0 or np.ptp(steps) > 0.01 * np.median(steps) + 2e-3:
        raise DataError(
            f"{part.where} has times that are not evenly spaced ({steps.min():g} to {steps.max():g} s apart)."
        )
    return (len(part.times) - 1) / float(part.times[-1] - part.times[0])


def _choose_pieces(part: ContinuousPart | EpochedPart) -> list[tuple[int, int]]:
    if isinstance(part, EpochedPart):
        total, length = len(part.trials), _PIECE_TRIALS
    else:
        total, length = part.n_samples, max(2, round(_PIECE_S * part.sfreq))
    starts = np.unique(np.linspace(0, max(0, total - length), N_PIECES).astype(int))
    return [(start, min(start + length, total)) for start in starts.tolist()]


def _list(part: ContinuousPart | EpochedPart, rows: np.ndarray) -> str:
    names = [part.ch_names[row] for row in rows[:8]]
    return ", ".join(names) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
