"""A diffusion prior: draws embeddings of images that fit a predicted embedding.

Owns what is learnt from training data (scales, the network, how samples are brought back to the training images' mean
and spread) and how draws are chosen. Settings, networks, training loop, samplers and simulated predictions live in the
files beside this one; torch is imported only when it is needed.

A prediction that minimises a squared error is a conditional mean, shorter and smoother than any image's embedding; the
prior turns it into a draw from the images that it may stand for (Ramesh et al. 2022, DALL-E 2, arXiv:2204.06125; Li et
al. 2024, ATM, arXiv:2403.07721).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Context, Prior
from braindecode_vis.base.devices import choose_device, seeded
from braindecode_vis.base.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.priors.image_source import keep_distinct
from braindecode_vis.generation.priors.prior_training import PriorRecipe, fit_network
from braindecode_vis.generation.priors.sampling import bound_signal, draw_samples, guide_network
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

if TYPE_CHECKING:
    from torch import nn

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
    make_network
        Returns a fresh network for targets of a shape, (n_features,) or (n_tokens, n_features).
    recipe
        How the network is trained, and the noise schedule.
    drawing
        How samples are drawn.
    condition, n_components, held_out, restandardise
        What it learns from; see `DiffusionPriorConfig`.
    checkpoint_every, bfloat16, device
        How the training runs.
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
        make_network: Callable[[tuple[int, ...]], nn.Module],
        recipe: PriorRecipe,
        drawing: Drawing,
        *,
        condition: Literal["predicted", "noised_targets", "simulated"] = "predicted",
        n_components: int = 64,
        held_out: float = 0.1,
        restandardise: bool = True,
        checkpoint_every: int = 10,
        bfloat16: bool = False,
        device: str = "auto",
        seed: int = 0,
        clip: Literal["images", "unit"] = "images",
        fitted: DiffusionFit | None = None,
    ) -> None:
        self.make_network, self.recipe, self.drawing = make_network, recipe, drawing
        self.condition, self.n_components, self.held_out = condition, n_components, held_out
        self.restandardise, self.checkpoint_every, self.bfloat16 = restandardise, checkpoint_every, bfloat16
        self.device, self.seed, self.clip, self.fitted = device, seed, clip, fitted
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
