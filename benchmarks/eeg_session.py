"""A raw session of THINGS-EEG2, noise that is written as its authors ship it, to whitened trials: ours and as usual.

The usual recipe: `mne.Epochs` at 1000 Hz, `epochs.resample(250)`, a loop of scikit-learn covariances, whitening. Both
work on the same samples in memory; ours also writes the store.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from braindecode_vis.base.store import read_responses
from braindecode_vis.datasets.sources.meeg_source import MeegSource
from braindecode_vis.datasets.things_eeg2.dataset import ALL63
from braindecode_vis.parts.phantom.formats import things_eeg2_format
from braindecode_vis.preprocessing.meeg import write_source

TMAX = 0.999  # 1200 samples: with 1201, MNE's resampled epochs come out 1 ms late


def make_root(root: Path, n_concepts: int, n_test: int, test_repetitions: int, n_sessions: int = 1) -> None:
    """Write the raw files and pictures of one subject."""
    from PIL import Image

    training = things_eeg2_format.make_image_table("training", [f"a{i:04d}" for i in range(n_concepts)], 10)
    test = things_eeg2_format.make_image_table("test", [f"b{i:04d}" for i in range(n_test)])
    things_eeg2_format.write_image_metadata(root, training, test)
    for path in [*training["path"], *test["path"]]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / path)
    designs = things_eeg2_format.make_things_eeg2_design(
        n_concepts, 10, n_test, n_sessions=n_sessions, test_repetitions=test_repetitions
    )
    rng = np.random.default_rng(0)
    mixing = (np.eye(63) + 0.3 * rng.standard_normal((63, 63))).astype(np.float32) * 1e-5
    for session, design in enumerate(designs, start=1):
        for name, part in (("training", design.training), ("test", design.test)):
            blocks = iterate_noise(part.n_samples, mixing, rng)
            things_eeg2_format.write_raw(
                root, 1, session, name, blocks, part.events, n_samples=part.n_samples, ch_names=ALL63
            )


def iterate_noise(n_samples: int, mixing: np.ndarray, rng: np.random.Generator):
    """Yield noise below 100 Hz, correlated between channels."""
    from scipy.signal import firwin, lfilter

    taps = firwin(101, 90, fs=1000)
    state = np.zeros((63, 100))
    for start in range(0, n_samples, 50_000):
        white = rng.standard_normal((63, min(50_000, n_samples - start))).astype(np.float32)
        smooth, state = lfilter(taps, 1, white, zi=state)
        yield mixing @ smooth.astype(np.float32)


def run_usual(source: MeegSource, samples: list[np.ndarray]) -> np.ndarray:
    import mne
    import scipy.linalg
    from sklearn.discriminant_analysis import _cov

    epochs, labels = [], []
    for part, data in zip(source.parts, samples, strict=True):
        events = part.recording.events
        raw = mne.io.RawArray(data, mne.create_info(list(ALL63), 1000.0, "eeg"), verbose="error")
        table = np.stack([events["sample"], np.zeros(len(events), int), np.ones(len(events), int)], axis=1)
        cut = mne.Epochs(raw, table, tmin=-0.2, tmax=TMAX, baseline=(None, 0), preload=True, verbose="error")
        epochs.append(cut.resample(250, verbose="error").get_data(verbose="error")[..., 50:])
        labels.append(events)
    n_train = len(labels[0])
    images = labels[0]["stimulus_id"].to_numpy()
    by_image = []
    for name in np.unique(images):
        by_image.append(
            np.mean([_cov(epochs[0][i].T, shrinkage="auto") for i in np.flatnonzero(images == name)], axis=0)
        )
    whitener = scipy.linalg.fractional_matrix_power(np.mean(by_image, axis=0), -0.5)
    assert n_train == len(epochs[0])
    return np.concatenate([np.swapaxes(np.swapaxes(e, 1, 2) @ whitener, 1, 2) for e in epochs])


def run_ours(source: MeegSource, folder: Path) -> np.ndarray:
    """Write the store, and return its trials."""
    out = Path(tempfile.mkdtemp(dir=folder))
    write_source(source, out, scratch=out / "scratch")
    return np.asarray(read_responses(out / "responses").data)
