"""The union of all networks, which is their registry. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from braindecode_vis.encoders.atm_config import AtmEConfig, AtmSConfig
from braindecode_vis.encoders.braindecode_models import BraindecodeConfig
from braindecode_vis.encoders.compact_config import DeepNetConfig, EEGNetConfig, ShallowNetConfig
from braindecode_vis.encoders.eegproject_config import EEGProjectConfig
from braindecode_vis.encoders.latent_decoder_config import LatentDecoderConfig
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.residual_mlp import ResidualMlpConfig
from braindecode_vis.encoders.shared_space import SharedSpaceConfig
from braindecode_vis.encoders.simpleconv_config import (
    SimpleConvConfig,
    SimpleConvImageConfig,
    SimpleConvTimeAggConfig,
)
from braindecode_vis.encoders.tsconv_config import TSConvConfig

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
