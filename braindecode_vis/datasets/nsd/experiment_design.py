"""The experimental design of NSD: the image of every trial, and the 73,000 images.

Owns ``nsd_expdesign.mat`` and its cross-check with ``responses.tsv``. Both files count from 1; the names of images are
those of the authors (``nsd02951`` is 73KID 2951), and `nsd_id` is the row of the stimulus archive, from 0:
``nsd_stimuli.hdf5``, 39.6 GB, from which only single images are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import DataError, check_file, is_there, refuse_damage
from braindecode_vis.base.remote import open_hdf5
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.layout import Array, File, Layout

if TYPE_CHECKING:
    import pandas as pd

SESSIONS = (40, 40, 32, 30, 40, 32, 40, 30)
"""Sessions that each of the eight subjects completed."""
LAYOUT = Layout(
    design=File(
        "nsddata/experiments/nsd/nsd_expdesign.mat",
        "mat5",
        what="the experimental design of NSD",
        hint="fetch nsddata/experiments/nsd/nsd_expdesign.mat from the bucket",
        arrays={
            "masterordering": Array(("trial",), "uint16"),
            # Images shown once, twice and three times in a session; the phantom writes it, no reader needs it.
            "basiccnt": Array(("times", "session"), "uint16", optional=True),
            "sharedix": Array(("shared_image",), "int32"),
            "subjectim": Array(("subject", "image"), "int32"),
            "stimpattern": Array(("session", "run", "slot"), "uint8"),
        },
    ),
    # Written only by the phantom.
    images=File(
        "nsddata/experiments/nsd/nsd_stim_info_merged.csv",
        "csv",
        "the list of images of NSD",
        "fetch it again",
    ),
    # Optional.
    behaviour=File(
        "nsddata/ppdata/subj{subject:02d}/behav/responses.tsv",
        "tsv",
        what="the behaviour of a subject of NSD",
        hint="fetch it again, or move it away",
        columns=("SESSION", "RUN", "73KID"),
    ),
)
DESIGN_FILE = Path(LAYOUT.files["design"].path)


@dataclass(frozen=True)
class NsdDesign:
    """Images in the order of presentation, counted from 1 as in the file.

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
        """Number of planned sessions."""
        return self.order.shape[0]

    @property
    def n_per_session(self) -> int:
        """Trials of a session."""
        return self.order.shape[1]

    def find_sessions(self, subject: int) -> int:
        """Return the number of sessions that a subject completed."""
        return min(SESSIONS[subject - 1], self.n_sessions)

    def count_showings(self, n_sessions: int) -> np.ndarray:
        """Return the number of presentations of each column in the first sessions, shape (n_images,)."""
        return np.bincount(self.order[:n_sessions].ravel(), minlength=self.images.shape[1] + 1)[1:]


def find_design(root: Path) -> Path:
    """Return ``nsd_expdesign.mat`` at its usual place below the root, or beside the root's files."""
    beside = root / DESIGN_FILE.name
    return beside if not is_there(root / DESIGN_FILE) and is_there(beside) else LAYOUT.find(root, "design")


def read_design(path: Path) -> NsdDesign:
    """Read ``nsd_expdesign.mat``.

    Raises
    ------
    DataError
        If the file is damaged, counts from 0, or contradicts itself.
    """
    with LAYOUT.open(path, "design") as file:
        order, images, shared = (
            file.read(key).astype(np.int64) for key in ("masterordering", "subjectim", "sharedix")
        )
        pattern = file.read("stimpattern")
    for name, values in (("masterordering", order), ("subjectim", images), ("sharedix", shared)):
        if values.min() < 1:
            raise DataError(
                f"{name} in {path} counts from {values.min()}: the published file counts from 1, so this copy "
                "was shifted; fetch the original."
            )
    # masterordering counts columns of subjectim, whose images differ between subjects.
    if order.max() > images.shape[1]:
        raise DataError(f"{path} shows image {order.max()} of a subject, but lists {images.shape[1]}.")
    # The column determines the split: shared images come first in all subjects.
    if not (images[:, : len(shared)] == shared).all():
        raise DataError(f"the first {len(shared)} columns of subjectim in {path} are not the shared images.")
    # (n_sessions, n_runs, n_slots) -> pictures in each run, (n_sessions, n_runs)
    counts = pattern.sum(axis=2, dtype=np.int64)
    if (counts.sum(axis=1) * len(counts) != len(order)).any():
        raise DataError(
            f"stimpattern in {path} has {counts.sum()} pictures in {len(counts)} sessions, but masterordering has "
            f"{len(order)} trials."
        )
    # Odd runs have 63 pictures and even ones 62, so the pattern determines the runs.
    runs = np.stack([np.repeat(np.arange(1, counts.shape[1] + 1), row) for row in counts])
    return NsdDesign(order.reshape(len(counts), -1), images, shared, runs, path)


