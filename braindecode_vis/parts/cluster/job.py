"""Runs one command on a node as a separate process, and writes a note about its result.

Owns signals (a job that is preempted or runs out of time ends its command cleanly and is queued again) and the
comparison of this node with the machine that the job was sent from. Imports nothing heavy, since each job starts here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from braindecode_vis.parts.cluster.launching import (
    describe_place,
    find_failure,
    find_rank,
    name_failure,
    wait_to_be_ended,
    was_left,
)

#: Libraries whose version may change a number.
_COMPARED = ("numpy", "scipy", "scikit-learn", "torch", "timm", "mne", "nilearn", "diffusers")
#: Schedulers kill for good half a minute after they have asked a process to end.
_ENDING_S = 20.0
#: submitit's signal before the end of a job's time; Slurm sends it to every process, and it is not for the command.
_TIME_IS_UP = "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")


def identify_software() -> dict[str, str]:
    """Return versions of Python and of libraries, and a digest of the code of this package."""
    versions = {"Python": platform.python_version()}
    for name in _COMPARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    top, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(top.rglob("*.py")):
        digest.update(path.relative_to(top).as_posix().encode() + path.read_bytes())
    return {**versions, "braindecode_vis": digest.hexdigest()[:16]}


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON by one rename; on a full disk there is no note, and the log says why."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{platform.node()}-{path.name}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class CommandJob:
    """One command, as submitit pickles it: texts alone, and nothing comes back but files.

    Parameters
    ----------
    name
        What the job is called in lists.
    command
        Program and arguments.
    cwd
        Folder that relative paths of the command start from.
    log
        File that takes what the command prints.
    note
        File that says how the job went.
    ticket
        Of this submission, so that the note of an earlier one is not taken for it.
    executor
        ``slurm``, ``local`` or ``debug``.
    threads
        Of numerical libraries.
    asked
        What the job was given, for the sentence on what to ask for.
    software
        What `identify_software` returned where the job was sent from; empty asks for no comparison.
    seal
        A file and its text, written when the command has ended well; see `sweeps`.
    settings
        Of `pipeline.runs.digest_config`, which the command compares with what it reads; empty asks for no comparison.
    n_processes, distributed
        Tasks of the job that train together, each of which runs the command, and how; see `launching`.
    """

    name: str
    command: list[str]
    cwd: str
    log: str
    note: str
    ticket: str
    executor: str
    threads: int = 1
    asked: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    seal: list[str] = field(default_factory=list)
    n_processes: int = 1
    distributed: str = "ddp"
    settings: str = ""

    def __call__(self) -> None:
        """Run the command and note how it ended; a failed one ends the process with its exit code."""
        global _JOB_STARTED
        _JOB_STARTED = time.time()
        if self.executor != "debug":
            # `cancel` sends it, and a command in the background of a shell leaves it ignored to its children.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        place: dict[str, str] = {}
        try:
            sentence = self._find_difference()
            if self.n_processes > 1:
                place = describe_place(self.distributed)
        except OSError as error:
            sentence = str(error)
        if sentence:
            self._end("failed", sentence, 2)
            return
        self._write("running")
        began = time.monotonic()
        try:
            code = self._run(place)
        except BaseException as error:  # a signal while it ran: submitit's end of the job, or cancel's
            if type(error).__name__ == "UncompletedJobError":
                self._write("failed", sentence=self._describe_time())
            elif not isinstance(error, SystemExit):  # which follows a requeue, noted by `checkpoint`
                self._write("stopped", sentence="it was cancelled; run the command again to continue.")
            raise
        if code == 0:
            if self.seal and not self.rank:
                write_note(Path(self.seal[0]), json.loads(self.seal[1]))
            self._write("done", command_seconds=round(time.monotonic() - began, 3))
        elif code in (130, 143) or code in (-signal.SIGTERM, -signal.SIGINT):
            self._end("stopped", "it was cancelled or preempted; finished work is kept.", code)
        else:
            self._end("failed", self._describe_end(code), code)

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """End the command cleanly and return what goes on: the same command, which resumes from its artifacts."""
        from submitit.helpers import DelayedSubmission

        _stop_child()
        self._write("requeued")
        return DelayedSubmission(self)

    @property
    def rank(self) -> int:
        """Which of the tasks of the job this is; the first one speaks for all."""
        return find_rank() if self.n_processes > 1 else 0

    @property
    def own_log(self) -> Path:
        """File of what the command of this task prints."""
        log = Path(self.log)
        return log.with_name(f"{log.stem}-process{self.rank}{log.suffix}") if self.rank else log

    def _run(self, place: Mapping[str, str]) -> int:
        global _CHILD, _CODE
        threads = str(self.threads)
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        if self.settings:
            limits["BRAINDECODE_VIS_SENT_WITH"] = self.settings  # pipeline.runs.SENT_WITH

        def leave_signal_to_us() -> None:
            signal.signal(getattr(signal, _TIME_IS_UP), signal.SIG_IGN)

        with self.own_log.open("a") as log:
            _CHILD = subprocess.Popen(
                self.command, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **limits, **place, "BRAINDECODE_VIS_JOB": self.name},
                preexec_fn=leave_signal_to_us,
            )  # fmt: skip
            _CODE = None
            threading.Thread(target=_wait_for, args=(_CHILD,), daemon=True).start()
            try:
                looked = time.monotonic()
                while _CODE is None:
                    time.sleep(_POLL_S)
                    # On a GPU a process may wait forever for one that was killed.
                    if self.n_processes > 1 and time.monotonic() - looked > _LOOK_S:
                        looked = time.monotonic()
                        if find_failure(Path(self.note), self.ticket, _JOB_STARTED):
                            _stop_child()
                return _CODE
            finally:
                _stop_child()

    def _find_difference(self) -> str:
        """Return a sentence if this node cannot give the results of the machine that the job was sent from."""
        node = platform.node()
        if not Path(self.cwd).is_dir():
            return (
                f"the node {node} cannot see the folder {self.cwd}, in which the command was run; run it "
                "in a folder that all nodes share, with absolute paths."
            )
        here = identify_software() if self.software else {}
        for name, version in self.software.items():
            if here.get(name) != version:
                return (
                    f"the node {node} has {name} {here.get(name, 'not at all')}, but the job was sent "
                    f"from a machine with {version}, so its results could differ; use the same "
                    "environment on all nodes."
                    if name != "braindecode_vis"
                    else f"the node {node} has another version of the code of braindecode_vis than the "
                    "machine from which the job was sent (or the code was changed later); install "
                    "the same version, or run the command again."
                )
        return ""

    def _describe_end(self, code: int) -> str:
        lines = [line for line in self.own_log.read_text(errors="replace").splitlines() if line.strip()]
        if code == -signal.SIGKILL:
            from braindecode_vis.base.memory import describe_kill  # loads numpy

            memory = self.asked.get("memory")
            had = f"{memory:g} GB were requested" if memory else "no memory was requested"
            remedy = "run the command again to continue"
            if self.executor == "slurm":
                remedy += "; if memory ran out, request more with --cluster-set memory=GB"
            return (
                f"{describe_kill(had if self.executor == 'slurm' else '')}. Finished work is kept: {remedy}."
            )
        said = lines[-1] if lines and lines[-1].startswith("error: ") else ""
        return said.removeprefix("error: ") or f"it ended with exit code {code}; its log is {self.own_log}"

    def _describe_time(self) -> str:
        minutes, times = self.asked.get("time"), self.asked.get("requeues", 0) + 1
        return (
            f"it ran out of its {minutes} minutes {times} times; finished work is kept: request more "
            "with --cluster-set time=MINUTES, and run the command again."
        )

    def _end(self, state: str, sentence: str, code: int) -> None:
        if self.rank:
            sentence = re.sub(r"^process \d+: ", "", sentence)
            sentence = f"process {self.rank} of {self.n_processes}, on {platform.node()}: {sentence}"
        self._write(state, sentence=sentence, code=code)
        with contextlib.suppress(OSError), self.own_log.open("a") as log:
            log.write(f"job: {sentence}\n")
        if self.rank and self.executor == "slurm" and (state != "failed" or was_left(sentence)):
            wait_to_be_ended()
        if self.executor != "debug":
            sys.exit(
                code if code > 0 else 128 - code
            )  # Slurm then knows that it failed; no pickle is written

    def _write(self, state: str, **more: Any) -> None:
        global _CLOCK_OFF
        content = {
            "name": self.name, "ticket": self.ticket, "state": state, "host": platform.node(), "pid": os.getpid(),
            "started": _JOB_STARTED, "written": time.time(), "clock_off": _CLOCK_OFF, **more,
        }  # fmt: skip
        note = Path(self.note)
        if self.rank:
            # The first one speaks for all, but of an end whose reason another one knows.
            if state != "failed" or was_left(str(more.get("sentence"))):
                return
            note = name_failure(note)
        try:
            write_note(note, content)
            if state == "running":  # a shared disk has a clock of its own
                _CLOCK_OFF = round(time.time() - note.stat().st_mtime, 1)
        except OSError as error:
            sys.stderr.write(f"error: {self.note} could not be written ({error.strerror})\n")


#: Of this process: a pickled job has neither. The exit code comes from a thread, since a signal handler that waited
#: for the command itself would wait for a lock that the interrupted code may hold.
_CHILD: subprocess.Popen[bytes] | None = None
_CODE: int | None = None
_JOB_STARTED = 0.0
_CLOCK_OFF = 0.0
_POLL_S = 0.05
_LOOK_S = 2.0


def _wait_for(child: subprocess.Popen[bytes]) -> None:
    global _CODE
    _CODE = child.wait()


def _stop_child() -> None:
    """Ask the command to end, as it does cleanly on SIGTERM, and end it where it does not."""
    if _CHILD is None or _CODE is not None:
        return
    os.kill(_CHILD.pid, signal.SIGTERM)
    last = time.monotonic() + _ENDING_S
    while _CODE is None and time.monotonic() < last:
        time.sleep(_POLL_S)
    while _CODE is None:
        os.kill(_CHILD.pid, signal.SIGKILL)
        time.sleep(_POLL_S)
