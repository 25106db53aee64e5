"""What a component must have and what it may have: one abstract class per role, and the `Context` of a run.

Abstract methods are required. Everything else of a role has its default in the class, so that a subclass writes the
abstract methods and its own special features. Methods that only make sense together are one small object
(`GeneratorView`, `FewTrialAdaptation`, `CaptionWriter`), which is None if a component does not have it. A component of
another package need not inherit from these classes: `braindecode_vis.base.roles` adds the defaults to a component that
has the required methods.

A component has two parts: settings (a frozen `Settings` with a `kind`) and the object that they build. Data sets,
augmentations, analyses and metrics have settings only. Nothing inherits from `Network` and `ObjectiveSettings`: a
network is a torch module, mostly of another package, and an objective is a subclass of ``ObjectiveConfig``, which this
module does not import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.settings import Settings

if TYPE_CHECKING:  # a configuration is read, and a wrong one refused, before numpy and pandas are loaded
    import numpy as np

    from braindecode_vis.base.arrays import Embeddings, ImageLikelihood, Responses
    from braindecode_vis.base.stimuli import StimulusSet

#: Called with steps done, steps in all and words on how it goes; a total of 0 means that the words are to be kept.
Progress = Callable[[int, int, str], None]

#: Encodes all stimuli with a pretrained encoder, from the embedding cache where they are known.
EmbedCached = Callable[[Any], "Embeddings"]


def count_steps(progress: Progress | None, total: int) -> Callable[[int, str], None]:
    """Return a function that is called with the number of steps since the last call and a text.

    Parameters
    ----------
    progress
        Function that gets the sum of the steps.
    total
        Total number of steps.
    """
    done = 0

    def advance(n: int, text: str) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total, text)

    return advance


@dataclass(frozen=True)
class Context:
    """Data that the pipeline gives a component before the fit, and again after it was read from a run folder.

    Parameters
    ----------
    images
        Every stimulus of the run; a component uses those of the trials that it gets.
    texts
        Text embedding of each of them, for a brain encoder whose settings say ``reads_text``.
    checkpoints
        Folder that remains after a killed run and is removed when the stage is done; it may not exist yet. None keeps
        no checkpoints.
    progress
        Shows the progress to the user.
    device
        ``auto``, ``cpu`` or ``cuda``, for components without a device setting.
    encoder
        The fitted brain encoder, for a prior that uses its likelihood of images.
    pretrained
        Folder of the encoder that the run has pretrained, for a brain encoder whose settings say ``uses_pretraining``.
    fitted_responses
        Folder of what `NetworkSettings.fit_responses` fitted to the same training trials.
    earlier
        Folder of a fit of the same settings to the same trials, which is made again: what time decided there is decided
        alike.
    """

    images: StimulusSet | None = None
    texts: Embeddings | None = None
    checkpoints: Path | None = None
    progress: Progress | None = None
    device: str = "auto"
    encoder: Any = None
    pretrained: Path | None = None
    fitted_responses: Path | None = None
    earlier: Path | None = None

    def take_part(self, name: str) -> Context:
        """Return the context of one of several trainings, for example of a fold, with a separate folder and name."""
        progress = self.progress
        return replace(
            self,
            checkpoints=None if self.checkpoints is None else self.checkpoints / name,
            progress=None
            if progress is None
            else lambda done, total, text: progress(done, total, f"{name}, {text}"),
        )


#: For components that are used outside a run.
NOTHING_LENT = Context()

OUT_OF_FOLD_FITS = 5  # of an encoder that has no out-of-fold predictions of its own


# --- what settings build --------------------------------------------------------------------------------------


class Built(ABC):
    """Methods of every component that settings build."""

    #: In words, for messages.
    role_name: ClassVar[str]
    #: Required values that come with the fit at the latest.
    learnt: ClassVar[tuple[str, ...]] = ()

    def bind(self, context: Context) -> None:
        """Receive the data of the pipeline, before the fit and again after reading."""

    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle, unless it is quickly computed again."""

    def read(self, folder: Path) -> Any:
        """Take over the fitted state of a folder and return this component, which `build` has just made.

        If the settings of a component have their own `read`, that one is called instead.
        """
        return self


