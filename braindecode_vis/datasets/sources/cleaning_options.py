"""Options that clean continuous EEG or MEG and scale trials, shared by all loaders, and the layouts that allow them.

Owns the settings, their defaults (which change nothing) and the refusal of options that a layout does not allow:
published epochs can only be scaled. The signal processing is in `braindecode_vis.preprocessing.cleaning`.

References
----------
.. [1] Défossez et al. (2023), doi:10.1038/s42256-023-00714-5: robust scaler and clamp at 20.
.. [2] Jas et al. (2017), Autoreject, NeuroImage 159, 417-429. doi:10.1016/j.neuroimage.2017.06.030
.. [3] Hyvärinen (1999), FastICA, doi:10.1109/72.761722; Ablin et al. (2018), Picard, doi:10.1109/TSP.2018.2844203
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from braindecode_vis.base.settings import Settings


class ScalingConfig(Settings):
    """Scale every channel by its training trials, after everything else.

    Parameters
    ----------
    method
        ``robust``: minus the median, over the interquartile range [1]_. ``zscore``: minus the mean, over the standard
        deviation.
    clamp
        Scaled values are clipped at plus and minus this value; None does not clip.
    per
        Statistics per ``subject``, or per ``session`` of a subject; each session then needs training trials.
    """

    method: Literal["robust", "zscore"] = "robust"
    # Défossez et al. (2023) [1]_ clip at 20 interquartile ranges.
    clamp: float | None = Field(default=20.0, gt=0)
    per: Literal["subject", "session"] = "subject"


class IcaConfig(Settings):
    """Remove independent components that correlate with eye movements.

    Fitted per session on the samples of its training trials that are in no test trial, above 1 Hz; test trials affect
    it only through the length of that filter. Components with a large correlation with an electrode near the eyes are
    removed from all samples.

    Parameters
    ----------
    method
        ``fastica``, or ``picard`` (``pip install "braindecode_vis[eeg]"``).
    n_components
        Number of principal components for the fit; None for all that the rank allows, minus one.
    eyes
        Electrodes near the eyes; by default those of Fp1, Fpz, Fp2, AF7 and AF8 that were recorded.
    threshold
        Smallest absolute correlation of a removed component; 0.7 is our choice.
    """

    method: Literal["fastica", "picard"] = "fastica"
    n_components: int | None = Field(default=None, ge=2)
    eyes: tuple[str, ...] | None = None
    threshold: float = Field(default=0.7, gt=0, le=1)
    # A rule of thumb needs 20 samples per squared number of components; 63 components need 80,000.

    #: Largest number of samples that are fitted; evenly spaced ones are taken.
    max_samples: ClassVar[int] = 100_000
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"max_samples"})


class AutorejectConfig(Settings):
    """Repair and reject trials with autoreject [2]_ (``pip install "braindecode_vis[eeg]"``).

    Thresholds are fitted on training trials, per session, and applied to all trials.

    Parameters
    ----------
    reject
        Bad trials that are left out: only training trials (``train``, so that the test set stays as in the protocol),
        ``all``, or ``none``.
    max_rejected
        Largest share of the trials of a session that may be left out; more are an error.
    """

    packages: ClassVar[tuple[str, ...]] = ("autoreject",)

    # Coarser than autoreject's own grid (1, 4, 32 and eleven shares): the search takes most of the time of this step,
    # and with 32 to 64 electrodes few repairs are possible.
    reject: Literal["train", "all", "none"] = "train"
    max_rejected: float = Field(default=0.5, gt=0, le=1)

    #: Candidates of the cross-validation, as in `autoreject.AutoReject`.
    n_interpolate: ClassVar[tuple[int, ...]] = (1, 4, 8)
    consensus: ClassVar[tuple[float, ...]] = (0.2, 0.4, 0.6, 0.8)
    #: Folds of the cross-validation.
    n_folds: ClassVar[int] = 5
    #: Largest number of training trials that thresholds are learnt from; evenly spaced ones are taken.
    max_trials: ClassVar[int] = 300
    fixed_settings: ClassVar[frozenset[str]] = frozenset({
        "n_interpolate", "consensus", "n_folds", "max_trials",
    })  # fmt: skip


@dataclass(frozen=True)
class Cleaning:
    """Processing of the samples of continuous recordings, in this order, and of the trials."""

    interpolate: bool = False
    reference: Literal["none", "average"] | tuple[str, ...] = "none"
    notch: tuple[float, ...] = ()
    l_freq: float | None = None
    h_freq: float | None = None
    ica: IcaConfig | None = None
    autoreject: AutorejectConfig | None = None
    scaling: ScalingConfig | None = None
    causal: bool = False

    @property
    def changes_samples(self) -> bool:
        """Whether the continuous samples are changed."""
        # Autoreject and scaling act on trials, after they are cut.
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
        Channels that are bad in every recording, in addition to those that a recording marks.
    bad_channels
        ``keep``, ``drop`` (from all recordings, so that channels stay the same), or ``interpolate`` (spherical splines
        from all other sensors of the recording). Bad channels never enter an average reference.
    reference
        ``average`` of all good electrodes of the recording, also those that are not stored; names of electrodes; or
        ``none`` for the reference of the recording.
    notch
        Frequencies in Hz, for example ``[50, 100]``.
    l_freq, h_freq
        Band in Hz; None for no limit. Filters have no phase shift (but see `causal`) and never cross a join of
        recordings.
    causal
        Whether notch and high-pass use only earlier samples, as needed for live decoding (``live``): a run that was
        trained with this setting gets the same responses there. They are recursive filters of low order, which shift
        the phase near their frequencies. The low-pass does not change.
    ica, autoreject, scaling
        Further steps, each with its own options; off by default. ``true`` uses the defaults of a step.
    """

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"causal"})

    bads: tuple[str, ...] = ()
    bad_channels: Literal["keep", "drop", "interpolate"] = "keep"
    reference: Literal["none", "average"] | tuple[str, ...] = "none"
    notch: tuple[float, ...] = ()
    l_freq: float | None = Field(default=None, gt=0)
    h_freq: float | None = Field(default=None, gt=0)
    causal: bool = False
    ica: IcaConfig | None = None
    autoreject: AutorejectConfig | None = None
    scaling: ScalingConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        # On a command line: ``dataset.ica=true``, ``dataset.scaling=robust``.
        for name in ("ica", "autoreject"):
            if isinstance(values.get(name), bool):
                values[name] = {} if values[name] else None
        if isinstance(values.get("scaling"), str):
            values["scaling"] = None if values["scaling"] == "none" else {"method": values["scaling"]}
        return values

    @model_validator(mode="after")
    def _check_cleaning(self) -> CleaningOptions:
        # Bad channels that are named and kept would have no effect, without a warning.
        if self.bads and self.bad_channels == "keep":
            raise ValueError("bads lists channels, but bad_channels is keep; set it to drop or interpolate")
        if self.l_freq is not None and self.h_freq is not None and self.l_freq >= self.h_freq:
            raise ValueError(f"l_freq {self.l_freq:g} Hz must be below h_freq {self.h_freq:g} Hz")
        if any(frequency <= 0 for frequency in self.notch):
            raise ValueError("notch frequencies must be above 0 Hz")
        if self.causal and self.l_freq is None and not self.notch:
            raise ValueError(
                "causal applies to a high-pass or a notch, but neither is set; set l_freq or notch, or leave it out"
            )
        return self

    def list_changed(self) -> list[str]:
        """Return the names of these options that are not at their defaults."""
        fields = type(self).model_fields
        return [name for name in CleaningOptions.model_fields if getattr(self, name) != fields[name].default]

    def learns_before_split(self) -> tuple[str, ...]:
        """Return the active steps that are fitted on training trials before a split is drawn."""
        # A message names the first of them in this order.
        return tuple(name for name in ("scaling", "ica", "autoreject") if getattr(self, name) is not None)

    def describe_filter(self) -> str:
        """Return a description of the filters."""
        band = None
        if self.l_freq is not None or self.h_freq is not None:
            band = f"{self.l_freq or 0:g} to {'Nyquist' if self.h_freq is None else f'{self.h_freq:g}'} Hz"
        notch = f"notch at {', '.join(f'{f:g}' for f in self.notch)} Hz" if self.notch else None
        return ", ".join(filter(None, (band, notch, "causal" if self.causal else None))) or "no filter"

    def make_cleaning(self) -> Cleaning:
        """Return the steps in their order."""
        return Cleaning(
            interpolate=self.bad_channels == "interpolate", reference=self.reference, notch=self.notch,
            l_freq=self.l_freq, h_freq=self.h_freq, ica=self.ica, autoreject=self.autoreject, scaling=self.scaling,
            causal=self.causal,
        )  # fmt: skip
