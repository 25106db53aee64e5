"""CLIP image towers of open_clip, with all its architectures, without its hub.

Owns the architecture by name, the transform that belongs to a training run, and its known traps. Only the image tower
is built; the text tower is the business of `text`.

The networks are open_clip's. timm has most of these image towers too, to 1e-6, but neither CoCa's nor any text tower,
so that both libraries would be needed, and names, runs and traps would still be needed here.

References
----------
Cherti et al. (2023), CVPR, arXiv:2212.07143; Radford et al. (2021), arXiv:2103.00020.
"""

from __future__ import annotations

import builtins
import json
import sys
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, suggest
from braindecode_vis.base.devices import seeded
from braindecode_vis.embeddings.layer_readout import Tower, expand_blocks
from braindecode_vis.embeddings.published import find_model, get_file, name_repository
from braindecode_vis.embeddings.transforms import CLIP_MEAN, CLIP_STD, Transform
from braindecode_vis.embeddings.vision_network import VisionNetworkConfig
from braindecode_vis.embeddings.weights import load_state, read_state


class OpenClipConfig(VisionNetworkConfig):
    """A CLIP image tower.

    Parameters
    ----------
    architecture
        A name that ``open_clip.list_models()`` lists.
    pretrained
        Name of the training run, as ``open_clip.list_pretrained()`` lists it: it decides the transform and what is
        fetched where that is allowed. None if all runs of the architecture share one transform.
    image_size
        Image side in pixels, if it differs from the architecture's own; positions are interpolated.
    model_args
        Changes to the architecture's own description, for example ``{vision_cfg: {layers: 2}}``.
    """

    packages: ClassVar[tuple[str, ...]] = ("open_clip",)

    kind: Literal["openclip"] = "openclip"
    architecture: str = "ViT-H-14"
    pretrained: str | None = None
    image_size: int | None = Field(default=None, ge=16)

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        if find_spec("open_clip") is None:  # the settings can be read and shown; a run says what it lacks
            return self
        known = read_architectures()
        if self.architecture not in known:
            raise ValueError(
                f"open_clip has no architecture {self.architecture!r}{suggest(self.architecture, list(known))}"
            )
        tags = _open_runs()["list_pretrained_tags_by_model"](self.architecture)
        if self.pretrained is not None and self.pretrained not in tags:
            raise ValueError(
                f"open_clip has no training run {self.pretrained!r} of {self.architecture}; known are "
                f"{', '.join(tags)}"
            )
        if self.pretrained is not None:
            self._check_activation()
        return self

    def _check_activation(self) -> None:
        # The same tensors fit both activations, so a wrong one would pass unseen.
        needs = bool(self._run.get("quick_gelu", False))
        if needs != bool(read_description(self).get("quick_gelu", False)):
            twin = self.architecture.removesuffix("-quickgelu") + "-quickgelu" * needs
            raise ValueError(
                f"the run {self.pretrained!r} was trained with {'QuickGELU' if needs else 'plain GELU'}: "
                f"set architecture to {twin}"
            )

    @property
    def _run(self) -> dict[str, Any]:
        run: dict[str, Any] = _open_runs()["get_pretrained_cfg"](self.architecture, self.pretrained or "")
        return run

    @property
    def family(self) -> str:
        """Library, architecture and side."""
        side = f"@{self.image_size}" if self.image_size else ""
        return f"openclip/{self.architecture}{side}"

    def describe_weights(self) -> str:
        """Say which file holds the weights."""
        place = str(self._run.get("hf_hub", "")).strip("/")
        source = f" of {name_repository(place)}" if place else ""
        run = f", run {self.pretrained}" if self.pretrained else ""
        return f"open_clip's {self.architecture}{run} (open_clip_model.safetensors{source})"

    def name_source(self) -> str:
        """Say from where the run is fetched; empty if `pretrained` does not say which."""
        run = self._run if self.pretrained is not None else {}
        place = str(run.get("hf_hub", "")).strip("/")
        return name_repository(place) if place else str(run.get("url", ""))

    def download(self, cached: bool = False) -> Path:
        """Return the run's weights, fetched into open_clip's cache unless they are `cached`."""
        place = str(self._run.get("hf_hub", ""))
        repository, _, name = place.rpartition("/")
        if not cached:
            model = find_model(repository)
            if model is not None:
                return get_file(repository, model.files[0].path, cached=False)
            from open_clip import pretrained

            return Path(pretrained.download_pretrained(self._run))
        if not place:
            return Path("~/.cache/clip").expanduser() / str(self._run["url"]).rsplit("/", 1)[-1]
        names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        found = [_find_cached(repository, each) for each in names]
        return next(path for path in found if path is not None)

    def make_transform(self) -> Transform:
        """Return open_clip's validation transform of this run."""
        size = self.image_size or read_image_size(self)
        if self.pretrained is not None:
            return _make_transform(self._run, size)
        # Without a run the transform is that of all runs which the architecture's activation fits.
        quick = bool(read_description(self).get("quick_gelu", False))
        known = _open_runs()
        runs = {
            tag: known["get_pretrained_cfg"](self.architecture, tag)
            for tag in known["list_pretrained_tags_by_model"](self.architecture)
        }
        tags = [tag for tag, run in runs.items() if bool(run.get("quick_gelu", False)) == quick]
        found = {_make_transform(runs[tag], size) for tag in tags}
        if len(found) > 1:
            raise ConfigError(
                f"the runs of {self.architecture} were trained with different transforms; "
                f"set target.pretrained to one of {', '.join(tags)}."
            )
        return found.pop() if found else _make_transform({}, size)

    def make_tower(self) -> Tower:
        """Return the image tower with its weights."""
        path = self.find_weights()
        with seeded(0):
            holder = build_image_tower(self)
        if path is not None:
            load_image_weights(holder, path, self.architecture)
        return describe_tower(holder.visual)


