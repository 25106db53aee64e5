"""Listeners without a browser: a terminal, a file of JSON lines, and an outgoing LSL stream."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.live.sources import describe_stream, load_lsl
from braindecode_vis.parts.live.stream_roles import Chunk, Decision, Listener, StreamInfo, make_plain

#: Decisions that the table of a terminal shows.
SHOWN = 12
#: How long the first decisions of an outlet are kept for clients that are about to find it, in s. A client that already
#: searches asks the network every half second, and then connects.
CLIENTS_S = 5.0
#: Colours of the levels of a sentence.
_COLOURS = {"info": "dim", "warning": "yellow", "error": "red"}


class TerminalListener(Listener):
    """Shows the last decisions as a table that is renewed; without a terminal, a plain line each.

    Parameters
    ----------
    file
        Standard error by default, so that JSON lines may have the standard output.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._rows: deque[Decision] = deque(maxlen=SHOWN)
        self._live: Any = None
        self._console: Any = None

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """Say what is decoded."""
        from rich.console import Console

        self._console = Console(file=self._file)
        self._say(
            f"{info.name}: {info.modality.upper()}, {len(info.ch_names)} channels, {info.sfreq:g} Hz; "
            f"{facts.get('protocol', '')}"
        )
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(self._draw(), console=self._console, refresh_per_second=8)
            self._live.start()

    def decide(self, decision: Decision) -> None:
        """Show a decision."""
        if self._live is None:
            self._say(describe_decision(decision))
            return
        if decision.image is not None:
            return
        self._rows.append(decision)
        self._live.update(self._draw())

    def tell(self, sentence: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Show a sentence."""
        if self._console is None and level == "error":
            return  # of a stream that was never opened: the command says it
        self._say(sentence, level)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Say what came of the session."""
        if self._console is None:
            return
        if self._live is not None:
            self._live.stop()
            self._live = None
        for line in describe_summary(summary):
            self._say(line)

    def _say(self, sentence: str, level: str = "") -> None:
        if self._console is None or not self._console.is_terminal:
            # Plain lines, which a log keeps whole.
            print(sentence, file=self._file, flush=True)
            return
        from rich.text import Text

        self._console.print(Text(sentence, style=_COLOURS.get(level, "")))

    def _draw(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("no", "onset s", "shown", "best", "p", "from all evidence", "p", "rank", "ms"):
            table.add_column(name)
        for one in self._rows:
            if one.lost:
                table.add_row(str(one.number), f"{one.onset:.2f}", one.marker, Text(one.lost, style="yellow"))
                continue
            table.add_row(
                str(one.number), f"{one.onset:.2f}", Text(one.marker), Text(one.top[0] if one.top else ""),
                _percent(one.probability), Text(one.posterior_top[0] if one.posterior_top else ""),
                f"{_percent(one.posterior)} ({one.n_evidence})", "" if one.rank is None else str(one.rank),
                f"{one.latency.get('wait', math.nan):.1f}",
            )  # fmt: skip
        return table


def _percent(values: np.ndarray) -> str:
    return f"{100 * values[0]:.1f}%" if len(values) else ""


def describe_decision(decision: Decision) -> str:
    """Return a decision in one line."""
    head = f"{decision.number}: {decision.marker or 'window'} at {decision.onset:.3f} s"
    if decision.lost:
        return f"{head}: lost, {decision.lost}"
    if decision.image is not None:
        return f"{head}: image of {decision.image.shape[1]} x {decision.image.shape[0]}"
    values = [f"{100 * p:.1f}%" for p in decision.probability] or [f"{s:.3f}" for s in decision.similarity]
    best = ", ".join(f"{name} {value}" for name, value in zip(decision.top, values, strict=True))
    parts = [f"{head}: {best}"]
    if decision.n_evidence > 1:
        parts.append(
            f"after {decision.n_evidence}: {decision.posterior_top[0]} {_percent(decision.posterior)}".rstrip()
        )
    if decision.rank is not None:
        parts.append(f"rank {decision.rank}")
    parts.append(f"{decision.latency.get('wait', math.nan):.1f} ms")
    parts += decision.notes
    return "; ".join(parts)


def describe_summary(summary: Mapping[str, Any]) -> list[str]:
    """Return the end of a session in a few lines."""
    if not summary:
        return []
    lost = summary.get("lost", {})
    reasons = f" ({', '.join(f'{n} {kind}' for kind, n in lost.items())})" if lost else ""
    lines = [
        f"{summary.get('n_decisions', 0)} decisions, {summary.get('n_lost', 0)} lost{reasons} in "
        f"{summary.get('seconds', 0.0):.1f} s; ended: {summary.get('ended', '')}"
    ]
    if n_bridged := summary.get("n_bridged"):
        lines.append(f"{n_bridged} of them contain a bridged gap")
    if wait := summary.get("latency_ms", {}).get("wait"):
        lines.append(
            f"latency: half within {wait['p50']:.1f} ms, 99 of 100 within {wait['p99']:.1f} ms, longest "
            f"{wait['max']:.1f} ms"
        )
    for name, row in summary.get("scores", {}).items():
        interval = f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if "ci_low" in row else ""
        lines.append(f"{name}: {row['value']:.3f}{interval}, chance {row['chance']:.3f}")
    if "scored" in summary:
        lines.append(summary["scored"])
    if "warning" in summary:
        lines.append(f"warning: {summary['warning']}")
    return lines


class JsonLinesListener(Listener):
    """Writes one JSON object a line: the beginning, every decision and sentence, the end.

    Parameters
    ----------
    path
        A file that does not exist yet, made once the stream is there, or ``-`` for the standard output.
    embeddings
        Whether predicted embeddings are written, too.
    """

    def __init__(self, path: str | Path, *, embeddings: bool = False) -> None:
        self._embeddings = embeddings
        self._path = Path(path).expanduser()
        self._file: TextIO | None = sys.stdout if str(path) == "-" else None
        if self._file is None and self._path.exists():
            raise ConfigError(f"{self._path} already exists; give --jsonl a new file.")
        if self._file is None and not os.access(self._path.parent, os.W_OK):
            raise ConfigError(f"{self._path} cannot be written; give --jsonl a file in a writable folder.")

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """Write what is decoded."""
        # Not before: a command that finds no stream may be given again.
        self._file = self._file or self._path.open("x", encoding="utf-8")
        stream = {"name": info.name, "modality": info.modality, "sfreq": info.sfreq, "unit": info.unit}
        self._write("begin", {"info": {**stream, "ch_names": list(info.ch_names)}, "facts": dict(facts)})

    def decide(self, decision: Decision) -> None:
        """Write a decision; an image by its size alone."""
        self._write(
            "image" if decision.image is not None else "decision",
            decision.as_record(embedding=self._embeddings),
        )

    def tell(self, sentence: str, level: Literal["info", "warning", "error"] = "info") -> None:
        """Write a sentence."""
        self._write("tell", {"level": level, "sentence": sentence})

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the file."""
        self._write("end", {"summary": dict(summary)})
        if self._file is not None and self._file is not sys.stdout:
            self._file.close()

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(make_plain({"event": event, **content}), ensure_ascii=False) + "\n")
        self._file.flush()  # whoever follows the file sees it at once, and a crash loses nothing


class OutletListener(Listener):
    """Sends decisions on as two LSL streams: ``NAME`` with a JSON text each, ``NAME-embedding`` with the vectors.

    The text holds number, onset, top candidates and probabilities, and is sent of lost decisions, too. Other programs
    act on it without knowing this one. A stream begins with the first client, or `CLIENTS_S` after it was offered: what
    was decided meanwhile is sent then, with the time at which it was decided.

    Parameters
    ----------
    name
        Of the streams.

    Raises
    ------
    ConfigError
        If there is a stream of that name.
    """

    def __init__(self, name: str) -> None:
        self._lsl = load_lsl("an outgoing stream")
        self._name = name
        for each in (name, f"{name}-embedding"):
            if there := self._lsl.resolve_streams(timeout=0.5, name=each):
                raise ConfigError(
                    f"a stream of that name already exists ({describe_stream(there[0])}), and those who listen could "
                    "not distinguish them; give --outlet another name."
                )
        self._markers: _Outlet | None = None
        self._vectors: _Outlet | None = None

    def begin(self, info: StreamInfo, facts: Mapping[str, Any]) -> None:
        """Offer the stream of decisions."""
        stream = self._lsl.StreamInfo(
            self._name, "Markers", 1, 0.0, "string", f"braindecode-vis-{self._name}"
        )
        self._markers = _Outlet(self._lsl, stream)

    def hear(self, chunk: Chunk) -> None:
        """Send what was kept, once somebody listens."""
        for outlet in (self._markers, self._vectors):
            if outlet is not None:
                outlet.send_kept()

    def decide(self, decision: Decision) -> None:
        """Send a decision."""
        if decision.image is not None or self._markers is None:
            return
        record = decision.as_record()
        for name in ("latency", "notes"):
            record.pop(name, None)
        self._markers.send([json.dumps(make_plain(record), ensure_ascii=False)])
        if decision.embedding is None:
            return
        vector = np.ascontiguousarray(decision.embedding, dtype=np.float32).ravel()
        if self._vectors is None:  # its length is known with the first prediction
            name = f"{self._name}-embedding"
            stream = self._lsl.StreamInfo(
                name, "Embedding", len(vector), 0.0, "float32", f"braindecode-vis-{name}"
            )
            self._vectors = _Outlet(self._lsl, stream)
        self._vectors.send(vector)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Let go of the streams."""
        self.hear(Chunk(np.empty((0, 0)), np.empty(0)))
        self._markers = self._vectors = None


class _Outlet:
    """An LSL stream whose first samples wait for a client: LSL sends a sample to those alone that are connected."""

    def __init__(self, lsl: Any, stream: Any) -> None:
        self._clock, self._outlet = lsl.local_clock, lsl.StreamOutlet(stream)
        self._until = self._clock() + CLIENTS_S
        self._kept: list[tuple[float, Any]] | None = []

    def send(self, sample: Any) -> None:
        """Send a sample, or keep it for the first client."""
        if self._kept is None:
            self._outlet.push_sample(sample)
            return
        self._kept.append((self._clock(), sample))
        self.send_kept()

    def send_kept(self) -> None:
        """Send what was kept once there is a client, or none came in time."""
        if self._kept is None or not (self._outlet.has_consumers or self._clock() >= self._until):
            return
        for when, sample in self._kept:
            self._outlet.push_sample(sample, when)
        self._kept = None
