"""Checks of what the artifacts of a run recorded: names and digests, and settings that use the test set.

An artifact is named after its settings and the names of what it was made of, so that none can be changed, or exchanged
for another one, without breaking the chain that ends in the scores. A setting that uses unlabelled test trials, or
trials of the test subject, is transductive: a number that comes from one belongs in a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from braindecode_vis.base import store
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.consent import ConsentError
from braindecode_vis.base.remote import is_address
from braindecode_vis.base.store import read_embeddings, read_json
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.leaks.findings import AuditFinding, Level
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, Record, list_first, name_fold
from braindecode_vis.pipeline.preparing import find_shared_subjects, list_earlier, name_sources
from braindecode_vis.preprocessing.common_space import name_alignment

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
#: Values that switch a setting off.
_OFF = (None, False, "", "none", 0)


# --- names, digests and settings ---------------------------------------------------------------------------


def check_chain(run: AuditedRun) -> list[AuditFinding]:
    """Recompute the name of every artifact from what it recorded, and compare its files with their digests.

    Every fold must have been trained once, on the trials that are here, against the images of its own fold, and
    ``scores.json`` must be what evaluate wrote.
    """
    findings = [AuditFinding("chain", "leak", f"tampered: there is no {text}.") for text in run.missing]
    unhashed = 0
    for record in run.chain:
        problem = _find_tampering(record, run.reads)
        if problem:
            where = record.path.relative_to(run.folder).as_posix()
            findings.append(AuditFinding("chain", "leak", f"tampered: {record.name}: {problem}.", where))
        unhashed += sum(1 for _, digest in record.content.get("files", {}).values() if digest is None)

    run.state("chain", "recomputed", f"names and digests of {len(run.chain)} artifact(s)")
    if unhashed:
        run.state("chain", "by record", f"{unhashed} file(s) above 1 MiB", "known by their size only")

    for number, record in enumerate(run.trained):
        if record.fields.get("fold") != number:
            text = f"tampered: fold {number} was trained as fold {record.fields.get('fold')}."
            findings.append(AuditFinding("chain", "leak", text, name_fold(number)))
        if record.upstream.get("preprocess") != run.prepared.fingerprint:
            text = "tampered: it was trained on other trials than those in the run folder."
            findings.append(AuditFinding("chain", "leak", text, name_fold(number)))
    for number, record in enumerate(run.embedded):
        if record.fields.get("fold") not in (None, number):
            text = f"its targets were fitted on the training images of fold {record.fields['fold']}."
            findings.append(AuditFinding("chain", "leak", text, name_fold(number)))
    if run.trained and len(run.trained) != len(run.folds):
        text = f"{len(run.trained)} fold(s) were trained, but the split has {len(run.folds)}."
        findings.append(AuditFinding("chain", "leak" if run.evaluated else "warning", text))

    path = run.folder / "scores.json"
    if run.evaluated is None or not path.is_file():
        text = "the run has no scores yet; only the stages that exist are audited."
        findings.append(AuditFinding("chain", "warning", text))
    else:
        # The copy at the top of the run folder adds the fingerprint, and nothing else.
        try:
            told, made = (
                [{k: v for k, v in row.items() if k != "fingerprint"} for row in store.read_json(file)]
                for file in (path, run.evaluated.path / "scores.json")
            )
            same = told == made
        except (OSError, BraindecodeVisError, AttributeError, TypeError):
            same = False
        if not same:
            text = "tampered: scores.json differs from what evaluate wrote."
            findings.append(AuditFinding("chain", "leak", text, "scores.json"))
    told_files = {finding.where for finding in findings}
    findings += [
        AuditFinding("chain", "leak", f"tampered: {name} was changed after the run.", name)
        for name in store.find_changed_results(run.folder)
        if name not in told_files
    ]
    findings += _check_config(run)
    if all(finding.level != "leak" for finding in findings):
        rest = f"; {unhashed} file(s) above 1 MiB are known by size only" if unhashed else ""
        names = f"{len(run.chain)} artifact(s) have names that match their records"
        findings.insert(0, AuditFinding("chain", "ok", f"{names}, and unchanged files{rest}."))
    return findings


def check_warnings(run: AuditedRun) -> list[AuditFinding]:
    """Repeat what the report warns of in the data, such as pictures that another data set has too."""
    return [
        AuditFinding("warnings", "warning", str(text)) for text in run.responses.coords.get("warnings", ())
    ]


def check_recordings(run: AuditedRun) -> list[AuditFinding]:
    """Compare the files that the data set is read from by now with those that the run was made from."""
    told = run.prepared.fields.get("inputs") or {}
    if not told:
        return []  # drawn, not read
    try:
        dataset = read_config(run.folder).dataset
        now, is_remote = dataset.hash_inputs(), is_address(getattr(dataset, "root", None) or "")
    except (OSError, BraindecodeVisError) as error:
        text = f"not checkable: the recordings cannot be read from here ({str(error).rstrip('.')})."
        return [AuditFinding("recordings", "warning", text)]
    # Where no name has a digest of 32 digits, an earlier version looked at samples of the files.
    comparable = {
        name for name, digest in told.items() if len(str(digest)) == len(str(now.get(name, digest)))
    }
    changed = [name for name in {**told, **now} if told.get(name) != now.get(name)]
    if not comparable:
        text = "not checkable: the run was made by a version that checked only samples of its recordings."
        return [AuditFinding("recordings", "warning", text)]
    if changed:
        text = f"{len(changed)} file(s) differ from those of the run, first {list_first(changed)}."
        if is_remote and any(name.endswith((".hdf5", ".h5")) for name in changed):
            text += " Earlier versions misread HDF5 files of 64 MiB or more on servers; repeat runs of such files."
        return [AuditFinding("recordings", "warning", text, changed[0])]
    return [AuditFinding("recordings", "ok", f"{len(told)} input(s) are unchanged since the run.")]


def _find_tampering(record: Record, reads: bool) -> str:
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
            f"it belongs in {content['stage']}/{expected}, not {record.path.parent.name}/{record.path.name}"
        )
    if damage := store.find_damage(record.path, read=reads):
        return damage
    added = store.list_added(record.path)
    return f"{added[0]} is not a file of the run" if added else ""


def _check_config(run: AuditedRun) -> list[AuditFinding]:
    """Compare ``config.yaml`` with the settings that the artifacts were made with."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        return [
            AuditFinding(
                "chain", "warning", "there is no config.yaml; the settings are taken from the artifacts."
            )
        ]
    try:
        config = read_config(path)
    except ConsentError:
        raise
    except BraindecodeVisError as error:
        return [AuditFinding("chain", "warning", f"config.yaml cannot be read: {error}", "config.yaml")]
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
    return [AuditFinding("chain", "warning", text, "config.yaml")]


