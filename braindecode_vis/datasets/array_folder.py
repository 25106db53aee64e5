"""The data set kind `arrays`: a folder with an array of trials, a table of them and the pictures, from any experiment.

Owns the files of such a folder. `braindecode_vis.datasets.own_data` checks their content and fills in what is missing.

::

    FOLDER/
      data.npy            trials first; or data.npz, *-epo.fif, data.nii.gz with mask.nii.gz
      trials.csv          stimulus_id or concept, and other known columns; or .tsv, .parquet
      images/             files named by id; or images.npy (grey or RGB, uint8 or floats in 0..1)
      meta.yaml           title, modality, unit, sfreq, tmin, channels, citation, licence, normalised: all optional;
                          first_id: the number of the first picture of images.npy, from which the ids are counted

A folder that `braindecode_vis.base.store.write_responses` wrote (alone, or as ``responses/`` beside ``stimuli/``) is
read unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import yaml

from braindecode_vis.base import digests, remote, store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import (
    NUMPY_ERRORS,
    BraindecodeVisError,
    DataError,
    check_finite,
    is_there,
    refuse_damage,
    suggest,
)
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    Manifest,
    RecordedSettings,
    check_level,
    find_manifest,
)
from braindecode_vis.datasets.own_data import OwnData, assemble_data, make_new_trials

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("trials.csv", "trials.tsv", "trials.parquet")
META_KEYS = (
    "title", "modality", "unit", "sfreq", "tmin", "times", "channels", "citation", "licence", "normalised", "dims",
    "first_id",
)  # fmt: skip
#: Columns that stay text when a table is read; the others are numbers where all their entries are.
_TEXT_COLUMNS = ["stimulus_id", "concept", "subject", "session", "run", "group", "split"]
MODALITIES = ("eeg", "meg", "fmri", "other")
#: What `own_data` says of arguments, in the words of a folder; applied in this order.
_IN_FILES = (
    (
        r"pass images=\.\.\. \(a folder or an array\), or labels=\.\.\. \(the class of each trial\)",
        "put pictures into images/, or the class of each trial into the column concept of the table",
    ),
    (r"labels=\.\.\.", "the column concept of the table."),
    (r"pass times / 1000", "state tmin or times in s"),
    (r"pass X\.transpose\(0, 2, 1\)", "store the trials as X.transpose(0, 2, 1)"),
    (r"\bX(?!\.)\b", "the array of trials"),
    (r"\bch_names\b", "channels"),
    (r"give dims", "name dims in meta.yaml"),
    (r"allow merging", "set dataset.same_pictures to merge"),
    (
        r"give them names with a mapping: .*dict\(enumerate\(pictures, (-?\d+)\)\) .*number -?\d+",
        r"write into meta.yaml from which number they count (first_id: \1), or put files into images/ that are named "
        "by these numbers",
    ),
    (
        r"give them names with a mapping: [^}]*}",
        "put files into images/ that are named after the values in the trials",
    ),
    (r"state what each number means: [^}]*}", "name the files by these numbers"),
)


class ArraysConfig(RecordedSettings):
    """A folder of arrays.

    Parameters
    ----------
    root
        The folder.
    images
        Folder or ``.npy`` file of the pictures, if they are elsewhere.
    same_pictures
        ``merge`` gives pictures with equal pixels one id and reports it; ``refuse`` names them and stops.
    """

    kind: Literal["arrays"] = "arrays"
    images: Path | None = None
    same_pictures: Literal["merge", "refuse"] = "merge"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images"})

    @property
    def manifest(self) -> Manifest:
        """Description of the data from ``meta.yaml``, never the text of another data set."""
        general = find_manifest("arrays")
        if self.root is None or not self.root.is_dir():
            return general
        about = read_meta(self.root)
        return general.model_copy(
            update={
                "title": str(about.get("title", self.root.resolve().name)),
                "modality": str(about.get("modality", "not stated")),
                "summary": str(about.get("normalised", "")) and f"Normalised: {about['normalised']}.",
                "citation": str(about.get("citation", "none given")),
                "licence": str(about.get("licence", "not stated")),
            }
        )

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        files = find_input_files(self._check_root(), self.images)
        return digests.digest_files(files)

    def write(self, folder: Path, *, seed: int) -> None:
        """Read the folder and write responses and stimuli below `folder`; nothing is drawn at random."""
        data = self.read()
        store.write_responses(folder / "responses", data.responses)
        store.write_stimuli(folder / "stimuli", data.stimuli)

    def read(self) -> OwnData:
        """Return the trials and pictures of the folder."""
        return read_array_folder(
            self._check_root(), images=self.images, merge_same_pictures=self.same_pictures == "merge"
        )

    def check(self) -> list[CheckFinding]:
        """Read everything, and report what was found, filled in and merged."""
        try:
            data = self.read()
        except BraindecodeVisError as error:
            return [CheckFinding("folder", False, str(error))]
        sizes = zip(data.responses.data.shape, data.responses.dims, strict=True)
        pictures = "pictures" if data.knows_images else "classes, no pictures"
        return [
            CheckFinding("data", True, " x ".join(f"{n} {dim}s" for n, dim in sizes)),
            CheckFinding("pictures", True, f"{len(data.stimuli)} {pictures}"),
            *[CheckFinding("note", True, note) for note in data.notes],
        ]

    def _check_root(self) -> Path:
        wanted = "the folder that holds data.npy and trials.csv"
        if self.root is None:
            raise DataError(f"the data set arrays needs {wanted}; pass it with --root DIR.")
        remote.refuse_address(self.root, "dataset.root")
        root = self.root.expanduser()
        if not root.is_dir():
            raise DataError(f"the root {root} is not a folder; pass {wanted} with --root.")
        check_level(root, self.manifest)
        return root


def read_array_folder(root: Path, *, images: Path | None = None, merge_same_pictures: bool = True) -> OwnData:
    """Read a folder of arrays.

    Parameters
    ----------
    root
        The folder; see the module for its files.
    images
        Folder or ``.npy`` file of the pictures, if they are not in `root`.
    merge_same_pictures
        As in `braindecode_vis.datasets.own_data.assemble_data`.

    Raises
    ------
    DataError
        If a file is missing or damaged, or the files do not fit together; the message names the file.
    """
    written = find_written(root)
    if written is not None:
        responses = store.read_responses(written)
        if (written.parent / "stimuli").is_dir() and written != root:
            return OwnData(responses, store.read_stimuli(written.parent / "stimuli"), read_meta(root))
        about = {"unit": responses.unit, **read_meta(root)}
        try:
            return assemble_data(
                responses.data, responses.trials, _name_pictures(find_pictures(root, images), about),
                dims=responses.dims, coords=responses.coords, about=about, merge_same_pictures=merge_same_pictures,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{root}: {_say_in_files(str(error))}") from error
    about = read_meta(root)
    data, given = read_data_file(find_data_file(root), root)
    table_path = next((root / name for name in TABLES if is_there(root / name)), None)
    # A table beside the data is used instead of the metadata inside it.
    table = read_trial_table(table_path) if table_path else given.pop("trials", None)
    given.pop("trials", None)
    if table is None:
        raise DataError(
            f"{root} holds no table of the trials ({', '.join(TABLES)}); write one with a row per trial and the column "
            "stimulus_id or concept (braindecode-vis new FOLDER starts it)."
        )
    try:
        pictures = _name_pictures(find_pictures(root, images), about)
        return assemble_data(
            data, table, pictures, merge_same_pictures=merge_same_pictures, **_place_axes(data, given, about),
        )  # fmt: skip
    except DataError as error:
        raise DataError(f"{root}: {_say_in_files(str(error))}") from error


def _say_in_files(message: str) -> str:
    for pattern, words in _IN_FILES:
        message = re.sub(pattern, words, message)
    return message


def _place_axes(data: np.ndarray, given: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return axes, times and channels from the file of the trials and ``meta.yaml``, and the descriptive facts."""
    given = dict(given)
    # Values that the user wrote replace those of the file.
    about = {**given.pop("about", {}), **about}
    if "channels" in about:
        given["ch_names"] = about.pop("channels")
    if "times" in about:
        given["times"] = about.pop("times")
    elif "tmin" in about and "sfreq" in about and "times" not in given:
        given["times"] = float(about["tmin"]) + np.arange(data.shape[-1]) / float(about["sfreq"])
    about.pop("tmin", None)
    if "dims" in about:
        given["dims"] = tuple(str(name) for name in about.pop("dims"))
    elif about.get("modality") == "fmri" and data.ndim == 2:
        given.setdefault("dims", ("trial", "voxel"))
    return {**given, "about": about}


