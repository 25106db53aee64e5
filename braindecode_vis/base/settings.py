"""The frozen base class of all settings, and the messages for mistakes in a configuration.

Each component declares its own ``XConfig(Settings)`` with ``kind: Literal["x"] = "x"`` and ``build()``; `registry`
finds it by its kind. Code from outside the package enters the fingerprint.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from braindecode_vis.base.checks import ConfigError, Notice, suggest
from braindecode_vis.base.remote import is_address, name_address, take_address


@dataclass(frozen=True)
class OutsideCode:
    """Where a component from outside the package comes from.

    Parameters
    ----------
    role, kind
        Role and kind of the component.
    name
        Name that the user gave: the name of its entry point, or ``package.module:Class``.
    reference
        ``package.module:Class``.
    package, version
        The installed distribution; None for a plain file on the path.
    sha256
        Digest of its code.
    """

    role: str
    kind: str
    name: str
    reference: str
    package: str | None
    version: str | None
    sha256: str

    def describe(self) -> str:
        """Return one phrase, for example ``the encoder 'mine' of my_package 1.0``."""
        package = " ".join(part for part in (self.package, self.version) if part)
        return f"the {self.role} {self.kind!r} of {package or self.reference}"

    def as_fields(self) -> dict[str, Any]:
        """Return the fields that enter the fingerprint and from which the class is found again."""
        return {
            "class": self.reference,
            "package": self.package,
            "version": self.version,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class NeededWeights:
    """Files of a trained network that settings load.

    Parameters
    ----------
    what
        The network and its files, in words.
    settings
        Settings that name a file or folder of the user's, below the settings that load it; `explain.list_weights` gives
        their full keys.
    path
        Where the files are on this machine; None if they are not.
    name
        Name by which ``weights fetch`` knows them; empty if it does not.
    files
        Names of the files.
    size
        Bytes; None if it is not known.
    licence
        Terms; empty if they are not known.
    place
        Where they are published, in words; empty if they are not.
    named
        Whether a setting names them, so that no other copy is looked for.
    automatic
        Whether a fetched copy is found without a setting that names it.
    convert
        Whether the fetched file has to be converted first.
    leaves_out
        The results that a run leaves out without them; empty if the run needs them.
    """

    what: str
    settings: tuple[str, ...]
    path: Path | None = None
    name: str = ""
    files: tuple[str, ...] = ()
    size: int | None = None
    licence: str = ""
    place: str = ""
    named: bool = False
    automatic: bool = True
    convert: bool = False
    leaves_out: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether a run needs them, no setting names them, and they are not here."""
        return self.path is None and not self.leaves_out and not self.named


#: Where something runs.
Device = Literal["auto", "cpu", "cuda"]

_LARGEST_INT = 2**63
_LARGEST_FLOAT = 3.0e38

#: The settings classes from outside that this process has loaded; `registry` fills it.
OUTSIDE: dict[type[BaseModel], OutsideCode] = {}


