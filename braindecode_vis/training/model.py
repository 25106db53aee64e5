"""The module that is trained: a network, projectors of both sides, a regression head, and the objectives; its teacher.

Owns how the module is built from settings, signal and target, and how an `Outputs` is made from a batch. Knows nothing
of epochs, optimisers or files. The image side is frozen embeddings, or those of a network that is tuned, scaled by
training statistics and, where asked for, fused over layers and projected; text goes through the same projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Network, NetworkSettings
from braindecode_vis.base.devices import count_processes, gather_rows, get_rank, seeded
from braindecode_vis.base.roles import complete
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.training.augment import find_sfreq
from braindecode_vis.training.image_side import LayerFusion
from braindecode_vis.training.lora import AdaptedTower, Shapes
from braindecode_vis.training.objectives.objective import NEED_FIELDS, Outputs, StepSizes, compute_matches
from braindecode_vis.training.optimisation import MovingAverage

#: Needs of an objective that hold for trials which are neither augmented nor part of a training step.
PLAIN_NEEDS = frozenset(
    {"regression", "text", "words", "attributes", "sentences", "swapped", "local_outputs", "patches"}
)
#: Fields of a batch that objectives see as they are, each by the need that asks for it.
_PASSED_ON = {
    name: need for need in ("words", "attributes", "sentences", "swapped") for name in NEED_FIELDS[need]
}


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
    mix_partner, mix_weight, words, attributes, sentences, swapped, swapped_known, seed
        As in `Outputs`.
    token_data : tensor of shape (2, n, ...)
        Two augmentations of the trials, for local outputs.
    token_offsets : tensor of shape (2, n)
        By how many milliseconds each of them is late.
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
    words: Tensor | None = None
    attributes: Tensor | None = None
    sentences: Tensor | None = None
    swapped: Tensor | None = None
    swapped_known: Tensor | None = None
    token_data: Tensor | None = None
    token_offsets: Tensor | None = None
    seed: int = 0
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
            # A buffer: it moves with the module and is written with its weights.
            self.register_buffer("centre", centre.clone())
        if kind == "zscore":
            self.register_buffer("spread", spread.clone())

    def forward(self, targets: Tensor) -> Tensor:
        """Return scaled targets of the same shape (..., d)."""
        if self.kind == "l2":
            # (..., n_tokens, n_features): each layer gets length one by itself
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
        Maps to the common size, or None.
    shared_projector
        Linear map that follows on both sides, or None.
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
        Image and logit of each trial of the last batch; kept if `keeps_matches` is set.
    sizes : StepSizes or None
        What objectives with weights of their own were prepared for.
    """

    network: nn.Module
    regression_head: nn.Module | None
    brain_projector: nn.Module | None
    image_projector: nn.Module | None
    shared_projector: nn.Linear | None
    target_scale: TargetScale
    text_scale: TargetScale | None
    fusion: LayerFusion | None
    tower: AdaptedTower | None

    def __init__(
        self,
        network: nn.Module,
        *,
        brain_projector: nn.Module | None,
        image_projector: nn.Module | None,
        regression: str,
        regression_head: nn.Module | None,
        target_scale: TargetScale,
        text_scale: TargetScale | None,
        objectives: Sequence[Any],
        n_common: int,
        fusion: LayerFusion | None = None,
        tower: AdaptedTower | None = None,
        shared_projector: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.network, self.n_common = network, n_common
        self.fusion, self.tower = fusion, tower
        # Only the rule of uncertainty reads them; the logit of every pair is not free.
        self.keeps_matches = False
        self.matches: tuple[Tensor, Tensor] | None = None
        self.sizes: StepSizes | None = None
        self.brain_projector, self.image_projector = brain_projector, image_projector
        self.shared_projector = shared_projector
        self.regression, self.regression_head = regression, regression_head
        self.target_scale, self.text_scale = target_scale, text_scale
        self.objectives = nn.ModuleList(objectives)
        self.needs: frozenset[str] = frozenset[str]().union(*(o.config.needs for o in objectives))
        if self.needs & {"brain_tokens", "token_views"} and self.whole_network.forward_tokens is None:
            raise ConfigError(
                f"an objective needs local outputs, which {type(network).__name__} does not give; choose another "
                "encoder.network.kind or leave that objective out."
            )

    @property
    def whole_network(self) -> Network:
        """The network with what its role lets it leave out; not kept, since a module is registered once."""
        return complete(Network, self.network)

    @property
    def _swaps_are_targets(self) -> bool:
        built: list[Any] = list(self.objectives)
        return any("swapped" in o.config.needs and o.config.space == "target" for o in built)

    @property
    def learns_space(self) -> bool:
        """Whether the space of comparison is another one than that of the targets."""
        parts = (self.image_projector, self.shared_projector, self.fusion, self.tower)
        return any(part is not None for part in parts)

    @property
    def has_subject_galleries(self) -> bool:
        """Whether an image has another vector for each subject."""
        return self.fusion is not None and self.fusion.per_subject

    def encode_brain(self, data: Tensor, subject: Tensor) -> Tensor:
        """Return the brain side of the comparison, shape (n, d)."""
        return self.project_brain(self.network(data, subject))

    def encode_tokens(self, data: Tensor, subject: Tensor) -> Tensor | None:
        """Return the local outputs in the space of comparison, shape (n, n_tokens, d); None of a network without."""
        forward_tokens = self.whole_network.forward_tokens
        return None if forward_tokens is None else self.project_brain(forward_tokens(data, subject))

    def encode_image(self, targets: Tensor, subject: Tensor | None = None) -> Tensor:
        """Return the image side of the comparison, shape (..., n, d), for raw embeddings of shape (..., n, d_raw).

        `subject` of shape (n,) matters where subjects have weights of their own; None is an unknown one.
        """
        scaled = self.target_scale(targets)
        if self.fusion is not None:
            # (..., n, n_tokens * n_features) -> (..., n, n_features)
            scaled = self.fusion(scaled, subject)
        return self._project(scaled, self.image_projector)

    def embed_images(self, batch: Batch) -> Tensor:
        """Return the raw embedding of each trial's image, shape (n, d_raw), by the tuned network if there is one."""
        if self.tower is None:
            return batch.target
        if batch.tuned is not None:
            return batch.tuned
        assert batch.images is not None
        return self.tower(batch.images)[batch.image_rows]  # (n_images, d_raw) -> (n, d_raw)

    def encode_text(self, text: Tensor) -> Tensor:
        """Return text embeddings on the image side, shape (n, d)."""
        assert self.text_scale is not None
        return self._project(self.text_scale(text), self.image_projector)

    def encode_heads(self, data: Tensor, subject: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the brain side and the regression of the raw target, the latter None without a head."""
        if self.regression == "network":
            forward_heads = self.whole_network.forward_heads
            assert forward_heads is not None
            output, regression = forward_heads(data, subject)
            return self.project_brain(output), regression
        output = self.network(data, subject)
        if self.regression == "shared":
            # ATM regresses the very vector that is compared.
            return self.project_brain(output), output
        regression = None if self.regression_head is None else self.regression_head(output)
        return self.project_brain(output), regression

    def encode_token_views(self, views: Tensor, subject: Tensor) -> Tensor:
        """Return the local outputs of views of shape (n_views, n, ...), shape (n_views, n, n_tokens, d)."""
        found = [self.encode_tokens(view, subject) for view in views]
        return torch.stack([tokens for tokens in found if tokens is not None])  # checked when this was built

    def project_brain(self, output: Tensor) -> Tensor:
        """Return outputs of the network, shape (..., n_outputs), in the space of comparison, shape (..., d)."""
        return self._project(output, self.brain_projector)

    def _project(self, vectors: Tensor, own: nn.Module | None) -> Tensor:
        vectors = vectors if own is None else own(vectors)
        return vectors if self.shared_projector is None else self.shared_projector(vectors)

    def make_outputs(self, batch: Batch, *, plain: bool = False) -> Outputs:
        """Return what the objectives see of a batch.

        Parameters
        ----------
        batch
            Trials of this process.
        plain
            Leave out what only a training step has: views, background, local outputs, teacher, mixing.
        """
        # Held-out trials have no augmented views, no teacher and no partner to be mixed with.
        needs = self.needs & PLAIN_NEEDS if plain else self.needs
        brain, regression = self.encode_heads(batch.data, batch.subject)
        image = self.encode_image(self.embed_images(batch), batch.subject)
        outputs = Outputs(
            brain, image, batch.stimuli, batch.concepts, progress=batch.progress, seed=batch.seed
        )
        if "regression" in needs:
            outputs.regression, outputs.raw_target = regression, batch.target
        if "patches" in needs:
            outputs.raw_target = batch.target
        if "text" in needs and batch.text is not None:
            outputs.text = self.encode_text(batch.text)
        if "brain_tokens" in needs or "local_outputs" in needs:
            tokens = self.encode_tokens(batch.data, batch.subject)
            outputs.brain_tokens = brain[:, None] if tokens is None else tokens  # (n, n_tokens, d)
        for name, need in _PASSED_ON.items():
            if need in needs:
                setattr(outputs, name, getattr(batch, name))
        if outputs.swapped is not None and self._swaps_are_targets:
            # (n, n_swaps, d_raw) -> (n_swaps, n, d) and back, as texts that are targets are projected.
            outputs.swapped = self.encode_image(outputs.swapped.transpose(0, 1), batch.subject).transpose(
                0, 1
            )
        if plain:
            return outputs
        if "brain_views" in needs and batch.views is not None:
            # (n_views, n, d)
            outputs.brain_views = torch.stack([self.encode_brain(v, batch.subject) for v in batch.views])
        if "image_views" in needs and batch.image_views is not None:
            outputs.image_views = self.encode_image(batch.image_views, batch.subject)
        if "token_views" in needs and batch.token_data is not None:
            outputs.token_views = self.encode_token_views(batch.token_data, batch.subject)
            outputs.token_offsets = batch.token_offsets
        if "background" in needs and batch.background is not None:
            outputs.background = self.encode_brain(batch.background, batch.subject)
        if batch.teacher is not None:
            for name, value in batch.teacher.items():
                setattr(outputs, name, value)
        outputs.clusters = batch.clusters
        outputs.mix_partner, outputs.mix_weight = batch.mix_partner, batch.mix_weight
        return outputs

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of the batch of all processes, and the value of each objective, (n_objectives,)."""
        # Negatives come from all processes; the gradient of a gathered row goes home.
        outputs = gather_outputs(self.make_outputs(batch))
        if self.keeps_matches:
            # Of the very batch that is learnt from, before its update.
            self.matches = outputs.stimuli, compute_matches(self.objectives, outputs)
        values = [objective(outputs) for objective in self.objectives]
        return self._sum(values, self.objectives, outputs.progress), torch.stack(
            [v.detach().float() for v in values]
        )

    def compute_plain_loss(self, batch: Batch) -> Tensor | None:
        """Return the loss of held-out trials by the objectives that can be computed there; None without any."""
        built: list[Any] = list(self.objectives)
        usable = [o for o in built if o.config.needs <= PLAIN_NEEDS]
        if not usable:
            return None
        outputs = self.make_outputs(batch, plain=True)
        return self._sum([objective(outputs) for objective in usable], usable, outputs.progress)

    def _sum(self, values: Sequence[Tensor], objectives: Any, progress: float) -> Tensor:
        # Objectives work in float32 whatever the precision of the network.
        weights = [objective.config.weigh(progress) for objective in objectives]
        return sum(weight * value.float() for weight, value in zip(weights, values, strict=True))


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
        seed=outputs.seed,
    )
    for name in (
        "regression", "raw_target", "text", "brain_tokens", "background", "clusters", "teacher_brain",
        "teacher_image", "mix_weight", *_PASSED_ON,
    ):  # fmt: skip
        value = getattr(outputs, name)
        if value is not None:
            setattr(gathered, name, gather_rows(value))
    for name in ("brain_views", "image_views", "token_views", "token_offsets", "teacher_tokens"):
        value = getattr(outputs, name)
        if value is not None:
            # rows stand behind the axis of views
            setattr(gathered, name, gather_rows(value, dim=1))
    if outputs.mix_partner is not None:
        # Partners are rows of their own process; here they become rows of the gathered batch.
        gathered.mix_partner = gather_rows(outputs.mix_partner + get_rank() * len(outputs.brain))
    return gathered


class Queue:
    """The last outputs of the teacher on both sides.

    Parameters
    ----------
    size
        Number of rows kept; 0 keeps none.
    n_features
        Length of a row.
    device
        Where they lie.
    """

    def __init__(self, size: int, n_features: int, device: torch.device) -> None:
        # brain and image side by side, a ring that is filled over and over
        self.rows = torch.zeros(2, size, n_features, device=device)
        self.next = self.count = 0

    def add(self, brain: Tensor, image: Tensor) -> None:
        """Put a batch in, over the oldest rows."""
        size = self.rows.shape[1]
        if not size:
            return
        new = torch.stack([brain, image])[:, -size:].float()
        # the oldest rows are the next ones
        places = (torch.arange(new.shape[1], device=new.device) + self.next) % size
        self.rows[:, places] = new
        self.next = (self.next + new.shape[1]) % size
        self.count = min(size, self.count + new.shape[1])

    def get(self) -> tuple[Tensor, Tensor]:
        """Return brain and image rows, copies of shape (count, n_features)."""
        # Copies: the next batch overwrites the ring while these are in a graph.
        return self.rows[0, : self.count].clone(), self.rows[1, : self.count].clone()


class Teacher:
    """A moving-average model with its queue; sees trials without augmentation, their other view if there is one."""

    def __init__(self, model: BrainImageModel, *, decay: float, queue: int, n_features: int) -> None:
        self.needs = model.needs
        self.average = MovingAverage(model, decay, warm_up=False)
        self.average.model.objectives = nn.ModuleList()  # their temperatures are not averaged
        device = next(model.parameters()).device
        self.queue = Queue(queue, n_features, device)

    @torch.no_grad()
    def make_targets(self, batch: Batch, plain: Tensor) -> dict[str, Tensor]:
        """Return the teacher's parts of `Outputs` and put this batch into the queue for the next ones.

        Parameters
        ----------
        batch
            The batch, for its targets.
        plain : tensor of shape (n, ...)
            The trials that the teacher sees.
        """
        made: dict[str, Tensor] = {}
        if batch.token_data is not None and "teacher_tokens" in self.needs:
            made["teacher_tokens"] = self.average.model.encode_token_views(batch.token_data, batch.subject)
        if "teacher" not in self.needs:
            return made
        # float(): half precision of an autocast would be kept in the queue.
        brain = self.average.model.encode_brain(plain, batch.subject).float()
        images = self.average.model.embed_images(batch)
        image = self.average.model.encode_image(images, batch.subject).float()
        queue_brain, queue_image = self.queue.get()
        # After it was read: a batch must not meet itself among the earlier ones.
        self.queue.add(gather_rows(brain), gather_rows(image))
        return made | {
            "teacher_brain": brain,
            "teacher_image": image,
            "queue_brain": queue_brain,
            "queue_image": queue_image,
        }

    def follow(self, model: BrainImageModel, update: int) -> None:
        """Move one step toward `model`."""
        self.average.follow(model, update)


def build_model(
    settings: Any,
    signal: Signal,
    target_shape: tuple[int, ...],
    *,
    seed: int,
    scales: tuple[TargetScale, TargetScale | None],
    adapted: Shapes | None = None,
    sizes: StepSizes | None = None,
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
    sizes
        What is known of words, attributes, sentences and concepts, for objectives with weights of their own.
    """
    projector, n_targets = settings.projector, int(np.prod(target_shape))
    fusion = None
    if settings.fusion is not None:
        # A draw of its own, so that the other weights are those of a training without it.
        with seeded(derive_seed(seed, "fusion")):
            fusion = LayerFusion(settings.fusion, target_shape, len(signal.subjects))
    n_image = n_targets if fusion is None else fusion.n_features
    n_common = n_image if projector is None else projector.size
    n_outputs = n_common
    if projector is not None and projector.sides != "image":
        # With a map of its own the brain side need not have the common size, and keeps that of the target.
        n_outputs = projector.brain_width or n_image
    regression = _choose_regression(settings, n_outputs, n_targets)
    with seeded(derive_seed(seed, "initial_weights")):
        if regression == "network":
            # Weights are drawn in a fixed order, so that an option that adds none leaves the others as they were.
            network = settings.network.build(signal, n_outputs, n_regression=n_targets)
        else:
            network = settings.network.build(signal, n_outputs)
        check_weights_exist(network, settings.network.kind)
        sides = "" if projector is None else projector.sides
        hidden = None if projector is None else projector.hidden
        brain_projector = make_map(n_outputs, n_common, hidden) if sides in ("both", "brain") else None
        image_projector = make_map(n_image, n_common, hidden) if sides in ("both", "image") else None
        regression_head = nn.Linear(n_outputs, n_targets) if regression == "linear" else None
        objectives = [objective.build() for objective in settings.objectives]
        for module, objective in zip(objectives, settings.objectives, strict=True):
            module.config = (
                objective  # for weight, phase and needs; one from outside need not keep its settings
            )
        shared = projector is not None and projector.shared
        model = BrainImageModel(
            network,
            shared_projector=nn.Linear(n_common, n_common) if shared else None,
            brain_projector=brain_projector,
            image_projector=image_projector,
            regression=regression,
            regression_head=regression_head,
            target_scale=scales[0],
            text_scale=scales[1],
            objectives=objectives,
            n_common=n_common,
            fusion=fusion,
            # Last, so that the other weights are those of a training without it.
            tower=None if settings.image_tower is None else AdaptedTower(settings.image_tower, adapted),
        )
    prepare_objectives(
        model,
        replace(
            sizes or StepSizes(), n_common=n_common, n_outputs=n_outputs, target_shape=tuple(target_shape)
        ),
        signal, seed=seed,
    )  # fmt: skip
    return model


def make_map(n_inputs: int, n_outputs: int, hidden: int | None) -> nn.Module:
    """Return a linear map, or one with a hidden layer of so many units."""
    if hidden is None:
        return nn.Linear(n_inputs, n_outputs)
    return nn.Sequential(nn.Linear(n_inputs, hidden), nn.GELU(), nn.Linear(hidden, n_outputs))


def prepare_objectives(model: BrainImageModel, sizes: StepSizes, signal: Signal, *, seed: int) -> None:
    """Let objectives make weights whose sizes a step decides, each from a draw of its own; others stay as they were."""
    waiting = [(n, o) for n, o in enumerate(model.objectives) if getattr(o, "has_sizes", False)]
    if not waiting:
        return
    forward_tokens = model.whole_network.forward_tokens
    if forward_tokens is not None and model.needs & {"brain_tokens", "token_views", "local_outputs"}:
        model.eval()
        with torch.no_grad():
            trial = torch.zeros(1, *signal.shape), torch.zeros(1, dtype=torch.long)
            n_tokens = int(forward_tokens(*trial).shape[1])
        sizes = replace(sizes, n_tokens=n_tokens, token_step=_find_token_step(model, signal, n_tokens))
        model.train()
    model.sizes = sizes
    for number, objective in waiting:
        with seeded(derive_seed(seed, "objective_weights", number)):
            cast(Any, objective).prepare(sizes)


def _find_token_step(model: BrainImageModel, signal: Signal, n_tokens: int) -> float | None:
    """Return the milliseconds from one local output to the next; None if they are not in time, or nobody knows."""
    rate, step = find_sfreq(signal), model.whole_network.token_step
    if step == 0 or signal.dims[-1] != "time" or rate is None:
        return None
    return 1000 / rate * (signal.shape[-1] / n_tokens if step is None else step)


def check_weights_exist(network: nn.Module, kind: str) -> None:
    """Raise `ConfigError` if a weight of the network waits for data, as in torch's lazy layers.

    A stored fit is read into a network that has seen no data, so every weight must have its shape after `build`.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"the network {kind!r} has no weights yet in {name!r} (a lazy layer): build must give every weight its "
                "shape from signal.shape and n_outputs, since a stored fit is read into a network that "
                "has seen no data."
            )


def _choose_regression(settings: Any, n_outputs: int, n_targets: int) -> str:
    if "regression" not in settings.needs:
        return "none"
    two_heads = complete(NetworkSettings, settings.network).has_two_heads
    wanted = settings.regression_head
    if wanted == "auto":
        plain = settings.projector is None and settings.fusion is None
        return "network" if two_heads else "shared" if plain else "linear"
    if wanted == "network" and not two_heads:
        raise ConfigError(
            f"encoder.regression_head is network, but {settings.network.kind} has no second head; use "
            "shared or linear."
        )
    if wanted == "shared" and n_outputs != n_targets:
        raise ConfigError(
            f"encoder.regression_head is shared, but the network has {n_outputs} outputs and the target {n_targets} "
            "values; use linear."
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
    # float64: a hundred thousand float32 values lose digits in a running sum
    mean = vectors.mean(axis=0, dtype=np.float64)
    centre = torch.from_numpy(mean.astype(np.float32))
    if kind == "centre":
        return TargetScale(kind, centre, torch.zeros(0))
    # Some features at a time: all of them less their mean take twice the memory of the targets.
    parts = np.array_split(vectors, -(-vectors.shape[1] // 64), axis=1)
    std = np.concatenate([part.std(axis=0, dtype=np.float64) for part in parts])
    # A feature that never varies in training would be divided by rounding.
    std = np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    return TargetScale(kind, centre, torch.from_numpy(std.astype(np.float32)))


def takes_unknown_subjects(model: BrainImageModel, signal: Signal) -> bool:
    """Say whether the network, on the CPU, gives an output for a subject it has never seen.

    Raises
    ------
    ConfigError
        If that first output made weights which were not there after `build`.
    """
    # Tried rather than asked, since networks from outside need not say it.
    trial = torch.zeros(1, *signal.shape)
    subject = torch.full((1,), signal.unknown_subject, dtype=torch.long)
    training, built = model.training, set(model.network.state_dict())
    takes = True
    model.eval()
    try:
        with torch.no_grad():
            model.network(trial, subject)
    except (IndexError, DataError):
        takes = False
    finally:
        model.train(training)
    grown = sorted(set(model.network.state_dict()) - built)
    if grown:
        raise ConfigError(
            f"the network creates its weights {grown[0]!r} in its first forward pass: create them in "
            "build, since a stored fit is read into a network that has seen no data."
        )
    return takes


def estimate_training_bytes(model: BrainImageModel, signal: Signal, batch_size: int) -> int:
    """Return about how much memory training holds beside its data: weights and what a batch keeps for the gradient.

    Parameters
    ----------
    model
        On the CPU.
    signal
        What its network takes.
    batch_size
        Trials of a batch in this process.
    """
    kept = [_count_kept_bytes(model, signal, n) for n in (1, 3)]
    per_trial = max(0, kept[1] - kept[0]) // 2
    trial = 4 * int(np.prod(signal.shape))
    # Weights, gradients and two moments; of a batch the trial is there plain and augmented, and a gradient beside what
    # was kept, as large as the largest of it.
    return 16 * sum(p.numel() for p in model.parameters()) + batch_size * (2 * trial + 3 * per_trial // 2)


def _count_kept_bytes(model: BrainImageModel, signal: Signal, n_trials: int) -> int:
    """Return the bytes that autograd keeps of a forward of zeros; without training mode, so that no statistic moves."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = model.training
    model.eval()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.network(
                torch.zeros(n_trials, *signal.shape), torch.zeros(n_trials, dtype=torch.long)
            )
    finally:
        model.train(training)
    del output  # only now: storage that is freed would be counted again under its address
    return sum(kept.values())
