"""Diffusion priors: draws of image embeddings that fit a predicted one; MindEye2's learns with the brain encoder.

Owns what is learnt from training data (scales, the network, how samples are brought back to the training images' mean
and spread) and how draws are chosen. Settings, networks, training loop, samplers and simulated predictions live in the
files beside this one; torch is imported only when it is needed.

A prediction that minimises a squared error is a conditional mean, shorter and smoother than any image's embedding; the
prior turns it into a draw from the images that it may stand for (Ramesh et al. 2022, DALL-E 2, arXiv:2204.06125; Li et
al. 2024, ATM, arXiv:2403.07721).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.arrays import Embeddings, check_same_space
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NOTHING_LENT, Context, Prior
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.base.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.priors.diffusion_networks import BrainTokenTransformer
from braindecode_vis.generation.priors.image_source import keep_distinct
from braindecode_vis.generation.priors.prior_training import PriorRecipe, fit_network
from braindecode_vis.generation.priors.sampling import (
    NoiseSchedule,
    bound_signal,
    draw_samples,
    guide_network,
)
from braindecode_vis.generation.priors.scales import (
    PrincipalComponents,
    RowScale,
    find_bounds,
    fit_components,
    fit_scale,
    turn_rows,
)
from braindecode_vis.generation.priors.simulated_predictions import (
    ConditionSource,
    Direction,
    fit_prediction_error,
)
from braindecode_vis.training.objectives.objective import upcast
from braindecode_vis.training.optimisation import load_weights

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.training.objectives.objective import Outputs, StepSizes


VALUES_AT_ONCE = 1 << 22  # of one sampling batch; fixed, since the noise depends on how rows are batched
CALIBRATION_ROWS = 1024  # samples that mean and spread are measured on: a deviation to about 2 percent


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn and chosen; see `DiffusionPriorConfig` for each entry."""

    sampler: str = "ddpm"
    n_steps: int = 50
    guidance: float = 5.0
    select: Literal["none", "best_of", "mean"] = "none"
    n_candidates: int = 16
    pull: float = 1.0


@dataclass(frozen=True)
class DiffusionFit:
    """What sampling needs; all of it learnt from training trials and training images.

    `condition` and `target` standardise rows, whose own shape is `shape`: a `RowScale` each, or a `Direction` and
    `PrincipalComponents` where conditions are simulated.

    `bounds`, of shape (2, ...), are the least and greatest standardised value of the training images, widened by a
    tenth of the range on either side; or -1 and 1 of the embedding, standardised.
    """

    network: Any
    condition: Any
    target: Any
    bounds: np.ndarray
    samples: RowScale | None
    space: str
    shape: tuple[int, ...]
    chosen: dict[str, Any]


@dataclass(frozen=True)
class _TrainingRows:
    """Standardised rows that the network learns from, and the conditions whose samples are measured afterwards."""

    source: ConditionSource
    held_out: ConditionSource | None
    condition: Any
    target: Any
    bounds: np.ndarray
    conditions: np.ndarray


