"""Train the embedded generator: pairs, autoencoder, latents, denoiser, one weights file.

Owns the order of the stages and what is random in them. Every stage resumes after a kill and ends in the same weights
as without it. The source is either the phantom, drawn anew, or a user's own images with their embeddings of any space.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import autocast, choose_device, seeded
from braindecode_vis.base.seeds import make_generator, make_torch_generator
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.generation.latent_diffusion_config import GeneratorTrainingConfig
from braindecode_vis.generation.latent_diffusion_networks import (
    DOWNSAMPLING,
    SCHEDULE,
    PerceptualLoss,
    blur,
    compute_autoencoder_loss,
    draw_reliability,
    scale_images,
)
from braindecode_vis.generation.priors.sampling import draw_times
from braindecode_vis.generation.priors.scales import PrincipalComponents, fit_components
from braindecode_vis.generation.training_pairs import (
    TrainingPairs,
    read_pairs,
    write_phantom_pairs,
    write_stimulus_pairs,
)
from braindecode_vis.generation.weights_file import (
    WeightsHeader,
    build_networks,
    encode_known_images,
    write_weights,
)
from braindecode_vis.training.optimisation import (
    MovingAverage,
    compute_warm_cosine,
    optimise,
    pack_optimiser,
    read_checkpoint,
    split_decayed,
    take,
    unpack_optimiser,
    write_checkpoint,
)

Progress = Callable[[str, int, int], None]

MOST_ROWS = 20_480  # rows that the principal components are computed from


@dataclass(frozen=True)
class PhantomSource:
    """Phantom images drawn on the fly, embedded by an image encoder that needs no fitting."""

    image_encoder: Any


@dataclass(frozen=True)
class StimulusSource:
    """A user's own training images and one embedding for each."""

    stimuli: StimulusSet
    embeddings: Embeddings


