"""Audit of a finished run: whether anything of the test reached a fitted statistic or a choice.

Owns the order of the checks and their verdict. Each check works from the files of a run folder alone: trial table,
stored numbers, pixels, ``split.json`` and the provenance of each artifact. What can be recomputed is not believed. What
leaves no trace in a run folder is listed in ``docs/AUDIT.md``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from braindecode_vis.audit.chain import check_chain
from braindecode_vis.audit.choices import check_choices
from braindecode_vis.audit.design import check_design
from braindecode_vis.audit.files import LEVELS, AuditedRun, Finding, open_audited
from braindecode_vis.audit.options import check_options
from braindecode_vis.audit.refit import check_refit
from braindecode_vis.audit.split_overlap import check_split, check_used
from braindecode_vis.audit.statistics import check_statistics
from braindecode_vis.audit.training import check_training

__all__ = ["LEVELS", "Audit", "AuditedRun", "Finding", "audit_run"]


@dataclass(frozen=True)
class Audit:
    """All findings about one run.

    Parameters
    ----------
    folder
        The run folder.
    findings
        In the order of the checks.
    """

    folder: Path
    findings: tuple[Finding, ...]

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """Findings that no score of the run survives."""
        return self.list_level("leak")

    def list_level(self, level: str) -> tuple[Finding, ...]:
        """Return the findings of one of `LEVELS`."""
        return tuple(finding for finding in self.findings if finding.level == level)

    def summarise(self) -> str:
        """Return how many findings there are of each level, in words."""
        counts = Counter(finding.level for finding in self.findings)
        return ", ".join(f"{counts[level]} {level}" for level in LEVELS)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "run_folder": str(self.folder),
            "scores": [],
            "n_leaks": len(self.leaks),
            "findings": [asdict(finding) for finding in self.findings],
        }


def audit_run(folder: Path, *, refit: bool = False, seed: int = 0) -> Audit:
    """Audit a run folder; nothing in it is changed.

    Parameters
    ----------
    folder
        A run folder, finished or not; stages that are missing are said to be.
    refit
        Also fit every fold twice, on clean and on poisoned test trials; see `audit_refit`.
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

    run = open_audited(folder)
    findings = [*check_chain(run), *check_split(run)]
    if any(finding.check == "trials" and finding.level == "leak" for finding in findings):
        # Folds that are no folds have no statistics of their training trials.
        return Audit(run.folder, tuple(findings))
    try:
        findings += _check_fits(run, refit=refit, seed=seed)
    except SafetensorError as error:  # `check_chain` has named the file that is not as it was written
        text = f"tampered: a file of weights cannot be read ({error}), so that fits cannot be judged."
        findings.append(Finding("training", "leak", text))
    return Audit(run.folder, tuple(findings))


def _check_fits(run: AuditedRun, *, refit: bool, seed: int) -> list[Finding]:
    findings = [*check_statistics(run), *check_training(run, thorough=refit), *check_choices(run)]
    findings += [*check_design(run, seed=seed), *check_options(run)]
    if refit:
        findings += check_refit(run)
    if run.low_level is not None:
        findings += _check_low_level(run.low_level, findings, refit=refit)
    made = [record.fields for record in run.chain if record.content.get("stage") == "reconstruct"]
    if run.low_level is None and any(
        (fields.get("reconstruction") or {}).get("low_level") for fields in made
    ):
        text = "the reconstructions do not name the fits of their low-level branch; make them again to judge them."
        findings.append(Finding("low-level", "warning", text))
    return findings


def _check_low_level(low: AuditedRun, told: list[Finding], *, refit: bool) -> list[Finding]:
    """Judge the fits of the low-level branch like those of the encoder; what was told already is not repeated."""
    found = [*check_used(low), *check_training(low, thorough=refit), *check_choices(low), *check_options(low)]
    if refit:
        found += check_refit(low)
    known = {(item.check, item.message) for item in told if "fold" not in item.where}
    findings = [
        replace(item, where=f"low-level branch {item.where}".strip())
        for item in found
        if item.level != "ok" and (item.check, item.message) not in known
    ]
    text = "the branch was fitted on the training trials of its folds, as the run's own encoder was."
    return findings or [Finding("low-level", "ok", text)]
