"""The verb ``stream``: sends a recording or a simulated subject as a live stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import Json, Root, Set, Subject, make_console, print_json, takes

if TYPE_CHECKING:
    from braindecode_vis.parts.live.replay import Faults, Playback


@dataclass(frozen=True)
class PlayedOptions:
    """Which recording or simulated subject is played."""

    root: Root = None
    run: Annotated[
        Path | None,
        typer.Option("--run", help="With phantom: a run on a phantom, whose subject is simulated."),
    ] = None
    subject: Subject = None
    overrides: Set = None
    split: Annotated[
        str, typer.Option("--split", help="Use recordings or pictures of this split: test, train or all.")
    ] = "test"
    recording: Annotated[
        int | None,
        typer.Option(
            "--recording", min=1, help="Number of the recording of a data set, from 1; by default all."
        ),
    ] = None
    column: Annotated[
        str | None, typer.Option("--column", help="Column of the events table for the markers.")
    ] = None
    soa: Annotated[
        float | None, typer.Option("--soa", help="With phantom: time from one picture to the next, in s.")
    ] = None

    def open(self, source: str, seed: int) -> Playback:
        """Return what is played."""
        from braindecode_vis.base.checks import ConfigError
        from braindecode_vis.parts.live import replay

        split: Any = self.split  # which is checked there
        if source != "phantom":
            if unused := [
                option for option, value in {"--run": self.run, "--soa": self.soa}.items() if value
            ]:
                raise ConfigError(f"{unused[0]} applies only to stream phantom; leave it out.")
            return replay.open_playback(
                source, root=self.root, subjects=self.subject, overrides=self.overrides, split=split,
                recording=self.recording, column=self.column,
            )  # fmt: skip
        beside = {"--set": self.overrides, "--recording": self.recording, "--column": self.column}
        if unused := [option for option, value in beside.items() if value]:
            raise ConfigError(f"{unused[0]} has no effect on a phantom; leave it out.")
        if self.subject and (len(self.subject) > 1 or not self.subject[0].isdigit()):
            raise ConfigError(f"--subject of a phantom is one number from 1, not {', '.join(self.subject)}.")
        number = int(self.subject[0]) if self.subject else 1
        return replay.open_phantom(
            self.root, run=self.run, subject=number, split=split, soa=self.soa, seed=seed
        )


@dataclass(frozen=True)
class FaultOptions:
    """What goes wrong on the way, and the seed of it."""

    drop: Annotated[float, typer.Option("--drop", help="Share of the chunks that are lost.")] = 0.0
    jitter: Annotated[float, typer.Option("--jitter", help="Random delay of chunks, in ms.")] = 0.0
    drift: Annotated[
        float, typer.Option("--drift", help="How many ppm faster samples come than the stream states.")
    ] = 0.0
    lose: Annotated[
        list[str] | None,
        typer.Option("--lose", help="CHANNEL@S: this electrode is lost after S seconds. Repeatable."),
    ] = None
    pause: Annotated[
        list[str] | None,
        typer.Option(
            "--pause", help="SECONDS@S: the stream is interrupted for SECONDS after S seconds. Repeatable."
        ),
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the faults and of the phantom.")] = 0

    def read(self) -> Faults:
        """Return the faults."""
        from braindecode_vis.parts.live import replay

        return replay.read_faults(
            drop=self.drop, jitter=self.jitter, drift=self.drift, lose=self.lose or [], pause=self.pause or [],
            seed=self.seed,
        )  # fmt: skip


@takes("trust_code", "debug")
def stream(
    source: Annotated[
        str,
        typer.Argument(
            help="phantom, a recording (FIF, EDF, BDF, BrainVision, EEGLAB, CSV of a Muse), a run "
            "folder, or a configuration whose data set is sent."
        ),
    ],
    played: PlayedOptions,
    wrong: FaultOptions,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the stream; by default the name of SOURCE.")
    ] = None,
    speed: Annotated[float, typer.Option("--speed", help="Speed; 1 is real time.")] = 1.0,
    chunk: Annotated[
        int, typer.Option("--chunk", min=1, help="Number of samples that are sent together.")
    ] = 20,
    repeat: Annotated[bool, typer.Option("--repeat", help="Start again at the end.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Begin when a client listens.")] = False,
    duration: Annotated[
        float | None, typer.Option("--duration", help="End after this many seconds of the recording.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Write a scan of --run volume by volume into this folder, like a scanner."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a recording or a phantom as a live stream.

    The stream is one of the Lab Streaming Layer. A phantom is a simulated subject who looks at pictures.
    """
    from braindecode_vis.base.checks import ConfigError, require

    if to is not None:
        place = played.run if played.run is not None else None if source == "phantom" else Path(source)
        if place is None:
            raise ConfigError("--to writes the volumes of a run of fMRI; give the run with --run.")
        beside = {
            "--name": name, "--chunk": chunk != 20, "--repeat": repeat, "--wait": wait, "--root": played.root,
            "--soa": played.soa, "--subject": played.subject, "--set": played.overrides,
            "--split": played.split != "test", "--column": played.column,
            **{f"--{option}": value for option, value in vars(wrong).items()},
        }  # fmt: skip
        if unused := [option for option, value in beside.items() if value]:
            raise ConfigError(f"{unused[0]} has no effect on volumes; leave it out.")
        _write_scan(place, to, speed, played.recording, duration, as_json)
        return
    from braindecode_vis.parts.live import replay

    require("mne_lsl", "stream")
    faults = wrong.read()
    if source == "phantom" and repeat:
        raise ConfigError("--repeat has no effect on a phantom; leave it out.")
    playback = played.open(source, wrong.seed)
    if duration is not None:
        playback = replay.shorten(playback, duration)
    title = name or ("phantom" if source == "phantom" else Path(source).name.split(".")[0])
    console = make_console(stderr=True)
    console.print(
        f"stream {title}: {playback.describe()}, in chunks of {chunk}; markers in {title}{replay.MARKERS_SUFFIX}: "
        f"{playback.info.markers or 'none'}; Ctrl-C ends it",
        markup=False,
    )
    playback = replace(playback, info=replace(playback.info, name=title))
    summary = replay.play(
        playback, title, chunk=chunk, speed=speed, faults=faults, repeat=repeat, wait=wait,
        tell=lambda sentence: console.print(sentence, markup=False),
    )  # fmt: skip
    if as_json:
        print_json(summary)
        return
    console.print(
        f"{summary['n_samples']} samples and {summary['n_markers']} markers sent, {summary['n_lost']} chunks lost; at "
        f"most {summary['late_ms']:.1f} ms behind the clock",
        markup=False,
    )


def _write_scan(
    run: Path, to: Path, speed: float, recording: int | None, duration: float | None, as_json: bool
) -> None:
    """Write a scan of a run's data set into a folder, volume by volume."""
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.live.volumes import find_scan, write_volumes
    from braindecode_vis.pipeline.finished_run import open_finished

    if speed <= 0:
        raise ConfigError(f"--speed is {speed:g}, but must be above 0.")
    image, events = find_scan(open_finished(run), recording)
    console = make_console(stderr=True)
    console.print(
        f"volumes of {image.name} appear in {to}, events in {to / 'events.tsv'}; Ctrl-C ends it", markup=False
    )
    n = 0
    for _ in write_volumes(image, to, events=events, speed=speed, duration=duration):
        n += 1
    if as_json:
        print_json({"folder": str(to), "n_volumes": n})
        return
    console.print(f"{n} volumes written", markup=False)
