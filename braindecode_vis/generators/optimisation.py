"""One resumable optimisation: AdamW, averaged weights, checkpoints without pickle, a log in JSON lines.

Owns the loop over steps. What a step computes comes in as a function of the step's number, which must draw whatever is
random from that number: then a run that was killed goes on from its last checkpoint to the same weights as one that was
not. Knows nothing of images or diffusion.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from braindecode_vis.checks import DataError
from braindecode_vis.store import replace_atomically

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Parameters
    ----------
    name
        Of the stage, in the log and in messages.
    n_steps, lr, weight_decay, warmup, ema_decay
        Steps, peak learning rate, weight decay, steps of warm-up, decay of the averaged weights.
    every
        Steps between checkpoints and log lines.
    identity
        Text that must be equal for a checkpoint to be taken up again.
    """

    name: str
    n_steps: int
    lr: float
    weight_decay: float
    warmup: int
    ema_decay: float
    every: int
    identity: str


def optimise(
    network: nn.Module,
    compute_loss: Callable[[nn.Module, int], torch.Tensor],
    plan: Plan,
    *,
    checkpoint: Path,
    log: Path,
    report: Report | None = None,
) -> nn.Module:
    """Minimise a loss and return the network with averaged weights.

    Parameters
    ----------
    network
        Changed in place.
    compute_loss
        Gives the loss of the network at a step.
    checkpoint
        File that is replaced every `plan.every` steps and taken up if it is there.
    log
        Receives a line each time a checkpoint is written.
    report
        Called with the stage, the steps done and the steps wanted.

    Raises
    ------
    DataError
        If the checkpoint belongs to other settings, or if the loss is not finite.
    """
    averaged = copy.deepcopy(network).requires_grad_(False)
    # Decay is for matrices and kernels; biases and scales are left alone.
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=plan.lr,
        betas=(0.9, 0.99),
    )
    start = _read_checkpoint(checkpoint, network, averaged, optimiser, plan) if checkpoint.is_file() else 0
    total, counted, begun = 0.0, 0, time.perf_counter()
    network.train()
    for step in range(start, plan.n_steps):
        for group in optimiser.param_groups:
            group["lr"] = compute_lr(step, plan)
        optimiser.zero_grad(set_to_none=True)
        loss = compute_loss(network, step)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        _average(averaged, network, min(plan.ema_decay, (1 + step) / (10 + step)))
        total, counted = total + float(loss.detach()), counted + 1
        done = step + 1
        if done % plan.every == 0 or done == plan.n_steps:
            mean = total / counted
            if not math.isfinite(mean):
                raise DataError(
                    f"the loss of the {plan.name} is not finite at step {done}; lower its learning rate."
                )
            _write_checkpoint(checkpoint, network, averaged, optimiser, plan, done)
            line = {"stage": plan.name, "step": done, "loss": round(mean, 5), "lr": compute_lr(step, plan)}
            line["seconds"] = round(time.perf_counter() - begun, 1)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            total, counted, begun = 0.0, 0, time.perf_counter()
            if report is not None:
                report(plan.name, done, plan.n_steps)
    return averaged.eval()


def compute_lr(step: int, plan: Plan) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to zero."""
    if step < plan.warmup:
        return plan.lr * (step + 1) / plan.warmup
    share = (step - plan.warmup) / max(1, plan.n_steps - plan.warmup)
    return plan.lr * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    for mine, parameter in zip(averaged.parameters(), network.parameters(), strict=True):
        mine.lerp_(parameter, 1 - decay)
    for kept, buffer in zip(averaged.buffers(), network.buffers(), strict=True):
        kept.copy_(buffer)


def _write_checkpoint(
    path: Path,
    network: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    plan: Plan,
    step: int,
) -> None:
    from safetensors.torch import save_file

    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"averaged.{name}": tensor for name, tensor in averaged.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{name}": tensor for name, tensor in state.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"step": str(step), "identity": plan.identity}
    with replace_atomically(path) as temporary:
        save_file(plain, temporary, metadata=header)


def _read_checkpoint(
    path: Path, network: nn.Module, averaged: nn.Module, optimiser: torch.optim.Optimizer, plan: Plan
) -> int:
    """Fill networks and optimiser from a checkpoint and return the steps it has done."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if header.get("identity") != plan.identity:
        raise DataError(
            f"{path} was written with other settings, images or seed; give an empty folder or the settings of that run."
        )
    tensors = load_file(path)
    for prefix, module in (("network.", network), ("averaged.", averaged)):
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimiser."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(header["step"])
