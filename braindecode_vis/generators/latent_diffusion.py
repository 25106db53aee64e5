"""Turn embeddings into 64-pixel images with a small latent diffusion model that the package brings.

Owns the configuration, the weights file and the generator: reduce an embedding to components, sample latents that suit
it, decode them, keep the best of some candidates. Like any second stage it has been trained on images alone and never
sees a brain; what a brain encoder's predictions are worth is learnt from training trials when the generator is built.
``weights/latent_diffusion.json`` has the command, the seed and the scores of the packaged weights, which paint nothing
but what the phantom shows. Train on other stimuli with ``braindecode-vis train-generator``.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError
from braindecode_vis.devices import choose_device
from braindecode_vis.embeddings.weights import check_intact
from braindecode_vis.generators.conditioning import Uncertainty, fit_uncertainty
from braindecode_vis.generators.generator_data import GeneratorData
from braindecode_vis.generators.weights_file import (
    Model,
    hash_weights,
    load_model,
    read_header,
    read_known_components,
)
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    import torch

PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "latent_diffusion.safetensors"
PACKAGED_TARGET = "efficientnet-lite0"


class LatentDiffusionConfig(Settings):
    """Sample images from the embedded latent diffusion model.

    Parameters
    ----------
    weights
        A file that `train_generator` made; None takes the packaged one, for the target efficientnet-lite0. The file's
        hash enters the fingerprint.
    sampler, steps
        ``ddim`` or ``dpm-solver++``, and how many steps; 10 to 25 are enough for a second-order solver
        (arXiv:2211.01095).
    guidance
        Strength of classifier-free guidance; 1 is none.
    candidates
        Images sampled per embedding. The one whose own embedding is most like the one that was asked for is kept, so
        that scores in the target's space are better than those in others; 1 keeps the only one.
    batch_size, device
        How it runs, not what it computes.
    """

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    weights: Path | None = None
    sampler: Literal["ddim", "dpm-solver++"] = "dpm-solver++"
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0)
    candidates: int = Field(default=8, ge=1, le=256)
    batch_size: int = Field(default=64, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "batch_size", "device"})
    #: Asks the pipeline for the noise of single repetitions.
    weighs_predictions: ClassVar[bool] = True
    #: A prior may ask for images with ``prior.images: generator``.
    knows_images: ClassVar[bool] = True

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_sha256": hash_weights(self.find_weights())}

    def find_weights(self) -> Path:
        """Return the path of the weights in use."""
        return PACKAGED_WEIGHTS if self.weights is None else self.weights.expanduser()

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the weights are there and whole."""
        read_header(self.find_weights())
        check_intact(self.find_weights())

    def accepts(self, target_kind: str) -> bool:
        """Say whether embeddings of this kind of target can be turned into images.

        Weights of the user's own may belong to any target; `build` compares the spaces themselves.
        """
        return self.weights is not None or target_kind == PACKAGED_TARGET

    def build(self, data: GeneratorData) -> LatentDiffusionGenerator:
        """Return the generator.

        Raises
        ------
        ConfigError
            If the weights were trained on another space than the target's.
        """
        generator = LatentDiffusionGenerator(self, data=data)
        generator.check_space(data.image_encoder.space)
        return generator