def _find_cached(repository: str, name: str) -> Path | None:
    """Return a file of a repository that was fetched before, None if it was not."""
    try:
        return get_file(repository, name, cached=True)
    except OSError:
        return None


def _make_transform(run: dict[str, Any], size: int) -> Transform:
    return Transform(
        size=size,
        resize=run.get("resize_mode") or "shortest",
        interpolation=run.get("interpolation") or "bicubic",
        mean=tuple(run.get("mean") or CLIP_MEAN),
        std=tuple(run.get("std") or CLIP_STD),
        fill=run.get("fill_color", 0),
    )


def read_architectures() -> dict[str, dict[str, Any]]:
    """Return open_clip's description of each architecture by name, from its files: to import it takes seconds."""
    if "open_clip" in sys.modules:  # where architectures may have been added
        import open_clip

        return {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    return _read_shipped()


@cache
def _read_shipped() -> dict[str, dict[str, Any]]:
    files = (_find_package() / "model_configs").glob("*.json")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(files)}
    parts = {"embed_dim", "vision_cfg", "text_cfg"}
    return {name: description for name, description in found.items() if parts <= description.keys()}


@cache
def _open_runs() -> dict[str, Any]:
    """Return what open_clip's file of training runs defines, executed without the libraries that only fetching needs.

    It does without them by itself where they cannot be imported; one of them loads torch.
    """

    def bring(name: str, space: Any = None, names: Any = None, wanted: Any = (), level: int = 0) -> Any:
        if name.partition(".")[0] in ("safetensors", "huggingface_hub"):
            raise ImportError(name)
        return SimpleNamespace(**execute(name)) if level else __import__(name, space, names, wanted, level)

    def execute(name: str) -> dict[str, Any]:
        space = {"__name__": f"open_clip.{name}", "__builtins__": {**vars(builtins), "__import__": bring}}
        exec(
            (_find_package() / f"{name}.py").read_text(), space
        )  # the package itself, not a file of somebody
        return space

    return execute("pretrained")


def _find_package() -> Path:
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    return Path(found.origin).parent


def read_description(config: OpenClipConfig) -> dict[str, Any]:
    """Return the architecture's description with the changes of the configuration applied."""
    description = deepcopy(read_architectures()[config.architecture])
    for key, value in config.model_args.items():
        if isinstance(value, dict) and isinstance(description.get(key), dict):
            description[key] |= value
        else:
            description[key] = value
    return description


def read_image_size(config: OpenClipConfig) -> int:
    """Return the side of the square that the architecture takes, pixels."""
    size = read_description(config)["vision_cfg"].get("image_size", 224)
    if isinstance(size, int):
        return size
    if len(set(size)) > 1:
        raise ConfigError(f"{config.architecture} takes images of {size}; only squares are supported.")
    return int(size[0])


def build_image_tower(config: OpenClipConfig) -> Any:
    """Return a module with the untrained image tower as ``visual``."""
    from open_clip import model
    from torch import nn

    description = read_description(config)
    vision = {**description["vision_cfg"], "timm_model_pretrained": False}

    def build(vision: dict[str, Any]) -> Any:
        settings, quick = model.CLIPVisionCfg(**vision), description.get("quick_gelu", False)
        return model._build_vision_tower(description["embed_dim"], settings, quick_gelu=quick)

    visual = build(vision)
    if config.image_size is not None:
        # timm's towers interpolate their positions themselves; the others are built anew at the size.
        if hasattr(visual, "set_input_size"):
            visual.set_input_size(config.image_size)
        else:
            visual = build({**vision, "image_size": config.image_size})
    holder = nn.Module()
    holder.visual = visual
    return holder


def load_image_weights(holder: Any, path: Path, architecture: str) -> None:
    """Load the image part of a whole CLIP state dict; the text part is left."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import resize_pos_embed

    state = convert_state_dict(holder, read_state(path))  # OpenAI's and others' names
    resize_pos_embed(state, holder)  # in place, where the image size is another
    load_state(
        holder, state, path=path, what=f"open_clip's {architecture}",
        ignore=lambda name: not name.startswith("visual."),
    )  # fmt: skip


def describe_tower(visual: Any) -> Tower:
    """Return what must be known of one of open_clip's three kinds of image towers."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    if isinstance(visual, TimmModel):
        from braindecode_vis.embeddings import timm_models

        tower = timm_models.describe_tower(visual.trunk)
        tower.network, tower.forward = visual, visual
        return tower
    if isinstance(visual, ModifiedResNet):
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        return Tower(network=visual, forward=visual, blocks=expand_blocks(stages))

    def forward(inputs: Any) -> Any:
        output = visual(inputs)
        return output[0] if isinstance(output, tuple) else output  # CoCa gives its tokens too

    # CoCa pools before its norm, whose width is then not that of the tokens.
    pools_first = visual.attn_pool is not None
    return Tower(
        network=visual,
        forward=forward,
        blocks=list(visual.transformer.resblocks),
        n_prefix=1,
        has_class=True,
        finish=None if pools_first else visual.ln_post,
        project=None if pools_first else lambda tokens: visual.ln_post(tokens) @ visual.proj,
    )
