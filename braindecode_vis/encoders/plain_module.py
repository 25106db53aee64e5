"""A plain torch module as a network: trials in, vectors of any width out, and nothing of this package in it.

Owns how a module becomes settings (its class, and the arguments of its ``__init__``), so that it is built anew in every
fold, in another process and by an audit; and what its output must be. `braindecode_vis.base.registry` keeps the code of
the class in fingerprints, as for every component from outside. Knows nothing of how a network is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.base.devices import keep_random_state
from braindecode_vis.base.registry import is_module_class

if TYPE_CHECKING:
    from torch import nn

    from braindecode_vis.encoders.signal import Signal


class PlainModuleConfig(NetworkSettings):
    """Settings of a plain module; `make_settings` makes a subclass for each class of modules.

    Parameters
    ----------
    arguments
        Arguments of its ``__init__``, by name.
    """

    module_class: ClassVar[Any] = None

    arguments: dict[str, Any] = Field(default_factory=dict)

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the module with new weights; a linear layer follows where its width is another than `n_outputs`."""
        from torch import nn

        name = self.module_class.__name__
        try:
            module = self.module_class(**self.arguments)
        except Exception as error:
            raise ConfigError(f"the module {name} cannot be built with {self.arguments}: {error}.") from error
        if not _has_parameters(module):
            raise ConfigError(f"the module {name} has no parameters, so there is nothing to train.")
        width = _measure_width(module, name, signal)

        class PlainNetwork(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module
                self.head = nn.Identity() if width == n_outputs else nn.Linear(width, n_outputs)

            def forward(self, data: Any, subject: Any) -> Any:
                return self.head(self.module(data))

        return PlainNetwork()


def make_settings(cls: Any, reference: str) -> type[PlainModuleConfig]:
    """Return the settings of the modules of a class.

    Parameters
    ----------
    cls
        A subclass of ``torch.nn.Module``.
    reference
        Where it is found, ``package.module:Class``, which is the kind of the settings.
    """
    content = {
        "__module__": cls.__module__,
        "__doc__": f"Settings of the plain module {reference}.",
        "__annotations__": {"kind": Literal[reference], "module_class": ClassVar[Any]},
        "kind": reference,
        "module_class": cls,
    }
    return type(f"{cls.__name__}Config", (PlainModuleConfig,), content)


def is_module(value: Any) -> bool:
    """Say whether something is a torch module, or a class of them; torch is not imported for that."""
    return is_module_class(value) or is_module_class(type(value))


def describe_module(module: Any) -> dict[str, Any]:
    """Return plain settings of a network from a module: the place of its class, and its arguments.

    Each argument of ``__init__`` is read from the attribute of the same name, as scikit-learn does, and left at its
    default where there is none.

    Raises
    ------
    ConfigError
        If the module cannot be built again from these, or has no parameters.
    """
    if isinstance(module, type):
        raise ConfigError(
            f"encoder is the class {module.__name__}; give a module of it: {module.__name__}(...)."
        )
    cls = type(module)
    name = cls.__name__
    if not _has_parameters(module):
        raise ConfigError(f"the module {name} has no parameters, so there is nothing to train.")
    if "<locals>" in cls.__qualname__:
        raise ConfigError(
            f"the class {name} is defined within a function, where no other process finds it; move it to the top of a "
            "module."
        )
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue  # what they hold shows in the weights, which are compared below
        value = getattr(module, parameter.name, inspect.Parameter.empty)
        if _is_plain(value):
            arguments[parameter.name] = _make_plain(value)
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(
                f"a run keeps the arguments of {name}, and its argument {parameter.name} is not known: write "
                f"self.{parameter.name} = {parameter.name} in its __init__; it must be a number, a text, or a list or "
                "mapping of these."
            )
    with keep_random_state():
        try:
            again = cls(**arguments)
        except Exception as error:
            raise ConfigError(
                f"the module {name} cannot be built again with {arguments}: {error}."
            ) from error
    ours, theirs = _list_parts(module), _list_parts(again)
    if ours != theirs:
        first = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
        raise ConfigError(
            f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())}) differs from the module that "
            f"was given (first in {first}): write a class of your own whose __init__ makes all layers and keeps each "
            "argument in an attribute of the same name."
        )
    return {"kind": f"{cls.__module__}:{cls.__qualname__}", "arguments": arguments}


def _measure_width(module: Any, name: str, signal: Signal) -> int:
    """Return the width of the output for two trials of zeros; `ConfigError` if it is not (trials, width)."""
    import torch

    n, axes = 2, " x ".join(f"{size} {dim}s" for size, dim in zip(signal.shape, signal.dims, strict=True))
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            made = module(torch.zeros(n, *signal.shape))
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"the module {name} fails on trials of {axes} ({type(error).__name__}: {text}); it gets a tensor of shape "
            f"{(n, *signal.shape)} for {n} trials."
        ) from error
    finally:
        module.train(was_training)
    if not isinstance(made, torch.Tensor):
        raise ConfigError(
            f"the module {name} returns {type(made).__name__}, but must return a tensor of shape (trials, width)."
        )
    if made.ndim != 2 or made.shape[0] != n or not made.shape[1] or not made.is_floating_point():
        raise ConfigError(
            f"the module {name} returns {str(made.dtype).removeprefix('torch.')} of shape {tuple(made.shape)} for {n} "
            f"trials of {axes}, but must return floats of shape (trials, width); flatten(1) joins further axes."
        )
    return int(made.shape[1])


def _has_parameters(module: Any) -> bool:
    return any(True for _ in module.parameters())


def _list_parts(module: Any) -> dict[str, Any]:
    """Return what may differ between modules of one class before training: layers, their options, shapes of weights."""
    from torch.nn.parameter import is_lazy

    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        place = name or "the module itself"
        found[place] = f"{type(part).__qualname__}({part.extra_repr()})"
        own = {key: value for key, value in vars(part).items() if key != "training" and _is_plain(value)}
        found |= {f"{place}, {key}": value for key, value in own.items()}
    # Weights that wait for the first data have no shape; the training refuses them in a sentence of its own.
    return found | {
        key: () if is_lazy(value) else tuple(value.shape) for key, value in module.state_dict().items()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _make_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _make_plain(entry) for key, entry in value.items()}
    return [_make_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
