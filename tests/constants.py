"""Settings whose constants have other values, so that a test is small and fast."""

from __future__ import annotations

from typing import Any, TypeVar

from braindecode_vis.base.settings import Settings

Kind = TypeVar("Kind", bound=Settings)


def replace_constants(cls: type[Kind], **values: Any) -> type[Kind]:
    """Return a settings class like `cls`, in which some of the class variables that its recipe fixes are others."""
    if unknown := {name for name in values if name in cls.model_fields or not hasattr(cls, name)}:
        raise TypeError(f"{sorted(unknown)} are no constants of {cls.__name__}")
    # Of the same module, so that it is taken wherever the class itself is.
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **values})
