"""The prediction of a linear encoder or category decoder as a torch module, for export.

Owns nothing that is learnt: constants come from the fitted component, and the module does what its `predict` does.
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
