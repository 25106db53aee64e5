"""What a network must know of the responses before it can be built: shape, sensors, time axis, subjects.

Every network file holds an ``XConfig`` with ``kind`` and ``build(signal, n_outputs)``, which returns a torch module
with ``forward(data, subject)``: `data` of shape (batch, *signal.shape), `subject` of shape (batch,) with the row of
each trial's subject in `signal.subjects`, or `signal.unknown_subject` for one never trained on; the result has
the shape (batch, n_outputs). This file knows neither torch nor training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import DataError


@dataclass(frozen=True)
class Signal:
    """Axes of one trial, as a network sees them.

    Parameters
    ----------
    dims
        Names of the axes after ``trial``: ``("channel", "time")``, ``("voxel",)``, ``("parcel",)`` or
        ``("parcel", "time")``.
    shape
        Their lengths.
    subjects
        Subjects of the training trials, in order; their number is the index of an unknown subject.
    ch_names
        Channel names, if there are channels.
    ch_pos : array of shape (n_channels, 3) or None
        Sensor positions in m.
    times : array of shape (n_times,) or None
        Time of each sample in s from stimulus onset.
    sfreq
        Sampling rate in Hz.
    networks
        Network of each parcel (Yeo names), if there are parcels; of voxels without times, the smallest of their regions
        of interest. Empty text where there is none.
    parcels
        Name of each parcel, if there are parcels.
    voxel_ids, grid, affine
        Place of each voxel in its flattened grid, shape of the grid, and the map of its indices to mm, if all subjects
        share one and trials have a time axis.
    n_voxels
        Number of voxels of each subject where subjects have different ones; their rows are padded with zeros.
    unit
        Unit of the values that reach the network, such as ``V``; empty if nobody knows; ``robust``
        after a scaling by median and interquartile range, ``scaled`` after another one.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    subjects: tuple[str, ...]
    ch_names: tuple[str, ...] = ()
    ch_pos: np.ndarray | None = None
    times: np.ndarray | None = None
    sfreq: float | None = None
    networks: tuple[str, ...] = ()
    n_voxels: tuple[int, ...] = ()
    unit: str = ""
    parcels: tuple[str, ...] = ()
    voxel_ids: np.ndarray | None = None
    grid: tuple[int, ...] = ()
    affine: np.ndarray | None = None

    @property
    def unknown_subject(self) -> int:
        """Index that stands for a subject outside the training set."""
        return len(self.subjects)

    def size_of(self, dim: str) -> int:
        """Return the length of the axis `dim`; raise `DataError` if there is none."""
        if dim not in self.dims:
            raise DataError(
                f"this network needs a {dim} axis, but the responses have {', '.join(self.dims)}; choose another "
                "encoder.network.kind."
            )
        return self.shape[self.dims.index(dim)]

    def index_subjects(self, subjects: Any) -> np.ndarray:
        """Return the index of each subject, `unknown_subject` for those never trained on."""
        # Without an index of pandas, which for the one trial of a stream takes longer than the network's attention.
        row = {name: index for index, name in enumerate(self.subjects)}
        return np.array([row.get(str(name), self.unknown_subject) for name in subjects], dtype=np.int64)

    def as_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads."""
        return {
            "dims": list(self.dims),
            "shape": list(self.shape),
            "subjects": list(self.subjects),
            "ch_names": list(self.ch_names),
            "ch_pos": None if self.ch_pos is None else np.asarray(self.ch_pos, float).tolist(),
            "times": None if self.times is None else np.asarray(self.times, float).tolist(),
            "sfreq": self.sfreq,
            "networks": list(self.networks),
            "n_voxels": list(self.n_voxels),
            "unit": self.unit,
            "parcels": list(self.parcels),
            "voxel_ids": None if self.voxel_ids is None else np.asarray(self.voxel_ids, int).tolist(),
            "grid": list(self.grid),
            "affine": None if self.affine is None else np.asarray(self.affine, float).tolist(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Signal:
        """Return what `as_json` gave."""
        arrays: dict[str, Any] = {
            key: None if content[key] is None else np.asarray(content[key], float)
            for key in ("ch_pos", "times")
        }
        # JSON knows lists only; the networks were built from tuples.
        names = ("dims", "shape", "subjects", "ch_names", "networks", "n_voxels")
        axes: dict[str, Any] = {key: tuple(content[key]) for key in names}
        # Fits that were written before networks knew these have none.
        axes |= {key: tuple(content.get(key, ())) for key in ("parcels", "grid")}
        for key, kind in (("voxel_ids", int), ("affine", float)):
            arrays[key] = None if content.get(key) is None else np.asarray(content[key], kind)
        return cls(**axes, **arrays, sfreq=content["sfreq"], unit=content.get("unit", ""))


@dataclass(frozen=True)
class TrialPairs:
    """Measured training trials and the targets of their images, for a network that is prepared before its training.

    Parameters
    ----------
    subject : int array of shape (n_trials,)
        Number of each trial's subject in `Signal.subjects`.
    read
        Returns responses of shape (n, *signal.shape) and targets of shape (n, n_values) of some trials, ascending.
    fitted
        Folder into which `NetworkSettings.fit_responses` has written what it fitted to these trials; None if it has
        not.
    """

    subject: np.ndarray
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    fitted: Path | None = None


def describe_signal(responses: Responses) -> Signal:
    """Return the signal of training responses."""
    coords = responses.coords
    subjects = tuple(sorted({str(s) for s in responses.trials["subject"]}))
    positions, times = coords.get("ch_pos"), coords.get("times")
    if positions is not None:
        # Positions of some channels only are no positions: a network cannot weigh a sensor without a place.
        positions = np.asarray(positions, float)
        if positions.shape != (len(coords.get("ch_names", ())), 3) or not np.isfinite(positions).all():
            positions = None
    counts = count_own_voxels(responses)
    return Signal(
        dims=responses.dims[1:],  # without the axis of trials
        shape=tuple(int(n) for n in responses.data.shape[1:]),
        subjects=subjects,
        ch_names=tuple(str(name) for name in coords.get("ch_names", ())),
        ch_pos=positions,
        times=None if times is None else np.asarray(times, float),
        sfreq=None if coords.get("sfreq") is None else float(coords["sfreq"]),
        networks=tuple(str(name) for name in coords.get("parcel_networks", ())) or _name_regions(responses),
        n_voxels=tuple(counts[s] for s in subjects) if counts else (),
        unit=responses.unit,
        parcels=tuple(str(name) for name in coords.get("parcel_names", ())),
        **_find_grid(responses),
    )


def _name_regions(responses: Responses) -> tuple[str, ...]:
    """Return the smallest region of each voxel (V1, not the visual cortex); nothing where there are no regions."""
    coords, sets = responses.coords, dict(responses.coords.get("roi_names", {}))
    # Where rows are padded, or have times, nobody asks.
    if responses.dims[1:] != ("voxel",) or "n_voxels_of" in coords:
        return ()
    masks: dict[str, np.ndarray] = {}
    for name, known in sets.items():
        labels = np.asarray(coords[f"roi_{name}"])
        masks |= {f"{name}/{known.get(str(n), n)}": labels == n for n in np.unique(labels[labels > 0])}
    regions = np.full(responses.data.shape[1], "", dtype=object)
    for name in sorted(masks, key=lambda name: -int(masks[name].sum())):
        regions[masks[name]] = name
    return tuple(regions) if masks else ()


def _find_grid(responses: Responses) -> dict[str, Any]:
    """Return where voxels lie, for time series of whole brains; single values need no place."""
    coords = responses.coords
    if responses.dims[1:] != ("voxel", "time") or not {"voxel_id", "mask", "affine"} <= set(coords):
        return {}
    grid = tuple(int(n) for n in np.shape(coords["mask"]))
    affine = np.asarray(coords["affine"], float)
    return {"voxel_ids": np.asarray(coords["voxel_id"], int), "grid": grid, "affine": affine}


def check_signal(expected: Signal, responses: Responses) -> None:
    """Raise `DataError` unless `responses` have the axes that the network was trained on."""
    found = tuple(int(n) for n in responses.data.shape[1:])
    if responses.dims[1:] != expected.dims or found != expected.shape:
        raise DataError(
            f"the network was trained on trials of {_describe(expected.dims, expected.shape)}, "
            f"but these have {_describe(responses.dims[1:], found)}; train it again on this data set."
        )
    parcels = [str(name) for name in responses.coords.get("parcel_names", ())]
    if expected.parcels and parcels and tuple(parcels) != expected.parcels:
        other = next(
            n for n, pair in enumerate(zip(expected.parcels, parcels, strict=True)) if pair[0] != pair[1]
        )
        raise DataError(
            f"the network was trained on other parcels: number {other + 1} was "
            f"{expected.parcels[other]!r} but is {parcels[other]!r} here; average over the regions of "
            "the same atlas (dataset.atlas)."
        )


def _describe(dims: tuple[str, ...], shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n} {dim}s" for dim, n in zip(dims, shape, strict=True))


def read_axes(signal: Signal, network: str) -> tuple[int, int]:
    """Return the numbers of channels and of samples.

    Raises
    ------
    DataError
        If the trials are not channels x times.
    """
    n_channels, n_times = signal.size_of("channel"), signal.size_of("time")  # each names what is missing
    if signal.dims != ("channel", "time"):
        raise DataError(f"{network} reads trials of channel x time, but these are {' x '.join(signal.dims)}.")
    return n_channels, n_times


def count_windows(signal: Signal, network: str, windows_of: Callable[[int], int]) -> int:
    """Return how many windows of time the network's last feature map has.

    Parameters
    ----------
    signal
        Has a time axis.
    network
        Name in the message.
    windows_of
        Number of windows as a function of the number of samples; below 1 where there are too few.

    Raises
    ------
    DataError
        If there is not a single window; the message says how many samples there must be.
    """
    n_times = signal.size_of("time")
    n_windows = windows_of(n_times)
    if n_windows >= 1:
        return n_windows
    # Kernels and pools are nested, so the least length is found by trying, which costs nothing.
    needed = next(n for n in count(n_times + 1) if windows_of(n) >= 1)
    rate = f" ({needed / signal.sfreq:.3g} s at {signal.sfreq:g} Hz)" if signal.sfreq else ""
    raise DataError(
        f"{network} needs trials of at least {needed} samples{rate}, but these have {n_times}; preprocess longer "
        "epochs, shorten its kernels and pools, or choose another encoder.network.kind."
    )


def scale_length(length: int, signal: Signal, network: str, published_sfreq: float) -> int:
    """Return a length in samples at `published_sfreq` as the nearest length at the signal's rate, at least 1.

    Raises
    ------
    DataError
        If the signal does not know its rate.
    """
    if signal.sfreq is None:
        raise DataError(
            f"{network} scales its kernels to the sampling rate, but the responses have none; give the "
            "sampling rate of the data set, or choose another encoder.network.kind."
        )
    return max(1, round(length * signal.sfreq / published_sfreq))
