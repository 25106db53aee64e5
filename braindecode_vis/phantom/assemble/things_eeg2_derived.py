"""THINGS-EEG2 as others preprocessed it: the authors' 100 Hz epochs of 17 channels, and 250 Hz epochs of 63.

The same people look at the same images in the same order as in the raw layout, but are recorded at a lower rate, so
that no raw file is needed. Epochs are cut while the recording passes and kept in a flat temporary file; the noise
covariance of a session whitens them there (multivariate noise normalisation, Guggenmos et al. 2018,
doi:10.1016/j.neuroimage.2018.02.044), as in the published files: over training and test trials in the official ones,
over training trials in the 250 Hz ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from braindecode_vis.phantom.assemble import things_eeg2
from braindecode_vis.phantom.assemble.jobs import Counts, Format, Job, Progress, Unit
from braindecode_vis.phantom.assemble.sizes import PhantomSize
from braindecode_vis.phantom.assemble.streams import cut_epochs, make_lowpass, make_machine_at
from braindecode_vis.phantom.brain import Person
from braindecode_vis.phantom.forward import THINGS_EEG2_CHANNELS
from braindecode_vis.phantom.writers.things_eeg2 import PARTITIONS, Partition, SessionDesign
from braindecode_vis.phantom.writers.things_eeg2_derived import (
    estimate_epochs_bytes,
    write_250hz,
    write_official,
)

N_BASELINE_S = 0.2
_CHUNK = 128


@dataclass(frozen=True)
class Recipe:
    """How one publisher makes epochs.

    Parameters
    ----------
    sfreq, decim, cutoff_hz
        Final rate, by how much the simulated one is higher, and the low-pass in between.
    ch_names
        Channels that are kept.
    n_times, n_dropped
        Samples of an epoch from -0.2 s on, and how many of them are cut off at the start after whitening.
    whitened_by
        Partitions whose trials give the noise covariance.
    """

    sfreq: float
    decim: int
    cutoff_hz: float
    ch_names: tuple[str, ...]
    n_times: int
    n_dropped: int
    whitened_by: tuple[Partition, ...]


RECIPES = {
    "things-eeg2-official": Recipe(100.0, 2, 45.0, THINGS_EEG2_CHANNELS[-17:], 100, 0, PARTITIONS),
    "things-eeg2-250hz": Recipe(250.0, 1, 0.0, THINGS_EEG2_CHANNELS, 300, 50, ("training",)),
}


def count(name: str, size: PhantomSize) -> Counts:
    """Return work and space of the epochs."""
    recipe = RECIPES[name]
    total = things_eeg2.expect_total_seconds(size)
    n_kept = recipe.n_times - recipe.n_dropped
    one = estimate_epochs_bytes(size.n_trials, 1, len(recipe.ch_names), n_kept)
    spooled = estimate_epochs_bytes(size.n_trials, 1, len(recipe.ch_names), recipe.n_times, itemsize=4)
    seconds = 4 + total / 150 + size.n_subjects * size.n_trials * 2e-3
    return Counts(size.n_subjects * one, spooled, total, seconds, 1 + size.n_subjects * _count_steps(size))


def _count_steps(size: PhantomSize) -> int:
    return size.n_sessions * sum(things_eeg2.count_steps(size, partition) for partition in PARTITIONS)


def plan(name: str, job: Job) -> list[Unit]:
    """Return one unit per person: the two files share their noise covariance."""
    units = [things_eeg2.plan_image_list(job)]
    for person in job.people:

        def write(progress: Progress, person: Person = person) -> list[Path]:
            return _write_person(name, job, person, progress)

        units.append(Unit(f"subject {person.name}, epochs", _count_steps(job.size), write))
    return units


def _write_person(name: str, job: Job, person: Person, progress: Progress) -> list[Path]:
    recipe, size = RECIPES[name], job.size
    counts: dict[Partition, tuple[int, int]] = {
        "training": (size.n_train_images, size.train_repetitions),
        "test": (size.n_test_concepts, size.test_repetitions),
    }
    spools: dict[Partition, np.ndarray] = {}
    paths = {part: job.scratch / f"{name}-{person.name}-{part}.npy" for part in PARTITIONS}
    try:
        for partition, (n_images, n_repetitions) in counts.items():
            shape = (n_images * n_repetitions, len(recipe.ch_names), recipe.n_times)
            spools[partition] = np.lib.format.open_memmap(paths[partition], "w+", np.float32, shape)
        for design in things_eeg2.make_design(size, job.config.seed, person.index):
            _fill_session(recipe, job, person, design, spools, progress)
        return [
            _write_partition(name, recipe, job, person, part, counts[part], spools[part])
            for part in PARTITIONS
        ]
    finally:
        spools.clear()
        for path in paths.values():
            path.unlink(missing_ok=True)


def _fill_session(
    recipe: Recipe,
    job: Job,
    person: Person,
    design: SessionDesign,
    spools: dict[Partition, np.ndarray],
    progress: Progress,
) -> None:
    """Record one session, put its epochs where they belong and whiten them there."""
    rate = recipe.sfreq * recipe.decim
    machine = make_machine_at("eeg63", rate)
    picked = [machine.ch_names.index(name) for name in recipe.ch_names]
    taps = make_lowpass(rate, recipe.cutoff_hz, recipe.decim) if recipe.cutoff_hz else None
    n_baseline = round(N_BASELINE_S * recipe.sfreq)
    covariance = np.zeros((len(picked), len(picked)))
    slots: dict[Partition, list[int]] = {partition: [] for partition in PARTITIONS}
    n_summed = 0
    for partition, part in (("training", design.training), ("test", design.test)):
        repetitions = job.size.train_repetitions if partition == "training" else job.size.test_repetitions
        recordings = things_eeg2.simulate_recordings(job, person, machine, partition, design.session, part)
        for events, samples in recordings:
            shown = events[~events["is_target"]]
            onsets = np.round(shown["onset"].to_numpy() * rate).astype(int)
            blocks = (
                block[picked] for block in progress.watch(samples, lambda b: b.shape[1] / machine.sfreq)
            )
            epochs = cut_epochs(
                blocks, onsets - n_baseline * recipe.decim, recipe.n_times, decim=recipe.decim, taps=taps
            )
            places = (shown["condition"] * repetitions + shown["repetition"]).to_numpy()
            for place, epoch in zip(places.tolist(), epochs, strict=True):
                epoch = epoch - epoch[:, :n_baseline].mean(axis=1, keepdims=True)
                spools[partition][place] = epoch * 1e6
                slots[partition].append(place)
                if partition in recipe.whitened_by:
                    centred = spools[partition][place] - spools[partition][place].mean(axis=1, keepdims=True)
                    covariance += centred.astype(np.float64) @ centred.T
                    n_summed += recipe.n_times
    values, vectors = np.linalg.eigh(covariance / n_summed)
    whitener = ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32)
    for partition, rows in slots.items():
        for start in range(0, len(rows), _CHUNK):
            chunk = np.sort(rows[start : start + _CHUNK])
            spools[partition][chunk] = whitener @ spools[partition][chunk]


def _write_partition(
    name: str,
    recipe: Recipe,
    job: Job,
    person: Person,
    partition: Partition,
    counts: tuple[int, int],
    spool: np.ndarray,
) -> Path:
    n_images, n_repetitions = counts
    images = (
        spool[image * n_repetitions : (image + 1) * n_repetitions, :, recipe.n_dropped :]
        for image in range(n_images)
    )
    write = write_official if name == "things-eeg2-official" else write_250hz
    return write(
        job.root,
        person.index + 1,
        partition,
        images,
        n_images=n_images,
        n_repetitions=n_repetitions,
        ch_names=recipe.ch_names,
    )


def _make_format(name: str, description: str) -> Format:
    return replace(
        things_eeg2.FORMAT,
        name=name,
        description=description,
        count=lambda size: count(name, size),
        plan=lambda job: plan(name, job),
    )


OFFICIAL = _make_format(
    "things-eeg2-official", "THINGS-EEG2 epochs of its authors: 17 posterior channels, 100 Hz, whitened"
)
AT_250HZ = _make_format(
    "things-eeg2-250hz", "THINGS-EEG2 epochs as NICE and ATM ship them: 63 channels, 250 Hz, whitened"
)
