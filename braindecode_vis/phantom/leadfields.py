"""The physics between cortex and sensors: lead fields and the fields of the blinking eye.

EEG uses the multi-shell spherical head of MNE (Berg and Scherg 1994, doi:10.1016/0013-4694(94)90113-9), with the cortex
warped radially so that the inner skull of fsaverage becomes the brain sphere; MEG uses the boundary-element inner
skull of fsaverage that ships with MNE. Knows sensors only as an MNE info.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.phantom.cortex import make_cortex

if TYPE_CHECKING:
    import mne

SPHERE_CENTRE_M = np.array([0.0, 0.01, 0.045])
SPHERE_RADIUS_M = 0.095
EYES_MNI_MM = np.array([[-33.0, 62.0, -36.0], [33.0, 62.0, -36.0]])


def get_positions(info: mne.Info) -> np.ndarray:
    """Return sensor positions in head coordinates, float array (n_channels, 3) in m; the helmet is not tilted."""
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
        # The public route to a coarser surface: MNE decimates by icosahedral order what it reads from disk.
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
    return np.einsum("csd,sd->cs", free, normals @ transform["trans"][:3, :3])
