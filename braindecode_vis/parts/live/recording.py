"""Records a session while it runs, as BIDS: samples, markers, decisions, and messages about the stream.

Owns the files of one recording, which are readable whenever the process ends. EEG is BrainVision [1]_, whose samples
and markers are appended; fMRI a NIfTI file whose header counts the volumes that are there. BIDS has no format of MEG
that can be appended to: samples go to a plain binary file, which becomes FIF at the end, or by `recover` after a
process was killed. A gap in the stream becomes a new segment, and no sample is made up. Nothing that was recorded
before is overwritten, and a disk that is full ends the recording, not the session.

References
----------
.. [1] Brain Products GmbH (2019). BrainVision Core Data Format 1.0.
.. [2] Pernet et al. (2019), doi:10.1038/s41597-019-0104-8: BIDS of EEG. Niso et al. (2018), doi:10.1038/sdata.2018.110:
   of MEG.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.bids.live_recording import GENERATED_BY, is_live_recording
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.parts.live.stream_buffer import LONGEST_STEP
from braindecode_vis.parts.live.stream_channels import find_factor
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, Marker, StreamInfo, make_plain
from braindecode_vis.parts.phantom.formats.bids_eeg import make_header

if TYPE_CHECKING:
    from braindecode_vis.pipeline.finished_run import FinishedRun

_KEPT_S = 120.0  # how far back a late marker finds its sample
_TRIGGERS = re.compile(r"^(trig\w*|trg|sti\d*|status|stim|sti ?\d+)$", re.IGNORECASE)


class BidsRecorder(Listener):
    """Records a session into a BIDS folder.

    Parameters
    ----------
    root
        The data set; made if needed. One of other recordings of these sessions is continued, any other is refused.
    subject, session, task
        BIDS labels. A new run is numbered after those that are there.
    names
        Channels of the stream to names in the recording, where they differ.
    order
        Names that come first, as brain channels; by default every channel is one that is no trigger.
    find_stimulus
        Returns the id of the image of a marker, or None if it shows none; by default what the marker says.
    columns
        Further columns of the events table and their one value, as the recipe of a run may ask for them.
    stimulus_column
        Column of the events table that names the image.
    duration
        How long an image is shown, in s; empty in the table where it is not known.
    geometry
        Of voxels, for fMRI.
    unit
        Of the samples where the stream does not say it.
    notify
        Gets sentences: that the disk is full, and where the recording lies.
    waits
        Whether nothing is recorded before `start`.

    Raises
    ------
    ConfigError, DataError
        If a label is none, or the folder holds something else.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        subject: str = "live",
        session: str = "live",
        task: str = "live",
        names: Mapping[str, str] | None = None,
        order: Sequence[str] = (),
        find_stimulus: Callable[[str], str | None] = lambda value: value,
        columns: Mapping[str, str] | None = None,
        stimulus_column: str = "stim_file",
        duration: float | None = None,
        geometry: Geometry | None = None,
        unit: str = "",
        notify: Callable[[str, Literal["info", "warning", "error"]], None] | None = None,
        waits: bool = False,
    ) -> None:
        self.root = Path(root).expanduser()
        labels = {"subject": subject, "session": session, "task": task}
        for key, label in labels.items():
            if not re.fullmatch(r"[a-zA-Z0-9]+", label):
                raise ConfigError(f"the {key} {label!r} of a recording may hold letters and digits only.")
        self.subject, self.session, self.task = subject, session, task
        self.names, self.order = dict(names or {}), tuple(order)
        self.find_stimulus, self.columns = find_stimulus, dict(columns or {})
        self.stimulus_column, self.duration, self.geometry = stimulus_column, duration, geometry
        self.unit, self.notify, self.waits = unit, notify, waits
        self.folder = self.root
        self.path: Path | None = None
        self.is_recording = False
        self._stream: _Samples | None = None
        self._timeline = _Timeline(1.0)
        self._waiting: list[Marker] = []
        self._files: dict[str, BinaryIO] = {}
        self._begun: tuple[StreamInfo, Mapping[str, Any]] | None = None
        self._check_root()

    @classmethod
    def for_run(cls, run: FinishedRun, root: Path | str, **options: Any) -> BidsRecorder:
        """Return a recorder whose data set can be decoded by the run afterwards (``predict RUN --on ROOT``).

        Parameters
        ----------
        run
            The run that decodes the session: its subject, channels, voxels and the length of its trials.
        root, **options
            As for the class; they stand in for what the run says.
        """
        from braindecode_vis.pipeline.new_trials import find_responses
        from braindecode_vis.preprocessing.voxel_geometry import read_geometry

        responses = find_responses(run)
        coords, trials = responses.coords, responses.trials
        found: dict[str, Any] = {"order": tuple(map(str, coords.get("ch_names", ())))}
        subjects = trials["subject"].astype(str).unique()
        subject = str(options.get("subject") or (subjects[0] if len(subjects) == 1 else "live"))
        found["subject"] = re.sub(r"[^a-zA-Z0-9]", "", subject) or "live"
        if "duration" in trials:
            found["duration"] = float(trials["duration"].median())
        if coords.get("modality") == "fmri" and coords.get("surface") is None:
            found["geometry"] = read_geometry(responses, subject if coords.get("subjects") else None)
        given = {key: value for key, value in options.items() if value is not None and key != "subject"}
        return cls(root, **{**found, **given})

    # --- the session --------------------------------------------------------------------------------------

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """Take in what is recorded, and start, unless the recorder waits.

        Parameters
        ----------
        info
            Of the stream.
        facts
            Of the decoder. Its `channel_names` and `channel_rows` say which channel of the stream is which of the run.

        Raises
        ------
        DataError
            If the folder holds something else, or cannot be written.
        """
        self._begun = (info, facts)
        if not self.waits:
            self.start()

    def start(self) -> None:
        """Make the data set and the files of a new run, after `begin`; nothing happens if one is recorded already.

        Raises
        ------
        DataError
            If the folder holds something else, or cannot be written.
        """
        if self._begun is None or self.is_recording:
            return
        info, facts = self._begun
        pairs = zip(facts.get("channel_names", ()), facts.get("channel_rows", ()), strict=False)
        found = {info.ch_names[row]: str(name) for name, row in pairs if row >= 0}
        self.names = {**found, **self.names}
        kind = {"eeg": "eeg", "meg": "meg", "fmri": "func"}[info.modality]
        self.folder = self.root / f"sub-{self.subject}" / f"ses-{self.session}" / kind
        try:
            self._describe_dataset()
            self.folder.mkdir(parents=True, exist_ok=True)
            stem = self._claim_run()
            self._timeline, self._waiting = _Timeline(info.sfreq), []
            self._open(stem, kind, info, facts)
        except OSError as error:
            raise DataError(
                f"the recording cannot be written below {self.root} ({error}); give another folder."
            ) from error
        self.is_recording = True
        assert self.path is not None
        self._say(f"The session is recorded in {self.path}.", "info")

    def hear(self, chunk: Chunk) -> None:
        """Append samples and markers."""
        self._guard(self._append, chunk)

    def decide(self, decision: Decision) -> None:
        """Append what was decided, without epochs and images."""
        self._guard(self._append_line, "decisions", decision.as_record(embedding=True))

    def tell(self, sentence: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Append what happened."""
        self._guard(
            self._append_line, "log", {"time": self._timeline.newest, "level": level, "text": sentence}
        )

    def end(self, summary: Mapping[str, Any]) -> None:
        """Close the files, and write what is known only now."""
        if not self.is_recording:
            return
        self._guard(self._finish, summary)
        self.close()

    def stop(self) -> None:
        """End this recording before the session ends; `start` begins the next one."""
        if self.is_recording:
            self.end({})
            self._say(f"The recording has stopped; it lies in {self.path}.", "info")

    def note(self, text: str) -> None:
        """Add a note to the recording, at the time of its newest sample.

        It is in ``*_notes.tsv`` beside the decisions: seconds from the start of the recording, the time of day, and
        the words.
        """
        self._guard(self._write_note, text)

    def close(self) -> None:
        """Let go of the files as they are; `end` does this, too."""
        self.is_recording = False
        for file in self._files.values():
            file.close()
        if self._stream is not None:
            self._stream.close()

    def _guard(self, write: Callable[..., None], *args: Any) -> None:
        """Write; a disk that fails ends the recording and says so, and nothing else."""
        if not self.is_recording:
            return
        try:
            write(*args)
        except OSError as error:
            self.close()
            self._say(
                f"The recording has ended after {self._timeline.n} samples, since {self.root} cannot be written "
                f"({error.strerror or error}); the written part can be read, and decoding continues.",
                "error",
            )

    def _say(self, sentence: str, level: Literal["info", "warning", "error"]) -> None:
        if self.notify is not None:
            self.notify(sentence, level)

    # --- files --------------------------------------------------------------------------------------------

    def _check_root(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise DataError(f"{self.root} is a file; give a folder to --record.")
        if (self.root / "dataset_description.json").exists():
            if not is_live_recording(self.root):
                raise DataError(
                    f"{self.root} is a data set that was not recorded live; give --record another folder."
                )
        elif self.root.is_dir() and any(self.root.iterdir()):
            raise DataError(
                f"{self.root} holds other files; give an empty folder, or a new one, to --record."
            )

    def _describe_dataset(self) -> None:
        self._check_root()
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "dataset_description.json"
        if not path.exists():
            from braindecode_vis import __version__

            _write_json(
                path,
                {
                    "Name": "Sessions decoded live",
                    "BIDSVersion": "1.8.0",
                    "DatasetType": "raw",
                    "GeneratedBy": [{"Name": GENERATED_BY, "Version": __version__}],
                },
            )
            (self.root / "README").write_text(
                "Recorded while a stream was decoded; decisions lie in derivatives.\n"
            )
        people = self.root / "participants.tsv"
        lines = people.read_text().splitlines() if people.exists() else ["participant_id"]
        if f"sub-{self.subject}" not in lines:
            people.write_text("\n".join([*lines, f"sub-{self.subject}", ""]))

    def _claim_run(self) -> str:
        """Return the name of a run that no other process has, without suffix."""
        for number in range(1, 10_000):
            stem = f"sub-{self.subject}_ses-{self.session}_task-{self.task}_run-{number:02d}"
            try:
                # Made exclusively: two sessions at once never share a run.
                (self.folder / f"{stem}_events.tsv").open("x").close()
            except FileExistsError:
                continue
            return stem
        raise DataError(f"{self.folder} holds 9999 runs; give another --record folder.")

    def _open(self, stem: str, kind: str, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        unit = info.unit or self.unit or str(facts.get("unit", ""))
        factor = find_factor(unit) or 1.0
        self._said_unit = unit
        if kind == "func":
            self._stream = _Volumes(self.folder / f"{stem}_bold.nii", self._find_geometry(), 1 / info.sfreq)
            sidecar = {"TaskName": self.task, "RepetitionTime": 1 / info.sfreq}
            _write_json(self.folder / f"{stem}_bold.json", sidecar)
        else:
            rows, channels, types = self._order_channels(info)
            table = self.folder / f"{stem}_channels.tsv"
            units = {"EEG": "µV", "MEGMAG": "T"}
            lines = ["name\ttype\tunits\tlow_cutoff\thigh_cutoff\tsampling_frequency\tstatus"]
            for name, what in zip(channels, types, strict=True):
                lines.append(f"{name}\t{what}\t{units.get(what, 'n/a')}\tn/a\tn/a\t{info.sfreq:g}\tgood")
            table.write_text("\n".join([*lines, ""]))
            sidecar = {
                "TaskName": self.task, "SamplingFrequency": info.sfreq, "PowerLineFrequency": "n/a",
                "SoftwareFilters": "n/a", "RecordingType": "continuous",
            }  # fmt: skip
            if kind == "eeg":
                sidecar["EEGReference"] = "as sent"
                self._stream = _BrainVision(
                    self.folder / f"{stem}_eeg.eeg", rows, channels, info.sfreq, factor
                )
            else:
                sidecar |= {"DewarPosition": "n/a", "DigitizedLandmarks": False, "DigitizedHeadPoints": False}
                self._stream = _Plain(
                    self.folder / f"{stem}_meg.f32", rows, channels, types, info.sfreq, factor
                )
            _write_json(self.folder / f"{stem}_{kind}.json", sidecar)
        self.path = self._stream.path
        self._sidecar = self.folder / f"{stem}_{'bold' if kind == 'func' else kind}.json"
        events = (self.folder / f"{stem}_events.tsv").open("ab", buffering=0)
        header = ["onset", "duration", "sample", "value", self.stimulus_column, *self.columns]
        events.write(("\t".join(header) + "\n").encode())
        beside = self.root / "derivatives" / "live" / f"sub-{self.subject}" / f"ses-{self.session}"
        beside.mkdir(parents=True, exist_ok=True)
        if not (beside.parents[1] / "dataset_description.json").exists():
            _write_json(
                beside.parents[1] / "dataset_description.json",
                {
                    "Name": "Decisions of live sessions", "BIDSVersion": "1.8.0", "DatasetType": "derivative",
                    "GeneratedBy": [{"Name": GENERATED_BY}],
                },
            )  # fmt: skip
        _write_json(beside / f"{stem}_facts.json", {"stream": asdict(info), "decoder": make_plain(facts)})
        self._notes = beside / f"{stem}_notes.tsv"
        self._files = {
            "events": events,
            "decisions": (beside / f"{stem}_decisions.jsonl").open("ab", buffering=0),
            "log": (beside / f"{stem}_log.jsonl").open("ab", buffering=0),
        }

    def _find_geometry(self) -> Geometry:
        if self.geometry is None or self.geometry.mask is None:
            raise DataError("volumes are recorded through the mask of a run, but no run was given.")
        return self.geometry

    def _order_channels(self, info: StreamInfo) -> tuple[np.ndarray, list[str], list[str]]:
        """Return rows, names and BIDS types of the channels: those of the run first."""
        named = [self.names.get(name, name) for name in info.ch_names]
        brain = "EEG" if info.modality == "eeg" else "MEGMAG"
        first = [name for name in self.order if name in named]
        if self.order:
            rest = [name for name in named if name not in first]
        else:
            rest = [name for name in named if _TRIGGERS.match(name)]
            first = [name for name in named if name not in rest]
        channels = [*first, *rest]
        types = [brain] * len(first) + ["TRIG" if _TRIGGERS.match(name) else "MISC" for name in rest]
        return np.array([named.index(name) for name in channels], int), channels, types

    # --- what is appended ---------------------------------------------------------------------------------

    def _append(self, chunk: Chunk) -> None:
        assert self._stream is not None
        for start, stop in self._timeline.split(chunk.times):
            is_new = self._timeline.add(chunk.times[start:stop])
            # Samples first: a marker never points at what is not there.
            self._stream.append(chunk.samples[:, start:stop], chunk.times[start:stop])
            if is_new:
                self._mark_segment(self._timeline.n - (stop - start), float(chunk.times[start]))
        self._waiting += chunk.markers
        self._settle_markers(last=False)

    def _mark_segment(self, sample: int, time: float) -> None:
        assert self._stream is not None
        self._stream.mark_segment(sample)
        if sample and isinstance(self._stream, _Volumes):
            words = (
                "volumes are missing before this one; in the file they are replaced by copies of the "
                "previous volume."
            )
            self._append_line("log", {"time": time, "level": "warning", "text": words})
        elif sample:
            # Readers of BIDS take the table for all there is to know, so that it names the joins, too.
            onset = self._stream.find_onset(sample, time)
            cells = [f"{onset:.9g}", "0", str(sample), "New Segment", "n/a"]
            cells += ["New Segment" if name == "trial_type" else "n/a" for name in self.columns]
            self._files["events"].write(("\t".join(cells) + "\n").encode())

    def _settle_markers(self, *, last: bool) -> None:
        """Write the markers whose sample is there, and those that will never have one."""
        later = []
        for marker in self._waiting:
            newest = self._timeline.newest
            if isinstance(self._stream, _Volumes) and newest is not None:
                # Between volumes, too; an event that was planned and never came is none.
                if marker.time <= newest + 1 / self._timeline.sfreq:
                    self._write_event(
                        marker, round(self._stream.find_onset(0, marker.time) * self._timeline.sfreq)
                    )
                elif not last:
                    later.append(marker)
                continue
            sample = self._timeline.find_sample(marker.time)
            if sample is None and not last and (newest is None or marker.time > newest):
                later.append(marker)
                continue
            self._write_event(marker, sample)
        self._waiting = later

    def _write_event(self, marker: Marker, sample: int | None) -> None:
        assert self._stream is not None
        if sample is None:
            words = f"the marker {marker.value!r} at {marker.time:.3f} s has no sample: it was in a gap."
            self._append_line("log", {"time": marker.time, "level": "warning", "text": words})
            return
        shown = self.find_stimulus(marker.value)
        duration = "n/a" if self.duration is None else f"{self.duration:g}"
        onset = self._stream.find_onset(sample, marker.time)
        # An ending, as BIDS names files: the id itself may hold a dot.
        cells = [
            f"{onset:.9g}",
            duration,
            str(sample),
            _clean(marker.value),
            f"{_clean(shown)}.png" if shown else "n/a",
        ]
        line = "\t".join([*cells, *self.columns.values()]) + "\n"
        self._files["events"].write(line.encode())
        self._stream.mark(sample, marker.value)

    def _write_note(self, text: str) -> None:
        assert self._stream is not None
        path, n = self._notes, self._timeline.n
        onset = self._stream.find_onset(n - 1, self._timeline.newest or 0.0) if n else 0.0
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        head = "" if path.exists() else "onset\twritten\tnote\n"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{head}{onset:.3f}\t{at}\t{_clean(text)}\n")
        self._say(f"Note at {onset:.1f} s of the recording: {_clean(text)}", "info")

    def _append_line(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write((json.dumps(make_plain(record), ensure_ascii=False) + "\n").encode())

    def _finish(self, summary: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._settle_markers(last=True)
        self._append_line(
            "log", {"time": self._timeline.newest, "level": "info", "text": "end", "summary": summary}
        )
        for file in self._files.values():
            file.close()
        self.path = self._stream.finish()
        sidecar = json.loads(self._sidecar.read_text())
        _write_json(self._sidecar, {**sidecar, "RecordingDuration": self._timeline.n / self._timeline.sfreq})


# --- time -------------------------------------------------------------------------------------------------


class _Timeline:
    """When each of the last samples was taken, and where the stream was interrupted."""

    def __init__(self, sfreq: float) -> None:
        self.sfreq, self.n = sfreq, 0
        self.newest: float | None = None
        self._kept: deque[tuple[int, np.ndarray]] = deque()

    def split(self, times: np.ndarray) -> list[tuple[int, int]]:
        """Return stretches of a chunk without a gap."""
        if not len(times):
            return []
        edges = np.flatnonzero(self._is_gap(np.diff(times))) + 1
        bounds = [0, *edges.tolist(), len(times)]
        return list(pairwise(bounds))

    def _is_gap(self, step: Any) -> Any:
        return (step > LONGEST_STEP / self.sfreq) | (step <= 0)

    def add(self, times: np.ndarray) -> bool:
        """Take in a stretch; return whether it begins a new segment."""
        is_new = self.newest is None or bool(self._is_gap(float(times[0]) - self.newest))
        self._kept.append((self.n, np.array(times, float)))
        self.n += len(times)
        self.newest = float(times[-1])
        while len(self._kept) > 1 and self._kept[1][1][0] < self.newest - _KEPT_S:
            self._kept.popleft()
        return is_new

    def find_sample(self, time: float) -> int | None:
        """Return the sample nearest to a time, None if none is within half a sample."""
        reach = 0.5 / self.sfreq + 1e-9
        best: tuple[float, int] | None = None
        for first, times in self._kept:
            if times[0] - reach <= time <= times[-1] + reach:
                at = int(np.searchsorted(times, time))
                for n in (at - 1, at):
                    if 0 <= n < len(times) and (best is None or abs(times[n] - time) < best[0]):
                        best = (abs(float(times[n]) - time), first + n)
        # Between two chunks a time may be a little farther from both than half a sample.
        return None if best is None else best[1]


# --- samples ----------------------------------------------------------------------------------------------


class _Samples(Protocol):
    path: Path

    def append(self, samples: np.ndarray, times: np.ndarray) -> None: ...

    def mark(self, sample: int, value: str) -> None: ...

    def mark_segment(self, sample: int) -> None: ...

    def find_onset(self, sample: int, time: float) -> float: ...

    def close(self) -> None: ...

    def finish(self) -> Path: ...


class _Appended:
    """Samples of channels as float32 in one file, one time after the other, and marks in another."""

    def __init__(self, data: Path, marks: Path, rows: np.ndarray, sfreq: float, factor: float) -> None:
        self.path, self.rows, self.sfreq, self.factor = data, rows, sfreq, factor
        self._data = data.open("xb", buffering=0)
        self._marks = marks.open("xb", buffering=0)

    def append(self, samples: np.ndarray, times: np.ndarray) -> None:
        packed = (np.asarray(samples, np.float64)[self.rows] * self.factor).T.astype("<f4")
        _write_whole(self._data, packed.tobytes())

    def find_onset(self, sample: int, time: float) -> float:
        return sample / self.sfreq

    def close(self) -> None:
        self._data.close()
        self._marks.close()


class _BrainVision(_Appended):
    """Header and markers as text, samples in microvolt."""

    def __init__(
        self, data: Path, rows: np.ndarray, channels: Sequence[str], sfreq: float, factor: float
    ) -> None:
        super().__init__(data, data.with_suffix(".vmrk"), rows, sfreq, factor * 1e6)
        self.path, self.n_marks = data.with_suffix(".vhdr"), 0
        lines = [
            "Brain Vision Data Exchange Marker File, Version 1.0", "", "[Common Infos]", "Codepage=UTF-8",
            f"DataFile={data.name}", "", "[Marker Infos]", "",
        ]  # fmt: skip
        self._marks.write("\n".join(lines).encode())
        with self.path.open("x", encoding="utf-8") as file:
            file.write(make_header(data.stem, channels, sfreq))

    def mark(self, sample: int, value: str) -> None:
        text = _clean(value).replace(",", "\\1")
        self._write_mark(f"Stimulus,{text}", sample)

    def mark_segment(self, sample: int) -> None:
        self._write_mark("New Segment,", sample)

    def _write_mark(self, what: str, sample: int) -> None:
        self.n_marks += 1
        self._marks.write(f"Mk{self.n_marks}={what},{sample + 1},1,0\n".encode())

    def finish(self) -> Path:
        self.close()
        return self.path


class _Plain(_Appended):
    """Samples of MEG as plain numbers in T or T/m, beside a table of what they are; FIF at the end."""

    def __init__(
        self,
        data: Path,
        rows: np.ndarray,
        channels: Sequence[str],
        types: Sequence[str],
        sfreq: float,
        factor: float,
    ) -> None:
        super().__init__(data, data.with_suffix(".f32.marks"), rows, sfreq, factor)
        kinds = ["mag" if kind == "MEGMAG" else "stim" if kind == "TRIG" else "misc" for kind in types]
        _write_json(
            data.with_suffix(".f32.json"), {"ch_names": list(channels), "ch_types": kinds, "sfreq": sfreq}
        )

    def mark(self, sample: int, value: str) -> None:
        self._marks.write(f"{sample}\t{_clean(value)}\n".encode())

    def mark_segment(self, sample: int) -> None:
        if sample:
            self._marks.write(f"{sample}\tEDGE boundary\n".encode())

    def finish(self) -> Path:
        self.close()
        return write_fif(self.path)


class _Volumes:
    """A NIfTI file of voxels in their volume, whose header always counts what is there."""

    def __init__(self, path: Path, geometry: Geometry, t_r: float) -> None:
        import nibabel

        assert geometry.mask is not None
        self.path, self.mask, self.t_r, self.n = path, geometry.mask, t_r, 0
        self.order = np.argsort(geometry.voxel_ids)
        image: Any = nibabel.Nifti1Image(np.zeros((*self.mask.shape, 1), np.float32), geometry.affine)
        image.header.set_zooms((*image.header.get_zooms()[:3], t_r))
        image.header.set_xyzt_units("mm", "sec")
        self.header = image.header.copy()
        self._first: float | None = None
        self._data = path.open("xb", buffering=0)
        self._last: np.ndarray | None = None
        self._write_header()

    def _write_header(self) -> None:
        header = self.header.copy()
        # A file without volumes is no image yet: it says one, and is cut short until that is there.
        header.set_data_shape((*self.mask.shape, max(1, self.n)))
        header["vox_offset"] = 352
        os.pwrite(self._data.fileno(), header.binaryblock + b"\0" * 4, 0)

    def append(self, samples: np.ndarray, times: np.ndarray) -> None:
        for column, time in enumerate(times):
            volume = np.zeros(self.mask.shape, np.float32)
            volume[self.mask] = samples[self.order, column]
            if self._first is None:
                self._first = float(time)
            number = round((float(time) - self._first) / self.t_r)
            # A file of volumes has no gaps: the one before stands in, and the log says which.
            while self._last is not None and self.n < number:
                self._write(self._last)
            self._write(volume)
            self._last = volume

    def _write(self, volume: np.ndarray) -> None:
        self._data.seek(352 + self.n * volume.nbytes)
        _write_whole(self._data, volume.ravel(order="F").tobytes())
        self.n += 1
        self._write_header()

    def mark(self, sample: int, value: str) -> None: ...

    def mark_segment(self, sample: int) -> None: ...

    def find_onset(self, sample: int, time: float) -> float:
        return time - (self._first or 0.0)

    def close(self) -> None:
        self._data.close()

    def finish(self) -> Path:
        self.close()
        return self.path


def _write_whole(file: BinaryIO, data: bytes) -> None:
    """Write all of it; a file without a buffer may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


# --- MEG --------------------------------------------------------------------------------------------------


def write_fif(plain: Path) -> Path:
    """Turn a recording of plain samples into FIF, split as BIDS asks, and return its first file.

    Parameters
    ----------
    plain
        The ``_meg.f32`` of a session; removed with what lies beside it once the FIF file is written.

    Raises
    ------
    DataError
        If what lies beside it is missing.
    """
    import mne

    about, marks = plain.with_suffix(".f32.json"), plain.with_suffix(".f32.marks")
    if not about.is_file():
        raise DataError(f"{about} is missing; it holds the channels of {plain.name}.")
    described = json.loads(about.read_text())
    names = described["ch_names"]
    info = mne.create_info(names, described["sfreq"], described["ch_types"])
    target = plain.with_suffix(".fif")
    n = plain.stat().st_size // (4 * len(names))
    if not n:
        return plain
    # Of an attempt that was killed: what was written whole leaves no plain samples.
    for part in (target, *plain.parent.glob(f"{plain.stem.removesuffix('_meg')}_split-*_meg.fif")):
        part.unlink(missing_ok=True)
    stored = np.memmap(plain, "<f4", "r", shape=(n, len(names)))
    raw = mne.io.RawArray(np.asarray(stored.T, np.float64), info, verbose="error")
    rows = [line.split("\t", 1) for line in (marks.read_text().splitlines() if marks.is_file() else [])]
    if rows:
        onsets = [int(sample) / described["sfreq"] for sample, _ in rows]
        raw.set_annotations(mne.Annotations(onsets, 0.0, [text for _, text in rows]), verbose="error")
    raw.save(target, split_naming="bids", split_size="1.9GB", overwrite=False, verbose="error")
    del stored
    for path in (plain, about, marks):
        path.unlink(missing_ok=True)
    return (
        target
        if target.exists()
        else next(iter(sorted(plain.parent.glob(f"{plain.stem}*split-01*.fif"))), target)
    )


def recover(root: Path) -> list[Path]:
    """Finish the recordings of MEG of sessions that were killed, and return them; other kinds need nothing."""
    return [write_fif(path) for path in sorted(root.rglob("*_meg.f32"))]


# --- what is written ----------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """Return text that fits a cell of a table."""
    return re.sub(r"[\t\r\n]+", " ", text).strip()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
