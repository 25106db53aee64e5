"""Runs of EEG and MEG for a corpus: continuous BIDS recordings of any format that MNE reads, by name of their sensors.

Owns which sensor of a recording is which channel of the corpus (other spellings, names of the older 10-20 system,
pairs that the user gives), what a recording lacks, and the order of the steps on samples: repair, reference, notch and
band of each stretch between joins, rate. Events are of no interest, but for joins. A finder reads headers and sidecars
and a few seconds of samples, which show dead sensors; the rest is read when a run is asked for, in stretches, and at
the recorded rate it lies on disk rather than in memory where it is large.

References
----------
Perrin et al. (1989), doi:10.1016/0013-4694(89)90180-6: spherical splines, by which electrodes are interpolated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, refuse_damage
from braindecode_vis.datasets.bids.meeg_files import (
    EXTENSIONS,
    HeldRecording,
    bring_sidecars,
    find_recordings,
    list_boundaries,
    list_recording_files,
    list_sensors,
    open_recording,
)
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig, MeegChannels
from braindecode_vis.datasets.corpus.recordings import (
    Channels,
    Excluded,
    SeriesRun,
    SourceCard,
    read_source_card,
)
from braindecode_vis.datasets.sources.meeg_source import Sensors, list_scalp_positions
from braindecode_vis.preprocessing.cleaning import (
    filter_samples,
    find_longest_filter,
    iterate_blocks,
    make_interpolation,
)

TEN_TWENTY = (
    "Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3", "Pz", "P4", "P8", "O1", "O2",
)  # fmt: skip
"""Electrodes of the 10-20 system that nearly every cap has: the channels of EEG by default."""
# The older system and the one in use call the same places differently (Jurcak et al. 2007).
_RENAMED = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
# EDF files spell FP1 as "EEG Fp1-REF", "EEG FP1-LE" or "Fp1."; a pair such as "FP1-F7" is another channel.
_SPELLING = re.compile(
    r"(?:EEG[ _-]*)?([A-Za-z]+\d*[A-Za-z]?)\.*(?:[ _-]*(?:REF|LE|AR|AVG|AVE|A1|A2|M1|M2|A1A2|LER))?",
    re.IGNORECASE,
)
_REGIONS = (
    ("frontal", r"(?:Fp|AF|F)(?:\d+|z)"),
    ("central", r"(?:FC|C|CP)(?:\d+|z)"),
    ("temporal", r"(?:FT|T|TP)\d+"),
    ("parietal", r"P(?:\d+|z)"),
    ("occipital", r"(?:PO|O|I)(?:\d+|z)"),
)
_CTF_REGIONS = {"F": "frontal", "C": "central", "T": "temporal", "P": "parietal", "O": "occipital"}
_KINDS = {"eeg": ("eeg",), "meg": ("mag", "grad")}
# Microvolt, femtotesla and femtotesla per centimetre: numbers that half precision holds.
_UNITS = {"eeg": 1e6, "mag": 1e15, "grad": 1e13}
_PROBES, _PROBE_S = 5, 2.0
_IN_MEMORY, _FILTERED_BYTES = 256 << 20, 64 << 20


def read_meeg_channels(config: MeegChannels, roots: Sequence[Path]) -> Channels:
    """Return the sensors of a corpus: those that are named, else the 10-20 system, or all of the first MEG recording.

    Raises
    ------
    ConfigError
        If an electrode is named that no system of electrodes has, or a sensor is there twice.
    DataError
        If a MEG recording must name the sensors, and there is none.
    """
    names = config.names
    if len(set(names)) != len(names):
        raise ConfigError("channels.names of a corpus names a sensor twice.")
    if config.modality == "eeg":
        names = names or TEN_TWENTY
        known = list_scalp_positions()
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(
                f"channels.names has {', '.join(unknown)}, which are not in the 10-05 system, so no "
                "recording can be mapped to them by name; use its nearest electrodes."
            )
        return Channels(names, tuple(map(_find_region, names)), np.stack([known[name] for name in names]))
    for root in roots:
        for held in find_recordings(root.expanduser().absolute(), ("meg",), None):
            sensors = list_sensors(_open(held, root), _KINDS["meg"])
            rows = {_name_sensor(name): row for row, name in enumerate(sensors.ch_names)}
            names = names or tuple(rows)
            if sensors.ch_pos is None or not set(names) <= set(rows):
                continue  # the next recording may know the places of all
            places = sensors.ch_pos[[rows[name] for name in names]]
            return Channels(names, tuple(map(_find_region, names)), places)
    if not names:
        raise DataError(
            f"no MEG recording was found below {', '.join(map(str, roots))}, whose sensors would be the channels of "
            f"the corpus: expected sub-01/[ses-01/]meg/sub-01_..._meg{EXTENSIONS['meg'][0]} and its like."
        )
    return Channels(names, tuple(map(_find_region, names)))


def find_meeg_runs(root: Path, config: CorpusConfig) -> tuple[list[SeriesRun], list[Excluded]]:
    """Return the recordings below a root, of which little was read yet, and those that are left out.

    Parameters
    ----------
    root
        BIDS data set of EEG or MEG, with or without events.
    config
        Settings of the corpus, whose channels are sensors with their names.

    Raises
    ------
    DataError
        If the root holds no recording, or none that can be used; the message says why of the first.
    """
    channels = config.channels
    assert isinstance(channels, MeegChannels)
    if channels.modality == "meg" and channels.absent == "interpolate":
        raise ConfigError(
            "channels.absent=interpolate is possible only for EEG, whose electrode positions follow from "
            "their names; set mask."
        )
    root = root.expanduser()
    card, runs, excluded = read_source_card(root), [], []
    for held in find_recordings(root, (channels.modality,), None):
        try:
            runs.append(_describe(held, root, card, channels))
        except (DataError, ConfigError) as error:
            excluded.append(Excluded(held.path, str(error).removesuffix(".")))
    if not runs:
        if excluded:
            raise DataError(
                f"none of the {len(excluded)} recordings of {root} can be used; {excluded[0].path}: "
                f"{excluded[0].reason}."
            )
        kind = channels.modality
        raise DataError(
            f"{root} holds no recording of {kind.upper()}: expected sub-01/[ses-01/]{kind}/sub-01_..._{kind}"
            f"{EXTENSIONS[kind][0]} and its like, as BIDS has them."
        )
    return runs, excluded


# --- one recording ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How the samples of a recording become channels.

    Parameters
    ----------
    sensors
        Sensors of the recording that are read, by their names in the file; among them all that a reference or a repair
        needs.
    names
        Their names in the corpus, or as close as they come.
    bads
        Those of `names` that are marked or dead.
    wanted, missing
        Channels of the corpus, and those that stay empty.
    stretches
        First and past-the-last samples between joins that are long enough for the filters; the others are cut.
    sfreq
        Of the recording (Hz).
    """

    sensors: tuple[str, ...]
    names: tuple[str, ...]
    bads: tuple[str, ...]
    wanted: tuple[str, ...]
    missing: tuple[str, ...]
    stretches: tuple[tuple[int, int], ...]
    sfreq: float


