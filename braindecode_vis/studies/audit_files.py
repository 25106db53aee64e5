"""A finished run as an auditor opens it: the artifacts that its scores stand on, and whether they are what they say.

Owns the way from the scores of a run folder back to its trials, along the fingerprints that each artifact recorded, and
the proof of that chain. Reads files only: nothing is computed again by asking the pipeline, which would repair what is
to be judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from braindecode_vis import store
from braindecode_vis.arrays import Responses
from braindecode_vis.checks import BraindecodeVisError, DataError
from braindecode_vis.config import CATEGORY_DECODERS, read_config
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.stimuli import StimulusSet

Level = Literal["ok", "transductive", "warning", "leak"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Parameters
    ----------
    check
        Name of the check.
    level
        ``ok``; ``transductive`` (unlabelled test trials, or trials of the test subject, were used); ``warning`` (a score
        may mean less than it seems to); ``leak`` (the test reached what was fitted or chosen, or the files are not
        those that the run wrote).
    message
        One sentence, with the first offending ids.
    where
        Fold or file.
    """

    check: str
    level: Level
    message: str
    where: str = ""


@dataclass(frozen=True)
class Record:
    """The provenance of one artifact, and where it lies."""

    path: Path
    content: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """The name that the artifact claims."""
        return str(self.content.get("fingerprint", ""))

    @property
    def fields(self) -> Mapping[str, Any]:
        """Settings that the artifact was made with."""
        return self.content.get("fields", {})

    @property
    def upstream(self) -> Mapping[str, str]:
        """Fingerprints of what the artifact was made of."""
        return self.content.get("upstream", {})

    @property
    def name(self) -> str:
        """Stage and unit, for messages."""
        return f"{self.content.get('stage', '')} {self.content.get('unit', '')}".strip()


@dataclass(frozen=True)
class AuditedRun:
    """Everything that the checks look at.

    Parameters
    ----------
    folder
        The run folder.
    prepared
        Artifact of the preprocessing.
    trained, embedded
        Artifact of each fold; empty if the run has not come so far. Category decoders embed nothing.
    retrieved, evaluated
        Later artifacts, if they exist.
    chain
        All of them.
    missing
        Fingerprints that an artifact names as its upstream, and that are not there.
    responses, stimuli
        As preprocessing wrote them.
    concepts
        Concept of each trial, shape (n_trials,).
    split
        Content of ``split.json``.
    folds
        Its folds.
    """

    folder: Path
    prepared: Record
    trained: tuple[Record, ...]
    embedded: tuple[Record, ...]
    retrieved: Record | None
    evaluated: Record | None
    chain: tuple[Record, ...]
    missing: tuple[str, ...]
    responses: Responses
    stimuli: StimulusSet
    concepts: np.ndarray
    split: Mapping[str, Any]
    folds: tuple[Fold, ...]

    @property
    def trials(self) -> pd.DataFrame:
        """The trial table, with the concepts of the stimulus table."""
        return self.responses.trials.assign(concept=self.concepts)

    @property
    def declared(self) -> tuple[str, ...]:
        """What the split says its folds do not share."""
        names = self.split["by"]
        listed = [names] if isinstance(names, str) else list(names)
        return tuple("image" if name == "stimulus_id" else name for name in listed)

    @property
    def meta(self) -> Mapping[str, Any]:
        """Content of ``responses/meta.json``."""
        return store.read_json(self.prepared.path / "responses" / "meta.json")

    @property
    def teaches(self) -> np.ndarray:
        """Trials that the data set declares as training, which preprocessing learns from; shape (n_trials,)."""
        return self.responses.trials["split"].to_numpy(dtype=object) == "train"

    @property
    def decodes_categories(self) -> bool:
        """Whether a class is decoded, not an image."""
        if self.trained:
            return self.trained[0].fields.get("encoder", {}).get("kind") in CATEGORY_DECODERS
        return self.prepared.fields.get("split", {}).get("kind") == "leave_one_run_out"


def name_fold(number: int) -> str:
    """Return what a fold is called in findings."""
    return f"fold {number}"


def list_first(values: Iterable[Any], n: int = 3) -> str:
    """Return the first values as text.

    Examples
    --------
    >>> list_first(["b", "a", "c", "d"])
    'a, b, c, ...'
    """
    ordered = sorted(values, key=str)
    return ", ".join(map(str, ordered[:n])) + (", ..." if len(ordered) > n else "")


# --- opening ----------------------------------------------------------------------------------------------


