"""Estimates time, memory, disk and GPU hours of a run or a sweep, from small pieces that are measured on this machine.

Sizes come from the data where they are there (trial tables and headers; samples of one piece alone are read), and
otherwise from what the manifest says was published. Then three pieces run on this machine: the start of the data
through preprocessing (and what it takes beside its trials: opening all files, noise ceilings), a tiny run of random
pictures of the real size through every stage but the encoder, and fits of the encoder on random trials of the real
shape. Times grow with what drives them: images, trials and epochs in proportion, a fit without epochs by the power that
smaller copies of the same proportions show. What was measured and what was extrapolated, by how many times, is reported
of each step.

Nothing has to be here for an estimate. Without the data, a small phantom of their format goes through preprocessing;
without the weights of an image network, the same network with random weights takes the same time.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError
from braindecode_vis.base.contracts import (
    BrainEncoder,
    Context,
    EncoderSettings,
    ImageEncoderSettings,
    NetworkSettings,
)
from braindecode_vis.base.stimuli import StimulusSet, find_comparison_size
from braindecode_vis.config import RunConfig, list_weights, validate_config
from braindecode_vis.datasets.manifests import find_manifest
from braindecode_vis.embeddings.pixels import PixelsConfig
from braindecode_vis.parts.studies.run_sizes import (
    RunSizes,
    find_sizes,
    list_trials,
    measure_folder,
    open_source,
)
from braindecode_vis.pipeline import STAGES
from braindecode_vis.pipeline.runs import SilentListener

#: Seconds that one piece may take, about.
BUDGET_S = 20.0
#: A piece as large as the real one is off by this factor on a shared machine (benchmarks/scale_growth.py): one below a
#: second, where first calls and other work weigh most, and a longer one. Each doubling of what is extrapolated adds to
#: it, up to a factor of two: numbers that grow in proportion stay in proportion.
SURE_IF_SHORT, SURE, EACH_DOUBLING, LARGEST_FACTOR = 1.8, 1.4, 1.06, 2.0
#: Part of a fit that is measured at least, as its power is not known from smaller ones, and times the budget that this
#: may take.
SURE_PART, LONGER = 0.5, 3.0
#: Largest number of different settings of a sweep of which each is measured.
MAX_MEASURED = 4
_TRIALS_OF_A_PIECE = 64
#: Random trials whose noise ceilings and averages are measured, in bytes.
_PIECE_BYTES = 32 << 20
#: Pictures of training and of test that are measured first.
FIRST_PICTURES = (3, 2)
#: Trials of the smallest batches of a training that are measured, and by how many times the next are larger. A training
#: whose real batches take longer than the budget is measured in smaller ones.
_SMALLEST_BATCH, _LARGER = 4, 4
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


@dataclass(frozen=True)
class RunPlan:
    """The steps of one run, and the sizes that they were estimated for."""

    sizes: RunSizes
    steps: Sequence[Step]

    def total(self, name: str) -> float | None:
        """Return the sum over steps of a number, None if no step has it; of `memory` the largest."""
        known = [value for step in self.steps if (value := getattr(step, name)) is not None]
        return None if not known else float(max(known) if name == "memory" else sum(known))

    @property
    def unknown(self) -> list[str]:
        """Names of the steps without an estimate of time."""
        return [step.name for step in self.steps if step.seconds is None]


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass
class PieceCost:
    """What one piece took: seconds, processor seconds, bytes of memory beyond the process before, and bytes written."""

    size: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    before: float = 0.0  # seconds that a training took before its epochs, which are not among `seconds`


class _Marks:
    """When a training showed its progress, so that an epoch is told apart from what comes before."""

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
        return replace(piece, seconds=seconds, cpu_seconds=cpu, before=max(0.0, piece.seconds - 2 * seconds))


@contextmanager
def _measure(size: float) -> Iterator[PieceCost]:
    """Yield a piece that is filled with what the block took."""
    piece = PieceCost(size)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    held, cpu, started = _read_memory("VmRSS"), time.process_time(), time.perf_counter()
    yield piece
    piece.seconds, piece.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    piece.memory = max(0.0, _read_memory("VmHWM") - held)


def _read_memory(name: str) -> float:
    """Return a line of the memory of this process in bytes; 0 where the system does not report it."""
    with suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024.0 * int(found[1]) if found else 0.0
    return 0.0


def _count_seconds(piece: PieceCost) -> float:
    """Return the time of a piece without waiting for other programs, which would end the measuring too early."""
    return min(piece.seconds, piece.cpu_seconds or piece.seconds)


def _grow(
    sizes: Sequence[float], run: Callable[[float], PieceCost], budget: float, *, power: float = 1.0,
    wanted: float = 0.0, tell: Callable[[str], None] = lambda words: None,
) -> list[PieceCost]:  # fmt: skip
    """Run pieces of growing size, the time of which grows by a power, while the next one should fit; at least two.

    Up to the `wanted` size, pieces may take a few times the budget, which is announced.
    """
    pieces: list[PieceCost] = []
    for size in sizes:
        next_one = _count_seconds(pieces[-1]) * (size / pieces[-1].size) ** power if pieces else 0.0
        if len(pieces) > 1:
            enough = pieces[-1].size >= wanted
            if sum(map(_count_seconds, pieces)) + next_one > budget * (1.0 if enough else LONGER):
                break
            # Small pieces are mostly fixed costs; a power that was seen foretells the next one better than the largest.
            before, last = pieces[-2:]
            longer = max(_count_seconds(last), 1e-6) / max(_count_seconds(before), 1e-6)
            grown = math.log(longer) / math.log(last.size / before.size)
            next_one = _count_seconds(pieces[-1]) * (size / pieces[-1].size) ** min(
                power, max(power - 1, grown)
            )
            if next_one > budget / 4:
                tell(f"measuring a larger piece, about {next_one:.0f} s")
        pieces.append(run(size))
    return pieces


def extrapolate(
    pieces: Sequence[PieceCost], name: str, size: float, *, power: float | None = None,
    beside: Callable[[float], float] | None = None,
) -> float:  # fmt: skip
    """Return a number of the pieces at another size: in proportion beyond the last two, or by a power.

    Parameters
    ----------
    pieces
        Of growing size.
    name
        ``seconds``, ``cpu_seconds``, ``memory`` or ``disk``.
    size
        Of the real one.
    power
        Largest power that is believed, and one less the smallest; None grows in proportion.
    beside
        Work of a size that does not grow in proportion. With three pieces or more, the number is the sum of a constant,
        of a part in proportion, and of a part that follows this work.

    Examples
    --------
    >>> extrapolate([PieceCost(10, 3.0), PieceCost(20, 5.0)], "seconds", 100)
    21.0
    >>> round(extrapolate([PieceCost(0.25, 1.0), PieceCost(0.5, 8.0)], "seconds", 1.0, power=3))
    64
    >>> pieces = [PieceCost(n, 2.0 + n + 0.1 * n**2) for n in (3, 8, 24)]
    >>> round(extrapolate(pieces, "seconds", 100, beside=lambda n: min(n, 50) ** 2))
    352
    """
    last = pieces[-1]
    value = float(getattr(last, name))
    if beside is not None and len(pieces) > 2 and value > 0:
        from scipy.optimize import nnls

        terms = np.array([[1.0, piece.size, beside(piece.size)] for piece in pieces])
        values = np.array([max(getattr(piece, name), 1e-9) for piece in pieces])
        weights = nnls(terms / values[:, None], np.ones(len(values)))[0]  # errors are shares of each value
        return max(value if size > last.size else 0.0, float(weights @ (1.0, size, beside(size))))
    if len(pieces) == 1 or last.size == size:
        return value * (size / last.size if len(pieces) == 1 else 1.0)
    before = pieces[-2]
    earlier = float(getattr(before, name))
    if power is not None:
        found = power
        if value > 0 and earlier > 0:
            found = math.log(value / earlier) / math.log(last.size / before.size)
        # Small copies are mostly fixed costs, which would foretell too little of a large one.
        return value * (size / last.size) ** min(power, max(power - 1, found))
    slope = max(0.0, (value - earlier) / (last.size - before.size))
    return max(value if size > last.size else 0.0, value + slope * (size - last.size))


def _find_factor(ratio: float, seconds: float) -> float:
    """Return by how much a time may be off that was extrapolated so many times from one that was measured."""
    sure = SURE if seconds >= 1 else SURE_IF_SHORT
    return min(LARGEST_FACTOR, sure * EACH_DOUBLING ** math.log2(max(1.0, ratio)))


def _make_step(
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
    factor = _find_factor(ratio, pieces[-1].seconds)
    told = "as large as the real one" if times * size <= last else f"its time extrapolated {ratio:.3g} times"
    low, high = seconds / factor, seconds * factor
    if power is not None and size > last:
        # Which of the two powers a fit of the real size grows by is not known from smaller ones.
        bounds = [times * pieces[-1].seconds * (size / last) ** each for each in (power - 1, power)]
        sure = _find_factor(1.0, pieces[-1].seconds)
        low, high = bounds[0] / sure, bounds[1] * sure
        seconds = min(max(seconds, low), high)
    return Step(
        name, seconds, low, high,
        times * extrapolate(pieces, "cpu_seconds", size, power=power, beside=beside),
        more + (
            pieces[-1].memory if in_batches
            else extrapolate(pieces, "memory", size, power=None if power is None else min(power, 2.0))
        ),
        times * extrapolate(pieces, "disk", size, power=None if power is None else 2.0),
        f"measured {what}, {told}", on_gpu,
    )  # fmt: skip


def _measure_training(
    fit: Callable[[int], PieceCost], batch: int, n: int, budget: float
) -> tuple[list[PieceCost], PieceCost]:
    """Measure an epoch of a few trials, then of more while it fits the budget; at least two, if there are so many.

    Parameters
    ----------
    fit
        Trains two epochs of some trials, in batches of at most `batch`, and returns a piece of `_Marks.split`.
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
    small = [_SMALLEST_BATCH * _LARGER**k for k in range(20) if _SMALLEST_BATCH * _LARGER**k < batch]
    sizes = [*small, *(k * batch for k in (1, 2, 4, 8, 16, 32) if k == 1 or k * batch <= n)]
    pieces: list[PieceCost] = []
    spent = 0.0
    for size, larger in zip(sizes, [*sizes[1:], math.inf], strict=True):
        try:
            pieces.append(fit(size))
        except BraindecodeVisError:
            if larger == math.inf or pieces:
                raise
            continue
        last = pieces[-1]
        spent += last.before + 2 * last.seconds
        if len(pieces) > 1 and spent + last.before + 2 * last.seconds * larger / size > budget:
            break
    whole = [piece for piece in pieces if piece.size >= batch]
    known, size = (whole[-2:], float(n)) if whole else (pieces[-2:], float(batch))
    times = n / size
    return pieces, PieceCost(
        n, times * extrapolate(known, "seconds", size), times * extrapolate(known, "cpu_seconds", size),
        # Batches need the same memory however many there are.
        max(piece.memory for piece in whole) if whole else extrapolate(known, "memory", size), pieces[-1].disk,
    )  # fmt: skip