def _describe(held: HeldRecording, root: Path, card: SourceCard, config: MeegChannels) -> SeriesRun:
    raw = _open(held, root)
    sfreq, n = float(raw.info["sfreq"]), int(raw.n_times)
    if sfreq < config.sfreq / 2:
        raise DataError(
            f"it was sampled at {sfreq:g} Hz, less than half of the {config.sfreq:g} Hz of the corpus, "
            "so most samples would have to be interpolated"
        )
    sensors = list_sensors(raw, _KINDS[config.modality])
    own = _match_names(sensors.ch_names, config)
    marked = {own[name] for name in raw.info["bads"] if name in own}
    dead = _find_dead(sensors, [name for name in sensors.ch_names if name in own], n, sfreq)
    bads = tuple(name for file, name in own.items() if name in marked or file in dead)
    there = set(own.values())
    good = there - set(bads)
    if not good & set(config.names):
        some = ", ".join(sensors.ch_names[:5])
        raise DataError(
            f"none of its sensors ({some}, ...) is a good channel of the corpus; give the names with "
            "channels.aliases, [[name in the file, name in the corpus], ...]"
        )
    absent = [name for name in config.names if name not in there]
    missing = [name for name in absent if config.absent == "mask"]
    missing += [name for name in bads if name in config.names and config.bad_channels == "mask"]
    longest = find_longest_filter(sfreq, *_limit_filter(config, sfreq))
    edges = [0, *list_boundaries(raw), n]
    stretches = tuple((start, stop) for start, stop in pairwise(edges) if stop - start >= longest)
    if not stretches:
        raise DataError(
            f"its longest stretch between joins lasts {max(np.diff(edges)) / sfreq:.1f} s, less than a filter of "
            f"{longest / sfreq:.1f} s; raise channels.l_freq"
        )
    plan = _Plan(
        tuple(own), tuple(own.values()), bads, config.names, tuple(n for n in config.names if n in missing),
        stretches, sfreq,
    )  # fmt: skip
    bids, files = held.bids, list_recording_files(held.path, root)
    parts = [Path(name) for name in raw.filenames if name is not None and Path(name).is_file()]
    # The samples first: a folder of CTF holds a dozen files, of which one has the name.
    main = next((path for path in files.values() if path.suffix == ".meg4"), held.path)
    kept = sum(stop - start for start, stop in stretches)
    return SeriesRun(
        source=card.name,
        subject=held.subject,
        session=held.session if bids is None else bids.session or "",
        run=held.run if bids is None else bids.run or "",
        task=held.task,
        site=card.find_site(held.subject),
        files=tuple(dict.fromkeys([main, *files.values(), *parts])),
        modality=config.modality,
        channels=config.names,
        missing=plan.missing,
        n_times=sum(_count_resampled(stop - start, sfreq, config.sfreq) for start, stop in stretches),
        interval_s=1 / config.sfreq,
        motion_mm=None,
        licence=card.licence,
        read=_Reader(held, root, plan, config),
        scrubbed=1 - kept / n,
    )


