"""The images of a phantom and the drive that they exert: drawn, written, embedded, and kept.

Owns the image files below the root and the arrays ``drive_*.npy`` of the ground truth. The drive is computed once and
read back by later calls, so that a call that goes on simulates the same brains whatever the image encoder gives then.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.phantom.assemble.jobs import Advance
from braindecode_vis.phantom.drive import StimulusDrive, make_drive
from braindecode_vis.phantom.stimuli.concepts import make_concepts, make_things_like_split, write_images
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_file, replace_atomically

Embed = Callable[[StimulusSet], np.ndarray]
_CHUNK = 64
_FEATURES = ("early", "mid", "semantic")


def list_split(
    n_train_concepts: int, n_test_concepts: int, n_train_exemplars: int, seed: int, folder: str = ""
) -> pd.DataFrame:
    """Return the images of two disjoint sets of concepts, `path` below `folder`; training images come first."""
    table = make_things_like_split(n_train_concepts, n_test_concepts, n_train_exemplars, seed=seed)
    return table.assign(path=[str(Path(folder) / path) for path in table["path"]])


def match_concepts(images: pd.DataFrame, n_concepts: int, seed: int) -> pd.DataFrame:
    """Add `concept_index`, `exemplar` and `split` to a table of images that names the concepts of a seed.

    Test images are exemplars of concepts that are also shown for training, as in THINGS; those are ``excluded``, since
    a test of unseen concepts must leave them out.

    Parameters
    ----------
    images : DataFrame
        `concept`, `exemplar_nr` (from 1) and `is_test`.
    """
    concepts = make_concepts(n_concepts, seed=seed)
    index = pd.Series(concepts.index, index=concepts["concept"])
    tested = set(images.loc[images["is_test"], "concept"])
    table = images.assign(
        concept_index=images["concept"].map(index).astype(int), exemplar=images["exemplar_nr"] - 1
    )
    excluded = table["concept"].isin(tested)
    table["split"] = np.select([table["is_test"], excluded], ["test", "excluded"], "train")
    return table


def write_image_files(
    table: pd.DataFrame, root: Path, *, size: int, seed: int, advance: Advance
) -> pd.DataFrame:
    """Write the images that are not there yet and return `table` with the `sha256` of every file."""
    hashes: list[str] = []
    for start in range(0, len(table), _CHUNK):
        chunk = table.iloc[start : start + _CHUNK]
        missing = [not (root / path).is_file() for path in chunk["path"]]
        drawn = iter(write_images(chunk[missing], root, size=size, seed=seed)["sha256"])
        hashes += [
            next(drawn) if absent else hash_file(root / path)
            for path, absent in zip(chunk["path"], missing, strict=True)
        ]
        advance(len(chunk))
    return table.assign(sha256=hashes)


def compute_drive(
    table: pd.DataFrame, root: Path, truth: Path, *, embed: Embed, n_semantic: int
) -> StimulusDrive:
    """Return the drive of the images, from the ground truth if an earlier call has kept it there.

    Raises
    ------
    DataError
        If `embed` does not give one finite vector per image.
    """
    is_train = (table["split"] == "train").to_numpy()
    paths = {name: truth / f"drive_{name}.npy" for name in _FEATURES}
    if all(path.is_file() for path in paths.values()):
        kept = {name: np.load(path, allow_pickle=False) for name, path in paths.items()}
        return StimulusDrive(table["stimulus_id"].to_numpy(object), **kept, is_train=is_train)
    stimuli = StimulusSet(table.reset_index(drop=True), root)
    vectors = np.asarray(embed(stimuli))
    vectors = vectors.reshape(len(vectors), -1) if vectors.ndim > 2 else vectors
    if vectors.ndim != 2 or len(vectors) != len(table) or not np.isfinite(vectors).all():
        raise DataError(
            f"the image encoder must give one finite vector for each of the {len(table)} images of the phantom, "
            f"but gave an array of shape {vectors.shape}."
        )
    drive = make_drive(
        stimuli.iterate_images(),
        vectors,
        table["stimulus_id"].tolist(),
        is_train=is_train,
        n_semantic=n_semantic,
    )
    for name, path in paths.items():
        with replace_atomically(path) as temporary:
            np.save(temporary, getattr(drive, name), allow_pickle=False)
    return drive
