"""Faces against houses with a four-electrode headband: the N170 recordings of muse-lsl, subject 1.

Owns the CSV files: one run each, microvolt, a marker column. The image of a trial was drawn at random and not logged,
so a trial has only its category: `stimulus_id` and `concept` are ``face`` or ``house``, there are no pixels, and
training and test trials are divided by runs, not by images.

Each run is small, so it is read whole, band-passed once (zero phase) and then returned in pieces. Epochs with a large
peak-to-peak amplitude, mostly blinks, are left out, up to a maximal share.

References
----------
muse-lsl, https://github.com/alexandrebarachant/muse-lsl, data/visual/N170.
Bentin et al. (1996), doi:10.1162/jocn.1996.8.6.551: the N170.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.checks import ConfigError, DataError, check_columns, refuse_damage
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    RecordedSettings,
    check_subset,
    collect_findings,
    compare_facts,
)
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochPlan,
    MeegSource,
    SampleType,
    number_repetitions,
)

CHANNELS = ("TP9", "AF7", "AF8", "TP10")
SFREQ = 256.0
MARKERS = {1: "house", 2: "face"}
_MARKER = "Marker0"
_TOLERANCE = 0.005  # relative; time stamps are rounded to 1 ms and start with the transmission
_PATTERNS = ("data_*.csv", "data_*.csv.gz")


class MuseN170Config(RecordedSettings):
    """Folder of the runs, and how trials are cut.

    Parameters
    ----------
    root
        Folder of the runs (``data_*.csv`` or ``data_*.csv.gz``), or a folder with them in ``recordings``.
    runs
        Numbers of the runs to read, from 1 in the order of their names; by default all six, which must then exist.
    channels
        Electrodes in the order in which they are stored; ``Right AUX`` is an empty input and cannot be chosen.
    l_freq, h_freq
        Band in Hz, applied to each run without phase shift before anything else.
    sfreq
        Sampling rate of the trials in Hz, a whole fraction of 256.
    tmin, tmax, baseline, dtype
        As in `EpochPlan`; the whole epoch is kept.
    reject
        Largest peak-to-peak amplitude of an epoch in V, on any channel; None keeps all.
    max_dropped
        Largest share of the epochs of one run that may reach outside the recording.
    """

    kind: Literal["muse_n170"] = "muse_n170"
    channels: tuple[str, ...] = CHANNELS
    # The N170 is within this band, and a headband drifts below it.
    l_freq: float = Field(default=1.0, gt=0)
    h_freq: float = Field(default=30.0, gt=0)
    runs: tuple[int, ...] | None = None
    sfreq: float = Field(default=64.0, gt=0)
    tmin: float = -0.1
    tmax: float = 0.8
    baseline: tuple[float | None, float | None] | None = (None, 0.0)
    dtype: SampleType = "float32"
    reject: float | None = Field(default=150e-6, gt=0)
    max_dropped: float = Field(default=0.02, ge=0, lt=1)

    #: Largest share of the epochs of one run that may exceed it before that becomes an error.
    max_rejected: ClassVar[float] = 0.25
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"max_rejected"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "max_rejected", "max_dropped"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"runs"})

    def hash_inputs(self) -> dict[str, str]:
        """Return the sha256 of the text of every run, packed or not."""
        return {path.name.removesuffix(".gz"): hash_text(path) for path in self._find().values()}

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the runs as parts."""
        if not self.channels or not set(self.channels) <= set(CHANNELS):
            raise ConfigError(
                f"dataset.channels must be some of {', '.join(CHANNELS)}, not {', '.join(self.channels)}."
            )
        if not self.l_freq < self.h_freq < SFREQ / 2:
            raise ConfigError(
                f"dataset.l_freq < dataset.h_freq < {SFREQ / 2:g} Hz must hold, not {self.l_freq:g} and "
                f"{self.h_freq:g}."
            )
        plan = EpochPlan(
            sfreq=self.sfreq, tmin=self.tmin, tmax=self.tmax, window=(self.tmin, self.tmax), baseline=self.baseline,
            mvnn="none", dtype=self.dtype, max_dropped=self.max_dropped,
        )  # fmt: skip
        parts, rejected = [], []
        for number, path in self._find().items():
            part, large = self._open_run(path, f"{number:02d}", plan)
            parts.append(part)
            rejected.append({"run": part.recording.run, "n_rejected": large})
        notes = {
            "filter": f"band-pass {self.l_freq:g} to {self.h_freq:g} Hz per run, zero-phase FIR",
            "rejection": "none"
            if self.reject is None
            else f"above {self.reject * 1e6:g} microvolt peak to peak",
            "rejected": rejected,
            "identity": "the image of a trial is unknown; stimulus ids are categories",
        }
        return MeegSource("eeg", tuple(number_repetitions(parts)), make_categories(), plan, "V", notes=notes)

    @collect_findings("runs")
    def check(self) -> Iterator[CheckFinding]:
        """Read every run, and recompute every fact that the manifest declares."""
        published = {entry.path: entry.sha256 for entry in self.manifest.files}
        tables = []
        held = self._find()
        yield from self.check_recordings(("01", "01", f"{number:02d}") for number in held)
        for path in held.values():
            name = path.name.removesuffix(".gz")
            try:
                samples, onsets, codes = read_run(path, CHANNELS)
            except DataError as error:
                yield CheckFinding(name, False, str(error))
                continue
            tables.append(codes)
            flat = [c for c, row in zip(CHANNELS, samples, strict=True) if row.min() == row.max()]
            if flat:
                yield CheckFinding(name, False, f"the channel(s) {', '.join(flat)} of {path} are flat")
            same = name not in published or hash_text(path) == published[name]
            origin = "as published" if same else "but not the published bytes; copy it again"
            if name not in published:
                origin = "not one of the published runs"
            yield CheckFinding(name, same, f"{len(onsets)} events, {origin}")
        codes = np.concatenate(tables) if tables else np.empty(0, int)
        found = {
            "n_channels": len(CHANNELS), "sfreq": SFREQ,
            "n_houses": int((codes == 1).sum()), "n_faces": int((codes == 2).sum()),
        }  # fmt: skip
        if self.runs is None:
            yield from compare_facts(found, self.manifest.facts, None)

    def _find(self) -> dict[int, Path]:
        """Return the files to read by their number; published ones keep their numbers if others are missing."""
        found = {path.name.removesuffix(".gz"): path for path in find_runs(self.find_root())}
        published = {entry.path for entry in self.manifest.files}
        names = sorted(found.keys() | published if found.keys() & published else found)
        held = {number: found[name] for number, name in enumerate(names, start=1) if name in found}
        chosen = check_subset(self.runs, list(held), what="Muse run", option="dataset.runs")
        return {number: held[number] for number in chosen}

    def _open_run(self, path: Path, run: str, plan: EpochPlan) -> tuple[ContinuousPart, int]:
        import mne
        import pandas as pd

        samples, onsets, codes = read_run(path, self.channels)
        # The whole run is filtered, so that no epoch contains the edge effect of a filter.
        samples = mne.filter.filter_data(samples, SFREQ, self.l_freq, self.h_freq, verbose="error")
        large = np.zeros(len(onsets), dtype=bool)
        if self.reject is not None:
            large = find_large_epochs(samples, onsets, plan, self.reject)
        if large.sum() > self.max_rejected * len(onsets):
            raise DataError(
                f"subject 01, run {run}, file {path}: {int(large.sum())} of {len(onsets)} epochs exceed "
                f"{self.reject * 1e6 if self.reject else 0:g} microvolt peak to peak, more than the limit of "
                f"{self.max_rejected:.0%}; look at the electrodes, or raise dataset.reject."
            )
        # Rejected epochs give no trial, so repetitions are counted over the others.
        names = [MARKERS[code] for code in codes[~large].tolist()]
        events = pd.DataFrame(
            {
                "onset": onsets[~large] / SFREQ, "sample": onsets[~large], "stimulus_id": names, "concept": names,
                "split": "train", "repetition": 0,
            }
        )  # fmt: skip
        recording = Recording("01", "01", run, "eeg", (path,), events, frozenset(MARKERS.values()))

        def read(start: int, stop: int) -> np.ndarray:
            return samples[:, start:stop]

        return ContinuousPart(recording, self.channels, SFREQ, samples.shape[1], read), int(large.sum())


