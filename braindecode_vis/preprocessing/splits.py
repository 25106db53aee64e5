"""Splits as code: which trials are training trials and which may only be tested.

Defines the protocols and checks them. Every split has the text that names it in the results, and states what its folds
do not share between training and test (images, concepts, repetitions, sessions, subjects); it raises an error if this
is not true.

Trials of imagery may have a stimulus without a picture (a category, a word, or a picture that is not shown again). They
have no row among the image embeddings and no image to compare a reconstruction with, so retrieval and reconstruction
leave them out (`split_imagined_trials`); the analysis `imagery` identifies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.registry import ByKind
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet

if TYPE_CHECKING:
    import pandas as pd

Side = Literal["image", "concept", "repetition", "session", "run", "subject", "group", "trial"]
SIDES: tuple[Side, ...] = get_args(Side)
Grouping = Literal["group", "subject", "session", "run", "concept"]
Task = Literal["images", "categories"]
IMAGERY_TASK = "imagery"  # the value of the trial column `task` that every data set uses
_OLD_NAMES = {"stimulus_id": "image"}  # as the first version of split.json has it


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
        Name of the split in every result.
    folds
        One or more folds; no trial is tested twice.
    trials
        The trial table that the rows refer to, used to prove disjointness.
    by
        What no fold has in both training and test, among `SIDES`. A session belongs to one subject, and a run to one
        session; a repetition is the number of a presentation. Concepts need a column `concept` in the trial table.

    Raises
    ------
    DataError
        If a fold is empty, or a trial or anything in `by` is in both training and test.
    """

    protocol: str
    folds: tuple[Fold, ...]
    trials: pd.DataFrame
    by: tuple[Side, ...] = ("image",)

    def __post_init__(self) -> None:
        if not self.by:
            raise DataError(f"split {self.protocol!r} declares nothing that its folds do not share.")
        # A trial that is tested twice would count twice in every mean over folds.
        tested: set[int] = set()
        for number, fold in enumerate(self.folds):
            where = f"fold {number} of split {self.protocol!r}"
            if not len(fold.train) or not len(fold.test):
                raise DataError(f"{where} has {len(fold.train)} training and {len(fold.test)} test trials.")
            both = set(fold.train.tolist()) & set(fold.test.tolist())
            if both:
                raise DataError(f"{where} has trial {min(both)} in both training and test.")
            again = tested & set(fold.test.tolist())
            if again:
                raise DataError(f"{where} tests trial {min(again)} a second time.")
            tested |= set(fold.test.tolist())
        for side in self.by:
            self._prove(side)

    def _prove(self, side: Side) -> None:
        groups = make_groups(self.trials, side)
        for number, fold in enumerate(self.folds):
            shared = find_shared(groups, fold)
            if len(shared):
                raise DataError(
                    f"fold {number} of split {self.protocol!r} has {len(shared)} {side}(s) in both "
                    f"training and test, first {shared[0]!r}: split by {side}, not by trial."
                )

    def as_json(self) -> dict[str, Any]:
        """Return the plain form that a run folder keeps."""
        folds = [{"train": fold.train.tolist(), "test": fold.test.tolist()} for fold in self.folds]
        return {"protocol": self.protocol, "by": list(self.by), "folds": folds}

    @classmethod
    def from_json(
        cls, record: dict[str, Any], trials: pd.DataFrame, concepts: np.ndarray | None = None
    ) -> Split:
        """Rebuild a split, and check again that its sides are disjoint.

        Parameters
        ----------
        record
            From `as_json`, or from its first version, in which `by` is one name.
        concepts : array of shape (n_trials,), optional
            Concept of each trial. Without them, and without a column `concept`, the statement about concepts cannot be
            checked again and is left out of `by`.
        """
        folds = tuple(Fold(np.array(f["train"], int), np.array(f["test"], int)) for f in record["folds"])
        names = [record["by"]] if isinstance(record["by"], str) else record["by"]
        by = [_OLD_NAMES.get(name, name) for name in names]
        unknown = [name for name in by if name not in SIDES]
        if unknown:
            raise DataError(
                f"the split {record['protocol']!r} is by {unknown[0]!r}, which is unknown; delete its stage and run "
                "again."
            )
        table = trials if concepts is None else trials.assign(concept=concepts)
        # A split is never trusted from its file: what it declares is proven on the trial table again.
        known: tuple[Any, ...] = tuple(name for name in by if name != "concept" or "concept" in table)
        return cls(record["protocol"], folds, table, known)


