"""A small contrastive network beside ridge on the handwritten sixes and nines, ten folds, paired.

    braindecode-vis run digits69_ridge_10fold --root ROOT --out RIDGE
    python benchmarks/studies/digits_network.py --root ROOT --ridge RIDGE --out FOLDER

Of each candidate (voxels x weight of the squared error) a run is made by the configuration ``digits69_network_10fold``.
In each fold the candidate is taken whose predictions of *training* images, by networks that did not learn from them
(``out_of_fold``), find their image best within its class; only its predictions of the fold's test images count.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.config import read_config
from braindecode_vis.parts.studies.compare import read_items
from braindecode_vis.pipeline import embed, preprocess
from braindecode_vis.pipeline.learning import predict_out_of_fold
from braindecode_vis.pipeline.runs import Run, open_run
from braindecode_vis.scoring.crossed import interval_of_rows, paired_difference
from braindecode_vis.scoring.metrics.identification import two_way_identification

VOXELS = ("{encoding: {n_best: 400}}",)
WEIGHTS = (10, 1000)
METRICS = ("top1", "two_way_identification_within_class", "pixcorr", "mse")


def score_training_images(run: Run) -> list[float]:
    """Return, for each fold, two-way identification within the class of training images predicted out of fold."""
    prepared, found = preprocess(run), []
    for bank, part in zip(embed(run), predict_out_of_fold(run), strict=True):
        predicted = part.predicted
        truth = bank.embeddings.select(list(predicted.ids))
        classes = prepared.stimuli.concepts_of(predicted.ids)
        found.append(
            float(two_way_identification(truth.vectors, predicted.vectors, groups=list(classes)).mean())
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--ridge", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scores, tables, names = [], [], []
    for number, (voxels, weight) in enumerate(product(VOXELS, WEIGHTS)):
        folder = options.out / f"candidate{number}"
        changes = [
            f"selection={voxels}", f"encoder.objectives=[{{kind: clip}}, {{kind: mse, weight: {weight}}}]",
            f"seed={options.seed}",
        ]  # fmt: skip
        run = open_run(read_config("digits69_network_10fold", changes, root=options.root), folder)
        scores.append(score_training_images(run))
        tables.append(read_items(folder).set_index("stimulus_id"))
        names.append(f"{voxels}, {weight}")
        folds = preprocess(run).split.folds
        ids = preprocess(run).responses.stimulus_ids
    best = np.argmax(np.array(scores), axis=0)
    for number, choice in enumerate(best):
        print(f"fold {number}: {names[choice]}, {scores[choice][number]:.3f} on training images")
    chosen = pd.concat([tables[c].loc[list(ids[fold.test])] for c, fold in zip(best, folds, strict=True)])
    ridge = read_items(options.ridge).set_index("stimulus_id").loc[chosen.index]
    for metric in [name for name in METRICS if name in chosen]:
        new, old = chosen[metric].to_numpy(float), ridge[metric].to_numpy(float)
        own, gain = interval_of_rows(new, over_folds=True), paired_difference(new, old, over_folds=True)
        # Predictions that share distractors have the jackknife, in the table of the run that was chosen.
        limits = "" if "identification" in metric else f" ({own.low:.3f} to {own.high:.3f})"
        print(
            f"{metric}: {new.mean():.3f}{limits}, ridge {old.mean():.3f}, difference "
            f"{gain.mean:+.3f} ({gain.interval.low:+.3f} to {gain.interval.high:+.3f}), p = {gain.p_value:.4f}"
        )


if __name__ == "__main__":
    main()
