"""Finds the installed parts: what each one provides, and the error if one is missing.

A part is an optional feature: a folder of `braindecode_vis.parts` with a file ``register.py``, or an entry point of
another package. Both hold one `Part`, which names its verbs, kinds, abilities and report section as text, so that
finding the parts does not import them. The core asks by name for what a part provides and depends on no part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module, util
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from importlib import metadata

#: Group of the entry points by which another package brings a part: ``name = "package.register:PART"``.
GROUP = "braindecode_vis.parts"
_NONE: Mapping[str, Any] = MappingProxyType({})
#: Part of this package -> the verbs, kinds and abilities that it brings. Only for the sentence where the part is
#: missing; a test compares it with what the parts register.
SHIPPED: dict[str, str] = {
    "analyses": "analyze encode analyze_in_run encode_responses attributes confusion encoding failures few_shot "
    "frequency_bands growing_window hubness imagery integrated_gradients joint_retrieval layer_time network_ablation "
    "occlusion repetitions rois rsa sensor_regions sliding_window spatial_patterns time_generalization "
    "time_resolved_categories window_reconstructions",
    "audit": "audit audit_run",
    "cluster": "plan status collect cancel send_sweep take_jobs",
    "foundation": "corpus labram cbramod brainlm brain_jepa cortex_mae neurostorm eegpt bendr reve luna in_context "
    "voxel_clusters",
    "live": "stream live open_session",
    "phantom": "phantom",
    "studies": "demo pretrain train-generator sweep compare board score tracks submit compare_runs choose_track "
    "check_track",
}


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Parameters
    ----------
    call
        ``module:function`` below the part.
    examples
        Lines of its help page, without the name of the command.
    only_reads
        Whether it loads only tables.
    starts_anew
        Whether it writes only at its end, so that a stopped call starts again from the beginning.
    group
        Heading of ``--help`` for the verb: Data, Run, Ask, Live, Scale or Models, or a new one.
    """

    call: str
    examples: tuple[str, ...] = ()
    only_reads: bool = False
    starts_anew: bool = False
    group: str = "Others"


@dataclass(frozen=True)
class Part:
    """What a part provides. Every reference is ``module:name``, with the module below `package`.

    Parameters
    ----------
    name
        Name of the part.
    says
        Purpose of the part, in a few words.
    package
        The package of the part: ``__package__`` of the file that registers it.
    verbs
        Name of each verb to its `Verb`, in the order of the help.
    kinds
        Role (``analysis``, ``network``, ...) to kind to its settings class.
    abilities
        Functions that the core or another part gets with `ask_part`, by name.
    page
        Function of a run that returns a `braindecode_vis.report.page.Addition` to its report.
    reduce
        Module below `package` to what a user can reduce if memory ran out in it; ``""`` is the whole part.
    distribution
        The installed package of a part from outside; None for a part of this package.
    """

    name: str
    says: str
    package: str
    verbs: Mapping[str, Verb] = field(default_factory=lambda: _NONE)
    kinds: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: _NONE)
    abilities: Mapping[str, str] = field(default_factory=lambda: _NONE)
    page: str = ""
    reduce: Mapping[str, str] = field(default_factory=lambda: _NONE)
    distribution: metadata.Distribution | None = None

    def load(self, reference: str) -> Any:
        """Import what a reference names.

        Raises
        ------
        ConfigError
            If its module needs another part that is missing.
        """
        module, _, name = reference.partition(":")
        try:
            return getattr(import_module(f"{self.package}.{module}"), name)
        except ModuleNotFoundError as error:
            if not (missing := describe_missing_module(error.name or "")):
                raise
            from braindecode_vis.base.checks import ConfigError  # which loads numpy

            raise ConfigError(f"{missing}.") from error


def find_parts() -> tuple[Part, ...]:
    """Return the installed parts: those of this package by name, then those of other packages."""
    return _look_for_parts()[0]


def list_broken_parts() -> tuple[str, ...]:
    """Return a sentence for each part of another package that cannot be used."""
    return _look_for_parts()[1]


