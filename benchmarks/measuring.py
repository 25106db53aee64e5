"""How benchmarks measure: pairs of runs that alternate within one process, and peak memory in processes of their own.

A `Row` declares one task that we and peers do on the same input, a `Growth` one of our steps against the size of what
it is given. Neither knows how it is measured. Time is processor time, of threads and of children, so that what else
runs on the machine disturbs it less; since the runs of a pair follow each other, their ratio bears what is left.
Memory is what resident memory rises to beyond what the process held once its input was made; on Linux the mark is
reset before, elsewhere it is that of the whole process, and too low where making the input took more.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

OURS = "ours"
#: How the package of a module is called where it is installed from.
PACKAGES = {"faiss": "faiss-cpu", "skimage": "scikit-image", "sklearn": "scikit-learn"}
#: Whose versions stand beside a table.
VERSIONS = (
    "numpy", "scipy", "torch", "scikit-learn", "himalaya", "faiss-cpu", "torchmetrics", "scikit-image", "torchvision",
    "open_clip_torch", "mne", "nilearn", "nibabel",
)  # fmt: skip
SHORTEST = 0.03  # s; what is quicker is called several times in a row


def put_section(page: str, section: str, name: str) -> str:
    """Return a page with the section that the benchmark of this name writes, in the place of an earlier one or last."""
    begin, end = f"<!-- begin of benchmarks/{name} -->", f"<!-- end of benchmarks/{name} -->"
    whole = f"{begin}\n{section.strip()}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{whole}\n"
    before, rest = page.split(begin, 1)
    return before + whole + rest.split(end, 1)[1]


def carry_sections(old: str, new: str) -> str:
    """Return a page with the sections of other benchmarks that the page it replaces has."""
    for name in re.findall(r"<!-- begin of benchmarks/(.*?) -->", old):
        part = old.split(f"<!-- begin of benchmarks/{name} -->", 1)[1]
        new = put_section(new, part.split(f"<!-- end of benchmarks/{name} -->", 1)[0], name)
    return new


def compare_arrays(ours: Any, theirs: Any) -> float:
    """Return the largest difference as a share of the largest value of the peer."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@dataclass(frozen=True)
class Work:
    """One task at one size, with its input at hand.

    Parameters
    ----------
    ours
        Does it and returns the result.
    peers
        By name, what imports the peer and returns its counterpart of `ours`.
    compare
        Difference of two results, ours first; words where numbers would mislead.
    """

    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Callable[[], Any]]]
    compare: Callable[[Any, Any], float | str] = compare_arrays

    def build(self, name: str) -> Callable[[], Any]:
        """Return what does the task, ours or a peer's."""
        return self.ours if name == OURS else self.peers[name]()


@dataclass(frozen=True)
class Row:
    """One task beside its peers.

    Parameters
    ----------
    name, title
        For the command line, and for the table.
    make
        Given a folder and a size, returns the `Work`.
    size
        How a size is told, a format string of its names.
    tiny, quick, full, large
        Sizes: for the test, for `--quick`, for the whole table, and for `--large`.
    tolerance
        Largest difference that counts as the same work.
    aside
        By name, peers that do another work, and which; they stand in the table for information.
    words
        What the ratio comes from, where it alone would mislead.
    """

    name: str
    title: str
    make: Callable[..., Work]
    size: str
    tiny: dict[str, Any]
    quick: tuple[dict[str, Any], ...]
    full: tuple[dict[str, Any], ...]
    large: tuple[dict[str, Any], ...] = ()
    tolerance: float = 1e-5
    aside: Mapping[str, str] = field(default_factory=dict)
    words: str = ""


@dataclass(frozen=True)
class Growth:
    """One of our steps against the size of its input.

    Parameters
    ----------
    name, title
        For the command line, and for the table.
    make
        Given a folder and a number, returns what is measured.
    tiny, quick, full
        Numbers: for the test (one of them), for `--quick`, and for the whole table.
    seconds, memory
        Largest exponent that is meant, None where none is.
    words
        What the powers come from, where they alone would mislead.
    """

    name: str
    title: str
    make: Callable[[Path, int], Callable[[], Any]]
    tiny: int
    quick: tuple[int, ...]
    full: tuple[int, ...]
    seconds: float | None = None
    memory: float | None = None
    words: str = ""


