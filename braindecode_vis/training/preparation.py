"""What a training is made ready with: batch size, subjects, rows of the targets, and what names it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import DataError
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    from braindecode_vis.training.encoder import NetworkEncoderConfig

LARGEST_AUTO, SMALLEST_AUTO = 1024, 16


def identify_training(
    config: NetworkEncoderConfig,
    seed: int,
    responses: Responses,
    targets: Embeddings,
    train: np.ndarray,
    signal: Signal,
) -> dict[str, Any]:
    """Return what a checkpoint must agree with."""
    fields = config.hashed_fields()
    columns = responses.trials.iloc[train][["subject", "stimulus_id", "repetition"]].astype(str)
    ends = train[[0, -1]]
    digest = hashlib.sha256("\n".join(columns.agg("/".join, axis=1)).encode())
    for array in (responses.data, targets.vectors):
        digest.update(np.ascontiguousarray(array[ends], dtype=np.float32).tobytes())
    signal_fields = {
        k: v for k, v in signal.as_json().items() if k in ("dims", "shape", "subjects", "n_voxels")
    }
    return {
        "network": fields.pop("network"),
        "config": fields,
        "signal": signal_fields,
        "target": {"space": targets.space, "shape": list(targets.vectors.shape[1:])},
        "data": digest.hexdigest()[:16],
        "seed": seed,
    }


def choose_batch_size(n_units: int) -> int:
    """Return an eighth of the training set as a power of two, from 16 to 1024.

    Examples
    --------
    >>> choose_batch_size(16540), choose_batch_size(1000), choose_batch_size(20)
    (1024, 64, 16)
    """
    eighth = 1 << max(0, (n_units // 8).bit_length() - 1)
    return min(LARGEST_AUTO, max(SMALLEST_AUTO, eighth))


def keep_subjects(signal: Signal, names: set[str]) -> Signal:
    """Return the signal with these of its subjects."""
    kept = [i for i, name in enumerate(signal.subjects) if name in names]
    voxels = tuple(signal.n_voxels[i] for i in kept) if signal.n_voxels else ()
    return replace(signal, subjects=tuple(signal.subjects[i] for i in kept), n_voxels=voxels)


def take_rows(targets: Embeddings, rows: np.ndarray) -> Embeddings:
    """Return rows of the targets, which may repeat ids."""
    return Embeddings(np.asarray(targets.vectors[rows], dtype=np.float32), targets.ids[rows], targets.space)


def check_rows(responses: Responses, targets: Embeddings) -> None:
    """Raise `DataError` unless there is one target per trial, in the order of the trials."""
    if len(targets) != responses.n_trials or (targets.ids != responses.stimulus_ids).any():
        raise DataError("a network needs one target per trial, in the order of the trials.")
