"""Compares stored results of a run with a repeated computation, and describes the differences.

Owns how much rounding is forgiven, and knows nothing of stages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import iterate_blocks, read_rows
from braindecode_vis.base.stimuli import Images
from braindecode_vis.base.store import PROVENANCE, load_tensors, read_json
from braindecode_vis.parts.audit.statistics import compute_moments, iterate_rows
from braindecode_vis.pipeline.leaks.findings import AuditFinding

#: Grey levels, mean over an image: rounding moves a few values by one.
IMAGE_TOLERANCE = 0.5
#: Share of images that may be others: where two neighbours are equally near, another device may choose the other one.
OTHER_IMAGES = 0.005
#: Of a number beside another one, added to the relative tolerance.
SMALLEST = 1e-6
#: Of a response, in standard deviations of its feature (channel and sample, or voxel): rounding stays far below.
RESPONSE_TOLERANCE = 1e-3


def compare_vectors(made: np.ndarray, stored: np.ndarray) -> tuple[float, int]:
    """Return the largest distance of a row from the one made again, in units of the spread of rows, and its number.

    Parameters
    ----------
    made, stored : arrays of shape (n_rows, n_features)

    Examples
    --------
    >>> compare_vectors(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.1]]))[1]
    1
    >>> compare_vectors(np.zeros((0, 2)), np.zeros((0, 2)))
    (0.0, 0)
    """
    if made.shape != stored.shape:
        return np.inf, 0
    if not len(made):
        return 0.0, 0
    made, stored = np.asarray(made, dtype=np.float64), np.asarray(stored, dtype=np.float64)
    spread = float(np.sqrt(np.square(made - made.mean(axis=0)).sum(axis=1).mean()))
    size = float(np.sqrt(np.square(made).sum(axis=1).mean()))
    # A single row has no spread, and where all are nearly the same their rounding is that of their size.
    scale = max(spread, 0.01 * size) if len(made) > 1 else size
    off = np.linalg.norm(made - stored, axis=1) / (scale or 1.0)
    off = np.where(np.isnan(off), np.inf, off)
    row = int(np.argmax(off))
    return float(off[row]), row


def compare_responses(made: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the trials that differ from those made again, and the largest difference; read block by block.

    Whole numbers must be equal. Others may differ by `RESPONSE_TOLERANCE` standard deviations (of their distance from
    the mean where that is larger), and by one step of their own precision, which half precision needs for large values.

    Parameters
    ----------
    made, stored : arrays of shape (n_trials, n_features[, n_times])

    Returns
    -------
    int64 array of shape (n_different,)
        Numbers of the trials.
    float
        In standard deviations of the feature; infinite if the arrays have another shape or type.

    Examples
    --------
    >>> compare_responses(np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [1.0], [2.1]]))[0]
    array([2])
    """
    if made.shape != stored.shape or made.dtype != stored.dtype:
        return np.arange(len(stored)), np.inf
    is_whole = made.dtype.kind != "f"
    step = 0.0 if is_whole else 2 * float(np.finfo(made.dtype).eps)
    mean, spread = compute_moments(made, np.arange(len(made)))
    different, largest = [np.zeros(0, dtype=np.int64)], 0.0
    for chunk, block in iterate_rows(made, np.arange(len(made))):
        values = block.reshape(len(chunk), -1)
        off = np.abs(np.asarray(read_rows(stored, chunk), dtype=np.float64).reshape(values.shape) - values)
        off = np.where(np.isnan(off), np.inf, off)
        allowed = RESPONSE_TOLERANCE * np.maximum(spread, np.abs(values - mean)) + step * np.abs(values)
        is_other = off > (0.0 if is_whole else allowed)
        different.append(chunk[is_other.any(axis=1)])
        if is_other.any():
            largest = max(largest, float((off / np.maximum(spread, SMALLEST))[is_other].max()))
    return np.concatenate(different), largest


