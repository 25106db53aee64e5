"""Write ``docs/SETTINGS.md``: every setting of a run, with its type, its default and what it does.

    python docs/write_settings.py

The text is that of the docstrings: an option is described under ``Parameters`` in its class or in a class that it
inherits from. ``tests/test_settings_page.py`` fails where the page is not current or an option has no description.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

import braindecode_vis
from braindecode_vis.config import RunConfig
from braindecode_vis.registry import GROUPS, INSIDE, Component, find_component, find_nested
from braindecode_vis.settings import Settings
from braindecode_vis.studies.train_generator import GeneratorTrainingConfig

PAGE = Path(__file__).resolve().parent / "SETTINGS.md"
HEADER = """# Settings

Every option of a run's YAML file, and of `--set`. This page is written by `python docs/write_settings.py` from the
docstrings of the settings classes; a test keeps it current.

A component is chosen by its `kind`. A `kind` may also be the name of an entry point of another installed package, or
`package.module:Class`; see OUTSIDE.md. Options in *italics* say how something runs
and not what it computes, so that they stay out of the fingerprint.
"""
ROLES = {
    "dataset": "Data sets",
    "split": "Splits",
    "target": "Image encoders",
    "encoder": "Brain encoders",
    "network": "Networks",
    "objective": "Objectives",
    "augmentation": "Augmentations",
    "prior": "Priors",
    "generator": "Generators",
    "analysis": "Analyses",
}


def describe_options(cls: type[Settings]) -> dict[str, str]:
    """Return the description of each option of a class, an empty text where there is none."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Settings):
            found |= {name: _follow(base, name, text) for name, text in read_parameters(base).items()}
    return {name: found.get(name, "") for name in cls.model_fields if name != "kind"}


def _follow(cls: type, name: str, text: str) -> str:
    """Put the description of another class in the place of ``As in `Other```."""
    match = re.match(r"As in `(\w+)`[.,;]? ?", text)
    if match is None:
        return text
    other = _find_class(cls, match[1])
    inherited = [read_parameters(base) for base in other.__mro__]
    described = next((entries[name] for entries in inherited if name in entries), "")
    rest = text[match.end() :]
    return " ".join(filter(None, [_follow(other, name, described), rest[:1].upper() + rest[1:]]))


