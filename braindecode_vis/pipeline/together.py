"""The stages up to training, by several processes in one run folder.

Training by several processes (torchrun): the first one computes, writes and reports what a single process would. The
others wait for what only one has to compute, read it from the run folder, and take their part of every batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import broadcast_flag, is_first, join_processes, naming_lost_processes
from braindecode_vis.pipeline.learning import needs_predictions, predict_out_of_fold, train
from braindecode_vis.pipeline.runs import Compute, Run


def train_together(run: Run) -> None:
    """Train every fold with all launched processes, which share the run folder, and the refits that will be asked for.

    Afterwards the processes are alone again, and the run of the first one holds the trained folds.

    Raises
    ------
    ConfigError
        If the encoder is not a network that finds images.
    DataError
        If another process has ended, or does not see the same run folder.
    """
    encoder: Any = run.config.encoder
    if not run.encoder.trains_in_processes:
        other = "" if run.config.decodes_categories else ", or set encoder.kind=network"
        raise ConfigError(
            f"encoder.kind={encoder.kind} is fitted by one process; start it without torchrun{other}."
        )
    with join_processes(encoder.device), naming_lost_processes():
        shared = _SharedRun(run.config, run.folder, run.listener, run.seen, follows=not is_first())
        train(shared)
        if needs_predictions(run):  # refits, which one process alone would wait for later
            predict_out_of_fold(shared)


@dataclass
class _SharedRun(Run):
    """A run whose folder several processes work in."""

    @contextmanager
    def share(self, stage: str, compute: Compute) -> Iterator[Compute]:
        """Let the first process produce the artifact, with the help of the others where it trains."""
        helped = stage in ("train", "out_of_fold")
        if self.follows:
            if helped and broadcast_flag():
                compute(Path(os.devnull))  # one that follows writes nothing
            broadcast_flag()  # the first process has written
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
            f"what the first process wrote is not in {self.folder.path} here; all processes need the same run folder "
            "and the same files of the data set."
        )
