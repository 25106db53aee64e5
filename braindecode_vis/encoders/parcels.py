"""The parcel encoder, its masked autoencoder, and the weights that it starts from.

`ParcelEncoder` turns trials into tokens, all of them or the visible ones only; `ParcelNetwork` pools and projects
them; `MaskedAutoencoder` reconstructs the hidden ones from the visible ones. Weights are read from pretraining or from
a foreign file, never unpickled: safetensors, or torch files through ``weights_only``. Every tensor of the encoder must
be found and every tensor of the file used, or named as ignored. Knows nothing of training.

References
----------
He et al. (2022), arXiv:2111.06377.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from braindecode_vis.checks import DataError, check_file
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.store import read_json

Normalisation = Literal["patch", "parcel"]
PATCH_EPS = 1e-6  # as in the released code of He et al.
# About the size of the fixed sinusoids that He et al. add (0.7); at 0.02 places drown in the values.
PLACE_STD = 0.5
DESCRIPTION = "encoder.json"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "encoder")
_OPTIONAL = {"mean", "std"}  # foreign encoders bring no statistics of the parcels; 0 and 1 stay


class ParcelNetwork(nn.Module):
    """Encoder, pooling and projector.

    Parameters
    ----------
    encoder
        Turns trials into tokens.
    signal
        Names the network of each parcel, for outputs per network.
    n_outputs
        Size of the output.
    pooling, projector_hidden, dropout
        See `ParcelsConfig`.
    """

    membership: Tensor

    def __init__(
        self,
        encoder: ParcelEncoder,
        signal: Signal,
        n_outputs: int,
        *,
        pooling: str,
        projector_hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        width = encoder.cls.shape[0]
        self.projector = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, projector_hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(projector_hidden, n_outputs),
        )  # fmt: skip
        self.load_report: LoadReport | None = None
        names = list(dict.fromkeys(signal.networks))
        membership = torch.zeros(len(names), signal.size_of("parcel"))
        for column, name in enumerate(signal.networks):
            membership[names.index(name), column] = 1  # networks x parcels, one 1 in each column
        self.register_buffer("membership", membership, persistent=False)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output of each trial.

        Parameters
        ----------
        data : tensor of shape (batch, n_parcels) or (batch, n_parcels, n_times)
        subject : integer tensor of shape (batch,)
            Not read: parcels mean the same in every subject.

        Returns
        -------
        tensor of shape (batch, n_outputs)
        """
        tokens = self.encoder(data)  # (batch, 1 + n_tokens, width)
        pooled = tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(dim=1)
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
        grid = tokens.reshape(tokens.shape[0], self.encoder.n_parcels, self.encoder.n_patches, -1).mean(dim=2)
        share = self.membership / self.membership.sum(
            dim=1, keepdim=True
        )  # rows sum to one: a mean over parcels
        return self.projector(share @ grid)  # (n_networks, n_parcels) @ (batch, n_parcels, width)

    def freeze(self, depth: int) -> None:
        """Stop the gradient of the embeddings and the first `depth` blocks; of nothing for 0."""
        if depth == 0:
            return
        frozen = [self.encoder.embed, self.encoder.place, *self.encoder.blocks[:depth]]
        for module in frozen:
            module.requires_grad_(False)
        self.encoder.cls.requires_grad_(False)


