"""Apply a finished run to new trials: predictions, ranks in any gallery, images. Nothing is fitted.

Owns which folds predict, the gallery, and the known true images. Selection, encoders, target encoder,
prior and generator come from the run folder. With one fold, its predictions are taken; with several that share a space,
their mean; folds with spaces of their own cannot be averaged, and one is to be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses, check_same_space
from braindecode_vis.base.checks import ConfigError, DataError, NoResultError
from braindecode_vis.base.contracts import BrainEncoder, Context, ImageEncoder, find_class
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.stimuli import ImageRows, StimulusSet
from braindecode_vis.base.store import Artifact
from braindecode_vis.config import RunConfig
from braindecode_vis.datasets.array_folder import load_array
from braindecode_vis.datasets.own_data import Pictures, are_unnamed, make_picture_set
from braindecode_vis.embeddings.caption_bank import caption_images, read_caption_bank
from braindecode_vis.embeddings.image_bank import is_image_bank, read_image_bank
from braindecode_vis.embeddings.image_descriptions import read_captions_or_attributes
from braindecode_vis.generation.captions import WrittenCaptions, write_with_encoder
from braindecode_vis.pipeline.decoding import (
    decode_low_level,
    make_generator_data,
    map_for_generator,
    name_material,
    name_reconstruction,
    name_retrieval,
    open_branch,
    open_low_level,
    predict_branch,
)
from braindecode_vis.pipeline.finished_run import FinishedRun
from braindecode_vis.pipeline.galleries import GallerySource, map_bank, order_by_gallery
from braindecode_vis.pipeline.image_files import DrawnImages
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.new_trials import NewTrials
from braindecode_vis.pipeline.preparing import embed, embed_cached, name_fold, pick_trials, preprocess
from braindecode_vis.pipeline.runs import ProgressListener, Run, SilentListener
from braindecode_vis.pipeline.scoring import describe_choices, open_text_side, read_descriptions
from braindecode_vis.report import notebook
from braindecode_vis.scoring.caption_retrieval import retrieve_nearest
from braindecode_vis.scoring.caption_scores import DECODERS, NEAREST
from braindecode_vis.scoring.retrieval import Centre, GallerySearch, Retrieval, compute_ranks


@dataclass(frozen=True)
class PictureGallery:
    """Candidates that predictions are searched in.

    Parameters
    ----------
    embeddings
        In the target space, one row per picture.
    stimuli
        The pictures themselves, where they are known.
    words
        What they are.
    place
        Of a gallery of descriptions: ``place(source, subject)`` returns them in the space of the comparison.
    texts
        Of such a gallery: the description of each candidate.
    unnamed
        Whether the pictures are an array, whose ids are places alone: no number that a trial or a marker says is one.
    """

    embeddings: Embeddings
    stimuli: StimulusSet | None
    words: str
    place: Callable[[GallerySource, str | None], Embeddings] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    unnamed: bool = False


@dataclass(frozen=True)
class RankedPart:
    """Rows that share a gallery: both sides as they were compared, and what ranks first."""

    rows: np.ndarray
    queries: Embeddings
    gallery: Embeddings
    retrieval: Retrieval


@dataclass(repr=False)
class RunPredictions:
    """What a finished run says of new trials.

    Parameters
    ----------
    run
        The run.
    trials : DataFrame of n_trials rows
        The predicted trials, repetitions averaged where the run averages those of its test trials. The column `known`
        says whether a trial says what it showed, and `row` where it (or its first repetition) is among the trials
        that were given.
    folds
        Folds that predicted.
    notes
        What was done, one sentence each.
    transductive
        Whether whitening, scaling or the alignment of a subject was learnt from the new trials themselves.
    predicted
        Embeddings in the space of the comparison; None for a run that decodes categories.
    candidates
        The gallery; None for a run that decodes categories.
    decisions : DataFrame of n_trials rows
        A column per class; None for a run that finds images.
    images
        Whether reconstructions were asked for.
    context
        The pairs of picture and response that the encoder was given, in words; empty if there were none.
    """

    run: FinishedRun
    trials: pd.DataFrame
    folds: list[int]
    notes: tuple[str, ...]
    transductive: bool
    predicted: Embeddings | None = None
    candidates: PictureGallery | None = None
    parts: list[RankedPart] = field(default_factory=list)
    decisions: pd.DataFrame | None = None
    n_top: int = 5
    images: bool = True
    context: str = ""
    _decode: Callable[[], tuple[ImageRows, dict[str, list[list[str]]]]] | None = None

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        return f"<RunPredictions: {len(self)} trials by the run {self.run.config.name!r}>"

    def _repr_html_(self) -> str:
        """Show what ranks first, and those scores and decoded pictures that were made already."""
        n = min(notebook.N_PICTURES, len(self))
        shown = [notebook.show_sentences([f"{len(self)} trials by the run {self.run.config.name}"])]
        # A notebook shows an object without being asked, so this makes no image and no score, which may take minutes.
        if "scores" in self.__dict__ and len(self.scores):
            decoded = self.scores[self.scores["method"] == "decoded"]
            columns = ["split", "metric", "value", "ci_low", "ci_high", "chance", "n_queries"]
            shown.append(notebook.show_table(decoded[columns]))
        if self.decisions is not None:
            shown.append(notebook.show_table(self.classes.head(n)))
        else:
            shown.append(self._show_ranking(n))
        later = [name for name in ("scores", "reconstructions") if name not in self.__dict__]
        if self.decisions is not None or not self.makes_images:
            later = [name for name in later if name != "reconstructions"]
        if later:
            words = f"{' and '.join(later)}: computed when you first use them"
            shown.append(notebook.show_sentences([words]))
        return "".join([*shown, notebook.show_sentences(self.notes)])

    def _show_ranking(self, n: int) -> str:
        first = self.retrieved[self.retrieved["trial"] < n]
        by_place = [list(group["picture"].astype(str)) for _, group in first.groupby("place", sort=True)]
        known = self.trials["known"].to_numpy(bool)[:n]
        shown = self.trials["stimulus_id"].astype(str).to_numpy()[:n]
        names = [
            f"trial {row}{f': {name}' if told else ''}"
            for row, (name, told) in enumerate(zip(shown, known, strict=True))
        ]
        rows: dict[str, list[np.ndarray | None]] = {
            "seen": [self._find_seen(name) if told else None for name, told in zip(shown, known, strict=True)]
        }
        if "_decoded" in self.__dict__:
            rows["decoded"] = notebook.take_pictures(self.reconstructions, n)
        rows |= {
            f"place {place}": [self.read_picture(name) for name in ids]
            for place, ids in enumerate(by_place, 1)
        }
        pictures = notebook.show_pictures(
            names, rows, f"The first {n} of {len(self)} trials, in their order."
        )
        return pictures + notebook.show_table(first)

    @cached_property
    def _gallery_ids(self) -> frozenset[str]:
        return (
            frozenset() if self.candidates is None else frozenset(self.candidates.embeddings.ids.astype(str))
        )

    def _find_seen(self, name: str) -> np.ndarray | None:
        return self.read_picture(name) if name in self._gallery_ids else None

    @property
    def embeddings(self) -> Embeddings:
        """Predicted embeddings, one row for each of `trials`, in the space in which pictures are compared."""
        if self.predicted is None:
            raise NoResultError("the run decodes categories and predicts no embeddings; see classes.")
        return self.predicted

    @cached_property
    def retrieved(self) -> pd.DataFrame:
        """The nearest pictures of the gallery: columns trial, place (from 1), picture and similarity (cosine).

        In a gallery of descriptions a column `description` describes each.
        """
        if self.predicted is None:
            raise NoResultError("the run decodes categories and searches no gallery; see classes.")
        tables = []
        for part in self.parts:
            names = np.asarray(part.retrieval.gallery_ids, dtype=object)
            top, similar = (
                table[:, : self.n_top]
                for table in (part.retrieval.top_indices, part.retrieval.top_similarities)
            )
            # (n_rows, n_top) becomes one row per trial and place.
            n, k = top.shape
            tables.append(
                pd.DataFrame(
                    {
                        "trial": np.repeat(part.rows, k),
                        "place": np.tile(np.arange(1, k + 1), n),
                        "picture": names[top.ravel()],
                        "similarity": similar.ravel(),
                    }
                )
            )
        found = pd.concat(tables, ignore_index=True).sort_values(["trial", "place"], ignore_index=True)
        if self.candidates is not None and self.candidates.texts:
            found["description"] = [self.candidates.texts[str(name)] for name in found["picture"]]
        return found

    @cached_property
    def ranks(self) -> pd.DataFrame:
        """Rank of the true picture, for the trials whose picture is in the gallery; a row per such trial."""
        tables = [
            pd.DataFrame(
                {
                    "trial": part.rows[own],
                    "stimulus_id": ranked.query_ids,
                    "rank": ranked.ranks,
                    "worst_rank": ranked.worst_ranks,
                    "gallery_size": ranked.gallery_size,
                    "similarity": ranked.true_similarities,
                }
            )
            for part, own, ranked in self._list_known()
        ]
        columns = ["trial", "stimulus_id", "rank", "worst_rank", "gallery_size", "similarity"]
        found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
        return found.sort_values("trial", ignore_index=True)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """The decoded class of each trial, and what speaks for each class: columns trial, class, then one per class."""
        if self.decisions is None:
            raise NoResultError("the run finds images and decodes no categories; see retrieved.")
        best = self.decisions.to_numpy().argmax(axis=1)
        named = np.asarray(self.decisions.columns, dtype=object)[best]
        return pd.concat(
            [pd.DataFrame({"trial": np.arange(len(best)), "class": named}), self.decisions], axis=1
        )

    @cached_property
    def reconstructions(self) -> ImageRows:
        """Decoded images of shape (n_trials, height, width, 3), or (n_trials, n_draws, height, width, 3).

        They have the size that the generator gives and are read one by one; ``numpy.asarray`` takes all into memory.
        """
        return self._decoded[0]

    @property
    def makes_images(self) -> bool:
        """Whether there are reconstructions: not of classes, nor where the run had no image files."""
        return self._decode is not None

    @cached_property
    def _decoded(self) -> tuple[ImageRows, dict[str, list[list[str]]]]:
        if self._decode is None:
            if self.predicted is not None and not self.images:
                raise NoResultError("these trials were predicted without images.")
            why = "decodes categories" if self.predicted is None else "had no image files"
            raise NoResultError(f"the run {why} and makes no images.")
        return self._decode()

    @cached_property
    def captions(self) -> pd.DataFrame:
        """Decoded captions: columns trial, source, draw (from 0) and caption; without rows if the run decodes none.

        Sources are the run's own decoders (``reconstruction.captions``), and where ``evaluation.captions`` is set the
        caption of the nearest training image, and what its captioner writes about the reconstructions.
        """
        return list_captions(self._decoded[1] if self.makes_images else {})

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Scores with interval and chance, for trials whose true picture (or class) is known; empty without any."""
        from braindecode_vis.pipeline.prediction_files import score_predictions

        return score_predictions(self)

    @property
    def protocol(self) -> str:
        """Run, folds, averaging, target and gallery in one line."""
        config = self.run.config
        words = [
            f"finished run {config.name} ({config.dataset.kind}) on new trials",
            "transductive: statistics of the new trials themselves"
            if self.transductive
            else "nothing fitted on them",
            *([self.context] if self.context else []),
            f"fold {self.folds[0]}" if len(self.folds) == 1 else f"mean of {len(self.folds)} folds",
        ]
        if self.candidates is not None:
            words += [
                f"repetitions {config.repeats.test}",
                f"target {config.target.kind}",
                f"gallery of {self.candidates.words}",
                f"centre {config.retrieval.centre}",
                *describe_choices(config),
            ]
        return "; ".join(words)

    def describe_unknown(self) -> str:
        """Return a sentence if trials say what they showed and the run knows none of it; empty otherwise."""
        known = self.trials["known"].to_numpy(bool)
        if self.decisions is not None:
            # A class may be stated without a picture; where neither is, the trial's own id stands for both.
            known = known | (self.trials["concept"] != self.trials["stimulus_id"]).to_numpy()
        if not known.any():
            return ""
        if self.decisions is not None:
            named = self.trials["concept"].astype(str)[known]
            classes = [str(name) for name in self.decisions.columns]
            if named.isin(classes).any():
                return ""
            what, there = f"classes {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}", "class"
        elif not self._list_known() and self.candidates is not None:
            named = self.trials["stimulus_id"].astype(str)[known]
            ids = [str(name) for name in self.candidates.embeddings.ids]
            what = f"{self.candidates.words}, first ones {', '.join(ids[:3])}"
            there = "picture of the gallery"
        else:
            return ""
        first = ", ".join(map(repr, pd.unique(named)[:3]))
        return (
            f"what the trials showed ({first}{', ...' if named.nunique() > 3 else ''}) contains no "
            f"{there} ({what}), so nothing is scored; give names that the run has, or leave it out."
        )

    def read_picture(self, name: str) -> np.ndarray | None:
        """Return a picture of the gallery, uint8 of shape (height, width, 3); None if it is not available."""
        stimuli = None if self.candidates is None else self.candidates.stimuli
        if stimuli is None or not stimuli.has_pixels:
            return None
        try:
            return stimuli.read_image(name)
        except DataError:  # listed, but its file is elsewhere
            return None

    def gallery(self, *, n_items: int = 8, n_top: int = 3) -> Any:
        """Return a matplotlib figure of seen pictures (where known), decoded images and the pictures that ranked first.

        Parameters
        ----------
        n_items
            Trials, the first ones, never the best.
        n_top
            Pictures below each.
        """
        from braindecode_vis.report.figures import plot_decoded

        n = min(n_items, len(self))
        first = self.retrieved[(self.retrieved["place"] <= n_top) & (self.retrieved["trial"] < n)]
        pictures = [
            [(str(row.picture), self.read_picture(str(row.picture))) for row in group.itertuples()]
            for _, group in first.groupby("trial", sort=True)
        ]
        known = self.trials["known"].to_numpy(bool)[:n]
        names = [str(i) if k else "" for i, k in zip(self.trials["stimulus_id"], known, strict=False)]
        seen = [self._find_seen(name) for name in names]
        images = self.reconstructions[:n]
        return plot_decoded(images[:, 0] if images.ndim == 5 else images, pictures, names, seen=seen)

    def report(self) -> Path:
        """Write everything into a temporary folder and return the page; see `save` for a folder of your own."""
        import tempfile

        return self.save(Path(tempfile.mkdtemp(prefix="braindecode-vis-")) / "predictions") / "predict.html"

    def save(self, out: str | Path) -> Path:
        """Write predictions, tables, images, page and provenance into a folder, and return its path.

        Parameters
        ----------
        out
            Must not exist, or be empty, or hold the same predictions.
        """
        from braindecode_vis.pipeline.prediction_files import write_predictions

        return write_predictions(self, Path(out))

    def _list_known(self) -> list[tuple[RankedPart, np.ndarray, Retrieval]]:
        """Return the rows of each part whose picture is in its gallery, and where it ranks there."""
        found = []
        known = self.trials["known"].to_numpy(bool)
        ids = self.trials["stimulus_id"].to_numpy(dtype=object)
        for part in self.parts:
            # Ids of tables may be numbers, those of galleries are text.
            inside = np.isin(ids[part.rows].astype(str), part.retrieval.gallery_ids.astype(str))
            own = np.flatnonzero(known[part.rows] & inside)
            if not len(own):
                continue
            r = part.retrieval
            picked = replace(
                r, query_ids=r.query_ids[own], n_above=r.n_above[own], n_tied=r.n_tied[own],
                true_similarities=r.true_similarities[own], top_indices=r.top_indices[own],
                top_similarities=r.top_similarities[own],
            )  # fmt: skip
            found.append((part, own, picked))
        return found


