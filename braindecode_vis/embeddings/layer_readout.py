"""Chooses the part of an image network for the target: a layer, and the pooling of its tokens.

Owns the choice of layers by number, depth or name, reading them with hooks, and pooling by class token, mean,
attention or not at all. A network reaches this module as a `Tower`, a description that its own module writes.
A middle layer with averaged patches can beat the last one by forty points of retrieval, so the choice is a setting
of every network and part of the space's name.

timm's `forward_intermediates` reads its own networks alone, and of convolutional ones the five stages, not each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StrictFloat, StrictInt

from braindecode_vis.base.checks import ConfigError, DataError, suggest

OUTPUT = "output"
Layer = StrictInt | Annotated[StrictFloat, Field(ge=0, le=1)] | Annotated[str, Field(min_length=1)]
Pooling = Literal["own", "cls", "mean", "mean_all", "cls+mean", "attention", "tokens", "patches"]


@dataclass
class Tower:
    """A network and what must be known to read its layers.

    Parameters
    ----------
    network
        The module itself; put into evaluation mode and frozen here.
    forward
        Inputs of shape (n, 3, side, side) to the network's own pooled output, shape (n, n_features).
    blocks
        Modules that make up the depth, in the order in which they run.
    n_prefix
        Tokens before the patches: class token and registers.
    has_class
        Whether the first of them is a class token.
    finish
        Final norm, applied to the tokens of the last block; None if there is none for tokens.
    project
        Final norm and output projection of tokens; None if the network has none.
    attend
        The network's own attention pooling of the tokens of any block; None if it has none.
    channels_last
        Whether feature maps have the shape (n, height, width, n_features).
    """

    network: Any
    forward: Callable[[Any], Any]
    blocks: Sequence[Any]
    n_prefix: int = 0
    has_class: bool = False
    finish: Callable[[Any], Any] | None = None
    project: Callable[[Any], Any] | None = None
    attend: Callable[[Any], Any] | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)


def check_choice(layer: Layer, pooling: Pooling, project: bool) -> None:
    """Raise `ValueError` for a layer, a pooling and a projection that cannot go together."""
    # A named module may give one vector per image, which is then taken as it is.
    if pooling == "own" and layer != OUTPUT and not isinstance(layer, str):
        raise ValueError(
            f"pooling 'own' is the pooled output of the whole network; layer {layer!r} needs mean, mean_all, cls, "
            "cls+mean, attention, tokens or patches"
        )
    if project and pooling == "own":
        raise ValueError(
            "project applies to tokens; choose a pooling other than 'own', which is projected already"
        )


def resolve_layer(layer: int | float, n_layers: int) -> int:
    """Return the number of a block, from 0.

    Parameters
    ----------
    layer
        A block, counted from the end if negative, or a depth in 0..1: 0.6 of 10 blocks is the sixth one, number 5.
    n_layers
        How many blocks there are.

    Raises
    ------
    ConfigError
        If there is no such block.

    Examples
    --------
    >>> [resolve_layer(layer, 10) for layer in (0, -1, 0.0, 0.6, 1.0)]
    [0, 9, 0, 5, 9]
    """
    if isinstance(layer, float):
        return max(0, round(layer * n_layers) - 1)  # depth 0 is the first block, not the embedding before it
    if not -n_layers <= layer < n_layers:
        raise ConfigError(
            f"target.layer is {layer}, but this network has the blocks 0 to {n_layers - 1}; "
            "choose one of them or a depth such as 0.6."
        )
    return layer % n_layers


def find_module(tower: Tower, layer: Layer) -> Any:
    """Return the module whose output is the layer."""
    if layer == OUTPUT or not isinstance(layer, str):
        if not tower.blocks:
            raise ConfigError(
                "this network has no list of blocks; set target.layer to the name of a module or to output."
            )
        return tower.blocks[-1 if isinstance(layer, str) else resolve_layer(layer, len(tower.blocks))]
    names = dict(tower.network.named_modules())
    if layer not in names:
        raise ConfigError(
            f"target.layer names {layer!r}, which this network does not have{suggest(layer, list(names))}."
        )
    return names[layer]


class _EnoughError(Exception):
    """The last layer that was asked for has been seen; the rest of the network need not run."""


@contextmanager
def _watch(modules: Sequence[Any]) -> Iterator[dict[int, Any]]:
    """Yield a dictionary that fills with the outputs of the modules; the forward pass stops after the last."""
    seen: dict[int, Any] = {}
    wanted = {id(module) for module in modules}

    def keep(module: Any, _: Any, output: Any) -> None:
        # Blocks of some libraries return attention weights beside the tokens.
        found = output[0] if isinstance(output, tuple | list) else output
        # Until a later layer is read, a ReLU that works in place may change it.
        seen[id(module)] = found.clone() if len(wanted) > 1 else found
        if len(seen) == len(wanted):  # a middle layer costs as much as the blocks before it
            raise _EnoughError

    handles = [module.register_forward_hook(keep) for module in {id(m): m for m in modules}.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def read_layers(
    tower: Tower, inputs: Any, *, layers: Sequence[Layer], pooling: Pooling = "own", project: bool = False
) -> Any:
    """Return the pooled layers of a batch.

    Parameters
    ----------
    tower
        The network.
    inputs : float tensor of shape (n, 3, side, side)
        Transformed images. Gradients flow back to them unless the caller switched them off.
    layers
        One layer, or several that are read in one pass.
    pooling, project
        As in `VisionNetworkConfig`.

    Returns
    -------
    tensor of shape (n, n_features)
        Or (n, n_tokens, n_features) for the poolings ``tokens`` and ``patches``, or (n, n_layers, n_features) for
        several layers.

    Raises
    ------
    ConfigError
        If the network lacks a class token or a projection that was asked for, or layers differ in width.
    """
    import torch

    if pooling == "own" and list(layers) == [OUTPUT]:
        return tower.forward(inputs)
    modules = [find_module(tower, layer) for layer in layers]
    with _watch(modules) as seen, suppress(_EnoughError):
        tower.forward(inputs)
    if len(seen) < len({id(module) for module in modules}):
        name = layers[next(i for i, module in enumerate(modules) if id(module) not in seen)]
        raise ConfigError(f"target.layer {name!r} is not used in the network's forward pass; choose another.")
    pooled = []
    for layer, module in zip(layers, modules, strict=True):
        tokens = flatten_places(seen[id(module)], tower.channels_last)
        pooled.append(_pool_layer(tower, tokens, layer, pooling, project))
    if len(pooled) == 1:
        return pooled[0]
    if len({tuple(p.shape) for p in pooled}) > 1:
        raise ConfigError(
            f"the layers {list(layers)} have {', '.join(str(p.shape[-1]) for p in pooled)} features; "
            "only layers of the same width can be in one target."
        )
    return torch.stack(pooled, dim=1)  # (n, n_layers, n_features)


def flatten_places(output: Any, channels_last: bool) -> Any:
    """Return a layer's output as (n, n_features) or (n, n_tokens, n_features)."""
    if output.ndim == 4:
        # (n, height, width, c) or (n, c, height, width) to (n, places, c)
        return output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
    if output.ndim not in (2, 3):
        raise DataError(f"a layer gave an array of shape {tuple(output.shape)}, which cannot be pooled.")
    return output


