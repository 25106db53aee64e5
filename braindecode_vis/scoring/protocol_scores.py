"""Rows of the table of scores for the protocols of single papers and data sets, with unambiguous names.

Owns which protocol needs what, the names of the metrics, and groups by subject. The protocols themselves are those of
`braindecode_vis.scoring.metrics.protocols`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, get_args

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.scoring.metrics import protocols
from braindecode_vis.scoring.metrics.protocols import ProtocolName
from braindecode_vis.scoring.metrics.query_calibration import calibrate
from braindecode_vis.scoring.retrieval import (
    Retrieval,
    compute_ranks,
    compute_relative_ranks,
    compute_top_k_hits,
    rank_similarities,
)
from braindecode_vis.scoring.score_row import POOLED, make_score
from braindecode_vis.scoring.scoring_task import list_subjects
from braindecode_vis.scoring.units import Units

TOP = (1, 5)
#: What NeuralBench reports beside the share of the first place.
NEURALBENCH_TOP = (1, 5, 10)


@dataclass(frozen=True)
class CompositionSides:
    """Tests of composition against one gallery, row by row.

    Parameters
    ----------
    label
        ``images`` or ``texts``.
    queries, true, swapped : Embeddings of n rows
        Predictions, what was seen, and what has the same parts, in one space.
    kinds, pairs, subjects : arrays of shape (n,)
        What changed places, what the two sides are called together, and whose predictions they are.
    note
        How texts got into the space.
    """

    label: str
    queries: Embeddings
    true: Embeddings
    swapped: Embeddings
    kinds: np.ndarray
    pairs: np.ndarray
    subjects: np.ndarray
    note: str = ""


@dataclass(frozen=True)
class ProtocolTask:
    """Predictions and galleries that protocols are run on.

    Parameters
    ----------
    retrievals
        Predictions, gallery and ranks of each fold; their rows in order are the rows below.
    concepts, subjects : arrays of shape (n_rows,)
        Concept and subject of each row.
    concept_of
        Concept of every id of the galleries.
    protocol, split, seed, n_bootstrap
        As in `scoring.ScoringTask`.
    predicted
        Predictions of each fold in the joint space of images and text, without a centre; for ``zero_shot_text``.
    text
        One embedding per concept name, in that space.
    templates
        Gallery of `protocols.make_concept_templates` in the space of the queries; for ``concept_templates``.
    compositions
        Tests for ``composition``.
    n_drawn, n_draws
        Size and number of the subsets of ``nsd_300``; of a smaller test set all images.
    device
        Where ranks are computed.
    units
        As in `scoring.ScoringTask`; averages over all trials of an image resample images.
    over_folds
        As in `score_row.make_score`.
    """

    retrievals: Sequence[tuple[Embeddings, Embeddings, Retrieval]]
    concepts: np.ndarray
    subjects: np.ndarray
    concept_of: Mapping[str, str]
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    predicted: Sequence[Embeddings] | None = None
    text: Embeddings | None = None
    templates: Embeddings | None = None
    compositions: Sequence[CompositionSides] = ()
    n_drawn: int = 300
    n_draws: int = 30
    device: str = "auto"
    units: Units | None = None
    over_folds: bool = False

    def __post_init__(self) -> None:
        n_rows = sum(len(queries) for queries, _, _ in self.retrievals)
        if {len(self.concepts), len(self.subjects)} != {n_rows}:
            raise DataError(
                f"{n_rows} predictions came with {len(self.concepts)} concepts and {len(self.subjects)} subjects."
            )

    @cached_property
    def ids(self) -> np.ndarray:
        """Stimulus of each row."""
        return np.concatenate([queries.ids for queries, _, _ in self.retrievals]).astype(str)

    @cached_property
    def folds(self) -> list[np.ndarray]:
        """Rows of each fold."""
        ends = np.cumsum([len(queries) for queries, _, _ in self.retrievals])
        return np.split(np.arange(ends[-1]), ends[:-1])


@dataclass(frozen=True)
class _Values:
    """One value per row, with the stimulus and subject of each, and what makes a score of them."""

    metric: str
    values: np.ndarray
    ids: np.ndarray
    subjects: np.ndarray
    chance: float
    gallery_size: int | None
    statistic: Any = "mean"
    note: str = ""  # what the protocol says more
    unit: str = "image"  # what `ids` are
    #: Whether the score of several subjects is the mean over all rows, instead of the mean of subject means.
    pools_rows: bool = False


def score_protocols(task: ProtocolTask, names: Sequence[ProtocolName]) -> list[Score]:
    """Return the rows of the named protocols for each subject, and for all of them if there are several.

    Parameters
    ----------
    task
        What they are run on.
    names
        ``relative_median_rank`` (both definitions), ``mean_average_precision`` (all images of the concept are
        relevant), ``within_concept``, ``instances`` (single trials beside averaged predictions), ``nsd_300`` (drawn and
        exact, in both directions: images for a response, responses for an image), ``zero_shot_text``,
        ``concept_templates``, ``transductive`` (the unlabelled test queries of each subject correct their own
        similarities; see `scoring.metrics.query_calibration`), ``composition`` (what was seen against the same parts
        bound otherwise, and as a control against other parts), ``neuralbench`` (see `rank_as_neuralbench`).

    Raises
    ------
    ConfigError
        If a protocol lacks what it needs.
    """
    scores: list[Score] = []
    for name in names:
        check_option("evaluation.protocols", name, get_args(ProtocolName))
        if name == "nsd_300":
            scores += score_draws(task)
            continue
        for found in _COMPUTE[name](task):
            for subject, rows in list_subjects(found.subjects):
                pooled = subject == POOLED
                # Averages over the trials of an image have rows of their own.
                own = task.units is not None and found.ids is task.ids
                units = (
                    task.units.select(rows, found.ids[rows] if pooled else None)
                    if own and task.units is not None
                    else None
                )
                score = (
                    make_score(
                        found.values[rows], metric=found.metric, method="decoded",
                        protocol=task.protocol + found.note, subject=subject, split=task.split, seed=task.seed,
                        chance=found.chance,
                        gallery_size=found.gallery_size,
                        stimulus_ids=found.ids[rows] if units is None else units.labels,
                        unit=found.unit if units is None else units.unit,
                        subjects=found.subjects[rows] if pooled else None, statistic=found.statistic,
                        n_boot=task.n_bootstrap, over_folds=task.over_folds,
                    )
                )  # fmt: skip
                scores.append(_pool_rows(score, found.values) if pooled and found.pools_rows else score)
    return scores


def _pool_rows(score: Score, values: np.ndarray) -> Score:
    """Return a score of several subjects with the mean over all rows as its value."""
    value = float(values.mean())
    if abs(value - score.value) < 1e-12:  # as many rows of each subject: the interval holds
        return score
    why = "no interval: subjects have different numbers of queries, and this score pools all queries"
    return replace(score, value=value, ci_low=None, ci_high=None, resampled=why)


def _collect(task: ProtocolTask, compute: Callable[[int], np.ndarray]) -> np.ndarray:
    return np.concatenate([compute(fold) for fold in range(len(task.retrievals))])


def _average_size(task: ProtocolTask) -> tuple[np.ndarray, int | None]:
    """Return the gallery size of each row, and the one size that all share or None."""
    sizes = _collect(task, lambda f: np.full(len(task.folds[f]), task.retrievals[f][2].gallery_size))
    return sizes, int(sizes[0]) if len(set(sizes.tolist())) == 1 else None


def rank_relatively(task: ProtocolTask) -> Iterator[_Values]:
    """Yield the relative median rank in the two definitions that papers use."""
    sizes, common = _average_size(task)
    ranked = [retrieval for _, _, retrieval in task.retrievals]
    from_zero = np.concatenate([compute_relative_ranks(r, convention="zero_to_one") for r in ranked])
    fraction = np.concatenate([compute_relative_ranks(r, convention="fraction") for r in ranked])
    # Papers divide by N or by N - 1 after the first place; with 200 images chance differs by 0.0025.
    for label, values, chance in (
        ("zero-to-one", from_zero, 0.5),
        ("fraction", fraction, float(((sizes + 1) / (2 * sizes)).mean())),
    ):
        metric = f"relative_median_rank@{label}"
        yield _Values(metric, values, task.ids, task.subjects, chance, common, "median")


def rank_concepts(task: ProtocolTask) -> Iterator[_Values]:
    """Yield mean average precision, where every image of the concept is relevant."""

    def labels(fold: int) -> np.ndarray:
        return np.array([task.concept_of[str(i)] for i in task.retrievals[fold][1].ids], dtype=object)

    values = _collect(
        task,
        lambda f: protocols.compute_average_precision(
            task.retrievals[f][0],
            task.retrievals[f][1],
            task.concepts[task.folds[f]],
            labels(f),
            device=task.device,
        ),
    )
    levels = []
    for fold, rows in enumerate(task.folds):
        names, counts = np.unique(labels(fold).astype(str), return_counts=True)
        of = dict(zip(names, counts, strict=True))
        n_relevant = np.array([of[str(concept)] for concept in task.concepts[rows]])
        levels.append(protocols.compute_chance_precision(n_relevant, task.retrievals[fold][2].gallery_size))
    chance, common = float(np.concatenate(levels).mean()), _average_size(task)[1]
    yield _Values("mean_average_precision@concept", values, task.ids, task.subjects, chance, common)


def identify_within_concept(task: ProtocolTask) -> Iterator[_Values]:
    """Yield two-way identification among the gallery's images of the own concept."""
    values = _collect(
        task,
        lambda f: protocols.identify_within_label(
            task.retrievals[f][0], task.retrievals[f][1],
            [task.concept_of[str(i)] for i in task.retrievals[f][1].ids], device=task.device,
        ),
    )  # fmt: skip
    # Not the score of reconstructions within their class: the distractors are those of the whole gallery.
    metric = "two_way_identification_within_class@gallery"
    yield _Values(metric, values, task.ids, task.subjects, 0.5, _average_size(task)[1])


