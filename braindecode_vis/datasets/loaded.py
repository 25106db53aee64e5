"""Common part of data sets that fit into memory: digests, the stored copy of a run, and the check.

Such a data set describes its files by a `Layout`, lists the files that it reads, reads them, and counts the facts of
its manifest. Everything else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.base.store import write_responses, write_stimuli
from braindecode_vis.datasets.layout import Layout
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    RecordedSettings,
    check_files,
    collect_findings,
    compare_facts,
)

if TYPE_CHECKING:
    import pandas as pd


class LoadedSettings(RecordedSettings):
    """The settings of a data set that is read whole.

    Parameters
    ----------
    root
        Folder that holds its files.
    """

    #: What the files are.
    files: ClassVar[Layout]

    @abstractmethod
    def find_files(self) -> dict[str, Path]:
        """Return the files that are read, each with a name that does not depend on their folder."""

    @abstractmethod
    def read(self) -> tuple[Responses, StimulusSet]:
        """Return every trial, and the pictures."""

    @abstractmethod
    def count_facts(self, responses: Responses, stimuli: StimulusSet) -> dict[str, Any]:
        """Return the counted values of the facts that the manifest declares, by their names."""

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        return digest_files(self.find_files())

    def write(self, folder: Path, *, seed: int) -> None:
        """Write responses and stimuli below `folder`."""
        responses, stimuli = self.read()
        write_responses(folder / "responses", responses)
        write_stimuli(folder / "stimuli", stimuli)

    @collect_findings("content")
    def check(self) -> Iterator[CheckFinding]:
        """Compare the files with the manifest, or with the layout if no files are declared, and count every fact."""
        root = self.find_root()
        if self.manifest.files:
            yield from check_files(root, self.manifest)
        else:
            for name in self.files.files:
                for labels in self.files.list_labels(root, name):
                    yield from self.files.check(root, (name,), **labels)
        yield from compare_facts(self.count_facts(*self.read()), self.manifest.facts, root)


def find_first_of_same(pixels: np.ndarray) -> np.ndarray:
    """Return for each image the row of the first one with the same pixels: folds must not train on test images.

    Examples
    --------
    >>> images = np.array([7, 9, 7], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    >>> find_first_of_same(images).tolist()
    [0, 1, 0]
    """
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(hash_pixels(image), row) for row, image in enumerate(pixels)])


def tabulate_trials(**columns: Any) -> pd.DataFrame:
    """Return the table of trials: these columns, ``01`` for subject, session and run, and counted repetitions.

    Parameters
    ----------
    **columns
        `stimulus_id` and `split`, and other known columns; a text is the value of all trials.

    Examples
    --------
    >>> tabulate_trials(stimulus_id=["a", "b", "a"], split="train")["repetition"].tolist()
    [0, 0, 1]
    """
    import pandas as pd

    table = pd.DataFrame(columns)
    for name in ("subject", "session", "run"):
        if name not in columns:
            table[name] = "01"
    if "repetition" not in columns:
        table["repetition"] = table.groupby("stimulus_id").cumcount()
    return table
