"""Masks and regions of NSD: which voxels to read, and what is known about each.

Owns the region files of the functional volume and of fsaverage. They are -1 outside the cortex, 0 where no region is,
and 1, 2, 3... in regions: a voxel belongs to ``nsdgeneral`` only where it is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from braindecode_vis.checks import ConfigError, DataError, check_option
from braindecode_vis.datasets.sources.betas_source import Geometry, Roi
from braindecode_vis.datasets.sources.fmri_volumes import (
    check_same_space,
    open_stream,
    read_volume,
    read_volume_header,
)
from braindecode_vis.datasets.sources.label_tables import read_label_table

ROI_SETS = (
    "nsdgeneral", "prf-visualrois", "prf-eccrois", "streams", "floc-bodies", "floc-faces", "floc-places",
    "floc-words", "Kastner2015", "HCP_MMP1", "corticalsulc", "MTL", "thalamus",
)  # fmt: skip
"""The sets of regions in the functional volume."""


@dataclass(frozen=True)
class Regions:
    """The region files of one subject, or of fsaverage.

    Parameters
    ----------
    files
        Set to its files: one volume, or the left and right surface.
    tables
        Folder of the colour tables that name the labels.
    """

    files: dict[str, tuple[Path, ...]]
    tables: Path

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the labels of a set, (x, y, z) or (n_vertices,), and the affine of a volume."""
        check_option("the set of regions", name, self.files)
        paths = self.files[name]
        if len(paths) == 1:
            values, affine = read_volume(paths[0])
            return np.rint(values).astype(np.int16), affine
        sides = [_read_surface(path) for path in paths]
        return np.rint(np.concatenate(sides)).astype(np.int16), None

    def read_names(self, name: str) -> dict[int, str]:
        """Return what the labels of a set mean; nothing if there is no table."""
        places = [self.tables / f"{name}.mgz.ctab", self.tables / f"lh.{name}.mgz.ctab"]
        table = next((path for path in places if path.is_file()), None)
        if table is None:
            return {}
        return {label: text for label, text in read_label_table(table).items() if label > 0}


def _read_surface(path: Path) -> np.ndarray:
    """Return the labels of one hemisphere; read here, since nibabel would leave the file open."""
    import nibabel

    try:
        with open_stream(path) as file:
            return np.asarray(nibabel.MGHImage.from_bytes(file.read()).dataobj).reshape(-1)
    except Exception as error:  # nibabel raises whatever the bytes lead it to
        raise DataError(f"{path} cannot be read as MGH ({error}); copy or fetch it again.") from error


def find_regions(root: Path, subject: int, space: str) -> Regions:
    """Return the region files below the root; sets of one hemisphere are left to their joint file."""
    if space == "fsaverage":
        folder = root / "nsddata/freesurfer/fsaverage/label"
        files = {}
        for left in sorted(folder.glob("lh.*.mg[hz]")):
            right = left.with_name("rh." + left.name[3:])
            if right.is_file():
                files[left.name[3:].rsplit(".", 1)[0]] = (left, right)
        return Regions(files, folder)
    folder = root / f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi"
    volumes = sorted(folder.glob("*.nii.gz")) + sorted(folder.glob("*.nii"))
    names = {path.name.removesuffix(".gz").removesuffix(".nii"): path for path in volumes}
    joint = {name: (path,) for name, path in names.items() if not name.startswith(("lh.", "rh."))}
    return Regions(joint, root / f"nsddata/freesurfer/subj{subject:02d}/label")


def parse_mask(text: str) -> tuple[str, tuple[str, ...]]:
    """Split ``set:region,region`` into the set and its regions.

    Examples
    --------
    >>> parse_mask("streams:ventral,lateral"), parse_mask("nsdgeneral")
    (('streams', ('ventral', 'lateral')), ('nsdgeneral', ()))
    """
    name, _, rest = text.partition(":")
    return name, tuple(filter(None, (word.strip() for word in rest.split(","))))


