"""The settings of many runs beside their scores: pooled over subjects and seeds, and the one that validation chooses.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.encoders.parcels_config import OWN_PRETRAINING
from braindecode_vis.report.board_page import PooledSetting, SettingsTable, Validation
from braindecode_vis.scoring.uncertainty import bootstrap_nested

MAX_SETTINGS = 8  # a table of all that differ between runs of several data sets would hold every setting
#: Resamples of an interval over subjects and seeds; the table of 200 runs takes seconds.
N_BOOT = 1000
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
    *,
    seed: int = 0,
) -> SettingsTable:
    """Return one row for each setting of some runs, with intervals over its subjects and seeds.

    Parameters
    ----------
    runs, names
        Runs and what they are called; those that are unfinished or damaged are left out.
    items
        Of each run folder what `compare.tabulate_items` gives; None where nothing is stored.
    metrics
        Those of the columns.
    seed
        Of the resamples.
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
                    if (pooled := _pool(metric, chosen, items, seed)) is not None
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


def _pool(
    metric: str, runs: Sequence[RunSummary], items: Mapping[Path, pd.DataFrame | None], seed: int
) -> dict[str, Any] | None:
    """Return the mean of a metric over subjects and seeds with its interval; None if a run lacks it."""
    cells: dict[str, list[tuple[np.ndarray, list[str]]]] = {}
    rows: list[dict[str, Any]] = []
    unit, by_item = "image", True
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
            found = _pick_items(items.get(run.folder), metric, subject, float(row["value"]))
            by_item &= found is not None
            values, labels, unit = found or (np.array([float(row["value"])]), ["run"], unit)
            cells.setdefault(subject, []).append((values, labels))
    if not rows:
        return None
    if not by_item:  # of none, where some lack them
        cells = {
            subject: [(np.array([values.mean()]), ["run"]) for values, _ in runs_of]
            for subject, runs_of in cells.items()
        }
    n_seeds = {len(found) for found in cells.values()}
    n_units = [len(set(labels)) for found in cells.values() for _, labels in found]
    chances = {row["chance"] for row in rows}
    pooled = {
        "value": float(np.mean([np.mean([values.mean() for values, _ in found]) for found in cells.values()])),
        "chance": chances.pop() if len(chances) == 1 else None,
        "n_subjects": len(cells), "n_seeds": max(n_seeds), "n_items": max(n_units) if by_item else None,
    }  # fmt: skip
    if len(rows) == 1:  # one run says it already, and as its report does
        words = str(rows[0].get("resampled") or "") or "what the run resampled"
        return pooled | {"ci_low": rows[0]["ci_low"], "ci_high": rows[0]["ci_high"], "resampled": words}
    interval = bootstrap_nested(
        [[values for values, _ in found] for found in cells.values()],
        [[labels for _, labels in found] for found in cells.values()],
        n_boot=N_BOOT, seed=seed,
    )  # fmt: skip
    return pooled | {
        "ci_low": interval.low, "ci_high": interval.high,
        "resampled": _describe_levels(len(cells), n_seeds, max(n_units) if by_item else None, unit),
    }  # fmt: skip


def _pick_items(
    table: pd.DataFrame | None, metric: str, subject: str, value: float
) -> tuple[np.ndarray, list[str], str] | None:
    """Return values, units and their name of one subject's items, if their mean is the score; None otherwise."""
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
    labels = own["cluster" if "cluster" in own else "stimulus_id"].astype(str).tolist()
    return values, labels, str(own["unit"].iloc[0]) if "unit" in own else "image"


def _describe_levels(n_subjects: int, n_seeds: set[int], n_items: int | None, unit: str) -> str:
    """Return in words what was resampled, and what was not."""
    most = max(n_seeds)
    seeds = f"{most} seeds" if len(n_seeds) == 1 else f"{min(n_seeds)} to {most} seeds"
    levels = [
        *([f"{n_subjects} subjects"] if n_subjects > 1 else []),
        *([seeds + (" of each" if n_subjects > 1 else "")] if most > 1 else []),
        *([f"{n_items} {unit}s"] if n_items is not None and n_items > 1 else []),
    ]
    lacking = [
        *(["subjects"] if n_subjects == 1 else []),
        *(["seeds"] if most == 1 else []),
        *(["items"] if n_items is None else []),
    ]
    return ", then ".join(levels) + (f"; not {' or '.join(lacking)}" if lacking else "")


# --- validation ---------------------------------------------------------------------------------------------------


def read_validation(folder: Path, config: Mapping[str, Any]) -> Validation | None:
    """Return the validation score of a run, the mean over its folds; None where it has none.

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
            f"No setting is called best: {n} of {len(rows)} have no validation score, and test scores must not choose. "
            "A network has one where encoder.selection.hold_out is above 0; a linear encoder, where it is offered two "
            "or more candidates (encoder.alphas), which inner folds of the training trials compare."
        )
    if len({one.basis for one in known}) > 1:
        return None, (
            "No setting is called best: their validation scores measure different things "
            f"({', '.join(sorted({one.name for one in known}))}, or the same of different data or targets), and test "
            "scores must not choose. Sweep settings of one encoder, data set and target to compare them."
        )
    # An easy subject would lift the settings that have it, for example while a sweep is not finished.
    if lacking := [row for row, own in zip(rows, subjects, strict=True) if own != set.union(*subjects)]:
        return None, (
            f"No setting is called best: {len(lacking)} of {len(rows)} have runs of some subjects only, and subjects "
            "differ in how well they can be decoded. Finish the runs of the others to compare all settings."
        )
    sizes = [one.n_images for one in known if one.n_images is not None]
    if sizes and max(sizes) > _SAME_GALLERY * min(sizes):
        return None, (
            f"No setting is called best: their validation scores come from galleries of {min(sizes)} to {max(sizes)} "
            "images, whose chance levels differ, and test scores must not choose. Give all the same "
            "encoder.selection.hold_out."
        )
    scores = [one.direction * one.value for one in known]
    best = int(np.argmax(scores))
    if scores.count(scores[best]) > 1:
        return None, "No setting is called best: several share the best validation score."
    # The best of many is so partly by luck, in validation too; the test was not asked.
    return best, (
        f"Chosen by validation alone: {known[0].name}, mean over subjects, seeds and folds. Test scores stand "
        "beside it and chose nothing."
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
