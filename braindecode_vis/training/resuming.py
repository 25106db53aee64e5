"""A training as a checkpoint, and back."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from braindecode_vis.checkpoints import (
    load_weights,
    pack_optimiser,
    read_checkpoint,
    take,
    unpack_optimiser,
    write_checkpoint,
)
from braindecode_vis.checks import DataError
from braindecode_vis.training.bad_numbers import stop_at

if TYPE_CHECKING:
    from braindecode_vis.training.loop import Trainer

CHECKPOINT = "checkpoint.safetensors"


def write_training(trainer: Trainer) -> None:
    """Write a checkpoint, unless a weight is not finite, which stops the run."""
    if trainer.workspace is None or trainer.rank:
        return
    total = torch.stack([p.detach().sum() for p in trainer.trainable]).sum()
    if not bool(torch.isfinite(total)):
        counters = trainer.counters
        epoch = counters.epoch if counters.position else counters.epoch - 1
        last = counters.update - 1
        stop_at(trainer, epoch, last, 0, "a weight is not finite after the update")
    trainer.counters.sums = trainer.sums.tolist()
    scaler = trainer.accelerator.scaler
    state = {
        "identity": trainer.identity,
        "counters": asdict(trainer.counters),
        "batch_size": trainer.batch_size,
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    groups: dict[str, dict[str, Tensor]] = {
        "model": trainer.model.state_dict(),
        "optimiser": pack_optimiser(trainer.optimiser.optimizer),
        "best": trainer.best,
    }
    if trainer.average is not None:
        groups["average"] = trainer.average.model.state_dict()
    if trainer.teacher is not None:
        groups["teacher"] = trainer.teacher.average.model.state_dict()
        groups["queue"] = {"rows": trainer.teacher.queue.rows}
        state["queue"] = [trainer.teacher.queue.next, trainer.teacher.queue.count]
    if trainer.feed.views is not None:
        groups["views"] = trainer.feed.views.as_tensors()
    write_checkpoint(trainer.workspace / CHECKPOINT, groups, state)
    trainer.last_checkpoint = time.monotonic()


def resume_training(trainer: Trainer) -> None:
    """Bring a new trainer to where the checkpoint of its workspace stands, if there is one."""
    path = None if trainer.workspace is None else trainer.workspace / CHECKPOINT
    found = None if path is None else read_checkpoint(path, trainer.identity)
    if found is None:
        return
    tensors, state = found
    if state["batch_size"] != trainer.batch_size:
        raise DataError(f"{path} was made with batches of {state['batch_size']}; delete it to train anew.")
    load_weights(trainer.model, take(tensors, "model"), what=str(path))
    unpack_optimiser(trainer.optimiser.optimizer, take(tensors, "optimiser"))
    device = trainer.feed.device
    trainer.best = {k: v.to(device) for k, v in take(tensors, "best").items()}
    if trainer.average is not None:
        trainer.average.model.load_state_dict(take(tensors, "average"))
    if trainer.teacher is not None:
        trainer.teacher.average.model.load_state_dict(take(tensors, "teacher"))
        trainer.teacher.queue.rows.copy_(tensors["queue.rows"])
        trainer.teacher.queue.next, trainer.teacher.queue.count = state["queue"]
    if trainer.feed.views is not None:
        trainer.feed.views.load_tensors(take(tensors, "views"))
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.counters = type(trainer.counters)(**state["counters"])
    trainer.sums.copy_(torch.tensor(trainer.counters.sums, dtype=torch.float64))
    trainer.start_update = trainer.counters.update
