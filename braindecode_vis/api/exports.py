"""Responses, predictions and scores in the formats of other tools: xarray, MNE, NIfTI, tables, BIDS derivatives.

Defines which result goes into which format, the names and coordinates in the files, and how a path is written:
everything appears at once, and nothing that exists is replaced. It computes no result: an unfinished run is refused.
Fitted encoders are exported by `braindecode_vis.api.model_export`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis import __version__
from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError, check_option, require
from braindecode_vis.base.contracts import Dataset
from braindecode_vis.pipeline.decoding import retrieve
from braindecode_vis.pipeline.finished_run import FinishedRun, open_finished
from braindecode_vis.pipeline.learning import pick_test_trials
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.pipeline.runs import Run, read_scores
from braindecode_vis.preprocessing.epochs import export_epochs
from braindecode_vis.preprocessing.voxel_geometry import inverse_transform

if TYPE_CHECKING:
    import mne
    import xarray as xr

_TABLES = ("csv", "parquet")
_GRIDS = ("netcdf", "zarr")
#: What can be exported, and in which formats.
FORMATS: dict[str, tuple[str, ...]] = {
    "responses": (*_GRIDS, "fif", "nifti", "bids", *_TABLES),
    "predictions": (*_GRIDS, "bids", *_TABLES),
    "scores": (*_GRIDS, "bids", *_TABLES),
    "images": ("png",),
    "encoder": ("safetensors", "torch-export", "onnx", "huggingface"),
    "submission": ("challenge", "basic"),
}
#: How the name of a file must end; the other formats are folders. MNE and nibabel choose what they write by it.
_SUFFIXES = {
    "netcdf": (".nc",), "fif": ("-epo.fif", "_epo.fif"), "nifti": (".nii.gz", ".nii"), "csv": (".csv",),
    "parquet": (".parquet",), "torch-export": (".pt2",), "onnx": (".onnx",),
}  # fmt: skip
#: Values of one trial that still make a table; beyond, a spreadsheet is the wrong tool.
MOST_COLUMNS = 10_000
#: Units that MNE does not know, as shares of V or T.
_TO_SI = {"uv": 1e-6, "µv": 1e-6, "μv": 1e-6, "microvolt": 1e-6, "mv": 1e-3, "ft": 1e-15, "femtotesla": 1e-15}
_BIDS_VERSION = "1.10.0"


def check_request(what: str, to: str) -> None:
    """Raise `ConfigError` unless the result can be written in this format."""
    check_option("what", what, FORMATS)
    known = sorted({name for formats in FORMATS.values() for name in formats})
    check_option("to", to, known)
    if to not in FORMATS[what]:
        raise ConfigError(f"{what} cannot be written as {to}; choose one of {', '.join(FORMATS[what])}.")


@contextmanager
def write_new(out: str | Path, to: str) -> Iterator[Path]:
    """Yield a temporary path to write; it and the files beside it appear at `out` if the block succeeds.

    Parameters
    ----------
    out
        A file, or a folder, as the format needs it.
    to
        The format.

    Raises
    ------
    ConfigError
        If the path exists, has the wrong ending, or cannot be written.
    """
    path = Path(out).expanduser().absolute()
    suffixes = _SUFFIXES.get(to, ())
    if suffixes and not path.name.endswith(suffixes):
        raise ConfigError(
            f"{to} is written to a file that ends with {' or '.join(suffixes)}, not {path.name}."
        )
    if path.exists():
        raise ConfigError(f"{path} exists; choose another path, or remove it first.")
    # A folder of its own, since several writers lay further files beside the one they were asked for.
    try:
        with store.open_scratch(path.parent, path.name) as work:
            yield work / path.name
            places = (path.parent / file.name for file in sorted(work.iterdir()))
            taken = next((place for place in places if place.exists()), None)
            if taken is not None:
                raise ConfigError(f"{taken} exists; choose another path, or remove it first.")
            store.move_together(work, path.name)
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another path.") from error


# --- runs ----------------------------------------------------------------------------------------------------


def read_only(run: Run) -> Run:
    """Return the same run for reading only: a missing result is an error, and nothing is computed."""
    return run if isinstance(run, FinishedRun) else open_finished(run.folder.path)


def check_fold(run: Run, fold: int | None) -> list[int]:
    """Return the numbers of the chosen folds: one, or all."""
    numbers = range(len(preprocess(run).split.folds))
    if fold is not None and fold not in numbers:
        raise ConfigError(f"the run has the folds 0 to {len(numbers) - 1}, not {fold}.")
    return list(numbers) if fold is None else [fold]


def export_run(
    run: Run, what: str, to: str, out: str | Path, *, fold: int | None = None, subject: str | None = None
) -> Path:
    """Write responses, predictions or scores of a finished run; see `DecodingRun.export`."""
    check_request(what, to)
    run = read_only(run)
    about = describe_data(run)
    if what != "predictions" and fold is not None:
        raise ConfigError(f"{what} belong to the whole run; a fold can be given for predictions and encoder.")
    if what != "responses" and subject is not None:
        raise ConfigError(f"a subject can be given for responses, not for {what}.")
    if what == "responses":
        return export_responses(preprocess(run).responses, to, out, about=about, subject=subject)
    table = read_score_table(run) if what == "scores" else read_prediction_table(run, fold)[0]
    if to in _TABLES:
        vectors = None if what == "scores" else read_prediction_table(run, fold)[1]
        return _write_table(_join_columns(table, vectors), to, out)
    if to in _GRIDS:
        made = scores_to_xarray(run) if what == "scores" else predictions_to_xarray(run, fold)
        return write_grid(made, to, out)
    vectors = None if what == "scores" else read_prediction_table(run, fold)[1]
    with write_new(out, to) as folder:
        _start_derivative(folder, about)
        kind = find_datatype(preprocess(run).responses, about)
        for name, rows in table.groupby("subject", sort=True).indices.items():
            _write_bids_rows(folder, str(name), kind, what, table.iloc[rows], vectors, np.asarray(rows))
        _write_participants(folder, [str(name) for name in table["subject"].unique() if name != "all"])
    return Path(out).expanduser().absolute()


def describe_data(run: Run) -> dict[str, str]:
    """Return title, modality, citation and licence of the data of a run, if they are known."""
    from braindecode_vis.base import roles

    manifest = roles.complete(Dataset, run.config.dataset).manifest
    if manifest is None:
        return {"title": run.config.dataset.kind}
    names = ("title", "modality", "citation", "licence")
    found = {name: str(getattr(manifest, name)) for name in names}
    return {name: text for name, text in found.items() if text not in ("", "none given", "not stated")}


def read_score_table(run: Run) -> pd.DataFrame:
    """Return the scores that a finished run has published, one row per metric, method and subject."""
    return pd.DataFrame(_read_rows(run))


def _read_rows(run: Run) -> list[dict[str, Any]]:
    rows = read_scores(run.folder.path)
    if not rows:
        raise DataError(
            f"{run.folder.path} is unfinished: it has no scores; finish it first with braindecode-vis run "
            f"{run.folder.path}."
        )
    return rows


def read_prediction_table(run: Run, fold: int | None) -> tuple[pd.DataFrame, Embeddings | None]:
    """Return one row per test trial of the chosen folds, and the predicted embeddings; None for classes.

    Raises
    ------
    ConfigError
        If the folds have different spaces and none was chosen.
    """
    numbers = check_fold(run, fold)
    if run.config.decodes_categories:
        if fold is not None:
            raise ConfigError("decisions of categories are kept for all folds together; leave out the fold.")
        scored = run.folder.path / "stages" / "evaluate" / _read_rows(run)[0]["fingerprint"]
        return pd.read_parquet(scored / "items.parquet"), None
    found = retrieve(run)
    spaces = {found.folds[n].predicted.space for n in numbers}
    if len(spaces) > 1:
        raise ConfigError(
            f"the target {run.config.target.kind} has a different space in every fold, so their "
            "predictions do not form one array; choose a fold (--fold 0)."
        )
    ranks = pd.read_parquet(found.artifact.path / "ranks.parquet")
    parts, vectors = [], []
    for number in numbers:
        predicted, trials = found.folds[number].predicted, pick_test_trials(run, number).trials
        own = ranks[ranks["fold"] == number].reset_index(drop=True)
        if not (list(trials["stimulus_id"]) == list(own["stimulus_id"]) == list(predicted.ids)):
            raise DataError(f"the ranks of fold {number} belong to other trials; run the run again.")
        new = [name for name in own if name not in trials]
        parts.append(pd.concat([trials.reset_index(drop=True), own[new]], axis=1))
        vectors.append(np.asarray(predicted.vectors))
    table = pd.concat(parts, ignore_index=True)
    return table, Embeddings(
        np.concatenate(vectors), table["stimulus_id"].to_numpy(dtype=object), spaces.pop()
    )


# --- xarray --------------------------------------------------------------------------------------------------


def responses_to_xarray(responses: Responses, about: Mapping[str, str] | None = None) -> xr.Dataset:
    """Return responses as a labelled data set.

    Parameters
    ----------
    responses
        Trials of any kind.
    about
        Facts about the data that become attributes: title, citation, licence.

    Returns
    -------
    xarray.Dataset
        ``responses`` with the axes of the trials; columns of the trial table, channels, times and voxels as
        coordinates; mask, affine and further arrays as variables.
    """
    xarray = require("xarray", "to_xarray")
    dims, sizes = responses.dims, dict(zip(responses.dims, responses.data.shape, strict=True))
    coords: dict[str, Any] = _list_trial_coords(responses.trials, "trial", dims)
    others: dict[str, Any] = {}
    attrs: dict[str, Any] = {"unit": responses.unit, "braindecode_vis": __version__, **(about or {})}
    axes = {"ch_names": "channel", "times": "time", "voxel_id": "voxel", "parcel_names": "parcel"}
    for key, value in responses.coords.items():
        if axes.get(key) in sizes:
            coords[axes[key]] = (axes[key], _as_plain(value))
        elif isinstance(value, np.ndarray) or key == "ch_pos":
            array = np.asarray(value)
            # Arrays with an entry per channel or voxel lie on that axis; any other has axes of its own.
            own = [next((d for d in dims[1:] if n == 0 and size == sizes[d]), f"{key}_{n}")
                   for n, size in enumerate(array.shape)]  # fmt: skip
            others[key] = (own, _as_plain(array))
        elif isinstance(value, str | int | float):
            attrs[key] = value
        elif value is not None:
            attrs[key] = json.dumps(store.json_plain(value))
    made = xarray.Dataset({"responses": (dims, np.asarray(responses.data)), **others}, coords, attrs)
    made["responses"].attrs["units"] = responses.unit
    if "time" in made.coords:
        made["time"].attrs["units"] = "s"
    return made


def predictions_to_xarray(run: Run, fold: int | None = None) -> xr.Dataset:
    """Return predicted embeddings with trials, ranks and best pictures as coordinates; for classes, the decisions."""
    xarray = require("xarray", "to_xarray")
    run = read_only(run)
    table, predicted = read_prediction_table(run, fold)
    attrs = {"braindecode_vis": __version__, **describe_data(run)}
    coords = _list_trial_coords(table, "trial", ("trial", "feature", "token", "place"))
    if predicted is None:
        return xarray.Dataset({}, coords, attrs).reset_coords(
            [name for name in ("decoded", "label") if name in coords]
        )
    dims = ("trial", "feature") if predicted.vectors.ndim == 2 else ("trial", "token", "feature")
    found: dict[str, Any] = {"predictions": (dims, predicted.vectors)}
    if "top_ids" in table and table["top_ids"].map(len).nunique() == 1:
        found["best_pictures"] = (
            ("trial", "place"),
            np.array([list(map(str, ids)) for ids in table["top_ids"]]),
        )
    return xarray.Dataset(found, coords, {**attrs, "space": predicted.space})


def scores_to_xarray(run: Run) -> xr.Dataset:
    """Return the table of scores as a data set of variables over ``score``; metric, method and subject are coords."""
    xarray = require("xarray", "to_xarray")
    run = read_only(run)
    columns = _list_trial_coords(read_score_table(run), "score", ("score",))
    names = ("metric", "method", "subject", "split", "protocol", "fingerprint")
    coords = {name: columns.pop(name) for name in names if name in columns}
    return xarray.Dataset(columns, coords, {"braindecode_vis": __version__, **describe_data(run)})


def _list_trial_coords(table: pd.DataFrame, dim: str, taken: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns of a table as coordinates of `dim`; lists are left out, a name of an axis gets a prefix."""
    coords: dict[str, Any] = {}
    for name, column in table.items():
        if len(column) and isinstance(column.iloc[0], list | np.ndarray | dict):
            continue
        coords[f"{dim}_{name}" if name in taken else str(name)] = (dim, _as_plain(column))
    return coords


