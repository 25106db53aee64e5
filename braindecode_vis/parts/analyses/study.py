"""The input and the results of an analysis.

An analysis is an ``XConfig`` with ``kind`` and ``compute(study) -> Findings``. It asks the study for trials and for
encoders fitted on changed trials (a time window, a set of channels), and never opens a file. The pipeline builds the
study, renders the plots and keeps the tables.

A run may choose voxels or channels by reliability or by encoding score. An analysis that cuts trials (to a window, to a
region) chooses anew among what the cut leaves, by the cut training trials alone; the choice of whole trials would carry
what other windows and other regions say into the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings, Responses, Score, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.base.roles import complete
from braindecode_vis.base.stimuli import Images, StimulusSet
from braindecode_vis.preprocessing.array_file import KeptParts
from braindecode_vis.preprocessing.selection import BestConfig, Selection, SelectionConfig, fit_selection
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.scoring.retrieval import Retrieval, compute_ranks, fit_centre

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


def _tell_nobody(sentence: str) -> None:
    return None


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
        ``choose(fold_number, change)`` returns the features that the run's setting chooses by the changed training
        trials of a fold, or None if all are kept.
    pools_volumes
        Whether a category decoder decides all volumes of a trial together, so that they are one decision.
    spaces
        Further banks by name, for analyses that compare image spaces; embeddings of every image.
    unit
        What intervals resample, in one word, as in the scores of the run.
    label
        ``label(trials)`` returns which of them each test trial belongs to; None if they are images.
    progress
        ``progress(description, total)`` returns a context whose value is called with steps done.
    kept
        What was measured of refits, while an analysis is not finished.
    fit_seconds
        How long training took the run for one fold; None if that is not known.
    tell
        Says a sentence to the user.
    embed_texts
        ``embed_texts(texts)`` returns vectors of texts in the space of the targets, for networks of image and text.
    reconstruct
        ``reconstruct(fold_number, rows)`` returns the images that the run's prior and generator make of these trials,
        repetitions averaged, and the stimulus of each.
    only_trained
        What of `protocol` is true of the run's own fits alone, and not of those that an analysis makes.
    reconstruct_changed
        ``reconstruct_changed(study, fold_number, train, test, change)`` returns the images that the run's prior and
        generator make of changed test trials, by encoders of the run and its branches that are fitted on changed
        training trials.
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
    pools_volumes: bool = False
    spaces: dict[str, Embeddings] = field(default_factory=dict)
    unit: str = "image"
    label: Callable[[pd.DataFrame], np.ndarray] | None = None
    progress: Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]] = _no_progress
    kept: KeptParts = field(default_factory=KeptParts)
    fit_seconds: float | None = None
    tell: Callable[[str], None] = _tell_nobody
    embed_texts: Callable[[Sequence[str]], np.ndarray] | None = None
    reconstruct: Callable[[int, np.ndarray], tuple[Images, np.ndarray]] | None = None
    reconstruct_changed: Callable[[Study, int, Responses, Responses, Change], Images] | None = None
    only_trained: str = ""

    @property
    def protocol_of_refits(self) -> str:
        """Protocol of encoders that an analysis fits, which learn from real trials alone."""
        return self.protocol.replace(f"; {self.only_trained}", "") if self.only_trained else self.protocol

    def find_clusters(self, test: Responses) -> np.ndarray:
        """Return what test trials belong to and are resampled with: their images, or what `unit` names."""
        return test.stimulus_ids if self.label is None else self.label(test.trials)

    @property
    def has_time(self) -> bool:
        """Whether trials have a time axis."""
        return "time" in self.responses.dims


def fit_picked(study: Study, number: int, train: Responses, change: Change | None) -> Any:
    """Fit a new encoder on training trials that were picked, and changed by `change`, already."""
    choice = study.choose(number, change)  # on single trials, whatever is averaged for the fit
    train = train if choice is None else choice.apply(train)
    encoder = study.build(number)
    encoder.fit(train, study.banks[number].select(list(train.stimulus_ids)))
    return encoder if choice is None else ChoosingEncoder(complete(BrainEncoder, encoder), choice)


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
    known = complete_encoder(encoder)
    if known.has_subject_galleries and test.trials["subject"].nunique() > 1:
        raise ConfigError(
            "analyses rank all subjects in one gallery, but encoder.fusion.weights per_subject gives "
            "each subject a different one; use global weights, or one subject."
        )
    # The centre is that of training images, so that no test image moves another one.
    centre = fit_centre(known.map_targets(bank.select(trained_on)), study.centre)
    gallery = centre.apply(known.map_targets(bank.select(pd.unique(test.stimulus_ids))))
    queries = centre.apply(known.predict(test))
    return queries, gallery, compute_ranks(queries, gallery, n_top=1, protocol=study.protocol)


# --- a choice of voxels or channels inside an analysis -------------------------------------------------------------


@dataclass(frozen=True)
class ChoosingEncoder:
    """A fitted encoder that is shown the features (voxels, channels) that were chosen for it.

    Parameters
    ----------
    encoder
        Fitted on the chosen features.
    choice
        What is applied to the trials that it is asked about.
    """

    encoder: BrainEncoder
    choice: Selection

    @property
    def has_subject_galleries(self) -> bool:
        """Whether each subject's predictions must be searched in a gallery of its own."""
        return self.encoder.has_subject_galleries

    def predict(self, responses: Responses) -> Embeddings:
        """Return the encoder's predictions for trials with all features."""
        return self.encoder.predict(self.choice.apply(responses))

    def map_targets(self, targets: Embeddings) -> Embeddings:
        """Return image embeddings in the space of `predict`."""
        return self.encoder.map_targets(targets)


