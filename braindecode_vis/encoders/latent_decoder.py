"""The low-level branch of ATM: transposed convolutions from a trial to the latent image of an autoencoder.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721, low-level pipeline.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

# Of each channel's projection in time, and of the one projection of responses without times.
_TIME_FEATURES, _TRUNK_FEATURES = 128, 2048


class LatentDecoder(nn.Module):
    """Projection in time, one point of many channels, transposed convolutions, a 1 x 1 convolution onto latents."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        has_time: bool,
        first: int,
        widths: list[int],
        latent_channels: int,
    ) -> None:
        super().__init__()
        n_rows = math.prod(shape[:-1])  # channels, or 1 for voxels and parcels
        self.project = nn.Linear(shape[-1], _TIME_FEATURES if has_time else _TRUNK_FEATURES)
        self.dropout = nn.Dropout(0.5)
        trunk = n_rows * self.project.out_features
        stages: list[nn.Module] = []
        if first > 1:  # the point becomes the first map
            stages += _make_stage(trunk, trunk := (widths[0] if widths else _TRUNK_FEATURES), first, 1, 0)
        for width in widths:
            stages += _make_stage(trunk, width, 4, 2, 1)  # kernel 4, stride 2, padding 1: twice the side
            trunk = width
        self.grow = nn.Sequential(*stages)
        self.exit = nn.Conv2d(trunk, latent_channels, kernel_size=1)

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return latents of shape (batch, n_outputs); the subject plays no part.

        Parameters
        ----------
        data : tensor of shape (batch, *shape)
        subject : integer tensor of shape (batch,)
        """
        point = self.dropout(self.project(data)).flatten(1)[
            :, :, None, None
        ]  # (batch, n_rows * features, 1, 1)
        return self.exit(self.grow(point)).flatten(1)  # channels, height, width in a row


def _make_stage(n_in: int, n_out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    return [
        nn.ConvTranspose2d(n_in, n_out, kernel, stride, padding),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
    ]
