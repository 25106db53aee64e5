"""The fMRI networks of MindEye: its residual perceptron, and MindEye2's space that subjects share.

Knows nothing of training. `training.fitted` gives a trained shared space the layer of a new subject.

References
----------
Scotti et al. (2023), arXiv:2305.18274; Scotti et al. (2024), arXiv:2403.11207.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.signal import Signal

_DROPOUT = 0.15  # in each block
_PROJECTOR = 2048  # units of MindEye's projector
_DECAY = 0.01  # weight decay of MindEye2, of the layers of subjects and of all others


class ResidualMlp(nn.Module):
    """MindEye's backbone, with its projector if there are two heads.

    Parameters
    ----------
    signal
        Trials of voxels or parcels.
    n_outputs, n_regression
        Sizes of the contrastive and of the regression output; None for one size.
    hidden, n_blocks, heads, n_tokens
        See `ResidualMlpConfig`.
    """

    def __init__(
        self,
        signal: Signal,
        n_outputs: int,
        n_regression: int | None,
        *,
        hidden: int,
        n_blocks: int,
        heads: str,
        n_tokens: int,
    ) -> None:
        super().__init__()
        check_request(signal, heads, n_regression)
        if len(set(signal.n_voxels)) > 1:
            raise DataError(
                f"the subjects have {min(signal.n_voxels)} to {max(signal.n_voxels)} different voxels, "
                "which one residual_mlp cannot handle; train one network per subject, or set "
                "encoder.network.kind=shared_space."
            )
        n_inputs, n_backbone = math.prod(signal.shape), n_regression or n_outputs
        self.n_tokens = n_tokens
        token_sizes = [get_token_size(n, n_tokens) for n in (n_backbone, n_outputs)]
        self.first = _make_layer(n_inputs, hidden, 0.5)
        self.blocks = nn.ModuleList(_make_layer(hidden, hidden, _DROPOUT) for _ in range(n_blocks))
        self.last = nn.Linear(hidden, n_backbone)
        self.projector = (
            make_projector(token_sizes[0], _PROJECTOR, token_sizes[1]) if heads == "two" else None
        )

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the (contrastive) output, shape (batch, n_outputs); `subject` is not read."""
        return _project(self.projector, self.forward_backbone(data), self.n_tokens)

    def forward_regression(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return what comes before the projector, shape (batch, n_regression)."""
        _check_two_heads(self.projector is not None)
        return self.forward_backbone(data)

    def forward_heads(self, data: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
        """Return both outputs from one pass."""
        backbone = self.forward_regression(data, subject)
        return _project(self.projector, backbone, self.n_tokens), backbone

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the biases, which do not decay; the optimiser's weight decay goes for all other parameters."""
        biases = [p for name, p in self.named_parameters() if name.endswith("bias") and p.requires_grad]
        return [{"params": biases, "weight_decay": 0.0}] if biases else []

    def forward_backbone(self, data: Tensor) -> Tensor:
        """Return the output of the last linear layer."""
        hidden = self.first(data.flatten(1))  # voxels, and times after them
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


class SharedSpace(nn.Module):
    """Ridge layers of the subjects, linear layer and projector of MindEye2, with mixer blocks of ours between.

    Parameters
    ----------
    signal
        Trials of voxels or parcels; rows are padded where subjects have different numbers of voxels.
    n_outputs, n_regression
        Sizes of the contrastive and of the regression output; None for one size.
    shared, n_blocks, heads, n_tokens
        See `SharedSpaceConfig`.
    """

    def __init__(
        self,
        signal: Signal,
        n_outputs: int,
        n_regression: int | None,
        *,
        shared: int,
        n_blocks: int,
        heads: str,
        n_tokens: int,
    ) -> None:
        super().__init__()
        check_request(signal, heads, n_regression)
        self.signal, self.heads, self.n_tokens = signal, heads, n_tokens
        n_backbone = n_regression or n_outputs
        sizes = [get_token_size(n, n_tokens) for n in (n_backbone, n_outputs)]
        n_rest = math.prod(signal.shape[1:])  # a time axis gives each voxel that many values
        own = signal.n_voxels or (signal.shape[0],) * len(signal.subjects)
        self.subjects = nn.ModuleList(nn.Linear(n * n_rest, shared) for n in own)
        self.blocks = nn.ModuleList(MixerBlock(shared) for _ in range(n_blocks))
        self.last = nn.Linear(shared, n_backbone)
        self.projector = make_projector(sizes[0], sizes[0], sizes[1])

    def forward(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the (contrastive) output.

        Parameters
        ----------
        data : tensor of shape (batch, n_voxels) or (batch, n_voxels, n_times)
            Rows padded to the largest number of voxels.
        subject : integer tensor of shape (batch,)

        Returns
        -------
        tensor of shape (batch, n_outputs)

        Raises
        ------
        DataError
            If a trial is of an unknown subject and there is more than one layer to choose from.
        """
        return _project(self.projector, self.forward_backbone(data, subject), self.n_tokens)

    def forward_regression(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return what comes before the projector, shape (batch, n_regression)."""
        _check_two_heads(self.heads == "two")
        return self.forward_backbone(data, subject)

    def forward_heads(self, data: Tensor, subject: Tensor) -> tuple[Tensor, Tensor]:
        """Return both outputs from one pass."""
        backbone = self.forward_regression(data, subject)
        return _project(self.projector, backbone, self.n_tokens), backbone

    def forward_backbone(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the output of the last linear layer."""
        shared = self.share(data, subject)
        for block in self.blocks:
            shared = block(shared)
        return self.last(shared)

    def share(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return each trial in the shared space, shape (batch, shared)."""
        if len(self.subjects) == 1:  # the only layer answers for every subject with as many voxels
            return self._apply_layer(0, data.flatten(1))
        return apply_by_subject(self._apply_layer, data.flatten(1), subject, self.signal)

    def _apply_layer(self, index: int, rows: Tensor) -> Tensor:
        layer = self.subjects[index]
        assert isinstance(layer, nn.Linear)
        if rows.shape[1] < layer.in_features:
            raise DataError(
                f"subject {self.signal.subjects[index]} has {layer.in_features} voxels, but these rows only "
                f"{rows.shape[1]}; they belong to another data set."
            )
        return layer(rows[:, : layer.in_features])  # what follows a subject's own voxels is padding

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return trainable parameters with their weight decay: ridge layers, all others but biases, biases."""
        ridge = [p for p in self.subjects.parameters() if p.requires_grad]
        mine = {id(p) for p in self.subjects.parameters()}
        others = [(n, p) for n, p in self.named_parameters() if id(p) not in mine and p.requires_grad]
        # MindEye2's optimiser spares biases, and norms by names that none of its norms has: their scales decay.
        groups = [
            {"params": ridge, "weight_decay": _DECAY},
            {"params": [p for n, p in others if not n.endswith("bias")], "weight_decay": _DECAY},
            {"params": [p for n, p in others if n.endswith("bias")], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def apply_by_subject(
    apply: Callable[[int, Tensor], Tensor], rows: Tensor, subject: Tensor, signal: Signal
) -> Tensor:
    """Return what `apply` gives for the number of each subject and its rows, in the order of the batch.

    Raises
    ------
    DataError
        If a row is of a subject outside the training.
    """
    present: list[int] = subject.unique().tolist() or [0]  # an empty batch has no subject
    if present[-1] >= len(signal.subjects) or present[0] < 0:
        raise DataError(
            f"a trial is of a subject outside {', '.join(signal.subjects)}: the voxels of a new "
            "subject have no weights yet; first adapt the network to this subject with some of its trials."
        )
    groups = [(subject == index).nonzero().squeeze(1) for index in present]
    parts = [apply(i, rows[mine]) for i, mine in zip(present, groups, strict=True)]
    return torch.cat(parts)[torch.cat(groups).argsort()]  # back in the order of the batch


class MixerBlock(nn.Module):
    """Residual mixing within the vector of a trial; see `SharedSpaceConfig`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.within = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(width, width),
        )

    def forward(self, shared: Tensor) -> Tensor:
        """Return vectors of the same shape (batch, width)."""
        return shared + self.within(shared)


def make_projector(n_inputs: int, hidden: int, n_outputs: int) -> nn.Sequential:
    """Return MindEye's projector: three times LayerNorm, GELU, linear."""
    return nn.Sequential(
        nn.LayerNorm(n_inputs), nn.GELU(), nn.Linear(n_inputs, hidden),
        nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, n_outputs),
    )  # fmt: skip


def _make_layer(n_inputs: int, n_outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_inputs, n_outputs), nn.LayerNorm(n_outputs), nn.GELU(), nn.Dropout(dropout)
    )


