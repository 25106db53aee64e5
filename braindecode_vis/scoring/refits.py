"""Ranks after images were relabelled before folding and the encoder was fitted again, for encoders linear in targets.

A score after K folds sums "A teaches, B is tested" and the reverse, nearly the same number twice, so that a null that
permutes test images without a refit is too narrow. Where predictions are a fixed matrix times the targets of images, as
those of a ridge, a refit on permuted images is one product with permuted targets. Only products of targets enter ranks,
so that the Gram matrix of the targets is all that is permuted. A penalty that was chosen by the targets is chosen again
in every refit: its inner error is a quadratic form in the same matrix.

Knows nothing of brains or of how the matrices came about.

References
----------
Bengio and Grandvalet (2004), JMLR 5, 1089. Parker et al. (2007), Stratification bias in low signal microarray studies,
doi:10.1186/1471-2105-8-326.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from braindecode_vis.scoring.metrics.metric_registry import Metric
from braindecode_vis.scoring.retrieval import TIE_TOLERANCE, Retrieval

_ROUNDING = 1e-13  # of a squared length that is a difference of products
_VALUES = 1 << 22  # numbers of permuted Gram matrices that are held at a time (32 MB)


@dataclass(frozen=True)
class RelabelledFold:
    """One fold of a refit: what a linear encoder predicts of its test trials, by the targets of images.

    Parameters
    ----------
    weights : float array of shape (n_penalties, n_trials, n_images)
        A prediction is one row times the targets of all images.
    errors : float array of shape (n_penalties, n_images, n_images), or None
        The inner error of a penalty is the sum of this times the Gram matrix of the targets; None if there is no
        choice.
    own : int array of shape (n_trials,)
        Image of each test trial.
    gallery : int array of shape (n_gallery,)
        Candidates.
    centre : float array of shape (n_images,)
        Weights of the mean target that is taken off predictions and candidates before they are compared.
    """

    weights: np.ndarray
    errors: np.ndarray | None
    own: np.ndarray
    gallery: np.ndarray
    centre: np.ndarray


class Refits(NamedTuple):
    """How the own image of each test trial ranks after refits on relabelled images.

    Parameters
    ----------
    n_above, n_tied : int arrays of shape (n_refits, n_trials)
        As in `braindecode_vis.scoring.retrieval.Retrieval`.
    """

    n_above: np.ndarray
    n_tied: np.ndarray

    def score(self, metric: Metric, n: int, rows: np.ndarray, gallery_sizes: np.ndarray) -> np.ndarray:
        """Return a metric of retrieval of some trials after each refit, shape (n_refits,).

        Parameters
        ----------
        metric, n
            As in `find_metric`.
        rows : int array of shape (n_rows,)
        gallery_sizes : int array of shape (n_rows,)
            Candidates of each.
        """
        assert metric.compare is not None
        values = np.empty((len(self.n_above), len(rows)))
        for size in np.unique(gallery_sizes):
            of_size = np.flatnonzero(gallery_sizes == size)
            above, tied = (table[:, rows[of_size]].ravel() for table in (self.n_above, self.n_tied))
            nothing = np.empty((len(above), 0))
            ranked = Retrieval(
                np.zeros(len(above)),
                np.arange(size),
                above,
                tied,
                np.zeros(len(above)),
                nothing,
                nothing,
                "refits",
            )
            values[:, of_size] = metric.compare(ranked, n).reshape(len(values), -1)
        found: np.ndarray = (np.median if metric.statistic == "median" else np.mean)(values, axis=1)
        return found


def rank_relabelled(
    folds: Sequence[RelabelledFold],
    gram: np.ndarray,
    orders: np.ndarray,
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> Refits:
    """Return how the own image of each test trial ranks after refits on permuted targets.

    Parameters
    ----------
    folds
        Their trials, one after the other, are the columns of the result.
    gram : float array of shape (n_images, n_images)
        Products of the targets of the images, as they are compared: cosines follow from plain products, correlations
        from those of targets whose own mean is taken off.
    orders : int array of shape (n_refits, n_images)
        Whose target each image gets.
    advance
        Called with the number of refits done.
    """
    gram = np.asarray(gram, dtype=np.float64)
    n_trials = sum(len(fold.own) for fold in folds)
    above, tied = (np.empty((len(orders), n_trials), np.int32) for _ in range(2))
    step = max(1, _VALUES // gram.size)
    for start in range(0, len(orders), step):
        some = orders[start : start + step]
        drawn = gram[some[:, :, None], some[:, None, :]]  # (n_some, n_images, n_images)
        first = 0
        for fold in folds:
            last = first + len(fold.own)
            found = _rank_fold(fold, drawn)
            above[start : start + step, first:last], tied[start : start + step, first:last] = found
            first = last
        advance(len(some))
    return Refits(above, tied)


def _rank_fold(fold: RelabelledFold, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of one fold under each of several Gram matrices, (n_refits, n_trials) twice."""
    n_refits, n_images = gram.shape[:2]
    centre, errors = fold.centre, fold.errors
    chosen = np.zeros(n_refits, np.intp)
    if errors is not None:
        chosen = (gram.reshape(n_refits, -1) @ errors.reshape(len(errors), -1).T).argmin(axis=1)
    products = np.empty((n_refits, len(fold.own), n_images))  # of centred predictions with all targets
    lengths = np.empty((n_refits, len(fold.own)))  # squared, of these predictions
    largest = np.abs(gram).max()
    for penalty in np.unique(chosen):
        which = chosen == penalty
        weights = fold.weights[penalty] - centre
        products[which] = weights @ gram[which]
        found = np.einsum("rti,ti->rt", products[which], weights)
        # What rounding leaves of no prediction has no direction: it is equally far from everything, as in retrieval.
        lengths[which] = np.where(
            found > _ROUNDING * largest * np.abs(weights).sum(axis=1) ** 2, found, np.inf
        )
    by_centre = gram @ centre  # (n_refits, n_images)
    squares = np.einsum("rii->ri", gram) - 2 * by_centre + (by_centre @ centre)[:, None]
    squares = np.where(squares > _ROUNDING * largest, squares, np.inf)[:, fold.gallery]
    cosines = products[:, :, fold.gallery] - (products @ centre)[:, :, None]
    cosines /= np.sqrt(lengths)[:, :, None] * np.sqrt(squares)[:, None]
    place = np.full(n_images, -1)
    place[fold.gallery] = np.arange(len(fold.gallery))
    true = cosines[:, np.arange(len(fold.own)), place[fold.own]][:, :, None]
    n_above = (cosines > true + TIE_TOLERANCE).sum(axis=2)
    n_close = (np.abs(cosines - true) <= TIE_TOLERANCE).sum(axis=2)
    return n_above, n_close - 1
