"""Where the information is: only one part of the head or brain, all but one part, and random parts of the same size.

Owns regions of sensors (ATM), regions of interest of fMRI, and networks of parcels (WAVE), and the comparison that they
share. A large part decodes better because it is large; so every part is shown beside random parts of the same size. A
draw relabels all channels, voxels or parcels at once, so that random parts overlap as little as the true ones, and
scores them all: the best part is compared with the best of each draw. A drop after leaving a part out says that the
encoder used it, not that other parts do not hold the same information. Random parts lie scattered; what that cannot
tell of contiguous parts is printed with the result.

References
----------
Li et al. (2024), ATM, arXiv:2403.07721 (regions of sensors). WAVE, arXiv:2411.07121 (whole-brain parcels, network
ablation; only its abstract is known here, and random parts of the same size and the paired bootstrap are ours). Yeo et
al. (2011), doi:10.1152/jn.00338.2011; Schaefer et al. (2018), doi:10.1093/cercor/bhx179. Nichols and Holmes (2002),
doi:10.1002/hbm.1058 (maximum statistic); Alexander-Bloch et al. (2018), doi:10.1016/j.neuroimage.2018.05.070 (nulls of
smooth maps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Responses, count_own_voxels
from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.cuts import CutAnalysis, Features, Outside, keep_features
from braindecode_vis.parts.analyses.measure import (
    Measured,
    RetrievalAnalysis,
    RetrievalMetric,
    bound_difference,
    check_retrieval,
    describe_limits,
    describe_result,
    measure_changes,
)
from braindecode_vis.parts.analyses.study import Change, Findings, Plot, Study
from braindecode_vis.preprocessing.voxel_geometry import find_networks, find_rois, read_geometry
from braindecode_vis.report.drawing import draw_bars
from braindecode_vis.report.sensor_groups import REGIONS, assign_regions
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import correct_maximum

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PartsAnalysis(RetrievalAnalysis, CutAnalysis):
    """An analysis that decodes from one part of the columns only, and from all but these.

    Parameters
    ----------
    n_random
        Number of random relabellings of all columns, each scored like the parts: two fits per part and relabelling. The
        smallest p is 1 / (n_random + 1); 0 makes none.
    """

    n_random: int = Field(default=200, ge=0)


class SensorRegionsConfig(PartsAnalysis):
    """Decode from the frontal, temporal, central, parietal or occipital sensors only, and from all but these."""

    kind: Literal["sensor_regions"] = "sensor_regions"

    def compute(self, study: Study) -> Findings:
        """Fit and test on the sensors of each region, and on random ones."""
        check_retrieval(study, self.kind)
        assigned = np.array(assign_regions(study.responses))
        groups: dict[str, Features] = {name: assigned == name for name in REGIONS if (assigned == name).any()}
        return ablate(self, study, groups, title="Regions of sensors", noun="sensor")


class RoisConfig(PartsAnalysis):
    """Decode from the voxels of one region of interest only, and from all but these.

    Parameters
    ----------
    sets
        Sets of regions (``prf-visualrois``, ``streams``...); None takes every set that the data hold.
    include
        Names of regions; empty takes all.
    """

    kind: Literal["rois"] = "rois"
    sets: tuple[str, ...] | None = None
    include: tuple[str, ...] = ()

    #: Regions that are smaller in any subject are left out (a choice of ours).
    min_voxels: ClassVar[int] = 10
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"min_voxels"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"exclude": ()}

    def compute(self, study: Study) -> Findings:
        """Fit and test on the voxels of each region, and on random ones."""
        check_retrieval(study, self.kind)
        rois = list_rois(study.responses, self.sets)
        groups = {
            name: features
            for name, features in rois.items()
            if not self.include or name in self.include
            if _count(features) >= self.min_voxels
        }
        for name in self.include:
            check_option("the region of interest", name, rois)
        return ablate(self, study, groups, title="Regions of interest", noun="voxel")


def list_rois(responses: Responses, sets: tuple[str, ...] | None) -> dict[str, Features]:
    """Return the voxels of every named region; regions of the same name in two sets are distinguished by their set.

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


class NetworkAblationConfig(PartsAnalysis):
    """Decode from the parcels of one network only, and from all but these.

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>`` among the test images of a fold.
    """

    kind: Literal["network_ablation"] = "network_ablation"
    metric: RetrievalMetric = "two_way"

    def compute(self, study: Study) -> Findings:
        """Fit and test on the parcels of each network, and on random ones."""
        check_retrieval(study, self.kind)
        groups = list_networks(study.responses)
        if not groups:
            raise DataError(
                "the analysis network_ablation needs parcels that belong to networks; average over Schaefer's atlas "
                "with dataset.atlas."
            )
        return ablate(self, study, groups, title="Networks of the brain", noun="parcel")


