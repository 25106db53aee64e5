"""Which attribute of an image can be decoded, when and where: colour, shape, background, animacy of a user's table.

Owns one linear decoding of all attributes at once: a ridge from the responses of a window of time, a region or the
whole trial to centred indicators of every value. Each attribute is judged by the area under the ROC curve, the mean
over its values, each against the rest: chance is 0.5 however many values there are, so attributes can be compared.
Where all images of a concept share a value, decisions on them are averaged and a concept is one item. Curves are tested
by cluster mass over time under exchanged items, and these p-values are Holm's over attributes. An onset also depends on
how strong an effect is; the rise, half of the way from chance to the peak, does not, and orders attributes.

References
----------
Carlson et al. (2013), doi:10.1167/13.10.1; Cichy et al. (2014), doi:10.1038/nn.3635 (when which property is decoded).
Sassenhagen and Draschkow (2019), doi:10.1111/psyp.13335 (what cluster latencies do not mean).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.embeddings.attribute_table import AttributeTable, read_attributes
from braindecode_vis.embeddings.conditional import find_trained_values
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.analyses.curves import (
    MIN_SUBJECTS,
    check_windows,
    cluster_over_labels,
    cluster_over_subjects,
    finish_curve,
)
from braindecode_vis.parts.analyses.cuts import (
    ShortWindows,
    Window,
    cut_window,
    keep_features,
    make_sliding_windows,
)
from braindecode_vis.parts.analyses.measure import (
    check_retrieval,
    describe_limits,
    find_best,
    pick_limits,
)
from braindecode_vis.parts.analyses.regions import list_rois
from braindecode_vis.parts.analyses.study import Change, Findings, Plot, Study, complete_encoder, fit_picked
from braindecode_vis.parts.analyses.window_categories import (
    RunDecisions,
    average_by_subject,
    average_subjects,
    bootstrap_areas,
    bound_areas,
    widen_areas,
)
from braindecode_vis.report.drawing import draw_matrix, mark_stimulus
from braindecode_vis.report.sensor_groups import REGIONS, assign_regions
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import compute_p_value, correct_fdr, correct_holm, permute_within

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "whole trial"


class AttributesConfig(ShortWindows):
    """Decode every attribute of a table from windows of time or from regions.

    Parameters
    ----------
    attributes
        CSV file with the column ``id`` or ``concept`` and a column for each attribute.
    names
        The attributes to decode; empty takes all that vary among training images.
    over
        ``time`` (sliding windows), ``rois`` (regions of interest of fMRI), ``sensors`` (regions of the head) or
        ``whole``; ``auto`` takes time if trials have it, regions if voxels have them, or else the whole trial.
    sets
        Sets of regions of interest; None takes all.
    """

    kind: Literal["attributes"] = "attributes"
    attributes: Path
    names: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    over: Literal["auto", "time", "rois", "sensors", "whole"] = "auto"
    sets: tuple[str, ...] | None = None

    #: Penalties of the ridge, chosen inside the training trials.
    alphas: ClassVar[tuple[float, ...]] = (1e1, 1e2, 1e3, 1e4, 1e5)
    #: Level of the tests.
    alpha: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"alphas", "alpha"})

    uses_encoder: ClassVar[bool] = False
    not_hashed: ClassVar[frozenset[str]] = frozenset({"attributes"})

    def check_files(self) -> None:
        """Raise `DataError` unless the table can be read and has the attributes that are named."""
        self._read()

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the table."""
        self._read()
        return {**super().hashed_fields(), "attributes_digest": hash_once(self.attributes.expanduser())}

    def _read(self) -> AttributeTable:
        table = read_attributes(self.attributes.expanduser())
        return table.choose(self.names, what=str(self.attributes)) if self.names else table

    def compute(self, study: Study) -> Findings:
        """Decode every attribute from every window or region."""
        check_retrieval(study, self.kind)
        over = self.over if self.over != "auto" else _choose_places(study)
        places = self._list_places(study, over)
        asked, left_out = find_decodable(study, self._read(), strict=bool(self.names))
        blocks = self._decide(study, asked, places)
        windows = [place.window for place in places if place.window is not None]
        tables = []
        for number, name in enumerate(asked.table.names):
            if not blocks[name]:
                left_out.append(f"{name} (no fold tests two of its values)")
                continue
            tables.append(_measure(study, name, blocks[name], places, windows, self.alpha, number))
        if not tables:
            raise DataError(
                "no fold tests two values of any attribute; use a split with more test images per fold."
            )
        table = _correct(pd.concat(tables, ignore_index=True), self.alpha, bool(windows))
        return _report(study, table, windows, left_out, self, over)

    def _list_places(self, study: Study, over: str) -> list[Place]:
        if over == "time":
            windows = make_sliding_windows(study.responses, self.width, self.step, self.tmin, self.tmax)
            check_windows(windows)
            return [
                Place(f"{w.centre * 1000:.0f} ms", partial(cut_window, window=w), window=w) for w in windows
            ]
        self.refuse_unused("width", "step", "tmin", "tmax", because=f"over {over} looks at no windows")
        if over == "rois":
            groups: dict[str, Any] = dict(list_rois(study.responses, self.sets))
        elif over == "sensors":
            assigned = np.array(assign_regions(study.responses))
            groups = {name: assigned == name for name in REGIONS if (assigned == name).any()}
        else:
            groups = {}
        parts = [Place(name, partial(keep_features, keep=features)) for name, features in groups.items()]
        return [*parts, Place(WHOLE, None)]

    def _decide(
        self, study: Study, asked: DecodableAttributes, places: Sequence[Place]
    ) -> dict[str, list[RunDecisions]]:
        """Fit a ridge per fold and place, and rank the decisions on held-out items of each subject."""
        from scipy.stats import rankdata

        ridge = RidgeConfig(alphas=self.alphas)
        own = replace(
            study,
            banks=asked.banks,
            build=lambda number: ridge.build(seed=derive_seed(study.seed, "attributes", number)),
            fit_seconds=None,
        )
        blocks: dict[str, list[RunDecisions]] = {name: [] for name in asked.table.names}
        with study.progress("attributes", len(study.folds) * len(places)) as advance:
            for number, fold in enumerate(study.folds):
                train, test = study.pick(fold.train, "train"), study.pick(fold.test, "test")
                decisions = []
                for place in places:
                    altered = test if place.change is None else place.change(test)
                    taught = train if place.change is None else place.change(train)
                    encoder = complete_encoder(fit_picked(own, number, taught, place.change))
                    decisions.append(encoder.predict(altered).vectors.T)  # values of all attributes, trials
                    advance(1)
                whole = np.stack(decisions, axis=1)  # values, places, trials
                subjects = test.trials["subject"].astype(str).to_numpy()
                for name in asked.table.names:
                    codes, items = asked.label(name, test.stimulus_ids.astype(str))
                    for subject in np.unique(subjects):
                        rows = np.flatnonzero((subjects == subject) & (codes >= 0))
                        found, place_of = np.unique(items[rows], return_inverse=True)
                        truth = np.zeros(len(found), int)
                        truth[place_of] = codes[rows]
                        if len(np.unique(truth)) < 2:
                            continue
                        mean = _average_items(whole[asked.columns[name]][..., rows], place_of, len(found))
                        blocks[name].append(RunDecisions(subject, truth, rankdata(mean, axis=-1)))
        return blocks


