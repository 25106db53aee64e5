"""The Natural Scenes Dataset as its bucket lays it out, at a volume of any size.

Owns the experimental design (``nsd_expdesign.mat``, ``nsd_stim_info_merged.csv``, ``responses.tsv``), the betas
with their noise ceiling, the regions of interest and the stimulus brick.

Traps that are kept: betas are int16 = percent signal change x 300; ``73KID`` and everything in the .mat file
count from 1, `nsdId` from 0; regions are -1 outside the cortex; the HDF5 betas show up reversed in Python.

References
----------
.. [1] Allen, E. J. et al. (2022). A massive 7T fMRI dataset to bridge cognitive neuroscience and artificial
   intelligence. Nature Neuroscience 25, 116-126. https://doi.org/10.1038/s41593-021-00962-x
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError, check_option
from braindecode_vis.phantom.writers.nifti import HEADER_BYTES, write_volume, write_volumes
from braindecode_vis.phantom.writers.tables import check_block, check_count, write_csv, write_text, write_tsv
from braindecode_vis.seeds import make_generator
from braindecode_vis.store import replace_atomically

SCALE = 300
MOST_PERCENT = np.iinfo(np.int16).max / SCALE
"""The largest signal change that the files can hold."""
T_R = 4 / 3
SPACE = "func1pt8mm"
BETA_VERSIONS = ("betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR")
BEHAVIOUR_COLUMNS = (
    "SUBJECT", "SESSION", "RUN", "TRIAL", "73KID", "10KID", "TIME", "ISOLD", "ISCORRECT", "RT", "CHANGEMIND",
    "MEMORYRECENT", "MEMORYFIRST", "ISOLDCURRENT", "ISCORRECTCURRENT", "TOTAL1", "TOTAL2", "BUTTON",
    "MISSINGDATA",
)  # fmt: skip
Design = dict[str, np.ndarray]


def make_nsd_expdesign(
    n_subjects: int = 8,
    n_sessions: int = 40,
    images_per_subject: int = 10000,
    n_shared: int = 1000,
    n_images: int = 73000,
    seed: int = 0,
    *,
    n_repetitions: int = 3,
    n_runs: int = 12,
) -> Design:
    """Return the arrays of ``nsd_expdesign.mat``, everything counted from 1.

    `masterordering` gives for each trial the column of `subjectim`; columns 1 to `n_shared` are the same
    images in all subjects (`sharedix`, ascending), the others are each subject's own.

    Returns
    -------
    dict
        `masterordering` uint16 (1, n_trials), `subjectim` int32 (n_subjects, images_per_subject), `sharedix`
        int32 (1, n_shared), `basiccnt` uint16 (3, n_sessions): images shown once, twice, three times within a
        session, `stimpattern` uint8 (n_sessions, n_runs, n_slots): which slots hold a picture. Types and
        shapes as `scipy.io.loadmat` gives them for the published file.

    Raises
    ------
    ConfigError
        If the sizes do not fit together.

    Examples
    --------
    >>> design = make_nsd_expdesign(2, 3, images_per_subject=20, n_shared=4, n_images=40, n_runs=2)
    >>> {key: value.shape for key, value in design.items()}["masterordering"]
    (1, 60)
    """
    n_own = images_per_subject - n_shared
    n_trials = images_per_subject * n_repetitions
    if min(n_subjects, n_sessions, n_shared, n_runs) < 1 or n_own < 0 or n_trials % n_sessions:
        raise ConfigError(
            f"{images_per_subject} images x {n_repetitions} do not divide into {n_sessions} sessions, "
            f"or hold no {n_shared} shared ones."
        )
    if n_shared + n_subjects * n_own > n_images or n_trials // n_sessions < n_runs:
        raise ConfigError(
            f"{n_subjects} subjects need {n_shared + n_subjects * n_own} images, but there are {n_images}; "
            f"{n_trials // n_sessions} trials a session must fill {n_runs} runs."
        )
    rng = make_generator(seed, "nsd", "expdesign")
    ids = rng.permutation(n_images).astype(np.int32) + 1
    shared = np.sort(ids[:n_shared])
    own = ids[n_shared : n_shared + n_subjects * n_own].reshape(n_subjects, n_own)
    subjectim = np.concatenate([np.tile(shared, (n_subjects, 1)), own], axis=1).astype(np.int32)
    order = _order_trials(images_per_subject, n_repetitions, n_sessions, rng)
    counts = np.zeros((3, n_sessions), dtype=np.uint16)
    for session, shown in enumerate(order.reshape(n_sessions, -1)):
        within = np.unique(shown, return_counts=True)[1]
        counts[:, session] = [(within == k).sum() for k in (1, 2, 3)]
    return {
        "masterordering": order[None].astype(np.uint16),
        "basiccnt": counts,
        "sharedix": shared[None].astype(np.int32),
        "subjectim": subjectim,
        "stimpattern": _place_blanks(n_trials // n_sessions, n_sessions, n_runs, rng),
    }


def _order_trials(n_images: int, n_repetitions: int, n_sessions: int, rng: np.random.Generator) -> np.ndarray:
    """Return the image of each trial, numbered from 1; three fifths of the showings of one lie close together.

    Share and spread (0.25 sessions) give the counts of the published design: per session 436 images shown
    once, 106 twice, 34 three times, and now and then an image that follows itself.
    """
    centre = rng.uniform(0, n_sessions, (n_images, 1))
    close = centre + rng.normal(0, 0.25, (n_images, n_repetitions))
    anywhere = rng.uniform(0, n_sessions, (n_images, n_repetitions))
    when = np.where(rng.random((n_images, n_repetitions)) < 0.6, close, anywhere) % n_sessions
    return np.repeat(np.arange(1, n_images + 1), n_repetitions)[np.argsort(when.ravel(), kind="stable")]


def _place_blanks(per_session: int, n_sessions: int, n_runs: int, rng: np.random.Generator) -> np.ndarray:
    """Return which slots hold a picture: runs start with 3 blanks, end with 4, and hold a few between."""
    # Runs of 63 and 62 trials take turns, as in the published file.
    sizes = np.diff(-(-np.arange(n_runs + 1) * per_session // n_runs))
    n_slots = int(sizes.max()) + 12
    pattern = np.zeros((n_sessions, n_runs, n_slots), dtype=np.uint8)
    for session in range(n_sessions):
        for run, size in enumerate(sizes):
            pattern[session, run, 3 + np.sort(rng.choice(n_slots - 7, size, replace=False))] = 1
    return pattern


def get_trial_images(design: Design, subject: int, session: int) -> np.ndarray:
    """Return the 1-based 73k image of each trial of a session; subject and session count from 1."""
    n_sessions = design["stimpattern"].shape[0]
    shown = design["masterordering"].reshape(n_sessions, -1)[session - 1]
    return design["subjectim"][subject - 1, shown.astype(int) - 1]


def write_expdesign(root: Path, design: Design) -> Path:
    """Write ``nsddata/experiments/nsd/nsd_expdesign.mat``, MATLAB 5."""
    from scipy.io import savemat

    path = root / "nsddata" / "experiments" / "nsd" / "nsd_expdesign.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary:
        with temporary.open("wb") as file:
            savemat(file, design, do_compression=True)
        with temporary.open("r+b") as file:  # the free text of the header holds the time
            file.write(b"MATLAB 5.0 MAT-file, Platform: MACI64, phantom".ljust(116))
    return path


def make_stim_info(design: Design, n_images: int = 73000) -> pd.DataFrame:
    """Return the table of ``nsd_stim_info_merged.csv``: one row per image, trials counted from 1, 0 for never."""
    n_subjects = len(design["subjectim"])
    identity = np.arange(n_images)
    table = pd.DataFrame(
        {
            "cocoId": identity + 100000,
            "cocoSplit": np.where(identity % 25, "train2017", "val2017"),
            "cropBox": "(0.0, 0.0, 0.0, 0.0)",
            "loss": 0.0,
            "nsdId": identity,
            "flagged": False,
            "BOLD5000": False,
            "shared1000": np.isin(identity + 1, design["sharedix"]),
        }
    )
    order = design["masterordering"][0].astype(int)
    n_repetitions = np.bincount(order).max()
    trials = pd.Series(np.arange(1, len(order) + 1)).groupby(order).agg(list)
    seen = np.zeros((n_images, n_subjects), dtype=int)
    when = np.zeros((n_images, n_subjects, n_repetitions), dtype=int)
    for subject, images in enumerate(design["subjectim"] - 1):
        seen[images, subject] = 1
        when[images, subject] = np.array(trials.tolist())
    for subject in range(n_subjects):
        table[f"subject{subject + 1}"] = seen[:, subject]
    columns = {
        f"subject{s + 1}_rep{r}": when[:, s, r] for s in range(n_subjects) for r in range(n_repetitions)
    }
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def write_stim_info(root: Path, table: pd.DataFrame) -> Path:
    """Write ``nsddata/experiments/nsd/nsd_stim_info_merged.csv``; its first column has no name."""
    return write_csv(root / "nsddata" / "experiments" / "nsd" / "nsd_stim_info_merged.csv", table, index=True)


def make_responses(design: Design, subject: int, n_sessions: int, seed: int = 0) -> pd.DataFrame:
    """Return the table of ``responses.tsv``: one row a trial, with the memory task answered at 85 %."""
    rng = make_generator(seed, "nsd", "responses", subject)
    per_session = design["masterordering"].size // design["stimpattern"].shape[0]
    n_trials = per_session * n_sessions
    order = design["masterordering"][0, :n_trials].astype(int)
    runs = design["stimpattern"][:n_sessions].sum(axis=2, dtype=np.int64)
    table = pd.DataFrame(
        {"SUBJECT": subject, "SESSION": np.repeat(np.arange(1, n_sessions + 1), per_session)}
    )
    table["RUN"] = np.concatenate([np.repeat(np.arange(1, len(row) + 1), row) for row in runs])
    table["TRIAL"] = table.groupby(["SESSION", "RUN"]).cumcount() + 1
    table["73KID"] = design["subjectim"][subject - 1, order - 1]
    table["10KID"] = order
    slots = np.concatenate(
        [np.flatnonzero(run) for session in design["stimpattern"][:n_sessions] for run in session]
    )
    clock = slots * 4 + (table["RUN"] - 1) * 330 + (table["SESSION"] - 1) * 7 * 86400
    table["TIME"] = clock / 86400
    trial = pd.Series(np.arange(n_trials))
    last, first = trial.groupby(order).shift(), trial.groupby(order).transform("first")
    table["ISOLD"] = last.notna().astype(int)
    old_now = trial.groupby([order, table["SESSION"].to_numpy()]).cumcount() > 0
    answered = rng.random(n_trials) < 0.98
    correct = rng.random(n_trials) < 0.85
    says_old = np.where(correct, table["ISOLD"], 1 - table["ISOLD"])
    table["ISCORRECT"] = np.where(answered, correct, np.nan)
    table["RT"] = np.where(answered, rng.uniform(500, 1500, n_trials).round(2), np.nan)
    table["CHANGEMIND"] = np.where(answered, 0.0, np.nan)
    table["MEMORYRECENT"] = (trial - last - 1).where(last.notna())
    table["MEMORYFIRST"] = (trial - first - 1).where(last.notna())
    table["ISOLDCURRENT"] = old_now.astype(int)
    table["ISCORRECTCURRENT"] = np.where(answered, says_old == table["ISOLDCURRENT"], np.nan)
    table["TOTAL1"], table["TOTAL2"] = answered * (says_old == 0), answered * (says_old == 1)
    table["BUTTON"] = np.where(answered, says_old + 1, np.nan)
    table["MISSINGDATA"] = 0
    integers = ["TOTAL1", "TOTAL2"]
    table[integers] = table[integers].astype(int)
    return table[list(BEHAVIOUR_COLUMNS)]


def write_responses(root: Path, subject: int, table: pd.DataFrame) -> Path:
    """Write ``nsddata/ppdata/subjAA/behav/responses.tsv``."""
    path = root / "nsddata" / "ppdata" / f"subj{subject:02d}" / "behav" / "responses.tsv"
    return write_tsv(path, table, missing="NaN")


def write_betas(
    root: Path,
    subject: int,
    session: int,
    betas: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    n_trials: int,
    affine: np.ndarray,
    version: str = "betas_fithrf_GLMdenoise_RR",
    form: Literal["nii.gz", "hdf5"] = "nii.gz",
) -> Path:
    """Write ``betas_sessionBB.nii.gz`` or ``.hdf5``, int16.

    Parameters
    ----------
    betas : iterable of arrays of shape `shape`
        Percent signal change, one volume a trial; multiplied by 300 and rounded.
    form
        ``hdf5`` holds ``/betas`` as MATLAB writes it: Python sees the shape (n_trials, z, y, x), with all
        trials of a voxel in one chunk. It uses a temporary file of the same size.

    Raises
    ------
    DataError
        If a value does not fit into int16 (beyond 109 %), or the volumes do not fit.
    """
    check_option("beta version", version, BETA_VERSIONS)
    check_option("beta format", form, ("nii.gz", "hdf5"))
    path = _beta_folder(root, subject, version) / f"betas_session{session:02d}.{form}"
    volumes = scale_betas(betas, shape, path.name)
    if form == "nii.gz":
        return write_volumes(
            path, volumes, shape=shape, n_volumes=n_trials, affine=affine, dtype=np.int16, t_r=T_R
        )
    return _write_hdf5(path, volumes, shape, n_trials)


def _beta_folder(root: Path, subject: int, version: str) -> Path:
    return root / "nsddata_betas" / "ppdata" / f"subj{subject:02d}" / SPACE / version


def scale_betas(betas: Iterable[np.ndarray], shape: tuple[int, int, int], name: str) -> Iterator[np.ndarray]:
    """Yield volumes of percent signal change as the int16 that are stored in the file `name`.

    Raises
    ------
    DataError
        If a value does not fit into int16, which would come back as another number.
    """
    for trial, volume in enumerate(betas):
        scaled = np.rint(check_block(volume, shape, what=f"the betas of {name}") * SCALE)
        if np.abs(scaled).max() > np.iinfo(np.int16).max:
            raise DataError(
                f"trial {trial} of {name} reaches {np.abs(volume).max():.0f} % signal change; "
                f"int16 x {SCALE:g} ends at {MOST_PERCENT:.0f} %: lower the signal-to-noise ratio."
            )
        yield scaled.astype(np.int16)


def _write_hdf5(
    path: Path, volumes: Iterable[np.ndarray], shape: tuple[int, int, int], n_trials: int
) -> Path:
    """Turn trials into voxel time courses through a flat file, one slice at a time."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    reverse = shape[::-1]
    flat = path.with_name(f".tmp-{path.name}.i16")
    try:
        count = 0
        with flat.open("wb") as file:
            for volume in volumes:
                file.write(volume.astype("<i2").tobytes(order="F"))
                count += 1
        check_count(count, n_trials, what=path.name, unit="volumes")
        with (
            replace_atomically(path) as temporary,
            h5py.File(temporary, "w") as file,
            flat.open("rb") as source,
        ):
            target = file.create_dataset("betas", (n_trials, *reverse), "<i2", chunks=(n_trials, 1, 1, 1))
            slice_bytes = 2 * shape[0] * shape[1]
            for z in range(shape[2]):
                slab = np.empty((n_trials, *reverse[1:]), "<i2")
                for trial in range(n_trials):
                    source.seek((trial * shape[2] + z) * slice_bytes)
                    slab[trial] = np.frombuffer(source.read(slice_bytes), "<i2").reshape(reverse[1:])
                target[:, z] = slab
    finally:
        flat.unlink(missing_ok=True)
    return path


