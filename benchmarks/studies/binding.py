"""Whether a decoder binds: what was seen against the same parts bound otherwise, for several recipes.

    braindecode-vis phantom things-eeg2 --size demo --concepts 480 --exemplars 3 --test-concepts 160 \
        --test-repetitions 20 --pairs 80 --snr 0.1 --out PHANTOM
    python benchmarks/studies/binding.py PHANTOM --out FOLDER --seeds 3
    python benchmarks/studies/binding.py VOXELS --out FOLDER --config bids_fmri_ridge \
        --set dataset.min_test_repetitions=4

Every recipe learns from all training images and is asked once for all test images: no choice is made here. ``texts``
are the true caption against the one in which words changed places, in the space that the recipe predicts sentences in;
``images`` are the seen image against its partner. ``parts`` is what was seen against other pairs of the same kind.
Intervals are 95 % bootstraps over pairs of the mean over seeds. Chance is 0.5 everywhere. ``perfect knowledge`` is what
a linear map makes of knowing exactly which word stands where in a caption, learnt from the captions of training images:
what the space of sentences holds of binding, without any brain; ``true images`` is what one makes of the embeddings of
the images themselves, learnt from those of the training images. A decoder that prefers the same caption whichever image
of a pair was seen scores 0.5 on that pair; ``undecided`` is the share of such pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.contracts import BrainEncoder, Context
from braindecode_vis.base.registry import validate_component
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.compositions import CompositionTest, read_compositions
from braindecode_vis.embeddings.sentence_encoder import MINILM, SentenceEncoder, find_sentence_folder
from braindecode_vis.embeddings.text import make_unit
from braindecode_vis.pipeline import embed, preprocess
from braindecode_vis.pipeline.galleries import GallerySource
from braindecode_vis.pipeline.preparing import pick_labelled_trials
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.crossed import paired_difference
from braindecode_vis.scoring.metrics.protocols import compare_bindings, compare_parts
from braindecode_vis.scoring.uncertainty import bootstrap_interval

IMAGES = "efficientnet-lite0"


def list_recipes(truth: Path) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Return target and encoder of each recipe, and the one that it is compared with."""
    ridge = {"kind": "ridge", "alphas": [1e2, 1e3, 1e4, 1e5, 1e6]}
    network = {
        "kind": "network", "network": {"kind": "eegproject", "width": 256}, "optimiser": {"lr": 1e-4}, "epochs": 50,
        "device": "cpu", "selection": {"kind": "last", "hold_out": 0},
    }  # fmt: skip
    texts = {"captions": str(truth / "descriptions.csv"), "sentence_encoder": MINILM}

    def learn(*objectives: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {**network, "objectives": list(objectives), **changes}

    clip, composition = {"kind": "clip"}, {"kind": "composition", "weight": 1}
    swaps = {**composition, "space": "target"}
    projector = {"size": 256, "sides": "both"}
    plain, pictures = "sentences, CLIP", "images, CLIP"
    return {
        "sentences, ridge": (MINILM, ridge, plain),
        plain: (MINILM, learn(clip), ""),
        "sentences, composition": (MINILM, learn(swaps, **texts), plain),
        "sentences, composition without hard images": (
            MINILM, learn({**swaps, "hard_images": False}, **texts), plain,
        ),
        "sentences, CLIP, projected": (MINILM, learn(clip, projector=projector), plain),
        "sentences, composition, projected": (
            MINILM, learn(swaps, projector=projector, **texts), "sentences, CLIP, projected",
        ),
        "images, ridge": (IMAGES, ridge, pictures),
        pictures: (IMAGES, learn(clip), ""),
        "images, CLIP + sentences": (
            IMAGES, learn(clip, {"kind": "sentence_contrast", "weight": 1.0}, **texts), pictures,
        ),
        "images, CLIP + composition": (
            IMAGES, learn(clip, composition, **texts), "images, CLIP + sentences",
        ),
    }  # fmt: skip


def compare(
    queries: Embeddings, both: list[Embeddings], tests: list[CompositionTest], label: str
) -> pd.DataFrame:
    """Return binding and parts of each test."""
    kinds, pairs = [test.kind for test in tests], [test.pair for test in tests]
    bound, parts = compare_bindings(queries, *both), compare_parts(queries, both[0], kinds, pairs)
    found = pd.DataFrame({"of": label, "kind": kinds, "pair": pairs, "binding": bound, "parts": parts})
    # Each pair of scenes is asked twice.
    return found.assign(undecided=found.groupby("pair")["binding"].transform("mean") == 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phantom", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="Recipes by name.")
    parser.add_argument("--config", default="phantom_eeg")
    parser.add_argument("--set", action="append", default=[], help="changes of the configuration")
    asked = parser.parse_args()
    truth = asked.phantom / "phantom_truth"
    banks = {}
    for target in (MINILM, IMAGES):
        changes = [*asked.set, f"target.kind={target}", "prior.kind=identity", "generator.kind=nearest"]
        changes += [f"target.captions={truth / 'descriptions.csv'}"] if target == MINILM else []
        run = open_run(read_config(asked.config, changes, root=asked.phantom), asked.out / "run")
        prepared, banks[target] = preprocess(run), embed(run)[0].embeddings
    (fold,) = prepared.split.folds
    train, test = (pick_labelled_trials(prepared, rows, "averaged") for rows in (fold.train, fold.test))
    shown = {str(name): row for row, name in enumerate(test.stimulus_ids)}
    tests = [one for one in read_compositions(truth / "composition.csv") if one.name in shown]
    rows = np.array([shown[one.name] for one in tests])
    sentences = SentenceEncoder(find_sentence_folder(MINILM, "binding"), device="cpu")
    texts = [
        make_unit(sentences.encode([getattr(one, key) for one in tests])) for key in ("caption", "swapped")
    ]
    every = [one for one in read_compositions(truth / "composition.csv") if one.name not in shown]
    if not asked.only or "perfect knowledge" in asked.only:
        report("perfect knowledge", read_slots(every, tests, sentences, texts), asked.out, "")
    if not asked.only or "true images" in asked.only:
        known = list(pd.unique(train.stimulus_ids.astype(str)))
        report("true images", read_images(banks, known, tests, texts), asked.out, "")
    for name, (target, settings, reference) in list_recipes(truth).items():
        if asked.only and name not in asked.only:
            continue
        tables = []
        for seed in range(asked.seeds if settings["kind"] == "network" else 1):
            encoder = roles.build(BrainEncoder, validate_component("encoder", settings), seed=seed)
            encoder.bind(Context(images=prepared.stimuli))
            targets = banks[target].select(list(train.stimulus_ids))
            encoder.fit(train, targets)
            bank, ids = banks[target], [one.name for one in tests]
            source = GallerySource(encoder, bank, list(pd.unique(train.stimulus_ids)), run.config.retrieval)
            centre, found = source.fit_centre(None), encoder.predict(test)
            queries = centre.apply(Embeddings(found.vectors[rows], found.ids[rows], found.space))
            both = texts
            if target != MINILM:
                both = [
                    bank.select([getattr(one, key) for one in tests]).vectors for key in ("name", "partner")
                ]
            placed = [
                centre.apply(source.map_targets(Embeddings(side.astype(np.float32), ids, bank.space), None))
                for side in both
            ]
            label = "texts" if target == MINILM else "images"
            tables.append(compare(queries, placed, tests, label))
            said = encoder.predict_sentences(test)
            if said is not None:
                own = Embeddings(said.vectors[rows], said.ids[rows], said.space)
                read = [Embeddings(side.astype(np.float32), ids, said.space) for side in texts]
                tables.append(compare(own, read, tests, "texts"))
        report(name, pd.concat(tables), asked.out, reference)


def read_slots(
    learnt: list[CompositionTest],
    tests: list[CompositionTest],
    sentences: SentenceEncoder,
    texts: list[np.ndarray],
) -> pd.DataFrame:
    """Return binding by a ridge from the words of a caption and their places to its sentence vector."""
    known = list({one.caption: one for one in learnt}.values())
    vectors = make_unit(sentences.encode([one.caption for one in known]))

    def list_slots(one: CompositionTest) -> list[tuple[str, int, str]]:
        # Articles follow from the words behind them.
        words = [word for word in one.caption.split() if word not in ("a", "an")]
        return [(one.kind, place, word) for place, word in enumerate(words)]

    slots = sorted({slot for one in known for slot in list_slots(one)})
    design = np.array([[slot in list_slots(one) for slot in slots] for one in known], float)
    asked = np.array([[slot in list_slots(one) for slot in slots] for one in tests], float)
    middle, mean = design.mean(axis=0), vectors.mean(axis=0)
    gram = (design - middle).T @ (design - middle) + 0.1 * np.eye(len(slots))
    weights = np.linalg.solve(gram, (design - middle).T @ (vectors - mean))
    ids = [one.name for one in tests]
    told = Embeddings(((asked - middle) @ weights).astype(np.float32), ids, MINILM)
    both = [Embeddings((side - mean).astype(np.float32), ids, MINILM) for side in texts]
    return compare(told, both, tests, "texts")


def read_images(
    banks: dict[str, Embeddings], known: list[str], tests: list[CompositionTest], texts: list[np.ndarray]
) -> pd.DataFrame:
    """Return binding by a ridge from the embeddings of images to the sentence vectors of their captions."""
    images, vectors = banks[IMAGES].select(known).flat(), banks[MINILM].select(known).flat()
    # The penalty is as large as the sum of squares of a feature.
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=len(known))).fit(images, vectors)
    mean, ids = vectors.mean(axis=0), [one.name for one in tests]
    predicted = ridge.predict(banks[IMAGES].select(ids).flat()) - mean
    told = Embeddings(predicted.astype(np.float32), ids, MINILM)
    both = [Embeddings((side - mean).astype(np.float32), ids, MINILM) for side in texts]
    return compare(told, both, tests, "texts")


