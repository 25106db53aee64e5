"""fMRI of simulated subjects: single-trial betas and BOLD time series.

A voxel has the tuning of the cortical position at its centre, so EEG, MEG and fMRI of one subject agree. Time series
follow the canonical SPM response of nilearn, with autocorrelated noise, drift and motion. The files are written in
`formats`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.phantom.brain import (
    Person,
    compute_common_amplitudes,
    compute_weights,
    draw_fields,
    draw_trials,
    get_features,
)
from braindecode_vis.parts.phantom.forward import pick_training_rows
from braindecode_vis.parts.phantom.noise import draw_power
from braindecode_vis.parts.phantom.phantom_config import NETWORKS
from braindecode_vis.parts.phantom.scanner import Scanner

BLOCK_VOLUMES = 32
HRF_S = 32.0  # the canonical response of SPM has died out by then
N_NOISE_MODES = 8  # spatial patterns of shared noise: our assumption
N_ONGOING_MODES = 4  # patterns of ongoing activity within a network, besides that of the whole network
ONGOING_TAU_S = 3.0  # two leaky integrators with this time constant: most power lies below 0.1 Hz, as at rest
TRIALS_PER_BLOCK = 16


def compute_betas(person: Person, scanner: Scanner, rows: np.ndarray, *, imagery: bool = False) -> np.ndarray:
    """Return the noiseless single-trial responses, the ground truth.

    Parameters
    ----------
    rows : integer array of shape (n_rows,)
        Images, as rows of ``person.drive``; -1 for a trial without image content.
    imagery
        True for imagined instead of seen images: weaker, and weakest in early visual areas.

    Returns
    -------
    betas : float32 array of shape (n_rows, n_voxels)
        Percent signal change.
    """
    features = [get_features(person, stage, rows) for stage in person.stages]
    return _combine(person, scanner, features, np.ones((len(rows), len(person.stages))), imagery)


def simulate_betas(
    person: Person,
    scanner: Scanner,
    rows: np.ndarray,
    trial_seeds: Sequence[int],
    *,
    imagery: bool = False,
) -> np.ndarray:
    """Return noisy single-trial betas, float32 (n_rows, n_voxels), in percent signal change.

    Parameters
    ----------
    rows : integer array of shape (n_rows,)
        Images, as rows of ``person.drive``; -1 for a trial without image content.
    trial_seeds : sequence of integers of length n_rows
        Names of the trials, unique within a subject: equal numbers give equal noise, independent of the other rows.
    imagery
        True for imagined instead of seen images.
    """
    rows = np.asarray(rows, int)
    if len(trial_seeds) != len(rows):
        raise DataError(
            f"{len(trial_seeds)} trial seeds were given for {len(rows)} trials: one per trial is needed."
        )
    config = person.config
    n_stages, n_voxels = len(person.stages), scanner.n_voxels
    features = [get_features(person, stage, rows) for stage in person.stages]
    gains = np.empty((len(rows), n_stages))
    modes = np.empty((len(rows), N_NOISE_MODES), np.float32)
    noise = np.empty((len(rows), n_voxels), np.float32)
    for number, seed in enumerate(trial_seeds):
        generator = make_generator(config.seed, "trial", person.index, int(seed))
        # Log-normal with mean square one, so that single trials have the stated signal-to-noise ratio.
        gains[number] = np.exp(
            config.trial_gain_sd * generator.standard_normal(n_stages) - config.trial_gain_sd**2
        )
        modes[number] = generator.standard_normal(N_NOISE_MODES)
        noise[number] = generator.standard_normal(n_voxels, dtype=np.float32)
        if imagery:
            _blur_features(features, number, config.fmri.imagery_jitter, generator)
    if spread := config.noise.changing:
        for number, seed in enumerate(trial_seeds):
            generator = make_generator(config.seed, "changing", person.index, int(seed))
            noise[number] *= np.sqrt(draw_power(generator, spread, 1)).astype(np.float32)
            modes[number] *= np.sqrt(draw_power(generator, spread, N_NOISE_MODES)).astype(np.float32)
    betas = _combine(person, scanner, features, gains, imagery)
    share = config.fmri.correlated
    noise *= np.float32(np.sqrt(1 - share))
    noise += np.float32(np.sqrt(share)) * (modes @ make_noise_modes(person, scanner))
    betas += np.float32(config.fmri.noise_percent) * noise
    return betas


def compute_voxel_snr(person: Person, scanner: Scanner) -> np.ndarray:
    """Return signal over noise standard deviation of single-trial betas, float array (n_voxels,); ``ncsnr`` of NSD."""
    power = _get_scale(person, scanner) ** 2 * _measure_raw_power(person, scanner)
    return np.sqrt(power) / person.config.fmri.noise_percent


def simulate_bold(
    person: Person,
    scanner: Scanner,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    duration_s: float,
    n_volumes: int,
    *,
    name: str = "run",
    imagery: bool = False,
) -> Iterator[np.ndarray]:
    """Yield one run of BOLD signal in blocks of at most `BLOCK_VOLUMES` volumes.

    Parameters
    ----------
    person, scanner
        The subject and the scanner.
    onsets_s : array of shape (n_events,)
        Stimulus onsets in s after the first volume, ascending. Volume i is taken at ``i * scanner.t_r``.
    rows : integer array of shape (n_events,)
        Image of each event, as a row of ``person.drive``; -1 for a trial without image content.
    duration_s
        Presentation time of an image. The peak of the response to one presentation is the beta, for any duration.
    n_volumes
        Length of the run.
    name
        Name of the run; another name gives other noise.
    imagery
        True for imagined instead of seen images.

    Yields
    ------
    block : float32 array of shape (n_volumes_of_block, n_voxels)
        Percent signal change relative to ``scanner.baseline``.
    """
    onsets_s, rows = np.asarray(onsets_s, float), np.asarray(rows, int)
    if onsets_s.shape != rows.shape or (np.diff(onsets_s) < 0).any():
        raise DataError(
            f"{onsets_s.shape} onsets in ascending order are needed for {rows.shape} stimulus rows."
        )
    return _stream_bold(person, scanner, onsets_s, rows, duration_s, n_volumes, name, imagery)


def simulate_motion(person: Person, n_volumes: int, name: str) -> np.ndarray:
    """Return the head motion of a run: translations in mm and rotations in rad, float array (n_volumes, 6)."""
    from scipy import signal

    generator = make_generator(person.config.seed, "motion", person.index, name)
    # A slow random walk of about 0.03 mm per volume, with a jump of some tenths of a millimetre in one volume of 100.
    steps = generator.standard_normal((n_volumes, 6)) * 0.03
    jumps = generator.random(n_volumes) < 0.01
    steps[jumps] += 0.3 * generator.standard_normal((int(jumps.sum()), 6))
    walk = signal.lfilter([1.0], [1.0, -0.98], steps, axis=0)
    return walk * np.array(
        [1, 1, 1, 0.01, 0.01, 0.01]
    )  # rotations in rad: 0.01 is 0.5 mm at a radius of 50 mm


def _stream_bold(
    person: Person,
    scanner: Scanner,
    onsets_s: np.ndarray,
    rows: np.ndarray,
    duration_s: float,
    n_volumes: int,
    name: str,
    imagery: bool,
) -> Iterator[np.ndarray]:
    gains, _ = draw_trials(person, len(rows), name)
    generator = make_generator(person.config.seed, "imagery", person.index, name)
    features = [get_features(person, stage, rows) for stage in person.stages]
    if imagery:
        for number in range(len(rows)):
            _blur_features(features, number, person.config.fmri.imagery_jitter, generator)
    response = get_response(duration_s)
    noise = _simulate_series_noise(person, scanner, n_volumes, name)
    size = person.config.fmri.ongoing_percent or 0.0
    ongoing = size * simulate_ongoing(person, n_volumes, scanner.t_r, name) if size else None
    for first in range(0, n_volumes, BLOCK_VOLUMES):
        times = np.arange(first, min(first + BLOCK_VOLUMES, n_volumes)) * scanner.t_r
        low, high = np.searchsorted(onsets_s, (times[0] - HRF_S - duration_s, times[-1] + 1e-9))
        block = next(noise)[: len(times)]
        if ongoing is not None:
            block = block + ongoing[first : first + len(block)] @ make_ongoing_modes(person, scanner)
        if high > low:
            # (n_volumes, n_events): the response of each event at the time of each volume
            lag = times[:, None] - onsets_s[None, low:high]
            design = np.interp(lag, np.arange(len(response)) * 0.1, response, left=0, right=0)
            shown = [feature[low:high] for feature in features]
            block = block + design.astype(np.float32) @ _combine(
                person, scanner, shown, gains[low:high], imagery
            )
        yield block


def _simulate_series_noise(
    person: Person, scanner: Scanner, n_volumes: int, name: str
) -> Iterator[np.ndarray]:
    from scipy import signal

    numbers = person.config.fmri
    generator = make_generator(person.config.seed, "series noise", person.index, name)
    n_voxels = scanner.n_voxels
    periods = generator.uniform(130, 500, 3)
    phases = generator.uniform(0, 2 * np.pi, 3)
    drift_maps = (generator.standard_normal((3, 1)) + make_noise_modes(person, scanner)[:3]) * np.sqrt(1 / 3)
    motion = simulate_motion(person, n_volumes, name)
    motion = (motion - motion.mean(axis=0)) / np.maximum(motion.std(axis=0), 1e-12)
    motion_maps = make_noise_modes(person, scanner)[2:8] * np.sqrt(1 / 6)
    innovation = np.sqrt(1 - numbers.ar**2)  # keeps the variance at one
    # The process is stationary from the first volume.
    state = numbers.ar * generator.standard_normal((1, n_voxels))
    spread = person.config.noise.changing
    changes = make_generator(person.config.seed, "changing", person.index, name)
    for first in range(0, n_volumes, BLOCK_VOLUMES):
        white = generator.standard_normal((BLOCK_VOLUMES, n_voxels), dtype=np.float32)
        if spread:
            white *= np.sqrt(draw_power(changes, spread, 1)).astype(np.float32)
        noise, state = signal.lfilter([innovation], [1.0, -numbers.ar], white, axis=0, zi=state)
        times = (first + np.arange(BLOCK_VOLUMES)) * scanner.t_r
        drift = np.sin(2 * np.pi * times[:, None] / periods + phases) @ drift_maps
        moved = motion[first : first + BLOCK_VOLUMES] @ motion_maps
        block = numbers.series_noise_percent * noise + numbers.drift_percent * drift
        block[: len(moved)] += numbers.motion_percent * moved
        yield block.astype(np.float32)


@lru_cache(maxsize=16)
def get_response(duration_s: float) -> np.ndarray:
    """Return the canonical response to a presentation at 0.1 s steps, with a peak of one."""
    from nilearn.glm.first_level import spm_hrf

    kernel = np.asarray(spm_hrf(0.1, oversampling=1, time_length=HRF_S))
    box = np.ones(max(1, round(duration_s / 0.1)))
    response = np.convolve(kernel, box)  # a longer presentation gives a longer response, not a higher one
    return response / response.max()


@lru_cache(maxsize=8)
def _make_voxel_map(
    person: Person, scanner: Scanner
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Return members and weights of each stage, and the common response (n_stages, n_voxels), unscaled."""
    weights, common = [], np.zeros((len(person.stages), scanner.n_voxels), np.float32)
    for number, stage in enumerate(person.stages):
        weights.append(compute_weights(person, stage, scanner.positions))
        members, amplitudes = compute_common_amplitudes(person, stage, scanner.positions)
        common[number, members] = amplitudes
    peak = np.abs(common.sum(axis=0)[scanner.networks == "visual"]).mean()
    return weights, common * np.float32(person.config.fmri.common_percent / max(float(peak), 1e-12))


