"""Natural Object Dataset (Gong et al. 2023, ds004496): 30 subjects, ImageNet pictures once, COCO pictures ten times.

Owns the meaning of the event tables of its two experiments. They name the picture in different columns (`stim_file` and
`condition`), and a number in `trial_type` is a class in one and a picture in the other. In the COCO runs,
events without a picture are blanks (1000), and changes of the fixation point that were answered (2000).

References
----------
Gong, Z. et al. (2023). A large-scale fMRI dataset for the visual processing of naturalistic scenes. Scientific Data 10,
559. doi:10.1038/s41597-023-02471-x
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_columns
from braindecode_vis.datasets.bids.fmri_dataset import BoldSettings, FmriRecipe, make_stimulus_id
from braindecode_vis.datasets.bids.fmri_files import RunFiles, check_no_overlap, read_numbers

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = {"imagenet": "stim_file", "coco": "condition"}
# A model leaves blanks out, but includes presses after a change of the fixation point.
_WITHOUT_PICTURE = {1000: "", 2000: "fixation_change"}


class NodConfig(BoldSettings):
    """Folder of the data set, and the experiments that are read; see `BoldSettings` for the other options.

    Parameters
    ----------
    tasks
        ``imagenet``: 1000 pictures per session, each seen once, training trials. ``coco``: 120 pictures that all
        subjects saw ten times, test trials. The authors declare no split; here the repeated pictures are the test set.
        With only ``tasks=[coco]``, there are no training trials for standardisation.
    """

    kind: Literal["nod"] = "nod"
    tasks: tuple[Literal["imagenet", "coco"], ...] = ("imagenet", "coco")

    def list_declared(self, subject: str) -> dict[str, int | None]:
        """Return the declared sessions of the tasks that are read; their names begin with the task."""
        declared = super().list_declared(subject)
        return {session: n for session, n in declared.items() if session.startswith(self.tasks)}

    def make_recipe(self) -> FmriRecipe:
        """Return the tasks that are read, and the meaning of their tables."""
        notes = {"protocol": "imagenet pictures for training, repeated coco pictures for testing"}
        return FmriRecipe("nod", {"task": self.tasks}, read_nod_events, _finish, notes)


def read_nod_events(table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
    """Return trials and other events of one run."""
    import pandas as pd

    assert run.events is not None
    task = run.entities.get("task", "")
    if task not in _COLUMNS:
        raise DataError(f"{run.where} is of the task {task!r}; imagenet and coco are known.")
    check_columns(table.columns, ("trial_type", _COLUMNS[task]), what=f"the events table {run.events}")
    shown = table[_COLUMNS[task]]
    codes = read_numbers(table, "trial_type", run.events).astype(int)  # a whole number written as 521.0
    blank = (shown == "").to_numpy()
    if task == "imagenet" and blank.any():
        raise DataError(
            f"{run.events} has no picture in row {int(np.flatnonzero(blank)[0]) + 2}; fetch it again."
        )
    unknown = sorted(set(codes[blank]) - set(_WITHOUT_PICTURE))
    if unknown:
        raise DataError(
            f"{run.events} has events of the type {unknown[0]} without a picture; 1000 and 2000 are known."
        )
    ids = shown.map(make_stimulus_id)
    concepts = ids.str.split("_").str[0] if task == "imagenet" else ids
    return pd.DataFrame(
        {
            "stimulus_id": ids,
            "concept": concepts,
            "path": shown,
            "split": "train" if task == "imagenet" else "test",
            "trial_type": np.where(blank, pd.Series(codes).map(_WITHOUT_PICTURE).fillna(""), "picture"),
            "task": task,
            # Counted from 1 in the order of ImageNet's synsets; 0 for COCO, where the number is that of the picture.
            "imagenet_class": codes if task == "imagenet" else 0,
        }
    )


def _finish(trials: pd.DataFrame) -> pd.DataFrame:
    check_no_overlap(trials, title="NOD")
    return trials
