"""Leaks and forgeries as a careless or a cheating researcher leaves them: every one is found, none of the clean runs.

Each plant is put into a copy of a clean run, or into the data before a run. Whoever plants is an insider: digests and
provenance are made again, so that the chain of artifacts is whole. A plant names the check that finds it; those that
need ``audit --refit`` say so.
"""

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis import pipeline
from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Prior, PriorSettings
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels
from braindecode_vis.config import read_config
from braindecode_vis.datasets import synthetic_digits
from braindecode_vis.generation.latent_diffusion_training import StimulusSource, train_generator
from braindecode_vis.parts.audit.results import check_embedded, check_prepared
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline import decoding, learning, preparing
from braindecode_vis.pipeline.reconstruction import fit_prior
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.selection import SelectionConfig, fit_selection
from tests.generation.test_latent_diffusion import TINY
from tests.parts.audit import test_results as forgeries
from tests.parts.audit.test_results import change_array, find_artifact, reseal

N_TRAIN, N_TEST = 60, 20
SIZES = [
    f"dataset.n_train={N_TRAIN}", f"dataset.n_test={N_TEST}", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
]  # fmt: skip
NETWORK = (
    "encoder={kind: network, network: {kind: residual_mlp, hidden: 32, n_blocks: 1}, epochs: 12, "
    "optimiser: {lr: 0.003}, selection: {kind: early_stopping, patience: 4, hold_out: 0.2, monitor: loss}}"
)
#: Settings of a run that ends when the images are ranked, which suffices for what is planted before that.
RANKED = [
    "target={kind: pca, n_components: 5}",
    "selection.encoding={n_best: 12}",
    "encoder.alphas=[1, 10, 100]",
]
#: Name to settings of a clean run.
BASES = {
    "ridge": [
        "target={kind: pca, n_components: 5}", "selection.encoding={n_best: 16}", "prior={kind: neighbours}",
        "encoder={kind: ridge, alphas: [1, 10, 100], n_features: [6, 12, null]}", "generator={kind: nearest}",
    ],
    "trained": [
        "target={kind: pixels, size: 12}", "encoder.alphas=[10]", "generator={kind: refiner, steps: 30}",
        "prior={kind: diffusion, widths: [32, 16], epochs: 2, min_steps: 30, batch_size: 16, time_features: 8, "
        "steps: 4}",
    ],
    "network": ["target={kind: pixels, size: 8}", NETWORK, "generator={kind: nearest}"],
    # Made by `bases`: files of the person's own lie beside the run.
    "captions": ["target={kind: pca, n_components: 5}", "encoder.alphas=[10]", "generator={kind: nearest}"],
    "weights": ["target={kind: pixels, size: 8}", "encoder.alphas=[10]", "reconstruction.n_draws=1"],
}  # fmt: skip


def run_until(folder, overrides, stage):
    run = open_run(read_config("synthetic_digits", [*SIZES, *overrides]), folder)
    stage(run)
    return folder


def caption_images(folder, overrides, change=lambda captions: None):
    """Write a caption for each image into a bank, and return the setting that names it."""
    prepared = preparing.preprocess(
        open_run(read_config("synthetic_digits", [*SIZES, *overrides]), folder / "bare")
    )
    ids = list(map(str, prepared.stimuli.ids))
    captions = {name: f"a drawing of a digit called {name}" for name in ids}
    change(captions)
    bank = folder / "bank.csv"
    bank.write_text("\n".join(["id,caption", *(f"{name},{text}" for name, text in captions.items())]))
    return f"evaluation.captions={{bank: {bank}, device: cpu}}"


def train_weights(folder, overrides, n_images=N_TRAIN):
    """Train a tiny generator on the first images, and return the setting that names its weights."""
    run = open_run(read_config("synthetic_digits", [*SIZES, *overrides]), folder / "bare")
    ids = preparing.preprocess(run).stimuli.ids[:n_images]
    source = StimulusSource(
        preparing.preprocess(run).stimuli.select(ids), preparing.embed(run)[0].embeddings.select(ids)
    )
    weights = train_generator(TINY, source, folder / "generator", seed=0)
    return f"generator={{kind: latent_diffusion, weights: {weights}, steps: 2, candidates: 1, device: cpu}}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def find(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("plants") / name
            files = {"captions": caption_images, "weights": train_weights}
            settings = BASES.get(name, RANKED)
            own = [files[name](folder.parent, settings)] if name in files else []
            made[name] = run_until(
                folder, [*settings, *own], pipeline.report if name in BASES else pipeline.retrieve
            )
        return made[name]

    return find


@pytest.mark.parametrize(
    "base",
    [pytest.param(base, marks=() if base in ("ridge", "network") else pytest.mark.further) for base in BASES],
)
def test_clean_runs_pass(bases, base):
    audit = audit_run(bases(base), refit=True)
    assert not audit.leaks, audit.leaks
    assert {item.part: item.how for item in audit.list_status()} == forgeries.ALL