def _list_hits(
    task: ProtocolTask, ranked: Sequence[Retrieval], label: str, ids: np.ndarray, subjects: np.ndarray
) -> Iterator[_Values]:
    sizes = np.concatenate([np.full(r.n_queries, r.gallery_size) for r in ranked])
    common = int(sizes[0]) if len(set(sizes.tolist())) == 1 else None
    for k in TOP:
        if k < sizes.min():  # naming everything is no hit
            hits = np.concatenate([compute_top_k_hits(r, k).astype(float) for r in ranked])
            yield _Values(f"top{k}@{label}", hits, ids, subjects, float((k / sizes).mean()), common)


def rank_instances(task: ProtocolTask) -> Iterator[_Values]:
    """Yield top-k of single trials beside that of predictions averaged over repetitions."""
    pairs = list(zip(task.subjects.tolist(), task.ids.tolist(), strict=True))
    if len(set(pairs)) == len(pairs):
        raise ConfigError(
            "the protocol 'instances' compares single trials with their average, but every test image has one row: "
            "in a run, set repeats.test to single."
        )
    yield from _list_hits(task, [r for _, _, r in task.retrievals], "instance", task.ids, task.subjects)
    ranked, ids, subjects = [], [], []
    for (queries, gallery, _), rows in zip(task.retrievals, task.folds, strict=True):
        averaged, who = protocols.average_predictions(queries, task.subjects[rows])
        ranked.append(compute_ranks(averaged, gallery, n_top=0, device=task.device))
        ids.append(averaged.ids.astype(str))
        subjects.append(who)
    yield from _list_hits(task, ranked, "averaged", np.concatenate(ids), np.concatenate(subjects))