@dataclass
class Pairs:
    """What was measured of ours and one peer.

    Parameters
    ----------
    ratios
        Processor time of ours as a share of the peer's, pair by pair.
    seconds, peaks
        Median processor time (s) and peak memory (MB), ours first; peaks are None where they were not measured.
    difference
        Of the results; words where numbers would mislead.
    failure
        Why there is nothing else.
    """

    row: Row
    size: str
    peer: str
    ratios: list[float] = field(default_factory=list)
    seconds: tuple[float, float] = (math.nan, math.nan)
    peaks: tuple[float | None, float | None] = (None, None)
    difference: float | str = math.nan
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Median ratio; below 1 ours is quicker."""
        return float(np.median(self.ratios)) if self.ratios else math.nan

    @property
    def is_lost(self) -> bool:
        """Whether a peer that does the same takes less, as far as two digits tell."""
        return round(self.ratio, 2) > 1 and self.peer not in self.row.aside

    @property
    def is_same(self) -> bool:
        """Whether both did the same work."""
        return isinstance(self.difference, str) or self.difference <= self.row.tolerance


# --- one process for each measurement ---------------------------------------------------------------------


def call_in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a process that ends with it."""
    # A forked process has the libraries already; elsewhere than on Linux that is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def read_clock() -> float:
    """Return the processor time of this process, its threads and its finished children (s)."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure_peak(act: Callable[[], Any]) -> float:
    """Return by how much resident memory rises while something is done (MB)."""
    gc.collect()
    with suppress(OSError, AttributeError):  # pages that were freed would be used again without being seen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest is set to what is held now
        base = _read_status("VmRSS")
        act()
        return (_read_status("VmHWM") - base) / 1024
    except OSError:
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        act()
        risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        return risen / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _read_status(name: str) -> int:
    """Return a number of the status of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


# --- pairs ------------------------------------------------------------------------------------------------


def measure_row(
    row: Row, size: dict[str, Any], *, budget: float, peaks: bool = True, only: Sequence[str] | None = None
) -> list[Pairs]:
    """Measure a row at one size beside every peer.

    Parameters
    ----------
    row, size
        What, and how large.
    budget
        Seconds that the pairs of all peers should take together; three pairs are made whatever they take.
    peaks
        Also measure memory, each contender in a process of its own.
    only
        Names of the peers to measure; None measures all.
    """
    told = row.size.format(**size)
    try:
        measured = call_in_child(time_pairs, row, size, budget, only)
        own = call_in_child(find_peak, row, size, OURS) if peaks else None
        for pairs in measured:
            if peaks and not pairs.failure:
                pairs.peaks = (own, call_in_child(find_peak, row, size, pairs.peer))
    except Exception as error:  # the other rows are worth having
        return [Pairs(row, told, "", failure=f"failed: {type(error).__name__}: {error}")]
    return measured


