"""Describes every setting, in words and as a JSON Schema, and says which files that settings name are missing.

Reads the type, default and description of an option from its class. An option is described under ``Parameters`` in the
docstring of its class or of a parent class. The command, the settings page and the schema use this module.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

import braindecode_vis
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, check_installed, suggest
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.contracts import EncoderSettings, ImageEncoderSettings, Prior
from braindecode_vis.base.memory import describe_size, describe_total
from braindecode_vis.base.parts import describe_missing
from braindecode_vis.base.registry import Component, find_component, find_nested, list_inside, list_kinds
from braindecode_vis.base.remote import refuse_address
from braindecode_vis.base.roles import build, complete, find_encoder_role, find_image_encoder_role
from braindecode_vis.base.settings import OUTSIDE, NeededWeights, Settings
from braindecode_vis.config.models import RunConfig

#: Role -> what its components are called.
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
    "metric": "Metrics with settings",
}


def describe_options(cls: type[Settings]) -> dict[str, str]:
    """Return the description of each option of a class, an empty text if there is none."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Settings):
            found |= {name: _follow(base, name, text) for name, text in read_parameters(base).items()}
    return {name: found.get(name, "") for name in cls.model_fields if name != "kind"}


def _follow(cls: type, name: str, text: str) -> str:
    """Replace ``As in `Other``` by the description in the other class."""
    match = re.match(r"As in `(\w+)`[.,;]? ?", text)
    if match is None:
        return text
    other = _find_class(cls, match[1])
    inherited = [read_parameters(base) for base in other.__mro__]
    described = next((entries[name] for entries in inherited if name in entries), "")
    rest = text[match.end() :]
    return " ".join(filter(None, [_follow(other, name, described), rest[:1].upper() + rest[1:]]))


