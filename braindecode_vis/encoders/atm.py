"""The network of ATM, and those that it is built on: the convolutions of NICE (TSConv) and the projector of UBP.

The last layers of the convolutional networks and of EEGProject see maps of shape (batch, n_maps, n_times) flattened
to a vector. Because their first layer is linear, the part of it that reads one window also gives that window an
output of its own, without further parameters: it is the answer to maps that are zero outside the window. Voxels and
parcels without times have regions in the place of windows. EEGProject is that projector over the raw trial, with
nothing before it. ATM puts an attention over channels before convolutions and projector.

References
----------
Song et al. (2024), NICE, arXiv:2308.13234: the convolutions and the projector.
Velickovic et al. (2018), Graph attention networks, arXiv:1710.10903.
Wu et al. (2025), Uncertainty-aware Blur Prior, arXiv:2503.04207: EEGProject (``base/eeg_backbone.py`` of its code).
Chikit-WONG/Human-Centered_AI_Group_Project@42821ac, ``main/layers.py``: the residual block of LoRA-CLIP.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.signal import Signal, count_windows, read_axes

_WINDOWS = 5  # neighbouring windows of time that EEGProject gives local outputs for, a choice of ours
_STD = 0.02  # of the initial weights in NICE's released code


class Readout(nn.Linear):
    """One linear layer over flattened maps.

    Parameters
    ----------
    n_maps, n_times
        Shape of the maps.
    n_outputs
        Size of the output.
    """

    def __init__(self, n_maps: int, n_times: int, n_outputs: int) -> None:
        super().__init__(n_maps * n_times, n_outputs)
        self.map_shape = (n_maps, n_times)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_outputs)."""
        return functional.linear(maps.flatten(1), self.weight, self.bias)  # maps * times in a row

    def forward_windows(self, maps: Tensor, n_windows: int | None = None) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_windows, n_outputs).

        `n_windows` parts the time axis into neighbouring windows as equal as can be; None takes each sample.
        """
        weight = self.weight.unflatten(1, self.map_shape)  # outputs, maps, times
        n_windows = min(n_windows or self.map_shape[1], self.map_shape[1])  # no window may be empty
        parts = zip(maps.tensor_split(n_windows, dim=2), weight.tensor_split(n_windows, dim=2), strict=True)
        return torch.stack(
            [functional.linear(m.flatten(1), w.flatten(1), self.bias) for m, w in parts], dim=1
        )

    def forward_groups(self, values: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
        """Map (batch, n_values) to (batch, n_groups, n_outputs).

        `order` has the numbers of the values that belong to groups, one group after the other, and `sizes` says how
        many each has.
        """
        values, weight = values[:, order], self.weight[:, order]
        parts = zip(values.split(sizes, dim=1), weight.split(sizes, dim=1), strict=True)
        return torch.stack([functional.linear(v, w, self.bias) for v, w in parts], dim=1)


class Projector(nn.Module):
    """Linear layer, residual block of GELU, linear layer and dropout, then layer norm.

    Parameters
    ----------
    n_maps, n_times
        Shape of the maps.
    n_outputs
        Size of the output.
    dropout
        Probability in the residual block.
    width
        Size of the layers. None takes `n_outputs`, as published; for another size, one more linear layer follows the
        layer norm (our choice).
    residual
        ``gelu``: as above. ``silu``: linear, SiLU, dropout, linear, both without bias, as in LoRA-CLIP, whose weights
        start from N(0, 0.02) and biases from zero.
    """

    def __init__(
        self,
        n_maps: int,
        n_times: int,
        n_outputs: int,
        dropout: float,
        width: int | None = None,
        residual: str = "gelu",
    ) -> None:
        super().__init__()
        width = width or n_outputs
        self.expand = Readout(n_maps, n_times, width)
        if residual == "silu":
            first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
            self.residual = nn.Sequential(first, nn.SiLU(), nn.Dropout(dropout), second)
            self.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.residual = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
            self.norm = nn.LayerNorm(width)
        self.last = nn.Identity() if width == n_outputs else nn.Linear(width, n_outputs)
        if residual == "silu":
            # what transformers gives to every linear layer of a model without a rule of its own
            self.apply(_initialise)
            nn.init.zeros_(self.expand.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_outputs)."""
        return self._finish(self.expand(maps))

    def forward_windows(self, maps: Tensor, n_windows: int | None = None) -> Tensor:
        """Map (batch, n_maps, n_times) to (batch, n_windows, n_outputs); see `Readout.forward_windows`."""
        return self._finish(self.expand.forward_windows(maps, n_windows))

    def forward_groups(self, values: Tensor, order: Tensor, sizes: list[int]) -> Tensor:
        """Map (batch, n_values) to (batch, n_groups, n_outputs); see `Readout.forward_groups`."""
        return self._finish(self.expand.forward_groups(values, order, sizes))

    def _finish(self, expanded: Tensor) -> Tensor:
        return self.last(
            self.norm(expanded + self.residual(expanded))
        )  # works on the last axis, windows or none


