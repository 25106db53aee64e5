"""Losses and weights that are not finite: the first bad batch is saved and named, and the run stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from braindecode_vis.checks import DataError
from braindecode_vis.training.batches import deal_epoch

if TYPE_CHECKING:
    from braindecode_vis.training.loop import Trainer

BAD_BATCH = "bad_batch.npz"
#: Updates between looks at the loss, each of which waits for a GPU.
LOOK_EVERY = {"cpu": 1, "cuda": 20}


def look_at_losses(trainer: Trainer, *, force: bool) -> None:
    """Stop at the first loss that is not finite."""
    if not force and len(trainer.pending) < LOOK_EVERY.get(trainer.feed.device.type, 1):
        return
    losses = torch.stack([loss for *_, loss in trainer.pending]).float()
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        epoch, place, loss = trainer.pending[int(bad[0])]
        stop_at(trainer, epoch, *divmod(place, 10_000), f"the loss is {float(loss)}")
    trainer.pending.clear()


def stop_at(trainer: Trainer, epoch: int, update: int, part: int, what: str) -> NoReturn:
    """Save the batch of this place in the training and raise `DataError` that names it."""
    batches = deal_epoch(
        trainer.feed.train.stimuli,
        trainer.batch_size,
        seed=trainer.feed.seed,
        epoch=epoch,
        n_processes=trainer.n_ranks,
    )
    first = (update - epoch * trainer.n_epoch_updates) * trainer.settings.accumulation
    job = trainer.plan(batches[first + part], update, part)
    job, blocks = trainer.feed.load_all(trainer.feed.train, job)
    batch = trainer.feed.assemble(trainer.feed.train, job, blocks, update / trainer.n_updates)
    batch, _ = trainer.feed.augment(batch, job, rank=trainer.rank, hide_subject=trainer.hide_subject)
    trials = trainer.feed.trials.iloc[job.draw.trials[:, 0]]
    saved = ""
    if trainer.workspace is not None:
        path = trainer.workspace / (BAD_BATCH if not trainer.rank else f"rank{trainer.rank}_{BAD_BATCH}")
        trainer.workspace.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            data=batch.data.cpu().numpy(),
            targets=batch.target.cpu().numpy(),
            trial=job.draw.trials[:, 0],
            stimulus_id=trials["stimulus_id"].astype(str).to_numpy(dtype=str),
            subject=trials["subject"].astype(str).to_numpy(dtype=str),
            epoch=epoch,
            update=update,
        )
        saved = f"; the batch is in {path}, and the last good checkpoint is kept"
    ids = ", ".join(str(i) for i in trials["stimulus_id"].head(3))
    raise DataError(
        f"{what} at update {update} (epoch {epoch}, batch of {len(job.units)} trials, first images {ids}){saved}; "
        "lower encoder.optimiser.lr, set encoder.clip_norm, or look for outliers in these trials."
    )
