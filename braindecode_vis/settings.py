"""The frozen base of every configuration model.

Each component file declares its own ``XConfig(Settings)`` with ``kind: Literal["x"]`` and ``build()``; the
unions over them live in `braindecode_vis.config`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen pydantic model: unknown keys are errors, values are never mutated after validation.

    A subclass names in `not_hashed` the fields that say *how* a component runs (device, batch size, file
    paths) and cannot change *what* it computes; they stay out of the fingerprint.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    not_hashed: ClassVar[frozenset[str]] = frozenset()

    def refuse_unused(self, *names: str, because: str) -> None:
        """Raise `ValueError` if one of these settings is not its default, though nothing looks at it.

        A default is let pass: a configuration that was written out has all of them.
        """
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value!r}, which nothing looks at: {because}; leave {name} out")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain values that enter the fingerprint, nested settings included."""
        fields: dict[str, Any] = {}
        for name in type(self).model_fields:
            if name in self.not_hashed:
                continue
            fields[name] = _plain(getattr(self, name))
        return fields


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.hashed_fields()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
