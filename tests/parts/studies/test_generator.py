"""An image generator of a user's own images and embeddings, here of DINOv2, from training to reconstructions."""

import numpy as np
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.config import read_config
from braindecode_vis.generation.training_pairs import read_pairs
from braindecode_vis.parts.studies.train_generator import make_settings, train_on_run
from braindecode_vis.pipeline.runs import open_run

DINOV2 = "target={kind: timm, architecture: vit_small_patch14_reg4_dinov2.lvd142m, weights: random, image_size: 28}"
TINY = {"image_size": 16, "autoencoder_steps": 4, "denoiser_steps": 4, "denoiser_batch": 16, "device": "cpu"}
DIGITS = ["dataset.n_train=60", "dataset.n_test=12"]


@pytest.mark.further
def test_embeddings_of_dinov2_reach_images(tmp_path):
    run = open_run(
        read_config("synthetic_digits", [*DIGITS, DINOV2, "generator={kind: nearest}"]), tmp_path / "run"
    )
    weights = train_on_run(run, tmp_path / "generator", TINY, seed=0)
    prepared = pipeline.preprocess(run)
    assert len(read_pairs(tmp_path / "generator" / "pairs")) == 60  # the training images alone
    assert prepared.responses.n_trials > 60

    settings = f"generator={{kind: latent_diffusion, weights: {weights}, steps: 2, candidates: 2}}"
    made = pipeline.reconstruct(
        open_run(read_config("synthetic_digits", [*DIGITS, DINOV2, settings]), run.folder.path)
    )
    assert {"decoded", "oracle", "nearest", "mean_embedding"} <= made.images.keys()
    assert made.images["decoded"].shape == (len(made.seen), 16, 16, 3)  # the generator's own size
    assert not np.array_equal(np.asarray(made.images["decoded"]), np.asarray(made.images["oracle"]))


def test_a_target_that_takes_no_generated_image_is_refused_before_the_training(tmp_path):
    run = open_run(read_config("synthetic_digits", DIGITS), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the target pixels/8x8x1 does not take images of 16 x 16 pixels"):
        train_on_run(run, tmp_path / "generator", TINY, seed=0)
    assert not (tmp_path / "generator").exists()


def test_settings_that_are_wrong_are_named():
    with pytest.raises(ConfigError, match=r"has no setting widht; known are n_images"):
        make_settings({"widht": 8})
    with pytest.raises(ConfigError, match=r"denoiser_batch is 0"):
        make_settings({"denoiser_batch": 0})
    with pytest.raises(ConfigError, match=r"fine_width was removed: its value is always 96 now, and 8 is"):
        make_settings({"fine_width": 8})


@pytest.mark.parametrize("setting", ["n_images=[", "n_images", "=1", "n_image=1", "n_images=2000-13-45"])
def test_a_setting_that_is_no_setting_is_told_in_a_sentence(tmp_path, command_line, setting):
    """A value that is no YAML ended in a traceback."""
    done = command_line("train-generator", "--out", tmp_path / "out", "--set", setting)
    assert done.returncode == 2
    assert done.stderr.strip().rpartition("\n")[2].startswith("error: ")