def open_audited(folder: Path) -> AuditedRun:
    """Open a run folder for reading.

    The artifacts are those behind ``scores.json``; of an unfinished run, the newest.

    Raises
    ------
    DataError
        If the folder holds no preprocessed data, or a file that every check needs is damaged.
    """
    folder = folder.expanduser().absolute()
    records = {stage: _read_records(folder, stage) for stage in ("preprocess", "embed", "train", "retrieve")}
    records |= {stage: _read_records(folder, stage) for stage in ("reconstruct", "evaluate")}
    if not records["preprocess"]:
        raise DataError(
            f"{folder} is no run folder with results: expected {folder / 'stages' / 'preprocess'}; give the folder that "
            "run printed, or run it first."
        )
    missing: list[str] = []
    evaluated = _find_evaluated(folder, records["evaluate"])
    retrieved = _follow(evaluated, "retrieve", records["retrieve"], missing)
    reconstructed = _follow(evaluated, "reconstruct", records["reconstruct"], missing)
    trained = _follow_folds(retrieved or evaluated, records["train"], missing)
    embedded = tuple(
        found for fold in trained if (found := _follow(fold, "embed", records["embed"], missing)) is not None
    )
    prepared = _follow(trained[0] if trained else None, "preprocess", records["preprocess"], missing)
    assert prepared is not None
    last = [record for record in (retrieved, reconstructed, evaluated) if record is not None]
    chain = {record.path: record for record in (prepared, *embedded, *trained, *last)}
    responses = store.read_responses(prepared.path / "responses")
    stimuli = store.read_stimuli(prepared.path / "stimuli")
    split = store.read_json(prepared.path / "split.json")
    folds = tuple(
        Fold(np.array(f["train"], dtype=np.int64), np.array(f["test"], dtype=np.int64)) for f in split["folds"]
    )
    return AuditedRun(
        folder, prepared, trained, embedded, retrieved, evaluated, tuple(chain.values()),
        tuple(dict.fromkeys(missing)), responses, stimuli, stimuli.concepts_of(responses.stimulus_ids), split, folds,
    )  # fmt: skip


def _read_records(folder: Path, stage: str) -> list[Record]:
    """Return the artifacts of a stage, oldest first; unreadable ones are left out."""
    found = []
    for path in sorted((folder / "stages" / stage).glob(f"*/{store.PROVENANCE}")):
        if path.parent.name.startswith("."):
            continue
        with contextlib.suppress(DataError):
            content = store.read_json(path)
            if isinstance(content, dict):
                found.append(Record(path.parent, content))
    return sorted(found, key=lambda record: str(record.content.get("created", "")))


def _find_evaluated(folder: Path, records: Sequence[Record]) -> Record | None:
    path = folder / "scores.json"
    rows = store.read_json(path) if path.is_file() else []
    wanted = str(rows[0].get("fingerprint", "")) if rows else ""
    named = [record for record in records if _is_named(record, wanted)]
    return named[-1] if named else (records[-1] if records else None)


def _is_named(record: Record, fingerprint: str) -> bool:
    return bool(fingerprint) and record.path.name.split("-")[-1] == fingerprint


def _follow(
    record: Record | None, stage: str, candidates: Sequence[Record], missing: list[str]
) -> Record | None:
    """Return what a record was made of; the newest artifact where it is not known, so that the audit goes on."""
    wanted = record.upstream.get(stage) if record is not None else None
    if record is not None and wanted is None:
        return None
    named = [item for item in candidates if _is_named(item, wanted or "")]
    if named:
        return named[-1]
    if wanted is not None:
        missing.append(f"{stage} {wanted}, which {record.name if record else 'the run'} was made of")
    return candidates[-1] if candidates else None


def _follow_folds(record: Record | None, candidates: Sequence[Record], missing: list[str]) -> tuple[Record, ...]:
    """Return the artifact of each fold in the order of folds."""
    if record is not None:
        keys = sorted((k for k in record.upstream if k.startswith("train")), key=lambda k: int(k[5:] or 0))
        pairs = [(f"fold{number:02d}", record.upstream[key]) for number, key in enumerate(keys)]
    else:
        newest = candidates[-1].upstream.get("preprocess") if candidates else None
        latest = {
            str(item.content.get("unit")): item.path.name.split("-")[-1]
            for item in candidates
            if item.upstream.get("preprocess") == newest
        }
        pairs = sorted(latest.items())
    found = []
    for unit, fingerprint in pairs:
        named = [item for item in candidates if _is_named(item, fingerprint)]
        others = [item for item in candidates if item.content.get("unit") == unit]
        if not named:
            missing.append(f"train {unit} {fingerprint}, which the scores were made of")
        if named or others:
            found.append((named or others)[-1])
    return tuple(found)


