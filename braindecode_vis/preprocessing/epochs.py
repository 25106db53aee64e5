"""From continuous EEG or MEG to trials: cutting with anti-aliased decimation, cleaning, scaling.

The sampling rate is lowered while cutting: a short symmetric filter is evaluated only at the samples that are kept,
and these lie at exactly the times asked for, whatever sample an event fell on. The filter is finite, so that it sees
half its length around an epoch and nothing else. What MNE does well (filters, reference, bad channels) is left to it.
Statistics are fitted on the rows that the caller names: training trials. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.arrays import Responses
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.preprocessing.scaling import ZScore

if TYPE_CHECKING:
    import mne

_TILE = 32  # output samples per row of the decimating matrix product
_BLOCK_BYTES = 64 << 20


@lru_cache(maxsize=16)
def make_antialias_filter(decim: int) -> np.ndarray:
    """Return the symmetric low-pass filter before taking every `decim`-th sample, shape (20 * decim + 1,).

    Half amplitude at the new Nyquist frequency; flat to 0.1 % up to 80 % of it, and below 0.1 % from 120 % on (a
    Kaiser window of beta 6). The gain at 0 Hz is one. From 1000 to 250 Hz: flat to 100 Hz, 81 samples long.

    Examples
    --------
    >>> make_antialias_filter(4).shape
    (81,)
    """
    from scipy.signal import firwin

    if decim == 1:
        return np.ones(1)
    return firwin(20 * decim + 1, 1 / decim, window=("kaiser", 6.0))


def find_decimation(sfreq: float, wanted: float) -> int:
    """Return by how much `sfreq` must be divided to give `wanted` (both in Hz).

    Raises
    ------
    ConfigError
        If that is no whole number.

    Examples
    --------
    >>> find_decimation(1000.0, 250.0)
    4
    """
    decim = round(sfreq / wanted)
    if decim < 1 or abs(sfreq / wanted - decim) > 1e-6 * decim:
        near = sorted({sfreq / d for d in (1, 2, 3, 4, 5, 8, 10)})
        raise ConfigError(
            f"a recording of {sfreq:g} Hz cannot be brought to {wanted:g} Hz by taking every n-th sample; "
            f"choose sfreq among {', '.join(f'{f:g}' for f in near)}, or resample the recording first."
        )
    return decim


def cut_epochs(signal: np.ndarray, starts: np.ndarray, *, n_times: int, decim: int) -> np.ndarray:
    """Cut epochs out of a continuous signal at every `decim`-th sample, low-passed against aliasing.

    Beyond both ends the signal is taken to stay at its last value, so that the filter does not ring there.

    Parameters
    ----------
    signal : float array of shape (n_channels, n_samples)
    starts : integer array of shape (n_epochs,)
        Sample of the first kept time of each epoch; any sample, not only multiples of `decim`.
    n_times
        Samples per epoch after decimation.
    decim
        Factor between the sampling rates.

    Returns
    -------
    epochs : float32 array of shape (n_epochs, n_channels, n_times)

    Raises
    ------
    DataError
        If an epoch does not lie inside the signal.

    Examples
    --------
    >>> cut_epochs(np.arange(12.0)[None], np.array([1, 2]), n_times=3, decim=1)[:, 0].tolist()
    [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]
    """
    starts = np.asarray(starts, dtype=np.int64)
    n_samples = signal.shape[1]
    last = starts + (n_times - 1) * decim
    if len(starts) and (starts.min() < 0 or last.max() >= n_samples):
        raise DataError(
            f"epochs from sample {starts.min()} to {last.max()} do not lie inside a signal of {n_samples} samples."
        )
    taps = make_antialias_filter(decim)
    half = len(taps) // 2
    epochs = np.empty((len(starts), signal.shape[0], n_times), dtype=np.float32)
    padded = _pad_edges(signal, half, half + 2 * _TILE * decim)
    for phase in np.unique(starts % decim):
        rows = np.flatnonzero(starts % decim == phase)
        n_out = int((last[rows].max() - phase) // decim) + 1
        reduced = _decimate(padded[:, phase:], taps, decim, n_out)
        for row in rows:
            first = (starts[row] - phase) // decim
            epochs[row] = reduced[:, first : first + n_times]
    return epochs


def _pad_edges(signal: np.ndarray, before: int, after: int) -> np.ndarray:
    n = signal.shape[1]
    padded = np.empty((signal.shape[0], before + n + after), dtype=np.float32)
    padded[:, :before] = signal[:, :1]
    padded[:, before : before + n] = signal
    padded[:, before + n :] = signal[:, -1:]
    return padded


def _decimate(padded: np.ndarray, taps: np.ndarray, decim: int, n_out: int) -> np.ndarray:
    """Evaluate the filter at every `decim`-th sample, as products with a banded matrix.

    Output k needs the samples k * decim ... k * decim + len(taps) - 1. A row of `_TILE` outputs starts at a multiple
    of the row's width, and needs its own samples and the first ones of the next row.
    """
    if decim == 1:
        return padded[:, :n_out]
    own, next_ = _make_bands(decim, len(taps))
    width = _TILE * decim
    n_rows = -(-n_out // _TILE)
    needed = (n_rows + 1) * width
    if padded.shape[1] < needed:
        padded = np.pad(padded, ((0, 0), (0, needed - padded.shape[1])))
    # (channel, sample) -> (channel, row, sample in row), a view
    rows = padded[:, :needed].reshape(len(padded), n_rows + 1, width)
    reduced = np.matmul(rows[:, :-1], own)
    reduced += np.matmul(rows[:, 1:, : len(next_)], next_)
    return reduced.reshape(len(padded), -1)[:, :n_out]


@lru_cache(maxsize=16)
def _make_bands(decim: int, n_taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of the banded matrix that act on a row itself and on the start of the next row."""
    taps = make_antialias_filter(decim)
    band = np.zeros((_TILE * decim + n_taps - decim, _TILE), dtype=np.float32)
    for column in range(_TILE):
        band[column * decim : column * decim + n_taps, column] = taps
    return band[: _TILE * decim].copy(), band[_TILE * decim :].copy()


