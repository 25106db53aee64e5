"""Jobs through submitit: what is sent, what is reported of it, and what is left when it ends early."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import ConsentError, give_consent
from braindecode_vis.config import dump_config, read_config
from braindecode_vis.config.cluster_config import ClusterConfig
from braindecode_vis.parts.cluster import job as on_node
from braindecode_vis.parts.cluster import submitting, sweeps, watching
from braindecode_vis.parts.cluster.job import CommandJob, identify_software
from braindecode_vis.parts.cluster.submitting import (
    Cluster,
    SentJob,
    Task,
    read_cluster,
    read_jobs,
    send,
    send_alone,
)
from braindecode_vis.parts.cluster.watching import cancel_jobs, find_states, wait_for_jobs
from braindecode_vis.parts.studies.sweep import sweep

QUICK = [
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
    "dataset.n_train=40",
    "dataset.n_test=20",
    "dataset.n_voxels=50",
]
LOCAL = Cluster("local", ClusterConfig(parallel=4))


@pytest.fixture
def scripts(monkeypatch):
    """Let a job run a line of Python, where a command of the package takes seconds to start."""
    monkeypatch.setattr(submitting, "make_command", lambda words: [sys.executable, "-S", "-c", words[-1]])


def send_script(folder, line, cluster=LOCAL, name="run"):
    with send_alone(folder, print):
        return send(folder, [Task(name, ["run", line], folder / "jobs" / f"{name}.log")], cluster)


def wait_until(what):
    while not what():
        time.sleep(0.02)


# --- settings -----------------------------------------------------------------------------------------------


def test_what_jobs_ask_for_changes_no_fingerprint():
    plain, asked = read_config("synthetic_digits"), read_config("synthetic_digits", ["cluster.memory=8"])
    assert asked.cluster is not None
    assert asked.cluster.memory == 8
    assert plain.hashed_fields() == asked.hashed_fields()
    assert plain.model_dump() == asked.model_dump()  # nor what a run folder holds


@pytest.mark.parametrize(
    "text, sentence",
    [
        (r'setup=["a\nb"]', "as one line of its own"),
        (r'extra={qos: "a\nrm"}', "a value of one line"),
        ("extra={output: x}", "is set for every job"),
        ("extra={mem: 4G}", "the setting memory"),
        ("partition='a b'", "not a valid partition name of Slurm"),
        ("memori=4", "did you mean 'memory'"),
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_cluster("slurm", None, [text])


def test_nothing_is_accepted_and_ignored():
    with pytest.raises(ConfigError, match="has no effect with --cluster local"):
        read_cluster("local", None, ["memory=4"])
    with pytest.raises(ConfigError, match=r"--cluster is 'slrum'.*did you mean 'slurm'"):
        read_cluster("slrum", None)


def test_shell_commands_of_a_file_need_consent():
    """A configuration may be somebody else's."""
    theirs = ClusterConfig(setup=("module load cuda",))
    with pytest.raises(ConsentError, match=r"cluster\.setup.*--trust-code cluster"):
        read_cluster("slurm", theirs, where="theirs.yaml")
    assert read_cluster("slurm", theirs, ["setup=[date]"]).settings.setup == ("date",)
    with give_consent(code="cluster"):
        assert read_cluster("slurm", theirs).settings.setup == ("module load cuda",)


