"""Scores of attributes and dimensions that a target is made of."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.attribute_table import TargetParts, read_attributes
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.target_scores import (
    TargetTask,
    compute_reliability,
    score_target,
    weigh_correlations,
)

N_TRAIN, N_TEST = 90, 60
IDS = [f"i{n:03d}" for n in range(N_TRAIN + N_TEST)]


def make_task(parts, vectors, noise, *, subjects=("01",), concepts=None, seed=0, **options):
    """Return a task whose predictions are the true embeddings plus white noise."""
    generator = np.random.default_rng(seed)
    bank = Embeddings(vectors.astype(np.float32), IDS, "toy")
    test = IDS[N_TRAIN:]
    ids = np.array(test * len(subjects), dtype=object)
    true = bank.select(list(ids)).vectors
    predicted = true + noise * generator.standard_normal(true.shape)
    concept_of = dict(zip(IDS, IDS if concepts is None else concepts, strict=True))
    return TargetTask(
        parts=parts, predicted=[Embeddings(predicted.astype(np.float32), ids, "toy")], banks=[bank],
        training=[IDS[:N_TRAIN]], ids=ids, concepts=np.array([concept_of[i] for i in ids], dtype=object),
        subjects=np.repeat(np.array(subjects, dtype=object), N_TEST), concept_of=concept_of, protocol="toy",
        split="test", seed=seed, n_bootstrap=300, n_permutations=300, **options,
    )  # fmt: skip


def make_attribute_task(folder, noise, **options):
    """Return a task of one token that tells three values, and one that tells nothing."""
    codes = np.arange(len(IDS)) % 3
    coin = np.random.default_rng(3).integers(0, 2, len(IDS))
    table = pd.DataFrame(
        {
            "id": IDS,
            "colour": [("blue", "green", "red")[c] for c in codes],
            "coin": [("heads", "tails")[c] for c in coin],
        }
    )
    table.loc[len(IDS) - 1, "colour"] = ""
    table.to_csv(folder / "attributes.csv", index=False)
    attributes = read_attributes(folder / "attributes.csv")
    tokens = np.random.default_rng(4).standard_normal((len(IDS), 2, 3))
    tokens[:, 0] = np.eye(3)[codes]
    return make_task(TargetParts(attributes.names, attributes), tokens, noise, **options), codes


def find(scores, metric, method="decoded", subject="01"):
    return next(s for s in scores if (s.metric, s.method, s.subject) == (metric, method, subject))


def test_what_is_in_the_answer_is_decoded_and_nothing_else(tmp_path):
    task, codes = make_attribute_task(tmp_path, 0.7)
    scores, lacking = score_target(task)
    assert not lacking
    colour, coin = find(scores, "balanced_accuracy@colour"), find(scores, "balanced_accuracy@coin")
    # The slow way: the nearest training mean, one image at a time.
    tokens = task.banks[0].vectors[:N_TRAIN, 0].astype(float)
    mean = tokens.mean(axis=0)
    means = [tokens[codes[:N_TRAIN] == code].mean(axis=0) - mean for code in range(3)]
    decided = []
    for row in (
        task.predicted[0].vectors[:-1, 0].astype(float) - mean
    ):  # the value of the last image is unknown
        decided.append(int(np.argmax([row @ m / np.linalg.norm(row) / np.linalg.norm(m) for m in means])))
    assert colour.value == pytest.approx(balanced_accuracy_score(codes[N_TRAIN:-1], decided))
    assert colour.n_queries == N_TEST - 1
    assert colour.chance == pytest.approx(1 / 3, abs=0.02)
    assert colour.ci_low < colour.value < colour.ci_high
    assert colour.p_value < 0.01
    assert colour.resampled == "images"
    assert coin.ci_low < 0.5 < coin.ci_high
    assert coin.p_value > 0.05
    assert find(scores, "balanced_accuracy@colour", "oracle").value == 1.0
    assert colour.protocol.endswith("p by Holm over 2 attributes")


def test_several_subjects_are_averaged_and_images_of_a_concept_are_one(tmp_path):
    concepts = [f"c{n // 6}" for n in range(len(IDS))]
    task, _ = make_attribute_task(tmp_path, 0.7, subjects=("01", "02"), concepts=concepts)
    scores, _ = score_target(task)
    own = [find(scores, "balanced_accuracy@colour", subject=s).value for s in ("01", "02")]
    assert find(scores, "balanced_accuracy@colour", subject="all").value == pytest.approx(np.mean(own))
    # Where all images of a concept share the value, they are drawn and exchanged together.
    codes = np.array([int(c[1:]) % 3 for c in concepts])
    rows = np.arange(N_TEST)
    assert task.find_units(codes[N_TRAIN:], rows).unit == "concept"
    assert task.find_units(np.arange(N_TEST) % 3, rows).unit == "image"


def test_an_attribute_that_test_images_do_not_show_is_said(tmp_path):
    task, _ = make_attribute_task(tmp_path, 0.1)
    table = task.parts.attributes
    codes = table.codes.copy()
    codes[N_TRAIN:, 0] = 0
    unseen = replace(table, codes=codes)
    scores, lacking = score_target(replace(task, parts=TargetParts(unseen.names, unseen)))
    assert {s.metric for s in scores} == {"balanced_accuracy@coin"}
    assert "balanced_accuracy@colour not computed: fewer than two of its values" in lacking[0]


def test_dimensions_are_correlated_one_by_one():
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((len(IDS), 4))
    vectors[:N_TRAIN, 2] = 1.0  # never varies in training
    task = make_task(TargetParts(("a", "b", "c", "d")), vectors, 0.0)
    predicted = task.predicted[0].vectors.copy()
    predicted[:, 0] += generator.standard_normal(N_TEST)  # a is noisy, b is noise, d is exact
    predicted[:, 1] = generator.standard_normal(N_TEST)
    halves = np.stack([predicted + generator.standard_normal(predicted.shape) * 0.3 for _ in range(6)])
    halves = halves.reshape(3, 2, *predicted.shape)
    task = replace(task, predicted=[Embeddings(predicted, task.ids, "toy")], halves=halves)
    scores, lacking = score_target(task)
    assert lacking == ["dimension_correlation@c not computed: it is the same for all training images."]
    true = vectors[N_TRAIN:].astype(np.float32)
    for name, column in (("a", 0), ("b", 1), ("d", 3)):
        score = find(scores, f"dimension_correlation@{name}")
        assert score.value == pytest.approx(
            np.corrcoef(predicted[:, column], true[:, column])[0, 1], abs=1e-6
        )
        assert score.chance == pytest.approx(0, abs=0.05)
        assert (score.p_value < 0.05) == (name != "b")
        assert 0.8 < score.noise_ceiling <= 1
        assert score.ci_low <= score.value <= score.ci_high
    mean = np.mean([find(scores, f"dimension_correlation@{name}").value for name in "abd"])
    assert find(scores, "dimension_correlation").value == pytest.approx(mean)
    none, why = score_target(
        replace(task, banks=[Embeddings(np.ones((len(IDS), 4), np.float32), IDS, "toy")])
    )
    assert not none
    assert why == [
        "dimension_correlation not computed: no dimension varies among training images and test images."
    ]


def test_dimensions_of_several_subjects_are_means_of_each():
    generator, subjects = np.random.default_rng(0), ("01", "02", "03")
    vectors = generator.standard_normal((len(IDS), 2))
    noise = np.repeat([[0.5, 4.0], [1.0, 4.0], [2.0, 4.0]], N_TEST, axis=0)  # of a and b in each subject
    task = make_task(TargetParts(("a", "b")), vectors, noise, subjects=subjects)
    predicted = task.predicted[0].vectors.astype(float)
    halves = predicted + noise / 2 * generator.standard_normal((2, 2, *predicted.shape))
    scores, _ = score_target(replace(task, halves=halves))
    rows = [slice(n * N_TEST, (n + 1) * N_TEST) for n in range(len(subjects))]
    own = np.array([np.diag(np.corrcoef(predicted[r].T, vectors[N_TRAIN:].T)[:2, 2:]) for r in rows])
    ceilings = np.array([compute_reliability(halves[:, :, r]) for r in rows])
    for subject, values in zip(subjects, own, strict=True):
        found = find(scores, "dimension_correlation", subject=subject)
        assert found.value == pytest.approx(values.mean(), abs=1e-6)
    for metric, column in (("@a", [0]), ("@b", [1]), ("", [0, 1])):
        found = find(scores, f"dimension_correlation{metric}", subject="all")
        assert found.value == pytest.approx(own[:, column].mean(), abs=1e-6)
        assert found.noise_ceiling == pytest.approx(np.sqrt(ceilings[:, column].mean()))
        assert found.resampled == "3 subjects and 60 images (crossed)"


def test_chance_of_dimensions_holds_where_concepts_are_shown_several_times():
    """Images of a concept share their row, so exchanging images would call noise that concepts share an effect."""
    concepts = [f"c{n // 6:02d}" for n in range(len(IDS))]
    found = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        vectors = np.repeat(generator.standard_normal((len(IDS) // 6, 1)), 6, axis=0)
        task = make_task(TargetParts(("a",)), vectors, 0.0, concepts=concepts)
        shared = np.repeat(generator.standard_normal((N_TEST // 6, 1)), 6, axis=0).astype(np.float32)
        scores, _ = score_target(
            replace(task, predicted=[Embeddings(shared, task.ids, "toy")], n_bootstrap=20)
        )
        found.append(find(scores, "dimension_correlation@a").p_value)
    assert np.mean(np.array(found) < 0.05) < 0.2  # 0.05 expected; images exchanged one by one give above 0.4


def test_a_ceiling_is_the_root_of_the_reliability():
    generator = np.random.default_rng(0)
    truth = generator.standard_normal((4000, 2))
    spread = np.array([1.0, 2.0])
    halves = truth + spread * generator.standard_normal((4, 2, *truth.shape))
    # The mean of two halves has half their noise: reliability 1 / (1 + spread ** 2 / 2).
    np.testing.assert_allclose(compute_reliability(halves), 1 / (1 + spread**2 / 2), atol=0.02)
    # Noise is reliable by 0 on average: 2000 dimensions with a standard deviation of .3 fix it to .007.
    assert compute_reliability(generator.standard_normal((1, 2, 50, 2000))).mean() == pytest.approx(
        0, abs=0.04
    )


def test_weighted_correlations_are_those_of_repeated_rows():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 7, 2)) + 1e4
    weights = generator.integers(0, 3, (3, 7))
    weights[:, :2] += 1
    slow = [
        [np.corrcoef(np.repeat(x[:, k], w), np.repeat(y[:, k], w))[0, 1] for k in range(2)] for w in weights
    ]
    np.testing.assert_allclose(weigh_correlations(x, y, weights), slow, atol=1e-6)


def test_a_run_scores_the_attributes_of_its_target(tmp_path):
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    table = pd.DataFrame(
        {"concept": digits, "round": ["yes", "no", "no", "yes", "no", "no", "yes", "no", "yes", "yes"]}
    )
    table.to_csv(tmp_path / "table.csv", index=False)
    overrides = [
        "dataset.n_train=60", "dataset.n_test=20", "dataset.n_voxels=24", "evaluation.n_bootstrap=100",
        "evaluation.n_permutations=100", "encoder.alphas=[10]", "generator={kind: nearest}", "prior={kind: identity}",
        f"target={{kind: conditional, attributes: {tmp_path}/table.csv, base: {{kind: pixels}}}}",
    ]  # fmt: skip
    rows = pipeline.evaluate(open_run(read_config("synthetic_digits", overrides), tmp_path / "run"))
    found = {row["method"]: row for row in rows if row["metric"] == "balanced_accuracy@round"}
    assert set(found) == {"decoded", "shuffled", "oracle"}
    assert found["decoded"]["value"] > found["decoded"]["chance"] + 0.2
    assert found["decoded"]["resampled"].endswith(" concepts (t)")  # all images of a digit share the value


@pytest.mark.parametrize("subjects", [("01",), ("01", "02", "03")])
def test_dimensions_after_folds_have_wider_intervals_and_nulls(subjects):
    """The same predictions, once of one test set and once of two folds."""
    vectors = np.random.default_rng(0).standard_normal((N_TRAIN + N_TEST, 2))
    task = make_task(TargetParts(("a", "b"), None), vectors, 4.0, subjects=subjects)
    whole, rows = task.predicted[0], np.arange(len(task.ids))
    half = len(rows) // 2
    parts = [
        Embeddings(whole.vectors[part], whole.ids[part], whole.space) for part in (rows[:half], rows[half:])
    ]
    folds = replace(task, predicted=parts, banks=task.banks * 2, training=[*task.training] * 2)
    subject = "all" if len(subjects) > 1 else "01"
    one, other = (
        find(score_target(each)[0], "dimension_correlation", subject=subject) for each in (task, folds)
    )
    assert (one.value, one.chance) == (other.value, other.chance)
    assert other.resampled == f"{one.resampled}, widened by sqrt 2 after folds"
    assert other.ci_low - other.value == pytest.approx(2**0.5 * (one.ci_low - one.value))
    assert other.p_value >= one.p_value
