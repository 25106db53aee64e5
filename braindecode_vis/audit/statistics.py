"""Statistics that preprocessing learnt: whose trials standardisation and whitening come from.

Each is worked out again from the stored responses, once from training trials and once from all; the record is asked
only for what cannot be seen in the numbers (independent components, thresholds of artefacts, what authors did before
they published).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from braindecode_vis.audit.files import AuditedRun, Finding, Level, list_first, name_fold
from braindecode_vis.audit.moments import (
    CLOSER,
    Fit,
    fit_standardised,
    fit_whitened,
    iterate_rows,
)
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.scaling import fit_robust_scaler
from braindecode_vis.preprocessing.splits import make_groups
from braindecode_vis.preprocessing.whitening import CovarianceSum, compute_condition_weights

WHITENING_TOLERANCE = 5e-3  # of the whitened covariance; float16 trials reach 1e-3
ROBUST_TOLERANCE = 5e-3


def check_statistics(run: AuditedRun) -> list[Finding]:
    """Find out who taught standardisation, whitening and cleaning."""
    return [*_check_standardised(run), *_check_whitened(run), *_check_scaling(run), *_check_record(run)]


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


def _who_may_teach(run: AuditedRun) -> np.ndarray:
    """Return the trials that no fold tests, or those declared for training where every trial is tested."""
    is_tested = np.zeros(run.responses.n_trials, dtype=bool)
    for fold in run.folds:
        is_tested[fold.test] = True
    return run.teaches if is_tested.all() else ~is_tested & run.teaches


def _find_mixed(run: AuditedRun, groups: np.ndarray) -> int | None:
    """Return the first fold in which a group holds training and test trials."""
    for number, fold in enumerate(run.folds):
        if set(groups[fold.train].tolist()) & set(groups[fold.test].tolist()):
            return number
    return None


# --- mean 0, spread 1 -------------------------------------------------------------------------------------


def _check_standardised(run: AuditedRun) -> list[Finding]:
    data, teaches = run.responses.data, _who_may_teach(run)
    if data.ndim < 2:
        return []
    groupings = _list_groupings(run)
    fits = [fit_standardised(data, groups, teaches, name) for name, groups in groupings.items()]
    plan = run.meta.get("provenance", {}).get("plan", {})
    claimed = run.responses.unit == "z" and plan.get("zscore") != "none"  # else of volumes, not of trials
    best = _find_finest(fits)
    if best is None or best.verdict == "none":
        if claimed and not _has_clamp(run):
            nearest = "" if best is None else f" (nearest: {best.grouping}, off by {best.train:.2g})"
            text = f"the responses are called z-scores, but no set of training trials has mean 0 and SD 1{nearest}."
            return [Finding("standardising", "warning", text)]
        return [Finding("standardising", "ok", "the stored responses are not standardised over trials.")]
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
    teaches = _who_may_teach(run)
    for number, fold in enumerate(run.folds):
        foreign = teaches & np.isin(groups, groups[fold.test])
        foreign[fold.train] = False
        if foreign.any():
            return number
    return None


def _has_clamp(run: AuditedRun) -> bool:
    scaling = _read_cleaning(run).get("scaling")
    return isinstance(scaling, dict) and scaling.get("clamp") is not None


def _judge_standardised(
    run: AuditedRun, fit: Fit, groups: np.ndarray, claimed: bool, check: str, property_: str
) -> Finding:
    by = "over everything" if fit.grouping == "everything" else f"per {fit.grouping}"
    if fit.verdict == "all":
        text = (
            f"{property_} hold {by} over training and test trials together (off by {fit.everything:.1g}), not over "
            f"training trials (off by {fit.train:.1g}): test trials taught the statistics"
        )
        return Finding(check, "leak", f"{text}{'' if claimed else ', and no record says so'}.")
    mixed = _find_mixed(run, groups)
    is_tested = np.isin(np.arange(len(groups)), np.concatenate([fold.test for fold in run.folds]))
    if (is_tested & _who_may_teach(run)).any():  # every trial is tested in one fold or another
        if mixed is not None:
            text = f"{property_} hold {by} over trials that folds train on and test: test trials taught the statistics."
            return Finding(check, "leak", text, name_fold(mixed))
        return Finding(
            check, "transductive", f"{property_} hold {by}: test trials are standardised by themselves."
        )
    if fit.verdict == "own":
        own = sorted(set(groups[is_tested].tolist()) - set(groups[_who_may_teach(run)].tolist()))
        text = f"groups without training trials are standardised by their own test trials, first {list_first(own)}."
        return Finding(check, "transductive", text)
    if (fold := _find_calibrated(run, groups)) is not None:
        text = (
            f"{property_} hold {by}: trials outside the fold, of the same {fit.grouping}, scale test trials."
        )
        return Finding(check, "transductive", text, name_fold(fold))
    return Finding(check, "ok", f"{property_} hold {by} over training trials alone (off by {fit.train:.1g}).")


# --- whitening --------------------------------------------------------------------------------------------


def _check_whitened(run: AuditedRun) -> list[Finding]:
    coords = run.responses.coords
    if "whitening" in coords:
        return _check_mvnn(run)
    if run.responses.unit == "whitened":
        text = "the responses were whitened before they were published; whether test trials taught cannot be seen here."
        return [Finding("whitening", "warning", text)]
    if run.responses.data.ndim < 2:
        return []
    groupings, teaches = _list_groupings(run), _who_may_teach(run)
    groupings.pop("run", None)
    fits = [fit_whitened(run.responses.data, groups, teaches, name) for name, groups in groupings.items()]
    best = _find_finest(fits)
    if best is None or best.verdict == "none":
        return [Finding("whitening", "ok", "the stored responses are not whitened.")]
    return [
        _judge_standardised(
            run, best, groupings[best.grouping], False, "whitening", "uncorrelated unit variances"
        )
    ]


def _check_mvnn(run: AuditedRun) -> list[Finding]:
    """Undo the stored whitening and fit it again from training trials, and from all trials."""
    coords, trials = run.responses.coords, run.responses.trials
    teaches, keys = _who_may_teach(run), trials[["subject", "session"]].astype(str)
    plan = run.meta.get("provenance", {}).get("plan", {})
    findings, names = [], []
    for matrix, group in zip(np.asarray(coords["whitening"]), coords["whitening_sessions"], strict=True):
        rows = np.flatnonzero((keys == list(map(str, group))).all(axis=1).to_numpy())
        name = "subject {}, session {}".format(*group)
        names.append(name)
        if not len(rows):
            continue
        off = {}
        for who, taught in (("train", rows[teaches[rows]]), ("all", rows)):
            off[who] = _measure_whitening(run, matrix, taught, str(plan.get("mvnn", "epochs")))
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
        findings.append(Finding("whitening", level, text, name))
    if not findings and (fold := _find_calibrated(run, make_groups(trials, "session"))) is not None:
        text = "test trials are whitened by other trials of their session, which the fold never learnt from."
        return [Finding("whitening", "transductive", text, name_fold(fold))]
    text = f"the noise covariance of {len(names)} session(s) is that of their training trials."
    return findings or [Finding("whitening", "ok", text)]


def _measure_whitening(run: AuditedRun, matrix: np.ndarray, rows: np.ndarray, variant: str) -> float:
    """Return how far the covariance of these trials, whitened by the stored matrix, is from the identity."""
    if not len(rows):
        return np.inf
    inverse = np.linalg.inv(np.asarray(matrix, dtype=np.float64))
    centre, scale = _find_scales(run)
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


def _find_scales(run: AuditedRun) -> tuple[np.ndarray, np.ndarray]:
    """Return what was subtracted from each trial's channels after whitening, and what they were divided by."""
    coords, n = run.responses.coords, len(run.responses.trials)
    shape = (n, run.responses.data.shape[1])
    if "scaling_centre" not in coords:
        return np.broadcast_to(np.float32(0), shape), np.broadcast_to(np.float32(1), shape)
    codes = _code_groups(run)
    return np.asarray(coords["scaling_centre"])[codes], np.asarray(coords["scaling_scale"])[codes]


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


