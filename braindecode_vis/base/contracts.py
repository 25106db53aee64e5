"""Interfaces of the components, role by role, and the `Context` that the pipeline hands to them.

For each role there is what a component must have (`BrainEncoder`) and the whole of it (`WholeBrainEncoder`), which is
what the pipeline sees after `braindecode_vis.base.roles.play` has filled in the defaults. The tables of which names are
required and what the defaults are stand in `roles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:  # a configuration is read, and a wrong one refused, before numpy and pandas are loaded
    import numpy as np

    from braindecode_vis.base.arrays import Embeddings, ImageLikelihood, Responses
    from braindecode_vis.base.stimuli import StimulusSet

#: Called with steps done, steps in all and words on how it goes; a total of 0 means that the words are to be kept.
Progress = Callable[[int, int, str], None]

#: Encodes all stimuli with a pretrained encoder, from the embedding cache where they are known.
EmbedCached = Callable[[Any], "Embeddings"]


def count_steps(progress: Progress | None, total: int) -> Callable[[int, str], None]:
    """Return what is called with the number of steps done since the last call and words on them.

    Parameters
    ----------
    progress
        Is told the sum of them.
    total
        Steps in all.
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
    """What the pipeline lends a component before it learns, and again after it was read from a run folder.

    Parameters
    ----------
    images
        Every stimulus of the run; a component looks at those of the trials it was given.
    texts
        Text embedding of each of them, for a brain encoder whose settings say ``reads_text``.
    checkpoints
        Folder that outlives a killed run and is removed when the stage is done; not made yet. None keeps nothing.
    progress
        Tells the user how it goes.
    device
        ``auto``, ``cpu`` or ``cuda``, for components without a setting of their own.
    encoder
        The fitted brain encoder, for a prior that asks it how likely images are.
    pretrained
        Folder of the encoder that the run has pretrained, for a brain encoder whose settings say ``uses_pretraining``.
    """

    images: StimulusSet | None = None
    texts: Embeddings | None = None
    checkpoints: Path | None = None
    progress: Progress | None = None
    device: str = "auto"
    encoder: Any = None
    pretrained: Path | None = None

    def take_part(self, name: str) -> Context:
        """Return the context of one of several trainings, for example of a fold: a folder and a name of its own."""
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

# --- what must be there ------------------------------------------------------------------------------------


@runtime_checkable
class Dataset(Protocol):
    """A data set, which is its own settings; beside these methods it has one of those in `SOURCES`."""

    kind: str

    def check(self) -> Sequence[Any]:
        """Compare the files on disk with what is expected; one finding per file or fact."""
        ...

    def hash_inputs(self) -> Mapping[str, Any]:
        """Return digests of the files that are read, which enter the fingerprint."""
        ...

    def hashed_fields(self) -> dict[str, Any]:
        """Return the settings that enter the fingerprint."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen vision network, or a statistic fitted on training images, that turns images into vectors."""

    @property
    def space(self) -> str:
        """Name of the space: encoder, weights, layer and transform."""
        ...

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return float32 vectors of shape (n_images, n_features); images are uint8 of shape (height, width, 3)."""
        ...


@runtime_checkable
class BrainEncoder(Protocol):
    """Maps responses to image embeddings. Ridge and networks alike."""

    def fit(self, responses: Responses, targets: Embeddings) -> Self:
        """Learn from training trials; `targets` has one row per trial, in the same order."""
        ...

    def predict(self, responses: Responses) -> Embeddings:
        """Return one predicted embedding per trial."""
        ...

    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle."""
        ...

    def read(self, folder: Path) -> Self:
        """Take the fitted state from `folder` and return this component; called on one fresh from `build`."""
        ...


@runtime_checkable
class CategoryDecoder(Protocol):
    """Says which class was seen, for data that know no image."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `decision`."""
        ...

    def fit(self, responses: Responses, labels: np.ndarray) -> Self:
        """Learn from training trials and the name of the class of each."""
        ...

    def decision(self, responses: Responses) -> np.ndarray:
        """Return decision values of shape (n_trials, n_classes); the largest of a row is the answer."""
        ...

    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle."""
        ...

    def read(self, folder: Path) -> Self:
        """Take the fitted state from `folder` and return this component; called on one fresh from `build`."""
        ...


@runtime_checkable
class Prior(Protocol):
    """Moves predicted embeddings toward the distribution of image embeddings."""

    def fit(
        self, predicted: Embeddings | None, target: Embeddings, *, images: Embeddings | None = None
    ) -> Self:
        """Learn from training pairs, and from the embeddings of images that were not shown where that helps.

        A prior whose settings say ``needs_predictions = False`` is given no predictions.
        """
        ...

    def sample(self, predicted: Embeddings, *, n_draws: int, seed: int) -> Embeddings:
        """Return `n_draws` embeddings per row, draws of one row next to each other."""
        ...


@runtime_checkable
class ImageGenerator(Protocol):
    """Turns embeddings into images."""

    def accepts(self, space: str) -> bool:
        """Say whether embeddings of this space can be turned into images."""
        ...

    def generate(self, embeddings: Embeddings, *, seed: int) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3)."""
        ...


