"""A figure of decoded images with their first-ranked pictures below, for trials with unknown pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_decoded(
    decoded: np.ndarray,
    pictures: Sequence[Sequence[tuple[str, np.ndarray | None]]],
    names: Sequence[str],
    *,
    seen: Sequence[np.ndarray | None] = (),
    width: float = 9.0,
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
    width
        In inches.

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
    figure = MatplotlibFigure(figsize=(width, 1.15 * width * len(labels) / n_columns), layout="constrained")
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
