"""EEGPT: four summaries of each quarter of a second, written after its description and the names of its file.

Not the autoregressive model of the same name.

References
----------
Wang et al. (2024), EEGPT: pretrained transformer for universal and reliable representation of EEG signals, NeurIPS.
Su et al. (2021), RoFormer, arXiv:2104.09864: the code of time in the predictor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from braindecode_vis.parts.foundation.models.foundation import EPS, Backbone, Block, JointAttention, attend

PATCH, N_SUMMARIES, THETA = 64, 4, 10_000.0
_NAMES = """
    FP1 FPZ FP2 AF7 AF3 AF4 AF8 F7 F5 F3 F1 FZ F2 F4 F6 F8 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8
    T7 C5 C3 C1 CZ C2 C4 C6 T8 TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 P7 P5 P3 P1 PZ P2 P4 P6 P8
    PO7 PO5 PO3 POZ PO4 PO6 PO8 O1 OZ O2
    """
CH_NAMES = tuple(_NAMES.split())


class EEGPT(Backbone):
    """The encoder, and behind it the predictor if patches shall see each other.

    Parameters
    ----------
    rows
        Row of each channel in `CH_NAMES`.
    size, depth, n_heads
        Features of a summary, blocks, heads of each.
    context
        Whether there is a predictor.
    """

    attention = (".attn.",)
    rows: Tensor

    def __init__(
        self,
        rows: Sequence[int],
        *,
        size: int = 512,
        depth: int = 8,
        n_heads: int = 8,
        context: bool = False,
    ) -> None:
        super().__init__()
        self.width = N_SUMMARIES * size  # a token holds the summaries of a patch side by side
        self.register_buffer("rows", torch.tensor(list(rows), dtype=torch.long), persistent=False)
        self.summary_token = nn.Parameter(torch.zeros(1, N_SUMMARIES, size))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, size, (1, PATCH), stride=(1, PATCH))})
        self.chan_embed = nn.Embedding(len(CH_NAMES), size)
        self.blocks = nn.ModuleList(Block(size, RotaryAttention(size, n_heads)) for _ in range(depth))
        self.norm = nn.LayerNorm(size, eps=EPS)
        for table in (self.summary_token, self.chan_embed.weight):
            nn.init.trunc_normal_(table, std=0.02)
        self.predictor = Predictor(size, depth, n_heads) if context else None
        self.top = ("predictor." if context else "norm.",)

    def forward(self, data: Tensor) -> Tensor:
        """Return one token a patch: its summaries side by side.

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
            In mV at 256 Hz, without the mean of the channels; samples that fill no patch are left out.

        Returns
        -------
        tensor of shape (batch, n_patches, 4 * size)
        """
        summaries = self.encode(data)
        if self.predictor is not None:
            summaries = self.predictor(summaries)
        return summaries.flatten(2)

    def encode(self, data: Tensor, patches: Tensor | None = None, channels: Tensor | None = None) -> Tensor:
        """Return the summaries of each patch, shape (batch, n_patches, 4, size).

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
        patches, channels : integer tensors, optional
            Which patches and channels are seen; None for all.
        """
        grid = self.patch_embed["proj"](data.unsqueeze(1))  # batch, size, channels, patches
        grid = grid.permute(0, 3, 2, 1) + self.chan_embed(self.rows)  # batch, patches, channels, size
        grid = grid if patches is None else grid[:, patches]
        grid = grid if channels is None else grid[:, :, channels]
        # Each patch by itself, its summaries behind its channels: the encoder knows no time.
        tokens = grid.flatten(0, 1)
        tokens = torch.cat([tokens, self.summary_token.expand(len(tokens), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, -N_SUMMARIES:]).unflatten(0, grid.shape[:2])


class Predictor(nn.Module):
    """Attention over the summaries of all patches, which know their time.

    Parameters
    ----------
    size, depth, n_heads
        As in the encoder.
    """

    mask_token: Tensor

    def __init__(self, size: int = 512, depth: int = 8, n_heads: int = 8) -> None:
        super().__init__()
        # Decoding hides nothing, so that the mask stays as the file has it.
        self.register_buffer("mask_token", torch.zeros(1, 1, N_SUMMARIES, size))
        self.predictor_embed = nn.Linear(size, size)
        self.time_embed = Rates(size // n_heads)
        self.predictor_blocks = nn.ModuleList(
            Block(size, RotaryAttention(size, n_heads)) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(size, eps=EPS)
        self.predictor_proj = nn.Linear(size, size)

    def forward(self, summaries: Tensor, patches: Tensor | None = None, n_patches: int = 0) -> Tensor:
        """Return summaries of all patches, shape (batch, n_patches, 4, size).

        Parameters
        ----------
        summaries : tensor of shape (batch, n_seen, 4, size)
        patches : integer tensor of shape (n_seen,), optional
            Place of each patch that is seen, where others are hidden.
        n_patches
            Of all, where some are hidden.
        """
        tokens = self.predictor_embed(summaries)
        if patches is not None:
            grid = self.mask_token.expand(len(tokens), n_patches, -1, -1).to(tokens.dtype).clone()
            grid[:, patches] = tokens
            tokens = grid
        shape = tokens.shape[1:3]
        angles = self.time_embed(torch.arange(shape[0], device=tokens.device).repeat_interleave(N_SUMMARIES))
        tokens = tokens.flatten(1, 2)  # batch, patches * summaries, size
        for block in self.predictor_blocks:
            tokens = block(tokens, angles)
        return self.predictor_proj(self.predictor_norm(tokens)).unflatten(1, shape)


class Rates(nn.Module):
    """By what angles half of the features of a head turn with time; the other half stays.

    Parameters
    ----------
    size
        Features of a head.
    """

    freqs: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        rotated = size // 2
        self.register_buffer("freqs", THETA ** -(torch.arange(0, rotated, 2) / rotated))

    def forward(self, patches: Tensor) -> Tensor:
        """Return the angles of the patches of tokens, shape (n_tokens, n_pairs); two patches are one unit of time."""
        return (patches / 2)[:, None] * self.freqs


class RotaryAttention(JointAttention):
    """Self-attention, of queries and keys that turn with time if angles are given."""

    def forward(self, tokens: Tensor, angles: Tensor | None = None) -> Tensor:
        """Map (batch, n_tokens, size) to the same shape."""
        q, k, v = self.split(tokens)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return self.proj(attend(q, k, v))


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Return heads whose first features are turned, pair by pair, by the angles of their token.

    Parameters
    ----------
    heads : tensor of shape (batch, n_heads, n_tokens, size)
    angles : tensor of shape (n_tokens, n_pairs)
    """
    n_turned = 2 * angles.shape[1]
    pairs = heads[..., :n_turned].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(heads.dtype), heads[..., n_turned:]], dim=-1)
