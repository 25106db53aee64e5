"""Every metric has one entry, and one place takes names apart."""

import re
from functools import partial

import numpy as np
import pytest

from braindecode_vis.base import registry as components
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.scoring.metrics import image
from braindecode_vis.scoring.metrics import metric_registry as registry
from braindecode_vis.scoring.metrics.metric_registry import Metric, find_metric, register_metric
from braindecode_vis.scoring.retrieval import compute_ranks, compute_similarity
from braindecode_vis.scoring.uncertainty import permutation_test


@pytest.mark.parametrize(
    "name, label, n, protocol, direction",
    [
        ("top1@instance", "Top-1 accuracy", 1, "instance", 1),
        ("top10", "Top-10 accuracy", 10, "", 1),
        ("two_way@imagery_set", "Two-way identification in the embedding", 2, "imagery_set", 1),
        ("2_way", "Two-way identification in the embedding", 2, "", 1),
        (
            "50_way_top1_semantic_accuracy@efficientnet-lite0",
            "50-way semantic accuracy",
            50,
            "efficientnet-lite0",
            1,
        ),
        ("relative_median_rank@zero-to-one", "Relative rank", 0, "zero-to-one", -1),
        ("ssim_legacy@425", "Structural similarity", 0, "425", 1),
        ("correlation_distance@swav-resnet50", "Feature distance", 0, "swav-resnet50", -1),
        ("image_retrieval@300-way-30-draws", "Image retrieval", 0, "300-way-30-draws", 1),
        ("best_of_3_mse", "Best of 3 draws: Mean squared error", 0, "", -1),
        ("lpips", "Perceptual distance", 0, "", -1),
        ("rougeL@git", "ROUGE-L", 0, "git", 1),
        ("two_way_identification@swav", "Two-way identification in features of swav", 2, "swav", 1),
        ("two_way_identification_within_class", "Within-class two-way identification in pixels", 2, "", 1),
        ("strange_new_score@x", "Strange new score", 0, "x", 0),
    ],
)
def test_names_are_taken_apart(name, label, n, protocol, direction):
    found = find_metric(name)
    assert (found.label, found.n, found.protocol, found.metric.direction) == (label, n, protocol, direction)


def test_every_entry_has_words_and_a_direction():
    for name in registry.list_metrics():
        metric = find_metric(name.replace("{n}", "7")).metric
        assert metric.name == name
        assert metric.label
        assert metric.meaning
        assert metric.direction in (1, -1)
        if metric.chance is not None:
            assert 0 < registry.compute_chance(name.replace("{n}", "7"), gallery_size=20) <= 10.5


