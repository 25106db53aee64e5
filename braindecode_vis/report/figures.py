"""The look of every figure: two colour themes, plots of scores and ranks, and any drawing in the colours of the page.

Plots are drawn with matplotlib's object interface on the Agg canvas (never pyplot, so no state is shared with
the caller). Takes plain arrays and score rows; knows nothing of how they were computed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.report.words import DECODED, ScoreRow, describe_metric, is_missing, sort_methods
from braindecode_vis.scoring.uncertainty import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


ThemeName = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance, as hexadecimal text."""

    background: str
    ink: str
    muted: str
    line: str
    accent: str
    accent_soft: str
    chance: str
    ceiling: str


THEMES: Mapping[str, Theme] = {
    "light": Theme("#ffffff", "#1c2530", "#5b6675", "#e4e2dc", "#0d6e74", "#9ccaca", "#b04a12", "#6d55a5"),
    "dark": Theme("#191e25", "#e9ebee", "#a5afbc", "#2d353f", "#5fc9c4", "#2f6f70", "#f2a36b", "#b9a4ec"),
}


def compute_axis_limits(values: Sequence[Any]) -> tuple[float, float]:
    """Return round limits of an axis that starts at zero (or below, if a value does) and holds all `values`.

    Examples
    --------
    >>> compute_axis_limits([0.787, 0.655]), compute_axis_limits([0.0385, 0.0547])
    ((0.0, 1.0), (0.0, 0.06))
    """
    present = [float(value) for value in values if not is_missing(value)]
    low, high = min([0.0, *present]), max([0.0, *present])
    # Shares above 0.4 are read against 1, smaller values against their own size.
    low, high = -_round_up(-low), 1.0 if 0.4 < high <= 1 else _round_up(high)
    return (low + 0.0, high) if high > low else (0.0, 1.0)


def _round_up(value: float) -> float:
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    # The next round number; the tolerance keeps 0.3 from becoming 0.4 by rounding.
    step = next(s for s in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if s * power >= value * (1 - 1e-9))
    return float(f"{step * power:.6g}")


# ---- plots
# Steps between the ticks of a rank axis: 1, 2, 5, 10, 20...
_STEPS = tuple(base * 10**power for power in range(12) for base in (1, 2, 5))


def plot_rank_histogram(ranks: Any, gallery_size: int, *, theme: ThemeName = "light") -> Figure:
    """Plot how often the seen image came at which rank, with the level and spread of guessing.

    Parameters
    ----------
    ranks : array of shape (n_queries,)
        Ranks from 1 (best) to `gallery_size`; ties may share a fractional rank.
    gallery_size
        Number of candidates.
    theme
        ``light`` or ``dark``.

    Returns
    -------
    figure
        A matplotlib figure.

    Raises
    ------
    DataError
        If there is no rank or one lies outside 1 to `gallery_size`.
    """
    from scipy.special import bdtrik  # of scipy.stats, which takes a second to load

    values, colours = check_ranks(ranks, gallery_size), _get_theme(theme)
    width = math.ceil(gallery_size / 40)  # ranks per bar: more than forty bars cannot be told apart
    edges = np.append(np.arange(0, gallery_size, width), gallery_size) + 0.5
    share = np.diff(edges) / gallery_size
    counts, expected = np.histogram(values, edges)[0], len(values) * share
    figure, ax = _make_axes(colours)
    ax.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=colours.accent, zorder=2)
    # Of a query that guesses, the rank falls into each bar by the share of ranks that it holds.
    low, high = (np.maximum(np.ceil(bdtrik(level, len(values), share)), 0) for level in (0.025, 0.975))
    band: dict[str, Any] = {
        "step": "post",
        "color": colours.chance,
        "alpha": 0.16,
        "linewidth": 0,
        "zorder": 1,
    }
    ax.fill_between(edges, np.append(low, low[-1]), np.append(high, high[-1]), **band)
    ax.step(edges, np.append(expected, expected[-1]), where="post", color=colours.chance, lw=1.4, zorder=4)
    ax.set_xlim(0.5, gallery_size + 0.5)
    ax.set_ylim(0, max(counts.max(), high.max()) * 1.16 + 0.3)
    step = 1 if gallery_size <= 12 else next(s for s in _STEPS if s * 6 >= gallery_size)
    ticks = np.unique([1, *range(step, gallery_size + 1, step)])
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    _label(ax, colours, f"rank of the seen image among {gallery_size:,}", "number of queries", integer=True)
    text: dict[str, Any] = {
        "ha": "right",
        "va": "bottom",
        "color": colours.chance,
        "fontsize": 8.5,
        "zorder": 5,
    }
    ax.text(gallery_size + 0.4, high[:-1].max(initial=high[0]), "guessing, 95 % band", **text)
    return figure


