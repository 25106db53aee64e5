"""Images and their embeddings, in shards on disk: what a generator is trained on.

Owns the two sources of pairs and their file format. A phantom source draws every image anew, each shard from a
stimulus seed of its own; a stimulus source reads a user's images and the vectors that an embedding bank holds for
them. A shard is one ``.safetensors`` file that appears under its name only when it is complete, and depends on the
settings and its number alone: a run that was killed goes on with the shards that are missing. Knows nothing of
networks.

No phantom pair shows a concept on which the simulated experiments with the default seed are trained or tested: every
combination of colour, texture and shape among the first `N_RESERVED` concepts of seed 0 is left out, whatever seed
draws it, and so is every combination of colour and shape among the first `N_RESERVED_PAIRS`. The first 40 of these are
the test concepts of the demo, the next 40 are for choices between generators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.stimuli import StimulusSet, resize_image
from braindecode_vis.base.store import load_tensors, open_tensors, write_tensors
from braindecode_vis.datasets.drawn.images import N_MAX_CONCEPTS, make_concepts, render_batch

N_RESERVED = 1854  # concepts of a full-size THINGS phantom, training and test
N_RESERVED_PAIRS = 80
SHARD = 1024  # images

# Sides of the pictures that the encoder sees, shard by shard: mostly the demo's, some smaller and larger.
_SIDES = (112, 112, 64, 112, 112, 112, 224, 112, 112, 112)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainingPairs:
    """Images and their embeddings, row by row.

    Parameters
    ----------
    images : uint8 array of shape (n_images, size, size, 3)
    vectors : float16 array of shape (n_images, n_features)
    space
        Name of the embedding space.
    source
        How the pairs were made, in one line.
    """

    images: np.ndarray
    vectors: np.ndarray
    space: str
    source: str

    def __len__(self) -> int:
        return len(self.images)


@lru_cache(maxsize=1)
def list_reserved_concepts() -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Return the names of concepts, and the combinations of shape and colour, that no phantom pair shows."""
    table = make_concepts(N_RESERVED, seed=0)
    cells = table[["shape", "colour"]].iloc[:N_RESERVED_PAIRS].itertuples(index=False, name=None)
    return frozenset(table["concept"]), frozenset((str(shape), str(colour)) for shape, colour in cells)


