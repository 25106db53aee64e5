"""Where a configuration comes from: a YAML file, a run folder or a shipped name, with dotted overrides on top.

Only the caller can allow code from outside and downloads, never a file, since a configuration may come from another
person.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from braindecode_vis import __version__
from braindecode_vis.base.checks import ConfigError, suggest
from braindecode_vis.base.consent import ConsentError, check_code, find_code, give_consent, may_download
from braindecode_vis.base.registry import check_names, find_component, list_inside
from braindecode_vis.base.remote import as_path, is_address, name_address
from braindecode_vis.base.settings import Settings, describe_validation_error
from braindecode_vis.base.store import PROVENANCE
from braindecode_vis.config.models import RunConfig
from braindecode_vis.datasets.manifests import find_package_data

AnySettings = TypeVar("AnySettings", bound=Settings)

#: Settings that let a file of data run code, or weights be fetched; a file that states them is read as if it did not.
CONSENTS = ("trust_pickle", "allow_download")

#: Nine aliases of nine aliases, twenty times, are more than can be visited.
_MAX_ENTRIES = 1_000_000


def read_config(source: str | Path, overrides: Iterable[str] = (), *, root: Path | None = None) -> RunConfig:
    """Read a configuration and apply overrides.

    Parameters
    ----------
    source
        A YAML file, a run folder that holds ``config.yaml``, the name of a shipped configuration, or the name of
        a data set (its default configuration).
    overrides
        Texts ``a.b=value``; the value is YAML. Consent (`CONSENTS`, and kinds that are ``module:Class``) counts only
        here, not in the file. Addresses of servers in the file are read only if downloads are allowed.
    root
        Folder of the data set, as given on the command line.

    Raises
    ------
    ConfigError
        If the file is missing or any value is not valid; the message names the full path of the key.
    ConsentError
        If the file names code from outside the package that this call may not import; see `give_consent`.
    """
    path = find_config(source)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise ValueError
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not {type(content).__name__}.")
    if _count_entries(content, {}) > _MAX_ENTRIES:
        raise ConfigError(
            f"{path} names its parts in so many places that it has more than {_MAX_ENTRIES} entries (or contains "
            "itself); write it without aliases."
        )
    _drop_consents(content, set())
    # Kept as it was written: only what the file itself says may be blamed on an older version.
    written = copy.deepcopy(content)
    overrides = list(overrides)
    # A new kind drops the settings of the old one, so kinds are chosen before their settings.
    said: list[str] = []
    named: set[str] = set()
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith("kind")):
        parts, value = read_override(text)
        apply_override(content, text, parts, value)
        said += find_code({parts[-1]: value})
        named |= _find_addresses(value)
    if root is not None:
        if not isinstance(content.get("dataset"), dict):
            raise ConfigError(f"{path} has no dataset to which --root could apply.")
        content["dataset"]["root"] = str(as_path(root))
        named.add(name_address(root))
    try:
        with give_consent(code=said):
            check_code(content, where=str(path))
            if root is not None:
                _refuse_root(content["dataset"])
            config = validate_config(content, where=str(path))
        # What a run wrote has every default in it, also where an earlier version had fewer settings.
        of_run = path.name == "config.yaml" and (path.parent / "stages").is_dir()
        _refuse_ignored(
            config,
            {} if of_run or set(RunConfig.model_fields) - {"cluster", "remote"} <= set(written) else written,
            overrides,
        )
    except ConsentError:
        raise
    except ConfigError as error:
        if path.name == "config.yaml" and (about := describe_writer(path.parent)) and not _is_valid(written):
            raise ConfigError(f"{str(error).rstrip('.')}; {about}.") from error
        raise
    config = config.replace_paths(
        partial(_anchor, base=path.parent, data=getattr(config.dataset, "root", None))
    )
    config = config.take_addresses(None if may_download() else named)
    return _allow_downloads(config) if may_download() else config


def _find_addresses(value: Any) -> set[str]:
    """Return the addresses of servers in the value of an override, at any depth."""
    if isinstance(value, dict | list):
        entries = value.values() if isinstance(value, dict) else value
        return set[str]().union(*map(_find_addresses, entries))
    return {name_address(value)} if isinstance(value, str) and is_address(value) else set()


def _refuse_root(dataset: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if a folder was given for a data set that reads no folder."""
    kind = dataset.get("kind")
    if (
        isinstance(kind, str)
        and kind in list_inside("dataset")
        and "root" not in find_component("dataset", kind).model_fields
    ):
        raise ConfigError(f"the data set {kind} needs no folder; leave --root out.")


