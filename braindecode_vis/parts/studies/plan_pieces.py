"""Measures pieces of a run that grow, and extrapolates time, memory and disk from them to a step of the real size."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import BraindecodeVisError

#: Seconds that one piece may take, about.
BUDGET_S = 20.0
#: A piece as large as the real one is off by this factor on a shared machine (benchmarks/scale_growth.py): one below a
#: second, where first calls and other work weigh most, and a longer one. Each doubling of what is extrapolated adds to
#: it, up to a factor of two: numbers that grow in proportion stay in proportion.
SURE_IF_SHORT, SURE, EACH_DOUBLING, LARGEST_FACTOR = 1.8, 1.4, 1.06, 2.0
#: Part of a fit that is measured at least, as its power is not known from smaller ones, and times the budget that this
#: may take.
SURE_PART, LONGER = 0.5, 3.0
#: Pictures of a piece; the first piece of fMRI has half as many trials.
TRIALS_OF_A_PIECE = 64
#: Trials of the smallest batches of a training that are measured, and by how many times the next are larger. A training
#: whose real batches take longer than the budget is measured in smaller ones.
SMALLEST_BATCH, _LARGER = 4, 4
#: Name of what a command takes beside its stages.
START = "start"


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Parameters
    ----------
    name
        Stage.
    seconds, low, high
        Estimate and its range; None if it could not be measured.
    cpu_seconds
        Processor time of all threads.
    memory, disk
        Bytes at the peak, and on the disk once it is done.
    how
        What was measured, and by how many times that was extrapolated; or why there is no estimate.
    on_gpu
        Whether it was measured on a GPU.
    """

    name: str
    seconds: float | None
    low: float | None = None
    high: float | None = None
    cpu_seconds: float | None = None
    memory: float | None = None
    disk: float | None = None
    how: str = ""
    on_gpu: bool = False


@dataclass
class PieceCost:
    """What one piece took.

    Parameters
    ----------
    size
        In trials, pictures or shares of the whole.
    seconds, cpu_seconds
        Wall time, and processor time of all threads.
    memory, held, disk
        Bytes at the peak beyond those that the process held before, these, and bytes written.
    before
        Processor seconds that a training took before its epochs, which are not among the others.
    spent
        Processor seconds of measuring it, if more than its own.
    predicted
        What the fitted encoder took to predict some trials.
    """

    size: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    before: float = 0.0
    held: float = 0.0
    spent: float = field(default=0.0, compare=False)
    predicted: PieceCost | None = None

    def count_spent(self) -> float:
        """Return what measuring it took, without waiting for other programs, which would end the measuring early."""
        return self.spent or min(self.seconds, self.cpu_seconds or self.seconds)


