"""Imagery: encoders that learnt from what was seen, tested on what was imagined.

Owns identification of imagined (and, beside it, seen) stimuli within a task and a set of stimuli, with a permutation of
the stimulus labels as WAVE reports. No imagery trial is trained on; where a split trains on some of the task, its
encoder is refused. What was imagined without a picture (a category, a word) is represented by the mean embedding of the
images of its concept, as Horikawa and Kamitani do. Few stimuli are imagined, so repetitions in other subjects
matter more than the size of a p-value.

References
----------
Horikawa and Kamitani (2017), doi:10.1038/ncomms15037; Kneeland et al. (2025), NSD-Imagery; WAVE, arXiv:2411.07121.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.analysis.drawing import draw_bars
from braindecode_vis.analysis.measure import Meter, RetrievalMetric, check_retrieval
from braindecode_vis.analysis.study import Findings, Plot, Study, play_encoder
from braindecode_vis.arrays import Embeddings, Responses, Score
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.preprocessing.repeats import average_repetitions
from braindecode_vis.retrieval import compute_ranks, fit_centre
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_SHUFFLES = 10_000


class ImageryConfig(Settings):
    """Identify imagined stimuli with encoders of seen ones.

    Parameters
    ----------
    task
        Value of the trial column `task` that marks imagery.
    beside
        Other tasks that are identified in the same way, for comparison, where there are any.
    set_column
        Trial column that parts the stimuli into sets; candidates come from the own set. Where it is missing, all
        stimuli of a task are one set.
    metrics
        ``two_way`` (pairwise identification), ``top<k>`` and ``<k>_way``; those that need more stimuli are left out.
    average
        Average the repetitions of a subject and stimulus first.
    n_shuffles
        Permutations of the stimulus labels, at least 10 000.
    """

    kind: Literal["imagery"] = "imagery"

    needs_pictures: ClassVar[bool] = False

    task: str = "imagery"
    beside: tuple[str, ...] = ("vision", "test", "natural", "shapes", "perception")
    set_column: str = "stimulus_set"
    metrics: tuple[RetrievalMetric, ...] = Field(default=("two_way", "top1", "5_way"), min_length=1)
    average: bool = True
    n_shuffles: int = Field(default=MIN_SHUFFLES, ge=MIN_SHUFFLES)

    def compute(self, study: Study) -> Findings:
        """Predict imagery trials and permute the labels."""
        check_retrieval(study, self.kind)
        if "task" not in study.responses.trials:
            raise DataError(
                "the trial table has no column task, so seen and imagined trials cannot be told apart; use "
                "nsd_imagery, god or deeprecon, or add the column."
            )
        # Few stimuli give coarse nulls, so the number of shuffles is not what limits the p-value.
        study = replace(study, n_permutations=max(self.n_shuffles, study.n_permutations))
        rows: list[dict[str, Any]] = []
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
            rows += self._identify(study, task, chosen)
        if not rows:
            raise DataError(
                "imagery needs at least two stimuli in a set, and a metric that fits their number."
            )
        return self._report(study, pd.DataFrame(rows))

    def _identify(self, study: Study, task: str, chosen: dict[int, np.ndarray]) -> list[dict[str, Any]]:
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
                test = average_repetitions(test) if self.average else test
                if len(pd.unique(test.stimulus_ids)) < 2:  # nothing to tell it from
                    continue
                queries, gallery = predict_imagery(study, number, test)
                ranked = compute_ranks(queries, gallery, n_top=1, protocol=study.protocol)
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

    def _report(self, study: Study, table: pd.DataFrame) -> Findings:
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
            f"{r.task}, {r.stimulus_set}: {metric} {r.value:.3f} ({r.ci_low:.3f} to {r.ci_high:.3f}, chance "
            f"{r.chance:.3f}, {r.n_stimuli} stimuli, p = {r.p_value:.2g})"
            for r in shown.itertuples()
        ]
        found = "; ".join(parts) + "."
        how = (
            f"Encoders that saw no trial of the task {self.task!r} in training identified imagined stimuli among their "
            f"set; p-values permute the stimulus labels {study.n_permutations} times, uncorrected for the number of "
            "sets."
        )
        caption = f"{metric} by task and set of stimuli (number of stimuli in brackets), with 95 % intervals."
        plot = Plot("imagery", caption, found, draw, (7.0, 1.6 + 0.32 * len(shown)))
        scores = tuple(
            Score(
                method="decoded", metric=f"{r.metric}@{r.task}_{r.stimulus_set}", value=r.value, chance=r.chance,
                n_queries=r.n, protocol=study.protocol, subject="all", split="test", seed=study.seed, ci_low=r.ci_low,
                ci_high=r.ci_high, gallery_size=r.n_stimuli, p_value=r.p_value,
            )
            for r in own.itertuples()
        )  # fmt: skip
        return Findings("Imagery", f"{how} {found}", table, (plot,), scores)


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
    encoder, bank = play_encoder(study.trained(number)), study.banks[number]
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


def _find_size(name: str) -> int:
    """Return how many stimuli a metric needs so that it can be right and wrong."""
    n = find_metric(name).n
    return n + (compute_chance(name, gallery_size=n) == 1.0)  # nobody misses the five best of five
