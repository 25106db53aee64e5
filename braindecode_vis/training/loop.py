"""The training loop: epochs of updates, validation, averages, checkpoints, and losses that are not finite.

Everything random in an update is drawn from generators that the seed and the number of the update decide, and the
learning rate is a function of that number. A checkpoint therefore needs weights, moments, averages and counters only,
and a training that was killed anywhere continues to the same bits on the same machine as one that was not.

A loss that is not finite stops the run: the first such batch is saved and named, the last good checkpoint stays.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from braindecode_vis.base.arrays import normalise_rows
from braindecode_vis.base.checks import ConfigError, DataError, require
from braindecode_vis.base.devices import (
    broadcast_flag,
    check_same_start,
    compute_once,
    count_processes,
    get_rank,
    is_sharded,
    join_parts,
    keep_random_state,
    seed_device,
    share_network,
    take_part,
)
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.training.batches import count_batches, make_batches
from braindecode_vis.training.feed import BatchPlan, Feed, read_ahead
from braindecode_vis.training.model import Batch, BrainImageModel, Teacher
from braindecode_vis.training.optimisation import (
    MovingAverage,
    OptimiserConfig,
    compute_first_beta,
    compute_lr_factor,
    load_weights,
    optimise,
    pack_optimiser,
    read_checkpoint,
    set_learning_rate,
    take,
    unpack_optimiser,
    write_checkpoint,
)

Progress = Callable[[int, int, str], None]
CHECKPOINT = "checkpoint.safetensors"
_CHECKPOINT_SHARE = 50  # times what writing one took: large weights on a slow disk are written more rarely
BAD_BATCH = "bad_batch.npz"
LOG_FILE = "training.jsonl"
#: Updates between checks of the loss, each of which waits for a GPU.
CHECK_EVERY = {"cpu": 1, "cuda": 20}
TOP_K = 5
SMALL_GALLERY = 4 * TOP_K  # below, top-5 is passed by chance too often to tell epochs apart
GROUP_KEYS = ("params", "lr", "lr_scale", "weight_decay")


@dataclass
class Counters:
    """The state of a training.

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
        Best epoch so far, and what it is chosen by (higher is better).
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
        # A batch larger than the training set would promise negatives that are not there.
        self.batch_size = min(batch_size, len(feed.train))
        if self.batch_size // self.n_ranks < 1:
            raise ConfigError(
                f"a batch of {self.batch_size} trials cannot be shared by {self.n_ranks} processes; start fewer, or "
                "raise encoder.batch_size if there are more training trials."
            )
        self._fit_images()
        self.n_epoch_updates = count_batches(
            len(self.feed.train), self.batch_size, self.n_ranks, self.settings.last_batch
        )
        self.n_updates = self.n_epoch_updates * epochs
        self.sharded = is_sharded(accelerator)
        follows = model.needs & {"teacher", "teacher_tokens"}
        if self.sharded and (settings.ema or follows):
            name = "encoder.ema follows" if settings.ema else "a teacher follows"
            raise ConfigError(
                f"{name} all weights, but with FSDP each process keeps only a part of them; leave it "
                "out, or set cluster.distributed=ddp (no ACCELERATE_USE_FSDP)."
            )
        #: The network that learns. If each process keeps a part of it, `model` is a whole one to judge and to write.
        self.learner = copy.deepcopy(model) if self.sharded else model
        self.average = MovingAverage(model, settings.ema, warm_up=True) if settings.ema else None
        self.teacher = None
        if follows:
            own = settings.teacher
            self.teacher = Teacher(model, decay=own.decay, queue=own.queue, n_features=model.n_common)
        if model.tower is not None:
            feed.open_images(model.tower)
        self.learner.keeps_matches = feed.views is not None and feed.views.learns
        optimiser = make_optimiser(settings.optimiser, self.learner, frozen_decay=frozen_decay)
        self.wrapped, self.optimiser = share_network(accelerator, self.learner, optimiser)
        # From the optimiser, so that frozen weights take part in no norm.
        self.trainable = [p for group in optimiser.param_groups for p in group["params"]]
        self.counters = Counters()
        self.best: dict[str, Tensor] = {}
        #: Epoch, update and loss of the batches whose loss is still to be checked.
        self.unchecked: list[tuple[int, int, Tensor]] = []
        # On the device and in float64: summed without waiting for the GPU, and without losing digits.
        self.sums = torch.zeros(1 + len(model.objectives), dtype=torch.float64, device=feed.device)
        self.last_checkpoint, self.checkpoint_cost = time.monotonic(), 0.0
        self.start_time, self.start_update = time.monotonic(), 0

    # --- the run ------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, from a checkpoint if the workspace holds one, and return the record of every epoch.

        Afterwards the model holds the final weights: the best ones with early stopping on held-out trials, averaged
        ones with `ema`, or its own.
        """
        with keep_random_state(self.feed.device):
            self._resume()
            log = self._open_log()
            try:
                while self.counters.epoch < self.epochs and not self._is_stopped():
                    self._run_epoch(log)
            finally:
                log.close()
        if self.best:
            self.model.load_state_dict(self.best)
        elif self.average is not None:
            self.model.load_state_dict(self.average.model.state_dict())
        self.model.eval()
        return self.counters.history

    def _open_log(self) -> TrainingLog:
        if self.rank:  # the first process writes for all
            return TrainingLog(None, (), first_epoch=0, config={})
        config = self.settings.model_dump(mode="json")
        return TrainingLog(self.workspace, self.settings.log, first_epoch=self.counters.epoch, config=config)

    def _run_epoch(self, log: TrainingLog) -> None:
        counters, feed = self.counters, self.feed
        lr_scale = self.lr_scale * self._enter_stage()
        started = time.monotonic() - counters.seconds
        # Validation has left it in evaluation mode.
        self.wrapped.train()
        batches = self._make_batches(counters.epoch)
        # number of the epoch's first update, whose position a checkpoint may be past
        first = counters.update - counters.position
        left = enumerate(batches[counters.position :], start=counters.update)
        plans = (self._plan(batch, update) for update, batch in left)
        loaded = read_ahead(plans, lambda plan: feed.load_all(feed.train, plan), threaded=feed.threaded)

        def after(update: int, losses: list[Tensor]) -> None:
            if self.average is not None:
                # Of the weights just updated; validation and prediction use the average.
                self.average.follow(self.model, update)
            if self.teacher is not None:
                self.teacher.follow(self.model, update)
            counters.position += 1
            counters.update += 1
            counters.seconds = time.monotonic() - started
            self._check_losses(force=counters.position == len(batches))
            waited = time.monotonic() - self.last_checkpoint
            due = self.settings.checkpoint_seconds and max(
                self.settings.checkpoint_seconds, _CHECKPOINT_SHARE * self.checkpoint_cost
            )
            if self.workspace is not None and self._agree(waited >= due):
                # A checkpoint after a loss that is not finite would not be a good one.
                self._check_losses(force=True)
                self._join_parts()
                self._write_checkpoint()
            self._report()

        schedule = self.settings.schedule
        try:
            optimise(
                self.optimiser if self.accelerator.scaler is not None else self.optimiser.optimizer,
                self.trainable,
                range(counters.update, first + len(batches)),
                lambda update: self._compute_losses(loaded),
                after=after,
                rate=lambda update: compute_lr_factor(schedule, update, self.n_updates) * lr_scale,
                beta=lambda update: compute_first_beta(schedule, update, self.n_updates),
                clip_norm=self.settings.clip_norm,
                accelerator=self.accelerator,
            )
        finally:
            # Ends the thread that reads ahead, also when an error stops the epoch.
            loaded.close()
        # Also where a killed run goes on after the last update of an epoch: its log holds the rate of that update.
        last = first + len(batches) - 1
        set_learning_rate(self.optimiser, compute_lr_factor(schedule, last, self.n_updates) * lr_scale)
        self._end_epoch(log, time.monotonic() - started)

    def _enter_stage(self) -> float:
        """Let weights rest or learn as network and second stage say; return the factor of the learning rate."""
        stage, epoch = self.settings.second_stage, self.counters.epoch
        resting = {id(p) for p in self.learner.whole_network.enter_epoch(epoch / self.epochs)}
        start = self.epochs if stage is None else round(stage.start * self.epochs)
        shared = self.learner.shared_projector
        if stage is not None and epoch >= start and stage.frozen and shared is not None:
            resting |= {id(p) for p in shared.parameters()}
        groups = self.optimiser.param_groups
        self.trainable = [p for group in groups for p in group["params"] if id(p) not in resting]
        for group in groups:
            group.setdefault("awake_lr", group["peak_lr"])
            # A rate of zero moves nothing and decays nothing; several processes still share all gradients.
            rests = any(id(p) in resting for p in group["params"])
            group["peak_lr"] = 0.0 if rests else group["awake_lr"]
        if stage is None or epoch < start:
            return 1.0
        if epoch == start and self.counters.position == 0:
            self.optimiser.optimizer.state.clear()  # a new optimiser has no moments
        return stage.lr_scale

    def _fit_images(self) -> None:
        """Find how many trials of an image are together, and let full batches end between images."""
        asked, most = self.settings.trials_per_image, int(np.bincount(self.feed.train.stimuli).max())
        self.per_image = 1 if asked is None else min(asked, most)
        if self.per_image == 1:
            # A new subject's few trials may be of as many images.
            if asked is not None and "adaptation" not in self.identity:
                raise ConfigError(
                    f"encoder.trials_per_image puts {asked} trials of an image into a batch, but no "
                    "training image has two trials (several subjects, or repeats.train single, would "
                    "give them); leave it out."
                )
            return
        whole = self.batch_size - self.batch_size % (self.per_image * self.n_ranks)
        if whole < 2 * self.per_image:
            raise ConfigError(
                f"a batch of {self.batch_size} trials has no room for two images of {self.per_image} "
                "trials each, so no image could be contrasted with another; increase encoder.batch_size, lower "
                "encoder.trials_per_image, or start fewer processes."
            )
        self.batch_size = whole

    def _make_batches(self, epoch: int) -> list[np.ndarray]:
        feed = self.feed
        return make_batches(
            feed.train.stimuli, self.batch_size, seed=feed.seed, epoch=epoch, n_processes=self.n_ranks,
            last=self.settings.last_batch, per_image=self.per_image,
            neighbours=None if feed.described is None else feed.described.neighbours,
        )  # fmt: skip

    def _plan(self, batch: np.ndarray, update: int) -> BatchPlan:
        """Return this process's part of a batch of units."""
        feed = self.feed
        return feed.plan(feed.train, batch, update=update, rank=self.rank, n_ranks=self.n_ranks)

    def _compute_losses(self, loaded: Iterator[Any]) -> Iterator[Tensor]:
        """Yield the loss of an update."""
        counters, feed = self.counters, self.feed
        plan, blocks = next(loaded)
        batch, plain = self._make_batch(plan, blocks)
        if self.teacher is not None:
            batch.teacher = self.teacher.make_targets(batch, plain)
        # Dropout draws from the global state, which the place in the training alone decides.
        seed_device(feed.device, derive_seed(feed.seed, "dropout", plan.update, 0, self.rank))
        loss, values = self.wrapped(batch)
        yield loss
        if self.learner.matches is not None and feed.views is not None:
            stimuli, similarities = (x.cpu().numpy() for x in self.learner.matches)
            feed.views.learn(stimuli, similarities)
        # Checked later, since reading a loss makes the CPU wait for the GPU.
        self.unchecked.append((counters.epoch, plan.update, loss.detach()))
        self.sums += torch.cat([loss.detach().reshape(1), values]).double()
        counters.n_sums += 1

    def _make_batch(self, plan: BatchPlan, blocks: Any) -> tuple[Batch, Tensor]:
        """Return the augmented batch, and its trials as a teacher sees them."""
        batch = self.feed.assemble(self.feed.train, plan, blocks, plan.update / self.n_updates)
        return self.feed.augment(batch, plan, rank=self.rank, hide_subject=self.hide_subject)

    # --- the end of an epoch ------------------------------------------------------------------------------

    def _end_epoch(self, log: TrainingLog, seconds: float) -> None:
        counters, feed, model = self.counters, self.feed, self.model
        self._join_parts()
        # the one wait for the device in an epoch
        means = (self.sums / counters.n_sums).tolist()
        record: dict[str, Any] = {
            "epoch": counters.epoch,
            "loss": means[0],
            "objectives": dict(zip(_name_objectives(model.objectives), means[1:], strict=True)),
            "lr": self.optimiser.param_groups[0]["lr"],
            "batch_size": self.batch_size,
            "seconds": round(seconds, 4),
            "trials_per_second": round(len(feed.train) / max(seconds, 1e-9), 1),
            **self._validate(),
        }
        # All stop by the loss of the first process: theirs may differ in the last digits.
        record["loss"] = compute_once(lambda: means[0])
        if model.fusion is not None:
            record["layer_weights"] = model.fusion.describe(feed.signal.subjects)
        if feed.views is not None and feed.views.learns:
            record["view_counts"] = feed.views.count()
        counters.history.append(record)
        self._keep_best(record)
        log.write(record)
        # Before the checkpoint, which then begins the next epoch.
        counters.epoch, counters.position, counters.n_sums, counters.seconds = counters.epoch + 1, 0, 0, 0.0
        self.sums.zero_()
        done = counters.epoch == self.epochs or self._is_stopped()
        if done or self.settings.checkpoint_seconds == 0:
            self._write_checkpoint()

    def _validate(self) -> dict[str, Any]:
        """Return scores of held-out trials, which the first process alone reads, so that all stop at the same epoch."""
        model = self.model if self.average is None else self.average.model
        progress = self.counters.update / self.n_updates
        return compute_once(lambda: score_held_out(model, self.feed, self.batch_size, progress))

    def _keep_best(self, record: dict[str, Any]) -> None:
        """Remember the best epoch so far, and its weights if they are to be kept."""
        selection, counters = self.settings.selection, self.counters
        if selection.kind == "last":
            return
        if selection.kind == "training_loss":
            score = -record["loss"]
            if counters.best_score is None or score > counters.best_score + selection.min_delta:
                counters.best_score, counters.best_epoch = score, counters.epoch
            return
        score = get_monitored_score(selection.monitor, record)
        if counters.best_score is None or score > counters.best_score:
            counters.best_score, counters.best_epoch = score, counters.epoch
            model = self.model if self.average is None else self.average.model
            # clones: the model goes on changing
            self.best = {k: v.detach().clone() for k, v in model.state_dict().items()}

    def _is_stopped(self) -> bool:
        """Say whether the patience with epochs that are no better is over."""
        selection, counters = self.settings.selection, self.counters
        if selection.kind == "last" or counters.best_epoch < 0:
            return False
        return counters.epoch - 1 - counters.best_epoch >= selection.patience

    # --- losses that are not finite -----------------------------------------------------------------------

    def _check_losses(self, *, force: bool) -> None:
        """Stop at the first loss that is not finite."""
        if not self.unchecked or (
            not force and len(self.unchecked) < CHECK_EVERY.get(self.feed.device.type, 1)
        ):
            return
        losses = torch.stack([loss for *_, loss in self.unchecked]).float()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            epoch, update, loss = self.unchecked[int(bad[0])]
            self._stop_at(epoch, update, f"the loss is {float(loss)}")
        self.unchecked.clear()

    def _stop_at(self, epoch: int, update: int, what: str) -> NoReturn:
        """Save the batch of this place in the training and raise `DataError` that names it."""
        # Everything about a batch follows from its place, so that the bad one can be made again.
        rows = self._make_batches(epoch)[update - epoch * self.n_epoch_updates]
        plan, blocks = self.feed.load_all(self.feed.train, self._plan(rows, update))
        batch, _ = self._make_batch(plan, blocks)
        first = plan.draw.trials[:, 0]
        trials = self.feed.trials.iloc[first]
        saved = ""
        if self.workspace is not None:
            path = self.workspace / (BAD_BATCH if not self.rank else f"rank{self.rank}_{BAD_BATCH}")
            self.workspace.mkdir(parents=True, exist_ok=True)
            np.savez(
                path,
                data=batch.data.cpu().numpy(),
                targets=batch.target.cpu().numpy(),
                trial=first,
                stimulus_id=trials["stimulus_id"].astype(str).to_numpy(dtype=str),
                subject=trials["subject"].astype(str).to_numpy(dtype=str),
                epoch=epoch,
                update=update,
            )
            saved = f"; the batch is in {path}, and the last good checkpoint is kept"
        ids = ", ".join(str(i) for i in trials["stimulus_id"].head(3))
        raise DataError(
            f"{what} at update {update} (epoch {epoch}, batch of {len(plan.units)} trials, first images {ids}){saved}; "
            "lower encoder.optimiser.lr, set encoder.clip_norm, or look for outliers in these trials."
        )

    # --- checkpoints --------------------------------------------------------------------------------------

    def _write_checkpoint(self) -> None:
        """Write a checkpoint of joined parts, unless a weight is not finite, which stops the run."""
        if self.workspace is None:
            return
        moments = pack_optimiser(self.optimiser.optimizer)
        if self.sharded:
            moments = join_parts(moments)
        if self.rank:
            return
        counters = self.counters
        # The sum of all weights is finite only if each of them is; one number to wait for.
        weights = list(self.model.parameters()) if self.sharded else self.trainable
        total = torch.stack([p.detach().sum() for p in weights]).sum()
        if not bool(torch.isfinite(total)):
            epoch = counters.epoch if counters.position else counters.epoch - 1
            self._stop_at(epoch, counters.update - 1, "a weight is not finite after the update")
        counters.sums = self.sums.tolist()
        scaler = self.accelerator.scaler
        state = {
            "identity": self.identity,
            "counters": asdict(counters),
            "batch_size": self.batch_size,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        groups: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimiser": moments,
            "best": self.best,
        }
        if self.average is not None:
            groups["average"] = self.average.model.state_dict()
        if self.teacher is not None:
            queue = self.teacher.queue
            groups["teacher"], groups["queue"] = self.teacher.average.model.state_dict(), {"rows": queue.rows}
            state["queue"] = [queue.next, queue.count]
        if self.feed.views is not None:
            groups["views"] = self.feed.views.as_tensors()
        started = time.monotonic()
        write_checkpoint(self.workspace / CHECKPOINT, groups, state)
        self.last_checkpoint = time.monotonic()
        self.checkpoint_cost = self.last_checkpoint - started

    def _join_parts(self) -> None:
        """Bring the whole model to where the parts are that processes keep; all of them together."""
        if self.sharded:
            self.model.load_state_dict(join_parts(self.learner.state_dict()))

    def _agree(self, due: bool) -> bool:
        """Say whether the first process writes a checkpoint now; the others help where each keeps a part."""
        return broadcast_flag(due) if self.sharded else due and not self.rank

    def _resume(self) -> None:
        """Go to the state of the checkpoint of the workspace, if there is one, together with all processes."""
        path = None if self.workspace is None else self.workspace / CHECKPOINT
        found = None if path is None else read_checkpoint(path, self.identity)
        if found is not None:
            self._load(*found, path=path)
        check_same_start(self.counters.update, self.workspace, self.feed.device)

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any], *, path: Path | None) -> None:
        if state["batch_size"] != self.batch_size:
            raise DataError(
                f"{path} was made with batches of {state['batch_size']}; delete it to train again from the start."
            )
        load_weights(self.model, take(tensors, "model"), what=str(path))
        if self.sharded:
            whole = self.model.state_dict()
            with torch.no_grad():
                for name, own in self.learner.state_dict().items():
                    own.copy_(take_part(whole[name], own))
        unpack_optimiser(self.optimiser.optimizer, take(tensors, "optimiser"))
        self.best = {k: v.to(self.feed.device) for k, v in take(tensors, "best").items()}
        if self.average is not None:
            self.average.model.load_state_dict(take(tensors, "average"))
        if self.teacher is not None:
            queue = self.teacher.queue
            self.teacher.average.model.load_state_dict(take(tensors, "teacher"))
            queue.rows.copy_(tensors["queue.rows"])
            queue.next, queue.count = state["queue"]
        if self.feed.views is not None:
            self.feed.views.load_tensors(take(tensors, "views"))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.counters = Counters(**state["counters"])
        self.sums.copy_(torch.tensor(self.counters.sums, dtype=torch.float64))
        self.start_update = self.counters.update  # the speed counts from here

    # --- progress -----------------------------------------------------------------------------------------

    def _report(self) -> None:
        if self.progress is None or self.rank:
            return
        counters = self.counters
        elapsed = time.monotonic() - self.start_time
        per_update = elapsed / max(1, counters.update - self.start_update)
        left = per_update * (self.n_updates - counters.update)
        speed = self.batch_size / max(per_update, 1e-9)
        time_left = f"{int(left // 60)} min {int(left % 60)} s left"
        text = f"epoch {counters.epoch + 1}/{self.epochs}, {speed:.0f} trials/s, {time_left}"
        if counters.history:
            last = counters.history[-1]
            scores = [f"{k.removeprefix('validation_')} {v:.3f}" for k, v in last.items() if "_top" in k]
            text += f", loss {last['loss']:.4g}" + "".join(f", held-out {s}" for s in scores)
        self.progress(counters.update, self.n_updates, text)


