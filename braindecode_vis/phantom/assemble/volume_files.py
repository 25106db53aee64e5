"""What the fMRI formats share: grids of the template, sizes of compressed volumes, and labels of voxels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from braindecode_vis.phantom.cortex import compute_receptive_fields
from braindecode_vis.phantom.scanner import FmriMachine

GRIDS: dict[int, tuple[tuple[int, int, int], int]] = {
    2: ((99, 117, 95), 69946),
    3: ((67, 79, 64), 23841),
    4: ((50, 59, 48), 11403),
    5: ((41, 48, 39), 6341),
    6: ((34, 40, 33), 3997),
    7: ((29, 35, 28), 2605),
    8: ((26, 30, 25), 1880),
    9: ((23, 27, 22), 1332),
    10: ((21, 25, 20), 1022),
    11: ((19, 23, 19), 797),
    12: ((18, 21, 17), 630),
}
"""Shape of the volume and number of cortical voxels of `make_fmri_machine` at each voxel size in mm."""

_RATIO = {"int16": 1.02, "float32": 0.98}
"""Measured size of compressed noise per byte of its cortical voxels; scattered zeros between them cost a little."""


def count_voxels(voxel_mm: int | None) -> int:
    """Return the number of cortical voxels."""
    return GRIDS[voxel_mm or 0][1]


def estimate_volume_bytes(voxel_mm: int | None, dtype: str) -> float:
    """Return the size of one compressed volume in a long series."""
    shape, n_voxels = GRIDS[voxel_mm or 0]
    n_bytes = np.dtype(dtype).itemsize
    return n_bytes * (_RATIO[dtype] * n_voxels + 0.012 * float(np.prod(shape)))


def label_visual_quadrants(machine: FmriMachine) -> tuple[np.ndarray, dict[int, str]]:
    """Return the seven early areas of NSD's ``prf-visualrois`` per voxel, and their names.

    Upper and lower visual field part V1, V2 and V3 into a ventral and a dorsal half.
    """
    fields = compute_receptive_fields(machine.positions, 8)
    down = (fields * (np.arange(8) - 3.5)[None, :, None]).sum(axis=(1, 2))
    labels = np.zeros(machine.n_voxels, int)
    names = {}
    for number, area in enumerate(("V1", "V2", "V3")):
        members = machine.regions == area
        labels[members] = 2 * number + np.where(down[members] < 0, 1, 2)
        names |= {2 * number + 1: f"{area}v", 2 * number + 2: f"{area}d"}
    labels[machine.regions == "hV4"] = 7
    return labels, {**names, 7: "hV4"}


def describe_voxels(machine: FmriMachine) -> pd.DataFrame:
    """Return one row per voxel: index in the volume, position in mm, region and network."""
    table = pd.DataFrame(np.argwhere(machine.mask), columns=["i", "j", "k"])
    table[["x", "y", "z"]] = machine.positions
    return table.assign(region=machine.regions, network=machine.networks)
