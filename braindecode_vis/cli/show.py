"""Code that all verbs share: options, opening a run, and printing of progress, scores and results."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from braindecode_vis.pipeline.progress import ConsoleListener as ConsoleListener
from braindecode_vis.pipeline.progress import make_console as make_console

if TYPE_CHECKING:
    from rich.console import Console

    from braindecode_vis.base.settings import NeededWeights
    from braindecode_vis.config import RunConfig
    from braindecode_vis.pipeline.runs import Run


def complete_configs(incomplete: str) -> list[str]:
    """Return the shipped configurations that start with `incomplete`; the shell completes files."""
    return _complete_files("configs", incomplete)


def complete_datasets(incomplete: str) -> list[str]:
    """Return the data sets that start with `incomplete`."""
    return _complete_files("data_manifests", incomplete)


def _complete_files(folder: str, incomplete: str) -> list[str]:
    from braindecode_vis.datasets.manifests import find_package_data

    return sorted(path.stem for path in find_package_data(folder).glob(f"{incomplete}*.yaml"))


def complete_analyses(incomplete: str) -> list[str]:
    """Return the kinds of analyses that start with `incomplete`."""
    from braindecode_vis.base.registry import list_inside

    return complete(list_inside("analysis"), incomplete)


def complete_weights(incomplete: str) -> list[str]:
    """Return the published weights that start with `incomplete`."""
    from braindecode_vis.embeddings.published import read_models

    return complete(read_models(), incomplete)


def complete(words: Iterable[str], incomplete: str) -> list[str]:
    """Return the words that start with `incomplete`."""
    return [word for word in words if word.startswith(incomplete)]


SOURCE = typer.Argument(
    help="A configuration file, a run folder, or the name of a data set or shipped configuration.",
    autocompletion=complete_configs,
)
Source = Annotated[str, SOURCE]
Root = Annotated[Path | None, typer.Option("--root", help="Folder of the data set.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME by default.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting, for example seed=1. Repeatable.")
]
Track = Annotated[
    str | None,
    typer.Option("--track", help="Instead of a configuration: that of a track; tracks lists them."),
]
Subject = Annotated[list[str] | None, typer.Option("--subject", help="Read this subject only. Repeatable.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
]


def _give(context: typer.Context, value: Any, **consent: Any) -> Any:
    from braindecode_vis.base.consent import give_consent

    context.with_resource(give_consent(**consent))  # until the verb has ended
    return value


def _trust_code(context: typer.Context, value: list[str] | None) -> Any:
    return _give(context, value, code=value or ())


def _allow_download(context: typer.Context, value: bool) -> Any:
    return _give(context, value, download=value)


TrustCode = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code",
        callback=_trust_code,
        help="Allow the code of this module or package to run if a file names it as a kind. Repeatable.",
    ),
]
AllowDownload = Annotated[
    bool,
    typer.Option(
        "--allow-download",
        callback=_allow_download,
        help="Fetch the published weights that are needed and not on this machine.",
    ),
]


def _verify(context: typer.Context, value: bool) -> bool:
    if value:
        from braindecode_vis.base.digests import hash_anew

        context.with_resource(hash_anew())  # until the verb has ended
    return value


Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        callback=_verify,
        help="Read every input and artifact again, even if a file looks unchanged.",
    ),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile", help="Print what each stage used: time, processor time, memory, bytes read and written."
    ),
]
Worker = Annotated[
    int | None,
    typer.Option(
        "--worker", help="Number of this worker, from 0; it does its share of the work of --workers."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="How many processes, started at once, share the work of one run folder."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Group = TypeVar("Group")
#: Options that act by themselves, with their defaults; `takes` adds them to a verb, which is not given them.
_ACTING: dict[str, tuple[Any, Any]] = {
    "trust_code": (TrustCode, None),
    "allow_download": (AllowDownload, False),
    "verify": (Verify, False),
    "debug": (Debug, False),
}


@dataclass(frozen=True)
class RunOptions:
    """The run that a verb works on, as the options give it."""

    source: Source
    root: Root = None
    out: Out = None
    subjects: Subject = None
    overrides: Set = None

    def open(self, *, holds: bool = True) -> Run:
        """Return the run; by default its folder is locked until the verb ends."""
        from braindecode_vis.base.devices import is_first
        from braindecode_vis.pipeline.runs import SilentListener, open_run

        config, out = self.find()
        run = open_run(config, out, ConsoleListener() if is_first() else SilentListener())
        if holds and is_first():  # others of the same training follow it
            HELD.enter_context(run.hold())
        return run

    def find(self) -> tuple[RunConfig, Path]:
        """Return the configuration and the folder of the run, which may not exist yet."""
        from braindecode_vis.config import read_config
        from braindecode_vis.pipeline.runs import check_run_folder, refuse_other_settings

        out = self.out
        if out is not None:
            check_run_folder(out)
        config = read_config(self.source, self.list_changes(), root=self.root)
        refuse_other_settings(config, self.source)
        folder = Path(self.source).expanduser()
        # A run folder that is named as the source is continued where it is.
        if out is None:
            out = folder if (folder / "config.yaml").is_file() else Path("runs") / config.name
        if not (folder.is_dir() and out.expanduser().absolute() == folder.absolute()):
            _report_earlier_run(out.expanduser().absolute(), config)
        return config, out

    def list_changes(self) -> list[str]:
        """Return --subject and --set as changes of a configuration."""
        return list_overrides(self.overrides, self.subjects)


@dataclass(frozen=True)
class MaybeRunOptions(RunOptions):
    """The same for verbs that also do something without a run."""

    source: Annotated[str | None, SOURCE] = None  # type: ignore[assignment]


def pick(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Return the options of a group among those that were given to a verb."""
    return group(**{field.name: given[field.name] for field in fields(group) if field.name in given})  # type: ignore[arg-type]


