"""Options that clean continuous EEG or MEG and scale trials, shared by all loaders; and where each is possible.

Owns the settings, their defaults (which change nothing) and the refusal of what a layout cannot do: published epochs
can be scaled, and nothing else. The signal processing is in `braindecode_vis.preprocessing.cleaning`.

References
----------
.. [1] Défossez et al. (2023), doi:10.1038/s42256-023-00714-5: robust scaler and clamp at 20.
.. [2] Jas et al. (2017), Autoreject, NeuroImage 159, 417-429. doi:10.1016/j.neuroimage.2017.06.030
.. [3] Hyvärinen (1999), FastICA, doi:10.1109/72.761722; Ablin et al. (2018), Picard, doi:10.1109/TSP.2018.2844203
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.checks import ConfigError, suggest
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from braindecode_vis.datasets.sources.meeg_source import ContinuousPart, MeegSource


class ScalingConfig(Settings):
    """Scale every channel by its training trials, after everything else.

    Parameters
    ----------
    method
        ``robust``: minus the median, over the interquartile range [1]_. ``zscore``: minus the mean, over the standard
        deviation.
    clamp
        Scaled values are cut at plus and minus this; None leaves them.
    per
        Statistics of each ``subject``, or of each ``session`` of a subject, which then needs training trials.
    """

    method: Literal["robust", "zscore"] = "robust"
    clamp: float | None = Field(default=20.0, gt=0)
    per: Literal["subject", "session"] = "subject"


class IcaConfig(Settings):
    """Remove independent components that follow the eyes.

    Fitted per session on the samples of its training trials that no test trial shares, above 1 Hz; test trials reach
    it through the reach of that filter only. Components whose correlation with an electrode near the eyes is large are
    taken out of all samples.

    Parameters
    ----------
    method
        ``fastica``, or ``picard`` (``pip install "braindecode_vis[clean]"``).
    n_components
        Principal components that are kept for the fit; None for all that the rank allows, less one.
    eyes
        Electrodes that stand for the eyes; by default those of Fp1, Fpz, Fp2, AF7 and AF8 that were recorded.
    threshold
        Smallest absolute correlation of a component that is taken out; 0.7 is our choice.
    max_samples
        Largest number of samples that are fitted; evenly spaced ones are taken.
    """

    method: Literal["fastica", "picard"] = "fastica"
    n_components: int | None = Field(default=None, ge=2)
    eyes: tuple[str, ...] | None = None
    threshold: float = Field(default=0.7, gt=0, le=1)
    max_samples: int = Field(default=100_000, ge=1000)


class AutorejectConfig(Settings):
    """Repair and reject trials with autoreject [2]_ (``pip install "braindecode_vis[clean]"``).

    Thresholds are learnt from training trials, per session, and applied to all trials.

    Parameters
    ----------
    n_interpolate, consensus
        Candidates of the cross-validation, as in `autoreject.AutoReject`.
    n_folds
        Folds of the cross-validation.
    reject
        Which bad trials are left out: those for training (``train``, so that the test set stays that of the protocol),
        ``all``, or ``none``.
    max_rejected
        Largest share of the trials of a session that may be left out before it is an error.
    max_trials
        Largest number of training trials that thresholds are learnt from; evenly spaced ones are taken.
    """

    n_interpolate: tuple[int, ...] = (1, 4, 8)
    consensus: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    n_folds: int = Field(default=5, ge=2)
    reject: Literal["train", "all", "none"] = "train"
    max_rejected: float = Field(default=0.5, gt=0, le=1)
    max_trials: int = Field(default=300, ge=10)


@dataclass(frozen=True)
class Cleaning:
    """What is done to the samples of continuous recordings, in this order, and to the trials."""

    interpolate: bool = False
    reference: Literal["none", "average"] | tuple[str, ...] = "none"
    notch: tuple[float, ...] = ()
    l_freq: float | None = None
    h_freq: float | None = None
    ica: IcaConfig | None = None
    autoreject: AutorejectConfig | None = None
    scaling: ScalingConfig | None = None

    @property
    def changes_samples(self) -> bool:
        """Whether the continuous samples are changed at all."""
        return (
            self.interpolate or self.reference != "none" or bool(self.notch) or self.l_freq is not None
            or self.h_freq is not None or self.ica is not None
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = {name: getattr(self, name) for name in asdict(self)}
        return {k: v.hashed_fields() if isinstance(v, Settings) else v for k, v in plain.items()}


class CleaningOptions(Settings):
    """Options of every loader of EEG or MEG; the defaults change nothing.

    Parameters
    ----------
    bads
        Channels that are bad in every recording, beside those that a recording marks itself.
    bad_channels
        ``keep``, ``drop`` (from all recordings, so that channels stay the same), or ``interpolate`` (spherical splines
        from all other sensors of the recording). Bad channels never enter an average reference.
    reference
        ``average`` of all good electrodes of the recording, also those that are not stored; names of electrodes; or
        ``none`` for the reference of the recording.
    notch
        Frequencies in Hz, for example ``[50, 100]``.
    l_freq, h_freq
        Band in Hz; None leaves an end open. Filters have no phase shift and never cross a join of recordings.
    ica, autoreject, scaling
        Further steps, each with options of its own; off by default. ``true`` takes the defaults of a step.
    """

    bads: tuple[str, ...] = ()
    bad_channels: Literal["keep", "drop", "interpolate"] = "keep"
    reference: Literal["none", "average"] | tuple[str, ...] = "none"
    notch: tuple[float, ...] = ()
    l_freq: float | None = Field(default=None, gt=0)
    h_freq: float | None = Field(default=None, gt=0)
    ica: IcaConfig | None = None
    autoreject: AutorejectConfig | None = None
    scaling: ScalingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in ("ica", "autoreject"):
            if isinstance(values.get(name), bool):
                values[name] = {} if values[name] else None
        if isinstance(values.get("scaling"), str):
            values["scaling"] = None if values["scaling"] == "none" else {"method": values["scaling"]}
        return values

    @model_validator(mode="after")
    def _check_cleaning(self) -> CleaningOptions:
        if self.bads and self.bad_channels == "keep":
            raise ValueError("bads names channels, but bad_channels is keep; set it to drop or interpolate")
        if self.l_freq is not None and self.h_freq is not None and self.l_freq >= self.h_freq:
            raise ValueError(f"l_freq {self.l_freq:g} Hz must be below h_freq {self.h_freq:g} Hz")
        if any(frequency <= 0 for frequency in self.notch):
            raise ValueError("notch frequencies must be above 0 Hz")
        return self

    def list_changed(self) -> list[str]:
        """Return the names of these options that are not at their defaults."""
        return [name for name in CleaningOptions.model_fields if self._is_set(name)]

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def list_learnt(self, mvnn: str | None = "none") -> tuple[str, ...]:
        """Return the names of the settings in force that learn from training trials.

        Parameters
        ----------
        mvnn
            Noise normalisation of the data set; None is off.
        """
        learns = {
            "mvnn": mvnn not in (None, "none"),
            "scaling": self.scaling is not None,
            "ica": self.ica is not None,
            "autoreject": self.autoreject is not None,
        }
        return tuple(name for name, on in learns.items() if on)

    def learns_before_split(self) -> tuple[str, ...]:
        """Return the cleaning steps that learn from training trials; a data set with ``mvnn`` adds it."""
        return self.list_learnt()

    def describe_filter(self) -> str:
        """Return the filters in words."""
        band = None
        if self.l_freq is not None or self.h_freq is not None:
            band = f"{self.l_freq or 0:g} to {'Nyquist' if self.h_freq is None else f'{self.h_freq:g}'} Hz"
        notch = f"notch at {', '.join(f'{f:g}' for f in self.notch)} Hz" if self.notch else None
        return ", ".join(filter(None, (band, notch))) or "no filter"

    def make_cleaning(self) -> Cleaning:
        """Return the steps in their order."""
        return Cleaning(
            interpolate=self.bad_channels == "interpolate", reference=self.reference, notch=self.notch,
            l_freq=self.l_freq, h_freq=self.h_freq, ica=self.ica, autoreject=self.autoreject, scaling=self.scaling,
        )  # fmt: skip


def add_cleaning(source: MeegSource, options: CleaningOptions, *, referenced: bool = False) -> MeegSource:
    """Return the source with the cleaning in its plan, and without channels that are to be dropped.

    Parameters
    ----------
    referenced
        Whether the parts have applied ``options.reference`` themselves.

    Raises
    ------
    ConfigError
        If an option cannot be applied to these files; says which can.
    """
    from braindecode_vis.datasets.sources.meeg_source import ContinuousPart

    cleaning = options.make_cleaning()
    if referenced:
        cleaning = replace(cleaning, reference="none")
    parts = source.parts
    if not all(isinstance(part, ContinuousPart) for part in parts):
        impossible = [name for name in options.list_changed() if name != "scaling"]
        if impossible:
            raise ConfigError(
                f"dataset.{impossible[0]} needs continuous recordings, but {parts[0].where} holds published epochs; of "
                "the cleaning options only dataset.scaling applies to them: leave the others out, or read the raw "
                "layout."
            )
        return replace(source, plan=replace(source.plan, cleaning=cleaning))
    continuous = [part for part in parts if isinstance(part, ContinuousPart)]
    _check_options(continuous, options, cleaning, source.modality)
    marked = {name: None for part in continuous for name in part.bads}
    if options.bad_channels == "drop":
        source = _drop_channels(source, continuous, [*options.bads, *marked])
    elif options.bads:
        continuous = [
            replace(part, bads=tuple(dict.fromkeys([*part.bads, *options.bads]))) for part in continuous
        ]
        source = replace(source, parts=tuple(continuous))
    return replace(source, plan=replace(source.plan, cleaning=cleaning))


def _check_options(
    parts: Sequence[ContinuousPart], options: CleaningOptions, cleaning: Cleaning, modality: str
) -> None:
    known = parts[0].all_names
    named = {
        "bads": options.bads,
        "reference": () if isinstance(cleaning.reference, str) else cleaning.reference,
        "ica.eyes": (options.ica.eyes or ()) if options.ica else (),
    }
    for option, names in named.items():
        for part in parts if names else ():
            for name in names:
                if name not in part.all_names:
                    raise ConfigError(
                        f"dataset.{option} names the channel {name!r}, which {part.where} does not have"
                        f"{suggest(name, known)}; it has {', '.join(part.all_names)}."
                    )
    if modality == "meg":
        for name, used in (
            ("reference", cleaning.reference != "none"),
            ("ica", cleaning.ica is not None),
            ("autoreject", cleaning.autoreject is not None),
        ):
            if used:
                raise ConfigError(
                    f"dataset.{name} is for EEG, but {parts[0].where} is MEG; filters, bad_channels and scaling apply "
                    "to it."
                )
    for part in parts:
        above = [f for f in (options.l_freq, options.h_freq, *options.notch) if f and f >= part.sfreq / 2]
        if above:
            raise ConfigError(
                f"{part.where} has {part.sfreq:g} Hz, so filters must stay below {part.sfreq / 2:g} Hz, not "
                f"{above[0]:g}."
            )


def _drop_channels(source: MeegSource, parts: Sequence[ContinuousPart], bads: Sequence[str]) -> MeegSource:
    """Leave bad channels out of every part: out of what is stored, and out of what references are made of."""
    kept = [row for row, name in enumerate(source.ch_names) if name not in bads]
    if not kept:
        raise ConfigError(
            "dataset.bad_channels is drop, and every channel is bad; choose interpolate or other bads."
        )
    names = tuple(source.ch_names[row] for row in kept)
    smaller = tuple(
        replace(
            part, ch_names=names, read=PickedChannels(part.read, np.array(kept)),
            bads=tuple(dict.fromkeys([*part.bads, *bads])), sensors=part.sensors or part.own_sensors,
        )
        for part in parts
    )  # fmt: skip
    positions = None if source.ch_pos is None else np.asarray(source.ch_pos)[kept]
    dropped = [name for name in source.ch_names if name in bads]
    notes = {**source.notes, **({"channels_dropped": dropped} if dropped else {})}
    return replace(source, parts=smaller, ch_pos=positions, notes=notes)


class PickedChannels:
    """Reads some channels of what another reader gives."""

    def __init__(self, read: Any, rows: np.ndarray) -> None:
        self.read, self.rows = read, rows

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return samples `start` to `stop`, shape (n_channels, stop - start)."""
        return np.asarray(self.read(start, stop))[self.rows]
