"""Activation patterns of an encoder, in sensor or voxel space: where and when the brain follows the decoded signal.

Owns Haufe's transform in the form that needs no weights: the covariance of the data with the decoded signal, here the
leading components of the predicted embeddings of test trials, each scaled to unit variance. For a linear encoder this
is its activation pattern; weights themselves would show noise that is subtracted as readily as signal. The sign of a
component has no meaning: it is set so that the largest value is positive.

References
----------
Haufe et al. (2014), doi:10.1016/j.neuroimage.2013.10.067.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.analysis_figures import make_maps
from braindecode_vis.parts.analyses.cuts import TimedAnalysis, Window, make_sliding_windows
from braindecode_vis.parts.analyses.measure import check_retrieval, compute_interval
from braindecode_vis.parts.analyses.study import Attachment, Findings, Plot, Study
from braindecode_vis.preprocessing.alignment import check_common_features
from braindecode_vis.report.drawing import place_pattern
from braindecode_vis.scoring.crossed import bound_draws
from braindecode_vis.scoring.uncertainty import compute_p_value, permute_within, widen_about

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from braindecode_vis.report.drawing import find_flat_positions
from braindecode_vis.scoring.score_row import format_p_value


class SpatialPatternsConfig(TimedAnalysis):
    """Covariance of the data with the decoded signal, on a head or in a brain.

    Parameters
    ----------
    n_components
        Leading components of the predicted embeddings.
    width
        Width of the windows over which a time course is averaged, in s (a choice of ours).
    """

    kind: Literal["spatial_patterns"] = "spatial_patterns"
    n_components: int = Field(default=1, ge=1)
    width: float = Field(default=0.1, gt=0)

    #: Resamples of the images behind the intervals, and shuffles of the trials behind the p-values.
    n_resamples: ClassVar[int] = 1000
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_resamples"})

    def compute(self, study: Study) -> Findings:
        """Predict the test trials with the run's encoders, and correlate the predictions with the data."""
        check_retrieval(study, self.kind)
        check_common_features(study.responses, what="a spatial pattern")
        windows: list[Window | None] = [None]
        if study.has_time:
            windows = list(
                make_sliding_windows(study.responses, self.width, self.width, self.tmin, self.tmax)
            )
        data, signal, tested = predict_signal(study, windows, self.n_components)
        names = list_columns(study.responses)
        table = _tabulate(study, data, signal, tested, names, windows, self.n_resamples)
        return _report(study, table, windows, signal.shape[1])


