"""LAION-fMRI (Zerbe et al. 2026): 7 T fMRI of five people, 30 open sessions each, 25 052 pictures.

Owns the files of the public bucket: GLMsingle betas of a session (one volume a trial), which are read through a mask or
regions and never as a whole; the table that names the picture (`label`) of each beta; noise ceilings; regions in the
folders of both releases; pictures in an HDF5 file of encoded images; and the authors' splits, one JSON file each.

Voxels at the edge of the mask are NaN in some sessions. They are left out of all sessions and named. A label gives
the source of a picture, and who saw it: all people, or one of them.

References
----------
Zerbe, Roth, Mell, Herholz, Knapen, Hebart (2026), LAION-fMRI, Vision Sciences Society Annual Meeting;
https://laion-fmri.hebartlab.com; files as in ViCCo-Group/LAION-fMRI@eee8400a and its later documentation.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from braindecode_vis.base.checks import ConfigError, DataError, check_option, is_there, refuse_damage
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.remote import bring, open_hdf5
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.bids.fmri_files import check_no_overlap, hash_name
from braindecode_vis.datasets.layout import File, Layout
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    Label,
    check_subset,
    collect_findings,
    compare_facts,
)
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    BetasPart,
    FmriSource,
    Geometry,
    Roi,
    join_geometries,
    keep_rows,
    number_betas,
)
from braindecode_vis.datasets.sources.fmri_volumes import (
    MaskedVolumes,
    check_same_space,
    read_volume,
    read_volume_header,
)

if TYPE_CHECKING:
    import pandas as pd

_SUBJECT = "derivatives/glmsingle-tedana/sub-{subject}"
_SESSION = f"{_SUBJECT}/ses-{{session}}/func/sub-{{subject}}_ses-{{session}}_task-images"
_FETCH = "fetch it from the bucket"
LAYOUT = Layout(
    betas=File(
        f"{_SESSION}_space-T1w_stat-effect_desc-SingletrialBetas_statmap.nii.gz", "other", "the betas of a session",
        _FETCH,
    ),
    trials=File(
        f"{_SESSION}_desc-SingletrialBetas_trials.tsv", "tsv", "the table of trials", _FETCH,
        columns=("session", "run", "beta_index", "label"),
    ),
    mask=File(
        f"{_SUBJECT}/sub-{{subject}}_task-images_space-T1w_desc-meanR2gt15mask_mask.nii.gz", "other", "the mask",
        f"{_FETCH}, or name regions with dataset.mask",
    ),
    # In percent of the variance, from pictures shown 4 times, 12 times, or all.
    ceiling=File(
        f"{_SUBJECT}/sub-{{subject}}_task-images_space-T1w_desc-Noiseceiling{{shown}}_statmap.nii.gz", "other",
        "a noise ceiling", _FETCH,
    ),
    region=File(
        "derivatives/rois/sub-{subject}/{set}/sub-{subject}_space-T1w_res-1pt8_label-{roi}_mask.nii.gz", "other",
        "a region", _FETCH,
    ),
    # As the code of the first release has them.
    early_region=File("derivatives/atlases/sub-{subject}/rois/{roi}.nii.gz", "other", "a region", _FETCH),
    split=File("splits/{pool}/{split}.json", "other", "a split of the authors", "fetch the part splits"),
    index=File("stimuli/task-images_metadata.csv", "csv", "the list of pictures", _FETCH, columns=("image_name",)),
    pictures=File(
        "stimuli/task-images_stimuli.h5", "other", "the file of pictures",
        "ask for it with the form https://laion-fmri.hebartlab.com/request, or leave the pictures out with --set "
        "dataset.with_images=false",
    ),
    # Targets of a run read these two.
    embeddings=File("stimuli/task-images_desc-{model}_embeddings.h5", "other", "embeddings of the pictures", _FETCH),
    captions=File("stimuli/task-images_desc-captions.csv", "csv", "the captions", _FETCH, columns=("image_name",)),
)  # fmt: skip
OWNERS = {"p01": "01", "p02": "06", "p03": "05", "p04": "03", "p05": "07"}
"""Person who alone saw a picture, by the end of its name; equal in every split file of a person."""
_LAST_SESSION = 30
_SIDES = {"train": "for training", "test": "for testing"}
_GREY = (128, 128, 128)
# Voxels at the edge are few; more than this share is another problem.
_LARGEST_GAP, _NAMED = 0.2, 8
WARNING = (
    "240 of the pictures that all people saw are from NSD (its special 1000, usually the test pictures): a model that "
    "was trained or chosen on NSD has seen them"
)
RANDOM_WARNING = (
    "the authors' random splits of single people hold copies of training pictures among the test pictures before their "
    "release of 28 September 2026: use later files, or another split."
)

Gaps = dict[str, list[list[int]]]
"""Indices of the voxels without betas, by subject and session."""


class LaionFmriConfig(AtlasSettings):
    """People, sessions and voxels to read, and the split of the authors.

    Parameters
    ----------
    root
        Folder with ``derivatives``, ``stimuli`` and ``splits``.
    subjects
        ``01``, ``03``, ``05``, ``06``, ``07``; by default all that exist. Several need `atlas` or `pad_subjects`.
    sessions
        Numbers from 1 to 30, or how many sessions from the first one on; by default all of these that exist. 31 to 34,
        which the authors hold back, are never read.
    mask
        ``brain`` (mean R2 above 15 %), or regions joined by commas, as in ``V1v,V1d,laionventral``.
    mask_file
        A mask volume of your own instead; voxels above 0.
    split
        Name of a split file: ``tau``, ``cluster_k5_0`` to ``cluster_k5_4``, ``ood`` (out of distribution), or
        ``random_0`` to ``random_4``.
    pool
        ``own`` splits the pictures that a person saw, ``shared`` those that everybody saw. ``pooled``, of a later
        release, is one split over all people. Trials of other pictures are left out.
    image_size
        Width and height of the pictures that the run stores, in pixels; 1000 as published (19 GB for a person).
    with_images
        Set to false to work without the pictures, which need a form.
    pad_subjects
        As in `BetasPlan`.
    """

    kind: Literal["laion_fmri"] = "laion_fmri"
    subjects: tuple[Label, ...] | None = None
    sessions: int | tuple[int, ...] | None = None
    mask: str = "brain"
    mask_file: Path | None = None
    split: str = "tau"
    pool: Literal["own", "shared", "pooled"] = "own"
    image_size: int = Field(default=425, ge=32)
    with_images: bool = True
    pad_subjects: bool = False

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "mask_file"})

    @field_validator("sessions")
    @classmethod
    def _check_sessions(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        asked = (value,) if isinstance(value, int) else value or ()
        if any(not 1 <= number <= _LAST_SESSION for number in asked) or value == ():
            raise ValueError(
                f"sessions are 1 to {_LAST_SESSION}; the bucket denies 31 to 34, which the authors hold back"
            )
        return value

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root = self.find_root()
        paths: list[Path] = []
        for subject in self._find_subjects(root):
            regions = find_regions(root, subject)
            paths += [*self._find_masks(root, subject, regions), *regions.values()]
            paths.append(self._find_split(root, subject))
            paths += [path for path, _ in LAYOUT.list_files(root, "ceiling", subject=subject)]
            for session in self._find_sessions(root, subject):
                for name in ("betas", "trials"):
                    paths.append(LAYOUT.find(root, name, subject=subject, session=session))
        if self.with_images:
            paths += [LAYOUT.find(root, name) for name in ("index", "pictures")]
        return digest_files({_name_file(path, root): path for path in paths}) | self.hash_atlas()

    def open_betas(self) -> FmriSource:
        """Return the sessions of all people as lazy parts."""
        import pandas as pd

        root, parts = self.find_root(), list[BetasPart]()
        geometries: dict[str, Geometry] = {}
        gaps, ignored = Gaps(), list[str]()
        for subject in self._find_subjects(root):
            opened, geometries[subject], found = self._open_subject(root, subject)
            parts += opened
            gaps |= found
            ignored += self._find_ignored(root, subject)
        if not parts:
            raise DataError(
                f"no trial that is read shows a picture of the split {self.split} ({self.pool} pool)."
            )
        parts = number_betas(parts)
        shown = pd.concat([part.trials for part in parts], ignore_index=True)
        check_no_overlap(shown, title="LAION-fMRI", hint="set dataset.pool=shared to read several people")
        table = shown.drop_duplicates("stimulus_id")[
            ["stimulus_id", "concept", "split", "source", "ood_kind"]
        ].reset_index(drop=True)
        table = table.assign(
            path=table["stimulus_id"], sha256=[hash_name(name) for name in table["stimulus_id"]]
        )
        read_image = self._open_pictures(root, table["stimulus_id"].tolist()) if self.with_images else None
        notes = {
            "protocol": self._describe(table),
            "warnings": [
                *describe_warnings(table, gaps),
                *([RANDOM_WARNING] if self.pool == "own" and self.split.startswith("random") else []),
                *ignored,
            ],
            "nan_voxels": gaps,
        }
        return FmriSource(
            tuple(parts), StimulusSet(table), self.make_plan(), "GLMsingle betas", join_geometries(geometries), None,
            read_image, notes,
        )  # fmt: skip

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Open every session, and count the pictures of each source in the authors' list."""
        root, source = self.find_root(), self.open_betas()
        if is_there(path := LAYOUT.place(root, "index")):
            names = LAYOUT.read_table(path, "index", dtype=str)["image_name"]
            shared = names[names.str.startswith("shared_")]
            found = {
                "pictures": len(names),
                "shared pictures": len(shared),
                "shared pictures of NSD": int((find_source(shared) == "NSD").sum()),
                "shared pictures out of distribution": int((find_source(shared) == "OOD").sum()),
            }
            yield from compare_facts(found, self.manifest.facts, root)
        for subject in source.subjects:
            n = sum(len(part.trials) for part in source.parts if part.group[0] == subject)
            text = f"{n} trials of the split, {source.find_geometry(subject).n_voxels} voxels"
            yield CheckFinding(f"subject {subject}", True, text)
        yield from self.check_recordings((*part.group, "") for part in source.parts)
        for text in source.notes["warnings"]:
            yield CheckFinding("pictures", True, f"warning: {text}")

    # --- files ----------------------------------------------------------------------------------------------

    def _find_subjects(self, root: Path) -> list[str]:
        there = sorted({labels["subject"] for labels in LAYOUT.list_labels(root, "betas")})
        if not there:
            place = LAYOUT.place(root, "betas", subject="01", session="01").relative_to(root)
            raise DataError(f"{root} holds no betas such as {place}; fetch them, or correct dataset.root.")
        wanted = self.subjects and [name.removeprefix("sub-") for name in self.subjects]
        return check_subset(wanted, there, what=f"below {root}, subject", option="dataset.subjects")

    def _find_sessions(self, root: Path, subject: str) -> list[str]:
        there = self._list_sessions(root, subject)
        wanted: Iterable[int] | None
        wanted = range(1, self.sessions + 1) if isinstance(self.sessions, int) else self.sessions
        names = None if wanted is None else [f"{number:02d}" for number in wanted]
        what = f"below {root}, subject {subject}, session"
        return sorted(check_subset(names, there, what=what, option="dataset.sessions"))

    def _list_sessions(self, root: Path, subject: str) -> list[str]:
        """Return the sessions on disk that the authors opened; files of later ones may be there by hand."""
        there = [labels["session"] for labels in LAYOUT.list_labels(root, "betas", subject=subject)]
        declared = self.list_declared(subject)
        return [session for session in there if session in declared]

    def _find_ignored(self, root: Path, subject: str) -> list[str]:
        """Return a sentence on the folders of sessions that are never read, if there are some."""
        there = {f"ses-{session}" for session in self._list_sessions(root, subject)}
        folders = sorted(path.name for path in root.glob(f"{_SUBJECT.format(subject=subject)}/ses-*"))
        if not (ignored := [name for name in folders if name not in there]):
            return []
        return [
            f"not read of subject {subject}: {', '.join(ignored)}. Only ses-01 to ses-{_LAST_SESSION} with betas of "
            "the same name are read; correct the name of a folder that was renamed."
        ]

    def _find_split(self, root: Path, subject: str) -> Path:
        pool = f"sub-{subject}" if self.pool == "own" else self.pool
        there = [labels["split"] for labels in LAYOUT.list_labels(root, "split", pool=pool)]
        if there:
            check_option(f"dataset.split (pool {pool})", self.split, there)
        return LAYOUT.find(root, "split", pool=pool, split=self.split)

    def _find_masks(self, root: Path, subject: str, regions: dict[str, Path]) -> list[Path]:
        """Return the volumes whose voxels above 0 are read."""
        if self.mask_file is not None:
            return [self.mask_file.expanduser()]
        names = [word.strip().replace("-", "") for word in self.mask.split(",")]
        for name in names:
            check_option(f"dataset.mask of subject {subject}", name, ["brain", *regions])
        return [regions.get(name) or LAYOUT.find(root, "mask", subject=subject) for name in names]

    def _open_subject(self, root: Path, subject: str) -> tuple[list[BetasPart], Geometry, Gaps]:
        """Return the sessions of one person, its geometry, and the voxels without betas by session."""
        regions = find_regions(root, subject)
        first, *others = self._find_masks(root, subject, regions)
        values, affine = read_volume(first)
        shape = values.shape
        mask = np.logical_or.reduce([values > 0, *(_read_map(path, shape, affine) > 0 for path in others)])
        if not mask.any():
            raise ConfigError(f"the mask {self.mask_file or self.mask} of subject {subject} is empty.")
        headers, gaps, seen = {}, Gaps(), mask.copy()
        for session in self._find_sessions(root, subject):
            path = LAYOUT.find(root, "betas", subject=subject, session=session)
            header = headers[session] = read_volume_header(path)
            check_same_space(header, shape, affine, what=f"the mask {first.name}")
            # A voxel without a model is NaN in every trial of the session.
            volumes = MaskedVolumes(header, mask)
            lost = np.flatnonzero(mask)[~np.isfinite(volumes(0, 1)[0])]
            volumes.close()
            if len(lost) > _LARGEST_GAP * mask.sum():
                raise DataError(
                    f"{len(lost)} of {int(mask.sum())} voxels of the mask are NaN in {path}; fetch it again, or choose "
                    "another dataset.mask."
                )
            if len(lost):
                places = np.stack(np.unravel_index(lost, shape), axis=1)
                gaps[f"subject {subject}, session {session}"] = places.tolist()
            seen.ravel()[lost] = False
        sides, parts = read_split(self._find_split(root, subject)), []
        for session, header in headers.items():
            path = LAYOUT.find(root, "trials", subject=subject, session=session)
            trials = read_trials(path, subject, session, header.n_volumes)
            trials["split"] = trials["stimulus_id"].map(sides)
            keep = trials["split"].notna().to_numpy()
            if keep.any():
                # Trials of other pictures get a split only until they are left out.
                whole = BetasPart(
                    trials.fillna({"split": "test"}),
                    (header.path,),
                    int(seen.sum()),
                    MaskedVolumes(header, seen),
                )
                parts.append(keep_rows(whole, keep))
        maps = {
            f"noise_ceiling_{labels['shown']}": np.nan_to_num(_read_map(path, shape, affine)[seen])
            for path, labels in LAYOUT.list_files(root, "ceiling", subject=subject)
        }
        rois = {
            name: Roi(inside.astype(np.int16), {1: name})
            for name, path in regions.items()
            if (inside := _read_map(path, shape, affine)[seen] > 0).any()
        }
        return parts, Geometry.from_mask(seen, affine, rois, maps), gaps

    def _open_pictures(self, root: Path, labels: Sequence[str]) -> Callable[[int], np.ndarray]:
        """Return the reader of the pictures; every label must be in the list."""
        import pandas as pd
        from PIL import Image

        listed, path = LAYOUT.find(root, "index"), LAYOUT.find(root, "pictures")
        names = pd.Index(LAYOUT.read_table(listed, "index", dtype=str)["image_name"])
        if len(twice := names[names.duplicated()]):
            raise DataError(f"{listed} lists {twice[0]!r} more than once; fetch list and pictures again.")
        rows = names.get_indexer(pd.Index(labels))
        if (rows < 0).any():
            lost = [label for label, row in zip(labels, rows, strict=True) if row < 0]
            raise DataError(
                f"{len(lost)} labels of trials have no picture in {listed}, first {lost[0]!r}; fetch list and pictures "
                "of the release to which the betas belong."
            )
        damaged = f"{path} holds no readable pictures"
        with refuse_damage(damaged, OSError, KeyError), open_hdf5(path) as file:
            if len(file["images"]) != len(names):
                raise DataError(
                    f"{path} holds {len(file['images'])} pictures, but {listed} lists {len(names)}; they belong "
                    "together row by row: fetch both again."
                )

        def read(row: int) -> np.ndarray:
            with refuse_damage(f"{damaged}: {labels[row]}", OSError, KeyError), open_hdf5(path) as file:
                image = Image.open(io.BytesIO(np.asarray(file["images"][rows[row]], np.uint8).tobytes()))
                shown = image.convert("RGBA")
            # On the screen, transparent places were grey.
            ground = Image.new("RGBA", shown.size, (*_GREY, 255))
            picture = Image.alpha_composite(ground, shown).convert("RGB")
            size = (self.image_size, self.image_size)
            return np.asarray(
                picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
            )

        return read

    def _describe(self, table: pd.DataFrame) -> str:
        n_test = int((table["split"] == "test").sum())
        scaled = (
            "not standardised" if self.zscore == "none" else f"z-scored per {self.zscore} on training trials"
        )
        return (
            f"LAION-fMRI, split {self.split} of the {self.pool} pictures: {len(table) - n_test} for training, {n_test} "
            f"for testing; {scaled}"
        )