def list_captions(found: Mapping[str, Sequence[Sequence[str]]]) -> pd.DataFrame:
    """Return a table with the columns trial, source, draw (from 0) and caption.

    Parameters
    ----------
    found
        Source, and for each trial the caption of each draw.
    """
    rows = [
        {"trial": trial, "source": source, "draw": draw, "caption": text}
        for source, several in found.items()
        for trial, texts in enumerate(several)
        for draw, text in enumerate(texts)
    ]
    return pd.DataFrame(rows, columns=["trial", "source", "draw", "caption"])


def predict(
    run: FinishedRun,
    new: NewTrials,
    *,
    gallery: Any = None,
    fold: int | None = None,
    n_top: int = 5,
    limit: int | None = None,
    images: bool = True,
    context: NewTrials | None = None,
) -> RunPredictions:
    """Predict new trials.

    Parameters
    ----------
    run
        The finished run.
    new
        From `braindecode_vis.pipeline.new_trials`.
    gallery
        Pictures to search (see `find_gallery`); by default those that the trials say they showed, or else the tested
        pictures of the run.
    fold
        The fold that predicts; by default the only one, or the mean of all.
    n_top
        Pictures to list for each trial.
    limit
        Predict this many trials at most, the first ones (averages, where the run averages repetitions). They are
        predicted and ranked as they are among all.
    images
        Whether there are reconstructions, which take far longer than all else.
    context
        Trials of the same subjects whose pictures are known; the encoder learns from them first, or only reads them
        (`in_context`).

    Raises
    ------
    ConfigError
        If folds cannot be averaged, a run of categories is asked for a gallery, or the encoder cannot learn from a
        context.
    """
    if limit is not None and (
        isinstance(limit, bool) or not isinstance(limit, int | np.integer) or limit < 1
    ):
        raise ConfigError(f"limit is {limit!r}, but must be a whole number of trials, 1 or more.")
    folds = choose_folds(run, fold)
    if run.config.decodes_categories:
        if gallery is not None:
            raise ConfigError(
                f"{run.folder.path} decodes categories and finds no pictures, so it takes no gallery; leave it out."
            )
        if context is not None:
            raise ConfigError(f"{run.folder.path} decodes categories and takes no context; leave it out.")
        return _predict_categories(run, new, folds, limit)
    trials = pick_trials(_name_concepts(run, new), np.arange(new.responses.n_trials), run.config.repeats.test)
    fitted = [train(run)[number] for number in folds]
    if context is not None:
        theirs, whose = (r.trials["subject"].astype(str).unique() for r in (context.responses, trials))
        if not set(theirs) & set(whose):
            raise DataError(
                f"the context is of subject {', '.join(theirs)}, but the trials are of subject {', '.join(whose)}, who "
                "would be decoded without it; name the same subject for both (subject=... in Python)."
            )
        fitted = [
            replace(f, encoder=_read_context(run, number, f, context))
            for number, f in zip(folds, fitted, strict=True)
        ]
    # Averaging comes before the selection, as in the run's own test.
    trials = order_by_gallery(fitted[0].encoder, trials)
    every = trials
    trials, notes = _take_first(run, new, trials, limit)
    chosen = [f.select(trials) for f in fitted]
    predicted = [f.encoder.predict(responses) for f, responses in zip(fitted, chosen, strict=True)]
    # Known only after predict, which is where the alignment happens.
    aligned = sorted({name for f in fitted for name in f.encoder.label_free_subjects})
    if aligned:
        notes.append(
            f"The encoder has aligned subject {', '.join(aligned)} by the new trials themselves, without labels: "
            "transductive."
        )
    if len(folds) > 1:
        check_one_space(run, folds, predicted)
        notes.append(
            f"Predictions are the mean over the {len(folds)} folds of the run, which share one space; "
            "prior and generator are those of the first fold."
        )
    candidates = find_gallery(run, folds[0], new, every, gallery, folds)
    result = RunPredictions(
        run,
        trials.trials,
        folds,
        tuple(notes),
        new.transductive or bool(aligned),
        average_folds(predicted),
        candidates,
        n_top=n_top,
        images=images,
        context="" if context is None else _describe_context(run, new, context),
    )
    result.parts = _rank(run, result)
    result.notes += (unknown,) if (unknown := result.describe_unknown()) else ()
    if not images or not preprocess(run).stimuli.has_pixels:
        return result
    # Both predictions at once: the trials themselves may lie in a folder that is removed afterwards.
    encoders = [f.encoder for f in fitted]
    make = prepare_images(run, folds, chosen, trials, result.embeddings, encoders)
    result._decode = partial(make, listener=run.listener)
    return result


