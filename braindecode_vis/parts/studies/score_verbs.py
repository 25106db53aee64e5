"""The verb ``score``: scores outputs of any system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import Json, make_console, print_json, print_scores, takes
from braindecode_vis.parts.studies.judging.track_verbs import score_on_track

if TYPE_CHECKING:
    from braindecode_vis.parts.studies.scored_outputs import ScoredOutputs

#: Kind, selection, features, number of permutations and seed, where nothing is asked for.
_DEFAULTS = ("auto", "not stated", "efficientnet-lite0", 10_000, 0)


@dataclass(frozen=True)
class TrackOptions:
    """The track on which an entry is scored, and what its judge gives."""

    track: Annotated[
        str | None,
        typer.Option(
            "--track",
            help="Score the entry of this folder or ZIP on a track. Only --gallery, --split, --auditor and --json "
            "apply then.",
        ),
    ] = None
    gallery: Annotated[
        str | None,
        typer.Option("--gallery", help="With --track: candidates that the judge embedded, with ids."),
    ] = None
    split: Annotated[Path | None, typer.Option("--split", help="With --track: file of the split.")] = None
    auditor: Annotated[
        str | None,
        typer.Option(
            "--auditor", help="With --track: audit the run of a sealed entry (with --refit), in this name."
        ),
    ] = None


@takes("debug")
def score(
    predictions: Annotated[
        str,
        typer.Argument(
            help="Embeddings, a matrix of similarities or logits, labels or probabilities (.npy .npz .pt .safetensors "
            ".h5 .parquet .csv .txt; FILE::NAME for one array of several), or a folder of reconstructions."
        ),
    ],
    on: TrackOptions,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            help="True embeddings, names of the columns, true labels, or a folder of stimuli; not needed "
            "for a square matrix.",
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            "--ids",
            help="Id of the true item of each prediction: one per line, or a table with stimulus_id and "
            "optionally subject, group, concept. Without it, row k belongs to row k.",
        ),
    ] = None,
    target_ids: Annotated[
        Path | None, typer.Option("--target-ids", help="Id of each target, column of a matrix, or class.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="embeddings, similarity, classes or images; by default guessed from the shapes."
        ),
    ] = "auto",
    text: Annotated[
        str | None,
        typer.Option("--text", help="Embeddings of the concept names, as a separate gallery (@text)."),
    ] = None,
    descriptions: Annotated[
        str | None,
        typer.Option(
            "--descriptions",
            help="Embeddings of a description of each gallery item, or a CSV of captions for predicted "
            "sentence vectors; without --targets they are the gallery.",
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="Further protocol: relative_median_rank, mean_average_precision, within_concept, instances, nsd_300, "
            "transductive, neuralbench. Repeatable.",
        ),
    ] = None,
    selection: Annotated[
        str,
        typer.Option(
            "--selection",
            help="How the model was chosen: fixed, validation or test, which outputs do not show.",
        ),
    ] = "not stated",
    distances: Annotated[
        bool, typer.Option("--distances", help="The matrix holds distances: small values are near.")
    ] = False,
    size: Annotated[int | None, typer.Option("--size", help="Pixels at which images are compared.")] = None,
    features: Annotated[
        str,
        typer.Option(
            "--features", help="Image encoder for two-way identification of images; none leaves it out."
        ),
    ] = "efficientnet-lite0",
    n_permutations: Annotated[
        int,
        typer.Option("--permutations", min=1, help="Number of permutations for p-values, and of resamples."),
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of resamples and shuffles.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder for scores (JSON, CSV), items and the page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score predictions or images of any system.

    Gives the full table: intervals, chance, p, hubs, ties, signs of transduction.
    """
    from braindecode_vis.parts.studies.score_outputs import score as score_outputs

    others = (targets, ids, target_ids, text, descriptions, size, out, protocol or None, distances or None)
    if _is_on_track(on, others, (kind, selection, features, n_permutations, seed)):
        score_on_track(predictions, as_json=as_json, **vars(on))
        return
    given: dict[str, Any] = {"kind": kind, "protocols": tuple(protocol or ()), "selection": selection}
    found = score_outputs(
        predictions, targets, ids=ids, target_ids=target_ids, text=text, descriptions=descriptions,
        distances=distances, size=size,
        # A word on the command line, where None cannot be written.
        features=None if features == "none" else features, n_bootstrap=n_permutations, n_permutations=n_permutations,
        seed=seed, out=out, **given,
    )  # fmt: skip
    _print_outputs(found, out, as_json)


def _is_on_track(on: TrackOptions, others: tuple[Any, ...], chosen: tuple[Any, ...]) -> bool:
    """Return whether an entry of a track is scored; its options and those of other outputs exclude each other."""
    from braindecode_vis.base.checks import ConfigError

    if on.track is None:
        if any(value is not None for value in vars(on).values()):
            raise ConfigError("--gallery, --split and --auditor belong to --track.")
        return False
    if any(value is not None for value in others) or chosen != _DEFAULTS:
        raise ConfigError(
            "with --track, score takes only the entry, --gallery, --split, --auditor and --json."
        )
    return True


def _print_outputs(found: ScoredOutputs, out: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(found.as_json() | {"folder": None if out is None else str(out)})
        return
    print_scores(found.list_rows())
    console = make_console(stderr=False)
    for line in found.describe():
        console.print(line, markup=False)
    if out is not None:
        console.print(f"page: {out / 'score.html'}", markup=False)