@lru_cache(maxsize=8)
def _get_scale(person: Person, scanner: Scanner) -> float:
    power = _measure_raw_power(person, scanner)
    active = power > 0
    if not active.any():
        return 0.0
    return float(np.sqrt(person.config.snr * person.config.fmri.noise_percent**2 / power[active].mean()))


@lru_cache(maxsize=8)
def _measure_raw_power(person: Person, scanner: Scanner) -> np.ndarray:
    """Return the variance over training images of each voxel, single-trial gains included, before scaling."""
    rows = pick_training_rows(person)
    weights, _ = _make_voxel_map(person, scanner)
    together = np.zeros((len(rows), scanner.n_voxels), np.float32)
    apart = np.zeros(scanner.n_voxels)
    for (members, weight), stage in zip(weights, person.stages, strict=True):
        shown = get_features(person, stage, rows) @ weight.T
        together[:, members] += shown
        apart[members] += shown.var(axis=0)
    # Gains of different stages in one voxel vary independently over trials.
    shrink = np.exp(-(person.config.trial_gain_sd**2))
    return shrink * together.var(axis=0) + (1 - shrink) * apart


@lru_cache(maxsize=8)
def make_noise_modes(person: Person, scanner: Scanner) -> np.ndarray:
    """Return spatial patterns of shared noise of unit total variance per voxel, float32 (N_NOISE_MODES, n_voxels)."""
    fields = draw_fields(
        scanner.positions, N_NOISE_MODES, person.config.seed, "noise modes", person.index, length_mm=35.0
    )
    return (fields.T / np.sqrt((fields**2).sum(axis=1))).astype(np.float32)


