"""Imagery: encoders that were trained on seen images, tested on imagined ones.

Owns identification of imagined (and, beside it, seen) stimuli within a task and a set of stimuli, with a permutation of
the stimulus labels as WAVE reports. No imagery trial is trained on; where a split trains on some of the task, its
encoder is refused. What was imagined without a picture (a category, a word) is represented by the mean embedding of the
images of its concept, as Horikawa and Kamitani do. Candidates may be texts as well, as in WAVE's test: the text side of
a CLIP network reads a caption or a name of each stimulus, a regression on words stands in for one, or a sentence
encoder compares the caption that is decoded from a trial with those of the stimuli. Few stimuli are imagined, so
repetitions in other subjects matter more than the size of a p-value.

References
----------
Horikawa and Kamitani (2017), doi:10.1038/ncomms15037; Kneeland et al. (2025), NSD-Imagery; WAVE, arXiv:2411.07121.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Embeddings, Responses, Score
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.store import hash_file, hash_json
from braindecode_vis.embeddings.caption_bank import read_caption_bank
from braindecode_vis.embeddings.image_descriptions import describe_captions, fit_ridge, open_reader
from braindecode_vis.embeddings.sentence_encoder import MINILM, SentenceEncoder, find_sentence_folder
from braindecode_vis.embeddings.text import name_concept
from braindecode_vis.parts.analyses.measure import (
    Meter,
    RetrievalMetric,
    check_retrieval,
    describe_limits,
    pick_limits,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study, complete_encoder
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.report.drawing import draw_bars
from braindecode_vis.scoring.caption_retrieval import retrieve_nearest
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.retrieval import Centre, compute_ranks, fit_centre
from braindecode_vis.scoring.score_row import format_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_SHUFFLES = 10_000
MOST_TEXTS = 2048  # of training images, whose mean is taken off texts: it lies within 2 % of that of all
#: Words of rows whose predictions are centred by test trials.
_OWN_MEAN = "centred by their own mean over the stimuli compared (transductive)"
#: What is taken off candidates that are texts.
_CENTRED = {
    "none": "", "training": ", after the mean of training texts is taken off",
    "candidates": ", after their own mean, since no training image has words",
    "words": ", by a ridge regression from the words of training captions to the embeddings of their images",
}  # fmt: skip


class ImageryConfig(Analysis):
    """Identify imagined stimuli with encoders of seen ones.

    Parameters
    ----------
    task
        Value of the trial column `task` that marks imagery.
    metrics
        ``two_way`` (pairwise identification), ``top<k>`` and ``<k>_way``; those that need more stimuli are left out.
    candidates
        Candidates for the comparison: the ``pictures`` of the stimuli; ``text``, the mean vector of their captions
        (or names) by the text side of the target's CLIP network, after the mean of the texts of training images is
        taken off (of the candidates, where no training image has words); ``words``, where a ridge regression from the
        words of training captions to the embeddings of their images replaces a text encoder, for targets without one;
        or ``captions``, where the caption of the training image nearest to the prediction is compared with those of the
        stimuli by a sentence encoder.
    bank
        CSV file with the columns ``id`` and ``caption``, of the stimuli, and of training images (``words`` and
        ``captions`` need some).
    sentence_encoder
        ``minilm`` (the extra ``text``), or the folder of another sentence encoder, for ``captions``.
    own_mean
        Subtract from predictions their own mean over the compared stimuli, and from candidates theirs, instead of the
        mean of ``retrieval.centre``. Imagined responses are weaker than seen ones, which shifts all predictions in the
        same way. The mean needs all trials of the task, which is transductive; the rows say so.
    images
        How many stimuli of the task are reconstructed by the run's prior and generator, for a figure.
    """

    kind: Literal["imagery"] = "imagery"

    needs_pictures: ClassVar[bool] = False

    task: str = "imagery"
    metrics: tuple[RetrievalMetric, ...] = Field(default=("two_way", "top1", "5_way"), min_length=1)
    candidates: Literal["pictures", "text", "words", "captions"] = "pictures"
    bank: Path | None = None
    sentence_encoder: Literal["minilm"] | Path | None = Field(default=None, union_mode="left_to_right")
    own_mean: bool = False
    images: int = Field(default=0, ge=0)

    #: Other tasks that are identified in the same way, for comparison, where there are any.
    beside: ClassVar[tuple[str, ...]] = ("vision", "test", "natural", "shapes", "perception")
    #: Trial column that parts the stimuli into sets; candidates come from the own set. Where it is missing, all
    #: stimuli of a task are one set.
    set_column: ClassVar[str] = "stimulus_set"
    #: Permutations of the stimulus labels, at least 10 000.
    n_shuffles: ClassVar[int] = MIN_SHUFFLES
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"beside", "set_column", "n_shuffles"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"average": True}

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"candidates", "own_mean", "images"})
    not_hashed: ClassVar[frozenset[str]] = frozenset({"bank", "sentence_encoder"})

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.candidates == "pictures":
            self.refuse_unused("bank", because="candidates are pictures, which need no captions")
        if self.candidates != "captions":
            self.refuse_unused(
                "sentence_encoder", because=f"candidates {self.candidates} compare no sentences"
            )
        if self.candidates == "captions":
            self.refuse_unused("own_mean", because="candidates are captions, which are compared as sentences")
        if self.candidates == "words" and self.bank is None:
            raise ValueError(
                "candidates are words, which need a bank: a CSV file with id and caption, of training images and of "
                "the stimuli"
            )
        if self.candidates == "captions" and (self.bank is None or self.sentence_encoder is None):
            raise ValueError(
                "candidates are captions, which need a bank (CSV with id and caption) and a sentence_encoder (minilm, "
                "or a folder); name both"
            )
        return self

    @property
    def makes_images(self) -> bool:  # type: ignore[override]
        """Whether imagined stimuli are reconstructed."""
        return self.images > 0

    @property
    def reads_text(self) -> bool:
        """Whether the text side of the target reads."""
        return self.candidates == "text"

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of the bank and of the sentence encoder."""
        fields = super().hashed_fields()
        if self.bank is not None:
            if not self.bank.expanduser().is_file():
                raise ConfigError(
                    f"imagery.bank names {self.bank}, which is no file; correct it or leave it out."
                )
            fields["bank_sha256"] = hash_file(self.bank.expanduser())
        if self.sentence_encoder is not None:
            folder = find_sentence_folder(self.sentence_encoder, "imagery.sentence_encoder")
            fields["sentence_encoder"] = hash_json(
                digest_files({p.name: p for p in sorted(folder.glob("*.*"))})
            )
        return fields

    def compute(self, study: Study) -> Findings:
        """Predict imagery trials and permute the labels."""
        check_retrieval(study, self.kind)
        if "task" not in study.responses.trials:
            raise DataError(
                "the trial table has no column task, so seen and imagined trials cannot be distinguished; use "
                "nsd_imagery, god or deeprecon, or add the column."
            )
        # Few stimuli give coarse nulls, so the number of shuffles is not what limits the p-value.
        study = replace(study, n_permutations=max(self.n_shuffles, study.n_permutations))
        bank = {} if self.bank is None else read_caption_bank(self.bank.expanduser())
        # Once for each fold: every set of every task is compared after the same centre.
        find_centre = cache(partial(centre_texts, study, bank))
        rows: list[dict[str, Any]] = []
        images: tuple[Plot, ...] = ()
        folds: set[int] = set()
        for task in (self.task, *(t for t in self.beside if t != self.task)):
            chosen = list_trials(study, task, strict=task == self.task)
            if not chosen:
                if task == self.task:
                    known = sorted(set(study.responses.trials["task"].astype(str)))
                    raise DataError(
                        f"no test trial has the task {task!r}; there are {', '.join(known)}. Let the data set test "
                        "imagery (dataset.test or dataset.tasks)."
                    )
                continue
            rows += self._identify(study, task, chosen, bank, find_centre)
            folds |= chosen.keys()
            images += self._draw_images(study, chosen) if task == self.task else ()
        if not rows:
            raise DataError(
                "imagery needs at least two stimuli in a set, and a metric that fits their number."
            )
        own_mean = self.candidates == "text" and any(find_centre(number) is None for number in folds)
        found = self._report(study, pd.DataFrame(rows), own_mean=own_mean)
        return replace(found, plots=(*found.plots, *images))

    def _identify(
        self,
        study: Study,
        task: str,
        chosen: dict[int, np.ndarray],
        bank: Mapping[str, Sequence[str]],
        find_centre: Callable[[int], Centre | None],
    ) -> list[dict[str, Any]]:
        trials = study.responses.trials
        every = np.concatenate(list(chosen.values()))
        sets = pd.Series("all", index=range(len(trials)))
        if self.set_column in trials:
            sets = trials[self.set_column].astype(str).reset_index(drop=True)
        names = sorted(set(sets.iloc[every]))
        # Each set by itself, as papers report, then all stimuli of the task together.
        groups = {name: [name] for name in names} | ({"all": names} if len(names) > 1 else {})
        rows = []
        for name, members in groups.items():
            parts: dict[str, list[Any]] = {metric: [] for metric in self.metrics}
            meters = {metric: Meter(study, metric) for metric in self.metrics}
            sizes = []
            for number, own in chosen.items():
                within = own[sets.iloc[own].isin(members).to_numpy()]
                if not len(within):
                    continue
                test = study.responses.select(within)
                test = average_repetitions(test)
                if len(pd.unique(test.stimulus_ids)) < 2:  # nothing to tell it from
                    continue
                queries, gallery = self._compare(study, number, test, bank, find_centre)
                if self.own_mean:
                    queries, gallery = (fit_centre(side, "mean").apply(side) for side in (queries, gallery))
                ranked = compute_ranks(queries, gallery, n_top=1, protocol=self._name_protocol(study))
                sizes.append(len(gallery))
                for metric in self.metrics:
                    if _find_size(metric) <= len(gallery):
                        parts[metric].append(meters[metric].measure_ranked(test, queries, gallery, ranked))
            rows += [
                {
                    "task": task, "stimulus_set": name, "metric": metric, **Meter.join(folds).as_row(study),
                    "n_stimuli": max(sizes), "n_shuffles": study.n_permutations,
                }
                for metric, folds in parts.items()
                if folds and len(folds) == len(sizes)
            ]  # fmt: skip
        return rows

    def _name_protocol(self, study: Study) -> str:
        return study.protocol + (f", {_OWN_MEAN}" if self.own_mean else "")

    def _compare(
        self,
        study: Study,
        number: int,
        test: Responses,
        bank: Mapping[str, Sequence[str]],
        find_centre: Callable[[int], Centre | None],
    ) -> tuple[Embeddings, Embeddings]:
        """Return what the trials are compared by, and the candidates: a row per distinct stimulus."""
        if self.candidates == "pictures":
            return predict_imagery(study, number, test)
        ids = [str(name) for name in pd.unique(test.stimulus_ids)]
        texts = name_stimuli(study, ids, bank)
        if self.candidates == "text":
            return predict_text(study, number, test, texts, find_centre)
        if self.candidates == "words":
            return predict_words(study, number, test, texts, bank)
        assert self.sentence_encoder is not None
        folder = find_sentence_folder(self.sentence_encoder, "imagery.sentence_encoder")
        encoder = SentenceEncoder(folder)
        told = _caption_trials(study, number, test, bank)
        space = f"sentences/{MINILM if self.sentence_encoder == MINILM else folder.name}"
        gallery = _average_texts(texts, encoder.encode, space)
        return Embeddings(encoder.encode(told), test.stimulus_ids, space), gallery

    def _draw_images(self, study: Study, chosen: dict[int, np.ndarray]) -> tuple[Plot, ...]:
        """Return a figure of what the run's generator makes of imagined trials."""
        if not self.images:
            return ()
        if study.reconstruct is None:
            raise DataError("imagery.images needs a run that makes images; leave images out.")
        number, rows = next(iter(chosen.items()))
        made, names = study.reconstruct(number, rows)
        made, ids = made[: self.images], [str(name) for name in names[: self.images]]
        pictures = dict(zip(study.stimuli.ids.astype(str), study.stimuli.has_picture, strict=True))
        shown = [study.stimuli.read_image(name) if pictures.get(name) else None for name in ids]

        def draw(figure: Figure) -> None:
            axes = figure.subplots(2, len(ids), squeeze=False)
            for column, (name, picture, image) in enumerate(zip(ids, shown, made, strict=True)):
                for row, content in enumerate((picture, image)):
                    axes[row, column].set_axis_off()
                    if content is not None:
                        axes[row, column].imshow(content)
                axes[0, column].set_title(_shorten(name), fontsize=6)

        caption = (
            f"Imagined stimuli (first {len(ids)} of the task {self.task!r}) above the image that the "
            "run's prior and generator make from the mean of their trials; stimuli without a picture "
            "have no image above."
        )
        alt = f"Reconstructions of {len(ids)} imagined stimuli below their pictures."
        return (Plot("imagined_images", caption, alt, draw, (1.1 * max(4, len(ids)), 2.6)),)

    def _report(self, study: Study, table: pd.DataFrame, *, own_mean: bool) -> Findings:
        metric = table["metric"].iloc[0]
        shown = table[table["metric"] == metric].reset_index(drop=True)

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            draw_bars(
                axes, shown, [f"{r.task}, {r.stimulus_set} ({r.n_stimuli})" for r in shown.itertuples()]
            )
            axes.axvline(float(shown["chance"].iloc[0]), color="C2", lw=1, ls="--", label="chance")
            axes.set_xlabel(find_metric(metric).label)
            axes.legend()

        own = shown[shown["task"] == self.task]
        parts = [
            f"{r.task}, {r.stimulus_set}: {metric} {r.value:.3f} ({describe_limits(r._asdict(), what='')}, chance "
            f"{r.chance:.3f}, {r.n_stimuli} stimuli, {format_p_value(r.p_value, in_words=True)})"
            for r in shown.itertuples()
        ]
        found = "; ".join(parts) + "."
        apart = (
            "none" if study.centre == "none" or self.own_mean else "candidates" if own_mean else "training"
        )
        apart = "words" if self.candidates == "words" else apart
        among = {
            "pictures": "",
            **dict.fromkeys(
                ("text", "words"), f", where candidates are texts in the space of the images{_CENTRED[apart]}"
            ),
            "captions": ", by the caption of the nearest training image in a sentence encoder",
        }[self.candidates]  # fmt: skip
        how = (
            f"Encoders trained without trials of the task {self.task!r} identified imagined stimuli "
            f"among their set{among}; p-values permute the stimulus labels {study.n_permutations} times, "
            "uncorrected for the "
            "number of sets."
        )
        if self.own_mean:
            how += f" Predictions and candidates are {_OWN_MEAN}."
        caption = f"{metric} by task and set of stimuli (number of stimuli in brackets), with 95 % intervals."
        plot = Plot("imagery", caption, found, draw, (7.0, 1.6 + 0.32 * len(shown)))
        suffix = "" if self.candidates == "pictures" else f"_{self.candidates}"
        suffix += "_own_mean" if self.own_mean else ""
        scores = tuple(
            Score(
                method="decoded", metric=f"{r.metric}@{r.task}_{r.stimulus_set}{suffix}", value=r.value,
                chance=r.chance, n_queries=r.n, protocol=self._name_protocol(study), subject="all", split="test",
                seed=study.seed,
                **pick_limits(r._asdict()), gallery_size=r.n_stimuli, p_value=r.p_value,
            )
            for r in own.itertuples()
        )  # fmt: skip
        title = "Imagery" if self.candidates == "pictures" else f"Imagery, by {self.candidates}"
        title += ", centred by its own mean" if self.own_mean else ""
        return Findings(title, f"{how} {found}", table, (plot,), scores)


