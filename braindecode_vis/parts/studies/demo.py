"""The demo: a simulated recording, taken through every stage."""

from __future__ import annotations

from pathlib import Path

from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.parts.phantom.truth import PhantomTruth
from braindecode_vis.pipeline.reporting import run_all
from braindecode_vis.pipeline.runs import ProgressListener, Run, open_run

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
        As for `make_phantom`.
    listener
        Shows progress.
    """
    from braindecode_vis.config import read_config
    from braindecode_vis.parts.phantom import SIZES

    # Named after what was asked for, since a folder belongs to one phantom.
    root = out / f"phantom-{size}-{drive}-snr{snr:g}-seed{seed}"
    truth = make_phantom(
        DEMO_FORMAT, root, size=SIZES[DEMO_FORMAT][size], snr=snr, seed=seed, drive=drive, listener=listener
    )
    config = read_config("phantom_eeg_average", [f"seed={seed}"], root=root)
    run = open_run(config, out, listener)
    with run.hold():
        run_all(run)
    return run, truth
