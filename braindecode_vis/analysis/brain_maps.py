"""Values of voxels and parcels back in the brain: NIfTI files beside the table of an analysis.

Owns the volumes and their names; the affine is that of the data, so that any viewer lays a map over the anatomy. Where
every subject has a mask of its own, parcels mean the same in everybody and each brain gets a map.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.analysis.study import Attachment
from braindecode_vis.arrays import Responses
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.voxel_geometry import inverse_transform


def list_brains(responses: Responses) -> list[str | None]:
    """Return the subjects that have a mask of their own; one None where all share one."""
    trials = set(responses.trials["subject"].astype(str))
    named = [str(subject) for subject in responses.coords.get("subjects") or ()]
    return [subject for subject in named if subject in trials] or [None]


def place_pattern(responses: Responses, values: np.ndarray, *, subject: str | None = None) -> Any:
    """Return a pattern as a NIfTI image in the space of the data, or None where there is no volume to place it in.

    Parameters
    ----------
    responses
        With the geometry.
    values : array of shape (n_columns,) or (n_rows, n_columns)
        For example the column `value` of one component and window; rows become the fourth axis.
    subject
        Whose brain, where each has a mask of its own; the first by default.

    Examples
    --------
    In MNI space, ``nilearn.plotting.plot_glass_brain(place_pattern(responses, values))`` draws it in a glass brain.
    """
    if responses.dims[1] not in ("voxel", "parcel"):
        return None
    try:
        image = inverse_transform(responses, values, subject=subject or list_brains(responses)[0])
    except DataError:
        return None
    return None if isinstance(image, dict) else image


def make_maps(responses: Responses, values: np.ndarray, name: str, caption: str) -> tuple[Attachment, ...]:
    """Return one NIfTI file per brain; nothing for channels, surfaces and voxels of unknown position.

    Parameters
    ----------
    responses
        With the geometry.
    values : array of shape (n_columns,) or (n_rows, n_columns)
        As for `place_pattern`.
    name
        File name without suffix.
    caption
        What the values are.
    """
    files = []
    for subject in list_brains(responses):
        image = place_pattern(responses, values, subject=subject)
        if image is None:
            continue
        file = f"{name}.nii.gz" if subject is None else f"{name}_sub-{subject}.nii.gz"
        words = caption if subject is None else f"{caption} Brain of subject {subject}."
        files.append(Attachment(file, words, lambda path, image=image: write_nifti(path, image)))
    return tuple(files)


def write_nifti(path: Path, image: Any) -> None:
    """Write a compressed NIfTI file; the same image gives the same bytes."""
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
