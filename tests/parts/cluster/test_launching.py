"""Which jobs become several processes, and what each of them knows."""

import json
import socket
import time

import pytest

from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.devices import LOST_PROCESS
from braindecode_vis.config import read_config
from braindecode_vis.config.cluster_config import ClusterConfig
from braindecode_vis.parts.cluster import launching
from braindecode_vis.parts.cluster.launching import SINGLE, Launch, choose_launch
from braindecode_vis.parts.cluster.submitting import Cluster, describe_slurm, read_cluster
from braindecode_vis.parts.cluster.sweeps import sweep_as_jobs


def choose(verb="train", executor="slurm", kind="network", said=(), **settings):
    config = read_config("synthetic_digits", [f"encoder={{kind: {kind}}}"])
    return choose_launch(verb, config, ClusterConfig(**settings), executor=executor, said=said)


def test_a_process_for_each_card_where_the_verb_trains_and_the_encoder_can():
    assert choose(gpus=8, nodes=2) == Launch(2, 8)
    assert choose("run", gpus=2, distributed="fsdp") == Launch(1, 2, "fsdp")
    assert choose("pretrain", kind="ridge", processes=3) == Launch(1, 3)
    assert choose(kind="ridge", gpus=2) == SINGLE  # whose cards belong to one process
    assert choose("embed", gpus=2, nodes=2) == SINGLE  # nodes of a file are for its training
    assert choose(executor="debug", gpus=2) == SINGLE


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"verb": "embed", "nodes": 2, "said": {"nodes"}},
            "embed works in one process, but nodes is for train",
        ),
        (
            {"kind": "ridge", "processes": 2},
            "cluster.processes is for encoders that train in several processes, but ",
        ),
        ({"executor": "debug", "processes": 2}, "--cluster debug starts one process"),
        ({"executor": "local", "nodes": 2}, "--cluster local has one node"),
        ({"gpus": 2, "processes": 4}, "each process needs its own GPU"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        choose(**given)


def test_nothing_is_sent_where_one_process_works(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="each run of a sweep has one process"):
        sweep_as_jobs(
            "synthetic_digits", {"seed": ["0"]}, tmp_path, Cluster("local", ClusterConfig(processes=2))
        )
    with pytest.raises(ConfigError, match="to Slurm and has no effect with --cluster local"):
        read_cluster("local", None, ["nodes=2"])


def test_processes_become_settings_of_sbatch_and_srun():
    from submitit.slurm.slurm import _make_sbatch_string

    asked = describe_slurm(ClusterConfig(gpus=4, cpus=3))
    assert not SINGLE.describe_slurm(asked["srun_args"])
    assert Launch(gpus=1).describe_slurm(asked["srun_args"]) == {"gpus_per_node": 1}
    asked |= Launch(2, 4).describe_slurm(asked["srun_args"])
    text = _make_sbatch_string("true", "jobs", **asked)
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=3"):
        assert f"#SBATCH --{line}\n" in text
    assert "--cpus-per-task=3 --kill-on-bad-exit=1" in text


def test_processes_on_two_nodes_meet_on_the_first(monkeypatch):
    """In the environment that Slurm gives to the third of four tasks."""
    told = {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "1", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[03-04]",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    place = launching.describe_place("fsdp")
    port = int(place.pop("MASTER_PORT"))
    assert 12_000 <= port < 30_000
    assert place == {
        "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu03", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
    }  # fmt: skip
    assert launching.find_rank() == 2
    monkeypatch.setenv("SLURM_PROCID", "0")
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(OSError, match=f"port {port} of .* is used by another program"):
            launching.describe_place("ddp")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert launching.describe_place("ddp")["MASTER_PORT"] != str(port)


def test_the_process_that_ended_first_is_believed(tmp_path):
    note, now = tmp_path / "train.json", time.time()
    said = {"ticket": "t", "state": "failed", "written": now}
    note.write_text(json.dumps({**said, "sentence": f"{LOST_PROCESS}; its own message says why."}))
    assert launching.find_failure(note, "t", now - 1) == {}
    failure = {**said, "sentence": "process 1 of 2, on n1: it was killed"}
    launching.name_failure(note).write_text(json.dumps(failure))
    assert launching.find_failure(note, "t", now - 1) == failure
    assert launching.find_failure(note, "t", now + 1) == {}  # of an earlier attempt
    assert launching.find_failure(note, "other", now - 1) == {}
