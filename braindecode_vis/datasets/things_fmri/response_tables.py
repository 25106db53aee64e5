"""The betas of THINGS-fMRI: the response table with the tables that describe it, or one volume per trial.

Owns reading the table, a pandas HDF frame of voxels by trials, without PyTables: pandas keeps numbers of one type in
one matrix (a block), so the block that has one column per trial is read in place, a few columns at a time. Column
labels are a pickle in the file and are not opened: the order of the trials is that of ``StimulusMetadata.csv``, as
published.

Also owns the pairing of volumes with ``*_conditions.tsv``. The conditions do not mark test images: these are shown in
every session, training images in one. If only one session is available, the number in the name is used, since training
images are the first twelve of their concept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import DataError, check_file, check_unique, refuse_damage
from braindecode_vis.datasets.bids.fmri_files import parse_entities
from braindecode_vis.datasets.layout import File, Layout
from braindecode_vis.datasets.sources.betas_source import Geometry, Roi
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, read_volume
from braindecode_vis.datasets.sources.safe_pickle import FileArray

if TYPE_CHECKING:
    import pandas as pd

# In the file, the values of one trial are one row apart, so reading one trial takes as long as reading many.
_CACHE_BYTES = 128 << 20
_NOT_REGIONS = ("voxel_id", "subject_id", "voxel_x", "voxel_y", "voxel_z")
_MAP_PREFIXES = ("nc_", "splithalf", "prf-")
TABLES, VOLUMES, MASKS = "betas_csv", "betas_vol", "brainmasks"
"""Folders of the three kinds of files."""
_FETCH = "fetch it from figshare+ (20492835)"
_RUN = "sub-{subject}/ses-things{session}/sub-{subject}_ses-things{session}_task-things_run-{run}"
LAYOUT = Layout(
    # Below `TABLES`, or together in another folder.
    responses=File("sub-{subject}_ResponseData.h5", "other", "ResponseData.h5", _FETCH),
    stimuli=File(
        "sub-{subject}_StimulusMetadata.csv", "csv", "StimulusMetadata.csv", _FETCH,
        columns=("trial_type", "session", "run", "stimulus", "concept"),
    ),
    voxels=File("sub-{subject}_VoxelMetadata.csv", "csv", "VoxelMetadata.csv", _FETCH, columns=_NOT_REGIONS),
    # Below `VOLUMES` and `MASKS`.
    betas=File(_RUN + "_betas.nii.gz", "other", "a volume of betas", _FETCH),
    conditions=File(
        _RUN + "_conditions.tsv", "tsv", "the conditions of a run", "fetch them with the betas",
        columns=("image_filename",),
    ),
    mask=File("sub-{subject}_space-T1w_brainmask.nii.gz", "other", "the brain mask", _FETCH),
)  # fmt: skip
_GLASSER = "glasser-"


def find_table_files(root: Path, subject: str) -> list[Path]:
    """Return the response table of a subject, and the tables of its trials and of its voxels."""
    folder = root / TABLES if (root / TABLES).is_dir() else root
    return [LAYOUT.find(folder, name, subject=subject) for name in ("responses", "stimuli", "voxels")]


def find_concept(stimulus: str) -> str:
    """Return the concept in the name of a THINGS image; folder names of two words are shortened.

    Examples
    --------
    >>> find_concept("coat_rack_13s")
    'coat_rack'
    """
    return re.sub(r"_\d+[a-z]*$", "", stimulus)


def read_table_trials(path: Path, subject: str) -> pd.DataFrame:
    """Return one row per column of the response table: the trial table, and `column`.

    Raises
    ------
    DataError
        If a column is missing, or names and concepts are shifted against each other.
    """
    import pandas as pd

    stimuli = LAYOUT.read_table(path, "stimuli", dtype=str, keep_default_na=False)
    unknown = sorted(set(stimuli["trial_type"]) - {"train", "test"})
    if unknown:
        raise DataError(
            f"{path} has trials of the type {unknown[0]!r}; train and test are known, and catch trials are not part of "
            "the table."
        )
    ids = stimuli["stimulus"].str.replace(r"\.[A-Za-z]+$", "", regex=True)
    concepts = ids.map(find_concept)
    wrong = int((concepts != stimuli["concept"]).sum())
    # Folder names of two words are shortened, which affects a few per cent of the rows.
    if wrong > 0.05 * len(stimuli):
        row = int(np.flatnonzero(concepts != stimuli["concept"])[0])
        raise DataError(
            f"{path} pairs {ids.iloc[row]} with the concept {stimuli['concept'].iloc[row]!r} ({wrong} of "
            f"{len(stimuli)} such pairs): its columns are shifted against each other."
        )
    return pd.DataFrame(
        {
            "subject": subject,
            "session": [f"{int(float(number)):02d}" for number in stimuli["session"]],
            "run": [f"{int(float(number)):02d}" for number in stimuli["run"]],
            "stimulus_id": ids, "repetition": 0, "split": stimuli["trial_type"], "concept": concepts,
            "column": np.arange(len(stimuli)),
        }
    )  # fmt: skip


def read_voxels(path: Path) -> pd.DataFrame:
    """Return the voxel table; `voxel_id` is unique and positions are whole numbers."""
    voxels = LAYOUT.read_table(path, "voxels")
    check_unique(voxels["voxel_id"].tolist(), what=f"voxel_id in {path}")
    positions = voxels[["voxel_x", "voxel_y", "voxel_z"]].to_numpy(float)
    if not np.array_equal(positions, np.rint(positions)) or (positions < 0).any():
        raise DataError(
            f"{path} has positions that are not voxel indices (whole numbers from 0); it is another release."
        )
    return voxels


def find_regions(voxels: pd.DataFrame, path: Path) -> list[str]:
    """Return the columns that flag regions with 0 and 1."""
    import pandas as pd

    names = [
        str(name)
        for name in voxels.columns
        if name not in _NOT_REGIONS and not str(name).startswith(_MAP_PREFIXES)
    ]
    for name in names:
        values = pd.to_numeric(voxels[name], errors="coerce")
        if not values.isin([0, 1]).all():
            raise DataError(
                f"the column {name!r} of {path} should flag a region with 0 and 1, but holds other values."
            )
    return names


def place_voxels(voxels: pd.DataFrame, mask_path: Path | None, where: Path) -> tuple[Geometry, np.ndarray]:
    """Return the geometry of the voxels, and their rows in its order.

    Parameters
    ----------
    voxels
        Rows of the voxel table.
    mask_path
        Brain mask, which gives the grid; without it the indices are kept as the maps `voxel_x`, `voxel_y`, `voxel_z`.
    where
        The voxel table, for messages.
    """
    indices = voxels[["voxel_x", "voxel_y", "voxel_z"]].to_numpy(int)
    order = np.arange(len(voxels))
    ids, mask, affine = voxels["voxel_id"].to_numpy(), None, None
    if mask_path is not None:
        brain, affine = read_volume(mask_path)
        inside = np.all(indices < np.array(brain.shape), axis=1)
        inside[inside] = brain[tuple(indices[inside].T)] > 0
        if not inside.all():
            raise DataError(
                f"{int((~inside).sum())} of {len(inside)} voxels of {where} are outside "
                f"{mask_path.name}: they are from different subjects."
            )
        ids = np.ravel_multi_index(tuple(indices.T), brain.shape)
        check_unique(ids.tolist(), what=f"voxel positions in {where}")
        order = np.argsort(ids)
        ids = ids[order]
        mask = np.zeros(brain.shape, bool)
        mask.ravel()[ids] = True
    table = voxels.iloc[order]
    maps = {}
    for name in map(str, table.columns):
        if name.startswith(_MAP_PREFIXES):
            with refuse_damage(f"{where} has a cell in the column {name!r} that is not a number", ValueError):
                maps[_clean_name(name)] = table[name].to_numpy(float)
    if mask is None:
        maps |= {f"voxel_{axis}": indices[:, n].astype(float) for n, axis in enumerate("xyz")}
    return Geometry(ids, mask, affine, _make_rois(table, where), maps=maps), order


def _make_rois(table: pd.DataFrame, where: Path) -> dict[str, Roi]:
    """Return one set per region; the parcellation of Glasser et al. is disjoint and becomes one set."""
    names = find_regions(table, where)
    glasser = [name for name in names if name.startswith(_GLASSER)]
    rois = {}
    flags = table[glasser].to_numpy(float) == 1
    if glasser and (flags.sum(axis=1) <= 1).all():
        labels = np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, 0)
        rois["glasser"] = Roi(labels, {n + 1: name.removeprefix(_GLASSER) for n, name in enumerate(glasser)})
        names = [name for name in names if name not in glasser]
    for name in names:
        rois[_clean_name(name)] = Roi((table[name].to_numpy(float) == 1).astype(np.int16), {1: name})
    return rois


def _clean_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")


@dataclass(frozen=True)
class ResponseTable:
    """The matrix of voxels by trials in an HDF file.

    Parameters
    ----------
    path, key
        File, and the block of numbers in it.
    first_column
        Column of the first trial.
    voxel_ids
        Number of the voxel of each row.
    contiguous
        The block as a part of the file, if it is neither compressed nor stored in chunks.
    """

    path: Path
    key: str
    first_column: int
    voxel_ids: np.ndarray
    contiguous: FileArray | None

    def find_rows(self, voxel_ids: np.ndarray) -> np.ndarray:
        """Return the row of each voxel.

        Raises
        ------
        DataError
            If the table does not have the same voxels, or lists a voxel twice.
        """
        import pandas as pd

        known = pd.Index(self.voxel_ids)
        if not known.is_unique:
            # If a trial is missing in the list, responses are read as numbers of voxels.
            raise DataError(
                f"{self.path} names the voxel {known[known.duplicated()][0]} twice, or has a column more than "
                "StimulusMetadata.csv has trials; take all tables from the same release."
            )
        rows = known.get_indexer(pd.Index(voxel_ids))
        if len(voxel_ids) != len(self.voxel_ids) or (rows < 0).any():
            raise DataError(
                f"{self.path} has {len(self.voxel_ids)} voxels, of which the {len(voxel_ids)} of VoxelMetadata.csv "
                f"name {int((rows >= 0).sum())}; take both tables from the same release."
            )
        return rows

    def read(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return trials `start` to `stop` of some voxels, float32 of shape (len(rows), stop - start)."""
        start, stop = start + self.first_column, stop + self.first_column
        if self.contiguous is not None:
            return self.contiguous.read_columns(rows, start, stop).astype(np.float32, copy=False)
        import h5py

        with h5py.File(self.path) as file:
            return np.asarray(file[self.key][:, start:stop])[rows].astype(np.float32)


