"""The command ``braindecode-vis``: one verb per stage of the pipeline.

Owns arguments, tables, progress bars and the way errors are told. Computes nothing; everything heavy is imported
inside the verb that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from braindecode_vis import pipeline
    from braindecode_vis.store import Artifact

app = typer.Typer(
    name="braindecode-vis",
    help="Decode seen images from EEG, MEG and fMRI: brain encoders, retrieval, reconstruction, honest reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help triples the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str,
    typer.Argument(
        help="A configuration file, a run folder, or the name of a data set or shipped configuration."
    ),
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder that the data set lies in.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME by default.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting, for example seed=1. Repeatable.")
]
Subject = Annotated[list[str] | None, typer.Option("--subject", help="Read this subject only. Repeatable.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"braindecode-vis {__version__}")
        raise typer.Exit


@app.callback()
def root_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Hold the options that stand before the verb."""


def _console(*, stderr: bool = True) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


class _ConsoleListener:
    """Tells on standard error what is computed and what is reused, and why."""

    def __init__(self) -> None:
        self.console = _console()

    def finished(self, stage: str, artifact: Artifact, seconds: float) -> None:
        from rich.markup import escape

        if artifact.reused:
            text = f"[dim]{stage:<18} reused    {escape(artifact.reason)}[/dim]"
        else:
            text = (
                f"{stage:<18} [green]computed[/green]  {seconds:6.1f} s  [dim]{escape(artifact.reason)}[/dim]"
            )
        self.console.print(text)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda n: bar.advance(task, n)


def _open(
    source: str,
    root: Path | None,
    out: Path | None,
    overrides: list[str] | None,
    subjects: list[str] | None = None,
) -> pipeline.Run:
    from braindecode_vis import pipeline
    from braindecode_vis.config import read_config

    chosen = [f"dataset.subjects=[{', '.join(subjects)}]"] if subjects else []
    config = read_config(source, [*chosen, *(overrides or [])], root=root)
    folder = Path(source).expanduser()
    if out is None and (folder / "config.yaml").is_file():
        out = folder
    return pipeline.open_run(config, out, _ConsoleListener())


def _finish(run: pipeline.Run, as_json: bool, message: str = "") -> None:
    from braindecode_vis import pipeline

    rows = pipeline.read_run_scores(run)
    if as_json:
        _print_json({"run_folder": str(run.folder.path), "scores": rows})
        return
    console = _console(stderr=False)
    if message:
        console.print(message, markup=False)
    console.print(f"run folder: {run.folder.path}", markup=False)


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


