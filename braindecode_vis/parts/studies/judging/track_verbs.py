"""The verbs ``tracks`` and ``submit``, and what ``run --track`` and ``score --track`` do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import Debug, Json, Root, make_console, print_json, takes

if TYPE_CHECKING:
    from braindecode_vis.parts.studies.judging.entry_scores import EntryScores

TrackName = Annotated[str, typer.Option("--track", help="Name of the track; tracks lists them.")]
SplitFile = Annotated[
    Path | None,
    typer.Option("--split", help="File of the split, where it is made from your own copy of the data."),
]


def tracks(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME | make NAME]",
            help="A track to describe, or make and a track, to write its split from your copy of the data.",
        ),
    ] = None,
    root: Root = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the files of make.")] = Path("tracks"),
    hide: Annotated[
        bool,
        typer.Option(
            "--hide", help="With make: write a public half without labels, and a sealed half for the holder."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List tracks: frozen splits on which decoders are compared.

    With a name, say what it asks; with make, write its split, or a test set with hidden labels.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.studies.judging import tracks as known

    given = list(words or [])
    if hide and (given[:1] != ["make"] or len(given) != 2):
        raise ConfigError("--hide belongs to tracks make NAME.")
    if hide:
        from braindecode_vis.parts.studies.judging.hidden_labels import hide_labels

        committed = hide_labels(given[1], out, root)
        if as_json:
            print_json(
                {"run_folder": None, "scores": [], "public": str(out / "public"), "commitment": committed}
            )
            return
        make_console(stderr=False).print(
            f"publish: {out / 'public'}\nkeep: {out / 'sealed'}\ncommitment: {committed}", markup=False
        )
        return
    if given[:1] == ["make"] and len(given) == 2:
        path, split, agrees = known.make_split(given[1], out, root)
        said = {True: "as published", False: "NOT as published", None: "no hash is published yet"}[agrees]
        if as_json:
            print_json(
                {
                    "run_folder": None,
                    "scores": [],
                    "split": str(path),
                    "sha256": split.sha256,
                    "agrees": agrees,
                }
            )
        else:
            make_console(stderr=False).print(f"split: {path}\nSHA-256 {split.sha256}: {said}", markup=False)
        if agrees is False:
            raise ConfigError(
                f"your copy gives other ids than the track {given[1]}; compare its files with braindecode-vis check."
            )
        return
    if len(given) > 1 or given == ["make"]:
        raise ConfigError("tracks takes no name, one name, or make and a name.")
    if given:
        track = known.read_track(given[0])
        if as_json:
            print_json({"run_folder": None, "scores": [], "track": track.model_dump(mode="json")})
            return
        console = make_console(stderr=False)
        for key, text in known.describe_track(track).items():
            console.print(f"{key}: {text}", markup=False)
        return
    table = known.tabulate_tracks()
    if as_json:
        print_json({"run_folder": None, "scores": [], "tracks": table.to_dict("records")})
        return
    from braindecode_vis.parts.studies.verbs import print_table

    print_table(table, f"{len(table)} tracks")


@takes("trust_code", "debug")
def submit(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folder or ZIP of an entry, or finished runs of one configuration, one for each seed."
        ),
    ],
    track: TrackName,
    out: Annotated[Path, typer.Option("--out", help="Folder of all entries.")] = Path("entries"),
    split: SplitFile = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="entry.yaml of a run; by default that of a shipped recipe.")
    ] = None,
    bring_run: Annotated[
        bool, typer.Option("--bring-run", help="Copy the run into its entry, so that others can audit it.")
    ] = False,
    sealed: Annotated[
        Path | None,
        typer.Option(
            "--sealed", help="Sealed half of hidden labels, for their holder: a team gets one score a day."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check an entry of a track, score it and seal it.

    Works without a network. Nothing is written if anything is wrong.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.studies.judging.entries import find_place, open_source, read_entry, seal_entry
    from braindecode_vis.parts.studies.judging.entry_runs import is_run, write_run_entry
    from braindecode_vis.parts.studies.judging.entry_scores import score_entry
    from braindecode_vis.parts.studies.judging.hidden_labels import read_hidden_entry, spend_day
    from braindecode_vis.parts.studies.judging.tracks import read_split, read_track

    about = read_track(track)
    runs = [is_run(folder) for folder in folders]
    if sealed is not None and any(runs):
        raise ConfigError("--sealed is for entries on the queries of the public half, not for runs.")
    if (len(folders) > 1 and not all(runs)) or ((card or bring_run) and not all(runs)):
        raise ConfigError(
            "several folders, --card and --bring-run are for run folders; give one entry by itself."
        )
    with tempfile.TemporaryDirectory() as temporary, open_source(folders[0]) as source:
        if all(runs):
            source = write_run_entry(
                folders, Path(temporary), track=track, card=card, split=split, bring=bring_run
            )
        frozen = read_split(about, split)
        if sealed is None:
            entry = read_entry(source, about, frozen)
        else:
            entry = read_hidden_entry(source, sealed, about, frozen)
        find_place(entry, out)
        found = score_entry(entry)
        if sealed is not None:  # an entry with a mistake costs no day
            spend_day(sealed, entry.card.team, entry.card.name)
        path = seal_entry(entry, out, found.as_json())
    print_entry(found, as_json, entry=str(path))


def print_entry(found: EntryScores, as_json: bool, **places: str) -> None:
    """Print the scores of an entry, its column and its notes."""
    import pandas as pd

    from braindecode_vis.parts.studies.judging.entry_scores import METRICS

    if as_json:
        print_json({"run_folder": None, "scores": [row.as_row() for row in found.rows], "column": found.column,
                    "signs": found.signs, "notes": found.notes, **places})  # fmt: skip
        return
    from braindecode_vis.parts.studies.verbs import print_table

    shown = [
        {
            "subject": row.subject,
            "method": row.method,
            "metric": row.metric,
            "value": f"{row.value:.4f}",
            "95 % interval": "" if row.ci_low is None else f"{row.ci_low:.3f}-{row.ci_high:.3f}",
            "chance": "" if row.chance is None else f"{row.chance:.3f}",
            "n": row.n_queries,
        }
        for row in sorted(found.rows, key=lambda row: (METRICS.index(row.metric), row.subject, row.method))
    ]
    print_table(pd.DataFrame(shown), f"Column: {found.column}")
    console = make_console(stderr=False)
    for line in [*(f"transductive: {sign}" for sign in found.signs), *found.notes]:
        console.print(line, markup=False)
    for name, place in places.items():
        console.print(f"{name}: {place}", markup=False)


def score_on_track(
    source: str, track: str, *, gallery: str | None, split: Path | None, auditor: str | None, as_json: bool
) -> None:
    """Score the entry of a folder or ZIP on a track, or audit the run in a sealed one.

    Parameters
    ----------
    source
        Folder or ZIP of the entry.
    track
        Name of the track.
    gallery
        Embeddings of the candidates that the judge made, with their ids; by default those of the entry.
    split
        File of the split, where the track ships none.
    auditor
        Who audits; None to only score.
    as_json
        Whether to print one JSON object.
    """
    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.base.checks import DataError
    from braindecode_vis.parts.studies.judging.entries import open_source, read_entry
    from braindecode_vis.parts.studies.judging.entry_scores import audit_entry, score_entry
    from braindecode_vis.parts.studies.judging.tracks import read_split, read_track
    from braindecode_vis.parts.studies.output_files import read_given

    about = read_track(track)
    with open_source(Path(source)) as folder:
        entry = read_entry(folder, about, read_split(about, split))
        judged = None
        if gallery is not None:
            given = read_given(gallery, "the gallery of the judge")
            if given.values is None or given.ids is None:
                raise DataError(
                    f"{gallery} needs embeddings with ids; a folder of the verb embed or predict has both."
                )
            judged = Embeddings(given.values, given.ids.astype(str), entry.card.space)
        found = score_entry(entry, gallery=judged)
    print_entry(found, as_json)
    if auditor is not None:
        verdict: dict[str, Any] = audit_entry(Path(source), auditor)
        words = "passed" if verdict["passed"] else "NOT passed"
        make_console().print(f"audit by {verdict['auditor']}: {words}; {verdict['summary']}", markup=False)
        if not verdict["passed"]:
            raise DataError(
                f"the run of {source} did not pass the audit; see braindecode-vis audit {source}/run --refit."
            )
