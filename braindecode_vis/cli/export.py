"""The verb that writes results of a finished run for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braindecode_vis.cli.show import (
    Json,
    make_console,
    print_json,
    takes,
)


@takes()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    what: Annotated[str, typer.Option("--what", help="responses, predictions, scores or encoder.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="netcdf, zarr, fif, nifti, bids, csv or parquet; an encoder to safetensors, torch-export, onnx or "
            "huggingface.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File or folder to write; it must not exist.")],
    fold: Annotated[
        int | None, typer.Option("--fold", min=0, help="Fold of the predictions or the encoder, from 0.")
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="Export responses of this subject only.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the results of a run for other tools.

    Writes responses, predictions, scores or the encoder of a finished run. Computes nothing.
    """
    from braindecode_vis.api.decoding_run import open_run
    from braindecode_vis.api.exports import check_request

    check_request(what, to)
    written = open_run(run).export(what, to, out, fold=fold, subject=subject)
    if as_json:
        print_json({"run_folder": str(run), "scores": [], "written": str(written)})
        return
    make_console(stderr=False).print(f"{what}: {written}", markup=False)