def make_optimiser(
    config: OptimiserConfig, model: Any, *, frozen_decay: bool = False
) -> torch.optim.Optimizer:
    """Return the optimiser of the trainable parameters of a model.

    Parameters
    ----------
    config
        The settings.
    model
        Its network (see `braindecode_vis.base.contracts.Network`), fusion and tower have groups of their own, as
        has the shared projector, which a second stage may freeze, and a term of an objective with ``parameter_groups``;
        other parameters of objectives are not decayed.
    frozen_decay
        Take no weight decay anywhere, for tables of which a batch moves a few rows only.

    Raises
    ------
    ConfigError
        If nothing can be trained, or the network's groups hold an unknown key.
    """
    groups: list[dict[str, Any]] = []
    terms = [getattr(objective, "term", None) for objective in model.objectives]
    trained = [term for term in terms if hasattr(term, "parameter_groups")]
    for part in (model.whole_network, model.fusion, model.tower, *trained):
        if part is not None:
            groups += [_read_group(config, group) for group in part.parameter_groups()]
    if model.shared_projector is not None:
        groups.append(_read_group(config, {"params": list(model.shared_projector.parameters())}))
    taken = {id(p) for group in groups for p in group["params"]}
    # Decay would pull a learned temperature toward 1, and with it the contrast.
    temperatures = {id(p): p for p in model.objectives.parameters() if id(p) not in taken}
    # What belongs to no group of its own.
    rest = [p for p in model.parameters() if id(p) not in taken and id(p) not in temperatures]
    groups.append({"params": rest, "lr": config.lr, "weight_decay": config.weight_decay})
    groups.append({"params": list(temperatures.values()), "lr": config.lr, "weight_decay": 0.0})
    kept = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            # A table of which a batch moves a few rows would lose the others to the decay.
            decay = 0.0 if frozen_decay else group["weight_decay"]
            kept.append({"params": params, "lr": group["lr"], "weight_decay": decay, "peak_lr": group["lr"]})
    if not kept:
        raise ConfigError("this encoder has no parameter to train; choose another network or trainable part.")
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    # one kernel for all weights; the numbers are those of the plain loop but for rounding
    fused = all(p.is_floating_point() for group in kept for p in group["params"])
    return kind(kept, lr=config.lr, betas=config.betas, fused=fused)


