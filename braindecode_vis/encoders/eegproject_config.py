"""EEGProject: the plain residual projector over the flattened trial.

On averaged trials of 17 occipito-parietal channels it is the strongest simple encoder within a subject; across
subjects it has nothing that could adapt to one, and ignores who was recorded.

References
----------
Wu et al. (2025), Uncertainty-aware Blur Prior, arXiv:2503.04207 (``base/eeg_backbone.py`` of its code).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from braindecode_vis.encoders.signal import Signal
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from torch import nn


class EEGProjectConfig(Settings):
    """Flatten, linear layer, residual block of GELU, linear layer and dropout, layer norm.

    Parameters
    ----------
    dropout
        Probability in the residual block; the published value.
    width
        Size of the layers; None is the size of the target, as published. Another size adds a last linear layer
        (our choice).
    n_windows
        Number of neighbouring windows of time that get outputs of their own when an objective asks for local
        ones; no parameters belong to them (our choice).
    """

    kind: Literal["eegproject"] = "eegproject"
    dropout: float = Field(default=0.3, ge=0, lt=1)
    width: int | None = Field(default=None, ge=1)
    n_windows: int = Field(default=5, ge=1)

    def build(self, signal: Signal, n_outputs: int) -> nn.Module:
        """Return the network for trials of any axes; see `signal` for its interface."""
        from braindecode_vis.encoders.eegproject import EEGProject

        return EEGProject(signal, n_outputs, dropout=self.dropout, width=self.width, n_windows=self.n_windows)
