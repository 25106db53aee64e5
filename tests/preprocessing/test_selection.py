"""Columns chosen in training trials: planted voxels are found, test trials change nothing, people keep their brains."""

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.sources.betas_source import (
    BetasPart,
    BetasPlan,
    FmriSource,
    Geometry,
    Roi,
    join_sources,
)
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.preprocessing.alignment import check_common_features
from braindecode_vis.preprocessing.betas import write_fmri_source
from braindecode_vis.preprocessing.selection import (
    ReliabilityConfig,
    Selection,
    SelectionConfig,
    _keep_best,
    fit_selection,
)
from braindecode_vis.preprocessing.voxel_geometry import find_rois, inverse_transform, read_geometry

AFFINE = np.diag([2.0, 2, 2, 1])
SHAPE = (4, 3, 2)
N_IMAGES, N_REP = 60, 3
SIZES = {"01": 9, "02": 6}  # voxels
GOOD = {"01": [1, 4, 7], "02": [0, 5, 3]}  # voxels that respond to the images


def make_features(seed=0):
    ids = [f"i{n:03d}" for n in range(N_IMAGES)]
    vectors = np.random.default_rng(seed).standard_normal((N_IMAGES, 4)).astype(np.float32)
    return Embeddings(vectors, ids, "test")


def make_subject(subject, seed):
    """One person: `GOOD` voxels follow the image features, others are noise; a quarter of the images is tested."""
    rng = np.random.default_rng(seed)
    features, n = make_features().vectors, SIZES[subject]
    weights = np.zeros((4, n))
    weights[:, GOOD[subject]] = rng.standard_normal((4, 3)) + np.sign(rng.standard_normal((4, 3)))
    images = np.repeat(np.arange(N_IMAGES), N_REP)
    data = (features[images] @ weights + 0.7 * rng.standard_normal((len(images), n))).astype(np.float32)
    trials = pd.DataFrame(
        {
            "subject": subject, "session": "01", "run": "01", "stimulus_id": [f"i{i:03d}" for i in images],
            "repetition": np.tile(np.arange(N_REP), N_IMAGES), "concept": "c",
            "split": np.where(images < N_IMAGES // 4, "test", "train"),
        }
    )  # fmt: skip
    mask = np.zeros(SHAPE, bool)
    mask.ravel()[rng.permutation(mask.size)[:n]] = True
    labels = np.zeros(n, np.int16)
    labels[GOOD[subject][:2]] = [1, 2]
    roi = Roi(labels, {1: "early", 2: "late"})
    return data, trials, Geometry.from_mask(mask, AFFINE, {"streams": roi})


def make_source(subjects=("01", "02"), poison=None, **plan):
    sources, arrays = [], {}
    table = pd.DataFrame({"stimulus_id": make_features().ids, "concept": "c", "path": "", "sha256": ""})
    for number, subject in enumerate(subjects):
        data, trials, geometry = make_subject(subject, number)
        if poison is not None:
            test = (trials["split"] == "test").to_numpy()
            data[test] = poison * np.random.default_rng(99).standard_normal(data[test].shape)
        arrays[subject] = data
        part = BetasPart(trials, (store.Path(subject),), SIZES[subject], lambda a, b, data=data: data[a:b])
        sources.append(
            FmriSource((part,), StimulusSet(table), BetasPlan(**plan), "percent signal change", geometry)
        )
    return (sources[0] if len(sources) == 1 else join_sources(sources, BetasPlan(**plan))), arrays


def write(folder, **options):
    source, _ = make_source(**options)
    write_fmri_source(source, folder)
    return store.read_responses(folder / "responses")


def pick(responses, split):
    return responses.select((responses.trials["split"] == split).to_numpy())


RELIABLE = SelectionConfig(reliability={"n_best": 3})
CONFIGS = [
    RELIABLE,
    SelectionConfig(reliability={"measure": "split_half", "threshold": 0.5}),
    SelectionConfig(encoding={"n_best": 3}),
]


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("joint"), pad_subjects=True, zscore="none")