class ImageEncoder(Built):
    """A frozen vision network, or a statistic fitted on training images, that turns images into vectors."""

    role_name: ClassVar[str] = "image encoder"
    learnt: ClassVar[tuple[str, ...]] = ("space",)

    @abstractmethod
    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_features); images are uint8 of shape (height, width, 3)."""

    @cached_property
    def space(self) -> str:
        """Name of the space: encoder, weights, layer and transform."""
        raise ConfigError(f"{name_class(self)} cannot be the {self.role_name}: it has no space.")

    #: Whether `decode` turns embeddings back into images.
    decodes: bool = False
    #: Height, width and colours of embeddings that are made of pixels; None of any other.
    shape: tuple[int, int, int] | None = None

    def fit(self, images: Iterable[np.ndarray]) -> Any:
        """Learn from training images and return this encoder; a pretrained one has nothing to learn."""
        return self

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3) of embeddings."""
        raise ConfigError(f"embeddings of the space {self.space!r} cannot be turned back into images.")

    def embed(
        self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: EmbedCached
    ) -> Embeddings:
        """Return the embedding of every stimulus, in the order of `stimuli`.

        Parameters
        ----------
        stimuli
            All images of the run.
        training_ids
            Distinct training images of the fold, the only ones that may be learnt from.
        embed_cached
            Returns a pretrained encoder's embeddings of all stimuli, from the embedding cache if they are there.
        """
        return embed_cached(self)

    def embed_texts(self, texts: Sequence[Sequence[str]], fill: np.ndarray) -> np.ndarray | None:
        """Return vectors of images that are known by texts only; None if the encoder reads no texts.

        Parameters
        ----------
        texts
            One or several texts of each of n images.
        fill : array of the shape of one embedding
            Values that are used where texts give no information.
        """
        return None

    def hide_texts(self, vectors: np.ndarray, fill: np.ndarray) -> np.ndarray | None:
        """Return embeddings in which the information of texts is replaced by `fill`; None if nothing is left."""
        return vectors


class FittedImageEncoder(ImageEncoder):
    """An image encoder that learns from training images, and must therefore write its fitted state."""

    role_name: ClassVar[str] = "image encoder fitted on training images"

    @abstractmethod
    def fit(self, images: Iterable[np.ndarray]) -> Any:
        """Learn from training images and return this encoder."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle."""

    @abstractmethod
    def read(self, folder: Path) -> Any:
        """Return this encoder with the fitted state of a folder; see `Built.read`."""

    def embed(
        self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: EmbedCached
    ) -> Embeddings:
        """Fit on the training images and return the embedding of every stimulus; the embedding cache keeps none."""
        return fit_and_embed(self, stimuli, training_ids)


def fit_and_embed(encoder: Any, stimuli: StimulusSet, training_ids: Sequence[str]) -> Embeddings:
    """Fit an image encoder on the training images and encode all stimuli, without the embedding cache."""
    from braindecode_vis.base.arrays import Embeddings

    encoder.fit(stimuli.iterate_images(training_ids))
    return Embeddings(encoder.encode(stimuli.iterate_images()), stimuli.ids, encoder.space)


def keep_targets(targets: Embeddings) -> Embeddings:
    """Return image embeddings as they are."""
    return targets


@dataclass(frozen=True)
class GeneratorView:
    """What a brain encoder gives to the prior and the generator, if it differs from the compared predictions.

    Parameters
    ----------
    predict
        Returns one embedding per trial.
    map_targets
        Returns image embeddings in the space of these predictions.
    predicts_targets
        Whether `predict` can predict embeddings of the target space.
    predicts_alike
        False where these predictions, with those of `BrainEncoder.predict_out_of_fold` and the likelihood, differ from
        those that are compared and are in the same space, so that names of spaces do not distinguish them.
    prior
        The prior of these predictions that was trained with the encoder, a
        `braindecode_vis.generation.priors.diffusion.DiffusionPriorTerm`; asked where the settings say ``trains_prior``.
    """

    predict: Callable[[Responses], Embeddings]
    map_targets: Callable[[Embeddings], Embeddings] = keep_targets
    predicts_targets: bool = True
    predicts_alike: bool = True
    prior: Any = None


