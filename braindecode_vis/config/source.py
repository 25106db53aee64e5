"""Where a configuration comes from: a YAML file, a run folder or a shipped name, with dotted overrides on top."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from braindecode_vis.checks import ConfigError, suggest
from braindecode_vis.config.models import RunConfig
from braindecode_vis.config.wording import validate_config
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.settings import Settings


def read_config(source: str | Path, overrides: Iterable[str] = (), *, root: Path | None = None) -> RunConfig:
    """Read a configuration and apply overrides.

    Parameters
    ----------
    source
        A YAML file, a run folder that holds ``config.yaml``, the name of a shipped configuration, or the name of
        a data set (its default configuration).
    overrides
        Texts ``a.b=value``; the value is YAML.
    root
        Folder of the data set, as given on the command line.

    Raises
    ------
    ConfigError
        If the file is missing or any value is not valid; the message names the full path of the key.
    """
    path = find_config(source)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise ValueError
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not {type(content).__name__}.")
    # A new kind drops the settings of the old one, so kinds are chosen before their settings.
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith("kind")):
        _apply_override(content, text)
    if root is not None:
        if not isinstance(content.get("dataset"), dict):
            raise ConfigError(f"{path} names no dataset that --root could apply to.")
        content["dataset"]["root"] = str(root.expanduser().absolute())
    return _anchor_paths(validate_config(content, where=str(path)), path.parent)


def _anchor_paths(settings: Settings, base: Path) -> Any:
    """Make every relative path absolute, from here or from beside the YAML file: a run may be taken up elsewhere."""
    changes: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            changes[name] = _anchor_paths(value, base)
        elif isinstance(value, tuple | list):
            changes[name] = type(value)(
                _anchor_paths(v, base) if isinstance(v, Settings) else _anchor(v, base) for v in value
            )
        else:
            changes[name] = _anchor(value, base)
    changed = {name: value for name, value in changes.items() if value is not getattr(settings, name)}
    return settings.model_copy(update=changed) if changed else settings


def _anchor(value: Any, base: Path) -> Any:
    if not isinstance(value, Path) or value.expanduser().is_absolute():
        return value
    here = value.expanduser()
    return (here if here.exists() or not (base / here).exists() else base / here).absolute()


def find_config(source: str | Path) -> Path:
    """Return the YAML file that `source` stands for; see `read_config`."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    if len(path.parts) > 1 and path.parts[0] != "configs":
        raise ConfigError(
            f"the configuration {source} was not found; give a path, a run folder or a shipped name."
        )
    shipped = {p.stem: p for p in sorted(find_package_data("configs").glob("*.yaml"))}
    name = path.stem if path.suffix in (".yaml", ".yml") else str(source)
    if name in shipped:
        return shipped[name]
    defaults = [stem for stem in shipped if stem.split("_")[0] == name or stem.startswith(f"{name}_")]
    if defaults:
        return shipped[min(defaults, key=len)]
    raise ConfigError(
        f"{source} is neither a configuration file, a run folder, nor one of the shipped configurations "
        f"{', '.join(shipped)}{suggest(name, list(shipped))}."
    )


def _apply_override(content: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"the override {text!r} must have the form a.b=value, for example seed=1.")
    node = content
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
        if not isinstance(child, dict):
            raise ConfigError(
                f"the override {text!r} goes below {'.'.join(parts[: depth + 1])}, which is the value {child!r}."
            )
        node = child
    try:
        loaded = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the value of the override {text!r} is not valid YAML.") from error
    if parts[-1] == "kind" and node.get("kind") != loaded:
        node.clear()  # the settings of the old kind are not those of the new one
    node[parts[-1]] = loaded


def dump_config(config: RunConfig) -> str:
    """Return the YAML of a configuration with every default written out."""
    content = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