def _as_plain(values: Any) -> np.ndarray:
    """Return numbers as they are, and anything else as text, a missing entry as an empty one."""
    if isinstance(values, pd.Series):
        if pd.api.types.is_bool_dtype(values.dtype) and not values.isna().any():
            return values.to_numpy(dtype=bool)
        if pd.api.types.is_numeric_dtype(values.dtype):
            return values.to_numpy(dtype=float if values.isna().any() else None)
        numbers = pd.to_numeric(values, errors="coerce")
        # None beside numbers makes a column of objects: an interval that a score does not have.
        if (
            not values.map(lambda entry: isinstance(entry, str)).any()
            and (numbers.isna() == values.isna()).all()
        ):
            return numbers.to_numpy(dtype=float)
        values = values.astype(object).where(values.notna(), "")
    array = np.asarray(values)
    return (
        array
        if array.dtype.kind in "fiub"
        else np.asarray([str(v) for v in array.ravel()]).reshape(array.shape)
    )


def write_grid(made: xr.Dataset, to: str, out: str | Path) -> Path:
    """Write a data set of xarray as NetCDF 4 or Zarr."""
    require("h5netcdf" if to == "netcdf" else "zarr", f"writing {to}")
    with write_new(out, to) as path:
        if to == "netcdf":
            made.to_netcdf(path, engine="h5netcdf")
        else:
            # Format 2 has a specified type for text, which format 3 lacks.
            made.to_zarr(path, zarr_format=2, consolidated=True)
    return Path(out).expanduser().absolute()


