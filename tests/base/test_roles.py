"""Which methods a role requires, and what it adds to classes that have no more; test_outside runs such classes."""

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.base.contracts import (
    BrainEncoder,
    CategoryDecoder,
    Context,
    EncoderSettings,
    FittedImageEncoder,
    GeneratorSettings,
    ImageEncoder,
    ImageGenerator,
    Network,
    NetworkSettings,
    ObjectiveSettings,
    Prior,
)
from braindecode_vis.base.registry import DROPPED, GROUPS, find_component, list_inside
from braindecode_vis.base.settings import Settings
from braindecode_vis.config import read_config
from braindecode_vis.datasets.synthetic_digits import SyntheticDigitsConfig, make_synthetic_digits
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.generation.inversion import NearestConfig
from braindecode_vis.generation.priors.closed_form import IdentityPriorConfig
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.training.network_config import NetworkEncoderConfig

SMALL = ["evaluation.n_bootstrap=200", "evaluation.n_permutations=200"]


class PlainDataset(Settings):
    """Digits that are written by a data set of no more than the required methods."""

    kind: Literal["plain_dataset"] = "plain_dataset"
    n_train: int = 60
    n_test: int = 12

    def check(self):
        return []

    def hash_inputs(self):
        return {}

    def write(self, folder: Path, *, seed: int) -> None:
        made = SyntheticDigitsConfig(n_train=self.n_train, n_test=self.n_test, n_voxels=50, snr=4.0)
        responses, stimuli = make_synthetic_digits(made, seed=seed)
        store.write_responses(folder / "responses", responses)
        store.write_stimuli(folder / "stimuli", stimuli)


class PlainDataOfRuns(PlainDataset):
    """The same with four runs, in each of which every concept is shown."""

    kind: Literal["plain_runs"] = "plain_runs"

    def write(self, folder: Path, *, seed: int) -> None:
        made = SyntheticDigitsConfig(n_train=200, n_test=2, n_voxels=50, snr=4.0)
        responses, stimuli = make_synthetic_digits(made, seed=seed)
        turn = responses.trials.groupby("concept").cumcount().to_numpy() % 4
        trials = responses.trials.assign(run=[f"{number:02d}" for number in turn])
        store.write_responses(folder / "responses", responses.with_trials(trials))
        store.write_stimuli(folder / "stimuli", stimuli)


class PlainImageEncoder:
    space = "plain/rows-and-columns"

    def encode(self, images):
        grey = [np.asarray(image, np.float32).mean(axis=-1) / 255 for image in images]
        return np.stack([np.concatenate([image.mean(axis=0), image.mean(axis=1)]) for image in grey])


class PlainFittedSettings(Settings):
    """An image encoder that learns from the training images, and so must write what it learnt."""

    kind: Literal["plain_fitted"] = "plain_fitted"
    fitted_on_training_images: bool = True

    def build(self):
        return PlainFittedEncoder()


class PlainFittedEncoder(PlainImageEncoder):
    space = "plain/centred"

    def fit(self, images):
        self.mean = super().encode(images).mean(axis=0)
        return self

    def encode(self, images):
        return super().encode(images) - self.mean

    def write(self, folder):
        np.save(folder / "mean.npy", self.mean)

    def read(self, folder):
        self.mean = np.load(folder / "mean.npy")
        return self


class PlainBrainSettings(Settings):
    kind: Literal["plain_brain"] = "plain_brain"

    def build(self, *, seed: int):
        return PlainBrainEncoder()


class PlainBrainEncoder:
    """The required methods, of which nothing is asked here; test_outside has one that decodes."""

    def fit(self, responses, targets):
        """Learn nothing."""

    predict = write = read = fit


class PlainCategorySettings(Settings):
    kind: Literal["plain_categories"] = "plain_categories"
    decodes_categories: bool = True

    def build(self, *, seed: int):
        return PlainCategoryDecoder()


class PlainCategoryDecoder:
    """The nearest mean."""

    def fit(self, responses, labels):
        self.classes = tuple(sorted(set(labels)))
        self.means = np.stack([responses.as_matrix()[labels == name].mean(axis=0) for name in self.classes])

    def decision(self, responses):
        return responses.as_matrix() @ self.means.T - (self.means**2).sum(axis=1) / 2

    def write(self, folder):
        np.save(folder / "means.npy", self.means)
        store.write_json(folder / "classes.json", list(self.classes))

    def read(self, folder):
        self.means, self.classes = (
            np.load(folder / "means.npy"),
            tuple(store.read_json(folder / "classes.json")),
        )
        return self


class PlainGeneratorSettings(Settings):
    kind: Literal["plain_generator"] = "plain_generator"

    def build(self, data):
        """Build nothing."""


