"""The roles of the pipeline: what a component must have, and what happens where it has no more than that.

A component is two things: settings (a frozen `braindecode_vis.settings.Settings` with `kind` and `build`) and what they
build. Each role is a table of names that must be there and of defaults for the others, so that a class with only the
required methods goes through a whole run. `play` is the one place that looks at a component by name: it returns the
component, or a thin shell around it in which the defaults are filled in, and refuses one that lacks a required method.
Nothing is inherited or registered here. What the pipeline lends a component comes in one `Context`.

==================  =================================  =================================================================
role                required                           with a default
==================  =================================  =================================================================
data set            check, hash_inputs, and one of     manifest, standardises, learns_before_split, find_phantom
                    write, open_epochs, open_betas,
                    open_bold
image encoder       space, encode                      bind, fit, embed, write, read, decodes, decode, shape
brain encoder       fit, predict, write, read          bind, predict_out_of_fold, map_targets, has_subject_galleries,
                                                       predict_for_generator, map_for_generator, predicts_targets
category decoder    fit, decision, classes, write,     bind
                    read
prior               fit, sample                        bind, describe
analysis            compute                            uses_encoder, needs_pictures
image generator     accepts, generate                  bind, describe, for_predictions, read_known_images,
                                                       supports_initial
==================  =================================  =================================================================

An image encoder whose settings say ``fitted_on_training_images`` needs `fit`, `write` and `read` as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar, cast, runtime_checkable

from braindecode_vis.checks import ConfigError, DataError

if TYPE_CHECKING:  # a configuration is read, and a wrong one refused, before numpy and pandas are loaded
    import numpy as np

    from braindecode_vis.arrays import Embeddings, Responses
    from braindecode_vis.stimuli import StimulusSet

#: Called with steps done, steps in all and words on how it goes; a total of 0 means that the words are to be kept.
Progress = Callable[[int, int, str], None]

OUT_OF_FOLD_FITS = 5  # of an encoder that has no out-of-fold predictions of its own


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
    """

    images: StimulusSet | None = None
    texts: Embeddings | None = None
    checkpoints: Path | None = None
    progress: Progress | None = None
    device: str = "auto"

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

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict training trials by fits that have not seen their images; trials may be left out."""
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


class WholeCategoryDecoder(CategoryDecoder, Protocol):
    """A category decoder with its defaults."""

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


class WholeImageGenerator(ImageGenerator, Protocol):
    """An image generator with its defaults."""

    def bind(self, context: Context) -> None:
        """Take what the pipeline lends, before the fit and again after reading."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return what was chosen on the training split, for the provenance of the images; empty where nothing was."""
        ...

    def for_predictions(self) -> WholeImageGenerator:
        """Return the generator of embeddings that a brain encoder predicted, which are less certain than images'."""
        ...

    #: Whether `generate` also takes ``initial`` images and the ``strength`` with which it leaves them.
    supports_initial: bool

    def read_known_images(self) -> Embeddings:
        """Return embeddings of images that the generator brings along; see ``knows_images``."""
        ...


class Analysis(Protocol):
    """An analysis, which is its own settings, with its defaults."""

    kind: str
    #: Whether it looks at the encoder of the run, and so at the features that were chosen for it.
    uses_encoder: bool
    #: Whether it needs test trials that show a picture.
    needs_pictures: bool

    def compute(self, study: Any) -> Any:
        """Return the findings about a `braindecode_vis.analysis.study.Study`."""
        ...

    def hashed_fields(self) -> dict[str, Any]:
        """Return the settings that enter the fingerprint."""
        ...


class WholeSettings(Protocol):
    """Settings of a component with the defaults of its role; the tables below say which a role has."""

    kind: str
    #: Image encoder: whether the target differs from fold to fold.
    fitted_on_training_images: bool
    #: Encoder: whether it names classes, and is a category decoder.
    decodes_categories: bool
    #: Brain encoder: whether it wants `Context.texts`.
    reads_text: bool
    #: Brain encoder: whether several processes can share its training.
    trains_in_processes: bool
    #: Category decoder: whether the decisions of a trial's volumes are pooled.
    pool: bool
    #: Prior: whether it learns from predictions of training trials.
    needs_predictions: bool
    #: Prior: whether it knows images that the generator brings along.
    asks_generator: bool
    #: Prior: whether its draws are meant to be embeddings of images, and not predictions.
    draws_images: bool
    #: Generator: whether it wants the noise of single repetitions.
    weighs_predictions: bool
    #: Generator: whether `read_known_images` has any.
    knows_images: bool
    #: Generator: whether it can start from an image.
    supports_initial: bool
    #: Generator: steps of its denoising; None for one without.
    steps: int | None
    #: Generator: whether it shows training images as they are, from embeddings of any space.
    copies_training_images: bool

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Return the component, not fitted: of encoders, decoders and priors with `seed`, of generators with data."""
        ...

    def read(self, folder: Path) -> Any:
        """Return the fitted component that was written into `folder`."""
        ...

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain values that enter the fingerprint."""
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


