"""Settings of SimpleConv for EEG and MEG, as Meta's image decoder has it.

Virtual channels from an attention over the sensor positions, a 1x1 convolution, one matrix per subject, dilated
residual convolutions with gated linear units, a learned weighted sum over time, and two heads.

References
----------
Defossez et al. (2023), doi:10.1038/s42256-023-00714-5 (the stack, for speech).
Benchetrit, Banville and King (2024), arXiv:2310.19812 (images).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal, read_axes

if TYPE_CHECKING:
    import torch

Merger = Literal["attention", "linear"]


class SimpleConvImageConfig(NetworkSettings):
    """The image decoder of Benchetrit, Banville and King: speech stack, affine aggregation, CLIP and MSE heads.

    There is no official code: only other papers report that affine aggregation was the best, and the sizes of the
    backbone's output and of the heads (2048 each) are not verified. The paper trains with 3e-4 and batches of 128.

    Parameters
    ----------
    merger
        How sensors become virtual channels: ``attention`` weighs them by their position on a flat map and needs
        positions; ``linear`` is a plain 1x1 convolution for data without any. Sensors at the same place (the triplets
        of some MEG helmets) get equal weights under ``attention``, so prefer ``linear`` for those.
    n_virtual_channels
        Learned heads of the attention.
    initial_channels
        Outputs of the first 1x1 convolution.
    hidden, depth
        Channels and number of the convolutions.
    final
        Last step of the stack at each sample: ``two_layers`` is 1x1 to 2 x hidden, GELU, 1x1; ``one_layer`` is one
        1x1 convolution.
    backbone_outputs
        Features of the stack, which both heads read.
    head_hidden
        Hidden units of each head (linear, LayerNorm, GELU, linear); None is a single linear layer.
    """

    kind: Literal["simpleconv_image"] = "simpleconv_image"
    merger: Merger = "attention"
    n_virtual_channels: int = Field(default=270, ge=1)
    initial_channels: int = Field(default=270, ge=1)
    hidden: int = Field(default=320, ge=1)
    depth: int = Field(default=10, ge=1)
    final: Literal["two_layers", "one_layer"] = "two_layers"
    backbone_outputs: int = Field(default=2048, ge=1)
    head_hidden: int | None = Field(default=2048, ge=1)

    #: One for retrieval, one for regression.
    heads: ClassVar[str] = "two"
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"heads"})
    removed_settings: ClassVar[Mapping[str, Any]] = {
        "position_dims": 2, "position_features": 2048, "position_margin": 0.2, "dropout_radius": 0.2,
        "subject_layer": True, "kernel_size": 3, "dilation_period": 5, "glu_every": 2, "glu_context": 1,
        "time_aggregation": "affine", "attention_size": 256, "n_windows": 4,
    }  # fmt: skip

    def build(self, signal: Signal, n_outputs: int, n_regression: int | None = None) -> torch.nn.Module:
        """Return the network.

        Parameters
        ----------
        signal
            Needs a channel and a time axis, and sensor positions for ``merger: attention``.
        n_outputs
            Size of the contrastive output.
        n_regression
            Size of the regression output, by default `n_outputs`.

        Raises
        ------
        DataError
            If an axis or the sensor positions are missing.
        """
        from torch import nn

        from braindecode_vis.encoders import simpleconv

        _, n_times = read_axes(signal, "SimpleConv")
        n_features = self.backbone_outputs
        # Arguments are built in the order in which the parts run, so that a seed always draws the same weights.
        return simpleconv.SimpleConv(
            merger=self._build_merger(signal),
            initial=nn.Conv1d(self.n_virtual_channels, self.initial_channels, 1),
            subjects=simpleconv.SubjectLayer(self.initial_channels, len(signal.subjects)),
            stack=simpleconv.ConvStack(self.initial_channels, hidden=self.hidden, depth=self.depth),
            final=self._build_final(),
            aggregate=simpleconv.AffineOverTime(n_times),
            head=simpleconv.make_head(n_features, self.head_hidden, n_outputs),
            regression_head=simpleconv.make_head(n_features, self.head_hidden, n_regression or n_outputs),
        )

    def _build_final(self) -> torch.nn.Module:
        """Return the last step of the stack at each sample."""
        from torch import nn

        if self.final == "one_layer":
            return nn.Conv1d(self.hidden, self.backbone_outputs, 1)
        wide = 2 * self.hidden
        return nn.Sequential(
            nn.Conv1d(self.hidden, wide, 1), nn.GELU(), nn.Conv1d(wide, self.backbone_outputs, 1)
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
        places = scale_positions(project_positions(signal.ch_pos))
        return SpatialAttention(
            places, self.n_virtual_channels, 32
        )  # 2 * 32 ** 2 features of a position, as published
