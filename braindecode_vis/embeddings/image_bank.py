"""Embeddings of millions of images in one folder, computed in parts by any number of processes.

Owns the plan of a bank (which image is in which part), the parts, and how they become one array. The plan follows from
the images alone, so that every process cuts the same parts; a part is one file that appears by a rename when it is
whole, so that a killed process loses only its part and nothing is computed twice. In the end each id occurs once, or is
listed as left out. Only one part is in memory at a time.

    plan.json          the shards with the number of images, what was asked for
    part-0000017.npz   vectors, ids and digests of the images of a part
    vectors.npy, ids.json, images.npy, manifest.json
                       the finished bank: vectors (a memory map), ids, digests of what was embedded, and where all this
                       came from; the parts are gone by then

`store.read_embeddings` reads a finished bank too; `read_image_bank` does not look at every number.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import ImageEncoder
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.store import json_plain, read_json, replace_atomically, write_json
from braindecode_vis.embeddings.image_sources import (
    BrokenImageError,
    ImageSource,
    SourceImage,
    digest_image,
    load_image,
)
from braindecode_vis.embeddings.transforms import map_ahead

PART = 1024  # images: what a killed process loses at most
DECODERS = 2  # threads that decode images
MANIFEST, PLAN = "manifest.json", "plan.json"
_FILES = ("vectors.npy", "ids.json", "images.npy")
_LISTED = 1000  # images left out that the manifest names
Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class ShardRange:
    """A range of images of one shard."""

    number: int
    shard: str
    start: int
    stop: int


@dataclass(frozen=True)
class BankPlan:
    """The images and parts of a bank.

    Parameters
    ----------
    folder
        Of the bank.
    request
        What was asked for: source, space, encoder and type of number.
    shards
        Name, stamp and number of images of each.
    """

    folder: Path
    request: Mapping[str, Any]
    shards: tuple[tuple[str, str, int], ...]

    @cached_property
    def n_images(self) -> int:
        """Images of all shards."""
        return sum(n for _, _, n in self.shards)

    @cached_property
    def parts(self) -> list[ShardRange]:
        """All parts, in the order of the images."""
        cut = [
            (name, start, min(start + PART, n)) for name, _, n in self.shards for start in range(0, n, PART)
        ]
        return [ShardRange(number, *where) for number, where in enumerate(cut)]

    @property
    def is_finished(self) -> bool:
        """Whether the bank is there."""
        return (self.folder / MANIFEST).is_file()

    def find(self, part: ShardRange) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{part.number:07d}.npz"

    def list_missing(self) -> list[ShardRange]:
        """Return the parts that are not there."""
        there = {path.name for path in self.folder.glob("part-*.npz")}
        return [part for part in self.parts if self.find(part).name not in there]


def plan_bank(
    folder: Path,
    source: ImageSource,
    encoder: ImageEncoder,
    *,
    dtype: Dtype = "float16",
    tell: Callable[[str], None] = lambda sentence: None,
) -> BankPlan:
    """Return the plan of a bank: that of an earlier call, or a new one, written into the folder.

    Parameters
    ----------
    folder
        Of the bank; made on first use.
    source
        The images.
    encoder
        Its space is that of the bank.
    dtype
        Type of the numbers that are kept.
    tell
        Called with a sentence on what takes long.

    Raises
    ------
    ConfigError
        If the folder holds something else.
    DataError
        If an id occurs twice, there is no image, or images have changed since the earlier call.
    """
    config = getattr(encoder, "config", None)
    request = json_plain(
        {
            "source": source.describe(), "space": encoder.space, "dtype": dtype, "part": PART,
            "encoder": config.hashed_fields() if isinstance(config, Settings) else {},
        }
    )  # fmt: skip
    kept = next((folder / name for name in (MANIFEST, PLAN) if (folder / name).is_file()), None)
    if kept is not None:
        return _continue(folder, source, request, read_json(kept))
    if folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
        raise ConfigError(f"{folder} holds other files; choose an empty folder for the bank.")
    tell("listing the images")
    shards = _count_images(source)
    folder.mkdir(parents=True, exist_ok=True)
    plan = BankPlan(folder, request, shards)
    _write_plan(plan)
    return plan


def _write_plan(plan: BankPlan) -> None:
    write_json(plan.folder / PLAN, {"request": plan.request, "shards": plan.shards})


def _count_images(source: ImageSource) -> tuple[tuple[str, str, int], ...]:
    """Return the shards with their sizes, and see that every id is there once."""
    shards, hashes = [], []
    for shard in source.list_shards():
        ids = source.name_images(shard.name)
        hashes.append(_hash_ids(ids))
        shards.append((shard.name, shard.stamp, len(ids)))
    if not any(n for _, _, n in shards):
        raise DataError("the source holds no image.")
    together = np.concatenate(hashes)
    if (twice := _find_twice(together)) is not None:
        # Read again for the names alone, which nobody keeps in memory.
        where = [
            (i, name) for name, _, _ in shards for i in source.name_images(name) if _hash_ids([i])[0] == twice
        ]
        (first, one), (_, other) = where[:2]
        raise DataError(
            f"the id {first!r} occurs in {one} and in {other if other != one else 'the same shard once more'}; every "
            "image needs an id of its own: rename the images, or take a column of unique ids with --id-column."
        )
    return tuple(shards)


def _hash_ids(ids: Sequence[str]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(i.encode("utf-8", "surrogateescape")) for i in ids], np.uint64)


def _find_twice(hashes: np.ndarray) -> np.uint64 | None:
    ordered = np.sort(hashes)
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return ordered[same[0]] if same.size else None


def _continue(
    folder: Path, source: ImageSource, request: Mapping[str, Any], known: Mapping[str, Any]
) -> BankPlan:
    """Return the plan of an earlier call, if it was asked for the same and the images are the same."""
    try:
        before, shards = known["request"], tuple((str(a), str(b), int(n)) for a, b, n in known["shards"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder} holds a damaged plan of a bank; delete the folder, and embed again."
        ) from error
    if before != request:
        key = next(key for key in {**before, **request} if before.get(key) != request.get(key))
        raise ConfigError(
            f"{folder} holds a bank with the {key} {json.dumps(before.get(key))[:200]}, not "
            f"{json.dumps(request.get(key))[:200]}; choose another folder with --bank."
        )
    plan, now = BankPlan(folder, request, shards), {shard.name: shard.stamp for shard in source.list_shards()}
    if gone := [name for name, _, _ in shards if name not in now]:
        raise DataError(
            f"the shard {gone[0]} has disappeared since {folder} was begun; put it back, or begin another bank."
        )
    if new := sorted(set(now) - {name for name, _, _ in shards}):
        raise DataError(
            f"the shard {new[0]} was not there when {folder} was begun; begin another bank with --bank."
        )
    if changed := [(name, n) for name, stamp, n in shards if stamp != now[name]]:
        _compare_images(plan, source, changed)
        if not plan.is_finished:
            # Other times, the same bytes: a copy.
            plan = BankPlan(folder, request, tuple((name, now[name], n) for name, _, n in shards))
            _write_plan(plan)
    return plan


def _compare_images(plan: BankPlan, source: ImageSource, shards: Sequence[tuple[str, int]]) -> None:
    """Raise `DataError` unless the images of some shards that were embedded are still the same, byte for byte."""
    otherwise = "put the earlier file back, or begin another bank with --bank"
    digests = _read_digests(plan, [shard for shard, _ in shards])
    for (shard, n), known in zip(shards, digests, strict=True):
        found = len(source.name_images(shard))
        if found != n:
            raise DataError(
                f"{shard} has {found} images, and had {n} when {plan.folder} was begun; {otherwise}."
            )
        for item in source.read(shard, 0, n) if known else ():
            if item.id in known and digest_image(item.read()) != known[item.id]:
                raise DataError(f"the image {item.where} has changed since it was embedded; {otherwise}.")


def _read_digests(plan: BankPlan, shards: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield for each shard the digests of its images that were embedded, by id."""
    if not plan.is_finished:
        for shard in shards:
            known: dict[str, int] = {}
            for part in plan.parts:
                if part.shard == shard and plan.find(part).is_file():
                    content = _read_part(plan, part, "ids", "digests")
                    known |= dict(zip(_list_ids(content), content["digests"].tolist(), strict=True))
            yield known
        return
    # Once for all shards: there may be millions of ids.
    ids = read_json(plan.folder / "ids.json")["ids"]
    digests = np.load(plan.folder / "images.npy", mmap_mode="r")
    rows, first = {}, 0
    for name, count in read_json(plan.folder / MANIFEST)["rows"]:
        rows[name] = slice(first, first + count)
        first += count
    for shard in shards:
        yield dict(zip(ids[rows[shard]], digests[rows[shard]].tolist(), strict=True))


