"""BENDR: convolutions, and a transformer over what they find, written after its description and the names of its files.

braindecode's BENDR applies a last norm, which the original defines and never calls; without it both agree to 2e-5.

References
----------
Kostas, Aroca-Ouellette, Rudzicz (2021), BENDR: using transformers and a contrastive self-supervised learning task to
learn from massive amounts of EEG data, doi:10.3389/fnhum.2021.653659.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.parts.foundation.models.foundation import Backbone

STRIDES, START = (3, 2, 2, 2, 2, 2), -5.0
PATCH = 96  # samples of a position: the product of the strides
_NAMES = "FP1 FP2 F7 F3 FZ F4 F8 T7 C3 CZ C4 T8 T5 P3 PZ P4 T6 O1 O2"
CH_NAMES = tuple(_NAMES.split())


class Bendr(Backbone):
    """The convolutions (the "encoder") and the transformer (the "contextualizer").

    Its own file has a token for hidden positions and a last norm as well; the norm was trained with nothing and is
    applied nowhere in the published code, so that neither is part of the network.

    Parameters
    ----------
    used
        Rows of `CH_NAMES` that carry a channel; the others are zero.
    value_range
        Largest minus smallest value of the data set, in the unit of the trials; None writes 0 into the scale's row.
    size, hidden, depth, n_heads, feedforward
        Maps of the convolutions; features, layers, heads and feed-forward width of the transformer.
    context
        Whether there is a transformer.
    """

    attention = ("self_attn",)
    top = ("output_layer.",)
    used: Tensor

    def __init__(
        self,
        used: Sequence[int] = range(len(CH_NAMES)),
        *,
        value_range: float | None = None,
        size: int = 512,
        hidden: int = 1536,
        depth: int = 8,
        n_heads: int = 8,
        feedforward: int = 3076,
        context: bool = True,
    ) -> None:
        super().__init__()
        self.width, self.value_range, self.n_extra = size, value_range, int(context)
        self.stack = "transformer_layers" if context else "encoder"
        self.register_buffer("used", torch.tensor(list(used), dtype=torch.long), persistent=False)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        n_in = len(CH_NAMES) + 1
        for index, stride in enumerate(STRIDES):
            conv = nn.Conv1d(n_in, size, 3, stride=stride, padding=1)
            # The third of the published parts is the norm, behind a dropout.
            parts = OrderedDict({"0": conv, "2": nn.GroupNorm(size // 2, size), "3": nn.GELU()})
            stages[f"Encoder_{index}"] = nn.Sequential(parts)
            n_in = size
        self.encoder = nn.Sequential(stages)
        self.transformer_layers = nn.ModuleList()
        if context:
            self.relative_position = nn.Sequential(NormedConvolution(size), nn.GELU())
            self.input_conditioning = nn.ModuleDict(
                {"1": nn.LayerNorm(size), "4": nn.Conv1d(size, hidden, 1)}
            )
            self.transformer_layers.extend(Layer(hidden, n_heads, feedforward) for _ in range(depth))
            self.output_layer = nn.Conv1d(hidden, size, 1)

    def forward(self, data: Tensor) -> Tensor:
        """Return one token every 96 samples, behind that of the start if there is a transformer.

        Parameters
        ----------
        data : tensor of shape (batch, 19, n_times)
            At 256 Hz, in any unit.

        Returns
        -------
        tensor of shape (batch, n_tokens, size)
        """
        found = self.encoder(self.scale(data))
        return (self.contextualise(found) if self.n_extra else found).transpose(1, 2)

    def scale(self, data: Tensor) -> Tensor:
        """Return trials from -1 to 1 with the row of their scale, shape (batch, 20, n_times).

        The channels of a trial are scaled together; those that are not there stay zero.
        """
        seen = data[:, self.used]
        low, high = seen.amin(dim=(1, 2), keepdim=True), seen.amax(dim=(1, 2), keepdim=True)
        spread = high - low
        rows = torch.zeros_like(data)
        # A trial that never changes has no range, and becomes zero.
        rows[:, self.used] = torch.where(spread > 0, 2 * (seen - low) / spread - 1, 0.0)
        if self.value_range is None:
            level = torch.zeros_like(spread)
        else:
            level = 2 * ((spread / self.value_range).clamp_max(1) - 0.5)
        return torch.cat([rows, level.expand(-1, 1, data.shape[-1])], dim=1)

    def contextualise(self, found: Tensor) -> Tensor:
        """Map (batch, size, n_positions) to (batch, size, 1 + n_positions), the start first."""
        found = found + self.relative_position(found)
        normed = self.input_conditioning["1"](found.transpose(1, 2)).transpose(1, 2)
        tokens = self.input_conditioning["4"](normed).transpose(1, 2)  # batch, positions, hidden
        tokens = functional.pad(tokens, (0, 0, 1, 0), value=START)
        for layer in self.transformer_layers:
            tokens = layer(tokens)
        return self.output_layer(tokens.transpose(1, 2))


class NormedConvolution(nn.Module):
    """A convolution over 25 positions in 16 groups, whose weights have a learned norm for each step of the kernel."""

    def __init__(self, size: int, kernel: int = 25, groups: int = 16) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        direction = torch.randn(size, size // groups, kernel) * (2 / size)
        self.bias = nn.Parameter(torch.zeros(size))
        self.weight_g = nn.Parameter(direction.norm(dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(direction)

    def forward(self, data: Tensor) -> Tensor:
        """Map (batch, size, n_positions) to the same shape."""
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(0, 1), keepdim=True)
        return functional.conv1d(data, weight, self.bias, padding=self.kernel // 2, groups=self.groups)


class Layer(nn.Module):
    """Self-attention and a feed-forward part around skip connections, without any norm."""

    def __init__(self, size: int, n_heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(size, n_heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(size, feedforward), nn.Linear(feedforward, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, n_tokens, size) to the same shape."""
        tokens = tokens + self.self_attn(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + self.linear2(functional.gelu(self.linear1(tokens)))