def list_trials(study: Study, task: str, *, strict: bool) -> dict[int, np.ndarray]:
    """Return fold to trials of a task that its encoder did not learn from.

    The folds' own test trials of the task; where no fold tests it, all its trials with the first fold's encoder.

    Parameters
    ----------
    strict
        No encoder may have learnt from the task at all, as imagery needs.

    Raises
    ------
    DataError
        If that is not so, or an encoder was trained on stimuli that the task tests.
    """
    trials = study.responses.trials
    mine = np.flatnonzero(trials["task"].astype(str).to_numpy() == task)
    imagined = study.imagined or [np.array([], int)] * len(study.folds)
    tested = [np.append(fold.test, rows) for fold, rows in zip(study.folds, imagined, strict=True)]
    chosen = {n: np.intersect1d(rows, mine) for n, rows in enumerate(tested)}
    chosen = {n: rows for n, rows in chosen.items() if len(rows)}
    if not chosen:  # no fold tests the task: the first encoder is as good as any
        rows = np.setdiff1d(mine, study.folds[0].train)
        chosen = {0: rows} if len(rows) else {}
    for number, rows in chosen.items():
        train = study.folds[number].train
        if strict and len(np.intersect1d(train, mine)):
            raise DataError(
                f"fold {number} trains on trials of the task {task!r}; choose a split that only tests them."
            )
        shared = set(trials["stimulus_id"].iloc[train]) & set(trials["stimulus_id"].iloc[rows])
        if shared:
            raise DataError(
                f"fold {number} trains on {len(shared)} stimuli that the task {task!r} tests, first {min(shared)!r}."
            )
    return chosen


