"""Weights of the parcel encoder: written by pretraining, read from it or from a foreign file.

Never unpickles: safetensors, or torch files through ``weights_only``. Every tensor of the encoder must be found and
every tensor of the file used, or named as ignored; what came from where is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from braindecode_vis.checks import DataError
from braindecode_vis.store import read_json

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "encoder")
_OPTIONAL = {"mean", "std"}  # foreign encoders bring no statistics of the parcels; 0 and 1 stay
DESCRIPTION = "encoder.json"


@dataclass(frozen=True)
class LoadReport:
    """What was read.

    Parameters
    ----------
    file
        Where from.
    loaded
        Name in the file to name in the encoder.
    ignored
        Names in the file that were left out because the configuration says so.
    """

    file: Path
    loaded: Mapping[str, str]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        renamed = [f"{a} as {b}" for a, b in self.loaded.items() if a != b]
        text = f"{len(self.loaded)} tensors from {self.file}"
        if renamed:
            text += f", {len(renamed)} renamed (first {renamed[0]})"
        return text + (f", {len(self.ignored)} ignored" if self.ignored else "")


def describe_encoder(encoder: nn.Module, signal: Any, config: Any) -> dict[str, Any]:
    """Return what two encoders must share for their weights to mean the same."""
    return {
        "width": config.width,
        "depth": config.depth,
        "n_heads": config.n_heads,
        "mlp_ratio": config.mlp_ratio,
        "patch_times": encoder.patch_times,
        "n_patches": encoder.n_patches,
        "n_parcels": encoder.n_parcels,
        "network_embedding": config.network_embedding,
        "parcel_position": config.parcel_position,
        "networks": list(signal.networks),
    }


def read_encoder(
    encoder: nn.Module, file: Path, *, key_map: Mapping[str, str], ignore: Sequence[str]
) -> LoadReport:
    """Read weights into `encoder`.

    Parameters
    ----------
    encoder
        A `parcel_layers.ParcelEncoder`, changed in place.
    file
        ``.safetensors``, or a torch file of tensors.
    key_map, ignore
        See `parcels.ParcelsConfig`.

    Raises
    ------
    DataError
        If the file cannot be read, a tensor is missing, left over or of another shape, two have the same name, or
        a value is not finite.
    """
    tensors = _read_tensors(file)
    loaded: dict[str, str] = {}
    ignored: list[str] = []
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(name.startswith(prefix) for prefix in ignore):
            ignored.append(name)
            continue
        renamed = _rename(name, key_map)
        if renamed in state:
            raise DataError(f"two tensors of {file} become {renamed}; correct encoder.network.key_map.")
        loaded[name], state[renamed] = renamed, tensor
    _check_state(encoder.state_dict(), state, file)
    encoder.load_state_dict(state, strict=False)  # complete but for the optional ones, as was just checked
    return LoadReport(file, loaded, tuple(ignored))


def check_description(found: Mapping[str, Any], folder: Path) -> None:
    """Raise `DataError` if `folder` was pretrained with another architecture or parcellation than `found`."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return
    wanted = read_json(path).get("architecture", {})
    for key, value in wanted.items():
        if key not in found or found[key] == value:
            continue
        if key == "networks":
            where = next((i for i, (a, b) in enumerate(zip(value, found[key], strict=False)) if a != b), None)
            raise DataError(
                f"the encoder in {folder} was pretrained on parcels of other networks (first difference at parcel "
                f"{where if where is not None else min(len(value), len(found[key]))}): it belongs to another atlas."
            )
        raise DataError(
            f"the encoder in {folder} was pretrained with {key} = {value}, but this one has {found[key]}; set "
            f"encoder.network accordingly, or pretrain again."
        )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        import torch

        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"{file} cannot be read as a file of tensors ({str(error).splitlines()[0][:200]}); give a .safetensors "
            "file, or a torch file that holds nothing but tensors."
        ) from error
    for _ in range(3):
        inner = next(
            (key for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)),
            None,
        )
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, not a table of named tensors.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"{file} holds no tensor.")
    return tensors


def _rename(name: str, key_map: Mapping[str, str]) -> str:
    for old, new in key_map.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor], file: Path) -> None:
    missing, left_over = sorted(set(own) - set(given) - _OPTIONAL), sorted(set(given) - set(own))
    if missing or left_over:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} tensor(s) of the encoder ({', '.join(missing[:5])})")
        if left_over:
            parts.append(f"has {len(left_over)} that the encoder does not know ({', '.join(left_over[:5])})")
        raise DataError(
            f"{file} {' and '.join(parts)}; rename with encoder.network.key_map, leave out with "
            "encoder.network.ignore_keys, or change width, depth and embeddings to those of the file."
        )
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise DataError(
                f"{name} in {file} has the shape {tuple(tensor.shape)}, but the encoder's is "
                f"{tuple(own[name].shape)}: another architecture, parcellation or length of trial."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"{name} in {file} holds values that are not finite.")
