import pytest
import torch

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.mindeye_config import SharedSpaceConfig
from braindecode_vis.encoders.signal import Signal

TINY = SharedSpaceConfig(shared=8, n_blocks=2)
SIGNAL = Signal(("voxel",), (30,), ("01", "02", "05"), n_voxels=(30, 21, 25))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_published_size():
    signal = Signal(("voxel",), (15724,), ("01", "02"), n_voxels=(15724, 14278))
    with torch.device("meta"):
        network = SharedSpaceConfig(n_tokens=256).build(signal, 256 * 1664)
        mixing = SharedSpaceConfig(n_tokens=256, n_blocks=4).build(signal, 256 * 1664)
    ridge = (15724 + 1) * 4096 + (14278 + 1) * 4096
    blocks = 4 * (2 * 4096 + 2 * (4096 * 4096 + 4096))
    last = 4096 * 256 * 1664 + 256 * 1664
    projector = 3 * (2 * 1664 + 1664 * 1664 + 1664)
    assert count(network) == ridge + last + projector
    assert count(mixing) == ridge + blocks + last + projector


def test_the_released_mixer_shifts_every_feature_by_the_same_number():
    """MindEye2's update rule with one vector x of a trial, f and g the halves of a block, r and s their residuals:
    x <- f(x) + r, r <- x, then x <- g(x) + s, s <- x, with r = s = x at the start.

    g normalises over the vectors of a trial, of which there is one, so g(x) does not depend on x: after any number of
    blocks x is what it was plus a constant, and the linear layer after it has a bias for that. Run beside the released
    class with weights copied (width 64, four blocks, outputs near 1): at most 2e-6 apart, the constant in our bias.
    """
    halves = SharedSpaceConfig(shared=8, n_blocks=3).build(SIGNAL, 6).eval().blocks
    norm = torch.nn.LayerNorm(1)
    torch.nn.init.normal_(norm.bias)
    g = [
        torch.nn.Sequential(norm, torch.nn.Linear(1, 1), torch.nn.GELU(), torch.nn.Linear(1, 1))
        for _ in halves
    ]
    start = torch.randn(5, 8, 1)  # trials, features, one slot
    x = r = s = start
    for half, second in zip(halves, g, strict=True):
        x = half.within(x.mT).mT + r
        r = x
        x = second(x) + s
        s = x
    shift = x - start
    torch.testing.assert_close(shift, shift[:1, :1].expand_as(shift), atol=1e-5, rtol=0)
    assert SharedSpaceConfig().n_blocks == 0


def test_only_the_first_voxels_of_a_row_and_the_subjects_own_layer_count():
    network = TINY.build(SIGNAL, 6).eval()
    data, subject = torch.randn(5, 30), torch.tensor([1, 0, 2, 1, 0])
    shared = network.share(data, subject)
    for row, index in enumerate(subject.tolist()):
        layer, n = network.subjects[index], SIGNAL.n_voxels[index]
        torch.testing.assert_close(shared[row], layer.weight @ data[row, :n] + layer.bias)
    padded = data.clone()
    padded[0, 21:] = 1e6
    assert torch.equal(network(padded, subject)[0], network(data, subject)[0])
    network(data[:1], subject[:1]).sum().backward()
    assert [layer.weight.grad is not None for layer in network.subjects] == [False, True, False]


def test_every_block_changes_the_result():
    """In the released code the blocks cancel out; here each of them must matter."""
    network = TINY.build(SIGNAL, 6).eval()
    data, subject = torch.randn(4, 30), torch.tensor([0, 1, 2, 0])
    before = network(data, subject)
    for block in network.blocks:
        with torch.no_grad():
            weight = block.within[1].weight
            kept = weight.clone()
            weight.mul_(3)
            assert not torch.allclose(network(data, subject), before, atol=1e-4)
            weight.copy_(kept)


def test_parameter_groups_hold_every_parameter_once():
    """MindEye2 means to spare norms from weight decay, by names that none of them has: only biases are spared."""
    network = TINY.build(SIGNAL, 6)
    groups = network.parameter_groups()
    assert [group["weight_decay"] for group in groups] == [0.01, 0.01, 0.0]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters())
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in network.subjects.parameters()}
    biases = {id(p) for name, p in network.named_parameters() if name.endswith("bias")}
    assert {id(p) for p in groups[2]["params"]} == biases - {id(p) for p in network.subjects.parameters()}
    torch.optim.AdamW(groups, lr=1e-3)


def test_a_subject_without_a_layer_is_refused_unless_there_is_only_one():
    data = torch.randn(2, 30)
    with pytest.raises(DataError, match=r"01, 02, 05.*adapt"):
        TINY.build(SIGNAL, 6)(data, torch.tensor([0, 3]))
    single = TINY.build(Signal(("voxel",), (30,), ("01",)), 6).eval()
    assert torch.equal(single(data, torch.tensor([1, 1])), single(data, torch.tensor([0, 0])))


def test_bad_input_says_what_to_do():
    network = TINY.build(SIGNAL, 6)
    with pytest.raises(DataError, match="only 22"):
        network(torch.randn(2, 22), torch.tensor([1, 2]))
    with pytest.raises(DataError, match="voxels or parcels"):
        TINY.build(Signal(("channel", "time"), (3, 4), ("01",)), 6)
    two = TINY.model_copy(update={"heads": "two"}).build(SIGNAL, 6, 10)
    contrast, regression = two.forward_heads(torch.randn(3, 30), torch.tensor([0, 1, 2]))
    assert (contrast.shape, regression.shape) == ((3, 6), (3, 10))