def _take_first(
    run: FinishedRun, new: NewTrials, trials: Responses, limit: int | None
) -> tuple[Responses, list[str]]:
    """Return the first trials and the notes so far, and report how many trials there are."""
    notes, n = list(new.notes), trials.n_trials
    taken = n if limit is None else min(int(limit), n)
    words = f"{taken} trials" if taken == n else f"the first {taken} of {n} trials"
    averaged = f" (averages of {new.responses.n_trials})" if n < new.responses.n_trials else ""
    with run.listener.watch("predict:") as show:
        show(0, 0, f"{words}{averaged}")
    if taken < n:
        notes.append(f"Only the first {taken} of {n} trials were predicted; the gallery is that of all.")
        trials = trials.select(np.arange(taken))
    return trials, notes


def choose_folds(run: FinishedRun, fold: int | None) -> list[int]:
    """Return the folds that predict: the one that was asked for, or all."""
    n = len(preprocess(run).folds)
    if fold is None:
        return list(range(n))
    if isinstance(fold, bool) or not isinstance(fold, int | np.integer):
        raise ConfigError(f"the fold is {fold!r}, but must be a number from 0 to {n - 1}.")
    if not 0 <= fold < n:
        raise ConfigError(f"the run has the folds 0 to {n - 1}, not {fold}.")
    return [int(fold)]


