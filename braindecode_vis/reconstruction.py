"""Reconstruct the test images of one fold, with every control beside them.

Owns which controls are made and from what. Works on fitted components and nouns; what is written where is the
pipeline's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Embeddings
from braindecode_vis.config import RunConfig
from braindecode_vis.generators.controls import ClassMeanGenerator, MeanImageGenerator
from braindecode_vis.generators.material import TrainingMaterial
from braindecode_vis.generators.nearest import NearestConfig
from braindecode_vis.seeds import derive_seed
from braindecode_vis.stimuli import StimulusSet, resize_image


@dataclass(frozen=True)
class FoldImages:
    """Rows and images of one fold, and what the generator chose on its training material."""

    rows: pd.DataFrame
    images: dict[str, np.ndarray]
    chosen: dict[str, Any]


def reconstruct_fold(
    config: RunConfig,
    material: TrainingMaterial,
    test: StimulusSet,
    predicted: Embeddings,
    true: Embeddings,
    subjects: np.ndarray,
    number: int,
) -> FoldImages:
    """Reconstruct the test images of one fold, and the controls.

    Controls: ``nearest`` (training image nearest to the prediction), ``mean_image``, ``class_mean`` (mean image of
    the decoded class, where the test concepts were trained on), ``shuffled`` (the prediction of another test
    image) and ``oracle`` (the true embedding).

    Parameters
    ----------
    config
        Prior, generator and seed are taken from it.
    material
        Images and embeddings of the training split, and out-of-fold predictions.
    test
        The images that were seen.
    predicted, true
        Predicted embeddings of the test rows, and the true embedding of every test image.
    subjects : array of shape (n_rows,)
        Subject of each row.
    number
        Number of the fold, for seeds and the table.
    """
    if material.predicted is not None:
        targets = material.embeddings.select(material.predicted.ids)
        prior = config.prior.build().fit(material.predicted, targets)
        predicted = prior.sample(predicted, n_draws=1, seed=derive_seed(config.seed, "prior", number))
    generator = config.generator.build(material)
    seed = derive_seed(config.seed, "generator", number)

    concepts = test.concepts_of(predicted.ids)
    rows = pd.DataFrame(
        {"stimulus_id": predicted.ids, "concept": concepts, "subject": subjects, "fold": number}
    )
    made = {
        "decoded": generator.generate(predicted, seed=seed),
        "nearest": NearestConfig().build(material).generate(predicted, seed=seed),
        "mean_image": MeanImageGenerator(material).generate(predicted, seed=seed),
    }
    if set(concepts) <= set(material.concepts):
        classes = ClassMeanGenerator(material)
        rows["decoded_concept"] = classes.classify(predicted)
        made["class_mean"] = classes.generate(predicted, seed=seed)
    made["oracle"] = generator.generate(true.select(predicted.ids), seed=seed)

    height, width = material.images.shape[
        1:3
    ]  # of the stimuli: a coarse target must not make the task easier
    distinct = {i: resize_image(test.read_image(i), height, width) for i in pd.unique(predicted.ids)}
    images = {"seen": np.stack([distinct[i] for i in predicted.ids])}
    for name, stack in made.items():
        images[name] = np.stack([resize_image(image, height, width) for image in stack])
    chosen = generator.describe() if hasattr(generator, "describe") else {}
    return FoldImages(rows, images, chosen)


def derange(ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a row of another image for each row, shape (n_rows,); a single image keeps its own rows."""
    names = ids.astype(str)
    items = generator.permutation(np.unique(names))
    successor = dict(zip(items, np.roll(items, 1), strict=True))
    first = {item: int(np.flatnonzero(names == item)[0]) for item in items}
    return np.array([first[successor[name]] for name in names])
