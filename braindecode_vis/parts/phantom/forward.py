"""From cortex to sensors: the simulated EEG and MEG systems, their lead fields, and the patterns of a subject's stages.

Caps are templates of MNE; the MEG helmet is its canonical CTF-275 array of axial gradiometers (5 cm baseline) around
the head of fsaverage. EEG uses the multi-shell spherical head of MNE (Berg and Scherg 1994,
doi:10.1016/0013-4694(94)90113-9), with the cortex warped radially so that the inner skull of fsaverage becomes the
brain sphere; MEG uses the boundary-element inner skull of fsaverage that ships with MNE. Systems are made on first use
and kept in the process. `compute_patterns` is the product of tuning (`brain`) and lead field; both the signal
(`meeg_signal`) and the spontaneous activity (`noise`) are computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import check_option
from braindecode_vis.datasets.alljoined.alljoined1 import BIOSEMI64
from braindecode_vis.datasets.alljoined.blocks import FLEX2
from braindecode_vis.datasets.eeg_imagenet import CHANNELS as NEUROSCAN62
from braindecode_vis.datasets.sources.meeg_source import make_template_montage
from braindecode_vis.datasets.things_eeg2.dataset import ALL63
from braindecode_vis.parts.phantom.brain import (
    Person,
    compute_common_amplitudes,
    compute_weights,
    get_features,
)
from braindecode_vis.parts.phantom.cortex import make_cortex

if TYPE_CHECKING:
    import mne

SENSOR_SYSTEMS = ("eeg63", "eeg63-cz", "eeg64-biosemi", "eeg62-neuroscan", "eeg32-emotiv", "meg-ctf272")
HELMET_SHIFT_M = (0.0, 0.0145, 0.0577)
"""Device-to-head shift that centres the scalp of fsaverage in the helmet, 24 mm from the coils on average."""
# Of the 275 of the array, these were broken when THINGS-MEG was recorded; one more is removed in its epochs.
_ABSENT_SENSORS = ("MRF43", "MRO13")
SPHERE_CENTRE_M = np.array([0.0, 0.01, 0.045])
SPHERE_RADIUS_M = 0.095
EYES_MNI_MM = np.array([[-33.0, 62.0, -36.0], [33.0, 62.0, -36.0]])


@dataclass(frozen=True, eq=False)
class SensorSystem:
    """A simulated EEG or MEG system on the head of fsaverage.

    Parameters
    ----------
    name
        One of `SENSOR_SYSTEMS`.
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
        Topography of an eye blink at its peak, in the unit of the system.
    noise_rms, sensor_rms, line_rms
        Rms over channels of the 1/f background, of white sensor noise at `sfreq` and of mains pick-up.
    line_freq
        Mains frequency in Hz.
    reference
        Reference of the potentials; empty for MEG.
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
        """Return a new MNE info with positions, at `sfreq` or the rate of the system."""
        if self.modality == "meg":
            return _make_helmet_info(sfreq or self.sfreq)
        info = _make_cap_info(self.ch_names, sfreq or self.sfreq)
        info["line_freq"] = self.line_freq
        return info


@lru_cache(maxsize=len(SENSOR_SYSTEMS))
def make_sensor_system(name: str) -> SensorSystem:
    """Return a system; lead fields are computed on the first call and kept.

    Parameters
    ----------
    name
        ``eeg63`` (THINGS-EEG2 cap, 1000 Hz), ``eeg63-cz`` (the same, against Cz), ``eeg64-biosemi`` (512 Hz),
        ``eeg62-neuroscan`` (1000 Hz), ``eeg32-emotiv`` (256 Hz) or ``meg-ctf272`` (1200 Hz).

    Raises
    ------
    ConfigError
        If there is no such system.
    """
    check_option("recording system", name, SENSOR_SYSTEMS)
    if name == "meg-ctf272":
        info = _make_helmet_info(1200.0)
        blink = compute_blink_field(info)
        return SensorSystem(
            name=name,
            modality="meg",
            ch_names=tuple(info["ch_names"]),
            ch_types=("mag",) * len(info["ch_names"]),
            ch_pos=get_positions(info),
            sfreq=1200.0,
            unit="T",
            leadfield=compute_meg_leadfield(info),
            blink=1e-12 * blink / np.abs(blink).max(),  # about a picotesla at the front of the helmet
            noise_rms=150e-15,
            sensor_rms=5e-15 * np.sqrt(600),  # 5 fT per root hertz up to the Nyquist rate
            line_rms=100e-15,
            line_freq=60.0,
            reference="",
        )
    # Names, online reference, sampling rate and mains of each public data set.
    caps: dict[str, tuple[tuple[str, ...], str, float, float]] = {
        "eeg63": (ALL63, "Fz", 1000.0, 50.0),
        "eeg63-cz": (tuple("Fz" if name == "Cz" else name for name in ALL63), "Cz", 1000.0, 50.0),
        "eeg64-biosemi": (BIOSEMI64, "average", 512.0, 60.0),
        "eeg62-neuroscan": (NEUROSCAN62, "average", 1000.0, 50.0),
        "eeg32-emotiv": (FLEX2, "linked mastoids", 256.0, 60.0),
    }
    return _make_eeg(name, *caps[name])