def _name_concepts(run: FinishedRun, new: NewTrials) -> Responses:
    """Return the trials with the concept of what was shown, where that is known."""
    trials, table = new.responses.trials, preprocess(run).stimuli.table
    concept_of = dict(zip(table["stimulus_id"].astype(str), table["concept"].astype(str), strict=True))
    if new.stimuli is not None:
        own = new.stimuli.table
        concept_of |= dict(zip(own["stimulus_id"].astype(str), own["concept"].astype(str), strict=True))
    ids = trials["stimulus_id"].astype(str)
    concepts = [concept_of.get(i, i) for i in ids]
    return new.responses.with_trials(trials.assign(concept=concepts, row=np.arange(len(trials))))


def check_one_space(run: FinishedRun, folds: list[int], predicted: list[Embeddings]) -> None:
    """Raise `ConfigError` if predictions of several folds cannot be averaged."""
    targets = {embed(run)[number].embeddings.space for number in folds}
    if len(targets) > 1 or len({part.space for part in predicted}) > 1:
        raise ConfigError(
            f"the {len(folds)} folds of {run.folder.path} have different spaces, so their predictions "
            "cannot be averaged; choose one with --fold 0."
        )


def average_folds(predicted: list[Embeddings]) -> Embeddings:
    """Return the mean of what several folds predict of the same trials."""
    if len(predicted) == 1:
        return predicted[0]
    # (n_folds, n_trials, ...) to (n_trials, ...).
    vectors = np.stack([np.asarray(part.vectors) for part in predicted]).mean(axis=0, dtype=np.float64)
    return replace(predicted[0], vectors=vectors.astype(np.float32))