@lru_cache(maxsize=8)
def make_ongoing_modes(person: Person, scanner: Scanner) -> np.ndarray:
    """Return spatial patterns of ongoing activity of unit total variance per voxel, float32 (n_modes, n_voxels).

    Every network fluctuates as a whole, coupled to the others, and in its own patterns. Couplings and patterns are
    partly shared by all subjects and partly individual (`PhantomConfig.shared`); they are the functional connectivity
    of a subject.
    """
    config = person.config
    owners = ((np.sqrt(config.shared), "everyone"), (np.sqrt(1 - config.shared), f"person-{person.index}"))
    n_networks = len(NETWORKS)
    coupling = 1.5 * np.eye(n_networks)
    fields = np.zeros((scanner.n_voxels, 1 + N_ONGOING_MODES))
    for share, owner in owners:
        generator = make_generator(config.seed, "coupling", owner)
        coupling += 0.5 * share * generator.standard_normal((n_networks, n_networks))
        names = (config.seed, "ongoing", owner)
        fields += share * draw_fields(scanner.positions, fields.shape[1], *names, length_mm=20.0)
    modes = np.zeros((n_networks * (1 + N_ONGOING_MODES), scanner.n_voxels))
    for number, network in enumerate(NETWORKS):
        members = np.flatnonzero(scanner.networks == network)
        modes[:n_networks, members] = coupling[number][:, None] * (1 + 0.5 * fields[members, 0])
        own = n_networks + number * N_ONGOING_MODES
        modes[own : own + N_ONGOING_MODES, members] = fields[members, 1:].T
    return (modes / np.sqrt((modes**2).sum(axis=0))).astype(np.float32)


