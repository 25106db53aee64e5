"""The stages of a run that decodes classes instead of images.

    preprocess -> train (a classifier per fold) -> evaluate (accuracy, AUC) -> report

Owns the artifacts of these stages. Classes may be shared by training and test trials; runs, groups or subjects are not.
Where each subject or group has one class and is left out as a whole, the scores need decoders of exchanged labels,
which are fitted here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import CategoryDecoder
from braindecode_vis.base.devices import count_launched
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.encoders.category_decoders import find_first_rows
from braindecode_vis.pipeline.runs import Run, lend_context, publish_scores
from braindecode_vis.preprocessing.splits import Side, Split, find_shared, make_groups
from braindecode_vis.scoring.design_control import predict_from_design, tabulate_design
from braindecode_vis.scoring.units import Units, find_units

if TYPE_CHECKING:
    from braindecode_vis.scoring.label_exchange import ExchangedLabels, Refit

#: What may own a label: whatever a split leaves out as a whole.
OWNERS = ("subject", "group", "session", "run")
MOST_SMALL_FITS = 1_000_000  # of the smallest null; beyond, decisions are kept
MOST_KEPT = 1 << 29  # bytes of trials that refits keep for the next label set
#: Refits are announced that take more seconds and are more than this; few are quick on any machine that is not busy.
LEAST_TOLD, FEWEST_TOLD = 5.0, 200


@dataclass(frozen=True)
class TrainedDecoder:
    """A fitted category decoder of one fold."""

    artifact: store.Artifact
    decoder: CategoryDecoder


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
    run.once(
        "classes", lambda: _check_classes(responses.trials, split, find_label_owners(run, responses, split))
    )

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
    decoder = roles.read(CategoryDecoder, run.encoder, artifact.path)
    return TrainedDecoder(artifact, decoder)


def _check_classes(trials: pd.DataFrame, split: Split, owners: LabelOwners | None) -> None:
    """Raise `DataError` if no fold tests a class that it was trained on, or a class has a single trial or owner."""
    labels = trials["concept"].to_numpy(dtype=object)
    if owners is not None:
        names, counts = np.unique(owners.labels, return_counts=True)
        if counts.min() == 1:
            unit, first = owners.unit, str(names[counts.argmin()])
            raise DataError(
                f"only one {unit} has the class {first!r}, so it cannot be learnt when this {unit} is "
                f"left out ({len(owners.labels)} {unit}s in all); each class needs two {unit}s, and a p "
                "below .05 needs "
                "four of each."
            )
    if not any(np.isin(labels[fold.test], labels[fold.train]).any() for fold in split.folds):
        raise DataError(
            f"no class of the test trials is shown in training ({len(set(labels.tolist()))} classes in {len(labels)} "
            "trials): each class needs several trials, and several pictures if folds split pictures; "
            "give such labels, or another split."
        )
    names, counts = np.unique(labels.astype(str), return_counts=True)
    if counts.min() == 1:
        raise DataError(
            f"the class {str(names[counts.argmin()])!r} has only one trial, which cannot be in both "
            "training and test; drop this trial, or merge the class with another."
        )


@dataclass(frozen=True)
class LabelOwners:
    """Subjects, groups, sessions or runs that have one class each and are left out as a whole.

    Parameters
    ----------
    unit
        What an owner is, in one word.
    codes : int array of shape (n_trials,)
        Owner of each trial.
    labels : str array of shape (n_owners,)
        Class of each owner.
    blocks
        Owners that may change labels with each other: those of one subject where its own have several classes, and of
        one run where these lie within runs.
    """

    unit: str
    codes: np.ndarray
    labels: np.ndarray
    blocks: tuple[np.ndarray, ...]


def find_label_owners(run: Run, responses: Responses, split: Split) -> LabelOwners | None:
    """Return what has one class each and is on one side of every fold; None if labels vary within all of these."""
    trials = responses.trials
    names = trials["concept"].astype(str).to_numpy()
    kind, by = run.config.split.kind, getattr(run.config.split, "by", None)
    named: dict[str, Side] = {"leave_one_subject_out": "subject", "leave_one_run_out": "run"}
    asked: tuple[Side | None, ...] = (named.get(kind, by),) if kind in named or by else ("subject", "group")
    for side in asked:
        if side is None or side not in OWNERS or (side == "group" and "group" not in trials):
            continue
        groups = make_groups(trials, side).astype(str)
        if side == "group" and not _has_one_class(groups, names):
            # Groups of the same names in several subjects, each with classes of its own.
            groups = trials["subject"].astype(str).to_numpy() + "/" + groups
        first, codes = np.unique(groups, return_index=True, return_inverse=True)[1:]
        if not _has_one_class(groups, names) or any(find_shared(groups, fold) for fold in split.folds):
            continue
        labels = names[first]
        if len(set(labels.tolist())) > 1:
            return LabelOwners(side, codes, labels, _find_blocks(trials, codes, labels))
    return None


def _has_one_class(groups: np.ndarray, names: np.ndarray) -> bool:
    first, codes = np.unique(groups, return_index=True, return_inverse=True)[1:]
    return bool((names == names[first][codes]).all())


def _find_blocks(trials: pd.DataFrame, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return which owners may change labels: the smallest of run and subject that hold them whole, with classes."""
    for side in ("run", "subject"):
        outer = np.unique(make_groups(trials, side).astype(str), return_inverse=True)[1]
        first = np.unique(codes, return_index=True)[1]
        of_owner = outer[first]
        if (outer == of_owner[codes]).all():
            blocks = [np.flatnonzero(of_owner == number) for number in np.unique(of_owner)]
            if any(len(set(labels[block].tolist())) > 1 for block in blocks):
                return tuple(blocks)
    return (np.arange(len(labels)),)


