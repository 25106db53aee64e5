"""Make images from predicted pixels with a small network that is trained on the training images alone.

A prediction of least squared error is a conditional mean, with grey margins wherever the image was uncertain. The
refiner learns to undo that inside a generative model of its own: an image is a deformed training image, and its
prediction is simulated with the gains and residuals that out-of-fold predictions of the training trials show. The
network inverts that model for the loss that counts, mostly structural similarity, so it returns one image and not a
draw. The test split is never seen, and a reconstruction is no copy of a training image.

Networks of the ensemble are trained one after the other; each is kept in the checkpoint folder when it is done, so that
a training that was stopped goes on with the first that is missing.

References
----------
Zhao et al. (2017), losses for image restoration, doi:10.1109/TCI.2016.2644865 (structural similarity as a loss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import NOTHING_LENT, Context, ImageEncoder, ImageGenerator
from braindecode_vis.base.devices import seeded
from braindecode_vis.base.roles import complete
from braindecode_vis.base.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.priors.simulated_predictions import PredictionError, fit_prediction_error
from braindecode_vis.training.optimisation import (
    MovingAverage,
    list_shapes,
    optimise,
    read_checkpoint,
    sum_rows,
    take,
    write_checkpoint,
)

MOST_FEATURES = 4096  # pixels times colours, whose principal axes are computed
SMALLEST_SIDE = 12  # pixels, for the window of the loss and two halvings
# Deviations at strength 1, in units of half the side; knots a side of the smooth displacement.
AFFINE, SHIFT, ELASTIC, KNOTS = 0.07, 0.036, 0.043, 5
# Those of Wang et al. (2004), doi:10.1109/TIP.2003.819861, for images in 0..1.
SSIM_RADIUS, SSIM_SIGMA, SSIM_C1, SSIM_C2 = 5, 1.5, 0.01**2, 0.03**2
ERROR_SCALE = 10.0  # brings squared errors of images in 0..1 to the size of structural dissimilarities
EMA_DECAY, WEIGHT_DECAY = 0.99, 0.01
STEPS_BETWEEN_REPORTS = 10
START_THRESHOLD, START_GAIN = 0.35, 6.0  # of the contrast that a fresh network applies


@dataclass(frozen=True)
class RefinerRecipe:
    """How the networks are trained; see `RefinerConfig` for each entry."""

    structure_weight: float
    deformation: float
    width: int
    steps: int
    batch_size: int
    learning_rate: float
    n_networks: int
    seed: int


class RefinerGenerator(ImageGenerator):
    """Trained networks whose mean image is shown.

    Parameters
    ----------
    encoder
        That of the pixels.
    networks
        Of one shape.
    losses
        Of each network at the end of its training.
    """

    def __init__(self, encoder: Any, networks: list[nn.Module], losses: list[float]) -> None:
        self.encoder, self.networks, self.losses = encoder, networks, losses

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the pixels the networks were trained on."""
        return space == self.encoder.space

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3); nothing is random after training."""
        if not self.accepts(embeddings.space):
            raise ConfigError(
                f"the generator 'refiner' refines {self.encoder.space!r}, not {embeddings.space!r}."
            )
        pixels = embeddings.flat().reshape(-1, *self.encoder.shape)  # (n_rows, height, width, colours)
        values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32))
        with torch.inference_mode():
            made = torch.stack([network(values) for network in self.networks]).mean(dim=0)
        return self.encoder.decode(made.permute(0, 2, 3, 1).numpy().reshape(len(pixels), -1))

    def describe(self) -> dict[str, Any]:
        """Return the loss of each network at the end of its training."""
        return {"losses": self.losses}

    def write(self, folder: Path) -> None:
        """Write the networks as safetensors, and their losses as JSON."""
        for number, network in enumerate(self.networks):
            state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
            write_tensors(folder / f"network{number}.safetensors", state)
        write_json(folder / "refiner.json", {"losses": self.losses, "space": self.encoder.space})


def read_refiner(folder: Path, encoder: Any, *, width: int) -> RefinerGenerator:
    """Read what `RefinerGenerator.write` wrote.

    Parameters
    ----------
    folder
        Holds it.
    encoder
        That of the pixels.
    width
        Channels of the networks at full resolution.
    """
    own = complete(ImageEncoder, encoder)
    assert own.shape is not None  # nothing else was ever trained
    losses = read_json(folder / "refiner.json")["losses"]
    networks: list[nn.Module] = []
    for number in range(len(losses)):
        network = RefinerNetwork(own.shape, width)
        network.load_state_dict(load_tensors(folder / f"network{number}.safetensors", "torch"))
        networks.append(network.eval().requires_grad_(False))
    return RefinerGenerator(own, networks, losses)


def fit_refiner(data: GeneratorData, recipe: RefinerRecipe) -> RefinerGenerator:
    """Train the networks on the training data.

    Networks that lie finished in the checkpoint folder of the data's context are taken from there.

    Raises
    ------
    ConfigError
        If the target is not made of pixels, or of too few or too many, or if out-of-fold predictions are missing.
    DataError
        If a loss is not finite, or a finished network lies there that is damaged or of another training.
    """
    encoder, pairs = complete(ImageEncoder, data.image_encoder), data.predicted
    shape = encoder.shape
    if shape is None:
        raise ConfigError(
            f"the generator 'refiner' refines pixels, but the target space is {encoder.space!r}; set target.kind to "
            "pixels."
        )
    if min(shape[:2]) < SMALLEST_SIDE or int(np.prod(shape)) > MOST_FEATURES:
        raise ConfigError(
            f"the generator 'refiner' needs at least {SMALLEST_SIDE} pixels per side and at most "
            f"{MOST_FEATURES} values per image, not {' x '.join(map(str, shape))}; change target.size or "
            "target.colour."
        )
    if pairs is None or len(pairs) < 3:
        raise ConfigError(
            "the generator 'refiner' learns from out-of-fold predictions of training trials, but this "
            "encoder gives too few; set encoder.selection.hold_out above 0, or choose ridge."
        )
    true = data.embeddings.select(list(pairs.ids))
    images, predicted, seen = (rows.flat().reshape(-1, *shape) for rows in (data.embeddings, pairs, true))
    networks, losses = train_refiners(recipe, images, predicted, seen, context=data.context)
    return RefinerGenerator(encoder, networks, losses)


def train_refiners(
    recipe: RefinerRecipe,
    images: np.ndarray,
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    context: Context = NOTHING_LENT,
) -> tuple[list[nn.Module], list[float]]:
    """Return trained networks and the mean loss of the last tenth of the steps of each.

    Parameters
    ----------
    recipe
        How.
    images : float array of shape (n_images, height, width, colours)
        The training images in 0..1.
    predicted, true : float arrays of shape (n_trials, height, width, colours)
        Out-of-fold predictions of training trials, and the image of each.
    context
        Where finished networks are kept, and a call for progress.
    """
    height, width, colours = images.shape[1:]
    error = fit_prediction_error(predicted.reshape(len(predicted), -1), true.reshape(len(true), -1))
    # (n_images, height, width, colours) -> (n_images, colours, height, width), as convolutions take it
    bank = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))
    networks: list[nn.Module] = []
    losses: list[float] = []
    for member in range(recipe.n_networks):
        with seeded(derive_seed(recipe.seed, "refiner weights", member)):
            network = RefinerNetwork((height, width, colours), recipe.width)
        identity = {
            "network": list_shapes(network), "config": {**asdict(recipe), "member": member},
            "data": sum_rows([images, predicted, true]),
        }  # fmt: skip
        folder = context.checkpoints
        path = None if folder is None else folder / f"network{member}.safetensors"
        found = None if path is None else read_checkpoint(path, identity)
        if found is not None:
            network.load_state_dict(take(found[0], "network"))
            loss = float(found[1]["loss"])
        else:
            loss = train_refiner(recipe, network, bank, error, member, progress=context.progress)
            if path is not None:
                state = {"identity": identity, "loss": loss}
                write_checkpoint(path, {"network": network.state_dict()}, state)
        networks.append(network.eval().requires_grad_(False))
        losses.append(loss)
    return networks, losses


def train_refiner(
    recipe: RefinerRecipe,
    network: nn.Module,
    bank: Tensor,
    error: PredictionError,
    member: int,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> float:
    """Train a network in place, which then holds its averaged weights, and return its loss.

    Parameters
    ----------
    recipe
        How.
    network
        Freshly initialised.
    bank : tensor of shape (n_images, colours, height, width)
        The training images.
    error
        Simulates predictions.
    member
        Number of the network, for seeds and progress.
    progress
        Called with steps done, steps in all and words on how it goes.
    """
    numbers = make_generator(recipe.seed, "refiner", member)
    generator = make_torch_generator(recipe.seed, "refiner", member)
    average = MovingAverage(network, EMA_DECAY, warm_up=False)
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    # torch's own cycle, which moves the first moment's decay as well as the rate; it needs four steps.
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=max(recipe.steps, 4)
    )
    losses = []

    def compute_losses(step: int) -> Iterator[Tensor]:
        rows = numbers.integers(len(bank), size=recipe.batch_size)
        images = deform_images(bank[rows], generator, recipe.deformation)
        # The order of a prediction's features is that of the target: height, width, colour.
        last = images.permute(0, 2, 3, 1).contiguous()
        drawn = torch.from_numpy(error.draw(last.flatten(1).numpy(), numbers)).view(last.shape)
        made = network(drawn.permute(0, 3, 1, 2).contiguous())
        yield compute_refiner_loss(made, images, recipe.structure_weight)

    def after(step: int, step_losses: list[Tensor]) -> None:
        cycle.step()
        average.follow(network, step)
        losses.append(float(step_losses[0]))
        done = step + 1
        if progress is not None and (done % STEPS_BETWEEN_REPORTS == 0 or done == recipe.steps):
            progress(
                member * recipe.steps + done, recipe.n_networks * recipe.steps,
                f"network {member + 1} of {recipe.n_networks}, loss {losses[-1]:.3f}",
            )  # fmt: skip

    optimise(
        optimiser, network.parameters(), range(recipe.steps), compute_losses, after=after,
        describe_failure=lambda step, loss: (
            f"the loss of the refiner is {loss} at step {step}; look for extreme values in the images and predictions."
        ),
    )  # fmt: skip
    network.load_state_dict(average.model.state_dict())
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


class RefinerNetwork(nn.Module):
    """Two halvings and back, with a dense layer at the coarsest grid; it corrects a learnt contrast of its input.

    Parameters
    ----------
    shape
        Height, width and colours.
    width
        Channels at full resolution.
    """

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        height, length, colours = shape
        self.padding = (0, -length % 4, 0, -height % 4)
        self.size = (height, length)
        n_coarse = ((height + 3) // 4) * ((length + 3) // 4) * 4 * width
        self.fine = _make_block(colours, width)
        self.middle = _make_block(width, 2 * width)
        self.coarse = nn.Sequential(_make_block(2 * width, 4 * width), _make_block(4 * width, 4 * width))
        self.whole = nn.Sequential(nn.Linear(n_coarse, 256), nn.SiLU(), nn.Linear(256, n_coarse))
        self.middle_up = _make_block(6 * width, 2 * width)
        self.fine_up = _make_block(3 * width, width)
        self.out = nn.Conv2d(width, colours, 1)
        self.gain = nn.Parameter(torch.tensor(START_GAIN))
        self.threshold = nn.Parameter(torch.tensor(START_THRESHOLD))

    def forward(self, predicted: Tensor) -> Tensor:
        """Return images in 0..1 of the shape of `predicted`, (n, colours, height, width)."""
        x = functional.pad(predicted, self.padding)
        fine = self.fine(x)
        middle = self.middle(functional.avg_pool2d(fine, 2))
        coarse = self.coarse(functional.avg_pool2d(middle, 2))
        coarse = coarse + self.whole(coarse.flatten(1)).view_as(coarse)
        middle = self.middle_up(torch.cat([_double(coarse), middle], dim=1))
        fine = self.fine_up(torch.cat([_double(middle), fine], dim=1))
        logits = self.out(fine) + self.gain * (x - self.threshold)
        return torch.sigmoid(logits)[..., : self.size[0], : self.size[1]]


def _make_block(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(2, n_out), nn.SiLU())


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2)


def deform_images(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Return images (n, colours, height, width) after random linear maps, shifts and smooth displacements."""
    n, _, height, width = images.shape
    maps = torch.eye(2, 3).repeat(n, 1, 1)
    maps[:, :, :2] += strength * AFFINE * torch.randn(n, 2, 2, generator=generator)
    maps[:, :, 2] += strength * SHIFT * torch.randn(n, 2, generator=generator)
    grid = functional.affine_grid(maps, [n, 1, height, width], align_corners=False)
    knots = strength * ELASTIC * torch.randn(n, 2, KNOTS, KNOTS, generator=generator)
    smooth = functional.interpolate(knots, size=(height, width), mode="bicubic", align_corners=False)
    grid = grid + smooth.permute(0, 2, 3, 1)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)


