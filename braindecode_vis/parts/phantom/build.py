"""Makes a complete phantom data set on disk in one call, and estimates its cost before that.

Owns the order (images, drive, subjects, files of the format, ground truth) and the ledger
``phantom_truth/finished.json``: the request that the folder belongs to, and the files of each finished unit with
their sizes. A part that an earlier call finished is skipped, so an interrupted call can be continued. A folder belongs
to one request; another request is refused. Uses only the `Format` of a format.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.locks import is_alive
from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.base.processes import open_processes
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import compute_fingerprint, is_disk_full, json_plain, read_json, write_json
from braindecode_vis.datasets.drawn.images import write_image_files
from braindecode_vis.parts.phantom.brain import make_person
from braindecode_vis.parts.phantom.drive import Embed, compute_drive
from braindecode_vis.parts.phantom.format_plan import TRUTH, Advance, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.formats import (
    alljoined_format,
    bids_eeg,
    bids_fmri,
    bold5000_nod_format,
    cneuromod_things_format,
    corpus_eeg_format,
    corpus_format,
    eeg_imagenet_format,
    kamitani_format,
    laion_fmri_format,
    mosaic_format,
    nod_meeg_format,
    nsd_format,
    nsd_repacks,
    nsd_timeseries,
    things_eeg1_format,
    things_eeg2_derived,
    things_eeg2_format,
    things_fmri_format,
    things_meg_format,
    v4_photographs_format,
    vim1_format,
)
from braindecode_vis.parts.phantom.phantom_config import PhantomConfig
from braindecode_vis.parts.phantom.sizes import LATER, PhantomSize, estimate_image_bytes
from braindecode_vis.parts.phantom.truth import (
    PhantomTruth,
    count_bytes,
    plan_truth,
    read_truth,
    write_summary,
    write_words,
)

_ALL = (
    things_eeg2_format.FORMAT,
    things_eeg2_derived.OFFICIAL,
    things_eeg2_derived.AT_250HZ,
    things_eeg2_derived.UBP,
    things_eeg2_derived.NEUROBRIDGE,
    things_meg_format.FORMAT,
    nsd_format.FORMAT,
    things_fmri_format.FORMAT,
    kamitani_format.GOD,
    bids_eeg.EEG,
    bids_fmri.FMRI,
    things_eeg1_format.FORMAT,
    alljoined_format.ALLJOINED1,
    alljoined_format.ALLJOINED16M,
    eeg_imagenet_format.FORMAT,
    bold5000_nod_format.NOD,
    nod_meeg_format.EEG,
    nod_meeg_format.MEG,
    kamitani_format.DEEPRECON,
    nsd_timeseries.FORMAT,
    nsd_repacks.MINDEYE1,
    nsd_repacks.MINDEYE2,
    nsd_repacks.BRAIN_DIFFUSER,
    bold5000_nod_format.BOLD5000_RAW,
    bold5000_nod_format.BOLD5000_BETAS,
    cneuromod_things_format.FORMAT,
    vim1_format.FORMAT,
    v4_photographs_format.FORMAT,
    laion_fmri_format.FORMAT,
    mosaic_format.FORMAT,
    mosaic_format.MERGED,
    corpus_format.CORPUS,
    corpus_eeg_format.CORPUS_EEG,
)
_BY_NAME = {form.name: form for form in _ALL}
FORMATS: dict[str, str] = {form.name: form.description for form in _ALL}
"""Every format of a phantom, with its description."""
UNLABELLED = tuple(form.name for form in _ALL if form.plan_truth is not None)
"""Formats without events of the pictures: recordings for a corpus."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a phantom.

    Parameters
    ----------
    n_bytes, scratch_bytes
        Size of the final files, and largest size of temporary files at one time.
    seconds
        Computing time on one core of a usual machine, without the image encoder.
    n_images
        Pictures.
    n_trials
        Presentations to all subjects together.
    recording_s
        Recorded time of all subjects together.
    n_steps
        Number of steps that `make_phantom` reports through `advance`.
    """

    n_bytes: int
    scratch_bytes: int
    seconds: float
    n_images: int
    n_trials: int
    recording_s: float
    n_steps: int


def change_size(format: str, size: PhantomSize, **changes: Any) -> PhantomSize:
    """Return a size with other numbers, and no more imagined images than it has test images.

    Only test images are imagined, in sets of equal size, so a smaller test set has fewer; with too few for a set, no
    image is imagined. Numbers of imagined images in `changes` are used unchanged.

    Raises
    ------
    ConfigError
        If there is no such format, or no such field.

    Examples
    --------
    >>> from braindecode_vis.parts.phantom import SIZES
    >>> change_size("nsd", SIZES["nsd"]["tiny"], n_test_concepts=5).n_imagery
    3
    """
    form = get_format(format)
    changed = size.replace(**changes)
    if not size.n_imagery or {"n_imagery", "imagery_repetitions"} & set(changes):
        return changed
    most = changed.n_test_concepts // form.n_imagery_sets * form.n_imagery_sets
    if most >= size.n_imagery:
        return changed
    return changed.replace(n_imagery=most, imagery_repetitions=size.imagery_repetitions if most else 0)


def expect_image_seconds(image_size: int) -> float:
    """Return the time that a usual machine needs to draw an image, write it and compute its drive."""
    return (5.2 + 2.4e-4 * image_size**2) * 1e-3


def estimate_phantom(format: str, size: PhantomSize) -> Estimate:
    """Return the cost of a phantom, without making anything.

    Raises
    ------
    ConfigError
        If there is no such format, or it cannot have this size.

    Examples
    --------
    >>> from braindecode_vis.parts.phantom import SIZES
    >>> round(estimate_phantom("things-eeg2", SIZES["things-eeg2"]["full"]).n_bytes / 1e9)
    139
    """
    form = get_format(format)
    form.check_size(size)
    counts, n_images = form.count(size), form.count_images(size)
    image_bytes = estimate_image_bytes(size.image_size)
    ledger_bytes = 150 * counts.n_steps / 50 + 3000
    return Estimate(
        n_bytes=round(
            counts.n_bytes + n_images * image_bytes + count_bytes(form, size, n_images) + ledger_bytes
        ),
        scratch_bytes=round(counts.scratch_bytes),
        seconds=float(counts.seconds + n_images * expect_image_seconds(size.image_size) + size.n_subjects),
        n_images=n_images,
        n_trials=size.n_subjects * size.n_trials if counts.n_trials is None else counts.n_trials,
        recording_s=float(counts.recording_s),
        n_steps=n_images + counts.n_steps + size.n_subjects,
    )


#: Some file of nearly every phantom is larger.
_LARGE_FILE_BYTES = 1_000_000


def check_space(out: Path, estimate: Estimate) -> None:
    """Raise `DataError` if the disk of `out` has too little space, or the limit on file size is too small.

    Otherwise both errors would come only after minutes of drawing and embedding images.
    """
    limit = _read_file_limit()
    if limit < min(_LARGE_FILE_BYTES, estimate.n_bytes):
        raise DataError(
            f"files may not grow past {describe_bytes(limit)} here, and the phantom has larger ones; raise the limit "
            "with ulimit -f unlimited."
        )
    folder = out.expanduser().absolute()
    # Temporary files begin with a dot and are made again.
    finished = folder.rglob("[!.]*") if folder.is_dir() else ()
    there = sum(path.stat().st_size for path in finished if path.is_file())
    while not folder.is_dir():  # the nearest folder that exists is on the disk that will be written to
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needed = max(0, estimate.n_bytes - there) + estimate.scratch_bytes
    if needed > free:
        raise DataError(
            f"the phantom needs about {_write_size(needed)} more in {out}, but the disk has {_write_size(free)} free; "
            "choose a smaller size or another folder."
        )


def _write_size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _read_file_limit() -> int:
    """Return the largest size of a file that this process may write."""
    try:
        import resource  # not on Windows
    except ImportError:
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def make_phantom(
    format: str,
    out: Path,
    *,
    size: PhantomSize,
    config: PhantomConfig,
    embed: Embed,
    advance: Advance = lambda n: None,
    describe: Callable[[str], Any] = lambda text: None,
    drawn: Callable[[StimulusSet], Any] = lambda stimuli: None,
    jobs: int = 1,
) -> PhantomTruth:
    """Make a complete phantom data set in its authors' format, with its ground truth beside it.

    The files depend only on the arguments. To continue an interrupted call, make the same call again.
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
        The simulated subjects; its number of subjects is replaced by that of `size`.
    embed
        Gives one vector per image; the semantic stages of the simulated brains respond to these vectors. Called once.
    advance
        Called with the number of steps done; they add up to `Estimate.n_steps`.
    describe
        Called with a description of the current work.
    drawn
        Called with the images as soon as they are in their files, before anything is computed from them.
    jobs
        Processes that draw and simulate; the files are the same with any number. With more than one, a script that
        calls this needs ``if __name__ == "__main__":``.

    Returns
    -------
    truth
        The ground truth, with the scores of the ideal observer.

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
    if config.fmri.ongoing_percent is not None and form.ongoing_percent is None:
        raise ConfigError(
            f"a phantom in the format {format} has no time series of fMRI, so ongoing_percent must be left out."
        )
    # The number of subjects comes from the size, so that the request has only one such number.
    config = config.model_copy(update={"n_subjects": size.n_subjects})
    request = {
        "format": format,
        # Options that were added later do not change the requests of earlier folders.
        "size": {
            key: value
            for key, value in dataclasses.asdict(size).items()
            if value is not None or key not in LATER
        },
        "config": config.hashed_fields(),
    }
    ledger = Ledger(out, request, version=form.version)
    ledger.clear_leftovers()
    check_space(out, dataclasses.replace(estimate, scratch_bytes=jobs * estimate.scratch_bytes))
    try:
        with threadpool_limits(1, "blas"):
            return _make(form, ledger, size, config, embed, advance, describe, drawn, jobs)
    except OSError as error:
        if is_disk_full(error, out):
            raise DataError(
                f"the disk is full: the phantom in {out} is not complete; make room and run the same command again."
            ) from error
        raise
    finally:
        shutil.rmtree(out / f".tmp-{os.getpid()}-scratch", ignore_errors=True)


