"""Whole-cortex parcel encoder: a masked-autoencoder transformer over parcels and time patches.

Settings of the encoder and of the files that it starts from; `training.pretraining` trains it without labels.

The paper that this follows names a pretrained fMRI foundation encoder that is tuned by contrast and reports that
networks beyond the visual one contribute; it does not give the encoder's inside. Tokens, sizes and embeddings are
therefore ours, built as He et al. describe.

References
----------
Wang et al. (2024), arXiv:2411.07121. He et al. (2022), arXiv:2111.06377 (masked autoencoders).
Yeo et al. (2011), doi:10.1152/jn.00338.2011 (networks).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from braindecode_vis.base.checks import check_file
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.store import read_json
from braindecode_vis.encoders.signal import Signal

if TYPE_CHECKING:
    import torch

    from braindecode_vis.encoders.parcels import ParcelEncoder

WEIGHTS, DESCRIPTION = "encoder.safetensors", "encoder.json"


#: Word for `ParcelsConfig.pretrained`: the encoder that the same run pretrains.
OWN_PRETRAINING = "pretrain"
_ARCHITECTURE = (
    "patch_times", "width", "depth", "n_heads", "mlp_ratio", "network_embedding", "parcel_position", "time_position",
)  # fmt: skip


class ParcelsConfig(NetworkSettings):
    """Transformer over tokens of one parcel and one stretch of time each, pooled and projected.

    Parameters
    ----------
    patch_times
        Samples of a token; the number of samples must be a multiple. None takes all of them, so that each parcel is
        one token, as it is for responses without a time axis.
    width, depth, n_heads, mlp_ratio
        Of the transformer (pre-norm, GELU); choices of ours.
    dropout
        In the blocks and the projector.
    network_embedding
        Add a learned vector of the parcel's Yeo network; needs network names.
    parcel_position
        ``learned``: one vector per parcel. ``data``: a linear map of the standardised position in the data (sensors of
        EEG and MEG, or centroids of a corpus), so that neighbouring parcels start with similar vectors.
    time_position
        ``learned``: one vector per patch, so that the number of patches is fixed. ``seconds``: a linear map of waves of
        the patch's middle in s from the first sample and of its length, so that windows of any number of patches and of
        other sampling intervals can use the same weights.
    pooling
        What the projector gets: ``cls``, the extra token; ``mean``, the average of the others; or ``flatten``, all of
        them concatenated, so that each place has separate weights.
    projector_hidden
        Hidden units between the pooled token and the outputs.
    pretrained
        Folder that ``pretrain`` wrote, or a file of weights (safetensors, or a torch file that holds tensors only); or
        the word ``pretrain``, with which the run pretrains the encoder itself, by its section ``pretrain``, before it
        trains (a folder of that name is ``./pretrain``).
    freeze_depth
        The embeddings and this many blocks are frozen (0: all are trained).
    """

    kind: Literal["parcels"] = "parcels"
    patch_times: int | None = Field(default=None, ge=1)
    width: int = Field(default=256, ge=1)
    depth: int = Field(default=6, ge=1)
    n_heads: int = Field(default=8, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    network_embedding: bool = True
    parcel_position: Literal["learned", "data"] = "learned"
    time_position: Literal["learned", "seconds"] = "learned"
    pooling: Literal["cls", "mean", "flatten"] = "mean"
    projector_hidden: int = Field(default=1024, ge=1)
    pretrained: Literal["pretrain"] | Path | None = None
    freeze_depth: int = Field(default=0, ge=0)

    not_hashed: ClassVar[frozenset[str]] = frozenset({"coordinates", "pretrained"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"time_position"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"coordinates": None, "key_map": {}, "ignore_keys": []}

    @model_validator(mode="after")
    def _check_fit(self) -> ParcelsConfig:
        if self.width % self.n_heads:
            raise ValueError(
                f"width must be a multiple of n_heads, but {self.width} is not a multiple of {self.n_heads}"
            )
        if self.freeze_depth > self.depth:
            raise ValueError(f"freeze_depth is {self.freeze_depth}, but there are only {self.depth} blocks")
        return self

    def list_differences(self, other: ParcelsConfig) -> list[str]:
        """Return the settings of the architecture in which another encoder differs, with both values.

        Examples
        --------
        >>> ParcelsConfig(depth=4).list_differences(ParcelsConfig())
        ['depth (4 and 6)']
        """
        return [
            f"{name} ({getattr(self, name)} and {getattr(other, name)})"
            for name in _ARCHITECTURE
            if getattr(self, name) != getattr(other, name)
        ]

    @property
    def weights_file(self) -> Path | None:
        """File of the pretrained weights, that of `pretrain` if a folder is given.

        Raises
        ------
        DataError
            If there is no such file.
        """
        if not isinstance(self.pretrained, Path):
            return None
        path = self.pretrained.expanduser()
        if path.is_dir():
            path = path / WEIGHTS
        return check_file(path, what="the pretrained encoder", hint="correct encoder.network.pretrained")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of the files, which count by their content."""
        fields = super().hashed_fields()
        if self.pretrained == OWN_PRETRAINING:  # what is pretrained counts as a stage of the run
            fields["pretrained"] = OWN_PRETRAINING
        if (weights := self.weights_file) is not None:
            fields["pretrained_digest"] = hash_once(weights)
        return fields

    def build_encoder(self, signal: Signal) -> ParcelEncoder:
        """Return the untrained encoder alone, as pretraining starts it."""
        from braindecode_vis.encoders.parcels import ParcelEncoder

        return ParcelEncoder(signal, self)

    def build(self, signal: Signal, n_outputs: int) -> torch.nn.Module:
        """Return the network, with the pretrained weights in its encoder if a file of them is given.

        What was read, under which name, is in its `load_report`. Those of the run itself are named by who trains.

        Parameters
        ----------
        signal
            Axes ``("parcel",)`` or ``("parcel", "time")``.
        n_outputs
            Size of the output.

        Raises
        ------
        DataError
            If the axes, the networks, the centroids or the pretrained weights do not fit.
        """
        from braindecode_vis.encoders import parcels

        network = parcels.ParcelNetwork(
            self.build_encoder(signal),
            signal,
            n_outputs,
            pooling=self.pooling,
            projector_hidden=self.projector_hidden,
            dropout=self.dropout,
        )
        if (weights := self.weights_file) is not None:
            if weights.name == WEIGHTS:
                parcels.check_description(
                    parcels.describe_encoder(network.encoder), weights.parent / DESCRIPTION
                )
            network.load_report = parcels.read_encoder(network.encoder, weights)
        network.freeze(self.freeze_depth)
        return network


def read_description(start: Path) -> dict[str, Any]:
    """Return what `pretrain` wrote about an encoder, whose folder or file of weights is given; empty if unknown."""
    start = start.expanduser()
    path = (start.parent if start.name == WEIGHTS else start) / DESCRIPTION
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