def predict_signal(
    study: Study, windows: Sequence[Window | None], n_components: int
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Return window means, the decoded signal, and what all test trials belong to.

    Returns
    -------
    data : array of shape (n_trials, n_windows, n_columns)
        Centred within each fold.
    signal : array of shape (n_trials, n_components)
        Leading components of the predictions, mean 0 and variance 1 within each fold.
    tested
        One row per trial: `id`, `subject`, and `cluster`, with which it is resampled; see `Study.find_clusters`.
    """
    axes: np.ndarray | None = None
    data, signal, tested = [], [], []
    for number, fold in enumerate(study.folds):
        test = study.pick(fold.test, "test")
        predicted = study.trained(number).predict(test).flat().astype(np.float64)
        predicted -= predicted.mean(axis=0)
        if axes is None or axes.shape[1] != predicted.shape[1]:
            _, _, axes = np.linalg.svd(predicted, full_matrices=False)
        # The components of the first fold serve all folds, or their signs would not agree.
        own = predicted @ axes[:n_components].T
        own = _whiten(own)  # correlated components would share their patterns
        means = np.stack([_average(test, window) for window in windows], axis=1)
        data.append(means - means.mean(axis=0))  # (n_trials, n_windows, n_features)
        signal.append(own)
        tested.append(
            pd.DataFrame(
                {
                    "id": test.stimulus_ids, "subject": test.trials["subject"].astype(str).to_numpy(),
                    "cluster": study.find_clusters(test).astype(str),
                }
            )
        )  # fmt: skip
    if min(len(part) for part in signal) < 3:
        raise DataError("a spatial pattern needs at least three test trials in every fold.")
    return np.concatenate(data), np.concatenate(signal), pd.concat(tested, ignore_index=True)


def _whiten(values: np.ndarray) -> np.ndarray:
    """Return uncorrelated columns of unit variance, near to those given (ZCA), so that Haufe's inverse is the
    identity.
    """
    covariance = values.T @ values / max(1, len(values))
    level, vectors = np.linalg.eigh(covariance)  # ascending, so the first is the weakest component
    if level[0] <= 1e-12 * level[-1] or level[-1] == 0:
        raise DataError(
            f"the predictions have fewer than {values.shape[1]} components; set n_components lower."
        )
    return values @ (vectors / np.sqrt(level)) @ vectors.T


def _average(responses: Responses, window: Window | None) -> np.ndarray:
    data = np.asarray(responses.data, dtype=np.float64)
    if window is None:
        return data.reshape(len(data), -1)
    axis = responses.dims.index("time")
    part = np.take(data, np.arange(window.first, window.last), axis=axis).mean(axis=axis)
    return part.reshape(len(part), -1)


def list_columns(responses: Responses) -> list[str]:
    """Return the name of each channel, parcel or voxel."""
    dim = responses.dims[1]
    for key in {"channel": ("ch_names",), "parcel": ("parcel_names",), "voxel": ("voxel_id",)}.get(dim, ()):
        if key in responses.coords:
            return [str(name) for name in responses.coords[key]]
    return [str(n) for n in range(responses.data.shape[1])]


def _tabulate(
    study: Study, data: np.ndarray, signal: np.ndarray, tested: pd.DataFrame, names: list[str],
    windows: Sequence[Window | None], n_resamples: int,
) -> pd.DataFrame:  # fmt: skip
    pattern = np.einsum("tk,twc->kwc", signal, data) / len(data)  # (n_components, n_windows, n_features)
    flat = data.reshape(len(data), -1)
    rows = []
    for k in range(signal.shape[1]):
        peak = pattern[k].flat[int(np.abs(pattern[k]).argmax())]
        own = pattern[k] * (1.0 if peak >= 0 else -1.0)
        weighted = signal[:, k] * (1.0 if peak >= 0 else -1.0)
        low, high, resampled = _bound(study, flat * weighted[:, None], tested, n_resamples)
        # The sign was chosen by the data, so the test has two sides.
        p_value = _permute(study, flat, weighted, own.ravel(), n_resamples)
        for w, window in enumerate(windows):
            for c, name in enumerate(names):
                cell = w * len(names) + c
                rows.append(
                    {
                        "component": k + 1, "column": name, "start": window.start if window else np.nan,
                        "stop": window.stop if window else np.nan, "value": own[w, c], "ci_low": low[cell],
                        "ci_high": high[cell], "chance": 0.0, "n": len(data), "p_value": p_value[cell],
                        "resampled": resampled[cell],
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _bound(
    study: Study, products: np.ndarray, tested: pd.DataFrame, n_draws: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the interval of the mean of every column, and what it resamples: crossed where there are several subjects,
    else over resampled images or groups.
    """
    clusters, subjects = tested["cluster"].to_numpy(object), tested["subject"].to_numpy(object)
    values = products.mean(axis=0)
    if len(set(subjects.tolist())) > 1:
        ids = tested["id"].to_numpy(object)
        found = [compute_interval(study, column, clusters, subjects, ids) for column in products.T]
        # The mean over trials is shown, and the interval is of the mean of subjects.
        means = np.stack([products[subjects == who].mean(axis=0) for who in np.unique(subjects.astype(str))])
        shift = values - means.mean(axis=0)
        limits = np.array([one[:2] for one in found]) + shift[:, None]
        return limits[:, 0], limits[:, 1], [one[2] for one in found]
    generator = make_generator(study.seed, "bootstrap patterns")
    codes = np.unique(clusters.astype(str), return_inverse=True)[1]
    sizes = np.bincount(codes)
    sums = np.zeros((len(sizes), products.shape[1]))
    np.add.at(sums, codes, products)
    counts = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=n_draws)
    low, high = np.empty(products.shape[1]), np.empty(products.shape[1])
    words: list[str] = []
    step = max(1, (1 << 22) // n_draws)  # columns at once: 32 MB of resamples
    total = (counts @ sizes)[:, None]
    for start in range(0, products.shape[1], step):
        part = slice(start, start + step)
        draws = counts @ sums[:, part] / total
        low[part], high[part], told = bound_draws(
            values[part], draws, len(sizes), unit=study.unit, over_folds=len(study.folds) > 1
        )
        words += told
    return low, high, words


def _permute(
    study: Study, data: np.ndarray, signal: np.ndarray, observed: np.ndarray, n_shuffles: int
) -> np.ndarray:
    """Return two-sided p-values corrected for all cells by the largest standardised one of each shuffle."""
    generator = make_generator(study.seed, "permute patterns")
    scale = np.maximum(data.std(axis=0), 1e-300)  # sensors of different units share one null
    shuffled = permute_within(signal, [np.arange(len(signal))], n_shuffles, generator)
    largest = np.zeros(n_shuffles)
    step = max(1, (1 << 22) // n_shuffles)
    for start in range(0, data.shape[1], step):
        part = data[:, start : start + step] / scale[start : start + step]
        largest = np.maximum(largest, np.abs(shuffled @ part / len(data)).max(axis=1))
    if len(study.folds) > 1:  # which train each other
        largest = widen_about(largest, 0.0)
    return compute_p_value(np.abs(observed / scale), largest)


def _describe_limits(row: pd.Series) -> str:
    if pd.isna(row["ci_low"]):
        return str(row["resampled"])
    return f"{row['ci_low']:.3g} to {row['ci_high']:.3g}"


@dataclass(frozen=True)
class _Panel:
    """One map of the figure."""

    title: str
    values: np.ndarray


def _report(
    study: Study, table: pd.DataFrame, windows: Sequence[Window | None], n_components: int
) -> Findings:
    best = table.iloc[int(table["value"].abs().to_numpy(float).argmax())]
    when = (
        ""
        if pd.isna(best["start"])
        else f" from {best['start'] * 1000:z.0f} to {best['stop'] * 1000:z.0f} ms"
    )
    found = (
        f"The decoded signal is most strongly related to {study.responses.dims[1]} {best['column']}{when}: "
        f"{best['value']:.3g} {study.responses.unit} per standard deviation ({_describe_limits(best)}, "
        f"{format_p_value(best['p_value'], in_words=True)} corrected for all cells)."
    )
    panels = []
    for k in range(1, n_components + 1):
        for window in windows:
            inside = table["start"].isna() if window is None else table["start"] == window.start
            own = table[(table["component"] == k) & inside]
            when = "" if window is None else f"{window.start * 1000:z.0f} to {window.stop * 1000:z.0f} ms"
            panels.append(_Panel(when if n_components == 1 else f"{k}: {when}", own["value"].to_numpy(float)))

    def draw(figure: Figure) -> None:
        if study.responses.dims[1] == "channel" and find_flat_positions(study.responses) is not None:
            _draw_heads(figure, panels, study.responses)
        elif study.responses.dims[1] in ("voxel", "parcel"):
            _draw_brains(figure, panels, study.responses)
        else:
            _draw_columns(figure, panels, list_columns(study.responses))

    caption = (
        "Covariance of the data with the decoded signal (leading components of the predicted embeddings of test "
        "trials, unit variance), which is the activation pattern of a linear encoder. The sign of a component has no "
        "meaning."
    )
    n_rows = -(-len(panels) // 5)
    plot = Plot("spatial_patterns", caption, found, draw, (7.4, 0.6 + 1.9 * n_rows))
    how = "Patterns are computed on test trials, with the encoders of the run."
    files = _make_files(study.responses, table, len(windows), n_components)
    return Findings("Spatial patterns", f"{how} {found}", table, (plot,), files=files)


def _make_files(
    responses: Responses, table: pd.DataFrame, n_windows: int, n_components: int
) -> tuple[Attachment, ...]:
    """Return two maps per component, all values and the significant ones; windows follow along the fourth axis."""
    files: list[Attachment] = []
    for k in range(1, n_components + 1):
        own = table[table["component"] == k]
        values, p_value = (
            own[c].to_numpy(float).reshape(n_windows, -1).squeeze(0 if n_windows == 1 else ())
            for c in ("value", "p_value")
        )
        name = f"pattern{k}" if n_components > 1 else "pattern"
        what = f"Activation pattern{f' of component {k}' if n_components > 1 else ''}, {responses.unit}"
        files += make_maps(responses, values, name, f"{what}.")
        files += make_maps(
            responses, np.where(p_value <= 0.05, values, 0.0), f"{name}_significant",
            f"{what}, 0 where p corrected for all cells is above 0.05.",
        )  # fmt: skip
    return tuple(files)


def _draw_heads(figure: Figure, panels: Sequence[_Panel], responses: Responses) -> None:
    import matplotlib
    from mne.viz import plot_topomap

    places = find_flat_positions(responses)
    reach = max(float(max(np.abs(p.values).max() for p in panels)), 1e-300)
    n_columns = min(5, len(panels))
    grid = figure.subplots(-(-len(panels) // n_columns), n_columns, squeeze=False).ravel()
    image = None
    for axes, panel in zip(grid, panels, strict=False):
        # mne draws lines and sensors black whatever the style.
        image, _ = plot_topomap(
            panel.values / reach, places, axes=axes, show=False, cmap=matplotlib.rcParams["image.cmap"],
            vlim=(-1, 1), contours=0, sensors=True, sphere=(0, 0, 0, 0.095),
        )  # fmt: skip
        for line in axes.lines:
            line.set_color(matplotlib.rcParams["axes.labelcolor"])
        axes.set_title(panel.title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=grid.tolist(), shrink=0.6)
        bar.set_label(f"x {reach:.2g} {responses.unit}")
        bar.outline.set_visible(False)


def _draw_brains(figure: Figure, panels: Sequence[_Panel], responses: Responses) -> None:
    """Draw the largest magnitude along each axis of the volume, in the space of the data."""
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        volume = place_pattern(
            responses, panel.values
        )  # of the first subject, where each has a brain of its own
        if volume is None:
            for axes in row[1:]:
                axes.set_axis_off()
            row[0].hist(panel.values, bins=40, color="C0")
            row[0].set_xlabel(f"{responses.unit}; positions unknown")
            continue
        array = np.asarray(volume.dataobj)
        reach = max(float(np.abs(array).max()), 1e-300)
        for axis, (axes, name) in enumerate(zip(row, ("sagittal", "coronal", "axial"), strict=True)):
            strongest = np.abs(array).argmax(axis=axis)
            seen = np.take_along_axis(array, np.expand_dims(strongest, axis), axis=axis).squeeze(axis)
            axes.imshow(seen.T, origin="lower", vmin=-reach, vmax=reach, interpolation="nearest")
            axes.set_title(f"{panel.title} {name}".strip())
            axes.set_axis_off()


def _draw_columns(figure: Figure, panels: Sequence[_Panel], names: list[str]) -> None:
    axes = figure.subplots()
    for number, panel in enumerate(panels):
        axes.plot(
            panel.values,
            np.arange(len(names)),
            marker="o",
            ms=3,
            lw=0.8,
            color=f"C{number % 6}",
            label=panel.title,
        )
    axes.axvline(0, color="C4", lw=0.8)
    if len(names) <= 40:
        axes.set_yticks(range(len(names)), names)
    if len(panels) > 1 or panels[0].title:  # a single map of data without time has no name
        axes.legend(fontsize=7, ncols=2)