class Marks:
    """When a training showed its progress, so that an epoch is distinguished from what comes before."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self, done: int, total: int, text: str) -> None:
        """Note the time of one step of progress; a total of 0 is a message."""
        if total:
            self.times.append((time.perf_counter(), time.process_time()))

    def split(self, piece: PieceCost) -> PieceCost:
        """Return what the second of two epochs took, and what the whole took before both."""
        steps = [(0.0, 0.0), (piece.seconds / 2, piece.cpu_seconds / 2)]  # where no progress was shown
        if len(self.times) > 1:
            steps = [self.times[len(self.times) // 2 - 1], self.times[-1]]
        seconds, cpu = (after - before for before, after in zip(*steps, strict=True))
        spent = piece.count_spent()
        before = max(0.0, spent - 2 * min(seconds, cpu or seconds))
        return replace(piece, seconds=seconds, cpu_seconds=cpu, before=before, spent=spent)


@contextmanager
def measure(size: float) -> Iterator[PieceCost]:
    """Yield a piece that is filled with what the block took."""
    piece = PieceCost(size)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    piece.held, cpu, started = read_memory("VmRSS"), time.process_time(), time.perf_counter()
    yield piece
    piece.seconds, piece.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    piece.memory = max(0.0, read_memory("VmHWM") - piece.held)


def read_memory(name: str) -> float:
    """Return a line of the memory of this process in bytes; 0 where the system does not report it."""
    with suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024.0 * int(found[1]) if found else 0.0
    return 0.0


def grow(
    sizes: Sequence[float], run: Callable[[Any], PieceCost], budget: float, *, power: float = 1.0,
    wanted: float = 0.0, tell: Callable[[str], None] = lambda words: None,
) -> list[PieceCost]:  # fmt: skip
    """Run pieces of growing size, the time of which grows by a power, while the next one should fit; at least two.

    Up to the `wanted` size, pieces may take a few times the budget, which is announced. First pieces that are too small
    to be run are left out.

    Raises
    ------
    BraindecodeVisError
        If none could be run.
    """
    pieces: list[PieceCost] = []
    for number, size in enumerate(sizes):
        if len(pieces) > 1:
            small, large = pieces[-2:]
            before, last = small.count_spent(), large.count_spent()
            larger, enough = size / large.size, large.size >= wanted
            spent = sum(piece.count_spent() for piece in pieces)
            if spent + last * larger**power > (budget if enough else LONGER * budget):
                break
            # Small pieces are mostly fixed costs; a power that was seen foretells the next one better than the largest.
            grown = math.log(max(last, 1e-6) / max(before, 1e-6)) / math.log(large.size / small.size)
            next_one = last * larger ** min(power, max(power - 1, grown))
            if next_one > budget / 4:
                tell(f"measuring a larger piece, about {next_one:.0f} s")
        try:
            pieces.append(run(size))
        except BraindecodeVisError:
            if pieces or number == len(sizes) - 1:
                raise
    return pieces


def extrapolate(
    pieces: Sequence[PieceCost], name: str, size: float, *, power: float | None = None,
    beside: Callable[[float], float] | None = None,
) -> float:  # fmt: skip
    """Return a number of the pieces at another size: the sum of a constant and of parts that grow, as in all pieces.

    The largest piece, which errs least, is met exactly.

    Parameters
    ----------
    pieces
        Of growing size.
    name
        ``seconds``, ``cpu_seconds``, ``memory`` or ``disk``.
    size
        Of the real one.
    power
        One part grows by this power, one by the power below it; None is one part in proportion.
    beside
        Work of a size that another part follows.

    Examples
    --------
    >>> round(extrapolate([PieceCost(10, 3.0), PieceCost(20, 5.0)], "seconds", 100), 3)
    21.0
    >>> round(extrapolate([PieceCost(0.25, 1.0), PieceCost(0.5, 8.0)], "seconds", 1.0, power=3))
    64
    >>> pieces = [PieceCost(n, 2.0 + n + 0.1 * n**2) for n in (3, 8, 24)]
    >>> round(extrapolate(pieces, "seconds", 100, beside=lambda n: min(n, 50) ** 2))
    352
    """
    from scipy.optimize import nnls

    powers = (1.0,) if power is None else (power - 1, power)
    last, value = pieces[-1].size, float(getattr(pieces[-1], name))

    def count(n: float) -> list[float]:
        return [
            float(len(pieces) > 1),
            *(n**each for each in powers),
            *([] if beside is None else [beside(n)]),
        ]

    values = np.array([max(getattr(piece, name), 1e-3 * value, 1e-12) for piece in pieces])
    # Errors are shares of each value.
    terms = np.array([count(piece.size) for piece in pieces]) / values[:, None]
    scale = np.where((largest := terms.max(axis=0)) > 0, largest, 1.0)
    weights = nnls(terms / scale, np.ones(len(values)))[0] / scale
    return value * float(weights @ count(size)) / float(weights @ count(last))


def find_factor(ratio: float, seconds: float) -> float:
    """Return by how much a time may be off that was extrapolated so many times from one that was measured."""
    sure = SURE if seconds >= 1 else SURE_IF_SHORT
    return min(LARGEST_FACTOR, sure * EACH_DOUBLING ** math.log2(max(1.0, ratio)))


def make_step(
    name: str, pieces: Sequence[PieceCost], size: float, what: str, *, times: float = 1.0, power: float | None = None,
    more: float = 0.0, in_batches: bool = False, on_gpu: bool = False,
    beside: Callable[[float], float] | None = None,
) -> Step:  # fmt: skip
    """Return a step of `times` equal parts of a size; `more` are bytes of memory held beside.

    What works in batches needs no more memory for more of them.
    """
    last = pieces[-1].size
    seconds = times * extrapolate(pieces, "seconds", size, power=power, beside=beside)
    ratio = seconds / pieces[-1].seconds if pieces[-1].seconds > 0 else size / last * times
    factor = find_factor(ratio, pieces[-1].seconds)
    told = "as large as the real one" if times * size <= last else f"its time extrapolated {ratio:.3g} times"
    low, high = seconds / factor, seconds * factor
    if power is not None and size > last:
        # Which of the two powers a fit of the real size grows by is not known from smaller ones.
        bounds = [times * pieces[-1].seconds * (size / last) ** each for each in (power - 1, power)]
        sure = find_factor(1.0, pieces[-1].seconds)
        low, high = min(seconds, bounds[0]) / sure, bounds[1] * sure
    return Step(
        name, seconds, low, high,
        times * extrapolate(pieces, "cpu_seconds", size, power=power, beside=beside),
        more + (
            pieces[-1].memory if in_batches
            else extrapolate(pieces, "memory", size, power=power and min(power, 2.0))
        ),
        times * extrapolate(pieces, "disk", size, power=None if power is None else 2.0),
        f"measured {what}, {told}", on_gpu,
    )  # fmt: skip


def measure_training(
    fit: Callable[[int], PieceCost], batch: int, n: int, budget: float
) -> tuple[list[PieceCost], PieceCost]:
    """Measure an epoch of a few trials, then of more while it fits the budget; at least two, if there are so many.

    Parameters
    ----------
    fit
        Trains two epochs of some trials, in batches of at most `batch`, and returns a piece of `Marks.split`.
    batch, n
        Trials of a batch and of an epoch of the real training.
    budget
        Seconds that all together may take, about.

    Returns
    -------
    pieces
        Of growing size.
    epoch
        What an epoch of `n` trials takes. A batch that is larger than those which were measured costs a constant and a
        part in proportion to its trials.

    Raises
    ------
    BraindecodeVisError
        If none could be trained; an objective may need more trials than the first ones.
    """
    batch = min(batch, n)
    small = [few for k in range(20) if (few := SMALLEST_BATCH * _LARGER**k) < batch]
    sizes = [*small, *(k * batch for k in (1, 2, 4, 8, 16, 32) if k == 1 or k * batch <= n)]
    pieces = grow(sizes, fit, budget)
    whole = [piece for piece in pieces if piece.size >= batch]
    known, size = (whole[-2:], float(n)) if whole else (pieces[-2:], float(batch))
    times = n / size
    return pieces, PieceCost(
        n, times * extrapolate(known, "seconds", size), times * extrapolate(known, "cpu_seconds", size),
        # Batches need the same memory however many there are.
        max(piece.memory for piece in whole) if whole else extrapolate(known, "memory", size), pieces[-1].disk,
    )  # fmt: skip


def describe_batches(pieces: Sequence[PieceCost], batch: int, ratio: float) -> str:
    """Return in words which epoch of a training was measured, and by how many times it was extrapolated."""
    last = pieces[-1].size
    real = "" if last >= batch else f", smaller than those of {batch}"
    measured = f"measured an epoch of {last:.0f} trials in batches of {min(last, batch):.0f}"
    return f"{measured}{real}, extrapolated {ratio:.3g} times"


def add_pieces(step: Step, piece: PieceCost, times: float) -> Step:
    """Return a step that also takes so many times what a piece took."""
    more, factor = times * piece.seconds, find_factor(times, piece.seconds)
    seconds, low, high = (value or 0.0 for value in (step.seconds, step.low, step.high))
    return replace(
        step, seconds=seconds + more, low=low + more / factor, high=high + more * factor,
        cpu_seconds=(step.cpu_seconds or 0.0) + times * piece.cpu_seconds,
    )  # fmt: skip


def uses_gpu() -> bool:
    """Return whether networks run on a GPU here."""
    from braindecode_vis.base.devices import choose_device

    return choose_device("auto", setting="device") == "cuda"