def compute_refiner_loss(made: Tensor, images: Tensor, structure_weight: float) -> Tensor:
    """Return the weighted sum of structural dissimilarity and scaled squared error."""
    structure = 1 - compute_ssim(made, images).mean()
    return structure_weight * structure + (1 - structure_weight) * ERROR_SCALE * (made - images).pow(2).mean()


def compute_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of each image and colour, shape (n, colours), differentiable in both.

    Window and constants are those of the metric ``ssim``; only full windows count.
    """
    vertical, horizontal = (_make_band(size, x) for size in x.shape[-2:])
    mean_x, mean_y, squares, products = (
        vertical @ z @ horizontal.T for z in (x, y, x * x + y * y, x * y)
    )  # (n, colours, height - 10, width - 10)
    both, energy = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    numerator = (2 * both + SSIM_C1) * (2 * (products - both) + SSIM_C2)
    return (numerator / ((energy + SSIM_C1) * (squares - energy + SSIM_C2))).mean(dim=(-2, -1))


def _make_band(size: int, like: Tensor) -> Tensor:
    """Return the matrix of shape (size - 10, size) that filters with the Gaussian window."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=like.dtype)
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    window = window / window.sum()
    band = torch.zeros(size - 2 * SSIM_RADIUS, size, dtype=like.dtype)
    for row in range(len(band)):
        band[row, row : row + len(window)] = window
    return band
