"""Gives hints about settings that probably cost much, and about scores that need an explanation, one sentence each.

Uses only finished stages and changes nothing. A hint is not an error: the scores remain valid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from braindecode_vis.base import store
from braindecode_vis.pipeline.decoding import retrieve
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.pipeline.runs import Run, remember
from braindecode_vis.pipeline.scoring import evaluate
from braindecode_vis.scoring.label_exchange import find_exchange
from braindecode_vis.scoring.retrieval import Retrieval, describe_common_choice
from braindecode_vis.scoring.scoring_task import FEW_ORDERS
from braindecode_vis.training.auto import FILE as CHOICE
from braindecode_vis.training.objectives.objectives_config import ObjectiveConfig

# On real fMRI of 12 to 60 pictures, single trials gave top-1 0.75 where their averages gave 0.45. So they do in a
# simulation where voxels share most of their noise, which single trials show and averages hide: 0.90 and 0.49 of 40
# pictures shown four times, 0.79 and 0.34 of those shown twice; alike from 100 pictures on, and with independent noise.
FEW_IMAGES, LEAST_REPETITIONS = 80, 2
LEAST_GAIN = 1e-3  # of the error, from the smallest penalty but one to the smallest
#: A term that moves by less than this share of its size, from the lowest to the highest epoch, stays constant: a term
#: that is learnt falls by several percent in a few epochs.
LEAST_MOVE = 0.01
#: A weighted term that is so many times as large as all others together leaves them without a say.
MOST_WEIGHT = 100.0
#: Objectives that compare with a teacher's earlier outputs, and the one whose trials are mixed.
WITH_QUEUE, MIXES = ("distillation", "tcl"), "bimixco"
# Of 192 simulated MEG trials, 8 to 22 updates named one image for all, 96 named four of ten.
FEW_UPDATES = 100


@remember
def list_hints(run: Run) -> list[str]:
    """Return the hints on a finished run."""
    rows = evaluate(run)
    networks = _read_networks(run)
    hints = [*_judge_penalties(run), *_judge_objectives(networks)]
    if run.config.decodes_categories:
        return [*_judge_choices(run, networks), *_judge_owners(run, rows), *hints]
    return [
        *_judge_choices(run, networks), *_judge_repeats(run), *_judge_gallery(run, rows), *_judge_orders(rows),
        *_judge_ties(run), *hints,
    ]  # fmt: skip


def _judge_choices(run: Run, networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say that most queries name the same image, or class, first, whatever they showed."""
    if run.config.decodes_categories:
        items = run.seen["items"]
        pairs = [(items["decoded"].tolist(), items["label"].tolist())]
    else:
        # Each part has a gallery of its own.
        pairs = [
            (_list_firsts(part), part.query_ids.tolist())
            for part in _list_parts(run)
            if part.gallery_size > 1
        ]
    found = list(dict.fromkeys(filter(None, [describe_common_choice(*pair) for pair in pairs])))
    return found + (_judge_updates(networks) if found else [])


def _list_parts(run: Run) -> list[Retrieval]:
    """Return what every part of every fold retrieved."""
    return [part.retrieval for fold in retrieve(run).folds for part in fold.parts]


def _list_firsts(part: Retrieval) -> list[Any]:
    """Return the id of the image that each query names first."""
    found: list[Any] = np.asarray(part.gallery_ids)[part.top_indices[:, 0]].tolist()
    return found