@dataclass(frozen=True)
class FewTrialAdaptation:
    """How a fitted brain encoder continues to learn from a few trials, for example of a new subject.

    Parameters
    ----------
    adapt
        Returns another encoder, for ``(responses, targets)`` row by row; the encoder itself stays as it is.
    is_quick
        Whether it is fast enough to be repeated without each picture; other encoders take minutes.
    adapt_subject
        The same, but changes only weights of the new subject; `ConfigError` if the encoder has no such weights.
    """

    adapt: Callable[[Responses, Embeddings], Any]
    is_quick: bool = False
    adapt_subject: Callable[[Responses, Embeddings], Any] | None = None


@dataclass(frozen=True)
class CaptionWriter:
    """How a brain encoder writes captions; used if the settings say ``writes_captions``.

    Parameters
    ----------
    write
        Returns a caption of each trial, for ``(responses, n_beams)``.
    write_mean
        Returns the caption that is written without information from a response, for ``(n_beams)``.
    """

    write: Callable[[Responses, int], list[str]]
    write_mean: Callable[[int], str]


class BrainEncoder(Built):
    """Maps responses to image embeddings. Ridge and networks alike.

    `predict` and `map_targets` return vectors of the space in which predictions and images are compared,
    `predict_for_generator` and `map_for_generator` of the space from which images are made. Both are the target space
    unless a subclass changes this, in `map_targets` and in `generator_view`.
    """

    role_name: ClassVar[str] = "brain encoder"
    #: Returns another encoder of the same settings, not fitted; `roles.build` and `roles.read` set it.
    build_again: Callable[..., BrainEncoder] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for former, name in FORMER_METHODS.items():
            if former in vars(cls) and getattr(cls, name) is getattr(BrainEncoder, name):
                raise ConfigError(
                    f"{cls.__module__}.{cls.__qualname__} has {former}, which a brain encoder now gives as a part of "
                    f"{name}: add a property {name}, see base/contracts.py."
                )

    @abstractmethod
    def fit(self, responses: Responses, targets: Embeddings) -> Any:
        """Learn from training trials and return this encoder; `targets` has one row per trial, in the same order."""

    @abstractmethod
    def predict(self, responses: Responses) -> Embeddings:
        """Return one predicted embedding per trial."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle."""

    @abstractmethod
    def read(self, folder: Path) -> Any:
        """Return this encoder with the fitted state of a folder; see `Built.read`."""

    # --- abilities: None if the encoder does not have them ---

    @property
    def generator_view(self) -> GeneratorView | None:
        """What the prior and the generator get; None if it is the result of `predict`, in the target space."""
        return None

    @property
    def likelihood(self) -> ImageLikelihood | None:
        """How likely images are, given a prediction for the generator; None if that is not known."""
        return None

    @property
    def adaptation(self) -> FewTrialAdaptation | None:
        """How the encoder continues to learn from a few trials; None if it cannot."""
        return None

    @property
    def captions(self) -> CaptionWriter | None:
        """How the encoder writes captions of trials; None if it cannot."""
        return None

    # --- what any encoder can be asked ---

    #: Whether each subject's predictions must be searched in a gallery of its own; see `map_targets`.
    has_subject_galleries: bool = False
    #: Subjects whose alignment was computed from the very trials that were last predicted, a transductive result.
    label_free_subjects: tuple[str, ...] = ()

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict training trials by fits that have not seen their images; trials may be left out.

        Called on a fitted encoder, also one that was read from its files, and only if a prior or a generator learns
        from predictions. By default a few more encoders are fitted.
        """
        return predict_by_inner_folds(self, responses, targets)

    def list_held_out(self, responses: Responses) -> Sequence[str]:
        """Return the training images that `fit` would hold out of these trials to validate; none by default."""
        return ()

    def map_labels(
        self, training: Responses, test: Responses, images: Sequence[str]
    ) -> tuple[Any, Any | None] | None:
        """Return the predictions for `test` of a fit on `training`, as weights of image targets; nothing is fitted.

        For p-values by refits on relabelled images, which then cost one product each. The first array has the shape
        (n_penalties, n_test, n_images). The second, (n_penalties, n_images, n_images), gives the inner error of each
        penalty as the sum of it times the Gram matrix of the targets; None with one penalty. The default is None
        instead of both arrays, for predictions that are not linear in the targets for given responses.
        """
        return None

    def map_targets(self, targets: Embeddings, subject: str | None = None) -> Embeddings:
        """Return image embeddings in the space of `predict`."""
        return targets

    def predict_sentences(self, responses: Responses) -> Embeddings | None:
        """Return one vector per trial in the space of the sentence encoder that was learnt from; None without one."""
        return None

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `predict` as a torch module on the CPU, and its input tensors by name for these trials."""
        raise _refuse_module(self)

    # --- what the pipeline asks, whatever the abilities; no subclass overrides these ---

    def predict_for_generator(self, responses: Responses) -> Embeddings:
        """Return one embedding per trial for the prior and the generator; see `generator_view`."""
        view = self.generator_view
        return self.predict(responses) if view is None else view.predict(responses)

    def map_for_generator(self, targets: Embeddings) -> Embeddings:
        """Return image embeddings in the space of `predict_for_generator`."""
        view = self.generator_view
        return targets if view is None else view.map_targets(targets)

    @property
    def predicts_alike(self) -> bool:
        """Whether the generator gets the compared predictions; see `GeneratorView`."""
        view = self.generator_view
        return view is None or view.predicts_alike

    @property
    def predicts_targets(self) -> bool:
        """Whether `predict_for_generator` can predict embeddings of the target space."""
        view = self.generator_view
        return view is None or view.predicts_targets


