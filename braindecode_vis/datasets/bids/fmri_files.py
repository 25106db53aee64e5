"""The files of a BIDS tree of fMRI: which belong to one run, their headers and tables, and the shown pictures.

Owns the entities in file names, raw data and fMRIPrep derivatives with both naming schemes
(``_space-T1w_desc-preproc_bold``, and ``_bold_space-T1w_preproc`` before version 1.2), inheritance of sidecars and
events from upper folders, repetition times, confounds, masks, and one rule for pictures: a picture is found at its
relative path, or else by its file name anywhere below the folder (a copy with another suffix counts), and never by
position. Without a folder the set still lists the shown pictures: its rows then have the sha256 of the name instead of
that of the file, and no pixels. Never reads the volumes of a run.

mne-bids is not used here: it lists no tree on a server, skips names from before version 1.2 and names with ``dir-``,
and merges no sidecars.

References
----------
Gorgolewski et al. (2016), doi:10.1038/sdata.2016.44: BIDS. Esteban et al. (2019), doi:10.1038/s41592-018-0235-4.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, is_there, refuse_damage, suggest
from braindecode_vis.base.digests import digest_folder
from braindecode_vis.base.remote import RemotePath, bring_all
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_file
from braindecode_vis.datasets.manifests import find_label
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.datasets.sources.bold_source import BoldRun, ConfoundsConfig, MaskMethod, check_grid
from braindecode_vis.datasets.sources.fmri_volumes import VolumeHeader, read_volume, read_volume_header

if TYPE_CHECKING:
    import pandas as pd

_ENTITY = re.compile(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9+]+)")
_RAW = re.compile(r"_bold\.nii(\.gz)?$")
_NEW = re.compile(r"_desc-preproc_bold\.nii(\.gz)?$")
# fMRIPrep before 1.2, which made the release of BOLD5000.
_OLD = re.compile(r"_bold(_space-[a-zA-Z0-9]+)?_preproc\.nii(\.gz)?$")
#: Lists the files of a folder whose names match a pattern.
Finder = Callable[[Path, str], Iterable[Path]]
_RUN_KEYS = ("sub", "ses", "task", "acq", "dir", "run")


@dataclass(frozen=True)
class RunFiles:
    """Files of one run.

    Parameters
    ----------
    image
        The 4-D image.
    entities
        Entities of its name, for example ``{"sub": "01", "run": "02"}``.
    events
        Its table of events, or None.
    sidecar
        Merged sidecars of the image; a nearer one replaces values of a farther one.
    confounds, mask
        Those of fMRIPrep, or None.
    """

    image: Path
    entities: Mapping[str, str]
    events: Path | None
    sidecar: Mapping[str, Any]
    confounds: Path | None = None
    mask: Path | None = None

    @property
    def where(self) -> str:
        """Subject, session, run and file, for messages."""
        e = self.entities
        parts = [f"subject {e['sub']}"]
        parts += [f"{word} {e[key]}" for key, word in (("ses", "session"), ("run", "run")) if key in e]
        return ", ".join([*parts, f"file {self.image.name}"])


def parse_entities(name: str) -> dict[str, str]:
    """Return the entities of a BIDS file name.

    Examples
    --------
    >>> parse_entities("sub-CSI1_ses-01_task-5000scenes_run-03_bold_space-T1w_preproc.nii.gz")["space"]
    'T1w'
    """
    return dict(_ENTITY.findall(name))


def find_derivatives(root: Path, derivatives: Path | None) -> Path | None:
    """Return the folder of fMRIPrep: the given one, `root` itself if it is one, or one below it; None for raw data.

    Raises
    ------
    DataError
        If the given folder does not exist.
    """
    if derivatives is not None:
        folder = derivatives.expanduser()
        if not folder.is_dir():
            raise DataError(f"the folder {folder} does not exist; correct dataset.derivatives.")
        return folder
    # The places in which fMRIPrep and data sets on OpenNeuro keep derivatives.
    for folder in (root, root / "derivatives" / "fmriprep", root / "fmriprep", root / "derivatives"):
        if folder.is_dir() and any(_is_preprocessed(path.name) for path in _walk(folder)):
            return folder
    return None


def _walk(folder: Path) -> Iterable[Path]:
    for pattern in ("sub-*/func/*.nii*", "sub-*/ses-*/func/*.nii*"):
        yield from folder.glob(pattern)


def find_runs(
    root: Path,
    *,
    derivatives: Path | None,
    space: str | None,
    entities: Mapping[str, Sequence[str] | None],
) -> list[RunFiles]:
    """Return every run that fits, sorted by subject, session, task and run.

    Parameters
    ----------
    root
        Raw data set, which contains the events.
    derivatives
        Folder of preprocessed images; with None, the raw ones are read.
    space
        Space of the preprocessed images; with None, the only one that exists.
    entities
        Required values of ``sub``, ``ses``, ``task``, ``acq`` and ``run``; with None, any value.

    Raises
    ------
    DataError, ConfigError
        If nothing fits, the space is ambiguous, or a required value does not occur.
    """
    base = root if derivatives is None else derivatives
    # A name like ``_desc-preproc_bold`` ends as a raw one does.
    wants_raw = derivatives is None
    images = [path for path in sorted(_walk(base)) if _is_preprocessed(path.name) != wants_raw]
    images = [path for path in images if not wants_raw or _RAW.search(path.name)]
    tagged = [(path, parse_entities(path.name)) for path in images]
    if not tagged:
        kind = "raw *_bold.nii.gz" if derivatives is None else "preprocessed *_desc-preproc_bold.nii.gz"
        raise DataError(
            f"{base} holds no {kind} below sub-*/[ses-*/]func; pass the folder of the data set with --root, or that of "
            "fMRIPrep with --set dataset.derivatives=DIR."
        )
    # One entity after the other, so that the message names the one after which no run is left.
    for key, wanted in entities.items():
        tagged = _keep(tagged, key, wanted, base)
    tagged = _choose_space(tagged, space, base)
    runs = []
    for path, found in tagged:
        confounds, mask = (None, None) if derivatives is None else _find_products(path, found)
        runs.append(
            RunFiles(
                path, found, find_events(root, found), merge_sidecars(root, path, found), confounds, mask
            )
        )
    seen: dict[tuple[str, ...], Path] = {}
    for run in runs:
        tags = tuple(run.entities.get(key, "") for key in _RUN_KEYS)
        if tags in seen:
            raise DataError(
                f"{run.image.name} and {seen[tags].name} are the same run; keep one of them, or choose with "
                "dataset.space."
            )
        seen[tags] = run.image
    return sorted(
        runs, key=lambda run: tuple(_order_naturally(run.entities.get(key, "")) for key in _RUN_KEYS)
    )


def _is_preprocessed(name: str) -> bool:
    """Whether a file name belongs to a preprocessed image, in either naming scheme of fMRIPrep."""
    return bool(_NEW.search(name) or _OLD.search(name))


def _order_naturally(text: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sorting key in which ``run-2`` precedes ``run-10``."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts)


def _keep(
    tagged: list[tuple[Path, dict[str, str]]], key: str, wanted: Sequence[str] | None, base: Path
) -> list[tuple[Path, dict[str, str]]]:
    if wanted is None:
        return tagged
    there = sorted({found[key] for _, found in tagged if key in found})
    labels = {find_label(value, there) for value in wanted}
    for value in sorted(labels - set(there)):
        raise DataError(
            f"{base} has no image with {key}-{value}{suggest(value, there)}; it has "
            f"{', '.join(f'{key}-{v}' for v in there) or f'none with {key}-'}."
        )
    return [(path, found) for path, found in tagged if found.get(key) in labels]


def _choose_space(
    tagged: list[tuple[Path, dict[str, str]]], space: str | None, base: Path
) -> list[tuple[Path, dict[str, str]]]:
    there = sorted({found.get("space", "native") for _, found in tagged})
    if space is None:
        # A silent choice would change the result.
        if len(there) > 1:
            raise ConfigError(
                f"{base} has images in the spaces {', '.join(there)}; choose one with --set dataset.space=..."
            )
        return tagged
    if space not in there:
        raise ConfigError(
            f"{base} has images in {', '.join(there)}, none in the space {space}; set dataset.space."
        )
    return [(path, found) for path, found in tagged if found.get("space", "native") == space]


def find_events(root: Path, entities: Mapping[str, str]) -> Path | None:
    """Return the events of a run: beside the raw image, or inherited from an upper folder."""
    return next(iter(_inherited(root, entities, "events", ".tsv")), None)


def _inherited(
    root: Path, entities: Mapping[str, str], suffix: str, extension: str, find: Finder | None = None
) -> list[Path]:
    """Return files whose entities all agree with the run's, the nearest and most specific first."""
    subject = root / f"sub-{entities['sub']}"
    folders = [subject / "func", subject, root]
    if "ses" in entities:
        session = subject / f"ses-{entities['ses']}"
        folders = [session / "func", session, *folders[1:]]
    found: list[Path] = []
    for folder in folders:
        level = []
        pattern = f"*_{suffix}{extension}"
        for path in sorted(folder.glob(pattern) if find is None else find(folder, pattern)):
            tags = parse_entities(path.name)
            if all(entities.get(key) == value for key, value in tags.items()):
                # BIDS' inheritance: within a folder, the file with more entities is nearer to the run.
                level.append((len(tags), path))
        found += [path for _, path in sorted(level, key=lambda item: -item[0])]
    return found


