"""Outputs of anyone's system: the table of a run, one sentence for what does not fit, signs of transduction."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.studies import output_rows, output_signs
from braindecode_vis.parts.studies.output_files import Given, name_values
from braindecode_vis.scoring.retrieval import compute_ranks, compute_similarity

N, D = 24, 16
FEW = {"n_bootstrap": 60, "n_permutations": 60}


@pytest.fixture(scope="module")
def vectors():
    """Predictions of 24 images, right for about half of them, and the targets."""
    rng = np.random.default_rng(0)
    targets = rng.standard_normal((N, D)).astype(np.float32)
    return targets + 1.6 * rng.standard_normal((N, D)).astype(np.float32) + 0.3, targets


def score(*arguments, **options):
    return bdv.score(*arguments, **{**FEW, **options})


def values_of(found):
    rows = found.scores[found.scores["method"] == "decoded"]
    return dict(zip(rows["metric"], rows["value"], strict=True))


# --- the same numbers from every kind of file ---------------------------------------------------------------------


def write(path, array):
    """Write an array as users save it, by suffix."""
    import h5py
    import torch
    from safetensors.numpy import save_file

    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, features=array)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(array), path)
    elif path.suffix == ".safetensors":
        save_file({"features": np.ascontiguousarray(array)}, path)
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["group/features"] = array
    else:
        frame = pd.DataFrame(array, columns=[f"f{k}" for k in range(array.shape[1])])
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors", ".h5", ".parquet", ".csv"])
def test_embeddings_of_every_file_give_the_ranks_of_the_arrays(tmp_path, vectors, suffix):
    predicted, targets = vectors
    expected = compute_ranks(
        Embeddings(predicted, range(N), "t"), Embeddings(targets, range(N), "t"), device="cpu"
    )
    found = score(
        write(tmp_path / f"p{suffix}", predicted), write(tmp_path / f"t{suffix}", targets), n_permutations=9
    )
    assert found.kind == "embeddings"
    assert values_of(found)["top1"] == (expected.worst_ranks == 1).mean()
    assert values_of(found)["mean_rank"] == pytest.approx(expected.ranks.mean())
    assert found.get("top5")["chance"] == pytest.approx(5 / N)
    assert (found.items["first"] == found.items["stimulus_id"]).mean() == values_of(found)["top1"]


def test_a_similarity_matrix_scores_like_its_embeddings(vectors):
    predicted, targets = vectors
    matrix = compute_similarity(
        Embeddings(predicted, range(N), "t"), Embeddings(targets, range(N), "t"), device="cpu"
    )
    embedded, given, far = score(predicted, targets), score(matrix), score(1 - matrix, distances=True)
    assert values_of(embedded) == values_of(given)
    assert values_of(far)["top5"] == values_of(given)["top5"]
    assert given.get("2_way")["p_value"] == embedded.get("2_way")["p_value"]
    order = np.random.default_rng(1).permutation(N)  # columns in another order, named
    turned = score(matrix[:, order], ids=np.arange(N), target_ids=order)
    assert values_of(turned) == values_of(given)
    assert "row k" in " ".join(given.notes).lower()
    assert "tie" in " ".join(given.describe()).lower()


def test_distances_taken_for_similarities_are_noticed(vectors):
    found = score(np.linalg.norm(vectors[0][:, None] - vectors[1][None], axis=-1))
    assert any("distances" in text for text in found.warnings)


def test_half_precision_keeps_its_ties_and_constant_rows_are_told():
    matrix = np.zeros((N, N), np.float16)
    matrix[4:] = np.eye(N)[4:] * 0.5
    found = score(matrix)
    assert any("4 of 24 rows are constant" in note for note in found.notes)
    rows = values_of(found)
    assert rows["top1"] == (N - 4) / N  # ties are lost
    assert rows["2_way"] == pytest.approx((N - 4 + 4 * 0.5) / N)  # and shared


def test_repetitions_in_an_axis_or_by_id_and_their_average(vectors):
    """Intervals resample images, not rows; single trials are beside averaged predictions."""
    predicted, targets = vectors
    rng = np.random.default_rng(2)
    trials = predicted[:, None] + 2 * rng.standard_normal((N, 3, D)).astype(np.float32)
    axis = score(trials, targets)
    ids = pd.DataFrame({"id": np.repeat(np.arange(N), 3)})
    listed = score(trials.reshape(-1, D), targets, ids=ids, target_ids=[str(k) for k in range(N)])
    assert values_of(axis) == values_of(listed)
    averaged = score(trials.mean(axis=1), targets)
    assert values_of(axis)["top1@averaged"] == values_of(averaged)["top1"]
    assert values_of(axis)["top1@instance"] == values_of(axis)["top1"]
    assert axis.get("top1")["resampled"] == "images"
    assert axis.get("top1")["n_queries"] == 3 * N


def test_targets_saved_once_per_trial_are_one_gallery(vectors):
    predicted, targets = vectors
    trials, truth = np.repeat(predicted, 2, axis=0), np.repeat(targets, 2, axis=0)
    found = score(trials, truth)
    assert found.get("top1")["gallery_size"] == N
    assert values_of(found)["top1"] == values_of(score(predicted, targets))["top1"]
    named = score(trials, truth, ids=np.repeat(np.arange(N), 2))
    assert values_of(named) == values_of(found)
    with pytest.raises(DataError, match="two different rows for '0'"):
        score(trials, truth + np.arange(2 * N)[:, None], ids=np.repeat(np.arange(N), 2))
    with pytest.raises(DataError, match="all targets are equal"):
        score(predicted, np.tile(targets[:1], (N, 1)))


def test_subjects_and_groups_of_the_table_are_resampled(vectors):
    predicted, targets = vectors
    both = np.concatenate([predicted, predicted[::-1] + 0.5])
    table = pd.DataFrame({"stimulus_id": [*range(N), *range(N)[::-1]], "subject": np.repeat(["a", "b"], N)})
    found = score(both, targets, ids=table, target_ids=np.arange(N))
    assert set(found.scores["subject"]) == {"a", "b", "all"}
    assert found.get("top1")["resampled"].startswith("no interval: 2 subjects")
    third = np.concatenate([both, predicted + 0.25])
    wider = pd.DataFrame(
        {"stimulus_id": [*table["stimulus_id"], *range(N)], "subject": [*table["subject"], *["c"] * N]}
    )
    three = score(third, targets, ids=wider, target_ids=np.arange(N))
    assert three.get("top1")["resampled"].startswith(f"3 subjects and {N} images (crossed")
    grouped = score(predicted, targets, ids=pd.DataFrame({"id": range(N), "group": np.arange(N) // 4}))
    assert grouped.get("2_way")["resampled"] == "6 groups (t, logit)"


def test_descriptions_are_a_gallery_beside_that_of_images_and_without_it(vectors):
    predicted, targets = vectors
    texts = targets + 0.1
    found, alone = score(predicted, targets, descriptions=texts), score(predicted, descriptions=texts)
    assert values_of(found)["top1@descriptions"] == values_of(alone)["top1"]
    assert values_of(found)["top1@images"] == values_of(found)["top1"]
    assert found.get("top5@fused-ranks")["chance"] == 5 / N
    order = np.random.default_rng(0).permutation(N)
    names = [f"i{k}" for k in range(N)]
    table = pd.DataFrame(texts[order], columns=[f"f{d}" for d in range(D)]).assign(id=np.array(names)[order])
    named = score(predicted, targets, ids=names, target_ids=names, descriptions=table)
    assert values_of(named)["top1@descriptions"] == values_of(found)["top1@descriptions"]
    with pytest.raises(DataError, match=f"describes {N - 1} of {N} items of the gallery, and not"):
        score(predicted, targets, ids=names, target_ids=names, descriptions=table.iloc[1:])
    with pytest.raises(DataError, match="3 descriptions for 24 items"):
        score(predicted, targets, descriptions=texts[:3])
    with pytest.raises(DataError, match="compared in the space of the predictions"):
        score(predicted, targets, descriptions=texts[:, :2])
    with pytest.raises(ConfigError, match="descriptions apply to embeddings, but these are similarity"):
        score(np.eye(N), names, ids=names, descriptions=texts)


def test_text_gallery_and_protocols(vectors):
    predicted, targets = vectors
    texts = targets + 0.1
    concepts = [f"c{k // 2}" for k in range(N)]
    found = score(predicted, targets, text=texts, protocols=["relative_median_rank"])
    ranked = score(predicted, texts)
    assert values_of(found)["top1@text"] == values_of(ranked)["top1"]
    assert "relative_median_rank@fraction" in values_of(found)
    table = pd.DataFrame({"stimulus_id": range(N), "concept": concepts})
    within = score(predicted, targets, ids=table, protocols=["within_concept", "mean_average_precision"])
    assert {"two_way_identification_within_class@gallery", "mean_average_precision@concept"} <= set(
        values_of(within)
    )
    named = pd.DataFrame(targets[::2], columns=[f"f{d}" for d in range(D)]).assign(
        id=[f"c{k}" for k in range(N // 2)]
    )
    assert score(predicted, targets, ids=table, text=named).get("top1@text")["gallery_size"] == N // 2
    with pytest.raises(DataError, match="24 text embeddings for 24 images of 12 concepts"):
        score(predicted, targets, ids=table, text=texts)
    assert found.get("top5@text")["p_value"] == ranked.get("top5")["p_value"]
    assert found.get("median_rank@text")["resampled"] == "images"
    with pytest.raises(ConfigError, match="protocol is 'zero_shot_text'"):
        score(predicted, targets, protocols=["zero_shot_text"])
    corrected = score(predicted, targets, protocols=["transductive"])
    assert "top1@transductive-csls" in values_of(corrected)
    assert "transductive" in corrected.get("top1@transductive-csls")["protocol"]
    assert "transductive" not in corrected.get("top1")["protocol"]
    with pytest.raises(ConfigError, match="compares embeddings, but these are similarities"):
        score(predicted @ targets.T, protocols=["instances"])


# --- classes ------------------------------------------------------------------------------------------------------


def test_classes_from_labels_probabilities_and_one_hot_rows():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = rng.standard_normal((60, 3)) + 1.5 * np.eye(3)[labels]
    decided = logits.argmax(axis=1)
    by_logits = score(logits, labels)
    assert by_logits.kind == "classes"
    assert values_of(by_logits)["accuracy"] == (decided == labels).mean()
    names = np.array(["bird", "cat", "dog"])
    others = [
        score(decided, labels), score(logits.astype(np.float16), np.eye(3, dtype=int)[labels]),
        score(names[decided].tolist(), names[labels].tolist()), score(logits, names[labels]),
        score(logits, labels, target_ids=names.tolist()), score(np.eye(3)[decided], labels.astype(float)),
        score(np.eye(3, dtype=bool)[decided], labels),
    ]  # fmt: skip
    for found in others:
        assert values_of(found)["accuracy"] == values_of(by_logits)["accuracy"]
        assert found.get("accuracy")["p_value"] < 0.05
    assert any("alphabetical" in note for note in others[3].notes)
    table = pd.DataFrame({"id": np.arange(60)[::-1], "label": labels[::-1]})
    assert values_of(score(logits, table, ids=np.arange(60))) == values_of(by_logits)


def test_top_5_of_many_classes_and_classes_of_one_trial():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 12)
    logits = rng.standard_normal((720, 60)) + 1.5 * np.eye(60)[labels]
    found = score(logits, labels)
    expected = [label in np.argsort(-row)[:5] for row, label in zip(logits, labels, strict=True)]
    assert values_of(found)["top5"] == np.mean(expected)
    assert found.get("top5")["chance"] == pytest.approx(5 / 60, abs=0.01)
    assert found.get("top5")["p_value"] < 0.05
    assert values_of(found)["balanced_accuracy"] == pytest.approx(values_of(found)["accuracy"])
    assert found.get("balanced_accuracy")["ci_low"] < values_of(found)["balanced_accuracy"]
    assert values_of(score(np.zeros((720, 60)), labels))["top5"] == 0  # ties are lost
    one_each = score(logits[::12], labels[::12], kind="classes")
    assert one_each.get("accuracy")["ci_high"] - one_each.get("accuracy")["ci_low"] > 0.1
    assert one_each.get("accuracy")["resampled"] == "60 items (t)"


def test_classes_that_do_not_fit_are_one_sentence():
    logits, labels = np.random.default_rng(0).standard_normal((30, 4)), np.arange(30) % 4
    for predictions, truth, options, words in (
        (logits.T, labels, {}, "look transposed"),
        (logits, labels + 1, {}, "columns are counted from 0 to 3"),
        (logits, labels[:20], {}, "20 labels belong neither"),
        (logits, np.array(list("abcde") * 6), {}, "name the class of each column"),
        (
            logits,
            labels,
            {"target_ids": list("abcd"), "ids": [1, 2]},
            "the predictions have 30 rows, but 2 are in",
        ),
        (np.array(list("xy") * 15), labels, {}, "no decoded label is among the true labels"),
        (labels * 0, labels * 0, {}, "classes cannot be distinguished"),
        (logits * np.nan, labels, {}, "non-finite value"),
        (logits[:, :3], np.array([0.5] * 30), {}, "neither an id nor a label"),
        (logits[..., None], labels, {"kind": "classes"}, "a column per class, not the shape"),
        (logits, np.eye(5)[labels], {"kind": "classes"}, "or one of 4 columns, not of shape"),
        (np.eye(4), list("abcd"), {}, "choose with kind"),
    ):
        with pytest.raises((DataError, ConfigError), match=words):
            score(predictions, truth, **options)


def test_counts_of_the_test_set_used_for_decisions_are_told():
    labels = np.repeat(np.arange(12), 5)
    decided = labels.copy()
    decided[[0, 7, 11, 22]] = decided[[7, 11, 22, 0]]
    assert "exactly as often as it occurs" in output_signs.find_balance(decided, labels)[0]
    found = score(decided, labels)
    assert found.transductive
    assert found.scores["protocol"].str.contains("transductive").all()
    decided[0] = decided[1]
    assert not score(decided, labels).transductive


# --- decisions taken together -------------------------------------------------------------------------------------


def test_an_assignment_is_named_transductive(vectors):
    """Hungarian matching lifts these predictions; a sentence says that it is another number."""
    from scipy.optimize import linear_sum_assignment

    predicted, targets = vectors
    matrix = predicted @ targets.T
    honest = score(matrix)
    assert not honest.transductive
    solved = np.zeros((N, N), np.float32)
    solved[linear_sum_assignment(-matrix)] = 1
    boosted = matrix + 1e3 * solved  # the solution inside similarities: every column is first exactly once
    for given in (solved, boosted):
        found = score(given)
        assert found.transductive
        assert "assignment" in found.warnings[0]
        assert found.scores["protocol"].str.contains("transductive").all()
    assert values_of(score(solved))["top1"] > values_of(honest)["top1"]
    # Of two subjects each was solved apart, among further images that nobody saw.
    wide = np.concatenate([boosted, np.zeros((N, 6), np.float32)], axis=1)
    table = pd.DataFrame({"id": [*range(N)] * 2, "subject": np.repeat([1, 2], N)})
    assert score(np.concatenate([wide, wide]), ids=table).transductive
    plain = np.concatenate([matrix, np.zeros((N, 6), np.float32)], axis=1)
    assert not score(np.concatenate([plain, plain]), ids=table).transductive


def test_normalisation_over_queries_is_named():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 40)) + 2 * np.eye(40)
    rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    balanced = np.exp(logits)
    for _ in range(200):
        balanced /= balanced.sum(axis=1, keepdims=True)
        balanced /= balanced.sum(axis=0, keepdims=True)
    columns = np.exp(logits) / np.exp(logits).sum(axis=0)
    scaled = (logits - logits.mean(axis=0)) / logits.std(axis=0)
    assert output_signs.find_matrix_signs(logits) == output_signs.find_matrix_signs(rows) == []
    assert "Sinkhorn" in output_signs.find_matrix_signs(balanced)[0]
    assert "softmax" in output_signs.find_matrix_signs(columns)[0]
    assert "standardised" in output_signs.find_matrix_signs(scaled)[0]
    vectors = rng.standard_normal((40, 8))
    assert output_signs.find_vector_signs(vectors) == []
    assert "centred" in output_signs.find_vector_signs(vectors - vectors.mean(axis=0))[0]


def test_selection_is_stated_or_said_to_be_unknown(vectors):
    assert "outputs do not show" in " ".join(score(*vectors).describe())
    chosen = score(*vectors, selection="test")
    assert "too high" in chosen.warnings[0]
    assert "selection test" in chosen.protocol
    copied = score(vectors[1], vectors[1])
    assert "its own target" in copied.warnings[0]


# --- images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Twelve stimuli in folders of concepts, and noisy reconstructions of another size and format."""
    rng = np.random.default_rng(0)
    stimuli, made = tmp_path / "stimuli", tmp_path / "made"
    made.mkdir()
    for k in range(12):
        image = np.repeat(np.repeat(rng.integers(0, 256, (4, 6, 3), np.uint8), 16, 0), 16, 1)
        folder = stimuli / f"concept{k // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"s{k:02d}.png")
        noisy = (0.6 * image[:, 16:80] + rng.integers(0, 100, (64, 64, 3))).astype(np.uint8)
        Image.fromarray(noisy).resize((32, 32)).save(made / f"s{k:02d}.jpg", quality=95)
    return made, stimuli


