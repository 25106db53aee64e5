"""Probability of each candidate, and the accumulated evidence of several decisions.

The probability of a candidate is the softmax over the gallery of its cosine times a number, the inverse temperature,
that is fitted once on training trials by maximum likelihood. Log-likelihoods of several decisions add. As they are
linear in the candidate, their sum is the cosine with the sum of the predictions (each of length one): the posterior
over a gallery of any size needs one more search, and one vector of memory. A single prediction is shrunk for the noise
of one trial, most where there is little to see; an encoder that knows its noise predicts anew from all repetitions.

What is calibrated: the inverse temperature, for single decisions like the trials that it was fitted on, with training
images as candidates. What is not: other sizes and kinds of galleries, and sums. Trials are taken to be independent
given the image, and slow noise makes repetitions and overlapping windows alike, so that many make too sure.

An encoder is sure of trials that it has learnt from. Where a run has no others, there is no probability until the
session has named enough pictures that were shown: it is fitted on the decisions so far then, and holds for later ones.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.contracts import predict_by_inner_folds
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.learning import pick_training, predict_out_of_fold, train
from braindecode_vis.scoring.retrieval import Centre, GallerySearch

REFITTING = "refitting without each image, for probabilities"  # said while it lasts
#: Trials and candidates that the temperature is fitted on, at most.
MOST_FITTED = 1000
#: Values of the trials up to which an encoder without kept predictions makes them anew; a linear Gaussian model, which
#: takes 5 s of processor time for the demo's 25 million, for eight times as many.
CHEAP_FIT = 4_000_000
#: Processor time in seconds of a fit up to which an average of encoders is fitted twice more, on half of the images.
CHEAP_AVERAGE = 30.0
#: Images whose evidence is kept, the latest ones.
MOST_KEPT = 1024
#: Decisions whose picture is known before probabilities are fitted on them, how many are kept, and how often.
FEWEST_NAMED, MOST_NAMED, EVERY_NAMED = 20, 200, 20
#: Above, one candidate takes all the probability for a difference of one thousandth in cosine.
HIGHEST = 1e4


def fit_temperature(similarity: np.ndarray, truth: np.ndarray) -> float:
    """Return the inverse temperature under which the true candidates are likeliest, 0 where chance is likelier.

    Parameters
    ----------
    similarity : array of shape (n_trials, n_candidates)
        Cosines.
    truth : int array of shape (n_trials,)
        Column of the true candidate of each trial.

    Examples
    --------
    >>> fit_temperature(np.array([[0.2, 0.1], [0.1, 0.2], [0.2, 0.1]]), np.array([0, 1, 1])).__round__(2)
    6.93
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    own = similarity[np.arange(len(truth)), truth]

    def lose(scale: float) -> float:
        return float(np.mean(logsumexp(scale * similarity, axis=1) - scale * own))

    # Convex in the scale: its slope at 0 says whether the truth is above the mean of the candidates at all.
    if (own - similarity.mean(axis=1)).mean() <= 0:
        return 0.0
    found = minimize_scalar(lambda log: lose(np.exp(log)), bounds=(-3.0, np.log(HIGHEST)), method="bounded",
                            options={"xatol": 1e-6})  # fmt: skip
    return float(np.exp(found.x))


def calibrate(
    run: FinishedRun, number: int, encoder: Any, centre: Centre, subject: str
) -> tuple[float | None, str]:
    """Return the inverse temperature of the predictions of one fold, and what it was fitted on, in words.

    It is None if the encoder has learnt from all training trials.

    Parameters
    ----------
    run, number
        The run, and its fold.
    encoder, centre
        Of this fold.
    subject
        Whose gallery is taken, where every subject has one.
    """
    responses, targets = pick_training(run, number)
    found = _predict_training(run, number, encoder, responses, targets)
    if found is None:
        return None, ""
    predicted, words = found
    named, draw = predicted.ids.astype(str), np.random.default_rng(0)
    ids = pd.unique(named)
    if len(ids) > MOST_FITTED:
        ids = draw.choice(ids, MOST_FITTED, replace=False)
    rows = np.flatnonzero(np.isin(named, ids))
    if len(rows) > MOST_FITTED:
        rows = np.sort(draw.choice(rows, MOST_FITTED, replace=False))
    shown, first = np.unique(targets.ids.astype(str), return_index=True)
    images = Embeddings(
        np.asarray(targets.vectors)[first[np.searchsorted(shown, ids.astype(str))]], ids, targets.space
    )
    own = subject if encoder.has_subject_galleries else None
    gallery = centre.apply(encoder.map_targets(images, own))
    queries = centre.apply(Embeddings(predicted.vectors[rows], named[rows], predicted.space))
    similarity = normalise_rows(queries.vectors) @ normalise_rows(gallery.vectors).T
    scale = fit_temperature(similarity, pd.Index(ids).get_indexer(pd.Index(named[rows])))
    repeats = ", averaged over their repetitions," if run.config.repeats.train == "averaged" else ""
    return scale, f"{len(rows)} training trials{repeats} {words}, among {len(ids)} training images"


