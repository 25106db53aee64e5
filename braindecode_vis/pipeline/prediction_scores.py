"""Scores of a finished run on new trials whose true picture or class is known.

Pictures that the run was trained on are scored apart from those that are new to it: finding a picture of the training
again is another question than finding one that was never seen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import SCORE_KEYS
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import ImageRows, Images
from braindecode_vis.pipeline.preparing import preprocess

NEW_PICTURES, TRAINED_PICTURES = "new pictures", "pictures of the training"


def score_predictions(result: Any) -> pd.DataFrame:
    """Return the score rows of new trials; an empty table where nothing is known of the truth."""
    rows = _score_categories(result) if result.decisions is not None else _score_pictures(result)
    return pd.DataFrame([score.as_row() for score in rows], columns=list(SCORE_KEYS))


def _score_pictures(result: Any) -> list[Any]:
    from braindecode_vis.scoring.score_table import ScoringTask, compute_scores

    known = result._list_known()
    if not known:
        return []
    rows = np.concatenate([part.rows[own] for part, own, _ in known])
    config, prepared = result.run.config, preprocess(result.run)
    trained = np.concatenate([prepared.responses.stimulus_ids[prepared.folds[n].train] for n in result.folds])
    ids = result.trials["stimulus_id"].to_numpy(dtype=object)[rows]
    # By the ids of the run; a picture under another name counts as new.
    is_trained = np.isin(ids.astype(str), trained.astype(str))
    split = "new trials"
    if (
        is_trained.all() or not is_trained.any()
    ):  # otherwise each kind has rows of its own beside those of both
        split = f"{split}, {TRAINED_PICTURES if is_trained.all() else NEW_PICTURES}"
    pictures, images = _find_seen(result, ids), {}
    # Where no picture is at hand, images are compared with nothing.
    seen: Images = np.zeros((len(rows), 1, 1, 3), np.uint8)
    if pictures is not None:
        seen, images = pictures, {"decoded": result.reconstructions[rows]}
    evaluation = config.evaluation
    features = evaluation.features if images else None
    task = ScoringTask(
        retrievals=[
            (type(p.queries)(p.queries.vectors[own], p.queries.ids[own], p.queries.space), p.gallery, ranked)
            for p, own, ranked in known
        ],
        seen=seen, images=images, ids=ids, concepts=result.trials["concept"].to_numpy(dtype=object)[rows],
        subjects=result.trials["subject"].to_numpy(dtype=object)[rows], decoded_concepts=None,
        feature_encoder=None if features is None else features.build(),
        feature_name="" if features is None else features.kind, protocol=result.protocol, split=split,
        seed=config.seed, n_bootstrap=evaluation.n_bootstrap, n_permutations=evaluation.n_permutations,
        conditions=np.where(is_trained, TRAINED_PICTURES, NEW_PICTURES).astype(object),
    )  # fmt: skip
    scores, _ = compute_scores(task)
    if result.candidates.texts:  # another gallery than one of pictures, by its name too
        scores = [replace(score, metric=f"{score.metric}@descriptions") for score in scores]
    return scores


def _find_seen(result: Any, ids: np.ndarray) -> ImageRows | None:
    """Return the true pictures, or None if one is not available."""
    if any(result.read_picture(name) is None for name in map(str, pd.unique(ids))):
        return None
    stimuli = result.candidates.stimuli
    return ImageRows(stimuli, stimuli.find_rows(map(str, ids)))


def _score_categories(result: Any) -> list[Any]:
    from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
    from braindecode_vis.scoring.label_exchange import exchange_subjects

    assert result.decisions is not None
    trials, classes = result.trials, tuple(result.decisions.columns)
    # A class that no decoder has learnt cannot be hit, and would only count as wrong.
    rows = np.flatnonzero(trials["concept"].astype(str).isin(classes))
    if not len(rows):
        return []
    trials = trials.iloc[rows]
    config = result.run.config
    decisions, labels = (
        result.decisions.to_numpy()[rows],
        trials["concept"].astype(str).to_numpy(dtype=object),
    )
    subjects, most = trials["subject"].astype(str).to_numpy(dtype=object), config.evaluation.n_permutations
    task = CategoryTask(
        decisions=decisions, classes=classes, labels=labels,
        runs=trials[["session", "run"]].astype(str).agg("/".join, axis=1).to_numpy(dtype=object),
        subjects=subjects, protocol=result.protocol, split="new trials", seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap, n_permutations=most,
        exchanged=exchange_subjects(
            subjects, labels, classes, decisions, most=most, generator=make_generator(config.seed, "exchanged labels")
        ),
    )  # fmt: skip
    return compute_category_scores(task)[0]
