"""One case: copy a base, damage a file, let a child process meet it, and judge what came of it.

A case is known by its surface and a number, for example ``god/read:17``, which decide everything that is drawn.
The child is a fork of this process, which has imported everything and computed nothing: it starts at once, can be
killed when it hangs, and takes nothing down with it.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutator import Damage, mutate
from tests.fuzz.surfaces import MAKERS, REUSED, Surface, strip

TIMEOUT_S = 600.0  # a case that hangs; other work on the machine does not take that long
#: What a child may ask for, far above what any case needs: a header that asks for more is told at once.
_MEMORY = 12 << 30
_PLACES = ("home", "tmp", "cwd", "cache")
#: Ends of a case that are as they should be.
GOOD = ("same", "told", "told in the report", "another input", "zeros pass check")


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit code (negative for a signal), what it said and what its result is."""

    code: int
    said: str
    result: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What came of a case; `kind` is one of `GOOD`, or what was violated."""

    case: str
    kind: str
    damage: Damage
    file: str
    said: str
    seconds: float


def import_everything() -> None:
    """Import what the children would, once."""
    import h5py  # noqa: F401
    import mne.io  # noqa: F401
    import nibabel  # noqa: F401
    import pandas  # noqa: F401
    import scipy.io  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch  # noqa: F401
    import typer.main

    import braindecode_vis.api.decoding_run
    import braindecode_vis.cli
    import braindecode_vis.parts.studies.score_outputs
    import braindecode_vis.pipeline
    from braindecode_vis.base.store import collect_provenance

    collect_provenance()  # versions and commit are kept for the process, and asking git takes longer than most cases
    # Building the command from the signatures of its verbs takes a third of a short case.
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(braindecode_vis.cli.app)
    _freeze()


def import_what_is_used(names: Iterable[str]) -> None:
    """Import modules that a child needed, so that the next one has them."""
    missing = [name for name in names if name not in sys.modules]
    for name in missing:
        with suppress(ImportError):  # of modules that are no files
            import_module(name)
    if missing:
        _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()  # a child that collects would copy every page of what it was given


def in_child(folder: Path, act: Callable[[], str], *, timeout: float = TIMEOUT_S) -> Ending:
    """Run `act` in a fork whose output goes to files of `folder`; a child that takes longer is killed."""
    for name in _PLACES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        _live_in(folder, timeout)
        code = 1
        try:
            (folder / "result").write_text(act())
            code = 0
        except SystemExit as end:
            code = int(end.code or 0) if not isinstance(end.code, str) else 1
        except BaseException as error:
            code = _tell(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it started and left
    said = (folder / "stderr").read_text(errors="replace")
    result = (folder / "result").read_text() if (folder / "result").is_file() else ""
    return Ending(os.waitstatus_to_exitcode(status), said, result, time.monotonic() - started)


def _live_in(folder: Path, timeout: float) -> None:
    """Give this process a time to live, a home, a cache, a folder for temporary files and files for what it says."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.environ |= {
        "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "BRAINDECODE_VIS_CACHE": str(folder / "cache"),
        "MPLCONFIGDIR": str(folder / "home/.cache"),
    }  # fmt: skip
    import tempfile

    tempfile.tempdir = None
    os.chdir(folder / "cwd")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tell(error: BaseException) -> int:
    """Say what Python code would have met: an error of the package is one sentence there too."""
    from braindecode_vis.base.checks import BraindecodeVisError

    if isinstance(error, BraindecodeVisError):
        sys.stderr.write(f"error: {error}\n")
        return 2
    traceback.print_exception(error)
    return 1


