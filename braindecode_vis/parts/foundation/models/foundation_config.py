"""Settings of published brain foundation models: their file, which weights are trained, and the form of their input.

`FoundationConfig` is common to all kinds, `EegModelConfig` to those that read channels x times; each model adds a class
with the facts of its input. Imports no torch: the networks are in a file each, what surrounds them in `foundation`.

References
----------
Jiang et al. (2024), LaBraM, arXiv:2405.18765. Wang et al. (2025), CBraMod, arXiv:2412.07236. Wang et al. (2024), EEGPT,
NeurIPS. Kostas et al. (2021), BENDR, doi:10.3389/fnhum.2021.653659. El Ouahidi et al. (2025), REVE, arXiv:2510.21585.
Döner et al. (2025), LUNA, arXiv:2510.22257.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, check_file, suggest
from braindecode_vis.base.contracts import NetworkSettings
from braindecode_vis.base.digests import hash_once, remember_digest
from braindecode_vis.base.settings import NeededWeights
from braindecode_vis.encoders.signal import Signal, read_axes
from braindecode_vis.parts.foundation.models import FROZEN, WeightsLayout

if TYPE_CHECKING:
    import torch

    from braindecode_vis.parts.foundation.models.foundation import Backbone, Front

Tuning = Literal["full", "freeze", "linear_probe", "attentive_probe", "probe_then_full", "lora"]
#: Volts of a unit.
_VOLTS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6, "µV": 1e-6}
#: Names of the same place in the older and the newer 10-20 system.
_SYNONYMS = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
_SYNONYMS |= {new: old for old, new in _SYNONYMS.items()}


class FoundationConfig(NetworkSettings):
    """Settings that published foundation models share.

    Parameters
    ----------
    pretrained
        File of the published weights, as it was released: safetensors, or a torch file, which is read without running
        code. None starts from random weights.
    pretrained_digest
        Digest of this file. It is filled in automatically and kept with a run, so that a fitted run can be read without
        the file; a changed file is refused.
    tuning
        Which weights are trained. ``full``: all. ``freeze``: the projector behind the network. ``linear_probe``: one
        linear map behind it. ``attentive_probe``: a query that attends to the tokens, and a linear map.
        ``probe_then_full``: the projector for the first 0.3 of the training, then all. ``lora``: the projector
        and low-rank changes of the attention's weights.
    backbone_lr_scale
        Learning rate of the pretrained weights as a share of the projector's; 0.1 in CBraMod.
    layer_decay
        Factor of the learning rate from each layer to the one below it; 0.65 in LaBraM, 1 is the same rate for all.
    pooling
        Input of the projector: the ``mean`` of the tokens, or all of them concatenated (``flatten``).
    """

    pretrained: Path | None = None
    pretrained_digest: str | None = None
    tuning: Tuning = "full"
    backbone_lr_scale: float = Field(default=0.1, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    pooling: Literal["mean", "flatten"] = "mean"

    #: Share of the epochs in which ``probe_then_full`` leaves the network as it is.
    probe_share: ClassVar[float] = 0.3
    #: Rank of the changes of ``lora``; 16 in REVE.
    lora_rank: ClassVar[int] = 16
    #: Hidden units of the projector.
    projector_hidden: ClassVar[int] = 1024
    #: In the projector.
    dropout: ClassVar[float] = 0.0
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "probe_share", "lora_rank", "projector_hidden", "dropout",
    })  # fmt: skip

    not_hashed: ClassVar[frozenset[str]] = frozenset({"pretrained"})
    #: Settings that name a file of weights; each has another one for its digest.
    weight_files: ClassVar[tuple[str, ...]] = ("pretrained",)
    layout: ClassVar[WeightsLayout]

    @model_validator(mode="after")
    def _check_tuning(self) -> FoundationConfig:
        if self.pretrained is None and self.tuning != "full":
            raise ValueError(
                f"tuning is {self.tuning}, but there is no file in pretrained, so random weights would "
                "stay unchanged; give the file, or set tuning to full"
            )
        if self.tuning in (*FROZEN, "lora"):
            because = f"with tuning {self.tuning} the pretrained weights do not learn"
            self.refuse_unused("backbone_lr_scale", "layer_decay", because=because)
        if self.tuning == "attentive_probe":
            self.refuse_unused("pooling", because="an attentive_probe learns how tokens are pooled")
        return self

    @model_validator(mode="after")
    def _remember_files(self) -> FoundationConfig:
        self.remember_files()
        return self

    def remember_files(self) -> None:
        """Note the digests of weights."""
        for name in self.weight_files:
            remember_digest(self, name)

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields; a file counts by its content.

        Raises
        ------
        DataError
            If a file is not there and was never seen.
        """
        self.find_weights()
        return super().hashed_fields()

    def find_weights(self) -> tuple[list[Path], list[Path]]:
        """Return the files of weights that are there, and those that were seen once and are gone.

        Raises
        ------
        DataError
            If a file is not there and was never seen.
        """
        found: list[Path] = []
        gone: list[Path] = []
        for name in self.weight_files:
            path = getattr(self, name)
            if path is None:
                continue
            path = path.expanduser()
            if getattr(self, f"{name}_digest") is None:
                check_file(
                    path, what=f"the file of {self.layout.title}", hint=f"correct encoder.network.{name}"
                )
            (found if path.is_file() else gone).append(path)
        return found, gone

    def list_weights(self) -> list[NeededWeights]:
        """Return the published files that settings name."""
        from braindecode_vis.embeddings.weights import describe_needed

        given = {name: getattr(self, name) for name in self.weight_files}
        return [
            describe_needed(None, name, path, what=f"the file of {self.layout.title}", named=True)
            for name, path in given.items()
            if path is not None
        ]

    def check_tensors(self, tensors: Mapping[str, Any], path: Path) -> None:
        """Raise `DataError` if a file is the model's, but for other data than it is asked to read."""

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return what brings trials to the form that the model reads, and the model with random weights."""
        raise NotImplementedError

    def build(self, signal: Signal, n_outputs: int) -> torch.nn.Module:
        """Return the network, with the published weights in it if a file is named.

        Without the file, which a fitted network does not need, it answers only after its weights were loaded.

        Parameters
        ----------
        signal
            Axes, channels, rate and unit of the trials.
        n_outputs
            Size of the output.

        Raises
        ------
        ConfigError, DataError
            If the trials do not fit the model, or the file is not its file.
        """
        from braindecode_vis.parts.foundation.models import foundation

        front, backbone = self.make_parts(signal)
        found, gone = self.find_weights()
        if found and not gone:
            tensors: dict[str, torch.Tensor] = {}
            for path in found:
                part = foundation.read_weights(path, self.layout)
                self.check_tensors(part, path)
                tensors |= part
            foundation.load_backbone(backbone, tensors, " and ".join(map(str, found)), self.layout)
        return foundation.FoundationNetwork(
            front, backbone, signal, n_outputs, self, missing=str(gone[0]) if gone else ""
        )


class EegModelConfig(FoundationConfig):
    """Settings that models of EEG share: channels by name, and the model's own rate and unit.

    Trials are resampled, cut into patches from their start (samples that fill no patch are left out), and divided so
    that values have the same unit as in its pretraining. This needs a known unit: set ``encoder.input_scaling.kind`` to
    ``none``, so that the network gets volts, or set `scale`.

    Parameters
    ----------
    channels
        Name of a channel in the data to the model's name, where they differ; null leaves the channel out. Case does not
        matter, and T3, T4, T5, T6 stand for T7, T8, P7, P8 where a model knows one of the two.
    scale
        Divisor of the values; None derives it from the unit of the responses.
    """

    channels: dict[str, str | None] = Field(default={})
    scale: float | None = Field(default=None, gt=0)

    removed_settings: ClassVar[Mapping[str, Any]] = {"rate": None}

    model_rate: ClassVar[float]
    #: Samples of a patch, and how many patches the model can take; None for any number.
    patch: ClassVar[int]
    max_patches: ClassVar[int | None] = None
    #: Volts that are 1 to the model; None if the model scales each trial by itself.
    volts: ClassVar[float | None]

    def find_rows(self, signal: Signal, table: tuple[str, ...], *, others: bool = False) -> dict[str, int]:
        """Return the own channel of each name of the model's table that the responses have, in their order.

        Parameters
        ----------
        signal
            Names its channels.
        table
            The model's names.
        others
            Whether channels without a row are left out, and not refused.

        Raises
        ------
        ConfigError, DataError
            If channels have no names, a channel has no row or two have the same, or `channels` names one that is not
            there.
        """
        read_axes(signal, self.layout.title)
        own = signal.ch_names
        if len(own) != signal.size_of("channel"):
            raise DataError(
                f"{self.layout.title} reads channels by name, but the responses have no channel names."
            )
        for name in self.channels:
            if name not in own:
                raise ConfigError(
                    f"encoder.network.channels names {name}, but the responses have no such channel"
                    f"{suggest(name, own)}; they have {', '.join(own[:8])}{', ...' if len(own) > 8 else ''}."
                )
        known = {name.upper(): name for name in table}
        rows: dict[str, int] = {}
        for index, name in enumerate(own):
            if (wanted := self.channels.get(name, name)) is None:
                continue
            key = wanted.upper()
            row = known.get(key) or known.get(_SYNONYMS.get(key, key))
            if row is None and others:
                continue
            if row is None:
                raise DataError(
                    f"{self.layout.title} has no row for the channel {wanted}; choose its row in "
                    f"encoder.network.channels, as {{{name}: {table[0]}}}, or leave it out there with "
                    f"{{{name}: null}}."
                )
            if row in rows:
                raise DataError(
                    f"the channels {own[rows[row]]} and {name} have the same row of {self.layout.title}, {row}; give "
                    f"one of them another row in encoder.network.channels, or leave it out there with {{{name}: null}}."
                )
            rows[row] = index
        if not rows:
            raise DataError(
                f"{self.layout.title} finds none of its channels ({', '.join(table[:5])}, ...) in the "
                "responses; give the row of each channel in encoder.network.channels."
            )
        return rows

    def find_own_places(self, signal: Signal, hint: str) -> tuple[dict[str, int], np.ndarray]:
        """Return the own channels by name, and their places in the responses, shape (n_channels, 3).

        Parameters
        ----------
        signal
            Brings the places.
        hint
            What to do without them, in messages.

        Raises
        ------
        ConfigError, DataError
            If there are none, or `channels` gives a channel another name, which has no effect on its place.
        """
        title = self.layout.title
        if signal.ch_pos is None:
            raise DataError(
                f"{title} reads channels by their places, but the responses have no positions; {hint}."
            )
        for name, wanted in self.channels.items():
            if wanted is not None:
                raise ConfigError(
                    f"encoder.network.channels names {name} {wanted}, but {title} takes the position of "
                    f"{name} from the responses, so another name has no effect; leave it out, or {hint}."
                )
        rows = self.find_rows(signal, signal.ch_names)
        return rows, signal.ch_pos[list(rows.values())]

    def find_divisor(self, signal: Signal) -> float:
        """Return what the values are divided by.

        Raises
        ------
        ConfigError
            If the unit is unknown, and `scale` does not replace it.
        """
        if self.scale is not None:
            return self.scale
        if self.volts is None:
            return 1.0
        if signal.unit not in _VOLTS:
            raise ConfigError(
                f"{self.layout.title} was pretrained on values in units of {self.volts * 1e6:g} µV, but the network "
                f"sees {signal.unit or 'an unknown unit'!r}; set encoder.input_scaling.kind and "
                "encoder.subject_alignment to none and preprocess without whitening, or set encoder.network.scale to "
                f"the value that stands for {self.volts * 1e6:g} µV."
            )
        return self.volts / _VOLTS[signal.unit]

    def make_front(self, signal: Signal, mixing: Any) -> Front:
        """Return what selects or mixes channels, resamples and scales.

        Parameters
        ----------
        signal
            Of the trials.
        mixing : array of shape (n_model_channels, n_channels), or list of int
            Weights of the own channels in those of the model, or which own channels they are.
        """
        from braindecode_vis.parts.foundation.models.foundation import Front

        title, rate = self.layout.title, self.model_rate
        if signal.sfreq is None:
            raise DataError(f"{title} reads {rate:g} Hz, but the responses have no sampling rate.")
        front = Front(signal, mixing, rate=rate, divisor=self.find_divisor(signal))
        n_patches, seconds = front.n_times // self.patch, self.patch / rate
        if n_patches < 1:
            raise DataError(
                f"{title} needs trials of at least {seconds:g} s ({self.patch} samples at {rate:g} Hz), but these "
                f"have {signal.size_of('time') / signal.sfreq:.3g} s; preprocess longer epochs."
            )
        if self.max_patches is not None and n_patches > self.max_patches:
            raise DataError(
                f"{title} has places for {self.max_patches} patches of {seconds:g} s, but these trials have "
                f"{n_patches}; preprocess shorter epochs."
            )
        return front


class LabramConfig(EegModelConfig):
    """LaBraM (Jiang et al. 2024): a transformer over patches of one channel and one second.

    The network that fine-tuning uses: tokens are normed by ``fc_norm``, which the released file does not have and
    which starts at 1 and 0; its ``norm`` and its head are not used.

    Parameters
    ----------
    pooling
        ``mean`` over patches (as published), ``cls`` for the extra token, ``flatten`` for all patches side by side.
    """

    kind: Literal["labram"] = "labram"
    pooling: Literal["mean", "cls", "flatten"] = "mean"  # type: ignore[assignment]

    #: Features of a token, a multiple of 25: the stem makes 25 steps of width / 25 maps.
    width: ClassVar[int] = 200
    #: Blocks, and heads of each.
    depth: ClassVar[int] = 12
    n_heads: ClassVar[int] = 10
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"width", "depth", "n_heads"})

    model_rate: ClassVar[float] = 200.0
    patch: ClassVar[int] = 200
    max_patches: ClassVar[int | None] = 16
    volts: ClassVar[float | None] = 1e-4
    layout: ClassVar[WeightsLayout] = WeightsLayout(
        "LaBraM",
        wrappers=("model",),
        prefix="student.",
        ignored=("mask_token", "norm.", "lm_head.", "logit_scale"),
        absent=("fc_norm.",),
    )

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        from braindecode_vis.parts.foundation.models.labram import CH_NAMES, Labram

        rows = self.find_rows(signal, CH_NAMES)
        front = self.make_front(signal, list(rows.values()))
        numbers = [CH_NAMES.index(name) + 1 for name in rows]  # row 0 is the extra token's
        return front, Labram(numbers, width=self.width, depth=self.depth, n_heads=self.n_heads)


class CBraModConfig(EegModelConfig):
    """CBraMod (Wang et al. 2025): attention over channels and over time side by side.

    Its code of places is a convolution over neighbouring rows, so that the order of channels matters.

    Parameters
    ----------
    montage
        ``tueg`` takes the 19 channels of the pretraining in their order, ``own`` all channels of the data in theirs,
        as published fine-tunings do.
    missing
        What happens with channels that ``tueg`` needs and the data do not have: they are refused, or interpolated from
        the others by spherical splines (``interpolate``).
    """

    kind: Literal["cbramod"] = "cbramod"
    montage: Literal["tueg", "own"] = "tueg"
    missing: Literal["refuse", "interpolate"] = "refuse"

    #: Layers; 12 as published.
    depth: ClassVar[int] = 12
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"depth"})

    model_rate: ClassVar[float] = 200.0
    patch: ClassVar[int] = 200
    volts: ClassVar[float | None] = 1e-4
    layout: ClassVar[WeightsLayout] = WeightsLayout("CBraMod", ignored=("proj_out.",))

    @model_validator(mode="after")
    def _check_montage(self) -> CBraModConfig:
        if self.montage == "own":
            self.refuse_unused("missing", "channels", because="montage own uses the channels unchanged")
        return self

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        from braindecode_vis.parts.foundation.models.cbramod import CH_NAMES, CBraMod

        mixing: Any
        if self.montage == "own":
            n_channels, _ = read_axes(signal, self.layout.title)
            mixing = list(range(n_channels))
        else:
            from braindecode_vis.parts.foundation.models.foundation import mix_channels

            rows = self.find_rows(signal, CH_NAMES, others=True)
            mixing = mix_channels(signal, rows, CH_NAMES, self.layout.title, missing=self.missing)
        return self.make_front(signal, mixing), CBraMod(depth=self.depth)


class EegptConfig(EegModelConfig):
    """EEGPT (Wang et al. 2024): four summaries of each quarter of a second over any of 62 channels.

    Its encoder gets each patch separately and without its time, so the mean over patches has no information about time.
    A token is a patch with its four summaries concatenated.

    Parameters
    ----------
    context
        Whether summaries pass through the predictor of the pretraining, in which the patches see each other and their
        times; it is in the same file.
    reference
        ``average`` subtracts the mean over the model's channels from each channel, as published; ``own`` does not
        change them.
    pooling
        ``flatten`` for all patches side by side (as published), or their ``mean``.
    """

    kind: Literal["eegpt"] = "eegpt"
    context: bool = False
    reference: Literal["average", "own"] = "average"
    pooling: Literal["mean", "flatten"] = "flatten"

    #: Features of a summary, blocks, heads of each.
    size: ClassVar[int] = 512
    depth: ClassVar[int] = 8
    n_heads: ClassVar[int] = 8
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"size", "depth", "n_heads"})

    model_rate: ClassVar[float] = 256.0
    patch: ClassVar[int] = 64
    volts: ClassVar[float | None] = 1e-3
    layout: ClassVar[WeightsLayout] = WeightsLayout(
        "EEGPT", wrappers=("state_dict",), prefix="target_encoder.", beside=("predictor.",)
    )

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        from braindecode_vis.parts.foundation.models.eegpt import CH_NAMES, EEGPT

        rows = self.find_rows(signal, CH_NAMES)
        mixing: Any = list(rows.values())
        if self.reference == "average":
            if len(rows) < 2:
                raise DataError(
                    "EEGPT subtracts the mean over channels from each channel, so nothing is left of "
                    f"{next(iter(rows))} alone; set encoder.network.reference to own."
                )
            mixing = np.zeros((len(rows), signal.size_of("channel")))
            mixing[:, list(rows.values())] = np.eye(len(rows)) - 1 / len(rows)
        numbers = [CH_NAMES.index(name) for name in rows]
        backbone = EEGPT(
            numbers, size=self.size, depth=self.depth, n_heads=self.n_heads, context=self.context
        )
        return self.make_front(signal, mixing), backbone


class BendrConfig(EegModelConfig):
    """BENDR (Kostas et al. 2021): convolutions, and a transformer over their outputs.

    Reads the 19 channels of its pretraining and leaves others out. It scales each trial by itself, all channels
    together, from -1 to 1, so that no unit is needed; channels that were scaled one by one before have lost their
    proportions. The last norm in its file is not applied, as in the published code.

    Parameters
    ----------
    pretrained
        Its first file, ``encoder.pt``.
    context
        Whether the transformer is used; otherwise the tokens are the outputs of the convolutions.
    contextualizer
        Its second file, ``contextualizer.pt``: the transformer.
    contextualizer_digest
        Digest of that file, as `pretrained_digest` is of the first.
    value_range
        Largest minus smallest value of the data set, in the unit of the responses: a row of its input says how much of
        that a trial spans. None writes 0, a middle, into that row.
    missing
        What happens with channels that the data do not have: they are zero (``zero``, as published), interpolated from
        the others by spherical splines (``interpolate``) or refused (``refuse``).
    pooling
        ``last`` for the last token (as published), ``cls`` for the token of the start, ``mean`` over the others, or
        these side by side (``flatten``).
    """

    kind: Literal["bendr"] = "bendr"
    context: bool = True
    contextualizer: Path | None = None
    contextualizer_digest: str | None = None
    value_range: float | None = Field(default=None, gt=0)
    missing: Literal["zero", "interpolate", "refuse"] = "zero"
    pooling: Literal["last", "cls", "mean", "flatten"] = "last"  # type: ignore[assignment]

    #: Maps of the convolutions; features, layers, heads and feed-forward width of the transformer.
    size: ClassVar[int] = 512
    hidden: ClassVar[int] = 1536
    depth: ClassVar[int] = 8
    n_heads: ClassVar[int] = 8
    feedforward: ClassVar[int] = 3076
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "size", "hidden", "depth", "n_heads", "feedforward",
    })  # fmt: skip

    not_hashed: ClassVar[frozenset[str]] = frozenset({"pretrained", "contextualizer"})
    weight_files: ClassVar[tuple[str, ...]] = ("pretrained", "contextualizer")
    model_rate: ClassVar[float] = 256.0
    patch: ClassVar[int] = 96
    volts: ClassVar[float | None] = None
    layout: ClassVar[WeightsLayout] = WeightsLayout("BENDR", ignored=("mask_replacement", "norm."))

    @model_validator(mode="after")
    def _check_parts(self) -> BendrConfig:
        self.refuse_unused("scale", because="BENDR scales each trial by itself")
        if not self.context:
            self.refuse_unused("contextualizer", because="without context there is no transformer")
            if self.pooling == "cls":
                raise ValueError(
                    "pooling cls is the token that the transformer starts with; set context to true"
                )
        elif (self.pretrained is None) != (self.contextualizer is None):
            raise ValueError(
                "BENDR's weights are two files: give encoder.pt in pretrained and contextualizer.pt in "
                "contextualizer, or set context to false to leave the transformer out"
            )
        return self

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return the front and the network; see `FoundationConfig.make_parts`."""
        from braindecode_vis.parts.foundation.models.bendr import CH_NAMES, Bendr
        from braindecode_vis.parts.foundation.models.foundation import mix_channels

        rows = self.find_rows(signal, CH_NAMES, others=True)
        mixing = mix_channels(signal, rows, CH_NAMES, self.layout.title, missing=self.missing)
        there = rows if self.missing == "zero" else CH_NAMES
        backbone = Bendr(
            sorted(CH_NAMES.index(name) for name in there),
            value_range=self.value_range,
            size=self.size,
            hidden=self.hidden,
            depth=self.depth,
            n_heads=self.n_heads,
            feedforward=self.feedforward,
            context=self.context,
        )
        return self.make_front(signal, mixing), backbone


