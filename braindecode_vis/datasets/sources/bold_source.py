"""The interface from loaders of BOLD time series to preprocessing: runs, trials, and the computation of responses.

Owns the lazy description of each run (image, timing, trials, confounds), the model that turns time series into one
response per trial, and the mask. A loader fills these in and reads no volumes; `braindecode_vis.preprocessing.bold`
computes. Contains no file names.

References
----------
Mumford, Turner, Ashby, Poldrack (2012), doi:10.1016/j.neuroimage.2011.08.076: one model per trial (LSS).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import TRIAL_COLUMNS
from braindecode_vis.base.checks import DataError, check_columns
from braindecode_vis.base.registry import ByKind
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.sources.betas_source import BetasPlan, Geometry
from braindecode_vis.datasets.sources.fmri_volumes import VolumeHeader

if TYPE_CHECKING:
    import pandas as pd

MaskMethod = Literal["varying", "epi"]


class CleanConfig(Settings):
    """Components that are removed from each voxel's time series, run by run, before responses are computed.

    Parameters
    ----------
    drift
        Slow drifts: discrete cosines up to a period, Legendre polynomials up to an order, or none.
    cutoff
        Shortest period (s) that the cosines model.
    order
        Degree of the polynomials.
    scaling
        ``percent`` of the voxel's mean in the run, ``zscore`` over the volumes of the run, or ``none``. The whole run
        is used, without labels.
    """

    drift: Literal["cosine", "polynomial", "none"] = "cosine"
    # SPM's default.
    cutoff: float = Field(default=128.0, gt=0)
    order: int = Field(default=1, ge=0, le=10)
    scaling: Literal["percent", "zscore", "none"] = "percent"

    def hashed_fields(self) -> dict[str, Any]:
        """Leave out the number that the chosen drift does not use."""
        fields = super().hashed_fields()
        # Two runs that differ only in an unused number are the same run.
        unused = {"cosine": ("order",), "polynomial": ("cutoff",), "none": ("cutoff", "order")}[self.drift]
        return {key: value for key, value in fields.items() if key not in unused}


class GlmConfig(Settings):
    """One amplitude per trial by a general linear model with a canonical response.

    Parameters
    ----------
    trials
        ``lss``: one model per trial, all other trials of the run as one regressor. ``lsa``: all trials in one model.
    hrf_model
        Canonical response of nilearn.
    noise_model
        ``ols``: ordinary least squares. ``ar1``: noise is autoregressive of the first order, with one coefficient per
        voxel and run, as in nilearn.
    clean
        Drifts join the model; scaling comes first.
    """

    kind: Literal["glm"] = "glm"
    # Mumford et al. (2012): less collinear than one model of all trials if these follow each other quickly.
    trials: Literal["lss", "lsa"] = "lss"
    hrf_model: Literal["glover", "spm"] = "glover"
    noise_model: Literal["ols", "ar1"] = "ols"
    clean: CleanConfig = CleanConfig()


class GlmByVoxelConfig(Settings):
    """One amplitude per trial by a general linear model that is chosen for each voxel, as GLMsingle does.

    Of 20 response functions each voxel gets the one that explains it best. Noise components come from voxels that
    trials do not explain. A ridge penalty shrinks the estimates of a voxel. Number of components and penalties are
    those with which estimates of one picture agree best between runs, so pictures must recur in another run of the
    person; without such a picture they are left out, and the report says so. Drifts are polynomials up to half as many
    degrees as a run has minutes, and estimates are in percent of the voxel's mean.

    Parameters
    ----------
    denoise
        Whether to use noise components.
    ridge
        Whether to use ridge penalties.
    per_split
        Whether everything is chosen in runs without test trials. By default all runs of a person are used, test trials
        included, as GLMsingle is published; the protocol of every score says so.

    References
    ----------
    Prince et al. (2022). Improving the accuracy of single-trial fMRI response estimates using GLMsingle. eLife 11,
    e77599. doi:10.7554/eLife.77599
    """

    kind: Literal["glm_by_voxel"] = "glm_by_voxel"
    denoise: bool = True
    ridge: bool = True
    per_split: bool = False


class WindowConfig(Settings):
    """Volumes in a window around each trial, after cleaning.

    Parameters
    ----------
    start
        Start of the window, in s after the onset.
    stop
        Its end (excluded), in s after `until`.
    until
        Whether the end counts from the ``onset`` or from the ``offset`` of the trial; use ``offset`` for blocks.
    keep
        ``mean`` averages the volumes of a trial; ``volumes`` keeps each volume as a separate row, with the same
        stimulus and the columns `volume` and `time` (s after the onset); ``times`` keeps them as a third axis.
    clean
        Cleaning of the time series before the window is cut.
    max_dropped
        Largest share of the trials of the data set that may be left out because their window reaches beyond their run;
        more are an error. A single such trial is always left out, unless this is 0.
    """

    kind: Literal["window"] = "window"
    # The canonical response peaks 5 to 6 s after the onset.
    start: float = 4.0
    stop: float = 8.0
    until: Literal["onset", "offset"] = "onset"
    keep: Literal["mean", "volumes", "times"] = "mean"
    clean: CleanConfig = CleanConfig(scaling="zscore")
    # As for epochs: a run may be stopped slightly too early; one in a hundred means another image.
    max_dropped: float = Field(default=0.01, ge=0, lt=1)

    # A bound for an error does not change the numbers.
    not_hashed: ClassVar[frozenset[str]] = frozenset({"max_dropped"})

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        if self.until == "onset" and self.stop <= self.start:
            raise ValueError(
                f"the window ends at {self.stop} s, but starts at {self.start} s after the onset"
            )
        if self.until == "offset" and self.keep == "times":
            raise ValueError("times need windows of equal length; set until to onset")
        return self


ModelConfig = Annotated[GlmConfig | GlmByVoxelConfig | WindowConfig, ByKind()]


class ConfoundsConfig(Settings):
    """Nuisance time courses that are regressed out.

    Parameters
    ----------
    strategy
        Families of confounds by their names in nilearn, loaded from fMRIPrep's table; empty for none.
    motion, wm_csf, global_signal
        Expansion of each family of the strategy.
    n_compcor
        Number of anatomical components of ``compcor``; None for all.
    columns
        Names of columns instead, from any table, also of old fMRIPrep versions. A missing value in the first volume
        becomes the next value.
    """

    strategy: tuple[Literal["motion", "wm_csf", "global_signal", "compcor", "high_pass"], ...] = ()
    motion: Literal["basic", "power2", "derivatives", "full"] = "basic"
    wm_csf: Literal["basic", "power2", "derivatives", "full"] = "basic"
    global_signal: Literal["basic", "power2", "derivatives", "full"] = "basic"
    n_compcor: int | None = Field(default=None, ge=1)
    columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self.strategy and self.columns:
            raise ValueError("give confounds.strategy or confounds.columns, not both")
        if "compcor" in self.strategy and "high_pass" not in self.strategy:
            raise ValueError("compcor was computed on filtered data and needs high_pass in the strategy")
        own = {
            "motion": "motion",
            "wm_csf": "wm_csf",
            "global_signal": "global_signal",
            "n_compcor": "compcor",
        }
        for name, family in own.items():
            if family not in self.strategy:
                self.refuse_unused(name, because=f"confounds.strategy does not name {family}")
        return self


@dataclass(frozen=True)
class BoldRun:
    """One run of BOLD with its trials.

    Parameters
    ----------
    trials : DataFrame
        One row per trial: `onset` and `duration` (s), the columns of every trial table, and `concept`.
    others : DataFrame
        `onset`, `duration` and `trial_type` of events that are not trials but must be in a model.
    header
        Header of the image.
    t_r
        Repetition time (s).
    start_s
        Time of the samples of a volume after its start (s).
    confounds : array of shape (n_volumes, n_confounds)
        Nuisance time courses; finite.
    files
        All files that were read, the image first.
    """

    trials: pd.DataFrame
    others: pd.DataFrame
    header: VolumeHeader
    t_r: float
    start_s: float
    confounds: np.ndarray
    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        needed = ("onset", "duration", *TRIAL_COLUMNS, "concept")
        check_columns(self.trials.columns, needed, what=f"the trials of {self.where}")
        check_columns(
            self.others.columns, ("onset", "duration", "trial_type"), what=f"other events of {self.where}"
        )
        if len(self.confounds) != self.n_volumes:
            raise DataError(
                f"{self.where} has {self.n_volumes} volumes, but its confounds have {len(self.confounds)} rows."
            )

    def check_onsets(self, *, most: float) -> None:
        """Raise `DataError` if more than this share of the trials starts after the end of the run."""
        end = self.n_volumes * self.t_r
        late = self.trials["onset"] >= end
        if late.mean() > most:
            worst = self.trials[late].iloc[0]
            raise DataError(
                f"{self.where}: {int(late.sum())} of {len(late)} trials start after the end of the run at {end:g} s "
                f"({self.n_volumes} volumes of {self.t_r:g} s), first {worst['stimulus_id']} at "
                f"{worst['onset']:g}; the onsets are not in seconds, or the image was cut."
            )

    @property
    def image(self) -> Path:
        """The 4-D file."""
        return self.header.path

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one volume."""
        return self.header.shape

    @property
    def affine(self) -> np.ndarray:
        """Affine from voxel indices to mm, shape (4, 4)."""
        return self.header.affine

    @property
    def n_volumes(self) -> int:
        """Number of volumes."""
        return self.header.n_volumes

    @property
    def subject(self) -> str:
        """Label of the subject."""
        return self.group[0]

    @property
    def group(self) -> tuple[str, str]:
        """Subject and session."""
        return str(self.trials["subject"].iloc[0]), str(self.trials["session"].iloc[0])

    @property
    def where(self) -> str:
        """Subject, session, run and file, for messages."""
        row = self.trials.iloc[0]
        return f"subject {row['subject']}, session {row['session']}, run {row['run']}, file {self.image.name}"

    @property
    def frame_times(self) -> np.ndarray:
        """Time of each volume in s, shape (n_volumes,)."""
        return self.start_s + self.t_r * np.arange(self.n_volumes)


