"""One page for many runs: their data, scores and different settings, and paired comparisons with a reference run.

Owns what is read of a run for that: its settings, its scores and differences, the values per item and two pictures of
one item. Nothing is computed again and no recording is opened, so that 200 runs take seconds. The files at the top of a
run folder are compared with their digests; values per item and pictures are taken as they lie (`audit` verifies those).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from braindecode_vis.base import store
from braindecode_vis.base.checks import BraindecodeVisError, DataError, check_option, require
from braindecode_vis.parts.studies.compare import compare_tables, tabulate_items
from braindecode_vis.parts.studies.settings_table import (
    RunSummary,
    as_frame,
    is_finite,
    list_differing,
    look_up,
    tabulate_settings,
)
from braindecode_vis.pipeline.image_files import INDEX, read_image_rows
from braindecode_vis.pipeline.runs import read_scores
from braindecode_vis.report.board_page import Board, BoardRow, SettingsTable, write_board
from braindecode_vis.report.page_scores import find_main_row, judge
from braindecode_vis.report.words import describe_encoder
from braindecode_vis.scoring.metrics.metric_registry import LAST, find_metric

MAX_METRICS = 4
#: Resamples and sign flips of a pair: a page of 200 runs in seconds; `compare` takes more.
N_BOOT = 2000
_LARGEST_CONFIG = 1_000_000  # bytes


def make_board(
    folders: Sequence[Path], out: Path, *, reference: Path | None = None, seed: int = 0
) -> list[BoardRow]:
    """Write ``board.html`` and, beside it, ``experiment.json`` and ``settings.csv`` of all runs below some folders.

    Parameters
    ----------
    folders
        Run folders, or folders that hold some, at any depth.
    out
        The page.
    reference
        Run that the others are compared with in pairs, where they test the same items; without it the first whose
        scores are there.
    seed
        Of resamples and sign flips.

    Returns
    -------
    rows
        One per run, in the order of their paths; a run that is unfinished or damaged says so in `trouble`.

    Raises
    ------
    DataError
        If there is no run below the folders, or the reference is not among them or has no scores.
    """
    paths = find_runs(folders)
    if not paths:
        raise DataError(
            f"there is no run below {', '.join(map(str, folders))}: no folder there holds a config.yaml; give the "
            "folder that run or sweep wrote into."
        )
    runs = [_read_run(path) for path in paths]
    metrics = _choose_metrics(runs)
    base = _find_reference(runs, reference)
    settings = list_differing([run.config for run in runs])
    names = _name_runs(paths)
    items = {path: _read_items(run) for path, run in zip(paths, runs, strict=True)}
    rows = []
    for run, name in zip(runs, names, strict=True):
        report = run.folder / "report.html"
        config = run.config
        rows.append(
            BoardRow(
                name=name,
                path=str(run.folder),
                link=os.path.relpath(report, out.absolute().parent) if report.is_file() else "",
                trouble=run.trouble,
                dataset=str(look_up(config, "dataset.kind") or ""),
                configuration=str(config.get("name", "")),
                encoder=describe_encoder(_as_mapping(config.get("encoder"))),
                target=str(look_up(config, "target.kind") or ""),
                settings={key: look_up(config, key) for key in settings},
                scores=_pick_scores(run, metrics),
                pairs=_compare(run, base, items, metrics, seed),
                images=_read_images(run, items[run.folder]),
            )
        )
    named = "" if base is None else names[runs.index(base)]
    pooled = tabulate_settings(runs, names, items, metrics)
    write_board(out, Board(rows, metrics, settings, reference=named, pooled=pooled))
    store.write_json(out.with_name("experiment.json"), [row.as_json() for row in rows])
    write_settings(out.with_name("settings.csv"), pooled)
    return rows


def pool_runs(folders: Sequence[Path]) -> SettingsTable:
    """Return the settings of some finished runs with intervals over their subjects and seeds; nothing is computed.

    Parameters
    ----------
    folders
        Run folders.
    """
    runs = [_read_run(folder) for folder in folders]
    items = {run.folder: _read_items(run) for run in runs}
    return tabulate_settings(runs, [run.folder.name for run in runs], items, _choose_metrics(runs))


def write_settings(path: Path, table: SettingsTable) -> None:
    """Write the pooled settings as CSV."""
    with store.replace_atomically(path) as temporary:
        as_frame(table).to_csv(temporary, index=False)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the run folders among and below some folders, sorted, each once."""
    found: dict[Path, Path] = {}
    for top in folders:
        if not top.expanduser().is_dir():
            raise DataError(f"{top} is not a folder; give a folder with runs.")
        for here, below, files in os.walk(top.expanduser().absolute()):
            if "config.yaml" in files or "stages" in below:
                if "config.yaml" in files:
                    found.setdefault(Path(here).resolve(), Path(here))
                    below.clear()  # of a run, nothing further down is another one
                else:  # the common store of a sweep
                    below.remove("stages")
            below[:] = sorted(name for name in below if not name.startswith("."))
    return sorted(found.values())


