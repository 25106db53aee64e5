"""Cleaning of continuous EEG and MEG, streamed through a file: repair, reference, notch, band-pass.

Repair and reference mix channels at one time, so each is a matrix; MNE gives it when it is applied to unit vectors.
Filters are MNE's (zero-phase FIR) and run channel by channel between joins of recordings, never across one. A recording
is cleaned once, before its trials are cut, into a float32 file without its constant offsets. Only a few channels of it
are in memory at a time. Does not depend on the file format of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.sources.cleaning_options import Cleaning
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochPlan,
    Sensors,
    find_scalp_positions,
)
from braindecode_vis.datasets.sources.safe_pickle import FileArray, open_npy
from braindecode_vis.preprocessing.causal import CausalFilter
from braindecode_vis.preprocessing.epochs import Piece, find_pause_boundaries
from braindecode_vis.preprocessing.signal_damage import DamageWatch

_BLOCK_BYTES = 64 << 20


def clean_pieces(
    session: Sequence[Piece], plan: EpochPlan, scratch: Path, watch: DamageWatch
) -> tuple[list[Piece], list[Path]]:
    """Return the pieces of one session with cleaned samples, and the files that hold them until trials are cut.

    With ``ica`` they hold all sensors, for `braindecode_vis.preprocessing.artefacts.remove_eye_components`.

    Parameters
    ----------
    session
        Continuous pieces of one subject and session.
    plan
        With its `cleaning`.
    scratch
        Folder for the files; made if needed.
    watch
        Checks the samples before a filter hides damage.

    Raises
    ------
    DataError
        If a sample is not finite, a good channel is flat, or a stretch between joins is shorter than a filter.
    """
    cleaning = plan.cleaning
    scratch.mkdir(parents=True, exist_ok=True)
    cleaned, files = [], []
    for number, piece in enumerate(session):
        part = piece.part
        assert isinstance(part, ContinuousPart)
        boundaries = np.unique(
            np.r_[np.array(part.boundaries, dtype=np.int64), find_pause_boundaries(part, plan)]
        )
        names = part.all_names if cleaning.ica is not None else part.ch_names
        path = scratch / f"cleaned-{number}.npy"
        offset = write_mixed(part, cleaning, names, path, watch)
        filter_file(
            path, piece, boundaries, cleaning.notch, cleaning.l_freq, cleaning.h_freq, causal=cleaning.causal
        )
        if cleaning.l_freq is not None:
            offset = np.zeros_like(offset)  # no constant passes a high-pass
        reader = CleanedReader(open_npy(path), offset, np.arange(len(names)))
        cleaned.append(
            replace(
                piece, part=replace(part, ch_names=names, read=reader), bounds=_tighten(piece, boundaries)
            )
        )
        files.append(path)
    return cleaned, files


def _tighten(piece: Piece, boundaries: np.ndarray) -> np.ndarray:
    """Return the bounds of each trial, limited also by the joins at which filters stop."""
    part = piece.part
    assert isinstance(part, ContinuousPart)
    edges = np.r_[0, boundaries, part.n_samples]
    at = np.searchsorted(edges, piece.trials["sample"].to_numpy(), side="right")
    return np.stack(
        [np.maximum(piece.bounds[:, 0], edges[at - 1]), np.minimum(piece.bounds[:, 1], edges[at])], axis=1
    )


@dataclass(frozen=True)
class CleanedReader:
    """Reads cleaned samples, shape (n_channels, stop - start), with their constant offsets.

    Parameters
    ----------
    data
        Samples of shape (n_all, n_samples), in a file.
    offset : array of shape (n_all,)
    rows : integer array of shape (n_channels,)
        Channels to read.
    mixing, shift : arrays of shape (n_channels, n_all) and (n_channels,), optional
        Applied to all channels of the file in place of `rows`.
    """

    data: FileArray
    offset: np.ndarray
    rows: np.ndarray
    mixing: np.ndarray | None = None
    shift: np.ndarray | None = None

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return samples `start` to `stop`."""
        if self.mixing is None:
            return self.data.read_columns(self.rows, start, stop) + self.offset[self.rows, None]
        everything = np.arange(len(self.offset))
        whole = self.data.read_columns(everything, start, stop) + self.offset[:, None]
        return self.mixing @ whole + (0 if self.shift is None else self.shift[:, None])


# --- channels at one time ---------------------------------------------------------------------------------


