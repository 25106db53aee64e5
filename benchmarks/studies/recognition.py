"""Whether shape, colour and texture can still be told in what the embedded generator paints.

Run with ``python benchmarks/studies/recognition.py [--weights FILE] [--judge FILE] [--run FOLDER]``. A small network,
the judge, learns to name the shape (of 55), the colour and the texture (of 12 each) of phantom images, sharp and
blurred, drawn with a seed of their own. It then names those of 400 concepts that no training image of the generator
shows, in the images themselves, after the autoencoder, and in images made from the true embedding. The concepts of
the demo's test are not among them. What the judge finds in the images themselves is the ceiling; the line of the
embedding says what a network that reads the embedding alone can tell. The judge takes half an hour to learn;
`--judge` keeps it. The recipe of the packaged weights was compared on these concepts, so what is found is a score of
development. With `--run`, the folder of a demo's run, the judge names what is shown there instead: the images seen
and decoded, the oracle's, and the controls.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import braindecode_vis as bdv
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.datasets.drawn.images import N_MAX_CONCEPTS, make_concepts, render_batch
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig, EfficientNetEncoder
from braindecode_vis.generation.generator_data import GeneratorData
from braindecode_vis.generation.latent_diffusion_config import LatentDiffusionConfig
from braindecode_vis.generation.latent_diffusion_networks import reconstruct_images, scale_images
from braindecode_vis.generation.training_pairs import choose_concepts
from braindecode_vis.generation.weights_file import load_model
from braindecode_vis.scoring.uncertainty import wilson_interval

PROPERTIES = ("shape", "colour", "texture")
SEED = 7  # of the judge's images; the packaged generator's are drawn with 2026
SIDE, SIZE = 112, 64  # pixels, of the pictures and of what the judge sees


class Judge(nn.Module):
    """A residual network with one answer per property."""

    def __init__(self, n_names: dict[str, int]) -> None:
        super().__init__()
        widths = (32, 32, 64, 64, 128, 192)
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
        for before, after in itertools.pairwise(widths):
            layers.append(Block(before, after))
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], n) for name, n in n_names.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = F.dropout(self.body(x).mean((2, 3)), 0.2, self.training)
        return {name: head(pooled) for name, head in self.heads.items()}


class Block(nn.Module):
    """Two convolutions beside a shorter way; halves the resolution where the width grows."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.way = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.way(x) + self.short(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--judge", type=Path, help="is read if it is there, and written if not")
    parser.add_argument(
        "--run", type=Path, help="a finished run of simulated stimuli of seed 0, for the demo's images"
    )
    parser.add_argument("--first", type=int, default=40, help="first concept of seed 0")
    parser.add_argument("--concepts", type=int, default=400)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument("--shards", type=int, default=20, help="of 1024 images, for the judge")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    encoder = EfficientNetConfig().build()
    names = list_names()
    if arguments.judge is not None and arguments.judge.is_file():
        judge, reader, made_of = torch.load(arguments.judge, weights_only=False)  # a file of your own
        if made_of != (SEED, arguments.shards, arguments.epochs):
            parser.error(f"{arguments.judge} learnt with other settings (seed, shards, epochs): {made_of}")
    else:
        judge, reader = train_judges(names, encoder, arguments.shards, arguments.epochs)
        if arguments.judge is not None:
            torch.save((judge, reader, (SEED, arguments.shards, arguments.epochs)), arguments.judge)

    if arguments.run is not None:
        judge_run(arguments.run, judge, names)
        return
    rows = np.arange(arguments.first, arguments.first + arguments.concepts)
    table = make_concepts(int(rows[-1]) + 1, seed=0).iloc[rows]
    wanted = number_names(table, names)
    seen = render_batch(rows, np.zeros(len(rows), int), size=SIDE, seed=0)
    small = shrink(seen)
    vectors = encoder.encode(seen)
    truth = Embeddings(vectors, table["concept"].tolist(), encoder.space)
    data = GeneratorData(encoder, truth, StimulusSet.from_pixels(seen, truth.ids))

    print(f"chance: {', '.join(f'{key} {1 / len(names[key]):.3f}' for key in PROPERTIES)}; 95 % intervals")
    report("seen", ask(judge, small), wanted)
    with torch.inference_mode():
        told = reader(torch.from_numpy(vectors))
    report("embedding", {key: answer.numpy() for key, answer in told.items()}, wanted)
    model = load_model(LatentDiffusionConfig(weights=arguments.weights).find_weights(), "cpu")
    report("autoencoder", ask(judge, reconstruct_images(model.autoencoder, small)), wanted)
    for guidance in arguments.guidance:
        for candidates in arguments.candidates:
            config = LatentDiffusionConfig(
                weights=arguments.weights, guidance=guidance, candidates=candidates
            )
            images = config.build(data).generate(truth, seed=arguments.seed)
            report(f"oracle, g {guidance:g}, best of {candidates}", ask(judge, images), wanted)