def compare_images(name: str, made: Images, stored: Images, ids: np.ndarray) -> AuditFinding | None:
    """Return a finding where stored images are not those made again; None if they are.

    Parameters
    ----------
    name
        Whose images they are.
    made, stored : uint8 arrays of shape (n_rows, [n_draws,] height, width, 3), or `ImageRows`
    ids : array of shape (n_rows,)
        What each row shows.
    """
    if made.shape != stored.shape or stored.dtype != np.uint8:
        text = f"tampered: the images {name} are {stored.dtype} of shape {stored.shape}, not uint8 of {made.shape}."
        return AuditFinding("images", "leak", text)
    # Row by row, since all draws of a large test set need not fit into memory twice.
    off = np.array([_measure_gap(a, b) for a, b in zip(made, stored, strict=True)])
    others = np.flatnonzero(off > IMAGE_TOLERANCE)
    if not len(others):
        return None
    worst = others[np.argmax(off[others])]
    few = len(others) <= OTHER_IMAGES * len(off)
    text = (
        f"{len(others)} of {len(off)} images {name} differ from the repeated computation, most of all "
        f"that of {ids[worst]} "
        f"(off by {off[worst]:.2g} grey levels)"
    )
    if few:
        return AuditFinding("images", "warning", f"{text}; so few differences may come from another device.")
    return AuditFinding("images", "leak", f"tampered: {text}.")


def _measure_gap(made: Images, stored: Images) -> float:
    """Return the mean difference of images in grey levels; infinite where they differ in size."""
    a, b = np.asarray(made).astype(np.int16), np.asarray(stored)
    return float(np.abs(a - b).mean()) if a.shape == b.shape else np.inf