def merge_sidecars(
    root: Path,
    image: Path,
    entities: Mapping[str, str],
    suffix: str = "bold",
    find: Finder | None = None,
) -> dict[str, Any]:
    """Return the values of an image's sidecars: the one beside it and those inherited below `root`, nearest first.

    Parameters
    ----------
    suffix
        Of the inherited ones, as in ``task-rest_bold.json``.
    find
        Lists the files of a folder with a given name; for trees of many thousand runs, from an earlier listing.
    """
    # Some writers keep the second ending in the names of sidecars of CIFTI files, others do not.
    bare = re.sub(r"\.(nii(\.gz)?|gii|tsv|csv|npy)$", "", image.name)
    names = dict.fromkeys((f"{bare}.json", f"{re.sub(r'[.](dtseries|ptseries|func)$', '', bare)}.json"))
    paths = [image.with_name(name) for name in names if is_there(image.with_name(name))]
    merged: dict[str, Any] = {}
    # A later one overwrites, so that the nearest comes last.
    for path in reversed([*paths, *_inherited(root, entities, suffix, ".json", find)]):
        with refuse_damage(f"the sidecar {path} is not valid JSON", json.JSONDecodeError, UnicodeDecodeError):
            merged |= json.loads(path.read_text())
    return merged


def _find_products(image: Path, entities: Mapping[str, str]) -> tuple[Path | None, Path | None]:
    """Return confounds and brain mask of a preprocessed image, in either naming scheme."""
    name, folder = image.name, image.parent
    if _NEW.search(name):
        stem = _NEW.sub("", name)
        # Confounds belong to the run, in every space of its images.
        bare = re.sub(r"_(space|res|den|cohort)-[a-zA-Z0-9+]+", "", stem)
        confounds = [f"{bare}_desc-confounds_{end}.tsv" for end in ("timeseries", "regressors")]
        masks = [f"{stem}_desc-brain_mask.nii.gz", f"{stem}_desc-brain_mask.nii"]
    else:
        stem = re.sub(r"_preproc\.nii(\.gz)?$", "", name)
        bare = re.sub(r"_bold(_space-[a-zA-Z0-9]+)?$", "", stem)
        confounds = [f"{bare}_bold_confounds.tsv"]
        masks = [f"{stem}_brainmask.nii.gz", f"{stem}_brainmask.nii"]
    pick = [next((folder / n for n in names if is_there(folder / n)), None) for names in (confounds, masks)]
    return pick[0], pick[1]


