"""The predictions of linear encoders, of category decoders and of averages as torch modules, for export.

Owns nothing that is learnt: constants come from the fitted component, and a module does what its `predict` does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class LinearPrediction(nn.Module):
    """Standardise some features of a trial, map them linearly, and turn scores of classes into probabilities.

    Parameters
    ----------
    kept : int array of shape (n_kept,) or None
        Features in use; None takes all.
    mean, scale : arrays of shape (n_kept,)
    weights : array of shape (n_kept, n_outputs)
    offset : array of shape (n_outputs,)
    shape
        Of one output.
    classes
        Whether outputs are scores of classes; a single one is that of the second of two classes.
    """

    kept: Tensor
    mean: Tensor
    scale: Tensor
    weights: Tensor
    offset: Tensor

    def __init__(
        self,
        kept: np.ndarray | None,
        mean: np.ndarray,
        scale: np.ndarray,
        weights: np.ndarray,
        offset: np.ndarray,
        *,
        shape: tuple[int, ...],
        classes: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        index = np.arange(len(mean)) if kept is None else kept
        self.register_buffer("kept", torch.from_numpy(np.asarray(index, np.int64)))
        for name, array in (("mean", mean), ("scale", scale), ("weights", weights), ("offset", offset)):
            self.register_buffer(name, torch.from_numpy(np.array(array)))

    def forward(self, responses: Tensor) -> Tensor:
        """Return predictions of shape (n_trials, *shape), or probabilities of shape (n_trials, n_classes).

        Parameters
        ----------
        responses : float32 tensor of shape (n_trials, ...)
        """
        # In the precision of the statistics: category decoders compute in float64.
        data = responses.flatten(1).index_select(1, self.kept).to(self.mean.dtype)
        scores = ((data - self.mean) / self.scale).to(self.weights.dtype) @ self.weights + self.offset
        if not self.classes:
            return scores.unflatten(1, self.shape) if len(self.shape) > 1 else scores
        if scores.shape[1] > 1:
            return torch.softmax(scores, dim=1)
        second = torch.sigmoid(scores)
        return torch.cat([1 - second, second], dim=1)


class LinearSteps(nn.Sequential):
    """Linear predictions one after another, so that a map of few components is not stored as a large one."""

    def forward(self, responses: Tensor) -> Tensor:
        """Return what the last step predicts; see `LinearPrediction`."""
        return super().forward(responses)


class AveragePrediction(nn.Module):
    """The weighted mean of the directions from `centre` in which several modules predict.

    Parameters
    ----------
    members
        Module of each member, and whether it takes the subject of each trial.
    weights
        Of the members; their sum is one.
    centre : array of shape (n_features,)
    length
        Of the mean of members that agree.
    shape
        Of one output.
    """

    centre: Tensor

    def __init__(
        self,
        members: list[tuple[nn.Module, bool]],
        weights: np.ndarray,
        centre: np.ndarray,
        length: float,
        *,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(member for member, _ in members)
        self.takes_subject = [takes for _, takes in members]
        self.weights, self.length, self.shape = weights.tolist(), length, shape
        self.register_buffer("centre", torch.from_numpy(np.array(centre)))

    def forward(self, responses: Tensor, subject: Tensor | None = None) -> Tensor:
        """Return one embedding per trial, shape (n_trials, *shape).

        Parameters
        ----------
        responses : float32 tensor of shape (n_trials, ...)
        subject : int64 tensor of shape (n_trials,), optional
            Needed if a member takes it.
        """
        total = torch.zeros_like(self.centre)
        for member, takes, weight in zip(self.members, self.takes_subject, self.weights, strict=True):
            found = member(responses, subject) if takes else member(responses)
            away = found.flatten(1) - self.centre
            total = total + weight * away / away.norm(dim=1, keepdim=True).clamp_min(1e-12)
        vectors = self.centre + self.length * total
        return vectors.unflatten(1, self.shape) if len(self.shape) > 1 else vectors
