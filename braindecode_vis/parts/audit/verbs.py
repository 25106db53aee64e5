"""The verb that audits a finished run for leaks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import (
    Json,
    make_console,
    print_json,
    takes,
)

if TYPE_CHECKING:
    from braindecode_vis.pipeline.leaks.findings import Audit

_STYLES = {"ok": "green", "transductive": "yellow", "warning": "yellow", "leak": "bold red"}


@takes()
def audit(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a sweep: each of its runs.")],
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help=(
                "Also preprocess the recordings again and compare every trial, fit every fold again with poisoned test "
                "trials, and make the other expensive checks. It takes about as long as the run did."
            ),
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the files of a run for leaks of test data.

    Proves that no test data reached what was fitted or chosen. A leak is exit code 2.
    Without --refit, or without the recordings, trials and responses are known by record only.
    """
    from braindecode_vis.base.checks import DataError
    from braindecode_vis.parts.audit.run import audit_run
    from braindecode_vis.pipeline.leaks.run_files import list_sweep

    several = list_sweep(run)
    audits: list[dict[str, Any]] = []
    wrong: list[str] = []
    for folder in several or [run]:
        try:
            found = audit_run(folder, refit=refit)
        except DataError as error:
            if not several:
                raise
            wrong.append(str(error))
            continue
        audits.append(found.as_json())
        if not as_json:
            _print_findings(found)
        if found.leaks:
            wrong.append(found.summarise_leaks())
    if as_json:
        print_json({"run_folder": str(run), "scores": [], "audits": audits} if several else audits[0])
    if wrong:
        of = f"{len(wrong)} of {len(several)} runs have leaks or could not be audited. " if several else ""
        raise DataError(of + " ".join(wrong))


def _print_findings(found: Audit) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Audit of {found.folder}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("finding", overflow="fold", ratio=1)
    table.add_column("where", overflow="fold")
    for item in found.findings:
        style = _STYLES[item.level]
        table.add_row(
            item.check, f"[{style}]{item.level}[/{style}]", escape(item.message), escape(item.where)
        )
    status = Table(title="How it was verified", title_justify="left", box=SIMPLE_HEAD)
    for name in ("part", "verified"):
        status.add_column(name, no_wrap=True)
    status.add_column("what", overflow="fold", ratio=1)
    for part in found.list_status():
        status.add_row(part.part, part.how, escape(part.describe()))
    console = Console(highlight=False)
    console.print(table)
    console.print(status)
    make_console(stderr=False).print(found.summarise(), markup=False)
