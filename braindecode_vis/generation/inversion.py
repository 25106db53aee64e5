"""Generators without weights: images by inverting a pixel or principal-component encoder, and baselines.

A prediction that minimises the squared error is a conditional mean: correct on average and washed out. With
``contrast: ssim`` the generator darkens and stretches its grey values by one threshold and one gain, chosen so
that out-of-fold predictions of the training trials reach the best structural similarity with their images.
"""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, check_same_space, normalise_rows
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import GeneratorSettings, ImageEncoder, ImageGenerator
from braindecode_vis.base.roles import complete
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.generation.generator_data import GeneratorData

SMALLEST_SSIM = 11  # pixels, the window of the metric at a deviation of 1.5


class LatentsConfig(GeneratorSettings):
    """Invert the target space; only spaces with an inverse are accepted.

    Parameters
    ----------
    contrast
        ``none`` leaves the decoded grey values; ``ssim`` chooses threshold and gain on training trials.
    """

    kind: Literal["latents"] = "latents"
    contrast: Literal["none", "ssim"] = "none"

    #: Candidates: a grey value v in 0..1 becomes ``clip((v - threshold) * gain, 0, 1)``.
    thresholds: ClassVar[tuple[float, ...]] = (
        0.0,
        0.05,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
    )
    gains: ClassVar[tuple[float, ...]] = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"thresholds", "gains"})

    @property
    def needs_predictions(self) -> bool:  # type: ignore[override]
        """Whether it learns from out-of-fold predictions."""
        return self.contrast == "ssim"

    def accepts(self, target_kind: str) -> bool:
        """Say whether embeddings of this kind of target can be turned into images."""
        return target_kind in ("pixels", "pca", "vae", "taesd", "packaged_latents")

    def build(self, data: GeneratorData) -> LatentsGenerator:
        """Return the generator, its contrast chosen on the training data."""
        return LatentsGenerator(self, data)


class LatentsGenerator(ImageGenerator):
    """The inverse of an invertible image encoder, with a contrast learnt on training trials."""

    rows_at_once = 64  # a thousand images of 512 pixels are 3 GB while an autoencoder decodes them

    def __init__(self, config: LatentsConfig, data: GeneratorData) -> None:
        self.encoder = complete(ImageEncoder, data.image_encoder)
        if not self.encoder.decodes:
            raise ConfigError(
                f"the generator 'latents' cannot turn the space {self.encoder.space!r} into images; "
                "use a target of kind pixels, pca, vae, taesd or packaged_latents, or a generator of kind nearest."
            )
        self.threshold, self.gain = 0.0, 1.0
        if config.contrast == "ssim":
            self.threshold, self.gain = self._choose_contrast(config, data)

    def accepts(self, space: str) -> bool:
        """Say whether `space` is the one whose encoder is inverted."""
        return space == self.encoder.space

    def generate(self, embeddings: Embeddings, *, seed: int, first_row: int = 0) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3); nothing is random here."""
        if not self.accepts(embeddings.space):
            raise ConfigError(
                f"the generator 'latents' inverts {self.encoder.space!r}, not {embeddings.space!r}."
            )
        images = self.encoder.decode(np.asarray(embeddings.vectors))
        return stretch_contrast(images, self.threshold, self.gain)

    def describe(self) -> dict[str, Any]:
        """Return what was chosen on the training data."""
        return {"threshold": self.threshold, "gain": self.gain}

    def _choose_contrast(self, config: LatentsConfig, data: GeneratorData) -> tuple[float, float]:
        """Return the candidate whose images of out-of-fold predictions are most like the true ones."""
        from skimage.metrics import structural_similarity

        if data.predicted is None:
            raise ConfigError("generator.contrast is ssim, but this encoder has no out-of-fold predictions.")
        decoded = self.encoder.decode(np.asarray(data.predicted.vectors))
        row_of = {i: row for row, i in enumerate(data.embeddings.ids)}
        height, width = decoded.shape[1:3]
        if min(height, width) < SMALLEST_SSIM:
            raise ConfigError(
                f"generator.contrast is ssim, which needs images of {SMALLEST_SSIM} pixels, not {height} x {width}; "
                "set generator.contrast to none, or increase target.size."
            )
        # Out-of-fold predictions are as washed out as those of test trials; predictions of the fit would not be.
        small = {
            i: resize_image(data.read_images([row_of[i]])[0], height, width) for i in set(data.predicted.ids)
        }
        truth = [small[i] for i in data.predicted.ids]
        candidates = list(product(config.thresholds, config.gains))
        scores = [
            np.mean(
                [
                    # Green alone, which carries most of the brightness; window and constants are the metric's.
                    structural_similarity(
                        left[..., 1], right[..., 1], gaussian_weights=True, sigma=1.5,
                        use_sample_covariance=False, data_range=255,
                    )
                    for left, right in zip(stretch_contrast(decoded, *candidate), truth, strict=True)
                ]
            )
            for candidate in candidates
        ]  # fmt: skip
        return candidates[int(np.argmax(scores))]


def stretch_contrast(images: np.ndarray, threshold: float, gain: float) -> np.ndarray:
    """Return uint8 images with ``clip((v - threshold) * gain, 0, 1)`` applied to their values in 0..1."""
    if threshold == 0 and gain == 1:  # to the bit, and not through a rounding
        return images
    values = np.clip((images.astype(np.float32) / 255 - threshold) * gain, 0, 1)
    return np.round(values * 255).astype(np.uint8)


# --- baselines -------------------------------------------------------------------------------------------------
# Baseline reconstructions: the nearest training image, the mean image and the mean image of the decoded class.
#
# `MeanImageGenerator` ignores the prediction; `ClassMeanGenerator` uses it only to name a class. For stimuli that
# look alike, such as digits, both reach high pixel correlations. `NearestGenerator` copies the nearest training
# image, which makes plain what memorisation looks like: a reconstruction that does not beat it has copied. It is a
# generator of its own as well.


#: Training images behind the mean image. To decode 16 540 photographs for it takes a minute, and moves a grey level by
#: about one (a spread of 60 over the root of 2048).
MOST_AVERAGED = 2048


class MeanImageGenerator(ImageGenerator):
    """The mean training image, whatever the brain did.

    Of more than `MOST_AVERAGED` images, so many are averaged, evenly spread over the training split.
    """

    def __init__(self, data: GeneratorData) -> None:
        n_images = len(data.embeddings)
        self.mean = data.average_images(
            np.linspace(0, n_images - 1, min(n_images, MOST_AVERAGED)).astype(int)
        )

    def accepts(self, space: str) -> bool:
        """Every space will do."""
        return True

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return the mean image once per row, uint8 of shape (n_rows, height, width, 3)."""
        return np.repeat(self.mean[None], len(embeddings), axis=0)


