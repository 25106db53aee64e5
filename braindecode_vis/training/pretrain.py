"""Self-supervised pretraining of the parcel encoder: reconstruct hidden tokens from visible ones, no labels.

Owns the loop: rows that are allowed in, statistics, mini-batches from a memory map, optimiser, held-out error against
predicting the mean, checkpoints that continue exactly, and the files that `encoders.parcels` starts from. Stimuli and
categories are never read but to keep repetitions of an image on one side of the hold-out; test trials are never read.

References
----------
He et al. (2022), arXiv:2111.06377 (masked autoencoders). Wang et al. (2024), arXiv:2411.07121 (WAVE).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.arrays import Responses
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.seeds import make_generator
from braindecode_vis.settings import Settings

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
SHORT_PATCH = 8  # samples; the own variance of a shorter patch says too little to divide by
NEVER_READ = ("test",)


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


def pretrain(
    config: PretrainConfig,
    responses: Responses,
    *,
    folder: Path,
    checkpoints: Path,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pretrain and write ``encoder.safetensors``, ``encoder.json`` and ``log.jsonl`` into `folder`.

    Parameters
    ----------
    config
        Encoder and training.
    responses
        Trials or windows of unlabelled runs, parcels x times or parcels; possibly a memory map. Rows whose split is
        ``test`` are never read.
    folder
        Where the result goes; it exists.
    checkpoints
        Where an interrupted run left its state and finds it again; it outlives `folder` being thrown away.
    seed
        Root of weights, order, masks and hold-out.
    progress
        Called with a description and the number of epochs; a context manager that gives the function that advances.

    Returns
    -------
    dict
        Held-out error of the written weights, that of predicting the mean, epoch and number of trials.

    Raises
    ------
    ConfigError, DataError
        If there are too few groups to hold some out, a mask hides nothing or everything, the loss is not finite, or
        the checkpoint is of another run.
    """
    from braindecode_vis.training.pretrain_loop import PretrainRun

    train, held_out = split_rows(responses, config, seed)
    signal = describe_signal(responses.select(train[:1]))
    run = PretrainRun(config, responses.data, signal, train, held_out, checkpoints, seed)
    run.resume()
    shown = nullcontext(_ignore) if progress is None else progress("pretraining", config.n_epochs)
    with shown as advance:
        advance(run.epoch)
        while run.epoch < config.n_epochs:
            run.train_epoch()
            if run.epoch % config.checkpoint_every == 0 or run.epoch == config.n_epochs:
                run.write_checkpoint()
            advance(1)
    return run.write_result(folder)


def split_rows(responses: Responses, config: PretrainConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that train and those that are held out, ascending; a group is never on both sides.

    Raises
    ------
    DataError
        If there are no rows outside the test split, or fewer than two groups.
    """
    trials = responses.trials
    allowed = np.flatnonzero(~trials["split"].isin(NEVER_READ).to_numpy())
    if not len(allowed):
        raise DataError(
            "every trial belongs to the test split; pretraining needs training trials or unlabelled runs."
        )
    columns = {"stimulus": ["stimulus_id"], "run": ["subject", "session", "run"]}.get(config.hold_out_by)
    group: np.ndarray
    if columns is None:
        group = np.arange(len(allowed))
    else:
        group = trials.iloc[allowed].groupby(columns, sort=True, dropna=False).ngroup().to_numpy()
    n_groups = int(group.max()) + 1
    n_held_out = max(1, round(config.held_out * n_groups))
    if n_held_out >= n_groups:
        raise DataError(
            f"the training trials fall into {n_groups} group(s) by {config.hold_out_by}, of which none would be left "
            "to learn from; lower pretrain.held_out or set pretrain.hold_out_by=trial."
        )
    chosen = make_generator(seed, "pretrain", "held_out").permutation(n_groups)[:n_held_out]
    is_out = np.isin(group, chosen)
    return allowed[~is_out], allowed[is_out]


def count_visible(n_tokens: int, mask_ratio: float) -> int:
    """Return the number of visible tokens.

    Raises
    ------
    ConfigError
        If the ratio hides all tokens or none.
    """
    n_visible = round(n_tokens * (1 - mask_ratio))
    if not 0 < n_visible < n_tokens:
        raise ConfigError(
            f"pretrain.mask_ratio = {mask_ratio} leaves {n_visible} of {n_tokens} tokens visible; at least one must be "
            "visible and one hidden."
        )
    return n_visible


def _ignore(_: int) -> None:
    return None
