"""What of the score is geometry: hubs, effective dimension, the gap between predictions and targets, likeness of
concepts.

Owns the numbers of `braindecode_vis.analysis.embedding_geometry` for the predictions and the gallery of a run, each
beside the value that the targets themselves would give in the place of the predictions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.analysis.drawing import draw_bars
from braindecode_vis.analysis.embedding_geometry import (
    compute_concept_similarity,
    compute_effective_dimension,
    compute_hubness,
    compute_modality_gap,
)
from braindecode_vis.analysis.measure import check_retrieval
from braindecode_vis.analysis.study import Findings, Plot, Study, rank_trials
from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.seeds import make_generator
from braindecode_vis.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HubnessConfig(Settings):
    """Describe the geometry of predictions and targets.

    Parameters
    ----------
    k
        Neighbours that count as near.
    n_resamples
        Resamples of the images behind the intervals.
    """

    kind: Literal["hubness"] = "hubness"
    k: int = Field(default=10, ge=1)
    n_resamples: int = Field(default=200, ge=50)

    def compute(self, study: Study) -> Findings:
        """Predict the test trials of every fold, and describe predictions and gallery."""
        check_retrieval(study, self.kind)
        rows, shares = [], []
        for number, fold in enumerate(study.folds):
            test = study.pick(fold.test, "test")
            queries, gallery, _ = rank_trials(study, number, test, study.trained(number))
            if len(gallery) < 4:
                raise DataError("the geometry of a gallery of fewer than four images says nothing.")
            concepts = study.stimuli.concepts_of(gallery.ids).astype(str)
            found = measure_geometry(queries, gallery, concepts, self.k)
            perfect = measure_geometry(gallery.select(list(queries.ids)), gallery, concepts, self.k)
            spread = self._resample(study, queries, gallery, number)
            for name, value in found.items():
                draws = spread.get(name)
                low, high = (np.nan, np.nan) if draws is None else _shift_interval(value, draws)
                rows.append(
                    {
                        "fold": number, "quantity": name, "value": value, "ci_low": float(low), "ci_high": float(high),
                        "chance": np.nan, "reference": perfect[name], "n": len(queries),
                    }
                )  # fmt: skip
            shares.append(count_neighbours(queries, gallery, self.k))
        return self._report(pd.DataFrame(rows), shares)

    def _resample(
        self, study: Study, queries: Embeddings, gallery: Embeddings, number: int
    ) -> dict[str, np.ndarray]:
        """Return what depends on the predictions for resampled images."""
        generator = make_generator(study.seed, "bootstrap geometry", number)
        codes = np.unique(queries.ids.astype(str), return_inverse=True)[1]
        groups = [np.flatnonzero(codes == c) for c in range(codes.max() + 1)]
        draws: dict[str, list[float]] = {}
        for _ in range(self.n_resamples):
            rows = np.concatenate([groups[g] for g in generator.integers(0, len(groups), len(groups))])
            some = Embeddings(queries.vectors[rows], queries.ids[rows], queries.space)
            for name, value in _measure_predictions(some, gallery, self.k).items():
                draws.setdefault(name, []).append(value)
        return {name: np.array(values) for name, values in draws.items()}

    def _report(self, table: pd.DataFrame, shares: list[pd.Series]) -> Findings:
        mean = table.groupby("quantity", sort=False)[["value", "ci_low", "ci_high", "reference"]].mean()
        counts = shares[0].sort_values(ascending=False)

        def draw(figure: Figure) -> None:
            left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
            left.plot(np.arange(1, len(counts) + 1), counts.to_numpy(), color="C0")
            left.axhline(counts.mean(), color="C2", lw=1, ls="--", label="evenly spread")
            left.set_xlabel("image of the gallery, most frequent first")
            left.set_ylabel(f"times among the {self.k} nearest")
            left.legend()
            own = mean.loc[["matching_cosine", "other_cosine", "largest_share", "never_share"]].reset_index()
            draw_bars(right, own, own["quantity"].str.replace("_", " ").tolist())
            right.plot(
                own["reference"], np.arange(len(own)), "D", ms=4, color="C1", label="perfect predictions"
            )
            right.legend()

        def say(name: str) -> str:
            row = mean.loc[name]
            return f"{row['value']:.3g} ({row['ci_low']:.3g} to {row['ci_high']:.3g}; perfect: {row['reference']:.3g})"

        found = (
            f"Skewness of the counts of neighbours {say('hubness_skewness')}; the most frequent image, "
            f"{counts.index[0]}, is near to {mean.loc['largest_share', 'value']:.1%} of the predictions. Effective "
            f"dimension of the predictions {say('effective_dimension')}; distance of the centres of predictions and "
            f"targets {say('modality_gap')}; cosine to the own image {say('matching_cosine')}, to others "
            f"{say('other_cosine')}."
        )
        caption = (
            f"Left: how often each image is among the {self.k} nearest of a prediction (first fold). Right: means over "
            "folds with 95 % intervals; diamonds are what the targets would give in the place of the predictions."
        )
        return Findings("Geometry of the predictions", found, table, (Plot("hubness", caption, found, draw),))


def _shift_interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of resamples, moved by their bias so that it stands around the value.

    A resample repeats some images, which lowers dimensions and moves centres apart; the plain percentiles may then
    leave out the value that they are to describe.
    """
    low, high = np.quantile(draws, [0.025, 0.975]) - draws.mean() + value
    return float(low), float(high)


def count_neighbours(queries: Embeddings, gallery: Embeddings, k: int) -> pd.Series:
    """Return how often each image is among the `k` nearest of a query."""
    from braindecode_vis.analysis.embedding_geometry import make_unit

    similarity = make_unit(queries.vectors) @ make_unit(gallery.vectors).T
    k = min(k, len(gallery))
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return pd.Series(np.bincount(nearest.ravel(), minlength=len(gallery)), index=gallery.ids.astype(str))


def _measure_predictions(queries: Embeddings, gallery: Embeddings, k: int) -> dict[str, float]:
    hubs, gap = compute_hubness(queries, gallery, k=k), compute_modality_gap(queries, gallery)
    return {
        "hubness_skewness": hubs.skewness, "largest_share": hubs.largest_share, "never_share": hubs.never_share,
        "effective_dimension": compute_effective_dimension(queries.vectors), "modality_gap": gap.gap,
        "matching_cosine": gap.matching, "other_cosine": gap.other, "uniformity": gap.uniformity_left,
    }  # fmt: skip


def measure_geometry(
    queries: Embeddings, gallery: Embeddings, concepts: np.ndarray, k: int
) -> dict[str, float]:
    """Return every quantity by name; those of concepts only where concepts have several images."""
    out = _measure_predictions(queries, gallery, k)
    out["gallery_effective_dimension"] = compute_effective_dimension(gallery.vectors)
    if len(set(concepts.tolist())) > 1:
        found = compute_concept_similarity(gallery, concepts)
        values: dict[str, Any] = {
            "within_concept_cosine": found.within, "between_concept_cosine": found.between,
            "concept_separation": found.separation,
        }  # fmt: skip
        out |= {name: float(value) for name, value in values.items() if value is not None}
    return out
