"""Attributes of a phantom against its planted stages: does each rise when the stage that carries it does.

    braindecode-vis phantom things-eeg2 --size demo --concepts 320 --exemplars 4 --test-concepts 200 \
        --test-repetitions 20 --snr 0.05 --out PHANTOM
    python benchmarks/studies/attributes.py PHANTOM --out FOLDER
    braindecode-vis run phantom_eeg --root PHANTOM \
        --set "target={kind: conditional, attributes: FOLDER/attributes.csv}" \
        --set "prior={kind: identity}" --set "generator={kind: nearest}" --set "evaluation={}" --out RUN
    braindecode-vis analyze RUN --set "analyses=[{kind: attributes, attributes: FOLDER/attributes.csv, tmax: 0.6}]"

The truth folder holds what drives each stage of the simulated response: Gabor energy (early), colour and contrast
(mid), image embeddings (semantic). Beside the attributes that images really show, the written table has one attribute
per stage: on which side of the median an image lies on the first component of that drive, after a ridge has taken out
of mid what early tells, and out of semantic what early and mid tell. For every attribute it is printed how well the
drives themselves tell it on test images (area under the ROC curve), so that what is expected is known before any
response is looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.embeddings.attribute_table import read_attributes
from braindecode_vis.embeddings.conditional import fit_ridge

STAGES = ("early", "mid", "semantic")


def residualise(
    drive: np.ndarray, others: list[np.ndarray], train: np.ndarray, concepts: np.ndarray
) -> np.ndarray:
    """Return the drive without what a ridge on training images predicts of it from others."""
    if not others:
        return drive
    x = np.concatenate(others, axis=1)
    weights, _ = fit_ridge(x[train], drive[train], concepts[train])
    left: np.ndarray = drive - drive[train].mean(axis=0) - (x - x[train].mean(axis=0)) @ weights
    return left


def split_first_component(drive: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return on which side of the median of training images each image lies on the first component."""
    mean = drive[train].mean(axis=0)
    direction = np.linalg.svd(drive[train] - mean, full_matrices=False)[2][0]
    scores = (drive - mean) @ direction
    return np.where(scores > np.median(scores[train]), "high", "low")


def measure_area(x: np.ndarray, codes: np.ndarray, train: np.ndarray, concepts: np.ndarray) -> float:
    """Return the area under the ROC curve on test images, the mean over values, each against the rest."""
    from sklearn.metrics import roc_auc_score

    known = codes >= 0
    values = np.intersect1d(codes[known & train], codes[known & ~train])
    y = (codes[:, None] == values).astype(float)
    rows = known & train
    weights, _ = fit_ridge(x[rows], y[rows], concepts[rows])
    scores = x @ weights
    test = known & ~train
    return float(np.mean([roc_auc_score(y[test, k], scores[test, k]) for k in range(len(values))]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phantom", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    truth = arguments.phantom / "phantom_truth"
    stimuli = pd.read_csv(truth / "stimuli.tsv", sep="\t", dtype=str)
    train, concepts = (stimuli["split"] == "train").to_numpy(), stimuli["concept"].to_numpy()
    drives = {name: np.load(truth / f"drive_{name}.npy").astype(float) for name in STAGES}
    # One row an image: NSD names test images a second time, for imagery.
    shown = pd.read_csv(truth / "attributes.csv", dtype=str, keep_default_na=False).set_index("id")
    ids = stimuli["stimulus_id"]
    if "nsd_id" in stimuli:
        ids = stimuli["nsd_id"].astype(int).map(lambda number: f"nsd{number + 1:05d}")
    table = shown.loc[ids].reset_index()
    if "superordinate" in stimuli:
        table["superordinate"] = stimuli["superordinate"].to_numpy()
    for number, name in enumerate(STAGES):
        others = [drives[earlier] for earlier in STAGES[:number]]
        left = residualise(drives[name], others, train, concepts)
        table[f"stage_{name}"] = split_first_component(left, train)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "attributes.csv", index=False)
    attributes = read_attributes(arguments.out / "attributes.csv")
    codes = attributes.codes_of(table["id"].tolist(), None)
    for position, name in enumerate(attributes.names):
        areas = [measure_area(drives[stage], codes[:, position], train, concepts) for stage in STAGES]
        print(
            f"{name:20s} "
            + "  ".join(f"{stage} {area:.3f}" for stage, area in zip(STAGES, areas, strict=True))
        )


if __name__ == "__main__":
    main()
