"""The verbs ``analyze`` and ``encode``: analyses of one run, and the encoding direction from images to responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from braindecode_vis.cli.show import (
    Json,
    MaybeRunOptions,
    RunOptions,
    Worker,
    Workers,
    complete_analyses,
    finish,
    make_console,
    print_json,
    refuse_lone_worker,
    takes,
)  # fmt: skip


@takes()
def analyze(
    where: MaybeRunOptions,
    analyses: Annotated[
        list[str] | None,
        typer.Option(
            "--analysis",
            help="Kind of analysis; by default those of the configuration. Repeatable.",
            autocompletion=complete_analyses,
        ),
    ] = None,
    list_kinds: Annotated[
        bool, typer.Option("--list", help="List the analyses with a description, and make none.")
    ] = False,
    worker: Worker = None,
    n_workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Analyse when, where and how the brain is decoded.

    Each analysis writes a table, figures and a report section.

    Processes started with --worker and --workers share the analyses, and the fits of each.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.analyses.analyze import analyze as analyze_run
    from braindecode_vis.parts.analyses.analyze import analyze_share, read_findings
    from braindecode_vis.pipeline.decoding import find_untested
    from braindecode_vis.pipeline.reporting import report

    if list_kinds:
        if where.source is not None or analyses:
            raise ConfigError("--list only lists the known analyses; leave the other options out.")
        from braindecode_vis.cli.discover import print_explanation
        from braindecode_vis.config.explain import explain

        (found_kinds,) = explain("analysis")
        if as_json:
            print_json({"run_folder": None, "scores": [], "analyses": dict(found_kinds.kinds)})
        else:
            print_explanation(found_kinds)
        return
    if where.source is None:
        raise ConfigError(
            "analyze needs a configuration, a run folder or a data set; --list names the analyses."
        )
    refuse_lone_worker(worker, n_workers)
    run = where.open(holds=worker is None)
    if worker is not None and n_workers is not None:
        if n_left := analyze_share(run, analyses or (), worker, n_workers):
            run.tell(
                f"worker {worker} of {n_workers} has finished its share, and {n_left} analyses are left "
                "for the other "
                "workers; at the end, run analyze without --worker to make the missing ones",
                "analyze:",
            )
        finish(run, as_json)
        return
    artifacts, refusals = analyze_run(run, analyses or ())
    found = [read_findings(artifact) for artifact in artifacts]
    # The page takes up the sections of the analyses.
    page: object = report(run) if find_untested(run) is None else "none, since no test trial shows a picture"
    if as_json:
        listed = [
            {
                "kind": item["kind"],
                "summary": item["summary"],
                "folder": str(item["path"]),
                "files": [str(path) for path in item["files"]],
                "rows": json.loads(item["table"].to_json(orient="records")),
            }
            for item in found
        ]
        scores = [row for item in found for row in item["scores"]]
        print_json(
            {
                "run_folder": str(run.folder.path),
                "scores": scores,
                "analyses": listed,
                "refused": refusals,
            }
        )
    else:
        console = make_console(stderr=False)
        for item in found:
            files = "".join(f"\n  file: {path}" for path in item["files"])
            console.print(
                f"{item['title']}\n  {item['summary']}\n  table: {item['path'] / 'table.csv'}{files}",
                markup=False,
            )
        console.print(f"report: {page}\nrun folder: {run.folder.path}", markup=False)
    if refusals:
        # The last refusal is the error of the command, those before it are lines, so that one exit code tells of
        # all.
        *others, last = [
            f"the analysis {kind} does not fit this run: {text}" for kind, text in refusals.items()
        ]
        for sentence in others:
            make_console().print(f"refused: {sentence}", markup=False)
        raise ConfigError(last)


@takes()
def encode(
    where: RunOptions,
    images: Annotated[
        str | None,
        typer.Option(
            "--synthesise",
            help="Write the expected response to each of these images, which were not shown: a folder, "
            "tars, tables, phantom:N, a bank of embeddings, or unseen for images of the data set "
            "that were not shown.",
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
    as_json: Json = False,
) -> None:
    """Predict responses from images.

    Writes scores beside noise ceilings, maps, and synthetic responses to new images.

    Models are fitted on training trials; settings are those of encode, for example --set encode.model.combine=banded.
    """
    from braindecode_vis.base.checks import ConfigError

    given = {"--to": to, "--noise": noise, "--fold": fold}
    if images is None and (needless := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{needless[0]} applies only with --synthesise; leave it out, or give images.")
    if images is not None and to is None:
        raise ConfigError("--synthesise needs an output folder; give one with --to.")
    run = where.open()
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
    from braindecode_vis.parts.analyses.encode import encode as encode_run
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
    page_words = "none, since the run was not evaluated; the verb run makes it" if page is None else str(page)
    console.print(f"report: {page_words}\nrun folder: {run.folder.path}", markup=False)
