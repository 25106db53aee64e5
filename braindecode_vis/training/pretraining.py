"""Self-supervised pretraining of the parcel encoder: reconstruct hidden tokens from visible ones, no labels.

Owns which rows are allowed in, statistics, mini-batches from a memory map, the held-out error against predicting the
mean, and the files that `encoders.parcels` starts from. Stimuli and categories are never read but to keep repetitions
of an image on one side of the hold-out; test trials are never read.

References
----------
He et al. (2022), arXiv:2111.06377 (masked autoencoders). Wang et al. (2024), arXiv:2411.07121 (WAVE).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braindecode_vis.arrays import Responses
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import (
    check_same_start,
    choose_device,
    count_processes,
    get_rank,
    is_sharded,
    open_accelerator,
    seed_device,
    seeded,
    sum_processes,
    take_share,
)
from braindecode_vis.encoders.parcels import DESCRIPTION, MaskedAutoencoder, describe_encoder
from braindecode_vis.encoders.parcels_config import WEIGHTS
from braindecode_vis.encoders.signal import Signal, describe_signal
from braindecode_vis.optimisation import (
    compute_warm_cosine,
    optimise,
    pack_optimiser,
    read_checkpoint,
    split_decayed,
    take,
    unpack_optimiser,
    write_checkpoint,
)
from braindecode_vis.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.store import hash_json, replace_atomically, write_json
from braindecode_vis.training.pretraining_config import PretrainConfig

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
CHECKPOINT = "pretrain.safetensors"
LOG = "log.jsonl"
SHORT_PATCH = 8  # samples; the own variance of a shorter patch says too little to divide by
NEVER_READ = ("test",)


def pretrain(
    config: PretrainConfig,
    responses: Responses,
    *,
    folder: Path,
    checkpoints: Path,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pretrain and write ``encoder.safetensors``, ``encoder.json`` and ``log.jsonl`` into `folder`.

    Parameters
    ----------
    config
        Encoder and training.
    responses
        Trials or windows of unlabelled runs, parcels x times or parcels; possibly a memory map. Rows whose split is
        ``test`` are never read.
    folder
        Where the result goes; it exists.
    checkpoints
        Where an interrupted run left its state and finds it again; it outlives `folder` being thrown away.
    seed
        Root of weights, order, masks and hold-out.
    progress
        Called with a description and the number of epochs; a context manager that gives the function that advances.

    Returns
    -------
    dict
        Held-out error of the written weights, that of predicting the mean, epoch and number of trials.

    Raises
    ------
    ConfigError, DataError
        If there are too few groups to hold some out, a mask hides nothing or everything, the loss is not finite, or
        the checkpoint is of another run.
    """
    train, held_out = split_rows(responses, config, seed)
    n_processes = count_processes()
    if min(len(train), config.batch_size) < n_processes:
        raise ConfigError(
            f"{len(train)} training trials in batches of {config.batch_size} cannot be shared by {n_processes} "
            "processes; start fewer."
        )
    signal = describe_signal(responses.select(train[:1]))
    run = Pretraining(config, responses.data, signal, train, held_out, checkpoints, seed)
    run.resume()
    shown = nullcontext(lambda n: None) if progress is None else progress("pretraining", config.n_epochs)
    with shown as advance:
        advance(run.epoch)
        while run.epoch < config.n_epochs:
            run.train_epoch()
            if run.epoch % config.checkpoint_every == 0 or run.epoch == config.n_epochs:
                run.write_checkpoint()
            advance(1)
    reached = run.describe_result()
    if not run.rank:
        run.write_result(folder, reached)
    return reached