def _find_class(cls: type, name: str) -> type:
    """Return a class that a docstring names: of the docstring's module, or of whichever module defines it."""
    own = vars(sys.modules[cls.__module__])
    if name in own:
        found: type = own[name]
        return found
    root = Path(braindecode_vis.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if re.search(rf"^class {name}\b", path.read_text(), re.MULTILINE):
            parts = path.relative_to(root.parent).with_suffix("").parts
            return vars(importlib.import_module(".".join(parts)))[name]
    raise LookupError(f"{cls.__name__} refers to a class {name}, which is not there")


def read_parameters(cls: type) -> dict[str, str]:
    """Return what a docstring says under ``Parameters``, by name."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    match = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-{3,}$|\Z)", text, re.MULTILINE | re.DOTALL)
    entries: dict[str, str] = {}
    if match is None:
        return entries
    names: list[str] = []
    for line in match[1].splitlines():
        if line and not line.startswith(" "):
            names = [name.strip() for name in line.partition(" : ")[0].split(",")]
            entries |= dict.fromkeys(names, "")
        else:
            entries |= {name: f"{entries[name]} {line.strip()}".strip() for name in names}
    return entries


_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "at least {} long"}


def describe_type(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Return a type in words, with its bounds."""
    bounds = [
        words.format(f"{value:.10g}")
        for entry in metadata
        for name, words in _BOUNDS.items()
        if (value := getattr(entry, name, None)) is not None
    ]
    described = _describe_unbounded(annotation, metadata)
    return f"{described} ({', '.join(bounds)})" if bounds else described


def _describe_unbounded(annotation: Any, metadata: tuple[Any, ...]) -> str:
    for entry in metadata:
        if isinstance(entry, Component):
            return _describe_component(entry)
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(members[0], members[1:])
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin in (tuple, list):
        inner = [describe_type(member) for member in members if member is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in members or origin is list else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"mapping of {describe_type(members[0])} to {describe_type(members[1])}"
    if members:
        # typing hands out one object for both orders of a union, so that the order is not that of the class
        described = sorted(map(describe_type, members), key=lambda text: (text == "null", text))
        return " or ".join(described)
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    plain = {
        "NoneType": "null",
        "str": "text",
        "float": "number",
        "int": "whole number",
        "bool": "true or false",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return plain.get(name, name.lower())


def _describe_component(field: Component) -> str:
    """Return what a field of a role takes, with a link to its kinds."""
    if field.role not in ROLES:
        return f"a {field.role} from outside the package"
    link = re.sub(r"[^a-z -]", "", ROLES[field.role].lower().replace(".", "")).replace(" ", "-")
    chosen = (
        ""
        if field.kinds == tuple(INSIDE[field.role])
        else f": {', '.join(f'`{kind}`' for kind in field.kinds)}"
    )
    return f"[{field.role}](#{link}){chosen}"


def describe_default(field: FieldInfo) -> str:
    """Return a default as YAML would write it."""
    if field.is_required():
        return "required"
    return f"`{_write_plain(field.get_default(call_default_factory=True))}`"


def _write_plain(value: Any) -> str:
    if isinstance(value, Settings):
        changed = {
            name: getattr(value, name)
            for name, field in type(value).model_fields.items()
            if name == "kind" or getattr(value, name) != field.get_default(call_default_factory=True)
        }
        return _write_plain(changed) if changed else "its defaults"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_write_plain(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        entries = [_write_plain(entry) for entry in value]
        if len(entries) > 8:
            entries = [*entries[:2], "...", entries[-1]]
        return "[" + ", ".join(entries) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def write_class(cls: type[Settings], title: str, level: str) -> str:
    """Return the section of one settings class."""
    first = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\n\n")[0]
    lines = [f"{level} {title}", "", " ".join(first.split()), ""]
    descriptions = describe_options(cls)
    if descriptions:
        lines += ["| option | type | default | |", "|---|---|---|---|"]
    for name, text in descriptions.items():
        field = cls.model_fields[name]
        shown = f"*{name}*" if name in cls.not_hashed else name
        cells = [shown, describe_type(field.annotation, tuple(field.metadata)), describe_default(field), text]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def find_classes() -> tuple[dict[str, dict[str, type[Settings]]], list[type[Settings]]]:
    """Return the classes of every role by kind, and all others that they and a run name, in the order they are met."""
    roles = {role: {kind: find_component(role, kind) for kind in INSIDE[role]} for role in ROLES}
    waiting: list[type[Settings]] = [RunConfig, *(c for kinds in roles.values() for c in kinds.values())]
    waiting.append(GeneratorTrainingConfig)
    others: list[type[Settings]] = []
    seen: set[type[Settings]] = set(waiting)
    while waiting:
        for field in waiting.pop(0).model_fields.values():
            for nested in find_nested(field.annotation, tuple(field.metadata)):
                if not isinstance(nested, Component) and nested not in seen:
                    seen.add(nested)
                    others.append(nested)
                    waiting.append(nested)
    return roles, others


def write_page() -> str:
    """Return the whole page."""
    roles, others = find_classes()
    parts = [HEADER, write_class(RunConfig, "A run", "##")]
    for role, kinds in roles.items():
        parts.append(f"## {ROLES[role]}\n")
        if role in GROUPS:
            parts.append(f"Entry points of other packages: `{GROUPS[role]}`.\n")
        parts += [write_class(cls, f"`{kind}`", "###") for kind, cls in kinds.items()]
    parts.append("## Settings inside other settings\n")
    parts += [write_class(cls, cls.__name__, "###") for cls in others]
    parts.append(write_class(GeneratorTrainingConfig, "The verb `train-generator`", "##"))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(write_page())
