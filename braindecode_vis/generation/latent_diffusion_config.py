"""Settings of the embedded latent diffusion generator, and of its training; importable without torch.

``weights/latent_diffusion.json`` has the command, the seed and the scores of the packaged weights, which draw nothing
but what the phantom shows. Train on other stimuli with ``braindecode-vis train-generator``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.contracts import GeneratorSettings
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.embeddings.weights import check_intact, describe_needed
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.weights_file import PACKAGED_WEIGHTS, hash_weights, read_header

if TYPE_CHECKING:
    from braindecode_vis.generation.latent_diffusion import LatentDiffusionGenerator

PACKAGED_TARGET = "efficientnet-lite0"


class LatentDiffusionConfig(GeneratorSettings, DeviceSettings):
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
        Images sampled per embedding. The one whose own embedding is most similar to the given one is kept, so scores in
        the target's space are better than those in other spaces; 1 makes only one.
    repaint
        Steps in which the chosen image is denoised again, so that two networks, one for images and one for embeddings,
        find the same shape, colours and texture; 0 for none. None means 6 for embeddings of images with weights that
        contain these networks, such as the packaged ones, and 0 for predictions of a brain encoder, for which these
        networks are mostly wrong.
    precision
        Arithmetic of the denoiser. ``bfloat16`` nearly halves its time on processors that multiply in it (AVX512-BF16,
        AMX) and on GPUs; images move by a level or two of 255, and another candidate may be kept.
    batch_size
        Images at a time, which does not change the result.
    """

    packages: ClassVar[tuple[str, ...]] = ("diffusers",)

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    weights: Path | None = None
    sampler: Literal["ddim", "dpm-solver++"] = "dpm-solver++"
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0)
    candidates: int = Field(default=8, ge=1, le=256)
    repaint: int | None = Field(default=None, ge=0, le=100)
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = Field(default=64, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"weights", "batch_size", "device"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"repaint", "precision"})
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

    def list_weights(self) -> list[NeededWeights]:
        """Return the file in use."""
        what, given = "two networks and images of this package", self.weights is not None
        return [describe_needed(None, "weights", self.find_weights(), what=what, named=given)]

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the weights are there and whole."""
        read_header(self.find_weights())
        check_intact(self.find_weights())

    def accepts(self, target_kind: str) -> bool:
        """Say whether embeddings of this kind of target can be turned into images.

        Weights of the user's own may belong to any target; `build` compares the spaces themselves.
        """
        return self.weights is not None or target_kind == PACKAGED_TARGET

    def build(self, data: GeneratorData | None = None) -> LatentDiffusionGenerator:
        """Return the generator; without training data, of embeddings of images alone and without candidates.

        Raises
        ------
        ConfigError
            If the weights were trained on another space than the target's.
        """
        from braindecode_vis.generation.latent_diffusion import LatentDiffusionGenerator, Sampling

        generator = LatentDiffusionGenerator(
            self.find_weights(), Sampling(self.sampler, self.steps, self.guidance, self.precision), data=data,
            candidates=self.candidates, repaint=self.repaint, batch_size=self.batch_size, device=self.device,
        )  # fmt: skip
        if data is not None:
            generator.check_space(data.image_encoder.space)
        return generator


class GeneratorTrainingConfig(DeviceSettings):
    """Sizes and optimisation of an autoencoder and a denoiser. The numbers are choices of ours.

    The defaults, with ``denoiser_precision: bfloat16``, made the packaged weights: about 45 minutes of one CPU core to
    draw and embed the images, 35 for the autoencoder, and 65 of two cores with AMX for the denoiser.

    Parameters
    ----------
    n_images
        Number of phantom images to draw; not used for your own stimuli.
    image_size
        Height and width of the images in pixels, a multiple of 16.
    autoencoder_steps, autoencoder_batch, autoencoder_lr
        Optimisation of the autoencoder with AdamW.
    denoiser_steps, denoiser_batch, denoiser_lr
        Optimisation of the denoiser with AdamW.
    denoiser_precision
        Arithmetic of the denoiser; the autoencoder computes in float32. ``bfloat16`` is faster on GPUs and on
        processors that multiply in it (AMX), and far slower on others.
    """

    n_images: int = Field(default=102_400, ge=1)
    image_size: int = Field(default=64, ge=16, multiple_of=16)
    autoencoder_steps: int = Field(default=20_000, ge=1)
    autoencoder_batch: int = Field(default=16, ge=2)
    autoencoder_lr: float = Field(default=2e-3, gt=0)
    denoiser_steps: int = Field(default=20_000, ge=1)
    denoiser_batch: int = Field(default=128, ge=2)
    denoiser_lr: float = Field(default=1.2e-3, gt=0)
    denoiser_precision: Literal["float32", "bfloat16"] = "float32"

    #: Channels of a latent.
    n_latent_channels: ClassVar[int] = 8
    #: Channels of the autoencoder at a quarter of the resolution, a multiple of 4; twice as many at an eighth.
    autoencoder_width: ClassVar[int] = 48
    #: The autoencoder sees at most so many of the images, the first ones.
    autoencoder_images: ClassVar[int] = 40_960
    #: Weight of the perceptual loss, and share of a batch on which it is computed.
    perceptual_weight: ClassVar[float] = 1.0
    perceptual_share: ClassVar[float] = 0.5
    #: Deviation of the noise on the latents (which have unit variance) while the autoencoder is trained.
    latent_noise: ClassVar[float] = 0.1
    #: Channels of the denoiser's maps at half the latent's resolution, a multiple of 8.
    denoiser_width: ClassVar[int] = 224
    #: As in `Denoiser`.
    fine_width: ClassVar[int] = 96
    condition_width: ClassVar[int] = 384
    n_blocks: ClassVar[int] = 3
    n_fine_blocks: ClassVar[int] = 3
    #: Decay per step of the averaged weights, which are the ones that are kept.
    ema_decay: ClassVar[float] = 0.999
    #: Principal components of the embedding that the denoiser is conditioned on.
    n_components: ClassVar[int] = 256
    #: Shares of the images whose embedding is given as it is, and not at all (arXiv:2207.12598), drawn image by
    #: image; the others are given with noise, see `braindecode_vis.generation.latent_diffusion_networks`.
    certain_conditions: ClassVar[float] = 0.75
    condition_dropout: ClassVar[float] = 0.1
    #: Toward how much noise the denoiser leans as it learns; larger is more. See
    #: `braindecode_vis.generation.priors.sampling.draw_times`.
    time_bias: ClassVar[float] = 0.5
    #: Of AdamW; steps of linear warm-up before the cosine decay of the learning rate.
    weight_decay: ClassVar[float] = 0.01
    warmup: ClassVar[int] = 200
    #: Steps between checkpoints and lines of the log.
    checkpoint_every: ClassVar[int] = 500
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "n_latent_channels", "autoencoder_width", "autoencoder_images", "perceptual_weight",
        "perceptual_share", "latent_noise", "denoiser_width", "fine_width", "condition_width", "n_blocks",
        "n_fine_blocks", "ema_decay", "n_components", "certain_conditions", "condition_dropout", "time_bias",
        "weight_decay", "warmup", "checkpoint_every",
    })  # fmt: skip
    removed_settings: ClassVar[Mapping[str, Any]] = {"autoencoder_precision": "float32"}

    not_hashed: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "device"})
