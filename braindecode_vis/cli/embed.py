"""The verb ``embed``: encodes the images of a data set into the target space, or other images into a separate bank."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braindecode_vis.cli.show import (
    ConsoleListener,
    Json,
    Profile,
    RunOptions,
    Worker,
    finish,
    make_console,
    print_json,
    strip_words,
    takes,
    training_together,
)

if TYPE_CHECKING:
    from braindecode_vis.embeddings.image_bank import BankPlan
    from braindecode_vis.embeddings.image_sources import ImageSource


@dataclass(frozen=True)
class ImageOptions:
    """Images that are embedded instead of those of a data set, and the bank for them."""

    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            help="Embed these images instead of those of the data set: a folder, tar, parquet, arrow or HDF5 files "
            "(also a pattern such as 'shards/{000..099}.tar'), or phantom:N.",
        ),
    ] = None
    bank: Annotated[
        Path | None, typer.Option("--bank", help="Folder that gets the embeddings of --images.")
    ] = None
    column: Annotated[
        str | None, typer.Option("--column", help="Column of tables, or data set of HDF5, with the images.")
    ] = None
    id_column: Annotated[
        str | None, typer.Option("--id-column", help="Column or data set with their ids.")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Number type of the stored embeddings: float16 (default) or float32."),
    ] = None


@takes()
def embed_command(
    where: RunOptions,
    own: ImageOptions,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be decoded, and list them.")
    ] = False,
    worker: Worker = None,
    n_workers: Annotated[
        int | None, typer.Option("--workers", help="How many processes share the images of --images.")
    ] = None,
    profile: Profile = False,
    as_json: Json = False,
) -> None:
    """Encode the images into the target space.

    With --images, encodes any number of other images into a separate bank.
    """
    from braindecode_vis import pipeline
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.config import check_files

    if own.images is None:
        given = {
            "--bank": own.bank, "--column": own.column, "--id-column": own.id_column, "--dtype": own.dtype,
            "--skip-broken": skip_broken or None, "--worker": worker, "--workers": n_workers,
        }  # fmt: skip
        if options := [name for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"{options[0]} applies only to images that --images names; add --images, or leave {options[0]} out."
            )
        run = where.open()
        check_files(run.config, "embed")
        with training_together(run):
            pipeline.embed(run)
            finish(run, as_json, profile=profile)
        return
    if own.bank is None:
        raise ConfigError("--images needs a folder for the embeddings; name one with --bank.")
    if profile or where.out is not None:
        raise ConfigError(
            f"{'--profile' if profile else '--out'} is for the stages of a run; with --images leave it out."
        )
    if worker is not None and n_workers is None:
        raise ConfigError(
            "--worker needs the number of workers too; give both, such as --worker 0 --workers 4."
        )
    if n_workers is not None and (n_workers < 1 or not 0 <= (worker or 0) < n_workers):
        raise ConfigError(
            "--workers must be 1 or more, and --worker must be a number from 0 to --workers minus 1."
        )
    plan, found, encoder = plan_images(where, own)
    _embed_images(plan, found, encoder, skip_broken, worker, n_workers, as_json)


def plan_images(where: RunOptions, own: ImageOptions) -> tuple[BankPlan, ImageSource, Any]:
    """Return the plan of a bank, the source of its images and their encoder."""
    from braindecode_vis.base.checks import check_option
    from braindecode_vis.config import check_files, read_config
    from braindecode_vis.embeddings.image_bank import plan_bank
    from braindecode_vis.embeddings.image_sources import open_images
    from braindecode_vis.pipeline.embed_images import open_encoder

    assert own.images is not None
    assert own.bank is not None
    kept: Any = own.dtype or "float16"
    check_option("--dtype", kept, ("float16", "float32"))
    run = None
    if (Path(where.source).expanduser() / "config.yaml").is_file():
        # Not held: the images may take days, and the run is only read.
        run = replace(where, out=None).open(holds=False)
        config = run.config
    else:
        config = read_config(where.source, where.list_changes(), root=where.root)
    check_files(config, "embed")
    found = open_images(own.images, column=own.column, id_column=own.id_column)
    encoder = open_encoder(config, run, found)
    console = make_console()
    plan = plan_bank(
        own.bank.expanduser().absolute(), found, encoder, dtype=kept,
        tell=lambda sentence: console.print(f"embed: {sentence}", markup=False),
    )  # fmt: skip
    return plan, found, encoder


def _embed_images(
    plan: BankPlan,
    found: ImageSource,
    encoder: Any,
    skip_broken: bool,
    worker: int | None,
    n_workers: int | None,
    as_json: bool,
) -> None:
    """Embed the missing images of a bank, or a share of them, in one or several processes, and print the result."""
    from braindecode_vis.pipeline.embed_images import embed_images, embed_in_processes

    console, listener = make_console(stderr=False), ConsoleListener()
    with listener.progress("embedding images", plan.n_images) as advance:
        if worker is None and n_workers is not None and n_workers > 1:
            embed_in_processes(
                plan, strip_words(sys.argv[1:], {"--workers": True, "--json": False}), n_workers, advance
            )
        share = None if worker is None or n_workers is None else (worker, n_workers)
        manifest = embed_images(
            plan, found, encoder, skip_broken=skip_broken, share=share, advance=advance,
            tell=lambda sentence: console.print(f"embed: {sentence}", markup=False),
        )  # fmt: skip
    about = {} if manifest is None else {key: manifest[key] for key in ("space", "n_images", "n_broken")}
    if as_json:
        print_json({"run_folder": None, "scores": [], "bank": str(plan.folder), **about})
        return
    if manifest is None:
        console.print(f"this share is done; other shares of {plan.folder} are not finished", markup=False)
        return
    left_out = (
        f"; {about['n_broken']} broken images were left out (see manifest.json)" if about["n_broken"] else ""
    )
    console.print(
        f"bank: {plan.folder}, {about['n_images']} images in the space {about['space']}{left_out}",
        markup=False,
    )
