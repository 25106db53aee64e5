"""ATM: each channel is a token that attends to the others, then convolutions and a projector.

Settings of ATM-S (with the convolutions of NICE) and ATM-E (with EEGNet in their place). A subject token gives the
attention the identity of the subject; it is dropped afterwards, so that the convolutions get every channel. Subjects
are identified by their place in the training set, not by name.

References
----------
Li et al. (2024), Visual decoding and reconstruction via EEG embeddings with guided diffusion, arXiv:2403.07721.
Liu et al. (2024), iTransformer, arXiv:2310.06625: the encoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.encoders.tsconv_config import CONVOLUTION

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.encoders.atm import Atm, EEGNetStage
    from braindecode_vis.encoders.tsconv import TSConv


class AtmSettings(NetworkSettings):
    """Settings that both variants share; with 63 channels, 250 samples and 10 subjects this part has 444 500
    parameters.

    The paper's table counts 553 078 for its attention, which does not follow from the layers that it describes; with
    the convolutions (103 680) and the projector onto 1024 outputs (2 527 232), ATM-S as described has 3 075 412.

    Parameters
    ----------
    joint
        One value embedding per subject instead of a common one. A subject never trained on gets the mean of all
        (our choice; the released code cannot embed one).
    unknown_probability
        Share of the training trials whose subject is hidden, so that the token of unknown subjects (and the mean
        embedding of `joint`) is trained for subjects never seen. Acts on training sets of several subjects only.
        Our choice; in the released code that token is never trained alongside the others.
    width
        Size of the projector; None is the size of the target, as published. Another size adds a last linear layer
        (our choice).
    """

    joint: bool = False
    unknown_probability: float = Field(default=0.1, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "n_layers": 1, "n_heads": 4, "feedforward": 256, "dropout": 0.25, "position": "none", "projector_dropout": 0.5,
    }  # fmt: skip

    def assemble(self, signal: Signal, n_outputs: int, stage: TSConv | EEGNetStage) -> Atm:
        """Return the network around the stage that follows its attention."""
        from braindecode_vis.encoders.atm import Atm

        return Atm(
            signal,
            n_outputs,
            stage,
            joint=self.joint,
            unknown_probability=self.unknown_probability,
            width=self.width,
        )


class AtmSConfig(AtmSettings):
    """ATM-S, with the convolutions of NICE; the settings are those of `AtmSettings`."""

    kind: Literal["atm_s"] = "atm_s"

    removed_settings: ClassVar[Mapping[str, Any]] = {"convolution": CONVOLUTION}

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time or too short.
        """
        from braindecode_vis.encoders.tsconv import TSConv

        return self.assemble(signal, n_outputs, TSConv(signal, "atm_s"))


class AtmEConfig(AtmSettings):
    """ATM-E, with EEGNet in the place of the convolutions; the settings are those of `AtmSettings`.

    The attention is that of ATM-S, as the paper describes it. The released script (``Retrieval/ATME_retrieval.py``) has
    another: one layer of torch's transformer encoder over time points with a sinusoidal code (one head, feed-forward
    2048, model size 63 channels), then a linear map over time, and no subject token.

    EEGNet has the sizes of the released script: 8 temporal filters of 4 samples, 20 spatial filters of each, dropout
    0.25, lengths in samples whatever the sampling rate, and 1440 outputs for the projector.
    """

    kind: Literal["atm_e"] = "atm_e"

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "convolution": {
            "n_filters": 8, "depth_multiplier": 20, "n_pointwise": None, "kernel": 4, "pool_1": 4,
            "separable_kernel": 16, "pool_2": 8, "dropout": 0.25, "spatial_max_norm": 1.0, "scale_to_sfreq": False,
        },
        "n_features": 1440,
    }  # fmt: skip

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network; see `signal` for its interface.

        Raises
        ------
        DataError
            If the trials are not channel x time or too short.
        """
        from braindecode_vis.encoders.atm import EEGNetStage
        from braindecode_vis.encoders.eegnet import EEGNetMaps

        maps = EEGNetMaps(signal, "atm_e", dropout=0.25, kernel=4, depth_multiplier=20, scale_to_sfreq=False)
        return self.assemble(signal, n_outputs, EEGNetStage(maps))
