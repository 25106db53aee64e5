"""The parts that are there: folders of `braindecode_vis.parts` with a file ``register.py``."""

from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any


def find_parts() -> list[ModuleType]:
    """Import the file ``register.py`` of every part that is there."""
    spec = util.find_spec("braindecode_vis.parts")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = sorted(path.parent.name for folder in folders for path in Path(folder).glob("*/register.py"))
    return [import_module(f"braindecode_vis.parts.{name}.register") for name in found]


def find_hook(name: str, part: str) -> Any:
    """Return what a part brings under a name.

    Raises
    ------
    ConfigError
        If the part is not installed.
    """
    from braindecode_vis.base.checks import ConfigError  # which loads numpy

    found = next((getattr(each, name) for each in find_parts() if hasattr(each, name)), None)
    if found is None:
        raise ConfigError(f"the part {part} of braindecode_vis is not installed, and this needs it.")
    return found
