"""Precomputed embeddings as a target: files are read and their rows matched with stimulus ids.

Owns the layouts of ATM, NICE, NeuroBridge and MindEye, and plain arrays whose order is stated. The first three store no
names: row k belongs to the k-th image of a list that was sorted by folder and file. The image list must therefore have
exactly as many images, and where it says which images share a concept, the rows must agree. Whether rows were
normalised to length one before they were saved is detected and reported, because both styles have the same file name.
Nothing in a file can run: no pickle is opened.

References
----------
ATM: Li et al. (2024), NeurIPS, arXiv:2403.07721. NICE: Song et al. (2024), ICLR, arXiv:2308.13234. MindEye: Scotti et
al. (2023), NeurIPS, arXiv:2305.18274; (2024), arXiv:2403.11207.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Embeddings, normalise_rows
from braindecode_vis.base.checks import (
    NUMPY_ERRORS,
    ConfigError,
    DataError,
    check_columns,
    check_file,
    check_finite,
    check_unique,
)
from braindecode_vis.base.contracts import ImageEncoder, ImageEncoderSettings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_json, read_json, write_json
from braindecode_vis.datasets.sources.file_damage import check_texts
from braindecode_vis.embeddings.weights import hash_weights, read_tensors

RECORD = "imported.json"
_HDF5 = (".h5", ".hdf5")
_UNIT_TOLERANCE = 0.01  # banks saved in half precision are off by up to 0.001
#: The network that each published file comes from, where its authors published one only.
_NETWORKS = {
    "atm": "ViT-H-14/laion2b_s32b_b79k",
    "nice": "clip-vit-large-patch14",
    "neurobridge": "RN50/openai",
}


class ImportedConfig(ImageEncoderSettings):
    """Embeddings from files that were computed elsewhere.

    Parameters
    ----------
    layout
        ``atm``: ``ViT-H-14_features_train.pt`` and ``..._test.pt``, with ``img_features`` per image and
        ``text_features`` per concept, which are then the target's own text. Their images passed open_clip's training
        transform (a random crop), so they agree with vectors of the same network only approximately.
        ``nice``: ``<dnn>_feature_maps_training.npy`` and ``..._test.npy`` of shape (n_images, 1, n_features).
        ``neurobridge``: ``image_train.npy`` and ``image_test.npy`` of shape (n_concepts, n_images, n_features), or
        augmented draws of them before these axes, which are averaged as NeuroBridge fuses them.
        ``mindeye``: one row per image of the 73,000 of NSD.
        ``rows``: any array with one row per image, whose order `ids` or `row_column` states.
    files
        One file with the rows of all images, or one for each value of the column `parts` of the stimulus table:
        ``{train: FILE, test: FILE}``. NumPy (``.npy``), HDF5 (``.h5``, ``.hdf5``), or tensors (``.pt``, ``.pth``,
        ``.safetensors``).
    parts
        Column of the stimulus table that says which file an image is in.
    network
        Network, weights and layer of the vectors, for the name of the space, since the files do not contain it. None
        takes the published one of the layout.
    ids
        For ``rows``, a text file with the stimulus id of each row, one per line, or an HDF5 file (such as `files`
        itself) with one list of texts; it may contain rows of other images.
    row_column
        For ``rows`` and ``mindeye``, the column of the stimulus table with the row of each image, from 0.
    array
        Name of the array in a file of several.
    """

    kind: Literal["imported"] = "imported"
    layout: Literal["atm", "nice", "neurobridge", "mindeye", "rows"]
    files: Path | dict[str, Path] | None = None
    parts: str = "split"
    network: str | None = Field(default=None, min_length=1)
    ids: Path | None = None
    row_column: str | None = None
    array: str | None = None

    not_hashed: ClassVar[frozenset[str]] = frozenset({"files", "ids"})

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if self.network is None and self.layout not in _NETWORKS:
            raise ValueError(
                f"layout {self.layout} needs network: what computed the vectors, for example ViT-L-14/openai"
            )
        if self.ids is not None and (self.layout != "rows" or self.row_column is not None):
            raise ValueError("ids goes with layout rows, and without row_column")
        if self.row_column is not None and self.layout not in ("rows", "mindeye"):
            raise ValueError(
                f"row_column goes with layout rows or mindeye; rows of {self.layout} follow the image list"
            )
        return self

    def list_files(self) -> dict[str, Path]:
        """Return the file of each part, that of all images under an empty name.

        Raises
        ------
        ConfigError
            If no file was given, or nothing says which row is which image.
        """
        if self.files is None or self.files == {}:
            raise ConfigError(
                "target.files names no file; give one, or one for each part: {train: FILE, test: FILE}."
            )
        if self.layout == "rows" and self.ids is None and self.row_column is None:
            raise ConfigError(
                "target.layout rows needs target.ids or target.row_column to know which row is which image."
            )
        files = self.files if isinstance(self.files, dict) else {"": self.files}
        if self.ids is not None and len(files) > 1:
            raise ConfigError(
                "target.ids belongs to one file, but target.files names several; join them first."
            )
        return {part: path.expanduser() for part, path in files.items()}

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless every file is there."""
        for path in [*self.list_files().values(), *([] if self.ids is None else [self.ids.expanduser()])]:
            check_file(path, what="the file of embeddings", hint="correct target.files and target.ids")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of the files, which count by their content."""
        self.check_files()
        fields = super().hashed_fields()
        fields["files_digests"] = {part: hash_weights(path) for part, path in self.list_files().items()}
        if self.ids is not None:
            fields["ids_digest"] = hash_weights(self.ids.expanduser())
        return fields

    def build(self) -> ImportedEncoder:
        """Return the encoder; files are read when the stimuli come."""
        return ImportedEncoder(self)

    def read(self, folder: Path) -> ImportedEncoder:
        """Return the encoder whose space was written into `folder`."""
        return ImportedEncoder(self, record=read_json(folder / RECORD))


class ImportedEncoder(ImageEncoder):
    """Embeddings from files in the place of an image encoder.

    Parameters
    ----------
    config
        Files and their layout.
    record
        What was found in them; None before they were read.
    """

    def __init__(self, config: ImportedConfig, *, record: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.record = record

    @property
    def space(self) -> str:
        """Name with layout, network, length of the rows and digest of the files."""
        if self.record is None:
            raise DataError(
                "the space of imported embeddings has no name before their files were read; run embed first."
            )
        return str(self.record["space"])

    def embed(self, stimuli: StimulusSet, training_ids: Sequence[str], embed_cached: Any) -> Embeddings:
        """Return the row of each stimulus; nothing is learnt and nothing cached.

        Parameters
        ----------
        stimuli
            All images of the run.
        training_ids, embed_cached
            Not needed here; see `contracts.ImageEncoder.embed`.

        Raises
        ------
        DataError
            If a file is another one, does not fit the image list, or lacks an image.
        """
        config, notes, styles, suffixes = self.config, [], {}, set()
        ids, blocks = [], []
        for part, path in config.list_files().items():
            mine = _pick_part(stimuli, config, part)
            vectors, suffix = _read_vectors(config, path, mine)
            check_finite(vectors, what=str(path), row_names=mine.ids)
            norms = np.linalg.norm(vectors.astype(np.float64), axis=-1)  # images, or images x tokens
            if (norms == 0).any():
                bad = mine.ids[int(np.flatnonzero((norms == 0).reshape(len(norms), -1).any(axis=1))[0])]
                raise DataError(f"{path} holds a row of zeros for {bad!r}; it was not computed to the end.")
            styles[path.name] = bool(np.abs(norms - 1).max() < _UNIT_TOLERANCE)
            length = f"their own length, {norms.min():.2f} to {norms.max():.2f}"
            notes.append(
                f"{path.name}: {len(mine)} images, {vectors.shape[-1]} features, "
                f"{'length one (old style)' if styles[path.name] else length}, sha256 {hash_weights(path)}"
            )
            suffixes.add(suffix)
            ids.append(mine.ids)
            blocks.append(vectors)
        if len(set(styles.values())) > 1:
            raise DataError(
                f"rows have length one in {', '.join(k for k, v in styles.items() if v)} and their own length in "
                f"{', '.join(k for k, v in styles.items() if not v)}; these files come from different releases."
            )
        if len({block.shape[1:] for block in blocks}) > 1 or len(suffixes) > 1:
            shapes = ", ".join(str(block.shape) for block in blocks)
            raise DataError(f"the files of target.files hold rows of different shapes: {shapes}.")
        digest = hash_json(config.hashed_fields()["files_digests"])[:12]
        network = config.network or _NETWORKS[config.layout]
        style = "unit" if all(styles.values()) else "raw"
        space = f"{config.layout}/{network}{suffixes.pop()}/{style}/files={digest}"
        self.record = {"space": space, "notes": notes}
        # Two versions of a file never share a space, as with the weights of a network.
        whole = Embeddings(np.concatenate(blocks), np.concatenate(ids), space)
        if len(whole.ids) < len(stimuli):
            missing = sorted(set(stimuli.ids) - set(whole.ids))
            raise DataError(
                f"target.files has no part for {len(missing)} images, first {missing[0]!r}; its parts are "
                f"{', '.join(config.list_files())}."
            )
        return whole.select(stimuli.ids)

    def embed_concepts(self, stimuli: StimulusSet) -> Embeddings:
        """Return the text embedding of each concept, which files of ATM hold beside their images.

        Raises
        ------
        ConfigError
            If the files are of another layout.
        """
        if self.config.layout != "atm":
            raise ConfigError(
                f"texts meet images in the space of a CLIP network, but imported files of layout {self.config.layout} "
                "hold no text; name a network with text.tower."
            )
        names: list[str] = []
        blocks = []
        for part, path in self.config.list_files().items():
            mine = _pick_part(stimuli, self.config, part)
            blocks.append(_read_atm(path, mine)["text_features"])
            names += _list_concepts(mine)
        check_unique(names, what="the concepts of target.files")
        space = self.embed(stimuli, (), None).space if self.record is None else self.space
        return Embeddings(np.concatenate(blocks), names, space).select(sorted(names))

    def encode(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Refuse: there is no network here to encode other images with."""
        raise ConfigError(
            "target.kind imported has embeddings only for the images of its files, but other images must "
            "be encoded; use the network itself as the target, for example target.kind openclip."
        )

    def write(self, folder: Path) -> None:
        """Write the name of the space and what was found in the files."""
        write_json(folder / RECORD, {"space": self.space, **dict(self.record or {})})


