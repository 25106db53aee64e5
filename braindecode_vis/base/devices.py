"""Device, precision and random state of torch, and the processes that share one training.

The only module that chooses a device, changes precision, seeds torch and restores its state. It does not depend on
networks or settings: the caller gives the name of its setting, so that a message names the right one.

Also connects the processes of one training, started by torchrun or a Slurm job: they join, share rows of a batch, agree
on values, and leave. While their group is open, `gather_rows` and accelerate see them; afterwards each process is alone
again. Imports torch inside functions only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from braindecode_vis.base.checks import ConfigError, DataError, check_option

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor, nn

Result = TypeVar("Result")
#: The first process may embed a data set's images while the others wait.
_LONGEST_WAIT = timedelta(days=14)
#: What a process says that was left by another one, in whose own message the reason is.
LOST_PROCESS = "another process of this training has ended"
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def choose_device(wanted: str, *, setting: str) -> str:
    """Return ``cpu`` or ``cuda``, or a numbered GPU that was asked for by its number.

    Parameters
    ----------
    wanted
        ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
    setting
        Name of the setting, such as ``encoder.device``, for the message.

    Raises
    ------
    ConfigError
        If a GPU is asked for and torch sees none.

    Examples
    --------
    >>> choose_device("cpu", setting="encoder.device")
    'cpu'
    """
    import torch

    # A number behind the colon names one of several GPUs.
    check_option(setting, wanted.split(":")[0], ("auto", "cpu", "cuda"))
    has_gpu = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if has_gpu else "cpu"
    if wanted != "cpu" and not has_gpu:
        raise ConfigError(f"{setting} is {wanted}, but torch sees no GPU here; use auto or cpu.")
    return wanted


# --- random state ---------------------------------------------------------------------------------------


@contextmanager
def keep_random_state(device: str | torch.device = "cpu") -> Iterator[None]:
    """Leave torch's global random state, that of the CPU and of `device`, as it was found."""
    import torch

    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        yield


def seed_device(device: str | torch.device, seed: int) -> None:
    """Seed the global generators of the CPU and of one device."""
    import torch

    # Not torch.manual_seed, which queues a call, with a stack trace each time, for every device not yet in use.
    torch.default_generator.manual_seed(seed)
    place = torch.device(device)
    if place.type == "cuda":
        index = torch.cuda.current_device() if place.index is None else place.index
        torch.cuda.default_generators[index].manual_seed(seed)


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed torch inside the block only: draws inside are the same every time, and draws outside do not change."""
    with keep_random_state(device):
        seed_device(device, seed)
        yield


# --- precision ------------------------------------------------------------------------------------------


@contextmanager
def autocast(device: str | torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Compute matrix products in half precision inside, or in that of their arguments.

    Parameters
    ----------
    device
        Device that computes the products.
    dtype
        ``torch.bfloat16`` or ``torch.float16``; None or ``torch.float32`` leaves an autocast that is entered outside.
    """
    import torch

    kind = torch.device(device).type
    if not torch.amp.is_autocast_available(kind):  # such as "meta", where nothing is computed
        yield
    elif dtype is None or dtype is torch.float32:
        with torch.autocast(kind, enabled=False):
            yield
    else:
        with torch.autocast(kind, dtype=dtype):
            yield


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Keep convolutions on a GPU in full single precision, by an algorithm that is not chosen by speed.

    They would otherwise be rounded to ten bits (TF32), and two runs could take two algorithms.
    """
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def full_precision_products() -> Iterator[None]:
    """Keep matrix products in true single precision, even if a faster setting is active elsewhere."""
    import torch

    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


# --- processes of one training --------------------------------------------------------------------------


def count_launched() -> int:
    """Return how many processes torchrun started beside and with this one; 1 without it."""
    # WORLD_SIZE alone may be left in an environment; torchrun always sets RANK beside it.
    size = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(size) if size.isdigit() else 1


def is_first() -> bool:
    """Say whether this process is the first of its launch, which writes files and prints messages."""
    return count_launched() == 1 or os.environ["RANK"] == "0"


def spans_machines() -> bool:
    """Say whether the launch has processes on other machines."""
    return count_launched() > 1 and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]


def count_processes() -> int:
    """Return the number of processes that train together."""
    from torch import distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def count_local_processes() -> int:
    """Return how many of the processes that train together run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count_processes() > 1 else 1


