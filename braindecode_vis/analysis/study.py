"""What an analysis works on, and what it gives back.

An analysis is an ``XConfig`` with ``kind`` and ``compute(study) -> Findings``. It asks the study for trials and for
encoders fitted on changed trials (a time window, a set of channels), and never opens a file. The pipeline builds the
study, renders the plots and keeps the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.analysis.choice import ChoosingEncoder
from braindecode_vis.arrays import Embeddings, Responses, Score
from braindecode_vis.checks import ConfigError
from braindecode_vis.preprocessing.selection import Selection
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.retrieval import (
    Retrieval,
    compute_k_way_hits,
    compute_ranks,
    compute_top_k_hits,
    fit_centre,
)
from braindecode_vis.stimuli import StimulusSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Change = Callable[[Responses], Responses]
Choose = Callable[[int, Change | None], Selection | None]


@dataclass(frozen=True)
class Plot:
    """One figure of an analysis.

    Parameters
    ----------
    name
        File name without suffix.
    caption
        What it shows, with the meaning of every line and band.
    alt
        The finding in words, for readers who do not see it.
    draw
        Draws into an empty figure; colours come from the style that is active when it is called.
    size
        Width and height in inches.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (7.0, 3.4)


@dataclass(frozen=True)
class Attachment:
    """One further file of an analysis, which the report links.

    Parameters
    ----------
    name
        File name with suffix.
    caption
        What it holds.
    write
        Writes it to the path that it is given.
    """

    name: str
    caption: str
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Findings:
    """What an analysis found.

    Parameters
    ----------
    title
        Heading in the report.
    summary
        One paragraph: what was done on which trials, the main result with interval and chance, and what to beware of.
    table
        Tidy rows; every score has the columns `value`, `ci_low`, `ci_high`, `chance` and `n` beside it.
    plots
        Figures, in order.
    scores
        Rows for the table of scores, if a number belongs there.
    files
        Further files, for example maps of the brain.
    """

    title: str
    summary: str
    table: pd.DataFrame
    plots: tuple[Plot, ...] = ()
    scores: tuple[Score, ...] = ()
    files: tuple[Attachment, ...] = ()


@dataclass(frozen=True)
class DecodedTrials:
    """Ranks of the test trials of all folds, row by row.

    Parameters
    ----------
    ids, subjects, folds : arrays of shape (n_rows,)
        Stimulus, subject and fold of each test trial.
    retrievals
        Ranks of each fold; their queries in order are the rows.
    queries, galleries
        The centred predictions and the centred gallery of each fold.
    """

    ids: np.ndarray
    subjects: np.ndarray
    folds: np.ndarray
    retrievals: tuple[Retrieval, ...]
    queries: tuple[Embeddings, ...]
    galleries: tuple[Embeddings, ...]

    @property
    def smallest_gallery(self) -> int:
        """Number of candidates in the smallest gallery."""
        return min(retrieval.gallery_size for retrieval in self.retrievals)

    def hits(self, metric: str) -> np.ndarray:
        """Return one value per row: ``top1``, ``top5``, any ``top<k>``, or ``<k>_way``, in closed form."""
        if metric.startswith("top"):
            k = int(metric.removeprefix("top"))
            return np.concatenate([compute_top_k_hits(r, k).astype(float) for r in self.retrievals])
        k = int(metric.removesuffix("_way"))
        return np.concatenate([compute_k_way_hits(r, k) for r in self.retrievals])


def _no_progress(description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda n: None)


def _keep_all(number: int, change: Change | None) -> None:
    return None


