"""The weights file of the embedded generator: two networks, the components of embeddings, and a sample of images.

Owns the file format and the networks that are read from it. A file is a ``.safetensors`` with a header that says how
large the networks are and how they were trained; it appears under its name only when it is complete. Knows nothing of
sampling or of how the weights were learnt.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.store import load_tensors, open_tensors, write_tensors
from braindecode_vis.generation.priors.scales import PrincipalComponents

if TYPE_CHECKING:
    import torch
    from torch import nn

#: The file in the package.
PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "latent_diffusion.safetensors"
_HEADER = "latent_diffusion"
_IMAGES = "images.components"
_SCALE = ".scale"  # ends the name of the scales of a tensor that is stored in whole numbers
#: Of the images that a weights file holds: at most so many, so many components, in parts of a deviation.
N_KNOWN, N_KNOWN_COMPONENTS, CODE = 16_384, 128, 16


@dataclass(frozen=True)
class WeightsHeader:
    """What a weights file says about itself.

    Parameters
    ----------
    space
        Name of the embedding space that conditions the model.
    n_features
        Length of an embedding.
    image_size
        Height and width of the images in pixels.
    autoencoder, denoiser
        Sizes of the two networks.
    training
        Source of the images, seed, steps and settings.
    digest
        Of the tensors of the file; empty in files of earlier versions.
    readers
        How many names each property has that two further networks read in images and embeddings; empty without them.
    """

    space: str
    n_features: int
    image_size: int
    autoencoder: dict[str, int]
    denoiser: dict[str, int]
    training: dict[str, Any]
    digest: str = ""
    readers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """The networks of a weights file in evaluation mode, and the components of its embeddings."""

    autoencoder: Any
    denoiser: Any
    components: PrincipalComponents
    latent_shape: tuple[int, int, int]
    device: str
    image_reader: Any = None
    embedding_reader: Any = None


def build_networks(header: WeightsHeader) -> tuple[Any, Any]:
    """Return the autoencoder and the denoiser that a header describes, with fresh weights."""
    from braindecode_vis.generation.latent_diffusion_networks import DOWNSAMPLING, Autoencoder, Denoiser

    denoiser = Denoiser(
        n_latent_channels=header.autoencoder["n_latent_channels"],
        latent_size=header.image_size // DOWNSAMPLING,
        **header.denoiser,
    )
    return Autoencoder(**header.autoencoder), denoiser


def build_readers(header: WeightsHeader) -> dict[str, Any]:
    """Return the readers of images and embeddings with fresh weights, by the first part of their tensors' names."""
    if not header.readers:
        return {}
    from braindecode_vis.generation.repainting import EmbeddingReader, ImageReader

    n = header.denoiser["n_components"]
    return {
        "image_reader": ImageReader(header.readers),
        "embedding_reader": EmbeddingReader(n, header.readers),
    }


