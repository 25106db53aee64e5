"""A compact convolutional denoiser of latents, conditioned on components of an image embedding.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
Ho, J. and Salimans, T. (2022). Classifier-free diffusion guidance. arXiv:2207.12598.
Perez, E. et al. (2018). FiLM: visual reasoning with a general conditioning layer. AAAI. arXiv:1709.07871.
The layout of the network, in which a learnt map of the embedding enters beside the latents, is a choice of ours.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from braindecode_vis.priors.sampling import NoiseSchedule

#: What the denoiser learns and is sampled under; not in the header of a weights file, so that it may not change.
SCHEDULE = NoiseSchedule(1000, "squaredcos_cap_v2", "v_prediction")


class ModulatedBlock(nn.Module):
    """Residual block whose first normalisation is scaled and shifted by the condition; it starts as the identity."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width, affine=False)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(condition_width, 2 * width)
        for parameter in [*self.conv2.parameters(), *self.modulation.parameters()]:
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return a map of the same shape; `condition` has the shape (n, condition_width)."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x) * (1 + scale) + shift))
        return x + self.conv2(F.silu(self.norm2(h)))


class Denoiser(nn.Module):
    """Predicts the velocity of noisy latents at a time, given what is known of an embedding.

    Parameters
    ----------
    n_components
        Components of an embedding.
    n_latent_channels, latent_size
        Channels, and height and width, of a latent; the size must be even.
    width
        Channels of the maps at half the latent's resolution, a multiple of 8.
    fine_width
        Channels of the maps at the latent's own resolution, a multiple of 8.
    condition_width
        Length of the vector made of embedding and time.
    n_blocks, n_fine_blocks
        Modulated blocks at half the resolution, and after them at the latent's own.
    """

    def __init__(
        self,
        *,
        n_components: int,
        n_latent_channels: int = 6,
        latent_size: int = 8,
        width: int = 128,
        fine_width: int = 64,
        condition_width: int = 384,
        n_blocks: int = 3,
        n_fine_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.coarse, fine = latent_size // 2, fine_width
        self.project = nn.Linear(2 * n_components, condition_width)
        self.refine = nn.Linear(condition_width, condition_width)
        self.embed_time = nn.Sequential(
            nn.Linear(64, condition_width), nn.SiLU(), nn.Linear(condition_width, condition_width)
        )
        self.make_map = nn.Linear(condition_width, width * self.coarse**2)
        self.enter = nn.Conv2d(n_latent_channels, fine, 3, padding=1)
        self.down = nn.Conv2d(fine, width, 2, stride=2)
        self.blocks = nn.ModuleList(ModulatedBlock(width, condition_width) for _ in range(n_blocks))
        self.up = nn.ConvTranspose2d(width, fine, 2, stride=2)
        self.merge = nn.Conv2d(2 * fine, fine, 1)
        self.fine_blocks = nn.ModuleList(ModulatedBlock(fine, condition_width) for _ in range(n_fine_blocks))
        self.leave = nn.Sequential(
            nn.GroupNorm(8, fine), nn.SiLU(), nn.Conv2d(fine, n_latent_channels, 3, padding=1)
        )
        for parameter in self.leave[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        latents: torch.Tensor,
        times: torch.Tensor,
        estimate: torch.Tensor,
        reliability: torch.Tensor,
    ) -> torch.Tensor:
        """Return the velocity, of the shape of `latents`.

        Parameters
        ----------
        latents : tensor of shape (n, n_latent_channels, latent_size, latent_size)
        times : tensor of shape (n,)
            Steps of the noise schedule, 0 to 999.
        estimate, reliability : tensors of shape (n, n_components)
            Estimated components of the embedding, and the share of the variance of each that is known (0 to 1). Both
            are zero where nothing is known.
        """
        h = F.silu(self.project(torch.cat([estimate, reliability], dim=1)))
        h = h + self.refine(h)
        condition = F.silu(h + self.embed_time(compute_time_features(times)))
        fine = self.enter(latents)
        x = self.down(F.silu(fine)) + self.make_map(condition).unflatten(1, (-1, self.coarse, self.coarse))
        for block in self.blocks:
            x = block(x, condition)
        x = self.merge(torch.cat([fine, self.up(x)], dim=1))
        for block in self.fine_blocks:
            x = block(x, condition)
        return self.leave(x)


def compute_time_features(times: torch.Tensor, n_features: int = 64) -> torch.Tensor:
    """Return sines and cosines of the steps 0 to 999 at geometrically spaced frequencies, shape (n, n_features)."""
    frequencies = torch.exp(
        -math.log(1000.0)
        * torch.arange(n_features // 2, device=times.device, dtype=torch.float32)
        / (n_features // 2)
    )
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
