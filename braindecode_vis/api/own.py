"""Input of the public interface: arrays, MNE epochs, NIfTI volumes, and every known data set by its name.

Only converts user input into `Data`. The checks of the data are in `braindecode_vis.datasets.own_data`; each public
data set is described in its own module.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError, check_option, for_python
from braindecode_vis.base.contracts import Dataset
from braindecode_vis.base.registry import list_kinds
from braindecode_vis.base.remote import as_path
from braindecode_vis.base.stimuli import StimulusSet, hash_pixels, read_image_file
from braindecode_vis.datasets.array_folder import MODALITIES, ArraysConfig, mask_volumes, unpack_epochs
from braindecode_vis.datasets.own_data import OwnData, Pictures, as_uint8_rgb, assemble_data, number_pictures
from braindecode_vis.encoders.plain_module import describe_module, is_module

if TYPE_CHECKING:
    import mne
    import xarray as xr

#: Arguments of `from_arrays` and its siblings that become a column of the trial table.
_COLUMNS = ("subject", "session", "run", "group", "split", "repetition")


#: What `Data.save` writes.
_SAVED = ("responses", "stimuli", "meta.yaml")

#: The generator that shows what a target can: inverted latents where the target is itself an image or its components.
GENERATORS = {
    "pixels": "latents",
    "pca": "latents",
    "vae": "latents",
    "taesd": "latents",
    "packaged_latents": "latents",
}


@for_python
class Data:
    """Trials of brain responses and the pictures that were shown, ready for `decode`.

    Made by `from_arrays`, `from_epochs`, `from_nifti` and `load`, not by hand.
    """

    def __init__(self, held: OwnData | None, settings: Any = None, *, verbose: bool = True) -> None:
        self._held, self._settings, self._verbose = held, settings, verbose

    @cached_property
    def _read(self) -> tuple[Responses, StimulusSet]:
        if self._held is not None:
            return self._held.responses, self._held.stimuli
        from braindecode_vis.pipeline.preparing import read_dataset, write_dataset
        from braindecode_vis.pipeline.progress import find_listener

        # What is read are memory maps, so the folder stays for as long as this object does.
        folder = Path(tempfile.mkdtemp(prefix="braindecode-vis-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        write_dataset(self._settings, folder, seed=0, listener=find_listener(verbose=self._verbose))
        return read_dataset(folder)

    @property
    def responses(self) -> Responses:
        """Trials with their table, axes and unit; a known data set is preprocessed on first use."""
        return self._read[0]

    @property
    def stimuli(self) -> StimulusSet:
        """The pictures, one row per picture; without pixels if only classes are known."""
        return self._read[1]

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial: subject, session, run, stimulus_id, repetition, split, and columns of the user."""
        return self.responses.trials

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on values that were filled in, merged or found, one sentence each."""
        return () if self._held is None else self._held.notes

    @property
    def knows_images(self) -> bool:
        """Whether pictures are available; otherwise only classes can be decoded."""
        return self.stimuli.knows_images

    def save(self, folder: str | Path) -> Path:
        """Write a folder that the data set kind `arrays` reads, and return its path.

        Parameters
        ----------
        folder
            Created if it does not exist. Data that were saved there before are replaced; a folder with any other files
            is refused.
        """
        path = Path(folder).expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise DataError(f"{path} is a file; name a folder.")
        # A folder with anything of the user's own is not written into.
        others = [entry.name for entry in path.iterdir() if entry.name not in _SAVED] if path.is_dir() else []
        if others:
            raise DataError(f"{path} holds other files ({others[0]}); choose another folder.")
        store.write_responses(path / "responses", self.responses)
        store.write_stimuli(path / "stimuli", self.stimuli)
        if self._about:
            self._write_about(path, self._about)
        return path

    def as_settings(self, folder: Path) -> Any:
        """Return settings of the data set for a run; data in memory will be written into `folder`."""
        return ArraysConfig(root=folder) if self._settings is None else self._settings

    def write_for_run(self, folder: Path) -> None:
        """Write data in memory into the folder that a run reads, unless the same data are there."""
        if self._settings is not None:
            return
        if not self.are_in(folder):
            self.save(folder)
        # The name of a folder that the user never saw is no title.
        self._write_about(folder, {"title": "arrays in memory", **self._about})

    def are_in(self, folder: Path) -> bool:
        """Whether a folder that `save` wrote holds these trials and pictures."""
        try:
            responses = store.read_responses(folder / "responses")
            stimuli = store.read_stimuli(folder / "stimuli")
        except (OSError, DataError, KeyError, ValueError):  # missing, or cut off in the middle
            return False
        ours, theirs = self.responses, responses
        return (
            ours.dims == theirs.dims
            and ours.unit == theirs.unit
            and ours.trials.astype(str).equals(theirs.trials.astype(str))
            and self.stimuli.table.astype(str).equals(stimuli.table.astype(str))
            and _have_same_coords(ours.coords, theirs.coords)
            # Last, since it may read gigabytes.
            and _are_same_numbers(np.asarray(ours.data), theirs.data)
        )

    @property
    def _about(self) -> dict[str, Any]:
        about = {} if self._held is None else self._held.about
        return {key: value for key, value in about.items() if isinstance(value, str | int | float)}

    @staticmethod
    def _write_about(folder: Path, about: dict[str, Any]) -> None:
        import yaml

        (folder / "meta.yaml").write_text(yaml.safe_dump(about, allow_unicode=True, sort_keys=False))

    def to_xarray(self) -> xr.Dataset:
        """Return the trials as a data set of xarray: ``responses``, with the trial table and all axes as coordinates.

        Examples
        --------
        >>> data = from_arrays(np.random.default_rng(0).normal(size=(6, 4)), labels=list("aabbcc"))
        >>> dict(data.to_xarray().sizes)
        {'trial': 6, 'feature': 4}
        """
        from braindecode_vis.api.exports import responses_to_xarray

        return responses_to_xarray(self.responses, self._describe())

    def to_epochs(self) -> mne.EpochsArray:
        """Return trials of channels and times as MNE epochs, the trial table as their metadata.

        Microvolts and femtotesla become V and T; other units keep their numbers, which MNE shows as V.
        """
        from braindecode_vis.api.exports import responses_to_epochs

        return responses_to_epochs(self.responses, self._describe())

    def to_nifti(self, subject: str | None = None) -> Any:
        """Return trials of voxels as a NIfTI image, one volume per trial.

        Parameters
        ----------
        subject
            Whose trials; needed where every subject has a mask of its own.
        """
        from braindecode_vis.api.exports import responses_to_nifti

        return responses_to_nifti(self.responses, subject)

    def export(self, out: str | Path, *, to: str, subject: str | None = None) -> Path:
        """Write the trials for other tools, and return the path.

        Parameters
        ----------
        out
            A file or folder that does not exist yet.
        to
            ``netcdf``, ``zarr``, ``fif`` (MNE epochs), ``nifti``, ``bids`` (a folder of derivatives), ``csv`` or
            ``parquet``.
        subject
            Only this subject's trials.

        Raises
        ------
        ConfigError, DataError
            If the path exists, or these trials cannot be written in this format.
        """
        from braindecode_vis.api.exports import export_responses

        return export_responses(self.responses, to, out, about=self._describe(), subject=subject)

    def _describe(self) -> dict[str, str]:
        """Return title, modality, citation and licence, if they are known."""
        names = ("title", "modality", "citation", "licence")
        if self._held is not None:
            return {name: str(self._held.about[name]) for name in names if name in self._held.about}
        from braindecode_vis.base import roles

        manifest = roles.complete(Dataset, self._settings).manifest
        return {} if manifest is None else {name: str(getattr(manifest, name)) for name in names}

    def _repr_html_(self) -> str:
        """Show what the data hold, four of the pictures, and notes; a data set that was not read yet stays unread."""
        from braindecode_vis.report import notebook

        if self._held is None and "_read" not in self.__dict__:
            return notebook.show_sentences([repr(self)])
        responses, stimuli, trials = self.responses, self.stimuli, self.trials
        sizes = zip(responses.data.shape, responses.dims, strict=True)
        subjects = trials["subject"].astype(str).unique()
        facts = {
            "trials": " x ".join(f"{n} {dim}s" for n, dim in sizes),
            "unit": responses.unit,
            "pictures" if self.knows_images else "classes": len(stimuli),
            "trials per picture" if self.knows_images else "trials per class": _describe_range(
                trials["stimulus_id" if self.knows_images else "concept"].value_counts()
            ),
            "subjects": f"{len(subjects)} ({', '.join(subjects[:5])}{', ...' if len(subjects) > 5 else ''})",
            "split": _describe_split(trials),
            **{name: value for name, value in self._describe().items() if value},
        }
        pictures = ""
        if stimuli.has_pixels:
            names = [str(name) for name in stimuli.ids[: notebook.N_PICTURES]]
            shown = {"picture": [stimuli.read_image(name) for name in names]}
            pictures = notebook.show_pictures(
                names, shown, f"The first {len(names)} of {len(stimuli)} pictures."
            )
        return notebook.show_facts(facts) + pictures + notebook.show_sentences(self.notes, label="note")

    def __repr__(self) -> str:
        if self._held is None and "_read" not in self.__dict__:
            return f"<Data: {self._settings.kind}, not read yet>"
        sizes = zip(self.responses.data.shape, self.responses.dims, strict=True)
        shape = " x ".join(f"{n} {dim}s" for n, dim in sizes)
        shown = "pictures" if self.knows_images else "classes"
        return f"<Data: {shape}, {len(self.stimuli)} {shown}, {self.trials['subject'].nunique()} subject(s)>"


@for_python
def from_arrays(
    X: Any,
    *,
    images: Pictures | None = None,
    shown: Sequence[Any] | np.ndarray | None = None,
    labels: Sequence[Any] | np.ndarray | None = None,
    subject: Any = None,
    session: Any = None,
    run: Any = None,
    group: Any = None,
    split: Any = None,
    repetition: Any = None,
    trials: pd.DataFrame | Mapping[str, Sequence[Any]] | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    ch_names: Sequence[str] | None = None,
    mask_img: Any = None,
    dims: tuple[str, ...] | None = None,
    title: str | None = None,
    unit: str | None = None,
    modality: str | None = None,
    citation: str | None = None,
    same_pictures: str = "merge",
) -> Data:
    """Take trials as an array, with the pictures that were shown or the class of each trial.

    Parameters
    ----------
    X : array of shape (n_trials, n_features) or (n_trials, n_channels, n_times)
        One row per trial: voxels, sensors, or channels x times. Not copied.
    images
        The pictures: an array of shape (n_pictures, height, width) or (n_pictures, height, width, 3), uint8 or floats
        in 0..1; a folder of image files; a sequence of paths; or a mapping of id to picture. With None, only classes
        can be decoded.
    shown : sequence of length n_trials, optional
        Which picture each trial showed: its file name, its id, or, for an array of pictures, its index from 0, if
        every index occurs. Other numbers, such as event codes, need a mapping: ``images={1: "a.png", ...}``, or
        ``images=dict(enumerate(pictures, 1))`` where they count from 1. May be left out if there is one picture per
        trial.
    labels : sequence of length n_trials, optional
        Class of each trial, for example ``face``.
    subject, session, run, group : scalar or sequence of length n_trials, optional
        Where each trial comes from; ``01`` by default. A group holds trials that belong together in another way (a
        block, a day): splits can keep groups together, and intervals resample groups.
    split : sequence of ``train`` and ``test``, optional
        The experiment's own split; used by ``split="published"``.
    repetition : sequence of int, optional
        Number of each presentation; counted by default.
    trials : DataFrame of n_trials rows, or a mapping of columns, optional
        The same as a table, with any further columns; columns named like the arguments above are used for them.
    times : sequence of length n_times, optional
        Times in s; 0 is the onset of the picture.
    ch_names : sequence of length n_channels, optional
    mask_img : nibabel image or path, optional
        The mask of the voxels, so that maps can be drawn; it must have as many voxels as `X` has features.
    dims
        Names of the axes, if the guess from the shape is wrong.
    title, unit, modality, citation
        Facts about the data for the report; `modality` is eeg, meg, fmri or other.
    same_pictures
        ``merge`` gives pictures with equal pixels one id and adds a note; ``refuse`` raises an error.

    Returns
    -------
    Data

    Raises
    ------
    DataError
        If shapes, ids and pictures do not match; the message says which.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> data = from_arrays(rng.normal(size=(12, 30)), images=rng.random((4, 8, 8)), shown=np.arange(12) % 4)
    >>> data
    <Data: 12 trials x 30 features, 4 pictures, 1 subject(s)>
    """
    if hasattr(X, "tocsr"):
        raise DataError("sparse data is not supported: pass X.toarray().")
    # Tensors and arrays of other libraries; what has a length is left as it is, memory maps above all.
    if not hasattr(X, "__len__") and hasattr(X, "__array__"):
        X = np.asarray(X)
    try:
        n_trials = len(X)
    except TypeError as error:
        raise DataError("X must be an array of trials of shape (n_trials, ...).") from error
    if modality is not None:
        check_option("modality", modality, MODALITIES)
    columns = {"stimulus_id": shown, "concept": labels}
    columns |= dict(zip(_COLUMNS, (subject, session, run, group, split, repetition), strict=True))
    about = {"title": title, "unit": unit, "modality": modality, "citation": citation}
    coords: dict[str, Any] = {}
    if mask_img is not None:
        image = _load_image(mask_img, "mask_img")
        # A mask with a fourth axis of length one is common.
        inside = np.asarray(image.dataobj).reshape(image.shape[:3]) > 0
        if np.ndim(X) != 2 or inside.sum() != np.shape(X)[1]:
            raise DataError(
                f"mask_img has {int(inside.sum())} voxels, but X has the shape {np.shape(X)}; expected (n_trials, "
                "n_voxels)."
            )
        coords = {
            "mask": inside,
            "affine": np.asarray(image.affine),
            "voxel_id": np.flatnonzero(inside.ravel()),
        }
        about["modality"] = modality or "fmri"
    if dims is None and about["modality"] == "fmri" and np.ndim(X) == 2:
        dims = ("trial", "voxel")
    table = _make_table(columns, trials, n_trials, images is not None)
    if shown is not None:  # of all that names pictures, the one that may be their places
        images = number_pictures(images, table["stimulus_id"].tolist())
    return Data(
        assemble_data(
            X, table, images, dims=dims, times=times, ch_names=ch_names, coords=coords,
            about={key: value for key, value in about.items() if value is not None},
            merge_same_pictures=_read_same(same_pictures),
        )
    )  # fmt: skip


@for_python
def from_epochs(
    epochs: Any,
    *,
    images: Pictures | None = None,
    column: str | None = None,
    labels: Sequence[Any] | np.ndarray | None = None,
    subject: Any = None,
    session: Any = None,
    run: Any = None,
    group: Any = None,
    split: Any = None,
    title: str | None = None,
    citation: str | None = None,
    same_pictures: str = "merge",
) -> Data:
    """Take `mne.Epochs` with metadata or event names.

    Parameters
    ----------
    epochs : mne.BaseEpochs
        Data channels are taken; EOG, stim and other channels are left out. Nothing is filtered.
    images
        As in `from_arrays`.
    column
        Column of ``epochs.metadata`` that names the picture of each trial; codes need a mapping of code to picture
        (``images={1: "a.png", ...}``). Without it, `stimulus_id` or `concept` is
        looked for, and otherwise the names of the events are the classes.
    labels, subject, session, run, group, split, title, citation, same_pictures
        As in `from_arrays`; columns of the metadata with these names are used too.

    Returns
    -------
    Data

    Raises
    ------
    DataError
        If the column is missing in the metadata, or pictures and trials do not match.
    """
    X, given = unpack_epochs(epochs, column=column)
    table = given.pop("trials")
    extra = {
        "concept": labels,
        "subject": subject,
        "session": session,
        "run": run,
        "group": group,
        "split": split,
    }
    for name, values in extra.items():
        if values is not None:
            table[name] = _spread(values, len(X), name)
    about = {
        **given.pop("about"),
        **{k: v for k, v in (("title", title), ("citation", citation)) if v is not None},
    }
    if images is not None and "stimulus_id" not in table and len(table) and "concept" in table:
        # Named events are pictures where pictures are named like them.
        table["stimulus_id"] = table["concept"]
    return Data(
        assemble_data(X, table, images, about=about, merge_same_pictures=_read_same(same_pictures), **given)
    )


@for_python
def from_nifti(
    betas_img: Any,
    trials: pd.DataFrame | Mapping[str, Sequence[Any]],
    *,
    mask_img: Any,
    images: Pictures | None = None,
    title: str | None = None,
    unit: str | None = None,
    citation: str | None = None,
    same_pictures: str = "merge",
) -> Data:
    """Take one fMRI volume per trial; arguments are named as in nilearn.

    Parameters
    ----------
    betas_img : nibabel image or path, of shape (x, y, z, n_trials)
        Responses of single trials, for example betas of a general linear model.
    trials : DataFrame of n_trials rows, or a mapping of columns
        Needs `stimulus_id` or `concept`; subject, session, run, group, split are understood. Where `stimulus_id` holds
        codes, `images` maps code to picture.
    mask_img : nibabel image or path
        On the same grid; voxels above 0 are taken.
    images
        As in `from_arrays`.
    title, unit, citation, same_pictures
        As in `from_arrays`.

    Returns
    -------
    Data

    Raises
    ------
    DataError
        If the grids differ, the mask is empty, or pictures and trials do not match.
    """
    X, given = mask_volumes(_load_image(betas_img, "betas_img"), _load_image(mask_img, "mask_img"))
    about = {"modality": "fmri", "title": title, "unit": unit, "citation": citation}
    given.pop("about", None)
    return Data(
        assemble_data(
            X, pd.DataFrame(trials), images, about={k: v for k, v in about.items() if v is not None},
            merge_same_pictures=_read_same(same_pictures), **given,
        )
    )  # fmt: skip


@for_python
def load(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    accept_terms: bool = False,
    verbose: bool = True,
    **settings: Any,
) -> Data:
    """Return a known data set; files are read only when they are needed.

    Parameters
    ----------
    name
        Kind of the data set, for example ``things_eeg2``; `describe("dataset")` lists them.
    root
        Folder of its files. With `download`, the default is a folder for this data set below ``$BRAINDECODE_VIS_DATA``
        or the user's cache.
    download
        Whether to download missing files first, for `settings["subjects"]` if they are given. Sizes are written to
        standard error first; digits69 has 2 MB, THINGS-MEG 8 GB per subject.
    accept_terms
        Whether you have read and accepted the terms of the data set, if it has any.
    verbose
        Show the progress of the preprocessing, as in `decode`.
    **settings
        Settings of the data set, for example ``subjects=[8]``; ``describe("dataset", name)`` lists them.

    Returns
    -------
    Data

    Raises
    ------
    ConfigError
        If the data set or a setting is not known.
    DataError
        If the download fails, or the terms were not accepted.

    Examples
    --------
    >>> load("synthetic_digits")
    <Data: synthetic_digits, not read yet>
    """
    from braindecode_vis.base.registry import validate_component

    given = {"kind": name, **settings}
    if download:
        # A mistyped setting is told before gigabytes come.
        validate_component("dataset", given, trusted=True)
        root = _download(name, root, accept_terms, settings.get("subjects"))
    if root is not None:
        given["root"] = str(as_path(root))
    settings_of_set = validate_component("dataset", given, trusted=True).take_addresses()
    return Data(None, settings_of_set, verbose=verbose)


def _download(name: str, root: str | Path | None, accept_terms: bool, subjects: Any) -> Path:
    from braindecode_vis.datasets.fetching import fetch, find_data_folder, make_plan, refuse_failures
    from braindecode_vis.datasets.manifests import read_manifest

    folder = find_data_folder(name) if root is None else Path(root)
    wanted = None if subjects is None else [str(subject) for subject in subjects]
    plan = make_plan(read_manifest(name), folder, subjects=wanted, accept_terms=accept_terms)
    if plan.missing:  # what moves, and what does not come by itself, is told before it takes hours
        print(*plan.describe(), sep="\n", file=sys.stderr)
    refuse_failures(fetch(plan), f"files of {name} were not fetched")
    return plan.root


def _make_table(columns: Mapping[str, Any], trials: Any, n_trials: int, has_images: bool) -> pd.DataFrame:
    if (trials is not None and not isinstance(trials, pd.DataFrame | Mapping | Sequence)) or isinstance(
        trials, str
    ):
        raise DataError(
            f"trials must be a DataFrame or a mapping of columns, not {type(trials).__name__}; read files with pandas."
        )
    table = (
        pd.DataFrame(index=range(n_trials)) if trials is None else pd.DataFrame(trials).reset_index(drop=True)
    )
    if len(table) != n_trials:
        raise DataError(f"trials has {len(table)} rows, but X has {n_trials} trials.")
    for name, values in columns.items():
        if values is not None:
            listed = _spread(values, n_trials, name)
            # Compared as text: 1 and "1" are one id.
            if name in table and [str(v) for v in table[name]] != [str(v) for v in listed]:
                raise DataError(
                    f"{name} was given twice, in trials and by an argument, and they differ; pass one of them."
                )
            table[name] = listed
    if not {"stimulus_id", "concept"} & set(table) and not has_images:
        raise DataError(
            "nothing says what the trials showed: pass images=... and shown=..., or labels=... (the class of each "
            "trial)."
        )
    return table


def _spread(values: Any, n_trials: int, name: str) -> list[Any]:
    """Return one value per trial; a scalar is repeated."""
    shown_as = {"stimulus_id": "shown", "concept": "labels"}.get(name, name)
    if isinstance(values, str) or np.ndim(values) == 0:
        return [values] * n_trials
    listed = values.tolist() if isinstance(values, np.ndarray) and values.ndim == 1 else list(values)
    if listed and np.ndim(listed[0]) > 0:
        raise DataError(f"{shown_as} must hold one id per trial, not arrays; pass pictures as images=...")
    if len(listed) != n_trials:
        raise DataError(f"{shown_as} has {len(listed)} entries, but X has {n_trials} trials.")
    return listed


def join_epochs(X: Any) -> Any:
    """Return one MNE epochs object for a list of epochs, which scikit-learn makes when it selects trials; return
    anything else unchanged.

    Raises
    ------
    DataError
        If they have other channels or times.
    """
    if not (isinstance(X, list) and X and all(hasattr(each, "event_id") for each in X)):
        return X
    import mne

    first = X[0]
    if any(each.ch_names != first.ch_names or not np.array_equal(each.times, first.times) for each in X):
        raise DataError(
            "the epochs of this list have different channels or times; select the same "
            "channels and times for all of them."
        )
    data = np.concatenate([each.get_data(copy=False) for each in X])
    return mne.EpochsArray(data, first.info, tmin=first.tmin, verbose="error")


def merge_pictures(y: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the distinct pictures by the hash of their pixels, and that of each trial."""
    shown: list[str] = []
    pictures: dict[str, np.ndarray] = {}
    for n, picture in enumerate(y):
        if isinstance(picture, str | Path) and not Path(picture).is_file():
            raise DataError(
                f"y holds {str(picture)!r}, which is not a picture file; pass pictures, ids with "
                "images=..., or choose "
                "a decoder of classes (encoder='lda')."
            )
        array = (
            read_image_file(Path(picture))
            if isinstance(picture, str | Path)
            else as_uint8_rgb(picture, name=str(n))
        )
        # 64 bits: with a million pictures, two collide once in some forty million sets.
        digest = hash_pixels(array)[:16]
        pictures.setdefault(digest, array)
        shown.append(digest)
    return pictures, shown