def rank_names(task: ProtocolTask) -> Iterator[_Values]:
    """Yield top-k of the true concept's name among all names."""
    if task.text is None or task.predicted is None:
        raise ConfigError(
            "the protocol 'zero_shot_text' needs embeddings of the concept names in the space of the target; choose a "
            "CLIP target (target.kind openclip) with its text tower."
        )
    ranked = [
        protocols.classify_by_text(predicted, task.concepts[rows], task.text, device=task.device)
        for predicted, rows in zip(task.predicted, task.folds, strict=True)
    ]
    yield from _list_hits(task, ranked, "text", task.ids, task.subjects)


def rank_templates(task: ProtocolTask) -> Iterator[_Values]:
    """Yield top-k in a gallery of templates, each the mean of other images of a concept."""
    if task.templates is None:
        raise ConfigError(
            "the protocol 'concept_templates' needs further images of the test concepts; give their "
            "folder, or leave the protocol out."
        )
    ranked = [compute_ranks(q, task.templates, n_top=0, device=task.device) for q, _, _ in task.retrievals]
    yield from _list_hits(task, ranked, "concept-templates", task.ids, task.subjects)


def rank_calibrated(task: ProtocolTask) -> Iterator[_Values]:
    """Yield top-k after each transductive correction, which takes the queries of one subject together."""
    hits: dict[tuple[str, int], np.ndarray] = {}
    n_rows, n_used, n_all, sizes = len(task.ids), 0, 0, set()
    for (queries, gallery, _), rows in zip(task.retrievals, task.folds, strict=True):
        sizes.add(len(gallery))
        for subject in sorted(set(task.subjects[rows].tolist())):
            some = np.flatnonzero(task.subjects[rows] == subject)
            own = queries.take(some)
            found = calibrate(own, gallery)
            n_used, n_all = n_used + found.rotation.used, n_all + 1
            for name, similarity in found.similarities.items():
                ranked = rank_similarities(similarity, own.ids, gallery.ids, n_top=0)
                for k in TOP:
                    if k < len(gallery):
                        values = hits.setdefault((name, k), np.full(n_rows, np.nan))
                        values[rows[some]] = compute_top_k_hits(ranked, k)
    size = sizes.pop() if len(sizes) == 1 else None
    for (name, k), values in hits.items():
        note = "; transductive: all unlabelled test queries of a subject together"
        if name == "score":
            note += f"; rotated for {n_used} of {n_all}, the others had landmarks that do not agree"
        chance = float((k / _average_size(task)[0]).mean())
        yield _Values(f"top{k}@transductive-{name}", values, task.ids, task.subjects, chance, size, note=note)


