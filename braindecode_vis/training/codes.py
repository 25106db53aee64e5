"""Integers for the images, concepts and clusters of trials."""

from __future__ import annotations

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Responses, normalise_rows


def code_trials(responses: Responses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of all images, and the index of each trial's image and concept.

    A trial table without a `concept` column makes every image its own concept.
    """
    stimuli, ids = pd.factorize(responses.stimulus_ids)
    if "concept" in responses.trials:
        concepts, _ = pd.factorize(responses.trials["concept"].astype(str).to_numpy(dtype=object))
    else:
        concepts = stimuli
    return np.asarray(ids, dtype=object), stimuli.astype(np.int64), concepts.astype(np.int64)


def cluster_images(vectors: np.ndarray, trained: np.ndarray, n_clusters: int, *, seed: int) -> np.ndarray:
    """Return the cluster of each image by k-means of unit vectors, fitted on the trained images.

    Parameters
    ----------
    vectors : array of shape (n_images, n_features)
    trained : int array
        Rows that the centres are learnt from.
    n_clusters
        Number of clusters, at most that of the trained images.
    seed
        Decides the start.
    """
    from sklearn.cluster import KMeans

    unit = normalise_rows(vectors)
    kmeans = KMeans(min(n_clusters, len(trained)), n_init=1, random_state=seed % 2**32).fit(unit[trained])
    return kmeans.predict(unit).astype(np.int64)