# --- the chain --------------------------------------------------------------------------------------------


def check_chain(run: AuditedRun) -> list[Finding]:
    """Recompute the name of every artifact from what it recorded, and compare its files with their digests."""
    findings = [Finding("chain", "leak", f"tampered: there is no {text}.") for text in run.missing]
    unhashed = 0
    for record in run.chain:
        problem = _find_tampering(record)
        if problem:
            where = record.path.relative_to(run.folder).as_posix()
            findings.append(Finding("chain", "leak", f"tampered: {record.name}: {problem}.", where))
        unhashed += sum(1 for _, digest in record.content.get("files", {}).values() if digest is None)
    findings += _check_folds(run) + _check_scores(run) + _check_config(run)
    if all(finding.level != "leak" for finding in findings):
        rest = f"; {unhashed} file(s) above 1 MiB are known by size only" if unhashed else ""
        names = f"{len(run.chain)} artifact(s) have the names of what they recorded"
        findings.insert(0, Finding("chain", "ok", f"{names}, and unchanged files{rest}."))
    return findings


def _find_tampering(record: Record) -> str:
    content = record.content
    try:
        name = store.compute_fingerprint(
            content["stage"], content["version"], content["fields"], content["upstream"]
        )
    except (KeyError, TypeError) as error:
        return f"its provenance cannot be read ({type(error).__name__}: {error})"
    if name != record.fingerprint:
        return f"its settings and upstream make the fingerprint {name}, not {record.fingerprint} as it says"
    expected = "-".join(filter(None, [str(content.get("unit", "")), name]))
    if record.path.name != expected or record.path.parent.name != content["stage"]:
        return f"it belongs into {content['stage']}/{expected}, not {record.path.parent.name}/{record.path.name}"
    return store.find_damage(record.path)


def _check_folds(run: AuditedRun) -> list[Finding]:
    """Every fold was trained once, on the same trials, against the images of its own fold."""
    findings = []
    for number, record in enumerate(run.trained):
        if record.fields.get("fold") != number:
            text = f"tampered: fold {number} was trained as fold {record.fields.get('fold')}."
            findings.append(Finding("chain", "leak", text, name_fold(number)))
        if record.upstream.get("preprocess") != run.prepared.fingerprint:
            text = "tampered: it was trained on other trials than those that are here."
            findings.append(Finding("chain", "leak", text, name_fold(number)))
    for number, record in enumerate(run.embedded):
        if record.fields.get("fold") not in (None, number):
            text = f"its targets were fitted on the training images of fold {record.fields['fold']}."
            findings.append(Finding("chain", "leak", text, name_fold(number)))
    if run.trained and len(run.trained) != len(run.folds):
        text = f"{len(run.trained)} fold(s) were trained, but the split has {len(run.folds)}."
        findings.append(Finding("chain", "leak" if run.evaluated else "warning", text))
    return findings


def _check_scores(run: AuditedRun) -> list[Finding]:
    path = run.folder / "scores.json"
    if run.evaluated is None or not path.is_file():
        return [Finding("chain", "warning", "the run has no scores yet; only the stages that exist are audited.")]
    told = [{k: v for k, v in row.items() if k != "fingerprint"} for row in store.read_json(path)]
    if told != store.read_json(run.evaluated.path / "scores.json"):
        return [Finding("chain", "leak", "tampered: scores.json differs from what evaluate wrote.", "scores.json")]
    return []


def _check_config(run: AuditedRun) -> list[Finding]:
    """Compare ``config.yaml`` with the settings that the artifacts were made with."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        return [Finding("chain", "warning", "there is no config.yaml; settings are those of the artifacts.")]
    try:
        config = read_config(path)
    except BraindecodeVisError as error:
        return [Finding("chain", "warning", f"config.yaml cannot be read: {error}", "config.yaml")]
    told = {
        "split": config.split.hashed_fields(), "dataset": config.dataset.hashed_fields(), "seed": config.seed,
    }  # fmt: skip
    pairs = [(name, value, run.prepared.fields.get(name)) for name, value in told.items()]
    if run.trained:
        fields = run.trained[0].fields
        pairs.append(("encoder", config.encoder.hashed_fields(), fields.get("encoder")))
        if "selection" in fields:
            pairs.append(("selection", config.selection.hashed_fields(), fields["selection"]))
    changed = [name for name, now, then in pairs if store.json_plain(now) != then]
    if not changed:
        return []
    text = f"config.yaml has other settings of {', '.join(changed)} than the results were made with."
    return [Finding("chain", "warning", text, "config.yaml")]
