"""A trained network: held-out scores, predictions, and its files.

Owns the scores by which an epoch is chosen, in which space a prediction lives, how unknown subjects are met, and the
safetensors and JSON of a fitted encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from braindecode_vis.base.arrays import Embeddings, Responses, normalise_rows
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.store import json_plain, read_json, write_json
from braindecode_vis.embeddings.caption_bank import write_captions
from braindecode_vis.encoders.signal import Signal, check_signal
from braindecode_vis.preprocessing.alignment import InputTransform
from braindecode_vis.training.descriptions import Lexicon

if TYPE_CHECKING:
    from braindecode_vis.training.feed import Feed
    from braindecode_vis.training.image_config import ViewChoice
    from braindecode_vis.training.lora import ImageSource
    from braindecode_vis.training.model import BrainImageModel
    from braindecode_vis.training.objectives.captioning import CaptioningTerm
    from braindecode_vis.training.objectives.composition import CompositionTerm
    from braindecode_vis.training.objectives.sentences import SentenceTerm

WEIGHTS, RECORD = "network.safetensors", "network.json"
PREDICTED_TOGETHER = 1024  # trials
TOP_K = 5
SMALL_GALLERY = 4 * TOP_K  # below, top-5 is passed by chance too often to tell epochs apart
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
                "this encoder has tuned its image network and computes the embeddings of images anew; give it the "
                "images (its attribute images) first."
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
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v.detach().cpu().clone() for k, v in fit.model.state_dict().items()}
    arrays = fit.transform.as_tensors()
    tensors |= {f"transform.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
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
    from safetensors.torch import load_file

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
    tensors = load_file(folder / WEIGHTS)
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


# --- held-out trials --------------------------------------------------------------------------------------


def name_top_k(n_gallery: int) -> tuple[str, int]:
    """Return the name and the k of the accuracy that a gallery of this size can tell: top-5, or top-1 below 20."""
    return (f"top{TOP_K}", TOP_K) if n_gallery >= SMALL_GALLERY else ("top1", 1)


def compute_top_k(brain: np.ndarray, gallery: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Return how often the true image is among the `k` most similar ones by cosine.

    Ties count against the network, so that constant outputs find nothing.

    Parameters
    ----------
    brain : array of shape (n_queries, d)
    gallery : array of shape (n_gallery, d)
    truth : int array of shape (n_queries,)
        Row of the true image in the gallery.
    k
        How many candidates count.

    Examples
    --------
    >>> compute_top_k(np.eye(3), np.eye(3), np.array([0, 1, 0]), 1) == 2 / 3
    True
    """
    similarity = normalise_rows(brain) @ normalise_rows(gallery).T
    own = similarity[np.arange(len(truth)), truth]
    # candidates at least as similar as the true one, itself included
    return float(((similarity >= own[:, None]).sum(axis=1) <= k).mean())


def score_held_out(model: BrainImageModel, feed: Feed, batch_size: int, progress: float) -> dict[str, Any]:
    """Return loss and accuracy of the held-out trials, nothing if none were held out.

    Parameters
    ----------
    model
        The weights to judge; left in evaluation mode.
    feed
        Its data; the held-out training trials alone are read.
    batch_size
        Trials at a time.
    progress
        Share of the training that is done, for objectives that change with it.
    """
    held = feed.held
    if held is None:
        return {}
    model.eval()
    brain, subjects, losses, sizes = [], [], [], []
    images: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(held), batch_size):
            rows = np.arange(start, min(start + batch_size, len(held)))
            plan = feed.plan(held, rows, update=0, part=0, rank=0, n_ranks=1)
            batch = feed.assemble(held, *feed.load_all(held, plan), progress)
            brain.append(model.encode_brain(batch.data, batch.subject).float().cpu().numpy())
            subjects.append(batch.subject)
            batch.tuned = model.embed_images(batch)
            for stimulus, image in zip(batch.stimuli.tolist(), batch.tuned, strict=True):
                images.setdefault(stimulus, image)  # each image once in the gallery, whatever its repetitions
            # A contrast of one image or concept with itself says nothing.
            if len(torch.unique(batch.stimuli)) > 1 and len(torch.unique(batch.concepts)) > 1:
                loss = model.compute_plain_loss(batch)
                if loss is not None:
                    losses.append(float(loss))
                    sizes.append(len(batch.data))
    # ascending, so that searchsorted finds the row of each trial's image
    gallery = sorted(images)
    name, k = name_top_k(len(gallery))
    truth = np.searchsorted(gallery, held.stimuli)
    raw = torch.stack([images[i] for i in gallery])
    score = _find_accuracy(model, np.concatenate(brain), torch.cat(subjects), raw, truth, k)
    found = {f"validation_{name}": score, "n_validation_images": len(gallery)}
    if losses:
        # weighted by batch: the last one is smaller
        found["validation_loss"] = float(np.average(losses, weights=sizes))
    return found


def _find_accuracy(
    model: BrainImageModel,
    brain: np.ndarray,
    subjects: torch.Tensor,
    raw: torch.Tensor,
    truth: np.ndarray,
    k: int,
) -> float:
    """Return the accuracy over all trials, each searched in the gallery of its own subject where there are several."""

    def encode(subject: torch.Tensor | None) -> np.ndarray:
        with torch.no_grad():
            return model.encode_image(raw, subject).float().cpu().numpy()

    if not model.has_subject_galleries:
        return compute_top_k(brain, encode(None), truth, k)
    found, numbers = 0.0, subjects.cpu().numpy()
    # Weights of layers differ between subjects, and with them the vectors of the gallery.
    for number in np.unique(numbers):
        own = numbers == number
        gallery = encode(subjects.new_full((len(raw),), int(number)))
        # weighted by the subject's share of the trials
        found += float(own.mean()) * compute_top_k(brain[own], gallery, truth[own], k)
    return found


def get_monitored_score(monitor: str, record: dict[str, Any]) -> float:
    """Return the number of an epoch's record by which the best epoch is chosen; higher is better.

    Parameters
    ----------
    monitor
        ``accuracy`` or ``loss``.
    record
        With the entries of `score_held_out`.

    Raises
    ------
    ConfigError
        If the loss is asked for and no objective can be computed on held-out trials.
    """
    if monitor != "loss":
        return next(v for k, v in record.items() if k.startswith("validation_top"))
    if "validation_loss" not in record:
        raise ConfigError(
            "encoder.selection.monitor is loss, but no objective can be computed on held-out trials alone; "
            "set it to accuracy."
        )
    return -record["validation_loss"]
