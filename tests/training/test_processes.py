"""Two processes that share a batch do what one process does with all of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.training.toy_task import get_weights, make_config, make_task

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "objectives": [
        {"kind": "clip"}, {"kind": "mse"}, {"kind": "soft_clip"}, {"kind": "distillation"},
        {"kind": "multiview", "views": ["brain_views", "image"]},
    ],
    "projector": {"size": 5}, "network": {"kind": "eegproject", "dropout": 0}, "batch_size": 8, "epochs": 2,
    "teacher": {"queue": 10}, "ema": 0.9, "hide_subject": 0,
    "optimiser": {"kind": "adam", "lr": 1e-3, "weight_decay": 0}, "selection": {"kind": "last", "hold_out": 0.2},
}  # fmt: skip
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
from braindecode_vis.devices import gather_rows, get_rank
from tests.training.toy_task import make_config, make_task

# Loss and gradient of one contrast: rows of this process, candidates of both.
torch.manual_seed(0)
brain, image, weight = torch.randn(6, 3), torch.randn(6, 3), torch.randn(3, 3, requires_grad=True)
mine = slice(3 * get_rank(), 3 * get_rank() + 3)
logits = gather_rows(brain[mine] @ weight) @ gather_rows(image[mine]).T
loss = torch.nn.functional.cross_entropy(logits, torch.arange(6))
loss.backward()
dist.all_reduce(weight.grad)
weight.grad /= 2  # what DistributedDataParallel does

responses, targets = make_task(n_images=20, n_repetitions=3)
encoder = make_config(**json.loads(sys.argv[2])).build(seed=0).fit(responses, targets)
if get_rank() == 0:
    from pathlib import Path
    folder = Path(sys.argv[1])
    torch.save({"loss": loss.detach(), "gradient": weight.grad}, folder / "one.pt")
    (folder / "history.json").write_text(json.dumps(encoder.fitted.history))
    from safetensors.torch import save_file
    save_file({k: v.clone() for k, v in encoder.fitted.model.state_dict().items()}, folder / "w.safetensors")
dist.destroy_process_group()
from braindecode_vis.devices import leave
leave()
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Run two gloo processes and return the folder of what the first one found."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(folder), json.dumps(SETTINGS)]
    running = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)
    return folder


def test_loss_and_gradient_are_those_of_the_whole_batch(together):
    import torch

    found = torch.load(together / "one.pt", weights_only=True)
    torch.manual_seed(0)
    brain, image, weight = torch.randn(6, 3), torch.randn(6, 3), torch.randn(3, 3, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(brain @ weight @ image.T, torch.arange(6))
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach())
    torch.testing.assert_close(found["gradient"], weight.grad)


def test_processes_that_read_different_checkpoints_stop(monkeypatch):
    """A folder of its own on each machine: one would train on from where the other begins."""
    import torch

    from braindecode_vis.checks import DataError
    from braindecode_vis.training import loop

    trainer = loop.Trainer.__new__(loop.Trainer)
    trainer.n_ranks, trainer.counters, trainer.workspace = 2, loop.Counters(update=3), "runs/work"
    trainer.feed = SimpleNamespace(device="cpu")
    monkeypatch.setattr(loop, "gather_rows", lambda mine: torch.cat([mine, mine]))
    trainer._check_same_start()
    monkeypatch.setattr(loop, "gather_rows", lambda mine: torch.cat([mine, mine + 2]))
    with pytest.raises(DataError, match="different checkpoints in runs/work"):
        trainer._check_same_start()


def test_training_together_is_training_alone(together):
    """Every part of an update: views, teacher, queue, averages, projectors, and the scores of held-out images."""
    from safetensors.numpy import load_file

    responses, targets = make_task(n_images=20, n_repetitions=3)
    alone = make_config(**SETTINGS).build(seed=0).fit(responses, targets)
    history = json.loads((together / "history.json").read_text())
    for one, two in zip(alone.fitted.history, history, strict=True):
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
        np.testing.assert_allclose(one["validation_loss"], two["validation_loss"], rtol=1e-4)
        for name, value in one["objectives"].items():
            np.testing.assert_allclose(value, two["objectives"][name], rtol=1e-4, err_msg=name)
    weights = load_file(together / "w.safetensors")
    for name, value in get_weights(alone).items():
        # Sums in another order, and Adam divides by the size of the gradient, however small.
        np.testing.assert_allclose(weights[name], value, atol=2e-4, err_msg=name)
