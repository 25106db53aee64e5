"""Limits of memory: which one binds, what does not fit, and the sentence when it ran out."""

import ctypes
import errno
import gc
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from braindecode_vis.base import memory
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError, refuse_damage
from braindecode_vis.base.memory import (
    _REDUCE,
    MemoryLimit,
    MemoryWarning,
    TooLargeError,
    check_memory,
    describe_out_of_memory,
    find_memory,
    is_out_of_memory,
    name_options,
    profile_step,
    release_pages,
)
from braindecode_vis.base.parts import find_parts
from braindecode_vis.cli import EXAMPLES, list_options
from braindecode_vis.encoders.ridge import RidgeConfig, estimate_ridge_bytes
from braindecode_vis.pipeline.reconstruction import estimate_images_bytes
from braindecode_vis.scoring.retrieval import compute_similarity
from tests.test_cli import SMALL

GB = 10**9


def _write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_control_groups_of_version_2_bind_from_any_level_and_their_cache_is_free(tmp_path):
    """A job of Slurm or a container is killed without a word beyond them, however much the machine has."""
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    _write_group(tmp_path / "fs", memory__max="max", memory__current=9 * GB)
    _write_group(tmp_path / "fs/job", memory__max=4 * GB, memory__current=3 * GB)
    (tmp_path / "fs/job/memory.stat").write_text(f"anon {GB}\ninactive_file {GB}\nactive_file {GB // 2}\n")
    _write_group(tmp_path / "fs/job/step", memory__max="max", memory__current=GB)
    (found,) = memory._find_group_limits(tmp_path / "fs", own)
    assert (found.total, found.free) == (4 * GB, 2.5 * GB)
    assert "cgroup" in found.describe()


