"""Train the network of a diffusion prior: loss, moving average, checkpoints that resume exactly.

Every epoch draws from its own named seed, so a run that was stopped at a checkpoint and one that was not take the same
steps. A checkpoint is one safetensors file that is replaced atomically. The weights that count are a moving average;
with held-out images, those of the epoch whose average had the lowest loss on them. Knows standardised rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.devices import autocast, seeded
from braindecode_vis.priors.checkpoints import State, read_checkpoint, sign_training, write_checkpoint
from braindecode_vis.priors.sampling import NoiseSchedule
from braindecode_vis.priors.simulated_predictions import PredictionError
from braindecode_vis.seeds import derive_seed, make_generator, make_torch_generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CHECKPOINT = "prior_checkpoint.safetensors"
LOOKS = 50  # at the held-out images over a training


class Source(Protocol):
    """Rows to learn from."""

    @property
    def targets(self) -> np.ndarray:
        """All targets."""
        ...

    def __len__(self) -> int:
        """Number of rows in one epoch."""
        ...

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return conditions and targets of the given rows."""
        ...


@dataclass(frozen=True)
class PairSource:
    """Predictions and the targets that belong to them, row by row."""

    conditions: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.targets)

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of the given rows; nothing is random."""
        return self.conditions[rows], self.targets[rows]


@dataclass(frozen=True)
class NoisedSource:
    """Targets, with conditions that are simulated anew every time."""

    targets: np.ndarray
    error: PredictionError

    def __len__(self) -> int:
        """Number of targets."""
        return len(self.targets)

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return simulated predictions of the given rows, and the rows."""
        targets = self.targets[rows]
        return self.error.draw(targets, generator), targets


@dataclass(frozen=True)
class Recipe:
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