def _pool_layer(tower: Tower, tokens: Any, layer: Layer, pooling: Pooling, project: bool) -> Any:
    if tokens.ndim == 2:
        if pooling not in ("own", "mean", "mean_all", "tokens"):
            raise ConfigError(
                f"layer {layer!r} gives one vector per image; pooling {pooling!r} needs tokens."
            )
        return tokens
    if pooling == "own":
        raise ConfigError(f"layer {layer!r} gives {tokens.shape[1]} tokens per image; choose a pooling.")
    if project and tower.project is None:
        raise ConfigError("target.project is true, but this network has no projection of its tokens.")
    # A pool that was trained with the network is taken before ours, which has no parameters.
    if pooling == "attention" and tower.attend is not None:
        return tower.attend(tokens)
    if project and tower.project is not None:
        tokens = tower.project(tokens)
    elif layer == OUTPUT and tower.finish is not None:  # the norm was trained behind the last block alone
        tokens = tower.finish(tokens)
    return pool_tokens(tokens, pooling, n_prefix=tower.n_prefix, has_class=tower.has_class)


def pool_tokens(tokens: Any, pooling: Pooling, *, n_prefix: int, has_class: bool) -> Any:
    """Return one vector per image, or the tokens themselves.

    Parameters
    ----------
    tokens : tensor of shape (n, n_tokens, n_features)
        Prefix tokens first, then the patches or places.
    pooling
        ``cls`` is the class token, ``mean`` the mean of the patches, ``cls+mean`` the two side by side, ``tokens`` the
        class token (if any) and the patches, ``patches`` the patches alone. ``attention`` is the mean of the patches
        weighted by the softmax of their scaled product with the class token, or with their own mean where there is no
        class token; it has no parameters. Registers are never used, but by ``mean_all``, the mean of whatever tokens
        the layer has (NeuralBench).
    n_prefix, has_class
        As in `Tower`.

    Raises
    ------
    ConfigError
        If a class token is asked for and there is none.
    """
    import torch

    patches = tokens[:, n_prefix:]
    if pooling == "patches":
        return patches
    if pooling == "mean":
        return patches.mean(dim=1)
    if pooling == "mean_all":
        return tokens.mean(dim=1)
    if pooling in ("cls", "cls+mean") and not has_class:
        raise ConfigError(f"pooling {pooling!r} needs a class token, but this network has none; use mean.")
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "cls+mean":
        return torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=-1)
    if pooling == "tokens":
        # Registers lie between the two and are left out.
        return torch.cat([tokens[:, :1], patches], dim=1) if has_class else patches
    if pooling == "attention":
        query = tokens[:, 0] if has_class else patches.mean(dim=1)
        scores = torch.einsum("npd,nd->np", patches, query) / patches.shape[-1] ** 0.5  # n, patches
        return torch.einsum("np,npd->nd", scores.softmax(dim=-1), patches)  # n, features
    raise ConfigError(f"pooling {pooling!r} is the output of the whole network, not of its tokens.")


def expand_blocks(modules: Sequence[Any]) -> list[Any]:
    """Return the blocks inside plain containers, and inside stages that keep a list called ``blocks``."""
    from torch import nn

    blocks: list[Any] = []
    for module in modules:
        inner = getattr(module, "blocks", None)
        if type(module) in (nn.Sequential, nn.ModuleList):
            blocks += expand_blocks(list(module))
        elif isinstance(inner, nn.Sequential | nn.ModuleList):
            blocks += expand_blocks(list(inner))
        else:
            blocks.append(module)
    return blocks
