"""The result of `score`: a table, its inputs, warnings, its page and its folder.

::

    OUT/
      scores.json        kind, protocol, warnings, hubs and every row of the table
      scores.csv         the same rows
      items.csv          one row per test item
      score.html         the page
      score_images/      images in full size, where they are larger than on the page
      provenance.json    what was asked, the fingerprint of the scores, versions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import SCORE_KEYS, Score
from braindecode_vis.base.checks import ConfigError, for_python
from braindecode_vis.base.stimuli import ImageRows
from braindecode_vis.parts.studies.output_files import Given
from braindecode_vis.pipeline.prediction_files import check_out, publish_folder
from braindecode_vis.report.gallery import GalleryContent, arrange_rows
from braindecode_vis.report.page import ExtraSection, RankContent, ReportContent, write_report
from braindecode_vis.scoring.retrieval import Retrieval
from braindecode_vis.scoring.score_row import POOLED, describe_resampled, format_p_value

Selection = Literal["not stated", "fixed", "validation", "test"]
SELECTIONS = {
    "not stated": "not stated: outputs do not show whether model, epoch or settings were chosen on these test items",
    "fixed": "nothing was chosen (stated by the authors of the outputs)",
    "validation": "chosen on validation items (stated by the authors of the outputs)",
    "test": "chosen on these same test items (stated): the numbers are too high, since they are the best of several",
}
KIND = "score"
_NAMES = ("scores.json", "scores.csv", "items.csv", "score.html", "score_images", store.PROVENANCE)
_TIES = "equal candidates share their mean rank (k-way, ranks) and count as not found in top-k"


@for_python
@dataclass
class ScoredOutputs:
    """Scores of somebody's outputs, made by `score`.

    Parameters
    ----------
    kind
        ``embeddings``, ``similarity``, ``classes`` or ``images``.
    scores
        One row per metric, method and subject: value, interval and what it resampled, chance, p, n, gallery, protocol.
    items
        One row per test item with its own values, and the first choice of a retrieval.
    protocol
        What was compared, in one line; part of every row.
    warnings
        What no reader of the numbers may miss, signs of transductive decisions first.
    notes
        How rows were matched and images prepared.
    transductive
        Whether the outputs bear a sign of decisions or statistics over all test items.
    hubs
        How unevenly the gallery is chosen; empty if nothing was ranked.
    about
        What was read: names, numbers of rows, the rule for ties, the selection.
    ranked, images
        For figures: ranks, and seen and decoded images.
    """

    kind: str
    scores: pd.DataFrame
    items: pd.DataFrame
    protocol: str
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    transductive: bool = False
    hubs: pd.DataFrame = field(default_factory=pd.DataFrame)
    about: Mapping[str, Any] = field(default_factory=dict)
    ranked: Retrieval | None = None
    images: Mapping[str, ImageRows] = field(default_factory=dict)

    def list_rows(self) -> list[dict[str, Any]]:
        """Return the score rows as JSON and the report take them, None for what is not known."""
        plain = self.scores.astype(object).where(self.scores.notna(), None)
        return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]

    def get(self, metric: str, *, subject: str | None = None, method: str = "decoded") -> pd.Series:
        """Return the row of a metric.

        Parameters
        ----------
        metric
            For example ``top1`` or ``pixcorr``.
        subject
            One of several; by default the only one, or all together.
        method
            ``decoded`` or ``shuffled``.

        Raises
        ------
        ConfigError
            If there is no such row, or several.
        """
        table = self.scores
        found = table[(table["metric"] == metric) & (table["method"] == method)]
        if subject is not None or len(found) > 1:
            found = found[found["subject"] == (subject or POOLED)]
        if len(found) != 1:
            known = ", ".join(pd.unique(table["metric"]))
            raise ConfigError(f"{len(found)} rows are scores {metric!r} of {method!r}; metrics are {known}.")
        return found.iloc[0]

    def as_json(self) -> dict[str, Any]:
        """Return the table and what belongs to it, as JSON takes it."""
        return {
            "kind": self.kind, "protocol": self.protocol, "transductive": self.transductive,
            "warnings": list(self.warnings), "notes": list(self.notes), "about": dict(self.about),
            "hubs": self.hubs.to_dict("records"), "scores": self.list_rows(),
        }  # fmt: skip

    def describe(self) -> list[str]:
        """Return warnings, notes, selection and the rule for ties, a line each."""
        lines = [f"warning: {text}" for text in self.warnings]
        lines += self.notes
        lines += [f"{key}: {self.about[key]}" for key in ("Selection", "Ties") if key in self.about]
        if len(self.hubs):
            value = dict(zip(self.hubs["quantity"], self.hubs["value"], strict=True))
            skew, share = (
                next(k for k in value if k.startswith(start)) for start in ("hubness", "largest_share")
            )
            lines.append(
                f"Hubs: skewness {value[skew]:.2f}; {value['hub']} is near to {value[share]:.1%} of the predictions; "
                f"{value['distinct_first']} different images come first."
            )
        return lines

    def report(self, path: str | Path) -> Path:
        """Write the page as one HTML file and return its path."""
        return write_page(self, Path(path))

    def save(self, out: str | Path) -> Path:
        """Write scores (JSON and CSV), items, page and provenance into a folder, and return its path."""
        return write_scored(self, Path(out))

    def __repr__(self) -> str:
        return f"<ScoredOutputs of {self.kind}: {self.protocol}>"

    def _repr_html_(self) -> str:
        rows = self.scores[self.scores["method"] == "decoded"]
        shown = rows[["metric", "value", "ci_low", "ci_high", "chance", "p_value", "n_queries"]]
        told = "".join(f"<p>{text}</p>" for text in (*self.warnings, describe_resampled(self.list_rows())))
        formats = {"p_value": format_p_value}
        return f"{shown.to_html(index=False, float_format='{:.3f}'.format, formatters=formats)}{told}"


def tabulate_scores(scores: Sequence[Score]) -> pd.DataFrame:
    """Return scores as a table, one row for each."""
    return pd.DataFrame([one.as_row() for one in scores], columns=list(SCORE_KEYS))


def list_warnings(found: Sequence[str], selection: Selection, further: Sequence[str] = ()) -> tuple[str, ...]:
    """Return what no reader of the scores may miss: signs of joint decisions, the selection, and further ones."""
    told = [f"Transductive: {sign}. Do not compare these numbers with others." for sign in found]
    if selection == "test":
        told.append("The model was chosen on these same test items, so its numbers are too high.")
    return (*told, *further)


def describe_inputs(
    kind: str, given: Given, true: Given | None, selection: Selection, seed: int
) -> dict[str, Any]:
    """Return what was read and how it was scored, in words, for `ScoredOutputs.about`."""
    return {
        "Kind": kind,
        "Predictions": given.name,
        "Targets": "the columns of the matrix, in the order of its rows" if true is None else true.name,
        "Selection": SELECTIONS[selection],
        **({"Ties": _TIES} if kind in ("embeddings", "similarity") else {}),
        "Seed": seed,
    }


def check_folder(out: Path) -> Path:
    """Return the folder, or raise `DataError` if it holds anything but scores of outputs."""
    return check_out(out, kind=KIND, names=_NAMES)


def write_scored(found: ScoredOutputs, out: Path) -> Path:
    """Write a result into a folder and return its path; readers see all of it or nothing."""
    rows = found.list_rows()
    record: dict[str, Any] = {
        "kind": KIND,
        "fingerprint": store.hash_json(store.json_plain([rows, found.protocol])),
        **store.collect_provenance(),
        "about": dict(found.about),
    }
    path = check_out(out, record["fingerprint"], kind=KIND, names=_NAMES)
    with publish_folder(path) as temporary:
        store.write_json(temporary / "scores.json", store.json_plain(found.as_json()))
        found.scores.to_csv(temporary / "scores.csv", index=False)
        found.items.to_csv(temporary / "items.csv", index=False)
        write_page(found, temporary / "score.html", record)
        store.write_json(temporary / store.PROVENANCE, record)
    return path


def write_page(found: ScoredOutputs, path: Path, record: dict[str, Any] | None = None) -> Path:
    """Write the page of a result and return its path."""
    provenance = {**store.collect_provenance(), "about": dict(found.about)} if record is None else record
    sections, ranks = [], None
    if found.ranked is not None:
        ranked = found.ranked
        ranks = RankContent(ranked.ranks, ranked.gallery_size, f"Gallery of {ranked.gallery_size}, as given.")
        hubs = found.hubs.assign(value=[v if isinstance(v, str) else f"{v:.4g}" for v in found.hubs["value"]])
        sections.append(
            ExtraSection(
                "Hubs", "How evenly gallery items are chosen; hubs and few first choices can explain "
                    "scores without information from the brain.", table=hubs,
            )
        )  # fmt: skip
    shown = [c for c in found.items if found.items[c].nunique() > 1]
    sections.append(
        ExtraSection("Items", "One row per test item.", table=found.items[shown or list(found.items)])
    )
    content = ReportContent(
        title="Scores of given outputs",
        dataset=str(found.about["Predictions"]),
        description=" ".join(
            ["Outputs of another system were scored without changes; nothing was fitted.", *found.notes]
        ),
        protocol={"Protocol": found.protocol, **{k: str(v) for k, v in found.about.items()}},
        facts=[
            ("Rows", len(found.items)),
            ("Transductive", "yes" if found.transductive else "no sign of it"),
        ],
        scores=found.list_rows(),
        ranks=ranks,
        gallery=_show_images(found) if found.images else None,
        sections=sections,
        warnings=found.warnings,
        provenance=provenance,
        command=provenance["command"],
    )
    return write_report(path, content)


def _show_images(found: ScoredOutputs) -> GalleryContent:
    items = found.items
    rows = {name: stack for name, stack in found.images.items() if name != "seen"}
    return GalleryContent(
        ids=items["stimulus_id"].astype(str).tolist(),
        concepts=items["concept"].astype(str).tolist(),
        seen=found.images["seen"],
        rows=arrange_rows(rows),
        score=items["pixcorr"].to_numpy(),
        metric="pixcorr",
        metrics={str(name): items[name].to_numpy() for name in items if items[name].dtype.kind == "f"},
    )