def read_new_trials(path: Path) -> tuple[Responses, StimulusSet | None]:
    """Read trials to be predicted: a folder of arrays or of `store.write_responses`, or one file of trials.

    The picture of a trial may be unknown, so table and pictures may be missing. A trial without `stimulus_id` gets a
    new id; equal ids mark repetitions.

    Parameters
    ----------
    path
        The folder; or ``data.npy``, ``data.npz`` or a ``-epo.fif`` file.

    Returns
    -------
    responses
        With the column `known` (whether the picture of the trial is known), and `concept` if the table has it.
    stimuli
        The pictures, if they are in the folder.

    Raises
    ------
    DataError
        If a file is missing or damaged, or the files do not fit together.
    """
    root = path if path.is_dir() else path.parent
    written = find_written(path) if path.is_dir() else None
    if written is not None:
        responses, stimuli = store.read_responses(written), None
        if (written.parent / "stimuli").is_dir() and written != root:
            stimuli = store.read_stimuli(written.parent / "stimuli")
        check_finite(responses.data, what=str(written), row_names=np.arange(responses.n_trials), unit="trial")
        trials = responses.trials
        known = trials["known"] if "known" in trials else np.ones(len(trials), bool)
        return responses.with_trials(trials.assign(known=known)), stimuli
    file = find_data_file(root) if path.is_dir() else path
    about = read_meta(root) if path.is_dir() else {}
    data, given = read_data_file(file, root)
    table_path = next((root / name for name in TABLES if path.is_dir() and is_there(root / name)), None)
    table = read_trial_table(table_path) if table_path else given.pop("trials", None)
    given.pop("trials", None)
    pictures = _name_pictures(find_pictures(root, None), about) if path.is_dir() else None
    try:
        return make_new_trials(data, table, pictures, **_place_axes(data, given, about))
    except DataError as error:
        raise DataError(f"{path}: {_say_in_files(str(error))}") from error


