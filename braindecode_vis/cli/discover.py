"""Verbs that list and describe data sets, configurations, and the settings of every component."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import (
    Debug,
    Json,
    Root,
    complete,
    complete_configs,
    complete_datasets,
    describe_missing,
    make_console,
    make_records,
    print_json,
)

if TYPE_CHECKING:
    from braindecode_vis.base.settings import NeededWeights
    from braindecode_vis.config.explain import Explanation
    from braindecode_vis.datasets.manifests import Manifest, ManifestPart


def datasets(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name of one data set, to show everything about it.", autocompletion=complete_datasets
        ),
    ] = None,
    root: Root = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the data sets, or describe one.

    The page of one data set shows where to get it, what is on disk, and which phantom simulates it.
    """
    from braindecode_vis.cli import catalogue
    from braindecode_vis.datasets.manifests import describe_source, read_manifest

    if name is not None:
        read_manifest(name)  # names the nearest where there is none
    found = [entry for entry in catalogue.list_datasets(root) if name in (None, entry[0].name)]
    if as_json:
        listed = [
            {**manifest.model_dump(mode="json"), "where": describe_source(manifest), "on_disk": presence}
            for manifest, presence in found
        ]
        print_json({"run_folder": None, "scores": [], "datasets": listed})
        return
    if name is not None:
        (manifest, presence) = found[0]
        _print_dataset(manifest, describe_source(manifest), presence)
        return
    rows = [
        (m.name, m.modality, _count_subjects(m), _shorten(presence) if root else None, m.title)
        for m, presence in found
    ]
    print_table(("name", "modality", "subjects", "on disk" if root else None, "title"), rows)
    console = make_console(stderr=False)
    console.print("To see one of them in full: braindecode-vis datasets NAME", markup=False)
    console.print(
        "Simulated files: braindecode-vis phantom NAME --out DIR, then --root DIR",
        markup=False,
    )


def _count_subjects(manifest: Manifest) -> str:
    return str(manifest.subjects) if manifest.subjects else "any"


def _shorten(presence: str) -> str:
    return presence.partition(" in ")[0].partition(";")[0].replace("no list of files", "see check")


def _print_dataset(manifest: Manifest, source: str, presence: str) -> None:
    subjects = f"{_count_subjects(manifest)} subject{'' if manifest.subjects == 1 else 's'}"
    phantoms = [f"braindecode-vis phantom {form} --out DIR, then --root DIR" for form in manifest.phantoms]
    facts = [f"{key.replace('_', ' ')}: {value}" for key, value in manifest.facts.items()]
    lines: list[tuple[str, Iterable[str]]] = [
        (manifest.name, [manifest.title]),
        ("what", [manifest.summary]),
        ("modality", [f"{manifest.modality}, {subjects}; {manifest.stimuli}"]),
        ("on disk", [presence]),
        ("from", [source]),
        ("to fetch", [_describe_part(part) for part in manifest.parts]),
        ("command", [_write_fetch(manifest)]),
        ("licence", [manifest.licence]),
        ("terms", [manifest.gate or ""]),
        ("cite", [manifest.citation]),
        ("declared", facts),
        ("notes", manifest.notes),
        (
            "configurations",
            [", ".join(config["name"] for config in _read_configs() if config["dataset"] == manifest.name)],
        ),
        ("without its files", phantoms),
        ("settings", [f"braindecode-vis describe dataset.{manifest.name}"]),
    ]
    console = make_console(stderr=False)
    for label, texts in lines:
        for text in filter(None, texts):
            console.print(f"{label}: {text}", markup=False)


def _write_fetch(manifest: Manifest) -> str:
    """Return the line that fetches the first subject of a data set, or an empty text if it is fetched by hand."""
    parts = [part for part in manifest.parts if part.default and part.access != "by_hand"]
    subjects = [subject for part in parts for subject in part.list_subjects()]
    words = [
        "braindecode-vis fetch",
        manifest.name,
        f"--subject {subjects[0]}" if len(set(subjects)) > 1 else "",
        "--root DIR",
        "--accept-terms" if any(part.access == "terms" for part in parts) else "",
    ]
    return " ".join(filter(None, words)) if parts else ""


