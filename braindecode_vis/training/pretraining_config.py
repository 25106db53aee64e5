"""Settings of the self-supervised pretraining of the parcel encoder. Imports no torch.

References
----------
He et al. (2022), arXiv:2111.06377 (masked autoencoders). Wang et al. (2024), arXiv:2411.07121 (WAVE).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.settings import Settings


class PretrainConfig(Settings):
    """How the encoder is pretrained; the defaults follow He et al. where they say something.

    Parameters
    ----------
    encoder
        The encoder to pretrain; the projector and `freeze_depth` play no part here.
    mask_ratio
        Share of the tokens that are hidden (0.75).
    normalisation
        What is predicted: ``patch``, each patch with its own mean and variance removed (He et al.), or ``parcel``,
        values standardised per parcel by the training trials; ``auto`` takes ``patch`` for patches of at least 8
        samples.
    decoder_width, decoder_depth, decoder_heads
        Size of the light decoder, which is not kept.
    n_epochs, batch_size
        Passes over the data, and trials per step.
    learning_rate, warmup, betas, weight_decay, clip
        AdamW with a linear rise over the first share `warmup` of the steps and a cosine fall to 0 (He et al.: betas
        0.9 and 0.95, decay 0.05, 5 % of the epochs; the rate is ours); gradients are clipped at this norm. Biases,
        norms and embeddings have no decay.
    held_out
        Share of the groups of trials that only measures the error.
    hold_out_by
        What a group is: all trials of a ``stimulus``, of a ``run`` (right for unlabelled series, whose windows
        resemble their neighbours), or each ``trial``.
    keep
        Which weights are written: those with the lowest held-out error (``best``) or the ``last`` ones.
    device
        Where it runs; ``auto`` takes a GPU if there is one.
    checkpoint_every
        Epochs between checkpoints; the interrupted and the uninterrupted run give the same weights.
    """

    encoder: ParcelsConfig = ParcelsConfig()
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    normalisation: Literal["auto", "patch", "parcel"] = "auto"
    decoder_width: int = Field(default=128, ge=1)
    decoder_depth: int = Field(default=2, ge=1)
    decoder_heads: int = Field(default=4, ge=1)
    n_epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.05, ge=0)
    clip: float = Field(default=1.0, gt=0)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    hold_out_by: Literal["stimulus", "run", "trial"] = "stimulus"
    keep: Literal["best", "last"] = "best"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = Field(default=1, ge=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device", "checkpoint_every"})

    @model_validator(mode="after")
    def _check_fit(self) -> PretrainConfig:
        if self.decoder_width % self.decoder_heads:
            raise ValueError("decoder_width must be a multiple of decoder_heads")
        if self.encoder.pretrained is not None or self.encoder.freeze_depth:
            raise ValueError("encoder.pretrained and encoder.freeze_depth are for the training that follows")
        return self
