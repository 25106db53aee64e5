"""The stages up to training, and the images of a run, by several processes in one run folder.

Training and pretraining by several processes (torchrun, or the tasks of a Slurm job): the first one computes, writes
and reports what a single process would. The others wait for what only one has to compute, read it from the run folder,
and take their part of every batch.

Fits and images by several processes: none needs to know of another. Each fits the folds that no other one works on, and
makes its share of the batches of images from the same fits, without the lock of the run folder; the one that finds no
image missing finishes the stage, under the lock.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Context
from braindecode_vis.base.devices import (
    broadcast_flag,
    is_first,
    join_processes,
    naming_lost_processes,
    spans_machines,
)
from braindecode_vis.base.locks import BeingMade
from braindecode_vis.pipeline.decoding import (
    ask_images,
    find_shared_fits,
    make_generator_data,
    make_tested_fold,
    name_images,
    open_branches,
    open_writer,
    predict_for_generator,
    reconstruct,
    retrieve,
    share_fits,
)
from braindecode_vis.pipeline.image_files import Share
from braindecode_vis.pipeline.learning import (
    needs_predictions,
    predict_fold,
    predict_out_of_fold,
    train,
    train_fold,
)
from braindecode_vis.pipeline.preparing import count_folds, embed, preprocess, refuse_categories
from braindecode_vis.pipeline.runs import Compute, Run, name_workspace


def train_together(run: Run) -> None:
    """Train every fold with all launched processes, which share the run folder, and the refits that will be asked for.

    Afterwards the processes are alone again, and the run of the first one holds the trained folds.

    Raises
    ------
    ConfigError
        If the encoder is not a network.
    DataError
        If another process has ended, or does not see the same run folder.
    """
    check_trains_together(run)
    encoder: Any = run.config.encoder

    def work(shared: Run) -> None:
        train(shared)
        if needs_predictions(run):  # refits, which one process alone would wait for later
            predict_out_of_fold(shared)

    work_together(run, work, device=encoder.device, setting="encoder.device")


def check_trains_together(run: Run) -> None:
    """Raise `ConfigError` if the encoder of a run is fitted by one process alone."""
    if not run.encoder.trains_in_processes:
        other = "network_categories" if run.config.decodes_categories else "network"
        raise ConfigError(
            f"encoder.kind={run.config.encoder.kind} is fitted by one process; start it without torchrun, or set "
            f"encoder.kind={other}."
        )


def work_together(run: Run, work: Callable[[Run], object], *, device: str, setting: str) -> None:
    """Let all launched processes do one work, of which the first one writes the artifacts.

    Parameters
    ----------
    run
        The run, of which each process has one.
    work
        Called in every process with a run whose `follows` says whether another one writes.
    device, setting
        What the work runs on, and what the user calls that.

    Raises
    ------
    DataError
        If another process has ended, or does not see the same run folder.
    """
    with join_processes(device, setting=setting), naming_lost_processes():
        work(_SharedRun(run.config, run.folder, run.listener, run.seen, follows=not is_first()))


#: A file system that keeps what it knows of folders, as NFS does, asks again after a minute at most.
_SHOWN_S = 70.0


@dataclass
class _SharedRun(Run):
    """A run whose folder several processes work in."""

    @contextmanager
    def share(self, stage: str, compute: Compute, is_there: Callable[[], bool]) -> Iterator[Compute]:
        """Let the first process produce the artifact, with the help of the others where it trains."""
        helped = stage in ("train", "out_of_fold", "pretrain")
        if self.follows:
            if helped and broadcast_flag():
                compute(Path(os.devnull))  # one that follows writes nothing
            broadcast_flag()  # the first process has written
            # A disk of several machines shows a new folder to the others some seconds later.
            last = time.monotonic() + _SHOWN_S
            while spans_machines() and time.monotonic() < last and not is_there():
                time.sleep(0.5)
            yield self._refuse
            return
        computed = False

        def compute_with_help(folder: Path) -> Mapping[str, Any] | None:
            nonlocal computed
            computed = True
            if helped:
                broadcast_flag(True)
            return compute(folder)

        yield compute_with_help
        if helped and not computed:
            broadcast_flag(False)
        broadcast_flag()

    def _refuse(self, folder: Path) -> NoReturn:
        raise DataError(
            f"the files of the first process are not in {self.folder.path} on {platform.node()}; all processes need "
            "the same run folder and the same files of the data set."
        )


# --- fits -------------------------------------------------------------------------------------------------


def check_worker(worker: int, n_workers: int) -> None:
    """Raise `ConfigError` if there is no such process."""
    if not 0 <= worker < n_workers:
        raise ConfigError(
            f"there is no worker {worker} of {n_workers}; they are counted from 0 to {max(0, n_workers - 1)}."
        )


def order_work(n: int, worker: int, n_workers: int) -> list[int]:
    """Return the numbers of `n` pieces of work as one of several processes takes them: each begins with another."""
    first = worker * n // n_workers
    return [*range(first, n), *range(first)]


def fit_share(run: Run, worker: int, n_workers: int) -> int:
    """Make the fits of a run that no other process makes: of each fold, with what priors and branches need of it.

    No process needs to know of another, nor how many folds there are: each begins with another fold, and goes on with
    those that nobody works on.

    Parameters
    ----------
    run
        The run; its folder is shared by all processes, and not held.
    worker
        Number of this process, from 0.
    n_workers
        How many there are.

    Returns
    -------
    int
        Folds that are left to other processes.
    """
    check_worker(worker, n_workers)
    shared = _pass_by(run)
    n_folds, n_left = count_folds(shared), 0
    wanted = [(shared, needs_predictions(run))]
    if not run.config.decodes_categories:
        branches = open_branches(shared).values()
        wanted += [(_pass_by(branch), branch.prior.needs_predictions) for branch in branches]
    for number in order_work(n_folds, worker, n_workers):
        for each, predicts in wanted:
            try:
                train_fold(each, number)
                if predicts:
                    predict_fold(each, number)
            except BeingMade:
                n_left += 1
    return n_left


def _pass_by(run: Run) -> Run:
    """Return a run that does not hold its folder, nor wait for fits."""
    own = not run.config.decodes_categories and run.target.fitted_on_training_images
    stages = {"train", "out_of_fold", *(["embed"] if own else [])}
    return replace(run, passes_by=frozenset(stages))


# --- images -----------------------------------------------------------------------------------------------


def reconstruct_share(run: Run, worker: int, n_workers: int) -> bool:
    """Make one process's share of the images of `reconstruct`, and finish the stage if nothing is missing then.

    Every process makes the same batches as one alone, so that the images do not depend on their number.

    Parameters
    ----------
    run, worker, n_workers
        As for `fit_share`.

    Returns
    -------
    bool
        Whether the stage is finished; otherwise the listener knows what is missing.

    Raises
    ------
    ConfigError
        If there are no images to share, or no such process.
    """
    refuse_categories(run, "reconstruct")
    check_worker(worker, n_workers)
    if run.generator.copies_training_images:
        raise ConfigError(
            f"generator.kind={run.config.generator.kind} copies training images, so there is nothing to share; start "
            "reconstruct once, without --workers and torchrun."
        )
    with run.hold():  # one process makes what all need, the others wait and read it
        fields, upstream = name_images(run)
        folder = name_workspace(run, "images", ask_images(fields, upstream))
        if made := run.has("reconstruct", fields, upstream):
            reconstruct(run)
        else:
            share_fits(run, folder)
    if made:
        return True
    n_images = _draw_share(run, folder, worker, n_workers)
    with run.hold():  # another one may be finishing the stage
        n_rows = sum(len(fold.predicted) for fold in retrieve(run).folds)
        made = run.has("reconstruct", fields, upstream)
        with open_writer(run, folder, n_rows) as writer:
            n_missing = 0 if made else n_images - writer.n_kept
        if not n_missing:
            reconstruct(run)
            return True
    run.tell(
        f"worker {worker} of {n_workers} has finished its share; {n_missing} of {n_images} images are "
        "still missing, and the "
        "last of the other workers finishes the stage (if a worker was stopped, run its command again, "
        "or run reconstruct without --workers to make the missing images)",
        "reconstruct:",
    )
    return False


def _draw_share(run: Run, folder: Path, worker: int, n_workers: int) -> int:
    """Make the share of one process from the fits in `folder`, and return how many images all processes make."""
    from braindecode_vis.pipeline.reconstruction import draw_images, open_fits

    config, retrieved = run.config, retrieve(run)
    n_rows = sum(len(fold.predicted) for fold in retrieved.folds)
    with (
        store.open_scratch(folder, "shown") as shown,
        open_writer(run, folder, n_rows, Share(worker, n_workers, shown)) as writer,
    ):
        n_images = sum(writer.sizes.values())
        with run.listener.progress("reconstructing", n_images) as advance:
            first = 0
            for number in range(len(embed(run))):
                predicted, embeddings = predict_for_generator(run, number)
                # Nothing is left to learn, and so nothing to keep.
                data = make_generator_data(run, number, embeddings, Context(device=config.retrieval.device))
                fits = find_shared_fits(folder, number)
                if fits is None:
                    raise DataError(
                        f"the fits of fold {number} in {folder} were removed or changed by another "
                        "command; run the same command again."
                    )
                fitted = open_fits(fits, config, data, embeddings.select(pd.unique(predicted.ids)), number)
                fold = make_tested_fold(run, number, predicted, embeddings)
                draw_images(
                    config, data, preprocess(run).stimuli, fold, fitted, writer, first=first, advance=advance
                )
                first += len(predicted)
    return n_images


#: The command without the current folder on the path, where a file named like any module would be run in its place.
_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import braindecode_vis; del sys.path[0]; "
    "from braindecode_vis.cli import main; main()"
)


def make_command(words: Sequence[str]) -> list[str]:
    """Return program and arguments of a command of this package, as a process of its own."""
    return [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[2]), *words]


#: By which a user bounds the threads of numerical libraries; the first holds for all that name none.
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def limit_threads(n_processes: int) -> dict[str, str]:
    """Return the environment of one of several processes that use the machine once together.

    What the user has set is kept.
    """
    # Each library would otherwise start as many threads as there are cores, in every process.
    threads = str(max(1, (os.cpu_count() or 1) // n_processes))
    default = os.environ.get(THREAD_LIMITS[0]) or threads
    return {**os.environ, **{name: os.environ.get(name) or default for name in THREAD_LIMITS}}


def describe_thread_limits() -> str:
    """Return a sentence if the user has bounded the threads of numerical libraries; empty otherwise."""
    found = [f"{name}={os.environ[name]}" for name in THREAD_LIMITS if os.environ.get(name)]
    return f"every process keeps your {', '.join(found)}" if found else ""


def read_last_line(log: Path) -> str:
    """Return what a command that failed said, the one sentence that it prints last; empty if it said nothing."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""
