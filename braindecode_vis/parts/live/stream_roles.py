"""The interfaces of live decoding: chunks of samples, decisions, and listeners.

A source gives chunks (`StreamSource`), a decoder turns them into decisions (`StreamDecoder`), and listeners hear of
both (`Listener`). All times are in seconds on the clock of the source, so only differences have a meaning. Your own
source is a class with `connect`, `read` and `close`; it is named as ``package.module:Class`` on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from braindecode_vis.base.arrays import Modality


@dataclass(frozen=True)
class StreamInfo:
    """What a source says of its stream once it is connected.

    Parameters
    ----------
    name
        Of the stream, for messages.
    modality
        ``eeg``, ``meg`` or ``fmri``.
    ch_names
        Of the rows of every chunk; empty for voxels, whose rows are those of the mask.
    sfreq
        Samples a second; for fMRI one over the repetition time.
    unit
        Of the samples: ``V``, ``uV``, ``T``, ``T/m`` or, where the stream does not say, empty.
    markers
        Where markers come from, in words; empty if there are none.
    """

    name: str
    modality: Modality
    ch_names: tuple[str, ...]
    sfreq: float
    unit: str = ""
    markers: str = ""


@dataclass(frozen=True)
class Marker:
    """Something that happened at one time: mostly an image that appeared.

    Parameters
    ----------
    time
        In s.
    value
        As it was sent: the id of a stimulus, or the code of a trigger.
    """

    time: float
    value: str


@dataclass(frozen=True)
class DeviceState:
    """What an amplifier reports of itself, as far as it does.

    Parameters
    ----------
    battery
        What is left, from 0 to 1.
    impedance
        In kΩ, by the name of the electrode.
    """

    battery: float | None = None
    impedance: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Samples that arrived together.

    Parameters
    ----------
    samples : float array of shape (n_channels, n_samples)
        In the unit of the stream, channels as `StreamInfo.ch_names`. May be empty.
    times : float64 array of shape (n_samples,)
        Of each sample in s, ascending over all chunks. A step longer than one and a half samples is a gap.
    markers
        That arrived since the last chunk; their times may lie before, inside or behind those of the samples.
    notes
        What happened to the stream, one sentence each: lost samples, a new connection, a jump of the clock.
    arrived
        ``time.perf_counter()`` when the last sample was at hand, from which latencies count; 0 stands for the moment at
        which the chunk is read.
    ended
        No chunk will follow.
    device
        What the amplifier reported of itself since the last chunk.
    """

    samples: np.ndarray
    times: np.ndarray
    markers: tuple[Marker, ...] = ()
    notes: tuple[str, ...] = ()
    arrived: float = 0.0
    ended: bool = False
    device: DeviceState | None = None


@runtime_checkable
class StreamSource(Protocol):
    """Where samples come from. The three methods are all that must be there."""

    def connect(self) -> StreamInfo:
        """Open the stream, within a bounded time.

        Raises
        ------
        DataError
            If there is no such stream; lists those that are there.
        """
        ...

    def read(self, timeout: float) -> Chunk:
        """Return what has arrived since the last call; waits up to `timeout` s, and then returns an empty chunk."""
        ...

    def close(self) -> None:
        """Let go of the stream; may be called twice."""
        ...


