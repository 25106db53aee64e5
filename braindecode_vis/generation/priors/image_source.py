"""Source of the images of a prior: the training split, the generator's own images, or a folder.

Owns the setting, what of a folder enters the fingerprint, and that no tested image is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import PriorSettings
from braindecode_vis.base.digests import digest_file
from braindecode_vis.base.store import hash_file, hash_json, read_embeddings

ROWS_AT_ONCE = 4096  # 20 MB of 1280 values each
SAME = 1e-3  # of the length of an embedding: closer ones are taken for one image, rounded differently


class ImageSourceSettings(PriorSettings):
    """Settings of a prior that uses images.

    Parameters
    ----------
    images
        ``training`` takes the training images of the run, ``generator`` the generator's own images (its weights file
        has some). A path names a folder with ``vectors.npy`` and ``ids.json`` in the target's space, such as an
        ``embed`` stage of another run. Tested images are left out of it.
    """

    images: Literal["training", "generator"] | Path = "training"

    @property
    def asks_generator(self) -> bool:  # type: ignore[override]
        """Whether the images are those that the generator has of its own."""
        return self.images == "generator"

    def check_files(self) -> None:
        """Raise `ConfigError` unless a folder that is named holds embeddings."""
        self.find_folder()

    def find_folder(self) -> Path | None:
        """Return the folder of embeddings, if there is one.

        Raises
        ------
        ConfigError
            If it holds no embeddings.
        """
        if not isinstance(self.images, Path):
            return None
        folder = self.images.expanduser()
        for name in ("vectors.npy", "ids.json"):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"prior.images names {folder}, which has no {name}; give a folder of embeddings, such as "
                    "stages/embed/... of another run, or choose training or generator."
                )
        return folder

    def find_images(self, training: Embeddings, generator: Any, tested: Embeddings) -> Embeddings:
        """Return the images that the prior may know, without the tested ones.

        Parameters
        ----------
        training
            Training images of the run.
        generator
            Asked with `read_known_images` for ``generator``.
        tested
            Images that are to be decoded.
        """
        if self.images == "generator":
            return leave_out(generator.read_known_images(), tested)
        folder = self.find_folder()
        return training if folder is None else leave_out(read_images(folder, tested), tested)

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields, with a digest in the place of a folder."""
        folder = self.find_folder()
        fields = super().hashed_fields()
        return fields if folder is None else {**fields, "images": _hash_embeddings(folder)}


@lru_cache(maxsize=8)
def _hash_embeddings(folder: Path) -> str:
    return hash_json([hash_file(folder / "ids.json"), digest_file(folder / "vectors.npy")])


def read_images(folder: Path, like: Embeddings) -> Embeddings:
    """Return the embeddings of a folder, as a memory map.

    Raises
    ------
    ConfigError
        If they are of another space than `like`.
    """
    images = read_embeddings(folder)
    if images.space != like.space or images.vectors.shape[1:] != like.vectors.shape[1:]:
        raise ConfigError(
            f"prior.images names {folder}, whose embeddings are of the space {images.space!r}, but the "
            f"run predicts {like.space!r}; give embeddings of the same target."
        )
    return images


def leave_out(images: Embeddings, tested: Embeddings) -> Embeddings:
    """Return the images that are none of the tested ones, by their names and by their embeddings.

    Parameters
    ----------
    images
        Any number.
    tested
        Images that are to be decoded.
    """
    check_same_space(images, tested)
    rows, names = tested.flat(), set(map(str, tested.ids))
    power = (rows**2).sum(axis=1)
    near = SAME**2 * float(power.mean())
    # By name and by likeness: another data set may show the same photograph under another name.
    kept = np.array([str(i) not in names for i in images.ids], dtype=bool)
    for start, part in iterate_rows(images):
        distances = (part**2).sum(axis=1)[:, None] + power - 2 * part @ rows.T  # (n_part, n_tested)
        # The expansion loses small distances to rounding, so what looks near is measured again.
        for row, column in zip(*np.nonzero(distances < 100 * near), strict=True):
            if ((part[row] - rows[column]) ** 2).sum() <= near:
                kept[start + row] = False
    if kept.all():  # the memory map itself, which a selection would read into memory
        return images
    return images.take(kept)


def iterate_rows(images: Embeddings) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of a first row and float32 rows of shape (n, n_features); images may exceed the memory."""
    for start in range(0, len(images), ROWS_AT_ONCE):
        part = np.asarray(images.vectors[start : start + ROWS_AT_ONCE], np.float32)
        yield start, part.reshape(len(part), -1)


def keep_distinct(rows: Embeddings) -> Embeddings:
    """Return the first row of each id, in their order."""
    _, first = np.unique(rows.ids.astype(str), return_index=True)
    first = np.sort(first)
    return Embeddings(np.asarray(rows.vectors[first]), rows.ids[first], rows.space)
