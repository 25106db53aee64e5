"""From one trial, in the form of the run, to ranked pictures: shared by the decoders of every kind of stream.

Owns the encoders, the statistics and the gallery that a session decides with, the evidence of its decisions, and what
stands in for the run's own after an adaptation; and what becomes of markers and verdicts in any stream. It knows no
samples.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings, ImageLikelihood, Responses
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.parts.live.evidence import FEWEST_NAMED, Evidence, NamedDecisions, calibrate
from braindecode_vis.parts.live.stream_channels import read_pairs
from braindecode_vis.parts.live.stream_roles import Decision, Marker
from braindecode_vis.pipeline import new_trials
from braindecode_vis.pipeline.finished_run import FinishedRun, open_finished
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.predicting import (
    PictureGallery,
    average_folds,
    check_one_space,
    choose_folds,
    find_fits,
    find_tested_gallery,
    open_given_gallery,
    open_search,
    prepare_images,
)

#: Sentences that are remembered, so that none is told twice.
MOST_TOLD = 10_000


@dataclass
class JudgedPrediction:
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
                f"{self.run.folder.path} decodes categories, but live decoding ranks pictures; choose another run."
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
        self.calibrated_on, self._unscaled = "", why

    def describe_probabilities(self, *, named: bool = True) -> str:
        """Return what probabilities were fitted on, or why there are none yet, as a sentence.

        Parameters
        ----------
        named
            Whether it can be known which picture a decision is of; never of windows.
        """
        if self.calibrated_on:
            return f"Probabilities are fitted on {self.calibrated_on}."
        come = (
            f"They come after {FEWEST_NAMED} decisions whose picture is known."
            if named
            else "Windows have no known picture for fitting them, so there will be no probabilities."
        )
        return f"There are only similarities, no probabilities yet, since {self._unscaled}. {come}"

    def learn_from(self, unit: np.ndarray, shown: str | None) -> str:
        """Count in a reported decision, where probabilities are fitted on those; returns what changed, in words.

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
        return f"From now on there are probabilities, fitted on {self.calibrated_on}." if first else ""

    def _open_gallery(self) -> None:
        # Fails here, and not at the first epoch, where an encoder cannot take the subject.
        shape = (1, *self.own.data.shape[1:])
        tried = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        predicted = self.predict(tried)
        aligned = sorted({name for encoder in self.encoders for name in encoder.label_free_subjects})
        if aligned:
            raise DataError(
                f"the encoder aligns subjects by their own trials and has no alignment for {aligned[0]}, and one trial "
                "is not enough to compute it; give a subject of the run, or calibrate first."
            )
        subject = self.subject if self.encoders[0].has_subject_galleries else None
        self.centre, self.search = open_search(self.run, self.folds, self.candidates, subject)
        self.row_of = {str(name): row for row, name in enumerate(self.search.ids)}
        # Named so that spaces are compared once, and not with every trial.
        if predicted.space != self.search.space:
            raise DataError(
                f"predictions of the space {predicted.space!r} cannot be compared with the gallery of "
                f"{self.search.space!r}."
            )

    def as_trial(self, block: np.ndarray) -> Responses:
        """Return a block of one trial as the run's responses."""
        rows = self._row if len(block) == 1 else pd.concat([self._row] * len(block), ignore_index=True)
        return Responses.from_checked(block, self.own.dims, rows, self.own.unit, self.own.coords)

    def predict(self, block: np.ndarray) -> Embeddings:
        """Return what the folds predict of trials of shape (n_trials, ...), which have the axes of the run's."""
        return self.predict_trials(self.as_trial(block), self.encoders)

    def predict_trials(self, trials: Responses, encoders: Sequence[Any]) -> Embeddings:
        """Return the mean of what encoders predict of trials with every feature, one encoder for each fold."""
        predicted = [
            encoder.predict(fitted.select(trials))
            for fitted, encoder in zip(self.fitted, encoders, strict=True)
        ]
        if len(predicted) > 1:
            check_one_space(self.run, self.folds, predicted)
        return average_folds(predicted)

    def find_unit(self, predicted: Embeddings) -> np.ndarray:
        """Return the first prediction as it is compared, of length one, shape (n_features,)."""
        query = self.centre.apply(predicted).vectors[0]
        length = float(np.linalg.norm(query))
        return query / length if length else query

    def judge(self, predicted: Embeddings, key: str | None = None) -> JudgedPrediction:
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
        found = JudgedPrediction(unit, names, cosines, probability, names, probability)
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
        if self.candidates.unnamed:  # a code is no place in an array of pictures
            return None
        return named if named in self.row_of and named not in self.taught else None

    def _find_likelihood(self) -> ImageLikelihood | None:
        """Return what predicts an image anew from all its repetitions, if the one encoder that predicts has it.

        Predictions that are no posterior means are added up instead.
        """
        own = self.fitted[0].encoder
        is_own = len(self.encoders) == 1 and self.encoders[0] is own
        if not is_own or self.evidence.forgetting < 1 or not own.predicts_alike:
            return None
        found: ImageLikelihood | None = own.likelihood
        return found

    def find_rank(self, unit: np.ndarray, shown: str | None) -> int | None:
        """Return the rank of what was shown, from 1; None if that is not known or the gallery too large."""
        if shown is None or not self.search.is_exhaustive:
            return None
        above, tied = self.search.count_above(unit, self.row_of[shown])
        return 1 + above + tied  # ties count against it, as in the run's top-k

    def _name(self, rows: np.ndarray) -> tuple[str, ...]:
        return tuple(str(name) for name in self.search.ids[rows])

    def describe(self, *averaging: str, named: bool = True) -> dict[str, Any]:
        """Return the facts that all decoders report.

        Parameters
        ----------
        *averaging
            What a decision rests on.
        named
            As for `describe_probabilities`.
        """
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
            "probabilities": self.describe_probabilities(named=named),
        }  # fmt: skip

    def find_images(self, ids: Sequence[str]) -> list[Path | np.ndarray | None]:
        """Return the pictures of candidates, uint8 of shape (height, width, 3); None if one is not available."""
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


