"""The experimental design of NSD: which image every trial showed.

Owns ``nsd_expdesign.mat`` and its cross-check with ``responses.tsv``. Everything in both files counts from 1; the names
of images follow the authors' own (``nsd02951`` is 73KID 2951), and `nsd_id` is the row of the stimulus archive, from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns, check_file

SESSIONS = (40, 40, 32, 30, 40, 32, 40, 30)
"""Sessions that each of the eight subjects completed."""
DESIGN_FILE = Path("nsddata/experiments/nsd/nsd_expdesign.mat")
_KEYS = ("masterordering", "subjectim", "sharedix", "stimpattern")


@dataclass(frozen=True)
class NsdDesign:
    """What was shown when, counted from 1 as in the file.

    Parameters
    ----------
    order : integer array of shape (n_sessions, n_trials_per_session)
        Column of `images` of each trial.
    images : integer array of shape (n_subjects, n_images)
        73KID of each image of a subject.
    shared : integer array of shape (n_shared,)
        73KID of the images that all subjects saw; they are the first columns of `images`.
    runs : integer array of shape (n_sessions, n_trials_per_session)
        Run of each trial.
    path
        The file, for messages.
    """

    order: np.ndarray
    images: np.ndarray
    shared: np.ndarray
    runs: np.ndarray
    path: Path

    @property
    def n_sessions(self) -> int:
        """Sessions that were planned."""
        return self.order.shape[0]

    @property
    def n_per_session(self) -> int:
        """Trials of a session."""
        return self.order.shape[1]

    def find_sessions(self, subject: int) -> int:
        """Return how many sessions a subject completed."""
        return min(SESSIONS[subject - 1], self.n_sessions)

    def count_showings(self, n_sessions: int) -> np.ndarray:
        """Return how often each column was shown in the first sessions, shape (n_images,)."""
        return np.bincount(self.order[:n_sessions].ravel(), minlength=self.images.shape[1] + 1)[1:]


def find_design(root: Path) -> Path:
    """Return ``nsd_expdesign.mat`` in its place below the root, or beside the root's files."""
    places = [root / DESIGN_FILE, root / DESIGN_FILE.name]
    return check_file(
        next((path for path in places if path.is_file()), places[0]),
        what="the experimental design of NSD",
        hint="fetch nsddata/experiments/nsd/nsd_expdesign.mat from the bucket",
    )


def read_design(path: Path) -> NsdDesign:
    """Read ``nsd_expdesign.mat``.

    Raises
    ------
    DataError
        If the file is damaged, counts from 0, or contradicts itself.
    """
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path)
    except Exception as error:  # scipy raises whatever the damaged bytes lead it to
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({error}); copy or fetch it again."
        ) from error
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise DataError(f"{path} lacks the variable(s) {', '.join(missing)}; it is not nsd_expdesign.mat.")
    order = content["masterordering"].ravel().astype(np.int64)
    images, shared = content["subjectim"].astype(np.int64), content["sharedix"].ravel().astype(np.int64)
    for name, values in (("masterordering", order), ("subjectim", images), ("sharedix", shared)):
        if values.min() < 1:
            raise DataError(
                f"{name} in {path} counts from {values.min()}: the published file counts from 1, so this copy "
                "was shifted; fetch the original."
            )
    if order.max() > images.shape[1]:
        raise DataError(f"{path} shows image {order.max()} of a subject, but lists {images.shape[1]}.")
    if not (images[:, : len(shared)] == shared).all():
        raise DataError(f"the first {len(shared)} columns of subjectim in {path} are not the shared images.")
    counts = content["stimpattern"].sum(axis=2, dtype=np.int64)
    if (counts.sum(axis=1) * len(counts) != len(order)).any():
        raise DataError(
            f"stimpattern in {path} has {counts.sum()} pictures in {len(counts)} sessions, but masterordering has "
            f"{len(order)} trials."
        )
    runs = np.stack([np.repeat(np.arange(1, counts.shape[1] + 1), row) for row in counts])
    return NsdDesign(order.reshape(len(counts), -1), images, shared, runs, path)


