"""Priors and generators are judged by what they were made of; trainings that differ, by what they know of the test."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.parts.audit import material
from braindecode_vis.parts.audit.material import _check_prior, _check_record, _check_training, _check_weights
from braindecode_vis.parts.audit.recompute import RecomputedRun
from braindecode_vis.pipeline.leaks.run_files import AuditedRun
from braindecode_vis.preprocessing.splits import Fold

N = 30
NAMES = [f"i{row:02d}" for row in range(N)]
TRUTH = Embeddings(np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32), NAMES, "toy")
PIXELS = np.random.default_rng(1).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)


class Prior:
    """Draws around the truth with some error; writes a number that no other training has."""

    def __init__(self, error):
        self.error = error

    def write(self, folder):
        (folder / "prior.json").write_text(f"{self.error}")

    def sample(self, predicted, *, n_draws, seed):
        generator = np.random.default_rng(seed)
        truth = np.repeat(TRUTH.vectors, n_draws, axis=0)
        return Embeddings(
            truth + self.error * generator.normal(size=truth.shape), np.repeat(NAMES, n_draws), "toy"
        )


class Generator:
    """Returns what was seen with some error in grey levels."""

    def __init__(self, error):
        self.error = error

    def bind(self, context):
        pass

    def write(self, folder):
        (folder / "network.json").write_text(f"{self.error}")

    def generate(self, predicted, *, seed):
        noise = self.error * np.random.default_rng(seed).normal(size=PIXELS.shape)
        return np.clip(PIXELS + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def make_material(tmp_path, monkeypatch):
    """Return the material of a fold whose prior and generator err so much in the run, and so much when made again."""

    def make(part, stored, made, *, kind="diffusion", thorough=True):
        kinds = {"prior": Prior, "generator": Generator}
        fits, said = tmp_path / "fits", []
        (fits / part).mkdir(parents=True)
        kinds[part](stored).write(fits / part)

        def open_folder(name):
            (tmp_path / name).mkdir()
            return tmp_path / name

        run = SimpleNamespace(
            thorough=thorough,
            state=lambda *words: said.append(words),
            stimuli=StimulusSet.from_pixels(PIXELS, NAMES),
        )
        config = SimpleNamespace(prior=SimpleNamespace(kind=kind), generator=SimpleNamespace(kind=kind))
        stored, made = kinds[part](stored), kinds[part](made)
        monkeypatch.setattr(material, "read_fits", lambda *_: (stored, stored))
        monkeypatch.setattr(material.roles, "build", lambda *_, **__: made)
        found = SimpleNamespace(
            run=run, again=SimpleNamespace(config=config, generator=config.generator), fits=fits,
            data=SimpleNamespace(context=None),
            fit_prior=lambda: made, open_folder=open_folder, embeddings=TRUTH, predicted=TRUTH, generator=stored,
        )  # fmt: skip
        return found, said

    return make


@pytest.mark.parametrize(("part", "check"), [("prior", _check_prior), ("generator", _check_training)])
@pytest.mark.parametrize(
    ("stored", "made", "thorough", "knows", "how"),
    [
        (1.0, 1.0, True, False, "recomputed"),
        (1.0, 2.0, False, False, "by record"),  # longer trainings are made again with --refit
        (1.001, 1.0, False, False, "by record"),
        (0.3, 1.0, True, True, None),  # knows the test
        (1.01, 1.0, True, False, "by record"),  # another machine
        (2.0, 1.0, True, False, "by record"),  # knows it less
    ],
)
def test_a_training_that_knows_the_test_better_than_one_of_the_split_is_told(
    make_material, part, check, stored, made, thorough, knows, how
):
    scale = {"prior": 1.0, "generator": 40.0}[part]
    found, said = make_material(part, scale * stored, scale * made, thorough=thorough)
    text = check(found)
    assert ("less error on the test" in text) == knows, text
    assert [words[:2] for words in said] == ([("material", how)] if how else [])


def test_a_cheap_prior_is_made_again_and_must_be_the_same(make_material):
    found, _ = make_material("prior", 1.0, 1.1, kind="mean", thorough=False)
    assert "the prior mean is not that of the training split: prior.json: it is 1, but 1.1" in _check_prior(
        found
    )


@pytest.mark.parametrize("known", [0, 2])
def test_test_images_among_those_that_weights_bring_along_are_told(known):
    """Known images are rounded, in the components that they were trained on."""
    generator = np.random.default_rng(3)
    images = generator.normal(size=(50, 6)) + 4
    images[:known] = TRUTH.vectors[5 : 5 + known] + 1e-4 * generator.normal(size=(known, 6))
    weights = SimpleNamespace(read_known_images=lambda: Embeddings(images, np.arange(50).astype(str), "toy"))
    found = SimpleNamespace(
        run=None, again=SimpleNamespace(generator=SimpleNamespace(knows_images=True)), embeddings=TRUTH,
        predicted=TRUTH, generator=weights, fits=Path(),
    )  # fmt: skip
    text = _check_weights(found)
    assert text == (
        "the weights of the generator were trained on 2 test image(s), first i05." if known else ""
    )


def test_a_decoder_of_captions_that_knows_a_test_image_is_found(tmp_path):
    ids = np.array(["a", "b", "c"], dtype=object)
    run = SimpleNamespace(
        responses=SimpleNamespace(stimulus_ids=ids), state=lambda *words: None,
        folds=[SimpleNamespace(train=np.array([0, 1]), test=np.array([2]))],
    )  # fmt: skip
    for kind, name, content in (
        ("nearest", "captions.json", {"a": ["a cat"], "c": ["a dog"]}),
        ("coca", "decoder.json", {"images": ["a", "b"]}),
        ("git", "decoder.json", {"images": ["b", "x"]}),
    ):
        (tmp_path / "captions" / kind).mkdir(parents=True)
        (tmp_path / "captions" / kind / name).write_text(json.dumps(content))
    (tmp_path / "material.json").write_text(json.dumps({"images": ["a", "b"]}))
    git, nearest = _check_record(run, 0, tmp_path)
    assert git.startswith(
        "the decoder of captions git had 1 image(s) that the fold does not learn from, first x"
    )
    assert "nearest had 1 image(s)" in nearest


@pytest.mark.parametrize(
    ("n_other", "n", "level"), [(0, 200, "ok"), (1, 200, "ok"), (1, 20, "leak"), (40, 200, "leak")]
)
def test_a_few_captions_may_be_those_of_another_image(tmp_path, monkeypatch, n_other, n, level):
    """Two training images may be equally near; of the rest each caption is that of the nearest one."""
    stored = ["other"] * n_other + ["a cat"] * (n - n_other)
    (tmp_path / "captions.json").write_text(json.dumps({"decoded": stored}))
    (tmp_path / "bank.csv").write_text("id,caption\n")
    monkeypatch.setattr(material, "hash_file", lambda path: "digest")
    monkeypatch.setattr("braindecode_vis.embeddings.caption_bank.read_caption_bank", lambda path: {})
    monkeypatch.setattr(
        "braindecode_vis.scoring.caption_retrieval.retrieve_nearest", lambda *_, **__: ["a cat"] * n
    )
    bank = Embeddings(np.eye(2), ["t", "q"], "toy")
    monkeypatch.setattr(material.decoding, "predict_for_generator", lambda again, number: (bank, bank))
    fields = {"evaluation": {"captions": {"bank_sha256": "digest"}}}
    run = Mock(
        spec=AuditedRun,
        evaluated=Mock(path=tmp_path, fields=fields),
        folds=(Fold(np.array([0]), np.array([1])),),
    )
    run.responses = Mock(stimulus_ids=np.array(["t", "q"], dtype=object))
    again = Mock(spec=RecomputedRun, config=Mock())
    again.config.evaluation.captions = Mock(bank=tmp_path / "bank.csv", captioner=None, torch_device="cpu")
    again.config.evaluation.descriptions = None
    (found,) = material.check_captions(run, again)
    assert found.level == level
    assert level == "ok" or f"{n_other} of {n} captions are not those of the nearest" in found.message


def caption(n_shared, *, usual=0, change=str):
    """Write a sentence for each of 100 training and 20 test images, some with the sentence of another one."""
    train = {f"train{n}": [f"a drawing of number {n // 2 if n < usual else n}"] for n in range(100)}
    test = {f"test{n}": [f"a drawing of number {n if n < n_shared else 500 + n}"] for n in range(20)}
    return {**train, **{name: [change(text) for text in texts] for name, texts in test.items()}}


@pytest.mark.parametrize(
    "bank, level",
    [
        (caption(0), None),
        (caption(2), None),
        (caption(5), "warning"),
        (caption(5, usual=4), "warning"),
        (caption(5, usual=40), None),  # as often as training images share theirs
        (caption(20), "leak"),
        (caption(20, change=lambda text: f"{text.upper()}!"), "leak"),
        ({name: ["a dog"] for name in caption(0)}, None),  # names are no sentences
    ],
)
def test_texts_of_test_images_among_those_of_training_images_are_found(bank, level):
    train, test = ([name for name in bank if name.startswith(side)] for side in ("train", "test"))
    found = material.compare_captions(bank, train, test)
    assert (None if found is None else found.level) == level
    assert (
        found is None or "test images have exactly the text of a training image, first test0" in found.message
    )


@pytest.mark.parametrize(("texts", "level"), [(caption(20), "leak"), (caption(0), None), (None, None)])
def test_descriptions_are_compared_like_captions(tmp_path, texts, level):
    """A mapping from words to embeddings that learns from descriptions of test images knows what was seen."""
    path = tmp_path / "texts.csv"
    bank = texts or caption(20)
    path.write_text("\n".join(["id,caption", *(f"{name},{text}" for name, (text,) in bank.items())]))
    names = np.array(list(bank), dtype=object)
    digest = hash_once(path) if texts else "of another file"
    run = Mock(folds=[Mock(train=np.arange(100), test=np.arange(100, 120))])
    run.responses.stimulus_ids = names
    run.evaluated.path = tmp_path
    run.evaluated.fields = {"evaluation": {"descriptions": {"captions_digest": digest}}}
    again = Mock()
    again.config.evaluation.descriptions = Mock(captions=path, file=path)
    found = material.check_captions(run, again)
    assert [item.level for item in found] == ([level] if level else [])
    how = "recomputed" if texts else "by record"
    assert run.state.call_args.args[:3] == ("material", how, "descriptions")
