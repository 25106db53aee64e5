"""Images, masks and nuisance time courses of fMRI runs, as far as their headers and tables tell.

Owns reading a grid and a repetition time from a header, confounds through nilearn or by column, and masks. Never reads
the volumes of a run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, suggest
from braindecode_vis.datasets.bids.fmri_files import RunFiles
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.datasets.sources.bold_source import BoldRun, ConfoundsConfig, MaskMethod, check_grid
from braindecode_vis.datasets.sources.fmri_volumes import VolumeHeader, read_volume, read_volume_header

Mask = Literal["auto", "brain", "varying", "epi"] | Path


def read_table(path: Path) -> pd.DataFrame:
    """Read a BIDS table as text; nothing that looks like a number loses digits."""
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the table {path} cannot be read ({error}); fetch it again.") from error
    return table.replace(dict.fromkeys(("n/a", "N/A", "nan", "NaN"), ""))


def read_seconds(table: pd.DataFrame, column: str, path: Path) -> np.ndarray:
    """Return a column of finite numbers.

    Raises
    ------
    DataError
        If a cell is empty or no number.
    """
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(
            f"{path} has {table[column].iloc[row]!r} as {column} in row {row + 2}; a number is expected."
        )
    return values


def read_header(path: Path) -> VolumeHeader:
    """Read the head of an image of several volumes; its time step is in seconds whatever the file counts in.

    Raises
    ------
    DataError
        If the file is damaged or holds one volume only.
    """
    import nibabel

    header = read_volume_header(path)
    if header.n_volumes < 2:
        raise DataError(f"{path} holds one volume of shape {header.shape}; a run of BOLD has many.")
    image: Any = nibabel.load(path)
    unit = image.header.get_xyzt_units()[1] if hasattr(image.header, "get_xyzt_units") else "sec"
    return replace(header, t_r=header.t_r * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0))


def find_t_r(run: RunFiles, header: float, given: float | None) -> float:
    """Return the repetition time in s: the given one, or that of the sidecar, which the header must not contradict."""
    if given is not None:
        return given
    sidecar = run.sidecar.get("RepetitionTime")
    if sidecar is None and header <= 0:
        raise DataError(
            f"neither the sidecar nor the header of {run.where} gives a repetition time; set dataset.t_r."
        )
    if sidecar is None:
        return header
    # Headers that were never filled in say 0 or 1.
    if header not in (0.0, 1.0) and abs(float(sidecar) - header) > 0.005 * float(sidecar):
        raise DataError(
            f"{run.where} has a repetition time of {sidecar} s in its sidecar, but {header:g} s in its header; "
            "set dataset.t_r to the right one."
        )
    return float(sidecar)


def read_confounds(run: RunFiles, config: ConfoundsConfig) -> tuple[np.ndarray | None, tuple[Path, ...]]:
    """Return nuisance time courses of shape (n_volumes, n_confounds), or None, and the table they come from."""
    if not config.strategy and not config.columns:
        return None, ()
    if run.confounds is None:
        raise DataError(
            f"{run.where} has no table of confounds beside it; fetch it, or empty dataset.confounds."
        )
    if config.columns:
        table = read_table(run.confounds)
        for name in config.columns:
            if name not in table.columns:
                near = suggest(name, list(table.columns))
                raise DataError(
                    f"{run.confounds} has no column {name!r}{near}; correct dataset.confounds.columns."
                )
        picked = table[list(config.columns)].apply(pd.to_numeric, errors="coerce")
        filled = picked.bfill(limit=1)
        if filled.isna().to_numpy().any():
            name = str(filled.columns[filled.isna().any()][0])
            raise DataError(f"{run.confounds} has gaps in the column {name!r} after its first volume.")
        return filled.to_numpy(float), (run.confounds,)
    from nilearn.interfaces.fmriprep import load_confounds

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table, _ = load_confounds(
                str(run.image), strategy=config.strategy, motion=config.motion, wm_csf=config.wm_csf,
                global_signal=config.global_signal, demean=False,
                n_compcor="all" if config.n_compcor is None else config.n_compcor,
            )  # fmt: skip
    except (ValueError, FileNotFoundError, KeyError) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"nilearn cannot load the confounds {', '.join(config.strategy)} of {run.where}: {text}; "
            "name columns with dataset.confounds.columns instead."
        ) from error
    return np.nan_to_num(table.bfill(limit=1).to_numpy(float)), (run.confounds,)


def find_masks(
    files: Sequence[RunFiles], runs: Sequence[BoldRun], mask: Mask
) -> Geometry | Mapping[str, Geometry] | MaskMethod:
    """Return the mask of each subject, of all, or the way to find it in the images."""
    if mask == "auto":
        mask = "brain" if all(run.mask is not None for run in files) else "epi"
    if isinstance(mask, Path):
        return read_mask(mask.expanduser())
    if mask != "brain":
        return mask
    masks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for run, opened in zip(files, runs, strict=True):
        if run.mask is None:
            raise DataError(
                f"{run.where} has no brain mask beside it; set dataset.mask to epi, varying or a file."
            )
        found = read_mask(run.mask)
        assert found.mask is not None
        assert found.affine is not None
        check_grid(
            opened.shape,
            opened.affine,
            found.mask.shape,
            found.affine,
            what=opened.where,
            than="its brain mask",
        )
        subject = run.entities["sub"]
        both = masks[subject][0] & found.mask if subject in masks else found.mask
        masks[subject] = (both, found.affine)
    if len({m.shape for m, _ in masks.values()}) == 1 and _is_template(files):
        common = np.logical_and.reduce([m for m, _ in masks.values()])
        return Geometry.from_mask(common, next(iter(masks.values()))[1])
    return {subject: Geometry.from_mask(m, affine) for subject, (m, affine) in masks.items()}


def _is_template(files: Sequence[RunFiles]) -> bool:
    return all(run.entities.get("space", "").startswith("MNI") for run in files)


def read_mask(path: Path) -> Geometry:
    """Return the voxels above zero of an image.

    Raises
    ------
    DataError
        If the file is missing, is not one volume, or holds no such voxel.
    """
    values, affine = read_volume(path)
    if not (values > 0).any():
        raise DataError(f"the mask {path} has no voxel above zero.")
    return Geometry.from_mask(values > 0, affine)
