"""What surrounds a published foundation model: its front, the reading of its file, its tuning and its projector.

Each model is a `Backbone` in a file of its own; parts that several have are here. Knows nothing of training.

References
----------
Hu et al. (2022), LoRA, arXiv:2106.09685. Perrin et al. (1989), doi:10.1016/0013-4694(89)90180-6.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import autocast
from braindecode_vis.encoders.parcels import read_content
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.parts.foundation.models import FROZEN, MARKS, WeightsLayout

#: Of the norms of vision transformers.
EPS = 1e-6


class Backbone(nn.Module):
    """A foundation model, with what most of them have by default.

    Its ``forward(data)`` maps trials (batch, n_channels, n_times), in its own channels, rate and unit, to tokens
    (batch, n_tokens, width).
    """

    #: Features of a token.
    width: int
    #: How many tokens stand before those of patches.
    n_extra: int = 0
    #: Name of the list of its blocks.
    stack: str = "blocks"
    #: Parts of the names of the weights that ``lora`` changes.
    attention: tuple[str, ...]
    #: Starts of the names of what comes behind the last block.
    top: tuple[str, ...] = ()

    def finish(self, features: Tensor) -> Tensor:
        """Return pooled tokens after the last norm, or as they are: normed before, or by no last norm at all."""
        return features

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the tokens of patches as the model's own query weights them, shape (batch, width)."""
        raise NotImplementedError


class FoundationNetwork(nn.Module):
    """Front, foundation model, pooling and projector.

    Parameters
    ----------
    front
        Brings trials to the model's channels, rate and unit.
    backbone
        The model.
    signal
        Of the trials.
    n_outputs
        Size of the output.
    settings
        Tuning, pooling and projector: a `FoundationConfig`.
    missing
        Path of a file of weights that is not there: the network then answers only after its weights were loaded.
    """

    def __init__(
        self,
        front: nn.Module,
        backbone: Backbone,
        signal: Signal,
        n_outputs: int,
        settings: Any,
        *,
        missing: str = "",
    ) -> None:
        super().__init__()
        self.front, self.backbone, self.settings, self.missing = front, backbone, settings, missing
        self.probing = settings.tuning == "probe_then_full"
        self.pooling = "query" if settings.tuning == "attentive_probe" else settings.pooling
        if settings.tuning in (*FROZEN, "lora"):
            backbone.requires_grad_(False)
        self.changes = None
        if settings.tuning == "lora":
            self.changes = LowRankChanges(backbone, settings.lora_rank)
        n_features = backbone.width
        if self.pooling == "flatten":
            with torch.no_grad():  # the number of tokens is known after one trial
                n_features *= self.backbone(front(torch.zeros(1, *signal.shape))).shape[1] - backbone.n_extra
        self.query = QueryPooling(backbone.width) if self.pooling == "query" else None
        if settings.tuning in ("linear_probe", "attentive_probe"):
            self.projector = nn.Sequential(nn.LayerNorm(n_features), nn.Linear(n_features, n_outputs))
        else:
            hidden = settings.projector_hidden
            self.projector = nn.Sequential(
                nn.LayerNorm(n_features), nn.Linear(n_features, hidden), nn.GELU(),
                nn.Dropout(settings.dropout), nn.Linear(hidden, n_outputs),
            )  # fmt: skip
        if missing:
            self.register_load_state_dict_post_hook(lambda network, _: setattr(network, "missing", ""))

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output of each trial.

        Parameters
        ----------
        data : tensor of shape (batch, *signal.shape)
        subject : integer tensor of shape (batch,)
            Not read.

        Returns
        -------
        tensor of shape (batch, n_outputs)

        Raises
        ------
        ConfigError
            If the published weights were neither read nor loaded.
        """
        if self.missing:
            raise ConfigError(
                f"the pretrained weights were not found at {self.missing}, but the training starts from "
                "them; correct encoder.network.pretrained."
            )
        return self.projector(self._pool(self.encode(data)))

    def encode(self, data: Tensor) -> Tensor:
        """Return the model's tokens, shape (batch, n_tokens, width)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._backbone_learns()):
            data = self.front(data)
            if self.changes is None:
                return self.backbone(data)
            return functional_call(self.backbone, self.changes.merge(self.backbone), (data,))

    def _backbone_learns(self) -> bool:
        # Several processes wait for the gradient of every weight, also of those that rest.
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.settings.tuning not in FROZEN and (not self.probing or shared)

    def _pool(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.backbone.n_extra :]
        if self.pooling == "mean":
            return self.backbone.finish(patches.mean(dim=1))
        if self.pooling in ("cls", "last"):
            return self.backbone.finish(tokens[:, 0 if self.pooling == "cls" else -1])
        if self.pooling == "attention":
            return self.backbone.finish(self.backbone.pool(patches))
        if self.query is not None:
            return self.query(self.backbone.finish(patches))
        return self.backbone.finish(patches).flatten(1)  # (batch, n_tokens * width)

    def enter_epoch(self, progress: float) -> Sequence[nn.Parameter]:
        """Return the weights that rest in an epoch, which begins at this share of the training."""
        if self.settings.tuning != "probe_then_full":
            return ()
        self.probing = progress < self.settings.probe_share
        return tuple(self.backbone.parameters()) if self.probing else ()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the model's learning weights by layer, each with its part of the learning rate."""
        layers, settings = self.backbone.get_submodule(self.backbone.stack).children(), self.settings
        top = [p for name, p in self.backbone.named_parameters() if name.startswith(self.backbone.top)]
        inner = [list(layer.parameters()) for layer in layers]
        taken = {id(p) for part in (*inner, top) for p in part}
        bottom = [p for p in self.backbone.parameters() if id(p) not in taken]
        groups = []
        for depth, part in enumerate([top, *reversed(inner), bottom]):  # from the top down
            learning = [p for p in part if p.requires_grad]
            if learning:
                rate = settings.backbone_lr_scale * settings.layer_decay**depth
                groups.append({"params": learning, "lr_scale": rate})
        return groups


