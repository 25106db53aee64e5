"""The settings of many runs with their scores: pooled over subjects and seeds, and the setting chosen by validation.

Owns which runs repeat one setting, what an interval over them resamples, and where a run's validation score comes
from: held-out training concepts of a network, or the inner folds of a linear fit. Test scores choose nothing here.
Knows no page and no file of a sweep.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.encoders.parcels_config import OWN_PRETRAINING
from braindecode_vis.report.board_page import PooledSetting, SettingsTable, Validation
from braindecode_vis.scoring.crossed import (
    NO_INTERVAL,
    CrossedInterval,
    crossed_interval,
    groups_interval,
    tabulate_cells,
    widen_interval,
)
from braindecode_vis.scoring.metrics.metric_registry import find_metric
from braindecode_vis.scoring.uncertainty import WIDENED
from braindecode_vis.scoring.units import Units

MAX_SETTINGS = 8  # a table of all that differ between runs of several data sets would hold every setting
_MAX_ENTRIES = 5000
#: Settings that change no result.
_BESIDE_RESULT = ("name", "analyses", "encode", "dataset.root")
#: Those, and what stands in columns of its own.
_BESIDE = (*_BESIDE_RESULT, "dataset.kind", "encoder.kind", "target.kind")
#: Runs that differ in these alone repeat one setting.
REPEATED = ("seed", "dataset.subjects")
#: Galleries of held-out images that differ by more have another chance level.
_SAME_GALLERY = 1.1


@dataclass
class RunSummary:
    """What was read of one run folder; `trouble` says in words what is missing or damaged."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    trouble: str = ""


# --- settings -----------------------------------------------------------------------------------------------------


def list_differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings that differ between runs, by their dotted name; those of most runs first.

    Examples
    --------
    >>> list_differing([{"seed": 0, "encoder": {"epochs": 5}}, {"seed": 1, "encoder": {"epochs": 5}}])
    ['seed']
    """
    flat = [dict(_flatten(_drop_unused(config))) for config in configs if config]
    keys = dict.fromkeys(key for one in flat for key in one)
    differing = {
        key: sum(key in one for one in flat)
        for key in keys
        if key not in _BESIDE
        and not key.endswith(".device")
        and len({json.dumps(one.get(key)) for one in flat}) > 1
    }
    # Settings of one component alone, which other runs do not have, say less than one that all of them have.
    return sorted(differing, key=lambda key: -differing[key])[:MAX_SETTINGS]


def _drop_unused(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration without its section ``pretrain`` where no encoder starts from it."""
    keys = ("encoder", "reconstruction.low_level.encoder", "reconstruction.text.encoder")
    if any(look_up(config, f"{key}.network.pretrained") == OWN_PRETRAINING for key in keys):
        return config
    return {key: value for key, value in config.items() if key != "pretrain"}


