"""A run, the name of a stream and a few words to a session that is ready: what the command and Python share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.live.session import LiveSession
from braindecode_vis.parts.live.stream_roles import Listener, StreamDecoder, StreamSource
from braindecode_vis.pipeline.finished_run import FinishedRun, open_finished
from braindecode_vis.pipeline.new_trials import find_responses


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
                f"{unused[0]} is for streams of channels, and {run.folder.path} learnt from {dims[1]}s."
            )
        return VolumeDecoder(run, **options)
    if dims != ("trial", "channel", "time"):
        raise ConfigError(
            f"{run.folder.path} learnt from trials of {' x '.join(dims[1:])}, and a stream gives channels x times, or "
            "voxels; choose a run of EEG, MEG or fMRI."
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
        Whom to tell, in this order.
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
        from braindecode_vis.parts.live.sources import open_source
        from braindecode_vis.parts.live.volume_decoder import VolumeDecoder

        # Volumes are read through the mask of the run, which is therefore opened first.
        run = run if isinstance(run, FinishedRun) else open_finished(Path(run))
        decoder = open_decoder(run, **options)
        if not isinstance(decoder, VolumeDecoder):
            raise ConfigError(
                f"{run.folder.path} learnt from no voxels, and a folder of volumes gives nothing else."
            )
        own = {"geometry": decoder.geometry, "t_r": decoder.t_r}
        dataset = run.config.dataset
        if (column := getattr(dataset, "stimulus_column", None)) is not None:
            own |= {"stimulus_column": column, "trial_types": getattr(dataset, "trial_types", None)}
        stream = open_source(source, stream, **{**own, **(source_options or {})})
    elif isinstance(stream, str):
        from braindecode_vis.parts.live.sources import open_source

        # Before the run is read, which may take long: a source that there is not is said at once.
        stream = open_source(source, stream, **(source_options or {}))
    elif source_options:
        raise ConfigError(
            "the options of a source are for one that is named; a source of one's own has them already."
        )
    opened = run if isinstance(run, FinishedRun) else open_finished(Path(run))
    decoder = decoder or open_decoder(opened, **options)
    return LiveSession(stream, decoder, listeners, duration=duration, decisions=decisions)
