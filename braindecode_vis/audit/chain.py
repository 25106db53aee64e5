"""Whether the artifacts of a run are what they say: names recomputed, files compared with their digests.

An artifact is named after its settings and the names of what it was made of, so that none can be changed, or exchanged
for another one, without breaking the chain that ends in the scores.
"""

from __future__ import annotations

from braindecode_vis import store
from braindecode_vis.audit.files import AuditedRun, Finding, Record, name_fold
from braindecode_vis.checks import BraindecodeVisError
from braindecode_vis.config import read_config


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
        return (
            f"it belongs into {content['stage']}/{expected}, not {record.path.parent.name}/{record.path.name}"
        )
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
        return [
            Finding("chain", "warning", "the run has no scores yet; only the stages that exist are audited.")
        ]
    told, made = (
        [{k: v for k, v in row.items() if k != "fingerprint"} for row in store.read_json(file)]
        for file in (path, run.evaluated.path / "scores.json")
    )
    if told != made:
        return [
            Finding("chain", "leak", "tampered: scores.json differs from what evaluate wrote.", "scores.json")
        ]
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