def _describe_part(part: ManifestPart) -> str:
    from braindecode_vis.base.memory import describe_bytes

    size = part.count_bytes()
    subjects = len(part.list_subjects())
    about = [
        "size shown when it is fetched" if size is None else describe_bytes(size),
        f"{subjects} subjects" if subjects else "",
        "" if part.default or part.access == "by_hand" else f"with --parts {part.name}",
        {"open": "", "terms": "needs --accept-terms", "by_hand": "by hand"}[part.access],
        f"{part.mark} address" if part.access != "by_hand" else "",
    ]
    words = (
        f"{part.name}, {part.what} ({', '.join(filter(None, about[1 if part.access == 'by_hand' else 0 :]))})"
    )
    return f"{words}: {part.gate.strip()}" if part.gate else words


# --- configurations -------------------------------------------------------------------------------------------


def _read_configs() -> list[dict[str, Any]]:
    """Return name, data set, modality, split and header of every shipped configuration, without validating it."""
    from dataclasses import asdict

    from braindecode_vis.config import list_shipped, read_header
    from braindecode_vis.datasets.manifests import find_manifest

    found = []
    for path in list_shipped().values():
        content = _read_plain(path)
        kind = content["dataset"]["kind"]
        encoder = content.get("encoder", {"kind": "ridge"})
        found.append(
            {
                "name": path.stem, "path": str(path), "dataset": kind, "modality": find_manifest(kind).modality,
                "encoder": encoder.get("network", encoder)["kind"], **asdict(read_header(path)),
            }
        )  # fmt: skip
    return found


