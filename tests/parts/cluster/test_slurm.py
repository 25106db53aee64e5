"""A real Slurm of one node, started here: an array of runs, one of them cancelled, and the same command again."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from braindecode_vis.config import read_config
from braindecode_vis.config.cluster_config import ClusterConfig
from braindecode_vis.parts.cluster import submitting
from braindecode_vis.parts.cluster.launching import Launch
from braindecode_vis.parts.cluster.submitting import Cluster, Task, read_jobs, send, send_alone
from braindecode_vis.parts.cluster.sweeps import sweep_as_jobs
from braindecode_vis.parts.cluster.watching import find_states, wait_for_jobs
from braindecode_vis.pipeline.ending import finish_run
from braindecode_vis.pipeline.runs import open_run
from tests.parts.cluster.test_jobs import QUICK, send_two_sweeps

_PORT = 16817


@pytest.fixture(scope="module")
def slurm(shared, tmp_path_factory):
    """Slurm's daemons, for the tests of this module."""
    places = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    lacking = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=places)
    ]
    if lacking:
        pytest.skip(f"{lacking[0]} is not here: apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("only root starts Slurm's daemons")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", _PORT)) == 0:
            pytest.skip(f"another Slurm of this machine has port {_PORT}")
    folder = tmp_path_factory.mktemp("slurm")
    tools = shared / "tools"
    # nproc, by which the node is described, counts threads where these are bounded
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    up = subprocess.run(["bash", tools / "slurm_up.sh", folder], capture_output=True, text=True, env=free)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        if up.returncode or "idle" not in up.stderr:
            subprocess.run(["bash", tools / "slurm_down.sh", folder], check=False)
            pytest.skip(f"Slurm did not start here: {up.stderr.strip()[-200:]}")
        yield folder
        subprocess.run(["scancel", "--me"], check=False)
    end_daemons(folder)


def end_daemons(folder):
    """End the daemons of a Slurm; slurmd, which may wait for the end of a killed job, would keep its port."""
    pids = [
        int(path.read_text()) for path in (*folder.glob("*.pid"), folder / "munge" / "pid") if path.is_file()
    ]
    last = time.monotonic() + 1
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, sent)
        while any(Path(f"/proc/{pid}").is_dir() for pid in pids) and time.monotonic() < last:
            time.sleep(0.02)


@pytest.fixture
def two_nodes(slurm, shared, tmp_path, monkeypatch):
    """Another Slurm, of two nodes: two daemons of this machine, which Debian's package can start."""
    node = "NodeName=$h NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$mem State=UNKNOWN"
    nodes = [
        f"NodeName=$h{name} NodeHostname=$h NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=$mem State=UNKNOWN"
        for name, port in (("", 17018), ("-second", 17019))
    ]
    changes = {
        "16817": "17017", "16818": "17018", "/spool\n": "/spool-%n\n", "slurmd.pid\n": "slurmd-%n.pid\n",
        "slurmd.log\n": "slurmd-%n.log\n", node: "\n".join(nodes), "Nodes=$h ": "Nodes=$h,$h-second ",
        'slurmd -f "$SLURM_CONF"': 'slurmd -N $h -f "$SLURM_CONF"; slurmd -N $h-second -f "$SLURM_CONF"',
    }  # fmt: skip
    text = (shared / "tools" / "slurm_up.sh").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    script, folder = tmp_path / "up.sh", tmp_path / "two"
    script.write_text(text)
    up = subprocess.run(["bash", script, folder], capture_output=True, text=True)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    if up.returncode or "idle" not in up.stderr:
        pytest.skip(f"Slurm did not start twice here: {up.stderr.strip()[-200:]}")
    yield
    subprocess.run(["scancel", "--me"], check=False)
    end_daemons(folder)


