"""The modules of the parcel encoder and of its masked autoencoder.

`ParcelEncoder` turns trials into tokens, all of them or the visible ones only; `ParcelNetwork` pools and projects
them; `MaskedAutoencoder` reconstructs the hidden ones from the visible ones. Knows torch and the signal, not files of
weights and not training.

References
----------
He et al. (2022), arXiv:2111.06377.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from braindecode_vis.checks import DataError, check_file
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.signal import Signal

Normalisation = Literal["patch", "parcel"]
PATCH_EPS = 1e-6
PLACE_STD = (
    0.5  # about the size of the fixed sinusoids that He et al. add (0.7); at 0.02 places drown in the values
)


class ParcelNetwork(nn.Module):
    """Encoder, pooling and projector."""

    def __init__(self, config: ParcelsConfig, signal: Signal, n_outputs: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = ParcelEncoder(config, signal)
        self.projector = nn.Sequential(
            nn.LayerNorm(config.width), nn.Linear(config.width, config.projector_hidden), nn.GELU(),
            nn.Dropout(config.dropout), nn.Linear(config.projector_hidden, n_outputs),
        )  # fmt: skip
        self.load_report: Any = None
        names = list(dict.fromkeys(signal.networks))
        membership = torch.zeros(len(names), signal.size_of("parcel"))
        for column, name in enumerate(signal.networks):
            membership[names.index(name), column] = 1
        self.register_buffer("membership", membership, persistent=False)

    membership: Tensor

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output of each trial.

        Parameters
        ----------
        data : tensor of shape (batch, n_parcels) or (batch, n_parcels, n_times)
        subject : integer tensor of shape (batch,)
            Not read: parcels mean the same in everyone.

        Returns
        -------
        tensor of shape (batch, n_outputs)
        """
        tokens = self.encoder(data)  # (batch, 1 + n_tokens, width)
        pooled = tokens[:, 0] if self.config.pooling == "cls" else tokens[:, 1:].mean(dim=1)
        return self.projector(pooled)

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for the mean token of each Yeo network, (batch, n_networks, n_outputs).

        Raises
        ------
        DataError
            If the networks of the parcels are unknown.
        """
        if not len(self.membership):
            raise DataError(
                "local outputs of the parcel encoder are per network, but the responses name no networks."
            )
        tokens = self.encoder(data)[:, 1:]
        grid = tokens.reshape(len(tokens), self.encoder.n_parcels, self.encoder.n_patches, -1).mean(dim=2)
        share = self.membership / self.membership.sum(dim=1, keepdim=True)
        return self.projector(share @ grid)  # (n_networks, n_parcels) @ (batch, n_parcels, width)

    def freeze(self) -> None:
        """Stop the gradient of the embeddings and the first blocks, as `freeze_depth` says."""
        if self.config.freeze_depth == 0:
            return
        frozen = [self.encoder.embed, self.encoder.place, *self.encoder.blocks[: self.config.freeze_depth]]
        for module in frozen:
            module.requires_grad_(False)
        self.encoder.cls.requires_grad_(False)


class ParcelEncoder(nn.Module):
    """Tokens of parcels and time patches through a transformer.

    The input is standardised by one mean and one deviation per parcel, which pretraining measures on its training
    trials and which travel with the weights; without pretraining they are 0 and 1.
    """

    def __init__(self, config: ParcelsConfig, signal: Signal) -> None:
        super().__init__()
        if signal.dims not in (("parcel",), ("parcel", "time")):
            raise DataError(
                f"the parcel encoder reads parcels, or parcels x times, not {' x '.join(signal.dims)}; average the "
                "voxels over an atlas (dataset.atlas) or choose another encoder.network.kind."
            )
        self.n_parcels = signal.shape[0]
        n_times = signal.shape[1] if len(signal.shape) == 2 else 1
        self.patch_times = config.patch_times or n_times
        if n_times % self.patch_times:
            raise DataError(
                f"trials of {n_times} samples do not part into patches of {self.patch_times}; set "
                "encoder.network.patch_times to a divisor."
            )
        self.n_patches = n_times // self.patch_times
        self.register_buffer("mean", torch.zeros(self.n_parcels, 1))
        self.register_buffer("std", torch.ones(self.n_parcels, 1))
        self.embed = nn.Linear(self.patch_times, config.width)
        self.place = PlaceEmbedding(config, signal, config.width, self.n_patches)
        self.cls = nn.Parameter(torch.randn(config.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.n_heads, config.mlp_ratio, config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    mean: Tensor
    std: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens per trial, parcels by patches, without the extra token."""
        return self.n_parcels * self.n_patches

    def cut_patches(self, data: Tensor) -> Tensor:
        """Return standardised patches of shape (batch, n_parcels * n_patches, patch_times), parcel by parcel."""
        series = data.reshape(len(data), self.n_parcels, -1)
        return ((series - self.mean) / self.std).reshape(len(data), self.n_tokens, self.patch_times)

    def forward(self, data: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the tokens, the extra one first.

        Parameters
        ----------
        data : tensor of shape (batch, n_parcels) or (batch, n_parcels, n_times)
        visible : integer tensor of shape (batch, n_visible), optional
            Which tokens the transformer gets to see; all by default.

        Returns
        -------
        tensor of shape (batch, 1 + n_visible, width)
        """
        tokens = self.embed(self.cut_patches(data)) + self.place()
        if visible is not None:
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([self.cls.expand(len(tokens), 1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class PlaceEmbedding(nn.Module):
    """What a token's place in cortex and in time adds to it: parcel, network and patch."""

    def __init__(self, config: ParcelsConfig, signal: Signal, width: int, n_patches: int) -> None:
        super().__init__()
        n_parcels = signal.shape[0]
        self.parcel: nn.Linear | nn.Embedding
        if config.coordinates is not None:
            places = read_centroids(config.coordinates, n_parcels)
            self.register_buffer("centroids", torch.as_tensor(places, dtype=torch.float32), persistent=False)
            self.parcel = nn.Linear(3, width)
        else:
            self.centroids = None
            self.parcel = _make_table(n_parcels, width)
        self.time = _make_table(n_patches, width)
        self.network: nn.Embedding | None = None
        if config.network_embedding:
            if len(signal.networks) != n_parcels:
                raise DataError(
                    f"the network embedding needs the network of each of the {n_parcels} parcels, but the responses "
                    f"name {len(signal.networks)}; set encoder.network.network_embedding=false or use an atlas whose "
                    "names carry networks (Schaefer)."
                )
            names = sorted(set(signal.networks))
            self.register_buffer(
                "network_of", torch.tensor([names.index(name) for name in signal.networks]), persistent=False
            )
            self.network = _make_table(len(names), width)

    centroids: Tensor | None
    network_of: Tensor

    def forward(self) -> Tensor:
        """Return one vector per token, shape (n_parcels * n_patches, width)."""
        place = self.parcel(self.centroids) if self.centroids is not None else self.parcel.weight
        if self.network is not None:
            place = place + self.network(self.network_of)
        grid = place[:, None] + self.time.weight[None]  # (n_parcels, n_patches, width)
        return grid.flatten(0, 1)


class TransformerBlock(nn.Module):
    """Self-attention and feed-forward, each after a LayerNorm and around a skip connection."""

    def __init__(self, width: int, n_heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = round(width * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape (batch, n_tokens, width)."""
        tokens = tokens + self.drop(self._attend(self.norm1(tokens)))
        return tokens + self.drop(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        n, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(n, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_heads, n_tokens, width per head)
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class MaskedAutoencoder(nn.Module):
    """The encoder on visible tokens, and a light decoder that reconstructs the hidden ones.

    Parameters
    ----------
    config, signal
        Of the encoder.
    decoder_width, decoder_depth, decoder_heads
        Size of the decoder.
    normalisation
        What the decoder predicts: ``patch``, the patch with its own mean and variance removed, or ``parcel``, the
        patch standardised by the parcel's training statistics (for patches of few samples, whose own variance says
        nothing).
    """

    def __init__(
        self,
        config: ParcelsConfig,
        signal: Signal,
        *,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        self.encoder = ParcelEncoder(config, signal)
        self.normalisation = normalisation
        self.reduce = nn.Linear(config.width, decoder_width)
        self.hidden_token = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.place = PlaceEmbedding(config, signal, decoder_width, self.encoder.n_patches)
        self.blocks = nn.ModuleList(
            TransformerBlock(decoder_width, decoder_heads, config.mlp_ratio, config.dropout)
            for _ in range(decoder_depth)
        )
        self.norm = nn.LayerNorm(decoder_width)
        self.predict = nn.Linear(decoder_width, self.encoder.patch_times)

    def forward(self, data: Tensor, order: Tensor, n_visible: int) -> Tensor:
        """Return the mean squared error over the hidden tokens of each trial, shape (batch,).

        Parameters
        ----------
        data : tensor of shape (batch, n_parcels) or (batch, n_parcels, n_times)
        order : integer tensor of shape (batch, n_tokens)
            A permutation of each trial's tokens; the first `n_visible` are seen, the others hidden.
        n_visible
            Number of tokens that the encoder sees.
        """
        hidden = order[:, n_visible:]
        predicted = self.reconstruct(data, order, n_visible)
        target = self.make_targets(data).gather(1, _expand(hidden, self.encoder.patch_times))
        return (predicted - target).square().mean(dim=(1, 2))

    def reconstruct(self, data: Tensor, order: Tensor, n_visible: int) -> Tensor:
        """Return the predicted patch of each hidden token, shape (batch, n_hidden, patch_times)."""
        seen = self.reduce(self.encoder(data, order[:, :n_visible]))  # (batch, 1 + n_visible, width)
        n, n_tokens = order.shape
        blank = self.hidden_token.expand(n, n_tokens - n_visible, -1)
        place = self.place()[order]  # (batch, n_tokens, width), in the order of the permutation
        tokens = torch.cat([seen[:, 1:], blank], dim=1) + place
        tokens = torch.cat([seen[:, :1], tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.predict(self.norm(tokens[:, 1 + n_visible :]))

    def make_targets(self, data: Tensor) -> Tensor:
        """Return what the decoder has to predict, shape (batch, n_tokens, patch_times)."""
        patches = self.encoder.cut_patches(data)
        if self.normalisation == "parcel":
            return patches
        centred = patches - patches.mean(dim=-1, keepdim=True)
        return centred / (patches.var(dim=-1, keepdim=True, unbiased=False) + PATCH_EPS).sqrt()


def read_centroids(path: Path, n_parcels: int) -> np.ndarray:
    """Return parcel centroids standardised over the parcels, shape (n_parcels, 3).

    Raises
    ------
    DataError
        If the table is missing, or has other columns or another number of rows.
    """
    path = path.expanduser()
    check_file(path, what="the table of parcel centroids", hint="correct encoder.network.coordinates")
    table = pd.read_csv(path, sep="\t" if path.suffix in (".tsv", ".txt") else ",")
    for columns in (["x", "y", "z"], ["R", "A", "S"]):
        if set(columns) <= set(table.columns):
            places = table[columns].to_numpy(float)
            break
    else:
        raise DataError(f"{path} needs the columns x, y, z or R, A, S, but has {', '.join(table.columns)}.")
    if len(places) != n_parcels or not np.isfinite(places).all():
        raise DataError(
            f"{path} must give a finite centroid for each of the {n_parcels} parcels, but has {len(places)} rows"
            f"{'' if np.isfinite(places).all() else ', some not finite'}; it is of another parcellation."
        )
    spread = places.std()
    return (places - places.mean(axis=0)) / (spread if spread > 0 else 1.0)


def _make_table(n: int, width: int) -> nn.Embedding:
    table = nn.Embedding(n, width)
    nn.init.normal_(table.weight, std=PLACE_STD)
    return table


def _expand(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)