class MarkerDecoder:
    """What decoders of every kind of stream do with markers, verdicts and images; each adds how a trial is had.

    Parameters
    ----------
    judge
        Encoders, statistics and gallery that are decided with; what an adaptation has learnt stands in for the run's
        there.
    events
        Markers that show an image, and its id: a mapping or a file of such pairs. By default every marker does.
    repetitions
        Whether the evidence of markers of the same value adds up.
    reconstruct
        Whether images are made; each comes later, as a second `Decision` of the same number.
    """

    def __init__(
        self,
        judge: Judge,
        events: Mapping[str, str] | str | Path | None,
        *,
        repetitions: bool,
        reconstruct: bool,
    ) -> None:
        self.judge, self.run = judge, judge.run
        self._events = events if isinstance(events, Mapping | None) else read_pairs(Path(events), "events")
        self._repetitions = repetitions
        self._reconstructor = Reconstructor(judge.run, judge.folds) if reconstruct else None

    def know(self, ids: Sequence[str]) -> None:
        """Take markers that say these ids for the pictures of a block, whatever else the events say."""
        self.judge.taught |= {str(name) for name in ids}
        if self._events is not None:
            self._events = {**self._events, **{str(name): str(name) for name in ids}}

    def find_images(self, ids: Sequence[str]) -> list[Path | np.ndarray | None]:
        """Return the pictures of candidates; see `Judge.find_images`."""
        return self.judge.find_images(ids)

    def _begin(self, evidence: Evidence, *, averages: bool) -> list[str]:
        """Forget the stream before, and return sentences on statistics, repetitions and probabilities.

        Parameters
        ----------
        evidence
            That adds up from here on.
        averages
            Whether decisions are of trials with a marker, where repetitions are missed if the run averages those of its
            test.
        """
        self._told: set[str] = set()
        self._n_decisions = 0
        self.judge.evidence = evidence
        used = getattr(self.judge.statistics, "used", {})
        notes = [f"{where}: {words}." for where, words in used.items()]
        if averages and self.run.config.repeats.test == "averaged":
            notes.append("Each decision uses a single trial, but the test of the run averages repetitions.")
        return [*notes, self.judge.describe_probabilities(named=averages)]

    def _take_finished(self) -> Iterator[Decision | str]:
        if self._reconstructor is not None:
            yield from self._reconstructor.take_finished()

    def _finish_images(self) -> Iterator[Decision | str]:
        if self._reconstructor is not None:
            yield from self._reconstructor.finish()

    def _tell_once(self, sentence: str, key: str = "") -> Iterator[str]:
        if (key or sentence) not in self._told and len(self._told) < MOST_TOLD:
            self._told.add(key or sentence)
            yield sentence

    def _find_shown(self, value: str) -> str | None:
        named = self._events.get(value) if self._events is not None else value
        return self.judge.find_shown(named)

    def _lose(self, marker: Marker, why: str) -> Decision:
        self._n_decisions += 1
        value = str(marker.value).strip()
        return Decision(self._n_decisions - 1, marker.time, value, self._find_shown(value), lost=why)

    def _decide_trial(
        self,
        values: np.ndarray,
        marker: Marker | None,
        *,
        onset: float,
        notes: Sequence[str],
        began: float,
        arrived: float,
        delay_ms: float = 0.0,
    ) -> Iterator[Decision | str]:
        """Yield the decision on a trial, and sentences that follow from it; its image is asked for.

        Parameters
        ----------
        values
            The trial as the run's preprocessing made its own, before statistics are applied.
        marker
            None for a window.
        onset
            In s.
        notes
            Sentences on this decision.
        began, arrived
            When work on it began, and its last sample came, by ``time.perf_counter``.
        delay_ms
            Of causal filters.
        """
        judge = self.judge
        block = judge.statistics.apply(values, judge.subject, judge.session)
        cut = time.perf_counter()
        predicted = judge.predict(block)
        if len(predicted) > 1:  # a window that keeps its volumes: each is a trial, and all are of one picture
            mean = np.asarray(predicted.vectors).mean(axis=0, keepdims=True)
            predicted = Embeddings(mean, predicted.ids[:1], predicted.space)
        done = time.perf_counter()
        value = "" if marker is None else str(marker.value).strip()
        verdict = judge.judge(predicted, value if self._repetitions or marker is None else None)
        ended = time.perf_counter()
        shown = None if marker is None else self._find_shown(value)
        number, self._n_decisions = self._n_decisions, self._n_decisions + 1
        decision = Decision(
            number, onset, value, shown, embedding=predicted.vectors[0], **verdict.as_fields(),
            rank=judge.find_rank(verdict.unit, shown),
            latency={
                "wait": 1000 * (ended - arrived), "preprocess": 1000 * (cut - began), "predict": 1000 * (done - cut),
                "rank": 1000 * (ended - done), "delay": delay_ms,
            },
            epoch=block[0] if block.ndim == 3 else block[:1].T,
            notes=(*notes, judge.adaptation) if judge.adaptation else tuple(notes),
        )  # fmt: skip
        yield decision
        if words := judge.learn_from(verdict.unit, shown):
            yield words
        if self._reconstructor is not None and not self._reconstructor.ask(
            decision, judge.as_trial(block[:1]), predicted
        ):
            yield from self._tell_once("Images take longer than decisions: some decisions have none.")


