"""A real Slurm of one node, started here: an array of runs, one of them cancelled, and the same command again."""

import hashlib
import json
import os
import shutil
import socket
import subprocess

import pytest
from threadpoolctl import threadpool_limits

from braindecode_vis.cluster.submitting import Cluster, read_jobs
from braindecode_vis.cluster.sweeps import sweep_as_jobs
from braindecode_vis.cluster.watching import find_states, wait_for_jobs
from braindecode_vis.config import read_config
from braindecode_vis.config.cluster_config import ClusterConfig
from braindecode_vis.pipeline.ending import finish_run
from braindecode_vis.pipeline.runs import open_run

QUICK = [
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
    "dataset.n_train=40",
    "dataset.n_test=20",
    "dataset.n_voxels=50",
]
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
    up = subprocess.run(["bash", tools / "slurm_up.sh", folder], capture_output=True, text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        if up.returncode or "idle" not in up.stderr:
            subprocess.run(["bash", tools / "slurm_down.sh", folder], check=False)
            pytest.skip(f"Slurm did not start here: {up.stderr.strip()[-200:]}")
        yield folder
        subprocess.run(["scancel", "--me"], check=False)
    subprocess.run(["bash", tools / "slurm_down.sh", folder], check=False)


def digest_results(folder):
    """Return digests of everything that a folder's stages computed; records hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("stages/*/[!.]*/**/*")
        if path.is_file() and path.name != "provenance.json"
    }


@pytest.mark.shared
def test_an_array_of_runs_is_finished_by_the_same_command_and_equals_serial_runs(
    slurm, tmp_path, command_line
):
    out, axes = tmp_path / "out", {"seed": [str(n) for n in range(3)]}
    cluster = Cluster("slurm", ClusterConfig(time=10, parallel=3))
    first = sweep_as_jobs("synthetic_digits", axes, out, cluster, overrides=QUICK, wait=False)
    assert len(first.sent) == 3
    subprocess.run(["scancel", first.sent[2].job_id], check=True)
    again = sweep_as_jobs("synthetic_digits", axes, out, cluster, overrides=QUICK)
    assert {job.name for job in again.sent} == {"seed-2"}
    assert len(again.known) == 2
    assert {state.state for state in again.states} == {"done"}
    assert set(again.table["run"]) == {f"seed-{n}" for n in range(3)}
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
    assert command_line(*words).returncode == 0
    jobs = read_jobs(out)
    while find_states(out, jobs)[0].state != "running" or not (out / "stages").is_dir():
        pass
    subprocess.run(["scancel", "--signal=USR2", jobs[0].job_id], check=True)
    states = wait_for_jobs(out, jobs)
    assert [state.state for state in states] == ["done"]
    assert (
        "Requeued job"
        in (out / "jobs" / f"{jobs[0].job_id}_0_log.err").read_text()
        + (out / "jobs" / f"{jobs[0].job_id}_0_log.out").read_text()
    )
