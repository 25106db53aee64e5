"""A generic BIDS fMRI data set from images to files, with derivatives in the layout of fMRIPrep.

Owns the raw tree (events and sidecars) and ``derivatives/fmriprep``: preprocessed BOLD in MNI space, brain mask
and confounds with the names of fMRIPrep. The raw images are left out: a phantom has no scanner space. Volumes are
written one by one. The design is that of `bids_eeg`, with slower trials.

References
----------
.. [1] Esteban, O. et al. (2019). fMRIPrep: a robust preprocessing pipeline for functional MRI. Nature Methods
   16, 111-116. https://doi.org/10.1038/s41592-018-0235-4
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import check_columns
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.phantom.bold_signal import simulate_bold, simulate_motion
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit
from braindecode_vis.parts.phantom.formats.bids_eeg import (
    TrialTiming,
    check_sessions,
    describe_events,
    expect_run_s,
    list_images,
    make_design,
    plan_runs,
)
from braindecode_vis.parts.phantom.formats.file_writers import (
    check_block,
    check_count,
    write_json_file,
    write_text,
    write_tsv,
    write_volume,
    write_volumes,
)
from braindecode_vis.parts.phantom.scanner import count_voxels, estimate_volume_bytes, make_scanner
from braindecode_vis.parts.phantom.sizes import PhantomSize

T_R = 2.0
# Slow and jittered, so that overlapping responses can be separated; the tail is for the end of the last response.
FMRI_TIMING = TrialTiming(mean=4.0, jitter=1.0, stimulus=1.0, first=6.0, tail=14.0)
SPACE = "MNI152NLin2009cAsym"
MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_HEAD_RADIUS_MM = (
    50.0  # turns rotations into millimetres (Power et al. 2012, doi:10.1016/j.neuroimage.2011.10.018)
)


def count_fmri(size: PhantomSize) -> Counts:
    """Return work and space of the runs."""
    n_runs = size.n_subjects * size.n_sessions * (size.n_runs or 1)
    run_s = expect_run_s(size, FMRI_TIMING)
    n_volumes = run_s / T_R
    volume = estimate_volume_bytes(size.voxel_mm, "float32")
    n_bytes = n_runs * (n_volumes * (volume + 700) + 20_000)
    seconds = n_runs * n_volumes * (6e-4 + 1.5e-7 * count_voxels(size.voxel_mm) + volume * 2.5e-8)
    return Counts(n_bytes, 0, n_runs * run_s, 1 + seconds, 1 + n_runs * max(1, round(n_volumes)))


def plan_fmri(job: PhantomJob) -> list[Unit]:
    """Return the root files and one unit per run."""
    return plan_runs(job, FMRI_TIMING, write_dataset, _write_run, step_s=T_R)


def _write_run(job: PhantomJob, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    scanner = job.scanner
    design = make_design(job, person.index, FMRI_TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    # The response to the last picture ends within the run.
    n_volumes = int(np.ceil((trials["onset"].max() + FMRI_TIMING.tail) / scanner.t_r))
    name = f"ses-{session:02d}_run-{run:02d}"

    def simulate() -> Iterator[np.ndarray]:
        onsets, rows = trials["onset"].to_numpy(), trials["row"].to_numpy()
        return simulate_bold(person, scanner, onsets, rows, FMRI_TIMING.stimulus, n_volumes, name=name)

    events = describe_events(job, trials)
    events.insert(0, "trial_type", "stimulus")
    events.insert(0, "duration", FMRI_TIMING.stimulus)
    events.insert(0, "onset", trials["onset"].to_numpy())
    path = write_run(
        job.root,
        person.name,
        (
            scanner.fill_volume(scanner.baseline * (1 + row / 100))
            for block in progress.watch(simulate(), len)
            for row in block
        ),
        events,
        # The confounds need the whole run, but the writer takes one volume at a time, so the same run is simulated
        # twice.
        _make_confounds(job, person, simulate(), n_volumes, name),
        scanner.mask,
        n_volumes=n_volumes,
        affine=scanner.affine,
        t_r=scanner.t_r,
        session=f"{session:02d}",
        run=f"{run:02d}",
    )
    stem = path.name.split("_space-")[0]
    folder = job.root / f"sub-{person.name}" / f"ses-{session:02d}" / "func"
    return [*sorted(path.parent.glob(f"{stem}_*")), *sorted(folder.glob(f"{stem}_*"))]


def _make_confounds(
    job: PhantomJob, person: Person, blocks: Iterator[np.ndarray], n_volumes: int, name: str
) -> pd.DataFrame:
    """Return the confounds of a run from a first pass over its volumes.

    The phantom has no ventricles and no white matter; their signals follow the global one, with their own noise.
    """
    scanner = job.scanner
    means: list[float] = []
    changes: list[float] = []
    last: np.ndarray | None = None
    for block in blocks:
        for row in block:
            means.append(float((scanner.baseline * (1 + row / 100)).mean()))
            changes.append(0.0 if last is None else float(np.sqrt(((row - last) ** 2).mean())))
            last = row
    signal = np.array(means)
    generator = make_generator(job.config.seed, "tissue", person.index, name)
    tissue = signal + 0.5 * signal.std() * generator.standard_normal((2, n_volumes))
    return make_confounds(
        simulate_motion(person, n_volumes, name),
        global_signal=signal,
        csf=tissue[0],
        white_matter=tissue[1],
        dvars=np.array(changes),
        t_r=scanner.t_r,
    )


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
    """Return confounds with fMRIPrep's names, including expansions; undefined values of the first volume are NaN.

    Parameters
    ----------
    motion : array of shape (n_volumes, 6)
        Translations (mm), then rotations (rad).
    global_signal, csf, white_matter, dvars : arrays of shape (n_volumes,)
        Mean signals, and the change from volume to volume (its first value is ignored).
    t_r
        Repetition time (s).
    cutoff_s
        Longest period that the cosine drifts do not model.
    fd_threshold
        Framewise displacement (mm) above which a volume gets a spike regressor.
    """
    n = len(motion)
    check_block(motion, (None, 6), what="motion parameters")
    table = pd.DataFrame()
    for name, values in (("global_signal", global_signal), ("csf", csf), ("white_matter", white_matter)):
        table = pd.concat([table, _expand(name, check_block(values, (n,), what=name))], axis=1)
    # The first volume has no volume before it: n/a, which readers must handle.
    steps = np.diff(np.asarray(dvars, dtype=float), prepend=np.nan)
    table["dvars"] = np.where(np.isnan(steps), np.nan, dvars)
    table["std_dvars"] = table["dvars"] / table["dvars"].mean()
    # Power et al. (2012): rotations as arcs on a sphere, summed with the translations (mm).
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
    # As many half periods as fit above the cutoff, as in fMRIPrep.
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
    events: pd.DataFrame | None,
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
        `onset` and `duration` (s), `trial_type`, `stimulus_id` and `stim_file`; further columns are kept. None
        writes no table of events.
    confounds : DataFrame of n_volumes rows
        From `make_confounds`.
    mask : bool array of shape (x, y, z)
        Brain mask in the same space.
    affine : array of shape (4, 4)
        Voxel indices to MNI millimetres.
    t_r
        Repetition time (s).
    start_s
        Time of the samples of a volume after its start.
    """
    needed = ("onset", "duration", "trial_type", "stimulus_id", "stim_file")
    if events is not None:
        check_columns(events.columns, needed, what="the events of a BIDS run")
    check_count(len(confounds), n_volumes, what="The confounds table", unit="rows")
    parts = [f"sub-{subject}", *([f"ses-{session}"] if session is not None else [])]
    stem = "_".join([*parts, f"task-{task}", f"run-{run}"])
    raw = root.joinpath(*parts, "func")
    derived = (root / "derivatives" / "fmriprep").joinpath(*parts, "func")
    if events is not None:
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


FMRI = Format(
    name="bids-fmri",
    description="Generic BIDS fMRI with derivatives as fMRIPrep writes them",
    modality="fmri",
    uses=("n_runs", "voxel_mm", "n_pairs"),
    duration_s=FMRI_TIMING.stimulus,
    check=check_sessions,
    count=count_fmri,
    list_images=list_images,
    make_recorder=lambda size: make_scanner(size.voxel_mm or 0, T_R),
    plan=plan_fmri,
    ongoing_percent=0.0,
)