#: Encodes all stimuli with a pretrained encoder, from the embedding cache where they are known.
EmbedCached = Callable[[Any], "Embeddings"]


# --- defaults -----------------------------------------------------------------------------------------------


def _standardise_nothing(dataset: Any) -> str:
    return "none"


def _learn_nothing(dataset: Any) -> tuple[str, ...]:
    return ()


def _find_no_phantom(dataset: Any) -> None:
    """A data set of the user's is taken for recorded."""


def _ignore(component: Any, context: Context) -> None:
    """Take nothing of what is lent."""


def _return_itself(component: Any, *args: Any) -> Any:
    return component


def _describe_nothing(component: Any) -> dict[str, Any]:
    return {}


def fit_and_embed(
    encoder: Any, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: EmbedCached
) -> Embeddings:
    """Fit an image encoder on the training images and encode all; nothing is kept in the embedding cache."""
    from braindecode_vis.arrays import Embeddings

    encoder.fit(stimuli.iterate_images(training_ids))
    return Embeddings(encoder.encode(stimuli.iterate_images()), stimuli.ids, encoder.space)


def _embed_from_cache(
    encoder: Any, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: EmbedCached
) -> Embeddings:
    return embed_cached(encoder)


def _decode_nothing(encoder: Any, vectors: Any) -> Any:
    raise ConfigError(f"embeddings of the space {encoder.space!r} cannot be turned back into images.")


def _write_nothing(encoder: Any, folder: Path) -> None:
    """Leave the folder as it is: the settings say everything about a pretrained encoder."""


def predict_by_inner_folds(encoder: Any, responses: Responses, targets: Embeddings) -> Embeddings:
    """Predict every training trial by an encoder that was fitted without the trials of its image.

    Parameters
    ----------
    encoder
        As `build` returned it, which remembers how to build another.
    responses, targets
        What was given to its `fit`.
    """
    import numpy as np

    from braindecode_vis.arrays import Embeddings
    from braindecode_vis.seeds import derive_seed, make_generator

    ids = responses.stimulus_ids.astype(str)
    distinct = make_generator(0, "role", "out_of_fold").permutation(np.unique(ids))
    n_folds = min(OUT_OF_FOLD_FITS, len(distinct))
    if n_folds < 2:
        return Embeddings(targets.vectors[:0], targets.ids[:0], targets.space)
    held_out, predicted = [], []
    for number in range(n_folds):
        held = np.isin(ids, distinct[number::n_folds])
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
        other = encoder.build_again(seed=derive_seed(0, "role", "out_of_fold", number))
        other.fit(
            responses.select(train), Embeddings(targets.vectors[train], targets.ids[train], targets.space)
        )
        held_out.append(test)
        predicted.append(other.predict(responses.select(test)))
    order = np.argsort(np.concatenate(held_out))  # back to the order of the trials
    vectors = np.concatenate([part.vectors for part in predicted])[order]
    return Embeddings(vectors, responses.stimulus_ids, predicted[0].space)


def _keep_targets(encoder: Any, targets: Embeddings, subject: str | None = None) -> Embeddings:
    return targets


def _predict(encoder: Any, responses: Responses) -> Embeddings:
    predicted: Embeddings = encoder.predict(responses)
    return predicted


def _know_no_images(generator: Any) -> Embeddings:
    raise ConfigError(f"the generator {type(generator).__name__} brings no images along.")


def _read_built(settings: Any, folder: Path) -> Any:
    built = settings.build()
    return built.read(folder) if _has(built, "read") else built


def _read_seeded(settings: Any, folder: Path) -> Any:
    return settings.build(seed=0).read(folder)  # the seed of a fit lies in the files of the fit


def _take_training_images(
    settings: Any, training: Embeddings, generator: Any, tested: Embeddings
) -> Embeddings:
    return training


def _accept(settings: Any, target_kind: str) -> bool:
    return True  # the generator itself compares the names of the spaces when it is built


def _accept_latents(settings: Any, n_values: int) -> None:
    """Take latents of any number of values."""


def _choose_nothing(settings: Any) -> list[str]:
    return []


# --- the tables ---------------------------------------------------------------------------------------------

Whole = TypeVar("Whole")


@dataclass(frozen=True)
class Role(Generic[Whole]):
    """What a component of one role must have, and the defaults of the rest.

    Parameters
    ----------
    name
        In words, for messages.
    required
        Names of methods, and of values that are there from the start.
    defaults
        Name to a function, whose first argument is the component, or to a plain value.
    learnt
        Names of values that may come with the fit.
    """

    name: str
    required: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    learnt: tuple[str, ...] = ()


