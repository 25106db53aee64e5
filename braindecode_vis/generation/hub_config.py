"""Settings of the generators with published weights: SDXL-Turbo, Stable Diffusion, Versatile Diffusion.

Owns where their weights come from (a folder, or the hub by consent), what of them enters the fingerprint, and which
spaces each is conditioned on. Nothing is downloaded unless that was allowed. The pipelines are in `hub`, `token_unclip`
and `versatile_diffusion`.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721; Ye et al. (2023), IP-Adapter, arXiv:2308.06721; Sauer et al. (2023),
SDXL-Turbo, arXiv:2311.17042; Rombach et al. (2022), arXiv:2112.10752; Scotti et al. (2024), MindEye2,
arXiv:2403.11207; Benchetrit et al. (2023), arXiv:2310.19812; Ozcelik and VanRullen (2023), Brain-Diffuser,
arXiv:2303.05334.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.contracts import GeneratorSettings
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.base.store import hash_json
from braindecode_vis.embeddings.published import (
    find_model,
    get_file,
    get_snapshot,
    name_repository,
    read_model,
)
from braindecode_vis.embeddings.weights import PublishedFiles
from braindecode_vis.generation.adapters import Adapter, AdapterConfig
from braindecode_vis.generation.generator_data import GeneratorData

if TYPE_CHECKING:
    from braindecode_vis.generation.hub import HubGenerator, HubOptions

ADAPTER_REPOSITORY = "h94/IP-Adapter"
ADAPTER_FILE = "sdxl_models/ip-adapter_sdxl_vit-h.safetensors"
SD_ADAPTER_FILE = "models/ip-adapter-plus_sd15.safetensors"


class HubConfig(GeneratorSettings, DeviceSettings):
    """Settings of every generator with published weights.

    Parameters
    ----------
    weights
        Folder of the pipeline in the format of diffusers, as `save_pretrained` writes it. None needs `allow_download`.
    allow_download
        Allow the download of the published folder from the hub. Only the call can allow it, not a file.
    condition_spaces
        Patterns (``*`` matches anything) of the spaces whose embeddings the network takes directly. Embeddings of
        another space need an adapter; embeddings of the right space but another size are refused.
    adapter
        Maps another target space to the condition, fitted on training images; see `adapters`.
    steps, guidance
        Denoising steps, and scale of classifier-free guidance (1 and below: none).
    image_size
        Side of the images, pixels; None takes the network's own.
    precision
        ``auto`` is half precision on a GPU and single precision on a CPU.
    batch_size
        Images at a time, which does not change the result. ``auto`` makes as many images together as fit into the
        memory.
    offload
        Keep networks in CPU memory while they are not used: ``model`` moves whole networks to the GPU, ``sequential``
        single layers, which needs the least memory and the most time.
    """

    packages: ClassVar[tuple[str, ...]] = (
        "diffusers",
        "transformers",
    )

    weights: Path | None = None
    allow_download: bool = False
    condition_spaces: tuple[str, ...] = ()
    adapter: AdapterConfig | None = None
    steps: int = Field(default=20, ge=1)
    guidance: float = Field(default=1.0, ge=0)
    image_size: int | None = Field(default=None, ge=8, multiple_of=8)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    offload: Literal["none", "model", "sequential"] = "none"

    removed_settings: ClassVar[Mapping[str, Any]] = {
        "vae_slicing": False,
        "attention_slicing": False,
        "vae_tiling": False,
    }

    repository: ClassVar[str] = ""
    #: Name among the published weights of what is converted into such a folder, if no repository holds one.
    model: ClassVar[str | None] = None
    text_spaces: ClassVar[tuple[str, ...]] = ()
    #: Parts that the published index lists and that are not fetched, since nothing reads them.
    unused_parts: ClassVar[frozenset[str]] = frozenset()
    not_hashed: ClassVar[frozenset[str]] = frozenset({
        "weights", "allow_download", "batch_size", "device", "offload", "vae_slicing", "attention_slicing",
    })  # fmt: skip
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"vae_tiling"})

    def accepts(self, target_kind: str) -> bool:
        """Say whether a target of this kind may do; its space is checked when the generator is built."""
        return self.adapter is not None or target_kind in ("openclip", "transformers", "views", "imported")

    def check_files(self) -> None:
        """Raise `ConfigError` unless there are weights or they may be downloaded, and what runs them."""
        if self.offload != "none":
            from braindecode_vis.generation.hub import check_offload

            check_offload(self.offload, self.options.torch_device)
        if not (self.allow_download or may_download()):
            self.find_folder()

    def find_folder(self) -> Path:
        """Return the folder of the pipeline."""
        return find_folder(self.weights, self.allow_download, self._published)

    def list_weights(self) -> list[NeededWeights]:
        """Return the folder of the pipeline."""
        return [self._published.describe("weights", self.weights)]

    @property
    def _published(self) -> PublishedFiles:
        kind = type(self).model_fields["kind"].default
        return describe_folder(
            self.repository, f"generator {kind}", unused=self.unused_parts, model=self.model
        )

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the weights."""
        return {**super().hashed_fields(), "weights_digest": digest_folder(self.find_folder())}

    @property
    def options(self) -> HubOptions:
        """What every pipeline is given."""
        from braindecode_vis.generation.hub import HubOptions

        return HubOptions(
            self.steps, self.guidance, self.image_size, self.device, self.precision, self.offload
        )

    def load(self) -> Any:
        """Return the pipeline on its device."""
        raise NotImplementedError

    def build(self, data: GeneratorData) -> HubGenerator:
        """Return the generator, its adapter fitted on the training data."""
        return self._build(data, None if self.adapter is None else self.adapter.fit(data))

    def read(self, folder: Path, data: GeneratorData) -> HubGenerator:
        """Return the generator with the adapter that was written into `folder`."""
        return self._build(data, None if self.adapter is None else self.adapter.read(folder))

    def _build(self, data: GeneratorData, adapter: Adapter | None) -> HubGenerator:
        from braindecode_vis.generation.hub import HubGenerator

        return HubGenerator(data, self, adapter)