def takes(*acting: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb options in groups.

    A parameter whose type is a dataclass becomes one option for each field.

    Parameters
    ----------
    acting
        General options that the verb takes in addition to its own: ``trust_code``, ``allow_download``,
        ``verify`` and ``debug``; by default all of them.
    """
    names = acting or tuple(_ACTING)

    def make(verb: Callable[..., None]) -> Callable[..., None]:
        kind = inspect.Parameter.KEYWORD_ONLY
        groups: dict[str, Any] = {}
        flat = []
        own = inspect.signature(verb, eval_str=True).parameters
        for each in own.values():
            if not is_dataclass(each.annotation):
                flat.append(each.replace(kind=kind))
                continue
            groups[each.name] = each.annotation
            types = get_type_hints(each.annotation, include_extras=True)
            for field in fields(each.annotation):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                flat.append(
                    inspect.Parameter(field.name, kind, default=default, annotation=types[field.name])
                )
        for name in names:
            annotation, default = _ACTING[name]
            flat.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

        defaults = {each.name: each.default for each in flat if each.default is not inspect.Parameter.empty}

        @functools.wraps(verb)
        def call(**given: Any) -> None:
            given = {**defaults, **given}
            for name, group in groups.items():
                given[name] = pick(group, given)
            verb(**{name: given[name] for name in own})

        call.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in flat}
        del call.__wrapped__
        return call

    return make


def strip_words(words: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """Return a command line without some options and their values."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif (name := word.partition("=")[0]) in options:
            skip = options[name] and "=" not in word
        else:
            kept.append(word)
    return kept


def refuse_lone_worker(worker: int | None, n_workers: int | None, *, launched: bool = False) -> None:
    """Raise `ConfigError` if only one of --worker and --workers is given, or if torchrun numbers the processes."""
    from braindecode_vis.base.checks import ConfigError

    if launched and (worker is not None or n_workers is not None):
        raise ConfigError("torchrun numbers its processes itself; leave out --worker and --workers.")
    if (worker is None) != (n_workers is None):
        raise ConfigError(
            "--worker and --workers belong together; give both, such as --worker 0 --workers 4, or --workers alone "
            "with --cluster."
        )


#: What a verb holds until it has ended.
HELD = ExitStack()


def make_table_console() -> Console:
    """Return a console on standard output for tables; in a file, no number is cut off at a right edge."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    return console


def describe_missing(needed: list[NeededWeights]) -> list[str]:
    """Return sentences that say how many of the networks that a run loads are missing, and how large they are."""
    from braindecode_vis.base.memory import describe_size, describe_total

    if not needed:
        return ["weights: none needed"]
    lines = []
    for optional in (False, True):
        absent = [one for one in needed if one.path is None and bool(one.leaves_out) == optional]
        if absent:
            size = describe_total([one.size for one in absent])
            names = ", ".join(f"{one.name or one.what} ({describe_size(one.size)})" for one in absent)
            rows = dict.fromkeys(", ".join(one.leaves_out for one in absent).split(", "))
            without = f"; a run without them leaves out {', '.join(rows)}" if optional else ""
            kind = "optional and not here" if optional else "missing"
            lines.append(f"weights {kind}, {size} together: {names}{without}")
    return lines or ["weights: all are here"]


def make_records(needed: list[NeededWeights]) -> list[dict[str, Any]]:
    """Return plain content about weights, with what to do where they are missing."""
    from dataclasses import asdict

    from braindecode_vis.base.store import json_plain
    from braindecode_vis.config.explain import list_steps

    return [
        json_plain(
            asdict(one)
            | {"here": one.path is not None, "fetch": list_steps([one]) if one.path is None else []}
        )
        for one in needed
    ]


def list_overrides(overrides: list[str] | None, subjects: list[str] | None) -> list[str]:
    """Return --subject and --set as changes of a configuration."""
    # Subjects first, so that --set dataset.subjects has the last word.
    chosen = [f"dataset.subjects=[{', '.join(subjects)}]"] if subjects else []
    return [*chosen, *(overrides or [])]


def _report_earlier_run(out: Path, config: RunConfig) -> None:
    """Refuse a folder with a run of other data; for other settings, report which ones change."""
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.pipeline.runs import list_changes, read_earlier

    earlier = read_earlier(out)
    if earlier is None:
        return
    before, now = (getattr(each.dataset, "root", None) for each in (earlier, config))
    # Data that were moved are the same data; a copy is taken for others while the first one is still there.
    elsewhere = before and now and before.absolute() != now.absolute() and before.exists()
    if earlier.dataset.kind != config.dataset.kind or elsewhere:
        raise ConfigError(
            f"{out} holds a run of other data ({before or earlier.dataset.kind}); choose another folder with --out, or "
            "delete that one."
        )
    try:
        changes = list_changes(earlier, config)
    except ConfigError:  # weights of a later stage are not there
        changes = list_changes(earlier, config, hashed=False)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        make_console(stderr=True).print(
            f"{out} holds a run with other settings, which change now: {', '.join(changes[:3])}{more}",
            markup=False,
        )


@contextmanager
def training_together(run: Run, train: Callable[[Run], None] | None = None) -> Iterator[None]:
    """Train together with the other processes that were launched, if any; then only the first one enters the block.

    `train` is `braindecode_vis.pipeline.together.train_together` if None.
    """
    from braindecode_vis.base.devices import count_launched, forget_launch, is_first, leave

    # torchrun leaves its variables in the environment even for one process.
    if count_launched() == 1:
        forget_launch()
        yield
        return
    from braindecode_vis.pipeline.together import train_together

    first = is_first()
    (train or train_together)(run)
    if first:
        yield
    leave()


def finish(run: Run, as_json: bool, message: str = "", *, profile: bool = False) -> None:
    """Print the folder of the run, or its scores as JSON, and on request what each stage used."""
    from braindecode_vis.pipeline.runs import read_run_scores

    rows = read_run_scores(run)
    if as_json:
        profiles = {"profile": run.folder.list_profiles()} if profile else {}
        print_json({"run_folder": str(run.folder.path), "scores": rows, **profiles})
        return
    console = make_console(stderr=False)
    if profile:
        print_profile(run)
    if message:
        console.print(message, markup=False)
    console.print(f"run folder: {run.folder.path}", markup=False)


def print_profile(run: Run) -> None:
    """Print what each stage used when it was computed, in this call or an earlier one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from braindecode_vis.base.memory import PROFILE, describe_profile

    table = Table(title="What each stage used when it was computed", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("stage", overflow="fold")
    for name in PROFILE:
        table.add_column(name, justify="right", no_wrap=True)
    for row in run.folder.list_profiles():
        table.add_row(row["stage"], *describe_profile(row))
    make_console(stderr=False).print(table)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")


def print_scores(rows: list[dict[str, Any]]) -> None:
    """Print one line per metric, subject and group of trials: the decoded system, chance, and the best control."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from braindecode_vis.scoring.score_row import describe_resampled, format_p_value

    console = Console(highlight=False)
    wide = console.width >= 110
    keys = [key for key in ("subject", "split") if len({row.get(key) for row in rows}) > 1]
    table = Table(
        title="Scores of the decoded system (95 % interval)", title_justify="left", box=SIMPLE_HEAD,
        caption=describe_resampled(rows), caption_justify="left",
    )  # fmt: skip
    for column in keys:
        table.add_column(column, no_wrap=True)
    table.add_column("metric", overflow="fold")  # gives way, so that no number is cut
    for column in ("value", "interval", "chance", "p", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ["best control"] * wide:
        table.add_column(column, style="dim")
    for row in rows:
        if row["method"] != "decoded":
            continue
        cells = [
            *[str(row.get(key) or "") for key in keys],
            row["metric"].replace("identification", "ident").replace("efficientnet", "effnet"),
            f"{row['value']:.3f}",
            "" if row["ci_low"] is None else f"{row['ci_low']:.3f}-{row['ci_high']:.3f}",
            _show_chance(row["chance"]),
            "" if row["p_value"] is None else format_p_value(row["p_value"]),
            str(row["n_queries"]),
            *[_describe_best_control(row, rows)] * wide,
        ]
        table.add_row(*cells)
    console.print(table)


def _show_chance(chance: float | None) -> str:
    if chance is None:
        return ""
    return f"{chance:.3f}" if chance >= 0.0005 else f"{chance:.1e}"  # of one in a million


def _describe_best_control(decoded: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return name and value of the best control, excluding the oracle."""
    from braindecode_vis.scoring.metrics.metric_registry import find_metric

    rivals = [
        row
        for row in rows
        if row["method"] not in ("decoded", "oracle")
        and all(row.get(key) == decoded.get(key) for key in ("metric", "subject", "split"))
    ]
    if not rivals:
        return ""
    # Errors are better when they are smaller.
    direction = find_metric(decoded["metric"]).metric.direction or 1
    best = max(rivals, key=lambda row: direction * row["value"])
    return f"{best['method']} {best['value']:.3f}"
