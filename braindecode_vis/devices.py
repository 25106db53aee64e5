"""Where and how exactly numbers are computed: the device, its precision, and torch's global random state.

The one place that chooses a device, enters reduced or full precision, seeds torch and gives its state back. Knows
neither networks nor settings: the caller says what its setting is called, so that a message names the right one.
Imports torch inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from braindecode_vis.checks import ConfigError, check_option

if TYPE_CHECKING:
    import torch


def choose_device(wanted: str, *, setting: str) -> str:
    """Return ``cpu`` or ``cuda``, or a numbered GPU that was asked for by its number.

    Parameters
    ----------
    wanted
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
    setting
        What the user calls the setting, such as ``encoder.device``; the message names it.

    Raises
    ------
    ConfigError
        If a GPU is asked for and torch sees none.

    Examples
    --------
    >>> choose_device("cpu", setting="encoder.device")
    'cpu'
    """
    import torch

    # A number behind the colon names one of several GPUs.
    check_option(setting, wanted.split(":")[0], ("auto", "cpu", "cuda"))
    has_gpu = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if has_gpu else "cpu"
    if wanted != "cpu" and not has_gpu:
        raise ConfigError(f"{setting} is {wanted}, but torch sees no GPU here; use auto or cpu.")
    return wanted


# --- random state ---------------------------------------------------------------------------------------


@contextmanager
def keep_random_state(device: str | torch.device = "cpu") -> Iterator[None]:
    """Leave torch's global random state, that of the CPU and of `device`, as it was found."""
    import torch

    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        yield


def seed_device(device: str | torch.device, seed: int) -> None:
    """Seed the global generators of the CPU and of one device."""
    import torch

    # Not torch.manual_seed, which queues a call, with a stack trace each time, for every device not yet in use.
    torch.default_generator.manual_seed(seed)
    place = torch.device(device)
    if place.type == "cuda":
        index = torch.cuda.current_device() if place.index is None else place.index
        torch.cuda.default_generators[index].manual_seed(seed)


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed torch inside the block only: what is drawn there is the same every time, and nothing outside moves."""
    with keep_random_state(device):
        seed_device(device, seed)
        yield


# --- precision ------------------------------------------------------------------------------------------


@contextmanager
def autocast(device: str | torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Compute matrix products in half precision inside, or in that of their arguments.

    Parameters
    ----------
    device
        Where the products are taken.
    dtype
        ``torch.bfloat16`` or ``torch.float16``; None or ``torch.float32`` leaves an autocast that is entered outside.
    """
    import torch

    kind = torch.device(device).type
    if not torch.amp.is_autocast_available(kind):  # such as "meta", where nothing is computed
        yield
    elif dtype is None or dtype is torch.float32:
        with torch.autocast(kind, enabled=False):
            yield
    else:
        with torch.autocast(kind, dtype=dtype):
            yield


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Keep convolutions on a GPU in full single precision, by an algorithm that is not chosen by speed.

    They would otherwise be rounded to ten bits (TF32), and two runs could take two algorithms.
    """
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def full_precision_products() -> Iterator[None]:
    """Keep matrix products in true single precision, whatever speed setting is in force elsewhere."""
    import torch

    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


# --- memory ---------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that a batch did not fit."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # What older allocators of the CPU and cuDNN raise instead of a class of their own.
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
    )