def open_response_table(path: Path, *, n_trials: int) -> ResponseTable:
    """Find the responses in a pandas HDF file.

    Parameters
    ----------
    n_trials
        Number of trials in the stimulus table.

    Raises
    ------
    DataError
        If the file does not contain such a frame, or has another number of trials.
    """
    import h5py

    with (
        refuse_damage(f"{path} cannot be read as HDF5", OSError, hint="it is damaged or truncated"),
        h5py.File(path) as file,
    ):
        frame = _find_frame(file, path)
        blocks = {key: frame[key] for key in frame if re.fullmatch(r"block\d+_values", key)}
        # pandas may store the column voxel_id in the block of the responses or in a separate block.
        for key, block in blocks.items():
            if block.dtype.kind == "f" and block.ndim == 2 and block.shape[1] - n_trials in (0, 1):
                return _describe(path, frame, key, block.shape[1] - n_trials)
        shapes = ", ".join(f"{key} {block.shape}" for key, block in blocks.items())
    raise DataError(
        f"{path} has the matrices {shapes or 'none'}, but StimulusMetadata.csv lists {n_trials} trials, one of which "
        "belongs to each column; catch trials are in neither. Take both from the same release."
    )


def _find_frame(file: Any, path: Path) -> Any:
    frames = [file[key] for key in file if isinstance(file[key], type(file["/"]))]
    fixed = [frame for frame in frames if any(key.startswith("block0_") for key in frame)]
    if not fixed:
        raise DataError(
            f"{path} holds {', '.join(file) or 'nothing'}, but not a pandas frame in the fixed format; "
            "fetch the published "
            "ResponseData.h5."
        )
    return fixed[0]


