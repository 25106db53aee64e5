"""Builds or reads a component, checks that it has what its role requires, and adds the defaults of the role.

The roles are the classes of `braindecode_vis.base.contracts`. A component that inherits from its role is complete
already. A component that does not, such as most of other packages, needs only the required methods: `complete` adds the
defaults of the role. It also reads members of brain encoders that had other names in earlier versions (`FORMER`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import (
    FORMER_METHODS,
    Analysis,
    Augmentation,
    BrainEncoder,
    Built,
    CaptionWriter,
    CategoryDecoder,
    ComponentSettings,
    Dataset,
    EncoderSettings,
    FewTrialAdaptation,
    FittedImageEncoder,
    GeneratorSettings,
    GeneratorView,
    ImageEncoder,
    ImageEncoderSettings,
    MetricSettings,
    Network,
    NetworkSettings,
    ObjectiveSettings,
    Prior,
    PriorSettings,
    has_name,
    keep_targets,
    name_class,
)

#: How a data set gives its recording: written by itself, or streamed through the preprocessing of its modality.
SOURCES = ("write", "open_epochs", "open_betas", "open_bold")

#: The role of the settings of a component, by the name under which `registry` keeps it.
SETTINGS_ROLES: dict[str, type[Any]] = {
    "dataset": Dataset,
    "target": ImageEncoderSettings,
    "encoder": EncoderSettings,
    "network": NetworkSettings,
    "objective": ObjectiveSettings,
    "augmentation": Augmentation,
    "prior": PriorSettings,
    "generator": GeneratorSettings,
    "metric": MetricSettings,
    "analysis": Analysis,
}

Role = TypeVar("Role", bound=Built | ComponentSettings | Network)


# --- components that do not inherit from their role -----------------------------------------------------------


class Completed:
    """A component with the defaults of its role."""

    build_again: Callable[..., Any] | None = None

    def __init__(self, component: Any, role: type[Any]) -> None:
        self.component, self._role = component, role

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("component", "_role"):
            raise AttributeError(name)  # asked by copy and pickle before there is a component
        if has_name(self.component, name) or not hasattr(self._role, name):
            return getattr(self.component, name)
        names, make = FORMER.get(name, ((), None))
        if make is not None and any(has_name(self.component, former) for former in names):
            return make(self.component)
        default = inspect.getattr_static(self._role, name)
        if isinstance(default, functools.cached_property):
            return default.func(self)
        return default.__get__(self, self._role) if hasattr(default, "__get__") else default

    def __repr__(self) -> str:
        return f"<{self.component!r} with defaults>"


def _read_former_view(encoder: Any) -> GeneratorView:
    find_prior = getattr(encoder, "find_prior", None)
    return GeneratorView(
        getattr(encoder, "predict_for_generator", encoder.predict),
        getattr(encoder, "map_for_generator", keep_targets),
        getattr(encoder, "predicts_targets", True),
        getattr(encoder, "predicts_alike", True),
        None if find_prior is None else find_prior(),
    )


def _list_former(name: str) -> tuple[str, ...]:
    return tuple(former for former, now in FORMER_METHODS.items() if now == name)


#: What brain encoders of earlier versions had under other names: those, and what makes the present value of them.
FORMER: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "generator_view": (_list_former("generator_view"), _read_former_view),
    "likelihood": (("describe_likelihood",), lambda encoder: encoder.describe_likelihood()),
    "adaptation": (
        ("adapt",),
        lambda encoder: FewTrialAdaptation(encoder.adapt, getattr(encoder, "adapts_quickly", False)),
    ),
    "captions": (("describe",), lambda encoder: CaptionWriter(encoder.describe, encoder.describe_mean)),
}


def complete(role: type[Role], component: Any) -> Role:
    """Return the component with all members of its role.

    Parameters
    ----------
    role
        A class of `contracts`.
    component
        Any object; one that inherits from the role is returned unchanged.

    Raises
    ------
    ConfigError
        If a required method is missing.
    """
    if isinstance(component, (role, Completed)):
        return cast(Role, component)
    required = list_required(role)
    missing = [name for name in required if not has_name(component, name)]
    if missing:
        raise ConfigError(_describe_missing(role, component, missing))
    return cast(Role, Completed(component, role))


def list_required(role: type[Any]) -> tuple[str, ...]:
    """Return the names of the methods that a component of the role must have, in the order of the class."""
    if "required" in vars(role):
        return tuple(role.required)
    names = dict.fromkeys(name for cls in reversed(role.__mro__) for name in vars(cls))
    return tuple(name for name in names if name in role.__abstractmethods__)


def has_own(role: type[Any], component: Any, name: str) -> bool:
    """Say whether a component defines `name` itself instead of using the default of its role."""
    own = component.component if isinstance(component, Completed) else component
    if not isinstance(own, role):
        return has_name(own, name)
    return inspect.getattr_static(own, name) is not inspect.getattr_static(role, name)


def _describe_missing(role: type[Any], component: Any, names: Sequence[str]) -> str:
    required = ", ".join((*list_required(role), *getattr(role, "learnt", ())))
    return (
        f"{name_class(component)} cannot be the {role.role_name}: it has no {' and no '.join(names)}; required are "
        f"{required}."
    )


# --- building and reading -------------------------------------------------------------------------------------


def build(role: type[Role], settings: Any, *args: Any, **kwargs: Any) -> Role:
    """Build a component from its settings and return it with all members of its role; see `complete`.

    Raises
    ------
    ConfigError
        If `build` takes other arguments than the role gives it, or a required method is missing in its result.
    """
    own = settings.component if isinstance(settings, Completed) else settings
    try:
        inspect.signature(settings.build).bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*("data" for _ in args), *kwargs])
        raise ConfigError(
            f"{type(own).__name__} cannot be the settings of the {role.role_name}: its build must take ({given}), but "
            f"{error}."
        ) from error
    built = settings.build(*args, **kwargs)
    # What is written and never read would be fitted again, or lost, in a finished run that meets new trials.
    if issubclass(role, Built) and has_own(role, built, "write") and not _can_be_read(role, built, own):
        raise ConfigError(
            f"{name_class(built)} cannot be the {role.role_name}: it has write but not read; give it "
            "both, or neither if it is fitted again from the training data."
        )
    return _remember(role, built, settings)


def _can_be_read(role: type[Any], built: Any, settings: Any) -> bool:
    of_settings = next((one for one in SETTINGS_ROLES.values() if isinstance(settings, one)), None)
    by_settings = (
        has_name(settings, "read") if of_settings is None else has_own(of_settings, settings, "read")
    )
    return by_settings or has_own(role, built, "read")


def read(role: type[Role], settings: Any, folder: Path, *args: Any) -> Role:
    """Read a fitted component from `folder` and return it with all members of its role; see `complete`.

    Generators also get the data from which they were built.

    Raises
    ------
    ConfigError
        If its `read` returns nothing, or something in which a required method is missing.
    """
    found = settings.read(folder, *args)
    if found is None:
        raise ConfigError(
            f"read of the {role.role_name} {settings.kind!r} returned None; it must return the component that it read "
            "into (end it with `return self`)."
        )
    return _remember(role, found, settings)


def _remember(role: type[Role], component: Any, settings: Any) -> Role:
    """Complete a component; a brain encoder remembers how to build another one of the same settings."""
    whole = complete(role, component)
    if role is BrainEncoder:
        cast(Any, whole).build_again = functools.partial(build, BrainEncoder, settings)
    return whole


def list_encoders(settings: Any) -> list[EncoderSettings]:
    """Return the settings of a brain encoder and then of every encoder inside it, completed."""
    whole = complete(EncoderSettings, settings)
    return [whole, *(inner for member in whole.list_members() for inner in list_encoders(member))]


def find_image_encoder_role(settings: ImageEncoderSettings) -> type[ImageEncoder]:
    """Return the role of the image encoder of these settings; a fitted encoder must be able to write itself."""
    return FittedImageEncoder if settings.fitted_on_training_images else ImageEncoder


def find_encoder_role(settings: EncoderSettings) -> type[Any]:
    """Return the role of these settings: a category decoder or a brain encoder."""
    return CategoryDecoder if settings.decodes_categories else BrainEncoder


def need_predictions(prior: PriorSettings, generator: GeneratorSettings) -> bool:
    """Say whether prior or generator learns from predictions of training trials by fits without their images."""
    # A generator weighs predictions that come to it as they are, and no draws of a prior.
    weighs = generator.weighs_predictions and not prior.draws_images
    return prior.needs_predictions or generator.needs_predictions or weighs


def find_source(dataset: Any) -> Literal["write", "open_epochs", "open_betas", "open_bold"]:
    """Return the first of `SOURCES` that a data set has: the method that gives its recording.

    Raises
    ------
    ConfigError
        If it has none.
    """
    for name in SOURCES:
        if has_name(dataset, name):
            return cast(Literal["write", "open_epochs", "open_betas", "open_bold"], name)
    raise ConfigError(f"{name_class(dataset)} cannot be the data set: it has none of {', '.join(SOURCES)}.")


def check_settings(role: str, settings: Any) -> None:
    """Raise `ConfigError` unless the settings of a component have what their role requires.

    Parameters
    ----------
    role
        A key of `SETTINGS_ROLES`.
    settings
        Settings of a component from outside; tests check those of the package.
    """
    complete(SETTINGS_ROLES[role], settings)
    # A prior is built from a seed alone, so that a missing method shows before anything was trained.
    if role == "prior":
        build(Prior, settings, seed=0)
    if role == "dataset":
        find_source(settings)
