"""Estimates time, memory, disk and GPU hours of a run or a sweep, from small pieces that are measured on this machine.

Sizes come from the data where they are there (trial tables and headers; samples of one piece alone are read), and
otherwise from what the manifest says was published. Then pieces run on this machine: the start of the data through
preprocessing (and what it takes beside its trials: opening all files, noise ceilings), tiny runs of some pictures
through every stage, fits of the encoder on random trials of the real shape, and reading and predicting trials. A number
is the sum of a constant and of parts for each image, trial and epoch; a fit without epochs has parts of two powers.
What was measured and what was extrapolated, by how many times, is reported of each step.

Nothing has to be here for an estimate. Without the data, a small phantom of their format goes through preprocessing;
without the weights of an image network, the same network with random weights takes the same time.
"""

from __future__ import annotations

import math
import os
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
from braindecode_vis.base.arrays import Embeddings, Responses, read_rows
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError
from braindecode_vis.base.contracts import (
    BrainEncoder,
    Context,
    EncoderSettings,
    ImageEncoderSettings,
    NetworkSettings,
)
from braindecode_vis.base.digests import digest_file
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import RunConfig, list_weights, validate_config
from braindecode_vis.datasets.manifests import find_manifest
from braindecode_vis.generation.inversion import MOST_AVERAGED
from braindecode_vis.parts.studies.plan_pictures import FIRST_PICTURES, plan_pictures
from braindecode_vis.parts.studies.plan_pieces import (
    BUDGET_S,
    SMALLEST_BATCH,
    START,
    SURE_PART,
    TRIALS_OF_A_PIECE,
    Marks,
    PieceCost,
    Step,
    add_pieces,
    describe_batches,
    extrapolate,
    find_factor,
    grow,
    make_step,
    measure,
    measure_training,
    read_memory,
    uses_gpu,
)
from braindecode_vis.parts.studies.run_sizes import (
    RunSizes,
    find_sizes,
    list_trials,
    measure_folder,
    open_source,
)
from braindecode_vis.pipeline import STAGES
from braindecode_vis.pipeline.runs import SilentListener

#: Largest number of different settings of a sweep of which each is measured.
MAX_MEASURED = 4
#: Random trials whose noise ceilings and averages are measured, in bytes.
_PIECE_BYTES = 32 << 20


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
    with measure(1.0) as opened:
        sizes, source = find_sizes(config, every_subject=every_subject)
    prepared = _plan_preprocess(config, sizes, source, tell, budget, opened)
    config, left_out = _stand_in(config)
    tell(f"measuring pictures through every stage, {sum(FIRST_PICTURES)} first")
    later, dims, first = plan_pictures(config, sizes, source, budget, left_out)
    read, loaded = (first.get(name, PieceCost(1.0)) for name in ("read", "train"))
    held = read_memory("VmRSS")
    trained, predicted = _plan_fit(config, sizes, dims, budget, tell, loaded.held + loaded.memory)
    # Libraries of a network stay in memory, and so does each fit, which is read back from its file.
    kept = max(0.0, read_memory("VmRSS") - held) + 2.0 * (trained.disk or 0.0)
    later = [
        one if one.name == "embed" else replace(one, memory=one.memory and one.memory + kept) for one in later
    ]
    if trained.seconds is not None:
        trained = add_pieces(trained, loaded, 1.0)
    later = [_add_data(step, config, sizes, dims, read, predicted) for step in [trained, *later]]
    digest, trials = _measure_digest(), float(sizes.n_stored * math.prod(sizes.shape) * sizes.itemsize)
    pictures = max(0.0, (prepared.disk or 0.0) - trials)
    later = [_add_leaks(step, sizes, trials, pictures, digest) for step in later]
    if config.uses_pretraining:
        later.insert(0, _plan_pretraining(config, sizes, budget, tell))
    order = [START, *STAGES[: STAGES.index("train")], "pretrain", *STAGES[STAGES.index("train") :]]
    steps = sorted([prepared, *later], key=lambda step: order.index(step.name))
    if config.run_analyses:
        steps.append(
            Step("analyze", None, how="not measured: each makes new fits; `analyze` reports their time")
        )
    if started is not None:
        step = make_step(START, [started], 1.0, "libraries, and digests of what is read and written")
        # What is written is read again at the end.
        written = sum(one.disk or 0.0 for one in steps)
        n_bytes = (sizes.input_bytes or 0) + sizes.n_images * read.disk + 2 * written
        steps.insert(0, add_pieces(step, digest, n_bytes / digest.size))
    return RunPlan(sizes, steps)


