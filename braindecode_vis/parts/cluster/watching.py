"""Reports the states of the jobs of a folder, waits for them, and ends them.

Owns what is made of the notes that jobs write, of Slurm's queue and of the processes of this machine. Works without
Slurm's accounting: where ``sacct`` fails, a job that left the queue without a note is reported as such.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from braindecode_vis.parts.cluster.launching import find_failure
from braindecode_vis.parts.cluster.submitting import JOBS, STARTED, SentJob, ask_slurm, read_jobs

State = Literal["waiting", "running", "done", "failed", "stopped", "lost", "elsewhere", "unknown"]
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
#: Why Slurm lets a job wait, in words.
_REASONS = {
    "None": "Slurm has not considered it yet",
    "Resources": "no node has enough free resources yet",
    "Priority": "other jobs are before it",
    "Dependency": "other jobs must end first",
    "JobArrayTaskLimit": "the limit of cluster.parallel is reached",
    "BeginTime": "it was queued again, and Slurm waits two minutes before it starts",
    "QOSMaxJobsPerUserLimit": "the number of your running jobs is at Slurm's limit",
    "ReqNodeNotAvail": "its nodes are down or reserved",
    "PartitionDown": "it does not start while its partition is down",
    "PartitionInactive": "it does not start while its partition is inactive",
}
#: Why a job never starts by itself.
_NEVER = {
    "JobHeldUser": "it is held; release it with: scontrol release",
    "JobHeldAdmin": "an administrator of Slurm holds it; ask them",
    "PartitionTimeLimit": "it requests more time than its partition allows; cancel it, and set cluster.time",
    "PartitionNodeLimit": "it requests more than its partition has; cancel it, and request less",
    "BadConstraints": "no node has the requested resources; cancel it, and request less",
    "DependencyNeverSatisfied": "a job that it waits for has failed; cancel it",
}
_POLL_S = (0.5, 10.0)
#: Clocks that differ less are not worth a word; nodes of one job whose clocks differ by more are told the end of an
#: earlier attempt.
_CLOCKS_S = 60.0
_TAIL_BYTES = 16384


@dataclass(frozen=True)
class JobState:
    """How a job is.

    Parameters
    ----------
    job
        As it was sent.
    state
        ``lost`` left the queue, or its process ended, without a word. ``elsewhere`` works for the folder from which
        this one was copied.
    reason
        Why it waits, or what went wrong; a sentence.
    elapsed, left
        Time that it has run and that it takes yet, as Slurm writes it: an estimate (``~``) where others like it have
        ended, or else the rest of what it may take (``<``); empty if nobody knows.
    host
        Node that it runs or ran on.
    seconds
        That it took; None before its end.
    cause
        Slurm's own word for why it waits.
    """

    job: SentJob
    state: State
    reason: str = ""
    elapsed: str = ""
    left: str = ""
    host: str = ""
    seconds: float | None = None
    cause: str = ""

    @property
    def is_active(self) -> bool:
        """Whether something may come of it yet."""
        return self.state in ACTIVE

    @property
    def is_stuck(self) -> bool:
        """Whether it waits for what does not come by itself."""
        return self.cause in _NEVER


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
    queue = _read_queue(folder, open_ones) if open_ones else {}
    states = [_find_state(folder, job, note, queue) for job, note in zip(jobs, notes, strict=True)]
    others = {state.job.name: state for state in states}
    if any(name not in others for job in jobs for name in job.after):
        more = [job for job in read_jobs(folder) if job.name not in others]
        others |= {job.name: _find_state(folder, job, _read_note(folder, job), None) for job in more}
    usual = _find_usual(states)
    return [_relate(folder, state, others, usual) for state in states]


def _name_kind(job: SentJob) -> tuple[str, bool]:
    """Return what jobs of one kind share: the verb, and whether it is a share."""
    return (job.words[0] if job.words else "", "--worker" in job.words)


def _find_usual(states: Sequence[JobState]) -> dict[tuple[str, bool], float]:
    """Return the median of seconds that jobs of each kind took."""
    taken: dict[tuple[str, bool], list[float]] = {}
    for state in states:
        if state.state == "done" and state.seconds is not None:
            taken.setdefault(_name_kind(state.job), []).append(state.seconds)
    return {kind: sorted(seconds)[len(seconds) // 2] for kind, seconds in taken.items()}


def _relate(
    folder: Path, state: JobState, others: Mapping[str, JobState], usual: Mapping[tuple[str, bool], float]
) -> JobState:
    """Return how a job is, with the names of what it waits for, and the time that others like it took."""
    before = [others[name] for name in state.job.after if name in others]
    if state.cause == "Dependency":
        named = [f"{each.job.name} ({each.state})" for each in before if each.is_active]
        return replace(state, reason=f"waits for {_list_some(named)}") if named else state
    if state.state == "stopped" and not _read_note(folder, state.job):
        named = [each.job.name for each in before if each.state in ("failed", "lost", "stopped")]
        if named:
            return replace(state, reason=f"it was not started, since {_list_some(named)} failed.")
    if state.state != "running":
        return state
    waits = next((line for line in read_tail(folder, state.job, 1) if "waiting for" in line), "")
    left, taken = f"<{state.left}" if state.left else "", usual.get(_name_kind(state.job))
    if taken is not None:
        left = f"~{_write_seconds(max(0.0, taken - _read_seconds(state.elapsed)))}"
    return replace(state, left=left, reason=waits or state.reason)


def _list_some(names: Sequence[str], n_shown: int = 4) -> str:
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more


def estimate_rest(states: Sequence[JobState]) -> str:
    """Return a sentence on how long the jobs take yet, from those of their kind that are done; empty without any."""
    usual, at_once = _find_usual(states), max(1, sum(state.state == "running" for state in states))
    rest = [state for state in states if state.state in ("running", "waiting")]
    known = [state for state in rest if _name_kind(state.job) in usual]
    if not known:
        return ""
    seconds = sum(
        max(
            0.0,
            usual[_name_kind(state.job)] - (_read_seconds(state.elapsed) if state.state == "running" else 0),
        )
        for state in known
    )
    unknown = {state.job.name for state in rest if state not in known}
    beside = (
        f", not counting {_list_some(sorted(unknown))} (no similar job is finished yet)" if unknown else ""
    )
    left = _write_seconds(seconds / at_once)
    return f"about {left} left with {at_once} at the same time, estimated from similar jobs{beside}"


def find_clock_differences(folder: Path, jobs: Sequence[SentJob]) -> list[str]:
    """Return a sentence for each node whose clock differs by more than a minute from that of the disk or the sender.

    Nothing computed depends on clocks; times in logs and in records of artifacts do.
    """
    found: dict[str, float] = {}
    for job in jobs:
        note = _read_note(folder, job)
        with suppress(KeyError, TypeError, ValueError):
            off = float(note.get("clock_off", 0.0))
            early = float(note["started"]) - job.sent  # no job starts before it is sent
            if abs(off) <= _CLOCKS_S and early < -_CLOCKS_S:
                off = early
            if abs(off) > _CLOCKS_S:
                found.setdefault(str(note["host"]), off)
    return [
        f"the clock of {host} is {_write_seconds(abs(off))} {'ahead' if off > 0 else 'behind'}, so times "
        "in logs and records of that node are wrong; results do not depend on this."
        for host, off in found.items()
    ]


def _find_state(
    folder: Path, job: SentJob, note: dict[str, Any], queue: dict[str, _Queued] | None
) -> JobState:
    said, host = note.get("state", ""), str(note.get("host", ""))
    sentence = str(note.get("sentence", ""))
    if said == "done":
        return JobState(job, "done", "", _describe_seconds(note), "", host, _count_seconds(note))
    if said not in ("failed", "stopped") and _is_copied(folder, job):
        return JobState(
            job,
            "elsewhere",
            f"this folder is a copy, and the job belongs to {job.folder}: ask for the status there, or run the command "
            "again to work in this folder.",
        )
    if job.executor != "slurm":
        if said in ("failed", "stopped"):
            return JobState(job, said, sentence, _describe_seconds(note), "", host)
        if job.host != platform.node():
            return JobState(job, "unknown", f"it is a process of {job.host}; check its state there")
        if _is_running_here(folder, job, note):
            return JobState(job, "running", "", _describe_seconds(note, now=True), "", host)
        return JobState(job, "lost", _describe_loss(folder, job, note), "", "", host)
    if queue is None:
        return JobState(job, "unknown", "Slurm does not answer", _describe_seconds(note), "", host)
    found = queue.get(job.job_id)
    if found is not None and found.state in _WAITING:
        return JobState(job, "waiting", _describe_reason(found.reason), cause=found.reason)
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
    taken = _count_seconds(note, now=now)
    return "" if taken is None else _write_seconds(taken)


def _count_seconds(note: dict[str, Any], *, now: bool = False) -> float | None:
    with suppress(KeyError, TypeError, ValueError):
        # A clock that was set back in between would count below nothing.
        return max(0.0, float((time.time() if now else note["written"]) - note["started"]))
    return None


def _write_seconds(taken: float) -> str:
    seconds = int(taken)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _read_seconds(text: str) -> float:
    """Return seconds of a time as Slurm writes it, such as ``1-02:03:04`` or ``3:04``; 0 for none."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
    except ValueError:
        return 0.0
    return sum(part * 60**n for n, part in enumerate(reversed(parts))) + 86400 * int(days or 0)


