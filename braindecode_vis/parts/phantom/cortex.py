"""The map of the simulated brain: surface, regions, networks and retinotopy.

All labels are functions of a position in MNI space, so that surface sources (EEG, MEG) and voxels (fMRI) of one subject
agree. They are approximate and computed from published coordinates, since the installed packages contain no atlas:
"Yeo-7-like" networks by the nearest of the 300 seeds of Seitzman et al. 2020 (doi:10.1016/j.neuroimage.2019.116290),
category regions by distance to published peaks, early areas by distance to the calcarine sulcus. Stimuli, subjects and
sensors are in other modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from braindecode_vis.parts.phantom.phantom_config import NETWORKS

N_VERTICES = 2562
"""Vertices per hemisphere: the first 2562 of fsaverage5 are those of fsaverage4 (icosahedral subdivision)."""

EARLY_AREAS = ("V1", "V2", "V3")
CENTROIDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "hV4": ((-30, -80, -13), (30, -80, -13)),
    "LO": ((-43, -77, -6), (43, -75, -6)),
    "OPA": ((-33, -84, 20), (35, -82, 20)),
    "FFA": ((-40, -54, -20), (41, -52, -20)),
    "PPA": ((-26, -47, -11), (27, -45, -11)),
    "EBA": ((-48, -70, 4), (50, -69, 3)),
    "VWFA": ((-46, -57, -13),),
    "IT": ((-52, -44, -16), (53, -42, -16), (-36, -40, -22), (36, -38, -22)),
}
"""Approximate centres in MNI space (mm).

hV4: Winawer and Witthoft 2015 (doi:10.1017/S0952523815000176). LO: Grill-Spector et al. 2001
(doi:10.1016/S0042-6989(01)00073-6). OPA: Dilks et al. 2013 (doi:10.1523/JNEUROSCI.4081-12.2013). FFA: Kanwisher et
al. 1997 (doi:10.1523/JNEUROSCI.17-11-04302.1997). PPA: Epstein and Kanwisher 1998 (doi:10.1038/33402). EBA: Downing
et al. 2001 (doi:10.1126/science.1063414). VWFA: Cohen et al. 2000 (doi:10.1093/brain/123.2.291). IT fills the ventral
temporal cortex between them.
"""
REGIONS = (*EARLY_AREAS, *CENTROIDS)
RADIUS_MM = 15.0  # about the size of a functional region, and less than the distance of most centres

_SEED_NETWORK = {
    "Visual": "visual",
    "SomatomotorDorsal": "somatomotor",
    "SomatomotorLateral": "somatomotor",
    "Auditory": "somatomotor",  # one network in the seven-network parcellation
    "DorsalAttention": "dorsal_attention",
    "VentralAttention": "ventral_attention",
    "Salience": "ventral_attention",
    "CinguloOpercular": "ventral_attention",
    "FrontoParietal": "frontoparietal",
    "ParietoMedial": "frontoparietal",
    "DefaultMode": "default",
    "MedialTemporalLobe": "default",
}
# Seeds avoid areas of signal dropout, which include the limbic network.
_LIMBIC = ((-34, 10, -36), (34, 10, -36), (-14, 34, -22), (14, 34, -22), (-46, -10, -38), (46, -8, -38))
# The seeds of the visual network end before the poles, which would otherwise belong to another network.
_OCCIPITAL_POLES = ((-24, -98, -12), (26, -97, -13))


@dataclass(frozen=True)
class Cortex:
    """Source space: dipoles perpendicular to the white-matter surface of fsaverage.

    Parameters
    ----------
    positions : array of shape (n_sources, 3)
        MNI coordinates in mm, left hemisphere first.
    normals : array of shape (n_sources, 3)
        Unit vectors that point out of the white matter.
    """

    positions: np.ndarray
    normals: np.ndarray


@lru_cache(maxsize=1)
def make_cortex() -> Cortex:
    """Return the source space, 2 x 2562 vertices of the fsaverage5 white-matter surface that nilearn contains."""
    from nilearn.datasets import load_fsaverage

    mesh = load_fsaverage("fsaverage5")["white_matter"]
    positions, normals = [], []
    for side in ("left", "right"):
        points = np.asarray(mesh.parts[side].coordinates, np.float64)
        triangles = np.asarray(mesh.parts[side].faces)
        a, b, c = (points[triangles[:, corner]] for corner in range(3))
        per_face = np.cross(b - a, c - a)  # length is twice the area, so large faces weigh more
        per_vertex = np.zeros_like(points)
        for corner in range(3):
            np.add.at(per_vertex, triangles[:, corner], per_face)
        per_vertex /= np.linalg.norm(per_vertex, axis=1, keepdims=True)
        positions.append(points[:N_VERTICES])
        normals.append(per_vertex[:N_VERTICES])
    return Cortex(np.concatenate(positions), np.concatenate(normals))


def label_regions(positions: np.ndarray) -> np.ndarray:
    """Return the visual region of each position, or an empty text.

    Parameters
    ----------
    positions : array of shape (n_positions, 3)
        MNI coordinates in mm.

    Returns
    -------
    labels : array of text of shape (n_positions,)

    Examples
    --------
    >>> label_regions(np.array([[-10.0, -88.0, 0.0], [41.0, -52.0, -20.0], [0.0, 40.0, 20.0]])).tolist()
    ['V1', 'FFA', '']
    """
    names = [name for name, points in CENTROIDS.items() for _ in points]
    centroids = np.array([point for points in CENTROIDS.values() for point in points], float)
    distance = np.linalg.norm(positions[:, None] - centroids[None], axis=2)
    nearest = distance.argmin(axis=1)
    labels = np.where(distance.min(axis=1) <= RADIUS_MM, np.array(names, object)[nearest], "")
    depth = _measure_calcarine_distance(positions)
    for name, low, high in (("V1", 0, 10), ("V2", 10, 18), ("V3", 18, 26)):
        # Bands around the calcarine sulcus replace category regions, since retinotopic areas are defined first.
        labels = np.where((depth >= low) & (depth < high), name, labels)
    return labels.astype(object)


def label_networks(positions: np.ndarray) -> np.ndarray:
    """Return the Yeo-7-like network of each position, shape (n_positions,); visual regions are in ``visual``.

    Examples
    --------
    >>> label_networks(np.array([[0.0, -56.0, 30.0], [-40.0, -20.0, 55.0], [-10.0, -88.0, 0.0]])).tolist()
    ['default', 'somatomotor', 'visual']
    """
    from scipy.spatial import cKDTree

    seeds, networks = _load_network_seeds()
    labels = networks[cKDTree(seeds).query(positions)[1]]
    labels = np.where(label_regions(positions) != "", "visual", labels)
    return labels.astype(object)


def find_members(positions: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Return the positions in the named regions or networks, as sorted row numbers."""
    points = np.ascontiguousarray(positions, np.float64)
    return _find_members(points.tobytes(), frozenset(names)).copy()


