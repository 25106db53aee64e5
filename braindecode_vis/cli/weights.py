"""The verb ``weights``: lists published weights with size and licence, fetches and converts them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import (
    Debug,
    Json,
    Set,
    complete,
    complete_configs,
    complete_weights,
    describe_missing,
    make_console,
    make_records,
    print_json,
)

if TYPE_CHECKING:
    from braindecode_vis.base.settings import NeededWeights
    from braindecode_vis.embeddings.published import PublishedModel


ACTIONS = ("list", "fetch", "convert")


def weights(
    action: Annotated[
        str,
        typer.Argument(
            metavar="ACTION",
            help="list, fetch or convert.",
            autocompletion=lambda incomplete: complete(ACTIONS, incomplete),
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of weights, or one configuration for those that it needs; list shows all by default. For "
            "convert: a checkpoint or a folder.",
            autocompletion=lambda incomplete: [*complete_weights(incomplete), *complete_configs(incomplete)],
        ),
    ] = None,
    overrides: Set = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="For fetch: folder that gets one folder per model, for a machine without a network. For "
            "convert: folder to write.",
        ),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Convert to half precision, which needs half the space.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List, fetch or convert published weights.

    The list shows size, licence and revision of all weights that configurations name. With a configuration, list shows
    what this one needs and what is missing here, and fetch fetches what is missing.

    convert reads MindEye2's SDXL unCLIP (unclip6_epoch0_step110000.ckpt) for the generator token_unclip, or a folder
    of diffusers whose torch files hold tensors only, and writes safetensors into --to.
    """
    from braindecode_vis.base.checks import ConfigError, check_option
    from braindecode_vis.embeddings import published

    check_option("ACTION", action, ACTIONS)
    needed = None if action == "convert" else _find_needed(names or [], overrides or [])
    if overrides and needed is None:
        raise ConfigError("--set changes a configuration; name one, or leave --set out.")
    if half and action != "convert":
        raise ConfigError("--half is an option of weights convert.")
    if to is not None and action == "list":
        raise ConfigError("--to is an option of weights fetch and weights convert.")
    if action == "convert":
        _convert(names or [], to, half, as_json)
        return
    if needed is not None and action == "list":
        _list_needed(needed, as_json)
        return
    if needed is not None:
        # What a setting of the user's has to name lies in a folder of the user's, if it is asked for.
        names = [
            one.name
            for one in needed
            if one.name and one.path is None and (to or (one.automatic and not one.named))
        ]
        if not (names := list(dict.fromkeys(names))):
            if as_json:
                print_json({"run_folder": None, "scores": [], "fetched": {}})
            else:
                _print_missing(needed)
            return
    models = [
        published.read_model(name) for name in names or (published.read_models() if action == "list" else ())
    ]
    if action == "list":
        _list(models, as_json, in_full=bool(names))
        return
    if not models:
        raise ConfigError("weights fetch needs names: braindecode-vis weights list shows them.")
    found = _fetch(models, to, quiet=as_json)
    from braindecode_vis.config.explain import list_steps

    # Neither what was named wrongly nor what has to be named is fetched for a configuration.
    rest = [one for one in needed or () if one.path is None and one.name not in found and not one.leaves_out]
    for text in list_steps(rest):
        make_console().print(f"still missing: {text}", markup=False, soft_wrap=True)
    if as_json:
        print_json(
            {"run_folder": None, "scores": [], "fetched": {name: str(path) for name, path in found.items()}}
        )


def _find_needed(names: list[str], overrides: list[str]) -> list[NeededWeights] | None:
    """Return what a configuration needs, None if the names are those of weights."""
    from braindecode_vis.base.checks import ConfigError, suggest
    from braindecode_vis.config import find_config, list_shipped, list_weights, read_config
    from braindecode_vis.embeddings.published import read_models

    if len(names) > 1 and (given := next((name for name in names if name in list_shipped()), None)):
        raise ConfigError(f"{given} is a configuration: give it alone, without other names.")
    if len(names) != 1 or names[0] in read_models():
        return None
    try:
        find_config(names[0])
    except ConfigError as error:
        if "/" in names[0] or names[0].endswith((".yaml", ".yml")):
            raise
        raise ConfigError(
            f"{names[0]!r} is neither the name of weights nor a configuration"
            f"{suggest(names[0], [*read_models(), *list_shipped()])}; weights list shows the first, configs the second."
        ) from error
    return list_weights(read_config(names[0], overrides))


