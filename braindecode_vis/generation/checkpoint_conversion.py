"""Convert a published checkpoint of another code base into folders of diffusers, without running what it holds.

Owns the names: those of Stability's ``generative-models`` (sgm), in which MindEye2 publishes its SDXL unCLIP, and those
of diffusers. Sizes are read off the tensors, so that a small network of the same architecture converts as well. Tensors
are mapped from the file and written in parts, so that a checkpoint of 18 GB does not have to fit into memory. What the
image encoder of the checkpoint holds is left out: its tokens are predicted.

References
----------
Scotti et al. (2024), MindEye2, arXiv:2403.11207; Podell et al. (2023), SDXL, arXiv:2307.01952.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import write_json, write_tensors
from braindecode_vis.embeddings.weights import read_tensors

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
#: Of one file of weights; a part is in memory while it is written.
LARGEST_PART = 2_000_000_000
#: Schedule that the network was trained with, sampled as sgm's discretisation does: last step of each stretch.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "num_train_timesteps": 1000, "prediction_type": "epsilon", "timestep_spacing": "trailing",
}  # fmt: skip
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


def convert_unclip(
    source: Path,
    folder: Path,
    *,
    head_size: int = 64,
    half: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Write an SDXL unCLIP of sgm as ``unet``, ``vae`` and ``scheduler`` of diffusers; see `token_unclip`.

    Parameters
    ----------
    source
        Checkpoint with the names of sgm, possibly below ``state_dict``.
    folder
        Must not hold a network yet.
    head_size
        Features of one head of attention, which tensors do not show (SDXL: 64).
    half
        Store the network in half precision, half of the space. The autoencoder stays in single precision.
    tell
        Called with a sentence before each part.

    Returns
    -------
    dict
        Settings of the network.

    Raises
    ------
    ConfigError
        If the folder is not empty.
    DataError
        If the file holds anything but tensors, or is no such network.
    """
    if any((folder / part).exists() for part in ("unet", "vae", "scheduler")):
        raise ConfigError(f"{folder} holds a network already; give a new folder.")
    state = read_checkpoint_tensors(source)
    unet = {name.removeprefix(UNET): value for name, value in state.items() if name.startswith(UNET)}
    vae = {name: value for name, value in state.items() if name.startswith(AUTOENCODER)}
    if not unet or not vae:
        raise DataError(
            f"{source} has no tensors named {UNET if not unet else AUTOENCODER}...; use the checkpoint of an SDXL "
            "unCLIP as MindEye2 publishes it (unclip6_epoch0_step110000.ckpt)."
        )
    settings = describe_unet(unet, source, head_size=head_size)
    renamed = rename_unet(unet, source)
    _check_unet(renamed, settings, source)
    made, sizes = _convert_autoencoder(vae, source)
    with _fill_folder(folder) as scratch:
        tell(f"writing {len(renamed)} tensors of the network")
        unet_settings = {"_class_name": "UNet2DConditionModel", **settings}
        _write_network(scratch / "unet", renamed, unet_settings, half=half)
        tell(f"writing {len(made)} tensors of the autoencoder")
        _write_network(scratch / "vae", made, {"_class_name": "AutoencoderKL", **sizes}, half=False)
        (scratch / "scheduler").mkdir()
        write_json(scratch / "scheduler" / "scheduler_config.json", SCHEDULER)
    return settings


def convert_folder(source: Path, folder: Path) -> list[str]:
    """Write a folder of diffusers whose weights are torch files with safetensors in their place.

    Parameters
    ----------
    source
        Holds ``model_index.json``, or parts of a pipeline.
    folder
        Must not exist yet.

    Returns
    -------
    list
        Names of the files that were converted, below the folder.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; give a new folder.")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    pickles = [path for path in files if path.suffix == ".bin"]
    if not pickles:
        raise DataError(f"{source} holds no torch files (.bin) to convert.")
    if parts := [path for path in pickles if re.search(r"-\d+-of-\d+$", path.stem)]:
        raise DataError(
            f"{parts[0]} is one part of weights in several files, which cannot be joined here; use "
            "weights in one file."
        )
    names = []
    with _fill_folder(folder) as scratch:
        for path in files:
            target = scratch / path.relative_to(source)
            index = path.suffix == ".json" and path.name.endswith(".bin.index.json")
            if path.suffix in (".json", ".txt", ".safetensors") and not index:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            elif path in pickles:
                # diffusers and transformers call their files otherwise
                target = target.with_name({"pytorch_model.bin": "model.bin"}.get(path.name, path.name))
                target = target.with_suffix(".safetensors")
                if (source / target.relative_to(scratch)).exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                state = read_checkpoint_tensors(path)
                write_tensors(target, {name: value.contiguous().clone() for name, value in state.items()})
                names.append(target.relative_to(scratch).as_posix())
    return names


@contextmanager
def _fill_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder beside `folder`, whose content goes there if all went well: no half network is left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        scratch = Path(made) / "content"
        scratch.mkdir()
        yield scratch
        folder.mkdir(exist_ok=True)
        for path in scratch.iterdir():
            path.rename(folder / path.name)


def read_checkpoint_tensors(source: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint, mapped from the file where its format allows it; nothing in it can run.

    Raises
    ------
    ConfigError
        If there is no such file.
    DataError
        If it holds anything but tensors and plain values.
    """
    import torch

    if not source.is_file():
        raise ConfigError(f"{source} is not a file; give the path of the checkpoint.")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of an older format, of safetensors, or of what must not be opened: said there
        content = read_tensors(source)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    found = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise DataError(f"{source} holds no tensors by name; use the right file.")
    return found