def train_generator(
    config: GeneratorTrainingConfig,
    source: PhantomSource | StimulusSource,
    out: Path,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Path:
    """Train a latent diffusion generator and return its weights file, for ``generator.weights``.

    Parameters
    ----------
    config
        Sizes and optimisation.
    source
        Where images and embeddings come from. Give training images only.
    out
        Folder of the run: ``pairs/``, checkpoints, ``log.jsonl``, ``training.json`` and
        ``latent_diffusion.safetensors``. A run that was killed goes on in the same folder.
    seed
        Root seed of everything random.
    progress
        Called with the stage, the steps done and the steps wanted.

    Raises
    ------
    DataError
        If the folder holds a run with other settings.

    Examples
    --------
    The packaged weights::

        from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
        train_generator(GeneratorTrainingConfig(), PhantomSource(EfficientNetConfig().build()), out, seed=2026)
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = None if progress is None else (lambda done, wanted: progress("pairs", done, wanted))
    if isinstance(source, PhantomSource):
        write_phantom_pairs(
            out / "pairs", source.image_encoder, n_images=config.n_images, seed=seed, size=config.image_size,
            progress=report,
        )  # fmt: skip
    else:
        write_stimulus_pairs(
            out / "pairs", source.stimuli, source.embeddings, size=config.image_size, progress=report
        )
    pairs = read_pairs(out / "pairs")
    if len(pairs) < 2:
        raise DataError(f"a generator cannot be trained on {len(pairs)} image(s); give at least 2.")
    components = fit_components(pairs.vectors, config.n_components, most_rows=MOST_ROWS)
    about = {
        "source": pairs.source, "n_images": len(pairs), "seed": seed, "config": config.hashed_fields(),
    }  # fmt: skip
    header = WeightsHeader(
        space=pairs.space,
        n_features=pairs.vectors.shape[1],
        image_size=config.image_size,
        autoencoder={"n_latent_channels": config.n_latent_channels, "width": config.autoencoder_width},
        denoiser={
            "n_components": len(components.std), "width": config.denoiser_width,
            "condition_width": config.condition_width, "fine_width": config.fine_width,
            "n_blocks": config.n_blocks, "n_fine_blocks": config.n_fine_blocks,
        },
        training=about,
    )  # fmt: skip
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    training = GeneratorTraining(config, header, pairs, components, out, seed, progress)
    autoencoder = training.train_autoencoder()
    denoiser = training.train_denoiser(training.encode_images(autoencoder))
    path = out / "latent_diffusion.safetensors"
    known = encode_known_images(components, pairs.vectors)
    write_weights(path, header, {"autoencoder": autoencoder, "denoiser": denoiser}, components, known)
    return path


@dataclass(frozen=True)
class GeneratorTraining:
    """The two trainings of one run, which share settings, images and folder; see `train_generator`."""

    config: GeneratorTrainingConfig
    header: WeightsHeader
    pairs: TrainingPairs
    components: PrincipalComponents
    out: Path
    seed: int
    progress: Progress | None

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return choose_device(self.config.device, setting="generator.device")

    def train_autoencoder(self) -> Any:
        """Return the trained autoencoder, on its device."""
        from braindecode_vis.embeddings.efficientnet import find_packaged_weights, load_network

        config, device = self.config, self.device
        autoencoder = self._initialise(0).to(device, memory_format=torch.channels_last)
        perceptual = PerceptualLoss(load_network(find_packaged_weights())).to(device)
        side = config.image_size // DOWNSAMPLING
        n_images = min(config.autoencoder_images, len(self.pairs))

        def compute_loss(network: Any, step: int) -> torch.Tensor:
            rows = self._draw_rows("autoencoder", step, config.autoencoder_batch, n_images)
            images = scale_images(torch.from_numpy(self.pairs.images[rows]).to(device))
            generator = make_torch_generator(self.seed, "autoencoder_noise", step)
            shape = (len(rows), config.n_latent_channels, side, side)
            noise = torch.randn(shape, generator=generator).to(device)
            images = images.contiguous(memory_format=torch.channels_last)  # the layout of the weights
            return compute_autoencoder_loss(
                network, perceptual, images, config.latent_noise * noise,
                perceptual_weight=config.perceptual_weight, perceptual_share=config.perceptual_share,
            )  # fmt: skip

        steps, lr = config.autoencoder_steps, config.autoencoder_lr
        return self._optimise(autoencoder, compute_loss, "autoencoder", steps, lr, n_images)

    def encode_images(self, autoencoder: Any) -> np.ndarray:
        """Return the latents of all images, float16 of shape (n_images, n_latent_channels, side, side)."""
        latents = []
        with torch.inference_mode():
            for start in range(0, len(self.pairs), 256):
                images = torch.from_numpy(self.pairs.images[start : start + 256]).to(self.device)
                latents.append(autoencoder.encode(scale_images(images)).half().cpu().numpy())
        return np.concatenate(latents)

    def train_denoiser(self, latents: np.ndarray) -> Any:
        """Return the trained denoiser, on its device.

        Parameters
        ----------
        latents : float16 array of shape (n_images, n_latent_channels, side, side)
            As `encode_images` returns them.
        """
        config, device = self.config, self.device
        denoiser = self._initialise(1).to(device)
        shares = torch.from_numpy(self.components.shares)
        # Once and not in every step: NumPy's threads, waiting for more, hold up those of torch.
        vectors, n = self.pairs.vectors, 4096
        parts = [
            self.components.apply(vectors[start : start + n].astype(np.float32))
            for start in range(0, len(vectors), n)
        ]
        components = np.concatenate(parts)  # (n_images, n_components)

        def compute_loss(network: Any, step: int) -> torch.Tensor:
            rows = self._draw_rows("denoiser", step, config.denoiser_batch, len(self.pairs))
            generator = make_torch_generator(self.seed, "denoiser_noise", step)
            clean = torch.from_numpy(latents[rows].astype(np.float32)).to(device)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            times = draw_times(len(rows), generator, bias=config.time_bias).to(device)
            known = torch.from_numpy(components[rows])
            reliability = draw_reliability(
                shares,
                len(rows),
                generator,
                certain=config.certain_conditions,
                hidden=config.condition_dropout,
            )
            estimate = blur(known, reliability, torch.randn(known.shape, generator=generator))
            noisy, velocity = SCHEDULE.add_noise(clean, noise, times)
            with autocast(device, getattr(torch, config.denoiser_precision)):
                predicted = network(noisy, times, estimate.to(device), reliability.to(device))
            return torch.nn.functional.mse_loss(predicted.float(), velocity)

        steps, lr = config.denoiser_steps, config.denoiser_lr
        return self._optimise(denoiser, compute_loss, "denoiser", steps, lr, len(self.pairs))

    def _initialise(self, which: int) -> Any:
        """Return the autoencoder (0) or the denoiser (1) with first weights from the seed."""
        with seeded(int(make_generator(self.seed, "weights", which).integers(2**31))):
            return build_networks(self.header)[which]

    def _draw_rows(self, stage: str, step: int, batch_size: int, n: int) -> np.ndarray:
        """Return the rows of a step: every pass over the first `n` images has an order of its own."""
        # From the number of the step alone: a training that goes on sees what it would have seen.
        first = step * batch_size
        turns, places = np.divmod(np.arange(first, first + batch_size), n)
        orders = {turn: _order_pass(self.seed, stage, turn, n) for turn in np.unique(turns).tolist()}
        return np.array(
            [orders[turn][place] for turn, place in zip(turns.tolist(), places.tolist(), strict=True)]
        )

    def _optimise(
        self, network: Any, compute_loss: Any, name: str, n_steps: int, lr: float, n_images: int
    ) -> Any:
        """Minimise the loss of a stage, from its checkpoint if there is one, and return the averaged network."""
        config = self.config
        fields = config.hashed_fields()
        if name == "autoencoder":  # it does not depend on what follows
            shared = (
                "image_size", "n_latent_channels", "perceptual_", "latent_noise", "ema_", "weight_", "warmup",
            )  # fmt: skip
            fields = {k: v for k, v in fields.items() if k.startswith(("autoencoder_", *shared))}
        identity = {
            "config": fields, "target": self.header.space, "data": [self.pairs.source, n_images], "seed": self.seed,
        }  # fmt: skip
        return train_network(
            network, compute_loss, config, name=name, n_steps=n_steps, lr=lr, identity=identity, out=self.out,
            report=self.progress,
        )  # fmt: skip


def train_network(
    network: Any,
    compute_loss: Callable[[Any, int], Any],
    config: GeneratorTrainingConfig,
    *,
    name: str,
    n_steps: int,
    lr: float,
    identity: dict[str, Any],
    out: Path,
    report: Progress | None = None,
) -> Any:
    """Minimise a loss by AdamW and return the network with averaged weights.

    Parameters
    ----------
    network
        Changed in place.
    compute_loss
        Gives the loss of the network at a step; what is random in it must follow from the number of the step.
    config
        Weight decay, warm-up, decay of the average and steps between checkpoints are looked at.
    name
        Of the stage: in the log, in messages, and of its checkpoint.
    n_steps, lr
        Steps, and the peak of the learning rate.
    identity
        What a checkpoint must agree with to be taken up again.
    out
        Folder of the checkpoint, which is replaced now and then and taken up if it is there, and of ``log.jsonl``,
        which receives a line each time.
    report
        Called with the stage, the steps done and the steps wanted.

    Raises
    ------
    DataError
        If the checkpoint belongs to another training, or if the loss is not finite.
    """
    path = out / f"{name}.safetensors"
    optimiser = torch.optim.AdamW(
        split_decayed(network.parameters(), config.weight_decay), lr=lr, betas=(0.9, 0.99)
    )
    average = MovingAverage(network, config.ema_decay)
    start, found = 0, read_checkpoint(path, identity)
    if found is not None:
        tensors, state = found
        network.load_state_dict(take(tensors, "network"))
        average.model.load_state_dict(take(tensors, "averaged"))
        unpack_optimiser(optimiser, take(tensors, "optimiser"))
        start = state["step"]
    recent: list[float] = []
    begun = time.perf_counter()

    def after(step: int, losses: list[Any]) -> None:
        nonlocal begun
        average.follow(network, step)
        recent.append(float(losses[0]))
        done = step + 1
        if done % config.checkpoint_every and done != n_steps:
            return
        groups = {
            "network": network.state_dict(), "averaged": average.model.state_dict(),
            "optimiser": pack_optimiser(optimiser),
        }  # fmt: skip
        write_checkpoint(path, groups, {"identity": identity, "step": done})
        line = {
            "stage": name, "step": done, "loss": round(sum(recent) / len(recent), 5),
            "lr": optimiser.param_groups[0]["lr"], "seconds": round(time.perf_counter() - begun, 1),
        }  # fmt: skip
        with (out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        recent.clear()
        begun = time.perf_counter()
        if report is not None:
            report(name, done, n_steps)

    network.train()
    optimise(
        optimiser, network.parameters(), range(start, n_steps), lambda step: [compute_loss(network, step)],
        after=after, rate=lambda step: compute_warm_cosine(step, n_steps, config.warmup), clip_norm=1.0,
        describe_failure=lambda step, loss: (
            f"the loss of the {name} is {loss} at step {step + 1}; lower its learning rate."
        ),
    )  # fmt: skip
    return average.model


@lru_cache(maxsize=2)  # a batch may span two passes
def _order_pass(seed: int, stage: str, turn: int, n: int) -> np.ndarray:
    """Return the order of one pass over `n` images."""
    return make_generator(seed, "generator_order", stage, turn).permutation(n)
