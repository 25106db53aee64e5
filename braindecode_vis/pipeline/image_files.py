"""The image files of `reconstruct`: written batch by batch while a generator runs, read row by row.

``rows.parquet`` has one row per test item. What a generator made is one ``.npy`` per method, in the size that the
generator gives: ``decoded.npy`` of shape (n_rows, height, width, 3), or (n_rows, n_draws, height, width, 3). What is
there already is named and not copied: seen images and copies of training images by the id of the stimulus, shuffled
ones by their row, a mean image once. ``images.json`` says for each method which of these it is, in full below.

Owns these files, the one loop over the rows that are still to be generated, and what a killed process leaves for the
next: a picture counts as finished if the digest that was written after it fits. Processes that share the work write
each batch of images or texts as a file of its own, by one rename, which whoever writes the result takes instead of
making it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import ImageRows, StimulusSet
from braindecode_vis.preprocessing.array_file import ArrayFile

INDEX = "images.json"


@dataclass(frozen=True)
class DrawnImages:
    """Images that a generator has to make: the same rows of one or more methods at once.

    Parameters
    ----------
    names
        The methods.
    n_images
        Images of each.
    step
        Rows of a batch; None makes all in one call.
    make
        Returns for a range of rows the images of each method, uint8 of shape (n_rows, height, width, 3). What it makes
        of a row depends on the seed and the number of the row alone.
    """

    names: tuple[str, ...]
    n_images: int
    step: int | None
    make: Callable[[range], Mapping[str, np.ndarray]]

    def split(self) -> Iterator[range]:
        """Yield the rows of each batch, at the same places whatever was finished: another batch differs by rounding."""
        step = self.step or max(1, self.n_images)
        for start in range(0, self.n_images, step):
            yield range(start, min(start + step, self.n_images))


class DrawnTexts(Sequence[str]):
    """Texts that are made batch by batch when they are asked for, such as decoded captions.

    Parameters
    ----------
    n_texts
        How many there are.
    make
        Returns those of a range of numbers, which is a batch.
    folder, name
        Where processes that share the work leave what they made, and under which name. A batch that is there is read.
    keeps
        Whether this process leaves what it makes there.
    """

    step = 64  #: Texts of a batch: at the same places whoever makes them, so that rounding is the same.

    def __init__(
        self, n_texts: int, make: Callable[[range], Sequence[str]], folder: Path, name: str, *, keeps: bool
    ) -> None:
        self._n_texts, self._make, self._folder, self._name, self._keeps = n_texts, make, folder, name, keeps
        self._batches: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return self._n_texts

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        number, row = divmod(place % len(self), self.step)
        return self.make_batch(number)[row]

    @property
    def n_batches(self) -> int:
        """How many batches the texts are made in."""
        return -(-self._n_texts // self.step)

    def make_batch(self, number: int) -> list[str]:
        """Return the texts of a batch: those that are there, or new ones."""
        if number not in self._batches:
            rows = range(number * self.step, min((number + 1) * self.step, len(self)))
            path = self._folder / f"texts-{self._name}-{rows.start:07d}.json"
            texts = _read_texts(path, len(rows))
            if texts is None:
                texts = list(self._make(rows))
                if self._keeps:
                    _check_there(self._folder)
                    store.write_json(path, texts)
            self._batches[number] = texts
        return self._batches[number]


@dataclass(frozen=True)
class Share:
    """Which batches a process makes: of all, in the order in which they are drawn, one of every `n_workers`.

    Parameters
    ----------
    worker
        Number of the process, from 0.
    n_workers
        Processes that share the images.
    shown
        Folder of this process for images that it reads again; empty.
    """

    worker: int
    n_workers: int
    shown: Path


class ImageWriter:
    """Images of several methods in a folder, written batch by batch; a later call goes on where one was stopped.

    Parameters
    ----------
    folder
        Outlives a killed process; made on first use. It belongs to these settings alone.
    share
        Makes this one of several processes: it draws its share, and leaves each batch in the folder for a writer
        without a share, which moves the images.
    """

    def __init__(self, folder: Path, share: Share | None = None) -> None:
        self.folder, self.share = folder, share
        self._shown = None if share is None else ImageWriter(share.shown)
        self._n_batches = self._n_text_batches = self._n_told = 0
        self._told_at = 0.0
        self.sizes: dict[str, int] = {}
        self._files: dict[str, tuple[ArrayFile, ArrayFile]] = {}
        self._done: dict[str, np.ndarray] = {}
        self.n_kept = 0

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def open(self, name: str, n_images: int) -> None:
        """Say how many images a method has in all; what an earlier process finished of them is looked up."""
        self.sizes[name] = n_images
        self._done[name] = self._find_finished(name)
        self.n_kept += self._count(name, self._list_parts())

    def count_images(self) -> int:
        """Return how many images of all methods are there, whichever process made them."""
        parts = self._list_parts()
        return sum(self._count(name, parts) for name in self._done)

    def draw(
        self,
        drawn: DrawnImages,
        first: int,
        advance: Callable[[int], None] = lambda n: None,
        *,
        whole: bool = False,
    ) -> None:
        """Make what is missing of some images, batch by batch, and write it.

        Parameters
        ----------
        drawn
            What is made, with rows counted from 0.
        first
            Where its first row is among all rows of the methods.
        advance
            Called with the number of images that are there; by one of several processes, with those of all.
        whole
            Whether all of them will be read, so that one of several processes makes those too that others have not.
        """
        if self.share is not None:
            self._draw_share(drawn, first, advance, whole=whole)
            return
        for rows in drawn.split():
            places = slice(first + rows.start, first + rows.stop)
            if not all(self._done[name][places].all() for name in drawn.names):
                part = self._name_part(drawn.names, places)
                images = _read_part(part, drawn.names) or drawn.make(rows)
                for name in drawn.names:
                    self.write(name, places.start, images[name])
                part.unlink(missing_ok=True)
            advance(len(rows) * len(drawn.names))

    def _draw_share(
        self, drawn: DrawnImages, first: int, advance: Callable[[int], None], *, whole: bool
    ) -> None:
        assert self.share is not None
        assert self._shown is not None
        # Counted over all draws: what is made in one call each would otherwise be the work of the first process.
        batches = list(enumerate(drawn.split(), self._n_batches))
        self._n_batches += len(batches)
        own = [rows for number, rows in batches if number % self.share.n_workers == self.share.worker]
        others = [rows for _, rows in batches if rows not in own]
        for name in drawn.names if whole and self._shown.sizes.keys().isdisjoint(drawn.names) else ():
            self._shown.open(name, self.sizes[name])
        ordered = [*own, *others] if whole else own
        for rows in ordered:
            places = slice(first + rows.start, first + rows.stop)
            part = self._name_part(drawn.names, places)
            images: Mapping[str, np.ndarray] | None = None
            if whole or part.is_file():
                images = _read_part(part, drawn.names)
            if images is None and (whole or not all(self._done[name][places].all() for name in drawn.names)):
                images = made = drawn.make(rows)
                _check_there(self.folder)
                with store.replace_atomically(part) as temporary:
                    np.savez(temporary, allow_pickle=False, **{name: made[name] for name in drawn.names})
            if whole and images is not None:
                for name in drawn.names:
                    self._shown.write(name, places.start, images[name])
            # Counting lists all batches, of which there may be thousands: once a second, and in the end.
            if rows is ordered[-1] or time.monotonic() - self._told_at >= 1:
                there = self.count_images()
                advance(there - self._n_told)
                self._n_told, self._told_at = there, time.monotonic()

    def draw_texts(self, name: str, n_texts: int, make: Callable[[range], Sequence[str]]) -> DrawnTexts:
        """Return texts that are made when they are asked for; one of several processes makes its share at once.

        Parameters
        ----------
        name
            Of these texts among all that the writer is asked for.
        n_texts
            How many there are.
        make
            Returns the texts of a range of numbers.
        """
        texts = DrawnTexts(n_texts, make, self.folder, name, keeps=self.share is not None)
        if self.share is not None:
            for number in range(texts.n_batches):
                if (self._n_text_batches + number) % self.share.n_workers == self.share.worker:
                    texts.make_batch(number)
            self._n_text_batches += texts.n_batches
        return texts

    def write(self, name: str, start: int, images: np.ndarray) -> None:
        """Write images of a method from a row on."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise DataError(
                f"the images {name} must be uint8 of shape (n_rows, height, width, 3), not {images.dtype} of shape "
                f"{images.shape}; correct what the generator returns."
            )
        pixels, marks = self._open_files(name, images.shape[1:3])
        if pixels.shape[1:3] != images.shape[1:3]:
            raise DataError(
                f"the images {name} have {pixels.shape[1]} x {pixels.shape[2]} pixels, but from row "
                f"{start} on {images.shape[1]} x {images.shape[2]}; a generator must give all images in "
                "the same size."
            )
        pixels.write(start, images)
        marks.write(start, np.array([_digest(image) for image in images], np.uint64))
        self._done[name][start : start + len(images)] = True

    def read(self, name: str) -> ImageRows:
        """Return the images of a method that were written, one row each; of several processes, those drawn whole."""
        if self._shown is not None:
            return self._shown.read(name)
        return ImageRows.of(np.load(self._find(name), mmap_mode="r", allow_pickle=False))

    def close(self) -> None:
        """Close all files; what was written stays."""
        for pair in self._files.values():
            for file in pair:
                file.close()
        self._files = {}
        if self._shown is not None:
            self._shown.close()

    def move(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Move the finished images into `folder`, each method with this shape before height and width."""
        for name, shape in shapes.items():
            pixels, _ = self._open_files(name)
            pixels.reshape((*shape, *pixels.shape[1:]))
        self.close()
        for name in shapes:
            (self.folder / f"{name}.digests.npy").unlink()
            shutil.move(self._find(name), folder / f"{name}.npy")

    def _find(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _name_part(self, names: Sequence[str], places: slice) -> Path:
        # With its end: where batches have become larger or smaller, it is another batch.
        return self.folder / f"part-{'+'.join(names)}-{places.start:07d}-{places.stop:07d}.npz"

    def _list_parts(self) -> list[tuple[list[str], slice]]:
        """Return methods and rows of the batches that processes which share the work have left."""
        stems = (path.stem.removeprefix("part-").rsplit("-", 2) for path in self.folder.glob("part-*.npz"))
        return [(names.split("+"), slice(int(start), int(stop))) for names, start, stop in stems]

    def _count(self, name: str, parts: Iterable[tuple[list[str], slice]]) -> int:
        there = self._done[name].copy()
        for names, rows in parts:
            if name in names:
                there[rows] = True
        return int(there.sum())

    def _open_files(self, name: str, size: tuple[int, ...] | None = None) -> tuple[ArrayFile, ArrayFile]:
        if name not in self._files:
            if size is None or self._done[name].any():
                size = np.load(self._find(name), mmap_mode="r", allow_pickle=False).shape[1:3]
            n = self.sizes[name]
            self._files[name] = (
                ArrayFile(self._find(name), (n, *size, 3), np.dtype(np.uint8), continues=True),
                ArrayFile(self.folder / f"{name}.digests.npy", (n,), np.dtype(np.uint64), continues=True),
            )
        return self._files[name]

    def _find_finished(self, name: str) -> np.ndarray:
        """Return which rows an earlier process has finished: those whose pixels have the written digest."""
        done = np.zeros(self.sizes[name], bool)
        try:
            pixels = np.load(self._find(name), mmap_mode="r", allow_pickle=False)
            marks = np.load(self.folder / f"{name}.digests.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return done
        if pixels.ndim != 4 or len(pixels) != len(done) or marks.shape != done.shape:
            return done
        rows = ImageRows.of(pixels)
        for row in np.flatnonzero(marks):
            done[row] = _digest(rows[row]) == marks[row]
        return done


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(
            f"{folder}, where several processes keep their images, was removed: another command has "
            "finished these images, or makes others in this run folder; run the same command again."
        )


def _read_texts(path: Path, n_texts: int) -> list[str] | None:
    """Return a batch of texts that a process has left; None if it is not there or damaged."""
    try:
        found = store.read_json(path)
    except (OSError, DataError):
        return None
    whole = isinstance(found, list) and len(found) == n_texts and all(isinstance(text, str) for text in found)
    return found if whole else None


def _read_part(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Return a batch that another process made; None if it is not there or damaged, so that it is made again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _digest(image: np.ndarray) -> int:
    """Return a digest that is never 0, the value of rows that were not written."""
    found = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8).digest()
    return int.from_bytes(found, "little") or 1


# --- the index ------------------------------------------------------------------------------------------------------


def name_file(name: str, *, rows: str | None = None, repeats: int = 1) -> dict[str, Any]:
    """Return the entry of ``images.json`` of a method whose images lie in ``<name>.npy``.

    Parameters
    ----------
    name
        The method.
    rows
        Column of the table that says which image of the file a row shows; by default its own.
    repeats
        Draws that share one image.
    """
    return {"file": f"{name}.npy", "rows": rows, "repeats": repeats}


def name_stimuli(column: str, *, repeats: int = 1) -> dict[str, Any]:
    """Return the entry of a method that shows stimuli, whose ids are a column of the table."""
    return {"ids": column, "repeats": repeats}


def name_rows_of(name: str, column: str) -> dict[str, Any]:
    """Return the entry of a method that shows other rows of a method, whose numbers are a column of the table."""
    return {"of": name, "rows": column, "repeats": 1}


def write_index(
    folder: Path, rows: pd.DataFrame, methods: Mapping[str, Mapping[str, Any]], size: Sequence[int]
) -> None:
    """Write ``rows.parquet``, and ``images.json`` with the entry of each method and the size of comparison."""
    rows.to_parquet(folder / "rows.parquet", index=False)
    store.write_json(folder / INDEX, {"size": list(size), "methods": dict(methods)})


def read_image_rows(
    folder: Path, rows: pd.DataFrame | None, stimuli: StimulusSet | None, names: Iterable[str] = ()
) -> tuple[dict[str, ImageRows], tuple[int, int]]:
    """Return the images of each method, ``seen`` among them, and the size at which pixels are compared.

    Parameters
    ----------
    folder
        Of the artifact.
    rows, stimuli
        Its table, and all images of the run.
    names
        The methods of an artifact of an earlier version, which had every image in a file of its own, cut to 128 pixels;
        it needs neither.
    """
    if not (folder / INDEX).is_file():
        old = {name: ImageRows.of(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
        return old, old["seen"].size
    assert rows is not None
    assert stimuli is not None
    about = store.read_json(folder / INDEX)
    found: dict[str, ImageRows] = {}
    for name, entry in about["methods"].items():
        if "of" in entry:
            found[name] = found[entry["of"]][rows[entry["rows"]].to_numpy()]
            continue
        if "ids" in entry:
            source, index = stimuli, stimuli.find_rows(rows[entry["ids"]].tolist())
        else:
            made = ImageRows.of(np.load(folder / entry["file"], mmap_mode="r", allow_pickle=False))
            source = made.source
            index = made.index if entry["rows"] is None else made.index[rows[entry["rows"]].to_numpy()]
        if entry["repeats"] > 1:
            index = np.repeat(index[:, None], entry["repeats"], axis=1)
        found[name] = ImageRows(source, index)
    height, width = about["size"]
    return found, (height, width)