def _read_queue(folder: Path, jobs: Sequence[SentJob]) -> dict[str, _Queued] | None:
    """Return what Slurm's queue and, where there is one, its accounting know of jobs; None if Slurm does not answer."""
    numbers = ",".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
    done = ask_slurm("squeue", "-r", "-t", "all", "-h", "-o", "%i|%T|%r|%M|%L|%N|%o", "-j", numbers)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    found = {}
    for line in done.stdout.splitlines():
        # Numbers begin anew, and a folder may come from another cluster: then the job of that number is another one's.
        if len(parts := line.strip().split("|", 6)) == 7 and _is_of(folder, Path(parts[6]).parent):
            found[parts[0]] = _Queued(*parts[1:6])
    if any(job.job_id not in found for job in jobs) and shutil.which("sacct") is not None:
        # What the controller has forgotten; without accounting this fails, and nothing is added.
        known = ask_slurm("sacct", "-n", "-X", "-P", "-o", "JobID,State,Elapsed,NodeList", "-j", numbers)
        for line in known.stdout.splitlines() if known.returncode == 0 else ():
            if len(parts := line.strip().split("|")) == 4 and parts[0] not in found:
                found[parts[0]] = _Queued(parts[1].split(" ")[0], "", parts[2], "", parts[3])
    return found