class EEGProject(nn.Module):
    """A projector over all values of a trial, whatever its axes.

    Parameters
    ----------
    signal
        Axes of a trial.
    n_outputs
        Size of the output.
    dropout, width, residual
        See `EEGProjectConfig`.
    """

    order: Tensor

    def __init__(
        self,
        signal: Signal,
        n_outputs: int,
        *,
        dropout: float,
        width: int | None,
        residual: str = "gelu",
    ) -> None:
        super().__init__()
        # Without time (voxels, parcels) every value is a map of one sample.
        n_times = signal.shape[-1] if signal.dims[-1] == "time" else 1
        n_maps = math.prod(signal.shape) // n_times
        self.map_shape = (n_maps, n_times)
        self.dims = signal.dims
        self.projector = Projector(n_maps, n_times, n_outputs, dropout, width, residual)
        # Values of one region or network side by side, and how many each has.
        groups = list(dict.fromkeys(name for name in signal.networks if name)) if n_times == 1 else []
        members = [np.flatnonzero([name == group for name in signal.networks]) for group in groups]
        self.sizes = [len(own) for own in members]
        order = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *members]))
        self.register_buffer("order", order, persistent=False)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials of shape (batch, *signal.shape) to (batch, n_outputs); the subject plays no part."""
        return self.projector(data.reshape(data.shape[0], *self.map_shape))  # batch, all other axes, times

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for each window of time, shape (batch, n_windows, n_outputs).

        Without a time axis it is for each region of interest of the voxels, or network of the parcels, and what belongs
        to several regions counts for the smallest.

        Raises
        ------
        DataError
            If the trials have neither.
        """
        if self.dims[-1] != "time":
            if not self.sizes:
                raise DataError(
                    "local outputs are windows of time or regions, but these responses have "
                    f"{', '.join(self.dims)} without region names; leave the local objective out."
                )
            return self.projector.forward_groups(data, self.order, self.sizes)
        return self.projector.forward_windows(data.reshape(data.shape[0], *self.map_shape), _WINDOWS)


class TSConvNetwork(nn.Module):
    """Optional attention over channels, the convolutions, the projector.

    Parameters
    ----------
    attention
        What precedes the convolutions, `ChannelSelfAttention`, `ChannelGraphAttention` or the identity.
    convolution
        The convolutions.
    projector
        From their maps to the output.
    as_nice
        Draw the weights as NICE does, instead of leaving torch's.
    """

    def __init__(
        self, attention: nn.Module, convolution: TSConv, projector: Projector, *, as_nice: bool
    ) -> None:
        super().__init__()
        self.attention = attention
        self.convolution = convolution
        self.projector = projector
        if as_nice:
            self.apply(_initialise)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials (batch, n_channels, n_times) to (batch, n_outputs); the subject plays no part."""
        return self.projector(self.convolution(self.attention(data)))

    @property
    def token_step(self) -> int:
        """Samples from one window to the next."""
        return self.convolution.stride

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for each pooled window of time, shape (batch, n_windows, n_outputs)."""
        return self.projector.forward_windows(self.convolution(self.attention(data)))


