"""From one trial, in the form in which a run learnt, to ranked pictures: what decoders of every kind of stream share.

Owns the encoders, the statistics and the gallery that a session decides with, the evidence of its decisions, and what
stands in for the run's own after an adaptation. Knows no stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Embeddings, ImageLikelihood, Responses
from braindecode_vis.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.live.evidence import FEWEST_NAMED, Evidence, NamedDecisions, calibrate
from braindecode_vis.pipeline import new_trials
from braindecode_vis.pipeline.finished_run import FinishedRun, open_finished
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.predicting import (
    PictureGallery,
    average_folds,
    check_one_space,
    choose_folds,
    find_tested_gallery,
    open_given_gallery,
    open_search,
)


@dataclass
class Verdict:
    """What was found for one prediction; the fields are those of `Decision`."""

    unit: np.ndarray
    top: tuple[str, ...]
    similarity: np.ndarray
    probability: np.ndarray
    posterior_top: tuple[str, ...]
    posterior: np.ndarray
    n_evidence: int = 1

    def as_fields(self) -> dict[str, Any]:
        """Return what goes into a `Decision`."""
        return {key: value for key, value in vars(self).items() if key != "unit"}


@dataclass(repr=False)
class Judge:
    """Ranks pictures for single trials by a finished run.

    Parameters
    ----------
    source
        A finished run, or its folder.
    gallery
        Candidates: a folder of pictures or a ``.npy`` of them, a folder of embeddings, `Embeddings`; by default the
        pictures that the run was tested with.
    fold
        The fold that predicts; by default the only one, or the mean of all.
    named
        Subject whose statistics are applied; by default the one subject of the run, or else an unknown one.
    session
        Of the stream, in the same sense.
    n_top
        Candidates to list.

    Attributes
    ----------
    statistics
        What is applied to a trial: an object with ``apply(block, subject, session)``. See `adopt`.
    taught
        Pictures that an adaptation is shown: decided as all others, and counted in no score.
    """

    source: FinishedRun | str | Path
    gallery: Any = None
    fold: int | None = None
    named: str | None = None
    session: str = "live"
    n_top: int = 5
    evidence: Evidence = field(default_factory=Evidence)
    adaptation: str = ""
    taught: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        source = self.source
        self.run = source if isinstance(source, FinishedRun) else open_finished(Path(source))
        if self.run.config.decodes_categories:
            raise ConfigError(
                f"{self.run.folder.path} decodes categories, and live decoding ranks pictures; choose another run."
            )
        if self.n_top < 1:
            raise ConfigError(f"n_top is {self.n_top!r}, but at least one candidate is listed.")
        self.folds = choose_folds(self.run, self.fold)
        self.own = new_trials.find_responses(self.run)
        subjects = self.own.trials["subject"].astype(str).unique()
        self.subject = self.named or (str(subjects[0]) if len(subjects) == 1 else "live")
        self.statistics: Any = new_trials.find_learnt(self.run).for_session(self.subject, self.session)
        self.fitted = [train(self.run)[number] for number in self.folds]
        self.encoders: list[Any] = [fitted.encoder for fitted in self.fitted]
        self.candidates: PictureGallery = (
            find_tested_gallery(self.run, self.folds)
            if self.gallery is None
            else open_given_gallery(self.run, self.folds[0], self.gallery)
        )
        # One table for all trials: what changes from trial to trial is never looked at.
        self._row = pd.DataFrame(
            {
                "subject": [self.subject], "session": self.session, "run": "live", "stimulus_id": "live",
                "repetition": 0, "split": "test", "concept": "live", "known": False,
            }
        )  # fmt: skip
        self._open_gallery()
        self._named: NamedDecisions | None = None
        self.temperature, self.calibrated_on = calibrate(
            self.run, self.folds[0], self.encoders[0], self.centre, self.subject
        )
        if self.temperature is None:
            self._forget_scale("the encoder has learnt from all training trials")

    def adopt(self, *, encoders: Sequence[Any] | None = None, statistics: Any = None, words: str) -> None:
        """Decide with other encoders or statistics from now on, for example adapted ones.

        Parameters
        ----------
        encoders
            One for each fold that predicts, in the space of the run's own.
        statistics
            With ``apply(block, subject, session)``, see `LearntStatistics.apply`.
        words
            What was done, for the protocol; joins what was done before.
        """
        if encoders is not None:
            self.encoders = list(encoders)
            self._forget_scale("the encoder was adapted")
        if statistics is not None:
            self.statistics = statistics
        self.adaptation = f"{self.adaptation}; {words}" if self.adaptation else words

    def _forget_scale(self, why: str) -> None:
        self.temperature, self._named = None, NamedDecisions(self.search)
        self.calibrated_on = (
            f"nothing yet, since {why}: there are none before {FEWEST_NAMED} decisions whose picture is known, on "
            "which they are fitted then"
        )

    def learn_from(self, unit: np.ndarray, shown: str | None) -> str:
        """Count in a decision that was told, where probabilities are fitted on those; returns what changed, in words.

        Parameters
        ----------
        unit
            From `find_unit`.
        shown
            The picture of the gallery that was shown, if it is known.
        """
        named = self._named
        if shown is None or named is None:
            return ""
        scale = named.add(unit, self.row_of[shown])
        if scale is None or named is not self._named:  # adapted meanwhile, in the thread of the page
            return ""
        first = self.temperature is None
        self.temperature = scale
        self.calibrated_on = "earlier decisions of this session whose picture is known"
        return f"Probabilities from here on: fitted on {self.calibrated_on}." if first else ""

    def _open_gallery(self) -> None:
        # Fails here, and not at the first epoch, where an encoder cannot take the subject.
        shape = (1, *self.own.data.shape[1:])
        tried = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        predicted = self.predict(tried)
        aligned = sorted({name for encoder in self.encoders for name in encoder.label_free_subjects})
        if aligned:
            raise DataError(
                f"the encoder aligns subjects by their own trials and does not know {aligned[0]}, of whom one trial is "
                "no basis; name a subject of the run, or calibrate first."
            )
        subject = self.subject if self.encoders[0].has_subject_galleries else None
        self.centre, self.search = open_search(self.run, self.folds, self.candidates, subject)
        self.row_of = {str(name): row for row, name in enumerate(self.search.ids)}
        # Named so that spaces are compared once, and not with every trial.
        if predicted.space != self.search.space:
            raise DataError(
                f"predictions of the space {predicted.space!r} cannot meet the gallery of {self.search.space!r}."
            )

    def as_trial(self, block: np.ndarray) -> Responses:
        """Return a block of one trial as the run's responses."""
        rows = self._row if len(block) == 1 else pd.concat([self._row] * len(block), ignore_index=True)
        return Responses.from_checked(block, self.own.dims, rows, self.own.unit, self.own.coords)

    def predict(self, block: np.ndarray) -> Embeddings:
        """Return what the folds predict of trials of shape (n_trials, ...), which have the axes of the run's."""
        trial, predicted = self.as_trial(block), []
        for fitted, encoder in zip(self.fitted, self.encoders, strict=True):
            chosen = trial if fitted.selection is None else fitted.selection.apply(trial)
            predicted.append(encoder.predict(chosen))
        if len(predicted) > 1:
            check_one_space(self.run, self.folds, predicted)
        return average_folds(predicted)

    def find_unit(self, predicted: Embeddings) -> np.ndarray:
        """Return the first prediction as it is compared, of length one, shape (n_features,)."""
        query = self.centre.apply(predicted).vectors[0]
        length = float(np.linalg.norm(query))
        return query / length if length else query

    def judge(self, predicted: Embeddings, key: str | None = None) -> Verdict:
        """Return the best candidates for a prediction.

        Parameters
        ----------
        predicted
            Of one trial.
        key
            Whose evidence it adds to; None keeps none.
        """
        unit = self.find_unit(predicted)
        scale = self.temperature
        best, cosines = self.search.find(unit, self.n_top)
        probability = (
            np.empty(0)
            if scale is None
            else np.exp(scale * cosines - self.search.sum_exponentials(unit, scale))
        )
        names = self._name(best)
        found = Verdict(unit, names, cosines, probability, names, probability)
        if key is None:
            return found
        known = self._find_likelihood()
        added = unit if known is None else np.concatenate([unit, predicted.flat()[0]])
        total, found.n_evidence = self.evidence.add(key, added)
        if (n := found.n_evidence) > 1:
            # Log-likelihoods add, and are linear in the candidate: one search with the sum.
            total, vectors = np.split(total, [len(unit)])
            size = float(np.linalg.norm(total))
            if known is not None:
                again = known.combine(vectors / n, n).reshape(predicted.vectors.shape)
                total = size * self.find_unit(replace(predicted, vectors=again.astype(np.float32)))
            best, near = self.search.find(total, self.n_top)
            found.posterior_top = self._name(best)
            if scale is None:
                return found
            found.posterior = np.exp(scale * size * near - self.search.sum_exponentials(total, scale * size))
        return found

    def find_shown(self, named: str | None) -> str | None:
        """Return what a marker names if a decision on it can be scored: it is in the gallery, and taught nothing."""
        return named if named in self.row_of and named not in self.taught else None

    def _find_likelihood(self) -> ImageLikelihood | None:
        """Return what predicts an image anew from all its repetitions, if the one encoder that predicts has it."""
        own = self.fitted[0].encoder
        if len(self.encoders) > 1 or self.encoders[0] is not own or self.evidence.forgetting < 1:
            return None
        found: ImageLikelihood | None = own.describe_likelihood()
        return found

    def find_rank(self, unit: np.ndarray, shown: str | None) -> int | None:
        """Return the rank of what was shown, from 1; None where that is not known or the gallery too large."""
        if shown is None or not self.search.is_exhaustive:
            return None
        above, tied = self.search.count_above(unit, self.row_of[shown])
        return 1 + above + tied  # ties count against it, as in the run's top-k

    def _name(self, rows: np.ndarray) -> tuple[str, ...]:
        return tuple(str(name) for name in self.search.ids[rows])

    def describe(self, *averaging: str) -> dict[str, Any]:
        """Return the facts that all decoders tell; `averaging` says what a decision rests on."""
        config = self.run.config
        protocol = [
            f"finished run {config.name} ({config.dataset.kind}) on a stream",
            self.adaptation or "nothing fitted on it",
            *(["probabilities fitted on its earlier decisions"] if self._named is not None else []),
            f"fold {self.folds[0]}" if len(self.folds) == 1 else f"mean of {len(self.folds)} folds",
            *averaging,
            f"target {config.target.kind}",
            f"gallery of {self.candidates.words}",
            f"centre {config.retrieval.centre}",
        ]
        return {
            "run": str(self.run.folder.path), "name": config.name, "protocol": "; ".join(protocol),
            "gallery": self.candidates.words, "gallery_size": len(self.search),
            "n_top": min(self.n_top, len(self.search)), "chance": 1 / len(self.search), "unit": self.own.unit,
            "subject": self.subject, "session": self.session, "folds": self.folds, "temperature": self.temperature,
            "calibrated_on": self.calibrated_on, "adaptation": self.adaptation,
        }  # fmt: skip

    def find_images(self, ids: Sequence[str]) -> list[Path | np.ndarray | None]:
        """Return the pictures of candidates, uint8 of shape (height, width, 3); None where one is not at hand."""
        stimuli = self.candidates.stimuli
        if stimuli is None or not stimuli.has_pixels:
            return [None] * len(ids)
        found: list[Path | np.ndarray | None] = []
        for name in ids:
            try:
                found.append(stimuli.read_image(str(name)))
            except BraindecodeVisError:  # listed, but its file is elsewhere
                found.append(None)
        return found
