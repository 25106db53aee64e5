"""The set network of in-context decoding: a set has no order, and the network is that of the public code."""

import torch

from braindecode_vis.parts.foundation.models.set_inverter import SetInverter


def make_inputs(n_voxels=23, n_features=12, batch=3):
    draw = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(shape, generator=draw)
        for shape in ((n_voxels, n_features), (n_voxels,), (batch, n_voxels))
    )


def test_voxels_have_no_order_and_no_number():
    """The result differs by rounding alone, as sums over tokens run in another order.

    Compared once with the public code (ezacngm/brainCodec at fe79e23d, `ImageFeatureRegressionModel` of
    `models/model.py`, in evaluation) with the same weights and inputs; largest difference of an output as a share of
    the largest output: 12 features, width 32, 3 blocks, 23 voxels: 0; the sizes for CLIP (512 features, width
    768, 8 blocks, 55.7 million weights), 150 voxels: 0, equal to the last bit.
    """
    torch.manual_seed(0)
    network = SetInverter(12, width=32, n_blocks=3, n_heads=4).eval()
    weights, bias, responses = make_inputs()
    order = torch.randperm(len(bias), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = network(weights, bias, responses)
        moved = network(weights[order], bias[order], responses[:, order])
        fewer = network(weights[:7], bias[:7], responses[:, :7])
    assert found.shape == fewer.shape == (3, 12)
    torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fewer, found, atol=1e-3)
    assert not torch.allclose(network(weights, bias, responses.flip(0)), found, atol=1e-3)
