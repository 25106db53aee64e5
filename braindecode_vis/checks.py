"""Exception types, and the checks and wordings of errors that every module shares.

Owns the exception types and the small checks that every module shares. A message says what was expected,
what was found, where, and what to do. Knows nothing of the objects it is asked about.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class BraindecodeVisError(Exception):
    """Base of every error that the command line prints as one sentence with exit code 2."""


class ConfigError(BraindecodeVisError):
    """A configuration asks for something that does not exist or does not fit together."""


class DataError(BraindecodeVisError):
    """A file or an array is not what its manifest, its format or its neighbours promise."""


class InputError(DataError, ValueError):
    """Arrays given to an estimator do not fit; a `ValueError` too, as scikit-learn's conventions ask."""


class LeakWarning(UserWarning):
    """The test of a run reached its training, so that its scores do not stand."""


def check_option(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`, naming the nearest known option.

    Parameters
    ----------
    name
        What the option is called where the user wrote it, for example ``target.kind``.
    value
        What was given.
    allowed
        The known options.

    Raises
    ------
    ConfigError
        If `value` is not among `allowed`.

    Examples
    --------
    >>> check_option("metric", "cosine", ["cosine", "euclidean"])
    """
    options = list(allowed)
    if value in options:
        return
    near = suggest(str(value), [str(option) for option in options])
    raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(map(str, options))}{near}.")


def suggest(word: str, known: Sequence[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_finite(
    array: np.ndarray, *, what: str, row_names: Sequence[Any] | np.ndarray, unit: str = "row"
) -> None:
    """Raise `DataError` naming the first row that holds a NaN or an infinity.

    The array is visited in blocks of rows, so a memory map of any size is checked in bounded memory.

    Parameters
    ----------
    array : array of shape (n_rows, ...)
        Numbers to check; integer and boolean arrays pass at once.
    what
        Name of the array in the message.
    row_names : sequence of length n_rows
        Identifier of each row.
    unit
        What a row is called, for example ``trial``.

    Raises
    ------
    DataError
        If a value is not finite.
    """
    if array.dtype.kind not in "fc" or array.size == 0:
        return
    row_bytes = max(1, array[:1].nbytes)
    block = max(1, (64 << 20) // row_bytes)
    for start in range(0, len(array), block):
        chunk = array[start : start + block]
        # One sum sees any NaN or infinity without a temporary the size of the block.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.sum(chunk, dtype=np.float64)):
                continue
        bad = ~np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not bad.any():
            continue
        row = start + int(np.flatnonzero(bad)[0])
        n_bad = int((~np.isfinite(array[row])).sum())
        raise DataError(
            f"{what} holds {n_bad} non-finite value(s) in {unit} {row} ({row_names[row]}): "
            f"repair or drop that {unit} in the source data and preprocess again."
        )


def check_columns(columns: Iterable[str], required: Iterable[str], *, what: str) -> None:
    """Raise `DataError` if `columns` lacks one of the `required` names."""
    missing = [name for name in required if name not in set(columns)]
    if missing:
        raise DataError(f"{what} lacks the column(s) {', '.join(missing)}; it has {', '.join(columns)}.")


def check_file(path: Path, *, what: str, hint: str) -> Path:
    """Return `path` if it is a readable file; otherwise raise `DataError` that ends with `hint`."""
    if path.is_dir():
        raise DataError(f"{what} should be a file, but {path} is a folder; {hint}.")
    if not path.exists():
        raise DataError(f"{what} was not found at {path}; {hint}.")
    return path


@contextmanager
def refuse_damage(
    what: str, *errors: type[Exception], hint: str = "copy or fetch it again"
) -> Iterator[None]:
    """Turn what a reader raises on damaged bytes into one sentence.

    Parameters
    ----------
    what
        File and finding, for example ``x.nii cannot be read as NIfTI``.
    errors
        What is caught; everything by default, since readers of foreign bytes raise what they like.
    hint
        What to do.

    Raises
    ------
    DataError
        In place of what was caught; our own errors pass.
    """
    caught = errors or (Exception,)
    try:
        yield
    except BraindecodeVisError:
        raise
    except caught as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} ({reason}){f'; {hint}' if hint else ''}.") from error


def check_unique(values: Sequence[Any], *, what: str) -> None:
    """Raise `DataError` naming the first repeated value."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise DataError(f"{what} must be unique, but {value!r} occurs more than once.")
        seen.add(value)