class TSConv(nn.Module):
    """Temporal convolution and average pool, spatial convolution, 1 x 1 convolution.

    A temporal convolution followed by an average pool is one convolution with a longer kernel and a step; and a
    convolution of step s is one of step 1 over blocks of s samples. It is computed as such: without the long map
    between the two, and several times as fast on a CPU. Nothing but rounding changes.

    Parameters
    ----------
    signal
        Trials of channel x time.
    network
        Name in messages.
    """

    def __init__(self, signal: Signal, network: str) -> None:
        super().__init__()
        n_channels, _ = read_axes(signal, network)
        n_maps, kernel, self.pool, self.stride = 40, 25, 51, 5  # the lengths in samples
        self.n_windows = count_windows(
            signal, network, lambda n: (n - kernel + 1 - self.pool) // self.stride + 1
        )
        self.map_shape = (n_maps, self.n_windows)
        self.temporal = nn.Conv2d(1, n_maps, (1, kernel))
        self.temporal_norm = nn.BatchNorm2d(n_maps)
        self.spatial = nn.Conv2d(n_maps, n_maps, (n_channels, 1))
        self.spatial_norm = nn.BatchNorm2d(n_maps)
        self.dropout = nn.Dropout(0.5)
        self.mixing = nn.Conv2d(n_maps, n_maps, 1)  # the 1 x 1 convolution of NICE's patch embedding

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_maps, n_windows)."""
        maps = self._convolve_and_pool(data)
        maps = functional.elu(self.temporal_norm(maps))  # batch, maps, channels, windows
        maps = functional.elu(self.spatial_norm(self.spatial(maps)))  # batch, maps, 1, windows
        return self.mixing(self.dropout(maps)).squeeze(2)  # batch, maps, windows

    def project_windows(self, data: Tensor, projector: Projector) -> Tensor:
        """Return the projection of each pooled window, shape (batch, n_windows, n_outputs)."""
        return projector.forward_windows(self(data))

    def _convolve_and_pool(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, n_maps, n_channels, n_windows)."""
        # The full convolution of the kernel with a box: both ends padded by the box less one.
        padded = functional.pad(self.temporal.weight[:, 0, 0], (self.pool - 1, self.pool - 1))
        weight = padded.unfold(1, self.pool, 1).mean(-1)  # maps, kernel + pool - 1
        weight = functional.pad(weight, (0, -weight.shape[1] % self.stride))  # to whole blocks of a stride
        weight = (
            weight.unflatten(1, (-1, self.stride)).transpose(1, 2).unsqueeze(2)
        )  # maps, stride, 1, blocks
        n_used = (self.n_windows - 1 + weight.shape[3]) * self.stride
        data = functional.pad(data, (0, n_used - data.shape[2]))  # a negative number cuts
        blocks = data.unflatten(2, (-1, self.stride)).permute(0, 3, 1, 2)  # batch, stride, channels, blocks
        return functional.conv2d(blocks.contiguous(), weight.contiguous(), self.temporal.bias)