def _read_group(config: OptimiserConfig, group: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(group) - set(GROUP_KEYS))
    if unknown or "params" not in group:
        raise ConfigError(
            f"a parameter group of the network must hold params and any of {', '.join(GROUP_KEYS[1:])}, "
            f"but this one holds {', '.join(group)}."
        )
    lr = group.get("lr", config.lr) * group.get("lr_scale", 1.0)
    return {
        "params": list(group["params"]),
        "lr": lr,
        "weight_decay": group.get("weight_decay", config.weight_decay),
    }


def _name_objectives(objectives: Any) -> list[str]:
    """Return one name per objective, numbered where a kind occurs again."""
    names: list[str] = []
    for objective in objectives:
        kind = objective.config.kind
        names.append(kind if kind not in names else f"{kind}_{len(names)}")
    return names


class TrainingLog:
    """Writes one record per epoch to every place: always a JSONL file, TensorBoard and W&B where asked for.

    Both are extras; a missing one is a `ConfigError` before the training starts.

    Parameters
    ----------
    workspace
        Folder of the log files; None keeps records in memory only.
    kinds
        Further places: ``tensorboard``, ``wandb``.
    first_epoch
        Epoch that comes next; records of this and later epochs, left by a run that was killed, are dropped.
    config
        Settings to show beside the curves.
    """

    def __init__(
        self, workspace: Path | None, kinds: Sequence[str], *, first_epoch: int, config: dict[str, Any]
    ) -> None:
        self.path = None if workspace is None else workspace / LOG_FILE
        self.board: Any = None
        self.wandb: Any = None
        if workspace is None and any(kind != "jsonl" for kind in kinds):
            raise ConfigError("encoder.log names a tracker, which needs a workspace folder.")
        if self.path is not None and workspace is not None:
            workspace.mkdir(parents=True, exist_ok=True)
            self._drop_from(first_epoch)
            if "tensorboard" in kinds:
                self.board = _open_tensorboard(workspace / "tensorboard", first_epoch)
            if "wandb" in kinds:
                self.wandb = _open_wandb(workspace, config)

    def _drop_from(self, first_epoch: int) -> None:
        assert self.path is not None
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
                if json.loads(line).get("epoch", -1) < first_epoch:
                    kept.append(line)
        with replace_atomically(self.path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; `epoch` is its step on the curves."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        numbers = {k: v for k, v in _flatten(record).items() if isinstance(v, int | float)}
        if self.board is not None and "epoch" in record:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["epoch"])
            self.board.flush()
        if self.wandb is not None and "epoch" in record:
            self.wandb.log(numbers, step=record["epoch"])

    def close(self) -> None:
        """Finish the trackers."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _open_tensorboard(folder: Path, first_epoch: int) -> Any:
    require("tensorboard", "encoder.log: [tensorboard]")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_epoch)


def _open_wandb(workspace: Path, config: dict[str, Any]) -> Any:
    wandb = require("wandb", "encoder.log: [wandb]")
    return wandb.init(project="braindecode_vis", dir=str(workspace), config=config, resume="allow")


# --- held-out trials --------------------------------------------------------------------------------------


def name_top_k(n_gallery: int) -> tuple[str, int]:
    """Return the name and the k of the accuracy that a gallery of this size can show: top-5, or top-1 below 20."""
    return (f"top{TOP_K}", TOP_K) if n_gallery >= SMALL_GALLERY else ("top1", 1)


def compute_top_k(brain: np.ndarray, gallery: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Return how often the true image is among the `k` most similar ones by cosine.

    Ties count against the network, so that constant outputs find nothing.

    Parameters
    ----------
    brain : array of shape (n_queries, d)
    gallery : array of shape (n_gallery, d)
    truth : int array of shape (n_queries,)
        Row of the true image in the gallery.
    k
        How many candidates count.

    Examples
    --------
    >>> compute_top_k(np.eye(3), np.eye(3), np.array([0, 1, 0]), 1) == 2 / 3
    True
    """
    similarity = normalise_rows(brain) @ normalise_rows(gallery).T
    own = similarity[np.arange(len(truth)), truth]
    # candidates at least as similar as the true one, itself included
    return float(((similarity >= own[:, None]).sum(axis=1) <= k).mean())