class DiffusionPrior(Prior):
    """The learned prior; see the module.

    Parameters
    ----------
    config
        A `DiffusionPriorConfig`: what it learns from, and how the training runs.
    make_network
        Returns a fresh network for targets of a shape, (n_features,) or (n_tokens, n_features).
    recipe
        How the network is trained, and the noise schedule.
    drawing
        How samples are drawn.
    seed
        Of weights, held-out images and calibration.
    fitted
        What an earlier fit has learnt.

    Attributes
    ----------
    workspace
        Folder for checkpoints of the training; None, as it is at first, writes none. A training that was stopped goes
        on from there and ends as it would have.
    advance
        Called with 1 after every epoch of the training.
    """

    def __init__(
        self,
        config: Any,
        make_network: Callable[[tuple[int, ...]], nn.Module],
        recipe: PriorRecipe,
        drawing: Drawing,
        *,
        seed: int = 0,
        fitted: DiffusionFit | None = None,
    ) -> None:
        self.make_network, self.recipe, self.drawing = make_network, recipe, drawing
        self.condition, self.n_components, self.held_out = (
            config.condition,
            config.n_components,
            config.held_out,
        )
        self.restandardise, self.checkpoint_every = config.restandardise, config.checkpoint_every
        self.bfloat16, self.clip, self.device = config.precision == "bfloat16", config.clip, config.device
        self.seed, self.fitted = seed, fitted
        self.workspace: Path | None = None
        self.advance: Callable[[int], None] = lambda n: None

    def bind(self, context: Context) -> None:
        """Take the folder of checkpoints from what the pipeline lends."""
        self.workspace = context.checkpoints

    def describe(self) -> dict[str, Any]:
        """Return the length of the training and the epoch that was taken."""
        return dict(self._require_fit().chosen)

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> DiffusionPrior:
        """Learn from training data only.

        Parameters
        ----------
        predicted
            Out-of-fold predictions of the training trials; ``condition: simulated`` does without them.
        target
            The embedding of the image of each prediction, row by row; without predictions, of training images.
        images
            One row per image, shown to this brain or not, that gives the scale of samples and from which
            ``noised_targets`` and ``simulated`` learn. Without it, the images of `target` are all there are.

        Raises
        ------
        DataError
            If rows do not belong together, are too few, or the training diverges.
        """
        if images is not None:
            check_same_space(target, images)
        whole = keep_distinct(target if images is None else images)
        if self.condition == "simulated":
            rows = self._prepare_directions(target, whole)
        else:
            rows = self._prepare_pairs(predicted, target, whole)
        network = self._initialise(rows.bounds.shape[1:])
        training = fit_network(
            network, rows.source, rows.held_out, self.recipe, workspace=self.workspace,
            checkpoint_every=self.checkpoint_every, bfloat16=self.bfloat16, advance=self.advance,
        )  # fmt: skip
        chosen = {
            "n_rows": len(rows.source), "epochs": training.epoch, "steps": training.step,
            "taken_epoch": training.best_epoch, "held_out_loss": training.best_loss,
            "loss": training.history[-1]["loss"],
        }  # fmt: skip
        self.fitted = DiffusionFit(
            network,
            rows.condition,
            rows.target,
            rows.bounds,
            None,
            whole.space,
            whole.vectors.shape[1:],
            chosen,
        )
        if self.restandardise:
            # Of training predictions: measured on test predictions it would be transductive.
            rng = make_generator(self.seed, "prior", "calibration rows")
            n = min(CALIBRATION_ROWS, len(rows.conditions))
            some = np.sort(rng.choice(len(rows.conditions), size=n, replace=False))
            n_draws = max(1, CALIBRATION_ROWS // (4 * n))  # few rows are drawn from several times
            seed = derive_seed(self.seed, "prior", "calibration")
            samples = fit_scale(self._draw(rows.conditions[some], n_draws, seed))
            self.fitted = replace(self.fitted, samples=samples)
        return self

    def _prepare_pairs(
        self, predicted: Embeddings | None, target: Embeddings, whole: Embeddings
    ) -> _TrainingRows:
        if predicted is None:
            raise DataError(
                f"the diffusion prior with prior.condition {self.condition} learns from predictions, but "
                "there are none; set prior.condition to simulated."
            )
        check_same_space(predicted, target)
        if len(predicted) != len(target) or (predicted.ids != target.ids).any():
            raise DataError("the diffusion prior needs one target per prediction, in the same order.")
        if len(predicted) < 4:
            raise DataError(f"the diffusion prior cannot learn from {len(predicted)} prediction(s).")
        condition, scale = fit_scale(np.asarray(predicted.vectors)), fit_scale(np.asarray(whole.vectors))
        conditions, targets = condition.apply(predicted.vectors), scale.apply(target.vectors)
        # Whole images are kept aside: another trial of the same image would give the answer away.
        aside = self._choose_held_out(target.ids)
        is_held = np.isin(target.ids.astype(str), aside)
        held_out = ConditionSource(targets[is_held], conditions[is_held]) if is_held.any() else None
        if self.condition == "predicted":
            source = ConditionSource(targets[~is_held], conditions[~is_held])
        else:
            error = fit_prediction_error(conditions, targets)
            learnt = ~np.isin(whole.ids.astype(str), aside)
            source = ConditionSource(scale.apply(whole.vectors[learnt]), simulate=error.draw)
        if self.clip == "unit":  # of the embedding itself, in the units in which the network works
            ends = np.stack([np.full_like(whole.vectors[0], end) for end in (-1.0, 1.0)])
            bounds = scale.apply(ends).astype(np.float32)
        else:
            bounds = find_bounds(scale.apply(whole.vectors))
        return _TrainingRows(source, held_out, condition, scale, bounds, conditions)

    def _prepare_directions(self, target: Embeddings, whole: Embeddings) -> _TrainingRows:
        if whole.vectors.ndim != 2:
            raise ConfigError(
                f"prior.condition is simulated, which is for one vector per image, but each embedding is "
                f"{whole.vectors.shape[1]} tokens; set prior.condition to noised_targets."
            )
        if len(whole) < 4:
            raise DataError(f"the diffusion prior cannot learn from {len(whole)} image(s).")
        is_held = np.isin(whole.ids.astype(str), self._choose_held_out(whole.ids))
        scale = fit_components(whole.flat()[~is_held], self.n_components)
        # Short predictions point from the mean of the run's own images, wherever the mean of the others may be.
        origin = keep_distinct(target).flat().mean(axis=0, dtype=np.float64).astype(np.float32)
        targets, direction = scale.apply(whole.flat()), Direction(origin, scale.basis, scale.std)
        source, held = (
            ConditionSource(targets[rows], simulate=direction.simulate) for rows in (~is_held, is_held)
        )
        rng = make_generator(self.seed, "prior", "simulated conditions")
        # Drawn once, so that every epoch is compared on the same predictions.
        held_out = None
        if len(held):
            held_out = ConditionSource(held.targets, direction.simulate(held.targets, rng))
        rows = np.sort(rng.choice(len(source), min(CALIBRATION_ROWS, len(source)), replace=False))
        conditions, _ = source.draw(rows, rng)
        return _TrainingRows(source, held_out, direction, scale, find_bounds(targets), conditions)

    def _choose_held_out(self, ids: np.ndarray) -> np.ndarray:
        names = np.unique(ids.astype(str))
        n = round(self.held_out * len(names))
        if self.held_out and not 0 < n < len(names) - 1:
            raise ConfigError(
                f"prior.held_out is {self.held_out}, which leaves one side empty for {len(names)} "
                "training images; set it to 0 or to a larger share."
            )
        return make_generator(self.seed, "prior", "held out").permutation(names)[:n]

    def _initialise(self, shape: tuple[int, ...]) -> nn.Module:
        """Return a fresh network on its device, the same for the same seed."""
        device = choose_device(self.device, setting="prior.device")
        with seeded(derive_seed(self.seed, "prior", "weights")):
            network = self.make_network(shape)
        return network.to(device)

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return `n_draws` embeddings per row, draws of one row next to each other.

        Parameters
        ----------
        predicted
            In the space of the fit.
        n_draws
            Independent draws per row; with ``best_of`` or ``mean`` each is made of candidates of its own.
        seed
            Of the noise; the same seed gives the same samples.
        """
        fit = self._require_fit()
        if predicted.space != fit.space or predicted.vectors.shape[1:] != fit.shape:
            raise DataError(
                f"the diffusion prior was fitted in the space {fit.space!r} with rows of shape "
                f"{fit.shape}, but got {predicted.space!r} with {predicted.vectors.shape[1:]}."
            )
        conditions = fit.condition.apply(predicted.vectors)
        drawn = self._draw(conditions, n_draws, derive_seed(seed, "diffusion prior"))
        if fit.samples is not None:
            drawn = fit.samples.apply(drawn)
        vectors = fit.target.undo(drawn)
        if self.drawing.pull < 1:
            # Between the directions of predictions and of what was drawn for them, as long as images are. Simulated
            # predictions share the images' origin; real ones may lie elsewhere, so that each has its own mean.
            n = len(drawn)
            origin = (fit.condition if self.condition == "simulated" else fit.target).mean
            own = (np.repeat(predicted.vectors, n_draws, axis=0) - fit.condition.mean).reshape(n, -1)
            goals = (vectors - origin).reshape(n, -1)
            turned = turn_rows(own, goals, self.drawing.pull) * np.linalg.norm(fit.target.std)
            vectors = (origin + turned.reshape(vectors.shape)).astype(np.float32)
        return Embeddings(vectors, np.repeat(predicted.ids, n_draws), fit.space)

    def _draw(self, conditions: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
        """Return standardised samples of shape (n_rows * n_draws, ...), selected if that was asked for."""
        import torch

        fit, drawing, schedule = self._require_fit(), self.drawing, self.recipe.schedule
        each = 1 if drawing.select == "none" else drawing.n_candidates
        rows = np.repeat(conditions, n_draws * each, axis=0)
        device = next(fit.network.parameters()).device
        low, high = torch.from_numpy(fit.bounds).to(device)
        n_rows = max(1, VALUES_AT_ONCE // max(1, rows[:1].size))
        parts = []
        for start in range(0, len(rows), n_rows):
            generator = make_torch_generator(seed, "batch", start)
            condition = torch.from_numpy(np.ascontiguousarray(rows[start : start + n_rows])).to(device)
            noise = torch.randn(condition.shape, generator=generator).to(device)  # equal on a CPU and a GPU
            with torch.inference_mode():
                predict = guide_network(fit.network, condition, drawing.guidance)
                part = draw_samples(
                    bound_signal(predict, schedule, low, high), noise, schedule, sampler=drawing.sampler,
                    n_steps=drawing.n_steps, generator=generator,
                )  # fmt: skip
            parts.append(part.float().cpu().numpy())
        drawn = np.concatenate(parts) if parts else rows
        if drawing.select == "none":
            return drawn
        candidates = drawn.reshape(-1, each, *drawn.shape[1:])  # (n_rows * n_draws, n_candidates, ...)
        if drawing.select == "mean":
            return candidates.mean(axis=1)
        # Directions are compared from the mean of the training rows on both sides.
        left = drawn.reshape(len(drawn), -1) * fit.target.std.ravel()
        right = rows.reshape(len(rows), -1) * fit.condition.std.ravel()
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = np.einsum("ij,ij->i", left, right) / np.maximum(
            norms, 1e-12
        )  # (n_rows * n_draws * n_candidates,)
        best = cosine.reshape(-1, each).argmax(axis=1)
        return candidates[np.arange(len(best)), best]

    def _require_fit(self) -> DiffusionFit:
        if self.fitted is None:
            raise DataError("the diffusion prior has not been fitted; run train first.")
        return self.fitted

    def write(self, folder: Path) -> None:
        """Write the fitted state as safetensors and JSON."""
        import torch

        fit = self._require_fit()
        tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in fit.network.state_dict().items()}
        tensors["bounds"] = torch.from_numpy(fit.bounds.copy())
        scales = {"condition": fit.condition, "target": fit.target, "samples": fit.samples}
        for name, scale in scales.items():
            for key, values in ({} if scale is None else vars(scale)).items():
                tensors[f"{name}.{key}"] = torch.from_numpy(values.copy())
        write_tensors(folder / "prior.safetensors", tensors)
        meta = {
            "kind": "diffusion", "space": fit.space, "shape": list(fit.shape), "seed": self.seed,
            "chosen": fit.chosen,
        }  # fmt: skip
        write_json(folder / "prior.json", meta)

    def read(self, folder: Path) -> DiffusionPrior:
        """Take what `write` wrote, the seed included, and return the prior itself."""
        from braindecode_vis.training.optimisation import load_weights

        tensors, meta = load_tensors(folder / "prior.safetensors", "torch"), read_json(folder / "prior.json")
        self.seed = int(meta["seed"])
        parts: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            parts.setdefault(part, {})[key] = value
        bounds = tensors["bounds"].numpy()
        network = self._initialise(bounds.shape[1:])
        load_weights(network, parts["network"], what=f"the prior in {folder}")
        network.eval()
        simulated = self.condition == "simulated"
        kinds = {
            "condition": Direction if simulated else RowScale,
            "target": PrincipalComponents if simulated else RowScale,
            "samples": RowScale,
        }
        scales: dict[str, Any] = {
            name: kind(**{key: value.numpy() for key, value in parts[name].items()})
            for name, kind in kinds.items()
            if name in parts
        }
        self.fitted = DiffusionFit(
            network, scales["condition"], scales["target"], bounds, scales.get("samples"), meta["space"],
            tuple(meta["shape"]), meta["chosen"],
        )  # fmt: skip
        return self


# --- trained with the brain encoder ----------------------------------------------------------------------------
# The prior of MindEye2: a network that the brain encoder trains beside its own weights, and its samples.
#
# Owns the loss, where the trained network goes, and its files. Noise schedule and sampler are those above.
#
# Beside the public code of Scotti et al. (2024), arXiv:2403.11207, with copied weights: see the test of this module.


FILE = "prior.safetensors"


class DiffusionPriorTerm(nn.Module):
    """The loss of `DiffusionPriorObjectiveConfig`, and the network that it trains.

    Parameters
    ----------
    config
        The settings, a `DiffusionPriorObjectiveConfig`.

    Attributes
    ----------
    shape
        Of one target, (n_features,) or (n_tokens, n_features); empty until `prepare`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        self.shape: tuple[int, ...] = ()

    def prepare(self, sizes: StepSizes) -> None:
        """Make the network for targets of a shape."""
        self.shape = sizes.target_shape
        self.network = make_network(self.shape, **describe_network(self.config))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the network's parameters, of which biases do not decay and all others as the optimiser says."""
        return self.network.parameter_groups()

    def forward(self, outputs: Outputs) -> Tensor:
        """Return the loss of one step; steps, noise and what is dropped follow the seed of the step."""
        assert outputs.regression is not None
        assert outputs.raw_target is not None
        clean = outputs.raw_target.unflatten(1, self.shape)
        n, generator = len(clean), make_torch_generator(outputs.seed, "diffusion prior")
        # Drawn on the CPU and moved, so that a GPU, and every process, sees the same.
        times = torch.randint(self.schedule.n_timesteps, (n,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        kept = (torch.rand(2, n, generator=generator) >= self.config.condition_dropout).float()
        return compute_clean_loss(
            self.network, outputs.regression.unflatten(1, self.shape), clean, self.schedule,
            times.to(clean.device), noise.to(clean.device), *kept.to(clean.device),
        )  # fmt: skip


def compute_clean_loss(
    network: nn.Module,
    condition: Tensor,
    clean: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    noise: Tensor,
    keep: Tensor,
    keep_noised: Tensor,
) -> Tensor:
    """Return the mean squared error of what the network predicts of noised embeddings.

    Parameters
    ----------
    network
        A `BrainTokenTransformer`.
    condition, clean, noise : tensors of shape (n, ...)
        Predictions of the brain encoder, embeddings of the images, and the noise that is added to the latter.
    schedule
        Says how noise grows and what the network predicts.
    timesteps : int64 tensor of shape (n,)
        Steps of the schedule.
    keep, keep_noised : tensors of shape (n,)
        1 where the condition, or the noised embedding, is seen, 0 where it is not.
    """
    noised, wanted = schedule.add_noise(upcast(clean), noise, timesteps)
    return functional.mse_loss(network(noised, timesteps, upcast(condition), keep, keep_noised), wanted)


def describe_network(config: Any) -> dict[str, int]:
    """Return the settings of the network by the names that `make_network` takes."""
    return {"depth": config.depth, "n_heads": config.heads, "head_width": config.head_width}


def make_network(shape: tuple[int, ...], **sizes: int) -> BrainTokenTransformer:
    """Return a fresh network for targets of a shape; one vector is a single token."""
    n_tokens, n_features = (1, *shape)[-2:]
    return BrainTokenTransformer(n_tokens, n_features, **sizes)


class JointPrior(Prior):
    """Samples by the network of a fitted brain encoder; see `JointPriorConfig`.

    Parameters
    ----------
    config
        The settings, a `JointPriorConfig`.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.context = config, NOTHING_LENT
        self.network: BrainTokenTransformer | None = None
        self.schedule = NoiseSchedule()
        self.sizes: dict[str, int] = {}
        self.space, self.shape = "", tuple[int, ...]()

    def bind(self, context: Context) -> None:
        """Take the fitted brain encoder, which holds the network, and where to compute."""
        self.context = context

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> JointPrior:
        """Copy the network from the brain encoder; nothing is learnt here.

        Parameters
        ----------
        predicted, images
            Not looked at.
        target
            Embeddings of training images, for their space.

        Raises
        ------
        ConfigError
            If the brain encoder has trained no prior, or in fewer steps than are to be sampled.
        DataError
            If it was trained on embeddings of another shape.
        """
        encoder = self.context.encoder
        view = None if encoder is None else encoder.generator_view
        term = None if view is None else view.prior
        if term is None:
            raise ConfigError(f"{self.config.untrained}.")
        if term.shape != target.vectors.shape[1:]:
            raise DataError(
                f"the brain encoder has trained a prior of embeddings of shape {term.shape}, but those "
                f"of {target.space!r} have {target.vectors.shape[1:]}; use the target of the training."
            )
        self.schedule, self.sizes = term.schedule, describe_network(term.config)
        self._check_steps()
        self.network = copy.deepcopy(term.network).requires_grad_(False).eval()
        self.space, self.shape = target.space, term.shape
        return self

    def _check_steps(self) -> None:
        if self.config.steps >= self.schedule.n_timesteps:
            raise ConfigError(
                f"prior.steps is {self.config.steps}, but the prior was trained on a schedule of "
                f"{self.schedule.n_timesteps} steps (encoder.objectives, diffusion_prior.timesteps); set fewer steps."
            )

    def describe(self) -> dict[str, Any]:
        """Return who trained the network, its number of weights, and its calls per sample."""
        network = self._require_network()
        weights = sum(p.numel() for p in network.parameters())
        return {"trained": "with the brain encoder", "n_weights": weights, "calls": self.config.steps - 1}

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return `n_draws` embeddings per row, draws of one row next to each other.

        Parameters
        ----------
        predicted
            In the space of the targets.
        n_draws
            Independent draws per row.
        seed
            Of the noise; the same seed gives the same samples.

        Raises
        ------
        DataError
            If the predictions are of another space or shape.
        """
        network = self._require_network()
        if predicted.space != self.space or predicted.vectors.shape[1:] != self.shape:
            raise DataError(
                f"the prior was trained in the space {self.space!r} with rows of shape {self.shape}, but got "
                f"{predicted.space!r} with {predicted.vectors.shape[1:]}."
            )
        device = choose_device(self.context.device, setting="retrieval.device")
        network.to(device)
        rows = np.repeat(np.arange(len(predicted)), n_draws)
        drawn = np.empty((len(rows), *self.shape), np.float32)
        n_rows = max(1, VALUES_AT_ONCE // max(1, int(np.prod(self.shape))))
        for start in range(0, len(rows), n_rows):
            part = slice(start, start + n_rows)
            generator = make_torch_generator(seed, "joint prior", start)
            condition = torch.from_numpy(np.array(predicted.vectors[rows[part]], np.float32)).to(device)
            noise = torch.randn(condition.shape, generator=generator).to(device)  # equal on a CPU and a GPU
            with torch.inference_mode():
                drawn[part] = draw_samples(
                    guide_network(network, condition, 1.0), noise, self.schedule, sampler="stochastic-ddim",
                    n_steps=self.config.steps, generator=generator,
                ).cpu().numpy()  # fmt: skip
        return Embeddings(drawn, predicted.ids[rows], predicted.space)

    def _require_network(self) -> BrainTokenTransformer:
        if self.network is None:
            raise DataError("the joint prior has no network yet; run train first.")
        return self.network

    def write(self, folder: Path) -> None:
        """Write the network as safetensors and its sizes as JSON."""
        network = self._require_network()
        write_tensors(folder / FILE, {k: v.cpu().contiguous() for k, v in network.state_dict().items()})
        about = {
            "kind": "joint_diffusion", "space": self.space, "shape": list(self.shape), "network": self.sizes,
            "schedule": asdict(self.schedule),
        }  # fmt: skip
        write_json(folder / "prior.json", about)

    def read(self, folder: Path) -> Self:
        """Take what `write` wrote and return the prior itself.

        Raises
        ------
        DataError
            If the weights are of another network.
        """
        about = read_json(folder / "prior.json")
        self.space, self.shape, self.sizes = about["space"], tuple(about["shape"]), about["network"]
        self.schedule = NoiseSchedule(**about["schedule"])
        self._check_steps()
        network = make_network(self.shape, **self.sizes)
        load_weights(network, load_tensors(folder / FILE, "torch"), what=str(folder / FILE))
        self.network = network.requires_grad_(False).eval()
        return self
