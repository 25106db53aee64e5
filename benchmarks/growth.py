"""Our steps against the size of what they are given: subjects, folds, images, trials, voxels, sessions.

Each step is the function that the pipeline calls. What a run has to have first is made before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from eeg_session import make_root
from measuring import Growth
from peers import write_session

N_TRIALS, N_FEATURES = 320, 850  # of a subject: 17 channels x 50 samples, averaged


def _open_run(
    folder: Path,
    n_subjects: int,
    n_trials: int,
    n_features: int,
    n_folds: int | None,
    stage: str = "train",
    *,
    side: int = 16,
    every: int = 10,
) -> Callable[[], Any]:
    """Return what computes a stage of a run with ridge whose earlier stages are there; every tenth trial is a test."""
    import braindecode_vis as bdv
    from braindecode_vis import pipeline
    from braindecode_vis.config import validate_config
    from braindecode_vis.pipeline.runs import open_run

    rng = np.random.default_rng(0)
    pictures = (
        rng.integers(0, 256, (n_trials, side, side, 3), np.uint8)
        if side > 16
        else rng.random((n_trials, 16, 16))
    )
    split = np.where(np.arange(n_trials) % every, "train", "test")
    shown = np.tile(np.arange(n_trials), n_subjects)
    data = bdv.from_arrays(
        rng.standard_normal((len(shown), n_features), dtype=np.float32),
        images=pictures, shown=shown, subject=np.repeat([f"{n:02d}" for n in range(n_subjects)], n_trials),
        split=np.tile(split, n_subjects) if n_folds is None else None,
    )  # fmt: skip
    data.save(folder / "data")
    config = {
        "name": "growth", "dataset": data.as_settings(folder / "data"), "target": {"kind": "pixels"},
        "encoder": {"kind": "ridge"}, "generator": {"kind": "latents"},
        "split": {"kind": "published"} if n_folds is None else {"kind": "kfold", "n_folds": n_folds},
    }  # fmt: skip
    run = open_run(validate_config(config, where="growth"), folder / "run")
    stages = ("preprocess", "embed", "train", "retrieve", "reconstruct", "evaluate")
    for earlier in stages[: stages.index(stage)]:
        getattr(pipeline, earlier)(run)
    return partial(getattr(pipeline, stage), run)


def train_subjects(folder: Path, n: int) -> Callable[[], Any]:
    """Fit all subjects together, as a run of several does; 0 is a subject of few trials."""
    return _open_run(folder, max(1, n), *((N_TRIALS, N_FEATURES) if n else (20, 10)), None)


def evaluate_subjects(folder: Path, n: int) -> Callable[[], Any]:
    """Score all subjects of a run, each on 80 test pictures; 0 is a subject of few trials."""
    return _open_run(folder, max(1, n), *((800, 60) if n else (60, 10)), None, "evaluate")


def evaluate_pictures(folder: Path, n: int) -> Callable[[], Any]:
    """Score n images of 425 pixels, as the papers on NSD do."""
    return _open_run(folder, 1, 2 * n, 10, None, "evaluate", side=425, every=2)


def reconstruct_pictures(folder: Path, n: int) -> Callable[[], Any]:
    """Make n images of 64 pixels."""
    return _open_run(folder, 1, 2 * n, 10, None, "reconstruct", side=64, every=2)


def predict_trials(folder: Path, n: int) -> Callable[[], Any]:
    """Read n new trials from a folder of arrays and predict them, without images."""
    import braindecode_vis as bdv
    from braindecode_vis.pipeline.finished_run import open_finished
    from braindecode_vis.pipeline.new_trials import read_new
    from braindecode_vis.pipeline.predicting import predict

    _open_run(folder, 1, 200, N_FEATURES, None, "evaluate")()
    rng = np.random.default_rng(1)
    pictures, shown = rng.random((min(n, 200), 16, 16)), np.arange(n) % 200
    new = bdv.from_arrays(
        rng.standard_normal((n, N_FEATURES), dtype=np.float32), images=pictures, shown=shown, subject="00"
    )
    new.save(folder / "new")
    run = open_finished(folder / "run")
    return lambda: predict(run, read_new(run, folder / "new", folder / "work"), images=False)


def train_folds(folder: Path, n: int) -> Callable[[], Any]:
    return _open_run(folder, 1, 500, 250, n)


def _make_pictures(folder: Path, n: int) -> Any:
    from braindecode_vis.base.stimuli import StimulusSet

    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    names = [f"image{number:06d}" for number in range(n)]
    return StimulusSet.from_pixels(pixels, names, names, source="noise")


def look_up(folder: Path, n: int) -> Callable[[], Any]:
    """1000 look-ups of one picture each among n, the first of which makes the index."""
    stimuli = _make_pictures(folder, n)
    asked = stimuli.ids[:: max(1, n // 1000)][:1000]
    stimuli.find_rows(asked[:1])
    return lambda: [stimuli.find_rows([name]) for name in asked]


def fill_bank(folder: Path, n: int) -> Callable[[], Any]:
    """Embed n pictures by their classical features into an empty bank."""
    from braindecode_vis.embeddings.bank import embed_stimuli
    from braindecode_vis.embeddings.pixels import EngineeredConfig

    stimuli, encoder = _make_pictures(folder, n), EngineeredConfig().build()
    return lambda: embed_stimuli(encoder, stimuli, cache=folder / "bank")


def read_bank(folder: Path, n: int) -> Callable[[], Any]:
    """Read the vectors of n pictures from a bank that holds twice as many, in another order."""
    from braindecode_vis.embeddings import bank

    hashes = [f"{number:064x}" for number in range(2 * n)]
    vectors = np.random.default_rng(0).standard_normal((2 * n, 512), dtype=np.float32)
    place = bank.open_bank(folder / "bank", "toy")
    for start in range(0, 2 * n, 4096):
        bank.write_segment(place, hashes[start : start + 4096], vectors[start : start + 4096])
    wanted = [hashes[row] for row in np.random.default_rng(1).permutation(2 * n)[:n]]
    return lambda: bank.read_rows(place, wanted)


def rank(folder: Path, n: int) -> Callable[[], Any]:
    """Rank 200 queries among n pictures."""
    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.scoring.retrieval import compute_ranks

    rng = np.random.default_rng(0)
    ids = np.array([f"image{number:06d}" for number in range(n)], dtype=object)
    gallery = Embeddings(rng.standard_normal((n, 512), dtype=np.float32), ids, "toy")
    rows = rng.integers(0, n, 200)
    queries = Embeddings(
        gallery.vectors[rows] + rng.standard_normal((200, 512), dtype=np.float32), ids[rows], "toy"
    )
    return lambda: compute_ranks(queries, gallery, n_top=10, device="cpu")


def compare_pictures(folder: Path, n: int) -> Callable[[], Any]:
    """Look for copies of 200 tested pictures among n files of 64 pixels, as the audit does."""
    from PIL import Image

    from braindecode_vis.base.stimuli import StimulusSet
    from braindecode_vis.pipeline.leaks.likeness import find_like_pictures

    rng = np.random.default_rng(0)
    names = [f"image{number:06d}" for number in range(n)]
    for name in names:
        drawn = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        drawn.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{name}.jpg", quality=90)
    files = [f"{name}.jpg" for name in names]
    table = pd.DataFrame({"stimulus_id": names, "concept": names, "path": files, "sha256": None})
    return lambda: find_like_pictures(StimulusSet(table, folder), names, set(names[:200]))


def _preprocess(folder: Path, n_concepts: int, n_sessions: int) -> Callable[[], Any]:
    from braindecode_vis.datasets.things_eeg2.dataset import ThingsEeg2Config
    from braindecode_vis.preprocessing.meeg import write_meeg

    make_root(folder / "root", n_concepts, max(2, n_concepts // 3), 2, n_sessions)
    config = ThingsEeg2Config(root=folder / "root", sessions=tuple(range(1, n_sessions + 1)))
    (folder / "out").mkdir()
    return lambda: write_meeg(config, folder / "out")


def cut_trials(folder: Path, n: int) -> Callable[[], Any]:
    """Read, cut, whiten and write one raw session of n training concepts, ten images each."""
    return _preprocess(folder, n, 1)


def cut_sessions(folder: Path, n: int) -> Callable[[], Any]:
    return _preprocess(folder, 16, n)


def mask(folder: Path, n: int) -> Callable[[], Any]:
    """Mask 30 volumes of n thousand voxels, packed."""
    from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, read_volume_header

    shape = (10 * n, 10, 10)
    inside = write_session(folder / "betas.nii.gz", 30, shape)

    def read() -> Any:
        header = read_volume_header(folder / "betas.nii.gz")
        return MaskedVolumes(header, inside, divide_by=300)(0, 30)

    return read


def fit_voxels(folder: Path, n: int) -> Callable[[], Any]:
    """Choose a penalty and fit 600 trials of n thousand voxels."""
    from braindecode_vis.base.arrays import Embeddings, Responses
    from braindecode_vis.encoders.ridge import RidgeConfig

    rng = np.random.default_rng(0)
    ids = np.array([f"image{number}" for number in range(600)], dtype=object)
    columns = {"subject": "1", "session": "1", "run": "1", "repetition": 0, "split": "train"}
    table = pd.DataFrame({"stimulus_id": ids, **columns})
    data = rng.standard_normal((600, 1000 * n), dtype=np.float32)
    responses = Responses.from_checked(data, ("trial", "voxel"), table, "au", {})
    targets = Embeddings(rng.standard_normal((600, 256), dtype=np.float32), ids, "toy")
    return lambda: RidgeConfig().build(seed=0).fit(responses, targets)


LINEAR, CONSTANT = 1.15, 0.15
_FEW, _MANY = (2000, 4000, 8000, 16_000), (5000, 10_000, 20_000, 40_000, 80_000)

GROWTHS = (
    Growth(
        "subjects", "subjects: `train` of ridge, 320 trials x 850 features each", train_subjects,
        0, (1, 2, 4, 8), (1, 2, 4, 8, 16), LINEAR, LINEAR,
        "Subjects: all are fitted together. One and two have fewer training trials (288 each) than features, where a "
        "fit takes trials squared times features; from four on it takes features squared times trials, which is "
        "linear. The power is taken over both and is neither's.",
    ),
    Growth(
        "evaluate", "subjects: `evaluate`, 80 test pictures each", evaluate_subjects,
        0, (1, 2, 4, 8), (1, 2, 4, 8, 16), LINEAR, LINEAR,
    ),
    Growth(
        "evaluate-pictures", "images: `evaluate`, 425 px", evaluate_pictures,
        10, (10, 20, 40, 80), (50, 100, 200, 400), LINEAR, LINEAR,
    ),
    Growth(
        "reconstruct", "images: `reconstruct`, 64 px", reconstruct_pictures,
        10, (10, 20, 40, 80), (50, 100, 200, 400), LINEAR, LINEAR,
    ),
    Growth(
        "predict", "trials: `predict` of a folder of arrays", predict_trials,
        4, (200, 400, 800, 1600), (400, 800, 1600, 3200, 6400), LINEAR, LINEAR,
    ),
    Growth(
        "folds", "folds: `train` of ridge, 500 trials x 250 features", train_folds,
        2, (2, 3, 5, 8), (4, 8, 16, 32), LINEAR, CONSTANT,
        "Folds: what grows in memory are the fitted weights of each (a quarter of a megabyte here), which stay there "
        "for the stages that follow; trials and Gram matrices are those of one fold at a time.",
    ),
    Growth("look-up", "images: 1000 look-ups by id", look_up, 4, _FEW, _MANY, CONSTANT, CONSTANT),
    Growth(
        "bank", "images: classical features into a bank", fill_bank,
        4, (20, 40, 80, 160), (100, 200, 400, 800), LINEAR, LINEAR,
    ),
    Growth("read", "images: half of a bank, shuffled, read", read_bank, 4, _FEW, _MANY, LINEAR, LINEAR),
    Growth("rank", "images: 200 queries ranked", rank, 4, _FEW, _MANY, LINEAR, LINEAR),
    Growth(
        "likeness", "images: `audit` looks for copies of 200", compare_pictures,
        4, (500, 1000, 2000, 4000), (5000, 10_000, 20_000, 40_000, 73_000), LINEAR, LINEAR,
    ),
    Growth(
        "trials", "trials: `preprocess` of a raw session, by concepts", cut_trials,
        2, (4, 8, 16, 32), (15, 30, 60, 120, 240), LINEAR, LINEAR,
    ),
    Growth(
        "sessions", "sessions: `preprocess` of raw EEG", cut_sessions,
        1, (1, 2, 3, 4), (1, 2, 3, 4), LINEAR, LINEAR,
    ),
    Growth(
        "mask-voxels", "voxels (thousands): 30 packed volumes masked", mask,
        1, (25, 50, 100, 200), (50, 100, 200, 400, 800), LINEAR, LINEAR,
    ),
    Growth(
        "ridge-voxels", "voxels (thousands): ridge on 600 trials", fit_voxels,
        1, (2, 4, 8, 16), (4, 8, 16, 32, 64), LINEAR, LINEAR,
    ),
)  # fmt: skip
