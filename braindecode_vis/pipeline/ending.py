"""Keeps the scores, hints and checks of a finished run, so that a second `run` prints them without computing.

A run in which nothing changed needs its digests compared and no more: its scores, hints and checks are those of the
last time. They are kept in the user's cache with what they were made of: the configuration, the inputs, this code, and
the name and digest of every file of the run folder. Whatever differs, a damaged or deleted cache included, sends the
command through the stages again, which say what it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from braindecode_vis.base import digests, store
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.parts import find_parts
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.pipeline.runs import STAGE_VERSIONS, Run, read_scores

_MAX_KEPT = 1024


@dataclass(frozen=True)
class Ending:
    """What is reported at the end of a run.

    Parameters
    ----------
    rows
        Its scores.
    hints
        See `braindecode_vis.pipeline.hints`.
    checked
        When it was checked for leaks, and what was found; empty if that could not be done.
    leaks
        One sentence on the leaks; empty without any.
    """

    rows: list[dict[str, Any]]
    hints: list[str]
    checked: str
    leaks: str


def finish_run(run: Run, analyze: Callable[[Run], None] = lambda run: None) -> Ending:
    """Run every stage, reuse what is there, and return what is reported of it; for nothing but that if nothing changed.

    Parameters
    ----------
    run
        The run.
    analyze
        Makes the analyses that the report takes up.
    """
    try:
        with digests.show_hashing(run.listener.watch):
            asked = _describe_asked(run)
    except BraindecodeVisError:
        asked = ""  # weights or recordings are not there; the stage that reads them says so
    if asked and (known := _recall(run, asked)) is not None:
        return known
    from braindecode_vis.pipeline.hints import list_hints
    from braindecode_vis.pipeline.reporting import check_leaks, run_all

    analyze(run)
    rows, hints, found = run_all(run), list_hints(run), check_leaks(run)
    if found is None:
        return Ending(rows, hints, "", "")
    summary, leaks = found.summarise(), found.summarise_leaks()
    # A problem, such as a damaged analysis, is named by each call; a changed file may have been replaced by this one.
    if asked and not run.seen["problems of parts"] and all(item.check != "chain" for item in found.leaks):
        with suppress(
            OSError, RuntimeError, DataError
        ):  # no room, no home, dead links: looked at again next time
            _keep(run, asked, hints=hints, summary=summary, leaks=leaks)
    return Ending(rows, hints, f"in {run.seen['seconds of audit']:.1f} s: {summary}", leaks)


def _keep(run: Run, asked: str, **said: Any) -> None:
    """Keep what was said of a run; `asked` was found before its stages, since inputs may change meanwhile."""
    folder = run.folder.path
    files = _digest_files(folder)
    # After the digests, so that what is kept is what the run wrote.
    run.folder.verify(read=False)
    if store.find_changed_results(folder):
        return
    path = _find_place(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "asked": asked,
        "files": files,
        "artifacts": [
            [name, artifact.path.relative_to(folder).as_posix(), artifact.fingerprint]
            for name, artifact in run.produced
        ],
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        **said,
    }
    store.write_json(path, {"check": store.hash_json(record), "record": record})
    digests.bound_cache(path.parent, _MAX_KEPT)


def _recall(run: Run, asked: str) -> Ending | None:
    """Return what was kept of a run of which nothing changed, having reported its stages; None otherwise."""
    folder = run.folder.path
    if run.produced:  # several processes have trained together
        return None
    try:
        kept = store.read_json(_find_place(folder))
        record = kept["record"]
        if kept["check"] != store.hash_json(record) or record["asked"] != asked:
            return None
        with digests.show_hashing(run.listener.watch):
            if record["files"] != _digest_files(folder):
                return None
        rows = read_scores(folder)
    except (OSError, BraindecodeVisError, KeyError, TypeError, RuntimeError):
        return None  # the stages say what is wrong with a file
    for name, path, fingerprint in record["artifacts"]:
        created = store.read_provenance(folder / path / store.PROVENANCE)["created"]
        run.folder.take(folder / path)
        reason = f"nothing it depends on has changed since {created}"
        run.listener.finished(name, store.Artifact(folder / path, fingerprint, True, reason), 0.0)
    run.seen["evaluate"] = rows
    checked = f"at {record['created']}, and nothing has changed since: {record['summary']}"
    return Ending(rows, record["hints"], checked, record["leaks"])


def _find_place(folder: Path) -> Path:
    return digests.find_cache_folder() / "endings" / f"{store.hash_json(str(folder.resolve()))}.json"


def _describe_asked(run: Run) -> str:
    """Return a digest of all that decides what a run holds and says, apart from the files of its folder."""
    config = run.config
    asked = [
        config.model_dump(mode="json"), config.hashed_fields(), config.dataset.hash_inputs(), STAGE_VERSIONS,
        _identify_code(), [[p.name, p.distribution.version] for p in find_parts() if p.distribution is not None],
    ]  # fmt: skip
    return store.hash_json(store.json_plain(asked))


def _identify_code() -> list[list[Any]]:
    """Return name, size and time of every file of this package, and of the manifests that it shows."""
    files = [
        [entry.path, entry.stat().st_size, entry.stat().st_mtime_ns]
        for top in (Path(store.__file__).parents[1], find_package_data("data_manifests"))
        for entry in _walk(str(top))
        if entry.name.endswith((".py", ".yaml"))
    ]
    return sorted(files)


def _digest_files(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a run folder, but for hidden ones, and where links lead."""
    names = {os.path.relpath(entry.path, folder): entry for entry in _walk(str(folder))}
    # Logs of the jobs that work here grow while this is asked.
    names = {name: entry for name, entry in names.items() if not name.startswith(f"jobs{os.sep}")}
    found = digests.digest_files({name: folder / name for name in names})
    links = {name: f" {(folder / name).readlink()}" for name, entry in names.items() if entry.is_symlink()}
    return {name: digest + links.get(name, "") for name, digest in found.items()}


def _walk(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)
            else:
                yield entry