def _make_eeg(
    name: str, ch_names: tuple[str, ...], reference: str, sfreq: float, line_freq: float
) -> SensorSystem:
    references = {"Fz": ("Fz",), "Cz": ("Cz",), "linked mastoids": ("TP9", "TP10"), "average": ()}[reference]
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
    potential = potential[: len(ch_names)]  # electrodes that only serve as reference go
    frontal = [ch_names.index(electrode) for electrode in ("Fp1", "Fp2")]
    return SensorSystem(
        name=name,
        modality="eeg",
        ch_names=ch_names,
        ch_types=("eeg",) * len(ch_names),
        ch_pos=positions[: len(ch_names)],
        sfreq=sfreq,
        unit="V",
        leadfield=potential[:, :-1],
        blink=200e-6 * potential[:, -1] / potential[frontal, -1].mean(),
        noise_rms=8e-6,  # ongoing scalp EEG of an awake subject is of the order of 10 microvolt
        sensor_rms=2e-6,  # amplifier, electrodes and muscles
        line_rms=0.7e-6,
        line_freq=line_freq,
        reference=reference,
    )


def _make_cap_info(ch_names: tuple[str, ...], sfreq: float) -> mne.Info:
    import mne

    positions = make_template_montage().get_positions()
    known = dict(positions["ch_pos"])
    for name, neighbour in (("O9", "PO9"), ("O10", "PO10")):
        # The template does not contain these two; they are below O1 and O2, one step behind PO9 and PO10.
        step = known["I1" if name == "O9" else "I2"]
        known[name] = (step + known[neighbour]) / 2
    known |= {"CB1": known["POO7"], "CB2": known["POO8"]}  # cerebellar, as MNE places them
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
    # The spelling of the serial number in the public THINGS-MEG recordings.
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


