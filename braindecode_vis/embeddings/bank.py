"""The embedding cache: one bank per space, with the hash of each image as key; missing images are added.

Images are decoded by threads ahead of the network and computed in fixed chunks of the stimulus list. The chunks do not
depend on where an earlier run stopped, so the vectors do not either. Encoders that are fitted on training images do not
pass through here: they are cheap and differ from fold to fold.

A bank is a few segments, each a plain ``.npy`` (read as a memory map) beside a ``.json`` with the image hashes of its
rows and a seal, the digest of both, which each process compares once, when it first reads them; a segment exists once
its ``.json`` does, so that a killed process leaves nothing half-visible and several processes may add to one bank.
Small segments are merged when they are worth it. ``bank.json`` says which encoder wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import NUMPY_ERRORS, DataError
from braindecode_vis.base.contracts import ImageEncoder
from braindecode_vis.base.digests import digest_file
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import (
    collect_provenance,
    hash_json,
    json_plain,
    read_json,
    replace_atomically,
    write_json,
)
from braindecode_vis.embeddings.transforms import map_ahead

T = TypeVar("T")
DESCRIPTION = "bank.json"
CHUNK = 512  # images computed at a time: what a killed process loses at most
DECODERS = 2  # threads that read image files
IN_MEMORY_BYTES = 1 << 30  # larger selections are gathered into a file
_COPY_BYTES = 64 << 20  # rows are copied in blocks of this size, so that memory stays bounded


def embed_stimuli(
    encoder: ImageEncoder,
    stimuli: StimulusSet,
    *,
    cache: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> Embeddings:
    """Return one embedding per stimulus; known embeddings are read from the bank.

    Parameters
    ----------
    encoder
        A pretrained image encoder.
    stimuli
        The images; their `sha256` are the keys.
    cache
        Folder of the banks.
    advance
        Called with the number of images done.

    Returns
    -------
    Embeddings
        Their vectors are a memory map where the bank holds exactly these images.

    Raises
    ------
    DataError
        If an image cannot be read or has no finite embedding, naming the stimulus.
    """
    hashes = stimuli.table["sha256"].tolist()
    config = getattr(encoder, "config", None)  # provenance only; an encoder from outside may have none
    folder = open_bank(cache, encoder.space, config.hashed_fields() if isinstance(config, Settings) else None)
    known, id_of = list_hashes(folder), dict(zip(hashes, stimuli.ids, strict=True))
    advance(sum(h in known for h in hashes))
    unique = list(dict.fromkeys(hashes))
    # Cut from the whole list, not from what is missing: an image always shares its batch with the same others.
    for start in range(0, len(unique), CHUNK):
        missing = [h for h in unique[start : start + CHUNK] if h not in known]
        if not missing:
            continue
        ids = [id_of[h] for h in missing]
        vectors = np.asarray(encoder.encode(iterate_decoded(stimuli, ids, DECODERS)))
        _check_vectors(vectors, ids, encoder.space)
        write_segment(folder, missing, vectors)
        advance(len(missing))
    merge_segments(folder, unique)
    return Embeddings(read_rows(folder, hashes), stimuli.ids, encoder.space)


def iterate_decoded(stimuli: StimulusSet, ids: Iterable[str], decoders: int) -> Iterator[np.ndarray]:
    """Yield images in the order of `ids`, decoded by threads ahead of their use."""
    workers = 0 if stimuli.pixels is not None else decoders  # an array needs no decoding
    return map_ahead(stimuli.read_image, ids, workers=workers)


def _check_vectors(vectors: np.ndarray, ids: list[str], space: str) -> None:
    if len(vectors) != len(ids):
        raise DataError(f"{space} gave {len(vectors)} embeddings for {len(ids)} images.")
    finite = np.isfinite(vectors).reshape(len(ids), -1).all(axis=1)
    if not finite.all():
        bad = ids[int(np.flatnonzero(~finite)[0])]
        raise DataError(f"{space} gives no finite embedding of stimulus {bad!r}; is it blank?")


@dataclass(frozen=True)
class Segment:
    """A finished piece of a bank: rows of one array and the image hash of each row."""

    path: Path
    hashes: tuple[str, ...]
    seal: str = ""  # earlier versions wrote none

    def open(self) -> np.ndarray:
        """Return the rows as a memory map.

        Raises
        ------
        DataError
            If they, or the hashes, are not what was written.
        """
        if self.seal and _seal(self.path, self.hashes) != self.seal:
            raise DataError(
                f"{self.path} is damaged (it or its .json is not as it was written); delete it and its .json, and "
                "embed again."
            )
        return self.map()

    def map(self) -> np.ndarray:
        """Return the rows as a memory map without a look at what they are."""
        try:
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, *NUMPY_ERRORS) as error:
            raise DataError(
                f"{self.path} is damaged ({error}); delete it and its .json, and embed again."
            ) from error
        if len(rows) != len(self.hashes):
            raise DataError(
                f"{self.path} has {len(rows)} rows for {len(self.hashes)} images; delete it and its .json."
            )
        return rows


@dataclass(frozen=True)
class BankSummary:
    """Summary of a bank: the name of its space, its size and its start time."""

    folder: Path
    space: str
    n_images: int
    shape: tuple[int, ...]
    n_bytes: int
    created: str


def open_bank(cache: Path, space: str, encoder: Mapping[str, Any] | None = None) -> Path:
    """Return the folder of a space's bank, made and described on first use.

    Parameters
    ----------
    cache
        Folder of all banks, as of `braindecode_vis.base.digests.find_cache_folder`.
    space
        Name of the space.
    encoder
        Settings of the encoder, kept as provenance.

    Raises
    ------
    DataError
        If the folder belongs to another space.
    """
    # Names of spaces are long and hold slashes.
    folder = cache / "embeddings" / hashlib.sha256(space.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DESCRIPTION).is_file():
        found = read_json(folder / DESCRIPTION)["space"]
        if found != space:
            raise DataError(
                f"{folder} holds the space {found!r}, not {space!r}; choose another cache folder."
            )
    else:
        content = {"space": space, "encoder": json_plain(dict(encoder or {})), **collect_provenance()}
        write_json(folder / DESCRIPTION, content)
    return folder


def list_banks(cache: Path) -> list[BankSummary]:
    """Return every bank below a cache folder, by the name of its space."""
    found = [
        _use_segments(description.parent, partial(_summarise, description))
        for description in (cache / "embeddings").glob(f"*/{DESCRIPTION}")
    ]
    return sorted(found, key=lambda bank: (bank.space, bank.folder))


def _summarise(description: Path, segments: list[Segment]) -> BankSummary:
    content = read_json(description)
    shape = segments[0].map().shape[1:] if segments else ()
    return BankSummary(
        folder=description.parent,
        space=content["space"],
        n_images=len({h for segment in segments for h in segment.hashes}),
        shape=tuple(int(n) for n in shape),
        n_bytes=sum(segment.path.stat().st_size for segment in segments),
        created=content["created"],
    )


def list_segments(folder: Path) -> list[Segment]:
    """Return the finished segments of a bank, by name."""
    segments = []
    for index in sorted(folder.glob("*.json")):
        if index.name == DESCRIPTION or index.name.startswith("."):
            continue
        array = index.with_suffix(".npy")
        try:
            # The index is written after the rows: where it exists, they are whole.
            content = read_json(index)
            hashes, seal = tuple(content["sha256"]), content.get("seal", "")
        except FileNotFoundError:  # merged by another process a moment ago
            continue
        except (KeyError, TypeError) as error:
            raise DataError(f"{index} is damaged; delete it and its .npy, and embed again.") from error
        if array.is_file():
            segments.append(Segment(array, hashes, seal))
    return segments


def list_hashes(folder: Path) -> set[str]:
    """Return the image hashes that a bank holds."""
    return {h for segment in list_segments(folder) for h in segment.hashes}


def write_segment(folder: Path, hashes: Sequence[str], vectors: np.ndarray) -> Segment:
    """Add rows to a bank.

    Parameters
    ----------
    folder
        The bank.
    hashes
        Image hash of each row.
    vectors : float array of shape (n_rows, ...)
        The rows.
    """
    path = folder / f"{_name(hashes)}.npy"
    with replace_atomically(path) as temporary:
        np.save(temporary, np.ascontiguousarray(vectors), allow_pickle=False)
    return _write_index(path, hashes)


def _write_index(path: Path, hashes: Sequence[str]) -> Segment:
    """Say of which images the rows of a file are; it counts from here on."""
    seal = _seal(path, hashes)
    write_json(path.with_suffix(".json"), {"sha256": list(hashes), "seal": seal})
    return Segment(path, tuple(hashes), seal)


def _seal(path: Path, hashes: Sequence[str]) -> str:
    return hash_json([digest_file(path, read=True), *hashes])


def _name(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def merge_segments(folder: Path, order: Sequence[str]) -> None:
    """Merge the segments of a bank into one, if the small ones together are worth a rewrite.

    Parameters
    ----------
    folder
        The bank.
    order
        Unique hashes in the order that the rows should have; rows of other images follow.
    """
    _use_segments(folder, partial(_merge, folder, order))


def _use_segments(folder: Path, use: Callable[[list[Segment]], T]) -> T:
    """Call `use` with the segments of a bank, again if another process has merged some of them meanwhile."""
    while True:
        segments = list_segments(folder)
        try:
            return use(segments)
        except (DataError, FileNotFoundError):
            if list_segments(folder) == segments:
                raise


def _merge(folder: Path, order: Sequence[str], segments: list[Segment]) -> None:
    if len(segments) < 2:
        return
    largest = max(len(segment.hashes) for segment in segments)
    total = sum(len(segment.hashes) for segment in segments)
    if total - largest < 0.25 * largest:  # a rewrite must be worth the copy of the largest
        return
    known = {h for segment in segments for h in segment.hashes}
    first = [h for h in order if h in known]
    hashes = first + sorted(known.difference(first))  # in the order of use, so that rows are read in one go
    path = folder / f"{_name(hashes)}.npy"
    _gather(segments, hashes, path)
    _write_index(path, hashes)
    for segment in segments:
        if segment.path != path:
            # The index goes first: rows without an index are not seen, an index without rows is damage.
            segment.path.with_suffix(".json").unlink(missing_ok=True)
            segment.path.unlink(missing_ok=True)


def _gather(segments: Sequence[Segment], hashes: Sequence[str], path: Path | None) -> np.ndarray:
    """Return the rows of the given images, in memory, or in the file `path`."""
    # An image that two processes computed has two rows; the last one is taken, and both are the same.
    place = {h: (n, row) for n, segment in enumerate(segments) for row, h in enumerate(segment.hashes)}
    sources = [segment.open() for segment in segments]
    shapes = {(source.shape[1:], source.dtype.str) for source in sources}
    if len(shapes) > 1:
        raise DataError(
            f"the bank {segments[0].path.parent} mixes rows of {sorted(shapes)}; delete it and embed again."
        )
    shape, dtype = (len(hashes), *sources[0].shape[1:]), sources[0].dtype
    if path is None:
        rows = np.empty(shape, dtype)
        _copy_rows(rows, sources, [place[h] for h in hashes])
        return rows
    with replace_atomically(path) as temporary:
        rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        _copy_rows(rows, sources, [place[h] for h in hashes])
        rows.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _copy_rows(target: np.ndarray, sources: Sequence[np.ndarray], places: Sequence[tuple[int, int]]) -> None:
    """Copy row by row in blocks of bounded size; neighbours in one source go together."""
    step = max(1, _COPY_BYTES // max(1, target[:1].nbytes))
    wanted = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    for start in range(0, len(wanted), step):
        block = wanted[start : start + step]
        for number in np.unique(block[:, 0]):
            here = np.flatnonzero(block[:, 0] == number)
            target[start + here] = sources[int(number)][block[here, 1]]


def read_rows(folder: Path, hashes: Sequence[str]) -> np.ndarray:
    """Return one row per hash, in this order.

    A memory map where the bank holds exactly these rows; an array up to 1 GiB; beyond that, a memory map of a file
    that the bank keeps for this selection.

    Raises
    ------
    DataError
        If an image is not in the bank.
    """
    return _use_segments(folder, partial(_read_rows, folder, tuple(hashes)))


def _read_rows(folder: Path, wanted: tuple[str, ...], segments: list[Segment]) -> np.ndarray:
    for segment in segments:
        if segment.hashes == wanted:
            return segment.open()
    known = {h for segment in segments for h in segment.hashes}
    missing = [h for h in wanted if h not in known]
    if missing:
        raise DataError(
            f"the bank {folder} is missing {len(missing)} image(s), first {missing[0]}; embed them first."
        )
    row_bytes = segments[0].map()[:1].nbytes
    if row_bytes * len(wanted) <= IN_MEMORY_BYTES:
        return _gather(segments, wanted, None)
    # Too large for memory: gathered once into a file, which later runs map again.
    kept = folder / "selections" / f"{_name(wanted)}.npy"
    kept.parent.mkdir(exist_ok=True)
    found = [segment for segment in list_segments(kept.parent) if segment.hashes == wanted]
    if not found:
        _gather(segments, wanted, kept)
        found = [_write_index(kept, wanted)]
    return found[0].open()
