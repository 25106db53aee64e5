"""Train the embedded generator: on phantom images drawn on the fly, or on the training images of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from braindecode_vis import pipeline
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.settings import describe_validation_error
from braindecode_vis.generation.latent_diffusion_config import GeneratorTrainingConfig
from braindecode_vis.pipeline.runs import Run

Progress = Callable[[str, int, int], None]


def train_on_phantom(
    out: Path, changes: Mapping[str, Any], *, seed: int, progress: Progress | None = None
) -> Path:
    """Draw phantom images, embed them with the embedded image encoder, train, and return the weights file.

    Parameters
    ----------
    out
        Folder of the training; one that was interrupted goes on.
    changes
        Settings of `GeneratorTrainingConfig` that differ from the defaults.
    seed
        Root seed.
    progress
        Called with the stage, the steps done and the steps wanted.
    """
    from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
    from braindecode_vis.generation.latent_diffusion_training import PhantomSource, train_generator

    source = PhantomSource(EfficientNetConfig().build())
    return train_generator(make_settings(changes), source, out, seed=seed, progress=progress)


def train_on_run(
    run: Run, out: Path, changes: Mapping[str, Any], *, seed: int, progress: Progress | None = None
) -> Path:
    """Train on the training images of the first fold of a run, in its target space; test images are left out."""
    from braindecode_vis.generation.latent_diffusion_training import StimulusSource, train_generator

    prepared, bank = pipeline.preprocess(run), pipeline.embed(run)[0]
    settings = make_settings(changes)
    size = settings.image_size
    try:  # before hours of training: the target must take the images that the generator will make
        bank.encoder.encode([np.zeros((size, size, 3), np.uint8)])
    except DataError as error:
        raise ConfigError(
            f"the target {bank.embeddings.space} does not take images of {size} x {size} pixels, the "
            "size of the generated images; set image_size to the target's, or choose a target.kind that "
            "takes any image."
        ) from error
    # A generator that had seen test images would paint them from memory.
    ids = list(pd.unique(prepared.responses.stimulus_ids[prepared.split.folds[0].train]))
    source = StimulusSource(prepared.stimuli.select(ids), bank.embeddings.select(ids))
    return train_generator(settings, source, out, seed=seed, progress=progress)


def make_settings(changes: Mapping[str, Any]) -> GeneratorTrainingConfig:
    """Return validated settings; a wrong one is a `ConfigError` of one sentence."""
    try:
        return GeneratorTrainingConfig.model_validate(dict(changes))
    except ValidationError as error:
        # One thing at a time, as for every other configuration.
        first = error.errors(include_url=False)[0]
        if first["type"] == "unknown_key":
            context = first["ctx"]
            raise ConfigError(
                f"train-generator has no setting {context['key']}; known are {', '.join(context['known'])}."
            ) from error
        raise ConfigError(f"train-generator: {describe_validation_error(error)}.") from error