class AdaptedConfig(HubConfig):
    """Settings of the pipelines with an IP-Adapter.

    Parameters
    ----------
    ip_adapter
        The adapter's safetensors file, or the folder of h94/IP-Adapter. None needs `allow_download`.
    scale
        Weight of the adapter's cross-attention.
    prompt
        Text that guides the image in addition to the embedding.
    """

    ip_adapter: Path | None = None
    scale: float = Field(default=1.0, ge=0)
    prompt: str = ""

    supports_initial: ClassVar[bool] = True
    supports_prompts: ClassVar[bool] = True
    adapter_file: ClassVar[str] = ""
    not_hashed: ClassVar[frozenset[str]] = HubConfig.not_hashed | {"ip_adapter"}

    def check_files(self) -> None:
        """Raise `ConfigError` unless pipeline and adapter are there or may be downloaded."""
        super().check_files()
        if not (self.allow_download or may_download()):
            self.find_adapter()

    def find_adapter(self) -> Path:
        """Return the adapter's file."""
        found = find_folder(self.ip_adapter, self.allow_download, self._published_adapter)
        # A pickle (.bin) of the same name lies beside it in the published folder, and is never read.
        file = found / self.adapter_file if found.is_dir() else found
        if not file.is_file() or file.suffix != ".safetensors":
            raise ConfigError(f"generator.ip_adapter should be a safetensors file, but {file} is not one.")
        return file

    def list_weights(self) -> list[NeededWeights]:
        """Return the folder of the pipeline and the file of the adapter."""
        return [*super().list_weights(), self._published_adapter.describe("ip_adapter", self.ip_adapter)]

    @property
    def _published_adapter(self) -> PublishedFiles:
        kind = type(self).model_fields["kind"].default
        bring = f"{self.adapter_file} of huggingface.co/{ADAPTER_REPOSITORY}"
        return PublishedFiles(
            f"the IP-Adapter {self.adapter_file}", name_repository(ADAPTER_REPOSITORY),
            lambda cached: get_file(ADAPTER_REPOSITORY, self.adapter_file, cached=cached),
            refusal=f"the generator {kind} has no IP-Adapter: set generator.ip_adapter to {bring}",
            name="the IP-Adapter", otherwise=f"; get {bring} and give its path with generator.ip_adapter",
        )  # fmt: skip

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of both sets of weights."""
        return {**super().hashed_fields(), "ip_adapter_digest": digest_folder(self.find_adapter())}


class SdxlTurboConfig(AdaptedConfig):
    """SDXL-Turbo with the ViT-H IP-Adapter (ATM: 4 steps, guidance 0, adapter scale 1, 512 pixels, empty prompt).

    The condition is the projected image embedding of OpenCLIP ViT-H/14 (laion2b), 1024 values, not normalised.

    Parameters
    ----------
    weights
        Folder of stabilityai/sdxl-turbo, or of any SDXL.
    """

    kind: Literal["sdxl_turbo"] = "sdxl_turbo"
    condition_spaces: tuple[str, ...] = (
        "openclip/ViT-H-14/*/output/own/raw/*",
        "transformers/clip/*/output/own/raw/*",
    )
    steps: int = Field(default=4, ge=1)
    guidance: float = Field(default=0.0, ge=0)
    image_size: int | None = Field(default=512, ge=8, multiple_of=8)

    repository: ClassVar[str] = "stabilityai/sdxl-turbo"
    adapter_file: ClassVar[str] = ADAPTER_FILE

    def load(self) -> Any:
        """Return the pipeline with its adapter."""
        from braindecode_vis.generation.hub import AdaptedDiffusion

        file = self.find_adapter()  # before the large weights are read
        return AdaptedDiffusion(
            self.find_folder(), file, self.options, family="sdxl", scale=self.scale, prompt=self.prompt
        )


class SdAdapterConfig(AdaptedConfig):
    """Stable Diffusion 1.5 with an IP-Adapter, conditioned on tokens of an image and, with a text branch, of a text.

    The maintained way to the generator of Benchetrit et al. (50 steps of DDIM, guidance 7.5, strength 0.75). The
    condition of ip-adapter-plus_sd15 are the 257 tokens of OpenCLIP ViT-H/14 before its last block, 1280 values each;
    of ip-adapter_sd15 its projected embedding, 1024 values. The text are the 77 tokens of OpenAI's ViT-L/14.

    Parameters
    ----------
    weights
        Folder of stable-diffusion-v1-5/stable-diffusion-v1-5, or of another Stable Diffusion 1. A safety checker in it
        is not loaded, since it would replace images by black ones.
    text_scale
        Weight of the cross-attention to the text. The adapter was trained with `scale` and this at 1: 1.2 and 0.8 mix
        image and text as 0.6 and 0.4 at the same sum. Not tried with published weights.
    """

    kind: Literal["sd_ip_adapter"] = "sd_ip_adapter"
    text_scale: float = Field(default=1.0, ge=0)
    condition_spaces: tuple[str, ...] = (
        "openclip/ViT-H-14/*/layer=-2/tokens/raw/*",
        "openclip/ViT-H-14/*/layer=30/tokens/raw/*",
        "openclip/ViT-H-14/*/output/own/raw/*",
    )
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=7.5, ge=0)
    image_size: int | None = Field(default=512, ge=8, multiple_of=8)

    #: Length of the sequence of an image's tokens, of the published adapter.
    n_tokens: ClassVar[int] = 257
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_tokens"})

    repository: ClassVar[str] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    adapter_file: ClassVar[str] = SD_ADAPTER_FILE
    unused_parts: ClassVar[frozenset[str]] = frozenset({"safety_checker", "feature_extractor"})
    supports_texts: ClassVar[bool] = True
    text_spaces: ClassVar[tuple[str, ...]] = ("clip_text/*/hidden/*",)

    def load(self) -> Any:
        """Return the pipeline with its adapter."""
        from braindecode_vis.generation.hub import AdaptedDiffusion

        file = self.find_adapter()  # before the large weights are read
        return AdaptedDiffusion(
            self.find_folder(), file, self.options, family="sd", scale=self.scale, text_scale=self.text_scale,
            prompt=self.prompt, n_tokens=self.n_tokens,
        )  # fmt: skip


class VersatileDiffusionConfig(HubConfig):
    """Versatile Diffusion, conditioned on tokens of an image and of a text of OpenAI's ViT-L/14, 257 and 77 of 768
    values.

    The generator of Brain-Diffuser and of Benchetrit et al.: 50 steps of DDIM, guidance 7.5, 0.4 of the text, started
    from an image at strength 0.75. All tokens are projected, and divided by the length of the class token of the image
    or of the end of the text: target {pooling: tokens, project: true, normalise: class}, reconstruction.text.target
    {kind: clip_text, output: projected}. `versatile_diffusion` says what the folder must hold. No revision of the
    repository is known here, so none is pinned: note which one was copied.

    Parameters
    ----------
    text_share
        Share of the attention to the text, the rest is for the image; 0 uses no text.
    """

    kind: Literal["versatile_diffusion"] = "versatile_diffusion"
    text_share: float = Field(default=0.4, ge=0, le=1)
    condition_spaces: tuple[str, ...] = (
        "openclip/ViT-L-14-quickgelu/*/output/tokens-projected/class-unit/*",
        "transformers/clip/*/output/tokens-projected/class-unit/*",
    )
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=7.5, ge=0)
    image_size: int | None = Field(default=512, ge=8, multiple_of=8)

    #: Lengths of the sequences of the published weights.
    n_tokens: ClassVar[int] = 257
    n_text_tokens: ClassVar[int] = 77
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_tokens", "n_text_tokens"})

    repository: ClassVar[str] = "shi-labs/versatile-diffusion"
    unused_parts: ClassVar[frozenset[str]] = frozenset({
        "image_encoder", "image_feature_extractor", "text_encoder", "tokenizer",
    })  # fmt: skip
    supports_initial: ClassVar[bool] = True
    text_spaces: ClassVar[tuple[str, ...]] = ("clip_text/*/projected/*",)

    @property
    def supports_texts(self) -> bool:  # type: ignore[override]
        """Whether the text has a share."""
        return self.text_share > 0

    @property
    def needs_texts(self) -> bool:  # type: ignore[override]
        """Whether the text has a share."""
        return self.text_share > 0

    def load(self) -> Any:
        """Return networks and scheduler."""
        from braindecode_vis.generation.versatile_diffusion import VersatileDiffusion

        return VersatileDiffusion(
            self.find_folder(), self.options, n_tokens=self.n_tokens, n_text_tokens=self.n_text_tokens,
            text_share=self.text_share,
        )  # fmt: skip


def find_folder(given: Path | None, allow_download: bool, published: PublishedFiles) -> Path:
    """Return the folder of a model: the one given, or the published one if it may be fetched.

    Parameters
    ----------
    given
        A folder, or None.
    allow_download
        Whether the published one may be fetched into the hub's own cache.
    published
        See `describe_folder`.

    Raises
    ------
    ConfigError
        Naming the folder to bring.
    """
    if given is None:
        return published.find(allow_download)
    folder = Path(given).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"{published.name} should read {folder}, which does not exist; give {published.what}."
        )
    return folder


def describe_folder(
    repository: str, what: str, *, unused: frozenset[str] = frozenset(), model: str | None = None
) -> PublishedFiles:
    """Return the published folder of a model, as it is found, fetched and listed.

    Parameters
    ----------
    repository
        ``owner/name`` on the hub; empty if there is none in this format.
    what
        Name of the model in the message.
    unused
        Parts that a fetched folder may lack.
    model
        Name among the published weights of what is converted into such a folder.
    """
    place = (
        f"huggingface.co/{repository}" if repository else "its authors, converted to the format of diffusers"
    )
    patterns = ["*.json", "*.txt", "*.safetensors"]  # never a pickle
    refusal = f"the {what} has no weights: set generator.weights to a folder that holds {place}"
    known = find_model(repository) if model is None else read_model(model)
    if known is not None and (size := known.count_bytes()):
        refusal += f" ({describe_bytes(size)}; braindecode-vis weights fetch {known.name})"
    return PublishedFiles(
        f"a folder in the format of diffusers for the {what}", name_repository(repository) if repository else "",
        lambda cached: get_snapshot(repository, patterns, cached=cached),
        check=lambda found: check_pipeline(found, unused), refusal=refusal, name=f"the {what}",
        otherwise=f"; get a folder that holds {place} in another way and give its path with generator.weights",
        model=model,
    )  # fmt: skip


def check_pipeline(folder: Path, unused: frozenset[str] = frozenset()) -> None:
    """Raise `DataError` unless every part of a pipeline but those `unused` is there with all files of its weights."""
    from braindecode_vis.generation.hub import read_parts

    parts = read_parts(folder)
    if not parts:
        raise DataError(f"{folder} holds no model_index.json that lists parts; copy the whole folder.")
    for name in (each for each in parts if each not in unused):
        part = folder / name
        needed = [part]
        if (part / "config.json").is_file():
            # Large networks lie in several files; an index of pickles beside them is of no use here.
            for index in part.glob("*.safetensors.index.json"):
                needed += [part / file for file in set(json.loads(index.read_text())["weight_map"].values())]
            needed += [next(part.glob("*.safetensors"), part / "*.safetensors")]
        if missing := [path for path in needed if not path.exists()]:
            raise DataError(f"{folder} is missing {missing[0].relative_to(folder)}; copy the whole folder.")


def digest_folder(folder: Path) -> str:
    """Return the digest of a folder's settings and weights."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    # What decides an image: networks, their settings and tokenisers; not pictures and notes that lie beside them.
    kept = [f for f in files if f.is_file() and f.suffix in (".json", ".safetensors", ".txt")]
    return hash_json(digest_files({str(f.relative_to(folder)) if f != folder else f.name: f for f in kept}))
