"""A small run of simulated EEG, and its recording as a stream: what tests of live decoding share."""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Recording
from braindecode_vis.base.consent import give_consent
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config.source import validate_config
from braindecode_vis.datasets.sources.cleaning_options import CleaningOptions
from braindecode_vis.datasets.sources.meeg_source import (
    ContinuousPart,
    EpochPlan,
    MeegSource,
    Sensors,
    add_cleaning,
)
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.runs import open_run

CH_NAMES = ("P7", "P3", "Pz", "P4", "P8", "O1", "Oz", "O2")
EXTRA = "Cz"  # recorded and not stored
SFREQ, N_PICTURES, SIZE = 500.0, 24, 4
IDS = [f"picture{n:02d}" for n in range(N_PICTURES)]
EVERY = 350  # samples from one picture to the next


def draw_pictures():
    draw = np.random.default_rng(0)
    # Of few components, so that the training pictures span the others.
    mixed = draw.normal(size=(N_PICTURES, 4)) @ draw.normal(size=(4, SIZE * SIZE * 3))
    return (255 / (1 + np.exp(-mixed / 2))).astype(np.uint8).reshape(N_PICTURES, SIZE, SIZE, 3)


def draw_recording(seed):
    """Two shows of every picture, whose pixels set the height of a response half a second long; in volt."""
    rng = np.random.default_rng(seed)
    shown = np.concatenate([rng.permutation(N_PICTURES) for _ in range(2)])
    onsets = 1000 + EVERY * np.arange(len(shown)) + rng.integers(0, 5, len(shown))
    n = onsets[-1] + 2000
    mixing = np.random.default_rng(1).normal(size=(9, 9)) + 2 * np.eye(9)
    signal = mixing @ rng.normal(size=(9, n)) + np.cumsum(rng.normal(size=(9, n)), axis=1) * 0.02
    weights = np.random.default_rng(2).normal(size=(9, SIZE * SIZE * 3)) / 200
    pictures = draw_pictures().reshape(N_PICTURES, -1) - 127.0
    course = np.sin(np.linspace(0, np.pi, 250))
    for picture, onset in zip(shown, onsets, strict=True):
        signal[:, onset : onset + 250] += np.outer(weights @ pictures[picture], course)
    return 1e-6 * signal + 1e-3 * np.arange(9)[:, None], onsets, shown


class SmallStream(CleaningOptions):
    kind: Literal["tests.parts.live.small_run:SmallStream"] = "tests.parts.live.small_run:SmallStream"
    mvnn: Literal["epochs", "none"] = "epochs"
    folder: str = ""

    not_hashed: ClassVar[frozenset[str]] = frozenset({"folder"})

    def check(self):
        return []

    def hash_inputs(self):
        return {}

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        parts = [self.open_part(seed) for seed in (0, 1)]
        table = pd.DataFrame({"stimulus_id": IDS, "concept": IDS, "path": "x", "sha256": IDS})
        plan = EpochPlan(sfreq=250.0, tmin=-0.1, tmax=0.5, window=(0.0, 0.5), mvnn=self.mvnn)
        return add_cleaning(
            MeegSource("eeg", tuple(parts), StimulusSet(table, pixels=draw_pictures()), plan, "V"), self
        )

    def open_part(self, seed):
        signal, onsets, shown = draw_recording(seed)
        ids = np.array(IDS)[shown]
        events = pd.DataFrame(
            {
                "onset": onsets / SFREQ, "sample": onsets, "stimulus_id": ids, "concept": ids,
                "split": np.where(shown < 18, "train", "test"), "repetition": pd.Series(ids).groupby(ids).cumcount(),
            }
        )  # fmt: skip
        recording = Recording("01", f"0{seed + 1}", "01", "eeg", (Path(f"{seed}.npy"),), events)

        def read(start, stop):
            return signal[:, start:stop]

        sensors = Sensors((*CH_NAMES, EXTRA), read)
        return ContinuousPart(
            recording, CH_NAMES, SFREQ, signal.shape[1], lambda a, b: read(a, b)[:8], sensors=sensors
        )


RIDGE = {"kind": "ridge", "alphas": [100.0]}


def make_run(folder, encoder=RIDGE, **dataset):
    """Fit the encoder of a run, without its scores and its page."""
    with give_consent(code=["tests"]):
        config = validate_config(
            {
                "name": "small", "seed": 0, "dataset": {"kind": "tests.parts.live.small_run:SmallStream", **dataset},
                "split": {"kind": "published"}, "repeats": {"train": "single", "test": "single"},
                "target": {"kind": "pixels", "size": SIZE}, "encoder": encoder,
                "generator": {"kind": "latents"},
            },
            where="the small run",
        )  # fmt: skip
        pipeline.train(open_run(config, folder))
        return open_finished(folder)