@dataclass(frozen=True)
class BoldSource:
    """A whole data set of time series, ready to be streamed run by run.

    Parameters
    ----------
    runs
        In the order of the trials; runs of one subject and session are consecutive.
    stimuli
        Every image of a trial.
    model
        How responses are computed.
    plan
        Processing of the responses after that.
    geometry
        One mask for all subjects or one for each, or the method that computes it from the images: voxels that vary in
        every run (``varying``), or nilearn's brain mask of echo-planar images (``epi``).
    max_constant
        Largest share of the voxels of a mask that may be constant in a run; more are an error. Constant voxels get the
        response 0 in that run.
    notes
        Remarks for readers of the store.
    read_image
        As in `FmriSource`.
    """

    runs: tuple[BoldRun, ...]
    stimuli: StimulusSet
    model: ModelConfig
    plan: BetasPlan
    geometry: Geometry | Mapping[str, Geometry] | MaskMethod
    # Our choice: the edge of a slab may be outside in one run; more means the mask of another image.
    max_constant: float = 0.05
    notes: Mapping[str, Any] = field(default_factory=dict)
    read_image: Callable[[int], np.ndarray] | None = None

    not_empty: ClassVar[str] = "no run of BOLD was found; check the root, the task and the list of subjects."

    def __post_init__(self) -> None:
        if not self.runs:
            raise DataError(self.not_empty)
        first: dict[str, BoldRun] = {}
        # A model cannot estimate a late trial. Windows leave single ones out, but onsets in milliseconds or volumes
        # would give very many.
        most = 0.5 if isinstance(self.model, WindowConfig) else 0.0
        for run in self.runs:
            run.check_onsets(most=most)
            subject = run.subject
            # With one mask for all, all must share its grid.
            # Otherwise every subject has its own grid.
            key = "" if isinstance(self.geometry, Geometry) else subject
            other = first.setdefault(key, run)
            check_grid(run.shape, run.affine, other.shape, other.affine, what=run.where, than=other.where)
            geometry = self.find_geometry(subject)
            if geometry is not None and geometry.mask is not None and geometry.affine is not None:
                check_grid(
                    run.shape,
                    run.affine,
                    geometry.mask.shape,
                    geometry.affine,
                    what=run.where,
                    than="the mask",
                )

    def find_geometry(self, subject: str) -> Geometry | None:
        """Return the mask of a subject, or None if it is computed from the images later."""
        if isinstance(self.geometry, str):
            return None
        return self.geometry if isinstance(self.geometry, Geometry) else self.geometry[subject]


def check_grid(
    shape: tuple[int, ...],
    affine: np.ndarray,
    other_shape: tuple[int, ...],
    other: np.ndarray,
    *,
    what: str,
    than: str,
) -> None:
    """Raise `DataError` unless two images have the same grid, up to a hundredth of a millimetre."""
    if tuple(shape) != tuple(other_shape):
        raise DataError(
            f"{what} has volumes of shape {tuple(shape)}, but {than} {tuple(other_shape)}: they are in "
            "different spaces."
        )
    # Under an affine map no voxel moves farther than the farthest corner, so eight points bound all distances.
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
    apart = float(np.abs(corners @ (np.asarray(affine) - np.asarray(other)).T).max())
    if apart > 0.01:
        raise DataError(
            f"{what} has the shape of {than}, but is up to {apart:.2f} mm away from it (another affine); "
            "use images that were resampled to one space."
        )
