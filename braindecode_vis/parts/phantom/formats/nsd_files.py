"""Files of the phantom NSD below its bucket: grids, betas, masks, regions, their colour tables, and bricks of images.

Owns the published volume of each subject, here at any voxel size; its middle is 0 mm and its axes point right, forward
and up. Traps that are kept: betas are int16 = percent signal change x 300; regions are -1 outside the cortex; the HDF5
form has MATLAB's order, with all trials of a voxel in one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.nsd.beta_files import (
    BETA_VERSIONS,
    BETAS_FOLDER,
    LAYOUT,
    SESSION_NAME,
    VOLUME_SPACE,
)
from braindecode_vis.datasets.nsd.experiment_design import BRICK, IMAGES_FILE
from braindecode_vis.parts.phantom.formats.file_writers import (
    check_block,
    check_count,
    write_text,
    write_volume,
    write_volumes,
)
from braindecode_vis.parts.phantom.scanner import Scanner, crop_scanner, make_scanner

SCALE = 300
"""Allen et al. (2022): int16 betas are percent signal change times this."""
MOST_PERCENT = np.iinfo(np.int16).max / SCALE
"""The largest signal change that the files can hold."""
T_R = 4 / 3
"""Repetition time of the 1.8 mm preparation, which upsampled the measured 1.6 s."""
VOXEL_MM = 1.8
BETA_FORMS = ("nii.gz", "hdf5")
SHAPES = (
    (81, 104, 83), (82, 106, 84), (81, 106, 82), (85, 99, 80), (79, 97, 78), (85, 113, 83), (78, 95, 81),
    (80, 103, 78),
)  # fmt: skip
"""Volume of each subject in the published files, in voxels of 1.8 mm."""


@lru_cache(maxsize=16)
def make_subject_scanner(voxel_mm: float, subject: int) -> Scanner:
    """Return the scanner in the volume of one subject, from 1; its voxels are the same for all subjects.

    Parameters
    ----------
    voxel_mm
        1.8 gives the published shapes; other sizes give the same box in fewer voxels.
    """
    boxes = [tuple(round(n * VOXEL_MM / voxel_mm) for n in shape) for shape in SHAPES]
    # Voxels that fit into every subject's box, so that all have the same number of them.
    least = np.min(boxes, axis=0).tolist()
    common = crop_scanner(make_scanner(voxel_mm, T_R), (least[0], least[1], least[2]))
    shape = boxes[(subject - 1) % len(boxes)]
    return crop_scanner(common, (shape[0], shape[1], shape[2]))


def write_brainmask(root: Path, subject: int, scanner: Scanner) -> Path:
    """Write ``brainmask.nii.gz``: the cortex and the volume inside it."""
    from scipy.ndimage import binary_dilation, binary_fill_holes

    # The simulated cortex is a shell; dilated by one voxel it is closed.
    brain = binary_fill_holes(binary_dilation(scanner.mask))
    return write_volume(LAYOUT.place(root, "brainmask", subject=subject), brain, scanner.affine)


def write_betas(
    root: Path,
    subject: int,
    session: int,
    betas: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    n_trials: int,
    affine: np.ndarray,
    version: str = BETA_VERSIONS[-1],
    form: str = "nii.gz",
) -> Path:
    """Write ``betas_sessionBB.nii.gz`` or ``.hdf5``, int16.

    Parameters
    ----------
    betas : iterable of arrays of shape `shape`
        Percent signal change, one volume per trial; multiplied by 300 and rounded.

    Raises
    ------
    DataError
        If a value does not fit into int16 (beyond 109 %), or the volumes do not fit.
    """
    check_option("beta version", version, BETA_VERSIONS)
    stem = beta_folder(root, subject, version) / SESSION_NAME.format(session=session)
    return write_beta_file(stem, betas, shape=shape, n_trials=n_trials, affine=affine, form=form)


def write_beta_file(
    stem: Path,
    betas: Iterable[np.ndarray],
    *,
    shape: tuple[int, int, int],
    n_trials: int,
    affine: np.ndarray,
    form: str = "nii.gz",
) -> Path:
    """Write betas as ``STEM.nii.gz`` or ``STEM.hdf5``; see `write_betas`."""
    check_option("form of the betas", form, BETA_FORMS)
    path = stem.with_name(f"{stem.name}.{form}")
    volumes = scale_betas(betas, shape, path.name)
    if form == "nii.gz":
        return write_volumes(
            path, volumes, shape=shape, n_volumes=n_trials, affine=affine, dtype=np.int16, t_r=T_R
        )
    return _write_hdf5(path, volumes, shape, n_trials)


def _write_hdf5(
    path: Path, volumes: Iterable[np.ndarray], shape: tuple[int, int, int], n_trials: int
) -> Path:
    import h5py

    # All trials of a voxel are in one chunk, so the whole session is in memory: 1 GB at the published size.
    rows = list(volumes)
    check_count(len(rows), n_trials, what=path.name, unit="volumes")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        # As MATLAB writes (x, y, z, trial), Python sees the axes reversed.
        betas = file.create_dataset("betas", (n_trials, *shape[::-1]), np.int16, chunks=(n_trials, 1, 1, 1))
        for z in range(shape[2]):
            plane = np.stack([volume[:, :, z].T for volume in rows])  # (n_trials, y, x)
            # HDF5 reads parts that were not written as zeros, so empty slices need no space in the file.
            if plane.any():
                betas[:, z] = plane
    return path


def beta_folder(root: Path, subject: int, version: str) -> Path:
    """Return the folder of one version of a subject's betas."""
    return root / BETAS_FOLDER / "ppdata" / f"subj{subject:02d}" / VOLUME_SPACE / version


