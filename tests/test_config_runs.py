"""Every shipped configuration from raw files to report: phantom files, tiny random networks, one epoch.

A new configuration is picked up from the folder and needs no entry here as long as the manifest of its data set names
a phantom: what makes it small goes by names of fields (`FEWER`) and kinds of components (`TINY`). Scores mean nothing.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from braindecode_vis import pipeline
from braindecode_vis.config import RunConfig, dump_config, read_config
from braindecode_vis.datasets.corpus.corpus_config import CorpusConfig
from braindecode_vis.datasets.haxby_slices import CATEGORIES
from braindecode_vis.datasets.manifests import find_package_data, read_manifest
from braindecode_vis.embeddings import efficientnet
from braindecode_vis.generation.captions_config import GitCaptionsConfig
from braindecode_vis.generation.priors.diffusion_config import (
    DiffusionPriorConfig,
    DiffusionPriorObjectiveConfig,
)
from braindecode_vis.parts.analyses.analyze import analyze
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.foundation.corpus.growing import add_sources
from braindecode_vis.parts.phantom import SIZES, PhantomConfig, make_phantom
from braindecode_vis.parts.phantom.formats.file_writers import write_tsv, write_volumes
from braindecode_vis.pipeline.runs import open_run
from tests.datasets.test_digits69 import make_phantom_file as make_digits
from tests.datasets.test_muse_n170 import make_runs as make_muse
from tests.embeddings.test_caption_bank import write_git
from tests.generation.hub_models import write_sd, write_sdxl, write_token_unclip
from tests.parts.phantom.tiny import embed

SHIPPED = sorted(find_package_data("configs").glob("*.yaml"))

# Data set -> changes of the tiny size of its phantom, and settings of the data set.
PHANTOMS = {
    "alljoined1": ({}, {"image_size": 32}),
    "bold5000": ({"n_imagery": 3, "imagery_repetitions": 2}, {}),
    "god": ({"n_subjects": 3}, {}),
    "laion_fmri": ({}, {"image_size": 32}),
    "nsd": ({"n_subjects": 2, "n_imagery": 0, "imagery_repetitions": 0, "n_synthetic": 0}, {}),
    "nsd_imagery": ({"n_synthetic": 0}, {}),
    "nsd_synthetic": ({"n_imagery": 0, "imagery_repetitions": 0}, {}),
    "nsd_timeseries": ({"n_train_concepts": 9, "n_sessions": 2}, {"image_size": 32}),
    "things_eeg2": ({"n_subjects": 3}, {}),
    "things_meg": (
        {
            "n_subjects": 2,
            "n_train_concepts": 6,
            "n_train_exemplars": 4,
            "n_test_concepts": 3,
            "n_sessions": 4,
            "test_repetitions": 4,
            "n_raw_sessions": 1,
        },
        {},
    ),
}
# Data sets without a phantom: what writes small files of theirs, and settings.
FILES = {
    "arrays": ("write_arrays", {}),
    "digits69": ("write_digits", {"verify": False}),
    "haxby_slices": ("write_haxby", {"runs": [1, 2, 3]}),
    "muse_n170": ("write_muse", {"runs": [1, 2, 3]}),
    "synthetic_digits": (None, {"n_train": 40, "n_test": 12, "n_voxels": 30}),
}
# Settings of a data set that name more than the phantom has.
HELD = {"god": {"subjects": [1, 2, 3]}, "nsd": {"sessions": 2, "subjects": [1, 2]}}

# Numbers that are lowered wherever a component has a field of this name and a larger value.
FEWER = {
    "epochs": 1, "n_epochs": 1, "n_bootstrap": 100, "n_permutations": 100, "n_folds": 2, "n_inner_folds": 2,
    "n_best": 20,
    "steps": 2, "n_networks": 1, "candidates": 1, "n_random": 1, "out_of_fold": 2,
    "hidden": 32, "projector_hidden": 32, "width": 16, "depth": 2, "n_blocks": 1, "shared": 32, "decoder_width": 16,
    "decoder_depth": 1, "n_virtual_channels": 16, "initial_channels": 16, "backbone_outputs": 32, "head_hidden": 32,
    "n_draws": 2, "n_clusters": 8, "code_updates": 20,
    "own_trials": 4, "simulated_steps": 3, "people_steps": 3,
}  # fmt: skip
# Kind of a component -> settings that make it small; towers keep their architecture with fewer and narrower layers.
_VIT = {"layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.0}
_TEXT = {"layers": 1, "width": 32, "heads": 2}
TINY = {
    "openclip": lambda own: {
        "weights": "random", "precision": "float32",
        "model_args": {
            "embed_dim": 32,
            "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8} if own["architecture"].startswith("RN") else _VIT,
            "text_cfg": _TEXT,
        },
    },
    # As deep as layers are asked for by number.
    "transformers": lambda own: {
        "weights": "random", "repository": None, "precision": "float32",
        "model_args": {
            "hidden_size": 16, "num_hidden_layers": 36, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": [28, 28], "patch_size": [14, 14],
        },
    },
    "timm": lambda own: {
        "weights": "random", "model_args": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    },
    "sdxl_turbo": lambda own: {
        "weights": str(write_tiny("sdxl") / "sdxl"), "ip_adapter": str(write_tiny("sdxl") / "adapter.safetensors"),
        "image_size": 16,
    },
    "sd_ip_adapter": lambda own: {
        "weights": str(write_tiny("sd") / "sd"), "ip_adapter": str(write_tiny("sd") / "adapter.safetensors"),
        "image_size": 16,
    },
    "token_unclip": lambda own: {
        "weights": str(write_tiny("tokens") / "tokens"), "image_size": 16,
        "refine": {**own["refine"], "weights": str(write_tiny("sdxl") / "sdxl"), "steps": 2},
    },
    "window_reconstructions": lambda own: {"step": 0.5, "images": 4, "shown": 2},
    "git": lambda own: {"captioner": str(write_tiny("git") / "git")},
    "vae": lambda own: {
        "weights": "random", "image_size": 64,
        "model_args": {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    },
    "taesd": lambda own: {"weights": "random", "image_size": 32},
    "layers": lambda own: {"size": own["size"] and min(own["size"], 8)},
    "diffusion": lambda own: {
        "widths": [16, 8], "time_features": 8, "candidates": 16, "min_steps": 1,
    },
    "growing_window": lambda own: {"step": 0.5},
    "ridge": lambda own: {"alphas": own["alphas"][:2], "n_features": [20, None] if own.get("n_features") else None},
    "logistic": lambda own: {"c": own["c"][:1], "windows": own["windows"][:1]},
}  # fmt: skip
# Constants of recipes that are made small too.
CONSTANTS = {
    GitCaptionsConfig: {"max_new_tokens": 4},
    DiffusionPriorConfig: {"depth": 1},
    DiffusionPriorObjectiveConfig: {"depth": 1, "heads": 2, "head_width": 4},
}
# Twins of a configuration that stays: of another number of folds or sessions, another subject's or another modality's.
SLOW = (
    "alljoined16m_neuralbench",  # things_eeg2_neuralbench on the files of alljoined16m_ridge
    "bold5000_wave_vith",  # as phantom_bold_wave, with networks of the hub
    "digits69_generative",
    "digits69_ridge_10fold",
    "digits69_ridge_5fold",
    "digits69_ridge_5fold_contrast",
    "nsd_benchetrit_generation",
    "nsd_brainit_bigg",  # as phantom_nsd_clusters, with a network of the hub
    "nsd_imagery_wave_full",
    "nsd_imagery_wave_generation",
    "nsd_mindeye2_bigg",
    "nsd_mindeye2_generation",
    "nsd_subj01_37",
    "nsd_subj01_40",  # nsd_ridge with its subject and sessions written out
    "phantom_eeg",
    "phantom_eeg_average",  # the test of the verb demo runs it
    "phantom_eeg_gaussian",  # a member of phantom_eeg_average
    "phantom_eeg_levels",  # as phantom_eeg_gaussian, four times the images of a network
    "phantom_eeg_network",  # a member of phantom_eeg_average
    "things_eeg2_atm_generation",
    "things_eeg2_loso_lora_clip_vitb32",
    "things_eeg2_loso_samga_internvit",
    "things_eeg2_loso_shallow_internvit",
    "things_eeg2_shallow_vith",  # things_eeg2_shallow_internvit with another target
    "things_meg_atm_generation",
    "things_meg_atm_vith",
    "things_meg_benchetrit_generation",
    "things_meg_lora_clip_vitb32",
    "things_meg_loso_samga_internvit",
    "things_meg_loso_shallow_internvit",
    "things_meg_neuralbench",  # things_eeg2_neuralbench on the files of things_meg_ridge_small
    "things_meg_ridge_large",  # things_meg_ridge_small with the other test set
    "things_meg_samga_internvit",
    "things_meg_shallow_internvit",
    "things_meg_ubp_rn50",
    "v4_photographs_network",  # as v4_photographs_levels, with one of its four levels
)


#: Data set -> the shortest of its configurations, which the default run has; the others run in `make test-further`.
PLAINEST = {
    yaml.safe_load(path.read_text())["dataset"]["kind"]: path
    for path in sorted(SHIPPED, key=lambda path: -path.stat().st_size)
    if path.stem not in SLOW
}

# Data sets with a configuration whose packaged generator takes embeddings of EfficientNet as it is. Elsewhere it sees
# small images: convolutions do not mind, and the time goes by their area.
PACKAGED = ("bold5000", "things_eeg2")


@functools.cache
def write_tiny(name):
    """Return a folder of the process with tiny random networks of the classes that a generator's weights have."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    {
        "git": lambda: write_git(folder / "git"),
        "sdxl": lambda: write_sdxl(folder),
        "sd": lambda: write_sd(folder),
        "tokens": lambda: write_token_unclip(folder / "tokens"),
    }[name]()
    return folder


