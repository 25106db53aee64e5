"""Checks that the statistics of preprocessing were fitted on training trials: standardising, whitening, scaling.

Data that were standardised with the trials of a set have exactly mean 0 and standard deviation 1 over that set, and
over no other; whitened data have the identity as their covariance. So the stored numbers show which trials a statistic
was fitted on, whatever the record says: each is worked out again from the stored responses, once from training trials
and once from all. The record is asked only for what cannot be seen in the numbers (independent components, thresholds
of artefacts, what authors did before they published). Features that are components of all trials, or codes of what was
shown, are recognised by their numbers too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import iterate_blocks
from braindecode_vis.base.checks import DataError
from braindecode_vis.pipeline.leaks.findings import AuditFinding, Level
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, list_first, name_fold
from braindecode_vis.preprocessing.scaling import fit_robust_scaler
from braindecode_vis.preprocessing.splits import make_groups
from braindecode_vis.preprocessing.whitening import CovarianceSum, compute_condition_weights

#: Root mean square distance from mean 0 and spread 1 that counts as standardised; float16 stays well below it, and raw
#: data come this close by chance only with more than a hundred thousand trials.
TOLERANCE = 2e-3
#: One fit is the better one if it is this many times closer.
CLOSER = 4.0
#: Training trials this close to mean 0 and spread 1 were fitted on, whatever else fits: groups that are standardised
#: one by one are so together as well, up to rounding.
EXACT = 5e-5
_BLOCK_BYTES = 32 << 20
_LARGEST_SUMS = 1 << 29  # bytes

WHITENING_TOLERANCE = 5e-3  # of the whitened covariance; float16 trials reach 1e-3
ROBUST_TOLERANCE = 5e-3  # of median and interquartile range

MOST_COMPONENTS = 2048  # features whose correlations are computed
UNCORRELATED = 1e-4  # root mean square correlation; single precision leaves 1e-6
_UNCORRELATED, _CENTRED = "no correlation of features holds", "mean 0 holds"
_ONE_MEAN = "one mean of all features holds"
#: What `check_components` and `check_standardised` find in responses.
_OTHERS_FIND = (_UNCORRELATED, "SD 1 holds")
#: Values of a trial whose scaling is measured; fewer of many trials, and none if so few agree by chance.
MOST_SCALED, FEWEST_SCALED, _SCALED_NUMBERS = 256, 5, 2_000_000
MOST_COMPARED = 128  # images whose targets are compared with responses
SAME = 0.999  # correlation over these images of a target feature that is a response
MOST_CODED = 512  # trials by which codes of what was shown are looked for

Verdict = Literal["none", "train", "all", "own"]


@dataclass(frozen=True)
class Fit:
    """How far a set of trials is from being standardised by a part of itself.

    Parameters
    ----------
    grouping
        What was standardised at a time: ``everything``, ``subject``, ``session`` or ``run``.
    train
        Distance for the training trials of each group.
    everything
        Distance for all trials of groups that hold training and test trials; infinite if there is none.
    own
        Distance for groups of test trials alone.
    """

    grouping: str
    train: float
    everything: float
    own: float

    @property
    def verdict(self) -> Verdict:
        """What it was fitted on: ``all`` (test trials too), ``train``, ``own`` (each group by itself) or ``none``."""
        if self.everything < TOLERANCE and self.everything * CLOSER < self.train and self.train > EXACT:
            return "all"
        if self.train < TOLERANCE:
            return "own" if self.own < TOLERANCE else "train"
        return "none"


def iterate_rows(data: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ascending row numbers and their trials, float64 of shape (n, n_features, n_samples)."""
    for chunk, block in iterate_blocks(data, rows, _BLOCK_BYTES):
        yield chunk, np.asarray(block, dtype=np.float64).reshape(len(chunk), data.shape[1], -1)


