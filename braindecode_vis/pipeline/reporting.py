"""The stage report, the provenance of a run, and the function that runs all stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braindecode_vis.base import roles, store
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.contracts import Dataset
from braindecode_vis.base.parts import Part, find_parts
from braindecode_vis.config import check_files
from braindecode_vis.datasets.manifests import find_manifest, read_drive
from braindecode_vis.pipeline.decoding import open_branches, reconstruct, retrieve
from braindecode_vis.pipeline.hints import list_hints
from braindecode_vis.pipeline.learning import needs_predictions, predict_out_of_fold, train
from braindecode_vis.pipeline.preparing import embed, preprocess, pretrain_fold
from braindecode_vis.pipeline.reconstruction import describe_same_draws
from braindecode_vis.pipeline.runs import Run, remember
from braindecode_vis.pipeline.scoring import check_texts, evaluate, find_phantom

if TYPE_CHECKING:
    from braindecode_vis.pipeline.leaks.findings import Audit
    from braindecode_vis.report.page import Addition, ExtraSection


#: Raise it when the page says more of the same results, so that it is written anew.
PAGE_VERSION = 5


@remember
def check_leaks(run: Run) -> Audit | None:
    """Audit the finished run by the checks that are cheap, and report to the listener how long they took.

    None if they could not be made; the report says why.
    """
    from braindecode_vis.pipeline.leaks.quick import audit_quickly

    # The checks recompute scores from the files, which must be there.
    evaluate(run)
    started = time.perf_counter()
    try:
        found = audit_quickly(run.folder.path)
    except BraindecodeVisError as error:
        run.seen["leaks not checked"] = f"The run was not checked for leaks: {error}"
        return None
    run.seen["seconds of audit"] = time.perf_counter() - started
    return found


@remember
def report(run: Run) -> Path:
    """Write the self-contained ``report.html`` of the run and return its path."""
    from braindecode_vis.pipeline import recording_figures, summary
    from braindecode_vis.report.page import ReportContent, has_full_images, write_report

    prepared, rows = preprocess(run), evaluate(run)
    manifest = roles.complete(Dataset, run.config.dataset).manifest or find_manifest(run.config.dataset.kind)
    stages = collect_stages(run)
    path = run.folder.path / "report.html"
    added = _ask_parts(run)
    additions = [addition for _, addition in added]
    audit = check_leaks(run)
    leaks = [] if audit is None else [f"{item.message} {item.where}".strip() for item in audit.leaks]
    # A report is written anew only if something that it shows has changed, or the page itself was.
    digest = store.hash_json(
        [
            PAGE_VERSION,
            rows,
            run.seen["differences"],
            stages,
            run.config.model_dump(mode="json"),
            [addition.shows for addition in additions],
            [manifest.title, manifest.summary, manifest.modality, manifest.citation, manifest.licence],
            *([leaks] if leaks else []),
        ]
    )
    written = run.folder.path / store.PROVENANCE
    try:
        known = store.read_provenance(written)
    except (OSError, DataError):
        known = {}  # no readable record of what the last page was made of
    unchanged = path.name in known.get("files", {}) and not store.find_changed_results(run.folder.path)
    if path.is_file() and known.get("content") == digest and unchanged and has_full_images(path):
        return path
    provenance = collect_run_provenance(run, stages)
    parts, n_problems = summary.describe_run(run), len(run.seen["problems of parts"])
    parts["sections"] = [
        *recording_figures.describe_recording(run, has_time_course=any(a.has_time_course for a in additions)),
        *summary.describe_tried_encoders(run),
        *parts.get("sections", []),
        *recording_figures.describe_publication(run, rows),
        *summary.describe_ceilings(run.seen.get("response_ceilings")),
        *_make_sections(run, added),
    ]
    phantom = find_phantom(run.config)
    simulated = phantom is not None
    warnings = [str(text) for text in prepared.responses.coords.get("warnings", [])]
    warnings += [*run.seen.get("not computed", []), *summary.describe_imagined(prepared)]
    if not run.config.decodes_categories:
        images = reconstruct(run).images
        if images:
            warnings += filter(None, [describe_same_draws(run.config, images["decoded"])])
        else:
            warnings.append("No image file is available, so only retrieval is scored and no image was made.")
    warnings += filter(None, [run.seen.get("leaks not checked")])
    if phantom is not None:
        warnings.insert(
            0,
            f"Simulated subjects (drive {read_drive(phantom)}), in the files of {manifest.title}. No recording was "
            "made; the data are simulated.",
        )
    content = ReportContent(
        title=run.config.name,
        dataset=f"phantom in the files of {manifest.title}" if simulated else manifest.title,
        description="" if simulated else manifest.summary,
        facts=summary.list_facts(prepared, manifest, simulated=simulated),
        leaks=leaks,
        hints=list_hints(run),
        warnings=warnings,
        provenance=provenance,
        command=provenance["command"],
        **parts,
    )
    # A page without a section that could not be made is written again by the next report.
    complete = len(run.seen["problems of parts"]) == n_problems
    about = {**provenance, "content": digest if complete else ""}
    with store.record_results(run.folder.path, path.name, about=about):
        write_report(path, content)
    return path


def _ask_parts(run: Run) -> list[tuple[Part, Addition]]:
    """Return what the parts add to the report, and report their problems."""
    from braindecode_vis.report.page import Addition

    run.seen["problems of parts"] = []
    added = []
    for part in find_parts():
        if part.page:
            with _go_on_without(run, part):
                addition = part.load(part.page)(run)
                if not isinstance(addition, Addition):
                    raise TypeError(f"{part.page} returns no braindecode_vis.report.page.Addition")
                for sentence in addition.problems:
                    _report_problem(run, sentence)
                added.append((part, addition))
    return added


def _make_sections(run: Run, added: list[tuple[Part, Addition]]) -> list[ExtraSection]:
    sections: list[ExtraSection] = []
    for part, addition in added:
        with _go_on_without(run, part):
            sections += addition.make()
    return sections


@contextmanager
def _go_on_without(run: Run, part: Part) -> Iterator[None]:
    """Report an error in the code of a part from outside, which must not cost a run its report."""
    try:
        yield
    except Exception as error:
        if part.distribution is None or isinstance(error, MemoryError):
            raise
        _report_problem(
            run, f"the part {part.name} adds nothing to the report: {type(error).__name__}: {error}"
        )


def _report_problem(run: Run, sentence: str) -> None:
    run.seen["problems of parts"].append(sentence)
    run.tell(sentence)


def collect_stages(run: Run) -> dict[str, Any]:
    """Return fingerprint, version, time and duration of every stage that ran."""
    artifacts: list[store.Artifact] = [preprocess(run).artifact, *[fold.artifact for fold in train(run)]]
    if not run.config.decodes_categories:
        banks = {bank.artifact.path: bank.artifact for bank in embed(run)}
        begun = [pretrain_fold(run, number) for number in range(len(train(run)))]
        starts = {artifact.path: artifact for artifact in begun if artifact is not None}
        # In the order of the stages; folds that share a bank name it once.
        artifacts[1:1] = [*banks.values(), *starts.values()]
        made = [part.artifact for part in predict_out_of_fold(run)] if needs_predictions(run) else []
        if run.config.synthetic is not None:
            from braindecode_vis.pipeline.synthetic import synthesise

            made += [part.artifact for part in synthesise(run)]
        images = reconstruct(run)
        artifacts += [*made, retrieve(run).artifact, *([images.artifact] if images.images else [])]
    stages = _describe_stages(artifacts)
    for name, branch in open_branches(run).items():
        banks = {bank.artifact.path: bank.artifact for bank in embed(branch)}
        fits = _describe_stages([*banks.values(), *[fold.artifact for fold in train(branch)]])
        words = name.replace("_", "-")
        stages |= {f"{words} {stage}": about for stage, about in fits.items()}
    return stages


def collect_run_provenance(run: Run, stages: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration, the inputs, the versions of libraries and what `collect_stages` found."""
    outside = [{"setting": key, **asdict(code)} for key, code in run.config.find_outside().items()]
    return {
        **store.collect_provenance(),
        "seed": run.config.seed,
        "inputs": run.config.dataset.hash_inputs(),
        "config": run.config.model_dump(mode="json"),
        **({"outside": outside} if outside else {}),
        "stages": stages,
    }


def _describe_stages(artifacts: list[store.Artifact]) -> dict[str, Any]:
    stages = {}
    for artifact in artifacts:
        record = store.read_provenance(artifact.path / store.PROVENANCE)
        stages[f"{record['stage']} {record['unit']}".strip()] = {
            **{key: record[key] for key in ("fingerprint", "version", "created", "seconds")},
            **({"profile": record["profile"]} if "profile" in record else {}),  # not of earlier versions
        }
    return stages


def run_all(run: Run) -> list[dict[str, Any]]:
    """Run every stage, reusing what is there, and return the score rows."""
    # Missing weights or folders are told before hours of training, and not after them.
    check_files(run.config)
    check_texts(run)
    report(run)
    return evaluate(run)
