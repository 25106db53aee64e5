"""BData: the HDF5 table in which Kamitani Lab publishes preprocessed fMRI, and the names of its stimulus numbers.

Owns the two spellings of its groups, the meaning of its columns, and reading rows without the whole matrix. A BData
file is one matrix, samples by columns; for every key, the metadata give one number per column: 1 where a flag applies
(voxels, regions, labels), a coordinate, or NaN.

Also owns the code ``1518878.005958`` for ``n01518878_5958`` and the published stimulus lists. A number that was stored
as text or in a spreadsheet has lost the zeros at its end (``1621127.01902`` is image 19020, not 1902): it is padded to
six digits before it is split.

References
----------
Kamitani Lab, bdpy, https://github.com/KamitaniLab/bdpy: describes the format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import DataError, is_there, refuse_damage, suggest
from braindecode_vis.datasets.manifests import CheckFinding
from braindecode_vis.datasets.sources.betas_source import Geometry, Roi
from braindecode_vis.datasets.sources.file_damage import check_texts

if TYPE_CHECKING:
    import pandas as pd

GROUPS = {"dataSet": "metaData", "dataset": "metadata"}
"""Names of the matrix and its metadata in the published files and in later ones."""
# Our choice: above the rounding of stored positions, far below a voxel.
_GRID_TOLERANCE_MM = 0.02


@dataclass(frozen=True)
class BData:
    """An open description of one file; the matrix stays on disk.

    Parameters
    ----------
    path
        The file.
    matrix
        Name of the matrix in it.
    n_samples
        Rows of the matrix.
    metadata
        One number per column of the matrix for each key, float64 of shape (n_columns,).
    labels
        For each key, the text of each number in it (`vmap`); empty in older files.
    precise
        Whether the matrix is stored in double precision, which the numbers of images need.
    """

    path: Path
    matrix: str
    n_samples: int
    metadata: Mapping[str, np.ndarray]
    labels: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    precise: bool = True

    def find_columns(self, key: str) -> np.ndarray:
        """Return the columns that `key` flags, ascending.

        Raises
        ------
        DataError
            If the key is unknown or flags nothing.
        """
        if key not in self.metadata:
            raise DataError(
                f"{self.path.name} has no {key!r}{suggest(key, list(self.metadata))}; it has "
                f"{', '.join(sorted(self.metadata))}."
            )
        # Other columns hold 0 or NaN, depending on the version that wrote the file.
        columns = np.flatnonzero(self.metadata[key] == 1)
        if not len(columns):
            raise DataError(f"{key!r} flags no column of {self.path}; the file is damaged or was cut.")
        return columns

    def read_label(self, key: str) -> np.ndarray:
        """Return the numbers of a label, float64 of shape (n_samples,)."""
        columns = self.find_columns(key)
        if len(columns) != 1:
            raise DataError(
                f"{key!r} of {self.path} should be one column, but flags {len(columns)}; it is not a label."
            )
        return self._read(slice(None), int(columns[0]))

    def read_rows(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return some samples of some columns, float32 of shape (len(rows), len(columns)); rows ascend."""
        return self._read(np.asarray(rows), slice(None))[:, columns].astype(np.float32)

    def _read(self, rows: Any, columns: Any) -> np.ndarray:
        import h5py

        with h5py.File(self.path) as file:
            return np.asarray(file[self.matrix][rows, columns])

    def find_rois(self) -> list[str]:
        """Return the keys of regions, in the order of the file."""
        return [key for key in self.metadata if key.startswith("ROI_")]

    def warn_of_rois(self) -> list[str]:
        """Return a sentence if there are regions without a voxel, as a block of zeros in the file would leave them."""
        empty = [key for key in self.find_rois() if not (self.metadata[key] == 1).any()]
        if not empty:
            return []
        return [
            f"{len(empty)} region(s) of {self.path.name} have no voxel, first {empty[0]}; if the authors' file has "
            "some there, fetch it again."
        ]