def simulate_ongoing(person: Person, n_volumes: int, t_r: float, name: str) -> np.ndarray:
    """Return the time courses of the modes of `make_ongoing_modes` of a run, (n_volumes, n_modes), variance 1."""
    from scipy import signal

    generator = make_generator(person.config.seed, "ongoing", person.index, name)
    kept = np.exp(-t_r / ONGOING_TAU_S)
    before = int(np.ceil(10 * ONGOING_TAU_S / t_r))  # until the process has forgotten that it began
    white = generator.standard_normal((before + n_volumes, len(NETWORKS) * (1 + N_ONGOING_MODES)))
    smooth = signal.lfilter([1.0], [1.0, -2 * kept, kept**2], white, axis=0)[before:]
    return (smooth * np.sqrt((1 - kept**2) ** 3 / (1 + kept**2))).astype(np.float32)


def _combine(
    person: Person, scanner: Scanner, features: list[np.ndarray], gains: np.ndarray, imagery: bool
) -> np.ndarray:
    """Return the response to features (one array per stage) with the given gains (n_rows, n_stages)."""
    numbers = person.config.fmri
    weights, common = _make_voxel_map(person, scanner)
    scale = _get_scale(person, scanner)
    size = gains.copy()
    if imagery:
        early = np.array(
            [numbers.imagery_early if stage.feature == "early" else 1.0 for stage in person.stages]
        )
        size *= numbers.imagery_gain * early
    betas = size.astype(np.float32) @ common  # (n_rows, n_stages) @ (n_stages, n_voxels)
    for number, (members, weight) in enumerate(weights):
        specific = (features[number] * (scale * size[:, number, None]).astype(np.float32)) @ weight.T
        betas[:, members] += specific
    return betas


def _blur_features(
    features: list[np.ndarray], number: int, size: float, generator: np.random.Generator
) -> None:
    """Add the error of imagination to one row of each feature array, in place; alike in stages that share features."""
    errors: dict[int, np.ndarray] = {}
    for feature in features:
        # One error per feature family: both stages of a family have the same error.
        width = feature.shape[1]
        if width not in errors:
            errors[width] = np.asarray(size * generator.standard_normal(width), np.float32)
        feature[number] += errors[width]


def iterate_betas(
    person: Person, scanner: Scanner, rows: np.ndarray, seeds: np.ndarray, *, imagery: bool = False
) -> Iterator[np.ndarray]:
    """Yield noisy single-trial betas in blocks of shape (<= `TRIALS_PER_BLOCK`, n_voxels)."""
    for start in range(0, len(rows), TRIALS_PER_BLOCK):
        part = slice(start, start + TRIALS_PER_BLOCK)
        yield simulate_betas(person, scanner, rows[part], seeds[part].tolist(), imagery=imagery)