def scale_betas(betas: Iterable[np.ndarray], shape: tuple[int, int, int], name: str) -> Iterator[np.ndarray]:
    """Yield volumes of percent signal change as int16 for the file `name`.

    Raises
    ------
    DataError
        If a value does not fit into int16, which would be read as another number.
    """
    for trial, volume in enumerate(betas):
        scaled = np.rint(check_block(volume, shape, what=f"the betas of {name}") * SCALE)
        if np.abs(scaled).max() > np.iinfo(np.int16).max:
            raise DataError(
                f"trial {trial} of {name} reaches {np.abs(volume).max():.0f} % signal change; "
                f"int16 x {SCALE:g} ends at {MOST_PERCENT:.0f} %: lower the signal-to-noise ratio."
            )
        yield scaled.astype(np.int16)


def write_ncsnr(
    root: Path, subject: int, ncsnr: np.ndarray, affine: np.ndarray, *, version: str = BETA_VERSIONS[-1]
) -> Path:
    """Write ``ncsnr.nii.gz``, the noise-ceiling signal-to-noise ratio, beside the betas."""
    check_option("beta version", version, BETA_VERSIONS)
    return write_volume(
        beta_folder(root, subject, version) / "ncsnr.nii.gz", ncsnr.astype(np.float32), affine
    )


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
        Voxels in which the file is not -1.
    names
        Meaning of the labels; written to ``NAME.mgz.ctab``.
    """
    place = LAYOUT.place(root, "regions", subject=subject, roi=name)
    # -1 outside the cortex, as in the published regions.
    path = write_volume(place, np.where(cortex, labels, -1).astype(np.float32), affine)
    if names is not None:
        lines = [f"{label} {region}" for label, region in sorted({0: "Unknown", **names}.items())]
        write_text(LAYOUT.place(root, "names", subject=subject, roi=name), "\n".join(lines) + "\n")
    return path


def write_stimuli(root: Path, images: Iterable[np.ndarray], n_images: int, *, size: int = 425) -> Path:
    """Write ``nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5``, image by image.

    Parameters
    ----------
    images : iterable of uint8 arrays of shape (size, size, 3)
        In the order of `nsdId`.
    """
    return write_brick(root / IMAGES_FILE, images, (n_images, size, size))


def write_brick(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int]) -> Path:
    """Write an HDF5 file with ``imgBrick`` of uint8 (n_images, height, width, 3), image by image."""
    import h5py

    n_images, height, width = shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        brick = file.create_dataset(BRICK, (*shape, 3), np.uint8, chunks=(1, height, width, 3))
        count = 0
        for image in images:
            check_block(image, (height, width, 3), what="NSD stimuli")
            if image.dtype != np.uint8:
                raise DataError(f"NSD stimuli are uint8, not {image.dtype}.")
            if count < n_images:
                brick[count] = image
            count += 1
        check_count(count, n_images, what="the stimulus brick", unit="images")
    return path