def read_bdata(path: Path) -> BData:
    """Open a BData file and check that its parts fit together.

    Raises
    ------
    DataError
        If it is not HDF5, the matrix or its metadata are missing, or the two have different numbers of columns.
    """
    import h5py

    check_texts(path)
    with (
        refuse_damage(f"{path} cannot be read as HDF5", OSError, hint="it is damaged or truncated"),
        h5py.File(path) as file,
    ):
        matrix = _find(file, tuple(GROUPS), path)
        group = file[_find(file, tuple(GROUPS.values()), path)]
        missing = [name for name in ("key", "value") if name not in group]
        if missing:
            raise DataError(f"the metadata of {path} are missing {', '.join(missing)}; fetch the file again.")
        keys = [_decode(key) for key in np.ravel(group["key"][()])]
        values = np.asarray(group["value"][()], dtype=np.float64)
        shape, dtype = file[matrix].shape, file[matrix].dtype
        labels = {
            key: {float(number): _decode(text[()]) for number, text in entry.items()}
            for key, entry in (file["vmap"].items() if "vmap" in file else ())
        }
    if len(shape) != 2 or values.shape != (len(keys), shape[1]):
        raise DataError(
            f"{path} has a matrix of shape {shape}, so its {len(keys)} metadata need one number for each column, "
            f"but have the shape {values.shape}; the file is damaged or transposed."
        )
    return BData(path, matrix, shape[0], dict(zip(keys, values, strict=True)), labels, dtype == np.float64)


