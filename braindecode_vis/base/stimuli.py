"""StimulusSet: one row per image.

Owns the identity of what was shown: a unique `stimulus_id`, the concept it depicts, where its pixels are and
their hash. Pixels come either from files below a root folder or from one array held by the set. Knows
nothing of brains, splits or embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.arrays import TrialData, TrialRows, read_rows
from braindecode_vis.base.checks import DataError, check_columns, check_unique
from braindecode_vis.base.remote import RemotePath, bring_all, refuse_address

if TYPE_CHECKING:
    import pandas as pd

_TOGETHER = 256  # images of a server that are brought side by side
REQUIRED_COLUMNS = ("stimulus_id", "concept", "path", "sha256")


@dataclass(frozen=True)
class StimulusSet:
    """A table of images and a way to read their pixels.

    Parameters
    ----------
    table : DataFrame of n_stimuli rows
        Columns `stimulus_id` (unique text), `concept`, `path` (relative to `root`, or the name of the source
        array) and `sha256`; further columns are kept.
    root
        Folder that the paths start from. Not needed when `pixels` is given.
    pixels : uint8 array of shape (n_stimuli, height, width, 3), optional
        The images themselves, in row order; may be a memory map, or the rows of one (`arrays.TrialRows`).

    Raises
    ------
    DataError
        If an id repeats, a column is missing, or `pixels` does not match the table.
    """

    table: pd.DataFrame
    root: Path | None = None
    pixels: TrialData | None = None

    def __post_init__(self) -> None:
        check_columns(self.table.columns, REQUIRED_COLUMNS, what="the stimulus table")
        check_unique(self.table["stimulus_id"].tolist(), what="stimulus_id")
        if self.pixels is None:
            return
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 4 or self.pixels.shape[-1] != 3:
            raise DataError(
                "stimulus pixels must be uint8 of shape (n_stimuli, height, width, 3), "
                f"not {self.pixels.dtype} of shape {self.pixels.shape}."
            )
        if len(self.pixels) != len(self.table):
            raise DataError(f"{len(self.table)} stimuli are listed but {len(self.pixels)} images are given.")

    @classmethod
    def from_pixels(
        cls,
        pixels: np.ndarray,
        ids: Sequence[str],
        concepts: Sequence[str] | None = None,
        *,
        source: str = "memory",
    ) -> StimulusSet:
        """Return the set of images that lie in memory, each named by the hash of its pixels too.

        Parameters
        ----------
        pixels : uint8 array of shape (n_stimuli, height, width, 3)
            The images.
        ids
            Stimulus id of each.
        concepts
            What each depicts; every image is a concept of its own by default.
        source
            Where they come from, in words, for the column `path`.
        """
        import pandas as pd

        table = pd.DataFrame(
            {
                "stimulus_id": list(ids),
                "concept": list(ids if concepts is None else concepts),
                "path": source,
                "sha256": [hash_pixels(image) for image in pixels],
            }
        )
        return cls(table, pixels=pixels)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        # Built once: images are looked up one by one, tens of thousands of times. An index of pandas whose type is not
        # that of the ids that are asked for is converted, all of it, at every look-up.
        return {name: row for row, name in enumerate(self.ids.tolist())}

    @property
    def ids(self) -> np.ndarray:
        """Stimulus ids, shape (n_stimuli,)."""
        return self.table["stimulus_id"].to_numpy(dtype=object)

    @property
    def has_pixels(self) -> bool:
        """Whether images can be read at all: as an array, or from files below `root`."""
        return self.pixels is not None or self.root is not None

    @property
    def has_picture(self) -> np.ndarray:
        """Whether each stimulus has an image, shape (n_stimuli,): what was only imagined has an empty `path`."""
        if self.pixels is not None:
            return np.ones(len(self), bool)
        # An empty path is how data sets of imagery say that a word, and no picture, was given.
        return (self.table["path"].astype(str) != "").to_numpy()

    @property
    def knows_images(self) -> bool:
        """Whether stimuli are images, at hand or not; otherwise each is a class that is shown again and again."""
        return self.pixels is not None or bool((self.table["path"].astype(str) != "").any())

    def select_pictured(self) -> StimulusSet:
        """Return the sub-set that has images; without any at hand, the set itself."""
        if not self.has_pixels or self.has_picture.all():
            return self
        return self.select(self.ids[self.has_picture])

    def find_rows(self, ids: Iterable[str]) -> np.ndarray:
        """Return the row of each id, shape (len(ids),).

        Raises
        ------
        DataError
            If an id is unknown.
        """
        wanted = list(ids)
        row_of = self._row_of
        try:
            return np.array([row_of[name] for name in wanted], dtype=np.intp)
        except KeyError as error:
            raise DataError(
                f"stimulus {error.args[0]!r} is not in the stimulus table of {len(self)} images: "
                "the recording and the image set come from different releases."
            ) from None

    def concepts_of(self, ids: Iterable[str]) -> np.ndarray:
        """Return the concept of each id, shape (len(ids),)."""
        return self.table["concept"].take(self.find_rows(ids)).to_numpy(dtype=object)

    @property
    def concept_of(self) -> dict[str, str]:
        """Concept of every stimulus by its id."""
        return dict(zip(self.ids.astype(str), self.table["concept"].astype(str), strict=True))

    def select(self, ids: Iterable[str]) -> StimulusSet:
        """Return the sub-set with exactly these ids, in this order; images in a file stay there."""
        rows = self.find_rows(ids)
        pixels: Any = self.pixels
        if isinstance(pixels, TrialRows):
            pixels = TrialRows(pixels.data, pixels.rows[rows])
        elif isinstance(pixels, np.memmap):
            pixels = TrialRows(pixels, rows)  # a copy of 10 000 images of 425 pixels would take 5 GB
        elif pixels is not None:
            pixels = pixels[rows]
        return StimulusSet(self.table.iloc[rows].reset_index(drop=True), self.root, pixels)

    def read_image(self, stimulus_id: str) -> np.ndarray:
        """Return one image as uint8 of shape (height, width, 3)."""
        row = int(self.find_rows([stimulus_id])[0])
        if isinstance(self.pixels, np.memmap):  # pages of a map would stay in memory, image by image
            return read_rows(self.pixels, np.array([row]))[0]
        if self.pixels is not None:
            return np.asarray(self.pixels[row])
        if self.root is None:
            raise DataError(
                f"the pixels of stimulus {stimulus_id!r} are not at hand: "
                "pass their folder with --set dataset.images=DIR."
            )
        path = self.root / str(self.table["path"].iloc[row])
        refuse_address(path, "the folder of the pictures")
        if not path.is_file():
            raise DataError(
                f"the picture of {stimulus_id!r}, {path}, is missing; check the folder of the pictures."
            )
        return read_image_file(path)

    def iterate_images(self, ids: Iterable[str] | None = None) -> Iterator[np.ndarray]:
        """Yield the images one by one, in the order of `ids` (all of them by default)."""
        names = list(self.ids if ids is None else ids)
        for number, stimulus_id in enumerate(names):
            if number % _TOGETHER == 0 and isinstance(self.root, RemotePath):
                rows = self.find_rows(names[number : number + _TOGETHER])
                bring_all(self.root / str(path) for path in self.table["path"].take(rows))
            yield self.read_image(stimulus_id)


def read_image_file(path: Path) -> np.ndarray:
    """Read an image file as uint8 RGB of shape (height, width, 3).

    Raises
    ------
    DataError
        If the file is missing or cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(f"the stimulus image {path} is missing; check the root of the image set.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"the stimulus image {path} cannot be decoded ({error}); fetch it again.") from error


def read_image_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image file from its header.

    Raises
    ------
    DataError
        If the file is missing or is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (FileNotFoundError, UnidentifiedImageError, OSError) as error:
        raise DataError(f"the image {path} cannot be read ({error}); bring it again.") from error


def crop_square(image: np.ndarray) -> np.ndarray:
    """Return the centre square of an image of shape (height, width, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    # Published image encoders crop the centre too, so that targets and reconstructions show the same part.
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the image at another size (Lanczos, antialiased); another aspect is cropped to its centre first."""
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    if height == width:
        image = crop_square(image)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def hash_pixels(image: np.ndarray) -> str:
    """Return the sha256 of an array's shape, type and bytes: the identity of an image without a file."""
    # Type and shape first: the same bytes may be two images.
    digest = hashlib.sha256(f"{image.dtype}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()
