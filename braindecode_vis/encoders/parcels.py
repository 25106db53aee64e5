"""The parcel encoder and the weights that it starts from.

`ParcelEncoder` turns trials into tokens, all of them or the visible ones only; `ParcelNetwork` pools and projects
them. What predicts hidden tokens is in `training.pretraining_model`. Weights are read from pretraining or
from a foreign file, never unpickled: safetensors, or torch files through ``weights_only``. Every tensor of the encoder
must be found and every tensor of the file used, or named as ignored. Knows nothing of training.

References
----------
He et al. (2022), arXiv:2111.06377.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import load_tensors, read_json
from braindecode_vis.encoders.signal import Signal

# About the size of the fixed sinusoids that He et al. add (0.7); at 0.02 places drown in the values.
PLACE_STD = 0.5
#: Longest and shortest period in s of the waves that tell times: from milliseconds of EEG to minutes of fMRI.
PERIODS_S, N_PERIODS = (0.02, 2000.0), 32
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
        width = encoder.cls.shape[0] * (encoder.n_tokens if pooling == "flatten" else 1)
        self.projector = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, projector_hidden), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(projector_hidden, n_outputs),
        )  # fmt: skip
        self.load_report: LoadReport | None = None
        names = list(dict.fromkeys(signal.networks))
        membership = torch.zeros(len(names), encoder.n_parcels)
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
        if self.pooling == "flatten":
            return self.projector(tokens[:, 1:].flatten(1))
        return self.projector(tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(dim=1))

    token_step = 0.0  # local outputs are networks, not windows

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for the mean token of each Yeo network, (batch, n_networks, n_outputs).

        Raises
        ------
        DataError
            If the networks of the parcels are unknown.
        """
        if self.pooling == "flatten":
            raise DataError(
                "local outputs of the parcel encoder need the mean token of each network, but pooling "
                "flatten has one projector for all tokens; set encoder.network.pooling to mean."
            )
        if not len(self.membership):
            raise DataError(
                "local outputs of the parcel encoder are per network, but the responses have no network names."
            )
        tokens = self.encoder(data)[:, 1:]
        # batch, parcels, patches, width: a mean over the patches
        grid = tokens.unflatten(1, (self.encoder.n_parcels, -1)).mean(dim=2)
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
        Trials of parcels, of parcels x times, or of channels x times, whose channels are taken as parcels are.
    config
        A `ParcelsConfig`: its sizes, and what it knows of places and times.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, signal: Signal, config: Any) -> None:
        super().__init__()
        if signal.dims not in (("parcel",), ("parcel", "time"), ("channel", "time")):
            raise DataError(
                f"the parcel encoder reads parcels, parcels x times or channels x times, not "
                f"{' x '.join(signal.dims)}; average the voxels over an atlas (dataset.atlas) or choose another "
                "encoder.network.kind."
            )
        self.n_parcels = signal.shape[0]
        n_times = signal.shape[1] if len(signal.shape) == 2 else 1
        self.patch_times = config.patch_times or n_times
        if n_times % self.patch_times:
            raise DataError(
                f"trials of {n_times} samples cannot be divided into patches of {self.patch_times}; set "
                "encoder.network.patch_times to a divisor."
            )
        self.n_patches = n_times // self.patch_times
        self.signal, self.network_embedding = signal, config.network_embedding
        self.parcel_position, self.time_position = config.parcel_position, config.time_position
        self.n_heads, self.mlp_ratio, self.dropout = config.n_heads, config.mlp_ratio, config.dropout
        width = config.width
        self.register_buffer("mean", torch.zeros(self.n_parcels, 1))
        self.register_buffer("std", torch.ones(self.n_parcels, 1))
        self.embed = nn.Linear(self.patch_times, width)
        self.place = self.make_places(width)
        self.cls = nn.Parameter(torch.randn(width) * 0.02)  # as ViT starts its class token
        self.blocks = nn.ModuleList(
            TransformerBlock(width, self.n_heads, self.mlp_ratio, self.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)

    def make_places(self, width: int) -> PlaceEmbedding:
        """Return new embeddings of this encoder's places, also for a decoder of another width."""
        seconds = self.patch_times if self.time_position == "seconds" else None
        return PlaceEmbedding(
            self.signal, width, self.n_patches, networks=self.network_embedding,
            own_places=self.parcel_position == "data", patch_times=seconds,
        )  # fmt: skip

    @property
    def n_tokens(self) -> int:
        """Tokens per trial, parcels by patches, without the extra token."""
        return self.n_parcels * self.n_patches

    def cut_patches(self, data: Tensor) -> Tensor:
        """Return standardised patches of shape (batch, n_parcels * n_patches, patch_times), parcel by parcel."""
        series = data.reshape(
            data.shape[0], self.n_parcels, -1
        )  # batch, parcels, times (1 without a time axis)
        return ((series - self.mean) / self.std).reshape(data.shape[0], -1, self.patch_times)

    def forward(
        self,
        data: Tensor,
        visible: Tensor | None = None,
        *,
        interval: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens, the extra one first.

        Parameters
        ----------
        data : tensor of shape (batch, n_parcels) or (batch, n_parcels, n_times)
            Where times are given in seconds, their number may differ from that of the signal.
        visible : integer tensor of shape (batch, n_visible), optional
            Which tokens the transformer gets to see; all by default.
        interval : tensor of shape (batch,), optional
            Seconds between samples, where times are given in seconds; that of the signal by default.
        kept : boolean tensor of shape (batch, n_visible), optional
            Tokens without data (False) are attended to by none; what comes out in their place means nothing.

        Returns
        -------
        tensor of shape (batch, 1 + n_visible, width)
        """
        patches = self.cut_patches(data)
        tokens = self.embed(patches) + self.place(patches.shape[1] // self.n_parcels, interval)
        if visible is not None:
            # Places were added before: a token that is left out takes its place with it.
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat(
            [self.cls.expand(tokens.shape[0], 1, -1), tokens], dim=1
        )  # batch, 1 + n_visible, width
        if kept is not None:
            kept = nn.functional.pad(kept, (1, 0), value=True)  # the extra token is never missing
        for block in self.blocks:
            tokens = block(tokens, kept)
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
    own_places
        Take the places that came with the signal, in the place of a learned vector per parcel.
    patch_times
        Samples of a patch where times are given in seconds, by waves of their own periods; None for a learned vector
        per patch.
    """

    centroids: Tensor | None
    network_of: Tensor
    periods: Tensor

    def __init__(
        self,
        signal: Signal,
        width: int,
        n_patches: int,
        *,
        networks: bool,
        own_places: bool = False,
        patch_times: int | None = None,
    ) -> None:
        super().__init__()
        n_parcels = signal.shape[0]
        self.parcel: nn.Linear | nn.Embedding
        if own_places:
            places = _find_places(signal)
            self.register_buffer("centroids", torch.as_tensor(places, dtype=torch.float32), persistent=False)
            self.parcel = nn.Linear(3, width)
        else:
            self.centroids = None
            self.parcel = _make_table(n_parcels, width)
        self.patch_times, self.interval_s = patch_times, find_interval(signal)
        self.time: nn.Linear | nn.Embedding
        if patch_times is None:
            self.time = _make_table(n_patches, width)
        else:
            if "time" not in signal.dims:
                raise DataError(
                    "encoder.network.time_position=seconds needs responses with a time axis; use learned."
                )
            self.register_buffer(
                "periods",
                torch.logspace(math.log10(PERIODS_S[0]), math.log10(PERIODS_S[1]), N_PERIODS),
                persistent=False,
            )
            self.time = nn.Linear(2 * N_PERIODS + 1, width)
        self.network: nn.Embedding | None = None
        if networks:
            if len(signal.networks) != n_parcels:
                raise DataError(
                    f"the network embedding needs the network of each of the {n_parcels} parcels, but "
                    f"the responses have {len(signal.networks)}; set "
                    "encoder.network.network_embedding=false or use an atlas whose parcel names contain "
                    "networks (Schaefer)."
                )
            names = sorted(set(signal.networks))
            self.register_buffer(
                "network_of", torch.tensor([names.index(name) for name in signal.networks]), persistent=False
            )
            self.network = _make_table(len(names), width)

    def forward(self, n_patches: int | None = None, interval: Tensor | None = None) -> Tensor:
        """Return one vector per token, shape (n_parcels * n_patches, width).

        Parameters
        ----------
        n_patches
            Where times are given in seconds: how many there are now.
        interval : tensor of shape (batch,), optional
            Seconds between samples of each trial; the result then has the shape (batch, n_tokens, width).
        """
        place = self.parcel(self.centroids) if self.centroids is not None else self.parcel.weight
        if self.network is not None:
            place = place + self.network(self.network_of)
        time = self.time.weight if self.patch_times is None else self._tell_times(n_patches, interval)
        grid = place[:, None] + time[..., None, :, :]  # ([batch,] n_parcels, n_patches, width)
        return grid.flatten(-3, -2)

    def _tell_times(self, n_patches: int | None, interval: Tensor | None) -> Tensor:
        """Return a vector per patch from the middle of the patch, in s from the first sample, and its length."""
        assert self.patch_times is not None
        if interval is None:
            if self.interval_s is None:
                raise DataError(
                    "encoder.network.time_position=seconds needs the time between samples, which these "
                    "responses do not have; use learned, or give times or a sampling rate."
                )
            interval = self.periods.new_full((), self.interval_s)
        length = (interval * self.patch_times)[..., None, None].to(self.periods.dtype)  # s of a patch
        middle = (torch.arange(n_patches or 1, device=length.device)[:, None] + 0.5) * length
        angle = 2 * torch.pi * middle / self.periods  # ([batch,] n_patches, n_periods)
        span = length.log10().expand(*middle.shape[:-1], 1)
        return self.time(torch.cat([angle.sin(), angle.cos(), span], dim=-1))


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

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return tokens of the same shape (batch, n_tokens, width); those not `kept` are attended to by none."""
        tokens = tokens + self.drop(self._attend(self.norm1(tokens), kept))
        return tokens + self.drop(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        n, length, width = tokens.shape
        # One product for queries, keys and values of all heads.
        qkv = self.qkv(tokens).reshape(n, length, 3, self.n_heads, width // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_heads, n_tokens, width per head)
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if kept is None else kept[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))  # heads side by side again


def _standardise(places: np.ndarray) -> np.ndarray:
    spread = places.std()  # one for all axes: distances keep their proportions
    return (places - places.mean(axis=0)) / (spread if spread > 0 else 1.0)


def _find_places(signal: Signal) -> np.ndarray:
    if signal.ch_pos is None or not np.isfinite(signal.ch_pos).all():
        raise DataError(
            "encoder.network.parcel_position=data takes the positions from the data, but some or all are "
            "missing here; use learned."
        )
    return _standardise(np.asarray(signal.ch_pos, float))


def find_interval(signal: Signal) -> float | None:
    """Return the seconds between samples, or None if the signal names neither a rate nor times."""
    if signal.sfreq:
        return 1 / signal.sfreq
    if signal.times is None or len(signal.times) < 2:
        return None
    return float(np.median(np.diff(signal.times)))


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
        # Times in seconds are told for any number of patches.
        "n_patches": encoder.n_patches if encoder.time_position == "learned" else None,
        "n_parcels": encoder.n_parcels,
        "network_embedding": encoder.network_embedding,
        "parcel_position": encoder.parcel_position,
        "time_position": encoder.time_position,
        "networks": list(encoder.signal.networks),
        "parcels": list(encoder.signal.parcels or encoder.signal.ch_names),
    }


def read_encoder(
    encoder: ParcelEncoder, file: Path, *, key_map: Mapping[str, str] = {}, ignore: Sequence[str] = ()
) -> LoadReport:
    """Read weights into `encoder`.

    Parameters
    ----------
    encoder
        Changed in place.
    file
        ``.safetensors``, or a torch file of tensors.
    key_map, ignore
        Prefixes to replace in the names of the file, and prefixes of names that are left out.

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
            raise DataError(
                f"two tensors of {file} become {renamed}, so it is not an encoder that pretrain wrote."
            )
        loaded[name], state[renamed] = renamed, tensor
    _check_state(encoder.state_dict(), state, file)
    encoder.load_state_dict(state, strict=False)  # complete but for the optional ones, as was just checked
    return LoadReport(file, loaded, tuple(ignored))


def check_description(found: Mapping[str, Any], path: Path) -> None:
    """Raise `DataError` if an encoder, described in `path`, has another architecture or parcellation than `found`."""
    if path.is_file():
        check_architecture(read_json(path).get("architecture", {}), found, path.parent)


def check_architecture(wanted: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Raise `DataError` if what was `wanted` by an encoder in a folder is not `found`; both by `describe_encoder`."""
    for key, value in wanted.items():
        if key not in found or found[key] == value:  # a folder of another version may name more
            continue
        if key == "parcels":
            # Arrays of one's own name no parcels; their number and networks are compared all the same.
            if value and found[key] and len(value) == len(found[key]):
                place = next(i for i, (a, b) in enumerate(zip(value, found[key], strict=True)) if a != b)
                raise DataError(
                    f"the encoder in {folder} was pretrained on other parcels or channels, or in another "
                    f"order: number {place} was {value[place]} and is {found[key][place]}; it "
                    "belongs to another atlas or montage."
                )
            continue
        if key == "networks":
            if not (value and found[key]) and not found["network_embedding"]:
                continue  # of no meaning to this encoder, and unknown to one of the two
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
        Classes that may be in a torch file beside tensors and plain values.

    Raises
    ------
    DataError
        If it is neither, or holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_tensors(file, "torch")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{file} cannot be read as a file of tensors ({str(error).splitlines()[0][:200]}); give a .safetensors "
            "file, or a torch file that holds only tensors."
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
            parts.append(f"is missing {len(missing)} tensor(s) of the encoder ({', '.join(missing[:5])})")
        if left_over:
            parts.append(f"has {len(left_over)} that are not in the encoder ({', '.join(left_over[:5])})")
        raise DataError(
            f"{file} {' and '.join(parts)}; give its tensors the names of this encoder, or "
            "change width, depth and embeddings to those of the file."
        )
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise DataError(
                f"{name} in {file} has the shape {tuple(tensor.shape)}, but in the encoder "
                f"{tuple(own[name].shape)}: the architecture, the parcellation or the trial length is different."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"{name} in {file} holds values that are not finite.")