def score_draws(task: ProtocolTask) -> Iterator[Score]:
    """Yield retrieval in drawn subsets for each subject; predictions are averaged over repetitions first."""
    if len(task.retrievals) > 1:
        raise ConfigError("the protocol 'nsd_300' needs one test set; set split.kind to published.")
    queries, gallery, _ = task.retrievals[0]
    for who in sorted(set(task.subjects.tolist())):
        rows = np.flatnonzero(task.subjects == who)
        # NSD shows each test image three times; the published number is of their mean.
        own, _ = protocols.average_predictions(queries.take(rows))
        n_drawn = min(
            task.n_drawn, len(own)
        )  # a smaller test set is searched whole, which the name of a row says
        found = protocols.retrieve_in_draws(
            own, gallery, n_items=n_drawn, n_draws=task.n_draws, seed=task.seed, n_boot=task.n_bootstrap,
            device=task.device,
        )  # fmt: skip
        for direction, result in found.items():
            label = f"{direction}@{n_drawn}-way"
            for metric, value in (
                (f"{label}-{task.n_draws}-draws", result.value),
                (f"{label}-exact", float(result.exact.mean())),
            ):
                yield Score(
                    method="decoded", metric=metric, value=value, chance=1 / n_drawn, n_queries=len(own),
                    protocol=task.protocol, subject=str(who), split=task.split, seed=task.seed,
                    ci_low=result.interval.low, ci_high=result.interval.high, gallery_size=n_drawn,
                    resampled="images",
                )  # fmt: skip


