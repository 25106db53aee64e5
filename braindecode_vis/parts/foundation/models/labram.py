"""LaBraM: patches of one channel and one second as tokens, written after its description and the names of its file.

References
----------
Jiang, Zhao, Lu (2024), Large brain model for learning generic representations with tremendous EEG data in BCI,
arXiv:2405.18765.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.parts.foundation.models.foundation import EPS, Backbone, Mlp, attend

PATCH, N_TIMES, N_CODES = 200, 16, 8192
#: Rows 1 to 128 of the table of channels; row 0 is that of the extra token.
_NAMES = """
    FP1 FPZ FP2 AF9 AF7 AF5 AF3 AF1 AFZ AF2 AF4 AF6 AF8 AF10 F9 F7 F5 F3 F1 FZ F2 F4 F6 F8 F10
    FT9 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 FT10 T9 T7 C5 C3 C1 CZ C2 C4 C6 T8 T10
    TP9 TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 TP10 P9 P7 P5 P3 P1 PZ P2 P4 P6 P8 P10
    PO9 PO7 PO5 PO3 PO1 POZ PO2 PO4 PO6 PO8 PO10 O1 OZ O2 O9 CB1 CB2 IZ O10 T3 T5 T4 T6 M1 M2 A1 A2
    CFC1 CFC2 CFC3 CFC4 CFC5 CFC6 CFC7 CFC8 CCP1 CCP2 CCP3 CCP4 CCP5 CCP6 CCP7 CCP8
    T1 T2 FTT9h TTP7h TPP9h FTT10h TPP8h TPP10h
    FP1-F7 F7-T7 T7-P7 P7-O1 FP2-F8 F8-T8 T8-P8 P8-O2
    """
CH_NAMES = tuple(_NAMES.split())


class Labram(Backbone):
    """The transformer, in the form of fine-tuning or as the student of its pretraining.

    Parameters
    ----------
    rows
        Row of each channel in the table of channels, from 1 on.
    width, depth, n_heads
        Features of a token, blocks, heads of each.
    student
        The form of pretraining: a token for hidden patches, a norm behind the blocks instead of behind the pooling, the
        head that names codes, and the first channel's row for the extra token.
    """

    n_extra = 1
    attention = (".attn.",)
    top = ("fc_norm.",)
    rows: Tensor

    def __init__(
        self,
        rows: Sequence[int],
        *,
        width: int = 200,
        depth: int = 12,
        n_heads: int = 10,
        student: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.student = width, student
        self.register_buffer("rows", torch.tensor(list(rows), dtype=torch.long), persistent=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, len(CH_NAMES) + 1, width))
        self.time_embed = nn.Parameter(torch.zeros(1, N_TIMES, width))
        self.patch_embed = Stem(width // (PATCH // Stem.stride))
        self.blocks = nn.ModuleList(LayerScaledBlock(width, n_heads) for _ in range(depth))
        if student:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
            self.norm = nn.LayerNorm(width, eps=EPS)
            self.lm_head = nn.Linear(width, N_CODES)
        else:
            self.fc_norm = nn.LayerNorm(width, eps=EPS)
        for table in (self.cls_token, self.pos_embed, self.time_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, data: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the tokens, the extra one first, then those of the first channel, and so on.

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
            In units of 100 µV at 200 Hz; samples that fill no patch are left out.
        hidden : boolean tensor of shape (batch, n_channels * n_patches), optional
            Patches that the student does not see.

        Returns
        -------
        tensor of shape (batch, 1 + n_channels * n_patches, width)
        """
        n_patches = data.shape[-1] // PATCH
        patches = data[..., : n_patches * PATCH].unflatten(-1, (n_patches, PATCH))
        tokens = self.patch_embed(patches)  # batch, channels * patches, width
        if hidden is not None:
            tokens = torch.where(hidden[..., None], self.mask_token, tokens)
        channels = self.pos_embed[0, self.rows]  # channels, width
        place = (channels[:, None] + self.time_embed[0, :n_patches]).flatten(0, 1)
        first = self.cls_token + (channels[0] if self.student else self.pos_embed[0, 0])
        tokens = torch.cat([first.expand(len(data), -1, -1), tokens + place], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens) if self.student else tokens

    def finish(self, features: Tensor) -> Tensor:
        """Return pooled tokens after the last norm."""
        return features if self.student else self.fc_norm(features)


class Stem(nn.Module):
    """Three convolutions over the samples of a patch; their norms run over all patches of a trial.

    Parameters
    ----------
    n_maps
        Of each convolution.
    """

    stride: ClassVar[int] = 8

    def __init__(self, n_maps: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, n_maps, (1, 15), stride=(1, self.stride), padding=(0, 7))
        self.norm1 = nn.GroupNorm(4, n_maps)
        self.conv2 = nn.Conv2d(n_maps, n_maps, (1, 3), padding=(0, 1))
        self.norm2 = nn.GroupNorm(4, n_maps)
        self.conv3 = nn.Conv2d(n_maps, n_maps, (1, 3), padding=(0, 1))
        self.norm3 = nn.GroupNorm(4, n_maps)

    def forward(self, patches: Tensor) -> Tensor:
        """Map (batch, n_channels, n_patches, 200) to (batch, n_channels * n_patches, width)."""
        maps = patches.flatten(1, 2).unsqueeze(1)  # batch, 1, channels * patches, samples
        for conv, norm in (
            (self.conv1, self.norm1),
            (self.conv2, self.norm2),
            (self.conv3, self.norm3),
        ):
            maps = functional.gelu(norm(conv(maps)))
        return maps.permute(0, 2, 3, 1).flatten(2)  # a step's maps side by side, step after step


class LayerScaledBlock(nn.Module):
    """Attention with normed queries and keys, then a feed-forward part, each scaled by feature."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = UnbiasedAttention(width, n_heads)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        tokens = tokens + self.gamma_1 * self.attn(self.norm1(tokens))
        return tokens + self.gamma_2 * self.mlp(self.norm2(tokens))


class UnbiasedAttention(nn.Module):
    """Self-attention without biases of queries, keys and values."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.LayerNorm(width // n_heads, eps=EPS)
        self.k_norm = nn.LayerNorm(width // n_heads, eps=EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_heads, n_tokens, width per head)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v))
