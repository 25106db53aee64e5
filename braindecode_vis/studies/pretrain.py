"""Leave the encoder that a run has pretrained where it can be named, and let several processes pretrain it together."""

from __future__ import annotations

import shutil
from pathlib import Path

from braindecode_vis import store
from braindecode_vis.pipeline import learning
from braindecode_vis.pipeline.runs import Run, remember
from braindecode_vis.pipeline.together import work_together

FOLDER = "pretrained"


@remember
def pretrain(run: Run) -> Path:
    """Pretrain by `learning.pretrain` and return the folder for ``encoder.network.pretrained``.

    Parameters
    ----------
    run
        A run whose configuration has a section ``pretrain``; test trials are never read.

    Raises
    ------
    ConfigError
        If the configuration has no such section.
    DataError
        If every trial is tested by some fold.
    """
    artifact, published = learning.pretrain(run), run.folder.path / FOLDER
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
