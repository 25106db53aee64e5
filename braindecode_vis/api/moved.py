"""Module paths of version 0.2, which work for one more version: an old path gives a warning and the present module.

Nothing is imported until an old path is used. The module is the same object under both names, so that its classes are
the same too, also those that a pickle of a waiting job names.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

PACKAGE = "braindecode_vis"
#: Old path -> the path of today, below the package; what lies below an old path lies below the new one.
MOVED = {
    **{
        name: f"base.{name}"
        for name in (
            "arrays", "checks", "consent", "contracts", "devices", "digests", "memory", "registry",
            "remote", "roles", "seeds", "settings", "stimuli", "store",
        )
    },
    **{name: f"parts.{name}" for name in ("audit", "cluster", "live", "phantom", "studies")},
    **{f"audit.{name}": f"pipeline.leaks.{name}"
       for name in ("findings", "quick", "records", "split_overlap")},
    **{f"corpus.{name}": f"datasets.corpus.{name}"
       for name in ("corpus_config", "manifest", "reader", "recordings")},
    **{f"encoders.{name}": f"parts.foundation.models.{name}" for name in (
        "bendr", "brain_jepa", "brainlm", "cbramod", "cortex_mae", "eegpt", "foundation", "foundation_config",
        "foundation_fmri", "foundation_fmri_config", "labram", "luna", "neurostorm", "reve",
    )},
    "analysis": "parts.analyses",
    "analysis.drawing": "report.drawing",
    "analysis.sensor_groups": "report.sensor_groups",
    "audit.files": "pipeline.leaks.run_files",
    "cli.export": "cli.predict",
    "corpus": "parts.foundation.corpus",
    "corpus.build": "parts.foundation.corpus.growing",
    "embeddings.attributes": "embeddings.attribute_table",
    "embeddings.captions": "embeddings.caption_bank",
    "embeddings.descriptions": "embeddings.image_descriptions",
    "embeddings.sentences": "embeddings.sentence_encoder",
    "encoders.eegnet_config": "encoders.atm_config",
    "encoders.tsconv": "encoders.atm",
    "encoders.tsconv_config": "encoders.atm_config",
    "folder_lock": "base.locks",
    "generators": "generation",
    "generators.conditioning": "generation.latent_diffusion_networks",
    "generators.controls": "generation.inversion",
    "image_rows": "base.stimuli",
    "leases": "base.locks",
    "live.reconstructing": "parts.live.judge",
    "metrics": "scoring.metrics",
    "metrics.calibration": "scoring.metrics.query_calibration",
    "metrics.captions": "scoring.metrics.caption_metrics",
    "metrics.lpips": "scoring.metrics.feature_networks",
    "metrics.score_row": "scoring.score_row",
    "metrics.uncertainty": "scoring.uncertainty",
    "optimisation": "training.optimisation",
    "pipeline.prediction_scores": "pipeline.prediction_files",
    "phantom.recordings": "parts.phantom.meeg_signal",
    "phantom.stimuli": "datasets.drawn",
    "phantom.stimuli.composition": "datasets.drawn.scene_pairs",
    "priors": "generation.priors",
    "report.decoded_figure": "report.figures",
    "retrieval": "scoring.retrieval",
    "scores": "scoring",
    "studies.analyze": "parts.analyses.analyze",
    "studies.embed_images": "pipeline.embed_images",
    "studies.encode": "parts.analyses.encode",
}  # fmt: skip


def find_new_path(name: str) -> str | None:
    """Return today's path of a module that has moved, None for any other.

    Examples
    --------
    >>> find_new_path("braindecode_vis.metrics.image")
    'braindecode_vis.scoring.metrics.image'
    >>> find_new_path("braindecode_vis.base.arrays") is None
    True
    """
    package, _, inner = name.partition(".")
    words = inner.split(".")
    if package != PACKAGE:
        return None
    for n in range(len(words), 0, -1):
        if (new := MOVED.get(".".join(words[:n]))) is not None:
            return ".".join([PACKAGE, new, *words[n:]])
    return None


class MovedFinder:
    """Finds old paths. It comes before the other finders, which would load a file a second time below an old
    package.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a specification for an old path alone."""
        if not name.startswith(f"{PACKAGE}.") or find_new_path(name) is None:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make the empty module that `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of the empty one."""
        import warnings

        old = module.__name__
        new = str(find_new_path(old))
        warnings.warn(
            f"{old} is now {new}; the next version removes the old path.", DeprecationWarning, stacklevel=2
        )
        sys.modules[old] = importlib.import_module(new)


_FINDER = MovedFinder()


def find_old_paths() -> None:
    """Make old paths available from now on; a second call changes nothing."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