ROLES = [
    *dict.fromkeys(roles.SETTINGS_ROLES.values()),
    ImageEncoder, FittedImageEncoder, BrainEncoder, CategoryDecoder, Network, Prior, ImageGenerator,
]  # fmt: skip


def plain(name):
    return f"tests.base.test_roles:{name}"


def make_run(folder, *overrides, dataset="PlainDataset"):
    source = folder.parent / "plain.yaml"
    source.write_text(f"name: plain\ndataset: {{kind: '{plain(dataset)}'}}\n")
    return open_run(read_config(source, [*SMALL, *overrides]), folder)


def score(rows, metric, method="decoded"):
    (value,) = [row["value"] for row in rows if row["metric"] == metric and row["method"] == method]
    return value


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path / "cache"))


def test_a_fitted_image_encoder_sees_training_images_and_is_read_back(tmp_path, own_cache):
    run = make_run(tmp_path / "run", f"target.kind={plain('PlainFittedSettings')}", "generator.kind=nearest")
    rows = pipeline.run_all(run)
    bank, prepared = pipeline.embed(run)[0], pipeline.preprocess(run)
    train = pd.unique(prepared.responses.stimulus_ids[prepared.folds[0].train])
    np.testing.assert_allclose(bank.embeddings.select(train).flat().mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(
        bank.encoder.encode(prepared.stimuli.iterate_images(train[:3])),
        bank.embeddings.select(train[:3]).flat(),
    )
    assert score(rows, "top1") > 0.3


def test_a_category_decoder_of_the_required_methods_alone(tmp_path):
    parts = [f"encoder.kind={plain('PlainCategorySettings')}", "split.kind=leave_one_run_out"]
    rows = pipeline.run_all(make_run(tmp_path / "run", *parts, dataset="PlainDataOfRuns"))
    assert score(rows, "accuracy") > 0.4  # chance is 1 in 10
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["stages"]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.role_name)
def test_a_missing_method_is_one_sentence(role):
    required, learnt = roles.list_required(role), getattr(role, "learnt", ())
    assert required
    for name in required:
        have = dict.fromkeys(key for key in required if key != name)
        sentence = (
            f"Broken cannot be the {role.role_name}: it has no {name}; required are "
            f"{', '.join([*required, *learnt])}."
        )
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            roles.complete(role, type("Broken", (), have)())
    for name in learnt:
        whole = roles.complete(role, type("Broken", (), dict.fromkeys(required))())
        with pytest.raises(ConfigError, match=f"Broken cannot be the {role.role_name}: it has no {name}"):
            getattr(whole, name)


def list_defaults(role):
    return [n for n in vars(role) if not n.startswith("_") and n not in (*role.__abstractmethods__, "learnt")]


@pytest.mark.parametrize(
    "role", [role for role in ROLES if role is not ObjectiveSettings], ids=lambda r: r.role_name
)
def test_a_component_without_a_base_class_has_every_default_of_its_role(role):
    """As one that inherits; only what comes with a fit may be missing."""
    methods = dict.fromkeys(roles.list_required(role), lambda self, *args, **kwargs: None)
    bare = roles.complete(role, type("Bare", (), methods)())
    heir = type("Heir", (role,), methods)
    for name in list_defaults(role):
        if name in getattr(role, "learnt", ()) or name == "role_name":
            continue
        own = vars(role)[name]
        if callable(own):
            assert getattr(bare, name).__func__ is getattr(heir, name)
        else:
            assert getattr(bare, name) == getattr(heir(), name)
    if not issubclass(role, Settings):
        assert roles.complete(role, one := heir()) is one


def test_a_generator_without_a_base_class_is_named_by_its_own_class():
    methods = dict.fromkeys(roles.list_required(ImageGenerator), lambda self, *args, **kwargs: None)
    generator = roles.complete(ImageGenerator, type("Bare", (), methods)())
    with pytest.raises(ConfigError, match=r"^the generator Bare has no images of its own"):
        generator.read_known_images()


class FormerEncoder(PlainBrainEncoder):
    """Methods that brain encoders had before these were grouped."""

    predicts_alike = False
    adapts_quickly = True

    def predict_for_generator(self, responses):
        return "for the generator"

    def find_prior(self):
        return "a prior"

    def describe_likelihood(self):
        return "a likelihood"

    def adapt(self, responses, targets):
        return "another encoder"

    def describe(self, responses, n_beams=1):
        return ["a star"] * n_beams

    def describe_mean(self, n_beams=1):
        return "a grey image"


