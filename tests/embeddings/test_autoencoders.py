import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import crop_square, resize_image
from braindecode_vis.embeddings.autoencoders import AutoencoderKLConfig, TinyAutoencoderConfig

TINY_KL = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
#: PSNR in dB at 256 pixels as stated beside the weights.
STATED = {"sd": (21.9, 25.5, 25.8, 27.1), "sdxl": (22.3, 26.5)}


@pytest.mark.shared
@pytest.mark.parametrize("latents", [pytest.param("sd", marks=pytest.mark.further), "sdxl"])
def test_real_weights_reconstruct_photographs(latents, shared):
    from skimage import data

    encoder = TinyAutoencoderConfig(latents=latents, weights=shared / "weights").build()
    images = [getattr(data, name)() for name in PHOTOS[: len(STATED[latents])]]
    truth = np.stack([resize_image(crop_square(image), 256, 256) for image in images])
    vectors = encoder.encode(images)
    assert vectors.shape == (len(images), 4 * 32 * 32)
    decoded = encoder.decode(vectors)
    assert decoded.dtype == np.uint8
    assert decoded.shape == truth.shape
    psnr = 10 * np.log10(255**2 / ((decoded.astype(float) - truth) ** 2).mean((1, 2, 3)))
    assert psnr.mean() >= 22
    np.testing.assert_allclose(psnr, STATED[latents], atol=0.1)  # stated to one digit
    assert 0.5 < vectors.std() < 1.1  # scaled as the diffusion model sees them


@pytest.mark.shared
def test_the_two_kinds_of_latents_are_two_spaces(shared):
    spaces = {
        TinyAutoencoderConfig(latents=k, weights=shared / "weights").build().space for k in ("sd", "sdxl")
    }
    assert len(spaces) == 2


@pytest.mark.shared
def test_one_half_is_not_enough(shared, tmp_path):
    (tmp_path / "taesd_encoder.safetensors").write_bytes(
        (shared / "weights/taesd_encoder.safetensors").read_bytes()
    )
    with pytest.raises(
        DataError, match="is missing a half of the tiny autoencoder; use a folder with taesd_encoder"
    ):
        _ = TinyAutoencoderConfig(weights=tmp_path).build().space


@pytest.mark.shared
def test_the_original_names_are_those_of_diffusers(shared, tmp_path):
    encoder = TinyAutoencoderConfig(weights=shared / "weights").build()
    encoder.load().save_pretrained(tmp_path)
    again = TinyAutoencoderConfig(weights=tmp_path).build()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(again.encode([image]), encoder.encode([image]))


def make_kl(folder, **changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **TINY_KL,
        **changes,
    )
    network.save_pretrained(folder)
    return network.eval()


def test_a_folder_of_diffusers_gives_its_scaled_mode(tmp_path):
    network = make_kl(tmp_path)
    encoder = AutoencoderKLConfig(weights=tmp_path, image_size=32).build()
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    inputs = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        expected = network.encode(inputs).latent_dist.mode() * 0.18215
        decoded = network.decode(expected / 0.18215).sample.clamp(-1, 1)
    vectors = encoder.encode([image])
    np.testing.assert_allclose(vectors, expected.flatten(1), rtol=1e-4, atol=1e-6)
    target = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round()
    assert np.abs(encoder.decode(vectors)[0].astype(float) - target.numpy()).max() <= 1  # rounding


