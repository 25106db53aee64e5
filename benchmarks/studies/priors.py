"""What a prior does to predictions: nearer to the images' embeddings, or not, and at what cost in identification.

    python benchmarks/studies/priors.py digits69_ridge_5fold --root ROOT --out runs/priors \\
        --set "target={kind: pca, n_components: 30}"

Runs the stages up to `retrieve`, fits each prior on out-of-fold predictions of training trials, and prints MMD to the
test images' embeddings (all folds together; components are turned back into pixels first, since folds have their own),
two-way identification and top-1 among the test images of the fold (cosine after the training mean), and how far two-way
identification is above that of the prediction itself, with a paired 95 % bootstrap interval over trials. `images` is
the MMD of as many training images, the level to reach.

The guidance of the diffusion prior is chosen by two-way identification of single draws on a quarter of the training
images that it was not fitted on; one that learns from images alone (``--diffusion simulated``) has its guidance fixed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.config import read_config
from braindecode_vis.generation.latent_diffusion_config import LatentDiffusionConfig
from braindecode_vis.generation.priors.closed_form import SpreadPriorConfig
from braindecode_vis.generation.priors.diffusion import DiffusionPrior
from braindecode_vis.generation.priors.diffusion_config import DiffusionPriorConfig
from braindecode_vis.generation.priors.image_source import ImageSourceSettings
from braindecode_vis.generation.priors.neighbours import NeighboursPriorConfig
from braindecode_vis.pipeline.learning import predict_out_of_fold
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.metrics.embedding import compute_mmd, find_bandwidth
from braindecode_vis.scoring.uncertainty import widen_limits

SMALL = {"widths": (256, 128, 64), "time_features": 64, "batch_size": 64, "warmup_steps": 100, "steps": 25}
# Guidance was chosen on concepts that are tested nowhere (docs/research/RESULTS.md).
SIMULATED = {
    "condition": "simulated", "widths": (512, 256, 128), "time_features": 64, "batch_size": 256, "min_steps": 8000,
    "epochs": 1, "warmup_steps": 200, "dropout": 0.0, "held_out": 0.0, "prediction": "v_prediction",
    "betas": "squaredcos_cap_v2", "sampler": "dpm-solver++", "steps": 20, "guidance": 2.0, "restandardise": False,
}  # fmt: skip
GUIDANCES, N_MEAN = (1.0, 2.0, 5.0), 16


def rank(queries: Embeddings, gallery: Embeddings, mean: np.ndarray) -> np.ndarray:
    """Return two-way identification and top-1 of each query by the cosine after the mean, shape (2, n_queries)."""
    left, right = (e.flat() - mean for e in (queries, gallery))
    left, right = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (left, right))
    similarity = left @ right.T
    place = {str(i): column for column, i in enumerate(gallery.ids)}
    own = np.array([place[str(i)] for i in queries.ids])
    worse = (similarity < similarity[np.arange(len(own)), own][:, None]).sum(axis=1)
    return np.stack([worse / (len(gallery) - 1), worse == len(gallery) - 1])


def average_draws(drawn: Embeddings, n: int) -> Embeddings:
    """Return the mean of the draws of each row."""
    vectors = drawn.vectors.reshape(-1, n, *drawn.vectors.shape[1:]).mean(axis=1)
    return Embeddings(vectors.astype(np.float32), drawn.ids[::n], drawn.space)


def fit_diffusion(config: DiffusionPriorConfig, pairs: Embeddings, training: Embeddings, seed: int):
    """Return the diffusion prior of the whole training part, its guidance chosen on a quarter kept aside."""
    names = np.random.default_rng(seed).permutation(np.unique(pairs.ids.astype(str)))
    aside = np.isin(pairs.ids.astype(str), names[: len(names) // 4])
    kept = Embeddings(pairs.vectors[~aside], pairs.ids[~aside], pairs.space)
    held = Embeddings(pairs.vectors[aside], pairs.ids[aside], pairs.space)
    own = training.select(list(dict.fromkeys(kept.ids)))
    first = config.build(seed=seed).fit(kept, training.select(list(kept.ids)), images=own)
    found = {}
    for guidance in GUIDANCES:
        first.drawing = replace(first.drawing, guidance=guidance)
        first.fitted = replace(first.fitted, samples=None)
        drawn = first.sample(held, n_draws=8, seed=seed)
        found[guidance] = rank(
            drawn, training.select(list(dict.fromkeys(held.ids))), own.flat().mean(axis=0)
        )[0].mean()
    best = max(found, key=found.get)
    chosen = config.model_copy(update={"guidance": best})
    return chosen.build(seed=seed).fit(pairs, training.select(list(pairs.ids)), images=training), best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--diffusion", choices=["none", "small", "atm", "simulated"], default="small")
    parser.add_argument("--images", default="training", help="training, generator, or a folder of embeddings")
    asked = parser.parse_args()
    run = open_run(read_config(asked.config, asked.set, root=asked.root), asked.out)
    prepared, banks, retrieved = pipeline.preprocess(run), pipeline.embed(run), pipeline.retrieve(run)
    out_of_fold = predict_out_of_fold(run)
    kept: dict[str, list[Made]] = {}
    true: list[np.ndarray] = []
    for number, fold in enumerate(prepared.split.folds):
        ids = list(dict.fromkeys(prepared.responses.stimulus_ids[fold.train]))
        bank, predicted = banks[number], retrieved.folds[number].predicted
        training, pairs = bank.embeddings.select(ids), out_of_fold[number].predicted
        gallery = bank.embeddings.select(list(dict.fromkeys(predicted.ids)))
        mean = training.flat().mean(axis=0)
        true.append(share_space(bank.encoder, bank.embeddings.select(list(predicted.ids))))
        some = training.select(
            list(np.random.default_rng(0).choice(ids, min(len(predicted), len(ids)), False))
        )
        spread = SpreadPriorConfig().build().fit(pairs, training.select(list(pairs.ids)), images=training)
        found = {"identity": [predicted], "spread": [spread.sample(predicted, n_draws=1, seed=0)]}
        print(f"fold {number}: gain of spread {spread.gain:.2f}", flush=True)
        tested = bank.embeddings.select(list(dict.fromkeys(predicted.ids)))
        generator = LatentDiffusionConfig(candidates=1).build()
        known = ImageSourceSettings(images=asked.images).find_images(training, generator, tested)
        near = NeighboursPriorConfig().build().fit(None, training, images=known)
        found["neighbours"] = [near.sample(predicted, n_draws=1, seed=0)]
        if asked.diffusion == "simulated":
            prior = DiffusionPriorConfig(**SIMULATED).build(seed=number).fit(None, training, images=known)
            found |= draw_all(prior, predicted, number)
        elif asked.diffusion != "none":
            config = DiffusionPriorConfig(**SMALL) if asked.diffusion == "small" else DiffusionPriorConfig()
            found |= draw(config, pairs, training, predicted, number)
        kept.setdefault("images", []).append(
            Made([share_space(bank.encoder, some)], np.full((2, len(predicted)), np.nan))
        )
        for name, rounds in found.items():
            ranks = np.mean([rank(one, gallery, mean) for one in rounds], axis=0)
            kept.setdefault(name, []).append(Made([share_space(bank.encoder, one) for one in rounds], ranks))
    whole = np.concatenate(true)
    width = find_bandwidth(whole)
    print(f"{'prior':36s} {'MMD':>8s} {'two-way':>8s} {'top-1':>8s}  two-way above identity")
    plain = np.concatenate([part.ranks for part in kept["identity"]], axis=1)[0]
    for name, parts in kept.items():
        rounds = [np.concatenate(one) for one in zip(*[part.vectors for part in parts], strict=True)]
        mmd = np.mean([compute_mmd(wrap(one), wrap(whole), bandwidth=width) for one in rounds])
        ranks = np.concatenate([part.ranks for part in parts], axis=1)
        two_way, top1 = ranks.mean(axis=1)
        above = bound_mean(ranks[0] - plain, over_folds=len(prepared.split.folds) > 1)
        print(f"{name:36s} {mmd:8.4f} {two_way:8.3f} {top1:8.3f}  {above}")


def bound_mean(differences: np.ndarray, *, over_folds: bool) -> str:
    """Return the mean of paired differences and its interval, wider by sqrt 2 after folds, as words."""
    if np.isnan(differences).any():
        return ""
    n = len(differences)
    means = differences[np.random.default_rng(0).integers(0, n, (10_000, n))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    if over_folds:
        low, high = widen_limits(low, high, differences.mean())
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


@dataclass(frozen=True)
class Made:
    """Embeddings of one fold, round by round in the space that all folds share, and `rank` of each trial."""

    vectors: list[np.ndarray]
    ranks: np.ndarray


def share_space(encoder, embeddings: Embeddings) -> np.ndarray:
    """Return rows in a space that all folds share: components become pixels, anything else stays."""
    fit = getattr(encoder, "fitted", None)
    return embeddings.flat() if fit is None else embeddings.flat() @ fit.components + fit.mean


def wrap(rows: np.ndarray) -> Embeddings:
    """Return rows as embeddings of the common space."""
    return Embeddings(rows.astype(np.float32), [str(i) for i in range(len(rows))], "common")


def draw(
    config: DiffusionPriorConfig, pairs: Embeddings, training: Embeddings, predicted: Embeddings, seed: int
) -> dict[str, list[Embeddings]]:
    """Return single draws, their mean and the best by similarity to the prediction."""
    prior, guidance = fit_diffusion(config, pairs, training, seed)
    print(f"fold {seed}: guidance {guidance}", flush=True)
    return draw_all(prior, predicted, seed)


def draw_all(prior: DiffusionPrior, predicted: Embeddings, seed: int) -> dict[str, list[Embeddings]]:
    """Return single draws of a fitted prior, their mean, parts of the way to it, and the best by similarity."""
    drawn = prior.sample(predicted, n_draws=N_MEAN, seed=seed)
    rounds = drawn.vectors.reshape(len(predicted), N_MEAN, *drawn.vectors.shape[1:])
    singles = [Embeddings(rounds[:, k].copy(), predicted.ids, drawn.space) for k in range(N_MEAN)]
    whole = replace(prior.drawing, n_candidates=N_MEAN)

    def sample_once(**update: object) -> list[Embeddings]:
        prior.drawing = replace(whole, **update)
        return [prior.sample(predicted, n_draws=1, seed=seed)]

    return {
        "diffusion, one draw": singles,
        f"diffusion, mean of {N_MEAN} draws": [average_draws(drawn, N_MEAN)],
        f"diffusion, best of {N_MEAN} draws": sample_once(select="best_of"),
        f"diffusion, halfway to the mean of {N_MEAN}": sample_once(select="mean", pull=0.5),
        "diffusion, a quarter of the way": sample_once(select="mean", pull=0.25),
    }


if __name__ == "__main__":
    main()