def _describe_range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def _describe_split(trials: pd.DataFrame) -> str:
    """Say how the data declare training and test trials, and which split `decode` takes by default."""
    if "split" not in trials or trials["split"].nunique() < 2:
        return "not declared; decode makes folds"
    return ", ".join(f"{n} {name} trials" for name, n in trials["split"].value_counts().items())


def _have_same_coords(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    if set(ours) != set(theirs):
        return False
    return all(
        np.array_equal(value, theirs[key])
        if isinstance(value, np.ndarray)
        else str(value) == str(theirs[key])
        for key, value in ours.items()
    )


def _are_same_numbers(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Compare two arrays in blocks of rows, since each may be a large memory map."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    block = max(1, (64 << 20) // max(1, ours[:1].nbytes))
    return all(
        np.array_equal(ours[start : start + block], theirs[start : start + block])
        for start in range(0, len(ours), block)
    )


def _load_image(image: Any, what: str) -> Any:
    if not isinstance(image, str | Path):
        return image
    import nibabel as nib

    path = Path(image).expanduser()
    try:
        return nib.load(path)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise DataError(f"{what} {path} cannot be read as NIfTI ({error}).") from error


def _read_same(same_pictures: str) -> bool:
    if same_pictures not in ("merge", "refuse"):
        raise DataError(f"same_pictures is {same_pictures!r}, but must be merge or refuse.")
    return same_pictures == "merge"


def as_component(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return plain settings of a component from its name or from settings."""
    return {"kind": value.replace(" ", "_")} if isinstance(value, str) else dict(value)


def read_encoder(encoder: Any, *, knows_images: bool) -> dict[str, Any]:
    """Return plain settings of an encoder.

    The name of a network, or a torch module, stands for the network encoder with it.
    """
    if encoder is None:
        encoder = "ridge" if knows_images else "lda"
    if is_module(encoder):
        return {"kind": "network", "network": describe_module(encoder)}
    if isinstance(encoder, Mapping) and is_module(encoder.get("network")):
        encoder = {**encoder, "network": describe_module(encoder["network"])}
    if not isinstance(encoder, str | Mapping):
        raise ConfigError(
            f"encoder is {encoder!r}, but must be a name such as 'ridge' or 'atm_s', a torch module, or a mapping of "
            "settings; docs/OUTSIDE.md says how to use an encoder of your own."
        )
    if not isinstance(encoder, str):
        kind = str(encoder.get("kind", ""))
        if kind in list_kinds("network") and kind not in list_kinds("encoder"):
            raise ConfigError(
                f"{kind!r} is a network, so its settings belong one level deeper: encoder={{'kind': 'network', "
                f"'network': {{'kind': {kind!r}}}}}, beside those of the training."
            )
        return _choose_list(dict(encoder), knows_images)
    name = encoder.replace("-", "_").lower()
    # The name of a network stands for the network encoder with it; an encoder's own name goes first.
    if name in list_kinds("network") and name not in list_kinds("encoder"):
        return {"kind": "network", "network": {"kind": name}}
    return _choose_list({"kind": name if ":" not in encoder else encoder}, knows_images)


def _choose_list(encoder: dict[str, Any], knows_images: bool) -> dict[str, Any]:
    """Let auto try decoders of classes if the data have no images, unless its candidates were given."""
    chooses = encoder.get("kind") == "auto" and not knows_images
    return {"candidates": "classes", **encoder} if chooses else encoder