def test_settings_become_those_of_sbatch():
    from submitit.slurm.slurm import _make_sbatch_string

    settings = ClusterConfig(
        partition="gpu", gpus=2, memory=1.5, time=1, parallel=3, extra={"qos": "long", "exclusive": ""}
    )
    shares = [replace(SENT, job_id="7_0"), replace(SENT, job_id="7_1")]
    asked = submitting.describe_slurm(settings, shares, [replace(SENT, job_id="6")])
    text = _make_sbatch_string("true", "jobs", map_count=9, **asked)
    for line in (
        "partition=gpu", "gpus-per-node=2", "mem=1536M", "time=1", "signal=USR2@30", "array=0-8%3", "qos=long",
        "exclusive", "dependency=afterok:6,afterany:7", "kill-on-invalid-dep=yes",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text


# --- bad input of the cluster -------------------------------------------------------------------------------


def test_no_slurm_here_is_told_with_what_to_do_instead(command_line, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command_line("run", "synthetic_digits", "--out", tmp_path / "out", "--cluster", "slurm")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no Slurm on this machine")
    assert "--cluster debug" in done.stderr
    assert not (tmp_path / "out").exists()


def answer(monkeypatch, **answers):
    """Let Slurm's commands say something: text, or an error after an exclamation mark."""

    def ask(command, *words):
        said = answers.get(command, "!unknown")
        if command == "squeue" and said[:1] != "!":
            said = "\n".join(f"{line}|/gone/submission.sh" for line in said.splitlines())
        return subprocess.CompletedProcess(words, int(said[:1] == "!"), said, said[1:])

    monkeypatch.setattr(submitting, "ask_slurm", ask)
    monkeypatch.setattr(watching, "ask_slurm", ask)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


def test_a_partition_that_is_not_there_and_a_controller_that_is_down(monkeypatch):
    answer(monkeypatch, sinfo="gpu\ncpu\n")
    with pytest.raises(ConfigError, match=r"no partition gpi \(did you mean 'gpu'\?\); it has cpu, gpu"):
        submitting.check_cluster(Cluster("slurm", ClusterConfig(partition="gpi")))
    answer(monkeypatch, sinfo="!slurm_load_partitions: Unable to contact slurm controller")
    with pytest.raises(ConfigError, match="Unable to contact"):
        submitting.check_cluster(Cluster("slurm", ClusterConfig()))


SENT = SentJob("run", "7", "slurm", "t", ["run"], "log", 0.0, "anna", "login", 60, 4.0)


@pytest.mark.parametrize(
    "queue, note, state, words",
    [
        ("7|PENDING|Resources|0:00|1:00:00|", "", "waiting", "no node has enough free resources yet"),
        ("7|PENDING|PartitionTimeLimit|0:00|1:00:00|", "", "waiting", "it never starts: it requests more time"),
        ("7|PENDING|Licenses|0:00|1:00:00|", "", "waiting", "Slurm says: Licenses"),
        ("7|RUNNING|None|0:07|0:53|n1", "running", "running", ""),
        ("7|COMPLETING|None|0:07|0:53|n1", "done", "done", ""),
        ("7|PENDING|BeginTime|0:00|1:00:00|", "requeued", "waiting", "queued again"),
        ("7|OUT_OF_MEMORY|None|0:07|0:53|n1", "running", "failed", "more memory than 4 GB; request more with"),
        ("7|TIMEOUT|None|0:07|0:53|n1", "running", "failed", "ran out of its 60 minutes"),
        ("7|CANCELLED|None|0:07|0:53|n1", "running", "stopped", "cancelled"),
        ("7|NODE_FAIL|None|0:07|0:53|n1", "running", "failed", "its node failed"),
        ("", "running", "lost", "its machine went down"),
        ("7|FAILED|RaisedSignal|0:00|1:00|n1", "", "lost", "does not see that folder"),
        ("!Unable to contact slurm controller", "running", "unknown", "Slurm does not answer"),
        ("!slurm_load_jobs error: Invalid job id specified", "failed", "failed", "it says why"),
    ],
)  # fmt: skip
def test_what_is_made_of_the_queue_and_of_what_a_job_said(monkeypatch, tmp_path, queue, note, state, words):
    answer(monkeypatch, squeue=queue)
    (tmp_path / "jobs").mkdir()
    if note:
        said = {"ticket": "t", "state": note, "sentence": "it says why" if note == "failed" else ""}
        (tmp_path / "jobs" / "run.json").write_text(json.dumps(said))
    (found,) = find_states(tmp_path, [SENT])
    assert found.state == state
    assert words in found.reason


def test_jobs_say_by_name_what_they_wait_for_and_how_long_it_takes(monkeypatch, tmp_path):
    """From others of their kind that have ended, and from what they print while they wait for an artifact."""
    queue = "8_0|RUNNING|None|1:00|0:50:00|n1\n8_1|RUNNING|None|0:10|0:59:00|n1\n9|PENDING|Dependency|0:00|1:00:00|"
    answer(monkeypatch, squeue=queue)
    (tmp_path / "jobs").mkdir()
    share = replace(SENT, words=["train", "--worker", "0"])
    jobs = [
        replace(share, name=f"train-{n}", job_id=f"8_{n}", log=str(tmp_path / f"{n}.log")) for n in range(3)
    ]
    jobs.append(replace(SENT, name="all", job_id="9", after=["train-0", "train-1", "train-2"]))
    told = {"ticket": "t", "state": "done", "started": 100.0, "written": 400.0, "host": "n1"}
    (tmp_path / "jobs" / "train-2.json").write_text(json.dumps(told))
    (tmp_path / "1.log").write_text(
        "a\ntrain fold01: waiting for process 7 on n1 (job train-0), which is making it\n"
    )
    states = find_states(tmp_path, jobs)
    assert [state.left for state in states] == ["~0:04:00", "~0:04:50", "", ""]
    assert states[1].reason.endswith("(job train-0), which is making it")
    assert states[3].reason == "waits for train-0 (running), train-1 (running)"
    said = watching.estimate_rest(states)
    assert said.startswith("about 0:04:25 left with 2 at the same time, estimated from similar jobs")
    assert said.endswith("not counting all (no similar job is finished yet)")
    told |= {"state": "failed", "sentence": "no data."}
    (tmp_path / "jobs" / "train-0.json").write_text(json.dumps(told))
    answer(monkeypatch, squeue="9|CANCELLED|None|0:00|1:00:00|")
    assert find_states(tmp_path, [jobs[0], jobs[3]])[1].reason == (
        "it was not started, since train-0 failed."
    )


def test_jobs_of_others_that_have_the_same_numbers_are_left_alone(monkeypatch, tmp_path, command_line):
    """A folder that came from another cluster or machine holds numbers that name something else here."""
    out, others = tmp_path / "out", tmp_path / "others"
    for folder in (out, others):
        (folder / "jobs").mkdir(parents=True)

    def refuse_others(path):
        if path.is_relative_to(others):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path.exists()

    asked, theirs = [], f"7|RUNNING|None|0:07|0:53|n1|{others}/jobs/submission_file_1.sh"

    def ask(command, *words):
        asked.append((command, *words))
        answers = {
            "squeue": (0, theirs, ""),
            "scancel": (1, "", "scancel: error: Kill job error on job id 7: Access"),
        }
        return subprocess.CompletedProcess(words, *answers.get(command, (1, "", "")))

    monkeypatch.setattr(watching, "ask_slurm", ask)
    assert find_states(out, [SENT])[0].state == "lost"
    (state,) = find_states(others, [SENT])
    assert state.state == "running"
    assert cancel_jobs(others, [state, replace(state, job=replace(SENT, job_id="8"))])[0].job.job_id == "8"
    assert asked[-1] == ("scancel", "7", "8")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(60)", f"-m submitit.core._submit {others}/jobs"]
    ) as other:
        local = replace(SENT, executor="local", job_id=str(other.pid), host=on_node.platform.node())
        assert [find_states(folder, [local])[0].state for folder in (out, others)] == ["lost", "running"]
        # A copy of the folder says whose jobs these are; one that was moved keeps them.
        sent = replace(local, folder=str(others))
        (found,) = find_states(out, [sent])
        assert (found.state, found.is_active) == ("elsewhere", False)
        assert f"this folder is a copy, and the job belongs to {others}" in found.reason
        moved = replace(sent, folder=str(tmp_path / "gone"))
        assert [find_states(others, [job])[0].state for job in (sent, moved)] == ["running", "running"]
        monkeypatch.setattr(watching.Path, "is_dir", refuse_others)
        assert find_states(out, [sent])[0].state == "elsewhere"
        other.kill()
    far = {**asdict(SENT), "executor": "local", "host": "elsewhere"}
    (out / "jobs" / "jobs.json").write_text(json.dumps([far]))
    done = command_line("cancel", out)
    assert (done.returncode, done.stdout[:6]) == (2, "0 jobs")
    assert "1 jobs could not be ended, such as run (7), sent by anna from elsewhere" in done.stderr
    (out / "jobs" / "jobs.json").write_text(json.dumps([{**far, "job_id": "--user=anna"}]))
    assert "'--user=anna' is no number of a job" in command_line("cancel", out).stderr


def test_what_all_need_may_have_ended_before_and_shares_may_fail(monkeypatch, tmp_path):
    """The first share was then taken for what all need, so that the last job was cancelled where a share failed."""
    from braindecode_vis.parts.cluster import verbs as verbs

    asked = {}

    def note_only(folder, tasks, cluster, *, after, after_success, wait_for):
        asked[tasks[0].name] = [[job.name for job in jobs] for jobs in (after_success, after)]
        return [replace(SENT, name=task.name) for task in tasks]

    groups = [
        [Task(name, ["run"], tmp_path / name) for name in names] for names in (["embed"], ["a", "b"], ["run"])
    ]
    monkeypatch.setattr(submitting, "send", note_only)
    monkeypatch.setattr(watching, "find_states", lambda folder, jobs: list(jobs))
    verbs._send_and_wait(tmp_path, groups, Cluster("slurm", ClusterConfig()), wait=False)
    assert asked == {"embed": [[], []], "a": [["embed"], []], "run": [["embed"], ["a", "b"]]}
    done = watching.JobState(replace(SENT, name="embed"), "done")
    monkeypatch.setattr(watching, "find_states", lambda folder, jobs: [] if jobs else [done])
    verbs._send_and_wait(tmp_path, groups, Cluster("slurm", ClusterConfig()), wait=False)
    assert asked == {"embed": [[], []], "a": [[], []], "run": [[], ["a", "b"]]}


@pytest.mark.parametrize("name", ["50%j", "two\nlines"])
def test_a_folder_whose_name_slurm_would_change_is_refused(tmp_path, name):
    with (
        pytest.raises(ConfigError, match="a % or a line break in its name"),
        send_alone(tmp_path / name, print),
    ):
        pass
    assert not (tmp_path / name).exists()


def test_jobs_that_never_start_are_not_waited_for(monkeypatch, tmp_path, capsys):
    answer(monkeypatch, squeue="7|PENDING|PartitionNodeLimit|0:00|1:00:00|")
    (tmp_path / "jobs").mkdir()
    monkeypatch.setattr(watching, "_POLL_S", (0.01, 0.01))
    (state,) = wait_for_jobs(tmp_path, [SENT], lambda states: print(sweeps.count_states(states)))
    assert state.is_stuck
    assert capsys.readouterr().out == (
        "1 waiting (run: it never starts: it requests more than its partition has; cancel it, and request less "
        "(PartitionNodeLimit))\n"
    )


def test_a_clock_that_differs_is_told_and_nothing_depends_on_it(tmp_path):
    (tmp_path / "jobs").mkdir()
    note = tmp_path / "jobs" / "run.json"
    job = replace(SENT, sent=10_000.0)
    for told, words in (
        ({"started": 10_030.0, "clock_off": 0.4}, []),
        ({"started": 10_030.0, "clock_off": 185.2}, ["the clock of n1 is 0:03:05 ahead"]),
        ({"started": 6_400.0, "clock_off": 0.0}, ["the clock of n1 is 1:00:00 behind"]),
    ):
        note.write_text(json.dumps({"ticket": "t", "state": "done", "host": "n1", "written": 0.0, **told}))
        found = watching.find_clock_differences(tmp_path, [job])
        assert [sentence.partition(",")[0] for sentence in found] == words
        (state,) = watching.find_states(tmp_path, [job])
        assert state.elapsed == "0:00:00"  # set back since it began: less than nothing would read as hours


def test_a_task_of_an_array_that_was_cancelled_while_it_waited_is_not_blamed_on_the_disk(
    monkeypatch, tmp_path
):
    """Slurm's queue knows nothing of it afterwards, where it knows jobs that ended."""
    answer(monkeypatch, squeue="7_0|COMPLETED|None|0:07|0:53|n1")
    (tmp_path / "jobs").mkdir()
    task = replace(SENT, job_id="7_1")
    assert find_states(tmp_path, [task])[0].state == "lost"
    (tmp_path / "jobs" / "7_0_0_log.out").touch()
    assert find_states(tmp_path, [task])[0].reason.startswith("it left the queue before it began")


def test_accounting_is_asked_where_there_is_one(monkeypatch, tmp_path):
    answer(monkeypatch, squeue="", sacct="7|CANCELLED by 0|00:01:00|n1")
    assert find_states(tmp_path, [SENT])[0].state == "stopped"


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"the disk is full.*make room"), send_alone(tmp_path, print):
        raise OSError(errno.ENOSPC, "No space left on device")


