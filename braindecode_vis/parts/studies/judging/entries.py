"""Entries of a track: predictions of anybody, checked and sealed without a network.

Owns the folder of an entry, what makes it valid, and its seal. Nothing in it can run: arrays are read without pickle.
An entry is accepted as a whole or not at all. How it is scored is in `entry_scores`.

::

    ENTRY/
      entry.yaml                 what the team states; see `EntryCard`
      predictions/SUBJECT.npy    a row per query (or .safetensors); seed-N/SUBJECT.npy for several seeds
      predictions/SUBJECT.txt    id of each row; without it, rows follow the queries of the split
      gallery.npy, gallery.txt   embeddings of the candidates in the space of the predictions, and their ids
      images/SUBJECT/ID.png      decoded pictures, if there are any
      run/                       the run folder, if the entry is to be audited
      seal.json                  written by `seal_entry`: hash of every file, of the split, and what was computed
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import (
    ConfigError,
    DataError,
    check_finite,
    check_unique,
    refuse_damage,
    suggest,
)
from braindecode_vis.base.settings import Settings, describe_validation_error
from braindecode_vis.datasets.hosts import check_inside
from braindecode_vis.parts.studies.judging.tracks import Track, TrackSplit
from braindecode_vis.parts.studies.output_files import read_given
from braindecode_vis.pipeline.prediction_files import publish_folder

if TYPE_CHECKING:
    from PIL import Image

CARD, SEAL, SCORES, AUDIT = "entry.yaml", "seal.json", "scores.json", "audit.json"
#: Written beside an entry after its files were hashed.
_BESIDE = frozenset({SEAL, SCORES, AUDIT})
LARGEST = 2 << 30  # bytes of an entry; its run does not count
MOST_FILES = 50_000
LARGEST_CARD = 1 << 16
#: Licences under which predictions may be scored, shown and passed on.
LICENCES = (
    "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "MIT", "BSD-2-Clause", "BSD-3-Clause",
    "Apache-2.0",
)  # fmt: skip
ARRAYS = (".npy", ".safetensors")
IMAGES = (".png", ".jpg", ".jpeg")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
#: Text of a card without signs that steer a terminal.
_Text = Annotated[str, Field(pattern=r"^(?:[^\p{Cc}]|[\n\t])*$")]
#: Cosine from which a prediction is the embedding that it should find.
_COPY = 1 - 1e-6


class Chosen(Settings):
    """How everything of an entry was chosen.

    Parameters
    ----------
    on
        What choices looked at: ``fixed`` if nothing was chosen, ``validation`` for held-out training data, ``test`` for
        the queries of the track.
    epoch, settings
        How the epoch or checkpoint, and all other settings were chosen, in a sentence.
    """

    on: Literal["fixed", "validation", "test"]
    epoch: _Text = Field(min_length=3)
    settings: _Text = Field(min_length=3)


class EntryCard(Settings):
    """What a team states about its entry.

    Parameters
    ----------
    name, team
        Letters, digits and ``-_.``; together they are unique in a track.
    code, weights
        Addresses, or ``none``.
    licence
        Of predictions and pictures; one of `LICENCES`.
    extra_data
        Everything learnt from beside the training part of the track, pretrained networks included.
    hours, hardware
        Hours of compute, and on what.
    chosen
        See `Chosen`.
    seeds
        Root seeds; each has its predictions.
    space
        Image encoder whose embeddings are predicted, with weights and layer.
    split
        SHA-256 of the split that was used; filled in by ``submit`` if empty.
    transductive
        Whether decisions used several queries together. Signs of it are computed in any case.
    floor
        ``ridge`` for the floor of a table; empty for others.
    """

    name: str = Field(pattern=_NAME)
    team: str = Field(pattern=_NAME)
    code: _Text
    weights: _Text
    licence: str
    extra_data: tuple[_Text, ...]
    hours: float = Field(ge=0)
    hardware: _Text
    chosen: Chosen
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    space: _Text = Field(min_length=1)
    split: str = ""
    transductive: bool = False
    floor: Literal["", "ridge"] = ""

    @property
    def folder(self) -> str:
        """Name of its folder in a track."""
        return f"{self.team}--{self.name}"


@dataclass(frozen=True)
class TrackEntry:
    """A valid entry, in memory.

    Parameters
    ----------
    card
        With the hash of the split.
    track, split
        What it answers.
    predictions
        For each seed and subject, an array of shape (n_queries, ...) in the order of the queries of the split.
    gallery : Embeddings of n_candidates rows
        In the order of the galleries of the split.
    images
        For each subject the file of each query; empty without pictures.
    run
        Its run folder, or None.
    """

    card: EntryCard
    track: Track
    split: TrackSplit
    predictions: Sequence[Mapping[str, np.ndarray]]
    gallery: Embeddings
    images: Mapping[str, Mapping[str, Path]]
    run: Path | None = None


def read_entry(folder: Path, track: Track, split: TrackSplit) -> TrackEntry:
    """Return the entry of a folder after every check.

    Raises
    ------
    ConfigError, DataError
        At the first thing that is wrong, with what to do.
    """
    check_files(folder)
    card = read_card(folder / CARD)
    if card.split and card.split != split.sha256:
        raise DataError(
            f"{folder / CARD} names the split {card.split[:16]}..., but the track {track.name} has "
            f"{split.sha256[:16]}...; predict the queries of this split."
        )
    predictions = [_read_seed(folder, card, seed, split) for seed in card.seeds]
    _refuse_other_seeds(folder, card)
    shapes = {array.shape[1:] for found in predictions for array in found.values()}
    if len(shapes) > 1:
        raise DataError(
            f"predictions of {folder} have rows of the shapes {sorted(shapes)}; all need the same."
        )
    gallery = _read_gallery(folder, card, split, shapes.pop())
    _refuse_copies(folder, predictions, gallery, split)
    run = folder / "run"
    return TrackEntry(
        card.model_copy(update={"split": split.sha256}), track, split, predictions, gallery,
        _find_images(folder, split), run if (run / "config.yaml").is_file() else None,
    )  # fmt: skip


def check_files(folder: Path) -> None:
    """Raise `DataError` if a folder is too large for an entry, or holds links or files that belong to none."""
    sizes = _list_files(folder)
    if sum(sizes.values()) > LARGEST:
        raise DataError(
            f"{folder} holds {sum(sizes.values()) / 2**30:.1f} GB, and an entry at most {LARGEST / 2**30:.0f} GB; "
            "leave out pictures or make them smaller."
        )
    if strange := next((path for path in sizes if not _is_known(path)), None):
        raise DataError(
            f"{folder} holds {strange}, which is no file of an entry; arrays are .npy or .safetensors without pickle, "
            "pictures .png or .jpg."
        )


def read_card(path: Path) -> EntryCard:
    """Return what a team states, after checking that its licence lets others see the entry.

    Raises
    ------
    ConfigError
        If a field is missing or wrong, or the licence forbids passing on.
    """
    if not path.is_file() or path.stat().st_size > LARGEST_CARD:
        raise ConfigError(f"{path} is missing or too large; write it with the fields of docs/TRACKS.md.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise ValueError
        raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold the fields of docs/TRACKS.md, not {type(content).__name__}.")
    chosen = content.get("chosen")
    if isinstance(chosen, dict) and True in chosen and "on" not in chosen:
        chosen["on"] = chosen.pop(True)  # YAML 1.1 takes the bare word on for true
    try:
        card = EntryCard.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation_error(error)}.") from error
    if card.licence not in LICENCES:
        forbids = re.search(r"\bND\b|proprietary|reserved|private", card.licence, re.IGNORECASE)
        why = "forbids that others change or pass on the predictions" if forbids else "is not known here"
        raise ConfigError(
            f"{path}: the licence {card.licence!r} {why}; choose one of {', '.join(LICENCES)}"
            f"{suggest(card.licence, LICENCES)}."
        )
    if len(set(card.seeds)) < len(card.seeds):
        raise ConfigError(f"{path} names a seed twice.")
    return card


def _list_files(folder: Path) -> dict[str, int]:
    """Return the size of each file below an entry, without its run; links are refused."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder or the ZIP of an entry.")
    sizes: dict[str, int] = {}
    for here, below, names in os.walk(folder):
        place = Path(here)
        if place == folder and "run" in below and not (folder / "run").is_symlink():
            below.remove("run")
        for name in [*names, *below]:
            path = place / name
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise DataError(f"{path} is a link; copy the file itself.")
            if stat.S_ISREG(found.st_mode):
                sizes[path.relative_to(folder).as_posix()] = found.st_size
        if len(sizes) > MOST_FILES:
            raise DataError(
                f"{folder} holds more than {MOST_FILES} files; an entry has a few for each subject."
            )
    return sizes


