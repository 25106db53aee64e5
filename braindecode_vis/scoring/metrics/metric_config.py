"""Settings of the metrics that are computed if `evaluation.metrics` names them."""

from __future__ import annotations

from typing import Literal

from braindecode_vis.base.contracts import MetricSettings
from braindecode_vis.scoring.metrics.metric_registry import Metric, find_metric


class CorrelationDistanceConfig(MetricSettings):
    """1 - Pearson correlation of each prediction and the embedding of the seen image."""

    kind: Literal["correlation_distance"] = "correlation_distance"

    def build(self) -> Metric:
        """Return the metric."""
        return find_metric(self.kind).metric