def list_levels(state: Mapping[str, Any], side: str) -> list[list[int]]:
    """Return the numbers of the blocks of each level of resolution, of ``input_blocks`` or ``output_blocks``."""
    numbers = sorted({int(m[1]) for name in state if (m := re.match(rf"{side}\.(\d+)\.", name))})
    levels: list[list[int]] = [[]]
    for number in numbers:
        if side == "input_blocks" and number == 0:  # the first convolution
            continue
        levels[-1].append(number)
        changes = rf"{side}\.{number}\.\d+\.(op|conv)\.weight"
        if any(re.fullmatch(changes, name) for name in state):
            levels.append([])
    return levels


def rename_unet(state: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the tensors of sgm's UNetModel under the names of diffusers' UNet2DConditionModel.

    Raises
    ------
    DataError
        Naming the first tensor that such a network has not.
    """
    place: dict[tuple[str, int], tuple[str, int]] = {}
    for side, blocks in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks")):
        for level, numbers in enumerate(list_levels(state, side)):
            place |= {(side, number): (f"{blocks}.{level}", order) for order, number in enumerate(numbers)}
    renamed = {}
    for name, value in state.items():
        new = _rename(name, place)
        if new is None:
            raise DataError(f"{source} has {name}, which is not in an SDXL unCLIP; use the right checkpoint.")
        renamed[new] = value
    return renamed


def _rename(name: str, place: Mapping[tuple[str, int], tuple[str, int]]) -> str | None:
    stem, _, end = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{end}"
    if m := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        number, rest = int(m[1]), m[2]
        if number == 1:
            return f"mid_block.attentions.0.{rest}"
        inner = _rename_resnet(rest)
        return None if inner is None else f"mid_block.resnets.{number // 2}.{inner}"
    m = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)", name)
    if m is None or (m[1], int(m[2])) not in place:
        return None
    block, order = place[m[1], int(m[2])]
    rest = m[4]
    if rest.startswith(("op.", "conv.")):  # a block of its own going down, the end of one going up
        kind = "downsamplers" if rest.startswith("op.") else "upsamplers"
        return f"{block}.{kind}.0.conv.{end}"
    if (inner := _rename_resnet(rest)) is not None:
        return f"{block}.resnets.{order}.{inner}"
    return f"{block}.attentions.{order}.{rest}" if m[3] == "1" else None


def _rename_resnet(rest: str) -> str | None:
    stem, _, end = rest.rpartition(".")
    return f"{_RESNET[stem]}.{end}" if stem in _RESNET else None


def describe_unet(state: Mapping[str, Any], source: Path, *, head_size: int) -> dict[str, Any]:
    """Return the settings of the UNet2DConditionModel that the tensors of an sgm network belong to.

    Raises
    ------
    DataError
        If tensors are missing that say its sizes.
    """
    try:
        levels = list_levels(state, "input_blocks")
        widths, depths, n_resnets = [], [], []
        for numbers in levels:
            resnets = [n for n in numbers if f"input_blocks.{n}.0.in_layers.2.weight" in state]
            widths.append(int(state[f"input_blocks.{resnets[-1]}.0.in_layers.2.weight"].shape[0]))
            n_resnets.append(len(resnets))
            found = (
                re.match(rf"input_blocks\.{resnets[0]}\.1\.transformer_blocks\.(\d+)\.", name)
                for name in state
            )
            depths.append(max((int(m[1]) + 1 for m in found if m), default=0))
        attended = next(n for n in levels[-1] if f"input_blocks.{n}.1.proj_in.weight" in state)
        attention = f"input_blocks.{attended}.1"
        keys = state[f"{attention}.transformer_blocks.0.attn2.to_k.weight"]
        told = "label_emb.0.0.weight" in state
        settings = {
            "in_channels": int(state["input_blocks.0.0.weight"].shape[1]),
            "out_channels": int(state["out.2.weight"].shape[0]),
            "block_out_channels": widths,
            "layers_per_block": n_resnets[0],
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
            "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
            # Only where there is attention; the first level of SDXL has none.
            "transformer_layers_per_block": [max(depth, 1) for depth in depths],
            "cross_attention_dim": int(keys.shape[1]),
            # diffusers calls the number of heads so, of SDXL too
            "attention_head_dim": [max(width // head_size, 1) for width in widths],
            "use_linear_projection": state[f"{attention}.proj_in.weight"].ndim == 2,
            "sample_size": 96,
        }
    except (KeyError, IndexError, StopIteration, AttributeError) as error:
        raise DataError(
            f"{source} is no UNet of Stable Diffusion XL as sgm names it ({type(error).__name__}: "
            f"{error}); use the right checkpoint."
        ) from error
    if told:
        room = int(state["label_emb.0.0.weight"].shape[1])
        # Four numbers: height and width, top and left.
        settings |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": room // 4,
            "projection_class_embeddings_input_dim": room,
        }  # fmt: skip
    if len(set(n_resnets)) > 1 or any(
        width % head_size for width, depth in zip(widths, depths, strict=True) if depth
    ):
        raise DataError(
            f"{source} has levels of {n_resnets} blocks and {widths} channels, which cannot be divided "
            f"into heads of {head_size} features; give the head size."
        )
    return settings


def _check_unet(renamed: Mapping[str, Any], settings: Mapping[str, Any], source: Path) -> None:
    """Compare names and shapes with those of an empty network of these settings."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network: Any = UNet2DConditionModel(**settings)
    own = network.state_dict()
    wrong = [name for name in own if name not in renamed or own[name].shape != renamed[name].shape]
    left_over = [name for name in renamed if name not in own]
    if wrong or left_over:
        first = (wrong or left_over)[0]
        raise DataError(
            f"{source} does not hold the whole network: {first} is missing, left over or of another shape "
            f"({len(wrong)} and {len(left_over)} of {len(own)}); use the right checkpoint."
        )


def _convert_autoencoder(state: Mapping[str, Any], source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tensors and settings of the AutoencoderKL."""
    from diffusers import AutoencoderKL

    from braindecode_vis.embeddings.autoencoders import SCALING, rename_kl

    widths: list[int] = []
    while (name := f"{AUTOENCODER}encoder.down.{len(widths)}.block.0.conv1.weight") in state:
        widths.append(int(state[name].shape[0]))
    blocks = [int(m[1]) for name in state if (m := re.match(r".*encoder\.down\.0\.block\.(\d+)\.", name))]
    if not widths or not blocks:
        raise DataError(f"{source} has no autoencoder as sgm names it; use the right checkpoint.")
    sizes = {
        "block_out_channels": widths, "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths), "layers_per_block": max(blocks) + 1,
        "latent_channels": int(state[f"{AUTOENCODER}post_quant_conv.weight"].shape[0]),
        "scaling_factor": SCALING["sdxl"], "sample_size": 768,
    }  # fmt: skip
    network: Any = AutoencoderKL(**sizes)
    kept = {name: value for name, value in state.items() if not name.startswith(f"{AUTOENCODER}loss.")}
    renamed = rename_kl(kept, network)
    own = network.state_dict()
    wrong = [name for name in own if name not in renamed or own[name].shape != renamed[name].shape]
    if wrong:
        raise DataError(f"{source} is missing {wrong[0]} of its autoencoder; use the right checkpoint.")
    return {name: renamed[name] for name in own}, sizes


def _write_network(
    folder: Path, state: Mapping[str, Any], settings: Mapping[str, Any], *, half: bool
) -> None:
    """Write weights in parts as diffusers reads them, and the settings beside them."""
    import torch

    folder.mkdir(parents=True)
    parts: list[list[str]] = [[]]
    size = 0
    for name, value in state.items():
        n_bytes = value.numel() * (2 if half else 4)
        if size and size + n_bytes > LARGEST_PART:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += n_bytes
    stem = "diffusion_pytorch_model"
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        one = len(parts) == 1
        file = f"{stem}.safetensors" if one else f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        dtype = torch.float16 if half else torch.float32
        tensors = {name: state[name].to(dtype).contiguous().clone() for name in names}
        if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise DataError(
                f"{broken[0]} is not finite, or too large for half precision; convert without half precision."
            )
        write_tensors(folder / file, tensors, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(value.numel() for value in state.values()) * (2 if half else 4)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(settings), indent=2))
