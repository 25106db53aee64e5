"""THINGS-MEG (Hebart et al. 2023): raw CTF runs, or the epochs that the authors published.

Owns the configuration, the choice of the layout and the split. `open_epochs` gives lazy parts and reads no samples.

Onsets. The events table has the time at which an optical sensor saw the picture; the trigger on ``UPPT001`` differs by
about 150 ms. The default is optical: it is the time of the picture, and the authors' epochs use it, so time zero is the
same in both layouts. ``check`` measures the difference in every run.

References
----------
Hebart et al. (2023), THINGS-data, a multimodal collection of large-scale datasets for investigating object
representations in human brain and behavior, eLife 12, e82580. doi:10.7554/eLife.82580
Benchetrit, Banville, King (2024), Brain decoding: toward real-time reconstruction of visual perception,
arXiv:2310.19812: small and large test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.bids.meeg_files import (
    PLACES,
    describe_images,
    find_sensor_positions,
    hash_images,
    list_recording_files,
    make_shown_table,
    make_stimuli,
)
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    collect_findings,
    compare_counts,
    list_recordings,
    look_at,
    refuse_other_layout,
)
from braindecode_vis.datasets.sources.meeg_source import (
    MeegSettings,
    MeegSource,
    Mvnn,
    add_cleaning,
    number_repetitions,
    sample_part,
)
from braindecode_vis.datasets.things_meg.files import (
    DROPOUTS,
    EpochFile,
    MegRun,
    Onset,
    find_attributes,
    find_epoch_files,
    find_name_files,
    find_runs,
    list_runs,
    make_epoch_part,
    make_run_part,
    measure_lag,
    open_run,
    read_image_names,
    read_run_events,
)
from braindecode_vis.datasets.things_meg.trial_split import TestSet, apply_split, describe_split

if TYPE_CHECKING:
    import pandas as pd

Layout = Literal["raw", "preprocessed"]
_RAW_ONLY = ("tmin", "tmax", "baseline", "mvnn", "mvnn_channels", "resampling", "onset", "sessions")


class ThingsMegConfig(MeegSettings):
    """Folder of the data set, subjects to read, and how trials are cut.

    Parameters
    ----------
    root
        Folder of the data set (``sub-BIGMEG1``..., ``derivatives``, ``sourcedata``), or of the epochs.
    images
        Folder of the THINGS images: ``object_images/concept/name.jpg``, or ``images_meg`` and ``images_test_meg``;
        searched below and beside the root by default.
    layout
        ``preprocessed`` (epochs of the authors: 0.1-40 Hz, 200 Hz, 271 sensors, -0.1 to 1.3 s, baseline z-score) or
        ``raw``; ``auto`` takes the epochs if they exist, and refuses raw recordings with fewer sessions than the
        attributes list, since the epochs may be lost.
    subjects, sessions
        Numbers to read; by default all that exist. Sessions can be chosen only in the raw layout.
    channels
        ``all`` gradiometers except MRO11-1609, or names.
    onset
        ``optical`` sensor or ``trigger``; raw only, see above.
    test_set
        ``small``: the 200 repeated images. ``large``: the 2400 other images of their concepts, shown once each, so
        retrieval must distinguish images of one concept; the repeated ones are left out.
    zero_shot
        Keep the images of test concepts out of training. The large test set needs it.
    sfreq
        As in `EpochPlan`; published epochs keep their rate.
    max_dropped
        As in `EpochPlan`; it is also the largest share of trials that may be missing in the split.
    tmin, tmax, baseline, mvnn, mvnn_channels, resampling
        As in `EpochPlan`, for the raw layout; published epochs are as their authors cut them. Time zero of the window
        is the onset. For `mvnn`, None means ``epochs`` for raw recordings, and no normalisation for published epochs.
    reference, ica, autoreject
        As in `CleaningOptions`; only for EEG, so they are refused here.
    """

    kind: Literal["things_meg"] = "things_meg"
    layout: Literal["auto"] | Layout = "auto"
    subjects: tuple[int, ...] | None = None
    sessions: tuple[int, ...] | None = None
    channels: Literal["all"] | tuple[str, ...] = "all"
    onset: Onset = "optical"
    test_set: TestSet = "small"
    zero_shot: bool = True
    sfreq: float = Field(default=200.0, gt=0)
    tmin: float = -0.1
    tmax: float = 1.3
    mvnn: Mvnn | None = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _large_is_zero_shot(self) -> ThingsMegConfig:
        if self.test_set == "large" and not self.zero_shot:
            raise ValueError("the large test set is made of images of test concepts; it needs zero_shot true")
        return self

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, held = self._find()
        files: dict[str, Path] = {}
        for item in held:
            if isinstance(item, MegRun):
                files |= list_recording_files(item.path, root)
            else:
                files |= {p.relative_to(root).as_posix(): p for p in item.files}
        tables = find_name_files(root, self.images, dict.fromkeys(item.subject for item in held))
        files |= {path.name: path for path in tables}
        return hash_images(self.images, root) | digest_files(files)

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts."""
        root, held = self._find()
        is_raw = isinstance(held[0], MegRun)
        if not is_raw:
            self.refuse_raw_options(_RAW_ONLY)
        names = self._read_names(root, held)
        parts, notes, positions = (
            self._open_raw(held, names) if is_raw else self._open_epochs(held, root, names)
        )
        # Only after all parts are known: the test concepts follow from all sessions of a subject.
        parts, sizes = apply_split(parts, self.test_set, self.zero_shot, self.max_dropped)
        notes |= {
            "layout": "raw" if is_raw else "preprocessed",
            "split": describe_split(self.test_set, self.zero_shot),
            "counts": sizes,
        }
        plan = self.make_plan(mvnn=self.mvnn or ("epochs" if is_raw else "none"))
        # The authors' epochs are z-scored by their baseline.
        unit = "T" if is_raw else "z"
        stimuli = self._find_images(parts, root)
        source = MeegSource("meg", tuple(parts), stimuli, plan, unit, ch_pos=positions, notes=notes)
        return add_cleaning(source, self)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, pair every event with its image, and measure the lag between trigger and picture."""
        root, held = self._find()
        names = self._read_names(root, held)
        layout = "raw" if isinstance(held[0], MegRun) else "preprocessed"
        n_subjects = len({item.subject for item in held})
        yield CheckFinding("layout", True, f"{layout}, {n_subjects} subject(s), {len(held)} file(s)")
        n_concepts = names["concept"].nunique()
        yield CheckFinding("image numbers", True, f"{len(names)} images of {n_concepts} concepts")
        for item in held:
            if isinstance(item, MegRun):
                yield look_at("/".join(item.path.parts[-3:]), _describe_run, item, names)
            else:
                yield look_at(item.path.name, self._describe_epochs, item, root, names)
        try:
            source = self.open_epochs()
        except (DataError, ConfigError) as error:
            yield CheckFinding("split", False, str(error))
            return
        yield from self.check_recordings(list_recordings(source.parts))
        yield CheckFinding("images", True, describe_images(source.stimuli))
        # The published counts are for the default split of all sessions.
        if self.test_set == "small" and self.zero_shot and self.sessions is None:
            for name, found in source.notes["counts"].items():
                yield compare_counts(f"subject {name} counts", found, self.manifest.facts, root)

    def _find(self) -> tuple[Path, list[Any]]:
        root = self.find_root()
        held: list[Any] = []
        if self.layout in ("auto", "preprocessed"):
            held = list(find_epoch_files(root, self.subjects))
        if not held and self.layout in ("auto", "raw"):
            held = list(find_runs(root, self.subjects, self.sessions))
            if self.layout == "auto" and self.sessions is None:
                _refuse_lost_epochs(root, held)
        elif self.layout == "auto":
            there = {
                "preprocessed": {item.subject for item in find_epoch_files(root, None)},
                "raw": {item.subject for item in list_runs(root)},
            }
            refuse_other_layout(there, self.subjects, where=root, option="dataset.layout")
        if not held:
            raise DataError(
                f"no {'' if self.layout == 'auto' else self.layout + ' '}THINGS-MEG recording was found below {root}: "
                "expected derivatives/preprocessed/preprocessed_P1-epo.fif or sub-BIGMEG1/ses-01/meg/"
                "sub-BIGMEG1_ses-01_task-main_run-01_meg.ds and their like."
            )
        return root, held

    def _read_names(self, root: Path, held: list[Any]) -> pd.DataFrame:
        tables = [find_attributes(root, subject) for subject in dict.fromkeys(item.subject for item in held)]
        return read_image_names(root, self.images, [table for table in tables if table is not None])

    def _chosen(self) -> tuple[str, ...] | None:
        return None if self.channels == "all" else self.check_named_channels(self.channels)

    def _open_raw(
        self, runs: list[MegRun], names: pd.DataFrame
    ) -> tuple[list[Any], dict[str, Any], np.ndarray]:
        parts, lags = [], {}
        for run in runs:
            raw = open_run(run)
            part, lag = make_run_part(run, raw, names, self._chosen(), self.onset, self.max_dropped)
            parts.append(part)
            if len(parts) == 1:
                positions = find_sensor_positions(raw, part.ch_names)
            if lag is not None:
                lags[run.path.name] = lag["median_ms"]
        notes: dict[str, Any] = {"onset": self.onset}
        if lags:
            notes["optical_after_trigger_ms"] = lags
        bridged = [run.path.name for run in runs if (run.subject, run.session, run.run) in DROPOUTS]
        if bridged:
            notes["bridged_dropouts"] = (
                f"0.2 s without signal were replaced by a straight line in {', '.join(bridged)}"
            )
        return list(number_repetitions(parts)), notes, positions

    def _open_epochs(
        self, files: list[EpochFile], root: Path, names: pd.DataFrame
    ) -> tuple[list[Any], dict[str, Any], np.ndarray]:
        opened = [self._open_file(file, root, names) for file in files]
        parts = [part for part, _ in opened]
        notes = {f"subject_{file.subject:02d}": own for file, (_, own) in zip(files, opened, strict=True)}
        positions = find_sensor_positions(parts[0].read.epochs, parts[0].ch_names)
        return parts, {"onset": "optical", "epochs": notes}, positions

    def _open_file(self, file: EpochFile, root: Path, names: pd.DataFrame) -> tuple[Any, dict[str, Any]]:
        attributes = find_attributes(root, file.subject)
        return make_epoch_part(file, names, attributes, self._chosen(), self.sfreq)

    def _describe_epochs(self, file: EpochFile, root: Path, names: pd.DataFrame) -> str:
        part, notes = self._open_file(file, root, names)
        sample_part(part, sfreq=200.0)
        return (
            f"{len(part.trials)} epochs in {len(file.files)} part(s), {len(part.ch_names)} sensors, {len(part.times)} "
            f"times, {notes.get('n_attribute_mismatches', 0)} row(s) of the attributes name another image"
        )

    def _find_images(self, parts: list[Any], root: Path) -> StimulusSet:
        guesses = [base / place for base in (root, root.parent) for place in PLACES]
        return make_stimuli(
            make_shown_table(part.trials for part in parts), self.images, guesses, _list_places
        )


def _refuse_lost_epochs(root: Path, runs: list[MegRun]) -> None:
    """Refuse raw recordings with fewer sessions instead of epochs: a lost file must not change the data set."""
    for subject in dict.fromkeys(run.subject for run in runs):
        attributes = find_attributes(root, subject)
        listed = set() if attributes is None else set(attributes["session_nr"])
        there = sorted({run.session for run in runs if run.subject == subject})
        if len(there) < len(listed):
            raise DataError(
                f"derivatives/preprocessed/preprocessed_P{subject}-epo.fif is not below {root}, and the raw recordings "
                f"of subject {subject:02d} are {len(there)} of {len(listed)} sessions that its sample attributes list; "
                "fetch the epochs, or read what is there with --set dataset.layout=raw --set "
                f"dataset.sessions=[{','.join(map(str, there))}]."
            )


def _list_places(file: str, concept: str) -> tuple[str, ...]:
    name = file.rsplit("/", 1)[-1]
    return (file, f"object_images/{file}", f"images/{file}", f"images_meg/{file}", f"images_test_meg/{name}")


def _describe_run(run: MegRun, names: pd.DataFrame) -> str:
    raw = open_run(run)
    events = read_run_events(run, raw, names)
    _, lag = measure_lag(run, raw, events["sample"].to_numpy())
    sample_part(make_run_part(run, raw, names, None, "optical", 1.0)[0], sfreq=1200.0)
    n_catch = int(events["is_catch"].sum())
    return (
        f"{len(events) - n_catch} pictures, {n_catch} catch trials; the optical onset follows the trigger by "
        f"{lag['median_ms']:.1f} ms ({lag['min_ms']:.1f} to {lag['max_ms']:.1f}), {lag['n_without_trigger']:.0f} "
        "picture(s) without trigger"
    )
