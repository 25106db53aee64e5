"""The volume betas of THINGS-fMRI: one file per run with a beta per trial, catch trials among them.

Owns the pairing of volumes with ``*_conditions.tsv`` and what a file name says of a trial. The conditions do not say
which images are test images: those are shown in every session, training images in one. Where one session is at hand,
the number in the name tells, since training images are the first twelve of their concept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns, check_file
from braindecode_vis.datasets.bids.fmri_files import parse_entities
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes
from braindecode_vis.datasets.things_fmri.betas_table import find_concept

_CATCH = re.compile(r"^catch", re.IGNORECASE)
_NUMBER = re.compile(r"_(\d+)[a-z]*$")
N_TRAINING_EXEMPLARS = 12


def read_volume_runs(folder: Path, subject: str) -> dict[Path, pd.DataFrame]:
    """Return the trials of every run of a person, in the order of the volumes.

    Returns
    -------
    runs
        File of betas to a table like that of all trials, with `column` (number of the volume). Catch trials have an
        empty `stimulus_id`.

    Raises
    ------
    DataError
        If there is no run, or one lacks its conditions.
    """
    paths = sorted(folder.rglob("*_betas.nii.gz")) or sorted(folder.rglob("*_betas.nii"))
    if not paths:
        raise DataError(f"{folder} holds no *_betas.nii.gz; fetch the volumes of subject {subject} again.")
    runs = {path: _read_conditions(path, subject) for path in paths}
    tested = find_tested(pd.concat(list(runs.values()), ignore_index=True))
    for table in runs.values():
        table["split"] = np.where(table["stimulus_id"].isin(tested), "test", "train")
    return runs


def name_conditions(path: Path) -> Path:
    """Return the conditions that belong to a file of betas."""
    return path.with_name(re.sub(r"betas\.nii(\.gz)?$", "conditions.tsv", path.name))


def _read_conditions(path: Path, subject: str) -> pd.DataFrame:
    conditions = check_file(
        name_conditions(path), what=f"the conditions of {path.name}", hint="fetch them with the betas"
    )
    table = pd.read_csv(conditions, sep="\t", dtype=str, keep_default_na=False)
    check_columns(table.columns, ("image_filename",), what=str(conditions))
    entities = parse_entities(path.name)
    digits = re.sub(r"\D", "", entities.get("ses", ""))
    if not digits or "run" not in entities:
        raise DataError(f"{path.name} does not say its session and run; restore the published name.")
    names = table["image_filename"].str.replace(r"^.*[/\\]", "", regex=True)
    names = names.str.replace(r"\.[A-Za-z]+$", "", regex=True)
    ids = names.where(~names.str.match(_CATCH), "")
    return pd.DataFrame(
        {
            "subject": subject, "session": f"{int(digits):02d}", "run": f"{int(entities['run']):02d}",
            "stimulus_id": ids, "repetition": 0, "split": "train", "concept": ids.map(find_concept),
            "column": np.arange(len(ids)),
        }
    )  # fmt: skip


def find_tested(trials: pd.DataFrame) -> set[str]:
    """Return the test images among the trials of one person."""
    shown = trials[trials["stimulus_id"] != ""]
    if shown["session"].nunique() > 1:
        counts = shown.groupby("stimulus_id")["session"].nunique()
        return set(counts.index[counts > 1])
    numbers = {name: match for name in shown["stimulus_id"] if (match := _NUMBER.search(name))}
    return {name for name, match in numbers.items() if int(match[1]) > N_TRAINING_EXEMPLARS}


@dataclass(frozen=True)
class VolumeReader:
    """Reads the volumes of a run that are trials, and passes over the catch trials between them.

    Parameters
    ----------
    volumes
        The file, through the mask.
    columns
        Volumes to return, ascending.
    """

    volumes: MaskedVolumes
    columns: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return trials as float32 of shape (stop - start, n_voxels)."""
        out = np.empty((stop - start, self.volumes.n_voxels), np.float32)
        for row, column in enumerate(self.columns[start:stop].tolist()):
            out[row] = self.volumes(column, column + 1)[0]
        if stop == len(self.columns):
            self.volumes.close()
        return out
