"""One raw session of THINGS-EEG2 to the store, against the usual recipe, file reading apart.

The usual recipe: `mne.Epochs` at 1000 Hz, `epochs.resample(250)`, a loop of scikit-learn covariances, whitening. Both
work on the same samples in memory; ours also writes the store. The last line is the peak memory of a whole run from
the file, in a process of its own.

Run with ``OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/preprocess_eeg.py``.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from braindecode_vis.arrays import Responses
from braindecode_vis.datasets.sources.meeg_source import MeegSource
from braindecode_vis.datasets.things_eeg2.dataset import ALL63, ThingsEeg2Config
from braindecode_vis.phantom.formats import things_eeg2_format
from braindecode_vis.preprocessing.meeg import find_positions, write_meeg, write_source
from braindecode_vis.store import read_responses

TMAX = 0.999  # 1200 samples: with 1201, MNE's resampled epochs come out 1 ms late


def make_root(root: Path, n_concepts: int, n_test: int, test_repetitions: int) -> None:
    from PIL import Image

    training = things_eeg2_format.make_image_table("training", [f"a{i:04d}" for i in range(n_concepts)], 10)
    test = things_eeg2_format.make_image_table("test", [f"b{i:04d}" for i in range(n_test)])
    things_eeg2_format.write_image_metadata(root, training, test)
    for path in [*training["path"], *test["path"]]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / path)
    design = things_eeg2_format.make_things_eeg2_design(
        n_concepts, 10, n_test, n_sessions=1, test_repetitions=test_repetitions
    )[0]
    rng = np.random.default_rng(0)
    mixing = (np.eye(63) + 0.3 * rng.standard_normal((63, 63))).astype(np.float32) * 1e-5
    for name, part in (("training", design.training), ("test", design.test)):
        blocks = iterate_noise(part.n_samples, mixing, rng)
        things_eeg2_format.write_raw(
            root, 1, 1, name, blocks, part.events, n_samples=part.n_samples, ch_names=ALL63
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


def run_ours(source: MeegSource, samples: list[np.ndarray], folder: Path) -> Responses:
    parts = [
        replace(part, read=lambda a, b, x=data: x[:, a:b])
        for part, data in zip(source.parts, samples, strict=True)
    ]
    write_source(replace(source, parts=tuple(parts)), folder, scratch=folder / "scratch")
    return read_responses(folder / "responses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=60, help="training concepts; the full set has 1654")
    parser.add_argument("--test-images", type=int, default=20, help="the full set has 200")
    parser.add_argument("--usual", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--from-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.from_file is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_meeg(ThingsEeg2Config(root=options.from_file, sessions=(1,)), Path(folder))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        make_root(root, options.concepts, options.test_images, 20)
        size = max(path.stat().st_size for path in root.rglob("raw_eeg_*.npy")) / 2**20
        source = ThingsEeg2Config(root=root, sessions=(1,)).open_epochs()
        print(f"{source.n_trials} trials of 63 channels, largest file {size:.0f} MiB")
        command = [sys.executable, __file__, "--from-file", str(root)]
        start = time.perf_counter()
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"whole run from the file: {time.perf_counter() - start:.1f} s, {peak:.0f} MiB resident at most"
        )
        if not options.usual:
            return
        samples = [part.read(0, part.n_samples) for part in source.parts]
        find_positions(source)
        out = Path(temporary) / "out"
        out.mkdir()
        start = time.perf_counter()
        ours = run_ours(source, samples, out)
        fast = time.perf_counter() - start
        start = time.perf_counter()
        usual = run_usual(source, samples)
        slow = time.perf_counter() - start
        inside = slice(0, 225)  # the FFT of the usual recipe bends the end of each epoch
        error = (
            np.sqrt(np.mean((ours.data[..., inside] - usual[..., inside]) ** 2)) / usual[..., inside].std()
        )
        print(f"ours {fast:.2f} s, usual recipe {slow:.2f} s: {slow / fast:.1f} times faster")
        print(f"difference {error:.1e} of the standard deviation, away from the ends of the epochs")


if __name__ == "__main__":
    main()