def fit_standardised(data: np.ndarray, groups: np.ndarray, is_train: np.ndarray, grouping: str) -> Fit | None:
    """Measure how well "mean 0, standard deviation 1" holds, feature by feature.

    Parameters
    ----------
    data : array of shape (n_trials, n_features[, n_times])
        Times are samples of their feature.
    groups : array of shape (n_trials,)
        What is standardised at a time.
    is_train : bool array of shape (n_trials,)
        Trials that it may be fitted on.

    Returns
    -------
    Fit, or None if the sums would not fit into memory or no group has a training trial.
    """
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    n_features = data.shape[1]
    if 2 * len(names) * n_features * 16 > _LARGEST_SUMS or not is_train.any():
        return None
    cells = 2 * codes + is_train
    count = np.zeros(2 * len(names))
    total, squares = np.zeros((2, 2 * len(names), n_features))
    for chunk, block in iterate_rows(data, np.arange(len(data))):
        for cell in np.unique(cells[chunk]):
            own = block[cells[chunk] == cell]
            count[cell] += own.shape[0] * own.shape[2]
            total[cell] += own.sum(axis=(0, 2))
            squares[cell] += np.einsum("ijk,ijk->j", own, own)
    has_test, has_train = count[0::2] > 0, count[1::2] > 0
    both = has_test & has_train
    merged = [sums[0::2] + sums[1::2] for sums in (count, total, squares)]
    return Fit(
        grouping,
        _distance(count[1::2][has_train], total[1::2][has_train], squares[1::2][has_train]),
        _distance(*(sums[both] for sums in merged)),
        _distance(*(sums[has_test & ~has_train] for sums in merged)),
    )