def test_names_of_older_releases_are_read(tmp_path):
    """Attention layers were called query, key, value and proj_attn until 2023."""
    make_kl(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    expected = AutoencoderKLConfig(weights=tmp_path, image_size=32).build()
    image = np.full((32, 32, 3), 90, np.uint8)
    vectors = expected.encode([image])
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in load_file(path).items():
        for new, before in old.items():
            name = name.replace(new, before)
        state[name] = value
    save_file(state, path)
    again = AutoencoderKLConfig(weights=tmp_path, image_size=32).build()
    np.testing.assert_array_equal(again.encode([image]), vectors)


def test_latents_of_another_model_are_refused(tmp_path):
    make_kl(tmp_path, scaling_factor=0.13025)
    with pytest.raises(DataError, match=r"scales its latents by 0\.13025, those of sd by 0\.18215"):
        AutoencoderKLConfig(weights=tmp_path).build().load()
    AutoencoderKLConfig(weights=tmp_path, latents="sdxl").build().load()


def test_the_description_of_the_network_is_a_part_of_its_name(tmp_path):
    """Other groups or another shift give other latents from the same weights, which the bank took for the same."""
    make_kl(tmp_path)
    before = AutoencoderKLConfig(weights=tmp_path, image_size=32)
    space, digest = before.build().space, before.digest
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"norm_num_groups": 4', '"norm_num_groups": 2'))
    after = AutoencoderKLConfig(weights=tmp_path, image_size=32)
    assert digest != after.digest
    assert space != after.build().space


def test_latents_of_another_number_of_channels_are_refused(tmp_path):
    make_kl(tmp_path, latent_channels=8)
    with pytest.raises(DataError, match="has 8 latent channels, but sd has 4"):
        AutoencoderKLConfig(weights=tmp_path).build().load()


def test_decoding_nothing_gives_nothing():
    encoder = AutoencoderKLConfig(weights="random", image_size=32, model_args=TINY_KL).build()
    assert encoder.decode(np.empty((0, 64))).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ('{"down_block', r"config\.json is damaged"),
        ("[1]", r"config\.json is damaged"),
        ('{"scaling_factor": "much"}', r"config\.json is damaged"),
        ('{"nonsense": 3}', "does not describe an AutoencoderKL"),
    ],
)
def test_a_damaged_description_of_an_autoencoder_is_named(tmp_path, config, match):
    make_kl(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises((ConfigError, DataError), match=match):
        AutoencoderKLConfig(weights=tmp_path, image_size=32).build().load()


def make_tiny(folder, change):
    """Write the halves of a TAESD under the names of the original release, changed by `change`."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    state = AutoencoderTiny().state_dict()
    for half, shift in (("encoder", 0), ("decoder", 1)):
        prefix = f"{half}.layers."
        parts = [(n.removeprefix(prefix).partition("."), v) for n, v in state.items() if n.startswith(prefix)]
        torch.save(
            change({f"{int(i) + shift}.{rest}": v for (i, _, rest), v in parts}), folder / f"taesd_{half}.pth"
        )
    return TinyAutoencoderConfig(weights=folder, image_size=32, device="cpu").build()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: {**state, "epoch": 3}, "it has epoch"),
        (lambda state: dict(enumerate(state.values())), "tensors without names"),
        (lambda state: {**state, next(iter(state)): 3}, "has the shape"),
        (lambda state: {k: v * float("nan") for k, v in state.items()}, "no finite numbers"),
        (
            lambda state: {f"x{k}": v for k, v in state.items()},
            "does not hold the weights of an AutoencoderTiny",
        ),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence(tmp_path, change, match):
    make_tiny(tmp_path, lambda state: state).load()
    with pytest.raises(DataError, match=match):
        make_tiny(tmp_path, change).load()


def test_latents_read_from_disk_are_decoded():
    """A memory map is read-only, which torch warns of."""
    encoder = AutoencoderKLConfig(weights="random", image_size=32, model_args=TINY_KL, device="cpu").build()
    vectors = np.zeros((1, 64), np.float32)
    vectors.setflags(write=False)
    assert encoder.decode(vectors).shape == (1, 32, 32, 3)


def test_a_wrong_architecture_is_refused():
    with pytest.raises(ValueError, match="should be a whole number"):
        TinyAutoencoderConfig(weights="random", model_args={"latent_channels": "many"})
    with pytest.raises(ConfigError, match=r"target\.model_args does not describe an AutoencoderTiny"):
        TinyAutoencoderConfig(weights="random", model_args={"foo": 1}).build().load()
