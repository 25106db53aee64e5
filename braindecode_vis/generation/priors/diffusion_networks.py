"""The networks of diffusion priors: an MLP U-Net for one vector, and two transformers for a sequence of tokens.

All map a noised target, its diffusion step and a condition to a prediction of the same shape. The condition of each
sample can be taken away on its own (`keep` 0), which is what classifier-free guidance needs. Nothing here knows noise
schedules, training or embeddings.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721 (MLP U-Net); Ramesh et al. (2022), DALL-E 2, arXiv:2204.06125 (transformer
prior); Scotti et al. (2024), MindEye2, arXiv:2403.11207 (a transformer prior without causal mask for image tokens);
Shazeer (2019), arXiv:1911.02150 (one key and value for all heads); Su et al. (2021), arXiv:2104.09864 (rotary
positions); Raffel et al. (2020), T5, arXiv:1910.10683 (buckets of distances).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import ConfigError


def build_prior_network(
    shape: tuple[int, ...],
    *,
    kind: Literal["auto", "mlp", "transformer", "mindeye2"],
    widths: Sequence[int],
    time_features: int,
    dropout: float,
    depth: int,
    heads: int,
) -> nn.Module:
    """Return a fresh network for targets, and conditions, of one shape.

    Parameters
    ----------
    shape
        (n_features,) or (n_tokens, n_features).
    kind, widths, time_features, dropout, depth, heads
        As in `DiffusionPriorConfig`.

    Raises
    ------
    ConfigError
        If the kind does not fit the shape, or the heads the width.
    """
    if kind == "auto":
        kind = "mlp" if len(shape) == 1 else "transformer"
    if kind == "mlp":
        if len(shape) != 1:
            raise ConfigError(
                f"prior.network is mlp, but each embedding is {shape[0]} tokens; use transformer or auto."
            )
        return MlpUnet(shape[0], shape[0], widths=widths, time_features=time_features, dropout=dropout)
    tokens, n = (1, shape[0]) if len(shape) == 1 else shape
    if kind == "mindeye2":
        return BrainTokenTransformer(tokens, n, depth=depth, n_heads=heads, head_width=max(2, n // heads))
    if n % heads:
        raise ConfigError(
            f"a transformer of width {n}, that of the target, cannot have {heads} heads; set prior.heads to a divisor."
        )
    return TokenTransformer(
        tokens, n, tokens, n, width=n, depth=depth, n_heads=heads, time_features=time_features,
        dropout=dropout,
    )  # fmt: skip


def embed_timesteps(timesteps: Tensor, n_features: int) -> Tensor:
    """Return the sinusoidal code of diffusion steps.

    Parameters
    ----------
    timesteps : tensor of shape (n,)
        Steps of the schedule.
    n_features
        Even size of the code: cosines first, then sines, of periods from 2 pi to 10 000 times that.

    Returns
    -------
    float tensor of shape (n, n_features)
    """
    # Frequencies from 1 down to 1 / 10 000, as in Vaswani et al. (2017), arXiv:1706.03762.
    half = n_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class MlpUnet(nn.Module):
    """ATM's U-shaped perceptron on one embedding vector.

    From level to level the width falls (1024, 512, 256, 128, 64 in the paper) and rises again, with additive skips.
    Before every block but the first a time embedding (two layers with a SiLU between them) and a linear map of the
    condition are added. A block is Linear, LayerNorm, SiLU and dropout; the first one, from the embedding, has none.

    Parameters
    ----------
    n_features, n_conditions
        Sizes of the target vector and of the condition.
    widths
        Width of each level, the first one first.
    time_features
        Size of the sinusoidal time code.
    dropout
        Probability of the dropout of each block but the first.
    """

    def __init__(
        self, n_features: int, n_conditions: int, *, widths: Sequence[int], time_features: int, dropout: float
    ) -> None:
        super().__init__()
        self.time_features = time_features
        downward, upward = list(widths), list(widths)[::-1]
        self.entry = _make_block(n_features, widths[0], 0.0)
        self.down = nn.ModuleList(
            _Level(a, b, n_conditions, time_features, dropout) for a, b in pairwise(downward)
        )
        self.up = nn.ModuleList(
            _Level(a, b, n_conditions, time_features, dropout) for a, b in pairwise(upward)
        )
        self.exit = nn.Linear(widths[0], n_features)

    def forward(self, noised: Tensor, timesteps: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Return the prediction of shape (n, n_features).

        Parameters
        ----------
        noised : tensor of shape (n, n_features)
        timesteps : tensor of shape (n,)
        condition : tensor of shape (n, n_conditions)
        keep : tensor of shape (n,)
            1 where the condition is seen, 0 where it is not.
        """
        time = embed_timesteps(timesteps, self.time_features).to(noised.dtype)
        hidden, skips = self.entry(noised), []
        for level in self.down:
            skips.append(hidden)
            hidden = level(hidden, time, condition, keep)
        for level in self.up:
            hidden = level(hidden, time, condition, keep) + skips.pop()  # added, not joined, as ATM does
        return self.exit(hidden)