def write_ncsnr(
    root: Path, subject: int, ncsnr: np.ndarray, affine: np.ndarray, *, version: str = BETA_VERSIONS[-1]
) -> Path:
    """Write ``ncsnr.nii.gz``, the noise-ceiling signal-to-noise ratio, beside the betas."""
    check_option("beta version", version, BETA_VERSIONS)
    return write_volume(
        _beta_folder(root, subject, version) / "ncsnr.nii.gz", ncsnr.astype(np.float32), affine
    )


def mark_outside(labels: np.ndarray, cortex: np.ndarray) -> np.ndarray:
    """Return float32 labels with -1 outside the cortex, as the published regions have."""
    return np.where(cortex, labels, -1).astype(np.float32)


def write_roi(
    root: Path,
    subject: int,
    name: str,
    labels: np.ndarray,
    cortex: np.ndarray,
    affine: np.ndarray,
    *,
    names: Mapping[int, str] | None = None,
) -> Path:
    """Write one region file, for example ``nsdgeneral``, ``prf-visualrois``, ``streams`` or ``floc-faces``.

    Parameters
    ----------
    labels : int array of shape (x, y, z)
        0 for no region, 1, 2, 3... for its regions.
    cortex : bool array of shape (x, y, z)
        Where the file is not -1.
    names
        What the labels mean; written to ``nsddata/freesurfer/subjAA/label/NAME.mgz.ctab``.
    """
    folder = root / "nsddata" / "ppdata" / f"subj{subject:02d}" / SPACE / "roi"
    path = write_volume(folder / f"{name}.nii.gz", mark_outside(labels, cortex), affine)
    if names is not None:
        lines = [f"{label} {region}" for label, region in sorted({0: "Unknown", **names}.items())]
        table = root / "nsddata" / "freesurfer" / f"subj{subject:02d}" / "label" / f"{name}.mgz.ctab"
        write_text(table, "\n".join(lines) + "\n")
    return path


def write_stimuli(root: Path, images: Iterable[np.ndarray], n_images: int, *, size: int = 425) -> Path:
    """Write ``nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5``, image by image.

    Parameters
    ----------
    images : iterable of uint8 arrays of shape (size, size, 3)
        In the order of `nsdId`.
    """
    import h5py

    path = root / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        brick = file.create_dataset(
            "imgBrick", (n_images, size, size, 3), np.uint8, chunks=(1, size, size, 3)
        )
        count = 0
        for image in images:
            check_block(image, (size, size, 3), what="NSD stimuli")
            if image.dtype != np.uint8:
                raise DataError(f"NSD stimuli are uint8, not {image.dtype}.")
            if count < n_images:
                brick[count] = image
            count += 1
        check_count(count, n_images, what="the stimulus brick", unit="images")
    return path


def estimate_bytes(
    shape: Sequence[int],
    n_sessions: int,
    n_trials: int,
    n_images: int,
    *,
    n_subjects: int = 1,
    size: int = 425,
) -> int:
    """Return an upper bound of the bytes to be written: betas without compression, and the stimuli."""
    betas = HEADER_BYTES + 2 * int(np.prod(shape)) * n_trials
    return n_subjects * n_sessions * betas + n_images * size * size * 3
