"""A score against time: the table, the cluster test, the latency of the onset and the figure of one curve.

Owns what analyses over windows of time share once every window has been measured, and two tests of a curve against
chance, both one-sided and corrected for all windows by the largest cluster mass. With six subjects or more, the
subjects' curves are sign-flipped (mne); of five, the smallest p-value that this test can have is 1/16, so it could
never be significant. With fewer, labels are permuted within the subjects, which speaks of these subjects only. A
cluster says that there is an effect somewhere; its first window is an estimate, whose uncertainty a bootstrap shows,
and no proof that nothing came before. Filters without phase shift spread effects to earlier times.

References
----------
Maris and Oostenveld (2007), doi:10.1016/j.jneumeth.2007.03.024; Sassenhagen and Draschkow (2019),
doi:10.1111/psyp.13335 (what cluster latencies do not mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.parts.analyses.cuts import Window
from braindecode_vis.parts.analyses.measure import (
    Measured,
    describe_limits,
    find_best,
    pick_limits,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.report.drawing import draw_curve, mark_chance, mark_spans, mark_stimulus
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import compute_p_value

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
    clusters, subjects = measured[0].clusters, measured[0].subjects
    names = np.unique(subjects.astype(str))
    chance = np.array([m.chance for m in measured])
    if len(names) >= MIN_SUBJECTS:
        means = np.stack([values[subjects.astype(str) == name].mean(axis=0) for name in names])
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
    # Whole curves are resampled, so that the onset of each can be found.
    draws = bootstrap_curves(
        values, clusters, subjects, n_draws=min(MAX_DRAWS, study.n_bootstrap), seed=study.seed
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
    if test.onset is None:  # resamples may have one by chance, which is no interval of anything
        low = high = float("nan")
    table["onset"], table["onset_low"], table["onset_high"] = onset, low, high
    return Curve(table, test, onset, low, high, share)


def describe_curve(curve: Curve, metric: str) -> str:
    """Return the result as sentences."""
    table = curve.table
    best = find_best(table)
    peak = (
        f"{metric} peaks at {best['value']:.3f} ({describe_limits(best, what='')}, chance "
        f"{best['chance']:.3f}) in the window from {best['start'] * 1000:z.0f} to {best['stop'] * 1000:z.0f} ms. "
    )
    if curve.test.onset is None:
        smallest = format_p_value(min(curve.test.p_values, default=1.0), in_words=True)
        return f"{peak}No window is part of a significant cluster (smallest {smallest}; {curve.test.method})."
    spans = ", ".join(
        f"{table['start'][a] * 1000:z.0f} to {table['stop'][b] * 1000:z.0f} ms ({format_p_value(p, in_words=True)})"
        for (a, b), p in zip(curve.test.spans, curve.test.p_values, strict=True)
        if p <= curve.test.alpha
    )
    return (
        f"{peak}It is above chance in the windows from {spans} ({curve.test.method}). The first of them is complete at "
        f"{curve.onset * 1000:z.0f} ms (95 % interval {curve.onset_low * 1000:z.0f} to "
        f"{curve.onset_high * 1000:z.0f} ms; {curve.onset_share:.0%} of the resamples have a significant cluster)."
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
        axes.set_ylabel(find_metric(metric).label)
        axes.legend(loc="upper left")

    found = describe_curve(curve, metric)
    caption = (
        f"{metric} of each window of time with its 95 % interval. The bar marks windows in significant "
        "clusters, the dashed line is chance, the thin line the onset of the image."
    )
    best = find_best(table)
    score = Score(
        method="decoded", metric=f"{metric}@{name}_peak", value=float(best["value"]), chance=float(best["chance"]),
        n_queries=int(best["n"]),
        protocol=f"{study.protocol_of_refits}; best of {len(table)} windows, chosen on test trials",
        subject="all", split="test", seed=study.seed, **pick_limits(best),
    )  # fmt: skip
    return Findings(title, f"{how} {found}", table, (Plot(name, caption, found, draw),), (score,))


# --- cluster tests -------------------------------------------------------------------------------------------------


MIN_SUBJECTS = 6
MAX_DRAWS = 2000  # resamples behind a latency


@dataclass(frozen=True)
class ClusterTest:
    """Clusters of a curve.

    Parameters
    ----------
    spans
        First and last window of every cluster.
    p_values
        Of each, corrected for all windows.
    critical
        Mass above which a cluster is significant.
    method
        Words for the report.
    centre, scale, threshold : arrays of shape (n_windows,)
        A window counts if ``(value - centre) / scale`` exceeds `threshold`.
    alpha
        Level of the clusters.
    """

    spans: tuple[tuple[int, int], ...]
    p_values: tuple[float, ...]
    critical: float
    method: str
    centre: np.ndarray
    scale: np.ndarray
    threshold: np.ndarray
    alpha: float

    @property
    def significant(self) -> tuple[tuple[int, int], ...]:
        """First and last window of the significant clusters."""
        return tuple(s for s, p in zip(self.spans, self.p_values, strict=True) if p <= self.alpha)

    @property
    def onset(self) -> int | None:
        """First window of the first significant cluster."""
        return self.significant[0][0] if self.significant else None

    def spread(self, n_windows: int) -> np.ndarray:
        """Return for each window the p-value of its cluster, NaN outside."""
        out = np.full(n_windows, np.nan)
        for (first, last), p in zip(self.spans, self.p_values, strict=True):
            out[first : last + 1] = p
        return out


def cluster_over_labels(
    curve: np.ndarray, null: np.ndarray, *, alpha: float = 0.05, cluster_alpha: float = 0.05
) -> ClusterTest:
    """Test a curve against the same curve under permuted labels.

    Parameters
    ----------
    curve : array of shape (n_windows,)
    null : array of shape (n_permutations, n_windows)
        Each row from one permutation for all windows.
    alpha
        Level of the clusters.
    cluster_alpha
        One-sided level at which a single window joins a cluster, by the quantile of its own null.
    """
    centre, spread = null.mean(axis=0), null.std(axis=0)
    scale = np.where(spread > 1e-12, spread, np.inf)  # a window that cannot vary joins no cluster
    threshold = (np.quantile(null, 1 - cluster_alpha, axis=0) - centre) / scale
    masses, _ = find_first_cluster((null - centre) / scale, threshold, np.inf)
    spans, own = find_clusters((curve - centre) / scale, threshold)
    p_values = tuple(compute_p_value(np.array(own), masses).tolist())
    words = f"cluster mass over time, {len(null)} permutations of the labels, within these subjects"
    critical = float(np.quantile(masses, 1 - alpha))
    return ClusterTest(spans, p_values, critical, words, centre, scale, threshold, alpha)


def cluster_over_subjects(
    curves: np.ndarray,
    chance: np.ndarray | float,
    *,
    seed: int,
    n_permutations: int = 10_000,
    alpha: float = 0.05,
    cluster_alpha: float = 0.05,
) -> ClusterTest:
    """Test the mean over subjects against chance by flipping signs of whole subjects, with mne.

    Parameters
    ----------
    curves : array of shape (n_subjects, n_windows)
    chance
        Level, the same for all or one per window.
    """
    from functools import partial

    import mne
    from mne.stats import permutation_cluster_1samp_test, ttest_1samp_no_p
    from scipy.stats import t

    n = len(curves)
    if n < MIN_SUBJECTS:
        raise DataError(f"a test over subjects needs {MIN_SUBJECTS} of them, not {n}.")
    level = float(t.ppf(1 - cluster_alpha, n - 1))
    # The smallest variance is bounded, so that a window in which all subjects agree has a finite t.
    statistic = partial(ttest_1samp_no_p, sigma=1e-3)
    with np.errstate(invalid="ignore"), mne.use_log_level("ERROR"):
        _, found, p_values, masses = permutation_cluster_1samp_test(
            curves - chance, threshold=level, tail=1, n_permutations=n_permutations, out_type="indices",
            seed=derive_seed(seed, "sign-flip clusters") % 2**32, n_jobs=1, stat_fun=statistic, verbose="ERROR",
        )  # fmt: skip
    # mne lists clusters in no order that is promised.
    spans = tuple((int(where[0].min()), int(where[0].max())) for where in found)
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    # In units of t, as the clusters of mne are, so that a resampled curve meets the same threshold.
    deviation = np.maximum(curves.std(axis=0, ddof=1), 1e-9)
    critical = float(np.quantile(masses, 1 - alpha)) if len(masses) else np.inf
    words = f"cluster mass over time, sign flips of {n} subjects"
    width = curves.shape[1]
    return ClusterTest(
        tuple(spans[i] for i in order), tuple(float(p_values[i]) for i in order), critical, words,
        np.broadcast_to(chance, width).astype(float), deviation / np.sqrt(n), np.full(width, level), alpha,
    )  # fmt: skip


def find_clusters(
    z: np.ndarray, threshold: np.ndarray
) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Return the runs of windows above the threshold, and the sum of `z` in each."""
    above = np.concatenate([[False], z > threshold, [False]])
    edges = np.flatnonzero(above[1:] != above[:-1])  # starts and ends in turn
    spans = tuple((int(a), int(b) - 1) for a, b in edges.reshape(-1, 2))
    return spans, tuple(float(z[a : b + 1].sum()) for a, b in spans)