def find_input_files(root: Path, images: Path | None = None) -> dict[str, Path]:
    """Return every file that is read, by a name that does not depend on the place of the folder."""
    written = find_written(root)
    if written is not None:
        files = {path.name: path for path in sorted(written.iterdir()) if path.is_file()}
        if written != root and (written.parent / "stimuli").is_dir():
            stimuli = written.parent / "stimuli"
            return files | {
                f"stimuli/{path.name}": path for path in sorted(stimuli.iterdir()) if path.is_file()
            }
    else:
        data = find_data_file(root)
        files = {data.name: data}
        names = [*TABLES, "mask.nii.gz", "mask.nii"]
        files |= {name: root / name for name in names if is_there(root / name)}
    if is_there(root / "meta.yaml"):
        files["meta.yaml"] = root / "meta.yaml"
    pictures = find_pictures(root, images)
    if pictures is not None and pictures.is_dir():
        files |= {
            f"images/{path.relative_to(pictures).as_posix()}": path
            for path in sorted(pictures.rglob("*"))
            if path.is_file()
        }
    elif pictures is not None:
        files[pictures.name] = pictures
    return files


def find_written(root: Path) -> Path | None:
    """Return the folder that `store.write_responses` wrote: the root itself or its ``responses``."""
    for folder in (root, root / "responses"):
        if all((folder / name).is_file() for name in ("data.npy", "trials.parquet", "meta.json")):
            return folder
    return None


