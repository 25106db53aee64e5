"""What chose penalties and epochs: inner folds and held-out training images, or the test.

Owns the search of logs for scores of the test, and the comparison of choices with the curves that should explain them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.audit.files import AuditedRun, Finding, list_first, name_fold
from braindecode_vis.store import read_json

_TEST_SCORE = re.compile(r"(^|[^a-z])(test|tested)([^a-z]|$)")
_TEXT_FILES = (".json", ".jsonl", ".csv", ".log", ".txt")


def check_choices(run: AuditedRun) -> list[Finding]:
    """Find out what penalties and epochs were chosen by."""
    if not run.trained:
        return []
    return [*_check_penalties(run), *_check_logs(run), *_check_held_out(run)]


def _check_penalties(run: AuditedRun) -> list[Finding]:
    """The penalty in use is the best of the recorded inner folds."""
    findings, n = [], 0
    for number, record in enumerate(run.trained):
        path = record.path / "ridge.json"
        content = read_json(path) if path.is_file() else {}
        if not content.get("choices"):
            continue
        n += 1
        best = min(content["choices"], key=lambda choice: choice["mse"])
        if best["alpha"] != content["alpha"]:
            text = f"the penalty {content['alpha']:g} is in use, but the inner folds chose {best['alpha']:g}."
            findings.append(Finding("choices", "leak", text, name_fold(number)))
    text = (
        "penalties are the best of inner folds of training trials."
        if n
        else "no penalty was chosen by ridge."
    )
    return findings or [Finding("choices", "ok", text)]


def _check_logs(run: AuditedRun) -> list[Finding]:
    """Search what training left behind for scores of the test."""
    findings = []
    folders = [record.path for record in run.trained]
    extra = [run.folder / name for name in ("work", "logs", "checkpoints")]
    for folder in [*folders, *extra]:
        for path, key in _iterate_keys(folder):
            where = path.relative_to(run.folder).as_posix()
            text = (
                f"the training log knows {key!r}: with test scores at hand, an epoch can be chosen by them."
            )
            findings.append(Finding("model-selection", "leak", text, where))
    if (run.folder.parent / "sweep.csv").is_file():
        text = "this run is one of a sweep; to report the best of them by its test score is to select on the test."
        findings.append(Finding("model-selection", "warning", text, "../sweep.csv"))
    text = "no training log holds a test score."
    return findings or [Finding("model-selection", "ok", text)]


def _iterate_keys(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the first key that names a test score in each log below a folder."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.suffix not in _TEXT_FILES or path.name == "provenance.json" or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        lines = [text] if path.suffix == ".json" else text.splitlines()
        keys: list[str] = []
        for line in lines:
            try:
                keys += _list_keys(json.loads(line))
            except json.JSONDecodeError:
                keys += [part.split(":")[0].split("=")[0] for part in re.split(r"[,;\s]+", line)]
        found = next((key for key in keys if _TEST_SCORE.search(key.lower())), None)
        if found is not None:
            yield path, found


def _list_keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*map(str, value), *(key for item in value.values() for key in _list_keys(item))]
    if isinstance(value, list):
        return [key for item in value for key in _list_keys(item)]
    return []


def _check_held_out(run: AuditedRun) -> list[Finding]:
    """Validation images of a network are training images, whole concepts where it says so, and chosen beforehand."""
    findings, n = [], 0
    ids, concepts = run.responses.stimulus_ids.astype(str), run.concepts.astype(str)
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        path, where = record.path / "network.json", name_fold(number)
        if not path.is_file():
            continue
        n += 1
        content, settings = read_json(path), record.fields["encoder"]["selection"]
        held = np.isin(ids, content["held_out"])
        foreign = set(content["held_out"]) - set(ids[fold.train].tolist())
        if foreign:
            text = f"{len(foreign)} validation image(s) are no training images, first {list_first(foreign)}."
            findings.append(Finding("validation", "leak", text, where))
        both = set(concepts[held].tolist()) & set(concepts[fold.test].tolist())
        if both and "concept" in run.declared:
            text = f"{len(both)} concept(s) are validated and tested, first {list_first(both)}."
            findings.append(Finding("validation", "leak", text, where))
        learns = np.isin(np.arange(len(ids)), fold.train) & ~held
        split = set(concepts[held].tolist()) & set(concepts[learns].tolist())
        if split and content["held_out_by"] == "concept":
            text = f"{len(split)} validation concept(s) are learnt from as well, first {list_first(split)}."
            findings.append(Finding("validation", "leak", text, where))
        findings += _check_epochs(content["history"], record.fields["encoder"], settings, where)
    text = "validation images are training images that were held out." if n else "no network was trained."
    return findings or [Finding("validation", "ok", text)]


def _check_epochs(
    history: list[dict[str, Any]], encoder: dict[str, Any], settings: dict[str, Any], where: str
) -> list[Finding]:
    """The number of epochs is the one that was fixed, or that the validation curve explains."""
    n, planned = len(history), int(encoder["epochs"])
    if settings["kind"] == "last":
        if n == planned:
            return []
        text = f"the last of {planned} epochs should be kept, but {n} are in the history: the training was stopped."
        return [Finding("model-selection", "warning", text, where)]
    name = "validation_loss" if settings["monitor"] == "loss" else "validation_top"
    curve = [
        next((-v if "loss" in k else v for k, v in e.items() if k.startswith(name)), None) for e in history
    ]
    if any(value is None for value in curve):
        return [Finding("model-selection", "warning", "early stopping left no validation curve.", where)]
    best = int(np.argmax(np.array(curve, dtype=float))) if curve else 0
    if n < planned and n - 1 - best != int(settings["patience"]):
        text = f"the training stopped after epoch {n - 1}, but the validation curve, best in {best}, does not say so."
        return [Finding("model-selection", "warning", text, where)]
    return []