def find_runs(folder: Path) -> list[Path]:
    """Return the files of the runs in the order of recording, which is the order of their names.

    Raises
    ------
    DataError
        If there is none, or a run exists twice, packed and unpacked.
    """
    for candidate in (folder, folder / "recordings"):
        found = {path for pattern in _PATTERNS for path in candidate.glob(pattern)}
        if found:
            break
    else:
        raise DataError(
            f"no run of muse_n170 was found in {folder} or its folder recordings: expected data_*.csv or "
            "data_*.csv.gz."
        )
    runs: dict[str, Path] = {}
    for path in sorted(found):
        name = path.name.removesuffix(".gz")
        if name in runs:
            raise DataError(
                f"{path.parent} holds the run {name} both packed and unpacked; remove one of them."
            )
        runs[name] = path
    return [runs[name] for name in sorted(runs)]


def hash_text(path: Path) -> str:
    """Return the sha256 of a file after unpacking, so that it does not depend on how it was packed."""
    digest = hashlib.sha256()
    with (
        refuse_damage(f"{path} cannot be unpacked", EOFError, gzip.BadGzipFile, OSError),
        gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file,
    ):
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_run(path: Path, channels: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read one run.

    Parameters
    ----------
    path
        A CSV file, gzipped or not.
    channels
        Columns to read.

    Returns
    -------
    samples : float64 array of shape (n_channels, n_samples)
        In V.
    onsets : integer array of shape (n_events,)
        Sample of each marker.
    codes : integer array of shape (n_events,)
        1 for a house, 2 for a face.

    Raises
    ------
    DataError
        If the file is damaged, is sampled at another rate, or holds an unknown marker or a non-finite value.
    """
    import pandas as pd

    with refuse_damage(f"{path} cannot be read as a table", ValueError, EOFError, OSError):
        table = pd.read_csv(path)
    check_columns(table.columns, ("timestamps", *channels, _MARKER), what=f"the run {path}")
    stamps = table["timestamps"].to_numpy(dtype=float)
    values = table[list(channels)].to_numpy(dtype=float).T
    if len(table) < 2 or not np.isfinite(stamps).all() or not np.isfinite(values).all():
        bad = [name for name, row in zip(channels, values, strict=True) if not np.isfinite(row).all()]
        raise DataError(
            f"{path} has {len(table)} rows and missing or non-finite values in {', '.join(bad) or 'timestamps'}; "
            "it is cut short or damaged: copy it again."
        )
    rate = estimate_rate(stamps)
    if abs(rate / SFREQ - 1) > _TOLERANCE:
        raise DataError(
            f"{path} has {len(stamps)} samples in {stamps[-1] - stamps[0]:.2f} s, {rate:.2f} Hz, but a "
            f"Muse records at {SFREQ:g} Hz: samples are missing, or it is another device."
        )
    marker = table[_MARKER].to_numpy()
    onsets = np.flatnonzero(marker)
    unknown = sorted(set(marker[onsets].tolist()) - set(MARKERS))
    if unknown:
        raise DataError(f"{path} has the marker {unknown[0]}; 0 (none), 1 (house) and 2 (face) are known.")
    if not len(onsets):
        raise DataError(f"{path} has no marker of a face or house in {_MARKER}.")
    # The files are in microvolt.
    return values * 1e-6, onsets, marker[onsets].astype(int)


def estimate_rate(stamps: np.ndarray) -> float:
    """Return the mean sampling rate (Hz) of time stamps (s).

    Stamps are rounded to 1 ms, so the median step is 4 ms and would give 250 Hz for a device with 256 Hz.

    Examples
    --------
    >>> stamps = np.round(np.arange(2561) / 256, 3)
    >>> float(estimate_rate(stamps)), float(1 / np.median(np.diff(stamps)).round(6))
    (256.0, 250.0)
    """
    return float((len(stamps) - 1) / (stamps[-1] - stamps[0]))


def find_large_epochs(samples: np.ndarray, onsets: np.ndarray, plan: EpochPlan, limit: float) -> np.ndarray:
    """Return which epochs exceed `limit` (V) peak to peak on any channel, boolean of shape (n_events,).

    Parts of an epoch outside the recording are ignored.
    """
    first, last = round(plan.tmin * SFREQ), round(plan.tmax * SFREQ)
    large = np.zeros(len(onsets), dtype=bool)
    for row, onset in enumerate(onsets.tolist()):
        epoch = samples[:, max(0, onset + first) : onset + last + 1]
        large[row] = bool(np.ptp(epoch, axis=1).max() > limit)
    return large


def make_categories() -> StimulusSet:
    """Return the two categories as a stimulus set without pixels; the hash of each is the hash of its name."""
    import pandas as pd

    names = sorted(MARKERS.values())
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    return StimulusSet(pd.DataFrame({"stimulus_id": names, "concept": names, "path": "", "sha256": hashes}))
