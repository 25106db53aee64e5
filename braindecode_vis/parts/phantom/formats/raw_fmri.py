"""Raw fMRI runs in BIDS, before any preprocessing: int16 volumes of a whole head, sidecar and events.

Owns the images of a scanner before a mask is made: cortex with its signal, the rest of the head with only noise, air at
zero. The formats of BOLD5000, NOD and NSD's time series share it, with different designs and tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.phantom.bold_signal import simulate_bold
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import PhantomJob, Progress
from braindecode_vis.parts.phantom.formats.file_writers import write_json_file, write_tsv, write_volumes
from braindecode_vis.parts.phantom.scanner import GRIDS, count_voxels

_INSIDE, _INSIDE_NOISE = 700.0, 4.0  # scanner units of the head without cortex, and their noise: our choice
_HEAD_SHARE = 0.15  # of the volume, measured on the grids of the scanner


def iterate_head(
    job: PhantomJob,
    person: Person,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    stimulus_s: float,
    n_volumes: int,
    name: str,
    *,
    imagery: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the volumes of a run, float (n_x, n_y, n_z), in scanner units.

    Parameters
    ----------
    onsets_s, rows
        Onset (ascending) and row of each image; see `simulate_bold`.
    stimulus_s
        Presentation time of an image, s.
    name
        Name of the run; another name gives other noise.
    imagery
        True for imagined instead of seen images.
    """
    scanner = job.scanner
    around = scanner.find_head() & ~scanner.mask
    generator = make_generator(job.config.seed, "head", person.index, name)
    for block in simulate_bold(
        person, scanner, onsets_s, rows, stimulus_s, n_volumes, name=name, imagery=imagery
    ):
        for percent in block:
            volume = scanner.fill_volume(scanner.baseline * (1 + percent / 100))
            volume[around] = _INSIDE + _INSIDE_NOISE * generator.standard_normal(int(around.sum()))
            yield volume


def write_series(
    path: Path,
    job: PhantomJob,
    person: Person,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    stimulus_s: float,
    n_volumes: int,
    progress: Progress,
    *,
    imagery: bool = False,
) -> Path:
    """Write the int16 volumes of a run, with noise that depends on the name of the file; see `iterate_head`."""
    volumes = iterate_head(job, person, onsets_s, rows, stimulus_s, n_volumes, path.name, imagery=imagery)
    return write_volumes(
        path,
        (np.rint(volume) for volume in progress.watch(volumes, lambda volume: 1)),
        shape=job.scanner.mask.shape,
        n_volumes=n_volumes,
        affine=job.scanner.affine,
        dtype=np.int16,
        t_r=job.scanner.t_r,
    )


def write_raw_run(
    job: PhantomJob,
    person: Person,
    place: tuple[str, str, str, int],
    trials: pd.DataFrame,
    events: pd.DataFrame,
    stimulus_s: float,
    tail_s: float,
    progress: Progress,
    *,
    imagery: bool = False,
) -> list[Path]:
    """Write image, sidecar and table of events of a run, and return their paths.

    Parameters
    ----------
    place
        Labels of subject and session, the task, and the number of the run.
    trials : DataFrame
        `onset` in s, and `row` of the image.
    events : DataFrame
        The table in the spelling of the data set.
    tail_s
        Time from the last onset to the end of the run.
    imagery
        True for imagined instead of seen images.
    """
    subject, session, task, run = place
    folder = job.root / f"sub-{subject}" / f"ses-{session}" / "func"
    stem = f"sub-{subject}_ses-{session}_task-{task}_run-{run:02d}"
    onsets = trials["onset"].to_numpy()
    n_volumes = int(np.ceil((onsets.max() + tail_s) / job.scanner.t_r))
    table = write_tsv(folder / f"{stem}_events.tsv", events)
    content = {"TaskName": task, "RepetitionTime": float(job.scanner.t_r)}
    sidecar = write_json_file(folder / f"{stem}_bold.json", content)
    # The image is written last: if it exists, the other files exist too.
    image = folder / f"{stem}_bold.nii.gz"
    rows = trials["row"].to_numpy()
    series = write_series(image, job, person, onsets, rows, stimulus_s, n_volumes, progress, imagery=imagery)
    return [table, sidecar, series]


def estimate_raw_volume(voxel_mm: float | None) -> float:
    """Return the size of one compressed int16 volume of `iterate_head` in a long series, bytes."""
    shape, n_cortex = GRIDS[voxel_mm or 0]
    n_around = max(0.0, _HEAD_SHARE * float(np.prod(shape)) - n_cortex)
    # Measured: noise of a few units needs about a byte, that of the cortex more; zeros about a hundredth.
    return 1.6 * n_cortex + 1.1 * n_around + 0.02 * float(np.prod(shape))


def estimate_seconds(voxel_mm: float | None, n_volumes: float) -> float:
    """Return the computing time of a number of volumes on one core, s."""
    return n_volumes * (1e-3 + 3e-7 * count_voxels(voxel_mm) + 3e-8 * estimate_raw_volume(voxel_mm))
