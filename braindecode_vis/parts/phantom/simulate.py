"""Phantoms whose brains respond to features of the packaged image network, and their cost on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.parts.phantom.build import Estimate
from braindecode_vis.parts.phantom.truth import PhantomTruth
from braindecode_vis.pipeline.runs import ProgressListener, SilentListener

_N_TIMED = 16  # images that are drawn and encoded to learn what all of them take


def estimate_phantom(form: str, size: Any, *, drive: str = "embedded") -> Estimate:
    """Return the cost of `make_phantom`, estimated from a few images on this machine, including the image encoder.

    Parameters
    ----------
    form, size, drive
        As in `make_phantom`.
    """
    from braindecode_vis.datasets.drawn.images import make_things_like_split, write_images
    from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
    from braindecode_vis.parts import phantom

    estimate, vectors = phantom.estimate_phantom(form, size), np.eye(_N_TIMED)
    with TemporaryDirectory() as folder:
        drawn = make_things_like_split(_N_TIMED, 0, 1, seed=0)
        # The first call also loads libraries, so it is not measured.
        for n in (2, _N_TIMED):
            started = time.process_time()  # what else the machine does meanwhile is not part of it
            table = write_images(drawn[:n], Path(folder), size=size.image_size, seed=0)
            images = list(StimulusSet(table, Path(folder)).iterate_images())
            phantom.make_drive(images, vectors[:n], table["stimulus_id"].tolist())
        drawing = time.process_time() - started
    # The drawing speed of this machine scales the other estimates.
    speed = drawing / _N_TIMED / phantom.expect_image_seconds(size.image_size)
    seconds = estimate.seconds * speed
    if drive != "embedded":  # no network is used
        return replace(estimate, seconds=seconds)
    started = time.process_time()
    import torch

    encoder, n_threads = EfficientNetConfig(device="cpu").build(), torch.get_num_threads()
    torch.set_num_threads(1)  # threads of a busy machine wait for each other, which takes processor time too
    try:
        encoder.encode(images)
        first, started = time.process_time() - started, time.process_time()
        encoder.encode(images)
        encoding = time.process_time() - started
    finally:
        torch.set_num_threads(n_threads)
    # Network and library are loaded once.
    seconds += estimate.n_images * encoding / _N_TIMED + max(0.0, first - encoding)
    return replace(estimate, seconds=seconds)


def make_phantom(
    form: str,
    out: Path,
    *,
    size: Any,
    snr: float,
    seed: int,
    ongoing: float | None = None,
    drive: str = "embedded",
    changing: float = 0.0,
    listener: ProgressListener | None = None,
    jobs: int = 1,
) -> PhantomTruth:
    """Simulate subjects who look at computer-drawn images, and write them in the files of a public data set.

    Parameters
    ----------
    form
        One of `braindecode_vis.parts.phantom.FORMATS`.
    out
        Folder of the data set.
    size
        A `PhantomSize`.
    snr
        Signal power over noise power, as defined in `PhantomConfig`.
    seed
        Root seed of subjects, images and noise.
    ongoing
        Ongoing activity in time series of fMRI, percent signal change; None means the default of the format.
    drive
        Features to which the higher regions respond, one of `braindecode_vis.parts.phantom.drive.DRIVES`.
    changing
        How much the sizes of noise sources change over time, as defined in `NoiseConfig`.
    listener
        Shows progress.
    jobs
        Processes that draw and simulate; the files are the same with any number.
    """
    from braindecode_vis.parts import phantom

    show = listener or SilentListener()
    estimate = phantom.estimate_phantom(form, size)
    # Checked before the network is loaded.
    phantom.check_space(out, estimate)

    with show.progress("simulating", estimate.n_steps) as advance:
        return phantom.make_phantom(
            form,
            out,
            size=size,
            config=phantom.PhantomConfig(
                snr=snr,
                seed=seed,
                drive=drive,
                noise=phantom.NoiseConfig(changing=changing),
                fmri=phantom.FmriConfig(ongoing_percent=ongoing),
            ),
            embed=lambda stimuli: embed_images(stimuli, show),
            advance=advance,
            jobs=jobs,
        )


def embed_images(stimuli: StimulusSet, listener: ProgressListener) -> np.ndarray:
    """Return the vectors of images by the packaged image network; they stay in the cache of every run."""
    from braindecode_vis.base.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import embed_stimuli
    from braindecode_vis.embeddings.efficientnet import EfficientNetConfig

    with listener.progress("encoding images", len(stimuli)) as advance:
        encoder = EfficientNetConfig().build()
        return embed_stimuli(encoder, stimuli, cache=find_cache_folder(), advance=advance).vectors
