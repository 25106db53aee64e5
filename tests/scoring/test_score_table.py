"""Scores of a task: rounds are never pooled, conditions are scored apart, and the suite's rows have their controls."""

from dataclasses import replace

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import ImageRows
from braindecode_vis.scoring import image_scores, score_table, scoring_task
from braindecode_vis.scoring.metrics import feature_networks, metric_registry
from braindecode_vis.scoring.metrics.identification import compute_correlations, two_way_identification
from braindecode_vis.scoring.metrics.image import compute_image_metric
from braindecode_vis.scoring.metrics.metric_registry import Metric, register_metric
from braindecode_vis.scoring.metrics.suite import MetricSuiteConfig, compute_suite
from braindecode_vis.scoring.refits import Refits
from braindecode_vis.scoring.retrieval import compute_ranks, rank_similarities
from braindecode_vis.scoring.score_table import ScoringTask, compute_scores
from braindecode_vis.scoring.scoring_task import Folding, ScoredGroup
from braindecode_vis.scoring.uncertainty import (
    permutation_test_folds,
    widen_limits,
    widen_null,
    wilson_interval,
)
from tests.references import CLOSE, assert_close

N = 8


class Mean:
    """An image encoder that looks at 4 x 4 means."""

    calls = 0

    def encode(self, images):
        Mean.calls += len(images)
        blocks = np.asarray(images, dtype=np.float32).reshape(len(images), 4, 4, 4, 4, 3)
        return blocks.mean(axis=(2, 4)).reshape(len(images), -1)


def make_task(n_draws=None, *, subjects=("01",), **changes):
    rng = np.random.default_rng(0)
    ids = np.tile(np.array([f"s{i}" for i in range(N)], dtype=object), len(subjects))
    people = np.repeat(np.array(subjects, dtype=object), N)
    unique = rng.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)
    seen = np.tile(unique, (len(subjects), 1, 1, 1))
    shape = seen.shape if n_draws is None else (len(seen), n_draws, *seen.shape[1:])
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    truth = seen if n_draws is None else seen[:, None]
    decoded = (0.2 * truth + 0.8 * noise).astype(np.uint8)
    vectors = rng.standard_normal((N, 5)).astype(np.float32)
    queries = Embeddings(
        vectors[np.tile(np.arange(N), len(subjects))] + rng.standard_normal((len(ids), 5)).astype(np.float32),
        ids, "toy",
    )  # fmt: skip
    gallery = Embeddings(vectors, ids[:N], "toy")
    task = ScoringTask(
        retrievals=[(queries, gallery, compute_ranks(queries, gallery, device="cpu"))],
        seen=seen,
        images={"decoded": decoded, "oracle": seen, "shuffled": decoded[np.roll(np.arange(len(ids)), 1)]},
        ids=ids, concepts=np.array([f"c{i[1]}" for i in ids], dtype=object), subjects=people,
        decoded_concepts=None, feature_encoder=None, feature_name="", protocol="toy", split="test", seed=0,
        n_bootstrap=200, n_permutations=200,
    )  # fmt: skip
    return replace(task, **changes)


def find(scores, metric, method="decoded", **keys):
    found = [s for s in scores if (s.metric, s.method) == (metric, method)]
    (score,) = [s for s in found if all(getattr(s, key) == value for key, value in keys.items())]
    return score


def test_draws_are_scored_as_rounds_and_averaged():
    task = make_task(3, feature_encoder=Mean(), feature_name="mean")
    scores, items = compute_scores(task)
    rounds = np.moveaxis(task.images["decoded"], 1, 0)
    ones = [compute_scores(replace(task, images={**task.images, "decoded": one}))[0] for one in rounds]
    metrics = {s.metric for s in scores if s.method == "decoded"}
    assert metrics == {s.metric for s in ones[0] if s.method == "decoded"}
    assert {"pixcorr", "mse", "ssim", "two_way_identification", "two_way_identification@mean"} <= metrics
    for metric in metrics:
        several = [find(one, metric) for one in ones]
        assert find(scores, metric).value == pytest.approx(np.mean([s.value for s in several]), rel=CLOSE)
        assert find(scores, metric).chance == pytest.approx(np.mean([s.chance for s in several]), rel=CLOSE)
    # Pooling the draws into one gallery would make copies of each stimulus act as ties.
    expected = two_way_identification(task.seen, task.images["decoded"])
    assert_close(items["two_way_identification"], expected)
    assert_close(
        items["pixcorr"], np.mean([compute_image_metric("pixcorr", task.seen, one) for one in rounds], axis=0)
    )


