"""Parcels: voxels averaged over the regions of an atlas that the user gives.

Reads atlases (NIfTI volumes, FreeSurfer annotations, GIFTI and CIFTI labels), checks that an atlas is in the space of
the data, and averages. An atlas is downloaded only if the configuration requests it.

References
----------
Schaefer et al. (2018), doi:10.1093/cercor/bhx179: parcels, named after the networks of Yeo et al. (2011).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, refuse_damage
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.remote import bring
from braindecode_vis.datasets.sources.betas_source import AtlasConfig, Geometry, Parcels
from braindecode_vis.datasets.sources.fmri_volumes import read_label_table

_SCHAEFER = re.compile(r"^\d+Networks_[LR]H_([A-Za-z]+)")
_AFFINE_MM = 1e-3  # headers keep float32
CORTEX = ("CIFTI_STRUCTURE_CORTEX_LEFT", "CIFTI_STRUCTURE_CORTEX_RIGHT")


@dataclass(frozen=True)
class Atlas:
    """Labels of a volume, or of the vertices of a surface (left, then right), and their names.

    Parameters
    ----------
    labels : integer array of shape (x, y, z) or (n_vertices,)
    affine : array of shape (4, 4), optional
        Of a volume.
    names
        Label to name; the background is not among them.
    where
        File, for messages.
    """

    labels: np.ndarray
    affine: np.ndarray | None
    names: Mapping[int, str]
    where: str
    n_vertices: tuple[int, int] | None = None


def read_atlas(config: AtlasConfig) -> Atlas:
    """Read, or fetch if asked for, the atlas of a configuration.

    Raises
    ------
    ConfigError, DataError
        If no file is given, a file is of no known kind, or a label has no name.
    """
    if bool(config.files) == (config.fetch is not None):
        raise ConfigError(
            "dataset.atlas needs either files or fetch, not both: give the files of an atlas with --set "
            "dataset.atlas.files=[FILE] (and dataset.atlas.labels=TABLE), or download one with --set "
            "dataset.atlas.fetch=schaefer400 and --allow-download."
        )
    if config.fetch is not None:
        return fetch_atlas(config.fetch, config.allow_download or may_download())
    files = [path.expanduser() for path in config.files]
    given = None if config.labels is None else read_label_table(config.labels.expanduser())
    found: Mapping[int, str] = {}
    affine, vertices = None, None
    if len(files) == 1 and files[0].name.endswith(".dlabel.nii"):
        whole = next((form for form in read_label_cifti(files[0]) if form.n_vertices), None)
        if whole is None:
            raise DataError(f"the atlas {files[0]} labels no cortex; give a parcellation of the cortex.")
        labels, found, vertices = pick_vertices(whole, config.template or files[0])
    elif len(files) == 1:
        labels, affine = read_label_volume(files[0])
    elif len(files) == 2:
        labels, found, vertices = read_surface_labels(files)
        if config.template is not None:
            whole = Atlas(labels, None, found, str(files[0]), vertices)
            labels, found, vertices = pick_vertices(whole, config.template)
    else:
        raise ConfigError(
            f"dataset.atlas.files lists {len(files)} files; give one volume, or a left and a right surface."
        )
    names = given or found or {int(label): str(label) for label in np.unique(labels) if label > 0}
    names = {label: name for label, name in names.items() if label > 0}
    unnamed = sorted(set(np.unique(labels[labels > 0]).tolist()) - set(names))
    if unnamed:
        raise DataError(
            f"label {unnamed[0]} of {files[0]} has no name in {config.labels}; the table is of another atlas."
        )
    return Atlas(labels, affine, names, str(files[0]), vertices)


def read_label_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels of a volume, int32 of shape (x, y, z), and its affine; `DataError` if it is no label volume."""
    import nibabel

    try:
        image: Any = nibabel.load(bring(path))
        values = np.asarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever the bytes lead it to
        raise DataError(f"the atlas {path} cannot be read as NIfTI ({error}).") from error
    values = values[..., 0] if values.ndim == 4 and values.shape[3] == 1 else values
    if values.ndim != 3 or not np.array_equal(values, np.rint(values)):
        raise DataError(f"the atlas {path} of shape {values.shape} is not one volume of whole numbers.")
    return np.rint(values).astype(np.int32), np.asarray(image.affine, float)


