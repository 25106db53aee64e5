"""Checks the choices of networks: the epoch whose weights are kept, and the training itself.

The weights in the run score the held-out trials once more, which must give the number of the epoch that the rule of
selection takes. With ``--refit`` short trainings are made again. What inner folds chose is fitted again with the
encoder, which encoder of several among it; see `braindecode_vis.parts.audit.results`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from braindecode_vis.training.loop import get_monitored_score

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
    'are 50 % nearer to their predictions than those of training images are out of fold (8.5 standard errors)'
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
