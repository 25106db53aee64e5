"""The checks that end every run: names and digests of files, both sides of each fold, classes of persons, copies.

Apart from the audit of a finished run, which computes stages again: what a stage may ask for must not know the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.pipeline.leaks.findings import Audit, AuditFinding, Part
from braindecode_vis.pipeline.leaks.records import check_chain
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, open_audited
from braindecode_vis.pipeline.leaks.split_overlap import (
    check_copies,
    check_identity,
    check_pixels,
    check_rows,
    check_sides,
)

Check = Callable[[AuditedRun], list[AuditFinding]]

#: Of the files and of the split; folds that are no folds have no statistics of their training trials.
FIRST = (check_chain, check_rows)
QUICK = (check_sides, check_identity, check_pixels, check_copies)


def audit_quickly(folder: Path) -> Audit:
    """Make the checks that end every run: names and digests of files, both sides of each fold, copies.

    They take well under 2 s on small runs, and seconds on large ones, where trials are compared by equality alone.
    `braindecode_vis.parts.audit.run.audit_run` makes the others.

    Parameters
    ----------
    folder
        A run folder.

    Raises
    ------
    DataError
        If the folder holds no prepared data, or a file that every check needs cannot be read.
    """
    run = open_audited(folder, reads=False)
    findings = make_checks(run, FIRST)
    if not any(finding.check == "trials" and finding.level == "leak" for finding in findings):
        findings += make_checks(run, QUICK, findings)
    return Audit(run.folder, tuple(findings), tuple(run.verified))


def make_checks(
    run: AuditedRun, checks: Iterable[Check], told: Iterable[AuditFinding] = (), *, part: Part | None = None
) -> list[AuditFinding]:
    """Make checks one after the other; whatever a damaged file does to one is a finding, never a traceback.

    Parameters
    ----------
    run
        The run.
    checks
        Which.
    told
        What was found before: a file that cannot be read is a leak where the chain is broken, since it is then not the
        one that the run wrote, and a warning elsewhere.
    part
        Part of the run that is not verified by a check that could not be made.
    """
    from safetensors import SafetensorError

    findings: list[AuditFinding] = []
    before = list(told)
    for check in checks:
        try:
            findings += check(run)
        except Exception as error:  # any library may trip over a damaged file
            if isinstance(error, SafetensorError):
                text = f"tampered: a file of weights cannot be read ({error}), so the fits cannot be checked."
                findings.append(AuditFinding("training", "leak", text))
                continue
            broken = any(item.check == "chain" and item.level == "leak" for item in [*before, *findings])
            name = check.__name__.removeprefix("check_").replace("_", "-")
            closed = isinstance(error, PermissionError)  # not to its owner
            text = f"{'' if closed else 'damaged: '}this could not be checked ({describe_error(error)})."
            findings.append(AuditFinding(name, "leak" if broken else "warning", text))
            if part is not None:
                run.state(part, "not verified", name, describe_error(error))
    return list(dict.fromkeys(findings))  # one file may stop several checks


def describe_error(error: Exception) -> str:
    """Return an error in words, with its type where it is none of ours."""
    words = " ".join(str(error).split()).rstrip(".") or "no words"
    if isinstance(error, PermissionError) and error.filename:
        return f"permission was denied at {error.filename}"
    return words if isinstance(error, BraindecodeVisError) else f"{type(error).__name__}: {words}"
