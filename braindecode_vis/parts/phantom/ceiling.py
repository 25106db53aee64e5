"""Scores of the best possible decoder of a phantom: noise ceilings that are known, not estimated from data.

The noise of a phantom is Gaussian with a known covariance and the noiseless responses are known, so the ideal
observer is a matched filter (Green and Swets 1966). Its accuracy is simulated in the space of its own scores, which
needs only the whitened inner products of the responses. Trial-to-trial variability, blinks, mains and drift are left
out, and neighbouring responses count as known, so the result is an upper bound for real decoders.
"""

from __future__ import annotations

import numpy as np

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.phantom.bold_signal import compute_betas, make_noise_modes
from braindecode_vis.parts.phantom.brain import RESPONSE_S, Person, compute_time_course
from braindecode_vis.parts.phantom.forward import SensorSystem
from braindecode_vis.parts.phantom.meeg_signal import SNR_WINDOW_S, compute_evoked, make_sensor_map
from braindecode_vis.parts.phantom.noise import compute_noise_power, compute_noise_spectra
from braindecode_vis.parts.phantom.scanner import Scanner

HIGHEST_HZ = 100.0  # evoked responses have no power above


def compute_noise_ceiling(
    person: Person,
    system: SensorSystem,
    rows: np.ndarray,
    n_repetitions: int,
    *,
    duration_s: float = 0.1,
) -> dict[str, np.ndarray]:
    """Return the expected correlations, over images, of averaged single trials in each channel.

    Parameters
    ----------
    rows : integer array of shape (n_rows,)
        Images.
    n_repetitions
        Trials averaged per image, at least 2.
    duration_s
        Presentation time of the image.

    Returns
    -------
    ceiling : dict of float arrays of shape (n_channels,)
        ``with_truth``: average of all repetitions with the noiseless response. ``split_half``: average of one half with
        the average of the other. Both use the power over images in the window of the signal-to-noise ratio.
    """
    if n_repetitions < 2:
        raise ConfigError(f"a split into halves needs at least 2 repetitions, not {n_repetitions}.")
    tmin, tmax = SNR_WINDOW_S
    evoked = compute_evoked(
        person, system, rows, sfreq=200.0, tmin=tmin, tmax=tmax, duration_s=duration_s, common=False
    )
    signal = evoked.var(axis=0, dtype=np.float64).mean(axis=1)
    noise = compute_noise_power(person, system)
    return {
        "with_truth": np.sqrt(signal / (signal + noise / n_repetitions)),
        "split_half": signal / (signal + 2 * noise / n_repetitions),
    }


def compute_evoked_gram(
    person: Person, system: SensorSystem, rows: np.ndarray, *, duration_s: float = 0.1
) -> np.ndarray:
    """Return the noise-whitened inner products of noiseless responses, float array (n_rows, n_rows).

    The noise is stationary, so whitening is done per frequency, with the full spatial covariance.
    """
    window_s = duration_s + RESPONSE_S
    rate = 4 * HIGHEST_HZ
    times = np.arange(round(window_s * rate)) / rate
    courses = np.stack([compute_time_course(stage, times, duration_s) for stage in person.stages])
    spectrum = np.fft.rfft(courses, axis=1) / rate  # (n_stages, n_frequencies), unit * s
    # Stationary noise is independent between frequencies, so the matched filter is a sum over them.
    frequencies = np.fft.rfftfreq(len(times), 1 / rate)
    used = np.flatnonzero((frequencies > 0) & (frequencies <= min(HIGHEST_HZ, 0.45 * system.sfreq)))
    patterns = make_sensor_map(person, system, duration_s).project(person, rows).astype(np.float64)
    gram = np.zeros((len(rows), len(rows)))
    for number in used:
        density = compute_noise_spectra(person, system, frequencies[[number]])[0]
        shown = np.einsum("rsc,s->rc", patterns, spectrum[:, number])  # (n_rows, n_channels), complex
        # Densities of 1e-30 T**2/Hz would underflow: scaled to a trace of one for the decomposition.
        root = np.linalg.cholesky(density / np.trace(density))
        white = np.linalg.solve(root, shown.T) / np.sqrt(np.trace(density))
        gram += 2 * (white.conj().T @ white).real / window_s  # both signs of the frequency
    return gram


def compute_betas_gram(person: Person, scanner: Scanner, rows: np.ndarray) -> np.ndarray:
    """Return the noise-whitened inner products of noiseless betas, float array (n_rows, n_rows)."""
    betas = compute_betas(person, scanner, rows).astype(np.float64)
    numbers = person.config.fmri
    modes = np.sqrt(numbers.correlated) * make_noise_modes(person, scanner).astype(np.float64)
    white = 1 - numbers.correlated
    # Woodbury: the covariance is a multiple of the identity plus a few spatial patterns.
    inner = white * np.eye(len(modes)) + modes @ modes.T
    shared = betas @ modes.T  # (n_rows, n_modes)
    return (betas @ betas.T - shared @ np.linalg.solve(inner, shared.T)) / (white * numbers.noise_percent**2)


def compute_ideal_top1(gram: np.ndarray, n_repetitions: int, *, n_draws: int = 200, seed: int = 0) -> float:
    """Return the accuracy of the ideal observer who picks the shown image out of the gallery.

    Parameters
    ----------
    gram : array of shape (n_gallery, n_gallery)
        Whitened inner products for single trials, from `compute_evoked_gram` or `compute_betas_gram`.
    n_repetitions
        Trials averaged per query.
    n_draws
        Simulated queries per image.
    seed
        Seed of the simulation.

    Examples
    --------
    >>> compute_ideal_top1(np.eye(4) * 400.0, 1)
    1.0
    """
    centred = (
        gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()
    )  # the common part is no cue
    size = np.diag(centred)  # squared norms of the whitened responses
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    root = vectors * np.sqrt(np.clip(values, 0, None) / n_repetitions)  # averaging divides the noise variance
    generator = make_generator(seed, "ideal observer")
    n_right = 0
    for _ in range(n_draws):
        # Log-likelihood of image j given image i: mean gram[i, j] - gram[j, j] / 2, covariance gram / n.
        noise = generator.standard_normal((len(gram), len(gram))) @ root.T
        scores = centred + noise - size / 2
        # Ties (without signal) are resolved at random, by a jitter below any real difference.
        scores = scores + 1e-12 * max(float(size.max()), 1.0) * generator.random(scores.shape)
        n_right += int((scores.argmax(axis=1) == np.arange(len(gram))).sum())
    return n_right / (n_draws * len(gram))
