"""Checks that scores follow from the stored ranks and images, in every file of a run.

The forms: ``scores.json`` of evaluate and of the run folder, ``scores.parquet``, the values of single items, and the
page. Networks of the metrics are left to ``--refit``, and of large test sets the nulls of permutations too.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.parts.audit.differences import compare_files, compare_tables, find_difference
from braindecode_vis.parts.audit.recompute import RecomputedRun
from braindecode_vis.parts.audit.results import name_tampering
from braindecode_vis.pipeline import decoding, scoring
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.run_files import AuditedRun

#: Pairs of images, and their pixels, up to which the nulls of permutations are drawn again without ``--refit``: 3 s.
LARGEST_NULL, LARGEST_PIXELS = 60_000, 60_000_000
FEW_PERMUTATIONS = 10
#: Sections of the page that are written again.
SECTIONS = ("result", "cards", "losing", "scores", "retrieval", "gallery", "browse")
NUMBER = re.compile(r"-?[0-9][0-9.,]*")
#: Entries of a score that are words, or read beside the data set.
NOT_NUMBERS = ("noise_ceiling", "protocol", "resampled")


def check_scores(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Score again, and compare every form in which scores lie in the run."""
    if run.evaluated is None:
        run.state("score", "not verified", "scores", "the run has no scores yet")
        return []
    findings: list[AuditFinding] = []
    again.require_current(run.evaluated)
    told, where = (
        store.read_json(run.evaluated.path / "scores.json"),
        run.evaluated.path.relative_to(run.folder),
    )
    ceilings = run.evaluated.fields.get("ceilings", {})
    for row in told:
        known = (
            None if "," in str(row["split"]) or row["method"] != "decoded" else ceilings.get(row["metric"])
        )
        if row.get("noise_ceiling") != known and not _measures_ceiling(row):
            text = (
                f"the ceiling of {row['metric']} is {row.get('noise_ceiling')}, but {known} in the settings"
            )
            findings.append(name_tampering("scores", text, where.as_posix()))
            break
    if run.thorough or again.config.decodes_categories or _score_cheaply(again):
        made = next(iter(again.compute("evaluate", scoring.evaluate).values()))
        text = compare_files(run.evaluated.path, made, 1e-3, skip=(*NOT_NUMBERS, "unit", "cluster"))
        run.state("score", "recomputed", f"{len(told)} scores")
        again_told = store.read_json(made / "scores.json")
        text = text or _compare_ceilings(told, again_told)
        if not text and (words := find_difference(told, again_told, skip=["noise_ceiling"])):
            findings.append(AuditFinding("scores", "warning", f"{words}.", where.as_posix()))
    else:
        text = _compare_cheap_scores(run, again, told)
    if text:
        findings.append(name_tampering("scores", text, where.as_posix()))
    # Only what evaluate wrote, and wrote rightly, tells which of two copies that differ was changed.
    elif not findings and (text := _compare_table(run, told)):
        text = f"scores.parquet is not what evaluate wrote: {text}"
        findings.append(name_tampering("scores", text, "scores.parquet"))
    if again.config.decodes_categories:
        run.state("prediction", "recomputed", "decisions")
    return findings or [AuditFinding("scores", "ok", "scores are those of the stored ranks and images.")]


def _measures_ceiling(row: dict[str, Any]) -> bool:
    """Say whether the ceiling of a score is measured with it, and not known beside the data set."""
    return str(row["metric"]).partition("@")[0] == "brain_correlation"


def _compare_ceilings(told: list[dict[str, Any]], made: list[dict[str, Any]]) -> str:
    """Compare ceilings that were measured, of scores in the same order."""
    for row, other in zip(told, made, strict=False):
        known, again = row.get("noise_ceiling"), other.get("noise_ceiling")
        if _measures_ceiling(row) and find_difference(known, again):
            return f"the ceiling of {row['metric']} is {known}, and {again} when it is measured again"
    return ""


def _score_cheaply(again: RecomputedRun) -> bool:
    """Say whether every score of the run takes seconds: none looks through a network or at very many image pairs."""
    asked = again.config.evaluation
    dear = (asked.features, asked.suite, asked.captions, asked.brain, asked.noise_ceiling)
    return not (
        any(item is not None for item in dear) or asked.metrics or asked.protocols or _has_many_pairs(again)
    )


def _has_many_pairs(again: RecomputedRun) -> bool:
    images = decoding.reconstruct(again)
    n_pairs = len(images.seen) * len(set(images.ids.tolist()))
    return n_pairs > LARGEST_NULL or n_pairs * math.prod(images.size) > LARGEST_PIXELS


def _compare_table(run: AuditedRun, told: list[dict[str, Any]]) -> str:
    """Compare ``scores.parquet`` with what evaluate wrote; `check_chain` does so with ``scores.json`` beside it."""
    copy = run.folder / "scores.parquet"
    if not copy.is_file():
        return ""
    made = pd.DataFrame(told).assign(fingerprint=run.evaluated.fingerprint if run.evaluated else "")
    return compare_tables(pd.read_parquet(copy), made, tolerance=1e-9)


