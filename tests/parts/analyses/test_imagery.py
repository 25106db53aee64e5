from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.parts.analyses.imagery import ImageryConfig, centre_texts, find_targets, list_trials
from braindecode_vis.parts.analyses.study import Study
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.report.figures import render_plot
from tests.constants import replace_constants
from tests.parts.analyses.planted import make_parcel_study


def make_imagery_study(strength=0.5, **options) -> Study:
    """Return seen training trials, and test images seen in full and imagined at `strength`, in two sets."""
    study = make_parcel_study(
        {"Vis": 1.0}, n_parcels=12, n_test=12, n_repetitions=8, averaged=False, **options
    )
    trials = study.responses.trials.copy()
    test = (trials["split"] == "test").to_numpy()
    imagined = test & (trials["repetition"] >= 2).to_numpy()
    trials["task"] = np.where(imagined, "imagery", "vision")
    number = trials["stimulus_id"].str[-3:].astype(int)
    trials["stimulus_set"] = np.where(number < 6, "simple", "complex")
    clean = make_parcel_study(
        {"Vis": 1.0}, n_parcels=12, n_test=12, n_repetitions=8, averaged=False, **{**options, "noise": 0.0}
    )
    data = study.responses.data - (1 - strength) * clean.responses.data * imagined[:, None]
    responses = Responses(data.astype(np.float32), study.responses.dims, trials, "z", study.responses.coords)
    return replace(study, responses=responses, pick=lambda rows, part: responses.select(rows))


def test_imagined_images_are_identified_with_an_encoder_of_seen_ones():
    found = ImageryConfig(metrics=("two_way", "top1")).compute(make_imagery_study(noise=1.0))
    table = found.table.set_index(["task", "stimulus_set", "metric"])
    assert table.loc[("imagery", "all", "two_way"), "value"] > 0.8
    assert table.loc[("imagery", "all", "two_way"), "p_value"] < 0.001
    assert table.loc[("imagery", "simple", "two_way"), "n_stimuli"] == 6
    assert (
        table.loc[("vision", "all", "two_way"), "value"]
        >= table.loc[("imagery", "all", "two_way"), "value"] - 0.1
    )
    assert (table["n_shuffles"] >= 10_000).all()
    assert found.scores[0].p_value is not None
    assert render_plot(found.plots[0].draw)


def test_a_level_that_imagined_responses_share_is_taken_off():
    """Weaker responses of all imagined stimuli shift all predictions alike, which their own mean takes off."""
    study = make_imagery_study(noise=1.0)
    shifted = study.responses.data.copy()
    shifted[(study.responses.trials["task"] == "imagery").to_numpy()] += 3 * study.responses.data.std()
    responses = replace(study.responses, data=shifted)
    moved = replace(study, responses=responses, pick=lambda rows, part: responses.select(rows))
    ways = {}
    for own in (False, True):
        config = replace_constants(ImageryConfig, beside=())(metrics=("two_way",), own_mean=own)
        for name, one in (("still", study), ("moved", moved)):
            found = config.compute(one)
            ways[own, name] = found.table.set_index("stimulus_set").loc["all", "value"]
        (score, *_) = found.scores
        assert ("transductive" in score.protocol) == ("own mean" in found.summary) == own
        assert score.metric.endswith("_own_mean") == own
    assert ways[True, "moved"] == pytest.approx(ways[True, "still"], abs=0.02)
    assert ways[True, "moved"] > ways[False, "moved"] + 0.1
    assert "own_mean" not in ImageryConfig().hashed_fields()
    with pytest.raises(ValueError, match="candidates are captions, which are compared as sentences"):
        ImageryConfig(candidates="captions", bank="b.csv", sentence_encoder="minilm", own_mean=True)


def test_nothing_is_imagined_without_signal():
    """Ten studies of noise at 5 %: four significant or more come once in a thousand."""
    config, p_values = (
        replace_constants(ImageryConfig, beside=(), set_column="none")(metrics=("two_way",)),
        [],
    )
    for seed in range(10):
        table = config.compute(make_imagery_study(0.0, noise=1.0, seed=seed, n_bootstrap=100)).table
        p_values.append(table.loc[table["stimulus_set"] == "all", "p_value"].item())
    assert binom.sf(3, 10, 0.05) < 0.0011
    assert sum(p <= 0.05 for p in p_values) <= 3
    assert max(p_values) > 0.2


