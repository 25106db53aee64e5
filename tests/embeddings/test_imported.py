from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.imported import ImportedConfig
from braindecode_vis.embeddings.pixels import PixelsConfig
from braindecode_vis.embeddings.text import ConceptTextConfig, embed_concepts
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.pipeline.runs import open_run, read_scores
from braindecode_vis.scoring.retrieval import compute_ranks

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


def read(path, stimuli, layout, **settings):
    """Return the embeddings and the encoder, as a run's `embed` calls them."""
    encoder = ImportedConfig(layout=layout, files=path, **settings).build()
    return encoder.embed(stimuli, (), None), encoder


def check_rows(bank, stimuli, features):
    np.testing.assert_array_equal(bank.ids, stimuli.ids)
    np.testing.assert_allclose(bank.vectors, features[stimuli.table["nsd_id"]], rtol=1e-6)


def save_atm(path, features, text):
    torch.save({"text_features": torch.from_numpy(text), "img_features": torch.from_numpy(features)}, path)
    return path


@pytest.mark.parametrize("style", ["old", "new"])
def test_atm_files_of_both_styles(style, tmp_path):
    stimuli, features = make_list(), make_features(norm=1.0 if style == "old" else 30.0)
    text = make_features(per_concept=1, seed=1, norm=1.0)
    path = save_atm(tmp_path / "ViT-H-14_features_train.pt", features, text)
    bank, encoder = read(path, stimuli, "atm")
    check_rows(bank, stimuli, features)
    length = "unit" if style == "old" else "raw"
    assert bank.space.startswith(f"atm/ViT-H-14/laion2b_s32b_b79k/{length}/files=")
    (note,) = encoder.record["notes"]
    assert ("length one (old style)" in note) == (style == "old")
    words = embed_concepts(ConceptTextConfig(), encoder.config, stimuli)
    assert words.ids.tolist() == sorted(CONCEPTS)
    np.testing.assert_array_equal(words.select(CONCEPTS).vectors, text)
    assert words.space == bank.space


def test_training_and_test_files_are_joined_by_the_split_of_their_images(tmp_path):
    train, test = make_list(), make_list(("lamp", "mug"), 1, folder="test_images")
    table = pd.concat([train.table.assign(split="train"), test.table.assign(split="test")], ignore_index=True)
    stimuli = StimulusSet(table.sample(frac=1, random_state=1).reset_index(drop=True))
    features, held = make_features(), make_features(2, 1, seed=5)
    text = make_features(per_concept=1, seed=1)
    files = {
        "train": save_atm(tmp_path / "train.pt", features, text),
        "test": save_atm(tmp_path / "test.pt", held, text[:2]),
    }
    bank, encoder = read(files, stimuli, "atm")
    check_rows(bank.select(train.ids), train, features)
    check_rows(bank.select(test.ids), test, held)
    np.testing.assert_array_equal(bank.ids, stimuli.ids)
    assert encoder.embed_concepts(stimuli).ids.tolist() == sorted([*CONCEPTS, "lamp", "mug"])

    with pytest.raises(DataError, match=r"no part for 24 images, first 'a.*; its parts are test"):
        read({"test": files["test"]}, stimuli, "atm")
    with pytest.raises(
        ConfigError, match=r"names the part 'training', but the column split .* has test, train"
    ):
        read({"training": files["train"]}, stimuli, "atm")
    with pytest.raises(DataError, match=r"is missing.*split"):
        read(files, train, "atm")
    save_atm(tmp_path / "test.pt", held / 30, text[:2])
    with pytest.raises(DataError, match=r"length one in test.pt and their own length in train.pt"):
        read(files, stimuli, "atm")


def test_atm_files_that_do_not_fit(tmp_path):
    path = tmp_path / "ViT-H-14_features_test.pt"
    torch.save({"img_features": torch.ones(3, 2)}, path)
    with pytest.raises(DataError, match="is missing text_features; it holds img_features"):
        read(path, make_list(), "atm")
    save_atm(path, make_features(), np.ones((5, WIDTH), np.float32))
    with pytest.raises(DataError, match="text features of 5 concepts, the image list has 6"):
        read(path, make_list(), "atm")
    with pytest.raises(DataError, match=r"has the shape \(24, 24\), but the image list has 12 images"):
        read(path, make_list(per_concept=2), "atm")
    with pytest.raises(DataError, match="was not found"):
        read(tmp_path / "absent.pt", make_list(), "atm")


