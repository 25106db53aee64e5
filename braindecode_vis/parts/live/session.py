"""A live session: passes chunks from a source through a decoder to listeners, until it ends.

Owns the loop and its ends: a signal, the end of the stream, a duration, a number of decisions, an error. Whatever ends
it, every listener hears the end. A listener that fails is reported to the others and dropped; the rest goes on.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.parts.live.stream_roles import (
    Chunk,
    Decision,
    Listener,
    Marker,
    StreamDecoder,
    StreamInfo,
    StreamSource,
)
from braindecode_vis.scoring.retrieval import describe_common_choice
from braindecode_vis.scoring.uncertainty import bootstrap_interval

#: Seconds without samples after which a stream is called stalled.
STALLED_S = 2.0
#: Longest wait for samples, after which signals and the clock are looked at.
WAIT_S = 0.1
#: Latencies and ranks that are kept; a session of a day at five decisions a second.
MOST_KEPT = 500_000
#: Latest decisions that are looked at together for a common first choice.
JUDGED_TOGETHER = 30


@dataclass
class Tally:
    """What a session has decided so far."""

    n: int = 0
    n_images: int = 0
    n_bridged: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, deque[float]] = field(default_factory=dict)
    ranked: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=MOST_KEPT))
    n_top: int = 0
    #: What the latest decisions named first, and what they showed.
    firsts: deque[tuple[str, str | None]] = field(default_factory=lambda: deque(maxlen=JUDGED_TOGETHER))

    def add(self, decision: Decision) -> None:
        """Count a decision; one that comes again with its image counts as an image."""
        if decision.image is not None:
            self.n_images += 1
            return
        self.n += 1
        if decision.lost:
            self.lost[decision.lost.split(":", 1)[0]] += 1
            return
        self.n_bridged += any(note.startswith("bridged:") for note in decision.notes)
        for name, value in decision.latency.items():
            self.latencies.setdefault(name, deque(maxlen=MOST_KEPT)).append(value)
        if decision.top:
            self.firsts.append((decision.top[0], decision.shown))
        if decision.shown is not None:
            # In a gallery that is too large to count, only the listed ones have a rank.
            places = {name: place for place, name in enumerate(decision.top, 1)}
            self.n_top = len(decision.top)
            rank = decision.rank if decision.rank is not None else places.get(decision.shown, np.inf)
            self.ranked.append((decision.shown, rank))

    def describe_common_choice(self) -> str:
        """Return a sentence if most of the latest decisions named one and the same picture first; empty otherwise."""
        if not self.firsts:
            return ""
        first, shown = zip(*self.firsts, strict=True)
        return describe_common_choice(first, shown, what="decisions")

    def summarise(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return numbers with what they stand for.

        Parameters
        ----------
        facts
            Of `StreamDecoder.describe`.
        """
        size = int(facts.get("gallery_size", 0))
        latency = {}
        for name, values in self.latencies.items():
            p50, p99, most = np.percentile(np.array(values), (50, 99, 100)).tolist()
            latency[name] = {"p50": p50, "p99": p99, "max": most}
        found: dict[str, Any] = {
            "n_decisions": self.n, "n_lost": sum(self.lost.values()), "lost": dict(self.lost),
            "n_bridged": self.n_bridged, "n_images": self.n_images, "latency_ms": latency,
        }  # fmt: skip
        if self.ranked and size:
            ids, ranks = (np.array(part) for part in zip(*self.ranked, strict=True))
            scores = {}
            for k in (1, 5):
                if k >= size or (k > self.n_top and np.isinf(ranks).any()):
                    continue
                hits = (ranks <= k).astype(float)
                row = {"value": float(hits.mean()), "chance": k / size}
                if len(set(ids.tolist())) > 1:
                    interval = bootstrap_interval(hits, clusters=ids, n_boot=2000)
                    row |= {"ci_low": interval.low, "ci_high": interval.high}
                scores[f"top{k}"] = row
            found["scores"] = scores
            found["scored"] = (
                f"{len(ranks)} single decisions of {len(set(ids.tolist()))} pictures in a gallery of {size}; intervals "
                "resample pictures"
            )
        found["protocol"] = facts.get("protocol", "")
        if common := self.describe_common_choice():
            found["warning"] = common
        return found


