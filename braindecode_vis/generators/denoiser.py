"""A compact convolutional denoiser of latents, conditioned on an image embedding.

Owns the network and what happens to an embedding before it: standardisation with the statistics of the training
images, dropout for classifier-free guidance, and noise. Noise matters because the network is trained on the embeddings
of images but used on embeddings decoded from a brain, which are blurred and shrunk toward the mean: during training an
embedding is mixed with noise of a strength drawn per image and then shrunk by a factor drawn per image, up to the one
that makes it the best linear estimate. The network is not told the strength; the length of a shrunk embedding shows it.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
Ho, J. and Salimans, T. (2022). Classifier-free diffusion guidance. arXiv:2207.12598.
Ho, J. et al. (2022). Cascaded diffusion models (noise on the condition). JMLR 23. arXiv:2106.15282.
Perez, E. et al. (2018). FiLM: visual reasoning with a general conditioning layer. AAAI. arXiv:1709.07871.
The layout of the network, in which a learnt map of the embedding enters beside the latents, is a choice of ours.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


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
    """Predicts the velocity of noisy latents at a time, given a standardised embedding or none.

    Parameters
    ----------
    n_features
        Length of an embedding.
    n_latent_channels, latent_size
        Channels, and height and width, of a latent; the size must be even.
    width
        Channels of the maps at half the latent's resolution, a multiple of 8.
    condition_width
        Length of the vector made of embedding and time.
    n_blocks
        Modulated blocks.
    """

    def __init__(
        self,
        *,
        n_features: int,
        n_latent_channels: int = 6,
        latent_size: int = 8,
        width: int = 128,
        condition_width: int = 384,
        n_blocks: int = 4,
    ) -> None:
        super().__init__()
        self.coarse, fine = latent_size // 2, 32
        self.project = nn.Linear(n_features, condition_width)
        self.refine = nn.Linear(condition_width, condition_width)
        self.unconditional = nn.Parameter(torch.zeros(condition_width))
        self.embed_time = nn.Sequential(
            nn.Linear(64, condition_width), nn.SiLU(), nn.Linear(condition_width, condition_width)
        )
        self.make_map = nn.Linear(condition_width, width * self.coarse**2)
        self.enter = nn.Conv2d(n_latent_channels, fine, 3, padding=1)
        self.down = nn.Conv2d(fine, width, 2, stride=2)
        self.blocks = nn.ModuleList(ModulatedBlock(width, condition_width) for _ in range(n_blocks))
        self.up = nn.ConvTranspose2d(width, fine, 2, stride=2)
        self.leave = nn.Sequential(
            nn.GroupNorm(8, 2 * fine),
            nn.SiLU(),
            nn.Conv2d(2 * fine, fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(fine, n_latent_channels, 3, padding=1),
        )
        for parameter in self.leave[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, latents: torch.Tensor, times: torch.Tensor, embeddings: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """Return the velocity, of the shape of `latents`.

        Parameters
        ----------
        latents : tensor of shape (n, n_latent_channels, latent_size, latent_size)
        times : tensor of shape (n,)
            Steps of the noise schedule, 0 to 999.
        embeddings : tensor of shape (n, n_features)
            Standardised.
        keep : boolean tensor of shape (n,)
            Where False, the embedding is ignored.
        """
        h = F.silu(self.project(embeddings))
        h = h + self.refine(h)
        h = torch.where(keep[:, None], h, self.unconditional)
        condition = F.silu(h + self.embed_time(compute_time_features(times)))
        fine = self.enter(latents)
        x = self.down(F.silu(fine)) + self.make_map(condition).unflatten(1, (-1, self.coarse, self.coarse))
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(torch.cat([fine, self.up(x)], dim=1))


def compute_time_features(times: torch.Tensor, n_features: int = 64) -> torch.Tensor:
    """Return sines and cosines of the steps 0 to 999 at geometrically spaced frequencies, shape (n, n_features)."""
    frequencies = torch.exp(
        -math.log(1000.0)
        * torch.arange(n_features // 2, device=times.device, dtype=torch.float32)
        / (n_features // 2)
    )
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def add_condition_noise(
    embeddings: torch.Tensor, strengths: torch.Tensor, shrinkage: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Mix standardised embeddings with noise and shrink them.

    ``sqrt(1 - s**2) * embedding + s * noise`` has unit variance; times ``sqrt(1 - s**2)`` it would be the best linear
    estimate of the embedding. `shrinkage` is the exponent of that factor.

    Parameters
    ----------
    embeddings, noise : tensors of shape (n, n_features)
        Of unit variance.
    strengths : tensor of shape (n,)
        s, from 0 (untouched) to 1 (noise alone).
    shrinkage : tensor of shape (n,)
        0 leaves the variance at one, 1 shrinks to the estimate.
    """
    kept = (1 - strengths**2).sqrt()
    return (kept[:, None] * embeddings + strengths[:, None] * noise) * (kept**shrinkage)[:, None]


def draw_condition_noise(
    embeddings: torch.Tensor, generator: torch.Generator, *, strongest: float
) -> torch.Tensor:
    """Return training conditions: a quarter untouched, the others with noise of strength 0 to `strongest`, shrunk.

    The noise is white, or another row's embedding, or in between: errors of a brain decoder are partly like noise and
    partly toward other images.
    """
    n = len(embeddings)
    draws = torch.rand(4, n, generator=generator).to(embeddings.device)
    white = torch.randn(embeddings.shape, generator=generator).to(embeddings.device)
    angle = draws[0, :, None] * (math.pi / 2)
    noise = angle.cos() * white + angle.sin() * embeddings.roll(1, dims=0)
    strengths = strongest * draws[1] * (draws[2] > 0.25)
    return add_condition_noise(embeddings, strengths, draws[3], noise)
