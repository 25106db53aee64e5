"""The demo: a simulated recording, taken through every stage."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from braindecode_vis.parts.phantom.simulate import embed_images
from braindecode_vis.parts.phantom.truth import PhantomTruth
from braindecode_vis.pipeline.reporting import run_all
from braindecode_vis.pipeline.runs import ProgressListener, Run, SilentListener, open_run

DEMO_FORMAT = "things-eeg2"
DEMO_SNR = 0.05
DEMO_DRIVE = "mixture"  # nothing of it is in the target that the demo decodes


def run_demo(
    out: Path,
    *,
    size: str = "demo",
    snr: float = DEMO_SNR,
    seed: int = 0,
    drive: str = DEMO_DRIVE,
    listener: ProgressListener | None = None,
) -> tuple[Run, PhantomTruth]:
    """Simulate a recording in THINGS-EEG2's raw files and take it through every stage.

    Parameters
    ----------
    out
        The run folder; the simulated data set lies below it, in ``phantom``.
    size
        Name of a size of the phantom.
    snr, seed, drive
        As for `braindecode_vis.parts.phantom.simulate.make_phantom`.
    listener
        Shows progress.
    """
    from braindecode_vis.config import read_config

    # Named after what was asked for, since a folder belongs to one phantom.
    root = out / f"phantom-{size}-{drive}-snr{snr:g}-seed{seed}"
    truth = _simulate(root, size, snr, seed, drive, listener or SilentListener())
    config = read_config("phantom_eeg_average", [f"seed={seed}"], root=root)
    run = open_run(config, out, listener)
    with run.hold():
        run_all(run)
    return run, truth


def _simulate(
    root: Path, size: str, snr: float, seed: int, drive: str, listener: ProgressListener
) -> PhantomTruth:
    """Make the phantom, and meanwhile embed its images, which the run finds in the cache.

    The recording is simulated on one core, and the network computes outside the interpreter's lock.
    """
    from braindecode_vis.parts import phantom

    chosen = phantom.SIZES[DEMO_FORMAT][size]
    n_steps = phantom.estimate_phantom(DEMO_FORMAT, chosen).n_steps
    vectors: list[Future[np.ndarray]] = []
    with ThreadPoolExecutor(1) as pool, listener.progress("simulating", n_steps) as advance:
        truth = phantom.make_phantom(
            DEMO_FORMAT,
            root,
            size=chosen,
            config=phantom.PhantomConfig(snr=snr, seed=seed, drive=drive),
            embed=lambda stimuli: vectors[0].result(),
            advance=advance,
            drawn=lambda stimuli: vectors.append(pool.submit(embed_images, stimuli, SilentListener())),
        )
    for made in vectors:
        made.result()
    return truth
