"""Checkpoints of a training that may be killed at any moment.

One safetensors file holds every tensor (weights, averages, queue, moments of the optimiser) and, in its header, the
plain state as JSON, so that one rename makes both visible at once. No pickle. A checkpoint names what it belongs to,
and is refused, by name, by anything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braindecode_vis.checks import DataError
from braindecode_vis.store import json_plain, replace_atomically

CHECKPOINT = "checkpoint.safetensors"
_MEANING = {
    "network": "another architecture",
    "config": "other settings of the encoder",
    "signal": "trials of other axes, channels or subjects",
    "target": "another target space",
    "data": "other training trials",
    "seed": "another seed",
    "n_processes": "another number of processes",
}


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write tensors and plain state into one file, atomically.

    Parameters
    ----------
    folder
        Made if missing.
    tensors
        By name; shared memory is written twice.
    state
        What JSON can hold.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: set[int] = set()
    for name, value in plain.items():
        if value.data_ptr() in seen:
            plain[name] = value.clone()
        seen.add(value.data_ptr())
    with replace_atomically(path) as temporary:
        save_file(plain, temporary, metadata={"state": json.dumps(json_plain(state), allow_nan=False)})
    return path


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and state of the checkpoint in a folder, None if there is none.

    Raises
    ------
    DataError
        If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 - not a mapping
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise DataError(f"the checkpoint {path} is damaged ({error}); delete it to train anew.") from error


def check_identity(expected: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Raise `DataError` naming the first thing in which a checkpoint belongs to another training."""
    plain = json_plain(expected)
    for key, value in plain.items():
        if found.get(key) == value:
            continue
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


def take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, by their remaining names."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def put(tensors: dict[str, Tensor], prefix: str, values: dict[str, Tensor]) -> None:
    """Add tensors below a prefix."""
    tensors.update({f"{prefix}.{name}": value for name, value in values.items()})


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state by number of the parameter."""
    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, entry in optimiser.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Bring an optimiser into the state that `pack_optimiser` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
