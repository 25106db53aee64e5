"""One root seed, many named generators.

Two stages never share a random stream by accident: a generator is addressed by the root seed and a path of
names, so adding a stage does not change the random numbers of another one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(root_seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the stream called `names` under `root_seed`.

    Examples
    --------
    >>> derive_seed(0, "bootstrap") == derive_seed(0, "bootstrap")
    True
    >>> derive_seed(0, "bootstrap") == derive_seed(0, "permutation")
    False
    """
    # A separator that no name holds, so that ("ab", "c") and ("a", "bc") are two streams.
    text = "\x1f".join([str(int(root_seed)), *map(str, names)])
    return (
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    )  # torch takes signed 64 bits


def make_generator(root_seed: int, *names: str | int) -> np.random.Generator:
    """Return the NumPy generator of the stream called `names` under `root_seed`."""
    return np.random.default_rng(derive_seed(root_seed, *names))


def make_torch_generator(root_seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """Return the torch generator of the stream called `names` under `root_seed`."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(root_seed, *names))
    return generator
