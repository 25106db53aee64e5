"""Checks choices: recorded penalties and epochs, the epoch whose weights are kept, and the training itself.

Penalties and epochs must have been chosen by inner folds and held-out training images; no log may hold a test score.
The weights in the run score the held-out trials once more, which must give the number of the epoch that the rule of
selection takes. With ``--refit`` short trainings are made again. What inner folds chose is fitted again with the
encoder, which encoder of several among it; see `braindecode_vis.parts.audit.results`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, normalise_rows
from braindecode_vis.base.contracts import BrainEncoder
from braindecode_vis.base.store import read_json
from braindecode_vis.parts.audit.differences import compare_files
from braindecode_vis.parts.audit.recompute import RecomputedRun
from braindecode_vis.pipeline import learning, preparing
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, Record, list_first, name_fold
from braindecode_vis.training.auto import FILE as CHOICE
from braindecode_vis.training.auto import find_winner
from braindecode_vis.training.loop import get_monitored_score

#: A word of its own: ``test_top1`` and ``tested``, but neither ``latest`` nor ``testimony``.
_TEST_SCORE = re.compile(r"(^|[^a-z])(test|tested)([^a-z]|$)")
_TEXT_FILES = (".json", ".jsonl", ".csv", ".log", ".txt")
LOSS_TOLERANCE = 0.02  # of a validation loss, between the machines that trained and that audit
WEIGHT_TOLERANCE = 1e-3  # of the largest weight: the same machine trains the same weights
#: Of an inner score in 0..1: ties that rounding breaks, and networks that another machine trains.
SAME_SCORE, OTHER_MACHINE = 1e-3, 0.02
TIMES = ("seconds", "trials_per_second")  # in the record of an epoch
LONGEST_TRAINING = 600.0  # seconds that the trainings of a run took, up to which ``--refit`` makes them again
#: Of two fits' errors on the test: share of the error, and in standard errors of it, that no second training explains.
LEAST_GAIN, LEAST_T = 0.1, 5.0


# --- validation of networks ---------------------------------------------------------------------------------


def check_epochs(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Score the held-out trials with the weights in the run, and look for their epoch in the validation curve."""
    # Networks of categories are no networks by their settings.
    if not any((record.path / "network.json").is_file() for record in run.trained):
        if any(any(record.path.rglob("network.json")) for record in run.trained):
            _state_epochs(run, "members of an average are trained again with --refit")
        return []
    if again.encoder.reads_text:
        run.state("choice", "by record", "epochs", "texts are not embedded again")
        return []
    findings, n = [], 0
    for number, (record, fitted) in enumerate(zip(run.trained, learning.train(again), strict=True)):
        if not (record.path / "network.json").is_file():
            continue  # another encoder was chosen in this fold
        content, where = read_json(record.path / "network.json"), name_fold(number)
        if not content.get("held_out"):
            _state_epochs(run, "nothing was held out; trained again with --refit")
            continue
        chosen = _find_chosen(content["history"], record.encoder["selection"])
        responses, targets = learning.pick_training(again, number)
        rows = fitted.encoder.hold_out(responses, np.arange(responses.n_trials))
        held = {str(name) for name in responses.stimulus_ids[rows[1]]}
        n += 1
        if other := held ^ set(map(str, content["held_out"])):
            text = f"the held-out images differ from those that the seed gives, first {list_first(other)}."
            findings.append(AuditFinding("validation", "leak", text, where))
            continue
        progress = (chosen + 1) / int(record.encoder["epochs"])
        found = fitted.encoder.score_held_out(responses, targets, rows=rows, progress=progress)
        if problem := _place_epoch(content["history"], chosen, found):
            findings.append(AuditFinding("validation", "leak", problem, where))
    if not n:
        return []
    run.state("choice", "recomputed", "validation scores of networks")
    text = "the weights of networks give the validation score of the chosen epoch."
    return findings or [AuditFinding("validation", "ok", text)]


