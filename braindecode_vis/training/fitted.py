"""A trained network: its predictions, its files, room for a new subject, and its form for export.

Owns in which space a prediction lives, how unknown subjects are met, the safetensors and JSON of a fitted encoder, the
wider statistics and tables with which a network goes on learning from a few trials of a new subject
(`NetworkEncoder.adapt` puts them together), and the prediction as one torch module: alignment, scaling, network,
projector, units. Knows nothing of how the network was trained; see `loop`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.store import json_plain, load_tensors, read_json, write_json, write_tensors
from braindecode_vis.embeddings.caption_bank import write_captions
from braindecode_vis.encoders.signal import Signal, check_signal
from braindecode_vis.preprocessing.alignment import InputTransform
from braindecode_vis.training.descriptions import Lexicon

if TYPE_CHECKING:
    from braindecode_vis.training.image_config import ViewChoice
    from braindecode_vis.training.lora import ImageSource
    from braindecode_vis.training.model import BrainImageModel
    from braindecode_vis.training.objectives.captioning import CaptioningTerm
    from braindecode_vis.training.objectives.composition import CompositionTerm, SentenceTerm

WEIGHTS, RECORD = "network.safetensors", "network.json"
PREDICTED_TOGETHER = 1024  # trials
BLUR_LEVELS, USUAL_BLUR = 3, 1  # less, usual and more, as UBP has them (arXiv:2503.04207)


@dataclass
class NetworkFit:
    """Everything that prediction needs.

    Parameters
    ----------
    model
        The trained module, in evaluation mode.
    signal
        What the network was built for.
    transform
        Alignment and scaling of the responses.
    space, target_shape
        Name of the target space and shape of one target.
    takes_unknown
        Whether the network takes subjects that it was not trained on.
    history
        One record per epoch.
    held_out, held_out_by
        Ids of the images that were held out, and what was held out whole.
    batch_size
        The one in use.
    bank_space
        Name of the space of the targets that were given, which has several views per image with `view_choice`.
    view_choice
        How training chose among them.
    lexicon
        Words, values of attributes and concepts by their numbers, where objectives have weights of them.
    sentence_space
        Name of the space of sentence vectors, where an objective has a head into it.
    """

    model: BrainImageModel
    signal: Signal
    transform: InputTransform
    space: str
    target_shape: tuple[int, ...]
    takes_unknown: bool
    history: list[dict[str, Any]] = field(default_factory=list)
    held_out: tuple[str, ...] = ()
    held_out_by: str = ""
    batch_size: int = 0
    bank_space: str = ""
    view_choice: ViewChoice | None = None
    lexicon: Lexicon = field(default_factory=Lexicon)
    sentence_space: str = ""
    _tuned: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _tuned_from: Any = field(default=None, repr=False)

    @property
    def comparison_space(self) -> str:
        """Name of the space of comparison: the target space, or the learned one by the weights of its image side."""
        model = self.model
        if not model.learns_space:
            return self.space
        # The space is another one whenever its weights are: vectors of two fits never meet by accident.
        digest = hashlib.sha256()
        for part in (
            model.target_scale,
            model.image_projector,
            model.shared_projector,
            model.fusion,
            model.tower,
        ):
            if part is None:
                continue
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        return f"{self.space}/network-{digest.hexdigest()[:12]}"

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Words by their numbers, PAD, START and END first; empty unless an objective needs captions."""
        return self.lexicon.vocabulary

    @property
    def attributes(self) -> dict[str, tuple[str, ...]]:
        """Values of each attribute by their numbers; empty unless an objective needs attributes."""
        return self.lexicon.attributes

    def find_sentence_head(self) -> SentenceTerm | CompositionTerm | None:
        """Return the term of the objective that has a head into a sentence space; None if none has."""
        built: list[Any] = list(self.model.objectives)
        for objective in built:
            with_head = getattr(objective.config, "kind", "") in ("sentence_contrast", "composition")
            if with_head and "sentences" in objective.config.needs:
                return cast("SentenceTerm | CompositionTerm", objective.term)
        return None

    @property
    def predicts_targets(self) -> bool:
        """Whether predictions in the space of the targets exist."""
        return self.model.regression != "none" or not self.model.learns_space

    def map_targets(
        self, embeddings: Embeddings, subject: str | None = None, images: ImageSource | None = None
    ) -> Embeddings:
        """Return image embeddings in the space of comparison; see `NetworkEncoder.map_targets`."""
        bank = self.bank_space or self.space
        if embeddings.space not in (bank, self.space):
            raise DataError(f"this encoder was trained on {bank!r} and cannot map {embeddings.space!r}.")
        if embeddings.space == bank:
            embeddings = reduce_views(embeddings, self.view_choice)
        if not self.model.learns_space:
            return embeddings
        device = next(self.model.parameters()).device
        mapped = np.empty((len(embeddings), self.model.n_common), dtype=np.float32)
        index = None
        if subject is not None:
            index = torch.from_numpy(self.signal.index_subjects([subject])).to(device)
        with torch.inference_mode():
            for start in range(0, len(embeddings), PREDICTED_TOGETHER):
                chunk = slice(start, start + PREDICTED_TOGETHER)
                rows = self._read_raw(embeddings, chunk, images)
                # Copied: a bank is mapped from its file and may not be written to, which torch warns of.
                flat = torch.from_numpy(np.array(rows.reshape(len(rows), -1))).to(device)
                # one subject for all rows of the gallery
                everyone = None if index is None else index.expand(len(rows))
                mapped[chunk] = self.model.encode_image(flat, everyone).cpu().numpy()
        return Embeddings(mapped, embeddings.ids, self.comparison_space)

    def _read_raw(self, embeddings: Embeddings, chunk: slice, images: ImageSource | None) -> np.ndarray:
        """Return raw embeddings, those of a tuned network computed once per image and then remembered."""
        if self.model.tower is None:
            # A copy: banks are read-only memory maps, of which torch takes no view.
            return np.array(embeddings.vectors[chunk], dtype=np.float32)
        if images is None:
            raise DataError(
                "this encoder has tuned its image network and must compute the image embeddings again; "
                "give it the images (its attribute images) first."
            )
        # Remembered embeddings belong to one set of images; another may reuse ids.
        if images is not self._tuned_from:
            self._tuned, self._tuned_from = {}, images
        ids = [str(i) for i in embeddings.ids[chunk]]
        new = [i for i in dict.fromkeys(ids) if i not in self._tuned]  # each id once, in order
        if new:
            self._tuned.update(zip(new, self.model.tower.embed(images, new), strict=True))
        return np.stack([self._tuned[i] for i in ids])

    def predict(
        self,
        responses: Responses,
        rows: np.ndarray,
        space: Literal["comparison", "target", "sentences"],
        device: str,
    ) -> tuple[Embeddings, tuple[str, ...]]:
        """Predict some trials.

        Parameters
        ----------
        responses
            Trials with the axes of the training.
        rows
            Which of them, ascending.
        space
            Where the predictions live.
        device
            ``auto``, ``cpu`` or ``cuda``.

        Returns
        -------
        predicted
            One row per chosen trial.
        label_free_subjects
            Subjects that were aligned by these very trials.
        """
        label_free, chunks = self._read_chunks(responses, rows, device)
        in_targets = space == "target" or not self.model.learns_space
        shape = self.target_shape if in_targets else (self.model.n_common,)
        sentences = self.find_sentence_head() if space == "sentences" else None
        if sentences is not None:
            shape = (sentences.head.out_features,)
        # filled chunk by chunk, so that a test set of any size fits the device
        vectors = np.empty((len(rows), int(np.prod(shape))), dtype=np.float32)
        with torch.inference_mode():
            for chunk, data, subject in chunks:
                vectors[chunk] = self._forward(data, subject, space).float().cpu().numpy()
        name = self.space if in_targets else self.comparison_space
        name = name if sentences is None else self.sentence_space
        predicted = Embeddings(vectors.reshape(len(rows), *shape), responses.stimulus_ids[rows], name)
        return predicted, label_free

    def describe(
        self, responses: Responses, rows: np.ndarray, device: str, *, n_beams: int
    ) -> tuple[list[str], tuple[str, ...]]:
        """Write captions of some trials; see `NetworkEncoder.describe` and `predict`."""
        term = self._require_captioning()
        label_free, chunks = self._read_chunks(responses, rows, device)
        captions: list[str] = []
        with torch.inference_mode():
            for _, data, subject in chunks:
                tokens = self.model.encode_tokens(data, subject) if term.options.reads == "tokens" else None
                if tokens is None:
                    tokens = self.model.encode_brain(data, subject)[:, None]
                captions += write_captions(term.write_words(tokens, n_beams), self.vocabulary)
        return captions, label_free

    def describe_mean(self, *, n_beams: int) -> str:
        """Return the caption of an output that is zero everywhere: what is written where no response says anything."""
        term = self._require_captioning()
        sizes, device = term.network.sizes, next(self.model.parameters()).device
        zeros = torch.zeros(1, sizes.n_tokens, sizes.n_features, device=device)
        return write_captions(term.write_words(zeros, n_beams), self.vocabulary)[0]

    def _require_captioning(self) -> CaptioningTerm:
        from braindecode_vis.training.objectives.captioning import CaptioningTerm

        terms = [getattr(objective, "term", None) for objective in self.model.objectives]
        found = next((term for term in terms if isinstance(term, CaptioningTerm)), None)
        if found is None:
            raise DataError(
                "this encoder was trained without the objective captioning, so it writes no captions; add "
                "{kind: captioning} to encoder.objectives and name encoder.captions."
            )
        return found

    def _read_chunks(
        self, responses: Responses, rows: np.ndarray, device: str
    ) -> tuple[tuple[str, ...], Iterator[tuple[slice, torch.Tensor, torch.Tensor]]]:
        """Return the subjects that are aligned by these very trials, and chunks: place, trials and their subjects."""
        self.check_input(responses)
        names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
        index = self.signal.index_subjects(names)
        self._check_subjects(names[rows], index[rows])
        # Subjects outside the training set are aligned by these very trials; the caller is told.
        transform = self.transform.with_subjects_of(responses.data, names)
        place = choose_device(device, setting="encoder.device")
        # Walking through all modules takes as long as a small network on one trial of a stream.
        if next(self.model.parameters()).device.type != torch.device(place).type or self.model.training:
            self.model.to(place).eval()

        def read() -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
            for start in range(0, len(rows), PREDICTED_TOGETHER):
                chunk = rows[start : start + PREDICTED_TOGETHER]
                data = torch.from_numpy(transform.read(responses.data, chunk, names)).to(place)
                yield slice(start, start + len(chunk)), data, torch.from_numpy(index[chunk]).to(place)

        return transform.label_free_subjects, read()

    def check_input(self, responses: Responses) -> None:
        """Raise `DataError` unless trials have the axes of those of the training."""
        if self.transform.space is None:
            check_signal(self.signal, responses)
        else:
            self.transform.space.check(responses)

    def _forward(self, data: Any, subject: Any, space: str) -> Any:
        model = self.model
        sentences = self.find_sentence_head() if space == "sentences" else None
        if sentences is not None:
            return sentences.predict(model.encode_brain(data, subject))
        if space == "target" and model.regression != "none":
            return model.encode_heads(data, subject)[1]
        if space == "target" and model.learns_space:
            raise DataError(
                "this encoder compares in a learned space and has no regression head, so it cannot predict the target "
                "space; add an objective of kind mse or l1."
            )
        output = model.encode_brain(data, subject)
        # Trained against scaled targets, read in the space of the targets.
        return output if model.learns_space else model.target_scale.undo(output)

    def _check_subjects(self, names: np.ndarray, index: np.ndarray) -> None:
        unknown = sorted(set(names[index == self.signal.unknown_subject]))
        if unknown and not self.takes_unknown:
            raise DataError(
                f"subject {unknown[0]} was not among the training subjects {', '.join(self.signal.subjects)}, and this "
                f"network has weights for these only; adapt the encoder with some trials of {unknown[0]}, or choose "
                "another encoder.network.kind."
            )