def _open(held: HeldRecording, root: Path) -> Any:
    """Open a recording with its sidecars, which name types, bad channels and places of sensors."""

    def read_with_sidecars() -> Any:
        import mne_bids

        bids = held.bids
        if bids is None:
            bids = mne_bids.get_bids_path_from_fname(bring_sidecars(held.path, root), verbose="error")
        return mne_bids.read_raw_bids(bids, verbose="error")

    raw = open_recording(held.path, held.where, read_with_sidecars)
    kinds = _KINDS[held.datatype]
    if not set(kinds) & set(raw.get_channel_types()):
        # Published tables call sensors OTHER, as those of THINGS-MEG do; then the recording itself is believed.
        bare = open_recording(held.path, held.where)
        bare.info["bads"] = [name for name in raw.info["bads"] if name in bare.ch_names]
        return bare
    return raw


def _match_names(sensors: Sequence[str], config: MeegChannels) -> dict[str, str]:
    """Return the name in the corpus of each sensor that has one, and of further electrodes the name of their place.

    Raises
    ------
    DataError
        If two sensors are the same channel.
    """
    given = {name.lower(): target for name, target in config.aliases}
    if config.modality == "meg":
        found = {
            name: given.get(name.lower()) or given.get(_name_sensor(name).lower()) or _name_sensor(name)
            for name in sensors
        }
    else:
        known = {name.lower(): name for name in (*list_scalp_positions(), *config.names)}
        renamed = {
            old.lower(): new
            for old, new in _RENAMED.items()
            if new in config.names and old not in config.names
        }
        found = {}
        for name in sensors:
            spelled = _SPELLING.fullmatch(name.strip())
            bare = (spelled[1] if spelled else name).lower()
            place = given.get(name.lower()) or given.get(bare) or renamed.get(bare) or known.get(bare)
            # What has no place, such as a heart that a file calls EEG, would spoil the reference.
            if place is not None:
                found[name] = place
    twice = next((name for name in found.values() if list(found.values()).count(name) > 1), None)
    if twice is not None:
        both = " and ".join(name for name, place in found.items() if place == twice)
        raise DataError(f"its sensors {both} are both {twice}; choose one with channels.aliases")
    return found


def _name_sensor(name: str) -> str:
    """Return the name of a sensor of CTF without the number of the machine, ``MLC11-1609``; others as they are."""
    return re.sub(r"^(M[LRZ][A-Z]\d{2})-\d+$", r"\1", name)


