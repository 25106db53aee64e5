"""Alljoined-1.6M (Xu et al. 2025): 1.6 million trials of 20 subjects with a 32-channel consumer headset.

Owns the configuration, the choice between raw blocks and the authors' epochs, and the pairing of trials with pictures.
Pictures are those of THINGS-EEG2, numbered from 0; the number is the file name. Epochs are cut elsewhere.

References
----------
Xu et al. (2025), arXiv:2508.18571.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.digests import digest_files
from braindecode_vis.datasets.alljoined.blocks import (
    FLEX2,
    RawBlock,
    find_blocks,
    find_electrodes,
    find_flat,
    label_flat,
    list_categories,
    open_block,
    read_categories,
    read_labels,
)
from braindecode_vis.datasets.bids.fmri_files import check_no_overlap, hash_image_folder
from braindecode_vis.datasets.manifests import CheckFinding, check_subset, collect_findings, look_at
from braindecode_vis.datasets.sources.meeg_source import (
    MeegSettings,
    MeegSource,
    add_cleaning,
    choose_layout,
    find_picture_folder,
    find_scalp_positions,
    list_stimuli,
    number_repetitions,
    sample_part,
)

N_CHANNELS = 32


class Alljoined16mConfig(MeegSettings):
    """Folder of the files, subjects to read, and how trials are cut from raw blocks.

    Parameters
    ----------
    root
        Folder that holds ``raw_eeg`` or ``preprocessed_eeg``, or one of these.
    images
        Folder of the pictures (``00000.jpg`` ...); ``images`` or ``stimuli`` below the root by default. Trials can be
        preprocessed without them.
    layout
        ``raw`` or ``preprocessed``; by default the one that exists.
    subjects, sessions, blocks
        Numbers to read; by default all that exist. Only raw recordings can be chosen by session and block.
        Blocks 1 to 4 are for testing, 5 to 19 for training.
    channels
        ``recorded`` keeps the 32 electrodes of the files, in their order; or names, in the order in which they are
        stored.
    sfreq
        Sampling rate of the trials; that of the files (256 Hz raw, 250 Hz preprocessed) by default. Raw blocks can be
        resampled to whole fractions of 256 Hz; preprocessed epochs keep their rate.
    tmin, tmax, baseline, mvnn
        As in `EpochPlan`; preprocessed epochs are as their authors cut them.
    """

    kind: Literal["alljoined16m"] = "alljoined16m"
    layout: Literal["auto", "raw", "preprocessed"] = "auto"
    subjects: tuple[int, ...] | None = None
    sessions: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    channels: Literal["recorded"] | tuple[str, ...] = "recorded"

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, layout = self._find()
        images = hash_image_folder(self._find_images(root))
        if layout == "raw":
            blocks = {f"{block.key}/{block.path.name}": block.path for block in self._choose_blocks(root)[0]}
            tables = {f"{path.parent.name}/{path.name}": path for path in list_categories(root)}
            return images | digest_files(blocks | tables)
        files = [path for _, _, path in self._choose_flat(root)]
        own = {table for path in files for table in path.parent.glob("experiment_metadata*.parquet")}
        read = [*files, *sorted(own | set(list_categories(root)))]
        return images | digest_files({f"{path.parent.name}/{path.name}": path for path in read})

    def open_epochs(self, scratch: Path | None = None) -> MeegSource:
        """Return the data set as lazy parts."""
        import pandas as pd

        root, layout = self._find()
        categories = read_categories(root)
        name_concept = partial(_name_concept, categories)
        parts, sfreq, unit, notes = (
            self._open_raw(root, name_concept) if layout == "raw" else self._open_flat(root, name_concept)
        )
        trials = pd.concat([part.trials for part in parts], ignore_index=True)
        hint = "the recordings are of different releases"
        check_no_overlap(trials, title=f"Alljoined-1.6M in {root}", hint=hint)
        table = trials[["stimulus_id", "concept"]].drop_duplicates("stimulus_id").sort_values("stimulus_id")
        stimuli = list_stimuli(table.assign(path=table["stimulus_id"] + ".jpg"), self._find_images(root))
        if not categories:
            notes["concepts"] = "unknown: no experiment_metadata_categories.parquet; every picture is its own"
        plan = self.make_plan(sfreq=self.sfreq or sfreq)
        positions = find_scalp_positions(parts[0].ch_names, parts[0].where)
        source = MeegSource("eeg", tuple(parts), stimuli, plan, unit, positions, {"layout": layout, **notes})
        return add_cleaning(source, self)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, and read every marker."""
        root, layout = self._find()
        categories = read_categories(root)
        yield CheckFinding("layout", True, layout)
        message = f"known of {len(categories)} pictures" if categories else "unknown: their table is not here"
        yield CheckFinding("categories", True, message)
        concept = partial(_name_concept, categories)
        if layout == "preprocessed":
            for item in self._choose_flat(root):
                name = "/".join(item[2].parts[-2:])
                yield look_at(name, _count_trials, label_flat, item, self._names(), self.sfreq, concept)
            return
        chosen, ignored = self._choose_blocks(root)
        for name in ignored:
            yield CheckFinding(name, True, "is no session or block and is left out")
        yield from self.check_recordings(
            (f"{block.subject:02d}", f"{block.session:02d}", f"{block.run:02d}") for block in chosen
        )
        names = tuple(find_electrodes(read_labels(chosen[0].path, chosen[0].where)))
        for block in chosen:
            yield look_at(block.key, _count_trials, open_block, block, names, concept)

    def _find(self) -> tuple[Path, str]:
        root = self.find_root()
        there: dict[str, list[Any]] = {"raw": find_blocks(root)[0], "preprocessed": find_flat(root)}
        expected = (
            "raw_eeg/sub-01/session_01/block_01/*.edf or "
            "preprocessed_eeg/sub-01/preprocessed_eeg_training_flat.npy"
        )
        return root, choose_layout(there, self.layout, root, title="Alljoined-1.6M", expected=expected)

    def _names(self) -> tuple[str, ...] | None:
        return None if self.channels == "recorded" else tuple(self.channels)

    def _choose_subjects(self, there: set[int], root: Path) -> list[int]:
        return check_subset(
            self.subjects,
            sorted(there),
            what=f"below {root}, Alljoined-1.6M subject",
            option="dataset.subjects",
        )

    def _choose_blocks(self, root: Path) -> tuple[list[RawBlock], list[str]]:
        found, ignored = find_blocks(root)
        subjects = self._choose_subjects({block.subject for block in found}, root)
        sessions = self.sessions or tuple(range(1, max(b.session for b in found) + 1))
        # All published blocks: a missing block is then an error and not a smaller data set.
        blocks = self.blocks or tuple(range(1, self.manifest.facts["n_blocks"] + 1))
        by_key = {(b.subject, b.session, b.run): b for b in found}
        chosen = []
        for key in ((s, e, b) for s in subjects for e in sessions for b in blocks):
            if key not in by_key:
                raise DataError(
                    f"subject {key[0]:02d}, session {key[1]:02d} is missing its block {key[2]:02d} below {root}; fetch "
                    "it, or list what to use with --set dataset.sessions=[...] and dataset.blocks=[...]."
                )
            chosen.append(by_key[key])
        return chosen, ignored

    def _choose_flat(self, root: Path) -> list[tuple[int, str, Path]]:
        if self.sessions is not None or self.blocks is not None:
            raise ConfigError(
                "the preprocessed files of Alljoined-1.6M hold all sessions of a subject; unset dataset.sessions and "
                "dataset.blocks, or read the raw layout."
            )
        found = find_flat(root)
        subjects = self._choose_subjects({subject for subject, _, _ in found}, root)
        for subject in subjects:
            missing = {"train", "test"} - {split for number, split, _ in found if number == subject}
            if missing:
                raise DataError(
                    f"subject {subject:02d} is missing its {missing.pop()} file below {root}; fetch it."
                )
        return [item for subject in subjects for item in found if item[0] == subject]

    # --- raw ------------------------------------------------------------------------------------------------------

    def _open_raw(
        self, root: Path, concept: Callable[[int], str]
    ) -> tuple[list[Any], float, str, dict[str, Any]]:
        blocks, ignored = self._choose_blocks(root)
        names = tuple(find_electrodes(read_labels(blocks[0].path, blocks[0].where)))
        if self.channels != "recorded":
            names = tuple(self.channels)
        # One recording with a missing electrode would otherwise change the channels of all.
        elif len(names) != N_CHANNELS:
            raise DataError(
                f"{blocks[0].where} has {len(names)} electrodes ({', '.join(names)}), where {N_CHANNELS} are "
                "published; name those to use with --set dataset.channels=[...]."
            )
        opened = [open_block(block, names, concept) for block in blocks]
        parts = number_repetitions([part for part, _ in opened])
        left_out = sum((Counter(counts) for _, counts in opened), Counter[str]())
        notes: dict[str, Any] = {
            "markers_left_out": dict(left_out), "folders_left_out": ignored,
            "montage": "as published" if set(names) == set(FLEX2) else "other electrodes than published",
        }  # fmt: skip
        return parts, parts[0].sfreq, "V", notes

    # --- preprocessed ---------------------------------------------------------------------------------------------

    def _open_flat(
        self, root: Path, concept: Callable[[int], str]
    ) -> tuple[list[Any], float, str, dict[str, Any]]:
        opened = [label_flat(item, self._names(), self.sfreq, concept) for item in self._choose_flat(root)]
        parts = [part for part, _ in opened]
        flats = [flat for _, flat in opened]
        # One array cannot hold both volts and whitened values.
        whitened = {flat.whitened for flat in flats}
        if len(whitened) > 1:
            raise DataError(
                f"{root} holds preprocessed files that are whitened and others that are not; fetch them again from "
                "one place."
            )
        sfreq = 1 / float(np.median(np.diff(flats[0].times)))
        unit = "V" if whitened == {False} else "whitened"
        note = (
            "not stated in the file"
            if whitened == {None}
            else "by its authors, from training trials of each session"
        )
        return parts, sfreq, unit, {} if unit == "V" else {"whitening": note}

    def _find_images(self, root: Path) -> Path | None:
        places = [root / "images", root / "stimuli" / "images", root / "stimuli"]
        return find_picture_folder(self.images, places)


def _name_concept(categories: dict[int, str], image: int) -> str:
    return categories.get(image, f"{image:05d}")


def _count_trials(opens: Callable[..., tuple[Any, Any]], *args: Any) -> str:
    part = opens(*args)[0]
    sample_part(part)
    return f"{len(part.trials)} trials"
