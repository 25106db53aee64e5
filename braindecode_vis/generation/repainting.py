"""Draw an image again so that it shows what its embedding names: a guide for the sampler of the embedded generator.

An embedding shows the texture of an object better than the denoiser paints it. Two networks say by name what they see
(its shape, colour and texture): one in an embedding, one in an image. The image gets some noise back, and on the way
down each estimate of the clean latents takes a few steps towards images in which the second network reads what the
first one read. The steps go through the decoder, so that only what latents can hold is painted. Both networks learn
from labelled images, which the phantom has and a user's own stimuli have not; see ``benchmarks/studies/readers.py``.

References
----------
Dhariwal and Nichol (2021), guidance by a classifier, arXiv:2105.05233. Bansal et al. (2023), by a network that sees
clean images, through the decoder, arXiv:2302.07121.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from braindecode_vis.base.seeds import make_torch_generator
from braindecode_vis.embeddings.efficientnet import make_network
from braindecode_vis.generation.latent_diffusion_networks import SCHEDULE
from braindecode_vis.generation.priors.sampling import Predict

#: Step of the schedule to which noise is put back: half of it, where the pose of the object stays as it was.
START = 500
#: Steps towards the names per step of the sampler, and the root mean square of each in latents of unit variance.
PULLS, LENGTH = 8, 0.1
#: Noise and shift in pixels of what the reader of images sees, so that no pattern of single pixels convinces it.
NOISE, SHIFT = 0.1, 2
#: How much each property counts.
WEIGHTS = {"texture": 2.0, "shape": 0.5, "colour": 0.5, "accent": 0.25}
_WIDTHS = (24, 40, 80, 112)  # of the feature maps that are pooled


class ImageReader(nn.Module):
    """Names what 64-pixel images show, from the means and deviations of early feature maps of EfficientNet-lite0.

    Parameters
    ----------
    n_names
        How many names each property has.
    """

    def __init__(self, n_names: Mapping[str, int]) -> None:
        super().__init__()
        network = make_network()
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.blocks = network.blocks[: 1 + len(_WIDTHS)]
        n = 2 * sum(_WIDTHS)
        self.head = nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 384), nn.GELU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(384, count) for name, count in n_names.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits of shape (n, n_names) by property, of images in -1 to 1."""
        x = self.stem(images * (127.5 / 128) + 0.5 / 128)  # as the network was made for: (rgb255 - 127) / 128
        pooled = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number:
                n = x[0, 0].numel()
                variance = (
                    x.var((2, 3), correction=0) * n / max(n - 1, 1)
                )  # tiny images end in a single place
                pooled += [x.mean((2, 3)), (variance + 1e-4).sqrt()]
        features = self.head(torch.cat(pooled, dim=1))
        return {name: head(features) for name, head in self.heads.items()}


class EmbeddingReader(nn.Module):
    """Names what an embedding shows, from its components.

    Parameters
    ----------
    n_components
        Components of an embedding.
    n_names
        How many names each property has.
    """

    def __init__(self, n_components: int, n_names: Mapping[str, int]) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.Linear(n_components, 512), nn.SiLU(), nn.Dropout(0.1), nn.Linear(512, 256), nn.SiLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in n_names.items()})

    def forward(self, components: Tensor) -> dict[str, Tensor]:
        """Return logits of shape (n, n_names) by property."""
        features = self.read(components)
        return {name: head(features) for name, head in self.heads.items()}


def repaint(
    model: Any,
    images: Tensor,
    components: Tensor,
    predict: Predict,
    *,
    n_steps: int,
    seed: int,
    rows: Sequence[int],
) -> Tensor:
    """Return images in -1 to 1 that were drawn again, of the same shape.

    A row depends on the seed and its number alone.

    Parameters
    ----------
    model : braindecode_vis.generation.weights_file.Model
        With both readers.
    images : tensor of shape (n, 3, size, size)
        Between -1 and 1.
    components : tensor of shape (n, n_components)
        Of the embeddings.
    predict
        Gives the velocity of noised latents at a step; called without gradients.
    n_steps
        Steps of the sampler (DDIM).
    seed, rows
        Of the noise, and the number of each row.
    """
    device, signal = images.device, SCHEDULE.compute_signal(images.device)
    generators = [make_torch_generator(seed, "repaint", int(row)) for row in rows]

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators]).to(
            device
        )

    # All rows of all batches move together.
    shifts = torch.randint(
        -SHIFT, SHIFT + 1, (n_steps, PULLS, 2), generator=make_torch_generator(0, "repaint shifts")
    )
    with torch.no_grad():
        told = {
            name: answer.log_softmax(dim=1) for name, answer in model.embedding_reader(components).items()
        }
        clean = model.autoencoder.encode(images)
        times = [round(START * (1 - step / n_steps)) for step in range(n_steps)]
        a, b = signal[times[0]].sqrt(), (1 - signal[times[0]]).sqrt()
        latents = a * clean + b * draw(clean.shape[1:])
    for step, time in enumerate(times):
        a, b = signal[time].sqrt(), (1 - signal[time]).sqrt()
        with torch.no_grad():
            clean = a * latents - b * predict(latents, torch.tensor(time))
        for shift in shifts[step].tolist():
            clean = _pull(model, clean, told, draw(images.shape[1:]), shift)
        if step + 1 < n_steps:
            # The noise that goes with the pulled latents, not the predicted one: together they give `latents`.
            noise = (latents - a * clean) / b
            after = signal[times[step + 1]]
            latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    with torch.no_grad():
        return model.autoencoder.decode(clean)


def _pull(
    model: Any, clean: Tensor, told: Mapping[str, Tensor], noise: Tensor, shift: Sequence[int]
) -> Tensor:
    """Return latents a step closer to images in which the reader finds the given names."""
    with torch.enable_grad():
        start = clean.detach().requires_grad_(True)
        seen = (
            torch.roll(model.autoencoder.decode(start).clamp(-1.1, 1.1), tuple(shift), (2, 3)) + NOISE * noise
        )
        found = model.image_reader(seen)
        # The probability that both draw the same name from what they believe.
        likely = [
            weight * (found[name].log_softmax(dim=1) + told[name]).logsumexp(dim=1)
            for name, weight in WEIGHTS.items()
            if name in told
        ]
        (gradient,) = torch.autograd.grad(torch.stack(likely).sum(), start)
    length = gradient.pow(2).mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return clean + LENGTH * gradient / (length + 1e-8)
