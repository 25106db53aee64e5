"""Captions in a run: what was seen, the caption of the nearest training image, and what lacks weights."""

from dataclasses import replace

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.scoring import caption_scores
from braindecode_vis.scoring.caption_scores import (
    CaptionScoresConfig,
    CaptionTask,
    score_caption_task,
    score_captions,
)
from braindecode_vis.scoring.metrics import caption_metrics as captions
from braindecode_vis.scoring.uncertainty import permutation_test, widen_null


def make_task(folder, *, subjects=("01",) * 3, references=None, **changes):
    lines = ["id,caption", "t0,a red car", "t1,the cat sat", "t2,grass"]
    lines += references or ["q0,a red car", "q1,the cat", "q2,a dog on grass"]
    (folder / "bank.csv").write_text("\n".join(lines) + "\n")
    offset = np.full(4, 50.0)  # a common mean, which must be taken off before the cosine
    training = Embeddings(offset + np.eye(3, 4), ["t0", "t1", "t2"], "toy")
    ids = ["q0", "q1", "q2"]
    predicted = Embeddings(offset + 0.2 * np.eye(3, 4)[[0, 1, 0]], ids, "toy")
    true = Embeddings(offset + np.eye(3, 4), ids, "toy")
    seen = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    config = CaptionScoresConfig(bank=folder / "bank.csv", device="cpu", **changes)
    images = {"decoded": np.stack([seen, seen[[1, 1, 1]]], axis=1), "mean_image": seen}
    return CaptionTask(
        config, [predicted], [true], [training], np.array(ids, dtype=object), np.array(subjects, dtype=object),
        seen, images, "toy", "test", 0, 200,
    )  # fmt: skip


def test_nearest_captions_are_scored_beside_those_of_the_true_embedding(tmp_path):
    task = make_task(tmp_path)
    found = score_caption_task(task)
    rows = {(s.method, s.metric): s for s in found.scores}
    assert {metric for _, metric in rows} == {
        "rouge1@nearest-caption",
        "rougeL@nearest-caption",
        "meteor_exact@nearest-caption",
    }
    assert found.texts["decoded"] == ["a red car", "the cat sat", "a red car"]
    assert found.texts["seen"] == ["a red car", "the cat", "a dog on grass"]
    decoded, oracle = (rows[m, "rouge1@nearest-caption"] for m in ("decoded", "oracle"))
    assert decoded.value == pytest.approx(np.mean([1, 0.8, 2 / 7]))
    assert oracle.value > decoded.value > decoded.chance
    assert decoded.n_queries == 3
    assert len(task.config.not_computed) == 2
    assert "sentence_similarity not computed" in task.config.not_computed[1]


def test_a_sentence_encoder_adds_the_similarity_of_meaning(tmp_path, monkeypatch):
    opened = []

    class Words(captions.SentenceEncoder):
        """Which of five words there are, on unit length."""

        def __init__(self, folder, *, device):
            opened.append((folder, device))

        def encode(self, texts):
            words = ("red", "car", "cat", "dog", "grass")
            counts = np.array([[word in text.split() for word in words] for text in texts])
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    monkeypatch.setattr(caption_scores, "SentenceEncoder", Words)
    task = make_task(tmp_path, sentence_encoder=tmp_path / "minilm")
    rows = {(s.method, s.metric): s.value for s in score_caption_task(task).scores}
    assert opened == [(tmp_path / "minilm", "cpu")]
    # "a red car" of itself, "the cat sat" of "the cat", "a red car" of "a dog on grass"
    assert rows["decoded", "sentence_similarity@nearest-caption"] == pytest.approx((1 + 1 + 0) / 3)
    assert not any("sentence_similarity" in line for line in task.config.not_computed)
    with pytest.raises(ConfigError, match=r"captions\.sentence_encoder names .* not a folder"):
        task.config.hashed_fields()
    with pytest.raises(ConfigError, match=r"captions\.sentence_encoder names .* has no config\.json"):
        task.config.check_files()
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text("{}")
    task.config.check_files()
    assert task.config.hashed_fields()["sentence_encoder_digest"]