def _flatten(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with plain values; lists become text."""
    waiting: list[tuple[str, Any]] = [("", config)]
    for _ in range(_MAX_ENTRIES):
        if not waiting:
            return
        key, value = waiting.pop(0)
        if isinstance(value, Mapping):
            waiting += [(f"{key}.{name}".lstrip("."), below) for name, below in value.items()]
        else:
            yield key, _make_plain(value)


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key as a number, a text or None."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return _make_plain(value)


def _make_plain(value: Any) -> Any:
    """Return a number, a text or None; a list of one is that one, so that a swept penalty is a number."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or isinstance(value, str) or is_finite(value):
        return value
    # Shortened while it is written: a file of a hundred lines can name the same list a billion times.
    return reprlib.repr(value)[:80]


def is_finite(value: Any) -> bool:
    """Return whether a value is a number that floats can hold; whole numbers of files have any length."""
    return isinstance(value, int | float) and -1e300 < value < 1e300


def _digest_setting(config: Mapping[str, Any], beside: Sequence[str]) -> str:
    """Return a digest of all settings that change a result, but for some dotted ones."""
    known: dict[int, str] = {}

    def digest(value: Any, key: str) -> str:
        if not isinstance(value, dict | list):
            return repr(value)
        if id(value) not in known:  # once for each object: an alias of YAML may stand in a billion places
            known[id(value)] = "itself"
            entries = (
                [f"{k}: {digest(v, f'{key}.{k}'.lstrip('.'))}" for k, v in value.items()
                 if k != "device" and f"{key}.{k}".lstrip(".") not in beside]
                if isinstance(value, dict) else [digest(entry, f"{key}[]") for entry in value]
            )  # fmt: skip
            known[id(value)] = hashlib.sha256("\n".join(entries).encode()).hexdigest()
        return known[id(value)]

    return digest(dict(config), "")


# --- pooling ------------------------------------------------------------------------------------------------------


def tabulate_settings(
    runs: Sequence[RunSummary],
    names: Sequence[str],
    items: Mapping[Path, pd.DataFrame | None],
    metrics: Sequence[str],
) -> SettingsTable:
    """Return one row for each setting of some runs, with intervals over its subjects and seeds.

    Parameters
    ----------
    runs, names
        Runs and what they are called; those that are unfinished or damaged are left out.
    items
        Of each run folder what `compare.tabulate_items` gives; None if nothing is stored.
    metrics
        Those of the columns.
    """
    finished = [(run, name) for run, name in zip(runs, names, strict=True) if run.scores and not run.trouble]
    groups = _group_runs([run for run, _ in finished])
    keys = [key for key in list_differing([run.config for run, _ in finished]) if key not in REPEATED]
    kinds = [key for key in _BESIDE if key.endswith(".kind")]
    keys = [key for key in kinds if len({look_up(run.config, key) for run, _ in finished}) > 1] + keys
    if any("dataset.subjects" in beside for _, beside in groups):
        keys = [*keys, "dataset.subjects"]
    rows, subjects = [], []
    for places, _ in groups:
        chosen = [finished[place][0] for place in places]
        subjects.append({subject for run in chosen for subject in _list_subjects(run)})
        found = [read_validation(run.folder, run.config) for run in chosen]
        rows.append(
            PooledSetting(
                {key: look_up(chosen[0].config, key) for key in keys},
                [finished[place][1] for place in places],
                {
                    metric: pooled for metric in metrics
                    if (pooled := _pool(metric, chosen, items)) is not None
                },
                _average_validation(found),
            )
        )  # fmt: skip
    return SettingsTable(keys, rows, *_choose(rows, subjects))


def _group_runs(runs: Sequence[RunSummary]) -> list[tuple[list[int], tuple[str, ...]]]:
    """Return the places of the runs of each setting, with the repeated settings that part them after all."""
    for parting in ((), ("dataset.subjects",)):
        beside = [*_BESIDE_RESULT, *(key for key in REPEATED if key not in parting)]
        groups: dict[str, list[int]] = {}
        for place, run in enumerate(runs):
            groups.setdefault(_digest_setting(_drop_unused(run.config), beside), []).append(place)
        # A subject decoded alone and once more together with others is two settings.
        if all(_is_repeated_once([runs[place] for place in places]) for places in groups.values()):
            break
    return [(places, parting) for places in groups.values()]


def _is_repeated_once(runs: Sequence[RunSummary]) -> bool:
    found = [(look_up(run.config, "seed"), subject) for run in runs for subject in _list_subjects(run)]
    return len(set(found)) == len(found)


def _list_subjects(run: RunSummary) -> list[str]:
    names = dict.fromkeys(str(row["subject"]) for row in run.scores if row["method"] == "decoded")
    return [name for name in names if name != "all"] or list(names)


@dataclass(frozen=True)
class _Cell:
    """The items of one subject in one run (a seed); a single value where only the score is known.

    Parameters
    ----------
    subject, seed
        Of whom, and the number of the seed among those of the subject.
    values : array of shape (n_items,)
    images, units
        Image of each item, and what it is resampled with.
    unit
        What `units` are, in one word.
    """

    subject: str
    seed: int
    values: np.ndarray
    images: list[str]
    units: list[str]
    unit: str


def _pool(
    metric: str, runs: Sequence[RunSummary], items: Mapping[Path, pd.DataFrame | None]
) -> dict[str, Any] | None:
    """Return the mean of a metric over subjects and seeds with its interval; None if no run has it."""
    cells: list[_Cell] = []
    rows: list[dict[str, Any]] = []
    by_item = True
    for run in runs:
        for subject in _list_subjects(run):
            row = next(
                (r for r in run.scores if (r["metric"], r["method"], str(r["subject"]), r["split"])
                 == (metric, "decoded", subject, "test") and r["value"] is not None),
                None,
            )  # fmt: skip
            if row is None:
                continue
            rows.append(row)
            seed = sum(cell.subject == subject for cell in cells)
            found = _pick_items(items.get(run.folder), metric, subject, float(row["value"]), seed)
            by_item &= found is not None
            cells.append(found or _Cell(subject, seed, np.array([float(row["value"])]), [""], [""], "image"))
    if not rows:
        return None
    means: dict[str, list[float]] = {}
    for cell in cells:
        means.setdefault(cell.subject, []).append(float(cell.values.mean()))
    chances = {row["chance"] for row in rows}
    n_units = [len(set(cell.units)) for cell in cells]
    n_seeds = max(map(len, means.values()))
    pooled = {
        "value": float(np.mean([np.mean(found) for found in means.values()])),
        "chance": chances.pop() if len(chances) == 1 else None, "n_subjects": len(means),
        "n_seeds": n_seeds, "n_items": max(n_units) if by_item else None,
    }  # fmt: skip
    if len(rows) == 1:  # one run says it already, and as its report does
        words = str(rows[0].get("resampled") or "") or "what the run resampled"
        return pooled | {"ci_low": rows[0]["ci_low"], "ci_high": rows[0]["ci_high"], "resampled": words}
    hits = by_item and find_metric(metric).metric.counts_hits
    if not by_item:
        interval = _bound_means(means)
    elif _shares_networks(runs, means):
        interval = _bound_cube(cells, proportion=hits)
    else:
        interval = _bound_cells(cells, means, proportion=hits)
    if by_item and any(str(row.get("resampled") or "").endswith(WIDENED) for row in rows):
        values = np.concatenate([cell.values for cell in cells])
        interval = widen_interval(
            interval, (0.0, 1.0) if hits else (float(values.min()), float(values.max()))
        )
    words = interval.resampled
    if interval.low is not None:
        words += _list_lacking(len(means), n_seeds, by_item)
    return pooled | {"ci_low": interval.low, "ci_high": interval.high, "resampled": words}


def _bound_means(means: Mapping[str, Sequence[float]]) -> CrossedInterval:
    """Return Student's t over subjects, or over the seeds of one, where scores of items are not known."""
    if len(means) > 1:
        values, unit = [float(np.mean(found)) for found in means.values()], "subject"
    else:
        values, unit = list(next(iter(means.values()))), "seed"
    return _tell_values(groups_interval(np.array(values), range(len(values)), unit=unit), values)


def _bound_cells(
    cells: Sequence[_Cell], means: Mapping[str, Sequence[float]], *, proportion: bool
) -> CrossedInterval:
    """Return the crossed interval over subjects, seeds averaged, or over the seeds of one subject, and items."""
    several = len(means) > 1
    names = [cell.subject if several else str(cell.seed) for cell in cells for _ in cell.values]
    labels, unit = _find_columns(cells, several=several)
    values = np.concatenate([cell.values for cell in cells])
    table = tabulate_cells(values, names, labels)
    row = "subject" if several else "seed"
    told = [float(np.mean(found)) for found in means.values()] if several else list(*means.values())
    found = _tell_values(crossed_interval(table, proportion=proportion, row=row, column=unit), told)
    n_seeds = sorted({len(of_subject) for of_subject in means.values()})
    if several and n_seeds[-1] > 1 and found.low is not None:
        number = " to ".join(str(n) for n in dict.fromkeys((n_seeds[0], n_seeds[-1])))
        found = replace(found, resampled=f"{found.resampled}; mean of {number} seeds each")
    return found


def _bound_cube(cells: Sequence[_Cell], *, proportion: bool) -> CrossedInterval:
    """Return the crossed interval over subjects, seeds that all subjects share, and items."""
    labels, unit = _find_columns(cells, several=True)
    values = np.concatenate([cell.values for cell in cells])
    pairs = [f"{cell.seed:04d}\x1f{cell.subject}" for cell in cells for _ in cell.values]
    table = tabulate_cells(values, pairs, labels)  # (n_seeds * n_subjects, n_items), sorted by seed
    seeds = {cell.seed for cell in cells}
    if np.isnan(table).any():  # other images for some: no seed stands for one network of all items
        return CrossedInterval(
            float(np.nanmean(table)),
            None,
            None,
            None,
            f"{NO_INTERVAL}: seeds or subjects were tested on other items",
        )
    cube = table.reshape(len(seeds), -1, table.shape[1]).swapaxes(0, 1)
    told = [float(cell.mean()) for cell in cube.swapaxes(0, 1)]
    return _tell_values(crossed_interval(cube, proportion=proportion, column=unit), told)


def _tell_values(found: CrossedInterval, values: Sequence[float]) -> CrossedInterval:
    """Add both values where there are two, which say more than an interval of them would."""
    if found.low is not None or len(values) != 2:
        return found
    return replace(found, resampled=f"{found.resampled} ({values[0]:.3g} and {values[1]:.3g})")


def _find_columns(cells: Sequence[_Cell], *, several: bool) -> tuple[list[str], str]:
    """Return what each item is resampled with: its unit where that holds whole images, else its image."""
    images = [image for cell in cells for image in cell.images]
    units = [unit for cell in cells for unit in cell.units]
    unit = cells[0].unit
    if several and unit != "image":
        known = Units(unit, np.array(units, dtype=object))
        if known.select(np.arange(len(units)), np.array(images, dtype=object)) is None:
            return images, "image"
    return units, unit


def _shares_networks(runs: Sequence[RunSummary], means: Mapping[str, Sequence[float]]) -> bool:
    """Return whether one network of each seed decoded all subjects, so that a lucky one is so for all of them."""
    split = str(look_up(runs[0].config, "split.kind") or "")
    return (
        len(runs) > 1
        and len(means) > 1
        and all(len(found) == len(runs) for found in means.values())
        and split not in ("leave_one_subject_out", "leave_one_run_out")  # a network for each subject
    )


def _pick_items(
    table: pd.DataFrame | None, metric: str, subject: str, value: float, seed: int
) -> _Cell | None:
    """Return one subject's items, if their mean is the score; None otherwise."""
    if table is None or metric not in table:
        return None
    own = table if subject == "all" else table[table["subject"] == subject]
    values = own[metric].to_numpy(float)
    if (
        not len(values)
        or not np.isfinite(values).all()
        or not math.isclose(values.mean(), value, rel_tol=1e-5)
    ):
        return None
    images = own["stimulus_id"].astype(str).tolist()
    units = own["cluster"].astype(str).tolist() if "cluster" in own else images
    return _Cell(subject, seed, values, images, units, str(own["unit"].iloc[0]) if "unit" in own else "image")


def _list_lacking(n_subjects: int, n_seeds: int, by_item: bool) -> str:
    """Return in words what an interval does not speak of."""
    lacking = [
        *(["subjects"] if n_subjects == 1 else []),
        *(["seeds"] if n_seeds == 1 else []),
        *([] if by_item else ["items"]),
    ]
    return f"; not {' or '.join(lacking)}" if lacking else ""


# --- validation ---------------------------------------------------------------------------------------------------


def read_validation(folder: Path, config: Mapping[str, Any]) -> Validation | None:
    """Return the validation score of a run, the mean over its folds; None if it has none.

    Parameters
    ----------
    folder
        Run folder; the records of its fits are taken as they lie.
    config
        Its settings, of which those of the target belong to what an error is measured on.
    """
    try:
        stages = store.read_provenance(folder / store.PROVENANCE)["stages"]
        name = "retrieve" if "retrieve" in stages else "evaluate"
        artifact = folder / "stages" / name / str(stages[name]["fingerprint"])
        fits = [
            str(fingerprint)
            for key, fingerprint in store.read_provenance(artifact / store.PROVENANCE)["upstream"].items()
            if key.startswith("train")
        ]
        found = [_read_fit(folder, fingerprint, config) for fingerprint in fits if fingerprint.isalnum()]
    except (OSError, BraindecodeVisError, KeyError, TypeError, AttributeError, ValueError):
        return None
    return _average_validation(found)


def _read_fit(folder: Path, fingerprint: str, config: Mapping[str, Any]) -> Validation | None:
    for path in sorted((folder / "stages" / "train").glob(f"*{fingerprint}/*.json")):
        if path.name == store.PROVENANCE:
            continue
        record = store.read_json(path)
        if record.get("history"):
            return _read_history(record["history"], config)
        # A single candidate was not validated.
        for name, words in (("mse", "squared error of inner folds"), ("log_loss", "log loss of inner folds")):
            errors = [float(choice[name]) for choice in record.get("choices") or () if name in choice]
            if errors:
                # Squared errors are in units of the target.
                basis = [name, look_up(config, "dataset.kind")]
                basis += [config.get(key) for key in ("target", "split", "repeats")]
                return Validation(words, min(errors), -1, _digest_setting({"basis": basis}, ()))
    return None


def _read_history(history: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Validation | None:
    """Return the accuracy in the epoch whose weights were kept."""
    name = next((key for key in history[-1] if key.startswith("validation_top")), "")
    if not name:
        return None
    rule = config["encoder"].get("selection") or {}
    kept = history[-1]
    if rule.get("kind") == "early_stopping":
        # As `training.loop.get_monitored_score` does, which would load torch for a table.
        by_loss = rule.get("monitor") == "loss"
        kept = max(history, key=lambda one: -one["validation_loss"] if by_loss else one[name])
    return Validation(
        f"{name.removeprefix('validation_')} among held-out training images", float(kept[name]), 1,
        f"{name} of {look_up(config, 'dataset.kind')}", int(kept["n_validation_images"]),
    )  # fmt: skip


def _average_validation(found: Sequence[Validation | None]) -> Validation | None:
    """Return the mean of scores of one basis; None if one is missing or of another."""
    there = [one for one in found if one is not None]
    if not there or len(there) < len(found) or len({one.basis for one in there}) > 1:
        return None
    sizes = [one.n_images for one in there if one.n_images is not None]
    value, size = (
        float(np.mean([one.value for one in there])),
        round(float(np.mean(sizes))) if sizes else None,
    )
    return Validation(there[0].name, value, there[0].direction, there[0].basis, size)


def _choose(rows: Sequence[PooledSetting], subjects: Sequence[set[str]]) -> tuple[int | None, str]:
    """Return the place of the setting with the best validation score, and how or why not in a sentence."""
    if len(rows) < 2:
        return None, ""
    known = [row.validation for row in rows if row.validation is not None]
    if len(known) < len(rows):
        n = len(rows) - len(known)
        return None, (
            f"No setting is called best: {n} of {len(rows)} have no validation score, and test scores "
            "must not be used to choose. A network has one if encoder.selection.hold_out is above 0; a "
            "linear encoder has one if it compares two or more candidates (encoder.alphas) in inner "
            "folds of the training trials."
        )
    if len({one.basis for one in known}) > 1:
        return None, (
            "No setting is called best: their validation scores measure different things "
            f"({', '.join(sorted({one.name for one in known}))}, or the same for different data or "
            "targets), and test scores must not be used to choose. Sweep settings of one encoder, data "
            "set and target to compare them."
        )
    # An easy subject would lift the settings that have it, for example while a sweep is not finished.
    if lacking := [row for row, own in zip(rows, subjects, strict=True) if own != set.union(*subjects)]:
        return None, (
            f"No setting is called best: {len(lacking)} of {len(rows)} have runs of only some subjects, "
            "and subjects differ in how well they can be decoded. Finish the missing runs to compare all settings."
        )
    sizes = [one.n_images for one in known if one.n_images is not None]
    if sizes and max(sizes) > _SAME_GALLERY * min(sizes):
        return None, (
            f"No setting is called best: their validation scores come from galleries of {min(sizes)} to {max(sizes)} "
            "images, whose chance levels differ, and test scores must not be used to choose. Give all of "
            "them the same encoder.selection.hold_out."
        )
    scores = [one.direction * one.value for one in known]
    best = int(np.argmax(scores))
    if scores.count(scores[best]) > 1:
        return None, "No setting is called best: several share the best validation score."
    # The best of many is so partly by luck, in validation too; the test was not asked.
    return best, (
        f"Chosen by validation alone: {known[0].name}, mean over subjects, seeds and folds. Test scores are "
        "shown beside it and were not used to choose."
    )


def describe_choice(table: SettingsTable) -> str:
    """Return in words which setting validation chooses, with its score there, or why none is chosen."""
    if table.best is None:
        return table.reason
    row = table.rows[table.best]
    named = ", ".join(f"{key}={value}" for key, value in row.settings.items())
    value = "" if row.validation is None else f" ({row.validation.value:.4g})"
    return f"best on validation: {named}{value}. {table.reason}"


def as_frame(table: SettingsTable) -> pd.DataFrame:
    """Return the table with one row for each setting and metric, as ``settings.csv`` has it."""
    rows = []
    for place, row in enumerate(table.rows):
        validation = row.validation
        for metric, score in row.scores.items():
            rows.append(
                {
                    **row.settings, "metric": metric, "split": "test", **score, "n_runs": len(row.runs),
                    "validation": "" if validation is None else validation.name,
                    "validation_value": None if validation is None else validation.value,
                    "best_on_validation": place == table.best,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
