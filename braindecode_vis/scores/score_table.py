"""The table of scores of a run: retrieval and reconstruction, system and controls, with chance and intervals.

Owns which metric is asked of which method. Everything comes as plain arrays: predictions with their galleries,
and images row by row. Statistics are those of `braindecode_vis.metrics`; nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from braindecode_vis.arrays import Score
from braindecode_vis.scores.image_scores import encode_images, score_features, score_images
from braindecode_vis.scores.retrieval_scores import score_classes, score_retrieval
from braindecode_vis.scores.scoring_task import POOLED, Context, ScoringTask
from braindecode_vis.scores.suite_scores import score_suite

__all__ = ["ScoringTask", "compute_scores"]


def compute_scores(
    task: ScoringTask, *, advance: Callable[[int], None] = lambda n: None
) -> tuple[list[Score], pd.DataFrame]:
    """Score a task.

    Returns
    -------
    scores
        Method ``decoded`` first within each metric, then the controls; one block per subject.
    items : DataFrame of n_rows rows
        The decoded system's value of every metric for every item, draws averaged. Ties share the mean `rank`, and are
        lost in `worst_rank`, which decides top-k.
    """
    scores: list[Score] = []
    items = pd.DataFrame({"stimulus_id": task.ids, "concept": task.concepts, "subject": task.subjects})
    items["rank"] = np.concatenate([retrieval.ranks for _, _, retrieval in task.retrievals])
    items["worst_rank"] = np.concatenate([retrieval.worst_ranks for _, _, retrieval in task.retrievals])
    items["gallery_size"] = np.concatenate(
        [np.full(r.n_queries, r.gallery_size) for _, _, r in task.retrievals]
    )
    features = encode_images(task)
    contexts = [Context(task, group) for group in task.groups]
    of_suite = score_suite(task, contexts, advance=advance)
    for number, (group, context) in enumerate(zip(task.groups, contexts, strict=True)):
        scores += [*score_retrieval(context), *score_classes(context)]
        advance(1)
        for method, images in task.images.items():
            if method == "shuffled":  # shown in the gallery; its scores are those of the permutation null
                advance(1)
                continue
            kept = group.condition is None and group.subject != POOLED
            for score, values in [
                *score_images(context, method, images[group.rows]),
                *of_suite.get((number, method), []),
            ]:
                scores.append(score)
                if score.method == "decoded" and kept:
                    items.loc[group.rows, score.metric] = values
            if features is not None:
                scores += [score for score, _ in score_features(context, method, features)]
            advance(1)
    return scores, items