def _read_run(folder: Path) -> RunSummary:
    run = RunSummary(folder)
    try:
        path = folder / "config.yaml"
        if path.stat().st_size > _LARGEST_CONFIG:
            raise DataError("its config.yaml is too large for a configuration")
        # By libyaml where it is there: in plain Python 200 configurations take longer than all the rest.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        if not isinstance(config, dict):
            raise DataError("its config.yaml holds no settings")
        run.config = config
    except PermissionError as error:
        run.trouble = _describe_closed(error)
        return run
    except (OSError, ValueError, RecursionError, yaml.YAMLError, DataError) as error:
        run.trouble = f"damaged: its config.yaml cannot be read ({' '.join(str(error).split())[:200]})"
        return run
    try:
        rows = read_scores(folder)
        run.scores = [row for row in rows if _is_score(row)]
        if len(run.scores) < len(rows):
            run.trouble = "damaged: its scores.json holds rows that are not scores"
        path = folder / "differences.json"
        known = store.read_json(path) if path.is_file() else []  # none of earlier versions
        run.differences = [row for row in known if _holds(row, ("metric", "control"), ("ci_low", "ci_high"))]
    except PermissionError as error:
        run.trouble = _describe_closed(error)
    except (OSError, ValueError, TypeError, BraindecodeVisError) as error:
        run.trouble = f"damaged: {error}"
    if not run.scores and not run.trouble:
        run.trouble = "unfinished: it has no scores yet"
    return run


def _describe_closed(error: PermissionError) -> str:
    """Say which file of a run may not be read; to its owner it is not damaged."""
    return f"closed: permission was denied at {error.filename}"


def _is_score(row: Any) -> bool:
    return _holds(row, ("metric", "method"), ("value", "ci_low", "ci_high", "chance")) and "protocol" in row


def _holds(row: Any, names: Sequence[str], numbers: Sequence[str]) -> bool:
    """Return whether a row of a file has these names and numbers, or null for a number, and says of whom."""
    return (
        isinstance(row, dict)
        and {*names, *numbers, "subject", "split"} <= row.keys()
        and all(isinstance(row[key], str) for key in names)
        and all(row[key] is None or is_finite(row[key]) for key in numbers)
    )


def _choose_metrics(runs: Sequence[RunSummary]) -> list[str]:
    """Return the metrics of the columns: well-known ones of most runs first, and of each run at least one."""
    counts: dict[str, int] = {}
    for run in runs:
        for metric in {row["metric"] for row in run.scores if row["method"] == "decoded"}:
            counts[str(metric)] = counts.get(str(metric), 0) + 1

    def place(metric: str) -> int:
        found = find_metric(metric)
        return LAST if found.n_draws else found.metric.order

    first = sorted(counts, key=lambda metric: (place(metric), -counts[metric], metric))
    chosen = [metric for metric in first if place(metric) < LAST][:MAX_METRICS]
    for run in runs:  # categories have no image to find
        own = {str(row["metric"]) for row in run.scores if row["method"] == "decoded"}
        if own and not own & set(chosen):
            chosen.append(next(metric for metric in first if metric in own))
    return chosen


def _find_reference(runs: Sequence[RunSummary], wanted: Path | None) -> RunSummary | None:
    finished = [run for run in runs if run.scores]
    if wanted is None:
        return finished[0] if len(finished) > 1 else None
    real = wanted.expanduser().resolve()
    for run in runs:
        if run.folder.resolve() == real:
            if not run.scores:
                raise DataError(f"the reference {wanted} is {run.trouble}; finish it, or choose another run.")
            return run
    raise DataError(
        f"the reference {wanted} is not among the runs that were found; give one of their folders."
    )


def _name_runs(paths: Sequence[Path]) -> list[str]:
    """Return the paths below the folder that all runs share."""
    top = paths[0].parent if len(paths) == 1 else Path(os.path.commonpath(paths))
    names = [path.relative_to(top).as_posix() if path != top else path.name for path in paths]
    # Names of other systems may hold bytes that are no text.
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# --- scores -------------------------------------------------------------------------------------------------------


