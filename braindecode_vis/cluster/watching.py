"""How the jobs of a folder are, waiting for them, and ending them.

Owns what is made of the notes that jobs write, of Slurm's queue and of the processes of this machine. Works without
Slurm's accounting: where ``sacct`` fails, a job that left the queue without a note is told as such.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from braindecode_vis.cluster.launching import find_failure
from braindecode_vis.cluster.submitting import JOBS, STARTED, SentJob, ask_slurm

State = Literal["waiting", "running", "done", "failed", "stopped", "lost", "unknown"]
#: Something may come of these yet.
ACTIVE = ("waiting", "running", "unknown")
_WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
#: Why Slurm lets a job wait, in words; those at the end never start by themselves.
_REASONS = {
    "None": "Slurm has not looked at it yet",
    "Resources": "no node has room for it yet",
    "Priority": "other jobs are before it",
    "Dependency": "other jobs must end first",
    "JobArrayTaskLimit": "as many run at once as cluster.parallel allows",
    "BeginTime": "it was queued again, and Slurm lets it wait for two minutes",
    "QOSMaxJobsPerUserLimit": "as many of your jobs run as Slurm allows",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "JobHeldUser": "it is held; let it go with: scontrol release",
    "JobHeldAdmin": "it is held by whoever runs Slurm; ask them",
    "PartitionTimeLimit": "it never starts: it asks for more time than its partition allows; cancel it, and set "
    "cluster.time",
    "PartitionNodeLimit": "it never starts: it asks for more than its partition has; cancel it, and ask for less",
    "PartitionDown": "it does not start while its partition is down",
    "PartitionInactive": "it does not start while its partition is inactive",
    "BadConstraints": "it never starts: no node has what it asks for; cancel it, and ask for less",
    "DependencyNeverSatisfied": "it never starts: what it waits for has failed; cancel it",
}
_POLL_S = (0.5, 10.0)
#: Nodes of one job whose clocks differ by more are told the end of an earlier attempt.
_CLOCKS_S = 60.0


@dataclass(frozen=True)
class JobState:
    """How a job is.

    Parameters
    ----------
    job
        As it was sent.
    state
        ``lost`` left the queue, or its process ended, without a word.
    reason
        Why it waits, or what went wrong; a sentence.
    elapsed, left
        Time that it has run and that it may take yet, as Slurm writes it; empty where nobody knows.
    host
        Node that it runs or ran on.
    """

    job: SentJob
    state: State
    reason: str = ""
    elapsed: str = ""
    left: str = ""
    host: str = ""

    @property
    def is_active(self) -> bool:
        """Whether something may come of it yet."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class _Queued:
    state: str
    reason: str
    elapsed: str
    left: str
    host: str


def find_states(folder: Path, jobs: Sequence[SentJob]) -> list[JobState]:
    """Return how jobs of a folder are, in their order."""
    notes = [_read_note(folder, job) for job in jobs]
    # Slurm is asked for those alone that may not have ended well.
    open_ones = [
        job
        for job, note in zip(jobs, notes, strict=True)
        if job.executor == "slurm" and note.get("state") != "done"
    ]
    queue = _read_queue(open_ones) if open_ones else {}
    return [_find_state(folder, job, note, queue) for job, note in zip(jobs, notes, strict=True)]


def _find_state(
    folder: Path, job: SentJob, note: dict[str, Any], queue: dict[str, _Queued] | None
) -> JobState:
    said, host = note.get("state", ""), str(note.get("host", ""))
    sentence = str(note.get("sentence", ""))
    if said == "done":
        return JobState(job, "done", "", _describe_seconds(note), "", host)
    if job.executor != "slurm":
        if said in ("failed", "stopped"):
            return JobState(job, said, sentence, _describe_seconds(note), "", host)
        if job.host != platform.node():
            return JobState(job, "unknown", f"it is a process of {job.host}; ask there")
        if _is_running_here(job, note):
            return JobState(job, "running", "", _describe_seconds(note, now=True), "", host)
        return JobState(job, "lost", _describe_loss(folder, job, note), "", "", host)
    if queue is None:
        return JobState(job, "unknown", "Slurm does not answer", _describe_seconds(note), "", host)
    found = queue.get(job.job_id)
    if found is not None and found.state in _WAITING:
        return JobState(job, "waiting", _describe_reason(found.reason))
    if said in ("failed", "stopped"):
        return JobState(job, said, sentence, _describe_seconds(note), "", host)
    if found is not None and found.state in _RUNNING:
        return JobState(job, "running", "", found.elapsed, found.left, found.host or host)
    state, reason = _describe_ending("" if found is None else found.state, folder, job, note)
    return JobState(job, state, reason, "" if found is None else found.elapsed, "", host)


