"""Which frequency bands have the information: retrieval with one band kept, or one removed.

Filters run on trials that are already cut: a Butterworth filter of fourth order forward and backward (no phase shift),
on a trial that is mirrored at both ends. A slow band has only a few cycles in a trial of a second, and mirrored ends
are no recording; what is found below about 2 / (length of the trial) Hz is the mean of the trial. A filter without
phase shift also spreads activity to earlier times, which matters to no score here, since whole trials are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError
from braindecode_vis.parts.analyses.cuts import read_times
from braindecode_vis.parts.analyses.measure import (
    RetrievalAnalysis,
    add_holm,
    check_retrieval,
    describe_result,
    measure_changes,
)
from braindecode_vis.parts.analyses.study import Change, Findings, Plot, Study
from braindecode_vis.report.drawing import draw_bars
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.score_row import format_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Limits as EEG textbooks have them; 0.5 Hz is the lowest that trials of two seconds can hold.
BANDS = {
    "delta": (0.5, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 30.0), "gamma": (30.0, 80.0),
}  # fmt: skip
_ORDER = 4


class FrequencyBandsConfig(RetrievalAnalysis):
    """Decode with one band only, and with all but one.

    Parameters
    ----------
    bands
        Name to lower and upper edge in Hz. Bands above half the sampling rate are left out; a band that extends above
        it is cut there.
    """

    kind: Literal["frequency_bands"] = "frequency_bands"
    bands: dict[str, tuple[float, float]] = Field(default=BANDS, min_length=1)

    #: ``only`` keeps a band, ``without`` removes it.
    modes: ClassVar[tuple[Literal["only", "without"], ...]] = ("only", "without")
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"modes"})

    @model_validator(mode="after")
    def _check_bands(self) -> FrequencyBandsConfig:
        for name, (low, high) in self.bands.items():
            if not 0 < low < high:
                raise ValueError(
                    f"the band {name} must have 0 < lower < upper edge, not {low:g} and {high:g}"
                )
        return self

    def compute(self, study: Study) -> Findings:
        """Filter, fit and test once per band and mode."""
        check_retrieval(study, self.kind)
        _, interval = read_times(study.responses)
        bands, lost = fit_bands(self.bands, 1 / interval)
        changes: dict[tuple[str, str], Change | None] = {("all", "all"): None}
        for mode in self.modes:
            for name, edges in bands.items():
                changes[mode, name] = BandFilter(edges, 1 / interval, mode)
        measured = measure_changes(study, changes, self.metric, what="frequency bands")
        whole = measured["all", "all"]
        rows = []
        for (kept, name), found in measured.items():
            low, high = bands.get(name, (float("nan"), float("nan")))
            own = {"band": name, "mode": kept, "l_freq": low, "h_freq": high, **found.as_row(study)}
            rows.append(own | found.as_difference(study, whole))
        table = pd.DataFrame(rows)
        # Of a band alone the page names the best score, of one left out the largest loss.
        table["p_of_best"] = table["p_value"].where(table["mode"] == "only", table["p_difference"])
        table.loc[table["mode"] == "all", "p_of_best"] = np.nan
        return self._report(add_holm(table, "mode", "p_of_best").drop(columns="p_of_best"), lost)

    def _report(self, table: pd.DataFrame, lost: list[str]) -> Findings:
        whole = table.iloc[0]

        def draw(figure: Figure) -> None:
            panels = figure.subplots(1, len(self.modes), sharex=True, squeeze=False)[0]
            for axes, mode in zip(panels, self.modes, strict=True):
                own = table[table["mode"] == mode]
                edges = zip(own["band"], own["l_freq"], own["h_freq"], strict=True)
                draw_bars(axes, own, [f"{band} {low:g}-{high:g} Hz" for band, low, high in edges])
                axes.axvline(whole["value"], color="C1", lw=1, label="all frequencies")
                axes.axvline(whole["chance"], color="C2", lw=1, ls="--", label="chance")
                axes.set_title({"only": "only this band", "without": "without this band"}[mode])
                axes.set_xlabel(find_metric(self.metric).label)
            panels[0].legend(loc="lower right")

        parts = [describe_result(whole, f"with all frequencies {self.metric}")]
        for mode in self.modes:
            own = table[table["mode"] == mode]
            values = own["value"].to_numpy(float)
            pick = own.iloc[int(values.argmax() if mode == "only" else values.argmin())]
            if mode == "only":
                parts.append(describe_result(pick, f"best alone is {pick['band']}: {self.metric}", "p_holm"))
            else:
                p = format_p_value(pick["p_holm"], in_words=True)
                parts.append(
                    f"the score loses most without {pick['band']}: {pick['difference']:+.3f} "
                    f"({pick['difference_low']:+.3f} to {pick['difference_high']:+.3f}, {p})"
                )
        found = "; ".join(parts) + f"; p-values of bands by Holm over {len(own)} bands."
        note = f" Left out, above half the sampling rate: {', '.join(lost)}." if lost else ""
        how = (
            "Trials were filtered one by one, mirrored at their ends, then an encoder was fitted and tested on each "
            "band. Bands with few cycles in a trial are blurred by its ends."
        )
        caption = (
            "Score with one band kept (left) or removed, 95 % intervals; lines: all frequencies, and chance."
        )
        plot = Plot("frequency_bands", caption, found, draw)
        return Findings("Frequency bands", f"{how} {found}{note}", table, (plot,))


def fit_bands(
    bands: dict[str, tuple[float, float]], sfreq: float
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Return the bands below half the sampling rate, and the names of those that are not.

    Raises
    ------
    ConfigError
        If none is left.
    """
    top = sfreq / 2
    # A filter's edge must stay below the Nyquist frequency, and a sliver of a band is no band.
    kept = {name: (low, min(high, 0.95 * top)) for name, (low, high) in bands.items() if low < 0.9 * top}
    if not kept:
        raise ConfigError(f"no band lies below {top:g} Hz, half the sampling rate of the trials.")
    return kept, [name for name in bands if name not in kept]


@dataclass(frozen=True)
class BandFilter:
    """Keeps (``only``) or removes (``without``) a band of every trial.

    Parameters
    ----------
    edges
        In Hz.
    sfreq
        Sampling rate in Hz.
    mode
        ``only`` or ``without``.
    """

    edges: tuple[float, float]
    sfreq: float
    mode: str

    def __call__(self, responses: Responses) -> Responses:
        """Return filtered trials."""
        from mne.filter import filter_data

        axis = responses.dims.index("time")
        data = np.moveaxis(np.asarray(responses.data, dtype=np.float64), axis, -1)
        n = data.shape[-1]
        pad = n - 1
        # Mirrored about its end values, so that the filter meets no step where the trial was cut.
        padded = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(pad, pad)], mode="reflect", reflect_type="odd")
        low, high = self.edges if self.mode == "only" else self.edges[::-1]  # mne's notation of a band-stop
        settings = {"order": _ORDER, "ftype": "butter", "output": "sos"}
        filtered = filter_data(
            padded.reshape(-1, padded.shape[-1]), self.sfreq, low, high, method="iir", iir_params=settings,
            phase="zero", copy=True, verbose="ERROR",
        )  # fmt: skip
        filtered = filtered.reshape(padded.shape)[..., pad : pad + n]
        out = np.ascontiguousarray(np.moveaxis(filtered, -1, axis), dtype=np.float32)
        return replace(responses, data=out)