def find_steps(signal: np.ndarray, typical: np.ndarray, *, factor: float = 10.0) -> np.ndarray:
    """Return the samples at which most channels jump at once: where two recordings were joined.

    Parameters
    ----------
    signal : array of shape (n_channels, n_samples)
    typical : array of shape (n_channels,)
        Usual absolute difference between neighbouring samples.
    factor
        A jump is larger than this many usual differences, in more than half of the channels.

    Returns
    -------
    steps : integer array
        First sample after each jump.

    Examples
    --------
    >>> find_steps(np.array([[0, 1, 0, 50, 51.0]]), np.array([1.0]))
    array([3])
    """
    jumps = np.abs(np.diff(signal, axis=1)) > factor * typical[:, None]
    return np.flatnonzero(jumps.mean(axis=0) > 0.5) + 1


def clean_raw(
    raw: mne.io.BaseRaw,
    *,
    bads: Sequence[str] = (),
    interpolate: bool = False,
    reference: str | Sequence[str] | None = None,
    notch: Sequence[float] = (),
    l_freq: float | None = None,
    h_freq: float | None = None,
    sfreq: float | None = None,
) -> mne.io.BaseRaw:
    """Apply the usual steps to a copy of a recording, in this order; all are MNE's.

    No filter crosses an annotation that starts with ``edge`` or ``bad_acq_skip``.

    Parameters
    ----------
    bads
        Channels to mark as bad; they do not enter the reference.
    interpolate
        Replace them by spherical splines, which needs positions.
    reference
        ``average``, or names of channels; None keeps the reference.
    notch
        Mains frequency and harmonics, in Hz.
    l_freq, h_freq
        Band in Hz; None leaves an end open.
    sfreq
        New sampling rate in Hz.
    """
    unknown = [name for name in bads if name not in raw.ch_names]
    if unknown:
        raise ConfigError(
            f"the bad channel {unknown[0]!r} is not in the recording, which has {', '.join(raw.ch_names)}."
        )
    out = raw.copy().load_data(verbose="error")
    out.info["bads"] = [*out.info["bads"], *[name for name in bads if name not in out.info["bads"]]]
    if interpolate and out.info["bads"]:
        out.interpolate_bads(verbose="error")
    if reference is not None:
        chosen: Any = reference if isinstance(reference, str) else list(reference)
        out.set_eeg_reference(chosen, verbose="error")
    if len(notch):
        out.notch_filter(list(notch), skip_by_annotation=("edge", "bad_acq_skip"), verbose="error")
    if l_freq is not None or h_freq is not None:
        out.filter(l_freq, h_freq, skip_by_annotation=("edge", "bad_acq_skip"), verbose="error")
    return out if sfreq is None else out.resample(sfreq, verbose="error")