def test_control_groups_of_version_1(tmp_path):
    own = tmp_path / "own"
    own.write_text("9:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    # The container sees its own group at the root, not under the path of the machine.
    _write_group(tmp_path / "fs/memory", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB)
    (tmp_path / "fs/memory/memory.stat").write_text(
        f"total_inactive_file {GB // 4}\ntotal_active_file 0\nactive_file 7\n"
    )
    (found,) = memory._find_group_limits(tmp_path / "fs", own)
    assert (found.total, found.free) == (2 * GB, 1.25 * GB)
    _write_group(tmp_path / "fs/memory", memory__limit_in_bytes=9223372036854771712)
    assert not list(memory._find_group_limits(tmp_path / "fs", own))


def test_the_machine_itself_has_memory():
    found = find_memory()
    assert found is not None
    assert 0 < found.free <= found.total


@pytest.fixture
def little(monkeypatch):
    """Leave one gigabyte."""
    limit = MemoryLimit(GB, 4 * GB, "memory of this machine", "use a larger one")
    monkeypatch.setattr(memory, "find_memory", lambda: limit)


@pytest.mark.usefixtures("little")
def test_what_cannot_fit_is_refused_and_what_is_tight_announced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_memory(0.7 * GB, what="a step", reduce="its size")
    with pytest.warns(
        MemoryWarning, match=r"a step needs about 900 MB of memory, and 1\.0 GB of 4\.0 GB are free"
    ):
        check_memory(0.9 * GB, what="a step", reduce="its size")
    with pytest.raises(
        TooLargeError, match=r"needs about 2\.0 GB .*; reduce its size, or use a larger one\.$"
    ):
        check_memory(2 * GB, what="a step", reduce="its size")


@pytest.mark.usefixtures("little")
def test_large_steps_refuse_before_they_begin():
    ids = np.arange(40_000).astype(str).astype(object)
    rows = Embeddings(np.ones((40_000, 1), np.float32), ids, "toy")
    with pytest.raises(TooLargeError, match=r"matrix of similarities of 40000 queries .* 6\.4 GB"):
        compute_similarity(rows, rows, device="cpu")
    trials = pd.DataFrame(
        {"subject": "1", "session": "1", "run": "1", "repetition": 0, "split": "train"}, range(2000)
    )
    data = np.broadcast_to(np.float32(0), (2000, 60_000))
    responses = Responses.from_checked(
        data, ("trial", "voxel"), trials.assign(stimulus_id=ids[:2000]), "au", {}
    )
    with pytest.raises(
        TooLargeError, match=r"ridge on 2000 trials of 60000 features and 1 targets .*--subject"
    ):
        RidgeConfig().build(seed=0).fit(responses, rows.select(list(ids[:2000])))


# --- estimates against what was held -------------------------------------------------------------------


def _measure_peak(run):
    """Return the bytes that a call held at its peak beyond what was held before."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        pytest.skip("this system does not tell how much a process held")

    def read(name):
        return (
            int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])
            * 1024
        )

    # What earlier tests freed goes back to the system; used again, it would show in no peak.
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    clear.write_text("5")  # forget the peak so far
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((900, 8000, 20), marks=pytest.mark.further),
        pytest.param((8000, 500, 20), marks=pytest.mark.further),
        (900, 900, 1500),
    ],
    ids=["wide", "tall", "many targets"],
)
def test_ridge_holds_what_was_estimated(shape):
    n_trials, n_features, n_targets = shape
    generator = np.random.default_rng(0)
    ids = np.arange(n_trials).astype(str).astype(object)
    trials = pd.DataFrame(
        {"subject": "1", "session": "1", "run": "1", "repetition": 0, "split": "train"}, ids
    )
    data = generator.standard_normal((n_trials, n_features), dtype=np.float32)
    trials = trials.assign(stimulus_id=ids).reset_index(drop=True)
    responses = Responses.from_checked(data, ("trial", "voxel"), trials, "au", {})
    targets = Embeddings(generator.standard_normal((n_trials, n_targets), dtype=np.float32), ids, "toy")
    encoder = RidgeConfig(alphas=(1.0, 10.0), n_inner_folds=2).build(seed=0)
    encoder.fit(responses.select(np.arange(50)), targets.select(list(ids[:50])))  # libraries are loaded
    held = _measure_peak(lambda: encoder.fit(responses, targets)) + data.nbytes
    # Another library of linear algebra may need other space of its own.
    assert 0.7 < estimate_ridge_bytes(*shape) / held < 1.5


def test_a_training_holds_what_was_estimated():
    from braindecode_vis.encoders.signal import Signal
    from braindecode_vis.training.model import _count_kept_bytes, estimate_training_bytes

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = [torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.BatchNorm1d(512)] * 12
            self.inner = torch.nn.Sequential(*layers)

        def network(self, data, subject):
            return self.inner(data)

    model, signal = Model(), Signal(("voxel",), (512,), ("1",))
    # Of each of the 36 layers its input: 36 times 512 numbers.
    per_trial = (_count_kept_bytes(model, signal, 5) - _count_kept_bytes(model, signal, 1)) / 4
    assert 36 * 512 * 4 <= per_trial < 40 * 512 * 4
    assert model.training
    optimiser = torch.optim.Adam(model.parameters())

    def step():
        model.network(torch.randn(2000, 512), None).square().mean().backward()
        optimiser.step()

    held = _measure_peak(step) + 4 * sum(p.numel() for p in model.parameters())
    assert 0.5 < estimate_training_bytes(model, signal, 2000) / held < 2


def test_images_take_the_room_that_was_estimated(tmp_path, command_line):
    done = command_line("reconstruct", "synthetic_digits", "--out", tmp_path / "run", *SMALL)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run/stages/reconstruct").iterdir()
    stacks = [np.load(folder / f"{name}.npy") for name in ("decoded", "oracle", "mean_embedding")]
    written = sum(stack.nbytes for stack in stacks)
    assert estimate_images_bytes(sum(map(len, stacks)), *stacks[0].shape[1:3]) == written


# --- after a failure -----------------------------------------------------------------------------------


def _fail_in_ridge(error):
    namespace = {"__name__": "braindecode_vis.encoders.ridge", "error": error}
    exec(compile("def fit(): raise error", "ridge.py", "exec"), namespace)
    try:
        namespace["fit"]()
    except type(error) as raised:
        return describe_out_of_memory(raised)


def _catch(run):
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("it fitted")


def test_numpy_and_torch_say_how_much_was_asked_for():
    said = _fail_in_ridge(_catch(lambda: np.empty((1 << 45,), np.float64)))
    assert said.startswith("memory ran out in encoders.ridge (281,475.0 GB more were asked for); ")
    assert "reduce dataset.subjects or encoder.n_features" in said
    said = _fail_in_ridge(_catch(lambda: torch.empty(1 << 50)))
    assert "ran out in encoders.ridge (4,503,599.6 GB more were asked for)" in said


def test_a_gpu_without_memory_names_settings_and_not_the_memory_of_the_machine():
    words = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
    said = _fail_in_ridge(torch.OutOfMemoryError(words))
    assert said.startswith(
        "the memory of the GPU ran out in encoders.ridge (21.5 GB more were asked for); reduce "
    )
    assert "are free" not in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "left to load a library"),
        (RuntimeError("can't start new thread"), "no thread could be started"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no thread could be started"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (MemoryError(), "memory ran out"),
    ],
    ids=["import", "thread", "again", "mapping", "plain"],
)
def test_every_way_of_running_out_is_one_sentence(error, words):
    said = describe_out_of_memory(error)
    assert words in said
    assert said.endswith(".")
    assert "\n" not in said


def test_running_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes")
    )
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert describe_out_of_memory(ImportError("No module named x")) == ""
    assert describe_out_of_memory(ValueError("shapes do not match")) == ""


def test_memory_is_no_damage_of_a_file():
    with pytest.raises(MemoryError), refuse_damage("x.nii cannot be read"):
        raise MemoryError
    with pytest.raises(DataError), refuse_damage("x.nii cannot be read"):
        raise ValueError


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are those of Linux")
@pytest.mark.parametrize(
    ("limit", "words", "code", "said"),
    [
        (200_000, ["--help"], 0, ""),
        (
            400_000,
            ["datasets"],
            2,
            "the libraries alone need about 500 MB of address space, and ulimit -v allows",
        ),
        (1_000_000, ["run", "synthetic_digits"], 2, "the libraries alone need about 1.6 GB of address space"),
        pytest.param(3_000_000, ["run", "synthetic_digits", *SMALL], 0, "", marks=pytest.mark.slow),
    ],
    ids=["help", "tables", "run", "enough"],
)
def test_limits_of_address_space(tmp_path, limit, words, code, said):
    """Below 1 GB the BLAS asked for its buffers for ever while it was loaded, and tables took 1 GiB to open."""
    command = f'ulimit -v {limit}; exec {sys.executable} -m braindecode_vis "$@"'
    words = [*words, "--out", tmp_path / "run"] if words[0] == "run" else words
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        ["bash", "-c", command, "bash", *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_step_is_profiled(tmp_path):
    """What a stage took beside its seconds was known to nobody."""
    path = tmp_path / "written"
    outer_start = time.process_time()
    with profile_step() as outer, profile_step() as taken:
        path.write_bytes(bytes(3_000_000))
        path.read_bytes()
        block = np.ones(40_000_000, np.uint8)
        while time.process_time() < outer_start + 0.2:
            block.sum()
    assert 0.1 < taken["cpu_seconds"] <= outer["cpu_seconds"]
    assert taken["seconds"] <= outer["seconds"]
    if "read_bytes" in taken:
        assert 3_000_000 <= taken["read_bytes"] < 4_000_000
        assert 3_000_000 <= taken["written_bytes"] < 4_000_000


ADVICE = [
    *_REDUCE.values(),
    *(text for part in find_parts() for text in part.reduce.values()),
    "the subjects (--subject), choose features (selection.*), or set repeats.train=averaged",
    "the number of queries or of gallery images",
]


@pytest.mark.parametrize("verb", sorted(EXAMPLES))
def test_advice_on_memory_names_options_of_the_verb_alone(verb):
    """`audit --refit` gave the advice to use --subject, which it does not have."""
    options = list_options(verb)
    assert "--help" in options or options
    for advice in ADVICE:
        said = name_options(f"it does not fit; reduce {advice}, or use a larger machine.", options)
        assert set(re.findall(r"--[a-z-]+", said)) <= options, advice
        assert not re.search(r"reduce ?,|\(\)| ,", said), said
        assert said.endswith(".")
    assert ("--subject" in name_options(f"reduce {ADVICE[-2]}.", options)) == ("--subject" in options)


def test_pages_of_a_map_are_given_back_and_their_values_stay(tmp_path):
    """A copy-on-write map would lose what was written to it, so those that may be written stay as they are."""
    path, wanted = tmp_path / "data.npy", np.arange(6000.0).reshape(60, 100)
    np.save(path, wanted)
    for mode in ("r", "c", "r+"):
        array = np.load(path, mmap_mode=mode)
        if mode != "r":
            array[0, 0] = -1
        before = array.reshape(30, -1).sum()
        view = array.reshape(30, -1)
        view.flags.writeable = False  # of a private map, too: what was written is nowhere else
        release_pages(view)
        assert array.sum() == before
    release_pages(wanted)