def _pick_scores(run: RunSummary, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the main score of each metric with the verdict of the page; nothing where the run lacks it."""
    found = {}
    for metric in metrics:
        if not any((row["metric"], row["method"]) == (metric, "decoded") for row in run.scores):
            continue
        main, rivals, spread = find_main_row(metric, run.scores)
        verdict = judge(main, rivals, run.differences, find_metric(metric).metric.direction)
        keys = ("value", "ci_low", "ci_high", "chance", "n_queries", "gallery_size", "p_value", "resampled")
        found[metric] = {key: main.get(key) for key in keys} | {
            "subject": main["subject"], "note": spread, "kind": verdict.kind, "verdict": verdict.words
        }  # fmt: skip
    return found


def _read_items(run: RunSummary) -> pd.DataFrame | None:
    """Return the values of test items as they are compared, in the order of `evaluate`; None if none are there."""
    fingerprint = next((str(row.get("fingerprint") or "") for row in run.scores), "")
    path = run.folder / "stages" / "evaluate" / fingerprint / "items.parquet"
    if not fingerprint.isalnum() or not path.is_file():
        return None
    try:
        return tabulate_items(pd.read_parquet(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _compare(
    run: RunSummary,
    base: RunSummary | None,
    items: Mapping[Path, pd.DataFrame | None],
    metrics: Sequence[str],
    seed: int,
) -> dict[str, dict[str, Any]] | str:
    """Return the paired difference to the reference by metric, or in a word why there is none."""
    if base is None or not run.scores:
        return ""
    if run is base:
        return "reference"
    first, other = items[base.folder], items[run.folder]
    if first is None or other is None:
        return "no values per item"
    try:
        rows = compare_tables(
            first, other, names=("the reference", "it"), n_boot=N_BOOT, seed=seed,
            metrics=metrics,
        )  # fmt: skip
    except (BraindecodeVisError, KeyError, ValueError, TypeError):
        return "other test items"
    keys = ("difference", "ci_low", "ci_high", "p_value", "n_items", "resampled")
    return {row["metric"]: {key: row[key] for key in keys} for row in rows}


def _read_images(run: RunSummary, items: pd.DataFrame | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the seen and the decoded image of the item of the highest pixel correlation; None without images."""
    if items is None or "pixcorr" not in items or not len(items):
        return None
    try:
        record = store.read_json(run.folder / store.PROVENANCE)
        stages = {name: str(about["fingerprint"]) for name, about in record["stages"].items()}
        if not stages["reconstruct"].isalnum():
            return None
        folder, rows, stimuli = run.folder / "stages" / "reconstruct" / stages["reconstruct"], None, None
        # The first of equals, so that the choice is the same on every machine.
        best = int(items["pixcorr"].to_numpy(float).argmax())
        if (folder / INDEX).is_file():  # runs of earlier versions kept a copy of what was seen
            if not stages["preprocess"].isalnum():
                return None
            rows = pd.read_parquet(folder / "rows.parquet")
            stimuli = store.read_stimuli(
                run.folder / "stages" / "preprocess" / stages["preprocess"] / "stimuli"
            )
        images, _ = read_image_rows(folder, rows, stimuli, ("seen", "decoded"))
        seen, made = (np.asarray(images[name][best]) for name in ("seen", "decoded"))
        made = made[0] if made.ndim == 4 else made
        right = all(
            image.ndim == 3 and image.shape[-1] == 3 and image.dtype == np.uint8 and image.size
            for image in (seen, made)
        )
        return (np.array(seen), np.array(made)) if right else None
    except (OSError, EOFError, BraindecodeVisError, KeyError, TypeError, ValueError, IndexError):
        return None


def describe_rows(rows: Sequence[BoardRow]) -> pd.DataFrame:
    """Return the table of runs for a terminal: name, what it is, and its first score."""
    table = []
    for row in rows:
        metric, score = next(iter(row.scores.items()), ("", {}))
        value = score.get("value")
        table.append(
            {
                "run": row.name,
                "encoder": row.encoder,
                "metric": metric,
                "value": "" if value is None or not math.isfinite(value) else f"{value:.3f}",
                "verdict": score.get("verdict", "") or row.trouble,
            }
        )
    return pd.DataFrame(table)


def log_board(rows: Sequence[BoardRow], tracker: str, folder: Path) -> Path:
    """Give every finished run with its settings and scores to a tracker, which draws its own parallel coordinates.

    Parameters
    ----------
    rows
        What `make_board` returns.
    tracker
        ``tensorboard`` writes what its HParams tab shows; ``wandb`` sends one run each to the account that is logged
        in, or keeps them where ``WANDB_MODE=offline``.
    folder
        Gets the files, below the name of the tracker; a former table of TensorBoard there is replaced.

    Returns
    -------
    Path
        Where they lie.

    Raises
    ------
    ConfigError
        If the tracker is not known or not installed.
    """
    check_option("--log", tracker, ("tensorboard", "wandb"))
    module, place = require(tracker, f"board --log {tracker}"), folder / tracker
    if tracker == "tensorboard":
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = stack.enter_context(SummaryWriter(str(place)))
        for row in rows:
            scores = {
                metric: float(score["value"])
                for metric, score in row.scores.items()
                if score["value"] is not None
            }
            about = {"data set": row.dataset, "encoder": row.encoder, "target": row.target}
            settings = about | {key: "" if value is None else value for key, value in row.settings.items()}
            if not scores:
                continue
            if tracker == "tensorboard":
                named = {f"score/{metric}": value for metric, value in scores.items()}
                writer.add_hparams(settings, named, run_name=row.name.replace("/", "_"))
            else:
                run = module.init(project="braindecode_vis", dir=str(place), config=settings, name=row.name)
                run.summary.update(scores)
                run.finish()
    return place
