"""CNeuroMod-THINGS (St-Laurent et al. 2025): a memory task with THINGS images, four subjects, 33 to 36 sessions each.

Owns the pairing of GLMsingle's single-trial betas (one HDF5 file per subject: one group per session, in it one group
per run, and the mask as an array) with the BIDS events, whose rows are in the order of the betas. The split is ours,
since none was published: categories by their number in the task, or the last exemplar of each category.

The betas were standardised per voxel over all trials of a subject by the authors, test trials included; the public
collection has no other betas. Files of a DataLad collection that were not fetched are broken links, and reported as
such.

References
----------
St-Laurent, Pinsard, Contier et al. (2025), arXiv:2507.09024; layout as in courtois-neuromod/cneuromod-things@0f22b6c5
and courtois-neuromod/things.glmsingle@41798880.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_file
from braindecode_vis.datasets.bids.fmri_files import read_numbers
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.manifests import CheckFinding, check_subset, collect_findings, compare_fact
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    BetasPart,
    FmriSource,
    Geometry,
    Roi,
)
from braindecode_vis.datasets.sources.fmri_volumes import check_same_space, read_volume, read_volume_header
from braindecode_vis.datasets.sources.pictured_betas import PicturedSettings

if TYPE_CHECKING:
    import pandas as pd

_STEM = "sub-{subject:02d}_task-things_space-T1w_model-fitHrfGLMdenoiseRR"
_FETCH = "fetch it with datalad get, or correct the root"
LAYOUT = Layout(
    # Below the collection of betas.
    betas=File(
        "sub-{subject:02d}/glmsingle/output/" + _STEM + "_{stat}-trialBetas_desc-zscore_statseries.h5",
        "hdf5",
        what="the file of betas of CNeuroMod-THINGS",
        hint=_FETCH,
        arrays={
            # Of one run, standardised per voxel over all trials of the subject.
            "{session}/{run}/betas": Array(("trial of {session}/{run}", "voxel")),
            "mask_array": Array(("x", "y", "z")),
            "mask_affine": Array(("row", "column")),
        },
    ),
    ceiling=File(
        "sub-{subject:02d}/glmsingle/output/" + _STEM + "_stat-noiseCeilings_statmap.nii.gz",
        "other", "the map of noise ceilings of CNeuroMod-THINGS", _FETCH,
    ),
    # Below the collection of the task.
    events=File(
        "sub-{subject:02d}/ses-{session:02d}/func/sub-{subject:02d}_ses-{session:02d}_task-things_run-{run:02d}_events.tsv",
        "tsv", "the table of events of CNeuroMod-THINGS", _FETCH, columns=("image_path", "category_nr", "exemplar_nr"),
    ),
    # Below the collection of regions.
    roi=File(
        "sub-{subject:02d}/rois/task-derived/sub-{subject:02d}_task-floc_space-T1w_stats-tscores_contrast-{contrast}_roi-{roi}"
        "_cutoff-2.0_desc-unsmooth_mask.nii.gz",
        "other", "the mask of a region of CNeuroMod-THINGS", _FETCH,
    ),
)  # fmt: skip
# The superdataset, and single collections cloned side by side, as DataLad names them.
GLMSINGLE_PLACES = ("THINGS/glmsingle", "glmsingle", "things.glmsingle", "")
EVENTS_PLACES = (
    "THINGS/fmriprep/sourcedata/things", "fmriprep/sourcedata/things", "things.fmriprep/sourcedata/things",
    "sourcedata/things", "things", "",
)  # fmt: skip
ROI_PLACES = ("fLoc/rois", "floc.rois", "rois")
IMAGE_PLACES = tuple(
    f"{place}/stimuli/{name}".lstrip("/") for place in EVENTS_PLACES for name in ("images_fmri", "images")
)


class CneuromodThingsConfig(AtlasSettings, PicturedSettings):
    """Folder of the collection, subjects to read, and the test images.

    Parameters
    ----------
    root
        The folder ``cneuromod-things``, or one with the collections ``things.glmsingle`` and ``things``.
    events
        Folder of the events (``sub-01/ses-01/func/*_events.tsv``); found below the root by default.
    subjects
        Numbers to read; by default all that exist. Voxels of different subjects do not correspond.
    sessions
        Numbers to read; all by default.
    test
        ``concepts`` tests categories that are never trained on, ``exemplars`` the sixth image of each category, whose
        other images are trained on. Neither was published.
    rois
        Regions of the localiser whose union is kept, by name: ``FFA``, ``OFA``, ``pSTS``, ``EBA``, ``PPA``, ``OPA``,
        ``MPA``; the whole mask by default.
    mask_file
        A mask volume of your own in the space of the betas; voxels above 0.
    min_noise_ceiling
        Keep voxels whose published noise ceiling (percent) is at least this. It was computed from all repeated images,
        test images included; the notes of the result mention this.
    images
        Folder of the THINGS images; ``stimuli/images_fmri`` beside the events by default, if it holds all of them.
    """

    kind: Literal["cneuromod_things"] = "cneuromod_things"
    events: Path | None = None
    subjects: tuple[int, ...] | None = None
    sessions: tuple[int, ...] | None = None
    test: Literal["concepts", "exemplars"] = "concepts"
    rois: tuple[str, ...] = ()
    mask_file: Path | None = None
    min_noise_ceiling: float | None = None

    #: With ``concepts``, every so manieth category is tested, by its number in the task (720 of them), whatever
    #: is read.
    test_every: ClassVar[int] = 10
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"test_every"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"unanswered": "keep"}

    # The content of the files is hashed with the inputs; their place does not matter.
    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "events", "images", "mask_file"})

    title: ClassVar[str] = "CNeuroMod-THINGS"
    unit: ClassVar[str] = "z over all trials"

    def list_files(self) -> list[Path]:
        """Return betas, events, regions and noise ceilings of every subject, and the mask that is set."""
        paths: list[Path] = []
        for subject in self._find_subjects():
            paths.append(self._find_betas(subject))
            paths += [path for _, path in sorted(self._list_events(subject).items())]
            paths += [path for name in self.rois for path in self._find_roi(subject, name)]
            ceiling = self._find_ceiling(subject)
            paths += [ceiling] if ceiling is not None else []
        return paths + ([self.mask_file.expanduser()] if self.mask_file is not None else [])

    def list_image_folders(self) -> tuple[str, ...]:
        """Return the folders below the root in which pictures are usually unpacked."""
        beside = [] if self.events is None else [f"{self.events.expanduser()}/stimuli/images_fmri"]
        return (*beside, *IMAGE_PLACES, "object_images", "images_fmri")

    def open_betas(self) -> FmriSource:
        """Return the betas as lazy runs."""
        parts: list[BetasPart] = []
        geometries: dict[str, Geometry] = {}
        for subject in self._find_subjects():
            opened, geometries[f"{subject:02d}"] = self._open_subject(subject)
            parts += opened
        parts, shown = self.number_parts(parts)
        self._check_split(shown)
        shown["path"] = shown["concept"] + "/" + shown["stimulus_id"] + ".jpg"
        notes: dict[str, Any] = {"protocol": self._describe(shown), "rois_kept": list(self.rois)}
        if self.min_noise_ceiling is not None:
            notes["voxels_chosen_with_test_images"] = f"noise ceiling >= {self.min_noise_ceiling:g} %"
        return self.join_subjects(parts, geometries, shown, notes)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, pair events with betas, and compare images and trials of each subject with the manifest."""
        import pandas as pd

        source, root, facts = self.open_betas(), self.find_root(), self.manifest.facts
        for subject in source.subjects:
            own = [part.trials for part in source.parts if part.group[0] == subject]
            trials = pd.concat(own)
            text = f"{len(trials)} trials in {len(own)} runs, {source.find_geometry(subject).n_voxels} voxels"
            yield CheckFinding(f"subject {subject}", True, text)
            if self.sessions is None:
                n = int(trials["stimulus_id"].nunique())
                declared = facts["n_images"].get(int(subject))
                yield compare_fact(f"subject {subject} images", n, declared, root, what="images")
            lengths = sorted({len(table) for table in own})
            yield compare_fact(f"subject {subject} trials a run", lengths, facts["trials_per_run"], root)
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    # --- files ----------------------------------------------------------------------------------------------

    def _find_subjects(self) -> list[int]:
        root = self.find_root()
        folders = [root / place for place in GLMSINGLE_PLACES]
        there = sorted(
            {
                int(path.parts[-3][4:])
                for folder in folders
                for path in folder.glob("sub-[0-9]*/glmsingle/output")
            }
        )
        if not there:
            expected = LAYOUT.place(Path(GLMSINGLE_PLACES[0]), "betas", subject=1, stat="stat")
            raise DataError(
                f"no betas of CNeuroMod-THINGS are below {root}: expected {expected}; install the collection and fetch "
                "them with datalad get."
            )
        return check_subset(self.subjects, there, what="CNeuroMod-THINGS subject", option="dataset.subjects")

    def _find_collection(self, subject: int) -> Path:
        places = [self.find_root() / place for place in GLMSINGLE_PLACES]
        return next(place for place in places if (place / f"sub-{subject:02d}/glmsingle/output").is_dir())

    def _find_betas(self, subject: int) -> Path:
        """Return the file of single trials; earlier releases wrote ``stats`` for ``stat``."""
        folder = self._find_collection(subject)
        stats = [
            stat
            for stat in ("stat", "stats")
            if LAYOUT.place(folder, "betas", subject=subject, stat=stat).exists()
        ]
        return LAYOUT.find(folder, "betas", subject=subject, stat=[*stats, "stat"][0])

    def _find_ceiling(self, subject: int) -> Path | None:
        if self.min_noise_ceiling is None:
            return None
        return LAYOUT.find(self._find_collection(subject), "ceiling", subject=subject)

    def _find_roi(self, subject: int, name: str) -> list[Path]:
        root = self.find_root()
        found = [
            path
            for place in ROI_PLACES
            for path in sorted(
                (root / place).glob(
                    f"sub-{subject:02d}/**/sub-{subject:02d}_task-floc_space-T1w*_roi-{name}_*mask.nii.gz"
                )
            )
        ]
        # Masks come smoothed and unsmoothed: the unsmoothed ones are those of the published analyses.
        found = [path for path in found if "desc-smooth" not in path.name] or found
        if not found:
            known = sorted(
                {
                    match[1]
                    for place in ROI_PLACES
                    for path in (root / place).glob(f"sub-{subject:02d}/**/*_roi-*_*mask.nii.gz")
                    if (match := re.search(r"_roi-([A-Za-z0-9]+)_", path.name))
                }
            )
            raise ConfigError(
                f"no mask of the region {name!r} of subject {subject:02d} is below {root / ROI_PLACES[0]}; "
                f"{'there are ' + ', '.join(known) if known else 'fetch the collection floc.rois'}."
            )
        what = LAYOUT.files["roi"]
        return [check_file(path, what=what.what, hint=what.hint) for path in found]

    def _find_events_folder(self) -> Path:
        root = self.find_root()
        places = [self.events.expanduser()] if self.events else [root / place for place in EVENTS_PLACES]
        folder = next((place for place in places if any(place.glob("sub-*/ses-*/func/*_events.tsv"))), None)
        if folder is None:
            raise DataError(
                f"no events of CNeuroMod-THINGS are at {places[0]} (sub-01/ses-01/func/*_task-things_run-01_"
                "events.tsv); fetch THINGS/fmriprep/sourcedata/things with datalad get, or give their "
                "folder with --set dataset.events=DIR."
            )
        return folder

    def _list_events(self, subject: int) -> dict[tuple[int, int], Path]:
        """Return the events by session and run."""
        folder = self._find_events_folder()
        found = LAYOUT.list_labels(folder, "events", subject=subject)
        runs = sorted((int(labels["session"]), int(labels["run"])) for labels in found)
        return {
            (session, run): LAYOUT.place(folder, "events", subject=subject, session=session, run=run)
            for session, run in runs
        }

    # --- one person -----------------------------------------------------------------------------------------

    def _open_subject(self, subject: int) -> tuple[list[BetasPart], Geometry]:
        path = self._find_betas(subject)
        betas = read_layout(path)
        geometry, keep = self._choose_voxels(subject, betas)
        events = self._list_events(subject)
        wanted = sorted(betas.runs)
        sessions = check_subset(
            self.sessions, sorted({session for session, _ in wanted}),
            what=f"subject {subject:02d}, session", option="dataset.sessions",
        )  # fmt: skip
        parts = []
        for session, run in wanted:
            if session not in sessions:
                continue
            where = f"subject {subject:02d}, session {session:02d}, run {run:02d}"
            if (session, run) not in events:
                raise DataError(f"{path} holds betas of {where}, but its events are not there; fetch them.")
            file = check_file(
                events[session, run], what=f"the events of {where}", hint=LAYOUT.files["events"].hint
            )
            trials = read_trials(file, subject, session, run)
            if len(trials) != betas.runs[session, run]:
                raise DataError(
                    f"{where}: {file.name} lists {len(trials)} trials, but {path.name} has {betas.runs[session, run]} "
                    "betas: they are of different releases, fetch both again."
                )
            trials["split"] = np.where(self._is_tested(trials), "test", "train")
            if len(trials):
                read = partial(_read_run, path, betas.names[session, run], keep)
                parts.append(BetasPart(trials, (path, file), len(keep), read))
        return parts, geometry

    def _is_tested(self, trials: pd.DataFrame) -> np.ndarray:
        if self.test == "concepts":
            return (trials["category_nr"] % self.test_every == 0).to_numpy()
        # If a category without a sixth image were allowed, subjects would have different test images.
        return (trials["exemplar_nr"] == 6).to_numpy()

    def _check_split(self, shown: pd.DataFrame) -> None:
        missing = {"train", "test"} - set(shown["split"])
        if missing:
            how = (
                f"every category whose number is a multiple of {self.test_every}"
                if self.test == "concepts"
                else "the sixth image of every category"
            )
            raise DataError(
                f"CNeuroMod-THINGS has no {missing.pop()} trial: {how} is tested; change dataset.test, or "
                "read more sessions."
            )

    def _choose_voxels(self, subject: int, betas: BetasFile) -> tuple[Geometry, np.ndarray]:
        """Return the geometry of the kept voxels, and their columns in the file."""
        mask = betas.mask
        chosen = np.ones(int(mask.sum()), bool)
        rois = {
            name: np.any([_read_in_space(path, betas) > 0 for path in self._find_roi(subject, name)], axis=0)
            for name in self.rois
        }
        if rois:
            chosen &= np.any([values > 0 for values in rois.values()], axis=0)
        if self.mask_file is not None:
            chosen &= _read_in_space(self.mask_file.expanduser(), betas) > 0
        ceiling_path = self._find_ceiling(subject)
        maps: dict[str, np.ndarray] = {}
        if ceiling_path is not None:
            ceiling = np.nan_to_num(_read_in_space(ceiling_path, betas))
            chosen &= ceiling >= self.min_noise_ceiling
            maps["noise_ceiling"] = ceiling
        if not chosen.any():
            raise ConfigError(
                f"no voxel of subject {subject:02d} is left; lower dataset.min_noise_ceiling, or name other "
                "dataset.rois."
            )
        regions = {name: Roi(values.astype(np.int16), {1: name}) for name, values in rois.items()}
        geometry = Geometry.from_mask(mask, betas.affine, regions, maps)
        return geometry.select(chosen), np.flatnonzero(chosen)

    def _describe(self, shown: pd.DataFrame) -> str:
        counts = shown.groupby("split")["stimulus_id"].nunique()
        who = ", ".join(sorted(set(shown["subject"])))
        tested = (
            f"unseen categories (every {self.test_every}th)"
            if self.test == "concepts"
            else "categories trained on"
        )
        return (
            f"CNeuroMod-THINGS subject {who}, {shown['session'].nunique()} sessions: {counts['train']} training "
            f"images, {counts['test']} test images of {tested}, a split of ours; betas standardised over all "
            "trials of the subject by their authors, test trials included"
        )


