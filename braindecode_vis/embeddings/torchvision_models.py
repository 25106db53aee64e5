"""Supervised ImageNet networks of torchvision: VGG, ResNet, Inception, EfficientNet, DenseNet, MobileNet and others.

Owns the architecture by name, the validation transform of each set of weights, and what counts as a block. The
output is what enters the classifier (the 4096 numbers of VGG's last hidden layer, the 2048 of ResNet-50).

timm has no AlexNet and cannot load torchvision's EfficientNet, MobileNet, MNASNet, ConvNeXt, Swin, MaxViT and ViT.

References
----------
Benchetrit, Banville and King (2024), ICLR, arXiv:2310.19812: the networks compared for decoding MEG.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from braindecode_vis.base.checks import ConfigError, suggest
from braindecode_vis.base.devices import seeded
from braindecode_vis.embeddings.layer_readout import Tower
from braindecode_vis.embeddings.transforms import Transform
from braindecode_vis.embeddings.vision_network import VisionNetworkConfig
from braindecode_vis.embeddings.weights import load_state, read_state

#: Classes that torchvision repeats along the depth of its networks.
_BLOCKS = re.compile(
    r"BasicBlock|Bottleneck|ResBottleneckBlock|EncoderBlock|SwinTransformerBlock(V2)?|CNBlock|(Fused)?MBConv"
    r"|_?InvertedResidual|_DenseBlock|_Transition|Inception[A-E]?|Fire|MaxVitLayer"
)


class TorchvisionConfig(VisionNetworkConfig):
    """A supervised network of torchvision before its classifier.

    Parameters
    ----------
    architecture
        A name that ``torchvision.models.list_models()`` lists.
    pretrained
        Name of the weights, as torchvision lists them: it decides the transform and what is fetched where that is
        allowed. None takes torchvision's default.
    model_args
        Further arguments of the architecture.
    """

    kind: Literal["torchvision"] = "torchvision"
    architecture: str = "resnet50"
    pretrained: str | None = None

    @model_validator(mode="after")
    def _check_architecture(self) -> Self:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if self.architecture not in known:
            raise ValueError(
                f"torchvision has no classifier {self.architecture!r}{suggest(self.architecture, known)}"
            )
        names = list(torchvision.models.get_model_weights(self.architecture).__members__)
        if self.pretrained is not None and self.pretrained not in names:
            raise ValueError(
                f"torchvision has no weights {self.pretrained!r} of {self.architecture}; known are {', '.join(names)}"
            )
        return self

    @property
    def _run(self) -> Any:
        from torchvision.models import get_model_weights

        return get_model_weights(self.architecture)[self.pretrained or "DEFAULT"]

    @property
    def revision(self) -> int:
        """Number of the reading; of VGG and AlexNet, numbers name layers before a ReLU, too."""
        plain_row = self.architecture.startswith(("vgg", "alexnet"))
        return 2 if plain_row and len(self.layers) > 1 else super().revision

    @property
    def family(self) -> str:
        """Library and architecture."""
        return f"torchvision/{self.architecture}"

    def describe_weights(self) -> str:
        """Say which file holds the weights."""
        return f"torchvision's {self.architecture} {self._run.name} ({self._run.url})"

    def name_source(self) -> str:
        """Say from where the weights are fetched."""
        return str(self._run.url)

    def download(self, cached: bool = False) -> Path:
        """Return the weights, fetched into torch's cache unless they are `cached`; torch checks their hash."""
        import torch

        folder = Path(torch.hub.get_dir()) / "checkpoints"
        path = folder / self._run.url.rsplit("/", 1)[-1]
        if not path.is_file() and not cached:
            folder.mkdir(parents=True, exist_ok=True)
            # torchvision puts the first digits of the hash into the file's name.
            digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
            torch.hub.download_url_to_file(self._run.url, str(path), digest.group(1) if digest else None)
        return path

    def make_transform(self) -> Transform:
        """Return torchvision's validation transform of these weights."""
        preset = self._run.transforms()
        return Transform(
            size=preset.crop_size[0],
            resize_to=preset.resize_size[0],
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    def make_tower(self) -> Tower:
        """Return the network with its weights."""
        path = self.find_weights()
        with seeded(0):
            network = build_network(self.architecture, self.model_args)
        if path is not None:
            load_weights(network, path, self.architecture)
        return describe_tower(network, self.architecture)


def build_network(architecture: str, model_args: dict[str, Any]) -> Any:
    """Return the untrained network, built as torchvision builds it for its own weights."""
    import torchvision

    arguments = dict(model_args)
    if architecture in ("inception_v3", "googlenet"):
        # These weights expect inputs scaled in another way, which the network does itself if it is told so.
        arguments = {"transform_input": True, "aux_logits": True, "init_weights": True} | arguments
    try:
        return torchvision.models.get_model(architecture, weights=None, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"torchvision's {architecture} does not take these arguments ({error}); correct target.model_args."
        ) from error


def load_weights(network: Any, path: Path, architecture: str) -> None:
    """Load a state dict; the old layer names of DenseNet files are brought up to date."""
    # norm.1, relu.1, conv.1 became norm1, relu1, conv1 when names with dots were given up.
    old = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\..+)$")
    state = {old.sub(r"\1\2", name): value for name, value in read_state(path).items()}
    load_state(network, state, path=path, what=f"torchvision's {architecture}")


def describe_tower(network: Any, architecture: str) -> Tower:
    """Return what must be known of one of torchvision's networks; its classifier is taken off."""
    remove_classifier(network)
    blocks = [m for m in network.modules() if _BLOCKS.fullmatch(type(m).__name__)]
    if not blocks:  # VGG and AlexNet are one plain row of layers
        blocks = list(network.features)
    is_transformer = architecture.startswith("vit_")
    norm = network.encoder.ln if is_transformer else None
    return Tower(
        network=network,
        forward=network,
        blocks=blocks,
        n_prefix=int(is_transformer),
        has_class=is_transformer,
        finish=norm,
        channels_last=architecture.startswith("swin"),  # torchvision's Swin keeps (n, height, width, c)
    )


def remove_classifier(network: Any) -> None:
    """Replace the last linear layer by the identity, so that the output is what would enter it."""
    from torch import nn

    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    # Auxiliary heads are for training; `encoder.` holds the linear layers of a vision transformer's blocks.
    linear = [name for name in linear if not name.startswith(("AuxLogits", "aux1", "aux2", "encoder."))]
    if linear:
        parent, _, last = linear[-1].rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
    else:  # SqueezeNet classifies with a convolution
        network.classifier = nn.AdaptiveAvgPool2d(1)
