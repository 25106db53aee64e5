"""BOLD5000 (Chang et al. 2019, ds001499): four subjects, about 5000 pictures of scenes, COCO and ImageNet.

Two data sets. `Bold5000BetasConfig` reads the single-trial betas of release 2.0 (GLMsingle), as volumes of each session
(``CSI1_GLMbetas-TYPED-FITHRF-GLMDENOISE-RR_ses-01.nii.gz`` with ``CSI1_brainmask.nii.gz``) or as tables of ten regions
(``..._allses_LHEarlyVis.npy``), and the list that names the picture of every trial, ``CSI1_imgnames.txt``. The names
are those that published readers of the release open; they were not checked on an original download. Test pictures are
those of ``repeated_stimuli_113_list.txt`` if it is found, else those that the subject saw more than once.

`Bold5000Config` reads the raw images, or fMRIPrep's of the release, which carry the names of its first versions
(``_bold_space-T1w_preproc``), and owns the meaning of the event tables: the kind of a picture (`ImgType`) and its name.
The 113 repeated pictures, whose kind begins with ``rep_``, are the test pictures, even if they are shown without that
mark (twice in the first session of CSI1).

References
----------
Chang, N. et al. (2019). BOLD5000, a public fMRI dataset while viewing 5000 visual images. Scientific Data 6, 49.
doi:10.1038/s41597-019-0052-3
Prince, J. S. et al. (2022), GLMsingle, doi:10.7554/eLife.77599.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import (
    ConfigError,
    DataError,
    check_columns,
    check_option,
    is_there,
    refuse_damage,
)
from braindecode_vis.base.digests import digest_file
from braindecode_vis.datasets.bids.fmri_dataset import BoldSettings, FmriRecipe, make_stimulus_id
from braindecode_vis.datasets.bids.fmri_files import (
    RunFiles,
    check_no_overlap,
)
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    check_subset,
    collect_findings,
    compare_fact,
    refuse_other_layout,
)
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    BetasPart,
    FmriSource,
    Geometry,
    Roi,
)
from braindecode_vis.datasets.sources.fmri_volumes import (
    MaskedVolumes,
    check_same_space,
    read_volume,
    read_volume_header,
)
from braindecode_vis.datasets.sources.pictured_betas import PicturedSettings

if TYPE_CHECKING:
    import pandas as pd

    from braindecode_vis.datasets.sources.bold_source import BoldSource

STIMULI = "BOLD5000_Stimuli"
_IMAGE_FOLDERS = ("stimuli", STIMULI)
LIST = "repeated_stimuli_113_list.txt"
IMAGERY_TASK = "imagery"
KINDS = ("imagenet", "coco", "scenes")
VERSION = "TYPED-FITHRF-GLMDENOISE-RR"
_FETCH = "fetch it with the betas of release 2.0"
LAYOUT = Layout(
    # In any folder below the root.
    names=File("{subject}_imgnames.txt", "other", "the list of pictures of BOLD5000", _FETCH),
    mask=File("{subject}_brainmask.nii.gz", "other", "the brain mask of BOLD5000", _FETCH),
    volumes=File(
        "{subject}_GLMbetas-{betas}_ses-{session:02d}.nii.gz", "other", "the betas of a session of BOLD5000", _FETCH,
    ),
    rois=File(
        "{subject}_GLMbetas-{betas}_allses_{roi}.npy", "npy", "the betas of a region of BOLD5000", _FETCH,
        {"betas": Array(("trial", "voxel"))},
    ),
)  # fmt: skip
_COCO, _IMAGENET = re.compile(r"^COCO_"), re.compile(r"^n\d{8}_")


class Bold5000BetasConfig(AtlasSettings, PicturedSettings):
    """Folder of the betas, and the form in which they are read.

    Parameters
    ----------
    root
        Folder below which the files are searched.
    subjects
        1 to 4; by default all that exist.
    betas
        Version of the model, as written in the file names.
    form
        ``volumes`` in each subject's space, tables of ``rois``, or the form that exists (``auto``: volumes first, and
        the same form for all subjects).
    rois
        Regions of the tables, for example ``[LHEarlyVis, RHLOC]``; all by default.
    images
        Folder of the pictures; ``stimuli`` or ``BOLD5000_Stimuli`` below the root by default, if it holds all of them.
    zscore
        As in `BetasPlan`. The tables do not mark the end of a session, so ``session`` means all sessions together
        there.
    """

    kind: Literal["bold5000_betas"] = "bold5000_betas"
    subjects: tuple[Annotated[int, Field(ge=1, le=4)], ...] | None = None
    betas: str = VERSION
    form: Literal["auto", "volumes", "rois"] = "auto"
    rois: tuple[str, ...] = ()

    title: ClassVar[str] = "BOLD5000"
    unit: ClassVar[str] = "percent signal change"

    def list_files(self) -> list[Path]:
        """Return the files of every subject, and the list of repeated pictures."""
        listed = _find_one(self.find_root(), LIST)
        return [path for found in self._find() for path in found.paths] + ([listed] if listed else [])

    def list_image_folders(self) -> tuple[str, ...]:
        """Return the usual folders of pictures below the root."""
        return _IMAGE_FOLDERS

    def open_betas(self) -> FmriSource:
        """Return the betas as lazy parts."""
        parts: list[BetasPart] = []
        geometries: dict[str, Geometry] = {}
        listed = _find_one(self.find_root(), LIST)
        tested = {_name(line) for line in listed.read_text().splitlines() if line.strip()} if listed else None
        for found in self._find():
            trials = read_names(found.names, found.subject, tested)
            opens = _open_rois if found.form == "rois" else _open_volumes
            opened, geometries[found.subject] = opens(found, trials)
            parts += opened
        parts, shown = self.number_parts(parts)
        parts = [replace(part, trials=part.trials.drop(columns="path")) for part in parts]
        n_test = shown.loc[shown["split"] == "test", "stimulus_id"].nunique()
        notes = {"protocol": f"BOLD5000 release 2.0, {self.betas}; test: {n_test} repeated pictures"}
        return self.join_subjects(parts, geometries, shown, notes)

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file and compare the number of repeated pictures with the declared one."""
        import pandas as pd

        source, declared = self.open_betas(), self.manifest.facts["n_repeated"]
        for subject in source.subjects:
            trials = pd.concat([part.trials for part in source.parts if part.group[0] == subject])
            n = trials.loc[trials["split"] == "test", "stimulus_id"].nunique()
            text = f"{len(trials)} trials, {source.find_geometry(subject).n_voxels} voxels"
            yield CheckFinding(f"subject {subject}", True, text)
            yield compare_fact(f"subject {subject} repeated pictures", n, declared, self.find_root())

    def _find(self) -> list[Found]:
        root = self.find_root()
        pattern = re.compile(
            rf"^CSI(\d)_GLMbetas-{re.escape(self.betas)}_(ses-\d+\.nii(\.gz)?|allses_\w+\.npy)$"
        )
        held: dict[str, list[Path]] = {}
        for path in sorted(root.rglob("CSI*_GLMbetas-*")):
            if match := pattern.match(path.name):
                held.setdefault(match[1], []).append(path)
        if not held:
            raise DataError(
                f"{root} holds no file like CSI1_GLMbetas-{self.betas}_ses-01.nii.gz; fetch release 2.0 from KiltHub, "
                "or correct dataset.betas."
            )
        wanted = None if self.subjects is None else [str(number) for number in self.subjects]
        chosen = check_subset(
            wanted, sorted(held), what=f"below {root}, BOLD5000 subject", option="dataset.subjects"
        )
        if self.form == "auto":
            volumes = {subject for subject in chosen if any(path.suffix != ".npy" for path in held[subject])}
            by_form = {"volumes": volumes, "rois": chosen}
            refuse_other_layout(by_form, None, where=root, option="dataset.form")
        return [self._pick_files(root, f"CSI{subject}", held[subject]) for subject in chosen]

    def _pick_files(self, root: Path, subject: str, paths: list[Path]) -> Found:
        volumes = [path for path in paths if path.suffix != ".npy"]
        tables = [path for path in paths if path.suffix == ".npy"]
        form: Literal["volumes", "rois"]
        form = ("volumes" if volumes else "rois") if self.form == "auto" else self.form
        chosen = volumes if form == "volumes" else tables
        if not chosen:
            raise DataError(f"{root} holds no {form} of {subject}; set dataset.form to what is there.")
        if form == "volumes" and self.rois:
            raise ConfigError("dataset.rois chooses among the tables of regions; set dataset.form to rois.")
        if self.rois:
            known = {path.stem.rpartition("_")[2]: path for path in chosen}
            for roi in self.rois:
                check_option(f"the region in dataset.rois of {subject}", roi, known)
            chosen = [known[roi] for roi in self.rois]
        names, mask = (
            _find_one(root, LAYOUT.place(Path(), name, subject=subject).name) for name in ("names", "mask")
        )
        if names is None or (form == "volumes" and mask is None):
            missing = LAYOUT.place(Path(), "names" if names is None else "mask", subject=subject)
            raise DataError(f"{missing} is not below {root}; {_FETCH}.")
        return Found(subject, form, tuple(chosen), names, mask if form == "volumes" else None)