class ChannelSelfAttention(nn.Module):
    """Attention of each channel over all channels (NICE-SA), with layer norm before and a residual connection.

    Queries and keys are linear mixtures of the channels, compared over time; the channels themselves are the values; a
    linear mixture follows. The comparison is scaled by the root of the number of samples, the length of a query; the
    released code has the root of 8.

    Parameters
    ----------
    n_channels, n_times
        Shape of a trial.
    dropout
        After each mixture and after the block.
    """

    def __init__(self, n_channels: int, n_times: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_times)
        self.query = _make_mixture(n_channels, dropout)
        self.key = _make_mixture(n_channels, dropout)
        self.mixing = _make_mixture(n_channels, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to the same shape."""
        values = self.norm(data)
        by_time = values.transpose(1, 2)  # batch, times, channels
        query, key = self.query(by_time).transpose(1, 2), self.key(by_time).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(query, key, values.to(query.dtype))
        mixed = self.mixing(attended.transpose(1, 2)).transpose(1, 2)
        return data + self.dropout(mixed)  # the residual path keeps the scale of the trial, not of the norm


class ChannelGraphAttention(nn.Module):
    """One graph attention head over the complete graph of channels (NICE-GA), with a residual connection.

    Parameters
    ----------
    n_times
        Length of a channel's signal, the feature vector of a node.
    dropout
        After the layer.
    """

    def __init__(self, n_times: int, dropout: float) -> None:
        super().__init__()
        self.node = nn.Linear(n_times, n_times, bias=False)
        # The attention vector of the paper, cut into its halves for the two nodes of an edge.
        self.source = nn.Parameter(torch.empty(1, n_times))
        self.target = nn.Parameter(torch.empty(1, n_times))
        self.bias = nn.Parameter(torch.zeros(n_times))
        self.dropout = nn.Dropout(dropout)
        for weight in (self.node.weight, self.source, self.target):
            nn.init.xavier_uniform_(weight)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to the same shape."""
        nodes = self.node(data)  # batch, channels, times
        to, origin = functional.linear(nodes, self.target), functional.linear(nodes, self.source)
        # The slope of 0.2 is that of Velickovic et al.
        scores = functional.leaky_relu(to + origin.transpose(1, 2), 0.2)  # batch, to, from
        attended = scores.softmax(-1).to(nodes.dtype) @ nodes + self.bias
        return data + self.dropout(attended)


def _make_mixture(n_channels: int, dropout: float) -> nn.Sequential:
    linear = nn.Linear(n_channels, n_channels)
    nn.init.xavier_normal_(linear.weight)  # replaced by NICE's own draw where that is asked for
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.LayerNorm(n_channels), nn.Dropout(dropout))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, _STD)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, _STD)
        nn.init.zeros_(module.bias)


# --- ATM -------------------------------------------------------------------------------------------------------
# The modules of ATM: subject token, value embedding, encoder layers over channels, and what follows them.
#
# References: Li et al. (2024), ATM, arXiv:2403.07721. Liu et al. (2024), iTransformer, arXiv:2310.06625.


# As published: heads of the attention, width of its feed-forward part, dropout of embedding, attention and
# feed-forward part, and that in the residual block of the projector. A head has n_times // 4 features.
_HEADS, _FEEDFORWARD, _DROPOUT, _PROJECTOR_DROPOUT = 4, 256, 0.25, 0.5