def split_rows(responses: Responses, config: PretrainConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that train and those that are held out, ascending; a group is never on both sides.

    Raises
    ------
    DataError
        If there are no rows outside the test split, or fewer than two groups.
    """
    trials = responses.trials
    # By the column, before anything of these rows is read.
    allowed = np.flatnonzero(~trials["split"].isin(NEVER_READ).to_numpy())
    if not len(allowed):
        raise DataError(
            "every trial belongs to the test split; pretraining needs training trials or unlabelled runs."
        )
    # Neighbouring windows of a run resemble each other, as repetitions of an image do: groups stay whole.
    columns = {"stimulus": ["stimulus_id"], "run": ["subject", "session", "run"]}.get(config.hold_out_by)
    group: np.ndarray
    if columns is None:
        group = np.arange(len(allowed))
    else:
        group = trials.iloc[allowed].groupby(columns, sort=True, dropna=False).ngroup().to_numpy()
    n_groups = int(group.max()) + 1
    n_held_out = max(1, round(config.held_out * n_groups))
    if n_held_out >= n_groups:
        raise DataError(
            f"the training trials fall into {n_groups} group(s) by {config.hold_out_by}, of which none would be left "
            "to learn from; lower pretrain.held_out or set pretrain.hold_out_by=trial."
        )
    chosen = make_generator(seed, "pretrain", "held_out").permutation(n_groups)[:n_held_out]
    is_out = np.isin(group, chosen)
    return allowed[~is_out], allowed[is_out]


def count_visible(n_tokens: int, mask_ratio: float) -> int:
    """Return the number of visible tokens.

    Raises
    ------
    ConfigError
        If the ratio hides all tokens or none.
    """
    n_visible = round(n_tokens * (1 - mask_ratio))
    if not 0 < n_visible < n_tokens:
        raise ConfigError(
            f"pretrain.mask_ratio = {mask_ratio} leaves {n_visible} of {n_tokens} tokens visible; at least one must be "
            "visible and one hidden."
        )
    return n_visible


class Pretraining:
    """One run from its first step or from its checkpoint to its last.

    Parameters
    ----------
    config, signal, seed
        As in `pretrain`.
    data : array of shape (n_rows, ...)
        Possibly a memory map, of which only the rows of a batch are read.
    train, held_out : integer arrays
        Rows.
    folder
        Of the checkpoint and the log.

    A step's order, masks and dropout follow from the seed and the step's number alone, so weights, optimiser and
    position are all that a checkpoint needs. Several processes each read and take their share of every batch, of the
    held-out trials and of the statistics; the first one writes.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: np.ndarray,
        signal: Signal,
        train: np.ndarray,
        held_out: np.ndarray,
        folder: Path,
        seed: int,
    ) -> None:
        self.config, self.data, self.signal = config, data, signal
        self.train, self.held_out, self.folder, self.seed = train, held_out, folder, seed
        self.rank, self.n_ranks = get_rank(), count_processes()
        self.device = torch.device(choose_device(config.device, setting="pretrain.device"))
        with seeded(derive_seed(seed, "pretrain", "weights"), self.device):
            self.model = self._make_model()
        encoder = self.model.encoder
        self.n_visible = count_visible(encoder.n_tokens, config.mask_ratio)
        mean, std = measure_parcels(data, train, encoder.n_parcels, config.batch_size)
        # Of training rows; the encoder that is tuned later standardises by the same numbers.
        encoder.mean.copy_(torch.as_tensor(mean)[:, None])
        encoder.std.copy_(torch.as_tensor(std)[:, None])
        self.model.to(self.device)
        # He et al. decay neither biases nor norms; tables of positions and parcels are spared as well.
        tables = [m.weight for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        groups = split_decayed(self.model.parameters(), config.weight_decay, spared=tables)
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self.wrapped: Any = self.model
        if self.n_ranks > 1:
            accelerator = open_accelerator(config.device, "fp32")
            if is_sharded(accelerator):
                raise ConfigError(
                    "pretraining keeps the whole encoder in every process; take cluster.distributed=ddp (no "
                    "ACCELERATE_USE_FSDP)."
                )
            self.wrapped = accelerator.prepare(self.model)
        self.epoch, self.best_epoch = 0, 0
        self.best: dict[str, Tensor] = {}
        self.best_error = math.inf
        self.baseline = self._measure_baseline()
        if not self.baseline > 0:
            raise DataError(
                "the held-out trials do not differ from the mean of the others: there is nothing to learn."
            )

    def _make_model(self) -> MaskedAutoencoder:
        config = self.config
        n_times = self.signal.shape[1] if len(self.signal.shape) == 2 else 1
        length = config.encoder.patch_times or n_times
        kind = config.normalisation
        if kind == "auto":
            # He et al. predict patches that are normalised one by one.
            kind = "patch" if length >= SHORT_PATCH else "parcel"
        if kind == "patch" and length < 2:
            raise DataError("a patch of one sample has no variance; set pretrain.normalisation=parcel.")
        return MaskedAutoencoder(
            config.encoder.build_encoder(self.signal),
            decoder_width=config.decoder_width,
            decoder_depth=config.decoder_depth,
            decoder_heads=config.decoder_heads,
            normalisation=kind,
        )

    # --- one epoch ----------------------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """Take every training trial once, then measure the held-out error and add a line to the log."""
        order = make_generator(self.seed, "pretrain", "order", self.epoch).permutation(self.train)
        # Ascending within a batch, as a memory map is read fastest.
        batches = [
            np.sort(order[i : i + self.config.batch_size])
            for i in range(0, len(order), self.config.batch_size)
        ]
        first, total = self.epoch * len(batches), 0.0

        def compute_losses(step: int) -> Iterator[Tensor]:
            yield self.compute_loss(batches[step - first], step)

        def after(step: int, losses: list[Tensor]) -> None:
            nonlocal total
            total += float(losses[0]) * len(
                batches[step - first]
            )  # of this process's share, times their number

        def describe_failure(step: int, loss: float) -> str:
            rows = batches[step - first]
            return (
                f"the pretraining loss is {loss} at step {step} (epoch {self.epoch + 1}, rows {rows[:3].tolist()} "
                f"and {max(0, len(rows) - 3)} more); {self._describe_rescue()}"
            )

        n_steps = self.config.n_epochs * len(batches)
        n_warm = round(self.config.warmup * n_steps)
        self.model.train()
        optimise(
            self.optimiser, self.model.parameters(), range(first, first + len(batches)), compute_losses,
            after=after, rate=lambda step: compute_warm_cosine(step, n_steps, n_warm), clip_norm=self.config.clip,
            describe_failure=describe_failure,
        )  # fmt: skip
        self.epoch += 1
        error = self.measure_error()
        if not math.isfinite(error):
            raise DataError(
                f"the held-out error is {error} after epoch {self.epoch}; {self._describe_rescue()}"
            )
        if error < self.best_error:
            self.best_error, self.best_epoch = error, self.epoch
            self.best = {k: v.detach().cpu().clone() for k, v in self.model.encoder.state_dict().items()}
        line = {
            "epoch": self.epoch,
            "step": self.epoch * len(batches),
            "loss": float(sum_processes(total)) / self.n_ranks / len(self.train),
            "held_out": error,
            "mean_baseline": self.baseline,
            "explained": 1 - error / self.baseline,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def compute_loss(self, rows: np.ndarray, step: int) -> Tensor:
        """Return the error of the hidden tokens of these rows; the step's number decides masks and dropout.

        Several processes each return that of their share, so weighed that the mean over processes is the error.
        """
        with seeded(derive_seed(self.seed, "pretrain", "step", step), self.device):
            # ranks of random numbers: a random order of tokens for each trial, the first ones visible
            order = torch.rand(len(rows), self.model.encoder.n_tokens).argsort(dim=1)
            if self.n_ranks == 1:
                return self.model(self._read(rows), order.to(self.device), self.n_visible).mean()
            # Masks are those of one process; dropout is drawn by each for itself.
            seed_device(self.device, derive_seed(self.seed, "pretrain", "dropout", step, self.rank))
            mine = take_share(np.arange(len(rows)))
            # In the last batch there may be none left: then one whose gradient is zero, as all processes must meet.
            weight, mine = (0.0, np.arange(1)) if not len(mine) else (self.n_ranks / len(rows), mine)
            errors = self.wrapped(self._read(rows[mine]), order[mine].to(self.device), self.n_visible)
            return errors.sum() * weight

    def _describe_rescue(self) -> str:
        kept = self.folder / CHECKPOINT
        where = f"the last good state is in {kept}" if kept.is_file() else "no state was kept yet"
        return f"{where}; lower pretrain.learning_rate and check those trials."

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.data[rows], dtype=np.float32)).to(self.device)

    # --- held-out error -----------------------------------------------------------------------------------

    def measure_error(self) -> float:
        """Return the mean squared error of the hidden tokens of the held-out trials, under fixed masks."""
        self.model.eval()
        total = 0.0
        with torch.no_grad():
            for data, order in self._iterate_held_out():
                total += float(self.model(data, order, self.n_visible).sum())
        return float(sum_processes(total)) / len(self.held_out)

    def _measure_baseline(self) -> float:
        """Return the error, on the same tokens, of predicting the mean that a token has over the training trials."""
        size, total = self.config.batch_size, 0.0
        mean: Tensor | None = None
        mine = take_share(self.train)
        with torch.no_grad():
            for start in range(0, len(mine), size):
                targets = self.model.make_targets(self._read(mine[start : start + size]))
                # a running mean in float64, batch by batch
                part = targets.double().sum(dim=0) / len(self.train)
                mean = part if mean is None else mean + part
            assert mean is not None
            if self.n_ranks > 1:
                mean = torch.as_tensor(sum_processes(mean.cpu().numpy()), device=self.device)
            for data, order in self._iterate_held_out():
                errors = (self.model.make_targets(data) - mean.float()).square().mean(dim=-1)
                # hidden tokens only, as the loss counts
                total += float(errors.gather(1, order[:, self.n_visible :]).mean(dim=1).sum())
        return float(sum_processes(total)) / len(self.held_out)

    def _iterate_held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The same masks at every look, so that epochs are compared on the same tokens.
        generator = make_torch_generator(self.seed, "pretrain", "held_out_masks")
        for start in range(0, len(self.held_out), self.config.batch_size):
            rows = self.held_out[start : start + self.config.batch_size]
            noise = torch.rand(len(rows), self.model.encoder.n_tokens, generator=generator)
            mine = take_share(np.arange(len(rows)))
            if len(mine):
                yield self._read(rows[mine]), noise[mine].argsort(dim=1).to(self.device)

    # --- files --------------------------------------------------------------------------------------------

    def _identify(self) -> dict[str, Any]:
        """Return all that makes one run another: what was computed so far would not fit it."""
        statistics = [self.model.encoder.mean.tolist(), self.model.encoder.std.tolist()]
        return {
            "config": self.config.hashed_fields(),
            "n_processes": self.n_ranks,
            "seed": self.seed,
            "signal": self.signal.as_json(),
            "data": hash_json([self.train.tolist(), self.held_out.tolist(), statistics]),
        }

    def write_checkpoint(self) -> None:
        """Write weights, optimiser and position into one file that replaces the former at once."""
        if self.rank:
            return
        groups = {
            "model": self.model.state_dict(), "best": self.best, "optimiser": pack_optimiser(self.optimiser)
        }  # fmt: skip
        state = {
            "identity": self._identify(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_error": self.best_error,
        }
        write_checkpoint(self.folder / CHECKPOINT, groups, state)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; lines of the log after it are dropped.

        Raises
        ------
        DataError
            If the checkpoint is damaged or of another run, or processes find different ones.
        """
        found = read_checkpoint(self.folder / CHECKPOINT, self._identify())
        if found is not None:
            self._load(*found)
        check_same_start(self.epoch, self.folder, self.device)
        if self.rank:
            return
        if found is None:
            (self.folder / LOG).unlink(missing_ok=True)
        else:
            self._cut_log()

    def _load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(take(tensors, "model"))
        self.best = take(tensors, "best")
        unpack_optimiser(self.optimiser, take(tensors, "optimiser"))
        self.epoch, self.best_epoch = state["epoch"], state["best_epoch"]
        self.best_error = state["best_error"]

    def _cut_log(self) -> None:
        path = self.folder / LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        with replace_atomically(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines[: self.epoch]))

    def describe_result(self) -> dict[str, Any]:
        """Return what was reached, and by what."""
        best = self.config.keep == "best"
        return {
            "held_out": self.best_error if best else self.measure_error(),
            "mean_baseline": self.baseline,
            "epoch": self.best_epoch if best else self.epoch,
            "normalisation": self.model.normalisation,
            "n_train": len(self.train),
            "n_held_out": len(self.held_out),
        }

    def write_result(self, folder: Path, reached: dict[str, Any]) -> None:
        """Write the encoder with its description and the log into `folder`."""
        from safetensors.torch import save_file

        encoder = self.model.encoder
        weights = self.best if self.config.keep == "best" else encoder.state_dict()
        with replace_atomically(folder / WEIGHTS) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary)
        write_json(
            folder / DESCRIPTION,
            {
                "architecture": describe_encoder(encoder),
                "config": self.config.model_dump(mode="json"),
                "seed": self.seed,
                "reached": reached,
            },
        )
        if (self.folder / LOG).is_file() and folder.resolve() != self.folder.resolve():
            shutil.copyfile(self.folder / LOG, folder / LOG)


def measure_parcels(
    data: np.ndarray, rows: np.ndarray, n_parcels: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each parcel over trials and times, float32 of shape (n_parcels,).

    Read in blocks, by several processes a share each; a parcel that does not vary gets the deviation 1. Two passes,
    since the mean of squares less the square of the mean loses all digits where the mean is large.
    """
    mine, total = take_share(rows), np.zeros(n_parcels)
    for start in range(0, len(mine), block):
        part = np.asarray(data[mine[start : start + block]], dtype=np.float64)
        total += part.reshape(len(part), n_parcels, -1).mean(axis=2).sum(axis=0)
    mean = sum_processes(total) / len(rows)
    total[:] = 0
    for start in range(0, len(mine), block):
        part = np.asarray(data[mine[start : start + block]], dtype=np.float64)
        total += ((part.reshape(len(part), n_parcels, -1) - mean[:, None]) ** 2).mean(axis=2).sum(axis=0)
    std = np.sqrt(sum_processes(total) / len(rows))
    # A parcel that never varies would be divided by rounding.
    flat = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return mean.astype(np.float32), np.where(flat, 1.0, std).astype(np.float32)