def make_base(bases: Path, name: str) -> None:
    """Make the files of a base, in a child."""
    folder = bases / name
    if folder.is_dir():
        return
    made = bases / f".{name}"
    # The last names of its path are those of a case, since results name files by their last folders.
    (made / "case/in").mkdir(parents=True)

    def make() -> str:
        MAKERS[name](made / "case/in")
        return ""

    ending = in_child(made, make)
    if ending.code:
        raise RuntimeError(f"the base {name} could not be made:\n{ending.said}")
    (made / "case/in").rename(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # bases that are kept may lie on another disk
        shutil.copy2(source, target)


def look(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return kind, size and time of everything below a folder."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(place, name))  # noqa: PTH118
            is_folder = os.path.isdir(os.path.join(place, name))  # noqa: PTH112, PTH118
            found[os.path.join(place, name)] = (  # noqa: PTH118
                status.st_mode,
                0 if is_folder else status.st_size,
                0 if is_folder else status.st_mtime_ns,
            )
    return found


class Examiner:
    """Judges cases in a folder of its own.

    Parameters
    ----------
    bases
        Folder of the bases.
    work
        Folder for the copies; the same path for every case, so that results name the same files.
    """

    def __init__(self, bases: Path, work: Path) -> None:
        self.bases, self.work = bases, work
        self.intact: dict[tuple[str, str], Ending] = {}

    def judge(self, surface: Surface, number: int) -> Verdict:
        """Carry out one case."""
        name = f"{surface.name}:{number}"
        rng = np.random.default_rng([zlib.crc32(surface.name.encode()), number])
        files = surface.list_files(self.bases / surface.base)
        # A format first: pictures outnumber everything else.
        formats = sorted({path.suffix for path in files})
        suffix = formats[int(rng.integers(len(formats)))]
        of_format = [path for path in files if path.suffix == suffix]
        file = of_format[int(rng.integers(len(of_format)))]
        intact = self.run_intact(surface, file)
        case = self._copy(surface, file)
        damage = mutate(case / "in" / file, rng)
        before = look(case)
        ending = in_child(case, lambda: surface.act(case, case / "in" / file))
        kind = self._judge(surface, file, damage, intact, ending, before)
        said = ending.said if kind not in GOOD else ending.said.strip().rpartition("\n")[2]
        return Verdict(name, kind, damage, str(file), strip(said, case), ending.seconds)

    def run_intact(self, surface: Surface, file: Path) -> Ending:
        """Return how the case of an undamaged file ends."""
        key = (surface.name, str(file) if surface.base in ("configs", "recipes") else "")
        if key not in self.intact:
            case = self._copy(surface, file)

            def act() -> str:
                try:
                    return surface.act(case, case / "in" / file)
                finally:
                    (case / "modules").write_text("\n".join(sys.modules))

            self.intact[key] = in_child(case, act)
            import_what_is_used((case / "modules").read_text().splitlines())
            if surface.base != "configs" and self.intact[key].code:
                raise RuntimeError(f"{surface.name} fails without damage:\n{self.intact[key].said}")
            if surface.name.endswith("/rerun") and self.intact[key].result != REUSED:
                raise RuntimeError(f"{surface.name} is blind: {self.intact[key].result} without damage")
        return self.intact[key]

    def _copy(self, surface: Surface, file: Path) -> Path:
        """Return the folder of a case with a copy of the base: hard links but for the damaged file."""
        case = self.work / "case"
        shutil.rmtree(case, ignore_errors=True)
        for name in _PLACES:
            (case / name).mkdir(parents=True)
        own = shutil.copy2 if surface.writes else _link
        shutil.copytree(self.bases / surface.base, case / "in", copy_function=own)
        settings = case / "in/run/config.yaml"
        if settings.is_file():  # a run knows where its data lie
            made_in = str(self.bases / f".{surface.base}" / "case/in")
            text = settings.read_text().replace(made_in, str(case / "in"))
            settings.unlink()
            settings.write_text(text)
        if not surface.writes:
            (case / "in" / file).unlink()
            shutil.copy2(self.bases / surface.base / file, case / "in" / file)
        return case

    def _judge(
        self, surface: Surface, file: Path, damage: Damage, intact: Ending, ending: Ending, before: Any
    ) -> str:
        case = self.work / "case"
        if ending.code == -signal.SIGALRM:
            return "hang"
        if ending.code < 0:
            return f"killed by {signal.Signals(-ending.code).name}"
        if "Traceback (most recent call last)" in ending.said:
            return "traceback"
        if changed := self._find_writes(surface, case, before):
            return f"write outside: {changed}"
        if ending.code == 2:
            return _judge_sentence(ending.said)
        if ending.code:
            return f"exit code {ending.code}"
        if intact.code:
            return "another input" if damage.readable else "damage taken"
        if ending.result == intact.result:
            # It reads samples, and has no result that could differ; preprocessing looks at every trial.
            return "zeros pass check" if surface.name.endswith("/check") and damage.kind == "zero" else "same"
        return self._judge_difference(surface, file, damage, intact, ending)

    def _judge_difference(
        self, surface: Surface, file: Path, damage: Damage, intact: Ending, ending: Ending
    ) -> str:
        if surface.name.endswith("/rerun"):
            return "same" if ending.result == "computed again" else "reused blindly"
        if surface.name.endswith("/read") and _read_line(ending) != _read_line(intact):
            return "told in the report"
        if surface.name == "recipes/run" and ending.result == "a score is no number":
            return "no number"
        if surface.name.endswith("/audit") and names_finding(ending.result, intact.result):
            return "told"  # what it found; it goes on
        # The settings of a run belong to the person, who may have edited them; its results do not.
        if surface.writes and surface.base != "new" and file.name != "config.yaml":
            return "another number in silence"
        return "another input" if damage.readable else "damage taken"

    def _find_writes(self, surface: Surface, case: Path, before: dict[str, tuple[int, int, int]]) -> str:
        # Libraries keep fonts and compiled code where a user's cache is.
        names = ("out", "cache", "stdout", "stderr", "result", "home/.cache", "tmp/torchinductor_root")
        allowed = [case / name for name in names]
        allowed += [case / "in"] * surface.writes
        after = look(case)
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) != after.get(path) and not any(Path(path).is_relative_to(a) for a in allowed):
                return strip(path, case)
        return ""


def _read_line(ending: Ending) -> str:
    """Return the last line of a result: the damage that preprocessing reported."""
    return ending.result.rpartition("\n")[2]


def names_finding(result: str, intact: str) -> bool:
    """Return whether an audit in JSON names something other than ok that the intact one did not."""

    def list_findings(text: str) -> set[str]:
        return {json.dumps(found) for found in json.loads(text)["findings"] if found["level"] != "ok"}

    return bool(list_findings(result) - list_findings(intact))


def _judge_sentence(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if len(lines) != 1 or not said.strip().splitlines()[-1].startswith("error: "):
        return "no sentence"
    if len(lines[0]) > 1500:
        return "endless sentence"
    return "told"