def _allow_downloads(settings: Settings) -> Any:
    """Write the consent of the call into the settings, so that it also holds for objects built later."""
    changes: dict[str, Any] = (
        {"allow_download": True} if "allow_download" in type(settings).model_fields else {}
    )
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            changes[name] = _allow_downloads(value)
        elif isinstance(value, tuple | list):
            changes[name] = type(value)(_allow_downloads(v) if isinstance(v, Settings) else v for v in value)
    return settings.model_copy(update=changes)


def _count_entries(value: Any, counted: dict[int, int]) -> int:
    """Return how many entries a file has when its aliases are expanded; a file that contains itself has too many."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        counted[id(value)] = _MAX_ENTRIES + 1  # while it is counted
        entries = value.values() if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count_entries(entry, counted) for entry in entries)
    return counted[id(value)]


def _drop_consents(value: Any, seen: set[int]) -> None:
    """Remove consent from the content of a file, at any depth; in YAML one mapping may occur in several places."""
    if not isinstance(value, dict | list) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for name in CONSENTS:
            value.pop(name, None)
    for entry in value.values() if isinstance(value, dict) else value:
        _drop_consents(entry, seen)


def validate_config(content: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the validated configuration; the first mistake becomes one `ConfigError`."""
    try:
        check_names(RunConfig, content)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}.") from error
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}.") from error


#: What a decoder of classes never looks at, with the reason.
_OF_IMAGES = {
    "target": "predicts no embedding",
    "prior": "predicts no embedding",
    "generator": "makes no image",
    "reconstruction": "makes no image",
}
_SCORES_OF_IMAGES = (
    "features",
    "suite",
    "best_of",
    "protocols",
    "captions",
    "brain",
    "gallery",
    "composition",
    "descriptions",
)


def _refuse_ignored(config: RunConfig, written: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Raise `ConfigError` if a run that decodes classes has a setting that only runs with images use.

    `written` is the file of the user. If an override replaces its encoder, its settings were meant for another encoder
    and are not checked here.
    """
    if not config.decodes_categories:
        return
    asked = [text.partition("=")[0].strip() for text in overrides]
    keys = [key for key in asked if not key.startswith("encoder")]
    if not any(key in ("encoder", "encoder.kind") for key in asked):
        keys += [str(name) for name in written]
    for part in ("repeats", "evaluation"):
        if part in keys:  # as a whole: what was written inside
            keys += [f"{part}.{name}" for name in getattr(config, part).model_fields_set]
    says = f"the encoder {config.encoder.kind!r} decodes classes"
    for key in keys:
        role, _, field = key.partition(".")
        if role in _OF_IMAGES:
            raise ConfigError(
                f"{key} was given, but {says} and {_OF_IMAGES[role]}; leave {role} out, or choose an encoder of images "
                "such as ridge."
            )
        if role == "repeats" and field and getattr(config.repeats, field, None) == "averaged":
            raise ConfigError(
                f"{key} is averaged, but {says} trial by trial; leave it out, or set it to single."
            )
        value = getattr(config.evaluation, field.partition(".")[0], None) if role == "evaluation" else None
        if role == "evaluation" and field.partition(".")[0] in _SCORES_OF_IMAGES and value:
            raise ConfigError(f"{key} scores images or their embeddings, but {says}; leave it out.")


def _is_valid(content: dict[str, Any]) -> bool:
    """Say whether a configuration is valid as it was written, so that a mistake comes from an override."""
    try:
        validate_config(content, where="")
    except ConfigError:
        return False
    return True


def describe_writer(folder: Path) -> str:
    """Say which version wrote a run folder, with which components from outside; empty if it is not a run folder.

    Every stage keeps this in its provenance; the newest one counts.
    """
    records: list[dict[str, Any]] = []
    for path in folder.glob(f"stages/*/*/{PROVENANCE}"):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue  # a damaged stage is computed again, and tells nothing here
        if isinstance(record, dict) and isinstance(record.get("versions"), dict):
            records.append(record)
    if not records:
        return ""
    # A folder may have been continued by a later version; the last one to write it is the one to ask for.
    newest = max(records, key=lambda record: str(record.get("created", "")))
    version, revision = (
        newest["versions"].get("braindecode_vis", "of unknown version"),
        newest.get("git_revision"),
    )
    names = {name: None for record in records for name in _find_packages(record.get("fields"))}
    return (
        f"this run was written by braindecode_vis {version}{f' ({revision})' if revision else ''}, and this is "
        f"{__version__}"
        + (f"; it used {', '.join(names)}, which must be installed here too" if names else "")
    )


def _find_packages(fields: Any) -> Iterator[str]:
    """Yield class and package of each component from outside among the fields of a fingerprint."""
    if isinstance(fields, list):
        for entry in fields:
            yield from _find_packages(entry)
    elif isinstance(fields, dict):
        code = fields.get("outside")
        if isinstance(code, dict):
            package = " ".join(str(code[key]) for key in ("package", "version") if code.get(key))
            yield (
                f"{code.get('class')} of {package}"
                if package
                else f"{code.get('class')}, a file without a package"
            )
        for value in fields.values():
            yield from _find_packages(value)


def _anchor(path: Path, base: Path, data: Path | None) -> Path:
    """Make a relative path absolute, since a run may be continued from another folder.

    It is looked for in the current folder, beside the YAML file, and below the folder of the data set, in this order.
    """
    here = path.expanduser()
    if is_address(path) or here.is_absolute():
        return path
    places = [here, base / here]
    if isinstance(data, Path) and data != path and not is_address(data):
        places.append(data.expanduser() / here)
    return next((place for place in places if place.exists()), here).absolute()


def list_shipped() -> dict[str, Path]:
    """Return the configurations that ship with the package, by name."""
    return {path.stem: path for path in sorted(find_package_data("configs").glob("*.yaml"))}


def find_config(source: str | Path) -> Path:
    """Return the YAML file that `source` stands for; see `read_config`."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    # A path with folders is meant as a file, so no shipped name is tried in its place.
    if len(path.parts) > 1 and path.parts[0] != "configs":
        raise ConfigError(
            f"the configuration {source} was not found; give a path, a run folder or a shipped name."
        )
    shipped = list_shipped()
    name = path.stem if path.suffix in (".yaml", ".yml") else str(source)
    if name in shipped:
        return shipped[name]
    defaults = [stem for stem in shipped if stem.split("_")[0] == name or stem.startswith(f"{name}_")]
    if defaults:
        # The shortest name is the plainest configuration.
        return shipped[min(defaults, key=len)]
    raise ConfigError(
        f"{source} is neither a configuration file, a run folder, nor one of the {len(shipped)} shipped "
        f"configurations{suggest(name, [*shipped, *(stem.split('_')[0] for stem in shipped)])}, which "
        "braindecode-vis configs lists."
    )


def read_override(text: str) -> tuple[list[str], Any]:
    """Return the parts of the key and the value of a text ``a.b=value``."""
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"the override {text!r} must have the form a.b=value, for example seed=1.")
    try:
        return parts, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the value of the override {text!r} is not valid YAML.") from error


