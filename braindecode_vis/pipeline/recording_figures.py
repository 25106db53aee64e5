"""Sections of the report about recording and training: evoked response, mask, noise ceiling, training, publication.

All are made from finished stages and cost a few seconds at most; what a run does not have is left out, with a word
where a reader would miss it. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.contracts import Dataset
from braindecode_vis.config import find_config, read_config
from braindecode_vis.config.header import read_header
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.pipeline.runs import Run, list_changes
from braindecode_vis.preprocessing.noise_ceiling import (
    compute_noise_ceilings,
    describe_ceiling,
    find_root,
    read_epochs_ceiling,
)
from braindecode_vis.report.drawing import find_flat_positions, list_brains, mark_stimulus, place_pattern
from braindecode_vis.report.figures import darken_svg, render_plot
from braindecode_vis.report.page import ExtraSection, SectionFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 64 << 20  # of trials that are read for an average
PEAK_BETWEEN = (0.05, 0.5)  # s, where a response to a picture is sought
MAX_LINES, MAX_POINTS = 24, 125  # of the evoked response: of all channels it would be most of the page
MAX_FOLDS = 10
SIZE = (5.0, 2.5)  # in inches: a phone shows three quarters of it, so its words can still be read


def describe_recording(run: Run, *, has_time_course: bool = False) -> list[ExtraSection]:
    """Return the sections on the recording and the training of a run, those that can be made.

    Where no time course of decoding is known, which takes fits of its own, they say what computes one.
    """
    responses = preprocess(run).responses
    folder = preprocess(run).artifact.path / "responses"
    if set(responses.dims) == {"trial", "channel", "time"}:
        sections = [_describe_evoked(responses, folder, has_time_course)]
    else:
        tested = np.unique(np.concatenate([fold.test for fold in preprocess(run).folds]))
        # Categories are decoded trial by trial, whatever the setting of repetitions.
        averaged = run.config.repeats.test == "averaged" and not run.config.decodes_categories
        said = _describe_ceiling(responses, tested, averaged=averaged)
        sections = [_describe_mask(responses, folder, said)]
    return [section for section in (*sections, _describe_training(run)) if section is not None]


def draw(
    function: Any, size: tuple[float, float], alt: str, caption: str, *, own_colours: bool = False
) -> SectionFigure:
    """Return a figure in both appearances of the page; one with colours of its own is drawn for each."""
    light = render_plot(function, size=size)
    dark = render_plot(function, size=size, theme="dark") if own_colours else darken_svg(light)
    return SectionFigure(light, dark, alt, caption)


# --- the recording ------------------------------------------------------------------------------------------------


def _describe_evoked(responses: Responses, folder: Path, has_time_course: bool = False) -> ExtraSection:
    """Average the kept trials; draw every channel over time, the map at the largest response, and the ceiling."""
    time_first = responses.dims.index("time") < responses.dims.index("channel")
    n_times = responses.data.shape[responses.dims.index("time")]
    times = np.asarray(responses.coords.get("times", np.arange(n_times)), float)
    n = max(1, min(responses.n_trials, MAX_BYTES // max(1, responses.data.nbytes // responses.n_trials)))
    rows = np.unique(np.linspace(0, responses.n_trials - 1, n).round().astype(int))
    evoked = np.asarray(responses.data[rows], np.float32).mean(axis=0, dtype=np.float64)
    evoked = evoked.T if time_first else evoked  # (n_channels, n_times)
    unit, scale = {"V": ("µV", 1e6), "T": ("fT", 1e15)}.get(responses.unit, (responses.unit, 1.0))
    evoked, spread = evoked * scale, evoked.std(axis=0)
    inside = (times >= PEAK_BETWEEN[0]) & (times <= PEAK_BETWEEN[1])
    peak = int(np.where(inside, spread, -1).argmax()) if inside.any() else int(spread.argmax())
    ms = 1000 * times

    drawn = np.unique(np.linspace(0, len(evoked) - 1, min(len(evoked), MAX_LINES)).round().astype(int))
    step = -(-len(ms) // MAX_POINTS)  # a screen shows no more, and every point is text in the page
    places = _find_places(responses)

    def draw_response(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(ms[::step], evoked[drawn, ::step].T, color="C0", lw=0.7, alpha=0.6)
        axes.axvline(ms[peak], color="C2", lw=1, ls="--")
        if ms[0] <= 0 <= ms[-1]:
            mark_stimulus(axes)
        axes.set_xlabel("time after the picture appears (ms)")
        axes.set_ylabel(f"mean response ({unit})")
        axes.margins(x=0)

    def draw_map(figure: Figure) -> None:
        _draw_head(figure, figure.subplots(), evoked[:, peak], places, unit)

    which = "all" if len(rows) == responses.n_trials else f"{len(rows):,} of the"
    lines = f"each of {len(evoked)}" if len(drawn) == len(evoked) else f"{len(drawn)} of the {len(evoked)}"
    said = f"Mean of {which} {responses.n_trials:,} kept trials, a line for {lines} channels"
    alt = f"Evoked response of {len(drawn)} channels over time, largest spread at {ms[peak]:.0f} ms"
    said += f"; sensors differ most at the dashed line ({ms[peak]:.0f} ms)" if len(evoked) > 1 else ""
    figures = [draw(draw_response, SIZE, alt, f"{said}.")]
    if places is not None:
        # A figure of its own, so that a phone shows it at a readable size.
        alt = f"Map of the head, from {evoked[:, peak].min():.2g} to {evoked[:, peak].max():.2g} {unit}"
        figures.append(draw(draw_map, SIZE, alt, "The head from above at the time of the dashed line."))
    if not time_first and (ceiling := _draw_ceiling(folder, ms)) is not None:
        figures.append(ceiling)
    words = "Computed from all kept trials, training and test; it does not influence any score."
    if places is None:
        words += (
            " No map is drawn: the data have no sensor positions, or positions from which no map can be made."
        )
    if unit == "whitened":
        words += " Noise was normalised, so the unit is its standard deviation."
    if not has_time_course:
        words += (
            " To see at which times the image can be decoded, run braindecode-vis analyze RUN --analysis "
            "sliding_window, with the run folder for RUN. It fits a decoder for each time window and "
            "adds the curve to this page."
        )
    return ExtraSection("Evoked response", words, figures=figures)


def _find_places(responses: Responses) -> np.ndarray | None:
    """Return flat positions of sensors that a map can be drawn between, or None: a ring of them holds no triangle."""
    from scipy.spatial import Delaunay, QhullError

    places: np.ndarray | None = find_flat_positions(responses)
    try:
        if places is not None:
            Delaunay(places, incremental=True)  # as mne makes it
    except QhullError:
        return None
    return places


def _draw_head(figure: Figure, axes: Any, values: np.ndarray, places: Any, unit: str) -> None:
    import matplotlib
    from mne.viz import plot_topomap

    reach = max(float(np.abs(values).max()), 1e-300)
    image, _ = plot_topomap(
        values, places, axes=axes, show=False, cmap=matplotlib.rcParams["image.cmap"], vlim=(-reach, reach),
        contours=0, sensors=True, sphere=(0, 0, 0, 0.095), res=48,
        extrapolate="local",  # far from any sensor the map would show what nobody measured
    )  # fmt: skip
    for line in axes.lines:  # mne draws them black whatever the style
        line.set_color(matplotlib.rcParams["axes.labelcolor"])
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    bar.set_label(unit)
    bar.outline.set_visible(False)


def _draw_ceiling(folder: Path, ms: np.ndarray) -> SectionFigure | None:
    """Draw the noise ceiling of the test trials over time; None with few repetitions or several subjects."""
    try:
        found = read_epochs_ceiling(folder)
    except BraindecodeVisError:
        return None
    if found.share.shape[-1] != len(ms):
        return None
    mean, best = found.mean, found.ceiling.max(axis=0)
    low, high = find_root(found.low), find_root(found.high)

    def draw_curves(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(ms, best, color="C1", lw=1.2, label="best channel")
        axes.plot(ms, mean, color="C0", lw=1.6, label="over all channels")
        axes.fill_between(ms, low, high, color="C0", alpha=0.2, lw=0)
        axes.set_xlabel("time after the picture appears (ms)")
        axes.set_ylabel("noise ceiling (correlation)")
        axes.margins(x=0)
        axes.legend()

    caption = (
        f"Noise ceiling: the highest correlation that any prediction of a test response can be expected to reach "
        f"({found.n_images} images, {found.n_repetitions:.3g} repetitions averaged), with the 95 % jackknife interval "
        "over images. The best channel is selected, so its value is above 0 even without signal. The "
        "ceiling is a limit for predicted responses, not for retrieval."
    )
    at = int(mean.argmax())
    alt = f"Noise ceiling over time; over all channels it is at most {mean[at]:.2f} ({low[at]:.2f} to {high[at]:.2f})"
    return draw(draw_curves, SIZE, alt, caption)


def _describe_ceiling(responses: Responses, tested: np.ndarray, *, averaged: bool) -> str:
    """Return the noise ceiling of each subject in words; nothing without repeated test images, or of very many."""
    if responses.data.nbytes // responses.n_trials * len(tested) > MAX_BYTES:
        return ""
    try:
        found = compute_noise_ceilings(responses, tested, averaged=averaged)
    except BraindecodeVisError:
        return ""
    told = ", ".join(
        describe_ceiling(one) + (f" (subject {one.subject})" if len(found) > 1 else "") for one in found
    )
    return (
        " Noise ceiling: the correlation of a prediction with a test response cannot be expected to be "
        f"above {told} over the {found[0].n_images} test images, root mean square over "
        f"{responses.dims[1]}s. It is a limit for predicted responses, not for retrieval."
    )


def _describe_mask(responses: Responses, folder: Path, said: str = "") -> ExtraSection:
    """Draw where the voxels lie: in the glass brain of the template, or from three sides in the space of the data."""
    n = responses.data.shape[1]
    brain = list_brains(responses)[0]
    image = (
        place_pattern(responses, np.ones(n, np.float32), subject=brain) if responses.data.ndim == 2 else None
    )
    if image is None:
        words = f"{n:,} {responses.dims[1]}s; the data hold no positions of them, so no brain is drawn.{said}"
        return ExtraSection("Recorded voxels" if responses.dims[1] == "voxel" else "Responses", words)
    in_template = "space-MNI" in (folder / "meta.json").read_text(encoding="utf-8")

    def draw_sides(figure: Figure) -> None:
        mask, sizes = np.asarray(image.dataobj) != 0, image.header.get_zooms()
        grid = figure.subplots(1, 3)
        for axis, (axes, name) in enumerate(
            zip(grid, ("from the side", "from behind", "from above"), strict=True)
        ):
            across, up = (size for number, size in enumerate(sizes[:3]) if number != axis)
            depth = np.ma.masked_equal(mask.sum(axis=axis).T, 0)  # voxels behind each other
            axes.imshow(depth, origin="lower", aspect=up / across, interpolation="nearest", vmin=0)
            axes.set_title(name)
            axes.set_axis_off()

    def draw_glass(figure: Figure) -> None:
        from nilearn.plotting import plot_glass_brain

        figure.set_layout_engine("none")  # nilearn places its axes itself
        plot_glass_brain(image, figure=figure, display_mode="ortho", threshold=0.5, annotate=True)

    whose = f" of subject {brain}" if brain else ""
    alt = f"Places of {n:,} voxels{whose} from three sides"
    space = "the glass brain of the MNI template" if in_template else "the space of the data, no template"
    caption = f"Voxels that were kept, in {space}."
    function = draw_glass if in_template else draw_sides
    drawn = draw(function, SIZE, alt, caption, own_colours=in_template)
    return ExtraSection("Recorded voxels", f"{n:,} voxels{whose}.{said}", figures=[drawn])


# --- the training -------------------------------------------------------------------------------------------------


def _describe_training(run: Run) -> ExtraSection | None:
    """Draw the loss over epochs of each fold; None if no network was trained."""
    histories = []
    for fold in train(run)[:MAX_FOLDS]:
        for path in sorted(fold.artifact.path.glob("*.json")):
            record = store.read_json(path)
            found = record.get("history") if isinstance(record, dict) else None
            if isinstance(found, list) and len(found) > 1 and all("loss" in one for one in found):
                histories.append(found)
    if not histories:
        return None
    held = [key for key in ("held_out_loss", "validation_loss") if key in histories[0][-1]]

    def draw_losses(figure: Figure) -> None:
        axes = figure.subplots()
        for number, history in enumerate(histories):
            epochs = [one["epoch"] + 1 for one in history]
            axes.plot(
                epochs,
                [one["loss"] for one in history],
                color="C0",
                lw=1.3,
                label="" if number else "training",
            )
            for key in held:
                axes.plot(epochs, [one.get(key, np.nan) for one in history], color="C1", lw=1.3,
                          label="" if number else "held out")  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        axes.margins(x=0.01)
        if held:
            axes.legend()

    first, last = histories[0][0]["loss"], histories[0][-1]["loss"]
    n_epochs, n_folds = len(histories[0]), len(histories)
    caption = f"Loss over {n_epochs} epochs" + (
        f", a line for each of {n_folds} folds." if n_folds > 1 else "."
    )
    alt = f"Training curve: the loss goes from {first:.3g} to {last:.3g} in {n_epochs} epochs"
    figure = draw(draw_losses, SIZE, alt, caption)
    return ExtraSection(
        "Training",
        "The loss on training trials alone does not show how well new trials are decoded.",
        figures=[figure],
    )


# --- the publication ----------------------------------------------------------------------------------------------


def describe_publication(run: Run, rows: Sequence[dict[str, Any]]) -> list[ExtraSection]:
    """Return what the paper that the configuration follows has reached, beside this run, with what differs.

    Nothing where the run has not the name of a shipped configuration, or that follows no paper.
    """
    try:
        path = find_config(run.config.name)
        if path.stem != run.config.name:
            return []
        header = read_header(path)
        shipped = read_config(path, root=getattr(run.config.dataset, "root", None))
    except (BraindecodeVisError, OSError):
        return []
    if not header.source:
        return []
    decoded = [row for row in rows if row["method"] == "decoded" and row["split"] == "test"]
    table = [
        {
            "subject": row["subject"], "metric": row["metric"], "this run": row["value"], "ci low": row["ci_low"],
            "ci high": row["ci_high"], "chance": row["chance"], "candidates": row["gallery_size"],
        }
        for row in decoded if row["metric"] in ("top1", "top5", "accuracy", "auc")
    ]  # fmt: skip
    simulated = roles.complete(Dataset, run.config.dataset).find_phantom() is not None
    words = [f"Published ({header.source}): {header.as_published}."]
    if simulated:
        words.append(
            "This run decodes simulated data, so do not compare its numbers with the published ones."
        )
    changed = list_changes(shipped, run.config, hashed=False)
    if changed:
        words.append(f"Settings of this run that differ from the configuration: {'; '.join(changed)}.")
    words.append(f"Known differences between the configuration and the paper: {'; '.join(header.departs)}.")
    words.append("Compare two numbers only if split, candidates and averaging are the same.")
    return [ExtraSection("Beside the published number", " ".join(words), table=table)]