class LiveSession:
    """Reads a source, decodes, and informs listeners.

    Parameters
    ----------
    source
        Where samples come from.
    decoder
        Turns them into decisions.
    listeners
        Listeners, in this order; one that keeps the recording should be the first.
    duration
        Seconds after which the session ends; None for no end.
    decisions
        Decisions after which it ends; those of a calibration block do not count, see `is_counted`.
    """

    def __init__(
        self,
        source: StreamSource,
        decoder: StreamDecoder,
        listeners: Sequence[Listener] = (),
        *,
        duration: float | None = None,
        decisions: int | None = None,
    ) -> None:
        self.source, self.decoder = source, decoder
        self.duration, self.decisions = duration, decisions
        self._listeners = list(listeners)
        self._stop = threading.Event()
        self._why = ""
        self._injected: deque[Marker] = deque()
        self._asked: deque[Callable[[], None]] = deque()
        self._tally = Tally()
        self._has_common_choice = False
        self._facts: Mapping[str, Any] = {}
        self.summary: dict[str, Any] = {}
        #: Whether a decision counts towards `decisions`; a block of pictures takes its own out.
        self.is_counted: Callable[[Decision], bool] = lambda decision: True
        self._n_counted = 0

    def add(self, listener: Listener) -> None:
        """Add one more listener; before `run`."""
        self._listeners.append(listener)

    def inject(self, marker: Marker) -> None:
        """Add a marker as if the stream had sent it; from any thread. A simulated person answers."""
        self._injected.append(marker)
        if (answer := getattr(self.source, "answer", None)) is not None:
            answer(marker)

    def ask(self, what: Callable[[], None]) -> None:
        """Call a function in the thread of the session, between two chunks; from any thread."""
        self._asked.append(what)

    def stop(self, why: str = "it was stopped") -> None:
        """Let the session end after the chunk at hand; from any thread."""
        self._why = self._why or why
        self._stop.set()

    def run(self) -> dict[str, Any]:
        """Decode until the end, and return the summary.

        Returns
        -------
        summary
            Numbers of decisions and of lost ones by reason, latencies in ms, and, where it is known what was shown,
            top-1 and top-5 with chance and interval.

        Raises
        ------
        BraindecodeVisError
            If the stream cannot be opened or does not fit, or breaks the contract while it runs; listeners have heard
            of the end by then.
        """
        error: BaseException | None = None
        began = time.perf_counter()
        with self._hear_signals():
            try:
                info = self._ask_source("connect")
                if not isinstance(info, StreamInfo):
                    raise DataError(f"{self._name} gave {type(info).__name__} at connect, not a StreamInfo.")
                # A session that was ended before it began leaves no empty recording.
                if not self._stop.is_set():
                    notes = self.decoder.open(info)
                    self._facts = self.decoder.describe()
                    self._tell_all("begin", info, self._facts)
                    for note in notes:
                        self.tell(note)
                    began = time.perf_counter()
                    self._loop(began)
            except BaseException as caught:  # told below, once everyone has heard the end
                error = caught
            try:
                if self._facts and (error is None or isinstance(error, BraindecodeVisError)):
                    left = self.decoder.flush()
                    if self._has_enough:
                        # Nobody asked for more, but images of those that were made.
                        left = (one for one in left if isinstance(one, str) or one.image is not None)
                    self._pass_on(left)
            except BraindecodeVisError as caught:
                error = error or caught
            if isinstance(error, BraindecodeVisError):
                self.tell(str(error), "error")
            try:
                self._ask_source("close")
            except DataError as caught:  # every listener still hears the end
                error = error or caught
            if self._facts:  # what was adapted meanwhile belongs to the protocol
                self._facts = self.decoder.describe()
            self.summary = {
                **self._tally.summarise(self._facts), "seconds": time.perf_counter() - began,
                "ended": self._why if error is None else f"error: {error}",
            }  # fmt: skip
            self._tell_all("end", self.summary)
        if error is not None:
            raise error
        return self.summary

    @property
    def _has_enough(self) -> bool:
        return self.decisions is not None and self._n_counted >= self.decisions

    @property
    def _name(self) -> str:
        return f"the source {type(self.source).__name__}"

    def _ask_source(self, method: str, *what: Any) -> Any:
        """Call the source, which may be of others: whatever it raises ends the session as an error of a stream does."""
        try:
            return getattr(self.source, method)(*what)
        except BraindecodeVisError:
            raise
        except Exception as error:
            raise DataError(
                f"{self._name} failed at {method} with {type(error).__name__}: {' '.join(str(error).split())}."
            ) from error

    def _loop(self, began: float) -> None:
        last, stalled = time.perf_counter(), False
        # Volumes of fMRI are seconds apart.
        longest = max(STALLED_S, 3 / float(self._facts.get("stream_sfreq") or np.inf))
        while not self._stop.is_set():
            left = WAIT_S
            if self.duration is not None:
                left = min(left, began + self.duration - time.perf_counter())
                if left <= 0:
                    self.stop(f"the duration of {self.duration:g} s was over")
                    return
            self._answer()
            chunk = self._ask_source("read", left)
            if not isinstance(chunk, Chunk):
                raise DataError(f"{self._name} gave {type(chunk).__name__} at read, not a Chunk.")
            now = time.perf_counter()
            if not chunk.arrived:
                chunk = replace(chunk, arrived=now)
            if self._injected:
                added = tuple(self._injected.popleft() for _ in range(len(self._injected)))
                chunk = replace(chunk, markers=(*chunk.markers, *added))
            for note in chunk.notes:
                self.tell(note, "warning")
            if len(chunk.times):
                if stalled:
                    self.tell(f"The stream continues after {now - last:.1f} s without samples.")
                last, stalled = now, False
            elif not stalled and not chunk.ended and now - last > longest:
                stalled = True
                self.tell(
                    f"The stream has sent no samples for {now - last:.1f} s; the session waits.", "warning"
                )
            if len(chunk.times) or chunk.markers:
                self._tell_all("hear", chunk)
            if self._pass_on(self.decoder.feed(chunk)):
                return
            if chunk.ended:
                self.stop("the stream ended")

    def _answer(self) -> None:
        """Call what other threads asked for; an error of it ends nothing."""
        while self._asked:
            try:
                self._asked.popleft()()
            except BraindecodeVisError as error:
                self.tell(str(error), "error")

    def _pass_on(self, found: Iterable[Decision | str]) -> bool:
        """Report decisions and sentences, and return whether as many were made as were asked for."""
        for one in found:
            if isinstance(one, str):
                self.tell(one, "warning")
                continue
            self._tally.add(one)
            self._n_counted += one.image is None and self.is_counted(one)
            self._tell_all("decide", one)
            self._warn_of_common_choice()
            if self._has_enough and not self._stop.is_set():
                self.stop(f"{self.decisions} decisions were made")
                return True
        return False

    def _warn_of_common_choice(self) -> None:
        """Warn once when most decisions begin to name one picture, and again only after they named others."""
        sentence = self._tally.describe_common_choice()
        if sentence and not self._has_common_choice:
            self.tell(sentence[0].upper() + sentence[1:], "warning")
        self._has_common_choice = bool(sentence)

    def tell(self, sentence: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Inform all listeners that something happened to the session."""
        self._tell_all("tell", sentence, level)

    def _tell_all(self, method: str, *what: Any) -> None:
        for listener in tuple(self._listeners):
            try:
                getattr(listener, method)(*what)
            except Exception as error:
                self._listeners.remove(listener)
                name = type(listener).__name__
                if method != "end":
                    # It may hold a file or a port: it still hears the end, and nothing else.
                    with suppress(Exception):
                        listener.end({})
                self._tell_all(
                    "tell",
                    f"{name} failed and gets no further messages ({type(error).__name__}: {error}).",
                    "error",
                )

    @contextmanager
    def _hear_signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and a closed terminal end the session after the chunk at hand; Ctrl-C again, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
        if (hangup := getattr(signal, "SIGHUP", None)) is not None:  # Windows has none
            names[hangup] = "the terminal was closed"
        before = {number: signal.getsignal(number) for number in names}
        if hangup is not None and before[hangup] == signal.SIG_IGN:
            del before[hangup]  # nohup asks for it
        heard = set[int]()

        def hear(number: int, frame: Any) -> None:
            if number in heard and number == signal.SIGINT:
                raise KeyboardInterrupt
            heard.add(number)
            self.stop(names[signal.Signals(number)])

        for number in before:
            signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
