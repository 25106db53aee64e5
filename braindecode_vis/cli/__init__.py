"""The command ``braindecode-vis``: one verb per stage of the pipeline, and verbs about data and studies.

Owns arguments, tables, progress bars and the way errors are told. Computes nothing; everything heavy is imported
inside the verb that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from braindecode_vis import __version__
from braindecode_vis.cli import audit, data, export, predict, score, stages, studies

app = typer.Typer(
    name="braindecode-vis",
    help="Decode seen images from EEG, MEG and fMRI: brain encoders, retrieval, reconstruction, honest reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help triples the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"braindecode-vis {__version__}")
        raise typer.Exit


@app.callback()
def root_options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Hold the options that stand before the verb, and keep several processes to verbs that share their work."""
    from braindecode_vis.checks import ConfigError
    from braindecode_vis.devices import count_launched, spans_machines

    if count_launched() > 1 and context.invoked_subcommand not in ("train", "run"):
        raise ConfigError("only train and run work with several processes; start this verb without torchrun.")
    if spans_machines() and context.invoked_subcommand == "run":
        raise ConfigError(
            "run keeps all machines waiting while one of them evaluates; train on several machines with the verb "
            "train, then start run without torchrun."
        )


_VERBS: dict[str, Callable[..., None]] = {
    "datasets": data.datasets,
    "describe": data.describe,
    "check": data.check,
    "fetch": data.fetch,
    "new": data.new,
    **stages.VERBS,
    "predict": predict.predict,
    "score": score.score,
    "pretrain": studies.pretrain,
    "train-generator": studies.train_generator,
    "analyze": studies.analyze,
    "sweep": studies.sweep,
    "compare": studies.compare,
    "audit": audit.audit,
    "export": export.export,
    "banks": data.banks,
    "phantom": data.phantom,
    "demo": data.demo,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)


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
    from braindecode_vis.checks import BraindecodeVisError, speak_command_line
    from braindecode_vis.devices import count_launched

    # On a busy machine the threads of OpenMP, while they wait for each other, hold up the ones they wait for.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    shared = count_launched() > 1
    if shared:  # else every process warns that no parameter went unused
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    debug = "--debug" in sys.argv
    try:
        with speak_command_line():
            app()
    except BraindecodeVisError as error:
        if debug:
            raise
        _fail(str(error), shared)
    except OSError as error:
        if debug or error.errno not in _SYSTEM_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        _fail(
            f"{_SYSTEM_ERRORS[error.errno]}{where}; finished stages are kept: make room or choose another folder "
            "with --out, then run the same command again.",
            shared,
        )
    except Exception as error:
        sentence = "" if debug else _blame_outside(error)
        if not sentence:
            raise
        _fail(sentence, shared)


def _blame_outside(error: Exception) -> str:
    """Return a sentence for an error in the code of a component from outside; empty for any other."""
    from braindecode_vis.settings import OUTSIDE

    files = {Path(str(sys.modules[cls.__module__].__file__)): code for cls, code in OUTSIDE.items()}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for file, code in files.items():
            path = Path(frame.filename)
            if path == file or ((file.parent / "__init__.py").is_file() and path.is_relative_to(file.parent)):
                text = " ".join(str(error).split()).rstrip(".")
                return (
                    f"{code.describe()} raised {type(error).__name__} in {frame.name} ({path.name}, line "
                    f"{frame.lineno}): {text}; --debug shows the traceback."
                )
    return ""


def _fail(sentence: str, shared: bool) -> None:
    from braindecode_vis.devices import is_first, leave

    who = "" if is_first() else f"process {os.environ['RANK']}: "
    sys.stderr.write(f"error: {who}{sentence}\n")
    if shared:
        leave(2)
    raise SystemExit(2)