def _make(
    form: Format,
    ledger: Ledger,
    size: PhantomSize,
    config: PhantomConfig,
    embed: Embed,
    advance: Advance,
    describe: Callable[[str], Any],
    drawn: Callable[[StimulusSet], Any],
    jobs: int,
) -> PhantomTruth:
    describe(f"drawing {form.count_images(size)} images")
    table = form.list_images(size, config.seed)
    with _spread(jobs) as spread:
        table = write_image_files(
            table, ledger.root, size=size.image_size, seed=config.seed, advance=advance, spread=spread
        )
        drawn(StimulusSet(table.reset_index(drop=True), ledger.root))
        describe("computing what the images do to the simulated brains")
        drive = compute_drive(
            table, ledger.root, ledger.root / TRUTH, embed=embed, n_semantic=config.n_semantic,
            kind=config.drive, spread=spread,
        )  # fmt: skip
    people = range(form.first_person, form.first_person + size.n_subjects)
    changes: dict[str, Any] = {"n_subjects": people.stop}
    if config.fmri.ongoing_percent is None and form.ongoing_percent:
        changes["fmri"] = config.fmri.model_copy(update={"ongoing_percent": form.ongoing_percent})
    subjects = tuple(make_person(config.model_copy(update=changes), index, drive) for index in people)
    job = PhantomJob(ledger.root, size, config, table, drive, subjects, form.make_recorder(size))
    units = _plan_units(form, job)
    if jobs > 1:
        _finish_together(form, job, units, ledger, advance, describe, jobs)
    for unit in units:
        if jobs == 1:
            _finish(unit, ledger, advance, describe)
    # Written last: if it exists, the phantom is complete.
    if (ledger.root / TRUTH / "phantom.json").is_file():
        if not (ledger.root / TRUTH / "descriptions.csv").is_file():
            write_words(job)  # the phantom is older than descriptions of single images
        return read_truth(ledger.root)
    return write_summary(form, job)