def test_padded_rows_hold_every_subjects_voxels(joint):
    _, arrays = make_source(pad_subjects=True)
    assert joint.data.shape == (2 * N_IMAGES * N_REP, 9)
    second = joint.trials["subject"] == "02"
    np.testing.assert_array_equal(joint.data[~second], arrays["01"])
    np.testing.assert_array_equal(joint.data[second][:, :6], arrays["02"])
    assert not joint.data[second][:, 6:].any()
    assert joint.coords["n_voxels_of"] == SIZES
    assert describe_signal(joint).n_voxels == (9, 6)
    image = inverse_transform(joint, subject="02")
    mask = make_subject("02", 1)[2].mask
    np.testing.assert_array_equal(np.asarray(image.dataobj)[mask].T, arrays["02"])
    assert np.asarray(inverse_transform(joint, np.arange(9.0), subject="02").dataobj).max() == 5


def test_standardising_leaves_the_padding_empty(tmp_path):
    responses = write(tmp_path, pad_subjects=True)
    second = (responses.trials["subject"] == "02").to_numpy()
    assert not responses.data[second][:, 6:].any()
    train = second & (responses.trials["split"] == "train").to_numpy()
    np.testing.assert_allclose(responses.data[train][:, :6].std(axis=0), 1, atol=1e-5)
    assert store.read_json(tmp_path / "responses/meta.json")["provenance"]["constant_features"] == 0


@pytest.mark.parametrize("config", CONFIGS, ids=["ncsnr", "split half", "encoding"])
def test_planted_voxels_are_found_and_poisoned_test_trials_change_nothing(tmp_path, config):
    for subject in ("01", "02"):
        clean = write(tmp_path / f"clean{subject}", subjects=(subject,), zscore="none")
        poisoned = write(tmp_path / f"poisoned{subject}", subjects=(subject,), zscore="none", poison=1e3)
        chosen, again = (fit_selection(config, pick(r, "train"), make_features()) for r in (clean, poisoned))
        assert np.flatnonzero(chosen.keep[""]).tolist() == sorted(GOOD[subject])
        np.testing.assert_array_equal(chosen.keep[""], again.keep[""])
        assert chosen.steps == again.steps


@pytest.mark.parametrize("config", CONFIGS, ids=["ncsnr", "split half", "encoding"])
def test_each_subject_of_a_padded_array_gets_its_own_choice(joint, tmp_path, config):
    per_trial = make_features().select(list(pick(joint, "train").stimulus_ids))
    selection = fit_selection(config, pick(joint, "train"), per_trial)
    assert {s: np.flatnonzero(k).tolist() for s, k in selection.keep.items()} == {
        s: sorted(voxels) for s, voxels in GOOD.items()
    }
    selection.write(tmp_path)
    tested = pick(joint, "test")
    cut = Selection.read(tmp_path).apply(tested)
    assert cut.data.shape == (tested.n_trials, 3)
    for subject in SIZES:
        rows = (tested.trials["subject"] == subject).to_numpy()
        np.testing.assert_array_equal(cut.data[rows], tested.data[rows][:, sorted(GOOD[subject])])
        ids = make_subject(subject, list(SIZES).index(subject))[2].voxel_ids
        np.testing.assert_array_equal(read_geometry(cut, subject).voxel_ids, ids[sorted(GOOD[subject])])
        back = np.asarray(inverse_transform(cut, np.array([1.0, 2, 3]), subject=subject).dataobj)
        assert back.ravel()[ids[sorted(GOOD[subject])]].tolist() == [1, 2, 3]
    assert cut.coords["n_voxels_of"] == {"01": 3, "02": 3}


def test_choices_of_other_sizes_are_padded_again(joint):
    config = SelectionConfig(
        rois={"include": ["streams"], "exclude": ["streams:late"]}, reliability={"threshold": 0}
    )
    selection = fit_selection(config, pick(joint, "train"))
    assert [int(k.sum()) for k in selection.keep.values()] == [1, 1]
    wide = SelectionConfig(rois={"exclude": ["streams:early"]})
    cut = fit_selection(wide, pick(joint, "train")).apply(joint)
    assert cut.data.shape[1] == 8
    assert cut.coords["n_voxels_of"] == {"01": 8, "02": 5}
    assert find_rois(cut, {"streams": None}, subject="02").sum() == 1


def test_a_person_who_was_not_trained_on_is_refused(joint):
    first = pick(joint, "train")
    selection = fit_selection(RELIABLE, first.select((first.trials["subject"] == "01").to_numpy()))
    with pytest.raises(DataError, match="no voxels were chosen for subject 02"):
        selection.apply(joint)