def find_regions(root: Path, subject: str) -> dict[str, Path]:
    """Return the region files of one person by name, without hyphens (``FFA1``); the later release comes first."""
    found = {}
    for name in ("early_region", "region"):
        for path, labels in LAYOUT.list_files(root, name, subject=subject):
            found[labels["roi"].replace("-", "")] = path
    return found


def find_source(labels: pd.Series) -> pd.Series:
    """Return where each picture comes from by its name: ``LAION``, ``THINGS``, ``THINGS+``, ``NSD`` or ``OOD``.

    Examples
    --------
    >>> import pandas as pd
    >>> find_source(pd.Series(["shared_4rep_NSD_special1000_22.jpg", "unique_THINGS_dog_p02.jpg"])).tolist()
    ['NSD', 'THINGS']
    """
    return labels.str.extract(r"^(?:shared_\d+rep|unique)_([^_]+)_")[0].fillna("")


def read_trials(path: Path, subject: str, session: str, n_betas: int) -> pd.DataFrame:
    """Return the trials of a session in the order of the betas.

    Raises
    ------
    DataError
        If they do not belong to these betas, this session or this person, or a trial has no label or run.
    """
    import pandas as pd

    table = LAYOUT.read_table(path, "trials", dtype=str, keep_default_na=False)
    order = pd.to_numeric(table["beta_index"], errors="coerce")
    if sorted(order) != list(range(n_betas)):
        raise DataError(
            f"{path} lists {len(table)} trials, but the file of betas has {n_betas} (beta_index from 0, each once): "
            "fetch both again."
        )
    table = table.iloc[np.argsort(order.to_numpy())].reset_index(drop=True)
    other = set(table["session"].str.extract(r"(\d+)$")[0].fillna("").str.lstrip("0")) - {session.lstrip("0")}
    labels, runs = table["label"], table["run"].str.extract(r"(\d+)$")[0].str.zfill(2)
    if other or (labels == "").any() or runs.isna().any():
        lacking = "label" if (labels == "").any() else "number of the run"
        fault = f"trials of session {min(other)!r}" if other else f"trials without a {lacking}"
        raise DataError(f"{path} has {fault}; it is not the table of session {session}, fetch it again.")
    owner = labels.str.extract(r"^unique_.*_(p\d\d)\.\w+$")[0].map(OWNERS)
    foreign = np.flatnonzero(owner.notna() & (owner != subject))
    if len(foreign):
        raise DataError(
            f"{path} shows {labels[foreign[0]]!r}, a picture that only subject {owner[foreign[0]]} saw: the files of "
            f"subject {subject} are mixed with those of another one."
        )
    return pd.DataFrame(
        {
            "subject": subject, "session": session, "run": runs,
            "stimulus_id": labels, "repetition": 0, "concept": labels, "source": find_source(labels),
            "ood_kind": labels.str.extract(r"^shared_\d+rep_OOD_([^_]+)_")[0].fillna("none"),
        }
    )  # fmt: skip


