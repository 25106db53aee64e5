"""Checks the overlap of training and test: trials, images, pixels, concepts, repetitions, runs, sessions, subjects.

Everything is worked out from the trial table, the pixels and ``split.json``; the proofs that the split made of itself
are not believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.memory import ROWS_OF_A_MAP, release_pages
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.base.store import read_json
from braindecode_vis.datasets.trial_values import COPY_CORRELATION, MAX_CORRELATED, find_copied_trials
from braindecode_vis.pipeline.leaks.findings import AuditFinding, Level
from braindecode_vis.pipeline.leaks.likeness import LARGEST_DISTANCE, find_like_pictures
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, list_first, name_fold
from braindecode_vis.preprocessing.splits import (
    SIDES,
    Fold,
    Side,
    find_shared,
    make_groups,
    split_imagined_trials,
)

LARGEST_HASHED = 2 << 30  # bytes of pixels that are hashed again; larger sets are known by their table
LARGEST_CORRELATED = (
    1 << 30
)  # bytes of trials that are correlated with each other; more are compared by equality
#: Share of test trials whose class their subject or group gives away, beyond chance: from the first number on it is a
#: warning, from the second on a leak.
LEAST_KNOWN, MOSTLY_KNOWN = 0.1, 0.5
_PIECE = 32  # numbers at the start, middle and end of a trial by which copies are looked for


def check_rows(run: AuditedRun) -> list[AuditFinding]:
    """Look for rows that are trained on and tested, tested twice, or not there."""
    findings, tested = [], set[int]()
    n = run.responses.n_trials
    for number, fold in enumerate(run.folds):
        where, test = name_fold(number), set(fold.test.tolist())
        both = test & set(fold.train.tolist())
        outside = [row for row in (*fold.train.tolist(), *fold.test.tolist()) if not 0 <= row < n]
        twice = len(fold.test) - len(test) or len(tested & test)
        if not len(fold.train) or not len(fold.test):
            findings.append(AuditFinding("trials", "leak", "one side of the fold is empty.", where))
        if outside:
            text = f"row {outside[0]} is not among the {n} trials."
            findings.append(AuditFinding("trials", "leak", text, where))
        if both:
            text = f"{len(both)} trial(s) are in both training and test, first row {min(both)}."
            findings.append(AuditFinding("trials", "leak", text, where))
        if twice:
            findings.append(
                AuditFinding("trials", "leak", f"{twice} trial(s) are tested more than once.", where)
            )
        tested |= test
    text = f"{len(run.folds)} fold(s) share no row, and no row is tested twice."
    return findings or [AuditFinding("trials", "ok", text)]


# --- sides ------------------------------------------------------------------------------------------------


def check_sides(run: AuditedRun) -> list[AuditFinding]:
    """Name what is on both sides of a fold, and whether the split and its protocol allow that."""
    findings = []
    for side in SIDES:
        if side == "trial" or (side == "group" and "group" not in run.trials):
            continue  # trials are checked above; groups are there only where the user gave them
        groups = make_groups(run.trials, side)
        shared = [(number, find_shared(groups, fold)) for number, fold in enumerate(run.folds)]
        shared = [(number, names) for number, names in shared if names]
        declared = side in run.declared or (side == "image" and not run.decodes_categories)
        if not shared:
            claim = "" if side in run.declared else ", although the split does not declare it"
            findings.append(
                AuditFinding(side, "ok", f"no {side} is in both training and test of a fold{claim}.")
            )
            continue
        number, names = shared[0]
        seen = f"{len(names)} {side}(s) are in both training and test, first {list_first(names)}"
        level, rest = _judge_shared(run, str(side), declared)
        more = f" (and in {len(shared) - 1} more fold(s))" if len(shared) > 1 else ""
        findings.append(AuditFinding(side, level, f"{seen}{more}; {rest}.", name_fold(number)))
    return findings


def _judge_shared(run: AuditedRun, side: str, declared: bool) -> tuple[Level, str]:
    if declared:
        kind = run.prepared.fields.get("split", {}).get("kind", "")
        advice = (
            "; set split.images to true, which leaves trials of tested images out of the training, or decode ids "
            "as classes"
            if side == "image" and kind in ("group_kfold", "leave_one_group_out")
            else ""
        )
        return "leak", f"the split must not share any {side}{advice}"
    notes = run.meta.get("provenance", {})
    texts = (run.split.get("protocol", ""), notes.get("protocol", "") if isinstance(notes, dict) else "")
    claims = " ".join(map(str, texts)).lower().replace("-", " ")
    if side == "concept" and "zero shot" in claims:
        return "leak", "but the protocol is called zero-shot"
    meaning = {
        "image": "a category is decoded, not the image",
        "concept": "this is not a zero-shot protocol",
        "repetition": "generalisation to new repetitions is not tested",
        "session": "decoding is within session",
        "run": "decoding is within run, where time can predict the seen image: see design",
        "subject": "decoding is within subject",
        "group": "decoding is within group, where drift or state can predict the seen image",
    }
    if side == "group":
        return "warning", meaning[side]
    if (
        side in ("session", "run")
        and "group" in run.trials
        and "group" in run.declared
        and _is_told(run, side)
    ):
        return "warning", (
            f"groups divide it, so the drift of one {side} is in both training and test although no "
            f"group is; make groups of whole {side}s"
        )
    if side == "image" and set(run.responses.stimulus_ids) != set(run.concepts):
        return (
            "warning",
            "a category can be recognised by its individual pictures, and may not generalise to others",
        )
    return "ok", meaning[side]


def _is_told(run: AuditedRun, side: str) -> bool:
    """Say whether sessions or runs were named at all, and not filled in as one for each subject."""
    return len(set(make_groups(run.trials, cast(Side, side)))) > run.trials["subject"].astype(str).nunique()


def check_identity(run: AuditedRun) -> list[AuditFinding]:
    """Look for classes that a subject or group gives away: it shows one class alone, and is trained on and tested.

    Groups that are the classes themselves, each made of several whole subjects, are no identity.
    """
    labels = run.concepts.astype(str)
    sides: tuple[Side, ...] = ("subject", "group") if "group" in run.trials else ("subject",)
    subjects = make_groups(run.trials, "subject").astype(str)
    findings = []
    for side in sides:
        groups = make_groups(run.trials, side).astype(str)
        if side == "group" and _is_class(groups, labels, subjects):
            continue
        known, names = measure_known_classes(groups, labels, run.folds)
        if known < LEAST_KNOWN or (known < MOSTLY_KNOWN and not run.decodes_categories):
            continue
        first = names[0]
        number = int(np.argmax([np.isin(groups[fold.test], names).sum() for fold in run.folds]))
        everybody = known >= MOSTLY_KNOWN
        level: Level = "leak" if everybody and run.decodes_categories else "warning"
        split = {"subject": "leave_one_subject_out", "group": "leave_one_group_out"}[side]
        advice = f"leave whole {side}s out (split.kind={split})"
        if run.decodes_categories and not everybody:
            advice += ", or remove those with only one class"
        text = (
            f"{len(names)} {side}(s) in both training and test show one "
            f"{'class' if run.decodes_categories else 'concept'} each, first {first} "
            f"({labels[groups == first][0]}), so a decoder that recognises the {side} knows the answer; {advice}."
        )
        findings.append(AuditFinding("identity", level, text, name_fold(number)))
    text = "no subject or group in both training and test reveals the class."
    return findings or [AuditFinding("identity", "ok", text)]


def measure_known_classes(
    groups: np.ndarray, labels: np.ndarray, folds: Sequence[Fold]
) -> tuple[float, list[str]]:
    """Return how many more test trials than by chance lie in trained groups of one class, and these groups.

    Of all folds together: the few test trials of one of many folds say little.

    Parameters
    ----------
    groups, labels : str arrays of shape (n_trials,)
    folds
        Rows of both.

    Returns
    -------
    share
        0 for as many as groups of these sizes would hold (within three standard deviations) if classes fell on trials
        at random, 1 for all of them.
    names
        The groups, sorted.

    Examples
    --------
    >>> who, what = np.array(list("aaabbb")), np.array(list("xxxyyy"))
    >>> measure_known_classes(who, what, [Fold(np.array([0, 1, 3, 4]), np.array([2, 5]))])
    (1.0, ['a', 'b'])
    """
    known, first, codes, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    frequency = np.unique(labels, return_counts=True)[1] / len(labels)
    is_single = np.bincount(codes, labels != labels[first][codes], minlength=len(known)) == 0
    tested = np.zeros(len(known), np.intp)  # trials of each group that are tested beside trained ones
    for fold in folds:
        is_taught = np.bincount(codes[fold.train], minlength=len(known)) > 0
        tested += np.bincount(codes[fold.test], minlength=len(known)) * is_taught
    n_known = int(tested[is_single].sum())
    # By chance a group of n trials shows one class with the probability of n trials of one class.
    chances = np.array([float((frequency ** int(n)).sum()) for n in np.unique(sizes)])
    chance = chances[np.searchsorted(np.unique(sizes), sizes)]  # (n_groups,)
    expected, spread = float(tested @ chance), float(np.sqrt(tested**2 @ (chance * (1 - chance))))
    is_known = is_single & (tested > 0)
    certain = is_known.sum() > 1 and is_known.sum() == (tested > 0).sum()  # all of them
    if len(frequency) < 2 or not (certain or n_known > expected + 3 * spread):
        return 0.0, []
    n_tested = sum(len(fold.test) for fold in folds)
    return (n_known - expected) / (n_tested - expected), known[is_known].tolist()


def _is_class(groups: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> bool:
    """Say whether each class is one group of several subjects, none of whom is in two groups."""
    table = pd.DataFrame({"group": groups, "label": labels, "subject": subjects}).drop_duplicates()
    of_group = table.groupby("group").agg({"label": "nunique", "subject": "nunique"})
    return bool(
        (of_group["label"] == 1).all()
        and (table.groupby("label")["group"].nunique() == 1).all()
        and (of_group["subject"] > 1).all()
        and (table.groupby("subject")["group"].nunique() == 1).all()
    )


# --- the same picture, the same trial ---------------------------------------------------------------------


def check_likeness(run: AuditedRun) -> list[AuditFinding]:
    """Look for one picture under two ids with other pixels; see `find_like_pictures`."""
    if run.decodes_categories and set(run.responses.stimulus_ids) == set(run.concepts):
        return []  # `check_pixels` says that nothing is known of pictures
    stimuli = run.stimuli.select_pictured()
    pictured = set(stimuli.ids.tolist())
    shown = [name for name in dict.fromkeys(run.responses.stimulus_ids.tolist()) if name in pictured]
    if not stimuli.has_pixels or len(shown) < 2:
        return [AuditFinding("likeness", "warning", "no picture is available for the comparison.")]
    try:
        found = find_like_pictures(stimuli, shown, set(run.responses.stimulus_ids[run.is_tested].tolist()))
    except DataError as error:
        return [AuditFinding("likeness", "warning", f"pictures were not compared: {error}")]
    findings = []
    digests = {}
    if found.pairs:  # reads every pixel
        digests = dict(zip(run.stimuli.ids.tolist(), hash_images(run.stimuli)[0].tolist(), strict=True))
    for number, fold in enumerate(run.folds):
        train, test = (set(run.responses.stimulus_ids[rows].tolist()) for rows in (fold.train, fold.test))
        # `check_sides` reports what is on both sides under one id, `check_pixels` equal pixels.
        shared = [
            (a, b, how) for first, second, how in found.pairs for a, b in ((first, second), (second, first))
            if a in train - test and b in test - train and (digests[a] is None or digests[a] != digests[b])
        ]  # fmt: skip
        if not shared:
            continue
        first, second, how = shared[0]
        level: Level = "warning" if run.decodes_categories else "leak"
        text = (
            f"{len(shared)} picture(s) are in both training and test with slightly different pixels, "
            f"first {first} and {second}{how}; leave one "
            "of each pair out."
        )
        findings.append(AuditFinding("likeness", level, text, name_fold(number)))
    text = "no picture is in both training and test with slightly different pixels, cropped, grey or mirrored"
    if found.limit < LARGEST_DISTANCE:
        text += (
            f"; training pictures are so alike that copies are found up to a distance of {found.limit:.2g} "
            f"instead of {LARGEST_DISTANCE:g}"
        )
    return findings or [AuditFinding("likeness", "ok", f"{text}.")]


def hash_images(stimuli: StimulusSet) -> tuple[np.ndarray, int]:
    """Return the digest of every image, and how many differ from the table.

    Pixels that travel with the run are hashed again; files of images that do not are known by the table.
    """
    told = stimuli.table["sha256"].to_numpy(dtype=object)
    if stimuli.pixels is None or stimuli.pixels.nbytes > LARGEST_HASHED:
        return told, 0
    # Read one by one: pages of a map would stay in memory.
    found = np.array([hash_pixels(image) for image in stimuli.iterate_images()], dtype=object)
    wrong = found != told
    return found, 0 if wrong.all() else int(wrong.sum())  # all: the table has digests of files


def check_pixels(run: AuditedRun) -> list[AuditFinding]:
    """Look for one picture under several ids."""
    digests, n_wrong = hash_images(run.stimuli)
    known = np.array([isinstance(d, str) and len(d) > 8 for d in digests], dtype=bool)
    if run.decodes_categories and set(run.responses.stimulus_ids) == set(run.concepts):
        return [
            AuditFinding("pixels", "ok", "stimulus ids are categories; which picture was shown is not known.")
        ]
    if not known.any():
        return [
            AuditFinding(
                "pixels", "warning", "no image has a digest, so the same picture under two ids is not found."
            )
        ]
    findings = []
    if n_wrong:
        text = f"{n_wrong} image(s) have other pixels than in the stimulus table; the digests of the files are used."
        findings.append(AuditFinding("pixels", "warning", text))
    ids = run.stimuli.ids
    groups = np.where(known, digests, ids)[run.stimuli.find_rows(run.responses.stimulus_ids)]
    for number, fold in enumerate(run.folds):
        shared = set(find_shared(groups, fold)) & set(digests[known].tolist())
        if not shared:
            continue
        first = min(shared)
        names = list_first(set(ids[digests == first].tolist()))
        level: Level = "warning" if run.decodes_categories else "leak"
        text = (
            f"{len(shared)} picture(s) have the same pixels in training and test, first {names} "
            f"(sha256 {first[:12]})."
        )
        findings.append(AuditFinding("pixels", level, text, name_fold(number)))
    if all(finding.level != "leak" for finding in findings):
        unknown = f"; {int((~known).sum())} image(s) have no digest" if not known.all() else ""
        findings.append(
            AuditFinding(
                "pixels", "ok", f"no picture is in both training and test under another id{unknown}."
            )
        )
    return findings


def check_copies(run: AuditedRun) -> list[AuditFinding]:
    """Look for one recorded trial in two rows: equal, or so alike that no second recording can be.

    Many trials are compared by equality alone, which every run can afford at its end; see `check_near_copies`.
    """
    data = run.responses.data
    small = data.nbytes <= LARGEST_CORRELATED and len(data) <= MAX_CORRELATED
    return _judge_copies(run, find_copied_trials(data) if small else [])


def check_near_copies(run: AuditedRun) -> list[AuditFinding]:
    """Look for one recorded trial in two rows as `check_copies` does, whatever the number of trials."""
    return _judge_copies(run, find_copied_trials(run.responses.data, np.flatnonzero(run.is_tested)))


def _judge_copies(run: AuditedRun, pairs: Sequence[tuple[int, int]]) -> list[AuditFinding]:
    codes = find_copies(run.responses.data)
    findings = []
    for first, second in pairs:
        codes[codes == codes[second]] = codes[first]  # whatever is a copy of a copy is one, too
    for number, fold in enumerate(run.folds):
        shared = find_shared(codes, fold)
        if not shared:
            continue
        pair = [int(rows[codes[rows] == shared[0]][0]) for rows in (fold.train, fold.test)]
        ids = [str(run.responses.stimulus_ids[row]) for row in pair]
        text = (
            f"{len(shared)} trial(s) have a copy on the other side of the split (the same numbers in a third of their "
            f"values or more, or correlated above {COPY_CORRELATION}, also negated), first rows {pair[0]} ({ids[0]}) "
            f"and {pair[1]} ({ids[1]}); drop the copies."
        )
        findings.append(AuditFinding("copies", "leak", text, name_fold(number)))
    return findings or [
        AuditFinding("copies", "ok", "no recorded trial has a copy on the other side of the split.")
    ]


def find_copies(data: np.ndarray) -> np.ndarray:
    """Return a number for each trial, equal for trials with equal values, shape (n_trials,).

    A few values of every trial are compared first, so that a large file is not read whole; trials of equal values
    throughout (all zero, for example) are no copies.

    Parameters
    ----------
    data : array of shape (n_trials, ...)

    Examples
    --------
    >>> find_copies(np.array([[1.0, 2], [3, 4], [1, 2]])).tolist()
    [0, 1, 0]
    """
    size = int(np.prod(data.shape[1:]))
    picked = np.unique(np.r_[np.arange(_PIECE), size // 2 + np.arange(_PIECE), size - 1 - np.arange(_PIECE)])
    picked = picked[(picked >= 0) & (picked < size)]
    quick: dict[bytes, list[int]] = {}
    for row in range(len(data)):
        trial = np.asarray(data[row]).reshape(-1)
        quick.setdefault(trial[picked].tobytes(), []).append(row)
        if row % ROWS_OF_A_MAP == 0:
            release_pages(data)
    codes = np.arange(len(data))
    for rows in quick.values():
        seen: dict[bytes, int] = {}
        for row in rows if len(rows) > 1 else []:
            trial = np.ascontiguousarray(data[row])
            if trial.min() < trial.max():
                codes[row] = seen.setdefault(hashlib.sha256(trial.tobytes()).digest(), row)
        if len(rows) > 1:
            release_pages(data)
    return codes


# --- as configured, and as used ---------------------------------------------------------------------------


def check_split_settings(run: AuditedRun) -> list[AuditFinding]:
    """Make the split again from its settings and compare rows."""
    fields = run.prepared.fields
    try:
        config = validate_component("split", fields["split"])
        made = config.make(
            run.responses.trials,
            run.concepts,
            seed=int(fields["seed"]),
            knows_images=run.stimuli.knows_images,
        ).folds
    except DataError as error:
        return [
            AuditFinding(
                "split", "leak", f"the split of the configuration cannot be made from these trials: {error}"
            )
        ]
    except (BraindecodeVisError, KeyError) as error:
        return [AuditFinding("split", "warning", f"the split could not be made again ({error}).")]
    if len(made) != len(run.folds):
        return [
            AuditFinding(
                "split", "leak", f"split.json has {len(run.folds)} folds, but its settings make {len(made)}."
            )
        ]
    findings = []
    for number, (fold, expected) in enumerate(zip(run.folds, made, strict=True)):
        # The one difference that is a leak; others are edits.
        moved = set(fold.train.tolist()) & set(expected.test.tolist())
        if moved:
            text = (
                f"{len(moved)} trial(s) are in training, but the settings of the split have them in "
                f"test, first row {min(moved)}."
            )
            findings.append(AuditFinding("split", "leak", text, name_fold(number)))
        elif any(
            set(a.tolist()) != set(b.tolist())
            for a, b in ((fold.train, expected.train), (fold.test, expected.test))
        ):
            text = (
                "split.json has other rows than its settings give; it was edited, or made by another version."
            )
            findings.append(AuditFinding("split", "warning", text, name_fold(number)))
    return findings or [AuditFinding("split", "ok", "split.json matches its settings and seed.")]


def check_used(run: AuditedRun) -> list[AuditFinding]:
    """Compare the trials that later stages say they used with the folds."""
    findings = []
    ids = run.responses.stimulus_ids.astype(str)
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        where = name_fold(number)
        expected = len(count_units(run.trials, fold.train, str(record.fields.get("repeats", "single"))))
        if (added := run.read_synthetic(record)) is not None:
            expected += added[0].n_trials
        # Where it is missing, nothing can be compared.
        found = record.content.get("n_trials")
        if found is not None and int(found) != expected:
            text = f"the encoder learnt from {found} trials, but the fold has {expected} training trials."
            findings.append(AuditFinding("used-trials", "leak", text, where))
        made = [part.path for part in run.out_of_fold if part.upstream.get("train") == record.fingerprint]
        # Earlier versions kept them with the fit.
        paths = [folder / "ids.json" for folder in (*made, record.path / "out_of_fold")]
        predicted = {str(name) for path in paths if path.is_file() for name in read_json(path)["ids"]}
        foreign = predicted - set(ids[fold.train].tolist())
        if foreign:
            text = (
                f"{len(foreign)} image(s) outside the training set were used in training predictions, first "
            )
            findings.append(AuditFinding("used-trials", "leak", f"{text}{list_first(foreign)}.", where))
    if run.retrieved is not None:
        pictured, _ = split_imagined_trials(run.trials, run.stimuli, run.folds)
        findings += _check_queries(run.retrieved.path, ids, pictured)
    text = (
        "training used the training trials of its fold, retrieval the test images."
        if run.trained
        else "nothing was trained."
    )
    return findings or [AuditFinding("used-trials", "ok", text)]


def count_units(trials: pd.DataFrame, rows: np.ndarray, repeats: str) -> pd.DataFrame:
    """Return one row per trial that an encoder is given: averages over the repetitions of an image, or all trials."""
    picked = trials.iloc[rows]
    if repeats != "averaged":
        return picked
    keys = ["subject", "stimulus_id", *(["task"] if "task" in trials else [])]
    return picked.drop_duplicates(keys)


def _check_queries(folder: Path, ids: np.ndarray, folds: Sequence[Fold]) -> list[AuditFinding]:
    findings = []
    for number, fold in enumerate(folds):
        path = folder / f"fold{number:02d}" / "retrieval.json"
        if not path.is_file():
            continue
        content = read_json(path)
        asked, test = set(map(str, content["query_ids"])), set(ids[fold.test].tolist())
        if asked != test:
            text = (
                f"{len(asked ^ test)} image(s) are either only queries or only in the test set, first "
                f"{list_first(asked ^ test)}."
            )
            findings.append(
                AuditFinding("used-trials", "leak" if asked - test else "warning", text, name_fold(number))
            )
        lacking = test - set(map(str, content["gallery_ids"]))
        if lacking:
            text = f"{len(lacking)} test image(s) are not in the gallery, first {list_first(lacking)}."
            findings.append(AuditFinding("used-trials", "warning", text, name_fold(number)))
    return findings
