"""Confusions between concepts, or between the categories above them.

Owns the table of seen against decoded classes. With an encoder that predicts embeddings, the decoded class is that of
the most similar test image; with a category decoder, its most probable class. Labels are permuted over images (within
runs for a category decoder, whose trials know no image).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import model_validator

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.checks import ConfigError, DataError, check_file
from braindecode_vis.base.contracts import Analysis
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import hash_file, read_json
from braindecode_vis.encoders.category_decoders import find_first_rows
from braindecode_vis.parts.analyses.measure import (
    check_retrieval,
    compute_interval,
    describe_limits,
    pick_limits,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study, rank_trials
from braindecode_vis.parts.analyses.window_categories import label_trials
from braindecode_vis.preprocessing.splits import make_groups
from braindecode_vis.report.drawing import draw_matrix
from braindecode_vis.scoring.crossed import name_units
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import (
    WIDENED,
    compute_p_value,
    permute_within,
    widen_about,
    widen_limits,
    wilson_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ConfusionConfig(Analysis):
    """Compare seen and decoded classes.

    Parameters
    ----------
    categories
        File that maps each concept to its category: JSON, or CSV with the columns `concept` and `category`.
    column
        Column of the stimulus table that holds the category instead.
    """

    kind: Literal["confusion"] = "confusion"
    categories: Path | None = None
    column: str | None = None

    #: At most this many classes are drawn, those with most trials.
    max_classes: ClassVar[int] = 40
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"max_classes"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"prefix": None}

    not_hashed: ClassVar[frozenset[str]] = frozenset({"categories", "max_classes"})

    @model_validator(mode="after")
    def _check_one_source(self) -> ConfusionConfig:
        if self.categories is not None and self.column is not None:
            raise ValueError("give categories or column, not both")
        return self

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digest of the file of categories."""
        fields = super().hashed_fields()
        if self.categories is not None:
            fields["categories_sha256"] = hash_file(self.categories.expanduser())
        return fields

    def compute(self, study: Study) -> Findings:
        """Decode every test trial and count."""
        decided = decide(study)
        if self.categories or self.column:
            category = self._map_concepts(study, set(decided["seen"]) | set(decided["decoded"]))
            decided = decided.assign(
                seen=decided["seen"].map(category), decoded=decided["decoded"].map(category)
            )
        classes = sorted({*decided["seen"], *decided["decoded"]})
        if len(classes) < 2:
            raise DataError(
                f"all test trials show the class {classes[0]!r}, so there is no confusion to analyse."
            )
        table, overall = tabulate_confusions(study, decided, classes)
        return self._report(study, table, overall, decided)

    def _map_concepts(self, study: Study, concepts: set[str]) -> dict[str, str]:
        if self.column is not None:
            table = study.stimuli.table
            if self.column not in table:
                raise ConfigError(
                    f"the stimulus table has no column {self.column!r}; it has {', '.join(table.columns)}."
                )
            mapping = dict(zip(table["concept"].astype(str), table[self.column].astype(str), strict=True))
        else:
            assert self.categories is not None
            mapping = read_categories(self.categories.expanduser())
        missing = sorted(concepts - set(mapping))
        if missing:
            raise DataError(f"{len(missing)} concept(s) have no category, first {missing[0]!r}.")
        return {c: str(mapping[c]) for c in concepts}

    def _report(
        self, study: Study, table: pd.DataFrame, overall: dict[str, Any], decided: pd.DataFrame
    ) -> Findings:
        shown = decided["seen"].value_counts().head(self.max_classes).index.tolist()
        shown = sorted(shown)
        cells = table[table["decoded"] != "same"]
        # A class that is never decoded has no cell, which is a share of zero.
        grid = cells.pivot(index="seen", columns="decoded", values="value").reindex(
            index=shown, columns=shown, fill_value=0.0
        )

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            draw_matrix(figure, axes, 100 * grid.fillna(0).to_numpy(float), label="% of the seen class")
            axes.set_xticks(range(len(shown)), shown, rotation=90)
            axes.set_yticks(range(len(shown)), shown)
            axes.set_xlabel("decoded")
            axes.set_ylabel("seen")

        wrong = cells[(cells["seen"] != cells["decoded"]) & (cells["value"] > cells["chance"])]
        text = (
            f"{overall['value']:.3f} of {overall['n']} test trials are decoded as their own class "
            f"({describe_limits(overall, what='')}, chance {overall['chance']:.3f}, "
            f"{format_p_value(overall['p_value'], in_words=True)})."
        )
        if len(wrong):
            worst = wrong.iloc[int((wrong["value"] - wrong["chance"]).to_numpy(float).argmax())]
            text += (
                f" The confusion furthest above chance: {worst['seen']} is decoded as {worst['decoded']} in "
                f"{worst['count']} of {worst['n']} trials ({worst['value']:.1%}, chance {worst['chance']:.1%})."
            )
        caption = "Share of the trials of each seen class (rows) that are decoded as each class (columns)."
        side = min(9.0, 2.6 + 0.22 * len(shown))
        plot = Plot("confusion", caption, text, draw, (side + 1.0, side))
        score = Score(
            method="decoded", metric="accuracy@classes", value=overall["value"], chance=overall["chance"],
            n_queries=overall["n"], protocol=study.protocol, subject="all", split="test", seed=study.seed,
            p_value=overall["p_value"], **pick_limits(overall),
        )  # fmt: skip
        return Findings("Confusions", text, table, (plot,), (score,))