class _Level(nn.Module):
    """Adds time and condition at one width, then changes to the next width."""

    def __init__(self, width: int, next_width: int, n_conditions: int, n_time: int, dropout: float) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(n_time, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(n_conditions, width)
        self.block = _make_block(width, next_width, dropout)

    def forward(self, hidden: Tensor, time: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Return hidden values of the next width."""
        # The bias of the map is part of the condition: a sample without one gets neither.
        return self.block(hidden + self.time(time) + self.condition(condition) * keep[:, None])


def _make_block(n_in: int, n_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.SiLU(), nn.Dropout(dropout))


class TokenTransformer(nn.Module):
    """A transformer over condition tokens, one time token and the noised target tokens.

    Attention is not masked: every token sees every other, as suits a set of image tokens (DALL-E 2 has a causal mask
    and one query for its single vector). What is read out are the places of the noised tokens. A sample without a
    condition sees one learnt token in the place of each of its condition tokens.

    Parameters
    ----------
    n_tokens, n_features
        Shape of the target.
    n_condition_tokens, n_conditions
        Shape of the condition.
    width
        Size of the tokens inside.
    depth, n_heads
        Number of layers, and of attention heads in each.
    time_features
        Size of the sinusoidal time code.
    dropout
        Probability of every dropout inside a layer.
    """

    def __init__(
        self,
        n_tokens: int,
        n_features: int,
        n_condition_tokens: int,
        n_conditions: int,
        *,
        width: int,
        depth: int,
        n_heads: int,
        time_features: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.n_tokens, self.time_features = n_tokens, time_features
        self.entry = nn.Linear(n_features, width)
        self.condition = nn.Linear(n_conditions, width)
        self.time = nn.Sequential(nn.Linear(time_features, width), nn.SiLU(), nn.Linear(width, width))
        # Deviation 0.02 as of BERT's embeddings (arXiv:1810.04805).
        self.absent = nn.Parameter(torch.randn(n_condition_tokens, width) * 0.02)
        self.places = nn.Parameter(torch.randn(n_condition_tokens + 1 + n_tokens, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                # Normalised before attention, which trains stably without a warm-up (arXiv:2002.04745).
                width,
                n_heads,
                4 * width,
                dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, n_features)

    def forward(self, noised: Tensor, timesteps: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
        """Return the prediction of shape (n, n_tokens, n_features).

        Parameters
        ----------
        noised : tensor of shape (n, n_tokens, n_features)
            With one token, rows of shape (n, n_features) come back in their own shape; so for `condition`.
        timesteps : tensor of shape (n,)
        condition : tensor of shape (n, n_condition_tokens, n_conditions)
        keep : tensor of shape (n,)
            1 where the condition is seen, 0 where it is not.
        """
        if noised.ndim == 2:
            return self(noised[:, None], timesteps, condition[:, None], keep)[:, 0]
        time = self.time(embed_timesteps(timesteps, self.time_features).to(noised.dtype))[:, None]
        seen = keep[:, None, None]  # (n, 1, 1), against tokens of shape (n, n_condition_tokens, width)
        context = self.condition(condition) * seen + self.absent * (1 - seen)
        tokens = torch.cat([context, time, self.entry(noised)], dim=1) + self.places
        for layer in self.layers:
            tokens = layer(tokens)  # (n, n_condition_tokens + 1 + n_tokens, width)
        return self.exit(self.norm(tokens[:, -self.n_tokens :]))


class BrainTokenTransformer(nn.Module):
    """The transformer of MindEye2's prior, as its code runs it, over tokens of their own width.

    A sequence is the condition, one token of time and the noised target, to which learnt places are added; the places
    of the target are read out. Attention compares directions: queries and keys have length one, all heads share one
    key and one value, and one learnt key and value come before the others. A sample without a condition, or without
    noised tokens, sees learnt tokens in their place. There is no dropout.

    Distances enter twice, by rotary positions and by a bias of T5's buckets that counts backwards only: everything
    that follows a token is at distance 0. The key before the others shifts the count by one.

    Parameters
    ----------
    n_tokens, n_features
        Shape of the target and of the condition.
    depth, n_heads, head_width
        Layers, attention heads, and features of a head (MindEye2: 6, 32, 52).
    """

    def __init__(self, n_tokens: int, n_features: int, *, depth: int, n_heads: int, head_width: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.time = nn.Sequential(
            nn.Linear(n_features, 2 * n_features), nn.SiLU(), nn.Linear(2 * n_features, 2 * n_features), nn.SiLU(),
            nn.Linear(2 * n_features, n_features),
        )  # fmt: skip
        self.places = nn.Parameter(torch.randn(n_tokens, n_features) * n_features**-0.5)
        self.distances = nn.Embedding(DISTANCES, n_heads)
        self.attention = nn.ModuleList(
            _DirectionAttention(n_features, n_heads, head_width) for _ in range(depth)
        )
        self.mixing = nn.ModuleList(_GatedLayer(n_features) for _ in range(depth))
        self.norm = _GainNorm(n_features, by_largest=True)
        self.exit = nn.Linear(n_features, n_features, bias=False)
        self.absent = nn.Parameter(torch.randn(n_tokens, n_features))
        self.hidden = nn.Parameter(torch.randn(n_tokens, n_features))

    def forward(
        self,
        noised: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        keep: Tensor,
        keep_noised: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction of shape (n, n_tokens, n_features).

        Parameters
        ----------
        noised : tensor of shape (n, n_tokens, n_features)
            With one token, rows of shape (n, n_features) come back in their own shape; so for `condition`.
        timesteps : tensor of shape (n,)
        condition : tensor of shape (n, n_tokens, n_features)
        keep, keep_noised : tensors of shape (n,)
            1 where the condition, or what was noised, is seen, 0 where it is not.
        """
        if noised.ndim == 2:
            return self(noised[:, None], timesteps, condition[:, None], keep, keep_noised)[:, 0]
        context = torch.where(keep[:, None, None] > 0, condition, self.absent)
        if keep_noised is not None:
            noised = torch.where(keep_noised[:, None, None] > 0, noised, self.hidden)
        time = self.time(_code_time(timesteps, noised.shape[-1]).to(noised.dtype))[:, None]
        tokens = torch.cat([context, time, noised + self.places], dim=1)
        n = tokens.shape[1]  # of the condition, the time and the target
        bias = self.distances(_bucket_distances(n, tokens.device)).permute(2, 0, 1)  # (heads, n, 1 + n)
        for attention, mixing in zip(self.attention, self.mixing, strict=True):
            tokens = tokens + attention(tokens, bias)
            tokens = tokens + mixing(tokens)
        return self.exit(self.norm(tokens[:, -self.n_tokens :]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what has no weight decay: biases, those of distances among them; all others have the optimiser's."""
        spared = [self.distances.weight, *(p for name, p in self.named_parameters() if name.endswith("bias"))]
        mine = {id(p) for p in spared}
        return [
            {"params": [p for p in self.parameters() if id(p) not in mine]},
            {"params": spared, "weight_decay": 0.0},
        ]


DISTANCES, FARTHEST = 32, 128  # buckets of T5, and the distance from which on all share the last one
_ROTATED = 32  # most features of a head that positions rotate


class _GainNorm(nn.Module):
    """Layer norm with a gain and no bias; `by_largest` divides by the largest value first, through no gradient."""

    def __init__(self, n_features: int, *, by_largest: bool = False) -> None:
        super().__init__()
        self.gain, self.by_largest = nn.Parameter(torch.ones(n_features)), by_largest

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape (..., n_features)."""
        if self.by_largest:
            tokens = tokens / tokens.amax(dim=-1, keepdim=True).detach()
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-5) * self.gain


class _DirectionAttention(nn.Module):
    """Attention by cosines times 16, one key and value for all heads; see `BrainTokenTransformer`."""

    def __init__(self, n_features: int, n_heads: int, head_width: int) -> None:
        super().__init__()
        self.n_heads, self.head_width = n_heads, head_width
        self.norm = _GainNorm(n_features)
        self.first = nn.Parameter(torch.randn(2, head_width))  # the key and the value before the others
        self.query = nn.Linear(n_features, n_heads * head_width, bias=False)
        self.key_value = nn.Linear(n_features, 2 * head_width, bias=False)
        self.exit = nn.Linear(n_heads * head_width, n_features, bias=False)
        self.exit_norm = _GainNorm(n_features)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Return what each token takes from all, shape (n, n_tokens, n_features)."""
        tokens = self.norm(tokens)
        query = (
            self.query(tokens).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        )  # (n, heads, tokens, width)
        key, value = self.key_value(tokens).chunk(2, dim=-1)  # (n, tokens, width)
        first = self.first[:, None, None].expand(-1, len(tokens), -1, -1)  # (2, n, 1, width)
        key = torch.cat([first[0], _rotate(key)], dim=1)[:, None]
        value = torch.cat([first[1], value], dim=1)[:, None]
        query, key = functional.normalize(_rotate(query), dim=-1), functional.normalize(key, dim=-1)
        shape = (-1, self.n_heads, -1, -1)
        taken = functional.scaled_dot_product_attention(
            query, key.expand(shape), value.expand(shape), attn_mask=bias[None].to(query.dtype), scale=16.0
        )
        return self.exit_norm(self.exit(taken.transpose(1, 2).flatten(2)))


class _GatedLayer(nn.Module):
    """Norm, and a layer of four times the width whose values pass by a gate (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.norm = _GainNorm(n_features)
        self.entry = nn.Linear(n_features, 8 * n_features, bias=False)
        self.exit = nn.Linear(4 * n_features, n_features, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape (..., n_features)."""
        values, gate = self.entry(self.norm(tokens)).chunk(2, dim=-1)
        return self.exit(values * functional.silu(gate))


def _code_time(timesteps: Tensor, n_features: int) -> Tensor:
    """Return sines, then cosines, of steps; other than `embed_timesteps`, the last period is 2 pi 10 000 exactly."""
    half = max(1, n_features // 2)
    rate = math.log(10_000) / max(1, half - 1)
    angles = timesteps[:, None] * torch.exp(-rate * torch.arange(half, device=timesteps.device))[None]
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    return (
        functional.pad(code, (0, n_features - code.shape[1]))
        if code.shape[1] < n_features
        else code[:, :n_features]
    )


def _bucket_distances(n_tokens: int, device: torch.device) -> Tensor:
    """Return the bucket of the distance from each token back to each key, shape (n_tokens, 1 + n_tokens)."""
    places = torch.arange(n_tokens + 1, device=device)
    back = (places[:n_tokens, None] - places[None]).clamp(min=0)
    exact = DISTANCES // 2
    far = torch.log(back.float().clamp(min=1) / exact) / math.log(FARTHEST / exact) * (DISTANCES - exact)
    return torch.where(back < exact, back, (exact + far.long()).clamp(max=DISTANCES - 1))


def _rotate(heads: Tensor) -> Tensor:
    """Rotate pairs of neighbouring features by the place of their token along the last axis but one."""
    n_tokens, width = heads.shape[-2:]
    n = min(_ROTATED, width) // 2  # pairs
    size = min(_ROTATED, width)
    rates = 1.0 / 10_000 ** (2 * torch.arange(n, device=heads.device) / size)
    exact = torch.promote_types(heads.dtype, torch.float32)  # half precision has no place beyond 256
    angles = torch.arange(n_tokens, dtype=exact, device=heads.device)[:, None] * rates.to(exact)
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    pairs = heads[..., : 2 * n].unflatten(-1, (n, 2))
    left, right = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([left * cosine - right * sine, right * cosine + left * sine], dim=-1).flatten(-2)
    return torch.cat([turned, heads[..., 2 * n :]], dim=-1)