# --- the whole role, as the pipeline sees it after `play` ---------------------------------------------------


class WholeDataset(Dataset, Protocol):
    """A data set with its defaults."""

    #: What is known without its files, as `braindecode_vis.datasets.manifests.Manifest`; None where nothing is.
    manifest: Any

    def standardises(self) -> str:
        """Return over which of their training trials responses are standardised before the split, or ``none``."""
        ...

    def learns_before_split(self) -> tuple[str, ...]:
        """Return the settings in force that learn from declared training trials before the split is drawn."""
        ...

    def find_phantom(self) -> Path | None:
        """Return the folder of the data set if it is simulated and its truth lies beside it."""
        ...

    def continues(self) -> tuple[str, ...]:
        """Return the kinds of other data sets whose finished runs can be applied to these trials."""
        ...


class WholeImageEncoder(ImageEncoder, Protocol):
    """An image encoder with its defaults."""

    #: Whether `decode` turns embeddings back into images.
    decodes: bool
    #: Height, width and colours of embeddings that are made of pixels; None of any other.
    shape: tuple[int, int, int] | None

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...

    def fit(self, images: Iterable[np.ndarray]) -> Self:
        """Learn from training images; a pretrained encoder returns itself."""
        ...

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Return uint8 images of shape (n_rows, height, width, 3) of embeddings."""
        ...

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
            Returns a pretrained encoder's embeddings of all stimuli, from the embedding cache where they are known.
        """
        ...

    def embed_texts(self, texts: Sequence[Sequence[str]], fill: np.ndarray) -> np.ndarray | None:
        """Return vectors of images of which nothing is known but their texts; None where the encoder reads no texts.

        Parameters
        ----------
        texts
            One or several of each of n images.
        fill : array of the shape of one embedding
            What stands where texts say nothing.
        """
        ...

    def hide_texts(self, vectors: np.ndarray, fill: np.ndarray) -> np.ndarray | None:
        """Return embeddings without what texts say in them, with `fill` in its place; None where nothing is left."""
        ...

    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle; a pretrained encoder writes nothing."""
        ...

    def read(self, folder: Path) -> Self:
        """Take the fitted state from `folder`."""
        ...


class WholeBrainEncoder(BrainEncoder, Protocol):
    """A brain encoder with its defaults.

    `predict` and `map_targets` meet in the space in which predictions and images are compared, `predict_for_generator`
    and `map_for_generator` in the space from which images are made. Both are the target space by default.
    """

    #: Whether each subject's predictions must be searched in a gallery of its own.
    has_subject_galleries: bool
    #: Whether `predict_for_generator` can predict embeddings of the target space.
    predicts_targets: bool
    #: False where `predict_for_generator`, with `predict_out_of_fold` and the likelihood, predicts otherwise than
    #: `predict` in the same space, so that names of spaces do not tell them apart.
    predicts_alike: bool
    #: Subjects whose alignment was computed from the very trials that were last predicted, a transductive result.
    label_free_subjects: tuple[str, ...]
    #: Whether `adapt` may be repeated without each picture, where others take minutes.
    adapts_quickly: bool

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict training trials by fits that have not seen their images; trials may be left out.

        Asked of a fitted encoder, also one that was read from its files, and only where a prior or a generator learns
        from predictions.
        """
        ...

    def list_held_out(self, responses: Responses) -> Sequence[str]:
        """Return the training images that `fit` would hold out of these trials to validate; none by default."""
        ...

    def map_labels(
        self, training: Responses, test: Responses, images: Sequence[str]
    ) -> tuple[Any, Any | None] | None:
        """Return what a fit on `training` predicts of `test` as weights of the targets of images; nothing is fitted.

        For p-values by refits on relabelled images, which then cost one product each. The first array has the shape
        (n_penalties, n_test, n_images). The second, (n_penalties, n_images, n_images), gives the inner error of each
        penalty as the sum of it times the Gram matrix of the targets; None with one penalty. None altogether, the
        default, where predictions are not linear in the targets for given responses.
        """
        ...

    def map_targets(self, targets: Embeddings, subject: str | None = None) -> Embeddings:
        """Return image embeddings in the space of `predict`."""
        ...

    def predict_for_generator(self, responses: Responses) -> Embeddings:
        """Return one embedding per trial for the prior and the generator."""
        ...

    def map_for_generator(self, targets: Embeddings) -> Embeddings:
        """Return image embeddings in the space of `predict_for_generator`."""
        ...

    def predict_sentences(self, responses: Responses) -> Embeddings | None:
        """Return one vector per trial in the space of the sentence encoder that was learnt from; None without one."""
        ...

    def describe_likelihood(self) -> ImageLikelihood | None:
        """Return how likely images are, given a prediction of `predict_for_generator`; None if that is not known."""
        ...

    def find_prior(self) -> Any:
        """Return the prior of `predict_for_generator` that was trained with the encoder; None without one.

        Asked where the settings say ``trains_prior``; a `braindecode_vis.generation.priors.joint.DiffusionPriorTerm`.
        """
        ...

    def describe(self, responses: Responses, n_beams: int = 1) -> list[str]:
        """Return a caption of each trial; asked where the settings say ``writes_captions``."""
        ...

    def describe_mean(self, n_beams: int = 1) -> str:
        """Return the caption that is written where no response says anything."""
        ...

    def adapt(self, responses: Responses, targets: Embeddings) -> BrainEncoder:
        """Return an encoder that goes on learning from a few trials, for example of a new subject; this one stays."""
        ...

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `predict` as a torch module on the CPU, and its input tensors by name for these trials."""
        ...


class WholeCategoryDecoder(CategoryDecoder, Protocol):
    """A category decoder with its defaults."""

    #: How many small fits one `fit` takes, where labels of whole subjects are tested by fitting many times; 0 where
    #: that is too dear.
    n_small_fits: int

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return `decision` as a torch module on the CPU, and its input tensors by name for these trials."""
        ...

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...