def write_mixed(
    part: ContinuousPart,
    cleaning: Cleaning,
    names: Sequence[str],
    path: Path,
    watch: DamageWatch,
) -> np.ndarray:
    """Write the repaired and referenced channels `names` of a recording to a ``.npy`` file, float32.

    Returns
    -------
    offset : float64 array of shape (n_channels,)
        Offset subtracted from each channel before rounding: its first sample.
    """
    sensors = part.sensors if part.sensors is not None else part.own_sensors
    mixing = make_mixing(sensors, part, cleaning)[[sensors.ch_names.index(name) for name in names]]
    used = np.flatnonzero(np.any(mixing != 0, axis=0))  # sensors that any stored channel depends on
    low, high = np.full(len(sensors.ch_names), np.inf), np.full(len(sensors.ch_names), -np.inf)
    n_channels, n = len(names), part.n_samples
    offset = np.zeros(n_channels)
    with path.open("wb") as file:
        # One row a channel, so that a filter reads each as one stretch of the file.
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_channels, n)}
        np.lib.format.write_array_header_1_0(file, header)
        base = file.tell()
        try:
            for start, stop in iterate_blocks(n, 8 * len(sensors.ch_names)):
                samples = np.asarray(sensors.read(start, stop), dtype=np.float64)
                _check_finite(samples, used, sensors, part, start)
                lowest, highest = watch.look_at_samples(
                    part.where, sensors.ch_names, samples, start, part.sfreq
                )
                low, high = np.minimum(low, lowest), np.maximum(high, highest)
                mixed = mixing @ samples
                if start == 0:
                    offset = mixed[:, 0].copy()
                rest = (mixed - offset[:, None]).astype("<f4")
                for row in range(n_channels):
                    file.seek(base + 4 * (row * n + start))
                    file.write(rest[row].data)
        except OSError as error:
            raise DataError(f"{path} could not be written ({error.strerror}); free some space.") from error
    watch.settle_channels(part.where)
    flat = [sensors.ch_names[row] for row in used if low[row] == high[row]]
    if flat and n > 1:
        raise DataError(
            f"{part.where}: the channel(s) {', '.join(flat)} are flat in the whole recording; name them "
            "in dataset.bads, with "
            "dataset.bad_channels drop or interpolate."
        )
    return offset


def make_mixing(sensors: Sensors, part: ContinuousPart, cleaning: Cleaning) -> np.ndarray:
    """Return the matrix that repairs and references all sensors, shape (n_sensors, n_sensors)."""
    names = sensors.ch_names
    bads = [name for name in part.bads if name in names]
    mixing = np.eye(len(names))
    if cleaning.interpolate and bads:
        mixing = make_interpolation(sensors, bads, part.where, part.recording.modality)
        bads = []
    if cleaning.reference == "average":
        good = [row for row, name in enumerate(names) if name not in bads]
    elif cleaning.reference == "none":
        return mixing
    else:
        good = [names.index(name) for name in cleaning.reference]
        worse = [name for name in cleaning.reference if name in bads]
        if worse:
            raise ConfigError(f"dataset.reference names {worse[0]}, which is a bad channel of {part.where}.")
    # Repair first, then reference, as one matrix: every row loses the mean of the reference channels.
    return mixing - mixing[good].mean(axis=0)


def make_interpolation(sensors: Sensors, bads: Sequence[str], where: str, modality: str) -> np.ndarray:
    """Return the matrix by which MNE replaces bad channels, shape (n_sensors, n_sensors).

    Spherical splines for EEG, and a minimum-norm field mapping for MEG.
    """
    import mne

    good = [name for name in sensors.ch_names if name not in bads]
    if len(good) < 3:
        raise ConfigError(
            f"{where} has {len(good)} good channels, which is too few to interpolate {', '.join(bads)}; "
            "set dataset.bad_channels to drop."
        )
    info = make_info(sensors, where, modality)
    # Interpolation is linear: what it makes of unit vectors is its matrix.
    raw = mne.io.RawArray(np.eye(len(sensors.ch_names)), info, verbose="error")
    raw.info["bads"] = list(bads)
    try:
        return np.asarray(raw.interpolate_bads(verbose="error").get_data())
    except Exception as error:  # coils or positions that MNE cannot use raise what they like
        raise DataError(
            f"{where}: {', '.join(bads)} cannot be interpolated ({type(error).__name__}: {error}); "
            "set dataset.bad_channels to drop."
        ) from error


def make_info(sensors: Sensors, where: str, modality: str, sfreq: float = 1.0) -> Any:
    """Return the `mne.Info` of sensors with their places."""
    import mne

    if modality == "meg":
        if sensors.info is None:
            raise ConfigError(f"{where} gives no positions of its coils; set dataset.bad_channels to drop.")
        return mne.pick_info(sensors.info, [sensors.info.ch_names.index(name) for name in sensors.ch_names])
    positions = find_scalp_positions(sensors.ch_names, where) if sensors.ch_pos is None else sensors.ch_pos
    info = mne.create_info(list(sensors.ch_names), sfreq, "eeg")
    places = dict(zip(sensors.ch_names, np.asarray(positions, dtype=float), strict=True))
    info.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
    return info


