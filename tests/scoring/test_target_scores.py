"""Scores of the attributes that a target is made of."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.attribute_table import read_attributes
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.target_scores import TargetTask, score_target

N_TRAIN, N_TEST = 90, 60
IDS = [f"i{n:03d}" for n in range(N_TRAIN + N_TEST)]


def make_task(table, vectors, noise, *, subjects=("01",), concepts=None, seed=0, **options):
    """Return a task whose predictions are the true embeddings plus white noise."""
    generator = np.random.default_rng(seed)
    bank = Embeddings(vectors.astype(np.float32), IDS, "toy")
    test = IDS[N_TRAIN:]
    ids = np.array(test * len(subjects), dtype=object)
    true = bank.select(list(ids)).vectors
    predicted = true + noise * generator.standard_normal(true.shape)
    concept_of = dict(zip(IDS, IDS if concepts is None else concepts, strict=True))
    return TargetTask(
        table=table, predicted=[Embeddings(predicted.astype(np.float32), ids, "toy")], banks=[bank],
        training=[IDS[:N_TRAIN]], ids=ids, concepts=np.array([concept_of[i] for i in ids], dtype=object),
        subjects=np.repeat(np.array(subjects, dtype=object), N_TEST), concept_of=concept_of, protocol="toy",
        split="test", seed=seed, n_bootstrap=300, n_permutations=300, **options,
    )  # fmt: skip


def make_attribute_task(folder, noise, **options):
    """Return a task of one token that shows three values, and one that shows nothing."""
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
    return make_task(attributes, tokens, noise, **options), codes


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
    table = task.table
    codes = table.codes.copy()
    codes[N_TRAIN:, 0] = 0
    scores, lacking = score_target(replace(task, table=replace(table, codes=codes)))
    assert {s.metric for s in scores} == {"balanced_accuracy@coin"}
    assert "balanced_accuracy@colour not computed: fewer than two of its values" in lacking[0]


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
