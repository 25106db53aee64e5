import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.embeddings.imported import (
    import_atm,
    import_atm_text,
    import_centres,
    import_mindeye,
    import_neurobridge,
    import_nice,
)
from braindecode_vis.retrieval import compute_ranks
from braindecode_vis.stimuli import StimulusSet

CONCEPTS, PER_CONCEPT, WIDTH = ("aardvark", "abacus", "zither", "banana", "cello", "drum"), 4, 24


def make_list(concepts=CONCEPTS, per_concept=PER_CONCEPT, folder="training_images"):
    """Return a shuffled image list and, for each row, its number in the order of folders and files."""
    rows = [
        (f"{c}_{k:02d}s", c, f"{folder}/{n:05d}_{c}/{c}_{k:02d}s.jpg", "0", n * per_concept + k)
        for n, c in enumerate(concepts)
        for k in range(per_concept)
    ]
    table = pd.DataFrame(rows, columns=["stimulus_id", "concept", "path", "sha256", "nsd_id"])
    return StimulusSet(table.sample(frac=1, random_state=3).reset_index(drop=True))


def make_features(n_concepts=6, per_concept=PER_CONCEPT, seed=0, norm=30.0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_concepts, 1, WIDTH))
    vectors = centres + 0.5 * rng.standard_normal((n_concepts, per_concept, WIDTH)) + 1.0
    vectors *= norm / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors.reshape(-1, WIDTH).astype(np.float32)


def check_rows(bank, stimuli, features):
    np.testing.assert_array_equal(bank.embeddings.ids, stimuli.ids)
    np.testing.assert_allclose(bank.embeddings.vectors, features[stimuli.table["nsd_id"]], rtol=1e-6)


@pytest.mark.parametrize("style", ["old", "new"])
def test_atm_files_of_both_styles(style, tmp_path):
    stimuli, features = make_list(), make_features(norm=1.0 if style == "old" else 30.0)
    text = make_features(per_concept=1, seed=1, norm=1.0)
    path = tmp_path / "ViT-H-14_features_train.pt"
    torch.save({"text_features": torch.from_numpy(text), "img_features": torch.from_numpy(features)}, path)
    bank = import_atm(path, stimuli)
    check_rows(bank, stimuli, features)
    assert bank.normalised == (style == "old")
    assert bank.embeddings.space == f"atm/ViT-H-14/laion2b_s32b_b79k/{'unit' if style == 'old' else 'raw'}"
    assert ("length one (old style)" in bank.note) == (style == "old")
    words = import_atm_text(path, stimuli)
    assert words.embeddings.ids.tolist() == list(CONCEPTS)
    np.testing.assert_array_equal(words.embeddings.vectors, text)
    assert words.embeddings.space == bank.embeddings.space


def test_atm_files_that_do_not_fit(tmp_path):
    path = tmp_path / "ViT-H-14_features_test.pt"
    torch.save({"img_features": torch.ones(3, 2)}, path)
    with pytest.raises(DataError, match="lacks text_features; it holds img_features"):
        import_atm(path, make_list())
    content = {"img_features": torch.from_numpy(make_features()), "text_features": torch.ones(5, WIDTH)}
    torch.save(content, path)
    with pytest.raises(DataError, match="text features of 5 concepts, the image list has 6"):
        import_atm(path, make_list())
    with pytest.raises(DataError, match=r"has the shape \(24, 24\), but the image list has 12 images"):
        import_atm(path, make_list(per_concept=2))
    with pytest.raises(DataError, match="was not found"):
        import_atm(tmp_path / "absent.pt", make_list())


def test_nice_and_its_centres_meet_in_one_space(tmp_path):
    test = make_list(per_concept=1, folder="test_images")
    features = make_features(per_concept=1, norm=1.0)
    np.save(tmp_path / "clip_feature_maps_test.npy", features[:, None])
    np.save(tmp_path / "center_clip.npy", 0.9 * features)
    bank = import_nice(tmp_path / "clip_feature_maps_test.npy", test)
    check_rows(bank, test, features)
    centres = import_centres(tmp_path / "center_clip.npy", test)
    assert centres.embeddings.ids.tolist() == list(CONCEPTS)
    assert not centres.normalised
    assert centres.embeddings.space == bank.embeddings.space
    with pytest.raises(DataError, match="means over other images of each concept"):
        import_nice(tmp_path / "center_clip.npy", test)


