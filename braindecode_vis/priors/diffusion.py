"""A diffusion prior: draws embeddings of images that fit a predicted embedding.

Owns what is learnt from training data (scales, the network, how samples are brought back to the training images' mean
and spread) and how draws are chosen. Settings, networks, training loop, samplers and conditions live in the files
beside this one; torch is imported only when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings, check_same_space
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import choose_device, seeded
from braindecode_vis.priors.diffusion_config import DiffusionPriorConfig
from braindecode_vis.priors.image_source import keep_distinct
from braindecode_vis.priors.sampling import bound_signal, draw_samples, guide_network
from braindecode_vis.priors.scales import (
    PrincipalComponents,
    RowScale,
    find_bounds,
    fit_components,
    fit_scale,
    turn_rows,
)
from braindecode_vis.priors.simulated_predictions import Direction, DirectionSource, fit_prediction_error
from braindecode_vis.roles import Context
from braindecode_vis.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.store import read_json, write_json

VALUES_AT_ONCE = 1 << 22  # of one sampling batch; fixed, since the noise depends on how rows are batched
CALIBRATION_ROWS = 1024


@dataclass(frozen=True)
class DiffusionFit:
    """What sampling needs; all of it learnt from training trials and training images.

    `condition` and `target` standardise rows, whose own shape is `shape`: a `RowScale` each, or a `Direction` and
    `PrincipalComponents` where conditions are simulated.

    `bounds`, of shape (2, ...), are the least and greatest standardised value of the training images, widened by a
    tenth of the range on either side.
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
class _Lesson:
    """What a network is trained on, and the conditions whose samples are measured afterwards."""

    source: Any
    held_out: Any
    condition: Any
    target: Any
    bounds: np.ndarray
    conditions: np.ndarray