def _find_region(name: str) -> str:
    ctf = re.fullmatch(r"M[LRZ]([A-Z])\d{2}", name)
    if ctf is not None:
        return _CTF_REGIONS.get(ctf[1], "")
    return next((region for region, pattern in _REGIONS if re.fullmatch(pattern, name)), "")


def _find_dead(sensors: Sensors, names: Sequence[str], n: int, sfreq: float) -> set[str]:
    """Return the sensors that are flat, or not finite, in each of a few stretches."""
    rows = [sensors.ch_names.index(name) for name in names]
    length = max(2, min(n, round(_PROBE_S * sfreq)))
    alive = np.zeros(len(rows), bool)
    for start in np.unique(np.linspace(0, max(0, n - length), _PROBES).astype(int)):
        samples = sensors.read(int(start), int(start) + length)[rows]
        with np.errstate(invalid="ignore"):
            alive |= np.isfinite(samples).all(axis=1) & (samples.max(axis=1) > samples.min(axis=1))
    return {name for name, lives in zip(names, alive, strict=True) if not lives}


def _limit_filter(config: MeegChannels, sfreq: float) -> tuple[tuple[float, ...], float | None, float | None]:
    """Return notches and band of a recording: what lies above half of its rate was never recorded."""
    # MNE's notch needs some room above it; a low-pass ends a quarter above its edge.
    notch = tuple(frequency for frequency in config.notch if frequency < 0.45 * sfreq)
    h_freq = config.h_freq if config.h_freq is not None and config.h_freq < 0.45 * sfreq else None
    return notch, config.l_freq, h_freq