@dataclass(frozen=True)
class Found:
    """The files of one subject."""

    subject: str
    form: Literal["volumes", "rois"]
    betas: tuple[Path, ...]
    names: Path
    mask: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.betas, self.names, *((self.mask,) if self.mask is not None else ()))


def read_names(path: Path, subject: str, tested: set[str] | None) -> pd.DataFrame:
    """Return the trials that ``imgnames.txt`` lists, one per line, in the order of the betas.

    Parameters
    ----------
    tested
        Names of the test pictures; None takes those that occur more than once.
    """
    import pandas as pd

    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    ids = pd.Series([_name(line) for line in lines], dtype=object)
    # Without the list, the pictures that a subject saw more than once are the repeated ones.
    counts = ids.map(ids.value_counts())
    # A repeated picture outside the list is an error below: one picture in training and test would leak.
    is_test = ids.isin(tested) if tested is not None else counts > 1
    again = (counts > 1) & ~is_test
    if again.any():
        raise DataError(
            f"{path} shows {ids[again].iloc[0]!r} more than once, but {LIST} does not list it: they are of different "
            "releases."
        )
    if not is_test.any():
        raise DataError(f"no picture of {path} is repeated or listed in {LIST}, so there are no test trials.")
    kinds = [find_kind(name) for name in ids]
    return pd.DataFrame(
        {
            "subject": subject, "session": "all", "run": "all", "stimulus_id": ids, "repetition": 0,
            "split": np.where(is_test, "test", "train"),
            "concept": [find_concept(name, kind) for name, kind in zip(ids, kinds, strict=True)],
            "image_type": kinds, "path": [re.sub(r"^rep_", "", line) for line in lines],
        }
    )  # fmt: skip