# --- MNE and NIfTI -------------------------------------------------------------------------------------------


def responses_to_epochs(responses: Responses, about: Mapping[str, str] | None = None) -> mne.EpochsArray:
    """Return trials as MNE epochs in V or T, with the trial table as metadata.

    Raises
    ------
    DataError
        If the responses are not channels over time, or their channels or times are unknown.
    """
    if responses.dims != ("trial", "channel", "time"):
        raise DataError(
            f"only trials of channels and times become MNE epochs, not of {', '.join(responses.dims[1:])}."
        )
    coords = dict(responses.coords)
    missing = [name for name in ("ch_names", "times", "sfreq") if name not in coords]
    if missing:
        raise DataError(
            f"MNE epochs need {', '.join(missing)} of the trials, which the data do not give; pass "
            "ch_names and times "
            "to from_arrays, or state channels, sfreq and tmin in meta.yaml."
        )
    modality = str(coords.get("modality") or (about or {}).get("modality", "eeg")).lower()
    coords["modality"] = "meg" if modality == "meg" else "eeg"
    scale = _TO_SI.get(responses.unit.lower())
    data = responses.data if scale is None else np.asarray(responses.data, dtype=np.float64) * scale
    return export_epochs(replace(responses, data=data, coords=coords))


def responses_to_nifti(responses: Responses, subject: str | None = None) -> Any:
    """Return the trials as a 4-D NIfTI image, one volume per trial.

    Raises
    ------
    DataError, ConfigError
        If the responses are not voxels or parcels of a volume, or a subject must be named.
    """
    if responses.dims not in (("trial", "voxel"), ("trial", "parcel")):
        raise DataError(
            f"only trials of voxels or parcels become NIfTI images, not of {', '.join(responses.dims[1:])}."
        )
    if responses.coords.get("subjects") is None and subject is not None:
        names = responses.trials["subject"].astype(str)
        check_option("subject", subject, sorted(set(names)))
        responses, subject = responses.select((names == subject).to_numpy()), None
    image = inverse_transform(responses, subject=subject)
    if isinstance(image, dict):
        raise DataError("these responses lie on a surface, which NIfTI cannot hold; choose netcdf.")
    return image


