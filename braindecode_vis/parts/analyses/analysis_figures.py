"""What the figures and files of analyses have in common: curves with bands, bars, matrices, and maps of the brain.

Colours are those of the style that is active when a figure is drawn: C0 the result, C1 a second one, C2 chance. Maps
are NIfTI files with the affine of the data, so that any viewer lays them over the anatomy. Where every subject has a
mask of its own, parcels mean the same in everybody and each brain gets a map.
"""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.parts.analyses.study import Attachment
from braindecode_vis.report.drawing import list_brains, place_pattern

# --- maps of the brain ---------------------------------------------------------------------------------------------


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
        files.append(Attachment(file, words, partial(write_nifti, image=image)))
    return tuple(files)


def write_nifti(path: Path, image: Any) -> None:
    """Write a compressed NIfTI file; the same image gives the same bytes."""
    # Without the time of writing in its header.
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
