"""The fitted brain encoder: a trained network that predicts embeddings from responses.

Owns what happens before and after the loop: who is held out, which statistics are learnt, in which space predictions
live, adaptation to a new subject, and the files of a fitted encoder.

Spaces. Where nothing is learnt on the image side, `predict` gives vectors in the space of the targets. With a
projector, a fusion of layers or a tuned image network, brain and images are compared in a learned space of its own,
named after its weights: `predict` gives vectors there, `map_targets` brings image embeddings there, and
`predict_for_generator` gives the regression head's prediction in the space of the targets, for a prior or a generator.
With `view_choice` the space of the targets has the one vector per image that stands for its views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, Responses, check_target_rows, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import (
    BrainEncoder,
    CaptionWriter,
    Context,
    FewTrialAdaptation,
    GeneratorView,
)
from braindecode_vis.base.memory import TooLargeError, check_memory, is_out_of_memory
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.encoders.signal import Signal, TrialPairs, describe_signal
from braindecode_vis.preprocessing.alignment import InputTransform
from braindecode_vis.preprocessing.splits import make_inner_folds
from braindecode_vis.training.descriptions import Descriptions, Lexicon, check_text_targets, describe_images
from braindecode_vis.training.fitted import (
    MontagePrediction,
    NetworkFit,
    NetworkPrediction,
    check_adaptation,
    digest_weights,
    extend_signal,
    grow_state,
    imagine_subject,
    read_fit,
    reduce_views,
    take_inputs,
    write_fit,
)
from braindecode_vis.training.optimisation import load_weights, read_checkpoint

LARGEST_AUTO, SMALLEST_AUTO = 1024, 16
FEWEST_HELD_OUT = 2  # one image alone is always found


if TYPE_CHECKING:
    from braindecode_vis.training.feed import Extras
    from braindecode_vis.training.lora import ImageSource
    from braindecode_vis.training.model import BrainImageModel


class NetworkEncoder(BrainEncoder):
    """A network in the role of a `BrainEncoder`.

    Parameters
    ----------
    config
        The settings.
    seed
        Root of initial weights, order, augmentations and held-out concepts.
    fitted
        What was fitted before.

    Attributes
    ----------
    workspace : Path or None
        Folder for checkpoints and logs, which survives a killed run; set it before `fit`.
    progress : callable or None
        Called with updates done, updates in all, and a line of text.
    text_targets : Embeddings or None
        Text embedding of each training image, for objectives that need it; rows by stimulus id.
    image_views : sequence of Embeddings
        Embeddings of other views of the training images, likewise.
    images : StimulusSet, callable or None
        The images, for a network that is tuned; set it before `fit` and `map_targets`. A callable takes stimulus ids
        and returns uint8 arrays of shape (height, width, 3).
    pretrained : Path or None
        Folder that the run has pretrained, for settings that say so; set it before `fit`.
    clusters : dict or None
        Cluster of each training image; k-means of the targets without it.
    sentence_memory : dict
        Sentence vectors of texts that were embedded before, shared by refits.
    label_free_subjects : tuple of str
        Subjects whose alignment was computed from the trials that were predicted: a transductive result.
    messages : list of str
        What a reader of the results should know, such as a batch size that was halved.
    """

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.fitted: NetworkFit | None = None
        self.workspace: Path | None = None
        self.progress: Callable[[int, int, str], None] | None = None
        self.text_targets: Embeddings | None = None
        self.image_views: Sequence[Embeddings] = ()
        self.images: ImageSource | None = None
        self.pretrained: Path | None = None
        self.fitted_responses: Path | None = None
        self.clusters: dict[str, int] | None = None
        self.label_free_subjects: tuple[str, ...] = ()
        self.messages: list[str] = []
        # What files say of the images of the training under way.
        self._descriptions: Descriptions | None = None
        self.sentence_memory: dict[str, np.ndarray] = {}

    def bind(self, context: Context) -> None:
        """Take images, texts, the folder of checkpoints and the progress from what the pipeline lends."""
        self.images, self.text_targets = context.images, context.texts
        self.workspace, self.progress = context.checkpoints, context.progress
        self.pretrained, self.fitted_responses = context.pretrained, context.fitted_responses

    # --- training -----------------------------------------------------------------------------------------

    def fit(self, responses: Responses, targets: Embeddings) -> NetworkEncoder:
        """Train on these trials; a checkpoint in the workspace is continued.

        Parameters
        ----------
        responses
            Training trials. A column `concept` of the trial table says which images belong together; without it every
            image is a concept of its own.
        targets
            One row per trial, in the order of `responses`.

        Raises
        ------
        DataError
            If rows do not match, a checkpoint belongs to another training, or a loss is not finite.
        """
        return self._fit_rows(responses, targets, np.arange(responses.n_trials))

    def _fit_rows(self, responses: Responses, targets: Embeddings, rows: np.ndarray) -> NetworkEncoder:
        from braindecode_vis.base.devices import compute_once

        check_target_rows(responses, targets, what="a network")
        self._descriptions = None
        if self.config.uses_pretraining and self.pretrained is None:
            raise ConfigError(
                "encoder.network.pretrained is pretrain, which a run computes before it trains; outside "
                "a run, give the folder that braindecode-vis pretrain wrote."
            )
        train, held, by = self.hold_out(responses, rows)
        self._descriptions = describe_images(self.config, responses, train, memory=self.sentence_memory)
        check_text_targets(self._descriptions, self.config, targets)
        names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
        # A refit on fewer trials may lack a subject, for whom no layer must be built.
        signal = keep_subjects(describe_signal(responses), set(names[rows]))
        transform = InputTransform(self.config.input_scaling, self.config.subject_alignment, signal.dims)
        # Statistics from training trials alone: held-out ones stand for the test. One process reads them for all.
        transform = compute_once(
            lambda: transform.fit(
                responses.data,
                train,
                names,
                stimuli=responses.stimulus_ids,
                n_own=count_own_voxels(responses),
            )
        )
        signal = describe_aligned(signal, transform)
        if not transform.is_identity:
            # Values by median and interquartile range, whatever was done to them before, are a unit of their own.
            signal = replace(signal, unit="robust" if transform.scaling.kind == "robust" else "scaled")

        def build() -> BrainImageModel:
            return self.build_model(signal, targets, train)

        self.train(
            responses, targets, rows=(train, held, by), signal=signal, transform=transform, build=build,
            epochs=self.config.epochs,
        )  # fmt: skip
        return self

    def list_held_out(self, responses: Responses) -> tuple[str, ...]:
        """Return the images that `fit` would hold out of these trials."""
        _, held, _ = self.hold_out(responses, np.arange(responses.n_trials))
        return tuple(sorted(set(responses.stimulus_ids[held].astype(str).tolist())))

    def hold_out(self, responses: Responses, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
        """Return rows to learn from, rows held out, and what is held out whole; synthetic trials never are."""
        from braindecode_vis.training.batches import code_trials

        _, stimuli, concepts = code_trials(responses)
        made = rows[responses.is_synthetic[rows]]
        rows = rows[~responses.is_synthetic[rows]]
        selection = self.config.selection
        # A stream of its own, so that who is held out depends on no other draw.
        seed = derive_seed(self.seed, "validation")
        try:
            by = selection.hold_out_by if selection.kind == "early_stopping" else "concept"
            held = hold_out(stimuli[rows], concepts[rows], selection.hold_out, seed=seed, by=by)
        except DataError:
            if selection.kind == "early_stopping":  # elsewhere, held-out trials decide nothing
                raise
            held = hold_out(stimuli[rows], concepts[rows], 0.0, seed=seed)
            self.messages.append("too few training images to hold some out; there is no validation curve")
        train = rows[~held.mask]
        check_enough_images(stimuli[train], where="the encoder learns from")
        if len(made):
            # A synthetic trial of a concept that is held out whole would teach it.
            known = np.isin(concepts[made], concepts[rows[held.mask]]) & (held.by == "concept")
            train = np.sort(np.concatenate([train, made[~known]]))
        return train, rows[held.mask], held.by

    def build_model(self, signal: Signal, targets: Embeddings, train: np.ndarray) -> BrainImageModel:
        """Return the untrained model, its target statistics from the images of the training rows."""
        from braindecode_vis.training.model import build_model, make_scales

        if self.config.image_tower is not None:
            from braindecode_vis.training.lora import check_same_target

            check_same_target(self.config.image_tower, targets.space)
        ids = targets.ids[train]
        # One row per image: statistics must not depend on how often an image was shown.
        first = train[np.unique(ids.astype(str), return_index=True)[1]]
        first.sort()
        text = None
        if "text" in self.config.needs and self.text_targets is not None:
            text = self.text_targets.select(list(targets.ids[first])).flat()
        # Reading all targets of a memory map takes long; without statistics one row tells the shape.
        needed = self.config.normalise_targets in ("centre", "zscore")
        rows = first if needed else first[:1]
        reduced = reduce_views(take_rows(targets, rows), self.config.view_choice)
        shape = reduced.vectors.shape[1:]
        n_tokens = shape[0] if self.config.fusion is not None and len(shape) == 2 else 1
        scales = make_scales(self.config.normalise_targets, reduced.flat(), text, n_tokens=n_tokens)
        sizes = None if self._descriptions is None else self._descriptions.sizes
        return build_model(self._name_weights(), signal, shape, seed=self.seed, scales=scales, sizes=sizes)

    def _name_weights(self) -> Any:
        """Return the settings, with the folder that the run has pretrained in the place of the word for it."""
        if not self.config.uses_pretraining or self.pretrained is None:
            return self.config
        network = self.config.network.model_copy(update={"pretrained": self.pretrained})
        return self.config.model_copy(update={"network": network})

    def train(
        self,
        responses: Responses,
        targets: Embeddings,
        *,
        rows: tuple[np.ndarray, np.ndarray, str],
        signal: Signal,
        transform: InputTransform,
        build: Callable[[], BrainImageModel],
        epochs: int,
        identity: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Train what `build` makes and keep the fit; smaller batches are tried if they are automatic and do not fit.

        Parameters
        ----------
        responses, targets
            As for `fit`.
        rows
            Rows to learn from, rows held out and what was held out whole, from `hold_out`.
        signal, transform
            What the network is built for, and the fitted scaling of its trials.
        build
            Returns the model to start from.
        epochs
            Passes over the training trials.
        identity
            Further things that a checkpoint must agree with.
        **options
            Further arguments of the `Trainer`.
        """
        from braindecode_vis.base.devices import count_processes, open_accelerator
        from braindecode_vis.training.feed import Feed
        from braindecode_vis.training.loop import CHECKPOINT, Trainer
        from braindecode_vis.training.model import estimate_training_bytes, takes_unknown_subjects

        reduced = reduce_views(take_rows(targets, np.arange(1)), self.config.view_choice)
        train, held, by = rows
        # One per training: accelerate keeps its state in the process.
        accelerator = open_accelerator(self.config.device, self.config.precision)
        feed = Feed(
            responses, targets, transform=transform, signal=signal, rows=train, held_rows=held,
            settings=self.config, needs=self.config.needs, extras=self._collect_extras(),
            device=accelerator.device, seed=derive_seed(self.seed, "training"),
        )  # fmt: skip
        identity = {
            **identify_training(self.config, self.seed, responses, targets, train, signal),
            **(identity or {}),
        }
        automatic = self.config.batch_size == "auto"
        size = choose_batch_size(len(feed.train)) if automatic else int(self.config.batch_size)
        found = (
            read_checkpoint(self.workspace / CHECKPOINT) if self.workspace is not None and automatic else None
        )
        # A run that was killed after a halving goes on with the size that fitted.
        size = found[1]["batch_size"] if found is not None else size
        while True:
            try:
                model = build()
                self._prepare(model, accelerator.device, responses, targets, train, signal, transform)
                # On the CPU, before the model moves: an index error on a GPU cannot be caught.
                takes = takes_unknown_subjects(model, signal)
                hide = self.config.hide_subject if takes and len(signal.subjects) > 1 else 0.0
                if (
                    accelerator.device.type == "cpu"
                ):  # beyond it, the system may end the process without a word
                    together = min(size, len(feed.train)) // count_processes()
                    check_memory(
                        estimate_training_bytes(model, signal, together),
                        what=f"training {self.config.network.kind} with batches of {size} trials",
                        reduce="encoder.batch_size or the width of the network",
                    )
                trainer = Trainer(
                    self.config, model.to(accelerator.device), feed, accelerator, batch_size=size, epochs=epochs,
                    identity=identity, workspace=self.workspace, progress=self.progress,
                    **{"hide_subject": hide, **options},
                )  # fmt: skip
                history = trainer.run()
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # Processes would have to halve together, and one that has failed cannot tell the others.
                if not automatic or size < 4 or count_processes() > 1:
                    if isinstance(error, TooLargeError):
                        raise
                    raise DataError(
                        f"a batch of {size} trials does not fit into the memory of {accelerator.device}; set "
                        "encoder.batch_size to a smaller number, or to auto in a single process."
                    ) from error
            # Outside the handler, so that the failed step's tensors are gone.
            size //= 2
            self._tell(f"out of memory: the training starts again with batches of {size} trials")
            if self.workspace is not None:
                # It belongs to the larger batches.
                (self.workspace / CHECKPOINT).unlink(missing_ok=True)
        self.fitted = NetworkFit(
            model, signal, transform, reduced.space, tuple(reduced.vectors.shape[1:]), takes, history,
            tuple(sorted({str(i) for i in responses.stimulus_ids[held]})), by, size, targets.space,
            self.config.view_choice, Lexicon() if self._descriptions is None else self._descriptions.lexicon,
            self.config.sentence_space,
        )  # fmt: skip

    def _prepare(
        self,
        model: BrainImageModel,
        device: Any,
        responses: Responses,
        targets: Embeddings,
        train: np.ndarray,
        signal: Signal,
        transform: InputTransform,
    ) -> None:
        """Let a network compute what it takes from measured training trials before it is trained."""
        prepare = model.whole_network.prepare
        if prepare is None:
            return
        from braindecode_vis.base.devices import seeded

        rows = train[~responses.is_synthetic[train]]
        names = responses.trials["subject"].astype(str).to_numpy(dtype=object)

        def read(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            own = rows[some]
            shown = reduce_views(take_rows(targets, own), self.config.view_choice)
            return transform.read(responses.data, own, names), shown.flat()

        with seeded(derive_seed(self.seed, "prepare")):
            model.to(device)
            prepare(TrialPairs(signal.index_subjects(names[rows]), read, self.fitted_responses))
            model.cpu()

    def _tell(self, message: str) -> None:
        self.messages.append(message)
        if self.progress is not None:
            self.progress(0, 0, message)

    def _collect_extras(self) -> Extras:
        from braindecode_vis.training.feed import Extras

        return Extras(
            self.text_targets,
            tuple(self.image_views),
            self.clusters,
            self.images,
            self._descriptions,
        )

    def adapt(
        self,
        responses: Responses,
        targets: Embeddings,
        *,
        trainable: Literal["all", "subject"] = "all",
        epochs: int | None = None,
        lr_scale: float = 0.1,
    ) -> NetworkEncoder:
        """Return an encoder that goes on learning from a few trials of a new subject; this one stays as it is.

        Tables of subjects grow by the new ones, which start from what the network does for an unknown subject.

        Parameters
        ----------
        responses, targets
            Training trials of the new subject (or of known ones), in the target space of the first training.
        trainable
            ``all`` weights, or only those that belong to single subjects (``subject``; no weight decay then).
        epochs
            Passes over these trials; None is as many as in the first training.
        lr_scale
            Learning rate as a share of the first training's (0.1, a choice of ours).

        Raises
        ------
        ConfigError
            If ``subject`` is asked of a network without weights of single subjects.
        DataError
            If axes or target space differ from those of the first training.
        """
        check_target_rows(responses, targets, what="a network")
        fit = self.require_fit()
        check_adaptation(fit, responses, targets)
        other = self.copy_for(derive_seed(self.seed, "adapt"))
        train, held, by = other.hold_out(responses, np.arange(responses.n_trials))
        # Numbers of words, values and concepts stay what the weights know them by.
        other._descriptions = describe_images(
            self.config,
            responses,
            train,
            lexicon=fit.lexicon,
            sizes=fit.model.sizes,
            memory=self.sentence_memory,
        )
        transform = fit.transform.extend(responses, train)
        signal = extend_signal(fit.signal, describe_aligned(describe_signal(responses), transform))
        old = {k: v.cpu() for k, v in fit.model.state_dict().items()}
        n_known = len(fit.signal.subjects)
        n_new = len(signal.subjects) - n_known
        # Whatever grows when one more subject is imagined belongs to subjects.
        wider = other.build_model(imagine_subject(signal), targets, train)
        _, owned = grow_state(old, wider.state_dict(), n_known, n_new + 1)
        if trainable == "subject" and not owned:
            raise ConfigError(
                f"{self.config.network.kind} has no weights for single subjects; adapt it with trainable all."
            )

        def build() -> BrainImageModel:
            model = other.build_model(signal, targets, train)
            state, _ = grow_state(old, model.state_dict(), n_known, n_new)
            load_weights(model, state, what="the fitted encoder")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable == "all" or name in owned)
            return model

        other.train(
            responses, targets, rows=(train, held, by), signal=signal,
            transform=transform, build=build, epochs=epochs or self.config.epochs,
            identity={"adaptation": [trainable, epochs, lr_scale, digest_weights(old)]}, hide_subject=0.0,
            lr_scale=lr_scale, frozen_decay=trainable == "subject",
        )  # fmt: skip
        other.require_fit().model.requires_grad_(True)
        return other

    def align_subjects(self, responses: Responses) -> NetworkEncoder:
        """Return an encoder of the same weights that also knows the alignment of new subjects, by training trials.

        Parameters
        ----------
        responses
            Training trials; those of known subjects are not looked at.

        Raises
        ------
        DataError
            If a new subject has seen none of the images that the common space was made of.
        """
        fit = self.require_fit()
        other = self.copy_for(self.seed)
        other.fitted = replace(fit, transform=fit.transform.extend(responses))
        return other

    def copy_for(self, seed: int, workspace: Path | None = None) -> NetworkEncoder:
        """Return an unfitted encoder of the same settings and extras, for another training."""
        other = NetworkEncoder(self.config, seed=seed)
        other.workspace = workspace or self.workspace
        other.progress, other.text_targets = self.progress, self.text_targets
        other.image_views, other.clusters, other.images = self.image_views, self.clusters, self.images
        other.sentence_memory = self.sentence_memory
        other.pretrained = self.pretrained
        return other

    # --- prediction ---------------------------------------------------------------------------------------

    def predict(self, responses: Responses) -> Embeddings:
        """Return one embedding per trial in the space of comparison; see the module for which that is.

        Raises
        ------
        DataError
            If the axes differ from those of the training, or a subject is unknown to a network that cannot take it.
        """
        return self._predict_rows(responses, np.arange(responses.n_trials), "comparison")

    @property
    def generator_view(self) -> GeneratorView:
        """Predictions in the space of the targets: the regression head's, if there is one.

        With `view_choice` the one vector that stands for the views of each image is its embedding. To predict raises
        `DataError` if the encoder compares in a learned space and has no regression head.
        """
        fit = self.require_fit()
        # A regression head may predict for the generator in the very space in which images are compared.
        alike = fit.model.regression == "none" or fit.model.learns_space
        terms: list[Any] = list(fit.model.objectives)
        prior = next((o.term for o in terms if getattr(o.config, "kind", "") == "diffusion_prior"), None)

        def predict(responses: Responses) -> Embeddings:
            return self._predict_rows(responses, np.arange(responses.n_trials), "target")

        def map_targets(embeddings: Embeddings) -> Embeddings:
            return (
                reduce_views(embeddings, fit.view_choice)
                if embeddings.space == fit.bank_space
                else embeddings
            )

        return GeneratorView(predict, map_targets, fit.predicts_targets, alike, prior)

    @property
    def adaptation(self) -> FewTrialAdaptation:
        """See `adapt`."""
        own = partial(self.adapt, trainable="subject", lr_scale=1.0)
        return FewTrialAdaptation(self.adapt, adapt_subject=own)

    @property
    def captions(self) -> CaptionWriter | None:
        """See `describe`; None without the objective ``captioning``."""
        return CaptionWriter(self.describe, self.describe_mean) if self.config.writes_captions else None

    def predict_sentences(self, responses: Responses) -> Embeddings | None:
        """Return one vector per trial in the space of the sentence encoder, by the head of ``sentence_contrast`` or
        ``composition``.

        The space is ``sentences/weights=DIGEST`` (`embeddings.sentence_encoder.name_sentence_space` of the encoder's
        folder), whatever the texts: vectors that `SentenceEncoder.encode` gives of any texts are compared with these by
        cosine. None without that objective.
        """
        if self.require_fit().find_sentence_head() is None:
            return None
        return self._predict_rows(responses, np.arange(responses.n_trials), "sentences")

    def describe(self, responses: Responses, n_beams: int = 1) -> list[str]:
        """Return a caption of each trial, written by the decoder of the objective ``captioning``; nothing is drawn.

        Parameters
        ----------
        responses
            As for `predict`.
        n_beams
            Beginnings that are gone on from at each word; 1 takes the likeliest word after each word.

        Raises
        ------
        DataError
            As `predict` does, and if the encoder was trained without that objective.
        """
        rows = np.arange(responses.n_trials)
        captions, self.label_free_subjects = self.require_fit().describe(
            responses, rows, self.config.device, n_beams=n_beams
        )
        return captions

    def describe_mean(self, n_beams: int = 1) -> str:
        """Return the caption of no response in particular, for images that are made without a brain."""
        return self.require_fit().describe_mean(n_beams=n_beams)

    def map_targets(self, embeddings: Embeddings, subject: str | None = None) -> Embeddings:
        """Return image embeddings in the space of comparison, as they are if that is the space of the targets.

        Parameters
        ----------
        embeddings
            In the space of the targets that were given to `fit`. A tuned image network computes them anew from `images`
            and looks at their ids only.
        subject
            Whose gallery it is, where `has_subject_galleries`: only predictions of this subject may be searched in it.
            None and unknown subjects take the mean weights.

        Raises
        ------
        DataError
            If the embeddings are of another space, or a tuned image network has no images.
        """
        return self.require_fit().map_targets(embeddings, subject, self.images)

    @property
    def has_subject_galleries(self) -> bool:  # type: ignore[override]
        """Whether each subject's predictions must be searched in a gallery of its own; see `map_targets`."""
        return self.require_fit().model.has_subject_galleries

    @property
    def comparison_space(self) -> str:
        """Name of the space that `predict` predicts: the target space, or the learned one by its weights."""
        return self.require_fit().comparison_space

    def _predict_rows(
        self, responses: Responses, rows: np.ndarray, space: Literal["comparison", "target", "sentences"]
    ) -> Embeddings:
        predicted, self.label_free_subjects = self.require_fit().predict(
            responses, rows, space, self.config.device
        )
        return predicted

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict training trials by a network that has not learnt from their images, for a prior to learn from.

        With ``out_of_fold: k`` the encoder is fitted k more times, each without a k-th of the concepts, and all trials
        are predicted. Otherwise the fitted network predicts the trials that it held out, which are fewer rows than
        trials, and none if nothing was held out. (Early stopping has looked at these trials, so that they are predicted
        slightly better than new ones.) Trials that a network learnt from are never predicted here. Vectors are in the
        space of the targets where the encoder can predict it, else in that of the comparison.

        Parameters
        ----------
        responses, targets
            What was given to `fit`.
        """
        fit = self.require_fit()
        if self.config.out_of_fold is None:
            rows = np.flatnonzero(np.isin(responses.stimulus_ids.astype(str), fit.held_out))
            return self._predict_rows(responses, rows, "target" if fit.predicts_targets else "comparison")
        from braindecode_vis.base.devices import get_rank
        from braindecode_vis.training.batches import code_trials

        _, stimuli, concepts = code_trials(responses)
        n_folds = self.config.out_of_fold
        # Whole concepts where there are enough for two in each fold, images otherwise.
        groups = concepts if len(np.unique(concepts)) >= 2 * n_folds else stimuli
        folds = make_inner_folds(
            groups,
            n_folds=n_folds,
            generator=make_generator(self.seed, "network", "out_of_fold"),
            setting="encoder.out_of_fold",
        )
        vectors = np.zeros((responses.n_trials, *fit.target_shape), dtype=np.float32)
        for number, fold in enumerate(folds):
            folder = None if self.workspace is None else self.workspace / f"out_of_fold{number}"
            other = self.copy_for(derive_seed(self.seed, "out_of_fold", number), folder)
            # In a folder of its own, so that a killed run resumes in the refit where it stopped.
            other._fit_rows(responses, targets, fold.train)
            if not get_rank():  # the first process writes for all
                vectors[fold.test] = other._predict_rows(responses, fold.test, "target").vectors
        return Embeddings(vectors, responses.stimulus_ids, fit.space)

    def score_held_out(
        self,
        responses: Responses,
        targets: Embeddings,
        *,
        rows: tuple[np.ndarray, np.ndarray, str],
        progress: float,
    ) -> dict[str, Any]:
        """Return what the fitted weights score on held-out trials, as the record of an epoch has it.

        Parameters
        ----------
        responses, targets
            What was given to `fit`.
        rows
            As `hold_out` returns them.
        progress
            Share of the training at which objectives that change with it are taken.
        """
        import torch

        from braindecode_vis.base.devices import choose_device
        from braindecode_vis.training.feed import Feed
        from braindecode_vis.training.loop import score_held_out

        fit = self.require_fit()
        device = torch.device(choose_device(self.config.device, setting="encoder.device"))
        self._descriptions = describe_images(
            self.config,
            responses,
            rows[0],
            lexicon=fit.lexicon,
            sizes=fit.model.sizes,
            memory=self.sentence_memory,
        )
        feed = Feed(
            responses, targets, transform=fit.transform, signal=fit.signal, rows=rows[0], held_rows=rows[1],
            settings=self.config, needs=self.config.needs, extras=self._collect_extras(), device=device,
            seed=derive_seed(self.seed, "training"),
        )  # fmt: skip
        model = fit.model.to(device)
        if model.tower is not None:
            feed.open_images(model.tower)
        return score_held_out(model, feed, fit.batch_size, progress)

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `predict` as a torch module, and these trials as its inputs."""
        fit = self.require_fit()
        return NetworkPrediction(fit).eval(), take_inputs(fit, responses)

    def as_any_montage(self) -> Any:
        """Return `predict` as a torch module over any channels and lengths, which `neuralbench.check_model` passes.

        Raises
        ------
        DataError
            If the positions of the channels are not known; see `fitted.MontagePrediction`.
        """
        return MontagePrediction(self.require_fit()).eval()

    def require_fit(self) -> NetworkFit:
        """Return the fit, or raise `DataError` before there is one."""
        if self.fitted is None:
            raise DataError("the network encoder has not been fitted; run train first.")
        return self.fitted

    # --- files --------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write weights and statistics as safetensors, everything else as JSON."""
        write_fit(folder, self.require_fit(), self.config, seed=self.seed, messages=self.messages)

    def read(self, folder: Path) -> NetworkEncoder:
        """Read what `write` wrote.

        Raises
        ------
        DataError
            If it was written with other settings or is of another architecture.
        """
        self.fitted, self.seed, self.messages = read_fit(folder, self.config)
        return self


