"""How much of a retrieval score is geometry: hubs, effective dimension, the gap between predictions and targets.

Owns hubness, effective dimension, similarity within and between concepts and the gap between two modalities, each for
the predictions and the gallery of a run and beside the value that the targets would give in the place of the
predictions. High cosines between any two images, hubs or few dimensions explain retrieval scores that say nothing of
the brain. No encoder is fitted.

References
----------
Radovanovic et al. (2010), JMLR 11 (hubness); Recanatesi et al. (2022), Patterns 3 (participation ratio); Liang et al.
(2022), NeurIPS, arXiv:2203.02053 (modality gap); Wang and Isola (2020), ICML, arXiv:2005.10242 (uniformity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings, Responses, check_same_space, normalise_rows
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.analyses.measure import check_retrieval, find_row_units
from braindecode_vis.parts.analyses.study import Findings, Plot, Study, rank_trials
from braindecode_vis.report.drawing import draw_bars
from braindecode_vis.scoring.crossed import FEWEST, NO_INTERVAL, half_width_of_parts, resampled_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class HubnessConfig(Analysis):
    """Describe the geometry of predictions and targets."""

    kind: Literal["hubness"] = "hubness"

    #: Neighbours that count as near.
    k: ClassVar[int] = 10
    #: Resamples of the images behind the intervals.
    n_resamples: ClassVar[int] = 200
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"k", "n_resamples"})

    def compute(self, study: Study) -> Findings:
        """Predict the test trials of every fold, and describe predictions and gallery."""
        check_retrieval(study, self.kind)
        rows, shares = [], []
        for number, fold in enumerate(study.folds):
            test = study.pick(fold.test, "test")
            queries, gallery, _ = rank_trials(study, number, test, study.trained(number))
            if len(gallery) < 4:
                raise DataError("the geometry analysis needs a gallery of at least four images.")
            concepts = study.stimuli.concepts_of(gallery.ids).astype(str)
            found = measure_geometry(queries, gallery, concepts, self.k)
            perfect = measure_geometry(gallery.select(list(queries.ids)), gallery, concepts, self.k)
            bounds = self._bound(study, test, queries, gallery, number)
            for name, value in found.items():
                low, high, resampled = bounds.get(name, (np.nan, np.nan, ""))
                rows.append(
                    {
                        "fold": number, "quantity": name, "value": value, "ci_low": low, "ci_high": high,
                        "chance": np.nan, "reference": perfect[name], "n": len(queries), "resampled": resampled,
                    }
                )  # fmt: skip
            counts = count_neighbours(queries, gallery, self.k)
            shares.append(pd.Series(counts, index=gallery.ids.astype(str)))
        return self._report(pd.DataFrame(rows), shares)

    def _bound(
        self, study: Study, test: Responses, queries: Embeddings, gallery: Embeddings, number: int
    ) -> dict[str, tuple[float, float, str]]:
        """Return limits of what depends on the predictions, and what they resample.

        Each row speaks of the predictions of one fold, which a single encoder made.
        """
        subjects = test.trials["subject"].astype(str).to_numpy()
        units = find_row_units(study, study.find_clusters(test), subjects, test.stimulus_ids)
        clusters, unit = units["clusters"].astype(str), str(units["unit"])

        def resample(labels: np.ndarray, what: str) -> tuple[dict[str, np.ndarray], int]:
            generator = make_generator(study.seed, what, number)
            codes = np.unique(labels, return_inverse=True)[1]
            groups = [np.flatnonzero(codes == c) for c in range(codes.max() + 1)]
            draws: dict[str, list[float]] = {}
            for _ in range(self.n_resamples):
                rows = np.concatenate([groups[g] for g in generator.integers(0, len(groups), len(groups))])
                some = queries.take(rows)
                for name, value in _measure_predictions(some, gallery, self.k).items():
                    draws.setdefault(name, []).append(value)
            return {name: np.array(values) for name, values in draws.items()}, len(groups)

        found = _measure_predictions(queries, gallery, self.k)
        by_unit = resample(clusters, "bootstrap geometry")
        if unit == "subject" or len(set(subjects.tolist())) == 1:
            return {
                name: bound_geometry(value, by_unit[0][name], by_unit[1], unit)
                for name, value in found.items()
            }
        cells = np.array([f"{who} {cluster}" for who, cluster in zip(subjects, clusters, strict=True)])
        by_subject = resample(subjects, "bootstrap geometry subjects")
        by_cell = resample(cells, "bootstrap geometry cells")
        return {
            name: cross_geometry(
                value,
                [draws[name] for draws, _ in (by_subject, by_unit, by_cell)],
                (by_subject[1], by_unit[1]),
                unit,
            )
            for name, value in found.items()
        }

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
            limits = "" if np.isnan(row["ci_low"]) else f"{row['ci_low']:.3g} to {row['ci_high']:.3g}; "
            return f"{row['value']:.3g} ({limits}perfect: {row['reference']:.3g})"

        names, share = counts.index.tolist(), float(mean["value"]["largest_share"])
        found = (
            f"Skewness of the counts of neighbours {say('hubness_skewness')}; the most frequent image, "
            f"{names[0]}, is near to {share:.1%} of the predictions. Effective "
            f"dimension of the predictions {say('effective_dimension')}; distance of the centres of predictions and "
            f"targets {say('modality_gap')}; cosine to the own image {say('matching_cosine')}, to others "
            f"{say('other_cosine')}."
        )
        caption = (
            f"Left: how often each image is among the {self.k} nearest of a prediction (first fold). "
            "Right: means over folds with 95 % intervals; diamonds are the values for the targets "
            "instead of the predictions."
        )
        return Findings("Geometry of the predictions", found, table, (Plot("hubness", caption, found, draw),))


def bound_geometry(value: float, draws: np.ndarray, n_units: int, unit: str) -> tuple[float, float, str]:
    """Return the 95 % interval of a quantity of one subject from its resamples, and what it resamples.

    A resample repeats some images, which lowers dimensions and moves centres apart; the plain percentiles may then
    leave out the value that they are to describe. They are moved by their bias, so that they are around the value.
    """
    moved = draws - draws.mean() + value
    found = resampled_interval(value, moved, n_units, unit=unit, ends=(-np.inf, np.inf))
    low, high = (np.nan if limit is None else limit for limit in (found.low, found.high))
    return low, high, found.resampled


def cross_geometry(
    value: float, draws: Sequence[np.ndarray], sizes: tuple[int, int], unit: str
) -> tuple[float, float, str]:
    """Return the crossed 95 % interval of a quantity of several subjects.

    Parameters
    ----------
    value
        The quantity.
    draws : three arrays of shape (n_draws,)
        Its values in resamples of whole subjects, of units in all subjects, and of single cells of subject and unit.
    sizes
        Number of subjects and of units.
    unit
        What the units are, in one word.
    """
    n_subjects, n_units = sizes
    if n_subjects < FEWEST:
        return (
            np.nan, np.nan,
            f"{NO_INTERVAL}: {n_subjects} subjects, and an interval over subjects needs at least {FEWEST}",
        )  # fmt: skip
    rows, columns, cells = (float(one.var()) for one in draws)
    rows *= n_subjects / (n_subjects - 1)  # n subjects show (n - 1) / n of what varies
    columns *= n_units / max(n_units - 1, 1)
    half = half_width_of_parts(rows, columns, cells, n_subjects, n_units)
    return value - half, value + half, f"{n_subjects} subjects and {n_units} {unit}s (crossed)"


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


# --- measures of one or two sets of embeddings ---------------------------------------------------------------------


_BLOCK = 1024  # rows of a similarity matrix held at once


def make_unit(vectors: np.ndarray) -> np.ndarray:
    """Return float64 rows of length one, shape (n_rows, n_features); tokens are flattened, zero rows stay zero."""
    return normalise_rows(np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1))


@dataclass(frozen=True)
class Hubness:
    """How unevenly gallery items appear among the nearest neighbours of the queries.

    Parameters
    ----------
    skewness
        Of the number of times an item is among the `k` nearest; 0 for no hubs, above 1 for strong ones.
    largest_share
        Fraction of the queries that have the most frequent item among their `k` nearest.
    never_share
        Fraction of the items that no query has among its `k` nearest.
    hub_id
        The most frequent item.
    """

    skewness: float
    largest_share: float
    never_share: float
    hub_id: str


def compute_hubness(queries: Embeddings, gallery: Embeddings, *, k: int = 10) -> Hubness:
    """Count how often each gallery item is among the `k` nearest of a query, by cosine.

    Parameters
    ----------
    queries, gallery
        In one space. If a set is compared with itself, pass it twice; an item is then not its own neighbour.
    k
        Number of neighbours; at most the number of candidates.
    """
    return summarise_counts(count_neighbours(queries, gallery, k), len(queries), gallery.ids)


def summarise_counts(counts: np.ndarray, n_queries: int, ids: np.ndarray) -> Hubness:
    """Return the hubness of counts that are known already.

    Parameters
    ----------
    counts : int array of shape (n_gallery,)
        How often each item is among the nearest of a query.
    n_queries
        Number of queries.
    ids : sequence of length n_gallery
        Of the items.
    """
    deviation = counts.std()
    skewness = float(((counts - counts.mean()) ** 3).mean() / deviation**3) if deviation > 0 else 0.0
    hub = int(counts.argmax())
    return Hubness(
        skewness=skewness,
        largest_share=float(counts[hub] / n_queries),
        never_share=float((counts == 0).mean()),
        hub_id=str(ids[hub]),
    )


def count_neighbours(queries: Embeddings, gallery: Embeddings, k: int) -> np.ndarray:
    """Return how often each gallery item is among the `k` nearest of a query, int array of shape (n_gallery,)."""
    check_same_space(queries, gallery)
    left, right = make_unit(queries.vectors), make_unit(gallery.vectors)
    same = queries is gallery
    k = min(k, len(right) - int(same))
    if k < 1:
        raise DataError("hubness needs at least one candidate besides the query itself.")
    counts = np.zeros(len(right), dtype=np.int64)
    for start in range(0, len(left), _BLOCK):
        similarity = left[start : start + _BLOCK] @ right.T  # (n_block, n_gallery)
        if same:
            rows = np.arange(len(similarity))
            similarity[rows, start + rows] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        counts += np.bincount(nearest.ravel(), minlength=len(right))
    return counts


def compute_effective_dimension(vectors: np.ndarray) -> float:
    """Return the participation ratio of the variances along the principal axes: (sum)^2 / sum of squares.

    Parameters
    ----------
    vectors : float array of shape (n_rows, ...)

    Examples
    --------
    >>> compute_effective_dimension(np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
    2.0
    """
    flat = np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)
    if len(flat) < 2:
        raise DataError("the effective dimension needs at least two rows.")
    centred = flat - flat.mean(axis=0)
    # Both Gram matrices have the same non-zero eigenvalues; the smaller one is cheaper.
    gram = centred.T @ centred if flat.shape[1] <= len(flat) else centred @ centred.T
    total = np.trace(gram)
    return float(total**2 / (gram**2).sum()) if total > 0 else 0.0


@dataclass(frozen=True)
class ConceptSimilarity:
    """Mean cosine between images of one concept and between images of different ones.

    Parameters
    ----------
    within, between
        Mean cosines; `within` is None if no concept has two images.
    between_sd
        Standard deviation of the cosines between concepts.
    separation
        ``(within - between) / between_sd``: how far a concept stands out of the crowd.
    """

    within: float | None
    between: float
    between_sd: float
    separation: float | None


def compute_concept_similarity(
    embeddings: Embeddings, concepts: Sequence[str] | np.ndarray
) -> ConceptSimilarity:
    """Compare cosines within and between concepts, over all pairs of images.

    Parameters
    ----------
    embeddings
        One row per image.
    concepts : sequence of length n_rows
        Concept of each row.
    """
    if len(concepts) != len(embeddings):
        raise DataError(f"{len(embeddings)} embeddings came with {len(concepts)} concepts.")
    units = make_unit(embeddings.vectors)
    _, codes = np.unique(np.asarray(concepts).astype(str), return_inverse=True)
    sums = np.zeros(3), np.zeros(3)  # pairs, sum, sum of squares: between, within
    for start in range(0, len(units), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(units)))
        similarity = units[rows] @ units.T
        later = rows[:, None] < np.arange(len(units))[None]  # every pair once
        same = codes[rows][:, None] == codes[None]
        for total, mask in zip(sums, (later & ~same, later & same), strict=True):
            values = similarity[mask]
            total += [values.size, values.sum(), (values**2).sum()]
    (n, summed, squares), (n_within, total_within, _) = (part.tolist() for part in sums)
    if n == 0:
        raise DataError("all images show one concept, so concepts cannot be compared.")
    between = summed / n
    deviation = float(np.sqrt(max(squares / n - between**2, 0.0)))
    within = float(total_within / n_within) if n_within else None
    separation = None if within is None or deviation == 0 else (within - between) / deviation
    return ConceptSimilarity(
        within, float(between), deviation, None if separation is None else float(separation)
    )


@dataclass(frozen=True)
class ModalityGap:
    """How two sets of unit vectors that should coincide lie apart.

    Parameters
    ----------
    gap
        Distance between the two mean vectors; 0 if the clouds share a centre, up to 2.
    alignment
        Mean squared distance between matching rows; 0 is perfect.
    matching, other
        Mean cosine of matching rows and of all other pairs.
    uniformity_left, uniformity_right
        Log of the mean of exp(-2 d^2) over pairs of one set; the lower, the more evenly spread. 0 is collapse.
    n_pairs
        Number of matching rows.
    """

    gap: float
    alignment: float
    matching: float
    other: float
    uniformity_left: float
    uniformity_right: float
    n_pairs: int


def compute_modality_gap(left: Embeddings, right: Embeddings) -> ModalityGap:
    """Compare predictions with the embeddings they should hit (or images with their captions), by id.

    Parameters
    ----------
    left
        Any rows; ids may repeat.
    right
        One row per id, in the same space; must hold every id of `left`.
    """
    check_same_space(left, right)
    if len(left) < 2:
        raise DataError("the modality gap needs at least two rows.")
    a, b = make_unit(left.vectors), make_unit(right.select(left.ids).vectors)
    matching = (a * b).sum(axis=1)
    n = len(a)
    # All pairs are the product of the two sums, less those that match.
    other = (float(a.sum(axis=0) @ b.sum(axis=0)) - matching.sum()) / (n * (n - 1))
    return ModalityGap(
        gap=float(np.linalg.norm(a.mean(axis=0) - b.mean(axis=0))),
        alignment=float((2 - 2 * matching).mean()),
        matching=float(matching.mean()),
        other=float(other),
        uniformity_left=compute_uniformity(a),
        uniformity_right=compute_uniformity(make_unit(right.vectors)),
        n_pairs=n,
    )


def compute_uniformity(vectors: np.ndarray) -> float:
    """Return the log of the mean over pairs of rows of exp(-2 d^2), d being the distance of the unit vectors."""
    units = make_unit(vectors)
    if len(units) < 2:
        raise DataError("uniformity needs at least two rows.")
    total = 0.0
    for start in range(0, len(units), _BLOCK):
        total += float(np.exp(4 * (units[start : start + _BLOCK] @ units.T - 1)).sum())
    n = len(units)
    # exp(-2 d^2) = exp(4 (cosine - 1)) for unit vectors; each row with itself gives 1 and is left out.
    return float(np.log((total - n) / (n * (n - 1))))