#: Methods that brain encoders of earlier versions had, each with the property that gives it now.
FORMER_METHODS = {
    "predict_for_generator": "generator_view", "map_for_generator": "generator_view",
    "predicts_targets": "generator_view", "predicts_alike": "generator_view", "find_prior": "generator_view",
    "describe_likelihood": "likelihood", "adapt": "adaptation", "adapts_quickly": "adaptation",
    "describe": "captions", "describe_mean": "captions",
}  # fmt: skip


def predict_by_inner_folds(
    encoder: Any,
    responses: Responses,
    targets: Embeddings,
    *,
    n_folds: int = OUT_OF_FOLD_FITS,
    compared: bool = False,
) -> Embeddings:
    """Predict every training trial by an encoder that was fitted without the trials of its image.

    Parameters
    ----------
    encoder
        Encoder from `roles.build`, which can build another one of the same settings.
    responses, targets
        The arguments of its `fit`.
    n_folds
        How many encoders are fitted.
    compared
        Return the result of `predict`, which is compared with images, instead of the input of the generator.

    Raises
    ------
    DataError
        If the encoder was made without settings.
    """
    import numpy as np

    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.base.seeds import derive_seed, make_generator

    ids = responses.stimulus_ids.astype(str)
    distinct = make_generator(0, "role", "out_of_fold").permutation(np.unique(ids))
    n_folds = min(n_folds, len(distinct))
    if n_folds < 2:
        return targets.take(slice(0))
    if encoder.build_again is None:
        raise DataError(
            f"{name_class(encoder)} was made without settings, so another one cannot be built from it."
        )
    held_out, predicted = [], []
    for number in range(n_folds):
        held = np.isin(ids, distinct[number::n_folds])
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
        other = encoder.build_again(seed=derive_seed(0, "role", "out_of_fold", number))
        other.fit(responses.select(train), targets.take(train))
        held_out.append(test)
        predict = other.predict if compared else other.predict_for_generator
        predicted.append(predict(responses.select(test)))
    order = np.argsort(np.concatenate(held_out))  # back to the order of the trials
    vectors = np.concatenate([part.vectors for part in predicted])[order]
    return Embeddings(vectors, responses.stimulus_ids, predicted[0].space)