def _compare_cheap_scores(run: AuditedRun, again: RecomputedRun, told: list[dict[str, Any]]) -> str:
    """Score what takes seconds, and say how it differs from what lies there; leaves the rest to the record."""
    from braindecode_vis.scoring.score_table import compute_scores

    assert run.evaluated is not None
    task, _ = scoring.make_scoring_task(again)
    many = _has_many_pairs(again)
    kept = replace(task, suite=None, feature_encoder=None, metrics=(), pair_nulls=not many)
    if many:
        kept = replace(kept, n_permutations=FEW_PERMUTATIONS)
    scores, items = compute_scores(kept)
    keys = ("metric", "method", "subject", "split")
    known: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in told:
        known.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    n, looked = 0, set[tuple[Any, ...]]()
    for score in scores:
        row = store.json_plain(score.as_row())
        key = tuple(row[key] for key in keys)
        candidates = known.get(key, [])
        skip = [*NOT_NUMBERS, *(["p_value"] if many else [])]
        if many and score.method == "shuffled":
            continue
        if (
            many and score.gallery_size is None
        ):  # chance is the mean of a null, which took fewer permutations here
            skip.append("chance")
        texts = [find_difference(other, row, skip=skip) for other in candidates]
        if not texts:
            return f"there is no score of {row['metric']} ({row['method']})"
        if all(texts):
            return f"{row['metric']} ({row['method']}): {texts[0]}"
        n, looked = n + 1, looked | {key}
    rest = [row for key, rows in known.items() if key not in looked for row in rows]
    others = sorted({str(row.get("metric")) for row in rest if not many or row.get("method") != "shuffled"})
    run.state("score", "recomputed", f"{n} scores")
    if many:
        run.state("score", "by record", "p-values and chance by permutation", "many images; add --refit")
    if others:
        names = f"{', '.join(others[:4])}{', ...' if len(others) > 4 else ''}"
        run.state(
            "score", "by record", f"scores of {len(others)} metric(s): {names}", "expensive; add --refit"
        )
    stored = pd.read_parquet(run.evaluated.path / "items.parquet")
    shared = [name for name in items if name in stored]
    return compare_tables(stored, items[shared])


# --- the report -------------------------------------------------------------------------------------------


def check_report(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Write what the page says of scores, ranks and images again, and compare it with the page."""
    path = run.folder / "report.html"
    known = run.folder / store.PROVENANCE
    record = store.read_json(known) if known.is_file() else {}
    if run.evaluated is None or not path.is_file():
        if path.name in record.get("files", {}):
            run.state("score", "not verified", "report", "it is missing")
            text = "the page of the run is missing; `braindecode-vis report` writes it again."
            return [AuditFinding("report", "warning", text, "report.html")]
        run.state("score", "not verified", "report", "there is none")
        return []
    if path.name in store.find_changed_results(run.folder):  # a leak of the chain, which names it
        run.state("score", "not verified", "report", "the page was changed after the run")
        return []
    versions = (record.get("versions"), record.get("git_revision"))
    used = {item.name: item for item in run.chain}
    stale = [
        name
        for name, about in (record.get("stages") or {}).items()
        if name in used and about["fingerprint"] != used[name].fingerprint
    ]
    if stale:
        text = f"it was written before {stale[0]} was computed; run `braindecode-vis report` again"
        run.state("score", "not verified", "report", text)
        return [AuditFinding("report", "warning", f"{text}.", "report.html")]
    # The words around the numbers may change from one version to another; then numbers alone are compared.
    same = versions == (store.collect_versions(), store.read_git_revision())
    told, made = (_split_page(page) for page in (path.read_text(encoding="utf-8"), _render_again(again)))
    for name, section in made.items():
        other = told.get(name, "")
        if other == section or (
            not same and NUMBER.findall(_drop_tags(other)) == NUMBER.findall(_drop_tags(section))
        ):
            continue
        if not same:
            run.state("score", "by record", "report", "another version wrote it")
            text = f"the section {name} of the page differs from what this version writes for the scores."
            return [AuditFinding("report", "warning", text, "report.html")]
        return [name_tampering("report", _find_other_words(name, other, section), "report.html")]
    run.state("score", "recomputed", "report")
    return [AuditFinding("report", "ok", "the page matches the scores, ranks and images.")]


def _render_again(again: RecomputedRun) -> str:
    from braindecode_vis.pipeline import summary
    from braindecode_vis.report.page import ReportContent, render_report

    content = ReportContent(title=again.config.name, dataset="", **summary.describe_run(again))
    return render_report(content)


def _split_page(page: str) -> dict[str, str]:
    """Return the sections of scores, ranks and images of a page by their name."""
    found = {}
    for part in re.split(r"(?=<section)", page)[1:]:
        opening = part[: part.index(">")]
        name = re.search(r'(?:id|class)="([^"]+)"', opening)
        if name is not None and name[1] in SECTIONS:
            found[name[1]] = part[: part.rfind("</section>")]
    return found


def _drop_tags(text: str) -> str:
    return re.sub(r"<[^>]*>", " ", re.sub(r"data:[^\"')]*", "", text))


def _find_other_words(name: str, told: str, made: str) -> str:
    """Say which number of a section is another one, or else that the section is."""
    if not told:
        return f"the page has no section {name}"
    first, second = (_drop_tags(text).split() for text in (told, made))
    pairs = (pair for pair in zip(first, second, strict=False) if pair[0] != pair[1])
    one, other = next(pairs, ("", ""))
    if one:
        return f"the section {name} of the page says {one[:40]!r}, but the scores say {other[:40]!r}"
    return f"the pictures in the section {name} of the page are not those of the run"
