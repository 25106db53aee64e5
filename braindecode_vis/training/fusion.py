"""A weighted sum of several layers of an image network, its weights learnt with the brain encoder.

References
----------
Peters et al. (2018), ELMo, arXiv:1802.05365, for the softmax-weighted sum of layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from braindecode_vis.checks import DataError
from braindecode_vis.training.image_config import FusionConfig


class LayerFusion(nn.Module):
    """Weighted sum over the token axis of stacked targets.

    Parameters
    ----------
    config
        The settings.
    target_shape
        Tokens and features of one target.
    n_subjects
        Training subjects, for weights per subject.

    Raises
    ------
    DataError
        If the targets have no token axis.
    """

    def __init__(self, config: FusionConfig, target_shape: tuple[int, ...], n_subjects: int) -> None:
        super().__init__()
        if len(target_shape) != 2:
            raise DataError(
                "encoder.fusion weighs several layers, but the targets have one vector per image; set target.layer to "
                "several layers, target.kind to layers, or leave out encoder.fusion."
            )
        self.config = config
        self.n_tokens, self.n_features = target_shape
        rows = () if config.weights == "global" else (n_subjects,)
        self.logits = nn.Parameter(torch.zeros(*rows, self.n_tokens))

    @property
    def per_subject(self) -> bool:
        """Whether subjects have weights of their own."""
        return self.config.weights == "per_subject"

    def weigh(self, subject: Tensor | None = None) -> Tensor:
        """Return the weights, which sum to one: (n_tokens,), or (n, n_tokens) for subjects with weights of their own.

        Parameters
        ----------
        subject : integer tensor of shape (n,)
            Index of each subject; one beyond the last is an unknown one, and so is None.
        """
        weights = self.logits.softmax(dim=-1)
        if not self.per_subject:
            return weights
        mean = weights.mean(dim=0)
        return mean if subject is None else torch.cat([weights, mean[None]])[subject]

    def forward(self, stacked: Tensor, subject: Tensor | None = None) -> Tensor:
        """Return fused targets of shape (..., n, n_features) for flat ones of (..., n, n_tokens * n_features)."""
        tokens = stacked.unflatten(-1, (self.n_tokens, self.n_features))
        return (tokens * self.weigh(subject)[..., None]).sum(dim=-2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the logits as a group for the optimiser."""
        return [{"params": [self.logits], "lr_scale": self.config.lr_scale, "weight_decay": 0.0}]

    def describe(self, subjects: tuple[str, ...]) -> dict[str, list[float]]:
        """Return the weight of each token: under ``all``, or by subject with their mean under ``unknown``."""
        with torch.no_grad():
            if not self.per_subject:
                return {"all": self.weigh().tolist()}
            rows = self.logits.softmax(dim=-1).tolist()
            return {**dict(zip(subjects, rows, strict=True)), "unknown": self.weigh().tolist()}
