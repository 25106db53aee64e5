"""The ablation ladder: which network, objective and training generalise best to concepts never trained on.

    braindecode-vis phantom things-eeg2 --size demo --concepts 320 --test-concepts 100 --test-repetitions 20 \
        --snr 0.05 --out PHANTOM
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage networks
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage training     # then chosen, test
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage objectives --base "eegproject, width 256"
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage worth --seeds 3
    python benchmarks/studies/ladder.py VOXELS --out FOLDER --stage worth --seeds 3 --config deeprecon_ridge --set ...
    python benchmarks/studies/ladder.py EASY --out FOLDER --stage defaults --seeds 1 --top 1
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage recipes --seeds 3
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage fusion --base "eegproject, width 256"
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage tower --base "eegproject, width 256"
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage salient --base "eegproject, width 256" \
        --set "dataset.window=[-0.2,1.0]"
    python benchmarks/studies/ladder.py PHANTOM --out FOLDER --stage frontier --picture docs/images/frontier.png
    python benchmarks/studies/ladder.py VOXELS --out FOLDER --stage frontier --config nsd_ridge --set ...
    python benchmarks/studies/ladder.py SUBJECTS --out FOLDER --stage test --set split.kind=leave_one_subject_out

A fifth of the training concepts is for choices: every rung but those of the stage ``test`` learns from the other
concepts and is scored on this fifth, never on the test concepts. Each exemplar makes a gallery of its own, with one
image per concept. ``test`` trains on all training concepts and opens the test trials. Intervals are 95 % bootstraps
over concepts of the mean over seeds, crossed with people where there are several.
What is done already is kept in FOLDER, one file of ranks per rung and seed, with the processor time of the training.
``frontier`` sets accuracy beside that time, for every network as it is and with what helped, and for what papers
publish as far as one embedding serves.
``worth`` asks of every objective what it adds to the cheapest good training, in a fifth of the time: each row has a
reference that differs from it in the objective alone, and Holm's correction is over the rows. ``defaults`` asks the
same of the defaults in six epochs, and whether the own term of each falls (EASY: a phantom of SNR 0.4 and 200 concepts,
of which 40 are asked). Words and attributes are those in ``phantom_truth``. Real recordings, and drives that no target
holds, have a ladder of their own: ``benchmarks/reality.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.contracts import BrainEncoder, Context
from braindecode_vis.base.registry import list_kinds, validate_component
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.config import read_config
from braindecode_vis.datasets.manifests import find_package_data
from braindecode_vis.embeddings.sentence_encoder import MINILM, SentenceEncoder, find_sentence_folder
from braindecode_vis.embeddings.text import average_texts, find_texts, make_unit
from braindecode_vis.pipeline import embed, preprocess
from braindecode_vis.pipeline.galleries import GallerySource, rank_fold
from braindecode_vis.pipeline.hints import describe_objective_values
from braindecode_vis.pipeline.preparing import pick_labelled_trials
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.crossed import CrossedInterval, interval_of_rows, paired_difference
from braindecode_vis.scoring.uncertainty import correct_holm

STAGES = (
    "networks", "training", "objectives", "worth", "defaults", "recipes", "salient", "fusion", "tower", "chosen",
    "frontier", "test",
)  # fmt: skip
WITH_SEEDS = ("network", "average")  # encoders that draw something
SHARE = 0.2  # of the training concepts, for choices

NOISY = [
    {"kind": "channel_dropout"}, {"kind": "time_shift"}, {"kind": "gaussian_noise"}, {"kind": "smoothing"},
]  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """An encoder, what retrieval takes off (`centre`), and whether training trials are averaged (`repeats`).

    `reference` is the rung that it is compared with, if not the first; `settings` change the configuration for it.
    """

    encoder: dict[str, Any]
    centre: str = "mean"
    repeats: str = "averaged"
    reference: str = ""
    settings: tuple[str, ...] = ()


def make_network(network: dict[str, Any], lr: float, **changes: Any) -> Rung:
    base = {
        "kind": "network", "network": network, "optimiser": {"lr": lr}, "epochs": 50, "device": "cpu",
        "normalise_targets": "centre", "selection": {"kind": "last", "hold_out": 0},
    }  # fmt: skip
    return Rung({**base, **changes})


VOXELS = "residual mlp, width 256"  # for voxels only, and used where it is asked for by name
#: Each at its paper's learning rate, everything else alike.
NETWORKS = {
    "ridge": Rung({"kind": "ridge", "alphas": [1e2, 1e3, 1e4, 1e5, 1e6]}),
    "eegproject": make_network({"kind": "eegproject"}, 1e-4),
    "eegproject, width 256": make_network({"kind": "eegproject", "width": 256}, 1e-4),
    "tsconv": make_network({"kind": "tsconv"}, 2e-4),
    "atm_s": make_network({"kind": "atm_s"}, 3e-4),
    VOXELS: make_network({"kind": "residual_mlp", "hidden": 256, "n_blocks": 1}, 1e-4),
}


def change(rung: Rung, centre: str | None = None, repeats: str | None = None, **changes: Any) -> Rung:
    return replace(
        rung,
        encoder={**rung.encoder, **changes},
        centre=centre or rung.centre,
        repeats=repeats or rung.repeats,
    )


def list_training(base: Rung) -> dict[str, Rung]:
    """Return the base with one change each."""
    optimiser = base.encoder["optimiser"]
    single = {"augmentations": [{"kind": "repetition_averaging"}], "repeats": "single"}
    return {
        "+ MSE 9:1": change(base, objectives=[{"kind": "mse", "weight": 9}, {"kind": "clip"}]),
        "SigLIP": change(base, objectives=[{"kind": "siglip", "weight": 1}]),
        "CUA": change(base, objectives=[{"kind": "cua"}]),
        "SoftCLIP": change(base, objectives=[{"kind": "soft_clip", "weight": 1}]),
        "targets as they are, centred in retrieval": change(base, normalise_targets="none"),
        "no centring anywhere": change(base, normalise_targets="none", centre="none"),
        "z-scores": change(base, normalise_targets="zscore", centre="zscore"),
        "single trials": change(base, repeats="single"),
        "random averages": change(base, **single),
        "four augmentations": change(base, augmentations=NOISY),
        **{f"only {one['kind']}": change(base, augmentations=[one]) for one in NOISY},
        "EMA 0.99": change(base, ema=0.99),
        "early stopping": change(base, selection={"kind": "early_stopping"}),
        "100 epochs": change(base, epochs=100),
        "20 epochs": change(base, epochs=20),
        "cosine": change(base, schedule={"kind": "cosine"}),
        "weight decay 0.1": change(base, optimiser={**optimiser, "weight_decay": 0.1}),
        "learning rate x 3": change(base, optimiser={**optimiser, "lr": 3 * optimiser["lr"]}),
        "batches of 512": change(base, batch_size=512),
    }


def list_objectives(base: Rung) -> dict[str, Rung]:
    """Return the base with one further objective each, at its own defaults and beside CLIP at equal weight."""
    clip = {"kind": "clip"}
    single = {"repeats": "single"}  # halves of the repetitions are views
    return {
        "CLIP + MV-DHEL of repetition halves": change(
            base, objectives=[clip, {"kind": "multiview", "weight": 1}], **single
        ),
        "MV-InfoNCE alone": change(base, objectives=[INFONCE], **single),
        "CLIP + alignment": change(base, objectives=[clip, {"kind": "alignment"}]),
        "CLIP + uniformity": change(base, objectives=[clip, {"kind": "uniformity", "between": "brain"}]),
        "CUA with cross uniformity": change(base, objectives=[{"kind": "cua", "cross": True}]),
        "momentum distillation": change(base, objectives=[{"kind": "distillation"}]),
        "TCL": change(base, objectives=[{"kind": "tcl"}]),
        "CLIP, then within cluster": change(
            base, objectives=[{**clip, "phase": [0, 0.5]}, {"kind": "within_cluster", "phase": [0.5, 1]}]
        ),
        "CLIP + within cluster": change(base, objectives=[clip, {"kind": "within_cluster"}]),
    }


PLAIN = "CLIP"
INFONCE = {"kind": "multiview", "weight": 1, "form": "infonce", "views": ["brain", "brain_views", "image"]}
#: As published.
HYDRA = {"kind": "hydra", "weight": 1, "partner": "arbitrary", "unit": False}
#: As the authors of SepCLR weigh it, without our scaling.
SALIENT = {
    "kind": "salient", "weight": 1, "constant_weight": 100, "independence_weight": 10, "scale": False,
}  # fmt: skip
#: Sixteen cells of the last maps instead of their mean, without a way back to pictures.
PATCHES = ("target.grid=4", "prior.kind=identity", "generator.kind=nearest")


def list_worth(kind: str, truth: Path) -> dict[str, Rung]:
    """Return every objective beside or in place of CLIP, on averages of random repetitions, 20 epochs.

    `truth` holds the captions and attributes of the phantom's images.
    """
    base = combine("eegproject, width 256")
    if kind == "voxels":  # without neighbours or times
        base = change(base, augmentations=[{"kind": "gaussian_noise"}, {"kind": "repetition_averaging"}])
    base = change(base, epochs=20, optimiser={"lr": 3e-4})
    clip = {"kind": "clip"}

    def use(*objectives: Any, **changes: Any) -> Rung:
        named = [{"kind": one} if isinstance(one, str) else one for one in objectives]
        return change(base, objectives=named, **changes)

    mixing = [*base.encoder["augmentations"], {"kind": "trial_mixing"}]
    twice = "CLIP, average of two seeds"  # what two trainings give without stages
    named = {"attributes": str(truth / "attributes.csv")}
    texts = {"captions": str(truth / "descriptions.csv"), "sentence_encoder": MINILM}
    teacher = {"decay": 0.98, "queue": 512}  # for 200 updates on 1280 images, which the defaults outlast
    rungs = {
        PLAIN: base,
        "CLIP of image and caption": use({"kind": "clip_image_text", "image_share": 0.5}),
        **list_by_pairs(use, mixing),
        "CLIP + squared error, 1:9": use(clip, {"kind": "mse", "weight": 9}),
        "CLIP + MMD of unit vectors": use(clip, {"kind": "mmd", "weight": 1}),
        "CLIP + MV-DHEL of repetition halves": use(clip, {"kind": "multiview", "weight": 1}),
        "MV-InfoNCE alone": use(INFONCE),
        "momentum distillation": use("distillation", teacher=teacher),
        "CLIP + within cluster": use(clip, "within_cluster"),
        "CLIP, then within cluster": use(
            {**clip, "phase": [0, 0.5]}, {"kind": "within_cluster", "phase": [0.5, 1]}
        ),
        twice: replace(base, encoder={"kind": "average", "members": [base.encoder, base.encoder]}),
        "CLIP + Hydra of concepts": use(clip, HYDRA),
        "CLIP + Hydra of attributes": use(clip, {**HYDRA, "classes": "attributes"}, **named),
        "CLIP + Hydra, own attribute": use(
            clip, {**HYDRA, "classes": "attributes", "partner": "identical"}, **named
        ),
        "CLIP + sentences": use(clip, "sentence_contrast", **texts),
        "CLIP + sentences, weight 1": use(clip, {"kind": "sentence_contrast", "weight": 1}, **texts),
        "CLIP + sentences by margin": use(clip, {"kind": "sentence_contrast", "form": "margin"}, **texts),
        "CLIP + swapped descriptions": use(
            clip, {"kind": "composition", "weight": 1, "words": "attributes"}, **texts, **named
        ),
        "CLIP + captioning from the output": use(
            clip, {"kind": "captioning", "weight": 1, "reads": "output"}, captions=texts["captions"]
        ),
    }
    parts = "windows" if kind == "trials" else "regions"  # which have local outputs
    rungs |= {
        "TCL": use("tcl", teacher=teacher),
        "CLIP + propagation": use(clip, "propagation", teacher=teacher),
        f"CLIP + captioning from {parts}": use(
            clip, {"kind": "captioning", "weight": 1}, captions=texts["captions"]
        ),
        f"CLIP + captioning, likest half of the {parts}": use(
            clip, {"kind": "captioning", "weight": 1, "shown": 0.5}, captions=texts["captions"]
        ),
        "CLIP + propagation of itself": use(clip, {"kind": "propagation", "targets": "self"}),
    }
    if kind == "trials":
        early, name = ("dataset.window=[-0.2,1.0]",), "CLIP, from -0.2 s"
        rungs[name] = replace(base, settings=early)
        rungs["CLIP + salient, from -0.2 s"] = replace(use(clip, SALIENT), reference=name, settings=early)
    # Sixteen times as many numbers would be predicted of every window, too.
    local, plain = "CLIP, target of patches", {"kind": "captioning", "weight": 1, "reads": "output"}
    writing, captions = (
        "CLIP + captioning from the output, target of patches",
        {"captions": texts["captions"]},
    )
    return rungs | {
        local: replace(base, settings=PATCHES),
        writing: replace(use(clip, plain, **captions), reference=local, settings=PATCHES),
        "CLIP + captioning from the output, hidden patches rebuilt": replace(
            use(clip, {**plain, "masked": 1}, **captions), reference=writing, settings=PATCHES
        ),
    }


def list_defaults(truth: Path) -> dict[str, Rung]:
    """Return every kind of objective at its defaults beside CLIP, on averages of random repetitions, six epochs.

    `truth` holds the captions and attributes of the phantom's images. A name after the kind says what is no default.
    """
    base = change(combine("eegproject, width 256"), epochs=6, optimiser={"lr": 3e-4})
    texts = {"captions": str(truth / "descriptions.csv"), "sentence_encoder": MINILM}
    captions, named = {"captions": texts["captions"]}, {"attributes": str(truth / "attributes.csv")}
    mixing = {"augmentations": [*base.encoder["augmentations"], {"kind": "trial_mixing"}]}
    early, start = ("dataset.window=[-0.2,1.0]",), f"{PLAIN}, from -0.2 s"
    further: dict[str, dict[str, Any]] = {
        "bimixco": mixing, "sentence_contrast": texts, "composition": texts, "captioning": captions
    }  # fmt: skip

    def use(kind: str, changes: dict[str, Any] | None = None, **options: Any) -> Rung:
        both = [{"kind": "clip"}, {"kind": kind, **options}]
        return change(base, objectives=both, **(further.get(kind, {}) if changes is None else changes))

    kinds = [kind for kind in list_kinds("objective") if kind not in ("clip", "salient")]
    return {
        PLAIN: base,
        **{kind: use(kind) for kind in kinds},
        "multiview, infonce": use("multiview", form="infonce"),
        "hydra, attributes": use("hydra", named, classes="attributes"),
        start: replace(base, settings=early),
        "salient": replace(use("salient"), reference=start, settings=early),
    }


def list_by_pairs(use: Any, mixing: list[dict[str, Any]]) -> dict[str, Rung]:
    """Return the objectives that need nothing but responses and images; `use` makes a rung of a list of them."""
    clip, late = {"kind": "clip"}, {"weight": 1, "phase": [0.33, 1]}
    return {
        "SigLIP": use({"kind": "siglip", "weight": 1}),
        "SoftCLIP": use({"kind": "soft_clip", "weight": 1}),
        "BiMixCo, then SoftCLIP": use(
            {"kind": "bimixco", "weight": 1}, {"kind": "soft_clip", **late}, augmentations=mixing
        ),
        "CLIP + l1": use(clip, "l1"),
        "CLIP + squared error": use(clip, "mse"),
        "CLIP + cosine": use(clip, "cosine"),
        "squared error alone": use("mse"),
        "CLIP + alignment": use(clip, "alignment"),
        "CLIP + uniformity": use(clip, {"kind": "uniformity", "between": "brain"}),
        "CUA": use("cua"),
        "CUA, cross": use({"kind": "cua", "cross": True}),
        "CLIP + MMD": use(clip, {"kind": "mmd", "weight": 1, "normalise": False}),
    }


def list_salient(base: Rung) -> dict[str, Rung]:
    """Return trials from before the stimulus on, without and with the separation of what they share with it."""
    both = [{"kind": "clip"}, SALIENT]
    return {
        "from -0.2 s": change(base, repeats="single"),
        "from -0.2 s, CLIP + salient": change(base, objectives=both, repeats="single"),
    }


#: Three levels of an image, each brought to 128 features: early energy, pooled statistics, and the network's output.
LEVELS = {
    "kind": "layers", "size": 128,
    "members": [
        {"kind": "engineered", "features": ["gabor"]}, {"kind": "engineered", "features": ["colour", "hog", "lbp"]},
        {"kind": "efficientnet-lite0"},
    ],
}  # fmt: skip
#: No pretrained transformer comes with the package: an untrained one shows what low-rank changes alone can learn.
TOWER = {
    "kind": "timm", "architecture": "vit_tiny_patch16_224.augreg_in21k", "weights": "random", "image_size": 64,
    "model_args": {"depth": 4, "embed_dim": 96, "num_heads": 4}, "pooling": "cls", "workers": 0,
}  # fmt: skip


def list_fusion(base: Rung) -> dict[str, Rung]:
    """Return trainings on three levels side by side: last alone, all by weights, and all as SAMGA does it."""
    maps = {"size": 128, "hidden": 256, "lr_scale": 1.0}
    brain = {"size": 128, "sides": "brain", "brain_width": 256}
    clip = {
        "kind": "clip", "scale": "softplus", "learn_temperature": False, "normalise_brain": False,
    }  # fmt: skip
    coarse = [
        {"kind": "mmd", "normalise": False, "weight": 0.9, "weight_end": 0.5, "phase": [0, 0.4]},
        {**clip, "weight": 0.1, "weight_end": 0.5, "phase": [0, 0.4]},
        {**clip, "phase": [0.4, 1]},
    ]
    plain = change(base, centre="none", normalise_targets="l2")
    routed = {**maps, "weights": "routed", "centre": 2}
    shared = {**brain, "shared": True}
    return {
        "three levels, learned weights": change(plain, fusion={"lr_scale": 100}, projector={"size": 128}),
        "three levels, maps and router": change(plain, fusion=routed, projector=brain),
        "the same, SAMGA's contrast": change(plain, fusion=routed, projector=brain, objectives=[clip]),
        "SAMGA: the same, coarse stage, shared map": change(
            plain, fusion=routed, projector=shared, objectives=coarse, second_stage={"start": 0.4}
        ),
    }


def list_tower(base: Rung) -> dict[str, Rung]:
    """Return trainings to an untrained image network: frozen, and with low-rank changes at three rates."""
    plain = change(base, centre="none", normalise_targets="none")

    def tune(lr_scale: float) -> Rung:
        tower = {"target": TOWER, "rank": 32, "modules": "all", "start": "gaussian", "lr_scale": lr_scale}
        return change(plain, image_tower=tower)

    return {
        "untrained image network, frozen": plain,
        **{f"with LoRA at {x:g} of the brain's rate": tune(x) for x in (0.1, 0.2, 1.0)},
    }


def combine(name: str) -> Rung:
    """Return a network with what helped in the stage ``training``: augmentation of random averages."""
    kinds = [*NOISY, {"kind": "repetition_averaging"}]
    return change(NETWORKS[name], augmentations=kinds, repeats="single")


#: Written down after the stage ``training``; those of `TESTED` meet the test trials, beside the plain networks.
CHOSEN = {
    f"{name}, four augmentations of random averages": combine(name)
    for name in ("eegproject, width 256", "eegproject", "tsconv", "atm_s")
}
TESTED = ("atm_s, four augmentations of random averages",)


ALL_CHANNELS = ("dataset.channels=all63",)
DEMO = "linear Gaussian of 32 components, 6 courses and a quarter of the misfit, 63 channels"


def list_recipes() -> dict[str, Rung]:
    """Return what competes with ATM-S of 17 channels: all channels, fewer epochs, a linear model, averages of both."""
    network = change(combine("eegproject, width 256"), epochs=20, optimiser={"lr": 3e-4})
    linear = Rung({"kind": "linear_gaussian"}, repeats="single", settings=ALL_CHANNELS)
    short = change(linear, n_times=4)
    demo = change(linear, n_components=32, n_times=6, misfit=0.25)

    def average(*members: dict[str, Any], weights: list[float] | None = None) -> Rung:
        own = {"kind": "average", "members": members, "weights": weights}
        return replace(linear, encoder=own)

    one = network.encoder
    return {
        TESTED[0]: CHOSEN[TESTED[0]],
        "eegproject, width 256, 20 epochs": network,
        "ridge, 63 channels": replace(NETWORKS["ridge"], settings=ALL_CHANNELS),
        "eegproject, width 256, 20 epochs, 63 channels": replace(network, settings=ALL_CHANNELS),
        "linear Gaussian": Rung({"kind": "linear_gaussian"}, repeats="single"),
        "linear Gaussian, 63 channels": linear,
        "linear Gaussian of 4 courses, 63 channels": short,
        "average of it and EEGProject": average(short.encoder, one),
        DEMO: demo,
        "average of it, twice, and EEGProject, as in the demo": average(demo.encoder, one, weights=[2, 1]),
    }


#: Published trainings that need one embedding alone, by configuration; what needs views or text is taken out.
PUBLISHED = {
    "trials": {
        "NICE": "things_eeg2_nice_vitl", "ATM-S": "things_eeg2_atm_vith", "UBP": "things_eeg2_ubp_rn50",
        "NeuroBridge": "things_eeg2_neurobridge_rn50", "Shallow": "things_eeg2_shallow_vith",
    },
    "voxels": {"MindEye1": "nsd_mindeye1_vitl", "MindEye2": "nsd_mindeye2_bigg"},
}  # fmt: skip


def read_published(name: str) -> Rung:
    """Return the training of a shipped configuration, towards one embedding of each image."""
    content = yaml.safe_load((find_package_data("configs") / f"{name}.yaml").read_text())
    encoder = {key: value for key, value in content["encoder"].items() if key != "view_choice"}
    objectives = encoder.get("objectives", [])
    texts = [one for one in objectives if one["kind"] == "clip_image_text"]
    if texts:
        encoder["objectives"] = [{"kind": "clip", "duplicates": one["duplicates"]} for one in texts]
    return Rung({**encoder, "device": "cpu"}, content["retrieval"]["centre"], content["repeats"]["train"])


def list_frontier(kind: str) -> dict[str, Rung]:
    """Return every network as it is and with what helped, and what papers publish."""
    published = {f"{name} as published": read_published(of) for name, of in PUBLISHED[kind].items()}
    if kind == "voxels":
        for rung in published.values():  # theirs have a thousand million parameters
            rung.encoder["network"] |= {
                "hidden" if rung.encoder["network"]["kind"] == "residual_mlp" else "shared": 256
            }
        published = {f"{name}, width 256": rung for name, rung in published.items()}
        plain = {
            "ridge": NETWORKS["ridge"],
            "eegproject, width 256": NETWORKS["eegproject, width 256"],
            VOXELS: NETWORKS[VOXELS],
            "shared space, width 256": make_network({"kind": "shared_space", "shared": 256}, 3e-4),
        }
        averages = {"augmentations": [{"kind": "repetition_averaging"}], "repeats": "single"}
        return {**plain, f"{VOXELS}, random averages": change(plain[VOXELS], **averages), **published}
    further = {
        "eegnet": make_network({"kind": "eegnet"}, 1e-3),
        "atm_e": make_network({"kind": "atm_e"}, 3e-4),
        "simpleconv_image": make_network({"kind": "simpleconv_image", "hidden": 64}, 3e-4),
    }
    best = "atm_s, four augmentations of random averages"
    further |= {f"{best}, bf16": change(CHOSEN[best], precision="bf16")}
    return {**{name: NETWORKS[name] for name in NETWORKS if name != VOXELS}, **further, **CHOSEN, **published}


def draw_frontier(table: pd.DataFrame, path: Path) -> None:
    """Draw accuracy against the processor time of a training; a line joins what nothing beats in less time."""
    import matplotlib.pyplot as plt

    ordered = table.sort_values("seconds")
    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    best = ordered["top1"].cummax() == ordered["top1"]
    axes.errorbar(
        ordered["seconds"], ordered["top1"], [ordered["top1"] - ordered["low"], ordered["high"] - ordered["top1"]],
        fmt="none", ecolor="0.8", zorder=1,
    )  # fmt: skip
    for mask, colour in ((best, "C3"), (~best, "C0")):
        axes.scatter(ordered["seconds"][mask], ordered["top1"][mask], color=colour, zorder=2)
    axes.step(ordered["seconds"][best], ordered["top1"][best], where="post", color="C3", linewidth=1)
    plus = ", four augmentations of random averages"
    for number, (_, row) in enumerate(ordered.iterrows(), 1):  # names beside points would lie on each other
        axes.annotate(
            str(number), (row["seconds"], row["top1"]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
    names = [f"{number}  {name.replace(plus, ' +')}" for number, name in enumerate(ordered["rung"], 1)]
    axes.text(1.02, 1, "\n".join(names), transform=axes.transAxes, va="top", fontsize=8, linespacing=1.5)
    chance = 1 / table.attrs["size"]
    axes.axhline(chance, color="0.5", linestyle=":")
    axes.annotate(
        "chance", (ordered["seconds"].min(), chance), xytext=(0, 4), textcoords="offset points", fontsize=8
    )
    axes.set(
        xscale="log", xlim=(ordered["seconds"].min() / 1.3, ordered["seconds"].max() * 1.3),
        xlabel=f"processor time of a training (s); +:{plus[1:]}", ylabel=f"top-1 of {table.attrs['size']}",
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Task:
    """One fold of a phantom: who is trained on, who is asked, and the galleries."""

    prepared: Any
    bank: Embeddings
    settings: Any
    train: np.ndarray
    asked: np.ndarray
    galleries: list[list[str]]
    truth: Path


def open_tasks(root: Path, folder: Path, stage: str, config: str, changes: list[str]) -> list[Task]:
    own = {"fusion": LEVELS, "tower": TOWER}.get(stage)
    if own is not None:  # targets without a way back to pictures, which the ladder does not need
        changes = [f"target={json.dumps(own)}", "prior.kind=identity", "generator.kind=nearest", *changes]
    run = open_run(read_config(config, changes, root=root), folder)
    prepared = preprocess(run)
    banks = [part.embeddings for part in embed(run)]
    ids = prepared.responses.stimulus_ids
    concepts = prepared.stimuli.concepts_of(ids).astype(str)
    tasks = []
    for fold, bank in zip(prepared.split.folds, banks, strict=True):
        train, asked = fold.train, fold.test
        if stage != "test":
            names = np.unique(concepts[train])
            chosen = make_generator(0, "ladder").permutation(names)[: round(SHARE * len(names))]
            held = np.isin(concepts[train], chosen)
            train, asked = train[~held], train[held]
        images = pd.DataFrame({"id": ids[asked], "concept": concepts[asked]}).drop_duplicates("id")
        images = images.sort_values(["concept", "id"])
        number = images.groupby("concept").cumcount()
        galleries = [images["id"][number == k].tolist() for k in sorted(number.unique())]
        truth = root / "phantom_truth"
        tasks.append(Task(prepared, bank, run.config.retrieval, train, asked, galleries, truth))
    return tasks


def score(task: Task, rung: Rung, seed: int) -> pd.DataFrame:
    """Return the rank of the true image of every query, and the processor time of the training in s."""
    config = validate_component("encoder", rung.encoder)
    responses = pick_labelled_trials(task.prepared, task.train, rung.repeats)
    encoder = roles.build(BrainEncoder, config, seed=seed)
    targets = task.bank.select(list(responses.stimulus_ids))
    texts = place_captions(task, targets) if getattr(config, "reads_text", False) else None
    encoder.bind(Context(images=task.prepared.stimuli, texts=texts))
    started = time.process_time()
    encoder.fit(responses, targets)
    seconds = time.process_time() - started
    queries = pick_labelled_trials(task.prepared, task.asked, "averaged")
    settings = task.settings.model_copy(update={"centre": rung.centre})
    source = GallerySource(encoder, task.bank, list(pd.unique(responses.stimulus_ids)), settings)
    tables = []
    for ids in task.galleries:
        own = queries.select(np.flatnonzero(np.isin(queries.stimulus_ids.astype(str), ids)))
        subjects = own.trials["subject"].to_numpy(dtype=object)
        ranked = rank_fold(source, encoder.predict(own), subjects, ids, protocol="ladder")
        columns = {"subject": subjects, "id": ranked.query_ids, "concept": own.trials["concept"]}
        tables.append(pd.DataFrame({**columns, "rank": ranked.worst_ranks, "size": len(ids)}))
    found = pd.concat(tables, ignore_index=True).assign(seed=seed, seconds=seconds)
    return found.assign(**describe_term(encoder))


def describe_term(encoder: Any) -> dict[str, Any]:
    """Return the first and last epoch's mean of the last objective of a network, and what a run says of them."""
    history, config = getattr(getattr(encoder, "fitted", None), "history", []), encoder.config
    if not history:
        return {}
    terms = [list(one["objectives"].values())[-1] for one in history]
    terms = [value for value in terms if value] or terms  # 0 outside the phase
    said = describe_objective_values(history, [one.model_dump() for one in config.objectives])
    return {"first": terms[0], "last": terms[-1], "notice": " ".join(said)}