def lessen(value):
    """Return the plain content of a configuration with everything made small."""
    if isinstance(value, list):
        return [lessen(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    changed = {key: lessen(entry) for key, entry in value.items()}
    for key, most in FEWER.items():
        if isinstance(changed.get(key), int) and changed[key] > most:
            changed[key] = most
    if changed.get("second_stage"):
        changed["epochs"] = 4  # each stage needs one
    if changed.get("hold_out"):
        changed["hold_out"] = 0.34  # two images and more
    if changed.get("kind") == "latent_diffusion":
        changed["repaint"] = 1  # by default most of its time
    if changed.get("kind") == "diffusion" and changed.get("held_out"):
        changed["held_out"] = 0.34
    return {
        **changed,
        **{k: v for k, v in TINY.get(changed.get("kind"), lambda own: {})(changed).items() if k in changed},
    }


def shrink(path, root):
    """Return a shipped configuration for the small files below `root`."""
    content = lessen(yaml.safe_load(dump_config(read_config(path))))
    kind = content["dataset"]["kind"]
    settings = FILES[kind][1] if kind in FILES else PHANTOMS.get(kind, ({}, {}))[1]
    joint = content["split"]["kind"] == "leave_one_subject_out" or content["encoder"].get("network", {}).get(
        "joint"
    )
    held = {key: value for key, value in HELD.get(kind, {}).items() if content["dataset"].get(key)}
    content["dataset"] |= {**({"root": str(root)} if root.exists() else {}), **settings, **held}
    if kind in ("things_eeg2", "things_meg", "god") and not joint:
        content["dataset"]["subjects"] = [1]
    if content["dataset"].get("notch"):  # a recording of a few seconds is shorter than these filters
        content["dataset"] |= {"l_freq": 2.0, "notch": []}
    if content["dataset"].get("atlas"):
        truth = root / "phantom_truth"
        grayordinates = truth / "parcels.dlabel.nii"
        file = grayordinates if grayordinates.exists() else truth / "parcels.nii.gz"
        content["dataset"]["atlas"] |= {"files": [str(file)], "labels": str(truth / "parcels.txt")}
    if (content.get("pretrain") or {}).get("corpus"):
        content["pretrain"]["corpus"] = [str(write_corpus(root))]
    for analysis in content["analyses"]:
        if analysis.get("candidates") in ("text", "words"):
            analysis["bank"] = str(root / "phantom_truth" / "captions.csv")
    return RunConfig.model_validate(content)


@functools.cache
def write_corpus(root):
    """Return a corpus of three simulated people, in the parcels of the small files below `root`."""
    people = root.with_name(f"{root.name}-people")
    make_phantom("corpus", people, size=SIZES["corpus"]["tiny"], config=PhantomConfig(snr=0.3), embed=embed)
    own = people / "phantom_truth"
    channels = {
        "kind": "fmri",
        "atlas": "own",
        "files": [own / "parcels.nii.gz"],
        "labels": own / "parcels.txt",
    }
    folder = root.with_name(f"{root.name}-corpus")
    config = CorpusConfig.model_validate({"channels": channels, "held_out": 0.1})
    add_sources(folder, sorted(people.glob("site*")), config)
    return folder


def write_arrays(root):
    rng = np.random.default_rng(0)
    root.mkdir()
    np.save(root / "data.npy", rng.standard_normal((24, 30)).astype(np.float32))
    np.save(root / "images.npy", rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    (root / "meta.yaml").write_text("first_id: 0\n")
    pd.DataFrame({"stimulus_id": [str(n % 12) for n in range(24)]}).to_csv(root / "trials.csv", index=False)


def write_digits(root):
    root.mkdir()
    make_digits(root / "digit69_28x28.mat", n_train=24, n_test=8)


def write_haxby(root):
    """One slice of noise: eight blocks a run, half as long as the recorded ones."""
    rng = np.random.default_rng(0)
    folder = root / "sub-001/func"
    for run in ("01", "02", "03"):
        stem = f"sub-001_task-objectviewing_acq-1slice_run-{run}"
        onsets = 10.0 + 15.0 * np.arange(8)
        table = pd.DataFrame({"onset": onsets, "duration": 10.0, "trial_type": rng.permutation(CATEGORIES)})
        write_tsv(folder / f"{stem}_events.tsv", table)
        volumes = (100 + rng.standard_normal((6, 5, 1)) for _ in range(60))
        path = folder / f"{stem}_bold.nii.gz"
        write_volumes(path, volumes, shape=(6, 5, 1), n_volumes=60, affine=np.eye(4), t_r=2.5)


def write_muse(root):
    root.mkdir()
    make_muse(root)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Raw files of each data set, written once; and the stages that its configurations share."""
    base = tmp_path_factory.mktemp("shipped")

    def find(kind):
        root = base / kind
        if kind in FILES and not root.exists() and FILES[kind][0]:
            globals()[FILES[kind][0]](root)
        elif kind not in FILES and not root.exists():
            form, (changes, _) = read_manifest(kind).phantoms[0], PHANTOMS.get(kind, ({}, {}))
            make_phantom(
                form,
                root,
                size=SIZES[form]["tiny"].replace(**changes),
                config=PhantomConfig(snr=0.3),
                embed=embed,
            )
        return root, base / f"{kind}-stages"

    return find


def link(source, target):
    """Hard links of the finished stages that do not depend on the encoder; a run reuses them by their fingerprint."""
    for stage in ("preprocess", "embed"):
        for artifact in sorted((source / stage).glob("*")) if (source / stage).is_dir() else ():
            if not (target / stage / artifact.name).exists():
                shutil.copytree(artifact, target / stage / artifact.name, copy_function=os.link)


def mark(path):
    if path.stem in SLOW:
        marks = [pytest.mark.slow]
    elif path in PLAINEST.values():
        marks = []
    else:
        marks = [pytest.mark.further]
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [mark(path) for path in SHIPPED])
def test_a_shipped_configuration_runs_from_raw_files_to_report(path, files, tmp_path, monkeypatch):
    for cls, constants in CONSTANTS.items():
        for name, value in constants.items():
            monkeypatch.setattr(cls, name, value)
    kind = yaml.safe_load(path.read_text())["dataset"]["kind"]
    if kind not in PACKAGED:
        monkeypatch.setattr(efficientnet, "_INPUT", 64)
    root, shared = files(kind)
    config = shrink(path, root)
    run = open_run(config, tmp_path / "run")
    link(shared, run.folder.path / "stages")
    rows = pipeline.run_all(run)
    link(run.folder.path / "stages", shared)
    assert rows
    assert all(np.isfinite(row["value"]) for row in rows if row["method"] == "decoded")
    if config.analyses:
        artifacts, refusals = analyze(run)
        assert not refusals
        assert len(artifacts) == len(config.analyses)
    assert (run.folder.path / "report.html").stat().st_size > 10_000
    assert audit_run(run.folder.path).leaks == ()  # no false alarm, whatever the layout and the components


def test_every_data_set_with_a_configuration_has_small_files():
    """A data set needs a phantom in its manifest, or files of `FILES`."""
    kinds = {yaml.safe_load(path.read_text())["dataset"]["kind"] for path in SHIPPED}
    assert [kind for kind in sorted(kinds - FILES.keys()) if not read_manifest(kind).phantoms] == []
    assert {path.stem for path in SHIPPED} >= set(SLOW)