# --- a job on its node --------------------------------------------------------------------------------------


def make_job(tmp_path, **changes):
    plain = CommandJob(
        "run", [sys.executable, "-c", ""], str(tmp_path), str(tmp_path / "log"), str(tmp_path / "note"), "t",
        "debug", 1, {"memory": 4.0, "time": 5, "requeues": 1},
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize(
    "changes, state, words",
    [
        ({}, "done", ""),
        ({"software": {**identify_software(), "numpy": "0.1"}}, "failed", "the job was sent from a machine with 0.1"),
        ({"software": {"braindecode_vis": "0"}}, "failed", "another version of the code of braindecode_vis"),
        ({"cwd": "/nowhere"}, "failed", "cannot see the folder /nowhere"),
        ({"command": [sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]}, "failed",
         "by somebody (kill -9, a scheduler) or by the system because memory ran out; it used up to "),
        ({"command": [sys.executable, "-S", "-c", "raise SystemExit('error: no data.')"]}, "failed", "no data."),
        ({"command": [sys.executable, "-S", "-c", "raise SystemExit(143)"]}, "stopped", "cancelled or preempted"),
    ],
)  # fmt: skip
def test_a_job_says_how_it_ended(tmp_path, changes, state, words):
    make_job(tmp_path, **changes)()
    note = json.loads((tmp_path / "note").read_text())
    assert note["state"] == state
    assert abs(note["clock_off"]) < 60
    assert words in note.get("sentence", "")


def test_a_full_disk_on_the_node_is_told_in_its_log(tmp_path, monkeypatch, capsys):
    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(on_node, "write_note", refuse)
    make_job(tmp_path)()
    assert (
        f"error: {tmp_path / 'note'} could not be written (No space left on device)"
        in capsys.readouterr().err
    )


def test_the_second_person_is_told_who_works_on_a_sweep():
    said = sweeps._describe_known([SENT, SENT])
    assert "2 of the missing runs are already waiting or running, sent by anna from login" in said


def test_threads_are_those_that_were_asked_for(tmp_path):
    line = "import os; print(os.environ['OMP_NUM_THREADS'])"
    make_job(tmp_path, command=[sys.executable, "-S", "-c", line], threads=3)()
    assert (tmp_path / "log").read_text() == "3\n"


#: Waits for its end by a signal the first time; the second time it has nothing to do.
_TWICE = (
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('cleaned').touch(), sys.exit(143)))\n"
    "p = pathlib.Path('begun')\n"
    "if p.exists(): sys.exit()\n"
    "p.touch()\n"
    "time.sleep(250)"
)