@dataclass(frozen=True)
class Plant:
    """What is planted, which check must find it, in which words, and what a second check says of it."""

    plant: object
    check: str
    base: str = "ridge"
    refit: bool = False
    words: str = ""
    also: tuple[str, str] | None = None
    is_alone: bool = False

    @property
    def name(self):
        return self.plant.__name__

    def must_be_found(self, leaks):
        for check, words in filter(None, [(self.check, self.words), self.also]):
            assert any(words in item.message for item in leaks if item.check == check), leaks
        assert not self.is_alone or {item.check for item in leaks} == {self.check}


# --- planted in a finished run ------------------------------------------------------------------------------


def open_copy(folder):
    run = open_run(read_config(folder), folder)
    return run, preparing.preprocess(run), preparing.embed(run)[0]


def edit_json(path, change):
    content = json.loads(path.read_text())
    store.write_json(path, change(content) or content)


def train_on_a_test_trial(folder):
    """Move a test trial to the training side of the split."""

    def change(split):
        split["folds"][0]["test"].remove(N_TRAIN + 4)
        split["folds"][0]["train"].append(N_TRAIN + 4)

    edit_json(find_artifact(folder, "preprocess") / "split.json", change)


def list_a_test_trial_twice(folder):
    edit_json(
        find_artifact(folder, "preprocess") / "split.json",
        lambda split: split["folds"][0]["train"].append(N_TRAIN + 4),
    )


def call_it_zero_shot(folder):
    """Claim a protocol that the trials do not keep."""
    edit_json(
        find_artifact(folder, "preprocess") / "split.json",
        lambda split: split.update(protocol="zero-shot concepts"),
    )


def declare_that_concepts_are_apart(folder):
    edit_json(find_artifact(folder, "preprocess") / "split.json", lambda split: split["by"].append("concept"))


def copy_a_trial_with_noise(folder):
    def change(data):
        data = data.copy()
        data[9] = data[N_TRAIN + 3] * (1 + 1e-6) + 1e-6
        return data

    change_array(find_artifact(folder, "preprocess") / "responses" / "data.npy", change)


def fit_on_all_trials(folder):
    """Fit the encoder on training and test trials."""
    run, prepared, bank = open_copy(folder)
    fold = learning.train(run)[0]
    responses = fold.selection.apply(prepared.responses)
    encoder = run.config.encoder.build(seed=derive_seed(run.config.seed, "train", 0))
    encoder.fit(responses, bank.embeddings.select(list(responses.stimulus_ids)))
    encoder.write(fold.artifact.path)


def fit_weights_alone_on_all_trials(folder):
    """Put weights of all trials beside statistics of training trials."""
    from safetensors.numpy import load_file, save_file

    path = find_artifact(folder, "train") / "ridge.safetensors"
    kept = load_file(path)
    fit_on_all_trials(folder)
    other = load_file(path)
    weights = other["weights"] if other["weights"].shape == kept["weights"].shape else 1.02 * kept["weights"]
    save_file({**kept, "weights": weights}, path)


def choose_features_by_all_trials(folder):
    run, prepared, bank = open_copy(folder)
    config = SelectionConfig.model_validate(run.config.selection.model_dump())
    selection = fit_selection(
        config, prepared.responses, bank.embeddings, seed=derive_seed(run.config.seed, "selection")
    )
    selection.write(find_artifact(folder, "train") / "selection")


def choose_the_number_of_features_by_the_test(folder):
    """Write another number of features as the choice of the inner folds."""

    def change(content):
        best = min(content["choices"], key=lambda choice: choice["mse"])
        worst = max(content["choices"], key=lambda choice: choice["mse"])
        best["mse"], worst["mse"] = worst["mse"], best["mse"]

    edit_json(find_artifact(folder, "train") / "ridge.json", change)


def choose_the_penalty_by_the_test(folder):
    """Use another penalty than the inner folds chose, and exchange their errors."""

    def change(content):
        best = min(content["choices"], key=lambda choice: choice["mse"])
        other = next(c for c in content["choices"] if c["alpha"] != best["alpha"])
        best["mse"], other["mse"] = other["mse"], best["mse"]
        content["alpha"] = other["alpha"]

    edit_json(find_artifact(folder, "train") / "ridge.json", change)


def fit_targets_on_all_images(folder):
    _, prepared, bank = open_copy(folder)
    encoder = bank.encoder.config.build().fit(prepared.stimuli.iterate_images())
    artifact = find_artifact(folder, "embed")
    encoder.write(artifact)
    vectors = encoder.encode(prepared.stimuli.iterate_images())
    store.write_embeddings(artifact, Embeddings(vectors, prepared.stimuli.ids, encoder.space))


def mix_the_bank_with_predictions(folder):
    """Draw the target of one test image a little toward its prediction."""
    artifact = find_artifact(folder, "embed")
    bank = store.read_embeddings(artifact)
    predicted = store.read_embeddings(find_artifact(folder, "retrieve") / "fold00")
    row = list(bank.ids).index(predicted.ids[-1])
    vectors = np.array(bank.vectors)
    vectors[row] = 0.9 * vectors[row] + 0.1 * predicted.vectors[-1]
    np.save(artifact / "vectors.npy", vectors)