# --- galleries --------------------------------------------------------------------------------------------


def find_gallery(
    run: FinishedRun, number: int, new: NewTrials, trials: Responses, given: Any, folds: list[int]
) -> PictureGallery:
    """Return the candidates in the target space.

    Parameters
    ----------
    run, number
        The run, and the fold whose target encoder is used.
    new, trials
        The new trials, and the same with their repetitions averaged.
    given
        A folder of pictures, an array or a ``.npy`` of them, a mapping of ids to pictures, or a folder of embeddings
        (``vectors.npy`` and ``ids.json``); a CSV file of captions or attributes, for a gallery without pictures; None
        for the default.
    folds
        Folds that predict, whose tested pictures are the default where the trials do not say what they showed.

    Raises
    ------
    DataError
        If it is empty, or of another space than the run's target.
    """
    if given is not None:
        gallery, known = open_given_gallery(run, number, given), trials.trials["known"].to_numpy(bool)
        shown = sorted(set(trials.stimulus_ids[known].astype(str)) & set(gallery.embeddings.ids.astype(str)))
        if gallery.unnamed and 0 < len(shown) < len(gallery.embeddings):
            raise DataError(
                f"the trials show {shown[0]!r} and others, but the gallery is an array without names; "
                f"give a mapping: gallery={{{shown[0]!r}: pictures[0], ...}}, or give a folder of files "
                "named by their ids."
            )
        return gallery
    known = trials.trials["known"].to_numpy(bool)
    found = _find_shown(run, number, new, list(dict.fromkeys(trials.stimulus_ids[known].astype(str))))
    # With one candidate every rank would be 1.
    if found is not None and len(found[0]) >= 2:
        return PictureGallery(*found, f"{len(found[0])} pictures that these trials showed")
    return find_tested_gallery(run, folds)


def _find_shown(
    run: FinishedRun, number: int, new: NewTrials, shown: list[str]
) -> tuple[Embeddings, StimulusSet] | None:
    """Return those pictures of new trials that the run or the trials have, in the target space; None without any."""
    bank, prepared = embed(run)[number], preprocess(run)
    in_bank = set(bank.embeddings.ids.astype(str))
    hashes = _list_hashes(prepared.stimuli)
    theirs = {} if new.stimuli is None else _list_hashes(new.stimuli)
    # The same id may be another picture in another experiment; only equal hashes are the same picture.
    same = [i for i in shown if i in in_bank and (not theirs or theirs.get(i) == hashes.get(i))]
    others = [i for i in shown if i not in set(same) and i in theirs]
    others = others if new.stimuli is not None and new.stimuli.has_pixels else []
    if not same and not others:
        return None
    # Pictures of the bank keep their embedding; others go through the run's own target encoder.
    found, pictures = [bank.embeddings.select(same)] if same else [], prepared.stimuli
    if others:
        assert new.stimuli is not None
        found.append(_encode(run, number, new.stimuli.select(others)))
        pictures = new.stimuli
    vectors = np.concatenate([np.asarray(part.vectors) for part in found])
    return Embeddings(vectors, [*same, *others], bank.embeddings.space), pictures


def _read_context(run: FinishedRun, number: int, fitted: Any, context: NewTrials) -> BrainEncoder:
    """Return the encoder of a fold after the pairs of a context; see `predict`."""
    ability = fitted.encoder.adaptation
    if ability is None:
        raise ConfigError(
            f"{find_class(fitted.encoder).__name__} cannot learn from a context (it has no property adaptation); "
            "in_context, ridge and networks can."
        )
    trials = fitted.select(_name_concepts(run, context))
    ids = np.array([str(name) for name in trials.stimulus_ids], dtype=object)
    known = trials.trials["known"].to_numpy(bool)
    shown = _find_shown(run, number, context, list(dict.fromkeys(ids[known])))
    missing = sorted(set(ids) - set(() if shown is None else shown[0].ids.astype(str)))
    if shown is None or missing:
        raise DataError(
            f"the context needs the picture of each of its trials, but that of {missing[0]!r} is not known; give the "
            "pictures beside the trials (from_arrays with images and shown), or ids of pictures of the run."
        )
    if len(shown[0]) < 2:
        raise DataError(
            f"the context shows the picture {ids[0]!r} alone, which says nothing of how others are seen; "
            "give pairs of two or more pictures (60 are a beginning)."
        )
    adapted: BrainEncoder = roles.complete(BrainEncoder, ability.adapt(trials, shown[0].select(list(ids))))
    return adapted