def exchange_labels(
    run: Run, responses: Responses, split: Split, owners: LabelOwners, rows: np.ndarray, decisions: np.ndarray,
    classes: tuple[str, ...],
) -> ExchangedLabels:  # fmt: skip
    """Fit decoders on exchanged labels of whole owners, and say beforehand what that costs where it takes long.

    Parameters
    ----------
    run
        The run.
    responses, split
        All trials and the folds.
    owners
        As `find_label_owners` returns them.
    rows : int array of shape (n_tested,)
        Tested trials.
    decisions : array of shape (n_tested, n_classes)
        Of the run's own decoders.
    classes
        Columns of `decisions`.
    """
    from braindecode_vis.scoring import label_exchange as exchange

    config, n_each = run.config, build_decoder(run, 0).n_small_fits
    most, draw = config.evaluation.n_permutations, partial(make_generator, config.seed, "exchanged labels")
    n_folds = len(split.folds)
    # One published split is exact without refits: its test says nothing of its training.
    refits = n_folds > 1 and 0 < n_each * n_folds * exchange.FEWEST_DRAWS <= MOST_SMALL_FITS
    truth = np.searchsorted(np.array(classes), owners.labels)
    tested, codes = np.unique(owners.codes[rows], return_inverse=True)
    blocks = [np.intersect1d(block, tested) for block in owners.blocks]
    if not refits:
        place = np.searchsorted(tested, np.concatenate(blocks))
        parts = np.split(place, np.cumsum([len(block) for block in blocks])[:-1])
        return exchange.keep_decisions(
            owners.unit, codes, truth[tested], [part for part in parts if len(part)], decisions, most=most,
            generator=draw(),
        )  # fmt: skip
    # Owners that are only trained on keep their labels.
    blocks = [block for block in (*blocks, np.setdiff1d(np.arange(len(truth)), tested)) if len(block)]
    sets = exchange.make_exchange(
        truth, blocks, refits=True, fits_each=n_each * n_folds, most=most, generator=draw()
    )
    # Of subjects that have several owners each, areas would be theirs, and pairs of two subjects none.
    subjects, names = responses.trials["subject"].astype(str).to_numpy(), owners.labels[owners.codes]
    together = len(set(subjects.tolist())) == 1 or _has_one_class(subjects, names)
    pairs = together and len(classes) == 2 and len(tested) == len(truth)
    n_pairs = len(exchange.list_pairs(truth)) if pairs else 0
    paired = exchange.make_exchange(
        truth, blocks, refits=True, fits_each=n_each * n_pairs, most=most, generator=draw()
    ) if pairs else None  # fmt: skip
    refit = _make_refit(run, responses, classes)
    counts = [n_folds * len(sets.labels), n_pairs * len(paired.labels) if paired is not None else 0]
    fold = split.folds[0]
    for _ in range(2):  # the first loads libraries
        started = time.perf_counter()
        refit(fold.train, truth[owners.codes[fold.train]], fold.test)
    seconds = sum(counts) * (time.perf_counter() - started)
    if seconds > LEAST_TOLD and sum(counts) > FEWEST_TOLD:
        about = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        run.tell(
            f"labels of whole {owners.unit}s are exchanged {len(sets.labels) - 1:,} times, and {config.encoder.kind} "
            f"is fitted {sum(counts):,} times: about {about}; a smaller evaluation.n_permutations takes less time.",
            about="evaluate:",
        )
    with run.listener.progress(f"labels of whole {owners.unit}s", sum(counts)) as advance:
        folds = [(fold.train, fold.test) for fold in split.folds]
        decided, _ = exchange.decide_left_out(sets, owners.codes, folds, refit, tell=advance)
        areas, wins = None, None
        if paired is not None:
            areas, wins = exchange.compare_left_pairs(paired, owners.codes, refit, tell=advance)
    decided = decided[:, rows]
    decided[0] = decisions.argmax(axis=1)  # those of the run, to the last tie
    return exchange.ExchangedLabels(
        owners.unit, owners.codes[rows], sets, decided, areas, wins, paired=paired, refits=True
    )


