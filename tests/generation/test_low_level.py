from itertools import pairwise

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.autoencoders import TinyAutoencoderConfig
from braindecode_vis.encoders.latent_decoder_config import LatentDecoderConfig
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.image_fusion import ImageFusionConfig, fuse_branches, mix_images
from braindecode_vis.generation.inversion import LatentsConfig, NearestConfig
from braindecode_vis.scoring.metrics.image import compute_image_metric


class Recorder:
    """A generator that shows what it was asked for."""

    supports_initial = True

    def __init__(self):
        self.calls = []

    def accepts(self, space):
        return True

    def generate(self, embeddings, *, seed, initial=None, strength=0.5):
        self.calls.append((seed, initial is not None, strength))
        value = 100 if initial is None else 40
        return np.full((len(embeddings), 8, 8, 3), value, np.uint8)


class Plain:
    def accepts(self, space):
        return True

    def generate(self, embeddings, *, seed):
        return np.full((len(embeddings), 8, 8, 3), 100, np.uint8)


ROWS = Embeddings(np.zeros((2, 3)), ["a", "b"], "toy")
LOW = np.full((2, 4, 4, 3), 20, np.uint8)


def test_pixels_are_mixed_by_the_stated_weight():
    out = fuse_branches(Plain(), ROWS, LOW, ImageFusionConfig(), seed=0)
    assert (out["decoded"] == 80).all()  # 0.75 * 100 + 0.25 * 20
    assert out["decoded"].shape == (2, 8, 8, 3)
    assert (out["high_level"] == 100).all()
    assert (out["low_level"] == LOW).all()
    assert (mix_images(LOW, LOW + 9, 1.0) == LOW).all()
    assert (mix_images(LOW, LOW + 9, 0.0) == LOW + 9).all()


def test_the_generator_may_start_from_the_low_level_image():
    generator = Recorder()
    out = fuse_branches(generator, ROWS, LOW, ImageFusionConfig(mode="initial", strength=0.6), seed=3)
    assert generator.calls == [(3, False, 0.5), (3, True, 0.6)]
    assert (out["decoded"] == 40).all()
    assert (out["high_level"] == 100).all()
    both = fuse_branches(Recorder(), ROWS, LOW, ImageFusionConfig(mode="both", weight=0.5), seed=3)
    assert (both["decoded"] == 30).all()


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(ConfigError, match="takes no initial image; use pixels"):
        ImageFusionConfig(mode="initial").check_generator(NearestConfig())
    with pytest.raises(DataError, match="2 embeddings came with 1 low-level"):
        fuse_branches(Plain(), ROWS, LOW[:1], ImageFusionConfig(), seed=0)


def test_the_published_sizes():
    """63 channels of 250 samples onto 4 x 64 x 64: 8064 values, dropout 0.5, then 1024-512-256-128-64-32."""
    signal = Signal(("channel", "time"), (63, 250), ("1",))
    with torch.random.fork_rng():
        network = LatentDecoderConfig().build(signal, 4 * 64 * 64)
    convolutions = [m for m in network.grow if isinstance(m, torch.nn.ConvTranspose2d)]
    assert convolutions[0].in_channels == 8064
    assert [c.out_channels for c in convolutions] == [1024, 512, 256, 128, 64, 32]
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {((4, 4), (2, 2), (1, 1))}
    assert network.project.in_features == 250
    assert network.dropout.p == 0.5
    widths = [8064, 1024, 512, 256, 128, 64, 32]
    grown = sum(16 * a * b + b + 2 * b for a, b in pairwise(widths))
    assert sum(p.numel() for p in network.parameters()) == 250 * 128 + 128 + grown + 32 * 4 + 4


@pytest.mark.parametrize("side", [4, 6, 32, 3])
@pytest.mark.parametrize("dims", [("channel", "time"), ("voxel",), ("parcel", "time")])
def test_any_size_of_latents_and_trials(side, dims):
    shape = (40,) if len(dims) == 1 else (5, 30)
    config = LatentDecoderConfig()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = config.build(Signal(dims, shape, ("1", "2")), 4 * side * side)
        out = network(torch.randn(3, *shape), torch.zeros(3, dtype=torch.long))
    assert out.shape == (3, 4 * side * side)
    assert torch.isfinite(out).all()


def test_a_target_that_is_no_map_is_refused():
    with pytest.raises(ConfigError, match="4 square maps, but this one has 1020 values"):
        LatentDecoderConfig(latent_channels=4).plan(1020)


def test_the_network_learns_a_map_by_the_mean_absolute_error():
    """A smooth map that follows one number of the trial is found, beyond its mean."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=128).astype(np.float32)
    ramp = np.linspace(-1, 1, 8, dtype=np.float32)
    target = torch.from_numpy(value[:, None, None, None] * np.tile(ramp, (4, 8, 1))[None]).flatten(1)
    data = torch.from_numpy((value[:, None, None] * rng.normal(size=(1, 4, 20))).astype(np.float32))
    subject = torch.zeros(128, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LatentDecoderConfig()
        network = config.build(Signal(("channel", "time"), (4, 20), ("1",)), 4 * 64)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-4)
        for _ in range(50):
            loss = torch.nn.functional.l1_loss(network(data[:96], subject[:96]), target[:96])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.eval()
    with torch.no_grad():
        error = torch.nn.functional.l1_loss(network(data[96:], subject[96:]), target[96:])
    assert float(error) < 0.5 * float(target[96:].abs().mean())


@pytest.mark.shared
def test_taesd_decodes_noisy_latents_and_fusion_adds_layout(shared):
    """Real weights: latents as noisy as predictions still give colours in place, which the mixture inherits."""

    rng = np.random.default_rng(0)
    pixels = np.zeros((4, 64, 64, 3), np.uint8)
    for image in pixels:
        image[:] = rng.integers(0, 100, size=3)
        top, left = rng.integers(0, 32, size=2)
        image[top : top + 32, left : left + 32] = rng.integers(120, 256, size=3)
    target = TinyAutoencoderConfig(weights=shared / "weights", image_size=64, device="cpu").build()
    ids = list("abcd")
    latents = target.encode(pixels)
    data = GeneratorData(
        target, Embeddings(latents, ids, target.space), StimulusSet.from_pixels(pixels, ids, ["c"] * len(ids))
    )
    noisy = latents + 0.4 * latents.std() * rng.normal(size=latents.shape).astype(np.float32)
    low = LatentsConfig().build(data).generate(Embeddings(noisy, ids, target.space), seed=0)
    assert low.shape == (4, 64, 64, 3)
    assert compute_image_metric("pixcorr", low, pixels).mean() > 0.8
    random = rng.integers(0, 256, size=pixels.shape).astype(np.uint8)
    fused = mix_images(random, low, 0.75)
    assert (
        compute_image_metric("pixcorr", fused, pixels).mean()
        > compute_image_metric("pixcorr", random, pixels).mean() + 0.1
    )
