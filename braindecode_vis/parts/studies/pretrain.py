"""Leave the encoder that a run has pretrained where it can be named, let several processes pretrain it together, and
pretrain on corpora without any run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.devices import count_launched, is_first, join_processes, naming_lost_processes
from braindecode_vis.base.locks import hold_folder
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.settings import describe_validation_error
from braindecode_vis.pipeline import preparing
from braindecode_vis.pipeline.runs import ProgressListener, Run, SilentListener, remember
from braindecode_vis.pipeline.together import work_together
from braindecode_vis.training.pretraining_config import PretrainConfig

FOLDER = "pretrained"
WORK = "work"


@remember
def pretrain(run: Run) -> Path:
    """Pretrain by `preparing.pretrain` and return the folder for ``encoder.network.pretrained``.

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
    artifact, published = preparing.pretrain(run), run.folder.path / FOLDER
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


def pretrain_on_corpora(
    changes: Mapping[str, Any],
    corpora: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    listener: ProgressListener | None = None,
) -> dict[str, Any]:
    """Pretrain on corpora without a configuration and return what was reached; the encoder lies in `out`.

    Parameters
    ----------
    changes
        Settings of `PretrainConfig` that differ from the defaults, nested.
    corpora
        Their folders.
    out
        Folder for ``encoder.network.pretrained``; an interrupted training there goes on, a finished one of the same
        settings is reused.
    seed
        Root seed.
    listener
        Shows the progress.

    Raises
    ------
    ConfigError
        If a setting is wrong, or `out` holds an encoder of other settings, or something else.
    """
    from braindecode_vis.encoders.parcels_config import DESCRIPTION
    from braindecode_vis.training.pretraining import pretrain as fit

    config = make_settings({**changes, "corpus": [str(folder) for folder in corpora]})
    listener = SilentListener() if listener is None else listener
    fingerprint = store.hash_json({"pretrain": config.hashed_fields(), "seed": seed})
    out, first = out.expanduser(), is_first()
    if first:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        # Besides hidden files and the logs of a job.
        if names - {"jobs"} and not {DESCRIPTION, WORK} & names:
            raise ConfigError(f"{out} holds other files than an encoder; choose another folder with --out.")
        out.mkdir(parents=True, exist_ok=True)

    def work() -> dict[str, Any]:
        found = store.read_json(out / DESCRIPTION) if (out / DESCRIPTION).is_file() else None
        if found is not None:
            if found.get("fingerprint") != fingerprint:
                raise ConfigError(
                    f"{out} holds an encoder that was pretrained with other settings, another seed or other corpora; "
                    "choose another folder with --out, or delete that one."
                )
            reached: dict[str, Any] = found["reached"]
            return reached
        reached = fit(
            config, None, folder=out, checkpoints=out / WORK, seed=derive_seed(seed, "pretrain"),
            progress=listener.progress, labelled=preparing.read_labelled(config, seed, out / WORK),
            fingerprint=fingerprint,
        )  # fmt: skip
        if first:
            shutil.rmtree(out / WORK, ignore_errors=True)
        return reached

    if count_launched() > 1:
        with join_processes(config.device, setting="pretrain.device"), naming_lost_processes():
            return work()
    with hold_folder(out, fingerprint, lambda text: _tell(listener, text)):
        (out / WORK).mkdir(exist_ok=True)
        return work()


def _tell(listener: ProgressListener, text: str) -> None:
    with listener.watch("pretraining:") as show:
        show(0, 0, text)


def make_settings(changes: Mapping[str, Any]) -> PretrainConfig:
    """Return validated settings; a wrong one is a `ConfigError` of one sentence."""
    try:
        return PretrainConfig.model_validate(dict(changes))
    except ValidationError as error:
        raise ConfigError(f"{describe_validation_error(error, 'pretrain')}.") from error


def _publish(artifact: store.Artifact, folder: Path) -> Path:
    """Copy the result to a name without a fingerprint, the old one replaced at once."""
    folder.mkdir(exist_ok=True)
    for path in sorted(artifact.path.iterdir()):
        if path.name != store.PROVENANCE:
            with store.replace_atomically(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    return folder
