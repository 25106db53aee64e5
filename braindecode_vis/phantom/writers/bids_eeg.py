"""A generic BIDS EEG data set with BrainVision recordings.

Owns ``sub-*/[ses-*]/eeg`` and the files at the root. BrainVision is two texts and one flat file, so samples are
written as they come; nothing but NumPy and pandas is needed. The name of the picture is in the column
`stim_file` of the events, relative to ``stimuli``, and `stimulus_id` repeats its identity.

References
----------
.. [1] Pernet, C. R. et al. (2019). EEG-BIDS, an extension to the brain imaging data structure for
   electroencephalography. Scientific Data 6, 103. https://doi.org/10.1038/s41597-019-0104-8
.. [2] BrainVision Core Data Format 1.0. https://www.brainproducts.com/support-resources/
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns
from braindecode_vis.phantom.writers.tables import (
    check_block,
    check_count,
    write_json_file,
    write_text,
    write_tsv,
)
from braindecode_vis.store import replace_atomically

EVENT_COLUMNS = ("sample", "stimulus_id", "stim_file", "value")
_TYPES = {"eeg": "EEG", "eog": "EOG", "misc": "MISC", "stim": "TRIG", "ecg": "ECG", "emg": "EMG"}


def write_dataset(
    root: Path, participants: pd.DataFrame, *, name: str = "braindecode_vis phantom EEG"
) -> None:
    """Write ``dataset_description.json``, ``participants.tsv``, ``participants.json`` and ``README``.

    Parameters
    ----------
    participants : DataFrame
        `participant_id` (``sub-01``...), then any column.
    """
    check_columns(participants.columns, ("participant_id",), what="the participants table")
    write_json_file(
        root / "dataset_description.json",
        {
            "Name": name,
            "BIDSVersion": "1.8.0",
            "DatasetType": "raw",
            "License": "CC0",
            "Authors": ["phantom"],
        },
    )
    write_tsv(root / "participants.tsv", participants)
    described = {str(column): {"Description": str(column)} for column in participants.columns[1:]}
    write_json_file(root / "participants.json", described)
    write_text(root / "README", f"{name}: simulated people with a known ground truth.\n")


def write_recording(
    root: Path,
    subject: str,
    blocks: Iterable[np.ndarray],
    events: pd.DataFrame,
    *,
    n_samples: int,
    ch_names: Sequence[str],
    sfreq: float,
    ch_pos: np.ndarray | None = None,
    ch_types: Sequence[str] | None = None,
    session: str | None = None,
    task: str = "images",
    run: str | None = None,
    stimulus_s: float = 0.1,
    line_freq: float = 50.0,
    reference: str = "average",
) -> Path:
    """Write one recording with its sidecars and return the path of the header (``.vhdr``).

    Parameters
    ----------
    subject, session, run
        BIDS labels without their key, for example ``"01"``.
    blocks : iterable of arrays of shape (n_channels, n)
        Volts. Written as float32 microvolts.
    events : DataFrame
        `sample`, `value` (trigger code, 1 to 65535), `stimulus_id` and `stim_file`; further columns are kept.
    ch_pos : array of shape (n_channels, 3), optional
        Electrode positions (m) in head coordinates; NaN rows are written ``n/a``.
    ch_types
        MNE types; ``eeg`` by default.

    Raises
    ------
    DataError
        If an event lies outside the recording, or the blocks do not fit.
    """
    check_columns(events.columns, EVENT_COLUMNS, what="the events of a BIDS recording")
    samples = events["sample"].to_numpy(int)
    if len(samples) and (samples.min() < 0 or samples.max() >= n_samples):
        raise DataError(
            f"an event of subject {subject} lies outside the {n_samples} samples of the recording."
        )
    folder = root / f"sub-{subject}"
    entities = f"sub-{subject}"
    if session is not None:
        folder, entities = folder / f"ses-{session}", f"{entities}_ses-{session}"
    folder /= "eeg"
    stem = f"{entities}_task-{task}" + (f"_run-{run}" if run is not None else "")
    kinds = list(ch_types) if ch_types is not None else ["eeg"] * len(ch_names)
    _write_samples(folder / f"{stem}_eeg.eeg", blocks, len(ch_names), n_samples)
    write_text(folder / f"{stem}_eeg.vmrk", _make_markers(f"{stem}_eeg.eeg", events))
    write_json_file(
        folder / f"{stem}_eeg.json",
        {
            "TaskName": task,
            "SamplingFrequency": sfreq,
            "PowerLineFrequency": line_freq,
            "EEGReference": reference,
            "SoftwareFilters": "n/a",
            "RecordingDuration": n_samples / sfreq,
            "RecordingType": "continuous",
            "EEGChannelCount": kinds.count("eeg"),
            "EOGChannelCount": kinds.count("eog"),
            "TriggerChannelCount": kinds.count("stim"),
        },
    )
    table = pd.DataFrame({"name": ch_names, "type": [_TYPES[kind] for kind in kinds], "units": "µV"})
    table["low_cutoff"], table["high_cutoff"] = "n/a", "n/a"
    table["sampling_frequency"], table["status"] = sfreq, "good"
    write_tsv(folder / f"{stem}_channels.tsv", table)
    _write_events(folder / f"{stem}_events", events, sfreq, stimulus_s)
    if ch_pos is not None:
        _write_electrodes(folder, entities, ch_names, ch_pos)
    # The header comes last: a reader that finds it finds the rest.
    return write_text(folder / f"{stem}_eeg.vhdr", _make_header(f"{stem}_eeg", ch_names, sfreq))


def _write_samples(path: Path, blocks: Iterable[np.ndarray], n_channels: int, n_samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        for block in blocks:
            array = check_block(block, (n_channels, None), what=f"the blocks of {path.name}")
            file.write((array.T.astype(np.float64) * 1e6).astype("<f4").tobytes())
            count += array.shape[1]
        check_count(count, n_samples, what=path.name, unit="samples")


def _make_header(stem: str, ch_names: Sequence[str], sfreq: float) -> str:
    # A comma separates fields, so that one in a name is written "\1".
    channels = [
        f"Ch{index}={name.replace(',', chr(92) + '1')},,1,µV" for index, name in enumerate(ch_names, start=1)
    ]
    lines = [
        "Brain Vision Data Exchange Header File Version 1.0",
        "",
        "[Common Infos]",
        "Codepage=UTF-8",
        f"DataFile={stem}.eeg",
        f"MarkerFile={stem}.vmrk",
        "DataFormat=BINARY",
        "DataOrientation=MULTIPLEXED",
        f"NumberOfChannels={len(ch_names)}",
        f"SamplingInterval={1e6 / sfreq:.10g}",
        "",
        "[Binary Infos]",
        "BinaryFormat=IEEE_FLOAT_32",
        "",
        "[Channel Infos]",
        *channels,
        "",
    ]
    return "\n".join(lines)


def _make_markers(data_file: str, events: pd.DataFrame) -> str:
    lines = [
        "Brain Vision Data Exchange Marker File, Version 1.0",
        "",
        "[Common Infos]",
        "Codepage=UTF-8",
        f"DataFile={data_file}",
        "",
        "[Marker Infos]",
        "Mk1=New Segment,,1,1,0,00000000000000000000",
    ]
    for number, (sample, value) in enumerate(zip(events["sample"], events["value"], strict=True), start=2):
        lines.append(f"Mk{number}=Stimulus,S{int(value):3d},{int(sample) + 1},1,0")  # positions count from 1
    return "\n".join([*lines, ""])


def _write_events(stem: Path, events: pd.DataFrame, sfreq: float, stimulus_s: float) -> None:
    table = pd.DataFrame(
        {
            "onset": events["sample"] / sfreq,
            "duration": stimulus_s,
            "sample": events["sample"],
            "value": events["value"],
            "trial_type": events.get("trial_type", pd.Series("stimulus", index=events.index)),
            "stimulus_id": events["stimulus_id"],
            "stim_file": events["stim_file"],
        }
    )
    rest = [column for column in events.columns if column not in table.columns]
    write_tsv(stem.with_suffix(".tsv"), pd.concat([table, events[rest]], axis=1))
    described = {
        "stimulus_id": {"Description": "identity of the picture"},
        "stim_file": {"Description": "file of the picture, relative to the folder stimuli"},
        "value": {"Description": "trigger code"},
    }
    write_json_file(stem.with_suffix(".json"), described)


def _write_electrodes(folder: Path, entities: str, ch_names: Sequence[str], ch_pos: np.ndarray) -> None:
    if np.shape(ch_pos) != (len(ch_names), 3):
        raise DataError(f"{len(ch_names)} channels need positions of shape ({len(ch_names)}, 3).")
    table = pd.DataFrame(np.asarray(ch_pos, dtype=float), columns=["x", "y", "z"])
    table.insert(0, "name", list(ch_names))
    write_tsv(folder / f"{entities}_space-CapTrak_electrodes.tsv", table)
    write_json_file(
        folder / f"{entities}_space-CapTrak_coordsystem.json",
        {
            "EEGCoordinateSystem": "CapTrak",
            "EEGCoordinateUnits": "m",
            "EEGCoordinateSystemDescription": "RAS, origin between the ears",
            "AnatomicalLandmarkCoordinates": {"NAS": [0, 0.1, 0], "LPA": [-0.08, 0, 0], "RPA": [0.08, 0, 0]},
            "AnatomicalLandmarkCoordinateSystem": "CapTrak",
            "AnatomicalLandmarkCoordinateUnits": "m",
        },
    )


def estimate_bytes(n_samples: int, n_channels: int) -> int:
    """Return the size of one recording: float32."""
    return 4 * n_channels * n_samples