def make_groups(trials: pd.DataFrame, by: Side) -> np.ndarray:
    """Return what each trial belongs to, shape (n_trials,): its image, its concept, its session of its subject..."""
    if by == "image":
        return trials["stimulus_id"].to_numpy(dtype=object)
    if by == "trial":
        return np.arange(len(trials)).astype(object)
    if by in ("concept", "repetition", "group"):
        if by not in trials:
            raise DataError(f"the trial table has no column {by}, so that no split can be by {by}.")
        return trials[by].to_numpy(dtype=object)
    columns = {
        "subject": ["subject"],
        "session": ["subject", "session"],
        "run": ["subject", "session", "run"],
    }[by]
    first, *rest = (trials[column].astype(str) for column in columns)
    # Sessions are numbered anew in every subject: "01/02", not "02".
    for column in rest:
        first = first + "/" + column
    return first.to_numpy(dtype=object)


def find_shared(groups: np.ndarray, fold: Fold) -> list[Any]:
    """Return what a fold has in both training and test, sorted."""
    return sorted(set(groups[fold.train].tolist()) & set(groups[fold.test].tolist()))


def make_split(
    protocol: str,
    folds: tuple[Fold, ...],
    trials: pd.DataFrame,
    concepts: np.ndarray,
    *,
    needs: tuple[Side, ...],
    requires: tuple[Side, ...] = (),
) -> Split:
    """Build a split that declares everything that its folds do not share, and check what they must not share.

    Parameters
    ----------
    concepts : array of shape (n_trials,)
        Concept of each trial.
    needs
        What the protocol itself must not share.
    requires
        What else must not be shared, by the user's choice.

    Raises
    ------
    DataError
        If a fold has something of `needs` or `requires` in both training and test.
    """
    table = trials.assign(concept=concepts)
    must = tuple(dict.fromkeys([*needs, *requires]))
    # What is demanded is proven first, with its own message; what merely holds is declared without one.
    Split(protocol, folds, table, must)
    found = []
    for side in SIDES:
        if side == "trial" or (side == "group" and "group" not in table):
            continue  # no fold tests a trial that it trains on, and groups are the user's to give
        groups = make_groups(table, side)
        if side in must or not any(find_shared(groups, fold) for fold in folds):
            found.append(side)
    return Split(protocol, folds, table, tuple(dict.fromkeys([*found, *must])))


class SplitSettings(Settings):
    """What a configuration needs from a split before trials are read."""

    #: What may be decoded under it.
    decodes: ClassVar[tuple[Task, ...]] = ("images", "categories")
    #: Whether trials that the data set declares as training are tested, so that nothing may be learnt before the split.
    tests_training_trials: ClassVar[bool] = False
    #: Whether training and test trials are those that the data set declares, so that facts about these hold for a run.
    is_declared: ClassVar[bool] = False
    #: Over what responses may be standardised before the split without seeing a test trial; None is anything.
    standardising: ClassVar[tuple[str, ...] | None] = None


class DeclaredSplitSettings(SplitSettings):
    """What splits have that follow the training and test images which a data set declares.

    Parameters
    ----------
    require
        What must not be shared between training and test, besides images: for example ``[concept]`` for a zero-shot
        protocol. Everything that is not shared is recorded in any case.
    """

    require: tuple[Side, ...] = ()

    not_hashed: ClassVar[frozenset[str]] = frozenset({"require"})


