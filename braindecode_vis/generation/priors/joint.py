"""The prior of MindEye2: a network that the brain encoder trains beside its own weights, and its samples.

Owns the loss, where the trained network goes, and its files. The network, noise schedule and sampler stand in the files
beside this one; settings, and what joint training means for a result, in `joint_config`.

Beside the public code of Scotti et al. (2024), arXiv:2403.11207, with copied weights: see the test of this module.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import NOTHING_LENT, Context, Prior
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.seeds import make_torch_generator
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.generation.priors.diffusion import VALUES_AT_ONCE
from braindecode_vis.generation.priors.diffusion_networks import BrainTokenTransformer
from braindecode_vis.generation.priors.sampling import NoiseSchedule, draw_samples, guide_network
from braindecode_vis.training.objectives.objective import upcast
from braindecode_vis.training.optimisation import load_weights

if TYPE_CHECKING:
    from braindecode_vis.training.objectives.objective import Outputs, StepSizes

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
