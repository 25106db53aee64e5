"""The fitted network encoder: what it learns, in which spaces it predicts, what it refuses."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.config.models import RetrievalConfig
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.training.loop import compute_top_k
from braindecode_vis.training.network_config import NetworkEncoderConfig
from braindecode_vis.training.network_encoder import identify_training
from tests.training.toy_task import N_TARGETS, assert_same_weights, get_weights, make_config, make_task


def test_settings_import_without_torch():
    code = "import sys, braindecode_vis.training.network_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_finds_held_out_images_above_chance_and_logs_every_epoch(tmp_path):
    responses, targets = make_task(n_images=60)
    encoder = make_config(epochs=12, selection={"kind": "last", "hold_out": 0.2}).build(seed=0)
    encoder.workspace, texts = tmp_path, []
    encoder.progress = lambda done, total, text: texts.append((done, total, text))
    encoder.fit(responses, targets)
    assert isinstance(encoder, BrainEncoder)
    assert encoder.fitted.held_out_by == "concept"
    record = encoder.fitted.history[-1]
    assert record["n_validation_images"] == 12
    assert record["validation_top1"] > 0.5  # chance is 1/12
    assert record["loss"] < encoder.fitted.history[0]["loss"]
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(12))
    assert {"loss", "objectives", "lr", "trials_per_second", "seconds", "validation_loss"} <= lines[0].keys()
    assert texts[-1][0] == texts[-1][1]
    assert "epoch 12/12" in texts[-1][2]


def test_held_out_concepts_teach_nothing():
    """Poisoned held-out trials and targets change no weight and no statistic."""
    responses, targets = make_task(n_images=40)
    config = make_config(selection={"kind": "last", "hold_out": 0.2})
    clean = config.build(seed=3).fit(responses, targets)
    held = np.isin(responses.stimulus_ids.astype(str), clean.fitted.held_out)
    assert 0 < held.sum() < len(held)
    data, vectors = responses.data.copy(), targets.vectors.copy()
    data[held], vectors[held] = 1e6, -1e6
    from dataclasses import replace

    poisoned = config.build(seed=3).fit(
        replace(responses, data=data), Embeddings(vectors, targets.ids, targets.space)
    )
    assert_same_weights(clean, poisoned)
    np.testing.assert_array_equal(clean.fitted.transform.scale.spread, poisoned.fitted.transform.scale.spread)
    concepts = responses.trials["concept"].to_numpy()
    assert not set(concepts[held]) & set(concepts[~held])


def test_out_of_fold_predictions_are_never_in_sample():
    responses, targets = make_task(n_images=40)
    held = make_config(selection={"kind": "last", "hold_out": 0.2}).build(seed=0).fit(responses, targets)
    some = held.predict_out_of_fold(responses, targets)
    assert set(some.ids) == set(held.fitted.held_out)
    none = make_config().build(seed=0).fit(responses, targets).predict_out_of_fold(responses, targets)
    assert len(none) == 0
    assert none.vectors.shape[1:] == (N_TARGETS,)


def test_out_of_fold_refits_cover_every_trial_and_do_not_know_their_own_targets():
    responses, targets = make_task(n_images=18, n_repetitions=1)
    config = make_config(out_of_fold=3, epochs=2)
    predicted = config.build(seed=0).fit(responses, targets).predict_out_of_fold(responses, targets)
    assert (predicted.ids == responses.stimulus_ids).all()
    concepts = responses.trials["concept"].to_numpy()
    vectors = targets.vectors.copy()
    vectors[concepts == concepts[0]] += 5.0
    other = Embeddings(vectors, targets.ids, targets.space)
    again = config.build(seed=0).fit(responses, other).predict_out_of_fold(responses, other)
    own = concepts == concepts[0]
    np.testing.assert_array_equal(predicted.vectors[own], again.vectors[own])
    assert (predicted.vectors[~own] != again.vectors[~own]).any()


def test_same_seed_same_weights_and_the_global_state_stays():
    import torch

    responses, targets = make_task()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make_config().build(seed=1).fit(responses, targets)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert_same_weights(first, make_config().build(seed=1).fit(responses, targets))
    other = make_config().build(seed=2).fit(responses, targets)
    assert any(
        (a != b).any() for a, b in zip(get_weights(first).values(), get_weights(other).values(), strict=True)
    )


@pytest.mark.parametrize("kind", ["centre", "zscore"])
def test_statistics_of_texts_do_not_replace_those_of_images(kind, tmp_path):
    """Both started from one tensor when an encoder was read, so the texts' mean stood for the images' too."""
    responses, targets = make_task()
    config = make_config(objectives=[{"kind": "clip"}, {"kind": "clip_image_text"}], normalise_targets=kind)
    encoder = config.build(seed=0)
    texts = 5 + np.random.default_rng(0).standard_normal(targets.vectors.shape).astype(np.float32)
    names, first = np.unique(targets.ids.astype(str), return_index=True)
    encoder.text_targets = Embeddings(texts[first], list(names), "text")
    encoder.fit(responses, targets).write(tmp_path)
    again = config.read(tmp_path)
    np.testing.assert_array_equal(again.predict(responses).vectors, encoder.predict(responses).vectors)


def test_what_is_written_predicts_the_same(tmp_path):
    responses, targets = make_task(subjects=("01", "02"))
    config = make_config(
        subject_alignment="euclidean", normalise_targets="zscore", projector={"size": 3},
        objectives=[{"kind": "clip"}, {"kind": "mse"}],
    )  # fmt: skip
    encoder = config.build(seed=0).fit(responses, targets)
    encoder.write(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".safetensors", ".json")]
    read = config.read(tmp_path)
    for method in ("predict", "predict_for_generator"):
        one, two = getattr(encoder, method)(responses), getattr(read, method)(responses)
        assert one.space == two.space
        np.testing.assert_array_equal(one.vectors, two.vectors)
    with pytest.raises(DataError, match=r"another architecture \(width: 12, now 8\)"):
        make_config(**{**config.model_dump(), "network": {"kind": "eegproject", "width": 8}}).read(tmp_path)
    with pytest.raises(DataError, match=r"other settings.*epochs: 3, now 4"):
        config.model_copy(update={"epochs": 4}).read(tmp_path)


def test_a_learned_space_has_a_name_of_its_own_and_meets_mapped_targets():
    responses, targets = make_task(n_images=40)
    config = make_config(projector={"size": 5}, objectives=[{"kind": "clip"}, {"kind": "mse"}], epochs=15)
    encoder = config.build(seed=0).fit(responses, targets)
    predicted, mapped = encoder.predict(responses), encoder.map_targets(targets)
    assert predicted.space == mapped.space != targets.space
    assert predicted.vectors.shape == mapped.vectors.shape == (80, 5)
    assert encoder.predict_for_generator(responses).space == "toy"
    assert encoder.predict_for_generator(responses).vectors.shape == (80, N_TARGETS)
    cosine = _normalise(predicted.vectors) @ _normalise(mapped.vectors).T
    same = targets.ids[:, None] == targets.ids
    assert cosine[same].mean() > cosine[~same].mean() + 0.4
    other = config.build(seed=1).fit(responses, targets)
    assert other.comparison_space != encoder.comparison_space
    with pytest.raises(DataError, match="cannot map 'elsewhere'"):
        encoder.map_targets(Embeddings(targets.vectors, targets.ids, "elsewhere"))
    alone = make_config(projector={"size": 5}).build(seed=0).fit(responses, targets)
    with pytest.raises(DataError, match="no regression head"):
        alone.predict_for_generator(responses)


def test_a_projector_may_have_hidden_units():
    responses, targets = make_task(n_images=40)
    encoder = (
        make_config(projector={"size": 5, "hidden": 16}, epochs=15).build(seed=0).fit(responses, targets)
    )
    for part in (encoder.fitted.model.brain_projector, encoder.fitted.model.image_projector):
        assert [tuple(w.shape) for w in part.parameters()] == [(16, N_TARGETS), (16,), (5, 16), (5,)]
    predicted, mapped = encoder.predict(responses), encoder.map_targets(targets)
    cosine = _normalise(predicted.vectors) @ _normalise(mapped.vectors).T
    same = targets.ids[:, None] == targets.ids
    assert cosine[same].mean() > cosine[~same].mean() + 0.4
    # A linear one is known by its old fingerprint.
    assert "hidden" not in make_config(projector={"size": 5}).hashed_fields()["projector"]


def test_regression_learns_the_untouched_target():
    responses, targets = make_task(n_images=60, noise=0.2)
    shifted = Embeddings(targets.vectors * 3 + 10, targets.ids, targets.space)
    config = make_config(
        objectives=[{"kind": "mse"}], normalise_targets="zscore", epochs=40, regression_head="linear",
        optimiser={"lr": 2e-2},
    )  # fmt: skip
    encoder = config.build(seed=0).fit(responses, shifted)
    error = ((encoder.predict_for_generator(responses).vectors - shifted.vectors) ** 2).mean()
    assert error < 0.3 * shifted.vectors.var()


def test_scaled_targets_are_predicted_in_the_target_space():
    responses, targets = make_task(n_images=40)
    shifted = Embeddings(targets.vectors + 100, targets.ids, targets.space)
    config = make_config(normalise_targets="centre")
    predicted = config.build(seed=0).fit(responses, shifted).predict(responses)
    assert abs(predicted.vectors.mean() - 100) < 2


def test_by_default_a_network_learns_the_comparison_that_retrieval_makes():
    """With plain targets the default retrieval took off a mean that training had kept."""
    assert (make_config().normalise_targets, RetrievalConfig().centre) == ("centre", "mean")
    responses, targets = make_task(n_images=60, noise=2.0, per_concept=1)
    shifted = Embeddings(targets.vectors + 5, targets.ids, targets.space)
    learnt, asked = responses.select(np.arange(80)), responses.select(np.arange(80, 120))
    train = Embeddings(shifted.vectors[:80], shifted.ids[:80], shifted.space)
    gallery = shifted.vectors[80::2]
    centre, hits = shifted.vectors[:80:2].mean(axis=0), {}
    for kind in ("centre", "none"):
        encoder = make_config(epochs=30, normalise_targets=kind).build(seed=0).fit(learnt, train)
        found = encoder.predict(asked).vectors - centre
        hits[kind] = compute_top_k(found, gallery - centre, np.arange(40) // 2, 1)
    assert hits["centre"] > 0.5 > hits["none"] + 0.1


def test_early_stopping_keeps_the_best_epoch():
    responses, targets = make_task(n_images=60, noise=6.0)
    config = make_config(epochs=40, selection={"kind": "early_stopping", "patience": 2, "hold_out": 0.2})
    encoder = config.build(seed=0).fit(responses, targets)
    scores = [r["validation_top1"] for r in encoder.fitted.history]
    best = int(np.argmax(scores))
    assert len(scores) == best + 3 < 40
    held = encoder.predict_out_of_fold(responses, targets)
    gallery = sorted(encoder.fitted.held_out)
    vectors = np.stack([targets.vectors[list(targets.ids).index(i)] for i in gallery])
    truth = np.array([gallery.index(i) for i in held.ids])
    assert compute_top_k(held.vectors, vectors, truth, 1) == scores[best]


def test_training_stops_when_its_loss_falls_no_more_and_keeps_the_last_weights():
    """UBP: if loss < best - 0.001: best = loss, wait = 0; else wait += 1, and stop at wait = 5; the last weights."""
    responses, targets = make_task(n_images=12)
    rule = {"kind": "training_loss", "patience": 3, "min_delta": 0.05, "hold_out": 0}
    encoder = make_config(epochs=200, selection=rule).build(seed=0).fit(responses, targets)
    losses = [record["loss"] for record in encoder.fitted.history]
    best, wait, stopped = np.inf, 0, 0
    for epoch, loss in enumerate(losses):
        best, wait = (loss, 0) if loss < best - 0.05 else (best, wait + 1)
        if wait == 3:
            stopped = epoch
            break
    assert len(losses) == stopped + 1 < 200
    fixed = make_config(epochs=200, selection={"kind": "last", "hold_out": 0})
    fixed = fixed.model_copy(update={"epochs": len(losses)}).build(seed=0).fit(responses, targets)
    assert_same_weights(encoder, fixed)  # the constant rate does not depend on the number of epochs


def test_an_average_of_weights_predicts():
    responses, targets = make_task()
    plain = make_config().build(seed=0).fit(responses, targets)
    averaged = make_config(ema=0.9).build(seed=0).fit(responses, targets)
    moved = [abs(get_weights(plain)[k] - get_weights(averaged)[k]).max() for k in get_weights(plain)]
    assert 0 < max(moved) < 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"augmentations": [{"kind": "trial_mixing"}]}, "need each other"),
        ({"objectives": [{"kind": "bimixco"}]}, "need each other"),
        ({"projector": {}, "out_of_fold": 3}, "cannot be compared"),
        ({"objectives": []}, "at least 1"),
        ({"batch_size": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_do_not_fit_together(settings, message):
    with pytest.raises(ValidationError, match=message):
        make_config(**settings)


def test_bad_input_is_named():
    responses, targets = make_task(n_images=8)
    with pytest.raises(DataError, match="in the order of the trials"):
        make_config().build(seed=0).fit(responses, _reverse(targets))
    one = responses.select(np.flatnonzero(responses.stimulus_ids == "image000"))
    with pytest.raises(DataError, match="2 trial\\(s\\) of 1 image\\(s\\)"):
        make_config().build(seed=0).fit(one, Embeddings(targets.vectors[:2], one.stimulus_ids, "toy"))
    with pytest.raises(DataError, match="not been fitted"):
        make_config().build(seed=0).predict(responses)
    with pytest.raises(ConfigError, match="fp16, which a CPU cannot use for training"):
        make_config(precision="fp16").build(seed=0).fit(responses, targets)
    with pytest.raises(ConfigError, match="needs text embeddings"):
        make_config(objectives=[{"kind": "clip_image_text"}]).build(seed=0).fit(responses, targets)


def test_a_checkpoint_of_an_earlier_version_is_still_known():
    """The digest of the trials is taken without pandas now (0.8 s for 16 540 of them), and is what pandas gave."""
    responses, targets = make_task()
    train = np.arange(3, 20)
    found = identify_training(make_config(), 0, responses, targets, train, describe_signal(responses))
    columns = responses.trials.iloc[train][["subject", "stimulus_id", "repetition"]].astype(str)
    digest = hashlib.sha256("\n".join(columns.agg("/".join, axis=1)).encode())
    for array in (responses.data, targets.vectors):
        digest.update(array[train[[0, -1]]].astype(np.float32).tobytes())
    assert found["data"] == digest.hexdigest()[:16]


def test_only_what_changes_the_result_enters_the_fingerprint():
    hidden = {"device", "log", "max_device_bytes", "checkpoint_seconds"}
    later = (
        NetworkEncoderConfig.hashed_if_set
    )  # added after results were written, and hashed where they are used
    removed = set(NetworkEncoderConfig.list_removed())
    names = set(NetworkEncoderConfig.model_fields) | removed
    assert set(NetworkEncoderConfig().hashed_fields()) == names - hidden - later


def _reverse(targets):
    return Embeddings(targets.vectors[::-1].copy(), targets.ids[::-1].copy(), targets.space)


def _normalise(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)
