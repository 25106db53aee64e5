"""A small NSD on disk, in the authors' own formats: two subjects, four sessions of thirty trials."""

from pathlib import Path

import numpy as np

from braindecode_vis.datasets.nsd.experiment_design import LAYOUT
from braindecode_vis.parts.phantom.formats import nsd_format
from braindecode_vis.parts.phantom.formats.file_writers import write_tsv

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1.8, 0, 0, 60], [0, 1.8, 0, -70], [0, 0, 1.8, -40], [0, 0, 0, 1.0]])
VERSION = "betas_fithrf_GLMdenoise_RR"
N_TRIALS = 30


def make_design():
    return nsd_format.make_nsd_expdesign(
        2, 4, images_per_subject=40, n_shared=10, n_images=90, seed=1, n_runs=3
    )


def make_betas(session: int, n_trials: int = N_TRIALS) -> np.ndarray:
    rng = np.random.default_rng(session)
    return rng.standard_normal((n_trials, *SHAPE)) * (1 + session / 2) + session


def make_labels() -> tuple[np.ndarray, np.ndarray]:
    """Labels 0 to 3 and the cortex, -1 outside of which the published files are."""
    rng = np.random.default_rng(9)
    return rng.integers(0, 4, SHAPE), rng.random(SHAPE) < 0.7


def write_root(root: Path, *, sessions=(1, 2, 3, 4), form="nii.gz", subject=1, images: bool = True) -> Path:
    design = make_design()
    LAYOUT.write(root, "design", design)
    behaviour = LAYOUT.place(root, "behaviour", subject=subject)
    write_tsv(behaviour, nsd_format.make_responses(design, subject, 4), missing="NaN")
    for session in sessions:
        if form == "hdf5":
            write_hdf5_betas(root, subject, session, make_betas(session))
        else:
            nsd_format.write_betas(
                root, subject, session, make_betas(session), shape=SHAPE, n_trials=N_TRIALS, affine=AFFINE
            )
    labels, cortex = make_labels()
    general = (labels > 0).astype(int)
    nsd_format.write_roi(root, subject, "nsdgeneral", general, cortex, AFFINE, names={1: "nsdgeneral"})
    nsd_format.write_roi(
        root, subject, "streams", labels, cortex, AFFINE, names={1: "early", 2: "ventral", 3: "lateral"}
    )
    nsd_format.write_roi(root, subject, "HCP_MMP1", labels, cortex, AFFINE)
    if images:
        rng = np.random.default_rng(3)
        nsd_format.write_stimuli(
            root, (rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(90)), 90, size=40
        )
    return root


def write_hdf5_betas(root: Path, subject: int, session: int, betas: np.ndarray) -> Path:
    """``betas_sessionBB.hdf5`` as MATLAB writes it: axes reversed, all trials of a voxel in one chunk."""
    options = {"shape": betas.shape[1:], "n_trials": len(betas), "affine": AFFINE, "form": "hdf5"}
    return nsd_format.write_betas(root, subject, session, betas, **options)


def find_general() -> np.ndarray:
    labels, cortex = make_labels()
    return (labels > 0) & cortex