def name_image(number: int) -> str:
    """Return the stimulus id of a 73KID, which counts from 1.

    Examples
    --------
    >>> name_image(2951)
    'nsd02951'
    """
    return f"nsd{number:05d}"


def make_trials(design: NsdDesign, subject: int, session: int) -> pd.DataFrame:
    """Return the trials of one session; subject and session count from 1.

    Returns
    -------
    DataFrame
        The columns of a trial table, `nsd_id` (row of the stimulus archive, from 0), and `trial` (number in the whole
        experiment, from 1). Shared images are the test split. `repetition` is 0 until sessions are joined.
    """
    columns = design.order[session - 1]
    images = design.images[subject - 1, columns - 1]
    ids = [name_image(image) for image in images]
    return pd.DataFrame(
        {
            "subject": f"{subject:02d}",
            "session": f"{session:02d}",
            "run": [f"{run:02d}" for run in design.runs[session - 1]],
            "stimulus_id": ids,
            "repetition": 0,
            "split": np.where(columns <= len(design.shared), "test", "train"),
            "concept": ids,  # a scene has no single concept: every image stands for itself
            "nsd_id": images - 1,
            "trial": np.arange(1, len(ids) + 1) + (session - 1) * design.n_per_session,
        }
    )


def check_behaviour(root: Path, design: NsdDesign, subject: int, sessions: Sequence[int]) -> bool:
    """Compare ``responses.tsv`` with the design; return False if the file is not there.

    Raises
    ------
    DataError
        If it lists other trials, or its image numbers count from 0.
    """
    path = root / f"nsddata/ppdata/subj{subject:02d}/behav/responses.tsv"
    if not path.is_file():
        return False
    table = pd.read_csv(path, sep="\t")
    check_columns(table.columns, ("SESSION", "RUN", "73KID"), what=str(path))
    for session in sessions:
        rows = table[table["SESSION"] == session]
        expected = design.images[subject - 1, design.order[session - 1] - 1]
        if len(rows) != len(expected):
            raise DataError(
                f"session {session:02d} of subject {subject:02d} has {len(rows)} trials in {path}, but "
                f"{len(expected)} in {design.path}: one of the two is truncated or of another release."
            )
        found = rows["73KID"].to_numpy()
        if (found == expected - 1).all():
            raise DataError(
                f"73KID in {path} counts from 0: all of session {session:02d} are one below the design; the published "
                "file counts from 1, fetch the original."
            )
        wrong = np.flatnonzero((found != expected) | (rows["RUN"].to_numpy() != design.runs[session - 1]))
        if len(wrong):
            row = wrong[0]
            raise DataError(
                f"{path} and {design.path} disagree in {len(wrong)} trials of session {session:02d}, first in trial "
                f"{row + 1}: 73KID {found[row]} in run {rows['RUN'].iloc[row]} against {expected[row]} in run "
                f"{design.runs[session - 1][row]}; subject {subject:02d} may be another one."
            )
    return True


def describe_protocol(trials: Sequence[pd.DataFrame], n_shared: int) -> str:
    """Return one sentence that names the split: sessions, training images, and how many shared images are tested."""
    joined = pd.concat(trials, ignore_index=True)
    is_test = joined["split"] == "test"
    showings = joined.loc[is_test, "stimulus_id"].value_counts()
    n_sessions = joined["session"].nunique()
    return (
        f"NSD subject {joined['subject'].iloc[0]}, {n_sessions} sessions ({joined['session'].iloc[0]} to "
        f"{joined['session'].iloc[-1]}): {len(showings)} of {n_shared} shared images are the test set "
        f"({int((showings == 3).sum())} of them shown three times), {joined.loc[~is_test, 'stimulus_id'].nunique()} "
        f"other images in {int((~is_test).sum())} trials are the training set"
    )
