"""A score against time: the table, the cluster test, the latency of the onset and the figure of one curve.

Owns what analyses over windows of time share once every window has been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.analysis.cluster_tests import (
    MAX_DRAWS,
    MIN_SUBJECTS,
    ClusterTest,
    bootstrap_curves,
    bootstrap_onset,
    cluster_over_labels,
    cluster_over_subjects,
)
from braindecode_vis.analysis.cuts import Window
from braindecode_vis.analysis.drawing import draw_curve, mark_chance, mark_spans, mark_stimulus
from braindecode_vis.analysis.measure import Measured
from braindecode_vis.analysis.study import Findings, Plot, Study
from braindecode_vis.arrays import Score
from braindecode_vis.checks import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """A tested curve.

    Parameters
    ----------
    table
        One row per window: `start`, `stop`, value, interval, chance, n, `p_value` of the window alone, `p_cluster`.
    test
        Clusters.
    onset, onset_low, onset_high
        Latency of the first significant cluster in s: the end of its first window, by which time the information was
        there. NaN without one.
    onset_share
        Share of the resamples that have a significant cluster.
    """

    table: pd.DataFrame
    test: ClusterTest
    onset: float
    onset_low: float
    onset_high: float
    onset_share: float


def check_windows(windows: Sequence[Window]) -> None:
    """Raise `DataError` if there are too few windows for a curve."""
    if len(windows) < 2:
        raise DataError("a curve over time needs at least two windows; choose a smaller step or width.")


def make_curve(
    study: Study, windows: Sequence[Window], measured: Sequence[Measured], *, alpha: float
) -> Curve:
    """Test the metric of each window, and locate its onset.

    Raises
    ------
    DataError
        If there are few subjects and no null was made, since the gallery is too large to permute.
    """
    values = np.stack([m.values for m in measured], axis=1)
    ids, subjects = measured[0].ids, measured[0].subjects
    people = np.unique(subjects.astype(str))
    chance = np.array([m.chance for m in measured])
    if len(people) >= MIN_SUBJECTS:
        means = np.stack([values[subjects.astype(str) == person].mean(axis=0) for person in people])
        test = cluster_over_subjects(
            means, chance, seed=study.seed, n_permutations=study.n_permutations, alpha=alpha
        )
    else:
        nulls = [m.null for m in measured if m.null is not None]
        if len(nulls) < len(measured):
            raise DataError(
                "the images of this test set cannot be permuted (one image, or more than 2000), and fewer than six "
                "subjects cannot be tested across subjects; test on fewer images."
            )
        null = np.stack(nulls, axis=1)
        test = cluster_over_labels(np.array([m.observed for m in measured]), null, alpha=alpha)
    draws = bootstrap_curves(
        values, ids, subjects, n_draws=min(MAX_DRAWS, study.n_bootstrap), seed=study.seed
    )
    rows = [m.as_row(study) for m in measured]
    return finish_curve(windows, rows, test, draws)


def finish_curve(
    windows: Sequence[Window], rows: Sequence[dict[str, Any]], test: ClusterTest, draws: np.ndarray
) -> Curve:
    """Put table, clusters and latency together.

    Parameters
    ----------
    rows
        Value, interval, chance, n and p-value of each window.
    draws : array of shape (n_draws, n_windows)
        Resampled curves.
    """
    table = pd.DataFrame(rows)
    table.insert(0, "start", [w.start for w in windows])
    table.insert(1, "stop", [w.stop for w in windows])
    table["p_cluster"] = test.spread(len(windows))
    table["significant"] = (table["p_cluster"] <= test.alpha).fillna(False).astype(bool)
    stops = [w.stop for w in windows]
    low, high, share = bootstrap_onset(test, draws, stops)
    onset = float("nan") if test.onset is None else float(stops[test.onset])
    if test.onset is None:
        low = high = float("nan")
    table["onset"], table["onset_low"], table["onset_high"] = onset, low, high
    return Curve(table, test, onset, low, high, share)


def describe_curve(curve: Curve, metric: str) -> str:
    """Return the result as sentences."""
    table = curve.table
    best = table.loc[table["value"].idxmax()]
    peak = (
        f"{metric} peaks at {best['value']:.3f} ({best['ci_low']:.3f} to {best['ci_high']:.3f}, chance "
        f"{best['chance']:.3f}) in the window from {best['start'] * 1000:.0f} to {best['stop'] * 1000:.0f} ms. "
    )
    if curve.test.onset is None:
        smallest = min(curve.test.p_values, default=1.0)
        return f"{peak}No window is part of a significant cluster (smallest p = {smallest:.3g}; {curve.test.method})."
    spans = ", ".join(
        f"{table['start'][a] * 1000:.0f} to {table['stop'][b] * 1000:.0f} ms (p = {p:.2g})"
        for (a, b), p in zip(curve.test.spans, curve.test.p_values, strict=True)
        if p <= curve.test.alpha
    )
    return (
        f"{peak}It is above chance in the windows from {spans} ({curve.test.method}). The first of them is complete at "
        f"{curve.onset * 1000:.0f} ms (95 % interval {curve.onset_low * 1000:.0f} to {curve.onset_high * 1000:.0f} ms; "
        f"{curve.onset_share:.0%} of the resamples have a significant cluster)."
    )


def report_curve(
    study: Study, curve: Curve, metric: str, *, name: str, title: str, how: str, by_end: bool
) -> Findings:
    """Return the findings of one curve.

    Parameters
    ----------
    how
        What was done, as a sentence.
    by_end
        Draw each window at its end (growing windows) rather than in its middle.
    """
    table = curve.table
    x = table["stop"] if by_end else (table["start"] + table["stop"]) / 2
    spans = [(float(x[a]), float(x[b])) for a, b in curve.test.significant]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mark_stimulus(axes)
        mark_chance(axes, float(table["chance"].iloc[0]))
        draw_curve(axes, x * 1000, table, label=metric)
        mark_spans(axes, [(a * 1000, b * 1000) for a, b in spans])
        axes.set_xlabel("end of the window (ms)" if by_end else "middle of the window (ms)")
        axes.set_ylabel(metric)
        axes.legend(loc="upper left")

    found = describe_curve(curve, metric)
    caption = (
        f"{metric} of each window of time with its 95 % bootstrap interval. The bar marks windows in significant "
        "clusters, the dashed line is chance, the thin line the onset of the image."
    )
    best = table.loc[table["value"].idxmax()]
    score = Score(
        method="decoded", metric=f"{metric}@{name}_peak", value=float(best["value"]), chance=float(best["chance"]),
        n_queries=int(best["n"]), protocol=f"{study.protocol}; best of {len(table)} windows, chosen on test trials",
        subject="all", split="test", seed=study.seed, ci_low=float(best["ci_low"]), ci_high=float(best["ci_high"]),
    )  # fmt: skip
    return Findings(title, f"{how} {found}", table, (Plot(name, caption, found, draw),), (score,))
