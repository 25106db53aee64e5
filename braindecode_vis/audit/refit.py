"""Fit again with poisoned test trials: whatever a fold fits must not move by a single bit.

A copy of the prepared responses gets absurd numbers in every trial that the fold does not learn from, and so does a
copy of the target embeddings of every other image. Columns and encoder are then fitted twice, on the clean and on the
poisoned copy, with the seed of the run. The clean fit must also be the one that lies in the run.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.audit.files import AuditedRun, Finding, Record, name_fold
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.repeats import average_repetitions, pick_rows
from braindecode_vis.preprocessing.selection import SelectionConfig, fit_selection
from braindecode_vis.registry import validate_component
from braindecode_vis.roles import BRAIN_ENCODER, CATEGORY_DECODER, ENCODER_SETTINGS, build, play
from braindecode_vis.seeds import derive_seed
from braindecode_vis.store import read_embeddings, read_responses

POISON = 3e4  # within the reach of float16; times the largest value where the type allows it
TOLERANCE = 1e-3  # of the largest weight, between the fit that lies in the run and the clean one made here


def check_refit(run: AuditedRun, scratch: Path | None = None) -> list[Finding]:
    """Fit every fold again, clean and poisoned.

    Parameters
    ----------
    scratch
        Folder for the copies, which are removed; the system's by default.

    Raises
    ------
    DataError
        If the disk is too small for a copy of the responses.
    """
    findings = []
    with tempfile.TemporaryDirectory(dir=scratch, prefix="audit-") as temporary:
        copy = Path(temporary) / "responses"
        _copy_responses(run, copy)
        clean = run.responses
        for number, record in enumerate(run.trained):
            settings = play(ENCODER_SETTINGS, validate_component("encoder", record.fields["encoder"]))
            if settings.trains_in_processes:
                text = "a network is not trained again: its order of sums, and so its weights, depend on the machine."
                findings.append(Finding("refit", "warning", f"skipped: {text}", name_fold(number)))
                continue
            poisoned = _poison(run, copy, number)
            folders = [Path(temporary) / f"{name}{number}" for name in ("clean", "poisoned")]
            for folder, responses in zip(folders, (clean, poisoned), strict=True):
                folder.mkdir()
                _fit(run, record, number, responses, folder, poison=responses is poisoned)
            findings += _compare(record, folders[0], folders[1], name_fold(number))
            for folder in folders:
                shutil.rmtree(folder)
    text = f"{len(run.trained)} fit(s) are bitwise the same with poisoned test trials, and the same as in the run."
    return findings or [Finding("refit", "ok", text)]


def _copy_responses(run: AuditedRun, target: Path) -> None:
    source = run.prepared.path / "responses"
    needed = sum(path.stat().st_size for path in source.iterdir())
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise DataError(
            f"a copy of the responses needs {needed / 1e9:.1f} GB, but {target.parent} has {free / 1e9:.1f} GB free; "
            "set TMPDIR to another disk, or leave --refit out."
        )
    shutil.copytree(source, target)


def _poison(run: AuditedRun, copy: Path, number: int) -> Responses:
    """Write absurd numbers into the trials that a fold does not learn from, and restore the others."""
    learns = np.zeros(run.responses.n_trials, dtype=bool)
    learns[run.folds[number].train] = True
    data = np.load(copy / "data.npy", mmap_mode="r+", allow_pickle=False)
    for row in range(len(data)):
        if learns[row]:
            data[row] = run.responses.data[row]
        else:
            signs = np.where(np.arange(data[row].size).reshape(data[row].shape) % 2, -1, 1)
            data[row] = signs * POISON * (1 + row % 2)
    data.flush()
    return read_responses(copy)


def _fit(
    run: AuditedRun, record: Record, number: int, responses: Responses, folder: Path, *, poison: bool
) -> None:
    """Choose columns and fit the encoder as training does, and write both into `folder`."""
    fields, rows = record.fields, run.folds[number].train
    seed = int(fields["seed"])
    config: Any = validate_component("encoder", fields["encoder"])
    role = CATEGORY_DECODER if run.decodes_categories else BRAIN_ENCODER
    encoder: Any = build(role, config, seed=derive_seed(seed, "train", number))
    if run.decodes_categories:
        picked = responses.select(rows)
        encoder.fit(picked, picked.trials["concept"].to_numpy(dtype=object))
        encoder.write(folder)
        return
    bank = read_embeddings(run.embedded[number].path)
    if poison:
        bank = _poison_targets(bank, responses.stimulus_ids[rows])
    choice = SelectionConfig.model_validate(fields["selection"])
    averaged = fields["repeats"] == "averaged"
    picked = average_repetitions(responses, rows) if averaged else pick_rows(responses, rows)
    picked = picked.with_trials(picked.trials.assign(concept=run.stimuli.concepts_of(picked.stimulus_ids)))
    if not choice.is_empty:
        single = responses.select(rows)
        targets = None
        if choice.encoding is not None:
            targets = bank.select(list(pd.unique(single.stimulus_ids)))
        selection = fit_selection(choice, single, targets, seed=derive_seed(seed, "selection"))
        selection.write(folder / "selection")
        picked = selection.apply(picked)
    encoder.fit(picked, bank.select(list(picked.stimulus_ids)))
    encoder.write(folder)


def _poison_targets(bank: Embeddings, train_ids: np.ndarray) -> Embeddings:
    vectors = np.array(bank.vectors, dtype=np.float32)
    vectors[~np.isin(bank.ids.astype(str), train_ids.astype(str))] = POISON
    return Embeddings(vectors, bank.ids, bank.space)


def _compare(record: Record, clean: Path, poisoned: Path, where: str) -> list[Finding]:
    """Compare all arrays of two fits bit by bit, and those of the clean one with the run's up to rounding."""
    for path in sorted(path for path in clean.rglob("*") if path.suffix in (".safetensors", ".npy")):
        name = path.relative_to(clean)
        first, second = _load_arrays(path), _load_arrays(poisoned / name)
        moved = [key for key in first if not np.array_equal(first[key], second[key])]
        if moved:
            text = f"{moved[0]} in {name} moves when test trials are poisoned: they reach the fit."
            return [Finding("refit", "leak", text, where)]
        if not (record.path / name).is_file():
            return [Finding("refit", "warning", f"the run has no {name} to compare with.", where)]
        stored = _load_arrays(record.path / name)
        other = [key for key in first if not _is_close(first[key], stored.get(key))]
        if other:
            text = f"{other[0]} in {name} is not what the training trials of the fold give."
            return [Finding("refit", "leak", text, where)]
    return []


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    if path.suffix == ".npy":  # as encoders from outside may write
        return {"the array": np.load(path, allow_pickle=False)}
    arrays: dict[str, np.ndarray] = load_file(path)
    return arrays


def _is_close(made: np.ndarray, stored: np.ndarray | None) -> bool:
    if stored is None or made.shape != stored.shape:
        return False
    if made.dtype.kind != "f":
        return bool(np.array_equal(made, stored))
    scale = float(np.abs(stored).max()) if stored.size else 0.0
    return bool(np.abs(made - stored).max() <= TOLERANCE * scale) if stored.size else True