def predict_imagery(study: Study, number: int, test: Responses) -> tuple[Embeddings, Embeddings]:
    """Return centred predictions of trials and the centred targets of their distinct stimuli."""
    encoder, bank = complete_encoder(study.trained(number)), study.banks[number]
    trained_on = pd.unique(study.responses.stimulus_ids[study.folds[number].train])
    centre = fit_centre(encoder.map_targets(bank.select(trained_on)), study.centre)
    targets = find_targets(study, bank, list(pd.unique(test.stimulus_ids)))
    return centre.apply(encoder.predict(test)), centre.apply(encoder.map_targets(targets))


def find_targets(study: Study, bank: Embeddings, ids: list[str]) -> Embeddings:
    """Return the embedding of each stimulus; of one without a picture, the mean over the pictures of its concept.

    Raises
    ------
    DataError
        If neither the stimulus nor its concept has a picture.
    """
    # Rows of the stimulus table may have no picture, and pictures may have been left out of the bank.
    table = study.stimuli.table
    held = set(bank.ids.tolist())
    usable = study.stimuli.has_picture & table["stimulus_id"].isin(held).to_numpy()
    own = dict(zip(table["stimulus_id"], usable, strict=True))
    concepts = study.stimuli.concepts_of(ids)
    vectors = []
    for name, concept in zip(ids, concepts, strict=True):
        members = [name]
        if not own.get(name, False):
            members = table["stimulus_id"][usable & (table["concept"] == concept).to_numpy()].tolist()
        if not members:
            raise DataError(
                f"the imagined stimulus {name!r} has no picture, and neither has its concept {concept!r}; add images "
                "of it to the stimulus set."
            )
        vectors.append(bank.select(members).vectors.mean(axis=0))
    return Embeddings(np.stack(vectors), ids, bank.space)


