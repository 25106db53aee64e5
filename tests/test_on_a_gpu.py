"""What is heavy computes on a GPU what it computes on the CPU: ranks, ridge, networks, priors, features of images.

Where there is no GPU, a device that computes as the CPU does and mixes with it as little stands for one (`elsewhere`):
the numbers are then the same to the bit, and a tensor that was left on the CPU is an error. Permutations, resamples,
PixCorr and SSIM are computed by numpy everywhere.
"""

import numpy as np
import pytest
import torch
import torchvision

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.encoders import ridge
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.generation.priors import diffusion
from braindecode_vis.generation.priors.diffusion_config import DiffusionPriorConfig
from braindecode_vis.scoring import retrieval
from braindecode_vis.scoring.metrics import feature_networks
from braindecode_vis.training import fitted
from tests.elsewhere import NAME, Elsewhere
from tests.training.toy_task import make_config, make_task

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(params=["elsewhere", pytest.param("cuda", marks=NO_GPU)])
def gpu(request, monkeypatch):
    """Yield the name of the device that ``auto`` chooses, and how far its numbers may be from those of the CPU."""
    if request.param == "cuda":
        yield "cuda", 1.0
        return
    for module in (retrieval, ridge, diffusion, fitted, feature_networks):
        monkeypatch.setattr(module, "choose_device", lambda wanted, **_: "cpu" if wanted == "cpu" else NAME)
    with Elsewhere() as device:
        yield NAME, 0.0
    assert device.n_made > 0


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with Elsewhere():
        there = torch.ones(3).to(NAME)
        assert (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(AssertionError, match="two devices"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()


def embed(rows, space="space"):
    return Embeddings(
        rows.astype(np.float32), np.array([f"{i:03d}" for i in range(len(rows))], object), space
    )


@pytest.mark.parametrize("kind", ["spread", "tied", "collapsed"])
@pytest.mark.parametrize("blocks", [{}, {"block_queries": 7, "block_gallery": 11}])
def test_ranks(gpu, kind, blocks):
    """Ranks are decided in double precision where single precision cannot, so that they are equal on every device."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((40, 6))
    if kind == "tied":
        gallery[1::2] = gallery[::2]
    if kind == "collapsed":
        gallery = 1 + 1e-6 * gallery
    queries = embed(gallery + 0.5 * rng.standard_normal(gallery.shape))
    gallery = embed(gallery)
    here, there = (
        retrieval.compute_ranks(queries, gallery, n_top=5, device=device, **blocks)
        for device in ("cpu", "auto")
    )
    for field in ("n_above", "n_tied", "top_indices"):
        np.testing.assert_array_equal(getattr(here, field), getattr(there, field))
    np.testing.assert_allclose(here.top_similarities, there.top_similarities, rtol=0, atol=1e-12 * gpu[1])
    here, there = (retrieval.compute_similarity(queries, gallery, device=d) for d in ("cpu", "auto"))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-6 * gpu[1])


@pytest.mark.parametrize("alphas", [(1.0, 100.0), (1000.0,)], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(24, 2), (60, 4)])
def test_ridge(gpu, shape, alphas, monkeypatch):
    """A choice in double precision, kept in single, and one penalty in single; more features than trials, and fewer."""
    monkeypatch.setattr(ridge, "SMALL_PROBLEM", 0)
    responses, targets = make_task(*shape)
    here, there = (
        RidgeConfig(alphas=alphas, device=device).build(seed=0).fit(responses, targets)
        for device in ("cpu", "auto")
    )
    np.testing.assert_allclose(
        here.predict(responses).vectors, there.predict(responses).vectors, rtol=1e-5, atol=1e-6
    )


def test_predictions_of_a_network(gpu):
    responses, targets = make_task()
    encoder = make_config().build(seed=0).fit(responses, targets)
    here = encoder.predict(responses).vectors
    encoder.config = encoder.config.model_copy(update={"device": "auto"})
    np.testing.assert_allclose(here, encoder.predict(responses).vectors, rtol=0, atol=1e-5 * gpu[1])


def test_a_prior(gpu):
    """Noise is drawn on the CPU, so that a prior learns and draws the same everywhere, but for rounding."""
    small = {"widths": (16, 8), "time_features": 8, "batch_size": 32, "epochs": 1, "min_steps": 5, "steps": 4}
    rng = np.random.default_rng(0)
    target = embed(rng.standard_normal((40, 6)), "toy")
    predicted = embed(target.vectors + rng.standard_normal((40, 6)), "toy")
    here, there = (
        DiffusionPriorConfig(**small, device=device, precision="float32")
        .build(seed=1)
        .fit(predicted, target)
        .sample(predicted, n_draws=2, seed=0)
        .vectors
        for device in ("cpu", "auto")
    )
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-3 * gpu[1])


def test_features_of_images(gpu, tmp_path):
    """Features and perceptual distances of the suite, by AlexNet with drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.alexnet()
        linear = {
            f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, n in enumerate((64, 192, 384, 256, 256))
        }
    network.classifier = torch.nn.Sequential()
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    torch.save(linear, tmp_path / "linear.pth")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    shown, pairs = np.array([0, 1]), np.array([[0, 2], [1, 3]])

    def compute(device):
        extract = feature_networks.load_network("alexnet", tmp_path / "alexnet.pth", device)
        found = feature_networks.correlate_with_seen(
            images, shown, feature_networks.NETWORKS["alexnet"], extract, device=device, batch_size=3
        )
        distance = feature_networks.Lpips(
            "alexnet", tmp_path / "alexnet.pth", tmp_path / "linear.pth", device=device
        )
        return {**found, "lpips": distance.compute_pairs(images, pairs, batch_size=2)}

    here, there = compute("cpu"), compute(gpu[0])
    assert here.keys() == there.keys()
    for name, values in here.items():
        np.testing.assert_allclose(values, there[name], rtol=0, atol=1e-4 * gpu[1])
