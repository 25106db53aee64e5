"""Where in the brain the columns of fMRI responses lie: mask and affine, or a surface, with regions, parcels and maps.

Owns what travels with the responses into the store, as plain coordinates, and comes back from there. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from braindecode_vis.checks import DataError


@dataclass(frozen=True)
class Roi:
    """One set of regions: a label for each voxel, and what the labels mean.

    Parameters
    ----------
    labels : integer array of shape (n_voxels,)
        Zero or below for no region.
    names
        Label to name; labels without a name are called by their number.
    """

    labels: np.ndarray
    names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parcels:
    """Regions that voxels are averaged over.

    Parameters
    ----------
    labels : integer array of shape (n_voxels,)
        Number of the parcel of each voxel, from 1 in the order of `names`; 0 for none.
    names
        Of each parcel.
    networks
        Network of each parcel, empty text where it has none.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    networks: tuple[str, ...]


@dataclass(frozen=True)
class Geometry:
    """Where in the brain the columns of a response matrix lie.

    Parameters
    ----------
    voxel_ids : integer array of shape (n_voxels,)
        Number of each voxel in the volume, counted in C order, ascending if it comes from a mask; on a surface,
        that of each vertex with the right hemisphere following the left; or any unique number if nothing
        else is known.
    mask : bool array of shape (x, y, z), optional
        Voxels that are columns.
    affine : float array of shape (4, 4), optional
        Voxel indices to millimetres.
    rois
        Sets of regions by name.
    surface
        Name of the surface space (``fsaverage``) in place of a volume.
    n_vertices
        Vertices of the left and the right hemisphere of that surface.
    parcels
        Regions to average over.
    maps : mapping of name to array of shape (n_voxels,)
        Numbers that the authors published for each voxel, such as ``ncsnr`` or a noise ceiling.

    Raises
    ------
    DataError
        If the pieces do not belong together.
    """

    voxel_ids: np.ndarray
    mask: np.ndarray | None = None
    affine: np.ndarray | None = None
    rois: Mapping[str, Roi] = field(default_factory=dict)
    surface: str | None = None
    n_vertices: tuple[int, int] | None = None
    parcels: Parcels | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.voxel_ids)
        if self.mask is not None:
            if self.mask.dtype != bool or self.mask.ndim != 3 or self.affine is None:
                raise DataError("the mask of a geometry must be a 3-D boolean volume with an affine.")
            if not np.array_equal(np.flatnonzero(self.mask), np.sort(self.voxel_ids)):
                raise DataError(f"{n} voxel ids do not name the {int(self.mask.sum())} voxels of the mask.")
        for name, roi in self.rois.items():
            if len(roi.labels) != n:
                raise DataError(f"the regions {name} label {len(roi.labels)} voxels, but there are {n}.")
        for name, values in self.maps.items():
            if len(values) != n:
                raise DataError(f"the map {name} has {len(values)} values for {n} voxels.")
        if self.parcels is not None and len(self.parcels.labels) != n:
            raise DataError(f"the parcels label {len(self.parcels.labels)} voxels, but there are {n}.")

    @classmethod
    def from_mask(
        cls, mask: np.ndarray, affine: np.ndarray, rois: Mapping[str, Roi] | None = None
    ) -> Geometry:
        """Return the geometry of ``volume[mask]``: voxels in C order."""
        return cls(np.flatnonzero(mask), np.asarray(mask, bool), np.asarray(affine, float), rois or {})

    @property
    def n_voxels(self) -> int:
        """Number of voxels, before they are averaged over parcels."""
        return len(self.voxel_ids)

    def as_coords(self) -> dict[str, Any]:
        """Return the plain values and arrays that describe it among the coordinates of `Responses`."""
        coords: dict[str, Any] = {"voxel_id": np.asarray(self.voxel_ids)}
        if self.mask is not None:
            coords |= {"mask": self.mask, "affine": np.asarray(self.affine, float)}
        if self.surface is not None:
            coords |= {"surface": self.surface, "n_vertices": list(self.n_vertices or ())}
        coords |= {f"roi_{name}": np.asarray(roi.labels, np.int16) for name, roi in self.rois.items()}
        coords |= {f"map_{name}": np.asarray(values, np.float32) for name, values in self.maps.items()}
        coords["roi_names"] = {
            name: {str(k): v for k, v in roi.names.items()} for name, roi in self.rois.items()
        }
        if self.parcels is not None:
            coords["voxel_parcel"] = np.asarray(self.parcels.labels, np.int32)
            coords["parcel_names"] = list(self.parcels.names)
            coords["parcel_networks"] = list(self.parcels.networks)
        return coords

    @classmethod
    def from_coords(cls, coords: Mapping[str, Any]) -> Geometry:
        """Rebuild what `as_coords` described.

        Raises
        ------
        DataError
            If the coordinates hold no voxel ids.
        """
        if "voxel_id" not in coords:
            raise DataError("these responses hold no voxel ids, so they cannot be placed in a brain.")
        rois = {
            name: Roi(np.asarray(coords[f"roi_{name}"]), {int(k): v for k, v in names.items()})
            for name, names in coords.get("roi_names", {}).items()
        }
        maps = {key.removeprefix("map_"): v for key, v in coords.items() if key.startswith("map_")}
        parcels = None
        if "voxel_parcel" in coords:
            parcels = Parcels(
                np.asarray(coords["voxel_parcel"]),
                tuple(coords["parcel_names"]),
                tuple(coords["parcel_networks"]),
            )
        mask = None if "mask" not in coords else np.asarray(coords["mask"]).astype(bool)
        vertices = coords.get("n_vertices")
        return cls(
            np.asarray(coords["voxel_id"]), mask, coords.get("affine"), rois, coords.get("surface"),
            None if vertices is None else (int(vertices[0]), int(vertices[1])), parcels, maps,
        )  # fmt: skip

    def select(self, keep: np.ndarray) -> Geometry:
        """Return the geometry of the voxels that `keep` (boolean, or ascending numbers) picks."""
        index = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep)
        ids = self.voxel_ids[index]
        mask = None
        if self.mask is not None:
            mask = np.zeros(self.mask.shape, bool)
            mask.ravel()[ids] = True
        rois = {name: replace(roi, labels=roi.labels[index]) for name, roi in self.rois.items()}
        parcels = self.parcels and replace(self.parcels, labels=self.parcels.labels[index])
        maps = {name: values[index] for name, values in self.maps.items()}
        return replace(self, voxel_ids=ids, mask=mask, rois=rois, parcels=parcels, maps=maps)