def _distance(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> float:
    """Return the root mean square of the means and of the deviations of the spreads from one."""
    kept = count > 1
    if not kept.any():
        return np.inf
    mean = total[kept] / count[kept, None]
    spread = np.sqrt(np.maximum(squares[kept] / count[kept, None] - mean**2, 0))
    varies = spread > 1e-6  # constant features become 0, and filled-up ones are
    if not varies.any():
        return np.inf
    return float(np.sqrt(0.5 * (np.square(mean[varies]).mean() + np.square(spread[varies] - 1).mean())))


def fit_whitened(data: np.ndarray, groups: np.ndarray, is_train: np.ndarray, grouping: str) -> Fit | None:
    """Measure how well "identity covariance" holds over the samples of each group; as `fit_standardised`.

    Returns None if there are too many features for the matrices, or fewer samples than features.
    """
    names, codes = np.unique(groups.astype(str), return_inverse=True)
    n_features = data.shape[1]
    if 2 * len(names) * n_features**2 * 8 > _LARGEST_SUMS or n_features < 2 or not is_train.any():
        return None
    cells = 2 * codes + is_train
    sums = np.zeros((2 * len(names), n_features + 1, n_features + 1))
    for chunk, block in iterate_rows(data, np.arange(len(data))):
        for cell in np.unique(cells[chunk]):
            samples = block[cells[chunk] == cell].transpose(1, 0, 2).reshape(n_features, -1)
            samples = np.vstack([samples, np.ones(samples.shape[1])])
            sums[cell] += samples @ samples.T
    count = sums[:, -1, -1]
    has_test, has_train = count[0::2] > 0, count[1::2] > 0
    merged = sums[0::2] + sums[1::2]
    fits = (sums[1::2][has_train], merged[has_test & has_train], merged[has_test & ~has_train])
    return Fit(grouping, *(_distance_from_identity(part) for part in fits))


def _distance_from_identity(sums: np.ndarray) -> float:
    """Return the largest distance over groups; each matrix holds products, sums in the last row, and the count."""
    worst = 0.0 if len(sums) else np.inf
    for matrix in sums:
        n, n_features = matrix[-1, -1], len(matrix) - 1
        if n <= n_features:
            return np.inf
        mean = matrix[-1, :-1] / n
        covariance = matrix[:-1, :-1] / n - np.outer(mean, mean)
        off = [covariance * factor - np.eye(n_features) for factor in (1.0, n / (n - 1))]  # either divisor
        worst = max(worst, min(float(np.sqrt(np.square(part).mean())) for part in off))
    return worst


def compute_moments(data: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of every value of the flattened trials, in float64 and in two passes."""
    width = int(np.prod(data.shape[1:]))
    mean, squares = np.zeros(width), np.zeros(width)
    for chunk, block in iterate_rows(data, rows):
        mean += block.reshape(len(chunk), -1).sum(axis=0)
    mean /= max(1, len(rows))
    for chunk, block in iterate_rows(data, rows):
        squares += np.square(block.reshape(len(chunk), -1) - mean).sum(axis=0)
    return mean, np.sqrt(squares / max(1, len(rows)))


# --- mean 0, spread 1 -------------------------------------------------------------------------------------


def _list_groupings(run: AuditedRun) -> dict[str, np.ndarray]:
    trials = run.responses.trials
    named = {"everything": np.zeros(len(trials), dtype=int).astype(object)}
    named |= {side: make_groups(trials, side) for side in ("subject", "session", "run")}
    distinct: dict[str, np.ndarray] = {}
    for name, groups in named.items():
        n = len(set(groups.tolist()))
        if all(len(set(other.tolist())) != n for other in distinct.values()):
            distinct[name] = groups
    return distinct


def check_standardised(run: AuditedRun) -> list[AuditFinding]:
    """Find the trials over which mean 0 and standard deviation 1 hold, by the smallest groups that fit."""
    data, is_training = run.responses.data, run.is_training
    if data.ndim < 2:
        return []
    groupings = _list_groupings(run)
    fits = [fit_standardised(data, groups, is_training, name) for name, groups in groupings.items()]
    plan = run.meta.get("provenance", {}).get("plan", {})
    scaling = _read_cleaning(run).get("scaling")
    of_baseline = "baseline" in plan and scaling is None  # as THINGS-MEG's authors divided each epoch
    # Else of volumes, not of trials.
    claimed = run.responses.unit == "z" and plan.get("zscore") != "none" and not of_baseline
    best = _find_finest(fits)
    if best is None or best.verdict == "none":
        # Clamped values have another spread than the one they were divided by.
        is_clamped = isinstance(scaling, dict) and scaling.get("clamp") is not None
        if claimed and not is_clamped:
            nearest = "" if best is None else f" (nearest: {best.grouping}, off by {best.train:.2g})"
            text = f"the responses are called z-scores, but no set of training trials has mean 0 and SD 1{nearest}."
            return [AuditFinding("standardising", "warning", text)]
        return [AuditFinding("standardising", "ok", "the stored responses are not standardised over trials.")]
    return [
        _judge_standardised(run, best, groupings[best.grouping], claimed, "standardising", "mean 0 and SD 1")
    ]


def _find_finest(fits: list[Fit | None]) -> Fit | None:
    """Return the fit of the smallest groups that are standardised, since larger ones are so through them.

    Where none is, the nearest one.
    """
    known = [fit for fit in fits if fit is not None]
    fitting = [fit for fit in known if fit.verdict != "none"]
    return fitting[-1] if fitting else min(known, key=lambda fit: fit.train, default=None)


def _find_calibrated(run: AuditedRun, groups: np.ndarray) -> int | None:
    """Return the first fold whose test trials are scaled by trials that the fold itself does not learn from."""
    for number, fold in enumerate(run.folds):
        foreign = run.is_training & pd.Series(groups).isin(groups[fold.test]).to_numpy()
        foreign[fold.train] = False
        if foreign.any():
            return number
    return None


def _judge_standardised(
    run: AuditedRun, fit: Fit, groups: np.ndarray, claimed: bool, check: str, property_: str
) -> AuditFinding:
    by = "over everything" if fit.grouping == "everything" else f"per {fit.grouping}"
    if fit.verdict == "all":
        text = (
            f"{property_} hold {by} over training and test trials together (off by {fit.everything:.1g}), not over "
            f"training trials (off by {fit.train:.1g}): test trials were used in the statistics"
        )
        notes = run.meta.get("provenance", {})
        if "included" in str(notes.get("standardised", "") if isinstance(notes, dict) else ""):
            # What authors did before they published, which every user of the copy must report.
            return AuditFinding(check, "transductive", f"{text}, as published ({notes['standardised']}).")
        return AuditFinding(check, "leak", f"{text}{'' if claimed else ', and no record says so'}.")
    both_sides = (set(groups[fold.train].tolist()) & set(groups[fold.test].tolist()) for fold in run.folds)
    mixed = next((number for number, shared in enumerate(both_sides) if shared), None)
    if (run.is_tested & run.is_training).any():  # every trial is tested in one fold or another
        if mixed is not None:
            text = (
                f"{property_} hold {by} over trials that are in training and test of folds: test "
                "trials were used in them."
            )
            return AuditFinding(check, "leak", text, name_fold(mixed))
        return AuditFinding(
            check, "transductive", f"{property_} hold {by}: test trials are standardised by themselves."
        )
    if fit.verdict == "own":
        own = sorted(set(groups[run.is_tested].tolist()) - set(groups[run.is_training].tolist()))
        text = f"groups without training trials are standardised by their own test trials, first {list_first(own)}."
        return AuditFinding(check, "transductive", text)
    if (fold := _find_calibrated(run, groups)) is not None:
        text = (
            f"{property_} hold {by}: trials outside the fold, of the same {fit.grouping}, scale test trials."
        )
        return AuditFinding(check, "transductive", text, name_fold(fold))
    return AuditFinding(
        check, "ok", f"{property_} hold {by} over training trials alone (off by {fit.train:.1g})."
    )


# --- whitening --------------------------------------------------------------------------------------------


def check_whitened(run: AuditedRun) -> list[AuditFinding]:
    """Find the trials whose covariance whitens the responses: by the stored matrices, or by the numbers."""
    coords = run.responses.coords
    if "whitening" in coords:
        return _check_mvnn(run)
    if run.responses.unit == "whitened":
        text = (
            "the responses were whitened before they were published; whether test trials had a part in "
            "it cannot be seen here."
        )
        return [AuditFinding("whitening", "warning", text)]
    if run.responses.data.ndim < 2:
        return []
    groupings, is_training = _list_groupings(run), run.is_training
    groupings.pop("run", None)
    fits = [fit_whitened(run.responses.data, groups, is_training, name) for name, groups in groupings.items()]
    best = _find_finest(fits)
    if best is None or best.verdict == "none":
        return [AuditFinding("whitening", "ok", "the stored responses are not whitened.")]
    return [
        _judge_standardised(
            run, best, groupings[best.grouping], False, "whitening", "uncorrelated unit variances"
        )
    ]


def _check_mvnn(run: AuditedRun) -> list[AuditFinding]:
    """Undo the stored whitening and fit it again from training trials, and from all trials."""
    coords, trials = run.responses.coords, run.responses.trials
    is_training, keys = run.is_training, trials[["subject", "session"]].astype(str)
    plan = run.meta.get("provenance", {}).get("plan", {})
    findings, names = [], []
    if "whitening_channels" in coords:
        text = (
            f"the noise was fitted on {len(coords['whitening_channels'])} channels, of which "
            f"{len(coords['ch_names'])} are stored: whether test trials had a part in it cannot be seen here."
        )
        return [AuditFinding("whitening", "warning", text)]
    for matrix, group in zip(np.asarray(coords["whitening"]), coords["whitening_sessions"], strict=True):
        rows = np.flatnonzero((keys == list(map(str, group))).all(axis=1).to_numpy())
        name = "subject {}, session {}".format(*group)
        names.append(name)
        if not len(rows):
            continue
        off = {}
        for who, fitted in (("train", rows[is_training[rows]]), ("all", rows)):
            off[who] = _measure_whitening(run, matrix, fitted, str(plan.get("mvnn", "epochs")))
        if off["train"] < WHITENING_TOLERANCE and not off["all"] * CLOSER < off["train"]:
            continue
        if off["all"] < WHITENING_TOLERANCE:
            level: Level = "leak"
            text = (
                f"the noise covariance of {name} is that of training and test trials (off by {off['all']:.1g}), not of "
                f"training trials (off by {off['train']:.1g})."
            )
        else:
            level = "warning"
            text = f"the noise covariance of {name} is not that of these trials (off by {off['train']:.1g})."
        findings.append(AuditFinding("whitening", level, text, name))
    if not findings and (fold := _find_calibrated(run, make_groups(trials, "session"))) is not None:
        text = "test trials are whitened by other trials of their session, which are not in training."
        return [AuditFinding("whitening", "transductive", text, name_fold(fold))]
    text = f"the noise covariance of {len(names)} session(s) is that of their training trials."
    return findings or [AuditFinding("whitening", "ok", text)]


def _measure_whitening(run: AuditedRun, matrix: np.ndarray, rows: np.ndarray, variant: str) -> float:
    """Return how far the covariance of these trials, whitened by the stored matrix, is from the identity."""
    if not len(rows):
        return np.inf
    inverse = np.linalg.inv(np.asarray(matrix, dtype=np.float64))
    coords = run.responses.coords
    # Subtracted from each trial's channels after whitening, and what they were divided by: (n_trials, n_channels) each
    shape = (run.responses.n_trials, run.responses.data.shape[1])
    centre, scale = np.broadcast_to(np.float32(0), shape), np.broadcast_to(np.float32(1), shape)
    if "scaling_centre" in coords:
        codes = _code_groups(run)
        centre = np.asarray(coords["scaling_centre"])[codes]
        scale = np.asarray(coords["scaling_scale"])[codes]
    conditions = run.responses.stimulus_ids[rows].astype(str)
    total = CovarianceSum(len(matrix))
    try:
        if variant == "time":
            for name in np.unique(conditions):
                total.add_condition(_undo(run, rows[conditions == name], inverse, centre, scale))
        else:
            weights = compute_condition_weights(conditions)
            for chunk, _ in iterate_rows(run.responses.data, rows):
                epochs = _undo(run, chunk, inverse, centre, scale)
                total.add(epochs, weights[np.searchsorted(rows, chunk)])
        covariance = total.finish()
    except DataError:  # images without repetitions have no covariance over repetitions
        return np.inf
    whitened = matrix @ covariance @ matrix
    return float(np.sqrt(np.square(whitened - np.eye(len(matrix))).mean()) / np.sqrt(1 / len(matrix)))


def _code_groups(run: AuditedRun) -> np.ndarray:
    groups = [tuple(map(str, group)) for group in run.responses.coords["scaling_groups"]]
    keys = run.responses.trials[["subject", "session"]].astype(str).to_numpy()[:, : len(groups[0])]
    return np.array([groups.index(tuple(key)) for key in keys.tolist()])


def _undo(
    run: AuditedRun, rows: np.ndarray, inverse: np.ndarray, centre: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    epochs = np.asarray(run.responses.data[rows], dtype=np.float64)
    epochs = epochs * scale[rows][:, :, None] + centre[rows][:, :, None]
    return np.matmul(inverse, epochs)


# --- scaling by quartiles ---------------------------------------------------------------------------------


def check_scaling(run: AuditedRun) -> list[AuditFinding]:
    """Measure over which trials median 0 and interquartile range 1 hold; z-scores are seen by `check_standardised`."""
    if "scaling_centre" not in run.responses.coords or run.responses.unit != "IQR":
        return _check_unrecorded_scaling(run)
    codes, is_training = _code_groups(run), run.is_training
    findings = []
    for code, group in enumerate(run.responses.coords["scaling_groups"]):
        rows = np.flatnonzero(codes == code)
        off = [np.inf, np.inf]
        for place, part in enumerate((rows[is_training[rows]], rows)):
            if len(part):
                found = fit_robust_scaler(run.responses.data, part, clamp=None)
                off[place] = float(max(np.abs(found.centre).max(), np.abs(found.scale - 1).max()))
        name = " ".join(map(str, group))
        if off[1] < ROBUST_TOLERANCE and off[1] * CLOSER < off[0]:
            text = (
                f"median 0 and interquartile range 1 hold over training and test trials of {name} together."
            )
            findings.append(AuditFinding("scaling", "leak", text, name))
        elif off[0] > ROBUST_TOLERANCE:
            text = f"the training trials of {name} do not have median 0 and interquartile range 1 (off {off[0]:.1g})."
            findings.append(AuditFinding("scaling", "warning", text, name))
    text = "median 0 and interquartile range 1 hold over training trials alone."
    return findings or [AuditFinding("scaling", "ok", text)]


def _check_unrecorded_scaling(run: AuditedRun) -> list[AuditFinding]:
    """Find scaling of single features that no record names: to a range, to unit length, by medians, by ranks."""
    data, notes = run.responses.data, run.meta.get("provenance", {})
    # Z-scores are judged by `check_standardised`, with what authors say of them.
    if data.ndim < 2 or run.responses.unit == "z" or (isinstance(notes, dict) and notes.get("standardised")):
        return []
    n_values = int(np.prod(data.shape[1:]))
    n_picked = min(n_values, MOST_SCALED, max(FEWEST_SCALED, _SCALED_NUMBERS // max(1, len(data))))
    picked = np.linspace(0, n_values - 1, n_picked).astype(int)
    values = np.asarray(data.reshape(len(data), -1)[:, picked], dtype=np.float64)  # (n_trials, n_picked)
    # Statistics of all trials hold over the trials of every fold.
    train, test = (np.isin(np.arange(len(data)), rows) for rows in (run.folds[0].train, run.folds[0].test))
    for name, groups in _list_groupings(run).items() if n_picked >= FEWEST_SCALED else ():
        shared = sorted(set(groups[train].tolist()) & set(groups[test].tolist()))
        if not shared:
            continue
        own = groups == shared[0]
        rows = np.flatnonzero(train[own]), np.flatnonzero(test[own])
        if text := describe_scaling(values[own], rows[0], rows[1], "trials", leaves_out=_OTHERS_FIND):
            by = "" if name == "everything" else f" per {name}"
            # Centring moves every test trial alike.
            level: Level = "transductive" if text.startswith((_CENTRED, _ONE_MEAN)) else "leak"
            text = f"of the stored responses, {text}{by}: test trials were used in their scaling; no record says so."
            return [AuditFinding("scaling", level, text)]
    return []


# --- components and codes ---------------------------------------------------------------------------------


def check_components(run: AuditedRun) -> list[AuditFinding]:
    """Look for features that are uncorrelated over all trials and not over training trials: they are components."""
    data = run.responses.data
    if data.ndim != 2 or not 5 <= data.shape[1] <= MOST_COMPONENTS or not run.is_training.any():
        return []
    ok = AuditFinding("components", "ok", "the features are not components of all trials.")
    overall = _measure_correlations(data, np.arange(len(data)))
    if overall >= UNCORRELATED:
        return [ok]
    training = _measure_correlations(data, np.flatnonzero(run.is_training))
    if overall * 10 * CLOSER < training:
        text = (
            f"the features are uncorrelated over training and test trials together (root mean square {overall:.1g}), "
            f"not over training trials ({training:.1g}): they are components of all trials."
        )
        return [AuditFinding("components", "leak", text)]
    return [ok]


def describe_scaling(
    values: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    rows_are: str,
    *,
    leaves_out: Collection[str] = (),
) -> str:
    """Say that scaling, or components, of some rows hold over test rows and not over training rows alone.

    Parameters
    ----------
    values : array of shape (n_rows, n_features)
        Target embeddings, or responses.
    train, test : int arrays
        Training and test rows; others are of images that nobody saw.
    rows_are
        What a row is, in the plural.
    leaves_out
        Properties that another check looks for.

    Examples
    --------
    >>> values = np.random.default_rng(0).normal(size=(50, 4))
    >>> describe_scaling(values - values.mean(axis=0), np.arange(40), np.arange(40, 50), "images").split(" (")[0]
    'mean 0 holds over training and test images'
    """
    sets = {
        f"training and test {rows_are}": np.union1d(train, test),
        f"test {rows_are} alone": test,
        f"all {rows_are}": np.arange(len(values)),
    }
    by_set = {name: _measure_scaling(values, rows) for name, rows in {**sets, "train": train}.items()}
    for words, training in by_set["train"].items():
        if words in leaves_out:
            continue
        limit = UNCORRELATED if words == _UNCORRELATED else TOLERANCE
        for name in sets:
            off = by_set[name].get(words, np.inf)
            if off < limit and off * CLOSER < training and training > EXACT:
                return f"{words} over {name} (off by {off:.1g}), not over training {rows_are} (off by {training:.2g})"
            if words == _CENTRED and name.endswith("alone") and max(off, training) < EXACT:
                return f"{words} over {name}, and over training {rows_are} alone"
    return ""


def describe_responses_in_targets(vectors: np.ndarray, responses: np.ndarray) -> str:
    """Say that features of targets are features of the responses to their images; else nothing.

    Parameters
    ----------
    vectors : array of shape (n_images, n_features)
    responses : array of shape (n_images, n_values)
        Averaged over the trials of each image.

    Examples
    --------
    >>> responses = np.random.default_rng(0).normal(size=(40, 6))
    >>> describe_responses_in_targets(3 * responses[:, :2] + 1, responses)
    '2 feature(s) are those of the responses, first feature 0 (correlation 1)'
    """
    one, other = (_standardise(array) for array in (vectors, responses))
    # (n_features,)
    alike = np.concatenate(
        [np.abs(one[:, k : k + 64].T @ other).max(axis=1, initial=0) for k in range(0, one.shape[1], 64)]
    ) / len(one)
    found = np.flatnonzero(alike > SAME)
    if not len(found):
        return ""
    first = f"first feature {found[0]} (correlation {alike[found[0]]:.4g})"
    return f"{len(found)} feature(s) are those of the responses, {first}"


def _standardise(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values - values.mean(axis=0, dtype=np.float64), dtype=np.float32)
    spread = values.std(axis=0)
    return np.asarray(values / np.where(spread > 1e-6 * spread.max(initial=0), spread, np.inf))


def _measure_scaling(vectors: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Return how far some rows are from each property that scaling by them gives, in words of the property."""
    mean, spread = compute_moments(vectors, rows)
    varies = spread > 1e-6 * max(float(spread.max(initial=0.0)), 1e-30)
    if len(rows) < 2 or not varies.any():
        return {}
    values = np.asarray(vectors[rows][:, varies], dtype=np.float64)
    low, median, high = np.percentile(values, [25, 50, 75], axis=0)
    ends = np.stack([values.min(axis=0), values.max(axis=0)])
    n, spread = len(rows), spread[varies]

    def root(off: np.ndarray) -> float:
        return float(np.sqrt(np.square(off).mean()))

    found = {
        "SD 1 holds": min(root(spread * factor - 1) for factor in (1.0, np.sqrt(n / (n - 1)))),
        "median 0 holds": root(median / spread),
        "interquartile range 1 holds": root(high - low - 1),
        "length 1 of each feature holds": root(np.sqrt(n * (spread**2 + mean[varies] ** 2)) - 1),
    }
    # Clamped values share their bounds.
    if np.median((values == ends[1]).sum(axis=0)) < 2:
        found["one minimum and maximum of all features holds"] = root(
            (ends - ends.mean(axis=1)[:, None]) / spread
        )
    ordered = np.sort(values, axis=0)
    found["one distribution of all features holds"] = root((ordered - ordered.mean(axis=1)[:, None]) / spread)
    if 5 <= vectors.shape[1] <= MOST_COMPONENTS:
        found[_UNCORRELATED] = _measure_correlations(vectors, rows)
    # Last, as what is more than a shift is reported first.
    found[_CENTRED] = root(mean[varies] / spread)
    found[_ONE_MEAN] = root((mean[varies] - mean[varies].mean()) / spread)
    return found


def _measure_correlations(data: np.ndarray, rows: np.ndarray) -> float:
    """Return the root mean square correlation of two features over some trials."""
    total, products, n = np.zeros(data.shape[1]), np.zeros((data.shape[1], data.shape[1])), len(rows)
    centre = np.asarray(data[rows[: 2 * data.shape[1]]], dtype=np.float64).mean(
        axis=0
    )  # lest large means round
    for _, block in iterate_rows(data, rows):
        values = block[:, :, 0] - centre
        total += values.sum(axis=0)
        products += values.T @ values
    covariance = products / n - np.outer(total / n, total / n)
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    varies = spread > 1e-6 * spread.max()
    if varies.sum() < 5:
        return np.inf
    correlations = (covariance / np.outer(spread, spread))[np.ix_(varies, varies)]
    return float(np.sqrt(np.square(correlations[np.triu_indices(len(correlations), 1)]).mean()))


def check_codes(run: AuditedRun) -> list[AuditFinding]:
    """Look for features that say what was shown: a class label, or the trigger channel of the stimulus.

    Such a feature has one value in all trials of a concept or image, which no recording has; or its values are whole
    numbers of a step in the order of the images.
    """
    ids, concepts = run.responses.stimulus_ids.astype(str), run.concepts.astype(str)
    found: dict[int, str] = {}
    n_features = run.responses.data.shape[1]
    for words, names in (("concept", concepts), ("image", ids)):
        rows = _pick_groups(names)
        if len(rows) >= 12:
            for values in _summarise_trials(run.responses.data, rows):
                for feature in _find_constant(values, names[rows]):
                    found.setdefault(int(feature), f"has one value in all trials of one {words}")
    rows = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), MOST_CODED)).astype(int))
    orders = [np.unique(ids[rows], return_inverse=True)[1], pd.factorize(ids[rows])[0]]
    orders += [np.unique(concepts[rows], return_inverse=True)[1], pd.factorize(concepts[rows])[0]]
    for values in _summarise_trials(run.responses.data, rows):
        for feature in _find_ordered(values, orders):
            found.setdefault(int(feature), "counts the images or concepts")
    # Where all do, the data are simulated without noise, and tell no more than they should.
    if not found or len(found) > n_features / 2:
        return [AuditFinding("codes", "ok", "no feature is a label or a code of the shown image.")]
    first = min(found)
    ch_names = run.responses.coords.get("ch_names")
    name = str(ch_names[first]) if ch_names is not None and len(ch_names) == n_features else str(first)
    dim = run.responses.dims[1]
    text = f"{len(found)} {dim}(s) are codes of the shown image, first {name}, which {found[first]}; leave them out."
    return [AuditFinding("codes", "leak", text)]


