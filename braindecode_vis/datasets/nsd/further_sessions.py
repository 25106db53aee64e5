"""Common part of NSD-Imagery and NSD-synthetic: training on the core sessions, and one further test session.

Shared images of the core sessions are left out of training, since some of them are shown or imagined later. The further
session has no training trial, so its voxels are standardised with the mean and standard deviation of the core sessions;
published numbers use its own trials instead, which is transductive, and the notes say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.datasets.sources.betas_source import BetasPart, FmriSource, Geometry, keep_rows

if TYPE_CHECKING:
    import pandas as pd


def open_training(core: FmriSource) -> tuple[Geometry, list[BetasPart]]:
    """Return the geometry of the core sessions, and their training trials."""
    geometry = core.geometry
    if not isinstance(geometry, Geometry):
        raise DataError("the core sessions are of several subjects; read one at a time.")
    return geometry, [keep_rows(part, (part.trials["split"] == "train").to_numpy()) for part in core.parts]


def join_sessions(
    core: FmriSource,
    training: Sequence[BetasPart],
    tested: BetasPart,
    own: pd.DataFrame,
    read_own: Callable[[int], np.ndarray] | None,
    *,
    protocol: str,
    tasks: Sequence[str],
) -> FmriSource:
    """Return one source of the training parts and the tested session, with one reader for the images of both.

    Parameters
    ----------
    own : DataFrame
        `stimulus_id`, `concept`, `split` and `path` of each further stimulus.
    read_own
        Returns the pixels of a row of `own`, of any shape; they are cropped to the middle square and scaled to the size
        of the training images.
    protocol, tasks
        Description of the test, for the notes.
    """
    import pandas as pd

    shown = set(pd.concat([part.trials["stimulus_id"] for part in training]))
    # Only training images: shared ones were left out.
    rows = np.flatnonzero(core.stimuli.table["stimulus_id"].isin(shown))
    seen = core.stimuli.table.iloc[rows].reset_index(drop=True)
    # Further stimuli have no number in NSD's own list.
    stimuli = StimulusSet(pd.concat([seen, own.assign(sha256="", nsd_id=-1)], ignore_index=True))
    read_image = None
    if read_own is not None and core.read_image is not None:
        read_core, size = core.read_image, core.read_image(int(rows[0])).shape[0]

        def read_image(row: int) -> np.ndarray:
            # The table begins with the training images.
            return (
                read_core(int(rows[row]))
                if row < len(rows)
                else resize_image(read_own(row - len(rows)), size, size)
            )

    notes = {**core.notes, "protocol": protocol, "tasks": list(tasks)}
    parts = (*training, tested)
    return FmriSource(parts, stimuli, core.plan, core.unit, core.geometry, None, read_image, notes)


def describe_standardising(zscore: str, untrained: str) -> str:
    """Return a description of how the further session is standardised."""
    if zscore == "none":
        return "not standardised"
    if untrained == "pooled":
        return "standardised with the core sessions"
    return f"standardised per {zscore} with its own test trials (transductive)"
