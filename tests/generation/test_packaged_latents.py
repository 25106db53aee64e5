"""The packaged autoencoder as a target: photographs pass it, and a low-level branch runs on it without a hub."""

import numpy as np
import pytest
from skimage import data

from braindecode_vis import pipeline
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.stimuli import crop_square, resize_image
from braindecode_vis.config import read_config
from braindecode_vis.encoders.latent_decoder_config import LatentDecoderConfig
from braindecode_vis.generation.packaged_latents import PackagedLatentsConfig
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.runs import open_run

QUICK = [
    "dataset.n_train=60", "dataset.n_test=20", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100", "encoder.alphas=[1,10,100]",
]  # fmt: skip
LOW = "reconstruction.low_level={target: {kind: packaged_latents, device: cpu}}"


def test_photographs_pass_the_autoencoder():
    encoder = PackagedLatentsConfig(device="cpu").build()
    images = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    truth = np.stack([resize_image(crop_square(image), 64, 64) for image in images]).astype(float)
    vectors = encoder.encode(images)
    assert vectors.shape == (4, 8 * 8 * 8)
    assert encoder.latent_shape == (8, 8, 8)
    assert 0.5 < vectors.std() < 2
    decoded = encoder.decode(vectors)
    assert decoded.dtype == np.uint8
    psnr = 10 * np.log10(255**2 / ((decoded - truth) ** 2).mean((1, 2, 3)))
    assert psnr.mean() > 18
    # What another image decodes to is much further away.
    assert (psnr > 10 * np.log10(255**2 / ((decoded[::-1] - truth) ** 2).mean((1, 2, 3))) + 3).all()


def test_its_latents_fit_the_published_network_when_their_maps_are_said():
    assert LatentDecoderConfig(latent_channels=8).plan(8 * 8 * 8)[0] == 1
    with pytest.raises(ConfigError, match=r"set latent_channels \(packaged_latents: 8\)"):
        LatentDecoderConfig().plan(8 * 8 * 8)


def test_a_branch_on_it_is_called_a_stand_in_wherever_it_is_read(tmp_path):
    run = open_run(read_config("synthetic_digits", [*QUICK, LOW]), tmp_path / "run")
    told = []
    object.__setattr__(run, "tell", lambda sentence, about="": told.append(sentence))
    pipeline.run_all(run)
    clause = "stand-ins: low level by packaged_latents in place of latents of a published autoencoder"
    assert any(clause in sentence for sentence in told)
    rows = pipeline.evaluate(run)
    assert all(clause in row["protocol"] for row in rows if row["method"] == "decoded")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Without weights of a hub" in page
    assert clause in page
    assert not audit_run(tmp_path / "run").leaks


def test_branches_of_published_networks_are_called_nothing():
    low = "reconstruction.low_level={target: {kind: taesd, weights: random, image_size: 32}}"
    assert read_config("synthetic_digits", [low]).reconstruction.describe_stand_ins() == ""
