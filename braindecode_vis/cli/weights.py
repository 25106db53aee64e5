"""The verb ``weights``: lists published weights with size and licence, fetches and converts them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import Debug, Json, complete, complete_weights, make_console, print_json

if TYPE_CHECKING:
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
            help="Names of weights; list shows all by default. For convert: a checkpoint or a folder.",
            autocompletion=complete_weights,
        ),
    ] = None,
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

    The list shows size, licence and revision of all weights that configurations name.

    convert reads MindEye2's SDXL unCLIP (unclip6_epoch0_step110000.ckpt) for the generator token_unclip, or a folder
    of diffusers whose torch files hold tensors only, and writes safetensors into --to.
    """
    from braindecode_vis.base.checks import ConfigError, check_option
    from braindecode_vis.embeddings import published

    check_option("ACTION", action, ACTIONS)
    if half and action != "convert":
        raise ConfigError("--half is an option of weights convert.")
    if to is not None and action == "list":
        raise ConfigError("--to is an option of weights fetch and weights convert.")
    if action == "convert":
        _convert(names or [], to, half, as_json)
        return
    models = [
        published.read_model(name) for name in names or (published.read_models() if action == "list" else ())
    ]
    if action == "list":
        _list(models, as_json, in_full=bool(names))
        return
    if not models:
        raise ConfigError("weights fetch needs names: braindecode-vis weights list shows them.")
    place = to or published.find_cache_folder()
    above = next(
        folder
        for folder in (place.expanduser().absolute(), *place.expanduser().absolute().parents)
        if folder.is_dir()
    )
    console = make_console()
    for model in models:
        console.print(
            f"{model.name}: {_describe_size(model)} from {model.describe_place()}; {model.licence}",
            markup=False,
        )
    from braindecode_vis.base.memory import describe_bytes

    known = sum(model.count_bytes() or 0 for model in models)
    console.print(
        f"together {describe_bytes(known)} or more; {describe_bytes(shutil.disk_usage(above).free)} free",
        markup=False,
    )
    found = {}
    for model in models:
        found[model.name] = published.fetch(model, to=None if to is None else to / model.name)
        if not as_json:
            needs_name = to is not None or bool(model.url) or model.named
            what = (
                f"name it with --set {model.option}=..." if needs_name else "it is found there automatically"
            )
            make_console(stderr=False).print(f"{model.name}: {found[model.name]}; {what}", markup=False)
    if as_json:
        print_json(
            {"run_folder": None, "scores": [], "fetched": {name: str(path) for name, path in found.items()}}
        )


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


def _describe_size(model: PublishedModel) -> str:
    from braindecode_vis.base.memory import describe_bytes

    size = model.count_bytes()
    return "size unknown" if size is None else describe_bytes(size)


def _list(models: list[PublishedModel], as_json: bool, *, in_full: bool) -> None:
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
                model.name, _describe_size(model), model.licence.partition(",")[0],
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
            ("fetched", [", ".join(model.list_patterns())]), ("size", [_describe_size(model)]),
            ("licence", [model.licence]), ("note", [model.note]),
            ("here", [str(find_cached(model) or "no")]), ("elsewhere", [f"--set {model.option}=PATH"]),
        ]  # fmt: skip
        for label, texts in lines:
            for text in filter(None, texts):
                console.print(f"{label}: {text}", markup=False)