def plot_top_k_curve(ranks: Any, gallery_size: int, *, theme: ThemeName = "light") -> Figure:
    """Plot the share of queries whose seen image is among the k best, with Wilson 95 % band and chance.

    Parameters
    ----------
    ranks : array of shape (n_queries,)
        Ranks from 1 (best) to `gallery_size`; a fractional rank of tied candidates counts against the query.
    gallery_size
        Number of candidates.
    theme
        ``light`` or ``dark``.

    Returns
    -------
    figure
        A matplotlib figure.

    Raises
    ------
    DataError
        If there is no rank or one lies outside 1 to `gallery_size`.
    """
    values, colours = check_ranks(ranks, gallery_size), _get_theme(theme)
    # A log axis cannot show more points than this, and an interval takes a millisecond.
    k = np.unique(np.geomspace(1, gallery_size, 400).round().astype(int))
    k = np.arange(1, gallery_size + 1) if gallery_size <= 400 else k
    n_hits = np.searchsorted(np.sort(values), k, side="right")
    share, known = n_hits / len(values), {n: wilson_interval(n, len(values)) for n in set(n_hits.tolist())}
    low, high = [known[n].low for n in n_hits.tolist()], [known[n].high for n in n_hits.tolist()]
    figure, ax = _make_axes(colours)
    ax.fill_between(k, low, high, color=colours.accent, alpha=0.16, linewidth=0)
    ax.plot(k, share, color=colours.accent, lw=2, marker="o" if gallery_size <= 20 else "", ms=4, zorder=3)
    ax.plot(k, k / gallery_size, color=colours.chance, lw=1.4)
    if gallery_size > 30:  # the first ranks matter, and would share a few pixels of a linear axis
        ax.set_xscale("log")
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= gallery_size]
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.set_xticks([], minor=True)
    ax.set_ylim(0, 1.02)
    ax.set_xlim(1, max(gallery_size, 1.5))
    _label(ax, colours, f"k, of {gallery_size:,} candidates", "seen image among the k best")
    # The word stands where the line of guessing is away from curve and frame.
    at = int(np.argmin(np.abs(k / gallery_size - (0.3 if gallery_size <= 30 else 0.5))))
    below: dict[str, Any] = {"xytext": (7, -7), "ha": "left", "va": "top"}
    above: dict[str, Any] = {"xytext": (-7, 3), "ha": "right", "va": "bottom"}
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": colours.chance}
    style |= above if gallery_size > 30 else below
    ax.annotate("guessing", (k[at], k[at] / gallery_size), **style)
    return figure


def plot_scores_with_intervals(
    scores: Sequence[ScoreRow], *, metrics: Sequence[str] | None = None, theme: ThemeName = "light"
) -> Figure:
    """Plot scores as dots on their 95 % intervals, one panel per metric, the decoded system on top.

    Parameters
    ----------
    scores
        Rows as in ``scores.json``; a dashed tick marks chance, a diamond the noise ceiling.
    metrics
        Metrics to show, in this order; all of them in order of appearance by default.
    theme
        ``light`` or ``dark``.

    Returns
    -------
    figure
        A matplotlib figure, as high as its rows need.

    Raises
    ------
    DataError
        If no score is left to plot.
    """
    names = list(metrics) if metrics is not None else list(dict.fromkeys(row["metric"] for row in scores))
    panels = [(name, sort_methods([row for row in scores if row["metric"] == name])) for name in names]
    panels = [(name, rows) for name, rows in panels if rows]
    if not panels:
        raise DataError("there is no score to plot; evaluate the run first.")
    colours, heights = _get_theme(theme), [len(rows) + 1.4 for _, rows in panels]
    figure = _make_figure(colours, (6.4, 0.27 * sum(heights) + 0.3))
    axes = figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for ax, (name, rows) in zip(axes, panels, strict=True):
        _draw_score_panel(ax, colours, name, rows)
    return figure


