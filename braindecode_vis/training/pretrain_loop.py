"""The state of one pretraining run: batches, steps, held-out error, checkpoints.

A step's order, masks and dropout follow from the seed and the step's number alone, so weights, optimiser and position
are all that a checkpoint needs. Imported by `pretrain` when it starts, since it loads torch.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from braindecode_vis.checks import DataError
from braindecode_vis.devices import choose_device, seeded
from braindecode_vis.encoders.parcels import DESCRIPTION, MaskedAutoencoder, describe_encoder
from braindecode_vis.encoders.parcels_config import WEIGHTS
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.seeds import derive_seed, make_generator, make_torch_generator
from braindecode_vis.store import hash_json, replace_atomically, write_json
from braindecode_vis.training.pretrain import SHORT_PATCH, PretrainConfig, count_visible

CHECKPOINT = "pretrain.safetensors"
LOG = "log.jsonl"


class PretrainRun:
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
        self.device = torch.device(choose_device(config.device, setting="pretrain.device"))
        with seeded(derive_seed(seed, "pretrain", "weights"), self.device):
            self.model = self._make_model()
        encoder = self.model.encoder
        self.n_visible = count_visible(encoder.n_tokens, config.mask_ratio)
        mean, std = measure_parcels(data, train, encoder.n_parcels, config.batch_size)
        encoder.mean.copy_(torch.as_tensor(mean)[:, None])
        encoder.std.copy_(torch.as_tensor(std)[:, None])
        self.model.to(self.device)
        self.optimiser = _make_optimiser(self.model, config)
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
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
        self.model.train()
        total = 0.0
        for number in range(self.steps_per_epoch):
            rows = np.sort(order[number * self.config.batch_size : (number + 1) * self.config.batch_size])
            step = self.epoch * self.steps_per_epoch + number
            total += self._step(rows, step) * len(rows)
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
            "step": self.epoch * self.steps_per_epoch,
            "loss": total / len(self.train),
            "held_out": error,
            "mean_baseline": self.baseline,
            "explained": 1 - error / self.baseline,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _step(self, rows: np.ndarray, step: int) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self._get_rate(step)
        with seeded(derive_seed(self.seed, "pretrain", "step", step), self.device):
            data = self._read(rows)
            order = torch.rand(len(rows), self.model.encoder.n_tokens).argsort(dim=1).to(self.device)
            loss = self.model(data, order, self.n_visible).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(
                f"the pretraining loss is {value} at step {step} (epoch {self.epoch + 1}, rows {rows[:3].tolist()} "
                f"and {max(0, len(rows) - 3)} more); {self._describe_rescue()}"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        return value

    def _get_rate(self, step: int) -> float:
        n_steps = self.config.n_epochs * self.steps_per_epoch
        n_warm = round(self.config.warmup * n_steps)
        if step < n_warm:
            return self.config.learning_rate * (step + 1) / n_warm
        done = (step - n_warm) / max(1, n_steps - n_warm)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

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
        return total / len(self.held_out)

    def _measure_baseline(self) -> float:
        """Return the error, on the same tokens, of predicting the mean that a token has over the training trials."""
        size, total = self.config.batch_size, 0.0
        mean: Tensor | None = None
        with torch.no_grad():
            for start in range(0, len(self.train), size):
                targets = self.model.make_targets(self._read(self.train[start : start + size]))
                part = targets.double().sum(dim=0) / len(self.train)
                mean = part if mean is None else mean + part
            assert mean is not None
            for data, order in self._iterate_held_out():
                errors = (self.model.make_targets(data) - mean.float()).square().mean(dim=-1)
                total += float(errors.gather(1, order[:, self.n_visible :]).mean(dim=1).sum())
        return total / len(self.held_out)

    def _iterate_held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = make_torch_generator(self.seed, "pretrain", "held_out_masks")
        for start in range(0, len(self.held_out), self.config.batch_size):
            rows = self.held_out[start : start + self.config.batch_size]
            noise = torch.rand(len(rows), self.model.encoder.n_tokens, generator=generator)
            yield self._read(rows), noise.argsort(dim=1).to(self.device)

    # --- files --------------------------------------------------------------------------------------------

    def _identify(self) -> str:
        """Return a digest of all that makes one run another: what was computed so far would not fit it."""
        return hash_json(
            {
                "config": self.config.hashed_fields(),
                "seed": self.seed,
                "signal": self.signal.as_json(),
                "train": self.train.tolist(),
                "held_out": self.held_out.tolist(),
                "statistics": [self.model.encoder.mean.tolist(), self.model.encoder.std.tolist()],
            }
        )

    def write_checkpoint(self) -> None:
        """Write weights, optimiser and position into one file that replaces the former at once."""
        from safetensors.torch import save_file

        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
        position = {
            "run": self._identify(),
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_error": self.best_error,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(self.folder / CHECKPOINT) as temporary:
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(plain, temporary, metadata={"position": json.dumps(position)})

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; lines of the log after it are dropped.

        Raises
        ------
        DataError
            If the checkpoint is damaged or of another run.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / CHECKPOINT
        for left_over in self.folder.glob(f".tmp-*-{CHECKPOINT}"):  # of a run that was killed while writing
            left_over.unlink(missing_ok=True)
        if not path.is_file():
            (self.folder / LOG).unlink(missing_ok=True)
            return
        try:
            with safe_open(path, framework="pt") as file:
                position = json.loads((file.metadata() or {})["position"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise DataError(
                f"the checkpoint {path} is damaged ({error}); delete it and start again."
            ) from error
        if position["run"] != self._identify():
            raise DataError(
                f"the checkpoint {path} is of a run with other settings, data or seed; delete it or use another folder."
            )
        self.model.load_state_dict(_take(tensors, "model."))
        self.best = _take(tensors, "best.")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _take(tensors, "optimiser.").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.epoch, self.best_epoch = position["epoch"], position["best_epoch"]
        self.best_error = position["best_error"]
        self._cut_log()

    def _cut_log(self) -> None:
        path = self.folder / LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        with replace_atomically(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines[: self.epoch]))

    def write_result(self, folder: Path) -> dict[str, Any]:
        """Write the encoder with its description and the log into `folder`; return what was reached."""
        from safetensors.torch import save_file

        encoder = self.model.encoder
        best = self.config.keep == "best"
        weights = self.best if best else encoder.state_dict()
        reached = {
            "held_out": self.best_error if best else self.measure_error(),
            "mean_baseline": self.baseline,
            "epoch": self.best_epoch if best else self.epoch,
            "normalisation": self.model.normalisation,
            "n_train": len(self.train),
            "n_held_out": len(self.held_out),
        }
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
        return reached


def measure_parcels(
    data: np.ndarray, rows: np.ndarray, n_parcels: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each parcel over trials and times, float32 of shape (n_parcels,).

    Read in blocks; a parcel that does not vary gets the deviation 1. Two passes, since the mean of squares less the
    square of the mean loses all digits where the mean is large.
    """
    total = np.zeros(n_parcels)
    for start in range(0, len(rows), block):
        part = np.asarray(data[rows[start : start + block]], dtype=np.float64)
        total += part.reshape(len(part), n_parcels, -1).mean(axis=2).sum(axis=0)
    mean = total / len(rows)
    total[:] = 0
    for start in range(0, len(rows), block):
        part = np.asarray(data[rows[start : start + block]], dtype=np.float64)
        total += ((part.reshape(len(part), n_parcels, -1) - mean[:, None]) ** 2).mean(axis=2).sum(axis=0)
    std = np.sqrt(total / len(rows))
    flat = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return mean.astype(np.float32), np.where(flat, 1.0, std).astype(np.float32)


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _make_optimiser(model: torch.nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.ndim > 1 and id(parameter) not in tables else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
