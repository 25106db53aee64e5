"""Which files of a BIDS tree belong to one run of fMRI: image, events, sidecars, confounds and mask.

Owns the entities in file names, raw data and fMRIPrep derivatives with both of its namings
(``_space-T1w_desc-preproc_bold``, and ``_bold_space-T1w_preproc`` before version 1.2), and inheritance of sidecars and
events from upper folders. Reads JSON only; never an image.

References
----------
Gorgolewski et al. (2016), doi:10.1038/sdata.2016.44: BIDS. Esteban et al. (2019), doi:10.1038/s41592-018-0235-4.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braindecode_vis.checks import ConfigError, DataError, suggest

_ENTITY = re.compile(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9+]+)")
_RAW = re.compile(r"_bold\.nii(\.gz)?$")
_NEW = re.compile(r"_desc-preproc_bold\.nii(\.gz)?$")
_OLD = re.compile(r"_bold(_space-[a-zA-Z0-9]+)?_preproc\.nii(\.gz)?$")
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
        Merged sidecars of the image, those nearest to it winning.
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
    for folder in (root, root / "derivatives" / "fmriprep", root / "fmriprep", root / "derivatives"):
        if folder.is_dir() and _holds_preprocessed(folder):
            return folder
    return None


def _holds_preprocessed(folder: Path) -> bool:
    return any(_NEW.search(p.name) or _OLD.search(p.name) for p in _walk(folder))


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
        Raw data set, which holds the events.
    derivatives
        Folder of preprocessed images; None reads the raw ones.
    space
        Space of the preprocessed images; None takes the only one there is.
    entities
        Wanted values of ``sub``, ``ses``, ``task``, ``acq`` and ``run``; None leaves one free.

    Raises
    ------
    DataError, ConfigError
        If nothing fits, the space is ambiguous, or a wanted value does not occur.
    """
    base = root if derivatives is None else derivatives
    pattern = _RAW if derivatives is None else None
    images = [p for p in sorted(_walk(base)) if _is_wanted(p.name, pattern)]
    tagged = [(path, parse_entities(path.name)) for path in images]
    if not tagged:
        kind = "raw *_bold.nii.gz" if derivatives is None else "preprocessed *_desc-preproc_bold.nii.gz"
        raise DataError(
            f"{base} holds no {kind} below sub-*/[ses-*/]func; pass the folder of the data set with --root, or that of "
            "fMRIPrep with --set dataset.derivatives=DIR."
        )
    for key, wanted in entities.items():
        tagged = _keep(tagged, key, wanted, base)
    tagged = _choose_space(tagged, space, base)
    runs = []
    for path, found in tagged:
        confounds, mask = (None, None) if derivatives is None else _find_products(path, found)
        runs.append(
            RunFiles(
                path, found, find_events(root, found), _merge_sidecars(root, path, found), confounds, mask
            )
        )
    _check_distinct(runs)
    return sorted(runs, key=_sort_key)


def _is_wanted(name: str, raw: re.Pattern[str] | None) -> bool:
    if raw is not None:
        return bool(raw.search(name)) and not _NEW.search(name)
    return bool(_NEW.search(name) or _OLD.search(name))


def _keep(
    tagged: list[tuple[Path, dict[str, str]]], key: str, wanted: Sequence[str] | None, base: Path
) -> list[tuple[Path, dict[str, str]]]:
    if wanted is None:
        return tagged
    there = sorted({found[key] for _, found in tagged if key in found})
    labels = {match_label(value, there, key=key, where=str(base)) for value in wanted}
    return [(path, found) for path, found in tagged if found.get(key) in labels]