class Settings(BaseModel):
    """Frozen pydantic model: unknown keys are errors, values are never mutated after validation.

    A subclass names in `not_hashed` the fields that say *how* a component runs (device, batch size, file
    paths) and cannot change *what* it computes; they are not part of the fingerprint. `hashed_if_set` names fields that
    were added later: their default must compute the same as before, and with it they are not part of the fingerprint
    either, so that earlier runs are still found. `fixed_settings` names class variables that were settings in an
    earlier version, and `removed_settings` other former settings, each with its fixed value: a file with this value is
    read, a file with another value is refused, and the fingerprint holds the value as before. A setting that is in
    `not_hashed` too is read with any value, and a notice says that it has no effect.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,
    )

    not_hashed: ClassVar[frozenset[str]] = frozenset()
    hashed_if_set: ClassVar[frozenset[str]] = frozenset()
    fixed_settings: ClassVar[frozenset[str]] = frozenset()
    removed_settings: ClassVar[Mapping[str, Any]] = {}
    #: Import names of packages that this component needs and the core does not: keys of `checks.EXTRAS`.
    packages: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """List the fields of a class before those that it inherits, so that `kind` comes first."""
        super().__pydantic_init_subclass__(**options)
        names = [name for one in cls.__mro__ for name in vars(one).get("__annotations__", ())]
        fields = dict(cls.model_fields)
        cls.model_fields.clear()
        cls.model_fields.update(
            {name: fields[name] for name in dict.fromkeys((*names, *fields)) if name in fields}
        )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, content: Any) -> Any:
        # pydantic refuses them too, but does not say which are known
        if isinstance(content, Mapping):
            content = cls._drop_removed(content)
            for key in content:
                if key not in cls.model_fields:
                    context = {"key": str(key), "known": list(cls.model_fields)}
                    raise PydanticCustomError(
                        "unknown_key", "unknown key {key}; known here are {known}", context
                    )
        return content

    @classmethod
    def list_removed(cls) -> dict[str, Any]:
        """Return the removed settings of earlier versions of this class, each with its fixed value."""
        found: dict[str, Any] = {}
        for one in reversed(cls.__mro__):
            found |= vars(one).get("removed_settings", {})
            found |= {name: getattr(cls, name) for name in sorted(vars(one).get("fixed_settings", ()))}
        return {name: _plain(value) for name, value in found.items() if name not in cls.model_fields}

    @classmethod
    def _drop_removed(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the given values without removed settings; refuse a removed setting with another value."""
        removed = cls.list_removed()
        if not (named := removed.keys() & content.keys()):
            return content
        for name in named:
            if _plain(content[name]) == removed[name]:
                continue
            if name not in cls.not_hashed:
                context = {"key": name, "given": repr(content[name]), "value": repr(removed[name])}
                raise PydanticCustomError(
                    "removed_key", "{key} was removed: it is always {value}, not {given}", context
                )
            # It said how, not what, so that runs that had it are still read.
            warnings.warn(f"{name} was removed and has no effect: leave it out.", Notice, stacklevel=2)
        return {name: value for name, value in content.items() if name not in named}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_strange_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse values that pydantic accepts as numbers but no computation can use, also inside lists."""
        if info.field_name is None:
            return value
        annotation: Any = cls.model_fields[info.field_name].annotation
        names = _list_types(annotation)
        for entry in _list_entries(value) if names & {int, float} else ():
            # true would be 1 and false 0, where somebody wrote a word into the wrong line
            if isinstance(entry, bool) and bool not in names:
                raise PydanticCustomError("flag", "Input should be a number, not true or false")
            _check_size(entry)
        return value

    @field_validator("*")
    @classmethod
    def _refuse_large_numbers(cls, value: Any) -> Any:
        """Refuse them also if they were written as text, as YAML reads 1e308."""
        for entry in _list_entries(value):
            _check_size(entry)
        return value

    def refuse_unused(self, *names: str, because: str) -> None:
        """Raise `ValueError` if one of these unused settings does not have its default value.

        A default value is accepted, since a complete configuration file has all settings.
        """
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value!r}, but it has no effect: {because}; leave {name} out")

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` if a file that these settings need is missing, unless it may be
        downloaded. Paths in fields are checked in any case.
        """

    def list_weights(self) -> list[NeededWeights]:
        """Return the trained networks that these settings load, without those of nested settings; by default none.

        Loading finds its files in the same way, so that the list cannot differ from what a run loads.
        """
        return []

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain values that enter the fingerprint, with nested settings."""
        unhashed = self.not_hashed | self.hashed_if_set
        fields = {name: value for name, value in self.list_removed().items() if name not in unhashed}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in self.not_hashed:
                continue
            if name in self.hashed_if_set and value == type(self).model_fields[name].default:
                continue
            fields[name] = _plain(value)
        code = OUTSIDE.get(type(self))
        return fields if code is None else {**fields, "outside": code.as_fields()}

    def walk(self, key: str = "") -> Iterator[tuple[str, Settings]]:
        """Yield these settings and all nested ones, with their full keys."""
        yield key, self
        for name in type(self).model_fields:
            value, inner = getattr(self, name), f"{key}.{name}".lstrip(".")
            if isinstance(value, Settings):
                yield from value.walk(inner)
            elif isinstance(value, list | tuple):
                for place, entry in enumerate(value):
                    if isinstance(entry, Settings):
                        yield from entry.walk(f"{inner}.{place}")

    def replace_paths(self, replace: Callable[[Path], Path]) -> Self:
        """Return the settings with a function applied to each path, also in nested settings and lists."""

        def visit(value: Any) -> Any:
            if isinstance(value, Settings):
                return value.replace_paths(replace)
            if isinstance(value, list | tuple):
                visited = [visit(entry) for entry in value]
                return value if all(map(operator.is_, visited, value)) else type(value)(visited)
            return replace(value) if isinstance(value, Path) else value

        visited = {name: visit(getattr(self, name)) for name in type(self).model_fields}
        # Unchanged fields stay out: an update marks its fields as set, and defaults must stay apart from what was said.
        changed = {name: value for name, value in visited.items() if value is not getattr(self, name)}
        if not changed:
            return self
        moved = self.model_copy(update=changed)
        for name in changed:
            # What was noted by itself is of a file at the former path, if there was one.
            for key in {f"{name}_digest", f"{name}_digests"} & type(self).model_fields.keys():
                if key not in self.model_fields_set:
                    moved.__dict__[key] = type(self).model_fields[key].default
        try:
            moved.remember_files()
        except ValueError as error:
            raise ConfigError(f"{error}.") from error
        return moved

    def remember_files(self) -> None:
        """Record the digests of files, so that fitted results remain identified without the files; by default none.

        Raises
        ------
        ValueError
            If a file does not have the recorded digest.
        """

    def take_addresses(self, named: Collection[str] | None = None) -> Self:
        """Return the settings with readable addresses in place of paths that only hold their text.

        Parameters
        ----------
        named
            Addresses that the user gave in this call, as `remote.name_address` writes them; by default all addresses in
            the settings.
        """

        def take(path: Path) -> Path:
            asked = is_address(path) and (named is None or name_address(path) in named)
            return take_address(path) if asked else path

        return self.replace_paths(take)

    def find_outside(self) -> dict[str, OutsideCode]:
        """Return where each component from outside comes from, by the full key of its settings."""
        return {key: OUTSIDE[type(entry)] for key, entry in self.walk() if type(entry) in OUTSIDE}


class DeviceSettings(Settings):
    """Settings of what can run on a processor or on a GPU.

    Parameters
    ----------
    device
        Device of the computation; ``auto`` takes a GPU if there is one.
    """

    device: Device = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})


def _check_size(entry: Any) -> None:
    # the indices of NumPy and torch have 64 bits, their weights 32
    if type(entry) is int and abs(entry) >= _LARGEST_INT:
        raise PydanticCustomError("too_large", "Input should be below 2^63")
    if type(entry) is float and _LARGEST_FLOAT < abs(entry) < math.inf:
        raise PydanticCustomError("too_large", "Input should be a number of single precision (below 3e38)")


def _list_entries(value: Any) -> Iterator[Any]:
    """Yield a value, or the entries of lists and mappings at any depth."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for entry in value:
        yield from _list_entries(entry)