def find_first_cluster(
    z: np.ndarray, threshold: np.ndarray, critical: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return for many curves the largest cluster mass, and the first window of the first cluster above `critical`.

    Parameters
    ----------
    z : array of shape (n_curves, n_windows)
    threshold : array of shape (n_windows,)

    Returns
    -------
    masses : array of shape (n_curves,)
        0 without a cluster.
    onsets : int array of shape (n_curves,)
        -1 without a cluster above `critical`.
    """
    n = len(z)
    mass, largest = np.zeros(n), np.zeros(n)
    start, onset = np.zeros(n, int), np.full(n, -1)
    for window in range(z.shape[1]):  # all curves step through time together: runs of each are summed
        above = z[:, window] > threshold[window]
        start = np.where(above & (mass == 0), window, start)
        mass = np.where(above, mass + np.maximum(z[:, window], 1e-12), 0.0)
        largest = np.maximum(largest, mass)
        onset = np.where((onset < 0) & (mass > critical), start, onset)
    return largest, onset


def bootstrap_curves(
    values: np.ndarray, clusters: np.ndarray, subjects: np.ndarray, *, n_draws: int, seed: int
) -> np.ndarray:
    """Return curves of resampled subjects (where several) and images or groups, shape (n_draws, n_windows).

    A drawn image is drawn in all subjects, since an image that is easy for one is easy for the others.

    Parameters
    ----------
    values : array of shape (n_rows, n_windows)
        All windows of a row are drawn together.
    clusters, subjects : arrays of shape (n_rows,)
        Rows of one cluster (an image, or what the study's `unit` names) are drawn together.
    """
    generator = make_generator(seed, "bootstrap curves")
    names = np.unique(subjects.astype(str))
    drawn = generator.integers(0, len(names), (n_draws, len(names)))
    if len(names) == 1:  # only its images are resampled
        drawn[:] = 0
    which, codes = np.unique(clusters.astype(str), return_inverse=True)
    # (n_draws, n_clusters): how often each cluster is drawn.
    counts = generator.multinomial(len(which), np.full(len(which), 1 / len(which)), size=n_draws)
    total = np.zeros((n_draws, values.shape[1]))
    for number, name in enumerate(names):
        rows = subjects.astype(str) == name
        sizes = np.bincount(codes[rows], minlength=len(which))
        sums = np.zeros((len(which), values.shape[1]))
        np.add.at(sums, codes[rows], values[rows])
        drawn_rows = (counts @ sizes)[:, None]
        # A subject none of whose images were drawn keeps its mean.
        means = np.where(
            drawn_rows > 0, (counts @ sums) / np.maximum(drawn_rows, 1), sums.sum(axis=0) / rows.sum()
        )
        total += (drawn == number).sum(axis=1)[:, None] * means
    return total / len(names)


def bootstrap_onset(
    test: ClusterTest, curves: np.ndarray, latencies: Sequence[float]
) -> tuple[float, float, float]:
    """Return the 95 % interval of the latency of the first cluster, and the share of resamples that have one.

    Parameters
    ----------
    test
        The threshold and the critical mass; a resampled curve has its cluster where it exceeds both.
    curves : array of shape (n_draws, n_windows)
        From `bootstrap_curves`.
    latencies
        Latency that each window stands for, in s.
    """
    _, onsets = find_first_cluster((curves - test.centre) / test.scale, test.threshold, test.critical)
    found = np.asarray(latencies)[onsets[onsets >= 0]]
    share = float((onsets >= 0).mean())
    if not len(found):
        return float("nan"), float("nan"), share
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high), share
