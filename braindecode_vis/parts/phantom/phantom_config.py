"""Settings of a phantom: every number that defines the simulated subjects, and its source.

Owns the configuration models and their defaults.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from pydantic import Field, model_validator

from braindecode_vis.base.settings import Settings

Feature = Literal["early", "mid", "semantic"]
Drive = Literal["embedded", "colours", "gabor", "random_network", "mixture"]
Network = Literal[
    "visual",
    "somatomotor",
    "dorsal_attention",
    "ventral_attention",
    "limbic",
    "frontoparietal",
    "default",
]
NETWORKS: tuple[Network, ...] = get_args(Network)


class ComponentConfig(Settings):
    """One stage of the visual response: its place, drive and timing.

    Parameters
    ----------
    name
        Name of the stage.
    regions
        Cortical regions (`V1`, `LO`, `FFA`, ...) or whole networks (`default`, ...) that respond.
    feature
        Part of the stimulus drive to which the stage responds.
    onset_s
        Time after stimulus onset at which the response begins.
    peak_s
        Time of the transient peak.
    sustained
        Level during the presentation, as a fraction of the peak.
    offset
        Size of the response to the disappearance of the image, as a fraction of the peak.
    strength
        Standard deviation of the source amplitude over images, in arbitrary units common to all stages.
    """

    name: str
    regions: tuple[str, ...]
    feature: Feature
    onset_s: float = Field(gt=0)
    peak_s: float = Field(gt=0)
    sustained: float = Field(default=0.2, ge=0)
    offset: float = Field(default=0.2, ge=0)
    strength: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _peak_follows_onset(self) -> ComponentConfig:
        if self.peak_s <= self.onset_s:
            raise ValueError(
                f"peak_s {self.peak_s} of stage {self.name!r} must be after its onset {self.onset_s}"
            )
        return self


VISUAL_STAGES: tuple[ComponentConfig, ...] = (
    ComponentConfig(
        name="striate",
        regions=("V1",),
        feature="early",
        onset_s=0.050,
        peak_s=0.090,
        sustained=0.15,
        offset=0.35,
        strength=1.2,
    ),
    ComponentConfig(
        name="extrastriate",
        regions=("V2", "V3"),
        feature="early",
        onset_s=0.062,
        peak_s=0.110,
        sustained=0.15,
        offset=0.3,
        strength=1.0,
    ),
    ComponentConfig(
        name="mid-level",
        regions=("hV4", "LO", "OPA"),
        feature="mid",
        onset_s=0.090,
        peak_s=0.145,
        sustained=0.25,
        offset=0.2,
        strength=1.0,
    ),
    ComponentConfig(
        name="ventral",
        regions=("LO", "FFA", "PPA", "EBA", "VWFA"),
        feature="semantic",
        onset_s=0.120,
        peak_s=0.180,
        sustained=0.5,
        offset=0.1,
        strength=1.2,
    ),
    ComponentConfig(
        name="ventral-late",
        regions=("FFA", "PPA", "EBA", "VWFA", "IT"),
        feature="semantic",
        onset_s=0.180,
        peak_s=0.250,
        sustained=0.6,
        offset=0.1,
        strength=1.0,
    ),
)
"""The visual hierarchy.