def test_nice(tmp_path):
    test = make_list(per_concept=1, folder="test_images")
    features = make_features(per_concept=1, norm=1.0)
    np.save(tmp_path / "clip_feature_maps_test.npy", features[:, None])
    bank, encoder = read(tmp_path / "clip_feature_maps_test.npy", test, "nice")
    check_rows(bank, test, features)
    np.save(tmp_path / "center_clip.npy", 0.9 * features)
    with pytest.raises(DataError, match="means over other images of each concept"):
        read(tmp_path / "center_clip.npy", test, "nice")
    with pytest.raises(ConfigError, match=r"layout nice hold no text; name a network with text.tower"):
        embed_concepts(ConceptTextConfig(), encoder.config, test)


def test_neurobridge_arrays_and_their_augmented_draws(tmp_path):
    stimuli, features = make_list(), make_features()
    shaped = features.reshape(len(CONCEPTS), PER_CONCEPT, WIDTH)
    np.save(tmp_path / "image_train.npy", shaped)
    check_rows(read(tmp_path / "image_train.npy", stimuli, "neurobridge")[0], stimuli, features)
    np.save(tmp_path / "train.npy", np.stack([0.5 * shaped, 1.5 * shaped]))
    fused, _ = read(tmp_path / "train.npy", stimuli, "neurobridge")
    check_rows(fused, stimuli, features)
    assert "mean-of-2" in fused.space
    np.save(tmp_path / "image_train.npy", shaped[:, :3])
    with pytest.raises(DataError, match="6 concepts of 3 images, the image list 6 concepts of 4 to 4"):
        read(tmp_path / "image_train.npy", stimuli, "neurobridge")


def test_a_bank_of_another_list_is_found_out_although_it_has_as_many_rows(tmp_path):
    """A wrong image set passes every count; in the THINGS-MEG code of others it shifted the concepts silently."""
    features = make_features()[np.random.default_rng(5).permutation(len(CONCEPTS) * PER_CONCEPT)]
    np.save(tmp_path / "clip_feature_maps_training.npy", features[:, None])
    with pytest.raises(
        DataError, match="does not follow the image list: images of one concept are no more alike"
    ):
        read(tmp_path / "clip_feature_maps_training.npy", make_list(), "nice")


def test_mindeye_rows_are_picked_by_image_number(tmp_path):
    stimuli, features = make_list(), make_features()
    path = tmp_path / "bank.hdf5"
    with h5py.File(path, "w") as file:
        file["clip/tokens"] = np.repeat(features[:, None], 3, axis=1).astype(np.float16)
        file["images"] = np.zeros((24, 3, 8, 8), np.float16)
    bank, _ = read(path, stimuli, "mindeye", network="ViT-L-14/257x768")
    assert bank.vectors.shape == (24, 3, WIDTH)
    np.testing.assert_allclose(bank.vectors[:, 1], features[stimuli.table["nsd_id"]], rtol=1e-3)
    late = StimulusSet(stimuli.table.assign(nsd_id=stimuli.table["nsd_id"] + 1))
    with pytest.raises(
        DataError, match=r"image number 24 of column nsd_id is outside the 24 rows.*counts from 1"
    ):
        read(path, late, "mindeye", network="x")
    with pytest.raises(ConfigError, match=r"holds no array 'z'; it holds clip/tokens, images"):
        read(path, stimuli, "mindeye", network="x", array="z")
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((24, 3, 8, 8), np.float16)
    with pytest.raises(DataError, match="holds pixels"):
        read(path, stimuli, "mindeye", network="x")
    torch.save(torch.from_numpy(features).half(), tmp_path / "bank.pt")
    bank, _ = read(tmp_path / "bank.pt", stimuli, "mindeye", network="x")
    np.testing.assert_allclose(bank.vectors, features[stimuli.table["nsd_id"]], rtol=1e-3)


