"""Every distinct image of a comparison once, with the rows that use it.

Seen images repeat over subjects and controls repeat over rows; a network should meet each of them one time only. Knows
no metric.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from braindecode_vis.checks import DataError


@dataclass(frozen=True)
class ImageTable:
    """Every distinct image of a comparison once, and where each of them is used.

    Parameters
    ----------
    images : uint8 array of shape (n_distinct, height, width, 3)
        In the order of first use, the seen ones first.
    seen : int array of shape (n_rows,)
        Distinct image that each row saw.
    made : dict
        Method to an int array of shape (n_draws, n_rows).
    """

    images: np.ndarray
    seen: np.ndarray
    made: Mapping[str, np.ndarray]

    @cached_property
    def shown(self) -> np.ndarray:
        """The distinct images that were seen, ascending."""
        return np.unique(self.seen)

    @property
    def column(self) -> np.ndarray:
        """Entry of `shown` that each row saw, shape (n_rows,)."""
        return np.searchsorted(self.shown, self.seen)


def split_rounds(images: np.ndarray) -> np.ndarray:
    """Return images as (n_draws, n_rows, height, width, 3), one round per draw, without a copy.

    Parameters
    ----------
    images : array of shape (n_rows, height, width, 3) or (n_rows, n_draws, height, width, 3)
    """
    return images[None] if images.ndim == 4 else np.moveaxis(images, 1, 0)


def check_stack(images: np.ndarray, seen: np.ndarray, method: str) -> None:
    """Raise `DataError` unless the images of a method, one or several per row, have the shape of the seen ones."""
    several = (len(seen), *images.shape[1:2], *seen.shape[1:])
    if images.shape not in (seen.shape, several) or 0 in images.shape:
        raise DataError(
            f"images of {method!r} have the shape {images.shape}, but must have that of the seen ones, "
            f"{seen.shape}, with the draws in the second dimension if there are several."
        )
    if images.dtype != np.uint8 or seen.dtype != np.uint8:
        raise DataError(f"images to compare must be uint8, not {images.dtype} ({method!r}) and {seen.dtype}.")


def make_image_table(seen: np.ndarray, made: Mapping[str, np.ndarray]) -> ImageTable:
    """Collect the distinct images of a comparison.

    Parameters
    ----------
    seen : uint8 array of shape (n_rows, height, width, 3)
    made
        Method to uint8 images of the same shape, or of shape (n_rows, n_draws, height, width, 3).

    Raises
    ------
    DataError
        If a shape does not fit.
    """
    known: dict[bytes, int] = {}
    images: list[np.ndarray] = []

    def number(image: np.ndarray) -> int:
        digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
        if digest not in known:
            known[digest] = len(known)
            images.append(image)
        return known[digest]

    shown = np.array([number(image) for image in seen])
    places = {}
    for method, stack in made.items():
        check_stack(stack, seen, method)
        places[method] = np.array([[number(image) for image in one] for one in split_rounds(stack)])
    return ImageTable(np.stack(images), shown, places)