def _describe_context(run: FinishedRun, new: NewTrials, context: NewTrials) -> str:
    """Return the context in words, which say how many of its pictures are those that are asked for."""
    ours = _list_hashes(preprocess(run).stimuli)

    def list_pictures(one: NewTrials) -> set[str]:
        hashes = ours if one.stimuli is None else ours | _list_hashes(one.stimuli)
        trials = one.responses.trials
        return {hashes.get(i, i) for i in trials.loc[trials["known"].astype(bool), "stimulus_id"].astype(str)}

    n_shared = len(list_pictures(new) & list_pictures(context))
    shared = f", which shows {n_shared} of the pictures that are decoded" if n_shared else ""
    return f"few-shot: a context of {context.responses.n_trials} trials{shared}"


def find_tested_gallery(run: FinishedRun, folds: list[int]) -> PictureGallery:
    """Return the pictures that these folds of the run were tested with."""
    bank, prepared = embed(run)[folds[0]], preprocess(run)
    tested = np.concatenate([prepared.responses.stimulus_ids[prepared.folds[n].test] for n in folds])
    ids = list(pd.unique(tested))
    words = f"{len(ids)} pictures that the run was tested with"
    return PictureGallery(bank.embeddings.select(ids), prepared.stimuli, words)


def open_given_gallery(run: FinishedRun, number: int, given: Pictures | Embeddings | Path) -> PictureGallery:
    """Return given pictures, or embeddings of some, as candidates; see `find_gallery`."""
    bank = embed(run)[number]
    space = bank.embeddings.space
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        if not path.exists():
            raise DataError(
                f"the gallery {path} does not exist; give a folder of pictures, a .npy of them, or a CSV of captions."
            )
        if path.suffix == ".csv":
            return describe_gallery(run, number, path)
        if is_image_bank(path):
            given = read_image_bank(path)
        elif (path / "vectors.npy").is_file() and (path / "ids.json").is_file():
            given = store.read_embeddings(path)
        elif path.is_file():
            given = load_array(path, "an array of pictures")
    if isinstance(given, Embeddings):
        _check_size(len(given))
        if given.space != space:
            raise DataError(
                f"the gallery is in the space {given.space!r}, but the run predicts {space!r}; give the pictures "
                "themselves, or embeddings from the target of the run."
            )
        check_same_space(given, bank.embeddings)
        return PictureGallery(given, None, f"{len(given)} given embeddings")
    if isinstance(given, np.ndarray) and not given.size:
        _check_size(0)
    stimuli = make_picture_set(given)
    _check_size(len(stimuli))
    return PictureGallery(
        _encode(run, number, stimuli), stimuli, f"{len(stimuli)} given pictures", unnamed=are_unnamed(given)
    )


def describe_gallery(run: FinishedRun, number: int, path: Path) -> PictureGallery:
    """Return candidates that are known by their descriptions alone.

    Parameters
    ----------
    run, number
        The run, and the fold whose target it is.
    path
        CSV file of captions or attributes; every id in it is a candidate. What its words mean to a target without a
        text side is learnt from the training images that ``evaluation.descriptions`` of the run describes, or else that
        the file itself does.
    """
    stimuli, settings = preprocess(run).stimuli, run.config.evaluation.descriptions
    known = read_captions_or_attributes(path, stimuli.concept_of)
    _check_size(len(known), f"description of an image that {path} and the run know")
    learnt = known if settings is None else read_descriptions(run)
    side = open_text_side(run, number, learnt, None if settings is None else settings.encoder)
    ids, asked = list(known), list(known.values())
    embeddings = Embeddings(side.embed(asked), ids, embed(run)[number].embeddings.space)
    return PictureGallery(
        embeddings, None, f"{len(ids)} descriptions ({path.name}), {side.describe()}",
        lambda source, subject: replace(side, source=source).place(ids, asked, subject),
        {name: each.texts[0] for name, each in known.items()},
    )  # fmt: skip


def _check_size(n: int, what: str = "picture") -> None:
    if n < 2:
        raise DataError(f"the gallery holds {'no' if n == 0 else 'one'} {what}; give at least two.")


def _encode(run: FinishedRun, number: int, stimuli: StimulusSet) -> Embeddings:
    """Return embeddings of pictures by the run's own target encoder."""
    bank = embed(run)[number]
    # What is fitted differs from run to run, and an `embed` of its own knows more of its images than their pixels.
    if run.target.fitted_on_training_images or roles.has_own(ImageEncoder, bank.encoder, "embed"):
        vectors = np.asarray(bank.encoder.encode(stimuli.iterate_images()))
        made = Embeddings(vectors, stimuli.ids, bank.embeddings.space)
    else:
        made = embed_cached(run, bank.encoder, stimuli)
    check_same_space(made, bank.embeddings)
    return made


def _list_hashes(stimuli: StimulusSet) -> dict[str, str]:
    table = stimuli.table
    return dict(zip(table["stimulus_id"].astype(str), table["sha256"].astype(str), strict=True))


