"""The networks of the embedded generator, an autoencoder of 64 x 64 images and a denoiser, and their condition.

The latents have zero mean and unit variance per channel by construction (a batch normalisation without weights closes
the encoder), and the decoder is trained on latents with a little noise, which takes the place of a variational term:
near latents must mean near images, or a sampled latent would decode to nothing. The denoiser is conditioned on
components of an image embedding; that a learnt map of the embedding enters beside the latents, the widths, the
normalised latents and the perceptual network are choices of ours. Nothing here knows embeddings or samplers.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
Ho, J. and Salimans, T. (2022). Classifier-free diffusion guidance. arXiv:2207.12598.
Perez, E. et al. (2018). FiLM: visual reasoning with a general conditioning layer. AAAI. arXiv:1709.07871.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from braindecode_vis.generation.priors.sampling import NoiseSchedule

if TYPE_CHECKING:
    import torch

    from braindecode_vis.generation.generator_data import RepetitionNoise
    from braindecode_vis.generation.priors.scales import PrincipalComponents


DOWNSAMPLING = 8  # pixels a latent
#: What the denoiser learns and is sampled under; not in the header of a weights file, so that it may not change.
SCHEDULE = NoiseSchedule(1000, "squaredcos_cap_v2", "v_prediction")


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each after a SiLU, added to their input; it starts as the identity.

    There is no normalisation: at this size it costs a CPU more than it gains.
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, n_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(n_channels, n_channels, 3, padding=1)
        for parameter in self.conv2.parameters():  # starts as the identity
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a map of the same shape."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Images in -1 to 1 to standardised latents and back.

    Parameters
    ----------
    n_latent_channels
        Channels of a latent.
    width
        Channels at a quarter of the resolution, a multiple of 4; twice as many at an eighth.
    """

    def __init__(self, *, n_latent_channels: int = 6, width: int = 48) -> None:
        super().__init__()
        fine, mid, coarse = width // 2, width, 2 * width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),  # (n, 3, size, size) -> (n, 48, size / 4, size / 4)
            nn.Conv2d(48, mid, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(mid, coarse, 3, stride=2, padding=1),
            ResidualBlock(coarse),
            nn.SiLU(),
            nn.Conv2d(coarse, n_latent_channels, 3, padding=1),
            # Slow statistics: those of the last 50 batches are what the denoiser will meet.
            nn.BatchNorm2d(n_latent_channels, affine=False, momentum=0.02),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(n_latent_channels, coarse, 3, padding=1),
            ResidualBlock(coarse),
            ResidualBlock(coarse),
            nn.Conv2d(
                coarse, 4 * mid, 1
            ),  # (n, 4 * mid, size / 8, size / 8), then (n, mid, size / 4, size / 4)
            nn.PixelShuffle(2),
            ResidualBlock(mid),
            nn.Conv2d(mid, 4 * fine, 1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(fine, fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(fine, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return latents of shape (n, n_latent_channels, size / 8, size / 8) of images in -1 to 1."""
        return self.encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images of shape (n, 3, size, size); values may leave -1 to 1 by a little."""
        return self.decoder(latents)


class PerceptualLoss(nn.Module):
    """Distance between the early feature maps of EfficientNet-lite0, the image encoder that the package brings.

    Feature maps of strides 4, 8 and 16 are scaled to unit length per position, as LPIPS does (Zhang et al. 2018,
    arXiv:1801.03924), but without its learnt weights.

    Parameters
    ----------
    network
        As `braindecode_vis.embeddings.efficientnet.load_network` returns it; its weights do not change.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = nn.ModuleList([network.blocks[:2], network.blocks[2], network.blocks[3]])

    def compute_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the unit-length feature maps of images in -1 to 1."""
        x = self.stem(images * (127.5 / 128) + 0.5 / 128)  # the network expects (rgb255 - 127) / 128
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(F.normalize(x, dim=1))  # per position, over the channels
        return features

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance per position, averaged over the three scales."""
        with torch.no_grad():
            wanted = self.compute_features(targets)
        made = self.compute_features(images)
        distances = [((m - w) ** 2).sum(dim=1).mean() for m, w in zip(made, wanted, strict=True)]
        return torch.stack(distances).mean()


def compute_autoencoder_loss(
    autoencoder: Autoencoder,
    perceptual: PerceptualLoss,
    images: torch.Tensor,
    noise: torch.Tensor,
    *,
    perceptual_weight: float,
    perceptual_share: float = 1.0,
) -> torch.Tensor:
    """Return L1 + mean squared + weighted perceptual loss of images decoded from latents with noise.

    Parameters
    ----------
    images : tensor of shape (n, 3, size, size)
        Between -1 and 1.
    noise : tensor of the shape of the latents
        Added to the latents.
    perceptual_share
        Share of the images, the first ones, on which the costly perceptual loss is computed.
    """
    decoded = autoencoder.decode(autoencoder.encode(images) + noise)
    loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
    n = max(1, round(perceptual_share * len(images)))
    return loss + perceptual_weight * perceptual(decoded[:n], images[:n])


def reconstruct_images(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Return images encoded and decoded, the most that a denoiser of the latents could reach.

    Parameters
    ----------
    images : uint8 array of shape (n, size, size, 3)
    """
    with torch.inference_mode():
        latents = autoencoder.encode(scale_images(torch.from_numpy(images)))
        return unscale_images(autoencoder.decode(latents)).numpy()


def scale_images(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images of shape (n, height, width, 3) as floats in -1 to 1 of shape (n, 3, height, width)."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def unscale_images(images: torch.Tensor) -> torch.Tensor:
    """Return the inverse of `scale_images`, clipped and rounded."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


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
        # (n, 2 * width) -> two maps of shape (n, width, 1, 1)
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
        # Says what is where; the modulation of channels treats all places alike.
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
        for parameter in self.leave[-1].parameters():  # starts with the velocity 0, its mean
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
        # (n, width * coarse**2) -> (n, width, coarse, coarse)
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


# --- what it is conditioned on ---------------------------------------------------------------------------------
# What the embedded generator is conditioned on: components of an image embedding, and the reliability of each.
#
# An embedding is described by its leading principal components, scaled to unit variance over the training images of
# the generator. Beside each component stands its reliability, the share of its variance that is known: 1 for the
# embedding of an image, 0 where nothing is known, in between for what was decoded from a brain. The value is then the
# best linear estimate, whose variance is the reliability itself. Training draws both at random, so that one network
# serves true embeddings, decoded ones and none at all (which is what classifier-free guidance compares with).
#
# `fit_uncertainty` finds the reliabilities of a brain encoder on its training trials. Components are judged one by
# one; that their errors are independent and Gaussian is an assumption. The idea of giving the network the noise of
# its condition comes from cascaded diffusion (Ho et al. 2022, arXiv:2106.15282); one reliability per component is
# ours.


def draw_reliability(
    shares: torch.Tensor, n: int, generator: torch.Generator, *, certain: float, hidden: float
) -> torch.Tensor:
    """Return reliabilities of n training conditions, of shape (n, n_components) between 0 and 1.

    A share `certain` of the rows is known fully and a share `hidden` not at all. The others get noise of a random
    strength that falls on all components alike, or the more on those of small variance, with a scatter of its own for
    each component.
    """
    import torch

    # Per row: how strong the noise is, how much more it falls on small components, and which kind of row it is.
    draws = torch.rand(3, n, 1, generator=generator)
    scatter = 0.5 * torch.randn(n, len(shares), generator=generator)
    strength = (-1.5 + 3.5 * draws[0]) * np.log(
        10
    )  # noise to signal from 0.03 to 100, evenly in its logarithm
    reliability = torch.sigmoid(1.5 * draws[1] * shares.log() - strength + scatter)
    reliability = torch.where(draws[2] < certain, torch.ones(()), reliability)
    # Rows without any condition are what guidance compares with.
    return torch.where(draws[2] >= 1 - hidden, torch.zeros(()), reliability)


def blur(components: torch.Tensor, reliability: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return best linear estimates of components of unit variance that are known with the given reliability.

    Parameters
    ----------
    components, reliability, noise : tensors of shape (n, n_components)
        The noise has unit variance.
    """
    return reliability * components + (reliability * (1 - reliability)).sqrt() * noise


@dataclass(frozen=True)
class Uncertainty:
    """How predicted components become best estimates, and how reliable these are.

    Parameters
    ----------
    predicted_mean, target_mean : float arrays of shape (n_components,)
        Over the training trials.
    slope : float array of shape (n_components,)
        Of the true component on the predicted one.
    reliability : float array of shape (n_components,)
        Share of the variance that the prediction explains.
    """

    predicted_mean: np.ndarray
    target_mean: np.ndarray
    slope: np.ndarray
    reliability: np.ndarray

    def estimate(self, predicted: np.ndarray) -> np.ndarray:
        """Return the best estimates of predicted components, both of shape (n, n_components)."""
        return self.target_mean + self.slope * (predicted - self.predicted_mean)


def fit_uncertainty(
    predicted: np.ndarray, true: np.ndarray, noise: RepetitionNoise | None, components: PrincipalComponents
) -> Uncertainty:
    """Learn from predictions of training trials how far each component can be trusted in a test trial.

    Test trials are often averages of more repetitions than training trials. What part of a prediction's variance is
    noise of single repetitions is measured on repetitions of training images, and counted as often as it remains.

    Parameters
    ----------
    predicted, true : float arrays of shape (n_trials, n_components)
        Predictions by an encoder that has not learnt from the trial, and the components of its image.
    noise
        Deviations of single repetitions; None takes test trials to be as noisy as training trials.
    components
        Turns the deviations into components.
    """
    left, right = predicted - predicted.mean(axis=0), true - true.mean(axis=0)
    n = len(left)
    variance, target = (left**2).mean(axis=0), (right**2).mean(axis=0)
    # A negative covariance is chance: no encoder predicts the opposite of what was seen.
    covariance = np.maximum((left * right).mean(axis=0), 0)
    if noise is not None:
        single = ((noise.deviations @ components.basis.T / components.std) ** 2).mean(axis=0)
        # At least what is correlated with the image stays.
        signal = np.maximum(variance - single / noise.n_train, covariance**2 / np.maximum(target, 1e-12))
        variance = signal + single / noise.n_test
    # A component that never varies, in the images or in what is predicted, is not known at all.
    variance, target = np.maximum(variance, 1e-12), np.maximum(target, 1e-12)
    explained = covariance**2 / (variance * target)
    # By chance alone a correlation of n pairs has a square of 1 / n.
    kept = np.clip(explained - 1 / n, 0, 0.99)
    # The slope of the regression, shrunk as much as its explained variance was.
    slope = covariance / variance * np.where(explained > 0, kept / np.maximum(explained, 1e-12), 0)
    return Uncertainty(predicted.mean(axis=0), true.mean(axis=0), slope, kept)