def name_image(number: int) -> str:
    """Return the stimulus id of a 73KID (counted from 1).

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
    import pandas as pd

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
    """Compare ``responses.tsv`` with the design; return False if the file does not exist.

    Raises
    ------
    DataError
        If it lists other trials, or its image numbers count from 0.
    """
    path = LAYOUT.place(root, "behaviour", subject=subject)
    if not (path.exists() or path.is_symlink()):
        return False
    table = LAYOUT.read_table(LAYOUT.find(root, "behaviour", subject=subject), "behaviour")
    for session in sessions:
        rows = table[table["SESSION"] == session]
        # Both count from 1.
        expected = design.images[subject - 1, design.order[session - 1] - 1]
        if len(rows) != len(expected):
            raise DataError(
                f"session {session:02d} of subject {subject:02d} has {len(rows)} trials in {path}, but "
                f"{len(expected)} in {design.path}: one of the two is truncated or of another release."
            )
        found = rows["73KID"].to_numpy()
        # Other copies count from 0, and every id would then be the neighbour's id.
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
    """Return one sentence that describes the split: sessions, training images, and number of shared test images."""
    import pandas as pd

    joined = pd.concat(trials, ignore_index=True)
    is_test = joined["split"] == "test"
    showings = joined.loc[is_test, "stimulus_id"].value_counts()
    sessions = joined["session"].unique().tolist()
    return (
        f"NSD subject {joined['subject'].iloc[0]}, {len(sessions)} session{'s' * (len(sessions) > 1)} "
        f"({_name_sessions(sessions)}): {len(showings)} of {n_shared} shared images are the test set "
        f"({int((showings == 3).sum())} of them shown three times), {joined.loc[~is_test, 'stimulus_id'].nunique()} "
        f"other images in {int((~is_test).sum())} trials are the training set"
    )


def _name_sessions(sessions: Sequence[str]) -> str:
    """Return ``01 to 37`` for consecutive sessions, otherwise the list of all."""
    numbers = [int(session) for session in sessions]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{sessions[0]} to {sessions[-1]}"
    return ", ".join(map(str, numbers))


IMAGES_FILE, BRICK = Path("nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"), "imgBrick"
"""The archive of all images, and the array in it."""


def find_images_file(root: Path, images: Path | None) -> Path:
    """Return ``nsd_stimuli.hdf5``, at the user's place or at its usual place below the root.

    Raises
    ------
    DataError
        If it does not exist.
    """
    if images is not None:
        path = images.expanduser()
        path = path / IMAGES_FILE.name if path.is_dir() else path
    else:
        places = [root / IMAGES_FILE, root / IMAGES_FILE.name]
        path = next((place for place in places if is_there(place)), places[0])
    return check_file(
        path,
        what="the image file of NSD",
        hint="fetch it (39.6 GB), name it with --set dataset.images=FILE, or leave the images out with "
        "--set dataset.with_images=false",
    )


class ImageBrick:
    """Reads single images of ``imgBrick``, optionally at a smaller size.

    Parameters
    ----------
    path
        The HDF5 file.
    rows
        Row in the brick of each image that will be requested, from 0.
    size
        Width and height in pixels; as published by default.

    Raises
    ------
    DataError
        If the file holds no such array, or too few images.
    """

    def __init__(self, path: Path, rows: np.ndarray, size: int | None = None) -> None:
        self.path, self.rows, self.size = path, rows, size
        self.file: Any = None
        with (
            refuse_damage(
                f"{path} holds no readable imgBrick",
                OSError,
                KeyError,
                hint="it is truncated or another file, fetch it again",
            ),
            open_hdf5(path) as file,
        ):
            brick = file[BRICK]
            shape, dtype = brick.shape, brick.dtype
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
            raise DataError(
                f"imgBrick of {path} is {dtype} of shape {shape}; uint8 (73000, 425, 425, 3) is published."
            )
        # Checked now, and not after hours of reading betas.
        if rows.max() >= shape[0]:
            raise DataError(
                f"the trials name image {rows.max()} (counted from 0), but {path} holds {shape[0]}: the file is "
                "truncated, or the image numbers were counted from 1."
            )
        self.n_images = int(shape[0])

    def read(self, number: int) -> np.ndarray:
        """Return image `number` of the brick (from 0) unchanged."""
        if self.file is None:
            self.file = open_hdf5(self.path)
        return np.asarray(self.file[BRICK][number])

    def __call__(self, row: int) -> np.ndarray:
        """Return one image as uint8 of shape (height, width, 3)."""
        image = self.read(int(self.rows[row]))
        # This is the last image of a pass; the next pass opens the file again.
        if row == len(self.rows) - 1:
            self.close()
        if self.size is None or image.shape[:2] == (self.size, self.size):
            return image
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.LANCZOS))

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        if self.file is not None:
            self.file.close()
        self.file = None


def make_stimuli(trials: pd.DataFrame) -> StimulusSet:
    """Return the images of the trials, in the order of `nsd_id`; hashes are added when they are copied."""
    shown = trials.drop_duplicates("stimulus_id").sort_values("nsd_id")
    table = shown[["stimulus_id", "concept", "split", "nsd_id"]].reset_index(drop=True)
    return StimulusSet(table.assign(path=IMAGES_FILE.name, sha256=""))


def open_images(
    stimuli: StimulusSet, root: Path, images: Path | None, size: int | None
) -> Callable[[int], np.ndarray]:
    """Return the reader of the images of a stimulus set."""
    return ImageBrick(find_images_file(root, images), stimuli.table["nsd_id"].to_numpy(), size)