class WholePrior(Prior, Protocol):
    """A prior with its defaults."""

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return what was chosen in the fit, for the provenance of the images; empty where nothing was."""
        ...

    def write(self, folder: Path) -> None:
        """Write the fitted state into `folder` without pickle; one that is fitted again as fast writes nothing."""
        ...

    def read(self, folder: Path) -> Self:
        """Take the fitted state from `folder`."""
        ...


class WholeImageGenerator(ImageGenerator, Protocol):
    """An image generator with its defaults."""

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return what was chosen on the training split, for the provenance of the images; empty where nothing was."""
        ...

    def for_predictions(self, drawn: bool = False) -> WholeImageGenerator:
        """Return the generator of embeddings that a brain encoder predicted, which are less certain than images'.

        Those that a prior has `drawn` from them pretend to be embeddings of images.
        """
        ...

    #: Whether `generate` also takes ``initial`` images and the ``strength`` with which it leaves them.
    supports_initial: bool
    #: Whether `generate` also takes ``prompts``, a text for each row.
    supports_prompts: bool
    #: Rows that are given to `generate` at a time, with the number of the first as ``first_row``, on which their noise
    #: depends; None gives it all rows in one call, without that number.
    rows_at_once: int | None
    #: Height and width of what it makes, where they are known before the first image.
    image_size: tuple[int, int] | None

    def find_copies(self, embeddings: Embeddings) -> np.ndarray | None:
        """Return the row of the training image that each embedding gets, or None if images are made and not copied."""
        ...

    def read_known_images(self) -> Embeddings:
        """Return embeddings of images that the generator brings along; see ``knows_images``."""
        ...

    def write(self, folder: Path) -> None:
        """Write what was trained when it was built, without pickle; its settings' `read` takes it from there."""
        ...


