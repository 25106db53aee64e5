"""Consent of the user for the current call: code from outside the package, and downloads.

A configuration, a run folder or a saved decoder may come from another person, so none of them can give consent. Consent
is an option of the command line or an argument in Python, and ends with the call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from braindecode_vis.base.checks import ConfigError


class ConsentError(ConfigError):
    """A file needs consent that only the user can give."""


@dataclass(frozen=True)
class _Given:
    modules: frozenset[str] = frozenset()
    download: bool = False


# Of this thread and task alone: what one call of a server allows is not allowed to another.
_GIVEN: ContextVar[_Given] = ContextVar("braindecode_vis_consent", default=_Given())  # noqa: B039  it is frozen


@contextmanager
def give_consent(*, code: str | Iterable[str] = (), download: bool = False) -> Iterator[None]:
    """Give further consent while the context lasts.

    Parameters
    ----------
    code
        Modules or packages whose code may be imported; ``module:Class`` means its module, and a package all modules in
        it.
    download
        Whether published weights may be fetched.

    Raises
    ------
    ConfigError
        If a name is empty.
    """
    before = _GIVEN.get()
    names = [code] if isinstance(code, str) else list(code)
    modules = {name.partition(":")[0].strip() for name in names}
    if "" in modules:
        raise ConfigError("--trust-code got an empty name; name a module or package, or leave it out.")
    token = _GIVEN.set(_Given(before.modules | modules, before.download or download))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def may_download() -> bool:
    """Say whether this call may fetch published weights."""
    return _GIVEN.get().download


def may_run_commands(name: str) -> bool:
    """Say whether this call allowed shell commands of a kind, such as ``cluster``, that a file holds."""
    return name in _GIVEN.get().modules


def may_import(module: str) -> bool:
    """Say whether a module may be imported because a file names it.

    A module that is already imported runs no new code. A module that is not on this machine is reported later.
    """
    first, *_ = parts = module.split(".")
    packages = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    if module in sys.modules or packages & _GIVEN.get().modules:
        return True
    # Of a package alone: for a module inside, Python would import the package to look.
    return not first or (first not in sys.modules and find_spec(first) is None)


def find_code(content: Any) -> list[str]:
    """Return each ``module:Class`` that plain settings name as a kind, at any depth, in their order."""
    found: dict[str, None] = {}
    seen: set[int] = set()  # YAML may name one mapping in many places

    def walk(value: Any) -> None:
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            kind = value.get("kind")
            if isinstance(kind, str) and ":" in kind and kind.partition(":")[0].strip():
                found[kind] = None
        for entry in value.values() if isinstance(value, Mapping) else value:
            walk(entry)

    walk(content)
    return list(found)


def check_code(content: Any, *, where: str) -> None:
    """Raise `ConsentError` if plain settings name code that this call may not import.

    Parameters
    ----------
    content
        Settings as a file holds them.
    where
        The file.
    """
    refused = [name for name in find_code(content) if not may_import(name.partition(":")[0])]
    if refused:
        raise ConsentError(f"{where} {describe_refusal(refused)}.")


def describe_refusal(references: Iterable[str]) -> str:
    """Return the clause that names the requested code and says how to allow it for one call."""
    names = list(references)
    modules = dict.fromkeys(name.partition(":")[0] for name in names)
    return (
        f"asks for code from outside the package ({', '.join(names)}), which only you can allow: look at it, and if "
        f"you trust it, pass {' '.join(f'--trust-code {name}' for name in modules)}"
    )