class CategoryDecoder(Built):
    """Decodes which class was seen, for data without images."""

    role_name: ClassVar[str] = "category decoder"
    learnt: ClassVar[tuple[str, ...]] = ("classes",)

    @abstractmethod
    def fit(self, responses: Responses, labels: np.ndarray) -> Any:
        """Learn from training trials and the name of the class of each, and return this decoder."""

    @abstractmethod
    def decision(self, responses: Responses) -> np.ndarray:
        """Return decision values of shape (n_trials, n_classes); the largest of a row is the answer."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle."""

    @abstractmethod
    def read(self, folder: Path) -> Any:
        """Return this decoder with the fitted state of a folder; see `Built.read`."""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `decision`."""
        raise ConfigError(f"{name_class(self)} cannot be the {self.role_name}: it has no classes.")

    #: How many small fits one `fit` takes, where labels of whole subjects are tested by fitting many times; 0 where
    #: that is too dear.
    n_small_fits: int = 0

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `decision` as a torch module on the CPU, and its input tensors by name for these trials."""
        raise _refuse_module(self)


class Prior(Built):
    """Moves predicted embeddings toward the distribution of image embeddings."""

    role_name: ClassVar[str] = "prior"

    @abstractmethod
    def fit(self, predicted: Any, target: Embeddings, *, images: Embeddings | None = None) -> Any:
        """Learn from training pairs, and possibly from embeddings of images that were not shown.

        Returns this prior. `predicted` are embeddings like `target`; None if the settings say
        ``needs_predictions = False``.
        """

    @abstractmethod
    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return `n_draws` embeddings per row, draws of one row next to each other."""

    def describe(self) -> Mapping[str, Any]:
        """Return the choices made in the fit, for the provenance of the images; empty if there are none."""
        return {}


class ImageGenerator(Built):
    """Turns embeddings into images."""

    role_name: ClassVar[str] = "image generator"

    @abstractmethod
    def accepts(self, space: str) -> bool:
        """Say whether embeddings of this space can be turned into images."""

    @abstractmethod
    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3)."""

    #: Whether `generate` also takes ``initial`` images and the ``strength`` with which it leaves them.
    supports_initial: bool = False
    #: Whether `generate` also takes ``prompts``, a text for each row.
    supports_prompts: bool = False
    #: Rows that are given to `generate` at a time, with the number of the first as ``first_row``, on which their noise
    #: depends; None gives it all rows in one call, without that number.
    rows_at_once: int | None = None
    #: Height and width of what it makes, where they are known before the first image.
    image_size: tuple[int, int] | None = None

    def describe(self) -> Mapping[str, Any]:
        """Return the choices made on the training split, for the provenance of the images; empty if there are none."""
        return {}

    def for_predictions(self, drawn: bool = False) -> ImageGenerator:
        """Return the generator for predicted embeddings, which are less certain than embeddings of images.

        Embeddings that a prior has `drawn` from them are treated like embeddings of images.
        """
        return self

    def find_copies(self, embeddings: Embeddings) -> np.ndarray | None:
        """Return the row of the training image that each embedding gets, or None if images are made and not copied."""
        return None

    def read_known_images(self) -> Embeddings:
        """Return embeddings of the generator's own images; see ``knows_images``."""
        raise ConfigError(f"the generator {find_class(self).__name__} has no images of its own.")