def _list_needed(needed: list[NeededWeights], as_json: bool) -> None:
    from braindecode_vis.base.memory import describe_size
    from braindecode_vis.cli.discover import print_table

    if as_json:
        print_json({"run_folder": None, "scores": [], "weights": make_records(needed)})
        return
    rows = []
    for one in needed:
        files = one.files[0] if len(one.files) == 1 else f"{len(one.files)} files"
        here = "yes" if one.path else "optional" if one.leaves_out else "no"
        licence, settings = one.licence.partition(",")[0], " and ".join(one.settings)
        rows.append((one.name or one.what, files, describe_size(one.size), licence, here, settings))
    if rows:
        print_table(("name", "files", "size", "licence", "here", "named by"), rows)
    _print_missing(needed)


def _print_missing(needed: list[NeededWeights]) -> None:
    from braindecode_vis.config.explain import list_steps

    console = make_console(stderr=False)
    for text in describe_missing(needed):
        console.print(text, markup=False, soft_wrap=True)
    absent = [one for one in needed if one.path is None]
    for number, text in enumerate(list_steps(absent)):
        console.print(f"{'to fetch' if not number else 'and'}: {text}", markup=False, soft_wrap=True)


def _fetch(models: list[PublishedModel], to: Path | None, *, quiet: bool) -> dict[str, Path]:
    """Fetch models and return their folders; what comes, its size and the free space are printed first."""
    from braindecode_vis.base.memory import describe_bytes, describe_size
    from braindecode_vis.embeddings import published

    place = (to or published.find_cache_folder()).expanduser().absolute()
    above = next(folder for folder in (place, *place.parents) if folder.is_dir())
    console = make_console()
    for model in models:
        console.print(
            f"{model.name}: {describe_size(model.count_bytes())} from {model.describe_place()}; {model.licence}",
            markup=False,
        )
    known = sum(model.count_bytes() or 0 for model in models)
    console.print(
        f"together {describe_bytes(known)} or more; {describe_bytes(shutil.disk_usage(above).free)} free",
        markup=False,
    )
    found = {}
    for model in models:
        found[model.name] = published.fetch(model, to=None if to is None else to / model.name)
        if not quiet:
            needs_name = to is not None or bool(model.url) or model.named
            what = (
                f"name it with --set {model.option}=..." if needs_name else "it is found there automatically"
            )
            make_console(stderr=False).print(f"{model.name}: {found[model.name]}; {what}", markup=False)
    return found


def _convert(sources: list[str], to: Path | None, half: bool, as_json: bool) -> None:
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.generation.checkpoint_conversion import convert_folder, convert_unclip

    if len(sources) != 1 or to is None:
        raise ConfigError(
            "weights convert takes one checkpoint or folder and a new folder: braindecode-vis weights convert "
            "unclip6_epoch0_step110000.ckpt --to FOLDER."
        )
    source, folder, console = Path(sources[0]).expanduser(), to.expanduser(), make_console()
    if source.is_dir():
        if half:
            raise ConfigError("--half converts checkpoints; the weights of a folder keep their precision.")
        convert_folder(source, folder)
    else:
        convert_unclip(source, folder, half=half, tell=lambda words: console.print(words, markup=False))
    if as_json:
        print_json({"run_folder": None, "scores": [], "converted": str(folder)})
    else:
        make_console(stderr=False).print(f"{folder}; name it with --set generator.weights=...", markup=False)


def _list(models: list[PublishedModel], as_json: bool, *, in_full: bool) -> None:
    from braindecode_vis.base.memory import describe_size
    from braindecode_vis.cli.discover import print_table
    from braindecode_vis.embeddings.published import find_cached

    if as_json:
        listed: list[dict[str, Any]] = [
            {**model.model_dump(mode="json"), "on_this_machine": str(find_cached(model) or "")}
            for model in models
        ]
        print_json({"run_folder": None, "scores": [], "weights": listed})
        return
    console = make_console(stderr=False)
    if not in_full:
        rows = [
            (
                model.name, describe_size(model.count_bytes()), model.licence.partition(",")[0],
                "yes" if find_cached(model) else "", model.what,
            )
            for model in models
        ]  # fmt: skip
        print_table(("name", "size", "licence", "here", "what"), rows)
        console.print("To see one of them in full: braindecode-vis weights list NAME", markup=False)
        return
    for model in models:
        files = [
            f"{file.path}, {file.bytes or '?'} bytes, sha256 {file.sha256 or 'unknown'}"
            for file in model.files
        ]
        lines = [
            (model.name, [model.what]), ("needed by", [model.needed_by]),
            ("from", [f"{model.describe_place()} ({model.mark})"]), ("revision", [model.revision]), ("file", files),
            ("fetched", [", ".join(model.list_patterns())]), ("size", [describe_size(model.count_bytes())]),
            ("licence", [model.licence]), ("note", [model.note]),
            ("here", [str(find_cached(model) or "no")]), ("elsewhere", [f"--set {model.option}=PATH"]),
        ]  # fmt: skip
        for label, texts in lines:
            for text in filter(None, texts):
                console.print(f"{label}: {text}", markup=False)