def report(name: str, table: pd.DataFrame, out: Path, reference: str) -> None:
    """Print a row for each gallery, with the paired difference to the reference, and keep the values."""
    table.to_csv(out / slug(name), index=False)
    other = pd.read_csv(out / slug(reference)) if reference and (out / slug(reference)).is_file() else None
    for label, own in table.groupby("of"):
        cells = []
        for kind in ("", *own["kind"].unique()):
            some = own if not kind else own[own["kind"] == kind]
            each = some.groupby("pair")["binding"].mean()
            found = bootstrap_interval(each.to_numpy(), n_boot=10_000, seed=0)
            cells.append(f"{kind or 'all'} {each.mean():.3f} ({found.low:.3f} to {found.high:.3f})")
        if other is not None and (other["of"] == label).any():
            means = [t[t["of"] == label].groupby("pair")["binding"].mean() for t in (table, other)]
            gain = paired_difference(means[0].to_numpy(), means[1][means[0].index].to_numpy(), n_boot=10_000)
            cells.append(
                f"{gain.mean:+.3f} ({gain.interval.low:+.3f} to {gain.interval.high:+.3f}) to {reference}"
            )
        cells.append(f"undecided {own['undecided'].mean():.2f}")
        print(f"{name} | {label} | parts {own['parts'].mean():.3f} | " + " | ".join(cells), flush=True)


def slug(name: str) -> str:
    """Return the file of a recipe."""
    return f"{name.replace(' ', '_').replace(',', '').replace('+', 'and')}.csv"


if __name__ == "__main__":
    main()
