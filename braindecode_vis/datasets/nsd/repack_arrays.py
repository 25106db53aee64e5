"""Brain-Diffuser's copy of NSD: one array of mean responses for training and one for testing.

The arrays name no image. Their rows stand in the order in which the images first appeared, so the experimental design
is needed to tell which is which; the number of rows must agree with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.nsd.betas import check_scale
from braindecode_vis.datasets.nsd.experiment_design import NsdDesign, find_design, read_design
from braindecode_vis.datasets.nsd.repacks import Repack, make_trials
from braindecode_vis.datasets.sources.betas_source import BetasPart
from braindecode_vis.datasets.sources.safe_pickle import FileArray, open_npy

_SPLITS = ("train", "test")


def open_brain_diffuser(root: Path, subject: int, design: Path | None, divide_by: float) -> Repack:
    """Return the training and the test array as parts.

    Raises
    ------
    DataError
        If an array or the design is missing, or their counts fit no number of sessions.
    """
    responses = {
        split: _find(root, f"nsd_{split}_fmriavg_*sub{subject}.npy", required=True) for split in _SPLITS
    }
    arrays = {split: open_npy(path) for split, path in responses.items() if path is not None}
    plan = read_design(design.expanduser() if design is not None else find_design(root))
    counts = {split: array.shape[0] for split, array in arrays.items()}
    n_sessions, orders = find_orders(plan, subject, counts)
    parts, image_of = [], {}
    files = [*(path for path in responses.values() if path is not None), plan.path]
    for split, array in arrays.items():
        trials = make_trials(subject, orders[split], split, session="mean")
        sample = array.read_rows(0, min(5, array.shape[0]))
        check_scale(sample / divide_by, divide_by, array.path)
        read = _Rows(array, divide_by)
        parts.append(BetasPart(trials, (array.path,), array.shape[1], read))
        images = _find(root, f"nsd_{split}_stim_sub{subject}.npy", required=False)
        if images is not None:
            pixels = open_npy(images)
            if pixels.shape[0] != len(trials) or pixels.dtype != np.uint8:
                raise DataError(
                    f"{images} is {pixels.dtype} of shape {pixels.shape}; uint8 of {len(trials)} images is expected."
                )
            files.append(images)
            for row, nsd_id in enumerate(orders[split].tolist()):
                image_of[nsd_id] = _Image(pixels, row)
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
    """Return after how many sessions the design gives these counts, and the images of each part, counted from 0.

    Raises
    ------
    DataError
        If no number of sessions does.
    """
    n_shared = len(design.shared)
    close = []
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
        f"({close[-4] if len(close) > 3 else close[0]}; {close[-1]}): array and design do not belong together."
    )


class _Rows:
    """Reads rows of a matrix on disk."""

    def __init__(self, array: FileArray, divide_by: float) -> None:
        self.array, self.divide_by = array, divide_by

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return self.array.read_rows(start, stop).astype(np.float32) / np.float32(self.divide_by)


class _Image:
    """One image of an array on disk."""

    def __init__(self, array: FileArray, row: int) -> None:
        self.array, self.row = array, row

    def __call__(self) -> np.ndarray:
        return self.array.read_rows(self.row, self.row + 1)[0]
