"""BOLD5000 (Chang et al. 2019, ds001499): four people, about 5000 pictures of scenes, COCO and ImageNet.

Owns what the event tables mean: the kind of a picture (`ImgType`), its name, and that the 113 repeated pictures, whose
kind begins with ``rep_``, are the test pictures, also where they are shown without that mark (twice in the first
session of CSI1). Reads the raw images, or fMRIPrep's of the release, which carry the names of its first versions
(``_bold_space-T1w_preproc``).

References
----------
Chang, N. et al. (2019). BOLD5000, a public fMRI dataset while viewing 5000 visual images. Scientific Data 6, 49.
doi:10.1038/s41597-019-0052-3
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns
from braindecode_vis.datasets.bids.fmri_dataset import make_stimulus_id
from braindecode_vis.datasets.bids.fmri_files import RunFiles
from braindecode_vis.datasets.bids.fmri_images import read_seconds
from braindecode_vis.datasets.bids.fmri_recipe import (
    BoldSettings,
    Recipe,
    check_bold,
    hash_bold_inputs,
    prepare_bold,
)
from braindecode_vis.datasets.bids.fmri_stimuli import check_no_overlap
from braindecode_vis.datasets.manifests import Finding, check_root, read_manifest
from braindecode_vis.datasets.sources.bold_source import BoldSource
from braindecode_vis.store import hash_file

_KINDS = ("imagenet", "coco", "scenes")
_LIST = "repeated_stimuli_113_list.txt"
_LIST_PLACES = ("", "stimuli", "BOLD5000_Stimuli", "BOLD5000_Stimuli/Scene_Stimuli", "code")


class Bold5000Config(BoldSettings):
    """Where the data set lies; see `BoldSettings` for the options.

    The 113 repeated pictures are the test pictures. They are told by `ImgType`; where ``repeated_stimuli_113_list.txt``
    is found below the root, it must agree. Subjects are called ``CSI1`` to ``CSI4``. Concepts: the synset of an
    ImageNet picture, the name of a scene without its number; a COCO picture has no single concept and stands for
    itself.
    """

    kind: Literal["bold5000"] = "bold5000"

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        digests, listed = hash_bold_inputs(self, self._make_recipe()), self._find_list()
        return digests if listed is None else {**digests, _LIST: hash_file(listed)}

    def open_bold(self) -> BoldSource:
        """Return the data set as lazy runs; see `prepare_bold`."""
        return prepare_bold(self, self._make_recipe())

    def check(self) -> list[Finding]:
        """Open every header and table, and pair events with pictures."""
        return check_bold(self, self._make_recipe())

    def _make_recipe(self) -> Recipe:
        notes = {"protocol": "test: the 113 repeated pictures"}
        return Recipe("bold5000", {"task": ("5000scenes",)}, read_scene_events, self._finish, notes)

    def _find_list(self) -> Path | None:
        root = check_root(self.root, read_manifest("bold5000"))
        return next((root / p / _LIST for p in _LIST_PLACES if (root / p / _LIST).is_file()), None)

    def _finish(self, trials: pd.DataFrame) -> pd.DataFrame:
        """Make a picture a test picture throughout if it is one anywhere."""
        tested = set(trials.loc[trials["split"] == "test", "stimulus_id"])
        listed = self._find_list()
        if listed is not None:
            names = {make_stimulus_id(line) for line in listed.read_text().splitlines() if line.strip()}
            outside = sorted(tested - names)
            if outside:
                raise DataError(
                    f"{len(outside)} pictures of the kind rep_* are not in {listed.name}, first {outside[0]}; "
                    "list and events are of different releases."
                )
            tested |= names
        trials = trials.assign(split=np.where(trials["stimulus_id"].isin(tested), "test", "train"))
        check_no_overlap(trials, title="BOLD5000")
        return trials


def read_scene_events(table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
    """Return the trials of one run."""
    assert run.events is not None
    check_columns(table.columns, ("ImgName", "ImgType"), what=f"the events table {run.events}")
    kinds = table["ImgType"].str.lower().str.removeprefix("rep_")
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise DataError(
            f"{run.events} has pictures of the kind {unknown[0]!r}; {', '.join(_KINDS)} are known."
        )
    names = table["ImgName"]
    if "stim_file" in table.columns:
        # The two columns repeat each other; where they differ, the events are not those of the release.
        differ = (names.map(make_stimulus_id) != table["stim_file"].map(make_stimulus_id)) & (
            table["stim_file"] != ""
        )
        if differ.any():
            row = int(np.flatnonzero(differ)[0])
            raise DataError(
                f"{run.events} names {names.iloc[row]!r} and {table['stim_file'].iloc[row]!r} in row {row + 2}; "
                "fetch the table again."
            )
    ids = names.map(make_stimulus_id)
    return pd.DataFrame(
        {
            "onset": read_seconds(table, "onset", run.events),
            "duration": read_seconds(table, "duration", run.events),
            "stimulus_id": ids,
            "concept": [find_concept(name, kind) for name, kind in zip(ids, kinds, strict=True)],
            "path": names,
            "split": np.where(table["ImgType"].str.lower().str.startswith("rep_"), "test", "train"),
            "trial_type": kinds,
            "image_type": kinds,
        }
    )


def find_concept(name: str, kind: str) -> str:
    """Return the concept of a picture.

    Examples
    --------
    >>> find_concept("n01641577_1229", "imagenet"), find_concept("concert5", "scenes")
    ('n01641577', 'concert')
    >>> find_concept("COCO_train2014_000000113449", "coco")
    'COCO_train2014_000000113449'
    """
    if kind == "imagenet":
        return name.split("_", 1)[0]
    return re.sub(r"_?\d+$", "", name) or name if kind == "scenes" else name
