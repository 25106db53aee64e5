"""Image networks of timm: DINOv2, DINOv3, SigLIP, InternViT-300M and every other one that it lists.

Owns the architecture by name, its validation transform, and how timm's families lay out their blocks. Checkpoints in
the authors' own names are renamed by timm's converters.

References
----------
Oquab et al. (2024), arXiv:2304.07193; Simeoni et al. (2025), arXiv:2508.10104; Zhai et al. (2023), arXiv:2303.15343;
Chen et al. (2024), arXiv:2312.14238.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, suggest
from braindecode_vis.base.devices import seeded
from braindecode_vis.embeddings.layer_readout import Tower, expand_blocks
from braindecode_vis.embeddings.published import get_file, name_repository
from braindecode_vis.embeddings.transforms import Transform, floor_crop
from braindecode_vis.embeddings.vision_network import VisionNetworkConfig
from braindecode_vis.embeddings.weights import load_state, read_state

_RESIZE = {"center": "shortest", "squash": "squash", "border": "longest"}


class TimmConfig(VisionNetworkConfig):
    """A network of timm before its classifier.

    Parameters
    ----------
    architecture
        A name that ``timm.list_models()`` lists; with the training run behind a dot
        (``vit_base_patch14_dinov2.lvd142m``) it also decides the transform and what is fetched where that is allowed.
    image_size
        Image side in pixels, if it differs from the network's own; positions are interpolated. DINOv2's own is 518.
    model_args
        Further arguments of the architecture, for example ``{depth: 2}``.
    """

    kind: Literal["timm"] = "timm"
    architecture: str = "vit_base_patch14_dinov2.lvd142m"
    image_size: int | None = Field(default=None, ge=16)

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        import timm

        name, _, tag = self.architecture.partition(".")
        if not timm.is_model(name):
            known = timm.list_models()
            raise ValueError(f"timm has no architecture {name!r}{suggest(name, known)}")
        tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
        if tag and tag not in tags:
            raise ValueError(f"timm has no training run {tag!r} of {name}; known are {', '.join(tags)}")
        return self

    @property
    def family(self) -> str:
        """Library, architecture and side."""
        side = f"@{self.image_size}" if self.image_size else ""
        return f"timm/{self.architecture}{side}"

    @property
    def _run(self) -> Any:
        import timm

        run = timm.get_pretrained_cfg(self.architecture)
        if run is None:
            raise ConfigError(
                f"timm has no transform for {self.architecture}; name one of its runs after a dot."
            )
        return run

    def describe_weights(self) -> str:
        """Say which file holds the weights."""
        run = self._run
        place = f"model.safetensors of {name_repository(run.hf_hub_id)}" if run.hf_hub_id else run.url
        return (
            f"timm's {self.architecture} ({place})"
            if place
            else f"a state dict of timm's {self.architecture}"
        )

    def name_source(self) -> str:
        """Say from where the run is fetched; empty if timm knows no repository of it."""
        return name_repository(self._run.hf_hub_id) if self._run.hf_hub_id else ""

    def download(self, cached: bool = False) -> Path:
        """Return the run's weights, fetched from the hub unless they are `cached`."""
        name = self._run.hf_hub_filename or "model.safetensors"
        return get_file(self._run.hf_hub_id, name, cached=cached)

    def make_transform(self) -> Transform:
        """Return timm's validation transform of this run."""
        run = self._run
        size = self.image_size or run.input_size[-1]
        # Another side than the trained one is resized to directly: nothing is cut off the picture.
        crop = run.crop_pct if self.image_size in (None, run.input_size[-1]) else 1.0
        return Transform(
            size=size,
            resize_to=floor_crop(size, crop),
            resize=_RESIZE[run.crop_mode or "center"],  # type: ignore[arg-type]
            interpolation=run.interpolation,
            mean=tuple(run.mean),
            std=tuple(run.std),
        )

    def make_tower(self) -> Tower:
        """Return the network with its weights."""
        import timm

        path = self.find_weights()
        size: dict[str, Any] = {} if self.image_size is None else {"img_size": self.image_size}
        name = self.architecture.partition(".")[0]  # the run says nothing of the architecture
        with seeded(0):
            try:
                network = timm.create_model(name, pretrained=False, num_classes=0, **size, **self.model_args)
            except TypeError as error:
                raise ConfigError(
                    f"timm's {name} does not take these arguments ({error}); leave out target.image_size or "
                    "correct target.model_args."
                ) from error
        if path is not None:
            load_weights(network, path, self.architecture)
        return describe_tower(network)


def load_weights(network: Any, path: Path, architecture: str) -> None:
    """Load a state dict in timm's names or in the authors' own; classifier tensors are left."""
    state = read_state(path)
    # Each family's module of timm knows the names of its authors.
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, network)
    heads = network.default_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    load_state(
        network, state, path=path, what=f"timm's {architecture}",
        ignore=lambda name: name.startswith(tuple(f"{head}." for head in heads)),
    )  # fmt: skip


def describe_tower(network: Any) -> Tower:
    """Return what must be known of one of timm's networks."""
    # timm has no common class; vision transformers are told by these two.
    tokens = hasattr(network, "num_prefix_tokens") and hasattr(network, "blocks")
    norm = getattr(network, "norm", None) if tokens else None
    pool = getattr(network, "attn_pool", None)
    attend = None
    if pool is not None and tokens:
        assert norm is not None
        attend = lambda values: pool(norm(values))  # noqa: E731  the pool was trained behind the norm
    return Tower(
        network=network,
        forward=network,
        blocks=find_blocks(network),
        n_prefix=network.num_prefix_tokens if tokens else 0,
        has_class=tokens and getattr(network, "cls_token", None) is not None,
        finish=norm,
        attend=attend,
        channels_last=getattr(network, "output_fmt", "NCHW") == "NHWC",
    )


def find_blocks(network: Any) -> list[Any]:
    """Return the blocks of a network in the order in which they run; an empty list if they cannot be found."""
    for name in ("blocks", "stages", "layers"):
        if hasattr(network, name):
            return expand_blocks([getattr(network, name)])
    if hasattr(network, "layer1"):
        return expand_blocks(
            [getattr(network, f"layer{i}") for i in (1, 2, 3, 4) if hasattr(network, f"layer{i}")]
        )
    # The rest name the modules behind which their maps shrink.
    info = getattr(network, "feature_info", None)
    modules = dict(network.named_modules())
    names = [entry["module"] for entry in info] if isinstance(info, list) else []
    return [modules[name] for name in names if name in modules]
