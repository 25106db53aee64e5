"""Validation errors in one clause that names the key by its full path, what was given and what is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from braindecode_vis.checks import ConfigError, suggest
from braindecode_vis.config.models import RunConfig
from braindecode_vis.registry import validate_component

#: What pydantic calls a member of a union that is no model, for example ``constrained-int`` or ``literal['auto']``.
_TYPE = re.compile(r"(constrained-\w+|int|float|str|bool|path|none|.*\[.*)", re.DOTALL)
#: Errors that say what is known, before those that may only follow from them.
_FIRST = ("unknown_key", "unknown_kind", "outside")


def validate_config(content: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the validated configuration; the first thing wrong becomes one `ConfigError`."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}.") from error


def read_component(role: str, content: Any) -> Any:
    """Return the settings of a component from plain values with a ``kind``; what is wrong becomes one `ConfigError`.

    Parameters
    ----------
    role
        A key of `braindecode_vis.registry.INSIDE`.
    content
        A mapping, or settings.
    """
    try:
        return validate_component(role, content)
    except ValidationError as error:
        clause = describe_validation_error(error).replace("the configuration.", f"{role}.")
        raise ConfigError(f"{clause}.") from error


def describe_validation_error(error: ValidationError) -> str:
    """Return one clause that names the key by its full path, what was given and what is known."""
    details: list[Any] = error.errors(include_url=False)
    first = next((d for d in details if d["type"] in _FIRST), details[0])
    # the types of union members stand in the location too, which the user never wrote
    location = [str(part) for part in first["loc"] if not _TYPE.fullmatch(str(part))]
    path = ".".join(location) or "the configuration"
    context = first.get("ctx", {})
    if first["type"] == "unknown_key":
        key, known = context["key"], context["known"]
        whole = ".".join([*location, key])
        return f"unknown key {whole}; known here are {', '.join(known)}{suggest(key, known)}"
    if first["type"] == "unknown_kind":
        given, known = context["given"], context["known"]
        return f"unknown kind {given!r} in {path}.kind; known are {', '.join(known)}{suggest(given, known)}"
    if first["type"] == "outside":
        return f"{path}.kind: {context['sentence']}"
    if first["type"] == "literal_error" and location[-1] == "kind":
        return (
            f"unknown kind {first['input']!r} in {path}; known are {context['expected'].replace(chr(39), '')}"
        )
    if first["type"] == "no_kind":
        return f"{path} must say its kind"
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "value_error":
        return str(context["error"]) if len(location) == 0 else f"{path}: {context['error']}"
    return f"{path} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}"