class Network(ABC):
    """A network, a torch module; `encoders.signal` defines its input data and subjects.

    No module inherits from this class: most are of other packages, and a torch module has a base class already.
    """

    role_name: ClassVar[str] = "network"
    #: Returns ``(compared, regressed)`` for ``(data, subject)``; None with one head.
    forward_heads: Callable[[Any, Any], tuple[Any, Any]] | None = None
    #: Returns local outputs of shape (batch, n_tokens, n_outputs) for ``(data, subject)``; None if there are none.
    forward_tokens: Callable[[Any, Any], Any] | None = None
    #: Samples from one local output to the next; None if they part the trial evenly, 0 where they are not in time.
    token_step: float | None = None
    #: Called with the `braindecode_vis.encoders.signal.TrialPairs` of the training before it begins; None if nothing of
    #: the network comes from them.
    prepare: Callable[[Any], None] | None = None

    @abstractmethod
    def forward(self, data: Any, subject: Any) -> Any:
        """Return outputs of shape (batch, n_outputs)."""

    def parameter_groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the parameters with other learning rates or weight decay than the rest.

        Each group has ``params`` and any of ``lr``, ``lr_scale`` (a factor of the common rate) and ``weight_decay``.
        """
        return ()

    def enter_epoch(self, progress: float) -> Sequence[Any]:
        """Return the parameters that are frozen in an epoch, which begins at this share of the training."""
        return ()


# --- settings -------------------------------------------------------------------------------------------------


class ComponentSettings(Settings):
    """Settings of a component, or a component that is its own settings."""

    #: In words, for messages.
    role_name: ClassVar[str]
    if TYPE_CHECKING:  # each kind declares its own, ``kind: Literal["x"] = "x"``
        kind: str = ""


class Dataset(ComponentSettings):
    """A data set, which is its own settings; in addition to these methods it has one of those in `roles.SOURCES`."""

    role_name: ClassVar[str] = "data set"

    @abstractmethod
    def check(self) -> Sequence[Any]:
        """Compare the files on disk with what is expected; one finding per file or fact."""

    @abstractmethod
    def hash_inputs(self) -> Mapping[str, Any]:
        """Return digests of the files that are read, which enter the fingerprint."""

    #: What is known without its files, as `braindecode_vis.datasets.manifests.Manifest`; None if nothing is.
    manifest: ClassVar[Any] = None

    def standardises(self) -> str:
        """Return which training trials are used to standardise responses before the split, or ``none``."""
        return "none"

    def learns_before_split(self) -> tuple[str, ...]:
        """Return the active settings that learn from declared training trials before the split is drawn."""
        return ()

    def find_phantom(self) -> Path | None:
        """Return the folder of the data set if it is simulated and its truth is stored beside it."""
        return None

    def continues(self) -> tuple[str, ...]:
        """Return the kinds of other data sets whose finished runs can be applied to these trials."""
        return ()


class ImageEncoderSettings(ComponentSettings):
    """Settings of an image encoder."""

    role_name: ClassVar[str] = "settings of an image encoder"

    @abstractmethod
    def build(self) -> Any:
        """Return the image encoder, not fitted."""

    #: Whether the target differs from fold to fold; the encoder is a `FittedImageEncoder` then.
    fitted_on_training_images: ClassVar[bool] = False
    #: Whether it embeds texts about images, and not the images.
    of_texts: ClassVar[bool] = False

    def read_attributes(self) -> Any:
        """Return the `embeddings.attribute_table.AttributeTable` with the attributes that the tokens give, or None."""
        return None

    def read(self, folder: Path) -> Any:
        """Return the fitted image encoder that was written into `folder`."""
        built = self.build()
        # One of another package may have nothing to read.
        return built.read(folder) if has_name(built, "read") else built


class EncoderSettings(ComponentSettings):
    """Settings of a brain encoder or of a category decoder, which share one key in the configuration."""

    role_name: ClassVar[str] = "settings of an encoder"

    @abstractmethod
    def build(self, *, seed: int) -> Any:
        """Return the encoder, not fitted."""

    #: Whether it names classes, and is a category decoder.
    decodes_categories: ClassVar[bool] = False
    #: Whether it needs `Context.texts`.
    reads_text: ClassVar[bool] = False
    #: Whether it needs `Context.pretrained`.
    uses_pretraining: ClassVar[bool] = False
    #: Whether several processes can share its training.
    trains_in_processes: ClassVar[bool] = False
    #: False where it is known before the fit that there is no `BrainEncoder.likelihood`.
    may_know_likelihood: ClassVar[bool] = True
    #: Whether it has `BrainEncoder.captions`.
    writes_captions: ClassVar[bool] = False
    #: Whether it trains a prior beside itself, which `GeneratorView.prior` is.
    trains_prior: ClassVar[bool] = False
    #: Largest power by which the time of a fit grows with trials and features together, for a plan.
    growth: ClassVar[float] = 3.0

    @property
    def pools_volumes(self) -> bool:
        """Whether a category decoder pools the decisions of a trial's volumes: its setting ``pool``, if it has one."""
        return bool(getattr(self, "pool", False))

    def list_members(self) -> Sequence[Any]:
        """Return the settings of the encoders inside this one: its setting ``members``, if it has one."""
        members: Sequence[Any] = getattr(self, "members", ())
        return members

    def check_low_level(self, n_values: int) -> None:
        """Raise `ConfigError` unless it can predict latents of so many values that become images."""

    def read(self, folder: Path) -> Any:
        """Return the fitted encoder that was written into `folder`."""
        return self.build(seed=0).read(folder)  # the seed of a fit lies in the files of the fit