@pytest.mark.parametrize(
    "name",
    [
        name.replace("{n}", "5")
        for name in registry.list_metrics()
        if (entry := find_metric(name.replace("{n}", "5")).metric).on == "retrieval" and entry.compare
    ],
)
def test_the_side_of_a_p_value_is_that_of_better_predictions(name):
    """Turning the direction of a rank metric was noticed by no test: its p then praised the worst decoder."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((24, 6)).astype(np.float32)
    ids = np.array([f"i{n:02d}" for n in range(24)], dtype=object)
    gallery, (metric, n, *_) = Embeddings(vectors, ids, "s"), find_metric(name)
    found = {}
    for side in (1, -1):
        queries = Embeddings(
            (side * vectors + 0.5 * rng.standard_normal(vectors.shape)).astype(np.float32), ids, "s"
        )
        values = metric.compare(compute_ranks(queries, gallery, device="cpu"), n)
        p_value = None
        if metric.tabulate is not None:
            table = metric.tabulate(compute_similarity(queries, gallery), n)
            p_value = permutation_test(
                table, statistic=metric.statistic, alternative=metric.alternative, n_permutations=99
            ).p_value
        found[side] = float(values.mean()), p_value
    assert metric.direction * (found[1][0] - found[-1][0]) > 0
    if metric.tabulate is not None:
        assert found[1][1] == 0.01
        assert found[-1][1] > 0.9  # nobody is worse than who prefers the opposite


def test_tables_agree_with_the_values_of_each_pair():
    rng = np.random.default_rng(0)
    rows = {
        "images": rng.integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8), "embeddings": rng.standard_normal((2, 4, 6)),
    }  # fmt: skip
    for on, (made, true) in rows.items():
        for name in registry.list_metrics(on):
            metric = find_metric(name).metric
            table = registry.tabulate_items(metric, made, true)
            np.testing.assert_allclose(
                np.diagonal(table),
                registry.compare_items(metric, made, true),
                rtol=0,
                atol=1e-6,  # a table of SSIM is in single precision
            )


def test_pairs_equal_items_whatever_the_metric(monkeypatch):
    """Metrics of the package share their resized images; one from outside may be a `partial` as well."""
    rng = np.random.default_rng(0)
    rounds = list(rng.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8))
    seen = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)

    def compare(power, made, true):
        return (np.abs(made.astype(float) - true) ** power).mean(axis=(1, 2, 3))

    monkeypatch.setattr(registry, "_OUTSIDE", dict(registry._OUTSIDE))
    for name, function in {
        "cubed": partial(compare, 3),
        "plain": lambda *images: compare(1, *images),
    }.items():
        register_metric(Metric(name, name, "", -1, on="images", compare=function))
    pairs = np.array([[0, 0, 0], [1, 1, 1], [0, 2, 2], [0, 0, 3], [1, 1, 0]])
    names = ["plain", "ssim", "cubed", "pixcorr@425"]
    made = np.stack([rounds[number][row] for number, row, _ in pairs])
    found = registry.compare_pairs(names, rounds, seen, pairs)
    assert list(found) == names
    for name, values in found.items():
        expected = registry.compare_items(find_metric(name).metric, made, seen[pairs[:, 2]])
        # Single precision at 425 pixels.
        np.testing.assert_allclose(values, expected, rtol=1e-5, err_msg=name)
    only_second = registry.compare_pairs(names, rounds, seen, pairs[pairs[:, 0] == 1])
    assert only_second["cubed"].tolist() == found["cubed"][pairs[:, 0] == 1].tolist()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "ssim"}, "already exists"),
        ({"name": "top7"}, "already exists"),
        ({"name": "a b"}, "not a valid name for a metric"),
        ({"direction": 0}, "which direction is better"),
        ({"on": ""}, "needs a function"),
        ({"compare": None}, "needs a function"),
    ],
)
def test_what_is_no_metric_is_refused(changes, words):
    given = {"name": "mine", "label": "Mine", "on": "images", "compare": np.subtract, **changes}
    with pytest.raises(ConfigError, match=re.escape(words)):
        register_metric(Metric(**given))
    assert "mine" not in registry.list_metrics()


@pytest.mark.parametrize("kind", list(components.list_inside("metric")))
def test_a_metric_of_the_package_is_asked_for_by_its_kind(kind):
    metric = components.find_component("metric", kind)().build()
    assert register_metric(metric) == kind
    assert find_metric(kind).metric is metric


def test_chance_is_what_a_ranking_without_information_gets():
    """Every metric of retrieval against its own mean, or median, over random rankings of a gallery of 20."""
    rng = np.random.default_rng(0)
    ids = [f"image{k}" for k in range(20)]
    gallery = Embeddings(rng.standard_normal((20, 16)).astype(np.float32), ids, "toy")
    queries = Embeddings(rng.standard_normal((6000, 16)).astype(np.float32), np.resize(ids, 6000), "toy")
    retrieval = compute_ranks(queries, gallery, device="cpu")
    for pattern in registry.list_metrics("retrieval"):
        name = pattern.replace("{n}", "7")
        found = find_metric(name)
        values = np.asarray(found.metric.compare(retrieval, found.n), float)
        summary = np.median if found.metric.statistic == "median" else np.mean
        # Five standard errors of a mean; a median of ranks is a whole number and one of them at most away.
        slack = 5 * values.std() / len(values) ** 0.5 if summary is np.mean else 0.055 * values.max()
        assert summary(values) == pytest.approx(registry.compute_chance(name, gallery_size=20), abs=slack), (
            name
        )
        if found.metric.counts_hits:
            assert values.min() >= 0, name
            assert values.max() <= 1, name


def test_chance_that_has_no_ranking_is_one_of_the_candidates():
    for name, chance in {
        "two_way_identification": 0.5, "two_way_identification_within_class": 0.5, "50_way_identification": 0.02,
        "4_way_identification_within_class": 0.25,
    }.items():  # fmt: skip
        assert registry.compute_chance(name) == chance


def test_names_stand_for_the_function_and_the_sizes_that_they_name():
    rng = np.random.default_rng(0)
    made, seen = (rng.integers(0, 256, (3, 24, 24, 3), dtype=np.uint8) for _ in range(2))
    for metric in ("pixcorr", "mse", "ssim", "ssim_legacy"):
        for suffix, protocol in (
            ("", "native"),
            ("@native", "native"),
            ("@425", "425"),
            ("@425-legacy", "425-legacy"),
        ):
            found = registry.compare_items(find_metric(metric + suffix).metric, made, seen)
            np.testing.assert_array_equal(
                found,
                image.compute_image_metric(metric, seen, made, protocol=protocol),
                err_msg=metric + suffix,
            )


def test_what_a_page_shows_first_is_listed_first():
    """Of a run's scores the first are those that papers report: top-1, two-way, then pixels, and the rank."""
    names = ["median_rank", "mse", "ssim", "pixcorr", "two_way", "top1"]
    assert sorted(names, key=lambda name: find_metric(name).metric.order) == names[::-1]
    later = [find_metric(name).metric.order for name in ("top5", "rank", "lpips", "correlation_distance")]
    assert min(later) > find_metric("median_rank").metric.order


def test_hits_are_counted_where_a_value_is_a_share_of_them():
    """A page gives these in percent, and their intervals are those of shares."""
    counted = [
        name for name in registry.list_metrics() if find_metric(name.replace("{n}", "7")).metric.counts_hits
    ]
    ways = [
        f"{n}_way{rest}"
        for n in ("two", "{n}")
        for rest in ("_identification", "_identification_within_class")
    ]
    expected = [
        "top1",
        "top{n}",
        "two_way",
        "2_way",
        "{n}_way",
        "{n}_way_top1_semantic_accuracy",
        "accuracy",
        "binding",
        *(f"top{{n}}_acc{averaged}" for averaged in ("", "_subject-agg", "_instance-agg")),
        *ways,
    ]
    assert sorted(counted) == sorted(expected)
