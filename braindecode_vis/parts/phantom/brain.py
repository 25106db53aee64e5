"""The neural ground truth of one simulated subject.

A subject is a chain of stages. A stage is driven by one family of stimulus features, through a map from features to
cortical positions (partly shared by all subjects, partly individual) and one time course, so the response to an image
is a sum over stages of (map x features) x time course. Owns maps, time courses and trial-to-trial variability; sensors,
noise and files are in other modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braindecode_vis.base.checks import ConfigError, check_option
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.phantom.cortex import REGIONS, compute_receptive_fields, find_members
from braindecode_vis.parts.phantom.drive import EARLY_GRID, MID_GRID, MIXED, N_EARLY, N_MID, StimulusDrive
from braindecode_vis.parts.phantom.phantom_config import NETWORKS, ComponentConfig, PhantomConfig

FIELD_LENGTH_MM = 9.0
"""Correlation length of tuning along cortex; larger than columns, as only clustered tuning reaches sensors."""
RESPONSE_S = 1.5
"""A response ends this time after the end of the presentation, with a fade over the last `FADE_S`."""
FADE_S = 0.3


@dataclass(frozen=True, eq=False)
class Person:
    """A simulated subject who sees the images of one drive.

    Parameters
    ----------
    config
        The group of the subject.
    index
        Number of the subject, from 0.
    drive
        The images that the subject can see.
    stages
        The visual hierarchy and the networks beyond it, with the gain and the latency of this subject.
    """

    config: PhantomConfig
    index: int
    drive: StimulusDrive
    stages: tuple[ComponentConfig, ...]

    @property
    def name(self) -> str:
        """BIDS label without prefix, for example ``01``."""
        return f"{self.index + 1:02d}"

    @property
    def onset_s(self) -> float:
        """Earliest latency of any stimulus response of this subject, in s."""
        return min(stage.onset_s for stage in self.stages if stage.strength > 0)


def make_person(config: PhantomConfig, subject_index: int, drive: StimulusDrive) -> Person:
    """Return subject number `subject_index` (from 0) of the group.

    Raises
    ------
    ConfigError
        If the group has no such subject or a stage names an unknown region.
    """
    if not 0 <= subject_index < config.n_subjects:
        raise ConfigError(
            f"subject index {subject_index} does not exist: the phantom has {config.n_subjects} subject(s), from 0."
        )
    generator = make_generator(config.seed, "person", subject_index)
    # One shift of latency for all stages of a subject. Clipped, so that the order of latencies stays plausible.
    shift = float(np.clip(config.latency_sd_s * generator.standard_normal(), -0.02, 0.02))
    stages = []
    for stage in (*config.stages, *_make_network_stages(config)):
        for region in stage.regions:
            check_option(f"region of stage {stage.name!r}", region, (*REGIONS, *NETWORKS))
        gain = float(np.exp(config.gain_sd * generator.standard_normal()))
        onset_s = max(0.02, stage.onset_s + shift)
        own = {
            "onset_s": onset_s,
            "peak_s": onset_s + stage.peak_s - stage.onset_s,
            "strength": stage.strength * gain,
        }
        stages.append(stage.model_copy(update=own))
    return Person(config=config, index=subject_index, drive=drive, stages=tuple(stages))


def get_features(person: Person, stage: ComponentConfig, rows: np.ndarray) -> np.ndarray:
    """Return the features that drive a stage, float32 (n_rows, n_features).

    A row of -1 is an event without image content (a target, a blank): its features are zero, the mean over images.
    """
    rows = np.asarray(rows, dtype=int)
    features = getattr(person.drive, stage.feature)[np.clip(rows, 0, None)]  # -1 is set to zero below
    return np.where((rows >= 0)[:, None], features, np.float32(0))


def compute_weights(
    person: Person, stage: ComponentConfig, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the map from features to the source amplitudes of a stage.

    Parameters
    ----------
    person, stage
        The subject and the stage of the map.
    positions : array of shape (n_positions, 3)
        MNI coordinates in mm; the same position has the same tuning on the surface and in a voxel.

    Returns
    -------
    members : integer array of shape (n_members,)
        Positions that belong to the stage.
    weights : float32 array of shape (n_members, n_features)
        Scaled so that the amplitude varies over training images with standard deviation `stage.strength`,
        averaged over members.
    """
    members = find_members(positions, stage.regions)
    points = positions[members]
    config = person.config
    source = _find_source(person, stage)
    own = _draw_map(person.drive, stage, points, config.seed, f"person-{person.index}", source)
    common = _draw_map(person.drive, stage, points, config.seed, "everyone", source)
    # Variances add, so the shares of the two maps are shares of variance.
    weights = np.sqrt(config.shared) * common + np.sqrt(1 - config.shared) * own
    return members, (
        weights * (stage.strength / max(_measure_spread(person.drive, stage, weights), 1e-30))
    ).astype(np.float32)


