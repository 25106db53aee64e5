"""Compare runs on the same test items: paired differences with intervals, and p-values corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from braindecode_vis import pipeline
from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.store import Artifact
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.runs import Run, SilentListener, open_run
from braindecode_vis.scoring.crossed import FEWEST, Population, paired_difference, smallest_subject_p
from braindecode_vis.scoring.uncertainty import correct_holm
from braindecode_vis.scoring.units import Units

KEYS = ["subject", "stimulus_id", "occurrence"]
UNITS = ["unit", "cluster"]  # what items are resampled with, where that is not their image
FOLD = "fold"  # of each item, where a run has several


def compare_runs(
    folders: Sequence[Path], *, population: Population | None = None, n_boot: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Return the paired difference of each run to the first one, metric by metric.

    Parameters
    ----------
    folders
        Run folders; the first is the one that the others are compared with.
    population
        Of whom and what differences speak where there are several subjects, as in
        `braindecode_vis.scoring.crossed.paired_difference`: ``both``, ``images`` (these subjects) or ``subjects``
        (these images).
    n_boot
        Resamples and sign flips.
    seed
        Root seed of both.

    Returns
    -------
    DataFrame
        Columns `run`, `reference`, `metric`, `value`, `reference_value`, `difference`, `ci_low`, `ci_high`,
        `p_value`, `p_holm` (Holm's correction over all rows that have a p), `n_items`, `n_subjects`, `resampled`:
        images, or whole groups where a run resamples groups (those of the reference first), and subjects beside them
        where there are several; or why there is no interval. If a run has several folds, intervals and the null behind
        p are wider by sqrt 2, which `resampled` says.

    Raises
    ------
    DataError
        If fewer than two runs are given, or two runs share no test items.
    """
    if len(folders) < 2:
        raise DataError(f"a comparison needs at least two run folders, got {len(folders)}.")
    # Two spellings of one folder are one run.
    real = [folder.expanduser().resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if not (folder.expanduser() / "config.yaml").is_file():
            raise DataError(
                f"{folder} is not a run folder: it holds no config.yaml; give the folder that run printed."
            )
        if real[place] in real[:place]:
            raise DataError(f"the run {folder} is named twice; a run cannot be compared with itself.")
    tables = [read_items(folder) for folder in folders]
    reference, rows = tables[0], list[dict[str, Any]]()
    for folder, table in zip(folders[1:], tables[1:], strict=True):
        rows += compare_tables(
            reference,
            table,
            names=(str(folders[0]), str(folder)),
            population=population,
            n_boot=n_boot,
            seed=seed,
        )
    result = pd.DataFrame(rows)
    p = result["p_value"].to_numpy(float)
    tested, corrected = np.isfinite(p), np.full(len(p), np.nan)
    if tested.any():
        corrected[tested] = correct_holm(p[tested])
    result.insert(list(result.columns).index("p_value") + 1, "p_holm", corrected)
    return result


def describe_comparison(table: pd.DataFrame) -> list[str]:
    """Return sentences on what a comparison of `compare_runs` cannot tell; none where there is nothing to say."""
    n_subjects, words = int(table["n_subjects"].iloc[0]), " ".join(table["resampled"])
    sentences = []
    if n_subjects == 2 and "of these 2" in words:
        sentences.append(
            f"Differences apply to these 2 subjects only; with {FEWEST} or more subjects they can "
            "generalise to other subjects."
        )
    smallest = smallest_subject_p(n_subjects) * len(table)
    if "signs of whole subjects" in words and smallest > 0.05:
        sentences.append(
            f"Signs of {n_subjects} whole subjects have no p below {smallest_subject_p(n_subjects):.3g}, and after the "
            f"correction for {len(table)} comparisons none below {min(1.0, smallest):.3g}: no row can be significant."
        )
    return sentences


def compare_tables(
    reference: pd.DataFrame,
    table: pd.DataFrame,
    *,
    names: tuple[str, str],
    population: Population | None = None,
    n_boot: int = 10_000,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the paired differences of one run to another, a row per metric that both have.

    Parameters
    ----------
    reference, table
        Items of the run compared with, and of the other one; see `tabulate_items`.
    names
        What the two are called.
    population, n_boot, seed
        As for `compare_runs`.
    metrics
        Those that are compared; all by default.

    Raises
    ------
    DataError
        If they do not test the same items in galleries of the same size.
    """
    if population is not None:
        check_option("population", population, get_args(Population))
    first, other = names
    both = reference.merge(table, on=KEYS, suffixes=("_a", "_b"))
    if both.empty:
        raise DataError(
            f"{other} and {first} share no test items, so nothing can be compared in pairs; "
            "compare runs of the same data set and split."
        )
    # Comparing the shared items alone would choose a test set that neither run reports.
    if len(both) < max(len(reference), len(table)):
        raise DataError(
            f"{other} tests {len(table)} items and {first} {len(reference)}, of which only {len(both)} "
            "are the same; compare runs of the same split and subjects."
        )
    if "gallery_size_a" in both and (both["gallery_size_a"] != both["gallery_size_b"]).any():
        sizes = " and ".join(f"{both[f'gallery_size_{side}'].max():.0f}" for side in "ba")
        raise DataError(
            f"{other} and {first} rank the same items among {sizes} images, so their hits cannot be "
            "compared; give both the same retrieval.gallery."
        )
    subjects, several = both["subject"], both["subject"].nunique() > 1
    unit, clusters = _find_clusters(both)
    over_folds = any(both[name].nunique() > 1 for name in (FOLD, f"{FOLD}_a", f"{FOLD}_b") if name in both)
    rows = []
    for metric in reference.columns:
        if metric not in table.columns or metric in (*KEYS, *UNITS, FOLD, "gallery_size"):
            continue
        if metrics is not None and metric not in metrics:
            continue
        new, old = both[f"{metric}_b"].to_numpy(float), both[f"{metric}_a"].to_numpy(float)
        # A difference needs both values of every item, and some metrics have none for some.
        if not (np.isfinite(new).all() and np.isfinite(old).all()):
            continue
        found = paired_difference(
            new, old, clusters=clusters, subjects=list(subjects) if several else None, unit=unit,
            population=population, n_boot=n_boot, seed=seed, over_folds=over_folds,
        )  # fmt: skip
        rows.append(
            {
                "run": other, "reference": first, "metric": metric, "value": _average(new, subjects),
                "reference_value": _average(old, subjects), "difference": found.mean, "ci_low": found.interval.low,
                "ci_high": found.interval.high, "p_value": found.p_value, "n_items": len(both),
                "n_subjects": both["subject"].nunique(), "resampled": found.interval.resampled,
            }
        )  # fmt: skip
    return rows


def _find_clusters(both: pd.DataFrame) -> tuple[str, list[str]]:
    """Return what each item is resampled with, as in the scores of the reference, and its name in one word."""
    # Both runs name their units, with suffixes, or one of them does.
    unit, cluster = next(
        ((both[f"unit{s}"].iloc[0], f"cluster{s}") for s in ("_a", "") if f"unit{s}" in both),
        ("image", "stimulus_id"),
    )
    if both[cluster].nunique() < 2:
        unit, cluster = "image", "stimulus_id"
    elif both["subject"].nunique() > 1 and unit != "image":
        units = Units(unit, both[cluster].to_numpy(object))
        if units.select(np.arange(len(both)), both["stimulus_id"].to_numpy(object)) is None:
            unit, cluster = "image", "stimulus_id"
    return str(unit), both[cluster].astype(str).tolist()


def _average(values: np.ndarray, subjects: pd.Series) -> float:
    """Return the mean over subjects of their means, as the difference between runs is taken."""
    return float(pd.Series(values).groupby(subjects.to_numpy()).mean().mean())


class _Repairs(SilentListener):
    """Keeps what had to be computed, which nobody expects of a comparison."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def finished(self, stage: str, artifact: Artifact, seconds: float) -> None:
        """Keep the reason of a stage that was not there."""
        if not artifact.reused:
            self.told.append(f"{stage} ({artifact.reason})")


def read_items(folder: Path) -> pd.DataFrame:
    """Return one row per test item of a run: its keys and one column per metric.

    What is missing or damaged is computed, and said in a `Notice`.
    """
    repairs = _Repairs()
    run: Run = open_run(read_config(folder), folder, repairs, reading=True)
    pipeline.evaluate(run)
    if repairs.told:
        run.tell(
            f"{folder} was unfinished or damaged, and was computed for the comparison: {', '.join(repairs.told)}."
        )
    return tabulate_items(run.seen["items"])


def tabulate_items(items: pd.DataFrame) -> pd.DataFrame:
    """Return the metrics of test items as runs report them.

    Ranks become `relative_rank`, in which ties share the mean rank, and `top1` and `top5`, which lose every tie, as in
    the table of scores, and are left out where a gallery has no more candidates than that. Where categories are decoded
    no image is known: a trial is then an item of its own, named by its place in its run.
    """
    if "stimulus_id" not in items:
        place = items.groupby(["subject", "run"]).cumcount().astype(str)
        names = items["run"].astype(str) + " trial " + place + " " + items["label"].astype(str)
        table = pd.DataFrame({"subject": items["subject"].astype(str), "stimulus_id": names})
        table["occurrence"] = 0
        table["accuracy"] = (items["decoded"] == items["label"]).to_numpy(float)
        return _keep_units(items, table.assign(unit="trial", cluster=names))
    table = pd.DataFrame({key: items[key].astype(str) for key in ("subject", "stimulus_id")})
    # A subject may be tested several times with one image, where repetitions are not averaged.
    table["occurrence"] = table.groupby(["subject", "stimulus_id"]).cumcount()
    if "rank" in items:
        size = items["gallery_size"].to_numpy(float)
        table["gallery_size"] = size
        for k in (1, 5):
            if k < size.min():
                table[f"top{k}"] = (items["worst_rank"] <= k).to_numpy(float)
        table["relative_rank"] = (items["rank"].to_numpy(float) - 1) / np.maximum(size - 1, 1)
    if "correct" in items:
        table["accuracy"] = items["correct"].to_numpy(float)
    for name in items.columns:
        if name not in ("rank", "worst_rank", "gallery_size", "correct") and pd.api.types.is_float_dtype(
            items[name]
        ):
            table[name] = items[name].to_numpy(float)
    return _keep_units(items, table)


def _keep_units(items: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    if FOLD in items:
        table = table.assign(fold=items[FOLD].to_numpy())
    if "cluster" in items:
        return table.assign(unit=items["unit"].to_numpy(object), cluster=items["cluster"].to_numpy(object))
    return table
