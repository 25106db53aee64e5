"""The rule by which published foundation models are compared: weights by a formula, stated inputs, a few figures.

The figures were computed once by the models' public code with weights of this rule, and are the project's own table.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

_NAMES = "FP1 FP2 F7 F3 FZ F4 F8 T7 C3 CZ C4 T8 P7 P3 PZ P4 P8 O1 O2"
N19 = tuple(_NAMES.split())
#: Sums in float32 differ by up to 1.2e-5 from those in float64.
TOLERANCE = 1e-4


def make_units(key: str, count: int) -> np.ndarray:
    """Return numbers from -0.5 to 0.5 that the name of a tensor decides."""
    h = np.arange(count, dtype=np.uint32)  # products and sums wrap at 2^32, as the rule wants
    h *= np.uint32(2654435761)
    h += np.uint32(zlib.crc32(key.encode()))
    h ^= h >> np.uint32(16)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    return h / 2.0**32 - 0.5


def make_tensor(key: str, shape: Sequence[int], *, scale: float = 1.0) -> Tensor:
    """Return the tensor of this name and shape; `scale` acts on those of two or more axes."""
    count = int(np.prod(shape, dtype=np.int64))
    units = make_units(key, count)
    if len(shape) < 2:
        values = 0.2 * units + (1.0 if key.endswith(".weight") else 0.0)
    else:
        fan = shape[-1] if shape[0] == 1 else count // shape[0]
        values = scale * units * np.sqrt(12 / fan)
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def make_state(module: nn.Module, *, scale: float = 1.0, keep: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return a state for a module, but for tensors whose name ends in one of `keep`, which stay as built."""
    return {
        name: value if name.endswith(tuple(keep)) else make_tensor(name, value.shape, scale=scale)
        for name, value in module.state_dict().items()
    }


def fill(module: nn.Module, *, scale: float = 1.0, keep: Sequence[str] = ()) -> nn.Module:
    """Return the module in evaluation mode with weights of the rule."""
    module.load_state_dict(make_state(module, scale=scale, keep=keep))
    return module.eval()


def make_input(n: int, n_channels: int, n_times: int, rate: float) -> Tensor:
    """Return sines, x[b, c, t] = sin(rate (c + 1) t + b)."""
    b, c, t = np.arange(n)[:, None, None], np.arange(n_channels)[:, None], np.arange(n_times)
    return torch.from_numpy(np.sin(rate * (c + 1) * t + b).astype(np.float32))


def make_positions(n_channels: int) -> Tensor:
    """Return places, (0.1 cos c, 0.1 sin c, 0.005 c)."""
    c = np.arange(n_channels)
    return torch.from_numpy(np.stack([0.1 * np.cos(c), 0.1 * np.sin(c), 0.005 * c], 1).astype(np.float32))


def check_fingerprint(
    output: Tensor, shape: Sequence[int], mean: float, std: float, first: Sequence[float]
) -> None:
    """Compare shape, mean, deviation and the first values of an output."""
    assert tuple(output.shape) == tuple(shape)
    values = output.detach().double()
    found = [
        float(values.mean()),
        float(values.std(unbiased=False)),
        *values.flatten()[: len(first)].tolist(),
    ]
    np.testing.assert_allclose(found, [mean, std, *first], atol=TOLERANCE, rtol=0)


def count(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of values and of tensors of a module's state."""
    state = module.state_dict()
    return sum(value.numel() for value in state.values()), len(state)