# --- transductive settings ----------------------------------------------------------------------------------


def check_options(run: AuditedRun) -> list[AuditFinding]:
    """List what is transductive by its settings, and compare the centring of retrieval with the training images'."""
    findings = []
    subjects = run.responses.trials["subject"].astype(str).to_numpy(dtype=object)
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        kind = name_alignment(record.encoder.get("subject_alignment", "none"))
        new = set(subjects[fold.test].tolist()) - set(subjects[fold.train].tolist())
        # A subject outside the training set can only be aligned by the trials that are predicted.
        if kind in ("euclidean", "zscore") and new:
            text = (
                f"{kind} alignment of subject(s) {list_first(new)} uses the test trials that are predicted."
            )
            findings.append(AuditFinding("transductive", "transductive", text, name_fold(number)))
    dataset = dict(_walk(run.prepared.fields.get("dataset", {})))
    if dataset.get("model.kind") == "glm_by_voxel" and not dataset.get("model.per_split"):
        text = (
            "dataset.model glm_by_voxel chooses response functions, noise components and ridge penalties with all runs "
            "of a person, test trials included; dataset.model.per_split=true keeps them inside training runs."
        )
        findings.append(AuditFinding("transductive", "transductive", text))
    for path, value in dataset.items():
        # Volumes scaled over their run: the test trials of the run have a part in it.
        if path.endswith("clean.scaling") and value not in _OFF:
            text = f"dataset.{path} {value} scales each run by all of its volumes, including those of test trials."
            findings.append(AuditFinding("transductive", "transductive", text))
            break
    for record in run.chain:
        if "transductive" in record.fields.get("evaluation", {}).get("protocols", ()):
            text = (
                "rows named @transductive-... use all test queries of a subject together; no other row does."
            )
            findings.append(AuditFinding("transductive", "transductive", text, record.name))
        if record.content.get("stage") not in ("retrieve", "reconstruct"):
            continue
        for path, value in _walk(record.fields):
            words = [path.rsplit(".", 1)[-1].lower(), str(value).lower()]
            meaning = next((TRANSDUCTIVE[word] for word in words if word in TRANSDUCTIVE), None)
            if meaning is None:
                meaning = next((TRANSDUCTIVE[k] for k in TRANSDUCTIVE if f"{k}_" in f"{words[0]}_"), None)
            if meaning is not None and value not in _OFF:
                text = f"{path} {value}: {meaning}."
                findings.append(AuditFinding("transductive", "transductive", text, record.name))
    findings += _check_centre(run)
    for number, record in enumerate(run.trained):
        settings = _walk(record.fields.get("encoder", {}))
        digests = [str(value) for path, value in settings if path.endswith("pretrained_digest")]
        if digests:
            text = (
                f"the network starts from pretrained weights (sha256 {digests[0][:12]}); it cannot be "
                "checked here whether they were trained on test trials."
            )
            findings.append(AuditFinding("transductive", "warning", text, name_fold(number)))
            break
    text = "no setting uses the set of test queries or the test subject's own trials."
    return findings or [AuditFinding("transductive", "ok", text)]