def log_the_test(folder):
    """Keep a log of the test score of every epoch."""
    (find_artifact(folder, "train") / "log.jsonl").write_text('{"epoch": 0, "test_top1": 0.2}\n')


def rename_queries_by_their_answers(folder):
    """Give each prediction the id that it is nearest to: test ids shuffled by a known mapping."""
    retrieved = find_artifact(folder, "retrieve")
    ranks = pd.read_parquet(retrieved / "ranks.parquet")
    names = [top[0] for top in ranks["top_ids"]]
    edit_json(retrieved / "fold00" / "ids.json", lambda content: content.update(ids=names))
    edit_json(retrieved / "fold00" / "retrieval.json", lambda content: content.update(query_ids=names))


def shrink_the_gallery(folder):
    """Leave half of the candidates out of the gallery."""
    path = find_artifact(folder, "retrieve") / "fold00" / "retrieval.json"
    edit_json(path, lambda content: content.update(gallery_ids=content["gallery_ids"][: N_TEST // 2]))


def add_test_images_to_the_prior(folder):
    """Let the prior know the test images, and decode with it."""
    run, _, bank = open_copy(folder)
    fits = find_artifact(folder, "reconstruct") / "fits" / "fold00" / "prior"
    prior = run.prior.read(fits)
    prior.images = bank.embeddings
    prior.write(fits)


def count_test_images_as_material(folder):
    """A generator that was given more images than the training split has."""
    path = find_artifact(folder, "reconstruct") / "fits" / "fold00" / "material.json"
    _, prepared, _ = open_copy(folder)
    edit_json(path, lambda content: content.update(images=list(map(str, prepared.stimuli.ids))))


def make_data_with_the_test(run):
    """Return the material of prior and generator with the test images and their true predictions among it."""
    prepared, bank = preparing.preprocess(run), preparing.embed(run)[0]
    embeddings, _ = decoding.map_for_generator(run, 0)
    data = decoding.make_generator_data(run, 0, embeddings)
    test = list(pd.unique(prepared.responses.stimulus_ids[prepared.folds[0].test]))
    predicted = decoding.retrieve(run).folds[0].predicted
    # What is most of use is repeated, as who cheats would see to it.
    whole = Embeddings(
        np.concatenate([data.predicted.vectors, *[predicted.vectors] * 20]),
        np.concatenate([data.predicted.ids, *[predicted.ids] * 20]), predicted.space,
    )  # fmt: skip
    ids = [*data.embeddings.ids, *test]
    return replace(
        data, embeddings=bank.embeddings.select(ids), stimuli=prepared.stimuli.select(ids), predicted=whole
    )


def train_the_prior_on_the_test(folder):
    run, _, _ = open_copy(folder)
    content = run.config.prior.model_copy(update={"min_steps": 1500})
    config = run.config.model_copy(update={"prior": content})
    data = make_data_with_the_test(run)
    prior = roles.build(Prior, roles.complete(PriorSettings, content), seed=0)
    fit_prior(config, prior, data, data.embeddings)
    prior.write(find_artifact(folder, "reconstruct") / "fits" / "fold00" / "prior")


def train_the_refiner_on_the_test(folder):
    run, _, _ = open_copy(folder)
    settings = run.config.generator.model_copy(update={"steps": 60, "deformation": 0.0})
    generator = settings.build(make_data_with_the_test(run))
    generator.write(find_artifact(folder, "reconstruct") / "fits" / "fold00" / "generator")


def keep_another_epoch(folder):
    """Keep the weights of an early epoch, the validation curve being right: the best epoch on the test."""
    other = folder.parent / "other"
    overrides = [text.replace("epochs: 12", "epochs: 3") for text in BASES["network"]]
    run_until(other, overrides, learning.train)
    shutil.copy(find_artifact(other, "train") / "network.safetensors", find_artifact(folder, "train"))


def rewrite_the_validation_curve(folder):
    def change(content):
        for entry in content["history"]:
            entry["validation_loss"] *= 0.8

    edit_json(find_artifact(folder, "train") / "network.json", change)


def validate_on_the_test(folder):
    def change(content):
        content["held_out"] = [*content["held_out"][:-1], str(test)]

    _, prepared, _ = open_copy(folder)
    test = prepared.responses.stimulus_ids[prepared.folds[0].test][0]
    edit_json(find_artifact(folder, "train") / "network.json", change)


def stretch_the_weights_of_a_network(folder):
    """Multiply weights by 1.01; validation hardly moves, so the training is made again."""
    from safetensors.numpy import load_file, save_file

    path = find_artifact(folder, "train") / "network.safetensors"
    save_file(
        {k: 1.05 * v if v.dtype.kind == "f" and v.ndim == 2 else v for k, v in load_file(path).items()}, path
    )


def predict_with_other_weights(folder):
    """Exchange the predictions of two test trials."""
    change_array(
        find_artifact(folder, "retrieve") / "fold00" / "vectors.npy", lambda v: v[[1, 0, *range(2, len(v))]]
    )


def reverse_the_trials(folder):
    """Reverse the test rows of the responses."""
    path = find_artifact(folder, "preprocess") / "responses" / "data.npy"
    change_array(path, lambda data: np.concatenate([data[:N_TRAIN], data[N_TRAIN:][::-1]]))


def tell_the_captions_of_what_was_seen(folder):
    """Put the captions of the test images where those of the nearest training images stood."""
    artifact = find_artifact(folder, "evaluate")
    seen = store.read_json(artifact / "captions.json")["seen"]
    edit_json(artifact / "caption_sources.json", lambda told: told.update({"nearest-caption": seen}))


def change_settings_afterwards(folder):
    """Write another penalty into the settings, and the name that follows from them."""
    artifact = find_artifact(folder, "train")
    record = store.read_json(artifact / store.PROVENANCE)
    record["fields"]["encoder"]["alphas"] = [1.0]
    record["fingerprint"] = store.compute_fingerprint(
        "train", record["version"], record["fields"], record["upstream"]
    )
    store.write_json(artifact / store.PROVENANCE, record)
    artifact.rename(artifact.with_name(f"fold00-{record['fingerprint']}"))


IN_RUNS = [
    Plant(train_on_a_test_trial, "split", "ranked", words=f"first row {N_TRAIN + 4}",
          also=("used-trials", f"learnt from {N_TRAIN} trials, but the fold has {N_TRAIN + 1}")),
    Plant(list_a_test_trial_twice, "trials", "ranked", words=f"first row {N_TRAIN + 4}", is_alone=True),
    Plant(call_it_zero_shot, "concept", "ranked", words="zero-shot", is_alone=True),
    Plant(declare_that_concepts_are_apart, "concept", "ranked", words="must not share any concept", is_alone=True),
    Plant(copy_a_trial_with_noise, "copies"),
    Plant(fit_on_all_trials, "encoder-inputs", "ranked", refit=True, words="but those of training and test trials",
          also=("refit", "ridge.safetensors differs from a fit on the training trials")),
    Plant(fit_weights_alone_on_all_trials, "fits"),
    Plant(choose_features_by_all_trials, "features", "ranked", words="training and test trials together choose"),
    Plant(choose_the_number_of_features_by_the_test, "fits"),
    Plant(choose_the_penalty_by_the_test, "fits"),
    Plant(fit_targets_on_all_images, "targets", "ranked", words="training and test images together"),
    Plant(mix_the_bank_with_predictions, "targets"),
    Plant(log_the_test, "model-selection", "ranked"),
    Plant(rename_queries_by_their_answers, "predictions"),
    Plant(shrink_the_gallery, "ranks"),
    Plant(predict_with_other_weights, "predictions"),
    Plant(reverse_the_trials, "predictions"),
    Plant(change_settings_afterwards, "chain"),
    Plant(add_test_images_to_the_prior, "material"),
    Plant(count_test_images_as_material, "material"),
    Plant(train_the_prior_on_the_test, "material", "trained", refit=True),
    Plant(train_the_refiner_on_the_test, "images", "trained", refit=True),
    Plant(keep_another_epoch, "validation", "network", words="weights"),
    Plant(rewrite_the_validation_curve, "validation", "network", words="weights"),
    Plant(validate_on_the_test, "validation", "network"),
    Plant(stretch_the_weights_of_a_network, "predictions", "network"),
    Plant(tell_the_captions_of_what_was_seen, "captions", "captions"),
]  # fmt: skip


def mark(plants):
    """The first plant of each check stands for it. Trainings that are made again take longest."""
    first = {plant.check: plant for plant in reversed(plants)}

    def choose(plant):
        if plant.refit and plant.base == "trained":
            return pytest.mark.slow
        return () if plant is first[plant.check] else pytest.mark.further

    return [pytest.param(plant, id=plant.name, marks=choose(plant)) for plant in plants]


@pytest.mark.parametrize("plant", mark(IN_RUNS))
def test_what_is_planted_in_a_run_is_found(bases, tmp_path, plant):
    folder = Path(shutil.copytree(bases(plant.base), tmp_path / "run"))
    plant.plant(folder)
    reseal(folder)
    leaks = audit_run(folder, refit=plant.refit).leaks
    plant.must_be_found(leaks)
    assert plant.check == "chain" or "chain" not in {item.check for item in leaks}


# --- planted in what preprocessing wrote -----------------------------------------------------------------


def read_noiseless():
    """Return the responses of the same trials without noise, which nobody who records has."""
    config = read_config("synthetic_digits", [*SIZES, "dataset.snr=1e9"])
    return synthetic_digits.make_synthetic_digits(config.dataset, seed=derive_seed(config.seed, "dataset"))[
        0
    ].data


def set_rows(responses, rows, values):
    data = np.array(responses.data)
    data[rows] = values
    return replace(responses, data=data)


def set_column(responses, name, values):
    return replace(responses, trials=responses.trials.assign(**{name: values}))


def move(rows, share):
    return lambda found: set_rows(
        found, rows, (1 - share) * found.data[rows] + share * read_noiseless()[rows]
    )


def exchange_ids(responses):
    ids = responses.stimulus_ids.astype(object)
    ids[[3, TESTED[0]]] = ids[[TESTED[0], 3]]
    return set_column(responses, "stimulus_id", ids)


def replace_the_worst_trial(responses):
    """A second recording of a trial that is decoded well, in the place of one that is not."""
    noise = np.random.default_rng(0).normal(size=responses.data.shape[1])
    return set_rows(responses, TESTED[2], responses.data[TESTED[1]] + 0.5 * noise)


def centre_the_test(responses):
    tested = responses.data[TESTED]
    return set_rows(responses, TESTED, tested - tested.mean(axis=0))


N_TRIALS = N_TRAIN + N_TEST
TRAINED, TESTED = np.arange(N_TRAIN), np.arange(N_TRAIN, N_TRIALS)
ALL_OF_THE_TEST = f"of {N_TEST} of {N_TRIALS} trials ({N_TEST} of them test trials), first row {N_TRAIN}"
FEWER = f"it has {N_TRIALS - 5} rows, but {N_TRIALS} are computed"


def erase_a_voxel(responses):
    return replace(responses, data=np.where(np.arange(24) == 3, 0, responses.data).astype(np.float32))


def rename_voxels(responses):
    return replace(responses, coords={**responses.coords, "voxel_id": np.arange(24)[::-1].copy()})


#: What an insider does to the stored trials, and the words of the audit; everything after them is then run honestly.
IN_RESPONSES = {
    "worst test trials dropped": (lambda found: found.select(np.arange(N_TRIALS - 5)), FEWER),
    "training trials dropped": (lambda found: found.select(np.arange(5, N_TRIALS)), FEWER),
    "test half-way to noiseless": (move(TESTED, 0.5), ALL_OF_THE_TEST),
    "test a little to noiseless": (move(TESTED, 0.02), ALL_OF_THE_TEST),
    "one test trial to noiseless": (move(TESTED[4:5], 0.5), f"first row {TESTED[4]}"),
    "training to noiseless": (move(TRAINED, 0.5), "(0 of them test trials)"),
    "worst trial replaced": (replace_the_worst_trial, f"first row {TESTED[2]}"),
    "test centred": (centre_the_test, ALL_OF_THE_TEST),
    "test doubled": (lambda found: set_rows(found, TESTED, 2 * found.data[TESTED]), ALL_OF_THE_TEST),
    "a voxel erased": (erase_a_voxel, f"of {N_TRIALS} of {N_TRIALS} trials"),
    "other units": (lambda found: replace(found, unit="au"), "meta.json: unit is au"),
    "voxels renamed": (rename_voxels, "coord_voxel_id.npy"),
    "ids exchanged": (exchange_ids, "stimulus_id of row 3"),
    "order of test rows": (
        lambda found: found.select(np.r_[TRAINED, TESTED[::-1]]), f"stimulus_id of row {N_TRAIN}",
    ),
    "another session": (
        lambda found: set_column(found, "session", ["01"] * N_TRAIN + ["02"] * N_TEST), f"session of row {N_TRAIN}",
    ),
    "a column added": (
        lambda found: set_column(found, "onset", np.arange(N_TRIALS)), "has the additional column onset",
    ),
}  # fmt: skip


def plant_in_responses(folder, change):
    """Change the stored trials, and make the split of what is left again."""
    prepared = find_artifact(folder, "preprocess")
    found = store.read_responses(prepared / "responses")
    planted = change(replace(found, data=np.array(found.data)))  # no map of a file that is written anew
    meta = prepared / "responses" / "meta.json"
    before = store.read_json(meta)
    store.write_responses(prepared / "responses", planted)
    store.write_json(meta, {**before, **store.read_json(meta)})
    config = read_config(folder)
    concepts = store.read_stimuli(prepared / "stimuli").concepts_of(planted.stimulus_ids)
    split = config.split.make(planted.trials, concepts, seed=config.seed, knows_images=True)
    store.write_json(prepared / "split.json", split.as_json())
    reseal(folder)


@pytest.mark.parametrize("name", IN_RESPONSES)
def test_what_is_planted_in_stored_trials_is_found(bases, tmp_path, name):
    """The recordings lie unchanged beside the run; the digests are made again from what was planted."""
    change, words = IN_RESPONSES[name]
    folder = Path(shutil.copytree(bases("ranked"), tmp_path / "run"))
    plant_in_responses(folder, change)
    run, (leak,) = forgeries.take_step(folder, check_prepared, thorough=True)
    assert (leak.check, leak.level, words in leak.message) == ("responses", "leak", True), leak
    assert {item.how for item in run.verified} == {"recomputed"}


def test_nothing_but_the_recordings_tells_of_trials_that_were_dropped(bases, tmp_path):
    """Every later stage is made honestly from what is left, so that the run agrees with itself."""
    folder = Path(shutil.copytree(bases("ranked"), tmp_path / "run"))
    plant_in_responses(folder, lambda found: found.select(np.arange(N_TRIALS - 5)))
    for stage in ("embed", "train", "retrieve"):
        shutil.rmtree(folder / "stages" / stage)
    pipeline.retrieve(open_run(read_config(folder), folder))
    assert {item.check for item in audit_run(folder, refit=True).leaks} == {"responses"}
    audit = audit_run(folder)
    (data,) = [item for item in audit.list_status() if item.part == "data"]
    assert (audit.leaks, data.how, "--refit" in data.describe()) == ((), "by record", True)


def test_without_recordings_the_trials_are_known_by_record(bases, monkeypatch):
    """Other recordings than those of the run prove nothing about its trials."""
    folder = bases("ranked")

    def fail(self):
        raise DataError("the recordings are gone.")

    for hash_inputs, words in (
        (lambda self: {"a": "1"}, "not those that the run was made from"),
        (fail, "gone"),
    ):
        monkeypatch.setattr(synthetic_digits.SyntheticDigitsConfig, "hash_inputs", hash_inputs)
        run, found = forgeries.take_step(folder, check_prepared, thorough=True)
        (told,) = run.verified
        assert (found, told.how, words in told.reason) == ([], "by record", True)


# --- planted in a file of targets --------------------------------------------------------------------------


def run_imported(folder, vectors, ids):
    """Rank images by targets that someone brings in a file."""
    folder.mkdir()
    np.save(folder / "bank.npy", np.asarray(vectors, dtype=np.float32))
    (folder / "ids.txt").write_text("\n".join(map(str, ids)))
    files = f"files: {folder / 'bank.npy'}, ids: {folder / 'ids.txt'}"
    target = f"target={{kind: imported, layout: rows, network: toy, {files}}}"
    return run_until(folder / "run", [*MORE, target, "generator={kind: nearest}"], pipeline.retrieve)


#: 80 training images and 40 tested ones.
MORE = ["dataset.n_train=80", "dataset.n_test=40", "encoder.alphas=[10, 100, 1000]"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Features that a network might compute of the pixels, and the run with them."""
    folder = tmp_path_factory.mktemp("imported")
    run = open_run(read_config("synthetic_digits", [*SIZES, *MORE]), folder / "bare")
    stimuli = preparing.preprocess(run).stimuli
    pixels = np.stack([image.reshape(-1) for image in stimuli.iterate_images()]) / 255.0
    weights = np.random.default_rng(1).normal(size=(pixels.shape[1], 30))
    vectors = np.maximum((pixels - 0.5) @ weights, 0) + 0.01
    return run_imported(folder / "honest", vectors, stimuli.ids), vectors, stimuli.ids


def judge_targets(folder, *, thorough=True):
    return forgeries.take_step(folder, check_embedded, thorough=thorough)


def scale_by_all(vectors, n_train, predicted):
    return (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)


def centre_by_all(vectors, n_train, predicted):
    return vectors - vectors.mean(axis=0)


def divide_by_spread_of_all(vectors, n_train, predicted):
    return vectors / vectors.std(axis=0)


def scale_robustly_by_all(vectors, n_train, predicted):
    low, median, high = np.percentile(vectors, [25, 50, 75], axis=0)
    return (vectors - median) / (high - low + 1e-3)


def stretch_from_0_to_1_by_all(vectors, n_train, predicted):
    return (vectors - vectors.min(axis=0)) / (np.ptp(vectors, axis=0) + 1e-9) + 0.001


def centre_each_side(vectors, n_train, predicted):
    """Test targets around their own mean, which no single image knows, and training targets around theirs."""
    train, test = np.split(vectors, [n_train])
    return np.concatenate([train - train.mean(axis=0) + 0.2, test - test.mean(axis=0)])


def take_components_of_all_targets(vectors, n_train, predicted):
    centred = vectors - vectors.mean(axis=0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2].T + 5


def whiten_by_all(vectors, n_train, predicted):
    centred = vectors - vectors.mean(axis=0)
    return np.linalg.svd(centred, full_matrices=False)[0] * np.sqrt(len(vectors))


def centre_and_add_by_all(vectors, n_train, predicted):
    return np.log(vectors) - np.log(vectors).mean(axis=0) + 2


def divide_by_length_of_all(vectors, n_train, predicted):
    return vectors / np.linalg.norm(vectors, axis=0)


def draw_to_predictions(vectors, n_train, predicted):
    return np.concatenate([vectors[:n_train], 0.5 * vectors[n_train:] + 0.5 * predicted])


def scale_by_training(vectors, n_train, predicted):
    """What an honest person does."""
    return (vectors - vectors[:n_train].mean(axis=0)) / vectors[:n_train].std(axis=0)


#: What is done to the vectors, the level that the audit finds, and its words.
IN_TARGETS = {
    scale_by_all: ("leak", "SD 1 holds over training and test images"),
    centre_by_all: ("leak", "mean 0 holds over training and test images"),
    divide_by_spread_of_all: ("leak", "SD 1 holds over training and test images"),
    scale_robustly_by_all: ("leak", "median 0 holds over training and test images"),
    stretch_from_0_to_1_by_all: (
        "leak",
        "one minimum and maximum of all features holds over training and test",
    ),
    centre_each_side: ("leak", "mean 0 holds over test images alone"),
    take_components_of_all_targets: (
        "leak",
        "no correlation of features holds over training and test images",
    ),
    whiten_by_all: ("leak", "over training and test images"),
    centre_and_add_by_all: ("leak", "one mean of all features holds over training and test images"),
    divide_by_length_of_all: ("leak", "length 1 of each feature holds over training and test images"),
    draw_to_predictions: ("warning", "nearer to their predictions than those of training images"),
    scale_by_training: None,
}
#: One change that is a leak, one that is warned of, and one that is neither.
ONE_OF_EACH = (scale_by_all, draw_to_predictions, scale_by_training)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=() if change in ONE_OF_EACH else pytest.mark.further)
        for change in IN_TARGETS
    ],
    ids=lambda change: change.__name__,
)
def test_what_is_planted_in_a_file_of_targets_is_found(honest, tmp_path, change):
    folder, vectors, ids = honest
    predicted = store.read_embeddings(find_artifact(folder, "retrieve") / "fold00")
    n_train = len(ids) - len(predicted)
    assert list(ids[n_train:]) == list(predicted.ids)
    run, found = judge_targets(
        run_imported(tmp_path / "made", change(vectors, n_train, predicted.flat()), ids)
    )
    wanted = IN_TARGETS[change]
    if wanted is None:
        assert found == []
    else:
        (item,) = found
        assert (item.check, item.level, wanted[1] in item.message) == ("targets", wanted[0], True), item
    # What computed a file is not known, whatever was found.
    assert {item.how for item in run.verified} == {"by record"}


def test_responses_among_targets_are_found(honest, tmp_path):
    """A test image's target that holds the response to it is found by the response alone."""
    folder, vectors, ids = honest
    found = store.read_responses(find_artifact(folder, "preprocess") / "responses")
    rows = [list(found.stimulus_ids).index(name) for name in ids]
    planted = np.concatenate([vectors, 3 * found.data[rows, :4] + 1], axis=1)
    (item,) = judge_targets(run_imported(tmp_path / "made", planted, ids), thorough=False)[1]
    assert (item.check, item.level, "4 feature(s) are those of the responses" in item.message) == (
        "targets", "leak", True,
    ), item  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_each_side_that_is_centred_by_itself_is_transductive(monkeypatch, tmp_path, offset):
    def centre(responses, stimuli):
        train, test = np.split(responses.data, [N_TRAIN])
        data = np.concatenate([train - train.mean(axis=0) + offset, test - test.mean(axis=0)])
        return set_data(responses, data), stimuli

    make = synthetic_digits.make_synthetic_digits
    monkeypatch.setattr(
        synthetic_digits, "make_synthetic_digits", lambda config, seed: centre(*make(config, seed=seed))
    )
    audit = audit_run(run_until(tmp_path / "run", RANKED[:1], pipeline.preprocess))
    (item,) = [item for item in audit.findings if item.check == "scaling"]
    assert (item.level, "mean 0 holds over test trials alone" in item.message) == ("transductive", True)


def test_honest_files_of_targets_pass(honest):
    assert judge_targets(honest[0])[1] == []
    run, found = judge_targets(honest[0], thorough=False)
    assert found == []
    assert ("distance of imported targets from predictions", "add --refit") in {
        (item.what, item.reason) for item in run.verified
    }


# --- planted in the data before the run ---------------------------------------------------------------------


def set_data(responses, data, **changes):
    return replace(responses, data=np.asarray(data, dtype=np.float32), **changes)


def set_pixels(stimuli, change):
    pixels = stimuli.pixels.copy()
    pixels[N_TRAIN + 3] = change(pixels[7])
    table = stimuli.table.assign(sha256=[hash_pixels(image) for image in pixels])
    return StimulusSet(table, pixels=pixels)


def standardise_over_all_trials(responses, stimuli):
    data = responses.data.astype(float)
    return set_data(responses, (data - data.mean(axis=0)) / data.std(axis=0), unit="z"), stimuli


def whiten_over_all_trials(responses, stimuli):
    """Multivariate noise normalisation with the test in it."""
    data = responses.data.astype(float)
    values, vectors = np.linalg.eigh(np.cov(data.T))
    return set_data(responses, (data - data.mean(axis=0)) @ (vectors / np.sqrt(values)) @ vectors.T), stimuli


def take_components_of_all_trials(responses, stimuli):
    data = responses.data.astype(float)
    centred = data - data.mean(axis=0)
    return set_data(responses, centred @ np.linalg.svd(centred, full_matrices=False)[2].T), stimuli


def write_labels_into_a_voxel(responses, stimuli):
    data = np.array(responses.data)
    data[:, 5] = 0.3 * pd.factorize(responses.trials["concept"])[0] - 1
    return set_data(responses, data), stimuli


def leave_the_trigger_in(responses, stimuli):
    """A channel that counts the images, scaled as the others are."""
    data = np.array(responses.data)
    order = np.unique(responses.stimulus_ids.astype(str), return_inverse=True)[1]
    data[:, 2] = (order - order.mean()) / order.std()
    return set_data(responses, data), stimuli


def copy_a_trial_with_another_gain(responses, stimuli):
    data = np.array(responses.data)
    data[N_TRAIN + 2] = 1.7 * data[11] + 1e-5 * np.random.default_rng(0).normal(size=data.shape[1])
    return set_data(responses, data), stimuli


def average_repetitions_before_the_split(responses, stimuli):
    """Trials of neighbours in a session averaged in pairs, each pair then standing in both rows."""
    data = np.array(responses.data)
    rows = np.random.default_rng(0).permutation(len(data)).reshape(-1, 2)
    data[rows.ravel()] = np.repeat(data[rows].mean(axis=1), 2, axis=0)
    return set_data(responses, data), stimuli


def show_a_picture_a_grey_level_off(responses, stimuli):
    return responses, set_pixels(
        stimuli, lambda image: np.where(image < 255, image + 1, 254).astype(np.uint8)
    )


def show_a_picture_mirrored(responses, stimuli):
    return responses, set_pixels(stimuli, lambda image: image[:, ::-1])


def show_a_picture_compressed(responses, stimuli):
    def compress(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=80)
        return np.asarray(Image.open(file).convert("RGB"))

    return responses, set_pixels(stimuli, compress)


def bring_all_trials_to_one_range(responses, stimuli):
    data = responses.data.astype(float)
    return set_data(responses, (data - data.min(axis=0)) / np.ptp(data, axis=0)), stimuli


def divide_by_the_length_over_all_trials(responses, stimuli):
    return set_data(responses, responses.data / np.linalg.norm(responses.data, axis=0)), stimuli


def rank_over_all_trials(responses, stimuli):
    """Each voxel becomes the same numbers in another order, as a quantile transform gives."""
    ranks = responses.data.argsort(axis=0).argsort(axis=0) - N_TRIALS / 3
    return set_data(responses, np.sign(ranks) * np.sqrt(np.abs(ranks))), stimuli


def scale_robustly_over_all_trials(responses, stimuli):
    low, median, high = np.percentile(responses.data, [25, 50, 75], axis=0)
    return set_data(responses, (responses.data - median) / (high - low)), stimuli


IN_DATA = [
    Plant(standardise_over_all_trials, "standardising", is_alone=True),
    Plant(whiten_over_all_trials, "whitening", words="uncorrelated"),
    Plant(take_components_of_all_trials, "components"),
    Plant(bring_all_trials_to_one_range, "scaling", words="one minimum and maximum", is_alone=True),
    Plant(divide_by_the_length_over_all_trials, "scaling", words="length 1", is_alone=True),
    Plant(rank_over_all_trials, "scaling", words="over training and test trials", is_alone=True),
    Plant(scale_robustly_over_all_trials, "scaling", words="median 0", is_alone=True),
    Plant(write_labels_into_a_voxel, "codes"),
    Plant(leave_the_trigger_in, "codes"),
    Plant(copy_a_trial_with_another_gain, "copies"),
    Plant(average_repetitions_before_the_split, "copies"),
    Plant(show_a_picture_a_grey_level_off, "likeness"),
    Plant(show_a_picture_mirrored, "likeness"),
    Plant(show_a_picture_compressed, "likeness"),
]


@pytest.mark.parametrize("plant", mark(IN_DATA))
def test_what_is_planted_in_the_data_is_found(monkeypatch, tmp_path, plant):
    make = synthetic_digits.make_synthetic_digits
    monkeypatch.setattr(
        synthetic_digits, "make_synthetic_digits", lambda config, seed: plant.plant(*make(config, seed=seed))
    )
    folder = run_until(tmp_path / "run", ["encoder.alphas=[10]", "generator={kind: nearest}"], learning.train)
    plant.must_be_found(audit_run(folder).leaks)


def test_a_caption_bank_of_test_images_is_found(tmp_path):
    """Each test image has the very sentence of a training image, so that the nearest one shows what was seen."""

    def copy_captions(captions):
        ids = list(captions)
        captions.update({test: captions[train] for train, test in zip(ids, ids[N_TRAIN:], strict=False)})

    bank = caption_images(tmp_path, BASES["captions"], copy_captions)
    folder = run_until(tmp_path / "run", [*BASES["captions"], bank], pipeline.evaluate)
    assert "captions" in {item.check for item in audit_run(folder).leaks}


def test_weights_of_a_generator_that_was_trained_on_test_images_are_found(tmp_path):
    weights = train_weights(tmp_path, BASES["weights"], N_TRAIN + N_TEST)
    folder = run_until(tmp_path / "run", [*BASES["weights"], weights], pipeline.reconstruct)
    (leak,) = [item for item in audit_run(folder).leaks if item.check == "material"]
    # Weights bring their images rounded to a byte per component, so that one or two may be missed.
    n_found = int(leak.message.split("were trained on ")[1].split()[0])
    assert 0.8 * N_TEST <= n_found <= N_TEST


def test_there_are_forty_plants_and_more():
    """With those of test_results, where the step that computes again what was forged is asked alone."""
    names = [
        *(plant.name for plant in (*IN_RUNS, *IN_DATA)),
        *(forge.__name__ for forge, _ in forgeries.FORGED),
    ]
    assert len(set(names)) == len(names) >= 40
