"""Figures of a run, as matplotlib objects that can be changed and saved."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.stimuli import show_as_compared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What a gallery shows below the seen images, if it was made, in this order.
_ROWS = ("decoded", "high_level", "low_level", "nearest", "oracle", "shuffled")

#: Names of data sets in BASIC.
_BASIC_SETS = {
    "nsd": "nsd", "nsd_repack": "nsd", "nsd_timeseries": "nsd", "things_eeg2": "eeg-things"
}  # fmt: skip


def plot_gallery(
    run: Any = None,
    *,
    seen: np.ndarray | None = None,
    decoded: np.ndarray | None = None,
    rows: list[str] | None = None,
    n_items: int = 9,
    metric: str = "pixcorr",
    width: float = 9.0,
) -> Figure:
    """Draw seen images above the images decoded from the responses: best, median and worst, selected by score.

    If the decoded images are grey, the seen images are shown in grey too, at the same size.

    Parameters
    ----------
    run
        A `DecodingRun`; leave it out if you give images.
    seen, decoded : uint8 arrays of shape (n_items, height, width, 3), optional
        Images of your own.
    rows
        Methods to show below the seen images; by default the decoded images and the controls of the run.
    n_items
        Images in a row: a third of them the best, a third around the median, a third the worst.
    metric
        Column of ``run.items`` that orders them; pixel correlation for images of your own.
    width
        Width of the figure in inches.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ConfigError, DataError
        If the run has no images, or the metric is not known.
    """
    from matplotlib.figure import Figure as MatplotlibFigure

    from braindecode_vis.report.figures import show_in_notebooks

    if run is not None and not hasattr(run, "reconstructions"):
        raise DataError(f"plot_gallery takes a run of decode or open_run, not {type(run).__name__}.")
    if run is not None:
        images = dict(run.reconstructions)
        images["seen"] = show_as_compared(images["seen"], images["decoded"])
        items = run.items
        if metric not in items:
            numbers = [str(c) for c in items if items[c].dtype.kind in "fi"]
            raise ConfigError(f"metric is {metric!r}, but the items have {', '.join(numbers)}.")
        score, ids = items[metric].to_numpy(dtype=float), items["stimulus_id"].tolist()
    else:
        if seen is None or decoded is None:
            raise DataError("plot_gallery takes a run, or both seen and decoded images.")
        images = {"seen": np.asarray(seen), "decoded": np.asarray(decoded)}
        if len(images["seen"]) != len(images["decoded"]):
            raise DataError(
                f"{len(seen)} seen and {len(decoded)} decoded images; they must belong together one by one."
            )
        score, ids = _correlate(images["seen"], images["decoded"]), [str(n) for n in range(len(seen))]
    # Several draws of one method: the first, never the best.
    flat = {name: stack[:, 0] if stack.ndim == 5 else stack for name, stack in images.items()}
    shown = [name for name in (rows or _ROWS) if name in flat]
    if not shown:
        raise ConfigError(f"rows names no method of {', '.join(sorted(set(flat) - {'seen'}))}.")
    picks, heads = _pick(score, min(n_items, len(score)))
    n_rows = 1 + len(shown)
    figure = MatplotlibFigure(figsize=(width, width * n_rows / (len(picks) + 0.8)), layout="constrained")
    axes = figure.subplots(n_rows, len(picks), squeeze=False)
    for y, name in enumerate(["seen", *shown]):
        for x, item in enumerate(picks):
            ax = axes[y, x]
            ax.imshow(flat[name][item])
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set_visible(False)
        axes[y, 0].set_ylabel(name.replace("_", " "), rotation=0, ha="right", va="center")
    n_letters = max(8, int(17 * width / (len(picks) + 0.8)))  # that stand side by side above a picture
    for x, item in enumerate(picks):
        name = "\n".join(wrap(str(ids[item]).replace("_", " "), n_letters))
        axes[0, x].set_title(f"{heads[x]}\n{name}", fontsize=7)
        axes[1, x].set_xlabel(f"{score[item]:.2f}", fontsize=7)
    return show_in_notebooks(figure)


def export_images(run: Any, out: str | Path) -> Path:
    """Write the decoded and the seen image of every test item as PNG, and the gallery of `plot_gallery`.

    ::

        OUT/
          decoded/    IMAGE_sub-SUBJECT.png; with _rep-N where an image was shown again, and _draw-N for several draws
          seen/       the same names, without the draws
          images.csv  image, subject and file names, one row per item
          gallery.png

    Parameters
    ----------
    run
        A finished `DecodingRun`.
    out
        A folder that does not exist yet.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError, DataError
        If the folder exists, or the run has no images.
    """
    from PIL import Image

    from braindecode_vis.api.exports import write_new

    made, items = run.reconstructions, run.items
    stems = _name_items(items)
    written = items[["stimulus_id", "subject"]].assign(seen="", decoded="").astype(object)
    with write_new(out, "png") as folder:
        for kind in ("decoded", "seen"):
            (folder / kind).mkdir(parents=True)
            for row, stem in enumerate(stems):
                draws = _read_draws(made[kind][row])
                names = (
                    [f"{stem}_draw-{n + 1}.png" for n in range(len(draws))]
                    if len(draws) > 1
                    else [f"{stem}.png"]
                )
                for name, pixels in zip(names, draws, strict=True):
                    Image.fromarray(pixels).save(folder / kind / name)
                written.iloc[row, written.columns.get_loc(kind)] = " ".join(
                    f"{kind}/{name}" for name in names
                )
        written.to_csv(folder / "images.csv", index=False)
        plot_gallery(run).savefig(folder / "gallery.png", dpi=150)
    return Path(out).expanduser().absolute()


def export_for_basic(run: Any, out: str | Path) -> Path:
    """Write the decoded and the seen images in the folders of BASIC, which scores pictures of several methods.

    ::

        OUT/res_decoding/SET/
          NAME/    decoded images, under the name of the run
          images/  the seen ones, under the same file names

    SET is ``nsd`` or ``eeg-things`` where BASIC has the data set, else our name of it. Of several draws the first is
    written, since BASIC scores one picture of an item.

    Parameters
    ----------
    run
        A finished `DecodingRun`.
    out
        A folder that does not exist yet.

    Raises
    ------
    ConfigError, DataError
        If the folder exists, or the run has no images or a name that BASIC keeps for seen ones.

    References
    ----------
    BASIC (2025), arXiv:2507.07993.
    """
    from PIL import Image

    from braindecode_vis.api.exports import write_new

    config = run.config
    if config.name in ("images", "test_images"):
        raise ConfigError(
            f"BASIC keeps the folder {config.name} for seen images; give the run another name (name)."
        )
    made, stems = run.reconstructions, _name_items(run.items)
    with write_new(out, "basic") as folder:
        place = folder / "res_decoding" / _BASIC_SETS.get(config.dataset.kind, config.dataset.kind)
        for kind, name in (("decoded", config.name), ("seen", "images")):
            (place / name).mkdir(parents=True)
            for row, stem in enumerate(stems):
                Image.fromarray(_read_draws(made[kind][row])[0]).save(place / name / f"{stem}.png")
    return Path(out).expanduser().absolute()


def _read_draws(images: Any) -> np.ndarray:
    """Return the images of an item, shape (n_draws, height, width, 3)."""
    found = np.asarray(images)
    return found if found.ndim == 4 else found[None]


def _name_items(items: pd.DataFrame) -> list[str]:
    """Return a file name for each item, without its ending: the image, the subject, and which repetition it is."""
    plain = [
        re.sub(r"[^A-Za-z0-9._-]+", "-", str(name)).strip(".-") or "image" for name in items["stimulus_id"]
    ]
    names = pd.Series(
        [
            f"{name}_sub-{re.sub('[^A-Za-z0-9]+', '', str(who))}"
            for name, who in zip(plain, items["subject"], strict=True)
        ]
    )
    lower = names.str.lower()  # some file systems know no capitals
    again = lower.duplicated(keep=False)
    return [
        f"{name}_rep-{number + 1}" if repeated else name
        for name, number, repeated in zip(names, lower.groupby(lower).cumcount(), again, strict=True)
    ]


def _correlate(seen: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(len(x), -1).astype(float) for x in (seen, decoded))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)


def _pick(score: np.ndarray, n_items: int) -> tuple[list[int], list[str]]:
    """Return items in order of their score: the best, those around the median, the worst; ties by their order."""
    order = np.argsort(-score, kind="stable")
    n = len(order)
    third = max(1, n_items // 3)
    if n_items < 3 or n <= 3 * third:
        return order[:n_items].tolist(), ["" for _ in order[:n_items]]
    middle = (n - third) // 2
    groups = {"best": order[:third], "median": order[middle : middle + third], "worst": order[-third:]}
    return [int(i) for group in groups.values() for i in group], [
        name for name, g in groups.items() for _ in g
    ]


def plot_ranks(run: Any = None, *, ranks: Any = None, gallery_size: int | None = None) -> Figure:
    """Draw how often the seen image has each rank in the gallery, beside chance.

    Parameters
    ----------
    run
        A `DecodingRun`; leave it out if you give ranks.
    ranks : int array of shape (n_trials,), optional
        Rank of the true image of each trial, from 1.
    gallery_size
        Number of candidates, with `ranks`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from braindecode_vis.report.figures import plot_rank_histogram

    if run is not None:
        if not hasattr(run, "ranks"):
            raise DataError(f"plot_ranks takes a run that finds pictures, not {type(run).__name__}.")
        table = run.ranks
        sizes = sorted(set(table["gallery_size"]))
        if len(sizes) > 1:
            raise DataError(
                f"the folds of this run have galleries of {sizes[0]} to {sizes[-1]} images; ranks of "
                "galleries of different sizes cannot be drawn in one figure."
            )
        ranks, gallery_size = table["rank"].to_numpy(), int(sizes[0])
    if ranks is None or gallery_size is None:
        raise DataError("plot_ranks takes a run, or both ranks and gallery_size.")
    return plot_rank_histogram(ranks, gallery_size)


def plot_scores(run: Any = None, *, scores: pd.DataFrame | None = None) -> Figure:
    """Draw the scores of a run with their intervals and chance levels, the controls beside the decoded system.

    Parameters
    ----------
    run
        A `DecodingRun`; or give `scores`, a table like ``run.scores``.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from braindecode_vis.report.figures import plot_scores_with_intervals

    table = run.scores if run is not None else scores
    if table is None:
        raise DataError("plot_scores takes a run, or a table of scores.")
    return plot_scores_with_intervals([dict(row) for _, row in table.iterrows()])
