"""Pretrain the parcel encoder of a configuration on its responses, and leave the result where it can be named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from braindecode_vis import pipeline, store
from braindecode_vis.checks import ConfigError
from braindecode_vis.devices import count_launched
from braindecode_vis.pipeline.runs import Run, remember
from braindecode_vis.pipeline.together import work_together
from braindecode_vis.seeds import derive_seed

FOLDER = "pretrained"


@remember
def pretrain(run: Run) -> Path:
    """Train the masked autoencoder without labels and return the folder for ``encoder.network.pretrained``.

    Parameters
    ----------
    run
        A run whose configuration has a section ``pretrain``; test trials are never read.

    Raises
    ------
    ConfigError
        If the configuration has no such section.
    """
    config = run.config.pretrain
    if config is None:
        raise ConfigError(
            f"{run.config.name} has no section pretrain; add one, for example --set pretrain.n_epochs=100."
        )
    prepared = pipeline.preprocess(run)
    seed = derive_seed(run.config.seed, "pretrain")

    def compute(folder: Path) -> dict[str, Any]:
        from braindecode_vis.training.pretraining import pretrain as fit

        checkpoints = run.folder.path / "work" / "pretrain"
        if not run.follows:
            checkpoints.mkdir(parents=True, exist_ok=True)
        found = fit(
            config, prepared.responses, folder=folder, checkpoints=checkpoints, seed=seed,
            progress=run.listener.progress,
        )  # fmt: skip
        # Kept until here, so that an interrupted training goes on.
        if not run.follows:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return {**found, "n_processes": count_launched()}

    fields = {"pretrain": config.hashed_fields(), "seed": run.config.seed}
    artifact = run.produce("pretrain", fields, {"preprocess": prepared.artifact.fingerprint}, compute)
    published = run.folder.path / FOLDER
    return published if run.follows else _publish(artifact, published)


def pretrain_together(run: Run) -> None:
    """Pretrain with all launched processes, which share the run folder.

    Raises
    ------
    DataError
        If another process has ended, or does not see the same run folder.
    """
    device = (
        "cpu" if run.config.pretrain is None else run.config.pretrain.device
    )  # which is refused in the group
    work_together(run, pretrain, device=device, setting="pretrain.device")


def _publish(artifact: store.Artifact, folder: Path) -> Path:
    """Copy the result to a name without a fingerprint, the old one replaced at once."""
    folder.mkdir(exist_ok=True)
    for path in sorted(artifact.path.iterdir()):
        if path.name != store.PROVENANCE:
            with store.replace_atomically(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    return folder