def digest_results(folder):
    """Return digests of everything that a folder's stages computed; records hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("stages/*/[!.]*/**/*")
        if path.is_file() and path.name != "provenance.json"
    }


@pytest.mark.further
@pytest.mark.shared
def test_an_array_of_runs_is_finished_by_the_same_command_and_equals_serial_runs(
    slurm, tmp_path, command_line
):
    out, axes = tmp_path / "out", {"seed": ["0", "1"]}
    cluster = Cluster("slurm", ClusterConfig(time=10, parallel=2))
    first = sweep_as_jobs("synthetic_digits", axes, out, cluster, overrides=QUICK, wait=False)
    assert len(first.sent) == 2
    subprocess.run(["scancel", first.sent[1].job_id], check=True)
    again = sweep_as_jobs("synthetic_digits", axes, out, cluster, overrides=QUICK)
    assert {job.name for job in again.sent} == {"seed-1"}
    assert len(again.known) == 1
    assert {state.state for state in again.states} == {"done"}
    assert set(again.table["run"]) == {"seed-0", "seed-1"}
    assert (again.table["error"] == "").all()
    alone = tmp_path / "alone"
    with threadpool_limits(1):
        for seed in axes["seed"]:
            folder = alone / f"seed-{seed}"
            finish_run(open_run(read_config("synthetic_digits", [*QUICK, f"seed={seed}"]), folder))
            found = json.loads((out / folder.name / "scores.json").read_text())
            assert found == json.loads((folder / "scores.json").read_text())
    expected = {name: value for folder in alone.iterdir() for name, value in digest_results(folder).items()}
    assert digest_results(out) == expected
    assert len(expected) > 30
    status = command_line("status", out, "--json")
    assert {job["state"] for job in json.loads(status.stdout)["jobs"]} == {"done"}


@pytest.mark.shared
@pytest.mark.slow  # test_jobs has the same with jobs of this machine
def test_a_second_sweep_does_not_change_what_waits_in_the_queue(slurm, tmp_path):
    def set_queue(state):
        subprocess.run(["scontrol", "update", "PartitionName=main", f"State={state}"], check=True)

    set_queue("DOWN")
    try:
        cluster = Cluster("slurm", ClusterConfig(time=10, parallel=3))
        send_two_sweeps(tmp_path / "out", cluster, lambda: set_queue("UP"))
    finally:
        set_queue("UP")


@pytest.mark.shared
def test_slurm_itself_refuses_in_one_sentence(slurm, tmp_path, command_line):
    words = ["run", "synthetic_digits", "--out", tmp_path / "out", "--cluster", "slurm"]
    assert "did you mean 'main'" in command_line(*words, "--cluster-set", "partition=mian").stderr
    refused = command_line(*words, "--cluster-set", "cpus=4000")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: Slurm refused the jobs: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.shared
@pytest.mark.slow
def test_a_job_is_preempted_and_goes_on(slurm, tmp_path, command_line):
    """submitit's signal, as at the end of the time: the job is queued again, which Slurm does after two minutes."""
    out = tmp_path / "out"
    words = ["run", "synthetic_digits", "--out", out, "--cluster", "slurm", "--no-wait"]
    assert command_line(*words, *(word for text in QUICK for word in ("--set", text))).returncode == 0
    jobs = read_jobs(out)
    # Its note says that it listens to signals.
    while not (out / "jobs" / "run.json").is_file():
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR2", jobs[0].job_id], check=True)
    states = wait_for_jobs(out, jobs)
    assert [state.state for state in states] == ["done"]
    said = "".join(path.read_text() for path in (out / "jobs").glob(f"{jobs[0].job_id}_0_log.*"))
    assert "Requeued job" in said


@pytest.mark.shared
@pytest.mark.slow
def test_folds_are_jobs_that_wait_for_each_other(slurm, tmp_path, command_line):
    """Dependencies of Slurm: what all need, the folds as an array, the rest; and nothing where the first one fails."""
    settings = [*QUICK, "split={kind: kfold, n_folds: 2}"]
    out = tmp_path / "out"
    words = ["run", "synthetic_digits", *(word for text in settings for word in ("--set", text))]
    done = command_line(*words, "--out", out, "--cluster", "slurm")
    assert done.returncode == 0, done.stderr
    jobs = read_jobs(out)
    assert [job.name for job in jobs] == ["embed", "train-0", "train-1", "run"]
    assert {state.state for state in find_states(out, jobs)} == {"done"}
    fits = [
        line
        for name in ("train-0", "train-1", "run")
        for line in (out / "jobs" / f"{name}.log").read_text().splitlines()
        if line.startswith("train") and "computed" in line
    ]
    assert len(fits) == 2
    assert not [line for line in fits if line in (out / "jobs" / "run.log").read_text()]
    with threadpool_limits(1):
        finish_run(open_run(read_config("synthetic_digits", settings), tmp_path / "alone"))
    assert digest_results(out) == digest_results(tmp_path / "alone")
    stopped = tmp_path / "stopped"
    command_line(*words, "--out", stopped, "--cluster", "slurm", "--no-wait")
    jobs = read_jobs(stopped)
    subprocess.run(["scancel", jobs[0].job_id], check=True)
    states = wait_for_jobs(stopped, jobs)
    assert [state.state for state in states] == ["stopped"] * 4
    assert states[1].reason == "it was not started, since embed failed."