@dataclass(frozen=True)
class Place:
    """What is decoded from: a window of time, a region, or (without a change) the whole trial."""

    name: str
    change: Change | None
    window: Window | None = None


@dataclass(frozen=True)
class DecodableAttributes:
    """The attributes that can be decoded.

    Parameters
    ----------
    table
        With these attributes.
    banks
        Of each fold, centred indicators of all values of every stimulus.
    columns
        Which of them belong to an attribute.
    kept
        Codes of the values that every fold trains on.
    row_of, codes, concepts
        Row of each stimulus, and codes (n_stimuli, n_attributes) and concepts by row.
    shared
        Attributes whose value is one for all images of a concept.
    """

    table: AttributeTable
    banks: list[Embeddings]
    columns: dict[str, slice]
    kept: dict[str, np.ndarray]
    row_of: dict[str, int]
    codes: np.ndarray
    concepts: np.ndarray
    shared: frozenset[str]

    def label(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each image's value among those that are trained on, -1 for others, and its item."""
        rows = np.array([self.row_of[one] for one in ids])
        codes = self.codes[rows, self.table.names.index(name)]
        kept = self.kept[name]
        numbers = np.where(np.isin(codes, kept), np.searchsorted(kept, codes), -1)
        return numbers, (self.concepts[rows] if name in self.shared else ids)


def find_decodable(
    study: Study, table: AttributeTable, *, strict: bool
) -> tuple[DecodableAttributes, list[str]]:
    """Return what can be decoded, and which attributes cannot, with the reason in brackets.

    Parameters
    ----------
    study
        Trials and folds.
    table
        Attributes.
    strict
        Whether an attribute that cannot be decoded is an error, since it was named.

    Raises
    ------
    DataError
        If training images have no row, or no attribute is left.
    """
    stimuli = study.stimuli
    ids, concepts = stimuli.ids.astype(str), stimuli.concepts_of(stimuli.ids).astype(str)
    codes = table.codes_of(ids.tolist(), concepts.tolist())
    trained = [stimuli.find_rows(pd.unique(study.responses.stimulus_ids[fold.train])) for fold in study.folds]
    every = np.unique(np.concatenate(trained))
    if missing := table.describe_missing(
        ids[every].tolist(), concepts[every].tolist(), what="the attributes"
    ):
        raise DataError(missing)
    kept: dict[str, np.ndarray] = {}
    left_out = []
    for position, name in enumerate(table.names):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Notice)  # the summary says it once, and not fold by fold
                values = [
                    set(find_trained_values(table, position, codes[rows, position]).tolist())
                    for rows in trained
                ]
        except DataError:
            if strict:
                raise
            left_out.append(f"{name} (one value among training images)")
            continue
        shared = sorted(set.intersection(*values))
        if len(shared) < 2:
            left_out.append(f"{name} (folds train on other values)")
            continue
        kept[name] = np.array(shared)
        if n_rare := len(set(codes[every, position].tolist()) - {-1, *shared}):
            left_out.append(f"{n_rare} value(s) of {name} that too few training images show")
    if not kept:
        raise DataError(
            f"no attribute of the table ({', '.join(table.names)}) has two values that training images "
            "show; use a table whose attributes vary."
        )
    table = table.choose(list(kept))
    codes = table.codes_of(ids.tolist(), concepts.tolist())
    ends = np.cumsum([0, *[len(own) for own in kept.values()]])
    columns = {name: slice(int(a), int(b)) for name, a, b in zip(kept, ends, ends[1:], strict=False)}
    banks = [_make_indicators(study, table, codes, kept, columns, rows) for rows in trained]
    known = pd.DataFrame(codes).assign(concept=concepts)
    fixed = frozenset(
        name
        for position, name in enumerate(table.names)
        if (known[known[position] >= 0].groupby("concept")[position].nunique() <= 1).all()
    )
    row_of = {name: row for row, name in enumerate(ids.tolist())}
    return DecodableAttributes(table, banks, columns, kept, row_of, codes, concepts, fixed), left_out


