import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.base.store import hash_file
from braindecode_vis.datasets.drawn.images import N_MAX_CONCEPTS, make_concepts, render_batch
from braindecode_vis.datasets.drawn.render import TEXTURES
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.generation import latent_diffusion
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.latent_diffusion_config import (
    PACKAGED_TARGET,
    PACKAGED_WEIGHTS,
    GeneratorTrainingConfig,
    LatentDiffusionConfig,
)
from braindecode_vis.generation.latent_diffusion_networks import (
    SCHEDULE,
    compute_autoencoder_loss,
    reconstruct_images,
    scale_images,
)
from braindecode_vis.generation.latent_diffusion_training import (
    PhantomSource,
    StimulusSource,
    train_generator,
    train_network,
)
from braindecode_vis.generation.priors.sampling import draw_samples, draw_times, guide
from braindecode_vis.generation.priors.scales import PrincipalComponents
from braindecode_vis.generation.repainting import EmbeddingReader, ImageReader, repaint
from braindecode_vis.generation.training_pairs import (
    N_RESERVED_PAIRS,
    choose_concepts,
    list_reserved_concepts,
    read_pairs,
    write_phantom_pairs,
    write_stimulus_pairs,
)
from braindecode_vis.generation.weights_file import (
    WeightsHeader,
    build_networks,
    load_model,
    read_header,
    read_known_codes,
    write_weights,
)
from braindecode_vis.scoring.metrics.identification import two_way_identification
from tests.constants import replace_constants

SPACE = "made-up/7"
SIZES = {
    "n_latent_channels": 2, "autoencoder_width": 4, "denoiser_width": 8, "condition_width": 8, "n_blocks": 1,
    "checkpoint_every": 2, "warmup": 2, "perceptual_weight": 0,
}  # fmt: skip
STEPS = {
    "image_size": 16, "autoencoder_steps": 6, "autoencoder_batch": 4, "denoiser_steps": 6, "denoiser_batch": 4,
    "device": "cpu",
}  # fmt: skip
TINY = replace_constants(GeneratorTrainingConfig, **SIZES)(**STEPS)