def _describe_reason(reason: str) -> str:
    words = f"it never starts: {_NEVER[reason]}" if reason in _NEVER else _REASONS.get(reason)
    return f"{words} ({reason})" if words else f"Slurm says: {reason}"


def _describe_ending(state: str, folder: Path, job: SentJob, note: dict[str, Any]) -> tuple[State, str]:
    if state.startswith("CANCELLED"):
        return "stopped", "it was cancelled; run the command again to continue."
    if state == "PREEMPTED":
        return "stopped", "other jobs took its place; run the command again to continue."
    if state in ("TIMEOUT", "DEADLINE"):
        return "failed", (
            f"it ran out of its {job.time} minutes; finished work is kept: request more with "
            "--cluster-set time=MINUTES, and run the command again."
        )
    if state == "OUT_OF_MEMORY":
        had = "what Slurm gives by default" if job.memory is None else f"{job.memory:g} GB"
        return "failed", f"it needs more memory than {had}; request more with --cluster-set memory=GB."
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return "failed", "its node failed; run the command again."
    # Slurm forgets a task of an array that was cancelled while it waited; that others left logs says that nodes see the
    # folder.
    if not state and not note and not _has_log(folder, job.job_id) and _has_log(folder, "*"):
        return (
            "stopped",
            "it left the queue before it began, most likely cancelled; run the command again to continue.",
        )
    return "lost", _describe_loss(folder, job, note)


def _has_log(folder: Path, number: str) -> bool:
    return any((folder / JOBS).glob(f"{number}_*_log.*"))


def _describe_loss(folder: Path, job: SentJob, note: dict[str, Any]) -> str:
    if note:
        return (
            "it was killed (by somebody, or because memory ran out), or its machine went down, while it worked; "
            "finished work is kept: run the command again."
        )
    if _has_log(folder, job.job_id):
        return (
            f"it ended before the command began; {folder / JOBS / (job.job_id + '_0_log.err')} says why; "
            "then run the command again."
        )
    return (
        f"it ended and left nothing in {folder / JOBS}, so it was cancelled before it began, or its node does not see "
        "that folder: then choose --out on a disk that all nodes share."
    )