def _read_plain(path: Path) -> Any:
    """Return the content of a configuration, without validating it."""
    import yaml

    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def configs(
    name: Annotated[
        str | None,
        typer.Argument(help="Name of one configuration, to print its file.", autocompletion=complete_configs),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", help="List only configurations of this data set.", autocompletion=complete_datasets
        ),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(
            "--modality",
            help="List only configurations of this modality: eeg, meg, fmri or spikes.",
            autocompletion=lambda incomplete: complete(("eeg", "meg", "fmri", "spikes"), incomplete),
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            "--paper",
            help="List only configurations whose source contains this, for example "
            "an author or an arXiv number.",
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of a configuration, for editors.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the shipped configurations, or print one of them.

    The list can be limited to a data set, a modality or a paper.
    """
    from braindecode_vis.base.checks import ConfigError, check_option

    if (name is not None or schema) and any(given is not None for given in (dataset, modality, paper)):
        raise ConfigError(
            "--dataset, --modality and --paper filter the list and do not go with a name; leave one of the two out."
        )
    if schema:
        if name is not None:
            raise ConfigError(f"--schema prints one schema for every configuration; leave {name} out.")
        from braindecode_vis.config.explain import make_schema

        print_json(make_schema())
        return
    if name is not None:
        from braindecode_vis.config import find_config

        typer.echo(find_config(name).read_text(), nl=False)
        return
    found = _read_configs()
    for label, given, key in (("--dataset", dataset, "dataset"), ("--modality", modality, "modality")):
        if given is not None:
            check_option(label, given, sorted({str(config[key]) for config in found}))
            found = [config for config in found if config[key] == given]
    if paper is not None:
        found = [
            config for config in found if paper.lower() in f"{config['source']} {config['about']}".lower()
        ]
        if not found:
            raise ConfigError(
                f"no configuration follows a paper that names {paper!r}; leave --paper out to see all."
            )
    if as_json:
        print_json({"run_folder": None, "scores": [], "configs": found})
        return
    print_table(
        ("name", "modality", "encoder", "what"),
        [(c["name"], c["modality"], c["encoder"], c["about"]) for c in found],
    )
    console = make_console(stderr=False)
    console.print(
        "To see which paper one follows: braindecode-vis describe NAME. To print its file: configs NAME",
        markup=False,
    )


# --- what a name stands for -----------------------------------------------------------------------------------


def describe(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A configuration; or, to list settings, a role (network), a kind (atm_s, network.atm_s), "
            "a key (repeats.test, subject_alignment) or run.",
            autocompletion=lambda incomplete: [*complete_configs(incomplete), *_complete_kinds(incomplete)],
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain a configuration, or a kind and its settings.

    For a configuration, shows which paper it follows, where it differs, and how to run it.

    Without a name, lists the roles of a run.
    """
    from dataclasses import asdict

    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.config import find_config, list_shipped, read_header
    from braindecode_vis.config.explain import ROLES, explain
    from braindecode_vis.datasets.manifests import find_manifest

    if name is None:
        if as_json:
            print_json({"run_folder": None, "scores": [], "roles": ROLES})
            return
        print_table(("role", "what"), ROLES.items())
        make_console(stderr=False).print(
            "To list the kinds of a role: braindecode-vis describe ROLE. To list all settings of a run: "
            "describe run. To explain one setting: describe repeats.test. To see which paper a configuration follows: "
            "describe NAME (configs lists the names).",
            markup=False,
        )
        return
    try:
        path = find_config(name)
    except ConfigError:
        # What has folders or an ending is meant as a file, and everything else may be a kind.
        if "/" in name or name.endswith((".yaml", ".yml")):
            raise
        path = None
    if path is None:
        found = explain(name, besides=complete_configs(""))
        if as_json:
            print_json({"run_folder": None, "scores": [], "explained": [asdict(entry) for entry in found]})
        else:
            for entry in found:
                print_explanation(entry)
        return
    weights, unknown = _read_weights(path)
    header = read_header(path)
    if not header.about:
        raise ConfigError(
            f"{path} has no header that explains it; begin the file with comment lines (# ...) that say what it is. "
            "Its settings: braindecode-vis configs NAME for a shipped one, or the file itself."
        )
    if as_json:
        print_json(
            {
                "run_folder": None,
                "scores": [],
                "config": str(path),
                **asdict(header),
                "weights": None if unknown else make_records(weights),
            }
        )
        return
    console = make_console(stderr=False)
    console.print(f"{path.stem}: {header.about}", markup=False)
    for label, text in (("source", header.source), ("as published", header.as_published)):
        if text:
            console.print(f"{label}: {text}", markup=False)
    for label, entries in (("same as published", header.same), ("departs", header.departs)):
        for text in [f"{label}:" for _ in entries[:1]] + [f"  - {entry}" for entry in entries]:
            console.print(text, markup=False)
    for text in [f"weights: unknown, since {unknown}"] if unknown else describe_missing(weights):
        console.print(text, markup=False)
    if any(one.path is None for one in weights):
        console.print(f"commands that fetch them: braindecode-vis weights list {name}", markup=False)
    if path in list_shipped().values():
        manifest = find_manifest(_read_plain(path)["dataset"]["kind"])
        root = " --root DIR" if manifest.needs_files else ""
        console.print(f"data: braindecode-vis datasets {manifest.name}", markup=False)
        console.print(f"to run: braindecode-vis run {path.stem}{root}", markup=False)


def _read_weights(path: Path) -> tuple[list[NeededWeights], str]:
    """Return the weights that a configuration needs, or none and why they are not known."""
    from braindecode_vis.base.checks import BraindecodeVisError
    from braindecode_vis.config import list_weights, read_config

    try:
        return list_weights(read_config(path)), ""
    except (
        BraindecodeVisError
    ) as error:  # code from outside without consent, or a package that is not installed
        return [], str(error)


def print_explanation(found: Explanation) -> None:
    """Print what a name means."""
    console = make_console(stderr=False)
    console.print(f"{found.name}: {found.about}", markup=False)
    if found.kinds:
        print_table(("kind", "what"), found.kinds)
        console.print(
            f"To list the settings of a kind: braindecode-vis describe {found.name}.KIND", markup=False
        )
    shown = ""
    for option, after in zip(found.options, [*found.options[1:], None], strict=False):
        start = "" if option.text == shown else "\n"  # several options may share their description
        console.print(f"{start}{option.name}: {option.type}, by default {option.default}", markup=False)
        shown = option.text
        if after is None or after.text != shown:
            console.print(f"    {option.text}", markup=False)


def _complete_kinds(incomplete: str) -> list[str]:
    from braindecode_vis.base.registry import ROLES, list_inside

    kinds = [f"{role}.{kind}" for role in ROLES for kind in list_inside(role)]
    return complete(("run", *ROLES, *kinds), incomplete)


def print_table(columns: Sequence[str | None], rows: Iterable[Sequence[str | None]]) -> None:
    """Print rows as wide as the terminal; only the last column is broken into lines. None leaves a column out.

    If the last column would be narrow, it is printed below the others.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table

    # Not `make_console`: a table needs the width of the terminal, which soft wrapping ignores.
    console = Console(highlight=False, markup=False)
    kept = [number for number, column in enumerate(columns) if column is not None]
    cells = [[str(row[number]) for number in kept] for row in rows]
    taken = sum(max(map(len, column), default=0) + 3 for column in list(zip(*cells, strict=True))[:-1])
    if console.width - taken < 36:
        for *first, last in cells:
            console.print("  ".join(first))
            console.print(Padding(last, (0, 0, 0, 4)))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number in kept:
        last_column = number == kept[-1]
        table.add_column(columns[number] or "", overflow="fold", no_wrap=not last_column)
    for row in cells:
        table.add_row(*row)
    console.print(table)
