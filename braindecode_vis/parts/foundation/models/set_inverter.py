"""A network that inverts voxel weights: from the weights and responses of a set of voxels to the image.

Stage 2 of BrainCoDec, as its code has it. The token of a voxel is its weights, its bias and its response to one image.
No token has a position, so that voxels of any brain are one set: their order and number are free. Knows nothing of how
weights were estimated, and no training.

References
----------
Yu et al. (2026), BrainCoDec, arXiv:2604.08537.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: As in BrainCoDec: learned tokens before the voxels, those of them that are read out, and sizes of hidden layers.
N_REGISTERS, N_READ = 32, 4
_SLOPE = 0.1  # of LeakyReLU below zero


class SetInverter(nn.Module):
    """Registers and voxels attend to each other; the first registers become the image vector.

    BrainCoDec's sizes for CLIP: 512 inputs, width 768, 8 blocks, 8 heads, hidden 2048, 1024 in blocks, dropout 0.1.

    Parameters
    ----------
    n_features
        Values of an image vector, and of the weights of a voxel.
    width
        Of a token.
    n_blocks, n_heads
        Blocks of attention, and heads of each.
    hidden, block_hidden
        Hidden features of the two residual layers, and of the layers in blocks.
    dropout
        In every layer.
    """

    def __init__(
        self,
        n_features: int,
        *,
        width: int,
        n_blocks: int,
        n_heads: int = 8,
        hidden: int | None = None,
        block_hidden: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        hidden, block_hidden = hidden or 2 * width, block_hidden or 2 * width
        self.enter = ResidualLayer(n_features + 2, hidden, width, dropout)
        self.registers = nn.Parameter(torch.randn(N_REGISTERS, width) / math.sqrt(width + 1))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(SetBlock(width, n_heads, block_hidden, dropout) for _ in range(n_blocks))
        self.merge = nn.Sequential(
            nn.Linear(N_READ * width, N_READ * width), nn.LeakyReLU(_SLOPE), nn.Dropout(dropout),
            nn.Linear(N_READ * width, width),
        )  # fmt: skip
        self.leave = ResidualLayer(width, hidden, n_features, dropout)

    def forward(self, weights: Tensor, bias: Tensor, responses: Tensor) -> Tensor:
        """Return image vectors of shape (batch, n_features).

        Parameters
        ----------
        weights : tensor of shape (n_voxels, n_features)
            The same for all images of a batch.
        bias : tensor of shape (n_voxels,)
        responses : tensor of shape (batch, n_voxels)
        """
        voxels = torch.cat([weights, bias[:, None]], dim=1).expand(len(responses), -1, -1)
        tokens = self.enter(torch.cat([voxels, responses[..., None]], dim=2))  # (batch, n_voxels, width)
        tokens = self.dropout(torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], dim=1))
        for block in self.blocks:
            tokens = block(tokens)
        read: Tensor = self.leave(self.merge(tokens[:, :N_READ].flatten(1)))
        return read


class SetBlock(nn.Module):
    """Attention whose queries grow with the logarithm of the number of tokens, and a gated layer, each after a norm."""

    def __init__(self, width: int, n_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.gated = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape (batch, n_tokens, width)."""
        normed = self.norm1(tokens)
        # Attention over more tokens would be flatter; the factor keeps it as sharp.
        mixed, _ = self.attention(math.log(tokens.shape[1]) * normed, normed, normed, need_weights=False)
        tokens = tokens + self.dropout(mixed)
        gate, values = self.gated(self.norm2(tokens)).chunk(2, dim=-1)
        return tokens + self.out(nn.functional.silu(gate) * values)


class ResidualLayer(nn.Module):
    """Two linear layers, each after a norm, beside a direct way."""

    def __init__(self, n_inputs: int, hidden: int, n_outputs: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(n_inputs), nn.LeakyReLU(_SLOPE), nn.Dropout(dropout), nn.Linear(n_inputs, hidden),
            nn.LayerNorm(hidden), nn.LeakyReLU(_SLOPE), nn.Dropout(dropout), nn.Linear(hidden, n_outputs),
        )  # fmt: skip
        self.direct = nn.Identity() if n_inputs == n_outputs else nn.Linear(n_inputs, n_outputs)

    def forward(self, data: Tensor) -> Tensor:
        """Return data of shape (..., n_outputs)."""
        summed: Tensor = self.layers(data) + self.direct(data)
        return summed