class ClassMeanGenerator(ImageGenerator):
    """The mean training image of the class whose mean embedding is nearest to the prediction."""

    def __init__(self, data: GeneratorData) -> None:
        self.data = data
        self.classes = sorted(
            set(data.concepts)
        )  # a fixed order, so that ties go to the same class every time
        vectors = data.embeddings.flat()
        rows = [data.concepts == name for name in self.classes]
        self.centroids = np.stack([vectors[row].mean(axis=0) for row in rows])  # (n_classes, n_features)

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.data.embeddings.space

    def classify(self, embeddings: Embeddings) -> np.ndarray:
        """Return the name of the nearest class for each prediction, shape (n_rows,)."""
        check_same_space(embeddings, self.data.embeddings)
        values = embeddings.flat()
        # |a - b|^2 written out: the differences themselves would be n_rows x n_classes x n_features values.
        squared = (
            (values**2).sum(axis=1)[:, None]
            - 2 * values @ self.centroids.T
            + (self.centroids**2).sum(axis=1)[None]
        )  # (n_rows, n_classes)
        return np.array(self.classes, dtype=object)[np.argmin(squared, axis=1)]

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return the mean image of the decoded class per row, uint8 of shape (n_rows, height, width, 3)."""
        # Of the decoded classes alone: most images need not be read.
        names, places = np.unique(self.classify(embeddings), return_inverse=True)
        return np.stack([self.average(name) for name in names])[places]

    def average(self, name: str) -> np.ndarray:
        """Return the mean image of a class, uint8 of shape (height, width, 3)."""
        return self.data.average_images(np.flatnonzero(self.data.concepts == name))


class NearestConfig(GeneratorSettings):
    """Copy the nearest training image; works with every space."""

    kind: Literal["nearest"] = "nearest"

    copies_training_images: ClassVar[bool] = True

    def accepts(self, target_kind: str) -> bool:
        """Every target will do."""
        return True

    def build(self, data: GeneratorData) -> NearestGenerator:
        """Return the generator."""
        return NearestGenerator(data)


class NearestGenerator(ImageGenerator):
    """The training image whose embedding is nearest to the prediction, by the cosine after the training mean."""

    def __init__(self, data: GeneratorData) -> None:
        self.data = data

    def accepts(self, space: str) -> bool:
        """Say whether `space` is that of the training embeddings."""
        return space == self.data.embeddings.space

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3); nothing is random here."""
        return self.data.read_images(self.find_nearest(embeddings))

    def find_copies(self, embeddings: Embeddings) -> np.ndarray:
        """Return the row of the training image that each row copies; see `find_nearest`."""
        return self.find_nearest(embeddings)

    def find_nearest(self, embeddings: Embeddings) -> np.ndarray:
        """Return the row of the nearest training embedding for each prediction, shape (n_rows,)."""
        check_same_space(embeddings, self.data.embeddings)
        bank = self.data.embeddings.flat()
        mean = bank.mean(axis=0)
        similarity = (
            normalise_rows(embeddings.flat() - mean) @ normalise_rows(bank - mean).T
        )  # (n_rows, n_images)
        return np.argmax(similarity, axis=1)