Striate onset 50-60 ms and peak near 90 ms: C1 of Di Russo et al. 2002 (doi:10.1002/hbm.10010). Extrastriate
P1 100-110 ms: the same. Mid-level 130-170 ms and object categories from 120-250 ms: Thorpe et al. 1996
(doi:10.1038/381520a0), Cichy et al. 2014 (doi:10.1038/nn.3635), Carlson et al. 2013 (doi:10.1167/13.10.1).
Offset responses: Carlson et al. 2013. Sustained levels, sizes of offset responses and strengths are our assumptions.
"""


class NetworkDrive(Settings):
    """Strength and time of the response to image semantics in a network beyond the visual hierarchy.

    Onsets after those of ventral visual cortex are our assumption; strengths follow the ranking reported by
    the WAVE network ablation (arXiv 2411.07121): default mode first, then dorsal attention.
    """

    default: float = Field(default=0.45, ge=0)
    dorsal_attention: float = Field(default=0.30, ge=0)
    frontoparietal: float = Field(default=0.15, ge=0)
    ventral_attention: float = Field(default=0.10, ge=0)
    somatomotor: float = Field(default=0.0, ge=0)
    limbic: float = Field(default=0.0, ge=0)
    dorsal_onset_s: float = 0.150
    other_onset_s: float = 0.210
    rise_s: float = Field(default=0.110, gt=0)


class NoiseConfig(Settings):
    """Composition of the noise. Sizes are relative to the system's background (its ``noise_rms``).

    Parameters
    ----------
    exponent
        Slope of the background spectrum, power ~ 1/f**exponent. 1 is pink (Donoghue et al. 2020,
        doi:10.1038/s41593-020-00744-x, report 0.8 to 2 in scalp EEG).
    spontaneous
        Fraction of the background variance that has the spatial patterns of evoked responses.
    alpha
        Rms of the occipito-parietal 10 Hz rhythm, relative to the background.
    alpha_hz
        Centre of the rhythm.
    blinks_per_minute, blink_size
        Rate (15 to 20 at rest: Bentivoglio et al. 1997, doi:10.1002/mds.870120629) and factor of the system's own blink
        amplitude (about 200 microvolt at Fp1 and Fp2).
    line
        Factor of the system's mains amplitude.
    drift
        Rms of the slow drift below 0.1 Hz, relative to the background.
    sensor
        Factor of the system's white sensor noise.
    changing
        Standard deviation of the log size with which each source of background and alpha changes every two seconds,
        in fMRI each trial and each of its shared patterns. 0 means noise with one covariance, as linear Gaussian
        decoders assume. Above 0, the ideal observer of the ground truth is no longer an upper bound, since it uses only
        the mean covariance.
    """

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"changing"})

    exponent: float = Field(default=1.0, ge=0.5, le=2.0)
    spontaneous: float = Field(default=0.5, ge=0, le=1)
    alpha: float = Field(default=0.5, ge=0)
    alpha_hz: float = Field(default=10.0, gt=6, lt=14)
    blinks_per_minute: float = Field(default=15.0, ge=0)
    blink_size: float = Field(default=1.0, ge=0)
    line: float = Field(default=1.0, ge=0)
    drift: float = Field(default=1.0, ge=0)
    sensor: float = Field(default=1.0, ge=0)
    changing: float = Field(default=0.0, ge=0, le=1)


class FmriConfig(Settings):
    """Settings of the simulated BOLD signal.

    Parameters
    ----------
    noise_percent
        Standard deviation of single-trial betas without signal, in percent signal change (our assumption, of the
        order of high-field betas such as those of Allen et al. 2022, doi:10.1038/s41593-021-00962-x).
    correlated
        Fraction of the beta noise variance that is shared between voxels.
    common_percent
        Mean response of visual cortex to any image, in percent signal change.
    ar
        Lag-1 autocorrelation of the time-series noise.
    series_noise_percent
        Standard deviation of the autocorrelated time-series noise.
    drift_percent, motion_percent
        Rms of slow drift and of motion-locked signal.
    ongoing_percent
        Rms of ongoing activity in the time series: slow fluctuations that parts of a network share, with a pattern that
        is partly individual and the same in all runs of a subject. None means the default of the format: 0.7 in a
        corpus, none elsewhere (our assumption).
    imagery_gain
        Size of imagined relative to seen responses (Breedlove et al. 2020,
        doi:10.1016/j.cub.2020.04.014, report weaker and less precise imagery signals; the factor is ours).
    imagery_early
        Extra factor on early visual drive during imagery.
    imagery_jitter
        Standard deviation of the trial-to-trial error of the imagined features, in units of their spread.
    """

    noise_percent: float = Field(default=1.5, gt=0)
    correlated: float = Field(default=0.2, ge=0, lt=1)
    common_percent: float = Field(default=0.8, ge=0)
    ar: float = Field(default=0.35, ge=0, lt=1)
    series_noise_percent: float = Field(default=1.0, ge=0)
    drift_percent: float = Field(default=0.8, ge=0)
    motion_percent: float = Field(default=0.5, ge=0)
    ongoing_percent: float | None = Field(default=None, ge=0)
    imagery_gain: float = Field(default=0.4, ge=0)
    imagery_early: float = Field(default=0.3, ge=0)
    imagery_jitter: float = Field(default=0.7, ge=0)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"ongoing_percent"})


class PhantomConfig(Settings):
    """A group of simulated subjects.

    Parameters
    ----------
    n_subjects
        Number of subjects; they are numbered from 0.
    snr
        EEG and MEG: power of the image-specific evoked response (variance over images) divided by the power of
        the ongoing noise (background, alpha and sensor noise), both averaged over channels, in the first 0.6 s
        after the onset of single trials. Blinks, mains and drift have separate sizes and do not count.
        fMRI: variance over images divided by noise variance of single-trial betas, averaged over the voxels with
        signal. Zero keeps the common response to all images and removes all differences between them.
    seed
        Root seed of every random stream.
    shared
        Fraction of the variance of the feature-to-source maps that all subjects share.
    gain_sd
        Standard deviation over subjects of the log gain of each stage.
    latency_sd_s
        Standard deviation over subjects of the latency of all stages together.
    trial_gain_sd
        Standard deviation over trials of the log amplitude of each stage.
    trial_latency_sd_s
        Standard deviation over trials of the latency of the whole response (our assumption: early sensory responses
        are locked to the stimulus within a few ms).
    evoked_eeg_v, evoked_meg_t
        Peak over channels and time of the response that all images share.
    n_semantic
        Number of latent dimensions of the features to which the higher regions respond.
    drive
        Features to which the higher regions respond, one of `braindecode_vis.parts.phantom.drive.DRIVES`.
    """

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"drive"})

    n_subjects: int = Field(default=2, ge=1)
    snr: float = Field(default=0.1, ge=0, le=1000)
    seed: int = Field(default=0, ge=0)
    shared: float = Field(default=0.5, ge=0, le=1)
    gain_sd: float = Field(default=0.15, ge=0)
    latency_sd_s: float = Field(default=0.005, ge=0, le=0.02)
    trial_gain_sd: float = Field(default=0.25, ge=0)
    trial_latency_sd_s: float = Field(default=0.005, ge=0, le=0.05)
    evoked_eeg_v: float = Field(default=5e-6, ge=0)
    evoked_meg_t: float = Field(default=200e-15, ge=0)
    n_semantic: int = Field(default=32, ge=1)
    drive: Drive = "embedded"
    stages: tuple[ComponentConfig, ...] = VISUAL_STAGES
    networks: NetworkDrive = NetworkDrive()
    noise: NoiseConfig = NoiseConfig()
    fmri: FmriConfig = FmriConfig()
