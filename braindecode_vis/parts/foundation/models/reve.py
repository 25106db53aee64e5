"""REVE: patches of one channel with a code of place and time, written after its description and the names of its file.

References
----------
El Ouahidi et al. (2025), REVE: a foundation model for EEG, adapting to any setup with large-scale pretraining on 25,000
subjects, arXiv:2510.21585.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import autocast
from braindecode_vis.parts.foundation.models.foundation import Backbone, attend

PATCH, STEP, HEAD = 200, 180, 64
#: The code of places: shift and period of coordinates, and what a patch counts beside a metre.
MARGIN, PERIOD, TIME_SCALE = 0.4, 1.8, 0.1


class Reve(Backbone):
    """The transformer.

    Parameters
    ----------
    positions : tensor of shape (n_channels, 3)
        Of the channels in m.
    width, depth
        Features of a token, a multiple of 64, and layers.
    n_frequencies
        Of the code of places along each axis; 4 (base) or 5 (large).
    """

    stack = "transformer.layers"
    attention = (".to_qkv.", ".to_out.")
    top = ("cls_query_token",)
    positions: Tensor

    def __init__(
        self, positions: Tensor, *, width: int = 512, depth: int = 22, n_frequencies: int = 4
    ) -> None:
        super().__init__()
        self.width, self.n_frequencies = width, n_frequencies
        self.register_buffer("positions", positions, persistent=False)
        self.cls_query_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.to_patch_embedding = nn.Sequential(nn.Linear(PATCH, width))
        self.mlp4d = nn.Sequential(nn.Linear(4, width, bias=False), nn.GELU(), nn.LayerNorm(width))
        self.ln = nn.LayerNorm(width)
        layers = (nn.ModuleList([Attention(width), FeedForward(width)]) for _ in range(depth))
        self.transformer = nn.Module()  # only to give the layers their names
        self.transformer.layers = nn.ModuleList(layers)

    def forward(self, data: Tensor) -> Tensor:
        """Return the tokens, those of the first channel first.

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
            Standardised, or in units of 100 µV, at 200 Hz; patches overlap by 20 samples, and samples that fill no
            patch are left out.

        Returns
        -------
        tensor of shape (batch, n_channels * n_patches, width)
        """
        patches = data.unfold(2, PATCH, STEP)  # batch, channels, patches, samples
        tokens = (self.to_patch_embedding(patches) + self.locate(patches.shape[2])).flatten(1, 2)
        layers: Any = self.transformer.layers
        for attention, feedforward in layers:
            tokens = tokens + attention(tokens)
            tokens = tokens + feedforward(tokens)
        return tokens

    def locate(self, n_patches: int) -> Tensor:
        """Return the code of place and time of each token, shape (n_channels, n_patches, width)."""
        times = torch.arange(n_patches, device=self.positions.device, dtype=self.positions.dtype)
        n_channels = len(self.positions)
        places = self.positions[:, None].expand(-1, n_patches, -1)
        grid = torch.cat([places, times[None, :, None].expand(n_channels, -1, -1)], dim=-1)
        # The waves see patches as small steps; the linear map sees their numbers.
        scaled = grid * torch.tensor([1.0, 1.0, 1.0, TIME_SCALE], device=grid.device)
        rates = torch.arange(self.n_frequencies, device=grid.device, dtype=grid.dtype)
        rates = torch.cartesian_prod(rates, rates, rates, rates)  # waves, 4: x slowest, time fastest
        with autocast(grid.device):  # angles lose their meaning in half precision
            angles = 2 * math.pi / PERIOD * (scaled + MARGIN) @ rates.T
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)[..., : self.width]
        return self.ln(waves + self.mlp4d(grid))

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the tokens weighted by how they fit the published query, shape (batch, width)."""
        scores = self.cls_query_token @ tokens.transpose(1, 2) / self.width**0.5  # batch, 1, tokens
        return (scores.softmax(dim=-1) @ tokens)[:, 0]


class Attention(nn.Module):
    """Self-attention of heads of 64 features behind a norm, without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        qkv = self.to_qkv(self.norm(tokens)).unflatten(-1, (3, -1, HEAD))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_heads, n_tokens, 64)
        return self.to_out(attend(q, k, v))


class FeedForward(nn.Module):
    """A gated feed-forward part behind a norm, without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width * 2.66)
        self.net = nn.ModuleDict(
            {
                "0": nn.RMSNorm(width, eps=1e-6),
                "1": nn.Linear(width, 2 * hidden, bias=False),
                "3": nn.Linear(hidden, width, bias=False),
            }
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        value, gate = self.net["1"](self.net["0"](tokens)).chunk(2, dim=-1)
        return self.net["3"](value * functional.gelu(gate))


def read_positions(path: Path, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the places of a table in m, with the middle of each pair, such as F3-C3, that is among these names.

    Parameters
    ----------
    path
        JSON, names to x, y, z.
    names
        Of channels.

    Raises
    ------
    DataError
        If it is no such table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no JSON ({str(error)[:100]}); give a table of names to x, y, z."
        ) from error
    if not isinstance(content, dict) or not content:
        raise DataError(
            f"{path} must be a JSON table of names to x, y, z, but is a {type(content).__name__}."
        )
    for name, place in content.items():
        numbers = place if isinstance(place, list) else []
        if len(numbers) != 3 or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise DataError(
                f"{path} must give {name} three finite numbers, x, y, z in m, but has {place!r:.60}."
            )
    table = {name: tuple(map(float, place)) for name, place in content.items()}
    known = {name.upper(): place for name, place in table.items()}
    for name in names:
        first, _, second = name.upper().partition("-")
        if name.upper() not in known and first in known and second in known:
            table[name] = tuple((a + b) / 2 for a, b in zip(known[first], known[second], strict=True))
    return table
