"""Curves, bars and matrices for analyses and pages, with marks of the stimulus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.voxel_geometry import inverse_transform

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


def mark_spans(axes: Axes, spans: Iterable[tuple[float, float]]) -> None:
    """Draw a bar along the bottom for each span that is significant."""
    for start, stop in spans:
        axes.plot([start, stop], [0.02, 0.02], transform=axes.get_xaxis_transform(), color="C0", lw=4)


def mark_stimulus(axes: Axes) -> None:
    """Mark the onset of the image."""
    axes.axvline(0.0, color="C4", lw=0.8)


def draw_bars(axes: Axes, rows: pd.DataFrame, labels: Sequence[str]) -> None:
    """Draw `value` as horizontal bars from top to bottom, with intervals."""
    place = np.arange(len(rows))
    value = rows["value"].to_numpy(float)
    axes.barh(place, value, height=0.7, color="C0")
    axes.hlines(place, rows["ci_low"].astype(float), rows["ci_high"].astype(float), color="C5", lw=1)
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first row on top


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


def list_brains(responses: Responses) -> list[str | None]:
    """Return the subjects that have a mask of their own; one None if all share one."""
    trials = set(responses.trials["subject"].astype(str))
    named = [str(subject) for subject in responses.coords.get("subjects") or ()]
    return [subject for subject in named if subject in trials] or [None]


def place_pattern(responses: Responses, values: np.ndarray, *, subject: str | None = None) -> Any:
    """Return a pattern as a NIfTI image in the space of the data, or None if there is no volume to place it in.

    Parameters
    ----------
    responses
        With the geometry.
    values : array of shape (n_columns,) or (n_rows, n_columns)
        For example the column `value` of one component and window; rows become the fourth axis.
    subject
        Whose brain, where each has a mask of its own; the first by default.

    Examples
    --------
    In MNI space, ``nilearn.plotting.plot_glass_brain(place_pattern(responses, values))`` draws it in a glass brain.
    """
    if responses.dims[1] not in ("voxel", "parcel"):
        return None
    try:
        image = inverse_transform(responses, values, subject=subject or list_brains(responses)[0])
    except DataError:
        return None
    return None if isinstance(image, dict) else image


def fit_sphere(points: np.ndarray) -> np.ndarray:
    """Return the centre of the sphere that fits points of shape (n, 3) by least squares."""
    # |p - c|^2 = r^2 is linear in c and r^2 - |c|^2.
    design = np.concatenate([2 * points, np.ones((len(points), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(design, (points**2).sum(axis=1), rcond=None)
    return solution[:3]


def find_flat_positions(responses: Responses) -> Any:
    """Return flat positions for a topographic map, or None."""
    positions = responses.coords.get("ch_pos")
    if positions is None:
        return None
    places = np.asarray(positions, float)
    if len(places) < 3 or not np.isfinite(places).all() or not places.any(axis=1).all():
        return None
    from braindecode_vis.report.drawing import fit_sphere

    centre = fit_sphere(places) if len(places) >= 8 else np.array([0.0, 0.0, 0.04])
    seen = places - centre
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    # Azimuthal equidistant projection: the rim of the drawn head is the equator.
    angle = np.arccos(np.clip(seen[:, 2], -1, 1)) / (np.pi / 2)
    flat = np.arctan2(seen[:, 1], seen[:, 0])
    return 0.095 * angle[:, None] * np.stack([np.cos(flat), np.sin(flat)], axis=1)
