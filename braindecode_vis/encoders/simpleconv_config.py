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

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal, read_axes

if TYPE_CHECKING:
    import torch

Merger = Literal["attention", "linear"]


class SimpleConvSettings(NetworkSettings):
    """Settings that the three variants share; the defaults are those of the speech network.

    Parameters
    ----------
    merger
        How sensors become virtual channels: ``attention`` weighs them by their position and needs positions;
        ``linear`` is a plain 1x1 convolution for data without any. Sensors at the same place (the triplets of
        some MEG helmets) get equal weights under ``attention``, so prefer ``linear`` for those.
    n_virtual_channels
        Learned heads of the attention.
    initial_channels
        Outputs of the first 1x1 convolution.
    hidden, depth
        Channels and number of the convolutions.
    final
        Last step of the stack at each sample: ``two_layers`` is 1x1 to 2 x hidden, GELU, 1x1; ``one_layer`` is one
        1x1 convolution; ``convolution`` is the last of the `depth` convolutions itself, then without batch norm and
        GELU, with the gated linear unit that is due after it.
    backbone_outputs
        Outputs of that last step. None means the outputs of the network: no head follows.
    head_hidden
        Hidden units of each head (linear, LayerNorm, GELU, linear); None is a single linear layer.

    References
    ----------
    Defossez et al. (2023), doi:10.1038/s42256-023-00714-5.
    """

    merger: Merger = "attention"
    n_virtual_channels: int = Field(default=270, ge=1)
    initial_channels: int = Field(default=270, ge=1)
    hidden: int = Field(default=320, ge=1)
    depth: int = Field(default=10, ge=1)
    final: Literal["two_layers", "one_layer", "convolution"] = "two_layers"
    backbone_outputs: int | None = Field(default=None, ge=1)
    head_hidden: int | None = Field(default=None, ge=1)

    #: What makes a variant: positions on a flat map (azimuthal equidistant) or in space, a matrix per subject, a
    #: learned weighted sum over time in place of the mean, a second head for regression.
    in_space: ClassVar[bool] = False
    subject_layer: ClassVar[bool] = True
    affine: ClassVar[bool] = False
    heads: ClassVar[str] = "one"
    removed_settings: ClassVar[Mapping[str, Any]] = {
        "position_dims": 2, "position_features": 2048, "position_margin": 0.2, "dropout_radius": 0.2,
        "subject_layer": True, "kernel_size": 3, "dilation_period": 5, "glu_every": 2, "glu_context": 1,
        "time_aggregation": "mean", "attention_size": 256, "heads": "one", "n_windows": 4,
    }  # fmt: skip

    @model_validator(mode="after")
    def _check_sizes(self) -> SimpleConvSettings:
        if self.backbone_outputs is None and (self.heads == "two" or self.head_hidden is not None):
            raise ValueError("head_hidden and two heads need backbone_outputs, the input size of the heads")
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
            Size of the regression output, by default `n_outputs`; only of ``simpleconv_image``.

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
                "set encoder.network.kind=simpleconv_image."
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
            n_last=n_features if self.final == "convolution" else None,
        )
        final: nn.Module = nn.Identity()  # of ``convolution``
        if self.final == "one_layer":
            final = nn.Conv1d(self.hidden, n_features, 1)
        elif self.final == "two_layers":
            wide = 2 * self.hidden
            final = nn.Sequential(nn.Conv1d(self.hidden, wide, 1), nn.GELU(), nn.Conv1d(wide, n_features, 1))
        aggregate = simpleconv.AffineOverTime(n_times) if self.affine else simpleconv.MeanOverTime()
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
        )

    def _build_merger(self, signal: Signal) -> torch.nn.Module:
        """Return what turns sensors into virtual channels."""
        from torch import nn

        from braindecode_vis.encoders.simpleconv import SpatialAttention, project_positions, scale_positions

        if self.merger == "linear":
            return nn.Conv1d(signal.size_of("channel"), self.n_virtual_channels, 1)
        if signal.ch_pos is None:
            raise DataError(
                "the spatial attention of SimpleConv needs the position of every sensor, but these responses have "
                "none; set encoder.network.merger=linear, or give the data set a montage."
            )
        places = signal.ch_pos if self.in_space else project_positions(signal.ch_pos)
        # 2 * 32 ** 2 or 2 * 10 ** 3 features of a position, as published
        return SpatialAttention(scale_positions(places), self.n_virtual_channels, 10 if self.in_space else 32)


class SimpleConvConfig(SimpleConvSettings):
    """The speech network of Defossez et al. as it was released, averaged over time.

    The original predicts a series; here its outputs are averaged over the trial (our choice).
    Settings as in `SimpleConvSettings`. The paper trains with Adam 3e-4 and batches of 256.
    """

    kind: Literal["simpleconv"] = "simpleconv"


class SimpleConvTimeAggConfig(SimpleConvSettings):
    """The variant of the NeuralBench image task: 4 convolutions, positions in space, affine time aggregation.

    Settings as in `SimpleConvSettings`. No subject layer, one linear head. The fourth convolution maps onto
    the 512 backbone outputs without batch norm or GELU, a gated linear unit follows, and no further layer.
    NeuralBench trains with AdamW 1e-4, weight decay 0.05, one cycle (10 % warm-up, the first beta cycled too), batches
    of 64, 40 epochs, clipping at 1.
    """

    kind: Literal["simpleconv_time_agg"] = "simpleconv_time_agg"
    depth: int = Field(default=4, ge=1)
    final: Literal["two_layers", "one_layer", "convolution"] = "convolution"
    backbone_outputs: int | None = Field(default=512, ge=1)

    in_space: ClassVar[bool] = True
    subject_layer: ClassVar[bool] = False
    affine: ClassVar[bool] = True
    removed_settings: ClassVar[Mapping[str, Any]] = {
        "position_dims": 3, "position_features": 2000, "subject_layer": False, "time_aggregation": "affine",
    }  # fmt: skip


class SimpleConvImageConfig(SimpleConvSettings):
    """The image decoder of Benchetrit, Banville and King: speech stack, affine aggregation, CLIP and MSE heads.

    Settings as in `SimpleConvSettings`. There is no official code: that affine aggregation was the best is
    reported at second hand, and the sizes of the backbone's output and of the heads (2048 each) are unverified.
    The paper trains with 3e-4 and batches of 128.
    """

    kind: Literal["simpleconv_image"] = "simpleconv_image"
    backbone_outputs: int | None = Field(default=2048, ge=1)
    head_hidden: int | None = Field(default=2048, ge=1)

    affine: ClassVar[bool] = True
    heads: ClassVar[str] = "two"
    removed_settings: ClassVar[Mapping[str, Any]] = {"time_aggregation": "affine", "heads": "two"}