def test_plain_rows_say_their_order(tmp_path):
    stimuli, features = make_list(), make_features()
    np.save(tmp_path / "x.npy", features)
    names = stimuli.table.sort_values("nsd_id")["stimulus_id"].tolist()
    (tmp_path / "ids.txt").write_text("\n".join(names) + "\n")
    settings = {"network": "x", "ids": tmp_path / "ids.txt"}
    bank, _ = read(tmp_path / "x.npy", stimuli, "rows", **settings)
    check_rows(bank, stimuli, features)
    check_rows(
        read(tmp_path / "x.npy", stimuli, "rows", network="x", row_column="nsd_id")[0], stimuli, features
    )
    few = stimuli.select(stimuli.ids[:5])  # rows of other images may be among them
    np.testing.assert_array_equal(
        read(tmp_path / "x.npy", few, "rows", **settings)[0].vectors, bank.select(few.ids).vectors
    )
    with pytest.raises(ConfigError, match=r"needs target.ids or target.row_column"):
        read(tmp_path / "x.npy", stimuli, "rows", network="x")
    (tmp_path / "ids.txt").write_text("\n".join(["other", *names[1:]]))
    with pytest.raises(DataError, match=f"is missing 1 of 24 images, first '{names[0]}'"):
        read(tmp_path / "x.npy", stimuli, "rows", **settings)
    (tmp_path / "ids.txt").write_text("\n".join(names[:-1]))
    with pytest.raises(DataError, match=r"has 24 rows, but .* names 23 images"):
        read(tmp_path / "x.npy", stimuli, "rows", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layout": "mindeye"}, "layout mindeye needs network"),
        ({"layout": "atm", "ids": "x"}, "ids goes with layout rows"),
        ({"layout": "nice", "row_column": "x"}, "row_column goes with layout rows or mindeye"),
        ({"layout": "eeg2clip"}, "layout"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValidationError, match=message):
        ImportedConfig(**settings)


def test_rows_that_were_never_computed(tmp_path):
    features = make_features()
    features[5] = 0
    np.save(tmp_path / "a.npy", features)
    with pytest.raises(DataError, match="a row of zeros for 'abacus_01s'"):
        read(tmp_path / "a.npy", make_list(), "nice")
    features[5] = np.nan
    np.save(tmp_path / "a.npy", features)
    with pytest.raises(DataError, match="abacus_01s"):
        read(tmp_path / "a.npy", make_list(), "nice")


def test_a_header_that_is_no_python_is_one_sentence(tmp_path):
    """NumPy reads old headers with Python's tokenizer, whose errors came out as a traceback."""
    np.save(tmp_path / "a.npy", np.zeros((4, 3)))
    content = bytearray((tmp_path / "a.npy").read_bytes())
    content[60:128] = b"(" * 68
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match="holds no plain array"):
        read(tmp_path / "a.npy", make_list(), "nice")


def test_a_file_that_holds_code_is_never_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="holds no plain array"):
        read(tmp_path / "a.npy", make_list(), "nice")
    torch.save({"img_features": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="does not hold plain tensors"):
        read(tmp_path / "a.pt", make_list(), "atm")


SMALL = [
    "dataset.n_train=60", "dataset.n_test=20", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100", "encoder.alphas=[1,10,100]", "generator.kind=nearest",
]  # fmt: skip


def test_a_whole_run_with_embeddings_that_someone_holds(tmp_path):
    """Pixels that were computed elsewhere score as the target `pixels` does; their content enters the fingerprint."""
    plain = open_run(read_config("synthetic_digits", SMALL), tmp_path / "plain")
    pipeline.run_all(plain)
    stimuli = pipeline.preprocess(plain).stimuli
    order = np.random.default_rng(0).permutation(len(stimuli))
    vectors = PixelsConfig().build().fit(stimuli.iterate_images()).encode(stimuli.iterate_images())
    np.save(tmp_path / "bank.npy", vectors[order])
    (tmp_path / "ids.txt").write_text("\n".join(stimuli.ids[order]))
    files = f"files: {tmp_path / 'bank.npy'}, ids: {tmp_path / 'ids.txt'}"
    target = f"target={{kind: imported, layout: rows, network: pixels, {files}}}"
    config = read_config("synthetic_digits", [*SMALL, target])
    folder = tmp_path / "run"
    rows = pipeline.run_all(open_run(config, folder))
    (bank,) = pipeline.embed(open_run(config, folder))
    assert bank.embeddings.space == bank.encoder.space
    assert bank.embeddings.space.startswith("rows/pixels/raw/files=")

    def pick(rows):
        return {(r["metric"], r["method"]): r["value"] for r in rows}

    assert pick(rows) == pytest.approx(pick(read_scores(tmp_path / "plain")))
    assert not audit_run(folder).leaks
    before = config.target.hashed_fields()
    np.save(tmp_path / "bank.npy", vectors)
    assert config.target.hashed_fields() != before
    with pytest.raises(ConfigError, match="other images must be encoded"):
        bank.encoder.encode([])


@pytest.mark.shared
def test_real_clip_vectors_find_the_centre_of_their_concept(shared):
    """200 THINGS-EEG2 test images against means over other images of their concepts."""
    folder = shared / "data" / "things_eeg2_clip"
    names = [f"concept{n:03d}" for n in range(200)]  # the files store none
    table = pd.DataFrame(
        {"stimulus_id": names, "concept": names, "path": [f"{n}/{n}.jpg" for n in names], "sha256": ""}
    )
    queries, _ = read(folder / "clip_feature_maps_test.npy", StimulusSet(table), "nice")
    assert "/unit/" in queries.space
    centres = Embeddings(np.load(folder / "center_clip.npy"), names, queries.space)
    ranked = compute_ranks(queries, centres)
    assert (ranked.worst_ranks <= 1).mean() == pytest.approx(0.98, abs=0.001)
    assert (ranked.worst_ranks <= 5).all()
    assert ranked.true_similarities.mean() == pytest.approx(0.890, abs=0.001)
