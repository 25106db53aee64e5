"""Checks that fits saw training trials alone: input statistics, chosen features, target spaces and whole encoders.

Each is fitted again on the training trials of its fold and compared with what lies in the run. `check_refit` goes one
step further: a copy of the prepared responses gets absurd numbers in every trial that the fold does not learn from, and
so does a copy of the target embeddings of every other image. Features and encoder are then fitted on the poisoned copy,
with the seed of the run. Where that is the fit that lies in the run, to the last bit, nothing else needs to be fitted.
Otherwise, as on another machine, they are fitted on the clean trials too: the two fits must not differ by a single bit,
and the clean one must be that of the run up to rounding.
"""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from braindecode_vis.base.arrays import Embeddings, Responses, count_own_voxels
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.contracts import Context, EncoderSettings, ImageEncoderSettings
from braindecode_vis.base.registry import validate_component
from braindecode_vis.base.roles import build, complete, find_encoder_role
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.store import (
    PROVENANCE,
    load_tensors,
    open_tensors,
    read_embeddings,
    read_json,
    read_responses,
)
from braindecode_vis.encoders.category_decoders import find_window
from braindecode_vis.parts.audit.recompute import require_space
from braindecode_vis.parts.audit.statistics import compute_moments
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, Record, drop_digests, name_fold
from braindecode_vis.pipeline.leaks.split_overlap import count_units
from braindecode_vis.pipeline.synthetic import add_synthetic, join_embeddings
from braindecode_vis.preprocessing.alignment import InputScalingConfig, InputTransform
from braindecode_vis.preprocessing.common_space import SubjectAlignment
from braindecode_vis.preprocessing.selection import (
    Selection,
    SelectionConfig,
    average_repetitions,
    fit_selection,
    pick_rows,
)
from braindecode_vis.training.auto import FILE as CHOICE

#: Bytes of training responses, or of targets, up to which a fit is made again without ``--refit``.
LARGEST_REFIT = 512 << 20
TOLERANCE = 1e-3  # of a standard deviation; single precision stays below 1e-5
LONGEST_CHOICE = 300.0  # seconds that trying several encoders took, up to which all are tried twice again
POISON = 3e4  # within the reach of float16; times the largest value where the type allows it
WEIGHT_TOLERANCE = (
    1e-3  # of the largest weight, between the fit that lies in the run and the clean one made here
)


# --- statistics of the inputs -----------------------------------------------------------------------------


def _pick_inputs(run: AuditedRun, record: Record, rows: np.ndarray) -> Responses:
    """Return trials as the encoder of a fold was given them, with the concept of each."""
    responses = run.responses
    if not run.decodes_categories:
        averaged = record.fields.get("repeats") == "averaged"
        responses = average_repetitions(responses, rows) if averaged else pick_rows(responses, rows)
    else:
        responses = responses.select(rows)
    concepts = run.stimuli.concepts_of(responses.stimulus_ids)
    responses = responses.with_trials(responses.trials.assign(concept=concepts))
    if (made := run.read_synthetic(record)) is not None:
        responses = add_synthetic(responses, made[0])
    folder = record.path / "selection"
    return Selection.read(folder).apply(responses) if (folder / "selection.json").is_file() else responses


def check_inputs(run: AuditedRun) -> list[AuditFinding]:
    """Compute the means and scales that an encoder keeps of its inputs again."""
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
        findings.append(AuditFinding("encoder-inputs", "leak", text, name_fold(number)))
    if not n_checked:
        return [AuditFinding("encoder-inputs", "ok", "the encoder keeps no statistics of its inputs.")]
    run.state("fit", "recomputed", "statistics of inputs")
    text = "the encoder's input statistics are those of its training trials."
    return findings or [AuditFinding("encoder-inputs", "ok", text)]