def export_responses(
    responses: Responses, to: str, out: str | Path, *, about: Mapping[str, str], subject: str | None = None
) -> Path:
    """Write trials; see `Data.export`."""
    check_request("responses", to)
    path = Path(out).expanduser().absolute()
    if subject is not None and to != "nifti":
        names = responses.trials["subject"].astype(str)
        check_option("subject", subject, sorted(set(names)))
        responses = responses.select((names == subject).to_numpy())
    if to in _GRIDS:
        return write_grid(responses_to_xarray(responses, about), to, path)
    if to in _TABLES:
        n_values = int(np.prod(responses.data.shape[1:]))
        if n_values > MOST_COLUMNS:
            raise ConfigError(
                f"a trial has {n_values} values, too many for a table (at most {MOST_COLUMNS}); choose "
                "netcdf or zarr."
            )
        return _write_table(pd.concat([responses.trials, _spread_values(responses)], axis=1), to, path)
    if to == "fif":
        epochs = responses_to_epochs(responses, about)
        with write_new(path, to) as file:
            epochs.save(file, verbose="error")
    elif to == "nifti":
        import nibabel

        image = responses_to_nifti(responses, subject)
        trials = _pick_subject(responses, subject)
        with write_new(path, to) as file:
            nibabel.save(image, file)
            stem = file.name.removesuffix(".gz").removesuffix(".nii")
            _write_tsv(trials, file.with_name(f"{stem}_trials.tsv"))
    else:
        _write_bids_responses(responses, path, about)
    return path