Mask = Literal["auto", "brain", "varying", "epi"] | Path


def read_table(path: Path, wanted: Callable[[str], bool] | None = None) -> pd.DataFrame:
    """Read a BIDS table as text; nothing that looks like a number loses digits.

    Parameters
    ----------
    wanted
        Columns to read; by default all (a table of confounds may have hundreds).
    """
    import pandas as pd

    with refuse_damage(f"the table {path} cannot be read", OSError, ValueError):
        # Text: a picture called 021.50 is not 21.5.
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, usecols=wanted)
    return table.replace(dict.fromkeys(("n/a", "N/A", "nan", "NaN"), ""))


def read_numbers(table: pd.DataFrame, column: str, path: Path) -> np.ndarray:
    """Return a column of text as float64; a cell that is not a finite number is an error that names its line."""
    import pandas as pd

    numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        cell = table[column].iloc[bad[0]]
        raise DataError(
            f"{path} has {cell!r} in the column {column}, line {table.index[bad[0]] + 2}, but a number "
            "is expected; repair it."
        )
    return numbers


def read_header(path: Path) -> VolumeHeader:
    """Read the head of an image of several volumes; its time step is converted to seconds.

    Raises
    ------
    DataError
        If the file is damaged or holds only one volume.
    """
    header = read_volume_header(path)
    if header.n_volumes < 2:
        raise DataError(f"{path} holds one volume of shape {header.shape}; a run of BOLD has many.")
    # NIfTI may count in milliseconds, and nibabel does not convert.
    return replace(header, t_r=header.t_r * {"msec": 1e-3, "usec": 1e-6}.get(header.time_unit, 1.0))


