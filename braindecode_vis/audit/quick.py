"""The checks that end every run: names and digests of files, both sides of each fold, copies.

Apart from the audit of a finished run, which computes stages again: what a stage may ask for must not know the stages.
"""

from __future__ import annotations

from pathlib import Path

from braindecode_vis.audit.files import open_audited
from braindecode_vis.audit.findings import Audit
from braindecode_vis.audit.records import check_chain
from braindecode_vis.audit.split_overlap import check_copies, check_pixels, check_rows, check_sides

#: Of the files and of the split; folds that are no folds have no statistics of their training trials.
FIRST = (check_chain, check_rows)
QUICK = (check_sides, check_pixels, check_copies)


def audit_quickly(folder: Path) -> Audit:
    """Make the checks that end every run: names and digests of files, both sides of each fold, copies.

    They take well under 2 s on small runs, and seconds on large ones, where trials are compared by equality alone.
    `braindecode_vis.audit.run.audit_run` makes the others.

    Parameters
    ----------
    folder
        A run folder.

    Raises
    ------
    DataError
        If the folder holds no prepared data, or a file that every check needs cannot be read.
    """
    run = open_audited(folder)
    findings = [finding for check in FIRST for finding in check(run)]
    if not any(finding.check == "trials" and finding.level == "leak" for finding in findings):
        findings += [finding for check in QUICK for finding in check(run)]
    return Audit(run.folder, tuple(findings), tuple(run.verified))
