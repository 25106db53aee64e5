"""The verbs that apply a finished run to new recordings, and write its results for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from braindecode_vis.cli.show import (
    ConsoleListener,
    Json,
    make_console,
    print_json,
    print_scores,
    takes,
)


@takes()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    on: Annotated[
        Path,
        typer.Option(
            "--on",
            help="Another root of the same data set, a folder of arrays, or a file of trials (.npy, -epo.fif).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for predictions, images and the page.")],
    context: Annotated[
        Path | None,
        typer.Option(
            "--context",
            help="Trials of the same subjects whose pictures are known, in the form of --on; the encoder first learns "
            "from these pairs (in_context only reads them). With --split test those that are declared as train.",
        ),
    ] = None,
    gallery: Annotated[
        str | None,
        typer.Option(
            "--gallery",
            help="Pictures to search: a folder or a .npy of them, a folder of embeddings, or a bank; or a CSV file of "
            "captions or attributes, for a gallery without pictures.",
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option("--fold", help="Fold whose encoder predicts; by default the mean of all folds."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="Use only trials that the recording declares as train or test."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Predict this many trials at most, the first ones."),
    ] = None,
    images: Annotated[
        bool,
        typer.Option("--images/--no-images", help="Whether images are made, which takes longest."),
    ] = True,
    whiten_new: Annotated[
        bool,
        typer.Option(
            "--whiten-new",
            help="Learn whitening and scaling from the new trials (transductive; not with --split test, where those "
            "declared as train are used).",
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="How another root is read, for example dataset.subjects=[9]. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Apply a finished run to new recordings.

    Fits nothing, except on the pairs of --context. Writes the ranked pictures, images and a page. Says how many trials
    there are, and after the first images how long all of them take.
    """
    from braindecode_vis.base.store import open_scratch
    from braindecode_vis.pipeline.finished_run import open_finished
    from braindecode_vis.pipeline.new_trials import read_new
    from braindecode_vis.pipeline.predicting import predict as predict_new
    from braindecode_vis.pipeline.prediction_files import check_out, describe_provenance

    # Before anything is computed: a folder that cannot be used should not cost an hour.
    folder = check_out(out)
    finished = open_finished(run, ConsoleListener())
    # Beside the result, where there must be room: another root is preprocessed there and removed afterwards.
    with open_scratch(folder.parent, folder.name) as work:
        ways: dict[str, Any] = {"whiten_new": whiten_new, "overrides": overrides or (), "part": split}
        new = read_new(finished, on, work, **ways)
        if context is not None:
            ways["part"] = "train" if split == "test" else None
        given = None if context is None else read_new(finished, context, work / "context", **ways)
        found = predict_new(
            finished, new, gallery=gallery, fold=fold, limit=limit, images=images, context=given
        )
        found.save(folder)
    scores = found.scores
    rows = [dict(row) for row in scores.astype(object).where(scores.notna(), None).to_dict("records")]
    if as_json:
        record = describe_provenance(found)
        shown = {key: record[key] for key in ("run", "fingerprint", "protocol", "transductive", "notes")}
        print_json({"folder": str(folder), "n_trials": len(found), **shown, "scores": rows})
        return
    if rows:
        print_scores([{str(key): value for key, value in row.items()} for row in rows])
    console = make_console(stderr=False)
    for note in found.notes:
        console.print(note, markup=False)
    console.print(f"{len(found)} trials predicted; page: {folder / 'predict.html'}", markup=False)


# --- export ----------------------------------------------------------------------------------------------------


@takes()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    what: Annotated[
        str, typer.Option("--what", help="responses, predictions, scores, images, encoder or submission.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File or folder to write; it must not exist.")],
    fold: Annotated[
        int | None, typer.Option("--fold", min=0, help="Fold of the predictions or the encoder, from 0.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="Export responses of this subject only.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="netcdf, zarr, fif, nifti, bids, csv or parquet; an encoder to safetensors, torch-export, onnx or "
            "huggingface; a submission to challenge (NeurIPS 2026, EEG to image) or basic (BASIC, pictures); images to "
            "png, which may be left out.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the results of a run for other tools.

    Writes responses, predictions, scores, images or the encoder of a finished run, or what a judge takes:
    the encoder as code and weights that run without this package, or pictures in the judge's folders. Computes nothing.
    """
    from braindecode_vis.api.decoding_run import open_run
    from braindecode_vis.api.exports import FORMATS, check_request
    from braindecode_vis.base.checks import ConfigError

    if to is None:
        formats = FORMATS.get(what, ("",))  # an unknown result is refused below
        if len(formats) > 1:
            raise ConfigError(f"give the format of {what} with --to: one of {', '.join(formats)}.")
        to = formats[0]
    check_request(what, to)
    written = open_run(run).export(what, to, out, fold=fold, subject=subject)
    if as_json:
        print_json({"run_folder": str(run), "scores": [], "written": str(written)})
        return
    make_console(stderr=False).print(f"{what}: {written}", markup=False)