def get_rank() -> int:
    """Return the number of this process among them."""
    from torch import distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(tensor: Tensor, *, dim: int = 0) -> Tensor:
    """Return the rows of all processes in the order of their ranks, with gradients; the tensor itself in a single one.

    A contrastive loss over a batch that is spread over processes needs the negatives of all of them. Each process
    computes the loss of the whole batch; the gradient of a gathered row is the sum of what every process derives for
    it, so that the average that `DistributedDataParallel` takes over processes is the gradient of the whole batch.

    Parameters
    ----------
    tensor
        Same shape in every process.
    dim
        Axis of the rows.
    """
    if count_processes() == 1:
        return tensor
    return _make_gather()(tensor.movedim(dim, 0)).movedim(0, dim)


@cache
def _make_gather() -> Any:
    """Return the differentiable gathering of rows; its class needs torch, which this module does not import."""
    import torch
    from torch import distributed as dist

    class GatherRows(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor) -> Tensor:
            parts = [torch.empty_like(rows) for _ in range(count_processes())]
            # same shape in every process, as `make_batches` gives each as many units
            dist.all_gather(parts, rows.contiguous())
            ctx.n_rows = len(rows)
            return torch.cat(parts)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            # a copy, since all_reduce writes in place
            gradient = gradients[0].contiguous().clone()
            dist.all_reduce(gradient)
            start = get_rank() * ctx.n_rows
            return gradient[start : start + ctx.n_rows]

    return GatherRows.apply