def _read_note(folder: Path, job: SentJob) -> dict[str, Any]:
    """Return what a job said of itself; nothing where it said nothing since it was sent."""
    path = folder / JOBS / f"{job.name}.json"
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        note = {}
    if not isinstance(note, dict) or note.get("ticket") != job.ticket:
        note = {}
    if note.get("state") in ("done", "requeued"):
        return note
    # Of several processes, the one that ended first knows why.
    return find_failure(path, job.ticket, note.get("started", 0.0) - _CLOCKS_S) or note


def _has_ended(folder: Path, job: SentJob) -> bool:
    return _read_note(folder, job).get("state") in ("done", "failed", "stopped")


def _describe_seconds(note: dict[str, Any], *, now: bool = False) -> str:
    with suppress(KeyError, TypeError, ValueError):
        seconds = int((time.time() if now else note["written"]) - note["started"])
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return ""


def _read_queue(jobs: Sequence[SentJob]) -> dict[str, _Queued] | None:
    """Return what Slurm's queue and, where there is one, its accounting know of jobs; None if Slurm does not answer."""
    numbers = ",".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
    done = ask_slurm("squeue", "-r", "-t", "all", "-h", "-o", "%i|%T|%r|%M|%L|%N", "-j", numbers)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    found = {}
    for line in done.stdout.splitlines():
        if len(parts := line.strip().split("|")) == 6:
            found[parts[0]] = _Queued(*parts[1:])
    if any(job.job_id not in found for job in jobs) and shutil.which("sacct") is not None:
        # What the controller has forgotten; without accounting this fails, and nothing is added.
        known = ask_slurm("sacct", "-n", "-X", "-P", "-o", "JobID,State,Elapsed,NodeList", "-j", numbers)
        for line in known.stdout.splitlines() if known.returncode == 0 else ():
            if len(parts := line.strip().split("|")) == 4 and parts[0] not in found:
                found[parts[0]] = _Queued(parts[1].split(" ")[0], "", parts[2], "", parts[3])
    return found


def _describe_reason(reason: str) -> str:
    words = _REASONS.get(reason)
    return f"{words} ({reason})" if words else f"Slurm says: {reason}"


def _describe_ending(state: str, folder: Path, job: SentJob, note: dict[str, Any]) -> tuple[State, str]:
    if state.startswith("CANCELLED"):
        return "stopped", "it was cancelled; give the command again to go on."
    if state == "PREEMPTED":
        return "stopped", "other jobs took its place; give the command again to go on."
    if state in ("TIMEOUT", "DEADLINE"):
        return "failed", (
            f"it ran out of its {job.time} minutes; what is finished is kept: ask for more with --cluster-set "
            "time=MINUTES, and give the command again."
        )
    if state == "OUT_OF_MEMORY":
        had = "what Slurm gives by default" if job.memory is None else f"{job.memory:g} GB"
        return "failed", f"it needs more memory than {had}; ask for more with --cluster-set memory=GB."
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return "failed", "its node failed; give the command again."
    # Slurm forgets a task of an array that was cancelled while it waited; that others left logs says that nodes see the
    # folder.
    if not state and not note and not _has_log(folder, job.job_id) and _has_log(folder, "*"):
        return (
            "stopped",
            "it left the queue before it began, most likely cancelled; give the command again to go on.",
        )
    return "lost", _describe_loss(folder, job, note)


def _has_log(folder: Path, number: str) -> bool:
    return any((folder / JOBS).glob(f"{number}_*_log.*"))