def _pick_part(stimuli: StimulusSet, config: ImportedConfig, part: str) -> StimulusSet:
    """Return the stimuli whose rows are in the file of a part."""
    if part == "":
        return stimuli
    check_columns(
        stimuli.table.columns, [config.parts], what="the stimulus table, whose images target.files parts,"
    )
    values = stimuli.table[config.parts].astype(str)
    if not (values == part).any():
        raise ConfigError(
            f"target.files names the part {part!r}, but the column {config.parts} of the stimulus table has "
            f"{', '.join(sorted(set(values)))}."
        )
    return stimuli.select(stimuli.ids[(values == part).to_numpy()])


def _read_vectors(config: ImportedConfig, path: Path, stimuli: StimulusSet) -> tuple[np.ndarray, str]:
    """Return the rows of the stimuli in their order, float32, and what to add to the network's name."""
    if config.layout == "atm":
        return _follow_list(_read_atm(path, stimuli)["img_features"], stimuli, path), ""
    if config.layout == "nice" and path.name.startswith("center"):
        raise DataError(
            f"{path} holds means over other images of each concept, not features of the images shown; "
            "name the file of feature maps."
        )
    with open_arrays(path) as arrays:
        source = find_vectors(arrays, path, config.array, most=4 if config.layout == "neurobridge" else 3)
        if config.layout == "nice":
            vectors = source[:, 0] if source.ndim == 3 and source.shape[1] == 1 else source
            return _follow_list(vectors, stimuli, path), ""
        if config.layout == "neurobridge":
            return _read_neurobridge(np.asarray(source), stimuli, path)
        rows = _find_stated_rows(config, stimuli, len(source), path)
        unique, inverse = np.unique(rows, return_inverse=True)  # HDF5 wants ascending rows, each once
        blocks = [source[block] for block in np.array_split(unique, max(1, len(unique) // 256))]
        return np.concatenate(blocks).astype(np.float32, copy=False)[inverse], ""


def _read_atm(path: Path, stimuli: StimulusSet) -> dict[str, np.ndarray]:
    """Return image and text features of one file, checked against the concepts of the list."""
    hint = "it is called ViT-H-14_features_train.pt or ..._test.pt"
    check_file(path, what="the ATM feature file", hint=hint)
    with open_arrays(path) as arrays:
        missing = [key for key in ("img_features", "text_features") if key not in arrays]
        if missing:
            raise DataError(
                f"{path} is missing {', '.join(missing)}; it holds {', '.join(list(arrays)[:4])}."
            )
        found = {key: np.asarray(arrays[key]) for key in ("img_features", "text_features")}
    n_concepts = len(_list_concepts(stimuli))
    # Another number of images is said elsewhere, with the shape.
    if len(found["img_features"]) == len(stimuli) and len(found["text_features"]) != n_concepts:
        raise DataError(
            f"{path} has text features of {len(found['text_features'])} concepts, the image list has "
            f"{n_concepts}: it belongs to another split or release."
        )
    return found


def _read_neurobridge(vectors: np.ndarray, stimuli: StimulusSet, path: Path) -> tuple[np.ndarray, str]:
    suffix = ""
    if vectors.ndim == 4:
        # The folder names the augmentation.
        suffix, vectors = f"/{path.parent.name}-mean-of-{len(vectors)}", vectors.mean(axis=0)
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
    flat = vectors.reshape(-1, vectors.shape[-1])  # images, features; concept by concept
    return _follow_list(flat, stimuli, path), suffix


def _follow_list(vectors: np.ndarray, stimuli: StimulusSet, path: Path) -> np.ndarray:
    """Bring rows that follow the sorted image list into the order of `stimuli`."""
    ordered = _sort_by_path(stimuli)
    if vectors.ndim not in (2, 3) or len(vectors) != len(ordered):
        raise DataError(
            f"{path} has the shape {vectors.shape}, but the image list has {len(ordered)} images: "
            "it belongs to another split or release."
        )
    vectors = np.asarray(vectors, dtype=np.float32)
    check_finite(vectors, what=str(path), row_names=ordered.ids)
    check_concepts(vectors, ordered.table["concept"].to_numpy(dtype=object), path)
    return vectors[ordered.find_rows(stimuli.ids)]  # from the order of the list to that of the table


def _sort_by_path(stimuli: StimulusSet) -> StimulusSet:
    """Return the stimuli in the order in which these banks were computed: by folder, then by file."""
    # Compared part by part: in whole paths a slash would sort after a space or a dot.
    parts = [tuple(str(path).replace("\\", "/").split("/")) for path in stimuli.table["path"]]
    order = sorted(range(len(parts)), key=parts.__getitem__)
    if len(set(parts)) < len(parts):
        raise DataError(
            "the image list names one file twice, so its order does not give the rows; give the order "
            "with target.layout rows and target.ids."
        )
    return stimuli.select(stimuli.ids[order])


def _list_concepts(stimuli: StimulusSet) -> list[str]:
    """Return each concept once, in the order of the folders."""
    return [str(name) for name in _sort_by_path(stimuli).table["concept"].unique()]


def _find_stated_rows(config: ImportedConfig, stimuli: StimulusSet, n_rows: int, path: Path) -> np.ndarray:
    """Return the row of each stimulus by the ids beside the file, or by a column of the stimulus table."""
    import pandas as pd

    if config.ids is not None:
        names = _read_ids(config.ids.expanduser())
        if len(names) != n_rows:
            raise DataError(f"{path} has {n_rows} rows, but {config.ids} names {len(names)} images.")
        check_unique(names, what=f"the ids of {config.ids}")
        rows = pd.Index(names, dtype=object).get_indexer(pd.Index(stimuli.ids, dtype=object))
        if (rows < 0).any():
            missing = stimuli.ids[rows < 0]
            raise DataError(
                f"{config.ids} is missing {len(missing)} of {len(stimuli)} images, first {missing[0]!r}; "
                "compute their embeddings too, or choose a data set without them."
            )
        return rows
    column = config.row_column or "nsd_id"
    check_columns(stimuli.table.columns, [column], what="the stimulus table")
    rows = stimuli.table[column].to_numpy(dtype=np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= n_rows):
        bad = int(rows[(rows < 0) | (rows >= n_rows)][0])
        raise DataError(
            f"image number {bad} of column {column} is outside the {n_rows} rows of {path}; numbers count "
            "from 0 (73KID of NSD's tables counts from 1)."
        )
    return rows


def _read_ids(path: Path) -> list[str]:
    """Return the ids of a text file, or of the only list of texts in an HDF5 file."""
    if path.suffix not in _HDF5:
        return [name for line in path.read_text(encoding="utf-8").split("\n") if (name := line.strip())]
    import h5py

    with open_arrays(path) as arrays:
        found = [item for item in arrays.values() if h5py.check_string_dtype(item.dtype) and item.ndim == 1]
        if len(found) != 1:
            raise ConfigError(
                f"target.ids names {path}, which holds {len(found)} lists of texts; one is needed."
            )
        return [str(name) for name in found[0].asstr()[:]]


@contextmanager
def open_arrays(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the arrays of a file by name, one without a name as ``array``; HDF5 and NumPy are read as they are used.

    Raises
    ------
    DataError
        If the file is missing, damaged, or holds anything but arrays.
    """
    check_file(path, what="the file of embeddings", hint="correct target.files")
    if path.suffix in (".npy", ".npz"):
        try:
            found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            # An archive reads an array when it is asked for, and refuses one of objects then.
            named = (
                {"array": found}
                if isinstance(found, np.ndarray)
                else {key: found[key] for key in found.files}
            )
        except (OSError, *NUMPY_ERRORS) as error:
            raise DataError(
                f"{path} holds no plain array, or is damaged; files of pickled lists or dictionaries are not read."
            ) from error
        yield named
    elif path.suffix in _HDF5:
        import h5py

        check_texts(path)
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise DataError(f"{path} is no intact HDF5 file ({error}); fetch it again.") from error
        arrays: dict[str, Any] = {}
        with file:
            file.visititems(
                lambda name, item: arrays.update({name: item}) if isinstance(item, h5py.Dataset) else None
            )
            yield arrays
    else:
        from torch import Tensor, stack

        content = read_tensors(path)
        if isinstance(content, list | tuple) and len({getattr(v, "shape", None) for v in content}) == 1:
            content = (
                stack(list(content)) if isinstance(content[0], Tensor) else content
            )  # one tensor per image
        tensors = content if isinstance(content, Mapping) else {"array": content}
        # Halves through float32, since NumPy has no bfloat16; whole numbers stay what they are.
        yield {
            str(k): (v.float() if v.is_floating_point() and v.itemsize < 4 else v).detach().numpy()
            for k, v in tensors.items()
            if isinstance(v, Tensor)
        }


def find_vectors(arrays: Mapping[str, Any], path: Path, name: str | None, *, most: int) -> Any:
    """Return the array with one vector, or one row of tokens, per image.

    Parameters
    ----------
    arrays
        Of one file.
    path
        The file, for messages.
    name
        Name of the array; None takes the only one that holds vectors.
    most
        Largest number of axes.

    Raises
    ------
    ConfigError, DataError
        If there is no such array, or several, or there are pixels only.
    """
    if name is not None:
        if name not in arrays:
            raise ConfigError(f"{path} holds no array {name!r}; it holds {', '.join(arrays)}.")
        arrays = {name: arrays[name]}
    # Whole numbers are labels or pixels; features are floating-point numbers.
    found = {k: item for k, item in arrays.items() if 2 <= item.ndim <= most and item.dtype.kind == "f"}
    pixels = [k for k, item in arrays.items() if item.ndim == 4]
    if not found and pixels:
        raise DataError(
            f"{path} holds pixels ({pixels[0]}, {arrays[pixels[0]].shape}), not embeddings; embed the images instead."
        )
    if len(found) != 1:
        raise ConfigError(
            f"{path} holds {len(found)} arrays of floating-point vectors ({', '.join(found) or 'none'}); name one with "
            "target.array."
        )
    return next(iter(found.values()))


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