def take_share(rows: np.ndarray) -> np.ndarray:
    """Return the consecutive rows of this process; all rows in a single process."""
    n, rank = count_processes(), get_rank()
    return rows[len(rows) * rank // n : len(rows) * (rank + 1) // n]


def sum_processes(values: np.ndarray | float) -> np.ndarray:
    """Return the sum over all processes, float64, the same bits in each; the values themselves in a single one."""
    import numpy as np

    total = np.array(values, dtype=np.float64)
    if count_processes() > 1:
        import torch
        from torch import distributed as dist

        dist.all_reduce(torch.from_numpy(total.reshape(-1)))  # in the same memory
    return total


def compute_once(compute: Callable[[], Result]) -> Result:
    """Return in every process what the first one computes, while the others wait."""
    if count_processes() == 1:
        return compute()
    from torch import distributed as dist

    found = [compute() if not get_rank() else None]
    dist.broadcast_object_list(found, src=0)
    return cast("Result", found[0])


def check_same_start(position: int, folder: Path | None, device: str | torch.device) -> None:
    """Wait for all processes, as the first may soon replace the checkpoint that the others still read, and compare.

    Parameters
    ----------
    position
        Position at which this process continues: an epoch or an update.
    folder
        Folder of the checkpoint, for the message.
    device
        Device of the training.

    Raises
    ------
    DataError
        If a process continues from another position.
    """
    import torch

    starts = gather_rows(torch.tensor([float(position)], device=device)).tolist()
    if len(set(starts)) > 1:
        raise DataError(
            f"the processes found different checkpoints in {folder}; all of them need the same run folder."
        )


def open_accelerator(device: str, precision: str, *, role: str = "encoder") -> Any:
    """Return an accelerator for a training.

    accelerate keeps one state per process and refuses a second precision or device; a process that trains several
    encoders one after the other, alone, starts from a clean state each time. `role` begins the names of the settings in
    messages.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    on_cpu = choose_device(device, setting=f"{role}.device") == "cpu"
    if precision == "fp16" and on_cpu:
        raise ConfigError(f"{role}.precision is fp16, which a CPU cannot use for training; use bf16 or fp32.")
    if count_processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    # A batch may leave out a subject's layer, or a phase an objective.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=_MIXED[precision], kwargs_handlers=handlers)
    if count_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        _check_sharding(accelerator, on_cpu)
    return accelerator


def _check_sharding(accelerator: Any, on_cpu: bool) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "ACCELERATE_USE_FSDP asks for version 1 of FSDP, but version 2 is used here; set "
            "FSDP_VERSION=2 (accelerate launch --fsdp_version 2)."
        )
    if on_cpu and not accelerator.is_fsdp2:
        # accelerate shards on GPUs alone and would say nothing; torch does it on CPUs as well.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        if accelerator.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP


def share_network(accelerator: Any, model: nn.Module, optimiser: Any) -> tuple[Any, Any]:
    """Return a network and its optimiser, spread over the processes of a training as accelerate's settings say.

    Parameters
    ----------
    accelerator
        From `open_accelerator`.
    model
        Its gradients are averaged over processes (DDP), or each process keeps a part of it (FSDP), in its own place.
    optimiser
        Of its parameters.
    """
    if is_sharded(accelerator):
        from torch import distributed as dist
        from torch.nn import ParameterList

        def average(parameter: Any) -> None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= count_processes()

        # Numbers by themselves, such as temperatures, cannot be cut: each process keeps all of them.
        scalars = [parameter for parameter in model.parameters() if not parameter.ndim]
        for parameter in scalars:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average)
        plugin = accelerator.state.fsdp_plugin
        plugin.ignored_modules = [ParameterList(scalars)]
        plugin.cpu_ram_efficient_loading = False  # every process has made the weights
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    return wrapped, optimiser


def is_sharded(accelerator: Any) -> bool:
    """Say whether each process keeps a part of a network alone (FSDP)."""
    return bool(accelerator.is_fsdp2)


def join_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors where each process keeps a part; all processes must call this together."""
    from torch.distributed.tensor import DTensor

    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def take_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor, cut like another tensor; all of it if the other one is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def join_processes(device: str, *, setting: str) -> Iterator[None]:
    """Hold the group of all launched processes open.

    Parameters
    ----------
    device
        Device of the training: ``auto``, ``cpu`` or ``cuda``. A process takes the GPU of its local rank.
    setting
        Name of the setting, for the message.

    Raises
    ------
    ConfigError
        If a GPU is asked for and there is none, or fewer than processes on this machine.
    """
    import torch
    from torch import distributed as dist

    on_gpu = choose_device(device, setting=setting) == "cuda"
    if on_gpu:
        place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= found:
            raise ConfigError(
                f"there is a process for GPU {place + 1} of this machine, which has {found}; start as many with "
                "--nproc-per-node (torchrun) or --gpus (--cluster) as there are GPUs."
            )
        # Before the group opens: NCCL binds to the current device.
        torch.cuda.set_device(place)
    # gloo beside nccl: waiting and agreeing happen on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_LONGEST_WAIT)
    yield
    # Not after an error: others may still wait for this process, and a group that waits cannot be closed.
    dist.destroy_process_group()
    forget_launch()


def take_local_gpu() -> None:
    """Let a process that torchrun started, and that computes alone, see only the GPU of its local rank.

    GPU numbers are used in turn if there are more processes than GPUs. Call it before CUDA is used: some libraries take
    the first GPU that they see, whatever the current device is.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    if len(seen) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[int(os.environ.get("LOCAL_RANK", "0")) % len(seen)]


def forget_launch() -> None:
    """Make accelerate treat this process as started alone."""
    for name in _LAUNCH_VARIABLES:
        # accelerate would otherwise wait for processes that have left.
        os.environ.pop(name, None)


def broadcast_flag(value: bool = False) -> bool:
    """Wait for the first process and return its value.

    Parameters
    ----------
    value
        Value of the first process; the others need not give it.
    """
    import torch
    from torch import distributed as dist

    said = torch.tensor([int(value)])
    # Over gloo and on the CPU: no GPU is kept busy while others wait for hours.
    dist.broadcast(said, src=0)
    return bool(said.item())


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn torch's error about a lost process into one sentence.

    Raises
    ------
    DataError
        If another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        if "gloo" not in words and "NCCL" not in words:
            raise
        raise DataError(
            f"{LOST_PROCESS}; its own message, or torchrun's table, says why. Run the same command again to continue."
        ) from error


def leave(code: int = 0) -> NoReturn:
    """End this process without taking the interpreter apart.

    torch keeps the threads of a group that `DistributedDataParallel` used. A thread that releases a tensor while the
    interpreter ends would abort the process, after all its work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