def compute_common_amplitudes(
    person: Person, stage: ComponentConfig, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return members of a stage and their response to any image, positive, of mean `stage.strength`."""
    members = find_members(positions, stage.regions)
    field = draw_fields(positions[members], 1, person.config.seed, "common", stage.name, person.index)[:, 0]
    # Log-normal over positions: every member responds, all with the same sign.
    return members, (stage.strength * np.exp(0.3 * field)).astype(np.float32)


def compute_time_course(stage: ComponentConfig, times: np.ndarray, duration_s: float) -> np.ndarray:
    """Return the response of a stage to an image shown from 0 to `duration_s`, with a transient peak of 1.

    Zero up to the onset latency, then a gamma-shaped transient with an undershoot, a constant level during the
    presentation, and a response to the offset with the latency of the onset.

    Parameters
    ----------
    times : array of shape (n_times,)
        Time from stimulus onset, in s.
    """
    rise = stage.peak_s - stage.onset_s
    course = _compute_transient(times - stage.onset_s, rise)
    if stage.sustained > 0:
        since = times - stage.onset_s
        up = 1 - np.exp(-np.clip(since, 0, None) / rise)
        # The level reached at the offset decays more slowly than it rose.
        held = 1 - np.exp(-duration_s / rise)
        down = held * np.exp(-np.clip(since - duration_s, 0, None) / (1.5 * rise))
        course = course + stage.sustained * np.where(since < duration_s, up, down)
    if stage.offset > 0:
        course = course + stage.offset * _compute_transient(times - stage.onset_s - duration_s, rise)
    fade = np.clip((duration_s + RESPONSE_S - times) / FADE_S, 0, 1)
    return course * fade**2 * (3 - 2 * fade)  # smooth at both ends, so that a high-pass finds no edge


def draw_trials(person: Person, n_trials: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the deviations of each trial from the mean response.

    Returns
    -------
    gains : float array of shape (n_trials, n_stages)
        Amplitude of each stage; mean square 1, so that the signal-to-noise ratio is kept.
    delays_s : float array of shape (n_trials,)
        Latency of the whole response relative to the subject's own, within three standard deviations.
    """
    config = person.config
    generator = make_generator(config.seed, "trials", person.index, name)
    spread = config.trial_gain_sd
    draws = generator.standard_normal((n_trials, len(person.stages) + 1))
    gains = np.exp(spread * draws[:, 1:] - spread**2)  # E[gain**2] = exp(2 s**2 - 2 s**2) = 1
    return gains, config.trial_latency_sd_s * np.clip(draws[:, 0], -3, 3)


def draw_fields(
    points: np.ndarray, n_fields: int, seed: int, *names: str | int, length_mm: float = FIELD_LENGTH_MM
) -> np.ndarray:
    """Draw smooth random functions of position, of unit variance.

    Random Fourier features of a Gaussian kernel (Rahimi and Recht 2007), so that surface sources and voxels at the
    same place get the same value.

    Parameters
    ----------
    points : array of shape (n_points, 3)
        MNI coordinates in mm.
    n_fields
        Number of independent functions.
    seed, names
        Root seed and names of the random stream.
    length_mm
        Correlation length.

    Returns
    -------
    fields : float array of shape (n_points, n_fields)
    """
    generator = make_generator(seed, "field", *names)
    n_waves = 192  # enough that a sum of cosines is close to Gaussian
    waves = generator.standard_normal((3, n_waves)) / length_mm
    phases = generator.uniform(0, 2 * np.pi, n_waves)
    amplitudes = generator.standard_normal((n_waves, n_fields))
    return np.cos(points @ waves + phases) @ amplitudes * np.sqrt(2 / n_waves)


def _make_network_stages(config: PhantomConfig) -> tuple[ComponentConfig, ...]:
    drive = config.networks
    stages = []
    for network in NETWORKS:
        strength = getattr(drive, network, 0.0)
        if strength <= 0:
            continue
        # Dorsal attention responds immediately, the other networks later: our assumption, see `NetworkDrive`.
        onset = drive.dorsal_onset_s if network == "dorsal_attention" else drive.other_onset_s
        stages.append(
            ComponentConfig(
                name=network,
                regions=(network,),
                feature="semantic",
                onset_s=onset,
                peak_s=onset + drive.rise_s,
                sustained=0.3,
                offset=0.0,
                strength=strength,
            )
        )
    return tuple(stages)


def _compute_transient(times: np.ndarray, rise: float) -> np.ndarray:
    """Gamma function that starts at 0 and peaks at `rise` with value 1, minus a slower undershoot."""
    # t**2 exp(-2 t) peaks at 1; the undershoot is 2.5 times as slow and starts when the transient peaks.
    first = np.clip(times / rise, 0, None)
    second = np.clip(times / (2.5 * rise) - 0.4, 0, None)
    return first**2 * np.exp(2 * (1 - first)) - 0.4 * second**2 * np.exp(2 * (1 - second))


def _find_source(person: Person, stage: ComponentConfig) -> int | None:
    """Return the source of a mixture that drives a stage: higher stages alternate; None means all sources."""
    if person.config.drive != "mixture" or stage.feature != "semantic":
        return None
    higher = [one.name for one in person.stages if one.feature == "semantic"]
    return higher.index(stage.name) % len(MIXED)


def _draw_map(
    drive: StimulusDrive,
    stage: ComponentConfig,
    points: np.ndarray,
    seed: int,
    owner: str,
    source: int | None,
) -> np.ndarray:
    """Draw one unit-spread map, (n_points, n_features); `source` is the part of a mixture that drives the stage."""
    names = (seed, "map", stage.name, owner)
    if stage.feature == "semantic":
        fields = draw_fields(points, drive.semantic.shape[1], *names)
        return fields if source is None else fields * (np.arange(fields.shape[1]) % len(MIXED) == source)
    n_features, grid = (N_EARLY, EARLY_GRID) if stage.feature == "early" else (N_MID, MID_GRID)
    n_tunings = n_features // grid**2
    # Energy drives every early source; the preference for scale and orientation varies along the surface.
    mean = 0.7 if stage.feature == "early" else 0.0
    tuning = mean + draw_fields(points, n_tunings, *names)  # (n_points, n_tunings)
    fields = compute_receptive_fields(points, grid)  # (n_points, grid, grid)
    if stage.feature == "mid":
        fields = 0.5 * fields + 0.5 / grid**2  # receptive fields grow along the ventral stream
    weights = (fields[..., None] * tuning[:, None, None, :]).reshape(len(points), n_features)
    return weights / max(_measure_spread(drive, stage, weights), 1e-30)


def _measure_spread(drive: StimulusDrive, stage: ComponentConfig, weights: np.ndarray) -> float:
    """Return the root mean square over training images and members of the amplitude that `weights` give."""
    train = np.flatnonzero(drive.is_train)
    # A thousand images give the spread to a few percent; it is a scale, not a statistic of the data.
    features = getattr(drive, stage.feature)[train[:: max(1, len(train) // 1000)]]
    amplitudes = features @ weights.T.astype(np.float32)
    return float(np.sqrt((amplitudes**2).mean())) if amplitudes.size else 1.0