class ParcelEncoder(nn.Module):
    """Tokens of parcels and time patches through a transformer.

    The input is standardised by one mean and one deviation per parcel, which pretraining measures on its training
    trials and which travel with the weights; without pretraining they are 0 and 1.

    Parameters
    ----------
    signal
        Trials of parcels, or of parcels x times.
    patch_times, width, depth, n_heads, mlp_ratio, dropout, network_embedding
        See `ParcelsConfig`.
    coordinates
        Table of centroids that replaces the learned vector of each parcel, or None.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        signal: Signal,
        *,
        patch_times: int | None,
        width: int,
        depth: int,
        n_heads: int,
        mlp_ratio: float,
        dropout: float,
        network_embedding: bool,
        coordinates: Path | None,
    ) -> None:
        super().__init__()
        if signal.dims not in (("parcel",), ("parcel", "time")):
            raise DataError(
                f"the parcel encoder reads parcels, or parcels x times, not {' x '.join(signal.dims)}; average the "
                "voxels over an atlas (dataset.atlas) or choose another encoder.network.kind."
            )
        self.n_parcels = signal.shape[0]
        n_times = signal.shape[1] if len(signal.shape) == 2 else 1
        self.patch_times = patch_times or n_times
        if n_times % self.patch_times:
            raise DataError(
                f"trials of {n_times} samples do not part into patches of {self.patch_times}; set "
                "encoder.network.patch_times to a divisor."
            )
        self.n_patches = n_times // self.patch_times
        self.signal, self.coordinates, self.network_embedding = signal, coordinates, network_embedding
        self.n_heads, self.mlp_ratio, self.dropout = n_heads, mlp_ratio, dropout
        self.register_buffer("mean", torch.zeros(self.n_parcels, 1))
        self.register_buffer("std", torch.ones(self.n_parcels, 1))
        self.embed = nn.Linear(self.patch_times, width)
        self.place = self.make_places(width)
        self.cls = nn.Parameter(torch.randn(width) * 0.02)  # as ViT starts its class token
        self.blocks = nn.ModuleList(
            TransformerBlock(width, n_heads, mlp_ratio, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def make_places(self, width: int) -> PlaceEmbedding:
        """Return new embeddings of this encoder's places, also for a decoder of another width."""
        return PlaceEmbedding(
            self.signal, width, self.n_patches, networks=self.network_embedding, coordinates=self.coordinates
        )

    @property
    def n_tokens(self) -> int:
        """Tokens per trial, parcels by patches, without the extra token."""
        return self.n_parcels * self.n_patches

    def cut_patches(self, data: Tensor) -> Tensor:
        """Return standardised patches of shape (batch, n_parcels * n_patches, patch_times), parcel by parcel."""
        series = data.reshape(
            data.shape[0], self.n_parcels, -1
        )  # batch, parcels, times (1 without a time axis)
        return ((series - self.mean) / self.std).reshape(data.shape[0], self.n_tokens, self.patch_times)

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
            # Places were added before: a token that is left out takes its place with it.
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat(
            [self.cls.expand(tokens.shape[0], 1, -1), tokens], dim=1
        )  # batch, 1 + n_visible, width
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class PlaceEmbedding(nn.Module):
    """What a token's place in cortex and in time adds to it: parcel, network and patch.

    Parameters
    ----------
    signal
        Number of parcels and the network of each.
    width, n_patches
        Size of a token, and patches of time.
    networks
        Whether the parcel's network adds a vector of its own.
    coordinates
        Table of centroids, or None for a learned vector per parcel.
    """

    centroids: Tensor | None
    network_of: Tensor

    def __init__(
        self, signal: Signal, width: int, n_patches: int, *, networks: bool, coordinates: Path | None
    ) -> None:
        super().__init__()
        n_parcels = signal.shape[0]
        self.parcel: nn.Linear | nn.Embedding
        if coordinates is not None:
            places = read_centroids(coordinates, n_parcels)
            self.register_buffer("centroids", torch.as_tensor(places, dtype=torch.float32), persistent=False)
            self.parcel = nn.Linear(3, width)
        else:
            self.centroids = None
            self.parcel = _make_table(n_parcels, width)
        self.time = _make_table(n_patches, width)
        self.network: nn.Embedding | None = None
        if networks:
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
        # One product for queries, keys and values of all heads.
        qkv = self.qkv(tokens).reshape(n, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_heads, n_tokens, width per head)
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))  # heads side by side again