# --- images of decisions, in a thread of their own -------------------------------------------------------------
# Images of decisions, made in a thread of their own so that decisions do not wait for them.
#
# Prior and generator are those of the run. While one image is made, the latest decision that came waits; others go
# without an image.


#: Seconds that the end of a session waits for the last image.
LAST_IMAGE_S = 60.0


class Reconstructor:
    """Makes images of decisions in a thread.

    Parameters
    ----------
    run, folds
        The run, and the folds that predict.

    Raises
    ------
    DataError
        If the run has made no images, and has no prior and generator that are fitted.
    """

    def __init__(self, run: FinishedRun, folds: list[int]) -> None:
        try:
            find_fits(run)
        except DataError as error:
            raise DataError(
                f"{run.folder.path} has no fitted prior and generator, which are needed to make images; "
                "run braindecode-vis "
                f"reconstruct {run.folder.path} first, or leave out --reconstruct."
            ) from error
        self._run, self._folds = run, folds
        self._asked: queue.Queue[tuple[Decision, Responses, Embeddings] | None] = queue.Queue(1)
        self._made: queue.SimpleQueue[Decision | str] = queue.SimpleQueue()
        self._busy = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, decision: Decision, trial: Responses, predicted: Embeddings) -> bool:
        """Ask for the image of a decision, and say whether there will be one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="reconstruction", daemon=True)
            self._thread.start()
        try:
            self._asked.put_nowait((decision, trial, predicted))
        except queue.Full:
            return False
        return True

    def take_finished(self) -> Iterator[Decision | str]:
        """Yield the decisions whose image is done, with it."""
        while not self._made.empty():
            yield self._made.get()

    def finish(self) -> Iterator[Decision | str]:
        """Wait for what was asked for, yield it, and end the thread."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(LAST_IMAGE_S)
            self._thread = None
        yield from self.take_finished()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            decision, trial, predicted = asked
            try:
                image = self._make(trial, predicted)
                self._made.put(replace(decision, image=image))
            except Exception as error:
                self._made.put(
                    f"No image could be made for decision {decision.number} ({type(error).__name__}: {error})."
                )

    def _make(self, trial: Responses, predicted: Embeddings) -> np.ndarray:
        chosen = [train(self._run)[number].select(trial) for number in self._folds]
        images = prepare_images(self._run, self._folds, chosen, trial, predicted)()[0]
        image = np.asarray(images[0])
        return image[0] if image.ndim == 4 else image  # the first of several draws
