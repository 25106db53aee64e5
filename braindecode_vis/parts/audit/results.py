"""Checks that responses, targets, fits, predictions, ranks and images follow from the stages before them.

Tolerances leave room for another device, and for no more. What is dear (pretrained networks, diffusion models, networks
that are trained again) is left to ``--refit``, and said to be known by record.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, normalise_rows
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.base.consent import ConsentError
from braindecode_vis.base.contracts import BrainEncoder, Context, ImageEncoder
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import ImageRows, find_comparison_size
from braindecode_vis.parts.audit.choices import (
    LONGEST_TRAINING,
    check_choice,
    check_networks,
    describe_advantage,
    describe_nearness,
    measure_distance,
)
from braindecode_vis.parts.audit.differences import (
    RESPONSE_TOLERANCE,
    compare_files,
    compare_images,
    compare_responses,
    compare_tables,
    compare_vectors,
)
from braindecode_vis.parts.audit.recompute import RecomputedRun, require_space
from braindecode_vis.parts.audit.statistics import (
    MOST_COMPARED,
    describe_responses_in_targets,
    describe_scaling,
)
from braindecode_vis.pipeline import decoding, learning, preparing
from braindecode_vis.pipeline.galleries import order_by_gallery
from braindecode_vis.pipeline.image_files import INDEX, read_image_rows
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.run_files import BRANCH_WORDS, AuditedRun, Record, name_fold
from braindecode_vis.pipeline.reconstruction import (
    derange,
    draw_images,
    open_fits,
)
from braindecode_vis.scoring.retrieval import read_retrieval
from braindecode_vis.training.auto import FILE as CHOICE

#: Test trials of a network that are predicted again without ``--refit``, evenly spaced.
MOST_PREDICTED = 2000
#: Images that are embedded again, the tested ones first.
MOST_EMBEDDED = 2000
#: Seconds that a fit took by its record, up to which it is made again without ``--refit``.
SHORTEST_FIT = 5.0
#: Of predictions, in units of their spread over trials: single precision of a linear map, and of a network's layers on
#: another device. Predictions that hold 1 % of the truth are off by some hundredths.
LINEAR_TOLERANCE, NETWORK_TOLERANCE = 1e-3, 5e-3
#: Cosines of one device and another.
COSINE_TOLERANCE = 1e-5


def name_tampering(check: str, text: str, where: str = "") -> AuditFinding:
    """Return the finding that a file is not what the stages before it give."""
    return AuditFinding(check, "leak", f"tampered: {text}.", where)


# --- responses --------------------------------------------------------------------------------------------


def check_prepared(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Preprocess the recordings again with the settings of the run; compare trials, stimuli, split and responses."""
    what = "trials and responses"
    if not run.thorough:
        reason = f"preprocessing took {_read_seconds(run.prepared):.0f} s; add --refit to do it again"
        run.state("data", "by record", what, reason)
        return []
    stored = run.prepared.path
    try:
        again.require_current(run.prepared)
        if again.config.dataset.hash_inputs() != (run.prepared.fields.get("inputs") or {}):
            raise DataError("the recordings are not those that the run was made from")
        require_space(stored, again.folder.path, "responses and stimuli")
        made = again.compute("preprocess", preparing.preprocess)[stored.as_posix()]
    except ConsentError:
        raise
    except (BraindecodeVisError, OSError) as error:
        reason = f"{str(error).rstrip('.')}; the audit takes the root from config.yaml"
        run.state("data", "by record", what, reason)
        return []
    run.state("data", "recomputed", what)
    text = _compare_prepared(stored, made)
    shutil.rmtree(made)
    if text:
        text = f"compared with the recordings, {text}"
        return [name_tampering("responses", text, stored.relative_to(run.folder).as_posix())]
    text = f"{run.responses.n_trials} trials and their responses are those that the recordings give."
    return [AuditFinding("responses", "ok", text)]


def _compare_prepared(stored: Path, made: Path) -> str:
    """Return the first difference of two artifacts of the preprocessing in words: trials, responses, then the rest."""
    trials = [pd.read_parquet(folder / "responses" / "trials.parquet") for folder in (stored, made)]
    if text := compare_tables(*trials, tolerance=0.0):
        return f"trials.parquet: {text}"
    if added := [str(name) for name in trials[0] if name not in trials[1]]:
        return f"trials.parquet has the additional column {added[0]}"
    arrays = [
        np.load(folder / "responses" / "data.npy", mmap_mode="r", allow_pickle=False)
        for folder in (made, stored)
    ]
    rows, largest = compare_responses(*arrays)
    if not len(rows):
        return compare_files(stored, made, RESPONSE_TOLERANCE, skip=("root",), leave=("data.npy",))
    n_tested = int((trials[0]["split"].iloc[rows] == "test").sum())
    first = trials[0]["stimulus_id"].iloc[int(rows[0])]
    return (
        f"the responses of {len(rows)} of {len(trials[0])} trials ({n_tested} of them test trials), first "
        f"row {rows[0]} ({first}), differ by up to {largest:.2g} SD"
    )


