"""Messages for a command that ends early: signals, and errors of the system and of components from outside.

Writes the sentences for errors that the package does not raise itself, and ends the process after a signal. It does
not depend on verbs or stages; errors of the package have their own sentence.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CLEANING_S = 10.0
_KEPT = "finished work is kept"
# These come from writing alone, so another folder helps.
_WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew past the size limit",
    errno.EROFS: "the file system is read-only",
}
# These come from reading as well, where another output folder would change nothing.
_OTHER_ERRORS = {
    errno.EACCES: ("permission was denied", "change its permissions or ask its owner"),
    errno.EPERM: ("the operation is not permitted", "change its permissions or ask its owner"),
    errno.EIO: ("the disk or the network failed", "check the disk"),
    errno.ESTALE: ("the network drive lost the file", "mount the drive again"),
    errno.EMFILE: ("too many files are open", "raise the limit with ulimit -n"),
    errno.ENOENT: ("a file is missing", "copy or fetch it"),
    errno.EISDIR: ("there is a folder where a file belongs", "put the file there"),
    errno.ENOTDIR: ("there is a file where a folder belongs", "put the folder there"),
    errno.EEXIST: ("there is a file where a folder belongs", "choose another place, or put the folder there"),
    errno.ELOOP: ("a link leads back to itself", "correct the link"),
    errno.ENAMETOOLONG: ("a name is too long for the file system", "choose a shorter one"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
}


_NEED_NAMES = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
# What readers raise on damaged bytes, wherever they stand in our code, as (module, class) so that none is imported.
_DAMAGE = {
    ("gzip", "BadGzipFile"), ("builtins", "EOFError"), ("zlib", "error"), ("_lzma", "LZMAError"),
    ("zipfile", "BadZipFile"), ("struct", "error"), ("builtins", "UnicodeDecodeError"),
    ("pandas.errors", "ParserError"), ("pandas.errors", "EmptyDataError"), ("json.decoder", "JSONDecodeError"),
    ("PIL", "UnidentifiedImageError"), ("nibabel.filebasedimages", "ImageFileError"),
    ("safetensors._safetensors_rust", "SafetensorError"), ("pyarrow.lib", "ArrowInvalid"),
}  # fmt: skip
# Any error that comes out of these is one of the file: HDF5 raises KeyError, RuntimeError and OSError without a number.
_READERS = ("h5py",)
# The code that reads foreign files: what it stumbles over is most likely in the file, which may hold anything.
_READING = ("braindecode_vis.datasets.", "braindecode_vis.preprocessing.", "braindecode_vis.base.stimuli")
# Within that code: what writes files of ours, and errors that no file causes.
_OWN_FILES = ("braindecode_vis.preprocessing.array_file", "braindecode_vis.preprocessing.signal_damage")
_FAULTS = (AssertionError, NameError, NotImplementedError, RecursionError)


class StopSignals:
    """The signals that asked this process to end; clusters send SIGTERM, a keyboard SIGINT."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.since = 0.0

    def describe(self, *, resumes: bool = True) -> str:
        """Return the sentence for the end, or an empty text if no signal came.

        Parameters
        ----------
        resumes
            Whether the command continues from its finished work when it is run again.
        """
        if not self.received:
            return ""
        name = signal.Signals(self.received[0]).name
        if not resumes:
            return (
                f"stopped by {name}; unfinished work is not kept: run the same command again to start "
                "from the beginning."
            )
        return f"stopped by {name}; {_KEPT}: run the same command again to continue."

    @property
    def exit_code(self) -> int:
        """The code by which a shell knows the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.received[0]


@contextmanager
def stop_cleanly() -> Iterator[StopSignals]:
    """Let SIGTERM end the program as SIGINT does, so that temporary files are removed and locks released."""
    stops, process = StopSignals(), os.getpid()

    def stop(number: int, _: Any) -> None:
        if os.getpid() != process:  # a forked worker ends as it would without us, and says nothing
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # Cleaning up is under way then. A second Ctrl-C may cut it short; schedulers send SIGTERM several times, and
        # one that comes late says that the first was lost, in a callback of a library that swallows errors.
        if number == signal.SIGTERM and stops.received and time.monotonic() - stops.since < _CLEANING_S:
            return
        stops.received.append(number)
        stops.since = time.monotonic()
        raise KeyboardInterrupt

    tell = sys.unraisablehook

    def send_again(unraisable: Any) -> None:
        # The signal came during a callback whose errors Python swallows, as that of a weak reference: from a thread,
        # so that it does not arrive within this one too.
        if not (issubclass(unraisable.exc_type, KeyboardInterrupt) and stops.received):
            tell(unraisable)
            return
        stops.since = -math.inf
        again = threading.Timer(0.05, os.kill, (process, stops.received[-1]))
        again.daemon = True
        again.start()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = send_again
        for number in (signal.SIGTERM, signal.SIGINT):
            # Whoever ignores a signal (nohup) or handles it (a host program) keeps to that.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield stops
    finally:
        sys.unraisablehook = tell
        for changed, handler in before.items():
            signal.signal(changed, handler)


def announce_notices(reword: Callable[[str], str]) -> None:
    """Print a notice as one line without its place in the code; one of little memory in the words of `reword`."""
    from braindecode_vis.base.checks import Notice
    from braindecode_vis.base.memory import MemoryWarning

    show = warnings.showwarning

    def show_plainly(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            sentence = reword(str(message)) if issubclass(category, MemoryWarning) else str(message)
            sys.stderr.write(f"warning: {sentence}\n")
        else:
            show(message, category, *place, **more)

    warnings.showwarning = show_plainly


def describe_failure(error: Exception, *, resumes: bool = True) -> str:
    """Return one sentence for an error that the package did not raise; empty for a defect of the package itself.

    Parameters
    ----------
    error
        What was raised.
    resumes
        Whether the command continues from its finished work when it is run again.
    """
    if isinstance(error, OSError) and (sentence := _describe_system(error, resumes)):
        return sentence
    # What is written in Rust, safetensors among it, says the system's number in its text alone.
    if (number := re.search(r"\(os error (\d+)\)", str(error))) and int(number[1]) in _WRITE_ERRORS:
        return _describe_system(OSError(int(number[1]), str(error)), resumes)
    return (
        _blame_outside(error)
        or _describe_missing_extra(error)
        or _describe_damage(error)
        or _describe_misfit(error)
    )


def _describe_missing_extra(error: Exception) -> str:
    """Return a sentence for a package of an extra that is not installed; empty for any other error."""
    from braindecode_vis.base.checks import EXTRAS, describe_missing

    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return describe_missing(module, "this command") if module in EXTRAS else ""


def _describe_system(error: OSError, resumes: bool) -> str:
    where = f" at {error.filename}" if error.filename else ""
    first, last = (f"{_KEPT}: ", f": {_KEPT}") if resumes else ("", "")
    what = _WRITE_ERRORS.get(error.errno or 0, "")
    # NumPy says how much of an array was written, and leaves out the system's number.
    if not what and error.errno is None and re.search(r"requested and \d+ written", str(error)):
        what = "an array could not be written whole (a full disk, a quota or a limit on the size of files)"
    if what:
        return f"{what}{where}; {first}make room or choose another folder with --out, then run the command again."
    from braindecode_vis.base.checks import describe_unfetched

    named = isinstance(error.filename, str | bytes | os.PathLike)  # a number is an open file
    if named and (unfetched := describe_unfetched(os.fsdecode(error.filename))):
        return f"{unfetched}; then run the same command again{last}."
    # Without a name it may be a fault of ours, which a traceback tells better.
    if error.errno in _OTHER_ERRORS and (error.filename or error.errno not in _NEED_NAMES):
        what, remedy = _OTHER_ERRORS[error.errno]
        return f"{what}{where}; {remedy}, then run the same command again{last}."
    return ""


def _describe_damage(error: Exception) -> str:
    """Return a sentence for what a reader raises on a damaged file; empty for any other error."""
    from braindecode_vis.base.checks import describe_unfetched

    modules = _list_modules(error)
    known = any((cls.__module__, cls.__name__) in _DAMAGE for cls in type(error).__mro__)
    if not known and not (modules and modules[-1].partition(".")[0] in _READERS):
        return ""
    path, reason = _find_path(error), _give_reason(error)
    if path is None:
        return f"a file cannot be read ({reason}); copy or fetch it again, or pass --debug to see where it was read."
    unfetched = describe_unfetched(path)
    return f"{path} cannot be read ({reason}); " + (unfetched or "copy or fetch it again") + "."


def _describe_misfit(error: Exception) -> str:
    """Return a sentence for an error in the code that reads data sets; empty for one in any other code."""
    ours = [module for module in _list_modules(error) if module.startswith("braindecode_vis.")]
    reader = ours[-1] if ours else ""
    if not reader.startswith(_READING) or reader in _OWN_FILES or isinstance(error, _FAULTS):
        return ""
    return (
        f"{_find_path(error) or 'a file of the data set'} does not hold what "
        f"{reader.removeprefix('braindecode_vis.')} expects ({_give_reason(error)}); copy or fetch it again, and if it "
        "is whole, report this with the traceback of --debug."
    )


def _list_modules(error: Exception) -> list[str]:
    """Return the modules that an error came through, the innermost last."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _give_reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def _find_path(error: Exception) -> Path | None:
    """Return the file that the innermost function was reading; the messages of readers do not name it."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            # Not `value.path`, which may be a property that raises.
            path = value if isinstance(value, Path) else getattr(value, "__dict__", {}).get("path")
            if isinstance(path, Path) and (path.is_file() or path.is_symlink()):
                return path
    return None


def _blame_outside(error: Exception) -> str:
    """Return a sentence for an error in the code of a component from outside; empty for any other."""
    from braindecode_vis.base.settings import OUTSIDE

    files = {Path(str(sys.modules[cls.__module__].__file__)): code for cls, code in OUTSIDE.items()}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for file, code in files.items():
            path = Path(frame.filename)
            if path == file or ((file.parent / "__init__.py").is_file() and path.is_relative_to(file.parent)):
                text = " ".join(str(error).split()).rstrip(".")
                return (
                    f"{code.describe()} raised {type(error).__name__} in {frame.name} ({path.name}, line "
                    f"{frame.lineno}): {text}; --debug shows the traceback."
                )
    return ""
