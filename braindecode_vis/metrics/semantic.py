"""Semantic accuracy among n classes: whether a classifier names the reconstruction as it names the seen image.

The class of a seen image is what the classifier says of it. A reconstruction is a hit if that class has one of the k
highest scores among itself and n - 1 random other classes. Published code draws those classes (WAVE and MinD-Vis, with
a count of draws and a seed); the mean over all draws has a closed form, which is used here and has no noise.

References
----------
Chen et al. (2023), MinD-Vis, arXiv:2211.06956: n-way classification accuracy.
"""

from __future__ import annotations

import numpy as np

from braindecode_vis.checks import ConfigError, DataError, check_finite


def compute_semantic_table(
    seen_logits: np.ndarray, made_logits: np.ndarray, n: int, *, top_k: int = 1
) -> np.ndarray:
    """Return the probability of a hit of every reconstruction if every seen image were its own.

    Parameters
    ----------
    seen_logits : array of shape (n_seen, n_classes)
        Scores of the seen images; only the highest of each is used.
    made_logits : array of shape (n_made, n_classes)
        Scores of the reconstructions.
    n
        Number of classes among which the right one has to win, itself included.
    top_k
        How many of them may be named.

    Returns
    -------
    float array of shape (n_made, n_seen)
        Between 0 and 1; for a classifier that sees nothing top_k / n. A tie with another class is lost.

    Raises
    ------
    ConfigError
        If n is not between 2 and the number of classes, or top_k not between 1 and n - 1.

    Examples
    --------
    >>> logits = np.eye(4)
    >>> compute_semantic_table(logits, logits, 4).diagonal()
    array([1., 1., 1., 1.])
    """
    n_classes = seen_logits.shape[1]
    if made_logits.shape[1] != n_classes:
        raise DataError(f"logits of {n_classes} classes cannot meet those of {made_logits.shape[1]}.")
    if not 2 <= n <= n_classes or not 1 <= top_k < n:
        raise ConfigError(
            f"{n}-way semantic accuracy with the best {top_k} needs 2 <= n <= {n_classes} and 1 <= k < n."
        )
    for name, rows in (("seen", seen_logits), ("decoded", made_logits)):
        check_finite(rows, what=f"logits of {name} images", row_names=range(len(rows)), unit="image")
    classes = np.argmax(seen_logits, axis=1)
    own = made_logits[:, classes]  # (n_made, n_seen)
    ordered = np.sort(made_logits, axis=1)
    lower = np.stack([np.searchsorted(row, value, "left") for row, value in zip(ordered, own, strict=True)])
    return make_win_table(n_classes, n, top_k)[n_classes - 1 - lower]


def make_win_table(n_classes: int, n: int, top_k: int) -> np.ndarray:
    """Return the probability of a hit by the number of classes that are not beaten, shape (n_classes,).

    With b such classes, at most ``top_k - 1`` of them may be among the n - 1 that are drawn without replacement from
    the other ``n_classes - 1``: a hypergeometric distribution.
    """
    from scipy.stats import hypergeom

    not_beaten = np.arange(n_classes)
    return np.asarray(hypergeom.cdf(top_k - 1, n_classes - 1, not_beaten, n - 1), dtype=float)


def name_semantic_metric(n: int, top_k: int, classifier: str) -> str:
    """Return the name of the metric with everything that defines it.

    Examples
    --------
    >>> name_semantic_metric(50, 1, "efficientnet-lite0")
    '50_way_top1_semantic_accuracy@efficientnet-lite0'
    """
    return f"{n}_way_top{top_k}_semantic_accuracy@{classifier}"