def _measure_inputs(run: AuditedRun, record: Record, rows: np.ndarray) -> float | None:
    """Return the largest difference between stored and recomputed statistics, in standard deviations."""
    for name, keys in (("ridge", ("feature_mean", "feature_std")), ("categories", ("mean", "scale"))):
        path = record.path / f"{name}.safetensors"
        if not path.is_file():
            continue
        stored = load_tensors(path)
        responses = _pick_inputs(run, record, rows)
        aligned = {k.removeprefix("transform."): v for k, v in stored.items() if k.startswith("transform.")}
        if aligned:
            scaling = InputScalingConfig(kind="none")
            transform = _fit_transform(record, responses, np.arange(responses.n_trials), scaling)
            if (off := _compare_transforms(transform, aligned)) > TOLERANCE:
                return off
            responses = transform.apply(responses)
        kept = stored["kept"] if "kept" in stored else slice(None)
        picked = np.arange(responses.n_trials)
        if (window := read_json(record.path / f"{name}.json").get("window")) is not None:
            picked = np.flatnonzero(find_window(responses.trials, (window[0], window[1])))
        mean, std = (part[kept] for part in compute_moments(responses.data, picked))
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
    if not (record.path / "network.json").is_file():
        return None
    stored = {
        name.removeprefix("transform."): array
        for name, array in load_tensors(record.path / "network.safetensors").items()
        if name.startswith("transform.")
    }
    if not stored:
        return None
    scaling = InputScalingConfig.model_validate(record.encoder["input_scaling"])
    responses = _pick_inputs(run, record, rows)
    content = read_json(record.path / "network.json")
    is_held = np.isin(responses.stimulus_ids.astype(str), content["held_out"])
    if content["held_out_by"] == "concept":  # synthetic trials of a held-out concept are not learnt from
        concepts = responses.trials["concept"].astype(str).to_numpy(dtype=object)
        is_held |= responses.is_synthetic & np.isin(concepts, concepts[is_held])
    learns = np.flatnonzero(~is_held)
    return _compare_transforms(_fit_transform(record, responses, learns, scaling), stored)


def _fit_transform(
    record: Record, responses: Responses, rows: np.ndarray, scaling: InputScalingConfig
) -> InputTransform:
    """Learn alignment and scaling from these rows, as the encoder of a record does."""
    alignment: Any = TypeAdapter(SubjectAlignment).validate_python(
        record.encoder.get("subject_alignment", "none")
    )
    transform = InputTransform(scaling, alignment, responses.dims[1:])
    subjects = responses.trials["subject"].astype(str).to_numpy(dtype=object)
    return transform.fit(
        responses.data, rows, subjects, stimuli=responses.stimulus_ids, n_own=count_own_voxels(responses)
    )


def _compare_transforms(made: InputTransform, stored: dict[str, np.ndarray]) -> float:
    """Return the largest difference between statistics, as a share of the largest value of each array."""
    fitted = made.as_tensors()
    if {k: v.shape for k, v in fitted.items()} != {k: v.shape for k, v in stored.items()}:
        return np.inf
    return max(
        float(np.abs(fitted[k].astype(float) - v).max() / (np.abs(v).max() or 1.0)) for k, v in stored.items()
    )


# --- features ----------------------------------------------------------------------------------------------


