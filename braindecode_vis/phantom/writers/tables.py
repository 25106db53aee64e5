"""Small text files shared by the writers: TSV, CSV and JSON, each appearing at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.store import replace_atomically


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        temporary.write_bytes(text.encode())
    return path


def write_json_file(path: Path, value: Any) -> Path:
    """Write a sidecar with the indentation that BIDS data sets use."""
    return write_text(path, json.dumps(value, indent=4) + "\n")


def write_tsv(path: Path, table: pd.DataFrame, *, missing: str = "n/a") -> Path:
    """Write a tab-separated table; missing values become `missing`."""
    return write_text(path, table.to_csv(sep="\t", index=False, na_rep=missing, lineterminator="\n"))


def write_csv(path: Path, table: pd.DataFrame, *, header: bool = True, index: bool = False) -> Path:
    """Write a comma-separated table; missing values stay empty."""
    return write_text(path, table.to_csv(header=header, index=index, lineterminator="\n"))


def check_block(block: np.ndarray, shape: Sequence[int | None], *, what: str) -> np.ndarray:
    """Return `block` as an array, or raise `DataError` if its shape or its numbers are not usable.

    Parameters
    ----------
    block : array
        One piece of a stream.
    shape
        Expected size of each axis; None leaves an axis free.
    what
        What the stream is, for the message.

    Raises
    ------
    DataError
        If the shape differs or a value is not finite.
    """
    array = np.asarray(block)
    fits = array.ndim == len(shape) and all(
        s is None or s == n for s, n in zip(shape, array.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise DataError(f"{what} must come in pieces of shape ({expected}), but one has {array.shape}.")
    # One sum sees any NaN or infinity without a temporary the size of the block.
    with np.errstate(over="ignore", invalid="ignore"):
        bad = array.dtype.kind == "f" and not np.isfinite(np.sum(array, dtype=np.float64))
    if bad and not np.isfinite(array).all():
        raise DataError(f"{what} holds a non-finite value; a recording on disk must not.")
    return array


def check_count(found: int, expected: int, *, what: str, unit: str) -> None:
    """Raise `DataError` unless a stream delivered as much as its header promises."""
    if found != expected:
        raise DataError(f"{what} was announced with {expected} {unit}, but {found} came.")
