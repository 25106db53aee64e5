"""Building the module that is trained from settings, signal and target, and growing it by a subject."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.devices import seeded
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.seeds import derive_seed
from braindecode_vis.training.fusion import LayerFusion
from braindecode_vis.training.lora import AdaptedTower, Shapes
from braindecode_vis.training.model import BrainImageModel, TargetScale


def build_model(
    settings: Any,
    signal: Signal,
    target_shape: tuple[int, ...],
    *,
    seed: int,
    scales: tuple[TargetScale, TargetScale | None],
    adapted: Shapes | None = None,
) -> BrainImageModel:
    """Return the model with fresh weights that the seed decides.

    Parameters
    ----------
    settings
        The `NetworkEncoderConfig`.
    signal
        Axes and subjects of the trials.
    target_shape
        Shape of one target embedding.
    seed
        Root of the initial weights.
    scales
        Scaling of image and of text embeddings; see `make_scales`.
    adapted
        Weights of the image network that change, if known.
    """
    projector, n_targets = settings.projector, int(np.prod(target_shape))
    fusion = None
    if settings.fusion is not None:
        fusion = LayerFusion(settings.fusion, target_shape, len(signal.subjects))
    n_image = n_targets if fusion is None else fusion.n_features
    n_common = n_image if projector is None else projector.size
    n_outputs = n_common
    if projector is not None and projector.sides == "both":
        n_outputs = projector.brain_width or n_image
    regression = _choose_regression(settings, n_outputs, n_targets)
    with seeded(derive_seed(seed, "initial_weights")):
        if regression == "network":
            network = settings.network.build(signal, n_outputs, n_regression=n_targets)
        else:
            network = settings.network.build(signal, n_outputs)
        both = projector is not None and projector.sides == "both"
        return BrainImageModel(
            network,
            brain_projector=nn.Linear(n_outputs, n_common) if both else None,
            image_projector=nn.Linear(n_image, n_common) if projector is not None else None,
            regression=regression,
            regression_head=nn.Linear(n_outputs, n_targets) if regression == "linear" else None,
            target_scale=scales[0],
            text_scale=scales[1],
            objectives=[_build_objective(objective) for objective in settings.objectives],
            n_common=n_common,
            fusion=fusion,
            # Last, so that the other weights are those of a training without it.
            tower=None if settings.image_tower is None else AdaptedTower(settings.image_tower, adapted),
        )


def _build_objective(config: Any) -> nn.Module:
    module: nn.Module = config.build()
    module.config = (
        config  # weight, phase and needs are asked there; a class from outside need not keep its settings
    )
    return module


def _choose_regression(settings: Any, n_outputs: int, n_targets: int) -> str:
    if "regression" not in settings.needs:
        return "none"
    two_heads = getattr(settings.network, "heads", "one") == "two"
    wanted = settings.regression_head
    if wanted == "auto":
        plain = settings.projector is None and settings.fusion is None
        return "network" if two_heads else "shared" if plain else "linear"
    if wanted == "network" and not two_heads:
        raise ConfigError(
            f"encoder.regression_head is network, but {settings.network.kind} has no second head (heads: two); "
            "take shared or linear."
        )
    if wanted == "shared" and n_outputs != n_targets:
        raise ConfigError(
            f"encoder.regression_head is shared, but the network has {n_outputs} outputs and the target {n_targets} "
            "values; take linear."
        )
    return wanted


def make_scales(
    kind: str, targets: np.ndarray, text: np.ndarray | None, *, n_tokens: int = 1
) -> tuple[TargetScale, TargetScale | None]:
    """Return the scaling of image and text embeddings from those of the training images.

    Parameters
    ----------
    kind
        See `NetworkEncoderConfig.normalise_targets`.
    targets, text : arrays of shape (n_images, n_targets)
    n_tokens
        Layers of a target that are scaled each on its own.
    """
    return _make_scale(kind, targets, n_tokens), None if text is None else _make_scale(kind, text, 1)


def _make_scale(kind: str, vectors: np.ndarray, n_tokens: int) -> TargetScale:
    if kind not in ("centre", "zscore"):
        empty = torch.zeros(0)
        return TargetScale(kind, empty, empty, n_tokens=n_tokens)
    mean = vectors.mean(axis=0, dtype=np.float64)
    std = vectors.std(axis=0, dtype=np.float64)
    std = np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    return TargetScale(kind, *(torch.from_numpy(x.astype(np.float32)) for x in (mean, std)))


def takes_unknown_subjects(model: BrainImageModel, signal: Signal) -> bool:
    """Say whether the network, on the CPU, gives an output for a subject it has never seen."""
    trial = torch.zeros(1, *signal.shape)
    subject = torch.full((1,), signal.unknown_subject, dtype=torch.long)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model.network(trial, subject)
    except (IndexError, DataError):
        return False
    finally:
        model.train(training)
    return True


def grow_state(
    old: dict[str, Tensor], fresh: dict[str, Tensor], n_subjects: int, n_new: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Return weights for a model with more subjects, and the names of the weights that belong to subjects.

    A tensor that grew by `n_new` along one axis is a table of subjects: rows of known subjects are kept, new ones start
    from the row of unknown subjects if the table has one, else from the mean row. A tensor that is new keeps its fresh
    values.

    Parameters
    ----------
    old, fresh
        State of the fitted model, and of a new one that was built for all subjects.
    n_subjects, n_new
        Subjects of the fitted model, and how many join.
    """
    grown, subject_names = {}, set()
    for name, value in fresh.items():
        if name not in old:
            grown[name] = value
            subject_names.add(name)
        elif old[name].shape == value.shape:
            grown[name] = old[name]
        else:
            grown[name] = _grow_table(name, old[name], value, n_subjects, n_new)
            subject_names.add(name)
    return grown, subject_names


def _grow_table(name: str, old: Tensor, fresh: Tensor, n_subjects: int, n_new: int) -> Tensor:
    axes = [a for a in range(old.ndim) if old.shape[a] != fresh.shape[a]] if old.ndim == fresh.ndim else []
    if len(axes) != 1 or fresh.shape[axes[0]] != old.shape[axes[0]] + n_new:
        raise DataError(
            f"the weight {name} changes from {tuple(old.shape)} to {tuple(fresh.shape)} with a new subject, so this "
            "network cannot be adapted; train it again with that subject."
        )
    table = old.movedim(axes[0], 0)
    known, rest = table[:n_subjects], table[n_subjects:]
    start = rest[:1] if len(rest) else known.mean(dim=0, keepdim=True)
    return torch.cat([known, start.expand(n_new, *start.shape[1:]), rest]).movedim(0, axes[0]).contiguous()
