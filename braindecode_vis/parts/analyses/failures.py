"""Which images are not identified, and which images are chosen instead.

Owns one row per test image: how well it is identified, by which image it is replaced, how often it is named wrongly,
and how ordinary its target is. Single images rest on few trials, so their intervals are wide; the best and the worst of
many are extreme partly by chance, and would be less so in new data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.parts.analyses.hubness import make_unit
from braindecode_vis.parts.analyses.measure import check_retrieval
from braindecode_vis.parts.analyses.study import Findings, Plot, Study, rank_trials
from braindecode_vis.scoring.retrieval import compute_k_way_hits
from braindecode_vis.scoring.uncertainty import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_THUMBNAIL = 96  # pixels; twenty pairs are drawn side by side


class FailuresConfig(Analysis):
    """List images from worst to best."""

    kind: Literal["failures"] = "failures"

    #: Worst images that are drawn beside what they are taken for.
    n_shown: ClassVar[int] = 8
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_shown"})

    def compute(self, study: Study) -> Findings:
        """Rank the test trials with the run's encoders, and sort the images."""
        check_retrieval(study, self.kind)
        table = pd.concat([_tabulate(study, n) for n in range(len(study.folds))], ignore_index=True)
        table = table.sort_values("value", ignore_index=True, kind="stable")
        from scipy.stats import spearmanr

        # A constant has no ranks to correlate.
        rho = float("nan")
        if table["value"].nunique() > 1 and table["typicality"].nunique() > 1:
            rho = float(spearmanr(table["typicality"], table["value"]).statistic)
        worst, n_bad = table.iloc[0], int((table["value"] < 0.5).sum())
        found = (
            f"{n_bad} of {len(table)} test images are identified worse than chance. The worst is "
            f"{worst['stimulus_id']} ({worst['concept']}): two-way identification {worst['value']:.3f} in {worst['n']} "
            f"trial(s), most often decoded as {worst['taken_for']} ({worst['taken_for_concept']}). "
            "Identification and "
            f"typicality of the target correlate at {rho:.2f} (Spearman)."
        )
        shown = _read_thumbnails(study, table.head(self.n_shown))

        def draw(figure: Figure) -> None:
            if shown:
                _draw_pairs(figure, table.head(self.n_shown), shown)
                return
            axes = figure.subplots()
            axes.plot(table["typicality"], table["value"], "o", ms=4, color="C0")
            axes.axhline(0.5, color="C2", lw=1, ls="--")
            axes.set_xlabel("typicality of the target (cosine to the mean of the gallery's neighbours)")
            axes.set_ylabel("two-way identification in the embedding")

        caption = (
            f"The {self.n_shown} worst test images (top) and the image that is decoded most often instead (bottom)."
            if shown
            else "Two-way identification of each test image by the typicality of its target; the dashed line is chance."
        )
        plot = Plot("failures", caption, found, draw)
        how = "Each image has only few trials, so the most extreme images are partly extreme by chance."
        return Findings("Failures", f"{found} {how}", table, (plot,))


def _tabulate(study: Study, number: int) -> pd.DataFrame:
    test = study.pick(study.folds[number].test, "test")
    _, gallery, retrieval = rank_trials(study, number, test, study.trained(number))
    if retrieval.gallery_size < 2:
        raise DataError("a gallery of one image has no failures.")
    values = compute_k_way_hits(retrieval, 2)
    first = retrieval.gallery_ids[retrieval.top_indices[:, 0]].astype(str)
    ids = test.stimulus_ids.astype(str)
    units = make_unit(gallery.vectors)
    n = len(units)
    # Mean cosine to all other images of the gallery: the sum over all less the image itself.
    typical = (units @ units.sum(axis=0) - (units**2).sum(axis=1)) / (n - 1)
    typicality = dict(zip(gallery.ids.astype(str), typical, strict=True))
    named = pd.Series(first[first != ids]).value_counts()
    concepts = dict(zip(gallery.ids.astype(str), study.stimuli.concepts_of(gallery.ids), strict=True))
    rows: list[dict[str, Any]] = []
    for name in gallery.ids.astype(str):
        own = ids == name
        low = high = float("nan")
        if own.sum() > 1:  # over the trials of the image; one trial has no interval
            interval = bootstrap_interval(values[own], n_boot=min(2000, study.n_bootstrap), seed=study.seed)
            low, high = interval.low, interval.high
        others = first[own][first[own] != name]
        taken = pd.Series(others).value_counts().index[0] if len(others) else name
        rows.append(
            {
                "stimulus_id": name, "concept": concepts[name], "fold": number, "value": float(values[own].mean()),
                "ci_low": low, "ci_high": high, "chance": 0.5, "n": int(own.sum()),
                "mean_rank": float(retrieval.ranks[own].mean()), "gallery_size": n, "top1": float((first[own] ==
                name).mean()), "taken_for": taken, "taken_for_concept": concepts[taken], "named_wrongly":
                int(named.get(name, 0)), "typicality": float(typicality[name]),
                "resampled": "trials of the image" if own.sum() > 1 else "",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _read_thumbnails(study: Study, rows: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the images of each pair, or nothing if images are not available."""
    try:
        return [
            (_shrink(study.stimuli.read_image(a)), _shrink(study.stimuli.read_image(b)))
            for a, b in zip(rows["stimulus_id"], rows["taken_for"], strict=True)
        ]
    except DataError:
        return []


def _shrink(image: np.ndarray) -> np.ndarray:
    return resize_image(image, _THUMBNAIL, _THUMBNAIL) if max(image.shape[:2]) > _THUMBNAIL else image


def _draw_pairs(figure: Figure, rows: pd.DataFrame, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    grid = figure.subplots(2, len(pairs), squeeze=False)
    for column, ((seen, taken), value) in enumerate(zip(pairs, rows["value"], strict=True)):
        for axes, image in zip(grid[:, column], (seen, taken), strict=True):
            axes.imshow(image)
            axes.set_axis_off()
        grid[0, column].set_title(f"{value:.2f}")
