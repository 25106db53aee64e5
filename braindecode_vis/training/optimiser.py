"""Optimisers and learning-rate schedules.

Owns the settings, the parameter groups and the learning rate as a pure function of the step, so that a resumed run
needs no state of a scheduler. Imports torch only when an optimiser is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from braindecode_vis.checks import ConfigError
from braindecode_vis.optimisation import anneal_cosine
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    import torch

#: `OneCycleLR`'s defaults: the rate starts at a 25th of its peak and ends at a 10 000th of its start.
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25 / 1e4
GROUP_KEYS = ("params", "lr", "lr_scale", "weight_decay")
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Settings):
    """Adam or AdamW.

    Parameters
    ----------
    kind
        ``adamw`` (UBP, NeuroBridge, NeuralBench) or ``adam`` (NICE, brainmagick).
    lr
        Peak learning rate; 1e-4 is UBP's and NeuroBridge's, 3e-4 ATM's.
    weight_decay
        Decoupled for ``adamw``; 1e-4 is UBP's. Learned temperatures are not decayed.
    betas
        Decay of the two moments; NICE takes (0.5, 0.999).
    """

    kind: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)


class ScheduleConfig(Settings):
    """How the learning rate moves over the updates of a training.

    Parameters
    ----------
    kind
        ``constant``, ``cosine`` (down to `final` of the peak) or ``one_cycle`` (`torch.optim.lr_scheduler.OneCycleLR`
        with cosine annealing, NeuralBench's schedule).
    warmup
        Share of the updates over which the rate rises linearly from nothing (``constant``, ``cosine``), or the part of
        the cycle before the peak (``one_cycle``; NeuralBench takes 0.1).
    final
        Last rate of ``cosine`` as a share of the peak.
    """

    kind: Literal["constant", "cosine", "one_cycle"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.0, ge=0, le=1)


def compute_lr_factor(config: ScheduleConfig, update: int, n_updates: int) -> float:
    """Return the learning rate of an update as a share of the peak.

    Parameters
    ----------
    config
        The schedule.
    update
        Number of the update, from 0.
    n_updates
        Updates of the whole training.

    Examples
    --------
    >>> compute_lr_factor(ScheduleConfig(kind="cosine"), 50, 101)
    0.5
    """
    if config.kind == "one_cycle":
        return _compute_one_cycle(config.warmup, update, n_updates)
    n_warm = round(config.warmup * n_updates)
    if update < n_warm:
        # The first update after the rise is the first at the peak.
        return (update + 1) / (n_warm + 1)
    if config.kind == "constant":
        return 1.0
    # the last update has the final rate exactly
    fraction = (update - n_warm) / max(1, n_updates - 1 - n_warm)
    return anneal_cosine(1.0, config.final, min(fraction, 1.0))


def _compute_one_cycle(warmup: float, update: int, n_updates: int) -> float:
    # torch counts the peak as step pct_start * n - 1
    peak, last = warmup * n_updates - 1, max(1, n_updates - 1)
    if update <= peak:
        return anneal_cosine(ONE_CYCLE_START, 1.0, update / peak if peak > 0 else 1.0)
    start = max(peak, 0.0)
    return anneal_cosine(1.0, ONE_CYCLE_END, min(1.0, (update - start) / max(1e-9, last - start)))


def make_optimiser(
    config: OptimiserConfig, model: Any, *, frozen_decay: bool = False
) -> torch.optim.Optimizer:
    """Return the optimiser of the trainable parameters of a model.

    A network may say by ``parameter_groups()`` which of its parameters learn otherwise: a list of mappings with
    ``params`` and any of ``lr``, ``lr_scale`` (a factor of `config.lr`) and ``weight_decay``.

    Parameters
    ----------
    config
        The settings.
    model
        A `BrainImageModel`: `network`, `fusion` and `tower` with groups of their own, and `objectives` whose parameters
        are not decayed.
    frozen_decay
        Take no weight decay anywhere, for tables of which a batch moves a few rows only.

    Raises
    ------
    ConfigError
        If nothing can be trained, or the network's groups hold an unknown key.
    """
    import torch

    groups: list[dict[str, Any]] = []
    own = getattr(model.network, "parameter_groups", None)
    for group in own() if own is not None else []:
        groups.append(_read_group(config, group))
    for part in (getattr(model, "fusion", None), getattr(model, "tower", None)):
        groups += (
            [_read_group(config, group) for group in part.parameter_groups()] if part is not None else []
        )
    taken = {id(p) for group in groups for p in group["params"]}
    # Decay would pull a learned temperature toward 1, and with it the contrast.
    temperatures = {id(p): p for p in model.objectives.parameters()}
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


def _read_group(config: OptimiserConfig, group: dict[str, Any]) -> dict[str, Any]:
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