def find_t_r(
    run: RunFiles, header: float, given: float | None, *, hint: str = "set dataset.t_r to the right one"
) -> float:
    """Return the repetition time in s: the given one, or that of the sidecar, which the header must not contradict."""
    if given is not None:
        return given
    sidecar = read_seconds(run, "RepetitionTime", hint=hint)
    if sidecar is None and header <= 0:
        raise DataError(f"neither the sidecar nor the header of {run.where} gives a repetition time; {hint}.")
    if sidecar is None:
        return header
    # Headers that were never filled in say 0 or 1.
    if header not in (0.0, 1.0) and abs(sidecar - header) > 0.005 * sidecar:
        raise DataError(
            f"{run.where} has a repetition time of {sidecar} s in its sidecar, but {header:g} s in its header; {hint}."
        )
    return sidecar


def read_seconds(run: RunFiles, key: str, *, hint: str) -> float | None:
    """Return a time of the sidecar in s, or None if it is missing; `DataError` if the value is not a time."""
    value = run.sidecar.get(key)
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise DataError(
            f"the sidecar of {run.where} says {key} {str(value)[:40]!r}, which is not a time in s; {hint}."
        )
    return seconds


def read_confounds(run: RunFiles, config: ConfoundsConfig) -> tuple[np.ndarray | None, tuple[Path, ...]]:
    """Return nuisance time courses of shape (n_volumes, n_confounds), or None, and the table they come from."""
    import pandas as pd

    if not config.strategy and not config.columns:
        return None, ()
    if run.confounds is None:
        raise DataError(
            f"{run.where} has no table of confounds in its folder; fetch it, or unset dataset.confounds."
        )
    if config.columns:
        table = read_table(run.confounds)
        for name in config.columns:
            if name not in table.columns:
                near = suggest(name, list(table.columns))
                raise DataError(
                    f"{run.confounds} has no column {name!r}{near}; correct dataset.confounds.columns."
                )
        picked = table[list(config.columns)].apply(pd.to_numeric, errors="coerce")
        # Derivatives of confounds have no value in the first volume.
        filled = picked.bfill(limit=1)
        if filled.isna().to_numpy().any():
            name = str(filled.columns[filled.isna().any()][0])
            raise DataError(f"{run.confounds} has gaps in the column {name!r} after its first volume.")
        return filled.to_numpy(float), (run.confounds,)
    from nilearn.interfaces.fmriprep import load_confounds

    # nilearn finds the table by the name of an image, but there may be no image beside the table.
    name = re.sub(
        r"_desc-confounds_(timeseries|regressors)\.tsv$", "_desc-preproc_bold.nii.gz", run.confounds.name
    )
    image = run.image if name == run.confounds.name else run.confounds.with_name(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table, _ = load_confounds(
                str(image), strategy=config.strategy, motion=config.motion, wm_csf=config.wm_csf,
                # The constant is among the nuisance regressors already.
                global_signal=config.global_signal, demean=False,
                n_compcor="all" if config.n_compcor is None else config.n_compcor,
            )  # fmt: skip
    except (ValueError, FileNotFoundError, KeyError) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"nilearn cannot load the confounds {', '.join(config.strategy)} of {run.where}: {text}; name columns "
            "with dataset.confounds.columns instead."
        ) from error
    return np.nan_to_num(table.bfill(limit=1).to_numpy(float)), (run.confounds,)