def test_an_encoder_that_learnt_from_imagery_is_refused():
    study = make_imagery_study()
    fold = study.folds[0]
    leaky = replace(study, folds=[Fold(np.append(fold.train, fold.test[-1]), fold.test[:-1])])
    with pytest.raises(DataError, match="trains on trials of the task"):
        list_trials(leaky, "imagery", strict=True)
    seen = np.flatnonzero(
        (study.responses.trials["task"] == "vision") & (study.responses.trials["split"] == "test")
    )
    shared = replace(study, folds=[Fold(np.append(fold.train, seen), np.setdiff1d(fold.test, seen))])
    with pytest.raises(DataError, match="stimuli that the task"):
        list_trials(shared, "imagery", strict=True)


def test_trials_that_no_fold_tests_are_taken_with_the_first_encoder():
    study = make_imagery_study()
    imagined = np.flatnonzero(study.responses.trials["task"] == "imagery")
    fold = study.folds[0]
    apart = replace(study, folds=[Fold(fold.train, np.setdiff1d(fold.test, imagined))])
    np.testing.assert_array_equal(list_trials(apart, "imagery", strict=True)[0], imagined)


def test_what_has_no_picture_is_the_mean_of_its_concept():
    study = make_imagery_study()
    bank = study.banks[0]
    table = study.stimuli.table.assign(
        path="x.png", concept=[f"c{n // 4}" for n in range(len(study.stimuli))]
    )
    word = pd.DataFrame({"stimulus_id": ["word"], "concept": ["c2"], "path": [""], "sha256": ["w"]})
    stimuli = StimulusSet(pd.concat([table, word], ignore_index=True))
    found = find_targets(replace(study, stimuli=stimuli), bank, ["word", "train000"])
    np.testing.assert_allclose(found.vectors[0], bank.vectors[8:12].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.vectors[1], bank.vectors[0])
    lost = StimulusSet(pd.concat([table, word.assign(concept="none")], ignore_index=True))
    with pytest.raises(DataError, match="has no picture"):
        find_targets(replace(study, stimuli=lost), bank, ["word"])


def test_the_task_must_be_there():
    with pytest.raises(DataError, match="no column task"):
        ImageryConfig().compute(make_parcel_study({"Vis": 1.0}))
    with pytest.raises(DataError, match="there are imagery, vision"):
        ImageryConfig(task="dreaming").compute(make_imagery_study())


def write_bank(study, folder, training=True):
    """Every stimulus is called by its id; returns the bank and, of the texts, what stimulus each is."""
    names = [str(i) for i in study.stimuli.ids if training or "train" not in str(i)]
    path = folder / "bank.csv"
    path.write_text("\n".join(["id,caption", *(f"{name},shown was {name}" for name in names)]))
    return path


def test_imagined_stimuli_are_identified_among_texts(tmp_path):
    """Texts lie in the space of the images, all of them far off in one direction.

    The mean of training texts takes it away; it used to be that of the candidates, which is known once all of them are.
    """
    study = make_imagery_study(noise=1.0)
    bank, gap = study.banks[0], 30 * np.ones(study.banks[0].vectors.shape[1])

    def embed_texts(texts):
        return bank.select([text.removeprefix("shown was ") for text in texts]).vectors + gap

    config = ImageryConfig(candidates="text", bank=write_bank(study, tmp_path), metrics=("two_way",))
    study = replace(study, embed_texts=embed_texts, centre="mean")
    found = config.compute(study)
    row = found.table.set_index(["task", "stimulus_set"]).loc[("imagery", "all")]
    assert row["value"] > 0.7
    assert row["p_value"] < 0.001
    assert row["n_shuffles"] == 10_000
    assert {score.metric for score in found.scores} >= {"two_way@imagery_all_text"}
    assert (
        "candidates are texts in the space of the images, after the mean of training texts" in found.summary
    )
    trained = sorted(pd.unique(study.responses.stimulus_ids[study.folds[0].train]))
    mean = centre_texts(study, {name: [f"shown was {name}"] for name in trained}, 0).mean
    vectors = bank.select(trained).vectors + gap
    np.testing.assert_allclose(
        mean, (vectors / np.linalg.norm(vectors, axis=1)[:, None]).mean(axis=0), atol=1e-6
    )
    with pytest.raises(DataError, match="the target has no text encoder"):
        config.compute(replace(study, embed_texts=None))
    same = study.stimuli.table.assign(concept=study.stimuli.table["stimulus_id"])
    unnamed = replace(study, stimuli=StimulusSet(same, pixels=study.stimuli.pixels))
    wordless = config.model_copy(update={"bank": write_bank(study, tmp_path, False)}).compute(unnamed)
    assert "after their own mean, since no training image has words" in wordless.summary
    with pytest.raises(DataError, match=r"has no words: .* give captions of the stimuli with imagery\.bank"):
        ImageryConfig(candidates="text").compute(unnamed)