def override_settings(settings: AnySettings, overrides: Iterable[str], *, where: str) -> AnySettings:
    """Return settings outside a run, with some changed by texts ``a.b=value``.

    Parameters
    ----------
    settings
        Settings before the changes.
    overrides
        Texts ``a.b=value``; the later one counts.
    where
        Name of the settings, for messages.

    Raises
    ------
    ConfigError
        If an override is unknown or wrong.
    """
    content = settings.model_dump(mode="json")
    for text in overrides:
        apply_override(content, text, *read_override(text))
    try:
        return type(settings).model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}.") from error


def apply_override(content: dict[str, Any], text: str, parts: Sequence[str], value: Any) -> None:
    """Set one value of nested settings in place; `text` is the text of the user, for messages.

    Entries of a list are named by their number, as in ``encoder.members.1.epochs=40``.
    """
    node: Any = content
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            key: Any = _find_entry(node, text, parts[:depth], part)
        elif isinstance(node, dict):
            key = part
        else:
            raise ConfigError(
                f"the override {text!r} goes below {'.'.join(parts[:depth])}, which is the value {node!r}."
            )
        if depth == len(parts) - 1:
            break
        # A part that is off by default (None) is switched on by setting something in it.
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    if key == "kind" and node.get("kind") != value:
        node.clear()  # the settings of the old kind are not those of the new one
    node[key] = value


def _find_entry(entries: Sequence[Any], text: str, above: Sequence[str], part: str) -> int:
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    known = f"has the entries 0 to {len(entries) - 1}" if entries else "is empty"
    raise ConfigError(
        f"the override {text!r} names {part} below the list {'.'.join(above)}, which {known}; give such a number, or "
        f"the whole list ({'.'.join(above)}=[...])."
    )


def dump_config(config: RunConfig) -> str:
    """Return the YAML of a configuration with every default written out."""
    content = TypeAdapter(RunConfig).dump_python(config, mode="json")
    # The one in C, where there is one: a sweep writes hundreds.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text