def match_label(value: str, there: Sequence[str], *, key: str, where: str) -> str:
    """Return the label that is meant; a number may lack the zeros in front that the file names have.

    Raises
    ------
    DataError
        If there is no such label.

    Examples
    --------
    >>> match_label("1", ["01", "02"], key="sub", where="here")
    '01'
    """
    if value in there:
        return value
    same = [label for label in there if value.isdigit() and label.isdigit() and int(label) == int(value)]
    if len(same) == 1:
        return same[0]
    raise DataError(
        f"{where} has no image with {key}-{value}{suggest(value, list(there))}; it has "
        f"{', '.join(f'{key}-{v}' for v in there) or f'none with {key}-'}."
    )


def _choose_space(
    tagged: list[tuple[Path, dict[str, str]]], space: str | None, base: Path
) -> list[tuple[Path, dict[str, str]]]:
    there = sorted({found.get("space", "native") for _, found in tagged})
    if space is None:
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


def _check_distinct(runs: Sequence[RunFiles]) -> None:
    seen: dict[tuple[str, ...], Path] = {}
    for run in runs:
        key = tuple(run.entities.get(k, "") for k in _RUN_KEYS)
        if key in seen:
            raise DataError(
                f"{run.image.name} and {seen[key].name} are the same run; keep one of them, or choose with "
                "dataset.space."
            )
        seen[key] = run.image


def _sort_key(run: RunFiles) -> tuple[Any, ...]:
    return tuple(_natural(run.entities.get(key, "")) for key in _RUN_KEYS)


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(p), p) if p.isdigit() else (1, 0, p) for p in parts)


def find_events(root: Path, entities: Mapping[str, str]) -> Path | None:
    """Return the events of a run: beside the raw image, or inherited from an upper folder."""
    return next(iter(_inherited(root, entities, "events", ".tsv")), None)


def _inherited(root: Path, entities: Mapping[str, str], suffix: str, extension: str) -> list[Path]:
    """Return files whose entities all agree with the run's, the nearest and most specific first."""
    subject = root / f"sub-{entities['sub']}"
    folders = [subject / "func", subject, root]
    if "ses" in entities:
        session = subject / f"ses-{entities['ses']}"
        folders = [session / "func", session, *folders[1:]]
    found: list[Path] = []
    for folder in folders:
        level = []
        for path in sorted(folder.glob(f"*_{suffix}{extension}")):
            tags = parse_entities(path.name)
            if all(entities.get(key) == value for key, value in tags.items()):
                level.append((len(tags), path))
        found += [path for _, path in sorted(level, key=lambda item: -item[0])]
    return found


def _merge_sidecars(root: Path, image: Path, entities: Mapping[str, str]) -> dict[str, Any]:
    beside = image.with_name(re.sub(r"\.nii(\.gz)?$", ".json", image.name))
    paths = [beside] if beside.is_file() else []
    merged: dict[str, Any] = {}
    for path in reversed([*paths, *_inherited(root, entities, "bold", ".json")]):
        try:
            merged |= json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"the sidecar {path} is not valid JSON ({error}); fetch it again.") from error
    return merged


def _find_products(image: Path, entities: Mapping[str, str]) -> tuple[Path | None, Path | None]:
    """Return confounds and brain mask of a preprocessed image, in the naming of either version."""
    name, folder = image.name, image.parent
    if _NEW.search(name):
        stem = _NEW.sub("", name)
        bare = re.sub(r"_(space|res|den|cohort)-[a-zA-Z0-9+]+", "", stem)
        confounds = [f"{bare}_desc-confounds_{end}.tsv" for end in ("timeseries", "regressors")]
        masks = [f"{stem}_desc-brain_mask.nii.gz", f"{stem}_desc-brain_mask.nii"]
    else:
        stem = re.sub(r"_preproc\.nii(\.gz)?$", "", name)
        bare = re.sub(r"_bold(_space-[a-zA-Z0-9]+)?$", "", stem)
        confounds = [f"{bare}_bold_confounds.tsv"]
        masks = [f"{stem}_brainmask.nii.gz", f"{stem}_brainmask.nii"]
    pick = [next((folder / n for n in names if (folder / n).is_file()), None) for names in (confounds, masks)]
    return pick[0], pick[1]