#: How a data set gives its recording: written by itself, or streamed through the preprocessing of its modality.
SOURCES = ("write", "open_epochs", "open_betas", "open_bold")

DATASET: Role[WholeDataset] = Role(
    "data set",
    ("kind", "check", "hash_inputs", "hashed_fields"),
    {
        "manifest": None, "standardises": _standardise_nothing, "learns_before_split": _learn_nothing,
        "find_phantom": _find_no_phantom,
    },
)  # fmt: skip
IMAGE_ENCODER: Role[WholeImageEncoder] = Role(
    "image encoder",
    ("encode",),
    {
        "bind": _ignore, "fit": _return_itself, "embed": _embed_from_cache, "write": _write_nothing,
        "read": _return_itself, "decodes": False, "decode": _decode_nothing, "shape": None,
    },
    ("space",),
)  # fmt: skip
FITTED_IMAGE_ENCODER: Role[WholeImageEncoder] = Role(
    "image encoder fitted on training images",
    ("fit", "encode", "write", "read"),
    {"bind": _ignore, "embed": fit_and_embed, "decodes": False, "decode": _decode_nothing, "shape": None},
    ("space",),
)
BRAIN_ENCODER: Role[WholeBrainEncoder] = Role(
    "brain encoder",
    ("fit", "predict", "write", "read"),
    {
        "bind": _ignore, "predict_out_of_fold": predict_by_inner_folds, "map_targets": _keep_targets,
        "has_subject_galleries": False, "predict_for_generator": _predict, "map_for_generator": _keep_targets,
        "predicts_targets": True,
    },
)  # fmt: skip
CATEGORY_DECODER: Role[WholeCategoryDecoder] = Role(
    "category decoder", ("fit", "decision", "write", "read"), {"bind": _ignore}, ("classes",)
)
PRIOR: Role[WholePrior] = Role("prior", ("fit", "sample"), {"bind": _ignore, "describe": _describe_nothing})
IMAGE_GENERATOR: Role[WholeImageGenerator] = Role(
    "image generator",
    ("accepts", "generate"),
    {
        "bind": _ignore, "describe": _describe_nothing, "for_predictions": _return_itself,
        "read_known_images": _know_no_images, "supports_initial": False,
    },
)  # fmt: skip

ANALYSIS: Role[Analysis] = Role(
    "analysis", ("kind", "compute", "hashed_fields"), {"uses_encoder": True, "needs_pictures": True}
)

_SETTINGS = ("kind", "build", "hashed_fields")
IMAGE_ENCODER_SETTINGS: Role[WholeSettings] = Role(
    "settings of an image encoder", _SETTINGS, {"fitted_on_training_images": False, "read": _read_built}
)
#: Of brain encoders and of category decoders, which stand under one key of the configuration.
ENCODER_SETTINGS: Role[WholeSettings] = Role(
    "settings of an encoder",
    _SETTINGS,
    {
        "decodes_categories": False, "reads_text": False, "trains_in_processes": False, "pool": False,
        "read": _read_seeded, "check_low_level": _accept_latents,
    },
)  # fmt: skip
PRIOR_SETTINGS: Role[WholeSettings] = Role(
    "settings of a prior",
    _SETTINGS,
    {
        "needs_predictions": True, "draws_images": True, "asks_generator": False, "find_images": _take_training_images,
        "describe_choices": _choose_nothing,
    },
)  # fmt: skip
GENERATOR_SETTINGS: Role[WholeSettings] = Role(
    "settings of an image generator",
    _SETTINGS,
    {
        "accepts": _accept, "weighs_predictions": False, "knows_images": False, "supports_initial": False,
        "copies_training_images": False, "steps": None, "describe_choices": _choose_nothing,
    },
)  # fmt: skip
#: What is trained, augmented, measured and analysed is asked by the settings alone.
NETWORK_SETTINGS: Role[Any] = Role("settings of a network", _SETTINGS, {"heads": "one"})
OBJECTIVE_SETTINGS: Role[Any] = Role(
    "settings of an objective (subclass ObjectiveConfig)",
    (*_SETTINGS, "weight", "phase", "needs", "contrastive", "is_active"),
)
AUGMENTATION: Role[Any] = Role("augmentation", ("kind", "apply", "hashed_fields"))
METRIC_SETTINGS: Role[Any] = Role("settings of a metric", _SETTINGS)

