"""The page and the folder of scores of somebody's outputs.

::

    OUT/
      scores.json        kind, protocol, warnings, hubs and every row of the table
      scores.csv         the same rows
      items.csv          one row per test item
      score.html         the page
      provenance.json    what was asked, the fingerprint of the scores, versions
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis import store
from braindecode_vis.pipeline.prediction_files import check_out, publish_folder
from braindecode_vis.report.gallery import GalleryContent, arrange_rows
from braindecode_vis.report.page import ExtraSection, RankContent, ReportContent, write_report

if TYPE_CHECKING:
    from braindecode_vis.studies.score_outputs import ScoredOutputs

KIND = "score"
_NAMES = ("scores.json", "scores.csv", "items.csv", "score.html", store.PROVENANCE)


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
                "Hubs", "How evenly the gallery is chosen; hubs and few first choices explain scores that say nothing "
                "of the brain.", table=hubs,
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
            ["Outputs made elsewhere were scored as they are; nothing was fitted.", *found.notes]
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
    rows = {name: np.asarray(stack) for name, stack in found.images.items() if name != "seen"}
    return GalleryContent(
        ids=items["stimulus_id"].astype(str).tolist(),
        concepts=items["concept"].astype(str).tolist(),
        seen=found.images["seen"],
        rows=arrange_rows(rows),
        score=items["pixcorr"].to_numpy(),
        metric="pixcorr",
        metrics={str(name): items[name].to_numpy() for name in items if items[name].dtype.kind == "f"},
    )