def compare_bindings_of_pairs(task: ProtocolTask) -> Iterator[_Values]:
    """Yield how often what was seen is preferred to the same parts bound otherwise, of all kinds and of each.

    Beside it how often it is preferred to other parts: without that, chance in the first says nothing of binding.
    """
    if not task.compositions:
        raise ConfigError("the protocol 'composition' needs tests; set evaluation.composition.file.")
    for label in dict.fromkeys(sides.label for sides in task.compositions):
        several = [sides for sides in task.compositions if sides.label == label]
        bound = np.concatenate([protocols.compare_bindings(s.queries, s.true, s.swapped) for s in several])
        parts = np.concatenate(
            [
                protocols.compare_parts(
                    s.queries,
                    s.true,
                    [f"{a} {b}" for a, b in zip(s.kinds, s.subjects, strict=True)],
                    list(s.pairs),
                )
                for s in several
            ]
        )
        kinds, pairs, subjects = (
            np.concatenate([np.asarray(getattr(s, name), dtype=object) for s in several])
            for name in ("kinds", "pairs", "subjects")
        )
        note, known = several[0].note, np.isfinite(parts)
        named = [kind for kind in dict.fromkeys(kinds.tolist()) if kind]
        for kind in ("", *(named if len(named) > 1 else ())):
            own = np.ones(len(kinds), dtype=bool) if not kind else kinds == kind
            suffix = f"{label}-{kind}" if kind else label
            # Both sides of a pair are resampled together: a gallery that prefers one of them is right once, wrong once.
            yield _Values(
                f"binding@{suffix}", bound[own], pairs[own], subjects[own], 0.5, 2, note=note, unit="pair"
            )
        if known.any():
            yield _Values(
                f"parts@{label}",
                parts[known],
                pairs[known],
                subjects[known],
                0.5,
                None,
                note=note,
                unit="pair",
            )


def rank_as_neuralbench(task: ProtocolTask) -> Iterator[_Values]:
    """Yield the scores of NeuralBench's image task, under the names that it gives them.

    A name without ending has every row as a query, the warm-up of the challenge on this task. ``_subject-agg`` has the
    mean prediction of each subject and image, its sealed phase, and ``_instance-agg`` that of each image. The mean is
    taken of raw predictions, so that long ones weigh more. Images of equal embeddings are one candidate, the mean rank
    of tied candidates decides, and all queries weigh the same, whichever subject they come from.

    References
    ----------
    Banville et al. (2026), NeuralBench, and the NeurIPS 2026 challenge "EEG-to-image".
    """
    levels = dict[str, list[tuple[Retrieval, np.ndarray, np.ndarray]]]()
    for (queries, gallery, _), rows in zip(task.retrievals, task.folds, strict=True):
        merged, became = protocols.merge_equal_items(gallery)
        renamed = Embeddings(queries.vectors, [became[str(i)] for i in queries.ids], queries.space)
        of_subjects, who = protocols.average_predictions(renamed, task.subjects[rows])
        of_images, _ = protocols.average_predictions(renamed)
        together = np.full(len(of_images), "average", dtype=object)
        for ending, asked, subjects in (
            ("", renamed, task.subjects[rows]),
            ("_subject-agg", of_subjects, who),
            ("_instance-agg", of_images, together),
        ):
            ranked = compute_ranks(asked, merged, n_top=0, device=task.device)
            levels.setdefault(ending, []).append((ranked, asked.ids.astype(str), subjects))
    for ending, found in levels.items():
        ids, subjects = (np.concatenate([part[n] for part in found]) for n in (1, 2))
        sizes = np.concatenate([np.full(r.n_queries, r.gallery_size) for r, _, _ in found])
        common = int(sizes[0]) if len(set(sizes.tolist())) == 1 else None
        names: list[tuple[str, Callable[[Retrieval], np.ndarray], float]] = [
            (f"top{k}_acc", partial(compute_top_k_hits, k=k, ties="middle"), float((k / sizes).mean()))
            for k in NEURALBENCH_TOP
            if k < sizes.min()
        ]
        names.append(("inv_norm_rank_mean", lambda ranked: 1 - compute_relative_ranks(ranked), 0.5))
        for name, compute, chance in names:
            values = np.concatenate([compute(ranked) for ranked, _, _ in found])
            yield _Values(f"{name}{ending}", values, ids, subjects, chance, common, pools_rows=True)


_COMPUTE: dict[str, Callable[[ProtocolTask], Iterator[_Values]]] = {
    "relative_median_rank": rank_relatively,
    "mean_average_precision": rank_concepts,
    "within_concept": identify_within_concept,
    "instances": rank_instances,
    "zero_shot_text": rank_names,
    "concept_templates": rank_templates,
    "transductive": rank_calibrated,
    "neuralbench": rank_as_neuralbench,
    "composition": compare_bindings_of_pairs,
}
