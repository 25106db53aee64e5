"""Where the information is: only one part of the head or brain, all but one part, and random parts of the same size.

Owns regions of sensors (ATM), regions of interest of fMRI, and networks of parcels (WAVE), and the comparison that they
share. A large part decodes better because it is large; so every part stands beside random parts of the same number of
channels or voxels, drawn from all of them. A drop after leaving a part out says that the encoder used it, not that
other parts do not hold the same information.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721 (regions of sensors). WAVE, arXiv:2411.07121 (whole-brain parcels, network
ablation; only its abstract is known here, and random parts of the same size and the paired bootstrap are ours). Yeo et
al. (2011), doi:10.1152/jn.00338.2011; Schaefer et al. (2018), doi:10.1093/cercor/bhx179.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.settings import Settings
from braindecode_vis.parts.analyses.cuts import Features, Outside, keep_features
from braindecode_vis.parts.analyses.measure import (
    Measured,
    RetrievalMetric,
    check_retrieval,
    describe_result,
    measure_changes,
)
from braindecode_vis.parts.analyses.study import Change, Findings, Plot, Study
from braindecode_vis.preprocessing.voxel_geometry import find_networks, find_rois, read_geometry
from braindecode_vis.report.drawing import draw_bars
from braindecode_vis.report.sensor_groups import REGIONS, assign_regions
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.uncertainty import compute_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SensorRegionsConfig(Settings):
    """Decode from the frontal, temporal, central, parietal or occipital sensors only, and from all but these.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    n_random
        Random sets of as many sensors beside each region.
    outside
        ``cut`` leaves sensors out; ``zero`` sets them to zero, for networks that need them all.
    """

    kind: Literal["sensor_regions"] = "sensor_regions"
    metric: RetrievalMetric = "top1"
    n_random: int = Field(default=20, ge=0)
    outside: Outside = "cut"

    def compute(self, study: Study) -> Findings:
        """Fit and test on the sensors of each region, and on random ones."""
        check_retrieval(study, self.kind)
        assigned = np.array(assign_regions(study.responses))
        groups: dict[str, Features] = {name: assigned == name for name in REGIONS if (assigned == name).any()}
        return ablate(
            study, groups, metric=self.metric, n_random=self.n_random, outside=self.outside, kind=self.kind,
            title="Regions of sensors", noun="sensor",
        )  # fmt: skip


class RoisConfig(Settings):
    """Decode from the voxels of one region of interest only, and from all but these.

    Parameters
    ----------
    metric, n_random, outside
        As in `SensorRegionsConfig`, for voxels.
    sets
        Sets of regions (``prf-visualrois``, ``streams``...); None takes every set that the data hold.
    include
        Names of regions; empty takes all.
    exclude
        Names of regions that are left out.
    min_voxels
        Regions that are smaller in any subject are left out (a choice of ours).
    """

    kind: Literal["rois"] = "rois"
    metric: RetrievalMetric = "top1"
    n_random: int = Field(default=20, ge=0)
    outside: Outside = "cut"
    sets: tuple[str, ...] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_voxels: int = Field(default=10, ge=1)

    def compute(self, study: Study) -> Findings:
        """Fit and test on the voxels of each region, and on random ones."""
        check_retrieval(study, self.kind)
        groups = {
            name: features
            for name, features in list_rois(study.responses, self.sets).items()
            if (not self.include or name in self.include) and name not in self.exclude
            if _count(features) >= self.min_voxels
        }
        for name in (*self.include, *self.exclude):
            check_option("the region of interest", name, list_rois(study.responses, self.sets))
        return ablate(
            study, groups, metric=self.metric, n_random=self.n_random, outside=self.outside, kind=self.kind,
            title="Regions of interest", noun="voxel",
        )  # fmt: skip


def list_rois(responses: Responses, sets: tuple[str, ...] | None) -> dict[str, Features]:
    """Return the voxels of every named region; regions of the same name in two sets are told apart by their set.

    Raises
    ------
    DataError
        If the responses have no regions.
    """
    counts = count_own_voxels(responses)
    subjects = list(dict.fromkeys(responses.trials["subject"].astype(str))) if counts else [None]
    geometry = read_geometry(responses, subjects[0])
    if "voxel" not in responses.dims or not geometry.rois:
        raise DataError("these responses hold no regions of interest; read some with dataset.rois.")
    for name in sets or ():
        check_option("the set of regions", name, geometry.rois)
    named: dict[str, Features] = {}
    for set_name in sets or tuple(geometry.rois):
        roi = geometry.rois[set_name]
        labels = sorted({int(v) for v in np.unique(roi.labels) if v > 0} | {k for k in roi.names if k > 0})
        for label in labels:
            region = roi.names.get(label, str(label))
            # FFA is in several atlases, and some name their regions by numbers alone.
            name = f"{set_name}/{region}" if region in named or region.isdigit() else region
            masks = {str(s): find_rois(responses, {set_name: [region]}, subject=s) for s in subjects}
            named[name] = masks if counts else next(iter(masks.values()))
    return named


class NetworkAblationConfig(Settings):
    """Decode from the parcels of one network only, and from all but these.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    n_random
        Random sets of as many parcels beside each network.
    outside
        ``cut`` leaves parcels out; ``zero`` sets them to zero, for networks that need them all.
    """

    kind: Literal["network_ablation"] = "network_ablation"
    metric: RetrievalMetric = "two_way"
    n_random: int = Field(default=20, ge=0)
    outside: Outside = "cut"

    def compute(self, study: Study) -> Findings:
        """Fit and test on the parcels of each network, and on random ones."""
        check_retrieval(study, self.kind)
        responses = study.responses
        known = [str(name) for name in responses.coords.get("parcel_networks", ()) if name]
        if "parcel" not in responses.dims or not known:
            raise DataError(
                "the analysis network_ablation needs parcels that belong to networks; average over Schaefer's atlas "
                "with dataset.atlas."
            )
        groups: dict[str, Features] = {
            name: find_networks(responses, [name]) for name in dict.fromkeys(known)
        }
        return ablate(
            study, groups, metric=self.metric, n_random=self.n_random, outside=self.outside, kind=self.kind,
            title="Networks of the brain", noun="parcel",
        )  # fmt: skip


# --- the comparison ------------------------------------------------------------------------------------------------


Condition = tuple[str, str, int]  # mode, group (or size), draw
WHOLE: Condition = ("all", "all", 0)


def ablate(
    study: Study,
    groups: Mapping[str, Features],
    *,
    metric: str,
    n_random: int,
    outside: Outside,
    kind: str,
    title: str,
    noun: str,
) -> Findings:
    """Decode from only each group, from all but each group, and from random groups of the same sizes.

    Parameters
    ----------
    groups
        Name to the features of each group.
    n_random
        Random groups per size; 0 draws none.
    outside
        ``cut`` leaves features out; ``zero`` sets them to zero, for networks that need them all.
    noun
        What a feature is called.

    Raises
    ------
    DataError
        If there are fewer than two groups, or one holds every feature.
    """
    if len(groups) < 2:
        raise DataError(
            f"the analysis {kind} needs at least two groups of {noun}s, found {', '.join(groups) or 'none'}."
        )
    every = _join(groups)
    kept: dict[Condition, Features] = {}
    for name, features in groups.items():
        rest = _invert(features, every)
        if _count(rest) == 0:
            raise DataError(f"the group {name} holds every {noun}, so nothing can be compared with it.")
        kept["only", name, 0], kept["without", name, 0] = features, rest
    # Random groups are drawn once per size, and serve all groups of that size.
    sizes = {_key(features) for features in kept.values()}
    for size in sorted(sizes):
        for draw in range(n_random):
            kept["random", size, draw] = _draw(every, size, study.seed, draw)
    changes: dict[Condition, Change | None] = {WHOLE: partial(keep_features, keep=every, outside=outside)}
    changes |= {c: partial(keep_features, keep=features, outside=outside) for c, features in kept.items()}
    measured = measure_changes(
        study,
        changes,
        metric,
        permute=lambda condition: condition[0] != "random",  # they are a null themselves
        what=kind.replace("_", " "),
    )
    rows = [
        _make_row(study, condition, features, measured, n_random)
        for condition, features in {WHOLE: every, **kept}.items()
        if condition[0] != "random"
    ]
    return _report(pd.DataFrame(rows), metric, kind, title, noun, n_random)


def _make_row(
    study: Study, condition: Condition, features: Features, measured: dict[Condition, Measured], n_random: int
) -> dict[str, Any]:
    mode, name, _ = condition
    found, whole = measured[condition], measured[WHOLE]
    row = {"group": name, "mode": mode, "n_columns": _count(features), **found.as_row(study)}
    draws = [measured["random", _key(features), d] for d in range(n_random)] if mode != "all" else []
    # A group left out is worth what the score loses; a group alone is worth its score.
    row |= found.as_difference(study, whole)
    if mode == "all":
        row |= dict.fromkeys(("difference_low", "difference_high", "p_difference"), np.nan)
    if not draws:
        names = "random random_low random_high p_random versus_random versus_low versus_high"
        return row | dict.fromkeys(names.split(), np.nan)
    level = np.array([d.value for d in draws])
    # A group left out matters if the score falls lower than without as many random features.
    extreme = compute_p_value(found.value, level, alternative="greater" if mode == "only" else "less")
    mean = np.mean([d.values for d in draws], axis=0)  # (n_rows,): trial by trial, for a paired difference
    versus = found.compare(study, mean)
    low, high = np.quantile(level, [0.025, 0.975])
    return row | {
        "random": float(level.mean()), "random_low": float(low), "random_high": float(high),
        "p_random": float(extreme), "versus_random": found.value - float(level.mean()),
        "versus_low": versus.interval.low if versus else np.nan,
        "versus_high": versus.interval.high if versus else np.nan,
    }  # fmt: skip


def _report(table: pd.DataFrame, metric: str, kind: str, title: str, noun: str, n_random: int) -> Findings:
    whole = table.iloc[0]
    only = table[table["mode"] == "only"].sort_values("value", ascending=False)
    without = table[table["mode"] == "without"].set_index("group").loc[only["group"]].reset_index()

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        words = ("only this group", "all but this group")
        for axes, own, heading in zip(panels, (only, without), words, strict=True):
            labels = [f"{g} ({n})" for g, n in zip(only["group"], only["n_columns"], strict=True)]
            draw_bars(axes, own, labels)
            if n_random:
                place = np.arange(len(own)) + 0.2
                axes.plot(
                    own["random"], place, ls="none", marker="D", ms=4, color="C1", label="random, same size"
                )
                axes.hlines(place, own["random_low"], own["random_high"], color="C1", lw=1)
            axes.axvline(whole["value"], color="C5", lw=0.8, label=f"all {noun}s")
            axes.axvline(whole["chance"], color="C2", lw=1, ls="--", label="chance")
            axes.set_title(heading)
            axes.set_xlabel(find_metric(metric).label)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    best = only.iloc[0]
    worst = without.iloc[int(without["value"].to_numpy(float).argmin())]
    found = (
        f"{describe_result(whole, f'with all {noun}s {metric}')}; most from {best['group']} alone: "
        f"{describe_result(best, metric)}; the score loses most without {worst['group']}: "
        f"{worst['difference']:+.3f} ({worst['difference_low']:+.3f} to {worst['difference_high']:+.3f})."
    )
    if n_random:
        found += (
            f" Of {n_random} random groups of the size of {best['group']}, the mean is {best['random']:.3f} "
            f"(p = {best['p_random']:.2g} for as much as {best['group']})."
        )
    how = f"An encoder was fitted and tested on each group of {noun}s alone and on all but each group."
    caption = (
        f"Score from one group of {noun}s alone (left) and from all but one (right), 95 % intervals; number of {noun}s "
        "in brackets. Diamonds: mean of random groups of the same size, with the range of 95 % of them."
    )
    size = (7.4, 1.6 + 0.34 * len(only))
    return Findings(title, f"{how} {found}", table, (Plot(kind, caption, found, draw, size),))


# --- sets of features, common or of each subject -----------------------------------------------------------


def _join(groups: Mapping[str, Features]) -> Features:
    """Return every feature that can be chosen: all of them, in the groups or not."""
    first = next(iter(groups.values()))
    if isinstance(first, Mapping):
        return {subject: np.ones(len(chosen), bool) for subject, chosen in first.items()}
    return np.ones(len(first), bool)


def _invert(features: Features, every: Features) -> Features:
    if isinstance(features, Mapping) and isinstance(every, Mapping):
        return {subject: every[subject] & ~chosen for subject, chosen in features.items()}
    assert isinstance(features, np.ndarray)
    assert isinstance(every, np.ndarray)
    return every & ~features


def _count(features: Features) -> int:
    """Return the number of features; of the subject with fewest where subjects have their own."""
    if isinstance(features, Mapping):
        return min(int(chosen.sum()) for chosen in features.values())
    return int(features.sum())


def _key(features: Features) -> str:
    """Return the sizes as text: conditions of the same sizes share their random groups."""
    if isinstance(features, Mapping):
        return "/".join(f"{subject}={int(chosen.sum())}" for subject, chosen in features.items())
    return f"{int(features.sum()):06d}"


def _draw(every: Features, size: str, seed: int, number: int) -> Features:
    generator = make_generator(seed, "random groups", size, number)

    def pick(chosen: np.ndarray, n: int) -> np.ndarray:
        out = np.zeros(len(chosen), bool)
        out[generator.choice(np.flatnonzero(chosen), n, replace=False)] = True
        return out

    if isinstance(every, Mapping):
        counts = dict(part.rsplit("=", 1) for part in size.split("/"))
        return {subject: pick(chosen, int(counts[subject])) for subject, chosen in every.items()}
    return pick(every, int(size))
