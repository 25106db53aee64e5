"""Trials and pictures of a user's own experiment, from arrays and tables to `Responses` and a `StimulusSet`.

Owns the checks of such data, and fills in missing values: ids, concepts, repetitions, hashes, splits. Pictures with
equal pixels become one, so that no split can have a picture on both sides with two names; copies of trials are found.
Everything that was filled in or found becomes a note for the user and the report. Files and folders are read in
`braindecode_vis.datasets.array_folder`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError, suggest
from braindecode_vis.base.remote import RemotePath, as_path, refuse_address
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels, read_image_file
from braindecode_vis.datasets.trial_values import (
    COPY_CORRELATION,
    check_constant_trials,
    check_trials,
    check_values,
    find_copied_trials,
)

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the trial table that a user may give; any further column is kept as it is.
KNOWN_COLUMNS = ("stimulus_id", "concept", "subject", "session", "run", "group", "repetition", "split")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")

#: Subject, session and run of new trials that do not say.
UNSTATED = "unstated"
#: In s; no trial of EEG or MEG is longer, so that larger times are milliseconds.
LONGEST_TRIAL = 60.0

Pictures = Sequence[Any] | Mapping[str, Any] | np.ndarray | str | Path


@dataclass(frozen=True)
class OwnData:
    """Trials and pictures that belong together, checked.

    Parameters
    ----------
    responses
        One row per trial.
    stimuli
        One row per picture, or per class if no picture is known.
    about
        The user's description of the data: title, modality, unit, citation, licence, normalisation.
    notes
        Values that were filled in, merged or found, one sentence each.
    """

    responses: Responses
    stimuli: StimulusSet
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def knows_images(self) -> bool:
        """Whether pictures are available; otherwise the trials have only a class."""
        return self.stimuli.knows_images


def assemble_data(
    X: np.ndarray,
    trials: pd.DataFrame,
    pictures: Pictures | None,
    *,
    dims: tuple[str, ...] | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    ch_names: Sequence[str] | None = None,
    coords: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    merge_same_pictures: bool = True,
) -> OwnData:
    """Join an array of trials, a table of them and the shown pictures.

    Parameters
    ----------
    X : array of shape (n_trials, ...)
        Usually (n_trials, n_features), or (n_trials, n_channels, n_times). May be a memory map; it is not copied.
    trials : DataFrame of n_trials rows
        Needs `stimulus_id` or `concept`; see `KNOWN_COLUMNS` for other known columns.
    pictures
        A folder of image files; an array of shape (n_pictures, height, width) or (n_pictures, height, width, 3), uint8
        or floats in 0..1; a sequence of such arrays or of paths; or a mapping from ids to such pictures. None if only
        the class of each trial is known. The pictures of an array need ids if one is shown twice: use a mapping.
    dims
        Names of the axes; guessed from the shape by default.
    times : sequence of length n_times, optional
        Time of each sample in s, 0 at the onset of the picture.
    ch_names : sequence of length n_channels, optional
    coords
        Further coordinates of the responses, for example ``mask`` and ``affine``.
    about
        Description of the data: title, modality, unit, sfreq, citation, licence, normalised.
    merge_same_pictures
        Give pictures of equal pixels one id; otherwise they are an error that names them.

    Raises
    ------
    DataError
        If shapes, ids and pictures do not fit together, or a value is not finite.
    """
    facts, notes = dict(about or {}), []
    X = check_trials(X)
    dims = _name_axes(X, dims, times, ch_names)
    notes += check_values(X, dims, ch_names)
    table = _check_table(trials, len(X), may_be_in_order=pictures is not None)
    if pictures is None:
        stimuli, table = _list_classes(table)
    else:
        stimuli, table, said = _join_pictures(table, pictures, merge=merge_same_pictures)
        notes += said
    table, said = complete_trials(table)
    notes += said
    notes += check_constant_trials(X)
    if copies := find_copied_trials(X):
        first, second = copies[0]
        notes.append(
            f"{len(copies)} pair(s) of trials are copies of each other (equal in a third of their values, or "
            f"correlated above {COPY_CORRELATION}), first rows {first} and {second}: a split may show one of them on "
            "each side; drop the copies."
        )
    uneven = "" if times is None else _describe_uneven(np.asarray(times, dtype=float))
    if uneven:
        notes.append(uneven)
    known = dict(coords or {})
    if times is not None:
        known["times"] = np.asarray(times, dtype=float)
    if ch_names is not None:
        known["ch_names"] = [str(name) for name in ch_names]
    if "sfreq" in facts:
        known.setdefault("sfreq", _check_rate(float(facts["sfreq"]), known.get("times"), uneven))
    elif times is not None and len(known["times"]) > 1 and not uneven:
        known.setdefault("sfreq", float(1 / np.median(np.diff(known["times"]))))
    known["warnings"] = list(notes)
    responses = Responses(
        data=X, dims=dims, trials=table, unit=str(facts.get("unit", "arbitrary")), coords=known
    )
    return OwnData(responses, stimuli, facts, tuple(notes))


def make_new_trials(
    X: np.ndarray,
    trials: pd.DataFrame | None,
    pictures: Pictures | None = None,
    *,
    dims: tuple[str, ...] | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    ch_names: Sequence[str] | None = None,
    coords: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[Responses, StimulusSet | None]:
    """Return trials for prediction, which need no table, and their pictures if they are known.

    Parameters
    ----------
    X, dims, times, ch_names, coords, about
        As in `assemble_data`.
    trials : DataFrame of n_trials rows, optional
        Known facts about them. A trial without `stimulus_id` (or with an empty one) gets a new id.
    pictures
        As in `assemble_data`; only if every `stimulus_id` is given.

    Returns
    -------
    responses
        With the column `known`: whether the picture of the trial is known.
    stimuli
        The shown pictures; None without pictures.
    """
    import pandas as pd

    X = check_trials(X)
    table = pd.DataFrame(index=range(len(X))) if trials is None else trials.reset_index(drop=True).copy()
    if len(table) != len(X):
        raise DataError(f"X has {len(X)} trials, but their table has {len(table)} rows.")
    stimuli = None
    if pictures is not None and "stimulus_id" in table and table["stimulus_id"].notna().all():
        stimuli, table, _ = _join_pictures(_check_table(table, len(X)), pictures, merge=True)
    known = pd.Series(False, index=table.index)
    ids = pd.Series([f"new trial {row}" for row in range(len(table))], dtype=object)
    if "stimulus_id" in table:
        known = table["stimulus_id"].notna() & (table["stimulus_id"].astype(str) != "")
        if known.any():
            ids[known] = _as_text(table.loc[known, "stimulus_id"], "stimulus_id")
    table = table.assign(stimulus_id=ids, known=known.to_numpy())
    for name in ("subject", "session", "run", "group", "concept"):
        if name in table:
            table[name] = _as_text(table[name], name)
    for name in ("subject", "session", "run"):
        if name not in table:  # never 01, which may be somebody whom the run knows
            table[name] = UNSTATED
    declared = table.pop("split") if "split" in table else None
    table, _ = complete_trials(table)
    if declared is not None:  # which trials are new is not for a table to say
        table["split"] = declared.astype(str).to_numpy(dtype=object)
    dims = _name_axes(X, dims, times, ch_names)
    facts, held = dict(about or {}), dict(coords or {})
    if times is not None:
        held["times"] = np.asarray(times, dtype=float)
    if ch_names is not None:
        held["ch_names"] = [str(name) for name in ch_names]
    if "sfreq" in facts:
        held.setdefault("sfreq", float(facts["sfreq"]))
    return Responses(X, dims, table, str(facts.get("unit", "arbitrary")), held), stimuli


def _name_axes(
    X: np.ndarray,
    dims: tuple[str, ...] | None,
    times: Sequence[float] | np.ndarray | None,
    ch_names: Sequence[str] | None,
) -> tuple[str, ...]:
    """Return the names of the axes; channels and times in the wrong order are found if their lengths show it."""
    if dims is None:
        guesses = {
            2: ("trial", "channel" if ch_names is not None else "feature"),
            3: ("trial", "channel", "time"),
        }
        if X.ndim not in guesses:
            raise DataError(
                f"X has {X.ndim} axes; give (n_trials, n_features) or (n_trials, n_channels, n_times), or flatten "
                "volumes through a mask first."
            )
        dims = guesses[X.ndim]
    if len(dims) != X.ndim:
        raise DataError(f"X of shape {X.shape} cannot have the axes {', '.join(dims)}.")
    for name, given, axis in (("ch_names", ch_names, "channel"), ("times", times, "time")):
        if given is None or axis not in dims:
            if given is not None:
                raise DataError(
                    f"{name} was given, but X has the axes {', '.join(dims)}; leave it out or give dims."
                )
            continue
        place = dims.index(axis)
        if len(given) == X.shape[place]:
            continue
        swapped = [n for n in range(1, X.ndim) if n != place and X.shape[n] == len(given)]
        advice = "; the axes look swapped: pass X.transpose(0, 2, 1)" if X.ndim == 3 and swapped else ""
        raise DataError(f"{name} lists {len(given)} entries, but X has {X.shape[place]} {axis}s{advice}.")
    if times is not None:
        _check_times(times)
    names = [] if ch_names is None else [str(name) for name in ch_names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"ch_names has {twice!r} more than once; give every channel a different name.")
    return dims


def _check_times(times: Sequence[float] | np.ndarray) -> None:
    try:
        seconds = np.asarray(times, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"times must be numbers of seconds ({error}).") from error
    if not np.isfinite(seconds).all():
        raise DataError(
            "times holds NaN or inf; give the second of every sample, 0 at the onset of the picture."
        )
    if (np.diff(seconds) <= 0).any():
        raise DataError("times must ascend, in seconds.")
    if len(seconds) and np.abs(seconds).max() > LONGEST_TRIAL:
        raise DataError(
            f"times run from {seconds[0]:g} to {seconds[-1]:g}, but are seconds from the onset of the picture; if "
            "these are milliseconds, pass times / 1000."
        )


def _check_rate(sfreq: float, times: np.ndarray | None, uneven: str) -> float:
    """Return the given sampling rate, unless the given times have another."""
    if times is not None and len(times) > 1 and not uneven:
        found = (len(times) - 1) / float(times[-1] - times[0])
        if abs(found - sfreq) > 0.02 * sfreq:
            raise DataError(
                f"sfreq is {sfreq:g} Hz, but times have {found:g} samples per second; correct one of them, or leave "
                "sfreq out."
            )
    return sfreq


def _describe_uneven(seconds: np.ndarray) -> str:
    """Return a sentence if the steps between samples differ (chosen windows, or a jump); else nothing.

    A step may differ by a tenth: many files round times to milliseconds.
    """
    steps = np.diff(seconds)
    usual = float(np.median(steps)) if len(steps) else 0.0
    off = np.flatnonzero(np.abs(steps - usual) > max(0.1 * usual, 1.5e-3)) if len(steps) else np.empty(0, int)
    if not len(off):
        return ""
    first = int(off[0])
    return (
        f"times are not evenly spaced: steps of {1000 * steps.min():g} to {1000 * steps.max():g} ms, and after "
        f"{seconds[first]:g} s comes {seconds[first + 1]:g} s, so there is no sampling rate, and methods "
        "that need one (some networks, MNE epochs) are not possible. If samples were cut out or times "
        "mistyped, correct them."
    )


def _check_table(trials: pd.DataFrame, n_trials: int, *, may_be_in_order: bool = False) -> pd.DataFrame:
    import pandas as pd

    if len(trials) != n_trials:
        raise DataError(f"X has {n_trials} trials, but their table has {len(trials)} rows.")
    names = [str(name) for name in trials.columns]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"the trial table has the column {twice[0]!r} more than once; keep one of them.")
    if "stimulus_id" not in names and "concept" not in names:
        near = [found for name in names if (found := suggest(name, ("stimulus_id", "concept")))]
        if near or not may_be_in_order:
            raise DataError(
                f"the trial table has the columns {', '.join(names) or 'none'}; it needs stimulus_id (which picture "
                f"was shown) or concept (its class){near[0] if near else ''}."
            )
    table = trials.reset_index(drop=True).copy()
    table.columns = pd.Index(names)
    for name in ("stimulus_id", "concept", "subject", "session", "run", "group"):
        if name in table:
            table[name] = _as_text(table[name], name)
    return table


def _as_text(column: pd.Series, name: str) -> pd.Series:
    """Return ids as text; whole floats lose their ``.0``, which pandas adds if a column of a CSV file has a gap."""
    if column.isna().any():
        row = int(np.flatnonzero(column.isna())[0])
        raise DataError(f"the trial table has no {name} in row {row}; give one, or drop the trial.")
    if column.dtype.kind == "f" and (column == column.round()).all():
        column = column.astype(np.int64)
    # `str` of each: a string of NumPy would look like np.str_('x') in messages.
    return column.map(str).astype(object)


def _list_classes(table: pd.DataFrame) -> tuple[StimulusSet, pd.DataFrame]:
    """Return a stimulus set without pixels: one row per picture id if there are ids, otherwise one per class."""
    table = table.copy()
    if "concept" not in table:
        raise DataError(
            "no pictures and no classes were given: pass images=... (a folder or an array), or labels=... (the class "
            "of each trial)."
        )
    if "stimulus_id" not in table:
        table["stimulus_id"] = table["concept"]
    shown = table[["stimulus_id", "concept"]].drop_duplicates()
    twice = shown["stimulus_id"][shown["stimulus_id"].duplicated()]
    if len(twice):
        raise DataError(
            f"the stimulus {twice.iloc[0]!r} has two classes in the trial table; it can have one."
        )
    # Without pixels, only the name identifies a stimulus.
    hashes = [hash_pixels(np.frombuffer(str(i).encode(), np.uint8)) for i in shown["stimulus_id"]]
    return StimulusSet(shown.assign(path="", sha256=hashes).reset_index(drop=True)), table


def _join_pictures(
    table: pd.DataFrame, pictures: Pictures, *, merge: bool
) -> tuple[StimulusSet, pd.DataFrame, list[str]]:
    import pandas as pd

    table, notes = table.copy(), []
    files, arrays, ids = index_pictures(pictures)
    if "stimulus_id" in table and are_unnamed(pictures):
        _check_numbers(table["stimulus_id"].tolist(), len(ids))
    if "stimulus_id" not in table:
        if len(ids) != len(table):
            raise DataError(
                f"{len(ids)} pictures and {len(table)} trials: say which picture each trial showed (shown=..., or the "
                "column stimulus_id)."
            )
        table["stimulus_id"] = ids  # one picture per trial, in the same order
        if files:
            notes.append(
                "nothing says which picture a trial showed: one file each, by the order of their names."
            )
    # Names may have no folder or suffix, so rows are found first and ids are written back.
    rows = match_ids(table["stimulus_id"].tolist(), ids)
    table["stimulus_id"] = [ids[row] for row in rows]
    unused = len(ids) - len(set(rows))
    if unused:
        notes.append(f"{unused} of {len(ids)} pictures were shown in no trial; they are left out.")
    used = sorted(set(rows))
    # The hash is of the pixels: the same picture as PNG and as array has one identity.
    hashes = [hash_pixels(read_image_file(files[row]) if arrays is None else arrays[row]) for row in used]
    first_of: dict[str, int] = {}
    same: dict[int, int] = {}
    # In the order of the rows, so that the first name of a picture is kept.
    for row, digest in zip(used, hashes, strict=True):
        same[row] = first_of.setdefault(digest, row)
    copies = [(ids[row], ids[first]) for row, first in same.items() if row != first]
    if copies:
        named = "; ".join(f"{a!r} is {b!r}" for a, b in copies[:5]) + ("; ..." if len(copies) > 5 else "")
        if not merge:
            raise DataError(
                f"{len(copies)} picture(s) are the same as another by their pixels ({named}); give each picture one "
                "id, or allow merging."
            )
        notes.append(
            f"{len(copies)} picture(s) are the same as another by their pixels and became one: {named}."
        )
    table["stimulus_id"] = [ids[same[row]] for row in rows]
    kept = [row for row in used if same[row] == row]
    if "concept" in table:
        shown = table[["stimulus_id", "concept"]].drop_duplicates()
        twice = shown["stimulus_id"][shown["stimulus_id"].duplicated()]
        if len(twice):
            raise DataError(
                f"the picture {twice.iloc[0]!r} has two classes in the trial table; a label is the class "
                "of a picture, so each picture has only one."
            )
        concept_of = dict(zip(shown["stimulus_id"], shown["concept"], strict=True))
    else:
        # If the pictures are in several folders, the folder names are the classes.
        sorted_in_folders = len({path.parent for path in files}) > 1
        concept_of = {ids[row]: files[row].parent.name if sorted_in_folders else ids[row] for row in kept}
    digests = dict(zip(used, hashes, strict=True))
    top, places = _name_files(files) if files else (None, [])
    stimulus_table = pd.DataFrame(
        {
            "stimulus_id": [ids[row] for row in kept],
            "concept": [concept_of[ids[row]] for row in kept],
            "path": [places[row] if files else "array" for row in kept],
            "sha256": [digests[row] for row in kept],
        }
    )
    if files:
        return StimulusSet(stimulus_table, root=top), table, notes
    assert arrays is not None
    shapes = {arrays[row].shape for row in kept}
    if len(shapes) > 1:
        raise DataError(
            f"the pictures have {len(shapes)} different sizes; give them as files in a folder, or resize them to "
            "one size."
        )
    return StimulusSet(stimulus_table, pixels=np.stack([arrays[row] for row in kept])), table, notes


def are_unnamed(pictures: Any) -> bool:
    """Whether pictures are identified only by their order: an array of them, or a sequence of arrays."""
    if pictures is None or isinstance(pictures, str | Path | Mapping) or not hasattr(pictures, "__iter__"):
        return False
    return not isinstance(next(iter(pictures), ""), str | Path)


def number_pictures(pictures: Any, shown: Sequence[Any]) -> Any:
    """Return unnamed pictures by their position, if `shown` is whole numbers and contains every position.

    Only for numbers that the user declared as positions. Codes of events, which begin at 1 or have gaps, are never
    positions: code 1 would be the second picture. For these, `assemble_data` raises an error that asks for their
    meaning.
    """
    if not are_unnamed(pictures) or not _are_whole(shown):
        return pictures
    numbers = {int(float(value)) for value in shown}
    return dict(enumerate(pictures)) if numbers == set(range(len(pictures))) else pictures


def _are_whole(values: Sequence[Any]) -> bool:
    return all(re.fullmatch(r"-?\d+(\.0+)?", str(value)) for value in values)


def _check_numbers(shown: list[str], n: int) -> None:
    """Raise `DataError` unless the trials show the unnamed pictures one after the other, in their order."""
    if shown == [str(number) for number in range(n)]:
        return
    names = list(dict.fromkeys(shown))
    told = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    advice = f"images={{{names[0]!r}: pictures[0], ...}}"
    if _are_whole(names):
        numbers = sorted(int(float(name)) for name in names)
        told = f"{len(numbers)} numbers from {numbers[0]} to {numbers[-1]}"
        if len(numbers) == 1:
            told = f"the number {numbers[0]} alone"
        advice = f"images={{{numbers[0]}: pictures[0], ...}}"
        # 1 to 59 may be the first or the last of 60 pictures; only the user knows which.
        likely = [start for start in (1, 0, numbers[0]) if start <= numbers[0] and numbers[-1] < start + n]
        if likely:
            first = numbers[0] if numbers[0] in (0, 1) else likely[0]
            advice += (
                f", or images=dict(enumerate(pictures, {first})) if the first picture has the number {first}"
            )
    raise DataError(
        f"the trials show {told}, and the {n} pictures are an array without names; give them names with "
        f"a mapping: {advice}."
    )


def _find_place(place: str | Path) -> Path:
    """Return a place that the user gave; a remote address that only a file gives is refused."""
    if isinstance(place, RemotePath):
        return place
    if isinstance(place, Path):
        refuse_address(place, "the place of the pictures")
    return as_path(place)


def _name_files(files: Sequence[Path]) -> tuple[Path, list[str]]:
    """Return a folder above all files, and their paths below it."""
    tops = {RemotePath(*file.parts[:2]) if isinstance(file, RemotePath) else Path("/") for file in files}
    if len(tops) > 1:
        raise DataError(
            f"the pictures are in {len(tops)} places ({', '.join(map(str, tops))}); move them into one."
        )
    top = tops.pop()
    return top, [
        file.relative_to(top).as_posix() if isinstance(file, RemotePath) else str(file) for file in files
    ]


def index_pictures(pictures: Pictures) -> tuple[list[Path], list[np.ndarray] | None, list[str]]:
    """Return the files or the arrays of the pictures, and the id of each."""
    if isinstance(pictures, str | Path):
        folder = _find_place(pictures)
        if not folder.is_dir():
            raise DataError(f"the pictures should be in a folder, but {folder} is not one.")
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not found:
            raise DataError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        stems = [p.relative_to(folder).with_suffix("").as_posix() for p in found]
        if len({Path(stem).name for stem in stems}) == len(stems):
            stems = [Path(stem).name for stem in stems]
        if len(set(stems)) < len(stems):  # owl.png beside owl.jpg
            stems = [p.relative_to(folder).as_posix() for p in found]
        return found, None, stems
    if isinstance(pictures, Mapping):
        ids, values = [str(key) for key in pictures], list(pictures.values())
    else:
        values = list(pictures)
        ids = [str(n) for n in range(len(values))]
    if not values:
        raise DataError("no picture was given; pass at least two.")
    if all(isinstance(value, str | Path) for value in values):
        paths = [_find_place(value) for value in values]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            hint = "" if missing[0].suffix else "; pass names of classes as labels=..."
            raise DataError(f"the picture {missing[0]} does not exist{hint}.")
        if not isinstance(pictures, Mapping):
            stems = [path.stem for path in paths]
            ids = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
        return paths, None, ids
    return [], [as_uint8_rgb(value, name=i) for value, i in zip(values, ids, strict=True)], ids


def as_uint8_rgb(picture: Any, *, name: str = "") -> np.ndarray:
    """Return a picture as uint8 of shape (height, width, 3).

    Parameters
    ----------
    picture : array of shape (height, width), (height, width, 1), (height, width, 3) or (height, width, 4)
        uint8, or floats in 0..1; grey becomes three equal channels, and transparency is dropped.
    name
        Name of the picture, for messages.

    Raises
    ------
    DataError
        If it has another shape, or floats outside 0..1.

    Examples
    --------
    >>> as_uint8_rgb(np.array([[0.0, 1.0]])).tolist()
    [[[0, 0, 0], [255, 255, 255]]]
    """
    array = np.asarray(picture)
    where = f"the picture {name!r}" if name else "a picture"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        hint = "; move the channels to the end" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise DataError(
            f"{where} has the shape {np.shape(picture)}; expected (height, width) or (height, width, 3){hint}."
        )
    array = array[..., :3]
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise DataError(f"{where} has a value that is not finite.")
        if array.min() < 0 or array.max() > 1:
            raise DataError(
                f"{where} is of floats from {array.min():g} to {array.max():g}; floats must be between 0 "
                "and 1 (divide by "
                "255, or convert to uint8)."
            )
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise DataError(f"{where} has values from {array.min()} to {array.max()}; expected 0 to 255.")
        array = array.astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def make_picture_set(pictures: Pictures) -> StimulusSet:
    """Return pictures as a stimulus set; every picture is its own concept.

    Parameters
    ----------
    pictures
        As in `assemble_data`.

    Raises
    ------
    DataError
        If there are none, or arrays have different sizes.
    """
    import pandas as pd

    files, arrays, ids = index_pictures(pictures)
    if arrays is not None and len({array.shape for array in arrays}) > 1:
        raise DataError(
            "the pictures have different sizes; give them as files in a folder, or resize them to one."
        )
    top, places = _name_files(files) if files else (None, [])
    table = pd.DataFrame(
        {
            "stimulus_id": ids,
            "concept": ids,
            "path": places if files else "array",
            "sha256": [hash_pixels(image) for image in arrays or map(read_image_file, files)],
        }
    )
    if files:
        return StimulusSet(table, root=top)
    assert arrays is not None
    return StimulusSet(table, pixels=np.stack(arrays))


def match_ids(shown: list[str], ids: list[str]) -> list[int]:
    """Return the number of the picture of each trial; a file may be named with or without its suffix or folder."""
    row_of = {name: row for row, name in enumerate(ids)}
    rows = []
    for trial, name in enumerate(shown):
        row = row_of.get(name)
        if row is None and Path(name).suffix.lower() in IMAGE_SUFFIXES:
            stem = Path(name).with_suffix("")
            row = row_of.get(stem.as_posix(), row_of.get(stem.name))
        if row is None:
            # Numbers are codes of the experiment; their meaning is never guessed from the order of the files.
            is_code = _are_whole([name]) and not any(map(str.isdecimal, ids))
            advice = f"; state what each number means: images={{{name}: 'a.png', ...}}" if is_code else ""
            raise DataError(
                f"trial {trial} shows {name!r}, but there is no such picture among the {len(ids)} given"
                f"{suggest(name, ids[:2000])} (first ones: {', '.join(ids[:3])}){advice}."
            )
        rows.append(row)
    return rows


def complete_trials(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Fill in missing columns of a trial table, and report them.

    Parameters
    ----------
    table : DataFrame
        With `stimulus_id`.

    Returns
    -------
    table : DataFrame
        With `subject, session, run` (``01`` if missing), `repetition` (counted within subject and picture, from 0)
        and `split` (``train`` if missing).
    notes : list of str
    """
    import pandas as pd

    table, filled = table.copy(), []
    for name in ("subject", "session", "run"):
        if name not in table:
            table[name] = "01"
            filled.append(name)
    notes = (
        [f"{', '.join(filled)} {'was' if len(filled) == 1 else 'were'} not given and set to 01."]
        if filled
        else []
    )
    if "repetition" in table and not pd.api.types.is_numeric_dtype(table["repetition"]):
        first = table["repetition"].iloc[0]
        raise DataError(
            f"repetition must be whole numbers, the number of each presentation, not {str(first)!r}."
        )
    if "repetition" not in table:
        table["repetition"] = table.groupby(["subject", "stimulus_id"], sort=False).cumcount()
    if "split" not in table:
        table["split"] = "train"
    else:
        found = set(table["split"].astype(str))
        if not found <= {"train", "test"}:
            other = sorted(found - {"train", "test"})[0]
            raise DataError(f"the column split must hold train or test, not {other!r}.")
        table["split"] = table["split"].astype(str).astype(object)
        crossing = set(table.loc[table["split"] == "train", "stimulus_id"]) & set(
            table.loc[table["split"] == "test", "stimulus_id"]
        )
        if crossing and len(found) == 2 and "concept" not in table:
            raise DataError(
                f"{len(crossing)} picture(s) are both trained on and tested, first {sorted(crossing)[0]!r}: split by "
                "picture, not by trial."
            )
    return table, notes