def fit_network(
    network: nn.Module,
    source: Source,
    held_out: PairSource | None,
    recipe: Recipe,
    *,
    workspace: Path | None = None,
    checkpoint_every: int = 10,
    bfloat16: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> State:
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
        Folder of the checkpoint; without one, none is written. A checkpoint of another recipe, network or data set is
        ignored and replaced.
    checkpoint_every
        Epochs between two checkpoints.
    bfloat16
        Compute in bfloat16 where that is safe.
    advance
        Called with 1 after every epoch.

    Raises
    ------
    DataError
        If the loss becomes infinite or NaN.
    """
    import torch

    optimiser = torch.optim.Adam(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=True
    )
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    state = State(network, average, optimiser)
    n_epochs = recipe.count_epochs(len(source))
    between = max(1, n_epochs // LOOKS)
    signature = sign_training(
        network, {**recipe.__dict__, "schedule": recipe.schedule.__dict__},
        [getattr(source, "conditions", None), source.targets, None if held_out is None else held_out.targets],
    )  # fmt: skip
    if workspace is not None and (workspace / CHECKPOINT).is_file():
        read_checkpoint(workspace / CHECKPOINT, state, signature)
    device = next(network.parameters()).device
    signal = recipe.schedule.compute_signal().to(device)
    n_steps = n_epochs * math.ceil(len(source) / recipe.batch_size)
    dtype = torch.bfloat16 if bfloat16 else None
    while state.epoch < n_epochs:
        losses = _train_epoch(state, source, recipe, signal, n_steps, dtype)
        entry = {"epoch": float(state.epoch), "loss": float(np.mean(losses))}
        if held_out is not None and ((state.epoch + 1) % between == 0 or state.epoch + 1 == n_epochs):
            entry["held_out_loss"] = _validate(state, held_out, recipe, signal)
            if state.best_loss is None or entry["held_out_loss"] < state.best_loss:
                state.best_loss, state.best_epoch = entry["held_out_loss"], state.epoch
                state.best = {name: value.clone() for name, value in state.average.items()}
        state.history.append(entry)
        state.epoch += 1
        if workspace is not None and (state.epoch % checkpoint_every == 0 or state.epoch == n_epochs):
            write_checkpoint(workspace / CHECKPOINT, state, signature)
        advance(1)
    network.load_state_dict(state.average if state.best is None else state.best)
    network.eval()
    return state


def _train_epoch(
    state: State, source: Source, recipe: Recipe, signal: Tensor, n_steps: int, dtype: Any
) -> list[float]:
    import torch

    rng = make_generator(recipe.seed, "epoch", state.epoch)
    noise = make_torch_generator(recipe.seed, "noise", state.epoch)
    order, losses = rng.permutation(len(source)), []
    state.network.train()
    with seeded(derive_seed(recipe.seed, "dropout", state.epoch), signal.device):
        for start in range(0, len(order), recipe.batch_size):
            conditions, targets = source.draw(order[start : start + recipe.batch_size], rng)
            with autocast(signal.device, dtype):
                loss = compute_loss(
                    state.network, conditions, targets, recipe.schedule, signal, noise,
                    dropout=recipe.condition_dropout,
                )  # fmt: skip
            if not bool(torch.isfinite(loss)):
                raise DataError(
                    f"the loss of the diffusion prior is {float(loss.detach())} at step {state.step} "
                    f"(epoch {state.epoch}); lower prior.learning_rate, or look for extreme values in the embeddings."
                )
            state.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(state.network.parameters(), recipe.gradient_clip)
            for group in state.optimiser.param_groups:
                group["lr"] = recipe.learning_rate * find_rate(state.step, n_steps, recipe.warmup_steps)
            state.optimiser.step()
            state.step += 1
            _update_average(state, recipe.ema_decay)
            losses.append(float(loss.detach()))
    return losses


def compute_loss(
    network: nn.Module,
    conditions: np.ndarray,
    targets: np.ndarray,
    schedule: NoiseSchedule,
    signal: Tensor,
    generator: torch.Generator,
    *,
    dropout: float,
) -> Tensor:
    """Return the mean squared error of the network's prediction at random steps of the diffusion.

    Parameters
    ----------
    conditions, targets : float arrays of shape (n, ...)
        Standardised.
    schedule, signal
        The schedule and its `compute_signal`, on the network's device.
    generator
        On the CPU, so that a GPU sees the same noise.
    dropout
        Probability that a sample loses its condition, drawn for each sample on its own.
    """
    import torch

    device, n = signal.device, len(targets)
    clean = torch.from_numpy(np.ascontiguousarray(targets, np.float32)).to(device)
    condition = torch.from_numpy(np.ascontiguousarray(conditions, np.float32)).to(device)
    timesteps = torch.randint(schedule.n_timesteps, (n,), generator=generator).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    keep = (torch.rand(n, generator=generator) >= dropout).float().to(device)
    share = signal[timesteps].reshape(n, *[1] * (clean.ndim - 1))
    noised = share.sqrt() * clean + (1 - share).sqrt() * noise
    wanted = noise if schedule.prediction == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * clean
    return torch.nn.functional.mse_loss(network(noised, timesteps, condition, keep).float(), wanted)


def find_rate(step: int, n_steps: int, warmup_steps: int) -> float:
    """Return the share of the learning rate at a step: a linear rise, then half a cosine down to zero.

    A training shorter than ten times the warm-up rises over its first tenth.
    """
    warmup = min(warmup_steps, max(1, n_steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def _update_average(state: State, decay: float) -> None:
    import torch

    decay = min(decay, (1 + state.step) / (10 + state.step))  # early weights are soon forgotten
    with torch.no_grad():
        own = state.network.state_dict()
        torch._foreach_lerp_([state.average[name] for name in own], list(own.values()), 1 - decay)


def _validate(state: State, held_out: PairSource, recipe: Recipe, signal: Tensor) -> float:
    """Return the loss of the averaged weights, always at the same steps and under the same noise."""
    import torch

    kept = {name: value.clone() for name, value in state.network.state_dict().items()}
    state.network.load_state_dict(state.average)
    state.network.eval()
    generator, total, n_seen = make_torch_generator(recipe.seed, "held out"), 0.0, 0
    repeats = max(1, 512 // len(held_out))  # few images are looked at under several noises
    rows = np.tile(np.arange(len(held_out)), repeats)
    with torch.no_grad():
        for start in range(0, len(rows), recipe.batch_size):
            part = rows[start : start + recipe.batch_size]
            loss = compute_loss(
                state.network, held_out.conditions[part], held_out.targets[part], recipe.schedule, signal,
                generator, dropout=0.0,
            )  # fmt: skip
            total, n_seen = total + float(loss) * len(part), n_seen + len(part)
    state.network.load_state_dict(kept)
    return total / n_seen