def _pick_subject(responses: Responses, subject: str | None) -> pd.DataFrame:
    trials = responses.trials
    return trials if subject is None else trials[trials["subject"].astype(str) == subject]


def _spread_values(responses: Responses) -> pd.DataFrame:
    """Return one column per value of a trial, named by channel and time, voxel or number."""
    keys = {"channel": "ch_names", "time": "times", "voxel": "voxel_id", "parcel": "parcel_names"}
    names = [""]
    for dim, size in zip(responses.dims[1:], responses.data.shape[1:], strict=True):
        known = responses.coords.get(keys.get(dim, ""))
        if known is None:
            own = [f"{dim}{n}" for n in range(size)]
        elif dim in ("voxel", "time"):
            own = [f"{dim}{value:g}" if dim == "time" else f"{dim}{value}" for value in known]
        else:
            own = [str(name) for name in known]
        names = [f"{before}_{name}".lstrip("_") for before in names for name in own]
    return pd.DataFrame(responses.as_matrix(), columns=names, index=responses.trials.index)


def _join_columns(table: pd.DataFrame, predicted: Embeddings | None) -> pd.DataFrame:
    """Return a table with the predicted values as further columns; lists become text that any reader splits."""
    table = table.copy()
    for name, column in table.items():
        if len(column) and isinstance(column.iloc[0], list | np.ndarray):
            table[name] = column.map(lambda ids: " ".join(map(str, ids)))
    if predicted is None or predicted.flat().shape[1] > MOST_COLUMNS:
        return table
    values = predicted.flat()
    columns = [f"feature{n}" for n in range(values.shape[1])]
    return pd.concat([table, pd.DataFrame(values, columns=columns, index=table.index)], axis=1)


def _write_table(table: pd.DataFrame, to: str, out: str | Path) -> Path:
    with write_new(out, to) as path:
        if to == "csv":
            table.to_csv(path, index=False)
        else:
            table.to_parquet(path, index=False)
    return Path(out).expanduser().absolute()


# --- BIDS derivatives ----------------------------------------------------------------------------------------


def find_datatype(responses: Responses, about: Mapping[str, str]) -> str:
    """Return the BIDS folder of the recordings: ``func``, ``meg`` or ``eeg``; ``beh`` where the modality is unknown."""
    modality = str(responses.coords.get("modality") or about.get("modality", "")).lower()
    if "voxel" in responses.dims or "parcel" in responses.dims or modality == "fmri":
        return "func"
    if modality in ("eeg", "meg"):
        return modality
    return "eeg" if "channel" in responses.dims else "beh"


def make_bids_label(subject: str) -> str:
    """Return a subject's name as a BIDS label: letters and digits only."""
    label = re.sub(r"[^A-Za-z0-9]", "", subject.removeprefix("sub-"))
    if not label:
        raise DataError(f"the subject {subject!r} has no letter or digit, so it cannot be named in BIDS.")
    return label