def test_the_former_methods_of_a_brain_encoder_are_found():
    whole = roles.complete(BrainEncoder, FormerEncoder())
    assert whole.predict_for_generator(None) == whole.generator_view.predict(None) == "for the generator"
    assert whole.map_for_generator("targets") == "targets"
    assert (whole.predicts_targets, whole.predicts_alike, whole.generator_view.prior) == (
        True,
        False,
        "a prior",
    )
    assert whole.likelihood == "a likelihood"
    assert whole.adaptation.adapt(None, None) == "another encoder"
    assert whole.adaptation.is_quick
    assert (whole.captions.write(None, 2), whole.captions.write_mean(1)) == (["a star"] * 2, "a grey image")
    plain = roles.complete(BrainEncoder, PlainBrainEncoder())
    assert {plain.generator_view, plain.likelihood, plain.adaptation, plain.captions} == {None}


def test_a_brain_encoder_that_inherits_and_has_a_former_method_is_one_sentence():
    """It would not be asked: the abilities are properties now."""
    with pytest.raises(
        ConfigError, match=r"Heir has adapt, which .* as a part of adaptation: add a property"
    ):
        type("Heir", (BrainEncoder,), {"adapt": FormerEncoder.adapt})


def test_settings_that_have_a_meaning_for_the_role_are_found():
    class Former(PlainBrainSettings):
        pool: bool = True
        members: tuple[str, ...] = ("a", "b")
        heads: str = "two"
        steps: int = 3

    assert roles.complete(EncoderSettings, Former()).pools_volumes
    assert roles.complete(EncoderSettings, Former()).list_members() == ("a", "b")
    assert roles.complete(NetworkSettings, Former()).has_two_heads
    assert roles.complete(GeneratorSettings, Former()).n_steps == 3
    assert roles.complete(GeneratorSettings, PlainGeneratorSettings()).n_steps is None


def test_a_read_that_returns_nothing_is_one_sentence(tmp_path):
    class Forgetful(PlainBrainSettings):
        def read(self, folder):
            pass

    sentence = "read of the brain encoder 'plain_brain' returned None; it must return the component"
    with pytest.raises(ConfigError, match=sentence):
        roles.read(BrainEncoder, Forgetful(), tmp_path)


def test_a_data_set_without_a_recording_is_one_sentence():
    with pytest.raises(ConfigError, match="none of write, open_epochs, open_betas, open_bold"):
        roles.find_source(Settings())


@pytest.mark.parametrize(
    ("role", "component"),
    [
        (BrainEncoder, RidgeConfig().build(seed=0)),
        (Prior, IdentityPriorConfig().build()),
        (EncoderSettings, NetworkEncoderConfig()),
        (GeneratorSettings, NearestConfig()),
    ],
)
def test_a_component_of_the_package_is_whole_already(role, component):
    assert roles.complete(role, component) is component


def test_out_of_fold_predictions_have_not_seen_their_image():
    """The default refits without a fifth of the images; a memory of the training images finds none of them again."""

    class Memory:
        def fit(self, responses, targets):
            self.known, self.space = set(responses.stimulus_ids), targets.space

        def predict(self, responses):
            known = np.array([[float(i in self.known)] for i in responses.stimulus_ids], np.float32)
            return Embeddings(known, responses.stimulus_ids, self.space)

        def write(self, folder):
            raise AssertionError

        read = write

    class MemorySettings:
        kind = "memory"

        def build(self, *, seed):
            return Memory()

        def hashed_fields(self):
            return {}

    responses, _ = make_synthetic_digits(SyntheticDigitsConfig(n_train=20, n_test=2, n_voxels=2), seed=0)
    rows = np.r_[np.arange(20), np.arange(20)]  # each image twice
    trials = responses.select(rows)
    targets = Embeddings(np.ones((40, 1), np.float32), trials.stimulus_ids, "ones")
    encoder = roles.build(BrainEncoder, MemorySettings(), seed=0)
    encoder.fit(trials, targets)
    assert encoder.predict(trials).vectors.all()
    predicted = encoder.predict_out_of_fold(trials, targets)
    assert not predicted.vectors.any()
    assert predicted.ids.tolist() == trials.stimulus_ids.tolist()


def test_a_part_of_a_context_has_a_folder_and_a_name_of_its_own(tmp_path):
    told = []
    context = Context(checkpoints=tmp_path, progress=lambda *args: told.append(args))
    part = context.take_part("fold03")
    part.progress(1, 2, "loss 0.1")
    assert told == [(1, 2, "fold03, loss 0.1")]
    assert part.checkpoints == tmp_path / "fold03"
    assert Context().take_part("fold00") == Context()


@pytest.mark.parametrize(("role", "kind"), [(role, kind) for role in DROPPED for kind in DROPPED[role]])
def test_a_kind_of_an_earlier_version_says_what_to_write_instead(role, kind):
    with pytest.raises(ConfigError, match=rf"^'{kind}' is no longer a kind of {role}: ") as error:
        find_component(role, kind)
    named = re.findall(r"\{kind: (\w+)", str(error.value))
    assert set(named) <= {one for each in GROUPS for one in list_inside(each)}
    assert kind not in list_inside(role)