def _predict_training(
    run: FinishedRun, number: int, encoder: Any, responses: Responses, targets: Embeddings
) -> tuple[Embeddings, str] | None:
    """Return predictions of training trials by what has not learnt from them; None if that cannot be had."""
    words, config = "predicted by fits that had not seen their images", run.config.encoder
    space = encoder.predict(responses.select([0])).space
    try:
        kept = predict_out_of_fold(run)[number].predicted
        if kept.space == space and encoder.predicts_alike and len(kept):
            return kept, words
    except BraindecodeVisError:  # nothing needed them, so that they were not made
        pass
    if config.kind == "network":
        held = np.isin(responses.stimulus_ids.astype(str), encoder.require_fit().held_out)
        if held.sum() >= 10:
            return encoder.predict(responses.select(held)), "which the network had held out"
        return None
    record = store.read_provenance(train(run)[number].artifact.path / store.PROVENANCE)
    took = record.get("profile", {}).get("cpu_seconds", np.inf)
    refitting = (
        f"{REFITTING} (the training took {took:.0f} s of processor time)" if np.isfinite(took) else REFITTING
    )
    if config.kind == "average":
        if took > CHEAP_AVERAGE:
            return None
        try:
            with run.listener.progress(refitting, None):
                made = predict_by_inner_folds(encoder, responses, targets, n_folds=2, compared=True)
        except BraindecodeVisError:  # half of the images may be too few, or a table of captions gone
            return None
    elif responses.data.size <= CHEAP_FIT * (8 if config.kind == "linear_gaussian" else 1):
        with run.listener.progress(refitting, None):
            made = encoder.predict_out_of_fold(responses, targets)
    else:
        return None
    return (made, words) if made.space == space and len(made) else None


@dataclass
class NamedDecisions:
    """The last decisions whose picture is known, from which the inverse temperature is fitted as they come.

    Parameters
    ----------
    search
        The gallery, of which at most `MOST_FITTED` candidates are compared.
    """

    search: GallerySearch
    _units: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=MOST_NAMED))
    _rows: deque[int] = field(default_factory=lambda: deque(maxlen=MOST_NAMED))
    _n: int = 0

    def add(self, unit: np.ndarray, row: int) -> float | None:
        """Add a prediction of length one and the row of its picture; returns a new temperature when it is time."""
        self._units.append(unit)
        self._rows.append(row)
        self._n += 1
        if self._n < FEWEST_NAMED or self._n % EVERY_NAMED:
            return None
        rows, size = np.array(self._rows), len(self.search)
        drawn = np.arange(size)
        if size > MOST_FITTED:
            drawn = np.union1d(rows, np.random.default_rng(0).choice(size, MOST_FITTED, replace=False))
        similarity = np.stack(self._units) @ self.search.read_units(drawn).T
        # One wrong decision in so many at least: a gallery that was always right so far is no proof forever.
        return min(fit_temperature(similarity, np.searchsorted(drawn, rows)), self._bound(similarity))

    @staticmethod
    def _bound(similarity: np.ndarray) -> float:
        """Return the temperature at which the mean best candidate has what n right of n decisions prove."""
        from scipy.optimize import brentq
        from scipy.special import logsumexp

        most, best = 1 - 1 / (len(similarity) + 2), similarity.max(axis=1)

        def exceed(log: float) -> float:
            scale = np.exp(log)
            return float(np.exp(scale * best - logsumexp(scale * similarity, axis=1)).mean()) - most

        high = np.log(HIGHEST)
        return HIGHEST if exceed(high) < 0 or exceed(-3.0) > 0 else float(np.exp(brentq(exceed, -3.0, high)))


@dataclass
class Evidence:
    """Sums of predictions of length one, for each image that is shown again, or over time.

    Parameters
    ----------
    forgetting
        What is left of earlier windows when the next one comes, from 0 to 1; for windows alone.
    """

    forgetting: float = 1.0
    _sums: OrderedDict[str, tuple[np.ndarray, int]] = field(default_factory=OrderedDict)

    def add(self, key: str, unit: np.ndarray) -> tuple[np.ndarray, int]:
        """Add a prediction of length one, shape (n_features,), to what is known of `key`.

        Returns
        -------
        total : array of shape (n_features,)
        n
            How many were added so far.
        """
        total, n = self._sums.pop(key, (np.zeros(len(unit)), 0))
        kept = (self.forgetting * total + unit, n + 1)
        self._sums[key] = kept
        if len(self._sums) > MOST_KEPT:
            self._sums.popitem(last=False)
        return kept