def _draw_score_panel(ax: Axes, colours: Theme, metric: str, rows: Sequence[ScoreRow]) -> None:
    keys = ("value", "ci_low", "ci_high", "chance", "noise_ceiling")
    for y, row in enumerate(rows):
        value, low, high, chance, ceiling = (None if is_missing(row.get(key)) else row[key] for key in keys)
        colour = colours.accent if row["method"] == DECODED else colours.muted
        if low is not None and high is not None:
            ax.plot([low, high], [y, y], color=colour, lw=3, alpha=0.4, solid_capstyle="round")
        if chance is not None:
            ax.plot([chance, chance], [y - 0.42, y + 0.42], color=colours.chance, lw=1.3, ls=(0, (2, 1.5)))
        if ceiling is not None:
            ax.plot([ceiling], [y], marker="D", ms=5, mfc="none", mec=colours.ceiling)
        if value is not None:
            ax.plot([value], [y], marker="o", ms=6, color=colour)
    ax.set_yticks(range(len(rows)), [str(row["method"]).replace("_", " ") for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.6)
    low, high = compute_axis_limits([row.get(key) for row in rows for key in keys])
    ax.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    note = describe_metric(metric)
    better = {1: " – higher is better", -1: " – lower is better", 0: ""}[note.direction]
    ax.set_title(note.label + better, loc="left", fontsize=9.5, color=colours.ink)
    _label(ax, colours, "", "", grid_axis="x")


def check_ranks(ranks: Any, gallery_size: int) -> np.ndarray:
    """Return ranks as floats of shape (n_queries,); raise `DataError` if one is not in 1 to `gallery_size`."""
    values = np.asarray(ranks, dtype=float).ravel()
    if values.size == 0:
        raise DataError("there are no ranks to plot; retrieval had no query.")
    wrong = np.flatnonzero(~((values >= 1) & (values <= gallery_size)))
    if wrong.size:
        raise DataError(
            f"rank {values[wrong[0]]:g} of query {wrong[0]} is not in 1 to {gallery_size}, the gallery."
        )
    return values


def render_svg(figure: Figure) -> str:
    """Return a figure as SVG with live text in the reader's own font; equal figures give equal bytes."""
    import matplotlib

    buffer = io.StringIO()
    # No date and a fixed salt of ids: the same report has the same bytes.
    plain = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "braindecode_vis"}):
        figure.savefig(buffer, format="svg", metadata=plain, transparent=True)
    # The reader's own font: embedded ones would be most of the page.
    return re.sub(r"(font: [^'\";]*?)'[^\";]*", r"\1system-ui, sans-serif", buffer.getvalue())


def darken_svg(svg: str) -> str:
    """Return an SVG that was drawn with the colours of the light theme with those of the dark one."""
    light, dark = astuple(THEMES["light"]), astuple(THEMES["dark"])
    # All at once: a colour of one theme may be another's of the other.
    colours = dict(zip(light, dark, strict=True))
    return re.sub("|".join(light), lambda found: colours[found[0]], svg)