def test_folders_of_images_of_unequal_sizes(pictures, tmp_path):
    found = score(*pictures, features=None, out=tmp_path / "out")
    rows = values_of(found)
    assert found.kind == "images"
    assert rows["pixcorr"] > 0.8
    assert rows["two_way_identification"] == 1
    assert "two_way_identification_within_class" in rows
    assert any("32 x 32" in note and "64 x 96" in note for note in found.notes)
    assert "data:image" in (tmp_path / "out" / "score.html").read_text()
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(pictures[0] / "s03.jpg")
    assert "256 x 256" in score(*pictures, features=None, size=None, n_permutations=3).protocol


def test_large_images_are_scored_into_the_same_folder_again(pictures, tmp_path):
    for path in sorted([*pictures[0].iterdir(), *pictures[1].rglob("*.png")]):
        if int(path.stem[1:]) < 3:
            Image.open(path).resize((270, 270)).save(path)
        else:
            path.unlink()
    for _ in range(2):
        score(*pictures, features=None, n_permutations=3, out=tmp_path / "out")
    assert any((tmp_path / "out" / "score_images").iterdir())


def test_draws_are_scored_one_round_at_a_time(pictures):
    made, stimuli = pictures
    for path in sorted(made.iterdir()):
        image = Image.open(path)
        image.save(made / f"{path.stem}_0.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(made / f"{path.stem}_1.png")
        path.unlink()
    found = score(made, stimuli, features=None)
    assert "mean of 2 draws" in found.protocol
    (made / "s03_1.png").unlink()
    with pytest.raises(DataError, match=r"'s03' has 1 reconstruction\(s\) and 's00' has 2"):
        score(made, stimuli, features=None)


def test_folders_that_do_not_match_are_one_sentence(pictures, tmp_path):
    made, stimuli = pictures
    tested = tmp_path / "tested.txt"
    (made / "s11.jpg").unlink()
    with pytest.raises(DataError, match="1 of 12 stimuli have no reconstruction, first 's11'"):
        score(made, stimuli)
    tested.write_text("\n".join(f"s{k:02d}.png" for k in range(11)))
    assert len(score(made, stimuli, ids=tested, features=None).items) == 11
    (made / "s01.jpg").rename(made / "1.jpg")
    with pytest.raises(DataError, match="have no stimulus of the same name, first '1'"):
        score(made, stimuli)
    (made / "1.jpg").write_bytes(b"no image")
    (made / "1.jpg").rename(made / "s01.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        score(made, stimuli, ids=tested)
    with pytest.raises(DataError, match="give both as folders"):
        score(made, np.eye(3))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        score(tmp_path / "none", stimuli)


# --- what does not fit --------------------------------------------------------------------------------------------


def test_rows_that_do_not_belong_together_are_one_sentence(vectors):
    predicted, targets = vectors
    other = targets[:, :9]
    ids = [f"img_{k:03d}" for k in range(N)]
    broken = predicted.copy()
    broken[3, 2] = np.nan
    for arguments, options, words in (
        ((predicted.T, targets), {}, "look transposed"),
        ((predicted, other), {}, "do not match"),
        ((predicted[:20], targets), {}, "20 predictions and 24 targets: without ids"),
        (
            (predicted, targets),
            {"ids": ids, "target_ids": [f"{i}.jpg" for i in ids]},
            r"is it 'img_000.jpg'\?",
        ),
        (
            (predicted, targets),
            {"ids": [f"{k:04d}" for k in range(N)], "target_ids": np.arange(N)},
            r"is it '0'\?",
        ),
        ((predicted, targets), {"ids": np.roll(np.arange(N), 1)}, "another order"),
        ((predicted[:9], targets), {"ids": np.arange(9) + 16}, "run from 1 to 24"),
        ((predicted[:9], targets), {"ids": ids[:9]}, "targets have no ids"),
        ((predicted, targets), {"ids": ids, "target_ids": ids[:-1]}, "have 24 rows, but 23 are in"),
        ((broken, targets), {}, "non-finite"),
        ((predicted, targets * (np.arange(N) > 0)[:, None]), {}, "norm 0"),
        ((predicted, targets[:, :, None]), {}, "do not match"),
        ((np.ones((30, 20)),), {"ids": np.arange(20)}, "look transposed"),
        ((np.ones((30, 20)),), {"target_ids": range(20)}, "without ids"),
        ((np.ones((N, N)) * np.inf,), {}, "non-finite"),
        ((np.ones((3, N, N)),), {}, "two dimensions"),
        ((predicted[:1], targets[:1]), {}, "a single candidate"),
        ((predicted,), {}, "without targets, 24 rows and 16 columns are read as similarities"),
        ((predicted, targets), {"size": 64}, "apply to folders of images"),
        ((predicted, targets), {"features": "engineered"}, "apply to folders of images"),
        ((predicted, targets), {"kind": "pictures"}, "kind is 'pictures'"),
        ((predicted, targets), {"selection": "best"}, "selection is 'best'"),
        ((predicted, targets), {"distances": True}, "applies to a matrix"),
        ((predicted,), {"kind": "embeddings"}, "give these as targets"),
        ((np.array(3.0), targets), {}, "nothing in the predictions"),
        (([[1, 2], [3]], targets), {}, "different lengths"),
        ((object(), targets), {}, "give a path"),
    ):
        with pytest.raises((DataError, ConfigError), match=words) as error:
            score(*arguments, **options)
        assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_safely_are_one_sentence(tmp_path, vectors):
    import pickle

    import torch

    files = {
        "a.pkl": b"", "b.npy": pickle.dumps([1, 2]), "c.npy": b"", "d.pt": b"no tensors", "e.safetensors": b"x" * 20,
        "f.h5": b"no hdf5", "g.npz": b"no archive", "h.parquet": b"no table", "i.mat": b"x", "j.txt": b"",
        "k.txt": b"\xff\xfe\xfa",
        "l.csv": b"", "m.json": b"{",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "n.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", a=np.eye(3), b=np.eye(3))
    torch.save({"img_features": torch.eye(3), "text_features": torch.eye(3)}, tmp_path / "p.pt")
    np.save(tmp_path / "q.npy", np.eye(3) * 1j)
    torch.save({"model": {"a": torch.eye(3)}}, tmp_path / "r.pt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError) as error:
            score(path, vectors[1])
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"choose one, as in p\.pt::img_features"):
        score(tmp_path / "p.pt")
    with pytest.raises(DataError, match=r"no array 'img_feature' \(did you mean 'img_features'\?\)"):
        score(f"{tmp_path / 'p.pt'}::img_feature")
    assert score(f"{tmp_path / 'p.pt'}::img_features").kind == "similarity"
    torch.save(list(torch.eye(12)), tmp_path / "rows.pt")
    assert score(tmp_path / "rows.pt").kind == "similarity"
    with pytest.raises(DataError, match="were not found"):
        score(tmp_path / "none.npy")


def test_values_become_names():
    assert (
        name_values(np.array([7, 12], np.int16)).tolist() == name_values([7.0, 12.0]).tolist() == ["7", "12"]
    )
    assert name_values(np.array([b"a", b"b"])).tolist() == ["a", "b"]
    assert name_values(["007 ", "cat"]).tolist() == ["007", "cat"]


# --- files that come out ------------------------------------------------------------------------------------------


def test_json_csv_and_table_hold_the_same_numbers(tmp_path, vectors):
    found = score(*vectors, out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["scores"] == found.list_rows()
    assert written["transductive"] is False
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    for row, own in zip(table.to_dict("records"), written["scores"], strict=True):
        assert row["metric"] == own["metric"]
        assert row["value"] == own["value"]
        assert (own["p_value"] is None) == pd.isna(row["p_value"])
    page = (tmp_path / "out" / "score.html").read_text()
    assert all(word in page for word in ("Hubs", "outputs do not show", "not found in top-k", "Items"))
    score(*vectors, out=tmp_path / "out")  # the same scores may lie there
    with pytest.raises(DataError, match="holds scores of other outputs"):
        score(vectors[0] + 1, vectors[1], out=tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        score(*vectors, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_the_verb_prints_the_table_and_refuses_with_one_sentence(
    tmp_path, vectors, monkeypatch, command_line
):
    for name, array in zip(("p.npy", "t.npy"), vectors, strict=True):
        np.save(tmp_path / name, array)

    monkeypatch.chdir(tmp_path)

    def call(*words):
        return command_line("score", *words)

    done = call("p.npy", "--targets", "t.npy", "--permutations", 50, "--json", "--out", "out")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["scores"] == json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    done = call("p.npy", "--targets", "t.npy", "--permutations", 50)
    assert re.search(r"top1 .* 0\.0\d+ ", done.stdout)
    assert "Ties:" in done.stdout
    done = call("p.npy", "--targets", "none.npy")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the targets were not found")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("n_draws", [1, 3])
def test_images_are_found_by_the_names_of_their_stimuli(tmp_path, n_draws):
    """One image of each stimulus is one row; several are its draws."""
    pictures, made = {}, {}
    for number, name in enumerate("abcd"):
        pictures[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(pictures[name])
        for draw in range(n_draws):
            key = name if n_draws == 1 else f"{name}_{draw}"
            made[key] = tmp_path / f"made_{key}.png"
            Image.new("RGB", (8, 8), (10 * number, draw, 200)).save(made[key])
    given, true = (Given(name, pictures=files) for name, files in (("made", made), ("true", pictures)))
    seen, found, size, _, _ = output_rows.find_images(given, true, ["d", "b", "a"], None)
    assert (size, seen.shape[:3], found.ndim) == ((8, 8), (3, 8, 8), 4 if n_draws == 1 else 5)
    assert np.asarray(seen[:])[:, 0, 0, 0].tolist() == [30, 10, 0]
    rows = np.asarray(found[:]).reshape(3, n_draws, 8, 8, 3)
    assert rows[:, :, 0, 0, 0].tolist() == [[n] * n_draws for n in (30, 10, 0)]
    assert rows[:, :, 0, 0, 1].tolist() == [list(range(n_draws))] * 3


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_columns_that_were_centred_are_known_at_any_size(size):
    values = size * np.random.default_rng(0).normal(size=(40, 40)) * np.linspace(1, 2, 40)
    centred = values - values.mean(axis=0)
    assert output_signs.find_matrix_signs(values) == []
    assert "it was centred with the test queries" in output_signs.find_matrix_signs(centred)[0]
    assert "it was standardised" in output_signs.find_matrix_signs(size * centred / centred.std(axis=0))[0]
    centred[:, 3] = 0  # a column that says nothing
    assert output_signs.find_matrix_signs(centred) == []