def test_neurobridge_arrays_and_their_augmented_draws(tmp_path):
    stimuli, features = make_list(), make_features()
    shaped = features.reshape(len(CONCEPTS), PER_CONCEPT, WIDTH)
    np.save(tmp_path / "image_train.npy", shaped)
    check_rows(import_neurobridge(tmp_path / "image_train.npy", stimuli), stimuli, features)
    np.save(tmp_path / "train.npy", np.stack([0.5 * shaped, 1.5 * shaped]))
    fused = import_neurobridge(tmp_path / "train.npy", stimuli)
    check_rows(fused, stimuli, features)
    assert "mean-of-2" in fused.embeddings.space
    np.save(tmp_path / "image_train.npy", shaped[:, :3])
    with pytest.raises(DataError, match="6 concepts of 3 images, the image list 6 concepts of 4 to 4"):
        import_neurobridge(tmp_path / "image_train.npy", stimuli)


def test_a_bank_of_another_list_is_found_out_although_it_has_as_many_rows(tmp_path):
    """A wrong image set passes every count; in the THINGS-MEG code of others it shifted the concepts silently."""
    features = make_features()[np.random.default_rng(5).permutation(len(CONCEPTS) * PER_CONCEPT)]
    np.save(tmp_path / "clip_feature_maps_training.npy", features[:, None])
    with pytest.raises(
        DataError, match="does not follow the image list: images of one concept are no more alike"
    ):
        import_nice(tmp_path / "clip_feature_maps_training.npy", make_list())


def test_mindeye_rows_are_picked_by_image_number(tmp_path):
    stimuli, features = make_list(), make_features()
    path = tmp_path / "bank.hdf5"
    with h5py.File(path, "w") as file:
        file["clip/tokens"] = np.repeat(features[:, None], 3, axis=1).astype(np.float16)
        file["images"] = np.zeros((24, 3, 8, 8), np.float16)
    bank = import_mindeye(path, stimuli, model="ViT-L-14/257x768")
    assert bank.embeddings.vectors.shape == (24, 3, WIDTH)
    np.testing.assert_allclose(bank.embeddings.vectors[:, 1], features[stimuli.table["nsd_id"]], rtol=1e-3)
    late = StimulusSet(stimuli.table.assign(nsd_id=stimuli.table["nsd_id"] + 1))
    with pytest.raises(
        DataError, match=r"image number 24 of column nsd_id is outside the 24 rows.*counts from 1"
    ):
        import_mindeye(path, late, model="x")
    with pytest.raises(ConfigError, match=r"holds no array 'z'; it holds clip/tokens, images"):
        import_mindeye(path, stimuli, model="x", dataset="z")
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((24, 3, 8, 8), np.float16)
    with pytest.raises(DataError, match="holds pixels"):
        import_mindeye(path, stimuli, model="x")


def test_rows_that_were_never_computed(tmp_path):
    features = make_features()
    features[5] = 0
    np.save(tmp_path / "a.npy", features)
    with pytest.raises(DataError, match="a row of zeros for 'abacus_01s'"):
        import_nice(tmp_path / "a.npy", make_list())
    features[5] = np.nan
    np.save(tmp_path / "a.npy", features)
    with pytest.raises(DataError, match="abacus_01s"):
        import_nice(tmp_path / "a.npy", make_list())
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="holds no plain array"):
        import_nice(tmp_path / "a.npy", make_list())


@pytest.mark.shared
def test_real_clip_vectors_find_the_centre_of_their_concept(shared):
    """200 THINGS-EEG2 test images against means over other images of their concepts."""
    folder = shared / "data" / "things_eeg2_clip"
    names = [f"concept{n:03d}" for n in range(200)]  # the files store none
    table = pd.DataFrame(
        {"stimulus_id": names, "concept": names, "path": [f"{n}/{n}.jpg" for n in names], "sha256": ""}
    )
    test = StimulusSet(table)
    queries = import_nice(folder / "clip_feature_maps_test.npy", test)
    centres = import_centres(folder / "center_clip.npy", test)
    assert queries.normalised
    ranked = compute_ranks(queries.embeddings, centres.embeddings)
    assert (ranked.worst_ranks <= 1).mean() == pytest.approx(0.98, abs=0.001)
    assert (ranked.worst_ranks <= 5).all()
    assert ranked.true_similarities.mean() == pytest.approx(0.890, abs=0.001)
