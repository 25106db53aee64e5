"""Render the figures of analyses: any drawing function, in the colours of the page, light or dark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from braindecode_vis.report.figures import THEMES, ThemeName, render_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_style(theme: ThemeName) -> dict[str, Any]:
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