def find_masks(
    files: Sequence[RunFiles], runs: Sequence[BoldRun], mask: Mask
) -> Geometry | Mapping[str, Geometry] | MaskMethod:
    """Return the mask of each subject, one for all, or the method that computes it from the images."""
    if mask == "auto":
        mask = "brain" if all(run.mask is not None for run in files) else "epi"
    if isinstance(mask, Path):
        return read_mask(mask.expanduser())
    if mask != "brain":
        return mask
    masks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for run, opened in zip(files, runs, strict=True):
        if run.mask is None:
            raise DataError(
                f"{run.where} has no brain mask in its folder; set dataset.mask to epi, varying or a file."
            )
        found = read_mask(run.mask)
        assert found.mask is not None
        assert found.affine is not None
        check_grid(
            opened.shape,
            opened.affine,
            found.mask.shape,
            found.affine,
            what=opened.where,
            than="its brain mask",
        )
        subject = run.entities["sub"]
        # A voxel outside the brain in one run has no time series there.
        both = masks[subject][0] & found.mask if subject in masks else found.mask
        masks[subject] = (both, found.affine)
    if len({m.shape for m, _ in masks.values()}) == 1 and all(
        run.entities.get("space", "").startswith("MNI") for run in files
    ):
        # In a template the voxels of all subjects correspond, so one mask is used for all.
        common = np.logical_and.reduce([m for m, _ in masks.values()])
        return Geometry.from_mask(common, next(iter(masks.values()))[1])
    return {subject: Geometry.from_mask(m, affine) for subject, (m, affine) in masks.items()}


def read_mask(path: Path) -> Geometry:
    """Return the voxels above zero of an image.

    Raises
    ------
    DataError
        If the file is missing, is not one volume, or holds no such voxel.
    """
    values, affine = read_volume(path)
    if not (values > 0).any():
        raise DataError(f"the mask {path} has no voxel above zero.")
    return Geometry.from_mask(values > 0, affine)


_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


def find_image_folder(root: Path, places: Sequence[str]) -> Path | None:
    """Return the first of some usual folders below `root` that holds a picture."""
    folders = (root / place for place in places)
    # An empty folder is skipped: its pictures are not unpacked yet.
    return next((folder for folder in folders if any(_list_pictures(folder))), None)


def hash_image_folder(images: Path | None, beside: Path | None = None) -> dict[str, str]:
    """Return one digest of the names and bytes of the pictures in `images`, or in `beside` without it; none if neither.

    Without the digest, a run that was prepared without pictures would never notice pictures that were added later, and
    a run with changed pictures would continue with the old ones.
    """
    folder = images.expanduser() if images is not None else beside
    return {} if folder is None else {"images": digest_folder(folder, sorted(_list_pictures(folder)))}