# --- targets and fits -------------------------------------------------------------------------------------


def check_embedded(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Embed images again: all tested ones where the image encoder is no pretrained network, a few where it is one."""
    findings, n_checked = [], 0
    if again.config.decodes_categories:
        return []
    for number, bank in enumerate(preparing.embed(again)):
        if number and bank is preparing.embed(again)[0]:
            break
        own = again.target.fitted_on_training_images or roles.has_own(ImageEncoder, bank.encoder, "embed")
        if not own and not run.thorough:
            run.state(
                "fit", "by record", f"target embeddings of {again.target.kind}", "a network; add --refit"
            )
            continue
        pictured = set(run.stimuli.select_pictured().ids.astype(str))
        order = pd.unique(
            np.concatenate([run.responses.stimulus_ids[run.folds[number].test], bank.embeddings.ids])
        )
        ids = [name for name in order.astype(str) if name in pictured]
        ids = ids if run.thorough else ids[:MOST_EMBEDDED]
        bank.encoder.bind(Context(images=run.stimuli, device=again.config.retrieval.device))
        stored = bank.embeddings.select(ids)
        try:
            if (
                run.thorough and again.config.target.kind == "conditional"
            ):  # by heads on training images alone
                vectors = _embed_again(run, number, bank).select(ids).vectors
            else:
                vectors = np.asarray(bank.encoder.encode(run.stimuli.iterate_images(ids)))
        except ConfigError:  # texts and tables know their stimuli, and no pictures
            if again.config.target.packages and not run.thorough:
                run.state(
                    "fit", "by record", f"target embeddings of {again.target.kind}", "a network; add --refit"
                )
                continue
            vectors = _embed_again(run, number, bank).select(ids).vectors
        if vectors.size != stored.vectors.size:  # views of a network, or a bank that was put together
            run.state(
                "fit", "by record", f"target embeddings of {again.target.kind}", "several views of an image"
            )
            continue
        made = Embeddings(vectors.reshape(stored.vectors.shape), stored.ids, stored.space)
        if again.config.target.kind == "imported":
            findings += _check_imported(run, again, number, bank)
        else:
            n_checked += len(ids)
        off, first = compare_vectors(made.flat(), stored.flat())
        if off > NETWORK_TOLERANCE:
            text = f"the target embedding of {ids[first]} is not that of its image (off by {off:.2g} of their spread)"
            findings.append(name_tampering("targets", text, name_fold(number)))
    if n_checked:
        run.state("fit", "recomputed", f"target embeddings of {n_checked} image(s)")
    return findings


def _check_imported(
    run: AuditedRun, again: RecomputedRun, number: int, bank: preparing.TargetBank
) -> list[AuditFinding]:
    """Judge targets that came in a file: over which images their statistics hold, and how near predictions are."""
    what = "imported target embeddings"
    run.state("fit", "by record", what, "they were computed elsewhere; only their file was read again")
    findings, where, fold = [], name_fold(number), run.folds[number]
    train, test = (
        np.unique(pd.Index(bank.embeddings.ids).get_indexer(run.responses.stimulus_ids[rows]))
        for rows in (fold.train, fold.test)
    )
    if text := describe_scaling(bank.embeddings.flat(), train, test, "images"):
        text = f"of the imported targets, {text}: test images were used in their statistics."
        findings.append(AuditFinding("targets", "leak", text, where))
    if text := describe_responses_in_targets(*_pair_with_responses(run, bank.embeddings)):
        text = (
            f"of the imported targets, {text}: they hold the response to a test image instead of the image."
        )
        findings.append(AuditFinding("targets", "leak", text, where))
    trained = any(part.trains_in_processes for part in roles.list_encoders(again.config.encoder))
    if not run.thorough or (trained and not run.out_of_fold):
        reason = "networks are not trained out of fold for this" if run.thorough else "add --refit"
        run.state("fit", "by record", "distance of imported targets from predictions", reason)
        return findings
    out_of_fold = _predict_training(run, again, number)
    tested, n = _predict_as_often(run, again, number)
    if bank.embeddings.space not in (out_of_fold.space, tested.space):
        return findings  # an encoder that compares in a space of its own
    distances = [measure_distance(again, number, predicted) for predicted in (out_of_fold, tested)]
    if text := describe_nearness(*distances):
        text = (
            f"the imported targets of test images {text}, from {n} trial(s) of an image on both sides. So are targets "
            "that were drawn to predictions, and test trials with less noise: compute the targets from the images."
        )
        findings.append(AuditFinding("targets", "warning", text, where))
    return findings


def _pair_with_responses(run: AuditedRun, targets: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets of some images, and the mean response to each, a row an image."""
    shown = run.responses.stimulus_ids.astype(str)
    ids = np.unique(shown)
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, min(len(ids), MOST_COMPARED)).astype(int))]
    data = run.responses.data
    means = [np.asarray(data[shown == name], dtype=np.float32).mean(axis=0).reshape(-1) for name in ids]
    return targets.select(list(ids)).flat(), np.stack(means)


