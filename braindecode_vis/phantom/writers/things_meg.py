"""THINGS-MEG as OpenNeuro ds004212 ships it, with FIF in place of CTF folders.

Owns the design, the BIDS tree with its raw runs, ``derivatives/preprocessed/preprocessed_P*-epo.fif``,
``sourcedata/sample_attributes_P*.csv`` and the two THINGS tables that turn image numbers into concepts. MNE
reads CTF folders but writes none, so that raw runs are ``_meg.fif``; the reference gradiometers are left out.

Traps that are kept: ``channels.tsv`` types every sensor ``OTHER``; macOS ``._`` files lie about; the onset in
``events.tsv`` comes from the optical sensor, 150 ms after the trigger on ``UPPT001``; catch trials have
``N/A`` for a number, and 999999 in the epochs; the epochs name no condition, so that test images can be told
only by their twelve repetitions; the tables of the image set have no header.

References
----------
.. [1] Hebart, M. N. et al. (2023). THINGS-data, a multimodal collection of large-scale datasets for
   investigating object representations in human brain and behavior. eLife 12, e82580.
   https://doi.org/10.7554/eLife.82580
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import ConfigError, DataError, check_columns, check_unique
from braindecode_vis.phantom.writers.fif import make_meg_info, write_epochs_fif, write_raw_fif
from braindecode_vis.phantom.writers.tables import (
    check_block,
    write_csv,
    write_json_file,
    write_text,
    write_tsv,
)
from braindecode_vis.seeds import make_generator

RAW_SFREQ = 1200.0
EPOCH_SFREQ, EPOCH_TMIN, EPOCH_N_TIMES = 200.0, -0.1, 281
CATCH_ID = 999999
DROPPED_SENSOR = "MRO11-1609"  # in the raw runs, not in the preprocessed epochs
TRIGGER_CODE, END_CODE = 64, 32
TRIGGER_LEAD_S = 0.15
STIMULUS_S = 0.5
_OPTICAL = "UADC016-2104"
_TRIGGER = "UPPT001"
_PULSE_S = 0.05
LEAD_S, TAIL_S = 2.5, 3.0
# The columns of `sample_attributes_P*.csv`. Readers use some by position: 0, 2 and 8.
ATTRIBUTE_COLUMNS = (
    "trial_type", "image_nr", "category_nr", "exemplar_nr", "test_image_nr", "things_category_nr",
    "things_image_nr", "things_exemplar_nr", "image_path", "image_on", "image_off", "subject_id",
    "session_nr", "run_nr", "trial_nr", "abs_trial_nr", "responded", "RT",
)  # fmt: skip


def make_image_table(
    concepts: Sequence[str], n_exemplars: int = 12, n_test_concepts: int = 200
) -> pd.DataFrame:
    """Return one row per image; the row number plus one is the THINGS image number.

    Each concept has `n_exemplars` images for single presentation; the test concepts, spread evenly over the
    list, have one more, which is shown in every session.

    Returns
    -------
    DataFrame
        `image_nr`, `concept`, `category_nr` (from 1), `exemplar_nr`, `stimulus_id`, `path` and `is_test`.

    Examples
    --------
    >>> make_image_table(["ant", "bee"], 2, 1)["path"].tolist()[-1]
    'images/bee/bee_02s.jpg'
    """
    check_unique(concepts, what="concept names")
    if not 0 <= n_test_concepts <= len(concepts):
        raise ConfigError(f"{n_test_concepts} test concepts do not fit into {len(concepts)} concepts.")
    tested = set(np.arange(n_test_concepts) * len(concepts) // max(n_test_concepts, 1))
    rows: list[dict[str, object]] = []
    for category, concept in enumerate(sorted(concepts)):
        for exemplar in range(1, n_exemplars + 1 + (category in tested)):
            stimulus_id = f"{concept}_{exemplar:02d}{'b' if exemplar == 1 else 's'}"
            rows.append(
                {
                    "image_nr": len(rows) + 1,
                    "concept": concept,
                    "category_nr": category + 1,
                    "exemplar_nr": exemplar,
                    "stimulus_id": stimulus_id,
                    "path": f"images/{concept}/{stimulus_id}.jpg",
                    "is_test": exemplar > n_exemplars,
                }
            )
    return pd.DataFrame(rows)


def make_things_meg_design(
    images: pd.DataFrame,
    n_sessions: int = 12,
    n_runs: int = 10,
    seed: int = 0,
    *,
    n_catch: int = 200,
    soa_s: tuple[float, float] = (1.3, 1.7),
) -> pd.DataFrame:
    """Return every trial of one person.

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
    tests = np.flatnonzero(images["is_test"])
    for session in range(1, n_sessions + 1):
        rng = make_generator(seed, "things-meg", session)
        single = np.flatnonzero((images["exemplar_nr"] == session) & ~images["is_test"])
        rows = np.concatenate([single, tests, np.full(n_catch, -1)])
        kinds = np.repeat(["exp", "test", "catch"], [len(single), len(tests), n_catch])
        catch = np.concatenate([np.zeros(len(rows) - n_catch, dtype=int), np.arange(1, n_catch + 1)])
        order = rng.permutation(len(rows))
        table = pd.DataFrame({"trial_type": kinds[order], "row": rows[order], "catch_nr": catch[order]})
        table.insert(0, "run", np.arange(len(rows)) * n_runs // len(rows) + 1)
        table.insert(0, "session", session)
        gaps = rng.integers(round(soa_s[0] * RAW_SFREQ), round(soa_s[1] * RAW_SFREQ) + 1, len(rows))
        first = ~table["run"].duplicated()
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
    """Return the length of a run whose events are given."""
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
    n_samples: int | None = None,
    junk: bool = True,
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
    n_samples
        Length of the run; `count_run_samples` by default.
    junk
        Add the ``._`` files.
    dev_head : array of shape (4, 4), optional
        Device to head coordinates.

    Raises
    ------
    DataError
        If the first event leaves no room for its trigger, or the blocks do not fit.
    """
    check_columns(
        events.columns, ("onset", "sample", "trial_type", "image_nr", "category_nr"), what="MEG events"
    )
    n_samples = count_run_samples(events) if n_samples is None else n_samples
    if events["sample"].min() < round(TRIGGER_LEAD_S * RAW_SFREQ):
        raise DataError("the first event of a THINGS-MEG run must leave 150 ms for its trigger.")
    entities = f"sub-BIGMEG{subject}_ses-{session:02d}"
    stem = f"{entities}_task-main_run-{run:02d}"
    folder = root / f"sub-BIGMEG{subject}" / f"ses-{session:02d}" / "meg"
    extra = ((_OPTICAL, "misc"), (_TRIGGER, "stim"))
    info = make_meg_info(ch_names, RAW_SFREQ, locs=locs, extra=extra, dev_head=dev_head)
    path = folder / f"{stem}_meg.fif"
    write_raw_fif(path, _add_sensors(blocks, events, len(ch_names), n_samples), info, n_samples)
    write_tsv(folder / f"{stem}_events.tsv", _make_events_tsv(events), missing="N/A")
    write_tsv(folder / f"{stem}_channels.tsv", _make_channels_tsv(ch_names))
    write_json_file(folder / f"{stem}_meg.json", _make_sidecar(len(ch_names), n_samples))
    write_json_file(folder / f"{stem}_coordsystem.json", _COORDINATES)
    if junk:
        for name in (path.name, f"{stem}_events.tsv"):
            # AppleDouble: magic, version, then an empty table of entries.
            write_text(folder / f"._{name}", "\x00\x05\x16\x07\x00\x02\x00\x00" + "\x00" * 4088)
    return path


_COORDINATES = {
    "MEGCoordinateSystem": "CTF",
    "MEGCoordinateUnits": "cm",  # as published; the numbers read like metres
    "HeadCoilCoordinates": {"NAS": [0.0, 0.0796, 0.0], "LPA": [-0.078, 0.0, 0.0], "RPA": [0.0761, 0.0, 0.0]},
    "HeadCoilCoordinateSystem": "CTF",
    "HeadCoilCoordinateUnits": "cm",
}


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
        trigger[start : start + pulse] = TRIGGER_CODE
    end = n_samples - round(RAW_SFREQ)
    trigger[end : end + pulse] = END_CODE
    start = 0
    for block in blocks:
        array = check_block(block, (n_channels, None), what="the blocks of an MEG run")
        stop = start + array.shape[1]
        rows = np.empty((n_channels + 2, array.shape[1]), dtype=np.float32)
        rows[:n_channels] = array
        rows[-2:] = 0
        known = max(0, min(stop, n_samples) - start)
        rows[-2, :known], rows[-1, :known] = optical[start:stop], trigger[start:stop]
        yield rows
        start = stop


def _make_events_tsv(events: pd.DataFrame) -> pd.DataFrame:
    number = events["image_nr"].astype(float)
    return pd.DataFrame(
        {
            "onset": events["onset"],
            "duration": STIMULUS_S,
            "trial_type": events["trial_type"],
            "things_category_nr": events["category_nr"],
            "value": number.where(number != CATCH_ID),
            "sample": events["sample"],
        }
    )


def _make_channels_tsv(ch_names: Sequence[str]) -> pd.DataFrame:
    table = pd.DataFrame({"name": [*ch_names, _OPTICAL, _TRIGGER]})
    sensor = np.arange(len(table)) < len(ch_names)
    table["type"] = np.where(sensor, "OTHER", "MISC")
    table["units"] = np.where(sensor, "T", "V")
    table["low_cutoff"], table["high_cutoff"] = 0.0, RAW_SFREQ / 2
    table["description"] = np.where(sensor, "Other type of channel", "Miscellaneous")
    table["sampling_frequency"], table["status"] = RAW_SFREQ, "good"
    return table


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
    """Write what a data set has once: description, participants, and the tables of the image set.

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
    write_csv(tables / "Image-specific" / "image_paths.csv", images[["path"]], header=False)
    index = tables / "Concept-specific"
    write_csv(index / "image_concept_index.csv", images[["category_nr"]], header=False)
    write_csv(index / "unique_id.csv", images[["concept"]].drop_duplicates(), header=False)


def make_sample_attributes(
    subject: int, design: pd.DataFrame, images: pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """Return the table of ``sample_attributes_P*.csv``: 18 columns, one row a trial.

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
    table["image_on"] = design["onset"] - TRIGGER_LEAD_S + rng.normal(0, 0.002, len(design))
    table["image_off"] = table["image_on"] + STIMULUS_S
    table["subject_id"], table["session_nr"], table["run_nr"] = subject, design["session"], design["run"]
    table["trial_nr"] = design.groupby(["session", "run"]).cumcount() + 1
    table["abs_trial_nr"] = np.arange(1, len(design) + 1)
    table["responded"] = (is_catch & (rng.random(len(design)) < 0.95)).astype(int)
    table["RT"] = np.where(table["responded"] == 1, rng.uniform(0.4, 0.9, len(design)), np.nan)
    return table[list(ATTRIBUTE_COLUMNS)]


def write_sample_attributes(root: Path, subject: int, attributes: pd.DataFrame) -> Path:
    """Write ``sourcedata/sample_attributes_P{n}.csv``."""
    return write_csv(root / "sourcedata" / f"sample_attributes_P{subject}.csv", attributes)


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
    """Write ``derivatives/preprocessed/preprocessed_P{n}-epo.fif``, in parts where it is large.

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
        raise DataError(f"the preprocessed epochs of THINGS-MEG lack sensor {DROPPED_SENSOR}; drop it first.")
    return write_epochs_fif(
        root / "derivatives" / "preprocessed" / f"preprocessed_P{subject}-epo.fif",
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
    """Return the size of one person's preprocessed epochs; as much again is used while writing."""
    return 4 * n_epochs * n_channels * EPOCH_N_TIMES
