"""The 73,000 images of NSD in one HDF5 file of 39.6 GB, of which only single images are ever read.

Owns ``nsd_stimuli.hdf5``. Knows nothing of trials.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_file
from braindecode_vis.stimuli import StimulusSet

IMAGES_FILE = Path("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5")


def find_images_file(root: Path, images: Path | None) -> Path:
    """Return ``nsd_stimuli.hdf5``, where the user says or in its place below the root.

    Raises
    ------
    DataError
        If it is not there.
    """
    if images is not None:
        path = images.expanduser()
        path = path / IMAGES_FILE.name if path.is_dir() else path
    else:
        places = [root / IMAGES_FILE, root / IMAGES_FILE.name]
        path = next((place for place in places if place.is_file()), places[0])
    return check_file(
        path,
        what="the image file of NSD",
        hint="fetch it (39.6 GB), name it with --set dataset.images=FILE, or leave the images out with "
        "--set dataset.with_images=false",
    )


class ImageBrick:
    """Reads single images of ``imgBrick``, optionally made smaller.

    Parameters
    ----------
    path
        The HDF5 file.
    rows
        Row of the brick of each image that will be asked for, from 0.
    size
        Width and height in pixels; as published by default.

    Raises
    ------
    DataError
        If the file holds no such array, or too few images.
    """

    def __init__(self, path: Path, rows: np.ndarray, size: int | None = None) -> None:
        import h5py

        self.path, self.rows, self.size = path, rows, size
        self.file: Any = None
        try:
            with h5py.File(path, "r") as file:
                brick = file["imgBrick"]
                shape, dtype = brick.shape, brick.dtype
        except (OSError, KeyError) as error:
            raise DataError(
                f"{path} holds no readable imgBrick ({error}); it is truncated or another file, fetch it again."
            ) from error
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
            raise DataError(
                f"imgBrick of {path} is {dtype} of shape {shape}; uint8 (73000, 425, 425, 3) is published."
            )
        if rows.max() >= shape[0]:
            raise DataError(
                f"the trials name image {rows.max()} (counted from 0), but {path} holds {shape[0]}: the file is "
                "truncated, "
                "or the image numbers were counted from 1."
            )

    def __call__(self, row: int) -> np.ndarray:
        """Return one image as uint8 of shape (height, width, 3)."""
        import h5py

        if self.file is None:
            self.file = h5py.File(self.path, "r")
        image = self.file["imgBrick"][int(self.rows[row])]
        if row == len(self.rows) - 1:
            self.close()
        if self.size is None or image.shape[:2] == (self.size, self.size):
            return image
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.LANCZOS))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self.file is not None:
            self.file.close()
        self.file = None


def make_stimuli(trials: pd.DataFrame) -> StimulusSet:
    """Return the images that trials name, in the order of `nsd_id`; hashes are filled in when they are copied."""
    shown = trials.drop_duplicates("stimulus_id").sort_values("nsd_id")
    table = shown[["stimulus_id", "concept", "split", "nsd_id"]].reset_index(drop=True)
    return StimulusSet(table.assign(path=IMAGES_FILE.name, sha256=""))


def open_images(
    stimuli: StimulusSet, root: Path, images: Path | None, size: int | None
) -> Callable[[int], np.ndarray]:
    """Return the reader of the images of a stimulus set."""
    return ImageBrick(find_images_file(root, images), stimuli.table["nsd_id"].to_numpy(), size)
