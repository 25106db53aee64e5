"""Going on learning from a few trials of a new subject."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checkpoints import load_weights
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.encoders.signal import Signal, check_signal, describe_signal
from braindecode_vis.seeds import derive_seed
from braindecode_vis.training.assembly import grow_state
from braindecode_vis.training.network_encoder import NetworkEncoder
from braindecode_vis.training.views import settle_views

if TYPE_CHECKING:
    from torch import Tensor

    from braindecode_vis.training.alignment import InputTransform
    from braindecode_vis.training.fitted import NetworkFit
    from braindecode_vis.training.model import BrainImageModel


def adapt_encoder(
    encoder: NetworkEncoder,
    responses: Responses,
    targets: Embeddings,
    *,
    trainable: Literal["all", "subject"],
    epochs: int | None,
    lr_scale: float,
) -> NetworkEncoder:
    """Return a new encoder that started from a fitted one; see `NetworkEncoder.adapt`."""
    fit = encoder.require_fit()
    _check_fits(fit, responses, targets)
    other = encoder.copy_for(derive_seed(encoder.seed, "adapt"))
    train, held, by = other.hold_out(responses, np.arange(responses.n_trials))
    signal = extend_signal(fit.signal, describe_signal(responses))
    transform = _extend_transform(fit, responses, train)
    old = {k: v.cpu() for k, v in fit.model.state_dict().items()}
    n_known = len(fit.signal.subjects)
    n_new = len(signal.subjects) - n_known
    # Whatever grows when one more subject is imagined belongs to subjects.
    wider = replace(signal, subjects=(*signal.subjects, "\0"), n_voxels=_repeat_last(signal.n_voxels))
    _, owned = grow_state(old, other.build_model(wider, targets, train).state_dict(), n_known, n_new + 1)
    if trainable == "subject" and not owned:
        raise ConfigError(
            f"{encoder.config.network.kind} has no weights of single subjects; adapt it with trainable all."
        )

    def build() -> BrainImageModel:
        model = other.build_model(signal, targets, train)
        state, _ = grow_state(old, model.state_dict(), n_known, n_new)
        load_weights(model, state, what="the fitted encoder")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable == "all" or name in owned)
        return model

    other.train(
        responses, targets, rows=(train, held, by), signal=signal, transform=transform, build=build,
        epochs=epochs or encoder.config.epochs,
        identity={"adaptation": [trainable, epochs, lr_scale, _digest(old)]}, hide_subject=0.0, lr_scale=lr_scale,
        frozen_decay=trainable == "subject",
    )  # fmt: skip
    other.require_fit().model.requires_grad_(True)
    return other


def _check_fits(fit: NetworkFit, responses: Responses, targets: Embeddings) -> None:
    check_signal(fit.signal, responses)
    settled = settle_views(Embeddings(targets.vectors[:1], targets.ids[:1], targets.space), fit.view_choice)
    if settled.space != fit.space or tuple(settled.vectors.shape[1:]) != fit.target_shape:
        raise DataError(f"this encoder predicts {fit.space!r}, so it cannot be adapted to {targets.space!r}.")


def _extend_transform(fit: NetworkFit, responses: Responses, train: np.ndarray) -> InputTransform:
    """Return the transform with the alignment of new subjects, from their training trials."""
    names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
    known = fit.transform
    grown = replace(known, matrices=dict(known.matrices), scales=dict(known.scales))
    for name in sorted(set(names[train]) - set(fit.signal.subjects)):
        grown.add_subject(responses.data, train[names[train] == name], name)
    return grown


def extend_signal(known: Signal, found: Signal) -> Signal:
    """Return the known signal with the new subjects of another one behind its own."""
    new = [i for i, name in enumerate(found.subjects) if name not in known.subjects]
    voxels = known.n_voxels
    if voxels and new:
        counts = found.n_voxels or (found.shape[0],) * len(found.subjects)
        voxels = (*voxels, *(counts[i] for i in new))
    return replace(known, subjects=(*known.subjects, *(found.subjects[i] for i in new)), n_voxels=voxels)


def _repeat_last(counts: tuple[int, ...]) -> tuple[int, ...]:
    return (*counts, counts[-1]) if counts else ()


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]