@lru_cache(maxsize=None, typed=True)  # true and 1 are equal
def _list_types(annotation: Any) -> frozenset[Any]:
    """Return the types that an annotation names, at any depth; a literal true or false counts as bool."""
    if isinstance(annotation, bool):
        return frozenset({bool})
    if not (arguments := get_args(annotation)):
        return frozenset({annotation}) if isinstance(annotation, type) else frozenset()
    return frozenset[Any]().union(*(_list_types(entry) for entry in arguments if _is_hashable(entry)))


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.hashed_fields()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


#: What pydantic calls a member of a union that is no model, for example ``constrained-int`` or ``literal['auto']``.
_TYPE = re.compile(r"(constrained-\w+|int|float|str|bool|path|none|.*\[.*)", re.DOTALL)
#: Errors that say what is known, before those that may only follow from them.
_FIRST = ("unknown_key", "removed_key", "unknown_kind", "outside")
_YES_NO, _LIST = "input should be true or false", "input should be a list such as [1, 2]"
#: Sentences of types that pydantic names as Python does.
_PLAIN = {"bool_parsing": _YES_NO, "bool_type": _YES_NO, "tuple_type": _LIST, "list_type": _LIST}


def describe_unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the clause for an unknown key, given by its full path."""
    return f"unknown key {key}; known here are {', '.join(known)}{suggest(key.rpartition('.')[2], known)}"


def describe_removed_key(key: str, value: str, given: str) -> str:
    """Return the clause for a removed setting whose value in a file differs from its fixed value."""
    return f"{key} was removed: its value is always {value} now, and {given} is refused; leave {key} out"


def describe_unknown_kind(kind: str, key: str, known: Sequence[str]) -> str:
    """Return the clause for an unknown kind; `key` is the key of the component."""
    return f"unknown kind {kind!r} in {key}.kind; known are {', '.join(known)}{suggest(kind, known)}"


def describe_validation_error(error: ValidationError, key: str = "") -> str:
    """Return the clause that names the key by its full path, the given value and the known values.

    Parameters
    ----------
    error
        Error of pydantic; its first mistake is reported.
    key
        Key of the validated settings; by default the whole configuration.
    """
    details: list[Any] = error.errors(include_url=False)
    first = next((d for d in details if d["type"] in _FIRST), details[0])
    # the types of union members stand in the location too, which the user never wrote
    location = [key] if key else []
    location += [str(part) for part in first["loc"] if not _TYPE.fullmatch(str(part))]
    path = ".".join(location) or "the configuration"
    context = first.get("ctx", {})
    if first["type"] == "unknown_key":
        return describe_unknown_key(".".join([*location, context["key"]]), context["known"])
    if first["type"] == "removed_key":
        return describe_removed_key(".".join([*location, context["key"]]), context["value"], context["given"])
    if first["type"] == "unknown_kind":
        return describe_unknown_kind(context["given"], path, context["known"])
    if first["type"] == "outside":
        return f"{path}.kind: {context['sentence']}"
    if first["type"] == "literal_error" and location[-1] == "kind":
        return (
            f"unknown kind {first['input']!r} in {path}; known are {context['expected'].replace(chr(39), '')}"
        )
    if first["type"] == "no_kind":
        return f"{path} needs a kind"
    if first["type"] == "missing":
        return f"{path} is missing"
    if first["type"] == "value_error":
        return str(context["error"]) if len(location) == 0 else f"{path}: {context['error']}"
    expected = _PLAIN.get(first["type"], first["msg"][0].lower() + first["msg"][1:])
    return f"{path} is {first['input']!r}, but {expected}"
