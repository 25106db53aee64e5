"""The simulated EEG and MEG machines: sensors, references, sizes of noise, and their lead fields.

Caps are templates of MNE; the MEG helmet is its canonical CTF-275 array of axial gradiometers (5 cm baseline) around
the head of fsaverage. Machines are made on first use and kept in the process. Knows nothing of people and stimuli.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from braindecode_vis.checks import check_option
from braindecode_vis.phantom.leadfields import (
    compute_blink_field,
    compute_blink_potential,
    compute_eeg_leadfield,
    compute_meg_leadfield,
    get_positions,
)

if TYPE_CHECKING:
    import mne

THINGS_EEG2_CHANNELS = (
    "Fp1", "Fp2", "AF7", "AF3", "AFz", "AF4", "AF8", "F7", "F5", "F3", "F1", "F2", "F4", "F6", "F8", "FT9",
    "FT7", "FC5", "FC3", "FC1", "FCz", "FC2", "FC4", "FC6", "FT8", "FT10", "T7", "C5", "C3", "C1", "Cz",
    "C2", "C4", "C6", "T8", "TP9", "TP7", "CP5", "CP3", "CP1", "CPz", "CP2", "CP4", "CP6", "TP8", "TP10",
    "P7", "P5", "P3", "P1", "Pz", "P2", "P4", "P6", "P8", "PO7", "PO3", "POz", "PO4", "PO8", "O1", "Oz",
    "O2",
)  # fmt: skip
"""The 63 channels in the order of the public THINGS-EEG2 files; Fz, the online reference, is absent."""
EMOTIV_CHANNELS = (
    "Cz", "Fp1", "F7", "F3", "CP5", "CP1", "P1", "P3", "P5", "P7", "PO9", "PO7", "PO3", "O1", "O9", "Pz",
    "POz", "Oz", "O10", "O2", "PO4", "PO8", "PO10", "P8", "P6", "P4", "P2", "CP2", "CP6", "F4", "F8", "Fp2",
)  # fmt: skip
"""The 32 channels in the order of the public Alljoined-1.6M files."""
MACHINES = ("eeg63", "eeg64-biosemi", "eeg32-emotiv", "meg-ctf272")

HELMET_SHIFT_M = (0.0, 0.0145, 0.0577)
"""Device-to-head shift that centres the scalp of fsaverage in the helmet, 24 mm from the coils on average."""
_ABSENT_SENSORS = ("MRF43", "MRO13")


@dataclass(frozen=True, eq=False)
class Machine:
    """A simulated EEG or MEG system on the head of fsaverage.

    Parameters
    ----------
    name
        One of `MACHINES`.
    modality
        ``eeg`` or ``meg``.
    ch_names, ch_types
        Names and MNE types (``eeg`` or ``mag``, which is how MNE types axial gradiometers) of the channels.
    ch_pos : array of shape (n_channels, 3)
        Position of each sensor in m, in MNE head coordinates.
    sfreq
        Sampling rate of the public data set, in Hz.
    unit
        ``V`` or ``T``.
    leadfield : float array of shape (n_channels, n_sources)
        Volt or tesla per ampere metre of dipole moment, reference applied; sources are those of `make_cortex`.
    blink : float array of shape (n_channels,)
        Topography of an eye blink at its peak, in the unit of the machine.
    noise_rms, sensor_rms, line_rms
        Rms over channels of the 1/f background, of white sensor noise at `sfreq` and of mains pick-up.
    line_freq
        Mains frequency in Hz.
    reference
        Where potentials are measured against; empty for MEG.
    """

    name: str
    modality: Literal["eeg", "meg"]
    ch_names: tuple[str, ...]
    ch_types: tuple[str, ...]
    ch_pos: np.ndarray
    sfreq: float
    unit: Literal["V", "T"]
    leadfield: np.ndarray
    blink: np.ndarray
    noise_rms: float
    sensor_rms: float
    line_rms: float
    line_freq: float
    reference: str

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return len(self.ch_names)

    def make_info(self, sfreq: float | None = None) -> mne.Info:
        """Return a new MNE info with positions, at `sfreq` or the rate of the machine."""
        if self.modality == "meg":
            return _make_helmet_info(sfreq or self.sfreq)
        info = _make_cap_info(self.ch_names, sfreq or self.sfreq)
        info["line_freq"] = self.line_freq
        return info


@lru_cache(maxsize=len(MACHINES))
def make_machine(name: str) -> Machine:
    """Return a machine; lead fields are computed on the first call and kept.

    Parameters
    ----------
    name
        ``eeg63`` (THINGS-EEG2 cap, 1000 Hz), ``eeg64-biosemi`` (512 Hz), ``eeg32-emotiv`` (256 Hz) or
        ``meg-ctf272`` (1200 Hz).

    Raises
    ------
    ConfigError
        If there is no such machine.
    """
    check_option("machine", name, MACHINES)
    if name == "meg-ctf272":
        return _make_meg(name)
    biosemi = ("average", 512.0, 60.0)
    # Names, online reference, sampling rate and mains of each public data set.
    caps: dict[str, tuple[tuple[str, ...], str, float, float]] = {
        "eeg63": (THINGS_EEG2_CHANNELS, "Fz", 1000.0, 50.0),
        "eeg64-biosemi": (_list_biosemi_channels(), *biosemi),
        "eeg32-emotiv": (EMOTIV_CHANNELS, "linked mastoids", 256.0, 60.0),
    }
    return _make_eeg(name, *caps[name])


def _make_eeg(
    name: str, ch_names: tuple[str, ...], reference: str, sfreq: float, line_freq: float
) -> Machine:
    references = {"Fz": ("Fz",), "linked mastoids": ("TP9", "TP10"), "average": ()}[reference]
    extra = tuple(electrode for electrode in references if electrode not in ch_names)
    info = _make_cap_info((*ch_names, *extra), sfreq)
    positions = get_positions(info)
    potential = np.concatenate(
        [compute_eeg_leadfield(info), compute_blink_potential(positions)[:, None]], axis=1
    )
    if references:
        at_reference = [info["ch_names"].index(electrode) for electrode in references]
        potential = potential - potential[at_reference].mean(axis=0)
    else:
        potential = potential - potential.mean(axis=0)
    potential = potential[: len(ch_names)]
    frontal = [ch_names.index(electrode) for electrode in ("Fp1", "Fp2")]
    return Machine(
        name=name,
        modality="eeg",
        ch_names=ch_names,
        ch_types=("eeg",) * len(ch_names),
        ch_pos=positions[: len(ch_names)],
        sfreq=sfreq,
        unit="V",
        leadfield=potential[:, :-1],
        blink=200e-6 * potential[:, -1] / potential[frontal, -1].mean(),
        noise_rms=8e-6,
        sensor_rms=2e-6,  # amplifier, electrodes and muscles
        line_rms=0.7e-6,
        line_freq=line_freq,
        reference=reference,
    )


def _make_meg(name: str) -> Machine:
    info = _make_helmet_info(1200.0)
    blink = compute_blink_field(info)
    return Machine(
        name=name,
        modality="meg",
        ch_names=tuple(info["ch_names"]),
        ch_types=("mag",) * len(info["ch_names"]),
        ch_pos=get_positions(info),
        sfreq=1200.0,
        unit="T",
        leadfield=compute_meg_leadfield(info),
        blink=1e-12 * blink / np.abs(blink).max(),
        noise_rms=150e-15,
        sensor_rms=5e-15 * np.sqrt(600),  # 5 fT per root hertz up to the Nyquist rate
        line_rms=100e-15,
        line_freq=60.0,
        reference="",
    )


@lru_cache(maxsize=1)
def _list_biosemi_channels() -> tuple[str, ...]:
    import mne

    return tuple(mne.channels.make_standard_montage("biosemi64").ch_names)


def _make_cap_info(ch_names: tuple[str, ...], sfreq: float) -> mne.Info:
    import mne

    # MNE 1.13 renamed the template.
    template = "colin27_1005" if "colin27_1005" in mne.channels.get_builtin_montages() else "standard_1005"
    montage = mne.channels.make_standard_montage(template)
    positions = montage.get_positions()
    known = dict(positions["ch_pos"])
    for name, neighbour in (("O9", "PO9"), ("O10", "PO10")):
        # The template stops above these two; they sit below O1 and O2, one step behind PO9 and PO10.
        step = known["I1" if name == "O9" else "I2"]
        known[name] = (step + known[neighbour]) / 2
    complete = mne.channels.make_dig_montage(
        ch_pos={name: known[name] for name in ch_names},
        nasion=positions["nasion"],
        lpa=positions["lpa"],
        rpa=positions["rpa"],
        coord_frame=positions["coord_frame"],
    )
    info = mne.create_info(list(ch_names), sfreq, "eeg", verbose="ERROR")
    info.set_montage(complete, verbose="ERROR")
    return info


def _make_helmet_info(sfreq: float) -> mne.Info:
    import mne

    canonical = mne.channels.read_meg_canonical_info("ctf275", verbose="ERROR")
    # One spelling of the serial number, the one of the public THINGS-MEG recordings.
    names = {channel: f"{channel.split('-')[0]}-1609" for channel in canonical["ch_names"]}
    kept = [
        i for i, channel in enumerate(canonical["ch_names"]) if channel.split("-")[0] not in _ABSENT_SENSORS
    ]
    info = mne.create_info([names[canonical["ch_names"][i]] for i in kept], sfreq, "mag", verbose="ERROR")
    for target, number in zip(info["chs"], kept, strict=True):
        source = canonical["chs"][number]
        target["loc"] = source["loc"].copy()
        target["coil_type"] = source["coil_type"]
        target["coord_frame"] = source["coord_frame"]
    shift = np.eye(4)
    shift[:3, 3] = HELMET_SHIFT_M
    with info._unlock():
        info["dev_head_t"] = mne.transforms.Transform("meg", "head", shift)
        info["line_freq"] = 60.0
    return info
