"""Verbs about data: fetch and check data sets, prepare your own data, and list the banks of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from braindecode_vis.cli.show import (
    ConsoleListener,
    Debug,
    Json,
    Root,
    Set,
    complete_datasets,
    make_console,
    print_json,
)


def new(
    folder: Annotated[
        Path, typer.Argument(help="Folder with data.npy, an epochs file or NIfTI, and images/.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prepare a folder of your own data.

    Writes the table, meta.yaml and configuration if they are missing, and changes nothing else.
    """
    from braindecode_vis.datasets.new_folder import CONFIG, start_folder

    started = start_folder(folder)
    if as_json:
        written = [str(path) for path in started.written]
        print_json(
            {
                "run_folder": None, "scores": [], "written": written, "notes": started.notes,
                "complete": started.complete,
            }
        )  # fmt: skip
        return
    console = make_console(stderr=False)
    for text in [*started.notes, *[f"written: {path}" for path in started.written]]:
        console.print(text, markup=False)
    root = folder.expanduser()
    first = "next" if started.complete else "next, when trials.csv is filled in"
    console.print(f"{first}: braindecode-vis run {root / CONFIG} --root {root}", markup=False)


def check(
    dataset: Annotated[str, typer.Argument(help="Name of the data set.", autocompletion=complete_datasets)],
    root: Root = None,
    overrides: Set = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Read every byte and every trial. This takes as long as reading all the data."
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify the files and the declared facts of a data set.

    Lists all damaged files, and recomputes every fact that the manifest declares.
    """
    from braindecode_vis.base.checks import DataError
    from braindecode_vis.cli import catalogue
    from braindecode_vis.config import read_config
    from braindecode_vis.datasets.manifests import read_manifest

    # A wrong name is reported as an unknown data set, before it is looked for among configurations.
    read_manifest(dataset)
    config = read_config(dataset, overrides or [], root=root)
    findings = catalogue.check(config, full=full, listener=ConsoleListener())
    wrong = [finding for finding in findings if not finding.ok]
    if as_json:
        listed = [vars(finding) for finding in findings]
        print_json(
            {"run_folder": None, "scores": [], "dataset": dataset, "ok": not wrong, "findings": listed}
        )
    else:
        from rich.markup import escape

        console = make_console(stderr=False)
        for finding in findings:
            mark = "[green]ok   [/green]" if finding.ok else "[red]wrong[/red]"
            console.print(f"{mark} {escape(finding.item)}: {escape(finding.message)}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(findings)} checks of {dataset} failed; first: {wrong[0].message.rstrip('.')}."
        )


def fetch(
    dataset: Annotated[str, typer.Argument(help="Name of the data set.", autocompletion=complete_datasets)],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", help="Folder to fetch into; by default a folder for this data set in the user's cache."
        ),
    ] = None,
    subjects: Annotated[
        list[str] | None,
        typer.Option(
            "--subject",
            "--subjects",
            help="Fetch this subject only. Repeat it, or separate subjects with commas: 1,2.",
        ),
    ] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--parts",
            help="Fetch this part, or all. Repeat it, or separate parts with commas; `datasets NAME` lists them.",
        ),
    ] = None,
    sessions: Annotated[
        list[str] | None,
        typer.Option(
            "--session", help="Of files of sessions, fetch those of this one. Repeat it, or use commas."
        ),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(
            "--region", help="Of files of regions, fetch those of this one. Repeat it, or use commas."
        ),
    ] = None,
    accept_terms: Annotated[
        bool,
        typer.Option(
            "--accept-terms",
            "--accept-licence",
            help="Confirm that you have read and accepted the terms that are shown.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List addresses, sizes and checksums, and fetch nothing.")
    ] = False,
    check_addresses: Annotated[
        bool, typer.Option("--check-addresses", help="Check that each address answers, and fetch nothing.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=32, help="How many files are fetched at the same time.")
    ] = 4,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a data set, verified, by subjects and parts.

    Shows the size first. A stopped download continues where it stopped.
    """
    from braindecode_vis.cli import catalogue
    from braindecode_vis.datasets import fetching
    from braindecode_vis.datasets.manifests import read_manifest

    manifest = read_manifest(dataset)
    folder = root or fetching.find_data_folder(dataset)
    listener, out = ConsoleListener(), make_console(stderr=False)
    plan = fetching.make_plan(
        manifest, folder, subjects=_split(subjects), parts=_split(parts), accept_terms=accept_terms,
        only_look=dry_run or check_addresses, only={"session": _split(sessions), "region": _split(regions)},
    )  # fmt: skip
    shown: dict[str, Any] = {"run_folder": None, "scores": [], "dataset": dataset, "root": str(plan.root)}
    if dry_run:
        if as_json:
            listed = [
                {"path": f.path, "part": f.part, "urls": f.urls, "bytes": f.bytes, "checksum": f.checksum}
                for f in plan.files
            ]
            told = {"locked": [part.name for part in plan.locked], "unlisted": plan.unlisted}
            print_json({**shown, "files": listed, "missing": plan.missing, **told, "plan": plan.describe()})
            return
        for file in plan.files:
            size = "size unknown" if file.bytes is None else f"{file.bytes} bytes"
            address = " or ".join(file.urls) or "written from the manifest"
            out.print(f"{file.path}: {address}, {size}, {file.checksum or 'no checksum'}", markup=False)
        for line in plan.describe():
            out.print(line, markup=False)
        return
    for line in [f"licence: {manifest.licence.strip()}", *plan.describe()]:
        listener.console.print(line, markup=False)
    if check_addresses:
        findings = fetching.check_addresses(plan, jobs=jobs)
    else:
        findings = catalogue.fetch_dataset(plan, jobs=jobs, listener=listener)
    if as_json:
        print_json({**shown, "findings": [vars(finding) for finding in findings]})
    # Of thousands of files, those that are wrong are told; the others lie there.
    elif check_addresses or len(findings) <= 40:
        for finding in findings:
            out.print(f"{finding.item}: {finding.message}", markup=False)
    if check_addresses:
        fetching.refuse_failures(findings, f"addresses of {dataset} do not answer as published")
    elif not as_json:
        out.print(f"next: braindecode-vis check {dataset} --root {plan.root}", markup=False)


def _split(texts: list[str] | None) -> list[str] | None:
    words = [word.strip() for text in texts or () for word in text.split(",")]
    return None if texts is None else [word for word in words if word]


def banks(as_json: Json = False, debug: Debug = False) -> None:
    """List the cached image embeddings.

    There is one bank for each target space.
    """
    from braindecode_vis.base.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import list_banks

    listed = list_banks(find_cache_folder())
    if as_json:
        print_json(
            {
                "run_folder": None,
                "scores": [],
                "banks": json.loads(json.dumps([vars(bank) for bank in listed], default=str)),
            }
        )
        return
    console = make_console(stderr=False)
    console.print(f"banks in {find_cache_folder()}: {len(listed)}", markup=False)
    for bank in listed:
        console.print(
            f"{bank.space}\n  {bank.n_images} images, {bank.n_bytes / 1e6:.1f} MB, {bank.folder}",
            markup=False,
        )