class Atm(nn.Module):
    """Attention over channels and a subject token, a convolution stage, a projector.

    Parameters
    ----------
    signal
        Trials of channel x time.
    n_outputs
        Size of the output.
    stage
        What follows the attention: a `TSConv`, or an `EEGNetStage` of `eegnet`.
    joint, unknown_probability, width
        See `AtmSettings`.
    """

    def __init__(
        self,
        signal: Signal,
        n_outputs: int,
        stage: Any,
        *,
        joint: bool,
        unknown_probability: float,
        width: int | None,
    ) -> None:
        super().__init__()
        _, n_times = read_axes(signal, "atm")
        self.n_subjects = len(signal.subjects)
        # A single subject is never mistaken for an unknown one: hiding it would only blur the token.
        self.unknown_probability = unknown_probability if self.n_subjects > 1 else 0.0
        self.value_embedding: nn.Module
        if joint:
            self.value_embedding = SubjectLinear(self.n_subjects, n_times)
        else:
            self.value_embedding = CommonLinear(n_times)
        self.subject_tokens = nn.Embedding(self.n_subjects + 1, n_times)  # the last row: unknown subjects
        self.dropout = nn.Dropout(_DROPOUT)
        self.layers = nn.Sequential(EncoderLayer(n_times, _HEADS, _FEEDFORWARD, _DROPOUT))
        self.norm = nn.LayerNorm(n_times)
        self.convolution = stage
        n_maps, n_windows = stage.map_shape
        self.projector = Projector(n_maps, n_windows, n_outputs, _PROJECTOR_DROPOUT, width)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map trials (batch, n_channels, n_times) and subjects (batch,) to (batch, n_outputs)."""
        return self.projector(self.convolution(self.attend(data, subject)))

    @property
    def token_step(self) -> int:
        """Samples from one window to the next."""
        return self.convolution.stride

    def forward_tokens(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output for each window of time, shape (batch, n_windows, n_outputs)."""
        return self.convolution.project_windows(self.attend(data, subject), self.projector)

    def attend(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the attended channels, shape (batch, n_channels, n_times)."""
        subject = self._hide_subjects(subject)
        channels = self.value_embedding(data, subject)
        token = self.subject_tokens(subject).unsqueeze(1).to(channels.dtype)  # batch, 1, times
        tokens = self.dropout(torch.cat([token, channels], dim=1))  # batch, 1 + channels, times
        # The subject token came first. The released slice is off by one: it keeps the token and loses a channel.
        return self.norm(self.layers(tokens))[:, 1:]

    def _hide_subjects(self, subject: Tensor) -> Tensor:
        if not self.training or self.unknown_probability == 0:
            return subject
        hidden = torch.rand(subject.shape, device=subject.device) < self.unknown_probability
        return torch.where(hidden, self.n_subjects, subject)  # the last row of the table of tokens


class CommonLinear(nn.Module):
    """A square linear layer that all subjects share.

    Parameters
    ----------
    size
        Of input and output.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map (batch, n_channels, size) to the same shape."""
        return self.layer(data)


class SubjectLinear(nn.Module):
    """One square linear layer per subject; an unknown subject gets their mean.

    Parameters
    ----------
    n_subjects
        Number of layers.
    size
        Of input and output.
    """

    def __init__(self, n_subjects: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_subjects, size, size))
        self.bias = nn.Parameter(torch.empty(n_subjects, size))
        bound = size**-0.5  # as torch initialises a linear layer
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Map (batch, n_channels, size) and subjects (batch,) to (batch, n_channels, size)."""
        if torch.compiler.is_compiling():  # a traced program cannot sort trials whose subjects come later
            weight = torch.cat([self.weight, self.weight.mean(0, keepdim=True)])[subject]
            bias = torch.cat([self.bias, self.bias.mean(0, keepdim=True)])[subject]
            # (batch, n_channels, size) @ (batch, size, size) + (batch, 1, size)
            return data @ weight.mT + bias.unsqueeze(1)
        n_subjects = len(self.weight)
        # Sorted by subject, a layer sees its trials as one block; a matrix per trial would take far more memory.
        order = subject.argsort(stable=True)
        counts = subject.bincount(minlength=n_subjects + 1).tolist()
        parts = []
        for index, part in enumerate(data[order].split(counts)):
            if index < n_subjects:
                parts.append(functional.linear(part, self.weight[index], self.bias[index]))
            elif len(part):
                parts.append(functional.linear(part, self.weight.mean(0), self.bias.mean(0)))
        return torch.cat(parts)[order.argsort()]  # back in the order of the batch


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward part, each with a residual connection and a layer norm behind it.

    Parameters
    ----------
    size
        Features of a token.
    n_heads
        Heads of size // n_heads features each; together they may have fewer than a token.
    feedforward
        Width of the feed-forward part.
    dropout
        Of the attention weights, behind the attention, and twice in the feed-forward part.
    """

    def __init__(self, size: int, n_heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        inner = size // n_heads * n_heads  # a token of 250 samples does not part into 4 heads of equal size
        self.query = nn.Linear(size, inner)
        self.key = nn.Linear(size, inner)
        self.value = nn.Linear(size, inner)
        self.out = nn.Linear(inner, size)
        self.norm_attention = nn.LayerNorm(size)
        self.widen = nn.Linear(size, feedforward)
        self.narrow = nn.Linear(feedforward, size)
        self.norm_feedforward = nn.LayerNorm(size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, size) to the same shape."""
        tokens = self.norm_attention(tokens + self.dropout(self._attend(tokens)))
        inner = self.dropout(functional.gelu(self.widen(tokens)))
        return self.norm_feedforward(tokens + self.dropout(self.narrow(inner)))

    def _attend(self, tokens: Tensor) -> Tensor:
        heads = [
            layer(tokens).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # batch, heads, tokens, features
            for layer in (self.query, self.key, self.value)
        ]
        p = self.dropout.p if self.training else 0.0  # torch's function does not know whether it trains
        attended = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], dropout_p=p)
        return self.out(attended.transpose(1, 2).flatten(2))  # batch, tokens, size
