"""Memory: how much is free, whether a step fits, the error if it does not fit, and how much a step used.

Finds the limits of memory (of the process, of its control groups, of the machine), checks it before a large step,
writes the error when memory ran out, and profiles a step: its time, memory, and bytes read and written. The code of a
step says how many bytes it needs. Imports only the standard library, `checks` and `parts`, since it must work when
nothing more can be loaded; the command has looked for the parts before.

psutil knows the machine, but neither control groups nor the limit of the address space.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.base.parts import find_parts

#: Above this share of what is free a step is announced as tight.
TIGHT = 0.8
#: Address space of the libraries that every command loads, and of those that compute, in bytes. Below, OpenBLAS asks
#: for its buffers forever while it is loaded, where no signal and no exception reaches it.
_TABLES_BYTES, _COMPUTING_BYTES = 500_000_000, 1_600_000_000
#: Of every further core: one 32 MiB buffer in each of two OpenBLAS, and the stacks of three pools of threads.
_CORE_BYTES = 90_000_000
#: Rows of a memory map that are read before its pages are given back: what is touched of a row may map 64 KiB of it.
ROWS_OF_A_MAP = 1024
_CACHE = ("inactive_file", "active_file")
_V1_UNLIMITED = 1 << 60  # version 1 of control groups writes a huge number for "no limit"


class MemoryWarning(Notice):
    """A step needs most of the free memory."""


class TooLargeError(DataError, MemoryError):
    """A step was refused before it began, since it does not fit into memory."""


@dataclass(frozen=True)
class MemoryLimit:
    """One limit of memory.

    Parameters
    ----------
    free
        Bytes that can still be used; the page cache counts as free, since the system gives it back.
    total
        Total bytes that the limit allows.
    name
        Name of the limit, in words.
    remedy
        How to raise the limit.
    """

    free: int
    total: int
    name: str
    remedy: str

    def describe(self) -> str:
        """Return "1.2 GB of 8.0 GB are free (name of the limit)"."""
        return f"{describe_bytes(self.free)} of {describe_bytes(self.total)} are free ({self.name})"


def release_pages(array: Any) -> None:
    """Give back what was read of a memory map; until it is closed, it counts as memory of this process.

    Parameters
    ----------
    array
        Trials of any kind. Nothing happens to what is in memory, may be written, or is read on demand.
    """
    while hasattr(array, "flags"):
        if array.flags.writeable:  # and so may its base be, of a private map
            return
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.madvise(mmap.MADV_DONTNEED)


def describe_bytes(n_bytes: float) -> str:
    """Return a size as people write it.

    Examples
    --------
    >>> describe_bytes(2_500_000_000), describe_bytes(80_000_000), describe_bytes(512)
    ('2.5 GB', '80 MB', '512 bytes')
    """
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.1f} GB"
    if n_bytes >= 1e6:
        return f"{n_bytes / 1e6:,.0f} MB"
    return f"{n_bytes / 1e3:,.0f} kB" if n_bytes >= 1e3 else f"{max(0, int(n_bytes))} bytes"


def describe_size(n_bytes: float | None) -> str:
    """Return a size as `describe_bytes`; None is a size that is not known."""
    return "size unknown" if n_bytes is None else describe_bytes(n_bytes)


def describe_total(sizes: Sequence[float | None]) -> str:
    """Return the sum of sizes, with ``or more`` if some are not known.

    Examples
    --------
    >>> describe_total([2_500_000_000, 512]), describe_total([80_000_000, None])
    ('2.5 GB', '80 MB or more')
    """
    return describe_bytes(sum(size or 0 for size in sizes)) + (" or more" if None in sizes else "")


# --- limits -----------------------------------------------------------------------------------------------


def find_memory() -> MemoryLimit | None:
    """Return the limit that leaves the least memory; None on a system that reports none."""
    limits = [*_find_process_limits(), *_find_group_limits(), *_find_machine_limit()]
    return min(limits, key=lambda limit: limit.free, default=None)


def _find_process_limits() -> Iterator[MemoryLimit]:
    try:
        import resource  # not on Windows
    except ImportError:
        return
    pages = _read_numbers("/proc/self/statm")
    for kind, option, column in (("RLIMIT_AS", "-v", 0), ("RLIMIT_DATA", "-d", 5)):
        limit = resource.getrlimit(getattr(resource, kind))[0]
        if limit != resource.RLIM_INFINITY and len(pages) > column:
            used = pages[column] * resource.getpagesize()
            yield MemoryLimit(
                max(0, limit - used),
                limit,
                f"limit of the process, ulimit {option}",
                f"raise ulimit {option}",
            )


def _find_group_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[Any]:
    """Yield the bounds of the control groups of this process, by which containers and clusters limit a job.

    Beyond them the system kills the process, so that no error can be reported afterwards.
    """
    for line in _read_text(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # A container sees its own group at the root, under whatever path the machine knows it.
        for folder in dict.fromkeys([*_list_parents(base, path), base]):
            limit, used = (_read_numbers(folder / name) for name in names)
            if not limit or not used or limit[0] >= _V1_UNLIMITED:
                continue
            stat = dict(re.findall(r"^(\w+) (\d+)$", _read_text(folder / "memory.stat"), re.MULTILINE))
            own_cache = [("total_" if f"total_{name}" in stat else "") + name for name in _CACHE]
            cache = sum(int(stat.get(name, "0")) for name in own_cache)
            free = min(limit[0], max(0, limit[0] - used[0] + cache))
            yield MemoryLimit(
                free,
                limit[0],
                "memory limit of this job or container, cgroup",
                "ask for more memory for the job",
            )


def _list_parents(base: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [base.joinpath(*parts[:n]) for n in range(len(parts), 0, -1)]


def _find_machine_limit() -> Iterator[MemoryLimit]:
    known = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read_text(Path("/proc/meminfo")), re.MULTILINE))
    if "MemAvailable" in known:
        total, free = int(known["MemTotal"]) * 1024, int(known["MemAvailable"]) * 1024
    else:
        try:  # other systems do not tell how much of their memory is cache: all of it may be free
            total = free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return
    yield MemoryLimit(free, total, "memory of this machine", "use a machine with more memory")


def _read_text(path: Path | str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _read_numbers(path: Path | str) -> list[int]:
    """Return the numbers of a file of the system; none if it is missing or says "max"."""
    words = _read_text(path).split()
    return [int(word) for word in words] if all(word.isdigit() for word in words) else []


# --- before a step ----------------------------------------------------------------------------------------


def check_memory(needed: float, *, what: str, reduce: str) -> None:
    """Refuse a step that cannot fit into memory, and warn of one that takes most of it.

    Parameters
    ----------
    needed
        Bytes that the step holds at the same time. Memory maps do not count, since the system can release them.
    what
        The step and its sizes, such as ``ridge on 16540 trials of 17000 features``.
    reduce
        What to reduce, with the names of the settings.

    Raises
    ------
    TooLargeError
        If more is needed than the binding limit leaves.
    """
    limit = find_memory()
    if limit is None or needed <= TIGHT * limit.free:
        return
    told = f"{what} needs about {describe_bytes(needed)} of memory, and {limit.describe()}"
    if needed > limit.free:
        raise TooLargeError(f"{told}; reduce {reduce}, or {limit.remedy}.")
    warnings.warn(f"{told}: it may not fit; if it fails, reduce {reduce}.", MemoryWarning, stacklevel=3)


def check_libraries(*, computes: bool) -> None:
    """Refuse a limit of address space into which the libraries alone do not fit.

    With such a limit, the BLAS of SciPy is loaded at once, while there is space: if it is loaded later without space,
    it waits forever. Tables are then read without the allocator of pyarrow, which reserves 1 GiB before it reads.

    Parameters
    ----------
    computes
        Whether the command loads more than tables.

    Raises
    ------
    DataError
        If the limit is too low.
    """
    limit = next((found for found in _find_process_limits() if found.name.endswith("-v")), None)
    if limit is None:
        return
    cores = count_cores()
    threads = min(cores, int(os.environ.get("OPENBLAS_NUM_THREADS", "") or cores))
    needed = (_COMPUTING_BYTES if computes else _TABLES_BYTES) + max(0, threads - 2) * _CORE_BYTES
    if limit.total < needed:
        raise DataError(
            f"the libraries alone need about {describe_bytes(needed)} of address space, and ulimit -v allows "
            f"{describe_bytes(limit.total)}; raise it ({describe_bytes(2 * needed)} leave room for small data), or "
            "limit memory by a cgroup, which counts what is used."
        )
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if computes:
        import scipy.linalg  # noqa: F401


def count_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- after a failure --------------------------------------------------------------------------------------

#: What to reduce where memory ran out, by the beginning of a module's name; the longest that fits is taken. Parts bring
#: their own.
_REDUCE = {
    "": "the number of subjects (--subject), trials or images",
    "datasets": "dataset.subjects, the time window, channels or regions, or set dataset.dtype=float16",
    "preprocessing": "dataset.subjects, the time window, channels or regions, or set dataset.dtype=float16",
    "embeddings": "target.batch_size or the size of its images",
    "encoders": "dataset.subjects or encoder.n_features, choose features (selection.*), or set repeats.train=averaged",
    "training": "encoder.batch_size, encoder.max_device_bytes or the width of the network",
    "scoring.retrieval": "the number of queries or of gallery images",
    "generation.priors": "prior.batch_size or reconstruction.n_draws",
    "generation": "generator.batch_size, reconstruction.n_draws or the size of the images",
    "pipeline.reconstruction": "reconstruction.n_draws, the number of test images or their size",
    "scoring": "evaluation.n_bootstrap, evaluation.n_permutations or reconstruction.n_draws",
    "scoring.metrics": "evaluation.networks.batch_size, evaluation.n_bootstrap or reconstruction.n_draws",
}  # fmt: skip
_SETTING = re.compile(
    r"\b(dataset|encoder|target|generator|prior|reconstruction|evaluation|selection|repeats)\.[a-z*]"
)
_NO_THREAD = ("can't start new thread", "launch worker thread", "thread constructor failed", "pthread_create")
_NO_MAPPING = (
    "failed to map segment",
    "cannot allocate memory",
    "cannot enable executable stack",
    "static TLS",
)


def name_options(sentence: str, options: Collection[str]) -> str:
    """Return advice on memory without the options that the verb of the command does not have.

    Parameters
    ----------
    sentence
        Of a `TooLargeError`, a `MemoryWarning` or `describe_out_of_memory`; it ends with a full stop.
    options
        Of the verb, such as ``--subject``.

    Examples
    --------
    >>> name_options("reduce the subjects (--subject), or choose voxels (selection.*).", {"--refit"})
    'reduce the subjects, or choose voxels (selection.*); these are settings of the run: make it again with others.'
    >>> name_options("reduce --size, --subjects or --concepts.", {"--size", "--subjects"})
    'reduce --size or --subjects.'
    """

    def keep(found: re.Match[str]) -> str:
        kept = [option for option in re.findall(r"--[a-z-]+", found[0]) if option in options]
        if found[0].startswith(" ("):
            return found[0] if kept else ""
        return " or ".join(filter(None, [", ".join(kept[:-1]), *kept[-1:]])) or "the size of the data"

    said = re.sub(r" \(--[a-z-]+\)|--[a-z-]+(?:(?:, | or )--[a-z-]+)*", keep, sentence)
    if "--set" not in options and _SETTING.search(said):
        said = f"{said.removesuffix('.')}; these are settings of the run: make it again with others."
    return said


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that something did not fit into memory, on the CPU or a GPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    torch = sys.modules.get("torch")  # without it, none of its errors
    if torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ())):
        return True
    # What older allocators of the CPU and cuDNN raise instead of a class of their own.
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words)


def describe_out_of_memory(error: BaseException, *, resumes: bool = True) -> str:
    """Return one sentence about memory that ran out: where, how much was requested, the limit, what to reduce.

    Parameters
    ----------
    error
        The error; its traceback shows the step. The objects in its frames are released.
    resumes
        Whether the command continues from its finished work when it is run again.

    Returns
    -------
    sentence
        Empty for an error of another kind.
    """
    words = " ".join(str(error).split())
    lower = words.lower()
    loading = isinstance(error, ImportError) and any(part.lower() in lower for part in _NO_MAPPING)
    threads = any(part in lower for part in _NO_THREAD) or (
        isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN
    )
    if not (loading or threads or is_out_of_memory(error)):
        return ""
    module = _find_module(error.__traceback__)
    limit = find_memory()  # before the frames are let go: this is what the step was left with
    traceback.clear_frames(error.__traceback__)
    known = {f"braindecode_vis.{key}".rstrip("."): text for key, text in _REDUCE.items()}
    known |= {
        f"{part.package}.{key}".rstrip("."): text
        for part in find_parts()
        for key, text in part.reduce.items()
    }
    reduce = known[max((key for key in known if module.startswith(key)), key=len, default="braindecode_vis")]
    gpu = "cuda" in lower or "hip out of memory" in lower
    bound = "" if limit is None or gpu else f"; {limit.describe()}"
    remedy = "" if limit is None or gpu else f", or {limit.remedy}"
    if loading:
        return (
            f"no memory is left to load a library ({words}){bound}: {limit.remedy if limit else 'free some'}."
        )
    if threads:
        return (
            f"no thread could be started ({words}){bound}: raise ulimit -u and ulimit -v, or set OMP_NUM_THREADS=1 to "
            "use fewer."
        )
    asked = _find_asked(words)
    where = "the memory of the GPU" if gpu else "memory"
    more = f" ({asked} more were asked for)" if asked else ""
    place = module.removeprefix("braindecode_vis.") or "the command"
    ran_out = f"{where} ran out in {place}{more}{bound}"
    return f"{ran_out}; reduce {reduce}{remedy}{'; finished work is kept' if resumes else ''}."


def _find_module(trace: TracebackType | None) -> str:
    """Return the innermost module of the package, or of a part from outside, in a traceback."""
    packages, found = ("braindecode_vis", *(part.package for part in find_parts())), ""
    for frame, _ in traceback.walk_tb(trace):
        name = str(frame.f_globals.get("__name__", ""))
        # Where bytes are read and written, the step is the one that asked for it.
        below = name.startswith(("braindecode_vis.cli", "braindecode_vis.base."))
        if name.startswith(tuple(f"{package}." for package in packages)) and not below:
            found = name
    return found


def _find_asked(words: str) -> str:
    """Return the size in an allocator's message, in the units of this package; empty if there is none.

    Examples
    --------
    >>> _find_asked("Unable to allocate 7.28 GiB for an array with shape (31250, 31250)")
    '7.8 GB'
    """
    found = re.search(r"(?:allocate|allocating|malloc of size) (\d+(?:\.\d*)?) ?([KMGTP]?i?B|bytes)?", words)
    if found is None:
        return ""
    unit = found[2] or "bytes"
    power = 0 if unit in ("bytes", "B") else " KMGTP".index(unit[0])
    return describe_bytes(float(found[1]) * 1024**power)


# --- what a step took ---------------------------------------------------------------------------------------


@contextmanager
def profile_step() -> Iterator[dict[str, float]]:
    """Yield a mapping that is filled at the end of the block with what it used.

    ``seconds`` and ``cpu_seconds`` (of all threads and of processes that have ended) on every system; where the system
    reports it, ``peak_memory_bytes``, the largest memory of the process since it began, with ``peak_is_earlier`` if the
    peak was before the block, and ``read_bytes`` and ``written_bytes`` of files and pipes, also from the disk cache,
    without memory maps.
    """
    taken: dict[str, float] = {}
    before, started, peak = _count_use(), time.perf_counter(), _find_peak()
    yield taken
    taken["seconds"] = round(time.perf_counter() - started, 3)
    after = _count_use()
    taken |= {name: round(after[name] - value, 3) for name, value in before.items() if name in after}
    if (highest := _find_peak()) is not None and peak is not None:
        taken |= {"peak_memory_bytes": highest, "peak_is_earlier": highest == peak}


def _count_use() -> dict[str, float]:
    found: dict[str, float] = {"cpu_seconds": sum(os.times()[:4])}
    counts = dict(re.findall(r"^(\w+): (\d+)$", _read_text(Path("/proc/self/io")), re.MULTILINE))
    for name, key in (("read_bytes", "rchar"), ("written_bytes", "wchar")):
        if key in counts:
            found[name] = int(counts[key])
    return found


def _find_peak(*, of_children: bool = False) -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    whose = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_kill(requested: str = "") -> str:
    """Say what may have killed a process that this one started (signal 9), with the memory that it used.

    The system does not say who sends signal 9, so that both causes are named; the peak is that of the largest process
    that this one started and that has ended.

    Parameters
    ----------
    requested
        Memory that a scheduler gave, in words.
    """
    peak, limit = _find_peak(of_children=True), find_memory()
    known = [
        f"it used up to {describe_bytes(peak)}" if peak else "",
        requested,
        "" if limit is None else f"{describe_bytes(limit.total)} are the limit here ({limit.name})",
    ]
    return (
        "it was killed (signal 9), by somebody (kill -9, a scheduler) or by the system because memory ran out; "
        + ", ".join(part for part in known if part)
    )


#: Headings of `describe_profile`.
PROFILE = ("wall time", "processor time", "peak memory", "read", "written")


def describe_profile(taken: Mapping[str, Any]) -> list[str]:
    """Return the result of `profile_step` as text, in the order of `PROFILE`; empty if a value is not known.

    Examples
    --------
    >>> describe_profile({"seconds": 2.5, "cpu_seconds": 4.0, "peak_memory_bytes": 2e9, "peak_is_earlier": True})
    ['2.5 s', '4.0 s', 'below 2.0 GB', '', '']
    """
    times = [f"{taken[name]:,.1f} s" if name in taken else "" for name in ("seconds", "cpu_seconds")]
    sizes = [
        describe_bytes(taken[name]) if name in taken else ""
        for name in ("peak_memory_bytes", "read_bytes", "written_bytes")
    ]
    # The memory of a process only tells its highest peak, which an earlier stage may have set.
    sizes[0] = f"below {sizes[0]}" if taken.get("peak_is_earlier") else sizes[0]
    return [*times, *sizes]