def make_source(n=10, n_features=7, space=SPACE):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
    ids = [f"image{i}" for i in range(n)]
    vectors = rng.normal(3.0, 2.0, (n, n_features)).astype(np.float32)
    return StimulusSource(
        StimulusSet.from_pixels(pixels, ids, ["thing"] * len(ids)), Embeddings(vectors, ids, space)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run with tiny networks."""
    out = tmp_path_factory.mktemp("tiny")
    train_generator(TINY, make_source(), out, seed=5)
    return out


@pytest.fixture
def config(trained):
    weights = trained / "latent_diffusion.safetensors"
    return LatentDiffusionConfig(weights=weights, steps=3, device="cpu", candidates=1)


@pytest.fixture
def generator(config):
    """A generator without training data, so without candidates."""
    return config.build()


# --- images that come with the weights --------------------------------------------------------------------


def test_weights_bring_some_of_the_images_that_made_them(trained, generator):
    known, made_from = generator.read_known_images(), make_source().embeddings
    assert (len(known), known.space) == (10, SPACE)
    np.testing.assert_allclose(known.vectors, made_from.vectors, atol=0.3)  # a byte per component


def test_weights_without_images_say_so(trained, tmp_path):
    source, path = trained / "latent_diffusion.safetensors", tmp_path / "old.safetensors"
    rewrite(source, path, lambda tensors: tensors.pop("images.components"))
    old = LatentDiffusionConfig(weights=path, candidates=1, device="cpu").build()
    with pytest.raises(ConfigError, match="holds none of the images that it was trained on"):
        old.read_known_images()


def test_networks_are_kept_to_a_byte_per_weight(tmp_path):
    header = WeightsHeader(
        space=SPACE,
        n_features=6,
        image_size=16,
        autoencoder={"n_latent_channels": 4, "width": 8},
        denoiser={"n_components": 5, "width": 16, "condition_width": 24, "fine_width": 8},
        training={"source": "none"},
    )
    torch.manual_seed(0)
    networks = dict(zip(("autoencoder", "denoiser"), build_networks(header), strict=True))
    for parameter in networks["denoiser"].parameters():
        parameter.data = torch.randn_like(parameter)  # no row of zeros is left
    networks["denoiser"].make_map.weight.data[3] = 0
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 5)))
    components = PrincipalComponents(
        np.zeros(6, np.float32), basis.T.astype(np.float32), np.ones(5, np.float32)
    )
    path = tmp_path / "weights.safetensors"
    write_weights(path, header, networks, components, {})
    model = load_model(path, "cpu")
    for name, network in networks.items():
        for key, wanted in network.state_dict().items():
            found = getattr(model, name).state_dict()[key]
            if wanted.dim() > 1:  # rounded to 127 parts of the largest weight of the row
                steps = wanted.flatten(1).abs().amax(dim=1) / 127
                assert ((found - wanted).flatten(1).abs().amax(dim=1) <= 0.501 * steps + 1e-7).all(), key
            else:
                torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-3, atol=1e-6)
    n_weights = sum(p.numel() for network in networks.values() for p in network.parameters())
    assert path.stat().st_size < 2 * n_weights


def rewrite(source, path, change):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(tensors)
        header = json.loads(file.metadata()["latent_diffusion"]) | {"digest": ""}
        save_file(tensors, path, metadata={"latent_diffusion": json.dumps(header)})
    return path


def test_weights_in_half_precision_are_read(trained, tmp_path):
    source = trained / "latent_diffusion.safetensors"
    model = load_model(source, "cpu")

    def widen(tensors):
        for name in [
            name for name in tensors if name.endswith(".scale") and not name.startswith("embedding")
        ]:
            del tensors[name]
        for part in ("autoencoder", "denoiser"):
            for key, tensor in getattr(model, part).state_dict().items():
                tensors[f"{part}.{key}"] = tensor.half().contiguous()

    old = load_model(rewrite(source, tmp_path / "half.safetensors", widen), "cpu")
    for key, tensor in model.denoiser.state_dict().items():
        torch.testing.assert_close(old.denoiser.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("denoiser.make_map.weight.scale", None, "one scale per row"),
        ("denoiser.make_map.weight.scale", lambda t: t[:1].clone(), "one scale per row"),
        ("denoiser.make_map.weight.scale", lambda t: t * float("nan"), "not finite"),
        ("denoiser.odd.scale", lambda t: torch.ones(3), "odd"),
        ("embedding.mean", lambda t: t[:-1].clone(), "another shape than in the header"),
        ("embedding.basis", lambda t: t[:, :-1].clone(), "another shape than in the header"),
        ("embedding.scale", lambda t: t * float("inf"), "not finite"),
    ],
)
def test_weights_that_were_tampered_with_are_refused(trained, tmp_path, name, change, words):
    def tamper(tensors):
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors.get(name))

    path = rewrite(trained / "latent_diffusion.safetensors", tmp_path / "odd.safetensors", tamper)
    with pytest.raises(DataError, match=words):
        load_model(path, "cpu")


def test_a_flipped_bit_is_noticed(trained, tmp_path):
    content = bytearray((trained / "latent_diffusion.safetensors").read_bytes())
    content[-len(content) // 3] ^= 1
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: its content has changed"):
        load_model(path, "cpu")


def test_weights_that_are_not_finite_are_not_written(trained, tmp_path):
    model = load_model(trained / "latent_diffusion.safetensors", "cpu")
    model.denoiser.make_map.bias.data[0] = 1e6
    try:
        path = tmp_path / "weights.safetensors"
        header = read_header(trained / "latent_diffusion.safetensors")
        networks = {"autoencoder": model.autoencoder, "denoiser": model.denoiser}
        with pytest.raises(DataError, match=r"make_map\.bias is not finite"):
            write_weights(path, header, networks, model.components, {})
        assert not path.exists()
    finally:
        load_model.cache_clear()


def test_times_reach_both_ends_and_lean_toward_noise():
    draw = [draw_times(20_000, torch.Generator().manual_seed(3), bias=bias) for bias in (0.5, 1.5)]
    assert draw[0].min() < 10
    assert draw[0].max() > SCHEDULE.n_timesteps - 10  # where the sampler starts
    assert SCHEDULE.n_timesteps / 2 < draw[0].double().mean() < draw[1].double().mean()
    assert (draw[0] > 900).double().mean() < 0.1  # evenly drawn alone, they would be a tenth


def test_the_packaged_weights_stay_within_eleven_megabytes_and_know_no_reserved_image():
    assert PACKAGED_WEIGHTS.stat().st_size < 11_000_000
    known = LatentDiffusionConfig(candidates=1, device="cpu").build().read_known_images()
    assert known.vectors.shape == (15_360, 1280)
    assert known.space == EfficientNetConfig().build().space


# --- training ---------------------------------------------------------------------------------------------


def test_training_that_was_killed_ends_in_the_same_weights(trained, tmp_path):
    class Killed(Exception):
        pass

    for stage in ("autoencoder", "denoiser"):

        def kill(name, done, wanted, stage=stage):
            if (name, done) == (stage, 4):
                raise Killed

        with pytest.raises(Killed):
            train_generator(TINY, make_source(), tmp_path, seed=5, progress=kill)
    path = train_generator(TINY, make_source(), tmp_path, seed=5)
    assert path.read_bytes() == (trained / path.name).read_bytes()
    steps = [
        (line["stage"], line["step"])
        for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    ]
    assert steps == [(stage, step) for stage in ("autoencoder", "denoiser") for step in (2, 4, 6)]


def test_another_seed_gives_other_weights_and_may_not_go_on_in_the_same_folder(trained, tmp_path):
    path = train_generator(TINY, make_source(), tmp_path, seed=6)
    assert path.read_bytes() != (trained / path.name).read_bytes()
    with pytest.raises(DataError, match="belongs to another seed"):
        train_generator(TINY, make_source(), tmp_path, seed=7)


def test_another_denoiser_is_trained_on_the_autoencoder_that_is_there(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    config = TINY.model_copy(update={"denoiser_precision": "bfloat16"})
    with pytest.raises(
        DataError, match=r"denoiser\.safetensors belongs to other settings \(denoiser_precision"
    ):
        train_generator(config, make_source(), tmp_path, seed=5)
    (tmp_path / "denoiser.safetensors").unlink()
    path = train_generator(config, make_source(), tmp_path, seed=5)
    assert path.read_bytes() != (trained / path.name).read_bytes()
    stages = [json.loads(line)["stage"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert stages == ["autoencoder"] * 3 + ["denoiser"] * 6


def test_other_images_may_not_go_on_in_the_same_folder(tmp_path):
    source = make_source()
    write_stimulus_pairs(tmp_path / "pairs", source.stimuli, source.embeddings, size=16)
    with pytest.raises(DataError, match=r"'made-up/7'.*'another/7'.*empty folder"):
        train_generator(TINY, make_source(space="another/7"), tmp_path, seed=5)


def test_training_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train_generator(TINY, make_source(), tmp_path, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.further
def test_more_training_lowers_the_loss(tmp_path):
    """Smooth images of two kinds, distinguished by their embedding: both networks must learn something."""
    rng = np.random.default_rng(1)
    kind = rng.integers(0, 2, 64)
    ramp = np.linspace(0, 1, 16)[:, None, None] * np.ones((16, 16, 3))
    pixels = np.stack([255 * (ramp if k else 1 - ramp) for k in kind]).astype(np.uint8)
    pixels += rng.integers(0, 2, pixels.shape, dtype=np.uint8)
    ids = [f"image{i}" for i in range(64)]
    vectors = np.eye(2, dtype=np.float32)[kind]
    source = StimulusSource(
        StimulusSet.from_pixels(pixels, ids, ["ramp"] * len(ids)), Embeddings(vectors, ids, SPACE)
    )
    wider = {"condition_width": 32, "denoiser_width": 16, "autoencoder_width": 8, "checkpoint_every": 50}
    longer = {"autoencoder_steps": 100, "denoiser_steps": 200, "denoiser_batch": 32}
    config = replace_constants(GeneratorTrainingConfig, **SIZES | wider)(**STEPS | longer)
    path = train_generator(config, source, tmp_path, seed=0)
    losses = {}
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        losses.setdefault(line["stage"], []).append(line["loss"])
    assert losses["autoencoder"][-1] < 0.6 * losses["autoencoder"][0]
    assert losses["denoiser"][-1] < 0.8 * losses["denoiser"][0]
    generator = LatentDiffusionConfig(weights=path, device="cpu", candidates=1).build()
    both = generator.generate(Embeddings(np.eye(2, dtype=np.float32), ["up", "down"], SPACE), seed=0)
    slopes = both[:, -4:].mean(axis=(1, 2, 3)) - both[:, :4].mean(axis=(1, 2, 3))
    assert slopes[0] < -50 < 50 < slopes[1]


def watch_steps(monkeypatch, out, *, n_steps=40, lr=2e-3, **constants):
    """Return what the losses of both stages see with these constants: lists of steps, and the peaks of the rate."""
    training = "braindecode_vis.generation.latent_diffusion_training."
    seen, rates = {"autoencoder": [], "denoiser": []}, {}

    def look_at_images(network, perceptual, images, noise, *, perceptual_weight, perceptual_share):
        seen["autoencoder"].append((images, noise, perceptual_share))

    def denoise(noisy, times, estimate, reliability):
        seen["denoiser"].append((times, reliability))
        return noisy

    def watch(network, compute_loss, config, *, name, lr, **how):
        rates[name] = lr
        for step in range(n_steps):
            compute_loss(network if name == "autoencoder" else denoise, step)
        return network

    monkeypatch.setattr(training + "compute_autoencoder_loss", look_at_images)
    monkeypatch.setattr(training + "train_network", watch)
    config = replace_constants(GeneratorTrainingConfig, **SIZES | constants)(**STEPS, autoencoder_lr=lr)
    train_generator(config, make_source(), out, seed=5)
    parts = {stage: list(zip(*steps, strict=True)) for stage, steps in seen.items()}
    return parts["autoencoder"], parts["denoiser"], rates


def test_the_autoencoder_learns_as_its_recipe_says(monkeypatch, tmp_path):
    given = {"latent_noise": 0.3, "perceptual_share": 0.25, "autoencoder_images": 3}
    (images, noise, share), _, rates = watch_steps(monkeypatch, tmp_path, lr=0.02, **given)
    assert torch.stack(noise).std().item() == pytest.approx(0.3, abs=0.03)
    assert set(share) == {0.25}
    assert len(torch.unique(torch.cat(images).flatten(1), dim=0)) == 3
    assert rates == {"autoencoder": 0.02, "denoiser": TINY.denoiser_lr}


def test_the_perceptual_loss_is_computed_on_its_share_of_a_batch():
    class Copy(torch.nn.Module):
        encode = decode = staticmethod(lambda images: images)

    compared = []

    def compare(made, wanted):
        compared.append(len(made))
        return torch.tensor(7.0)

    images = torch.zeros(8, 3, 16, 16)
    for share in (1.0, 0.5, 0.01):  # at least one image
        loss = compute_autoencoder_loss(
            Copy(), compare, images, torch.zeros(()), perceptual_weight=2.0, perceptual_share=share
        )
        assert loss == 14
    assert compared == [8, 4, 1]


def test_the_denoiser_learns_with_the_conditions_and_times_of_its_recipe(monkeypatch, tmp_path):
    _, (times, reliability), _ = watch_steps(
        monkeypatch, tmp_path / "sure", certain_conditions=1.0, condition_dropout=0.0, time_bias=5.0
    )
    assert (torch.cat(reliability) == 1).all()
    assert (torch.cat(times) > 900).double().mean() > 0.7  # one of five is drawn evenly
    _, (times, reliability), _ = watch_steps(
        monkeypatch, tmp_path / "unsure", certain_conditions=0.0, time_bias=-5.0
    )
    assert not (torch.cat(reliability) == 1).all(dim=1).any()
    assert (torch.cat(times) < 100).double().mean() > 0.7


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(DataError, match="at least 2"):
        train_generator(TINY, make_source(n=1), tmp_path, seed=0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = replace_constants(
        GeneratorTrainingConfig, weight_decay=0, warmup=0, ema_decay=0.9, checkpoint_every=2
    )()
    with pytest.raises(DataError, match="loss of the test is nan at step 1"):
        train_network(
            torch.nn.Linear(2, 1),
            lambda network, step: network.weight.sum() * float("nan"),
            config, name="test", n_steps=4, lr=1.0, identity={}, out=tmp_path,
        )  # fmt: skip


def test_averaged_weights_follow_the_written_rule(tmp_path):
    config = replace_constants(
        GeneratorTrainingConfig, weight_decay=0, warmup=0, ema_decay=0.5, checkpoint_every=5
    )()
    network, seen = torch.nn.Linear(1, 1, bias=False), []

    def loss(network, step):
        seen.append(network.weight.item())
        return network.weight.square().sum()

    how = {"name": "test", "n_steps": 5, "lr": 0.1, "identity": {}, "out": tmp_path}
    averaged = train_network(network, loss, config, **how).weight.item()
    expected = seen[0]
    for step, weight in enumerate([*seen[1:], network.weight.item()]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert averaged == pytest.approx(expected, rel=1e-5)


# --- pairs ------------------------------------------------------------------------------------------------


def test_no_training_image_shows_a_reserved_concept():
    seed, rows = choose_concepts(3, seed=2026)
    drawn = make_concepts(N_MAX_CONCEPTS, seed=seed).iloc[rows]
    first = make_concepts(N_RESERVED_PAIRS, seed=0)  # 40 test concepts of the demo, 40 for choices
    assert len(set(rows)) == len(rows) == 1024
    assert not set(drawn["concept"]) & list_reserved_concepts()[0]
    assert not set(drawn["shape"] + drawn["colour"]) & set(first["shape"] + first["colour"])
    assert set(drawn["shape"]) >= set(first["shape"])
    assert set(drawn["colour"]) >= set(first["colour"])


class MeanColour:
    """An image encoder of three features that counts its calls."""

    space = "mean-colour"
    calls = 0

    def encode(self, images):
        self.calls += 1
        return np.stack([image.mean(axis=(0, 1)) for image in images]).astype(np.float32)


def test_phantom_pairs_are_drawn_once_and_a_missing_shard_is_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr("braindecode_vis.generation.training_pairs.SHARD", 3)
    monkeypatch.setattr(
        "braindecode_vis.generation.training_pairs.choose_concepts",
        lambda number, **_: (number, np.arange(3)),
    )
    encoder = MeanColour()
    write_phantom_pairs(tmp_path / "one", encoder, n_images=8, seed=1, size=16)
    assert encoder.calls == 3
    write_phantom_pairs(tmp_path / "one", encoder, n_images=8, seed=1, size=16)
    assert encoder.calls == 3
    one = read_pairs(tmp_path / "one")
    sorted((tmp_path / "one").glob("*.safetensors"))[1].unlink()
    write_phantom_pairs(tmp_path / "one", encoder, n_images=8, seed=1, size=16)
    assert encoder.calls == 4
    two = read_pairs(tmp_path / "one")
    assert one.images.shape == (9, 16, 16, 3)
    assert len(np.unique(one.vectors, axis=0)) == 9
    np.testing.assert_array_equal(one.images, two.images)
    np.testing.assert_array_equal(one.vectors, two.vectors)
    with pytest.raises(DataError, match=r"seed 1.*seed 2.*empty folder"):
        write_phantom_pairs(tmp_path / "one", encoder, n_images=8, seed=2, size=16)


def test_pairs_keep_images_and_vectors_together(tmp_path, monkeypatch):
    monkeypatch.setattr("braindecode_vis.generation.training_pairs.SHARD", 4)
    source = make_source(n=10)
    write_stimulus_pairs(tmp_path, source.stimuli, source.embeddings, size=20)
    pairs = read_pairs(tmp_path)
    np.testing.assert_allclose(pairs.vectors, source.embeddings.vectors, rtol=1e-3)
    middle = np.stack([image[:, 2:22] for image in source.stimuli.iterate_images()])
    np.testing.assert_array_equal(pairs.images, middle)


def test_phantom_training_uses_the_encoder_that_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("braindecode_vis.generation.training_pairs.SHARD", 4)
    monkeypatch.setattr(
        "braindecode_vis.generation.training_pairs.choose_concepts",
        lambda number, **_: (number, np.arange(4)),
    )
    config = TINY.model_copy(update={"n_images": 8})
    header = read_header(train_generator(config, PhantomSource(MeanColour()), tmp_path, seed=0))
    assert (header.space, header.n_features, header.training["n_images"]) == ("mean-colour", 3, 8)


def test_a_folder_without_pairs_is_named(tmp_path):
    with pytest.raises(DataError, match="no training pairs"):
        read_pairs(tmp_path)


# --- sampling ---------------------------------------------------------------------------------------------


def test_guidance_formula():
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert guide(conditional, unconditional, 0).item() == 1
    assert guide(conditional, unconditional, 1).item() == 3
    assert guide(conditional, unconditional, 2.5).item() == 6


def test_velocity_and_noisy_latents_give_back_what_they_were_made_of():
    torch.manual_seed(0)
    clean, noise = torch.randn(6, 2, 4, 4), torch.randn(6, 2, 4, 4)
    times = torch.tensor([0, 1, 100, 500, 900, 999])
    noisy, velocity = SCHEDULE.add_noise(clean, noise, times)
    cosine = torch.cos((times / 1000 + 0.008) / 1.008 * torch.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    later = torch.cos(((times + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    a = later.clamp(min=0)[:, None, None, None]
    a[-1] = cosine[-1] * 0.001**0.5  # the last step keeps a thousandth of the variance
    b = (1 - a**2).sqrt()
    torch.testing.assert_close(a * noisy - b * velocity, clean, atol=2e-3, rtol=0)
    torch.testing.assert_close(b * noisy + a * velocity, noise, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_samplers_find_the_latents_of_a_perfect_denoiser(sampler):
    torch.manual_seed(0)
    wanted = torch.randn(3, 2, 4, 4)

    def predict(latents, time):
        a, b = _signal_and_noise(time)
        return (a * latents - wanted) / b

    noise = torch.randn_like(wanted)
    found = draw_samples(predict, noise, SCHEDULE, sampler=sampler, n_steps=20)
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_samplers_give_the_spread_of_a_gaussian(sampler):
    """The ideal denoiser of latents N(2, 0.5**2): samples must have that mean and deviation."""
    torch.manual_seed(0)

    def predict(latents, time):
        a, b = _signal_and_noise(time)
        gain = a * 0.25 / (a**2 * 0.25 + b**2)
        clean = 2 + gain * (latents - a * 2)
        return (a * latents - clean) / b

    samples = draw_samples(predict, torch.randn(4000, 1), SCHEDULE, sampler=sampler, n_steps=25)
    assert samples.mean().item() == pytest.approx(2, abs=0.05)  # 3 standard errors are 0.024
    assert samples.std().item() == pytest.approx(0.5, abs=0.05)


def _signal_and_noise(time):
    kept = SCHEDULE.compute_signal()[time]
    return kept.sqrt(), (1 - kept).sqrt()


def test_unknown_sampler():
    with pytest.raises(ConfigError, match="dpm-solver"):
        draw_samples(lambda x, t: x, torch.zeros(1, 1), SCHEDULE, sampler="euler", n_steps=2)


# --- networks ---------------------------------------------------------------------------------------------


def test_what_is_not_known_does_not_reach_the_output(generator):
    denoiser = load_model(generator.path, "cpu").denoiser
    latents, times = torch.randn(4, 2, 2, 2), torch.tensor([3, 3, 700, 700])
    nothing, estimate, known = torch.zeros(4, 7), torch.randn(4, 7), torch.full((4, 7), 0.5)
    bare = denoiser(latents, times, nothing, nothing)
    assert not torch.equal(denoiser(latents, times, estimate, known), bare)
    assert not torch.equal(denoiser(latents, times, nothing, known), bare)


def test_perceptual_loss_is_zero_for_equal_images_and_reaches_the_first_argument():
    from braindecode_vis.embeddings.efficientnet import find_packaged_weights, load_network
    from braindecode_vis.generation.latent_diffusion_networks import PerceptualLoss

    perceptual = PerceptualLoss(load_network(find_packaged_weights()))
    torch.manual_seed(0)
    one, two = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    assert perceptual(one, one).item() == pytest.approx(0, abs=1e-6)
    distance = perceptual(one.requires_grad_(), two)
    distance.backward()
    assert distance.item() > 0.1
    assert one.grad.abs().sum() > 0


def test_images_go_through_the_autoencoder(trained):
    autoencoder = load_model(trained / "latent_diffusion.safetensors", "cpu").autoencoder
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    again = reconstruct_images(autoencoder, images)
    assert again.shape == images.shape
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(reconstruct_images(autoencoder, images[1:]), again[1:])


def test_pixels_survive_scaling():
    from braindecode_vis.generation.latent_diffusion_networks import scale_images, unscale_images

    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert torch.equal(unscale_images(scale_images(images)), images)


# --- generator --------------------------------------------------------------------------------------------


def test_images_depend_on_seed_and_row_alone(generator, config):
    vectors = np.random.default_rng(0).normal(3, 2, (5, 7)).astype(np.float32)
    vectors[4] = vectors[0]
    embeddings = Embeddings(vectors, list("abcda"), SPACE)
    images = generator.generate(embeddings, seed=1)
    assert images.shape == (5, 16, 16, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(generator.generate(embeddings, seed=1), images)
    assert (generator.generate(embeddings, seed=2) != images).any()
    assert (images[0] != images[4]).any()  # another draw of the same embedding
    small = config.model_copy(update={"batch_size": 2}).build()
    difference = small.generate(embeddings, seed=1).astype(int) - images
    assert np.abs(difference).max() <= 1  # sums in another order


@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"guidance": 4.0}, {"sampler": "ddim"}])
def test_every_setting_changes_the_images(generator, change, config):
    vectors = np.random.default_rng(0).normal(3, 2, (3, 7)).astype(np.float32)
    embeddings = Embeddings(vectors, list("abc"), SPACE)
    other = config.model_copy(update=change).build()
    assert (other.generate(embeddings, seed=0) != generator.generate(embeddings, seed=0)).any()
    assert config.model_copy(update=change).hashed_fields() != config.hashed_fields()


def test_the_denoiser_computes_in_the_precision_that_was_asked_for(config, monkeypatch):
    """Whether the images of so small a network change by it depends on the processor."""
    asked, autocast = [], latent_diffusion.autocast
    monkeypatch.setattr(
        latent_diffusion, "autocast", lambda *given: asked.append(given[1]) or autocast(*given)
    )
    vectors = np.random.default_rng(0).normal(3, 2, (3, 7)).astype(np.float32)
    half = config.model_copy(update={"precision": "bfloat16"})
    half.build().generate(Embeddings(vectors, list("abc"), SPACE), seed=0)
    assert set(asked) == {torch.bfloat16}
    assert half.hashed_fields() != config.hashed_fields()


def test_no_guidance_equals_one_pass(generator, config):
    """Guidance of 1 skips the unconditional pass; one just beside it does not, and must agree."""
    vectors = np.random.default_rng(0).normal(3, 2, (3, 7)).astype(np.float32)
    embeddings = Embeddings(vectors, list("abc"), SPACE)
    one, beside = (
        config.model_copy(update={"guidance": g}).build().generate(embeddings, seed=0)
        for g in (1.0, 1.000001)
    )
    assert np.abs(one.astype(int) - beside).max() <= 1


def make_data(predicted=None):
    """Random images whose embedding is their mean colour, and the generator of that space."""
    source = make_source(n=12)
    encoder = MeanColour()
    ids = list(source.stimuli.ids)
    bank = Embeddings(encoder.encode(source.stimuli.iterate_images()), ids, encoder.space)
    if predicted is not None:
        predicted = Embeddings(predicted(bank.vectors), ids, encoder.space)
    return bank, GeneratorData(encoder, bank, source.stimuli, predicted)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Weights of the space of mean colours."""
    bank, data = make_data()
    config = TINY.model_copy(update={"denoiser_steps": 40, "denoiser_lr": 0.01})
    source = StimulusSource(data.stimuli, bank)
    return train_generator(config, source, tmp_path_factory.mktemp("coloured"), seed=5)


def test_the_candidate_most_like_the_embedding_is_kept(coloured):
    bank, data = make_data()
    config = LatentDiffusionConfig(weights=coloured, steps=3, device="cpu", guidance=1.0)
    components = load_model(coloured, "cpu").components
    wanted = components.apply(bank.vectors) * components.std
    similarities = {}
    for candidates in (1, 6):
        made = config.model_copy(update={"candidates": candidates}).build(data).generate(bank, seed=0)
        found = components.apply(data.image_encoder.encode(made)) * components.std
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        similarities[candidates] = (found * wanted).sum(axis=1) / lengths
    assert (similarities[6] >= similarities[1] - 1e-6).all()  # the first candidate is the only one of before
    assert similarities[6].mean() > similarities[1].mean()
    with pytest.raises(ConfigError, match="candidates above 1 needs an image encoder"):
        config.model_copy(update={"candidates": 2}).build()


def test_predictions_count_as_far_as_they_are_reliable(coloured):
    config = LatentDiffusionConfig(weights=coloured, steps=3, device="cpu", candidates=1)
    bank, data = make_data()
    bare = config.build(data)
    assert bare.for_predictions() is bare
    assert "explained_variance" not in bare.describe()

    _, good = make_data(predicted=lambda vectors: 100 + 0.01 * vectors)  # exact, but of another scale
    generator = config.build(good)
    assert generator.describe()["explained_variance"] > 0.85
    squeezed = Embeddings(100 + 0.01 * bank.vectors, bank.ids, bank.space)
    exact = bare.generate(bank, seed=0).astype(int)
    assert np.abs(generator.for_predictions().generate(squeezed, seed=0) - exact).mean() < 4

    rng = np.random.default_rng(0)
    _, useless = make_data(predicted=lambda vectors: -vectors)
    blind = config.build(useless).for_predictions()
    one, two = (
        blind.generate(
            Embeddings(rng.normal(size=(3, 3)).astype(np.float32), list("abc"), bank.space), seed=0
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


def test_no_rows_give_no_images(generator):
    empty = Embeddings(np.empty((0, 7), np.float32), [], SPACE)
    assert generator.generate(empty, seed=0).shape == (0, 16, 16, 3)


def test_embeddings_of_another_space_are_refused_with_both_names(generator, config):
    other = Embeddings(np.zeros((1, 7), np.float32), ["a"], "another/7")
    assert generator.accepts(SPACE)
    assert not generator.accepts("another/7")
    with pytest.raises(ConfigError, match=r"'made-up/7'.*'another/7'"):
        generator.generate(other, seed=0)
    source = make_source()
    encoder = MeanColour()
    with pytest.raises(ConfigError, match=r"'made-up/7'.*'mean-colour'"):
        config.build(GeneratorData(encoder, source.embeddings, source.stimuli))


def test_the_packaged_weights_are_for_one_target():
    assert LatentDiffusionConfig().accepts("efficientnet-lite0")
    assert not LatentDiffusionConfig().accepts("pixels")
    assert EfficientNetConfig().kind == PACKAGED_TARGET


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(ConfigError, match="not a file"):
        LatentDiffusionConfig(weights=tmp_path / "none.safetensors").hashed_fields()
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0" + b'{"a": 1}        ')
    with pytest.raises(DataError, match="is incomplete or is not a weights file"):
        read_header(path)


def test_weights_that_are_cut_short_are_one_sentence(trained, tmp_path):
    """The header at the start of the file was whole, and the rest failed with a traceback."""
    path = tmp_path / "short.safetensors"
    path.write_bytes((trained / "latent_diffusion.safetensors").read_bytes()[:-100])
    config = LatentDiffusionConfig(weights=path, candidates=1, device="cpu")
    with pytest.raises(DataError, match="fetch it again"):
        config.check_files()
    with pytest.raises(DataError, match="cut short or damaged"):
        config.build().read_known_images()


@pytest.fixture(scope="module")
def reading(coloured):
    """The weights of mean colours with two readers that have learnt nothing."""
    names = {"shape": 3, "texture": 4}
    model, path = load_model(coloured, "cpu"), coloured.with_name("reading.safetensors")
    torch.manual_seed(0)
    readers = {"image_reader": ImageReader(names), "embedding_reader": EmbeddingReader(3, names)}
    networks = {"autoencoder": model.autoencoder, "denoiser": model.denoiser, **readers}
    header = replace(read_header(coloured), readers=names)
    write_weights(path, header, networks, model.components, read_known_codes(coloured))
    return path


def test_images_are_repainted_row_by_row(reading):
    """Alone or in a batch alike; predictions are spared unless it is asked for."""
    bank, data = make_data()
    few = Embeddings(bank.vectors[:2], bank.ids[:2], bank.space)
    config = LatentDiffusionConfig(weights=reading, steps=3, device="cpu", candidates=1)
    plain, once, usual = (config.model_copy(update={"repaint": n}).build(data) for n in (0, 1, None))
    assert (usual.repaint, usual.for_predictions().repaint, once.for_predictions(True).repaint) == (6, 0, 1)
    before, after = (each.generate(few, seed=0) for each in (plain, once))
    assert (before != after).any()
    np.testing.assert_array_equal(usual.for_predictions().generate(few, seed=0), before)
    alone = Embeddings(few.vectors[1:], few.ids[1:], few.space)
    np.testing.assert_array_equal(once.generate(alone, seed=0, first_row=1), after[1:])


def test_repainting_goes_where_both_readers_find_the_same(coloured, monkeypatch):
    """Here the readers of images and embeddings know the three colours, and the latter shows the first of them."""
    told = torch.tensor([9.0, 0, 0])
    model = replace(
        load_model(coloured, "cpu"),
        image_reader=lambda images: {"colour": 20 * images.mean((2, 3))},
        embedding_reader=lambda components: {"colour": told.expand(len(components), -1)},
    )
    likely = []
    for length in (0.0, 0.1):
        monkeypatch.setattr("braindecode_vis.generation.repainting.LENGTH", length)
        made = repaint(
            model, torch.zeros(2, 3, 16, 16), torch.zeros(2, 3), lambda latents, time: 0 * latents,
            n_steps=2, seed=0, rows=[0, 1],
        )  # fmt: skip
        likely.append(model.image_reader(made)["colour"].log_softmax(1)[:, 0])
    assert (likely[1] > likely[0]).all()


def test_weights_that_cannot_read_are_not_asked_to_repaint(config):
    assert config.build().repaint == 0
    with pytest.raises(ConfigError, match=r"generator\.repaint is 2, but .* holds no networks that evaluate"):
        config.model_copy(update={"repaint": 2}).build()
    assert config.model_copy(update={"repaint": 0}).hashed_fields() != config.hashed_fields()


# --- the packaged weights ---------------------------------------------------------------------------------


def test_packaged_weights_are_small_and_the_ones_that_their_note_names():
    note = json.loads(PACKAGED_WEIGHTS.with_suffix(".json").read_text())
    assert sum(path.stat().st_size for path in PACKAGED_WEIGHTS.parent.glob("*.safetensors")) <= 11_000_000
    assert hash_file(PACKAGED_WEIGHTS) == note["sha256"]
    header = read_header(PACKAGED_WEIGHTS)
    assert header.space == EfficientNetConfig().build().space
    assert header.training == note["training"]


def test_packaged_weights_show_what_an_unseen_embedding_says():
    """Twelve concepts whose shape was never trained in their colour, by the embedding of a picture of each."""
    encoder = EfficientNetConfig(device="cpu").build()
    seen = render_batch(range(40, 52), [0] * 12, size=112, seed=0)
    truth = Embeddings(encoder.encode(seen), [f"unseen{i}" for i in range(12)], encoder.space)
    config = LatentDiffusionConfig(device="cpu", candidates=1)
    images = config.build().generate(truth, seed=0)
    made = encoder.encode([resize_image(image, 112, 112) for image in images])
    right = two_way_identification(truth.vectors, made).mean()
    shifted = [two_way_identification(truth.vectors, np.roll(made, k, axis=0)).mean() for k in range(1, 12)]
    assert right > 0.75
    assert np.mean(shifted) < 0.55
    # What the embedding says of the surface is painted: half of it is missing in images that were not repainted.
    textures = make_concepts(52, seed=0)["texture"].iloc[40:]
    wanted = torch.tensor([sorted(TEXTURES).index(name) for name in textures])
    with torch.no_grad():
        found = load_model(PACKAGED_WEIGHTS, "cpu").image_reader(scale_images(torch.from_numpy(images)))
    assert (found["texture"].argmax(dim=1) == wanted).double().mean() > 0.4