def _write_bids_responses(responses: Responses, out: Path, about: Mapping[str, str]) -> None:
    kind = find_datatype(responses, about)
    names = responses.trials["subject"].astype(str)
    subjects = sorted(set(names))
    labels = [make_bids_label(name) for name in subjects]
    if len(set(labels)) < len(labels):
        raise DataError(
            f"the subjects {', '.join(subjects)} are not distinguished by letters and digits alone, as BIDS asks."
        )
    writers: dict[bool, Callable[[Responses, str, Path], None]] = {
        True: _save_statmap,
        False: _save_epochs(about),
    }
    with write_new(out, "bids") as folder:
        _start_derivative(folder, about)
        for name, label in zip(subjects, labels, strict=True):
            below = folder / f"sub-{label}" / kind
            below.mkdir(parents=True)
            own = responses.select((names == name).to_numpy())
            stem = below / f"sub-{label}_task-images"
            writers[kind == "func"](own, name, stem)
            _write_tsv(own.trials, Path(f"{stem}_desc-trials_trials.tsv"))
        _write_participants(folder, subjects)


def _save_statmap(responses: Responses, name: str, stem: Path) -> None:
    import nibabel

    image = responses_to_nifti(responses, name if responses.coords.get("subjects") else None)
    nibabel.save(image, f"{stem}_stat-effect_desc-trials_statmap.nii.gz")
    about = {
        "Description": "One volume per trial, in the order of the table of trials.",
        "Units": responses.unit,
    }
    store.write_json(Path(f"{stem}_stat-effect_desc-trials_statmap.json"), about)


def _save_epochs(about: Mapping[str, str]) -> Callable[[Responses, str, Path], None]:
    def save(responses: Responses, name: str, stem: Path) -> None:
        epochs = responses_to_epochs(responses, about)
        epochs.save(Path(f"{stem}_desc-trials_epo.fif"), verbose="error")
        store.write_json(
            Path(f"{stem}_desc-trials_epo.json"),
            {"Description": "Trials as MNE epochs.", "Units": responses.unit},
        )

    return save


def _write_bids_rows(
    folder: Path,
    subject: str,
    kind: str,
    what: str,
    table: pd.DataFrame,
    predicted: Embeddings | None,
    rows: np.ndarray,
) -> None:
    """Write scores or predictions of a subject; those of all subjects together are written at the top."""
    below, start = folder, ""
    if subject != "all":
        label = make_bids_label(subject)
        below, start = folder / f"sub-{label}" / kind, f"sub-{label}_"
        below.mkdir(parents=True, exist_ok=True)
    name = f"{start}task-images_desc-decoded"
    _write_tsv(_join_columns(table, None), below / f"{name}_{'scores' if what == 'scores' else 'trials'}.tsv")
    if predicted is not None:
        np.save(below / f"{name}_embeddings.npy", np.asarray(predicted.vectors)[rows], allow_pickle=False)
        described = {
            "Description": "Predicted embeddings, one row per row of the table.",
            "Space": predicted.space,
        }
        store.write_json(below / f"{name}_embeddings.json", described)


def _start_derivative(folder: Path, about: Mapping[str, str]) -> None:
    folder.mkdir()
    described = {
        "Name": f"braindecode_vis: {about.get('title', 'decoding of images')}",
        "BIDSVersion": _BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "braindecode_vis", "Version": __version__}],
        **({"License": about["licence"]} if "licence" in about else {}),
        **({"ReferencesAndLinks": [about["citation"]]} if "citation" in about else {}),
    }
    store.write_json(folder / "dataset_description.json", described)
    (folder / "README").write_text(
        f"Results of braindecode_vis {__version__} on {about.get('title', 'data without a title')}.\n"
    )
    # Names that BIDS has not settled yet for derivatives; the validator passes over them.
    ignored = ["*_epo.*", "*_trials.tsv", "*_scores.tsv", "*_embeddings.*"]
    (folder / ".bidsignore").write_text("".join(f"{name}\n" for name in ignored))


def _write_participants(folder: Path, subjects: list[str]) -> None:
    _write_tsv(
        pd.DataFrame({"participant_id": [f"sub-{make_bids_label(name)}" for name in subjects]}),
        folder / "participants.tsv",
    )


def _write_tsv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