def find_kind(name: str) -> str:
    """Return by its name whether a picture is from COCO, from ImageNet or a scene.

    Examples
    --------
    >>> [find_kind(name) for name in ("COCO_train2014_000000113449", "n01641577_1229", "concert5")]
    ['coco', 'imagenet', 'scenes']
    """
    return "coco" if _COCO.match(name) else "imagenet" if _IMAGENET.match(name) else "scenes"


def _name(line: str) -> str:
    return re.sub(r"^rep_", "", make_stimulus_id(line))


def _find_one(root: Path, name: str) -> Path | None:
    return next(iter(sorted(root.rglob(name))), None)


def _open_volumes(found: Found, trials: pd.DataFrame) -> tuple[list[BetasPart], Geometry]:
    assert found.mask is not None
    values, affine = read_volume(found.mask)
    mask = values > 0
    headers = [read_volume_header(path) for path in found.betas]
    # imgnames.txt runs over all sessions, so a missing session shifts every name after it.
    n_found = sum(header.n_volumes for header in headers)
    if n_found != len(trials):
        raise DataError(
            f"the {len(headers)} session(s) of {found.subject} have {n_found} betas, but {found.names} lists "
            f"{len(trials)} pictures: sessions are missing, so betas cannot be matched to pictures reliably."
        )
    parts, start = [], 0
    for path, header in zip(found.betas, headers, strict=True):
        check_same_space(header, mask.shape, affine, what=f"the mask {found.mask.name}")
        # Known only from the files; tables of regions join all sessions.
        session = re.sub(r"^.*_ses-(\d+)\.nii.*$", r"\1", path.name)
        own = trials.iloc[start : start + header.n_volumes].assign(session=session).reset_index(drop=True)
        parts.append(BetasPart(own, (path,), int(mask.sum()), MaskedVolumes(header, mask)))
        start += header.n_volumes
    return parts, Geometry.from_mask(mask, affine)


