"""When a category can be decoded: shrinkage LDA in short windows, for data with classes instead of images.

Owns the area under the ROC curve of each window, the mean over held-out runs (each has a decoder of its own, whose
scores need not share a scale). The null permutes the labels of the held-out trials within each run, the same for all
windows; fitted decoders stay as they are. For more than two classes the area is the mean over classes, each against the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.encoders.category_decoders import LdaConfig
from braindecode_vis.parts.analyses.curves import (
    MAX_DRAWS,
    MIN_SUBJECTS,
    check_windows,
    cluster_over_labels,
    cluster_over_subjects,
    finish_curve,
    report_curve,
)
from braindecode_vis.parts.analyses.cuts import ShortWindows, Window, cut_window, make_sliding_windows
from braindecode_vis.parts.analyses.study import Findings, Study
from braindecode_vis.preprocessing.splits import make_groups
from braindecode_vis.scoring.crossed import groups_interval
from braindecode_vis.scoring.uncertainty import (
    WIDENED,
    compute_p_value,
    permute_within,
    widen_about,
    widen_limits,
)


class TimeResolvedCategoriesConfig(ShortWindows):
    """Decode the category in short windows of time."""

    kind: Literal["time_resolved_categories"] = "time_resolved_categories"

    #: Level of the cluster test.
    alpha: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"alpha"})

    uses_encoder: ClassVar[bool] = False

    def compute(self, study: Study) -> Findings:
        """Fit one decoder per window and fold, and test the curve."""
        windows = make_sliding_windows(study.responses, self.width, self.step, self.tmin, self.tmax)
        check_windows(windows)
        responses = label_trials(study)
        _check_shared_categories(responses, study)
        blocks = decide_windows(study, responses, windows)
        subjects = np.array([block.subject for block in blocks], dtype=object)
        areas = np.stack([block.areas for block in blocks])  # (n_blocks, n_windows)
        curve, means = average_subjects(areas, subjects), average_by_subject(areas, subjects)
        null = _permute(blocks, study)
        if len(means) >= MIN_SUBJECTS:
            test = cluster_over_subjects(
                means, 0.5, seed=study.seed, n_permutations=study.n_permutations, alpha=self.alpha
            )
        else:
            test = cluster_over_labels(curve, null, alpha=self.alpha)
        draws = bootstrap_areas(blocks, study)
        low, high, words = bound_areas(means, draws, "trials of a class in its run", study)
        p_values = compute_p_value(curve, null)
        n = sum(len(block.truth) for block in blocks)
        rows: list[dict[str, Any]] = [
            {
                "value": float(curve[w]), "ci_low": float(low[w]), "ci_high": float(high[w]), "chance": 0.5, "n": n,
                "p_value": float(p_values[w]), "resampled": words,
            }
            for w in range(len(windows))
        ]  # fmt: skip
        n_classes = len({str(c) for c in responses.trials["concept"]})
        how = (
            f"LDA classified {n_classes} categories in windows of {self.width * 1000:.0f} ms, each run decided by "
            "decoders of the other runs; the mean over runs of the area under the ROC curve is shown."
        )
        finished = finish_curve(windows, rows, test, draws)
        return report_curve(
            study, finished, "auc", name=self.kind, title="Categories against time", how=how, by_end=False
        )


def _check_shared_categories(responses: Responses, study: Study) -> None:
    """Raise `DataError` if no fold trains on a category that it tests."""
    concepts = responses.trials["concept"].astype(str).to_numpy()
    if all(not set(concepts[fold.train]) & set(concepts[fold.test]) for fold in study.folds):
        raise DataError(
            "no category that is tested was trained on, so none can be decoded and every curve would be chance; use a "
            "split whose folds share categories, for example split.kind leave_one_run_out, or sliding_window."
        )


@dataclass(frozen=True)
class RunDecisions:
    """Held-out decisions of one run of one subject.

    Parameters
    ----------
    subject
        Whose.
    truth : int array of shape (n_trials,)
        Number of the true class.
    ranks : array of shape (n_classes, n_windows, n_trials)
        Rank of each trial's score for a class among the trials of the run.
    """

    subject: str
    truth: np.ndarray
    ranks: np.ndarray

    @property
    def areas(self) -> np.ndarray:
        """Area under the ROC curve in each window, shape (n_windows,)."""
        return self.measure(self.truth[None])[0]

    def measure(self, labels: np.ndarray) -> np.ndarray:
        """Return the areas for sets of labels of shape (n_sets, n_trials), shape (n_sets, n_windows)."""
        parts = []
        for code in np.unique(self.truth):
            own = labels == code
            n_own = int((self.truth == code).sum())
            n_rest = len(self.truth) - n_own
            sums = own.astype(float) @ self.ranks[code].T  # (n_sets, n_windows), rank sums of the class
            parts.append((sums - n_own * (n_own + 1) / 2) / (n_own * n_rest))
        return np.mean(parts, axis=0)

    def resample(self, generator: np.random.Generator, n_draws: int) -> np.ndarray:
        """Return areas of trials resampled within their class, shape (n_draws, n_windows)."""
        weights = np.zeros((n_draws, len(self.truth)))  # how often each trial is drawn
        for code in np.unique(self.truth):
            own = np.flatnonzero(self.truth == code)
            weights[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size=n_draws)
        parts = []
        for code in np.unique(self.truth):
            own, rest = np.flatnonzero(self.truth == code), np.flatnonzero(self.truth != code)
            areas = np.empty((n_draws, self.ranks.shape[1]))
            for window, ranks in enumerate(self.ranks[code]):
                wins = (np.sign(ranks[own][:, None] - ranks[rest][None]) + 1) / 2  # ties are shared
                areas[:, window] = ((weights[:, own] @ wins) * weights[:, rest]).sum(axis=1)
            parts.append(areas / (len(own) * len(rest)))
        return np.mean(parts, axis=0)


def label_trials(study: Study) -> Responses:
    """Return all trials with the column `concept`."""
    responses = study.responses
    if "concept" not in responses.trials:
        concepts = study.stimuli.concepts_of(responses.stimulus_ids)
        responses = responses.with_trials(responses.trials.assign(concept=concepts))
    return responses


def decide_windows(study: Study, responses: Responses, windows: Sequence[Window]) -> list[RunDecisions]:
    """Fit a decoder per fold and window, and rank the held-out trials of each run.

    Raises
    ------
    DataError
        If there is one class only, or no held-out run shows two of them.
    """
    from scipy.stats import rankdata

    labels = responses.trials["concept"].astype(str).to_numpy()
    classes = np.unique(labels)
    runs = make_groups(responses.trials, "run").astype(str)
    subjects = responses.trials["subject"].astype(str).to_numpy()
    blocks = []
    with study.progress("categories against time", len(study.folds) * len(windows)) as advance:
        for fold in study.folds:
            scores = np.zeros((len(classes), len(windows), len(fold.test)))
            train, test = responses.select(fold.train), responses.select(fold.test)
            for number, window in enumerate(windows):
                decoder = LdaConfig().build(seed=study.seed)
                decoder.fit(cut_window(train, window), labels[fold.train])
                rows = np.searchsorted(classes, decoder.classes)  # a fold may not train on every class
                scores[rows, number] = decoder.decision(cut_window(test, window)).T
                advance(1)
            for run in np.unique(runs[fold.test]):
                own = np.flatnonzero(runs[fold.test] == run)
                truth = np.searchsorted(classes, labels[fold.test[own]])
                if len(np.unique(truth)) < 2:  # no area under a curve
                    continue
                blocks.append(
                    RunDecisions(subjects[fold.test[own[0]]], truth, rankdata(scores[..., own], axis=-1))
                )
    if not blocks:
        raise DataError(
            "no held-out run shows two categories, so that no area under a curve can be computed."
        )
    return blocks


def average_by_subject(values: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Return the mean over the blocks of each subject: (n_blocks, ...) to (n_subjects, ...)."""
    return np.stack([values[subjects == s].mean(axis=0) for s in np.unique(subjects.astype(str))])