def open_search(
    run: FinishedRun, folds: list[int], candidates: PictureGallery, subject: str | None
) -> tuple[Centre, GallerySearch]:
    """Return what is taken off every prediction before the comparison, and the candidates, ready to be searched.

    Candidates that lie in a file stay there, unless the encoder has a space of its own.

    Parameters
    ----------
    run, folds
        The run, and the folds that predict.
    candidates
        In the target space.
    subject
        Whose gallery it is, where every subject has one of its own.
    """
    centre, mapped = _map_gallery(run, folds, candidates, subject)
    return centre, GallerySearch(mapped, centre)


def _map_gallery(
    run: FinishedRun, folds: list[int], candidates: PictureGallery, subject: str | None
) -> tuple[Centre, Embeddings]:
    prepared, settings = preprocess(run), run.config.retrieval
    encoder = train(run)[folds[0]].encoder
    source = _open_source(run, folds)
    centre = source.fit_centre(subject)
    if candidates.place is not None:
        return centre, candidates.place(source, subject)
    if candidates.stimuli is not None:  # a tuned image network computes embeddings anew
        encoder.bind(Context(images=candidates.stimuli, device=settings.device))
    mapped = source.map_targets(candidates.embeddings, subject)
    encoder.bind(Context(images=prepared.stimuli, device=settings.device))
    return centre, mapped


def _open_source(run: FinishedRun, folds: list[int]) -> GallerySource:
    prepared, number = preprocess(run), folds[0]
    # The centre comes from training images, as at the test of the run; new pictures do not move it.
    rows = np.concatenate([prepared.folds[n].train for n in folds])
    ids = list(pd.unique(prepared.responses.stimulus_ids[rows]))
    return GallerySource(train(run)[number].encoder, embed(run)[number].embeddings, ids, run.config.retrieval)


def _rank(run: FinishedRun, result: RunPredictions) -> list[RankedPart]:
    """Search the gallery for every prediction."""
    settings, candidates = run.config.retrieval, result.candidates
    assert candidates is not None
    inside = set(candidates.embeddings.ids.astype(str))
    # Ranking needs a true picture; where none is known the first stands in, and its rank is never looked at.
    own = [
        i if known and str(i) in inside else candidates.embeddings.ids[0]
        for i, known in zip(result.embeddings.ids, result.trials["known"], strict=True)
    ]
    parts = []
    source = _open_source(run, result.folds)
    for subject, part in source.list_rows(result.trials["subject"].to_numpy(dtype=object)):
        if isinstance(candidates.embeddings.vectors, np.memmap) and candidates.stimuli is None:
            # A bank may be larger than memory: its rows are mapped and centred as they are read.
            centre, gallery = source.fit_centre(subject), map_bank(source, candidates.embeddings, subject)
        else:
            centre, mapped = _map_gallery(run, result.folds, candidates, subject)
            gallery = centre.apply(mapped)
        queries = Embeddings(
            result.embeddings.vectors[part], np.asarray(own, dtype=object)[part], result.embeddings.space
        )
        queries = centre.apply(queries)
        ranked = compute_ranks(
            queries, gallery, n_top=max(settings.n_top, result.n_top),
            device=choose_device(settings.device, setting="retrieval.device"), protocol=candidates.words,
        )  # fmt: skip
        parts.append(RankedPart(part, queries, gallery, ranked))
    return parts


# --- images -----------------------------------------------------------------------------------------------


def decode_trials(run: Run, number: int, trials: Responses) -> tuple[ImageRows, dict[str, list[list[str]]]]:
    """Return images and captions that the fits of one fold of a reconstructed run make of trials.

    Parameters
    ----------
    run
        Whose stage `reconstruct` is done.
    number
        Number of the fold.
    trials
        With every feature; repetitions as the images are to be made of them.
    """
    fitted = train(run)[number]
    chosen = fitted.select(trials)
    return prepare_images(run, [number], [chosen], trials, fitted.encoder.predict(chosen))()


def find_fits(run: Run) -> Artifact:
    """Return where prior and generator of a reconstructed run lie; `DataError` where there are none."""

    def find() -> Artifact:
        fields, fits = name_retrieval(run)
        retrieval = run.folder.find("retrieve", fields=fields, upstream=fits)
        upstream = {"retrieve": retrieval.fingerprint, **name_material(run)}
        return run.folder.find("reconstruct", fields=name_reconstruction(run), upstream=upstream)

    found: Artifact = run.once("fits of generators", find)
    return found