def place_captions(task: Task, targets: Embeddings) -> Embeddings:
    """Return the captions of all images in the space of the targets, by a ridge map of the training images."""
    stimuli = task.prepared.stimuli
    encoder = SentenceEncoder(find_sentence_folder(MINILM, "--stage worth"))
    captions = find_texts(stimuli, task.truth / "captions.csv", "")
    texts = Embeddings(
        make_unit(average_texts(captions, encoder.encode)), stimuli.ids, MINILM
    )  # (n_images, 384)
    known, wanted = texts.select(list(targets.ids)).vectors, targets.vectors
    centre, mean = known.mean(0), wanted.mean(0)
    gram = (known - centre).T @ (known - centre)
    penalty = 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram + penalty, (known - centre).T @ (wanted - mean))
    placed = (texts.vectors - centre) @ weights + mean
    return Embeddings(placed.astype(np.float32), stimuli.ids, targets.space)


def tabulate(folder: Path, rungs: dict[str, Rung], reference: str, top: int = 5) -> pd.DataFrame:
    """Return top-1 and top-5 with intervals, and the paired difference in one of them to a reference.

    `p` flips the signs of whole concepts, corrected after Holm over the rows; `corrected` is the interval of the
    difference at the level that Bonferroni asks of so many rows.
    """
    rows, names = [], list(rungs)
    compared = {name: rungs[name].reference or reference for name in names}
    n_compared = sum(name != of for name, of in compared.items())
    read = {name: pd.concat(map(pd.read_csv, sorted(folder.glob(f"{slug(name)}-*.csv")))) for name in names}
    keys = ["subject", "concept", "id"]

    def find_hits(name: str, k: int, seeds: set[int]) -> pd.Series:
        table = read[name][read[name]["seed"].isin(seeds)]
        return (table["rank"] <= k).groupby([table[key] for key in keys]).mean()

    drawn = {name: set(table["seed"]) for name, table in read.items()}
    for name in names:
        row: dict[str, Any] = {"rung": name, "seeds": read[name]["seed"].nunique()}
        for k in (1, 5):
            values = find_hits(name, k, drawn[name])
            found = interval_of_rows(values.to_numpy(), **name_units(values))
            row[f"top-{k}"] = f"{values.mean():.3f} ({write_limits(found)})"
            if k == 1:
                row |= {"top1": values.mean(), "low": found.low, "high": found.high}
        of, seeds = compared[name], (drawn[name], drawn[compared[name]])
        if all(rungs[one].encoder["kind"] in WITH_SEEDS for one in (name, of)):
            seeds = (seeds[0] & seeds[1],) * 2  # one of them may have been run with more
        values, other = find_hits(name, top, seeds[0]), find_hits(of, top, seeds[1])
        pair = values.to_numpy(), other[values.index].to_numpy()
        gain = paired_difference(*pair, **name_units(values))
        row["difference"] = f"{gain.mean:+.3f} ({write_limits(gain.interval, '+')})"
        if name != compared[name]:
            level = 1 - 0.05 / n_compared
            wide = paired_difference(*pair, **name_units(values), level=level, n_boot=20_000)
            row["corrected"] = write_limits(wide.interval, "+")
            row["p"] = wide.p_value
        if "first" in read[name]:
            row["own term"] = f"{read[name]['first'].mean():.4g} to {read[name]['last'].mean():.4g}"
            row["notice"] = "; ".join(sorted(set(read[name]["notice"].dropna()) - {""}))
        if "seconds" in read[name]:
            row["seconds"] = read[name]["seconds"].mean()
        rows.append(row)
    table = pd.DataFrame(rows)
    if "p" in table:
        tested = table["p"].notna()
        table.loc[tested, "p"] = correct_holm(table["p"][tested].to_numpy())
    table.attrs["size"] = int(read[reference]["size"].iloc[0])
    return table


