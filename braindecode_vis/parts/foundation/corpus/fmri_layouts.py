"""Which files below a root belong to one run of fMRI: fMRIPrep and other BIDS derivatives, the HCP, tables of parcels.

Owns the names: which file is an image or a table of time series, of whom, and what lies beside it (sidecars, confounds,
motion, mask). Opens sidecars alone.

References
----------
Esteban et al. (2019), doi:10.1038/s41592-018-0235-4: fMRIPrep. Glasser et al. (2013),
doi:10.1016/j.neuroimage.2013.04.127: files of the HCP. Mehta et al. (2024), doi:10.1162/imag_a_00257: XCP-D.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from braindecode_vis.base.checks import is_there
from braindecode_vis.base.remote import RemotePath
from braindecode_vis.datasets.bids.fmri_files import Finder, RunFiles, merge_sidecars, parse_entities
from braindecode_vis.datasets.corpus.recordings import Excluded

Kind = Literal["ptseries", "table", "dtseries", "volume", "surface"]
# What is parcellated needs no atlas file; surfaces blur less across sulci than volumes, which are there most often.
_KINDS: tuple[Kind, ...] = ("ptseries", "table", "dtseries", "volume", "surface")
_RUN_KEYS = ("sub", "ses", "task", "acq", "dir", "run")
_PATTERNS: dict[Kind, str] = {
    "ptseries": r"\.ptseries\.nii$",
    "table": r"_(timeseries|parcels)\.(tsv|csv|npy)$",
    "dtseries": r"\.dtseries\.nii$",
    "volume": r"_bold(_space-[a-zA-Z0-9]+_preproc)?\.nii(\.gz)?$|_bold_preproc\.nii(\.gz)?$",
    "surface": r"[_.](hemi-)?L[_.].*\.func\.gii$",
}
_ENDS = (".nii", ".nii.gz", ".gii", ".tsv", ".csv", ".npy", ".json")
_NO_SERIES = re.compile(r"desc-confounds|desc-(ICA|MELODIC)|_echo-|_part-phase")
# What a name says of an image beside the run that it is of.
_OF_IMAGE = re.compile(r"_(space|res|den|cohort|hemi|desc|seg|atlas|stat|label|model)-[a-zA-Z0-9+]+")
#: What the sidecar of a table may call the list of its parcels.
NAME_KEYS = ("Parcels", "ParcelNames", "Columns", "Labels")
_MNINONLINEAR, _RESULTS = "MNINonLinear", "Results"


@dataclass(frozen=True)
class SeriesImage:
    """One form in which the time series of a run are there.

    Parameters
    ----------
    kind
        ``ptseries`` and ``table`` hold parcels, ``dtseries`` grayordinates, ``volume`` voxels, ``surface`` vertices.
    files
        The file; of surfaces the left and the right one.
    run
        Names, sidecars, confounds and mask.
    motion
        Table of the motion alone: ``Movement_Regressors.txt`` of the HCP or ``_motion.tsv`` of XCP-D.
    outliers
        Table of the volumes that XCP-D found to have moved, which it cuts from what it cleaned in one of its modes.
    cleaned
        Whether its name says that confounds were regressed out.
    """

    kind: Kind
    files: tuple[Path, ...]
    run: RunFiles
    motion: Path | None
    outliers: Path | None
    cleaned: bool

    def without_sidecar(self) -> SeriesImage:
        """Return the image without what its sidecars say, once it was read."""
        return replace(self, run=replace(self.run, sidecar={}))

    @property
    def space(self) -> str:
        """Space in its name, ``native`` if it says none."""
        return self.run.entities.get("space", "native")

    @property
    def preprocessed(self) -> bool:
        """Whether it is more than what the scanner gave."""
        return self.kind != "volume" or self.space != "native" or "desc" in self.run.entities


def find_fmri_images(root: Path) -> tuple[list[list[SeriesImage]], list[Excluded]]:
    """Return the runs below a root, each in all the forms that are there, the best first, and files of nobody.

    Runs come in the order of their subjects, sessions, tasks and numbers.
    """
    groups: dict[tuple[str, ...], list[SeriesImage]] = {}
    strange = []
    paths: list[tuple[Path, Kind]] = []
    sidecars: dict[Path, list[Path]] = {}
    for path in _walk(root):
        if path.suffix == ".json":
            sidecars.setdefault(path.parent, []).append(path)
        elif (kind := _find_kind(path)) is not None:
            paths.append((path, kind))

    def list_sidecars(folder: Path, pattern: str) -> list[Path]:
        if folder not in sidecars and not folder.is_relative_to(root):
            return [*folder.glob(pattern)]  # the root is one subject of a larger tree
        return [path for path in sidecars.get(folder, []) if path.name.endswith(pattern.removeprefix("*"))]

    for path, kind in sorted(paths):
        if _MNINONLINEAR in path.parts:
            image = _describe_hcp(path, kind)
            if image is None:
                continue
        elif "sub" in (entities := parse_entities(path.name)):
            image = _describe_bids(root, path, kind, entities, list_sidecars)
        else:
            # BIDS tables of averages, stimuli or physiology have no subject, so these alone are told.
            if kind in ("ptseries", "dtseries"):
                strange.append(
                    Excluded(path, "neither its name nor its folders give the subject (sub-LABEL)")
                )
            continue
        key = tuple(image.run.entities.get(name, "") for name in _RUN_KEYS)
        groups.setdefault(key, []).append(image)
    # ICA-FIX of several runs leaves them joined beside themselves: rfMRI_REST beside rfMRI_REST1_LR.
    named: dict[str, list[str]] = {}
    for key, images in groups.items():
        if run := _get_hcp_run(images):
            named.setdefault(key[0], []).append(run)
    for key, images in list(groups.items()):
        joined = _get_hcp_run(images)
        parts = [run for run in named.get(key[0], []) if run != joined and run.startswith(joined)]
        if joined and parts:
            strange.append(
                Excluded(
                    images[0].files[0],
                    f"it is a concatenation of other runs that exist, such as {min(parts)}",
                )
            )
            del groups[key]
    order = sorted(groups, key=lambda key: [_order_naturally(part) for part in key])
    return [sorted(groups[key], key=_rank) for key in order], strange


def _walk(root: Path) -> Iterator[Path]:
    if isinstance(root, RemotePath):
        yield from root.walk_files()
        return
    seen: set[str] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to an upper folder has no end
            folders.clear()
            continue
        seen.add(real)
        # Hidden folders hold the objects of git-annex, work folders those of an unfinished fMRIPrep.
        folders[:] = [name for name in folders if not name.startswith(".") and name != "sourcedata"]
        yield from (Path(place, name) for name in names if name.endswith(_ENDS))


def _find_kind(path: Path) -> Kind | None:
    if _NO_SERIES.search(path.name):
        return None
    # Volumes of the HCP are called after their folder.
    if path.parent.parent.name == _RESULTS and re.fullmatch(
        re.escape(path.parent.name) + r"(_hp\d+)?(_clean)?\.nii(\.gz)?", path.name
    ):
        return "volume"
    return next((kind for kind in _KINDS if re.search(_PATTERNS[kind], path.name)), None)


def _rank(image: SeriesImage) -> tuple[Any, ...]:
    name = image.files[0].name
    # Of the forms of one kind: cleaned before not, areal alignment of the HCP before that of folding alone.
    return _KINDS.index(image.kind), not image.preprocessed, not image.cleaned, "MSMAll" not in name, name


def _order_naturally(text: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _describe_hcp(path: Path, kind: Kind) -> SeriesImage | None:
    """Return a file in ``SUBJECT/MNINonLinear/Results/RUN``, or None for what lies elsewhere below it."""
    place = path.parts.index(_MNINONLINEAR)
    inner = path.parts[place + 1 :]
    if len(inner) != 3 or inner[0] != _RESULTS or place == 0:
        return None
    found = re.match(r"[a-z]*fMRI_([a-zA-Z]+)", inner[1])
    entities = {"sub": path.parts[place - 1].removeprefix("sub-"), "run": inner[1]}
    entities |= {"task": found[1].lower()} if found else {}
    mask = path.with_name("brainmask_fs.2.nii.gz")
    motion = path.with_name("Movement_Regressors.txt")
    sidecar = merge_sidecars(path.parent, path, entities, find=lambda folder, pattern: [])
    files = _find_hemispheres(path) if kind == "surface" else (path,)
    run = RunFiles(
        path, {**entities, "space": "MNI152NLin6Asym"}, None, sidecar, None, mask if is_there(mask) else None
    )
    return SeriesImage(kind, files, run, motion if is_there(motion) else None, None, "_clean" in path.name)


def _describe_bids(
    root: Path, path: Path, kind: Kind, entities: Mapping[str, str], find: Finder
) -> SeriesImage:
    base = next((p.parent for p in path.parents if p.name == f"sub-{entities['sub']}"), root)
    sidecar: dict[str, Any] = {}
    # Those of the raw data, then of the derivatives; a table inherits what the scanner did, too.
    for folder in dict.fromkeys((root, base)):
        for suffix in dict.fromkeys(("bold", path.name.rpartition("_")[2].partition(".")[0])):
            sidecar |= merge_sidecars(folder, path, entities, suffix, find)
    stem = re.sub(
        r"(_bold)?(_space-[a-zA-Z0-9]+)?(_preproc)?(_(bold|timeseries|parcels))?\.[a-z.]+$", "", path.name
    )
    bare = _OF_IMAGE.sub("", stem)
    tables = [
        f"{bare}_desc-confounds_timeseries.tsv",
        f"{bare}_desc-confounds_regressors.tsv",
        f"{bare}_bold_confounds.tsv",
    ]
    motions = [f"{bare}_motion.tsv", f"{bare}_desc-filtered_motion.tsv"]
    masks = []
    if kind == "volume":
        ends = re.sub(r"_desc-[a-zA-Z0-9]+", "", re.sub(r"_bold\.nii(\.gz)?$", "", path.name))
        old = re.sub(r"_preproc\.nii(\.gz)?$", "_brainmask.nii", path.name)
        masks = [f"{ends}_desc-brain_mask.nii", *([old] if old != path.name else [])]
        masks = [name + end for name in masks for end in (".gz", "")]
    picks = [_pick(path, names) for names in (tables, motions, masks, [f"{bare}_outliers.tsv"])]
    files = _find_hemispheres(path) if kind == "surface" else (path,)
    run = RunFiles(path, entities, None, sidecar, picks[0], picks[2])
    return SeriesImage(kind, files, run, picks[1], picks[3], "desc-denoised" in path.name)


def _get_hcp_run(images: list[SeriesImage]) -> str:
    path = images[0].files[0]
    return path.parent.name if _MNINONLINEAR in path.parts else ""


def _find_hemispheres(left: Path) -> tuple[Path, ...]:
    right = re.sub(r"(?<=[_.])(hemi-)?L(?=[_.])", lambda found: (found[1] or "") + "R", left.name, count=1)
    return (left, left.with_name(right))


def _pick(path: Path, names: list[str]) -> Path | None:
    return next((path.with_name(name) for name in names if is_there(path.with_name(name))), None)