def _predict_training(run: AuditedRun, again: RecomputedRun, number: int) -> Embeddings:
    """Return predictions of the training trials by fits without their images, made here if there are none."""
    if run.out_of_fold:
        return learning.predict_out_of_fold(again)[number].predicted
    encoder = roles.read(BrainEncoder, again.encoder, run.trained[number].path)
    encoder.bind(preparing.lend_stimuli(again, number, Context(device=again.config.retrieval.device)))
    return encoder.predict_out_of_fold(*learning.pick_training(again, number))


def _predict_as_often(run: AuditedRun, again: RecomputedRun, number: int) -> tuple[Embeddings, int]:
    """Predict test images from as many trials as training images have, and return how many these are."""
    fold, repeats = run.folds[number], again.config.repeats.train
    ids = run.responses.stimulus_ids
    n = int(np.median(pd.Series(ids[fold.train]).value_counts())) if repeats == "averaged" else 1
    rows = np.sort(fold.test)
    rows = rows[pd.Series(ids[rows]).groupby(ids[rows]).cumcount().to_numpy() < n]
    fitted = learning.train(again)[number]
    picked = preparing.pick_labelled_trials(preparing.preprocess(again), rows, repeats)
    return fitted.encoder.predict(order_by_gallery(fitted.encoder, fitted.select(picked))), n


def _embed_again(run: AuditedRun, number: int, bank: preparing.TargetBank) -> Embeddings:
    """Return the embeddings of all stimuli by an encoder that finds them by their ids, fitted anew if it is fitted."""

    def encode(member: Any) -> Embeddings:
        stimuli = run.stimuli.select(bank.embeddings.ids)
        return Embeddings(np.asarray(member.encode(stimuli.iterate_images())), stimuli.ids, member.space)

    training = pd.unique(run.responses.stimulus_ids[run.folds[number].train])
    return bank.encoder.embed(run.stimuli.select(bank.embeddings.ids), list(training), encode)


