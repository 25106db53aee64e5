"""The simulated fMRI scanner: voxels, their labels, regions of interest, and the grids and sizes of its volumes.

Voxels are cortical grey matter of the MNI template in nilearn, labelled by the same functions of position as the
surface sources of EEG and MEG. Subjects, stimuli and files are in other modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, check_option
from braindecode_vis.parts.phantom.cortex import (
    compute_receptive_fields,
    label_networks,
    label_regions,
    make_cortex,
)
from braindecode_vis.parts.phantom.phantom_config import NETWORKS

ROIS: dict[str, tuple[tuple[str, ...], ...]] = {
    "nsdgeneral": (("V1", "V2", "V3", "hV4", "LO", "OPA", "FFA", "PPA", "EBA", "VWFA", "IT"),),
    "prf-visualrois": (("V1",), ("V2",), ("V3",), ("hV4",)),
    "floc-faces": (("FFA",),),
    "floc-places": (("PPA",), ("OPA",)),
    "floc-bodies": (("EBA",),),
    "floc-words": (("VWFA",),),
    "networks": tuple((network,) for network in NETWORKS),
}
"""Regions of interest: value 1 in a volume is the first group of regions, 2 the second, and so on."""
GRIDS: dict[float, tuple[tuple[int, int, int], int]] = {
    1.7: ((117, 138, 112), 109818),
    1.8: ((110, 130, 106), 94209),
    2: ((99, 117, 95), 69946),
    3: ((67, 79, 64), 23841),
    4: ((50, 59, 48), 11403),
    5: ((41, 48, 39), 6341),
    6: ((34, 40, 33), 3997),
    7: ((29, 35, 28), 2605),
    8: ((26, 30, 25), 1880),
    9: ((23, 27, 22), 1332),
    10: ((21, 25, 20), 1022),
    11: ((19, 23, 19), 797),
    12: ((18, 21, 17), 630),
}
"""Shape of the volume and number of cortical voxels of `make_scanner` at each voxel size in mm."""
_SCHAEFER = {
    "visual": "Vis",
    "somatomotor": "SomMot",
    "dorsal_attention": "DorsAttn",
    "ventral_attention": "SalVentAttn",
    "limbic": "Limbic",
    "frontoparietal": "Cont",
    "default": "Default",
}
# Measured on simulated betas, level 1 of gzip.
_RATIO = {"int16": 1.02, "float32": 0.98}
"""Measured size of compressed noise per byte of its cortical voxels; scattered zeros between them need little space."""


@dataclass(frozen=True, eq=False)
class Scanner:
    """A scanner whose images are already aligned to MNI space.

    Parameters
    ----------
    name
        For example ``fmri-4mm``.
    mask : boolean array of shape (n_x, n_y, n_z)
        Cortical grey matter; voxels are numbered in C order of this array.
    affine : array of shape (4, 4)
        Voxel to MNI mm.
    positions : array of shape (n_voxels, 3)
        MNI mm.
    regions, networks : arrays of text of shape (n_voxels,)
        Visual region (may be empty) and Yeo-7-like network.
    baseline : float32 array of shape (n_voxels,)
        Mean image intensity; intensity is ``baseline * (1 + percent signal change / 100)``.
    t_r
        Repetition time in s.
    """

    name: str
    mask: np.ndarray
    affine: np.ndarray
    positions: np.ndarray
    regions: np.ndarray
    networks: np.ndarray
    baseline: np.ndarray
    t_r: float

    @property
    def n_voxels(self) -> int:
        """Number of voxels in the mask."""
        return len(self.positions)

    def fill_volume(self, values: np.ndarray, outside: float = 0) -> np.ndarray:
        """Return a volume that holds `values` (n_voxels, ...) in the mask and `outside` elsewhere."""
        volume = np.full((*self.mask.shape, *values.shape[1:]), outside, values.dtype)
        volume[self.mask] = values
        return volume

    def find_head(self) -> np.ndarray:
        """Return the volume inside the cortical surface, including the cortex: boolean, of the shape of `mask`."""
        from scipy import ndimage

        return np.asarray(
            ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(self.mask, 4), iterations=4))
        )[4:-4, 4:-4, 4:-4]

    def make_roi_volume(self, name: str) -> np.ndarray:
        """Return an integer volume of a region of interest: -1 outside cortex, 0 outside the region.

        Raises
        ------
        ConfigError
            If there is no such region of interest.
        """
        check_option("region of interest", name, ROIS)
        labels = self.networks if name == "networks" else self.regions
        values = np.zeros(self.n_voxels, np.int16)
        for number, group in enumerate(ROIS[name], start=1):
            values[np.isin(labels, group)] = number
        return self.fill_volume(values, outside=-1)


@lru_cache(maxsize=8)
def make_scanner(voxel_mm: float = 4, t_r: float = 1.5) -> Scanner:
    """Return a scanner at the given resolution; template and labels are computed on the first call and kept.

    Parameters
    ----------
    voxel_mm
        Side of a voxel in mm, 1.7 to 12.
    t_r
        Repetition time in s.
    """
    from nilearn.datasets import load_mni152_gm_template
    from nilearn.image import resample_img
    from scipy.spatial import cKDTree

    if not min(GRIDS) <= voxel_mm <= max(GRIDS) or t_r <= 0:
        raise ConfigError(
            f"voxel_mm must be between {min(GRIDS)} and {max(GRIDS)} and t_r be positive, not {voxel_mm} "
            f"and {t_r}."
        )
    whole = float(voxel_mm).is_integer()
    template = load_mni152_gm_template(resolution=int(voxel_mm) if whole else 2)
    if not whole:
        template = resample_img(
            template, target_affine=np.eye(3) * voxel_mm, copy_header=True, force_resample=True
        )
    grey = np.asarray(template.dataobj, np.float32)
    inside = np.argwhere(grey > 0.3 * grey.max())  # mostly grey matter, as probabilities of tissue go
    positions = inside @ template.affine[:3, :3].T + template.affine[:3, 3]
    # The template has no lobes: the distance to the cortical surface is used to leave out cerebellum and nuclei.
    reach = 3.0 + voxel_mm / 2
    near = cKDTree(make_cortex().positions).query(positions)[0] <= reach
    mask = np.zeros(grey.shape, bool)
    mask[tuple(inside[near].T)] = True
    positions = positions[near]
    return Scanner(
        name=f"fmri-{voxel_mm:g}mm",
        mask=mask,
        affine=np.asarray(template.affine, float),
        positions=positions,
        regions=label_regions(positions),
        networks=label_networks(positions),
        # Scanner units of the usual order, higher with more grey matter.
        baseline=(800 + 400 * grey[mask] / grey.max()).astype(np.float32),
        t_r=t_r,
    )


def crop_scanner(scanner: Scanner, shape: tuple[int, int, int]) -> Scanner:
    """Return the scanner with volumes of another shape, with its voxels in the middle; voxels outside are removed.

    The affine becomes that of a scan in its own space, not in MNI space: positions in mm count from the middle of the
    volume. `positions` do not change; the simulation uses them.
    """
    inside = np.argwhere(scanner.mask)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    # Indices in the new volume: the box of the voxels is in its middle.
    moved = inside - low + (np.array(shape) - (high - low)) // 2
    kept = ((moved >= 0) & (moved < shape)).all(axis=1)
    mask = np.zeros(shape, bool)
    mask[tuple(moved[kept].T)] = True
    return replace(
        scanner,
        mask=mask,
        affine=make_centred_affine(shape, float(np.abs(scanner.affine[0, 0]))),
        positions=scanner.positions[kept],
        regions=scanner.regions[kept],
        networks=scanner.networks[kept],
        baseline=scanner.baseline[kept],
    )


def pick_voxels(scanner: Scanner, inside: np.ndarray) -> Scanner:
    """Return the scanner with only some of the voxels, in the same volume; `inside` is boolean of shape (n_voxels,)."""
    return replace(
        scanner, mask=scanner.fill_volume(inside), positions=scanner.positions[inside],
        regions=scanner.regions[inside], networks=scanner.networks[inside], baseline=scanner.baseline[inside],
    )  # fmt: skip


@lru_cache(maxsize=4)
def make_area_scanner(voxel_mm: float, area: str) -> Scanner:
    """Return the scanner with only the voxels of one area; for recordings of neurons, these are their positions."""
    whole = make_scanner(voxel_mm, 1.0)
    return pick_voxels(whole, whole.regions == area)


def make_centred_affine(shape: tuple[int, int, int], voxel_mm: float) -> np.ndarray:
    """Return the affine of a volume whose axes point right, forward and up, and whose middle is 0 mm."""
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * voxel_mm
    return affine


def count_voxels(voxel_mm: float | None) -> int:
    """Return the number of cortical voxels."""
    return GRIDS[voxel_mm or 0][1]


def estimate_volume_bytes(voxel_mm: float | None, dtype: str) -> float:
    """Return the size of one compressed volume in a long series."""
    shape, n_voxels = GRIDS[voxel_mm or 0]
    n_bytes = np.dtype(dtype).itemsize
    # Zeros outside the cortex compress to about a hundredth.
    return n_bytes * (_RATIO[dtype] * n_voxels + 0.012 * float(np.prod(shape)))


def label_visual_quadrants(scanner: Scanner) -> tuple[np.ndarray, dict[int, str]]:
    """Return the seven early areas of NSD's ``prf-visualrois`` per voxel, and their names.

    V1, V2 and V3 are divided into a ventral half (upper visual field) and a dorsal half (lower visual field).
    """
    fields = compute_receptive_fields(scanner.positions, 8)
    # Mean row of the receptive field from the middle, positive below: (n_voxels, row, column) -> (n_voxels,)
    down = (fields * (np.arange(8) - 3.5)[None, :, None]).sum(axis=(1, 2))
    labels = np.zeros(scanner.n_voxels, int)
    names: dict[int, str] = {}
    for number, area in enumerate(("V1", "V2", "V3")):
        members = scanner.regions == area
        labels[members] = 2 * number + np.where(down[members] < 0, 1, 2)
        names |= {2 * number + 1: f"{area}v", 2 * number + 2: f"{area}d"}
    labels[scanner.regions == "hV4"] = 7
    return labels, {**names, 7: "hV4"}


def make_parcels(scanner: Scanner, n_parcels: int | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """Return the parcel of each voxel, from 1, and their names in the spelling of Schaefer's atlas.

    Without a number each network has a front and a back parcel in each hemisphere: shape (n_voxels,), and up to 28
    names such as ``7Networks_LH_Vis_1``. With a number the cortical surface is divided into this number of patches of
    about equal size, each within a network of a hemisphere. A name means the same place for every voxel size; on a
    coarse grid, a patch may have no voxel.
    """
    if n_parcels is not None:
        return _place_in_patches(scanner, n_parcels)
    left, y = scanner.positions[:, 0] < 0, scanner.positions[:, 1]
    labels = np.zeros(scanner.n_voxels, np.int16)
    names: dict[int, str] = {}
    for side, within in (("LH", left), ("RH", ~left)):
        for network in NETWORKS:
            members = np.flatnonzero(within & (scanner.networks == network))
            halves = [half for half in np.array_split(members[np.argsort(y[members])], 2) if len(half)]
            for place, half in enumerate(halves, start=1):
                names[len(names) + 1] = f"7Networks_{side}_{_SCHAEFER[network]}_{place}"
                labels[half] = len(names)
    return labels, names


def _place_in_patches(scanner: Scanner, n_parcels: int) -> tuple[np.ndarray, dict[int, str]]:
    from scipy.spatial import cKDTree

    left = scanner.positions[:, 0] < 0
    labels = np.zeros(scanner.n_voxels, np.int16)
    names: dict[int, str] = {}
    for (side, network), centres in _divide_surface(n_parcels).items():
        members = np.flatnonzero((left == (side == "LH")) & (scanner.networks == network))
        if not len(members):
            continue
        nearest = cKDTree(centres).query(scanner.positions[members])[1]
        for place in np.unique(nearest):
            names[len(names) + 1] = f"7Networks_{side}_{_SCHAEFER[network]}_{place + 1}"
            labels[members[nearest == place]] = len(names)
    return labels, names


@lru_cache(maxsize=4)
def _divide_surface(n_parcels: int) -> dict[tuple[str, str], np.ndarray]:
    """Return the centres of the patches (n, 3), mm, of each hemisphere and network, from back to front."""
    from scipy.cluster.vq import kmeans2

    points = make_cortex().positions
    networks, left = label_networks(points), points[:, 0] < 0
    groups = {
        (side, network): points[within & (networks == network)]
        for side, within in (("LH", left), ("RH", ~left))
        for network in NETWORKS
    }
    # One patch for each, and the rest by area, largest remainders first: vertices are evenly spread over the surface.
    shares = np.array([len(group) for group in groups.values()]) / len(points) * (n_parcels - len(groups))
    counts = 1 + shares.astype(int)
    counts[np.argsort(counts - 1 - shares, kind="stable")[: n_parcels - counts.sum()]] += 1
    centres: dict[tuple[str, str], np.ndarray] = {}
    for (name, group), count in zip(groups.items(), counts, strict=True):
        start = [group[:, 1].argmin()]
        # Each next start is the farthest point from the earlier ones, so the result is not random.
        while len(start) < count:
            distance = np.linalg.norm(group[:, None] - group[start][None], axis=2).min(axis=1)
            start.append(int(distance.argmax()))
        found, _ = kmeans2(group, group[start], iter=20, minit="matrix")
        centres[name] = found[np.argsort(found[:, 1], kind="stable")]
    return centres


def describe_voxels(scanner: Scanner) -> pd.DataFrame:
    """Return one row per voxel: index in the volume, position in mm, region and network."""
    table = pd.DataFrame(np.argwhere(scanner.mask), columns=["i", "j", "k"])
    table[["x", "y", "z"]] = scanner.positions
    return table.assign(region=scanner.regions, network=scanner.networks)


def iterate_volumes(scanner: Scanner, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each row of the blocks as a volume, zero outside the cortex."""
    for block in blocks:
        for values in block:
            yield scanner.fill_volume(values)
