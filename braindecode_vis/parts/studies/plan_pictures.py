"""Estimates what pictures take: some go through every stage with a small ridge, a large network is counted."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.stimuli import StimulusSet, find_comparison_size
from braindecode_vis.config import RunConfig, validate_config
from braindecode_vis.embeddings.pixels import PixelsConfig
from braindecode_vis.parts.studies.plan_pieces import (
    BUDGET_S,
    LARGEST_FACTOR,
    LONGER,
    PieceCost,
    Step,
    add_pieces,
    make_step,
    measure,
    uses_gpu,
)
from braindecode_vis.parts.studies.run_sizes import RunSizes, measure_folder
from braindecode_vis.report.page_gallery import MOST_FULL

#: Pictures of training and of test that are measured first.
FIRST_PICTURES = (3, 2)


def plan_pictures(
    config: RunConfig, sizes: RunSizes, source: Any = None, budget: float = BUDGET_S, left_out: str = ""
) -> tuple[list[Step], tuple[int, ...], dict[str, PieceCost]]:
    """Run the first pictures of the data, or random ones, through every stage.

    Returns
    -------
    steps
        Those after training, and `embed`.
    dims
        The size of an embedding.
    first
        What each stage of the first of these runs took, and under `read` what reading one picture takes, with the bytes
        of its file; empty if nothing was measured.
    """
    steps: list[Step] = []
    records: list[tuple[int, int, dict[str, PieceCost]]] = []
    dims: tuple[int, ...] = (1024,)
    names = {"embed": sizes.n_images, "retrieve": sizes.n_test, "reconstruct": sizes.n_test}
    # A page carries no more items, nor larger images beside it.
    names = ({} if config.decodes_categories else names) | {"evaluate": sizes.n_test}
    names["report"] = min(sizes.n_test, MOST_FULL // 2)
    large = None if config.decodes_categories else _count_network(config.target)
    tera = PieceCost(1.0) if large is None else _measure_tera()
    # By processor time, as a busy machine makes no network large.
    if large is None or sum(FIRST_PICTURES) * large.tera_operations * tera.cpu_seconds <= budget / 2:
        large = None
    else:
        # Values as many as those of an embedding, for the other stages; `embed` reads the pictures.
        side = max(2, round(math.sqrt(math.prod(large.shape))))
        config = config.model_copy(update={"target": PixelsConfig(size=side)})
    try:
        first, dims = _run_pictures(config, sizes, source, *FIRST_PICTURES)  # loads libraries and weights
        spent = 0.0
        for n_train, n_test in ((6, 3), (24, 8), (48, 24), (48, 60)):
            if records:  # the first run, which also loads, does not tell what a picture takes
                before, last = records[-1][:2], records[-1][2]
                spent += last["evaluate"].count_spent() * n_test / before[1]
                spent += last.get("embed", PieceCost(1.0)).count_spent() * (n_train + n_test) / sum(before)
            if spent > LONGER * budget:  # a large network
                break
            records.append((n_train, n_test, _run_pictures(config, sizes, source, n_train, n_test)[0]))
    except BraindecodeVisError as error:
        why = f"not measured: {' '.join(str(error).split())[:200]}"
        steps = [Step(name, None, how=why) for name in names]
        if large is None:
            return steps, dims, {}
        return [_add_network(steps[0], large, tera, sizes.n_images), *steps[1:]], large.shape, {}
    for name, size in names.items():
        if name not in first:  # a run of categories, or one without pictures
            continue
        pieces = [
            replace(found[name], size=n_train + n_test if name == "embed" else n_test)
            for n_train, n_test, found in records
        ]
        if name == "reconstruct" and left_out:
            steps.append(Step(name, None, how=f"not measured: {left_out} not here, and images need them"))
            continue
        counted = f"pictures of {sizes.image_px} px" if name == "embed" else "test rows"
        what = f"{pieces[-1].size:.0f} {counted}"
        # In the first run each stage loads its libraries, as in the real one.
        held = first[name].held + max(0.0, first[name].memory - pieces[0].memory)
        step = make_step(
            name, pieces, size, what, more=held, in_batches=True,
            on_gpu=name in ("embed", "reconstruct") and uses_gpu(),
            beside=partial(_count_pairs, sizes.image_px) if name == "evaluate" else None,
        )  # fmt: skip
        # The first run also loads libraries and weights, which says nothing of the time of a picture.
        wall, cpu = first[name].seconds - pieces[0].seconds, first[name].cpu_seconds - pieces[0].cpu_seconds
        steps.append(add_pieces(step, PieceCost(1.0, max(0.0, wall), max(0.0, cpu)), 1.0))
    if large is not None:
        dims = large.shape
        steps[0] = _add_network(steps[0], large, tera, sizes.n_images)
    return steps, dims, first | {"read": records[-1][2]["read"]}


@dataclass(frozen=True)
class _CountedNetwork:
    """An image network: shape of an embedding, 10^12 operations for one picture, and bytes of the weights."""

    shape: tuple[int, ...]
    tera_operations: float
    n_bytes: float


def _count_network(target: Any) -> _CountedNetwork | None:
    """Count the operations of an image network without weights and memory; None where that cannot be done.

    On a GPU nothing is counted, as pictures are measured quickly there.
    """
    from braindecode_vis.embeddings.layer_readout import read_layers
    from braindecode_vis.embeddings.vision_network import VisionNetworkConfig

    if not isinstance(target, VisionNetworkConfig) or uses_gpu():
        return None
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
            tower = target.model_copy(update={"weights": "random"}).make_tower()
            picture = torch.empty(1, 3, *[target.make_transform().size] * 2)
            found = read_layers(
                tower, picture, layers=target.layers, pooling=target.pooling, project=target.project
            )
    except (BraindecodeVisError, RuntimeError, TypeError, ValueError):  # some draw their weights themselves
        return None
    n_bytes = sum(one.numel() * one.element_size() for one in tower.network.parameters())
    return _CountedNetwork(tuple(found.shape[1:]), counted.get_total_flops() / 1e12, float(n_bytes))


def _add_network(step: Step, large: _CountedNetwork, tera: PieceCost, n_images: int) -> Step:
    """Return `embed` with the operations of a large network beside reading the pictures."""
    done = n_images * large.tera_operations
    seconds, read = done * tera.seconds, step.seconds or 0.0
    return replace(
        step, seconds=read + seconds, low=(step.low or 0.0) + seconds / LARGEST_FACTOR,
        high=(step.high or 0.0) + seconds * LARGEST_FACTOR,
        cpu_seconds=(step.cpu_seconds or 0.0) + done * tera.cpu_seconds,
        memory=(step.memory or 0.0) + 2.0 * large.n_bytes,  # the network and its file
        disk=4.0 * n_images * math.prod(large.shape),
        how=f"computed from {1000 * large.tera_operations:.0f} billion operations for a picture, "
        f"{1000 / tera.seconds:.0f} billion a second; reading: {step.how}",
    )  # fmt: skip


def _measure_tera() -> PieceCost:
    """Measure what 10^12 operations take here, by products of matrices as large as those of an image network."""
    import torch

    first, second = torch.randn(1024, 1280), torch.randn(1280, 5120)
    first @ second  # starts the threads
    with measure(1.0) as piece:
        for _ in range(5):
            first @ second
    times = 1e12 / (5 * 2.0 * 1024 * 1280 * 5120)
    return PieceCost(1.0, times * max(piece.seconds, 1e-6), times * piece.cpu_seconds)


def _count_pairs(image_px: int, n_test: float) -> float:
    """Return how many pixels of pairs of pictures `evaluate` compares for a null: all pairs of a few, and a bound."""
    from braindecode_vis.scoring.image_scores import LARGEST_PAIR_TABLE, SMALLEST_425

    sides = [find_comparison_size(image_px, image_px)[0]]
    if image_px >= SMALLEST_425:
        sides.append(425)
    return float(sum(min(n_test**2 * side**2, LARGEST_PAIR_TABLE) for side in sides))


def _take_pictures(config: RunConfig, sizes: RunSizes, source: Any, n: int, folder: Path) -> StimulusSet:
    """Return the first pictures of the data where they stay in their files, or random ones."""
    concepts = [f"concept{number % 2 if sizes.tests_known_concepts else number // 2}" for number in range(n)]
    if source is not None and getattr(source, "read_image", None) is None:
        found = source.stimuli.select_pictured()
        if len(found) >= n and found.has_pixels and found.pixels is None:
            few = found.select(found.ids[:n])
            return replace(few, table=few.table.assign(concept=concepts))
    if source is not None and getattr(source, "read_image", None) is not None and len(source.stimuli) >= n:
        pictures = np.stack([source.read_image(row) for row in range(n)])
    else:
        # Smooth, as photographs are: noise would be slower to write and to compress.
        coarse = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        scale = -(-sizes.image_px // 8)
        pictures = coarse.repeat(scale, axis=1).repeat(scale, axis=2)[:, : sizes.image_px, : sizes.image_px]
    made = StimulusSet.from_pixels(
        pictures, [f"image{number}" for number in range(n)], concepts, source="random"
    )
    if source is not None or roles.find_source(config.dataset) != "open_epochs":
        return made
    from PIL import Image

    names = [f"{name}.jpg" for name in made.ids]  # as published pictures are
    folder.mkdir()
    for name, picture in zip(names, pictures, strict=True):
        Image.fromarray(picture).save(folder / name, quality=90)
    return StimulusSet(made.table.assign(path=names), folder)


def _run_pictures(
    config: RunConfig, sizes: RunSizes, source: Any, n_train: int, n_test: int
) -> tuple[dict[str, PieceCost], tuple[int, ...]]:
    """Decode pictures by a small ridge, and return what each stage took and the size of an embedding.

    Categories of as many trials are decoded by a linear discriminant, eight trials to each picture.
    """
    from braindecode_vis import pipeline
    from braindecode_vis.datasets.array_folder import ArraysConfig
    from braindecode_vis.pipeline.runs import open_run

    categories, n = config.decodes_categories, n_train + n_test
    with tempfile.TemporaryDirectory() as made, _use_cache(Path(made) / "cache"):
        root = Path(made) / "data"
        stimuli = _take_pictures(config, sizes, source, n, Path(made) / "images")
        shown = np.repeat(np.arange(n), 8 if categories else 1)
        trials = pd.DataFrame(
            {
                "subject": "01", "session": "01", "run": "01", "stimulus_id": stimuli.ids[shown],
                "repetition": np.arange(len(shown)) % 8 if categories else 0,
                "split": np.where(shown < n_train, "train", "test"),
            }
        )  # fmt: skip
        if categories:
            trials["concept"] = [f"class{row % 2}" for row in shown]
        random = np.random.default_rng(0).standard_normal((len(trials), 20), dtype=np.float32)
        store.write_responses(root / "responses", Responses(random, ("trial", "feature"), trials, "z", {}))
        store.write_stimuli(root / "stimuli", stimuli)
        content = config.model_dump(mode="json")
        changes: dict[str, Any] = {
            "conditions": [],
            "brain": None,
            "noise_ceiling": None,
            "resample": "image",
        }
        content |= {
            "dataset": ArraysConfig(root=root).model_dump(mode="json"), "split": {"kind": "published"},
            "encoder": {"kind": "lda"} if categories else {"kind": "ridge", "alphas": [1000.0]},
            "selection": {}, "analyses": [], "pretrain": None, "synthetic": None,
            "evaluation": content["evaluation"] | changes,
        }  # fmt: skip
        run = open_run(validate_config(content, where="the small run of plan"), Path(made) / "run")
        found: dict[str, PieceCost] = {}
        left_out = ("embed", "retrieve", "reconstruct") if categories else ()
        stages = {name: name for name in pipeline.STAGES[:-1] if name not in left_out}
        # What a stage does beside its work, such as hashing files and writing records, is part of it.
        for name, work in (stages | {"report": "finish_run"}).items():
            with measure(1.0) as found[name]:
                if name == "train" and "epochs" in type(config.encoder).model_fields:
                    import torch  # noqa: F401 (the real fit loads it)
                getattr(pipeline, work)(run)
        for done, artifact in run.produced:
            found.setdefault(done.split()[0], PieceCost(1.0)).disk += measure_folder(artifact.path)
        found["report"].disk = sum(
            measure_folder(path) if path.is_dir() else path.stat().st_size
            for path in (Path(made) / "run").glob("report*")
        )
        pictures = pipeline.preprocess(run).stimuli
        with measure(1.0) as read:  # for a mean image
            total = np.zeros((sizes.image_px, sizes.image_px, 3), dtype=np.int64)
            for image in pictures.iterate_images():
                total[: len(image), : image.shape[1]] += image[: len(total), : len(total)]
        files = [] if stimuli.root is None else [stimuli.root / path for path in stimuli.table["path"]]
        n_bytes = sum(file.stat().st_size for file in files)
        found["read"] = PieceCost(1.0, read.seconds / n, read.cpu_seconds / n, disk=n_bytes / n)  # of one
        shape = () if categories else pipeline.embed(run)[0].embeddings.vectors.shape[1:]
    return found, shape


@contextmanager
def _use_cache(folder: Path) -> Iterator[None]:
    """Keep the embeddings of random pictures out of the user's cache, which would also know them the next time."""
    name = "BRAINDECODE_VIS_CACHE"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
