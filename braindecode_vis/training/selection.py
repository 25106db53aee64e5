"""Scores of held-out trials after each epoch, and which epoch's weights are kept.

Owns what `encoder.selection` decides. Only held-out training trials are looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from braindecode_vis.checks import ConfigError
from braindecode_vis.training.batches import Units
from braindecode_vis.training.model import Batch, BrainImageModel
from braindecode_vis.training.validation import compute_top_k, name_top_k

if TYPE_CHECKING:
    from braindecode_vis.training.loop import Trainer


def validate(trainer: Trainer) -> dict[str, Any]:
    """Return loss and accuracy of the held-out trials, nothing if none were held out."""
    feed = trainer.feed
    if feed.held is None:
        return {}
    model = trainer.average.model if trainer.average is not None else trainer.model
    model.eval()
    brain, subjects, losses, sizes = [], [], [], []
    images: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(feed.held), trainer.batch_size):
            batch = _load_plain(
                trainer, feed.held, np.arange(start, min(start + trainer.batch_size, len(feed.held)))
            )
            brain.append(model.encode_brain(batch.data, batch.subject).float().cpu().numpy())
            subjects.append(batch.subject)
            batch.tuned = model.embed_images(batch)
            for stimulus, image in zip(batch.stimuli.tolist(), batch.tuned, strict=True):
                images.setdefault(stimulus, image)
            if len(torch.unique(batch.stimuli)) > 1 and len(torch.unique(batch.concepts)) > 1:
                loss = model.compute_plain_loss(batch)
                if loss is not None:
                    losses.append(float(loss))
                    sizes.append(len(batch.data))
    gallery = sorted(images)
    name, k = name_top_k(len(gallery))
    truth = np.searchsorted(gallery, feed.held.stimuli)
    raw = torch.stack([images[i] for i in gallery])
    score = _score_held_out(model, np.concatenate(brain), torch.cat(subjects), raw, truth, k)
    found = {f"validation_{name}": score, "n_validation_images": len(gallery)}
    if losses:
        found["validation_loss"] = float(np.average(losses, weights=sizes))
    return _agree(trainer, found)


def _score_held_out(
    model: BrainImageModel,
    brain: np.ndarray,
    subjects: torch.Tensor,
    raw: torch.Tensor,
    truth: np.ndarray,
    k: int,
) -> float:
    """Return the accuracy over all trials, each searched in the gallery of its own subject where there are several."""

    def encode(subject: torch.Tensor | None) -> np.ndarray:
        with torch.no_grad():
            return model.encode_image(raw, subject).float().cpu().numpy()

    if not model.has_subject_galleries:
        return compute_top_k(brain, encode(None), truth, k)
    found, numbers = 0.0, subjects.cpu().numpy()
    for number in np.unique(numbers):
        own = numbers == number
        gallery = encode(subjects.new_full((len(raw),), int(number)))
        found += float(own.mean()) * compute_top_k(brain[own], gallery, truth[own], k)
    return found


def _load_plain(trainer: Trainer, units: Units, rows: np.ndarray) -> Batch:
    job = trainer.feed.plan(units, rows, update=0, part=0, rank=0, n_ranks=1)
    return trainer.feed.assemble(
        units, *trainer.feed.load_all(units, job), trainer.counters.update / trainer.n_updates
    )


def _agree(trainer: Trainer, found: dict[str, Any]) -> dict[str, Any]:
    """Return what the first process found, so that all stop at the same epoch."""
    if trainer.n_ranks > 1:
        shared = [found]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]
    return found


def keep_best(trainer: Trainer, record: dict[str, Any]) -> None:
    """Remember the weights of an epoch that was better on held-out trials than all before."""
    selection = trainer.settings.selection
    if selection.kind != "early_stopping":
        return
    if selection.monitor == "loss":
        if "validation_loss" not in record:
            raise ConfigError(
                "encoder.selection.monitor is loss, but no objective can be computed on held-out trials alone; "
                "set it to accuracy."
            )
        score = -record["validation_loss"]
    else:
        score = next(v for k, v in record.items() if k.startswith("validation_top"))
    best = trainer.counters.best_score
    if best is None or score > best:
        trainer.counters.best_score, trainer.counters.best_epoch = score, trainer.counters.epoch
        model = trainer.average.model if trainer.average is not None else trainer.model
        trainer.best = {k: v.detach().clone() for k, v in model.state_dict().items()}


def is_stopped(trainer: Trainer) -> bool:
    """Say whether early stopping has lost its patience."""
    selection, counters = trainer.settings.selection, trainer.counters
    if selection.kind != "early_stopping" or counters.best_epoch < 0:
        return False
    return counters.epoch - 1 - counters.best_epoch >= selection.patience


def take_final_weights(trainer: Trainer) -> None:
    """Give the model the weights that are kept: the best ones, the averaged ones, or its own."""
    if trainer.best:
        trainer.model.load_state_dict(trainer.best)
    elif trainer.average is not None:
        trainer.model.load_state_dict(trainer.average.model.state_dict())
    trainer.model.eval()
