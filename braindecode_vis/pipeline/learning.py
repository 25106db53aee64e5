"""From trials and targets to fitted encoders: the stage train, and predictions of training trials out of fold.

What is fitted here is fitted on training trials and training images. A tested subject whose other recordings the
encoder was pretrained on is refused, or named in the protocol. Test trials are read by `decoding`, by `categories` and
by the scores of `scoring`, after everything is fitted.

`train` writes one artifact per fold, ``stages/train/fold00-FINGERPRINT``: the files of the fitted encoder, and the
chosen features if there is a selection. While it works, checkpoints lie in ``work/train00-DIGEST``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.contracts import BrainEncoder, Context
from braindecode_vis.base.devices import count_launched
from braindecode_vis.base.memory import release_pages
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.pipeline import categories
from braindecode_vis.pipeline.galleries import order_by_gallery
from braindecode_vis.pipeline.preparing import (
    build_encoder,
    count_folds,
    describe_start,
    embed,
    embed_fold,
    lend_stimuli,
    name_classes,
    name_fold,
    pick_labelled_trials,
    preprocess,
    pretrain_fold,
)
from braindecode_vis.pipeline.runs import (
    Run,
    lend_context,
    remember,
)
from braindecode_vis.preprocessing.selection import Selection, fit_selection

if TYPE_CHECKING:
    from braindecode_vis.pipeline.synthetic import SyntheticTrials


@dataclass(frozen=True)
class TrainedFold:
    """A fitted brain encoder, and the features it was given."""

    artifact: store.Artifact
    encoder: BrainEncoder
    selection: Selection | None = None

    def select(self, responses: Responses) -> Responses:
        """Return trials with the features that the encoder takes."""
        return responses if self.selection is None else self.selection.apply(responses)


@dataclass(frozen=True)
class OutOfFold:
    """Predictions of the training trials of one fold by fits that have not seen their images."""

    artifact: store.Artifact
    predicted: Embeddings


@remember
def train(run: Run) -> list[Any]:
    """Fit the brain encoder, or the category decoder, of every fold on its training trials."""
    if not run.config.decodes_categories:
        embed(run)
    n_folds = count_folds(run)
    if n_folds == 1:
        return [train_fold(run, 0)]
    fitted = []
    with run.listener.progress("encoders of folds", n_folds) as advance:
        for number in range(n_folds):
            fitted.append(train_fold(run, number))
            advance(1)
    return fitted


def train_fold(run: Run, number: int) -> Any:
    """Fit the brain encoder, or the category decoder, of one fold on its training trials."""
    return run.once(f"train {number}", lambda: _fit_fold(run, number))


def _fit_fold(run: Run, number: int) -> TrainedFold | categories.TrainedDecoder:
    config, prepared = run.config, preprocess(run)
    if config.decodes_categories:
        return categories.train_categories(
            run, name_classes(prepared), prepared.split, prepared.artifact.fingerprint, number
        )
    describe_start(run)  # who may not be shared is told before a training
    bank = embed_fold(run, number)
    fields = {
        "encoder": config.encoder.hashed_fields(),
        "selection": config.selection.hashed_fields(),
        # Only where an objective reads text, so that its settings change no other fingerprint.
        **({"text": config.text.hashed_fields()} if run.encoder.reads_text else {}),
        "repeats": config.repeats.train,
        "seed": config.seed,
        "fold": number,
    }
    upstream = {"preprocess": prepared.artifact.fingerprint, "embed": bank.artifact.fingerprint}
    if (pretrained := pretrain_fold(run, number)) is not None:
        upstream["pretrain"] = pretrained.fingerprint
    made: SyntheticTrials | None = None
    if config.synthetic is not None:
        from braindecode_vis.pipeline.synthetic import hash_settings, synthesise_fold

        made = synthesise_fold(run, number)
        fields["synthetic"] = hash_settings(run)
        upstream["synthesise"] = made.artifact.fingerprint

    def compute(folder: Path) -> dict[str, Any]:
        rows = prepared.folds[number].train
        selection = None
        if not config.selection.is_empty:
            # On single trials, before averaging: repetitions are what reliability is measured by.
            single, encoded = prepared.responses.select(rows), None
            if config.selection.encoding is not None:
                encoded = bank.embeddings.select(list(pd.unique(single.stimulus_ids)))
            seed = derive_seed(config.seed, "selection")
            selection = fit_selection(config.selection, single, encoded, seed=seed)
        responses = pick_labelled_trials(prepared, rows, config.repeats.train)
        targets = bank.embeddings.select(list(responses.stimulus_ids))
        if made is not None:
            from braindecode_vis.pipeline.synthetic import add_synthetic, join_embeddings

            responses, targets = (
                add_synthetic(responses, made.responses),
                join_embeddings(targets, made.targets),
            )
        if selection is not None:
            responses = selection.apply(responses)
        with lend_context(run, f"train{number:02d}", [fields, upstream]) as context:
            if made is not None:
                context = replace(context, fitted_responses=made.fitted)
            encoder = build_encoder(run, number, context)
            encoder.fit(responses, targets)
            if not run.follows:
                if selection is not None:
                    selection.write(folder / "selection")
                encoder.write(folder)
        release_pages(prepared.responses.data)  # which the next stages read little of
        return {"n_trials": responses.n_trials, "n_processes": count_launched()}

    artifact = run.produce("train", fields, upstream, compute, name_fold(number))
    # Read back even where it was just fitted, so that a resumed run predicts with the very same numbers.
    selection = None if config.selection.is_empty else Selection.read(artifact.path / "selection")
    encoder = roles.read(BrainEncoder, run.encoder, artifact.path)
    encoder.bind(Context(images=prepared.stimuli, device=config.retrieval.device))
    return TrainedFold(artifact, encoder, selection)


@remember
def predict_out_of_fold(run: Run) -> list[OutOfFold]:
    """Predict the training trials of every fold by fits that have not seen their images.

    Priors and generators learn from these: predictions of what an encoder has learnt are too good for that. They can
    cost more than the fit, and are made where something learns from them; see `needs_predictions`.
    """
    return [predict_fold(run, number) for number in range(len(preprocess(run).folds))]


def needs_predictions(run: Run) -> bool:
    """Say whether the prior, the generator or a decoder of captions learns from predictions of training trials."""
    if run.config.decodes_categories:
        return False
    captions = any(each.needs_predictions for each in run.config.reconstruction.captions)
    return captions or roles.need_predictions(run.prior, run.generator)


def predict_fold(run: Run, number: int) -> OutOfFold:
    """Predict the training trials of one fold; see `predict_out_of_fold`."""
    fitted = train_fold(run, number)
    kept = fitted.artifact.path / "out_of_fold"
    if kept.is_dir() and store.read_provenance(fitted.artifact.path / store.PROVENANCE).get("version", 0) < 3:
        # Earlier versions made them with the fit.
        return OutOfFold(fitted.artifact, store.read_embeddings(kept))
    upstream = {"train": fitted.artifact.fingerprint}

    def compute(folder: Path) -> None:
        responses, targets = pick_training(run, number)
        with lend_context(run, f"out_of_fold{number:02d}", upstream) as context:
            # Not the encoder of `train`, which others ask meanwhile.
            encoder = roles.read(BrainEncoder, run.encoder, fitted.artifact.path)
            encoder.bind(lend_stimuli(run, number, context))
            predicted = encoder.predict_out_of_fold(responses, targets)
            if not run.follows:
                store.write_embeddings(folder, predicted)

    artifact = run.produce("out_of_fold", {}, upstream, compute, name_fold(number))
    return OutOfFold(artifact, store.read_embeddings(artifact.path))


def pick_training(run: Run, number: int) -> tuple[Responses, Embeddings]:
    """Return the training trials of a fold and their targets, as its encoder was fitted on them."""
    prepared = preprocess(run)
    responses = pick_labelled_trials(prepared, prepared.folds[number].train, run.config.repeats.train)
    responses = train_fold(run, number).select(responses)
    return responses, embed_fold(run, number).embeddings.select(list(responses.stimulus_ids))


def pick_test_trials(run: Run, number: int) -> Responses:
    """Return the test trials of one fold as its encoder takes them."""
    prepared, fitted = preprocess(run), train(run)[number]
    responses = pick_labelled_trials(prepared, prepared.folds[number].test, run.config.repeats.test)
    return fitted.select(order_by_gallery(fitted.encoder, responses))
