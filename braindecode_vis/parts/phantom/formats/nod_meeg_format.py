"""NOD-EEG and NOD-MEG from images to raw runs, tables of trials, and epochs.

Owns the files of both sets; the reader defines their names. The training pictures are those of the phantom `nod` of the
same size and seed, and a subject of one number is the same person in all three. What `nod` tests with are ImageNet
pictures here, too, shown as often as the size says. Traps that are kept: ``events.tsv`` has no picture, and many rows
of one pressed key; the two electrodes of the eyes have no type in the EEGLAB files.

Epochs are cut from the raw runs, low-passed and without baseline correction, as published; the components that the
authors removed by hand are left in. MEG has the 272 sensors of THINGS-MEG without references, and epochs at 200 Hz.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.store import replace_atomically
from braindecode_vis.datasets.drawn.images import name_imagenet
from braindecode_vis.datasets.nod_meeg import FORMS, LAYOUT, PICTURE
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import (
    Counts,
    Format,
    PhantomJob,
    Progress,
    Unit,
    list_pictures,
)
from braindecode_vis.parts.phantom.formats.bids_eeg import (
    TrialTiming,
    check_sessions,
    expect_run_s,
    make_design,
    plan_runs,
    write_dataset,
)
from braindecode_vis.parts.phantom.formats.fif import make_meg_info, write_epochs_fif, write_raw_fif
from braindecode_vis.parts.phantom.formats.file_writers import write_csv, write_tsv
from braindecode_vis.parts.phantom.forward import SensorSystem, make_sensor_system_at
from braindecode_vis.parts.phantom.meeg_signal import cut_epochs, make_lowpass, simulate_continuous
from braindecode_vis.parts.phantom.sizes import PhantomSize

TIMING = TrialTiming(mean=1.5, jitter=0.15, stimulus=0.8, first=2.0, tail=2.0)
SYSTEMS = {"eeg": ("eeg62-neuroscan", 500.0, 2), "meg": ("meg-ctf272", 1200.0, 6)}
"""System and rate of the raw runs, and how many of their samples are one of the epochs."""
N_CHANNELS = {"eeg": 62, "meg": 272}
_CODES = {"begin": 1, "end": 2, "resp": 3, PICTURE: 4}
_EYES = ("HEO", "VEO")
_TMIN, _LENGTH_S, _CUTOFF_HZ = -0.1, 0.9, 40.0


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images, all of them named as in ImageNet."""
    table = list_pictures(size, seed, "")
    _, names = name_imagenet(table)
    files = [f"{name}.JPEG" for name in names]
    paths = [f"stimuli/ImageNet/{file}" for file in files]
    return table.assign(stimulus_id=names, file_name=files, path=paths)


def _make_system(modality: str) -> SensorSystem:
    return make_sensor_system_at(*SYSTEMS[modality][:2])


def count(modality: str, size: PhantomSize) -> Counts:
    """Return work and space of runs and epochs."""
    _, sfreq, decim = SYSTEMS[modality]
    n_channels = N_CHANNELS[modality]
    run_s = expect_run_s(size, TIMING)
    n_runs = size.n_subjects * size.n_sessions * size.runs
    run_bytes = 4 * n_channels * sfreq * run_s
    epochs = 4 * n_channels * (_LENGTH_S * sfreq / decim + 1) * size.n_trials
    n_bytes = n_runs * (run_bytes + 20_000) + size.n_subjects * (epochs + 600 * size.n_trials)
    seconds = 7 + n_runs * run_s / (100 if modality == "eeg" else 20) + 6e-3 * size.n_subjects * size.n_trials
    n_steps = 1 + n_runs * max(1, round(run_s)) + size.n_subjects * size.n_trials
    return Counts(n_bytes, max(run_bytes, 2 * epochs), n_runs * run_s, seconds, n_steps)


def plan(job: PhantomJob) -> list[Unit]:
    """Return the root files, one unit per raw run, and the epochs of each subject, which are cut from them."""
    name = f"NOD-{job.sensors.modality.upper()} phantom"
    units = plan_runs(job, TIMING, partial(write_dataset, name=name), _write_run)
    for person in job.subjects:
        write = partial(_write_epochs, job, person)
        units.append(Unit(f"subject {person.name}, trials and epochs", job.size.n_trials, write))
    return units