def _make_refit(run: Run, responses: Responses, classes: tuple[str, ...]) -> Refit:
    """Return what fits a new decoder on some trials with other labels, and decides others."""
    trials = replace(responses, data=np.asarray(responses.data))  # read once
    names = np.array(classes, dtype=object)
    kept: dict[bytes, Responses] = {}  # the same folds come back for every label set
    n_bytes = 0

    def pick(rows: np.ndarray) -> Responses:
        nonlocal n_bytes
        key = rows.tobytes()
        if key not in kept:
            picked = trials.select(rows)
            if n_bytes + picked.data.nbytes > MOST_KEPT:
                return picked
            kept[key] = picked
            n_bytes += picked.data.nbytes
        return kept[key]

    def refit(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
        found = np.zeros((len(test), len(classes)))
        taught = np.unique(labels)
        if len(taught) < 2:  # nothing to tell apart: the only class there is
            found[:, taught] = 1
            return found
        decoder = build_decoder(run, 0)
        decoder.fit(pick(train), names[labels])
        found[:, [classes.index(str(name)) for name in decoder.classes]] = decoder.decision(
            trials.select(test)
        )
        return found

    return refit


def build_decoder(run: Run, number: int) -> CategoryDecoder:
    """Return a new category decoder of a fold."""
    seed = derive_seed(run.config.seed, "train", number)
    return roles.build(CategoryDecoder, run.encoder, seed=seed)


def evaluate_categories(
    run: Run, responses: Responses, split: Split, trained: list[TrainedDecoder]
) -> list[dict[str, Any]]:
    """Score the held-out trials of every fold; write ``scores.json`` and ``scores.parquet``."""
    config = run.config
    encoder = run.encoder
    fields = {"evaluation": config.evaluation.hashed_fields(), "seed": config.seed, "task": "categories"}
    owners = find_label_owners(run, responses, split)
    if owners is not None:  # earlier versions permuted trials there
        fields["exchanged"] = owners.unit
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
        if encoder.pools_volumes:
            first = find_first_rows(responses.trials.iloc[rows])  # every volume has the decision of its trial
            rows, decisions, blind = rows[first], decisions[first], blind[first]
        trials = responses.trials.iloc[rows]
        units, _ = find_units(trials, trials, config.evaluation.resample)
        if config.evaluation.resample == "image":
            units = Units("image", trials["stimulus_id"].to_numpy(dtype=object))
        if owners is not None and config.evaluation.resample == "auto":
            units = Units(owners.unit, owners.codes[rows].astype(str).astype(object))
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
            + ("; volumes of a trial decided together" if encoder.pools_volumes else ""),
            split="test",
            seed=config.seed,
            n_bootstrap=config.evaluation.n_bootstrap,
            n_permutations=config.evaluation.n_permutations,
            design=blind if variables else None,
            exchanged=None
            if owners is None
            else exchange_labels(run, responses, split, owners, rows, decisions, classes),
            over_folds=len(split.folds) > 1,
        )
        differences: list[dict[str, Any]] = []
        scores, items = compute_category_scores(task, differences=differences)
        store.write_json(folder / "scores.json", [score.as_row() for score in scores])
        store.write_json(folder / "differences.json", differences)
        store.write_json(folder / "design.json", variables)
        if len(split.folds) > 1:  # whose decoders have learnt from each other's trials
            items["fold"] = pd.factorize(decoder_of[rows])[0]
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
