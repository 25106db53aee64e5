"""Audit of a finished run: whether anything of the test reached a fitted statistic or a choice.

Owns the order of the checks and their verdict. Each check works from the files of a run folder alone: trial table,
stored numbers, pixels, ``split.json`` and the provenance of each artifact. What can be recomputed is not believed. What
leaves no trace in a run folder is listed in ``docs/AUDIT.md``. How each part was verified is told by the checks; see
`braindecode_vis.audit.findings`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from braindecode_vis.audit.design import check_design
from braindecode_vis.audit.files import AuditedRun, open_audited
from braindecode_vis.audit.findings import LEVELS, Audit, AuditFinding, PartStatus
from braindecode_vis.audit.fits import (
    check_features,
    check_inputs,
    check_refit,
    check_target_means,
    check_targets,
)
from braindecode_vis.audit.quick import FIRST
from braindecode_vis.audit.records import (
    check_held_out,
    check_logs,
    check_options,
    check_penalties,
)
from braindecode_vis.audit.split_overlap import (
    check_likeness,
    check_near_copies,
    check_pixels,
    check_sides,
    check_split_settings,
    check_used,
)
from braindecode_vis.audit.statistics import (
    check_record,
    check_scaling,
    check_standardised,
    check_whitened,
)

SPLIT = (check_sides, check_pixels, check_likeness, check_near_copies, check_split_settings, check_used)
STATISTICS = (check_standardised, check_whitened, check_scaling, check_record)
FITS = (check_inputs, check_features, check_targets, check_target_means)
CHOICES = (check_penalties, check_logs, check_held_out)
SETTINGS = (check_design, check_options)

__all__ = ["LEVELS", "Audit", "AuditFinding", "AuditedRun", "PartStatus", "audit_run"]


def audit_run(folder: Path, *, refit: bool = False, seed: int = 0) -> Audit:
    """Audit a run folder; nothing in it is changed.

    Parameters
    ----------
    folder
        A run folder, finished or not; stages that are missing are said to be.
    refit
        Also fit every fold twice, on clean and on poisoned test trials; see `check_refit`.
    seed
        Of the permutations of the design check.

    Returns
    -------
    Audit

    Raises
    ------
    DataError
        If the folder holds no prepared data, or a file that every check needs cannot be read.
    """
    from safetensors import SafetensorError

    run = open_audited(folder, thorough=refit, seed=seed)
    findings = [finding for check in FIRST for finding in check(run)]
    if any(finding.check == "trials" and finding.level == "leak" for finding in findings):
        return Audit(run.folder, tuple(findings), tuple(run.verified))
    findings += [finding for check in SPLIT for finding in check(run)]
    try:
        findings += [finding for check in STATISTICS for finding in check(run)]
        if not run.trained:
            findings.append(AuditFinding("training", "warning", "nothing was trained yet."))
        elif not refit:
            run.state("fit", "by record", "weights", "add --refit")
        fits = (*FITS, *CHOICES) if run.trained else ()
        last = (check_refit,) if refit else ()
        findings += [finding for check in (*fits, *SETTINGS, *last) for finding in check(run)]
        findings += _check_low_level(run, findings)
    except SafetensorError as error:  # `check_chain` has named the file that is not as it was written
        text = f"tampered: a file of weights cannot be read ({error}), so that fits cannot be judged."
        findings.append(AuditFinding("training", "leak", text))
    return Audit(run.folder, tuple(findings), tuple(run.verified))


def _check_low_level(run: AuditedRun, told: list[AuditFinding]) -> list[AuditFinding]:
    """Judge the fits of the low-level branch like those of the encoder; what was told already is not repeated."""
    low = run.low_level
    if low is None:
        made = [record.fields for record in run.chain if record.content.get("stage") == "reconstruct"]
        if any((fields.get("reconstruction") or {}).get("low_level") for fields in made):
            text = "the reconstructions do not name the fits of their low-level branch; make them again to judge them."
            return [AuditFinding("low-level", "warning", text)]
        return []
    checks = (check_used, *FITS, *CHOICES, check_options, *((check_refit,) if run.thorough else ()))
    known = {(item.check, item.message) for item in told if "fold" not in item.where}
    findings = [
        replace(item, where=f"low-level branch {item.where}".strip())
        for check in checks
        for item in check(low)
        if item.level != "ok" and (item.check, item.message) not in known
    ]
    text = "the branch was fitted on the training trials of its folds, as the run's own encoder was."
    return findings or [AuditFinding("low-level", "ok", text)]