def read_categories(path: Path) -> dict[str, str]:
    """Read the category of each concept from JSON or CSV."""
    check_file(path, what="the file of categories", hint="correct the analysis' option categories")
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path} must hold a mapping of concepts to categories.")
        return {str(k): str(v) for k, v in content.items()}
    table = pd.read_csv(path, dtype=str)
    if not {"concept", "category"} <= set(table.columns):
        raise DataError(
            f"{path} must have the columns concept and category; it has {', '.join(table.columns)}."
        )
    return dict(zip(table["concept"], table["category"], strict=True))


def decide(study: Study) -> pd.DataFrame:
    """Return one row per test trial: `id`, `subject`, `seen`, `decoded`, `block`, within which labels permute, and
    `cluster`, with which it is resampled.
    """
    parts = []
    for number, fold in enumerate(study.folds):
        encoder = study.trained(number)
        parts.append(
            _decide_classes(study, encoder, fold.test)
            if not study.banks  # a run that decodes categories has no image embeddings
            else _decide_images(study, number, encoder, fold.test)
        )
    return pd.concat(parts, ignore_index=True)


def _decide_classes(study: Study, decoder: Any, rows: np.ndarray) -> pd.DataFrame:
    responses = label_trials(study).select(rows)
    decoded = np.array(decoder.classes, dtype=object)[decoder.decision(responses).argmax(axis=1)]
    trials = responses.trials
    keep = np.arange(len(trials))
    if study.pools_volumes:
        keep = find_first_rows(trials)  # every volume has the decision of its trial
    runs = make_groups(trials, "run").astype(str)
    return pd.DataFrame(
        {
            "id": [f"{rows[k]}" for k in keep], "subject": trials["subject"].astype(str).to_numpy()[keep],
            "seen": trials["concept"].astype(str).to_numpy()[keep], "decoded": decoded[keep].astype(str),
            "block": runs[keep],
            "cluster": [f"{rows[k]}" for k in keep] if study.label is None else study.label(trials)[keep],
        }
    )  # fmt: skip


def _decide_images(study: Study, number: int, encoder: Any, rows: np.ndarray) -> pd.DataFrame:
    check_retrieval(study, "confusion")
    test = study.pick(rows, "test")
    _, _, retrieval = rank_trials(study, number, test, encoder)
    first = retrieval.gallery_ids[retrieval.top_indices[:, 0]]
    return pd.DataFrame(
        {
            "id": test.stimulus_ids.astype(str), "subject": test.trials["subject"].astype(str).to_numpy(),
            "seen": study.stimuli.concepts_of(test.stimulus_ids).astype(str),
            "decoded": study.stimuli.concepts_of(first).astype(str), "block": f"fold {number}",
            "cluster": study.find_clusters(test).astype(str),
        }
    )  # fmt: skip


