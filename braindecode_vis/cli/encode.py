"""The verb for the encoding direction: from images to responses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braindecode_vis.cli.show import (
    AllowDownload,
    Debug,
    Json,
    Out,
    Root,
    Set,
    Source,
    Subject,
    TrustCode,
    Verify,
    make_console,
    open_source,
    print_json,
)


def encode(
    source: Source,
    root: Root = None,
    out: Out = None,
    subjects: Subject = None,
    overrides: Set = None,
    images: Annotated[
        str | None,
        typer.Option(
            "--synthesise",
            help="Write the expected response to each of these images, which nobody was shown: a folder, tars, tables, "
            "phantom:N, a bank of embeddings, or unseen for those of the data set.",
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder of the synthetic responses; it must not exist.")
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            "--noise",
            help="residual (default) adds noise with the covariance of training residuals, or none.",
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option("--fold", min=0, help="Fold whose training trials synthetic responses are fitted on."),
    ] = None,
    trust_code: TrustCode = None,
    allow_download: AllowDownload = False,
    verify: Verify = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict responses from images: scores beside noise ceilings, maps, and synthetic responses to new images.

    Models are fitted on training trials; settings are those of encode, for example --set encode.model.combine=banded.
    """
    from braindecode_vis.base.checks import ConfigError

    given = {"--to": to, "--noise": noise, "--fold": fold}
    if images is None and (needless := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{needless[0]} is for --synthesise; leave it out, or name images.")
    if images is not None and to is None:
        raise ConfigError("--synthesise needs a folder to write to; name one with --to.")
    run = open_source(source, root, out, overrides, subjects)
    console = make_console(stderr=False)
    if images is not None and to is not None:
        from braindecode_vis.pipeline.synthetic import synthesise_into

        folder, sentences = synthesise_into(run, images, to, noise=noise or "residual", fold=fold)
        if as_json:
            print_json(
                {"run_folder": str(run.folder.path), "scores": [], "written": str(folder), "about": sentences}
            )
            return
        for sentence in sentences:
            console.print(sentence, markup=False)
        console.print(f"synthetic responses: {folder}", markup=False)
        return
    from braindecode_vis.parts.studies.encode import encode as encode_run
    from braindecode_vis.pipeline.reporting import report
    from braindecode_vis.pipeline.runs import read_scores

    found = encode_run(run)
    # Maps need no decoder: a page is only made where the rest of it is there.
    page = report(run) if read_scores(run.folder.path) else None
    if as_json:
        print_json(
            {
                "run_folder": str(run.folder.path), "scores": found["scores"], "summary": found["summary"],
                "folder": str(found["path"]), "files": [str(path) for path in found["files"]],
            }
        )  # fmt: skip
        return
    console.print(f"{found['title']}\n  {found['summary']}", markup=False)
    for row in found["scores"]:
        name = row["metric"].partition("@")[2]
        bound = "" if row["noise_ceiling"] is None else f", ceiling {row['noise_ceiling']:.3f}"
        value = f"{row['value']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}{bound})"
        console.print(f"  subject {row['subject']}, {name}: {value}", markup=False)
    figures = sorted(path for path in found["path"].glob("*.light.svg"))
    for path in [found["path"] / "table.csv", *figures, *found["files"]]:
        console.print(f"  file: {path}", markup=False)
    page_words = "none, since the run was not evaluated: run makes it" if page is None else str(page)
    console.print(f"report: {page_words}\nrun folder: {run.folder.path}", markup=False)
