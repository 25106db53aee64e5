"""The encoding direction of a run: how well its responses are predicted from images, as an analysis of its own.

Owns which settings are taken; the fit, the scores and the maps are those of `braindecode_vis.parts.analyses.encoding`,
and synthetic responses those of `braindecode_vis.pipeline.synthetic`. Neither needs the brain encoder of the run.
"""

from __future__ import annotations

from typing import Any

from braindecode_vis.config import make_analysis
from braindecode_vis.parts.analyses.analyze import analyze_one, make_study, read_findings
from braindecode_vis.pipeline.preparing import refuse_categories
from braindecode_vis.pipeline.runs import Run


def encode(run: Run) -> dict[str, Any]:
    """Fit encoding models, and return what was found.

    Parameters
    ----------
    run
        Its section ``encode`` says how; without one, an encoding model of the run's target.

    Returns
    -------
    dict
        ``summary``, ``table`` (a row per response), ``scores`` (rows by network or region), ``path`` and ``files``.

    Raises
    ------
    ConfigError
        If the run decodes categories.
    DataError
        If a subject has too few test images, or trials have other axes than voxels, or channels and times.
    """
    refuse_categories(run, "encode")
    asked = run.config.encode
    study = make_study(run)
    return read_findings(analyze_one(run, study, make_analysis("encoding") if asked is None else asked, 0))