def read_surface_labels(files: Sequence[Path]) -> tuple[np.ndarray, dict[int, str], tuple[int, int]]:
    """Join the hemispheres; labels of the right one are numbered on after those of the left one.

    Returns
    -------
    labels : int32 array of shape (n_left + n_right,)
    names
        Label to name.
    n_vertices
        Of the left and the right hemisphere.
    """
    import nibabel

    names: dict[int, str] = {}
    joined, offset = [], 0
    for path in files:
        if path.name.endswith(".annot"):
            values, _, table = nibabel.freesurfer.read_annot(bring(path))
            named = {number: name.decode() for number, name in enumerate(table)}
        elif path.name.endswith(".gii"):
            image: Any = nibabel.load(bring(path))
            values, named = np.asarray(image.agg_data()), dict(image.labeltable.get_labels_as_dict())
        else:
            raise DataError(
                f"{path} is neither .annot nor .label.gii; give the two hemispheres of a surface atlas."
            )
        # What lies on the medial wall or is unknown is the background of every surface atlas.
        blank = [k for k, v in named.items() if is_background(v)]
        values = np.where(np.isin(values, [-1, *blank]), -1, values)
        kept = [k for k in sorted(named) if k not in blank]
        number = {label: offset + i for i, label in enumerate(kept, start=1)}
        names |= {number[label]: named[label] for label in kept}
        joined.append(np.array([number.get(int(v), 0) for v in values], np.int32))
        offset += len(kept)
    # Left vertices, then right: the order of surface data in the store.
    return np.concatenate(joined), names, (len(joined[0]), len(joined[1]))


def read_label_cifti(path: Path) -> list[Atlas]:
    """Return the surface, all vertices of both hemispheres, and the voxels of the first map of a CIFTI label file."""
    import nibabel

    with refuse_damage(f"the atlas {path} cannot be read as CIFTI labels"):
        image: Any = nibabel.load(bring(path))
        table = image.header.get_axis(0).label[0]
        axis = image.header.get_axis(1)
        values = np.rint(np.asarray(image.dataobj[0])).astype(np.int32)
    names = {int(k): str(name) for k, (name, _) in table.items() if int(k) > 0 and not is_background(name)}
    values = np.where(np.isin(values, list(names)), values, 0)
    forms = []
    vertices, pair = find_vertices(axis)
    if any(pair):
        flat = np.zeros(sum(pair), np.int32)
        flat[vertices[vertices >= 0]] = values[vertices >= 0]
        forms.append(Atlas(flat, None, names, str(path), pair))
    voxels = ~axis.surface_mask
    if values[voxels].any():
        volume = np.zeros(axis.volume_shape, np.int32)
        volume[tuple(axis.voxel[voxels].T)] = values[voxels]
        forms.append(Atlas(volume, np.asarray(axis.affine, float), names, str(path)))
    if not forms:
        raise DataError(f"the atlas {path} labels neither the cortex nor a voxel.")
    return forms


