"""Statistics, features and targets are fitted again on the training trials of their fold and compared with the run."""

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.embeddings.pixels import PcaConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.audit import fits
from braindecode_vis.parts.audit.fits import (
    _compare,
    _compare_fits,
    _pick_inputs,
    check_features,
    check_inputs,
    check_target_means,
    check_targets,
)
from braindecode_vis.pipeline.leaks.run_files import Record, open_audited
from braindecode_vis.preprocessing.selection import Selection, SelectionConfig, fit_selection
from tests.parts.audit.small_runs import write_artifact, write_bank, write_prepared, write_trained

N, N_TRAIN, N_FEATURES = 40, 28, 6
ROWS = np.arange(N)
TRAIN, TEST = ROWS[:N_TRAIN], ROWS[N_TRAIN:]
IDS = np.array([f"i{row // 2:02d}" for row in ROWS], dtype=object)  # every image twice
IMAGES = np.unique(IDS)
DATA = (np.random.default_rng(0).normal(size=(N, N_FEATURES)) * np.arange(1, 7) + 3).astype(np.float32)
VECTORS = np.random.default_rng(1).normal(size=(len(IMAGES), 5)).astype(np.float32)


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(
        tmp_path, DATA, [(TRAIN, TEST)], ids=IDS, coords={"voxel_id": list(range(N_FEATURES))}
    )


def pick(keep):
    """Return a choice of features."""
    return Selection("voxel", {"": np.asarray(keep, dtype=bool)})


def write_fit(*, rows=TRAIN, shift=0.0, selection=None, averaged=False, targets=None):
    """Return a function that writes what ridge keeps, with statistics of these trials."""

    def write(path):
        data = DATA[rows].astype(float)
        if averaged:
            data = np.stack([data[IDS[rows] == name].mean(axis=0) for name in np.unique(IDS[rows])])
        if selection is not None:
            selection.write(path / "selection")
            data = data[:, selection.keep[""]]
        arrays = {"feature_mean": data.mean(axis=0) + shift, "feature_std": data.std(axis=0)}
        if targets is not None:
            arrays["target_mean"] = np.asarray(targets, dtype=float)
        save_file(
            {name: np.ascontiguousarray(part) for name, part in arrays.items()}, path / "ridge.safetensors"
        )
        store.write_json(path / "ridge.json", {})

    return write


# --- inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", ["single", "averaged"])
@pytest.mark.parametrize("keep", [None, [True, False, True, True, False, False]], ids=["all", "chosen"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (TRAIN, ""),
        (ROWS, "but those of training and test trials"),
        (ROWS[4:], "not those of its training trials (off by"),
    ],
    ids=["train", "all", "others"],
)
def test_trials_that_input_statistics_are_of_are_known(tmp_path, prepared, rows, words, repeats, keep):
    choice = None if keep is None else pick(keep)
    write_trained(
        tmp_path, prepared, write_bank(tmp_path, prepared, IMAGES, VECTORS), fields={"repeats": repeats},
        write=write_fit(rows=rows, selection=choice, averaged=repeats == "averaged"),
    )  # fmt: skip
    run = open_audited(tmp_path)
    picked = _pick_inputs(run, run.trained[0], TRAIN)
    assert picked.data.shape == (
        N_TRAIN // (2 if repeats == "averaged" else 1),
        N_FEATURES if keep is None else 3,
    )
    (found,) = check_inputs(run)
    assert (found.level, words in found.message) == ("leak" if words else "ok", True), found.message


