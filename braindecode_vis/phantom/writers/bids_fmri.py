"""A BIDS fMRI data set with derivatives in the layout of fMRIPrep.

Owns the raw tree (events and sidecars) and ``derivatives/fmriprep``: preprocessed BOLD in MNI space, brain mask
and confounds under the names that fMRIPrep gives them. The raw images themselves are left out: a phantom has
no scanner space. Volumes are written as they come.

References
----------
.. [1] Esteban, O. et al. (2019). fMRIPrep: a robust preprocessing pipeline for functional MRI. Nature Methods
   16, 111-116. https://doi.org/10.1038/s41592-018-0235-4
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import check_columns
from braindecode_vis.phantom.writers.nifti import HEADER_BYTES, write_volume, write_volumes
from braindecode_vis.phantom.writers.tables import (
    check_block,
    check_count,
    write_json_file,
    write_text,
    write_tsv,
)

SPACE = "MNI152NLin2009cAsym"
MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_HEAD_RADIUS_MM = 50.0


def write_dataset(
    root: Path, participants: pd.DataFrame, *, name: str = "braindecode_vis phantom fMRI"
) -> None:
    """Write the root files of the raw data set and of its derivatives.

    Parameters
    ----------
    participants : DataFrame
        `participant_id` (``sub-01``...), then any column.
    """
    check_columns(participants.columns, ("participant_id",), what="the participants table")
    common = {"BIDSVersion": "1.8.0", "License": "CC0"}
    write_json_file(root / "dataset_description.json", {"Name": name, **common, "DatasetType": "raw"})
    write_json_file(
        root / "derivatives" / "fmriprep" / "dataset_description.json",
        {
            "Name": "fMRIPrep - fMRI PREProcessing workflow",
            **common,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "fMRIPrep", "Version": "0", "Description": "simulated"}],
        },
    )
    write_tsv(root / "participants.tsv", participants)
    write_text(root / "README", f"{name}: simulated people with a known ground truth.\n")


def make_confounds(
    motion: np.ndarray,
    *,
    global_signal: np.ndarray,
    csf: np.ndarray,
    white_matter: np.ndarray,
    dvars: np.ndarray,
    t_r: float,
    cutoff_s: float = 128.0,
    fd_threshold: float = 0.5,
) -> pd.DataFrame:
    """Return confounds under fMRIPrep's names, expansions included; what the first volume lacks is NaN.

    Parameters
    ----------
    motion : array of shape (n_volumes, 6)
        Translations (mm), then rotations (rad).
    global_signal, csf, white_matter, dvars : arrays of shape (n_volumes,)
        Mean signals, and the change from volume to volume (its first value is ignored).
    t_r
        Repetition time (s).
    cutoff_s
        Longest period that the cosine drifts leave alone.
    fd_threshold
        Framewise displacement (mm) above which a volume gets a spike regressor.
    """
    n = len(motion)
    check_block(motion, (None, 6), what="motion parameters")
    table = pd.DataFrame()
    for name, values in (("global_signal", global_signal), ("csf", csf), ("white_matter", white_matter)):
        table = pd.concat([table, _expand(name, check_block(values, (n,), what=name))], axis=1)
    steps = np.diff(np.asarray(dvars, dtype=float), prepend=np.nan)
    table["dvars"] = np.where(np.isnan(steps), np.nan, dvars)
    table["std_dvars"] = table["dvars"] / table["dvars"].mean()
    moved = np.abs(np.diff(motion, axis=0)) * ([1] * 3 + [_HEAD_RADIUS_MM] * 3)
    displacement = np.concatenate([[np.nan], moved.sum(axis=1)])
    table["framewise_displacement"] = displacement
    table["rmsd"] = np.concatenate([[np.nan], np.sqrt((moved**2).mean(axis=1))])
    table = pd.concat([table, make_cosine_drifts(n, t_r, cutoff_s)], axis=1)
    for axis, name in enumerate(MOTION):
        table = pd.concat([table, _expand(name, motion[:, axis])], axis=1)
    spikes = {
        f"motion_outlier{number:02d}": (np.arange(n) == volume).astype(float)
        for number, volume in enumerate(np.flatnonzero(np.nan_to_num(displacement) > fd_threshold))
    }
    return pd.concat([table, pd.DataFrame(spikes, index=table.index)], axis=1)


def make_cosine_drifts(n_volumes: int, t_r: float, cutoff_s: float = 128.0) -> pd.DataFrame:
    """Return the discrete cosine drifts `cosine00`, `cosine01`... of fMRIPrep, constant left out."""
    order = int(np.floor(2 * n_volumes * t_r / cutoff_s))
    time = np.arange(n_volumes) + 0.5
    drifts = {
        f"cosine{k - 1:02d}": np.sqrt(2 / n_volumes) * np.cos(np.pi * k * time / n_volumes)
        for k in range(1, order + 1)
    }
    return pd.DataFrame(drifts, index=range(n_volumes))


def _expand(name: str, values: np.ndarray) -> pd.DataFrame:
    derivative = np.diff(np.asarray(values, dtype=float), prepend=np.nan)
    derivative[0] = np.nan
    return pd.DataFrame(
        {
            name: values,
            f"{name}_derivative1": derivative,
            f"{name}_derivative1_power2": derivative**2,
            f"{name}_power2": np.asarray(values) ** 2,
        }
    )


def write_run(
    root: Path,
    subject: str,
    volumes: Iterable[np.ndarray],
    events: pd.DataFrame,
    confounds: pd.DataFrame,
    mask: np.ndarray,
    *,
    n_volumes: int,
    affine: np.ndarray,
    t_r: float,
    session: str | None = None,
    task: str = "images",
    run: str = "01",
    start_s: float = 0.0,
) -> Path:
    """Write one run and return the path of the preprocessed BOLD image.

    Parameters
    ----------
    subject, session, run
        BIDS labels without their key, for example ``"01"``.
    volumes : iterable of arrays of shape (x, y, z)
        Scanner units, written as float32.
    events : DataFrame
        `onset` and `duration` (s), `trial_type`, `stimulus_id` and `stim_file`; further columns are kept.
    confounds : DataFrame of n_volumes rows
        From `make_confounds`.
    mask : bool array of shape (x, y, z)
        Brain mask in the same space.
    affine : array of shape (4, 4)
        Voxel indices to MNI millimetres.
    t_r
        Repetition time (s).
    start_s
        When, after the start of a volume, its samples count as taken.
    """
    needed = ("onset", "duration", "trial_type", "stimulus_id", "stim_file")
    check_columns(events.columns, needed, what="the events of a BIDS run")
    check_count(len(confounds), n_volumes, what="The confounds table", unit="rows")
    parts = [f"sub-{subject}", *([f"ses-{session}"] if session is not None else [])]
    stem = "_".join([*parts, f"task-{task}", f"run-{run}"])
    raw = root.joinpath(*parts, "func")
    derived = (root / "derivatives" / "fmriprep").joinpath(*parts, "func")
    write_tsv(raw / f"{stem}_events.tsv", events)
    sidecar = {"TaskName": task, "RepetitionTime": float(t_r)}
    write_json_file(raw / f"{stem}_bold.json", sidecar)
    write_tsv(derived / f"{stem}_desc-confounds_timeseries.tsv", confounds)
    described = {name: {"Method": "Mean"} for name in ("csf", "white_matter", "global_signal")}
    write_json_file(derived / f"{stem}_desc-confounds_timeseries.json", described)
    space = f"{stem}_space-{SPACE}"
    write_volume(derived / f"{space}_desc-brain_mask.nii.gz", np.asarray(mask, dtype=np.uint8), affine)
    write_json_file(
        derived / f"{space}_desc-preproc_bold.json",
        {**sidecar, "SkullStripped": False, "StartTime": float(start_s)},
    )
    return write_volumes(
        derived / f"{space}_desc-preproc_bold.nii.gz",
        volumes,
        shape=mask.shape,
        n_volumes=n_volumes,
        affine=affine,
        dtype=np.float32,
        t_r=t_r,
    )


def estimate_bytes(shape: Sequence[int], n_volumes: int) -> int:
    """Return an upper bound of the size of one run: float32 without compression."""
    return HEADER_BYTES + 4 * int(np.prod(shape)) * n_volumes
