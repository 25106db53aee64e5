"""Where the numbers of a training go: always a JSONL file in the workspace, TensorBoard and W&B where asked for.

Both are extras; a missing one is a `ConfigError` before the training starts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braindecode_vis.checks import ConfigError
from braindecode_vis.store import replace_atomically

LOG_FILE = "training.jsonl"
_INSTALL = "pip install 'braindecode_vis[tracking]'"


class TrainingLog:
    """Writes one record per epoch to every place.

    Parameters
    ----------
    workspace
        Folder of the log files; None keeps records in memory only.
    kinds
        Further places: ``tensorboard``, ``wandb``.
    first_epoch
        Epoch that comes next; records of this and later epochs, left by a run that was killed, are dropped.
    config
        Settings to show beside the curves.
    """

    def __init__(
        self, workspace: Path | None, kinds: Sequence[str], *, first_epoch: int, config: dict[str, Any]
    ) -> None:
        self.path = None if workspace is None else workspace / LOG_FILE
        self.board: Any = None
        self.wandb: Any = None
        if workspace is None and any(kind != "jsonl" for kind in kinds):
            raise ConfigError("encoder.log names a tracker, which needs a workspace folder to write into.")
        if self.path is not None and workspace is not None:
            workspace.mkdir(parents=True, exist_ok=True)
            self._drop_from(first_epoch)
            if "tensorboard" in kinds:
                self.board = _open_tensorboard(workspace / "tensorboard", first_epoch)
            if "wandb" in kinds:
                self.wandb = _open_wandb(workspace, config)

    def _drop_from(self, first_epoch: int) -> None:
        assert self.path is not None
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
                if json.loads(line).get("epoch", -1) < first_epoch:
                    kept.append(line)
        with replace_atomically(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; `epoch` is its step on the curves."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in _flatten(record).items() if isinstance(v, int | float)}
        if self.board is not None and "epoch" in record:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["epoch"])
            self.board.flush()
        if self.wandb is not None and "epoch" in record:
            self.wandb.log(numbers, step=record["epoch"])

    def close(self) -> None:
        """Finish the trackers."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _open_tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"encoder.log asks for tensorboard, which is not installed: {_INSTALL}.") from error
    return SummaryWriter(str(folder), purge_step=first_epoch)


def _open_wandb(workspace: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"encoder.log asks for wandb, which is not installed: {_INSTALL}.") from error
    return wandb.init(project="braindecode_vis", dir=str(workspace), config=config, resume="allow")
