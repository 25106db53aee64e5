"""The training loop: epochs of updates, validation, averages, checkpoints.

Everything random in an update is drawn from generators that the seed and the number of the update decide, and the
learning rate is a function of that number. A checkpoint therefore needs weights, moments, averages and counters only,
and a training that was killed anywhere continues to the same bits on the same machine as one that was not.

A loss that is not finite stops the run: the first such batch is saved and named, the last good checkpoint stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import keep_random_state, seed_device
from braindecode_vis.optimisation import MovingAverage, optimise
from braindecode_vis.seeds import derive_seed
from braindecode_vis.training.bad_numbers import look_at_losses
from braindecode_vis.training.batches import count_batches, deal_epoch, read_ahead
from braindecode_vis.training.feed import Feed, Job
from braindecode_vis.training.gathering import count_processes, gather_rows, get_rank
from braindecode_vis.training.logs import TrainingLog
from braindecode_vis.training.model import Batch, BrainImageModel
from braindecode_vis.training.momentum import Teacher
from braindecode_vis.training.optimiser import compute_lr_factor, make_optimiser
from braindecode_vis.training.resuming import resume_training, write_training
from braindecode_vis.training.selection import is_stopped, keep_best, take_final_weights, validate

Progress = Callable[[int, int, str], None]


@dataclass
class Counters:
    """Where a training stands.

    Parameters
    ----------
    epoch, position
        Epoch, and updates of it that are done.
    update
        Updates done in all.
    sums, n_sums, seconds
        Running sums of loss and objectives over the epoch, their number, and its time so far.
    history
        Records of finished epochs.
    best_epoch, best_score
        Best validation so far (higher is better).
    """

    epoch: int = 0
    position: int = 0
    update: int = 0
    sums: list[float] = field(default_factory=list)
    n_sums: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    best_score: float | None = None


class Trainer:
    """One training of one model.

    Parameters
    ----------
    settings
        The `NetworkEncoderConfig`.
    model
        The model, on the accelerator's device.
    feed
        Its data.
    accelerator
        From `open_accelerator`.
    batch_size
        Trials per batch over all processes.
    epochs
        Number of epochs.
    identity
        What a checkpoint must belong to.
    workspace
        Folder of checkpoints and logs; None keeps neither.
    progress
        Called with updates done, updates in all and a line of text.
    hide_subject
        Chance of each trial to be shown as one of an unknown subject.
    lr_scale, frozen_decay
        Factor of the learning rate, and no weight decay, for an adaptation.
    """

    def __init__(
        self,
        settings: Any,
        model: BrainImageModel,
        feed: Feed,
        accelerator: Any,
        *,
        batch_size: int,
        epochs: int,
        identity: dict[str, Any],
        workspace: Path | None,
        progress: Progress | None,
        hide_subject: float = 0.0,
        lr_scale: float = 1.0,
        frozen_decay: bool = False,
    ) -> None:
        self.settings, self.model, self.feed, self.accelerator = settings, model, feed, accelerator
        self.rank, self.n_ranks = get_rank(), count_processes()
        self.epochs, self.identity = epochs, {**identity, "n_processes": self.n_ranks}
        self.workspace, self.progress, self.hide_subject = workspace, progress, hide_subject
        self.lr_scale = lr_scale
        self.batch_size = min(batch_size, len(feed.train))
        if self.batch_size // self.n_ranks < 1:
            raise ConfigError(
                f"a batch of {self.batch_size} trials cannot be shared by {self.n_ranks} processes; start fewer, or "
                "raise encoder.batch_size if there are more training trials."
            )
        n_batches = count_batches(len(feed.train), self.batch_size, self.n_ranks)
        self.n_epoch_updates = -(-n_batches // settings.accumulation)
        self.n_updates = self.n_epoch_updates * epochs
        self.average = MovingAverage(model, settings.ema, warm_up=True) if settings.ema else None
        self.teacher = self._make_teacher()
        if model.tower is not None:
            feed.open_images(model.tower)
        model.keeps_matches = feed.views is not None and feed.views.learns
        optimiser = make_optimiser(settings.optimiser, model, frozen_decay=frozen_decay)
        if settings.compile:
            model.network.compile()
        self.wrapped, self.optimiser = accelerator.prepare(model, optimiser)
        self.trainable = [p for group in optimiser.param_groups for p in group["params"]]
        self.counters = Counters()
        self.best: dict[str, Tensor] = {}
        self.pending: list[tuple[int, int, Tensor]] = []
        self.sums = torch.zeros(1 + len(model.objectives), dtype=torch.float64, device=feed.device)
        self.last_checkpoint = time.monotonic()
        self.start_time, self.start_update = time.monotonic(), 0

    def _make_teacher(self) -> Teacher | None:
        if "teacher" not in self.model.needs:
            return None
        teacher = self.settings.teacher
        return Teacher(self.model, decay=teacher.decay, queue=teacher.queue, n_features=self.model.n_common)

    # --- the run ------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from a checkpoint if the workspace holds one, and return the record of every epoch.

        Afterwards the model holds the final weights: averaged ones with `ema`, the best ones with early stopping.
        """
        with keep_random_state(self.feed.device):
            resume_training(self)
            self._meet()
            log = self._open_log()
            try:
                while self.counters.epoch < self.epochs and not is_stopped(self):
                    self._run_epoch(log)
            finally:
                log.close()
        take_final_weights(self)
        return self.counters.history

    def _meet(self) -> None:
        """Wait until all processes have read the checkpoint, which the first one may soon replace or delete."""
        if self.n_ranks == 1:
            return
        starts = gather_rows(torch.tensor([float(self.counters.update)], device=self.feed.device)).tolist()
        if len(set(starts)) > 1:
            raise DataError(
                f"the processes found different checkpoints in {self.workspace}; all of them need the same run folder."
            )

    def _open_log(self) -> TrainingLog:
        if self.rank:
            return TrainingLog(None, (), first_epoch=0, config={})
        config = self.settings.model_dump(mode="json")
        return TrainingLog(self.workspace, self.settings.log, first_epoch=self.counters.epoch, config=config)

    def _run_epoch(self, log: TrainingLog) -> None:
        counters, feed = self.counters, self.feed
        started = time.monotonic() - counters.seconds
        self.wrapped.train()
        batches = deal_epoch(
            feed.train.stimuli,
            self.batch_size,
            seed=feed.seed,
            epoch=counters.epoch,
            n_processes=self.n_ranks,
        )
        size = self.settings.accumulation
        groups = [batches[i : i + size] for i in range(0, len(batches), size)]
        first = counters.update - counters.position
        jobs = (
            self.plan(batch, update, part)
            for update, group in enumerate(groups[counters.position :], start=counters.update)
            for part, batch in enumerate(group)
        )
        loaded = read_ahead(jobs, lambda job: feed.load_all(feed.train, job), threaded=feed.threaded)

        def after(update: int, losses: list[Tensor]) -> None:
            if self.average is not None:
                self.average.follow(self.model, update)
            if self.teacher is not None:
                self.teacher.follow(self.model, update)
            counters.position += 1
            counters.update += 1
            counters.seconds = time.monotonic() - started
            look_at_losses(self, force=counters.position == len(groups))
            self._checkpoint_in_time()
            self._report()

        schedule = self.settings.schedule
        try:
            optimise(
                self.optimiser if self.accelerator.scaler is not None else self.optimiser.optimizer,
                self.trainable,
                range(counters.update, first + len(groups)),
                lambda update: self._compute_losses(loaded, len(groups[update - first])),
                after=after,
                rate=lambda update: compute_lr_factor(schedule, update, self.n_updates) * self.lr_scale,
                clip_norm=self.settings.clip_norm,
                accelerator=self.accelerator,
            )
        finally:
            loaded.close()
        self._end_epoch(log, time.monotonic() - started)

    def plan(self, batch: np.ndarray, update: int, part: int) -> Job:
        """Return this process's part of a batch of units."""
        return self.feed.plan(
            self.feed.train, batch, update=update, part=part, rank=self.rank, n_ranks=self.n_ranks
        )

    def _compute_losses(self, loaded: Any, n_parts: int) -> Iterator[Tensor]:
        """Yield the share of each part of an update in its loss."""
        counters = self.counters
        for part in range(n_parts):
            job, blocks = next(loaded)
            # The gradient is taken while this generator waits, so inside the context: processes meet at the last part.
            with self.accelerator.no_sync(self.wrapped) if part < n_parts - 1 else nullcontext():
                loss, values = self._forward(job, blocks)
                yield loss / n_parts
            self._learn_views()
            self.pending.append((counters.epoch, job.update * 10_000 + job.part, loss.detach()))
            self.sums += torch.cat([loss.detach().reshape(1), values]).double()
            counters.n_sums += 1

    def _learn_views(self) -> None:
        if self.model.matches is not None and self.feed.views is not None:
            stimuli, similarities = (x.cpu().numpy() for x in self.model.matches)
            self.feed.views.learn(stimuli, similarities)

    def _forward(self, job: Job, blocks: Any) -> tuple[Tensor, Tensor]:
        batch = self._make_batch(job, blocks)
        # Dropout draws from the global state, which the place in the training alone decides.
        seed_device(self.feed.device, derive_seed(self.feed.seed, "dropout", job.update, job.part, self.rank))
        return self.wrapped(batch)

    def _make_batch(self, job: Job, blocks: Any) -> Batch:
        progress = job.update / self.n_updates
        batch = self.feed.assemble(self.feed.train, job, blocks, progress)
        batch, plain = self.feed.augment(batch, job, rank=self.rank, hide_subject=self.hide_subject)
        if self.teacher is not None:
            batch.teacher = self.teacher.teach(batch, plain)
        return batch

    # --- the end of an epoch ------------------------------------------------------------------------------

    def _end_epoch(self, log: TrainingLog, seconds: float) -> None:
        counters = self.counters
        means = (self.sums / counters.n_sums).tolist()
        names = _name_objectives(self.model.objectives)
        record: dict[str, Any] = {
            "epoch": counters.epoch,
            "loss": means[0],
            "objectives": dict(zip(names, means[1:], strict=True)),
            "lr": self.optimiser.param_groups[0]["lr"],
            "batch_size": self.batch_size,
            "seconds": round(seconds, 4),
            "trials_per_second": round(len(self.feed.train) / max(seconds, 1e-9), 1),
            **validate(self),
            **describe_image_side(self.model, self.feed),
        }
        counters.history.append(record)
        keep_best(self, record)
        log.write(record)
        counters.epoch, counters.position, counters.n_sums, counters.seconds = counters.epoch + 1, 0, 0, 0.0
        self.sums.zero_()
        done = counters.epoch == self.epochs or is_stopped(self)
        if done or self.settings.checkpoint_seconds == 0:
            write_training(self)

    # --- checkpoints --------------------------------------------------------------------------------------

    def _checkpoint_in_time(self) -> None:
        if self.workspace is None or self.rank:
            return
        if time.monotonic() - self.last_checkpoint >= self.settings.checkpoint_seconds:
            look_at_losses(self, force=bool(self.pending))
            write_training(self)

    # --- progress -----------------------------------------------------------------------------------------

    def _report(self) -> None:
        if self.progress is None or self.rank:
            return
        counters = self.counters
        elapsed = time.monotonic() - self.start_time
        per_update = elapsed / max(1, counters.update - self.start_update)
        left = per_update * (self.n_updates - counters.update)
        speed = self.batch_size * self.settings.accumulation / max(per_update, 1e-9)
        time_left = f"{int(left // 60)} min {int(left % 60)} s left"
        text = f"epoch {counters.epoch + 1}/{self.epochs}, {speed:.0f} trials/s, {time_left}"
        if counters.history:
            last = counters.history[-1]
            scores = [f"{k.removeprefix('validation_')} {v:.3f}" for k, v in last.items() if "_top" in k]
            text += f", loss {last['loss']:.4g}" + "".join(f", held-out {s}" for s in scores)
        self.progress(counters.update, self.n_updates, text)


def describe_image_side(model: BrainImageModel, feed: Feed) -> dict[str, Any]:
    """Return what the image side has learnt so far: weights of layers, and how many images have which view."""
    found: dict[str, Any] = {}
    if model.fusion is not None:
        found["layer_weights"] = model.fusion.describe(feed.signal.subjects)
    if feed.views is not None and feed.views.learns:
        found["view_counts"] = feed.views.count()
    return found


def _name_objectives(objectives: Any) -> list[str]:
    """Return one name per objective, numbered where a kind occurs again."""
    names: list[str] = []
    for objective in objectives:
        kind = objective.config.kind
        names.append(kind if kind not in names else f"{kind}_{len(names)}")
    return names
