"""Settings that use unlabelled test trials, or trials of the test subject: what is transductive about a run.

Owns the list of such settings. A number that comes from one of them belongs in a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from braindecode_vis.audit.files import AuditedRun, Finding, Level, Record, list_first, name_fold
from braindecode_vis.store import read_embeddings, read_json

#: Words in the name of a retrieval or reconstruction setting, or in its value, and what they mean.
TRANSDUCTIVE = {
    "csls": "hubs are discounted by the similarities of all test queries",
    "hubness": "hubs are discounted by the similarities of all test queries",
    "inverted_softmax": "similarities are normalised over all test queries",
    "sinkhorn": "queries and candidates are balanced against each other",
    "hungarian": "queries and candidates are matched one to one, which uses that each image is asked for once",
    "one_to_one": "queries and candidates are matched one to one, which uses that each image is asked for once",
    "query": "statistics of the test queries are used",
    "queries": "statistics of the test queries are used",
    "test_statistics": "statistics of the test queries are used",
    "orthogonal_map": "test queries are mapped onto images without labels",
}
_OFF = (None, False, "", "none", 0)


def check_options(run: AuditedRun) -> list[Finding]:
    """List what is transductive by its settings, and compare the centring of retrieval with the training images'."""
    findings = [*_check_alignment(run), *_check_run_scaling(run), *_check_retrieval(run), *_check_centre(run)]
    findings += _check_pretrained(run)
    text = "no setting uses the set of test queries or the test subject's own trials."
    return findings or [Finding("transductive", "ok", text)]


def _check_alignment(run: AuditedRun) -> list[Finding]:
    """A subject outside the training set is aligned by the trials that are predicted."""
    findings = []
    subjects = run.responses.trials["subject"].astype(str).to_numpy(dtype=object)
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        kind = record.fields.get("encoder", {}).get("subject_alignment", "none")
        new = set(subjects[fold.test].tolist()) - set(subjects[fold.train].tolist())
        if kind != "none" and new:
            text = (
                f"{kind} alignment of subject(s) {list_first(new)} uses the test trials that are predicted."
            )
            findings.append(Finding("transductive", "transductive", text, name_fold(number)))
    return findings


def _check_pretrained(run: AuditedRun) -> list[Finding]:
    """Weights of a brain encoder from elsewhere: who taught them is not known here."""
    for number, record in enumerate(run.trained):
        digests = [
            str(v)
            for path, v in _walk(record.fields.get("encoder", {}))
            if path.endswith("pretrained_digest")
        ]
        if digests:
            text = (
                f"the network starts from pretrained weights (sha256 {digests[0][:12]}); whether test trials were "
                "among the recordings that taught them cannot be seen here."
            )
            return [Finding("transductive", "warning", text, name_fold(number))]
    return []


def _check_run_scaling(run: AuditedRun) -> list[Finding]:
    """Volumes scaled over their run: the test trials of the run have a part in it."""
    for path, value in _walk(run.prepared.fields.get("dataset", {})):
        if path.endswith("clean.scaling") and value not in _OFF:
            text = f"dataset.{path} {value} scales each run by all of its volumes, those of test trials included."
            return [Finding("transductive", "transductive", text)]
    return []


def _check_retrieval(run: AuditedRun) -> list[Finding]:
    records = [record for record in run.chain if record.content.get("stage") in ("retrieve", "reconstruct")]
    findings = []
    for record in records:
        for path, value in _walk(record.fields):
            words = [path.rsplit(".", 1)[-1].lower(), str(value).lower()]
            meaning = next((TRANSDUCTIVE[word] for word in words if word in TRANSDUCTIVE), None)
            if meaning is None:
                meaning = next((TRANSDUCTIVE[k] for k in TRANSDUCTIVE if f"{k}_" in f"{words[0]}_"), None)
            if meaning is not None and value not in _OFF:
                findings.append(
                    Finding("transductive", "transductive", f"{path} {value}: {meaning}.", record.name)
                )
    return findings


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, path)
    else:
        yield path, value


def _check_centre(run: AuditedRun) -> list[Finding]:
    """Compute the cosine of each prediction with its image again, centred by training images."""
    if run.retrieved is None or len(run.embedded) != len(run.folds):
        return []
    findings = []
    name = run.retrieved.fields.get("retrieval", {}).get("centre", "none")
    for number, record in enumerate(run.trained):
        if (record.path / "network.json").is_file():
            continue  # compares in a space of its own
        if name not in ("none", "mean", "zscore"):
            continue  # named by `_check_retrieval` if it is transductive
        findings += _compare_cosines(run, run.retrieved, number, name)
    return findings


def _compare_cosines(run: AuditedRun, retrieved: Record, number: int, name: str) -> list[Finding]:
    folder, fold = retrieved.path / f"fold{number:02d}", run.folds[number]
    if not (folder / "true_similarities.npy").is_file():
        return []
    stored = np.load(folder / "true_similarities.npy", allow_pickle=False)
    predicted, bank = read_embeddings(folder), read_embeddings(run.embedded[number].path)
    asked = list(map(str, read_json(folder / "retrieval.json")["query_ids"]))
    truth = bank.select(asked).flat()
    train = bank.select(list(dict.fromkeys(run.responses.stimulus_ids[fold.train].tolist()))).flat()
    tested = bank.select(list(dict.fromkeys(asked))).flat()
    queries = predicted.flat()
    off = {
        who: float(np.abs(_compute_cosines(queries, truth, taught, name) - stored).max())
        for who, taught in (("training images", train), ("test images", tested), ("test queries", queries))
    }
    if off["training images"] < 1e-3:
        return []
    other, first = min(off, key=lambda who: off[who]), off["training images"]
    level: Level = "transductive" if off[other] < 1e-3 else "warning"
    whose = f"by those of the {other}" if level == "transductive" else "otherwise"
    text = (
        f"the stored similarities are not centred by the training images (off by {first:.2g}), but {whose}."
    )
    return [Finding("centre", level, text, name_fold(number))]


def _compute_cosines(queries: np.ndarray, truth: np.ndarray, taught: np.ndarray, name: str) -> np.ndarray:
    taught = np.asarray(taught, dtype=np.float64)
    mean = taught.mean(axis=0) if name != "none" else 0.0
    scale = taught.std(axis=0) if name == "zscore" else np.ones(taught.shape[1])
    a, b = (
        (np.asarray(x, dtype=np.float64) - mean) / np.where(scale > 0, scale, 1.0) for x in (queries, truth)
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0))
