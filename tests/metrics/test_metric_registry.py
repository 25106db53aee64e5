"""Every metric has one entry, and one place takes names apart."""

import re

import numpy as np
import pytest

from braindecode_vis import registry as components
from braindecode_vis.checks import ConfigError
from braindecode_vis.metrics import metric_registry as registry
from braindecode_vis.metrics.metric_registry import Metric, find_metric, register_metric


@pytest.mark.parametrize(
    "name, label, n, protocol, direction",
    [
        ("top1@instance", "Top-1 accuracy", 1, "instance", 1),
        ("top10", "Top-10 accuracy", 10, "", 1),
        ("two_way@imagery_set", "Two-way identification", 2, "imagery_set", 1),
        ("2_way", "Two-way identification", 2, "", 1),
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
        ("rougeL@git", "ROUGE-L", 0, "git", 1),
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
                np.diagonal(table), registry.compare_items(metric, made, true), atol=1e-9
            )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "ssim"}, "is there already"),
        ({"name": "top7"}, "is there already"),
        ({"name": "a b"}, "no name for a metric"),
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


@pytest.mark.parametrize("kind", components.INSIDE["metric"])
def test_a_metric_of_the_package_is_asked_for_by_its_kind(kind):
    metric = components.find_component("metric", kind)().build()
    assert register_metric(metric) == kind
    assert find_metric(kind).metric is metric
