"""The module that is trained: a network, projectors of both sides, a regression head, and the objectives.

Owns how an `Outputs` is made from a batch. Knows nothing of epochs, optimisers or files. The image side is frozen
embeddings, or those of a network that is tuned, scaled by training statistics and, where asked for, fused over layers
and projected; text goes through the same projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.checks import ConfigError
from braindecode_vis.training.fusion import LayerFusion
from braindecode_vis.training.gathering import count_processes, gather_rows, get_rank
from braindecode_vis.training.lora import AdaptedTower
from braindecode_vis.training.objectives.objective import Outputs

#: Needs of an objective that hold for trials which are neither augmented nor part of a training step.
PLAIN_NEEDS = frozenset({"regression", "text"})


@dataclass
class Batch:
    """Tensors of one batch of n trials on the device, before any network.

    Parameters
    ----------
    data : tensor of shape (n, ...)
    subject, stimuli, concepts : integer tensors of shape (n,)
    target : tensor of shape (n, d_raw)
        Untouched target embeddings, flattened.
    views : tensor of shape (n_views, n, ...)
        Other views of the same trials.
    background : tensor of shape (n, ...)
        The pre-stimulus part of the trials.
    text : tensor of shape (n, d_raw)
    image_views : tensor of shape (n_views, n, d_raw)
    images : uint8 tensor of shape (n_images, side, side, 3)
        Each image of the batch once, for a network that is tuned.
    image_rows : integer tensor of shape (n,)
        Row of each trial's image in `images`.
    tuned : tensor of shape (n, d_raw)
        Embeddings by that network where they are known already.
    clusters : integer tensor of shape (n,)
    teacher : mapping
        `teacher_brain`, `teacher_image`, `queue_brain`, `queue_image` of `Outputs`.
    mix_partner, mix_weight
        As in `Outputs`.
    progress
        Share of the training that is done.
    """

    data: Tensor
    subject: Tensor
    stimuli: Tensor
    concepts: Tensor
    target: Tensor
    views: Tensor | None = None
    background: Tensor | None = None
    text: Tensor | None = None
    image_views: Tensor | None = None
    images: Tensor | None = None
    image_rows: Tensor | None = None
    tuned: Tensor | None = None
    clusters: Tensor | None = None
    teacher: dict[str, Tensor] | None = None
    mix_partner: Tensor | None = None
    mix_weight: Tensor | None = None
    progress: float = 0.0


class TargetScale(nn.Module):
    """What is done to target embeddings before the comparison; see `NetworkEncoderConfig.normalise_targets`.

    Parameters
    ----------
    kind
        ``none``, ``l2``, ``centre`` or ``zscore``.
    centre, spread : tensors of shape (d,)
        Statistics of the training images, copied: images and texts may start from the same, but must not share them.
    n_tokens
        Parts of a target that are brought to length one each, by ``l2``.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, kind: str, centre: Tensor, spread: Tensor, *, n_tokens: int = 1) -> None:
        super().__init__()
        self.kind, self.n_tokens = kind, n_tokens
        if kind in ("centre", "zscore"):
            self.register_buffer("centre", centre.clone())
        if kind == "zscore":
            self.register_buffer("spread", spread.clone())

    def forward(self, targets: Tensor) -> Tensor:
        """Return scaled targets of the same shape (..., d)."""
        if self.kind == "l2":
            tokens = targets.unflatten(-1, (self.n_tokens, -1))
            return functional.normalize(tokens, dim=-1).flatten(-2)
        if self.kind in ("centre", "zscore"):
            targets = targets - self.centre
        return targets / self.spread if self.kind == "zscore" else targets

    def undo(self, outputs: Tensor) -> Tensor:
        """Return outputs of the scaled space in the space of the targets; a length that was taken off stays off."""
        if self.kind == "zscore":
            outputs = outputs * self.spread
        return outputs + self.centre if self.kind in ("centre", "zscore") else outputs


