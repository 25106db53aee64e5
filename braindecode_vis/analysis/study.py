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
from braindecode_vis.retrieval import Retrieval, compute_ranks, fit_centre
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