class PublishedSplitConfig(DeclaredSplitSettings):
    """The training and test trials that the authors of the data set declared."""

    kind: Literal["published"] = "published"

    is_declared: ClassVar[bool] = True

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Return one fold from the `split` column of the trial table."""
        column = trials["split"].to_numpy(dtype=object)
        train, test = np.flatnonzero(column == "train"), np.flatnonzero(column == "test")
        if not len(train) or not len(test):
            only = sorted({str(name) for name in column})
            raise ConfigError(
                f"the data set declares no train/test split (all trials are {' or '.join(only)}); set split.kind to "
                "kfold."
            )
        protocol = f"published split ({len(train)} train / {len(test)} test trials)"
        by: Side = "image" if knows_images else "trial"
        return make_split(
            protocol, (Fold(train, test),), trials, concepts, needs=(by,), requires=self.require
        )


class KFoldSplitConfig(SplitSettings):
    """K folds over the images, stratified by concept; every trial is tested once.

    All repetitions of an image are in the same fold. If there are no images and the stimuli are the classes themselves,
    the folds are over trials.

    Parameters
    ----------
    n_folds
        Number of folds.
    stratify
        Spread the images of each concept evenly over the folds, so that every fold learns from every concept.
    by_name
        Choose the fold of an image by its name and the seed alone, so that data sets with the same images (`nod`,
        `nod_eeg`, `nod_meg`) have the same folds. Folds are only nearly equal then, and `stratify` must be false.
    """

    kind: Literal["kfold"] = "kfold"
    n_folds: int = Field(default=10, ge=2)
    stratify: bool = True
    by_name: bool = False

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"by_name"})

    tests_training_trials: ClassVar[bool] = True
    standardising: ClassVar[tuple[str, ...] | None] = ("none",)

    @model_validator(mode="after")
    def _check_names(self) -> KFoldSplitConfig:
        if self.by_name and self.stratify:
            raise ValueError("by_name looks at one image at a time; set stratify to false")
        return self

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Deal the shuffled images of each concept over the folds in turn, or each by its name."""
        import pandas as pd

        # Stimuli that are classes are shown in every fold; then a trial is what is held out.
        by: Side = "image" if knows_images else "trial"
        units = make_groups(trials, by)
        what = {"image": "images", "trial": "trials"}[by]
        first = pd.DataFrame({"id": units, "concept": concepts}).drop_duplicates("id")
        if len(first) < self.n_folds:
            raise ConfigError(
                f"split.n_folds is {self.n_folds}, but there are only {len(first)} {what}; set it to at most that many."
            )
        order = make_generator(seed, "split", "kfold").permutation(len(first))
        shuffled = first.iloc[order]
        if self.stratify:
            # Stable, so that images keep their shuffled order within a concept, and dealing them in turn spreads
            # each concept.
            shuffled = shuffled.sort_values("concept", kind="stable")
        dealt = np.arange(len(shuffled)) % self.n_folds
        if self.by_name:
            if by != "image":
                raise ConfigError("split.by_name needs trials that show images; leave it out.")
            dealt = (
                np.array([derive_seed(seed, "kfold", str(name)) for name in shuffled["id"]]) % self.n_folds
            )
            if lost := set(range(self.n_folds)) - set(dealt.tolist()):
                raise ConfigError(
                    f"no name of the {len(first)} images falls into fold {min(lost)} of {self.n_folds}; set "
                    "split.n_folds lower, or another seed."
                )
        fold_of = dict(zip(shuffled["id"], dealt, strict=True))
        kind = "stratified " if self.stratify else "by name, " if self.by_name else ""
        protocol = f"{kind}{self.n_folds}-fold over {len(first)} {what} (seed {seed})"
        folds = _fold_by_number(np.array([fold_of[i] for i in units]), self.n_folds)
        return make_split(protocol, folds, trials, concepts, needs=(by,))


def _fold_by_number(number: np.ndarray, n_folds: int) -> tuple[Fold, ...]:
    return tuple(
        Fold(np.flatnonzero(number != fold), np.flatnonzero(number == fold)) for fold in range(n_folds)
    )