class LatentDiffusionGenerator:
    """A trained autoencoder and denoiser; images are reproducible from the seed, row by row.

    The networks are read when the first image is asked for.

    Parameters
    ----------
    config
        Weights and sampling.
    data
        Its image encoder compares candidates; its predictions say how far a brain encoder can be trusted.
    uncertainty
        Of the embeddings that are given; None takes them to be embeddings of images.
    """

    def __init__(
        self,
        config: LatentDiffusionConfig,
        *,
        data: GeneratorData | None = None,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        if config.candidates > 1 and data is None:
            raise ConfigError(
                "generator.candidates above 1 needs an image encoder to compare them; give the training data."
            )
        self.config = config
        self.data = data
        self.uncertainty = uncertainty
        self.path = config.find_weights()
        self.header = read_header(self.path)

    def accepts(self, space: str) -> bool:
        """Say whether `space` is the one that the weights were trained on."""
        return space == self.header.space

    def check_space(self, space: str) -> None:
        """Raise `ConfigError` that names both spaces unless `space` is that of the weights."""
        if not self.accepts(space):
            raise ConfigError(
                f"the generator 'latent_diffusion' has weights for the space {self.header.space!r}, not for "
                f"{space!r}; choose that target, or train weights on this space and name them in generator.weights."
            )

    def read_known_images(self) -> Embeddings:
        """Return embeddings of a sample of the images that the weights were trained on, to
        `weights_file.N_KNOWN_COMPONENTS`.

        Raises
        ------
        ConfigError
            If the weights were made before they brought any.
        """
        model = load_model(self.path, choose_device(self.config.device, setting="generator.device"))
        vectors = model.components.undo(read_known_components(self.path))
        names = [f"{self.header.training['source']} {row}" for row in range(len(vectors))]
        return Embeddings(vectors.astype(np.float32), names, self.header.space)

    def describe(self) -> dict[str, Any]:
        """Return which weights are in use, and how reliable the predictions are taken to be."""
        about = {"weights_sha256": hash_weights(self.path), "weights_space": self.header.space}
        if self._of_predictions is None:
            return about
        shares = load_model(
            self.path, choose_device(self.config.device, setting="generator.device")
        ).components.shares
        return {
            **about,
            "explained_variance": float(np.average(self._of_predictions.reliability, weights=shares)),
        }

    def for_predictions(self) -> LatentDiffusionGenerator:
        """Return the generator of what a brain encoder predicts: it trusts each component as far as it is reliable.

        Without out-of-fold predictions in the space of the weights nothing is known of that, and predictions are
        taken as embeddings of images are.
        """
        if self._of_predictions is None:
            return self
        return LatentDiffusionGenerator(self.config, data=self.data, uncertainty=self._of_predictions)

    @cached_property
    def _of_predictions(self) -> Uncertainty | None:
        data = self.data
        if data is None or data.predicted is None or not len(data.predicted):
            return None
        if not self.accepts(data.predicted.space):
            return None
        components = load_model(
            self.path, choose_device(self.config.device, setting="generator.device")
        ).components
        true = data.embeddings.select(list(data.predicted.ids))
        return fit_uncertainty(
            components.apply(data.predicted.flat()),
            components.apply(true.flat()),
            data.noise,
            components,
        )

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, image_size, image_size, 3).

        A row's noise depends on the seed and its position alone, so equal embeddings in different rows give different
        draws, and the batch size changes nothing beyond rounding.

        Raises
        ------
        ConfigError
            If the embeddings are of another space than the weights.
        """
        self.check_space(embeddings.space)
        side = self.header.image_size
        images = np.empty((len(embeddings), side, side, 3), np.uint8)
        if len(embeddings) == 0:
            return images
        model = load_model(self.path, choose_device(self.config.device, setting="generator.device"))
        estimate = model.components.apply(embeddings.flat())
        reliability = np.ones_like(estimate)
        if self.uncertainty is not None:
            estimate = self.uncertainty.estimate(estimate)
            reliability[:] = self.uncertainty.reliability
        n_rows = max(1, self.config.batch_size // self.config.candidates)
        for start in range(0, len(images), n_rows):
            rows = np.arange(start, min(start + n_rows, len(images)))
            made = self._sample(model, estimate[rows], reliability[rows], rows, seed)
            best = self._find_best(model, made, estimate[rows])
            images[rows] = made[np.arange(len(rows)), best]
        return images

    def _find_best(self, model: Model, made: np.ndarray, estimate: np.ndarray) -> np.ndarray:
        """Return, for each row, which candidate's embedding has the largest cosine with the estimate about the mean."""
        n_rows, n_candidates = made.shape[:2]
        if n_candidates == 1:
            return np.zeros(n_rows, int)
        encoder = self.data.image_encoder  # type: ignore[union-attr]
        vectors = np.asarray(encoder.encode(made.reshape(-1, *made.shape[2:])), np.float32)
        found = model.components.apply(vectors.reshape(len(vectors), -1)).reshape(n_rows, n_candidates, -1)
        found *= model.components.std
        wanted = estimate * model.components.std
        lengths = np.linalg.norm(found, axis=2) + 1e-12
        return np.argmax(np.einsum("nck,nk->nc", found, wanted) / lengths, axis=1)

    def _sample(
        self, model: Model, estimate: np.ndarray, reliability: np.ndarray, rows: np.ndarray, seed: int
    ) -> np.ndarray:
        """Return the candidates of some rows, uint8 of shape (n_rows, candidates, side, side, 3)."""
        import torch

        from braindecode_vis.generators.autoencoder import unscale_images
        from braindecode_vis.generators.denoiser import SCHEDULE
        from braindecode_vis.priors.sampling import draw_samples, guide
        from braindecode_vis.seeds import make_torch_generator

        n_candidates, guidance, device = self.config.candidates, self.config.guidance, model.device
        noises = []
        for row in rows:
            generator = make_torch_generator(seed, "latent_diffusion", int(row))
            noises += [torch.randn(model.latent_shape, generator=generator) for _ in range(n_candidates)]
        told, known = (
            torch.from_numpy(part.astype(np.float32)).repeat_interleave(n_candidates, dim=0).to(device)
            for part in (estimate, reliability)
        )

        nothing = torch.zeros_like(told)

        def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            times = time.to(device).expand(len(latents))
            if guidance == 1:
                return model.denoiser(latents, times, told, known)
            # One call of the network on twice the rows: with the embedding, and without.
            both = model.denoiser(
                latents.repeat(2, 1, 1, 1),
                times.repeat(2),
                torch.cat([told, nothing]),
                torch.cat([known, nothing]),
            )
            conditional, unconditional = both.chunk(2)
            return guide(conditional, unconditional, guidance)

        with torch.inference_mode():
            latents = draw_samples(
                predict, torch.stack(noises).to(device), SCHEDULE, sampler=self.config.sampler,
                n_steps=self.config.steps,
            )  # fmt: skip
            images = unscale_images(model.autoencoder.decode(latents)).cpu().numpy()
        return images.reshape(len(rows), n_candidates, *images.shape[1:])
