"""The roles of the pipeline: what a component must have, and what happens where it has no more than that.

A component is two things: settings (a frozen `braindecode_vis.base.settings.Settings` with `kind` and `build`) and what
they build. Each role is a table of names that must be there and of defaults for the others, so that a class with only
the required methods goes through a whole run. `play` is the one place that looks at a component by name: it returns the
component, or a thin shell around it in which the defaults are filled in, and refuses one that lacks a required method.
Nothing is inherited or registered here. What each method does stands in `braindecode_vis.base.contracts`.

==================  =================================  =================================================================
role                required                           with a default
==================  =================================  =================================================================
data set            check, hash_inputs, and one of     manifest, standardises, learns_before_split, find_phantom,
                    write, open_epochs, open_betas,    continues
                    open_bold
image encoder       space, encode                      bind, fit, embed, write, read, decodes, decode, shape,
                                                       embed_texts, hide_texts
brain encoder       fit, predict, write, read          bind, predict_out_of_fold, map_targets, has_subject_galleries,
                                                       predict_for_generator, map_for_generator, predicts_targets,
                                                       predicts_alike, label_free_subjects, as_module,
                                                       describe_likelihood, adapt, adapts_quickly,
                                                       predict_sentences, describe, describe_mean, map_labels
category decoder    fit, decision, classes, write,     bind, as_module, n_small_fits
                    read
network             forward                            forward_heads, forward_tokens, token_step, parameter_groups
prior               fit, sample                        bind, describe, write, read
analysis            compute                            uses_encoder, needs_pictures, makes_images
image generator     accepts, generate                  bind, describe, for_predictions, read_known_images,
                                                       supports_initial, supports_prompts, write, rows_at_once,
                                                       image_size, find_copies
==================  =================================  =================================================================

An image encoder whose settings say ``fitted_on_training_images`` needs `fit`, `write` and `read` as well.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import (
    Analysis,
    EmbedCached,
    WholeBrainEncoder,
    WholeCategoryDecoder,
    WholeDataset,
    WholeImageEncoder,
    WholeImageGenerator,
    WholeNetwork,
    WholePrior,
    WholeSettings,
)

if TYPE_CHECKING:  # a configuration is read, and a wrong one refused, before numpy and pandas are loaded
    from braindecode_vis.base.arrays import Embeddings, Responses
    from braindecode_vis.base.stimuli import StimulusSet

OUT_OF_FOLD_FITS = 5  # of an encoder that has no out-of-fold predictions of its own


# --- defaults -----------------------------------------------------------------------------------------------


def _answer(value: Any) -> Callable[..., Any]:
    """Return a method that gives the same answer whatever it is asked."""
    return lambda component, *args, **kwargs: value


def _return_itself(component: Any, *args: Any) -> Any:
    return component


def fit_and_embed(
    encoder: Any, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: EmbedCached
) -> Embeddings:
    """Fit an image encoder on the training images and encode all; nothing is kept in the embedding cache."""
    from braindecode_vis.base.arrays import Embeddings

    encoder.fit(stimuli.iterate_images(training_ids))
    return Embeddings(encoder.encode(stimuli.iterate_images()), stimuli.ids, encoder.space)


def _embed_from_cache(
    encoder: Any, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: EmbedCached
) -> Embeddings:
    return embed_cached(encoder)


def _decode_nothing(encoder: Any, vectors: Any) -> Any:
    raise ConfigError(f"embeddings of the space {encoder.space!r} cannot be turned back into images.")


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
        As `build` returned it, which remembers how to build another.
    responses, targets
        What was given to its `fit`.
    n_folds
        How many encoders are fitted.
    compared
        Return what `predict` gives, which is compared with images, instead of what the generator gets.
    """
    import numpy as np

    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.base.seeds import derive_seed, make_generator

    ids = responses.stimulus_ids.astype(str)
    distinct = make_generator(0, "role", "out_of_fold").permutation(np.unique(ids))
    n_folds = min(n_folds, len(distinct))
    if n_folds < 2:
        return Embeddings(targets.vectors[:0], targets.ids[:0], targets.space)
    held_out, predicted = [], []
    for number in range(n_folds):
        held = np.isin(ids, distinct[number::n_folds])
        train, test = np.flatnonzero(~held), np.flatnonzero(held)
        other = play(BRAIN_ENCODER, encoder.build_again(seed=derive_seed(0, "role", "out_of_fold", number)))
        other.fit(
            responses.select(train), Embeddings(targets.vectors[train], targets.ids[train], targets.space)
        )
        held_out.append(test)
        predict = other.predict if compared else other.predict_for_generator
        predicted.append(predict(responses.select(test)))
    order = np.argsort(np.concatenate(held_out))  # back to the order of the trials
    vectors = np.concatenate([part.vectors for part in predicted])[order]
    return Embeddings(vectors, responses.stimulus_ids, predicted[0].space)