class GroupedSplitSettings(SplitSettings):
    """What splits of whole groups have.

    Parameters
    ----------
    by
        What stays in the same fold: the column ``group``, or ``subject``, ``session``, ``run``, ``concept``.
    images
        Whether images are not shared either: a fold then trains on no trial with an image of its test trials. To decode
        categories, images are shared.
    """

    by: Grouping = "group"
    images: bool = False

    tests_training_trials: ClassVar[bool] = True
    standardising: ClassVar[tuple[str, ...] | None] = ("none",)


class GroupKFoldSplitConfig(GroupedSplitSettings):
    """K folds that keep groups together: blocks, days, sessions, subjects.

    Parameters
    ----------
    n_folds
        Number of folds.
    """

    kind: Literal["group_kfold"] = "group_kfold"
    n_folds: int = Field(default=5, ge=2)

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Deal the shuffled groups over the folds in turn, the largest first."""
        groups = make_groups(trials.assign(concept=concepts), self.by).astype(str)
        names, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
        if len(names) < self.n_folds:
            raise ConfigError(
                f"split.n_folds is {self.n_folds}, but there are only {len(names)} {self.by}s; set it to at most that "
                "many."
            )
        # Shuffled first, so that groups of one size fall anywhere; the largest then go to the emptiest fold.
        order = make_generator(seed, "split", "group_kfold").permutation(len(names))
        order = order[np.argsort(-counts[order], kind="stable")]
        filled, fold_of = np.zeros(self.n_folds), np.empty(len(names), dtype=int)
        for group in order:
            fold_of[group] = int(np.argmin(filled))
            filled[fold_of[group]] += counts[group]
        folds = _fold_by_number(fold_of[codes], self.n_folds)
        protocol = f"{self.n_folds}-fold over {len(names)} {self.by}s (seed {seed})"
        return _make_group_split(protocol, folds, trials, concepts, self.by, drop_images=self.images)


class LeaveOneGroupOutConfig(GroupedSplitSettings):
    """One fold per group, session or subject: its trials are decoded by a fit that has seen the others only."""

    kind: Literal["leave_one_group_out"] = "leave_one_group_out"

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Return one fold per group, in the order of the trials."""
        import pandas as pd

        groups = make_groups(trials.assign(concept=concepts), self.by).astype(str)
        names = pd.unique(groups)
        if len(names) < 2:
            raise ConfigError(
                f"leave-one-{self.by}-out needs two {self.by}s, but there is only {names[0]!r}."
            )
        folds = tuple(Fold(np.flatnonzero(groups != name), np.flatnonzero(groups == name)) for name in names)
        protocol = f"leave one {self.by} out ({len(names)} {self.by}s)"
        return _make_group_split(protocol, folds, trials, concepts, self.by, drop_images=self.images)


def _make_group_split(
    protocol: str,
    folds: tuple[Fold, ...],
    trials: pd.DataFrame,
    concepts: np.ndarray,
    by: Side,
    *,
    drop_images: bool,
) -> Split:
    """Return the split; with `drop_images` each fold also leaves out training trials of its test images."""
    if drop_images:
        ids = trials["stimulus_id"].to_numpy(dtype=object)
        folds = tuple(
            Fold(fold.train[~np.isin(ids[fold.train], np.unique(ids[fold.test].astype(str)))], fold.test)
            for fold in folds
        )
        if any(not len(fold.train) for fold in folds):
            raise ConfigError(
                f"every {by} shows the same images, so that no training trial is left when their images are left "
                "out too; set split.images to false and decode categories, or split by image."
            )
        protocol += ", their images left out of the training"
    needs: tuple[Side, ...] = (by, "image") if drop_images else (by,)
    return make_split(protocol, folds, trials, concepts, needs=needs)


