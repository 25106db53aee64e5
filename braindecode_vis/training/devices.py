"""Device, precision and processes of a training, through Hugging Face accelerate; and what running out of memory is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from braindecode_vis.checks import ConfigError
from braindecode_vis.training.gathering import count_processes

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def find_device(name: str) -> torch.device:
    """Return the device of this process for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    ConfigError
        If a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("encoder.device is cuda, but torch sees no GPU here; use auto or cpu.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def open_accelerator(device: str, precision: str) -> Any:
    """Return an accelerator for this training.

    accelerate keeps one state per process and refuses a second precision or device; a process that trains several
    encoders one after the other, alone, starts from a clean state each time.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    target = find_device(device)
    if precision == "fp16" and target.type == "cpu":
        raise ConfigError("encoder.precision is fp16, which a CPU does not train in; use bf16 or fp32.")
    if count_processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    # A batch may leave out a subject's layer, or a phase an objective.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return Accelerator(cpu=target.type == "cpu", mixed_precision=_MIXED[precision], kwargs_handlers=handlers)


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's global random state as it was found."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the global generator of one device.

    `torch.manual_seed` also queues a call for every device that is not in use yet, with a stack trace each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a batch did not fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    )