def find_difference(
    stored: Any, made: Any, *, tolerance: float = 1e-3, skip: Collection[str] = (), path: str = ""
) -> str:
    """Return the first difference of plain values in words, numbers up to a relative tolerance; empty without one.

    Parameters
    ----------
    stored, made
        Plain values: numbers, texts, None, lists and mappings.
    tolerance
        Relative to the number that was made again.
    skip
        Keys that are not compared.
    path
        Where the values are, for the words.

    Examples
    --------
    >>> find_difference({"a": [1.0, 2.0]}, {"a": [1.0, 2.5]})
    'a[1] is 2, but 2.5 is computed'
    """
    if isinstance(made, Mapping):
        if not isinstance(stored, Mapping):
            return f"{path or 'it'} is no mapping"
        keys = [key for key in [*made, *(key for key in stored if key not in made)] if key not in skip]
        for key in keys:
            where = f"{path}.{key}".lstrip(".")
            if key not in stored or key not in made:
                return f"{where} {'is missing' if key not in stored else 'should not be there'}"
            if text := find_difference(stored[key], made[key], tolerance=tolerance, skip=skip, path=where):
                return text
        return ""
    if isinstance(made, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(made):
            n = len(stored) if isinstance(stored, list | tuple) else "no"
            return f"{path or 'it'} has {n} entries, but {len(made)} are computed"
        for number, (one, other) in enumerate(zip(stored, made, strict=True)):
            where = f"{path}[{number}]"
            if text := find_difference(one, other, tolerance=tolerance, skip=skip, path=where):
                return text
        return ""
    return (
        ""
        if _is_same(stored, made, tolerance)
        else f"{path or 'it'} is {_show(stored)}, but {_show(made)} is computed"
    )


def _is_same(stored: Any, made: Any, tolerance: float) -> bool:
    numbers = [
        isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in (stored, made)
    ]
    if not any(numbers):
        return bool(stored == made)
    first, second = (np.nan if value is None else value for value in (stored, made))
    if not all(isinstance(value, int | float | np.number) for value in (first, second)):
        return False
    if np.isnan(first) or np.isnan(second):
        return bool(np.isnan(first) and np.isnan(second))
    return bool(first == second or abs(first - second) <= tolerance * abs(second) + SMALLEST)


def _show(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def compare_files(
    stored: Path, made: Path, tolerance: float, *, skip: Collection[str] = (), leave: Collection[str] = ()
) -> str:
    """Return the first difference of two folders of one artifact in words; empty if their numbers are the same.

    Parameters
    ----------
    stored, made
        Folders; every file of `made` must be in `stored`. Files of other types than arrays, tables and JSON are left
        alone.
    tolerance
        Relative; of arrays to their largest value, and of embeddings to their spread.
    skip
        Keys and columns that are not compared.
    leave
        Names of files that are not compared.
    """
    ignored = {PROVENANCE, *leave}
    for path in sorted(path for path in made.rglob("*") if path.is_file() and path.name not in ignored):
        name = path.relative_to(made).as_posix()
        if path.suffix not in (".json", ".npy", ".safetensors", ".parquet"):
            continue
        if not (stored / name).is_file():
            return f"{name} is missing"
        if text := _compare_file(stored / name, path, tolerance, skip):
            return f"{name}: {text}"
    return ""


def _compare_file(stored: Path, made: Path, tolerance: float, skip: Collection[str]) -> str:
    if made.suffix == ".json":
        return find_difference(read_json(stored), read_json(made), tolerance=tolerance, skip=skip)
    if made.suffix == ".parquet":
        return compare_tables(pd.read_parquet(stored), pd.read_parquet(made), tolerance=tolerance, skip=skip)
    if made.suffix == ".npy":
        arrays = [{"it": np.load(path, mmap_mode="r", allow_pickle=False)} for path in (stored, made)]
    else:
        arrays = [load_tensors(path) for path in (stored, made)]
    for key, array in arrays[1].items():
        other = arrays[0].get(key)
        if other is None or other.shape != array.shape or other.dtype.kind != array.dtype.kind:
            return f"{key} has another shape or type"
        if made.name == "vectors.npy" and array.dtype.kind == "f" and array.size:
            same = (
                compare_vectors(array.reshape(len(array), -1), other.reshape(len(array), -1))[0] <= tolerance
            )
        else:
            same = _compare_values(other, array, tolerance)
        if not same:
            return f"{key} is not what is computed"
    return ""


def _compare_values(stored: np.ndarray, made: np.ndarray, tolerance: float) -> bool:
    """Say whether two arrays hold the same values; block by block, since the pictures of a data set fill gigabytes."""
    # A single number is a row of one.
    stored, made = (array if array.ndim else array.reshape(1) for array in (stored, made))
    off, largest = np.zeros(2)
    for rows, block in iterate_blocks(made, np.arange(len(made))):
        beside = read_rows(stored, rows)
        if made.dtype.kind != "f":
            if not np.array_equal(beside, block):
                return False
        elif block.size:
            # Of what is no number, the maximum is none either.
            off, largest = (
                np.maximum(off, np.abs(beside - block).max()),
                np.maximum(largest, np.abs(block).max()),
            )
    return bool(off <= tolerance * largest)


def compare_tables(
    stored: pd.DataFrame, made: pd.DataFrame, *, tolerance: float = 1e-3, skip: Collection[str] = ()
) -> str:
    """Return the first difference of two tables in words, column by column; empty if they are the same."""
    if len(stored) != len(made):
        return f"it has {len(stored)} rows, but {len(made)} are computed"
    for name in made:
        if name in skip:
            continue
        if name not in stored:
            return f"its column {name} is missing"
        ours, theirs = made[name], stored[name]
        if ours.dtype.kind in "iuf" and theirs.dtype.kind in "iuf":
            a, b = theirs.to_numpy(dtype=float), ours.to_numpy(dtype=float)
            same = (
                (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= tolerance * np.abs(b) + SMALLEST)
            )
            rows = np.flatnonzero(~same)
        else:
            pairs = zip(map(_as_plain, theirs), map(_as_plain, ours), strict=True)
            rows = np.array(
                [row for row, (a, b) in enumerate(pairs) if not _is_same(a, b, tolerance)], dtype=int
            )
        if len(rows):
            row = int(rows[0])
            told, computed = (_show(_as_plain(column.iloc[row])) for column in (theirs, ours))
            return f"{name} of row {row} is {told}, but {computed} is computed"
    return ""


def _as_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | list | tuple):
        return [str(item) for item in value]
    return None if value is None or value is pd.NA else value
