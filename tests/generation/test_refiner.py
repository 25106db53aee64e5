"""The refiner undoes what a prediction lost, with nothing but training data."""

import dataclasses

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Context
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.pixels import PcaConfig, PixelsConfig
from braindecode_vis.generation import refiner
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.refiner import compute_ssim, deform_images
from braindecode_vis.generation.refiner_config import RefinerConfig
from braindecode_vis.scoring.metrics.image import compute_image_metric
from tests.constants import replace_constants
from tests.references import assert_close

SMALL = {"width": 4, "batch_size": 16, "n_networks": 1, "deformation": 0.3}
FAST = replace_constants(RefinerConfig, **SMALL)(steps=120)


def make_data(n=40, size=16, target=None):
    """Bright squares at random places, and predictions that are blurred toward the mean with noise."""

    generator = np.random.default_rng(0)
    grey = np.zeros((n, size, size), np.uint8)
    for image in grey:
        top, left = generator.integers(1, size - 8, size=2)
        image[top : top + 7, left : left + 7] = 255
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    ids = [f"image{i}" for i in range(n)]
    encoder = (target or PixelsConfig()).build().fit(pixels)
    bank = Embeddings(encoder.encode(pixels), ids, encoder.space)
    noise = generator.normal(scale=0.1, size=bank.vectors.shape)
    blurred = 0.5 * bank.vectors + 0.5 * bank.vectors.mean(axis=0) + noise
    return GeneratorData(
        encoder,
        bank,
        StimulusSet.from_pixels(pixels, ids, ["square"] * len(ids)),
        Embeddings(blurred.astype(np.float32), ids, encoder.space),
    )


def test_held_out_predictions_become_more_like_their_images():
    whole = make_data()
    ids = whole.embeddings.ids
    data = dataclasses.replace(
        whole,
        embeddings=whole.embeddings.select(ids[:30]),
        stimuli=whole.stimuli.select(ids[:30]),
        predicted=whole.predicted.select(ids[:30]),
    )
    held_out, truth = whole.predicted.select(ids[30:]), whole.read_images(range(30, len(ids)))
    generator = FAST.build(data)
    made = generator.generate(held_out, seed=0)
    plain = whole.image_encoder.decode(held_out.vectors)
    assert made.shape == truth.shape
    assert made.dtype == np.uint8
    assert (
        compute_image_metric("ssim", truth, made).mean()
        > compute_image_metric("ssim", truth, plain).mean() + 0.1
    )
    assert len(generator.describe()["losses"]) == 1
    np.testing.assert_array_equal(FAST.build(data).generate(held_out, seed=1), made)


def test_a_stopped_training_goes_on_with_the_first_network_that_is_missing(tmp_path, monkeypatch):
    config = replace_constants(RefinerConfig, **SMALL | {"n_networks": 3})(steps=20)
    data = make_data(12)
    whole = config.build(data)
    reported = []

    def stop(done, total, text):
        reported.append((done, total, text))
        if done >= 50:
            raise KeyboardInterrupt

    lent = Context(checkpoints=tmp_path, progress=stop).take_part("fold03")
    with pytest.raises(KeyboardInterrupt):
        config.build(dataclasses.replace(data, context=lent))
    assert [(done, total) for done, total, _ in reported] == [(10 * n, 60) for n in range(1, 6)]
    assert reported[-1][2].startswith("fold03, network 3 of 3, loss 0.")
    kept = sorted(path.name for path in (tmp_path / "fold03").iterdir())
    assert kept == ["network0.safetensors", "network1.safetensors"]

    trained, train = [], refiner.train_refiner
    monkeypatch.setattr(
        refiner, "train_refiner", lambda *given, **more: trained.append(given[4]) or train(*given, **more)
    )
    damaged, kept = (
        tmp_path / "fold03" / "network0.safetensors",
        dataclasses.replace(data, context=Context(checkpoints=tmp_path / "fold03")),
    )
    damaged.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"network0\.safetensors is damaged .* delete it"):
        config.build(kept)
    damaged.unlink()
    again = config.build(kept)
    assert trained == [0, 2]
    assert again.losses == whole.losses
    for one, other in zip(whole.networks, again.networks, strict=True):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, atol=0, rtol=0)


def test_networks_of_another_training_are_refused(tmp_path):
    config = FAST.model_copy(update={"steps": 5})
    data = dataclasses.replace(make_data(12), context=Context(checkpoints=tmp_path))
    config.build(data)
    longer = config.model_copy(update={"steps": 6})
    other = dataclasses.replace(data, predicted=data.predicted.select(data.embeddings.ids[:9]))
    for changed, given in ((longer, data), (config, other)):
        with pytest.raises(DataError, match=r"network0\.safetensors belongs to other .* delete it"):
            changed.build(given)


def test_the_loss_is_the_metric():
    generator = np.random.default_rng(0)
    left, right = generator.random((2, 3, 16, 20, 1))
    found = compute_ssim(*(torch.from_numpy(v.transpose(0, 3, 1, 2)) for v in (left, right)))
    assert_close(found[:, 0].numpy(), compute_image_metric("ssim", left, right))


def test_deformations_of_strength_zero_change_nothing():
    images = torch.rand(2, 1, 14, 18, generator=torch.Generator().manual_seed(0))
    kept = deform_images(images, torch.Generator().manual_seed(0), 0.0)
    torch.testing.assert_close(kept, images, atol=1e-5, rtol=0)
    moved = deform_images(images, torch.Generator().manual_seed(0), 1.0)
    assert float((moved - images).abs().mean()) > 0.01


@pytest.mark.parametrize("colour", [False, True])
def test_odd_sizes_and_colours_fit(colour):
    data = make_data(8, size=18, target=PixelsConfig(size=13, colour=colour))
    quick = FAST.model_copy(update={"steps": 2})
    assert quick.build(data).generate(data.predicted, seed=0).shape == (8, 13, 13, 3)


def test_what_it_cannot_refine_is_refused():
    assert not RefinerConfig().accepts("pca")
    with pytest.raises(ConfigError, match=r"target\.kind to pixels"):
        FAST.build(make_data(8, target=PcaConfig(n_components=3)))
    with pytest.raises(ConfigError, match="12 pixels per side"):
        FAST.build(make_data(8, target=PixelsConfig(size=8)))
    with pytest.raises(ConfigError, match="out-of-fold predictions"):
        FAST.build(dataclasses.replace(make_data(8), predicted=None))
    data = make_data(8)
    generator = FAST.model_copy(update={"steps": 2}).build(data)
    other = Embeddings(data.embeddings.vectors, data.embeddings.ids, "elsewhere")
    with pytest.raises(ConfigError, match="not 'elsewhere'"):
        generator.generate(other, seed=0)


def test_the_loss_weighs_structure_against_error():
    made, images = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    error, half, structure = (float(refiner.compute_refiner_loss(made, images, w)) for w in (0.0, 0.5, 1.0))
    assert half == pytest.approx((error + structure) / 2)
    assert structure == pytest.approx(1 - float(compute_ssim(made, images).mean()))


def test_the_weight_of_structure_is_the_one_that_is_set(monkeypatch):
    weights, compute = set(), refiner.compute_refiner_loss
    monkeypatch.setattr(
        refiner, "compute_refiner_loss", lambda made, images, w: weights.add(w) or compute(made, images, w)
    )
    replace_constants(RefinerConfig, **SMALL, structure_weight=0.25)(steps=2).build(make_data(8))
    assert weights == {0.25}
