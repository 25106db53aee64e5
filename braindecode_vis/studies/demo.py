"""Simulated subjects in the files of a public data set, and the demo that takes them through every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.phantom.truth import PhantomTruth
from braindecode_vis.pipeline.reporting import run_all
from braindecode_vis.pipeline.runs import Listener, Run, SilentListener, open_run
from braindecode_vis.stimuli import StimulusSet

DEMO_FORMAT = "things-eeg2"
DEMO_SNR = 0.05


def make_phantom(
    form: str, out: Path, *, size: Any, snr: float, seed: int, listener: Listener | None = None
) -> PhantomTruth:
    """Simulate subjects who look at generated images, and write them in the files of a public data set.

    Parameters
    ----------
    form
        One of `braindecode_vis.phantom.FORMATS`.
    out
        Folder of the data set.
    size
        A `PhantomSize`.
    snr
        Signal power over noise power, as `PhantomConfig` defines it.
    seed
        Root seed of subjects, images and noise.
    listener
        Shows progress.
    """
    from braindecode_vis import phantom
    from braindecode_vis.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import embed_stimuli
    from braindecode_vis.embeddings.efficientnet import EfficientNetConfig

    show = listener or SilentListener()
    estimate = phantom.estimate_phantom(form, size)
    # Before the network is loaded.
    phantom.check_space(out, estimate)

    def encode(stimuli: StimulusSet) -> np.ndarray:
        with show.progress("encoding images", len(stimuli)) as advance:
            encoder = EfficientNetConfig().build()
            return embed_stimuli(encoder, stimuli, cache=find_cache_folder(), advance=advance).vectors

    with show.progress("simulating", estimate.n_steps) as advance:
        return phantom.make_phantom(
            form,
            out,
            size=size,
            config=phantom.PhantomConfig(snr=snr, seed=seed),
            embed=encode,
            advance=advance,
        )


def run_demo(
    out: Path, *, size: str = "demo", snr: float = DEMO_SNR, seed: int = 0, listener: Listener | None = None
) -> tuple[Run, PhantomTruth]:
    """Simulate a recording in THINGS-EEG2's raw files and take it through every stage.

    Parameters
    ----------
    out
        The run folder; the simulated data set lies below it, in ``phantom``.
    size
        Name of a size of the phantom.
    snr, seed
        As for `make_phantom`.
    listener
        Shows progress.
    """
    from braindecode_vis.config import read_config
    from braindecode_vis.phantom import SIZES

    # Named after what was asked for, since a folder belongs to one phantom.
    root = out / f"phantom-{size}-snr{snr:g}-seed{seed}"
    truth = make_phantom(
        DEMO_FORMAT, root, size=SIZES[DEMO_FORMAT][size], snr=snr, seed=seed, listener=listener
    )
    config = read_config("phantom_eeg_network", [f"seed={seed}"], root=root)
    run = open_run(config, out, listener)
    with run.hold():
        run_all(run)
    return run, truth
