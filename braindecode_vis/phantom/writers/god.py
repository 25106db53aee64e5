"""Generic Object Decoding as Kamitani Lab ships it: BData tables in HDF5.

Owns ``Subject*.h5`` and ``ImageFeatures.h5``. A BData file is one matrix, samples by columns; the metadata say
of every column what it is. Traps that are kept: the two ways to spell the groups; `stimulus_id` as a float,
which loses the zeros at its end; flags that are 1 where they apply, 0 or NaN where they do not.

References
----------
.. [1] Horikawa, T., Kamitani, Y. (2017). Generic decoding of seen and imagined objects using hierarchical
   visual features. Nature Communications 8, 15037. https://doi.org/10.1038/ncomms15037
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_columns, check_option
from braindecode_vis.phantom.writers.tables import check_block, check_count
from braindecode_vis.store import replace_atomically

DATA_TYPES = {"training": 1, "test": 2, "imagery": 3}
FEATURE_TYPES = {"training": 1, "test": 2, "category_average": 3}
Naming = Literal["dataSet", "dataset"]
_METADATA_NAME = {"dataSet": "metaData", "dataset": "metadata"}
DESIGN_COLUMNS = ("DataType", "stimulus_id", "Run", "Block")


def encode_stimulus_id(name: str) -> float:
    """Return the number that stands for an ImageNet name: synset before the point, image after it.

    Examples
    --------
    >>> encode_stimulus_id("n01518878_5958")
    1518878.005958
    >>> encode_stimulus_id("n01621127_19020")  # the last zero is gone
    1621127.01902
    """
    synset, _, image = name.partition("_")
    if not (synset.startswith("n") and synset[1:].isdigit() and image.isdigit() and len(image) <= 6):
        raise DataError(
            f"{name!r} is no ImageNet name like n01518878_5958; its image number has six digits at most."
        )
    return float(f"{int(synset[1:])}.{int(image):06d}")


def write_bdata(
    path: Path,
    samples: Iterable[np.ndarray],
    labels: pd.DataFrame,
    rois: Mapping[str, np.ndarray],
    *,
    voxel_xyz: np.ndarray,
    naming: Naming = "dataSet",
    dtype: str = "<f8",
) -> Path:
    """Write one person's ``Subject*.h5``.

    Parameters
    ----------
    samples : iterable of arrays of shape (n, n_voxels)
        Voxel values of n samples, in the order of `labels`.
    labels : DataFrame, one row per sample
        Numbers; `DataType` (1 training, 2 test, 3 imagery), `stimulus_id`, `Run` and `Block` are required, and
        further columns are kept.
    rois : mapping of name to bool array of shape (n_voxels,)
        For example ``{"ROI_V1": ...}``.
    voxel_xyz : array of shape (n_voxels, 3)
        Coordinates (mm).
    naming
        ``dataSet`` with ``metaData``, as the published files, or ``dataset`` with ``metadata``, as later ones.
    """
    check_columns(labels.columns, DESIGN_COLUMNS, what="the label table of a BData file")
    n_voxels = len(voxel_xyz)
    n_columns = n_voxels + labels.shape[1]
    entries: list[tuple[str, str, np.ndarray]] = [("VoxelData", "1 = voxel data", np.ones(n_voxels))]
    for axis, name in enumerate(("voxel_x", "voxel_y", "voxel_z")):
        entries.append((name, f"Voxel {name[-1]} coordinate", np.asarray(voxel_xyz)[:, axis]))
    for name, flag in rois.items():
        check_block(flag, (n_voxels,), what=f"the flags of {name}")
        entries.append((name, f"1 = {name}", np.asarray(flag, dtype=float)))
    metadata = [(key, text, _pad(value, 0, n_columns)) for key, text, value in entries]
    for index, name in enumerate(labels.columns):
        metadata.append((str(name), f"1 = {name}", _pad(np.ones(1), n_voxels + index, n_columns)))
    return _write(path, samples, labels.to_numpy(float), metadata, n_voxels, naming, dtype)


def write_image_features(
    path: Path,
    features: Mapping[str, np.ndarray],
    *,
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    feature_types: np.ndarray,
    naming: Naming = "dataSet",
) -> Path:
    """Write ``ImageFeatures.h5``.

    Parameters
    ----------
    features : mapping of name to array of shape (n_rows, n_units)
        For example ``{"cnn1": ..., "gist": ...}``.
    image_ids, category_ids : arrays of shape (n_rows,)
        As `encode_stimulus_id` gives them; NaN for the image of a category average.
    feature_types : int array of shape (n_rows,)
        1 training image, 2 test image, 3 average of a category.
    """
    blocks = [np.asarray(block, dtype=float) for block in features.values()]
    widths = [block.shape[1] for block in blocks]
    n_units, starts = sum(widths), np.cumsum([0, *widths])
    labels = np.column_stack([image_ids, category_ids, feature_types]).astype(float)
    n_columns = n_units + labels.shape[1]
    metadata = [
        (name, f"1 = {name}", _pad(np.ones(width), start, n_columns))
        for name, width, start in zip(features, widths, starts, strict=False)
    ]
    for index, name in enumerate(("ImageID", "CatID", "FeatureType")):
        metadata.append((name, f"1 = {name}", _pad(np.ones(1), n_units + index, n_columns)))
    return _write(path, [np.concatenate(blocks, axis=1)], labels, metadata, n_units, naming, "<f8")


def _pad(values: np.ndarray, start: int, n_columns: int) -> np.ndarray:
    row = np.full(n_columns, np.nan)
    row[start : start + len(values)] = values
    return row


def _write(
    path: Path,
    samples: Iterable[np.ndarray],
    labels: np.ndarray,
    metadata: Sequence[tuple[str, str, np.ndarray]],
    n_left: int,
    naming: Naming,
    dtype: str,
) -> Path:
    import h5py

    check_option("naming", naming, _METADATA_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = h5py.string_dtype("utf-8")
    with replace_atomically(path) as temporary, h5py.File(temporary, "w") as file:
        matrix = file.create_dataset(naming, (len(labels), n_left + labels.shape[1]), dtype)
        matrix[:, n_left:] = labels
        start = 0
        for block in samples:
            array = check_block(block, (None, n_left), what=f"the samples of {path.name}")
            if start + len(array) <= len(labels):
                matrix[start : start + len(array), :n_left] = array
            start += len(array)
        check_count(start, len(labels), what=path.name, unit="samples")
        group = file.create_group(_METADATA_NAME[naming])
        group.create_dataset("key", data=[key for key, _, _ in metadata], dtype=text)
        group.create_dataset("description", data=[entry for _, entry, _ in metadata], dtype=text)
        group.create_dataset("value", data=np.stack([value for _, _, value in metadata]))
    return path


def estimate_bytes(n_samples: int, n_voxels: int, n_rois: int = 10, n_labels: int = 4) -> int:
    """Return the size of one ``Subject*.h5``: the matrix and the metadata, both float64."""
    return 8 * (n_voxels + n_labels) * (n_samples + 4 + n_rois + n_labels)