class WholeNetwork(Protocol):
    """A network, a torch module, with its defaults; `encoders.signal` says what data and subjects are."""

    #: Returns ``(compared, regressed)`` for ``(data, subject)``; None of a network with one head. See ``heads``.
    forward_heads: Callable[[Any, Any], tuple[Any, Any]] | None
    #: Returns local outputs of shape (batch, n_tokens, n_outputs) for ``(data, subject)``; None where there are none.
    forward_tokens: Callable[[Any, Any], Any] | None
    #: Samples from one local output to the next; None where they part the trial evenly, 0 where they are not in time.
    token_step: float | None

    def forward(self, data: Any, subject: Any) -> Any:
        """Return outputs of shape (batch, n_outputs)."""
        ...

    def parameter_groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the parameters that learn otherwise than the rest.

        Each group has ``params`` and any of ``lr``, ``lr_scale`` (a factor of the common rate) and ``weight_decay``.
        """
        ...

    def enter_epoch(self, progress: float) -> Sequence[Any]:
        """Return the parameters that rest in an epoch, which begins at this share of the training."""
        ...


class Analysis(Protocol):
    """An analysis, which is its own settings, with its defaults."""

    kind: str
    #: Whether it looks at the encoder of the run, and so at the features that were chosen for it.
    uses_encoder: bool
    #: Whether it needs test trials that show a picture.
    needs_pictures: bool
    #: Whether it shows what the run's prior and generator make, and so hangs on their settings.
    makes_images: bool

    def compute(self, study: Any) -> Any:
        """Return the findings about a `braindecode_vis.parts.analyses.study.Study`."""
        ...

    def hashed_fields(self) -> dict[str, Any]:
        """Return the settings that enter the fingerprint."""
        ...


class WholeSettings(Protocol):
    """Settings of a component with the defaults of its role; the tables of `roles` say which a role has."""

    kind: str
    #: Image encoder: whether the target differs from fold to fold.
    fitted_on_training_images: bool
    #: Image encoder: whether it embeds what is said of images, and looks at none.
    of_texts: bool
    #: Encoder: whether it names classes, and is a category decoder.
    decodes_categories: bool
    #: Brain encoder: whether it wants `Context.texts`.
    reads_text: bool
    #: Brain encoder: whether it wants `Context.pretrained`.
    uses_pretraining: bool
    #: Brain encoder: settings of the encoders that it averages; see `roles.list_encoders`.
    members: Sequence[Any]
    #: Brain encoder: False where it is known before the fit that `describe_likelihood` has nothing to say.
    may_know_likelihood: bool
    #: Brain encoder: whether it has `describe`.
    writes_captions: bool
    #: Brain encoder: whether it trains a prior beside itself, which `find_prior` returns.
    trains_prior: bool
    #: Encoder: whether several processes can share its training.
    trains_in_processes: bool
    #: Category decoder: whether the decisions of a trial's volumes are pooled.
    pool: bool
    #: Prior and generator: whether they learn from predictions of training trials, which are made for nobody else.
    needs_predictions: bool
    #: Prior: whether it knows images that the generator brings along.
    asks_generator: bool
    #: Prior: whether the brain encoder must have `describe_likelihood`.
    asks_likelihood: bool
    #: Prior: whether it is the one that the brain encoder has trained.
    asks_trained_prior: bool
    #: Prior: whether its draws are meant to be embeddings of images, and not predictions.
    draws_images: bool
    #: Generator: whether it wants the noise of single repetitions.
    weighs_predictions: bool
    #: Generator: whether `read_known_images` has any.
    knows_images: bool
    #: Generator: whether it can start from an image.
    supports_initial: bool
    #: Generator: whether it reads a text for each trial.
    supports_prompts: bool
    #: Generator: whether `generate` also takes ``texts``, tokens of a text for each row, and whether it must have them.
    supports_texts: bool
    needs_texts: bool
    #: Generator: steps of its denoising; None for one without.
    steps: int | None
    #: Generator: whether it shows training images as they are, from embeddings of any space.
    copies_training_images: bool

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Return the component, not fitted: of encoders, decoders and priors with `seed`, of generators with data."""
        ...

    def read(self, folder: Path, *args: Any) -> Any:
        """Return the fitted component that was written into `folder`; of generators with the data of `build`."""
        ...

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain values that enter the fingerprint."""
        ...

    def list_parts(self, stimuli: StimulusSet) -> Any:
        """Image encoder: return what tokens or features mean (`embeddings.attribute_table.TargetParts`), or None."""
        ...

    def check_low_level(self, n_values: int) -> None:
        """Encoder: raise `ConfigError` unless it can predict latents of so many values that become images."""
        ...

    def accepts(self, target_kind: str) -> bool:
        """Generator: say whether targets of this kind can be turned into images, as far as settings can tell."""
        ...

    def find_images(self, training: Embeddings, generator: Any, tested: Embeddings) -> Embeddings:
        """Prior: return the images that it may know, by default those of the training split."""
        ...

    def describe_choices(self) -> list[str]:
        """Return what makes images those of another protocol than one draw, in words."""
        ...