def _state_epochs(run: AuditedRun, otherwise: str) -> None:
    """State that epochs without a validation score were recomputed with the weights, or else what would do so."""
    if _is_trained_again(run):
        run.state("choice", "recomputed", "epochs")
    else:
        run.state("choice", "by record", "epochs", otherwise)


def _is_trained_again(run: AuditedRun) -> bool:
    """Say whether `check_networks` came to the weights that are kept, and so to the epoch that they are of."""
    how = {item.how for item in run.verified if (item.part, item.what) == ("fit", "weights")}
    return how == {"recomputed"}


def _find_chosen(history: list[dict[str, Any]], rule: Mapping[str, Any]) -> int:
    """Return the epoch whose weights the rule of selection takes."""
    if rule["kind"] != "early_stopping":
        return len(history) - 1
    return int(np.argmax([get_monitored_score(rule["monitor"], entry) for entry in history]))


def _place_epoch(history: list[dict[str, Any]], chosen: int, found: dict[str, Any]) -> str:
    """Say which epoch the weights are of, if it is not the chosen one; else nothing."""
    names = [name for name in found if name.startswith("validation_") and name in history[chosen]]
    if "validation_loss" not in names:
        return ""
    # (n_epochs, n_names), in units of what the rounding of another machine may change
    curve = np.array([[float(entry.get(name, np.inf)) for name in names] for entry in history])
    now = np.array([float(found[name]) for name in names])
    units = dict.fromkeys(names, 2.5 / found["n_validation_images"])
    units["validation_loss"] = LOSS_TOLERANCE * max(abs(float(found["validation_loss"])), 1e-9)
    worst = (np.abs(curve - now) / np.array([units[name] for name in names])).max(axis=1)  # (n_epochs,)
    nearest = int(worst.argmin())
    # The machine that trained gives its own numbers again to far more digits than that.
    if worst[chosen] <= 1 and not (worst[nearest] <= 1e-3 and worst[chosen] > 1e-2):
        return ""
    if nearest != chosen and worst[nearest] <= 1:
        return f"the weights score the held-out images as epoch {nearest} did, but epoch {chosen} was chosen."
    told, again = (
        ", ".join(f"{name} {value:.3g}" for name, value in zip(names, values, strict=True))
        for values in (curve[chosen], now)
    )
    return (
        f"the weights are not those of epoch {chosen}: held-out images had {told} then, and have {again} now."
    )


# --- encoders that were tried ---------------------------------------------------------------------------------


def check_choice(run: AuditedRun, again: RecomputedRun, record: Record, folder: Path) -> list[AuditFinding]:
    """Compare the inner scores that chose an encoder with those of a fit that was made again, in `folder`."""
    if not (record.path / CHOICE).is_file():
        return []
    stored, made = (read_json(path / CHOICE) for path in (record.path, folder))
    where, is_trained = record.path.relative_to(run.folder).as_posix(), False
    for candidate, old, new in zip(
        again.config.encoder.candidates, stored["candidates"], made["candidates"], strict=True
    ):
        trained = any(part.trains_in_processes for part in roles.list_encoders(candidate))
        is_trained |= trained
        first, second = (
            float("nan") if one.get("mean") is None else float(one["mean"]) for one in (old, new)
        )
        tolerance = OTHER_MACHINE if trained else SAME_SCORE
        if not np.isclose(first, second, rtol=0, atol=tolerance, equal_nan=True):
            text = f"tampered: the inner score of {old['kind']} is {first:.4g}, but {second:.4g} is computed."
            return [AuditFinding("choices", "leak", text, where)]
    if stored["chosen"] != made["chosen"]:
        if not is_trained:
            text = "tampered: the encoder in use is not the one that the inner folds of the training trials choose."
            return [AuditFinding("choices", "leak", text, where)]
        run.state(
            "choice",
            "by record",
            "encoder, by inner folds",
            "scores of networks differ slightly between machines",
        )
        return []
    run.state("choice", "recomputed", "encoder, by inner folds")
    return []