@dataclass(frozen=True)
class HeldOut:
    """Training trials that the network never learns from.

    Parameters
    ----------
    mask : boolean array of shape (n_trials,)
    by
        ``concept`` or ``image``, what was held out whole; empty if nothing was.
    """

    mask: np.ndarray
    by: str


def hold_out(
    stimuli: np.ndarray, concepts: np.ndarray, fraction: float, *, seed: int, by: str = "concept"
) -> HeldOut:
    """Choose held-out trials.

    Concepts are held out if `fraction` of them are at least two and as many remain, images otherwise.

    Parameters
    ----------
    stimuli, concepts : int arrays of shape (n_trials,)
        Image and concept of each trial.
    fraction
        Share of the concepts (or images) to hold out; 0 holds out nothing.
    seed
        Decides which.
    by
        ``image`` holds out images in any case.

    Raises
    ------
    DataError
        If not even two images can be held out.
    """
    if fraction == 0:
        return HeldOut(np.zeros(len(stimuli), dtype=bool), "")
    # Whole concepts first: a zero-shot test asks for images of concepts never seen.
    for what, groups in (("concept", concepts), ("image", stimuli)):
        if what == "concept" and by == "image":
            continue
        names = np.unique(groups)
        n_held = round(fraction * len(names))
        if n_held >= FEWEST_HELD_OUT and len(names) - n_held >= FEWEST_HELD_OUT:
            # A stream of its own, so that other settings do not move who is held out.
            chosen = make_generator(seed, "hold_out", what).permutation(names)[:n_held]
            return HeldOut(np.isin(groups, chosen), what)
    raise DataError(
        f"{fraction:.0%} of {len(np.unique(stimuli))} training images are too few for a held-out set: "
        f"each side needs {FEWEST_HELD_OUT}; set encoder.selection.hold_out to another share, or do not "
        "hold out any (selection.kind last)."
    )