def _find(file: Any, names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in file:
            return name
    raise DataError(
        f"{path} holds {', '.join(file) or 'nothing'}, but a BData file has {' or '.join(names)}; it is another kind "
        "of HDF5 file."
    )


def _decode(text: Any) -> str:
    text = text.item() if isinstance(text, np.generic) else text
    return (text.decode() if isinstance(text, bytes) else str(text)).strip()


def read_positions(data: BData, columns: np.ndarray) -> np.ndarray | None:
    """Return the voxel positions (mm), shape (n_voxels, 3), or None if the file has none."""
    keys = [f"voxel_{axis}" for axis in "xyz"]
    if any(key not in data.metadata for key in keys):
        return None
    positions = np.column_stack([data.metadata[key][columns] for key in keys])
    return positions if np.isfinite(positions).all() else None


def find_grid(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the regular grid of the voxels, if their positions form one along the axes.

    Parameters
    ----------
    positions : array of shape (n_voxels, 3)
        In mm.

    Returns
    -------
    mask : bool array of shape (nx, ny, nz)
        The smallest box around the voxels.
    affine : float64 array of shape (4, 4)
        From voxel indices to positions in mm.
    indices : int array of shape (n_voxels, 3)
        Index of each voxel in the box.

    Examples
    --------
    >>> mask, affine, indices = find_grid(np.array([[0.0, 3, -3], [6, 0, 0]]))
    >>> mask.shape, affine.diagonal().tolist(), indices.tolist()
    ((2, 2, 2), [6.0, 3.0, 3.0, 1.0], [[0, 1, 0], [1, 0, 1]])
    """
    origin = positions.min(axis=0)
    # Voxels need not be isotropic, so each axis has its own step.
    steps = np.array([_find_step(axis) for axis in positions.T])
    ratio = (positions - origin) / steps
    indices = np.rint(ratio).astype(int)
    off_grid = np.abs(ratio - indices) * steps > _GRID_TOLERANCE_MM
    # Positions that were transformed to another space do not form a grid.
    if off_grid.any() or len(np.unique(indices, axis=0)) != len(indices):
        return None
    mask = np.zeros(indices.max(axis=0) + 1, dtype=bool)
    mask[tuple(indices.T)] = True
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.diag(steps), origin
    return mask, affine, indices


def _find_step(values: np.ndarray) -> float:
    gaps = np.diff(np.unique(values))
    gaps = gaps[gaps > _GRID_TOLERANCE_MM]
    return float(gaps.min()) if len(gaps) else 1.0


def make_bdata_geometry(data: BData, rois: tuple[str, ...]) -> tuple[Geometry, np.ndarray]:
    """Return the positions of the voxels of a file, and the columns to read for them, in the same order.

    Positions on a regular grid give a mask and an affine; other ones are kept as the maps `voxel_x`, `voxel_y` and
    `voxel_z` (mm).

    Parameters
    ----------
    data
        An open file.
    rois
        Keys of regions whose union is kept; every voxel if empty.
    """
    columns = data.find_columns("VoxelData")
    if rois:
        wanted = np.unique(np.concatenate([data.find_columns(key) for key in rois]))
        outside = np.setdiff1d(wanted, columns)
        if len(outside):
            raise DataError(
                f"{', '.join(rois)} of {data.path} flag {len(outside)} columns that are not voxels."
            )
        columns = wanted
    positions = read_positions(data, columns)
    grid = None if positions is None else find_grid(positions)
    ids, mask, affine = columns, None, None
    if grid is not None:
        mask, affine, indices = grid
        ids = np.ravel_multi_index(tuple(indices.T), mask.shape)
        # A mask gives its voxels in C order, and columns must follow.
        order = np.argsort(ids)
        ids, columns = ids[order], columns[order]
        assert positions is not None
        positions = positions[order]
    maps = {}
    if grid is None and positions is not None:
        maps = {f"voxel_{axis}": positions[:, n] for n, axis in enumerate("xyz")}
    regions = {
        _clean_name(key): Roi((data.metadata[key][columns] == 1).astype(np.int16), {1: key})
        for key in data.find_rois()
    }
    return Geometry(ids, mask, affine, regions, maps=maps), columns


def _clean_name(key: str) -> str:
    """Return the key of a region as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", key.removeprefix("ROI_"))


_CODE = re.compile(r"(\d{1,8})(?:\.(\d{0,6}))?")
STIMULUS_LISTS = {"train": "stimulus_ImageNetTraining.tsv", "test": "stimulus_ImageNetTest.tsv"}


def decode_stimulus_id(code: float | str) -> str:
    """Return the name of an image, or of a category if the number has no image.

    Raises
    ------
    DataError
        If it is no such number.

    Examples
    --------
    >>> decode_stimulus_id(1518878.005958)
    'n01518878_5958'
    >>> decode_stimulus_id("1621127.01902")  # the last zero is gone
    'n01621127_19020'
    >>> decode_stimulus_id(1443537.0)
    'n01443537'
    """
    finite = isinstance(code, str) or math.isfinite(code)
    # The image number is the six digits after the point.
    text = code.strip() if isinstance(code, str) else f"{code:.6f}"
    match = _CODE.fullmatch(text) if finite else None
    if match is None:
        raise DataError(
            f"the stimulus number {code!r} is not of the form 1518878.005958 (synset before the point, image after it)."
        )
    synset, image = f"n{int(match[1]):08d}", int((match[2] or "").ljust(6, "0"))
    return f"{synset}_{image}" if image else synset


def encode_stimulus_id(name: str) -> float:
    """Return the number of an ImageNet name: synset before the point, image after it.

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
            f"{name!r} is not an ImageNet name like n01518878_5958, whose image number has at most six digits."
        )
    return float(f"{int(synset[1:])}.{int(image):06d}")


def find_synset(name: str) -> str:
    """Return the synset of an image name.

    Examples
    --------
    >>> find_synset("n01518878_5958")
    'n01518878'
    """
    return name.split("_", 1)[0]


def find_list(root: Path, split: str) -> Path | None:
    """Return the stimulus list of ``train`` or ``test`` below `root` or beside the files, or None."""
    places = [root, root / "data", root / "stimuli", root.parent]
    name = STIMULUS_LISTS[split]
    return next((place / name for place in places if is_there(place / name)), None)


def read_list(path: Path) -> pd.DataFrame:
    """Read a stimulus list: `stimulus_id` (name), `concept` (synset), `code` (text), `category`, `image`.

    Raises
    ------
    DataError
        If a row's number does not decode to its name.
    """
    import pandas as pd

    table = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False)
    if table.shape[1] != 4:
        raise DataError(
            f"{path} has {table.shape[1]} columns, but a stimulus list has four: name, number, category, image."
        )
    table.columns = pd.Index(["stimulus_id", "code", "category", "image"])
    for row, (name, code) in enumerate(zip(table["stimulus_id"], table["code"], strict=True)):
        if decode_stimulus_id(code) != name:
            raise DataError(
                f"row {row + 1} of {path} calls {name} the number {code}, which stands for "
                f"{decode_stimulus_id(code)}; the list is damaged."
            )
    return table.assign(
        category=table["category"].astype(int),
        image=table["image"].astype(int),
        concept=[find_synset(name) for name in table["stimulus_id"]],
    )


def check_names(found: Sequence[str], listed: Sequence[str], *, what: str) -> CheckFinding:
    """Compare the images of a recording with the published list."""
    unknown = sorted(set(found) - set(listed))
    unseen = sorted(set(listed) - set(found))
    if unknown or unseen:
        text = f"{len(unknown)} image(s) outside the list, {len(unseen)} listed but never shown"
        return CheckFinding(what, False, f"{text}, first {(unknown or unseen)[0]}: it is another release")
    return CheckFinding(what, True, f"{len(set(found))} images, as listed")