def test_written_captions_are_averaged_over_draws(tmp_path, monkeypatch):
    """Each distinct image is described once, and a round of draws never helps another."""
    folder = tmp_path / "git-toy"
    folder.mkdir()
    described = []

    def describe(images, weights, **how):
        described.append(len(images))
        return [{0: "a red car", 1: "the cat", 2: "grass"}[int(image[0, 0, 0])] for image in images]

    monkeypatch.setattr("braindecode_vis.scoring.caption_scores.caption_images", describe)
    found = score_caption_task(make_task(tmp_path, captioner=folder))
    assert described == [3]
    row = next(s for s in found.scores if s.metric == "rouge1@git-toy" and s.method == "decoded")
    assert row.value == pytest.approx(np.mean([np.mean([1, 1, 0.4]), np.mean([0, 1, 0])]))
    assert found.texts["decoded"][2] == "grass (git-toy) | a red car (nearest-caption)"


def test_several_subjects_are_scored_apart_and_together(tmp_path):
    found = score_caption_task(make_task(tmp_path, subjects=("01", "01", "02")))
    assert {s.subject for s in found.scores} == {"01", "02", "all"}


def test_missing_references_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="no caption for the test image q2"):
        score_caption_task(make_task(tmp_path, references=["q0,a", "q1,b"]))
    with pytest.raises(ConfigError, match=r"captions\.captioner names"):
        CaptionScoresConfig(bank=tmp_path / "bank.csv", captioner=tmp_path / "none").hashed_fields()
    with pytest.raises(ConfigError, match=r"captions\.bank names"):
        CaptionScoresConfig(bank=tmp_path / "none.csv").hashed_fields()
    fields = make_task(tmp_path).config.hashed_fields()
    assert fields["captioner_digest"] is None
    assert "bank" not in fields
    assert caption_scores.NEAREST == "nearest-caption"


def make_large_task(folder, *, n=12, n_people=1, informative=True):
    """Every prediction is near the training image whose caption is that of its own stimulus, or of a random one."""
    words = [f"word{k} and word{k + 1}" for k in range(n)]
    lines = [
        "id,caption",
        *(f"t{k},{w}" for k, w in enumerate(words)),
        *(f"q{k},{w}" for k, w in enumerate(words)),
    ]
    (folder / "bank.csv").write_text("\n".join(lines) + "\n")
    order = np.arange(n) if informative else np.random.default_rng(0).permutation(n)
    rows = np.tile(np.arange(n), n_people)
    ids = np.array([f"q{k}" for k in rows], dtype=object)
    predicted = Embeddings(np.eye(n)[order[rows]], list(ids), "toy")
    seen = np.zeros((len(rows), 4, 4, 3), np.uint8)
    return CaptionTask(
        CaptionScoresConfig(bank=folder / "bank.csv", device="cpu"), [predicted],
        [Embeddings(np.eye(n)[rows], list(ids), "toy")], [Embeddings(np.eye(n), [f"t{k}" for k in range(n)], "toy")],
        ids, np.repeat([f"{who:02d}" for who in range(n_people)], n).astype(object), seen, {"decoded": seen}, "toy",
        "test", 0, 200, 999,
    )  # fmt: skip


def test_rows_of_the_decoded_system_have_a_p_value(tmp_path):
    decoded = [s for s in score_caption_task(make_large_task(tmp_path)).scores if s.method == "decoded"]
    assert [s.p_value for s in decoded] == [0.001] * 3
    by_hand = np.mean([[captions.rouge_1(f"word{i} and word{i + 1}", f"word{k} and word{k + 1}") for i in range(12)]
                       for k in range(12)])  # fmt: skip
    assert decoded[0].chance == pytest.approx(by_hand)
    noise = score_caption_task(make_large_task(tmp_path, informative=False)).scores
    assert all(s.p_value > 0.05 for s in noise if s.method == "decoded")
    assert all(s.p_value is None for s in noise if s.method == "oracle")