def _keep_targets(encoder: Any, targets: Embeddings, subject: str | None = None) -> Embeddings:
    return targets


def _predict(encoder: Any, responses: Responses) -> Embeddings:
    predicted: Embeddings = encoder.predict(responses)
    return predicted


def _refuse_module(encoder: Any, responses: Responses) -> Any:
    raise ConfigError(
        f"{type(encoder.component).__name__} does not say how it predicts in torch (its method as_module), so that it "
        "cannot be exported as a program; choose safetensors."
    )


def _refuse_adaptation(encoder: Any, responses: Responses, targets: Embeddings) -> Any:
    raise ConfigError(
        f"{type(encoder.component).__name__} cannot be adapted to a few trials (its method adapt); ridge and networks "
        "can."
    )


def _keep_vectors(encoder: Any, vectors: Any, fill: Any) -> Any:
    return vectors


def _refuse_description(encoder: Any, *args: Any, **options: Any) -> Any:
    raise ConfigError(
        f"{type(encoder.component).__name__} writes no captions (its method describe); a network with the objective "
        "captioning does."
    )


def _know_no_images(generator: Any) -> Embeddings:
    raise ConfigError(f"the generator {type(generator).__name__} brings no images along.")


def _read_built(settings: Any, folder: Path) -> Any:
    built = settings.build()
    return built.read(folder) if _has(built, "read") else built


def _read_seeded(settings: Any, folder: Path) -> Any:
    return settings.build(seed=0).read(folder)  # the seed of a fit lies in the files of the fit


def _read_prior(settings: Any, folder: Path) -> Any:
    built = settings.build(seed=0)
    if not _has(built, "read"):  # it has written itself, or nobody would read it
        raise ConfigError(_describe_lack(PRIOR, built, ["read"]))
    return built.read(folder)


def _build_from_data(settings: Any, folder: Path, data: Any) -> Any:
    return settings.build(data)  # what is chosen on the same training data is the same again


def _take_training_images(
    settings: Any, training: Embeddings, generator: Any, tested: Embeddings
) -> Embeddings:
    return training


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
        "manifest": None, "standardises": _answer("none"), "learns_before_split": _answer(()),
        "find_phantom": _answer(None), "continues": _answer(()),
    },
)  # fmt: skip
IMAGE_ENCODER: Role[WholeImageEncoder] = Role(
    "image encoder",
    ("encode",),
    {
        "bind": _answer(None), "fit": _return_itself, "embed": _embed_from_cache, "write": _answer(None),
        "read": _return_itself, "decodes": False, "decode": _decode_nothing, "shape": None,
        "embed_texts": _answer(None), "hide_texts": _keep_vectors,
    },
    ("space",),
)  # fmt: skip
FITTED_IMAGE_ENCODER: Role[WholeImageEncoder] = Role(
    "image encoder fitted on training images",
    ("fit", "encode", "write", "read"),
    {
        "bind": _answer(None),
        "embed": fit_and_embed,
        "decodes": False,
        "decode": _decode_nothing,
        "shape": None,
        "embed_texts": _answer(None),
        "hide_texts": _keep_vectors,
    },
    ("space",),
)
BRAIN_ENCODER: Role[WholeBrainEncoder] = Role(
    "brain encoder",
    ("fit", "predict", "write", "read"),
    {
        "bind": _answer(None), "predict_out_of_fold": predict_by_inner_folds, "map_targets": _keep_targets,
        "has_subject_galleries": False, "predict_for_generator": _predict, "map_for_generator": _keep_targets,
        "predicts_targets": True, "predicts_alike": True, "label_free_subjects": (), "as_module": _refuse_module,
        "describe_likelihood": _answer(None), "adapt": _refuse_adaptation, "adapts_quickly": False,
        "list_held_out": _answer(()), "predict_sentences": _answer(None), "describe": _refuse_description,
        "describe_mean": _refuse_description, "map_labels": _answer(None), "find_prior": _answer(None),
    },
)  # fmt: skip
CATEGORY_DECODER: Role[WholeCategoryDecoder] = Role(
    "category decoder",
    ("fit", "decision", "write", "read"),
    {"bind": _answer(None), "as_module": _refuse_module, "n_small_fits": 0},
    ("classes",),
)
NETWORK: Role[WholeNetwork] = Role(
    "network",
    ("forward",),
    {
        "forward_heads": None,
        "forward_tokens": None,
        "token_step": None,
        "parameter_groups": _answer(()),
        "enter_epoch": _answer(()),
    },
)
PRIOR: Role[WholePrior] = Role(
    "prior",
    ("fit", "sample"),
    {"bind": _answer(None), "describe": _answer({}), "write": _answer(None), "read": _return_itself},
)
IMAGE_GENERATOR: Role[WholeImageGenerator] = Role(
    "image generator",
    ("accepts", "generate"),
    {
        "bind": _answer(None), "describe": _answer({}), "for_predictions": _return_itself,
        "read_known_images": _know_no_images, "supports_initial": False, "supports_prompts": False,
        "write": _answer(None), "rows_at_once": None, "image_size": None, "find_copies": _answer(None),
    },
)  # fmt: skip