def test_a_job_whose_time_is_up_ends_cleanly_and_goes_on(tmp_path, scripts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = send_script(tmp_path, _TWICE)
    wait_until((tmp_path / "begun").exists)
    assert find_states(tmp_path, jobs)[0].state == "running"
    # What Slurm and submitit's local executor send before the end of the time.
    os.kill(json.loads((tmp_path / "jobs" / "run.json").read_text())["pid"], signal.SIGUSR2)
    (state,) = wait_for_jobs(tmp_path, jobs)
    assert state.state == "done"
    assert (tmp_path / "cleaned").exists()


def test_work_is_sent_once_and_cancelled_by_name(tmp_path, scripts, monkeypatch, command_line):
    """Two people may give the same command, and one of them another one."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    jobs = send_script(out, _TWICE)
    wait_until((tmp_path / "begun").exists)
    words = ("run", "synthetic_digits", "--out", out, "--cluster", "local", "--no-wait")
    jobs_file = out / "jobs" / "jobs.json"
    before = jobs_file.read_text()
    other = command_line(*words)
    assert other.returncode == 2
    assert "for another command" in other.stderr
    listed = json.loads(before)
    listed[0]["words"] = [str(word) for word in words[:4]]
    jobs_file.write_text(json.dumps(listed))
    same = command_line(*words)
    assert "not sent again" in same.stderr
    assert "1 running" in same.stdout
    assert [row["job_id"] for row in json.loads(jobs_file.read_text())] == [jobs[0].job_id]
    assert "1 jobs" in command_line("cancel", out).stdout
    assert wait_for_jobs(out, jobs)[0].state == "stopped"
    wait_until((tmp_path / "cleaned").exists)
    assert not cancel_jobs(out, find_states(out, jobs))


def test_who_reads_what_a_command_prints_waits_for_no_job(tmp_path, scripts, capfd):
    """A pipe behind --no-wait stayed open until all local jobs had ended."""
    ends = os.pipe()
    kept = os.dup(1)
    os.dup2(ends[1], 1)
    try:
        jobs = send_script(tmp_path, "import time; time.sleep(60)")
    finally:
        os.dup2(kept, 1)
        for number in (kept, ends[1]):
            os.close(number)
    os.set_blocking(ends[0], False)
    assert os.read(ends[0], 10) == b""  # its end, and not nothing yet
    os.close(ends[0])
    wait_until((tmp_path / "jobs" / "run.json").exists)
    assert len(cancel_jobs(tmp_path, find_states(tmp_path, jobs))) == 1
    wait_for_jobs(tmp_path, jobs)


def test_more_local_jobs_than_run_at_once_are_not_left_alone(tmp_path, command_line):
    words = ("sweep", "synthetic_digits", "--over", "seed=0..4", "--out", tmp_path / "out", "--no-wait")
    done = command_line(*words, "--cluster", "local", "--cluster-set", "parallel=2")
    assert done.returncode == 2
    assert "would start 5 jobs" in done.stderr
    assert "applies to jobs only; add --cluster" in command_line(*words).stderr
    assert (
        "--jobs applies to runs of this process"
        in command_line(*words[:-1], "--jobs", 2, "--cluster", "debug").stderr
    )


def test_folders_without_jobs_are_told(tmp_path, command_line):
    assert "no jobs were sent from" in command_line("status", tmp_path).stderr
    assert "holds no sweep.json" in command_line("collect", tmp_path).stderr


def test_local_jobs_are_started_as_room_is_made(tmp_path, scripts):
    one = Cluster("local", ClusterConfig(parallel=1))
    line = "import pathlib, time; pathlib.Path('{}/%d').touch(); time.sleep(0.2)".format(tmp_path)  # noqa: UP032
    tasks = [Task(f"t{n}", ["run", line % n], tmp_path / "jobs" / f"{n}.log") for n in range(2)]
    with send_alone(tmp_path, print):
        jobs = send(tmp_path, tasks, one, wait_for=sweeps.make_room(tmp_path))
    assert find_states(tmp_path, jobs)[0].state == "done"
    assert [state.state for state in wait_for_jobs(tmp_path, jobs)] == ["done", "done"]


# submitit's debug executor leaves its logs open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shares_of_images_become_jobs_and_one_finishes(tmp_path, scripts, command_line, monkeypatch):
    from braindecode_vis.config import dump_config

    (tmp_path / "config.yaml").write_text(dump_config(read_config("synthetic_digits")))
    (tmp_path / "stages").mkdir()
    monkeypatch.setattr(
        submitting, "make_command", lambda words: [sys.executable, "-S", "-c", f"print({words})"]
    )
    done = command_line("reconstruct", tmp_path, "--workers", 2, "--cluster", "debug", "--json")
    assert done.returncode == 0, done.stderr
    names = [row["name"] for row in json.loads(done.stdout)["jobs"]]
    assert names == ["share-0", "share-1", "reconstruct"]
    said = [(tmp_path / "jobs" / f"{name}.log").read_text() for name in names]
    assert said[1].strip() == str(["reconstruct", str(tmp_path), "--worker", "1", "--workers", "2"])
    assert said[2].strip() == str(["reconstruct", str(tmp_path)])


# submitit's debug executor leaves its logs open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_folds_become_jobs_and_one_finishes(tmp_path, command_line, monkeypatch):
    """Each group of jobs waits for the one before, and what is done is not sent again while the last one is not."""
    line = "import sys; sys.exit('finish' in sys.argv)"
    monkeypatch.setattr(
        submitting,
        "make_command",
        lambda words: [sys.executable, "-S", "-c", line, *words, *(["finish"] if words[0] == "run" else [])],
    )
    split = "split={kind: kfold, n_folds: 3}"
    words = ["run", "synthetic_digits", "--out", tmp_path / "out", "--set", split, "--cluster", "debug"]
    done = command_line(*words)
    assert done.returncode == 2
    assert "the job run failed" in done.stderr
    jobs = read_jobs(tmp_path / "out")
    assert [(job.name, job.after) for job in jobs] == [
        ("embed", []), *((f"train-{n}", ["embed"]) for n in range(3)),
        ("run", ["embed", "train-0", "train-1", "train-2"]),
    ]  # fmt: skip
    assert jobs[2].words[-4:] == ["--worker", "1", "--workers", "3"]
    assert jobs[0].words == ["embed", "synthetic_digits", "--out", str(tmp_path / "out"), "--set", split]
    command_line(*words)
    again = {job.name: job.job_id for job in read_jobs(tmp_path / "out")}
    assert {job.name for job in jobs if again[job.name] != job.job_id} == {"run"}
    drawn = [*words[:6], "--set", "generator.kind=latents", "--workers", "2", *words[6:]]
    command_line(*drawn)
    names = [job.name for job in read_jobs(tmp_path / "out")]
    assert names[-6:] == ["embed", "train-0", "train-1", "images-0", "images-1", "run"]
    assert "--workers applies to jobs only" in command_line("run", "synthetic_digits", "--workers", 2).stderr


def test_a_sweep_of_local_jobs_is_sent_once_and_collected(tmp_path, command_line):
    out = tmp_path / "out"
    words = ["sweep", "synthetic_digits", "--over", "seed=3", "--out", out, "--cluster", "local"]
    words += [word for text in QUICK for word in ("--set", text)]
    done = command_line(*words)
    assert done.returncode == 0, done.stderr
    first = read_jobs(out)
    assert "1 done" in command_line("status", out).stdout
    assert "6, evaluate" in command_line("status", out).stdout
    again = command_line(*words)
    assert again.returncode == 0
    assert read_jobs(out) == first  # nothing was sent
    assert "jobs" not in again.stderr
    collected = json.loads(command_line("collect", out, "--json").stdout)
    assert collected["failed"] == []
    assert (out / "board.html").is_file()
    run = command_line("collect", out / "seed-3")
    assert "its scores are there" in run.stdout
    (stage,) = (out / "stages" / "train").glob("*/")
    stage.rename(out / "elsewhere")
    config = read_config("synthetic_digits", [*QUICK, "seed=3"])
    (asked,) = sweeps._digest_all([config])
    assert not sweeps._is_there(out / "seed-3", config, asked, sweeps._list_stages(out))
    (out / "seed-3" / "scores.json").write_text("[]")
    with pytest.raises(DataError, match="every run of the sweep failed"):
        sweeps.collect_sweep(out)


def read_sweep(out):
    """Return the settings of all runs of a sweep, and its list."""
    return {
        path.relative_to(out): path.read_bytes() for path in (*out.glob("*/config.yaml"), out / "sweep.json")
    }


def send_two_sweeps(out, cluster, release):
    """Send one sweep while the queue holds all jobs, and others into its folder; return the runs, as they ended."""
    axes, base = {"seed": ["0", "1"]}, [*QUICK, "encoder.alphas=[10.0]"]
    (out / "other").mkdir(parents=True)
    (out / "other" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="holds the run other, which is not of this sweep"):
        sweeps.sweep_as_jobs("synthetic_digits", axes, out, cluster, overrides=base)
    assert sorted(path.name for path in out.iterdir()) == ["other"]  # nothing was written
    shutil.rmtree(out)
    first = sweeps.sweep_as_jobs("synthetic_digits", axes, out, cluster, overrides=base, wait=False)
    before = read_sweep(out)
    for theirs, overrides, sentence in (
        (
            axes,
            [*QUICK, "encoder.alphas=[0.1]"],
            r"such as seed-0: encoder\.alphas \(\[10\.0\], now \[0\.1\]\)",
        ),
        ({"seed": ["2"]}, [*QUICK, "encoder.alphas=[0.1]"], r"such as seed-0: encoder\.alphas"),
        ({"encoder.alphas": ["[10.0]"]}, QUICK, "a sweep over seed, but this one is over encoder.alphas"),
        (axes, [*base, "name=theirs"], "was sent for .*seed-0 with other settings"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            sweeps.sweep_as_jobs("synthetic_digits", theirs, out, cluster, overrides=overrides, wait=False)
        assert read_sweep(out) == before
    with pytest.raises(ConfigError, match=r"such as seed-0: encoder\.alphas"):
        sweep("synthetic_digits", axes, out, overrides=QUICK)
    # Another seed of the same settings is no other sweep, and the list keeps what it had.
    more = sweeps.sweep_as_jobs("synthetic_digits", {"seed": ["2"]}, out, cluster, overrides=base, wait=False)
    assert [row["run"] for row in json.loads((out / "sweep.json").read_text())["runs"]] == [
        "seed-0",
        "seed-1",
        "seed-2",
    ]
    # What no command does any more, a hand may.
    theirs = dump_config(read_config("synthetic_digits", [*QUICK, "encoder.alphas=[0.1]", "seed=1"]))
    (out / "seed-1" / "config.yaml").write_text(theirs)
    release()
    states = {state.job.name: state for state in wait_for_jobs(out, [*first.sent, *more.sent])}
    assert {name: state.state for name, state in states.items()} == {
        "seed-0": "done", "seed-1": "failed", "seed-2": "done",
    }  # fmt: skip
    assert "has other settings than when this job was submitted" in states["seed-1"].reason
    assert not (out / "seed-1" / "scores.json").exists()
    for seed in (0, 2):
        made = json.loads((out / f"seed-{seed}" / "provenance.json").read_text())["config"]
        assert (made["seed"], made["encoder"]["alphas"]) == (seed, [10.0])
    table = sweeps.collect_sweep(out)
    assert table.groupby("run")["error"].first().to_dict().keys() == states.keys()


@pytest.mark.further
def test_a_second_sweep_does_not_change_what_a_first_has_sent(tmp_path, monkeypatch):
    """The second wrote its settings into the folders that the first one's jobs read when they started.

    All four jobs then computed the second setting, and the list of the sweep shrank to the second one's runs.
    """
    gate = tmp_path / "gate"
    wait = "while not os.path.exists(sys.argv[1]): time.sleep(0.05)"
    held = f"import os, sys, time\n{wait}\nos.execv(sys.argv[2], sys.argv[2:])"
    make = submitting.make_command
    monkeypatch.setattr(
        submitting, "make_command", lambda words: [sys.executable, "-S", "-c", held, str(gate), *make(words)]
    )
    send_two_sweeps(tmp_path / "out", LOCAL, gate.touch)


def test_the_job_itself_loads_nothing_heavy():
    """Each of thousands of jobs starts there, before its command does."""
    code = "import sys, braindecode_vis.parts.cluster.job; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert on_node.CommandJob.__module__ == "braindecode_vis.parts.cluster.job"