def check_enough_images(stimuli: np.ndarray, *, where: str) -> None:
    """Raise `DataError` unless there are two images to distinguish."""
    n_images = len(np.unique(stimuli))
    if n_images < 2:
        raise DataError(
            f"{where} {len(stimuli)} trial(s) of {n_images} image(s): a contrast needs at least two different images; "
            "use more training data or a smaller held-out share."
        )


def identify_training(
    config: Any,
    seed: int,
    responses: Responses,
    targets: Embeddings,
    train: np.ndarray,
    signal: Signal,
) -> dict[str, Any]:
    """Return what a checkpoint must agree with."""
    fields = config.hashed_fields()
    trials = responses.trials.iloc[train]
    # Lists: pandas takes 60 ms to join the strings of a thousand rows.
    columns = [trials[name].astype(str).tolist() for name in ("subject", "stimulus_id", "repetition")]
    # First and last trial only: hashing a data set of gigabytes would take long.
    ends = train[[0, -1]]
    digest = hashlib.sha256("\n".join(map("/".join, zip(*columns, strict=True))).encode())
    for array in (responses.data, targets.vectors):
        digest.update(np.ascontiguousarray(array[ends], dtype=np.float32).tobytes())
    signal_fields = {
        k: v for k, v in signal.as_json().items() if k in ("dims", "shape", "subjects", "n_voxels")
    }
    return {
        "network": fields.pop("network"),
        "config": fields,
        "signal": signal_fields,
        "target": {"space": targets.space, "shape": list(targets.vectors.shape[1:])},
        "data": digest.hexdigest()[:16],
        "seed": seed,
    }