def _make_indicators(
    study: Study,
    table: AttributeTable,
    codes: np.ndarray,
    kept: dict[str, np.ndarray],
    columns: dict[str, slice],
    rows: np.ndarray,
) -> Embeddings:
    """Return indicators of all values of every stimulus; an unknown value is the mean of the training images."""
    vectors = np.zeros((len(codes), sum(map(len, kept.values()))), np.float32)
    for position, name in enumerate(table.names):
        own = (codes[:, position, None] == kept[name]).astype(np.float32)
        known = np.isin(codes[:, position], kept[name])
        mean = own[rows][known[rows]].mean(axis=0)
        vectors[:, columns[name]] = np.where(known[:, None], own - mean, 0.0)
    return Embeddings(vectors, study.stimuli.ids, "attributes")


def _choose_places(study: Study) -> str:
    if study.has_time:
        return "time"
    try:
        list_rois(study.responses, None)
    except DataError:
        return "whole"
    return "rois"


def _average_items(decisions: np.ndarray, item: np.ndarray, n_items: int) -> np.ndarray:
    """Return the mean decision on each item, from (n_values, n_places, n_rows) to (n_values, n_places, n_items)."""
    sums = np.zeros((n_items, *decisions.shape[:2]))
    np.add.at(sums, item, np.moveaxis(decisions, -1, 0))
    return np.moveaxis(sums / np.bincount(item, minlength=n_items)[:, None, None], 0, -1)