def time_pairs(
    row: Row, size: dict[str, Any], budget: float, only: Sequence[str] | None = None
) -> list[Pairs]:
    """Let ours and the peers take turns in this process."""
    warnings.simplefilter("ignore")  # peers advise and deprecate
    told, measured = row.size.format(**size), []
    with tempfile.TemporaryDirectory() as folder:
        work = row.make(Path(folder), **size)
        acts: dict[str, Callable[[], Any]] = {OURS: work.ours}
        for peer in work.peers if only is None else [name for name in work.peers if name in only]:
            try:
                acts[peer] = work.build(peer)
                measured.append(Pairs(row, told, peer))
            except ModuleNotFoundError as error:
                name = str(error.name).partition(".")[0]
                missing = f"not installed: pip install {PACKAGES.get(name, name)}"
                measured.append(Pairs(row, told, peer, failure=missing))
        first, results = {}, {}
        for name, act in acts.items():  # pays for fresh memory, and gives what is compared
            start = read_clock()
            results[name] = act()
            first[name] = read_clock() - start
        for pairs in measured:
            if not pairs.failure:
                pairs.difference = work.compare(results[OURS], results[pairs.peer])
        del results
        times: dict[str, list[float]] = {name: [] for name in acts}
        n_rounds = int(np.clip(budget / max(sum(first.values()), 1e-3), 3, 15))
        if sum(first.values()) > budget:  # fresh memory is nothing beside so long a call
            times, n_rounds = {name: [seconds] for name, seconds in first.items()}, 2
        for number in range(n_rounds):
            # The order turns, so that nobody always comes after the same one.
            for name in list(acts)[:: -1 if number % 2 == 0 else 1]:
                n_calls = max(1, math.ceil(SHORTEST / max(first[name], 1e-6)))
                start = read_clock()
                for _ in range(n_calls):
                    acts[name]()
                times[name].append((read_clock() - start) / n_calls)
    for pairs in measured:
        if not pairs.failure:
            ours, theirs = np.array(times[OURS]), np.array(times[pairs.peer])
            pairs.ratios = (ours / theirs).tolist()
            pairs.seconds = (float(np.median(ours)), float(np.median(theirs)))
    return measured


def find_peak(row: Row, size: dict[str, Any], name: str) -> float:
    """Return how much memory a contender takes beyond the input, in a process that has loaded its libraries."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny").mkdir()
        kinds = {key: value for key, value in size.items() if isinstance(value, str)}
        row.make(Path(folder) / "tiny", **{**row.tiny, **kinds}).build(name)()
        work = row.make(Path(folder), **size)
        return measure_peak(lambda: work.build(name)())


# --- growth -----------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Seconds (s) and peak memory (MB) at several sizes, medians over processes."""

    growth: Growth
    sizes: tuple[int, ...]
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    failure: str = ""


def measure_growth(growth: Growth, sizes: tuple[int, ...], *, repeats: int = 3) -> Curve:
    """Measure a step at several sizes, each time in a fresh process."""
    curve = Curve(growth, sizes)
    try:
        for size in sizes:
            found = [call_in_child(run_step, growth, size) for _ in range(repeats)]
            seconds, peak = np.median(found, axis=0)
            curve.seconds.append(float(seconds))
            curve.peaks.append(float(peak))
    except Exception as error:
        curve.failure = f"failed: {type(error).__name__}: {error}"
    return curve


def run_step(growth: Growth, size: int) -> tuple[float, float]:
    """Return seconds and MB of one call, after a tiny one that loads the libraries."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny").mkdir()
        growth.make(Path(folder) / "tiny", growth.tiny)()
        act, spent = growth.make(Path(folder), size), []

        def timed() -> None:
            start = read_clock()
            act()
            spent.append(read_clock() - start)

        peak = measure_peak(timed)
    return spent[0], peak


def fit_exponent(sizes: Any, values: Any) -> tuple[float, float]:
    """Return the exponent of a power law and its standard error, by least squares on logarithms.

    Examples
    --------
    >>> fit_exponent([1, 2, 4, 8], [3, 6, 12, 24])
    (1.0, 0.0)
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    error = math.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x))
    return round(float(slope), 6), round(error, 6)


def describe_machine() -> str:
    """Return processor, cores, memory, system and versions in a sentence each."""
    model, memory = platform.processor() or platform.machine(), math.nan
    with suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            model = found[1].strip()
        memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    cores = f"{os.cpu_count()} cores"
    if hasattr(os, "sched_getaffinity") and (own := len(os.sched_getaffinity(0))) != os.cpu_count():
        cores = f"{own} of {cores}"
    versions = []
    for package in VERSIONS:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    load = f"; load when it ended {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"Measured on {model}, {cores}, {memory:.0f} GB of memory, {platform.system()}, one thread{load}. Python "
        f"{platform.python_version()}, {', '.join(versions)}."
    )
