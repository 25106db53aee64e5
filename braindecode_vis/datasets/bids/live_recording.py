"""Sessions recorded during live decoding, read like the data set of the run that decoded them.

Owns the test for such a recording and its settings: those of the run, with the channels and columns of the recording.
The fitted parts of the run are applied elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.datasets.bids.fmri_dataset import BidsFmriConfig, BoldSettings
from braindecode_vis.datasets.bids.meeg_dataset import BidsMeegConfig
from braindecode_vis.datasets.sources.bold_source import ConfoundsConfig
from braindecode_vis.datasets.sources.meeg_source import MeegSettings

#: Name of the writer in ``dataset_description.json``.
GENERATED_BY = "braindecode_vis live"
#: What may be chosen of such a recording.
_CHOICES = ("subjects", "sessions", "runs", "task", "images")


def is_live_recording(root: Path) -> bool:
    """Whether a folder is a data set of sessions that were recorded live."""
    try:
        described = json.loads((root / "dataset_description.json").read_text())
        return any(entry.get("Name") == GENERATED_BY for entry in described.get("GeneratedBy", []))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def make_live_dataset(
    dataset: Any, root: Path, coords: Mapping[str, Any], choices: Mapping[str, Any] | None = None
) -> BidsMeegConfig | BidsFmriConfig:
    """Return the settings that cut trials from a live recording in the same way as in the run's own data set.

    Parameters
    ----------
    dataset
        Settings of the run's data set.
    root
        The recording.
    coords
        Coordinates of the run's responses: modality, channels and rate.
    choices
        `subjects`, `sessions`, `runs`, `task` or `images`.

    Raises
    ------
    ConfigError
        If something else is chosen, or the run did not cut trials itself.
    """
    chosen = dict(choices or {})
    if other := [key for key in chosen if key not in _CHOICES]:
        raise ConfigError(
            f"dataset.{other[0]} cannot be set for a live recording, which is read as the run read its own; only "
            f"{', '.join(_CHOICES)} can."
        )
    if coords.get("modality") == "fmri":
        own = {name: getattr(dataset, name) for name in BoldSettings.model_fields if hasattr(dataset, name)}
        own |= {"derivatives": None, "space": None, "skip": (), "t_r": None, "images": None, "subjects": None}
        # The voxels are those of the run; confounds were not recorded.
        own |= {"raw": True, "mask": "varying", "confounds": ConfoundsConfig(), "sessions": None}
        return BidsFmriConfig(**{**own, "root": root, **chosen})
    if not isinstance(dataset, MeegSettings):
        raise ConfigError(
            f"the run decodes {dataset.kind}, which cuts no trials from recordings, so that {root} cannot be cut like "
            "its own; give trials as arrays instead."
        )
    own = {name: getattr(dataset, name) for name in MeegSettings.model_fields}
    # The statistics of the run are used, so no split is needed.
    own |= {"mvnn": "none", "mvnn_channels": "stored", "scaling": None, "images": None}
    # Epochs across a gap were lost during the session too, and reported there.
    own |= {"max_dropped": 0.99}
    own |= {"sfreq": float(coords["sfreq"]), "picks": tuple(map(str, coords["ch_names"]))}
    return BidsMeegConfig(**{**own, "root": root, **chosen})