def _describe(path: Path, frame: Any, key: str, first_column: int) -> ResponseTable:
    block = frame[key]
    if first_column:
        ids = block[:, 0]
    else:
        others = [frame[k] for k in frame if re.fullmatch(r"block\d+_values", k) and k != key]
        single = [other for other in others if other.shape == (len(block), 1)]
        if len(single) != 1:
            raise DataError(f"{path} has no column voxel_id beside its responses; fetch the published file.")
        ids = single[0][:, 0]
    check_unique(np.asarray(ids).tolist(), what=f"voxel_id in {path}")
    offset = block.id.get_offset() if block.chunks is None else None
    contiguous = None if offset is None else FileArray(path, int(offset), block.shape, block.dtype)
    return ResponseTable(path, block.name, first_column, np.asarray(ids).astype(np.int64), contiguous)


@dataclass
class TableReader:
    """Reads trials of a response table, more than requested: the values of a trial are far apart in the file.

    Parameters
    ----------
    table
        The response table.
    rows
        Rows of the voxels, in the order of the geometry.
    columns
        Columns of the trials, ascending.
    """

    table: ResponseTable
    rows: np.ndarray
    columns: np.ndarray
    held: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return trials as float32 of shape (stop - start, n_voxels)."""
        first, last = int(self.columns[start]), int(self.columns[stop - 1]) + 1
        if self.held is None or first < self.held[0] or last > self.held[0] + self.held[1].shape[1]:
            # As many trials as fit into the buffer, since each read passes over all rows.
            n = max(last - first, _CACHE_BYTES // (4 * len(self.rows)))
            end = max(last, min(first + n, int(self.columns[-1]) + 1))
            self.held = (first, self.table.read(self.rows, first, end))
        offset, values = self.held
        block = np.ascontiguousarray(values[:, self.columns[start:stop] - offset].T)
        if stop == len(self.columns):
            self.held = None
        return block


_CATCH = re.compile(r"^catch", re.IGNORECASE)
_NUMBER = re.compile(r"_(\d+)[a-z]*$")
# Hebart et al. (2023): twelve pictures of each of 720 concepts.
N_TRAINING_EXEMPLARS = 12


def read_volume_runs(folder: Path, subject: str) -> dict[Path, pd.DataFrame]:
    """Return the trials of every run of a subject, in the order of the volumes.

    Returns
    -------
    runs
        Table of the trials of each file of betas, with `column` (number of the volume). Catch trials have an
        empty `stimulus_id`.

    Raises
    ------
    DataError
        If there is no run, or conditions of a run are missing.
    """
    import pandas as pd

    paths = sorted(folder.rglob("*_betas.nii.gz")) or sorted(folder.rglob("*_betas.nii"))
    if not paths:
        raise DataError(f"{folder} holds no *_betas.nii.gz; fetch the volumes of subject {subject} again.")
    runs = {path: _read_conditions(path, subject) for path in paths}
    tested = find_tested(pd.concat(list(runs.values()), ignore_index=True))
    for table in runs.values():
        table["split"] = np.where(table["stimulus_id"].isin(tested), "test", "train")
    return runs


def name_conditions(path: Path) -> Path:
    """Return the conditions of a file of betas."""
    return path.with_name(re.sub(r"betas\.nii(\.gz)?$", "conditions.tsv", path.name))


def _read_conditions(path: Path, subject: str) -> pd.DataFrame:
    import pandas as pd

    conditions = check_file(
        name_conditions(path), what=f"the conditions of {path.name}", hint=LAYOUT.files["conditions"].hint
    )
    table = LAYOUT.read_table(conditions, "conditions", dtype=str, keep_default_na=False)
    entities = parse_entities(path.name)
    digits = re.sub(r"\D", "", entities.get("ses", ""))
    if not digits or "run" not in entities:
        raise DataError(f"{path.name} does not contain its session and run; restore the published name.")
    names = table["image_filename"].str.replace(r"^.*[/\\]", "", regex=True)
    names = names.str.replace(r"\.[A-Za-z]+$", "", regex=True)
    # Catch trials have a beta too, so they keep their rows until volumes are paired.
    ids = names.where(~names.str.match(_CATCH), "")
    return pd.DataFrame(
        {
            "subject": subject, "session": f"{int(digits):02d}", "run": f"{int(entities['run']):02d}",
            "stimulus_id": ids, "repetition": 0, "split": "train", "concept": ids.map(find_concept),
            "column": np.arange(len(ids)),
        }
    )  # fmt: skip


def find_tested(trials: pd.DataFrame) -> set[str]:
    """Return the test images among the trials of one subject."""
    shown = trials[trials["stimulus_id"] != ""]
    if shown["session"].nunique() > 1:
        counts = shown.groupby("stimulus_id")["session"].nunique()
        return set(counts.index[counts > 1])
    numbers = {name: match for name in shown["stimulus_id"] if (match := _NUMBER.search(name))}
    return {name for name, match in numbers.items() if int(match[1]) > N_TRAINING_EXEMPLARS}


@dataclass(frozen=True)
class VolumeReader:
    """Reads the volumes of the trials of a run, without the catch trials between them.

    Parameters
    ----------
    volumes
        The file, through the mask.
    columns
        Volumes to return, ascending.
    """

    volumes: MaskedVolumes
    columns: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Return trials as float32 of shape (stop - start, n_voxels)."""
        out = np.empty((stop - start, self.volumes.n_voxels), np.float32)
        for row, column in enumerate(self.columns[start:stop].tolist()):
            out[row] = self.volumes(column, column + 1)[0]
        if stop == len(self.columns):
            self.volumes.close()
        return out