def _pick_groups(names: np.ndarray) -> np.ndarray:
    """Return up to `MOST_CODED` rows, two to four of each of some names that occur at least twice."""
    order = np.argsort(names, kind="stable")
    _, starts, counts = np.unique(names[order], return_index=True, return_counts=True)
    picked: list[int] = []
    for start, count in zip(starts, counts, strict=True):
        if count > 1 and len(picked) < MOST_CODED:
            places = np.unique(np.linspace(0, count - 1, min(count, 4)).astype(int))
            picked += order[start + places].tolist()
    return np.sort(np.array(picked, dtype=np.int64))


def _summarise_trials(data: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Return mean and largest value of every feature in some trials, each of shape (n_rows, n_features)."""
    blocks = [block for _, block in iterate_rows(data, rows)]
    mean = np.concatenate([block.mean(axis=2) for block in blocks])
    return [mean] if data.ndim == 2 else [mean, np.concatenate([block.max(axis=2) for block in blocks])]


def _find_constant(values: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return the features that vary between names and not within them."""
    codes = np.unique(names, return_inverse=True)[1]
    sums = np.zeros((codes.max() + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    means = sums / np.bincount(codes)[:, None]
    within = np.square(values - means[codes]).mean(axis=0)
    whole = values.var(axis=0)
    constant = (whole > 1e-12 * np.square(values).max(axis=0)) & (within < 1e-8 * whole)
    # Two groups of values may be the two halves of anything.
    return np.array(
        [f for f in np.flatnonzero(constant) if len(np.unique(np.round(means[:, f], 6))) > 2], dtype=int
    )


def _find_ordered(values: np.ndarray, orders: list[np.ndarray]) -> list[int]:
    """Return the features that are a multiple of one step throughout and rise or fall with one of the orders."""
    found = []
    for feature in range(values.shape[1]):
        levels = np.unique(values[:, feature])
        steps = np.diff(levels)
        if len(levels) < 5 or steps.min() <= 1e-9 * np.abs(levels).max():
            continue
        counts = steps / steps.min()
        if np.abs(counts - np.round(counts)).max() > 1e-3 or counts.sum() > 10 * len(values):
            continue
        ranks = np.searchsorted(levels, values[:, feature])
        if any(abs(np.corrcoef(ranks, order)[0, 1]) > 0.999 for order in orders if np.ptp(order) > 0):
            found.append(feature)
    return found


# --- what only the record knows ---------------------------------------------------------------------------


def _read_cleaning(run: AuditedRun) -> Mapping[str, Any]:
    notes = run.meta.get("provenance", {})
    cleaning = notes.get("cleaning") if isinstance(notes, dict) else None
    return cleaning if isinstance(cleaning, dict) else {}


def check_record(run: AuditedRun) -> list[AuditFinding]:
    """List what cleaning the data set declares that leaves no trace in the numbers."""
    notes, cleaning = run.meta.get("provenance", {}), _read_cleaning(run)
    findings = []
    for name in ("ica", "autoreject"):
        if cleaning.get(name):
            text = (
                f"{name} learns from training trials according to its code; without the recordings it "
                "cannot be fitted again here."
            )
            findings.append(AuditFinding("cleaning", "ok", text))
    if (cleaning.get("autoreject") or {}).get("reject") == "all":
        text = "autoreject leaves out test trials by their own signal, so easier trials are tested."
        findings.append(AuditFinding("cleaning", "transductive", text))
    if own := notes.get("standardised_with_own_test_trials"):
        text = f"{len(own)} session(s) or run(s) are standardised by their own test trials, first {list_first(own)}."
        findings.append(AuditFinding("cleaning", "transductive", text))
    said = str(notes.get("standardised", ""))
    if "included" in said:
        findings.append(AuditFinding("cleaning", "transductive", f"published as {said}."))
    for text in run.responses.coords.get("warnings", []):
        findings.append(AuditFinding("cleaning", "warning", f"the data set says: {text}"))
    return findings
