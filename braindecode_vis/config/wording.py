"""Validation errors in one clause that names the key by its full path, what was given and what is known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from braindecode_vis.checks import ConfigError, suggest
from braindecode_vis.config.models import RunConfig
from braindecode_vis.settings import Settings

#: What pydantic calls a member of a union that is no model, for example ``constrained-int`` or ``literal['auto']``.
_TYPE = re.compile(r"(constrained-\w+|int|float|str|bool|path|none|.*\[.*)", re.DOTALL)


def validate_config(content: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the validated configuration; the first thing wrong becomes one `ConfigError`."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}.") from error


def describe_validation_error(error: ValidationError) -> str:
    """Return one clause that names the key by its full path, what was given and what is known."""
    details = error.errors(include_url=False)
    first = next((d for d in details if d["type"] in ("extra_forbidden", "union_tag_invalid")), details[0])
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        path = ".".join(_drop_tags(location))
        return f"unknown key {path}; known here are {', '.join(known)}{suggest(location[-1], known)}"
    path = ".".join(_drop_tags(location)) or "the configuration"
    if first["type"] == "union_tag_invalid":
        tags = [tag.strip().strip("'\"") for tag in first["ctx"]["expected_tags"].split(",")]
        given = str(first["ctx"]["tag"])
        return f"unknown kind {given!r} in {path}.kind; known are {', '.join(tags)}{suggest(given, tags)}"
    if first["type"] == "literal_error" and location[-1] == "kind":
        return f"unknown kind {first['input']!r} in {path}; known are {first['ctx']['expected'].replace(chr(39), '')}"
    if first["type"] == "union_tag_not_found":
        return f"{path} must say its kind"
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) if len(location) == 0 else f"{path}: {first['ctx']['error']}"
    return f"{path} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}"


def _walk_models(location: list[str]) -> Iterable[tuple[str, Any, bool]]:
    """Yield each part of an error location, the model it names or None, and whether it is the tag of a union.

    pydantic puts the tag of the chosen member of a union into the location, which the user never wrote.
    """
    model: Any = RunConfig
    options: dict[str, Any] = {}
    for part in location:
        if part in options:
            model, options = options[part], {}
            yield part, model, True
            continue
        if part.isdigit():  # the place in a list, whose members are still to be told apart
            yield part, model, False
            continue
        field = getattr(model, "model_fields", {}).get(part)
        models = [] if field is None else _list_models(field.annotation)
        options = {m.model_fields["kind"].default: m for m in models if "kind" in m.model_fields}
        model = models[0] if len(models) == 1 else None
        if model is not None:
            options = {}
        yield part, model, False


def _list_models(annotation: Any) -> list[type[Settings]]:
    """Return every settings model that an annotation allows, inside unions, lists and annotations."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [model for member in get_args(annotation) for model in _list_models(member)]


def _known_keys(location: list[str]) -> list[str]:
    model: Any = RunConfig
    for _, found, _ in _walk_models(location):
        model = found
    return [] if model is None else list(model.model_fields)


def _drop_tags(location: list[str]) -> list[str]:
    """Return the location without the tags and types of union members, that is, as the user wrote it."""
    return [part for part, _, is_tag in _walk_models(location) if not is_tag and not _TYPE.fullmatch(part)]