class LeaveOneImageOutConfig(SplitSettings):
    """One fold per image: all its trials are decoded by a fit that has never seen it, for few images."""

    kind: Literal["leave_one_image_out"] = "leave_one_image_out"

    tests_training_trials: ClassVar[bool] = True
    standardising: ClassVar[tuple[str, ...] | None] = ("none",)

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Return one fold per image, in the order of the trials."""
        import pandas as pd

        ids = trials["stimulus_id"].to_numpy(dtype=object)
        names = pd.unique(ids)
        if len(names) < 3:
            raise ConfigError(f"leave-one-image-out needs three images, but there are {len(names)}.")
        folds = tuple(Fold(np.flatnonzero(ids != name), np.flatnonzero(ids == name)) for name in names)
        return make_split(
            f"leave one image out ({len(names)} images)", folds, trials, concepts, needs=("image",)
        )


class LeaveOneRunOutConfig(SplitSettings):
    """One fold per run: the decoder of a run has seen every other run of the subject, for category decoding."""

    kind: Literal["leave_one_run_out"] = "leave_one_run_out"

    decodes: ClassVar[tuple[Task, ...]] = ("categories",)
    tests_training_trials: ClassVar[bool] = True
    standardising: ClassVar[tuple[str, ...] | None] = ("none", "run")  # a run is tested as a whole

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Return one fold per subject, session and run; training runs are of the same subject."""
        import pandas as pd

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
        protocol = f"leave one run out ({len(folds)} runs, within subject)"
        return make_split(protocol, tuple(folds), trials, concepts, needs=("run",))


class LeaveOneSubjectOutConfig(DeclaredSplitSettings):
    """One fold per subject: its test trials are decoded by an encoder that has seen other subjects only.

    Training and test images are those that the data set declares, so that neither the subject nor the image was seen.
    With `own_trials` the subject is a new one that gives a few training trials, and the protocol says how many.

    Parameters
    ----------
    own_trials
        How many training trials of the tested subject are added to those of the others, drawn with the seed of the run;
        a larger number includes those of a smaller one. 0 is zero-shot. Alignment of subjects by images needs some
        (``encoder.subject_alignment`` hyperalignment and similar).
    """

    kind: Literal["leave_one_subject_out"] = "leave_one_subject_out"
    own_trials: int = Field(default=0, ge=0)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"own_trials"})

    def make(
        self, trials: pd.DataFrame, concepts: np.ndarray, *, seed: int, knows_images: bool = True
    ) -> Split:
        """Return one fold per subject, over the `split` column of the trial table."""
        import pandas as pd

        subjects, column = trials["subject"].to_numpy(dtype=object), trials["split"].to_numpy(dtype=object)
        names = pd.unique(subjects)
        if len(names) < 2:
            raise ConfigError(
                f"leave-one-subject-out needs two subjects, but only subject {names[0]} was read; see dataset.subjects."
            )
        if self.own_trials and not knows_images:
            raise ConfigError(
                "split.own_trials needs training and test images, and here every subject saw every class; leave it out."
            )
        if not knows_images:  # every subject saw every class; nothing but the subject can be held out
            return LeaveOneGroupOutConfig(by="subject").make(trials, concepts, seed=seed)
        if not (column == "test").any():
            # The other split has no own trials, so it is no way out for who asked for them.
            instead = (
                "declare some trials as test (the column split of their table, or split=... of from_arrays)"
                if self.own_trials
                else "set split to {kind: leave_one_group_out, by: subject, images: true}"
            )
            raise ConfigError(
                "the data set declares no test trials, so that leave-one-subject-out cannot test images that "
                f"no subject was trained on; {instead}."
            )
        folds = []
        for name in names:
            own = np.flatnonzero((subjects == name) & (column == "train"))
            if len(own) < self.own_trials:
                raise ConfigError(
                    f"split.own_trials is {self.own_trials}, but subject {name} has {len(own)} training trials; set it "
                    "to fewer."
                )
            others = np.flatnonzero((subjects != name) & (column == "train"))
            drawn = make_generator(seed, "split", "own_trials", str(name)).permutation(own)[: self.own_trials]
            train = np.sort(np.r_[others, drawn])
            folds.append(Fold(train, np.flatnonzero((subjects == name) & (column == "test"))))
        protocol = f"leave one subject out ({len(names)} subjects), published images"
        if self.own_trials:
            protocol += f", few-shot: {self.own_trials} training trials of the tested subject"
        needs: tuple[Side, ...] = ("image",) if self.own_trials else ("image", "subject")
        return make_split(protocol, tuple(folds), trials, concepts, needs=needs, requires=self.require)


