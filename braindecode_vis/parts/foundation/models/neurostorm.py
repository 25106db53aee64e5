"""NeuroSTORM: volumes over time through windows of state-space layers.

A volume of 96³ voxels and some frames becomes patches of 6³ voxels of one frame, which pass four stages of blocks; a
block reads windows of 4 x 4 x 4 places x 4 frames as sequences with a selective state-space layer (Mamba), every other
one after a shift by half a window. Between the stages eight neighbours in space merge into one token of twice the
width; time stays. The layer is written as its plain recurrence, so that it needs no compiled kernels. Carries the
published names of the encoder in its state dict. Written from the description; knows neither files nor training.

References
----------
Wang et al. (2026), NeuroSTORM, Nature Biomedical Engineering. Gu and Dao (2023), arXiv:2312.00752 (Mamba). Liu et al.
(2021), arXiv:2103.14030 (shifted windows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braindecode_vis.parts.foundation.models.foundation import Backbone


class Mamba(nn.Module):
    """Selective state-space layer over sequences, as a plain recurrence.

    Parameters
    ----------
    width
        Size of a token.
    n_states, kernel, expand
        States of each inner feature (16), length of the causal convolution (4), inner features per feature (2).
    """

    def __init__(self, width: int, n_states: int = 16, kernel: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.sizes = (rank, n_states, n_states)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * n_states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, n_states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape (batch, length, width)."""
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)
        # Padded on both sides, so that what lies behind the sequence's end is cut off: no token sees a later one.
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : tokens.shape[1]]).transpose(1, 2)
        step, enter, leave = self.x_proj(x).split(self.sizes, dim=-1)
        step = F.softplus(self.dt_proj(step))  # (batch, length, inner)
        decay = -self.A_log.exp()
        state = x.new_zeros(len(x), *decay.shape)  # (batch, inner, n_states)
        outputs = []
        # Taken apart at once: a slice per step would make its gradient as long as the sequence.
        parts = (
            part.unbind(1) for part in (step[..., None], x[..., None], enter[:, :, None], leave[:, :, None])
        )
        for now, value, into, out in zip(*parts, strict=True):
            state = (now * decay).exp() * state + now * value * into
            outputs.append((state * out).sum(dim=-1))
        y = torch.stack(outputs, dim=1) + self.D * x
        return self.out_proj(y * F.silu(gate))


class _Block(nn.Module):
    """State-space layer over windows and feed-forward, each after a norm and around a skip connection."""

    def __init__(self, width: int, window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = tuple(window), shifted
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mamba = Mamba(width)
        self.mlp = nn.ModuleDict(
            {"linear1": nn.Linear(width, 4 * width), "linear2": nn.Linear(4 * width, width)}
        )

    def forward(self, grid: Tensor) -> Tensor:
        grid = grid + self._scan_windows(self.norm1(grid))
        return grid + self.mlp["linear2"](F.gelu(self.mlp["linear1"](self.norm2(grid))))

    def _scan_windows(self, grid: Tensor) -> Tensor:
        """Return the grid (batch, d, h, w, t, width) after every window was read as one sequence, t fastest."""
        shape = grid.shape[1:5]
        # An axis that one window covers is neither cut nor shifted.
        window = [min(size, length) for size, length in zip(self.window, shape, strict=True)]
        shift = [
            size // 2 if self.shifted and length > size else 0
            for size, length in zip(self.window, shape, strict=True)
        ]
        padding = [-length % size for size, length in zip(window, shape, strict=True)]
        grid = F.pad(grid, (0, 0, *(n for pad in reversed(padding) for n in (0, pad))))
        axes = (1, 2, 3, 4)
        grid = grid.roll([-n for n in shift], axes)  # what leaves at one end enters at the other, unmasked
        counts = [length // size for size, length in zip(window, grid.shape[1:5], strict=True)]
        sides = [n for pair in zip(counts, window, strict=True) for n in pair]
        batch, width = grid.shape[0], grid.shape[-1]
        cut = grid.reshape(batch, *sides, width).permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9)
        read = self.mamba(cut.reshape(-1, math.prod(window), width))
        grid = read.reshape(cut.shape).permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).reshape(grid.shape)
        grid = grid.roll(shift, axes)
        return grid[:, : shape[0], : shape[1], : shape[2], : shape[3]]