@lru_cache(maxsize=8)
def compute_patterns(person: Person, system: SensorSystem) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return the sensor pattern of every feature and of the response that all images share.

    Returns
    -------
    patterns : sequence of float32 arrays of shape (n_channels, n_features)
        One per stage, up to one common scale.
    common : float array of shape (n_stages, n_channels)
        Up to a separate scale.
    """
    positions = make_cortex().positions
    patterns, common = [], []
    for stage in person.stages:
        members, weights = compute_weights(person, stage, positions)
        patterns.append((system.leadfield[:, members] @ weights).astype(np.float32))
        members, amplitudes = compute_common_amplitudes(person, stage, positions)
        common.append(system.leadfield[:, members] @ amplitudes)
    return tuple(patterns), np.stack(common)


def project_images(person: Person, patterns: tuple[np.ndarray, ...], rows: np.ndarray) -> np.ndarray:
    """Return the pattern that each image evokes in each stage, float32 (n_rows, n_stages, n_channels)."""
    shown = [
        get_features(person, stage, rows) @ pattern.T
        for stage, pattern in zip(person.stages, patterns, strict=True)
    ]
    return np.stack(shown, axis=1)


def pick_training_rows(person: Person) -> np.ndarray:
    """Return at most 2000 training images, evenly spread over the drive: enough for second moments."""
    train = np.flatnonzero(person.drive.is_train)
    return train[np.linspace(0, len(train) - 1, min(len(train), 2000)).astype(int)]


def get_positions(info: mne.Info) -> np.ndarray:
    """Return sensor positions in head coordinates, float array (n_channels, 3) in m; the helmet has no tilt."""
    positions = np.array([channel["loc"][:3] for channel in info["chs"]])
    if info["dev_head_t"] is not None:
        positions = positions + info["dev_head_t"]["trans"][:3, 3]
    return positions


def compute_eeg_leadfield(info: mne.Info) -> np.ndarray:
    """Return the potential of unit dipoles at the sources of `make_cortex`.

    Parameters
    ----------
    info
        EEG channels with positions.

    Returns
    -------
    leadfield : float array of shape (n_channels, n_sources)
        Volt per ampere metre, against infinity.
    """
    import mne
    from scipy.spatial import cKDTree

    cortex = make_cortex()
    skull = _to_head(_read_inner_skull()["rr"] * 1000) - SPHERE_CENTRE_M
    radius = np.linalg.norm(skull, axis=1)
    points = _to_head(cortex.positions) - SPHERE_CENTRE_M
    depth = np.linalg.norm(points, axis=1, keepdims=True)
    _, nearest = cKDTree(skull / radius[:, None]).query(points / depth)
    brain_radius = 0.90 * SPHERE_RADIUS_M  # innermost of the shells
    relative = np.clip(depth / radius[nearest, None], 0.05, 0.97)
    warped = points / depth * relative * brain_radius
    sphere = mne.make_sphere_model(SPHERE_CENTRE_M, SPHERE_RADIUS_M, verbose="ERROR")
    # MNE compares sources with a sphere after moving them to the MRI frame, but the centre of the sphere is in head
    # coordinates; with both frames equal the comparison is right.
    identity = mne.transforms.Transform("head", "mri", np.eye(4))
    # Normals rotate with the head, but are not shifted with it.
    normals = cortex.normals @ _read_head_transform()["trans"][:3, :3]
    return _compute_forward(info, sphere, identity, warped + SPHERE_CENTRE_M, normals)


def compute_meg_leadfield(info: mne.Info) -> np.ndarray:
    """Return the field of unit dipoles at the sources of `make_cortex`.

    Parameters
    ----------
    info
        MEG channels with coils and a device-to-head transform.

    Returns
    -------
    leadfield : float array of shape (n_channels, n_sources)
        Tesla per ampere metre.
    """
    import mne

    skull = _read_inner_skull()
    with TemporaryDirectory() as folder:
        # The public route to a coarser surface: MNE decimates surfaces from disk by icosahedral order.
        bem_folder = Path(folder) / "fsaverage" / "bem"
        bem_folder.mkdir(parents=True)
        mne.write_surface(bem_folder / "inner_skull.surf", skull["rr"] * 1000, skull["tris"])
        model = mne.make_bem_model(
            "fsaverage", ico=3, conductivity=(0.3,), subjects_dir=folder, verbose="ERROR"
        )
    solution = mne.make_bem_solution(model, verbose="ERROR")
    cortex = make_cortex()
    return _compute_forward(info, solution, _read_head_transform(), cortex.positions / 1000, cortex.normals)


def compute_blink_potential(positions: np.ndarray) -> np.ndarray:
    """Return the potential of the two corneo-retinal dipoles in an infinite medium, up to scale."""
    potential = np.zeros(len(positions))
    for eye in _to_head(EYES_MNI_MM):
        offset = positions - eye
        distance = np.linalg.norm(offset, axis=1)
        moment = np.array([0.0, 0.3, 1.0])  # the lid slides over the positive cornea: up and a little forward
        potential += offset @ moment / distance**3
    return potential


def compute_blink_field(info: mne.Info) -> np.ndarray:
    """Return the field of the eye dipoles through axial gradiometers (law of Biot and Savart), up to scale."""
    positions = get_positions(info)
    axes = np.array([channel["loc"][9:12] for channel in info["chs"]])
    field = np.zeros(len(positions))
    for eye in _to_head(EYES_MNI_MM):
        # An axial gradiometer measures the difference between two coils 5 cm apart.
        for place, sign in ((positions, 1.0), (positions + 0.05 * axes, -1.0)):
            offset = place - eye
            distance = np.linalg.norm(offset, axis=1)
            field += sign * np.einsum("ni,ni->n", np.cross([0.0, 0.3, 1.0], offset), axes) / distance**3
    return field


@lru_cache(maxsize=1)
def _read_head_transform() -> Any:
    import mne

    return mne.read_trans(_get_fsaverage_folder() / "fsaverage-trans.fif", verbose="ERROR")


def _get_fsaverage_folder() -> Path:
    import mne

    return Path(mne.__file__).parent / "data" / "fsaverage"


def _to_head(points_mm: np.ndarray) -> np.ndarray:
    """Move MNI points (mm) to MNE head coordinates (m)."""
    transform = _read_head_transform()["trans"]  # head -> MRI, rigid
    return (points_mm / 1000 - transform[:3, 3]) @ transform[:3, :3]


def _read_inner_skull() -> dict[str, Any]:
    import mne

    path = _get_fsaverage_folder() / "fsaverage-inner_skull-bem.fif"
    return mne.read_bem_surfaces(path, verbose="ERROR")[0]


def _compute_forward(
    info: mne.Info, head: Any, transform: Any, positions: np.ndarray, normals: np.ndarray
) -> np.ndarray:
    """Return the field of unit dipoles at `positions` (m, MRI frame) along `normals`, (n_channels, n_sources)."""
    import mne

    sources = mne.setup_volume_source_space(pos={"rr": positions, "nn": normals}, verbose="ERROR")
    forward = mne.make_forward_solution(info, transform, sources, head, mindist=0.0, verbose="ERROR")
    free = forward["sol"]["data"].reshape(
        len(info["ch_names"]), -1, 3
    )  # (n_channels, n_sources, xyz of the head)
    if free.shape[1] != len(positions):
        raise AssertionError(f"MNE kept {free.shape[1]} of {len(positions)} dipoles: the head model changed.")
    # Only the component along the normal of the surface: pyramidal cells are perpendicular to it.
    return np.einsum("csd,sd->cs", free, normals @ transform["trans"][:3, :3])


@lru_cache(maxsize=8)
def make_sensor_system_at(name: str, sfreq: float) -> SensorSystem:
    """Return a system with another sampling rate and the same density of sensor noise."""
    system = make_sensor_system(name)
    if sfreq == system.sfreq:
        return system
    return replace(system, sfreq=sfreq, sensor_rms=system.sensor_rms * np.sqrt(sfreq / system.sfreq))
