"""The low-level branch of `reconstruct`: another target and another encoder over the same trials, its latents decoded.

Owns what the branch shares with the run it belongs to: recording, split, columns, folder and seed. Its fits are
artifacts of their own, and `reconstruct` names them as its upstream.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from braindecode_vis.pipeline.galleries import order_by_gallery
from braindecode_vis.pipeline.learning import embed, pick_labelled_trials, preprocess, train
from braindecode_vis.pipeline.runs import Run
from braindecode_vis.seeds import derive_seed


def open_low_level(run: Run) -> Run | None:
    """Return the branch as a run that trains; None without one."""
    branch = run.config.reconstruction.low_level
    if branch is None:
        return None
    changes = {
        "target": branch.target,
        "encoder": branch.encoder,
        "reconstruction": type(run.config.reconstruction)(),
    }
    low = run.once("low level", lambda: Run(run.config.model_copy(update=changes), run.folder, run.listener))
    # The same trials; to prepare them again would put the branch's settings into the folder's config.yaml.
    low.seen["preprocess"] = preprocess(run)
    return low


def name_fits(run: Run) -> dict[str, str]:
    """Fit the branch on every fold, and return the fingerprints of the fits as upstream of `reconstruct`."""
    low = open_low_level(run)
    folds = [] if low is None else train(low)
    return {f"low_level{number}": fold.artifact.fingerprint for number, fold in enumerate(folds)}


def make_low_level(run: Run, number: int) -> np.ndarray | None:
    """Return the images of the branch for the test trials of one fold, row by row those of the run's own encoder.

    Returns
    -------
    uint8 array of shape (n_rows, height, width, 3), or None without a branch
    """
    from braindecode_vis.generators.generator_data import GeneratorData
    from braindecode_vis.generators.inversion import LatentsConfig

    low = open_low_level(run)
    if low is None:
        return None
    prepared, bank, fitted = preprocess(run), embed(low)[number], train(low)[number]
    fold = prepared.folds[number]
    trials = pick_labelled_trials(prepared, fold.test, run.config.repeats.test)
    trials = order_by_gallery(train(run)[number].encoder, trials)
    if fitted.selection is not None:
        trials = fitted.selection.apply(trials)
    ids = pd.unique(prepared.responses.stimulus_ids[fold.train])
    data = GeneratorData(bank.encoder, bank.embeddings.select(ids), prepared.stimuli.select(ids))
    generator = LatentsConfig().build(data)
    return generator.generate(
        fitted.encoder.predict_for_generator(trials), seed=derive_seed(run.config.seed, "low level")
    )
