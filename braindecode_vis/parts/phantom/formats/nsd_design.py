"""The experimental design of the phantom NSD: the image of every trial, and the tables that list it.

Makes the arrays of ``nsd_expdesign.mat`` with the counts of the published file, ``nsd_stim_info_merged.csv`` and
``responses.tsv``. ``73KID`` and everything in the .mat file count from 1, `nsdId` from 0.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import make_generator

Design = dict[str, np.ndarray]
BEHAVIOUR_COLUMNS = (
    "SUBJECT", "SESSION", "RUN", "TRIAL", "73KID", "10KID", "TIME", "ISOLD", "ISCORRECT", "RT", "CHANGEMIND",
    "MEMORYRECENT", "MEMORYFIRST", "ISOLDCURRENT", "ISCORRECTCURRENT", "TOTAL1", "TOTAL2", "BUTTON",
    "MISSINGDATA",
)  # fmt: skip


def make_nsd_expdesign(
    n_subjects: int = 8,
    n_sessions: int = 40,
    images_per_subject: int = 10000,
    n_shared: int = 1000,
    n_images: int = 73000,
    seed: int = 0,
    *,
    n_repetitions: int = 3,
    n_runs: int = 12,
) -> Design:
    """Return the arrays of ``nsd_expdesign.mat``, everything counted from 1.

    `masterordering` gives for each trial the column of `subjectim`; columns 1 to `n_shared` are the same
    images in all subjects (`sharedix`, ascending), the others are different for each subject.

    Returns
    -------
    dict
        `masterordering` uint16 (1, n_trials), `subjectim` int32 (n_subjects, images_per_subject), `sharedix`
        int32 (1, n_shared), `basiccnt` uint16 (3, n_sessions): images shown once, twice, three times within a
        session, `stimpattern` uint8 (n_sessions, n_runs, n_slots): slots with a picture. Types and shapes as
        `scipy.io.loadmat` gives them for the published file.

    Raises
    ------
    ConfigError
        If the sizes do not fit together.

    Examples
    --------
    >>> design = make_nsd_expdesign(2, 3, images_per_subject=20, n_shared=4, n_images=40, n_runs=2)
    >>> {key: value.shape for key, value in design.items()}["masterordering"]
    (1, 60)
    """
    n_own = images_per_subject - n_shared
    n_trials = images_per_subject * n_repetitions
    if min(n_subjects, n_sessions, n_shared, n_runs) < 1 or n_own < 0 or n_trials % n_sessions:
        raise ConfigError(
            f"{images_per_subject} images x {n_repetitions} do not divide into {n_sessions} sessions, "
            f"or hold no {n_shared} shared ones."
        )
    if n_shared + n_subjects * n_own > n_images or n_trials // n_sessions < n_runs:
        raise ConfigError(
            f"{n_subjects} subjects need {n_shared + n_subjects * n_own} images, but there are {n_images}; "
            f"{n_trials // n_sessions} trials a session must fill {n_runs} runs."
        )
    rng = make_generator(seed, "nsd", "expdesign")
    ids = rng.permutation(n_images).astype(np.int32) + 1
    shared = np.sort(ids[:n_shared])
    own = ids[n_shared : n_shared + n_subjects * n_own].reshape(n_subjects, n_own)
    subjectim = np.concatenate([np.tile(shared, (n_subjects, 1)), own], axis=1).astype(np.int32)
    # All subjects have the same order of image numbers, as in the published design.
    order = _order_trials(images_per_subject, n_repetitions, n_sessions, rng)
    counts = np.zeros((3, n_sessions), dtype=np.uint16)
    for session, shown in enumerate(order.reshape(n_sessions, -1)):
        within = np.unique(shown, return_counts=True)[1]
        counts[:, session] = [(within == k).sum() for k in (1, 2, 3)]
    return {
        "masterordering": order[None].astype(np.uint16),
        "basiccnt": counts,
        "sharedix": shared[None].astype(np.int32),
        "subjectim": subjectim,
        "stimpattern": _place_blanks(n_trials // n_sessions, n_sessions, n_runs, rng),
    }


def _order_trials(n_images: int, n_repetitions: int, n_sessions: int, rng: np.random.Generator) -> np.ndarray:
    """Return the image of each trial, from 1; three fifths of the presentations of an image are close together.

    Share and spread (0.25 sessions) give the counts of the published design: per session 436 images shown
    once, 106 twice, 34 three times, and sometimes the same image twice in a row.
    """
    centre = rng.uniform(0, n_sessions, (n_images, 1))
    close = centre + rng.normal(0, 0.25, (n_images, n_repetitions))
    anywhere = rng.uniform(0, n_sessions, (n_images, n_repetitions))
    when = np.where(rng.random((n_images, n_repetitions)) < 0.6, close, anywhere) % n_sessions
    return np.repeat(np.arange(1, n_images + 1), n_repetitions)[np.argsort(when.ravel(), kind="stable")]


def _place_blanks(per_session: int, n_sessions: int, n_runs: int, rng: np.random.Generator) -> np.ndarray:
    """Return the slots with a picture: runs start with 3 blanks, end with 4, and hold a few between."""
    # Runs of 63 and 62 trials alternate, as in the published file.
    sizes = np.diff(-(-np.arange(n_runs + 1) * per_session // n_runs))
    n_slots = int(sizes.max()) + 12
    pattern = np.zeros((n_sessions, n_runs, n_slots), dtype=np.uint8)
    for session in range(n_sessions):
        for run, size in enumerate(sizes):
            pattern[session, run, 3 + np.sort(rng.choice(n_slots - 7, size, replace=False))] = 1
    return pattern


def get_trial_images(design: Design, subject: int, session: int) -> np.ndarray:
    """Return the 1-based 73k image of each trial of a session; subject and session count from 1."""
    n_sessions = design["stimpattern"].shape[0]
    shown = design["masterordering"].reshape(n_sessions, -1)[session - 1]
    return design["subjectim"][subject - 1, shown.astype(int) - 1]


def make_stim_info(design: Design, n_images: int = 73000) -> pd.DataFrame:
    """Return the table of ``nsd_stim_info_merged.csv``: one row per image, trials counted from 1, 0 for never."""
    n_subjects = len(design["subjectim"])
    identity = np.arange(n_images)
    table = pd.DataFrame(
        {
            "cocoId": identity + 100000,  # phantom images are no COCO images: numbers of their own
            "cocoSplit": np.where(identity % 25, "train2017", "val2017"),
            "cropBox": "(0.0, 0.0, 0.0, 0.0)",
            "loss": 0.0,
            "nsdId": identity,
            "flagged": False,
            "BOLD5000": False,
            "shared1000": np.isin(identity + 1, design["sharedix"]),
        }
    )
    order = design["masterordering"][0].astype(int)
    n_repetitions = np.bincount(order).max()
    trials = pd.Series(np.arange(1, len(order) + 1)).groupby(order).agg(list)
    seen = np.zeros((n_images, n_subjects), dtype=int)
    when = np.zeros((n_images, n_subjects, n_repetitions), dtype=int)
    for subject, images in enumerate(design["subjectim"] - 1):
        seen[images, subject] = 1
        when[images, subject] = np.array(trials.tolist())
    for subject in range(n_subjects):
        table[f"subject{subject + 1}"] = seen[:, subject]
    columns = {
        f"subject{s + 1}_rep{r}": when[:, s, r] for s in range(n_subjects) for r in range(n_repetitions)
    }
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def make_responses(design: Design, subject: int, n_sessions: int, seed: int = 0) -> pd.DataFrame:
    """Return the table of ``responses.tsv``: one row per trial, with 85 % correct answers in the memory task."""
    rng = make_generator(seed, "nsd", "responses", subject)
    per_session = design["masterordering"].size // design["stimpattern"].shape[0]
    n_trials = per_session * n_sessions
    order = design["masterordering"][0, :n_trials].astype(int)
    runs = design["stimpattern"][:n_sessions].sum(axis=2, dtype=np.int64)
    table = pd.DataFrame(
        {"SUBJECT": subject, "SESSION": np.repeat(np.arange(1, n_sessions + 1), per_session)}
    )
    table["RUN"] = np.concatenate([np.repeat(np.arange(1, len(row) + 1), row) for row in runs])
    table["TRIAL"] = table.groupby(["SESSION", "RUN"]).cumcount() + 1
    table["73KID"] = design["subjectim"][subject - 1, order - 1]
    table["10KID"] = order
    slots = np.concatenate(
        [np.flatnonzero(run) for session in design["stimpattern"][:n_sessions] for run in session]
    )
    # Slots have 4 s, runs 330 s with their pause, and sessions are a week apart; the unit in the file is days.
    clock = slots * 4 + (table["RUN"] - 1) * 330 + (table["SESSION"] - 1) * 7 * 86400
    table["TIME"] = clock / 86400
    trial = pd.Series(np.arange(n_trials))
    last, first = trial.groupby(order).shift(), trial.groupby(order).transform("first")
    table["ISOLD"] = last.notna().astype(int)
    old_now = trial.groupby([order, table["SESSION"].to_numpy()]).cumcount() > 0
    # Nearly every trial is answered, and 85 % of the answers are right: our choice.
    answered = rng.random(n_trials) < 0.98
    correct = rng.random(n_trials) < 0.85
    says_old = np.where(correct, table["ISOLD"], 1 - table["ISOLD"])
    table["ISCORRECT"] = np.where(answered, correct, np.nan)
    table["RT"] = np.where(answered, rng.uniform(500, 1500, n_trials).round(2), np.nan)
    table["CHANGEMIND"] = np.where(answered, 0.0, np.nan)
    table["MEMORYRECENT"] = (trial - last - 1).where(last.notna())
    table["MEMORYFIRST"] = (trial - first - 1).where(last.notna())
    table["ISOLDCURRENT"] = old_now.astype(int)
    table["ISCORRECTCURRENT"] = np.where(answered, says_old == table["ISOLDCURRENT"], np.nan)
    table["TOTAL1"], table["TOTAL2"] = answered * (says_old == 0), answered * (says_old == 1)
    table["BUTTON"] = np.where(answered, says_old + 1, np.nan)
    table["MISSINGDATA"] = 0
    integers = ["TOTAL1", "TOTAL2"]
    table[integers] = table[integers].astype(int)
    return table[list(BEHAVIOUR_COLUMNS)]
