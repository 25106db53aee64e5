"""ATM: each channel is a token that attends to the others, then convolutions and a projector.

Settings of ATM-S (with the convolutions of NICE) and ATM-E (with EEGNet in their place). A subject token tells the
attention who is recorded; it is what is dropped afterwards, so that every channel reaches the convolutions. Subjects
are known by their place in the training set, whatever their names.

References
----------
Li et al. (2024), Visual decoding and reconstruction via EEG embeddings with guided diffusion, arXiv:2403.07721.
Liu et al. (2024), iTransformer, arXiv:2310.06625: the encoder layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.eegnet_config import EEGNetSettings
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.encoders.tsconv_config import TSConvSettings

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.encoders.atm import Atm, EEGNetStage
    from braindecode_vis.encoders.tsconv import TSConv


class AtmSettings(NetworkSettings):
    """What both variants share; at 63 channels, 250 samples and 10 subjects this part has 444 500 parameters.

    The paper's table counts 553 078 for its attention, which does not follow from the layers that it describes; with
    the convolutions (103 680) and the projector onto 1024 outputs (2 527 232), ATM-S as described has 3 075 412.

    Parameters
    ----------
    n_layers, n_heads, feedforward, dropout
        Encoder layers, heads of each, width of the feed-forward part, and dropout of embedding, attention and
        feed-forward (1, 4, 256, 0.25). A head has n_times // n_heads features, a token n_times.
    position
        Code of the channel's place in the order of channels, added to its token: ``none`` (the published model),
        ``sinusoidal`` or ``learned``. The subject token gets none; where the paper's variants added theirs is
        unverified.
    joint
        One value embedding per subject instead of a common one. A subject never trained on gets the mean of all
        (our choice; the released code cannot embed one).
    unknown_probability
        Share of the training trials whose subject is hidden, so that the token of unknown subjects (and the mean
        embedding of `joint`) is trained for subjects never seen. Acts on training sets of several subjects only.
        Our choice; in the released code that token is never trained alongside the others.
    projector_dropout
        In the residual block of the projector (0.5).
    width
        Size of the projector; None is the size of the target, as published. Another size adds a last linear layer
        (our choice).
    """

    n_layers: int = Field(default=1, ge=1)
    n_heads: int = Field(default=4, ge=1)
    feedforward: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.25, ge=0, lt=1)
    position: Literal["none", "sinusoidal", "learned"] = "none"
    joint: bool = False
    unknown_probability: float = Field(default=0.1, ge=0, lt=1)
    projector_dropout: float = Field(default=0.5, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)

    def assemble(self, signal: Signal, n_outputs: int, stage: TSConv | EEGNetStage) -> Atm:
        """Return the network around the stage that follows its attention."""
        from braindecode_vis.encoders.atm import Atm

        return Atm(
            signal,
            n_outputs,
            stage,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            feedforward=self.feedforward,
            dropout=self.dropout,
            position=self.position,
            joint=self.joint,
            unknown_probability=self.unknown_probability,
            projector_dropout=self.projector_dropout,
            width=self.width,
        )


class AtmSConfig(AtmSettings):
    """ATM-S; the other settings are those of `AtmSettings`.

    Parameters
    ----------
    convolution
        Settings of the temporal and spatial convolutions, see `TSConvSettings`.
    """

    kind: Literal["atm_s"] = "atm_s"
    convolution: TSConvSettings = TSConvSettings()

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        ConfigError, DataError
            If there are more heads than samples, or the trials are not channel x time or too short.
        """
        from braindecode_vis.encoders.tsconv import TSConv

        return self.assemble(signal, n_outputs, TSConv(signal, "atm_s", self.convolution))


class AtmEConfig(AtmSettings):
    """ATM-E; the other settings are those of `AtmSettings`.

    The attention is that of ATM-S, as the paper describes it. The released script (``Retrieval/ATME_retrieval.py``) has
    another: one layer of torch's transformer encoder over time points with a sinusoidal code (one head, feed-forward
    2048, model size 63 channels), then a linear map over time, and no subject token.

    Parameters
    ----------
    convolution
        Settings of EEGNet, see `EEGNetSettings`. The defaults are those of the released script: 8 temporal filters of
        4 samples, 20 spatial filters of each, dropout 0.25, lengths not scaled.
    n_features
        Outputs of EEGNet, which the projector reads (1440).
    """

    kind: Literal["atm_e"] = "atm_e"
    convolution: EEGNetSettings = EEGNetSettings(kernel=4, depth_multiplier=20, scale_to_sfreq=False)
    n_features: int = Field(default=1440, ge=1)

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        ConfigError, DataError
            If there are more heads than samples, or the trials are not channel x time or too short.
        """
        from braindecode_vis.encoders.atm import EEGNetStage

        stage = EEGNetStage(self.convolution.make_maps(signal, "atm_e"), self.n_features)
        return self.assemble(signal, n_outputs, stage)
