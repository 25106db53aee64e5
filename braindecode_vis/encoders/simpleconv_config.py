"""SimpleConv for EEG and MEG: the speech network, its NeuralBench image variant and Meta's image decoder.

Settings of the three variants of one convolutional stack: virtual channels from an attention over the sensor
positions, a 1x1 convolution, one matrix per subject, dilated residual convolutions with gated linear units, an
average over time, and one or two heads.

References
----------
Defossez et al. (2023), doi:10.1038/s42256-023-00714-5 (speech).
Benchetrit, Banville and King (2024), arXiv:2310.19812 (images).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal, read_axes

if TYPE_CHECKING:
    import torch

Merger = Literal["attention", "linear"]
TimeAggregation = Literal["mean", "affine", "attention"]


class SimpleConvSettings(NetworkSettings):
    """What the three variants share; the defaults are those of the speech network.

    Parameters
    ----------
    merger
        How sensors become virtual channels: ``attention`` weighs them by their position and needs positions;
        ``linear`` is a plain 1x1 convolution for data without any. Sensors at the same place (the triplets of
        some MEG helmets) get equal weights under ``attention``, so prefer ``linear`` for those.
    n_virtual_channels
        Learned heads of the attention.
    position_dims
        2 for a flat map of the head (azimuthal equidistant), 3 for positions in space.
    position_features
        Length of the Fourier code of a position, 2 * k ** position_dims for k frequencies per axis: 2048 is
        32 x 32 in 2-D, 2000 is 10 x 10 x 10 in 3-D.
    position_margin
        Share of the map that is added on each side, so that the code's period does not join opposite sensors.
    dropout_radius
        In training, sensors within this distance of a random centre are left out, in units of the map (each axis
        0 to 1); 0 leaves out none.
    initial_channels
        Outputs of the first 1x1 convolution.
    subject_layer
        One matrix per subject after it; a subject never trained on gets the mean of all matrices.
    hidden, depth, kernel_size
        Channels, number and length (samples) of the convolutions.
    dilation_period
        The dilation doubles with each convolution and starts anew at 1 after this many.
    glu_every, glu_context
        After how many convolutions a gated linear unit comes, and how many samples it sees on each side.
    final
        Last step of the stack at each sample: ``two_layers`` is 1x1 to 2 x hidden, GELU, 1x1; ``one_layer`` is one
        1x1 convolution; ``convolution`` is the last of the `depth` convolutions itself, then without batch norm and
        GELU, with the gated linear unit that is due after it.
    backbone_outputs
        Outputs of that last step. None stands for the outputs of the network: no head follows.
    time_aggregation
        ``mean`` over time, ``affine`` (a learned weighted sum and a bias) or ``attention`` (Bahdanau).
    attention_size
        Hidden units of the Bahdanau attention.
    heads
        ``one`` output, or ``two`` with parameters of their own: one for contrast, one for regression.
    head_hidden
        Hidden units of each head (linear, LayerNorm, GELU, linear); None is a single linear layer.
    n_windows
        Number of equal windows of `forward_tokens`.

    References
    ----------
    Defossez et al. (2023), doi:10.1038/s42256-023-00714-5.
    """

    merger: Merger = "attention"
    n_virtual_channels: int = Field(default=270, ge=1)
    position_dims: Literal[2, 3] = 2
    position_features: int = Field(default=2048, ge=2)
    position_margin: float = Field(default=0.2, ge=0)
    dropout_radius: float = Field(default=0.2, ge=0, lt=1)
    initial_channels: int = Field(default=270, ge=1)
    subject_layer: bool = True
    hidden: int = Field(default=320, ge=1)
    depth: int = Field(default=10, ge=1)
    kernel_size: int = Field(default=3, ge=1)
    dilation_period: int = Field(default=5, ge=1)
    glu_every: int = Field(default=2, ge=0)
    glu_context: int = Field(default=1, ge=0)
    final: Literal["two_layers", "one_layer", "convolution"] = "two_layers"
    backbone_outputs: int | None = Field(default=None, ge=1)
    time_aggregation: TimeAggregation = "mean"
    attention_size: int = Field(default=256, ge=1)
    heads: Literal["one", "two"] = "one"
    head_hidden: int | None = Field(default=None, ge=1)
    n_windows: int = Field(default=4, ge=1)

    @property
    def n_frequencies(self) -> int:
        """Frequencies per axis of the position code."""
        return round((self.position_features / 2) ** (1 / self.position_dims))  # half of them are sines

    @model_validator(mode="after")
    def _check_sizes(self) -> SimpleConvSettings:
        # A sine and a cosine for every combination of frequencies over the axes.
        if 2 * self.n_frequencies**self.position_dims != self.position_features:
            near = 2 * self.n_frequencies**self.position_dims
            raise ValueError(
                f"position_features must be 2 * k ** {self.position_dims} for a whole number k, for example {near}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd, so that a convolution keeps the number of samples")
        if self.backbone_outputs is None and (self.heads == "two" or self.head_hidden is not None):
            raise ValueError(
                "heads: two and head_hidden need backbone_outputs, the size of what the heads see"
            )
        return self

    def build(self, signal: Signal, n_outputs: int, n_regression: int | None = None) -> torch.nn.Module:
        """Return the network.

        Parameters
        ----------
        signal
            Needs a channel and a time axis, and sensor positions for ``merger: attention``.
        n_outputs
            Size of the contrastive output.
        n_regression
            Size of the regression output, by default `n_outputs`; only with ``heads: two``.

        Raises
        ------
        ConfigError
            If a regression output is asked of a network with one head.
        DataError
            If an axis or the sensor positions are missing.
        """
        from torch import nn

        from braindecode_vis.encoders import simpleconv

        if n_regression is not None and self.heads == "one":
            raise ConfigError(
                "a regression objective next to a contrastive one needs a second head here; "
                "set encoder.network.heads=two and encoder.network.backbone_outputs."
            )
        _, n_times = read_axes(signal, "SimpleConv")
        n_features = self.backbone_outputs or n_outputs
        # The parts are built in the order in which they are run, so that a seed always draws the same weights.
        merger = self._build_merger(signal)
        initial = nn.Conv1d(self.n_virtual_channels, self.initial_channels, 1)
        subjects = (
            simpleconv.SubjectLayer(self.initial_channels, len(signal.subjects))
            if self.subject_layer
            else None
        )
        stack = simpleconv.ConvStack(
            self.initial_channels,
            hidden=self.hidden,
            depth=self.depth,
            kernel_size=self.kernel_size,
            dilation_period=self.dilation_period,
            glu_every=self.glu_every,
            glu_context=self.glu_context,
            n_last=n_features if self.final == "convolution" else None,
        )
        final: nn.Module = nn.Identity()  # of ``convolution``
        if self.final == "one_layer":
            final = nn.Conv1d(self.hidden, n_features, 1)
        elif self.final == "two_layers":
            wide = 2 * self.hidden
            final = nn.Sequential(nn.Conv1d(self.hidden, wide, 1), nn.GELU(), nn.Conv1d(wide, n_features, 1))
        aggregate: nn.Module = simpleconv.MeanOverTime()
        if self.time_aggregation == "affine":
            aggregate = simpleconv.AffineOverTime(n_times)
        elif self.time_aggregation == "attention":
            aggregate = simpleconv.AttentionOverTime(n_features, self.attention_size)
        head: nn.Module = nn.Identity()  # without backbone_outputs the stack ends on the outputs themselves
        regression_head = None
        if self.backbone_outputs is not None:
            head = simpleconv.make_head(n_features, self.head_hidden, n_outputs)
            if self.heads == "two":
                regression_head = simpleconv.make_head(
                    n_features, self.head_hidden, n_regression or n_outputs
                )
        return simpleconv.SimpleConv(
            merger=merger,
            initial=initial,
            subjects=subjects,
            stack=stack,
            final=final,
            aggregate=aggregate,
            head=head,
            regression_head=regression_head,
            n_windows=self.n_windows,
        )

    def _build_merger(self, signal: Signal) -> torch.nn.Module:
        """Return what turns sensors into virtual channels."""
        from torch import nn

        from braindecode_vis.encoders.simpleconv import SpatialAttention, project_positions, scale_positions

        if self.merger == "linear":
            return nn.Conv1d(signal.size_of("channel"), self.n_virtual_channels, 1)
        if signal.ch_pos is None:
            raise DataError(
                "the spatial attention of SimpleConv needs the position of every sensor, but these responses lack "
                "them; set encoder.network.merger=linear, or give the data set a montage."
            )
        # (n_channels, 2) or (n_channels, 3)
        flat = project_positions(signal.ch_pos) if self.position_dims == 2 else signal.ch_pos
        return SpatialAttention(
            scale_positions(flat),
            self.n_virtual_channels,
            self.n_frequencies,
            self.position_margin,
            self.dropout_radius,
        )


class SimpleConvConfig(SimpleConvSettings):
    """The speech network of Defossez et al. as it was released, averaged over time.

    The original predicts a series; here its outputs are averaged over the trial (our choice of `time_aggregation`).
    Settings as in `SimpleConvSettings`. The paper trains with Adam 3e-4 and batches of 256.
    """

    kind: Literal["simpleconv"] = "simpleconv"


class SimpleConvTimeAggConfig(SimpleConvSettings):
    """The variant of the NeuralBench image task: 4 convolutions, positions in space, affine time aggregation.

    Settings as in `SimpleConvSettings`. No subject layer by default, one linear head. The fourth convolution maps onto
    the 512 backbone outputs without batch norm or GELU, a gated linear unit follows, and no further layer.
    NeuralBench trains with AdamW 1e-4, weight decay 0.05, one cycle (10 % warm-up, the first beta cycled too), batches
    of 64, 40 epochs, clipping at 1.
    """

    kind: Literal["simpleconv_time_agg"] = "simpleconv_time_agg"
    position_dims: Literal[2, 3] = 3
    position_features: int = Field(default=2000, ge=2)
    subject_layer: bool = False
    depth: int = Field(default=4, ge=1)
    final: Literal["two_layers", "one_layer", "convolution"] = "convolution"
    backbone_outputs: int | None = Field(default=512, ge=1)
    time_aggregation: TimeAggregation = "affine"


class SimpleConvImageConfig(SimpleConvSettings):
    """The image decoder of Benchetrit, Banville and King: speech stack, affine aggregation, CLIP and MSE heads.

    Settings as in `SimpleConvSettings`. There is no official code: that affine aggregation was the best is
    reported at second hand, and the sizes of the backbone's output and of the heads (2048 each) are unverified.
    The paper trains with 3e-4 and batches of 128.
    """

    kind: Literal["simpleconv_image"] = "simpleconv_image"
    backbone_outputs: int | None = Field(default=2048, ge=1)
    time_aggregation: TimeAggregation = "affine"
    heads: Literal["one", "two"] = "two"
    head_hidden: int | None = Field(default=2048, ge=1)
