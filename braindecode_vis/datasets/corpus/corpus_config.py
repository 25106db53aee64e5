"""Settings of a corpus: its channels, its sampling, cleaning of runs, and storage.

References
----------
Power et al. (2014), doi:10.1016/j.neuroimage.2013.08.048: scrubbing by framewise displacement.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from braindecode_vis.base.registry import ByKind
from braindecode_vis.base.settings import Settings
from braindecode_vis.datasets.sources.bold_source import ConfoundsConfig


class FmriCleaningConfig(Settings):
    """How the time series of fMRI are cleaned, and which runs are left out for motion.

    Parameters
    ----------
    confounds
        Nuisance time courses that are regressed out. Volumes and surfaces of fMRIPrep need its table beside them. Files
        without a table that are parcellated or CIFTI count as cleaned, as do all ``desc-denoised`` and ``_clean``
        files. For runs of the HCP that are not cleaned, only motion and drifts are regressed out.
    l_freq, h_freq
        Band in Hz; None leaves an end open.
    detrend
        Whether a linear trend is removed from each run.
    scrubbing
        Treatment of volumes with motion: ``interpolate`` replaces them from their neighbours, ``cut`` removes them,
        ``none`` keeps them.
    scrub_mm
        Framewise displacement (mm) above which a volume is scrubbed.
    scrub_dvars
        Standardised DVARS of fMRIPrep above which a volume is scrubbed, too; with None, only motion is used.
    scrub_segment
        Stretches of fewer volumes between scrubbed ones are scrubbed, too.
    max_scrubbed
        Largest share of the volumes of a run that may be scrubbed before the run is left out.
    max_motion_mm
        Mean framewise displacement (mm) above which a run is left out; with None, all runs are kept.
    """

    confounds: ConfoundsConfig = ConfoundsConfig(strategy=("motion", "wm_csf", "high_pass"))
    l_freq: float | None = Field(default=None, gt=0)
    h_freq: float | None = Field(default=None, gt=0)
    detrend: bool = True
    scrubbing: Literal["interpolate", "cut", "none"] = "interpolate"
    # Power et al. (2014): 0.5 mm to keep most volumes, 0.2 mm if little motion may remain.
    scrub_mm: float = Field(default=0.5, gt=0)
    scrub_dvars: float | None = Field(default=None, gt=0)
    scrub_segment: int = Field(default=0, ge=0)
    max_scrubbed: float = Field(default=0.3, ge=0, le=1)
    max_motion_mm: float | None = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _check_cleaning(self) -> Self:
        if self.l_freq is not None and self.h_freq is not None and self.l_freq >= self.h_freq:
            raise ValueError(f"l_freq {self.l_freq:g} Hz must be below h_freq {self.h_freq:g} Hz")
        if self.scrubbing == "none":
            unused = ("scrub_mm", "scrub_dvars", "scrub_segment", "max_scrubbed")
            self.refuse_unused(*unused, because="scrubbing is none")
        return self


class FmriChannels(Settings):
    """Parcels of an atlas.

    Parameters
    ----------
    atlas
        Name of the atlas: ``schaefer100`` to ``schaefer1000`` in hundreds, ``glasser``, ``a424``, ``aal``, or ``own``
        for the atlas in `files`.
    networks
        Number of networks of Yeo et al. in the names of Schaefer's parcels: 7 or 17.
    files
        The atlas in every form that the sources need: label volumes (NIfTI; one for each grid), a CIFTI dlabel file,
        and pairs of a left and a right ``.annot`` or ``.label.gii``. By default the files that nilearn has fetched.
        Data that are already parcellated need only a table of names.
    labels
        Table of the names: a number and a name per line, in the order of the channels. With a header line, columns
        `network` and `x`, `y`, `z` (mm) are read, too.
    resample
        Accept a volume in the same space on another grid.
    space
        Space of the preprocessed images, as written in their names; with None, the space of the atlas.
    min_coverage
        Smallest share of the voxels or vertices of a parcel that a run must hold; a parcel with less is missing there.
    cleaning
        How time series are cleaned.
    """

    kind: Literal["fmri"] = "fmri"
    atlas: str = "schaefer400"
    networks: Literal[7, 17] = 7
    files: tuple[Path, ...] = ()
    labels: Path | None = None
    resample: bool = False
    space: str | None = None
    # The bound of XCP-D.
    min_coverage: float = Field(default=0.5, gt=0, le=1)
    cleaning: FmriCleaningConfig = FmriCleaningConfig()

    # Files are identified by their digest, which the corpus stores.
    not_hashed: ClassVar[frozenset[str]] = frozenset({"files", "labels"})

    @field_validator("atlas")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"schaefer(10|[1-9])00|glasser|a424|aal|own", value):
            raise ValueError(
                f"the atlas {value!r} is not known: name schaefer100 to schaefer1000 in hundreds, glasser, a424, aal, "
                "or own with files"
            )
        return value

    @model_validator(mode="after")
    def _check_atlas(self) -> Self:
        if not self.atlas.startswith("schaefer"):
            self.refuse_unused("networks", because=f"the parcels of {self.atlas} are named after no networks")
        return self


class MeegChannels(Settings):
    """Sensors of EEG or MEG by name, and how their samples are cleaned.

    Parameters
    ----------
    modality
        ``eeg`` or ``meg``.
    names
        Sensors of the corpus; if empty, those of the 10-20 system for EEG, and all of the first recording for MEG.
    aliases
        Pairs of another name of a sensor and its name in the corpus: ``[[T3, T7], [T4, T8]]``.
    sfreq
        Sampling rate (Hz) to which all recordings are resampled.
    l_freq, h_freq
        Band in Hz; None leaves an end open.
    notch
        Frequencies in Hz, for example ``[50, 100]``.
    reference
        ``average`` of all good electrodes, or ``none`` for the reference of the recording.
    bad_channels
        Sensors that a recording marks as bad: ``interpolate`` from the others, or ``mask`` as missing.
    absent
        Sensors of the corpus that a recording does not have: ``interpolate`` from the others, or ``mask`` as missing.
    """

    kind: Literal["meeg"] = "meeg"
    modality: Literal["eeg", "meg"] = "eeg"
    names: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    sfreq: float = Field(default=200.0, gt=0)
    l_freq: float | None = Field(default=0.5, gt=0)
    h_freq: float | None = Field(default=75.0, gt=0)
    notch: tuple[float, ...] = ()
    reference: Literal["average", "none"] = "average"
    bad_channels: Literal["interpolate", "mask"] = "interpolate"
    absent: Literal["interpolate", "mask"] = "mask"

    @model_validator(mode="after")
    def _check_filter(self) -> Self:
        if self.l_freq is not None and self.h_freq is not None and self.l_freq >= self.h_freq:
            raise ValueError(f"l_freq {self.l_freq:g} Hz must be below h_freq {self.h_freq:g} Hz")
        if self.h_freq is not None and self.h_freq > self.sfreq / 2:
            raise ValueError(f"h_freq {self.h_freq:g} Hz is above half of sfreq {self.sfreq:g} Hz")
        return self


ChannelsConfig = Annotated[FmriChannels | MeegChannels, ByKind()]


class CorpusConfig(Settings):
    """Content of a corpus, fixed when its first source is added.

    Parameters
    ----------
    channels
        Parcels of an atlas, or sensors of EEG or MEG.
    time
        ``resample`` resamples all runs to one interval; ``encode`` keeps the interval of each run and gives it to the
        network as an input. EEG and MEG have the rate of `channels.sfreq` and are always resampled.
    interval_s
        Interval of fMRI (s) with ``resample``.
    missing
        Channels that a run does not have: ``mask`` marks them, ``refuse`` makes them an error.
    max_missing
        Largest share of missing channels; a run with more is left out.
    min_duration_s
        Runs shorter than this (s) are left out.
    scaling
        ``zscore``: each channel of a run minus its mean, over its standard deviation; ``none``.
    dtype
        Data type of the stored numbers; ``float16`` needs ``zscore``.
    shard_mb
        Size of a shard (MB); a run is never divided.
    held_out
        Share of the persons of each source whose runs are never used for training; at least one person in total.
    """

    channels: ChannelsConfig = FmriChannels()
    time: Literal["resample", "encode"] = "resample"
    # A value between the 0.7 s of the HCP and the 2 to 3 s of most archives.
    interval_s: float = Field(default=2.0, gt=0)
    missing: Literal["mask", "refuse"] = "mask"
    max_missing: float = Field(default=0.5, ge=0, lt=1)
    min_duration_s: float = Field(default=30.0, ge=0)
    scaling: Literal["zscore", "none"] = "zscore"
    dtype: Literal["float16", "float32"] = "float16"
    shard_mb: float = Field(default=128.0, gt=0)
    held_out: float = Field(default=0.05, ge=0, lt=1)

    # Shard size and held-out persons do not change the samples.
    not_hashed: ClassVar[frozenset[str]] = frozenset({"shard_mb", "held_out"})

    @model_validator(mode="after")
    def _check_time(self) -> Self:
        if self.scaling == "none" and self.dtype == "float16":
            raise ValueError(
                "float16 is possible only for scaled values; set dtype to float32, or scaling to zscore"
            )
        if self.time == "encode":
            self.refuse_unused("interval_s", because="time is encode")
        if isinstance(self.channels, MeegChannels):
            self.refuse_unused("interval_s", "time", because="EEG and MEG have the rate of channels.sfreq")
        return self