def _subjects_have_one_class(trials: pd.DataFrame) -> bool:
    """Return whether each subject has only one class, and each of several classes has two subjects or more."""
    classes = trials.groupby("subject", observed=True)["concept"].unique()
    if classes.map(len).max() > 1:
        return False
    counts = classes.map(lambda found: found[0]).value_counts()
    return len(counts) > 1 and int(counts.min()) > 1


def choose_split(trials: pd.DataFrame, n_pictures: int) -> tuple[dict[str, Any], str]:
    """Return the split that `decode` and `new` use if the user gives none, and a sentence with the reason.

    Parameters
    ----------
    trials : DataFrame
        Result of `complete_trials`.
    n_pictures
        Number of different pictures; 0 if only classes are known.

    Examples
    --------
    >>> import pandas as pd
    >>> choose_split(complete_trials(pd.DataFrame({"stimulus_id": list("abcab")}))[0], 3)[0]
    {'kind': 'kfold', 'n_folds': 3}
    """
    # First the experiment's own split, then splits by picture, then splits by run (signals drift between runs).
    if {"train", "test"} <= set(trials["split"]):
        return {"kind": "published"}, "The split that the trials declare."
    if n_pictures:
        n = max(2, min(10, n_pictures))
        return (
            {"kind": "kfold", "n_folds": n},
            "Each picture is tested once, by a decoder that was not trained on it; leave_one_subject_out "
            "tests on new subjects.",
        )
    # What identifies a person would decode a class that all trials of that person have.
    if _subjects_have_one_class(trials):
        return {
            "kind": "leave_one_subject_out"
        }, "All trials of a subject have one class: each is tested as a whole."
    if len(trials[["subject", "session", "run"]].drop_duplicates()) > trials["subject"].nunique():
        return {"kind": "leave_one_run_out"}, "Each run is decoded by the others of its subject."
    if "group" in trials and trials["group"].nunique() > 1:
        return {"kind": "leave_one_group_out"}, "No group (block, day) is trained on and tested."
    return (
        {"kind": "kfold", "n_folds": 5},
        "Trials in five folds. With runs or blocks in the table, leave_one_run_out or group_kfold are the honest ones.",
    )