def make_parcels(dims=("trial", "parcel", "time")):
    rng = np.random.default_rng(0)
    images, n_times = np.repeat(np.arange(20), 3), 4
    gain = np.array([0.0, 2, 0, 1, 0, 3])[:, None] * np.hanning(n_times + 2)[1:-1]
    data = rng.standard_normal((20, 6))[images][:, :, None] * gain + rng.standard_normal((60, 6, n_times))
    offsets = np.repeat([0.0, 50.0], 30)[:, None, None]  # a difference between people is no signal
    trials = pd.DataFrame(
        {
            "subject": np.repeat(["01", "02"], 30), "session": "01", "run": "01", "repetition": 0, "split": "train",
            "stimulus_id": [f"i{i}" for i in images],
        }
    )  # fmt: skip
    coords = {"parcel_names": [f"p{i}" for i in range(6)], "parcel_networks": ["Vis", "Vis", "Default"] * 2}
    return Responses((data + offsets).astype(np.float32), dims, trials, "z", coords)


def test_parcels_with_times_are_chosen_by_network_and_reliability():
    responses = make_parcels()
    selection = fit_selection(
        SelectionConfig(
            networks={"include": ["Vis", "Default"], "exclude": ["Default"]}, reliability={"n_best": 2}
        ),
        responses,
    )
    cut = selection.apply(responses)
    assert cut.coords["parcel_names"] == ["p1", "p3"]
    assert cut.coords["parcel_networks"] == ["Vis", "Vis"]
    np.testing.assert_array_equal(cut.data, responses.data[:, [1, 3]])
    plain = fit_selection(SelectionConfig(reliability={"n_best": 3}), responses)
    assert np.flatnonzero(plain.keep[""]).tolist() == [1, 3, 5]


def test_channels_by_name():
    responses = make_parcels(("trial", "channel", "time"))
    positions = np.arange(18.0).reshape(6, 3)
    names = ["Fp1", "O1", "Oz", "O2", "Cz", "EOG"]
    responses = Responses(
        responses.data, responses.dims, responses.trials, "V", {"ch_names": names, "ch_pos": positions}
    )
    cut = fit_selection(SelectionConfig(ch_names={"exclude": ["EOG", "Fp1"]}), responses).apply(responses)
    assert cut.coords["ch_names"] == ["O1", "Oz", "O2", "Cz"]
    np.testing.assert_array_equal(cut.coords["ch_pos"], positions[1:5])
    with pytest.raises(ConfigError, match="'O7', but must be one of Fp1"):
        fit_selection(SelectionConfig(ch_names={"include": ["O7"]}), responses)


def test_what_means_nothing_is_refused(joint, tmp_path):
    train = pick(joint, "train")
    with pytest.raises(DataError, match="voxels of several brains"):
        check_common_features(joint, what="ridge")
    with pytest.raises(ConfigError, match="30 features"):
        fit_selection(SelectionConfig(reliability={"n_best": 30}), train)
    with pytest.raises(DataError, match=r"no feature of subject 0.* above 99"):
        fit_selection(SelectionConfig(reliability={"threshold": 99}), train)
    with pytest.raises(ConfigError, match="needs the embeddings"):
        fit_selection(CONFIGS[2], train)
    with pytest.raises(ConfigError, match="chooses parcels, but these responses have voxels"):
        fit_selection(SelectionConfig(networks={"include": ["Vis"]}), train)
    with pytest.raises(ValidationError, match="either n_best or threshold"):
        SelectionConfig(reliability={})
    with pytest.raises(ConfigError, match="do not correspond"):
        make_source()
    with pytest.raises(ConfigError, match="choose one"):
        make_source(pad_subjects=True, atlas={"fetch": "aal"})
    assert SelectionConfig().is_empty


def test_a_threshold_is_what_must_be_exceeded():
    chosen, _ = _keep_best(
        {"": np.array([0.1, 0.2, 0.3])},
        {"": np.ones(3, bool)},
        ReliabilityConfig(threshold=0.2),
        "reliability",
    )
    assert chosen[""].tolist() == [False, False, True]


@pytest.mark.parametrize(
    "choice",
    [
        {"rois": {"include": ["V1"]}}, {"networks": {"exclude": ["Vis"]}}, {"ch_names": {"include": ["Oz"]}},
        {"reliability": {"n_best": 3}}, {"encoding": {"threshold": 0.1}},
    ],
)  # fmt: skip
def test_any_choice_alone_is_one(choice):
    assert SelectionConfig().is_empty
    assert not SelectionConfig.model_validate(choice).is_empty
