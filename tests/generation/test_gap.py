"""The gap between what a decoder learns from and what it is given: against plain sums, and a decoder of texts alone."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import Context
from braindecode_vis.generation.captions import fit_decoder, read_decoder
from braindecode_vis.generation.captions_config import CocaCaptionsConfig
from braindecode_vis.generation.gap import GapConfig, fit_gap
from braindecode_vis.generation.generator_data import GeneratorData
from tests.generation.test_captions import COLOURS, PLACES, THINGS, configure, embed, make_data, measure_named


def make_pairs(n=400, d=6, seed=0):
    """Truths off the origin, and predictions off another point with noise of its own for each feature."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(n, 1, d)) + 3
    return 0.5 * true + 5 + rng.normal(size=(n, 1, d)) * np.linspace(0.1, 0.5, d), true


def scale_by_loops(rows, mean):
    return np.stack([(row - mean) / np.sqrt(((row - mean) ** 2).sum()) for row in rows[:, 0]])


@pytest.mark.parametrize("noise", ["isotropic", "covariance"])
def test_the_correction_is_that_of_loops(noise):
    """Unit vectors around the own mean of each side; noise with the second moments of the differences.

    CLOSE's ``AddGuassianNoise`` (allenai/close, close/model/language_adapters.py at 80f8db0) of the same vectors, with
    the same draws and its scale for sigma, gives these to 3.0e-8 in single precision; its ``CovNoise`` multiplies a
    draw of the covariance by 3 (`scale`) and adds isotropic noise, which is left out here.
    """
    predicted, true = make_pairs()
    gap = fit_gap(GapConfig(noise=noise, scale=2.0), true, (predicted, true))
    learnt = scale_by_loops(true, true.mean(axis=(0, 1)))
    served = scale_by_loops(predicted, predicted.mean(axis=(0, 1)))
    np.testing.assert_allclose(gap.prepare(true)[:, 0], learnt, atol=1e-6)
    np.testing.assert_allclose(gap.serve(predicted)[:, 0], served, atol=1e-6)
    difference = served - learnt
    drawn = np.concatenate(
        [gap.disturb(np.zeros((1000, 1, 6), np.float32), np.random.default_rng(k)) for k in range(2)]
    )
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 1, atol=1e-5)  # of length one again
    if noise == "isotropic":
        sigma = 2 * np.sqrt(np.mean([value**2 for row in difference for value in row]))
        assert float(gap.noise.item()) == pytest.approx(sigma, rel=1e-5)
    else:
        found = np.tensordot(gap.noise[:, 0], gap.noise[:, 0], axes=(0, 0))
        np.testing.assert_allclose(found, 4 * np.cov(difference.T), atol=1e-6)


def test_without_shift_and_with_a_number_nothing_is_measured():
    _, true = make_pairs()
    config = GapConfig(shift=False, sigma=0.1)
    assert not config.needs_predictions
    gap = fit_gap(config, true, None)
    np.testing.assert_allclose(gap.prepare(true)[:, 0], scale_by_loops(true, 0), atol=1e-6)
    unit = np.zeros((20000, 1, 6), np.float32)
    unit[:, 0, 0] = 1
    draws = np.random.default_rng(5).standard_normal(unit.shape, dtype=np.float32)
    expected = unit + np.float32(0.1) * draws
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(gap.disturb(unit, np.random.default_rng(5)), expected, atol=1e-6)
    assert not fit_gap(GapConfig(shift=False, noise="none"), true, None).noise.any()
    with pytest.raises(ValueError, match=r"sigma is 0\.1, but it has no effect: noise is covariance"):
        GapConfig(noise="covariance", sigma=0.1)
    with pytest.raises(ValueError, match=r"scale is 2\.0, but it has no effect"):
        GapConfig(scale=2.0, sigma=0.1)


class TextSide:
    """A target whose texts lie off its images: the places of the words a text names, and a common offset."""

    space = "toy"
    OFFSET = np.random.default_rng(9).normal(size=32).astype(np.float32)

    def embed_texts(self, texts, fill):
        rows = []
        for (text,) in texts:
            colour = next((k for k, word in enumerate(COLOURS) if word in text), 0)
            thing = next((k for k, word in enumerate(THINGS) if word in text), 0)
            rows.append(np.concatenate([PLACES[colour], PLACES[3 + thing]]))
        return np.stack(rows) + 2 * self.OFFSET


