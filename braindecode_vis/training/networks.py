"""The union of all networks, which is their registry. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from braindecode_vis.encoders.atm_config import AtmEConfig, AtmSConfig
from braindecode_vis.encoders.braindecode_models import BraindecodeConfig
from braindecode_vis.encoders.eegnet_config import EEGNetConfig
from braindecode_vis.encoders.eegproject_config import EEGProjectConfig
from braindecode_vis.encoders.latent_decoder_config import LatentDecoderConfig
from braindecode_vis.encoders.mindeye_config import ResidualMlpConfig, SharedSpaceConfig
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.simpleconv_config import (
    SimpleConvConfig,
    SimpleConvImageConfig,
    SimpleConvTimeAggConfig,
)
from braindecode_vis.encoders.tsconv_config import TSConvConfig

#: Networks that were copies of braindecode's, and the class of braindecode that each was a copy of.
DROPPED_NETWORKS = {"shallow_fbcsp": "ShallowFBCSPNet", "deep4": "Deep4Net"}


def refuse_dropped(network: Any) -> Any:
    """Return the settings of a network as they came, unless they name one that braindecode has."""
    kind = network.get("kind") if isinstance(network, dict) else None
    if kind in DROPPED_NETWORKS:
        raise ValueError(
            f"{kind!r} is no network of its own any more; use braindecode's with kind: braindecode and "
            f"model: {DROPPED_NETWORKS[kind]} (pip install 'braindecode_vis[braindecode]'), or kind: eegnet"
        )
    return network


NetworkConfig = Annotated[
    EEGProjectConfig
    | TSConvConfig
    | AtmSConfig
    | AtmEConfig
    | SimpleConvConfig
    | SimpleConvTimeAggConfig
    | SimpleConvImageConfig
    | EEGNetConfig
    | BraindecodeConfig
    | ResidualMlpConfig
    | SharedSpaceConfig
    | ParcelsConfig
    | LatentDecoderConfig,
    Field(discriminator="kind"),
    BeforeValidator(refuse_dropped),
]
