"""WAVE on simulated brains: what is planted in networks is found, noise is not, and what pretraining is worth.

    python benchmarks/studies/wave.py --out FOLDER --stage ablation        # five brains, and three without signal
    python benchmarks/studies/wave.py --out FOLDER --stage pretraining --seeds 3
    python benchmarks/studies/wave.py --out FOLDER --stage guide --seeds 3

Each brain is a phantom of BOLD5000 of its own seed, decoded by `phantom_bold_wave`. ``ablation`` asks whether the
network of the visual hierarchy decodes best alone, and the default mode network next, as planted; without signal, how
many p-values lie below 0.05. ``pretraining`` pretrains the network on a phantom corpus, recordings without labels of
18 other people, and compares contrastive training from it with the same training from random weights, on a tenth of
the training images and on all, over seeds of the pretraining and the training; with ``head`` only the projector
learns, in both. Differences are paired by test image, intervals bootstraps over images of the mean over seeds.
``guide`` pretrains on the training trials themselves, with masks by lot and with masks that follow the images or exact
sentences about them, and trains from each, and from random weights, on the same trials. As in the ladder a fifth of
the training concepts is for the scores: neither pretraining, guide nor training sees one of their trials or images, and
test trials are not touched. It also says how much of each network the masks hide. What is done is kept in FOLDER.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ladder import Rung, open_tasks, score, slug, tabulate

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.config import read_config
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.parts.analyses.analyze import make_study
from braindecode_vis.parts.analyses.regions import NetworkAblationConfig
from braindecode_vis.parts.foundation.corpus.growing import add_sources
from braindecode_vis.parts.phantom import SIZES
from braindecode_vis.parts.phantom.simulate import make_phantom
from braindecode_vis.pipeline.galleries import GallerySource, rank_fold
from braindecode_vis.pipeline.preparing import build_encoder, find_guide, pick_labelled_trials
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.uncertainty import bootstrap_interval
from braindecode_vis.training.pretraining import Pretraining, pretrain
from braindecode_vis.training.pretraining_data import open_material

SIZE = SIZES["bold5000"]["tiny"].replace(
    n_train_concepts=80,
    n_train_exemplars=3,
    n_test_concepts=120,
    n_sessions=2,
    test_repetitions=2,
    n_parcels=60,
)
#: As the atlas of the phantom spells them, from the strongest drive by images to none.
PLANTED = ("Vis", "Default", "DorsAttn", "Cont", "SalVentAttn", "SomMot", "Limbic")
QUICK = ("generator.kind=nearest", "evaluation.n_bootstrap=1000", "evaluation.n_permutations=1000")
ONLY_SEEN = ("dataset.tasks=[5000scenes]", "analyses=[]", "run_analyses=false")  # no imagery
#: More training concepts than above, since a fifth of them is what is scored; the test concepts are not looked at.
GUIDED_SIZE = SIZE.replace(n_train_concepts=300, n_test_concepts=8)
GUIDES = ("none", "lot", "target", "captions")  # how an encoder is pretrained, if at all


def make_brain(out: Path, snr: float, seed: int) -> Path:
    """Return the folder of a phantom, which is simulated if it is not there."""
    folder = out / f"brain_snr{snr:g}_seed{seed}"
    make_phantom("bold5000", folder, size=SIZE, snr=snr, seed=seed)
    return folder


def read_wave(root: Path, *more: str) -> Any:
    """Return the shipped configuration for a phantom, without imagery and images."""
    return read_config("phantom_bold_wave", [*ONLY_SEEN, *QUICK, *more], root=root)


def ablate(out: Path, snr: float, seed: int) -> pd.DataFrame:
    """Return the table of the ablation of one brain, without random sets."""
    kept = out / f"ablation_snr{snr:g}_seed{seed}.csv"
    if not kept.is_file():
        root = make_brain(out, snr, seed)
        run = open_run(read_wave(root, f"seed={seed}"), root.with_name(f"run_{root.name}"))
        found = NetworkAblationConfig(outside="zero", n_random=0).compute(make_study(run))
        found.table.to_csv(kept, index=False)
    return pd.read_csv(kept)


def compare_networks(out: Path, snr: float, n_seeds: int, n_silent: int) -> None:
    """Print how the networks of each brain rank, and what is found where nothing was planted."""
    n_right = 0
    for seed in range(n_seeds):
        table = ablate(out, snr, seed)
        only = table[table["mode"] == "only"].set_index("group")
        without = table[table["mode"] == "without"].set_index("group")
        order = list(only["value"].sort_values(ascending=False).index)
        n_right += order[:2] == list(PLANTED[:2])
        losses = ", ".join(f"{name} {without.loc[name, 'difference']:+.3f}" for name in PLANTED[:3])
        whole = table.iloc[0]
        print(
            f"| {seed} | {whole['value']:.3f} ({whole['ci_low']:.3f} to {whole['ci_high']:.3f}) | "
            + " | ".join(f"{only.loc[name, 'value']:.3f}" for name in PLANTED)
            + f" | {losses} |",
            flush=True,
        )
    print(f"visual first and default mode next: {n_right} of {n_seeds}")
    p_values: list[float] = []
    for seed in range(n_silent):
        table = ablate(out, 0.0, seed)
        p_values += table.loc[table["mode"] != "without", "p_value"].tolist()
        print(f"without signal, seed {seed}: with all {table.iloc[0]['value']:.3f}", flush=True)
    if p_values:
        n_low = int((np.array(p_values) < 0.05).sum())
        print(
            f"without signal: p < 0.05 in {n_low} of {len(p_values)} comparisons (with all, and each network alone)"
        )


def train_share(root: Path, folder: Path, share: float, *more: str) -> pd.Series:
    """Return whether the image of each test trial is among the five nearest, after training on a share of images."""
    run = open_run(read_wave(root, *more), folder)
    prepared, bank = pipeline.preprocess(run), pipeline.embed(run)[0].embeddings
    fold = prepared.folds[0]
    ids = pd.unique(prepared.responses.stimulus_ids[fold.train])
    # The same images for every network seed and start.
    kept = make_generator(0, "share").permutation(ids)[: round(share * len(ids))]
    rows = fold.train[np.isin(prepared.responses.stimulus_ids[fold.train], kept)]
    responses = pick_labelled_trials(prepared, rows, "averaged")
    encoder = build_encoder(run, 0)
    encoder.fit(responses, bank.select(list(responses.stimulus_ids)))
    test = pick_labelled_trials(prepared, fold.test, "averaged")
    predicted = encoder.predict(test)
    source = GallerySource(encoder, bank, list(kept), run.config.retrieval)
    ranked = rank_fold(
        source, predicted, np.array(["1"] * len(predicted)), list(test.stimulus_ids), protocol="test"
    )
    return pd.Series((ranked.ranks <= 5).astype(float), index=test.stimulus_ids)


def make_corpus(out: Path, snr: float) -> Path:
    """Return a corpus of 18 simulated people of three sites, ten minutes each, made by the same rules."""
    people, folder = out / "people", out / "corpus"
    if (folder / "corpus.json").is_file():
        return folder
    size = SIZES["corpus"]["tiny"].replace(
        n_subjects=18, n_train_concepts=SIZE.n_train_concepts, n_train_exemplars=SIZE.n_train_exemplars,
        n_test_concepts=SIZE.n_test_concepts, n_parcels=SIZE.n_parcels, minutes=10,
    )  # fmt: skip
    make_phantom("corpus", people, size=size, snr=snr, seed=0)
    truth = people / "phantom_truth"
    channels = {
        "kind": "fmri",
        "atlas": "own",
        "files": [truth / "parcels.nii.gz"],
        "labels": truth / "parcels.txt",
    }
    config = CorpusConfig.model_validate({"channels": channels, "held_out": 0.1})
    add_sources(folder, sorted(people.glob("site*")), config)
    return folder


def compare_starts(out: Path, snr: float, n_seeds: int, more: list[str]) -> None:
    """Print top-5 from pretrained weights and from scratch, and the paired differences."""
    root, corpus = out / f"labelled_snr{snr:g}", make_corpus(out, snr)
    make_phantom("bold5000", root, size=SIZE, snr=snr, seed=0)
    # A patch of four volumes fits a trial and a window; both are told where it lies in seconds.
    both = [
        f"{part}.{text}"
        for part in ("encoder.network", "pretrain.encoder")
        for text in ("patch_times=4", "time_position=seconds")
    ]
    learning = ["pretrain.window_times=16", "pretrain.n_epochs=40", "pretrain.batch_size=64"]
    starts = {
        "scratch": ["encoder.network.pretrained=null"],
        "pretrained": [f"pretrain.corpus=[{corpus}]", *learning],
    }
    for share, epochs, tuned in ((0.1, 60, "all"), (0.1, 60, "head"), (1.0, 15, "all")):
        frozen = ["encoder.network.freeze_depth=1"] if tuned == "head" else []
        hits: dict[str, list[pd.Series]] = {start: [] for start in starts}
        for seed in range(n_seeds):
            for start, changes in starts.items():
                kept = out / f"top5_{start}_{share:g}_{tuned}_{seed}.json"
                if not kept.is_file():
                    changed = [*both, *changes, *frozen, f"seed={seed}", f"encoder.epochs={epochs}", *more]
                    kept.write_text(train_share(root, out / "run_starts", share, *changed).to_json())
                hits[start].append(pd.Series(json.loads(kept.read_text())))
        mean = {start: pd.concat(found, axis=1).mean(axis=1) for start, found in hits.items()}
        difference = (mean["pretrained"] - mean["scratch"]).to_numpy()
        interval = bootstrap_interval(difference, seed=0)
        print(
            f"| {share:.0%} | {tuned} | {mean['scratch'].mean():.3f} | {mean['pretrained'].mean():.3f} | "
            f"{difference.mean():+.3f} ({interval.low:+.3f} to {interval.high:+.3f}) |",
            flush=True,
        )


def compare_guides(out: Path, snrs: list[float], n_seeds: int, more: list[str]) -> None:
    """Print what masks hide, and how well validation concepts are found after each pretraining."""
    out.joinpath("validation").mkdir(exist_ok=True)
    rungs: dict[str, Rung] = {}
    changes = [*ONLY_SEEN, *QUICK, "pretrain.n_epochs=30", *more]
    for seed in range(n_seeds):
        for snr in snrs:
            root, folder = out / f"guided_snr{snr:g}", out / f"run_guided_snr{snr:g}"
            make_phantom("bold5000", root, size=GUIDED_SIZE, snr=snr, seed=0)
            (task,) = open_tasks(root, folder, "guide", "phantom_bold_wave", changes)
            # Scenes and pictures of COCO are one of a concept, so that galleries by exemplar would be uneven.
            asked = pd.unique(task.prepared.responses.stimulus_ids[task.asked])
            task = replace(task, galleries=[list(asked)])
            learnt = task.prepared.responses.select(task.train)
            for guide in GUIDES:
                pretrained = start(learnt, guide, root, folder, seed, changes)
                encoder = read_wave(root, *changes).encoder.model_dump(mode="json", exclude_unset=True)
                encoder["network"]["pretrained"] = None if pretrained is None else str(pretrained)
                of = "none" if guide in ("none", "lot") else "lot"
                name = f"{snr:g}, {guide}"
                rungs[name] = Rung(encoder, reference=f"{snr:g}, {of}")
                path = out / "validation" / f"{slug(name)}-{seed}.csv"
                if not path.exists():
                    table = score(task, rungs[name], seed)
                    table.to_csv(path, index=False)
                    top5 = (table["rank"] <= 5).mean()
                    print(f"{name}, seed {seed}: {top5:.3f}, {table['seconds'][0]:.0f} s", flush=True)
    for top in (5, 1):
        table = tabulate(out / "validation", rungs, next(iter(rungs)), top)
        print(f"\ngallery of {table.attrs['size']}; differences in top-{top}, p of all rows after Holm")
        print(table.drop(columns=["top1", "low", "high"]).to_string(index=False, na_rep=""))


def start(
    learnt: Responses, guide: str, root: Path, folder: Path, seed: int, changes: list[str]
) -> Path | None:
    """Return the folder of an encoder that was pretrained on the learnt trials, None for random weights.

    What was reached, and what its masks hide, is printed.
    """
    if guide == "none":
        return None
    made = folder / f"pretrained_{guide}_{seed}"
    if not (made / "hidden.txt").is_file():
        own = {"lot": [], "target": ["pretrain.guide=target"]}.get(
            guide, ["pretrain.guide=captions", f"pretrain.captions={root / 'phantom_truth/descriptions.csv'}"]
        )
        run = open_run(read_wave(root, *changes, *own, f"seed={seed}"), folder)
        vectors = find_guide(run, 0)
        if vectors is not None:  # it could only look at images of trials that it is given; it gets no others
            vectors = vectors.select(pd.unique(learnt.stimulus_ids))
        made.mkdir(parents=True, exist_ok=True)
        state, config = folder / f"state_{guide}_{seed}", run.config.pretrain
        reached = pretrain(config, learnt, folder=made, checkpoints=state, seed=seed, guide=vectors)
        hidden = measure_hidden(config, learnt, vectors, state, seed)
        (made / "hidden.txt").write_text(f"{reached}\n{hidden}")
    print(f"{folder.name}, {guide}, seed {seed}: {(made / 'hidden.txt').read_text()}", flush=True)
    return made


def measure_hidden(
    config: Any, responses: Responses, guide: Embeddings | None, folder: Path, seed: int
) -> str:
    """Return in words how often the tokens of each network are hidden in the training trials."""
    learning = Pretraining(config, open_material(config, responses, seed), folder, seed, guide=guide)
    rows, encoder = learning.material.train, learning.model.encoder
    ranks = learning._draw_ranks(len(rows), torch.Generator().manual_seed(seed))
    mask = learning._make_view(rows, ranks, None if guide is None else np.ones(len(rows), bool))[1]
    hidden = torch.zeros(len(rows), encoder.n_tokens)
    hidden.scatter_(1, mask.order[:, mask.n_visible :], 1.0)
    share = hidden.mean(dim=0).view(encoder.n_parcels, encoder.n_patches).mean(dim=1).numpy()
    networks = np.array(responses.coords["parcel_networks"]).astype(str)
    return "hidden: " + ", ".join(f"{name} {share[networks == name].mean():.3f}" for name in PLANTED)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("ablation", "pretraining", "guide"), default="ablation")
    parser.add_argument("--snr", type=float, help="0.05, 0.1 with pretraining, 0.1 and 0.3 with guide")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--silent", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.stage == "ablation":
        compare_networks(asked.out, 0.05 if asked.snr is None else asked.snr, asked.seeds, asked.silent)
    elif asked.stage == "guide":
        snrs = [0.1, 0.3] if asked.snr is None else [asked.snr]
        compare_guides(asked.out, snrs, asked.seeds, asked.settings)
    else:
        compare_starts(asked.out, asked.snr or 0.1, asked.seeds, asked.settings)


if __name__ == "__main__":
    main()