def _describe_loss(folder: Path, job: SentJob, note: dict[str, Any]) -> str:
    if note:
        return (
            "it was killed, or its machine went down, while it worked; what is finished is kept: give the command "
            "again."
        )
    if _has_log(folder, job.job_id):
        return (
            f"it ended before the command began; {folder / JOBS / (job.job_id + '_0_log.err')} says why, and then give "
            "the command again."
        )
    return (
        f"it ended and left nothing in {folder / JOBS}, so it was cancelled before it began, or its node does not see "
        "that folder: then choose --out on a disk that all nodes share."
    )


def _is_running_here(job: SentJob, note: dict[str, Any]) -> bool:
    if job.job_id in STARTED:
        if not STARTED[job.job_id].done():
            return True
        del STARTED[job.job_id]
        return False
    # Numbers of processes are given again, so that the command line must be that of a job.
    return any(_is_submitit(number) for number in (job.job_id, str(note.get("pid", ""))))


def _is_submitit(number: str) -> bool:
    if not number.isdigit():
        return False
    shown = subprocess.run(
        ["ps", "-o", "stat=,args=", "-p", number], capture_output=True, text=True, check=False
    )
    return "submitit" in shown.stdout and not shown.stdout.startswith("Z")


def wait_for_jobs(
    folder: Path,
    jobs: Sequence[SentJob],
    tell: Callable[[list[JobState]], None] = lambda states: None,
    *,
    n_left: int = 0,
) -> list[JobState]:
    """Wait until at most some jobs may still work, and return how all are.

    Parameters
    ----------
    folder
        Of the run or sweep.
    jobs
        That were sent.
    tell
        Called with how all are, whenever that has changed.
    n_left
        Jobs that may go on meanwhile.
    """
    pause, lost, last = _POLL_S[0], set[str](), Counter[State]()
    here = all(job.executor != "slurm" for job in jobs)
    while True:
        states = find_states(folder, jobs)
        counts = Counter(state.state for state in states)
        if counts != last:
            tell(states)
            last = counts
        # Seen twice, as a shared disk may show a note some seconds after the queue has dropped the job.
        now_lost = {state.job.ticket for state in states if state.state == "lost"}
        if sum(state.is_active for state in states) <= n_left and now_lost <= lost:
            return states
        fresh = bool(now_lost - lost)
        lost = now_lost
        if here or fresh:
            time.sleep(0.1 if here else 2.0)
            continue
        # Slurm is asked rarely; the notes of jobs tell in between that nothing is left to wait for.
        until = time.monotonic() + pause
        open_ones = [state.job for state in states if state.is_active]
        while time.monotonic() < until:
            time.sleep(min(0.5, pause))
            if (
                len(open_ones) - n_left <= 50
                and sum(not _has_ended(folder, job) for job in open_ones) <= n_left
            ):
                break
        pause = min(pause * 1.3, _POLL_S[1])


def cancel_jobs(folder: Path, states: Iterable[JobState]) -> list[JobState]:
    """End the jobs that may still work, and return those."""
    ended = [state for state in states if state.is_active]
    numbers = [state.job.job_id for state in ended if state.job.executor == "slurm"]
    for start in range(0, len(numbers), 500):
        ask_slurm("scancel", *numbers[start : start + 500])
    for state in ended:
        if state.job.executor == "local" and state.job.host == platform.node():
            number = str(_read_note(folder, state.job).get("pid") or state.job.job_id)
            if _is_submitit(number):
                with suppress(OSError):
                    os.kill(int(number), signal.SIGINT)
    return ended


def list_stages(job: SentJob) -> list[str]:
    """Return the stages that a job has finished, as its log tells."""
    with suppress(OSError):
        text = Path(job.log).read_text(errors="replace")
        return list(dict.fromkeys(re.findall(r"^(\w[\w -]*?)\s+(?:computed|reused)\s", text, re.MULTILINE)))
    return []


def read_tail(folder: Path, job: SentJob, n_lines: int = 5) -> list[str]:
    """Return the last lines that a job printed; of submitit's own log where the command did not begin."""
    for path in (Path(job.log), folder / JOBS / f"{job.job_id}_0_log.err"):
        with suppress(OSError):
            if lines := [line for line in path.read_text(errors="replace").splitlines() if line.strip()]:
                return lines[-n_lines:]
    return []