@dataclass(frozen=True)
class Decision:
    """What was decided of one epoch, window or volume, or why nothing could be.

    Parameters
    ----------
    number
        Counts the decisions of a session from 0; every marker of an image has one, decided or lost.
    onset
        When the image appeared, or the window began, in s.
    marker
        What the marker said; empty for a window without one.
    shown
        Id of the stimulus that was shown, where the marker says it; else None.
    lost
        Why nothing was decided, as ``kind: sentence``, of which the summary counts the kinds; empty if something was.
    embedding : array of shape (n_features,), optional
        In the space of the comparison.
    top
        Ids of the best candidates, the best first.
    similarity, probability : arrays of shape (n_top,)
        Cosine of each, and its probability in the whole gallery from this decision alone; the latter empty as long as
        nothing says how sure the run may be (see `evidence`).
    posterior_top, posterior
        The same from all evidence for this image (repetitions of a marker) or of this stretch (windows): ids and
        probabilities.
    n_evidence
        How many decisions the posterior has seen.
    rank
        Of the shown image in the gallery, from 1; None if it is not known or not there, and in galleries of more
        than 65 536, where `top` alone says whether it is among the best.
    latency : mapping of str to float
        In ms: ``wait`` (from the last sample that was needed, when it arrived, to the decision), and its parts
        ``preprocess``, ``predict``, ``rank``; ``delay`` is how far causal filters are behind its end.
    image
        What was reconstructed: uint8 of shape (height, width, 3); None if nothing was.
    epoch : array of shape (n_channels, n_times), optional
        What the encoder saw.
    notes
        Sentences on this decision alone, for example channels that were interpolated.
    """

    number: int
    onset: float
    marker: str = ""
    shown: str | None = None
    lost: str = ""
    embedding: np.ndarray | None = None
    top: tuple[str, ...] = ()
    similarity: np.ndarray = field(default_factory=lambda: np.empty(0))
    probability: np.ndarray = field(default_factory=lambda: np.empty(0))
    posterior_top: tuple[str, ...] = ()
    posterior: np.ndarray = field(default_factory=lambda: np.empty(0))
    n_evidence: int = 0
    rank: int | None = None
    latency: Mapping[str, float] = field(default_factory=dict)
    image: np.ndarray | None = None
    epoch: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def as_record(self, *, embedding: bool = False) -> dict[str, Any]:
        """Return what is written of it: all but its epoch, and of an image the shape alone; `make_plain` as JSON."""
        record: dict[str, Any] = {
            "number": self.number, "onset": self.onset, "marker": self.marker, "shown": self.shown,
        }  # fmt: skip
        if self.lost:
            record["lost"] = self.lost
        elif self.image is not None:
            record["image"] = self.image.shape
        else:
            record |= {
                "top": self.top, "similarity": self.similarity, "probability": self.probability,
                "posterior_top": self.posterior_top, "posterior": self.posterior, "n_evidence": self.n_evidence,
                "rank": self.rank, "latency": self.latency, "notes": self.notes,
            }  # fmt: skip
            if embedding and self.embedding is not None:
                record["embedding"] = self.embedding.ravel()
        return record


def make_plain(value: Any) -> Any:
    """Return what JSON can hold: numbers that are not finite become null, and what it does not know becomes text.

    Arrays keep nine digits, which distinguish all numbers of single precision.

    Examples
    --------
    >>> make_plain({"a": np.array([0.1, np.nan], np.float32), 1: (np.int64(2), Path("x"))})
    {'a': [0.100000001, None], '1': [2, 'x']}
    """
    if value is None or isinstance(value, bool | str | np.bool_):
        return bool(value) if isinstance(value, np.bool_) else value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim == 1:
        return [float(f"{number:.9g}") if math.isfinite(number) else None for number in value.tolist()]
    if isinstance(value, Mapping):
        return {str(name): make_plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return make_plain(value.item())
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [make_plain(item) for item in value]
    return str(value)


class StreamDecoder(Protocol):
    """Turns chunks into decisions; one of EEG and MEG, one of fMRI."""

    def open(self, info: StreamInfo) -> Sequence[str]:
        """Get ready for a stream, and return sentences on what is done to it; refuses one that does not fit."""
        ...

    def feed(self, chunk: Chunk) -> Iterable[Decision | str]:
        """Take samples in, and yield each decision as soon as it is made, and sentences for listeners.

        An image that is made of a decision comes later: the same decision again, with the same number and `image` set.
        """
        ...

    def flush(self) -> Iterable[Decision | str]:
        """The stream has ended: name every epoch that will never be complete."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Return the facts that listeners show: protocol, gallery, sampling rate, delay, channels and regions."""
        ...

    def find_images(self, ids: Sequence[str]) -> list[Path | np.ndarray | None]:
        """Return the pictures of candidates, for those who show them."""
        ...


class Listener:
    """Hears what happens in a session; every method may be left as it is. None may take long: the stream waits."""

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """The stream is connected; `facts` are those of `StreamDecoder.describe`."""

    def hear(self, chunk: Chunk) -> None:
        """Samples arrived, as the source gave them; before anything is decided of them."""

    def decide(self, decision: Decision) -> None:
        """Something was decided, or lost.

        With ``--reconstruct`` it is called twice for the same number: the second time with `Decision.image`.
        """

    def tell(self, sentence: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Something happened to the session: connection, signal quality, a marker without an image."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """The session is over; called once, whatever ended it."""
