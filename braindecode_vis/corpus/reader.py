"""Reading a corpus: its table of runs, and windows of them, streamed from memory maps in a shuffled order.

Owns the order in which windows are met (the same whatever the number of processes) and what is kept open meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from braindecode_vis.corpus.corpus_config import CorpusConfig
from braindecode_vis.corpus.recordings import Modality

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["train", "held_out", "all"]


class Corpus:
    """A prepared corpus; made by `open_corpus`.

    Parameters
    ----------
    folder
        Where it lies.
    config
        Its settings.
    digest
        Of its manifest: shards, persons and who is held out.
    modality
        ``fmri``, ``eeg`` or ``meg``.
    channels, networks
        Name and network of each channel (empty text if unknown).
    coordinates : array of shape (n_channels, 3) or None
        As in `recordings.Channels`.
    interval_s
        Time between two samples (s); None where it differs by run.
    runs : DataFrame
        One row per run: `run_id`, `source`, `subject`, `person`, `session`, `run`, `task`, `site`, `licence`,
        `n_times`, `interval_s`, `hours`, `motion_mm`, `shard`, `start`, `missing` (tuple of channel names),
        `held_out` and `digest`.
    """

    folder: Path
    config: CorpusConfig
    digest: str
    modality: Modality
    channels: tuple[str, ...]
    networks: tuple[str, ...]
    coordinates: np.ndarray | None
    interval_s: float | None
    runs: pd.DataFrame

    def windows(self, n_times: int, step: int | None = None, part: Part = "train") -> Windows:
        """Return the windows of the runs of a part.

        Parameters
        ----------
        n_times
            Samples of a window.
        step
            Samples from one window of a run to the next; `n_times` by default, so that none overlap.
        part
            Runs of persons to ``train`` on, of those ``held_out``, or ``all``.

        Raises
        ------
        DataError
            If no run is as long as a window.
        """
        raise NotImplementedError

    def verify(self, *, read: bool = False) -> None:
        """Raise `DataError` if the corpus on disk is no longer the one that was opened.

        Parameters
        ----------
        read
            Whether this process must have read all bytes itself, once.
        """
        raise NotImplementedError


class Windows:
    """Windows of a corpus; made by `Corpus.windows`.

    Parameters
    ----------
    person, site, run_id : arrays of text of shape (n_windows,)
        Of each window.
    interval_s : array of shape (n_windows,)
        Time between two samples of it (s).
    start_s : array of shape (n_windows,)
        When it starts after the start of its run (s).
    n_short
        Runs that are shorter than a window and have none.
    """

    corpus: Corpus
    n_times: int
    person: np.ndarray
    site: np.ndarray
    run_id: np.ndarray
    interval_s: np.ndarray
    start_s: np.ndarray
    n_short: int

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return samples as float32 of shape (n_rows, n_channels, n_times); missing channels are 0."""
        raise NotImplementedError

    def observed(self, rows: np.ndarray) -> np.ndarray:
        """Return whether each channel was recorded, bool of shape (n_rows, n_channels)."""
        raise NotImplementedError

    def iterate(self, batch_size: int, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """Yield the rows of each batch of an epoch: shuffled over shards, and within a pool of a few shards.

        Every process is given the same batches and takes its share of each. The last one may be smaller.

        Parameters
        ----------
        batch_size
            Windows of a batch, over all processes.
        seed, epoch
            Decide the order.
        """
        raise NotImplementedError


def open_corpus(folder: Path) -> Corpus:
    """Open a corpus.

    Raises
    ------
    DataError
        If there is none, it is damaged, or nothing was added yet.
    """
    raise NotImplementedError
