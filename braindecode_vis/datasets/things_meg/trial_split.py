"""The splits of THINGS-MEG that papers use, verified by counts.

Owns the choice of training trials, test trials and trials that are left out: the zero-shot split, in which no image of
a test concept is used for training, and the small and the large test set. Reads no samples.

References
----------
Benchetrit, Banville, King (2024), arXiv:2310.19812: small and large test set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.bids.meeg_files import EpochReader
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    drop_events,
    replace_trials,
)

if TYPE_CHECKING:
    import pandas as pd

TestSet = Literal["small", "large"]


def apply_split(
    parts: list[Any], test_set: TestSet, zero_shot: bool, max_dropped: float
) -> tuple[list[Any], dict[str, Any]]:
    """Mark training and test trials of every subject and leave the others out; also returns the counts."""
    import pandas as pd

    sizes, out = {}, []
    subjects = [part.group[0] for part in parts]
    for subject in dict.fromkeys(subjects):
        own = [p for p, s in zip(parts, subjects, strict=True) if s == subject]
        tables = [part.trials for part in own]
        events = pd.concat(tables, ignore_index=True)
        where = f"subject {subject}, from file {own[0].files[0]} on"
        # Published epochs do not mark test trials; they are those shown more than once.
        if "is_test" not in events:
            most = int(events["stimulus_id"].value_counts().max())
            events["is_test"] = events["stimulus_id"].isin(find_repeated(events["stimulus_id"], most, where))
        split, keep = choose_split(events, test_set, zero_shot)
        kept = events.assign(split=split)[keep]
        if not {"train", "test"} <= set(kept["split"]):
            raise DataError(
                f"{where}: {int(keep.sum())} trials give no {'test' if 'train' in set(kept['split']) else 'training'} "
                "trial; the repeated images or the others are missing."
            )
        sizes[subject] = check_counts(kept, where, max_dropped)
        # The split was made over all parts of a subject; each part gets its own rows.
        ends = np.cumsum([len(table) for table in tables])
        for part, end, table in zip(own, ends, tables, strict=True):
            span = slice(end - len(table), end)
            out.append(_keep(part, split[span], keep[span]))
    return [part for part in out if part is not None], sizes


def _keep(part: Any, split: np.ndarray, keep: np.ndarray) -> Any:
    if not keep.any():
        return None
    if isinstance(part, ContinuousPart):
        return drop_events(replace_trials(part, part.trials.assign(split=split)), keep)
    reader = part.read
    assert isinstance(reader, EpochReader)
    trials = part.trials.assign(split=split)[keep].reset_index(drop=True)
    return replace(part, trials=trials, read=replace(reader, rows=reader.rows[keep]))


def describe_split(test_set: TestSet, zero_shot: bool) -> str:
    """Return a description of the protocol."""
    if test_set == "large":
        return (
            "large test set: single images of the repeated images' concepts; training without these concepts"
        )
    without = (
        ", training without their concepts (zero-shot)" if zero_shot else ", training on all other images"
    )
    return f"small test set: the repeated images{without}"


def find_repeated(ids: pd.Series, n_sessions: int, where: str) -> frozenset[str]:
    """Return the images shown in every session: the test images, 12 presentations in the published data.

    Raises
    ------
    DataError
        If an image is shown neither once nor in every session.
    """
    counts = ids.value_counts()
    odd = counts[(counts != 1) & (counts != n_sessions)]
    if len(odd):
        raise DataError(
            f"{where}: images are shown once, or once in each of {n_sessions} sessions, but {len(odd)} are not, first "
            f"{odd.index[0]!r} with {odd.iloc[0]} presentations; a session or the image list is not as published."
        )
    return frozenset(counts.index[counts == n_sessions]) if n_sessions > 1 else frozenset()


def choose_split(events: pd.DataFrame, test_set: TestSet, zero_shot: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the split of each trial as text, and which trials are kept.

    Parameters
    ----------
    events : DataFrame
        With `concept` and `is_test`, whether the image is one of the repeated ones.
    test_set
        ``small``: the repeated images. ``large``: the other images of their concepts, once each; the repeated images
        are left out.
    zero_shot
        Keep images of test concepts out of training.
    """
    repeated = events["is_test"].to_numpy(bool)
    tested = events["concept"].isin(set(events.loc[repeated, "concept"])).to_numpy()
    is_test = repeated if test_set == "small" else tested & ~repeated
    keep = np.ones(len(events), dtype=bool)
    if test_set == "large":
        keep &= ~repeated
    elif zero_shot:
        keep &= repeated | ~tested
    return np.where(is_test, "test", "train"), keep


def check_counts(events: pd.DataFrame, where: str, max_dropped: float) -> dict[str, Any]:
    """Return the sizes of the split of one subject; a concept or image with an unusual number is an error.

    Published, with zero-shot training: 1654 concepts x 12 images and 200 images x 12 presentations.
    """
    train, test = (events[events["split"] == split] for split in ("train", "test"))
    sizes = {
        "n_train_concepts": train["concept"].nunique(),
        "n_test_concepts": test["concept"].nunique(),
        "n_test_images": test["stimulus_id"].nunique(),
    }
    per_concept = _check_even(train["concept"], f"{where}: training images per concept", max_dropped)
    per_image = _check_even(test["stimulus_id"], f"{where}: presentations per test image", max_dropped)
    return {**sizes, "train_images_per_concept": per_concept, "test_repetitions": per_image}


def _check_even(labels: pd.Series, what: str, max_dropped: float) -> int:
    counts = labels.value_counts()
    if not len(counts):
        return 0
    usual = int(counts.mode().iloc[0])
    off = (counts - usual).abs()
    if off.sum() > max_dropped * len(labels):
        worst = str(off.idxmax())
        raise DataError(
            f"{what} must be equal, but range from {counts.min()} to {counts.max()} (most have {usual}; "
            f"{worst!r} has {counts[worst]}); a run is missing, or image numbers and names do not fit."
        )
    return usual
