"""Splits as code: which trials may teach and which may only be asked.

Owns the protocols and their proofs. Every split carries the text that names it in the results, and refuses to
exist if a trial or an image stands on both sides of a fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.seeds import make_generator
from braindecode_vis.settings import Settings


@dataclass(frozen=True)
class Fold:
    """Row numbers of the training and the test trials of one fit."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Split:
    """A named set of folds over the rows of a trial table.

    Parameters
    ----------
    protocol
        Text that names the split in every result.
    folds
        One or more folds; no trial is tested twice.
    trials
        The trial table that the rows refer to, used to prove disjointness.
    by
        What no fold may show on both sides: ``stimulus_id``, or ``run`` where the categories themselves are
        decoded and every run shows all of them.

    Raises
    ------
    DataError
        If a fold is empty, or a trial or anything named by `by` is both trained on and tested.
    """

    protocol: str
    folds: tuple[Fold, ...]
    trials: pd.DataFrame
    by: Literal["stimulus_id", "run"] = "stimulus_id"

    def __post_init__(self) -> None:
        groups = make_groups(self.trials, self.by)
        tested: set[int] = set()
        for number, fold in enumerate(self.folds):
            where = f"fold {number} of split {self.protocol!r}"
            if not len(fold.train) or not len(fold.test):
                raise DataError(f"{where} has {len(fold.train)} training and {len(fold.test)} test trials.")
            both = set(fold.train.tolist()) & set(fold.test.tolist())
            if both:
                raise DataError(f"{where} trains and tests on trial {min(both)}.")
            shared = set(groups[fold.train]) & set(groups[fold.test])
            if shared:
                kind = "image" if self.by == "stimulus_id" else "run"
                raise DataError(
                    f"{where} shows {len(shared)} {kind}(s) on both sides, first {sorted(shared)[0]!r}: "
                    f"split by {kind}, not by trial."
                )
            again = tested & set(fold.test.tolist())
            if again:
                raise DataError(f"{where} tests trial {min(again)} a second time.")
            tested |= set(fold.test.tolist())

    def as_json(self) -> dict[str, Any]:
        """Return the plain form that a run folder keeps."""
        folds = [{"train": fold.train.tolist(), "test": fold.test.tolist()} for fold in self.folds]
        return {"protocol": self.protocol, "by": self.by, "folds": folds}

    @classmethod
    def from_json(cls, record: dict[str, Any], trials: pd.DataFrame) -> Split:
        """Rebuild a split, proving its disjointness again."""
        folds = tuple(Fold(np.array(f["train"], int), np.array(f["test"], int)) for f in record["folds"])
        return cls(record["protocol"], folds, trials, record["by"])


def make_groups(trials: pd.DataFrame, by: str) -> np.ndarray:
    """Return the group of each trial, shape (n_trials,): its stimulus, or its subject, session and run."""
    if by == "stimulus_id":
        return trials["stimulus_id"].to_numpy(dtype=object)
    return trials[["subject", "session", "run"]].astype(str).agg("/".join, axis=1).to_numpy(dtype=object)


class PublishedSplitConfig(Settings):
    """The training and test trials that the authors of the data set declared."""

    kind: Literal["published"] = "published"

    def make(self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int) -> Split:
        """Return one fold from the `split` column of the trial table."""
        column = trials["split"].to_numpy(dtype=object)
        train, test = np.flatnonzero(column == "train"), np.flatnonzero(column == "test")
        if not len(train) or not len(test):
            raise ConfigError("the data set declares no train/test split; set split.kind to kfold.")
        protocol = f"published split ({len(train)} train / {len(test)} test trials)"
        return Split(protocol, (Fold(train, test),), trials)