@pytest.mark.shared
def test_the_processes_of_a_job_know_their_place_and_the_end_of_one_is_that_of_all(
    slurm, tmp_path, monkeypatch
):
    monkeypatch.setattr(submitting, "make_command", lambda words: [sys.executable, "-S", "-c", words[-1]])
    log = tmp_path / "jobs" / "train.log"
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    script = (
        f"import os, sys, time\nprint(*[os.environ[name] for name in {names}], flush=True)\n"
        f"while os.environ['RANK'] == '0' or not open({str(log)!r}).read(): time.sleep(0.02)\n"
        "sys.exit('error: process 1: no weights here')"
    )
    with send_alone(tmp_path, print):
        task = Task("train", ["train", script], log, launch=Launch(1, 2))
        sent = send(tmp_path, [task], Cluster("slurm", ClusterConfig(time=5)))
    (state,) = wait_for_jobs(tmp_path, sent)
    first, second = (path.read_text().split() for path in (log, log.with_name("train-process1.log")))
    assert first[:5] == ["0", "2", "0", "2", "127.0.0.1"]
    assert second[:6] == ["1", "2", "1", *first[3:6]]
    assert state.state == "failed"
    assert state.reason == f"process 1 of 2, on {socket.gethostname()}: no weights here"


@pytest.mark.shared
@pytest.mark.slow  # three trainings by commands, each of which imports torch
def test_two_processes_of_a_job_train_what_one_trains_also_when_one_is_killed(
    two_nodes, tmp_path, command_line
):
    """On one node, and on two, where a process is killed and the same command goes on."""
    words = [word for text in QUICK[2:4] for word in ("--set", text)]
    words += [
        "--set",
        "encoder={kind: network, epochs: 20, batch_size: 8, checkpoint_seconds: 0, device: cpu}",
    ]
    words += ["--set", "encoder.network={kind: eegproject, dropout: 0, width: 8}"]

    def train(name, *more):
        return command_line("train", "synthetic_digits", "--out", tmp_path / name, *words, *more)

    def read_weights(name):
        (path,) = (tmp_path / name).glob("stages/train/*/*.safetensors")
        return load_file(path)

    sent = ("--cluster", "slurm", "--cluster-set", "processes=2")
    done = train("together", *sent)
    assert done.returncode == 0, done.stderr
    (provenance,) = (tmp_path / "together").glob("stages/train/*/provenance.json")
    assert json.loads(provenance.read_text())["n_processes"] == 2
    assert len(read_jobs(tmp_path / "together")) == 1

    sent = ("--cluster", "slurm", "--nodes", "2")
    assert train("killed", *sent, "--no-wait").returncode == 0
    while not (found := list((tmp_path / "killed").glob("work/*/checkpoint.safetensors"))):
        time.sleep(0.01)
    killed = [pid for pid in list_commands(tmp_path / "killed") if read_rank(pid) == "1"]
    os.kill(killed[0], signal.SIGKILL)
    (state,) = wait_for_jobs(tmp_path / "killed", read_jobs(tmp_path / "killed"))
    assert state.state == "failed"
    assert state.reason.startswith("process 1 of 2, on ")
    assert "it was killed (signal 9)" in state.reason
    assert found[0].is_file()
    assert not list_commands(tmp_path / "killed")
    assert train("killed", *sent).returncode == 0
    for name, value in read_weights("together").items():
        np.testing.assert_array_equal(read_weights("killed")[name], value, err_msg=name)

    assert train("alone").returncode == 0
    alone, together = (
        np.concatenate([value.ravel() for _, value in sorted(read_weights(name).items())]).astype(float)
        for name in ("alone", "together")
    )
    # sums in another order, which Adam makes larger where a gradient is small
    assert np.linalg.norm(together - alone) < 1e-3 * np.linalg.norm(alone)


def list_commands(folder):
    """Return the numbers of the processes that train into a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"train" in words and str(folder).encode() in words:
                found.append(int(path.parent.name))
    return found


def read_rank(pid):
    content = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in content if entry)["RANK"]