class NetworkSettings(ComponentSettings):
    """Settings of a network."""

    role_name: ClassVar[str] = "settings of a network"

    @abstractmethod
    def build(self, signal: Any, n_outputs: int) -> Any:
        """Return the torch module of a `braindecode_vis.encoders.signal.Signal`, with all of its weights."""

    @property
    def has_two_heads(self) -> bool:
        """Whether the network has `forward_heads`: whether its setting ``heads``, if it has one, is ``two``."""
        return bool(getattr(self, "heads", "one") == "two")

    #: Name of the setting that counts the steps of `Network.prepare`, so that a plan can measure a few of them.
    preparation_steps: ClassVar[str] = ""
    #: Fits how responses of all subjects follow from targets, called with the number of features of each subject by its
    #: name, the `braindecode_vis.encoders.signal.TrialPairs` of z-scored features, a seed, and a folder for what
    #: `Network.prepare` may take from the fit; returns what gives a subject's responses to targets, called with its
    #: number and an array of shape (n, n_values). None if it cannot.
    fit_responses: ClassVar[Any] = None


class Augmentation(ComponentSettings):
    """An augmentation, which is its own settings."""

    role_name: ClassVar[str] = "augmentation"

    @abstractmethod
    def apply(self, data: Any, generator: Any, signal: Any) -> Any:
        """Return data of shape (batch, *signal.shape), changed by draws of a torch generator on its device."""


class ObjectiveSettings(ComponentSettings):
    """Members of an objective; a subclass of `training.objectives.objectives_config.ObjectiveConfig` has all of it."""

    role_name: ClassVar[str] = "settings of an objective (subclass ObjectiveConfig)"
    required: ClassVar[tuple[str, ...]] = ("build", "weight", "phase", "needs", "contrastive", "is_active")


class PriorSettings(ComponentSettings):
    """Settings of a prior."""

    role_name: ClassVar[str] = "settings of a prior"

    @abstractmethod
    def build(self, *, seed: int) -> Any:
        """Return the prior, not fitted."""

    #: Whether it learns from predictions of training trials, which are made for nothing else.
    needs_predictions: ClassVar[bool] = True
    #: Whether its draws are meant to be embeddings of images, and not predictions.
    draws_images: ClassVar[bool] = True
    #: Whether it knows the images that the generator has of its own.
    asks_generator: ClassVar[bool] = False
    #: Whether the brain encoder must have a `BrainEncoder.likelihood`.
    asks_likelihood: ClassVar[bool] = False
    #: Whether it is the prior that the brain encoder has trained.
    asks_trained_prior: ClassVar[bool] = False

    def find_images(self, training: Embeddings, generator: Any, tested: Embeddings) -> Embeddings:
        """Return the images that the prior may use, by default those of the training split."""
        return training

    def describe_choices(self) -> list[str]:
        """Describe the choices that make a different protocol from one draw per image."""
        return []

    def read(self, folder: Path) -> Any:
        """Return the fitted prior that was written into `folder`."""
        built = self.build(seed=0)
        if not has_name(built, "read"):  # it has written itself, or there would be nothing to read
            raise ConfigError(f"{name_class(built)} cannot be the prior: it has no read.")
        return built.read(folder)


