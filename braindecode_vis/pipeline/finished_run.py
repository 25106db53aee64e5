"""Reads a finished run: every stage is read from the run folder, and none is computed.

Owns how the artifacts of a run are found without its recordings, which may lie on another machine by now. Nothing is
written into the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braindecode_vis.base import digests, store
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.config import read_config
from braindecode_vis.pipeline.preparing import Prepared, read_dataset
from braindecode_vis.pipeline.runs import Compute, ProgressListener, Run, SilentListener
from braindecode_vis.preprocessing.splits import Split


@dataclass
class FinishedRun(Run):
    """A run whose stages are found, never computed."""

    def produce(
        self,
        stage: str,
        fields: Mapping[str, Any],
        upstream: Mapping[str, str],
        compute: Compute,
        unit: str = "",
    ) -> store.Artifact:
        """Return the artifact from the run folder, or say that the run is unfinished."""
        return self.folder.find(stage, fields=fields, upstream=upstream, unit=unit)


def open_finished(folder: Path, listener: ProgressListener | None = None) -> FinishedRun:
    """Open a run folder for reading.

    Parameters
    ----------
    folder
        Of a finished run.
    listener
        Shows progress.

    Raises
    ------
    DataError
        If it is not a run folder, or the run has not come as far as preprocessing.
    """
    path = folder.expanduser().absolute()
    if not (path / "config.yaml").is_file():
        raise DataError(
            f"{path} is not a run folder: it holds no config.yaml; give the folder that run printed."
        )
    run = FinishedRun(read_config(path), store.RunFolder(path, writable=False), listener or SilentListener())
    with digests.show_hashing(run.listener.watch):
        artifact = _find_preprocessing(run)
    responses, stimuli = read_dataset(artifact.path)
    record = store.read_json(artifact.path / "split.json")
    split = Split.from_json(record, responses.trials, stimuli.concepts_of(responses.stimulus_ids))
    # What follows finds itself by the fingerprint of this one; its own would need the recordings to be hashed.
    run.seen["preprocess"] = Prepared(artifact, responses, stimuli, split)
    return run


def read_every_file(run: Run) -> None:
    """Read all that lies in a run folder, and the files of its data set, whatever is remembered of unchanged files.

    Raises
    ------
    DataError
        If a file is not as the run wrote it. Recordings that changed make another run, and those that are not available
        are left out; an audit reports both.
    """
    folder = run.folder.path
    with digests.hash_anew(), digests.show_hashing(run.listener.watch):
        # Those of earlier settings as well: they are reused once the settings are.
        for path in sorted((folder / "stages").glob("*/[!.]*")):
            if damage := store.find_damage(path, read=True):
                raise DataError(
                    f"the stage {path.parent.name} of {folder} is damaged: {damage}; delete {path}, then run "
                    f"braindecode-vis run {folder} again."
                )
        if changed := store.find_changed_results(folder):
            raise DataError(
                f"{folder / changed[0]} was changed after the run; run braindecode-vis run {folder} again."
            )
        with suppress(BraindecodeVisError, OSError):
            run.config.dataset.hash_inputs()


def _find_preprocessing(run: FinishedRun) -> store.Artifact:
    """Return the preprocessing that the last report named, or else the newest one of these settings."""
    try:
        named = store.read_json(run.folder.path / store.PROVENANCE)["stages"]["preprocess"]["fingerprint"]
    except (OSError, BraindecodeVisError, KeyError, TypeError):
        named = None
    wanted = store.json_plain(
        {
            "dataset": run.config.dataset.hashed_fields(),
            "split": run.config.split.hashed_fields(),
            "seed": run.config.seed,
        }
    )
    found = []
    for path in sorted((run.folder.path / "stages" / "preprocess").glob(f"*/{store.PROVENANCE}")):
        record = store.read_provenance(path)
        if {key: record.get("fields", {}).get(key) for key in wanted} == wanted:
            # Sorted so that the named one wins over any newer one.
            newest = (record["fingerprint"] == named, str(record["created"]))
            found.append((newest, path.parent, record))
    if not found:
        raise DataError(
            f"{run.folder.path} is unfinished: its stage preprocess is missing, or was made with other settings; "
            f"finish it first with braindecode-vis run {run.folder.path}."
        )
    _, _, record = max(found, key=lambda entry: entry[0])
    return run.folder.find("preprocess", fields=record["fields"], upstream=record["upstream"])
