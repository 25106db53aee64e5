"""Images row by row, each read from where it lies when it is asked for.

Owns how images of full size are handed from stage to stage: `ImageRows` names the picture of every row (a stimulus of a
set, or a place of an array on disk) and reads one at a time, so that a thousand images of 1024 pixels are never in
memory together. It can be indexed, sliced and iterated like an array, and an array of images can stand in its place.
Also owns the size at which pixels are compared. Knows nothing of metrics or pages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import read_rows
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet, crop_square, read_image_file, resize_image

#: Pixels of the longer side up to which images are compared as they are; see `find_comparison_size`.
LARGEST_COMPARED = 128
N_LOOKED_AT = 16  # rows that tell whether a method makes grey images
LARGEST_IN_MEMORY = 1 << 28  # bytes of small images of one method; beyond, they lie in a temporary file


@dataclass(frozen=True, eq=False)
class ImageRows:
    """The images of a method, one or several draws per row.

    Parameters
    ----------
    source
        Distinct pictures: a `StimulusSet`, a sequence of files, an array of shape (n_pictures, height, width, 3) (or a
        memory map of one), or a sequence of pairs (`ImageRows`, place) that names pictures of others.
    index : int array of shape (n_rows,) or (n_rows, n_draws)
        Which picture each row shows.
    square
        Whether pictures are cropped to their centre square on reading.
    grey_at
        Height and width at which pictures are read in grey; None leaves size and colours.

    Notes
    -----
    ``shape`` has the height and width of the first image; stimuli may differ in size from row to row, and only an array
    of all of them (``np.asarray``) needs them to be equal.
    """

    source: Any
    index: np.ndarray
    square: bool = False
    grey_at: tuple[int, int] | None = None

    @classmethod
    def of(cls, images: np.ndarray | ImageRows) -> ImageRows:
        """Return rows of an array of shape (n_rows, [n_draws,] height, width, 3) without a copy; rows as they are."""
        if isinstance(images, ImageRows):
            return images
        shape = images.shape[:-3]
        return cls(images.reshape(-1, *images.shape[-3:]), np.arange(int(np.prod(shape))).reshape(shape))

    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ndim(self) -> int:
        """4, or 5 with several draws."""
        return self.index.ndim + 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first image."""
        if self.grey_at is not None:
            return self.grey_at
        if isinstance(self.source, np.ndarray) and not self.square:
            return (int(self.source.shape[1]), int(self.source.shape[2]))
        height, width = self.read(int(self.index.flat[0])).shape[:2]
        return height, width

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array of all images, if they have the size of the first."""
        return (*self.index.shape, *self.size, 3)

    def read(self, place: int) -> np.ndarray:
        """Return one picture of the source, uint8 of shape (height, width, 3)."""
        source = self.source
        if isinstance(source, StimulusSet):
            image = source.read_image(source.table["stimulus_id"].iloc[place])
        elif isinstance(source, np.memmap):  # pages of a map would stay in memory, image by image
            image = read_rows(source, np.array([place]))[0]
        elif isinstance(source, np.ndarray):
            image = source[place]
        elif isinstance(source[place], Path):
            image = read_image_file(source[place])
        else:
            rows, own = source[place]
            image = rows.read(own)
        image = crop_square(image) if self.square else image
        return image if self.grey_at is None else _take_grey(resize_image(image, *self.grey_at))

    def name_picture(self, place: int) -> tuple[Any, ...]:
        """Return what is equal for two places exactly if they are known to hold the same picture."""
        if isinstance(self.source, Sequence) and not isinstance(self.source[place], Path):
            rows, own = self.source[place]
            return (*rows.name_picture(own), self.square, self.grey_at)
        return (id(self.source), place, self.square, self.grey_at)

    def __getitem__(self, key: Any) -> Any:
        picked = self.index[key]
        return self.read(int(picked)) if np.ndim(picked) == 0 else replace(self, index=picked)

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        places, inverse = np.unique(self.index, return_inverse=True)
        images = [self.read(int(place)) for place in places]
        if sizes := sorted({image.shape for image in images})[1:]:
            raise DataError(
                f"images of {images[0].shape[:2]} and {sizes[0][:2]} pixels make no one array; take them row by row."
            )
        stack = (
            np.stack(images)[inverse.reshape(self.index.shape)] if images else np.empty(self.shape, np.uint8)
        )
        return stack.astype(dtype) if dtype is not None else stack

    def crop(self) -> ImageRows:
        """Return the same rows, cropped to their centre square."""
        return replace(self, square=True)

    def resize(self, height: int, width: int) -> np.ndarray:
        """Return all images at one size, uint8 of shape (n_rows, [n_draws,] height, width, 3); see `resize_image`.

        Many of them lie in a temporary file; each distinct picture is read once.
        """
        shape = (*self.index.shape, height, width, 3)
        n_bytes = int(np.prod(shape, dtype=np.int64))
        if n_bytes <= LARGEST_IN_MEMORY:
            out = np.empty(shape, np.uint8)
        else:
            with tempfile.TemporaryFile() as file:  # the mapping outlives the closed, nameless file
                out = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
        flat, places = out.reshape(-1, height, width, 3), self.index.ravel()
        order = np.argsort(places, kind="stable")
        for number, row in enumerate(order):
            known = order[number - 1] if number and places[order[number - 1]] == places[row] else None
            flat[row] = (
                flat[known] if known is not None else resize_image(self.read(int(places[row])), height, width)
            )
        return out


def join_pictures(pictures: Sequence[tuple[ImageRows, int]]) -> ImageRows:
    """Return one row for each picture, given as rows and the place in their source."""
    return ImageRows(list(pictures), np.arange(len(pictures)))


def show_as_compared(seen: Images, decoded: Images) -> Images:
    """Return coloured seen images in grey, at the size of the decoded ones, where these are all grey; others as given.

    A decoder of grey pixels never had the colours, so that a photograph beside its answer looks like a worse answer.

    Parameters
    ----------
    seen : uint8 array of shape (n_rows, height, width, 3), or `ImageRows`
    decoded
        Images of the same rows; of several draws the first is looked at, in the first rows.
    """
    few = range(min(len(seen), N_LOOKED_AT))
    answers = [decoded[row] if decoded.ndim == 4 else decoded[row][0] for row in few]
    if not all(map(_is_grey, answers)) or all(_is_grey(seen[row]) for row in few):
        return seen
    height, width = ImageRows.of(decoded).size
    return replace(ImageRows.of(seen), grey_at=(height, width))


def _is_grey(image: np.ndarray) -> bool:
    return bool((image[..., :1] == image).all())


def _take_grey(image: np.ndarray) -> np.ndarray:
    """Return the luminance (ITU-R BT.601, as a target of grey pixels has it) in three equal channels."""
    grey = np.round(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def find_comparison_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width at which pixels are compared where a metric names no size of its own.

    Those of the stimuli up to `LARGEST_COMPARED`; larger ones are compared as squares of that side.
    """
    side = LARGEST_COMPARED
    return (side, side) if max(height, width) > side else (height, width)


#: Whoever takes images uses what both kinds offer.
Images = np.ndarray | ImageRows
