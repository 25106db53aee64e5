"""Turn embeddings into 64-pixel images with a small latent diffusion model that is part of the package.

Owns the generator: reduce an embedding to components, sample latents that suit it, decode them, keep the best of some
candidates. Like any second stage it has been trained on images alone and never sees a brain; what a brain encoder's
predictions are worth is learnt from training trials when the generator is built.

References
----------
Rombach, R. et al. (2022). High-resolution image synthesis with latent diffusion models. CVPR. arXiv:2112.10752.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import ImageGenerator
from braindecode_vis.base.devices import autocast, choose_device
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.latent_diffusion_networks import Uncertainty, fit_uncertainty
from braindecode_vis.generation.weights_file import (
    Model,
    hash_weights,
    load_model,
    read_header,
    read_known_components,
)

if TYPE_CHECKING:
    import torch

    from braindecode_vis.generation.priors.sampling import Predict

#: Steps of repainting, where the weights can: noise, and time of a demo, chosen on validation concepts.
REPAINTING = 6
#: Images that are repainted together.
AT_ONCE = 8


@dataclass(frozen=True)
class Sampling:
    """How latents are sampled: by which sampler, in how many steps, with what guidance and arithmetic."""

    sampler: str
    n_steps: int
    guidance: float
    precision: str


class LatentDiffusionGenerator(ImageGenerator):
    """A trained autoencoder and denoiser; images are reproducible from the seed, row by row.

    The networks are read when the first image is asked for.

    Parameters
    ----------
    path
        A weights file.
    data
        Its image encoder compares candidates; its predictions say how far a brain encoder can be trusted.
    sampling
        How latents are sampled.
    candidates
        Images sampled per embedding, of which the one most like it is kept.
    repaint
        Steps in which that one is drawn again. None is `REPAINTING` for embeddings of images, if the weights can, and 0
        for predictions.
    batch_size, device
        Settings of the computation that do not change its result.

    Attributes
    ----------
    uncertainty
        Of the embeddings that are given; None takes them to be embeddings of images.
    """

    def __init__(
        self,
        path: Path,
        sampling: Sampling,
        *,
        data: GeneratorData | None = None,
        candidates: int = 1,
        repaint: int | None = 0,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        if candidates > 1 and data is None:
            raise ConfigError(
                "generator.candidates above 1 needs an image encoder to compare them; give the training data."
            )
        self.path, self.data, self.header = path, data, read_header(path)
        if repaint and not self.header.readers:
            raise ConfigError(
                f"generator.repaint is {repaint}, but {path} holds no networks that evaluate the content "
                "of images; leave the setting out, or use the packaged weights."
            )
        self._spares_predictions = repaint is None
        self.repaint = (REPAINTING if self.header.readers else 0) if repaint is None else repaint
        self.sampling, self.candidates = sampling, candidates
        self.batch_size, self.device = batch_size, device
        self.uncertainty: Uncertainty | None = None

    def load(self) -> Model:
        """Return the networks on their device, read once per process."""
        return load_model(self.path, choose_device(self.device, setting="generator.device"))

    def accepts(self, space: str) -> bool:
        """Say whether `space` is the one that the weights were trained on."""
        return space == self.header.space

    def check_space(self, space: str) -> None:
        """Raise `ConfigError` that names both spaces unless `space` is that of the weights."""
        if not self.accepts(space):
            raise ConfigError(
                f"the generator 'latent_diffusion' has weights for the space {self.header.space!r}, not "
                f"for {space!r}; choose the target of the weights, or train weights on this space and "
                "give them in generator.weights."
            )

    def read_known_images(self) -> Embeddings:
        """Return embeddings of a sample of the images that the weights were trained on, to
        `weights_file.N_KNOWN_COMPONENTS`.

        Raises
        ------
        ConfigError
            If the weights were made before they brought any.
        """
        model = self.load()
        vectors = model.components.undo(read_known_components(self.path))
        names = [f"{self.header.training['source']} {row}" for row in range(len(vectors))]
        return Embeddings(vectors.astype(np.float32), names, self.header.space)

    def describe(self) -> dict[str, Any]:
        """Return which weights are in use, and how reliable the predictions are taken to be."""
        about = {"weights_sha256": hash_weights(self.path), "weights_space": self.header.space}
        if self._of_predictions is None:
            return about
        shares = self.load().components.shares
        return {
            **about,
            "explained_variance": float(np.average(self._of_predictions.reliability, weights=shares)),
        }

    def for_predictions(self, drawn: bool = False) -> LatentDiffusionGenerator:
        """Return the generator of what a brain encoder predicts: it trusts each component as far as it is reliable.

        Without out-of-fold predictions in the space of the weights nothing is known of that, and predictions are
        taken as embeddings of images are. Nothing is repainted unless that was asked for: the names that are read in
        predictions are mostly wrong.

        Parameters
        ----------
        drawn
            Whether a prior drew the embeddings, which are then taken as those of images.
        """
        uncertainty = None if drawn else self._of_predictions
        spared = self._spares_predictions and self.repaint > 0
        if uncertainty is None and not spared:
            return self
        trusting = copy.copy(self)
        trusting.uncertainty = uncertainty
        if spared:
            trusting.repaint = 0
        return trusting

    @cached_property
    def _of_predictions(self) -> Uncertainty | None:
        data = self.data
        if data is None or data.predicted is None or not len(data.predicted):
            return None
        if not self.accepts(data.predicted.space):
            return None
        components = self.load().components
        true = data.embeddings.select(list(data.predicted.ids))
        return fit_uncertainty(
            components.apply(data.predicted.flat()),
            components.apply(true.flat()),
            data.noise,
            components,
        )

    @property
    def rows_at_once(self) -> int:  # type: ignore[override]
        """A batch, which holds all candidates of its rows."""
        return max(1, self.batch_size // self.candidates)

    @property
    def image_size(self) -> tuple[int, int]:  # type: ignore[override]
        """Height and width of its images."""
        return (self.header.image_size, self.header.image_size)

    def generate(self, embeddings: Embeddings, *, seed: int, first_row: int = 0) -> np.ndarray:
        """Return uint8 images of shape (n_rows, image_size, image_size, 3).

        A row's noise depends on the seed and its number alone, counted from `first_row`, so equal embeddings in
        different rows give different draws, and the batch size changes nothing beyond rounding.

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
        model = self.load()
        # In double precision, so that how many rows there are does not change how it is rounded.
        estimate = model.components.apply(embeddings.flat().astype(np.float64))  # (n_rows, n_components)
        reliability = np.ones_like(estimate)  # an embedding of an image is known fully
        if self.uncertainty is not None:
            estimate = self.uncertainty.estimate(estimate)
            reliability[:] = self.uncertainty.reliability
        for start in range(0, len(images), self.rows_at_once):
            rows = np.arange(start, min(start + self.rows_at_once, len(images)))
            made = self._sample(model, estimate[rows], reliability[rows], first_row + rows, seed)
            best = self._find_best(model, made, estimate[rows])
            images[rows] = made[np.arange(len(rows)), best]
        if self.repaint:
            # In batches of one size, filled up at the end: a network rounds otherwise in a batch of another size, and
            # many small steps make that grow.
            for start in range(0, len(images), AT_ONCE):
                rows = np.minimum(np.arange(start, start + AT_ONCE), len(images) - 1)
                images[rows] = self._repaint(
                    model, images[rows], estimate[rows], reliability[rows], first_row + rows, seed
                )
        return images

    def _repaint(
        self,
        model: Model,
        images: np.ndarray,
        estimate: np.ndarray,
        reliability: np.ndarray,
        rows: np.ndarray,
        seed: int,
    ) -> np.ndarray:
        """Return the images, uint8, drawn again so that they show what the embedding names."""
        import torch

        from braindecode_vis.generation.latent_diffusion_networks import scale_images, unscale_images
        from braindecode_vis.generation.repainting import repaint

        pixels = scale_images(torch.from_numpy(images)).to(model.device)
        estimates, known = _lend(model, estimate, reliability)
        predict = self._make_predict(model, estimates, known)
        made = repaint(model, pixels, estimates, predict, n_steps=self.repaint, seed=seed, rows=rows.tolist())
        return unscale_images(made).cpu().numpy()

    def _make_predict(self, model: Model, estimates: torch.Tensor, known: torch.Tensor) -> Predict:
        """Return what gives the velocity of latents at a step, of which row by row so much is known."""
        import torch

        from braindecode_vis.generation.priors.sampling import guide

        nothing, guidance = torch.zeros_like(estimates), self.sampling.guidance

        def denoise(*inputs: torch.Tensor) -> torch.Tensor:
            with autocast(model.device, getattr(torch, self.sampling.precision)):
                return model.denoiser(*inputs).float()

        def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            times = time.to(model.device).expand(len(latents))
            if guidance == 1:
                return denoise(latents, times, estimates, known)
            # One call of the network on twice the rows: with the embedding, and without.
            both = denoise(
                latents.repeat(2, 1, 1, 1),
                times.repeat(2),
                torch.cat([estimates, nothing]),
                torch.cat([known, nothing]),
            )
            conditional, unconditional = both.chunk(2)
            return guide(conditional, unconditional, guidance)

        return predict

    def _find_best(self, model: Model, made: np.ndarray, estimate: np.ndarray) -> np.ndarray:
        """Return, for each row, which candidate's embedding has the largest cosine with the estimate about the mean."""
        n_rows, n_candidates = made.shape[:2]
        if n_candidates == 1:
            return np.zeros(n_rows, int)
        encoder = self.data.image_encoder  # type: ignore[union-attr]
        # (n_rows, n_candidates, side, side, 3) -> one batch of images, and back to components of each candidate
        vectors = np.asarray(encoder.encode(made.reshape(-1, *made.shape[2:])), np.float32)
        found = model.components.apply(vectors.reshape(len(vectors), -1)).reshape(n_rows, n_candidates, -1)
        # Back to the units of the embedding, in which large components count more.
        found *= model.components.std
        wanted = estimate * model.components.std
        lengths = np.linalg.norm(found, axis=2) + 1e-12
        return np.argmax(np.einsum("nck,nk->nc", found, wanted) / lengths, axis=1)

    def _sample(
        self, model: Model, estimate: np.ndarray, reliability: np.ndarray, rows: np.ndarray, seed: int
    ) -> np.ndarray:
        """Return the candidates of some rows, uint8 of shape (n_rows, candidates, side, side, 3)."""
        import torch

        from braindecode_vis.base.seeds import make_torch_generator
        from braindecode_vis.generation.latent_diffusion_networks import SCHEDULE, unscale_images
        from braindecode_vis.generation.priors.sampling import draw_samples

        n_candidates, device = self.candidates, model.device
        # Per row and on the CPU, so that neither the batch size nor the device changes an image.
        noises = []
        for row in rows:
            generator = make_torch_generator(seed, "latent_diffusion", int(row))
            noises += [torch.randn(model.latent_shape, generator=generator) for _ in range(n_candidates)]
        estimates, known = _lend(model, estimate, reliability, n_candidates)
        predict = self._make_predict(model, estimates, known)
        with torch.inference_mode():
            latents = draw_samples(
                predict, torch.stack(noises).to(device), SCHEDULE, sampler=self.sampling.sampler,
                n_steps=self.sampling.n_steps,
            )  # fmt: skip
            images = unscale_images(model.autoencoder.decode(latents)).cpu().numpy()
        return images.reshape(len(rows), n_candidates, *images.shape[1:])


def _lend(
    model: Model, estimate: np.ndarray, reliability: np.ndarray, n: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as tensors on the model's device, each row `n` times."""
    import torch

    parts = (torch.from_numpy(part.astype(np.float32)) for part in (estimate, reliability))
    estimates, known = (part.repeat_interleave(n, dim=0).to(model.device) for part in parts)
    return estimates, known
