"""The verbs of many runs, sweeps, comparisons and boards; of pretraining and generators; and the demo."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.base.parts import ask_part
from braindecode_vis.cli.job_options import ClusterName, ClusterSet, DryRun, Wait, refuse_alone
from braindecode_vis.cli.show import (
    ConsoleListener,
    Debug,
    Json,
    MaybeRunOptions,
    Root,
    RunOptions,
    Set,
    Source,
    finish,
    make_console,
    make_table_console,
    print_json,
    print_scores,
    takes,
    training_together,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd


@takes()
def pretrain(
    where: MaybeRunOptions,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus", help="Folder of a corpus for the pretraining, made by the verb corpus. Repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Pretrain the whole-cortex encoder without labels.

    The weights are for encoder.network.pretrained.

    On the responses of a configuration, or on corpora; without a configuration, --set names settings of pretrain
    (--set n_epochs=50) and seed. All processes that torchrun started train together.
    """
    from braindecode_vis.parts.studies.pretrain import pretrain as pretrain_run
    from braindecode_vis.parts.studies.pretrain import pretrain_together

    if where.source is None:
        _pretrain_alone(corpus, where, as_json)
        return
    if corpus:
        chosen = f"pretrain.corpus={json.dumps([str(path) for path in corpus])}"
        where = replace(where, overrides=[*(where.overrides or []), chosen])
    run = where.open()
    with training_together(run, pretrain_together):
        folder = pretrain_run(run)
        if as_json:
            print_json({"run_folder": str(run.folder.path), "scores": [], "pretrained": str(folder)})
            return
        make_console(stderr=False).print(
            f"pretrained encoder: {folder}\nuse it with --set encoder.network.pretrained={folder}",
            markup=False,
        )


def _pretrain_alone(corpus: list[Path] | None, where: MaybeRunOptions, as_json: bool) -> None:
    """Pretrain on corpora without a configuration."""
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.base.devices import count_launched, forget_launch, is_first, leave
    from braindecode_vis.config.source import apply_override, read_override
    from braindecode_vis.parts.studies.pretrain import pretrain_on_corpora
    from braindecode_vis.pipeline.runs import SilentListener

    out = where.out
    if not corpus or out is None:
        raise ConfigError(
            "pretrain needs a configuration, a run folder or a data set, or --corpus DIR and --out FOLDER."
        )
    if where.root is not None or where.subjects:
        raise ConfigError("--root and --subject apply to a data set, not to a corpus; leave them out.")
    changes: dict[str, object] = {}
    for text in where.overrides or []:
        parts, value = read_override(text)
        # as in a configuration, too
        apply_override(
            changes, text, parts[1:] if parts[0] == "pretrain" and len(parts) > 1 else parts, value
        )
    seed = changes.pop("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}, but should be a whole number from 0.")
    if count_launched() == 1:
        forget_launch()
    first = is_first()
    reached = pretrain_on_corpora(
        changes, corpus, out, seed=seed, listener=ConsoleListener() if first else SilentListener()
    )
    if first and as_json:
        print_json({"run_folder": None, "scores": [], "pretrained": str(out), "reached": reached})
    elif first:
        make_console(stderr=False).print(
            f"{_describe_reached(reached)}\npretrained encoder: {out}\n"
            f"use it with --set encoder.network.pretrained={out}",
            markup=False,
        )
    if count_launched() > 1:
        leave()


def _describe_reached(reached: dict[str, Any]) -> str:
    """Return a line on the held-out error, and one on the last probes."""
    text = f"held-out error {reached['held_out']:.4f} in epoch {reached['epoch']}"
    if reached["mean_baseline"] is not None:
        text += f" (predicting the mean: {reached['mean_baseline']:.4f})"
    probes = reached.get("probes", {})
    parts = [
        f"{name} {probes[name]:.3f} (chance {probes[name + '_chance']:.3f})"
        for name in probes
        if probes.get(name) is not None and f"{name}_chance" in probes
    ]
    return text + (f"\nprobes: {', '.join(parts)}" if parts else "")


