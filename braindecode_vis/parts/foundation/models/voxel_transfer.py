"""A new subject for a fitted `voxel_clusters` encoder, and responses that its universal encoder predicts.

Owns the one call that a study of new subjects needs, `transfer_to_subject`. Everything of it that needs no further
images is `NetworkEncoder.adapt`, which commands and analyses (``few_shot``, method ``fine_tuned``) call themselves.

References
----------
Brain-IT, arXiv:2510.25976.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from braindecode_vis.base.arrays import Embeddings, Responses, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import seeded
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.parts.foundation.models.universal_encoder import PersonTrials, UniversalEncoder
from braindecode_vis.parts.foundation.models.voxel_clusters import VoxelClusters
from braindecode_vis.pipeline.synthetic import PREFIX, add_synthetic, join_embeddings
from braindecode_vis.preprocessing.alignment import fit_zscore

if TYPE_CHECKING:
    from braindecode_vis.training.network_encoder import NetworkEncoder

PER_TRIAL = 4  # synthetic trials beside each measured one, as in the paper's transfer


def transfer_to_subject(
    encoder: NetworkEncoder, responses: Responses, targets: Embeddings, *, images: Embeddings | None = None
) -> NetworkEncoder:
    """Return an encoder that also knows a new subject; the given one stays as it is.

    Parameters
    ----------
    encoder
        Fitted on other subjects, with the network ``voxel_clusters``.
    responses, targets
        Some trials of the new subject, with one target per trial in the space of the first training. Rows are as wide
        as those of the training (`Responses.coords` ``n_voxels_of`` says how many of a row are voxels).
    images
        Targets of images that the subject was not shown, such as those of the other subjects' training. The universal
        encoder predicts the subject's responses to 4 of them per trial, drawn by the encoder's seed; these are trained
        on, too. None trains on measured trials alone.

    Raises
    ------
    ConfigError
        If the encoder has another network.
    DataError
        If axes or target space differ from those of the first training, or there is more than one new subject.
    """
    network = encoder.require_fit().model.network
    if not isinstance(network, VoxelClusters):
        raise ConfigError(
            f"only the network voxel_clusters is transferred by codes of voxels, but this encoder has "
            f"{encoder.config.network.kind}; use encoder.adapt."
        )
    if images is not None:
        subjects = sorted(set(responses.trials["subject"].astype(str)))
        if len(subjects) != 1:
            raise DataError(
                f"responses to further images are predicted for one new subject at a time, but there are trials of "
                f"{', '.join(subjects)}; transfer them one after the other."
            )
        seed = derive_seed(encoder.seed, "transfer")
        chosen = make_generator(seed, "images").permutation(len(images))[: PER_TRIAL * responses.n_trials]
        images = images.take(np.sort(chosen))
        with seeded(seed):
            synthetic = _predict_responses(network, responses, targets, images)
        responses = add_synthetic(responses, synthetic)
        named = Embeddings(images.vectors, list(synthetic.stimulus_ids), images.space)
        targets = join_embeddings(targets, named)
    return encoder.adapt(responses, targets, trainable="subject", lr_scale=1.0)


def _predict_responses(
    network: VoxelClusters, responses: Responses, targets: Embeddings, images: Embeddings
) -> Responses:
    """Return what the universal encoder expects of the subject's voxels, in the unit of the responses."""
    who = str(responses.trials["subject"].iloc[0])
    n_own = count_own_voxels(responses).get(who)
    data = np.asarray(responses.data, np.float32).reshape(responses.n_trials, -1)
    n_rest = data.shape[1] // responses.data.shape[1]
    n_voxels = data.shape[1] if n_own is None else n_own * n_rest
    made = np.zeros((len(images), data.shape[1]), np.float32)
    made[:, :n_voxels] = predict_images(
        network.universal, data[:, :n_voxels], targets.flat(), images.flat(), updates=network.new_updates
    )
    trials = pd.DataFrame(
        {
            "subject": who, "session": "synthetic", "run": "synthetic",
            "stimulus_id": [PREFIX + str(name) for name in images.ids], "repetition": 0, "split": "train",
            "concept": [PREFIX + str(name) for name in images.ids], "synthetic": True,
        }
    )  # fmt: skip
    shape = (len(images), *responses.data.shape[1:])
    return Responses(made.reshape(shape), responses.dims, trials, responses.unit, responses.coords)


def predict_images(
    universal: UniversalEncoder, data: np.ndarray, targets: np.ndarray, images: np.ndarray, *, updates: int
) -> np.ndarray:
    """Fit codes of voxels to the frozen network and return their responses to other images.

    Parameters
    ----------
    universal
        Fitted on other subjects.
    data : array of shape (n_trials, n_voxels)
        Measured responses, in any unit.
    targets, images : arrays of shape (n_trials, n_values) and (n_images, n_values)
        Image tokens of the trials, and of the other images, side by side.
    updates
        Steps of the fit.

    Returns
    -------
    float32 array of shape (n_images, n_voxels)
    """
    n_tokens, scale = len(universal.position), fit_zscore(data)
    scaled, tokens = torch.from_numpy(scale.apply(data)), torch.from_numpy(np.array(targets, np.float32))
    tokens = tokens.unflatten(1, (n_tokens, -1))
    person = PersonTrials(len(data), lambda rows: (scaled[rows], tokens[rows]))
    codes = universal.fit([person], [universal.make_codes(data.shape[1])], updates=updates, frozen=True)
    return np.asarray(universal.predict(images, codes[0]) * scale.std + scale.mean, np.float32)
