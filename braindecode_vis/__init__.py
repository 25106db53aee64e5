"""Decode seen images from EEG, MEG and fMRI.

    recordings -> responses -> (brain encoder) -> predicted embeddings -> retrieval
                                                   |-> prior -> generator -> images -> metrics -> report
    stimuli    -> (image encoder) -> target embeddings ----^

========== =========== ============================ ================================
stage      array       dims                         unit
========== =========== ============================ ================================
preprocess Responses   trial, channel, time (M/EEG) volt or tesla, then z
preprocess Responses   trial, voxel (fMRI)          percent signal change, then z
embed      Embeddings  stimulus, [token,] feature   raw norm kept
train      Embeddings  trial, [token,] feature      same space
retrieve   similarity  query, gallery               cosine
reconstruct images     query, height, width, rgb    uint8
evaluate   Score rows  metric x method              per metric
========== =========== ============================ ================================

Importing the package imports nothing heavy: the public names below are loaded when they are first used. These names
are stable; the code behind them may change.

>>> import braindecode_vis as bdv
>>> data = bdv.load("synthetic_digits")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

#: Where a name comes from that a part brings.
_PART = "part"
#: Public name -> module below the package.
_PUBLIC = {
    "BraindecodeVisError": "base.checks",
    "ConfigError": "base.checks",
    "Data": "api.own",
    "DataError": "base.checks",
    "Decoder": "api.decoder",
    "DecodingRun": "api.decoding_run",
    "Embeddings": "base.arrays",
    "LeakWarning": "base.checks",
    "Responses": "base.arrays",
    "Score": "base.arrays",
    "StimulusSet": "base.stimuli",
    "decode": "api.decoding_run",
    "describe": "api.known",
    "from_arrays": "api.own",
    "from_epochs": "api.own",
    "from_nifti": "api.own",
    "list_configs": "api.known",
    "load": "api.own",
    "open_run": "api.decoding_run",
    "plot_gallery": "api.plotting",
    "plot_ranks": "api.plotting",
    "plot_scores": "api.plotting",
    "score": _PART,
}

__all__ = [
    "BraindecodeVisError",
    "ConfigError",
    "Data",
    "DataError",
    "Decoder",
    "DecodingRun",
    "Embeddings",
    "LeakWarning",
    "Responses",
    "Score",
    "StimulusSet",
    "__version__",
    "decode",
    "describe",
    "from_arrays",
    "from_epochs",
    "from_nifti",
    "list_configs",
    "load",
    "open_run",
    "plot_gallery",
    "plot_ranks",
    "plot_scores",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'braindecode_vis' has no attribute {name!r}")
    if _PUBLIC[name] == _PART:
        from braindecode_vis.base.parts import ask_part

        value = ask_part(name)
    else:
        value = getattr(importlib.import_module(f"braindecode_vis.{_PUBLIC[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# Not an import statement: whoever imports the package would import the api by it.
importlib.import_module("braindecode_vis.api.moved").find_old_paths()