def complete_encoder(encoder: Any) -> ChoosingEncoder | BrainEncoder:
    """Return an encoder with the defaults of its role."""
    return encoder if isinstance(encoder, ChoosingEncoder) else complete(BrainEncoder, encoder)


def choose_features(
    config: SelectionConfig, train: Responses, targets: Embeddings | None, *, seed: int
) -> Selection:
    """Choose among the features of cut training trials as a run chooses among all.

    A cut may hold fewer features than the run keeps: it then keeps them all. Where none reaches a threshold, as before
    the onset of a response, the best one is kept, so that the cut has a score.

    Parameters
    ----------
    config
        Of the run, without names.
    train
        Single training trials of a fold, cut.
    targets
        Embeddings of their images, if `config.encoding` is set.
    seed
        Of random halves and folds.
    """
    # Where subjects have voxels of their own, the one with fewest says how many all can keep.
    counts = count_own_voxels(train)
    most = min(counts.values()) if counts else train.data.shape[1]
    try:
        return fit_selection(_limit(config, most, drop_thresholds=False), train, targets, seed=seed)
    # Raised where no feature reaches a threshold.
    except DataError:
        parts = (config.reliability, config.encoding)
        if all(part is None or part.threshold is None for part in parts):
            raise
        return fit_selection(_limit(config, most, drop_thresholds=True), train, targets, seed=seed)


def _limit(config: SelectionConfig, most: int, *, drop_thresholds: bool) -> SelectionConfig:
    """Return the choice with numbers of features that `most` features can give."""
    changes: dict[str, BestConfig] = {}
    for name in ("reliability", "encoding"):
        part: BestConfig | None = getattr(config, name)
        if part is None:
            continue
        if part.n_best is not None:
            # The second ranking chooses among what the first one keeps.
            most = min(most, part.n_best)
            changes[name] = part.model_copy(update={"n_best": most})
        elif drop_thresholds:
            most = 1
            changes[name] = part.model_copy(update={"n_best": 1, "threshold": None})
    return config.model_copy(update=changes)


def show_chosen(encoder: Any, test: Responses) -> tuple[Any, Responses, np.ndarray | None]:
    """Return what looks into an encoder needs: the encoder itself, the trials as it takes them, and their features.

    Returns
    -------
    encoder
        Without its choice.
    test
        The chosen features.
    keep : bool array of shape (n_features,) or None
        Which they are; None without a choice.

    Raises
    ------
    DataError
        If every subject has a choice of its own.
    """
    if not isinstance(encoder, ChoosingEncoder):
        return encoder, test, None
    if "" not in encoder.choice.keep:
        raise DataError(
            "subjects have different voxels, so chosen voxels do not correspond between subjects; "
            "analyse one subject."
        )
    return encoder.encoder, encoder.choice.apply(test), encoder.choice.keep[""]