def _find_class(cls: type, name: str) -> type:
    """Return a class that a docstring names: of the docstring's module, or of another module that defines it."""
    own = vars(sys.modules[cls.__module__])
    if name in own:
        found: type = own[name]
        return found
    root = Path(braindecode_vis.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if re.search(rf"^class {name}\b", path.read_text(), re.MULTILINE):
            parts = path.relative_to(root.parent).with_suffix("").parts
            return vars(importlib.import_module(".".join(parts)))[name]
    raise LookupError(f"{cls.__name__} refers to a class {name}, which does not exist")


def read_parameters(cls: type) -> dict[str, str]:
    """Return the descriptions under ``Parameters`` of a docstring, by name."""
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
    """Return what values a field of a role takes, with a link to its kinds."""
    if field.role not in ROLES:
        return f"a {field.role} from outside the package"
    link = re.sub(r"[^a-z -]", "", ROLES[field.role].lower().replace(".", "")).replace(" ", "-")
    chosen = (
        ""
        if field.kinds == tuple(list_inside(field.role))
        else f": {', '.join(f'`{kind}`' for kind in field.kinds)}"
    )
    return f"[{field.role}](#{link}){chosen}"


def describe_default(field: FieldInfo) -> str:
    """Return a default as it is written in YAML."""
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


def find_classes(
    *more: type[Settings],
) -> tuple[dict[str, dict[str, type[Settings]]], list[type[Settings]]]:
    """Return the classes of every role by kind, and all classes that they and a run use, in order of appearance.

    Parameters
    ----------
    *more
        Further classes whose settings are searched.
    """
    roles = {role: {kind: find_component(role, kind) for kind in list_inside(role)} for role in ROLES}
    waiting: list[type[Settings]] = [
        RunConfig,
        *(c for kinds in roles.values() for c in kinds.values()),
        *more,
    ]
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


# --- one name -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One setting of a class: its name, type and default in words, and what it does."""

    name: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class Explanation:
    """Explanation of a name in a configuration.

    Parameters
    ----------
    name
        A kind with its role (``network.atm_s``), a role, ``run``, or a class of settings.
    about
        First sentence of its docstring.
    options
        Its settings; empty for a role.
    kinds
        For a role: each kind and its first sentence.
    """

    name: str
    about: str
    options: tuple[Option, ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()


def explain(name: str, *, besides: Sequence[str] = ()) -> list[Explanation]:
    """Return the meanings of a name in a configuration; several roles may have a kind of the same name.

    Parameters
    ----------
    name
        ``atm_s``, ``network.atm_s``, ``network``, ``run``, a class such as ``SelectionConfig``, a key as
        ``--set`` takes it (``repeats.test``), or one setting of any class (``subject_alignment``).
    besides
        Further names to suggest if nothing has this name.

    Raises
    ------
    ConfigError
        If nothing has this name; the message suggests the nearest one.

    Examples
    --------
    >>> [found.name for found in explain("atm_s")]
    ['network.atm_s']
    >>> dict(explain("prior")[0].kinds)["mean"]
    'Give the generator the mean embedding of the training images, whatever the prediction is.'
    >>> [option.name for found in explain("repeats.test") for option in found.options]
    ['test']
    """
    if name == "run":
        return [explain_class("run", RunConfig)]
    if name in ROLES:
        return [
            Explanation(
                name, f"{ROLES[name]}: what may be set under {name}.kind.", kinds=tuple(_list_kinds(name))
            )
        ]
    role, _, kind = name.rpartition(".")
    found = [explain_class(f"{r}.{kind}", find_component(r, kind))
             for r in ROLES if role in ("", r) and kind in list_inside(r)]  # fmt: skip
    if found:
        return found
    others = {cls.__name__: cls for cls in find_classes()[1]}
    if name in others:
        return [explain_class(name, others[name])]
    if found := list(_explain_key(name)):
        return found
    known = [*besides, *ROLES, *(kind for role in ROLES for kind in list_inside(role)), *others]
    if missing := describe_missing(kind):
        raise ConfigError(f"{missing}.")
    near = suggest(kind, known)
    raise ConfigError(
        f"nothing is called {name!r}{near}; braindecode-vis configs lists configurations, and "
        f"braindecode-vis describe ROLE lists the kinds of a role: {', '.join(ROLES)}."
    )


def _explain_key(name: str) -> Iterator[Explanation]:
    """Yield the meanings of a key of a run, or of one setting of any class; classes that describe it alike are one."""
    *path, last = name.split(".")
    owners: dict[str, type[Settings]] = {"run": RunConfig}
    if not path and last not in RunConfig.model_fields:
        roles, others = find_classes()
        owners = {f"{role}.{kind}": cls for role, kinds in roles.items() for kind, cls in kinds.items()}
        owners |= {cls.__name__: cls for cls in others}
    for part in path:
        nested = [one for cls in owners.values() for one in _list_nested(cls, part)]
        # A kind may stand in the path too: encoder.ridge.alphas.
        owners = dict(nested) or {label: cls for label, cls in owners.items() if label.endswith(f".{part}")}
    sections = dict(one for cls in owners.values() for one in _list_nested(cls, last))
    if path or owners == {"run": RunConfig}:
        if len(sections) == 1:
            yield explain_class(name, next(iter(sections.values())))
            return
    alike: dict[Option, list[str]] = {}
    for label, cls in owners.items():
        for option in explain_class(label, cls).options if last in cls.model_fields else ():
            if option.name == last:
                alike.setdefault(option, []).append(label)
    for option, labels in alike.items():
        yield Explanation(name, f"a setting of {', '.join(labels)}.", (option,))


def _list_nested(cls: type[Settings], name: str) -> Iterator[tuple[str, type[Settings]]]:
    """Yield the classes that one setting of a class may hold, each by its kind or its name."""
    field = cls.model_fields.get(name)
    for nested in find_nested(field.annotation, tuple(field.metadata)) if field else ():
        if isinstance(nested, Component):
            yield from ((f"{nested.role}.{kind}", find_component(nested.role, kind)) for kind in nested.kinds)
        else:
            yield nested.__name__, nested


def _list_kinds(role: str) -> Iterator[tuple[str, str]]:
    for kind in list_kinds(role):
        try:
            about = _first_sentence(find_component(role, kind))
        except ConfigError as error:  # an entry point of another package that cannot be used
            about = str(error)
        yield kind, _drop_marks(about)


def _first_sentence(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("\n\n")[0].split())


def explain_class(name: str, cls: type[Settings]) -> Explanation:
    """Return the explanation of a settings class from its docstring and fields."""
    options = []
    for key, text in describe_options(cls).items():
        field = cls.model_fields[key]
        kind = describe_type(field.annotation, tuple(field.metadata))
        options.append(Option(key, *map(_drop_marks, (kind, describe_default(field), text))))
    return Explanation(name, _drop_marks(_first_sentence(cls)), tuple(options))


def _drop_marks(text: str) -> str:
    """Return text without the marks of links and of code, as a terminal shows it."""
    return " ".join(re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", text).replace("`", "").split())


# --- JSON Schema ----------------------------------------------------------------------------------------------


def make_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, with which editors complete and check it.

    Returns
    -------
    dict
        Draft 2020-12. Kinds of other packages and ``package.module:Class`` are allowed where the package allows them,
        with any settings. Rules that involve several settings are not part of it.
    """
    roles, others = find_classes()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_write_class(RunConfig),
        "$defs": {},
    }
    for role, kinds in roles.items():
        for kind, cls in kinds.items():
            schema["$defs"][f"{role}.{kind}"] = _write_class(cls, of_role=True)
    # Settings may name a component's own, such as the encoder that pretraining builds, without asking for its kind.
    components: set[Any] = {cls for kinds in roles.values() for cls in kinds.values()}
    named: set[Any] = {
        nested
        for cls in (RunConfig, *components, *others)
        for field in cls.model_fields.values()
        for nested in find_nested(field.annotation, tuple(field.metadata))
        if nested in components
    }
    schema["$defs"] |= {
        cls.__name__: _write_class(cls) for cls in (*others, *sorted(named, key=lambda c: c.__name__))
    }
    return schema


def _write_class(cls: type[Settings], *, of_role: bool = False) -> dict[str, Any]:
    texts = describe_options(cls)
    properties: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        entry = _write_type(field.annotation, tuple(field.metadata))
        if name in _find_short_forms(cls):
            entry = {"anyOf": [entry, {"type": ["string", "number", "boolean", "array"]}]}
        if not field.is_required() and name != "kind":
            default = field.get_default(call_default_factory=True)
            plain = default.model_dump(mode="json") if isinstance(default, Settings) else default
            if isinstance(plain, str | int | float | bool | list | dict | None):
                entry = {**entry, "default": plain}
        properties[name] = {**entry, **({"description": _drop_marks(texts[name])} if name in texts else {})}
    required = [
        name
        for name, field in cls.model_fields.items()
        if field.is_required() or (name == "kind" and of_role)
    ]
    return {
        "type": "object", "description": _drop_marks(_first_sentence(cls)), "properties": properties,
        "additionalProperties": False, "required": required,
    }  # fmt: skip


def _find_short_forms(cls: type[Settings]) -> set[str]:
    """Return the settings that also have a shorter form, which a validator expands before the check."""
    decorators = cls.__pydantic_decorators__
    named = [v.info.fields for v in decorators.field_validators.values() if v.info.mode == "before"]
    found = {name for fields in named for name in fields if name != "*"}
    if any(
        v.info.mode == "before" and "short_forms" in key for key, v in decorators.model_validators.items()
    ):
        found |= {
            name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)
        }
    return found


_JSON_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _write_type(annotation: Any, metadata: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return the schema of a type; a type that it cannot express allows everything."""
    for entry in metadata:
        if isinstance(entry, Component):
            return _write_component(entry)
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _write_type(members[0], members[1:])
    bounds = {
        word: value for entry in metadata for name, word in _JSON_BOUNDS.items()
        if (value := getattr(entry, name, None)) is not None
    }  # fmt: skip
    if origin is Literal:
        return {"enum": list(members)}
    if origin in (tuple, list):
        inner = [_write_type(member) for member in members if member is not Ellipsis]
        if Ellipsis in members or origin is list:
            return {"type": "array", "items": inner[0]}
        return {"type": "array", "prefixItems": inner, "minItems": len(inner), "maxItems": len(inner)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _write_type(members[1])}
    if members:
        return {"anyOf": [_write_type(member) for member in members]}
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return {"$ref": f"#/$defs/{annotation.__name__}"}
    if annotation is Path:
        return {"type": "string"}
    return {"type": _JSON_TYPES[annotation], **bounds} if annotation in _JSON_TYPES else {}


def _write_component(field: Component) -> dict[str, Any]:
    if field.role not in ROLES:
        return {}
    known = [{"$ref": f"#/$defs/{field.role}.{kind}"} for kind in field.kinds]
    if not field.outside:
        return {"anyOf": known}
    others = {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"type": "string", "pattern": ":"}},
    }
    return {"anyOf": [*known, others]}


# --- files that are missing ------------------------------------------------------------------------------------
# Checks before anything is computed that the files of a configuration exist.
#
# Owns which settings each stage reads. A data set and an analysis check their own files, which they read first
# anyway.


#: Settings that are read first at each stage; a stage needs those of the stages before it too.
READS = {
    "preprocess": (),
    "embed": ("target",),
    "train": ("encoder", "text"),
    "retrieve": (),
    "reconstruct": ("prior", "generator", "reconstruction"),
    "evaluate": ("evaluation", "text"),
    "report": (),
}


def check_files(config: RunConfig, stage: str = "report") -> None:
    """Raise one error that names every file that a run needs up to a stage and that is missing.

    Packages of extras must be installed, paths must exist, weights of a network must be there or their download
    allowed, and a caption bank must be readable.

    Parameters
    ----------
    config
        Configuration of the run.
    stage
        The last stage to run.
    """
    config.choose_cache()
    _check_outside(config)
    problems: list[BraindecodeVisError] = []
    for key, entry in config.dataset.walk("dataset"):
        _check_packages(key, entry)
        for name in type(entry).model_fields:
            value = getattr(entry, name)
            for path in value if isinstance(value, list | tuple) else (value,):
                if isinstance(path, Path):
                    refuse_address(path, f"{key}.{name}")
    missing, unread = [], set()
    for key, entry in _walk(config, stage):
        try:
            needed = _list_needed(key, entry)
        except BraindecodeVisError:  # a missing package is reported below
            continue
        allowed = getattr(entry, "allow_download", False) or may_download()
        absent = [one for one in needed if one.is_missing and not (allowed and one.place)]
        missing += absent
        unread |= {key for _ in absent}
    if missing:
        problems.append(ConfigError(f"{describe_weights(_merge(missing))}."))
    for key, entry in _walk(config, stage):
        # What holds settings whose weights are missing would say so once more.
        if not any(one == key or one.startswith(f"{key}.") for one in unread):
            try:
                _check_settings(key, entry)
            except BraindecodeVisError as error:
                problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(" ".join(dict.fromkeys(str(error) for error in problems)))


def list_weights(config: RunConfig) -> list[NeededWeights]:
    """Return the trained networks that a run loads, with the full keys of the settings that load them.

    Parameters
    ----------
    config
        Configuration of the run.

    Raises
    ------
    ConfigError
        If a package is not installed that says which weights belong to a network.
    """
    entries = list(_walk(config, "report"))
    if config.uses_pretraining and config.pretrain is not None:
        entries += config.pretrain.walk("pretrain")
    if config.run_analyses:
        entries += [pair for n, one in enumerate(config.analyses) for pair in one.walk(f"analyses.{n}")]
    found = [needed for key, entry in entries for needed in _list_needed(key, entry)]
    if any(key == "text" for key, _ in entries) and config.text.tower is None:
        from braindecode_vis.embeddings.openclip import OpenClipConfig
        from braindecode_vis.embeddings.text import list_text_weights

        if isinstance(config.target, OpenClipConfig):
            found += list_text_weights(config.target, config.text.reading, "text.reading.tokenizer")
    return _merge(found)


def describe_weights(missing: Sequence[NeededWeights]) -> str:
    """Return one sentence that names missing weights, their sizes and what to do, without its full stop."""
    items = [
        f"{' and '.join(one.settings)} needs {one.name or one.what} ({describe_size(one.size)})"
        for one in missing
    ]
    total = f", {describe_total([one.size for one in missing])} together" if len(missing) > 1 else ""
    number = f"{len(missing)} networks are" if len(missing) > 1 else "one network is"
    steps = "; ".join(list_steps(missing))
    if any(one.name and one.automatic for one in missing) and not may_download():
        steps += "; or give this command --allow-download"
    return f"{number} not on this machine{total}: {'; '.join(items)}. What to do: {steps}"


def list_steps(missing: Sequence[NeededWeights]) -> list[str]:
    """Return the commands that bring missing weights, each with the settings that name what it brought."""
    # No copy elsewhere is looked for where a setting names one.
    wrong = [f"correct {' and '.join(one.settings)}, as no file is there, or leave it out"
             for one in missing if one.named]  # fmt: skip
    missing = [one for one in missing if not one.named]
    steps = []
    found = [one.name for one in missing if one.name and one.automatic]
    if found:
        steps.append(f"braindecode-vis weights fetch {' '.join(dict.fromkeys(found))}")
    named = [one for one in missing if one.name and not one.automatic]
    if named:
        names = " ".join(dict.fromkeys(one.name for one in named))
        lines = [f"braindecode-vis weights fetch {names} --to DIR"]
        changes = []
        for one in named:
            copy = f"DIR/{one.name}" + (f"/{one.files[0]}" if len(one.files) == 1 else "")
            if one.convert:
                lines.append(f"braindecode-vis weights convert {copy} --to FOLDER")
                copy = "FOLDER"
            changes.append(f"--set {one.settings[0]}={copy}")
        steps.append(", then ".join([*lines, " ".join(changes)]))
    for one in missing:
        if one.name:
            continue
        if one.place:
            steps.append(f"give --allow-download to the command that needs it (from {one.place})")
        else:
            steps.append(f"--set {one.settings[0]}=PATH, where PATH is {one.what}")
    return list(dict.fromkeys(steps + wrong))


def _merge(found: Sequence[NeededWeights]) -> list[NeededWeights]:
    """Return each network once, with all settings that load it."""
    merged: dict[tuple[Any, ...], NeededWeights] = {}
    for one in found:
        key = (one.name, one.what, one.path, one.automatic, one.named, one.leaves_out)
        before = merged.get(key)
        settings = one.settings if before is None else (*before.settings, *one.settings)
        merged[key] = replace(one, settings=tuple(dict.fromkeys(settings)))
    return list(merged.values())


def _list_needed(key: str, entry: Settings) -> list[NeededWeights]:
    _check_packages(key, entry)
    return [
        replace(one, settings=tuple(f"{key}.{setting}" for setting in one.settings))
        for one in entry.list_weights()
    ]


def _walk(config: RunConfig, stage: str) -> Iterator[tuple[str, Settings]]:
    """Yield the settings that are read up to a stage, with their full keys."""
    stages = list(READS)
    for name in stages[: stages.index(stage) + 1]:
        for part in READS[name]:
            settings: Settings | None = getattr(config, part)
            if settings is not None and _is_read(config, part, name):
                yield from settings.walk(part)


def _check_outside(config: RunConfig) -> None:
    """Build components from outside, so that missing parts are reported before their stage starts."""
    target, encoder = complete(ImageEncoderSettings, config.target), complete(EncoderSettings, config.encoder)
    if type(config.target) in OUTSIDE:
        build(find_image_encoder_role(target), target)
    if type(config.encoder) in OUTSIDE:
        build(find_encoder_role(encoder), encoder, seed=0)
    if type(config.prior) in OUTSIDE:
        build(Prior, config.prior, seed=0)


def _is_read(config: RunConfig, part: str, stage: str) -> bool:
    if config.decodes_categories:
        return part == "encoder"
    if part != "text":
        return True
    named = "zero_shot_text" in config.evaluation.protocols
    return named if stage == "evaluate" else complete(EncoderSettings, config.encoder).reads_text


def _check_packages(key: str, settings: Settings) -> None:
    for module in settings.packages:
        check_installed(module, f"{key} ({getattr(settings, 'kind', module)})")


def _check_settings(key: str, settings: Settings) -> None:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if getattr(settings, f"{name}_digest", None) is not None:
            continue  # seen before: what was fitted from it needs it no more, and a training says that it is gone
        named = value if isinstance(value, dict) else {"": value}
        for entry, path in named.items():
            if isinstance(path, Path) and not path.expanduser().exists():
                whole = f"{key}.{name}.{entry}".rstrip(".")
                raise ConfigError(f"{whole} names {path}, which does not exist; correct it or leave it out.")
    _check_packages(key, settings)
    try:
        settings.check_files()
    except BraindecodeVisError as error:
        # A network speaks of itself as the target, wherever it is used.
        text = re.sub(r"(?<![\w./])target\.(?=\w)", f"{key}.", str(error))
        raise type(error)(text) from error
