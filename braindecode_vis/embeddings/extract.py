"""Encode a stimulus set once: missing images are computed, the rest is read from the bank of the space.

Images are decoded by threads ahead of the network and computed in fixed chunks of the stimulus list. The chunks do not
depend on how many processes share the work or on where an earlier run stopped, so the vectors do not either. Encoders
that are fitted on training images do not pass through here: they are cheap and differ from fold to fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.embeddings.bank import (
    BankSummary,
    find_cache_folder,
    list_banks,
    list_hashes,
    merge_segments,
    open_bank,
    read_rows,
    write_segment,
)
from braindecode_vis.embeddings.transforms import map_ahead
from braindecode_vis.roles import ImageEncoder
from braindecode_vis.stimuli import StimulusSet

SHARD_SIZE = 512
DECODERS = 2  # threads that read image files

__all__ = ["BankSummary", "embed_shard", "embed_stimuli", "find_cache_folder", "list_banks"]


def embed_stimuli(
    encoder: ImageEncoder,
    stimuli: StimulusSet,
    *,
    cache: Path,
    advance: Callable[[int], None] = lambda n: None,
    decoders: int = DECODERS,
) -> Embeddings:
    """Return one embedding per stimulus, reading from the bank what it already holds.

    Parameters
    ----------
    encoder
        A pretrained image encoder.
    stimuli
        The images; their `sha256` are the keys.
    cache
        Folder of the banks.
    advance
        Called with the number of images done.
    decoders
        Threads that read image files ahead of the encoder; does not change the result.

    Returns
    -------
    Embeddings
        Their vectors are a memory map where the bank holds exactly these images.

    Raises
    ------
    DataError
        If an image cannot be read or has no finite embedding, naming the stimulus.
    """
    hashes = stimuli.table["sha256"].tolist()
    folder = open_bank(cache, encoder.space, _describe(encoder))
    known = list_hashes(folder)
    advance(sum(h in known for h in hashes))
    _fill(encoder, stimuli, folder, shard=(0, 1), advance=advance, decoders=decoders)
    unique = list(dict.fromkeys(hashes))
    merge_segments(folder, unique)
    return Embeddings(read_rows(folder, hashes), stimuli.ids, encoder.space)


def embed_shard(
    encoder: ImageEncoder,
    stimuli: StimulusSet,
    *,
    cache: Path,
    shard: tuple[int, int],
    advance: Callable[[int], None] = lambda n: None,
    decoders: int = DECODERS,
) -> int:
    """Compute one process's part of a bank and return how many images were computed.

    `embed_stimuli` afterwards finds everything that the shards wrote.

    Parameters
    ----------
    encoder, stimuli, cache, advance, decoders
        As for `embed_stimuli`; all processes get the same.
    shard
        Number of this process, from 0, and number of processes.

    Raises
    ------
    ConfigError
        If there is no such shard.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"shard {index} of {count} does not exist; shards are numbered from 0.")
    folder = open_bank(cache, encoder.space, _describe(encoder))
    return _fill(encoder, stimuli, folder, shard=shard, advance=advance, decoders=decoders)


def _describe(encoder: Any) -> dict[str, Any] | None:
    config = getattr(encoder, "config", None)
    return config.hashed_fields() if hasattr(config, "hashed_fields") else None


def _fill(
    encoder: ImageEncoder,
    stimuli: StimulusSet,
    folder: Path,
    *,
    shard: tuple[int, int],
    advance: Callable[[int], None],
    decoders: int,
) -> int:
    hashes = stimuli.table["sha256"].tolist()
    id_of = dict(zip(hashes, stimuli.ids, strict=True))
    unique = list(dict.fromkeys(hashes))
    known, n_computed = list_hashes(folder), 0
    for number, start in enumerate(range(0, len(unique), SHARD_SIZE)):
        if number % shard[1] != shard[0]:
            continue
        missing = [h for h in unique[start : start + SHARD_SIZE] if h not in known]
        if not missing:
            continue
        ids = [id_of[h] for h in missing]
        vectors = np.asarray(encoder.encode(iterate_decoded(stimuli, ids, decoders)))
        _check_vectors(vectors, ids, encoder.space)
        write_segment(folder, missing, vectors)
        n_computed += len(missing)
        advance(len(missing))
    return n_computed


def iterate_decoded(stimuli: StimulusSet, ids: Iterable[str], decoders: int) -> Iterator[np.ndarray]:
    """Yield images in the order of `ids`, decoded by threads ahead of their use."""
    workers = 0 if stimuli.pixels is not None else decoders
    return map_ahead(stimuli.read_image, ids, workers=workers)


def _check_vectors(vectors: np.ndarray, ids: list[str], space: str) -> None:
    if len(vectors) != len(ids):
        raise DataError(f"{space} gave {len(vectors)} embeddings for {len(ids)} images.")
    finite = np.isfinite(vectors).reshape(len(ids), -1).all(axis=1)
    if not finite.all():
        bad = ids[int(np.flatnonzero(~finite)[0])]
        raise DataError(f"{space} gives no finite embedding of stimulus {bad!r}; is it blank?")
