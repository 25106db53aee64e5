"""What the figures of analyses have in common: curves with bands, bars with intervals, matrices.

Colours are those of the style that is active when a figure is drawn: C0 the result, C1 a second one, C2 chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_curve(axes: Axes, x: Any, rows: pd.DataFrame, *, colour: str = "C0", label: str = "") -> None:
    """Draw `value` over x with the band from `ci_low` to `ci_high`."""
    axes.fill_between(
        x, rows["ci_low"].astype(float), rows["ci_high"].astype(float), color=colour, alpha=0.25, lw=0
    )
    axes.plot(x, rows["value"].astype(float), color=colour, lw=1.6, label=label or None)


def mark_chance(axes: Axes, level: float | None) -> None:
    """Draw the chance level as a dashed line."""
    if level is not None and np.isfinite(level):
        axes.axhline(level, color="C2", lw=1, ls="--", label="chance")


def mark_spans(axes: Axes, spans: Iterable[tuple[float, float]], *, colour: str = "C0") -> None:
    """Draw a bar along the bottom for each span that is significant."""
    for start, stop in spans:
        axes.plot([start, stop], [0.02, 0.02], transform=axes.get_xaxis_transform(), color=colour, lw=4)


def mark_stimulus(axes: Axes) -> None:
    """Mark the onset of the image."""
    axes.axvline(0.0, color="C4", lw=0.8)


def draw_bars(
    axes: Axes, rows: pd.DataFrame, labels: Sequence[str], *, colour: str = "C0", shift: float = 0.0,
    height: float = 0.7, label: str = "",
) -> None:  # fmt: skip
    """Draw `value` as horizontal bars from top to bottom, with intervals."""
    place = np.arange(len(rows)) + shift
    value = rows["value"].to_numpy(float)
    axes.barh(place, value, height=height, color=colour, label=label or None)
    axes.hlines(place, rows["ci_low"].astype(float), rows["ci_high"].astype(float), color="C5", lw=1)
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def draw_matrix(
    figure: Figure, axes: Axes, values: np.ndarray, *, label: str, extent: Any = None, origin: Any = "upper",
    limits: tuple[float | None, float | None] = (None, None),
) -> None:  # fmt: skip
    """Draw a matrix with its colour bar."""
    image = axes.imshow(
        values, aspect="auto" if extent is None else "equal", extent=extent, origin=origin, vmin=limits[0],
        vmax=limits[1], interpolation="nearest",
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(label)
    bar.outline.set_visible(False)
