"""Training beside a bare forward/backward/optimiser loop over the same tensors, in the same run.

python benchmarks/training.py [--threads 2] [--device cpu]
python benchmarks/training.py --network eegproject --epochs 50     # bar: under 5 minutes on 2 cores
python benchmarks/training.py --network atm_s                      # bar: 90 % of the bare loop

Prints the throughput of ATM-S as a share of the bare loop, by wall and by processor time (which other work on the
machine disturbs less; several threads add up), and the time that EEGProject takes for 50 epochs over a
subject of THINGS-EEG2 (16 540 averaged trials, 17 channels, 250 samples, batches of 1024, a target of 1024 values),
from the median of a few epochs, and on the clock from call to fitted encoder for as many epochs as were asked for. On a
GPU it also times a plain loop in float32 over a per-sample Dataset and DataLoader.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.training.network_config import NetworkEncoderConfig
from braindecode_vis.training.objectives.objective import compute_clip_loss


def make_task(n_trials: int, n_channels: int, n_times: int, n_targets: int) -> tuple[Responses, Embeddings]:
    rng = np.random.default_rng(0)
    ids = np.array([f"image{i}" for i in range(n_trials)], dtype=object)
    trials = pd.DataFrame(
        {"subject": "01", "session": "01", "run": "01", "stimulus_id": ids, "repetition": 0, "split": "train"}
    )
    data = rng.standard_normal((n_trials, n_channels, n_times), dtype=np.float32)
    coords = {"sfreq": 250.0, "times": np.arange(n_times) / 250}
    responses = Responses(data, ("trial", "channel", "time"), trials, "z", coords)
    return responses, Embeddings(rng.standard_normal((n_trials, n_targets), dtype=np.float32), ids, "random")


def make_config(
    network: str, batch_size: int, epochs: int, device: str, precision: str
) -> NetworkEncoderConfig:
    return NetworkEncoderConfig.model_validate(
        {
            "network": {"kind": network}, "batch_size": batch_size, "epochs": epochs, "device": device,
            "precision": precision, "selection": {"kind": "last", "hold_out": 0},
            "input_scaling": {"kind": "none"},
        }
    )  # fmt: skip


def time_ours(
    config: NetworkEncoderConfig, responses: Responses, targets: Embeddings
) -> list[tuple[float, float]]:
    """Return wall and processor seconds of each epoch but the first."""
    encoder = config.build(seed=0)
    ends: list[tuple[float, float]] = []

    def note(done: int, total: int, text: str) -> None:
        if done % (total // config.epochs) == 0:
            ends.append((time.perf_counter(), time.process_time()))

    encoder.progress = note
    encoder.fit(responses, targets)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]


class BareLoop:
    """What a script would write: indexing, forward, loss, backward, step."""

    def __init__(
        self, config: NetworkEncoderConfig, responses: Responses, targets: Embeddings, device: str
    ) -> None:
        self.network: Any = config.network.build(describe_signal(responses), targets.vectors.shape[1]).to(
            device
        )
        self.x = torch.from_numpy(responses.data).to(device)
        self.y = torch.from_numpy(targets.vectors).to(device)
        self.scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device))
        parameters = [*self.network.parameters(), self.scale]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True)
        self.device = device

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        subject = torch.zeros(len(x), dtype=torch.long, device=self.device)
        loss = compute_clip_loss(self.network(x, subject), y, scale=self.scale.exp())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def time_epoch(self, batch_size: int) -> tuple[float, float]:
        started = time.perf_counter(), time.process_time()
        order = torch.randperm(len(self.x), device=self.device)
        # As many updates of the same size as ours.
        for rows in order.tensor_split(-(-len(order) // batch_size)):
            self.step(self.x[rows], self.y[rows])
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started[0], time.process_time() - started[1]

    def time_loader_epoch(self, batch_size: int, workers: int = 4) -> float:
        data = torch.utils.data.TensorDataset(self.x.cpu(), self.y.cpu())
        loader = torch.utils.data.DataLoader(
            data, batch_size, shuffle=True, num_workers=workers, pin_memory=True
        )
        started = time.perf_counter()
        for x, y in loader:
            self.step(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
        torch.cuda.synchronize()
        return time.perf_counter() - started


def compare(
    network: str, task: tuple[Responses, Embeddings], batch_size: int, rounds: int, device: str
) -> None:
    """Print our throughput as a share of the bare loop, rounds of both in turn."""
    bare = BareLoop(make_config(network, batch_size, 1, device, "fp32"), *task, device)
    bare.time_epoch(batch_size)  # the first one pays for fresh memory
    slow, ours = [], []
    for _ in range(rounds):
        slow.append(bare.time_epoch(batch_size))
        ours += time_ours(make_config(network, batch_size, 3, device, "fp32"), *task)
        slow.append(bare.time_epoch(batch_size))
    n = len(task[1])
    for number, name in enumerate(("wall", "processor")):
        fast, plain = (float(np.median([pair[number] for pair in times])) for times in (ours, slow))
        text = f"ours {n / fast:.0f} trials/s, bare loop {n / plain:.0f}: {plain / fast:.1%}"
        print(f"{network}, {name} time: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trials", type=int, default=512, help="trials of the ATM-S comparison on a CPU")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of EEGProject to take the median of")
    parser.add_argument("--network", choices=("both", "atm_s", "eegproject"), default="both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.network != "eegproject":
        measure_atm(options.trials, options.device)
    if options.network != "atm_s":
        measure_eegproject(options.epochs, options.device)


def measure_atm(n_trials: int, device: str) -> None:
    gpu = device == "cuda"
    n_trials, batch = (66_160, 1024) if gpu else (n_trials, 64)
    task = make_task(n_trials, 63, 250, 1024)
    compare("atm_s", task, batch, 1 if gpu else 3, device)
    if gpu:
        bare = BareLoop(make_config("atm_s", batch, 1, "cuda", "fp32"), *task, "cuda")
        loader = bare.time_loader_epoch(batch)
        ours = np.median([w for w, _ in time_ours(make_config("atm_s", batch, 4, "cuda", "bf16"), *task)])
        print(f"atm_s in bf16: {loader / ours:.1f} times a plain float32 loop over a DataLoader")


def measure_eegproject(epochs: int, device: str) -> None:
    task = make_task(16_540, 17, 250, 1024)
    started = time.perf_counter()
    seconds = time_ours(make_config("eegproject", 1024, epochs, device, "fp32"), *task)
    whole = (time.perf_counter() - started) / 60
    print(f"eegproject, on the clock: {whole:.2f} min for {epochs} epochs", flush=True)
    for number, name in enumerate(("wall", "processor")):
        epoch = float(np.median([pair[number] for pair in seconds]))
        print(
            f"eegproject, {name} time: {epoch:.2f} s per epoch, {50 * epoch / 60:.1f} min for 50", flush=True
        )
    compare("eegproject", task, 1024, 1, device)


if __name__ == "__main__":
    main()
