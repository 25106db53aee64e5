"""Train the network of a diffusion prior, on standardised rows.

Every epoch draws from its own named seed, so a run that was stopped at a checkpoint and one that was not take the same
steps. The weights that count are a moving average; with held-out images, those of the epoch whose average had the
lowest loss on them. The steps are those of `braindecode_vis.training.optimisation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.base.devices import autocast, seeded
from braindecode_vis.base.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.generation.priors.sampling import NoiseSchedule
from braindecode_vis.generation.priors.simulated_predictions import ConditionSource
from braindecode_vis.training.optimisation import (
    MovingAverage,
    compute_warm_cosine,
    list_shapes,
    optimise,
    pack_optimiser,
    read_checkpoint,
    sum_rows,
    take,
    unpack_optimiser,
    write_checkpoint,
)

CHECKPOINT = "prior_checkpoint.safetensors"
LOOKS = 50  # at the held-out images over a training


@dataclass(frozen=True)
class PriorRecipe:
    """How the network is trained; see `DiffusionPriorConfig` for each entry."""

    schedule: NoiseSchedule
    batch_size: int
    epochs: int
    min_steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    gradient_clip: float
    condition_dropout: float
    ema_decay: float
    seed: int

    def count_epochs(self, n_rows: int) -> int:
        """Return the number of epochs, more than asked for where they would be less than `min_steps`."""
        return max(self.epochs, math.ceil(self.min_steps / math.ceil(n_rows / self.batch_size)))

    def compute_rate(self, step: int, n_steps: int) -> float:
        """Return the share of the learning rate at a step; a short training rises over its first tenth at most."""
        return compute_warm_cosine(step, n_steps, min(self.warmup_steps, max(1, n_steps // 10)))


@dataclass
class PriorTraining:
    """How far a training has come, and which epoch was the best so far."""

    epoch: int = 0
    step: int = 0
    best_loss: float | None = None
    best_epoch: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def fit_network(
    network: nn.Module,
    source: ConditionSource,
    held_out: ConditionSource | None,
    recipe: PriorRecipe,
    *,
    workspace: Path | None = None,
    checkpoint_every: int = 10,
    bfloat16: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> PriorTraining:
    """Train `network` in place and return what came of it; afterwards it holds the weights that count.

    Parameters
    ----------
    network
        On its device, freshly initialised.
    source, held_out
        Standardised rows to learn from, and pairs of images that are not in them.
    recipe
        How.
    workspace
        Folder of the checkpoint; without one, none is written.
    checkpoint_every
        Epochs between two checkpoints.
    bfloat16
        Compute in bfloat16 where that is safe.
    advance
        Called with 1 after every epoch.

    Raises
    ------
    DataError
        If the loss becomes infinite or NaN, or the workspace holds a checkpoint of another recipe, network or data.
    """
    optimiser = torch.optim.Adam(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=True
    )
    average = MovingAverage(network, recipe.ema_decay)
    done, best = PriorTraining(), dict[str, Tensor]()
    n_epochs = recipe.count_epochs(len(source))
    n_steps = n_epochs * math.ceil(len(source) / recipe.batch_size)
    between = max(1, n_epochs // LOOKS)  # epochs from one look to the next
    identity = {
        "network": list_shapes(network),
        "config": {**recipe.__dict__, "schedule": recipe.schedule.__dict__},
        "data": sum_rows([source.conditions, source.targets, None if held_out is None else held_out.targets]),
    }
    path = None if workspace is None else workspace / CHECKPOINT
    device = next(network.parameters()).device
    found = None if path is None else read_checkpoint(path, identity)
    if found is not None:
        tensors, state = found
        network.load_state_dict(take(tensors, "network"))
        average.model.load_state_dict(take(tensors, "average"))
        best = {name: value.to(device) for name, value in take(tensors, "best").items()}
        unpack_optimiser(optimiser, take(tensors, "optimiser"))
        done = PriorTraining(**state["done"])

    def train_epoch() -> float:
        rng = make_generator(recipe.seed, "epoch", done.epoch)
        noise = make_torch_generator(recipe.seed, "noise", done.epoch)
        batches = np.split(
            rng.permutation(len(source)), range(recipe.batch_size, len(source), recipe.batch_size)
        )
        losses = []

        def compute_losses(step: int) -> Iterator[Tensor]:
            conditions, targets = source.draw(batches[step - first], rng)
            with autocast(device, torch.bfloat16 if bfloat16 else None):
                yield compute_loss(
                    network, conditions, targets, recipe.schedule, noise,
                    dropout=recipe.condition_dropout, device=device,
                )  # fmt: skip

        def after(step: int, step_losses: list[Tensor]) -> None:
            done.step = step + 1
            average.follow(network, done.step)
            losses.append(float(step_losses[0]))

        network.train()
        first = done.step
        with seeded(derive_seed(recipe.seed, "dropout", done.epoch), device):
            optimise(
                optimiser, network.parameters(), range(first, first + len(batches)), compute_losses, after=after,
                rate=lambda step: recipe.compute_rate(step, n_steps), clip_norm=recipe.gradient_clip,
                describe_failure=lambda step, loss: (
                    f"the loss of the diffusion prior is {loss} at step {step} (epoch {done.epoch}); lower "
                    "prior.learning_rate, or look for extreme values in the embeddings."
                ),
            )  # fmt: skip
        return float(np.mean(losses))

    while done.epoch < n_epochs:
        entry = {"epoch": float(done.epoch), "loss": train_epoch()}
        if held_out is not None and ((done.epoch + 1) % between == 0 or done.epoch + 1 == n_epochs):
            entry["held_out_loss"] = measure_held_out(average.model, held_out, recipe, device)
            if done.best_loss is None or entry["held_out_loss"] < done.best_loss:
                done.best_loss, done.best_epoch = entry["held_out_loss"], done.epoch
                best = {name: value.clone() for name, value in average.model.state_dict().items()}
        done.history.append(entry)
        done.epoch += 1
        if path is not None and (done.epoch % checkpoint_every == 0 or done.epoch == n_epochs):
            groups = {
                "network": network.state_dict(), "average": average.model.state_dict(), "best": best,
                "optimiser": pack_optimiser(optimiser),
            }  # fmt: skip
            write_checkpoint(path, groups, {"identity": identity, "done": asdict(done)})
        advance(1)
    # Without held-out images the last average counts, as in ATM the last weights.
    network.load_state_dict(best or average.model.state_dict())
    network.eval()
    return done


def compute_loss(
    network: nn.Module,
    conditions: np.ndarray,
    targets: np.ndarray,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    *,
    dropout: float,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the mean squared error of the network's prediction at random steps of the diffusion.

    Parameters
    ----------
    conditions, targets : float arrays of shape (n, ...)
        Standardised.
    schedule
        Says how noise grows and what the network predicts.
    generator
        On the CPU, so that a GPU sees the same noise.
    dropout
        Probability that a sample loses its condition, drawn for each sample on its own.
    device
        Of the network.
    """
    n = len(targets)
    # Everything random is drawn on the CPU and moved.
    clean = torch.from_numpy(np.ascontiguousarray(targets, np.float32)).to(device)
    condition = torch.from_numpy(np.ascontiguousarray(conditions, np.float32)).to(device)
    timesteps = torch.randint(schedule.n_timesteps, (n,), generator=generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    keep = (torch.rand(n, generator=generator) >= dropout).float().to(device)
    noised, wanted = schedule.add_noise(clean, noise, timesteps)
    return torch.nn.functional.mse_loss(network(noised, timesteps, condition, keep).float(), wanted)


def measure_held_out(
    averaged: nn.Module, held_out: ConditionSource, recipe: PriorRecipe, device: torch.device
) -> float:
    """Return the loss of the averaged weights, always at the same steps and under the same noise."""
    generator, total, n_seen = make_torch_generator(recipe.seed, "held out"), 0.0, 0
    assert held_out.conditions is not None
    repeats = max(1, 512 // len(held_out))  # few images are looked at under several noises
    rows = np.tile(np.arange(len(held_out)), repeats)
    with torch.no_grad():
        for start in range(0, len(rows), recipe.batch_size):
            part = rows[start : start + recipe.batch_size]
            loss = compute_loss(
                averaged, held_out.conditions[part], held_out.targets[part], recipe.schedule, generator,
                dropout=0.0, device=device,
            )  # fmt: skip
            total, n_seen = total + float(loss) * len(part), n_seen + len(part)
    return total / n_seen