def write_limits(found: CrossedInterval, sign: str = "") -> str:
    """Return limits as text, or why there are none."""
    if found.low is None or found.high is None:
        return found.resampled
    return f"{found.low:{sign}.3f} to {found.high:{sign}.3f}"


def name_units(values: pd.Series) -> dict[str, Any]:
    """Return what is resampled: concepts, and people first where there are several."""
    people = values.index.get_level_values("subject")
    concepts = list(values.index.get_level_values("concept"))
    return {"clusters": concepts, "subjects": list(people) if people.nunique() > 1 else None}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "_", name.lower())


def list_rungs(stage: str, base: str, kind: str, truth: Path) -> dict[str, Rung]:
    if stage == "worth":
        return list_worth(kind, truth)
    if stage == "defaults":
        return list_defaults(truth)
    if stage == "recipes":
        return list_recipes()
    if stage == "frontier":
        return list_frontier(kind)
    if stage == "networks":
        return NETWORKS
    if stage == "training":
        return {base: NETWORKS[base], **list_training(NETWORKS[base])}
    if stage == "objectives":
        return {base: NETWORKS[base], **list_objectives(NETWORKS[base])}
    if stage == "fusion":
        return list_fusion(NETWORKS[base])
    if stage == "tower":
        return list_tower(NETWORKS[base])
    if stage == "salient":
        return list_salient(NETWORKS[base])
    if stage == "chosen":
        return {base: NETWORKS[base], **CHOSEN}
    tested = {**NETWORKS, **{name: CHOSEN[name] for name in TESTED}}
    return {**list_frontier(kind), **tested}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, default="networks")
    parser.add_argument("--base", choices=list(NETWORKS), default="eegproject", help="what the stages change")
    parser.add_argument("--config", default="phantom_eeg")
    parser.add_argument("--set", action="append", default=[], help="changes of the configuration")
    parser.add_argument("--epochs", type=int, help="for all networks")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="where the frontier is drawn")
    parser.add_argument("--only", nargs="*", help="names of rungs")
    parser.add_argument("--top", type=int, choices=(1, 5), default=5, help="what differences are taken in")
    options = parser.parse_args()

    @cache
    def open_for(settings: tuple[str, ...]) -> list[Task]:
        own = "run" if not settings else f"run-{slug(' '.join(settings))}"
        return open_tasks(
            options.root, options.out / own, options.stage, options.config, [*options.set, *settings]
        )

    tasks = open_for(())
    has_voxels = "voxel" in tasks[0].prepared.responses.dims
    kind = "voxels" if has_voxels else "trials"
    rungs = list_rungs(options.stage, options.base, kind, tasks[0].truth)
    usual = [*NETWORKS, *TESTED] if options.stage == "test" else list(rungs)
    only = options.only or [name for name in usual if name != VOXELS or has_voxels]
    rungs = {name: rung for name, rung in rungs.items() if name in only}
    folder = options.out / ("test" if options.stage == "test" else "validation")
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for name, rung in rungs.items():
            path, is_network = folder / f"{slug(name)}-{seed}.csv", rung.encoder["kind"] in WITH_SEEDS
            if path.exists() or (seed > 0 and not is_network):
                continue
            if options.epochs and "epochs" in rung.encoder:
                rung = change(rung, epochs=options.epochs)
            started = time.process_time()
            table = pd.concat(
                [score(task, rung, seed) for task in open_for(rung.settings)], ignore_index=True
            )
            table.to_csv(path, index=False)
            top5 = (table["rank"] <= 5).mean()
            print(f"{name}, seed {seed}: top-5 {top5:.3f}, {time.process_time() - started:.0f} s", flush=True)
    reference = next(iter(rungs))
    table = tabulate(folder, rungs, reference, options.top)
    size = table.attrs["size"]
    print(
        f"gallery of {size}, chance {1 / size:.3f} and {5 / size:.3f}; differences in top-{options.top} to {reference}"
    )
    formats = {"seconds": "{:.0f}".format, "p": "{:.4f}".format}
    print(table.drop(columns=["top1", "low", "high"]).to_string(index=False, formatters=formats, na_rep=""))
    if options.picture:
        draw_frontier(table, options.picture)


if __name__ == "__main__":
    main()
