"""From one call to a complete phantom data set on disk, and what it costs, before it starts.

Owns the order: images, drive, people, files of the format, ground truth. Each part is skipped when an earlier call
finished it, so that an interrupted call goes on. Knows formats by their `Format` alone.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braindecode_vis.checks import DataError, check_option
from braindecode_vis.phantom.assemble import (
    bids,
    god,
    nsd,
    things_eeg2,
    things_eeg2_derived,
    things_fmri,
    things_meg,
)
from braindecode_vis.phantom.assemble.jobs import Advance, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.ledger import TRUTH, Ledger
from braindecode_vis.phantom.assemble.sizes import PhantomSize
from braindecode_vis.phantom.assemble.stimuli import Embed, compute_drive, write_image_files
from braindecode_vis.phantom.assemble.truth import (
    PhantomTruth,
    count_bytes,
    plan_truth,
    read_truth,
    write_summary,
)
from braindecode_vis.phantom.brain import make_person
from braindecode_vis.phantom.config import PhantomConfig
from braindecode_vis.store import is_disk_full

_ALL = (
    things_eeg2.FORMAT,
    things_eeg2_derived.OFFICIAL,
    things_eeg2_derived.AT_250HZ,
    things_meg.FORMAT,
    nsd.FORMAT,
    things_fmri.FORMAT,
    god.FORMAT,
    bids.EEG,
    bids.FMRI,
)
_BY_NAME = {form.name: form for form in _ALL}
FORMATS: dict[str, str] = {form.name: form.description for form in _ALL}
"""Every format that a phantom can be written in, and what it is."""


@dataclass(frozen=True)
class Estimate:
    """What a phantom will cost.

    Parameters
    ----------
    n_bytes, scratch_bytes
        Files that stay, and temporary ones at most at the same time.
    seconds
        Computing time on one core without the image encoder; within a factor of two on usual machines.
    n_images
        Pictures.
    n_trials
        Presentations to all people together.
    recording_s
        Recorded time of all people together.
    n_steps
        How many steps `make_phantom` reports through `advance`.
    """

    n_bytes: int
    scratch_bytes: int
    seconds: float
    n_images: int
    n_trials: int
    recording_s: float
    n_steps: int


def estimate_phantom(format: str, size: PhantomSize) -> Estimate:
    """Return what a phantom will cost, without making anything.

    Raises
    ------
    ConfigError
        If there is no such format, or it cannot have this size.

    Examples
    --------
    >>> from braindecode_vis.phantom.assemble import SIZES
    >>> round(estimate_phantom("things-eeg2", SIZES["things-eeg2"]["full"]).n_bytes / 1e9)
    139
    """
    form = get_format(format)
    form.check(size)
    counts, n_images = form.count(size), form.count_images(size)
    image_bytes = 300 + 43 * size.image_size + 0.12 * size.image_size**2
    image_seconds = (6 + 3e-4 * size.image_size**2) * 1e-3
    ledger_bytes = 150 * counts.n_steps / 50 + 3000
    return Estimate(
        n_bytes=round(
            counts.n_bytes + n_images * image_bytes + count_bytes(form, size, n_images) + ledger_bytes
        ),
        scratch_bytes=round(counts.scratch_bytes),
        seconds=float(counts.seconds + n_images * image_seconds + size.n_subjects),
        n_images=n_images,
        n_trials=size.n_subjects * size.n_trials,
        recording_s=float(counts.recording_s),
        n_steps=n_images + counts.n_steps + size.n_subjects,
    )


def check_space(out: Path, estimate: Estimate) -> None:
    """Raise `DataError` if the disk of `out` has no room for what is still missing there."""
    folder = out.expanduser().absolute()
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = max(0, estimate.n_bytes - there) + estimate.scratch_bytes
    if needed > free:
        raise DataError(
            f"the phantom needs about {needed / 1e9:.2f} GB more in {out}, but the disk has {free / 1e9:.2f} GB free; "
            "choose a smaller size or another folder."
        )


def make_phantom(
    format: str,
    out: Path,
    *,
    size: PhantomSize,
    config: PhantomConfig,
    embed: Embed,
    advance: Advance = lambda n: None,
    describe: Callable[[str], Any] = lambda text: None,
) -> PhantomTruth:
    """Make a complete phantom data set in its authors' format, with its ground truth beside it.

    What is written depends on the arguments alone. A call that was interrupted is taken up by the same call again.
    Memory does not grow with the length of the recordings.

    Parameters
    ----------
    format
        One of `FORMATS`.
    out
        Folder of the data set: new, empty, or of an interrupted call.
    size
        From `SIZES`, or changed with `PhantomSize.replace`.
    config
        The simulated people; its number of subjects is replaced by that of `size`.
    embed
        Gives one vector per image: what the semantic stages of the simulated brains respond to. Called once.
    advance
        Called with the number of steps done; they add up to `Estimate.n_steps`.
    describe
        Called with what is being done.

    Returns
    -------
    truth
        What was planted, and what the ideal observer scores.

    Raises
    ------
    ConfigError
        If the format or the size does not exist, or `out` holds something else.
    DataError
        If the disk has no room, or `embed` does not fit.
    """
    form = get_format(format)
    estimate = estimate_phantom(format, size)
    out = out.expanduser()
    config = config.model_copy(update={"n_subjects": size.n_subjects})
    request = {
        "format": format,
        "size": dataclasses.asdict(size),
        "config": config.hashed_fields(),
    }
    ledger = Ledger(out, request)
    check_space(out, estimate)
    try:
        return _make(form, ledger, size, config, embed, advance, describe)
    except OSError as error:
        if is_disk_full(error, out):
            raise DataError(
                f"the disk is full: the phantom in {out} is not complete; make room and run the same command again."
            ) from error
        raise
    finally:
        shutil.rmtree(out / ".phantom-scratch", ignore_errors=True)


def _make(
    form: Format,
    ledger: Ledger,
    size: PhantomSize,
    config: PhantomConfig,
    embed: Embed,
    advance: Advance,
    describe: Callable[[str], Any],
) -> PhantomTruth:
    describe(f"drawing {form.count_images(size)} images")
    table = form.list_images(size, config.seed)
    table = write_image_files(table, ledger.root, size=size.image_size, seed=config.seed, advance=advance)
    describe("computing what the images do to the simulated brains")
    drive = compute_drive(table, ledger.root, ledger.root / TRUTH, embed=embed, n_semantic=config.n_semantic)
    people = tuple(make_person(config, index, drive) for index in range(size.n_subjects))
    job = Job(ledger.root, size, config, table, drive, people, form.make_machine(size))
    for unit in (*form.plan(job), *plan_truth(form, job)):
        _finish(unit, ledger, advance, describe)
    if (ledger.root / TRUTH / "phantom.json").is_file():
        return read_truth(ledger.root)
    return write_summary(form, job)


def _finish(unit: Unit, ledger: Ledger, advance: Advance, describe: Callable[[str], Any]) -> None:
    progress = Progress(unit.n_steps, advance)
    if not ledger.is_finished(unit.name):
        describe(unit.name)
        ledger.record(unit.name, unit.write(progress))
    progress.finish()


def get_format(name: str) -> Format:
    """Return a format by its name."""
    check_option("the format of a phantom", name, FORMATS)
    return _BY_NAME[name]