# --- networks again -----------------------------------------------------------------------------------------


def check_networks(
    run: AuditedRun, again: RecomputedRun, records: tuple[Record, ...], words: str
) -> list[AuditFinding]:
    """Train networks again whose training took minutes, and compare weights, or else what they do on the test.

    Sums of another machine come in another order, and a training carries that on. So other weights are no proof; but
    weights that learnt from the test predict it far better than those that did not.

    Parameters
    ----------
    run
        The run.
    again
        The run that computes, or its low-level branch.
    records
        The trainings of its folds.
    words
        Said in front of what was trained.
    """
    took = sum(float(record.content.get("seconds", np.inf)) for record in records)
    reason = "" if run.thorough else "trained again with --refit"
    if run.thorough and took > LONGEST_TRAINING:
        reason = f"they were trained for {took / 60:.0f} minutes, too long to repeat"
    if reason:
        run.state("fit", "by record", f"{words}weights", reason)
        if any((record.path / CHOICE).is_file() for record in records):
            run.state("choice", "by record", f"{words}encoder, by inner folds", reason)
        return []
    made = again.compute("train", learning.train)
    findings = []
    for number, record in enumerate(records):
        folder = made.get(record.path.as_posix())
        if folder is not None:
            findings += check_choice(run, again, record, folder)
        if folder is None or not compare_files(record.path, folder, WEIGHT_TOLERANCE, skip=TIMES):
            run.state("fit", "recomputed", f"{words}weights")
            continue
        stored = learning.train(again)[number].encoder
        other = roles.read(BrainEncoder, again.encoder, folder)
        text = ""
        if not again.config.decodes_categories:
            text = _describe_knowledge(again, number, stored, other)
        if text:
            findings.append(AuditFinding("refit", "leak", text, f"{words}{name_fold(number)}"))
        else:
            reason = (
                "the weights differ, as on another machine; they contain no more information about the test"
            )
            run.state("fit", "by record", f"{words}weights", reason)
    return findings


def _describe_knowledge(again: RecomputedRun, number: int, stored: Any, other: Any) -> str:
    """Say that the fit in the run knows the test better than another one by anything it predicts; else nothing."""
    trials = learning.pick_test_trials(again, number)
    # Of an average one member may predict for the generator, and all of them what is compared.
    for name in ("predict_for_generator",) if stored.predicts_alike else ("predict_for_generator", "predict"):
        distances = [measure_distance(again, number, getattr(one, name)(trials)) for one in (stored, other)]
        if text := describe_advantage(*distances):
            return text
    return ""


def measure_distance(again: RecomputedRun, number: int, predicted: Embeddings) -> np.ndarray:
    """Return the cosine distance of each prediction of a fold from the target of its image, shape (n_rows,)."""
    targets = preparing.embed(again)[number].embeddings.select(list(predicted.ids))
    left, right = normalise_rows(predicted.flat()), normalise_rows(targets.flat())
    return np.asarray(1 - (left * right).sum(axis=1))


def describe_advantage(stored: np.ndarray, made: np.ndarray) -> str:
    """Say in a sentence that one of two fits knows the test better than chance allows; empty if it does not.

    Parameters
    ----------
    stored, made : arrays of shape (n_items,)
        Errors on test items, of the fit in the run and of one that was made again from the training split.
    """
    gain = made - stored
    spread = float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 2 else np.inf
    if gain.mean() > LEAST_GAIN * abs(made.mean()) and gain.mean() > LEAST_T * spread:
        share = gain.mean() / abs(made.mean())
        return f"the fit in the run has {share:.0%} less error on the test than a fit of the training split."
    return ""