def score_held_out(model: BrainImageModel, feed: Feed, batch_size: int, progress: float) -> dict[str, Any]:
    """Return loss and accuracy of the held-out trials, nothing if none were held out.

    Parameters
    ----------
    model
        The weights to judge; left in evaluation mode.
    feed
        Its data; the held-out training trials alone are read.
    batch_size
        Trials at a time.
    progress
        Share of the training that is done, for objectives that change with it.
    """
    held = feed.held
    if held is None:
        return {}
    model.eval()
    brain, subjects, losses, sizes = [], [], [], []
    images: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(held), batch_size):
            rows = np.arange(start, min(start + batch_size, len(held)))
            plan = feed.plan(held, rows, update=0, rank=0, n_ranks=1)
            batch = feed.assemble(held, *feed.load_all(held, plan), progress)
            brain.append(model.encode_brain(batch.data, batch.subject).float().cpu().numpy())
            subjects.append(batch.subject)
            batch.tuned = model.embed_images(batch)
            for stimulus, image in zip(batch.stimuli.tolist(), batch.tuned, strict=True):
                images.setdefault(stimulus, image)  # each image once in the gallery, whatever its repetitions
            # A contrast of one image or concept with itself says nothing.
            if len(torch.unique(batch.stimuli)) > 1 and len(torch.unique(batch.concepts)) > 1:
                loss = model.compute_plain_loss(batch)
                if loss is not None:
                    losses.append(float(loss))
                    sizes.append(len(batch.data))
    # ascending, so that searchsorted finds the row of each trial's image
    gallery = sorted(images)
    name, k = name_top_k(len(gallery))
    truth = np.searchsorted(gallery, held.stimuli)
    raw = torch.stack([images[i] for i in gallery])
    score = _find_accuracy(model, np.concatenate(brain), torch.cat(subjects), raw, truth, k)
    found = {f"validation_{name}": score, "n_validation_images": len(gallery)}
    if losses:
        # weighted by batch: the last one is smaller
        found["validation_loss"] = float(np.average(losses, weights=sizes))
    return found


def _find_accuracy(
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
    # Weights of layers differ between subjects, and with them the vectors of the gallery.
    for number in np.unique(numbers):
        own = numbers == number
        gallery = encode(subjects.new_full((len(raw),), int(number)))
        # weighted by the subject's share of the trials
        found += float(own.mean()) * compute_top_k(brain[own], gallery, truth[own], k)
    return found


def get_monitored_score(monitor: str, record: dict[str, Any]) -> float:
    """Return the number of an epoch's record by which the best epoch is chosen; higher is better.

    Parameters
    ----------
    monitor
        ``accuracy`` or ``loss``.
    record
        With the entries of `score_held_out`.

    Raises
    ------
    ConfigError
        If the loss is asked for and no objective can be computed on held-out trials.
    """
    if monitor != "loss":
        return next(v for k, v in record.items() if k.startswith("validation_top"))
    if "validation_loss" not in record:
        raise ConfigError(
            "encoder.selection.monitor is loss, but no objective can be computed on held-out trials alone; "
            "set it to accuracy."
        )
    return -record["validation_loss"]
