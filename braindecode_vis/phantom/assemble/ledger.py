"""What is finished in the folder of a phantom, so that an interrupted call goes on where it stopped.

Owns ``phantom_truth/finished.json``: the request that the folder belongs to, and the files of each finished unit with
their sizes. A folder belongs to one request; another one is refused.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braindecode_vis.checks import ConfigError
from braindecode_vis.store import compute_fingerprint, json_plain, read_json, write_json

TRUTH = "phantom_truth"
VERSION = 1
"""Raised when the same request gives other files than before."""


class Ledger:
    """The list of finished units of one folder.

    Parameters
    ----------
    root
        Folder of the data set; made if it is missing.
    request
        Format, size and configuration, as plain values.

    Raises
    ------
    ConfigError
        If the folder holds another phantom, or files that are no phantom.
    """

    def __init__(self, root: Path, request: Mapping[str, Any]) -> None:
        self.root, self.path = root, root / TRUTH / "finished.json"
        self.request = json_plain(request)
        self.fingerprint = compute_fingerprint("phantom", VERSION, self.request, {})
        self.units: dict[str, dict[str, int]] = {}
        if any(parent.exists() and not parent.is_dir() for parent in root.absolute().parents):
            raise ConfigError(f"{root} lies below a file, not a folder; choose another folder.")
        if self.path.is_file():
            kept = read_json(self.path)
            if kept["fingerprint"] != self.fingerprint:
                changed = (
                    "; ".join(_compare(kept["request"], self.request)) or "the code of the simulation changed"
                )
                raise ConfigError(
                    f"{root} holds another phantom ({changed}); choose another folder, or delete this one first."
                )
            self.units = kept["units"]
        elif root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ConfigError(f"{root} is not empty and holds no phantom; choose a new or an empty folder.")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()

    def is_finished(self, unit: str) -> bool:
        """Say whether every file of a unit is there, with the size that it was given."""
        files = self.units.get(unit)
        return files is not None and all(
            (self.root / name).is_file() and (self.root / name).stat().st_size == n_bytes
            for name, n_bytes in files.items()
        )

    def record(self, unit: str, paths: Sequence[Path]) -> None:
        """Note that a unit is finished."""
        self.units[unit] = {
            path.relative_to(self.root).as_posix(): path.stat().st_size for path in sorted(paths)
        }
        self._write()

    def clear_leftovers(self) -> None:
        """Delete what killed processes had begun, which nobody will finish; what lives is left alone."""
        for path in list(self.root.rglob(".tmp-*")):
            owner = re.match(r"\.tmp-(\d+)-", path.name)
            if owner is None or _is_alive(int(owner[1])):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(self.path, {"fingerprint": self.fingerprint, "request": self.request, "units": self.units})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # this process has begun nothing yet: an earlier one had its number


def _compare(old: Any, new: Any, name: str = "") -> list[str]:
    """Return what differs between two plain values, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_compare(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in {**old, **new}]
        return [entry for part in parts for entry in part]
    return [] if old == new else [f"{name} is {old} there, not {new}"]