@dataclass(frozen=True)
class BetasFile:
    """Content of one file of betas.

    Parameters
    ----------
    path
        The file.
    runs
        Number of trials by session and run.
    names
        Name of the data set in the file by session and run, ``10/2/betas``.
    mask : bool array of shape (x, y, z)
        Voxels of the columns, in C order.
    affine : array of shape (4, 4)
    """

    path: Path
    runs: dict[tuple[int, int], int]
    names: dict[tuple[int, int], str]
    mask: np.ndarray
    affine: np.ndarray


def read_layout(path: Path) -> BetasFile:
    """Read sessions, runs and mask of ``..._stat-trialBetas_..._statseries.h5``, but no betas.

    Raises
    ------
    DataError
        If the file is damaged, or betas and mask do not belong together.
    """
    with LAYOUT.open(path, "betas") as file:
        mask, affine = file.read("mask_array") > 0, file.read("mask_affine").astype(float)
        shapes = {
            (int(labels["session"]), int(labels["run"])): (file.content[key].shape, key)
            for key, labels in file.find("{session}/{run}/betas")
        }
    n_voxels = int(mask.sum())
    if not shapes:
        raise DataError(
            f"{path} contains no sessions; it is another file, or the file of image means (imageBetas)."
        )
    for (session, run), (shape, _) in shapes.items():
        if len(shape) != 2 or shape[1] != n_voxels:
            raise DataError(
                f"{path}, session {session:02d}, run {run:02d}: betas of shape {shape} do not fit the mask of "
                f"{n_voxels} voxels; fetch the file again."
            )
    runs = {key: int(shape[0]) for key, (shape, _) in shapes.items()}
    return BetasFile(path, runs, {key: name for key, (_, name) in shapes.items()}, mask, affine)


