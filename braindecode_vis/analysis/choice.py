"""A choice of columns inside an analysis: fitted on the training trials of each cut, and kept beside its encoder.

A run may choose columns by reliability or by encoding score. An analysis that cuts trials (to a window, to a region)
chooses anew among what the cut leaves, by the cut training trials alone; the choice of whole trials would carry what
other windows and other regions say into the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.selection import BestConfig, Selection, SelectionConfig, fit_selection
from braindecode_vis.preprocessing.voxel_geometry import count_own_voxels


@dataclass(frozen=True)
class ChoosingEncoder:
    """A fitted encoder that is shown the columns that were chosen for it; all else is the encoder's own.

    Parameters
    ----------
    encoder
        Fitted on the chosen columns.
    choice
        What is applied to the trials that it is asked about.
    """

    encoder: Any
    choice: Selection

    def predict(self, responses: Responses) -> Embeddings:
        """Return the encoder's predictions for trials with all columns."""
        return self.encoder.predict(self.choice.apply(responses))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("encoder", "choice"):
            raise AttributeError(name)
        return getattr(self.encoder, name)


def choose_features(
    config: SelectionConfig, train: Responses, targets: Embeddings | None, *, seed: int
) -> Selection:
    """Choose among the columns of cut training trials as a run chooses among all.

    A cut may hold fewer columns than the run keeps: it then keeps them all. Where none reaches a threshold, as before
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
    counts = count_own_voxels(train)
    most = min(counts.values()) if counts else train.data.shape[1]
    try:
        return fit_selection(_limit(config, most, drop_thresholds=False), train, targets, seed=seed)
    except DataError:
        parts = (config.reliability, config.encoding)
        if all(part is None or part.threshold is None for part in parts):
            raise
        return fit_selection(_limit(config, most, drop_thresholds=True), train, targets, seed=seed)


def _limit(config: SelectionConfig, most: int, *, drop_thresholds: bool) -> SelectionConfig:
    """Return the choice with numbers of columns that `most` columns can give."""
    changes: dict[str, BestConfig] = {}
    for name in ("reliability", "encoding"):
        part: BestConfig | None = getattr(config, name)
        if part is None:
            continue
        if part.n_best is not None:
            most = min(most, part.n_best)
            changes[name] = part.model_copy(update={"n_best": most})
        elif drop_thresholds:
            most = 1
            changes[name] = part.model_copy(update={"n_best": 1, "threshold": None})
    return config.model_copy(update=changes)


def show_chosen(encoder: Any, test: Responses) -> tuple[Any, Responses, np.ndarray | None]:
    """Return what looks into an encoder needs: the encoder itself, the trials as it takes them, and their columns.

    Returns
    -------
    encoder
        Without its choice.
    test
        The chosen columns.
    keep : bool array of shape (n_columns,) or None
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
            "subjects have voxels of their own, so chosen voxels of one are no columns of another; analyse one subject."
        )
    return encoder.encoder, encoder.choice.apply(test), encoder.choice.keep[""]
