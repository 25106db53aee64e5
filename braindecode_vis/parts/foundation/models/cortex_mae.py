"""CortexMAE for parcels: a masked autoencoder over 400 parcels x patches of four frames.

Schaefer's 400 parcels at a repetition time of 1 s, 16 frames, 4 frames a token; learned places of parcels and of
patches are added, and one extra token has none. Carries the published names of the encoder in its state dict. Written
from the description; knows neither files nor training.

References
----------
Lane et al. (2025), arXiv:2510.13768.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from braindecode_vis.parts.foundation.models.foundation import EPS, Backbone, Block, attend


class _Attention(nn.Module):
    """Self-attention with maps to query, key and value of their own."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        maps = (self.q, self.k, self.v)
        q, k, v = (part(tokens).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in maps)
        return self.proj(attend(q, k, v))


class _Places(nn.Module):
    def __init__(self, n_parcels: int, n_patches: int, width: int) -> None:
        super().__init__()
        self.weight_spatial = nn.Parameter(torch.randn(1, n_parcels, width) * 0.02)
        self.weight_temporal = nn.Parameter(torch.randn(n_patches, 1, width) * 0.02)


class _Encoder(nn.Module):
    def __init__(
        self, n_parcels: int, n_patches: int, patch: int, width: int, depth: int, n_heads: int
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.patch_embed = nn.Linear(patch, width)
        self.pos_embed = _Places(n_parcels, n_patches, width)
        self.blocks = nn.ModuleList(Block(width, _Attention(width, n_heads)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)


class CortexMAE(Backbone):
    """The encoder.

    Parameters
    ----------
    n_parcels, n_frames, patch
        Size of the input and frames of a token (400, 16, 4).
    width, depth, n_heads
        Those of ViT-B by default.
    """

    n_extra = 1
    stack = "encoder.blocks"
    attention = (".attn.",)
    top = ("encoder.norm.",)

    def __init__(
        self,
        *,
        n_parcels: int = 400,
        n_frames: int = 16,
        patch: int = 4,
        width: int = 768,
        depth: int = 12,
        n_heads: int = 12,
    ) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        self.encoder = _Encoder(n_parcels, n_frames // patch, patch, width, depth, n_heads)

    def forward(self, series: Tensor) -> Tensor:
        """Return the normed tokens, the extra one first, then patch of time by patch of time.

        Parameters
        ----------
        series : tensor of shape (batch, n_parcels, n_frames)
            A whole number of patches. Fewer frames than in training take the first places.

        Returns
        -------
        tensor of shape (batch, 1 + n_patches * n_parcels, width)
        """
        own = self.encoder
        patches = series.unflatten(2, (-1, self.patch)).transpose(
            1, 2
        )  # (batch, n_patches, n_parcels, patch)
        places = own.pos_embed.weight_spatial + own.pos_embed.weight_temporal[: patches.shape[1]]
        tokens = (own.patch_embed(patches) + places).flatten(1, 2)
        tokens = torch.cat([own.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in own.blocks:
            tokens = block(tokens)
        return own.norm(tokens)