def _read_run(path: Path, key: str, columns: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return some trials of one run, float32 of shape (stop - start, len(columns))."""
    with LAYOUT.open(path, "betas") as file:
        axis = f"trial of {key.removesuffix('/betas')}"
        # Whole rows: picking columns in the file is slower than reading a run of a few MB.
        block = file.read(key, part={axis: slice(start, stop)})
    return np.asarray(block[:, columns], np.float32)


def read_trials(path: Path, subject: int, session: int, run: int) -> pd.DataFrame:
    """Return the trials of one run in the order of its events, which is the order of the betas.

    Raises
    ------
    DataError
        If a column is missing, or an image has no name.
    """
    import pandas as pd

    table = LAYOUT.read_table(path, "events")
    names = [re.split(r"[/\\]", str(image))[-1].rpartition(".")[0] for image in table["image_path"]]
    odd = [n for n, name in enumerate(names) if "_" not in name]
    if odd:
        raise DataError(
            f"{path}: trial {odd[0] + 1} names the image {table['image_path'].iloc[odd[0]]!r}; names such as "
            "images_fmri/acorn/acorn_01b.jpg are expected."
        )
    answered = table["response"].notna() if "response" in table.columns else np.ones(len(table), bool)
    return pd.DataFrame(
        {
            "subject": f"{subject:02d}", "session": f"{session:02d}", "run": f"{run:02d}", "stimulus_id": names,
            "repetition": 0, "concept": [name.rpartition("_")[0] for name in names],
            "category_nr": read_numbers(table, "category_nr", path).astype(int),
            "exemplar_nr": read_numbers(table, "exemplar_nr", path).astype(int),
            "answered": np.asarray(answered, bool),
        }
    )  # fmt: skip


def _read_in_space(path: Path, betas: BetasFile) -> np.ndarray:
    """Return a volume in the voxels of the mask."""
    check_same_space(
        read_volume_header(path), betas.mask.shape, betas.affine, what=f"the mask in {betas.path.name}"
    )
    return read_volume(path)[0][betas.mask]
