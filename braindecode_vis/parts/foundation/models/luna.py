"""LUNA: a few queries ask any set of channels what a patch holds, written after its description and names of its file.

A patch of 40 samples of each channel becomes a token of convolutions, of its Fourier transform and of the channel's
place. Queries attend to the channels of a patch, so that what follows, attention over the patches, does not know how
many channels there were. Knows neither files nor training.

braindecode's LUNA has no norm in two of its perceptrons, where the published file has one; both agree without.

References
----------
Döner et al. (2025), LUNA: efficient and topology-agnostic foundation model for EEG signal analysis, NeurIPS,
arXiv:2510.22257. Su et al. (2021), RoFormer, arXiv:2104.09864: the code of time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from braindecode_vis.base.devices import autocast
from braindecode_vis.parts.foundation.models.eegpt import THETA, rotate
from braindecode_vis.parts.foundation.models.foundation import Backbone, JointAttention, attend

PATCH, N_PLACES = 40, 90  # samples of a patch; channels that the pretraining knew by name


class Luna(Backbone):
    """The network.

    Parameters
    ----------
    places : tensor of shape (n_channels, 3)
        Of the channels, in any unit: each axis is stretched from 0 to 1.
    size, n_queries, depth, n_heads
        Features of a query and how many there are, blocks over the patches, and heads of a query: 64, 4, 8, 2 (base),
        96, 6, 10, 2 (large), 128, 8, 24, 2 (huge).
    decoder
        Whether the decoder, which only reconstruction needs, is there.
    """

    attention = (".attn.",)
    top = ("norm.",)
    places: Tensor

    def __init__(
        self,
        places: Tensor,
        *,
        size: int = 64,
        n_queries: int = 4,
        depth: int = 8,
        n_heads: int = 2,
        decoder: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.n_queries, self.width = size, n_queries, size * n_queries
        self.register_buffer("places", encode_places(places, size), persistent=False)
        # Decoding hides nothing, so that the mask stays as the file has it.
        self.register_buffer("mask_token", torch.zeros(1, 1, size))
        self.patch_embed = nn.ModuleDict({"proj_in": _make_stem(size // 4)})
        n_waves = 2 * (PATCH // 2 + 1)  # size and phase of each
        self.freq_embed = nn.ModuleDict({"frequency_to_embed": _Mlp(n_waves, 4 * n_waves, size)})
        self.channel_location_embedder = nn.Sequential(_Mlp(size, 2 * size, size, normed=True))
        self.cross_attn = _Queries(size, n_queries, n_heads)
        self.blocks = nn.ModuleList(_Block(self.width, n_heads * n_queries) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width)
        self.decoder_head = _Decoder(size, n_heads) if decoder else None
        self.channel_emb = nn.ModuleDict({"embeddings": nn.Embedding(N_PLACES, size)}) if decoder else None

    def forward(self, data: Tensor) -> Tensor:
        """Return one token a patch: its queries side by side.

        Parameters
        ----------
        data : tensor of shape (batch, n_channels, n_times)
            At 256 Hz, in any unit: each channel of a trial is standardised. Samples that fill no patch are left out.

        Returns
        -------
        tensor of shape (batch, n_patches, n_queries * size)
        """
        data = data[..., : data.shape[2] // PATCH * PATCH]
        with autocast(data.device):  # volts are small, and half precision is coarse
            spread, mean = torch.std_mean(data.float(), dim=2, keepdim=True)
            data = (data - mean) / (spread + 1e-8 * (spread == 0))  # a flat channel is zero
        return self.encode(data)

    def encode(self, data: Tensor) -> Tensor:
        """Return the normed tokens of trials as they are, shape (batch, n_patches, n_queries * size)."""
        n_patches = data.shape[2] // PATCH
        patches = data.unflatten(2, (n_patches, PATCH))  # batch, channels, patches, samples
        maps = self.patch_embed["proj_in"](
            patches.flatten(1, 2)[:, None]
        )  # batch, maps, channels * patches, steps
        tokens = maps.permute(0, 2, 3, 1).flatten(2).unflatten(1, (-1, n_patches))
        with autocast(data.device):  # there is no Fourier transform in half precision
            waves = torch.fft.rfft(patches.float())
        tokens = tokens + self.freq_embed["frequency_to_embed"](
            torch.cat([waves.abs(), waves.angle()], dim=-1)
        )
        tokens = tokens.transpose(1, 2) + self.channel_location_embedder(self.places)
        found = self.cross_attn(tokens.flatten(0, 1))  # batch * patches, queries, size
        tokens = found.flatten(1).unflatten(0, (len(data), n_patches))
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def reconstruct(self, tokens: Tensor, names: Tensor) -> Tensor:
        """Return the signals, (batch, n_channels, n_patches * 40), from the tokens that `encode` gave.

        Parameters
        ----------
        tokens : tensor of shape (batch, n_patches, n_queries * size)
        names : integer tensor of shape (n_channels,)
            Number of each channel among those that the pretraining knew.
        """
        if self.decoder_head is None or self.channel_emb is None:
            raise RuntimeError("this LUNA was built without its decoder")
        asked = self.channel_location_embedder(self.places) + self.channel_emb["embeddings"](names)
        found = tokens.flatten(0, 1).unflatten(1, (self.n_queries, self.size))
        signals = self.decoder_head(
            asked.expand(len(found), -1, -1), found
        )  # batch * patches, channels, samples
        return signals.unflatten(0, tokens.shape[:2]).transpose(1, 2).flatten(2)


def encode_places(places: Tensor, size: int) -> Tensor:
    """Return sines and cosines of places, each axis from 0 to 1, at powers of two; what is left of `size` is zero."""
    low, high = places.amin(dim=0), places.amax(dim=0)
    places = (places - low) / (high - low + 1e-8)
    angles = 2.0 ** torch.arange(size // 6)[:, None] * places[:, None]  # channels, frequencies, axes
    code = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(code, (0, size - code.shape[1]))


def _make_stem(n_maps: int) -> nn.Sequential:
    """Return the convolutions of a patch: 40 samples to four steps. The norms run over all channels and patches."""
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(1, n_maps, (1, 19), stride=(1, 10), padding=(0, 9)),
        nn.Conv2d(n_maps, n_maps, (1, 3), padding=(0, 1)),
        nn.Conv2d(n_maps, n_maps, (1, 3), padding=(0, 1)),
    ):
        layers += [conv, nn.GroupNorm(4, n_maps), nn.GELU()]
    return nn.Sequential(*layers)


class _Mlp(nn.Module):
    """Two linear layers with a GELU, and where it is normed a norm, between them."""

    def __init__(self, n_in: int, hidden: int, n_out: int, *, normed: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n_in, hidden), nn.Linear(hidden, n_out)
        self.norm: nn.Module = nn.LayerNorm(hidden) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class _Queries(nn.Module):
    """Learnt queries attend to channels, and then to each other; temperature and names as in the file."""

    def __init__(self, size: int, n_queries: int, n_heads: int) -> None:
        super().__init__()
        self.query_embed = nn.Parameter(nn.init.orthogonal_(torch.empty(1, n_queries, size)))
        self.cross_attention = nn.MultiheadAttention(size, n_heads, batch_first=True)
        self.register_buffer("temparature", torch.tensor(1.0))  # which nothing reads
        self.ffn = _Mlp(size, 4 * size, size, normed=True)
        self.keys_norm, self.values_norm, self.queries_norm = (nn.LayerNorm(size) for _ in range(3))
        layers = (nn.TransformerEncoderLayer(**_describe_layer(size, n_heads)) for _ in range(3))
        self.query_self_attn = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, channels: Tensor) -> Tensor:
        """Map (n, n_channels, size) to (n, n_queries, size)."""
        queries = self.queries_norm(self.query_embed).expand(len(channels), -1, -1)
        keys, values = self.keys_norm(channels), self.values_norm(channels)
        found = self.cross_attention(queries, keys, values, need_weights=False)[0]
        found = found + self.ffn(found)
        layers: Any = self.query_self_attn["layers"]
        for layer in layers:
            found = layer(found)
        return found


class _Decoder(nn.Module):
    """Channels ask the queries of a patch for their samples."""

    def __init__(self, size: int, n_heads: int) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(**_describe_layer(size, n_heads))
        self.decoder_pred = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        self.norm = nn.LayerNorm(size)
        self.decoder_linear = _Mlp(size, 4 * size, PATCH)

    def forward(self, asked: Tensor, found: Tensor) -> Tensor:
        """Map (n, n_channels, size) and (n, n_queries, size) to (n, n_channels, 40)."""
        layers: Any = self.decoder_pred["layers"]
        for layer in layers:
            asked = layer(asked, found)
        return self.decoder_linear(self.norm(asked))


def _describe_layer(size: int, n_heads: int) -> dict[str, Any]:
    return {
        "d_model": size, "nhead": n_heads, "dim_feedforward": 4 * size, "dropout": 0.0, "activation": "gelu",
        "batch_first": True, "norm_first": True,
    }  # fmt: skip


class _Attention(JointAttention):
    """Self-attention whose queries and keys turn with time."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__(width, n_heads)
        self.qkv_proj = self.qkv  # its name in the file
        del self.qkv
        size = width // n_heads
        self.rotary_emb = nn.Module()  # only to give the rates their name
        self.rotary_emb.register_buffer("freqs", THETA ** -(torch.arange(0, size, 2) / size))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(tokens).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        times = torch.arange(tokens.shape[1], device=tokens.device)
        angles = times[:, None] * self.rotary_emb.get_buffer("freqs")
        return self.proj(attend(rotate(q, angles), rotate(k, angles), v))


class _Block(nn.Module):
    """Attention over the patches and a feed-forward part, each behind a norm and around a skip connection."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = _Attention(width, n_heads), _Mlp(width, 4 * width, width, normed=True)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))