def generate_images(
    run: Run,
    number: int,
    for_generator: Embeddings,
    *,
    low: DrawnImages | None,
    texts: Embeddings | None,
    written: WrittenCaptions | None = None,
    listener: ProgressListener | None = None,
) -> tuple[ImageRows, dict[str, list[list[str]]]]:
    """Return images and captions that prior and generator of one fold of a reconstructed run make of predictions.

    Parameters
    ----------
    run
        Whose stage `reconstruct` is done.
    number
        Number of the fold.
    for_generator
        Predictions in the space that the generator takes.
    low, texts
        Of the branches, where the run has them.
    written
        Captions of the trials by the brain encoder, where the run asks for them.
    listener
        Shows how many images are drawn; by default nobody, since a stream asks for one image after the other.
    """
    from braindecode_vis.pipeline.reconstruction import (
        decode_captions,
        decode_images,
        draw_decoded,
        open_fits,
        pick_prompts,
        sample_prior,
    )

    def read() -> tuple[Any, Any]:
        embeddings = map_for_generator(run, number)[0]
        artifact = find_fits(run)
        data = make_generator_data(run, number, embeddings)
        ids = preprocess(run).responses.stimulus_ids[preprocess(run).folds[number].test]
        tested = embeddings.select(pd.unique(ids))
        return data, open_fits(artifact.path / "fits" / name_fold(number), run.config, data, tested, number)

    # Once for all calls: the weights of a generator may take a minute to read.
    data, fitted = run.once(f"fitted generator {number}", read)
    prior, generator, decoders = fitted.prior, fitted.generator, fitted.decoders
    sampled = sample_prior(run.config, prior, for_generator, number)
    captions = decode_captions(run.config.reconstruction.captions, decoders, sampled, for_generator, written)
    decoded = decode_images(
        run.config, sampled, generator, for_generator, number, low=low is not None,
        prompts=pick_prompts(run.config, captions), texts=texts,
    )  # fmt: skip
    n_draws = run.config.reconstruction.n_draws
    if isinstance(decoded, np.ndarray):
        copied = data.show_images(decoded)
        index = copied.index if n_draws == 1 else np.repeat(copied.index[:, None], n_draws, axis=1)
        made = ImageRows(copied.source, index)
    else:
        made = draw_decoded(decoded, n_draws, low, listener or SilentListener())
    return made, describe_new(run.config, captions, for_generator, data.embeddings, made)


def prepare_images(
    run: Run,
    folds: list[int],
    chosen: list[Responses],
    trials: Responses,
    compared: Embeddings,
    encoders: Sequence[BrainEncoder] | None = None,
) -> Callable[..., tuple[ImageRows, dict[str, list[list[str]]]]]:
    """Predict what the generator takes, and return what makes images and captions when they are asked for.

    Parameters
    ----------
    run, folds
        The run, and the folds that predict; prior and generator are those of the first.
    chosen
        The trials with the features of each fold.
    trials
        The same with every feature, for branches.
    compared
        What was predicted of them in the space of the comparison.
    encoders
        One for each fold; those of the run by default.
    """
    number = folds[0]
    encoders = encoders or [train(run)[n].encoder for n in folds]
    learnt = map_for_generator(run, number)[1]
    if learnt:
        for_generator = compared
    else:
        for_generator = average_folds(
            [e.predict_for_generator(r) for e, r in zip(encoders, chosen, strict=True)]
        )
    low = open_low_level(run)
    images = None if low is None else decode_low_level(run, low, number, trials)
    text = open_branch(run, "text")
    texts = None if text is None else predict_branch(run, text, number, trials)

    written = write_with_encoder(run.config.reconstruction.captions, encoders[0], chosen[0])
    return partial(generate_images, run, number, for_generator, low=images, texts=texts, written=written)


def describe_new(
    config: RunConfig,
    captions: Mapping[str, list[list[str]]],
    predicted: Embeddings,
    training: Embeddings,
    made: ImageRows,
) -> dict[str, list[list[str]]]:
    """Return the captions of new trials by the names of their sources: those decoded, and those that the scores of the
    run's captions ask for.

    Parameters
    ----------
    config
        Of the run.
    captions
        Kind of decoder, and for each trial the caption of each draw.
    predicted, training
        Predictions of the trials and embeddings of the training images, from which images are made.
    made
        Reconstructions, one or several draws of each trial.
    """
    found = {DECODERS[kind]: rows for kind, rows in captions.items()}
    scored = config.evaluation.captions
    if scored is None:
        return found
    if NEAREST not in found:
        bank = read_caption_bank(scored.bank.expanduser())
        texts = retrieve_nearest([predicted], [training], bank, device=scored.torch_device)
        found[NEAREST] = [[text] for text in texts]
    if scored.captioner is not None:
        flat, n_draws = made.index.ravel(), made.index.shape[1] if made.ndim == 5 else 1
        written = caption_images(
            ImageRows(made.source, flat), scored.captioner,
            max_new_tokens=scored.max_new_tokens, n_beams=scored.n_beams,
            batch_size=scored.batch_size, device=scored.torch_device,
        )  # fmt: skip
        found[scored.captioner.expanduser().name] = [
            written[row * n_draws : (row + 1) * n_draws] for row in range(len(made))
        ]
    return found


# --- categories -------------------------------------------------------------------------------------------


def _predict_categories(
    run: FinishedRun, new: NewTrials, folds: list[int], limit: int | None
) -> RunPredictions:
    first, notes = _take_first(run, new, new.responses, limit)
    new = replace(new, responses=first)
    decoders = [train(run)[number].decoder for number in folds]
    classes = sorted({str(name) for decoder in decoders for name in decoder.classes})
    # (n_trials, n_classes); a fold that has not learnt a class leaves it at 0.
    total = np.zeros((new.responses.n_trials, len(classes)))
    for decoder in decoders:
        columns = [classes.index(str(name)) for name in decoder.classes]
        total[:, columns] += decoder.decision(new.responses)
    if len(folds) > 1:
        notes.append(f"Decisions are the mean over the {len(folds)} folds of the run.")
    decisions = pd.DataFrame(total / len(decoders), columns=classes)
    trials = new.responses.trials.assign(row=np.arange(new.responses.n_trials))
    if "concept" not in trials:
        trials = _name_concepts(run, new).trials
    result = RunPredictions(run, trials, folds, tuple(notes), new.transductive, decisions=decisions)
    result.notes += (unknown,) if (unknown := result.describe_unknown()) else ()
    return result