def _measure_digest() -> PieceCost:
    """Measure the digest of a file, of so many bytes."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "file"
        path.write_bytes(bytes(_PIECE_BYTES))
        with measure(float(_PIECE_BYTES)) as piece:
            digest_file(path, read=True)
    return piece


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
    trials = float(sizes.n_stored * math.prod(sizes.shape) * sizes.itemsize)
    kept = 3.0 * sizes.n_images * sizes.image_px**2  # pictures that become part of the run
    disk = trials + kept if getattr(source, "read_image", None) else trials
    held = read_memory("VmRSS")
    if roles.find_source(config.dataset) == "write":
        with tempfile.TemporaryDirectory() as made, measure(1.0) as piece:
            from braindecode_vis.pipeline.preparing import write_dataset

            write_dataset(config.dataset, Path(made), seed=config.seed, listener=SilentListener())
            piece.disk = measure_folder(Path(made))
        return make_step("preprocess", [piece], 1.0, "all of it", more=held)
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
            counts = _list_pieces(source)
            loaded = _preprocess_start(source, counts[0])
            held = read_memory("VmRSS")
            pieces = grow(counts, partial(_preprocess_start, source), budget / 2)
        except BraindecodeVisError as error:
            return Step(
                "preprocess", None, disk=disk, how=f"the first trials could not be read alone ({error})"
            )
        pictures = _preprocess_pictures(source)
    # Libraries that the first call loads.
    wall, cpu = loaded.seconds - pieces[0].seconds, loaded.cpu_seconds - pieces[0].cpu_seconds
    for piece in pieces:
        piece.seconds, piece.cpu_seconds = piece.seconds * larger, piece.cpu_seconds * larger
    # What a part costs beside its trials comes back with each of them.
    n_parts = 1 if simulated else len(source.parts)
    step = make_step(
        "preprocess", pieces, sizes.n_stored / n_parts, f"{pieces[-1].size:.0f} {what}", times=n_parts, more=held,
        in_batches=simulated,
    )  # fmt: skip
    if not simulated and (block := _count_block(source, sizes.n_stored)):
        blocks = [piece for piece in pieces if piece.size <= block] or pieces[:1]
        step = replace(step, memory=held + extrapolate(blocks, "memory", block))
    step = add_pieces(step, PieceCost(1.0, max(0.0, wall), max(0.0, cpu)), 1.0)
    if not simulated and opened is not None:
        step = add_pieces(step, opened, 1.0)
    if sizes.n_repeated:
        ceilings = _measure_ceilings(sizes)
        step = add_pieces(step, ceilings, sizes.n_repeated / ceilings.size)
        step = replace(step, memory=max(step.memory or 0.0, held + ceilings.memory))
    if pictures is None:
        return replace(step, disk=disk)
    times = sizes.n_images * sizes.image_px**2 / pictures.size
    step = add_pieces(step, pictures, times)
    return replace(
        step, disk=trials + kept, how=f"{step.how}; and the first pictures, extrapolated {times:.3g} times"
    )


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
    tell(f"simulating a small {forms[0]} for preprocessing, half a minute, as the data are not here")
    size = SIZES[forms[0]]["tiny"]
    # Pictures and volumes of about the real size, or more epochs: of small ones, most is what each file costs.
    more = {"voxel_mm": 3.0} if size.voxel_mm else {"train_repetitions": 8 * size.train_repetitions}
    size = size.replace(image_size=sizes.image_px, **more)
    make_phantom(forms[0], folder / "phantom", size=size, snr=0.1, seed=0)
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
    first = TRIALS_OF_A_PIECE // 2 if source.modality == "fmri" else BLOCK_TRIALS
    first = first if n >= 2 * first else max(1, n // 4)
    return [*(size for k in range(20) if (size := first * 2**k) < n), n]


def _add_data(
    step: Step, config: RunConfig, sizes: RunSizes, dims: tuple[int, ...], read: PieceCost, predicted: PieceCost
) -> Step:  # fmt: skip
    """Add to a stage what reading and averaging its trials, predicting them and reading its pictures takes.

    `read` is one picture, `predicted` some trials. Trials and embeddings that lie in memory together are counted too.
    """
    categories = config.decodes_categories
    names = ("train", "evaluate" if categories else "retrieve", "reconstruct")
    if step.seconds is None or step.name not in names:
        return step
    numbers, memory = math.prod(sizes.shape), 0.0
    if step.name == "reconstruct":  # the mean image, and those of classes
        n_averaged = min(MOST_AVERAGED, sizes.n_train_images)
        n_averaged += sizes.n_train_images if sizes.tests_known_concepts else 0
        step = add_pieces(step, read, sizes.n_folds * n_averaged)
        # The nearest image: embeddings before and after they are scaled, and similarities.
        memory = 4.0 * sizes.n_train_images * (3 * math.prod(dims) + 2 * sizes.n_test / sizes.n_folds)
    else:
        is_test = step.name != "train"
        average = getattr(config.repeats, "test" if is_test else "train") == "averaged" and not categories
        n_trials = sizes.n_test_trials if is_test else sizes.n_folds * sizes.n_train_trials
        reading = _measure_trials(sizes, average=average)
        step = add_pieces(step, reading, n_trials / reading.size)
        memory = reading.memory
        if is_test:
            step = add_pieces(step, predicted, sizes.n_test / predicted.size)
            n_rows = sizes.n_test / sizes.n_folds
            memory += max(predicted.memory, 4.0 * n_rows * (2 * numbers + math.prod(dims) + n_rows))
    return replace(step, memory=(step.memory or 0.0) + memory)


def _add_leaks(step: Step, sizes: RunSizes, trials: float, pictures: float, digest: PieceCost) -> Step:
    """Add to `report` its check for leaks: copies among the trials, and digests of pictures; both in bytes."""
    from braindecode_vis.datasets.trial_values import MAX_CORRELATED, find_copied_trials
    from braindecode_vis.pipeline.leaks.split_overlap import LARGEST_CORRELATED, LARGEST_HASHED, find_copies

    if step.name != "report" or step.seconds is None:
        return step
    with _lay_down(_make_repeated(sizes, 4)) as lying, measure(lying.n_trials) as piece:
        find_copies(lying.data)
        if trials <= LARGEST_CORRELATED and sizes.n_stored <= MAX_CORRELATED:
            find_copied_trials(lying.data)
    step = add_pieces(step, piece, sizes.n_stored / piece.size)
    step = replace(step, memory=(step.memory or 0.0) + piece.memory)
    return add_pieces(step, digest, pictures / digest.size) if pictures <= LARGEST_HASHED else step


@contextmanager
def _lay_down(responses: Responses) -> Iterator[Responses]:
    """Yield trials that lie in a file."""
    with tempfile.TemporaryDirectory() as made:
        np.save(Path(made) / "data.npy", responses.data)
        yield replace(responses, data=np.load(Path(made) / "data.npy", mmap_mode="r"))


def _measure_trials(sizes: RunSizes, *, average: bool) -> PieceCost:
    """Measure reading trials from a file, where the repetitions of an image lie apart, and averaging them."""
    from braindecode_vis.preprocessing.selection import average_repetitions

    with _lay_down(_make_repeated(sizes, 4)) as lying, measure(lying.n_trials) as piece:
        if average:
            average_repetitions(lying)
        else:
            read_rows(lying.data, np.arange(lying.n_trials))
    return piece


def _make_repeated(sizes: RunSizes, n_repetitions: int) -> Responses:
    """Return random trials of images that are shown as often as that."""
    n = min(sizes.n_stored, _PIECE_BYTES // (4 * math.prod(sizes.shape)))
    n = max(5, n // n_repetitions) * n_repetitions
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "split": "test",
            "stimulus_id": [f"image{number % (n // n_repetitions)}" for number in range(n)],
            "repetition": np.arange(n) // (n // n_repetitions),
        }
    )  # fmt: skip
    data = np.random.default_rng(0).standard_normal((n, *sizes.shape), dtype=np.float32)
    dims = ("trial", "channel", "time") if len(sizes.shape) == 2 else ("trial", "voxel")
    return Responses.from_checked(data, dims, trials, "z", {})


def _measure_ceilings(sizes: RunSizes) -> PieceCost:
    """Compute the noise ceilings of random trials, as preprocessing does at its end; the size is their number."""
    from braindecode_vis.preprocessing.noise_ceiling import write_epochs_ceilings

    responses = _make_repeated(sizes, 16)
    with tempfile.TemporaryDirectory() as made, measure(responses.n_trials) as piece:
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
            with measure(n) as piece:
                write_source(replace(source, parts=(part,)), folder, scratch=folder / "scratch")
            return piece
        from braindecode_vis.preprocessing.betas import write_fmri_source

        part = source.parts[0]
        n = len(part.trials) if part.is_computed else min(n, len(part.trials))  # a series is read as a whole
        part = replace(part, trials=part.trials.iloc[:n].assign(split="train"))
        small = replace(source, parts=(part,), read_image=None)
        with measure(n) as piece:
            write_fmri_source(small, folder)
        return piece


def _preprocess_pictures(source: Any) -> PieceCost | None:
    """Copy the first pictures of a source whose pictures become part of the run; None if they do not.

    The size of the piece is their pixels.
    """
    if getattr(source, "read_image", None) is None:
        return None
    from braindecode_vis.preprocessing.betas import write_images

    n = min(TRIALS_OF_A_PIECE, len(source.stimuli))
    few = replace(source, stimuli=StimulusSet(source.stimuli.table.iloc[:n].reset_index(drop=True)))
    with tempfile.TemporaryDirectory() as made:
        write_images(Path(made) / "warm", few)  # opens the file of the pictures
        with measure(n * math.prod(source.read_image(0).shape[:2])) as piece:
            write_images(Path(made) / "stimuli", few)
    return piece


def _plan_fit(
    config: RunConfig, sizes: RunSizes, target: tuple[int, ...], budget: float, tell: Callable[[str], None],
    held: float = 0.0,
) -> tuple[Step, PieceCost]:  # fmt: skip
    """Measure fits of the encoder on random trials: fewer of them for a network, a smaller copy for anything else.

    Returns what predicting some trials takes beside it. `held` are bytes of memory before a fit without a network.
    """
    try:
        if "epochs" in type(config.encoder).model_fields:
            step, last = _plan_epochs(config, sizes, target or (1,), budget, tell)
        else:
            step, last = _plan_whole_fit(config, sizes, target or (1,), budget, tell)
            step = replace(step, memory=(step.memory or 0.0) + (held or read_memory("VmRSS")))
    except BraindecodeVisError as error:
        return Step("train", None, how=f"not measured: {' '.join(str(error).split())[:200]}"), PieceCost(1.0)
    return step, last.predicted or PieceCost(1.0)


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
    batch = settings.batch_size

    def fit(number: int) -> PieceCost:
        responses, marks = _make_random(config, sizes, number, shape)[0], Marks()
        quick = settings.model_copy(update=changes | {"batch_size": min(number, batch)})

        def show(words: str, total: int | None) -> Any:
            # An epoch is done, or none at the start.
            return nullcontext(lambda done: marks(done, done, words))

        with tempfile.TemporaryDirectory() as made:
            with measure(number) as piece:
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
        pieces, epoch = measure_training(fit, batch, n, budget)
    except BraindecodeVisError as error:
        return Step("pretrain", None, how=f"not measured: {' '.join(str(error).split())[:200]}")
    times = n_folds * settings.n_epochs
    seconds, ratio = times * epoch.seconds, times * n / pieces[-1].size
    factor = find_factor(ratio, pieces[-1].seconds)
    return Step(
        "pretrain", seconds, seconds / factor, seconds * factor, times * epoch.cpu_seconds,
        pieces[-1].held + epoch.memory + 4.0 * n * math.prod(shape), n_folds * epoch.disk,
        f"{describe_batches(pieces, batch, ratio)} ({settings.n_epochs} epochs of {n})",
        uses_gpu() and settings.device != "cpu",
    )  # fmt: skip


def _plan_epochs(
    config: RunConfig, sizes: RunSizes, target: tuple[int, ...], budget: float, tell: Callable[[str], None]
) -> tuple[Step, PieceCost]:
    from braindecode_vis.training.network_encoder import choose_batch_size

    settings: Any = config.encoder
    gpu = uses_gpu() and settings.device != "cpu"
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
        return min(n_steps, max(1, int(n) // SMALLEST_BATCH))

    def fit(n: int) -> PieceCost:
        own = changes | {"batch_size": min(n, batch)}
        if network is not None:
            own["network"] = network.model_copy(update={name: count_steps(n)} if name else {})
        marks = Marks()
        quick = settings.model_copy(update=own)
        return marks.split(_fit_random(config, quick, sizes, n, sizes.shape, target, marks))

    tell(f"measuring batches of up to {batch} trials through the network")
    pieces, epoch = measure_training(fit, batch, sizes.n_train, budget)
    start = pieces[-1].before
    if name:  # what the network computes before its training, in part
        taken = [replace(one, size=float(count_steps(one.size)), seconds=one.before) for one in pieces]
        start = extrapolate(taken[-2:], "seconds", n_steps)
    loading = max(0.0, pieces[0].before - pieces[-1].before)
    seconds = loading + sizes.n_folds * (start + settings.epochs * epoch.seconds)
    ratio = sizes.n_train * settings.epochs * sizes.n_folds / pieces[-1].size
    factor = find_factor(ratio, pieces[-1].seconds)
    stops = getattr(selection, "kind", "last") != "last"
    # Batches need the same memory however many there are; the trials lie in memory as a whole, or else in their file.
    trials = 4.0 * sizes.n_train * math.prod(sizes.shape)
    trials = 0.0 if trials > getattr(settings, "max_device_bytes", trials) else trials
    step = Step(
        "train", seconds, seconds / factor, seconds * factor,
        loading + sizes.n_folds * (start + settings.epochs * epoch.cpu_seconds),
        pieces[-1].held + epoch.memory + trials, sizes.n_folds * epoch.disk,
        f"{describe_batches(pieces, batch, ratio)} "
        f"({settings.epochs} epochs of {sizes.n_train} trials{'; less if it stops early' if stops else ''})",
        gpu,
    )  # fmt: skip
    return step, pieces[-1]


def _plan_whole_fit(
    config: RunConfig, sizes: RunSizes, target: tuple[int, ...], budget: float, tell: Callable[[str], None]
) -> tuple[Step, PieceCost]:
    # With trials and targets, which lie in memory beside the fit.
    data = 4.0 * sizes.n_train * (math.prod(sizes.shape) + math.prod(target))
    scales = [s for s in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0) if s * sizes.n_train >= 50] or [1.0]
    # Grams of trials and features together grow by the third power.
    power = roles.complete(EncoderSettings, config.encoder).growth
    fit = partial(_fit_scaled, config, sizes, target)
    tell("measuring smaller copies of the fit")
    fit(scales[0])
    pieces = grow(scales, fit, budget, power=power, wanted=SURE_PART, tell=tell)
    part = pieces[-1].size
    what = f"a fit of 1/{1 / part:.0f} of the trials and features" if part < 1 else "a whole fit"
    step = make_step("train", pieces, 1.0, what, times=sizes.n_folds, power=power, more=data)
    return step, pieces[-1]


def _fit_scaled(config: RunConfig, sizes: RunSizes, target: tuple[int, ...], scale: float) -> PieceCost:
    settings: Any = config.encoder
    shape = (max(2, round(scale * sizes.shape[0])), *sizes.shape[1:])
    fields = type(settings).model_fields
    if "n_features" in fields:
        features = tuple(None if n is None else max(1, round(n * scale)) for n in settings.n_features)
        settings = settings.model_copy(update={"n_features": features})
    if "alphas" in fields:  # as large beside the eigenvalues as in the whole, which decides on the precision
        settings = settings.model_copy(update={"alphas": tuple(a * scale**2 for a in settings.alphas)})
    piece = _fit_random(config, settings, sizes, max(10, round(scale * sizes.n_train)), shape, target)
    predicted = piece.predicted
    if predicted is not None:  # of as many features less
        predicted = replace(predicted, size=predicted.size * scale)
    return replace(piece, size=scale, predicted=predicted)


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
    # Features go together, so that the largest eigenvalues are those of a recording.
    data += 0.5 * rng.standard_normal((n, *[1] * len(shape)), dtype=np.float32)
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
    """Fit an encoder on `n` random trials, predict some, and return what both took."""
    responses, shown, n_images = _make_random(config, sizes, n, shape)
    trials, ids, rng = responses.trials, responses.stimulus_ids, np.random.default_rng(1)
    vectors = rng.standard_normal((n_images, *target), dtype=np.float32)
    with tempfile.TemporaryDirectory() as made:
        if config.decodes_categories:
            decoder = roles.build(
                roles.find_encoder_role(roles.complete(EncoderSettings, settings)), settings, seed=0
            )
            decoder.bind(Context(progress=progress))
            predict = decoder.decision
            with measure(n) as piece:
                decoder.fit(responses, trials["concept"].to_numpy(dtype=object))
        else:
            decoder = roles.build(BrainEncoder, settings, seed=0)
            texts = None
            if roles.complete(EncoderSettings, settings).reads_text:
                different = np.unique(ids)
                drawn = rng.standard_normal((len(different), target[-1]), dtype=np.float32)
                texts = Embeddings(drawn, different, "random texts")
            decoder.bind(Context(texts=texts, device=config.retrieval.device, progress=progress))
            targets, predict = Embeddings(vectors[shown], ids, "random"), decoder.predict
            with measure(n) as piece:
                decoder.fit(responses, targets)
        decoder.write(Path(made))
        piece.disk = measure_folder(Path(made))
    few = responses.select(np.arange(min(n, TRIALS_OF_A_PIECE)))
    with measure(few.n_trials) as piece.predicted:
        predict(few)
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