class ReveConfig(EegModelConfig):
    """REVE (El Ouahidi et al. 2025): patches of one channel with a code of its place in space, for any montage.

    The large model has width 1216 and 5 frequencies.

    Parameters
    ----------
    channels
        Name of a channel in the data to its name in `positions`, where they differ; null leaves the channel out.
    scale
        Divisor of the values; None derives it from the unit of the responses, 100 µV being 1. Take 1 for
        responses that are standardised already, as those of the pretraining were.
    positions
        JSON table of names to x, y, z in m, as the authors publish it. None takes the positions of the responses. A
        pair such as F3-C3 lies in the middle. Mind that A1 is an ear in their table: the vertex of a BioSemi cap is
        ``biosemi128_A1``.
    width
        Features of a token, a multiple of 64.
    n_frequencies
        Number of frequencies of the position code along each axis.
    pooling
        ``mean`` over the tokens, ``attention`` of the file's own query, or all side by side (``flatten``).
    """

    kind: Literal["reve"] = "reve"
    positions: Path | None = None
    width: int = Field(default=512, ge=64, multiple_of=64)
    n_frequencies: int = Field(default=4, ge=1)
    pooling: Literal["mean", "attention", "flatten"] = "mean"  # type: ignore[assignment]

    #: Layers.
    depth: ClassVar[int] = 22
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"depth"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"pretrained", "positions"})
    model_rate: ClassVar[float] = 200.0
    patch: ClassVar[int] = 200
    volts: ClassVar[float | None] = 1e-4
    layout: ClassVar[WeightsLayout] = WeightsLayout("REVE")

    @model_validator(mode="after")
    def _check_waves(self) -> ReveConfig:
        if self.width > 2 * self.n_frequencies**4:
            raise ValueError(
                f"{self.n_frequencies} frequencies make {2 * self.n_frequencies**4} waves, too few for width "
                f"{self.width}; raise n_frequencies"
            )
        return self

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the table of positions."""
        fields = super().hashed_fields()
        if self.positions is not None:
            fields["positions_digest"] = hash_once(self._find_positions(self.positions))
        return fields

    def _find_positions(self, path: Path) -> Path:
        what = "the table of positions"
        return check_file(path.expanduser(), what=what, hint="correct encoder.network.positions")

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return the front and the transformer; see `FoundationConfig.make_parts`."""
        import torch

        from braindecode_vis.parts.foundation.models.reve import Reve, read_positions

        if self.positions is not None:
            names = [self.channels.get(name, name) for name in signal.ch_names]
            table = read_positions(self._find_positions(self.positions), [name for name in names if name])
            rows = self.find_rows(signal, tuple(table))
            places = np.array([table[name] for name in rows])
        else:
            hint = "name a table of them in encoder.network.positions"
            rows, places = self.find_own_places(signal, hint)
        if not (np.abs(places) < 1).all():
            raise DataError(
                f"REVE reads positions in m, but the largest coordinate is {np.abs(places).max():.3g}; correct "
                f"{self.positions or 'the montage of the responses'}."
            )
        backbone = Reve(
            torch.as_tensor(places, dtype=torch.float32),
            width=self.width,
            depth=self.depth,
            n_frequencies=self.n_frequencies,
        )
        backbone.cls_query_token.requires_grad_(self.pooling == "attention")  # otherwise nobody reads it
        return self.make_front(signal, list(rows.values())), backbone