def _measure(
    study: Study,
    name: str,
    blocks: Sequence[RunDecisions],
    places: Sequence[Place],
    windows: Sequence[Window],
    alpha: float,
    number: int,
) -> pd.DataFrame:
    """Return the rows of one attribute."""
    subjects = np.array([block.subject for block in blocks], dtype=object)
    areas = np.stack([block.areas for block in blocks])  # blocks, places
    curve, means = average_subjects(areas, subjects), average_by_subject(areas, subjects)
    parts = []
    for block in blocks:
        # One seed for all subjects: who saw the same images has the same ones exchanged.
        generator = make_generator(study.seed, "attributes exchanged", number)
        labels = permute_within(block.truth, [np.arange(len(block.truth))], study.n_permutations, generator)
        parts.append(block.measure(labels))
    null = widen_areas(average_subjects(np.stack(parts), subjects), study)  # permutations, places
    draws = bootstrap_areas(blocks, study)
    low, high, words = bound_areas(means, draws, "images of a value", study)
    p_values = compute_p_value(curve, null)
    n = sum(len(block.truth) for block in blocks)
    rows = [
        {
            "value": float(curve[k]), "ci_low": float(low[k]), "ci_high": float(high[k]), "chance": 0.5, "n": n,
            "p_value": float(p_values[k]), "resampled": words,
        }
        for k in range(len(places))
    ]  # fmt: skip
    if not windows:
        table = pd.DataFrame(rows)
        table.insert(0, "place", [place.name for place in places])
    else:
        test = (
            cluster_over_subjects(
                means, 0.5, seed=study.seed, n_permutations=study.n_permutations, alpha=alpha
            )
            if len(means) >= MIN_SUBJECTS
            else cluster_over_labels(curve, null, alpha=alpha)
        )
        table = finish_curve(windows, rows, test, draws).table
        table["p_attribute"] = min(test.p_values, default=1.0)
        centres = np.array([window.centre for window in windows])
        for word, find in (("peak", find_peaks), ("rise", find_rises)):
            at = centres[find(curve[None])[0]]
            low_at, high_at = np.quantile(centres[find(draws)], [0.025, 0.975])
            table[word], table[f"{word}_low"], table[f"{word}_high"] = (
                float(at),
                float(low_at),
                float(high_at),
            )
    table.insert(0, "attribute", name)
    return table


def find_rises(curves: np.ndarray) -> np.ndarray:
    """Return where each curve first stays above half of the way from chance (0.5) to its peak for two windows.

    Parameters
    ----------
    curves : array of shape (n_curves, n_windows)

    Returns
    -------
    int array of shape (n_curves,)
        The first of the two windows, or that of the peak where no two follow each other.

    Examples
    --------
    >>> find_rises(np.array([[0.5, 0.7, 0.5, 0.65, 0.8, 0.6]])).tolist()
    [3]
    """
    peaks = curves.argmax(axis=1)
    above = curves >= 0.5 + (curves.max(axis=1, keepdims=True) - 0.5) / 2
    lasting = above[:, :-1] & above[:, 1:]  # a single window above is often noise before the onset
    found: np.ndarray = np.where(lasting.any(axis=1), lasting.argmax(axis=1), peaks)
    return found


def find_peaks(curves: np.ndarray) -> np.ndarray:
    """Return the best window of each curve, shape (n_curves,)."""
    found: np.ndarray = curves.argmax(axis=1)
    return found


def _correct(table: pd.DataFrame, alpha: float, over_time: bool) -> pd.DataFrame:
    """Add p-values corrected for all attributes, and what is significant by them."""
    table["p_fdr"] = correct_fdr(table["p_value"].to_numpy(float))
    if not over_time:
        table["p_holm"] = correct_holm(table["p_value"].to_numpy(float))
        table["significant"] = table["p_holm"] <= alpha
        return table
    first = table.groupby("attribute", sort=False)["p_attribute"].first()
    holm = dict(zip(first.index, correct_holm(first.to_numpy(float)), strict=True))
    table["p_holm"] = table["attribute"].map(holm)
    told = table["p_holm"] <= alpha
    table["significant"] &= told
    # Of an attribute that is not told from chance, no time can be named.
    latencies = [f"{word}{end}" for word in ("onset", "peak", "rise") for end in ("", "_low", "_high")]
    table.loc[~told, latencies] = np.nan
    return table.drop(columns="p_attribute")


