"""The stages of a run, one function each, in order.

    preprocess -> embed -> [pretrain ->] train -> retrieve -> reconstruct -> evaluate -> report

Owns the order of the stages, what each of them reads and writes in the run folder, and which settings enter its
fingerprint. Each function asks for what it needs from the stage before, which is reused when nothing it depends on
changed. Knows components by their roles (`braindecode_vis.base.roles`), never by their kinds.

`preparing` comes before a fit; `learning` fits on training trials alone; `decoding`, `categories` and `scoring` read
test trials; `reporting` shows. A stage is imported when it is asked for, so that preprocessing loads no metric.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braindecode_vis.pipeline.decoding import reconstruct, retrieve
    from braindecode_vis.pipeline.ending import finish_run
    from braindecode_vis.pipeline.hints import list_hints
    from braindecode_vis.pipeline.learning import train
    from braindecode_vis.pipeline.preparing import embed, preprocess, pretrain
    from braindecode_vis.pipeline.reporting import check_leaks, report, run_all
    from braindecode_vis.pipeline.scoring import evaluate
    from braindecode_vis.pipeline.together import fit_share, reconstruct_share, train_together

STAGES = ("preprocess", "embed", "train", "retrieve", "reconstruct", "evaluate", "report")

_MODULES = {
    "preprocess": "preparing", "embed": "preparing", "pretrain": "preparing", "train": "learning",
    "train_together": "together", "reconstruct_share": "together", "fit_share": "together",
    "retrieve": "decoding", "reconstruct": "decoding", "evaluate": "scoring", "report": "reporting",
    "check_leaks": "reporting", "finish_run": "ending", "list_hints": "hints", "run_all": "reporting",
}  # fmt: skip

__all__ = [
    "STAGES",
    "check_leaks",
    "embed",
    "evaluate",
    "finish_run",
    "fit_share",
    "list_hints",
    "preprocess",
    "pretrain",
    "reconstruct",
    "reconstruct_share",
    "report",
    "retrieve",
    "run_all",
    "train",
    "train_together",
]


def __getattr__(name: str) -> Any:
    """Import the module of a stage when the stage is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