def judge_run(folder: Path, judge: nn.Module, names: dict[str, list[str]]) -> None:
    """Print what the judge names in the images of a run, method by method."""
    run = bdv.open_run(folder)
    table = make_concepts(N_MAX_CONCEPTS, seed=0).set_index("concept").loc[run.items["concept"].tolist()]
    for method, images in run.reconstructions.items():
        report(method, ask(judge, shrink(images)), number_names(table, names))


def list_names() -> dict[str, list[str]]:
    """Return the names that a property can have."""
    table = make_concepts(N_MAX_CONCEPTS, seed=SEED)
    return {key: sorted(table[key].unique()) for key in PROPERTIES}


def number_names(table: pd.DataFrame, names: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Return the number of each property's name, row by row."""
    return {key: pd.Categorical(table[key], categories=names[key]).codes.astype(np.int64) for key in names}


def shrink(pictures: np.ndarray) -> np.ndarray:
    return np.stack([resize_image(picture, SIZE, SIZE) for picture in pictures])


def draw_shards(
    n_shards: int, seed: int, encoder: EfficientNetEncoder
) -> Iterator[tuple[np.ndarray, np.ndarray, pd.DataFrame]]:
    """Yield of each shard of drawn concepts their small images, embeddings and properties."""
    for number in range(n_shards):
        drawn, concepts = choose_concepts(number, seed=seed)
        pictures = render_batch(concepts, np.zeros(len(concepts), int), size=SIDE, seed=drawn)
        table = make_concepts(N_MAX_CONCEPTS, seed=drawn).iloc[concepts]
        yield shrink(pictures), encoder.encode(pictures), table


def train_judges(
    names: dict[str, list[str]], encoder: EfficientNetEncoder, n_shards: int, n_epochs: int
) -> tuple[nn.Module, nn.Module]:
    """Return the judge of images and the reader of embeddings, trained on the same images."""
    images, vectors, tables = zip(*draw_shards(n_shards, SEED, encoder), strict=True)
    wanted = {key: torch.from_numpy(value) for key, value in number_names(pd.concat(tables), names).items()}
    n_names = {key: len(value) for key, value in names.items()}
    torch.manual_seed(0)
    pixels, features = torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(vectors))
    judge = learn(Judge(n_names), lambda rows: disturb(scale_images(pixels[rows])), wanted, n_epochs)
    reader = learn(Reader(features, n_names), lambda rows: features[rows], wanted, n_epochs)
    return judge, reader


class Reader(nn.Module):
    """One hidden layer on a standardised embedding."""

    def __init__(self, features: torch.Tensor, n_names: dict[str, int]) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("scale", features.std(0) + 1e-6)
        self.body = nn.Sequential(nn.Linear(features.shape[1], 512), nn.GELU(), nn.Dropout(0.3))
        self.heads = nn.ModuleDict({name: nn.Linear(512, n) for name, n in n_names.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.body((x - self.mean) / self.scale)
        return {name: head(hidden) for name, head in self.heads.items()}


def learn(
    network: nn.Module,
    get: Callable[[torch.Tensor], torch.Tensor],
    wanted: dict[str, torch.Tensor],
    n_epochs: int,
) -> nn.Module:
    """Minimise the cross-entropy of all properties."""
    n, batch = len(next(iter(wanted.values()))), 64
    n_steps = n_epochs * (n // batch)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=n_steps)
    network.to(memory_format=torch.channels_last).train()  # the order in which a processor convolves faster
    for _ in range(n_epochs):
        order = torch.randperm(n)
        for start in range(0, n - batch + 1, batch):
            rows = order[start : start + batch]
            answers = network(get(rows))
            loss = torch.stack([F.cross_entropy(answers[key], wanted[key][rows]) for key in wanted]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def disturb(x: torch.Tensor) -> torch.Tensor:
    """Shift a batch, and blur every second one, so that the judge does not stumble over soft images."""
    x = torch.roll(x, torch.randint(-4, 5, (2,)).tolist(), (2, 3))
    if torch.rand(()) < 0.5:
        return x
    kernel = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * (0.3 + 1.2 * torch.rand(())) ** 2))
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    x = F.conv2d(x, kernel.transpose(2, 3), padding=(3, 0), groups=3)
    return F.conv2d(x, kernel, padding=(0, 3), groups=3)


def ask(judge: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        return {key: value.numpy() for key, value in judge(scale_images(torch.from_numpy(images))).items()}


def report(what: str, answers: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    parts = []
    for key in PROPERTIES:
        hits = answers[key].argmax(axis=1) == wanted[key]
        interval = wilson_interval(int(hits.sum()), len(hits))
        parts.append(f"{key} {hits.mean():.3f} ({interval.low:.3f} to {interval.high:.3f})")
    print(f"{what:>24}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