def make_named_stimuli(
    table: pd.DataFrame, images: Path | None, *, title: str, beside: Path | None = None
) -> StimulusSet:
    """Return one row per stimulus.

    Parameters
    ----------
    table : DataFrame
        `stimulus_id`, `concept` and `path` (relative, or a bare file name with or without its suffix; empty for a
        stimulus without picture); repeated rows are allowed if they agree.
    images
        Folder of the pictures; None if they are not available.
    title
        Name of the set in messages.
    beside
        Folder that may hold the pictures if `images` is None; used if it holds all of them.

    Raises
    ------
    DataError
        If one id has two concepts or two paths, or a picture is missing or exists twice.
    """
    unique = table[["stimulus_id", "concept", "path"]].drop_duplicates().reset_index(drop=True)
    twice = unique[unique["stimulus_id"].duplicated(keep=False)]
    if len(twice):
        first = twice[twice["stimulus_id"] == twice["stimulus_id"].iloc[0]]
        raise DataError(
            f"{title}: the stimulus {first['stimulus_id'].iloc[0]!r} is listed as {first['concept'].iloc[0]!r} at "
            f"{first['path'].iloc[0]!r} and as {first['concept'].iloc[1]!r} at "
            f"{first['path'].iloc[1]!r}; an id must have one picture."
        )
    if images is None and beside is not None:
        try:
            return make_named_stimuli(unique, beside, title=title)
        except DataError:  # the folder was guessed, so its gaps are no error
            images = None
    if images is None:
        return StimulusSet(unique.assign(sha256=[hash_name(name) for name in unique["stimulus_id"]]))
    root = images.expanduser()
    if not root.is_dir():
        raise DataError(f"{title}: the folder of images {root} does not exist; correct dataset.images.")
    paths = _locate(unique["path"].tolist(), root, title)
    bring_all(root / path for path in paths if path)
    digests = [
        hash_file(root / path) if path else hash_name(name)
        for name, path in zip(unique["stimulus_id"], paths, strict=True)
    ]
    return StimulusSet(unique.assign(path=paths, sha256=digests), root)


def hash_name(name: str) -> str:
    """Return the sha256 of a name: the identity of a stimulus without a picture file."""
    return hashlib.sha256(name.encode()).hexdigest()


def check_no_overlap(trials: pd.DataFrame, *, title: str, hint: str = "") -> None:
    """Raise `DataError` if a stimulus is shown in training and in test trials."""
    train = set(trials.loc[trials["split"] == "train", "stimulus_id"])
    both = sorted(train & set(trials.loc[trials["split"] == "test", "stimulus_id"]))
    if both:
        text = f"{title}: {len(both)} stimuli are both trained on and tested, first {both[0]}"
        raise DataError(f"{text}; {hint}." if hint else f"{text}.")


def _locate(paths: list[str], root: Path, title: str) -> list[str]:
    index: dict[str, list[str]] = {}
    located: list[str] = []
    missing: list[str] = []
    for path in paths:
        if not path or (root / path).is_file():
            located.append(path)
            continue
        # Only if a path does not exist: listing a large folder takes seconds.
        index = index or _index_folder(root)
        name = path.rsplit("/", 1)[-1].lower()
        bare = name.rpartition(".")[0] if name.endswith(_SUFFIXES) else name
        found = index.get(name) or index.get(name + "*") or index.get(bare + "*") or []
        if len(found) > 1:
            raise DataError(
                f"{title}: {name} is below {root} twice, as {found[0]} and {found[1]}; remove one of them."
            )
        (located if found else missing).append(found[0] if found else path)
    if missing:
        raise DataError(
            f"{title}: {len(missing)} of {len(paths)} images are not below {root}, first {missing[0]}; unpack the "
            "image set there, or leave dataset.images out to work without pixels."
        )
    return located


def _index_folder(root: Path) -> dict[str, list[str]]:
    """Return relative paths by file name, and by name without suffix followed by a star, all in lower case."""
    index: dict[str, list[str]] = defaultdict(list)
    for relative in sorted(_list_pictures(root)):
        name = relative.rpartition("/")[2].lower()
        index[name].append(relative)
        index[name.rpartition(".")[0] + "*"].append(relative)
    return dict(index)


def _list_pictures(folder: Path) -> Iterator[str]:
    """Yield the paths of pictures relative to a folder, as text, since there may be tens of thousands."""
    if isinstance(folder, RemotePath):
        for path in folder.walk_files():
            if path.name.lower().endswith(_SUFFIXES):
                yield "/".join(path.parts[len(folder.parts) :])
        return
    for place, _, names in os.walk(folder):
        inner = place.removeprefix(str(folder)).strip(os.sep).replace(os.sep, "/")
        start = f"{inner}/" if inner else ""
        yield from (f"{start}{name}" for name in names if name.lower().endswith(_SUFFIXES))