def find_trials(root: Path) -> bool:
    """Say whether a folder holds arrays of trials, and is not the root of another data set.

    Epochs files (``-epo.fif``) do not count, since other data sets are published in them too.
    """
    names = ("data.npy", "data.npz", "data.nii.gz", "data.nii")
    return find_written(root) is not None or any((root / name).is_file() for name in names)


def find_data_file(root: Path) -> Path:
    """Return the one file of trials in a folder; `DataError` if there is none, or several."""
    fixed = [root / name for name in ("data.npy", "data.npz", "data.nii.gz", "data.nii")]
    found = [path for path in fixed if path.is_file()]
    found += sorted({*root.glob("*[-_]epo.fif"), *root.glob("*[-_]epo.fif.gz")})
    if not found:
        there = sorted(path.name for path in root.iterdir())[:6]
        raise DataError(
            f"{root} holds no data.npy, data.npz, *-epo.fif or data.nii.gz; it has {', '.join(there) or 'nothing'}."
        )
    if len(found) > 1:
        raise DataError(
            f"{root} holds {' and '.join(path.name for path in found[:3])}; keep only one of them."
        )
    return found[0]


def read_data_file(path: Path, root: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the trials, and the axes, times and channels that their file gives."""
    name = path.name
    if name.endswith((".fif", ".fif.gz")):
        import mne

        with refuse_damage(f"{path} cannot be read as MNE epochs", hint=""):
            return unpack_epochs(mne.read_epochs(remote.bring(path), preload=True, verbose="error"))
    if ".nii" in name:
        mask = next((root / name for name in ("mask.nii.gz", "mask.nii") if is_there(root / name)), None)
        if mask is None:
            raise DataError(f"{path} needs a mask on the same grid beside it: mask.nii.gz.")
        import nibabel as nib

        with refuse_damage(f"{path} or {mask.name} cannot be read as NIfTI", hint=""):
            return mask_volumes(nib.load(path), nib.load(mask))
    content = load_array(path, "a NumPy array")
    if isinstance(content, np.ndarray):
        return content, {}
    with content:
        names = list(content.files)
        key = next((k for k in ("data", "X", "x") if k in names), names[0] if len(names) == 1 else None)
        if key is None:
            raise DataError(
                f"{path} holds the arrays {', '.join(names)}; save it again with numpy.savez(..., data=...) for "
                "those of the trials."
            )
        given: dict[str, Any] = {k: content[k] for k in ("times", "ch_names") if k in names}
        return content[key], given


def unpack_epochs(epochs: Any, *, column: str | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Return data channels of `mne.Epochs` and the facts that they contain.

    Parameters
    ----------
    epochs : mne.BaseEpochs
        With metadata, or with named events.
    column
        Column of the metadata that names the picture; by default `stimulus_id` or `concept` if there is one, otherwise
        the names of the events are the classes.

    Returns
    -------
    data : float32 array of shape (n_trials, n_channels, n_times)
        In volt or tesla.
    given : dict
        `ch_names`, `times` (s), `trials` (DataFrame) and `about` (modality, unit, sfreq).
    """
    import pandas as pd

    if not (hasattr(epochs, "events") and hasattr(epochs, "get_data")):
        raise DataError(
            f"from_epochs takes mne.Epochs, not {type(epochs).__name__}; arrays go to from_arrays."
        )
    try:
        picked = epochs.copy().pick("data")
    except ValueError as error:
        raise DataError(f"the epochs hold no EEG or MEG channel ({error}).") from error
    kinds = set(picked.get_channel_types())
    modality = "meg" if kinds & {"mag", "grad"} else "eeg"
    if column is not None and (epochs.metadata is None or column not in epochs.metadata):
        has = (
            "no metadata" if epochs.metadata is None else f"the columns {', '.join(epochs.metadata.columns)}"
        )
        raise DataError(f"the epochs have {has}; column={column!r} must be one of the metadata.")
    if epochs.metadata is not None:
        trials = epochs.metadata.reset_index(drop=True)
        if column is not None:
            # The requested column is used before one that happens to have the name.
            others = (
                trials.drop(columns="stimulus_id", errors="ignore") if column != "stimulus_id" else trials
            )
            trials = others.rename(columns={column: "stimulus_id"})
    else:
        trials = pd.DataFrame(index=range(len(epochs)))
    if "stimulus_id" not in trials and "concept" not in trials:
        name_of = {code: name for name, code in epochs.event_id.items()}
        trials = trials.assign(concept=[name_of[code] for code in epochs.events[:, 2]])
    given: dict[str, Any] = {
        "ch_names": list(picked.ch_names),
        "times": np.asarray(picked.times),
        "trials": trials,
        "about": {
            "modality": modality, "unit": "tesla" if modality == "meg" else "volt",
            "sfreq": float(epochs.info["sfreq"]),
        },
    }  # fmt: skip
    return picked.get_data(copy=False).astype(np.float32), given


def mask_volumes(betas_img: Any, mask_img: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the voxels of one volume per trial inside a mask.

    Parameters
    ----------
    betas_img : nibabel image of shape (x, y, z, n_trials)
    mask_img : nibabel image of shape (x, y, z)
        On the same grid.

    Returns
    -------
    data : float32 array of shape (n_trials, n_voxels)
    given : dict
        Axes and coordinates of the responses, with the mask and its affine.
    """
    for what, image in (("betas_img", betas_img), ("mask_img", mask_img)):
        if type(image).__name__ in ("GiftiImage", "Cifti2Image", "SurfaceImage"):
            raise DataError(
                f"{what} is on a surface ({type(image).__name__}), but from_nifti takes volumes; stack the vertices "
                'of all trials into an array and pass from_arrays(X, modality="fmri") of shape (n_trials, n_vertices).'
            )
        if not hasattr(image, "dataobj"):
            raise DataError(f"{what} must be a NIfTI image or its path, not {type(image).__name__}.")
    if int(np.prod(mask_img.shape)) != int(np.prod(mask_img.shape[:3])):
        raise DataError(f"mask_img has the shape {mask_img.shape}; expected one volume, (x, y, z).")
    if len(betas_img.shape) != 4:
        raise DataError(f"the volumes have the shape {betas_img.shape}; expected (x, y, z, n_trials).")
    if tuple(betas_img.shape[:3]) != tuple(mask_img.shape[:3]) or not np.allclose(
        betas_img.affine, mask_img.affine, atol=1e-3
    ):
        raise DataError(
            f"the mask ({mask_img.shape}) has another grid than the volumes ({betas_img.shape[:3]}, or another "
            "affine); resample it first, for example with nilearn.image.resample_to_img."
        )
    inside = np.asarray(mask_img.dataobj).reshape(mask_img.shape[:3]) > 0
    if not inside.any():
        name = mask_img.get_filename() if hasattr(mask_img, "get_filename") else None
        raise DataError(
            f"the mask{f' {name}' if name else ''} is empty: no voxel is above 0; give another one."
        )
    n_trials = betas_img.shape[3]
    data = np.empty((n_trials, int(inside.sum())), np.float32)
    for trial in range(n_trials):  # a volume at a time: the whole image may not fit into memory
        data[trial] = np.asarray(betas_img.dataobj[..., trial])[inside]
    coords = {
        "mask": inside,
        "affine": np.asarray(mask_img.affine),
        "voxel_id": np.flatnonzero(inside.ravel()),
    }
    return data, {"dims": ("trial", "voxel"), "coords": coords, "about": {"modality": "fmri"}}


def read_trial_table(path: Path) -> pd.DataFrame:
    """Return a table of trials from CSV, TSV or parquet, ids as text."""
    import pandas as pd

    with refuse_damage(f"{path} cannot be read as a table", OSError, ValueError, UnicodeDecodeError, hint=""):
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if not path.read_text(encoding="utf-8-sig").strip():
            raise DataError(
                f"{path} is empty; write a row per trial, with the column stimulus_id or concept."
            )
        # Everything stays text: as a number, an id like 007 would lose its zeros.
        header = path.read_text(encoding="utf-8-sig").split("\n", 1)[0]
        separator = (
            "\t" if path.suffix == ".tsv" else ("," if header.count(",") >= header.count(";") else ";")
        )
        names = [name.strip().strip('"') for name in header.split(separator)]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise DataError(f"{path} has the column {twice[0]!r} more than once; keep one of them.")
        table = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig", skipinitialspace=True)
    for name in table.columns.difference(_TEXT_COLUMNS):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if numbers.notna().eq(table[name].notna()).all():
            table[name] = numbers
    if "repetition" in table:
        table["repetition"] = table["repetition"].fillna(0).astype(int)
    return table


def read_meta(root: Path) -> dict[str, Any]:
    """Return the content of ``meta.yaml``; an empty mapping if there is none.

    Raises
    ------
    DataError
        If it is not a mapping, or has an unknown key.
    """
    path = root / "meta.yaml"
    if not is_there(path):
        return {}
    with refuse_damage(f"{path} is not valid YAML", yaml.YAMLError, ValueError, OSError, hint=""):
        content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a mapping of names to values.")
    unknown = [str(key) for key in content if key not in META_KEYS]
    if unknown:
        raise DataError(
            f"{path} names {unknown[0]!r}, which is not a known key{suggest(unknown[0], META_KEYS)}; known: "
            f"{', '.join(META_KEYS)}."
        )
    if content.get("modality") not in (None, *MODALITIES):
        raise DataError(
            f"{path}: modality is {content['modality']!r}, but must be one of {', '.join(MODALITIES)}."
        )
    first = content.get("first_id", 0)
    if isinstance(first, bool) or not isinstance(first, int):
        raise DataError(
            f"{path}: first_id must be a whole number, the id of the first picture, not {first!r}."
        )
    for key in ("sfreq", "tmin"):
        if key in content and not isinstance(content[key], int | float):
            raise DataError(f"{path}: {key} must be a number, not {content[key]!r}.")
    return {key: value for key, value in content.items() if value is not None}


def find_pictures(root: Path, images: Path | None) -> Path | None:
    """Return the folder or the ``.npy`` file of the pictures; None if there is none."""
    if images is not None:
        path = images.expanduser()
        if not path.exists():
            raise DataError(f"dataset.images is {path}, which does not exist.")
        return path
    return next((root / name for name in ("images", "images.npy") if (root / name).exists()), None)


def read_pictures(path: Path | None) -> Any:
    """Return pictures in a form that `assemble_data` takes: the path of a folder, or a memory map of a file."""
    if path is None or path.is_dir():
        return path
    pictures = load_array(path, "an array of pictures")
    black = [row for row, picture in enumerate(pictures) if not picture.any()] if pictures.ndim > 1 else []
    if len(black) > 1:  # one may be meant
        raise DataError(
            f"{len(black)} of {len(pictures)} pictures in {path} are black throughout, from picture {black[0]} on: a "
            "part of the file was overwritten; write it again."
        )
    return pictures


def _name_pictures(path: Path | None, about: dict[str, Any]) -> Any:
    """Return pictures, those of an array with ids from ``first_id`` of ``meta.yaml``, and remove that key."""
    pictures, first = read_pictures(path), about.pop("first_id", None)
    if first is None or pictures is None or isinstance(pictures, Path):
        return pictures
    return dict(enumerate(pictures, first))


def load_array(path: Path, what: str) -> Any:
    """Return the content of a ``.npy`` or ``.npz`` file, as a memory map if possible; objects are refused.

    Parameters
    ----------
    path
        The file.
    what
        What it should be, for the message.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, *NUMPY_ERRORS) as error:
        # NumPy's own message mentions pickle for any unknown file, and advises to allow it.
        reason = (
            "it is empty" if not path.stat().st_size else "it is damaged, of another format, or holds objects"
        )
        raise DataError(
            f"{path} cannot be read as {what} ({reason}); write it with numpy.save, as numbers."
        ) from error