def make_text_data(folder, *, side=TextSide(), predicted=True, space="toy"):  # noqa: B008
    made = make_data(folder)
    codes = np.random.default_rng(1).integers(0, 3, (60, 2))
    shrunk = 0.3 * embed(codes, noise=0.4) + 1  # of less length and another mean, as predictions are
    known = Embeddings(shrunk, made.embeddings.ids, "toy") if predicted else None
    truth = Embeddings(made.embeddings.vectors, made.embeddings.ids, space)
    return GeneratorData(side, truth, made.stimuli, known, Context(images=made.stimuli))


def predict(n=40):
    codes = np.random.default_rng(3).integers(0, 3, (n, 2))
    return codes, Embeddings(0.3 * embed(codes, noise=0.2) + 1, [f"t{k}" for k in range(n)], "toy")


@pytest.mark.parametrize(
    ("gap", "bridged"),
    [(None, True), pytest.param({"shift": False, "noise": "none"}, False, marks=pytest.mark.slow)],
)
def test_a_decoder_of_texts_alone_describes_predictions(tmp_path, gap, bridged):
    """With the gap bridged it names what was seen; without, it is given vectors like none that it has learnt from."""
    data, (codes, test) = make_text_data(tmp_path), predict()
    config = configure(tmp_path, learns_from="texts", gap=gap, epochs=60)
    assert (config.needs_predictions, config.reads_draws) == (bridged, False)
    decoder = fit_decoder(config, data, seed=0)
    captions = decoder.decode(test)
    assert (measure_named(captions, codes) > 0.7) == bridged  # a ninth by chance
    decoder.write(tmp_path)
    assert read_decoder(config, tmp_path, data).decode(test) == captions


def test_further_texts_are_of_no_image_of_the_run(tmp_path):
    data = make_text_data(tmp_path)
    (tmp_path / "more.csv").write_text("id,caption\nx1,a green cat indeed\n")
    config = configure(tmp_path, learns_from="texts", epochs=1, texts=tmp_path / "more.csv")
    assert "indeed" in fit_decoder(config, data, seed=0).vocabulary
    plain = configure(tmp_path, learns_from="texts", epochs=1)
    assert config.hashed_fields() != plain.hashed_fields()
    (tmp_path / "more.csv").write_text("id,caption\ni3,a green cat indeed\n")
    with pytest.raises(DataError, match=r"describes 1 image\(s\) of the run, first i3"):
        fit_decoder(config, data, seed=0)


def test_what_stops_it_is_one_sentence(tmp_path):
    texts = {"learns_from": "texts"}
    side = type("Side", (TextSide,), {"embed_texts": lambda self, texts, fill: None})()
    with pytest.raises(ConfigError, match="need a target that also embeds texts, but 'toy' does not"):
        fit_decoder(configure(tmp_path, **texts), make_text_data(tmp_path, side=side), seed=0)
    with pytest.raises(ConfigError, match="learn in 'toy', but images are made from predictions in 'learnt'"):
        fit_decoder(configure(tmp_path, **texts), make_text_data(tmp_path, space="learnt"), seed=0)
    with pytest.raises(ConfigError, match="measures its gap on predictions of training trials"):
        fit_decoder(configure(tmp_path, **texts), make_text_data(tmp_path, predicted=False), seed=0)
    with pytest.raises(ValueError, match=r"masked is 1\.0, but it has no effect: a text has no patches"):
        configure(tmp_path, **texts, masked=1)
    with pytest.raises(ValueError, match=r"texts is .*, but it has no effect: learns_from is images"):
        configure(tmp_path, texts=tmp_path / "more.csv")
    data = make_text_data(tmp_path)
    (tmp_path / "bank.csv").write_text("id,caption\n" + "\n".join(f"i{k},star" for k in range(60)))
    with pytest.raises(DataError, match="the same text for all training images"):
        fit_decoder(configure(tmp_path, **texts), data, seed=0)


def test_old_settings_keep_their_fingerprint(tmp_path):
    make_data(tmp_path)
    assert (
        not {"gap", "texts", "texts_sha256"}
        & CocaCaptionsConfig(bank=tmp_path / "bank.csv").hashed_fields().keys()
    )
