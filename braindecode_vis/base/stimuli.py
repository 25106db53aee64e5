"""The shown images: `StimulusSet` with one row per image, and `ImageRows`, images that are read row by row.

A set defines the identity of each image: a unique `stimulus_id`, the concept that it shows, the place of its pixels and
their hash. Pixels come either from files below a root folder or from one array in the set.

`ImageRows` passes images of full size from stage to stage: it names the picture of every row (a stimulus of a set, or a
place in an array on disk) and reads one at a time, so that a thousand images of 1024 pixels are never in memory
together. It can be indexed, sliced and iterated like an array, and an array of images can be used in its place.

Also defines the size at which pixels are compared. It does not depend on brains, splits, embeddings, metrics or pages.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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

#: Pixels of the longer side up to which images are compared as they are; see `find_comparison_size`.
LARGEST_COMPARED = 128
N_CHECKED = 16  # rows that are checked for grey images
LARGEST_IN_MEMORY = 1 << 28  # bytes of small images of one method; beyond, they lie in a temporary file


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
        """Return the set of images in memory, with the hash of the pixels of each.

        Parameters
        ----------
        pixels : uint8 array of shape (n_stimuli, height, width, 3)
            The images.
        ids
            Stimulus id of each.
        concepts
            Concept of each image; by default every image is a separate concept.
        source
            Description of their source, for the column `path`.
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
        """Whether images can be read: as an array, or from files below `root`."""
        return self.pixels is not None or self.root is not None

    @property
    def has_picture(self) -> np.ndarray:
        """Whether each stimulus has an image, shape (n_stimuli,): an imagined stimulus has an empty `path`."""
        if self.pixels is not None:
            return np.ones(len(self), bool)
        # An empty path is how data sets of imagery say that a word, and no picture, was given.
        return (self.table["path"].astype(str) != "").to_numpy()

    @property
    def knows_images(self) -> bool:
        """Whether stimuli are images, available or not; otherwise each stimulus is a class that is shown repeatedly."""
        return self.pixels is not None or bool((self.table["path"].astype(str) != "").any())

    def select_pictured(self) -> StimulusSet:
        """Return the subset that has images; without any images, the set itself."""
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

    def read_image(self, stimulus_id: str, *, at_least: int | None = None) -> np.ndarray:
        """Return one image as uint8 of shape (height, width, 3); see `read_image_file` for `at_least`."""
        row = int(self.find_rows([stimulus_id])[0])
        if isinstance(self.pixels, np.memmap):  # pages of a map would stay in memory, image by image
            return read_rows(self.pixels, np.array([row]))[0]
        if self.pixels is not None:
            return np.asarray(self.pixels[row])
        if self.root is None:
            raise DataError(
                f"the pixels of stimulus {stimulus_id!r} are not available: pass their folder with --set "
                "dataset.images=DIR."
            )
        path = self.root / str(self.table["path"].iloc[row])
        refuse_address(path, "the folder of the pictures")
        if not path.is_file():
            raise DataError(
                f"the picture of {stimulus_id!r}, {path}, is missing; check the folder of the pictures."
            )
        return read_image_file(path, at_least=at_least)

    def iterate_images(
        self, ids: Iterable[str] | None = None, *, at_least: int | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the images one by one, in the order of `ids` (all of them by default)."""
        names = list(self.ids if ids is None else ids)
        for number, stimulus_id in enumerate(names):
            if number % _TOGETHER == 0 and isinstance(self.root, RemotePath):
                rows = self.find_rows(names[number : number + _TOGETHER])
                bring_all(self.root / str(path) for path in self.table["path"].take(rows))
            yield self.read_image(stimulus_id, at_least=at_least)


def read_image_file(path: Path, *, at_least: int | None = None) -> np.ndarray:
    """Read an image file as uint8 RGB of shape (height, width, 3).

    Parameters
    ----------
    path
        The file.
    at_least
        A JPEG file may be read at a half, a quarter or an eighth of its size, several times as fast, if no side becomes
        shorter than this.

    Raises
    ------
    DataError
        If the file is missing or cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
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
        raise DataError(f"the image {path} cannot be read ({error}); copy it again.") from error


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


# --- images row by row ------------------------------------------------------------------------------------


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
        """Return a key that is equal for two places exactly if they are known to hold the same picture."""
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
                f"images of {images[0].shape[:2]} and {sizes[0][:2]} pixels cannot form one array; take "
                "them row by row."
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

        A large result is stored in a temporary file; each distinct picture is read once.
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
    """Return seen images in grey, at the size of the decoded ones, if these are all grey; otherwise unchanged.

    A decoder of grey pixels has no colours, so beside a colour photograph its images would look worse than they are.

    Parameters
    ----------
    seen : uint8 array of shape (n_rows, height, width, 3), or `ImageRows`
    decoded
        Images of the same rows; with several draws, the first draw of the first rows is checked.
    """
    few = range(min(len(seen), N_CHECKED))
    answers = [decoded[row] if decoded.ndim == 4 else decoded[row][0] for row in few]
    if not all(map(is_grey, answers)) or all(is_grey(seen[row]) for row in few):
        return seen
    height, width = ImageRows.of(decoded).size
    return replace(ImageRows.of(seen), grey_at=(height, width))


def is_grey(image: np.ndarray) -> bool:
    """Say whether all channels of an image of shape (height, width, n_channels) are equal."""
    # Plane by plane: ten times as fast as all together.
    return all(bool((image[..., 0] == image[..., k]).all()) for k in range(1, image.shape[-1]))


def _take_grey(image: np.ndarray) -> np.ndarray:
    """Return the luminance (ITU-R BT.601, as in a target of grey pixels) in three equal channels."""
    grey = np.round(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def find_comparison_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width at which pixels are compared if a metric does not define a size.

    Those of the stimuli up to `LARGEST_COMPARED`; larger ones are compared as squares of that side.
    """
    side = LARGEST_COMPARED
    return (side, side) if max(height, width) > side else (height, width)


#: Whoever takes images uses what both kinds offer.
Images = np.ndarray | ImageRows