class BrainImageModel(nn.Module):
    """Network, image side, regression head, target scaling and objectives.

    Parameters
    ----------
    network
        ``forward(data, subject)`` gives (n, n_outputs); see `encoders.signal`.
    brain_projector, image_projector
        Linear maps to the common size, or None.
    regression
        ``none``; ``shared`` (the network's own output); ``network`` (its second head, by ``forward_heads``); ``linear``
        (`regression_head` on its output).
    regression_head
        The map for ``linear``.
    target_scale, text_scale
        Scaling of image and text embeddings.
    objectives
        Built objectives, whose ``config`` has ``weight``, ``needs`` and ``is_active``.
    n_common
        Features of the space of comparison.
    fusion
        Weighted sum of the layers of a target.
    tower
        The image network that is tuned.

    Attributes
    ----------
    matches : pair of tensors or None
        Image and cosine of each trial of the last batch; kept if `keeps_matches` is set.
    """

    network: Any  # a module whose optional methods only some networks have
    regression_head: nn.Module | None
    brain_projector: nn.Linear | None
    image_projector: nn.Linear | None
    target_scale: TargetScale
    text_scale: TargetScale | None
    fusion: LayerFusion | None
    tower: AdaptedTower | None

    def __init__(
        self,
        network: nn.Module,
        *,
        brain_projector: nn.Linear | None,
        image_projector: nn.Linear | None,
        regression: str,
        regression_head: nn.Module | None,
        target_scale: TargetScale,
        text_scale: TargetScale | None,
        objectives: Sequence[Any],
        n_common: int,
        fusion: LayerFusion | None = None,
        tower: AdaptedTower | None = None,
    ) -> None:
        super().__init__()
        self.network, self.n_common = network, n_common
        self.fusion, self.tower = fusion, tower
        self.keeps_matches = False
        self.matches: tuple[Tensor, Tensor] | None = None
        self.brain_projector, self.image_projector = brain_projector, image_projector
        self.regression, self.regression_head = regression, regression_head
        self.target_scale, self.text_scale = target_scale, text_scale
        self.objectives = nn.ModuleList(objectives)
        self.needs: frozenset[str] = frozenset[str]().union(*(o.config.needs for o in objectives))
        if "brain_tokens" in self.needs and not hasattr(network, "forward_tokens"):
            raise ConfigError(
                f"an objective needs local outputs, which {type(network).__name__} does not give; choose another "
                "encoder.network.kind or leave that objective out."
            )

    @property
    def learns_space(self) -> bool:
        """Whether the space of comparison is another one than that of the targets."""
        return any(part is not None for part in (self.image_projector, self.fusion, self.tower))

    @property
    def has_subject_galleries(self) -> bool:
        """Whether an image has another vector for each subject."""
        return self.fusion is not None and self.fusion.per_subject

    def encode_brain(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the brain side of the comparison, shape (n, d)."""
        return self._project(self.network(data, subject))

    def encode_image(self, targets: Tensor, subject: Tensor | None = None) -> Tensor:
        """Return the image side of the comparison, shape (..., n, d), for raw embeddings of shape (..., n, d_raw).

        `subject` of shape (n,) matters where subjects have weights of their own; None is an unknown one.
        """
        scaled = self.target_scale(targets)
        if self.fusion is not None:
            scaled = self.fusion(scaled, subject)
        return scaled if self.image_projector is None else self.image_projector(scaled)

    def embed_images(self, batch: Batch) -> Tensor:
        """Return the raw embedding of each trial's image, shape (n, d_raw), by the tuned network if there is one."""
        if self.tower is None:
            return batch.target
        if batch.tuned is not None:
            return batch.tuned
        assert batch.images is not None
        return self.tower(batch.images)[batch.image_rows]

    def encode_text(self, text: Tensor) -> Tensor:
        """Return text embeddings on the image side, shape (n, d)."""
        assert self.text_scale is not None
        scaled = self.text_scale(text)
        return scaled if self.image_projector is None else self.image_projector(scaled)

    def encode_heads(self, data: Tensor, subject: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the brain side and the regression of the raw target, the latter None without a head."""
        if self.regression == "network":
            output, regression = self.network.forward_heads(data, subject)
            return self._project(output), regression
        output = self.network(data, subject)
        if self.regression == "shared":
            return self._project(output), output
        regression = None if self.regression_head is None else self.regression_head(output)
        return self._project(output), regression

    def _project(self, output: Tensor) -> Tensor:
        return output if self.brain_projector is None else self.brain_projector(output)

    def make_outputs(self, batch: Batch, *, plain: bool = False) -> Outputs:
        """Return what the objectives see of a batch.

        Parameters
        ----------
        batch
            Trials of this process.
        plain
            Leave out what only a training step has: views, background, local outputs, teacher, mixing.
        """
        needs = self.needs & PLAIN_NEEDS if plain else self.needs
        brain, regression = self.encode_heads(batch.data, batch.subject)
        image = self.encode_image(self.embed_images(batch), batch.subject)
        outputs = Outputs(brain, image, batch.stimuli, batch.concepts, progress=batch.progress)
        if "regression" in needs:
            outputs.regression, outputs.raw_target = regression, batch.target
        if "text" in needs and batch.text is not None:
            outputs.text = self.encode_text(batch.text)
        if plain:
            return outputs
        if "brain_views" in needs and batch.views is not None:
            outputs.brain_views = torch.stack([self.encode_brain(v, batch.subject) for v in batch.views])
        if "image_views" in needs and batch.image_views is not None:
            outputs.image_views = self.encode_image(batch.image_views, batch.subject)
        if "brain_tokens" in needs:
            outputs.brain_tokens = self._project(self.network.forward_tokens(batch.data, batch.subject))
        if "background" in needs and batch.background is not None:
            outputs.background = self.encode_brain(batch.background, batch.subject)
        if "teacher" in needs and batch.teacher is not None:
            for name, value in batch.teacher.items():
                setattr(outputs, name, value)
        outputs.clusters = batch.clusters
        outputs.mix_partner, outputs.mix_weight = batch.mix_partner, batch.mix_weight
        return outputs

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of the batch of all processes, and the value of each objective, (n_objectives,)."""
        outputs = gather_outputs(self.make_outputs(batch))
        if self.keeps_matches:
            cosine = functional.cosine_similarity(outputs.brain.detach(), outputs.image.detach(), dim=-1)
            self.matches = outputs.stimuli, cosine.float()
        values = [objective(outputs) for objective in self.objectives]
        return self._sum(values, self.objectives), torch.stack([v.detach().float() for v in values])

    def compute_plain_loss(self, batch: Batch) -> Tensor | None:
        """Return the loss of held-out trials by the objectives that can be computed there; None without any."""
        built: list[Any] = list(self.objectives)
        usable = [o for o in built if o.config.needs <= PLAIN_NEEDS]
        if not usable:
            return None
        outputs = self.make_outputs(batch, plain=True)
        return self._sum([objective(outputs) for objective in usable], usable)

    def _sum(self, values: Sequence[Tensor], objectives: Any) -> Tensor:
        # Objectives work in float32 whatever the precision of the network.
        return sum(o.config.weight * value.float() for o, value in zip(objectives, values, strict=True))


def gather_outputs(outputs: Outputs) -> Outputs:
    """Return the outputs of all processes together, in the order of their ranks."""
    if count_processes() == 1:
        return outputs
    gathered = Outputs(
        gather_rows(outputs.brain),
        gather_rows(outputs.image),
        gather_rows(outputs.stimuli),
        gather_rows(outputs.concepts),
        progress=outputs.progress,
        queue_brain=outputs.queue_brain,
        queue_image=outputs.queue_image,
    )
    for name in (
        "regression", "raw_target", "text", "brain_tokens", "background", "clusters", "teacher_brain",
        "teacher_image", "mix_weight",
    ):  # fmt: skip
        value = getattr(outputs, name)
        if value is not None:
            setattr(gathered, name, gather_rows(value))
    for name in ("brain_views", "image_views"):
        value = getattr(outputs, name)
        if value is not None:
            setattr(gathered, name, gather_rows(value, dim=1))
    if outputs.mix_partner is not None:
        gathered.mix_partner = gather_rows(outputs.mix_partner + get_rank() * len(outputs.brain))
    return gathered
