"""Scores of category decoding: which class was seen, where the identity of the image is unknown or not asked.

Owns accuracy and balanced accuracy over held-out trials and the mean over held-out runs of the AUC (each run has a
decoder of its own, whose scores need not share a scale), with intervals and a null that permutes the true labels
within each run, so that no drift between runs can pass for a decoded category. Everything comes as plain
arrays; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Score
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.uncertainty import compute_p_value, permute_within, wilson_interval
from braindecode_vis.seeds import make_generator


@dataclass(frozen=True)
class CategoryTask:
    """Held-out decisions and what is needed to judge them.

    Parameters
    ----------
    decisions : array of shape (n_trials, n_classes)
        A score per class from a decoder that has not seen the trial's run; higher is more likely.
    classes : sequence of length n_classes
        Names of the columns.
    labels, runs, subjects : arrays of shape (n_trials,)
        True class, run and subject of each trial.
    protocol, split, seed, n_bootstrap, n_permutations
        As in `braindecode_vis.arrays.Score` and the evaluation settings.
    """

    decisions: np.ndarray
    classes: tuple[str, ...]
    labels: np.ndarray
    runs: np.ndarray
    subjects: np.ndarray
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000

    def __post_init__(self) -> None:
        unknown = sorted(set(self.labels.tolist()) - set(self.classes))
        if unknown:
            raise DataError(f"the class {unknown[0]!r} was tested but never trained on; check the split.")


def compute_category_scores(task: CategoryTask) -> tuple[list[Score], pd.DataFrame]:
    """Return the score rows and one row per trial (`label`, `decoded`, `run`, `subject` and the decisions)."""
    codes = np.array([task.classes.index(label) for label in task.labels])
    scores: list[Score] = []
    for subject in sorted(set(task.subjects.tolist())):
        scores += _score_subject(task, codes, np.flatnonzero(task.subjects == subject), str(subject))
    decoded = np.array(task.classes, dtype=object)[task.decisions.argmax(axis=1)]
    items = pd.DataFrame(
        {"label": task.labels, "decoded": decoded, "run": task.runs, "subject": task.subjects}
        | {f"decision_{name}": task.decisions[:, column] for column, name in enumerate(task.classes)}
    )
    return scores, items


def _score_subject(task: CategoryTask, codes: np.ndarray, rows: np.ndarray, subject: str) -> Iterator[Score]:
    n_classes = len(task.classes)
    decisions, truth, runs = task.decisions[rows], codes[rows], task.runs[rows]
    by_name = [np.flatnonzero(runs.astype(str) == run) for run in np.unique(runs.astype(str))]
    generator = make_generator(task.seed, "category_permutation")
    permuted = permute_within(truth, by_name, task.n_permutations, generator)  # (n_permutations, n_trials)
    blocks = [np.flatnonzero(runs == run) for run in pd.unique(runs)]
    # Trials of one run share a decoder, so an AUC of a run is resampled within it; accuracy has one scale for all.
    everywhere, within_runs = _resample(truth, [np.arange(len(rows))], task), _resample(truth, blocks, task)
    fixed = np.arange(len(rows))[None]  # (1, n_trials): the sample itself as one more resample
    metrics: list[tuple[str, np.ndarray, Callable[..., np.ndarray], np.ndarray]] = [
        ("accuracy", decisions.argmax(axis=1), compute_accuracy, everywhere),
        ("balanced_accuracy", decisions.argmax(axis=1), compute_balanced_accuracy, everywhere),
    ]
    usable = [block for block in blocks if len(set(truth[block].tolist())) == 2]
    if n_classes == 2 and usable:

        def auc_over_runs(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
            return np.mean([compute_auc(predicted[:, block], labels[:, block]) for block in usable], axis=0)

        metrics.append(("auc", decisions[:, 1] - decisions[:, 0], auc_over_runs, within_runs))
    for name, predicted, metric, resampled in metrics:
        value = float(metric(predicted[fixed], truth[fixed])[0])
        null = metric(np.broadcast_to(predicted, permuted.shape), permuted)
        # A bootstrap of few hits is too narrow, and has no width at all where every trial is a hit.
        if name == "accuracy" and len(rows) < 40:
            interval = wilson_interval(round(value * len(rows)), len(rows))
            low, high = interval.low, interval.high
        else:
            low, high = np.quantile(metric(predicted[resampled], truth[resampled]), [0.025, 0.975])
        shuffled = float(null[0])
        common: dict[str, Any] = {
            "metric": name, "chance": float(null.mean()), "n_queries": len(rows), "protocol": task.protocol,
            "subject": subject, "split": task.split, "seed": task.seed, "gallery_size": n_classes,
        }  # fmt: skip
        yield Score(
            method="decoded", value=value, ci_low=float(low), ci_high=float(high),
            p_value=float(compute_p_value(value, null)), **common,
        )  # fmt: skip
        null_low, null_high = (float(q) for q in np.quantile(null, [0.025, 0.975]))
        yield Score(method="shuffled", value=shuffled, ci_low=null_low, ci_high=null_high, **common)


def _resample(truth: np.ndarray, blocks: list[np.ndarray], task: CategoryTask) -> np.ndarray:
    """Return row numbers resampled within each block and class, shape (n_bootstrap, n_trials).

    Every block keeps its number of trials of every class, in the order of the rows.
    """
    generator = make_generator(task.seed, "category_bootstrap")
    drawn = np.empty((task.n_bootstrap, len(truth)), dtype=np.int64)
    for block in blocks:
        for code in np.unique(truth[block]):
            own = block[truth[block] == code]
            drawn[:, own] = own[generator.integers(0, len(own), (task.n_bootstrap, len(own)))]
    return drawn


def compute_accuracy(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the share of hits of each row, shape (n_sets,)."""
    return (predicted == truth).mean(axis=1)


def compute_balanced_accuracy(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the mean over classes of the share of hits, shape (n_sets,)."""
    hits = predicted == truth
    recalls = [
        (hits & (truth == code)).sum(axis=1) / (truth == code).sum(axis=1) for code in np.unique(truth)
    ]
    return np.mean(recalls, axis=0)


def compute_auc(decision: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each row, ties shared, shape (n_sets,)."""
    from scipy.stats import rankdata

    n_positive = (truth == 1).sum(axis=1)
    n_negative = truth.shape[1] - n_positive
    areas = np.empty(len(truth))
    step = max(1, 4_000_000 // truth.shape[1])  # 32 MB of ranks at a time
    for start in range(0, len(truth), step):
        part = slice(start, start + step)
        ranks = rankdata(decision[part], axis=1)
        areas[part] = (ranks * (truth[part] == 1)).sum(axis=1)
    # The Mann-Whitney statistic: rank sum of the positives less its smallest value, over the number of pairs.
    return (areas - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
