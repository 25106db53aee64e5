"""The two networks by which the embedded generator repaints images: how they learn, and a weights file with them.

Run with ``python benchmarks/studies/readers.py --weights FILE --out FILE``. Phantom images of the seed of the packaged
generator, of concepts that no test shows, bring names along: shape, colour, texture, and the second colour of the
pattern. One network, EfficientNet-lite0's first blocks trained further, learns to name them in images; first in sharp
and blurred ones, then in noisy ones as well, so that its gradient is of what can be seen. The other learns to name
them in embeddings. About eight minutes of one processor core. The packaged weights hold what an earlier form of these
lines learnt, with the same settings: other draws, so that the bytes differ.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from recognition import disturb, draw_shards
from torch.nn import functional as F

from braindecode_vis.embeddings.efficientnet import EfficientNetConfig, find_packaged_weights, load_network
from braindecode_vis.generation.latent_diffusion_config import PACKAGED_WEIGHTS
from braindecode_vis.generation.latent_diffusion_networks import scale_images
from braindecode_vis.generation.repainting import EmbeddingReader, ImageReader
from braindecode_vis.generation.weights_file import load_model, read_header, read_known_codes, write_weights

SEED = 2026  # of the generator's images
#: How much a mistake costs.
WEIGHTS = {"shape": 1.0, "colour": 1.0, "texture": 2.0, "accent": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=PACKAGED_WEIGHTS, help="of the generator")
    parser.add_argument("--out", type=Path, required=True, help="receives them and the two networks")
    parser.add_argument("--shards", type=int, default=15, help="of 1024 images")
    parser.add_argument("--epochs", type=int, default=4, help="on images without noise")
    parser.add_argument("--noisy-steps", type=int, default=600)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images, vectors, names = draw(arguments.shards)
    n_names = {name: int(numbers.max()) + 1 for name, numbers in names.items()}
    model, header = load_model(arguments.weights, "cpu"), read_header(arguments.weights)
    components = torch.from_numpy(model.components.apply(vectors))
    readers = {
        "image_reader": learn_images(
            ImageReader(n_names), images, names, arguments.epochs, arguments.noisy_steps
        ),
        "embedding_reader": learn_embeddings(
            EmbeddingReader(components.shape[1], n_names), components, names
        ),
    }
    networks = {"autoencoder": model.autoencoder, "denoiser": model.denoiser, **readers}
    known = read_known_codes(arguments.weights)
    write_weights(arguments.out, replace(header, readers=n_names), networks, model.components, known)


def draw(n_shards: int) -> tuple[torch.Tensor, np.ndarray, dict[str, torch.Tensor]]:
    """Return images of 64 pixels, their embeddings, and the number of each property's name."""
    encoder = EfficientNetConfig().build()
    images, vectors, tables = [], [], []
    for number, (small, embedded, table) in enumerate(draw_shards(n_shards, SEED, encoder)):
        images.append(small)
        vectors.append(embedded)
        tables.append(table)
        print(f"drawn: {number + 1} of {n_shards}", flush=True)
    names = {}
    for name in WEIGHTS:
        column = np.concatenate([table[name].to_numpy() for table in tables])
        names[name] = torch.from_numpy(np.unique(column, return_inverse=True)[1])
    return torch.from_numpy(np.concatenate(images)), np.concatenate(vectors), names


def learn_images(
    reader: ImageReader, images: torch.Tensor, names: dict[str, torch.Tensor], n_epochs: int, n_noisy: int
) -> ImageReader:
    """Train a reader of images from EfficientNet-lite0's own weights on; its norms are folded and stay."""
    network = load_network(find_packaged_weights())
    reader.stem.load_state_dict(torch.nn.Sequential(network.conv_stem, network.bn1).state_dict())
    reader.blocks.load_state_dict(network.blocks[: len(reader.blocks)].state_dict())
    reader.requires_grad_(True).to(memory_format=torch.channels_last).train()
    batch = 32
    for phase, n_steps in (("plain", n_epochs * (len(images) // batch)), ("noisy", n_noisy)):
        body = [*reader.stem.parameters(), *reader.blocks.parameters()]
        head = [*reader.head.parameters(), *reader.heads.parameters()]
        rates = [1e-3, 2e-3] if phase == "plain" else [6e-4, 6e-4]
        optimiser = torch.optim.AdamW([{"params": body}, {"params": head}], weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=n_steps, pct_start=0.15)
        for step in range(n_steps):
            rows = torch.randint(len(images), (batch,))
            x = disturb(scale_images(images[rows]))
            if phase == "noisy":
                spread = 0.5 * torch.rand(batch, 1, 1, 1) * (torch.rand(batch, 1, 1, 1) > 0.25)
                x = x + spread * torch.randn_like(x)
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            answers = reader(x.contiguous(memory_format=torch.channels_last))
            loss = sum_mistakes(answers, names, rows, smoothing=0.05 if phase == "noisy" else 0.0)
            take_step(loss, reader, optimiser, schedule)
            if (step + 1) % 100 == 0:
                print(
                    f"images, {phase}: {step + 1} of {n_steps}, loss {float(loss.detach()):.2f}", flush=True
                )
    return reader.eval()


def learn_embeddings(
    reader: EmbeddingReader, components: torch.Tensor, names: dict[str, torch.Tensor], n_epochs: int = 14
) -> EmbeddingReader:
    """Train a reader of embeddings, which are disturbed by a little noise."""
    batch, n = 128, len(components)
    n_steps = n_epochs * (n // batch)
    optimiser = torch.optim.AdamW(reader.parameters(), weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=n_steps)
    for _ in range(n_steps):
        rows = torch.randint(n, (batch,))
        answers = reader(components[rows] + 0.3 * torch.randn(batch, components.shape[1]))
        take_step(sum_mistakes(answers, names, rows), reader, optimiser, schedule)
    return reader.eval()


def sum_mistakes(
    answers: dict[str, torch.Tensor],
    names: dict[str, torch.Tensor],
    rows: torch.Tensor,
    *,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the weighed cross-entropy of all properties."""
    return torch.stack(
        [
            weight * F.cross_entropy(answers[name], names[name][rows], label_smoothing=smoothing)
            for name, weight in WEIGHTS.items()
        ]
    ).sum()


def take_step(
    loss: torch.Tensor,
    network: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimiser.step()
    schedule.step()


if __name__ == "__main__":
    main()