def list_networks(responses: Responses) -> dict[str, Features]:
    """Return the parcels of every network; empty if there are no parcels, or none with a network."""
    known = [str(name) for name in responses.coords.get("parcel_networks", ()) if name]
    there = known if "parcel" in responses.dims else []
    return {name: find_networks(responses, [name]) for name in dict.fromkeys(there)}


def split_regions(responses: Responses) -> dict[str, Responses]:
    """Return the responses of every region of interest or network; EEG and MEG have none and stay whole, named "".

    Raises
    ------
    DataError
        If voxels have no regions.
    """
    networks = list_networks(responses)
    if "voxel" not in responses.dims and not networks:
        return {"": responses}
    groups = networks or list_rois(responses, None)
    least = RoisConfig.min_voxels if "voxel" in responses.dims else 3  # of fewer, a correlation says little
    large = {name: keep for name, keep in groups.items() if _count(keep) >= least}
    return {name: keep_features(responses, keep) for name, keep in large.items()}


# --- the comparison ------------------------------------------------------------------------------------------------


Condition = tuple[str, str, int]  # mode, group, number of the relabelling (0 is the true one)
WHOLE: Condition = ("all", "all", 0)
MODES = ("only", "without")
#: Neighbours of a smooth map respond alike, which scattered random parts do not imitate: simulated, some part was
#: called better than random in these shares of maps without any effect.
SMOOTH_FALSE_POSITIVES = (0.73, 0.84)


def ablate(
    settings: PartsAnalysis, study: Study, groups: Mapping[str, Features], *, title: str, noun: str
) -> Findings:
    """Decode from only each group, from all but each group, and from the groups of relabelled features.

    Parameters
    ----------
    settings
        The analysis: its kind, metric and number of relabellings, and what becomes of the features outside.
    groups
        Name to the features of each group.
    noun
        What a feature is called.

    Raises
    ------
    DataError
        If there are fewer than two groups, or one holds every feature.
    """
    kind, n_random, outside = settings.kind, settings.n_random, settings.outside
    if len(groups) < 2:
        raise DataError(
            f"the analysis {kind} needs at least two groups of {noun}s, found {', '.join(groups) or 'none'}."
        )
    every = _join(groups)
    changes: dict[Condition, Change | None] = {WHOLE: partial(keep_features, keep=every, outside=outside)}
    sizes = {WHOLE: _count(every)}
    for name, features in groups.items():
        if _count(_invert(features, every)) == 0:
            raise DataError(
                f"the group {name} holds every {noun}, so it cannot be compared with other groups."
            )
        for mode in MODES:
            sizes[mode, name, 0] = _count(features if mode == "only" else _invert(features, every))
            for draw in range(n_random + 1):
                changes[mode, name, draw] = partial(
                    _keep_group, features=features, mode=mode, seed=study.seed, draw=draw, outside=outside
                )
    measured = measure_changes(
        study,
        changes,
        settings.metric,
        permute=lambda condition: condition[2] == 0,  # the others are a null themselves
        what=kind.replace("_", " "),
    )
    p_random = _correct(measured, list(groups), n_random)
    rows = [
        _make_row(study, condition, size, measured, n_random, p_random.get(condition, np.nan))
        for condition, size in sizes.items()
    ]
    return _report(pd.DataFrame(rows), settings.metric, kind, title, noun, n_random)


def _keep_group(
    responses: Responses, *, features: Features, mode: str, seed: int, draw: int, outside: Outside
) -> Responses:
    """Keep the features of a relabelled group, or all others."""
    drawn = relabel_features(features, seed, draw)
    keep = drawn if mode == "only" else _invert(drawn, _join({"": drawn}))
    return keep_features(responses, keep, outside)


def relabel_features(features: Features, seed: int, draw: int) -> Features:
    """Return the group after all features have changed places; of one draw, all groups by the same permutation.

    Groups keep their sizes, and those that share no feature share none afterwards. Where subjects have features of
    their own, each subject has its own permutation. The relabelling 0 is the true one.
    """
    if draw == 0:
        return features

    def move(chosen: np.ndarray, who: str) -> np.ndarray:
        return chosen[make_generator(seed, "relabelled groups", who, draw).permutation(len(chosen))]

    if isinstance(features, Mapping):
        return {subject: move(chosen, subject) for subject, chosen in features.items()}
    return move(features, "")


