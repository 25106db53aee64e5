"""Feature banks that people already hold, brought under stimulus ids.

Owns the layouts of ATM, NICE, NeuroBridge and MindEye. None of them stores names: row k belongs to the k-th image of a
list that was sorted by folder and file. The list at hand must therefore have exactly as many images, and where it says
which images share a concept, the rows must agree. Whether rows were brought to length one before they were saved is
found out and said, because the same file name exists in both styles.

References
----------
ATM: Li et al. (2024), NeurIPS, arXiv:2403.07721. NICE: Song et al. (2024), ICLR, arXiv:2308.13234. MindEye: Scotti et
al. (2023), NeurIPS, arXiv:2305.18274; (2024), arXiv:2403.11207.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings, normalise_rows
from braindecode_vis.checks import ConfigError, DataError, check_columns, check_file, check_finite
from braindecode_vis.embeddings.weights import read_state
from braindecode_vis.stimuli import StimulusSet
from braindecode_vis.store import hash_file

_UNIT_TOLERANCE = 0.01  # banks saved in half precision are off by up to 0.001


@dataclass(frozen=True)
class ImportedBank:
    """A bank that came from elsewhere.

    Parameters
    ----------
    embeddings
        The vectors under their stimulus ids.
    normalised
        Whether every row had length one.
    note
        One sentence on what was found, with the hash of the file, for the provenance.
    """

    embeddings: Embeddings
    normalised: bool
    note: str


def import_atm(
    path: Path, stimuli: StimulusSet, *, model: str = "ViT-H-14/laion2b_s32b_b79k"
) -> ImportedBank:
    """Read ``ViT-H-14_features_train.pt`` or ``..._test.pt`` of ATM.

    The file holds ``img_features``, one row per image, and ``text_features``, one per concept. Until 2025 the images
    were saved at length one, later at their own length, under the same name. They were computed through open_clip's
    training transform (a random crop), so they agree with vectors of the same network only approximately.

    Parameters
    ----------
    path
        The file.
    stimuli
        The images of that split; order does not matter.
    model
        Name of network and weights, for the space.

    Raises
    ------
    DataError
        If the file is another one, or does not fit the image list.
    """
    tensors = _read_atm(path)
    vectors = np.asarray(tensors["img_features"].float().numpy())
    bank = _align(vectors, stimuli, path, f"atm/{model}")
    concepts = _sort_by_path(stimuli).table["concept"].unique()
    if len(tensors["text_features"]) != len(concepts):
        raise DataError(
            f"{path} has text features of {len(tensors['text_features'])} concepts, the image list has "
            f"{len(concepts)}: it belongs to another split or release."
        )
    return bank


def import_atm_text(
    path: Path, stimuli: StimulusSet, *, model: str = "ViT-H-14/laion2b_s32b_b79k"
) -> ImportedBank:
    """Read the ``text_features`` of an ATM file: one row per concept, keyed by the concept.

    Parameters
    ----------
    path, stimuli, model
        As for `import_atm`. The vectors carry the space of the images of the same file.
    """
    images = import_atm(path, stimuli, model=model)  # checks the file against the list
    vectors = np.asarray(_read_atm(path)["text_features"].float().numpy())
    concepts = list(_sort_by_path(stimuli).table["concept"].unique())
    return _describe(Embeddings(vectors, concepts, images.embeddings.space), path, len(concepts), "concepts")


def _read_atm(path: Path) -> dict[str, Any]:
    check_file(
        path, what="the ATM feature file", hint="it is called ViT-H-14_features_train.pt or ..._test.pt"
    )
    content = read_state(path)
    missing = [key for key in ("img_features", "text_features") if key not in content]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(map(str, list(content)[:4]))}."
        )
    return content


def import_nice(path: Path, stimuli: StimulusSet, *, model: str = "clip-vit-large-patch14") -> ImportedBank:
    """Read ``<dnn>_feature_maps_training.npy`` or ``..._test.npy`` of NICE, shape (n_images, 1, n_features).

    Parameters
    ----------
    path
        The file.
    stimuli
        The images of that split; order does not matter.
    model
        Name of network and weights, for the space.

    Raises
    ------
    DataError
        If the file does not fit the image list, or is a file of concept centres.
    """
    if path.name.startswith("center"):
        raise DataError(
            f"{path} holds means over other images of each concept, not features of the images shown; "
            "read it with import_centres."
        )
    vectors = _read_npy(path)
    if vectors.ndim == 3 and vectors.shape[1] == 1:
        vectors = vectors[:, 0]
    return _align(vectors, stimuli, path, f"nice/{model}")


def import_centres(
    path: Path, stimuli: StimulusSet, *, model: str = "clip-vit-large-patch14"
) -> ImportedBank:
    """Read ``center_<dnn>.npy`` of NICE: one mean vector per test concept, keyed by the concept.

    The means are over other images of the concept, so they are a gallery of concepts and never one of images. They are
    means of unit vectors, a little shorter than one, and carry the space of NICE's unit vectors: cosines between the
    two are meant.

    Parameters
    ----------
    path
        The file.
    stimuli
        The test images; their concepts name the rows.
    model
        As for `import_nice`: the space is the same.
    """
    vectors = _read_npy(path)
    concepts = list(_sort_by_path(stimuli).table["concept"].unique())
    if vectors.ndim != 2 or len(vectors) != len(concepts):
        raise DataError(
            f"{path} has the shape {vectors.shape}, but the image list has {len(concepts)} concepts: "
            "one row per test concept is expected."
        )
    return _describe(Embeddings(vectors, concepts, f"nice/{model}/unit"), path, len(concepts), "concepts")


def import_neurobridge(path: Path, stimuli: StimulusSet, *, model: str = "RN50/openai") -> ImportedBank:
    """Read ``image_train.npy`` or ``image_test.npy`` of NeuroBridge, or its augmented ``train.npy``.

    Parameters
    ----------
    path
        A file of shape (n_concepts, n_images_per_concept, n_features), or (n_draws, n_concepts, ...) for augmented
        features, whose draws are averaged as NeuroBridge fuses them.
    stimuli
        The images of that split; order does not matter.
    model
        Name of network and weights, for the space.

    Raises
    ------
    DataError
        If the file does not fit the image list.
    """
    vectors, name = _read_npy(path), "neurobridge/" + model
    if vectors.ndim == 4:
        vectors, name = vectors.mean(axis=0), f"{name}/{path.parent.name}-mean-of-{len(vectors)}"
    if vectors.ndim != 3:
        raise DataError(
            f"{path} has the shape {vectors.shape}; (concepts, images per concept, features) is expected."
        )
    counts = _sort_by_path(stimuli).table.groupby("concept", sort=False).size()
    expected = (len(counts), int(counts.max()))
    if vectors.shape[:2] != expected or counts.min() != counts.max():
        raise DataError(
            f"{path} holds {vectors.shape[0]} concepts of {vectors.shape[1]} images, the image list {expected[0]} "
            f"concepts of {counts.min()} to {counts.max()}: it belongs to another split or release."
        )
    return _align(vectors.reshape(-1, vectors.shape[-1]), stimuli, path, name)


def import_mindeye(
    path: Path, stimuli: StimulusSet, *, model: str, dataset: str | None = None, row_column: str = "nsd_id"
) -> ImportedBank:
    """Read embeddings of NSD images from HDF5, one row per image of the 73,000.

    Only the rows of the stimuli are read.

    Parameters
    ----------
    path
        The file.
    stimuli
        The images; `row_column` of their table says which of the 73,000 each is.
    model
        Name of network, layer and transform, for the space; the file does not say.
    dataset
        Name of the array in the file; None takes the only one that holds vectors.
    row_column
        Column with the 0-based image number.

    Raises
    ------
    DataError
        If the file holds pixels instead of vectors, or an image number is outside it.
    """
    import h5py

    check_file(path, what="the HDF5 bank", hint="name the .hdf5 or .h5 file")
    check_columns(stimuli.table.columns, [row_column], what="the stimulus table")
    rows = stimuli.table[row_column].to_numpy(dtype=np.int64)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is no intact HDF5 file ({error}); fetch it again.") from error
    with file:
        source = _find_vectors(file, path, dataset)
        if rows.size and (rows.min() < 0 or rows.max() >= len(source)):
            bad = int(rows[(rows < 0) | (rows >= len(source))][0])
            raise DataError(
                f"image number {bad} of column {row_column} is outside the {len(source)} rows of {path}; numbers count "
                "from 0 (73KID of NSD's tables counts from 1)."
            )
        unique, inverse = np.unique(rows, return_inverse=True)  # HDF5 wants ascending rows, each once
        vectors = np.concatenate(
            [source[block] for block in np.array_split(unique, max(1, len(unique) // 256))]
        )
    vectors = vectors.astype(np.float32, copy=False)[inverse]
    return _describe(Embeddings(vectors, stimuli.ids, f"mindeye/{model}"), path, len(rows), "images")


def _find_vectors(file: Any, path: Path, dataset: str | None) -> Any:
    import h5py

    arrays: dict[str, Any] = {}
    file.visititems(
        lambda name, item: arrays.update({name: item}) if isinstance(item, h5py.Dataset) else None
    )
    if dataset is not None:
        if dataset not in arrays:
            raise ConfigError(f"{path} holds no array {dataset!r}; it holds {', '.join(arrays)}.")
        arrays = {dataset: arrays[dataset]}
    pixels = [name for name, item in arrays.items() if item.ndim == 4]
    found = {name: item for name, item in arrays.items() if item.ndim in (2, 3) and item.dtype.kind == "f"}
    if not found and pixels:
        raise DataError(
            f"{path} holds pixels ({pixels[0]}, {arrays[pixels[0]].shape}), not embeddings; embed the images instead."
        )
    if len(found) != 1:
        raise ConfigError(
            f"{path} holds {len(found)} arrays of vectors ({', '.join(found) or 'none'}); say which with dataset."
        )
    return next(iter(found.values()))


def _read_npy(path: Path) -> np.ndarray:
    check_file(path, what="the feature file", hint="name the .npy file")
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path} holds no plain array ({error}); files of pickled lists or dictionaries are not read."
        ) from error
    if vectors.dtype.kind != "f":
        raise DataError(f"{path} holds {vectors.dtype} values where features are floating-point numbers.")
    return vectors.astype(np.float32, copy=False)


def _sort_by_path(stimuli: StimulusSet) -> StimulusSet:
    """Return the stimuli in the order in which these banks were computed: by folder, then by file."""
    parts = [tuple(str(path).replace("\\", "/").split("/")) for path in stimuli.table["path"]]
    order = sorted(range(len(parts)), key=parts.__getitem__)
    if len(set(parts)) < len(parts):
        raise DataError("the image list names one file twice, so the rows of the bank cannot be told apart.")
    return stimuli.select(stimuli.ids[order])


def _align(vectors: np.ndarray, stimuli: StimulusSet, path: Path, name: str) -> ImportedBank:
    ordered = _sort_by_path(stimuli)
    if vectors.ndim not in (2, 3) or len(vectors) != len(ordered):
        raise DataError(
            f"{path} has the shape {vectors.shape}, but the image list has {len(ordered)} images: "
            "it belongs to another split or release."
        )
    check_finite(vectors, what=str(path), row_names=ordered.ids)
    check_concepts(vectors, ordered.table["concept"].to_numpy(dtype=object), path)
    bank = Embeddings(vectors, ordered.ids, name).select(stimuli.ids)
    return _describe(bank, path, len(ordered), "images")


def check_concepts(vectors: np.ndarray, concepts: np.ndarray, path: Path) -> None:
    """Raise `DataError` if rows that the list puts into one concept are no more alike than others.

    A bank of another image list passes every count and is wrong in every row; images of one concept are alike in any
    useful space, so the list can be checked against the rows. Lists with one image per concept are not checked.

    Parameters
    ----------
    vectors : float array of shape (n_images, ...)
    concepts : sequence of length n_images
    path
        For the message.
    """
    _, codes, counts = np.unique(concepts.astype(str), return_inverse=True, return_counts=True)
    if counts.max() < 2 or len(counts) < 2:
        return
    flat = vectors.reshape(len(vectors), -1).astype(np.float64)
    flat = normalise_rows(flat - flat.mean(axis=0))
    sums = np.zeros((len(counts), flat.shape[1]))
    np.add.at(sums, codes, flat)
    # Sum over pairs within a concept = squared length of its sum minus the lengths themselves.
    within = ((sums**2).sum() - len(flat)) / (counts * (counts - 1)).sum()
    expected = ((flat.sum(axis=0) ** 2).sum() - len(flat)) / (len(flat) * (len(flat) - 1))
    n_pairs = int((counts * (counts - 1)).sum()) // 2
    # Chance alone scatters the mean over pairs by 1 / sqrt(pairs * dimensions); spaces in use have well over ten.
    if within - expected < 4 / np.sqrt(10 * n_pairs):
        raise DataError(
            f"{path} does not follow the image list: images of one concept are no more alike in it ({within:.3f}) than "
            f"any two images ({expected:.3f}); the bank was computed from another list."
        )


def _describe(bank: Embeddings, path: Path, n_rows: int, unit: str) -> ImportedBank:
    norms = np.linalg.norm(bank.vectors.astype(np.float64), axis=-1)
    if (norms == 0).any():
        bad = bank.ids[int(np.flatnonzero((norms == 0).reshape(len(norms), -1).any(axis=1))[0])]
        raise DataError(f"{path} holds a row of zeros for {bad!r}; it was not computed to the end.")
    normalised = bool(np.abs(norms - 1).max() < _UNIT_TOLERANCE)
    style = (
        "length one (old style)"
        if normalised
        else f"their own length, {norms.min():.2f} to {norms.max():.2f}"
    )
    note = (
        f"{path.name}: {n_rows} {unit}, {bank.vectors.shape[-1]} features, {style}, sha256 {hash_file(path)}"
    )
    suffix = "" if bank.space.endswith(("/unit", "/raw")) else ("/unit" if normalised else "/raw")
    return ImportedBank(Embeddings(bank.vectors, bank.ids, bank.space + suffix), normalised, note)