def write_fit(folder: Path, fit: NetworkFit, config: Any, *, seed: int, messages: list[str]) -> None:
    """Write weights and statistics as safetensors, everything else as JSON."""
    tensors = {f"model.{k}": v.detach().cpu().clone() for k, v in fit.model.state_dict().items()}
    arrays = fit.transform.as_tensors()
    tensors |= {f"transform.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    write_tensors(folder / WEIGHTS, {k: v.contiguous() for k, v in tensors.items()})
    write_json(
        folder / RECORD,
        {
            "config": config.hashed_fields(), "seed": seed, "signal": fit.signal.as_json(), "space": fit.space,
            "target_shape": list(fit.target_shape), "comparison_space": fit.comparison_space,
            "takes_unknown": fit.takes_unknown, "batch_size": fit.batch_size, "messages": messages,
            "bank_space": fit.bank_space, **_describe_image_side(fit),
            "held_out": list(fit.held_out), "held_out_by": fit.held_out_by, "history": fit.history,
            **_describe_objectives(fit),
        },
    )  # fmt: skip


def _describe_image_side(fit: NetworkFit) -> dict[str, Any]:
    """Return the weights of layers for a reader, and what is needed to build a tuned network without loading it."""
    fusion, tower = fit.model.fusion, fit.model.tower
    return {
        "fusion": None if fusion is None else fusion.describe(fit.signal.subjects),
        "adapted": None if tower is None else {name: list(shape) for name, shape in tower.shapes.items()},
    }


def _describe_objectives(fit: NetworkFit) -> dict[str, Any]:
    """Return what weights of objectives are built for and what their numbers stand for; nothing without any."""
    sizes: dict[str, Any] = {} if fit.model.sizes is None else {"sizes": asdict(fit.model.sizes)}
    if fit.sentence_space:
        sizes["sentence_space"] = fit.sentence_space
    return sizes if fit.lexicon == Lexicon() else {**sizes, "lexicon": fit.lexicon.as_json()}


def read_fit(folder: Path, config: Any) -> tuple[NetworkFit, int, list[str]]:
    """Return what `write_fit` wrote: the fit, its seed and its messages.

    Raises
    ------
    DataError
        If it was written with other settings or is of another architecture.
    """
    from braindecode_vis.training.model import TargetScale, build_model
    from braindecode_vis.training.objectives.objective import StepSizes
    from braindecode_vis.training.optimisation import check_identity, load_weights, take

    record = read_json(folder / RECORD)
    # The network first: another architecture is the more useful thing to say than another setting.
    own, was = json_plain(config.hashed_fields()), record["config"]
    check_identity({"network": own.pop("network")}, {"network": was.pop("network", None)}, folder / RECORD)
    check_identity({"config": own}, {"config": was}, folder / RECORD)
    signal, shape = Signal.from_json(record["signal"]), tuple(record["target_shape"])
    n_targets, kind = int(np.prod(shape)), config.normalise_targets
    # Placeholders of the right shape; the file fills them.
    start = torch.zeros(n_targets), torch.ones(n_targets)
    image = TargetScale(kind, *start, n_tokens=1 if config.fusion is None else shape[0])
    scales = (image, TargetScale(kind, *start) if "text" in config.needs else None)
    adapted = record["adapted"] and {name: (n[0], n[1]) for name, n in record["adapted"].items()}
    sizes = StepSizes.from_json(record["sizes"]) if "sizes" in record else None
    model = build_model(
        config, signal, shape, seed=record["seed"], scales=scales, adapted=adapted, sizes=sizes
    )
    tensors = load_tensors(folder / WEIGHTS, "torch")
    load_weights(model, take(tensors, "model"), what=str(folder / WEIGHTS))
    transform = InputTransform.from_tensors(
        {k: v.numpy() for k, v in take(tensors, "transform").items()},
        scaling=config.input_scaling, alignment=config.subject_alignment, dims=signal.dims,
    )  # fmt: skip
    fit = NetworkFit(
        model.eval(), signal, transform, record["space"], shape, record["takes_unknown"], record["history"],
        tuple(record["held_out"]), record["held_out_by"], record["batch_size"], record["bank_space"],
        config.view_choice, Lexicon.from_json(record["lexicon"]) if "lexicon" in record else Lexicon(),
        record.get("sentence_space", ""),
    )  # fmt: skip
    return fit, record["seed"], list(record["messages"])


def reduce_views(stacked: Embeddings, choice: ViewChoice | None) -> Embeddings:
    """Return the one vector per image that stands for its views outside training, in a space of its own name.

    Parameters
    ----------
    stacked
        Vectors of shape (n_rows, n_views, n_features).
    choice
        How training chooses; None returns the embeddings as they are.

    Raises
    ------
    DataError
        If there are no views to choose from, or not three levels for the rule of uncertainty.
    """
    if choice is None:
        return stacked
    if stacked.vectors.ndim != 3:
        raise DataError(
            f"encoder.view_choice is {choice}, but the targets of {stacked.space!r} have one vector per image; set "
            "target.kind to views with combine stacked, or leave out encoder.view_choice."
        )
    if choice == "uncertainty" and stacked.vectors.shape[1] != BLUR_LEVELS:
        raise DataError(
            f"encoder.view_choice uncertainty needs three views (less, usual and more blur), but {stacked.space!r} "
            f"has {stacked.vectors.shape[1]}; set target.views to fovea of 45, 45 and 51."
        )
    space = name_reduced(stacked.space, choice)
    if choice == "uncertainty":
        return Embeddings(stacked.vectors[:, USUAL_BLUR], stacked.ids, space)
    mean = stacked.vectors.mean(axis=1, dtype=np.float32)
    return Embeddings(mean, stacked.ids, space)


def name_reduced(space: str, choice: ViewChoice | None) -> str:
    """Return the name of the space of reduced views of a stacked space."""
    if choice is None:
        return space
    return f"{space}/{'usual' if choice == 'uncertainty' else 'mean'}-view"


# --- a new subject --------------------------------------------------------------------------------------


def check_adaptation(fit: NetworkFit, responses: Responses, targets: Embeddings) -> None:
    """Raise `DataError` if axes or target space differ from those of the first training."""
    fit.check_input(responses)
    reduced = reduce_views(targets.take(slice(1)), fit.view_choice)
    if reduced.space != fit.space or tuple(reduced.vectors.shape[1:]) != fit.target_shape:
        raise DataError(f"this encoder predicts {fit.space!r}, so it cannot be adapted to {targets.space!r}.")


def extend_signal(known: Signal, found: Signal) -> Signal:
    """Return the known signal with the new subjects of another one behind its own."""
    new = [i for i, name in enumerate(found.subjects) if name not in known.subjects]
    voxels = known.n_voxels
    if voxels and new:
        counts = found.n_voxels or (found.shape[0],) * len(found.subjects)
        # behind the known ones, as rows of a table are added at its end
        voxels = (*voxels, *(counts[i] for i in new))
    return replace(known, subjects=(*known.subjects, *(found.subjects[i] for i in new)), n_voxels=voxels)


def imagine_subject(signal: Signal) -> Signal:
    """Return the signal with one more subject, whose weights are then distinguished from those that all share."""
    counts = signal.n_voxels
    wider = (*counts, counts[-1]) if counts else ()
    return replace(signal, subjects=(*signal.subjects, "\0"), n_voxels=wider)


def digest_weights(weights: dict[str, Tensor]) -> str:
    """Return what distinguishes these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def grow_state(
    old: dict[str, Tensor], fresh: dict[str, Tensor], n_subjects: int, n_new: int
) -> tuple[dict[str, Tensor], set[str]]:
    """Return weights for a model with more subjects, and the names of the weights that belong to subjects.

    A tensor that grew by `n_new` along one axis is a table of subjects: rows of known subjects are kept, new ones start
    from the row of unknown subjects if the table has one, else from the mean row. A tensor that is new keeps its fresh
    values.

    Parameters
    ----------
    old, fresh
        State of the fitted model, and of a new one that was built for all subjects.
    n_subjects, n_new
        Subjects of the fitted model, and how many join.
    """
    grown, subject_names = {}, set()
    for name, value in fresh.items():
        if name not in old:
            grown[name] = value
            subject_names.add(name)
        elif old[name].shape == value.shape:
            grown[name] = old[name]
        else:
            grown[name] = _grow_table(name, old[name], value, n_subjects, n_new)
            subject_names.add(name)
    return grown, subject_names


def _grow_table(name: str, old: Tensor, fresh: Tensor, n_subjects: int, n_new: int) -> Tensor:
    # A table of subjects grows along exactly one axis, by exactly the new subjects.
    axes = [a for a in range(old.ndim) if old.shape[a] != fresh.shape[a]] if old.ndim == fresh.ndim else []
    if len(axes) != 1 or fresh.shape[axes[0]] != old.shape[axes[0]] + n_new:
        raise DataError(
            f"the weight {name} changes from {tuple(old.shape)} to {tuple(fresh.shape)} with a new subject, so this "
            "network cannot be adapted; train it again with that subject."
        )
    table = old.movedim(axes[0], 0)
    known, rest = table[:n_subjects], table[n_subjects:]
    # The row behind the known subjects is the one of unknown subjects, learnt by hiding who is who.
    start = rest[:1] if len(rest) else known.mean(dim=0, keepdim=True)
    # known subjects, new ones, and the row of unknown ones last again
    return torch.cat([known, start.expand(n_new, *start.shape[1:]), rest]).movedim(0, axes[0]).contiguous()


# --- the prediction as one torch module, for export -----------------------------------------------------
# A subject is given by its number in the order of training; the number of subjects stands for an unknown one, which has
# no alignment of its own. Nothing is learnt here: modules hold copies of what prediction needs.


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
                "a network for any montage needs trials of channels x times with known positions, but "
                f"this one has {', '.join(signal.dims)}{'' if signal.ch_pos is None else ' and positions'}."
            )
        if fit.transform.alignment != "none":
            raise DataError(
                "a network for any montage takes subjects without an alignment; train it with "
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
            "the encoder aligns each subject by its own training trials, so its exported program works "
            f"only for the subjects {', '.join(fit.signal.subjects)}."
        )
    data = np.array(responses.data, dtype=np.float32)
    return {"responses": torch.from_numpy(data), "subject": torch.from_numpy(index)}
