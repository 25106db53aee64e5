"""Encode a stimulus set once: a bank of embeddings on disk, keyed by space and image hash.

A bank is a folder of shards, each finished by one rename, so that an interrupted extraction goes on where it
stopped and a changed image recomputes only itself. Encoders that are fitted on training images do not pass
through here: they are cheap and differ from fold to fold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError
from braindecode_vis.roles import ImageEncoder
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import replace_atomically

SHARD_SIZE = 512


def find_cache_folder() -> Path:
    """Return the folder of the banks: ``$BRAINDECODE_VIS_CACHE``, or below the user's cache folder."""
    chosen = os.environ.get("BRAINDECODE_VIS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "braindecode_vis"


def embed_stimuli(
    encoder: ImageEncoder,
    stimuli: StimulusSet,
    *,
    cache: Path,
    advance: Callable[[int], None] = lambda n: None,
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
    """
    bank = cache / "embeddings" / hashlib.sha256(encoder.space.encode()).hexdigest()[:16]
    bank.mkdir(parents=True, exist_ok=True)
    (bank / "space.txt").write_text(encoder.space + "\n")
    hashes = stimuli.table["sha256"].tolist()
    known = read_bank(bank, wanted=set(hashes))
    advance(sum(h in known for h in hashes))
    missing = list(dict.fromkeys(h for h in hashes if h not in known))
    id_of = dict(zip(hashes, stimuli.ids, strict=True))
    for start in range(0, len(missing), SHARD_SIZE):
        shard = missing[start : start + SHARD_SIZE]
        vectors = encoder.encode(stimuli.iterate_images([id_of[h] for h in shard]))
        if not np.isfinite(vectors).all():
            bad = shard[int(np.flatnonzero(~np.isfinite(vectors).reshape(len(shard), -1).all(axis=1))[0])]
            raise DataError(
                f"{encoder.space} gives no finite embedding of stimulus {id_of[bad]!r}; is it blank?"
            )
        _write_shard(bank, shard, vectors)
        known.update(zip(shard, vectors, strict=True))
        advance(len(shard))
    return Embeddings(np.stack([known[h] for h in hashes]), stimuli.ids, encoder.space)


def _write_shard(bank: Path, hashes: list[str], vectors: np.ndarray) -> None:
    from safetensors.numpy import save_file

    name = hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
    with replace_atomically(bank / f"{name}.safetensors") as temporary:
        save_file(
            {"vectors": np.ascontiguousarray(vectors)}, temporary, metadata={"sha256": json.dumps(hashes)}
        )


def read_bank(bank: Path, *, wanted: set[str]) -> dict[str, np.ndarray]:
    """Return the vectors of the wanted image hashes that the bank holds."""
    from safetensors import safe_open

    found: dict[str, np.ndarray] = {}
    for path in sorted(bank.glob("*.safetensors")):
        if path.name.startswith("."):
            continue
        with safe_open(path, framework="numpy") as shard:
            hashes = json.loads(shard.metadata()["sha256"])
            if wanted.isdisjoint(hashes):
                continue
            vectors = shard.get_tensor("vectors")
        found.update((h, vectors[row]) for row, h in enumerate(hashes) if h in wanted)
    return found