class DiffusionPrior:
    """The learned prior; see the module.

    Attributes
    ----------
    workspace
        Folder for checkpoints of the training; None, as it is at first, writes none. A training that was stopped goes
        on from there and ends as it would have.
    advance
        Called with 1 after every epoch of the training.
    """

    def __init__(
        self, config: DiffusionPriorConfig, *, seed: int = 0, fitted: DiffusionFit | None = None
    ) -> None:
        self.config = config
        self.seed = seed
        self.fitted = fitted
        self.workspace: Path | None = None
        self.advance: Callable[[int], None] = lambda n: None

    def bind(self, context: Context) -> None:
        """Take the folder of checkpoints from what the pipeline lends."""
        self.workspace = context.checkpoints

    @property
    def protocol(self) -> str:
        """Words for the table: one draw, or the best of several by similarity to the prediction."""
        pull, n = self.config.pull, self.config.candidates
        part = "" if pull == 1 else f", {100 * pull:g} % of the way from the prediction"
        if self.config.select == "none":
            return f"one draw of the diffusion prior{part}"
        if self.config.select == "mean":
            return f"mean of {n} draws of the diffusion prior{part}"
        return f"best of {n} draws of the diffusion prior by cosine to the prediction{part}"

    def describe(self) -> dict[str, Any]:
        """Return the length of the training, the epoch that was taken and the protocol."""
        return {**self._require_fit().chosen, "protocol": self.protocol}

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
        from braindecode_vis.priors.fitting import fit_network

        config = self.config
        if images is not None:
            check_same_space(target, images)
        whole = keep_distinct(target if images is None else images)
        if config.condition == "simulated":
            lesson = self._prepare_directions(target, whole)
        else:
            lesson = self._prepare_pairs(predicted, target, whole)
        network = self._make_network(lesson.bounds.shape[1:])
        state = fit_network(
            network, lesson.source, lesson.held_out, self._make_recipe(),
            workspace=self.workspace, checkpoint_every=config.checkpoint_every,
            bfloat16=config.precision == "bfloat16", advance=self.advance,
        )  # fmt: skip
        chosen = {
            "n_rows": len(lesson.source), "epochs": state.epoch, "steps": state.step,
            "taken_epoch": state.best_epoch, "held_out_loss": state.best_loss, "loss": state.history[-1]["loss"],
        }  # fmt: skip
        self.fitted = DiffusionFit(
            network, lesson.condition, lesson.target, lesson.bounds, None, whole.space,
            whole.vectors.shape[1:], chosen,
        )  # fmt: skip
        if config.restandardise:
            self.fitted = replace(self.fitted, samples=self._measure_samples(lesson.conditions))
        return self

    def _prepare_pairs(self, predicted: Embeddings | None, target: Embeddings, whole: Embeddings) -> _Lesson:
        from braindecode_vis.priors.fitting import NoisedSource, PairSource

        if predicted is None:
            raise DataError(
                f"the diffusion prior with prior.condition {self.config.condition} learns from predictions, and there "
                "are none; set prior.condition to simulated."
            )
        check_same_space(predicted, target)
        if len(predicted) != len(target) or (predicted.ids != target.ids).any():
            raise DataError("the diffusion prior needs one target per prediction, in the same order.")
        if len(predicted) < 4:
            raise DataError(f"the diffusion prior cannot learn from {len(predicted)} prediction(s).")
        condition, scale = fit_scale(np.asarray(predicted.vectors)), fit_scale(np.asarray(whole.vectors))
        pairs = PairSource(condition.apply(predicted.vectors), scale.apply(target.vectors))
        aside = self._choose_held_out(target.ids)
        is_held = np.isin(target.ids.astype(str), aside)
        held_out = PairSource(pairs.conditions[is_held], pairs.targets[is_held]) if is_held.any() else None
        if self.config.condition == "predicted":
            source: Any = PairSource(pairs.conditions[~is_held], pairs.targets[~is_held])
        else:
            error = fit_prediction_error(pairs.conditions, pairs.targets)
            learnt = ~np.isin(whole.ids.astype(str), aside)
            source = NoisedSource(scale.apply(whole.vectors[learnt]), error)
        return _Lesson(
            source, held_out, condition, scale, find_bounds(scale.apply(whole.vectors)), pairs.conditions
        )

    def _prepare_directions(self, target: Embeddings, whole: Embeddings) -> _Lesson:
        from braindecode_vis.priors.fitting import PairSource

        if whole.vectors.ndim != 2:
            raise ConfigError(
                f"prior.condition is simulated, which is for one vector per image, but each embedding is "
                f"{whole.vectors.shape[1]} tokens; set prior.condition to noised_targets."
            )
        if len(whole) < 4:
            raise DataError(f"the diffusion prior cannot learn from {len(whole)} image(s).")
        is_held = np.isin(whole.ids.astype(str), self._choose_held_out(whole.ids))
        scale = fit_components(whole.flat()[~is_held], self.config.n_components)
        # Short predictions point from the mean of the run's own images, wherever the mean of the others may be.
        origin = keep_distinct(target).flat().mean(axis=0, dtype=np.float64).astype(np.float32)
        targets, direction = scale.apply(whole.flat()), Direction(origin, scale.basis, scale.std)
        source, held = (DirectionSource(targets[rows], direction) for rows in (~is_held, is_held))
        rng = make_generator(self.seed, "prior", "simulated conditions")
        held_out = PairSource(*held.draw(np.arange(len(held)), rng)) if len(held) else None
        rows = np.sort(rng.choice(len(source), min(CALIBRATION_ROWS, len(source)), replace=False))
        conditions, _ = source.draw(rows, rng)
        return _Lesson(source, held_out, direction, scale, find_bounds(targets), conditions)

    def _choose_held_out(self, ids: np.ndarray) -> np.ndarray:
        names = np.unique(ids.astype(str))
        n = round(self.config.held_out * len(names))
        if self.config.held_out and not 0 < n < len(names) - 1:
            raise ConfigError(
                f"prior.held_out is {self.config.held_out}, which of {len(names)} training images leaves none on one "
                "side; set it to 0 or to more."
            )
        return make_generator(self.seed, "prior", "held out").permutation(names)[:n]

    def _make_recipe(self) -> Any:
        from braindecode_vis.priors.fitting import Recipe

        c = self.config
        return Recipe(
            c.schedule, c.batch_size, c.epochs, c.min_steps, c.learning_rate, c.warmup_steps, c.weight_decay,
            c.gradient_clip, c.condition_dropout, c.ema_decay, derive_seed(self.seed, "prior", "training"),
        )  # fmt: skip

    def _make_network(self, shape: tuple[int, ...]) -> Any:
        from braindecode_vis.priors.diffusion_networks import MlpUnet, TokenTransformer

        c, kind = self.config, self.config.network
        if kind == "auto":
            kind = "mlp" if len(shape) == 1 else "transformer"
        if kind == "mlp" and len(shape) != 1:
            raise ConfigError(
                f"prior.network is mlp, but each embedding is {shape[0]} tokens; use transformer or auto."
            )
        with seeded(derive_seed(self.seed, "prior", "weights")):
            if kind == "mlp":
                n = shape[0]
                network: Any = MlpUnet(
                    n, n, widths=c.widths, time_features=c.time_features, dropout=c.dropout
                )
            else:
                tokens, n = (1, shape[0]) if len(shape) == 1 else shape
                width = c.token_width or n
                if width % c.heads:
                    raise ConfigError(
                        f"a transformer of width {width} cannot have {c.heads} heads; set prior.token_width or "
                        "prior.heads so that one divides the other."
                    )
                network = TokenTransformer(
                    tokens, n, tokens, n, width=width, depth=c.depth, n_heads=c.heads,
                    time_features=c.time_features, dropout=c.dropout,
                )  # fmt: skip
        return network.to(choose_device(c.device, setting="prior.device"))

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
        if self.config.pull < 1:
            vectors = self._pull(np.repeat(predicted.vectors, n_draws, axis=0), vectors)
        return Embeddings(vectors, np.repeat(predicted.ids, n_draws), fit.space)

    def _pull(self, predicted: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Return rows between the directions of predictions and of what was drawn for them, as long as images are."""
        fit, n = self._require_fit(), len(drawn)
        # Simulated predictions share the images' origin; real ones may lie elsewhere, so that each has its own mean.
        origin = (fit.condition if self.config.condition == "simulated" else fit.target).mean
        own, goals = (predicted - fit.condition.mean).reshape(n, -1), (drawn - origin).reshape(n, -1)
        turned = turn_rows(own, goals, self.config.pull) * np.linalg.norm(fit.target.std)
        return (origin + turned.reshape(drawn.shape)).astype(np.float32)

    def _draw(self, conditions: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
        """Return standardised samples of shape (n_rows * n_draws, ...), selected if that was asked for."""
        fit, each = self._require_fit(), 1 if self.config.select == "none" else self.config.candidates
        rows = np.repeat(conditions, n_draws * each, axis=0)
        step = max(1, VALUES_AT_ONCE // max(1, rows[:1].size))
        parts = [self._draw_batch(rows[i : i + step], seed, i) for i in range(0, len(rows), step)]
        drawn = np.concatenate(parts) if parts else rows
        if self.config.select == "none":
            return drawn
        candidates = drawn.reshape(-1, each, *drawn.shape[1:])
        if self.config.select == "mean":
            return candidates.mean(axis=1)
        # Directions are compared from the mean of the training rows on both sides.
        left = drawn.reshape(len(drawn), -1) * fit.target.std.ravel()
        right = rows.reshape(len(rows), -1) * fit.condition.std.ravel()
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = np.einsum("ij,ij->i", left, right) / np.maximum(norms, 1e-12)
        best = cosine.reshape(-1, each).argmax(axis=1)
        return candidates[np.arange(len(best)), best]

    def _draw_batch(self, conditions: np.ndarray, seed: int, start: int) -> np.ndarray:
        import torch

        config, network = self.config, self._require_fit().network
        device = next(network.parameters()).device
        generator = make_torch_generator(seed, "batch", start)
        condition = torch.from_numpy(np.ascontiguousarray(conditions)).to(device)
        noise = torch.randn(condition.shape, generator=generator).to(device)
        with torch.inference_mode():
            predict = guide_network(network, condition, config.guidance)
            low, high = torch.from_numpy(self._require_fit().bounds).to(device)
            predict = bound_signal(predict, config.schedule, low, high)
            drawn = draw_samples(
                predict,
                noise,
                config.schedule,
                sampler=config.sampler,
                n_steps=config.steps,
                generator=generator,
            )
        return drawn.float().cpu().numpy()

    def _measure_samples(self, conditions: np.ndarray) -> RowScale:
        """Return mean and spread of the samples that training predictions lead to."""
        rng = make_generator(self.seed, "prior", "calibration rows")
        n = min(CALIBRATION_ROWS, len(conditions))
        rows = np.sort(rng.choice(len(conditions), size=n, replace=False))
        n_draws = max(1, CALIBRATION_ROWS // (4 * n))  # few rows are drawn from several times
        return fit_scale(
            self._draw(conditions[rows], n_draws, derive_seed(self.seed, "prior", "calibration"))
        )

    def _require_fit(self) -> DiffusionFit:
        if self.fitted is None:
            raise DataError("the diffusion prior has not been fitted; run train first.")
        return self.fitted

    def write(self, folder: Path) -> None:
        """Write the fitted state as safetensors and JSON."""
        import torch
        from safetensors.torch import save_file

        fit = self._require_fit()
        tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in fit.network.state_dict().items()}
        tensors["bounds"] = torch.from_numpy(fit.bounds.copy())
        for name in ("condition", "target", "samples"):
            for key, values in vars(getattr(fit, name) or {}).items():
                tensors[f"{name}.{key}"] = torch.from_numpy(values.copy())
        save_file(tensors, folder / "prior.safetensors")
        meta = {
            "kind": "diffusion", "space": fit.space, "shape": list(fit.shape), "seed": self.seed,
            "chosen": fit.chosen,
        }  # fmt: skip
        write_json(folder / "prior.json", meta)

    @classmethod
    def read(cls, config: DiffusionPriorConfig, folder: Path) -> DiffusionPrior:
        """Read what `write` wrote."""
        from safetensors.torch import load_file

        tensors, meta = load_file(folder / "prior.safetensors"), read_json(folder / "prior.json")
        prior = cls(config, seed=int(meta["seed"]))
        parts: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            parts.setdefault(part, {})[key] = value
        bounds = tensors["bounds"].numpy()
        network = prior._make_network(bounds.shape[1:])
        network.load_state_dict(parts["network"])
        network.eval()
        simulated = config.condition == "simulated"
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
        prior.fitted = DiffusionFit(
            network, scales["condition"], scales["target"], bounds, scales.get("samples"), meta["space"],
            tuple(meta["shape"]), meta["chosen"],
        )  # fmt: skip
        return prior
