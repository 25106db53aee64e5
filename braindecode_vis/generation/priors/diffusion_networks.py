"""The two networks of the diffusion prior: an MLP U-Net for one vector, a transformer for a sequence of tokens.

Both map a noised target, its diffusion step and a condition to a prediction of the same shape. The condition of each
sample can be taken away on its own (`keep` 0), which is what classifier-free guidance needs. Nothing here knows noise
schedules, training or embeddings.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721 (MLP U-Net); Ramesh et al. (2022), DALL-E 2, arXiv:2204.06125 (transformer
prior); Scotti et al. (2024), MindEye2, arXiv:2403.11207 (a transformer prior without causal mask for image tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from braindecode_vis.base.checks import ConfigError


def build_prior_network(
    shape: tuple[int, ...],
    *,
    kind: Literal["auto", "mlp", "transformer"],
    widths: Sequence[int],
    time_features: int,
    dropout: float,
    depth: int,
    heads: int,
    token_width: int | None,
) -> nn.Module:
    """Return a fresh network for targets, and conditions, of one shape.

    Parameters
    ----------
    shape
        (n_features,) or (n_tokens, n_features).
    kind, widths, time_features, dropout, depth, heads, token_width
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
    width = token_width or n
    if width % heads:
        raise ConfigError(
            f"a transformer of width {width} cannot have {heads} heads; set prior.token_width or prior.heads so that "
            "one divides the other."
        )
    return TokenTransformer(
        tokens, n, tokens, n, width=width, depth=depth, n_heads=heads, time_features=time_features,
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
