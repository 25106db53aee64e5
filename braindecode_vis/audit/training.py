"""What training fitted: statistics of the inputs, columns, target spaces.

Each is fitted again on the training trials of its fold and compared with what lies in the run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.audit.files import AuditedRun, Finding, Record, drop_digests, name_fold
from braindecode_vis.audit.moments import compute_column_moments
from braindecode_vis.audit.split_overlap import count_units
from braindecode_vis.checks import BraindecodeVisError, DataError
from braindecode_vis.encoders.category_decoders import find_window
from braindecode_vis.preprocessing.repeats import average_repetitions, pick_rows
from braindecode_vis.preprocessing.selection import Selection, SelectionConfig, fit_selection
from braindecode_vis.registry import validate_component
from braindecode_vis.roles import IMAGE_ENCODER_SETTINGS, play
from braindecode_vis.seeds import derive_seed
from braindecode_vis.store import read_embeddings, read_json
from braindecode_vis.training.alignment import InputScalingConfig, InputTransform

LARGEST_REFIT = (
    512 << 20
)  # bytes of training responses up to which a choice of columns is made again without --refit
TOLERANCE = 1e-3  # of a standard deviation; single precision stays below 1e-5


def check_training(run: AuditedRun, *, thorough: bool = False) -> list[Finding]:
    """Compare fitted statistics with what the training trials give.

    Parameters
    ----------
    thorough
        Make choices of columns again whatever their size.
    """
    if not run.trained:
        return [Finding("training", "warning", "nothing was trained yet.")]
    return [
        *_check_inputs(run),
        *_check_columns(run, thorough=thorough),
        *_check_targets(run),
        *_check_target_means(run, thorough=thorough),
    ]


# --- statistics of the inputs -----------------------------------------------------------------------------


def pick_inputs(run: AuditedRun, record: Record, rows: np.ndarray) -> Responses:
    """Return trials as the encoder of a fold was given them, with the concept of each."""
    responses = run.responses
    if not run.decodes_categories:
        averaged = record.fields.get("repeats") == "averaged"
        responses = average_repetitions(responses, rows) if averaged else pick_rows(responses, rows)
    else:
        responses = responses.select(rows)
    concepts = run.stimuli.concepts_of(responses.stimulus_ids)
    responses = responses.with_trials(responses.trials.assign(concept=concepts))
    folder = record.path / "selection"
    return Selection.read(folder).apply(responses) if (folder / "selection.json").is_file() else responses


def _check_inputs(run: AuditedRun) -> list[Finding]:
    findings, n_checked = [], 0
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        off = _measure_inputs(run, record, fold.train)
        if off is None:
            continue
        n_checked += 1
        if off <= TOLERANCE:
            continue
        whole = _measure_inputs(run, record, np.sort(np.r_[fold.train, fold.test]))
        also = ", but those of training and test trials" if whole is not None and whole <= TOLERANCE else ""
        text = f"the encoder's input statistics are not those of its training trials{also} (off by {off:.2g} SD)."
        findings.append(Finding("encoder-inputs", "leak", text, name_fold(number)))
    if not n_checked:
        return [Finding("encoder-inputs", "ok", "the encoder keeps no statistics of its inputs.")]
    text = "the encoder's input statistics are those of its training trials."
    return findings or [Finding("encoder-inputs", "ok", text)]


def _measure_inputs(run: AuditedRun, record: Record, rows: np.ndarray) -> float | None:
    """Return the largest difference between stored and recomputed statistics, in standard deviations."""
    from safetensors.numpy import load_file

    for name, keys in (("ridge", ("feature_mean", "feature_std")), ("categories", ("mean", "scale"))):
        path = record.path / f"{name}.safetensors"
        if not path.is_file():
            continue
        stored = load_file(path)
        responses = pick_inputs(run, record, rows)
        kept = stored["kept"] if "kept" in stored else slice(None)
        picked = np.arange(responses.n_trials)
        if (window := read_json(record.path / f"{name}.json").get("window")) is not None:
            picked = np.flatnonzero(find_window(responses.trials, (window[0], window[1])))
        mean, std = (part[kept] for part in compute_column_moments(responses.data, picked))
        return _compare(mean, std, stored[keys[0]], stored[keys[1]])
    return _measure_network(run, record, rows)


def _compare(mean: np.ndarray, std: np.ndarray, stored_mean: np.ndarray, stored_std: np.ndarray) -> float:
    if mean.shape != stored_mean.shape:
        return np.inf
    safe = np.where(std > 1e-6 * np.maximum(1e-30, np.abs(mean)), std, 1.0)
    spread = np.where(std > 1e-6 * np.maximum(1e-30, np.abs(mean)), stored_std, 1.0)
    return float(max(np.abs((stored_mean - mean) / safe).max(), np.abs(spread / safe - 1).max()))


def _measure_network(run: AuditedRun, record: Record, rows: np.ndarray) -> float | None:
    """Fit alignment and scaling of a network's inputs again, without the images that it held out."""
    from safetensors.numpy import load_file

    if not (record.path / "network.json").is_file():
        return None
    stored = {
        name.removeprefix("transform."): array
        for name, array in load_file(record.path / "network.safetensors").items()
        if name.startswith("transform.")
    }
    if not stored:
        return None
    settings = record.fields["encoder"]
    scaling = InputScalingConfig.model_validate(settings["input_scaling"])
    responses = pick_inputs(run, record, rows)
    held = read_json(record.path / "network.json")["held_out"]
    learns = np.flatnonzero(~np.isin(responses.stimulus_ids.astype(str), held))
    subjects = responses.trials["subject"].astype(str).to_numpy(dtype=object)
    transform = InputTransform(scaling, settings["subject_alignment"], responses.dims[1:])
    fitted = transform.fit(responses.data, learns, subjects).as_tensors()
    if fitted.keys() != stored.keys():
        return np.inf
    return max(float(np.abs(fitted[k] - v).max() / (np.abs(v).max() or 1.0)) for k, v in stored.items())


