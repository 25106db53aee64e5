"""Brain-JEPA: a vision transformer over parcels x time patches whose places come from functional gradients.

450 parcels (50 subcortical of Tian's scale 3, then 400 of Schaefer with 17 networks) of 160 frames, 16 frames a token.
A token's place is a sine code of its patch of time and a linear map of its parcel's row in a table of functional
gradients, scaled to -1 .. 1 over the whole table; that table is part of the method, not of the weights. `BrainJEPA`
carries the published names in its state dict. Written from the description; knows neither files nor training.

References
----------
Dong et al. (2024), Brain-JEPA: brain dynamics foundation model with gradient positioning and spatiotemporal masking,
NeurIPS. Assran et al. (2023), arXiv:2301.08243 (joint-embedding prediction).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.parts.foundation.models.brainlm import make_sine_table
from braindecode_vis.parts.foundation.models.foundation import EPS, Backbone, Block, JointAttention


class GradientPlaces(nn.Module):
    """Places of the tokens, parcel by parcel.

    Parameters
    ----------
    gradients : tensor of shape (n_parcels, n_gradients)
        Not part of the state dict.
    n_patches
        Patches of time.
    width
        Size of a token; half of it encodes the time, half the parcel.
    """

    gradients: Tensor

    def __init__(self, gradients: Tensor, n_patches: int, width: int) -> None:
        super().__init__()
        self.n_patches = n_patches
        self.register_buffer("gradients", gradients.float(), persistent=False)
        time = make_sine_table(np.tile(np.arange(n_patches), len(gradients)), width // 2)
        self.emb_h = nn.Parameter(time, requires_grad=False)
        self.predictor_pos_embed_proj = nn.Linear(gradients.shape[1], width // 2)

    def forward(self) -> Tensor:
        """Return the table, (n_parcels * n_patches, width)."""
        parcels = self.predictor_pos_embed_proj(self.gradients)
        low, high = parcels.min(), parcels.max()
        parcels = (parcels - low) / (high - low) * 2 - 1  # over the whole table, as published
        return torch.cat([self.emb_h, parcels.repeat_interleave(self.n_patches, dim=0)], dim=1)


class BrainJEPA(Backbone):
    """The encoder.

    Parameters
    ----------
    gradients : tensor of shape (n_parcels, n_gradients)
        Functional gradients of the parcels, 450 x 30 as published.
    n_frames, patch
        Length of the input and of a token (160, 16).
    width, depth, n_heads
        Those of ViT-B by default.
    """

    attention = (".attn.",)
    top = ("norm.",)

    def __init__(
        self,
        gradients: Tensor,
        *,
        n_frames: int = 160,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        n_heads: int = 12,
    ) -> None:
        super().__init__()
        self.patch, self.width, self.n_patches = patch, width, n_frames // patch
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(1, width, kernel_size=(1, patch), stride=(1, patch))}
        )
        self.pos_embed_proj = GradientPlaces(gradients, self.n_patches, width)
        self.blocks = nn.ModuleList(Block(width, JointAttention(width, n_heads)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, series: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the normed tokens, parcel by parcel.

        Parameters
        ----------
        series : tensor of shape (batch, n_parcels, n_frames)
            A whole number of patches. Fewer frames than in training take the first places.
        visible : integer tensor of shape (n_visible,), optional
            Tokens that the transformer sees, counted over those of `series`; all by default.

        Returns
        -------
        tensor of shape (batch, n_visible, width)
        """
        tokens = self.patch_embed["proj"](series[:, None])  # (batch, width, n_parcels, n_patches)
        places = self.pos_embed_proj().unflatten(0, (-1, self.n_patches))[:, : tokens.shape[-1]]
        tokens = tokens.flatten(2).transpose(1, 2) + places.flatten(0, 1)
        if visible is not None:
            tokens = tokens[:, visible]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)
