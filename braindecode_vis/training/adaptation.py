"""What a network needs to go on learning from a few trials of a new subject: wider statistics and wider tables.

`NetworkEncoder.adapt` puts them together.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.training.fitted import reduce_views

if TYPE_CHECKING:
    from torch import Tensor

    from braindecode_vis.training.fitted import NetworkFit


def check_adaptation(fit: NetworkFit, responses: Responses, targets: Embeddings) -> None:
    """Raise `DataError` if axes or target space differ from those of the first training."""
    fit.check_input(responses)
    reduced = reduce_views(Embeddings(targets.vectors[:1], targets.ids[:1], targets.space), fit.view_choice)
    if reduced.space != fit.space or tuple(reduced.vectors.shape[1:]) != fit.target_shape:
        raise DataError(f"this encoder predicts {fit.space!r}, so it cannot be adapted to {targets.space!r}.")


def extend_signal(known: Signal, found: Signal) -> Signal:
    """Return the known signal with the new subjects of another one behind its own."""
    new = [i for i, name in enumerate(found.subjects) if name not in known.subjects]
    voxels = known.n_voxels
    if voxels and new:
        counts = found.n_voxels or (found.shape[0],) * len(found.subjects)
        # behind the known ones, as rows of a table are added at its end
        voxels = (*voxels, *(counts[i] for i in new))
    return replace(known, subjects=(*known.subjects, *(found.subjects[i] for i in new)), n_voxels=voxels)


def imagine_subject(signal: Signal) -> Signal:
    """Return the signal with one more subject, whose weights are then told from those that all share."""
    counts = signal.n_voxels
    wider = (*counts, counts[-1]) if counts else ()
    return replace(signal, subjects=(*signal.subjects, "\0"), n_voxels=wider)


def digest_weights(weights: dict[str, Tensor]) -> str:
    """Return what tells these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def grow_state(
    old: dict[str, Tensor], fresh: dict[str, Tensor], n_subjects: int, n_new: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Return weights for a model with more subjects, and the names of the weights that belong to subjects.

    A tensor that grew by `n_new` along one axis is a table of subjects: rows of known subjects are kept, new ones start
    from the row of unknown subjects if the table has one, else from the mean row. A tensor that is new keeps its fresh
    values.

    Parameters
    ----------
    old, fresh
        State of the fitted model, and of a new one that was built for all subjects.
    n_subjects, n_new
        Subjects of the fitted model, and how many join.
    """
    grown, subject_names = {}, set()
    for name, value in fresh.items():
        if name not in old:
            grown[name] = value
            subject_names.add(name)
        elif old[name].shape == value.shape:
            grown[name] = old[name]
        else:
            grown[name] = _grow_table(name, old[name], value, n_subjects, n_new)
            subject_names.add(name)
    return grown, subject_names


def _grow_table(name: str, old: Tensor, fresh: Tensor, n_subjects: int, n_new: int) -> Tensor:
    # A table of subjects grows along exactly one axis, by exactly the new subjects.
    axes = [a for a in range(old.ndim) if old.shape[a] != fresh.shape[a]] if old.ndim == fresh.ndim else []
    if len(axes) != 1 or fresh.shape[axes[0]] != old.shape[axes[0]] + n_new:
        raise DataError(
            f"the weight {name} changes from {tuple(old.shape)} to {tuple(fresh.shape)} with a new subject, so this "
            "network cannot be adapted; train it again with that subject."
        )
    import torch

    table = old.movedim(axes[0], 0)
    known, rest = table[:n_subjects], table[n_subjects:]
    # The row behind the known subjects is the one of unknown subjects, learnt by hiding who is who.
    start = rest[:1] if len(rest) else known.mean(dim=0, keepdim=True)
    # known subjects, new ones, and the row of unknown ones last again
    return torch.cat([known, start.expand(n_new, *start.shape[1:]), rest]).movedim(0, axes[0]).contiguous()
