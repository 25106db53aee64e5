"""Estimates what pictures take: random ones go through every stage but the encoder, a large network is counted."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import BraindecodeVisError
from braindecode_vis.base.contracts import ImageEncoderSettings
from braindecode_vis.base.stimuli import StimulusSet, find_comparison_size
from braindecode_vis.config import RunConfig, validate_config
from braindecode_vis.embeddings.pixels import PixelsConfig
from braindecode_vis.parts.studies.plan_pieces import (
    BUDGET_S,
    LARGEST_FACTOR,
    LONGER,
    START,
    TRIALS_OF_A_PIECE,
    PieceCost,
    Step,
    add_pieces,
    count_seconds,
    make_step,
    measure,
    read_memory,
    uses_gpu,
)
from braindecode_vis.parts.studies.run_sizes import RunSizes, measure_folder

#: Pictures of training and of test that are measured first.
FIRST_PICTURES = (3, 2)


def plan_pictures(
    config: RunConfig, sizes: RunSizes, budget: float = BUDGET_S, left_out: str = ""
) -> tuple[list[Step], tuple[int, ...], PieceCost | None]:
    """Run random pictures through every stage but the encoder.

    Returns
    -------
    steps
        Those after training, and `embed`.
    dims
        The size of an embedding.
    start
        What the first of these runs took beside its stages, and more than the next one; None if nothing was measured.
    """
    held, steps = read_memory("VmRSS"), list[Step]()
    records: list[tuple[int, int, dict[str, PieceCost]]] = []
    dims: tuple[int, ...] = (1024,)
    names = {
        "embed": sizes.n_images,
        "retrieve": sizes.n_test,
        "reconstruct": sizes.n_test,
        "evaluate": sizes.n_test,
    }
    large = _count_network(config.target)
    tera = PieceCost(1.0) if large is None else _measure_tera()
    # By processor time, as a busy machine makes no network large.
    if large is not None and sum(FIRST_PICTURES) * large.tera_operations * tera.cpu_seconds > budget / 2:
        dims, done = large.shape, sizes.n_images * large.tera_operations
        seconds = done * tera.seconds
        how = (
            f"computed from {1000 * large.tera_operations:.0f} billion operations for a picture, "
            f"{1000 / tera.seconds:.0f} billion a second"
        )
        steps.append(Step(
            "embed", seconds, seconds / LARGEST_FACTOR, seconds * LARGEST_FACTOR, done * tera.cpu_seconds,
            held + 2.0 * large.n_bytes,  # the network and its file
            4.0 * sizes.n_images * math.prod(dims), how,
        ))  # fmt: skip
        del names["embed"]
        # Values as many as those of an embedding, for the other stages.
        side = max(2, round(math.sqrt(math.prod(dims))))
        config = config.model_copy(update={"target": PixelsConfig(size=side)})
    try:
        first, shape = _run_pictures(config, sizes, *FIRST_PICTURES)  # loads libraries and weights
        dims = dims if steps else shape
        # The first run also loads libraries, which says nothing of the time of a picture. Of a large network, which
        # takes most of it, the first pictures are enough.
        spent = 0.0 if count_seconds(first["embed"]) <= budget else math.inf
        for n_train, n_test in ((6, 3), (24, 8), (48, 24), (48, 60)):
            if records:
                before, last = records[-1][:2], records[-1][2]
                spent += last["embed"].seconds * (n_train + n_test) / sum(before)
                spent += last["evaluate"].cpu_seconds * n_test / before[1]
            if spent > LONGER * budget:  # a large network
                break
            found = _run_pictures(config, sizes, n_train, n_test)[0]
            records.append((n_train, n_test, found))
    except BraindecodeVisError as error:
        why = f"not measured: {' '.join(str(error).split())[:200]}"
        return [*steps, *(Step(name, None, how=why) for name in (*names, "report"))], dims, None
    start = first.get(START, PieceCost(1.0))
    for name, piece in first.items() if records else ():
        if name != START and name in records[0][2]:
            warm = records[0][2][name]
            start.seconds += max(0.0, piece.seconds - warm.seconds)
            start.cpu_seconds += max(0.0, piece.cpu_seconds - warm.cpu_seconds)
    records = records or [(*FIRST_PICTURES, first)]
    gpu = uses_gpu()
    for name, size in names.items():
        pieces = [
            replace(found[name], size=n_train + n_test if name == "embed" else n_test)
            for n_train, n_test, found in records
            if name in found
        ]
        if name == "reconstruct" and left_out:
            steps.append(Step(name, None, how=f"not measured: {left_out} not here, and images need them"))
        elif pieces:
            what = (
                f"{pieces[-1].size:.0f} pictures of {sizes.image_px} px"
                if name == "embed"
                else f"{pieces[-1].size:.0f} test rows"
            )
            steps.append(
                make_step(
                    name,
                    pieces,
                    size,
                    what,
                    more=held,
                    in_batches=True,
                    on_gpu=gpu and name in ("embed", "reconstruct"),
                    beside=partial(_count_pairs, sizes.image_px) if name == "evaluate" else None,
                )
            )
    report = records[-1][2]["report"]
    steps.append(
        make_step("report", [replace(report, size=1.0)], 1.0, "page and checks of a small run", more=held)
    )
    return steps, dims, start


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


def _run_pictures(
    config: RunConfig, sizes: RunSizes, n_train: int, n_test: int
) -> tuple[dict[str, PieceCost], tuple[int, ...]]:
    """Decode random pictures by a small ridge, and return what each stage took and the size of an embedding."""
    from braindecode_vis.datasets.array_folder import ArraysConfig
    from braindecode_vis.pipeline import embed, evaluate, finish_run
    from braindecode_vis.pipeline.runs import open_run

    rng = np.random.default_rng(0)
    n = n_train + n_test
    # Smooth, as photographs are: noise would be slower to write and to compress.
    coarse = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    scale = -(-sizes.image_px // 8)
    pictures = coarse.repeat(scale, axis=1).repeat(scale, axis=2)[:, : sizes.image_px, : sizes.image_px]
    names = [f"image{number}" for number in range(n)]
    trials = pd.DataFrame(
        {
            "subject": "01", "session": "01", "run": "01", "stimulus_id": names, "repetition": 0,
            "split": ["train"] * n_train + ["test"] * n_test,
        }
    )  # fmt: skip
    random = rng.standard_normal((n, 20), dtype=np.float32)
    with tempfile.TemporaryDirectory() as made, _use_cache(Path(made) / "cache"):
        root = Path(made) / "data"
        store.write_responses(root / "responses", Responses(random, ("trial", "feature"), trials, "z", {}))
        concepts = [f"concept{number // 2}" for number in range(n)]
        store.write_stimuli(
            root / "stimuli", StimulusSet.from_pixels(pictures, names, concepts, source="random")
        )
        content = config.model_dump(mode="json")
        evaluation = content["evaluation"] | {
            "conditions": [],
            "brain": None,
            "noise_ceiling": None,
            "resample": "image",
        }
        content |= {
            "dataset": ArraysConfig(root=root).model_dump(mode="json"), "split": {"kind": "published"},
            "encoder": {"kind": "ridge", "alphas": [1000.0]}, "selection": {}, "analyses": [], "pretrain": None,
            "synthetic": None, "evaluation": evaluation,
        }  # fmt: skip
        small = validate_config(content, where="the small run of plan")
        run = open_run(small, Path(made) / "run")
        with measure(1.0) as whole:
            evaluate(run)
        with measure(1.0) as paged:
            finish_run(run)  # the page, hints, and the quick check for leaks
        found = {"report": paged}
        for record, artifact in (
            (store.read_provenance(a.path / store.PROVENANCE), a) for _, a in run.produced
        ):
            profile = record.get("profile", {})
            piece = found.setdefault(record["stage"], PieceCost(1.0))
            piece.seconds += float(record["seconds"])
            piece.cpu_seconds += float(profile.get("cpu_seconds", 0))
            piece.memory = max(piece.memory, whole.memory)
            piece.disk += measure_folder(artifact.path)
        paged.disk = (Path(made) / "run" / "report.html").stat().st_size
        # What a run does between its stages: reading settings, hashing files, writing records.
        staged = [piece for name, piece in found.items() if name != "report"]
        found[START] = PieceCost(
            1.0, max(0.0, whole.seconds - sum(piece.seconds for piece in staged)),
            max(0.0, whole.cpu_seconds - sum(piece.cpu_seconds for piece in staged)),
        )  # fmt: skip
        shape = embed(run)[0].embeddings.vectors.shape[1:]
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


def add_reading(step: Step, config: RunConfig, sizes: RunSizes, source: Any) -> Step:
    """Add to `embed` what reading and decoding the pictures takes, where they stay in their files."""
    of_texts = roles.complete(ImageEncoderSettings, config.target).of_texts
    if step.seconds is None or source is None or of_texts or getattr(source, "read_image", None) is not None:
        return step
    pictured = source.stimuli.select_pictured()
    if not len(pictured) or not pictured.has_pixels or pictured.pixels is not None:
        return step
    n = min(TRIALS_OF_A_PIECE, len(pictured))
    with suppress(BraindecodeVisError, OSError):  # `embed` says what is wrong with a picture
        pictured.read_image(str(pictured.ids[0]))  # loads the library
        with measure(n) as piece:
            for _ in pictured.iterate_images(pictured.ids[:n]):
                pass
        return add_pieces(step, piece, sizes.n_images / n)
    return step
