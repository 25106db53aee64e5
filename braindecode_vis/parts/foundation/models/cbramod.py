"""CBraMod: attention over channels and over time side by side, written after its description and the names of its file.

References
----------
Wang et al. (2025), CBraMod: a criss-cross brain foundation model for EEG decoding, arXiv:2412.07236.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.devices import autocast
from braindecode_vis.parts.foundation.models.foundation import Backbone

WIDTH = PATCH = 200
#: Channels of the pretraining, in its order.
_NAMES = "FP1 FP2 F3 F4 C3 C4 P3 P4 O1 O2 F7 F8 T3 T4 T5 T6 FZ CZ PZ"
CH_NAMES = tuple(_NAMES.split())


class CBraMod(Backbone):
    """The transformer.

    Parameters
    ----------
    depth
        Layers.
    reconstructs
        Whether it has the last linear map of its pretraining, from features to samples.
    """

    width = WIDTH
    stack = "encoder.layers"
    attention = ("self_attn",)
    top = ("proj_out.",)

    def __init__(self, *, depth: int = 12, reconstructs: bool = False) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(CrissCrossLayer() for _ in range(depth))})
        if reconstructs:
            self.proj_out = nn.Sequential(nn.Linear(WIDTH, PATCH))

    def forward(self, data: Tensor) -> Tensor:
        """Return the tokens, those of the first channel first.

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
            In units of 100 µV at 200 Hz; samples that fill no patch are left out.

        Returns
        -------
        tensor of shape (batch, n_channels * n_patches, 200)
        """
        return self.encode(cut_patches(data)).flatten(1, 2)

    def encode(self, patches: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return features of the shape of the patches, (batch, n_channels, n_patches, 200).

        Parameters
        ----------
        patches : tensor of shape (batch, n_channels, n_patches, 200)
        hidden : boolean tensor of shape (batch, n_channels, n_patches), optional
            Patches in whose place the network sees its mask.
        """
        if hidden is not None:
            patches = torch.where(hidden[..., None], self.patch_embedding.mask_encoding, patches)
        grid = self.patch_embedding(patches)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            grid = layer(grid)
        return grid


def cut_patches(data: Tensor) -> Tensor:
    """Return patches of shape (batch, n_channels, n_patches, 200)."""
    n_patches = data.shape[-1] // PATCH
    return data[..., : n_patches * PATCH].unflatten(-1, (n_patches, PATCH))


class PatchEmbedding(nn.Module):
    """Convolutions over the samples of a patch, its spectrum, and a convolution over neighbours as code of places."""

    mask_encoding: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask_encoding", torch.zeros(PATCH))
        # Channels are neighbours by their order alone.
        self.positional_encoding = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, (19, 7), padding=(9, 3), groups=WIDTH)
        )
        parts: list[nn.Module] = []
        for n_in, kernel, stride, padding in ((1, 49, 25, 24), (25, 3, 1, 1), (25, 3, 1, 1)):
            parts.append(nn.Conv2d(n_in, 25, (1, kernel), stride=(1, stride), padding=(0, padding)))
            parts += [nn.GroupNorm(5, 25), nn.GELU()]
        self.proj_in = nn.Sequential(*parts)
        self.spectral_proj = nn.Sequential(nn.Linear(PATCH // 2 + 1, WIDTH))

    def forward(self, patches: Tensor) -> Tensor:
        """Map (batch, n_channels, n_patches, 200) to the same shape."""
        maps = self.proj_in(patches.flatten(1, 2).unsqueeze(1))  # batch, 25 maps, channels * patches, 8 steps
        # A map's steps side by side, map after map; LaBraM has it the other way round.
        samples = maps.transpose(1, 2).flatten(2).unflatten(1, patches.shape[1:3])
        with autocast(patches.device):  # no Fourier transform in half precision
            spectrum = torch.fft.rfft(patches.float(), dim=-1, norm="forward").abs()
        tokens = samples + self.spectral_proj(spectrum)
        place = self.positional_encoding(tokens.permute(0, 3, 1, 2))  # batch, width, channels, patches
        return tokens + place.permute(0, 2, 3, 1)


class CrissCrossLayer(nn.Module):
    """Half of the features attend over channels, the other half over patches; then a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_s = nn.MultiheadAttention(WIDTH // 2, 4, batch_first=True)
        self.self_attn_t = nn.MultiheadAttention(WIDTH // 2, 4, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (batch, n_channels, n_patches, width) to the same shape."""
        grid = grid + self._attend(self.norm1(grid))
        return grid + self.linear2(functional.gelu(self.linear1(self.norm2(grid))))

    def _attend(self, grid: Tensor) -> Tensor:
        n, n_channels, n_patches, _ = grid.shape
        space, time = grid.chunk(2, dim=-1)
        rows = space.transpose(1, 2).flatten(0, 1)  # batch * patches, channels, features
        rows = self.self_attn_s(rows, rows, rows, need_weights=False)[0]
        space = rows.unflatten(0, (n, n_patches)).transpose(1, 2)
        rows = time.flatten(0, 1)  # batch * channels, patches, features
        rows = self.self_attn_t(rows, rows, rows, need_weights=False)[0]
        return torch.cat([space, rows.unflatten(0, (n, n_channels))], dim=-1)
