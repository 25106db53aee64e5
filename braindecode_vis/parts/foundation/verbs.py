"""The verb ``corpus``: makes a corpus of recordings without labels, adds to it, checks and describes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import (
    AllowDownload,
    ConsoleListener,
    Debug,
    Json,
    make_console,
    make_table_console,
    print_json,
)

if TYPE_CHECKING:
    from braindecode_vis.datasets.corpus.reader import Corpus
    from braindecode_vis.parts.foundation.corpus.growing import AdditionEstimate, CorpusAddition


def corpus(
    folder: Annotated[Path, typer.Argument(metavar="NAME", help="Folder of the corpus.")],
    add: Annotated[
        list[Path] | None, typer.Option("--add", help="Add the recordings below this folder. Repeatable.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting of a new corpus, for example interval_s=1. Repeatable."
        ),
    ] = None,
    people: Annotated[
        Path | None,
        typer.Option(
            "--people",
            help="Table with the columns source (or site), subject, person: which subjects "
            "are the same person.",
        ),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out", help="Hold this person out, in addition to those drawn at random. Repeatable."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes that prepare runs.")] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Read the whole corpus and compare digests.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what would be added, and estimate disk and time from a few runs."
        ),
    ] = False,
    allow_download: AllowDownload = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prepare recordings without labels for pretraining.

    Recordings may come from many people and sites. Without --add, describes a corpus.

    A stopped call goes on where it was, and what was added before is not read again.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.datasets.corpus.manifest import MANIFEST, read_manifest
    from braindecode_vis.datasets.corpus.reader import open_corpus
    from braindecode_vis.parts.foundation.corpus.growing import add_sources, estimate_addition, read_people

    listener = ConsoleListener()
    console = make_console(stderr=False)
    folder = folder.expanduser().absolute()
    changes = add or people or hold_out
    if dry_run and not add:
        raise ConfigError("--dry-run shows the effect of --add; give the sources with --add.")
    if overrides and not add:
        raise ConfigError("--set applies to added recordings; use it with --add.")
    if check and changes:
        raise ConfigError("--check only checks a corpus; leave out --add, --people and --hold-out.")
    done: CorpusAddition | None = None
    if changes:
        config = _read_settings(folder / MANIFEST, overrides or [])
        with listener.watch("corpus:") as show:
            if dry_run:
                found = estimate_addition(folder, add or [], config, progress=show)
                _show_estimate(found, as_json)
                return
            done = add_sources(
                folder, add or [], config, people=None if people is None else read_people(people),
                hold_out=hold_out or [], jobs=jobs, progress=show,
                tell=lambda sentence: make_console().print(f"corpus: {sentence}", markup=False),
            )  # fmt: skip
        if add and not as_json:
            for line in _describe_addition(done):
                console.print(line, markup=False)
        if not read_manifest(folder).shards:
            if as_json:
                print_json({"run_folder": None, "scores": [], "corpus": None, "added": _plain(done)})
            return
    corpus = open_corpus(folder)
    if check:
        corpus.verify(read=True)
    if as_json:
        listed: dict[str, Any] = {
            "run_folder": None,
            "scores": [],
            "corpus": describe_corpus(corpus),
            "checked": check,
        }
        print_json(listed if done is None else {**listed, "added": _plain(done)})
        return
    _show_corpus(corpus)
    if check:
        console.print("all bytes are unchanged", markup=False)


def _read_settings(manifest: Path, overrides: list[str]) -> Any:
    from braindecode_vis.config.source import override_settings
    from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
    from braindecode_vis.datasets.corpus.manifest import read_manifest

    known = read_manifest(manifest.parent).config if manifest.is_file() else CorpusConfig()
    return override_settings(known, overrides, where="corpus")


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """Return what a corpus holds, as plain values."""
    runs = corpus.runs
    sources = []
    for name, mine in runs.groupby("source", sort=True):
        sources.append(
            {
                "source": name, "sites": sorted(set(mine["site"])), "licence": ", ".join(sorted(set(mine["licence"]))),
                "subjects": int(mine["subject"].nunique()), "persons": int(mine["person"].nunique()),
                "runs": len(mine), "hours": round(float(mine["hours"].sum()), 4),
                "interval_s": sorted({round(float(value), 6) for value in mine["interval_s"]}),
                "lacking": sum(map(bool, mine["missing"])),
            }
        )  # fmt: skip
    held = runs[runs["held_out"]]
    excluded = [entry for source in corpus.manifest.sources for entry in source.excluded]
    return {
        "folder": str(corpus.folder), "digest": corpus.digest, "modality": corpus.modality,
        "channels": len(corpus.channels), "interval_s": corpus.interval_s, "runs": len(runs),
        "hours": round(float(runs["hours"].sum()), 4), "persons": int(runs["person"].nunique()),
        "shards": len(corpus.manifest.shards), "bytes": sum(shard.n_bytes for shard in corpus.manifest.shards),
        "held_out": {
            "persons": sorted(set(held["person"])), "runs": len(held), "hours": round(float(held["hours"].sum()), 4)
        },
        "copies": len(corpus.manifest.unused), "sources": sources,
        "excluded": [{"path": path, "reason": reason} for path, reason in excluded],
        "stopped": [source.root for source in corpus.manifest.sources if not source.is_whole],
    }  # fmt: skip


def _show_corpus(corpus: Corpus) -> None:
    from rich.table import Table

    from braindecode_vis.base.memory import describe_bytes

    about = describe_corpus(corpus)
    table = Table(box=None, pad_edge=False)
    for name in ("source", "sites", "subjects", "runs", "hours", "interval (s)", "licence"):
        table.add_column(name, justify="right" if name in ("subjects", "runs", "hours") else "left")
    for row in about["sources"]:
        sites = row["sites"]
        table.add_row(
            row["source"], ", ".join(sites[:3]) + (f" and {len(sites) - 3} more" if len(sites) > 3 else ""),
            str(row["subjects"]), str(row["runs"]), f"{row['hours']:.4g}",
            ", ".join(f"{value:g}" for value in row["interval_s"][:3]), row["licence"] or "not told",
        )  # fmt: skip
    make_table_console().print(table)
    held = about["held_out"]
    interval = "differs by run" if about["interval_s"] is None else f"{about['interval_s']:g} s"
    for line in (
        f"{about['modality']}, {about['channels']} channels, interval {interval}: {about['persons']} persons, "
        f"{about['runs']} runs, {about['hours']:.4g} h, {describe_bytes(about['bytes'])} in {about['shards']} shards",
        f"held out: {len(held['persons'])} persons, {held['runs']} runs, {held['hours']:.4g} h "
        f"({', '.join(held['persons'][:4])}{', ...' if len(held['persons']) > 4 else ''})",
        *_describe_excluded(about["excluded"]),
        f"digest {about['digest']}; pretrain on it with braindecode-vis pretrain --corpus {about['folder']}",
    ):
        make_console(stderr=False).print(line, markup=False)


def _describe_excluded(excluded: list[dict[str, str]]) -> list[str]:
    if not excluded:
        return []
    shown = [f"  {entry['path']}: {entry['reason']}" for entry in excluded[:5]]
    more = [f"  and {len(excluded) - 5} more (--json lists them)"] if len(excluded) > 5 else []
    return [f"left out: {len(excluded)} recordings", *shown, *more]


def _describe_addition(done: CorpusAddition) -> list[str]:
    from braindecode_vis.base.memory import describe_bytes

    rest = [
        f"{n} {words}"
        for n, words in (
            (done.n_known, "were there before"),
            (done.n_copies, "are copies of others"),
            (len(done.excluded), "left out"),
        )
        if n
    ]
    return [
        f"added {done.n_new} runs, {done.hours:.4g} h, {done.n_people} new persons, {describe_bytes(done.n_bytes)} in "
        f"{done.seconds:.1f} s{''.join(f'; {text}' for text in rest)}"
    ]


def _plain(done: CorpusAddition) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(done).items() if name != "excluded"},
        "excluded": [{"path": str(entry.path), "reason": entry.reason} for entry in done.excluded],
    }


def _show_estimate(found: AdditionEstimate, as_json: bool) -> None:
    from braindecode_vis.base.memory import describe_bytes

    if as_json:
        print_json({"run_folder": None, "scores": [], "estimate": found.as_json()})
        return
    much = found.scale(found.n_bytes, 10_000), found.scale(found.seconds, 10_000)
    excluded = [{"path": str(entry.path), "reason": entry.reason} for entry in found.excluded]
    for line in (
        f"would add {found.n_new} of {found.n_found} runs, {found.hours:.4g} h of {found.n_subjects} subjects: "
        f"{describe_bytes(found.n_bytes)} on disk, about {_describe_seconds(found.seconds)} with one process "
        f"(measured on {found.n_measured} runs, {found.measured_hours:.3g} h)",
        f"10,000 such hours: {describe_bytes(much[0])}, {_describe_seconds(much[1])} with one process",
        *_describe_excluded(excluded),
    ):
        make_console(stderr=False).print(line, markup=False)


def _describe_seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 120 else f"{seconds / 3600:.2g} h"
