"""Common spaces of subjects: what was planted is found again, and only training images that two have seen are used."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.preprocessing import common_space
from braindecode_vis.preprocessing.alignment import InputScalingConfig, InputTransform
from braindecode_vis.preprocessing.common_space import (
    COMMON_SPACES,
    FunctionalPcaConfig,
    HyperalignmentConfig,
    ProcrustesConfig,
    SharedResponseConfig,
)
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.preprocessing.splits import LeaveOneSubjectOutConfig
from tests.references import align_by_hand, share_by_hand
from tests.training.toy_task import make_config

WIDTHS = {"a": 30, "b": 24, "c": 27}


def make_world(
    *,
    n_train=60,
    n_test=20,
    few=None,
    noise=0.0,
    n_latent=8,
    n_times=0,
    rotated=False,
    seed=0,
    snr=1.0,
    n_unseen=0,
):
    """Return responses of three subjects to the same latent vectors through voxels of their own, and the vectors.

    Subject c has only the first `few` training trials, if a number is given. Vectors have `n_unseen` further values
    that no brain follows.
    """
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n_train + n_test, n_latent))
    widest, rows, data = max(WIDTHS.values()), [], []
    for subject, width in WIDTHS.items():
        mixing = rng.standard_normal((n_latent, width))
        if rotated:  # the same geometry in every brain
            mixing = 10 * np.linalg.qr(mixing.T)[0].T
        course = np.ones(1) if not n_times else np.hanning(n_times + 2)[1:-1]
        for image, vector in enumerate(latent):
            if few is not None and subject == "c" and few <= image < n_train:
                continue
            for repetition in range(1 if image < n_train else 3):
                clean = snr * (vector @ mixing)[:, None] * course
                trial = np.zeros((widest, len(course)))
                trial[:width] = clean + noise * rng.standard_normal(clean.shape) + 100
                data.append(trial if n_times else trial[:, 0])
                split = "train" if image < n_train else "test"
                rows.append((subject, "01", "01", f"i{image:03d}", repetition, split, f"concept{image // 2}"))
    columns = ("subject", "session", "run", "stimulus_id", "repetition", "split", "concept")
    trials = pd.DataFrame(rows, columns=list(columns))
    dims = ("trial", "voxel", "time") if n_times else ("trial", "voxel")
    coords = {"subjects": list(WIDTHS), "n_voxels_of": dict(WIDTHS)}
    responses = Responses(np.array(data, np.float32), dims, trials, "z", coords)
    ids = np.array([f"i{n:03d}" for n in range(len(latent))], dtype=object)
    latent = np.concatenate([latent, rng.standard_normal((len(latent), n_unseen))], axis=1)
    return responses, Embeddings(latent.astype(np.float32), ids, "planted")


def pick(responses, split, *subjects):
    trials = responses.trials
    own = trials["subject"].isin(subjects or list(WIDTHS)) & (trials["split"] == split)
    return average_repetitions(responses, np.flatnonzero(own))


def fit_space(config, responses):
    transform = InputTransform(InputScalingConfig(kind="none"), config, responses.dims[1:])
    names = responses.trials["subject"].to_numpy(dtype=object)
    rows = np.flatnonzero(responses.trials["split"] == "train")
    counts = responses.coords.get("n_voxels_of")
    transform.fit(responses.data, rows, names, stimuli=responses.stimulus_ids, n_own=counts)
    return transform


def find_images(encoder, responses, targets):
    """Return how often the nearest of the distinct images is the true one."""
    predicted = encoder.predict(responses).flat()
    names = list(dict.fromkeys(responses.stimulus_ids))
    gallery = targets.select(names).vectors
    cosines = predicted @ gallery.T / np.linalg.norm(gallery, axis=1)
    return np.mean(
        [names[best] == true for best, true in zip(cosines.argmax(1), responses.stimulus_ids, strict=True)]
    )


@pytest.mark.parametrize("kind", COMMON_SPACES)
@pytest.mark.parametrize("n_times", [0, 3])
def test_brains_of_one_geometry_respond_alike_in_the_common_space(kind, n_times):
    responses, _ = make_world(rotated=True, n_times=n_times)
    transform = fit_space(_settings(kind, 8), responses)
    test = {name: transform.apply(pick(responses, "test", name)).data for name in WIDTHS}
    assert test["a"].shape == (20, 8, *([n_times] if n_times else []))
    for name in ("b", "c"):
        found = np.corrcoef(test["a"].ravel(), test[name].ravel())[0, 1]
        assert found > 0.97, (kind, name)  # standardising each voxel changes the geometry a little


def _settings(kind, n_components, **more):
    classes = (ProcrustesConfig, HyperalignmentConfig, SharedResponseConfig, FunctionalPcaConfig)
    return next(c for c in classes if c.model_fields["kind"].default == kind)(
        n_components=n_components, **more
    )


def test_hyperalignment_and_shared_response_agree_with_slow_references():
    responses, _ = make_world(noise=2.0)
    train = pick(responses, "train")
    brains = {}
    for name, width in WIDTHS.items():
        own = train.data[(train.trials["subject"] == name).to_numpy(), :width].astype(np.float64)
        brains[name] = (own - own.mean(0)) / own.std(0)
    for reference, config in (
        (align_by_hand, HyperalignmentConfig(n_components=6)),
        (share_by_hand, SharedResponseConfig(n_components=6)),
    ):
        expected = reference(brains, 6, 10)
        found = fit_space(config, train).space.template[:, 0]
        # A common space has no axes of its own: what images have in common is compared.
        np.testing.assert_allclose(
            found @ found.T, expected @ expected.T, atol=2e-3 * (expected**2).sum(1).max()
        )


@pytest.mark.parametrize("kind", COMMON_SPACES)
def test_a_few_trials_align_a_new_subject_and_do_not_move_the_others(kind):
    responses, targets = make_world(few=12, noise=2.5, rotated=True, n_unseen=16)
    config = RidgeConfig(subject_alignment={"kind": kind, "n_components": 8}, alphas=(10.0,))
    train = pick(responses, "train")
    encoder = config.build(seed=0).fit(train, targets.select(list(train.stimulus_ids)))
    test = pick(responses, "test", "c")
    alone = pick(responses, "train", "c")
    scratch = RidgeConfig(n_inner_folds=3).build(seed=0).fit(alone, targets.select(list(alone.stimulus_ids)))
    assert find_images(encoder, test, targets) > find_images(scratch, test, targets)
    assert find_images(encoder, test, targets) > 0.3  # chance is 0.05
    # Somebody who comes later is mapped to the same space as somebody who was there.
    others = pick(responses, "train", "a", "b")
    earlier = config.build(seed=0).fit(others, targets.select(list(others.stimulus_ids)))
    maps = earlier.align_subjects(alone).fitted.transform.space.maps
    for name in ("a", "b"):
        np.testing.assert_allclose(
            maps[name].matrix, encoder.fitted.transform.space.maps[name].matrix, atol=1e-5
        )
    assert find_images(earlier.align_subjects(alone), test, targets) > 0.3
    moved = earlier.adapt(alone, targets.select(list(alone.stimulus_ids)))
    assert find_images(moved, test, targets) > 0.3
    with pytest.raises(DataError, match=r"no map .*own_trials"):
        earlier.predict(test)


def test_without_signal_a_new_subject_is_at_chance():
    responses, targets = make_world(few=20, noise=1.0, snr=0.0, n_test=40)
    train, test = pick(responses, "train"), pick(responses, "test", "c")
    for kind in COMMON_SPACES:
        encoder = (
            RidgeConfig(subject_alignment=kind)
            .build(seed=0)
            .fit(train, targets.select(list(train.stimulus_ids)))
        )
        assert find_images(encoder, test, targets) < 0.15  # of 40: more than 5 hits has p < 0.001


@pytest.mark.parametrize("kind", COMMON_SPACES)
def test_test_trials_and_padding_are_not_read(kind):
    responses, _ = make_world(noise=1.0)
    poisoned = np.array(responses.data)
    poisoned[(responses.trials["split"] == "test").to_numpy()] = 1e9
    for name, width in WIDTHS.items():
        poisoned[(responses.trials["subject"] == name).to_numpy(), width:] = 7e8
    config = _settings(kind, 5)
    first = fit_space(config, responses).as_tensors()
    second = fit_space(config, replace(responses, data=poisoned)).as_tensors()
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_images_that_one_subject_alone_has_seen_are_left_out_and_many_are_thinned(monkeypatch):
    responses, _ = make_world()
    trials = responses.trials
    alone = (trials["subject"] == "a") & (trials["stimulus_id"] >= "i040") & (trials["split"] == "train")
    ids = trials["stimulus_id"].where(~alone, "only-" + trials["stimulus_id"])
    responses = responses.with_trials(trials.assign(stimulus_id=ids))
    assert not any(i.startswith("only") for i in fit_space(HyperalignmentConfig(), responses).space.ids)
    monkeypatch.setattr(common_space, "FIT_BYTES", 4 * sum(WIDTHS.values()) * 30)
    assert 15 <= len(fit_space(HyperalignmentConfig(), responses).space.ids) <= 30


def test_a_fitted_ridge_and_network_are_read_back(tmp_path):
    responses, targets = make_world(noise=1.0, n_times=4)
    train, test = pick(responses, "train"), pick(responses, "test")
    wanted = targets.select(list(train.stimulus_ids))
    alignment = {"kind": "hyperalignment", "n_components": 6}
    network = {"kind": "residual_mlp", "hidden": 16, "n_blocks": 1}
    for number, config in enumerate(
        (
            RidgeConfig(subject_alignment=alignment, alphas=(10.0,)),
            RidgeConfig(subject_alignment="zscore", alphas=(10.0,)),
            make_config(network=network, subject_alignment=alignment, epochs=2),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        learnt, tested = (train, test) if config.subject_alignment != "zscore" else (_cut(train), _cut(test))
        encoder = config.build(seed=0).fit(learnt, wanted)
        encoder.write(folder)
        again = config.read(folder)
        np.testing.assert_array_equal(encoder.predict(tested).vectors, again.predict(tested).vectors)
        if number == 2:
            assert again.fitted.signal.shape == (6, 4)
            module, inputs = again.as_module(tested)
            made = module(**inputs).detach().numpy()
            np.testing.assert_allclose(made, again.predict(tested).vectors, atol=1e-4)
        elif number == 0:
            with pytest.raises(ConfigError, match="exported program"):
                again.as_module(tested)


def _cut(responses):
    """Return trials of the first voxels, which all subjects have in this form."""
    return replace(responses, data=responses.data[:, :20], coords={})


def test_predictions_out_of_fold_do_not_know_the_image_that_is_left_out():
    """Alignment is learnt from pairs of images, so that a fold must learn it anew; noise then stays noise."""
    responses, targets = make_world(noise=1.0, snr=0.0, n_train=40)
    train = pick(responses, "train")
    wanted = targets.select(list(train.stimulus_ids))
    encoder = RidgeConfig(subject_alignment="shared_response", alphas=(1.0,)).build(seed=0).fit(train, wanted)
    predicted = encoder.predict_out_of_fold(train, wanted).vectors
    assert abs(np.corrcoef(predicted.ravel(), wanted.vectors.ravel())[0, 1]) < 0.1
    # What the network holds out does not reach its alignment either.
    own = make_config(
        network={"kind": "residual_mlp", "hidden": 8}, subject_alignment="hyperalignment", epochs=1,
        selection={"kind": "last", "hold_out": 0.2},
    ).build(seed=0).fit(train, wanted)  # fmt: skip
    assert not set(own.fitted.held_out) & set(own.fitted.transform.space.ids)


def test_a_network_is_adapted_to_a_new_subject_of_the_common_space():
    responses, targets = make_world(noise=0.5, few=20)
    others, alone, test = (
        pick(responses, "train", "a", "b"),
        pick(responses, "train", "c"),
        pick(responses, "test", "c"),
    )
    config = make_config(
        network={"kind": "residual_mlp", "hidden": 32, "n_blocks": 1},
        subject_alignment={"kind": "hyperalignment", "n_components": 8}, epochs=15,
    )  # fmt: skip
    encoder = config.build(seed=0).fit(others, targets.select(list(others.stimulus_ids)))
    assert find_images(encoder.align_subjects(alone), test, targets) > 0.4
    adapted = encoder.adapt(alone, targets.select(list(alone.stimulus_ids)), epochs=2)
    assert adapted.fitted.signal.subjects == ("a", "b", "c")
    assert find_images(adapted, test, targets) > 0.4


def test_what_cannot_be_aligned_is_said(tmp_path):
    responses, targets = make_world()
    fit = RidgeConfig(subject_alignment="hyperalignment", alphas=(1.0,)).build(seed=0).fit
    one = pick(responses, "train", "a")
    with pytest.raises(DataError, match="subject a alone; read others too"):
        fit(one, targets.select(list(one.stimulus_ids)))
    trials = responses.trials.assign(
        stimulus_id=responses.trials["subject"] + responses.trials["stimulus_id"]
    )
    with pytest.raises(DataError, match="subject a shares 0 of its 60 with another"):
        fit_space(HyperalignmentConfig(), responses.with_trials(trials))
    train = pick(responses, "train")
    wanted = targets.select(list(train.stimulus_ids))
    encoder = fit(train, wanted)
    narrow = pick(responses, "test", "a")
    with pytest.raises(DataError, match="subject a was aligned by 30 voxels, but these trials have 20"):
        encoder.predict(_cut(narrow))
    stranger = narrow.with_trials(
        narrow.trials.assign(subject="d", stimulus_id="new" + narrow.trials["stimulus_id"])
    )
    with pytest.raises(DataError, match=r"subject d shares 0 training image\(s\)"):
        encoder.align_subjects(replace(stranger, coords={}))
    with pytest.raises(DataError, match="reference 'z' is none of the subjects"):
        fit_space(ProcrustesConfig(reference="z"), responses)
    # a and b share the first half of their images with a fourth person each, and nothing with one another
    groups = {"a": "ab", "b": "ab", "c": "cd"}
    trials = responses.trials.assign(
        stimulus_id=responses.trials["subject"].map(groups) + responses.trials["stimulus_id"]
    )
    twin = trials.assign(subject="d")[(trials["subject"] == "c").to_numpy()]
    both = Responses(
        np.concatenate([responses.data, responses.data[(trials["subject"] == "c").to_numpy()]]), responses.dims,
        pd.concat([trials, twin], ignore_index=True), "z", {},
    )  # fmt: skip
    with pytest.raises(DataError, match="two groups of subjects without common images"):
        fit_space(HyperalignmentConfig(), both)
    with pytest.raises(DataError, match="that all of the subjects a, b, c, d have seen"):
        fit_space(FunctionalPcaConfig(), both)


def test_a_new_subject_gives_a_few_trials_by_the_split():
    responses, _ = make_world()
    trials, concepts = responses.trials, responses.trials["concept"].to_numpy()
    split = LeaveOneSubjectOutConfig(own_trials=5).make(trials, concepts, seed=0)
    assert "few-shot: 5 training trials of the tested subject" in split.protocol
    assert "image" in split.by
    assert "subject" not in split.by
    for fold, name in zip(split.folds, WIDTHS, strict=True):
        own = trials.iloc[fold.train]
        assert (own["subject"] == name).sum() == 5
        assert (own["split"] == "train").all()
        assert set(trials.iloc[fold.test]["subject"]) == {name}
    more = LeaveOneSubjectOutConfig(own_trials=9).make(trials, concepts, seed=0)
    assert set(split.folds[0].train) < set(more.folds[0].train)
    assert LeaveOneSubjectOutConfig().hashed_fields() == {"kind": "leave_one_subject_out"}
    with pytest.raises(ConfigError, match="own_trials is 61, but subject a has 60"):
        LeaveOneSubjectOutConfig(own_trials=61).make(trials, concepts, seed=0)
    # A split without own trials is no way out for who asked for them.
    with pytest.raises(ConfigError, match=r"declares no test trials.*; declare some trials as test"):
        LeaveOneSubjectOutConfig(own_trials=5).make(trials.assign(split="train"), concepts, seed=0)


@pytest.mark.parametrize("n_times", [0, 3])
def test_images_that_were_shown_more_often_weigh_as_much_as_others(n_times):
    shown = np.array(list("abacabxx"), dtype=object)  # x is not asked for
    data = np.random.default_rng(0).normal(2, 3, size=(8, 5, *[n_times] * bool(n_times))).astype(np.float32)
    found = common_space.average_images(
        data, np.arange(7), shown, np.array(["a", "b", "c", "d"]), n_features=4
    )
    cut = data[:, :4].reshape(8, 4, -1)
    means = np.stack([cut[:7][shown[:7] == name].mean(axis=0).T for name in "abc"])  # (image, time, feature)
    centre, spread = means.mean(axis=(0, 1)), means.std(axis=(0, 1))
    np.testing.assert_allclose(found.values, (means - centre) / spread, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.centre, centre, rtol=1e-5)
    assert common_space.average_images(data, np.array([6, 7]), shown, np.array(["a", "d"])) is None
