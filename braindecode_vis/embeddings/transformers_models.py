"""Vision towers in the folder format of transformers: CLIP, SigLIP, DINOv2, DINOv3, ViT, and InternViT up to 6B.

Owns reading such a folder (``config.json``, ``preprocessor_config.json``, weights) without the hub and without running
code that comes with it. InternViT is published with its own code; its tensors are renamed for the class that
transformers has. Only the vision part of a model of text and images is loaded.

timm has most of these networks, but loads no such folder, and has no InternViT of 6B.

References
----------
Chen et al. (2024), CVPR, arXiv:2312.14238 (InternViT).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import seeded
from braindecode_vis.embeddings.layer_readout import Tower
from braindecode_vis.embeddings.published import get_snapshot, name_repository
from braindecode_vis.embeddings.transforms import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Transform
from braindecode_vis.embeddings.vision_network import VisionNetworkConfig
from braindecode_vis.embeddings.weights import check_no_kernels, load_state, loading_quietly, read_state

Architecture = Literal[
    "clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "internvl", "intern_vit_6b"
]
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Family:
    """How transformers names the parts of one family; the first path that exists is taken."""

    config: str
    model: str
    blocks: tuple[str, ...]
    norm: tuple[str, ...] = ()
    output: str = "pooler_output"
    has_class: bool = True


_OLD = "vision_model."
FAMILIES = {
    "clip": Family(
        "CLIPVisionConfig", "CLIPVisionModelWithProjection", (_OLD + "encoder.layers",),
        (_OLD + "post_layernorm",), "image_embeds",
    ),
    "siglip": Family(
        "SiglipVisionConfig", "SiglipVisionModel", ("encoder.layers", _OLD + "encoder.layers"),
        ("post_layernorm", _OLD + "post_layernorm"), has_class=False,
    ),
    "dinov2": Family("Dinov2Config", "Dinov2Model", ("encoder.layer",), ("layernorm",)),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", ("encoder.layer",), ("layernorm",)
    ),
    "dinov3_vit": Family("DINOv3ViTConfig", "DINOv3ViTModel", ("model.layer", "layer"), ("norm",)),
    "vit": Family("ViTConfig", "ViTModel", ("encoder.layer", "layers"), ("layernorm",), "class"),
    "internvl": Family(
        "InternVLVisionConfig", "InternVLVisionModel", ("encoder.layer",), ("layernorm",), "class"
    ),
}  # fmt: skip
FAMILIES["intern_vit_6b"] = FAMILIES["internvl"]


class TransformersConfig(VisionNetworkConfig):
    """A vision tower in a folder of transformers.

    Parameters
    ----------
    weights
        The folder; its ``config.json`` defines the network.
    architecture
        Needed for random weights only; otherwise, if given, it must match the folder.
    repository
        ``owner/name`` on the hub, fetched if `allow_download` is set.
    model_args
        The architecture's sizes, for random weights.
    first_resize
        Bring the shorter side of an image to this number of pixels before the folder's own transform; 518 in
        NeuralBench, which the resize of DINOv2's own transform to 256 follows. None leaves it out.
    """

    packages: ClassVar[tuple[str, ...]] = ("transformers",)

    kind: Literal["transformers"] = "transformers"
    architecture: Architecture | None = None
    repository: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    first_resize: int | None = Field(default=None, ge=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"first_resize"})

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.weights == "random" and self.architecture is None:
            raise ValueError(f"random weights need an architecture: {', '.join(FAMILIES)}")
        if self.weights != "random" and self.model_args:
            raise ValueError("model_args is for random weights; a folder defines its own sizes")
        return self

    @property
    def family(self) -> str:
        """Library and architecture."""
        return f"transformers/{self._read_architecture()}"

    def describe_weights(self) -> str:
        """Say which folder is needed."""
        source = (
            f" of {name_repository(self.repository)}" if self.repository else " of the model's repository"
        )
        return f"a folder with config.json, preprocessor_config.json and model.safetensors{source}"

    def name_source(self) -> str:
        """Say which repository is fetched; empty if none is named."""
        return name_repository(self.repository) if self.repository else ""

    def download(self, cached: bool = False) -> Path:
        """Return the repository's folder in the hub's cache, fetched unless it is `cached`."""
        assert self.repository is not None
        # No code and no pickled weights are fetched.
        patterns = ["*config.json", "*.safetensors", "*.safetensors.index.json"]
        return get_snapshot(self.repository, patterns, cached=cached)

    def _read_architecture(self) -> str:
        folder = self.find_weights()
        if folder is None:
            assert self.architecture is not None
            return self.architecture
        found = find_architecture(_read_json(folder, "config.json"), folder)
        if self.architecture not in (None, found):
            raise ConfigError(f"target.architecture is {self.architecture}, but {folder} holds a {found}.")
        return found

    def make_transform(self) -> Transform:
        """Return the transform that the folder's ``preprocessor_config.json`` describes."""
        folder = self.find_weights()
        if folder is not None:
            own = read_transform(_read_json(folder, "preprocessor_config.json"), folder)
            return replace(own, first_side=self.first_resize)
        size = self.model_args.get("image_size", 224)
        is_clip = self.architecture == "clip"
        return Transform(
            size=size if isinstance(size, int) else size[0],
            mean=CLIP_MEAN if is_clip else IMAGENET_MEAN,
            std=CLIP_STD if is_clip else IMAGENET_STD,
            first_side=self.first_resize,
        )

    def make_tower(self) -> Tower:
        """Return the vision tower with its weights."""
        folder, architecture = self.find_weights(), self._read_architecture()
        if folder is None:
            with seeded(0):
                network = _build(architecture, dict(self.model_args))
        elif architecture == "intern_vit_6b":
            network = read_intern_vit(folder)
        else:
            network = read_network(folder, architecture)
        return describe_tower(network, architecture)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise ConfigError(
            f"{folder} holds no {name}; use the whole folder of the model, and name the folder, not a file in it."
        )
    return json.loads((folder / name).read_text())