def export_epochs(responses: Responses) -> mne.EpochsArray:
    """Return trials as MNE epochs, with the trial table as metadata.

    All trials are loaded; `select` some first if they are many. Whitened or scaled trials keep their numbers, which
    MNE will show as volts.
    """
    import mne

    if responses.dims != ("trial", "channel", "time"):
        raise DataError(f"only trials of channels and times become MNE epochs, not {responses.dims}.")
    coords = responses.coords
    names = list(coords["ch_names"])
    kind = {"eeg": "eeg", "meg": "mag"}[str(coords.get("modality", "eeg"))]
    info = mne.create_info(names, float(coords["sfreq"]), kind)
    if "ch_pos" in coords:
        positions = np.asarray(coords["ch_pos"], dtype=float)
        if kind == "eeg":
            there = {n: p for n, p in zip(names, positions, strict=True) if np.isfinite(p).all()}
            info.set_montage(mne.channels.make_dig_montage(there, coord_frame="head"), on_missing="ignore")
    codes, event_id = np.unique(responses.stimulus_ids.astype(str), return_inverse=True)
    events = np.stack(
        [np.arange(responses.n_trials), np.zeros(responses.n_trials, int), event_id + 1], axis=1
    )
    return mne.EpochsArray(
        np.asarray(responses.data, dtype=np.float64), info, events=events, tmin=float(coords["times"][0]),
        event_id={name: row + 1 for row, name in enumerate(codes.tolist())}, metadata=responses.trials.copy(),
        verbose="error",
    )  # fmt: skip


@dataclass(frozen=True)
class RobustScaler:
    """Median and interquartile range of each channel, and a bound on what comes out.

    Parameters
    ----------
    centre, scale : float32 arrays of shape (n_channels,)
    clamp
        Scaled values are cut at plus and minus this; None leaves them.
    """

    centre: np.ndarray
    scale: np.ndarray
    clamp: float | None

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Return scaled float32 trials of shape (n_trials, n_channels, n_times)."""
        scaled = ((data - self.centre[:, None]) / self.scale[:, None]).astype(np.float32)
        return scaled if self.clamp is None else np.clip(scaled, -self.clamp, self.clamp, out=scaled)


def fit_robust_scaler(
    data: np.ndarray, rows: np.ndarray, *, clamp: float | None = 20.0, max_trials: int = 2000
) -> RobustScaler:
    """Fit the scaler on training trials.

    Parameters
    ----------
    data : array of shape (n_trials, n_channels, n_times)
        May be a memory map.
    rows : integer array
        Training trials.
    clamp
        20 as in Défossez et al. (2023), doi:10.1038/s42256-023-00714-5.
    max_trials
        At most this many, evenly spaced ones are looked at, and no more than fill 256 MiB.
    """
    if not len(rows):
        raise DataError("the robust scaler needs at least one training trial.")
    max_trials = max(1, min(max_trials, (256 << 20) // (4 * int(np.prod(data.shape[1:])))))
    picked = np.sort(rows)[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), max_trials)).astype(int))]
    sample = np.asarray(data[picked], dtype=np.float32)
    low, centre, high = np.percentile(sample, [25, 50, 75], axis=(0, 2))
    scale = np.where(high > low, high - low, 1.0)
    return RobustScaler(centre.astype(np.float32), scale.astype(np.float32), clamp)


def fit_channel_zscore(data: np.ndarray, rows: np.ndarray) -> ZScore:
    """Compute mean and standard deviation of each channel over training trials and times.

    Parameters
    ----------
    data : array of shape (n_trials, n_channels, n_times)
        Visited in blocks, so that a memory map of any size does.
    rows : integer array
        Training trials; no other row is read.

    Returns
    -------
    ZScore
        With statistics of shape (n_channels, 1), so that it applies to trials as they are.
    """
    rows = np.sort(rows)
    if not len(rows):
        raise DataError("the z-score needs at least one training trial.")
    # Differences from a first guess of the mean keep the sums of squares exact enough.
    guess = np.asarray(data[rows[0]], dtype=np.float64).mean(axis=-1)
    total, squares = np.zeros_like(guess), np.zeros_like(guess)
    block = max(1, _BLOCK_BYTES // max(1, data[:1].nbytes))
    for start in range(0, len(rows), block):
        piece = np.asarray(data[rows[start : start + block]], dtype=np.float64) - guess[:, None]
        total += piece.sum(axis=(0, 2))
        squares += np.square(piece).sum(axis=(0, 2))
    n = len(rows) * data.shape[-1]
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    std = np.where(std > 1e-12 * np.maximum(np.abs(guess), 1e-30), std, 1.0)
    return ZScore((guess + mean)[:, None].astype(np.float32), std[:, None].astype(np.float32))
