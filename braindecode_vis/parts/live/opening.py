"""Opens a session from a run, the name of a stream and options; shared by the command and Python.

Owns `open_source`: a stream of the network, a folder of volumes, a replay, a phantom, or a class from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from braindecode_vis.base.checks import ConfigError, suggest
from braindecode_vis.base.registry import import_reference
from braindecode_vis.parts.live.replay import Playback, ReplaySource, open_phantom, open_playback
from braindecode_vis.parts.live.session import LiveSession
from braindecode_vis.parts.live.sources import FieldTripSource, LslSource
from braindecode_vis.parts.live.stream_roles import Listener, StreamDecoder, StreamSource
from braindecode_vis.parts.live.volumes import FolderSource
from braindecode_vis.pipeline.finished_run import FinishedRun, open_finished
from braindecode_vis.pipeline.new_trials import find_responses

KINDS = ("lsl", "fieldtrip", "folder", "replay", "phantom")
"""Sources that the package has; others are ``package.module:Class``."""


def open_source(kind: str, name: str, **options: Any) -> StreamSource:
    """Return a source, not yet connected.

    Parameters
    ----------
    kind
        One of `KINDS`, or ``package.module:Class`` for a class of one's own with `connect`, `read` and `close`, which
        is called with `name` and the options. Whoever names it here allows its code to be imported, for this call.
    name
        Of the stream; ``host:port`` of a FieldTrip buffer; a folder of volumes; a recording, run or configuration to
        replay; the folder of a phantom or a run on one.
    **options
        `markers` of ``lsl`` and ``fieldtrip``; `speed`, `chunk`, `repeat`, `faults` and those of `open_playback` or
        `open_phantom` of ``replay`` and ``phantom``; for the others see `LslSource`, `FieldTripSource` and `volumes`.

    Raises
    ------
    ConfigError
        If there is no such source, or it has no such option.
    """
    if ":" in kind:
        return _open_outside(kind, name, options)
    if kind not in KINDS:
        raise ConfigError(
            f"--source is {kind!r}, but must be one of {', '.join(KINDS)}, or package.module:Class"
            f"{suggest(kind, KINDS)}."
        )
    makers: Mapping[str, Callable[[], Callable[..., Any]]] = {
        "lsl": lambda: LslSource,
        "fieldtrip": lambda: FieldTripSource,
        "folder": lambda: FolderSource,
        "replay": lambda: _open_replay,
        "phantom": lambda: _open_replay_of_phantom,
    }
    source: StreamSource = _call(makers[kind](), f"--source {kind}", name, options)
    return source


def _call(make: Callable[..., Any], what: str, name: str | Path, options: Mapping[str, Any]) -> Any:
    """Call with the name and the options; one that it does not take is refused, where it would have no effect."""
    parameters = inspect.signature(make).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        known = [each.name for each in parameters][1:]
        unknown = [option for option in options if option not in known]
        if unknown:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{what} has no option {unknown[0]!r}; {has}{suggest(unknown[0], known)}.")
    return make(name, **options)


def _open_replay(name: str, **options: Any) -> StreamSource:
    own = {key: options.pop(key) for key in ("chunk", "speed", "faults", "repeat") if key in options}
    return ReplaySource(_call(open_playback, "--source replay", name, options), **own)


def _open_replay_of_phantom(name: str, **options: Any) -> StreamSource:
    own = {key: options.pop(key) for key in ("chunk", "speed", "faults") if key in options}
    folder = Path(name).expanduser()
    place = "run" if (folder / "config.yaml").is_file() else "root"

    def make(
        name: Path,
        *,
        subject: int = 1,
        split: Literal["test", "train", "all"] = "test",
        soa: float | None = None,
        seed: int = 0,
    ) -> Playback:
        return open_phantom(**{place: name}, subject=subject, split=split, soa=soa, seed=seed)

    return ReplaySource(_call(make, "--source phantom", folder, options), **own)


def _open_outside(kind: str, name: str, options: Mapping[str, Any]) -> StreamSource:
    try:
        _, found = import_reference(kind, f"the source {kind}")
    except ConfigError as error:
        raise ConfigError(f"{error}.") from error
    missing = [
        method for method in ("connect", "read", "close") if not callable(getattr(found, method, None))
    ]
    if missing:
        raise ConfigError(
            f"{kind} is not a source: it is missing the method {missing[0]}; it needs connect, read and close."
        )
    source: StreamSource = _call(found, f"the source {kind}", name, options)
    return source


def open_decoder(run: FinishedRun, **options: Any) -> StreamDecoder:
    """Return the decoder for the trials of a run.

    Parameters
    ----------
    run
        Finished.
    **options
        As for `RunStreamDecoder`, or for `VolumeDecoder` of voxels.

    Raises
    ------
    ConfigError
        If no decoder takes such trials.
    """
    dims = find_responses(run).dims
    if dims[1:2] in (("voxel",), ("parcel",)):
        from braindecode_vis.parts.live.volume_decoder import VolumeDecoder

        # What belongs to channels; at its default it asks for nothing.
        names = ("channels", "interpolate", "unit", "every", "forgetting", "bridge")
        beside = {key: options.pop(key, None) for key in names}
        if unused := [
            key for key, value in beside.items() if value or (key == "bridge" and value is not None)
        ]:
            raise ConfigError(
                f"{unused[0]} applies to streams of channels, but {run.folder.path} uses {dims[1]}s."
            )
        return VolumeDecoder(run, **options)
    if dims != ("trial", "channel", "time"):
        raise ConfigError(
            f"{run.folder.path} learnt from trials of {' x '.join(dims[1:])}, but a stream gives "
            "channels x times, or voxels; choose a run of EEG, MEG or fMRI."
        )
    from braindecode_vis.parts.live.stream_decoder import RunStreamDecoder

    return RunStreamDecoder(run, **options)


def open_session(
    run: FinishedRun | str | Path,
    stream: StreamSource | str,
    *,
    source: str = "lsl",
    source_options: Mapping[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
    duration: float | None = None,
    decisions: int | None = None,
    **options: Any,
) -> LiveSession:
    """Return a session, not yet running.

    Parameters
    ----------
    run
        A finished run, or its folder.
    stream
        A source, or the name of one of kind `source`.
    source, source_options
        See `open_source`.
    listeners
        Listeners, in this order.
    duration, decisions
        As for `LiveSession`.
    **options
        As for `RunStreamDecoder`, or for `VolumeDecoder` of voxels.
    """
    for name, value in (("duration", duration), ("decisions", decisions)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value:g}, but must be above 0; leave it out for no end.")
    decoder: StreamDecoder | None = None
    if isinstance(stream, str) and source == "folder":
        from braindecode_vis.parts.live.volume_decoder import VolumeDecoder

        # Volumes are read through the mask of the run, which is therefore opened first.
        run = run if isinstance(run, FinishedRun) else open_finished(Path(run))
        decoder = open_decoder(run, **options)
        if not isinstance(decoder, VolumeDecoder):
            raise ConfigError(
                f"{run.folder.path} does not use voxels, but a folder of volumes gives only voxels."
            )
        own = {"geometry": decoder.geometry, "t_r": decoder.t_r}
        dataset = run.config.dataset
        if (column := getattr(dataset, "stimulus_column", None)) is not None:
            own |= {"stimulus_column": column, "trial_types": getattr(dataset, "trial_types", None)}
        stream = open_source(source, stream, **{**own, **(source_options or {})})
    elif isinstance(stream, str):
        # Before the run is read, which may take long: a source that there is not is said at once.
        stream = open_source(source, stream, **(source_options or {}))
    elif source_options:
        raise ConfigError(
            "source options apply to a source given by name; set the options of your own source object directly."
        )
    opened = run if isinstance(run, FinishedRun) else open_finished(Path(run))
    decoder = decoder or open_decoder(opened, **options)
    return LiveSession(stream, decoder, listeners, duration=duration, decisions=decisions)
