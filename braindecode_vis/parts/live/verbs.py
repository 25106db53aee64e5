"""The verb that decodes a stream while it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from braindecode_vis.cli.show import (
    AllowDownload,
    ConsoleListener,
    Debug,
    Json,
    TrustCode,
    make_console,
    print_json,
)


def live(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    stream: Annotated[
        str,
        typer.Option(
            "--stream",
            help="Name of the stream; HOST:PORT of a buffer, a recording to replay, or a folder of volumes.",
        ),
    ],
    source: Annotated[
        str,
        typer.Option(
            "--source",
            help="lsl, fieldtrip, folder, replay, phantom, or a class of your own as package.module:Class.",
        ),
    ] = "lsl",
    markers: Annotated[
        str | None,
        typer.Option(
            "--markers", help="Stream of markers, trigger channel, or table of events; found by default."
        ),
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option("--events", help="Table of two columns: marker, and the id of the picture it shows."),
    ] = None,
    channels: Annotated[
        Path | None,
        typer.Option("--channels", help="Table of two columns: channel in the stream, and in the run."),
    ] = None,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Interpolate electrodes that the stream lacks.")
    ] = False,
    unit: Annotated[
        str, typer.Option("--unit", help="Of the samples, if the stream does not say it: V, mV, uV.")
    ] = "",
    t_r: Annotated[
        float | None,
        typer.Option("--tr", help="With --source folder: repetition time in s, if nothing says it."),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option("--reader", help="With --source folder: dcm2niix converts DICOM of any kind."),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option("--every", help="Decide on a window every so many seconds, without markers."),
    ] = None,
    gallery: Annotated[
        str | None,
        typer.Option(
            "--gallery",
            help="Pictures to rank: a folder or a .npy of them, a folder of embeddings, or a bank.",
        ),
    ] = None,
    fold: Annotated[
        int | None, typer.Option("--fold", help="Fold that predicts; the mean of all by default.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="Subject of the run whose statistics are applied.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Pictures to list.")] = 5,
    repetitions: Annotated[
        bool, typer.Option("--repetitions", help="Add up the evidence of markers of the same value.")
    ] = False,
    bridge: Annotated[
        float | None,
        typer.Option(
            "--bridge",
            metavar="MS",
            min=0,
            help="Longest gap that is drawn straight between its neighbours, and said; 40 by default, 0 for none.",
        ),
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Make an image of each prediction, as time allows.")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            help="Show a block of pictures in the page and adapt to it: run, or a folder of pictures.",
        ),
    ] = None,
    calibrated: Annotated[
        Path | None,
        typer.Option(
            "--calibrated", help="Folder that keeps what --calibrate learns; used as it is without."
        ),
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=5, help="Pictures of the block.")] = 20,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each of them is shown.")] = 3,
    soa: Annotated[
        float, typer.Option("--soa", help="From one picture of the block to the next, in s.")
    ] = 1.0,
    photodiode: Annotated[
        str | None,
        typer.Option("--photodiode", help="Channel of a photodiode on the square of the page."),
    ] = None,
    adapt: Annotated[
        str | None,
        typer.Option("--adapt", help="running: whitening and z-score of the trials so far."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="BIDS folder that the session is recorded in.")
    ] = None,
    jsonl: Annotated[
        str | None, typer.Option("--jsonl", help="New file of JSON lines; - for standard output.")
    ] = None,
    outlet: Annotated[
        str | None,
        typer.Option("--outlet", help="Send decisions on as the LSL streams NAME and NAME-embedding."),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Show the session in the browser.")] = True,
    host: Annotated[
        str, typer.Option("--host", help="Address of the page; others than this machine need it.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port of the page; 0 takes a free one.")
    ] = 0,
    token: Annotated[str | None, typer.Option("--token", help="Token of the page; drawn by default.")] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser of this machine.")
    ] = False,
    speed: Annotated[
        float | None,
        typer.Option(
            "--speed",
            min=0,
            help="With --source replay or phantom: times the real speed, 1 by default; 0 for no wait.",
        ),
    ] = None,
    duration: Annotated[float | None, typer.Option("--duration", help="End after so many seconds.")] = None,
    decisions: Annotated[int | None, typer.Option("--decisions", help="End after so many decisions.")] = None,
    trust_code: TrustCode = None,
    allow_download: AllowDownload = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Decode a stream while it runs.

    Shows ranked pictures for every marker or window, in the terminal and on a page.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.live.listeners import JsonLinesListener, OutletListener, TerminalListener
    from braindecode_vis.parts.live.opening import open_session
    from braindecode_vis.parts.live.stream_roles import Listener
    from braindecode_vis.pipeline.finished_run import open_finished

    if as_json and jsonl == "-":
        raise ConfigError("--json and --jsonl - both take the standard output; leave one out.")
    if not page and (token or port or host != "127.0.0.1" or open_page):
        raise ConfigError("--host, --port, --token and --open are of the page, which --no-page leaves out.")
    if calibrate is not None and (not page or every is not None):
        raise ConfigError(
            "--calibrate shows pictures in the page, by markers: leave out --no-page and --every."
        )
    if calibrate is None and photodiode is not None:
        raise ConfigError("--photodiode corrects the onsets of --calibrate; add that, or leave it out.")
    if calibrate is None and (pictures, rounds, soa) != (20, 3, 1.0):
        raise ConfigError("--pictures, --rounds and --soa are of the block that --calibrate shows; add that.")
    if source != "folder" and ":" not in source and (t_r is not None or reader is not None):
        raise ConfigError("--tr and --reader are for --source folder; leave them out.")
    if adapt not in (None, "running"):
        raise ConfigError(f"--adapt is {adapt!r}, but must be running.")
    shown: dict[str, Any] = {}
    if page:
        from braindecode_vis.parts.live.page.server import PageListener

        # Before anything is read: a port that is taken should not cost a minute.
        shown["page"] = PageListener(
            find_images=lambda ids: shown["session"].decoder.find_images(ids),
            host=host,
            port=port,
            token=token,
        )
        make_console().print(f"page: {shown['page'].start()}", markup=False, soft_wrap=True)
        if host not in ("127.0.0.1", "::1", "localhost"):
            make_console().print(
                "warning: the page is open to the network without encryption: whoever listens on the wire reads the "
                "token and the signal; a tunnel keeps both (ssh -L).",
                markup=False,
            )
        if open_page:
            shown["page"].open_browser()
    finished = open_finished(run, ConsoleListener())
    listeners: list[Listener] = []
    if record is not None:
        from braindecode_vis.parts.live.recording import BidsRecorder
        from braindecode_vis.parts.live.stream_channels import read_pairs

        # Codes become ids in the recording, where other markers show no picture but those of a block.
        codes = None if events is None else read_pairs(events, "events")
        find_stimulus = (
            None if codes is None else lambda value: codes.get(value, value if calibrate else None)
        )
        # First, so that what arrives is kept before anything else can fail.
        listeners.append(
            BidsRecorder.for_run(
                finished, record, subject=subject, unit=unit or None, find_stimulus=find_stimulus,
                notify=lambda sentence, level: shown["session"].tell(sentence, level),
            )
        )  # fmt: skip
    listeners.append(TerminalListener())
    if jsonl is not None:
        listeners.append(JsonLinesListener(jsonl))
    if outlet is not None:
        listeners.append(OutletListener(outlet))
    asked: dict[str, Any] = {"markers": markers, "t_r": t_r, "reader": reader, "speed": speed}
    source_options = {key: value for key, value in asked.items() if value is not None}
    if source in ("replay", "phantom"):
        source_options.setdefault("speed", 1.0)  # somebody looks at it
    if source == "phantom" and calibrate is not None:
        source_options["soa"] = math.inf  # the simulated subject looks at the block alone
    session = shown["session"] = open_session(
        finished, stream, source=source, source_options=source_options,
        listeners=listeners, duration=duration, decisions=decisions, gallery=gallery, fold=fold, subject=subject,
        channels=channels, interpolate=interpolate, unit=unit, every=every, events=events, n_top=top,
        repetitions=repetitions, reconstruct=reconstruct, **({} if bridge is None else {"bridge": bridge}),
    )  # fmt: skip
    if calibrate is not None or calibrated is not None or adapt is not None:
        from braindecode_vis.parts.live.calibration import prepare_calibration

        block = prepare_calibration(
            session, calibrate, calibrated=calibrated, n_pictures=pictures, repetitions=rounds, soa=soa,
            photodiode=photodiode, running=adapt is not None,
        )  # fmt: skip
        if block is not None:
            shown["page"].calibration = block
            make_console().print(
                f"calibration: {shown['page'].address.replace('/?', '/calibrate?')}",
                markup=False,
                soft_wrap=True,
            )
    if page:
        session.add(shown["page"])
    try:
        summary = session.run()
    finally:
        if page:
            shown["page"].close()
    if as_json:
        print_json(summary)
