"""The verb ``live``: decodes a stream while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import ConsoleListener, Json, make_console, print_json, takes

if TYPE_CHECKING:
    from braindecode_vis.parts.live.page.server import PageListener
    from braindecode_vis.parts.live.recording import BidsRecorder
    from braindecode_vis.parts.live.session import LiveSession
    from braindecode_vis.parts.live.stream_roles import Listener
    from braindecode_vis.pipeline.runs import ProgressListener


@dataclass(frozen=True)
class StreamOptions:
    """The stream that is decoded, and how it is read."""

    stream: Annotated[
        str,
        typer.Option(
            "--stream",
            help="Name of the stream; HOST:PORT of a buffer, a recording to replay, or a folder of volumes.",
        ),
    ]
    source: Annotated[
        str,
        typer.Option(
            "--source",
            help="lsl, fieldtrip, folder, replay, phantom, or a class of your own as package.module:Class.",
        ),
    ] = "lsl"
    markers: Annotated[
        str | None,
        typer.Option(
            "--markers",
            help="Stream of markers, trigger channel, or table of events; by default it is searched for.",
        ),
    ] = None
    events: Annotated[
        Path | None,
        typer.Option("--events", help="Table of two columns: marker, and the id of its picture."),
    ] = None
    channels: Annotated[
        Path | None,
        typer.Option("--channels", help="Table of two columns: channel in the stream, and in the run."),
    ] = None
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Interpolate electrodes that are missing in the stream.")
    ] = False
    unit: Annotated[
        str, typer.Option("--unit", help="Unit of the samples, if the stream does not give it: V, mV, uV.")
    ] = ""
    t_r: Annotated[
        float | None,
        typer.Option("--tr", help="With --source folder: repetition time in s, if the files do not give it."),
    ] = None
    reader: Annotated[
        str | None,
        typer.Option("--reader", help="With --source folder: dcm2niix converts DICOM of any kind."),
    ] = None
    speed: Annotated[
        float | None,
        typer.Option(
            "--speed",
            min=0,
            help="With --source replay or phantom: speed; 1 (default) is real time, 0 sends without waiting.",
        ),
    ] = None

    def check(self) -> None:
        """Raise `ConfigError` where options do not belong together."""
        from braindecode_vis.base.checks import ConfigError

        if (
            self.source != "folder"
            and ":" not in self.source
            and (self.t_r is not None or self.reader is not None)
        ):
            raise ConfigError("--tr and --reader are for --source folder; leave them out.")

    def list_source_options(self, *, calibrates: bool) -> dict[str, Any]:
        """Return what the source of the stream is given."""
        asked = {"markers": self.markers, "t_r": self.t_r, "reader": self.reader, "speed": self.speed}
        found: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if self.source in ("replay", "phantom"):
            found.setdefault("speed", 1.0)  # somebody looks at it
        if self.source == "phantom" and calibrates:
            found["soa"] = math.inf  # the simulated subject looks at the block alone
        return found


@dataclass(frozen=True)
class DecisionOptions:
    """What is decided, from which pictures, and until when."""

    every: Annotated[
        float | None,
        typer.Option("--every", help="Decode a window every so many seconds, without markers."),
    ] = None
    gallery: Annotated[
        str | None,
        typer.Option(
            "--gallery",
            help="Pictures to rank: a folder or a .npy of them, a folder of embeddings, or a bank.",
        ),
    ] = None
    fold: Annotated[
        int | None,
        typer.Option("--fold", help="Fold whose encoder predicts; by default the mean of all folds."),
    ] = None
    subject: Annotated[
        str | None, typer.Option("--subject", help="Subject of the run whose statistics are applied.")
    ] = None
    top: Annotated[int, typer.Option("--top", min=1, help="Number of pictures to list.")] = 5
    repetitions: Annotated[
        bool, typer.Option("--repetitions", help="Add up the evidence of markers of the same value.")
    ] = False
    bridge: Annotated[
        float | None,
        typer.Option(
            "--bridge",
            metavar="MS",
            min=0,
            help="Longest gap in ms that is interpolated and reported; 40 by default, 0 for none.",
        ),
    ] = None
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Make an image of each prediction, as time allows.")
    ] = False
    duration: Annotated[float | None, typer.Option("--duration", help="End after this many seconds.")] = None
    decisions: Annotated[
        int | None,
        typer.Option(
            "--decisions",
            help="End after this many decisions; those of a calibration block do not count.",
        ),
    ] = None

    def as_arguments(self) -> dict[str, Any]:
        """Return arguments of `braindecode_vis.parts.live.opening.open_session`."""
        named = {name: value for name, value in vars(self).items() if name not in ("top", "bridge")}
        return {**named, "n_top": self.top, **({} if self.bridge is None else {"bridge": self.bridge})}


@dataclass(frozen=True)
class BlockOptions:
    """The block of pictures that the run is adapted by."""

    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            help="Show a block of pictures in the page and adapt to the responses: run (the pictures of "
            "the run), or a folder of pictures.",
        ),
    ] = None
    calibrated: Annotated[
        Path | None,
        typer.Option(
            "--calibrated",
            help="Folder for the result of --calibrate; without --calibrate, an earlier "
            "result in it is used.",
        ),
    ] = None
    pictures: Annotated[int, typer.Option("--pictures", min=5, help="Number of pictures in the block.")] = 20
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each picture is shown.")] = 3
    soa: Annotated[
        float, typer.Option("--soa", help="Time from one picture of the block to the next, in s.")
    ] = 1.0
    photodiode: Annotated[
        str | None,
        typer.Option("--photodiode", help="Channel of a photodiode on the square of the page."),
    ] = None
    adapt: Annotated[
        str | None,
        typer.Option("--adapt", help="running: update whitening and z-score with the trials so far."),
    ] = None

    def check(self) -> None:
        """Raise `ConfigError` where options do not belong together."""
        from braindecode_vis.base.checks import ConfigError

        if self.calibrate is None and self.photodiode is not None:
            raise ConfigError(
                "--photodiode corrects the onsets of --calibrate; add --calibrate, or leave --photodiode out."
            )
        if self.calibrate is None and (self.pictures, self.rounds, self.soa) != (20, 3, 1.0):
            raise ConfigError(
                "--pictures, --rounds and --soa are for the block of --calibrate; add --calibrate."
            )
        if self.adapt not in (None, "running"):
            raise ConfigError(f"--adapt is {self.adapt!r}, but must be running.")

    def prepare(self, session: LiveSession) -> Any:
        """Return the block of pictures that the page shows, if there is one; let the session use what was learnt."""
        if self.calibrate is None and self.calibrated is None and self.adapt is None:
            return None
        from braindecode_vis.parts.live.calibration import prepare_calibration

        return prepare_calibration(
            session, self.calibrate, calibrated=self.calibrated, n_pictures=self.pictures, repetitions=self.rounds,
            soa=self.soa, photodiode=self.photodiode, running=self.adapt is not None,
        )  # fmt: skip


@dataclass(frozen=True)
class PageOptions:
    """The page in the browser."""

    page: Annotated[bool, typer.Option("--page/--no-page", help="Show the session in the browser.")] = True
    host: Annotated[
        str, typer.Option("--host", help="Address of the page; set it to open the page to other machines.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0 takes a free port.")
    ] = 0
    token: Annotated[str | None, typer.Option("--token", help="Token of the page; random by default.")] = None
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser of this machine.")
    ] = False

    def check(self) -> None:
        """Raise `ConfigError` where options do not belong together."""
        from braindecode_vis.base.checks import ConfigError

        if not self.page and (self.token or self.port or self.host != "127.0.0.1" or self.open_page):
            raise ConfigError(
                "--host, --port, --token and --open are for the page, but --no-page leaves it out."
            )

    def start(self, find_images: Callable[..., Any]) -> PageListener:
        """Start the page and say where it is."""
        from braindecode_vis.parts.live.page.server import PageListener

        page = PageListener(find_images=find_images, host=self.host, port=self.port, token=self.token)
        make_console().print(f"page: {page.start()}", markup=False, soft_wrap=True)
        if self.host not in ("127.0.0.1", "::1", "localhost"):
            make_console().print(
                "warning: the page is open to the network without encryption: others on the network can "
                "read the token and the signal; use a tunnel to protect both (ssh -L).",
                markup=False,
            )
        if self.open_page:
            page.open_browser()
        return page


@dataclass(frozen=True)
class RecordOptions:
    """The recording of the session."""

    record: Annotated[
        Path | None, typer.Option("--record", help="BIDS folder for a recording of the session.")
    ] = None
    record_later: Annotated[
        bool, typer.Option("--record-later", help="Wait with --record for the button of the page.")
    ] = False


@takes("trust_code", "allow_download", "debug")
def live(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    reads: StreamOptions,
    decides: DecisionOptions,
    block: BlockOptions,
    shows: PageOptions,
    keeps: RecordOptions,
    jsonl: Annotated[
        str | None, typer.Option("--jsonl", help="New file of JSON lines; - for standard output.")
    ] = None,
    outlet: Annotated[
        str | None,
        typer.Option(
            "--outlet",
            help="Send decisions as the LSL streams NAME and NAME-embedding; the first ones wait up to 5 s for "
            "a client.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode a stream while it runs.

    Shows ranked pictures for every marker or window, in the terminal and on a page.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.live.listeners import JsonLinesListener, OutletListener, TerminalListener
    from braindecode_vis.parts.live.opening import open_session
    from braindecode_vis.parts.live.page.server import PageProgress
    from braindecode_vis.pipeline.finished_run import open_finished

    if as_json and jsonl == "-":
        raise ConfigError("--json and --jsonl - both write to standard output; leave one out.")
    for group in (shows, block, reads):
        group.check()
    if block.calibrate is not None and (not shows.page or decides.every is not None):
        raise ConfigError(
            "--calibrate shows pictures in the page, by markers: leave out --no-page and --every."
        )
    if keeps.record_later and (keeps.record is None or not shows.page):
        raise ConfigError(
            "--record-later waits for the page's button: add --record DIR, and leave out --no-page."
        )
    opened: list[LiveSession] = []
    # Before anything is read: a port that is taken should not cost a minute.
    page = shows.start(lambda ids: opened[0].decoder.find_images(ids)) if shows.page else None
    show_work: Callable[[str], AbstractContextManager[Any]] = (
        (lambda what: nullcontext()) if page is None else page.show_work
    )
    progress: ProgressListener = ConsoleListener()
    if page is not None:
        progress = PageProgress(page, progress)
    with show_work("reading the run"):
        finished = open_finished(run, progress)
    listeners: list[Listener] = []
    recorder: BidsRecorder | None = None
    if keeps.record is not None:
        from braindecode_vis.parts.live.recording import BidsRecorder
        from braindecode_vis.parts.live.stream_channels import read_pairs

        # Codes become ids in the recording, where other markers show no picture but those of a block.
        codes = None if reads.events is None else read_pairs(reads.events, "events")
        find_stimulus = (
            None if codes is None else lambda value: codes.get(value, value if block.calibrate else None)
        )
        # First, so that what arrives is kept before anything else can fail.
        recorder = BidsRecorder.for_run(
            finished, keeps.record, subject=decides.subject, unit=reads.unit or None, find_stimulus=find_stimulus,
            notify=lambda sentence, level: opened[0].tell(sentence, level), waits=keeps.record_later,
        )  # fmt: skip
        listeners.append(recorder)
    listeners.append(TerminalListener())
    if jsonl is not None:
        listeners.append(JsonLinesListener(jsonl))
    if outlet is not None:
        listeners.append(OutletListener(outlet))
    with show_work("preparing the decoder"):
        session = open_session(
            finished, reads.stream, source=reads.source,
            source_options=reads.list_source_options(calibrates=block.calibrate is not None), listeners=listeners,
            channels=reads.channels, interpolate=reads.interpolate, unit=reads.unit, events=reads.events,
            **decides.as_arguments(),
        )  # fmt: skip
        opened.append(session)
        pictures = block.prepare(session)
    if pictures is not None and page is not None:
        page.calibration = pictures
        where = f"calibration: {page.address.replace('/?', '/calibrate?')}"
        if decides.decisions is not None:
            where += f" (its pictures do not count towards --decisions {decides.decisions})"
        make_console().print(where, markup=False, soft_wrap=True)
    if page is not None:
        session.add(page)
        if recorder is not None:
            page.control(recorder, session.ask)
    try:
        with show_work("connecting to the stream"):
            summary = session.run()
    finally:
        if page is not None:
            page.close()
    if as_json:
        print_json(summary)