def choose_batch_size(n_units: int) -> int:
    """Return an eighth of the training set as a power of two, from 16 to 1024.

    Examples
    --------
    >>> choose_batch_size(16540), choose_batch_size(1000), choose_batch_size(20)
    (1024, 64, 16)
    """
    eighth = 1 << max(0, (n_units // 8).bit_length() - 1)  # largest power of two not above n / 8
    return min(LARGEST_AUTO, max(SMALLEST_AUTO, eighth))


def keep_subjects(signal: Signal, names: set[str]) -> Signal:
    """Return the signal with these of its subjects."""
    kept = [i for i, name in enumerate(signal.subjects) if name in names]
    voxels = tuple(signal.n_voxels[i] for i in kept) if signal.n_voxels else ()
    return replace(signal, subjects=tuple(signal.subjects[i] for i in kept), n_voxels=voxels)


def describe_aligned(signal: Signal, transform: InputTransform) -> Signal:
    """Return what a network sees of aligned trials: components of a common space have no names and no places."""
    if transform.space is None:
        return signal
    shape = (transform.space.n_components, *signal.shape[1:])
    return Signal(signal.dims, shape, signal.subjects, times=signal.times, sfreq=signal.sfreq)


def take_rows(targets: Embeddings, rows: np.ndarray) -> Embeddings:
    """Return rows of the targets, which may repeat ids."""
    if np.array_equal(rows, np.arange(len(targets))):  # nothing to copy
        return Embeddings(np.asarray(targets.vectors, dtype=np.float32), targets.ids, targets.space)
    return Embeddings(np.asarray(targets.vectors[rows], dtype=np.float32), targets.ids[rows], targets.space)