@takes("trust_code", "allow_download", "debug")
def train_generator(
    out: Annotated[Path, typer.Option("--out", help="Folder of the training.")],
    source: Annotated[
        str | None,
        typer.Argument(
            help="Train on the training images of this run; without it, phantom images are drawn."
        ),
    ] = None,
    root: Root = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting of the training, for example n_images=20000. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed.")] = 2026,
    as_json: Json = False,
) -> None:
    """Train the embedded image generator.

    An interrupted training goes on where it stopped.
    """
    from braindecode_vis.config.source import read_override
    from braindecode_vis.parts.studies.train_generator import train_on_phantom, train_on_run

    changes = {}
    for text in settings or []:
        parts, value = read_override(text)
        changes[".".join(parts)] = value
    listener = ConsoleListener()
    with listener.watch("generator:") as show:

        def progress(stage: str, done: int, wanted: int) -> None:
            show(done, wanted, f"{stage} {done}/{wanted}")

        if source is None:
            weights = train_on_phantom(out, changes, seed=seed, progress=progress)
        else:
            run = RunOptions(source, root).open()
            weights = train_on_run(run, out, changes, seed=seed, progress=progress)
    if as_json:
        print_json({"run_folder": None, "scores": [], "weights": str(weights)})
        return
    make_console(stderr=False).print(
        f"weights: {weights}\nuse them with --set generator.kind=latent_diffusion --set generator.weights={weights}",
        markup=False,
    )


@takes("trust_code", "allow_download", "debug")
def sweep(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep.")],
    over: Annotated[
        list[str],
        typer.Option(
            "--over", help="A setting and its values, for example seed=0,1,2 or seed=0..4. Repeatable."
        ),
    ],
    root: Root = None,
    overrides: Set = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="How many runs at the same time.")] = 1,
    cluster: ClusterName = None,
    cluster_set: ClusterSet = None,
    wait: Wait = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run every combination of some settings.

    Runs work in parallel and give one table. An interrupted sweep goes on.

    With --cluster each run that is missing becomes a job.
    """
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.parts.studies.sweep import parse_axes
    from braindecode_vis.parts.studies.sweep import sweep as run_sweep

    axes = parse_axes(over)
    table: pd.DataFrame | None
    if cluster is not None:
        if jobs != 1:
            raise ConfigError(
                "--jobs applies to runs of this process; use --cluster-set parallel=N with --cluster."
            )
        table = ask_part("send_sweep")(
            source, axes, out, overrides or [], root, cluster, cluster_set or [], wait, as_json, dry_run
        )
        if table is None:
            return
    else:
        refuse_alone(cluster_set, wait, dry_run=dry_run)
        table = run_sweep(
            source, axes, out, overrides=overrides or [], root=root, n_jobs=jobs, listener=ConsoleListener()
        )
    # Runs that failed stand in the table too, so that nobody averages over fewer seeds unawares.
    if as_json:
        rows = json.loads(table.to_json(orient="records"))
        failed = sorted(set(table[table["error"] != ""]["run"]))
        print_json({"run_folder": str(out), "scores": rows, "failed": failed})
        return
    print_sweep(table, list(axes), out)


def print_sweep(table: pd.DataFrame, keys: list[str], out: Path) -> None:
    """Print the summary of a sweep, and which of its runs failed."""
    from braindecode_vis.parts.studies.sweep import summarise

    shown = summarise(table, keys).drop(columns=["ci_low", "ci_high"], errors="ignore")
    shown.columns = [str(name).rsplit(".", 1)[-1] for name in shown.columns]
    print_table(shown, "Mean over seeds of the decoded system")
    console = make_console(stderr=False)
    for run, message in table[table["error"] != ""][["run", "error"]].itertuples(index=False):
        console.print(f"{run} failed: {message}", markup=False)
    names = ", ".join(str(out / f"{name}.csv") for name in ("sweep", "summary", "settings"))
    console.print(f"{table.attrs.get('selection', '')}\ntables: {names}".strip(), markup=False)
    console.print(f"to make a page of them: braindecode-vis board {out}", markup=False)


@takes()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the others are compared with the first.")],
    out: Annotated[Path | None, typer.Option("--out", help="CSV file for the table.")] = None,
    population: Annotated[
        str | None,
        typer.Option(
            "--population",
            help="What differences generalise to if there are several subjects: both (other subjects and "
            "images; the default from three subjects on), images (other images, these subjects) or "
            "subjects (other subjects, these images).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of resamples and sign flips.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare runs on the same test items.

    Gives paired intervals and corrected p-values.
    """
    from braindecode_vis.base.checks import ConfigError, check_option
    from braindecode_vis.base.store import replace_atomically
    from braindecode_vis.parts.studies.compare import compare_runs, describe_comparison
    from braindecode_vis.scoring.score_row import format_p_value, name_population

    if population is not None:
        check_option("--population", population, ("both", "images", "subjects"))

    if out is not None and out.is_dir():
        raise ConfigError(f"{out} is a folder; give a CSV file with --out.")
    try:  # before the comparison, which may take minutes
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror}); choose another with --out."
        ) from error
    table = compare_runs(runs, population=population, seed=seed)  # type: ignore[arg-type]  # checked above
    if out is not None:
        with replace_atomically(out) as temporary:
            table.to_csv(temporary, index=False)
    if as_json:
        print_json(
            {"run_folder": None, "scores": [], "comparison": json.loads(table.to_json(orient="records"))}
        )
        return
    # Folder names are shorter, but two runs may have the same one.
    unique = len({path.name for path in runs}) == len(runs)
    shown = table[["metric", "value", "reference_value", "difference"]]
    reference = runs[0].name if unique else str(runs[0])
    if reference in {*shown, "run", "interval", "p", "n"}:  # a folder may be called like a column
        reference = f"{reference}/"
    shown = shown.rename(columns={"reference_value": reference})
    shown.insert(0, "run", [Path(name).name if unique else name for name in table["run"]])
    bounds = table[["ci_low", "ci_high"]].to_numpy(float)
    shown = shown.assign(
        interval=["" if isnan(low) else f"{low:.3g} to {high:.3g}" for low, high in bounds],
        p=["" if isnan(p) else format_p_value(p) for p in table["p_holm"]], n=table["n_items"],
    )  # fmt: skip
    print_table(shown, f"Difference to {runs[0]} (95 % interval, Holm-corrected p)")
    console = make_console(stderr=False)
    for words in dict.fromkeys(table["resampled"]):
        of = name_population(words)
        console.print(f"{words}: differences apply to {of}." if of else f"{words}.", markup=False)
    for sentence in describe_comparison(table):
        console.print(sentence, markup=False)


