"""The simulated ongoing activity: all parts of a recording that are not caused by images.

Coloured background and alpha bursts through the lead field of a subject's cortex, white sensor noise, blinks, mains
and slow drift. All of it is produced in chunks of a fixed length with filters that keep their state, so a stream has no
joins, needs memory for only one chunk, and does not depend on the requested block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.cortex import find_members, make_cortex
from braindecode_vis.parts.phantom.forward import (
    SensorSystem,
    compute_patterns,
    pick_training_rows,
    project_images,
)

CHUNK_S = 2.0  # random numbers are drawn chunk by chunk, so another length is another recording
CORNER_HZ = 0.5
"""The 1/f spectrum flattens below this frequency, so that the power is finite and the noise stationary."""
# Our assumptions: width of the resonance, corner of electrode drift, and length of a blink.
_ALPHA_BANDWIDTH_HZ = 1.5
_DRIFT_HZ = 0.05
_BLINK_S = 0.35


def simulate_noise(person: Person, system: SensorSystem, n_samples: int, name: str) -> Iterator[np.ndarray]:
    """Yield the ongoing activity of one recording, chunk by chunk.

    Parameters
    ----------
    person, system
        The subject and the recording system.
    n_samples
        Length of the recording.
    name
        Name of the recording, for example ``ses-01_training``; another name gives independent noise.

    Yields
    ------
    chunk : float32 array of shape (n_channels, <= CHUNK_S * sfreq)
        In the unit of the system.
    """
    length = round(CHUNK_S * system.sfreq)
    background, alpha = make_mixing(person, system)
    noise = person.config.noise
    # The amplitude of narrow-band Gaussian noise changes by itself, about once per second: alpha needs no envelope.
    coloured = [
        ("background", _make_background_filter(noise.exponent, system.sfreq), background),
        ("alpha", _make_alpha_filter(noise.alpha_hz, system.sfreq), alpha),
    ]
    sources = [
        *(_simulate_cortex(person, filters, mix, length, name, kind) for kind, filters, mix in coloured),
        _simulate_sensors(person, system, length, name),
        _simulate_drift(person, system, length, name),
        _simulate_blinks(person, system, length, name),
        _simulate_line(person, system, length, name),
    ]
    for start in range(0, n_samples, length):
        chunk = next(sources[0])
        for source in sources[1:]:
            chunk += next(source)
        yield np.ascontiguousarray(chunk[: n_samples - start].T)


def compute_noise_power(person: Person, system: SensorSystem) -> np.ndarray:
    """Return the variance of background, alpha and sensor noise, float array (n_channels,)."""
    noise = person.config.noise
    background, alpha = make_mixing(person, system)
    sensor = (noise.sensor * system.sensor_rms) ** 2
    return (background**2).sum(axis=0) + (alpha**2).sum(axis=0) + sensor


def compute_noise_spectra(person: Person, system: SensorSystem, frequencies: np.ndarray) -> np.ndarray:
    """Return the cross-spectral density of background, alpha and sensor noise (two-sided, unit**2 per Hz).

    Parameters
    ----------
    frequencies : array of shape (n_frequencies,)
        In Hz, below the Nyquist rate.

    Returns
    -------
    density : float array of shape (n_frequencies, n_channels, n_channels)
    """
    from scipy import signal

    noise = person.config.noise
    background, alpha = make_mixing(person, system)
    _, response = signal.sosfreqz(
        _make_background_filter(noise.exponent, system.sfreq), frequencies, fs=system.sfreq
    )
    _, resonance = signal.sosfreqz(
        _make_alpha_filter(noise.alpha_hz, system.sfreq), frequencies, fs=system.sfreq
    )
    sensor = (noise.sensor * system.sensor_rms) ** 2 * np.eye(system.n_channels)
    parts = (np.abs(response) ** 2)[:, None, None] * (background.T @ background)
    parts = parts + (np.abs(resonance) ** 2)[:, None, None] * (alpha.T @ alpha)
    return (parts + sensor) / system.sfreq


@lru_cache(maxsize=8)
def make_mixing(person: Person, system: SensorSystem) -> tuple[np.ndarray, np.ndarray]:
    """Return the mixing of independent unit-variance sources into the channels.

    Part of the background has the same patterns as evoked responses (Kenet et al. 2003, doi:10.1038/nature02078,
    for visual cortex), which no spatial filter can remove; the rest comes from the whole cortex.

    Returns
    -------
    background : float array of shape (n_channels, n_channels)
        Rows are sources; the covariance of the background is ``background.T @ background``.
    alpha : float array of shape (n_patches, n_channels)
        Occipito-parietal patches.
    """
    noise = person.config.noise
    cortex = make_cortex()
    generator = make_generator(person.config.seed, "noise topography", person.index)
    # Independent activity on the whole cortex, with a different strength at each place in each subject.
    gains = np.exp(0.3 * generator.standard_normal(system.leadfield.shape[1]))
    covariance = (system.leadfield * gains**2) @ system.leadfield.T
    covariance *= (1 - noise.spontaneous) / np.diag(covariance).mean()
    evoked = project_images(person, compute_patterns(person, system)[0], pick_training_rows(person))
    # (image, stage, channel) twice -> (channel, channel)
    spontaneous = np.einsum("rsc,rsd->cd", evoked, evoked, optimize=True).astype(np.float64)
    if np.diag(spontaneous).mean() > 0:
        covariance += noise.spontaneous * spontaneous / np.diag(spontaneous).mean()
    values, vectors = np.linalg.eigh(covariance / np.diag(covariance).mean())
    background = system.noise_rms * np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    posterior = find_members(cortex.positions, ("V1", "V2", "V3", "OPA"))
    centres = cortex.positions[generator.choice(posterior, size=6, replace=False)]
    # Six patches of parieto-occipital cortex, 12 mm wide, the origin of the posterior rhythm.
    distance = np.linalg.norm(cortex.positions[None] - centres[:, None], axis=2)
    patches = np.exp(-((distance / 12.0) ** 2) / 2) @ system.leadfield.T  # (n_patches, n_channels)
    patches *= noise.alpha * system.noise_rms / np.sqrt((patches**2).sum(axis=0).mean())
    return background, patches


def _simulate_cortex(
    person: Person, sections: np.ndarray, mixing: np.ndarray, length: int, name: str, kind: str
) -> Iterator[np.ndarray]:
    """Yield filtered noise of cortical sources at the sensors; `mixing` is (n_sources, n_channels)."""
    mixing = mixing.astype(np.float32)
    gains = _draw_gains(person, len(mixing), length, name, kind)
    for activity in _filter_white(person, sections, len(mixing), length, name, kind):
        yield (activity if gains is None else activity * next(gains)) @ mixing  # (length, n_channels)


def _draw_gains(
    person: Person, n_sources: int, length: int, name: str, kind: str
) -> Iterator[np.ndarray] | None:
    """Yield the size of each source over a chunk, (length, n_sources), mean square one; None if sizes do not change."""
    if not (spread := person.config.noise.changing):
        return None

    def iterate() -> Iterator[np.ndarray]:
        generator = make_generator(person.config.seed, "changing", kind, person.index, name)
        share = np.linspace(0, 1, length, endpoint=False)[:, None]
        before = draw_power(generator, spread, n_sources)
        while True:
            after = draw_power(generator, spread, n_sources)
            yield np.sqrt((1 - share) * before + share * after).astype(np.float32)
            before = after

    return iterate()


def draw_power(generator: np.random.Generator, spread: float, n: int) -> np.ndarray:
    """Return log-normal powers of mean one; `spread` is the standard deviation of the log of their square roots."""
    return np.exp(2 * spread * generator.standard_normal(n) - 2 * spread**2)


def _simulate_sensors(person: Person, system: SensorSystem, length: int, name: str) -> Iterator[np.ndarray]:
    generator = make_generator(person.config.seed, "sensor noise", person.index, name)
    size = np.float32(person.config.noise.sensor * system.sensor_rms)
    while True:
        yield size * generator.standard_normal((length, system.n_channels), dtype=np.float32)


def _simulate_drift(person: Person, system: SensorSystem, length: int, name: str) -> Iterator[np.ndarray]:
    from scipy import signal

    size = person.config.noise.drift * system.noise_rms
    sections = signal.butter(2, _DRIFT_HZ, fs=system.sfreq, output="sos")
    # The impulse response has a length of many periods of the corner frequency.
    sections = _normalise_power(sections, round(200 * system.sfreq))
    generator = make_generator(person.config.seed, "drift topography", person.index, name)
    gains = (size * np.exp(0.4 * generator.standard_normal(system.n_channels))).astype(np.float32)
    for sources in _filter_white(person, sections, system.n_channels, length, name, "drift"):
        yield sources * gains


def _simulate_blinks(person: Person, system: SensorSystem, length: int, name: str) -> Iterator[np.ndarray]:
    noise = person.config.noise
    generator = make_generator(person.config.seed, "blinks", person.index, name)
    shape = np.sin(np.pi * np.linspace(0, 1, round(_BLINK_S * system.sfreq))) ** 2
    topography = (noise.blink_size * system.blink).astype(np.float32)
    carried = np.zeros(len(shape))
    while True:
        course = np.zeros(length + len(shape))
        course[: len(shape)] += carried  # a blink that began in the chunk before
        for start in generator.integers(0, length, generator.poisson(noise.blinks_per_minute * CHUNK_S / 60)):
            course[start : start + len(shape)] += shape * np.exp(0.2 * generator.standard_normal())
        carried = course[length:].copy()
        yield course[:length, None].astype(np.float32) * topography


def _simulate_line(person: Person, system: SensorSystem, length: int, name: str) -> Iterator[np.ndarray]:
    generator = make_generator(person.config.seed, "mains", person.index, name)
    gains = (
        person.config.noise.line
        * system.line_rms
        * np.exp(0.3 * generator.standard_normal(system.n_channels))
    )
    phases = 0.3 * generator.standard_normal(system.n_channels)
    # A sine of any phase is a mixture of two sines, so one product gives all channels.
    mixing = np.sqrt(2) * gains * np.stack([np.cos(phases), np.sin(phases)])
    start = 0
    while True:
        angle = 2 * np.pi * system.line_freq * ((start + np.arange(length)) / system.sfreq)
        yield np.stack([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32) @ mixing.astype(np.float32)
        start += length


def _filter_white(
    person: Person, sections: np.ndarray, n_sources: int, length: int, name: str, kind: str
) -> Iterator[np.ndarray]:
    """Yield filtered white noise of unit variance, (length, n_sources), stationary from the first sample."""
    from scipy import signal
    from scipy.linalg import solve_discrete_lyapunov

    generator = make_generator(person.config.seed, kind, person.index, name)
    # The state is drawn from its stationary distribution, so that a recording does not start with silence.
    # The one-step map of the state of `sosfilt` and of its input, found with unit vectors.
    size = 2 * len(sections)
    transition = np.zeros((size, size))
    for column in range(size):
        unit = np.zeros(size)
        unit[column] = 1.0
        transition[:, column] = signal.sosfilt(sections, [0.0], zi=unit.reshape(-1, 2))[1].ravel()
    entering = signal.sosfilt(sections, [1.0], zi=np.zeros((len(sections), 2)))[1].ravel()
    # The stationary covariance C of the state x' = A x + b w, with white w, solves C = A C A' + b b'.
    covariance = solve_discrete_lyapunov(transition, np.outer(entering, entering))
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    draws = generator.standard_normal((n_sources, len(root))) @ root.T  # (n_sources, 2 * n_sections)
    # (n_sources, 2 * n_sections) -> (n_sections, n_sources, 2), in the form for `sosfilt`
    state = np.ascontiguousarray(draws.reshape(n_sources, len(sections), 2).transpose(1, 0, 2))
    sections = sections.astype(np.float64)
    while True:
        white = generator.standard_normal((length, n_sources), dtype=np.float32)
        # Filtering along the last, contiguous axis is several times faster.
        coloured, state = signal.sosfilt(sections, np.ascontiguousarray(white.T), axis=1, zi=state)
        yield coloured.T.astype(np.float32)


@lru_cache(maxsize=32)
def _make_background_filter(exponent: float, sfreq: float) -> np.ndarray:
    """Return a cascade of one pole and one zero every two octaves that falls like f**(-exponent / 2) in amplitude."""
    # At a distance of two octaves they deviate by 0.1 dB from the straight line at an exponent of 1, by 0.6 dB at 2.
    ratio = 4.0
    corners = CORNER_HZ * ratio ** np.arange(np.ceil(np.log(sfreq / 2 / CORNER_HZ) / np.log(ratio)))
    poles = np.exp(-2 * np.pi * corners / sfreq)
    # A zero cancels each pole before the next one, at a distance that the exponent determines.
    zeros = np.exp(-2 * np.pi * corners * ratio ** (exponent / 2) / sfreq)
    rows = []
    for first in range(0, len(corners), 2):
        pair = slice(first, first + 2)
        numerator, denominator = np.poly(zeros[pair]), np.poly(poles[pair])
        rows.append(np.concatenate([np.pad(part, (0, 3 - len(part))) for part in (numerator, denominator)]))
    return _normalise_power(np.array(rows), round(20 * sfreq))


@lru_cache(maxsize=32)
def _make_alpha_filter(frequency: float, sfreq: float) -> np.ndarray:
    radius = np.exp(-np.pi * _ALPHA_BANDWIDTH_HZ / sfreq)
    angle = 2 * np.pi * frequency / sfreq
    row = [1.0, 0.0, -1.0, 1.0, -2 * radius * np.cos(angle), radius**2]
    return _normalise_power(np.array([row]), round(20 * sfreq))


def _normalise_power(sections: np.ndarray, n_samples: int) -> np.ndarray:
    """Scale a filter so that its output for white noise of unit variance has unit variance."""
    from scipy import signal

    impulse = np.zeros(n_samples)
    impulse[0] = 1.0
    power = (signal.sosfilt(sections, impulse) ** 2).sum()
    scaled = sections.copy()
    scaled[0, :3] /= np.sqrt(power)
    return scaled