def write_phantom_pairs(
    folder: Path,
    image_encoder: Any,
    *,
    n_images: int,
    seed: int,
    size: int = 64,
    progress: Progress | None = None,
) -> None:
    """Draw phantom images and embed them; shards that exist are kept.

    Parameters
    ----------
    folder
        Receives the shards.
    image_encoder
        Its `encode` and `space` are used; it must not need fitting.
    n_images
        At least so many images: whole shards of `SHARD` are drawn.
    seed
        Root seed. Every shard has a stimulus seed of its own, so accents, proportions and backgrounds of a concept
        differ from shard to shard.
    size
        Height and width of the stored images in pixels; the encoder sees the pictures of 64 to 224 pixels from
        which they are made.
    progress
        Called with the number of shards done and wanted.
    """

    def make(number: int) -> tuple[Iterable[np.ndarray], np.ndarray]:
        pictures = draw_phantom_pictures(number, seed=seed)
        return pictures, image_encoder.encode(pictures)

    source = f"phantom images, seed {seed}, stored at {size} pixels"
    _write_shards(Path(folder), -(-n_images // SHARD), make, size, image_encoder.space, source, progress)


def choose_concepts(number: int, *, seed: int, n_images: int = SHARD) -> tuple[int, np.ndarray]:
    """Return the stimulus seed of a shard and its concepts, none twice and none reserved."""
    names, cells = list_reserved_concepts()
    stimulus_seed = derive_seed(seed, "generator_pairs", number)
    table = make_concepts(N_MAX_CONCEPTS, seed=stimulus_seed)
    is_free = [
        name not in names and (shape, colour) not in cells
        for name, shape, colour in zip(table["concept"], table["shape"], table["colour"], strict=True)
    ]
    order = make_generator(stimulus_seed, "generator_concepts").permutation(np.flatnonzero(is_free))
    return stimulus_seed, order[:n_images]


def draw_phantom_pictures(number: int, *, seed: int, n_images: int = SHARD) -> np.ndarray:
    """Draw the pictures of one shard, uint8 of shape (n_images, side, side, 3), each of another concept."""
    stimulus_seed, concepts = choose_concepts(number, seed=seed, n_images=n_images)
    side = _SIDES[number % len(_SIDES)]
    return render_batch(concepts, np.zeros(len(concepts), int), size=side, seed=stimulus_seed)


def write_stimulus_pairs(
    folder: Path,
    stimuli: StimulusSet,
    embeddings: Embeddings,
    *,
    size: int = 64,
    progress: Progress | None = None,
) -> None:
    """Pair a user's images with their embeddings; shards that exist are kept.

    Parameters
    ----------
    folder
        Receives the shards.
    stimuli
        The images; must hold every row of `embeddings`. Give training images only: what a generator has seen can no
        longer test it.
    embeddings
        One vector (or matrix of tokens, flattened) per image, of any space.
    size
        Height and width of the stored images in pixels.
    progress
        Called with the number of shards done and wanted.
    """
    vectors = embeddings.flat()

    def make(number: int) -> tuple[Iterable[np.ndarray], np.ndarray]:
        rows = slice(number * SHARD, (number + 1) * SHARD)
        return stimuli.iterate_images([str(i) for i in embeddings.ids[rows]]), vectors[rows]

    digest = derive_seed(0, *map(str, embeddings.ids)) % 16**8  # tells one set of images from another
    source = f"{len(embeddings)} stimuli ({digest:08x}), stored at {size} pixels"
    _write_shards(Path(folder), -(-len(embeddings) // SHARD), make, size, embeddings.space, source, progress)


def _write_shards(
    folder: Path,
    n_shards: int,
    make: Callable[[int], tuple[Iterable[np.ndarray], np.ndarray]],
    size: int,
    space: str,
    source: str,
    progress: Progress | None,
) -> None:
    """Write the shards that are missing; `make` returns the pictures of a shard, of any size, and their vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_shards):
        path = folder / f"pairs_{number:05d}.safetensors"
        if path.is_file():
            _check_shard(path, space, source)
        else:
            pictures, vectors = make(number)
            # The encoder sees the large pictures; the generator is to draw small ones.
            images = np.stack([resize_image(picture, size, size) for picture in pictures])
            # Half precision: 100 000 embeddings of 1280 values are 260 MB.
            half = np.asarray(vectors, np.float32).astype(np.float16)
            if not np.isfinite(half).all():
                raise DataError(
                    f"the embeddings of {path.name} exceed the range of half precision or are not finite."
                )
            header = {"pairs": json.dumps({"space": space, "source": source})}
            write_tensors(path, {"images": images, "vectors": half}, metadata=header)
        if progress is not None:
            progress(number + 1, n_shards)


def read_pairs(folder: Path) -> TrainingPairs:
    """Read all shards of a folder in the order of their numbers.

    Raises
    ------
    DataError
        If there is no shard, or if shards were made from different sources or spaces.
    """
    paths = sorted(Path(folder).glob("pairs_*.safetensors"))
    if not paths:
        raise DataError(f"{folder} holds no training pairs (pairs_*.safetensors); draw them first.")
    # All shards must be of one making: a folder that was used twice would mix two spaces.
    first = _read_header(paths[0])
    for path in paths[1:]:
        _check_shard(path, first["space"], first["source"])
    shards = [load_tensors(path) for path in paths]
    return TrainingPairs(
        np.concatenate([shard["images"] for shard in shards]),
        np.concatenate([shard["vectors"] for shard in shards]),
        first["space"],
        first["source"],
    )


def _read_header(path: Path) -> dict[str, str]:
    with open_tensors(path) as file:
        header = file.metadata() or {}
    if "pairs" not in header:
        raise DataError(f"{path} is not a shard of training pairs; remove it from the folder.")
    return json.loads(header["pairs"])


def _check_shard(path: Path, space: str, source: str) -> None:
    header = _read_header(path)
    if header != {"space": space, "source": source}:
        raise DataError(
            f"{path} holds {header['source']} in the space {header['space']!r}, but {source} in "
            f"{space!r} were requested; use an empty folder."
        )