def tabulate_confusions(
    study: Study, decided: pd.DataFrame, classes: list[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the share of every cell and of the own class with intervals, and the row of the whole.

    `chance` of a cell is how often its decoded class is named at all; the last rows, `decoded` being ``same``, are the
    recall of each class and the accuracy, with p-values of permuted labels.
    """
    # Rows are seen classes; a class that no test trial shows is a column only.
    seen, decoded = decided["seen"].to_numpy(str), decided["decoded"].to_numpy(str)
    rows: list[dict[str, Any]] = []
    for true in sorted(set(seen.tolist())):
        own = seen == true
        for name in classes:
            hits = own & (decoded == name)
            low, high, resampled = _bound(study, hits[own], decided[own])
            rows.append(
                {
                    "seen": true, "decoded": name, "count": int(hits.sum()), "value": float(hits.sum() / own.sum()),
                    "ci_low": low, "ci_high": high, "chance": float((decoded == name).mean()), "n": int(own.sum()),
                    "p_value": np.nan, "resampled": resampled,
                }
            )  # fmt: skip
    null, recall_null = _permute(study, decided, classes)
    correct = seen == decoded
    for number, name in enumerate(classes):
        own = seen == name
        if own.any():
            rows.append(_make_same(study, name, correct[own], decided[own], recall_null[:, number]))
    overall = _make_same(study, "all", correct, decided, null)
    return pd.DataFrame([*rows, overall]), overall


def _make_same(
    study: Study, name: str, hits: np.ndarray, own: pd.DataFrame, null: np.ndarray
) -> dict[str, Any]:
    low, high, resampled = _bound(study, hits, own)
    value, chance = float(hits.mean()), float(null.mean())
    # Classes were exchanged without refits.
    judged = widen_about(null, chance) if len(study.folds) > 1 else null
    return {
        "seen": name, "decoded": "same", "count": int(hits.sum()), "value": value, "ci_low": low, "ci_high": high,
        "chance": chance, "n": len(hits),
        "p_value": float(compute_p_value(value, judged)), "resampled": resampled,
    }  # fmt: skip


def _bound(study: Study, hits: np.ndarray, own: pd.DataFrame) -> tuple[float, float, str]:
    """Return Wilson's interval where trials of one subject are independent, else the usual; and what it resampled."""
    # Trials of one image or group are not independent, so only single ones may take Wilson's interval.
    n_units = own["cluster"].nunique()
    several = own["subject"].nunique() > 1
    if not several and (n_units == len(own) or n_units < 2):
        # Of a single image or group, whose spread is unknown, the interval is that of its trials.
        unit = study.unit if n_units > 1 else "trial"
        wilson = wilson_interval(int(hits.sum()), len(hits))
        words = f"{name_units(unit, len(hits))} (Wilson)"
        if len(study.folds) < 2:
            return wilson.low, wilson.high, words
        low, high = widen_limits(wilson.low, wilson.high, float(hits.mean()), (0.0, 1.0))
        return float(low), float(high), words + WIDENED
    clusters, subjects = own["cluster"].to_numpy(object), own["subject"].to_numpy(object)
    return compute_interval(
        study, hits.astype(float), clusters, subjects, own["id"].to_numpy(object), shares=True
    )


def _permute(study: Study, decided: pd.DataFrame, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy and recall of each class under permuted labels, (n_permutations,) and (n_permutations,
    n_classes).
    """
    generator = make_generator(study.seed, "permute classes")
    units, first, unit = np.unique(
        (decided["block"] + "\x1f" + decided["id"]).to_numpy(str), return_index=True, return_inverse=True
    )
    code = {name: n for n, name in enumerate(classes)}
    labels = decided["seen"].map(code).to_numpy()[first]  # (n_units,): an image has one class
    decoded = decided["decoded"].map(code).to_numpy()
    blocks = decided["block"].to_numpy()[first]
    # How often each unit was decoded as each class: rows of one image move together.
    counts = np.zeros((len(units), len(classes)))
    np.add.at(counts, (unit, decoded), 1.0)
    size = np.bincount(unit)
    hits = np.zeros((study.n_permutations, len(classes)))
    total = np.zeros_like(hits)
    for block in np.unique(blocks):
        own = np.flatnonzero(blocks == block)
        step = max(1, (1 << 21) // len(own))
        for start in range(0, study.n_permutations, step):
            part = slice(start, min(start + step, study.n_permutations))
            shuffled = permute_within(labels[own], [np.arange(len(own))], part.stop - start, generator)
            found = counts[
                own[None], shuffled
            ]  # (n_step, n_own): rows of a unit decoded as its shuffled label
            for number in range(len(classes)):
                chosen = shuffled == number
                hits[part, number] += (found * chosen).sum(axis=1)
                total[part, number] += (size[own][None] * chosen).sum(axis=1)
    accuracy = hits.sum(axis=1) / size.sum()
    return accuracy, hits / np.maximum(total, 1)