def test_captions_of_several_folds_have_wider_intervals_and_nulls(tmp_path):
    task = make_large_task(tmp_path, n=16)
    half = len(task.ids) // 2

    def cut(embeddings):
        return [embeddings.select(list(task.ids[rows])) for rows in (slice(None, half), slice(half, None))]

    folds = replace(
        task, predicted=cut(task.predicted[0]), true=cut(task.true[0]), training=[*task.training] * 2
    )
    for one, other in zip(*[score_caption_task(each).scores for each in (task, folds)], strict=True):
        assert (one.metric, one.value, one.chance) == (other.metric, other.value, other.chance)
        assert other.resampled == f"{one.resampled}, widened by sqrt 2 after folds"
        rounding = 1e-12  # of intervals without width
        assert other.ci_high - other.ci_low >= one.ci_high - one.ci_low - rounding
        assert (one.p_value is None) == (other.p_value is None)
        assert one.p_value is None or other.p_value >= one.p_value


def test_people_who_saw_the_same_stimuli_are_no_further_evidence(tmp_path):
    """Eight people with one and the same chance finding: were rows permuted, its p-value would shrink with them."""
    one, many = (
        score_caption_task(make_large_task(tmp_path, n=6, n_people=people, informative=False)).scores
        for people in (1, 8)
    )
    alone = {s.metric: s.p_value for s in one if s.method == "decoded"}
    pooled = {s.metric: s.p_value for s in many if s.method == "decoded" and s.subject == "all"}
    assert pooled == pytest.approx(alone)


def test_large_tables_of_captions_are_permuted_in_blocks(tmp_path, monkeypatch):
    whole = [s for s in score_caption_task(make_large_task(tmp_path)).scores if s.method == "decoded"]
    monkeypatch.setattr(caption_scores, "LARGEST_TEXT_TABLE", 12 * 4)
    compared = []
    rouge = captions.rouge_1
    monkeypatch.setitem(captions._WORD_METRICS, "rouge1", lambda r, c: compared.append(r) or rouge(r, c))
    parts = [s for s in score_caption_task(make_large_task(tmp_path)).scores if s.method == "decoded"]
    assert len(compared) < 12 * 12
    assert [s.value for s in parts] == [s.value for s in whole]
    assert all(0.001 <= s.p_value < 0.05 for s in parts)


def test_captions_of_several_folds_have_a_wider_null_and_wider_limits():
    """The null of tables is widened by sqrt 2, as captions of folds that train each other vary more."""
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "car", "cat", "grass", "tree", "sky", "dog"])
    texts = [" ".join(rng.permutation(words)[:4]) for _ in range(12)]
    made = [
        " ".join([*text.split()[: 1 + n % 2], *rng.permutation(words)[:3]]) for n, text in enumerate(texts)
    ]
    tables = captions.tabulate_captions([[text] for text in texts], made)
    options = {
        "method": "decoded", "protocol": "toy", "subject": "01", "split": "test", "seed": 0, "n_boot": 200,
        "null": caption_scores.CaptionNull(tables, np.arange(12), n_permutations=500),
    }  # fmt: skip
    ids = [f"i{n}" for n in range(12)]
    rows = {
        over: score_captions([[text] for text in texts], made, ids, over_folds=over, **options)
        for over in (False, True)
    }
    assert len(rows[True]) == len(rows[False]) >= 3
    for narrow, wide in zip(rows[False], rows[True], strict=True):
        null = permutation_test(tables[narrow.metric], truth=np.arange(12), n_permutations=500, seed=0)
        assert (narrow.value, narrow.chance) == (wide.value, wide.chance)
        assert narrow.chance == pytest.approx(null.null_mean)
        assert (narrow.p_value, wide.p_value) == (null.p_value, widen_null(null).p_value)
        assert narrow.p_value < wide.p_value
        assert wide.ci_low < narrow.ci_low < narrow.ci_high < wide.ci_high