ANALYSIS: Role[Analysis] = Role(
    "analysis",
    ("kind", "compute", "hashed_fields"),
    {"uses_encoder": True, "needs_pictures": True, "makes_images": False},
)

_SETTINGS = ("kind", "build", "hashed_fields")
IMAGE_ENCODER_SETTINGS: Role[WholeSettings] = Role(
    "settings of an image encoder",
    _SETTINGS,
    {"fitted_on_training_images": False, "of_texts": False, "read": _read_built, "list_parts": _answer(None)},
)
#: Of brain encoders and of category decoders, which stand under one key of the configuration.
ENCODER_SETTINGS: Role[WholeSettings] = Role(
    "settings of an encoder",
    _SETTINGS,
    {
        "decodes_categories": False, "reads_text": False, "uses_pretraining": False, "trains_in_processes": False,
        "members": (), "pool": False, "may_know_likelihood": True, "writes_captions": False, "read": _read_seeded,
        "check_low_level": _answer(None), "trains_prior": False,
    },
)  # fmt: skip
PRIOR_SETTINGS: Role[WholeSettings] = Role(
    "settings of a prior",
    _SETTINGS,
    {
        "needs_predictions": True, "draws_images": True, "asks_generator": False, "asks_likelihood": False,
        "asks_trained_prior": False,
        "find_images": _take_training_images, "describe_choices": _answer([]), "read": _read_prior,
    },
)  # fmt: skip
GENERATOR_SETTINGS: Role[WholeSettings] = Role(
    "settings of an image generator",
    _SETTINGS,
    {
        "accepts": _answer(True), "needs_predictions": False, "weighs_predictions": False, "knows_images": False,
        "supports_initial": False, "supports_prompts": False, "supports_texts": False, "needs_texts": False,
        "copies_training_images": False, "steps": None, "describe_choices": _answer([]), "read": _build_from_data,
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


def keeps_default(component: Any, name: str) -> bool:
    """Say whether a component that `play` returned has no `name` of its own, so that the default of its role stands."""
    return isinstance(component, _Shell) and not _has(component.component, name)


def list_encoders(settings: Any) -> list[WholeSettings]:
    """Return the settings of a brain encoder, and of an average those of its members behind, with all of their role."""
    whole = play(ENCODER_SETTINGS, settings)
    return [whole, *(play(ENCODER_SETTINGS, member) for member in whole.members)]


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
    built = settings.build(*args, **kwargs)
    own = settings.component if isinstance(settings, _Shell) else settings
    # What is written and never read would be fitted again, or lost, in a finished run that meets new trials.
    if "write" in role.defaults and _has(built, "write") and not (_has(built, "read") or _has(own, "read")):
        kind = type(built)
        raise ConfigError(
            f"{kind.__module__}.{kind.__qualname__} cannot be the {role.name}: it has write and no read; give it both, "
            "or neither if it is fitted anew from the training data."
        )
    return play(role, built, build_again=settings.build)


def read(role: Role[Whole], settings: Any, folder: Path, *args: Any) -> Whole:
    """Read a fitted component from `folder` and return it with the whole of its role; see `play`.

    Generators are given the data that they were built from as well.

    Raises
    ------
    ConfigError
        If its `read` returns nothing, or something that lacks a required method.
    """
    found = settings.read(folder, *args)
    if found is None:
        raise ConfigError(
            f"read of the {role.name} {settings.kind!r} returned None; it must return the component that it read into "
            "(end it with `return self`)."
        )
    return play(role, found, build_again=settings.build)


def find_image_encoder_role(settings: WholeSettings) -> Role[WholeImageEncoder]:
    """Return the role of the image encoder of these settings, which must write itself if it is fitted."""
    return FITTED_IMAGE_ENCODER if settings.fitted_on_training_images else IMAGE_ENCODER


def find_encoder_role(settings: WholeSettings) -> Role[Any]:
    """Return the role of what these settings build: a category decoder or a brain encoder."""
    return CATEGORY_DECODER if settings.decodes_categories else BRAIN_ENCODER


def need_predictions(prior: WholeSettings, generator: WholeSettings) -> bool:
    """Say whether one of the two learns from predictions of training trials by fits that have not seen their images."""
    # A generator weighs predictions that come to it as they are, and no draws of a prior.
    weighs = generator.weighs_predictions and not prior.draws_images
    return prior.needs_predictions or generator.needs_predictions or weighs


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
    if role == "prior":  # is built from a seed alone, so that a lack shows before anything was trained
        build(PRIOR, settings, seed=0)
    if role == "dataset":
        find_source(settings)