def check_fits(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Fit encoders again with their inner folds and choices; networks with ``--refit``."""
    findings = []
    fitted = [(again, run.trained, "")]
    for name, branch in run.branches.items():
        opened = cast(RecomputedRun, decoding.open_branch(again, name))
        fitted.append((opened, branch.trained, f"{BRANCH_WORDS[name]} "))
    for one, records, words in fitted:
        # Networks of categories are no networks by their settings, and an average has members in folders of their own.
        if any(True for record in records for _ in record.path.rglob("network.json")):
            findings += check_networks(run, one, records, words)
            continue
        took = sum(_read_seconds(record) for record in records)
        # Where the winner of several is no network, others of them may be.
        trained = any(part.trains_in_processes for part in roles.list_encoders(one.config.encoder))
        if took > ((LONGEST_TRAINING if trained else np.inf) if run.thorough else SHORTEST_FIT):
            reason = f"they took {took:.0f} s{'' if run.thorough else '; add --refit'}"
            run.state("fit", "by record", f"{words}weights", reason)
            run.state("choice", "by record", f"{words}choices by inner folds", reason)
            continue
        for record in records:
            again.require_current(record)
        known = all(record.path in run.refitted for record in records)  # by `fits.check_refit`
        made = {} if known else one.compute("train", learning.train)
        for record in records:
            folder = made.get(record.path.as_posix())
            if folder is not None and (record.path / CHOICE).is_file():
                findings += check_choice(run, one, record, folder)
                if (
                    store.read_json(folder / CHOICE)["chosen"]
                    != store.read_json(record.path / CHOICE)["chosen"]
                ):
                    continue  # fits of two encoders
                (folder / CHOICE).unlink()
            if folder is not None and (text := compare_files(record.path, folder, LINEAR_TOLERANCE)):
                text = f"{text}, compared with the training trials of the fold"
                findings.append(name_tampering("fits", text, record.path.relative_to(run.folder).as_posix()))
        run.state("fit", "recomputed", f"{words}weights")
        run.state("choice", "recomputed", f"{words}choices by inner folds")
    return findings


def check_out_of_fold(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Predict training trials again by fits that have not seen their images, where something learnt from them.

    Refits of another machine have other weights; then those in the run must not be nearer to the targets than these.
    """
    if again.config.decodes_categories:
        return []
    if not run.out_of_fold and (run.reconstructed is None or not learning.needs_predictions(again)):
        run.state("prediction", "recomputed", "no predictions out of fold (nothing learnt from them)")
        return []
    parts = roles.list_encoders(again.config.encoder)
    what, trained = "predictions out of fold", any(part.trains_in_processes for part in parts)
    took, longest = sum(map(_read_seconds, run.out_of_fold)), LONGEST_TRAINING if trained else np.inf
    if took > (longest if run.thorough else SHORTEST_FIT):
        reason = f"they took {took:.0f} s{'' if run.thorough else '; add --refit'}"
        run.state("prediction", "by record", what, reason)
        return []
    for record in run.out_of_fold:
        again.require_current(record)
    made = again.compute("out_of_fold", learning.predict_out_of_fold)
    findings = []
    for number, part in enumerate(learning.predict_out_of_fold(again)):
        if part.artifact.path.as_posix() not in made:
            run.state("prediction", "by record", what, "an earlier version made them with the fit")
            continue
        stored, computed = part.predicted, store.read_embeddings(made[part.artifact.path.as_posix()])
        where = part.artifact.path.relative_to(run.folder).as_posix()
        if list(stored.ids) != list(computed.ids) or stored.space != computed.space:
            text = "they are of other images, or of another space, than the training trials of the fold"
            findings.append(name_tampering("out-of-fold", text, where))
            continue
        off, first = compare_vectors(computed.flat(), stored.flat())
        if off <= (NETWORK_TOLERANCE if trained else LINEAR_TOLERANCE):
            run.state("prediction", "recomputed", what)
            continue
        same = stored.space == preparing.embed(again)[number].embeddings.space
        distances = [measure_distance(again, number, one) for one in (stored, computed) if same]
        if not trained or (same and describe_advantage(*distances)):
            text = f"the prediction of {stored.ids[first]} differs from a fit that has not seen it (by {off:.2g})"
            findings.append(name_tampering("out-of-fold", text, where))
        else:
            reason = "the refits differ, as on another machine; they contain no more information about their images"
            run.state("prediction", "by record", what, reason)
    return findings


def _read_seconds(record: Record) -> float:
    seconds = record.content.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else np.inf


# --- predictions and ranks --------------------------------------------------------------------------------


def check_predictions(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Predict the test trials again by the stored encoder."""
    if again.config.decodes_categories:
        return []
    if run.retrieved is None:
        run.state("prediction", "not verified", "predictions", "the run has predicted nothing yet")
        return []
    again.require_current(run.retrieved)
    findings = []
    for number, fitted in enumerate(learning.train(again)):
        responses = learning.pick_test_trials(again, number)
        stored = store.read_embeddings(run.retrieved.path / preparing.name_fold(number))
        if list(stored.ids) != list(responses.stimulus_ids):
            findings.append(
                name_tampering(
                    "predictions", "they are of other images than the test trials", name_fold(number)
                )
            )
            continue
        rows = np.arange(len(stored))
        # Some encoders align a new subject by all of its trials, so that a few of them are predicted otherwise.
        whole = run.thorough or not again.encoder.trains_in_processes or fitted.encoder.label_free_subjects
        if len(rows) > MOST_PREDICTED and not whole:
            rows = np.unique(np.linspace(0, len(rows) - 1, MOST_PREDICTED).astype(int))
            reason = f"{len(rows)} of {len(stored)} were recomputed; add --refit"
            run.state("prediction", "by record", f"the other predictions of fold {number}", reason)
        made = fitted.encoder.predict(responses.select(rows))
        off, first = compare_vectors(made.flat(), stored.flat()[rows])
        limit = NETWORK_TOLERANCE if again.encoder.trains_in_processes else LINEAR_TOLERANCE
        if not off <= limit or made.space != stored.space:
            text = (
                f"the prediction of trial {rows[first]} ({stored.ids[rows[first]]}) is not what the encoder makes of "
                f"its responses (off by {off:.2g} of the spread of predictions)"
            )
            findings.append(name_tampering("predictions", text, name_fold(number)))
        run.state("prediction", "recomputed", "predictions")
    ok = AuditFinding(
        "predictions", "ok", "predictions are those of the stored encoders for the test trials."
    )
    return findings or [ok]


def check_ranks(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Rank the stored predictions again."""
    if again.config.decodes_categories or run.retrieved is None:
        return []
    again.require_current(run.retrieved)
    findings, tables = [], []
    gallery = decoding.choose_gallery(again)
    for number, source in enumerate(decoding.list_gallery_sources(again)):
        stored_at, folder = (
            run.retrieved.path / preparing.name_fold(number),
            again.folder.path / f"ranks{number}",
        )
        folder.mkdir()
        predicted = store.read_embeddings(stored_at)
        subjects = learning.pick_test_trials(again, number).trials["subject"].to_numpy(dtype=object)
        tables.append(decoding.rank_predictions(source, number, predicted, subjects, gallery, folder))
        made, stored = read_retrieval(folder), _read_stored_ranks(stored_at)
        if isinstance(stored, str):
            findings.append(name_tampering("ranks", stored, name_fold(number)))
            continue
        for name in ("query_ids", "gallery_ids", "space"):
            if not np.array_equal(np.asarray(getattr(made, name)), np.asarray(getattr(stored, name))):
                findings.append(
                    name_tampering(
                        "ranks", f"{name} of retrieval.json are not those of the fold", name_fold(number)
                    )
                )
        if not findings and (text := _compare_ranks(source, predicted, subjects, made, stored)):
            findings.append(name_tampering("ranks", text, name_fold(number)))
        # The table must be that of the arrays, whichever of them was changed.
        tables[-1]["rank"], tables[-1]["worst_rank"] = stored.ranks, stored.worst_ranks
        names = np.asarray(stored.gallery_ids, dtype=object)
        tables[-1]["top_ids"] = [list(names[row]) for row in stored.top_indices]
    if not findings:
        told = pd.read_parquet(run.retrieved.path / "ranks.parquet")
        if text := compare_tables(told, pd.concat(tables, ignore_index=True), tolerance=COSINE_TOLERANCE):
            findings.append(name_tampering("ranks", f"ranks.parquet: {text}"))
    run.state("score", "recomputed", "ranks")
    return findings or [AuditFinding("ranks", "ok", "ranks match the stored predictions in their gallery.")]


def _read_stored_ranks(folder: Path) -> Any:
    try:
        return read_retrieval(folder)
    except Exception as error:  # arrays of other shapes, missing keys, texts for lists
        return f"the stored ranks cannot be read ({str(error).rstrip('.')})"


def _compare_ranks(
    source: decoding.GallerySource, predicted: Embeddings, subjects: np.ndarray, made: Any, stored: Any
) -> str:
    """Say how stored ranks differ from those made here by more than rounding may; an empty text if they do not."""
    if made.top_indices.shape != stored.top_indices.shape or made.n_above.shape != stored.n_above.shape:
        return "the stored ranks have another shape"
    off = np.abs(made.true_similarities - stored.true_similarities)
    if not (off <= COSINE_TOLERANCE).all():
        row = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
        told, computed = (float(ranked.true_similarities[row]) for ranked in (stored, made))
        return f"the similarity of trial {row} is {told:.4g}, but {computed:.4g} by its prediction"
    for part in decoding.split_by_gallery(source, predicted, subjects, made):
        same = (
            (made.n_above[part.rows] == stored.n_above[part.rows])
            & (made.n_tied[part.rows] == stored.n_tied[part.rows])
            & (made.top_indices[part.rows] == stored.top_indices[part.rows]).all(axis=1)
            & (np.abs(made.top_similarities - stored.top_similarities)[part.rows] <= COSINE_TOLERANCE).all(
                axis=1
            )
        )
        if same.all():
            continue
        gallery = normalise_rows(np.asarray(part.gallery.flat(), dtype=np.float64))
        for place in np.flatnonzero(~same):
            row = part.rows[place]
            # (n_gallery,)
            query = np.asarray(part.queries.flat()[place : place + 1], dtype=np.float64)
            cosines = gallery @ normalise_rows(query)[0]
            true, n = float(made.true_similarities[row]), int(stored.n_above[row])
            surely = int((cosines > true + COSINE_TOLERANCE).sum())
            perhaps = int((cosines >= true - COSINE_TOLERANCE).sum()) - 1
            top = stored.top_indices[row]
            fits = surely <= n <= n + int(stored.n_tied[row]) <= perhaps and len(set(top.tolist())) == len(
                top
            )
            listed = (top >= 0).all() and (top < len(cosines)).all()
            near = listed and (np.abs(cosines[top] - made.top_similarities[row]) <= COSINE_TOLERANCE).all()
            if not fits:
                return f"trial {row} ranks {stored.ranks[row]:g}, but {made.ranks[row]:g} by its prediction"
            if not near:
                return f"the first ranks of trial {row} have other images"
    return ""


# --- images -----------------------------------------------------------------------------------------------


def check_images(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Decode images again, from the stored predictions and what the run keeps of its prior and generator."""
    record = run.reconstructed
    if again.config.decodes_categories:
        run.state("material", "recomputed", "nothing: classes are decoded")
        return []
    if record is None:
        run.state("material", "not verified", "images", "the run has decoded no images yet")
        return []
    again.require_current(record)
    images = decoding.reconstruct(again)
    findings, start = [], 0
    # Earlier versions brought all images to one size.
    earlier = not (record.path / INDEX).is_file()
    dear = again.generator.n_steps is not None and not run.thorough
    for number in range(len(run.trained)):
        predicted, embeddings = decoding.predict_for_generator(again, number)
        rows = slice(start, start + len(predicted))
        start = rows.stop
        if list(images.ids[rows]) != list(predicted.ids):
            findings.append(
                name_tampering(
                    "images", "rows.parquet lists images that differ from the tested ones", name_fold(number)
                )
            )
            break
        made = {"seen": ImageRows(run.stimuli, run.stimuli.find_rows(map(str, predicted.ids)))}
        with tempfile.TemporaryDirectory() as folder:
            if not dear:
                made |= _draw_again(run, again, record, number, predicted, embeddings, Path(folder))
            for name, stack in made.items():
                stored = images.seen if name == "seen" else images.images.get(name)
                if stored is None:
                    continue
                resized = stack.resize(*images.size) if earlier else stack
                if item := compare_images(name, resized, stored[rows], predicted.ids):
                    findings.append(replace(item, where=name_fold(number)))
    if start != len(images.seen) and not findings:
        findings.append(
            name_tampering("images", f"{len(images.seen)} images are stored of {start} test trials")
        )
    if "shuffled" in images.images and not findings:
        order = derange(images.ids, make_generator(again.config.seed, "shuffled"))
        shuffled, decoded = images.images["shuffled"], images.images["decoded"]
        if any((np.asarray(shuffled[k]) != np.asarray(decoded[row])).any() for k, row in enumerate(order)):
            findings.append(
                name_tampering("images", "the shuffled images are not the decoded ones in another order")
            )
    run.state("material", "recomputed", "seen images")
    if dear:
        run.state(
            "material",
            "by record",
            f"images of {again.config.generator.kind}",
            "a diffusion model; add --refit",
        )
    else:
        run.state("material", "recomputed", "decoded images and controls")
    return findings or [
        AuditFinding("images", "ok", "images are those of the stored predictions and stimuli.")
    ]


def _draw_again(
    run: AuditedRun,
    again: RecomputedRun,
    record: Record,
    number: int,
    predicted: Embeddings,
    embeddings: Embeddings,
    folder: Path,
) -> dict[str, ImageRows]:
    """Return the images of a fold by every method, as `reconstruct` made them; they lie in `folder`."""
    config = again.config
    data = decoding.make_generator_data(again, number, embeddings, Context(device=config.retrieval.device))
    tested = embeddings.select(pd.unique(predicted.ids))
    fitted = open_fits(record.path / "fits" / preparing.name_fold(number), config, data, tested, number)
    fold = decoding.make_tested_fold(again, number, predicted, embeddings)
    with decoding.open_writer(again, folder / "drawn", len(predicted)) as writer:
        part = draw_images(config, data, run.stimuli, fold, fitted, writer)
        rows = decoding.write_images(again, folder, writer, [part], find_comparison_size(*data.image_size))
    images, _ = read_image_rows(folder, rows, run.stimuli)
    # Of all rows of a run, shuffled; here are those of one fold.
    return {name: shown for name, shown in images.items() if name != "shuffled"}
