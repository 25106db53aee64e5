"""One run in its folder: configuration, progress, the context of components, and artifacts that are made once.

Owns what every stage shares: the versions of the stages, the listener that shows progress, and the files that
stand at the top of a run folder. Knows nothing of what a stage computes.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from braindecode_vis.base import digests, roles, store
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError, Notice
from braindecode_vis.base.consent import ConsentError
from braindecode_vis.base.contracts import (
    Context,
    EncoderSettings,
    GeneratorSettings,
    ImageEncoderSettings,
    PriorSettings,
)
from braindecode_vis.base.locks import hold_folder
from braindecode_vis.base.remote import refuse_address_to_write
from braindecode_vis.config import RunConfig, dump_config, read_config

#: Raise a number when the code of that stage changes its result.
STAGE_VERSIONS = {
    "preprocess": 2, "pretrain": 1, "embed": 1, "synthesise": 2, "train": 4, "out_of_fold": 1, "retrieve": 2,
    "reconstruct": 7, "evaluate": 11, "analyze": 7,
}  # fmt: skip
#: In the environment of a job: `digest_config` of what it was sent with, which the first configuration read must have.
SENT_WITH = "BRAINDECODE_VIS_SENT_WITH"
#: From this version of `evaluate` on, intervals of several subjects and of groups are those of `scoring.crossed`.
CROSSED_SINCE = 7


Result = TypeVar("Result")
#: Computes an artifact into a folder, and returns what its provenance should say beside the settings.
Compute = Callable[[Path], Mapping[str, Any] | None]


class ProgressListener(Protocol):
    """Whoever shows the progress of a run."""

    def finished(self, stage: str, artifact: store.Artifact, seconds: float) -> None:
        """A stage, or one fold of it, is there."""
        ...

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Return a context whose value is called with the number of steps done; `total` may be unknown."""
        ...

    def watch(self, description: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Return a context whose value is called with steps done, steps in all, and words on how it goes.

        A total of 0 means that the words are a message to keep.
        """
        ...


class SilentListener:
    """Shows nothing."""

    def finished(self, stage: str, artifact: store.Artifact, seconds: float) -> None:
        """Ignore."""

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Ignore."""
        return nullcontext(lambda n: None)

    def watch(self, description: str) -> AbstractContextManager[Callable[[int, int, str], None]]:
        """Ignore."""
        return nullcontext(lambda done, total, text: None)


@dataclass
class Run:
    """One run folder, its configuration, and the stages that this process has already looked at.

    `follows` is true in a process that trains together with others of which another one writes. `passes_by` are stages
    of which a process makes some artifacts while others make the rest: it does not hold the folder, and leaves an
    artifact to whoever makes it (`locks.BeingMade`). `produced` are the artifacts that were reused or computed, by
    what the listener got of them.
    """

    config: RunConfig
    folder: store.RunFolder
    listener: ProgressListener = field(default_factory=SilentListener)
    seen: dict[str, Any] = field(default_factory=dict)
    follows: bool = False
    passes_by: frozenset[str] = frozenset()
    produced: list[tuple[str, store.Artifact]] = field(default_factory=list)

    @property
    def target(self) -> ImageEncoderSettings:
        """Settings of the image encoder, with the defaults of their role."""
        return roles.complete(ImageEncoderSettings, self.config.target)

    @property
    def encoder(self) -> EncoderSettings:
        """Settings of the brain encoder or category decoder, with the defaults of their role."""
        return roles.complete(EncoderSettings, self.config.encoder)

    @property
    def prior(self) -> PriorSettings:
        """Settings of the prior, with the defaults of their role."""
        return roles.complete(PriorSettings, self.config.prior)

    @property
    def generator(self) -> GeneratorSettings:
        """Settings of the image generator, with the defaults of their role."""
        return roles.complete(GeneratorSettings, self.config.generator)

    @property
    def records(self) -> Path:
        """The run folder whose records say what was made before."""
        return self.folder.path

    @property
    def earlier(self) -> Path | None:
        """Folder of the artifact that is made a second time; None where a run makes its own."""
        return None

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what `make` gave the first time it was asked for `key`."""
        if key not in self.seen:
            self.seen[key] = make()
        return self.seen[key]

    @property
    def shares(self) -> bool:
        """Whether other processes make artifacts of this run at the same time, each without holding the folder."""
        return bool(self.passes_by)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep the run folder from other processes while the context lasts; see `locks`."""
        if self.follows or self.shares or not self.folder.writable:
            yield
            return
        # Once for all stages: it looks at the weights of every component.
        settings = self.once("settings", lambda: _digest_settings(self.config))
        with hold_folder(self.folder.path, settings, self.tell):
            yield

    def tell(self, sentence: str, about: str = "run folder:") -> None:
        """Say something that the user should know, as a `Notice` where nobody shows progress."""
        if isinstance(self.listener, SilentListener):
            warnings.warn(sentence, Notice, stacklevel=2)
            return
        with self.listener.watch(about) as show:
            show(0, 0, sentence)

    def produce(
        self,
        stage: str,
        fields: Mapping[str, Any],
        upstream: Mapping[str, str],
        compute: Compute,
        unit: str = "",
    ) -> store.Artifact:
        """Reuse or compute one artifact and report to the listener."""
        started, name = time.perf_counter(), f"{stage} {unit}".strip()
        is_there = partial(self.has, stage, fields, upstream, unit)
        with self.share(stage, compute, is_there) as shared:
            artifact = self.folder.produce(
                stage, version=STAGE_VERSIONS[stage], fields=store.json_plain(fields), upstream=dict(upstream),
                compute=shared, unit=unit, alone=self.hold, tell=partial(self.tell, about=f"{name}:"),
                waits=stage not in self.passes_by,
            )  # fmt: skip
        self.produced.append((name, artifact))
        self.listener.finished(name, artifact, time.perf_counter() - started)
        return artifact

    def has(self, stage: str, fields: Mapping[str, Any], upstream: Mapping[str, str], unit: str = "") -> bool:
        """Say whether `produce`, asked for the same, would reuse what is there."""
        plain = store.json_plain(fields)
        return self.folder.has(
            stage, version=STAGE_VERSIONS[stage], fields=plain, upstream=dict(upstream), unit=unit
        )

    @contextmanager
    def share(self, stage: str, compute: Compute, is_there: Callable[[], bool]) -> Iterator[Compute]:
        """Yield what computes an artifact, while this process may be the one that does; see `together`."""
        yield compute


def digest_config(config: RunConfig) -> str:
    """Return a digest of all that a run folder keeps of a configuration."""
    return store.hash_json(config.model_dump(mode="json"))


def refuse_other_settings(config: RunConfig, source: str) -> None:
    """Raise `ConfigError` if this process is a job that was sent with other settings than it has read from `source`."""
    sent_with = os.environ.pop(SENT_WITH, None)  # what it starts itself may have settings of its own
    if sent_with not in (None, digest_config(config)):
        raise ConfigError(
            f"{source} has other settings than when this job was submitted: it was changed while the job "
            "waited, and nothing was computed; submit the job again, with a separate folder (--out) if "
            "you need both settings."
        )


def _digest_settings(config: RunConfig) -> str:
    """Return a digest of what decides the results of a run."""
    try:
        fields = config.hashed_fields()
    except BraindecodeVisError:  # weights of a later stage are not there
        fields = config.model_dump(mode="json")
    beside = _list_beside(config)
    return store.hash_json(store.json_plain({k: v for k, v in fields.items() if k not in beside}))


def open_run(
    config: RunConfig,
    out: Path | None = None,
    listener: ProgressListener | None = None,
    *,
    reading: bool = False,
) -> Run:
    """Make or open the run folder.

    Parameters
    ----------
    config
        Validated configuration.
    out
        The run folder; ``runs/<name>`` by default.
    listener
        Shows progress.
    reading
        Whether a folder that cannot be written is opened too; what it lacks is then an error.
    """
    config.choose_cache()
    path = out if out is not None else Path("runs") / config.name
    folder = store.RunFolder(path, writable=not (reading and path.is_dir() and not os.access(path, os.W_OK)))
    return Run(config, folder, listener or SilentListener())


def remember(stage: Callable[[Run], Result]) -> Callable[[Run], Result]:
    """Let a stage work once for a run of this process; whoever asks for it again is given what it returned.

    What it returned may be memory maps of files, which must then still be as they were.
    """

    @functools.wraps(stage)
    def ask(run: Run) -> Result:
        if stage.__name__ in run.seen:
            run.folder.verify(read=False)
        with digests.show_hashing(run.listener.watch):
            found: Result = run.once(stage.__name__, lambda: stage(run))
        return found

    return ask


def name_workspace(run: Run, name: str, asked: Any) -> Path:
    """Return the folder of a component's checkpoints; parameters are those of `lend_context`."""
    return run.folder.path / "work" / f"{name}-{store.hash_json(store.json_plain(asked))[:12]}"


@contextmanager
def watch_lazily(listener: ProgressListener, description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield what `ProgressListener.watch` gives; its bar opens at the first call, since most components are silent."""
    show: Callable[[int, int, str], None] | None = None
    with ExitStack() as stack:

        def tell(done: int, total: int, text: str) -> None:
            nonlocal show
            if show is None:
                show = stack.enter_context(listener.watch(description))
            show(done, total, text)

        yield tell


@contextmanager
def lend_context(run: Run, name: str, asked: Any) -> Iterator[Context]:
    """Yield what a component that learns is lent: a folder for checkpoints and a listener.

    The folder outlives a killed run and is removed when the component is done, with those of other settings.

    Parameters
    ----------
    run
        Its folder holds that of the checkpoints.
    name
        First part of the folder's name, for readers.
    asked
        What decides the result, so that other settings start in another folder.
    """
    folder = name_workspace(run, name, asked)
    if not run.follows:  # what other settings were stopped with would hold its disk until this is done
        for old in folder.parent.glob(f"{name}-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    # The bar is closed with the loan, before the next stage opens one.
    with watch_lazily(run.listener, f"{name}:") as tell:
        yield Context(
            checkpoints=folder, progress=tell, device=run.config.retrieval.device, earlier=run.earlier
        )
    if not run.follows:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty: another component's checkpoints wait there; or never made
            folder.parent.rmdir()


def check_run_folder(folder: Path) -> Path:
    """Return the absolute path of a run folder; `DataError` if other files lie there.

    Parameters
    ----------
    folder
        May be missing or empty, or hold a run, also one that was interrupted.
    """
    refuse_address_to_write(folder)
    path = folder.expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise DataError(f"the run folder {path} cannot be written (it is a file); choose another with --out.")
    there = sorted(entry.name for entry in path.iterdir() if entry.name[0] != ".") if path.is_dir() else []
    ours = "config.yaml" in there or "stages" in there
    # What `decode` writes first is the data, and jobs of a cluster their list: all there is of a run that was stopped.
    if not ours and set(there) - {"data", "jobs"}:
        raise DataError(
            f"{path} is not a run folder and holds other files "
            f"({', '.join(there[:3])}{', ...' if len(there) > 3 else ''}); choose a new folder with --out."
        )
    return path


def _list_beside(config: RunConfig) -> tuple[str, ...]:
    """Return the entries of a configuration that change no stage of its run."""
    return ("name", "analyses", "encode", *(() if config.uses_pretraining else ("pretrain",)))


def list_changes(earlier: RunConfig, config: RunConfig, *, hashed: bool = True) -> list[str]:
    """Return the settings that change a result and differ between two configurations, with both values.

    Parameters
    ----------
    earlier, config
        Of the run that lies in a folder, and of the one that is asked for.
    hashed
        Whether inputs are compared by their digests; otherwise settings alone, which needs neither data nor weights.

    Returns
    -------
    list of str
        For example ``encoder.alphas ([1.0], now [10.0])``; a component of another kind is one entry.
    """
    changes: list[str] = []
    before, now = (
        one.hashed_fields() if hashed else one.model_dump(mode="json") for one in (earlier, config)
    )
    # Pretraining is a stage of the one that uses it; what the other has is another encoder then.
    beside = set(_list_beside(earlier)) & set(_list_beside(config))
    before, now = ({k: v for k, v in fields.items() if k not in beside} for fields in (before, now))
    _compare_fields("", before, now, changes)
    # Where data lie and on what a network is computed are no settings that a reader of numbers asks for.
    return [text for text in changes if hashed or not re.match(r"dataset\.root |\S*\bdevice ", text)]


def _compare_fields(key: str, before: Any, now: Any, changes: list[str]) -> None:
    if isinstance(before, dict) and isinstance(now, dict) and before.get("kind") == now.get("kind"):
        for name in [*before, *(name for name in now if name not in before)]:
            _compare_fields(f"{key}.{name}".lstrip("."), before.get(name), now.get(name), changes)
    elif store.json_plain(before) != store.json_plain(now):
        values = [
            value["kind"] if isinstance(value, dict) and "kind" in value else value for value in (before, now)
        ]
        kind = ".kind" if all(isinstance(value, dict) and "kind" in value for value in (before, now)) else ""
        told = [text if len(text) < 40 else f"{text[:36]} ..." for text in map(str, values)]
        changes.append(f"{key}{kind} ({told[0]}, now {told[1]})")


def read_earlier(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that lies in a folder; None if there is none, or of a version unlike ours."""
    try:
        return read_config(folder) if (folder / "config.yaml").is_file() else None
    except ConsentError:  # what lies there is a run, and must not be taken for none
        raise
    except ConfigError:
        return None


def keep_config(run: Run) -> None:
    """Write the full configuration into the run folder, once its data set was found to be readable."""
    if not run.folder.writable:
        return
    with store.replace_atomically(run.folder.path / "config.yaml") as temporary:
        temporary.write_text(dump_config(run.config))


def publish_scores(run: Run, artifact: store.Artifact) -> list[dict[str, Any]]:
    """Write the scores of `evaluate` into the run folder, and return them.

    ``scores.json``, the same as ``scores.parquet``, and ``differences.json``: the decoded system beside each control.
    """
    import pandas as pd

    # Added on reading: the artifact cannot hold its own name.
    rows = [
        {**row, "fingerprint": artifact.fingerprint} for row in store.read_json(artifact.path / "scores.json")
    ]
    for name in ("differences", "design"):
        run.seen[name] = store.read_json(artifact.path / f"{name}.json")
    folder = run.folder.path
    if not run.folder.writable:
        return rows
    with store.record_results(folder, "scores.json", "scores.parquet", "differences.json"):
        store.write_json(folder / "scores.json", rows)
        store.write_json(folder / "differences.json", run.seen["differences"])
        with store.replace_atomically(folder / "scores.parquet") as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)
    return rows


def read_run_scores(run: Run) -> list[dict[str, Any]]:
    """Return the rows of this run; none where those in the folder were made with other settings."""
    # What this process computed is newer than any file.
    if "evaluate" in run.seen:
        return run.seen["evaluate"]
    try:
        # A folder of an earlier version may hold fields that are no more; then nothing is known of its rows.
        made_with = RunConfig.model_validate(store.read_json(run.folder.path / "provenance.json")["config"])
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return []
    return read_scores(run.folder.path) if made_with.hashed_fields() == run.config.hashed_fields() else []


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Return the score rows of a run folder, an empty list before `evaluate`; `DataError` if the file was changed.

    Rows of an earlier version say so in `resampled`: its intervals took images that all subjects saw for independent.
    """
    path = folder / "scores.json"
    if not path.is_file():
        return []
    if path.name in store.find_changed_results(folder):
        raise DataError(
            f"{path} was changed after the run; write it again with braindecode-vis evaluate {folder}."
        )
    rows = store.read_json(path)
    return _name_method(rows) if _made_before(folder, rows) else rows


def _made_before(folder: Path, rows: Any) -> bool:
    """Return whether an earlier version of `evaluate` made these rows; False where nothing says so."""
    try:
        place = folder / "stages" / "evaluate" / str(rows[0]["fingerprint"]) / store.PROVENANCE
        return bool(rows[0]["fingerprint"]) and int(store.read_json(place)["version"]) < CROSSED_SINCE
    except (BraindecodeVisError, OSError, KeyError, IndexError, TypeError, ValueError):
        return False


def _name_method(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows whose intervals say that they are made by the method of 0.2.0."""
    return [
        row if row.get("method") == "shuffled" or row.get("ci_low") is None
        else {**row, "resampled": f"{row.get('resampled') or ''} (method of 0.2.0)".strip()}
        for row in rows
    ]  # fmt: skip