class LunaConfig(EegModelConfig):
    """LUNA (Döner et al. 2025): a few queries attend to any number of channels in each patch of 40 samples.

    It standardises each channel of a trial by itself, so that no unit is needed, and knows channels by their places, of
    which only the proportions along each axis count. The large model has size 96, 6 queries and depth 10, the huge one
    128, 8 and 24.

    Parameters
    ----------
    channels
        Name of a channel in the data to a name of the 10-05 system, where `places` come from there; null leaves a
        channel out.
    places
        ``names`` for the places of the names in the 10-05 system, as published; a pair such as F3-C3 lies in the
        middle. ``responses`` for the positions in the responses.
    size, n_queries, depth
        Features of a query of two heads, a multiple of 16, and how many there are; blocks over the patches.
    """

    kind: Literal["luna"] = "luna"
    places: Literal["names", "responses"] = "names"
    size: int = Field(default=64, ge=16, multiple_of=16)
    n_queries: int = Field(default=4, ge=1)
    depth: int = Field(default=8, ge=1)

    #: Of a query.
    n_heads: ClassVar[int] = 2
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_heads"})

    model_rate: ClassVar[float] = 256.0
    patch: ClassVar[int] = 40
    volts: ClassVar[float | None] = None
    layout: ClassVar[WeightsLayout] = WeightsLayout(
        "LUNA",
        wrappers=("state_dict",),
        prefix="model.",
        prefix_may_lack=True,  # Lightning's checkpoints have it; the released files were not seen
        ignored=("decoder_head.", "channel_emb.", "classifier."),
    )

    @model_validator(mode="after")
    def _check_parts(self) -> LunaConfig:
        self.refuse_unused("scale", because="LUNA standardises each channel of a trial by itself")
        return self

    def make_parts(self, signal: Signal) -> tuple[Front, Backbone]:
        """Return the front and the network; see `FoundationConfig.make_parts`."""
        import torch

        from braindecode_vis.parts.foundation.models.luna import Luna

        if self.places == "responses":
            rows, found = self.find_own_places(signal, "set encoder.network.places to names")
        else:
            names = [self.channels.get(name, name) for name in signal.ch_names]
            table = find_known_places([name for name in names if name])
            rows = self.find_rows(signal, tuple(table))
            found = np.array([table[name] for name in rows])
        backbone = Luna(
            torch.as_tensor(found, dtype=torch.float32),
            size=self.size,
            n_queries=self.n_queries,
            depth=self.depth,
            n_heads=self.n_heads,
        )
        return self.make_front(signal, list(rows.values())), backbone


def find_known_places(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the places of electrodes, and of pairs of them, that the 10-05 system has, in m, by upper-case name."""
    from braindecode_vis.datasets.sources.meeg_source import list_scalp_positions

    known = {name.upper(): place for name, place in list_scalp_positions().items()}
    table = dict(known)
    for name in names:
        first, _, second = name.upper().partition("-")
        if first in known and second in known:
            table[name.upper()] = (known[first] + known[second]) / 2
    return table
