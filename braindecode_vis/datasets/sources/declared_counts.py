"""Counts that a data set declares, against those found: equal, or the data are simulated and may be smaller.

Owns the sentence of one comparison. A phantom written in the files of a data set has the folder ``phantom_truth``
beside it; its sizes are a choice of whoever made it, so they are told and not judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braindecode_vis.datasets.manifests import Finding

_TRUTH = "phantom_truth"


def is_simulated(root: Path) -> bool:
    """Return whether a phantom's truth lies beside the data."""
    return (root.expanduser() / _TRUTH).is_dir()


def compare_fact(item: str, found: Any, declared: Any, root: Path | None, *, what: str = "") -> Finding:
    """Return the finding on one declared fact.

    Parameters
    ----------
    item
        Name of the line.
    found, declared
        What was counted, and what the manifest says.
    root
        Folder of the data set; None for what cannot be simulated.
    what
        Unit of both, for example ``trials``.
    """
    unit = f" {what}" if what else ""
    if found == declared:
        return Finding(item, True, f"{found}{unit} as declared")
    if root is not None and is_simulated(root):
        return Finding(item, True, f"{found}{unit}; simulated (the real data set has {declared})")
    return Finding(item, False, f"{found}{unit}, declared {declared}")