SplitConfig = Annotated[
    PublishedSplitConfig | KFoldSplitConfig | LeaveOneRunOutConfig | LeaveOneSubjectOutConfig,
    ByKind(),
]


class InnerFoldSettings(Settings):
    """Settings of what chooses penalties within the training trials.

    Parameters
    ----------
    n_inner_folds
        Folds of the inner cross-validation, over images.
    """

    n_inner_folds: int = Field(default=5, ge=2)


def make_inner_folds(
    groups: np.ndarray, *, n_folds: int, generator: np.random.Generator, setting: str = "",
    always: np.ndarray | None = None,
) -> list[Fold]:  # fmt: skip
    """Return folds over training rows that never separate two rows of one group.

    Parameters
    ----------
    groups : array of shape (n_rows,)
        Group of each row, usually its stimulus id.
    n_folds
        Number of folds; fewer groups than that raise.
    generator
        Shuffles the groups.
    setting
        Where `n_folds` was set, for the message.
    always : bool array of shape (n_rows,), optional
        Rows that every fold trains on and none tests, such as synthetic trials; the others are split as without them.
    """
    tested = np.ones(len(groups), bool) if always is None else ~always
    _, codes = np.unique(np.asarray(groups, dtype=str)[tested], return_inverse=True)
    n_groups = int(codes.max()) + 1
    if n_groups < n_folds:
        lower = f"set {setting} to {n_groups}, or " if setting and n_groups > 1 else ""
        raise DataError(
            f"inner cross-validation needs {n_folds} folds, but the training trials show only {n_groups} "
            f"image{'s' if n_groups > 1 else ''}; {lower}give more pictures, or fewer outer folds."
        )
    # A permutation modulo the number of folds: sizes differ by one group at most.
    number = np.full(len(groups), -1)
    number[tested] = (generator.permutation(n_groups) % n_folds)[codes]
    return [Fold(np.flatnonzero(number != fold), np.flatnonzero(number == fold)) for fold in range(n_folds)]


def split_imagined_trials(
    trials: pd.DataFrame, stimuli: StimulusSet, folds: Sequence[Fold]
) -> tuple[tuple[Fold, ...], tuple[np.ndarray, ...]]:
    """Split the test trials of every fold into those that show a picture and those that imagine without one.

    Parameters
    ----------
    trials
        The trial table.
    stimuli
        The images. If none of them are available, nothing is split.
    folds
        Rows of `trials`.

    Returns
    -------
    folds
        The same folds, tested on trials with a picture; the test part of a fold may be empty.
    imagined
        Rows of the other test trials of each fold.

    Raises
    ------
    DataError
        If a trial without a picture is not of the task `imagery`, or is in training.
    """
    nothing = np.array([], dtype=int)
    # A data set whose images lie elsewhere has no pictures at all, which says nothing of single trials.
    if stimuli.has_picture.all() or not stimuli.has_pixels:
        return tuple(folds), tuple(nothing for _ in folds)
    ids = trials["stimulus_id"].to_numpy(dtype=object)
    # (n_trials,): trials whose stimulus has no picture.
    bare = ~stimuli.has_picture[stimuli.find_rows(ids)]
    tasks = trials["task"].astype(str).to_numpy() if "task" in trials else np.full(len(trials), "")
    wrong = np.flatnonzero(bare & (tasks != IMAGERY_TASK))
    if len(wrong):
        raise DataError(
            f"the stimulus {ids[wrong[0]]!r} of trial {wrong[0]} has no picture; only test trials with "
            f"{IMAGERY_TASK} in the column task may have no picture. Add its image, or leave the trial out."
        )
    for number, fold in enumerate(folds):
        learnt = fold.train[bare[fold.train]]
        if len(learnt):
            raise DataError(
                f"fold {number} trains on {len(learnt)} trials without a picture, first {ids[learnt[0]]!r}; choose a "
                "split that only tests imagery, for example split.kind published."
            )
    return (
        tuple(Fold(fold.train, fold.test[~bare[fold.test]]) for fold in folds),
        tuple(fold.test[bare[fold.test]] for fold in folds),
    )