def _tell_batches(pieces: Sequence[PieceCost], batch: int, ratio: float) -> str:
    """Return in words which epoch of a training was measured, and by how many times it was extrapolated."""
    last = pieces[-1].size
    real = "" if last >= batch else f", smaller than those of {batch}"
    measured = f"measured an epoch of {last:.0f} trials in batches of {min(last, batch):.0f}"
    return f"{measured}{real}, extrapolated {ratio:.3g} times"


# --- a run --------------------------------------------------------------------------------------------------------


def plan_run(
    config: RunConfig, *, tell: Callable[[str], None] = lambda words: None, budget: float = BUDGET_S,
    every_subject: bool = False, started: PieceCost | None = None,
) -> RunPlan:  # fmt: skip
    """Return what a run will take.

    Parameters
    ----------
    config
        Its configuration.
    tell
        Called with words on what is measured.
    budget
        Seconds that each piece may take, about.
    every_subject
        As for `find_sizes`.
    started
        What this command took before, as the run will; None leaves out what a command takes beside its stages.

    Raises
    ------
    ConfigError
        If neither the data nor published sizes are there.
    """
    tell("looking at the data")
    with _measure(1.0) as opened:
        sizes, source = find_sizes(config, every_subject=every_subject)
    steps = [_plan_preprocess(config, sizes, source, tell, budget, opened)]
    if config.decodes_categories:
        return RunPlan(sizes, [*steps, _plan_fit(config, sizes, None, budget, tell)])
    config, left_out = _stand_in(config)
    tell(
        f"measuring pictures through embed, reconstruct, evaluate and report, {sum(FIRST_PICTURES)} pictures first"
    )
    later, dims, started_cost = _plan_pictures(config, sizes, budget, left_out)
    later = [_add_reading(one, config, sizes, source) if one.name == "embed" else one for one in later]
    fits = [_add_averaging(_plan_fit(config, sizes, dims, budget, tell), config, sizes)]
    if config.uses_pretraining:
        fits.insert(0, _plan_pretraining(config, sizes, budget, tell))
    ordered = sorted([*steps, *later, fits[-1]], key=lambda step: STAGES.index(step.name))
    place = next(n for n, step in enumerate(ordered) if step.name == "train")
    if config.run_analyses:
        ordered.append(
            Step(
                "analyze",
                None,
                how="analyses are not measured: each makes new fits; `analyze` reports their time",
            )
        )
    steps = [*ordered[:place], *fits[:-1], *ordered[place:]]
    if started_cost is not None and started is not None:
        cost = replace(
            started_cost,
            seconds=started_cost.seconds + started.seconds,
            cpu_seconds=started_cost.cpu_seconds + started.cpu_seconds,
        )
        steps = [
            _make_step(START, [cost], 1.0, "libraries, files of the run and checks of this command"),
            *steps,
        ]
    return RunPlan(sizes, steps)