def average_subjects(values: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Return the mean over subjects of `average_by_subject`."""
    return average_by_subject(values, subjects).mean(axis=0)


def _permute(blocks: Sequence[RunDecisions], study: Study) -> np.ndarray:
    """Return the curve under labels permuted within runs, shape (n_permutations, n_windows)."""
    generator = make_generator(study.seed, "labels within runs")
    subjects = np.array([block.subject for block in blocks], dtype=object)
    parts = []
    for block in blocks:
        everyone = [np.arange(len(block.truth))]
        labels = permute_within(block.truth, everyone, study.n_permutations, generator)
        parts.append(block.measure(labels))
    return widen_areas(average_subjects(np.stack(parts), subjects), study)


def widen_areas(null: np.ndarray, study: Study) -> np.ndarray:
    """Return areas under permuted labels, shape (n_permutations, n_areas), wider by sqrt 2 after folds.

    The decoders were not fitted again, and those of several folds have learnt from each other's trials.
    """
    return null if len(study.folds) < 2 else widen_about(null, null.mean(axis=0))


def bound_areas(
    means: np.ndarray, draws: np.ndarray, words: str, study: Study
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the limits of every area: Student's t over subjects, or of one subject the percentiles of resamples.

    Parameters
    ----------
    means : array of shape (n_subjects, n_areas)
    draws : array of shape (n_draws, n_areas)
        Of one subject.
    words
        What the resamples of one subject are.
    study
        Whose folds train each other, if there are several; limits are then wider by sqrt 2.

    Returns
    -------
    low, high : arrays of shape (n_areas,)
        NaN where there are too few subjects.
    words
        What the limits resample, or why there are none.
    """
    if len(means) == 1:
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    else:
        found = [groups_interval(column, np.arange(len(means)), unit="subject") for column in means.T]
        low, high = np.array([(one.low, one.high) for one in found], dtype=float).T
        words = found[0].resampled
        if np.isnan(low).all():
            return low, high, words
    if len(study.folds) > 1:
        low, high = widen_limits(low, high, means.mean(axis=0), (0.0, 1.0))
        words += WIDENED
    return low, high, words


def bootstrap_areas(blocks: Sequence[RunDecisions], study: Study) -> np.ndarray:
    """Return resampled curves, subjects first where there are several, shape (n_draws, n_windows)."""
    generator = make_generator(study.seed, "bootstrap categories")
    n_draws = min(MAX_DRAWS, study.n_bootstrap)
    subjects = np.array([block.subject for block in blocks], dtype=object)
    curves = average_by_subject(np.stack([block.resample(generator, n_draws) for block in blocks]), subjects)
    if len(curves) == 1:
        return curves[0]
    # Subjects first, then one of the resamples of each drawn subject.
    drawn = generator.integers(0, len(curves), (n_draws, len(curves)))
    inner = generator.integers(0, n_draws, (n_draws, len(curves)))
    return curves[drawn, inner].mean(axis=1)