def test_one_draw_is_the_same_as_none():
    task = make_task()
    images = {**task.images, "decoded": task.images["decoded"][:, None]}
    scores, items = compute_scores(replace(task, images=images))
    expected, expected_items = compute_scores(task)
    assert scores == expected
    assert items.equals(expected_items)


def test_best_of_several_is_another_metric_with_its_own_chance():
    task = make_task(4, best_of=True)
    scores, _ = compute_scores(task)
    rounds = np.moveaxis(task.images["decoded"], 1, 0)
    best = find(scores, "best_of_4_pixcorr")
    assert best.value == pytest.approx(
        np.max([compute_image_metric("pixcorr", task.seen, one) for one in rounds], axis=0).mean(), rel=CLOSE
    )
    assert best.chance > find(scores, "pixcorr").chance + 0.01
    assert find(scores, "best_of_4_two_way_identification").chance > 0.6  # never one half
    assert find(scores, "best_of_4_mse").value < find(scores, "mse").value
    assert not any(s.metric.startswith("best_of") for s in scores if s.method != "decoded")
    assert not any(s.metric.startswith("best_of") for s in compute_scores(replace(task, best_of=False))[0])


def test_conditions_are_scored_among_their_own_stimuli():
    names = np.array(["imagery, simple", "imagery, complex"] * (N // 2))
    task = make_task(subjects=("01", "02"), conditions=np.tile(names, 2), ceilings={"top1": 0.9})
    scores, items = compute_scores(task)
    plain, plain_items = compute_scores(replace(task, conditions=None))
    assert scores[: len(plain)] == plain
    assert items.equals(plain_items)
    assert {(s.subject, s.split) for s in scores} == {
        (subject, split)
        for subject in ("01", "02", "all")
        for split in ("test", "test, imagery, simple", "test, imagery, complex")
    }
    rows = np.flatnonzero((task.subjects == "01") & (task.conditions == "imagery, simple"))
    score = find(scores, "two_way_identification", subject="01", split="test, imagery, simple")
    expected = two_way_identification(task.seen[rows], task.images["decoded"][rows]).mean()
    assert (score.value, score.n_queries, score.gallery_size) == (pytest.approx(expected), 4, 4)
    assert find(scores, "top1", subject="01", split="test").noise_ceiling == 0.9
    assert find(scores, "top1", subject="01", split="test, imagery, simple").noise_ceiling is None


def test_every_row_of_the_system_under_test_has_a_p_value(monkeypatch):
    """Half of the rows once had none, although the same permutations of the stimuli judge them."""
    monkeypatch.setattr(score_table, "K_WAY", (2, 4))
    task = make_task(2, subjects=("01", "02"), feature_encoder=Mean(), feature_name="mean")
    scores, _ = compute_scores(task)
    judged = [s for s in scores if s.method == "decoded"]
    assert {
        "top1", "2_way", "4_way", "mean_reciprocal_rank", "mean_rank", "median_rank", "pixcorr", "mse", "ssim",
        "two_way_identification", "two_way_identification@mean",
    } <= {s.metric for s in judged}  # fmt: skip
    assert {s.subject for s in judged} == {"01", "02", "all"}
    for score in judged:
        assert 0 < score.p_value <= 1, score.metric
        assert find(scores, score.metric, "shuffled", subject=score.subject).ci_low is not None
    # Rows of two people who saw the same images move together, so that 8 stimuli give no smaller p than 1 / 201.
    assert find(scores, "ssim", subject="all").p_value == 1 / 201
    assert all(s.p_value is not None for s in scores if s.method == "oracle" and s.metric != "ssim")


@pytest.mark.parametrize("side", [1, -1])
def test_p_values_of_retrieval_are_small_for_a_good_decoder_and_large_for_one_that_prefers_the_opposite(side):
    task = make_task()
    _, gallery, _ = task.retrievals[0]
    queries = Embeddings(side * gallery.vectors, gallery.ids, "toy")
    found = compute_ranks(queries, gallery, device="cpu")
    scores, _ = compute_scores(replace(task, retrievals=[(queries, gallery, found)]))
    names = ("top1", "2_way", "mean_reciprocal_rank", "mean_rank", "median_rank")
    judged = {s.metric: s.p_value for s in scores if s.method == "decoded" and s.metric in names}
    assert set(judged) == set(names)
    for name, p_value in judged.items():
        assert p_value < 0.01 if side > 0 else p_value > 0.9, name


def test_pairs_beyond_the_limit_are_permuted_within_blocks(monkeypatch):
    task = make_task()
    whole = find(compute_scores(task)[0], "ssim")
    calls = []
    real = image_scores.tabulate_items

    def count(metric, made, seen):
        calls.append(len(seen) * len(made))
        return real(metric, made, seen)

    monkeypatch.setattr(image_scores, "tabulate_items", count)
    monkeypatch.setattr(image_scores, "LARGEST_PAIR_TABLE", N * 4 * 16 * 16)
    parted = find(compute_scores(task)[0], "ssim")
    assert calls == [16, 16]
    assert parted.value == whole.value
    assert whole.p_value == 1 / 201
    assert 1 / 201 <= parted.p_value < 0.02  # (4!)^2 permutations
    monkeypatch.setattr(image_scores, "LARGEST_PAIR_TABLE", 0)
    scores = compute_scores(task)[0]
    assert find(scores, "ssim").p_value == pytest.approx(1 / 2**4, abs=0.06)
    # A pair that keeps its places is half of such a null, and was half of the chance that was printed.
    halfway = (whole.value + whole.chance) / 2
    assert abs(find(scores, "ssim").chance - whole.chance) < 0.2 * abs(halfway - whole.chance)
    assert not [s for s in scores if (s.metric, s.method) == ("ssim", "shuffled")]


@pytest.mark.parametrize("n_draws", [None, 2])
def test_many_images_are_brought_to_size_by_groups_and_scored_the_same(monkeypatch, n_draws):
    """All methods at the size of comparison were kept in memory, for all rows, until the last one was scored."""
    task = make_task(n_draws, subjects=("01", "02"))

    def open_rows(stack):
        flat = stack.reshape(-1, *stack.shape[-3:])
        return ImageRows(flat, np.arange(len(flat)).reshape(stack.shape[:-3]))

    lazy = {name: open_rows(stack) for name, stack in task.images.items()}
    large = replace(task, images=lazy, seen=open_rows(task.seen))
    wanted = [score.as_row() for score in compute_scores(large)[0]]
    assert set(large._small) == {"seen", "decoded", "oracle"}
    monkeypatch.setattr(scoring_task, "LARGEST_IN_MEMORY", 0)
    again = replace(task, images=lazy, seen=open_rows(task.seen))
    assert [score.as_row() for score in compute_scores(again)[0]] == wanted
    assert set(again._small) == {"seen"}
    assert len(again._last) == 1


def test_pictures_that_subjects_share_are_compared_once(monkeypatch):
    """The row of all subjects compared every image again, and each subject what all have: half of the time."""
    task = make_task(subjects=("01", "02"), metrics=("ssim@425",))
    pictures, index = task.seen[:N], np.tile(np.arange(N), 2)
    shared = {"seen": ImageRows(pictures, index)}
    shared["images"] = {
        **task.images,
        "oracle": shared["seen"],
        "mean_image": ImageRows(pictures[:1], index * 0),
    }
    arrays = {"images": {name: np.asarray(rows) for name, rows in shared["images"].items()}}
    expected, _ = compute_scores(replace(task, **arrays))
    calls = {"pairs": [], "table": []}
    pairs, table = image_scores.compare_pairs, image_scores.tabulate_items
    monkeypatch.setattr(
        image_scores,
        "compare_pairs",
        lambda names, *a: (calls["pairs"].append((names, len(a[2]))), pairs(names, *a))[1],
    )
    monkeypatch.setattr(
        image_scores,
        "tabulate_items",
        lambda *a: (calls["table"].append(len(a[1]) * len(a[2])), table(*a))[1],
    )
    scores, _ = compute_scores(replace(task, **shared))
    # The oracle beside its own and the next images; the mean image, which the first of these is, beside the rest.
    assert calls["pairs"] == [(("ssim",), 2 * N), (("ssim@425",), 3 * N - 2), (("ssim",), N - 2)]
    assert calls["table"] == 4 * [N * N]  # of each subject at two sizes
    for one, other in zip(scores, expected, strict=True):
        assert one.as_row() == other.as_row() or "ssim" in one.metric
        assert one.value == pytest.approx(other.value, rel=CLOSE, abs=1e-6)


def test_the_level_of_a_control_of_many_images_is_that_of_evenly_spaced_ones(monkeypatch):
    """Each image beside the next stimulus took half of the time of the controls, for the mean of thousands."""
    task = make_task()
    whole, _ = compute_scores(task)
    monkeypatch.setattr(image_scores, "LEVEL_ROWS", 3)
    some, _ = compute_scores(task)
    rows = np.array([0, 3, 7])
    level = compute_image_metric("ssim", task.seen[(rows + 1) % N], task.images["oracle"][rows]).mean()
    assert find(some, "ssim", "oracle").chance == pytest.approx(level)
    assert find(whole, "ssim", "oracle").chance != pytest.approx(level)
    for method in ("decoded", "oracle"):
        assert find(some, "ssim", method).value == find(whole, "ssim", method).value


def test_blocks_hold_every_stimulus_and_never_one_alone():
    for n in (2, 3, 7, 20):
        for size in (0, 2, 3, 50):
            counts = np.bincount(image_scores.make_blocks(n, size, 0))
            assert counts.sum() == n
            assert counts.min() >= 2


def test_p_values_that_are_too_much_work_are_named(monkeypatch):
    monkeypatch.setattr(scoring_task, "LARGEST_TABLE", 10)
    task = make_task()
    scores, _ = compute_scores(task)
    assert find(scores, "2_way").p_value is None
    assert task.not_computed == [
        "p-values of retrieval not computed: 8 predictions in a gallery of 8 are more than 10 pairs."
    ]


def test_wrong_shapes_are_refused():
    task = make_task()
    for wrong in (task.seen[:2], task.seen[:, :8], task.seen.astype(float)):
        with pytest.raises(DataError, match="images"):
            replace(task, images={"decoded": wrong})
    with pytest.raises(DataError, match="8 test items came with 3 conditions"):
        replace(task, conditions=np.array(["a", "b", "c"]))


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A suite whose AlexNet and SwAV are toy networks, so that only the bookkeeping is at test."""
    path = tmp_path / "weights.pth"
    path.touch()

    def toy(spaces):
        return lambda path, device: (
            lambda inputs: {s: inputs[:, :, i::64, i::64] for i, s in enumerate(spaces)}
        )

    for name in ("alexnet", "swav"):
        facts = feature_networks.NETWORKS[name]
        monkeypatch.setitem(feature_networks.NETWORKS, name, replace(facts, load=toy(facts.spaces)))
    config = MetricSuiteConfig(
        networks=("alexnet", "swav", "clip"), weights={"alexnet": path, "swav": path},
        semantic_ways=(20,), device="cpu", legacy_ssim=True, pixels=False,
    )  # fmt: skip
    return config


def test_the_suite_scores_every_method_with_chance_and_interval(suite):
    task = make_task(2, suite=suite.build())
    steps = []
    scores, items = compute_scores(task, advance=steps.append)
    assert sum(steps) == task.n_steps
    alone = compute_suite(task.seen, task.images["decoded"], suite)
    assert task.not_computed == alone.not_computed
    assert task.not_computed[0].startswith("clip not computed")
    for metric, values in alone.values.items():
        assert_close(items[metric], values, err_msg=metric)
        score = find(scores, metric)
        assert score.value == pytest.approx(values.mean(), rel=CLOSE)
        assert score.ci_low <= score.value <= score.ci_high
        assert score.chance is not None
        assert find(scores, metric, "oracle").value == pytest.approx(
            0 if "distance" in metric else 1, abs=0.06
        )
    assert find(scores, "two_way_identification@alexnet-5").chance == 0.5
    assert find(scores, "correlation_distance@swav-resnet50").p_value is not None
    assert find(scores, "correlation_distance@swav-resnet50", "shuffled").value > 0.3


def test_the_suite_of_a_group_looks_at_its_own_rows_only(suite):
    task = make_task(
        subjects=("01", "02"), suite=replace_config(suite, legacy_ssim=False, semantic_ways=()).build()
    )
    scores, _ = compute_scores(task)
    for subject in ("01", "02"):
        rows = np.flatnonzero(task.subjects == subject)
        alone = compute_suite(task.seen[rows], task.images["decoded"][rows], task.suite.config)
        for metric, values in alone.values.items():
            assert find(scores, metric, subject=subject).value == pytest.approx(values.mean(), rel=CLOSE)


def replace_config(config, **changes):
    return config.model_copy(update=changes)


def test_lpips_of_each_row_and_of_the_next_stimulus(monkeypatch):
    class Suite:
        config = MetricSuiteConfig(networks=("lpips_alexnet",), pixels=False, semantic_ways=())
        available, not_computed = ["lpips_alexnet"], []

        def compute_lpips(self, network, images, pairs):
            assert len(np.unique(pairs, axis=0)) == len(pairs)
            return np.abs(images[pairs[:, 0]].mean(axis=(1, 2, 3)) - images[pairs[:, 1]].mean(axis=(1, 2, 3)))

    task = make_task(2, suite=Suite())
    scores, items = compute_scores(task)
    mean = lambda images: images.mean(axis=(-1, -2, -3))  # noqa: E731
    own = np.abs(mean(task.seen)[:, None] - mean(task.images["decoded"])).mean(axis=1)
    following = np.abs(np.roll(mean(task.seen), -1)[:, None] - mean(task.images["decoded"])).mean()
    np.testing.assert_allclose(items["lpips@alexnet"], own)
    assert find(scores, "lpips@alexnet").chance == pytest.approx(following)
    assert find(scores, "lpips@alexnet", "oracle").value == 0


def test_images_are_encoded_once(monkeypatch):
    Mean.calls = 0
    task = make_task(feature_encoder=Mean(), feature_name="mean")
    compute_scores(task)
    assert Mean.calls == 2 * N  # seen and decoded; oracle and shuffled show the same images again
    compute_scores(task)
    assert Mean.calls == 2 * N  # all of them are known by now


@pytest.fixture
def outside(monkeypatch):
    """Metrics as another package would bring them; forgotten after the test."""
    monkeypatch.setattr(metric_registry, "_OUTSIDE", {})
    brightness = lambda images: images.mean(axis=(1, 2, 3), dtype=float)  # noqa: E731
    compare = lambda made, seen: abs(brightness(made) - brightness(seen))  # noqa: E731
    metrics = [
        Metric("brightness_gap", "Brightness gap", "Grey levels.", -1, on="images", compare=compare),
        Metric("slow_gap", "Slow gap", "", -1, on="images", compare=compare, permute=False),
        Metric("dot", "Dot product", "", 1, on="embeddings", compare=lambda p, t: (p * t).sum(axis=1)),
    ]
    for metric in metrics * 2:  # settings are built more than once
        register_metric(metric)
    return metrics


def test_outside_metrics_are_scored_like_ours(outside):
    names = ["brightness_gap", "slow_gap", "dot", "correlation_distance"]
    task = make_task(2, subjects=("01", "02", "03"), metrics=names)
    scores, items = compute_scores(task)
    plain, _ = compute_scores(replace(task, metrics=()))
    assert [s for s in scores if s.metric not in names] == plain  # nothing else moves
    rounds = np.moveaxis(task.images["decoded"], 1, 0)
    gap = np.mean([outside[0].compare(one, task.seen) for one in rounds], axis=0)
    for subject in ("01", "02", "03", "all"):
        score = find(scores, "brightness_gap", subject=subject)
        rows = np.arange(len(gap)) if subject == "all" else np.flatnonzero(task.subjects == subject)
        assert score.value == pytest.approx(gap[rows].mean())
        assert score.ci_low < score.value < score.ci_high
        assert 0 < score.p_value <= 1
        assert score.chance == find(scores, "brightness_gap", "shuffled", subject=subject).chance
        assert find(scores, "brightness_gap", "oracle", subject=subject).value == 0
        slow = find(scores, "slow_gap", subject=subject)
        assert (slow.value, slow.p_value) == (score.value, None)
        assert slow.chance is not None
        distance = find(scores, "correlation_distance", subject=subject)
        assert distance.value < distance.chance
        assert distance.p_value is not None
    np.testing.assert_allclose(items["brightness_gap"], gap)
    queries, gallery, _ = task.retrievals[0]
    dots = (queries.vectors * gallery.select(queries.ids).vectors).sum(axis=1)
    np.testing.assert_allclose(items["dot"], dots, rtol=1e-6)  # single precision
    assert find(scores, "dot", "shuffled", subject="all").value < find(scores, "dot", subject="all").value


@pytest.mark.parametrize(
    "compare, words",
    [
        (lambda made, seen: 1 / 0, "failed with ZeroDivisionError: division by zero"),
        (lambda made, seen: np.zeros(3), r"finite values of shape \(8,\), but gave the shape \(3,\)"),
        (lambda made, seen: np.full(len(made), np.nan), "8 that are not finite"),
    ],
)
def test_an_outside_metric_that_fails_is_named(outside, compare, words):
    register_metric(Metric("broken", "Broken", "", 1, on="images", compare=compare))
    with pytest.raises(DataError, match=f"'broken' .*{words}"):
        compute_scores(make_task(metrics=["broken"]))


def test_a_given_matrix_scores_like_the_embeddings_that_it_came_from():
    """Values below the tolerance of cosines, as small probabilities are, do not tie."""
    task = make_task(images={})
    (queries, gallery, _), matrix = task.retrievals[0], task.tables[0]
    small = 1e-12 * np.exp(matrix.astype(np.float64))
    empty = [Embeddings(np.empty((len(e), 0), np.float32), e.ids, "given") for e in (queries, gallery)]
    ranked = rank_similarities(small, queries.ids, gallery.ids)
    given = replace(task, retrievals=[(*empty, ranked)], similarities=[small])
    ours, theirs = ([s.as_row() for s in compute_scores(one)[0]] for one in (given, task))
    assert ours == theirs
    assert len(ours) > 8


def test_images_alone_are_scored_without_a_gallery():
    task = make_task()
    alone, items = compute_scores(replace(task, retrievals=[]))
    pixels = [s for s in compute_scores(task)[0] if s.metric in {one.metric for one in alone}]
    assert alone == pixels
    assert "rank" not in items
    assert {"pixcorr", "mse"} <= set(items)


def make_folds(n_folds=2, *, whole=False, refits=None, **changes):
    """The task of one subject in folds that are trained on each other's images."""
    task = make_task(**changes)
    (queries, gallery, _), parts, taught = task.retrievals[0], [], []
    for rows in np.split(np.arange(N), n_folds):
        own = Embeddings(queries.vectors[rows], queries.ids[rows], "toy")
        candidates = gallery if whole else gallery.select([str(i) for i in own.ids])
        parts.append((own, candidates, compute_ranks(own, candidates, device="cpu")))
        taught.append(frozenset(str(i) for i in gallery.ids if i not in set(own.ids)))
    folding = Folding(
        list(range(n_folds)), taught, within=not whole, remembered=whole, words="in folds", refits=refits
    )
    return replace(task, retrievals=parts, folding=folding)


@pytest.mark.parametrize("whole", [False, True], ids=["fold", "all"])
def test_after_folds_images_are_identified_after_the_training_mean(whole):
    """What the fold was taught is taken off both sides, in pixels and in features, among the gallery's images."""
    task = make_folds(whole=whole, feature_encoder=Mean(), feature_name="mean")
    scores, items = compute_scores(task)
    for metric, look in (
        ("two_way_identification", lambda images: images.reshape(N, -1).astype(float)),
        ("two_way_identification@mean", lambda images: Mean().encode(images).astype(float)),
    ):
        seen, made, expected = look(task.seen), look(task.images["decoded"]), []
        for rows in (np.arange(4), np.arange(4, 8)):
            mean = np.delete(seen, rows, axis=0).mean(axis=0)
            table = compute_correlations(made[rows] - mean, seen - mean)
            others = np.arange(N) if whole else rows
            expected += [
                np.mean([table[i, row] > table[i, j] for j in others if j != row])
                for i, row in enumerate(rows)
            ]
        score = find(scores, metric)
        assert score.value == pytest.approx(np.mean(expected), abs=1e-12)
        assert score.gallery_size == (N if whole else 4)
        assert score.resampled == "images (jackknife), widened by sqrt 2 after folds"
        assert score.protocol == "toy; in folds"
        if metric in items:
            np.testing.assert_allclose(items[metric], expected)
    # What is no identification keeps its value; its level is that beside images of the same fold.
    plain = find(compute_scores(make_task())[0], "pixcorr")
    folded = find(scores, "pixcorr")
    assert folded.value == plain.value
    table = compute_correlations(task.images["decoded"], task.seen)
    assert folded.chance == pytest.approx((table[:4, :4].mean() + table[4:, 4:].mean()) / 2, abs=1e-9)
    assert folded.ci_high - folded.ci_low > 1.2 * (plain.ci_high - plain.ci_low)


def test_networks_are_centred_from_their_correlations(tmp_path, monkeypatch):
    """Features of the suite are let go image by image, so that the mean is taken off by products alone."""

    class Suite:
        available = ("alexnet",)
        config = MetricSuiteConfig(semantic_ways=())
        not_computed = ()

        def correlate(self, network, table, *, spreads):
            flat = np.asarray(table.images).reshape(len(table.images), -1).astype(float)
            centred = flat - flat.mean(axis=1, keepdims=True)
            spreads["alexnet-2"] = np.linalg.norm(centred, axis=1)
            return {"alexnet-2": compute_correlations(flat, flat[table.shown])}

    scores, _ = compute_scores(make_folds(suite=Suite()))
    for method in ("decoded", "oracle"):
        pixels, network = (
            find(scores, f"two_way_identification{space}", method) for space in ("", "@alexnet-2")
        )
        assert network.value == pytest.approx(pixels.value)
        assert (network.ci_low, network.ci_high) == pytest.approx((pixels.ci_low, pixels.ci_high))


def test_nulls_after_folds_stay_within_them_and_are_wider():
    task = make_folds()
    scores, _ = compute_scores(task)
    made, seen = task.images["decoded"].reshape(N, -1), task.seen.reshape(N, -1)
    cells = compute_correlations(made, seen)
    blocks = np.repeat([0, 1], 4)
    found = permutation_test_folds([cells], [np.arange(N)], groups=[blocks], n_permutations=200, seed=0)
    assert find(scores, "pixcorr").p_value == pytest.approx(widen_null(found).p_value)
    assert find(scores, "pixcorr").p_value > found.p_value
    hits = find(scores, "top1")
    n_hits = round(hits.value * N)
    wilson = wilson_interval(n_hits, N)
    expected = widen_limits(wilson.low, wilson.high, hits.value, (0.0, 1.0))
    np.testing.assert_allclose([hits.ci_low, hits.ci_high], expected)
    assert hits.chance == 1 / 4


def test_refits_are_the_null_of_retrieval_and_its_level_among_trained_images():
    rng = np.random.default_rng(0)
    above = rng.integers(0, N, (99, N)).astype(np.int32)
    task = make_folds(whole=True, refits=Refits(above, np.zeros_like(above)))
    scores, _ = compute_scores(task)
    for metric, values in (
        ("top1", (above == 0).mean(axis=1)),
        ("2_way", (1 - above / (N - 1)).mean(axis=1)),
        ("median_rank", np.median(above + 1, axis=1)),
    ):
        score = find(scores, metric)
        assert score.chance == pytest.approx(values.mean())
        beyond = values <= score.value + 1e-9 if metric == "median_rank" else values >= score.value - 1e-9
        assert score.p_value == pytest.approx((1 + beyond.sum()) / 100)


def test_few_orders_of_images_are_told():
    """Folds of two images each have two orders, so that p is at least a half of a half, up to the draws."""
    words = "permuted images change places in 4 ways: no p much below 0.25"
    few = make_folds(n_folds=N // 2)
    scored = ScoredGroup(few, few.groups[0]._replace(rows=np.arange(4)))
    assert scored.protocol.endswith(f"; in folds; {words}")
    whole = make_task()
    assert "change places" not in ScoredGroup(whole, whole.groups[0]).protocol
    three = ScoredGroup(whole, whole.groups[0]._replace(rows=np.arange(3)))
    assert three.protocol.endswith("change places in 6 ways: no p much below 0.17")


def test_one_image_a_fold_leaves_nothing_to_exchange():
    task = make_folds(n_folds=N, whole=True)
    scores, _ = compute_scores(task)
    for metric in ("pixcorr", "ssim", "two_way_identification", "2_way"):
        assert find(scores, metric).p_value is None
    assert find(scores, "pixcorr").chance is None
    assert find(scores, "two_way_identification").chance == 0.5
    assert find(scores, "two_way_identification").ci_low is not None
    assert not any(score.method == "shuffled" for score in scores)
    assert "every fold tests one image" in task.not_computed[0]


def test_a_subject_that_one_fold_tests_is_no_sum_of_folds():
    """Each subject is left out by a fold of its own, whose images may be exchanged; the row of both is widened."""
    task = make_task(subjects=("01", "02"))
    queries, gallery, _ = task.retrievals[0]
    parts = []
    for rows in (np.arange(N), np.arange(N, 2 * N)):
        own = Embeddings(queries.vectors[rows], queries.ids[rows], "toy")
        parts.append((own, gallery, compute_ranks(own, gallery, device="cpu")))
    taught = frozenset(str(i) for i in gallery.ids)
    scores, _ = compute_scores(replace(task, retrievals=parts, folding=Folding([0, 1], [taught] * 2)))
    expected, _ = compute_scores(task)
    assert find(scores, "pixcorr", subject="01") == find(expected, "pixcorr", subject="01")
    pooled = find(scores, "pixcorr", subject="all")
    assert pooled.resampled.startswith("no interval: 2 subjects")
    assert pooled.p_value >= find(expected, "pixcorr", subject="all").p_value


def test_shuffled_ranks_stand_beside_the_size_of_their_gallery():
    """As `score_retrieval` names it for the decoded ones."""
    scores, _ = compute_scores(make_task())
    for score in scores:
        if score.metric in ("top1", "top5", "2_way", "mean_rank") and score.method in ("decoded", "shuffled"):
            assert score.gallery_size == N, (score.metric, score.method)


def test_a_subject_with_one_image_has_no_identification_by_a_network():
    """One image has nothing that it could be taken for, which `score_suite` leaves out."""

    class Suite:
        available = ("alexnet",)
        config = MetricSuiteConfig(pixels=False, semantic_ways=())
        not_computed = ()

        def correlate(self, network, table, *, spreads):
            flat = np.asarray(table.images).reshape(len(table.images), -1).astype(float)
            spreads["alexnet-2"] = np.linalg.norm(flat - flat.mean(axis=1, keepdims=True), axis=1)
            return {"alexnet-2": compute_correlations(flat, flat[table.shown])}

    whole = make_task(subjects=("01", "02"), suite=Suite())
    rows = np.arange(N + 1)
    queries, gallery, _ = whole.retrievals[0]
    queries = Embeddings(queries.vectors[rows], queries.ids[rows], "toy")
    task = replace(
        whole, retrievals=[(queries, gallery, compute_ranks(queries, gallery, device="cpu"))], seen=whole.seen[rows],
        images={"decoded": whole.images["decoded"][rows]}, ids=whole.ids[rows], concepts=whole.concepts[rows],
        subjects=whole.subjects[rows],
    )  # fmt: skip
    found = [s.subject for s in compute_scores(task)[0] if s.metric == "two_way_identification@alexnet-2"]
    assert sorted(set(found)) == ["01", "all"]


def test_the_class_of_one_image_a_fold_is_beside_one_of_all_classes():
    """Nothing can be exchanged, so that no null shows `score_classes` what chance is."""
    classes = np.array(["c0", "c1", "c2", "c3"] * 2, dtype=object)
    task = make_folds(n_folds=N, whole=True, concepts=classes, decoded_concepts=classes)
    score = find(compute_scores(task)[0], "accuracy")
    assert (score.value, score.chance, score.p_value) == (1.0, 1 / 4, None)


def test_a_subject_that_the_first_fold_does_not_test_is_compared_with_its_targets():
    """Folds without its rows are left out by `score_embeddings`, and later ones are not."""
    whole = make_task(subjects=("01", "02"), metrics=["correlation_distance"])
    queries, gallery, _ = whole.retrievals[0]
    parts = []
    for rows in (np.arange(N), np.arange(N, 2 * N)):
        own = Embeddings(queries.vectors[rows], queries.ids[rows], "toy")
        parts.append((own, gallery, compute_ranks(own, gallery, device="cpu")))
    scores, _ = compute_scores(replace(whole, retrievals=parts))
    pairs = zip(queries.vectors, gallery.vectors[np.tile(np.arange(N), 2)], strict=True)
    distances = np.array([1 - np.corrcoef(*pair)[0, 1] for pair in pairs])
    for subject, rows in (("01", slice(N)), ("02", slice(N, None)), ("all", slice(None))):
        score = find(scores, "correlation_distance", subject=subject)
        assert score.value == pytest.approx(distances[rows].mean(), rel=1e-5)  # single precision


def test_limits_of_one_fold_are_not_widened():
    for task, words in ((make_task(), ""), (make_folds(), ", widened by sqrt 2 after folds")):
        score = find(compute_scores(task)[0], "two_way_identification")
        assert score.resampled == f"images (jackknife){words}"
        assert ScoredGroup(task, task.groups[0]).over_folds == bool(words)