# --- parts ------------------------------------------------------------------------------------------------


def take_share(parts: Sequence[ShardRange], worker: int, n_workers: int) -> list[ShardRange]:
    """Return the parts of one of several processes: a run of neighbours, which lie in few shards."""
    first, last = (len(parts) * n // n_workers for n in (worker, worker + 1))
    return list(parts[first:last])


def embed_parts(
    plan: BankPlan,
    source: ImageSource,
    encoder: ImageEncoder,
    parts: Sequence[ShardRange],
    *,
    skip_broken: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Compute parts that are not there.

    Parameters
    ----------
    plan, source, encoder
        As for `plan_bank`.
    parts
        Some of the plan.
    skip_broken
        Leave out images that cannot be decoded, and list them; otherwise the first one is an error.
    advance
        Called with the number of images done.

    Raises
    ------
    DataError
        If an image is broken, has no finite embedding, or the disk is full.
    """
    for part in parts:
        if plan.is_finished or plan.find(part).is_file():  # by another process
            advance(part.stop - part.start)
            continue
        content = _embed_part(plan, source, encoder, part, skip_broken)
        with _name_full_disk(plan), replace_atomically(plan.find(part)) as temporary:
            np.savez(temporary, allow_pickle=False, **content)
        advance(part.stop - part.start)


def _embed_part(
    plan: BankPlan, source: ImageSource, encoder: ImageEncoder, part: ShardRange, skip_broken: bool
) -> dict[str, np.ndarray]:
    ids, digests, broken = [], [], []

    def load(item: SourceImage) -> Any:
        try:
            return item, *load_image(item)
        except BrokenImageError as error:
            if not skip_broken:
                raise BrokenImageError(
                    f"{error}; repair it, or leave such images out with --skip-broken."
                ) from error
            return item, None, str(error)

    def iterate() -> Iterator[np.ndarray]:
        items = source.read(part.shard, part.start, part.stop)
        for item, image, about in map_ahead(load, items, workers=DECODERS):
            if image is None:
                broken.append([item.id, about])
                continue
            ids.append(item.id)
            digests.append(about)
            yield image

    vectors = np.asarray(encoder.encode(iterate()))
    n = part.stop - part.start
    if len(ids) + len(broken) != n or len(vectors) != len(ids):
        raise DataError(
            f"{part.shard} gave {len(ids) + len(broken)} images and {len(vectors)} embeddings where its list says {n}; "
            "it has changed: run the command again."
        )
    with np.errstate(over="ignore"):  # found below
        kept = vectors.astype(plan.request["dtype"])
    finite = np.isfinite(kept).all(axis=tuple(range(1, kept.ndim)))
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        hint = (
            "; its numbers are too large for float16: use --dtype float32"
            if np.isfinite(vectors[row]).all()
            else ""
        )
        raise DataError(
            f"{encoder.space} gives no finite embedding of the image {ids[row]!r} of {part.shard}{hint}."
        )
    return {
        "vectors": kept, "ids": np.array([i.encode("utf-8", "surrogateescape") for i in ids], "S"),
        "digests": np.array(digests, np.uint64), "broken": np.frombuffer(json.dumps(broken).encode(), np.uint8),
    }  # fmt: skip


@contextmanager
def _name_full_disk(plan: BankPlan) -> Iterator[None]:
    """Turn the error of a full disk into a sentence that says what is kept."""
    try:
        yield
    except OSError as error:
        if not store.is_disk_full(error, plan.folder):
            raise
        n, left = len(plan.parts), len(plan.list_missing())
        raise DataError(
            f"the disk of {plan.folder} is full; {n - left} of {n} parts are kept: make room, then run "
            "the same command again."
        ) from error


def _read_part(plan: BankPlan, part: ShardRange, *names: str) -> dict[str, np.ndarray]:
    """Return the arrays of a part, or some of them."""
    path = plan.find(part)
    try:
        with np.load(path, allow_pickle=False) as found:  # zip files check their sums
            return {name: found[name] for name in names or ("vectors", "ids", "digests", "broken")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and run the same command again.") from error


def _list_broken(content: Mapping[str, np.ndarray]) -> list[list[str]]:
    found: list[list[str]] = json.loads(content["broken"].tobytes())
    return found


def _list_ids(content: Mapping[str, np.ndarray]) -> list[str]:
    return [i.decode("utf-8", "surrogateescape") for i in content["ids"].tolist()]


# --- the whole --------------------------------------------------------------------------------------------


def finish_bank(plan: BankPlan) -> dict[str, Any]:
    """Join all parts, remove them, and return the manifest; does nothing where that was done.

    Raises
    ------
    DataError
        If a part is missing or damaged, an id occurs twice, or there is no room.
    """
    if plan.is_finished:
        for path in plan.folder.glob("part-*.npz"):  # left by a process that was killed here
            path.unlink(missing_ok=True)
        manifest: dict[str, Any] = read_json(plan.folder / MANIFEST)
        return manifest
    if missing := plan.list_missing():
        raise DataError(
            f"{len(missing)} of {len(plan.parts)} parts of {plan.folder} are missing; run the same command again."
        )
    needed = sum(plan.find(part).stat().st_size for part in plan.parts)
    free = shutil.disk_usage(plan.folder).free
    if free < needed:
        raise DataError(
            f"{plan.folder} needs {describe_bytes(needed)} to join its parts, and {describe_bytes(free)} are free; all "
            "parts are kept: make room, then run the same command again."
        )
    with _name_full_disk(plan), store.open_scratch(plan.folder, "bank") as scratch:
        manifest = _join(plan, scratch)
        write_json(scratch / MANIFEST, manifest)
        store.move_together(scratch, MANIFEST)
    for part in plan.parts:
        plan.find(part).unlink(missing_ok=True)
    (plan.folder / PLAN).unlink(missing_ok=True)
    return manifest


def _join(plan: BankPlan, folder: Path) -> dict[str, Any]:
    """Write the arrays of a bank part after part, and return its manifest."""
    rows: dict[str, int] = {name: 0 for name, _, _ in plan.shards}
    of_shard = {name: xxhash.xxh3_128() for name in rows}
    broken = [
        [part.shard, *each] for part in plan.parts for each in _list_broken(_read_part(plan, part, "broken"))
    ]
    n = plan.n_images - len(broken)
    if not n:
        raise DataError(f"every image of the source is broken; {broken[0][2]}.")
    hashes, digests = np.empty(n, np.uint64), np.empty(n, np.uint64)
    shape: tuple[int, ...] = ()
    done = 0
    with (folder / "vectors.npy").open("wb") as vectors, (folder / "ids.json").open("w") as names:
        names.write(f'{{\n "space": {json.dumps(plan.request["space"])},\n "ids": [')
        for part in plan.parts:
            content = _read_part(plan, part)
            ids, own = _list_ids(content), content["vectors"]
            if len(own) + len(_list_broken(content)) != part.stop - part.start or len(own) != len(ids):
                raise DataError(
                    f"{plan.find(part)} does not belong to this bank; delete it, and run the same command again."
                )
            if not ids:
                continue
            if not shape:
                shape = own.shape[1:]
                header = {"descr": np.lib.format.dtype_to_descr(own.dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(vectors, {**header, "shape": (n, *shape)})
            if own.shape[1:] != shape or own.dtype != plan.request["dtype"]:
                raise DataError(f"{plan.find(part)} holds rows of {own.shape[1:]} beside others of {shape}.")
            vectors.write(np.ascontiguousarray(own).data)
            names.write(("," if done else "") + ",".join("\n  " + json.dumps(i) for i in ids))
            rows[part.shard] += len(ids)
            of_shard[part.shard].update(content["digests"].tobytes())
            here = slice(done, done + len(ids))
            hashes[here], digests[here] = _hash_ids(ids), content["digests"]
            done += len(ids)
        names.write("\n ]\n}\n")
    if done != n or _find_twice(hashes) is not None:
        raise DataError(f"the parts of {plan.folder} hold an id twice; delete the folder, and embed again.")
    np.save(folder / "images.npy", digests, allow_pickle=False)
    return {
        "space": plan.request["space"], "n_images": n, "shape": list(shape), "dtype": plan.request["dtype"],
        "n_broken": len(broken), "broken": broken[:_LISTED], "request": plan.request, "shards": plan.shards,
        "rows": list(rows.items()),
        "image_digests": {name: digest.hexdigest() for name, digest in of_shard.items()},
        "digests": digest_files({name: folder / name for name in _FILES}, moves=True), **store.collect_provenance(),
    }  # fmt: skip


def is_image_bank(folder: Path) -> bool:
    """Return whether a folder holds a bank of this module, finished or begun."""
    return (folder / MANIFEST).is_file() or (folder / PLAN).is_file()


def read_image_bank(folder: Path) -> Embeddings:
    """Return a finished bank; its vectors are a memory map.

    Raises
    ------
    DataError
        If it is not there, not finished, or not as it was written.
    """
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            raise DataError(f"the bank {folder} is not finished; run the command embed again to continue.")
        raise DataError(
            f"{folder} is no bank of images: it holds no {MANIFEST}; make one with embed --images."
        )
    manifest = read_json(folder / MANIFEST)
    try:
        found = digest_files({name: folder / name for name in _FILES})
        if wrong := [name for name in _FILES if found[name] != manifest["digests"][name]]:
            raise DataError(f"{folder / wrong[0]} is damaged; delete the bank, and embed again.")
        ids, space = np.asarray(read_json(folder / "ids.json")["ids"], dtype=object), manifest["space"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged; delete the bank, and embed again.") from error
    # Every number was found finite when it was written.
    return Embeddings.from_checked(
        np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False), ids, space
    )
