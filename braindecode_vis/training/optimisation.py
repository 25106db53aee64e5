"""The loop of steps that every training shares: its learning rate, averaged weights, and checkpoints of it.

Encoder, pretraining, prior, generator and refiner all call `optimise`; each brings the function that computes the loss
of a step and what happens after one. Whatever is random in a step must be drawn from the number of the step, so that a
training that was killed continues from a checkpoint to the same bits as one that was not. Knows no data and no models.

A checkpoint is one safetensors file with every tensor (weights, averages, moments of the optimiser) and, in its header,
the plain state as JSON, so that one rename makes both visible at once. No pickle. It names what it belongs to, and is
refused, by name, by anything else. Imports torch, and pandas with the store, inside functions only, since settings of
trainings are read before either is loaded.

References
----------
Polyak, Juditsky (1992), doi:10.1137/0330046, averaging of weights. Loshchilov, Hutter (2017), arXiv:1608.03983, the
cosine.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import take_part
from braindecode_vis.base.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Model = TypeVar("Model", bound="nn.Module")
#: `OneCycleLR`'s defaults: the rate starts at a 25th of its peak; the first beta is 0.95 at the ends, 0.85 at the peak.
ONE_CYCLE_START, ONE_CYCLE_BETAS = 1 / 25, (0.95, 0.85)
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
    """How the learning rate changes over the updates of a training.

    Parameters
    ----------
    kind
        ``constant``, ``cosine`` (down to `final` of the peak) or ``one_cycle`` (`torch.optim.lr_scheduler.OneCycleLR`
        with cosine annealing, NeuralBench's schedule).
    warmup
        Share of the updates over which the rate rises linearly from nothing (``constant``, ``cosine``), or the part of
        the cycle before the peak (``one_cycle``, from a 25th of it; NeuralBench takes 0.1, MindEye 2 / epochs).
    final
        Last rate of ``cosine`` as a share of the peak.
    final_division
        Of ``one_cycle``: what the rate at the start is divided by to give the last one; 10 000 is torch's, 1000
        MindEye's.
    cycle_momentum
        Of ``one_cycle``: move the first beta against the rate, from 0.95 to 0.85 at the peak and back, in place of the
        optimiser's own; torch's default, and so part of every paper that says "one cycle" (MindEye, NeuralBench).
    """

    kind: Literal["constant", "cosine", "one_cycle"] = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    final: float = Field(default=0.0, ge=0, le=1)
    final_division: float = Field(default=1e4, ge=1)
    cycle_momentum: bool = False

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"final_division", "cycle_momentum"})

    @model_validator(mode="after")
    def _check_is_looked_at(self) -> Self:
        for name in ("final_division", "cycle_momentum"):
            if self.kind != "one_cycle" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is a setting of the schedule one_cycle, not of {self.kind}; leave it out"
                )
        if self.final != 0 and self.kind != "cosine":
            raise ValueError(f"final is a setting of the schedule cosine, not of {self.kind}; leave it out")
        return self


def optimise(
    optimiser: Any,
    parameters: Iterable[nn.Parameter],
    steps: Iterable[int],
    compute_losses: Callable[[int], Iterable[Tensor]],
    *,
    after: Callable[[int, list[Tensor]], None],
    rate: Callable[[int], float] | None = None,
    beta: Callable[[int], float | None] = lambda step: None,
    clip_norm: float | None = None,
    describe_failure: Callable[[int, float], str] | None = None,
    accelerator: Any = None,
) -> None:
    """Take steps down the gradient of a loss.

    Parameters
    ----------
    optimiser
        A torch optimiser; the learning rates that its groups start with are their peaks.
    parameters
        Those whose common gradient norm is clipped.
    steps
        Numbers of the steps to take, ascending.
    compute_losses
        Gives the losses of a step one by one, each of a part of its batch; their gradients add up. A loss is dropped,
        with its graph, before the next one is asked for.
    after
        Called with the number of the step and its detached losses once the weights have moved: averages, logs,
        checkpoints.
    rate
        Learning rate of a step as a share of the peak; None leaves the rates to a scheduler of the caller's.
    beta
        Decay of the first moment in a step; None leaves the optimiser's own.
    clip_norm
        Largest norm of the gradient.
    describe_failure
        Words for a loss that is not finite, from the number of the step and the loss; None leaves the check, which
        waits for a GPU at every step, to `after`.
    accelerator
        An `accelerate.Accelerator`; its scaler, if it has one, keeps gradients of float16 from vanishing.

    Raises
    ------
    DataError
        If a loss is not finite; no weight has moved in that step.
    """
    import torch

    parameters = list(parameters)
    for group in optimiser.param_groups:
        # Once: later calls, one per epoch, find rates that have moved.
        group.setdefault("peak_lr", group["lr"])
    # Without a scaler accelerate adds nothing to a backward pass but a search for packages each time.
    scaled = accelerator is not None and accelerator.scaler is not None
    for step in steps:
        if rate is not None:
            set_learning_rate(optimiser, rate(step))
        if (decay := beta(step)) is not None:
            for group in optimiser.param_groups:
                group["betas"] = (decay, group["betas"][1])
        losses = []
        for loss in compute_losses(step):
            if describe_failure is not None and not math.isfinite(value := float(loss.detach())):
                raise DataError(describe_failure(step, value))
            if scaled:
                accelerator.backward(loss)
            else:
                loss.backward()
            losses.append(loss.detach())
        if clip_norm is not None and scaled:
            accelerator.clip_grad_norm_(parameters, clip_norm)
        elif clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimiser.step()
        # None: a parameter that the next loss leaves out must not move by moments alone.
        optimiser.zero_grad(set_to_none=True)
        after(step, losses)


def set_learning_rate(optimiser: Any, share: float) -> None:
    """Set every group to a share of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * share


def anneal_cosine(start: float, end: float, fraction: float) -> float:
    """Return the value on half a cosine from `start` (fraction 0) to `end` (fraction 1).

    Examples
    --------
    >>> anneal_cosine(1.0, 3.0, 0.5)
    2.0
    """
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def compute_warm_cosine(step: int, n_steps: int, n_warm: int) -> float:
    """Return the learning rate of a step as a share of the peak: a linear rise, then half a cosine down to zero.

    Parameters
    ----------
    step
        Number of the step, from 0.
    n_steps
        Steps of the whole training.
    n_warm
        Steps of the rise; the last of them has the full rate.

    Examples
    --------
    >>> [compute_warm_cosine(step, 6, 2) for step in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < n_warm:
        return (step + 1) / n_warm
    # over all that is left, so that zero lies one step past the end
    return anneal_cosine(1.0, 0.0, (step - n_warm) / max(1, n_steps - n_warm))


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
        ends = ONE_CYCLE_START, ONE_CYCLE_START / config.final_division
        return _compute_one_cycle(config, update, n_updates, ends[0], 1.0, ends[1])
    n_warm = round(config.warmup * n_updates)
    if update < n_warm:
        # The first update after the rise is the first at the peak.
        return (update + 1) / (n_warm + 1)
    if config.kind == "constant":
        return 1.0
    # the last update has the final rate exactly
    fraction = (update - n_warm) / max(1, n_updates - 1 - n_warm)
    return anneal_cosine(1.0, config.final, min(fraction, 1.0))


def compute_first_beta(config: ScheduleConfig, update: int, n_updates: int) -> float | None:
    """Return the decay of the first moment at an update, or None if the schedule leaves the optimiser's own."""
    if not config.cycle_momentum:
        return None
    ends, peak = ONE_CYCLE_BETAS
    return _compute_one_cycle(config, update, n_updates, ends, peak, ends)


def _compute_one_cycle(
    config: ScheduleConfig, update: int, n_updates: int, start: float, top: float, end: float
) -> float:
    """Return what goes from `start` to `top` in the warm-up and on to `end`, each along half a cosine."""
    # torch counts the peak as step pct_start * n - 1
    peak, last = config.warmup * n_updates - 1, max(1, n_updates - 1)
    if update <= peak:
        return anneal_cosine(start, top, update / peak if peak > 0 else 1.0)
    turn = max(peak, 0.0)
    return anneal_cosine(top, end, min(1.0, (update - turn) / max(1e-9, last - turn)))


def split_decayed(
    parameters: Iterable[nn.Parameter], weight_decay: float, *, spared: Iterable[Tensor] = ()
) -> list[dict[str, Any]]:
    """Return two groups of an optimiser: matrices and kernels, which decay, and biases and scales, which do not.

    Parameters
    ----------
    parameters
        Those of a network.
    weight_decay
        Of the first group.
    spared
        Those that do not decay whatever their shape, such as tables of positions.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    kept = {id(parameter) for parameter in spared}
    for parameter in parameters:
        (decayed if parameter.dim() > 1 and id(parameter) not in kept else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class MovingAverage(Generic[Model]):
    """A copy of a model whose weights follow the original slowly; its buffers are those of the original.

    Parts may be taken out of the copy; the rest goes on following.

    Parameters
    ----------
    model
        The model to follow, on its device.
    decay
        Share of the average that stays at each step.
    warm_up
        Start with a smaller decay ``(1 + step) / (10 + step)``, so that the first weights are soon forgotten (the rule
        of TensorFlow's `ExponentialMovingAverage`).
    """

    def __init__(self, model: Model, decay: float, *, warm_up: bool = True) -> None:
        self.decay, self.warm_up = decay, warm_up
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)

    def follow(self, model: nn.Module, step: int) -> None:
        """Move toward `model` after the given number of steps."""
        import torch

        decay = min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            # In one call for all weights; a loop over tensors costs as much as the step of a small network.
            torch._foreach_lerp_(list(own.values()), [weights[name] for name in own], 1 - decay)
            for name, buffer in self.model.named_buffers():
                # Running statistics are averages already.
                buffer.copy_(buffers[name])


# --- checkpoints ----------------------------------------------------------------------------------------

#: What a difference in an entry of an identity means.
_MEANING = {
    "network": "another architecture",
    "config": "other settings",
    "signal": "trials of other axes, channels or subjects",
    "target": "another target space",
    "data": "other training data",
    "seed": "another seed",
    "n_processes": "another number of processes",
}


def write_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
    """Write tensors and plain state into one file that replaces the former at once.

    Parameters
    ----------
    path
        Its folder is made if missing.
    groups
        Tensors by group and name; `take` gives a group back. Shared memory is written twice.
    state
        What JSON can hold; `identity` in it is what `check_identity` compares.
    """
    from braindecode_vis.base.store import json_plain, write_tensors

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    # safetensors writes contiguous host memory only.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        if tensor.data_ptr() in seen:  # safetensors refuses two names of the same memory
            plain[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    write_tensors(path, plain, metadata={"state": json.dumps(json_plain(state), allow_nan=False)})


def read_checkpoint(
    path: Path, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and state of a checkpoint, None if there is none.

    Parameters
    ----------
    path
        The file. What a run that was killed while writing it left beside it is deleted.
    identity
        What the checkpoint must belong to; None does not ask.

    Raises
    ------
    DataError
        If the file is damaged, no checkpoint, or one of another training.
    """
    from safetensors import SafetensorError

    from braindecode_vis.base.store import open_tensors

    for left_over in path.parent.glob(f".tmp-*-{path.name}"):
        left_over.unlink(missing_ok=True)
    if not path.is_file():
        return None
    try:
        with open_tensors(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        state = json.loads(header["state"]) if "state" in header else None
    except PermissionError:
        raise
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise DataError(
            f"the checkpoint {path} is damaged ({error}); delete it to train again from the start."
        ) from error
    if not isinstance(state, dict):
        raise DataError(
            f"{path} is not a checkpoint of a training, or is one of an older version; delete it to "
            "train again from the start."
        )
    if identity is not None:
        check_identity(identity, state.get("identity", {}), path)
    return tensors, state


def check_identity(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Raise `DataError` naming the first thing in which a file belongs to another training."""
    from braindecode_vis.base.store import json_plain

    plain = json_plain(dict(expected))
    for key, value in plain.items():
        if found.get(key) == value:
            continue
        # The first entry that differs, down to the setting, says more than two digests.
        was, now = _show_difference(found.get(key), value)
        raise DataError(
            f"{path} belongs to {_MEANING.get(key, f'another {key}')} ({was}, now {now}); delete it to "
            "train again from the start, or use the earlier settings."
        )


def _show_difference(old: Any, new: Any, name: str = "") -> tuple[str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _show_difference(old.get(key), new.get(key), f"{name}.{key}".strip("."))
    left, right = (str(v)[:80] for v in (old, new))
    return (f"{name}: {left}" if name else left), right


def list_shapes(network: nn.Module) -> list[list[Any]]:
    """Return name and shape of each tensor of a network, which distinguish it from another architecture."""
    return [[name, list(tensor.shape)] for name, tensor in network.state_dict().items()]


def sum_rows(arrays: Iterable[np.ndarray | None]) -> list[Any]:
    """Return the shape and two sums of each array, which distinguish it from other data without hashing it.

    The second sum weighs rows by their place, so that the same rows in another order are other data.
    """
    sums: list[Any] = []
    for array in arrays:
        if array is None:
            sums.append(None)
            continue
        weights = np.linspace(1, 2, len(array))
        rows = array.reshape(len(array), -1)
        total = float(rows.sum(dtype=np.float64))
        sums.append([*array.shape, total, float(weights @ rows.sum(axis=1, dtype=np.float64))])
    return sums


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, what: str) -> None:
    """Copy weights into a model; other names or shapes are a `DataError` that names the first.

    Parameters
    ----------
    model
        The module to fill.
    tensors
        Its state by name.
    what
        Where they came from, in the message.
    """
    own = model.state_dict()
    missing, surplus = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = sorted(k for k in set(own) & set(tensors) if own[k].shape != tensors[k].shape)
    if missing or surplus or wrong:
        if wrong:
            name = wrong[0]
            detail = f"{name} has the shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        else:
            detail = (
                f"it is missing {missing[0]}" if missing else f"it holds {surplus[0]}, which is not used here"
            )
        raise DataError(
            f"{what} is of another architecture ({detail}); use the settings it was trained with."
        )
    model.load_state_dict(tensors)


def take(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Return the tensors of a group by their names in it."""
    return {name[len(group) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{group}.")}


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of an optimiser by number of the parameter."""
    import torch

    return {
        f"{number}.{key}": torch.as_tensor(value)
        for number, entry in optimiser.state_dict()["state"].items()
        for key, value in entry.items()
    }


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Bring an optimiser into the state that `pack_optimiser` gave; rates and decays stay its own."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    for place, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        if place in state:
            state[place] = {key: take_part(value, parameter) for key, value in state[place].items()}
    # Its own groups: rates follow from the number of the step.
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