def test_statistics_of_classes_are_those_of_the_window_that_was_chosen(tmp_path):
    """Trials of a BOLD run are decoded from volumes of some seconds after the picture."""
    times = np.tile([2.0, 4.0], N // 2)
    prepared = write_prepared(
        tmp_path, DATA, [(TRAIN, TEST)], ids=IDS, columns={"time": times, "duration": 1.0, "onset": 9.0 * (ROWS // 2)},
        fields={"split": {"kind": "leave_one_run_out"}},
    )  # fmt: skip

    def write(path):
        data = DATA[TRAIN][times[TRAIN] == 4].astype(float)
        arrays = {"mean": data.mean(axis=0), "scale": data.std(axis=0)}
        save_file(arrays, path / "categories.safetensors")
        store.write_json(path / "categories.json", {"window": [3.0, 4.0]})

    write_trained(tmp_path, prepared, write=write)
    (found,) = check_inputs(open_audited(tmp_path))
    assert found.level == "ok", found.message


def test_means_and_scales_are_compared_in_standard_deviations():
    mean, std = np.array([100.0, 0.5, 2.0]), np.array([2.0, 5.0, 0.0])  # the last feature is constant
    assert _compare(mean, std, mean, np.array([2.0, 5.0, 1.0])) == 0
    assert _compare(mean, std, mean + np.array([1.0, 0, 0]), std) == pytest.approx(0.5)
    assert _compare(mean, std, mean, np.array([2.2, 5.0, 1.0])) == pytest.approx(0.1)
    assert _compare(mean, std, mean, np.array([2.0, 4.0, 1.0])) == pytest.approx(0.2)
    assert _compare(mean, std, mean[:2], std[:2]) == np.inf


@pytest.mark.parametrize("leaks", [False, True])
def test_a_common_space_of_subjects_must_be_that_of_training_trials(tmp_path, leaks):
    generator = np.random.default_rng(0)
    ids, who = np.tile(IMAGES[:8], 8), np.repeat(["1", "2"], 32).astype(object)
    rows, trained = np.arange(64), np.tile(np.arange(8) < 6, 8)
    folds = []
    for name in ("1", "2"):  # a few trials of the tested subject are learnt from as well
        known = rows[trained & (who != name)], rows[trained & (who == name)][:10]
        folds.append((np.sort(np.concatenate(known)), rows[~trained & (who == name)]))
    data = generator.normal(size=(64, 5, 12)).astype(np.float32)
    data = np.where((who == "1")[:, None, None], data, 2 * data[:, ::-1] + 1)
    prepared = write_prepared(tmp_path, data, folds, ids=ids, columns={"subject": who})
    responses = open_audited(tmp_path).responses
    config = RidgeConfig(subject_alignment={"kind": "hyperalignment", "n_components": 3}, alphas=(1.0,))
    for number, (train, test) in enumerate(folds):
        seen = responses.select(np.sort(np.r_[train, test]) if leaks else train)
        targets = Embeddings(generator.standard_normal((seen.n_trials, 2)), seen.stimulus_ids, "x")
        encoder = config.build(seed=0).fit(seen, targets)
        fields = {"encoder": config.hashed_fields(), "selection": {}, "repeats": "single", "seed": 0}
        write_trained(tmp_path, prepared, number=number, fields=fields, write=encoder.write)
    found = check_inputs(open_audited(tmp_path))
    assert [item.level for item in found] == (["leak"] * 2 if leaks else ["ok"])
    assert all("those of training and test trials" in item.message for item in found) == leaks


# --- features -----------------------------------------------------------------------------------------------

CHOICES = {
    "encoding": {"encoding": {"n_best": 3}},
    "reliability": {"reliability": {"measure": "split_half", "n_best": 3}},
    "names": {},
}


@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize("room", [0, -1], ids=["as large as may be", "larger"])
def test_features_of_large_recordings_are_known_by_record_where_choosing_them_is_dear(
    tmp_path, prepared, monkeypatch, what, room
):
    config = SelectionConfig.model_validate(CHOICES[what])
    bank = write_bank(tmp_path, prepared, IMAGES, VECTORS)
    responses = open_audited(tmp_path).responses.select(TRAIN)
    targets = Embeddings(VECTORS, IMAGES, "toy").select(list(dict.fromkeys(IDS[TRAIN])))
    chosen = fit_selection(config, responses, targets, seed=derive_seed(3, "selection"))
    fields = {"selection": config.model_dump(mode="json"), "seed": 3}
    write_trained(
        tmp_path, prepared, bank, fields=fields, write=lambda path: chosen.write(path / "selection")
    )
    monkeypatch.setattr(fits, "LARGEST_REFIT", N_TRAIN * N_FEATURES * 4 + room)
    for thorough in (False, True):
        run = open_audited(tmp_path, thorough=True) if thorough else open_audited(tmp_path)
        by_record = room < 0 and what != "names" and not thorough
        (found,) = check_features(run)
        assert found.level == ("warning" if by_record else "ok"), found.message
        assert [item.how for item in run.verified] == ["by record" if by_record else "recomputed"]


def test_features_of_every_fold_are_told_of_where_choosing_them_is_dear(tmp_path, monkeypatch):
    halves = [(ROWS[: N // 2], ROWS[N // 2 :]), (ROWS[N // 2 :], ROWS[: N // 2])]
    prepared = write_prepared(tmp_path, DATA, halves, ids=IDS, coords={"voxel_id": list(range(N_FEATURES))})
    bank = write_bank(tmp_path, prepared, IMAGES, VECTORS)
    fields = {
        "selection": SelectionConfig.model_validate(CHOICES["encoding"]).model_dump(mode="json"),
        "seed": 3,
    }
    for number in range(2):
        write_trained(
            tmp_path, prepared, bank, number=number, fields=fields,
            write=lambda path: pick([True] * 3 + [False] * 3).write(path / "selection"),
        )  # fmt: skip
    monkeypatch.setattr(fits, "LARGEST_REFIT", 0)
    found = check_features(open_audited(tmp_path))
    assert [(item.level, item.where) for item in found] == [("warning", "fold 0"), ("warning", "fold 1")]


def test_features_that_test_trials_had_a_say_in_are_known(tmp_path, prepared):
    config = SelectionConfig.model_validate(CHOICES["reliability"])
    responses = open_audited(tmp_path).responses
    train, whole = (
        fit_selection(config, responses.select(rows), seed=derive_seed(3, "selection"))
        for rows in (TRAIN, ROWS)
    )
    assert (train.keep[""] != whole.keep[""]).any()
    fields = {"selection": config.model_dump(mode="json"), "seed": 3}
    bank = write_bank(tmp_path, prepared, IMAGES, VECTORS)
    write_trained(tmp_path, prepared, bank, fields=fields, write=lambda path: whole.write(path / "selection"))
    (leak,) = check_features(open_audited(tmp_path))
    assert "training and test trials together choose" in leak.message


# --- targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fitted_on", "words"),
    [("train", ""), ("all", "training and test images together give it"), ("none", "do not")],
)
def test_images_that_a_target_space_is_fitted_on_are_known(tmp_path, prepared, fitted_on, words):
    stimuli = open_audited(tmp_path).stimuli
    train = list(dict.fromkeys(IDS[TRAIN]))
    encoder = PcaConfig(n_components=4).build()
    encoder.fit(stimuli.iterate_images({"train": train, "all": None, "none": train[:9]}[fitted_on]))
    vectors = encoder.encode(stimuli.iterate_images())
    fields = {"target": {"kind": "pca", "n_components": 4}}
    bank = write_artifact(
        tmp_path, "embed", fields, {"preprocess": prepared.name},
        write=lambda path: store.write_embeddings(path, Embeddings(vectors, stimuli.ids, encoder.space)),
    )  # fmt: skip
    write_trained(tmp_path, prepared, bank)
    (found,) = check_targets(open_audited(tmp_path))
    assert (found.level, words in found.message) == ("leak" if words else "ok", True), found.message


@pytest.mark.parametrize("repeats", ["single", "averaged"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [(TRAIN, ""), (ROWS, "but that of training and test images"), (TEST, "not that of its training")],
)
def test_images_that_the_mean_of_targets_is_of_are_known(tmp_path, prepared, rows, words, repeats):
    mean = VECTORS[np.unique(np.searchsorted(IMAGES, IDS[rows]))].mean(axis=0)
    write_trained(
        tmp_path, prepared, write_bank(tmp_path, prepared, IMAGES, VECTORS), fields={"repeats": repeats},
        write=write_fit(targets=mean),
    )  # fmt: skip
    (found,) = check_target_means(open_audited(tmp_path))
    assert (found.level, words in found.message) == ("leak" if words else "ok", True), found.message


# --- fits that were made again ------------------------------------------------------------------------------


def test_an_average_that_reads_a_table_is_trained_again_by_those_who_know_where_it_lies(tmp_path):
    """Of a member's captions the record knows a digest, and the audit ended with an unknown key."""
    member = {"kind": "network", "captions_digest": "ab", "sentence_encoder_digest": "cd"}
    record = Record(
        tmp_path, {"fields": {"encoder": {"kind": "average", "members": [{"kind": "ridge"}, member]}}}
    )
    assert fits.check_refit(SimpleNamespace(trained=[record])) == []


@pytest.mark.parametrize(("change", "n_fits"), [(0.0, 1), (1e-6, 2)])
def test_one_fit_alone_is_given_poison_and_in_every_trial_that_is_not_learnt_from(
    tmp_path, prepared, monkeypatch, change, n_fits
):
    """Were the clean fit poisoned too, both would agree on what they learnt from the test.

    It is needed only where the poisoned one is not that of the run to the last bit.
    """
    write_trained(tmp_path, prepared, write_bank(tmp_path, prepared, IMAGES, VECTORS), write=write_fit())
    seen = []

    def fit(run, record, number, responses, folder, *, poison):
        folder.mkdir()
        write_fit(shift=change)(folder)
        seen.append((np.array(responses.data), poison))

    monkeypatch.setattr(fits, "_fit_encoder", fit)
    run = open_audited(tmp_path)
    (found,) = fits.check_refit(run)
    assert (found.level, len(seen), len(run.refitted)) == ("ok", n_fits, 2 - n_fits)
    poisoned, first = seen[0]
    np.testing.assert_array_equal(poisoned[TRAIN], DATA[TRAIN])
    assert first
    assert np.abs(poisoned[TEST]).min() >= fits.POISON
    for clean, second in seen[1:]:
        np.testing.assert_array_equal(clean, DATA)
        assert not second


@pytest.mark.parametrize("kept", ["stored", "made"])
def test_a_file_that_only_one_of_two_fits_has_is_no_equal_fit(tmp_path, prepared, monkeypatch, kept):
    def write(path, which):
        write_fit()(path)
        if which == kept:
            np.save(path / "more.npy", DATA)

    bank = write_bank(tmp_path, prepared, IMAGES, VECTORS)
    write_trained(tmp_path, prepared, bank, write=lambda path: write(path, "stored"))

    def fit(run, record, number, responses, folder, *, poison):
        folder.mkdir()
        write(folder, "made")

    monkeypatch.setattr(fits, "_fit_encoder", fit)
    run = open_audited(tmp_path)
    fits.check_refit(run)
    assert run.refitted == set()


@pytest.mark.parametrize(
    ("poisoned", "stored", "level", "words"),
    [
        (1.0, 1.0, None, ""),
        (1.0, 1.0 + 1e-5, None, ""),  # another machine
        (1.0, 1.01, "leak", "weights in ridge.safetensors differs from a fit on the training trials"),
        (1.0 + 1e-6, 1.0, "leak", "weights in ridge.safetensors changes when test trials are poisoned"),
        (1.0, np.nan, "leak", "differs from a fit on the training trials"),
        (1.0, None, "warning", "the run has no ridge.safetensors"),
    ],
)
def test_weights_may_not_move_with_the_test_nor_be_others_than_the_runs(
    tmp_path, prepared, poisoned, stored, level, words
):
    weights = np.random.default_rng(0).normal(size=(4, 3))
    folders = [tmp_path / "clean", tmp_path / "poisoned"]
    for folder, factor in zip(folders, (1.0, poisoned), strict=True):
        folder.mkdir()
        save_file({"weights": factor * weights, "kept": np.arange(4)}, folder / "ridge.safetensors")

    def write(path):
        if stored is not None:
            save_file({"weights": stored * weights, "kept": np.arange(4)}, path / "ridge.safetensors")

    write_trained(tmp_path, prepared, write=write)
    found = _compare_fits(open_audited(tmp_path).trained[0], *folders, "fold 0")
    assert [item.level for item in found] == ([level] if level else [])
    assert not found or words in found[0].message