def find_mask(
    regions: Regions, root: Path, subject: int, mask: str, mask_file: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of the functional volume, (x, y, z), and its affine.

    Parameters
    ----------
    mask
        ``brain``, ``cortex``, a set of regions, or a set and its regions.
    mask_file
        A mask of the user's own, in place of `mask`: voxels above 0.
    """
    if mask_file is not None:
        values, affine = read_volume(mask_file.expanduser())
        return _check_mask(values > 0, str(mask_file)), affine
    if mask == "brain":
        path = root / f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/brainmask.nii.gz"
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; fetch it, or choose another dataset.mask (cortex, nsdgeneral)."
            )
        values, affine = read_volume(path)
        return _check_mask(values > 0, str(path)), affine
    keep, found = choose_labels(regions, mask)
    if found is None:
        raise DataError(f"the regions for {mask} are surfaces, not volumes.")
    return _check_mask(keep, mask), found


def choose_labels(regions: Regions, mask: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return where a set of regions, or some of its regions, lie.

    Raises
    ------
    ConfigError, DataError
        If a set or region does not exist, or ``nsdgeneral`` holds anything but -1, 0 and 1.
    """
    name, wanted = parse_mask(mask)
    if not regions.files:
        raise DataError(
            f"no region files were found for dataset.mask={mask}; fetch the folder roi of the subject."
        )
    if name == "cortex":
        labels, affine = regions.read("nsdgeneral")
        return labels >= 0, affine
    if name not in regions.files:
        check_option("dataset.mask", name, ["brain", "cortex", *regions.files])
    labels, affine = regions.read(name)
    if name == "nsdgeneral":
        unknown = set(np.unique(labels).tolist()) - {-1, 0, 1}
        if unknown:
            raise DataError(
                f"{regions.files[name][0]} holds the label {unknown.pop()}; nsdgeneral is -1 outside the cortex, 0 "
                "in it, "
                "and 1 in the region: the file is another one."
            )
        return labels == 1, affine
    if not wanted:
        return labels > 0, affine
    names = regions.read_names(name)
    known = {str(label): int(label) for label in np.unique(labels) if label > 0}
    known |= {text: label for label, text in names.items()}
    for region in wanted:
        check_option(f"the region of {name} in dataset.mask", region, known)
    return np.isin(labels, [known[region] for region in wanted]), affine


def _check_mask(mask: np.ndarray, what: str) -> np.ndarray:
    if not mask.any():
        raise ConfigError(f"the mask {what} is empty.")
    return mask


def make_volume_geometry(
    regions: Regions, mask: np.ndarray, affine: np.ndarray, sets: Sequence[str] | None, maps: dict[str, Path]
) -> Geometry:
    """Return the geometry of a mask with the sets of regions and published maps.

    Parameters
    ----------
    sets
        Names of the sets; the known ones that are there by default.
    maps
        Volumes of one number per voxel.

    Raises
    ------
    DataError
        If a file lies on another grid than the mask.
    """
    rois = _read_rois(regions, mask, sets, lambda path: _check_grid(path, mask, affine))
    numbers = {}
    for name, path in maps.items():
        _check_grid(path, mask, affine)
        numbers[name] = np.nan_to_num(read_volume(path)[0][mask])
    geometry = Geometry.from_mask(mask, affine, rois)
    return Geometry(geometry.voxel_ids, mask, geometry.affine, rois, maps=numbers)


def make_surface_geometry(
    regions: Regions, keep: np.ndarray, n_vertices: tuple[int, int], sets: Sequence[str] | None
) -> Geometry:
    """Return the geometry of the vertices of fsaverage that `keep` picks, shape (n_vertices of both sides,)."""
    rois = _read_rois(regions, keep, sets, lambda path: None)
    return Geometry(np.flatnonzero(keep), rois=rois, surface="fsaverage", n_vertices=n_vertices)


def _check_grid(path: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    check_same_space(read_volume_header(path), mask.shape, affine, what="the mask")


def _read_rois(
    regions: Regions, mask: np.ndarray, sets: Sequence[str] | None, check: Callable[[Path], None]
) -> dict[str, Roi]:
    if sets is None:
        sets = [name for name in ROI_SETS if name in regions.files]
    rois = {}
    for name in sets:
        check_option("the set of regions in dataset.rois", name, regions.files)
        for path in regions.files[name]:
            check(path)
        labels, _ = regions.read(name)
        if labels.shape != mask.shape:
            raise DataError(f"the regions {name} have the shape {labels.shape}, the mask {mask.shape}.")
        rois[name] = Roi(labels[mask], regions.read_names(name))
    return rois