def read_split(path: Path) -> dict[str, str]:
    """Return ``train`` or ``test`` for each picture of a split file of the authors.

    Raises
    ------
    DataError
        If it is no such file, or a picture is on both sides.
    """
    damaged = f"{path} holds no variants[0] with train_ids and test_ids; it is no split of LAION-fMRI"
    with refuse_damage(damaged, hint="fetch it again"):
        variant = json.loads(bring(path).read_text())["variants"][0]
        train, test = (dict.fromkeys(map(str, variant[f"{side}_ids"]), side) for side in ("train", "test"))
    if both := sorted(train.keys() & test.keys()):
        raise DataError(f"{path} has {len(both)} pictures on both sides, first {both[0]!r}; fetch it again.")
    return train | test


def describe_warnings(table: pd.DataFrame, gaps: Gaps) -> list[str]:
    """Return what a report must say: the overlap with NSD, and the voxels that are left out."""
    of_nsd = table["source"] == "NSD"
    counts = [f"{int((of_nsd & (table['split'] == side)).sum())} {word}" for side, word in _SIDES.items()]
    found = [f"{WARNING}. Of those, this run reads {' and '.join(counts)}."]
    for where, voxels in gaps.items():
        named = ", ".join(f"({x}, {y}, {z})" for x, y, z in voxels[:_NAMED])
        rest = f" and {len(voxels) - _NAMED} more" if len(voxels) > _NAMED else ""
        found.append(
            f"{len(voxels)} voxels of {where} are NaN and are left out of all sessions: {named}{rest}."
        )
    return found


def _name_file(path: Path, root: Path) -> str:
    """Return a name that stays when the data set is moved."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _read_map(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Return a volume on the grid of the mask."""
    check_same_space(read_volume_header(path), shape, affine, what="the mask")
    return read_volume(path)[0]
