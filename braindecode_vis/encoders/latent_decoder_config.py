"""The low-level branch of ATM: from a trial to the latent image of a diffusion autoencoder.

Each channel is projected in time, all of them become the channels of one point, and transposed convolutions grow that
point to a map of latents. The network obeys the contract of `signal`: its `n_outputs` values are the flattened latents
(channels, height, width) of a target of kind ``vae`` or ``taesd``. The published loss is the mean absolute error (L1)
with AdamW 1e-3, weight decay 1e-4, a cosine down to 1e-6, at most 200 epochs (patience 20), batches of 30; training and
loss are not known here. The authors call this branch unstable.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721, low-level pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    from torch import nn


class LatentDecoderConfig(NetworkSettings):
    """Transposed convolutions from a response to the latents of an autoencoder (ATM's low level).

    The stages follow from the size of the latents: every stage doubles height and width (kernel 4, stride 2, padding
    1), and the widths halve from at most 1024 down to 32. 64 x 64 gives the published 1024-512-256-128-64-32; 96 = 3 x
    32 starts from 3 x 3. Each channel is projected in time onto 128 features; responses without a time axis (voxels,
    parcels) by one linear layer onto 2048, a choice of ours. Dropout behind the projection is 0.5, as in ATM's code of
    2026.

    Parameters
    ----------
    latent_channels
        Channels of the latents (4 for Stable Diffusion and SDXL).
    """

    kind: Literal["latent_decoder"] = "latent_decoder"
    latent_channels: int = Field(default=4, ge=1)

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "time_features": 128, "trunk_features": 2048, "dropout": 0.5, "last_width": 32, "widest": 1024,
    }  # fmt: skip

    def plan(self, n_outputs: int) -> tuple[int, list[int]]:
        """Return the side of the first map and the channels of each stage.

        Raises
        ------
        ConfigError
            If the target is no square map of `latent_channels`.
        """
        side = math.isqrt(n_outputs // self.latent_channels)  # rounded down; the next line finds it out
        if self.latent_channels * side * side != n_outputs or side < 2:
            raise ConfigError(
                f"the network latent_decoder needs a target of {self.latent_channels} square maps, but this one has "
                f"{n_outputs} values; use a target of kind vae or taesd, or set latent_channels (packaged_latents: 8)."
            )
        first, n_stages = side, 0
        while first % 2 == 0:  # the odd part of the side is the first map, grown from a point in one stage
            first, n_stages = first // 2, n_stages + 1
        widths = [min(1024, 32 * 2 ** (n_stages - 1 - stage)) for stage in range(n_stages)]
        return first, widths

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the untrained network for trials of this shape.

        Parameters
        ----------
        signal
            Axes of the trials: channels and times, or one axis of voxels or parcels.
        n_outputs
            Number of values of a latent image.
        """
        from braindecode_vis.encoders.latent_decoder import LatentDecoder

        first, widths = self.plan(n_outputs)
        return LatentDecoder(
            signal.shape,
            has_time=signal.dims[-1] == "time",
            first=first,
            widths=widths,
            latent_channels=self.latent_channels,
        )
