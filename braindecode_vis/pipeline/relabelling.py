"""Folds that share training trials: the training images of each fold, and ranks after refits on relabelled images.

A p-value after K folds needs a null in which images are relabelled before folding and everything that follows is done
again. Encoders that are linear in the targets say what they would predict as weights of targets (`map_labels`), so that
a refit costs one product; for all others scores fall back on a wider null (see `scoring.scoring_task.Folding`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from braindecode_vis.base.seeds import make_generator
from braindecode_vis.pipeline.decoding import (
    choose_gallery,
    list_gallery_sources,
    remembers_candidates,
    retrieve,
)
from braindecode_vis.pipeline.galleries import GallerySource
from braindecode_vis.pipeline.learning import pick_test_trials, pick_training
from braindecode_vis.pipeline.preparing import build_encoder, embed, preprocess
from braindecode_vis.pipeline.runs import Run
from braindecode_vis.scoring.refits import Refits, RelabelledFold, rank_relabelled
from braindecode_vis.scoring.scoring_task import Folding
from braindecode_vis.scoring.uncertainty import permute_within
from braindecode_vis.scoring.units import Units, find_exchangeable

MOST_REFITS, FEWEST_REFITS = 1000, 199
#: Most multiplications of all refits together, about a minute; n images take 2 n^3 for each.
MOST_PRODUCTS = 2e11


def describe_folding(run: Run, units: Units | None) -> Folding | None:
    """Return what folds do to the scores of a run; None if there is one test set.

    Parameters
    ----------
    run
        A run that finds images.
    units
        What its intervals resample, if not images.
    """
    prepared, retrieved = preprocess(run), retrieve(run)
    if len(prepared.folds) < 2:
        return None
    ids = prepared.responses.stimulus_ids.astype(str)
    numbers = [number for number, fold in enumerate(retrieved.folds) for _ in fold.parts]
    taught = [frozenset(ids[fold.train].tolist()) for fold in prepared.folds]
    whole = choose_gallery(run)[0]
    remembered = whole is not None and remembers_candidates(ids, prepared.folds)
    refits = refit_relabelled(run, units)
    how = "images are permuted within folds, the null widened by sqrt 2 (conservative)"
    if refits is not None:
        how = f"{len(refits.n_above)} refits on relabelled images in retrieval, elsewhere {how}"
    words = "; ".join(
        [
            "images identified after the training mean of the fold (centred), among "
            + ("those of all folds" if whole is not None else "those of the fold"),
            f"p-values: {how}",
            "intervals widened by sqrt 2",
        ]
    )
    return Folding(
        numbers, [taught[number] for number in numbers], within=whole is None, remembered=remembered, words=words,
        refits=refits,
    )  # fmt: skip


def refit_relabelled(run: Run, units: Units | None) -> Refits | None:
    """Return ranks after refits on relabelled images; None unless predictions are linear in targets that folds share.

    Parameters
    ----------
    run, units
        As for `describe_folding`.
    """
    config, prepared, retrieved, banks = run.config, preprocess(run), retrieve(run), embed(run)
    ids = prepared.responses.stimulus_ids.astype(str)
    images = list(
        pd.unique(np.concatenate([ids[rows] for f in prepared.folds for rows in (f.train, f.test)]))
    )
    n_refits = int(min(MOST_REFITS, config.evaluation.n_permutations, MOST_PRODUCTS / (2 * len(images) ** 3)))
    # Images that a fold has seen it recognises under any label, so that no label is a null. What is chosen or fitted by
    # the targets of training images would have to be chosen anew for every labelling.
    if (
        any(not set(ids[fold.train]).isdisjoint(ids[fold.test]) for fold in prepared.folds)
        or n_refits < min(FEWEST_REFITS, config.evaluation.n_permutations)
        or len({bank.embeddings.space for bank in banks}) > 1
        or config.retrieval.centre == "zscore"
        or config.synthetic is not None
        or config.selection.encoding is not None
    ):
        return None
    sources = list_gallery_sources(run)
    place = pd.Index(images)
    folds = []
    with run.listener.progress(f"{n_refits} refits", len(sources) + n_refits) as advance:
        for number, source in enumerate(sources):
            test = pick_test_trials(run, number)
            found = build_encoder(run, number).map_labels(pick_training(run, number)[0], test, images)
            if found is None or source.per_subject:
                return None
            own = place.get_indexer(pd.Index(test.stimulus_ids.astype(str)))
            gallery = place.get_indexer(pd.Index(retrieved.folds[number].retrieval.gallery_ids.astype(str)))
            folds.append(RelabelledFold(*found, own, gallery, _weigh_centre(source, place)))
            advance(1)
        vectors = sources[0].map_targets(sources[0].bank.select(images), None).flat().astype(np.float64)
        if (
            config.retrieval.centre == "mean"
        ):  # a common shift changes nothing then, and products lose fewer digits
            vectors -= vectors.mean(axis=0)
        return rank_relabelled(
            folds, vectors @ vectors.T, _draw_orders(run, images, units, n_refits), advance=advance
        )


def _weigh_centre(source: GallerySource, place: pd.Index) -> np.ndarray:
    """Return the weights of images in what is taken off predictions and candidates of a fold."""
    weights = np.zeros(len(place))
    if source.settings.centre == "mean":
        weights[place.get_indexer(pd.Index(source.train_ids).astype(str))] = 1 / len(source.train_ids)
    return weights


def _draw_orders(run: Run, images: Sequence[str], units: Units | None, n: int) -> np.ndarray:
    """Return whose target each image gets, (n, n_images): tested images change places, as their units allow."""
    tested = np.concatenate([fold.predicted.ids.astype(str) for fold in retrieve(run).folds])
    known = find_exchangeable(tested, units) or dict.fromkeys(tested.tolist(), 0)
    labels = np.array([known.get(name, -1) for name in images])
    # Images that are only trained on stay in place.
    blocks = [np.flatnonzero(labels == label) for label in np.unique(labels) if label >= 0]
    orders = np.tile(np.arange(len(images)), (n, 1))
    moving = np.concatenate(blocks)
    drawn = permute_within(
        np.arange(len(images)), blocks, n, make_generator(run.config.seed, "relabelled images")
    )
    orders[:, moving] = drawn[:, moving]
    return orders
