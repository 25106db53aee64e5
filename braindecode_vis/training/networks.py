"""The union of all networks, which is their registry. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from braindecode_vis.encoders.atm import AtmEConfig, AtmSConfig
from braindecode_vis.encoders.braindecode_models import BraindecodeConfig
from braindecode_vis.encoders.compact import DeepNetConfig, EEGNetConfig, ShallowNetConfig
from braindecode_vis.encoders.eegproject import EEGProjectConfig
from braindecode_vis.encoders.latent_decoder import LatentDecoderConfig
from braindecode_vis.encoders.parcels import ParcelsConfig
from braindecode_vis.encoders.residual_mlp import ResidualMlpConfig
from braindecode_vis.encoders.shared_space import SharedSpaceConfig
from braindecode_vis.encoders.simpleconv import (
    SimpleConvConfig,
    SimpleConvImageConfig,
    SimpleConvTimeAggConfig,
)
from braindecode_vis.encoders.tsconv import TSConvConfig

NetworkConfig = Annotated[
    EEGProjectConfig
    | TSConvConfig
    | AtmSConfig
    | AtmEConfig
    | SimpleConvConfig
    | SimpleConvTimeAggConfig
    | SimpleConvImageConfig
    | EEGNetConfig
    | ShallowNetConfig
    | DeepNetConfig
    | BraindecodeConfig
    | ResidualMlpConfig
    | SharedSpaceConfig
    | ParcelsConfig
    | LatentDecoderConfig,
    Field(discriminator="kind"),
]