@app.command()
def datasets(root: Root = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the data sets: what they are, where to get them, what is on disk."""
    from rich.table import Table

    from braindecode_vis import pipeline
    from braindecode_vis.datasets.manifests import describe_source

    found = list(pipeline.list_datasets(root))
    if as_json:
        listed = [
            {**manifest.model_dump(mode="json"), "where": describe_source(manifest), "on_disk": presence}
            for manifest, presence in found
        ]
        _print_json({"run_folder": None, "scores": [], "datasets": listed})
        return
    table = Table(title="Data sets", title_justify="left", show_lines=True)
    for column, width in (
        ("name", 12),
        ("what", 22),
        ("licence", 14),
        ("where to get it", 14),
        ("on disk", 12),
    ):
        table.add_column(column, overflow="fold", min_width=width)
    for manifest, presence in found:
        people = "1 subject" if manifest.subjects == 1 else f"{manifest.subjects} subjects"
        what = f"{manifest.modality}, {people}; {manifest.stimuli}"
        table.add_row(manifest.name, what, manifest.licence, describe_source(manifest), presence)
    from rich.console import Console

    Console(highlight=False).print(table)


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="Name of the data set.")],
    root: Root = None,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify the files of a data set and recompute every fact that its manifest declares."""
    from braindecode_vis import pipeline
    from braindecode_vis.checks import DataError
    from braindecode_vis.config import read_config
    from braindecode_vis.datasets.manifests import read_manifest

    read_manifest(dataset)
    config = read_config(dataset, overrides or [], root=root)
    findings = pipeline.check(config)
    wrong = [finding for finding in findings if not finding.ok]
    if as_json:
        listed = [vars(finding) for finding in findings]
        _print_json(
            {"run_folder": None, "scores": [], "dataset": dataset, "ok": not wrong, "findings": listed}
        )
    else:
        from rich.markup import escape

        console = _console(stderr=False)
        for finding in findings:
            mark = "[green]ok   [/green]" if finding.ok else "[red]wrong[/red]"
            console.print(f"{mark} {escape(finding.item)}: {escape(finding.message)}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(findings)} checks of {dataset} failed; first: {wrong[0].message.rstrip('.')}."
        )


@app.command()
def fetch(
    dataset: Annotated[str, typer.Argument(help="Name of the data set.")],
    root: Annotated[Path, typer.Option("--root", help="Folder to fetch into.")],
    accept_licence: Annotated[
        bool,
        typer.Option("--accept-licence", help="Accept the terms of the data set, which are shown first."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Download the files of a data set that have a public address; interrupted transfers go on where they stopped."""
    from braindecode_vis import pipeline

    listener = _ConsoleListener()
    findings = pipeline.fetch_dataset(dataset, root, accept_licence=accept_licence, listener=listener)
    if as_json:
        listed = [vars(finding) for finding in findings]
        _print_json(
            {"run_folder": None, "scores": [], "dataset": dataset, "root": str(root), "findings": listed}
        )
        return
    for finding in findings:
        _console(stderr=False).print(f"{finding.item}: {finding.message}", markup=False)


def _add_stage(name: str, summary: str) -> None:
    def verb(
        source: Source,
        root: Root = None,
        out: Out = None,
        subjects: Subject = None,
        overrides: Set = None,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        from braindecode_vis import pipeline

        run = _open(source, root, out, overrides, subjects)
        stage: Callable[[pipeline.Run], Any] = getattr(pipeline, name)
        result = stage(run)
        if not as_json and name in ("evaluate",):
            _print_scores(pipeline.read_scores(run.folder.path))
        _finish(run, as_json, f"report: {result}" if name == "report" else "")

    verb.__doc__ = summary
    app.command(name)(verb)


_add_stage("preprocess", "Read a recording and its images into a run folder, and fix the split.")
_add_stage("embed", "Encode the images into the target space.")
_add_stage("train", "Fit the brain encoder on the training trials of every fold.")
_add_stage("retrieve", "Predict the embeddings of the test trials and rank the true images in the gallery.")
_add_stage("reconstruct", "Turn predicted embeddings into images, with every control beside them.")
_add_stage("evaluate", "Score retrieval and reconstructions, with intervals, chance and controls.")
_add_stage("report", "Write the self-contained report.html of a run.")


@app.command()
def banks(as_json: Json = False, debug: Debug = False) -> None:
    """List the cached image embeddings: one bank per space."""
    from braindecode_vis.embeddings.extract import find_cache_folder, list_banks

    listed = list_banks(find_cache_folder())
    if as_json:
        _print_json(
            {
                "run_folder": None,
                "scores": [],
                "banks": json.loads(json.dumps([vars(bank) for bank in listed], default=str)),
            }
        )
        return
    console = _console(stderr=False)
    console.print(f"banks in {find_cache_folder()}: {len(listed)}", markup=False)
    for bank in listed:
        console.print(
            f"{bank.space}\n  {bank.n_images} images, {bank.n_bytes / 1e6:.1f} MB, {bank.folder}",
            markup=False,
        )


@app.command("run")
def run_command(
    source: Source,
    root: Root = None,
    out: Out = None,
    subjects: Subject = None,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every stage; what is already there is reused, and the reason told."""
    from braindecode_vis import pipeline

    _run_everything(_open(source, root, out, overrides, subjects), as_json, pipeline)


def _run_everything(run: pipeline.Run, as_json: bool, pipeline: Any) -> None:
    rows = pipeline.run_all(run)
    if not as_json:
        _print_scores(rows)
    _finish(run, as_json, f"report: {run.folder.path / 'report.html'}")


@app.command()
def phantom(
    form: Annotated[
        str, typer.Argument(metavar="FORMAT", help="Data set to imitate; a wrong name lists them.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the simulated data set.")],
    size: Annotated[str, typer.Option("--size", help="tiny, small, demo or full.")] = "small",
    subjects: Annotated[int | None, typer.Option("--subjects", min=1, help="Simulated people.")] = None,
    concepts: Annotated[int | None, typer.Option("--concepts", min=1, help="Training concepts.")] = None,
    exemplars: Annotated[
        int | None, typer.Option("--exemplars", min=1, help="Images of each of them.")
    ] = None,
    test_concepts: Annotated[
        int | None, typer.Option("--test-concepts", min=2, help="Test concepts.")
    ] = None,
    sessions: Annotated[
        int | None, typer.Option("--sessions", min=1, help="Sessions of each person.")
    ] = None,
    train_repetitions: Annotated[
        int | None, typer.Option(min=1, help="Times a training image is seen.")
    ] = None,
    test_repetitions: Annotated[int | None, typer.Option(min=1, help="Times a test image is seen.")] = None,
    snr: Annotated[
        float,
        typer.Option("--snr", min=0.0, max=1000.0, help="Signal power over noise power, single trials."),
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate people looking at images, in the files of a public data set, with the truth beside them."""
    from braindecode_vis import pipeline
    from braindecode_vis.checks import check_option
    from braindecode_vis.phantom import assemble

    check_option("FORMAT", form, assemble.FORMATS)
    check_option("--size", size, assemble.SIZES[form])
    changes = {
        "n_subjects": subjects, "n_train_concepts": concepts, "n_train_exemplars": exemplars,
        "n_test_concepts": test_concepts, "n_sessions": sessions, "train_repetitions": train_repetitions,
        "test_repetitions": test_repetitions,
    }  # fmt: skip
    given = {key: value for key, value in changes.items() if value is not None}
    chosen = assemble.change_size(form, assemble.SIZES[form][size], **given)
    estimate = assemble.estimate_phantom(form, chosen)
    cost = (
        f"{form}: {estimate.n_images} images, {estimate.n_trials} trials, {estimate.recording_s / 60:.1f} min "
        f"recorded; about {estimate.n_bytes / 1e6:.0f} MB on disk and {estimate.seconds / 60:.1f} min on one core "
        "beside the image encoder"
    )
    _console().print(cost, markup=False)
    if dry_run:
        if as_json:
            _print_json({"run_folder": None, "scores": [], "estimate": vars(estimate)})
        return
    truth = pipeline.make_phantom(form, out, size=chosen, snr=snr, seed=seed, listener=_ConsoleListener())
    if as_json:
        people = [dict(person) for person in truth.people]
        _print_json({"run_folder": None, "scores": [], "root": str(truth.root), "people": people})
        return
    console = _console(stderr=False)
    console.print(f"data set: {truth.root}", markup=False)
    console.print(f"truth: {truth.folder}", markup=False)
    for person in truth.people:
        bounds = ", ".join(f"{float(top):.3f} from {n} trials" for n, top in person["ideal_top1"].items())
        console.print(f"subject {person['subject']}: top-1 of an ideal observer {bounds}", markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("demo_run"),
    size: Annotated[
        str, typer.Option("--size", help="Size of the simulated data set: tiny, small or demo.")
    ] = "demo",
    snr: Annotated[
        float | None, typer.Option("--snr", min=0.0, max=1000.0, help="Signal power over noise power.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate EEG of a person looking at images and decode it: no data, no GPU and no network needed."""
    from braindecode_vis import pipeline
    from braindecode_vis.checks import check_option

    check_option("--size", size, ("tiny", "small", "demo"))
    level = pipeline.DEMO_SNR if snr is None else snr
    run, truth = pipeline.run_demo(out, size=size, snr=level, seed=seed, listener=_ConsoleListener())
    if not as_json:
        _print_scores(pipeline.read_scores(run.folder.path))
        ceiling = max(top for person in truth.people for top in person["ideal_top1"].values())
        _console(stderr=False).print(
            f"{truth.n_test} unseen concepts, chance of top-1 {truth.chance:.3f}; the noise would let an observer who "
            f"knows the simulated brain reach {ceiling:.3f}",
            markup=False,
        )
    _finish(run, as_json, f"report: {run.folder.path / 'report.html'}")


def _print_scores(rows: list[dict[str, Any]]) -> None:
    """Print one line per metric and subject: the decoded system, chance, and the best control beside it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    wide = console.width >= 110
    several = len({row["subject"] for row in rows}) > 1
    table = Table(title="Scores of the decoded system (95 % interval)", title_justify="left", box=SIMPLE_HEAD)
    for column in (*["subject"] * several, "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "interval", "chance", "p", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ["best control"] * wide:
        table.add_column(column, style="dim")
    for row in rows:
        if row["method"] != "decoded":
            continue
        cells = [
            *[row["subject"]] * several,
            row["metric"].replace("identification", "ident").replace("efficientnet", "effnet"),
            f"{row['value']:.3f}",
            "" if row["ci_low"] is None else f"{row['ci_low']:.3f}-{row['ci_high']:.3f}",
            "" if row["chance"] is None else f"{row['chance']:.3f}",
            "" if row["p_value"] is None else f"{row['p_value']:.4f}",
            str(row["n_queries"]),
            *[_describe_best_control(row, rows)] * wide,
        ]
        table.add_row(*cells)
    console.print(table)


def _describe_best_control(decoded: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return name and value of the control that does best, the oracle apart."""
    rivals = [
        row
        for row in rows
        if row["method"] not in ("decoded", "oracle")
        and (row["metric"], row["subject"]) == (decoded["metric"], decoded["subject"])
    ]
    if not rivals:
        return ""
    lower_is_better = decoded["metric"].startswith(("mse", "mean_rank", "median_rank"))
    best = (min if lower_is_better else max)(rivals, key=lambda row: row["value"])
    return f"{best['method']} {best['value']:.3f}"


_SYSTEM_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew past the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission was denied",
    errno.EPERM: "the operation is not permitted",
}


def main() -> None:
    """Run the command; an expected error is one sentence on standard error and exit code 2."""
    from braindecode_vis.checks import BraindecodeVisError

    debug = "--debug" in sys.argv
    try:
        app()
    except BraindecodeVisError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug or error.errno not in _SYSTEM_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        _fail(
            f"{_SYSTEM_ERRORS[error.errno]}{where}; finished stages are kept: make room or choose another folder "
            "with --out, then run the same command again."
        )


def _fail(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
