"""Writes runs of a few trials that no pipeline made, so that one check of the audit is tested in milliseconds."""

from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.stimuli import StimulusSet


def write_artifact(folder, stage, fields=None, upstream=None, *, unit="", write=None, **content) -> Path:
    """Write an artifact with its record as a stage does; `write` puts files into its folder."""
    fields, upstream = fields or {}, upstream or {}
    name = store.compute_fingerprint(stage, 1, fields, upstream)
    path = folder / "stages" / stage / "-".join(filter(None, [unit, name]))
    path.mkdir(parents=True)
    if write is not None:
        write(path)
    record = {
        "stage": stage, "unit": unit, "version": 1, "fields": fields, "upstream": upstream, "fingerprint": name,
        "created": "2026-01-01 00:00:00 UTC", "files": store.describe_files(path), **content,
    }  # fmt: skip
    store.write_provenance(path / store.PROVENANCE, record)
    return path


def read_name(artifact: Path) -> str:
    """Return the fingerprint that an artifact is called by."""
    return store.read_json(artifact / store.PROVENANCE)["fingerprint"]


def write_prepared(
    folder, data, folds, *, ids=None, concepts=None, pixels=None, columns=None, unit="au", coords=None, notes=None,
    by=("trial",), protocol="own", fields=None,
) -> Path:  # fmt: skip
    """Write what preprocessing does: responses, stimuli and the split.

    Parameters
    ----------
    folder
        The run folder.
    data : array of shape (n_trials, n_features[, n_times])
    folds
        Pairs of row numbers, of training and of test.
    ids, concepts
        Of each trial; every trial shows an image and a concept of its own by default.
    pixels : uint8 array of shape (n_images, height, width, 3), optional
        In the order of the first trial of each id; noise by default.
    columns
        Further columns of the trial table, or others than the defaults.
    unit, coords, notes
        Of the responses, and what preprocessing noted.
    by, protocol
        What ``split.json`` says.
    fields
        Settings of the preprocessing.
    """
    n = len(data)
    ids = np.array([f"i{row:03d}" for row in range(n)] if ids is None else ids, dtype=object)
    concepts = ids if concepts is None else np.array(concepts, dtype=object)
    tested = np.unique(np.concatenate([test for _, test in folds]))
    split = np.where(np.isin(np.arange(n), tested) & (len(folds) == 1), "test", "train").astype(object)
    trials = pd.DataFrame(
        {"subject": "1", "session": "1", "run": "1", "stimulus_id": ids, "repetition": 0, "split": split}
    ).assign(**(columns or {}))
    names = pd.DataFrame({"id": ids, "concept": concepts}).drop_duplicates("id")
    if pixels is None:
        pixels = np.random.default_rng(5).integers(0, 256, (len(names), 8, 8, 3), dtype=np.uint8)
    stimuli = StimulusSet.from_pixels(pixels, names["id"].tolist(), names["concept"].tolist())
    dims = ("trial", "voxel") if data.ndim == 2 else ("trial", "channel", "time")

    def write(path):
        store.write_responses(path / "responses", Responses(data, dims, trials, unit, coords or {}))
        meta = path / "responses" / "meta.json"
        store.write_json(meta, {**store.read_json(meta), "provenance": notes or {}})
        store.write_stimuli(path / "stimuli", stimuli)
        parts = [{"train": [int(row) for row in a], "test": [int(row) for row in b]} for a, b in folds]
        store.write_json(path / "split.json", {"protocol": protocol, "by": list(by), "folds": parts})

    return write_artifact(folder, "preprocess", fields, write=write)


def write_bank(folder, prepared, ids, vectors, *, fields=None) -> Path:
    """Write target embeddings as embed does."""
    return write_artifact(
        folder, "embed", fields, {"preprocess": read_name(prepared)},
        write=lambda path: store.write_embeddings(path, Embeddings(np.asarray(vectors), ids, "toy")),
    )  # fmt: skip


def write_trained(folder, prepared, bank=None, *, number=0, fields=None, write=None, **content) -> Path:
    """Write the training of a fold; without a bank, of classes."""
    upstream = {"preprocess": read_name(prepared)} | ({} if bank is None else {"embed": read_name(bank)})
    fields = {"fold": number, **(fields or {})}
    return write_artifact(folder, "train", fields, upstream, unit=f"fold{number:02d}", write=write, **content)


def find(audit, check, level="leak"):
    """Return what a check found at a level."""
    return [item for item in audit.findings if item.check == check and item.level == level]