def _open_rois(found: Found, trials: pd.DataFrame) -> tuple[list[BetasPart], Geometry]:
    tables = []
    for path in found.betas:
        with refuse_damage(f"{path} cannot be read as an array", OSError, ValueError):
            # Mapped: a table of all sessions is read a few trials at a time.
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        if table.ndim != 2 or len(table) != len(trials):
            raise DataError(
                f"{path} has the shape {table.shape}, but {found.names} lists {len(trials)} pictures; one row for each "
                "is expected."
            )
        tables.append(table)
    sizes = [table.shape[1] for table in tables]
    # The columns of the regions side by side; a voxel in two regions occurs twice.
    labels = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    names = {n: path.stem.rpartition("_")[2] for n, path in enumerate(found.betas, start=1)}

    def read(start: int, stop: int) -> np.ndarray:
        return np.concatenate([np.asarray(table[start:stop], np.float32) for table in tables], axis=1)

    geometry = Geometry(np.arange(sum(sizes)), rois={"roi": Roi(labels, names)})
    return [BetasPart(trials, found.betas, sum(sizes), read)], geometry


_LIST_PLACES = ("", "stimuli", STIMULI, f"{STIMULI}/Scene_Stimuli", "code")


class Bold5000Config(BoldSettings):
    """Folder of the data set; see `BoldSettings` for the options.

    The 113 repeated pictures are the test pictures. They are identified by `ImgType`; if
    ``repeated_stimuli_113_list.txt`` is found below the root, it must agree. Subjects are called ``CSI1`` to ``CSI4``.
    Concepts: the synset of an ImageNet picture, the name of a scene without its number; a COCO picture has no single
    concept and is its own concept.

    Parameters
    ----------
    tasks
        Tasks to read: the seen pictures (``5000scenes``), and a lab's own runs of ``imagery`` in the same subjects,
        which the published data set does not have. Their event tables name the imagined picture in `ImgName`, with
        `ImgType` ``imagery``; such trials are only test trials, with the id ``imagery_NAME``.
    """

    kind: Literal["bold5000"] = "bold5000"
    tasks: tuple[Literal["5000scenes", "imagery"], ...] = ("5000scenes",)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"tasks"})

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        digests, listed = super().hash_inputs(), self._find_list()
        return digests if listed is None else {**digests, LIST: digest_file(listed)}

    def make_recipe(self) -> FmriRecipe:
        """Return the task that is read, and the meaning of its tables."""
        task = {"task": self.tasks}
        return FmriRecipe("bold5000", task, read_scene_events, self._finish, image_folders=_IMAGE_FOLDERS)

    def open_bold(self) -> BoldSource:
        """Return the data set as lazy runs, and report the number of test pictures: 113 in the published files."""
        import pandas as pd

        source = super().open_bold()
        shown = pd.concat([run.trials for run in source.runs], ignore_index=True)
        tested = shown["split"] == "test"
        if "task" in shown:
            tested &= shown["task"] != IMAGERY_TASK
        n_test = shown.loc[tested, "stimulus_id"].nunique()
        return replace(source, notes={**source.notes, "protocol": f"test: the {n_test} repeated pictures"})

    def _find_list(self) -> Path | None:
        root = self.find_root()
        return next((root / p / LIST for p in _LIST_PLACES if is_there(root / p / LIST)), None)

    def _finish(self, trials: pd.DataFrame) -> pd.DataFrame:
        """Make a picture a test picture in all trials if it is one in any trial."""
        # A repeated picture is never a training picture, even if the mark is missing.
        imagined = trials["task"] == IMAGERY_TASK
        tested = set(trials.loc[(trials["split"] == "test") & ~imagined, "stimulus_id"])
        listed = self._find_list()
        if listed is not None:
            names = {make_stimulus_id(line) for line in listed.read_text().splitlines() if line.strip()}
            outside = sorted(tested - names)
            if outside:
                raise DataError(
                    f"{len(outside)} pictures of the kind rep_* are not in {listed.name}, first {outside[0]}; "
                    "list and events are of different releases."
                )
            tested |= names
        trials = trials.assign(split=np.where(imagined | trials["stimulus_id"].isin(tested), "test", "train"))
        if len(self.tasks) == 1:  # as it was before there was another
            trials = trials.drop(columns="task")
        check_no_overlap(trials, title="BOLD5000")
        return trials


