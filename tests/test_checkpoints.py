import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from braindecode_vis.base.checks import DataError
from braindecode_vis.training.optimisation import (
    list_shapes,
    load_weights,
    pack_optimiser,
    read_checkpoint,
    sum_rows,
    take,
    unpack_optimiser,
    write_checkpoint,
)

IDENTITY = {"network": {"width": 3}, "config": {"lr": 0.1}, "seed": 0}


def take_step(network, optimiser):
    network(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def test_weights_moments_and_state_come_back(tmp_path):
    network = nn.Linear(2, 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    take_step(network, optimiser)
    path = tmp_path / "new" / "checkpoint.safetensors"
    shared = network.weight.detach()
    groups = {"model": network.state_dict(), "twice": {"w": shared}, "optimiser": pack_optimiser(optimiser)}
    write_checkpoint(path, groups, {"identity": IDENTITY, "step": 1})
    (path.parent / ".tmp-1-checkpoint.safetensors").write_bytes(b"half")
    tensors, state = read_checkpoint(path, IDENTITY)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert state["step"] == 1
    other = nn.Linear(2, 1)
    moments = torch.optim.Adam(other.parameters(), lr=0.1)
    load_weights(other, take(tensors, "model"), what="the file")
    unpack_optimiser(moments, take(tensors, "optimiser"))
    torch.testing.assert_close(take(tensors, "twice")["w"], shared)
    for pair in ((network, optimiser), (other, moments)):
        take_step(*pair)
    torch.testing.assert_close(network.weight, other.weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": {"width": 4}}, r"another architecture \(width: 3, now 4\)"),
        ({"config": {"lr": 0.2}}, r"other settings \(lr: 0.1, now 0.2\)"),
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"stage": "x"}, r"another stage \(None, now x\)"),
    ],
)
def test_a_checkpoint_of_another_training_is_named(tmp_path, change, message):
    write_checkpoint(tmp_path / "c.safetensors", {}, {"identity": IDENTITY})
    with pytest.raises(DataError, match=message):
        read_checkpoint(tmp_path / "c.safetensors", {**IDENTITY, **change})


def test_foreign_and_damaged_files_are_said(tmp_path):
    path = tmp_path / "c.safetensors"
    assert read_checkpoint(path, IDENTITY) is None
    path.write_bytes(b"cut")
    with pytest.raises(DataError, match="is damaged"):
        read_checkpoint(path, IDENTITY)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(DataError, match="is not a checkpoint of a training"):
        read_checkpoint(path, IDENTITY)
    save_file({"a": torch.ones(1)}, path, metadata={"state": "{}"})
    with pytest.raises(DataError, match="belongs to another architecture"):
        read_checkpoint(path, IDENTITY)


def test_other_rows_and_shapes_are_told_apart():
    rows = np.arange(6.0).reshape(3, 2)
    assert sum_rows([rows, None]) == sum_rows([rows.copy(), None])
    assert sum_rows([rows]) != sum_rows([rows[::-1]])
    assert list_shapes(nn.Linear(2, 1)) != list_shapes(nn.Linear(3, 1))
