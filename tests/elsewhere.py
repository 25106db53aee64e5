"""A device that computes what the CPU computes and refuses what a GPU refuses, for tests where there is no GPU.

Tensors on it say that they lie on ``meta``, which torch knows everywhere, and hold values all the same. As on a GPU, an
operation that is given tensors of two places is an error (apart from single numbers), and numpy sees none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"


class Away(torch.Tensor):
    """A tensor that lies elsewhere."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Away:
        with torch.inference_mode(
            False
        ):  # torch counts the versions of a view, which such tensors have none of
            made = torch.Tensor._make_wrapper_subclass(
                cls, here.shape, strides=here.stride(), dtype=here.dtype, device=NAME
            )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """Send what ``torch.tensor`` makes to the device, and know places in numpy, which torch shows to no other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__getitem__ and isinstance(args[1], np.ndarray):
            args = (args[0], torch.from_numpy(args[1]))
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


class Elsewhere(TorchDispatchMode):
    """Let what is made on the device or sent to it lie there, while the block lasts; `n_made` counts the results."""

    n_made = 0

    def __enter__(self) -> Elsewhere:
        self.tensors = _Tensors()
        self.tensors.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.tensors.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _call(func, args, kwargs or {})
        self.n_made += any(isinstance(leaf, Away) for leaf in tree_leaves(made))
        return made


def _call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = [tensor for tensor in given if isinstance(tensor, Away)]
    copies = func is torch.ops.aten.copy_.default
    # A GPU takes the places of an index from anywhere.
    free = copies or func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
    if away and not free and any(tensor.dim() and not isinstance(tensor, Away) for tensor in given):
        raise AssertionError(f"{func} was given tensors of two devices")
    assert not any(tensor.is_meta and not isinstance(tensor, Away) for tensor in given), "values were lost"
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    inner = tree_map(lambda leaf: leaf.here if isinstance(leaf, Away) else leaf, (args, kwargs))
    made = func(*inner[0], **inner[1])
    lies_away = bool(away) and not (copies and not isinstance(args[0], Away))
    if device is not None:
        lies_away = torch.device(device).type == NAME
    if not lies_away:
        return made
    names = {id(tensor.here): tensor for tensor in away}  # what is changed in place stays the same tensor

    def place(leaf: Any) -> Any:
        return names.get(id(leaf), leaf) if id(leaf) in names or not torch.is_tensor(leaf) else Away(leaf)

    return tree_map(place, made)
