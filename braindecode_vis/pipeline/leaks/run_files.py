"""Reads a finished run for the audit: trials, folds, and the artifacts behind its scores.

Owns the way from the scores of a run folder back to its trials, along the fingerprints that each artifact recorded.
Reads files only: nothing is asked of the pipeline, which would repair what is to be judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.pipeline.leaks.findings import How, Part, Verified
from braindecode_vis.pipeline.synthetic import read_synthetic
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.training.auto import FILE as CHOICE


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
    def encoder(self) -> Mapping[str, Any]:
        """Settings of the encoder that was fitted: those of the winner where several were tried."""
        asked: Mapping[str, Any] = self.fields.get("encoder", {})
        path = self.path / CHOICE
        return asked["candidates"][store.read_json(path)["chosen"]] if path.is_file() else asked

    @property
    def upstream(self) -> Mapping[str, str]:
        """Fingerprints of what the artifact was made of."""
        return self.content.get("upstream", {})

    @property
    def name(self) -> str:
        """Stage and unit, for messages."""
        return f"{self.content.get('stage', '')} {self.content.get('unit', '')}".strip()


#: Branches of reconstructions by their names in the upstream of `reconstruct`, and what findings call them.
BRANCH_WORDS = {"low_level": "low-level", "text": "text"}


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
    branch_fits
        `trained` and `embedded` of each branch of the reconstructions, by its name; see `branches`.
    out_of_fold
        Predictions of the training trials of each fold; empty if none were made.
    pretrained
        What the run itself pretrained for its encoders; empty if they start anew, or from files.
    synthetic
        Synthetic trials that the training of a fold was given, by the fingerprint that its record names.
    thorough
        Whether fits are made again whatever they cost.
    seed
        Of permutations.
    reads
        Whether the bytes of every file are read, whatever is remembered of unchanged ones.
    verified
        What checks say of how they verified it; see `state`.
    refitted
        Artifacts of fits that were found again to the last bit.
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
    branch_fits: Mapping[str, tuple[tuple[Record, ...], tuple[Record, ...]]] = field(default_factory=dict)
    out_of_fold: tuple[Record, ...] = ()
    pretrained: tuple[Record, ...] = ()
    synthetic: Mapping[str, Record] = field(default_factory=dict)
    thorough: bool = False
    seed: int = 0
    reads: bool = True
    verified: list[Verified] = field(default_factory=list)
    refitted: set[Path] = field(default_factory=set)

    def state(self, part: Part, how: How, what: str, reason: str = "") -> None:
        """Say how a part of the run was verified; every check that verifies one calls this, whatever it finds.

        Parameters
        ----------
        part, how, what, reason
            As in `braindecode_vis.pipeline.leaks.findings.Verified`.
        """
        said = Verified(part, how, what, reason)
        if said not in self.verified:
            self.verified.append(said)

    def read_synthetic(self, trained: Record) -> tuple[Responses, Embeddings] | None:
        """Return the synthetic trials that a fit learnt from beside the real ones, and their targets."""
        record = self.synthetic.get(trained.upstream.get("synthesise", ""))
        return None if record is None else read_synthetic(record.path)

    @property
    def branches(self) -> dict[str, AuditedRun]:
        """The branches of the reconstructions as runs that have come as far as training, by name."""
        return {
            name: replace(
                self, trained=trained, embedded=embedded, branch_fits={}, chain=(*embedded, *trained), missing=(),
                retrieved=None, evaluated=None, out_of_fold=(), pretrained=(),
            )
            for name, (trained, embedded) in self.branch_fits.items()
        }  # fmt: skip

    @property
    def trials(self) -> pd.DataFrame:
        """The trial table, with the concepts of the stimulus table."""
        return self.responses.trials.assign(concept=self.concepts)

    @property
    def reconstructed(self) -> Record | None:
        """The images, if the run has made any."""
        return next((record for record in self.chain if record.content.get("stage") == "reconstruct"), None)

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
    def is_training(self) -> np.ndarray:
        """Trials that statistics may be learnt from, bool of shape (n_trials,).

        Those that the data set declares as training and no fold tests; all declared ones where every trial is tested
        in one fold or another.
        """
        declared = self.responses.trials["split"].to_numpy(dtype=object) == "train"
        return declared if self.is_tested.all() else ~self.is_tested & declared

    @property
    def is_tested(self) -> np.ndarray:
        """Trials that one of the folds tests, bool of shape (n_trials,)."""
        tested = np.zeros(self.responses.n_trials, dtype=bool)
        for fold in self.folds:
            tested[fold.test] = True
        return tested

    @property
    def decodes_categories(self) -> bool:
        """Whether a class is decoded, not an image."""
        if self.trained:
            return "embed" not in self.trained[0].upstream  # a class needs no embedding of its image
        kind = self.prepared.fields.get("split", {}).get("kind")
        return kind == "leave_one_run_out" or not self.stimuli.knows_images


def name_fold(number: int) -> str:
    """Return what a fold is called in findings."""
    return f"fold {number}"


def drop_digests(fields: Any) -> Any:
    """Return hashed settings without the digests of files that are beside them, as the settings' own type takes them.

    Examples
    --------
    >>> drop_digests({"kind": "x", "members": [{"width": 2, "weights_sha256": "ab"}]})
    {'kind': 'x', 'members': [{'width': 2}]}
    """
    if isinstance(fields, Mapping):
        ends = ("_sha256", "_digest", "_digests")
        return {key: drop_digests(value) for key, value in fields.items() if not str(key).endswith(ends)}
    return [drop_digests(value) for value in fields] if isinstance(fields, list | tuple) else fields


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


def list_sweep(folder: Path) -> list[Path]:
    """Return the runs of a sweep, which share one store of artifacts; none for the folder of a run."""
    folder = folder.expanduser().absolute()
    if (folder / "config.yaml").is_file():
        return []
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


def open_audited(folder: Path, *, thorough: bool = False, seed: int = 0, reads: bool = True) -> AuditedRun:
    """Open a run folder for reading; the options are those of `AuditedRun`.

    The artifacts are those behind ``scores.json``; of an unfinished run, the newest.

    Raises
    ------
    DataError
        If the folder holds no preprocessed data or several runs, if an unfinished run shares its stages with others,
        or a file that every check needs is damaged.
    """
    folder = folder.expanduser().absolute()
    if several := list_sweep(folder):
        raise DataError(f"{folder} holds {len(several)} runs; give one of them, such as {several[0]}.")
    stages = (
        "preprocess",
        "embed",
        "pretrain",
        "synthesise",
        "train",
        "out_of_fold",
        "retrieve",
        "reconstruct",
        "evaluate",
    )
    records = {stage: _read_records(folder, stage) for stage in stages}
    if not records["preprocess"]:
        raise DataError(
            f"{folder} is not a run folder with results: expected {folder / 'stages' / 'preprocess'}; give the folder "
            "that run printed, or run it first."
        )
    missing: list[str] = []
    path = folder / "scores.json"
    rows = store.read_json(path) if path.is_file() else []
    # The scores name the artifact that they are a copy of; without them, the newest one is judged.
    first = rows[0] if isinstance(rows, list) and rows else {}
    wanted = str(first.get("fingerprint", "")) if isinstance(first, Mapping) else ""
    named = [record for record in records["evaluate"] if _is_named(record, wanted)]
    if not named and (folder / "stages").is_symlink():  # the newest artifact may belong to another run
        raise DataError(
            f"{folder} shares its stages with other runs of a sweep, and its scores name no artifact there; run the "
            "sweep again first."
        )
    candidates = named or records["evaluate"]
    evaluated = candidates[-1] if candidates else None
    retrieved = _follow(evaluated, "retrieve", records["retrieve"], missing)
    reconstructed = _follow(evaluated, "reconstruct", records["reconstruct"], missing)
    trained = _follow_folds(retrieved or evaluated, records["train"], missing)

    def follow_fits(stage: str, name: str) -> tuple[Record, ...]:
        return _follow_folds(reconstructed, records[stage], missing, name) if reconstructed else ()

    def follow_banks(fits: Sequence[Record]) -> tuple[Record, ...]:
        return tuple(found for fold in fits if (found := _follow(fold, "embed", records["embed"], missing)))

    out_of_fold = follow_fits("out_of_fold", "out_of_fold")
    branch_fits = {
        name: (fits, follow_banks(fits)) for name in BRANCH_WORDS if (fits := follow_fits("train", name))
    }
    # Those that no image was made with are judged too, if they are there for every fold.
    made = {record.upstream.get("train", ""): record for record in records["out_of_fold"]}
    if not out_of_fold and all(fold.fingerprint in made for fold in trained):
        out_of_fold = tuple(made[fold.fingerprint] for fold in trained)
    embedded = follow_banks(trained)
    synthetic = {
        str(fold.upstream["synthesise"]): added
        for fold in trained
        if "synthesise" in fold.upstream
        and (added := _follow(fold, "synthesise", records["synthesise"], missing)) is not None
    }
    prepared = _follow(trained[0] if trained else None, "preprocess", records["preprocess"], missing)
    assert prepared is not None
    fits = (*trained, *(fold for fits, _ in branch_fits.values() for fold in fits))
    found = [_follow(fold, "pretrain", records["pretrain"], missing) for fold in fits]
    pretrained = tuple({record.path: record for record in found if record is not None}.values())
    last = [record for record in (retrieved, reconstructed, evaluated) if record is not None]
    chain = {
        record.path: record
        for record in (
            prepared,
            *embedded,
            *pretrained,
            *synthetic.values(),
            *trained,
            *(record for fits, banks in branch_fits.values() for record in (*banks, *fits)),
            *out_of_fold,
            *last,
        )
    }
    try:
        responses = store.read_responses(prepared.path / "responses")
        stimuli = store.read_stimuli(prepared.path / "stimuli")
        split = store.read_json(prepared.path / "split.json")
        folds = tuple(_read_fold(part, responses.n_trials) for part in split["folds"])
        str(split["by"])
        concepts = stimuli.concepts_of(responses.stimulus_ids)
    except (DataError, PermissionError):
        raise
    except Exception as error:  # tables and arrays of other forms, lists that are texts
        raise DataError(
            f"{prepared.path} is damaged ({type(error).__name__}: {error}); delete it and run again."
        ) from error
    return AuditedRun(
        folder, prepared, trained, embedded, retrieved, evaluated, tuple(chain.values()),
        tuple(dict.fromkeys(missing)), responses, stimuli, concepts, split, folds,
        branch_fits, out_of_fold, pretrained, synthetic, thorough, seed, reads,
    )  # fmt: skip


def _read_fold(content: Mapping[str, Any], n_trials: int) -> Fold:
    """Return a fold of ``split.json``; ValueError if it lists rows that are not there."""
    train, test = (np.array(content[side], dtype=np.int64) for side in ("train", "test"))
    for rows in (train, test):
        if rows.ndim != 1 or (len(rows) and (rows.min() < 0 or rows.max() >= n_trials)):
            raise ValueError(f"split.json lists trials that are not among the {n_trials}")
    return Fold(train, test)


def _read_records(folder: Path, stage: str) -> list[Record]:
    """Return the artifacts of a stage, oldest first; unreadable ones are left out."""
    found = []
    for path in sorted((folder / "stages" / stage).glob(f"*/{store.PROVENANCE}")):
        if path.parent.name.startswith("."):
            continue
        with contextlib.suppress(DataError, OSError):
            found.append(Record(path.parent, store.read_provenance(path)))
    return sorted(found, key=lambda record: str(record.content.get("created", "")))


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


def _follow_folds(
    record: Record | None, candidates: Sequence[Record], missing: list[str], name: str = "train"
) -> tuple[Record, ...]:
    """Return the artifact of each fold in the order of folds; `name` is what a record calls them."""
    if record is not None:
        found_keys = (key for key in record.upstream if key.startswith(name))
        numbers = {key: key.removeprefix(name) or "0" for key in found_keys}
        keys = sorted((key for key in numbers if numbers[key].isdecimal()), key=lambda key: int(numbers[key]))
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
            stage = "out_of_fold" if name == "out_of_fold" else "train"
            missing.append(f"{stage} {unit} {fingerprint}, which the scores were made of")
        if named or others:
            found.append((named or others)[-1])
    return tuple(found)