def _finish(unit: Unit, ledger: Ledger, advance: Advance, describe: Callable[[str], Any]) -> None:
    progress = Progress(unit.n_steps, advance)
    if not ledger.is_finished(unit.name):
        describe(unit.name)
        # Only after all files of the unit were written.
        ledger.record(unit.name, unit.write(progress))
    # Skipped units count too, so that the progress bar reaches its end.
    progress.finish()


def _plan_units(form: Format, job: PhantomJob) -> list[Unit]:
    return [*form.plan(job), *plan_truth(form, job)]


#: What remains if a process was killed, and what to do.
_AFTER_KILL = "Finished files are kept: run the same command again, with fewer --jobs if memory ran out."


@contextmanager
def _spread(jobs: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield `map`, or that of several processes."""
    if jobs == 1:
        yield map
        return
    with open_processes(jobs, "draw images", _AFTER_KILL, _use_one_thread) as pool:
        yield pool.map


def _finish_together(
    form: Format,
    job: PhantomJob,
    units: Sequence[Unit],
    ledger: Ledger,
    advance: Advance,
    describe: Callable[[str], Any],
    jobs: int,
) -> None:
    """Finish the units by several processes."""
    running: dict[Future[list[Path]], Unit] = {}

    def collect() -> None:
        for task in as_completed(running):
            unit = running[task]
            ledger.record(unit.name, task.result())
            advance(unit.n_steps)
        running.clear()

    with open_processes(jobs, "simulate recordings", _AFTER_KILL, _take_job, (form.name, job)) as pool:
        for unit in units:
            if ledger.is_finished(unit.name):
                advance(unit.n_steps)
                continue
            if unit.reads_others:
                collect()
            describe(unit.name)
            running[pool.submit(_write_unit, unit.name)] = unit
        collect()
    ledger.sort([unit.name for unit in units])


#: The work of a process that simulates: its job, and the units by name.
_OURS: dict[str, Any] = {}


def _take_job(form: str, job: PhantomJob) -> None:
    _OURS.update(job=job, units={unit.name: unit for unit in _plan_units(get_format(form), job)})
    _use_one_thread()


def _use_one_thread() -> None:
    """Sum in the same order everywhere: several threads of a matrix product end in other last digits."""
    threadpool_limits(1, "blas")


def _write_unit(name: str) -> list[Path]:
    unit, scratch = _OURS["units"][name], _OURS["job"].root / f".tmp-{os.getpid()}-scratch"
    try:
        return list(unit.write(Progress(unit.n_steps, lambda n: None)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def get_format(name: str) -> Format:
    """Return a format by its name."""
    check_option("the format of a phantom", name, FORMATS)
    return _BY_NAME[name]


class Ledger:
    """The list of finished units of one folder.

    Parameters
    ----------
    root
        Folder of the data set; made if it is missing.
    request
        Format, size and configuration, as plain values.
    version
        Version of the format.

    Raises
    ------
    ConfigError
        If the folder holds another phantom, or files that are not a phantom.
    """

    def __init__(self, root: Path, request: Mapping[str, Any], *, version: int = 1) -> None:
        self.root, self.path = root, root / TRUTH / "finished.json"
        self.request = json_plain(request)
        self.fingerprint = compute_fingerprint("phantom", version, self.request, {})
        self.units: dict[str, dict[str, int]] = {}
        if any(parent.exists() and not parent.is_dir() for parent in root.absolute().parents):
            raise ConfigError(f"{root} is below a file, not a folder; choose another folder.")
        if self.path.is_file():
            kept = read_json(self.path)
            # Files of two requests in one folder would be a mixed data set.
            if kept["fingerprint"] != self.fingerprint:
                changed = (
                    "; ".join(_compare(kept["request"], self.request)) or "the code of the simulation changed"
                )
                raise ConfigError(
                    f"{root} holds another phantom ({changed}); choose another folder, or delete this one first."
                )
            self.units = kept["units"]
        elif root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ConfigError(f"{root} is not empty and holds no phantom; choose a new or an empty folder.")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()

    def is_finished(self, unit: str) -> bool:
        """Say whether every file of a unit exists and has its recorded size."""
        files = self.units.get(unit)
        # Sizes and no digests: a phantom has gigabytes, and truncated files have another size.
        return files is not None and all(
            (self.root / name).is_file() and (self.root / name).stat().st_size == n_bytes
            for name, n_bytes in files.items()
        )

    def record(self, unit: str, paths: Sequence[Path]) -> None:
        """Record that a unit is finished."""
        self.units[unit] = {
            path.relative_to(self.root).as_posix(): path.stat().st_size for path in sorted(paths)
        }
        self._write()

    def sort(self, names: Sequence[str]) -> None:
        """Put the finished units into this order."""
        self.units = {name: self.units[name] for name in names}
        self._write()

    def clear_leftovers(self) -> None:
        """Delete unfinished files of processes that have ended; files of running processes are kept."""
        for path in list(self.root.rglob(".tmp-*")):
            # Temporary names contain the number of their process.
            owner = re.match(r"\.tmp-(\d+)-", path.name)
            if owner is None:
                continue
            # This process has begun nothing yet: an earlier one had its number.
            if int(owner[1]) != os.getpid() and is_alive(int(owner[1])):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(self.path, {"fingerprint": self.fingerprint, "request": self.request, "units": self.units})


def _compare(old: Any, new: Any, name: str = "") -> list[str]:
    """Return a description of the differences between two plain values."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_compare(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in {**old, **new}]
        return [entry for part in parts for entry in part]
    return [] if old == new else [f"{name} is {old} there, not {new}"]
