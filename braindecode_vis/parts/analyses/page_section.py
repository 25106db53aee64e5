"""The sections of the analyses in the report of a run, each with figures, files and a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.pipeline.preparing import name_pretraining, preprocess
from braindecode_vis.pipeline.runs import Run
from braindecode_vis.report.page import Addition, ExtraSection, SectionFigure, SectionFile

#: Kinds that say when the image can be decoded.
_TIME_COURSES = {"sliding_window", "growing_window", "time_resolved_categories", "time_generalization"}


def describe_analyses(run: Run) -> Addition:
    """Return what the finished analyses of a run add to its report."""
    folder = run.folder.path
    found, damaged = find_analyses(folder, describe_question(run))
    kinds = {store.read_json(path / store.PROVENANCE)["fields"]["analysis"]["kind"] for path in found}
    return Addition(
        shows=[path.name for path in found],
        make=lambda: _make_sections(found, folder),
        problems=damaged,
        has_time_course=not kinds.isdisjoint(_TIME_COURSES),
    )


def find_analyses(folder: Path, wanted: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """Return the artifacts of analyses that belong to the present configuration, and what is wrong with damaged ones.

    Of several of a kind the newest is taken; to whom a damaged one belonged is not known.

    Parameters
    ----------
    folder
        The run folder.
    wanted
        Fields that the provenance of an analysis must have: what it was asked of, apart from its own settings.
    """
    found: dict[str, tuple[str, Path]] = {}
    damaged: list[str] = []
    for path in sorted((folder / "stages" / "analyze").glob(f"*/{store.PROVENANCE}")):
        # Names with a dot are being written, perhaps by another process.
        if path.parent.name.startswith("."):
            continue
        if damage := store.find_damage(path.parent):
            damaged.append(
                f"the analysis {path.parent.name} is damaged ({damage}) and is left out of the report; run "
                f"braindecode-vis analyze {folder} again, or remove {path.parent}."
            )
            continue
        record = store.read_json(path)
        fields = {**record["fields"], **record["upstream"]}
        if all(fields.get(key) == value for key, value in wanted.items()):
            # The same kind with other settings is another analysis, and stays on the page.
            key = store.hash_json(record["fields"]["analysis"])
            found[key] = (record["created"], path.parent)
    return [path for _, path in sorted(found.values())], damaged


def describe_question(run: Run) -> dict[str, Any]:
    """Return what an analysis must have been asked of to belong into the report of this run."""
    from braindecode_vis.pipeline.synthetic import hash_settings

    config = run.config
    return store.json_plain(
        {
            "encoder": config.encoder.hashed_fields(),
            "repeats": config.repeats.hashed_fields(),
            "centre": config.retrieval.centre,
            "selection": None if config.selection.is_empty else config.selection.hashed_fields(),
            "text": config.text.hashed_fields() if run.encoder.reads_text else None,
            "synthetic": None if config.synthetic is None else hash_settings(run),
            "seed": config.seed,
            "preprocess": preprocess(run).artifact.fingerprint,
            **name_pretraining(run),
        }
    )


def _make_sections(artifacts: list[Path], folder: Path) -> list[ExtraSection]:
    """Return one section per analysis: its figures, links to its files from the run folder, then its table."""
    sections = []
    for path in artifacts:
        record = store.read_provenance(path / store.PROVENANCE)
        figures = [
            SectionFigure(
                (path / f"{plot['name']}.light.svg").read_text(),
                (path / f"{plot['name']}.dark.svg").read_text(),
                plot["alt"],
                plot["caption"],
            )
            for plot in record["plots"]
        ]
        table = pd.read_parquet(path / "table.parquet")
        files = [
            SectionFile((path / file["name"]).relative_to(folder).as_posix(), file["name"], file["caption"])
            for file in record.get("attachments", ())
        ]
        sections.append(
            ExtraSection(record["title"], record["summary"], figures=figures, files=files, table=table)
        )
    return sections