def iterate_blocks(n_samples: int, bytes_per_sample: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of stretches of samples that fill about 64 MiB."""
    size = max(1, _BLOCK_BYTES // max(1, bytes_per_sample))
    for start in range(0, n_samples, size):
        yield start, min(start + size, n_samples)


def _check_finite(
    samples: np.ndarray, used: np.ndarray, sensors: Sensors, part: ContinuousPart, start: int
) -> None:
    if np.isfinite(samples[used].sum()):
        # A channel that is not used must not reach the others through a product with zero.
        samples[~np.isfinite(samples)] = 0
        return
    row, column = (int(axis[0]) for axis in np.nonzero(~np.isfinite(samples[used])))
    raise DataError(
        f"{part.where}: channel {sensors.ch_names[used[row]]} is not finite at {(start + column) / part.sfreq:.3f} s, "
        "which a filter would spread; name it in dataset.bads, with dataset.bad_channels drop or interpolate."
    )


# --- samples of one channel -------------------------------------------------------------------------------


def filter_file(
    path: Path,
    piece: Piece,
    boundaries: np.ndarray,
    notch: Sequence[float],
    l_freq: float | None,
    h_freq: float | None,
    target: Path | None = None,
    causal: bool = False,
) -> None:
    """Filter a file of shape (n_channels, n_samples) between its joins, in place or into `target`.

    Raises
    ------
    DataError
        If a stretch with trials is shorter than a filter.
    """
    part = piece.part
    assert isinstance(part, ContinuousPart)
    if not notch and l_freq is None and h_freq is None and target is None:
        return
    shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    edges = np.r_[0, boundaries, shape[1]].astype(int)
    onsets = piece.trials["sample"].to_numpy()
    looking_back = CausalFilter(part.sfreq, notch, l_freq, h_freq) if causal else None
    longest = find_longest_filter(part.sfreq, notch, l_freq, h_freq) if not causal else 1
    source = open_npy(path)
    if target is not None:
        np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=shape)
    with (path if target is None else target).open("r+b") as file:
        base = (path if target is None else target).stat().st_size - 4 * int(np.prod(shape))
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if stop - start < longest:
                if ((onsets >= start) & (onsets < stop)).any():
                    raise DataError(
                        f"{part.where}: the stretch from {start / part.sfreq:.1f} to {stop / part.sfreq:.1f} s between "
                        f"joins is shorter than a filter of {longest / part.sfreq:.1f} s; raise dataset.l_freq, or "
                        "leave the notch out."
                    )
                continue
            # As many channels at once as fit in memory; a filter needs the whole stretch of each.
            size = max(1, _BLOCK_BYTES // (8 * max(1, stop - start)))
            for first in range(0, shape[0], size):
                rows = np.arange(first, min(first + size, shape[0]))
                samples = source.read_columns(rows, start, stop).astype(np.float64)
                if looking_back is not None:
                    samples = looking_back.filter_stretch(samples)
                else:
                    samples = filter_samples(samples, part.sfreq, notch, l_freq, h_freq)
                filtered = samples.astype("<f4")
                for row, values in zip(rows.tolist(), filtered, strict=True):
                    file.seek(base + 4 * (row * shape[1] + start))
                    file.write(values.data)


def filter_samples(
    samples: np.ndarray, sfreq: float, notch: Sequence[float], l_freq: float | None, h_freq: float | None
) -> np.ndarray:
    """Return samples (n_channels, n_samples) through notches at `notch` and a band, all in Hz."""
    from mne.filter import filter_data, notch_filter

    if len(notch):
        samples = notch_filter(samples, sfreq, np.array(notch, dtype=float), copy=False, verbose="error")
    if l_freq is not None or h_freq is not None:
        samples = filter_data(samples, sfreq, l_freq, h_freq, copy=False, verbose="error")
    return samples


def find_longest_filter(
    sfreq: float, notch: Sequence[float], l_freq: float | None, h_freq: float | None
) -> int:
    """Return the length in samples of the longest filter, as MNE makes it: 3.3 over the narrowest transition."""
    from mne.filter import create_filter

    longest = 0
    if l_freq is not None or h_freq is not None:
        longest = len(create_filter(None, sfreq, l_freq, h_freq, verbose="error"))
    for frequency in notch:
        # MNE's notch: width of 1/200 of the frequency, and transitions of 0.5 Hz on both sides of it.
        width = frequency / 200
        low, high = frequency - width / 2 - 0.5, frequency + width / 2 + 0.5
        stop = create_filter(
            None, sfreq, high, low, l_trans_bandwidth=0.5, h_trans_bandwidth=0.5, verbose="error"
        )
        longest = max(longest, len(stop))
    return longest