def render_png(figure: Figure, dpi: float = 160) -> bytes:
    """Return a figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def show_in_notebooks(figure: Figure) -> Figure:
    """Let a notebook draw a figure that pyplot does not know; it would show its text otherwise."""
    figure._repr_png_ = partial(render_png, figure, 110)  # type: ignore[attr-defined]
    return figure


def _get_theme(name: str) -> Theme:
    check_option("theme", name, THEMES)
    return THEMES[name]


def _make_figure(colours: Theme, size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=colours.background)
    FigureCanvasAgg(figure)  # a canvas of its own, so that pyplot knows nothing of this figure
    return show_in_notebooks(figure)


def _make_axes(colours: Theme) -> tuple[Figure, Axes]:
    figure = _make_figure(colours, (4.5, 2.9))
    return figure, figure.add_subplot()


def _label(
    ax: Axes, colours: Theme, x: str, y: str, *, integer: bool = False, grid_axis: Literal["x", "y"] = "y"
) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_facecolor("none")
    ax.set_xlabel(x, color=colours.muted, fontsize=9)
    ax.set_ylabel(y, color=colours.muted, fontsize=9)
    ax.tick_params(colors=colours.muted, labelsize=8.5, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours.line)
    ax.grid(axis=grid_axis, color=colours.line, linewidth=0.7)
    ax.set_axisbelow(True)
    if integer:
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))


# --- figures of analyses -------------------------------------------------------------------------------------------


def make_style(theme: ThemeName) -> Any:
    """Return matplotlib settings for one appearance of the page.

    Examples
    --------
    >>> make_style("light")["text.color"]
    '#1c2530'
    """
    from cycler import cycler

    colours = THEMES[theme]
    series = [
        colours.accent,
        colours.ceiling,
        colours.chance,
        colours.accent_soft,
        colours.muted,
        colours.ink,
    ]
    return {
        "figure.facecolor": colours.background,
        "axes.facecolor": "none",
        "text.color": colours.ink,
        "axes.labelcolor": colours.muted,
        "axes.edgecolor": colours.line,
        "axes.titlecolor": colours.ink,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=series),
        "axes.axisbelow": True,
        "grid.color": colours.line,
        "grid.linewidth": 0.7,
        "xtick.color": colours.muted,
        "ytick.color": colours.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "image.cmap": "viridis",
        "font.size": 9,
    }


def render_plot(
    draw: Callable[[Figure], None], *, size: tuple[float, float] = (7.0, 3.4), theme: ThemeName = "light"
) -> str:
    """Return what `draw` draws into an empty figure, as SVG text.

    Parameters
    ----------
    draw
        Called with the figure while the style of the theme is active.
    size
        Width and height in inches.
    theme
        ``light`` or ``dark``.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(make_style(theme)):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        return render_svg(figure)


# --- decoded images --------------------------------------------------------------------------------------------
# A figure of decoded images with their first-ranked pictures below, for trials with unknown pictures.


def plot_decoded(
    decoded: np.ndarray,
    pictures: Sequence[Sequence[tuple[str, np.ndarray | None]]],
    names: Sequence[str],
    *,
    seen: Sequence[np.ndarray | None] = (),
) -> Figure:
    """Draw one column per trial: the decoded image, then the nearest pictures of the gallery.

    Parameters
    ----------
    decoded : uint8 array of shape (n_trials, height, width, 3)
    pictures
        For each trial, id and pixels of its nearest pictures, best first; None if the pixels are not available.
    names
        Heading of each column; empty for a trial that does not say what it showed.
    seen
        The true picture of each trial, for a row above; None if it is not known.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure as MatplotlibFigure

    from braindecode_vis.report.figures import show_in_notebooks

    n, n_top = len(decoded), max((len(row) for row in pictures), default=0)
    n_columns = max(n, 4)  # few trials keep the size of many
    top = 1 if any(image is not None for image in seen) else 0  # rows above the decoded images
    labels = [*["seen"] * top, "decoded", *(f"place {place + 1}" for place in range(n_top))]
    figure = MatplotlibFigure(figsize=(9, 1.15 * 9 * len(labels) / n_columns), layout="constrained")
    axes = figure.subplots(len(labels), n_columns, squeeze=False)
    for ax in axes.ravel():
        ax.set_axis_off()
    for row, label in enumerate(labels):
        ax = axes[row, 0]
        ax.text(-0.08, 0.5, label, transform=ax.transAxes, ha="right", va="center", fontsize=8)
    for column in range(n):
        if top:
            _show(axes[0, column], seen[column], "not known")
        _show(axes[top, column], decoded[column], "")
        axes[0, column].set_title(_shorten(names[column]), fontsize=7)
        for place, (name, image) in enumerate(pictures[column]):
            _show(axes[top + 1 + place, column], image, name)
            axes[top + 1 + place, column].set_title(_shorten(name), fontsize=6)
    return show_in_notebooks(figure)


def _show(ax: Axes, image: np.ndarray | None, words: str) -> None:
    """Show an image, or words in its place."""
    if image is not None:
        ax.imshow(image)
    else:
        ax.text(0.5, 0.5, _shorten(words), transform=ax.transAxes, ha="center", va="center", fontsize=6)


def _shorten(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