class GeneratorSettings(ComponentSettings):
    """Settings of an image generator."""

    role_name: ClassVar[str] = "settings of an image generator"

    @abstractmethod
    def build(self, data: Any) -> Any:
        """Return the generator, made with a `braindecode_vis.generation.generator_data.GeneratorData`."""

    #: Whether it learns from predictions of training trials, which are made for nothing else.
    needs_predictions: ClassVar[bool] = False
    #: Whether it needs the noise of single repetitions.
    weighs_predictions: ClassVar[bool] = False
    #: Whether `ImageGenerator.read_known_images` has any.
    knows_images: ClassVar[bool] = False
    #: Whether it can start from an image.
    supports_initial: ClassVar[bool] = False
    #: Whether it reads a text for each trial.
    supports_prompts: ClassVar[bool] = False
    #: Whether `generate` also takes ``texts``, tokens of a text for each row.
    supports_texts: ClassVar[bool] = False
    #: Whether `generate` must be given ``texts``.
    needs_texts: ClassVar[bool] = False
    #: Whether it shows training images as they are, from embeddings of any space.
    copies_training_images: ClassVar[bool] = False

    @property
    def n_steps(self) -> int | None:
        """Steps of its denoising: its setting ``steps``; None for one without."""
        steps: int | None = getattr(self, "steps", None)
        return steps

    def accepts(self, target_kind: str) -> bool:
        """Say whether targets of this kind can be turned into images, judged by the settings."""
        return True

    def describe_choices(self) -> list[str]:
        """Describe the choices that make a different protocol from one draw per image."""
        return []

    def read(self, folder: Path, data: Any) -> Any:
        """Return the generator that was written into `folder`; by default it is built again from the same data."""
        return self.build(data)  # what is chosen on the same training data is the same again


class MetricSettings(ComponentSettings):
    """Settings of a metric."""

    role_name: ClassVar[str] = "settings of a metric"

    @abstractmethod
    def build(self) -> Any:
        """Return a `braindecode_vis.scoring.metrics.metric_registry.Metric`."""


class Analysis(ComponentSettings):
    """An analysis, which is its own settings."""

    role_name: ClassVar[str] = "analysis"

    @abstractmethod
    def compute(self, study: Any) -> Any:
        """Return the findings about a `braindecode_vis.parts.analyses.study.Study`."""

    #: Whether it looks at the encoder of the run, and so at the features that were chosen for it.
    uses_encoder: ClassVar[bool] = True
    #: Whether it needs test trials that show a picture.
    needs_pictures: ClassVar[bool] = True
    #: Whether it shows what the run's prior and generator make, and so depends on their settings.
    makes_images: ClassVar[bool] = False


# --- words ----------------------------------------------------------------------------------------------------


def find_class(component: Any) -> type[Any]:
    """Return the class of a component, its own where `roles` has completed it."""
    return type(getattr(component, "component", component))


def name_class(component: Any) -> str:
    """Return module and name of the class of a component, for messages."""
    cls = find_class(component)
    return f"{cls.__module__}.{cls.__qualname__}"


def has_name(component: Any, name: str) -> bool:
    """Say whether a component has the attribute, without computing a property: a space may need a fit first."""
    return hasattr(type(component), name) or name in getattr(component, "__dict__", {})


def _refuse_module(component: Any) -> ConfigError:
    return ConfigError(
        f"{find_class(component).__name__} has no method as_module, so it cannot be exported as a "
        "program; choose safetensors."
    )