def describe_nearness(trained: np.ndarray, tested: np.ndarray) -> str:
    """Say that targets of the test are nearer to predictions than targets of held-out training images; else nothing.

    Parameters
    ----------
    trained : array of shape (n_training,)
        Distances of targets of training images from predictions of fits that have not seen these images.
    tested : array of shape (n_tested,)
        Of test images, predicted from as many trials each.

    Examples
    --------
    >>> describe_nearness(np.array([0.8, 0.9, 0.7, 0.8]), np.array([0.3, 0.4, 0.5, 0.4]))
    'are 50 % nearer to their predictions than those of training images are out of fold (6.9 standard errors)'
    """
    if min(len(trained), len(tested)) < 3:
        return ""
    gain = trained.mean() - tested.mean()
    error = float(np.sqrt(trained.var(ddof=1) / len(trained) + tested.var(ddof=1) / len(tested)))
    if gain <= LEAST_GAIN * trained.mean() or gain <= LEAST_T * error:
        return ""
    return (
        f"are {100 * gain / trained.mean():.0f} % nearer to their predictions than those of training images are out "
        f"of fold ({gain / error:.1f} standard errors)"
    )


# --- what penalties and epochs were chosen by ---------------------------------------------------------------


def check_penalties(run: AuditedRun) -> list[AuditFinding]:
    """Compare encoder, penalty and number of features in use with the best of the recorded inner folds."""
    findings, n, choice = [], 0, ""
    for number, record in enumerate(run.trained):
        if (record.path / CHOICE).is_file():
            content = read_json(record.path / CHOICE)
            tried, used, best = content["candidates"], content["chosen"], find_winner(content["candidates"])
            choice = "encoders and "
            if used != best:
                kinds = [f"candidate {place + 1} ({tried[place]['kind']})" for place in (used, best)]
                text = f"{kinds[0]} is in use, but the inner folds chose {kinds[1]}."
                findings.append(AuditFinding("choices", "leak", text, name_fold(number)))
        path = record.path / "ridge.json"
        content = read_json(path) if path.is_file() else {}
        if not content.get("choices"):
            continue
        n += 1
        best = min(content["choices"], key=lambda choice: choice["mse"])
        size = best.get("n_features")
        # Whatever else chose it, the training trials did not.
        if best["alpha"] != content["alpha"]:
            text = f"the penalty {content['alpha']:g} is used, but the inner folds chose {best['alpha']:g}."
            findings.append(AuditFinding("choices", "leak", text, name_fold(number)))
        elif size is not None and size != content["n_kept"]:
            text = f"{content['n_kept']} features are used, but the inner folds chose {size}."
            findings.append(AuditFinding("choices", "leak", text, name_fold(number)))
    text = (
        f"{choice}penalties are the best ones in inner folds of training trials."
        if n or choice
        else "no penalty was chosen by ridge."
    )
    return findings or [AuditFinding("choices", "ok", text)]


def check_logs(run: AuditedRun) -> list[AuditFinding]:
    """Search what training left behind for scores of the test."""
    findings = []
    folders = [record.path for record in run.trained]
    extra = [run.folder / name for name in ("work", "logs", "checkpoints")]
    for folder in [*folders, *extra]:
        for path, key in _iterate_keys(folder):
            where = path.relative_to(run.folder).as_posix()
            text = f"the training log contains {key!r}: with test scores available, an epoch can be chosen by them."
            findings.append(AuditFinding("model-selection", "leak", text, where))
    if (run.folder.parent / "sweep.csv").is_file():
        text = (
            "this run is part of a sweep; do not report only the run with the best test score, since "
            "this selects on the test set."
        )
        findings.append(AuditFinding("model-selection", "warning", text, "../sweep.csv"))
    text = "no training log holds a test score."
    return findings or [AuditFinding("model-selection", "ok", text)]


