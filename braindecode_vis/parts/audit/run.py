"""Audit of a finished run: whether anything of the test reached a fitted statistic or a choice.

Owns the order of the checks and their verdict. Each check works from the files of a run folder alone: trial table,
stored numbers, pixels, ``split.json`` and the provenance of each artifact. What can be recomputed is not believed. What
leaves no trace in a run folder is listed in ``docs/AUDIT.md``. The checks report how each part was verified; see
`braindecode_vis.pipeline.leaks.findings`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path

from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.consent import ConsentError
from braindecode_vis.parts.audit.choices import check_epochs, check_held_out, check_logs, check_penalties
from braindecode_vis.parts.audit.design import check_design
from braindecode_vis.parts.audit.fits import (
    check_features,
    check_inputs,
    check_refit,
    check_target_means,
    check_targets,
)
from braindecode_vis.parts.audit.material import check_captions, check_material
from braindecode_vis.parts.audit.recompute import open_recomputed
from braindecode_vis.parts.audit.results import (
    check_embedded,
    check_fits,
    check_images,
    check_out_of_fold,
    check_predictions,
    check_prepared,
    check_ranks,
)
from braindecode_vis.parts.audit.scores import check_report, check_scores
from braindecode_vis.parts.audit.statistics import (
    check_codes,
    check_components,
    check_record,
    check_scaling,
    check_standardised,
    check_whitened,
)
from braindecode_vis.parts.audit.synthetic_trials import check_synthetic, check_synthetic_again
from braindecode_vis.pipeline.leaks.findings import LEVELS, Audit, AuditFinding, Part, PartStatus
from braindecode_vis.pipeline.leaks.quick import FIRST, make_checks
from braindecode_vis.pipeline.leaks.records import (
    check_options,
    check_pretraining,
    check_recordings,
    check_warnings,
)
from braindecode_vis.pipeline.leaks.run_files import BRANCH_WORDS, AuditedRun, open_audited
from braindecode_vis.pipeline.leaks.split_overlap import (
    check_identity,
    check_likeness,
    check_near_copies,
    check_pixels,
    check_sides,
    check_split_settings,
    check_used,
)

SPLIT = (
    check_sides,
    check_identity,
    check_pixels,
    check_likeness,
    check_near_copies,
    check_split_settings,
    check_used,
)
STATISTICS = (
    check_standardised, check_whitened, check_scaling, check_components, check_codes, check_record,
)  # fmt: skip
FITS = (check_synthetic, check_inputs, check_features, check_targets, check_target_means)
CHOICES = (check_penalties, check_logs, check_held_out)
SETTINGS = (check_design, check_options, check_pretraining, check_recordings, check_warnings)
#: What is computed again in the order of the stages, and the part of the run that it verifies.
STEPS: tuple[tuple[Part, Callable[..., list[AuditFinding]]], ...] = (
    ("data", check_prepared),
    ("fit", check_embedded),
    ("fit", check_synthetic_again),
    ("choice", check_fits),
    ("choice", check_epochs),
    ("prediction", check_out_of_fold),
    ("prediction", check_predictions),
    ("score", check_ranks),
    ("material", check_material),
    ("material", check_images),
    ("material", check_captions),
    ("score", check_scores),
    ("score", check_report),
)
LATER: tuple[Part, ...] = ("prediction", "material", "score")

__all__ = ["LEVELS", "Audit", "AuditFinding", "AuditedRun", "PartStatus", "audit_run"]


def audit_run(folder: Path, *, refit: bool = False, seed: int = 0) -> Audit:
    """Audit a run folder; nothing in it is changed.

    Parameters
    ----------
    folder
        A run folder, finished or not; stages that are missing are reported.
    refit
        Also preprocess the recordings again, and fit every fold again with poisoned test trials; see `check_prepared`
        and `check_refit`.
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
    run = open_audited(folder, thorough=refit, seed=seed)
    findings = make_checks(run, FIRST, part="chain")
    if any(finding.check == "trials" and finding.level == "leak" for finding in findings):
        return Audit(run.folder, tuple(findings), tuple(run.verified))
    findings += make_checks(run, SPLIT, findings)
    findings += make_checks(run, STATISTICS, findings, part="fit")
    if run.trained:
        findings += make_checks(run, FITS, findings, part="fit")
        findings += make_checks(run, CHOICES, findings, part="choice")
    else:
        findings.append(AuditFinding("training", "warning", "nothing was trained yet."))
    findings += make_checks(run, SETTINGS, findings)
    if refit:  # not among those whose errors are findings: it says what to do about a disk that is too small
        findings += check_refit(run)
    branches = update_wrapper(partial(check_branches, told=list(findings)), check_branches)
    findings += make_checks(run, [branches], findings, part="fit")
    findings += check_results(run, findings)
    return Audit(run.folder, tuple(dict.fromkeys(findings)), tuple(run.verified))


def check_branches(run: AuditedRun, told: list[AuditFinding]) -> list[AuditFinding]:
    """Judge the fits of every branch like those of the encoder; what was reported already is not repeated."""
    findings = []
    made = run.reconstructed
    asked = {} if made is None else made.fields.get("reconstruction") or {}
    for name, words in BRANCH_WORDS.items():
        branch = run.branches.get(name)
        if branch is None:
            if asked.get(name):
                text = (
                    f"the reconstructions do not name the fits of their {words} branch; make them "
                    "again to check it."
                )
                findings.append(AuditFinding(words, "warning", text))
            continue
        checks = (check_used, *FITS, *CHOICES, check_options, *((check_refit,) if run.thorough else ()))
        known = {(item.check, item.message) for item in told if "fold" not in item.where}
        found = [
            replace(item, where=f"{words} branch {item.where}".strip())
            for check in checks
            for item in check(branch)
            if item.level != "ok" and (item.check, item.message) not in known
        ]
        text = "the branch was fitted on the training trials of its folds, like the run's own encoder."
        findings += found or [AuditFinding(words, "ok", text)]
    return findings


def check_results(run: AuditedRun, told: list[AuditFinding]) -> list[AuditFinding]:
    """Compute responses, targets, small fits, predictions, ranks, images and scores again; see `STEPS`.

    Each step is a check of `make_checks`: a file that cannot be read costs the steps that need it.
    """
    steps = STEPS
    if not run.trained:
        for part in LATER:
            run.state(part, "not verified", "nothing", "the run has trained nothing yet")
        steps = tuple((part, step) for part, step in STEPS if part == "data")
    with tempfile.TemporaryDirectory(prefix="audit-") as temporary:
        try:
            again = open_recomputed(run, Path(temporary))
        except ConsentError:  # a check that was not made only because nobody was asked
            raise
        except (BraindecodeVisError, OSError) as error:
            for part in ("data", *LATER):
                run.state(part, "not verified", "everything", str(error).rstrip("."))
            text = f"nothing after training could be computed again: {error}"
            return [AuditFinding("results", "warning", text)]
        findings: list[AuditFinding] = []
        for part, step in steps:
            check = update_wrapper(partial(step, again=again), step)
            findings += make_checks(run, [check], [*told, *findings], part=part)
    return findings
