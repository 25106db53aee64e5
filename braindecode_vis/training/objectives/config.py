"""The union of all objectives, which is their registry. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from braindecode_vis.training.objectives.pair_configs import (
    BimixcoObjectiveConfig,
    ClipImageTextObjectiveConfig,
    ClipObjectiveConfig,
    CosineObjectiveConfig,
    L1ObjectiveConfig,
    MseObjectiveConfig,
    SiglipObjectiveConfig,
    SoftClipObjectiveConfig,
)
from braindecode_vis.training.objectives.structure_configs import (
    AlignmentObjectiveConfig,
    ClusterObjectiveConfig,
    ConceptObjectiveConfig,
    CuaObjectiveConfig,
    DistillationObjectiveConfig,
    MultiviewObjectiveConfig,
    SalientObjectiveConfig,
    TclObjectiveConfig,
    UniformityObjectiveConfig,
)

ObjectiveUnion = Annotated[
    ClipObjectiveConfig
    | ClipImageTextObjectiveConfig
    | SiglipObjectiveConfig
    | MseObjectiveConfig
    | L1ObjectiveConfig
    | CosineObjectiveConfig
    | SoftClipObjectiveConfig
    | BimixcoObjectiveConfig
    | AlignmentObjectiveConfig
    | UniformityObjectiveConfig
    | CuaObjectiveConfig
    | MultiviewObjectiveConfig
    | DistillationObjectiveConfig
    | TclObjectiveConfig
    | ClusterObjectiveConfig
    | ConceptObjectiveConfig
    | SalientObjectiveConfig,
    Field(discriminator="kind"),
]