#: The role that the settings of a component play, by the name under which `registry` keeps it.
SETTINGS_ROLES: dict[str, Role[Any]] = {
    "dataset": DATASET,
    "target": IMAGE_ENCODER_SETTINGS,
    "encoder": ENCODER_SETTINGS,
    "network": NETWORK_SETTINGS,
    "objective": OBJECTIVE_SETTINGS,
    "augmentation": AUGMENTATION,
    "prior": PRIOR_SETTINGS,
    "generator": GENERATOR_SETTINGS,
    "metric": METRIC_SETTINGS,
    "analysis": ANALYSIS,
}


class _Shell:
    """A component in which the defaults of its role are filled in; everything else is the component's own."""

    def __init__(self, component: Any, role: Role[Any], build_again: Callable[..., Any] | None) -> None:
        self.component, self._role, self._build_again = component, role, build_again

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("component", "_role", "_build_again"):
            raise AttributeError(name)  # asked by copy and pickle before there is a component
        if name in self._role.learnt and not _has(self.component, name):
            raise ConfigError(_describe_lack(self._role, self.component, [name]))
        if name not in self._role.defaults or _has(self.component, name):
            return getattr(self.component, name)
        default = self._role.defaults[name]
        return functools.partial(default, self) if callable(default) else default

    def build_again(self, **arguments: Any) -> Any:
        """Return another component of the same settings, not fitted."""
        if self._build_again is None:
            raise DataError(
                f"{type(self.component).__name__} was made without settings, so that no second one can be built."
            )
        return self._build_again(**arguments)

    def __repr__(self) -> str:
        return f"<{self.component!r} with defaults>"


def play(role: Role[Whole], component: Any, *, build_again: Callable[..., Any] | None = None) -> Whole:
    """Return the component with the whole of its role.

    Parameters
    ----------
    role
        One of the tables of this module.
    component
        Anything.
    build_again
        Returns another component of the same settings; `predict_by_inner_folds` needs it.

    Raises
    ------
    ConfigError
        If it lacks a required method.
    """
    if isinstance(component, _Shell):
        return cast(Whole, component)
    lacking = [name for name in role.required if not _has(component, name)]
    if lacking:
        raise ConfigError(_describe_lack(role, component, lacking))
    if all(_has(component, name) for name in (*role.defaults, *role.learnt)):
        return cast(Whole, component)
    return cast(Whole, _Shell(component, role, build_again))


def _describe_lack(role: Role[Any], component: Any, names: Sequence[str]) -> str:
    kind = type(component)
    return (
        f"{kind.__module__}.{kind.__qualname__} cannot be the {role.name}: it has no {' and no '.join(names)}; "
        f"required are {', '.join((*role.required, *role.learnt))}."
    )


def _has(component: Any, name: str) -> bool:
    """Say whether the component has the attribute, without computing a property: a space may need a fit first."""
    return hasattr(type(component), name) or name in getattr(component, "__dict__", {})


def build(role: Role[Whole], settings: Any, *args: Any, **kwargs: Any) -> Whole:
    """Build a component from its settings and return it with the whole of its role; see `play`.

    Raises
    ------
    ConfigError
        If `build` takes other arguments than the role gives it, or what it returns lacks a required method.
    """
    try:
        inspect.signature(settings.build).bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*("data" for _ in args), *kwargs])
        own = settings.component if isinstance(settings, _Shell) else settings
        raise ConfigError(
            f"{type(own).__name__} cannot be the settings of the {role.name}: its build must take ({given}), but "
            f"{error}."
        ) from error
    return play(role, settings.build(*args, **kwargs), build_again=settings.build)


def read(role: Role[Whole], settings: Any, folder: Path) -> Whole:
    """Read a fitted component from `folder` and return it with the whole of its role; see `play`."""
    return play(role, settings.read(folder), build_again=settings.build)


def find_image_encoder_role(settings: WholeSettings) -> Role[WholeImageEncoder]:
    """Return the role of the image encoder of these settings, which must write itself if it is fitted."""
    return FITTED_IMAGE_ENCODER if settings.fitted_on_training_images else IMAGE_ENCODER


def find_source(dataset: Any) -> Literal["write", "open_epochs", "open_betas", "open_bold"]:
    """Return how a data set gives its recording, by the first of `SOURCES` that it has.

    Raises
    ------
    ConfigError
        If it has none.
    """
    for name in SOURCES:
        if _has(dataset, name):
            return cast(Literal["write", "open_epochs", "open_betas", "open_bold"], name)
    kind = type(dataset)
    raise ConfigError(
        f"{kind.__module__}.{kind.__qualname__} cannot be the data set: it has none of {', '.join(SOURCES)}."
    )


def check_settings(role: str, settings: Any) -> None:
    """Raise `ConfigError` unless the settings of a component have what its role requires.

    Parameters
    ----------
    role
        A key of `SETTINGS_ROLES`.
    settings
        Of a component from outside; those of the package are held to this by tests.
    """
    play(SETTINGS_ROLES[role], settings)
    if role == "dataset":
        find_source(settings)
