"""Retrieval from parts of the head or the brain: regions of sensors (ATM), and regions of interest of fMRI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from braindecode_vis.analysis.ablation import ablate
from braindecode_vis.analysis.cuts import Columns, Outside
from braindecode_vis.analysis.measure import RetrievalMetric, check_retrieval
from braindecode_vis.analysis.sensor_groups import REGIONS, assign_regions
from braindecode_vis.analysis.study import Findings, Study
from braindecode_vis.arrays import Responses
from braindecode_vis.checks import DataError, check_option
from braindecode_vis.preprocessing.voxel_geometry import count_own_voxels, find_rois, read_geometry
from braindecode_vis.settings import Settings


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
        groups: dict[str, Columns] = {name: assigned == name for name in REGIONS if (assigned == name).any()}
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
            name: columns
            for name, columns in list_rois(study.responses, self.sets).items()
            if (not self.include or name in self.include) and name not in self.exclude
            if _find_smallest(columns) >= self.min_voxels
        }
        for name in (*self.include, *self.exclude):
            check_option("the region of interest", name, list_rois(study.responses, self.sets))
        return ablate(
            study, groups, metric=self.metric, n_random=self.n_random, outside=self.outside, kind=self.kind,
            title="Regions of interest", noun="voxel",
        )  # fmt: skip


def list_rois(responses: Responses, sets: tuple[str, ...] | None) -> dict[str, Columns]:
    """Return the voxels of every named region; regions of the same name in two sets are told apart by their set.

    Raises
    ------
    DataError
        If the responses have no regions.
    """
    counts = count_own_voxels(responses)
    people = list(dict.fromkeys(responses.trials["subject"].astype(str))) if counts else [None]
    geometry = read_geometry(responses, people[0])
    if "voxel" not in responses.dims or not geometry.rois:
        raise DataError("these responses hold no regions of interest; read some with dataset.rois.")
    for name in sets or ():
        check_option("the set of regions", name, geometry.rois)
    named: dict[str, Columns] = {}
    for set_name in sets or tuple(geometry.rois):
        roi = geometry.rois[set_name]
        labels = sorted({int(v) for v in np.unique(roi.labels) if v > 0} | {k for k in roi.names if k > 0})
        for label in labels:
            region = roi.names.get(label, str(label))
            name = f"{set_name}/{region}" if region in named or region.isdigit() else region
            masks = {str(p): find_rois(responses, {set_name: [region]}, subject=p) for p in people}
            named[name] = masks if counts else next(iter(masks.values()))
    return named


def _find_smallest(columns: Columns) -> int:
    masks = columns.values() if isinstance(columns, Mapping) else [columns]
    return min(int(mask.sum()) for mask in masks)
