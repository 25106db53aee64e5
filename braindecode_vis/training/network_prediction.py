"""The prediction of a trained network as one torch module, for export: alignment, scaling, network, projector, units.

Owns nothing that is learnt: it holds copies of the parts of a `NetworkFit` that prediction needs, without the image
side and the objectives. A subject is given by its number in the order of training; the number of subjects stands for an
unknown one, which has no alignment of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.checks import DataError

if TYPE_CHECKING:
    from braindecode_vis.base.arrays import Responses
    from braindecode_vis.training.fitted import NetworkFit


class NetworkPrediction(nn.Module):
    """What `NetworkFit.predict` does to trials, in the space of comparison."""

    def __init__(self, fit: NetworkFit) -> None:
        super().__init__()
        model = copy.deepcopy(fit.model).cpu().eval()
        maps = [part for part in (model.brain_projector, model.shared_projector) if part is not None]
        self.network, self.projector = model.network, nn.Sequential(*maps) if maps else None
        # Outputs of a learnt space stay there; others return to the units of the targets.
        self.target_scale = None if model.learns_space else model.target_scale
        self.shape = (model.n_common,) if model.learns_space else fit.target_shape
        transform, subjects = fit.transform, fit.signal.subjects
        self.clamp = transform.scaling.clamp
        named: dict[str, np.ndarray | None] = {"matrices": None, "own_centre": None, "own_spread": None}
        if transform.alignment == "euclidean":
            named["matrices"] = np.stack([transform.matrices[name] for name in subjects])
        elif transform.alignment == "zscore":
            named["own_centre"] = np.stack([transform.scales[name].centre for name in subjects])
            named["own_spread"] = np.stack([transform.scales[name].spread for name in subjects])
        elif transform.space is not None:
            fitted = [transform.space.maps[name] for name in subjects]
            widest = max(len(one.centre) for one in fitted)

            def pad(array: np.ndarray) -> np.ndarray:
                return np.concatenate([array, np.zeros((widest - len(array), *array.shape[1:]), np.float32)])

            named["map_centre"] = np.stack([pad(one.centre) for one in fitted])
            named["map_matrix"] = np.stack([pad(one.matrix).T for one in fitted])
            named["map_offset"] = np.stack([one.offset for one in fitted])
        named["centre"] = None if transform.scale is None else transform.scale.centre
        named["spread"] = None if transform.scale is None else transform.scale.spread
        for name, array in named.items():
            self.register_buffer(name, None if array is None else torch.from_numpy(np.array(array)))

    def forward(self, responses: Tensor, subject: Tensor) -> Tensor:
        """Return one embedding per trial, shape (n_trials, *shape).

        Parameters
        ----------
        responses : float32 tensor of shape (n_trials, ...)
        subject : int64 tensor of shape (n_trials,)
        """
        parts: dict[str, Any] = dict(self.named_buffers(recurse=False))
        data = responses
        if "matrices" in parts:
            # (n_trials, n_channels, n_channels) @ (n_trials, n_channels, n_times)
            data = torch.matmul(parts["matrices"][subject], data)
        if "map_matrix" in parts:
            wide = data if data.ndim > 2 else data.unsqueeze(2)
            centre, matrix, offset = (
                parts[f"map_{name}"][subject] for name in ("centre", "matrix", "offset")
            )
            # (n_trials, n_components, n_features) @ (n_trials, n_features, n_times or 1)
            wide = torch.matmul(matrix, wide[:, : centre.shape[1]] - centre.unsqueeze(2)) + offset.unsqueeze(
                2
            )
            data = wide if data.ndim > 2 else wide.squeeze(2)
        if "own_centre" in parts:
            data = (data - parts["own_centre"][subject]) / parts["own_spread"][subject]
        if "centre" in parts:
            data = (data - parts["centre"]) / parts["spread"]
        if self.clamp is not None:
            data = data.clamp(-self.clamp, self.clamp)
        output = self.network(data, subject)
        if self.projector is not None:
            output = self.projector(output)
        if self.target_scale is not None:
            output = self.target_scale.undo(output)
        return output.unflatten(1, self.shape) if len(self.shape) > 1 else output


class StackedPrediction(nn.Module):
    """Outputs of several fits side by side, each as it is compared and of unit length.

    Parameters
    ----------
    fits
        Of the same trials and subjects.
    """

    def __init__(self, fits: Sequence[NetworkFit]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(NetworkPrediction(fit) for fit in fits)

    def forward(self, responses: Tensor, subject: Tensor) -> Tensor:
        """Return one embedding per trial, shape (n_trials, sum of features)."""
        parts = []
        for stage in self.stages:
            output, scale = stage(responses, subject).flatten(1), stage.target_scale
            if isinstance(scale, nn.Module):
                output = scale(output)
            parts.append(functional.normalize(output, dim=1))
        return torch.cat(parts, dim=1)


class MontagePrediction(nn.Module):
    """A fitted network for trials of any channels and length, in the form that NeuralBench asks of a model.

    Each of the network's channels becomes a weighted mean of the channels that come, by the distance of their
    positions once both sets are brought to a common centre and radius; samples are interpolated to the network's
    number, whatever time they stand for. Every channel of a trial is brought to the mean and spread that the network
    was trained with, since units are not known. The subject is an unknown one where the network takes such, else the
    first. All of this is a choice of ours: it makes any montage fit, and is no claim that a decoder transfers to it.

    Parameters
    ----------
    fit
        A fitted network over channels and times whose positions are known.

    Raises
    ------
    DataError
        If there are no channels with positions, or subjects are aligned one by one.
    """

    def __init__(self, fit: NetworkFit) -> None:
        super().__init__()
        signal = fit.signal
        if signal.dims != ("channel", "time") or signal.ch_pos is None:
            raise DataError(
                "a network for any montage needs trials of channels x times with known positions, and this one has "
                f"{', '.join(signal.dims)}{'' if signal.ch_pos is None else ' and positions'}."
            )
        if fit.transform.alignment != "none":
            raise DataError(
                "a network for any montage sees subjects without an alignment of their own; train it with "
                "encoder.subject_alignment none."
            )
        self.prediction = NetworkPrediction(fit).eval()
        self.n_times = signal.shape[1]
        self.subject = signal.unknown_subject if fit.takes_unknown else 0
        self.register_buffer("positions", _bring_to_sphere(torch.from_numpy(np.array(signal.ch_pos)).float()))

    def forward(self, x: Tensor, channel_positions: Tensor | None = None) -> Tensor:
        """Return one embedding per trial, shape (n_trials, n_features).

        Parameters
        ----------
        x : float tensor of shape (n_trials, n_channels, n_times)
            Any numbers of channels and times.
        channel_positions : float tensor of shape (n_trials, n_channels, 3), optional
            In any unit; without them the channels must be the network's own.
        """
        x = functional.interpolate(x.float(), size=self.n_times, mode="linear")
        if channel_positions is not None:
            own: Any = self.positions
            squares = (
                torch.cdist(own.expand(len(x), -1, -1), _bring_to_sphere(channel_positions.float())) ** 2
            )
            # a fifth of the head's radius: about the spacing of 64 electrodes
            x = (-squares / (2 * 0.2**2)).softmax(
                dim=-1
            ) @ x  # (n, own channels, n_channels) @ (n, n_channels, n_times)
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        known: dict[str, Any] = dict(self.prediction.named_buffers(recurse=False))
        if "centre" in known:
            x = x * known["spread"] + known["centre"]
        return self.prediction(x, torch.full((len(x),), self.subject, device=x.device)).flatten(1)


def _bring_to_sphere(positions: Tensor) -> Tensor:
    """Return positions of shape (..., n_channels, 3) around their mean, at a mean distance of one."""
    centred = positions - positions.mean(dim=-2, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).mean(dim=-2, keepdim=True).clamp_min(1e-12)


class PrototypePrediction(nn.Module):
    """Probabilities of classes, by the cosine of a network's output with the prototype of each class.

    Parameters
    ----------
    network
        Gives one vector per trial.
    prototypes : array of shape (n_classes, n_features)
        Of length one each.
    scale
        Inverse temperature.
    """

    prototypes: Tensor

    def __init__(self, network: NetworkPrediction, prototypes: np.ndarray, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale
        self.register_buffer("prototypes", torch.from_numpy(prototypes.astype(np.float32)))

    def forward(self, responses: Tensor, subject: Tensor) -> Tensor:
        """Return probabilities of shape (n_trials, n_classes); arguments as of `NetworkPrediction`."""
        brain = functional.normalize(self.network(responses, subject), dim=1)
        return torch.softmax(self.scale * brain @ self.prototypes.T, dim=1)


def take_inputs(fit: NetworkFit, responses: Responses) -> dict[str, Tensor]:
    """Return trials, and the number of each one's subject, as the modules take them.

    Raises
    ------
    DataError
        If a subject was not trained on, but subjects are aligned one by one.
    """
    index = fit.signal.index_subjects(responses.trials["subject"].astype(str))
    if fit.transform.alignment != "none" and (index == fit.signal.unknown_subject).any():
        raise DataError(
            "the encoder aligns each subject by its own training trials, so its exported form takes the subjects "
            f"{', '.join(fit.signal.subjects)} only."
        )
    data = np.array(responses.data, dtype=np.float32)
    return {"responses": torch.from_numpy(data), "subject": torch.from_numpy(index)}