def find_vertices(axis: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the vertex of each grayordinate of a `BrainModelAxis`, and the vertices of both hemispheres.

    Returns
    -------
    vertices : integer array of shape (n_grayordinates,)
        Counted on from the left to the right hemisphere; -1 outside the cortex.
    n_vertices
        Of the left and the right hemisphere; a file of one hemisphere is placed on a pair of its size.
    """
    sizes = [int(axis.nvertices.get(name, 0)) for name in CORTEX]
    pair = (sizes[0] or sizes[1], sizes[1] or sizes[0])
    vertices = np.full(len(axis), -1)
    for name, part, model in axis.iter_structures():
        if name in CORTEX:
            vertices[part] = (pair[0] if name == CORTEX[1] else 0) + model.vertex
    return vertices, pair


def pick_vertices(atlas: Atlas, template: Path) -> tuple[np.ndarray, Mapping[int, str], tuple[int, int]]:
    """Return labels, names, and vertices of both sides of a surface atlas at the cortical grayordinates of a file.

    Raises
    ------
    DataError
        If the file is no CIFTI file of grayordinates, or on another surface.
    """
    import nibabel

    with refuse_damage(f"{template} cannot be read as CIFTI with grayordinates"):
        image: Any = nibabel.load(bring(template.expanduser()))
        vertices, pair = find_vertices(image.header.get_axis(image.ndim - 1))
    if pair != atlas.n_vertices:
        raise DataError(
            f"the template {template} has {pair} vertices, but the atlas {atlas.where} has {atlas.n_vertices}: they "
            "are on different surfaces."
        )
    cortex = vertices[vertices >= 0]
    n_left = int((cortex < pair[0]).sum())
    return atlas.labels[cortex], atlas.names, (n_left, len(cortex) - n_left)


def is_background(name: str) -> bool:
    """Return whether a label of a surface atlas names no region."""
    return bool(re.search(r"medial.?wall|unknown|^\?\?\?$", name, re.IGNORECASE))


def fetch_atlas(name: str, may_fetch: bool, *, key: str = "dataset.atlas") -> Atlas:
    """Return an atlas from the folder of nilearn, which downloads it if this is allowed.

    Parameters
    ----------
    name
        ``aal``, or ``schaefer`` and the number of parcels, followed by ``_17`` for the names of 17 networks.
    may_fetch
        Whether it may be downloaded.
    key
        Settings that name it, for messages.

    Raises
    ------
    ConfigError
        If it is missing and may not be downloaded.
    """
    from nilearn import datasets

    found = re.fullmatch(r"schaefer(\d+)(?:_(17))?", name)
    n_rois, networks = (found[1], found[2] or "7") if found else ("", "")
    # Where nilearn keeps it; what was fetched before needs no consent.
    kept = (
        f"schaefer_2018/*_{n_rois}Parcels_{networks}Networks_*2mm.nii.gz"
        if found
        else "aal_*/aal/atlas/AAL.nii"
    )
    if not may_fetch and not any(next(Path(f).glob(kept), None) for f in datasets.get_data_dirs()):
        raise ConfigError(
            f"the atlas {name} is not on this machine: name its files with --set {key}.files=[FILE], or let "
            "nilearn download it for this call with --allow-download (a configuration file or a run folder cannot "
            "allow it)."
        )
    if not found:
        bunch = datasets.fetch_atlas_aal(verbose=0)
        names = {int(k): v for k, v in zip(bunch.indices, bunch.labels, strict=False) if int(k) > 0}
    else:
        bunch = datasets.fetch_atlas_schaefer_2018(
            n_rois=int(n_rois), yeo_networks=int(networks), resolution_mm=2, verbose=0
        )
        texts = [label.decode() if isinstance(label, bytes) else str(label) for label in bunch.labels]
        names = dict(enumerate([text for text in texts if text != "Background"], start=1))
    labels, affine = read_label_volume(Path(bunch.maps))
    return Atlas(labels, affine, names, str(bunch.maps))


def find_labels(
    atlas: Atlas, geometry: Geometry, *, resample: bool = False, key: str = "dataset.atlas"
) -> np.ndarray:
    """Return the label of each voxel, shape (n_voxels,).

    Parameters
    ----------
    resample
        Take the label at the millimetre position of each voxel, for an atlas of the same space on another grid.
    key
        Settings that name the atlas, for messages.

    Raises
    ------
    DataError
        If the atlas and the data lie in different spaces.
    """
    if atlas.affine is None or geometry.surface is not None:
        return _find_surface_labels(atlas, geometry)
    if geometry.mask is None or geometry.affine is None:
        raise DataError(f"{atlas.where} cannot be applied: the positions of these voxels are unknown.")
    same = atlas.labels.shape == geometry.mask.shape and np.allclose(
        atlas.affine, geometry.affine, atol=_AFFINE_MM
    )
    if same:
        return atlas.labels.ravel()[geometry.voxel_ids]
    if not resample:
        raise DataError(
            f"the atlas {atlas.where} lies in another space than the data: shape {atlas.labels.shape} and "
            f"{_describe_affine(atlas.affine)} against {geometry.mask.shape} and {_describe_affine(geometry.affine)}. "
            f"Resample it into the space of the data; if only the grid differs, set {key}.resample=true."
        )
    index = np.stack(np.unravel_index(geometry.voxel_ids, geometry.mask.shape))
    # Voxel -> millimetres -> voxel of the atlas: nearest label, as labels cannot be interpolated. Shapes (3, n_voxels).
    world = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    inverse = np.linalg.inv(atlas.affine)
    where = np.rint(inverse[:3, :3] @ world + inverse[:3, 3:]).astype(int)
    inside = ((where >= 0) & (where < np.array(atlas.labels.shape)[:, None])).all(axis=0)
    if not inside.any():
        raise DataError(f"no voxel of the data lies inside {atlas.where}: it belongs to another space.")
    labels = np.zeros(geometry.n_voxels, np.int32)
    labels[inside] = atlas.labels[tuple(where[:, inside])]
    return labels


def _find_surface_labels(atlas: Atlas, geometry: Geometry) -> np.ndarray:
    if geometry.surface is None or atlas.n_vertices is None:
        kinds = ("a volume", "a surface")
        raise DataError(
            f"the atlas {atlas.where} is {kinds[atlas.affine is None]}, but the data are on "
            f"{kinds[geometry.surface is not None]}."
        )
    if atlas.n_vertices != geometry.n_vertices:
        raise DataError(
            f"the atlas {atlas.where} has {atlas.n_vertices} vertices, but {geometry.surface} of the data has "
            f"{geometry.n_vertices}: it is made for another surface; if only the medial wall differs, name a CIFTI "
            "file with the grayordinates of the data as dataset.atlas.template."
        )
    return atlas.labels[geometry.voxel_ids]


def _describe_affine(affine: np.ndarray) -> str:
    steps = ", ".join(f"{step:.4g}" for step in np.linalg.norm(affine[:3, :3], axis=0))
    return f"steps of {steps} mm from {np.round(affine[:3, 3], 2).tolist()}"


def average_parcels(block: np.ndarray, parcels: Parcels) -> np.ndarray:
    """Return the mean response of each parcel.

    Parameters
    ----------
    block : array of shape (n_trials, n_voxels) or (n_trials, n_voxels, n_times)

    Returns
    -------
    array of shape (n_trials, n_parcels[, n_times]), float32
    """
    inside = np.flatnonzero(parcels.labels > 0)
    order = inside[np.argsort(parcels.labels[inside], kind="stable")]
    counts = np.bincount(parcels.labels[order], minlength=len(parcels.names) + 1)[1:]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    # Voxels sorted by parcel, so that each parcel is one run: (n_trials, n_parcels[, n_times])
    out = np.add.reduceat(block[:, order], starts, axis=1, dtype=np.float64)
    return (out / counts.reshape(-1, *[1] * (block.ndim - 2))).astype(np.float32)


def spread_parcels(values: np.ndarray, parcels: Parcels, *, outside: float = 0.0) -> np.ndarray:
    """Assign to each voxel the value of its parcel: (n_rows, n_parcels) to (n_rows, n_voxels)."""
    # Label 0 is outside of all parcels and picks the value put in front.
    padded = np.concatenate([np.full((len(values), 1), outside, values.dtype), values], axis=1)
    return padded[:, parcels.labels]


def place_in_parcels(
    geometries: Mapping[str, Geometry], config: AtlasConfig | None
) -> tuple[dict[str, Geometry], list[str]]:
    """Return the geometries with the parcels of an atlas, and the names of parcels that were left out.

    Parameters
    ----------
    geometries
        Of each subject. A parcel is kept if every subject has voxels in it.
    config
        Atlas; None changes nothing.

    Raises
    ------
    DataError
        If the atlas lies in another space, or too many parcels are empty.
    """
    if config is None:
        return dict(geometries), []
    atlas = read_atlas(config)
    labels = {s: find_labels(atlas, g, resample=config.resample) for s, g in geometries.items()}
    common = set(atlas.names)
    for own in labels.values():
        common &= set(np.unique(own).tolist())
    kept = [label for label in sorted(atlas.names) if label in common]
    missing = [name for label, name in sorted(atlas.names.items()) if label not in common]
    if not kept or len(missing) > config.max_missing * len(atlas.names):
        raise DataError(
            f"{len(missing)} of the {len(atlas.names)} regions of {atlas.where} hold no voxel of the mask, first "
            f"{missing[0]}: use a mask of the whole cortex, or increase dataset.atlas.max_missing."
        )
    names = tuple(atlas.names[label] for label in kept)
    networks = tuple(parse_network(name) for name in names)
    # Old label -> place among the kept parcels, counted from 1; 0 where a parcel was left out.
    table = np.zeros(max(int(own.max()) for own in labels.values()) + 1, np.int32)
    for number, label in enumerate(kept, start=1):
        table[label] = number
    return {
        s: replace(g, parcels=Parcels(table[np.maximum(labels[s], 0)], names, networks))
        for s, g in geometries.items()
    }, missing


def parse_network(name: str) -> str:
    """Return the network in the name of a Schaefer parcel, or empty text.

    Examples
    --------
    >>> parse_network("7Networks_LH_Vis_1"), parse_network("Precentral_L")
    ('Vis', '')
    """
    found = _SCHAEFER.match(name)
    return found.group(1) if found else ""
