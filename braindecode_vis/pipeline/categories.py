"""The stages of a run that decodes classes instead of images.

    preprocess -> train (a classifier per fold) -> evaluate (accuracy, AUC) -> report

Owns the artifacts of these stages. Classes may be shared by training and test trials; runs, groups or subjects are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import WholeCategoryDecoder
from braindecode_vis.base.devices import count_launched
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.encoders.category_decoders import find_first_rows
from braindecode_vis.pipeline.runs import Run, lend_context, publish_scores
from braindecode_vis.preprocessing.splits import Split
from braindecode_vis.scoring.design_control import predict_from_design, tabulate_design
from braindecode_vis.scoring.units import Units, find_units


@dataclass(frozen=True)
class TrainedDecoder:
    """A fitted category decoder of one fold."""

    artifact: store.Artifact
    decoder: WholeCategoryDecoder


def train_categories(
    run: Run, responses: Responses, split: Split, upstream: str, number: int
) -> TrainedDecoder:
    """Fit the category decoder of one fold on its training trials.

    Parameters
    ----------
    run
        The run.
    responses, split
        Trials with a `concept` column, and folds that part runs.
    upstream
        Fingerprint of the preprocessing.
    number
        Number of the fold.
    """
    fields = {"encoder": run.encoder.hashed_fields(), "seed": run.config.seed, "fold": number}
    # Before the first fit, which may take minutes.
    run.once("classes", lambda: _check_classes(responses.trials["concept"].to_numpy(dtype=object), split))

    def compute(folder: Path) -> dict[str, Any]:
        picked = responses.select(split.folds[number].train)
        decoder = build_decoder(run, number)
        with lend_context(run, f"train{number:02d}", [fields, upstream]) as context:
            decoder.bind(context)
            decoder.fit(picked, picked.trials["concept"].to_numpy(dtype=object))
            if not run.follows:
                decoder.write(folder)
        return {"n_trials": picked.n_trials, "n_processes": count_launched()}

    artifact = run.produce("train", fields, {"preprocess": upstream}, compute, f"fold{number:02d}")
    decoder = roles.read(roles.CATEGORY_DECODER, run.encoder, artifact.path)
    return TrainedDecoder(artifact, decoder)


def _check_classes(labels: np.ndarray, split: Split) -> None:
    """Raise `DataError` if no fold tests a class that it was trained on, or a class has a single trial."""
    if not any(np.isin(labels[fold.test], labels[fold.train]).any() for fold in split.folds):
        raise DataError(
            f"no class of the test trials is shown in training ({len(set(labels.tolist()))} classes in {len(labels)} "
            "trials): classes must be shared by several trials, and by several pictures where folds part pictures; "
            "give such labels, or another split."
        )
    names, counts = np.unique(labels.astype(str), return_counts=True)
    if counts.min() == 1:
        raise DataError(
            f"the class {str(names[counts.argmin()])!r} has one trial only, which cannot be trained on and tested; "
            "drop that trial, or merge the class with another."
        )


def build_decoder(run: Run, number: int) -> WholeCategoryDecoder:
    """Return a new category decoder of a fold."""
    seed = derive_seed(run.config.seed, "train", number)
    return roles.build(roles.CATEGORY_DECODER, run.encoder, seed=seed)


def evaluate_categories(
    run: Run, responses: Responses, split: Split, trained: list[TrainedDecoder]
) -> list[dict[str, Any]]:
    """Score the held-out trials of every fold; write ``scores.json`` and ``scores.parquet``."""
    config = run.config
    encoder = run.encoder
    fields = {"evaluation": config.evaluation.hashed_fields(), "seed": config.seed, "task": "categories"}
    upstream = {f"train{number}": fold.artifact.fingerprint for number, fold in enumerate(trained)}

    def compute(folder: Path) -> None:
        from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores

        classes = tuple(sorted(set(responses.trials["concept"].astype(str))))
        rows = np.concatenate([fold.test for fold in split.folds])
        decisions = np.zeros((len(rows), len(classes)))  # a class that a fold never saw stays at 0
        design, variables = tabulate_design(responses.trials)
        blind = np.zeros_like(decisions)
        codes = np.array([classes.index(str(name)) for name in responses.trials["concept"]])
        start = 0
        for fold, fitted in zip(split.folds, trained, strict=True):
            decided = fitted.decoder.decision(responses.select(fold.test))
            # Decoders list the classes of their own training trials.
            columns = [classes.index(str(name)) for name in fitted.decoder.classes]
            decisions[start : start + len(fold.test), columns] = decided
            blind[start : start + len(fold.test)] = predict_from_design(
                design[fold.train], codes[fold.train], np.eye(len(classes)), design[fold.test]
            )
            start += len(fold.test)
        # Counting each volume would make one decision look like several independent ones.
        if encoder.pool:
            first = find_first_rows(responses.trials.iloc[rows])  # every volume has the decision of its trial
            rows, decisions, blind = rows[first], decisions[first], blind[first]
        trials = responses.trials.iloc[rows]
        units, _ = find_units(trials, trials, config.evaluation.resample)
        if config.evaluation.resample == "image":
            units = Units("image", trials["stimulus_id"].to_numpy(dtype=object))
        # Numbers of runs start again in each session.
        runs = trials[["session", "run"]].astype(str).agg("/".join, axis=1).to_numpy(dtype=object)
        # Decisions share a scale within one decoder. Where several decoders test trials of one run, that is a fold.
        decoder_of = np.empty(responses.n_trials, dtype=object)
        for number, fold in enumerate(split.folds):
            decoder_of[fold.test] = f"fold {number}"
        several = pd.Series(decoder_of[rows]).groupby([trials["subject"].to_numpy(), runs]).nunique() > 1
        if several.any():
            runs = decoder_of[rows]
        task = CategoryTask(
            decisions=decisions,
            classes=classes,
            labels=trials["concept"].astype(str).to_numpy(dtype=object),
            runs=runs,
            units=units,
            subjects=trials["subject"].astype(str).to_numpy(dtype=object),
            protocol=f"{config.dataset.kind}; {split.protocol}; category decoding, {len(classes)} classes"
            + ("; volumes of a trial decided together" if encoder.pool else ""),
            split="test",
            seed=config.seed,
            n_bootstrap=config.evaluation.n_bootstrap,
            n_permutations=config.evaluation.n_permutations,
            design=blind if variables else None,
        )
        differences: list[dict[str, Any]] = []
        scores, items = compute_category_scores(task, differences=differences)
        store.write_json(folder / "scores.json", [score.as_row() for score in scores])
        store.write_json(folder / "differences.json", differences)
        store.write_json(folder / "design.json", variables)
        if units is not None:  # what `compare` resamples
            items = items.assign(unit=units.unit, cluster=units.labels.astype(str))
        items.to_parquet(folder / "items.parquet", index=False)

    artifact = run.produce("evaluate", fields, upstream, compute)
    run.seen["items"] = pd.read_parquet(artifact.path / "items.parquet")
    return publish_scores(run, artifact)


def tabulate_confusions(items: pd.DataFrame) -> pd.DataFrame:
    """Return how often each class was decoded as each, in percent of its trials; a row per true class."""
    counts = pd.crosstab(items["label"], items["decoded"])
    names = sorted(set(items["label"]) | set(items["decoded"]))
    counts = counts.reindex(index=sorted(set(items["label"])), columns=names, fill_value=0)
    # Of each row, so that rare classes are as easy to read as frequent ones.
    shares = (100 * counts.div(counts.sum(axis=1), axis=0)).round(1)
    return shares.rename_axis(columns=None).rename_axis("seen \\ decoded (%)").reset_index()


def tabulate_runs(items: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy of each held-out run."""
    hits = items.assign(hit=items["label"] == items["decoded"]).groupby(["subject", "run"], sort=True)["hit"]
    table = hits.agg(trials="size", accuracy="mean").reset_index()
    return table.assign(accuracy=table["accuracy"].round(3))