def _project(projector: nn.Module | None, backbone: Tensor, n_tokens: int) -> Tensor:
    if projector is None:
        return backbone
    return projector(backbone.unflatten(1, (n_tokens, -1))).flatten(1)  # each token on its own


def check_request(signal: Signal, heads: str, n_regression: int | None) -> None:
    """Refuse responses without voxels, and a regression output that the heads do not give."""
    if signal.dims[0] not in ("voxel", "parcel"):
        raise DataError(
            f"this network reads voxels or parcels, but the responses have {' x '.join(signal.dims)}; "
            "choose another encoder.network.kind."
        )
    if n_regression is not None and heads == "one":
        raise ConfigError(
            "a regression objective next to a contrastive one needs the output before the projector; "
            "set encoder.network.heads=two."
        )


def _check_two_heads(two: bool) -> None:
    if not two:
        raise DataError("this network has one head; set encoder.network.heads=two for a regression output.")


def get_token_size(n_outputs: int, n_tokens: int) -> int:
    """Return the size of a token; raise `ConfigError` unless the outputs part into tokens of equal size."""
    if n_outputs % n_tokens:
        raise ConfigError(
            f"{n_outputs} outputs cannot be divided into {n_tokens} tokens of equal size; correct "
            "encoder.network.n_tokens."
        )
    return n_outputs // n_tokens
