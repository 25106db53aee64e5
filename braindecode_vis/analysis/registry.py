"""Every analysis by its `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from braindecode_vis.analysis.attribution import IntegratedGradientsConfig
from braindecode_vis.analysis.bands import FrequencyBandsConfig
from braindecode_vis.analysis.confusion import ConfusionConfig
from braindecode_vis.analysis.failures import FailuresConfig
from braindecode_vis.analysis.generalization import TimeGeneralizationConfig
from braindecode_vis.analysis.hubness import HubnessConfig
from braindecode_vis.analysis.imagery import ImageryConfig
from braindecode_vis.analysis.layer_time import LayerTimeConfig
from braindecode_vis.analysis.network_ablation import NetworkAblationConfig
from braindecode_vis.analysis.occlusion import OcclusionConfig
from braindecode_vis.analysis.patterns import SpatialPatternsConfig
from braindecode_vis.analysis.regions import RoisConfig, SensorRegionsConfig
from braindecode_vis.analysis.repetitions import RepetitionsConfig
from braindecode_vis.analysis.rsa_study import RsaConfig
from braindecode_vis.analysis.window_categories import TimeResolvedCategoriesConfig
from braindecode_vis.analysis.windows import GrowingWindowConfig, SlidingWindowConfig

AnalysisUnion = Annotated[
    GrowingWindowConfig
    | SlidingWindowConfig
    | TimeResolvedCategoriesConfig
    | TimeGeneralizationConfig
    | FrequencyBandsConfig
    | SensorRegionsConfig
    | RoisConfig
    | NetworkAblationConfig
    | LayerTimeConfig
    | SpatialPatternsConfig
    | OcclusionConfig
    | IntegratedGradientsConfig
    | ConfusionConfig
    | HubnessConfig
    | FailuresConfig
    | RepetitionsConfig
    | RsaConfig
    | ImageryConfig,
    Field(discriminator="kind"),
]