def _judge_updates(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say that a network was updated too rarely to distinguish images; it learns their mean first."""
    counts = [count_updates(record) for record in networks]
    if not counts or max(counts) >= FEW_UPDATES:
        return []
    return [
        f"the network was updated only {max(counts)} times, and at first a network predicts the mean of "
        "the images: lower "
        "encoder.batch_size, increase encoder.epochs or the patience of encoder.selection, or use more trials."
    ]


def count_updates(record: Mapping[str, Any]) -> int:
    """Return how often the weights of a network were updated, by its record.

    Examples
    --------
    >>> count_updates({"history": [{"seconds": 2.0, "trials_per_second": 96.0, "batch_size": 128}] * 11})
    22
    """
    history = record.get("history", [])
    # The log has the rate of an epoch and its time, whose product are its trials.
    trials = [epoch.get("seconds", 0) * epoch.get("trials_per_second", 0) for epoch in history]
    accumulation = record.get("config", {}).get("accumulation", 1)
    return sum(
        max(1, math.ceil(round(n) / (epoch["batch_size"] * accumulation)))
        for n, epoch in zip(trials, history, strict=True)
    )


def _read_networks(run: Run) -> list[dict[str, Any]]:
    """Return the record of every network that the run trained, those of an average too."""
    paths = [path for fold in train(run) for path in sorted(fold.artifact.path.rglob("network.json"))]
    return [store.read_json(path) for path in paths]


def _judge_objectives(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which objectives of a network changed nothing, or left nothing to the others."""
    found: dict[str, None] = {}
    for record in networks:
        settings = record.get("config", {}).get("objectives", [])
        found |= dict.fromkeys(describe_objective_values(record.get("history", []), settings))
    return list(found)


def _judge_repeats(run: Run) -> list[str]:
    prepared = preprocess(run)
    if run.config.repeats.train != "averaged":
        return []
    counts = (
        prepared.responses.trials.iloc[prepared.folds[0].train].groupby(["subject", "stimulus_id"]).size()
    )
    n_trials, n_repetitions = counts.groupby("subject").size().median(), counts.median()
    # With many images an average is cleaner and enough of them are left.
    if n_trials >= FEW_IMAGES or n_repetitions < LEAST_REPETITIONS:
        return []
    return [
        f"{n_repetitions:g} repetitions of {n_trials:g} training images are averaged, which leaves only {n_trials:g} "
        "training trials; training on single trials is often better: --set repeats.train=single."
    ]


def _judge_gallery(run: Run, rows: list[dict[str, Any]]) -> list[str]:
    """Say that images of other folds, which a fold was trained on, push the true image off the first places.

    Predictions lean towards what was learnt, so that a weak decoder names a training image first, and the true one
    before the other images that it never saw: its mean rank is good, and top-1 is below chance.
    """
    found = {(row["metric"], row["subject"]): row for row in rows if row["method"] == "decoded"}
    bad = [
        subject
        for metric, subject in found
        if metric == "top1"
        and found[metric, subject]["value"] < 1 / (found[metric, subject]["gallery_size"] or np.inf)
        and (found.get(("2_way", subject), {}).get("p_value") or 1.0) < 0.01
    ]
    if not bad or run.config.retrieval.gallery == "fold":
        return []
    prepared, firsts = preprocess(run), []
    for fold, retrieved in zip(prepared.folds, retrieve(run).folds, strict=True):
        known = set(prepared.responses.stimulus_ids[fold.train].tolist())
        for part in (part.retrieval for part in retrieved.parts):
            firsts += [str(name) in known for name in _list_firsts(part)]
    if not np.mean(firsts) > 0.5:
        return []
    level = found["2_way", bad[0]]["value"]
    return [
        f"top-1 is below chance although the true image ranks well above it (2_way {level:.2f}): the gallery holds the "
        f"images of all folds, and in {np.mean(firsts):.0%} of the queries an image that the fold was "
        "trained on comes first; for a gallery of images without training images: --set retrieval.gallery=fold."
    ]


def _judge_orders(rows: list[dict[str, Any]]) -> list[str]:
    """Say where test images are too few to be permuted."""
    for row in reversed(rows):  # all subjects together stand last
        found = re.search(FEW_ORDERS + r" in (\d+) ways: no p much below ([\d.]+)", str(row["protocol"]))
        if found is not None:
            return [
                "there are too few test images for a small p: they can be permuted (within folds, if "
                f"there are several) in only {found[1]} ways, so no p can be much below {found[2]}, even "
                "for perfect decoding; use more images, or fewer folds."
            ]
    return []


def _judge_owners(run: Run, rows: list[dict[str, Any]]) -> list[str]:
    """Say what subjects (or groups) that have one class each are too few or too small for."""
    found = find_exchange(rows)
    if found is None:
        return _judge_folds(run)
    hints = []
    if found.smallest_p > 0.05:
        hints.append(
            f"there are too few {found.unit}s for a small p: exchanging the labels of whole {found.unit}s gives no p "
            f"below {found.smallest_p:.2g}, even for perfect decoding; four {found.unit}s of each of two "
            "classes allow 0.029."
        )
    trials = preprocess(run).responses.trials
    if (
        found.unit == "group"
        and trials["group"].nunique() == len(trials)
        and trials["subject"].nunique() == 1
    ):
        hints.append(
            f"each of the {len(trials)} groups has one trial, so groups keep no trials together; give "
            "one group per person, day or block, or leave group out if trials are independent."
        )
    return hints


def _judge_folds(run: Run) -> list[str]:
    prepared = preprocess(run)
    concepts = prepared.stimuli.concepts_of(prepared.responses.stimulus_ids)
    single = [fold for fold in prepared.split.folds if len(set(concepts[fold.test].tolist())) < 2]
    if not single or len(set(concepts.tolist())) < 2:
        return []
    n = len(prepared.split.folds)
    return [
        f"{len(single)} of {n} folds test trials of only one class, so they have no AUC, and the split "
        "itself can make a decoder look bad; choose fewer folds, or groups that contain every class."
    ]


def _judge_penalties(run: Run) -> list[str]:
    chosen: list[tuple[float, float, float]] = []
    settings: dict[str, None] = {}  # in the order of folds, each once
    for fold in train(run):
        path = fold.artifact.path / "ridge.json"
        if path.is_file() and (record := fold.artifact.path / CHOICE).is_file():
            settings[f"encoder.candidates.{store.read_json(record)['chosen']}.alphas"] = None
        content = store.read_json(path) if path.is_file() else {}
        errors: dict[float, float] = {}
        for choice in content.get("choices", []):
            alpha, error = float(choice["alpha"]), float(choice["mse"])
            errors[alpha] = min(error, errors.get(alpha, np.inf))
        tried = sorted(errors)
        if len(tried) > 1:
            # With more features than trials and little noise, small penalties are all next to none: in a simulation, a
            # grid from 0.01 on found what one from 10 on does, within 0.03.
            gains = errors[tried[0]] < (1 - LEAST_GAIN) * errors[tried[1]]
            chosen.append((float(content["alpha"]), tried[0] if gains else np.nan, tried[-1]))
    hints = []
    for edge, word in ((1, "smallest"), (2, "largest")):
        at = [found[edge] for found in chosen if found[0] == found[edge]]
        # In most folds: a single fold may end at the edge by chance.
        if 2 * len(at) > len(chosen):
            hints.append(
                f"the ridge penalty is the {word} that was tried ({at[0]:g}) in {len(at)} of {len(chosen)} fold(s); "
                f"the best may be outside this range: extend {' and '.join(settings) or 'encoder.alphas'}."
            )
    return hints


def _judge_ties(run: Run) -> list[str]:
    parts = _list_parts(run)
    # Rank and worst rank agree where no other candidate is as similar as the true one.
    shared = np.concatenate([part.worst_ranks != part.ranks for part in parts])
    if shared.mean() < 0.01:
        return []
    lost = np.concatenate([(part.n_above == 0) & (part.n_tied > 0) for part in parts])
    decided = f" top-1 would be up to {lost.mean():.2f} higher without them." if lost.any() else ""
    return [
        f"{shared.mean():.0%} of the queries tie with another candidate: a tie counts as not found in "
        f"top-k, and as the mean rank elsewhere.{decided} Candidates with equal embeddings, or constant "
        "predictions, cause ties."
    ]


def describe_objective_values(
    history: Sequence[Mapping[str, Any]], objectives: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return one sentence for each objective that stays constant, rises, outweighs the others 100-fold or mixes trials.

    Parameters
    ----------
    history
        One record per epoch, whose ``objectives`` holds the unweighted mean of each term, in the order of `objectives`.
    objectives
        Settings of each: ``kind``, ``weight``, ``weight_end`` and ``phase``.

    Examples
    --------
    >>> history = [{"objectives": {"clip": 4.0, "mmd": 0.0}}, {"objectives": {"clip": 2.0, "mmd": 0.0}}]
    >>> describe_objective_values(history, [{"kind": "clip"}, {"kind": "mmd"}])
    ['the objective mmd stays 0 in all 2 epochs: nothing is learnt from it; change its options, or leave it out.']
    """
    values = [list(record.get("objectives", {}).values()) for record in history]
    if len(history) < 2 or any(len(one) != len(objectives) for one in values):
        return []
    table = np.array(values, float)  # (n_epochs, n_objectives)
    weights = _tabulate_weights(len(history), objectives)
    weighted = np.abs(table * weights)
    sentences = []
    for number, settings in enumerate(objectives):
        name, active = str(settings.get("kind", "")), weights[:, number] > 0
        own, others = weighted[active, number], np.delete(weighted, number, axis=1)[active].sum(axis=1)
        terms = table[active, number]
        if len(terms) > 1 and np.ptp(terms) <= LEAST_MOVE * np.abs(terms).max():
            sentences.append(
                f"the objective {name} stays {terms[-1]:.4g} in all {len(terms)} epochs: nothing is learnt from it; "
                "change its options, or leave it out."
            )
        elif len(terms) > 1 and terms[-1] - terms[0] > LEAST_MOVE * np.abs(terms).max():
            sentences.append(
                f"the objective {name} rises from {terms[0]:.4g} to {terms[-1]:.4g}: "
                + (
                    "its queue adds more candidates until it is full; set encoder.teacher.queue well below the "
                    "number of training images."
                    if name in WITH_QUEUE
                    else "the other objectives outweigh it, or work against it."
                )
            )
        # In most epochs: a term may begin large and fall.
        beside = others > 0
        if beside.any() and np.mean(own[beside] > MOST_WEIGHT * others[beside]) > 0.5:
            times = np.median(own[beside] / others[beside])
            sentences.append(
                f"the objective {name} is {times:.0f} times as large as all others together ({np.median(own):.4g} "
                f"beside {np.median(others[beside]):.3g}), so the others have almost no effect; lower "
                "its weight, or increase theirs."
            )
        if name == MIXES and beside.any():
            sentences.append(
                f"while the objective {name} is active, half of each batch are mixtures of two trials, "
                "but the other objectives compare them with only one of the two images; in a short "
                f"training this costs accuracy: let the others begin later (phase), or leave {name} out."
            )
    return sentences


def _tabulate_weights(n_epochs: int, objectives: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the weight of each objective in each epoch, 0 in epochs that are not wholly in its phase."""
    weights = np.zeros((n_epochs, len(objectives)))
    shared = ("weight", "weight_end", "phase")
    for number, settings in enumerate(objectives):
        objective = ObjectiveConfig.model_construct(
            **{key: settings[key] for key in shared if key in settings}
        )
        start, end = objective.phase
        for epoch in range(n_epochs):
            begins, ends = epoch / n_epochs, (epoch + 1) / n_epochs
            if start <= begins and ends <= end:
                weights[epoch, number] = objective.weigh((begins + ends) / 2)
    return weights