def find_architecture(config: dict[str, Any], folder: Path) -> str:
    """Return the family that a ``config.json`` describes."""
    found = str(config.get("model_type", ""))
    for suffix in ("_vision_model", "_vision"):  # a folder may hold the vision part alone
        found = found.removesuffix(suffix)
    if found == "internvl_chat":  # InternVL as its authors publish it, language model included
        found = "intern_vit_6b"
    if found not in FAMILIES:
        raise ConfigError(
            f"{folder} holds a model of type {config.get('model_type')!r}; known are {', '.join(FAMILIES)}."
        )
    return found


def _build(architecture: str, sizes: dict[str, Any]) -> Any:
    import transformers

    family = FAMILIES[architecture]
    # Weights of classifiers hold no pooler, which would then be a random one.
    extra = {"add_pooling_layer": False} if architecture == "vit" else {}
    return getattr(transformers, family.model)(getattr(transformers, family.config)(**sizes), **extra)


def read_network(folder: Path, architecture: str) -> Any:
    """Return the vision tower of a folder; a tensor that the folder lacks is an error, never a random one."""
    import transformers

    family = FAMILIES[architecture]
    extra = {"add_pooling_layer": False} if architecture == "vit" else {}
    stored = _read_json(folder, "config.json")
    check_no_kernels(stored, folder / "config.json")
    level = transformers.logging.get_verbosity()  # global to the process
    transformers.logging.set_verbosity_error()  # text tensors that are left out are no news
    try:
        config = getattr(transformers, family.config).from_pretrained(folder, local_files_only=True)
        if "projection_dim" in stored:  # of both towers together; what the vision part says may differ
            config.projection_dim = stored["projection_dim"]
        with loading_quietly():
            network, report = getattr(transformers, family.model).from_pretrained(
                folder, config=config, local_files_only=True, output_loading_info=True,
                dtype="float32", **extra,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(
            f"{folder} cannot be read as a {architecture} ({first}); copy the whole folder."
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    lacking = sorted(map(str, report["missing_keys"])) + sorted(str(m) for m in report["mismatched_keys"])
    if lacking:
        raise DataError(
            f"{folder} does not hold the weights of a {architecture}: {len(lacking)} tensor(s) are missing or of "
            f"another shape, first {lacking[0]}; copy the whole folder."
        )
    return network


def read_intern_vit(folder: Path) -> Any:
    """Return InternViT from the folder that its authors publish, without running their code."""
    config = _read_json(folder, "config.json")
    config = config.get("vision_config", config)
    network = _build("internvl", rename_intern_config(config))
    state = rename_intern_weights(read_state(folder))
    load_state(
        network, state, path=folder, what="an InternViT", ignore=lambda name: name == "embeddings.mask_token"
    )
    return network


def rename_intern_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of an InternViT under the names of transformers."""
    same = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "hidden_act",
            "layer_norm_eps", "norm_type")  # fmt: skip
    return {
        **{name: config[name] for name in same if name in config},
        "image_size": [config["image_size"]] * 2,
        "patch_size": [config["patch_size"]] * 2,
        "attention_bias": config.get("qkv_bias", False),
        "use_qk_norm": config.get("qk_normalization", False),
        "use_mean_pooling": True,  # there is no norm after the last block
    }


_INTERN_NAMES = {
    "class_embedding": "cls_token",
    "patch_embedding.": "patch_embeddings.projection.",
    "position_embedding": "position_embeddings",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}


def rename_intern_weights(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of an InternViT under the names of transformers; the joint qkv matrix is split."""
    if any(name.startswith(_OLD) for name in state):
        state = {name.removeprefix(_OLD): value for name, value in state.items() if name.startswith(_OLD)}
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        for old, new in _INTERN_NAMES.items():
            name = name.replace(old, new)
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):  # rows: queries, keys, values
                renamed[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            renamed[name] = value
    return renamed


def read_transform(content: dict[str, Any], folder: Path) -> Transform:
    """Return the transform that a ``preprocessor_config.json`` describes."""

    def find_sides(value: Any) -> tuple[int, bool]:
        """Return the side and whether the aspect is kept."""
        if isinstance(value, int):
            return value, True
        if "shortest_edge" in value:
            return int(value["shortest_edge"]), True
        if value["height"] != value["width"]:
            raise ConfigError(f"{folder} takes images of {value}; only squares are supported.")
        return int(value["height"]), False

    side, keeps_aspect = find_sides(content.get("size", 224))
    crops = bool(content.get("do_center_crop", False))
    # Without a crop the network takes what the resize gives.
    size = find_sides(content["crop_size"])[0] if crops and "crop_size" in content else side
    normal = content.get("do_normalize", True)
    return Transform(
        size=size,
        resize_to=side,
        resize="shortest" if keeps_aspect and crops else "squash",
        interpolation=_RESAMPLING.get(content.get("resample", 3), "bicubic"),  # type: ignore[arg-type]
        mean=tuple(content["image_mean"]) if normal else (0.0, 0.0, 0.0),
        std=tuple(content["image_std"]) if normal else (1.0, 1.0, 1.0),
    )


def describe_tower(network: Any, architecture: str) -> Tower:
    """Return what must be known of a vision tower of transformers."""
    family = FAMILIES[architecture]
    norm = _find_part(network, family.norm)
    registers = getattr(network.config, "num_register_tokens", 0) if architecture.startswith("dino") else 0
    head = getattr(network, "head", None) or getattr(getattr(network, "vision_model", None), "head", None)
    attends = architecture == "siglip"  # whose head pools by attention
    projection = getattr(network, "visual_projection", None)

    def forward(inputs: Any) -> Any:
        output = network(pixel_values=inputs)
        return output.last_hidden_state[:, 0] if family.output == "class" else getattr(output, family.output)

    return Tower(
        network=network,
        forward=forward,
        blocks=list(_find_part(network, family.blocks)),
        n_prefix=int(family.has_class) + registers,
        has_class=family.has_class,
        finish=norm,
        project=None if projection is None else lambda tokens: projection(norm(tokens)),
        attend=None if head is None or not attends else lambda tokens: head(norm(tokens)),
    )


def _find_part(network: Any, paths: tuple[str, ...]) -> Any:
    names = dict(network.named_modules())
    for path in paths:
        if path in names:
            return names[path]
    raise DataError(
        f"this version of transformers keeps {' or '.join(paths)} of {type(network).__name__} elsewhere; "
        "install transformers 5."
    )
