"""THINGS-MEG from images to raw runs and preprocessed epochs, as in ds004212, but with FIF instead of CTF folders.

Owns the design, the BIDS tree with its raw runs, ``derivatives/preprocessed/preprocessed_P*-epo.fif``,
``sourcedata/sample_attributes_P*.csv`` and the two THINGS tables that turn image numbers into concepts. MNE can read
CTF folders but not write them, so raw runs are ``_meg.fif``; the reference gradiometers are left out.

Epochs of sessions with raw runs are cut from these files, so that raw runs and epochs agree; other sessions are
recorded at the rate of the epochs. Epochs are low-passed at 40 Hz and z-scored by their baseline, as published; the 0.1
Hz high-pass is left out, since the z-score replaces it.

Traps that are kept: ``channels.tsv`` types every sensor ``OTHER``; there are macOS ``._`` files; the onset in
``events.tsv`` comes from the optical sensor, 150 ms after the trigger on ``UPPT001``; catch trials have
``N/A`` for a number, and 999999 in the epochs; the epochs have no condition names, so only their twelve repetitions
identify test images; the tables of the image set have no header.

References
----------
.. [1] Hebart, M. N. et al. (2023). THINGS-data, a multimodal collection of large-scale datasets for
   investigating object representations in human brain and behavior. eLife 12, e82580.
   https://doi.org/10.7554/eLife.82580
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError, check_columns
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.datasets.drawn.images import make_concepts, match_concepts
from braindecode_vis.datasets.things_meg.files import (
    CATCH_ID,
    CONCEPTS_FILE,
    DROPPED_SENSOR,
    LAYOUT,
    PATHS_FILE,
    STIMULUS_CODE,
    TRIGGER_CHANNEL,
)
from braindecode_vis.parts.phantom.brain import Person
from braindecode_vis.parts.phantom.format_plan import Counts, Format, PhantomJob, Progress, Unit, list_units
from braindecode_vis.parts.phantom.formats import things_fmri_format
from braindecode_vis.parts.phantom.formats.fif import make_meg_info, write_epochs_fif, write_raw_fif
from braindecode_vis.parts.phantom.formats.file_writers import (
    check_block,
    write_csv,
    write_json_file,
    write_text,
    write_tsv,
)
from braindecode_vis.parts.phantom.formats.things_fmri_format import (
    count_session_trials,
    draw_sessions,
)
from braindecode_vis.parts.phantom.forward import make_sensor_system, make_sensor_system_at
from braindecode_vis.parts.phantom.meeg_signal import cut_epochs, make_lowpass, simulate_continuous
from braindecode_vis.parts.phantom.sizes import (
    PhantomSize,
    check_one_exemplar_a_session,
    count_images_of_concepts,
)

USES = ("n_runs", "n_catch", "n_raw_sessions")
CUTOFF_HZ = 40.0  # low-pass of the published epochs [1]_
MEAN_SOA_S = 1.5  # between onsets, jittered by 0.2 s [1]_
MEG_SYSTEM = "meg-ctf272"
RAW_SFREQ = 1200.0
# From -0.1 to 1.3 s, both ends included: the `times` of the published files.
EPOCH_SFREQ, EPOCH_TMIN, EPOCH_N_TIMES = 200.0, -0.1, 281
END_CODE = 32  # of the end of a run
TRIGGER_LEAD_S = 0.15
STIMULUS_S = 0.5  # on the screen, followed by a blank of 0.8 to 1.2 s [1]_
_OPTICAL = "UADC016-2104"
_PULSE_S = 0.05
LEAD_S, TAIL_S = 2.5, 3.0  # first onset of a run, and what follows its last one
# The columns of `sample_attributes_P*.csv`. Readers use some by position: 0, 2 and 8.
ATTRIBUTE_COLUMNS = (
    "trial_type", "image_nr", "category_nr", "exemplar_nr", "test_image_nr", "things_category_nr",
    "things_image_nr", "things_exemplar_nr", "image_path", "image_on", "image_off", "subject_id",
    "session_nr", "run_nr", "trial_nr", "abs_trial_nr", "responded", "RT",
)  # fmt: skip
_COORDINATES = {
    "MEGCoordinateSystem": "CTF",
    "MEGCoordinateUnits": "cm",  # as published; the numbers read like metres
    "HeadCoilCoordinates": {"NAS": [0.0, 0.0796, 0.0], "LPA": [-0.078, 0.0, 0.0], "RPA": [0.0761, 0.0, 0.0]},
    "HeadCoilCoordinateSystem": "CTF",
    "HeadCoilCoordinateUnits": "cm",
}


def check(size: PhantomSize) -> None:
    """Raise `ConfigError` if THINGS-MEG cannot have this size."""
    check_one_exemplar_a_session(size, "THINGS-MEG")
    assert size.n_raw_sessions is not None
    if size.n_raw_sessions > size.n_sessions or size.runs > count_session_trials(size):
        raise ConfigError(
            f"n_raw_sessions ({size.n_raw_sessions}) cannot exceed n_sessions ({size.n_sessions}), nor n_runs "
            f"({size.n_runs}) the {count_session_trials(size)} trials of a session."
        )


def count(size: PhantomSize) -> Counts:
    """Return work and space of runs and epochs."""
    assert size.n_raw_sessions is not None
    n_trials = count_session_trials(size)
    session_s = n_trials * MEAN_SOA_S + size.runs * (LEAD_S + TAIL_S - MEAN_SOA_S)
    raw_s = size.n_subjects * size.n_raw_sessions * session_s
    epochs_s = size.n_subjects * (size.n_sessions - size.n_raw_sessions) * session_s
    epochs = estimate_epochs_bytes(size.n_sessions * n_trials)
    n_bytes = raw_s * estimate_raw_bytes(1) * RAW_SFREQ + size.n_subjects * epochs
    # Epochs are in a flat file, in MNE's parts and in the final file; at most two of these exist at a time.
    scratch = 2 * epochs + estimate_raw_bytes(1) * RAW_SFREQ * session_s / size.runs
    # Measured on one core: the simulation is faster than real time by this factor, and MNE writes an epoch in 6 ms.
    seconds = 7 + raw_s / 25 + epochs_s / 120 + size.n_subjects * size.n_sessions * n_trials * 6e-3
    steps = size.n_subjects * (
        size.n_raw_sessions * size.runs * _count_run_steps(size) + size.n_sessions * n_trials
    )
    return Counts(n_bytes, scratch, raw_s + epochs_s, seconds, 1 + steps)


def _count_run_steps(size: PhantomSize) -> int:
    return max(1, round(count_session_trials(size) / size.runs * MEAN_SOA_S))


def list_images(size: PhantomSize, seed: int) -> pd.DataFrame:
    """Return the images in the order of their THINGS numbers."""
    n_concepts = size.n_train_concepts + size.n_test_concepts
    names = make_concepts(n_concepts, seed=seed)["concept"].tolist()
    table = make_image_table(names, size.n_train_exemplars, size.n_test_concepts)
    table = match_concepts(table, n_concepts, seed)
    paths = "object_images/" + table["concept"] + "/" + table["stimulus_id"] + ".jpg"
    return table.assign(things_path=table["path"], path=paths, file_name=table["stimulus_id"] + ".jpg")


def plan(job: PhantomJob) -> list[Unit]:
    """Return the tables, one unit per raw run, and the epochs of each subject."""

    def write_tables(progress: Progress) -> list[Path]:
        images = job.table.assign(path=job.table["things_path"])
        write_dataset(job.root, [person.index + 1 for person in job.subjects], images)
        tables = (job.root / "THINGS").rglob("*.csv")
        return [job.root / "dataset_description.json", job.root / "participants.tsv", *tables]

    units = [Unit("the tables of the data set", 1, write_tables)]
    name = "subject {person.name}, session {session:02d}, raw run {run:02d}"
    labels: dict[str, Any] = {
        "session": range(1, (job.size.n_raw_sessions or 0) + 1),
        "run": range(1, job.size.runs + 1),
    }
    n_epochs = job.size.n_sessions * count_session_trials(job.size)
    return [
        *units,
        *list_units(job, name, _count_run_steps(job.size), _write_run, **labels),
        # The epochs are cut from the raw runs.
        *list_units(job, "subject {person.name}, epochs", n_epochs, _write_epochs, reads_others=True),
    ]


@lru_cache(maxsize=4)
def _make_design(job: PhantomJob, subject: int) -> pd.DataFrame:
    seed = derive_seed(job.config.seed, "design", subject)
    return make_things_meg_design(
        job.table, job.size.n_sessions, job.size.runs, seed, n_catch=job.size.n_catch or 0
    )


def _write_run(job: PhantomJob, person: Person, session: int, run: int, progress: Progress) -> list[Path]:
    design = _make_design(job, person.index)
    events = design[(design["session"] == session) & (design["run"] == run)]
    system, info = job.sensors, job.sensors.make_info()
    samples = _simulate_run(job, person, system.sfreq, session, run, events)
    path = write_raw_run(
        job.root,
        person.index + 1,
        session,
        run,
        progress.watch_samples(samples, system.sfreq),
        events,
        ch_names=system.ch_names,
        locs=np.array([channel["loc"] for channel in info["chs"]]),
        dev_head=info["dev_head_t"]["trans"],
    )
    stem = path.name.removesuffix("_meg.fif")
    return [p for p in path.parent.iterdir() if p.name.removeprefix("._").startswith(stem)]


def _simulate_run(
    job: PhantomJob, person: Person, sfreq: float, session: int, run: int, events: pd.DataFrame
) -> Iterator[np.ndarray]:
    return simulate_continuous(
        person,
        make_sensor_system_at(MEG_SYSTEM, sfreq),
        events["onset"].to_numpy(),
        events["row"].to_numpy(),
        STIMULUS_S,
        round(count_run_samples(events) * sfreq / RAW_SFREQ),
        name=f"ses-{session:02d}_run-{run:02d}",
        block_s=2.0,
    )


def _write_epochs(job: PhantomJob, person: Person, progress: Progress) -> list[Path]:
    design = _make_design(job, person.index)
    attributes = make_sample_attributes(person.index + 1, design, job.table, job.config.seed)
    info = job.sensors.make_info()
    kept = [i for i, name in enumerate(job.sensors.ch_names) if name != DROPPED_SENSOR]
    path = write_preprocessed(
        job.root,
        person.index + 1,
        progress.watch(_cut_sessions(job, person, design, kept), lambda epoch: 1),
        attributes,
        ch_names=[job.sensors.ch_names[i] for i in kept],
        locs=np.array([info["chs"][i]["loc"] for i in kept]),
        dev_head=info["dev_head_t"]["trans"],
    )
    parts = path.parent.glob(f"{path.stem}*.fif")
    return [*parts, write_sample_attributes(job.root, person.index + 1, attributes)]


def _cut_sessions(
    job: PhantomJob, person: Person, design: pd.DataFrame, kept: list[int]
) -> Iterator[np.ndarray]:
    """Yield every epoch of a subject, z-scored by its baseline."""
    n_baseline = round(-EPOCH_TMIN * EPOCH_SFREQ) + 1
    for _, events in design.groupby(["session", "run"]):
        session, run = int(events["session"].iloc[0]), int(events["run"].iloc[0])
        is_raw = session <= (job.size.n_raw_sessions or 0)
        sfreq = RAW_SFREQ if is_raw else EPOCH_SFREQ
        decim = round(sfreq / EPOCH_SFREQ)
        if is_raw:
            labels = {"subject": person.index + 1, "session": session, "run": run}
            samples = read_sensors(LAYOUT.place(job.root, "run", form="fif", **labels))
        else:
            samples = _simulate_run(job, person, sfreq, session, run, events)
        starts = np.round((events["onset"].to_numpy() + EPOCH_TMIN) * sfreq).astype(int)
        epochs = cut_epochs(
            (block[kept] for block in samples),
            starts,
            EPOCH_N_TIMES,
            decim=decim,
            taps=make_lowpass(sfreq, CUTOFF_HZ, decim),
        )
        for epoch in epochs:
            baseline = epoch[:, :n_baseline]
            # z-scored per channel and trial by its own baseline, as published [1]_.
            yield (epoch - baseline.mean(axis=1, keepdims=True)) / baseline.std(axis=1, keepdims=True)


def read_sensors(path: Path) -> Iterator[np.ndarray]:
    """Yield the sensors of a finished raw run, 2 s at a time."""
    import mne

    raw = mne.io.read_raw_fif(path, verbose="error")
    step = round(2 * RAW_SFREQ)
    for start in range(0, raw.n_times, step):
        stop = min(start + step, raw.n_times)
        # FIF stores float32; MNE returns float64.
        yield raw.get_data(picks="mag", start=start, stop=stop).astype(np.float32)


def make_image_table(
    concepts: Sequence[str], n_exemplars: int = 12, n_test_concepts: int = 200
) -> pd.DataFrame:
    """Return the images of THINGS-fMRI; the row number plus one is the THINGS image number.

    Returns
    -------
    DataFrame
        `image_nr`, `concept`, `category_nr` (from 1), `exemplar_nr`, `stimulus_id`, `path` and `is_test`.

    Examples
    --------
    >>> make_image_table(["ant", "bee"], 2, 1)["path"].tolist()[-1]
    'images/bee/bee_02s.jpg'
    """
    table = things_fmri_format.make_image_table(concepts, n_exemplars, n_test_concepts)
    table.insert(0, "image_nr", np.arange(1, len(table) + 1))
    paths = "images/" + table["concept"] + "/" + table["stimulus_id"] + ".jpg"
    columns = ["image_nr", "concept", "category_nr", "exemplar_nr", "stimulus_id", "path", "is_test"]
    return table.assign(path=paths)[columns]


def make_things_meg_design(
    images: pd.DataFrame,
    n_sessions: int = 12,
    n_runs: int = 10,
    seed: int = 0,
    *,
    n_catch: int = 200,
    soa_s: tuple[float, float] = (1.3, 1.7),
) -> pd.DataFrame:
    """Return every trial of one subject.

    Session k shows exemplar k of each concept once, every test image once, and `n_catch` catch images.

    Parameters
    ----------
    images : DataFrame
        From `make_image_table`.
    soa_s
        Range of the time between onsets (s).

    Returns
    -------
    DataFrame
        `session`, `run` (both from 1), `trial_type` (``exp``, ``test``, ``catch``), `image_nr` (999999 for
        catch), `category_nr` (NaN for catch), `onset` (s, of the picture), `duration` (s), `sample` (at
        1200 Hz), `row` (of `images`, -1 for catch) and `catch_nr`.
    """
    sessions = []
    for table, rng in draw_sessions(images, n_sessions, n_runs, seed, "things-meg", n_catch=n_catch):
        gaps = rng.integers(round(soa_s[0] * RAW_SFREQ), round(soa_s[1] * RAW_SFREQ) + 1, len(table))
        first = ~table["run"].duplicated()
        # In whole samples from the start, so that trigger, optical sensor and table agree to the sample.
        gaps = np.where(first, round(LEAD_S * RAW_SFREQ), gaps)
        table["sample"] = pd.Series(gaps).groupby(table["run"]).cumsum()
        sessions.append(table)
    design = pd.concat(sessions, ignore_index=True)
    shown = design["row"].to_numpy()
    is_catch = shown < 0
    design["onset"] = design["sample"] / RAW_SFREQ
    design["duration"] = STIMULUS_S
    design["image_nr"] = np.where(is_catch, CATCH_ID, images["image_nr"].to_numpy()[shown])
    design["category_nr"] = np.where(is_catch, np.nan, images["category_nr"].to_numpy()[shown].astype(float))
    return design


def count_run_samples(events: pd.DataFrame) -> int:
    """Return the length of a run from its events."""
    return int(events["sample"].max()) + round(TAIL_S * RAW_SFREQ)


def write_raw_run(
    root: Path,
    subject: int,
    session: int,
    run: int,
    blocks: Iterable[np.ndarray],
    events: pd.DataFrame,
    *,
    ch_names: Sequence[str],
    locs: np.ndarray | None = None,
    dev_head: np.ndarray | None = None,
) -> Path:
    """Write one run: ``_meg.fif``, ``_events.tsv``, ``_channels.tsv``, ``_meg.json`` and ``._`` junk.

    Parameters
    ----------
    blocks : iterable of arrays of shape (n_channels, n)
        Tesla, 1200 Hz, sensors only; the optical sensor and the trigger are added from the events.
    events : DataFrame
        The rows of `make_things_meg_design` of this session and run.
    ch_names
        Names of the sensors.
    locs : array of shape (n_channels, 12), optional
        Sensor positions and orientations.
    dev_head : array of shape (4, 4), optional
        Device to head coordinates.

    Raises
    ------
    DataError
        If the first event is too early for its trigger, or the blocks do not fit.
    """
    check_columns(
        events.columns, ("onset", "sample", "trial_type", "image_nr", "category_nr"), what="MEG events"
    )
    n_samples = count_run_samples(events)
    if events["sample"].min() < round(TRIGGER_LEAD_S * RAW_SFREQ):
        raise DataError("the first event of a THINGS-MEG run must leave 150 ms for its trigger.")
    path = LAYOUT.place(root, "run", subject=subject, session=session, run=run, form="fif")
    folder, stem = path.parent, path.name.removesuffix("_meg.fif")
    extra = ((_OPTICAL, "misc"), (TRIGGER_CHANNEL, "stim"))
    info = make_meg_info(ch_names, RAW_SFREQ, locs=locs, extra=extra, dev_head=dev_head)
    write_raw_fif(path, _add_sensors(blocks, events, len(ch_names), n_samples), info, n_samples)
    number = events["image_nr"].astype(float)
    table = pd.DataFrame(
        {
            "onset": events["onset"],
            "duration": STIMULUS_S,
            "trial_type": events["trial_type"],
            "things_category_nr": events["category_nr"],
            "value": number.where(number != CATCH_ID),  # N/A for catch trials, 999999 in the epochs alone
            "sample": events["sample"],
        }
    )
    write_tsv(folder / f"{stem}_events.tsv", table, missing="N/A")
    channels = pd.DataFrame({"name": [*ch_names, _OPTICAL, TRIGGER_CHANNEL]})
    sensor = np.arange(len(channels)) < len(ch_names)
    # As published; readers must find the type of a sensor by its name.
    channels["type"] = np.where(sensor, "OTHER", "MISC")
    channels["units"] = np.where(sensor, "T", "V")
    channels["low_cutoff"], channels["high_cutoff"] = 0.0, RAW_SFREQ / 2
    channels["description"] = np.where(sensor, "Other type of channel", "Miscellaneous")
    channels["sampling_frequency"], channels["status"] = RAW_SFREQ, "good"
    write_tsv(folder / f"{stem}_channels.tsv", channels)
    write_json_file(folder / f"{stem}_meg.json", _make_sidecar(len(ch_names), n_samples))
    write_json_file(folder / f"{stem}_coordsystem.json", _COORDINATES)
    for name in (path.name, f"{stem}_events.tsv"):
        # AppleDouble: magic, version, then an empty table of entries.
        write_text(folder / f"._{name}", "\x00\x05\x16\x07\x00\x02\x00\x00" + "\x00" * 4088)
    return path


def _add_sensors(
    blocks: Iterable[np.ndarray], events: pd.DataFrame, n_channels: int, n_samples: int
) -> Iterator[np.ndarray]:
    """Append the optical sensor (V) and the trigger to each block."""
    optical = np.zeros(n_samples, dtype=np.float32)
    trigger = np.zeros(n_samples, dtype=np.float32)
    pulse = round(_PULSE_S * RAW_SFREQ)
    for sample in events["sample"].to_numpy():
        optical[sample : sample + round(STIMULUS_S * RAW_SFREQ)] = 1
        start = sample - round(TRIGGER_LEAD_S * RAW_SFREQ)
        trigger[start : start + pulse] = STIMULUS_CODE
    end = n_samples - round(RAW_SFREQ)
    trigger[end : end + pulse] = END_CODE
    start = 0
    for block in blocks:
        array = check_block(block, (n_channels, None), what="the blocks of an MEG run")
        stop = start + array.shape[1]
        rows = np.empty((n_channels + 2, array.shape[1]), dtype=np.float32)
        rows[:n_channels] = array
        rows[-2:] = 0
        # Blocks may be longer than the announced length; the writer then raises an error that names them.
        known = max(0, min(stop, n_samples) - start)
        rows[-2, :known], rows[-1, :known] = optical[start:stop], trigger[start:stop]
        yield rows
        start = stop


def _make_sidecar(n_channels: int, n_samples: int) -> dict[str, object]:
    return {
        "TaskName": "main",
        "Manufacturer": "CTF",
        "PowerLineFrequency": 60,
        "SamplingFrequency": RAW_SFREQ,
        "SoftwareFilters": "n/a",
        "RecordingDuration": (n_samples - 1) / RAW_SFREQ,
        "RecordingType": "continuous",
        "DewarPosition": "n/a",
        "DigitizedLandmarks": False,
        "DigitizedHeadPoints": False,
        "MEGChannelCount": n_channels,
        "MEGREFChannelCount": 0,
        "EEGChannelCount": 0,
        "EOGChannelCount": 0,
        "ECGChannelCount": 0,
        "EMGChannelCount": 0,
        "MiscChannelCount": 2,
        "TriggerChannelCount": 0,
    }


def write_dataset(root: Path, subjects: Sequence[int], images: pd.DataFrame) -> None:
    """Write the files that exist once per data set: description, participants, and the tables of the image set.

    ``THINGS/Metadata/Image-specific/image_paths.csv`` and ``Concept-specific/image_concept_index.csv`` have
    no header, and a row number plus one is an image number.
    """
    write_json_file(
        root / "dataset_description.json",
        {"Name": "THINGS-MEG phantom", "BIDSVersion": "1.6.0", "DatasetType": "raw", "License": "CC0"},
    )
    names = [f"sub-BIGMEG{subject}" for subject in subjects]
    write_tsv(root / "participants.tsv", pd.DataFrame({"participant_id": names, "sex": "n/a"}))
    tables = root / "THINGS" / "Metadata"
    write_csv(tables / "Image-specific" / PATHS_FILE, images[["path"]], header=False)
    index = tables / "Concept-specific"
    write_csv(index / CONCEPTS_FILE, images[["category_nr"]], header=False)
    write_csv(index / "unique_id.csv", images[["concept"]].drop_duplicates(), header=False)


def make_sample_attributes(
    subject: int, design: pd.DataFrame, images: pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """Return the table of ``sample_attributes_P*.csv``: 18 columns, one row per trial.

    ``image_on`` and ``image_off`` are seconds on the clock of the stimulus computer.
    """
    rng = make_generator(seed, "things-meg", "attributes", subject)
    shown = images.iloc[design["row"].to_numpy()].reset_index(drop=True)
    is_catch = (design["trial_type"] == "catch").to_numpy()
    is_test = (design["trial_type"] == "test").to_numpy()
    test_numbers = pd.Series(
        np.arange(1, images["is_test"].sum() + 1), index=np.flatnonzero(images["is_test"])
    )
    table = pd.DataFrame({"trial_type": design["trial_type"]})
    table["image_nr"] = design["image_nr"]
    # Catch images form one more category, after the last one.
    table["category_nr"] = np.where(is_catch, images["category_nr"].max() + 1, shown["category_nr"])
    table["exemplar_nr"] = np.where(is_catch, design["catch_nr"], shown["exemplar_nr"])
    table["test_image_nr"] = design["row"].map(test_numbers)
    for name in ("category_nr", "image_nr", "exemplar_nr"):
        table[f"things_{name}"] = shown[name].where(~is_catch)
    single = "images_meg/" + shown["concept"] + "/" + shown["stimulus_id"] + ".jpg"
    table["image_path"] = np.select(
        [is_catch, is_test],
        [design["catch_nr"].map("images_catch_meg/catch_{:03d}.jpg".format),
         "images_test_meg/" + shown["stimulus_id"] + ".jpg"],
        single,
    )  # fmt: skip
    # The stimulus computer records the time of the trigger, 150 ms before the light, with a small jitter.
    table["image_on"] = design["onset"] - TRIGGER_LEAD_S + rng.normal(0, 0.002, len(design))
    table["image_off"] = table["image_on"] + STIMULUS_S
    table["subject_id"], table["session_nr"], table["run_nr"] = subject, design["session"], design["run"]
    table["trial_nr"] = design.groupby(["session", "run"]).cumcount() + 1
    table["abs_trial_nr"] = np.arange(1, len(design) + 1)
    # To catch images (invented objects), subjects nearly always respond with a button.
    table["responded"] = (is_catch & (rng.random(len(design)) < 0.95)).astype(int)
    table["RT"] = np.where(table["responded"] == 1, rng.uniform(0.4, 0.9, len(design)), np.nan)
    return table[list(ATTRIBUTE_COLUMNS)]


def write_sample_attributes(root: Path, subject: int, attributes: pd.DataFrame) -> Path:
    """Write ``sourcedata/sample_attributes_P{n}.csv``."""
    return write_csv(LAYOUT.place(root, "attributes", subject=subject), attributes)


def write_preprocessed(
    root: Path,
    subject: int,
    epochs: Iterable[np.ndarray],
    attributes: pd.DataFrame,
    *,
    ch_names: Sequence[str],
    locs: np.ndarray | None = None,
    split_size: str = "500MB",
    dev_head: np.ndarray | None = None,
) -> Path:
    """Write ``derivatives/preprocessed/preprocessed_P{n}-epo.fif``, in several parts if it is large.

    Parameters
    ----------
    epochs : iterable of arrays of shape (n_channels, 281)
        One per row of `attributes`: 200 Hz from -0.1 s, z-scored by the baseline.
    attributes : DataFrame
        From `make_sample_attributes`; its `image_nr` becomes the third column of the events. The rest stays
        in the CSV file, as published.
    ch_names
        The sensors, without `DROPPED_SENSOR`.
    split_size
        Largest part.
    dev_head : array of shape (4, 4), optional
        Device to head coordinates.
    """
    if DROPPED_SENSOR in ch_names:
        raise DataError(
            f"the preprocessed epochs of THINGS-MEG must not contain sensor {DROPPED_SENSOR}; drop it first."
        )
    return write_epochs_fif(
        LAYOUT.place(root, "epochs", subject=subject),
        epochs,
        make_meg_info(ch_names, EPOCH_SFREQ, locs=locs, dev_head=dev_head),
        event_ids=attributes["image_nr"].to_numpy(dtype=int),
        tmin=EPOCH_TMIN,
        n_times=EPOCH_N_TIMES,
        split_size=split_size,
    )


def estimate_raw_bytes(n_samples: int, n_channels: int = 272) -> int:
    """Return the size of a raw run: float32, with the optical sensor and the trigger."""
    return 4 * (n_channels + 2) * n_samples


def estimate_epochs_bytes(n_epochs: int, n_channels: int = 271) -> int:
    """Return the size of one subject's preprocessed epochs; twice as much is needed during writing."""
    return 4 * n_epochs * n_channels * EPOCH_N_TIMES


FORMAT = Format(
    name="things-meg",
    description="THINGS-MEG: BIDS raw runs (FIF, 272 sensors, 1200 Hz) and preprocessed epochs",
    modality="meg",
    uses=USES,
    duration_s=STIMULUS_S,
    check=check,
    count=count,
    list_images=list_images,
    count_images=count_images_of_concepts,
    make_recorder=lambda size: make_sensor_system(MEG_SYSTEM),
    plan=plan,
    n_channels=272,
)