def check_features(run: AuditedRun) -> list[AuditFinding]:
    """Choose voxels, parcels or channels again; large recordings only if the audit is thorough."""
    findings = []
    for number, (fold, record) in enumerate(zip(run.folds, run.trained, strict=False)):
        folder, where = record.path / "selection", name_fold(number)
        if not (folder / "selection.json").is_file():
            continue
        size = len(fold.train) * (run.responses.data.nbytes // max(1, run.responses.n_trials))
        config = SelectionConfig.model_validate(record.fields["selection"])
        if size > LARGEST_REFIT and not run.thorough and (config.reliability or config.encoding):
            text = f"the choice of features was not made again: {size / 1e9:.1f} GB of trials; add --refit."
            findings.append(AuditFinding("features", "warning", text, where))
            run.state("fit", "by record", "chosen features", "large recordings; add --refit")
            continue
        run.state("fit", "recomputed", "chosen features")
        stored = Selection.read(folder)
        n_other = _count_other_features(stored, _choose_again(run, number, config, fold.train))
        if not n_other:
            continue
        whole = np.sort(np.r_[fold.train, fold.test])
        leaked = _count_other_features(stored, _choose_again(run, number, config, whole)) == 0
        how = "training and test trials together choose" if leaked else "training trials do not choose"
        text = f"{n_other} chosen feature(s) differ from those of the training trials: {how} the stored ones."
        findings.append(AuditFinding("features", "leak", text, where))
    chosen = any((record.path / "selection").is_dir() for record in run.trained)
    text = (
        "the features are those chosen by the training trials of each fold."
        if chosen
        else "no feature was chosen."
    )
    return findings or [AuditFinding("features", "ok", text)]


def _choose_again(
    run: AuditedRun, number: int, config: SelectionConfig, rows: np.ndarray
) -> Selection | None:
    """Choose features again by these trials; None if they cannot be chosen by them."""
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


def _count_other_features(stored: Selection, made: Selection | None) -> int:
    """Return in how many features two choices differ; all, if there is no second one."""
    if made is None or made.keep.keys() != stored.keep.keys():
        return sum(len(chosen) for chosen in stored.keep.values())
    return sum(int((chosen != made.keep[name]).sum()) for name, chosen in stored.keep.items())


# --- targets ----------------------------------------------------------------------------------------------


def check_targets(run: AuditedRun) -> list[AuditFinding]:
    """Fit target spaces again on the training images of their fold."""
    findings = []
    for number, (fold, record) in enumerate(zip(run.folds, run.embedded, strict=False)):
        target = drop_digests(record.fields["target"])
        if target["kind"] in ("vae", "taesd", "packaged_latents"):
            continue  # pretrained; sizes of untrained ones are not taken without the word that says so
        if (
            target["kind"] == "conditional"
        ):  # learns from ids and a table; `results.check_embedded` fits it again
            if not run.thorough:
                run.state("fit", "by record", "target space conditional", "heads on embeddings; add --refit")
            continue
        try:
            config = complete(ImageEncoderSettings, validate_component("target", target))
        except BraindecodeVisError as error:  # weights that are not available, or untrained ones
            run.state("fit", "by record", f"target space {target['kind']}", str(error).rstrip("."))
            continue
        if not config.fitted_on_training_images:
            continue
        stored = read_embeddings(record.path)
        ids = pd.unique(run.responses.stimulus_ids[fold.train])
        run.state("fit", "recomputed", f"target space {config.kind}")
        if _is_same_space(run, config, ids, stored):
            continue
        whole = pd.unique(run.responses.stimulus_ids[np.sort(np.r_[fold.train, fold.test])])
        leaked = any(_is_same_space(run, config, some, stored) for some in (whole, run.stimuli.ids))
        how = "training and test images together give it" if leaked else "training images do not give it"
        text = f"the target space {config.kind} was not fitted on the training images: {how}."
        findings.append(AuditFinding("targets", "leak", text, name_fold(number)))
    text = "target spaces are fitted on training images, or not at all."
    return findings or [AuditFinding("targets", "ok", text)]


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


def check_target_means(run: AuditedRun) -> list[AuditFinding]:
    """Compare the mean of the targets that an encoder keeps with that of its training trials or images."""
    findings, n = [], 0
    for number, fold in enumerate(run.folds[: len(run.embedded)]):
        centre, spread = _read_target_statistics(run.trained[number])
        if centre is None:
            continue
        n, where = n + 1, name_fold(number)
        size = (run.embedded[number].path / "vectors.npy").stat().st_size
        if size > LARGEST_REFIT and not run.thorough:
            text = f"the target mean was not computed again: {size / 1e9:.1f} GB of targets; add --refit."
            findings.append(AuditFinding("target-means", "warning", text, where))
            run.state("fit", "by record", "means of targets", "large targets; add --refit")
            continue
        run.state("fit", "recomputed", "means of targets")
        off = _measure_targets(run, number, fold.train, centre, spread)
        if off <= TOLERANCE:
            continue
        whole = np.sort(np.r_[fold.train, fold.test])
        leaked = _measure_targets(run, number, whole, centre, spread) <= TOLERANCE
        also = ", but that of training and test images" if leaked else ""
        text = f"the encoder's target mean is not that of its training images{also} (off by {off:.2g} SD)."
        findings.append(AuditFinding("target-means", "leak", text, where))
    text = "the encoder's target mean is that of its training images." if n else "no target mean is kept."
    return findings or [AuditFinding("target-means", "ok", text)]


def _read_target_statistics(record: Record) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return mean and standard deviation of the targets that an encoder keeps, None for what it does not keep."""
    for name, keys in (
        ("ridge", ("target_mean", "")),
        ("network", ("model.target_scale.centre", "model.target_scale.spread")),
    ):
        path = record.path / f"{name}.safetensors"
        if path.is_file():
            with open_tensors(path) as file:
                known = set(file.keys())
                centre, spread = (file.get_tensor(key) if key in known else None for key in keys)
            return centre, spread
    return None, None


def _measure_targets(
    run: AuditedRun, number: int, rows: np.ndarray, centre: np.ndarray, spread: np.ndarray | None
) -> float:
    """Return the largest difference between stored and recomputed target statistics, in standard deviations."""
    from braindecode_vis.training.fitted import reduce_views

    record, bank = run.trained[number], read_embeddings(run.embedded[number].path)
    if (record.path / "network.json").is_file():  # each image once, without those that were held out
        held = read_json(record.path / "network.json")["held_out"]
        ids = pd.unique(run.responses.stimulus_ids[rows].astype(str))
        ids = ids[~np.isin(ids, held)]
        bank = reduce_views(bank, record.encoder.get("view_choice"))
    else:
        units = count_units(run.trials, rows, str(record.fields.get("repeats", "single")))
        ids = units["stimulus_id"].astype(str).to_numpy()
    places = pd.Index(bank.ids.astype(str)).get_indexer(pd.Index(ids))
    places, vectors = places[places >= 0], bank.vectors.reshape(len(bank), 1, -1)
    if (made := run.read_synthetic(record)) is not None:
        own = np.arange(len(made[1]))
        if (record.path / "network.json").is_file():
            _, own = np.unique(made[1].ids.astype(str), return_index=True)
            concepts = made[0].trials["concept"].astype(str).to_numpy()[own]
            by_concept = read_json(record.path / "network.json")["held_out_by"] == "concept"
            gone = set(map(str, run.stimuli.concepts_of(held))) if by_concept else set()
            own = own[[concept not in gone for concept in concepts]]
        vectors = np.concatenate([vectors[places], made[1].vectors[own].reshape(len(own), 1, -1)])
        places = np.arange(len(vectors))
    mean, std = compute_moments(vectors, places)
    if centre.shape != mean.shape:
        return np.inf
    varies = std > 1e-6 * np.maximum(1e-30, np.abs(mean))
    off = np.abs(mean - centre)[varies] / std[varies]
    wide = np.zeros(1) if spread is None else np.abs(spread[varies] / std[varies] - 1)
    return float(max(off.max(initial=0.0), wide.max(initial=0.0)))


# --- poisoned test trials -----------------------------------------------------------------------------------


def check_refit(run: AuditedRun) -> list[AuditFinding]:
    """Fit every fold again on poisoned trials, and on clean ones if the files of the two fits differ in any byte.

    Copies lie in the system's temporary folder. Fits with equal files are remembered in ``run.refitted``.

    Raises
    ------
    DataError
        If the disk is too small for a copy of the responses.
    """
    findings: list[AuditFinding] = []
    # Networks, those of categories among them, are trained again by `choices.check_networks`.
    # So are averages with a member that reads tables or weights, of which the record keeps digests and no paths.
    linear = [
        (number, record)
        for number, record in enumerate(run.trained)
        if not (record.path / "network.json").is_file()
        and drop_digests(inner := _list_inner(record.fields.get("encoder", {}))) == inner
        and not ((record.path / CHOICE).is_file() and record.content.get("seconds", 0) > LONGEST_CHOICE)
    ]
    if not linear:
        return []
    with tempfile.TemporaryDirectory(prefix="audit-") as temporary:
        source, copy = run.prepared.path / "responses", Path(temporary) / "responses"
        require_space(source, Path(temporary), "the responses")
        shutil.copytree(source, copy)
        for number, record in linear:
            run.state("fit", "recomputed", "weights")
            poisoned = _poison_responses(run, copy, number)
            made = Path(temporary) / f"poisoned{number}"
            _fit_encoder(run, record, number, poisoned, made, poison=True)
            if not (record.path / CHOICE).is_file() and _has_same_files(record.path, made):
                run.refitted.add(record.path)
            else:
                clean = Path(temporary) / f"clean{number}"
                _fit_encoder(run, record, number, run.responses, clean, poison=False)
                findings += _compare_fits(record, clean, made, name_fold(number))
                shutil.rmtree(clean)
            shutil.rmtree(made)
    text = f"{len(linear)} fit(s) are bitwise equal with poisoned test trials, and equal to those of the run."
    return findings or [AuditFinding("refit", "ok", text)]


def _has_same_files(stored: Path, made: Path) -> bool:
    """Say whether a stored fit has the files of one that was made again, byte by byte, and its record beside them."""
    own, again = (
        {item.relative_to(one).as_posix() for item in one.rglob("*") if item.is_file()} - {PROVENANCE}
        for one in (stored, made)
    )
    return bool(own) and own == again and not any(filecmp.cmpfiles(stored, made, own, shallow=False)[1:])


def _list_inner(encoder: Mapping[str, Any]) -> list[Any]:
    return [*encoder.get("members", []), *encoder.get("candidates", [])]


def _poison_responses(run: AuditedRun, copy: Path, number: int) -> Responses:
    """Write absurd numbers into the trials that a fold does not learn from, and restore the others."""
    learns = np.zeros(run.responses.n_trials, dtype=bool)
    learns[run.folds[number].train] = True
    data = np.load(copy / "data.npy", mmap_mode="r+", allow_pickle=False)
    for row in range(len(data)):
        if learns[row]:
            data[row] = run.responses.data[row]
        else:
            signs = np.where(np.arange(data[row].size).reshape(data[row].shape) % 2, -1, 1)
            data[row] = signs * POISON * (1 + row % 2)
    data.flush()
    return read_responses(copy)


def _fit_encoder(
    run: AuditedRun, record: Record, number: int, responses: Responses, folder: Path, *, poison: bool
) -> None:
    """Choose features and fit the encoder as training does, and write both into the new `folder`."""
    folder.mkdir()
    fields, rows = record.fields, run.folds[number].train
    seed = int(fields["seed"])
    config = complete(EncoderSettings, validate_component("encoder", fields["encoder"]))
    encoder = build(find_encoder_role(config), config, seed=derive_seed(seed, "train", number))
    if (record.path / CHOICE).is_file():
        encoder.bind(Context(earlier=record.path))
    if run.decodes_categories:
        picked = responses.select(rows)
        encoder.fit(picked, picked.trials["concept"].to_numpy(dtype=object))
        encoder.write(folder)
        return
    bank = read_embeddings(run.embedded[number].path)
    if poison:
        vectors = np.array(bank.vectors, dtype=np.float32)
        known = np.isin(bank.ids.astype(str), responses.stimulus_ids[rows].astype(str))
        vectors[~known] = POISON
        bank = Embeddings(vectors, bank.ids, bank.space)
    choice = SelectionConfig.model_validate(fields["selection"])
    averaged = fields["repeats"] == "averaged"
    picked = average_repetitions(responses, rows) if averaged else pick_rows(responses, rows)
    picked = picked.with_trials(picked.trials.assign(concept=run.stimuli.concepts_of(picked.stimulus_ids)))
    learnt = bank.select(list(picked.stimulus_ids))
    if (made := run.read_synthetic(record)) is not None:
        picked, learnt = add_synthetic(picked, made[0]), join_embeddings(learnt, made[1])
    if not choice.is_empty:
        single = responses.select(rows)
        targets = None
        if choice.encoding is not None:
            targets = bank.select(list(pd.unique(single.stimulus_ids)))
        selection = fit_selection(choice, single, targets, seed=derive_seed(seed, "selection"))
        selection.write(folder / "selection")
        picked = selection.apply(picked)
    encoder.fit(picked, learnt)
    encoder.write(folder)


def _compare_fits(record: Record, clean: Path, poisoned: Path, where: str) -> list[AuditFinding]:
    """Compare all arrays of two fits bit by bit, and those of the clean one with the run's up to rounding."""
    for path in sorted(path for path in clean.rglob("*") if path.suffix in (".safetensors", ".npy")):
        name = path.relative_to(clean)
        first, second = _load_arrays(path), _load_arrays(poisoned / name)
        moved = [key for key in first if not np.array_equal(first[key], second[key])]
        if moved:
            text = f"{moved[0]} in {name} changes when test trials are poisoned: test trials reach the fit."
            return [AuditFinding("refit", "leak", text, where)]
        if not (record.path / name).is_file():
            return [AuditFinding("refit", "warning", f"the run has no {name} to compare with.", where)]
        stored = _load_arrays(record.path / name)
        other = []
        for key, made in first.items():
            kept = stored.get(key)
            if kept is None or made.shape != kept.shape:
                other.append(key)
            elif made.dtype.kind != "f":
                other += [] if np.array_equal(made, kept) else [key]
            elif kept.size and not np.abs(made - kept).max() <= WEIGHT_TOLERANCE * np.abs(kept).max():
                other.append(key)  # more than the rounding of another machine, or not a number
        if other:
            text = f"{other[0]} in {name} differs from a fit on the training trials of the fold."
            return [AuditFinding("refit", "leak", text, where)]
    return []


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npy":  # as encoders from outside may write
        return {"the array": np.load(path, allow_pickle=False)}
    arrays: dict[str, np.ndarray] = load_tensors(path)
    return arrays
