"""The stages up to training, by several processes in one run folder.

The first process does, writes and tells what a single one would. The others wait for what only one has to compute, read
it from the run folder, and take their part of every batch of every training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from braindecode_vis.checks import ConfigError
from braindecode_vis.pipeline.learning import train
from braindecode_vis.runs import Run
from braindecode_vis.store import Artifact
from braindecode_vis.training.processes import is_first, join_processes, tell_all


def train_together(run: Run) -> None:
    """Train every fold with all launched processes, which share the run folder.

    Afterwards the processes are alone again, and the run of the first one holds the trained folds.

    Raises
    ------
    ConfigError
        If the encoder is not a network.
    """
    encoder: Any = run.config.encoder
    if encoder.kind != "network":
        raise ConfigError(
            f"encoder.kind={encoder.kind} is fitted by one process; start it without torchrun, or set "
            "encoder.kind=network."
        )
    with join_processes(encoder.device):
        train(_SharedRun(run.config, run.folder, run.listener, run.seen, follows=not is_first()))


@dataclass
class _SharedRun(Run):
    """A run whose folder several processes work in."""

    def produce(
        self,
        stage: str,
        fields: Mapping[str, Any],
        upstream: Mapping[str, str],
        compute: Callable[[Path], Mapping[str, Any] | None],
        unit: str = "",
    ) -> Artifact:
        """Let the first process produce the artifact, with the help of the others where it trains."""
        helped = stage == "train"
        if self.follows:
            if helped and tell_all():
                with TemporaryDirectory() as scratch:
                    compute(Path(scratch))
            tell_all()
            return super().produce(stage, fields, upstream, compute, unit)
        called = False

        def compute_with_help(folder: Path) -> Mapping[str, Any] | None:
            nonlocal called
            called = tell_all(True)
            return compute(folder)

        artifact = super().produce(stage, fields, upstream, compute_with_help if helped else compute, unit)
        if helped and not called:
            tell_all(False)
        tell_all()  # it is written
        return artifact
