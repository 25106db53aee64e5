"""The prediction of a trained network as one torch module, for export: alignment, scaling, network, projector, units.

Owns nothing that is learnt: it holds copies of the parts of a `NetworkFit` that prediction needs, without the image
side and the objectives. A subject is given by its number in the order of training; the number of subjects stands for an
unknown one, which has no alignment of its own.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.checks import DataError

if TYPE_CHECKING:
    from braindecode_vis.arrays import Responses
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
