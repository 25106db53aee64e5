"""Checkpoints of the training of a prior: one safetensors file that is replaced atomically, and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.store import hash_json, replace_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass
class State:
    """Everything that changes while training: a checkpoint holds all of it."""

    network: nn.Module
    average: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    best_loss: float | None = None
    best_epoch: int | None = None
    best: dict[str, Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def sign_training(network: nn.Module, recipe: Mapping[str, Any], rows: Sequence[np.ndarray | None]) -> str:
    """Return a digest of all that a checkpoint depends on: the recipe, the network's shapes, the rows.

    Parameters
    ----------
    network
        Only the names and shapes of its tensors count.
    recipe
        Plain values.
    rows
        Arrays that the training reads; each is named by its shape and two sums.
    """
    parts = {
        "recipe": dict(recipe),
        "network": [[name, list(value.shape)] for name, value in network.state_dict().items()],
        "rows": [None if array is None else _sum_up(np.asarray(array)) for array in rows],
    }
    return hash_json(parts)


def _sum_up(array: np.ndarray) -> list[Any]:
    weights = np.linspace(1, 2, len(array))  # the order of rows counts as well
    flat = array.reshape(len(array), -1)
    return [
        *array.shape,
        float(flat.sum(dtype=np.float64)),
        float(weights @ flat.sum(axis=1, dtype=np.float64)),
    ]


def write_checkpoint(path: Path, state: State, signature: str) -> None:
    """Write everything that changes while training as one safetensors file, replacing the one before."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    groups = {"network": state.network.state_dict(), "average": state.average, "best": state.best or {}}
    tensors = {
        f"{group}.{name}": value for group, entries in groups.items() for name, value in entries.items()
    }
    for index, entries in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in entries.items()}
    meta = {
        "signature": signature, "epoch": state.epoch, "step": state.step, "best_loss": state.best_loss,
        "best_epoch": state.best_epoch, "history": state.history,
    }  # fmt: skip
    plain = {name: value.detach().clone().contiguous().cpu() for name, value in tensors.items()}
    with replace_atomically(path) as temporary:
        save_file(plain, temporary, metadata={"prior": json.dumps(meta)})


def read_checkpoint(path: Path, state: State, signature: str) -> None:
    """Put a checkpoint into `state`, if it belongs to this training."""
    from safetensors import SafetensorError, safe_open

    device = next(state.network.parameters()).device
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta = json.loads((file.metadata() or {}).get("prior", "{}"))
            if meta.get("signature") != signature:
                return
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}); delete it and train again.") from error
    groups: dict[str, dict[str, Any]] = {"network": {}, "average": {}, "best": {}}
    moments: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        if group == "optimiser":
            index, _, key = rest.partition(".")
            moments.setdefault(int(index), {})[key] = value
        else:
            groups[group][rest] = value.to(device)
    state.network.load_state_dict(groups["network"])
    state.average = groups["average"]
    state.best = groups["best"] or None
    state.optimiser.load_state_dict(
        {"state": moments, "param_groups": state.optimiser.state_dict()["param_groups"]}
    )
    state.epoch, state.step, state.history = meta["epoch"], meta["step"], meta["history"]
    state.best_loss, state.best_epoch = meta["best_loss"], meta["best_epoch"]
