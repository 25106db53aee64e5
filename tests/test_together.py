"""The command started by torchrun: processes that train together leave what one process leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.checks import DataError
from braindecode_vis.config import read_config
from braindecode_vis.pipeline import together
from braindecode_vis.pipeline.runs import open_run
from tests.test_cli import SMALL, call_anew, check_refusal

pytestmark = pytest.mark.whole

NETWORK = [
    "--set", "encoder={kind: network, epochs: 4, batch_size: 16, checkpoint_seconds: 0, device: cpu, out_of_fold: 2}",
    "--set", "encoder.network={kind: eegproject, dropout: 0}", "--set", "split={kind: kfold, n_folds: 2}",
    "--set", "prior={kind: spread}",  # which learns from predictions out of fold
]  # fmt: skip


LATENTS = ("--set", "generator={kind: latents}")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*arguments, program=("-m", "braindecode_vis")):
    return subprocess.Popen(
        [*LAUNCHER, *program, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def read_vectors(out):
    """Return what the trained networks predict: training trials out of fold, and test trials."""
    folders = [*out.glob("stages/out_of_fold/*"), *out.glob("stages/retrieve/*")]
    paths = sorted(path for folder in folders for path in folder.rglob("*.npy"))
    assert len(paths) > 4
    return {str(path.relative_to(out)): np.load(path) for path in paths}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    process = launch("run", "synthetic_digits", "--out", out, *SMALL, *NETWORK, "--json")
    told, errors = process.communicate()
    assert process.returncode == 0, errors
    return out, told, errors


@pytest.mark.further
def test_two_processes_train_what_one_trains(trained, tmp_path, command_line):
    out, told, errors = trained
    assert json.loads(told)["scores"] == json.loads((out / "scores.json").read_text())
    assert errors.count("train fold01") == 1
    for path in out.glob("stages/train/*/provenance.json"):
        assert json.loads(path.read_text())["n_processes"] == 2
    assert not list(out.rglob(".tmp-*"))
    assert not list((out / "work").glob("*"))

    done = command_line("reconstruct", "synthetic_digits", "--out", tmp_path, *SMALL, *NETWORK)
    assert done.returncode == 0, done.stderr
    alone, vectors = read_vectors(tmp_path), read_vectors(out)
    assert alone.keys() == vectors.keys()
    for name, expected in alone.items():
        if expected.dtype.kind == "f":  # sums in another order, which Adam makes larger
            assert np.linalg.norm(vectors[name] - expected) < 0.02 * np.linalg.norm(expected), name


@pytest.mark.slow  # kills of one process are in tests/test_pipeline.py
def test_a_killed_launch_goes_on_where_it_was(trained, tmp_path):
    process = launch("train", "synthetic_digits", "--out", tmp_path, *SMALL, *NETWORK)
    while process.poll() is None and not list(tmp_path.glob("work/*/out_of_fold0/checkpoint.safetensors")):
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = launch("train", "synthetic_digits", "--out", tmp_path, *SMALL, *NETWORK)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert call_anew("retrieve", tmp_path).returncode == 0
    expected, found = read_vectors(trained[0]), read_vectors(tmp_path)
    assert found.keys() == expected.keys()
    for name, vectors in expected.items():
        np.testing.assert_array_equal(found[name], vectors, err_msg=name)


def test_a_process_that_does_not_see_what_the_first_one_wrote_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "broadcast_flag", lambda *flag: False)  # the first process has written
    run = open_run(read_config("synthetic_digits"), tmp_path)
    following = together._SharedRun(run.config, run.folder, run.listener, {}, follows=True)
    with pytest.raises(DataError, match=f"the files of the first process are not in {tmp_path} on "):
        pipeline.preprocess(following)


@pytest.mark.slow  # two processes that load torch
def test_processes_that_see_different_folders_end(tmp_path):
    script = f'exec {sys.executable} -m braindecode_vis "$@" --out {tmp_path}/$RANK'
    process = launch(
        "-c", script, "bash", "train", "synthetic_digits", *SMALL, *NETWORK, program=("--no-python", "bash")
    )
    errors = process.communicate()[1]
    assert process.returncode
    assert f"the files of the first process are not in {tmp_path}/1 on " in errors
    assert not (tmp_path / "1" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("verb", "here", "sentence"),
    [
        ("train", "4", "encoder.kind=ridge is fitted by one process; start it without torchrun"),
        ("run", "2", "train on several machines with the verb train"),
        ("sweep", "4", "only train, pretrain, reconstruct and run work with several processes"),
    ],
)
def test_verbs_that_several_processes_cannot_do_are_refused(
    tmp_path, command_line, monkeypatch, verb, here, sentence
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("braindecode_vis.base.devices.leave", sys.exit)
    check_refusal(command_line(verb, "synthetic_digits", "--out", tmp_path, *SMALL), sentence)
    assert not (tmp_path / "stages").exists()


def test_images_that_cannot_be_shared_are_refused(tmp_path, command_line):
    call, out = command_line, tmp_path / "out"
    assert call("retrieve", "synthetic_digits", "--out", out, *SMALL, *LATENTS).returncode == 0
    check_refusal(call("reconstruct", out, "--worker", 2, "--workers", 2), "no worker 2 of 2", "from 0 to 1")
    check_refusal(call("reconstruct", out, "--worker", 2), "belong together")
    check_refusal(
        call("reconstruct", tmp_path / "none", "--worker", 0, "--workers", 2),
        "is not a run folder",
        "retrieve",
    )
    nearest = ["--set", "generator={kind: nearest}"]
    check_refusal(call("reconstruct", out, "--worker", 0, "--workers", 2, *nearest), "nothing to share")


@pytest.mark.slow  # in one process, test_image_rows has them
def test_processes_share_the_images_of_a_run(tmp_path, command_line):
    """Two processes of torchrun leave the files of one."""
    call, alone, out = command_line, tmp_path / "alone", tmp_path / "out"
    assert call("retrieve", "synthetic_digits", "--out", out, *SMALL, *LATENTS).returncode == 0
    shutil.copytree(out, alone)
    process = launch("reconstruct", out)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert call("reconstruct", alone).returncode == 0
    made = [
        {path.name: path.read_bytes() for path in folder.glob("stages/reconstruct/*/*.npy")}
        for folder in (out, alone)
    ]
    assert len(made[0]) >= 3
    assert made[0] == made[1]
    assert not (out / "work").exists()
    assert not list(out.rglob(".tmp-*"))