def _is_known(path: str) -> bool:
    first, _, rest = path.partition("/")
    if first == "predictions":
        return re.fullmatch(r"(seed-\d+/)?[^/]+\.(npy|safetensors|txt)", rest) is not None
    if first == "images":
        return re.fullmatch(r"[^/]+/[^/]+\.(png|jpe?g)", rest, re.IGNORECASE) is not None
    return path in _BESIDE | {CARD, "gallery.npy", "gallery.safetensors", "gallery.txt"}


def _find_array(folder: Path, name: str) -> Path | None:
    found = [path for end in ARRAYS if (path := folder / f"{name}{end}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} holds {found[0].name} and {found[1].name}; keep one of them.")
    return found[0] if found else None


def _read_rows(path: Path, expected: Sequence[str], what: str) -> tuple[np.ndarray, list[str]]:
    """Return a finite array and the id of each row; without a file of ids, rows follow `expected`."""
    given = read_given(path, what)
    values = given.values
    assert values is not None
    if values.ndim < 2 or values.dtype.kind not in "fiu":
        raise DataError(
            f"{path} holds {values.dtype} of shape {values.shape}; numbers of shape (n_rows, ...) are needed."
        )
    listed, ids = path.with_suffix(".txt"), list(expected)
    if listed.is_file():
        found = read_given(listed, f"ids of {what}").values
        ids = [] if found is None else [str(name) for name in found]
    if len(ids) != len(values):
        raise DataError(f"{path} has {len(values)} rows, but there are {len(ids)} ids for {what}.")
    check_unique(ids, what=f"ids of {what}")
    place = {name: row for row, name in enumerate(ids)}
    if missing := [name for name in expected if name not in place]:
        raise DataError(
            f"{path} misses {len(missing)} of {len(expected)} ids of {what}, first {missing[0]!r}; a part of "
            "a test set is another test set."
        )
    if unknown := sorted(place.keys() - set(expected), key=place.__getitem__):
        raise DataError(
            f"{path} has {len(unknown)} ids that {what} do not have, first {unknown[0]!r}"
            f"{suggest(unknown[0], list(expected))}."
        )
    with np.errstate(over="ignore"):  # what is too large is refused below
        values = np.asarray(values, dtype=np.float32)
    check_finite(values, what=f"the array of {path}", row_names=ids, hint="")
    return values[[place[name] for name in expected]], list(expected)


def _read_seed(folder: Path, card: EntryCard, seed: int, split: TrackSplit) -> dict[str, np.ndarray]:
    place = folder / "predictions"
    if (place / f"seed-{seed}").is_dir():
        place /= f"seed-{seed}"
    elif len(card.seeds) > 1:
        raise DataError(
            f"{folder / CARD} names the seeds {list(card.seeds)}, but {place} has no folder seed-{seed}."
        )
    found = {}
    for subject, ids in split.queries.items():
        path = _find_array(place, subject)
        if path is None:
            raise DataError(
                f"{place} has no predictions of subject {subject} ({subject}.npy or .safetensors); the track "
                f"{split.track} needs the subjects {', '.join(split.queries)}."
            )
        found[subject] = _read_rows(path, ids, f"the queries of subject {subject}")[0]
    known = {path.stem for path in place.iterdir() if path.is_file()}
    if more := sorted(known - set(split.queries)):
        raise DataError(
            f"{place} has predictions of {more[0]!r}, which is no subject of the track {split.track}."
        )
    return found


def _refuse_other_seeds(folder: Path, card: EntryCard) -> None:
    """Raise `DataError` if predictions lie where no seed of the card looks for them."""
    top = folder / "predictions"
    seeds = {f"seed-{seed}" for seed in card.seeds}
    folders = {path.name for path in top.iterdir() if path.is_dir()}
    loose = {path.name for path in top.iterdir() if path.is_file()} if folders else set()
    if other := sorted((folders - seeds) | loose):
        raise DataError(
            f"{top} holds {other[0]}, which belongs to none of the seeds {list(card.seeds)} of {CARD}; remove it, or "
            "name its seed."
        )


def _read_gallery(folder: Path, card: EntryCard, split: TrackSplit, shape: tuple[int, ...]) -> Embeddings:
    path = _find_array(folder, "gallery")
    if path is None:
        raise DataError(
            f"{folder} has no gallery.npy; it holds the embeddings of the {len(split.gallery)} candidates in the "
            "space of the predictions, with their ids in gallery.txt."
        )
    values, ids = _read_rows(path, split.gallery, "the gallery")
    if values.shape[1:] != shape:
        raise DataError(
            f"{path} has rows of shape {values.shape[1:]}, but predictions have {shape}; use one space."
        )
    return Embeddings(values, ids, card.space)


def _refuse_copies(
    folder: Path, predictions: Sequence[Mapping[str, np.ndarray]], gallery: Embeddings, split: TrackSplit
) -> None:
    """Raise `DataError` if a prediction is the embedding of a candidate; whichever, so that no label is needed."""
    known = _scale(gallery.vectors)
    for found in predictions:
        for subject, array in found.items():
            copies = np.flatnonzero((_scale(array) @ known.T).max(axis=1) > _COPY)
            if len(copies):
                raise DataError(
                    f"{len(copies)} of {len(array)} predictions of subject {subject} in {folder} equal an embedding of "
                    f"the gallery (first {split.queries[subject][copies[0]]!r}): targets were copied into predictions."
                )


def _scale(array: np.ndarray) -> np.ndarray:
    """Return flat rows of unit length in double precision."""
    rows = array.reshape(len(array), -1).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return unit


def _find_images(folder: Path, split: TrackSplit) -> dict[str, dict[str, Path]]:
    top, found = folder / "images", dict[str, dict[str, Path]]()
    if not top.is_dir():
        return found
    for subject, ids in split.queries.items():
        files = {path.stem: path for path in (top / subject).glob("*")} if (top / subject).is_dir() else {}
        if missing := [name for name in ids if name not in files]:
            raise DataError(
                f"{top / subject} misses pictures of {len(missing)} of {len(ids)} queries, first {missing[0]!r}; give "
                "all, or leave out the folder images."
            )
        found[subject] = {name: files[name] for name in ids}
        for path in found[subject].values():
            with refuse_damage(f"{path} is no PNG or JPEG picture", hint="save it again"), open_picture(path):
                pass
    known = {path for files in found.values() for path in files.values()}
    if more := next((path for path in sorted(top.glob("*/*")) if path not in known), None):
        raise DataError(f"{more} is the picture of no query of the track {split.track}; remove it.")
    return found


def open_picture(path: Path) -> Image.Image:
    """Return a picture of an entry, its header read; other formats are not tried, since some run a program."""
    from PIL import Image

    return Image.open(path, formats=("PNG", "JPEG"))


@contextmanager
def open_source(source: Path) -> Iterator[Path]:
    """Yield the folder of an entry; a ZIP is unpacked into a temporary one, after its names and sizes were checked.

    Raises
    ------
    DataError
        If the ZIP is damaged, too large, or a name in it leaves the folder.
    """
    if source.is_dir() or not source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as temporary:
        # Each way of packing has errors of its own.
        with refuse_damage(f"{source} is not a ZIP that can be read"), zipfile.ZipFile(source) as archive:
            _check_members(source, archive.infolist())
            archive.extractall(temporary)
        inner = list(Path(temporary).iterdir())
        yield inner[0] if len(inner) == 1 and inner[0].is_dir() else Path(temporary)


def _check_members(source: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    check_unique([info.filename for info in infos], what=f"files of {source}")
    for info in infos:
        linked = stat.S_ISLNK(info.external_attr >> 16)
        try:
            check_inside(info.filename)
        except DataError:
            linked = True
        if linked or ":" in info.filename:
            raise DataError(f"{source} holds {info.filename!r}, which leaves the folder of the entry.")
    total = sum(info.file_size for info in infos)
    if total > LARGEST or len(infos) > MOST_FILES:
        raise DataError(
            f"{source} unpacks to {total / 2**30:.1f} GB in {len(infos)} files, and an entry has at most "
            f"{LARGEST / 2**30:.0f} GB and {MOST_FILES} files."
        )


def find_place(entry: TrackEntry, entries: Path) -> Path:
    """Return the folder ``entries/TRACK/TEAM--NAME`` of a new entry.

    Raises
    ------
    DataError
        If there is an entry of that name.
    """
    path = entries.expanduser().absolute() / entry.track.name / entry.card.folder
    others = {p.name.lower() for p in path.parent.iterdir()} if path.parent.is_dir() else set()
    if path.name.lower() in others:
        raise DataError(
            f"{path.parent} has an entry {entry.card.name!r} of team {entry.card.team!r} already; choose another "
            f"name in {CARD}."
        )
    return path


def seal_entry(entry: TrackEntry, entries: Path, facts: Mapping[str, Any]) -> Path:
    """Write an entry into ``entries/TRACK/TEAM--NAME`` with its seal, and return that folder.

    Parameters
    ----------
    entry
        A valid entry.
    entries
        Folder of all entries.
    facts
        Scores and signs, kept as ``scores.json``.

    Raises
    ------
    DataError
        If there is an entry of that name.
    """
    path = find_place(entry, entries)
    with publish_folder(path) as temporary:
        card = entry.card.model_dump(mode="json")
        (temporary / CARD).write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
        several = len(entry.card.seeds) > 1
        for seed, found in zip(entry.card.seeds, entry.predictions, strict=True):
            place = temporary / "predictions" / (f"seed-{seed}" if several else "")
            place.mkdir(parents=True)
            for subject, array in found.items():
                write_rows(place / subject, array, entry.split.queries[subject])
        write_rows(temporary / "gallery", entry.gallery.vectors, entry.split.gallery)
        for subject, files in entry.images.items():
            (temporary / "images" / subject).mkdir(parents=True)
            for name, file in files.items():
                shutil.copyfile(file, temporary / "images" / subject / f"{name}{file.suffix.lower()}")
        if entry.run is not None:
            if linked := next((path for path in entry.run.rglob("*") if path.is_symlink()), None):
                raise DataError(f"{linked} is a link; copy the file itself.")
            shutil.copytree(entry.run, temporary / "run")
        store.write_json(temporary / SCORES, store.json_plain(facts))
        store.write_json(temporary / SEAL, _make_seal(temporary, entry))
    return path


def write_rows(path: Path, values: np.ndarray, ids: Sequence[str]) -> None:
    """Write ``PATH.npy`` in single precision, and ``PATH.txt`` with the id of each row."""
    values = np.asarray(values, dtype=np.float32)
    np.save(path.with_name(f"{path.name}.npy"), values, allow_pickle=False)
    path.with_name(f"{path.name}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an entry, without its run, its scores, its audit and its seal."""
    names = sorted(set(_list_files(folder)) - _BESIDE)
    return {name: store.hash_file(folder / name) for name in names}


def _make_seal(folder: Path, entry: TrackEntry) -> dict[str, Any]:
    files = hash_files(folder)
    return {
        "track": entry.track.name,
        "split": entry.split.sha256,
        "entry": store.hash_json(files),
        "files": files,
        "scores": store.hash_file(folder / SCORES),
        "sealed": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "version": store.collect_provenance()["versions"].get("braindecode_vis", ""),
    }


def check_seal(folder: Path, *, whole: bool = False) -> dict[str, Any]:
    """Return the seal of an entry.

    Parameters
    ----------
    folder
        A sealed entry.
    whole
        Whether all files are read again; else only the card, the scores and the names of the files are compared.

    Raises
    ------
    DataError
        If there is no seal, or a file is not as it was sealed.
    """
    if not (folder / SEAL).is_file():
        raise DataError(f"{folder} is not sealed; run braindecode-vis submit {folder} --track NAME.")
    seal: dict[str, Any] = store.read_json(folder / SEAL)
    try:
        found = hash_files(folder) if whole else {CARD: store.hash_file(folder / CARD)}
        names = set(_list_files(folder)) - _BESIDE
        changed = [name for name, digest in found.items() if seal["files"].get(name) != digest]
        changed += sorted(names ^ set(seal["files"]))
        if store.hash_file(folder / SCORES) != seal["scores"]:
            changed.append(SCORES)
        if changed or seal["entry"] != store.hash_json(seal["files"]):
            raise DataError(
                f"{folder}: {(changed or [SEAL])[0]} is not as it was sealed; submit the entry again."
            )
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"the seal of {folder} is damaged ({error}); submit the entry again.") from error
    return seal