def read_scene_events(table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
    """Return the trials of one run."""
    import pandas as pd

    assert run.events is not None
    check_columns(table.columns, ("ImgName", "ImgType"), what=f"the events table {run.events}")
    if run.entities.get("task") == IMAGERY_TASK:
        return _read_imagery(table, run)
    kinds = table["ImgType"].str.lower().str.removeprefix("rep_")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise DataError(
            f"{run.events} has pictures of the kind {unknown[0]!r}; {', '.join(KINDS)} are known."
        )
    names = table["ImgName"]
    if "stim_file" in table.columns:
        # The two columns have the same content; if they differ, the events are not those of the release.
        differ = (names.map(make_stimulus_id) != table["stim_file"].map(make_stimulus_id)) & (
            table["stim_file"] != ""
        )
        if differ.any():
            row = int(np.flatnonzero(differ)[0])
            raise DataError(
                f"{run.events} names {names.iloc[row]!r} and {table['stim_file'].iloc[row]!r} in row {row + 2}; "
                "fetch the table again."
            )
    ids = names.map(make_stimulus_id)
    return pd.DataFrame(
        {
            "stimulus_id": ids,
            "concept": [find_concept(name, kind) for name, kind in zip(ids, kinds, strict=True)],
            "path": names,
            "split": np.where(table["ImgType"].str.lower().str.startswith("rep_"), "test", "train"),
            "trial_type": kinds,
            "image_type": kinds,
            "task": "5000scenes",
        }
    )


def _read_imagery(table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
    """Return the trials of a run of imagery, which have no picture of their own."""
    import pandas as pd

    other = table[table["ImgType"].str.lower() != IMAGERY_TASK]
    if len(other):
        raise DataError(
            f"{run.events} is of the task imagery, but row {other.index[0] + 2} has the ImgType "
            f"{other['ImgType'].iloc[0]!r}; imagined pictures have {IMAGERY_TASK!r}."
        )
    names = [_name(name) for name in table["ImgName"]]
    kinds = [find_kind(name) for name in names]
    return pd.DataFrame(
        {
            "stimulus_id": [f"imagery_{name}" for name in names],
            "concept": [find_concept(name, kind) for name, kind in zip(names, kinds, strict=True)],
            "path": "", "split": "test", "trial_type": IMAGERY_TASK, "image_type": IMAGERY_TASK, "task": IMAGERY_TASK,
        }
    )  # fmt: skip


def find_concept(name: str, kind: str) -> str:
    """Return the concept of a picture.

    Examples
    --------
    >>> find_concept("n01641577_1229", "imagenet"), find_concept("concert5", "scenes")
    ('n01641577', 'concert')
    >>> find_concept("COCO_train2014_000000113449", "coco")
    'COCO_train2014_000000113449'
    """
    if kind == "imagenet":
        return name.split("_", 1)[0]
    return re.sub(r"_?\d+$", "", name) or name if kind == "scenes" else name