@cache
def _look_for_parts() -> tuple[tuple[Part, ...], tuple[str, ...]]:
    spec = util.find_spec(GROUP)
    folders = [] if spec is None else spec.submodule_search_locations or []
    names = sorted(path.parent.name for folder in folders for path in Path(folder).glob("*/register.py"))
    parts: list[Part] = [import_module(f"{GROUP}.{name}.register").PART for name in names]
    broken: list[str] = []
    for entry in _find_entries():
        if is_beside_the_caller(entry):
            continue
        try:
            part = entry.load()
        except (Exception, SystemExit) as error:  # code of others: a module may also call sys.exit
            broken.append(
                f"the part {entry.name} ({entry.value}) fails at import with {type(error).__name__}: {error}"
            )
            continue
        clash = "" if not isinstance(part, Part) else _find_clash(part, parts)
        if not isinstance(part, Part):
            broken.append(f"the part {entry.name} ({entry.value}) is no braindecode_vis.base.parts.Part")
        elif clash:
            broken.append(
                f"the part {entry.name} ({entry.value}) provides {clash}, which another part provides already"
            )
        else:
            parts.append(replace(part, distribution=entry.dist))
    return tuple(parts), tuple(broken)


def _find_entries() -> Iterator[metadata.EntryPoint]:
    """Yield the entry points of parts; without any, nothing is imported, since every command would wait for it."""
    lists = (path for folder in sys.path for path in Path(folder).glob("*-info/entry_points.txt"))
    if any(_names_parts(path) for path in lists):
        from importlib import metadata

        yield from metadata.entry_points(group=GROUP)


def _names_parts(path: Path) -> bool:
    try:
        return f"[{GROUP}]".encode() in path.read_bytes()
    except OSError:  # `metadata` passes over what it may not read, too
        return False


def _find_clash(part: Part, parts: list[Part]) -> str:
    """Return the name of the part, or the first verb or ability, that other parts have too; empty if there is none."""
    taken = {part.name for part in parts} | {n for other in parts for n in (*other.verbs, *other.abilities)}
    return next((name for name in (part.name, *part.verbs, *part.abilities) if name in taken), "")


class _Installed(Protocol):
    """An entry point, or an object with the same attributes."""

    @property
    def dist(self) -> metadata.Distribution | None: ...


def is_beside_the_caller(entry: _Installed) -> bool:
    """Say whether the metadata of a package are in the current folder, which may be on Python's path.

    Otherwise such metadata in a downloaded folder would be enough to import its code.
    """
    distribution = entry.dist
    return distribution is not None and Path(str(distribution.locate_file(""))).resolve() == Path.cwd()


def ask_part(ability: str) -> Any:
    """Return what a part provides under a name.

    Parameters
    ----------
    ability
        A key of `Part.abilities` of any part.

    Raises
    ------
    ConfigError
        If no installed part provides it.
    """
    from braindecode_vis.base.checks import ConfigError  # which loads numpy

    part = next((part for part in find_parts() if ability in part.abilities), None)
    if part is None:
        raise ConfigError(f"{describe_missing(ability) or f'no part provides {ability}'}.")
    return part.load(part.abilities[ability])


def describe_missing(name: str) -> str:
    """Return the clause that names the missing part of this package that provides a verb, kind or ability.

    Parameters
    ----------
    name
        Name of the verb, kind or ability.

    Returns
    -------
    clause
        Without a full stop; empty if no missing part provides it.
    """
    there = {part.name for part in find_parts() if part.distribution is None}
    for part, names in SHIPPED.items():
        if part not in there and name in names.split():
            return f"{name!r} belongs to {GROUP}.{part}, which is not installed; reinstall braindecode_vis to get it"
    return ""


def describe_missing_module(module: str) -> str:
    """Return the clause for a needed module of a missing part; empty for any other module."""
    part = module.removeprefix(f"{GROUP}.").partition(".")[0]
    if (
        not module.startswith(f"{GROUP}.")
        or part not in SHIPPED
        or part in {each.name for each in find_parts()}
    ):
        return ""
    return f"this needs {GROUP}.{part}, which is not installed; reinstall braindecode_vis to get it"