# --- columns ----------------------------------------------------------------------------------------------


def _check_columns(run: AuditedRun, *, thorough: bool) -> list[Finding]:
    findings = []
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        folder, where = record.path / "selection", name_fold(number)
        if not (folder / "selection.json").is_file():
            continue
        size = len(fold.train) * (run.responses.data.nbytes // max(1, run.responses.n_trials))
        config = SelectionConfig.model_validate(record.fields["selection"])
        if size > LARGEST_REFIT and not thorough and (config.reliability or config.encoding):
            text = f"the choice of columns was not made again: {size / 1e9:.1f} GB of trials; add --refit."
            findings.append(Finding("columns", "warning", text, where))
            continue
        stored = Selection.read(folder)
        n_other = count_other_columns(stored, refit_columns(run, number, config, fold.train))
        if not n_other:
            continue
        whole = np.sort(np.r_[fold.train, fold.test])
        leaked = count_other_columns(stored, refit_columns(run, number, config, whole)) == 0
        how = "training and test trials together choose" if leaked else "training trials do not choose"
        text = f"{n_other} chosen column(s) differ from those of the training trials: {how} the stored ones."
        findings.append(Finding("columns", "leak", text, where))
    chosen = any((record.path / "selection").is_dir() for record in run.trained)
    text = (
        "the columns are those that the training trials of each fold choose."
        if chosen
        else "no column was chosen."
    )
    return findings or [Finding("columns", "ok", text)]


def refit_columns(
    run: AuditedRun, number: int, config: SelectionConfig, rows: np.ndarray
) -> Selection | None:
    """Choose columns again by these trials; None where they cannot be chosen by them."""
    responses = run.responses.select(rows)
    targets = None
    if config.encoding is not None:
        bank = read_embeddings(run.embedded[number].path)
        targets = bank.select(list(pd.unique(responses.stimulus_ids)))
    seed = derive_seed(int(run.trained[number].fields["seed"]), "selection")
    try:
        return fit_selection(config, responses, targets, seed=seed)
    except BraindecodeVisError:
        return None


def count_other_columns(stored: Selection, made: Selection | None) -> int:
    """Return in how many columns two choices differ; all, if there is no second one."""
    if made is None or made.keep.keys() != stored.keep.keys():
        return sum(len(chosen) for chosen in stored.keep.values())
    return sum(int((chosen != made.keep[name]).sum()) for name, chosen in stored.keep.items())


# --- targets ----------------------------------------------------------------------------------------------


def _check_targets(run: AuditedRun) -> list[Finding]:
    """Fit target spaces again on the training images of their fold."""
    findings = []
    for number, (fold, record) in enumerate(zip(run.folds, run.embedded, strict=False)):
        target = drop_digests(record.fields["target"])
        if target["kind"] in ("vae", "taesd"):
            continue  # pretrained; sizes of untrained ones are not taken without the word that says so
        config = play(IMAGE_ENCODER_SETTINGS, validate_component("target", target))
        if not config.fitted_on_training_images:
            continue
        stored = read_embeddings(record.path)
        ids = pd.unique(run.responses.stimulus_ids[fold.train])
        if _is_same_space(run, config, ids, stored):
            continue
        whole = pd.unique(run.responses.stimulus_ids[np.sort(np.r_[fold.train, fold.test])])
        leaked = any(_is_same_space(run, config, some, stored) for some in (whole, run.stimuli.ids))
        how = "training and test images together give it" if leaked else "training images do not give it"
        text = f"the target space {config.kind} is not that of the training images: {how}."
        findings.append(Finding("targets", "leak", text, name_fold(number)))
    text = "target spaces are fitted on training images, or not at all."
    return findings or [Finding("targets", "ok", text)]


def _is_same_space(run: AuditedRun, config: Any, ids: np.ndarray, stored: Embeddings) -> bool:
    try:
        encoder = config.build()
        encoder.fit(run.stimuli.iterate_images(ids))
        made = encoder.encode(run.stimuli.iterate_images(stored.ids[:32]))
    except DataError:
        return False
    vectors = np.asarray(stored.vectors[:32], dtype=np.float64)
    made = np.asarray(made).reshape(len(made), *vectors.shape[1:])
    scale = np.abs(vectors).max() or 1.0
    return made.shape == vectors.shape and float(np.abs(made - vectors).max()) < 1e-3 * scale


def _check_target_means(run: AuditedRun, *, thorough: bool) -> list[Finding]:
    """Compare the mean of the targets that an encoder keeps with that of its training trials or images."""
    findings, n = [], 0
    for number, fold in enumerate(run.folds[: len(run.embedded)]):
        centre, spread = _read_target_statistics(run.trained[number])
        if centre is None:
            continue
        n, where = n + 1, name_fold(number)
        size = (run.embedded[number].path / "vectors.npy").stat().st_size
        if size > LARGEST_REFIT and not thorough:
            text = f"the target mean was not computed again: {size / 1e9:.1f} GB of targets; add --refit."
            findings.append(Finding("target-means", "warning", text, where))
            continue
        off = _measure_targets(run, number, fold.train, centre, spread)
        if off <= TOLERANCE:
            continue
        whole = np.sort(np.r_[fold.train, fold.test])
        leaked = _measure_targets(run, number, whole, centre, spread) <= TOLERANCE
        also = ", but that of training and test images" if leaked else ""
        text = f"the encoder's target mean is not that of its training images{also} (off by {off:.2g} SD)."
        findings.append(Finding("target-means", "leak", text, where))
    text = "the encoder's target mean is that of its training images." if n else "no target mean is kept."
    return findings or [Finding("target-means", "ok", text)]


def _read_target_statistics(record: Record) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return mean and standard deviation of the targets that an encoder keeps, None for what it does not keep."""
    from safetensors import safe_open

    for name, keys in (
        ("ridge", ("target_mean", "")),
        ("network", ("model.target_scale.centre", "model.target_scale.spread")),
    ):
        path = record.path / f"{name}.safetensors"
        if path.is_file():
            with safe_open(path, framework="np") as file:
                known = set(file.keys())
                centre, spread = (file.get_tensor(key) if key in known else None for key in keys)
            return centre, spread
    return None, None


def _measure_targets(
    run: AuditedRun, number: int, rows: np.ndarray, centre: np.ndarray, spread: np.ndarray | None
) -> float:
    """Return the largest difference between stored and recomputed target statistics, in standard deviations."""
    from braindecode_vis.training.views import settle_views

    record, bank = run.trained[number], read_embeddings(run.embedded[number].path)
    if (record.path / "network.json").is_file():  # each image once, without those that were held out
        held = read_json(record.path / "network.json")["held_out"]
        ids = pd.unique(run.responses.stimulus_ids[rows].astype(str))
        ids = ids[~np.isin(ids, held)]
        bank = settle_views(bank, record.fields["encoder"].get("view_choice"))
    else:
        units = count_units(run.trials, rows, str(record.fields.get("repeats", "single")))
        ids = units["stimulus_id"].astype(str).to_numpy()
    places = pd.Index(bank.ids.astype(str)).get_indexer(pd.Index(ids))
    mean, std = compute_column_moments(bank.vectors.reshape(len(bank), 1, -1), places[places >= 0])
    if centre.shape != mean.shape:
        return np.inf
    varies = std > 1e-6 * np.maximum(1e-30, np.abs(mean))
    off = np.abs(mean - centre)[varies] / std[varies]
    wide = np.zeros(1) if spread is None else np.abs(spread[varies] / std[varies] - 1)
    return float(max(off.max(initial=0.0), wide.max(initial=0.0)))