def _iterate_keys(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the first key that names a test score in each log below a folder."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.suffix not in _TEXT_FILES or path.name == "provenance.json" or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        # JSON is one value over many lines, logs have one a line.
        lines = [text] if path.suffix == ".json" else text.splitlines()
        keys: list[str] = []
        for line in lines:
            try:
                keys += _list_keys(json.loads(line))
            except json.JSONDecodeError:
                keys += [part.split(":")[0].split("=")[0] for part in re.split(r"[,;\s]+", line)]
        found = next((key for key in keys if _TEST_SCORE.search(key.lower())), None)
        if found is not None:
            yield path, found


def _list_keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*map(str, value), *(key for item in value.values() for key in _list_keys(item))]
    if isinstance(value, list):
        return [key for item in value for key in _list_keys(item)]
    return []


def check_held_out(run: AuditedRun) -> list[AuditFinding]:
    """Compare the validation images of a network with its training images, and its epochs with what chose them."""
    findings, n = [], 0
    ids, concepts = run.responses.stimulus_ids.astype(str), run.concepts.astype(str)
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        path, where = record.path / "network.json", name_fold(number)
        if not path.is_file():
            continue
        n += 1
        # Networks of categories keep the last epoch, and have no such setting.
        content, settings = read_json(path), record.encoder.get("selection", {"kind": "last"})
        # (n_trials,)
        held = np.isin(ids, content["held_out"])
        foreign = set(content["held_out"]) - set(ids[fold.train].tolist())
        if foreign:
            text = f"{len(foreign)} validation image(s) are not training images, first {list_first(foreign)}."
            findings.append(AuditFinding("validation", "leak", text, where))
        both = set(concepts[held].tolist()) & set(concepts[fold.test].tolist())
        if both and "concept" in run.declared:
            text = f"{len(both)} concept(s) are in both validation and test, first {list_first(both)}."
            findings.append(AuditFinding("validation", "leak", text, where))
        learns = np.isin(np.arange(len(ids)), fold.train) & ~held
        split = set(concepts[held].tolist()) & set(concepts[learns].tolist())
        if split and content["held_out_by"] == "concept":
            text = f"{len(split)} validation concept(s) are also in training, first {list_first(split)}."
            findings.append(AuditFinding("validation", "leak", text, where))
        findings += _check_epochs(content["history"], record.encoder, settings, where)
    text = "validation images are held-out training images." if n else "no network was trained."
    return findings or [AuditFinding("validation", "ok", text)]


def _check_epochs(
    history: list[dict[str, Any]], encoder: Mapping[str, Any], settings: dict[str, Any], where: str
) -> list[AuditFinding]:
    """Compare the number of epochs with the one that was fixed, or that the validation curve explains."""
    n, planned = len(history), int(encoder["epochs"])
    if settings["kind"] == "last":
        if n == planned:
            return []
        text = f"the last of {planned} epochs should be kept, but {n} are in the history: the training was stopped."
        return [AuditFinding("model-selection", "warning", text, where)]
    if settings["kind"] == "training_loss":
        best, lowest = 0, np.inf
        for epoch, entry in enumerate(history):
            if entry["loss"] < lowest - float(settings["min_delta"]):
                best, lowest = epoch, float(entry["loss"])
        found = f"its loss is lowest in {best}"
    else:
        name = "validation_loss" if settings["monitor"] == "loss" else "validation_top"
        curve = [
            next((-v if "loss" in k else v for k, v in e.items() if k.startswith(name)), None)
            for e in history
        ]
        if any(value is None for value in curve):
            text = "early stopping left no validation curve."
            return [AuditFinding("model-selection", "warning", text, where)]
        best = int(np.argmax(np.array(curve, dtype=float))) if curve else 0
        found = f"the validation curve is best in {best}"
    if n < planned and n - 1 - best != int(settings["patience"]):
        text = f"the training stopped after epoch {n - 1}, but {found}, which does not explain the stop."
        return [AuditFinding("model-selection", "warning", text, where)]
    return []