def encode_known_images(components: PrincipalComponents, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensor that keeps a sample of images in a weights file, one byte per component.

    Parameters
    ----------
    components
        Of the generator.
    vectors : float array of shape (n_images, n_features)
        Evenly spaced rows are taken, at most `N_KNOWN`.
    """
    rows = vectors[:: -(-len(vectors) // N_KNOWN)].astype(np.float32)  # rounded up: at most so many
    found = components.apply(rows)[:, :N_KNOWN_COMPONENTS]
    return {_IMAGES: np.clip(np.rint(found * CODE), -127, 127).astype(np.int8)}


def read_known_components(path: Path) -> np.ndarray:
    """Return the components of the images that a weights file holds.

    Their shape is (n_images, at most `N_KNOWN_COMPONENTS`).

    Raises
    ------
    ConfigError, DataError
        As `read_known_codes`.
    """
    return read_known_codes(path)[_IMAGES].astype(np.float32) / CODE


def read_known_codes(path: Path) -> dict[str, np.ndarray]:
    """Return the tensor of `encode_known_images` as a weights file has it.

    Raises
    ------
    ConfigError
        If the weights were made before they brought any.
    DataError
        If they are not a table of such components.
    """
    with open_tensors(path) as file:
        if _IMAGES not in file.keys():  # noqa: SIM118 (no mapping)
            raise ConfigError(
                f"{path} holds none of the images that it was trained on; train the weights again, or set "
                "prior.images to training or to a folder of embeddings."
            )
        codes = file.get_tensor(_IMAGES)
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[1] > N_KNOWN_COMPONENTS:
        raise DataError(
            f"{path} holds images in another form than this version reads; train the weights again."
        )
    return {_IMAGES: codes}


def write_weights(
    path: Path,
    header: WeightsHeader,
    networks: dict[str, nn.Module],
    components: PrincipalComponents,
    known: dict[str, np.ndarray],
) -> None:
    """Write a weights file under its name only when it is complete.

    Matrices and kernels of the networks are stored as one byte per weight with one scale per output (or, for a
    transposed convolution, input) channel, everything else in half precision.

    Parameters
    ----------
    networks
        By the first part of their tensors' names: ``autoencoder`` and ``denoiser``, ``image_reader`` and
        ``embedding_reader``.
    components
        Of the embeddings.
    known
        As `encode_known_images` returns them.

    Raises
    ------
    DataError
        If a value is not finite.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for network, module in networks.items():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor = torch.zeros(())  # may exceed the range of half precision
            tensors |= _pack(f"{network}.{name}", tensor.detach().cpu().float())
    # The file keeps axes in columns, shape (n_features, n_components), and calls deviations scales.
    embedding = {"mean": components.mean, "basis": components.basis.T, "scale": components.std}
    for name, part in embedding.items():
        tensors[f"embedding.{name}"] = torch.from_numpy(part).half().contiguous()
    tensors |= {name: torch.from_numpy(codes) for name, codes in known.items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise DataError(
            f"{broken[0]} is not finite, or too large for half precision; {path.name} is not written."
        )
    whole = replace(header, digest=_digest(tensors))
    write_tensors(path, tensors, metadata={_HEADER: json.dumps(asdict(whole), sort_keys=True)})


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return what changes with every byte of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):  # safetensors keeps an order of its own
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _pack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is stored of a network's tensor."""
    import torch

    if tensor.dim() < 2:
        return {name: tensor.half().contiguous()}
    rows = tensor.flatten(1)  # (n_outputs, the rest); of a transposed convolution, (n_inputs, the rest)
    scale = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    codes = (rows / scale).round().to(torch.int8).view(tensor.shape)
    return {name: codes.contiguous(), name + _SCALE: scale.flatten()}


def _unpack(tensors: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    """Return a network's tensors as floats, without the first part of their names.

    Raises
    ------
    ValueError
        If a tensor in whole numbers has no scale for each of its rows, or if a value is not finite.
    """
    import torch

    own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{network}.")}
    for name in [name for name, tensor in own.items() if tensor.dtype == torch.int8]:
        codes, scale = own[name], own.pop(name + _SCALE, None)
        if scale is None or scale.shape != codes.shape[:1]:
            raise ValueError(f"{name} has not one scale per row")
        own[name] = codes.float() * scale.float().view(-1, *[1] * (codes.dim() - 1))
    for name, tensor in own.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return {name.removeprefix(f"{network}."): tensor.float() for name, tensor in own.items()}


def read_header(path: Path) -> WeightsHeader:
    """Read what a weights file says about itself, without its tensors.

    Raises
    ------
    ConfigError
        If there is no such file.
    DataError
        If it was not made by `train_generator`.
    """
    if not path.is_file():
        raise ConfigError(
            f"generator.weights names {path}, which is not a file; train weights with "
            "`braindecode-vis train-generator`, or leave the setting out for the packaged ones."
        )
    try:
        with path.open("rb") as file:
            # The header of safetensors: its length in eight bytes, then JSON; bounded, whatever the file claims.
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(min(length, 1 << 22)))
        return WeightsHeader(**json.loads(content["__metadata__"][_HEADER]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is incomplete or is not a weights file of the generator 'latent_diffusion'; use a "
            "file that `braindecode-vis train-generator` made."
        ) from error


@lru_cache(maxsize=2)  # a run asks for the same weights in every fold
def load_model(path: Path, device: str) -> Model:
    """Read a weights file into networks on a device.

    Raises
    ------
    DataError
        If tensors are missing, not finite, or of another shape than the header says.
    """
    from safetensors import SafetensorError

    from braindecode_vis.generation.latent_diffusion_networks import DOWNSAMPLING

    header = read_header(path)
    try:
        autoencoder, denoiser = build_networks(header)
        tensors = load_tensors(path, "torch")
        if header.digest and header.digest != _digest(tensors):
            raise DataError(f"{path} is damaged: its content has changed; train or copy it again.")
        mean, basis, std = (tensors[f"embedding.{name}"].float() for name in ("mean", "basis", "scale"))
        n, k = header.n_features, header.denoiser["n_components"]
        if (mean.shape, basis.shape, std.shape) != ((n,), (n, k), (k,)):
            raise ValueError("the components of the embeddings have another shape than in the header")
        if not all(part.isfinite().all() for part in (mean, basis, std)):
            raise ValueError("the components of the embeddings are not finite")
        components = PrincipalComponents(mean.numpy(), basis.numpy().T, std.numpy())
        readers = build_readers(header)
        for name, network in {"autoencoder": autoencoder, "denoiser": denoiser, **readers}.items():
            network.load_state_dict(_unpack(tensors, name))
            network.eval().requires_grad_(False).to(device)
    except SafetensorError as error:
        raise DataError(f"{path} is cut short or damaged ({error}); train or copy it again.") from error
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} does not have the content that this version of the generator needs ({error}); train "
            "the weights again."
        ) from error
    side = header.image_size // DOWNSAMPLING
    shape = (header.autoencoder["n_latent_channels"], side, side)
    return Model(autoencoder, denoiser, components, shape, device, **readers)


def hash_weights(path: Path) -> str:
    """Return the sha256 of a weights file, which is remembered as long as it does not change."""
    read_header(path)
    return hash_once(path)