def _check_scaling(run: AuditedRun) -> list[Finding]:
    """Median and interquartile range; z-scores are seen by `_check_standardised`."""
    if "scaling_centre" not in run.responses.coords or run.responses.unit != "IQR":
        return []
    codes, teaches = _code_groups(run), _who_may_teach(run)
    findings = []
    for code, group in enumerate(run.responses.coords["scaling_groups"]):
        rows = np.flatnonzero(codes == code)
        off = [_measure_quartiles(run, part) for part in (rows[teaches[rows]], rows)]
        name = " ".join(map(str, group))
        if off[1] < ROBUST_TOLERANCE and off[1] * CLOSER < off[0]:
            text = (
                f"median 0 and interquartile range 1 hold over training and test trials of {name} together."
            )
            findings.append(Finding("scaling", "leak", text, name))
        elif off[0] > ROBUST_TOLERANCE:
            text = f"the training trials of {name} do not have median 0 and interquartile range 1 (off {off[0]:.1g})."
            findings.append(Finding("scaling", "warning", text, name))
    text = "median 0 and interquartile range 1 hold over training trials alone."
    return findings or [Finding("scaling", "ok", text)]


def _measure_quartiles(run: AuditedRun, rows: np.ndarray) -> float:
    if not len(rows):
        return np.inf
    found = fit_robust_scaler(run.responses.data, rows, clamp=None)
    return float(max(np.abs(found.centre).max(), np.abs(found.scale - 1).max()))


# --- what only the record knows ---------------------------------------------------------------------------


def _read_cleaning(run: AuditedRun) -> Mapping[str, Any]:
    notes = run.meta.get("provenance", {})
    cleaning = notes.get("cleaning") if isinstance(notes, dict) else None
    return cleaning if isinstance(cleaning, dict) else {}


def _check_record(run: AuditedRun) -> list[Finding]:
    notes, cleaning = run.meta.get("provenance", {}), _read_cleaning(run)
    findings = []
    for name in ("ica", "autoreject"):
        if cleaning.get(name):
            text = f"{name} learns from training trials by its code; the recordings are not here to fit it again."
            findings.append(Finding("cleaning", "ok", text))
    if (cleaning.get("autoreject") or {}).get("reject") == "all":
        text = "autoreject leaves out test trials by their own signal, so that easier ones are tested."
        findings.append(Finding("cleaning", "transductive", text))
    if own := notes.get("standardised_with_own_test_trials"):
        text = f"{len(own)} session(s) or run(s) are standardised by their own test trials, first {list_first(own)}."
        findings.append(Finding("cleaning", "transductive", text))
    said = str(notes.get("standardised", ""))
    if "included" in said:
        findings.append(Finding("cleaning", "transductive", f"published as {said}."))
    for text in run.responses.coords.get("warnings", []):
        findings.append(Finding("cleaning", "warning", f"the data set says: {text}"))
    return findings