def _correct(
    measured: Mapping[Condition, Measured], names: Sequence[str], n_random: int
) -> dict[Condition, float]:
    """Return the p-value of every group, alone and left out, by the most extreme of all of them in each draw."""
    if not n_random:
        return {}
    keys = [(mode, name) for mode in MODES for name in names]
    # A group left out matters if the score falls lower than without as many random features.
    signs = np.array([1.0 if mode == "only" else -1.0 for mode, _ in keys])
    values = signs * np.array([[measured[*key, draw].value for key in keys] for draw in range(n_random + 1)])
    p_values = correct_maximum(values[0], values[1:])
    return {(*key, 0): float(p) for key, p in zip(keys, p_values, strict=True)}


def _make_row(
    study: Study,
    condition: Condition,
    size: int,
    measured: Mapping[Condition, Measured],
    n_random: int,
    p_random: float,
) -> dict[str, Any]:
    mode, name, _ = condition
    found, whole = measured[condition], measured[WHOLE]
    row = {"group": name, "mode": mode, "n_columns": size, **found.as_row(study)}
    draws = [measured[mode, name, d] for d in range(1, n_random + 1)] if mode != "all" else []
    # A group left out is worth what the score loses; a group alone is worth its score.
    row |= found.as_difference(study, whole)
    if mode == "all":
        row |= dict.fromkeys(("difference_low", "difference_high", "p_difference"), np.nan)
        row["difference_resampled"] = ""
    if not draws:
        names = "random random_low random_high p_random versus_random versus_low versus_high"
        return row | dict.fromkeys(names.split(), np.nan)
    level = np.array([d.value for d in draws])
    mean = np.mean([d.values for d in draws], axis=0)  # (n_rows,): trial by trial, for a paired difference
    versus_low, versus_high, *_ = bound_difference(found.compare(study, mean))
    low, high = np.quantile(level, [0.025, 0.975])
    return row | {
        "random": float(level.mean()), "random_low": float(low), "random_high": float(high),
        "p_random": p_random, "versus_random": found.value - float(level.mean()),
        "versus_low": versus_low, "versus_high": versus_high,
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
                    own["random"],
                    place,
                    ls="none",
                    marker="D",
                    ms=4,
                    color="C1",
                    label="relabelled, same size",
                )
                axes.hlines(place, own["random_low"], own["random_high"], color="C1", lw=1)
            axes.axvline(whole["value"], color="C5", lw=0.8, label=f"all {noun}s")
            axes.axvline(whole["chance"], color="C2", lw=1, ls="--", label="chance")
            axes.set_title(heading)
            axes.set_xlabel(find_metric(metric).label)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    best = only.iloc[0]
    worst = without.iloc[int(without["value"].to_numpy(float).argmin())]
    loss = {"ci_low": worst["difference_low"], "ci_high": worst["difference_high"]}
    limits = describe_limits({**loss, "resampled": worst["difference_resampled"]}, what="", sign="+")
    found = (
        f"{describe_result(whole, f'with all {noun}s {metric}')}; most from {best['group']} alone: "
        f"{describe_result(best, metric)}; the score loses most without {worst['group']}: "
        f"{worst['difference']:+.3f} ({limits})."
    )
    if n_random:
        low, high = SMOOTH_FALSE_POSITIVES
        found += (
            f" In {n_random} relabellings of all {noun}s, a group of the size of {best['group']} reaches "
            f"{best['random']:.3f} on average; {best['group']} alone: "
            f"{format_p_value(best['p_random'], in_words=True)}, all but {worst['group']}: "
            f"{format_p_value(worst['p_random'], in_words=True)}, corrected for all {len(only)} groups, alone and left "
            f"out. Relabelled groups are scattered. If neighbouring {noun}s respond similarly, such draws are "
            "not a valid null distribution for groups of neighbours: in simulated smooth maps without any effect, "
            f"{low:g} to {high:g} had a group with p <= 0.05. So a small p may only mean that the parts of a group "
            "are neighbours."
        )
    how = f"An encoder was fitted and tested on each group of {noun}s alone, and on all {noun}s without each group."
    caption = (
        f"Score from one group of {noun}s alone (left) and from all but one (right), 95 % intervals; number of {noun}s "
        "in brackets. Diamonds: mean of relabelled groups of the same size, with the range of 95 % of them."
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