class QueryPooling(nn.Module):
    """One learned query that attends to the tokens.

    Parameters
    ----------
    width
        Features of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        n_heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to (batch, width)."""
        query = self.query.expand(len(tokens), -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]


class LowRankChanges(nn.Module):
    """A change B A of each weight of a model's attention, B zero at the start; the weights themselves stay.

    Parameters
    ----------
    backbone
        The model; `attention` says which names its attention has.
    rank
        Rows of A.
    """

    def __init__(self, backbone: Backbone, rank: int) -> None:
        super().__init__()
        self.names = [
            name
            for name, weight in backbone.named_parameters()
            if weight.ndim == 2 and any(part in name for part in backbone.attention)
        ]
        weights = dict(backbone.named_parameters())
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            n_out, n_in = weights[name].shape
            self.down.append(nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, n_in), a=5**0.5)))
            self.up.append(nn.Parameter(torch.zeros(n_out, rank)))

    def merge(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the changed weights by name; the gradient goes to A and B alone."""
        weights = dict(backbone.named_parameters())
        pairs = zip(self.names, self.up, self.down, strict=True)
        return {name: weights[name].detach() + up @ down for name, up, down in pairs}


class Front(nn.Module):
    """Channels, rate and unit of a model from those of the trials; nothing here learns.

    Parameters
    ----------
    signal
        Trials of channels (or parcels) x times with a rate.
    mixing : array of shape (n_model_channels, n_channels), or list of int
        Weights of the own channels in those of the model, or which own channels they are.
    rate
        Of the model in Hz.
    divisor
        Of the values.
    """

    mixing: Tensor
    resampling: Tensor | None

    def __init__(self, signal: Signal, mixing: Any, *, rate: float, divisor: float) -> None:
        super().__init__()
        weights = np.asarray(mixing)
        self.selects = weights.ndim == 1  # without a product, so that values stay as they are
        kind = torch.long if self.selects else torch.float32
        self.register_buffer("mixing", torch.as_tensor(weights, dtype=kind), persistent=False)
        n_times = signal.size_of("time")
        matrix = make_resampling(n_times, signal.sfreq or rate, rate)
        resampling = None if matrix is None else torch.as_tensor(matrix, dtype=torch.float32)
        self.register_buffer("resampling", resampling, persistent=False)
        self.divisor = divisor
        self.n_times = n_times if matrix is None else matrix.shape[1]

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_model_channels, n_model_times)."""
        with autocast(data.device):  # volts are small, and half precision is coarse
            data = data.float() / self.divisor
            data = data[:, self.mixing] if self.selects else self.mixing @ data
            return data if self.resampling is None else data @ self.resampling


def make_resampling(n_times: int, sfreq: float, rate: float) -> np.ndarray | None:
    """Return the matrix that resamples a trial by a product from the right, (n_times, n_new); None for equal rates.

    The filter against aliasing is that of `scipy.signal.resample_poly`; a line through both ends is taken off before
    and put back after it, so that the ends do not fall to zero.

    Examples
    --------
    >>> make_resampling(250, 250.0, 200.0).shape
    (250, 200)
    """
    ratio = Fraction(rate / sfreq).limit_denominator(1000)
    if ratio == 1:
        return None
    from scipy.signal import resample_poly

    return resample_poly(np.eye(n_times), ratio.numerator, ratio.denominator, axis=0, padtype="line").T


def mix_channels(
    signal: Signal, rows: Mapping[str, int], table: Sequence[str], title: str, *, missing: str
) -> Any:
    """Return which own channels are the model's, or the weights that make them where some are missing.

    Parameters
    ----------
    signal
        Of the trials.
    rows
        Own channel of each name of the model that is there, of `EegModelConfig.find_rows`.
    table
        Names that the model needs, in its order.
    title
        Name of the model, in messages.
    missing
        ``refuse``, ``zero`` or ``interpolate``.

    Raises
    ------
    DataError
        If a channel is missing and refused, or its place or those of too few others are known.
    """
    lacking = [name for name in table if name not in rows]
    if not lacking:
        return [rows[name] for name in table]
    if missing == "refuse":
        raise DataError(
            f"{title} needs {len(table)} channels, but the responses are missing {', '.join(lacking[:6])}"
            f"{', ...' if len(lacking) > 6 else ''}; set encoder.network.missing=interpolate, name them in "
            "encoder.network.channels, or choose another encoder.network.kind."
        )
    weights = np.zeros((len(table), signal.size_of("channel")))
    for place, name in enumerate(table):
        if name in rows:
            weights[place, rows[name]] = 1
    if missing == "interpolate":
        sources, places = _find_places(signal.ch_names)
        _, wanted = _find_places(lacking)
        if len(sources) < 4:
            raise DataError(
                f"{title} is missing {', '.join(lacking[:6])}, and interpolation needs at least four channels of the "
                f"10-05 system, but the responses have {len(sources)}."
            )
        splines = interpolate_on_sphere(places, wanted)
        for row, name in enumerate(lacking):
            weights[table.index(name), sources] = splines[row]
    return weights


def _find_places(names: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Return which of these names the 10-05 system has, and their places on the unit sphere, shape (n, 3)."""
    from braindecode_vis.datasets.sources.meeg_source import list_scalp_positions

    positions = {name.upper(): place for name, place in list_scalp_positions().items()}
    every = np.array(list(positions.values()))
    # The sphere through all electrodes: |p|^2 = 2 p c + r^2 - |c|^2 is linear in its centre c.
    design = np.concatenate([2 * every, np.ones((len(every), 1))], axis=1)
    centre = np.linalg.lstsq(design, (every**2).sum(axis=1))[0][:3]
    found = [index for index, name in enumerate(names) if name.upper() in positions]
    places = np.array([positions[names[index].upper()] for index in found]).reshape(-1, 3) - centre
    return found, places / np.linalg.norm(places, axis=1, keepdims=True)


def interpolate_on_sphere(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the weights of sources in wanted places by spherical splines of order 4, shape (n_wanted, n_sources).

    Parameters
    ----------
    places : array of shape (n_sources, 3)
        On the unit sphere.
    wanted : array of shape (n_wanted, 3)
        Likewise.

    Examples
    --------
    >>> corners = np.concatenate([np.eye(3), -np.eye(3)])
    >>> bool(np.allclose(interpolate_on_sphere(corners, corners), np.eye(6), atol=1e-3))
    True
    """
    degrees = np.arange(1, 51)  # terms of the sum; they fall with the seventh power
    factors = np.concatenate([[0.0], (2 * degrees + 1) / (degrees * (degrees + 1.0)) ** 4 / (4 * np.pi)])

    def spread(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        cosines = np.clip(left @ right.T, -1, 1)
        return np.polynomial.legendre.legval(cosines, factors)

    n = len(places)
    # A constant and one weight per source, whose sum is zero; the diagonal smooths a little.
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = spread(places, places) + 1e-7 * np.eye(n)
    system[:n, n] = system[n, :n] = 1
    basis = np.concatenate([spread(wanted, places), np.ones((len(wanted), 1))], axis=1)
    return (basis @ np.linalg.pinv(system))[:, :n]


def read_weights(path: Path, layout: WeightsLayout) -> dict[str, Tensor]:
    """Return the tensors of a published file under the names that the model gives them.

    No code in the file is run: beside tensors and plain values, a torch file may hold an `argparse.Namespace`, the
    settings of its training.

    Parameters
    ----------
    path
        Safetensors, or a torch file.
    layout
        How the model's public file is made.

    Raises
    ------
    DataError
        If it cannot be read so, or is the file of another model.
    """
    content = read_content(path, allowed=[Namespace])
    names = " ".join(_name_tensors(content))
    kinds = [title for mark, title in MARKS.items() if mark in names]
    if kinds and kinds[0] != layout.title:
        raise DataError(
            f"{path} is the file of {kinds[0]}, not that of {layout.title}; correct encoder.network.pretrained or "
            "encoder.network.kind."
        )
    for wrapper in layout.wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    items = content.items() if isinstance(content, dict) else ()
    found = {str(name): value for name, value in items if isinstance(value, Tensor)}
    start = layout.prefix
    if layout.prefix_may_lack and not any(name.startswith(start) for name in found):
        start = ""
    tensors = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
    tensors |= {name: value for name, value in found.items() if name.startswith(layout.beside)}
    return {name: value for name, value in tensors.items() if not name.startswith(layout.ignored)}


def _name_tensors(content: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of the tensors in tables at any depth."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}"
        else:
            yield from _name_tensors(value, f"{prefix}{name}.")


def load_backbone(
    backbone: nn.Module, tensors: Mapping[str, Tensor], source: str, layout: WeightsLayout
) -> None:
    """Put the tensors of its file into a model; every one must find its place, and every place be filled.

    Parameters
    ----------
    backbone
        The model.
    tensors
        From `read_weights`.
    source
        Path of the file, in messages.
    layout
        What may be absent, or beside it.

    Raises
    ------
    DataError
        If names or shapes differ, or values are not finite.
    """
    own = backbone.state_dict()
    unused = tuple(start for start in layout.beside if not any(name.startswith(start) for name in own))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    missing = [name for name in own if name not in tensors and not name.startswith(layout.absent)]
    unexpected = [name for name in tensors if name not in own]
    if missing or unexpected:
        raise DataError(
            f"{source} is no file of {layout.title} of these sizes: it {_count(missing, 'is missing')} and "
            f"{_count(unexpected, 'has')} that are not in the network; correct encoder.network.pretrained, or the "
            "sizes in encoder.network where this model has such settings."
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise DataError(
                f"{name} in {source} has the shape {tuple(tensor.shape)}, but that of the network is "
                f"{tuple(own[name].shape)}; correct encoder.network.pretrained, or the "
                "sizes in encoder.network where this model has such settings."
            )
        if not bool(tensor.isfinite().all()):
            raise DataError(f"{name} in {source} holds values that are not finite; fetch the file again.")
    backbone.load_state_dict(tensors, strict=False)


def _count(names: Sequence[str], verb: str) -> str:
    return f"{verb} {len(names)} tensors{f' ({names[0]}, ...)' if names else ''}"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Map queries, keys and values of heads, (batch, n_heads, n, size), to (batch, n, n_heads * size)."""
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


class JointAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one linear map.

    Parameters
    ----------
    width, n_heads
        Features of a token, and heads.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, tokens: Tensor) -> Tensor:
        """Return queries, keys and values, shape (3, batch, n_heads, n_tokens, width / n_heads)."""
        return self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        return self.proj(attend(*self.split(tokens)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, four times as wide there.

    Parameters
    ----------
    width
        Features of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        return self.fc2(nn.functional.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and around a skip connection.

    Parameters
    ----------
    width
        Features of a token.
    attention
        Maps tokens, and what else `forward` is given, to tokens.
    """

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.mlp = attention, Mlp(width)

    def forward(self, tokens: Tensor, *others: Tensor) -> Tensor:
        """Map (batch, n_tokens, width) to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens), *others)
        return tokens + self.mlp(self.norm2(tokens))
