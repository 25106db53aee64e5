"""Scores of the parts of a conditional target: the decoded value of each attribute.

The value is named whose training images have the most similar answer (cosine, after the training mean): balanced
accuracy of each attribute, beside what the head says of the seen image itself (``oracle``). P-values are Holm's over
attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Score, normalise_rows
from braindecode_vis.embeddings.attribute_table import AttributeTable
from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
from braindecode_vis.scoring.uncertainty import correct_holm
from braindecode_vis.scoring.units import Units

BALANCED = "balanced_accuracy"


@dataclass(frozen=True)
class TargetTask:
    """Predictions in the target's own space, and what its parts mean.

    Parameters
    ----------
    table
        The attribute of each token, and its values.
    predicted, banks, training : sequences, one entry per fold
        Predictions of the test rows, the embeddings of all images in the same space, and the ids of training images.
    ids, concepts, subjects : arrays of shape (n_rows,)
        Stimulus, its concept and the subject of each test row, fold by fold.
    concept_of
        Concept of every image.
    protocol, split, seed, n_bootstrap, n_permutations, units
        As in `scoring_task.ScoringTask`.
    """

    table: AttributeTable
    predicted: Sequence[Embeddings]
    banks: Sequence[Embeddings]
    training: Sequence[Sequence[str]]
    ids: np.ndarray
    concepts: np.ndarray
    subjects: np.ndarray
    concept_of: dict[str, str]
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    units: Units | None = None

    @property
    def over_folds(self) -> bool:
        """Whether several folds train each other."""
        return len(self.predicted) > 1

    @property
    def folds(self) -> np.ndarray:
        """Fold of each row."""
        return np.repeat(np.arange(len(self.predicted)), [len(one) for one in self.predicted])

    def find_units(self, truth: np.ndarray, rows: np.ndarray) -> Units:
        """Return what is resampled of some rows: images, or concepts where `truth` is the same for all images of one.

        Images of a concept that share the answer are not independent evidence of it.
        """
        if self.units is not None and (own := self.units.select(rows)) is not None:
            return own
        concepts, ids = self.concepts[rows].astype(str), self.ids[rows].astype(str)
        known = np.unique(concepts, return_inverse=True)[1]
        first = np.unique(known, return_index=True)[1]
        shared = (truth == truth[first][known]).all() and len(first) < len(set(ids.tolist()))
        return Units("concept", concepts) if shared and len(first) > 1 else Units("image", ids)


def score_target(task: TargetTask) -> tuple[list[Score], list[str]]:
    """Return the rows of each attribute, and a sentence for each that cannot be scored."""
    found: dict[str, list[Score]] = {}
    lacking = []
    for position, name in enumerate(task.table.names):
        decided = _decide(task, position)
        if decided is None:
            lacking.append(
                f"{BALANCED}@{name} not computed: fewer than two of its values are known of test images and were "
                "trained on."
            )
            continue
        decoded, oracle = decided
        rows, _ = compute_category_scores(decoded)
        seen, _ = compute_category_scores(oracle)
        chance = {score.subject: score.chance for score in rows if score.metric == BALANCED}
        found[name] = [
            replace(score, metric=f"{BALANCED}@{name}") for score in rows if score.metric == BALANCED
        ] + [
            replace(
                score,
                method="oracle",
                metric=f"{BALANCED}@{name}",
                chance=chance[score.subject],
                p_value=None,
            )
            for score in seen
            if score.metric == BALANCED and score.method == "decoded"
        ]
    return _correct([score for rows in found.values() for score in rows]), lacking


def _decide(task: TargetTask, position: int) -> tuple[CategoryTask, CategoryTask] | None:
    """Return the decisions on one attribute, from predictions and from the seen images; None if there are none."""
    table, name = task.table, task.table.names[position]
    prototypes, means, trained = [], [], []
    for bank, ids in zip(task.banks, task.training, strict=True):
        tokens = bank.select(list(ids)).vectors[:, position]
        codes = table.codes_of(list(ids), [task.concept_of[str(i)] for i in ids])[:, position]
        own, counts = np.unique(codes[codes >= 0], return_counts=True)
        trained.append(own[counts > 1])
        means.append(tokens.mean(axis=0))
        prototypes.append({int(code): tokens[codes == code].mean(axis=0) for code in trained[-1]})
    # A value that some fold never trained on could not be decided there.
    shared = sorted(set.intersection(*(set(own.tolist()) for own in trained)))
    truth = table.codes_of(task.ids.astype(str).tolist(), task.concepts.astype(str).tolist())[:, position]
    rows = np.flatnonzero(np.isin(truth, shared))
    if len(shared) < 2 or len(np.unique(truth[rows])) < 2:
        return None
    decisions: dict[str, list[np.ndarray]] = {"decoded": [], "oracle": []}
    for number, predicted in enumerate(task.predicted):
        values = np.stack([prototypes[number][code] for code in shared])
        seen = task.banks[number].select(list(predicted.ids))
        for method, given in (("decoded", predicted), ("oracle", seen)):
            # Cosines with the mean answer of each value; the mean answer of all training images is taken off both.
            answers = normalise_rows(given.vectors[:, position] - means[number])
            decisions[method].append(answers @ normalise_rows(values - means[number]).T)
    classes = tuple(table.values[name][code] for code in shared)
    labels = np.array([table.values[name][code] for code in truth[rows]], dtype=object)
    decoded = CategoryTask(
        decisions=np.concatenate(decisions["decoded"])[rows], classes=classes, labels=labels,
        runs=task.folds[rows], subjects=task.subjects[rows], protocol=task.protocol, split=task.split, seed=task.seed,
        n_bootstrap=task.n_bootstrap, n_permutations=task.n_permutations, units=task.find_units(truth[rows], rows),
        over_folds=task.over_folds,
    )  # fmt: skip
    return decoded, replace(decoded, decisions=np.concatenate(decisions["oracle"])[rows], n_permutations=1)


def _correct(scores: Sequence[Score]) -> list[Score]:
    """Return the scores with p-values that are Holm's over the attributes of each subject."""
    tested: dict[str, list[int]] = {}
    for place, score in enumerate(scores):
        if score.p_value is not None:
            tested.setdefault(score.subject, []).append(place)
    out = list(scores)
    for places in tested.values():
        corrected = correct_holm(np.array([scores[place].p_value for place in places], dtype=float))
        for place, p_value in zip(places, corrected, strict=True):
            out[place] = replace(out[place], p_value=float(p_value))
    n_attributes = max(map(len, tested.values()), default=0)
    return [replace(s, protocol=f"{s.protocol}; p by Holm over {n_attributes} attributes") for s in out]