@lru_cache(maxsize=32)
def _find_members(points: bytes, names: frozenset[str]) -> np.ndarray:
    """Return the members among points given as bytes; cached, since all stages of all subjects use the same few."""
    positions = np.frombuffer(points).reshape(-1, 3)
    networks = [name for name in names if name in NETWORKS]
    inside = np.isin(label_regions(positions), [name for name in names if name not in NETWORKS])
    if networks:
        inside |= np.isin(label_networks(positions), networks)
    return np.flatnonzero(inside)


def compute_receptive_fields(positions: np.ndarray, n_cells: int) -> np.ndarray:
    """Return the weight of each cell of the visual field in the receptive field of each position.

    The map follows the textbook layout: the left hemisphere represents the right half, the lower bank of the calcarine
    the upper half, and eccentricity grows from the occipital pole forward on a logarithmic scale (Horton and Hoyt 1991,
    doi:10.1001/archopht.1991.01080060080030). Receptive fields grow with eccentricity.

    Parameters
    ----------
    positions : array of shape (n_positions, 3)
        MNI coordinates in mm.
    n_cells
        Side of the square grid over the image.

    Returns
    -------
    fields : array of shape (n_positions, n_cells, n_cells)
        Rows from top to bottom, columns from left to right; each field sums to one.
    """
    x, y, z = positions.T
    forward = np.clip((y + 103) / 40, 0, 1)
    # Logarithmic magnification: equal steps along the sulcus are equal ratios of eccentricity.
    eccentricity = (np.exp(2.2 * forward) - 1) / (np.exp(2.2) - 1)  # 1 is the border of the image
    elevation = (
        np.clip((_calcarine_height(y) - z) / 18, -1, 1) * np.pi / 2
    )  # above the calcarine: lower field
    # The left hemisphere (x < 0) represents the right half of the field.
    horizontal = eccentricity * np.cos(elevation) * np.where(x < 0, 1, -1)
    vertical = eccentricity * np.sin(elevation)
    centre = (np.arange(n_cells) + 0.5) / n_cells * 2 - 1
    size = (0.12 + 0.25 * eccentricity)[:, None]
    columns = np.exp(-((centre[None] - horizontal[:, None]) ** 2) / (2 * size**2))
    rows = np.exp(-((centre[None] + vertical[:, None]) ** 2) / (2 * size**2))
    fields = rows[:, :, None] * columns[:, None, :]  # (n_positions, row, column): a separable Gaussian
    return fields / fields.sum(axis=(1, 2), keepdims=True)


def _calcarine_height(y: np.ndarray) -> np.ndarray:
    return 0.0 + 8.0 * np.clip((y + 95) / 35, 0, 1)  # the sulcus rises from the pole forward


def _measure_calcarine_distance(positions: np.ndarray) -> np.ndarray:
    """Return the distance (mm) to the calcarine line of the same hemisphere, infinite outside the occipital lobe."""
    x, y, z = positions.T
    lateral = np.abs(x) - 9
    # In front of the parieto-occipital junction the sulcus ends; behind the pole there is no cortex.
    ahead = np.clip(y + 66, 0, None) + np.clip(-(y + 100), 0, None) * 0.5
    distance = np.sqrt(
        np.clip(np.abs(lateral) - 4, 0, None) ** 2 + (z - _calcarine_height(y)) ** 2 + ahead**2
    )
    return np.where(y < -62, distance, np.inf)


@lru_cache(maxsize=1)
def _load_network_seeds() -> tuple[np.ndarray, np.ndarray]:
    from nilearn.datasets import fetch_coords_seitzman_2018

    atlas = fetch_coords_seitzman_2018()  # a table inside the package, nothing is downloaded
    names = np.asarray(atlas["networks"], dtype=object)
    cortical = np.array([str(region).startswith("cortex") for region in atlas["regions"]])
    keep = cortical & np.isin(names, list(_SEED_NETWORK))
    seeds = np.asarray(atlas["rois"], float)[keep]
    networks = np.array([_SEED_NETWORK[name] for name in names[keep]], dtype=object)
    extra = np.array([*_LIMBIC, *_OCCIPITAL_POLES], float)
    extra_names = np.array(["limbic"] * len(_LIMBIC) + ["visual"] * len(_OCCIPITAL_POLES), dtype=object)
    return np.concatenate([seeds, extra]), np.concatenate([networks, extra_names])