class KFoldSplitConfig(Settings):
    """K folds over the images, stratified by concept; every trial is tested once.

    All repetitions of an image fall into the same fold.
    """

    kind: Literal["kfold"] = "kfold"
    n_folds: int = Field(default=10, ge=2)
    stratify: bool = True

    def make(self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int) -> Split:
        """Deal the shuffled images of each concept over the folds in turn."""
        ids = trials["stimulus_id"].to_numpy(dtype=object)
        first = pd.DataFrame({"id": ids, "concept": concepts}).drop_duplicates("id")
        if len(first) < self.n_folds:
            raise ConfigError(f"split.n_folds is {self.n_folds}, but there are only {len(first)} images.")
        order = make_generator(seed, "split", "kfold").permutation(len(first))
        shuffled = first.iloc[order]
        if self.stratify:
            shuffled = shuffled.sort_values("concept", kind="stable")
        fold_of = dict(zip(shuffled["id"], np.arange(len(shuffled)) % self.n_folds, strict=True))
        number = np.array([fold_of[i] for i in ids])
        folds = tuple(
            Fold(np.flatnonzero(number != fold), np.flatnonzero(number == fold))
            for fold in range(self.n_folds)
        )
        kind = "stratified " if self.stratify else ""
        return Split(f"{kind}{self.n_folds}-fold over {len(first)} images (seed {seed})", folds, trials)


class LeaveOneRunOutConfig(Settings):
    """One fold per run: the decoder of a run has seen every other run of the subject, for category decoding."""

    kind: Literal["leave_one_run_out"] = "leave_one_run_out"

    def make(self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int) -> Split:
        """Return one fold per subject, session and run; training runs are of the same subject."""
        runs, subjects = make_groups(trials, "run"), trials["subject"].to_numpy(dtype=object)
        folds = []
        for run in pd.unique(runs):
            test = np.flatnonzero(runs == run)
            train = np.flatnonzero((runs != run) & (subjects == subjects[test[0]]))
            if not len(train):
                raise ConfigError(
                    f"subject {subjects[test[0]]} has one run only; leave-one-run-out needs two."
                )
            folds.append(Fold(train, test))
        return Split(f"leave one run out ({len(folds)} runs, within subject)", tuple(folds), trials, "run")


class LeaveOneSubjectOutConfig(Settings):
    """One fold per subject: its test trials are decoded by an encoder that has seen other people only.

    Training and test images are those that the data set declares, so that neither the person nor the image was met.
    """

    kind: Literal["leave_one_subject_out"] = "leave_one_subject_out"

    def make(self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int) -> Split:
        """Return one fold per subject, over the `split` column of the trial table."""
        subjects, column = trials["subject"].to_numpy(dtype=object), trials["split"].to_numpy(dtype=object)
        names = pd.unique(subjects)
        if len(names) < 2:
            raise ConfigError(
                f"leave-one-subject-out needs two subjects, but only subject {names[0]} was read; see dataset.subjects."
            )
        if not (column == "test").any():
            raise ConfigError("the data set declares no test trials; leave-one-subject-out needs them.")
        folds = tuple(
            Fold(
                np.flatnonzero((subjects != name) & (column == "train")),
                np.flatnonzero((subjects == name) & (column == "test")),
            )
            for name in names
        )
        return Split(f"leave one subject out ({len(names)} subjects), published images", folds, trials)


SplitConfig = Annotated[
    PublishedSplitConfig | KFoldSplitConfig | LeaveOneRunOutConfig | LeaveOneSubjectOutConfig,
    Field(discriminator="kind"),
]


def make_inner_folds(groups: np.ndarray, *, n_folds: int, generator: np.random.Generator) -> list[Fold]:
    """Return folds over training rows that never part two rows of one group.

    Parameters
    ----------
    groups : array of shape (n_rows,)
        Group of each row, usually its stimulus id.
    n_folds
        Number of folds; fewer groups than that raise.
    generator
        Shuffles the groups.
    """
    _, codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    n_groups = int(codes.max()) + 1
    if n_groups < n_folds:
        raise DataError(
            f"inner cross-validation wants {n_folds} folds, but there are only {n_groups} images."
        )
    number = (generator.permutation(n_groups) % n_folds)[codes]
    return [Fold(np.flatnonzero(number != fold), np.flatnonzero(number == fold)) for fold in range(n_folds)]
