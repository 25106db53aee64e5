"""Positions and regions of voxels, parcels and channels: images of responses, and features chosen by region.

Contains the inverse transform of voxels, parcels and vertices to images, and the choice of features by region or
network. It uses only the store: no mask file is needed again. Several subjects with different voxels may be in one
array (rows padded with zeros, counts in the coordinate ``n_voxels_of``); then a feature has a meaning only together
with its subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.preprocessing.parcellation import spread_parcels


def read_geometry(responses: Responses, subject: str | None = None) -> Geometry:
    """Return the geometry of responses; `subject` is needed if every subject has a different mask.

    Raises
    ------
    DataError
        If the responses hold no voxel ids.
    """
    subjects = responses.coords.get("subjects")
    if not subjects:
        return Geometry.from_coords(responses.coords)
    if subject is None:
        raise ConfigError(f"name one of the subjects {', '.join(subjects)}: each has a different mask.")
    check_option("subject", subject, subjects)
    end = f"_sub-{subject}"
    own = {k.removesuffix(end): v for k, v in responses.coords.items() if k.endswith(end)}
    common = {k: v for k, v in responses.coords.items() if k in ("parcel_names", "parcel_networks")}
    return Geometry.from_coords({**common, **own})


def inverse_transform(
    responses: Responses, values: np.ndarray | None = None, *, subject: str | None = None
) -> Any:
    """Put one value per feature, or one row per trial, back to its position in the brain.

    Parameters
    ----------
    responses
        Responses as the store gives them.
    values : array of shape (n_features,) or (n_rows, n_features), optional
        What to show, for example the weights or scores of voxels or parcels; the responses themselves by default.
    subject
        Subject whose brain is shown, if there are several. If rows are padded, its own trials are shown by default, and
        `values` may have its own number of voxels or the padded one.

    Returns
    -------
    image
        A `nibabel` NIfTI image, 3-D for a vector and 4-D for rows, 0 outside the mask; for a surface, a dictionary
        of arrays ``left`` and ``right`` of shape (n_vertices,) or (n_rows, n_vertices), NaN where nothing was measured.

    Raises
    ------
    DataError
        If the number of values differs from the number of features, or the positions are unknown.
    """
    geometry = read_geometry(responses, subject)
    n_features = responses.data.shape[1]
    n_own = count_own_voxels(responses).get(str(subject))
    if n_own is not None:
        if values is None:
            values = responses.data[(responses.trials["subject"].astype(str) == subject).to_numpy()]
        values = values[..., :n_own] if np.shape(values)[-1] == n_features else values
        n_features = n_own
    array = np.asarray(responses.data if values is None else values, dtype=np.float32)
    if array.ndim not in (1, 2) or array.shape[-1] != n_features:
        raise DataError(
            f"values of shape {array.shape} cannot be placed: the last axis must have {n_features} entries."
        )
    rows = np.atleast_2d(array)  # (n_rows, n_features), one row for a vector
    if geometry.parcels is not None:
        rows = spread_parcels(rows, geometry.parcels, outside=0.0 if geometry.surface is None else np.nan)
    if geometry.surface is not None:
        assert geometry.n_vertices is not None
        n_left, n_right = geometry.n_vertices
        whole = np.full((len(rows), n_left + n_right), np.nan, np.float32)  # left hemisphere, then right
        whole[:, geometry.voxel_ids] = rows
        whole = whole[0] if array.ndim == 1 else whole
        return {"left": whole[..., :n_left], "right": whole[..., n_left:]}
    if geometry.mask is None:
        raise DataError(
            "the positions of these voxels are unknown: their data set was published without a mask."
        )
    import nibabel

    volume = np.zeros((geometry.mask.size, len(rows)), np.float32)
    volume[geometry.voxel_ids] = rows.T
    # (x * y * z, n_rows) -> (x, y, z, n_rows): voxel ids count in C order
    volume = volume.reshape(*geometry.mask.shape, len(rows))
    return nibabel.Nifti1Image(volume[..., 0] if array.ndim == 1 else volume, geometry.affine)


# --- choosing features -------------------------------------------------------------------------------------


def find_rois(
    responses: Responses, wanted: Mapping[str, Sequence[str] | None], *, subject: str | None = None
) -> np.ndarray:
    """Return which features belong to one of the wanted regions, shape (n_voxels,), boolean.

    Parameters
    ----------
    responses
        Responses with the dimension ``voxel``.
    wanted
        Set of regions to the names (or numbers, as text) of the regions; None takes all of the set. For
        example ``{"streams": ["ventral"], "prf-visualrois": None}``.
    subject
        Subject of the voxels, if every subject has a different mask.

    Raises
    ------
    ConfigError
        If a set or a region does not exist; the nearest name is suggested.
    """
    geometry = read_geometry(responses, subject)
    chosen = np.zeros(geometry.n_voxels, bool)
    for set_name, names in wanted.items():
        check_option("the set of regions", set_name, geometry.rois)
        roi = geometry.rois[set_name]
        there = [int(label) for label in np.unique(roi.labels) if label > 0]
        if names is None:
            chosen |= roi.labels > 0
            continue
        known = {
            roi.names.get(label, str(label)): label for label in {*there, *(k for k in roi.names if k > 0)}
        }
        for name in names:
            check_option(f"the region of {set_name}", name, known)
            chosen |= roi.labels == known[name]
    return chosen


def find_networks(responses: Responses, networks: Sequence[str]) -> np.ndarray:
    """Return which parcels belong to one of the networks, shape (n_parcels,), boolean.

    Raises
    ------
    ConfigError
        If a network does not exist.
    """
    known = list(responses.coords.get("parcel_networks", ()))
    if not any(known):
        raise ConfigError("these responses hold no parcels with networks; set dataset.atlas to Schaefer's.")
    for name in networks:
        check_option("the network", name, sorted(set(filter(None, known))))
    return np.isin(known, list(networks))


def select_features(responses: Responses, keep: np.ndarray) -> Responses:
    """Return the responses of some voxels, parcels or channels, with their geometry.

    Parameters
    ----------
    keep : bool array of shape (n_features,)
        For example from `find_rois`, `find_networks` or `braindecode_vis.preprocessing.reliability`.
    """
    if count_own_voxels(responses):
        raise DataError(
            "these rows are padded since subjects have different voxels: use select_own_features."
        )
    keep = np.asarray(keep)
    _check_choice(keep, responses.data.shape[1])
    data = np.asarray(responses.data[:, keep])
    coords = dict(responses.coords)
    if responses.dims[1] == "voxel":
        if "voxel_id" in coords:
            coords |= Geometry.from_coords(coords).select(keep).as_coords()
        return replace(responses, data=data, coords=coords)
    number = np.where(
        keep, np.cumsum(keep), 0
    )  # new place of each parcel, counted from 1; 0 for those left out
    for key in coords:
        if key in ("parcel_names", "parcel_networks", "ch_names"):
            coords[key] = [v for v, k in zip(coords[key], keep, strict=True) if k]
        elif key == "ch_pos" and coords[key] is not None:
            coords[key] = np.asarray(coords[key])[keep]
        elif key == "voxel_parcel" or key.startswith("voxel_parcel_sub-"):
            coords[key] = np.concatenate([[0], number]).astype(np.int32)[coords[key]]
    return replace(responses, data=data, coords=coords)


def select_own_features(responses: Responses, keep: Mapping[str, np.ndarray]) -> Responses:
    """Return padded responses of several subjects with some voxels of each, padded again to the largest number.

    Parameters
    ----------
    responses
        Responses with the coordinate ``n_voxels_of``.
    keep
        For each subject, bool array over its own voxels. Subjects without an entry lose their geometry and may have no
        trial.

    Raises
    ------
    DataError
        If a trial is of a subject without a choice, or a choice does not fit.
    """
    counts = count_own_voxels(responses)
    subjects = responses.trials["subject"].astype(str).to_numpy()
    for subject in dict.fromkeys([*subjects.tolist(), *keep]):
        if subject not in keep or subject not in counts:
            raise DataError(
                f"no voxels were chosen for subject {subject}: it has no training trials, and voxels of "
                "other subjects do not correspond to its own."
            )
        _check_choice(np.asarray(keep[subject]), counts[subject], of=f" of subject {subject}")
    sizes = {subject: int(np.sum(chosen)) for subject, chosen in keep.items()}
    data = np.zeros(
        (responses.n_trials, max(sizes.values()), *responses.data.shape[2:]), responses.data.dtype
    )
    # Geometry of the old choice goes, that of the new one comes, under the same names.
    ends = tuple(f"_sub-{subject}" for subject in counts)
    coords = {key: value for key, value in responses.coords.items() if not key.endswith(ends)}
    for subject, chosen in keep.items():
        rows = np.flatnonzero(subjects == subject)
        data[rows, : sizes[subject]] = responses.data[rows][:, np.flatnonzero(chosen)]
        own = read_geometry(responses, subject).select(chosen).as_coords()
        coords |= {f"{key}_sub-{subject}": value for key, value in own.items()}
    coords |= {"subjects": list(keep), "n_voxels_of": sizes}
    return replace(responses, data=data, coords=coords)


def _check_choice(keep: np.ndarray, n_features: int, *, of: str = "") -> None:
    if keep.dtype != bool or keep.shape != (n_features,):
        raise DataError(
            f"the choice of features{of} must be boolean of shape ({n_features},), not {keep.dtype} of shape "
            f"{keep.shape}."
        )
    if not keep.any():
        raise DataError(f"the choice of features{of} is empty: no voxel, parcel or channel is left.")