def board(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders that contain runs at any depth.")
    ] = None,
    entries: Annotated[
        Path | None,
        typer.Option(
            "--entries",
            help="Instead of runs: folder of entries that submit sealed; makes a site of all tracks.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File of the page; by default board.html in the first folder. Of --entries the folder of the site; by "
            "default board.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference", help="Run to compare the others with; the first finished one by default."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of resamples and sign flips.")] = 0,
    log: Annotated[
        list[str] | None,
        typer.Option(
            "--log", help="Also send settings and scores to tensorboard (HParams) or wandb. Repeatable."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put many runs on one page, board.html.

    The page has a table that sorts and filters, paired differences, and settings over seeds.

    Settings are pooled over subjects and seeds, drawn as parallel coordinates, and the best is chosen by validation
    scores alone. experiment.json beside it holds the rows of runs, settings.csv those of settings.

    With --entries it writes a site: tracks, entries, history, and entries.json.
    """
    from braindecode_vis.base.checks import ConfigError, check_option, require
    from braindecode_vis.parts.studies.board import describe_rows, log_board, make_board

    if entries is not None:
        if folders or reference or log:
            raise ConfigError("--entries takes no runs, no --reference and no --log.")
        _make_site(entries, Path("board") if out is None else out, as_json)
        return
    if not folders:
        raise ConfigError("board needs run folders, or --entries DIR.")
    for tracker in log or []:  # before the page is made
        check_option("--log", tracker, ("tensorboard", "wandb"))
        require(tracker, f"board --log {tracker}")

    page = folders[0] / "board.html" if out is None else out
    if page.is_dir():
        raise ConfigError(f"{page} is a folder; give an HTML file with --out.")
    try:
        rows = make_board(folders, page, reference=reference, seed=seed)
    except OSError as error:
        place = Path(error.filename or page).absolute()
        written = page.absolute().is_relative_to(place) or place.name.startswith(".tmp-")
        if isinstance(error, PermissionError) and not written:
            raise  # of a run, which is only read
        raise ConfigError(
            f"{page} cannot be written ({error.strerror}); choose another with --out."
        ) from error
    logged = {tracker: str(log_board(rows, tracker, page.parent)) for tracker in log or []}
    if as_json:
        listed = [row.as_json() for row in rows]
        print_json({"run_folder": None, "scores": [], "board": str(page), "runs": listed, "logged": logged})
        return
    print_table(describe_rows(rows), f"{len(rows)} runs" if len(rows) != 1 else "1 run")
    make_console(stderr=False).print(
        f"board: {page}\nrows: {page.with_name('experiment.json')}, {page.with_name('settings.csv')}"
        + "".join(f"\n{tracker}: {place}" for tracker, place in logged.items()),
        markup=False,
    )


def _make_site(entries: Path, out: Path, as_json: bool) -> None:
    """Write the site of entries and print where it is."""
    from braindecode_vis.parts.studies.judging.entry_board import make_entry_board

    listed = make_entry_board(entries, out)
    if as_json:
        print_json({"run_folder": None, "scores": [], "board": str(out / "index.html"), "entries": listed})
        return
    n = len(listed)
    make_console(stderr=False).print(
        f"{n} {'entry' if n == 1 else 'entries'}\nboard: {out / 'index.html'}\nrows: {out / 'entries.json'}",
        markup=False,
    )


def print_table(frame: pd.DataFrame, title: str) -> None:
    """Print a table with its title on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in frame.columns:
        table.add_column(str(column), overflow="fold", no_wrap=str(column) not in ("run", "error", "verdict"))
    for row in frame.itertuples(index=False):
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        table.add_row(
            *[cell.replace("identification", "ident").replace("efficientnet", "effnet") for cell in cells]
        )
    make_table_console().print(table)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("demo_run"),
    size: Annotated[
        str, typer.Option("--size", help="Size of the simulated data set: tiny, small or demo.")
    ] = "demo",
    snr: Annotated[
        float | None, typer.Option("--snr", min=0.0, max=1000.0, help="Signal power over noise power.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Root seed.")] = 0,
    drive: Annotated[
        str | None,
        typer.Option(
            "--drive",
            help="What higher regions of the simulated brain respond to; mixture by default, which the "
            "decoder's target does not contain.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Simulate EEG of a subject and decode it.

    Needs no data, no GPU and no network.
    """
    from braindecode_vis.base.checks import check_option
    from braindecode_vis.parts.phantom import DRIVES
    from braindecode_vis.parts.studies import demo as simulation
    from braindecode_vis.pipeline.runs import read_scores

    check_option("--size", size, ("tiny", "small", "demo"))
    drive = drive or simulation.DEMO_DRIVE
    check_option("--drive", drive, DRIVES)
    level = simulation.DEMO_SNR if snr is None else snr
    run, truth = simulation.run_demo(
        out, size=size, snr=level, seed=seed, drive=drive, listener=ConsoleListener()
    )
    if not as_json:
        print_scores(read_scores(run.folder.path))
        ceiling = max(top for subject in truth.subjects for top in subject["ideal_top1"].values())
        make_console(stderr=False).print(
            f"{truth.n_test} unseen concepts of computer-drawn pictures, chance of top-1 {truth.chance:.3f}; the noise "
            f"would let an observer who knows the simulated brain reach {ceiling:.3f}. Higher regions of the simulated "
            f"brain follow {drive}: {DRIVES[drive]}.",
            markup=False,
        )
    finish(run, as_json, f"report: {run.folder.path / 'report.html'}")
