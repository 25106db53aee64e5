"""Finds the weights of a pretrained network: a local file or folder, the hub if allowed, or a seed for random ones.

Owns reading state dicts without running what they name, their digest, and one sentence that says which file to bring.
Random weights exist for tests only and must be asked for. Knows no architecture.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.contracts import ImageEncoderSettings
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.base.store import load_tensors, open_tensors
from braindecode_vis.embeddings.published import (
    PublishedModel,
    find_placed,
    get_snapshot,
    name_repository,
    read_models,
)

RANDOM: Literal["random"] = "random"
#: A setting that names weights. The literal first: JSON knows no paths, and the first member that fits a text is taken.
WeightsSource = Literal["random"] | Path
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def find_weights(
    weights: Path | str | None,
    allow_download: bool,
    describe: Callable[[], str],
    source: Callable[[], str],
    download: Callable[[bool], Path],
) -> Path | None:
    """Return the path of the weights that a configuration names, None for ``random``; see `VisionNetworkConfig`.

    What was fetched before needs no consent: the library's own cache is looked at first.

    Parameters
    ----------
    weights, allow_download
        Settings of the configuration.
    describe
        Says which file is needed.
    source
        Says from where it would be fetched; empty if nobody publishes it.
    download
        Returns the path of the published weights; with True out of the cache, and an error if they are not there.
    """
    if weights == RANDOM:
        return None
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.exists():
            raise ConfigError(
                f"target.weights names {path}, which does not exist; give the path of {describe()}."
            )
        return path
    return _describe_published(describe, source, download).find(allow_download)


def _describe_published(
    describe: Callable[[], str], source: Callable[[], str], download: Callable[[bool], Path]
) -> PublishedFiles:
    what = describe()
    return PublishedFiles(
        what, source(), download, check=check_intact,
        refusal=f"no weights were given: set target.weights to the path of {what}", name="the weights",
        otherwise=f"; get {what} in another way and name its path with target.weights",
    )  # fmt: skip


@dataclass(frozen=True)
class PublishedFiles:
    """Published files of a network: found on this machine, fetched if that is allowed, and listed.

    Parameters
    ----------
    what
        Which files they are, in words.
    place
        From where they would be fetched, in words; empty if nobody publishes them.
    download
        Returns the path; with True out of the cache, and an error if it is not there.
    refusal
        What to say if they are not there; the sentence goes on with how to allow it.
    name, otherwise
        Begin and end of what to say if they cannot be fetched.
    check
        Raises an error if not all of it is in the cache: a folder may be there whose files were not all fetched.
    model
        Name of the entry in the list of published weights; None looks for the one that lies at `place`.
    """

    what: str
    place: str
    download: Callable[[bool], Path | str]
    refusal: str
    name: str
    otherwise: str
    check: Callable[[Path], None] = lambda found: None
    model: str | None = None

    def look(self) -> Path | None:
        """Return the path in the cache of their library; None if they are not there or not whole."""
        if not self.place:
            return None
        with suppress(Exception):  # each library has its own way to say that it holds nothing
            found = Path(self.download(True))
            self.check(found)
            return found
        return None

    def find(self, allow_download: bool) -> Path:
        """Return the path, fetched if it is not there and the call or `allow_download` allows it.

        Raises
        ------
        ConfigError
            If nothing is there and nothing may be fetched, or the network is gone.
        """
        if (found := self.look()) is not None:
            return found
        if not self.place:
            raise ConfigError(f"{self.refusal}.")
        if not (allow_download or may_download()):
            raise ConfigError(f"{self.refusal}{describe_consent(self.place)}.")
        try:
            return Path(self.download(False))
        except BraindecodeVisError:
            raise
        except Exception as error:  # or that the network is gone
            raise ConfigError(
                f"{self.name} could not be fetched ({type(error).__name__}){self.otherwise}."
            ) from error

    def describe(self, setting: str, given: Path | None = None) -> NeededWeights:
        """Return what a list shows of them.

        Parameters
        ----------
        setting
            The setting that names a copy of the user's.
        given
            That copy, if the setting names one.
        """
        model = read_models()[self.model] if self.model else find_placed(self.place)
        return describe_needed(
            model, setting, self.look() if given is None else given, what=self.what, place=self.place,
            named=given is not None,
        )  # fmt: skip


def describe_needed(
    model: PublishedModel | None, setting: str, path: Path | None, *, what: str = "", **facts: Any
) -> NeededWeights:
    """Return what a list shows of weights that are at a path, or that nobody has here.

    Parameters
    ----------
    model
        What is known of them as published weights.
    setting
        The setting that names them.
    path
        Where they are or should be; None if they are not here.
    what
        In words, where `model` is not known.
    facts
        Further fields of `NeededWeights`.
    """
    path = path.expanduser() if path is not None and path.expanduser().exists() else None
    if model is None:
        size = path.stat().st_size if path is not None and path.is_file() else None
        named = (path.name,) if path is not None and path.is_file() else ()
        return NeededWeights(what, (setting,), path, **{"files": named, "size": size, **facts})
    return NeededWeights(
        model.what, (setting,), path,
        **{"name": model.name, "files": tuple(model.list_tensor_files()), "size": model.count_bytes(),
           "licence": model.licence, "place": model.describe_place(), "automatic": not model.url,
           "convert": model.list_patterns()[0].endswith(".ckpt"), **facts},
    )  # fmt: skip


def describe_consent(place: str) -> str:
    """Return the end of a sentence that says how what lies at a place may be fetched."""
    return (
        f", or let {place} be fetched for this call with --allow-download (a configuration file or a run folder cannot "
        "allow it)"
    )


def describe_snapshot(
    repository: str, patterns: list[str], *, refusal: str, what: str = ""
) -> PublishedFiles:
    """Return some files of a repository of the hub, as they are found, fetched and listed.

    Parameters
    ----------
    repository
        ``owner/name``.
    patterns
        Names of the files.
    refusal
        What to say if they are not there; the sentence goes on with how to allow it.
    what
        In words, what they are.
    """
    return PublishedFiles(
        what or repository, name_repository(repository),
        lambda cached: get_snapshot(repository, patterns, cached=cached),
        refusal=refusal, name=repository, otherwise=f": {refusal}",
    )  # fmt: skip


#: Arguments by which libraries would read other weights, other code or the network; none of them is a size.
_NO_SIZES = frozenset({
    "allow_all_kernels", "attn_implementation", "_attn_implementation", "auto_map", "cache_dir", "checkpoint_path",
    "experts_implementation", "hf_model_pretrained", "jit", "kernel_config", "load_weights", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_image", "pretrained_image_path", "pretrained_text",
    "pretrained_text_path", "quantization_config", "require_pretrained", "timm_model_pretrained", "trust_remote_code",
    "use_kernels", "weights", "weights_backbone", "weights_only",
})  # fmt: skip


def check_sizes(value: Any, key: str = "model_args") -> None:
    """Raise `ValueError` if arguments of an architecture ask for other weights, for code or for the network."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if name in _NO_SIZES:
                raise ValueError(f"{key}.{name} is not a size of an architecture; leave it out")
            check_sizes(entry, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            check_sizes(entry, f"{key}.{number}")
    elif isinstance(value, str) and value.partition(":")[0] in ("hf-hub", "hf_hub", "local-dir", "local_dir"):
        raise ValueError(f"{key} is {value!r}, which is a path of weights; leave it out")


def _keep_sizes(value: dict[str, Any]) -> dict[str, Any]:
    check_sizes(value)
    return value


#: Arguments of an architecture, as settings take them.
ModelArgs = Annotated[dict[str, Any], AfterValidator(_keep_sizes)]


class WeightedSettings(ImageEncoderSettings, DeviceSettings):
    """What all image encoders with published weights have in common.

    Parameters
    ----------
    weights
        File with a state dict (safetensors, or a torch file of plain tensors), or a folder that holds one. The word
        ``random`` takes untrained weights, for tests. None needs `allow_download`.
    allow_download
        Allow the download of the published weights from the hub. Only the call can allow it, not a file.
    model_args
        Changes to the architecture, which each kind describes.
    workers
        Number of threads that prepare images.
    """

    weights: WeightsSource | None = None
    allow_download: bool = False
    model_args: ModelArgs = Field(default_factory=dict)
    workers: int = Field(default=2, ge=0)

    not_hashed: ClassVar[frozenset[str]] = frozenset(
        {"weights", "allow_download", "random_seed", "batch_size", "workers", "device"}
    )
    removed_settings: ClassVar[Mapping[str, Any]] = {"random_seed": 0}

    def describe_weights(self) -> str:
        """Say in one clause which file holds the published weights."""
        raise NotImplementedError

    def name_source(self) -> str:
        """Say from where the published weights are fetched; empty if nobody publishes them."""
        raise NotImplementedError

    def download(self, cached: bool = False) -> Path:
        """Return the path of the published weights, fetched with the library's own client unless they are `cached`."""
        raise NotImplementedError

    def find_weights(self) -> Path | None:
        """Return the path of the weights, or None for random ones.

        Raises
        ------
        ConfigError
            If none were given and nothing may be downloaded, or the path does not exist.
        """
        return find_weights(
            self.weights, self.allow_download, self.describe_weights, self.name_source, self.download
        )

    def list_weights(self) -> list[NeededWeights]:
        """Return the weights of the network; none for random ones."""
        if self.weights == RANDOM:
            return []
        published = _describe_published(self.describe_weights, self.name_source, self.download)
        return [published.describe("weights", None if self.weights is None else Path(self.weights))]


def check_no_kernels(value: Any, path: Path) -> None:
    """Raise `DataError` if the ``config.json`` of a folder asks transformers for compiled code of the hub."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if str(name).endswith(("attn_implementation", "experts_implementation")) and "/" in str(entry):
                raise DataError(f"{path} asks for code of the hub ({name}: {entry}); take {name} out of it.")
            check_no_kernels(entry, path)


@contextmanager
def weights_only() -> Iterator[None]:
    """Let packages that open torch files on their own read tensors alone while the context lasts."""
    before = {name: os.environ.get(name) for name in _TORCH}
    os.environ.update(_TORCH)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


_TORCH = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


def find_files(path: Path) -> list[Path]:
    """Return the weight files of a path: itself, or those of a folder, ``.safetensors`` before any other.

    Raises
    ------
    DataError
        If a folder holds none, or several that do not belong together.
    """
    if path.is_file():
        return [path]
    for index in sorted(path.glob("*.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{index} is damaged ({type(error).__name__}); copy the whole folder again."
            ) from error
        missing = [name for name in names if not (path / name).is_file()]
        if not missing:  # a large network in several files
            return [path / name for name in names]
        if len(missing) < len(names):
            raise DataError(
                f"{path} is missing {missing[0]}, which its {index.name} lists; copy the whole folder."
            )
    for suffix in _SUFFIXES:
        found = sorted(p for p in path.glob(f"*{suffix}") if not p.name.startswith("."))
        if len(found) == 1:
            return found
        if found:
            listed = ", ".join(p.name for p in found[:4])
            raise DataError(
                f"{path} holds several weight files ({listed}); name one of them with target.weights."
            )
    raise DataError(f"{path} holds no weight file ({', '.join(_SUFFIXES)}); name a file or another folder.")


def hash_weights(path: Path) -> str:
    """Return the sha256 of a weight file, or of the hashes of a folder's files."""
    digests = [hash_once(file) for file in find_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """Return the state dict of a file or folder, on the CPU; nothing in it can run.

    Wrappers that checkpoints put around it (``state_dict``, ``model``) and the prefix ``module.`` are taken off.

    Raises
    ------
    DataError
        If a file is damaged, is a compiled program, or holds anything but tensors.
    """
    state: dict[str, Any] = {}
    for file in find_files(path):
        content = read_tensors(file)
        if not isinstance(content, Mapping):
            raise DataError(f"{file} holds a {type(content).__name__}, not a state dict.")
        if not all(isinstance(name, str) for name in content):
            raise DataError(f"{file} holds tensors without names, not a state dict; use the right file.")
        state.update(content)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = dict(state[key])
    # The prefix is that of torch's DataParallel.
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def check_intact(path: Path) -> None:
    """Raise `DataError` if the files of a path are missing or cut short, without reading their tensors."""
    from safetensors import SafetensorError

    for file in find_files(path):
        if not file.is_file() or file.stat().st_size == 0:
            raise DataError(f"{file} is empty; fetch it again.")
        if file.suffix == ".safetensors":
            try:
                with open_tensors(file):
                    pass
            except SafetensorError as error:
                raise DataError(f"{file} is no intact safetensors file ({error}); fetch it again.") from error


def read_tensors(path: Path) -> Any:
    """Return what a file of tensors holds, on the CPU; nothing in it can run.

    Raises
    ------
    DataError
        If the file is damaged, is a compiled program, or holds anything but tensors and plain values.
    """
    import torch
    from safetensors import SafetensorError

    if path.suffix == ".safetensors":
        try:
            return load_tensors(path, "torch")
        except SafetensorError as error:
            raise DataError(f"{path} is no intact safetensors file ({error}); fetch it again.") from error
    if _is_program(path):
        raise DataError(
            f"{path} is a TorchScript archive, that is, a program, and is not opened; "
            "use the same weights as .safetensors or as a plain state dict."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file fails anywhere in the unpickler
        raise DataError(
            f"{path} does not hold plain tensors ({type(error).__name__}); use a state dict or a .safetensors file."
        ) from error


def _is_program(path: Path) -> bool:
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(
            name.endswith("constants.pkl") for name in archive.namelist()
        )  # plain state dicts have none


def load_state(
    module: Any,
    state: Mapping[str, Any],
    *,
    path: Path,
    what: str,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Load a state dict into a module and refuse a partial fit.

    Parameters
    ----------
    module
        Receives the tensors; all of its own must be there.
    state
        Names and tensors.
    path, what
        Where they came from and what they should be, for the message.
    ignore
        Says which extra tensors of `state` are known and not needed.

    Raises
    ------
    DataError
        Naming the first tensor that is missing, left over or of another shape.
    """
    import torch

    own = module.state_dict()
    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own and not ignore(name)]
    if missing or left_over:
        problem = (
            f"is missing {missing[0]}" if missing else f"has {left_over[0]}, which is not in the network"
        )
        raise DataError(
            f"{path} does not hold the weights of {what}: it {problem} "
            f"({len(missing)} missing and {len(left_over)} left over of {len(own)}); use the right file."
        )
    wrong = [name for name in own if own[name].shape != getattr(state[name], "shape", None)]
    if wrong:
        raise DataError(
            f"{path} does not hold the weights of {what}: {wrong[0]} has the shape "
            f"{tuple(getattr(state[wrong[0]], 'shape', ()))}, "
            f"where the network has {tuple(own[wrong[0]].shape)}; use the right file."
        )
    with torch.no_grad():
        # Shapes and names were checked above, where the message can say what to bring.
        module.load_state_dict({name: state[name] for name in own})


@contextmanager
def loading_quietly() -> Iterator[None]:
    """Keep transformers from drawing a bar for each network that it loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()  # global to the process
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