def _is_running_here(folder: Path, job: SentJob, note: dict[str, Any]) -> bool:
    if job.job_id in STARTED:
        if not STARTED[job.job_id].done():
            return True
        del STARTED[job.job_id]
        return False
    # Numbers of processes are given again, so that the command line must be that of a job.
    return any(_is_job(folder, number) for number in (job.job_id, str(note.get("pid", ""))))


def _is_of(folder: Path, jobs: Path) -> bool:
    """Say whether a folder of submitit's files is that of a run or sweep; one that is gone may be."""
    try:
        return jobs.samefile(folder / JOBS)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _is_copied(folder: Path, job: SentJob) -> bool:
    """Say whether a job was sent from another folder that is still there; one that was moved keeps its jobs."""
    try:
        return (
            bool(job.folder)
            and Path(job.folder, JOBS).is_dir()
            and not _is_of(folder, Path(job.folder, JOBS))
        )
    except PermissionError:  # a folder of somebody else, from which this one was copied
        return True


def _is_job(folder: Path, number: str) -> bool:
    """Say whether a process of this machine is a job that was sent from a folder."""
    if not number.isdigit():
        return False
    shown = subprocess.run(
        ["ps", "-ww", "-o", "stat=,args=", "-p", number], capture_output=True, text=True, check=False
    )
    found = re.search(r"submitit\.(?:core\._submit|local\._local) (.+)$", shown.stdout.strip())
    return found is not None and not shown.stdout.startswith("Z") and _is_of(folder, Path(found[1]))


def wait_for_jobs(
    folder: Path,
    jobs: Sequence[SentJob],
    tell: Callable[[list[JobState]], None] = lambda states: None,
    *,
    n_left: int = 0,
) -> list[JobState]:
    """Wait until at most some jobs may still work, or those left never start, and return how all are.

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
    pause, lost, was_stuck, last = _POLL_S[0], set[str](), False, Counter[tuple[State, str]]()
    here = all(job.executor != "slurm" for job in jobs)
    while True:
        states = find_states(folder, jobs)
        # Slurm's reasons too, so that nobody waits without knowing for what.
        counts = Counter((state.state, state.reason if state.state == "waiting" else "") for state in states)
        if counts != last:
            tell(states)
            last = counts
        # Seen twice, as a shared disk may show a note some seconds after the queue has dropped the job.
        now_lost = {state.job.ticket for state in states if state.state == "lost"}
        if sum(state.is_active for state in states) <= n_left and now_lost <= lost:
            return states
        stuck = all(state.is_stuck for state in states if state.is_active)
        if stuck and was_stuck:  # Slurm may look at a job again
            return states
        was_stuck = stuck
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
    """End the jobs that may still work, and return those; others are of another person or machine."""
    active = [state for state in states if state.is_active]
    refused: set[str] = set()
    numbers = [state.job.job_id for state in active if state.job.executor == "slurm"]
    for start in range(0, len(numbers), 500):
        some = numbers[start : start + 500]
        done = ask_slurm("scancel", *some)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not re.search(_GONE, line)]
            named = {number for number in some if any(re.search(rf"\b{number}\b", line) for line in lines)}
            refused |= named if named or not lines else set(some)
    for state in active:
        if state.job.executor == "slurm":
            continue
        number = str(_read_note(folder, state.job).get("pid") or state.job.job_id)
        refused.add(state.job.job_id)
        if state.job.host == platform.node() and _is_job(folder, number):
            with suppress(PermissionError):
                os.kill(int(number), signal.SIGINT)
                refused.discard(state.job.job_id)
    return [state for state in active if state.job.job_id not in refused]


#: What ``scancel`` says of jobs that need no end.
_GONE = "Invalid job id|already complet"


def list_stages(job: SentJob) -> list[str]:
    """Return the stages that a job has finished, as its log says."""
    with suppress(OSError):
        text = Path(job.log).read_text(errors="replace")
        return list(dict.fromkeys(re.findall(r"^(\w[\w -]*?)\s+(?:computed|reused)\s", text, re.MULTILINE)))
    return []


def read_tail(folder: Path, job: SentJob, n_lines: int = 5) -> list[str]:
    """Return the last lines that a job printed; of submitit's own log where the command did not begin."""
    for path in (Path(job.log), folder / JOBS / f"{job.job_id}_0_log.err"):
        with suppress(OSError):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
            if lines := [line for line in text.splitlines() if line.strip()]:
                return lines[-n_lines:]
    return []