def test_words_of_training_captions_stand_in_for_a_text_side(tmp_path):
    """Captions say of each feature whether it is high or low; what the words mean is learnt from training images."""
    study = make_imagery_study(noise=1.0)
    bank = study.banks[0]
    said = [
        " ".join(
            f"{chr(97 + n // 26)}{chr(97 + n % 26)}{'up' if v > 0 else 'down'}" for n, v in enumerate(row)
        )
        for row in bank.vectors
    ]
    table = pd.DataFrame({"id": bank.ids, "caption": said})
    table.to_csv(tmp_path / "bank.csv", index=False)
    config = ImageryConfig(candidates="words", bank=tmp_path / "bank.csv", metrics=("two_way",))
    found = config.compute(study)
    row = found.table.set_index(["task", "stimulus_set"]).loc[("imagery", "all")]
    assert row["value"] > 0.7
    assert row["p_value"] < 0.001
    assert "by a ridge regression from the words of training captions" in found.summary
    assert {score.metric for score in found.scores} >= {"two_way@imagery_all_words"}
    # Words that no training caption has say nothing: all stimuli tie.
    tested = set(study.responses.stimulus_ids[study.folds[0].test])
    strange = table.assign(caption=np.where(table["id"].isin(tested), "zzz", table["caption"]))
    strange.to_csv(tmp_path / "bank.csv", index=False)
    assert set(config.compute(study).table["value"].round(6)) == {0.5}
    table[table["id"].isin(tested)].to_csv(tmp_path / "bank.csv", index=False)
    with pytest.raises(DataError, match="captions of 0 training image"):
        config.compute(study)
    with pytest.raises(ValueError, match="candidates are words, which need a bank"):
        ImageryConfig(candidates="words")


def test_imagined_stimuli_are_identified_by_decoded_captions(tmp_path, monkeypatch):
    """The nearest training image is described; its sentence is nearer to that of a stimulus that looks like it."""
    study = make_imagery_study(noise=0.5, strength=0.8)
    vectors = study.banks[0]

    class Sentences:
        def __init__(self, folder):
            assert folder == tmp_path

        def encode(self, texts):
            rows = vectors.select([text.removeprefix("shown was ") for text in texts]).vectors
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    monkeypatch.setattr("braindecode_vis.parts.analyses.imagery.SentenceEncoder", Sentences)
    config = ImageryConfig(
        candidates="captions",
        bank=write_bank(study, tmp_path),
        sentence_encoder=tmp_path,
        metrics=("two_way",),
    )
    with pytest.raises(ConfigError, match=r"imagery\.sentence_encoder names .* has no config\.json"):
        config.compute(study)
    (tmp_path / "config.json").write_text("{}")
    table = config.compute(study).table.set_index(["task", "stimulus_set"])
    assert table.loc[("imagery", "all"), "value"] > 0.6
    assert table.loc[("imagery", "all"), "p_value"] < 0.05
    assert {"bank_sha256", "sentence_encoder"} <= config.hashed_fields().keys()
    with pytest.raises(ValueError, match="which need a bank"):
        ImageryConfig(candidates="captions")
    with pytest.raises(ValueError, match="which need no captions"):
        ImageryConfig(bank=tmp_path / "bank.csv")
    assert "candidates" not in ImageryConfig().hashed_fields()


def test_imagined_stimuli_are_drawn():
    study = make_imagery_study(noise=1.0)

    def reconstruct(number, rows):
        names = pd.unique(study.responses.stimulus_ids[rows])
        return np.zeros((len(names), 8, 8, 3), np.uint8), names

    config = ImageryConfig(images=3, metrics=("two_way",))
    found = config.compute(replace(study, reconstruct=reconstruct))
    assert found.plots[1].name == "imagined_images"
    assert render_plot(found.plots[1].draw, size=found.plots[1].size)
    with pytest.raises(DataError, match="needs a run that makes images"):
        config.compute(study)


@pytest.mark.parametrize("candidates", ["pictures", "text", "words", "captions"])
def test_the_text_side_of_the_target_is_asked_for_where_candidates_are_texts(candidates, tmp_path):
    """What else compares words learns them from captions, or reads them with a sentence encoder."""
    bank = {} if candidates in ("pictures", "text") else {"bank": tmp_path / "bank.csv"}
    reader = {"sentence_encoder": "minilm"} if candidates == "captions" else {}
    config = ImageryConfig(candidates=candidates, **bank, **reader)
    assert config.reads_text == (candidates == "text")
    assert not config.makes_images
    assert ImageryConfig(images=1).makes_images
