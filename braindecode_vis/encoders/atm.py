"""The modules of ATM: subject token, value embedding, encoder layers over channels, and what follows them.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721.
Liu et al. (2024), iTransformer, arXiv:2310.06625.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.encoders.eegnet import EEGNetMaps
from braindecode_vis.encoders.signal import Signal, read_axes
from braindecode_vis.encoders.tsconv import Projector, Readout, TSConv

# As published: heads of the attention, width of its feed-forward part, dropout of embedding, attention and
# feed-forward part, and that in the residual block of the projector. A head has n_times // 4 features.
_HEADS, _FEEDFORWARD, _DROPOUT, _PROJECTOR_DROPOUT = 4, 256, 0.25, 0.5
_FEATURES = 1440  # outputs of EEGNet in ATM-E, which the projector reads


class EEGNetStage(nn.Module):
    """EEGNet over the attended channels, as ATM-E has it: its outputs are the features of the projector."""

    def __init__(self, maps: EEGNetMaps) -> None:
        super().__init__()
        self.maps = maps
        self.readout = Readout(maps.n_maps, maps.n_windows, _FEATURES)
        self.map_shape = (_FEATURES, 1)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, n_channels, n_times) to (batch, 1440, 1)."""
        return self.readout(self.maps(data)).unsqueeze(
            2
        )  # one window, so that the projector reads it as maps

    @property
    def stride(self) -> int:
        """Samples from one window to the next."""
        return self.maps.stride

    def project_windows(self, data: Tensor, projector: Projector) -> Tensor:
        """Return the projection of each window of EEGNet's maps, shape (batch, n_windows, n_outputs)."""
        features = self.readout.forward_windows(self.maps(data))
        # The projector sees batch * windows rows, as if each window were a trial.
        return projector(features.flatten(0, 1)).unflatten(0, features.shape[:2])


class Atm(nn.Module):
    """Attention over channels and a subject token, a convolution stage, a projector.

    Parameters
    ----------
    signal
        Trials of channel x time.
    n_outputs
        Size of the output.
    stage
        What follows the attention.
    joint, unknown_probability, width
        See `AtmSettings`.
    """

    def __init__(
        self,
        signal: Signal,
        n_outputs: int,
        stage: TSConv | EEGNetStage,
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
        self.projector = Projector(*stage.map_shape, n_outputs, _PROJECTOR_DROPOUT, width)

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
