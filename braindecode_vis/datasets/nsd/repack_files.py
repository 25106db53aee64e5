"""Copies of NSD that other groups shared: the web datasets of MindEye1 and MindEye2, and Brain-Diffuser's arrays.

Web datasets are plain tars; the members of one sample share the first part of their name. Owns their index: tar and
position of each sample. Small members are read on opening, responses and images on request, by their position in the
file; nothing is unpacked.

Brain-Diffuser has one array of mean responses for training and one for testing, without names of images. Their rows are
in the order in which the images first appeared, so the experimental design is needed to find the image of each row; the
number of rows must agree with it.
"""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.nsd.beta_files import check_scale, read_sample
from braindecode_vis.datasets.nsd.experiment_design import NsdDesign, find_design, name_image, read_design
from braindecode_vis.datasets.sources.betas_source import BetasPart, count_repetitions
from braindecode_vis.datasets.sources.file_damage import check_tar_end
from braindecode_vis.datasets.sources.safe_pickle import FileArray, open_npy

if TYPE_CHECKING:
    import pandas as pd


# Members of a sample in the tars of MindEye1, and of MindEye2.
RESPONSES, IMAGE, COUNT, TRIALS = "nsdgeneral.npy", "coco73k.npy", "num_uniques.npy", "trial.npy"
# Two of its columns: the picture and the trial in the whole experiment, both from 0.
BEHAVIOUR, BEHAVIOUR_COLUMNS = "behav.npy", [0, 5]
MINDEYE1_FOLDER, MINDEYE2_FOLDER = "webdataset_avg_split", "wds"
_FETCH = "fetch it again"
LAYOUT = Layout(
    # MindEye2
    betas=File(
        "betas_all_subj{subject:02d}_fp32_renorm.hdf5", "hdf5", "the betas of MindEye2", _FETCH,
        {"betas": Array(("trial", "voxel"), "float32")},
    ),
    images=File(
        "coco_images_224_float16.hdf5", "hdf5", "the images of MindEye2", _FETCH,
        {"images": Array(("image", "colour", "row", "column"), "float16")},
    ),
    # Brain-Diffuser
    means=File(
        "nsd_{split}_fmriavg_nsdgeneral_sub{subject}.npy", "npy", "the mean responses of Brain-Diffuser", _FETCH,
        {"means": Array(("image", "voxel"))},
    ),
    pixels=File(
        "nsd_{split}_stim_sub{subject}.npy", "npy", "the images of Brain-Diffuser", _FETCH,
        {"pixels": Array(("image", "row", "column", "colour"), "uint8")},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Repack:
    """Content of one layout.

    Parameters
    ----------
    parts
        Lazy responses.
    image_of : mapping of `nsd_id` (from 0) to a function without arguments
        Pixels of each existing image, uint8 (height, width, 3).
    files
        All files that are read.
    notes
        Earlier processing of the responses.
    """

    parts: list[BetasPart]
    image_of: dict[int, Callable[[], np.ndarray]]
    files: list[Path]
    notes: dict[str, Any] = field(default_factory=dict)


def make_trials(
    subject: int, nsd_ids: np.ndarray, split: str | np.ndarray, *, session: str | np.ndarray, run: str = "01"
) -> pd.DataFrame:
    """Return trials of a copy; `nsd_ids` count from 0, as all of these copies do."""
    import pandas as pd

    ids = [name_image(int(i) + 1) for i in nsd_ids]
    return pd.DataFrame(
        {
            "subject": f"{subject:02d}", "session": session, "run": run, "stimulus_id": ids, "repetition": 0,
            "split": split, "concept": ids, "nsd_id": np.asarray(nsd_ids, int),
        }
    )  # fmt: skip


# Allen et al. (2022): twelve runs of 62 or 63 pictures.
_TRIALS_PER_SESSION = 750
_SPLIT_OF = {"train": "train", "val": "train", "test": "test"}


@dataclass(frozen=True)
class Member:
    """A file inside a tar, by its position."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise DataError(f"{self.path} ends in the middle of a member; copy or fetch it again.")
        return content

    def read_array(self) -> np.ndarray:
        """Return it as an array."""
        with refuse_damage(
            f"a member of {self.path} is not a plain .npy file", ValueError, hint="fetch the tar again"
        ):
            return np.load(io.BytesIO(self.read()), allow_pickle=False)

    def read_image(self) -> np.ndarray:
        """Return it as uint8 of shape (height, width, 3)."""
        from PIL import Image

        with (
            refuse_damage(f"a picture of {self.path} is damaged", hint="fetch the tar again"),
            Image.open(io.BytesIO(self.read())) as image,
        ):
            return np.asarray(image.convert("RGB"))


def iterate_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the samples of a tar: their name, and their members by ending (``jpg``, ``nsdgeneral.npy``...).

    Raises
    ------
    DataError
        If the tar is truncated.
    """
    samples: dict[str, dict[str, Member]] = defaultdict(dict)
    with refuse_damage(f"{path} cannot be read as a tar", tarfile.TarError), tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    check_tar_end(path, members)
    for info in members:
        if info.isfile():
            folder, _, name = info.name.rpartition("/")
            key, _, end = name.partition(".")
            samples[f"{folder}/{key}"][end] = Member(path, info.offset_data, info.size)
    yield from samples.items()


def find_tars(folder: Path) -> list[Path]:
    """Return the tars below a folder, ``10.tar`` after ``9.tar``."""
    return sorted(folder.glob("**/*.tar"), key=lambda path: (path.parent, len(path.name), path.name))


# --- MindEye1 ---------------------------------------------------------------------------------------------


def open_mindeye1(root: Path, subject: int, divide_by: float) -> Repack:
    """Return the samples of ``train``, ``val`` and ``test``, one image each with up to three repetitions.

    In the first release, the folder ``val`` holds the test tars again: it is left out if all of its images are test
    images, and counts as training otherwise.

    Raises
    ------
    DataError
        If a part is missing, a sample is incomplete, or another subject is in the same folder.
    """
    places = (root, root / MINDEYE1_FOLDER, root / f"subj{subject:02d}")
    base = next((p for p in places if (p / "train").is_dir() and (p / "test").is_dir()), None)
    if base is None:
        raise DataError(f"{root} holds no folders train and test; pass webdataset_avg_split as --root.")
    tables: dict[str, list[tuple[Path, list[_Sample]]]] = {}
    for name in _SPLIT_OF:
        # If tars of several subjects are in one folder, their names contain ``subj01``.
        tars = [p for p in find_tars(base / name) if "subj" not in p.name or f"subj{subject:02d}" in p.name]
        tables[name] = [(path, [_read_sample(path, *s) for s in iterate_samples(path)]) for path in tars]
    for name in ("train", "test"):
        if not tables[name]:
            raise DataError(
                f"no tar of subject {subject:02d} is in {base / name}; fetch that part of the copy."
            )
    notes = {
        "layout": "MindEye1",
        "standardised": "z-scored per session by its authors, test images included",
    }
    tested = {sample.nsd_id for _, samples in tables["test"] for sample in samples}
    validated = {sample.nsd_id for _, samples in tables["val"] for sample in samples}
    if validated and validated <= tested:
        notes["left_out"] = f"folder val: its {len(validated)} images are all test images"
        tables["val"] = []
    elif validated & tested:
        raise DataError(
            f"{len(validated & tested)} of {len(validated)} images of {base / 'val'} are test images: the folder "
            "mixes the two; remove it, or fetch it again."
        )
    image_of: dict[int, Callable[[], np.ndarray]] = {}
    parts, files = [], []
    for name, split in _SPLIT_OF.items():
        for path, samples in tables[name]:
            files.append(path)
            rows = [(sample, row) for sample in samples for row in range(sample.n_repetitions)]
            trials = make_trials(
                subject,
                np.array([s.nsd_id for s, _ in rows]),
                split,
                session="all",
                run=f"{name}-{path.stem}",
            ).assign(repetition=[row for _, row in rows], trial=[s.trials[row] for s, row in rows])
            read = partial(_read_repetitions, rows, divide_by)
            first = read(0, 1)
            check_scale(read_sample(read, len(trials)), divide_by, path)
            parts.append(BetasPart(trials, (path,), first.shape[1], read))
            image_of |= {s.nsd_id: s.image.read_image for s in samples if s.image is not None}
    return Repack(parts, image_of, files, notes)


@dataclass(frozen=True)
class _Sample:
    """One image of MindEye1."""

    nsd_id: int
    n_repetitions: int
    trials: tuple[int, ...]
    responses: Member
    image: Member | None


def _read_sample(path: Path, name: str, members: dict[str, Member]) -> _Sample:
    missing = [end for end in (RESPONSES, IMAGE) if end not in members]
    if missing:
        raise DataError(
            f"sample {name.strip('/')} of {path} is missing {', '.join(missing)}; it is not of MindEye1."
        )
    number = int(members[IMAGE].read_array().ravel()[0])
    trials = members[TRIALS].read_array().ravel() if TRIALS in members else None
    n = None
    if COUNT in members:
        n = int(members[COUNT].read_array().ravel()[0])
    elif trials is not None:
        n = len(np.unique(trials))
    if n is None:
        raise DataError(
            f"sample {name.strip('/')} of {path} has neither num_uniques.npy nor trial.npy: how many of its "
            "responses are copies is unknown."
        )
    # An image seen fewer than three times is padded with copies of a response with the same trial number.
    kept = np.arange(n) if trials is None else np.sort(np.unique(trials, return_index=True)[1])
    if len(kept) != n or (trials is not None and kept[-1] != n - 1):
        raise DataError(
            f"sample {name.strip('/')} of {path} has {n} different responses in its metadata, but its trials are "
            f"{trials.tolist() if trials is not None else []}."
        )
    named = tuple(int(t) for t in trials[:n]) if trials is not None else tuple([-1] * n)
    return _Sample(number, n, named, members[RESPONSES], members.get("jpg", members.get("png")))


def _read_repetitions(rows: list[tuple[_Sample, int]], divide_by: float, start: int, stop: int) -> np.ndarray:
    """Return single responses from the samples of a tar."""
    out = []
    member, block = None, np.empty((0, 0))
    for sample, row in rows[start:stop]:
        # Rows of one image are consecutive, and its responses are one small array.
        if sample.responses is not member:
            member, block = sample.responses, np.atleast_2d(np.squeeze(sample.responses.read_array()))
        if row >= len(block):
            raise DataError(f"a sample of {member.path} has {len(block)} responses, but counts {row + 1}.")
        out.append(block[row])
    return np.stack(out).astype(np.float32) / np.float32(divide_by)


# --- MindEye2 ---------------------------------------------------------------------------------------------


def open_mindeye2(root: Path, subject: int, test_set: str, divide_by: float) -> Repack:
    """Return the trials that the tars list, session by session; responses and images are in two HDF5 files.

    Copies made with the notebook of its authors (``betas_subj01.hdf5``, ``mindeyev2_wds``) are read like the shared one
    (``betas_all_subj01_fp32_renorm.hdf5``, ``wds``).

    Raises
    ------
    DataError
        If a file is missing, or the tars list trials or images that do not exist.
    """
    import pandas as pd

    who = f"subj{subject:02d}"
    found = [*sorted(root.glob(f"betas_all_{who}*.hdf5")), *sorted(root.glob(f"betas_{who}*.hdf5"))]
    if not found:
        raise DataError(
            f"neither {LAYOUT.place(Path(), 'betas', subject=subject)} (as shared) nor betas_{who}.hdf5 (as the "
            f"authors' notebook writes it) is in {root}; fetch it, or copy it there."
        )
    betas = found[0]
    places = [root / place / who for place in (MINDEYE2_FOLDER, "mindeyev2_wds")]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(
            f"{betas.name} is in {root}, but neither wds/{who} nor mindeyev2_wds/{who}, whose tars list "
            "the image of each trial; fetch that folder, or move it there."
        )
    # Only the tars list training and test trials; the betas hold all of them.
    frames, files = [], [betas]
    for name, split in (("train", "train"), (test_set, "test")):
        tars = find_tars(folder / name)
        if not tars:
            others = [other for other in ("test", "new_test") if find_tars(folder / other)]
            instead = f"use the one that is there with --set dataset.test_set={others[0]}" if others else ""
            raise DataError(
                f"no tar is in {folder / name}; fetch it"
                + (f", or {instead}." if split == "test" and others else ".")
            )
        for path in tars:
            files.append(path)
            frames.append(_read_behaviour(path).assign(split=split))
    table = pd.concat(frames, ignore_index=True).sort_values("trial", kind="stable", ignore_index=True)
    again = table.loc[table["trial"].duplicated(), "trial"]
    if len(again):
        raise DataError(
            f"the tars below {folder} name trial {again.iloc[0]} more than once; fetch them again."
        )
    with LAYOUT.open(betas, "betas") as file:
        shape = tuple(file.measure("betas").values())
    if table["trial"].max() >= shape[0]:
        raise DataError(
            f"the tars below {folder} name trial {table['trial'].max()}, but {betas} has {shape[0]} rows."
        )
    table["session"] = table["trial"] // _TRIALS_PER_SESSION + 1
    groups = [group for _, group in table.groupby("session")]
    trials = count_repetitions(
        [
            make_trials(
                subject, g["nsd_id"].to_numpy(), g["split"].to_numpy(), session=f"{g['session'].iloc[0]:02d}"
            ).assign(trial=g["trial"].to_numpy())
            for g in groups
        ]
    )
    parts = []
    for group, own in zip(groups, trials, strict=True):
        read = partial(_read_hdf5, betas, group["trial"].to_numpy(), divide_by)
        check_scale(read_sample(read, len(own)), divide_by, betas)
        parts.append(BetasPart(own, (betas,), int(shape[1]), read))
    image_of: dict[int, Callable[[], np.ndarray]] = {}
    images = next(iter(sorted(root.glob("coco_images_224*.hdf5"))), None)
    if images is not None:
        files.append(images)
        image_of = {int(i): partial(_read_coco_image, images, int(i)) for i in table["nsd_id"].unique()}
    # The notebook averages nothing and standardises over all trials of a session, as in the shared copy.
    by = "its authors" if betas.name.startswith("betas_all_") else "the authors' notebook"
    notes = {
        "layout": "MindEye2",
        "standardised": f"z-scored per session by {by}, shared images included (by their notebook)",
        "test_set": test_set,
    }
    return Repack(parts, image_of, files, notes)


def _read_behaviour(path: Path) -> pd.DataFrame:
    """Return image and trial of each sample, both counted from 0."""
    import pandas as pd

    rows = []
    for name, members in iterate_samples(path):
        if BEHAVIOUR not in members:
            raise DataError(
                f"sample {name.strip('/')} of {path} is missing behav.npy; it is not of MindEye2."
            )
        values = np.atleast_2d(members[BEHAVIOUR].read_array())
        if values.ndim != 2 or values.shape[1] < 6:
            raise DataError(f"behav.npy of {path} has the shape {values.shape}; 17 columns are expected.")
        picture = BEHAVIOUR_COLUMNS[0]
        rows += [tuple(map(int, row[BEHAVIOUR_COLUMNS])) for row in values if row[picture] >= 0]
    return pd.DataFrame(rows, columns=["nsd_id", "trial"])


def _read_hdf5(path: Path, rows: np.ndarray, divide_by: float, start: int, stop: int) -> np.ndarray:
    with LAYOUT.open(path, "betas") as file:
        values = file.read("betas", part={"trial": rows[start:stop]})  # ascending, as h5py asks for
    return values.astype(np.float32) / np.float32(divide_by)


def _read_coco_image(path: Path, row: int) -> np.ndarray:
    """Return one image of ``coco_images_224_float16.hdf5``, (3, 224, 224) in 0..1, as uint8 of (224, 224, 3)."""
    with LAYOUT.open(path, "images") as file:
        lengths = file.measure("images")
        if row >= lengths["image"]:
            raise DataError(f"{path} holds {lengths['image']} images, not image {row}; it is truncated.")
        if lengths["colour"] != 3:
            raise DataError(f"{path} holds images of {lengths['colour']} colours, not of 3.")
        image = file.read("images", part={"image": slice(row, row + 1)})[0].astype(np.float32)
    if image.min() < -0.01 or image.max() > 1.01:
        raise DataError(f"image {row} of {path} is not in 0..1; fetch the file again.")
    # (3, height, width) -> (height, width, 3)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


_SPLITS = ("train", "test")


def open_brain_diffuser(root: Path, subject: int, design: Path | None, divide_by: float) -> Repack:
    """Return the training and the test array as parts.

    Raises
    ------
    DataError
        If an array or the design is missing, or their counts do not fit any number of sessions.
    """
    responses = {
        split: _find(root, f"nsd_{split}_fmriavg_*sub{subject}.npy", required=True) for split in _SPLITS
    }
    arrays = {split: open_npy(path) for split, path in responses.items() if path is not None}
    plan = read_design(design.expanduser() if design is not None else find_design(root))
    counts = {split: array.shape[0] for split, array in arrays.items()}
    n_sessions, orders = find_orders(plan, subject, counts)
    image_of: dict[int, Callable[[], np.ndarray]] = {}
    parts = []
    files = [*(path for path in responses.values() if path is not None), plan.path]
    for split, array in arrays.items():
        trials = make_trials(subject, orders[split], split, session="mean")
        sample = array.read_rows(0, min(5, array.shape[0]))
        check_scale(sample / divide_by, divide_by, array.path)
        read = partial(_read_rows, array, divide_by)
        parts.append(BetasPart(trials, (array.path,), array.shape[1], read))
        name = LAYOUT.place(Path(), "pixels", split=split, subject=subject).name
        images = _find(root, name, required=False)
        if images is not None:
            pixels = open_npy(images)
            if pixels.shape[0] != len(trials) or pixels.dtype != np.uint8:
                raise DataError(
                    f"{images} is {pixels.dtype} of shape {pixels.shape}; uint8 of {len(trials)} images is expected."
                )
            files.append(images)
            for row, nsd_id in enumerate(orders[split].tolist()):
                image_of[nsd_id] = partial(_read_one, pixels, row)
    notes = {
        "layout": "Brain-Diffuser",
        "standardised": f"mean over the repetitions in the first {n_sessions} sessions, not standardised",
        "n_sessions": n_sessions,
    }
    return Repack(parts, image_of, files, notes)


def _find(root: Path, pattern: str, *, required: bool) -> Path | None:
    found = sorted(root.glob(f"**/{pattern}"))
    if not found and required:
        raise DataError(f"no {pattern} is below {root}; correct dataset.subject, or prepare the array again.")
    return found[0] if found else None


def find_orders(design: NsdDesign, subject: int, counts: dict[str, int]) -> tuple[int, dict[str, np.ndarray]]:
    """Return the number of sessions that gives these counts in the design, and the images of each part, from 0.

    Raises
    ------
    DataError
        If no number of sessions fits.
    """
    n_shared = len(design.shared)
    close = []
    # The arrays do not contain the number of averaged sessions; only one number gives both counts.
    for n in range(1, design.n_sessions + 1):
        shown = design.order[:n].ravel()
        _, first = np.unique(shown, return_index=True)
        columns = shown[np.sort(first)]  # in order of first appearance
        orders = {"train": columns[columns > n_shared], "test": columns[columns <= n_shared]}
        if all(len(orders[split]) == counts[split] for split in _SPLITS):
            images = design.images[subject - 1]
            return n, {split: images[order - 1] - 1 for split, order in orders.items()}
        close.append(f"{n} sessions: {len(orders['train'])} and {len(orders['test'])}")
    raise DataError(
        f"{counts['train']} training and {counts['test']} test rows fit no number of sessions of {design.path} "
        f"({close[-4] if len(close) > 3 else close[0]}; {close[-1]}): array and design are from different releases."
    )


def _read_rows(array: FileArray, divide_by: float, start: int, stop: int) -> np.ndarray:
    return array.read_rows(start, stop).astype(np.float32) / np.float32(divide_by)


def _read_one(array: FileArray, row: int) -> np.ndarray:
    return array.read_rows(row, row + 1)[0]