def _find_run(job: PhantomJob, person: Person, session: int, run: int) -> Path:
    kind = job.sensors.modality
    labels = {"subject": person.name, "session": f"ImageNet{session:02d}", "run": f"{run:02d}"}
    return LAYOUT.place(job.root, "run", modality=kind, form=FORMS[kind], **labels)


def _write_run(job: PhantomJob, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    system, path = job.sensors, _find_run(job, person, session, run)
    design = make_design(job, person.index, TIMING)
    trials = design[(design["session"] == session) & (design["run"] == run)]
    samples = np.round(trials["onset"].to_numpy() * system.sfreq).astype(int)
    n_samples = int(samples[-1]) + round(TIMING.tail * system.sfreq)
    blocks = simulate_continuous(
        person, system, samples / system.sfreq, trials["row"].to_numpy(), TIMING.stimulus, n_samples,
        name=f"ses-{session:02d}_run-{run:02d}",
    )  # fmt: skip
    watched = progress.watch_samples(blocks, system.sfreq)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.name.removesuffix(f"_{system.modality}{path.suffix}")
    files = [
        write_tsv(path.with_name(f"{stem}_events.tsv"), make_events(samples, n_samples, system.sfreq)),
        write_tsv(path.with_name(f"{stem}_channels.tsv"), _list_channels(system)),
    ]
    if system.modality == "eeg":
        return [*files, write_eeglab(path, np.concatenate(list(watched), axis=1), system)]
    return [*files, write_raw_fif(path, watched, _make_info(system), n_samples)]


def make_events(samples: np.ndarray, n_samples: int, sfreq: float) -> pd.DataFrame:
    """Return ``events.tsv`` of a run: its pictures by `sample` without names, and a key that is held after each."""
    pressed = np.add.outer(samples + round(sfreq), np.arange(3) * round(0.01 * sfreq)).ravel()
    kinds = ["begin", *[PICTURE] * len(samples), *["resp"] * len(pressed), "end"]
    table = pd.DataFrame({"trial_type": kinds, "sample": [0, *samples, *pressed, n_samples - 1]})
    table = table.sort_values("sample", kind="stable").reset_index(drop=True)
    table.insert(0, "onset", table["sample"] / sfreq)
    table.insert(1, "duration", 1 / sfreq)
    table.insert(3, "value", table["trial_type"].map(_CODES))
    return table.assign(StimulusPresentation="PsychophysicsToolbox")


def _list_channels(system: SensorSystem) -> pd.DataFrame:
    eeg = system.modality == "eeg"
    names = [*system.ch_names, *(_EYES if eeg else ())]
    kinds = ["EEG" if eeg else "MEGGRADAXIAL"] * len(system.ch_names) + ["EOG"] * (
        len(names) - len(system.ch_names)
    )
    table = pd.DataFrame({"name": names, "type": kinds, "units": system.unit})
    return table.assign(
        low_cutoff=0.0, high_cutoff=system.sfreq / 2, sampling_frequency=system.sfreq, status="good"
    )


def write_eeglab(path: Path, data: np.ndarray, system: SensorSystem) -> Path:
    """Write one EEGLAB file with its samples inside, in microvolt, and two electrodes of the eyes at the end."""
    from scipy.io import savemat

    names = [*system.ch_names, *_EYES]
    # The signal of the eyes is that of the nearest electrodes.
    values = np.concatenate([data, data[: len(_EYES)]]).astype(np.float32) * np.float32(1e6)
    unknown = np.full((len(_EYES), 3), np.nan)
    # EEGLAB has x to the nose and y to the left, in mm.
    places = np.concatenate([system.ch_pos, unknown])[:, [1, 0, 2]] * [1e3, -1e3, 1e3]
    columns = np.empty(len(names), dtype=[(key, object) for key in ("labels", "X", "Y", "Z")])
    for row, (name, (x, y, z)) in enumerate(zip(names, places, strict=True)):
        columns[row] = (name, *((x, y, z) if np.isfinite(x) else [np.empty(0)] * 3))
    content: dict[str, Any] = {
        "setname": path.stem, "nbchan": len(names), "trials": 1, "pnts": values.shape[1], "srate": system.sfreq,
        "xmin": 0.0, "xmax": (values.shape[1] - 1) / system.sfreq, "data": values, "chanlocs": columns,
        "event": np.empty(0), "epoch": np.empty(0), "icawinv": np.empty(0), "icaweights": np.empty(0),
        "icasphere": np.empty(0),
    }  # fmt: skip
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        savemat(file, {"EEG": content})
    return path


def _make_info(system: SensorSystem) -> Any:
    if system.modality == "eeg":
        return system.make_info()
    info = system.make_info()
    locs = np.array([channel["loc"] for channel in info["chs"]])
    device = info["dev_head_t"]["trans"]
    return make_meg_info(
        system.ch_names, system.sfreq, locs=locs, line_freq=system.line_freq, dev_head=device
    )


def _write_epochs(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    kind = job.sensors.modality
    design = make_design(job, person.index, TIMING)
    shown = job.table.iloc[design["row"].to_numpy()].reset_index(drop=True)
    table = pd.DataFrame(
        {
            "subject": int(person.name), "task": "ImageNet",
            "session": design["session"].map("ImageNet{:02d}".format).to_numpy(), "run": design["run"].to_numpy(),
            "class_id": shown["stimulus_id"].str.rpartition("_")[0], "image_id": shown["stimulus_id"],
            "resp_is_right": 1,
        }
    )  # fmt: skip
    name, sfreq, decim = SYSTEMS[kind]
    info = _make_info(make_sensor_system_at(name, sfreq / decim))
    path = write_epochs_fif(
        LAYOUT.place(job.root, "epochs", subject=person.name, modality=kind),
        progress.watch(_cut(job, person, design, decim), lambda epoch: 1), info,
        event_ids=np.full(len(table), _CODES[PICTURE]), tmin=_TMIN, n_times=round(_LENGTH_S * sfreq / decim) + 1,
        metadata=table,
    )  # fmt: skip
    trials = write_csv(LAYOUT.place(job.root, "trials", subject=person.name), table)
    return [trials, *path.parent.glob(f"{path.stem}*.fif")]


def _cut(job: PhantomJob, person: Person, design: pd.DataFrame, decim: int) -> Iterator[np.ndarray]:
    """Yield every epoch of a subject, cut from the raw runs."""
    import mne

    sfreq, n_channels = job.sensors.sfreq, len(job.sensors.ch_names)
    step, taps = round(10 * sfreq), make_lowpass(sfreq, _CUTOFF_HZ, decim)
    for _, trials in design.groupby(["session", "run"]):
        session, run = int(trials["session"].iloc[0]), int(trials["run"].iloc[0])
        raw = mne.io.read_raw(_find_run(job, person, session, run), verbose="error")
        blocks = (
            raw.get_data(np.arange(n_channels), start, min(start + step, raw.n_times), verbose="error")
            for start in range(0, raw.n_times, step)
        )
        starts = np.round((trials["onset"].to_numpy() + _TMIN) * sfreq).astype(int)
        n_times = round(_LENGTH_S * sfreq / decim) + 1
        yield from cut_epochs(
            (block.astype(np.float32) for block in blocks), starts, n_times, decim=decim, taps=taps
        )


def _make_format(modality: Any, files: str) -> Format:
    return Format(
        name=f"nod-{modality}",
        description=f"NOD-{modality.upper()}: raw runs ({files}), tables of trials and epochs of the pictures of `nod`",
        modality=modality,
        uses=("n_runs",),
        duration_s=TIMING.stimulus,
        limits={"train_repetitions": (1, 1)},
        check=check_sessions,
        count=partial(count, modality),
        list_images=list_images,
        make_recorder=lambda size: _make_system(modality),
        plan=plan,
        n_channels=N_CHANNELS[modality],
    )


EEG = _make_format("eeg", "EEGLAB, 62 electrodes, 500 Hz")
MEG = _make_format("meg", "FIF, 272 sensors, 1200 Hz")
