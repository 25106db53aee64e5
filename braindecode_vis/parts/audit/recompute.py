"""Computes a stage of an audited run again, from the artifacts that the run says it was made of.

The code is that of the pipeline: `RecomputedRun` is a run whose artifacts are those under audit and whose own files go
into a temporary folder. Each stage is computed from the *stored* results of the stages before it, so that a number that
was changed is found in its own stage even if every digest was made again. Knows nothing of what is compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError
from braindecode_vis.config import read_config
from braindecode_vis.pipeline import preparing
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, Record
from braindecode_vis.pipeline.runs import STAGE_VERSIONS, Compute, Run
from braindecode_vis.preprocessing.splits import Split


@dataclass
class RecomputedRun(Run):
    """A run whose artifacts are those of an audited run; one stage at a time is computed again beside them.

    Parameters
    ----------
    audited
        Where artifacts are taken from.
    computing
        The stage that is computed again, empty for none.
    made
        Folder of what was computed, by stage and unit.
    remaking
        The artifact that is being computed again.
    """

    audited: AuditedRun | None = None
    computing: str = ""
    made: dict[str, Path] = field(default_factory=dict)
    remaking: Path | None = None

    @property
    def records(self) -> Path:
        """The audited run folder."""
        assert self.audited is not None
        return self.audited.folder

    @property
    def earlier(self) -> Path | None:
        """The artifact that is computed again."""
        return self.remaking

    def produce(
        self,
        stage: str,
        fields: Mapping[str, Any],
        upstream: Mapping[str, str],
        compute: Compute,
        unit: str = "",
    ) -> store.Artifact:
        """Return the artifact that is audited; compute it again, beside it, if it is of the stage in question."""
        record = self.find(stage, store.json_plain(fields), unit)
        if stage == self.computing:
            name = f"{stage} {unit} {store.hash_json(store.json_plain(fields))}"
            folder = self.folder.path / name.replace(" ", "-")
            folder.mkdir()
            self.remaking = record.path
            compute(folder)
            self.remaking = None
            self.made[record.path.as_posix()] = folder
        return store.Artifact(record.path, record.fingerprint, True, "audited")

    def find(self, stage: str, fields: Mapping[str, Any], unit: str) -> Record:
        """Return the audited artifact of these settings, or raise `DataError`."""
        assert self.audited is not None
        for record in self.audited.chain:
            if (record.content.get("stage"), record.content.get("unit")) != (stage, unit):
                continue
            # Ceilings are read beside the data set, which may lie elsewhere by now.
            if {**record.fields, "ceilings": None} == {**fields, "ceilings": None}:
                return record
        name = f"{stage} {unit}".strip()
        raise DataError(f"no {name} of the settings in config.yaml is among what the scores were made of.")

    def require_current(self, record: Record) -> None:
        """Raise `DataError` if an artifact was made by another version of its stage, so that its numbers may differ."""
        stage, version = str(record.content.get("stage")), record.content.get("version")
        if version != STAGE_VERSIONS.get(stage):
            raise DataError(
                f"{record.name} was made by version {version} of its code, but this is {STAGE_VERSIONS.get(stage)}; "
                "run it again to compare."
            )

    def compute(self, stage: str, ask: Callable[[Run], Any]) -> dict[str, Path]:
        """Let `ask` compute a stage again, and return the folders of what it made by those of the artifacts."""
        self.computing, self.made = stage, {}
        self.seen.pop(ask.__name__, None)
        try:
            ask(self)
            return self.made
        finally:
            self.computing = ""


def open_recomputed(run: AuditedRun, temporary: Path) -> RecomputedRun:
    """Return a run that computes the stages of an audited one again, into `temporary`."""
    config = read_config(run.folder / "config.yaml")
    again = RecomputedRun(config, store.RunFolder(temporary, writable=False), audited=run)
    split = Split.from_json(dict(run.split), run.responses.trials, run.concepts)
    artifact = store.Artifact(run.prepared.path, run.prepared.fingerprint, True, "audited")
    again.seen["preprocess"] = preparing.Prepared(artifact, run.responses, run.stimuli, split)
    return again


def require_space(source: Path, temporary: Path, what: str) -> None:
    """Raise `DataError` where a folder is too small for a second copy of the files of another one."""
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    free = shutil.disk_usage(temporary).free
    if needed > free:
        raise DataError(
            f"a copy of {what} needs {needed / 1e9:.1f} GB, but {temporary} has {free / 1e9:.1f} GB free; "
            "set TMPDIR to another disk, or leave --refit out."
        )