# --- texts as candidates ------------------------------------------------------------------------------------------


def name_stimuli(study: Study, ids: list[str], bank: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return what each stimulus is called: its captions, or the name of its concept.

    Raises
    ------
    DataError
        If a stimulus has no caption, and no concept but its id.
    """
    texts: dict[str, list[str]] = {}
    for name, concept in zip(ids, study.stimuli.concepts_of(ids), strict=True):
        if name in bank:
            texts[name] = list(bank[name])
        elif str(concept) != name:
            texts[name] = [_word(str(concept))]
        else:
            raise DataError(
                f"the imagined stimulus {name!r} has no words: the bank has no caption of it, and its "
                "concept is its id; give captions of the stimuli with imagery.bank (CSV with the columns "
                "id and caption)."
            )
    return texts


def centre_texts(study: Study, bank: Mapping[str, Sequence[str]], number: int) -> Centre | None:
    """Return the mean of the texts of a fold's training images, in the space of the comparison; None without any, or
    where the run takes no mean off.

    A text is the first caption of an image, or where the bank has none of any training image, the name of its concept;
    each text counts once, and of more than `MOST_TEXTS` evenly spaced ones are read.
    """
    if study.embed_texts is None or study.centre == "none":
        return None
    ids = [str(name) for name in pd.unique(study.responses.stimulus_ids[study.folds[number].train])]
    texts = [bank[name][0] for name in ids if name in bank]
    if not texts:
        named = zip(ids, study.stimuli.concepts_of(ids).astype(str), strict=True)
        texts = [_word(concept) for name, concept in named if concept != name]
    if not texts:
        return None
    texts = list(dict.fromkeys(texts))
    texts = texts[:: -(-len(texts) // MOST_TEXTS)]
    read = _average_texts({text: [text] for text in texts}, study.embed_texts, study.banks[number].space)
    return fit_centre(complete_encoder(study.trained(number)).map_targets(read), "mean")


def _word(concept: str) -> str:
    """Return the text that stands for a concept."""
    return f"a photo of {name_concept(concept)}"


def predict_text(
    study: Study,
    number: int,
    test: Responses,
    texts: Mapping[str, Sequence[str]],
    find_centre: Callable[[int], Centre | None],
) -> tuple[Embeddings, Embeddings]:
    """Return centred predictions of trials, and the texts of their stimuli in the same space.

    Texts lie apart from images in a CLIP network, all in one direction; with a centre, the mean of training texts is
    taken off them. Where there are none, it is that of the candidates, which says nothing of which is the right one but
    is known only once all candidates are.

    Parameters
    ----------
    study, number, test
        The fold, and trials that it does not learn from.
    texts
        Of each stimulus of the trials.
    find_centre
        From `centre_texts`.

    Raises
    ------
    DataError
        If the target is no network of image and text.
    """
    if study.embed_texts is None:
        raise DataError(
            "candidates are texts, but the target has no text encoder; use a target of kind openclip, or candidates "
            "captions."
        )
    encoder, bank = complete_encoder(study.trained(number)), study.banks[number]
    trained_on = pd.unique(study.responses.stimulus_ids[study.folds[number].train])
    centre = fit_centre(encoder.map_targets(bank.select(trained_on)), study.centre)
    gallery = encoder.map_targets(_average_texts(texts, study.embed_texts, bank.space))
    learnt = find_centre(number)
    if learnt is None:
        learnt = fit_centre(gallery, "none" if study.centre == "none" else "mean")
    gallery = learnt.apply(gallery)
    queries = centre.apply(encoder.predict(test))
    return Embeddings(queries.vectors, queries.ids, gallery.space), gallery


def predict_words(
    study: Study,
    number: int,
    test: Responses,
    texts: Mapping[str, Sequence[str]],
    bank: Mapping[str, Sequence[str]],
) -> tuple[Embeddings, Embeddings]:
    """Return centred predictions of trials, and the texts of their stimuli by a regression on words in the same space.

    Raises
    ------
    DataError
        If fewer than two training images have a caption.
    """
    encoder, targets = complete_encoder(study.trained(number)), study.banks[number]
    trained_on = pd.unique(study.responses.stimulus_ids[study.folds[number].train])
    learning = encoder.map_targets(targets.select(trained_on))
    centre = fit_centre(learning, study.centre)
    named = [name for name in trained_on if str(name) in bank]
    if len(named) < 2:
        raise DataError(
            f"candidates are words, but imagery.bank has captions of {len(named)} training image(s); add captions of "
            "training images, from which the meaning of words is learnt."
        )
    known = centre.apply(learning.select(named))
    encode = regress_on_words([bank[str(name)] for name in named], known.flat())
    queries = centre.apply(encoder.predict(test))
    gallery = Embeddings(encode(list(texts.values())), list(texts), queries.space)
    return queries, gallery


def regress_on_words(
    texts: Sequence[Sequence[str]], vectors: np.ndarray
) -> Callable[[Sequence[Sequence[str]]], np.ndarray]:
    """Learn by ridge regression what the words of images say of their vectors.

    An image is described by the share of its texts that hold each word; the penalty has the lowest error of leaving out
    one image after the other, which has a closed form.

    Parameters
    ----------
    texts
        Texts of each of n images.
    vectors : array of shape (n, n_features)

    Returns
    -------
    callable
        Takes the texts of each of m images, and returns float32 of shape (m, n_features). Unknown words say nothing.

    Examples
    --------
    >>> encode = regress_on_words([["a red cat"], ["a blue cat"], ["a red dog"]], np.array([[1.0], [0.0], [1.0]]))
    >>> red, blue = encode([["some red thing"], ["blue"]])
    >>> bool(red[0] > blue[0])
    True
    """
    training = [describe_captions(several) for several in texts]
    read = open_reader("words", training)
    predict = fit_ridge(read(training), vectors)
    return lambda asked: predict(read([describe_captions(several) for several in asked]))


def _caption_trials(
    study: Study, number: int, test: Responses, bank: Mapping[str, Sequence[str]]
) -> list[str]:
    """Return the caption of the training image nearest to the prediction of each trial."""
    encoder = complete_encoder(study.trained(number))
    trained_on = pd.unique(study.responses.stimulus_ids[study.folds[number].train])
    training = encoder.map_targets(study.banks[number].select(trained_on))
    # Stimuli of the test are no training images, whatever else the bank holds.
    known = {str(name): bank[str(name)] for name in trained_on if str(name) in bank}
    return retrieve_nearest([encoder.predict(test)], [training], known, device="auto")


def _average_texts(texts: Mapping[str, Sequence[str]], encode: Any, space: str) -> Embeddings:
    """Return one row per stimulus: the mean of the unit vectors of its texts."""
    flat = [text for several in texts.values() for text in several]
    vectors = np.asarray(encode(flat), dtype=np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    starts = np.cumsum([0, *(len(several) for several in texts.values())])[:-1]
    counts = np.array([len(several) for several in texts.values()])[:, None]
    return Embeddings((np.add.reduceat(vectors, starts) / counts).astype(np.float32), list(texts), space)


def _shorten(name: str) -> str:
    return name if len(name) < 15 else f"{name[:13]}..."


def _find_size(name: str) -> int:
    """Return how many stimuli a metric needs so that it can be right and wrong."""
    n = find_metric(name).n
    return n + (compute_chance(name, gallery_size=n) == 1.0)  # nobody misses the five best of five
