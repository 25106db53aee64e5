"""The command ``braindecode-vis``: one verb per stage of the pipeline, verbs about data, and the verbs of the parts.

Defines arguments, tables and progress bars, and how errors are shown. It computes nothing. Each verb imports the heavy
packages that it needs, so that ``--help`` answers at once. The register of a part names its verbs. A new verb of the
core needs an entry in `_VERBS`, in `_GROUPS` (its heading in the help) and in `EXAMPLES`.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from braindecode_vis import __version__
from braindecode_vis.base.parts import (
    Part,
    Verb,
    describe_missing,
    describe_missing_module,
    find_parts,
    list_broken_parts,
)
from braindecode_vis.cli import data, discover, predict, stages, weights
from braindecode_vis.cli.failures import StopSignals, announce_notices, describe_failure, stop_cleanly

#: What people type, and the command that does it.
_SAID_OTHERWISE = {
    "decode": "run",
    "download": "fetch",
    "init": "new",
    "list": "datasets, configs or weights list",
    "data": "datasets",
    "models": "weights list",
    "explain": "describe",
    "info": "describe",
    "show": "describe",
    "help": "--help",
    "simulate": "phantom",
    "slurm": "run NAME --cluster slurm",
    "estimate": "plan",
}


class _Verbs(TyperGroup):
    """The verbs. If a verb belongs to a missing part, the error names that part."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb of the first argument."""
        if args and args[0] not in self.commands:
            from braindecode_vis.base.checks import ConfigError

            if missing := describe_missing(args[0]):
                raise ConfigError(f"{missing}.")
            if verb := _SAID_OTHERWISE.get(args[0]):
                raise ConfigError(
                    f"no verb is called {args[0]}: use braindecode-vis {verb}. braindecode-vis --help lists all verbs."
                )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs under the headings of their groups, each with the first sentence of its help."""
        for group, names in _GROUPS.items():
            if not names:  # its part is missing
                continue
            with formatter.section(group):
                formatter.write_dl([(name, _read_first_sentence(self.commands[name])) for name in names])


def _read_first_sentence(command: Any) -> str:
    sentence: str = (command.help or "").partition("\n\n")[0]
    return " ".join(sentence.split()).removesuffix(".")


app = typer.Typer(
    name="braindecode-vis",
    cls=_Verbs,
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
    """Define the options before the verb, and refuse several processes for a verb that cannot share its work."""
    from braindecode_vis.base.checks import ConfigError
    from braindecode_vis.base.devices import count_launched, spans_machines
    from braindecode_vis.cli.show import HELD

    context.call_on_close(HELD.close)
    from braindecode_vis.base.memory import check_libraries

    if not {"--help", "-h"} & set(sys.argv):
        check_libraries(computes=context.invoked_subcommand not in _READING_VERBS)
    if count_launched() > 1 and context.invoked_subcommand not in ("train", "pretrain", "reconstruct", "run"):
        raise ConfigError(
            "only train, pretrain, reconstruct and run work with several processes; start this verb without torchrun."
        )
    if spans_machines() and context.invoked_subcommand == "run":
        raise ConfigError(
            "run keeps all machines waiting while one of them evaluates; train on several machines with the verb "
            "train, then start run without torchrun."
        )


_VERBS: dict[str, Callable[..., None]] = {
    "datasets": discover.datasets,
    "configs": discover.configs,
    "describe": discover.describe,
    "check": data.check,
    "fetch": data.fetch,
    "new": data.new,
    **stages.VERBS,
    "predict": predict.predict,
    "export": predict.export,
    "banks": data.banks,
    "weights": weights.weights,
}
#: These can be sent as jobs; sweep sends its runs.
_SENT = ("run", "embed", "train", "reconstruct", "predict", "pretrain", "train-generator", "analyze")
#: Heading of the help to its verbs, in order; verbs of parts follow those of the core.
_GROUPS: dict[str, list[str]] = {
    "Data": ["datasets", "check", "fetch", "new"],
    "Run": [*("run", *(name for name in stages.VERBS if name != "run")), "predict", "export"],
    "Ask": ["configs", "describe"],
    "Live": [],
    "Scale": [],
    "Models": ["weights", "banks"],
}
#: Parts of other packages whose verbs cannot be used, one sentence each.
_BROKEN = list(list_broken_parts())


#: Verbs that parts bring.
_OF_PARTS: dict[str, Verb] = {}


def _add_verbs(part: Part) -> None:
    for name, verb in part.verbs.items():
        try:
            _VERBS[name] = part.load(verb.call) if part.distribution is None else _load_outside(part, name)
        except (Exception, SystemExit) as error:
            if part.distribution is None:
                raise
            # Code of others, which must not end every command.
            _BROKEN.append(f"the verb {name} of the part {part.name} cannot be used: {error}")
        else:
            _OF_PARTS[name] = verb
            _GROUPS.setdefault(verb.group, []).append(name)


def _load_outside(part: Part, name: str) -> Callable[..., None]:
    if name in _VERBS:
        raise ValueError("braindecode_vis has a verb of that name")
    found: Callable[..., None] = part.load(part.verbs[name].call)
    # An option of a type that typer does not know is an error only when the verbs become a command.
    trial = typer.Typer()
    trial.command()(found)
    typer.main.get_command(trial)
    return found


for _part in find_parts():
    _add_verbs(_part)
for _part in find_parts():
    if "take_jobs" in _part.abilities:
        _take_jobs = _part.load(_part.abilities["take_jobs"])
        _VERBS |= {name: _take_jobs(name, _VERBS[name]) for name in _SENT if name in _VERBS}
#: Of these, none loads more than tables.
_READING_VERBS = frozenset(
    {
        *("datasets", "configs", "describe", "fetch", "new", "banks", "weights"),
        *(name for name, verb in _OF_PARTS.items() if verb.only_reads),
    }
)
#: These write at their end, if at all; the others continue from what they have finished when they are given again.
_STARTING_ANEW = frozenset(
    {
        *("datasets", "configs", "describe", "check", "new", "predict", "export", "banks"),
        *(name for name, verb in _OF_PARTS.items() if verb.starts_anew),
    }
)
#: What a help page ends with; without the name of the command.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "datasets": ("datasets", "datasets things_eeg2", "datasets --root /data"),
    "configs": (
        "configs --modality eeg", "configs --paper 2403.07721", "configs things_eeg2_atm_vith > mine.yaml",
        "configs --schema > braindecode-vis.schema.json",
    ),
    "describe": ("describe things_eeg2_atm_vith", "describe network", "describe atm_s", "describe dataset.nsd",
        "describe repeats.test"),
    "check": ("check things_eeg2 --root /data/things-eeg2", "check nsd --root /data/nsd --full"),
    "fetch": (
        "fetch digits69 --root /data/digits69", "fetch things_meg --subject 1,2 --root /data/things-meg --dry-run",
        "fetch nsd --subject 1 --parts design,betas --root /data/nsd --accept-terms",
    ),
    "new": ("new my_recording",),
    "preprocess": ("preprocess things_eeg2_ridge --root /data/things-eeg2 --subject 8 --out runs/sub-08",),
    "embed": (
        "embed runs/sub-08", "embed nsd_ridge --root /data/nsd --allow-download",
        "embed runs/sub-08 --images 'laion/{0000..0099}.tar' --bank laion_bank --workers 2",
    ),
    "train": (
        "train runs/sub-08", "train things_eeg2_atm_vith --root /data --set encoder.epochs=10 --out runs/atm",
        "train things_eeg2_atm_vith --root /data --out runs/atm --cluster slurm --gpus 8 --nodes 2",
    ),
    "retrieve": ("retrieve runs/sub-08",),
    "reconstruct": (
        "reconstruct runs/sub-08", "reconstruct runs/sub-08 --set generator.kind=nearest",
        "reconstruct runs/sub-08 --worker 0 --workers 4",
        "reconstruct runs/sub-08 --workers 4 --cluster slurm --cluster-set gpus=1",
    ),
    "evaluate": ("evaluate runs/sub-08", "evaluate runs/sub-08 --json"),
    "report": ("report runs/sub-08",),
    "run": (
        "run digits69_ridge --root /data/digits69", "run my_recording/decode.yaml --root my_recording",
        "run things_eeg2_ridge --root /data/things-eeg2 --subject 8 --set seed=1 --out runs/sub-08",
    ),
    "predict": ("predict runs/sub-08 --on new_recording --out predicted",),
    "export": ("export runs/sub-08 --what scores --to csv --out scores.csv",
        "export runs/sub-08 --what images --out images",
        "export runs/all --what submission --to challenge --out submission"),
    "banks": ("banks",),
    "weights": ("weights list", "weights list sdxl_turbo", "weights list things_eeg2_atm_generation",
        "weights fetch things_eeg2_atm_generation", "weights fetch sdxl_turbo ip_adapter --to /data/weights",
        "weights convert unclip6_epoch0_step110000.ckpt --to /data/weights/unclip"),
    **{name: verb.examples for name, verb in _OF_PARTS.items()},
}  # fmt: skip
for _name, _verb in _VERBS.items():
    _lines = "\n".join(f"  braindecode-vis {line}" for line in EXAMPLES[_name])
    # The first character keeps the lines of a paragraph apart.
    app.command(_name, epilog=f"\b\nExamples:\n{_lines}")(_verb)


def main() -> None:
    """Run the command; an expected error is one sentence on standard error and exit code 2."""
    from braindecode_vis.base.checks import BraindecodeVisError, speak_command_line
    from braindecode_vis.base.devices import count_launched
    from braindecode_vis.base.memory import TooLargeError, describe_out_of_memory

    # On a busy machine the threads of OpenMP, while they wait for each other, hold up the ones they wait for.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    shared = count_launched() > 1
    if shared:  # else every process warns that no parameter went unused
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Python ends with a search for garbage, a tenth of a command that computes nothing; memory is returned anyway.
    atexit.register(gc.freeze)
    debug = "--debug" in sys.argv
    resumes = not _STARTING_ANEW & set(sys.argv[1:2])
    announce_notices(_name_own_options)
    for sentence in _BROKEN:
        sys.stderr.write(f"warning: {sentence}\n")
    # A process that waits for the others of its training hears no signal that Python handles: those end at once.
    with stop_cleanly() if not shared else nullcontext(StopSignals()) as stops:
        try:
            with speak_command_line():
                app()
        except (KeyboardInterrupt, SystemExit) as end:
            # typer takes the end of a damaged file for the end of what a person types.
            hidden = getattr(end.__context__, "__cause__", None)
            if isinstance(hidden, EOFError) and not debug:
                _fail(describe_failure(hidden, resumes=resumes), shared)
            ended_well = isinstance(end, SystemExit) and not end.code and sys.argv[1:2] == ["stream"]
            if debug or not stops.received or ended_well:  # streams have no other end than a signal
                raise
            _fail(stops.describe(resumes=resumes), shared, code=stops.exit_code)
        except BraindecodeVisError as error:
            if debug:
                raise
            _fail(_name_own_options(str(error)) if isinstance(error, TooLargeError) else str(error), shared)
        except Exception as error:
            if debug:
                raise
            # Threads of libraries that found no memory to end with would keep the process forever.
            if ran_out := describe_out_of_memory(error, resumes=resumes):
                _fail(_name_own_options(ran_out), at_once=True)
            missing = (
                describe_missing_module(error.name or "") if isinstance(error, ModuleNotFoundError) else ""
            )
            sentence = f"{missing}." if missing else describe_failure(error, resumes=resumes)
            if not sentence:
                raise
            _fail(sentence, shared)


def list_options(verb: str) -> set[str]:
    """Return the options of a verb; none of what is no verb."""
    command = typer.main.get_command(app).commands.get(verb)  # type: ignore[attr-defined]  # it is a group
    return {option for parameter in command.params for option in parameter.opts} if command else set()


def _name_own_options(advice: str) -> str:
    """Return advice on memory with options of the verb of this command alone."""
    from braindecode_vis.base.memory import name_options

    return name_options(advice, list_options((sys.argv[1:2] or [""])[0]))


def _fail(sentence: str, at_once: bool, *, code: int = 2) -> None:
    from braindecode_vis.base.devices import is_first, leave

    who = "" if is_first() else f"process {os.environ['RANK']}: "
    # Names of files and keys may hold ends of lines, or codes that a terminal obeys.
    line = " ".join(sentence.splitlines())
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    # A damaged cell may hold thousands of characters without a space.
    plain = re.sub(r"(\S{200})\S{100,}(\S{60})", r"\1...\2", plain)
    sys.stderr.write(f"error: {who}{plain}\n")
    if at_once:
        leave(code)
    raise SystemExit(code)
