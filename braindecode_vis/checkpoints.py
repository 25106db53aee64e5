"""Checkpoints of trainings that may be killed at any moment.

One safetensors file holds every tensor (weights, averages, moments of the optimiser) and, in its header, the plain
state as JSON, so that one rename makes both visible at once. No pickle. A checkpoint names what it belongs to, and is
refused, by name, by anything else. Knows no training. Imports torch inside functions only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.store import json_plain, replace_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: What a difference in an entry of an identity means.
_MEANING = {
    "network": "another architecture",
    "config": "other settings",
    "signal": "trials of other axes, channels or subjects",
    "target": "another target space",
    "data": "other training data",
    "seed": "another seed",
    "n_processes": "another number of processes",
}


def write_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Write tensors and plain state into one file that replaces the former at once.

    Parameters
    ----------
    path
        Its folder is made if missing.
    groups
        Tensors by group and name; `take` gives a group back. Shared memory is written twice.
    state
        What JSON can hold; `identity` in it is what `check_identity` compares.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    # safetensors writes contiguous host memory only.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        if tensor.data_ptr() in seen:  # safetensors refuses two names of the same memory
            plain[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    with replace_atomically(path) as temporary:
        save_file(plain, temporary, metadata={"state": json.dumps(json_plain(state), allow_nan=False)})


def read_checkpoint(
    path: Path, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and state of a checkpoint, None if there is none.

    Parameters
    ----------
    path
        The file. What a run that was killed while writing it left beside it is deleted.
    identity
        What the checkpoint must belong to; None does not ask.

    Raises
    ------
    DataError
        If the file is damaged, no checkpoint, or one of another training.
    """
    from safetensors import SafetensorError, safe_open

    for left_over in path.parent.glob(f".tmp-*-{path.name}"):
        left_over.unlink(missing_ok=True)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        state = json.loads(header["state"]) if "state" in header else None
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise DataError(f"the checkpoint {path} is damaged ({error}); delete it to train anew.") from error
    if not isinstance(state, dict):
        raise DataError(
            f"{path} is no checkpoint of a training, or one of an older version; delete it to train anew."
        )
    if identity is not None:
        check_identity(identity, state.get("identity", {}), path)
    return tensors, state


def check_identity(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Raise `DataError` naming the first thing in which a file belongs to another training."""
    plain = json_plain(dict(expected))
    for key, value in plain.items():
        if found.get(key) == value:
            continue
        # The first entry that differs, down to the setting, says more than two digests.
        was, now = _show_difference(found.get(key), value)
        raise DataError(
            f"{path} belongs to {_MEANING.get(key, f'another {key}')} ({was}, now {now}); "
            "delete it to train anew, or go back to what it was made with."
        )


def _show_difference(old: Any, new: Any, name: str = "") -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _show_difference(old.get(key), new.get(key), f"{name}.{key}".strip("."))
    left, right = (str(v)[:80] for v in (old, new))
    return (f"{name}: {left}" if name else left), right


def list_shapes(network: nn.Module) -> list[list[Any]]:
    """Return name and shape of each tensor of a network, which tell it from another architecture."""
    return [[name, list(tensor.shape)] for name, tensor in network.state_dict().items()]


def sum_rows(arrays: Iterable[np.ndarray | None]) -> list[Any]:
    """Return the shape and two sums of each array, which tell it from other data without hashing it.

    The second sum weighs rows by their place, so that the same rows in another order are other data.
    """
    sums: list[Any] = []
    for array in arrays:
        if array is None:
            sums.append(None)
            continue
        weights = np.linspace(1, 2, len(array))
        rows = array.reshape(len(array), -1)
        total = float(rows.sum(dtype=np.float64))
        sums.append([*array.shape, total, float(weights @ rows.sum(axis=1, dtype=np.float64))])
    return sums


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, what: str) -> None:
    """Copy weights into a model; other names or shapes are a `DataError` that names the first.

    Parameters
    ----------
    model
        The module to fill.
    tensors
        Its state by name.
    what
        Where they came from, in the message.
    """
    own = model.state_dict()
    missing, surplus = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = sorted(k for k in set(own) & set(tensors) if own[k].shape != tensors[k].shape)
    if missing or surplus or wrong:
        if wrong:
            name = wrong[0]
            detail = f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        else:
            detail = (
                f"it lacks {missing[0]}" if missing else f"it holds {surplus[0]}, which nothing here uses"
            )
        raise DataError(
            f"{what} is of another architecture ({detail}); use the settings it was trained with."
        )
    model.load_state_dict(tensors)


def take(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Return the tensors of a group by their names in it."""
    return {name[len(group) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{group}.")}


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of an optimiser by number of the parameter."""
    import torch

    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, entry in optimiser.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Bring an optimiser into the state that `pack_optimiser` gave; rates and decays stay its own."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    # Its own groups: rates follow from the number of the step.
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