def _count_resampled(n: int, sfreq: float, wanted: float) -> int:
    ratio = _find_ratio(sfreq, wanted)
    return -(-n * ratio.numerator // ratio.denominator)


@lru_cache(maxsize=32)
def _find_ratio(sfreq: float, wanted: float) -> Fraction:
    """Return the new rate over the old one; rates such as 1200 / 7 Hz are rounded in files."""
    return (
        Fraction(wanted).limit_denominator(10_000) / Fraction(sfreq).limit_denominator(10_000)
    ).limit_denominator(2000)


@dataclass(frozen=True)
class _Reader:
    """Reads a run: float32 (n_times, n_channels) in µV, fT or fT/cm; missing channels are NaN."""

    held: HeldRecording
    root: Path
    plan: _Plan
    config: MeegChannels

    def __call__(self) -> np.ndarray:
        plan, config = self.plan, self.config
        raw = _open(self.held, self.root)
        everything = list_sensors(raw, _KINDS[config.modality])
        rows = np.array([everything.ch_names.index(name) for name in plan.sensors])
        channels = [row for row, name in enumerate(plan.wanted) if name not in plan.missing]
        mixing = _make_mixing(everything, rows, plan, config, self.held.where)[channels]
        kinds = raw.get_channel_types(picks=[everything.ch_names[row] for row in rows])
        # Interpolation and reference stay among sensors of a kind, or nearly so; a channel has the unit of its own.
        units = dict(zip(plan.names, kinds, strict=True))
        scale = np.array([_UNITS[units.get(plan.wanted[row], "eeg")] for row in channels])
        n = int(raw.n_times)
        out = np.full(
            (
                sum(
                    _count_resampled(stop - start, plan.sfreq, config.sfreq) for start, stop in plan.stretches
                ),
                len(plan.wanted),
            ),
            np.nan,
            np.float32,
        )
        with TemporaryDirectory() as folder:
            path = Path(folder) / "mixed.npy" if 4 * n * len(channels) > _IN_MEMORY else None
            mixed = (
                np.empty((len(channels), n), np.float32)
                if path is None
                else np.lib.format.open_memmap(path, "w+", np.float32, (len(channels), n))
            )
            first = None
            for start, block in self._iterate(everything, rows, n):
                samples = (mixing @ block) * scale[:, None]
                # Amplifiers have offsets of millivolts, of which single precision would leave few digits.
                first = samples[:, :1] if first is None else first
                mixed[:, start : start + samples.shape[1]] = samples - first
            # A filter needs the whole stretch of a channel, and is made once for as many as fit in memory.
            size = max(1, _FILTERED_BYTES // (8 * n))
            for row in range(0, len(channels), size):
                out[:, channels[row : row + size]] = _filter_channels(mixed[row : row + size], plan, config).T
            del mixed
        return out

    def _iterate(self, sensors: Sensors, rows: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
        bad = np.array([name in self.plan.bads for name in self.plan.names])
        for start, stop in iterate_blocks(n, 8 * len(sensors.ch_names)):
            with refuse_damage(f"{self.held.where} cannot be read"):
                block = np.asarray(sensors.read(start, stop), float)[rows]
            # A product with zero must not bring what a bad sensor holds.
            block[bad] = 0
            if not np.isfinite(block).all():
                row, column = (int(axis[0]) for axis in np.nonzero(~np.isfinite(block)))
                raise DataError(
                    f"{self.held.where}: {self.plan.sensors[row]} is not finite at "
                    f"{(start + column) / self.plan.sfreq:.3f} s; mark it as bad in channels.tsv."
                )
            yield start, block


def _make_mixing(
    sensors: Sensors, rows: np.ndarray, plan: _Plan, config: MeegChannels, where: str
) -> np.ndarray:
    """Return the matrix from the sensors that are read to the channels of the corpus, (n_wanted, n_sensors).

    Bad and absent sensors are made of the good ones, then the mean of the good and repaired electrodes is taken off.
    """
    absent = [name for name in plan.wanted if name not in plan.names and name not in plan.missing]
    names = (*plan.names, *absent)
    repaired = list(absent)
    if config.bad_channels == "interpolate":
        repaired += plan.bads
    mixing = np.eye(len(names))
    if repaired:
        whole = _place(sensors, rows, names, config, where)
        # The others must not lean on a bad one.
        gone = list(dict.fromkeys([*repaired, *plan.bads]))
        try:
            mixing = make_interpolation(whole, gone, where, config.modality)
        except ConfigError as error:
            raise DataError(
                f"{where} has too few good sensors to interpolate {', '.join(gone)}; set channels.bad_channels and "
                "channels.absent to mask."
            ) from error
    if config.reference == "average" and config.modality == "eeg":
        own = [row for row, name in enumerate(names) if name not in absent]
        good = [row for row in own if names[row] in repaired or names[row] not in plan.bads]
        mixing = mixing - mixing[good].mean(axis=0)
    # Channels that stay empty have a row nobody reads.
    places = [names.index(name) if name in names else 0 for name in plan.wanted]
    return np.asarray(mixing[places][:, : len(plan.names)])


def _place(
    sensors: Sensors, rows: np.ndarray, names: Sequence[str], config: MeegChannels, where: str
) -> Sensors:
    """Return the sensors under their names in the corpus and in one frame: the template's, where all have a place."""
    if config.modality == "meg":
        import mne

        assert sensors.info is not None
        own = [sensors.ch_names[row] for row in rows]
        info = mne.pick_info(sensors.info, [sensors.info.ch_names.index(name) for name in own])
        mapping: Mapping[str, str] = dict(zip(own, names, strict=True))
        with info._unlock():
            info["bads"] = []
        mne.rename_channels(info, mapping, verbose="error")
        return Sensors(tuple(names), sensors.read, None, info)
    known = list_scalp_positions()
    return Sensors(tuple(names), sensors.read, np.stack([known[name] for name in names]))


def _filter_channels(samples: np.ndarray, plan: _Plan, config: MeegChannels) -> np.ndarray:
    """Return channels (n_channels, n_times) at the rate of the corpus, stretches between joins filtered apart."""
    from scipy.signal import resample_poly

    notch, l_freq, h_freq = _limit_filter(config, plan.sfreq)
    ratio = _find_ratio(plan.sfreq, config.sfreq)
    pieces = []
    for start, stop in plan.stretches:
        piece = np.array(samples[:, start:stop], dtype=float)
        piece = filter_samples(piece, plan.sfreq, notch, l_freq, h_freq)
        if ratio != 1:
            piece = resample_poly(piece, ratio.numerator, ratio.denominator, axis=1, padtype="line")
        pieces.append(piece.astype(np.float32))
    return np.concatenate(pieces, axis=1)