class _Merge(nn.Module):
    """Eight neighbours in space, normed together, become one token of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(8 * width)

    def forward(self, grid: Tensor) -> Tensor:
        parts = [grid[:, i::2, j::2, k::2] for i in range(2) for j in range(2) for k in range(2)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class _Stage(nn.Module):
    def __init__(self, width: int, depth: int, window: Sequence[int], last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(width, window, shifted=index % 2 == 1 and not last) for index in range(depth)
        )
        self.downsample = None if last else _Merge(width)

    def forward(self, grid: Tensor) -> Tensor:
        for block in self.blocks:
            grid = block(grid)
        return grid if self.downsample is None else self.downsample(grid)


class _Places(nn.Module):
    def __init__(self, width: int, side: int, n_frames: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, width, side, side, side, 1) * 0.02)
        self.time_embed = nn.Parameter(torch.randn(1, width, 1, 1, 1, n_frames) * 0.02)


class NeuroSTORM(Backbone):
    """The encoder.

    Parameters
    ----------
    side, patch, n_frames
        Voxels along each axis of the volume (96) and of a patch (6), and the frames that have a place (20).
    width, depths, window
        Size of a token in the first stage (36), blocks of each stage, places and frames of a window.
    """

    stack = "layers"
    attention = ("mamba.in_proj", "mamba.out_proj")

    def __init__(
        self,
        *,
        side: int = 96,
        patch: int = 6,
        n_frames: int = 20,
        width: int = 36,
        depths: Sequence[int] = (2, 2, 6, 2),
        window: Sequence[int] = (4, 4, 4, 4),
    ) -> None:
        super().__init__()
        self.side, self.patch, self.n_frames = side, patch, n_frames
        grid, n_stages = side // patch, len(depths)
        self.patch_embed = nn.ModuleDict({"fc": nn.Linear(patch**3, width)})
        self.pos_embeds = nn.ModuleList(
            _Places(width * 2**stage, grid // 2**stage, n_frames) for stage in range(n_stages)
        )
        self.layers = nn.ModuleList(
            _Stage(width * 2**stage, depth, window, last=stage == n_stages - 1)
            for stage, depth in enumerate(depths)
        )
        self.width = width * 2 ** (n_stages - 1)

    def forward(self, data: Tensor) -> Tensor:
        """Return the features of the last stage as tokens, shape (batch, n_places * n_frames, width).

        Parameters
        ----------
        data : tensor of shape (batch, 1, side, side, side, n_frames)
        """
        return self.encode(data).flatten(2).transpose(1, 2)

    def encode(self, volumes: Tensor) -> Tensor:
        """Return the features of the last stage, (batch, width, d, h, w, n_frames).

        Parameters
        ----------
        volumes : tensor of shape (batch, 1, side, side, side, n_frames)
            At most the frames that have a place.
        """
        n, patch = self.side // self.patch, self.patch
        cut = volumes[:, 0].unflatten(1, (n, patch)).unflatten(3, (n, patch)).unflatten(5, (n, patch))
        cut = cut.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(5)  # (batch, n, n, n, n_frames, patch³)
        grid = self.patch_embed["fc"](cut)
        for places, layer in zip(self.pos_embeds, self.layers, strict=True):
            table: Tensor = places.pos_embed + places.time_embed[..., : grid.shape[4]]  # type: ignore[operator,index]
            grid = layer(grid + table.movedim(1, -1))
        return grid.movedim(-1, 1)