class MaskedAutoencoder(nn.Module):
    """The encoder on visible tokens, and a light decoder that reconstructs the hidden ones.

    Parameters
    ----------
    encoder
        Learns with the decoder.
    decoder_width, decoder_depth, decoder_heads
        Size of the decoder.
    normalisation
        What the decoder predicts: ``patch``, the patch with its own mean and variance removed, or ``parcel``, the
        patch standardised by the parcel's training statistics (for patches of few samples, whose own variance says
        nothing).
    """

    def __init__(
        self,
        encoder: ParcelEncoder,
        *,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalisation = normalisation
        self.reduce = nn.Linear(encoder.cls.shape[0], decoder_width)
        self.hidden_token = nn.Parameter(torch.randn(decoder_width) * 0.02)
        self.place = encoder.make_places(decoder_width)
        self.blocks = nn.ModuleList(
            TransformerBlock(decoder_width, decoder_heads, encoder.mlp_ratio, encoder.dropout)
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
        target = self.make_targets(data).gather(1, hidden[..., None].expand(-1, -1, self.encoder.patch_times))
        return (predicted - target).square().mean(dim=(1, 2))  # visible tokens carry no loss, as in He et al.

    def reconstruct(self, data: Tensor, order: Tensor, n_visible: int) -> Tensor:
        """Return the predicted patch of each hidden token, shape (batch, n_hidden, patch_times)."""
        seen = self.reduce(self.encoder(data, order[:, :n_visible]))  # (batch, 1 + n_visible, width)
        n, n_tokens = order.shape
        blank = self.hidden_token.expand(n, n_tokens - n_visible, -1)
        place = self.place()[order]  # (batch, n_tokens, width), in the order of the permutation
        # The extra token has no place in cortex or time, so that it joins after places were added.
        tokens = torch.cat([seen[:, 1:], blank], dim=1) + place
        tokens = torch.cat([seen[:, :1], tokens], dim=1)  # batch, 1 + n_tokens, width
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
    spread = places.std()  # one for all axes: distances keep their proportions
    return (places - places.mean(axis=0)) / (spread if spread > 0 else 1.0)


def _make_table(n: int, width: int) -> nn.Embedding:
    table = nn.Embedding(n, width)
    nn.init.normal_(table.weight, std=PLACE_STD)
    return table


@dataclass(frozen=True)
class LoadReport:
    """What was read.

    Parameters
    ----------
    file
        Where from.
    loaded
        Name in the file to name in the encoder.
    ignored
        Names in the file that were left out because the configuration says so.
    """

    file: Path
    loaded: Mapping[str, str]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        renamed = [f"{a} as {b}" for a, b in self.loaded.items() if a != b]
        text = f"{len(self.loaded)} tensors from {self.file}"
        if renamed:
            text += f", {len(renamed)} renamed (first {renamed[0]})"
        return text + (f", {len(self.ignored)} ignored" if self.ignored else "")


def describe_encoder(encoder: ParcelEncoder) -> dict[str, Any]:
    """Return what two encoders must share for their weights to mean the same."""
    return {
        "width": encoder.cls.shape[0],
        "depth": len(encoder.blocks),
        "n_heads": encoder.n_heads,
        "mlp_ratio": encoder.mlp_ratio,
        "patch_times": encoder.patch_times,
        "n_patches": encoder.n_patches,
        "n_parcels": encoder.n_parcels,
        "network_embedding": encoder.network_embedding,
        "parcel_position": "learned" if encoder.coordinates is None else "coordinates",
        "networks": list(encoder.signal.networks),
    }


def read_encoder(
    encoder: ParcelEncoder, file: Path, *, key_map: Mapping[str, str], ignore: Sequence[str]
) -> LoadReport:
    """Read weights into `encoder`.

    Parameters
    ----------
    encoder
        Changed in place.
    file
        ``.safetensors``, or a torch file of tensors.
    key_map, ignore
        See `ParcelsConfig`.

    Raises
    ------
    DataError
        If the file cannot be read, a tensor is missing, left over or of another shape, two have the same name, or
        a value is not finite.
    """
    tensors = _read_tensors(file)
    loaded: dict[str, str] = {}
    ignored: list[str] = []
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(name.startswith(prefix) for prefix in ignore):
            ignored.append(name)
            continue
        prefix = next((old for old in key_map if name.startswith(old)), None)  # the first that fits
        renamed = name if prefix is None else key_map[prefix] + name[len(prefix) :]
        if renamed in state:
            raise DataError(f"two tensors of {file} become {renamed}; correct encoder.network.key_map.")
        loaded[name], state[renamed] = renamed, tensor
    _check_state(encoder.state_dict(), state, file)
    encoder.load_state_dict(state, strict=False)  # complete but for the optional ones, as was just checked
    return LoadReport(file, loaded, tuple(ignored))


def check_description(found: Mapping[str, Any], folder: Path) -> None:
    """Raise `DataError` if `folder` was pretrained with another architecture or parcellation than `found`."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return
    wanted = read_json(path).get("architecture", {})
    for key, value in wanted.items():
        if key not in found or found[key] == value:  # a folder of another version may name more
            continue
        if key == "networks":
            where = next((i for i, (a, b) in enumerate(zip(value, found[key], strict=False)) if a != b), None)
            raise DataError(
                f"the encoder in {folder} was pretrained on parcels of other networks (first difference at parcel "
                f"{where if where is not None else min(len(value), len(found[key]))}): it belongs to another atlas."
            )
        raise DataError(
            f"the encoder in {folder} was pretrained with {key} = {value}, but this one has {found[key]}; set "
            f"encoder.network accordingly, or pretrain again."
        )


def read_content(file: Path, *, allowed: Sequence[type] = ()) -> Any:
    """Return what a file of tensors holds, without running code that it may hold.

    Parameters
    ----------
    file
        Safetensors, or a torch file.
    allowed
        Classes that may stand in a torch file beside tensors and plain values.

    Raises
    ------
    DataError
        If it is neither, or holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{file} cannot be read as a file of tensors ({str(error).splitlines()[0][:200]}); give a .safetensors "
            "file, or a torch file that holds nothing but tensors."
        ) from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    content = read_content(file)
    for _ in range(3):  # checkpoints of trainers wrap a state dict up to three times
        inner = next(
            (key for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)),
            None,
        )
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not a table of named tensors.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"{file} holds no tensor.")
    return tensors


def _check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor], file: Path) -> None:
    missing, left_over = sorted(set(own) - set(given) - _OPTIONAL), sorted(set(given) - set(own))
    if missing or left_over:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} tensor(s) of the encoder ({', '.join(missing[:5])})")
        if left_over:
            parts.append(f"has {len(left_over)} that the encoder does not know ({', '.join(left_over[:5])})")
        raise DataError(
            f"{file} {' and '.join(parts)}; rename with encoder.network.key_map, leave out with "
            "encoder.network.ignore_keys, or change width, depth and embeddings to those of the file."
        )
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise DataError(
                f"{name} in {file} has the shape {tuple(tensor.shape)}, but the encoder's is "
                f"{tuple(own[name].shape)}: another architecture, parcellation or length of trial."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"{name} in {file} holds values that are not finite.")
