"""Reads the comment lines at the top of a configuration: what it is, and how it compares with its paper.

Defines the form of these lines. A configuration that follows a paper names it (``Source:``), the published number with
its protocol (``As published:``), which settings are those of the paper (``Same as published:``) and which are not
(``Departs:``), so that numbers from different protocols are not compared. Any other configuration only says what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from braindecode_vis.base.checks import ConfigError

#: Label of each part, in the order in which they must stand, and whether it is a list.
_PARTS = {
    "Source": ("source", False),
    "As published": ("as_published", False),
    "Same as published": ("same", True),
    "Departs": ("departs", True),
}


@dataclass(frozen=True)
class ConfigHeader:
    """The header of a configuration.

    Parameters
    ----------
    about
        What it is.
    source
        Paper and code that it follows; empty if it follows none.
    as_published
        The published number with its protocol, or that there is none.
    same
        Settings that are as published, each as ``setting: value, source``.
    departs
        What differs from the publication and why, or ``nothing known``.
    """

    about: str
    source: str = ""
    as_published: str = ""
    same: tuple[str, ...] = ()
    departs: tuple[str, ...] = ()

    def list_parts(self) -> list[tuple[str, str]]:
        """Return pairs of a part's name and its text, one pair for each entry of a list; empty parts are left out."""
        parts = [("about", self.about), ("source", self.source), ("as published", self.as_published)]
        parts += [("same as published", text) for text in self.same]
        parts += [("departs", text) for text in self.departs]
        return [(part, text) for part, text in parts if text]


def read_header(path: Path) -> ConfigHeader:
    """Return what the comment lines on top of a configuration say.

    Parameters
    ----------
    path
        The YAML file.

    Raises
    ------
    ConfigError
        If it names a source, but the other parts are missing, empty or in another order.

    Examples
    --------
    >>> from braindecode_vis.config import find_config
    >>> read_header(find_config("nsd_ridge")).source
    ''
    """
    texts: dict[str, str] = {"about": ""}
    lists: dict[str, list[str]] = {}
    part = "about"
    for line in _read_comment(path):
        label, colon, rest = line.partition(":")
        if colon and label in _PARTS:
            part, is_list = _PARTS[label]
            if part in (*texts, *lists):
                raise ConfigError(f"the header of {path} names {label!r} twice; write it once.")
            if is_list:
                lists[part] = []
            else:
                texts[part] = rest.strip()
        # Texts run on over several lines of the comment.
        elif part not in lists:
            texts[part] = f"{texts[part]} {line.strip()}".strip()
        elif line.strip().startswith("- "):
            lists[part].append(line.strip()[2:].strip())
        elif lists[part]:
            lists[part][-1] += f" {line.strip()}"
        else:
            raise ConfigError(
                f"the header of {path} has {line.strip()!r} where an entry '- ...' is expected."
            )
    found = [name for name in (*texts, *lists) if name != "about"]
    wanted = [name for name, _ in _PARTS.values()]
    empty = [label for label, (name, _) in _PARTS.items() if not (texts.get(name) or lists.get(name))]
    if found and (empty or sorted(found) != sorted(wanted)):
        raise ConfigError(
            f"the header of {path} says nothing under {', '.join(empty)}; a configuration that follows a paper has "
            f"the parts {', '.join(_PARTS)}."
        )
    return ConfigHeader(**texts, same=tuple(lists.get("same", ())), departs=tuple(lists.get("departs", ())))


def _read_comment(path: Path) -> list[str]:
    """Return the lines of the comment that a file starts with, without their marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        # Comments further down belong to single settings.
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return lines