def check_pretraining(run: AuditedRun) -> list[AuditFinding]:
    """Compare the number of trials that an encoder was pretrained on with those that its fold does not test."""
    findings: list[AuditFinding] = []
    declared = run.responses.trials["split"].to_numpy(dtype=object) == "test"
    findings += _check_corpora(run)
    trials = [
        record for record in run.pretrained if not record.fields.get("pretrain", {}).get("corpus_digests")
    ]
    for record in trials:
        number = record.fields.get("fold")
        tested = run.is_tested if number is None else np.zeros(run.responses.n_trials, bool)
        if number is not None:
            tested[run.folds[number].test] = True
        free = int((~tested & ~declared).sum())
        seen = int(record.content.get("n_train", 0)) + int(record.content.get("n_held_out", 0))
        if seen != free:
            text = f"it was pretrained on {seen} trials, but {free} are neither tested nor declared as test trials."
            findings.append(AuditFinding("pretraining", "leak", text, record.name))
    if started := [r for r in run.pretrained if "start_digest" in r.fields.get("pretrain", {})]:
        text = (
            "the pretraining continued from earlier weights (pretrain.start_from); it cannot be checked "
            "here whether these were trained on test trials."
        )
        findings.append(AuditFinding("pretraining", "warning", text, started[0].name))
    if trials and not findings:
        text = f"the encoder was pretrained without labels on {free} trials, none of them tested."
        findings.append(AuditFinding("pretraining", "ok", text))
    return findings


def _check_corpora(run: AuditedRun) -> list[AuditFinding]:
    """Look for tested subjects among the persons of the corpora that an encoder was pretrained on."""
    config = read_config(run.folder)
    found = [
        corpus
        for record in run.pretrained
        for key in ("corpora", "earlier_corpora")
        for corpus in read_json(record.path / "encoder.json").get(key, [])
    ] or list_earlier(config)  # of a folder that was pretrained elsewhere
    if not found:
        return []
    subjects = run.responses.trials["subject"].astype(str).to_numpy(dtype=object)
    sources = name_sources(config)
    if shared := find_shared_subjects(found, sources, set(subjects[run.is_tested].tolist())):
        text = f"the encoder was pretrained, without labels, on recordings of tested subject(s) {list_first(shared)}."
        return [AuditFinding("pretraining", "transductive", text)]
    n = sum(int(corpus["n_persons"]) for corpus in found)
    text = f"none of the {n} persons of the corpora that the encoder was pretrained on is tested under the same name."
    return [AuditFinding("pretraining", "ok", text)]


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, path)
    else:
        yield path, value


def _check_centre(run: AuditedRun) -> list[AuditFinding]:
    """Compute the cosine of each prediction with its image again, centred by the training images."""
    if run.retrieved is None or len(run.embedded) != len(run.folds):
        return []
    findings: list[AuditFinding] = []
    name = run.retrieved.fields.get("retrieval", {}).get("centre", "none")
    for number, record in enumerate(run.trained):
        folder, fold = run.retrieved.path / f"fold{number:02d}", run.folds[number]
        # A network may compare in a space of its own; an unknown centre is named by `check_options`.
        if (record.path / "network.json").is_file() or name not in ("none", "mean", "zscore"):
            continue
        if not (folder / "true_similarities.npy").is_file():
            continue
        stored = np.load(folder / "true_similarities.npy", allow_pickle=False)
        predicted, bank = read_embeddings(folder), read_embeddings(run.embedded[number].path)
        asked = list(map(str, read_json(folder / "retrieval.json")["query_ids"]))
        truth, queries = bank.select(asked).flat(), predicted.flat()
        ids = list(dict.fromkeys(run.responses.stimulus_ids[fold.train].tolist()))
        references = {
            "training images": bank.select(ids).flat(),
            "test images": bank.select(list(dict.fromkeys(asked))).flat(),
            "test queries": queries,
        }
        off = {
            who: float(np.abs(_compute_cosines(queries, truth, reference, name) - stored).max())
            for who, reference in references.items()
        }
        first, other = off["training images"], min(off, key=lambda who: off[who])
        if first < 1e-3:
            continue
        level: Level = "transductive" if off[other] < 1e-3 else "warning"
        whose = f"by those of the {other}" if level == "transductive" else "otherwise"
        text = f"the stored similarities are not centred by the training images (difference {first:.2g}), but {whose}."
        findings.append(AuditFinding("centre", level, text, name_fold(number)))
    return findings


def _compute_cosines(queries: np.ndarray, truth: np.ndarray, reference: np.ndarray, name: str) -> np.ndarray:
    """Return the cosine of each query with its image, both centred by the reference rows, shape (n_queries,)."""
    reference = np.asarray(reference, dtype=np.float64)
    mean = reference.mean(axis=0) if name != "none" else 0.0
    scale = reference.std(axis=0) if name == "zscore" else np.ones(reference.shape[1])
    a, b = (
        (np.asarray(x, dtype=np.float64) - mean) / np.where(scale > 0, scale, 1.0) for x in (queries, truth)
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0))