@dataclass(frozen=True)
class Study:
    """Trials, targets and encoders of one run.

    Parameters
    ----------
    responses
        All trials, possibly on disk.
    stimuli
        All images.
    folds
        Rows of the training and the test trials of each fold.
    banks
        Target embedding of every image, one per fold.
    pick
        ``pick(rows, "train" or "test")`` returns these trials as the run's setting of repetitions has them.
    build
        ``build(fold_number)`` returns a new brain encoder of the run's configuration.
    trained
        ``trained(fold_number)`` returns the encoder that the run fitted on whole trials.
    centre
        The run's setting ``retrieval.centre``.
    protocol
        Data set, split, averaging and gallery, as text.
    seed
        Root seed.
    n_bootstrap, n_permutations
        Resamples and shuffles.
    imagined
        Rows of the test trials of each fold that imagine something without a picture, and are in no fold.
    choose
        ``choose(fold_number, change)`` returns the columns that the run's setting chooses by the changed training
        trials of a fold, or None where all are kept.
    spaces
        Further banks by name, for analyses that compare image spaces; embeddings of every image.
    progress
        ``progress(description, total)`` returns a context whose value is called with steps done.
    """

    responses: Responses
    stimuli: StimulusSet
    folds: Sequence[Fold]
    banks: Sequence[Embeddings]
    pick: Callable[[np.ndarray, str], Responses]
    build: Callable[[int], Any]
    trained: Callable[[int], Any]
    centre: str
    protocol: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    imagined: Sequence[np.ndarray] = ()
    choose: Choose = _keep_all
    spaces: dict[str, Embeddings] = field(default_factory=dict)
    progress: Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]] = _no_progress

    @property
    def has_time(self) -> bool:
        """Whether trials have a time axis."""
        return "time" in self.responses.dims


def fit_changed(study: Study, number: int, change: Change | None = None) -> Any:
    """Fit a new encoder on the changed training trials of one fold.

    Parameters
    ----------
    study
        Trials and encoders.
    number
        The fold.
    change
        Applied to the trials before fitting; None keeps them.
    """
    train = study.pick(study.folds[number].train, "train")
    return fit_picked(study, number, train if change is None else change(train), change)


def fit_picked(study: Study, number: int, train: Responses, change: Change | None) -> Any:
    """Fit a new encoder on training trials that were picked, and changed by `change`, already."""
    choice = study.choose(number, change)
    train = train if choice is None else choice.apply(train)
    encoder = study.build(number)
    encoder.fit(train, study.banks[number].select(list(train.stimulus_ids)))
    return encoder if choice is None else ChoosingEncoder(encoder, choice)


def rank_trials(
    study: Study, number: int, test: Responses, encoder: Any
) -> tuple[Embeddings, Embeddings, Retrieval]:
    """Predict test trials of one fold and rank the true images among the distinct images of these trials.

    Returns
    -------
    queries, gallery
        Centred predictions and centred gallery.
    retrieval
        Ranks.
    """
    bank = study.banks[number]
    trained_on = pd.unique(study.responses.stimulus_ids[study.folds[number].train])
    if getattr(encoder, "has_subject_galleries", False) and test.trials["subject"].nunique() > 1:
        raise ConfigError(
            "analyses rank all subjects in one gallery, but encoder.fusion.weights per_subject gives each its own; "
            "use global weights, or one subject."
        )
    predicted, adapt = encoder.predict(test), getattr(encoder, "map_targets", lambda targets: targets)
    centre = fit_centre(adapt(bank.select(trained_on)), study.centre)
    gallery = centre.apply(adapt(bank.select(pd.unique(test.stimulus_ids))))
    queries = centre.apply(predicted)
    return queries, gallery, compute_ranks(queries, gallery, n_top=1, protocol=study.protocol)


def decode(study: Study, change: Change | None = None, *, change_test: Change | None = None) -> DecodedTrials:
    """Fit on changed training trials of every fold and rank its changed test trials.

    Parameters
    ----------
    study
        Trials and encoders.
    change
        Applied to training and test trials, for example a crop to a time window; None keeps them.
    change_test
        Applied to the test trials instead of `change`, for generalisation from one window to another.
    """
    parts = []
    for number, fold in enumerate(study.folds):
        encoder = fit_changed(study, number, change)
        test = study.pick(fold.test, "test")
        altered = change_test if change_test is not None else change
        parts.append((number, test, rank_trials(study, number, altered(test) if altered else test, encoder)))
    return join_folds(parts)


def join_folds(
    parts: Sequence[tuple[int, Responses, tuple[Embeddings, Embeddings, Retrieval]]],
) -> DecodedTrials:
    """Put the folds of one decoding together: number, test trials and what `rank_trials` gave for each."""
    return DecodedTrials(
        ids=np.concatenate([test.stimulus_ids for _, test, _ in parts]),
        subjects=np.concatenate([test.trials["subject"].to_numpy(dtype=object) for _, test, _ in parts]),
        folds=np.concatenate([np.full(test.n_trials, number) for number, test, _ in parts]),
        retrievals=tuple(ranked for _, _, (_, _, ranked) in parts),
        queries=tuple(queries for _, _, (queries, _, _) in parts),
        galleries=tuple(gallery for _, _, (_, gallery, _) in parts),
    )