def _report(
    study: Study, table: pd.DataFrame, windows: Sequence[Window], left_out: Sequence[str], config: AttributesConfig,
    over: str,
) -> Findings:  # fmt: skip
    order = (
        table.groupby("attribute", sort=False)["rise"].first().sort_values(na_position="last").index
        if windows
        else table.groupby("attribute", sort=False)["value"].max().sort_values(ascending=False).index
    )
    names = [str(name) for name in order]
    own = {name: table[table["attribute"] == name] for name in names}
    values = np.stack([own[name]["value"].to_numpy(float) for name in names])
    labels = [f"{w.centre * 1000:z.0f}" for w in windows] or own[names[0]]["place"].tolist()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        draw_matrix(figure, axes, values, label="area under the ROC curve", limits=(0.5, None))
        shown = list(range(0, len(labels), max(1, len(labels) // 10) if windows else 1))
        axes.set_xticks(shown, [labels[k] for k in shown], rotation=0 if windows else 60)
        axes.set_yticks(range(len(names)), names)
        for row, name in enumerate(names):
            marked = np.flatnonzero(own[name]["significant"].to_numpy(bool))
            axes.plot(marked, np.full(len(marked), row), ".", color="C4", ms=3)
        if windows:
            axes.set_xlabel("middle of the window (ms)")

    told = [name for name in names if bool(own[name]["significant"].any())]
    words = [_describe(own[name], bool(windows)) for name in told]
    found = (
        f"Decoded above chance: {'; '.join(words)}." if words else "No attribute was decoded above chance."
    )
    if windows and len(told) > 1:
        found += f" In the order of their rise: {', '.join(told)}."
    if rest := [name for name in names if name not in told]:
        found += f" Not different from chance: {', '.join(rest)}."
    if left_out:
        found += f" Left out: {', '.join(left_out)}."
    how = {
        "time": f"A ridge predicted the values of {len(names)} attributes in {len(windows)} windows of "
        f"{config.width * 1000:.0f} ms; clusters over time, p-values by Holm over attributes.",
        "whole": f"A ridge predicted the values of {len(names)} attributes from whole trials; p-values by Holm.",
    }.get(
        over,
        f"A ridge predicted the values of {len(names)} attributes from each region and from the whole trial; "
        "p-values by Holm over all of them.",
    )
    caption = (
        "Area under the ROC curve of each attribute, the mean over its values, each against the rest "
        "(chance 0.5). Dots mark significant results after correction for all attributes."
    )
    plots = [Plot("attributes", caption, found, draw, (7.4, 1.8 + 0.34 * len(names)))]
    if windows and told:
        plots.append(_plot_latencies(own, told, found))
    scores = [_make_score(study, own[name], name, len(labels), bool(windows)) for name in names]
    return Findings("Attributes", f"{how} {found}", table, tuple(plots), tuple(scores))


def _plot_latencies(own: dict[str, pd.DataFrame], told: Sequence[str], found: str) -> Plot:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mark_stimulus(axes)
        for shift, colour, word in ((-0.15, "C0", "rise"), (0.15, "C1", "peak")):
            for row, name in enumerate(told):
                first = own[name].iloc[0]
                axes.hlines(
                    row + shift, first[f"{word}_low"] * 1000, first[f"{word}_high"] * 1000, color=colour, lw=1
                )
                axes.plot(
                    first[word] * 1000, row + shift, "o", color=colour, label=word if row == 0 else None
                )
        axes.set_yticks(range(len(told)), list(told))
        axes.set_ylim(len(told) - 0.5, -0.5)
        axes.set_xlabel("middle of the window (ms)")
        axes.legend(loc="best")

    caption = (
        "When each attribute is half as decodable as at its peak (rise), and its peak, with 95 % intervals."
    )
    return Plot("attribute_times", caption, found, draw, (7.0, 1.6 + 0.34 * len(told)))


def _describe(own: pd.DataFrame, over_time: bool) -> str:
    best, name = find_best(own), own["attribute"].iloc[0]
    area = f"{best['value']:.3f} ({describe_limits(best, what='')})"
    if not over_time:
        return f"{name} best in {best['place']}: {area}"
    times = [
        f"{word} {best[word] * 1000:z.0f} ms ({best[f'{word}_low'] * 1000:z.0f} to {best[f'{word}_high'] * 1000:z.0f})"
        for word in ("onset", "rise", "peak")
        if np.isfinite(best[word])
    ]
    return f"{name} {area}, {', '.join(times)}, {format_p_value(best['p_holm'], in_words=True)}"


def _make_score(study: Study, own: pd.DataFrame, name: str, n_places: int, over_time: bool) -> Score:
    whole = own if over_time else own[own["place"] == WHOLE]
    best = find_best(whole)
    how = f"; best of {n_places} windows, chosen on test trials" if over_time else ""
    return Score(
        method="decoded", metric=f"auc@{name}{'_peak' if over_time else ''}", value=float(best["value"]),
        chance=0.5, n_queries=int(best["n"]), protocol=f"{study.protocol_of_refits}{how}", subject="all", split="test",
        seed=study.seed, p_value=float(best["p_holm"]), **pick_limits(best),
    )  # fmt: skip