def measure_start() -> PieceCost:
    """Return what this process took until now."""
    cost = PieceCost(1.0, time.process_time(), time.process_time())
    with suppress(OSError, ValueError, IndexError):  # where the system tells it
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        running = float(Path("/proc/uptime").read_text().split()[0])
        cost.seconds = running - ticks / os.sysconf("SC_CLK_TCK")
    return cost


def _stand_in(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the run with what can be measured without weights that are missing, and why images are left out.

    Image networks get random weights, which take the same time. A generator has no random ones: the nearest training
    image takes its place, and `reconstruct` has no estimate.
    """
    from braindecode_vis.embeddings.transformers_models import TransformersConfig
    from braindecode_vis.embeddings.vision_network import VisionNetworkConfig

    missing = []
    with suppress(ConfigError):  # a package is not installed, as the step that needs it says
        missing = [one for one in list_weights(config) if one.is_missing]
    if not missing:
        return config, ""
    content, known = config.model_dump(mode="json"), dict(config.walk())
    absent = []
    for one in missing:
        for setting in one.settings:
            key, _, name = setting.rpartition(".")
            # The sizes of a folder of transformers stand in the folder.
            if isinstance(known[key], VisionNetworkConfig) and not isinstance(known[key], TransformersConfig):
                place: Any = content
                for part in key.split("."):
                    place = place[int(part) if isinstance(place, list) else part]
                place[name] = "random"
            else:
                absent.append((key, one))
    images = [one for key, one in absent if key.partition(".")[0] in ("generator", "reconstruction", "prior")]
    if images:
        content |= {"generator": {"kind": "nearest"}}
        for name in ("prior", "reconstruction"):
            content.pop(name)
    try:
        return validate_config(content, where="the run with random weights"), ", ".join(
            dict.fromkeys(one.name or one.what for one in images)
        )
    except BraindecodeVisError:  # what needs its own weights is said by the step that does
        return config, ""


def _plan_preprocess(
    config: RunConfig, sizes: RunSizes, source: Any, tell: Callable[[str], None], budget: float = BUDGET_S,
    opened: PieceCost | None = None,
) -> Step:  # fmt: skip
    """Measure the first trials of the first part through preprocessing; `opened` is what opening all parts took."""
    kept_pictures = sizes.n_images * 3 * sizes.image_px**2 if getattr(source, "read_image", None) else 0
    disk = float(sizes.n_stored * math.prod(sizes.shape) * sizes.itemsize + kept_pictures)
    memory = _read_memory("VmRSS")
    if roles.find_source(config.dataset) == "write":
        with tempfile.TemporaryDirectory() as made, _measure(1.0) as piece:
            from braindecode_vis.pipeline.preparing import write_dataset

            write_dataset(config.dataset, Path(made), seed=config.seed, listener=SilentListener())
        piece.disk = disk
        return _make_step("preprocess", [piece], 1.0, "all of it", more=memory)
    with tempfile.TemporaryDirectory() as made:
        what, larger, simulated = "trials", 1.0, source is None
        if source is None:
            try:
                source, larger = _simulate_source(config, sizes, Path(made), tell)
            except BraindecodeVisError as error:
                why = f"not measured: the data are not here, and no phantom of them can be read ({error})"
                return Step("preprocess", None, disk=disk, how=why)
            what = "simulated trials, as the data are not here"
        tell("measuring the first trials through preprocessing")
        try:
            _preprocess_start(source, 2)  # loads libraries
            pieces = _grow(_list_pieces(source), partial(_preprocess_start, source), budget / 4)
        except BraindecodeVisError as error:
            return Step(
                "preprocess", None, disk=disk, how=f"the first trials could not be read alone ({error})"
            )
        pictures = _preprocess_pictures(source)
    for piece in pieces:
        piece.seconds, piece.cpu_seconds = piece.seconds * larger, piece.cpu_seconds * larger
    whole = [piece for piece in pieces if piece.size > 0]
    step = _make_step(
        "preprocess", whole[-2:] if whole[0].size < whole[-1].size else whole[-1:], sizes.n_stored,
        f"{whole[-1].size:.0f} {what}", more=memory, in_batches=simulated,
    )  # fmt: skip
    if not simulated and (block := _count_block(source, sizes.n_stored)):
        blocks = [piece for piece in whole if piece.size <= block][-2:] or whole[:1]
        step = replace(step, memory=memory + extrapolate(blocks, "memory", block))
    if not simulated and opened is not None:
        step = _add_pieces(step, opened, 1.0)
    if sizes.n_repeated:
        ceilings = _measure_ceilings(sizes)
        step = _add_pieces(step, ceilings, sizes.n_repeated / ceilings.size)
        step = replace(step, memory=max(step.memory or 0.0, memory + ceilings.memory))
    if pictures is None:
        return replace(step, disk=disk)
    times = sizes.n_images * sizes.image_px**2 / pictures.size
    step = _add_pieces(step, pictures, times)
    return replace(step, disk=disk, how=f"{step.how}; and the first pictures, extrapolated {times:.3g} times")


def _add_pieces(step: Step, piece: PieceCost, times: float) -> Step:
    """Return a step that also takes so many times what a piece took."""
    more, factor = times * piece.seconds, _find_factor(times, piece.seconds)
    seconds, low, high = (value or 0.0 for value in (step.seconds, step.low, step.high))
    return replace(
        step, seconds=seconds + more, low=low + more / factor, high=high + more * factor,
        cpu_seconds=(step.cpu_seconds or 0.0) + times * piece.cpu_seconds,
    )  # fmt: skip


def _simulate_source(
    config: RunConfig, sizes: RunSizes, folder: Path, tell: Callable[[str], None]
) -> tuple[Any, float]:
    """Return a small phantom of a data set that is not here, opened, and how many times larger a real trial is."""
    from braindecode_vis.parts.phantom import SIZES
    from braindecode_vis.parts.phantom.simulate import make_phantom

    data: Any = config.dataset
    forms = find_manifest(data.kind).phantoms
    if not forms:
        raise ConfigError(f"{data.kind} has no phantom; give --root with the data")
    tell(f"simulating a small {forms[0]} for preprocessing, about ten seconds, as the data are not here")
    make_phantom(forms[0], folder / "phantom", size=SIZES[forms[0]]["tiny"], snr=0.1, seed=0)
    fields = type(data).model_fields
    changes = {name: fields[name].default for name in ("subjects", "subject", "sessions") if name in fields}
    if getattr(data, "atlas", None) is not None:  # that of the phantom, whether the real one is here or not
        truth = folder / "phantom" / "phantom_truth"
        own = {"files": tuple(sorted(truth.glob("parcels.*nii*")))[:1], "fetch": None, "template": None}
        labels = next(truth.glob("parcels.txt"), None)
        changes["atlas"] = data.atlas.model_copy(update=own | {"labels": labels})
    small = data.model_copy(update={"root": folder / "phantom", **changes})
    source = open_source(small, roles.find_source(small), folder / "opened")
    # With an atlas, the voxels that are read count, not the parcels that are kept.
    published = find_manifest(data.kind).size
    real = (published.n_voxels,) if published is not None and published.n_voxels else sizes.shape
    return source, math.prod(real) / math.prod(list_trials(source)[1])


def _count_block(source: Any, n: int) -> int | None:
    """Return how many of `n` trials preprocessing holds at a time; None if it holds a series of volumes."""
    from braindecode_vis.datasets.sources.meeg_source import ContinuousPart
    from braindecode_vis.preprocessing.epochs import BLOCK_TRIALS
    from braindecode_vis.preprocessing.scaling import split_rows

    part = source.parts[0]
    if source.modality == "fmri":
        return None if part.is_computed else next(split_rows(n, part.n_voxels))[1]
    cleaning = source.plan.cleaning
    if isinstance(part, ContinuousPart) and (cleaning.ica is not None or cleaning.autoreject is not None):
        return sum(len(one.trials) for one in source.parts if one.group == part.group)  # a whole session
    return min(n, BLOCK_TRIALS)


def _list_pieces(source: Any) -> list[int]:
    """Return the numbers of trials of the first part that may be measured."""
    from braindecode_vis.preprocessing.epochs import BLOCK_TRIALS

    part = source.parts[0]
    n = len(part.trials)
    if source.modality == "fmri" and part.is_computed:  # a series is read as a whole
        return [n]
    # A few epochs take what a file costs beside them, and nothing is seen of the trials.
    first = _TRIALS_OF_A_PIECE // 2 if source.modality == "fmri" else BLOCK_TRIALS
    sizes = [first * 2**k for k in range(20)]
    return [size for size in sizes if size < n] + [n]


def _add_reading(step: Step, config: RunConfig, sizes: RunSizes, source: Any) -> Step:
    """Add to `embed` what reading and decoding the pictures takes, where they stay in their files."""
    of_texts = roles.complete(ImageEncoderSettings, config.target).of_texts
    if step.seconds is None or source is None or of_texts or getattr(source, "read_image", None) is not None:
        return step
    pictured = source.stimuli.select_pictured()
    if not len(pictured) or not pictured.has_pixels or pictured.pixels is not None:
        return step
    n = min(_TRIALS_OF_A_PIECE, len(pictured))
    with suppress(BraindecodeVisError, OSError):  # `embed` says what is wrong with a picture
        pictured.read_image(str(pictured.ids[0]))  # loads the library
        with _measure(n) as piece:
            for _ in pictured.iterate_images(pictured.ids[:n]):
                pass
        return _add_pieces(step, piece, sizes.n_images / n)
    return step


def _add_averaging(step: Step, config: RunConfig, sizes: RunSizes) -> Step:
    """Add to `train` what reading all trials and averaging their repetitions takes."""
    if step.seconds is None or config.repeats.train != "averaged" or sizes.n_train >= sizes.n_stored:
        return step
    from braindecode_vis.preprocessing.selection import average_repetitions

    responses = _make_repeated(sizes, 4)
    with tempfile.TemporaryDirectory() as made:
        np.save(Path(made) / "data.npy", responses.data)
        held = replace(responses, data=np.load(Path(made) / "data.npy", mmap_mode="r"))
        with _measure(responses.n_trials) as piece:
            average_repetitions(held)
    return _add_pieces(step, piece, sizes.n_folds * sizes.n_stored / responses.n_trials)


def _make_repeated(sizes: RunSizes, n_repetitions: int) -> Responses:
    """Return random trials of images that are shown as often as that."""
    n = max(5, _PIECE_BYTES // (4 * math.prod(sizes.shape) * n_repetitions)) * n_repetitions
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "split": "test",
            "stimulus_id": [f"image{number // n_repetitions}" for number in range(n)],
            "repetition": np.arange(n) % n_repetitions,
        }
    )  # fmt: skip
    data = np.random.default_rng(0).standard_normal((n, *sizes.shape), dtype=np.float32)
    dims = ("trial", "channel", "time") if len(sizes.shape) == 2 else ("trial", "voxel")
    return Responses.from_checked(data, dims, trials, "z", {})


def _measure_ceilings(sizes: RunSizes) -> PieceCost:
    """Compute the noise ceilings of random trials, as preprocessing does at its end; the size is their number."""
    from braindecode_vis.preprocessing.noise_ceiling import write_epochs_ceilings

    responses = _make_repeated(sizes, 16)
    with tempfile.TemporaryDirectory() as made, _measure(responses.n_trials) as piece:
        write_epochs_ceilings(Path(made), responses)
    return piece


def _preprocess_start(source: Any, n: int) -> PieceCost:
    """Preprocess the first `n` trials of the first part, or all that it has."""
    from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, drop_events, replace_trials

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if source.modality in ("eeg", "meg"):
            from braindecode_vis.preprocessing.meeg import write_source

            part = source.parts[0]
            n = min(n, len(part.trials))
            own = part.trials.assign(split="train")
            part = replace_trials(part, own)
            if isinstance(part, ContinuousPart):
                part = drop_events(part, np.arange(len(own)) < n)
            else:
                part = replace(part, trials=part.trials.iloc[:n])
            with _measure(n) as piece:
                write_source(replace(source, parts=(part,)), folder, scratch=folder / "scratch")
            return piece
        from braindecode_vis.preprocessing.betas import write_fmri_source

        part = source.parts[0]
        n = len(part.trials) if part.is_computed else min(n, len(part.trials))  # a series is read as a whole
        part = replace(part, trials=part.trials.iloc[:n].assign(split="train"))
        small = replace(source, parts=(part,), read_image=None)
        with _measure(n) as piece:
            write_fmri_source(small, folder)
        return piece


def _preprocess_pictures(source: Any) -> PieceCost | None:
    """Copy the first pictures of a source whose pictures become part of the run; None if they do not.

    The size of the piece is their pixels.
    """
    if getattr(source, "read_image", None) is None:
        return None
    from braindecode_vis.preprocessing.betas import write_images

    n = min(_TRIALS_OF_A_PIECE, len(source.stimuli))
    few = replace(source, stimuli=StimulusSet(source.stimuli.table.iloc[:n].reset_index(drop=True)))
    with tempfile.TemporaryDirectory() as made:
        write_images(Path(made) / "warm", few)  # opens the file of the pictures
        with _measure(n * math.prod(source.read_image(0).shape[:2])) as piece:
            write_images(Path(made) / "stimuli", few)
    return piece


def _plan_pictures(
    config: RunConfig, sizes: RunSizes, budget: float = BUDGET_S, left_out: str = ""
) -> tuple[list[Step], tuple[int, ...], PieceCost | None]:
    """Run random pictures through every stage but the encoder.

    Returns
    -------
    steps
        Those after training, and `embed`.
    dims
        The size of an embedding.
    start
        What the first of these runs took beside its stages, and more than the next one; None if nothing was measured.
    """
    held, steps = _read_memory("VmRSS"), list[Step]()
    records: list[tuple[int, int, dict[str, PieceCost]]] = []
    dims: tuple[int, ...] = (1024,)
    names = {
        "embed": sizes.n_images,
        "retrieve": sizes.n_test,
        "reconstruct": sizes.n_test,
        "evaluate": sizes.n_test,
    }
    large = _count_network(config.target)
    tera = PieceCost(1.0) if large is None else _measure_tera()
    # By processor time, as a busy machine makes no network large.
    if large is not None and sum(FIRST_PICTURES) * large.tera_operations * tera.cpu_seconds > budget / 2:
        dims, done = large.shape, sizes.n_images * large.tera_operations
        seconds = done * tera.seconds
        how = (
            f"computed from {1000 * large.tera_operations:.0f} billion operations for a picture, "
            f"{1000 / tera.seconds:.0f} billion a second"
        )
        steps.append(Step(
            "embed", seconds, seconds / LARGEST_FACTOR, seconds * LARGEST_FACTOR, done * tera.cpu_seconds,
            held + 2.0 * large.n_bytes,  # the network and its file
            4.0 * sizes.n_images * math.prod(dims), how,
        ))  # fmt: skip
        del names["embed"]
        # Values as many as those of an embedding, for the other stages.
        side = max(2, round(math.sqrt(math.prod(dims))))
        config = config.model_copy(update={"target": PixelsConfig(size=side)})
    try:
        first, shape = _run_pictures(config, sizes, *FIRST_PICTURES)  # loads libraries and weights
        dims = dims if steps else shape
        # The first run also loads libraries, which says nothing of the time of a picture. Of a large network, which
        # takes most of it, the first pictures are enough. A busy machine makes no network large.
        opening = first["embed"]
        spent = 0.0 if min(opening.seconds, opening.cpu_seconds) <= budget else math.inf
        for n_train, n_test in ((6, 3), (24, 8), (48, 24), (48, 60)):
            if records:
                before, last = records[-1][:2], records[-1][2]
                spent += last["embed"].seconds * (n_train + n_test) / sum(before)
                spent += last["evaluate"].cpu_seconds * n_test / before[1]
            if spent > LONGER * budget:  # a large network
                break
            found = _run_pictures(config, sizes, n_train, n_test)[0]
            records.append((n_train, n_test, found))
    except BraindecodeVisError as error:
        why = f"not measured: {' '.join(str(error).split())[:200]}"
        return [*steps, *(Step(name, None, how=why) for name in (*names, "report"))], dims, None
    start = first.get(START, PieceCost(1.0))
    for name, piece in first.items() if records else ():
        if name != START and name in records[0][2]:
            warm = records[0][2][name]
            start.seconds += max(0.0, piece.seconds - warm.seconds)
            start.cpu_seconds += max(0.0, piece.cpu_seconds - warm.cpu_seconds)
    records = records or [(*FIRST_PICTURES, first)]
    gpu = _uses_gpu()
    for name, size in names.items():
        pieces = [
            replace(found[name], size=n_train + n_test if name == "embed" else n_test)
            for n_train, n_test, found in records
            if name in found
        ]
        if name == "reconstruct" and left_out:
            steps.append(Step(name, None, how=f"not measured: {left_out} not here, and images need them"))
        elif pieces:
            what = (
                f"{pieces[-1].size:.0f} pictures of {sizes.image_px} px"
                if name == "embed"
                else f"{pieces[-1].size:.0f} test rows"
            )
            steps.append(
                _make_step(
                    name,
                    pieces,
                    size,
                    what,
                    more=held,
                    in_batches=True,
                    on_gpu=gpu and name in ("embed", "reconstruct"),
                    beside=partial(_count_pairs, sizes.image_px) if name == "evaluate" else None,
                )
            )
    report = records[-1][2]["report"]
    steps.append(
        _make_step("report", [replace(report, size=1.0)], 1.0, "page and checks of a small run", more=held)
    )
    return steps, dims, start


@dataclass(frozen=True)
class _CountedNetwork:
    """An image network: shape of an embedding, 10^12 operations for one picture, and bytes of the weights."""

    shape: tuple[int, ...]
    tera_operations: float
    n_bytes: float


def _count_network(target: Any) -> _CountedNetwork | None:
    """Count the operations of an image network without weights and memory; None where that cannot be done.

    On a GPU nothing is counted, as pictures are measured quickly there.
    """
    from braindecode_vis.embeddings.layer_readout import read_layers
    from braindecode_vis.embeddings.vision_network import VisionNetworkConfig

    if not isinstance(target, VisionNetworkConfig) or _uses_gpu():
        return None
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
            tower = target.model_copy(update={"weights": "random"}).make_tower()
            picture = torch.empty(1, 3, *[target.make_transform().size] * 2)
            found = read_layers(
                tower, picture, layers=target.layers, pooling=target.pooling, project=target.project
            )
    except (BraindecodeVisError, RuntimeError, TypeError, ValueError):  # some draw their weights themselves
        return None
    n_bytes = sum(one.numel() * one.element_size() for one in tower.network.parameters())
    return _CountedNetwork(tuple(found.shape[1:]), counted.get_total_flops() / 1e12, float(n_bytes))


def _measure_tera() -> PieceCost:
    """Measure what 10^12 operations take here, by products of matrices as large as those of an image network."""
    import torch

    first, second = torch.randn(1024, 1280), torch.randn(1280, 5120)
    first @ second  # starts the threads
    with _measure(1.0) as piece:
        for _ in range(5):
            first @ second
    times = 1e12 / (5 * 2.0 * 1024 * 1280 * 5120)
    return PieceCost(1.0, times * max(piece.seconds, 1e-6), times * piece.cpu_seconds)


def _count_pairs(image_px: int, n_test: float) -> float:
    """Return how many pixels of pairs of pictures `evaluate` compares for a null: all pairs of a few, and a bound."""
    from braindecode_vis.scoring.image_scores import LARGEST_PAIR_TABLE, SMALLEST_425

    sides = [find_comparison_size(image_px, image_px)[0]]
    if image_px >= SMALLEST_425:
        sides.append(425)
    return float(sum(min(n_test**2 * side**2, LARGEST_PAIR_TABLE) for side in sides))


def _run_pictures(
    config: RunConfig, sizes: RunSizes, n_train: int, n_test: int
) -> tuple[dict[str, PieceCost], tuple[int, ...]]:
    """Decode random pictures by a small ridge, and return what each stage took and the size of an embedding."""
    from braindecode_vis.datasets.array_folder import ArraysConfig
    from braindecode_vis.pipeline import embed, evaluate, finish_run
    from braindecode_vis.pipeline.runs import open_run

    rng = np.random.default_rng(0)
    n = n_train + n_test
    # Smooth, as photographs are: noise would be slower to write and to compress.
    coarse = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    scale = -(-sizes.image_px // 8)
    pictures = coarse.repeat(scale, axis=1).repeat(scale, axis=2)[:, : sizes.image_px, : sizes.image_px]
    names = [f"image{number}" for number in range(n)]
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "stimulus_id": names, "repetition": 0,
            "split": ["train"] * n_train + ["test"] * n_test,
        }
    )  # fmt: skip
    random = rng.standard_normal((n, 20), dtype=np.float32)
    with tempfile.TemporaryDirectory() as made, _use_cache(Path(made) / "cache"):
        root = Path(made) / "data"
        store.write_responses(root / "responses", Responses(random, ("trial", "feature"), trials, "z", {}))
        concepts = [f"concept{number // 2}" for number in range(n)]
        store.write_stimuli(
            root / "stimuli", StimulusSet.from_pixels(pictures, names, concepts, source="random")
        )
        content = config.model_dump(mode="json")
        evaluation = content["evaluation"] | {
            "conditions": [],
            "brain": None,
            "noise_ceiling": None,
            "resample": "image",
        }
        content |= {
            "dataset": ArraysConfig(root=root).model_dump(mode="json"), "split": {"kind": "published"},
            "encoder": {"kind": "ridge", "alphas": [1000.0]}, "selection": {}, "analyses": [], "pretrain": None,
            "synthetic": None, "evaluation": evaluation,
        }  # fmt: skip
        small = validate_config(content, where="the small run of plan")
        run = open_run(small, Path(made) / "run")
        with _measure(1.0) as whole:
            evaluate(run)
        with _measure(1.0) as paged:
            finish_run(run)  # the page, hints, and the quick check for leaks
        found = {"report": paged}
        for record, artifact in (
            (store.read_provenance(a.path / store.PROVENANCE), a) for _, a in run.produced
        ):
            profile = record.get("profile", {})
            piece = found.setdefault(record["stage"], PieceCost(1.0))
            piece.seconds += float(record["seconds"])
            piece.cpu_seconds += float(profile.get("cpu_seconds", 0))
            piece.memory = max(piece.memory, whole.memory)
            piece.disk += measure_folder(artifact.path)
        paged.disk = (Path(made) / "run" / "report.html").stat().st_size
        # What a run does between its stages: reading settings, hashing files, writing records.
        staged = [piece for name, piece in found.items() if name != "report"]
        found[START] = PieceCost(
            1.0, max(0.0, whole.seconds - sum(piece.seconds for piece in staged)),
            max(0.0, whole.cpu_seconds - sum(piece.cpu_seconds for piece in staged)),
        )  # fmt: skip
        shape = embed(run)[0].embeddings.vectors.shape[1:]
    return found, shape


@contextmanager
def _use_cache(folder: Path) -> Iterator[None]:
    """Keep the embeddings of random pictures out of the user's cache, which would also know them the next time."""
    name = "BRAINDECODE_VIS_CACHE"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _uses_gpu() -> bool:
    from braindecode_vis.base.devices import choose_device

    return choose_device("auto", setting="device") == "cuda"


def _plan_fit(
    config: RunConfig,
    sizes: RunSizes,
    target: tuple[int, ...] | None,
    budget: float,
    tell: Callable[[str], None],
) -> Step:
    """Measure fits of the encoder on random trials: fewer of them for a network, a smaller copy for anything else."""
    plan = _plan_epochs if "epochs" in type(config.encoder).model_fields else _plan_whole_fit
    try:
        return plan(config, sizes, target or (1,), budget, tell)
    except BraindecodeVisError as error:
        return Step("train", None, how=f"not measured: {' '.join(str(error).split())[:200]}")


def _plan_pretraining(config: RunConfig, sizes: RunSizes, budget: float, tell: Callable[[str], None]) -> Step:
    """Measure epochs of the pretraining on random trials, or on random windows as long as those of its corpora."""
    settings = config.pretrain
    assert settings is not None
    n_folds, n, shape = sizes.n_folds, sizes.n_train, sizes.shape
    try:
        if settings.corpus:
            from braindecode_vis.datasets.corpus.reader import open_corpus

            found = [open_corpus(folder.expanduser()) for folder in settings.corpus]
            n = sum(len(one.windows(settings.window_times, settings.window_step)) for one in found)
            n_folds, shape = 1, (len(found[0].channels), settings.window_times)
    except BraindecodeVisError as error:
        return Step("pretrain", None, how=f"not measured: {' '.join(str(error).split())[:200]}")
    from braindecode_vis.training.pretraining import pretrain

    # Windows of a corpus are read as trials are; probes and checkpoints are left out.
    changes = {
        "corpus": (),
        "corpus_digests": (),
        "n_epochs": 2,
        "probes": None,
        "start_from": None,
        "guide": None,
        "hold_out_by": "trial",
    }
    held, batch = _read_memory("VmRSS"), settings.batch_size

    def fit(number: int) -> PieceCost:
        responses, marks = _make_random(config, sizes, number, shape)[0], _Marks()
        quick = settings.model_copy(update=changes | {"batch_size": min(number, batch)})

        def show(words: str, total: int | None) -> Any:
            return nullcontext(
                lambda done: marks(done, done, words)
            )  # an epoch is done, or none at the start

        with tempfile.TemporaryDirectory() as made:
            with _measure(number) as piece:
                pretrain(
                    quick,
                    responses,
                    folder=Path(made),
                    checkpoints=Path(made) / "state",
                    seed=0,
                    progress=show,
                )
            piece.disk = measure_folder(Path(made))
        return marks.split(piece)

    tell(f"measuring batches of up to {batch} through the pretraining")
    try:
        pieces, epoch = _measure_training(fit, batch, n, budget)
    except BraindecodeVisError as error:
        return Step("pretrain", None, how=f"not measured: {' '.join(str(error).split())[:200]}")
    times = n_folds * settings.n_epochs
    seconds, ratio = times * epoch.seconds, times * n / pieces[-1].size
    factor = _find_factor(ratio, pieces[-1].seconds)
    return Step(
        "pretrain", seconds, seconds / factor, seconds * factor, times * epoch.cpu_seconds,
        held + epoch.memory + 4.0 * n * math.prod(shape), n_folds * epoch.disk,
        f"{_tell_batches(pieces, batch, ratio)} ({settings.n_epochs} epochs of {n})",
        _uses_gpu() and settings.device != "cpu",
    )  # fmt: skip


def _plan_epochs(
    config: RunConfig,
    sizes: RunSizes,
    target: tuple[int, ...],
    budget: float,
    tell: Callable[[str], None],
) -> Step:
    from braindecode_vis.training.network_encoder import choose_batch_size

    settings: Any = config.encoder
    held, gpu = _read_memory("VmRSS"), _uses_gpu() and settings.device != "cpu"
    automatic = not isinstance(settings.batch_size, int)
    batch = min(choose_batch_size(sizes.n_train) if automatic else settings.batch_size, sizes.n_train)
    changes: dict[str, Any] = {"epochs": 2}
    if selection := getattr(settings, "selection", None):  # a few images cannot be held out
        changes["selection"] = selection.model_copy(update={"kind": "last", "hold_out": 0.0})
    network = getattr(settings, "network", None)
    if network is not None and config.uses_pretraining:  # weights of any values take the same time
        network = network.model_copy(update={"pretrained": None})
    name = "" if network is None else roles.complete(NetworkSettings, network).preparation_steps
    n_steps = getattr(network, name) if name else 0

    def count_steps(n: float) -> int:
        return min(n_steps, max(1, int(n) // _SMALLEST_BATCH))

    def fit(n: int) -> PieceCost:
        own = changes | {"batch_size": min(n, batch)}
        if network is not None:
            own["network"] = network.model_copy(update={name: count_steps(n)} if name else {})
        marks = _Marks()
        quick = settings.model_copy(update=own)
        return marks.split(_fit_random(config, quick, sizes, n, sizes.shape, target, marks))

    tell(f"measuring batches of up to {batch} trials through the network")
    pieces, epoch = _measure_training(fit, batch, sizes.n_train, budget)
    start = pieces[-1].before
    if name:  # what the network computes before its training, in part
        taken = [replace(one, size=float(count_steps(one.size)), seconds=one.before) for one in pieces]
        start = extrapolate(taken[-2:], "seconds", n_steps)
    seconds = sizes.n_folds * (start + settings.epochs * epoch.seconds)
    ratio = sizes.n_train * settings.epochs * sizes.n_folds / pieces[-1].size
    factor = _find_factor(ratio, pieces[-1].seconds)
    stops = getattr(selection, "kind", "last") != "last"
    # Batches need the same memory however many there are; the trials lie in memory as a whole, or else in their file.
    trials = 4.0 * sizes.n_train * math.prod(sizes.shape)
    trials = min(trials, getattr(settings, "max_device_bytes", trials))
    return Step(
        "train", seconds, seconds / factor, seconds * factor,
        sizes.n_folds * (start + settings.epochs * epoch.cpu_seconds),
        held + epoch.memory + trials, sizes.n_folds * epoch.disk,
        f"{_tell_batches(pieces, batch, ratio)} "
        f"({settings.epochs} epochs of {sizes.n_train} trials{'; less if it stops early' if stops else ''})",
        gpu,
    )  # fmt: skip


def _plan_whole_fit(
    config: RunConfig,
    sizes: RunSizes,
    target: tuple[int, ...],
    budget: float,
    tell: Callable[[str], None],
) -> Step:
    held = _read_memory("VmRSS")
    scales = [s for s in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0) if s * sizes.n_train >= 50] or [1.0]
    # Grams of trials and features together grow by the third power.
    power = roles.complete(EncoderSettings, config.encoder).growth
    tell("measuring smaller copies of the fit")
    _fit_scaled(config, sizes, scales[0], target)
    pieces = _grow(
        scales,
        lambda s: _fit_scaled(config, sizes, s, target),
        budget,
        power=power,
        wanted=SURE_PART,
        tell=tell,
    )
    part = pieces[-1].size
    what = f"a fit of 1/{1 / part:.0f} of the trials and features" if part < 1 else "a whole fit"
    return _make_step("train", pieces, 1.0, what, times=sizes.n_folds, power=power, more=held)


def _fit_scaled(config: RunConfig, sizes: RunSizes, scale: float, target: tuple[int, ...]) -> PieceCost:
    settings: Any = config.encoder
    shape = (max(2, round(scale * sizes.shape[0])), *sizes.shape[1:])
    if "n_features" in type(settings).model_fields:
        features = tuple(None if n is None else max(1, round(n * scale)) for n in settings.n_features)
        settings = settings.model_copy(update={"n_features": features})
    piece = _fit_random(config, settings, sizes, max(10, round(scale * sizes.n_train)), shape, target)
    return replace(piece, size=scale)


def _make_random(
    config: RunConfig, sizes: RunSizes, n: int, shape: tuple[int, ...]
) -> tuple[Responses, np.ndarray, int]:
    """Return `n` random trials, the image that each shows, and how many images there are."""
    rng = np.random.default_rng(0)
    n_images = max(2, round(n * min(1.0, sizes.n_train_images / max(1, sizes.n_train))))
    shown = np.arange(n) % n_images
    ids = np.array([f"image{number}" for number in shown], dtype=object)
    names = np.array(sizes.subjects, dtype=object)[np.arange(n) * len(sizes.subjects) // n]
    trials = pd.DataFrame(
        {
            "subject": names, "session": "01", "run": [f"{number * 8 // n:02d}" for number in range(n)],
            "stimulus_id": ids, "repetition": np.arange(n) // n_images, "split": "train",
            "concept": [f"concept{number // 2 if not config.decodes_categories else number % 8}" for number in shown],
        }
    )  # fmt: skip
    data = rng.standard_normal((n, *shape), dtype=np.float32)
    dims: tuple[str, ...] = ("trial", "voxel")
    coords: dict[str, Any] = {}
    if len(shape) == 2:
        start, stop = getattr(config.dataset, "window", (0.0, 1.0))
        dims = ("trial", "channel", "time")
        coords = {
            "sfreq": shape[1] / (stop - start),
            "times": start + np.arange(shape[1]) * (stop - start) / shape[1],
        }
    of_parcels = getattr(getattr(config.encoder, "network", None), "kind", "") == "parcels"
    if of_parcels or getattr(config.dataset, "atlas", None) is not None:
        dims = ("trial", "parcel", "time")[: len(dims)]
        coords["parcel_networks"] = [f"network{number % 7}" for number in range(shape[0])]
    return Responses(data, dims, trials, "z", coords), shown, n_images


def _fit_random(
    config: RunConfig, settings: Any, sizes: RunSizes, n: int, shape: tuple[int, ...], target: tuple[int, ...],
    progress: Callable[[int, int, str], None] | None = None,
) -> PieceCost:  # fmt: skip
    """Fit an encoder on `n` random trials, and return what the fit took."""
    responses, shown, n_images = _make_random(config, sizes, n, shape)
    trials, ids, rng = responses.trials, responses.stimulus_ids, np.random.default_rng(1)
    vectors = rng.standard_normal((n_images, *target), dtype=np.float32)
    with tempfile.TemporaryDirectory() as made:
        if config.decodes_categories:
            decoder = roles.build(
                roles.find_encoder_role(roles.complete(EncoderSettings, settings)), settings, seed=0
            )
            decoder.bind(Context(progress=progress))
            with _measure(n) as piece:
                decoder.fit(responses, trials["concept"].to_numpy(dtype=object))
        else:
            decoder = roles.build(BrainEncoder, settings, seed=0)
            texts = None
            if roles.complete(EncoderSettings, settings).reads_text:
                different = np.unique(ids)
                drawn = rng.standard_normal((len(different), target[-1]), dtype=np.float32)
                texts = Embeddings(drawn, different, "random texts")
            decoder.bind(Context(texts=texts, device=config.retrieval.device, progress=progress))
            targets = Embeddings(vectors[shown], ids, "random")
            with _measure(n) as piece:
                decoder.fit(responses, targets)
        decoder.write(Path(made))
        piece.disk = measure_folder(Path(made))
    return piece


# --- a sweep ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepPlan:
    """What several runs will take together.

    Parameters
    ----------
    n_runs
        Runs.
    plans
        Those that were measured, with the number of runs that each stands for.
    counts
        By stage, how often it is computed: runs that need the same artifact share it.
    n_encoded
        How often pictures are encoded, which the cache of embeddings spares the other runs; None without such a cache.
    """

    n_runs: int
    plans: Sequence[tuple[RunPlan, int]]
    counts: Mapping[str, int] = field(default_factory=dict)
    n_encoded: int | None = None

    def _share(self, step: Step, name: str) -> float:
        """Return the part of the runs that computes a step; a file of embeddings lies in every folder that needs it."""
        n = self.counts.get(step.name, self.n_runs)
        if step.name == "embed" and name != "disk" and self.n_encoded is not None:
            n = self.n_encoded
        return n / self.n_runs

    def total(self, name: str) -> float | None:
        """Return the sum of a number over all runs, what they share counted once; of `memory` the largest."""
        if name == "memory":
            return max((v for plan, _ in self.plans if (v := plan.total(name)) is not None), default=None)
        total, found = 0.0, False
        for plan, n in self.plans:
            for step in plan.steps:
                value = getattr(step, name)
                if value is not None:
                    total += value * n * self._share(step, name)
                    found = True
        return total if found else None

    def count_gpu_hours(self) -> float | None:
        """Return hours on a GPU, None if nothing was measured on one."""
        hours = [
            step.seconds * n * self._share(step, "seconds") / 3600
            for plan, n in self.plans for step in plan.steps if step.on_gpu and step.seconds is not None
        ]  # fmt: skip
        return sum(hours) if hours else None


def plan_runs(
    configs: Sequence[RunConfig],
    *,
    tell: Callable[[str], None] = lambda words: None,
    budget: float = BUDGET_S,
    every_subject: bool = False,
    started: PieceCost | None = None,
) -> SweepPlan:
    """Return what runs will take that share one store of artifacts, as those of a sweep do.

    Parameters
    ----------
    configs
        One for each run; at most `MAX_MEASURED` that differ in more than seed and names of subjects are measured, and
        the others are taken to be like the nearest of these.
    tell, budget, every_subject, started
        As for `plan_run`.
    """
    kinds: dict[str, list[RunConfig]] = {}
    for config in configs:
        kinds.setdefault(store.hash_json(_describe_kind(config)), []).append(config)
    groups = list(kinds.values())
    chosen = sorted({round(k) for k in np.linspace(0, len(groups) - 1, min(MAX_MEASURED, len(groups)))})
    stands = [min(chosen, key=lambda k: abs(k - place)) for place in range(len(groups))]
    plans = []
    for number, place in enumerate(chosen):
        named = f"setting {number + 1} of {len(chosen)}: " if len(chosen) > 1 else ""

        def say(words: str, named: str = named) -> None:
            tell(named + words)

        # Runs of one command start once.
        once = started if number == 0 else None
        plan = plan_run(groups[place][0], tell=say, budget=budget, every_subject=every_subject, started=once)
        plans.append((plan, sum(len(g) for g, s in zip(groups, stands, strict=True) if s == place)))
    fields = [(_describe(c.dataset), c.split.hashed_fields(), c.seed) for c in configs]
    data = [store.hash_json(store.json_plain(one)) for one in fields]
    targets = [data[n] + store.hash_json(_describe(c.target)) for n, c in enumerate(configs)]
    counts = {START: 1, "preprocess": len(set(data)), "embed": len(set(targets))}
    return SweepPlan(len(configs), plans, counts, _count_encoded(configs))


def _count_encoded(configs: Sequence[RunConfig]) -> int | None:
    """Return how often the pictures of all runs are encoded, if those are files and the encoder learns nothing here."""
    for config in configs:
        target = roles.complete(ImageEncoderSettings, config.target)
        if target.fitted_on_training_images or roles.find_source(config.dataset) == "write":
            return None
    found = set()
    for config in configs:
        size, data = find_manifest(config.dataset.kind).size, _describe(config.dataset)
        if size is not None and size.images_are_shared:
            data = data | {"subjects": None}
        found.add(store.hash_json([data, _describe(config.target)]))
    return len(found)


def _describe(settings: Any) -> Any:
    try:
        return store.json_plain(settings.hashed_fields())
    except BraindecodeVisError:  # weights that are not here
        return settings.model_dump(mode="json")


def _describe_kind(config: RunConfig) -> dict[str, Any]:
    """Return the settings that change what a run takes."""
    content = config.model_dump(mode="json")
    content["seed"] = content["name"] = None
    data = content["dataset"]
    data["subjects"] = len(data.get("subjects") or ())
    return content | {"dataset": data | {"subject": None, "root": None}}
