"""The interface from loaders of fMRI to preprocessing: lazy single-trial responses, and their positions in the brain.

Owns the parts of a data set (one file or run of single-trial responses each), the geometry that is stored with them as
plain coordinates (mask and affine, or a surface, with regions, parcels and maps), and the plan of the processing. A
loader fills these in and reads no responses; `braindecode_vis.preprocessing.betas` streams the responses. Contains no
file format and computes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from braindecode_vis.base.arrays import TRIAL_COLUMNS
from braindecode_vis.base.checks import ConfigError, DataError, check_columns
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.manifests import RecordedSettings
from braindecode_vis.datasets.sources.meeg_source import SampleType

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Roi:
    """One set of regions: a label for each voxel, and the meaning of the labels.

    Parameters
    ----------
    labels : integer array of shape (n_voxels,)
        Zero or below for no region.
    names
        Name of each label; a label without a name is called by its number.
    """

    labels: np.ndarray
    names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Parcels:
    """Regions over which voxels are averaged.

    Parameters
    ----------
    labels : integer array of shape (n_voxels,)
        Number of the parcel of each voxel, from 1 in the order of `names`; 0 for none.
    names
        Name of each parcel.
    networks
        Network of each parcel, empty text if it has none.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    networks: tuple[str, ...]


@dataclass(frozen=True)
class Geometry:
    """Positions in the brain of the columns of a response matrix.

    Parameters
    ----------
    voxel_ids : integer array of shape (n_voxels,)
        Number of each voxel in the volume, counted in C order, ascending if it comes from a mask; on a surface,
        the number of each vertex, first left then right hemisphere; or any unique number if nothing else is known.
    mask : bool array of shape (x, y, z), optional
        Voxels that are columns.
    affine : float array of shape (4, 4), optional
        Voxel indices to millimetres.
    rois
        Sets of regions by name.
    surface
        Name of the surface space (``fsaverage``) instead of a volume.
    n_vertices
        Vertices of the left and the right hemisphere of that surface.
    parcels
        Regions to average over.
    maps : mapping of name to array of shape (n_voxels,)
        Numbers that the authors published for each voxel, such as ``ncsnr`` or a noise ceiling.

    Raises
    ------
    DataError
        If the pieces do not fit together.
    """

    voxel_ids: np.ndarray
    mask: np.ndarray | None = None
    affine: np.ndarray | None = None
    rois: Mapping[str, Roi] = field(default_factory=dict)
    surface: str | None = None
    n_vertices: tuple[int, int] | None = None
    parcels: Parcels | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.voxel_ids)
        if self.mask is not None:
            if self.mask.dtype != bool or self.mask.ndim != 3 or self.affine is None:
                raise DataError("the mask of a geometry must be a 3-D boolean volume with an affine.")
            if not np.array_equal(np.flatnonzero(self.mask), np.sort(self.voxel_ids)):
                raise DataError(f"{n} voxel ids do not name the {int(self.mask.sum())} voxels of the mask.")
        for name, roi in self.rois.items():
            if len(roi.labels) != n:
                raise DataError(f"the regions {name} label {len(roi.labels)} voxels, but there are {n}.")
        for name, values in self.maps.items():
            if len(values) != n:
                raise DataError(f"the map {name} has {len(values)} values for {n} voxels.")
        if self.parcels is not None and len(self.parcels.labels) != n:
            raise DataError(f"the parcels label {len(self.parcels.labels)} voxels, but there are {n}.")

    @classmethod
    def from_mask(
        cls,
        mask: np.ndarray,
        affine: np.ndarray,
        rois: Mapping[str, Roi] | None = None,
        maps: Mapping[str, np.ndarray] | None = None,
    ) -> Geometry:
        """Return the geometry of ``volume[mask]``: voxels in C order."""
        ids, affine = np.flatnonzero(mask), np.asarray(affine, float)
        return cls(ids, np.asarray(mask, bool), affine, rois or {}, maps=maps or {})

    @property
    def n_voxels(self) -> int:
        """Number of voxels, before they are averaged over parcels."""
        return len(self.voxel_ids)

    def as_coords(self) -> dict[str, Any]:
        """Return the plain values and arrays that describe it in the coordinates of `Responses`."""
        coords: dict[str, Any] = {"voxel_id": np.asarray(self.voxel_ids)}
        if self.mask is not None:
            coords |= {"mask": self.mask, "affine": np.asarray(self.affine, float)}
        if self.surface is not None:
            coords |= {"surface": self.surface, "n_vertices": list(self.n_vertices or ())}
        # Coordinates are one flat table of names, so names of sets and maps get a prefix.
        coords |= {f"roi_{name}": np.asarray(roi.labels, np.int16) for name, roi in self.rois.items()}
        coords |= {f"map_{name}": np.asarray(values, np.float32) for name, values in self.maps.items()}
        # Keys in JSON are text.
        coords["roi_names"] = {
            name: {str(k): v for k, v in roi.names.items()} for name, roi in self.rois.items()
        }
        if self.parcels is not None:
            coords["voxel_parcel"] = np.asarray(self.parcels.labels, np.int32)
            coords["parcel_names"] = list(self.parcels.names)
            coords["parcel_networks"] = list(self.parcels.networks)
        return coords

    @classmethod
    def from_coords(cls, coords: Mapping[str, Any]) -> Geometry:
        """Build the geometry again from the result of `as_coords`.

        Raises
        ------
        DataError
            If the coordinates have no voxel ids.
        """
        if "voxel_id" not in coords:
            raise DataError("these responses have no voxel ids, so their positions in the brain are unknown.")
        rois = {
            name: Roi(np.asarray(coords[f"roi_{name}"]), {int(k): v for k, v in names.items()})
            for name, names in coords.get("roi_names", {}).items()
        }
        maps = {key.removeprefix("map_"): v for key, v in coords.items() if key.startswith("map_")}
        parcels = None
        if "voxel_parcel" in coords:
            parcels = Parcels(
                np.asarray(coords["voxel_parcel"]),
                tuple(coords["parcel_names"]),
                tuple(coords["parcel_networks"]),
            )
        mask = None if "mask" not in coords else np.asarray(coords["mask"]).astype(bool)
        vertices = coords.get("n_vertices")
        return cls(
            np.asarray(coords["voxel_id"]), mask, coords.get("affine"), rois, coords.get("surface"),
            None if vertices is None else (int(vertices[0]), int(vertices[1])), parcels, maps,
        )  # fmt: skip

    def select(self, keep: np.ndarray) -> Geometry:
        """Return the geometry of the voxels that `keep` (boolean, or ascending numbers) picks."""
        index = np.flatnonzero(keep) if np.asarray(keep).dtype == bool else np.asarray(keep)
        ids = self.voxel_ids[index]
        mask = None
        if self.mask is not None:
            mask = np.zeros(self.mask.shape, bool)
            # Ids number the voxels of the whole volume in C order, so they are indices of its flat form.
            mask.ravel()[ids] = True
        rois = {name: replace(roi, labels=roi.labels[index]) for name, roi in self.rois.items()}
        parcels = self.parcels and replace(self.parcels, labels=self.parcels.labels[index])
        maps = {name: values[index] for name, values in self.maps.items()}
        return replace(self, voxel_ids=ids, mask=mask, rois=rois, parcels=parcels, maps=maps)


ZScoring = Literal["session", "run", "none"]
Untrained = Literal["pooled", "own"]


class AtlasConfig(Settings):
    """A label image; voxels are averaged over its regions.

    Parameters
    ----------
    files
        One label volume (NIfTI), the left and the right ``.annot`` or ``.label.gii`` of a surface, or a ``.dlabel.nii``
        (CIFTI) for the cortex of grayordinates.
    labels
        Table of the names: a text file with a number and a name per line (FreeSurfer's colour tables and the tables of
        Schaefer's atlas have this form), or nothing if the files contain the names.
    fetch
        Use an atlas that nilearn fetches instead: from its folder, or downloaded if that is allowed.
        ``schaefer100`` to ``schaefer1000`` in hundreds, followed by ``_17`` for parcels with the names of 17 networks,
        or ``aal``.
    allow_download
        Allow nilearn to download it. Set it with the call, never in a file.
    template
        A CIFTI file with the grayordinates of the data (any ``den-91k`` file of fMRIPrep), for a surface atlas that has
        labels of the medial wall too.
    resample
        Accept a volume of the same space on another grid: each voxel gets the label at its position in mm. Without it,
        another shape or affine is an error.
    max_missing
        Largest share of the regions that may have no voxel of the mask; more are an error. Empty regions are left out
        and listed.
    """

    files: tuple[Path, ...] = ()
    labels: Path | None = None
    fetch: str | None = None
    template: Path | None = None
    allow_download: bool = False
    resample: bool = False
    # Our choice: small regions may have no voxel in a coarse mask; many empty regions mean another space.
    max_missing: float = Field(default=0.05, ge=0, le=1)

    not_hashed: ClassVar[frozenset[str]] = frozenset(
        {"files", "labels", "template", "max_missing", "allow_download"}
    )

    @field_validator("fetch")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"aal|schaefer(10|[1-9])00(_17)?", value):
            raise ValueError(
                f"nilearn fetches no atlas {value!r}: name schaefer100 to schaefer1000 in hundreds, with _17 for 17 "
                "networks, or aal; give other atlases as files"
            )
        return value

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of each file; the configuration of a data set adds them to its own."""
        paths = [*self.files, *(path for path in (self.labels, self.template) if path is not None)]
        for path in paths:
            if not path.expanduser().is_file():
                raise DataError(f"the atlas file {path} does not exist; correct dataset.atlas.")
        return digest_files({f"atlas/{path.name}": path for path in paths})


class FmriSettings(RecordedSettings):
    """The settings of a data set of fMRI.

    Parameters
    ----------
    zscore
        See `BetasPlan`.
    """

    zscore: ZScoring = "session"

    def standardises(self) -> ZScoring:
        """Return `zscore`."""
        return self.zscore


class BetasSettings(FmriSettings):
    """Settings of the processing of single-trial responses before they are stored.

    Parameters
    ----------
    zscore, untrained, dtype
        As in `BetasPlan`.
    """

    untrained: Untrained = "pooled"
    dtype: SampleType = "float32"

    def make_plan(self) -> BetasPlan:
        """Return the plan of the processing; without a setting in the data set, the default is used."""
        names = [entry.name for entry in fields(BetasPlan) if entry.name in type(self).model_fields]
        return BetasPlan(**{name: getattr(self, name) for name in names})

    def hash_atlas(self) -> dict[str, str]:
        """Return the digests of the atlas' files, which are inputs of the data set; none without an atlas."""
        return {}


class AtlasSettings(BetasSettings):
    """The settings of responses that can be averaged over regions.

    Parameters
    ----------
    atlas
        As in `BetasPlan`.
    """

    atlas: AtlasConfig | None = None

    def hash_atlas(self) -> dict[str, str]:
        """Return the digests of the atlas' files, which are inputs of the data set."""
        return {} if self.atlas is None else self.atlas.hash_inputs()


@dataclass(frozen=True)
class BetasPlan:
    """Processing of single-trial responses before they are stored.

    Parameters
    ----------
    zscore
        Standardise each voxel with the mean and standard deviation of the training trials of its ``session`` or
        ``run``, or not at all (``none``).
    untrained
        If a session or run has no training trial: use the mean of the statistics of the subject's other ones
        (``pooled``), or the statistics of its own test trials (``own``, which is transductive; the notes say so).
    dtype
        Type of the stored numbers.
    atlas
        Average the voxels of each region of this atlas.
    pad_subjects
        Keep the voxels of several subjects with different masks in one array, with zeros at the end of shorter rows.
        Only networks with a layer for each subject can be trained on it.
    """

    zscore: ZScoring = "session"
    untrained: Untrained = "pooled"
    dtype: SampleType = "float32"
    atlas: AtlasConfig | None = None
    pad_subjects: bool = False


@dataclass(frozen=True)
class BetasPart:
    """The single-trial responses of one file, run or session.

    Parameters
    ----------
    trials : DataFrame
        One row per trial, in the order of `read`: `subject`, `session`, `run`, `stimulus_id`, `repetition`, `split`
        (``train`` or ``test``) and `concept`; further columns are kept. All trials are of one subject and session.
    files
        Files of the responses.
    n_voxels
        Number of columns that `read` returns.
    read
        ``read(start, stop)`` gives trials as float32 of shape (stop - start, n_voxels), or (stop - start,
        n_voxels, n_times) if the source has times. It is called with ascending, adjoining ranges from 0 to the end, so
        a reader of a compressed file may keep its position and free its memory after the last one.
    is_computed
        Whether `read` computes responses from a time series, so that equal ones may come from the same volumes.
    """

    trials: pd.DataFrame
    files: tuple[Path, ...]
    n_voxels: int
    read: Callable[[int, int], np.ndarray]
    is_computed: bool = False

    def __post_init__(self) -> None:
        check_columns(self.trials.columns, (*TRIAL_COLUMNS, "concept"), what=f"the trials of {self.files[0]}")
        # Statistics are computed by subject and session, so a part must have only one of each.
        groups = self.trials[["subject", "session"]].drop_duplicates()
        if len(groups) != 1:
            raise DataError(f"{self.files[0]} has {len(groups)} subjects or sessions; a part must have one.")
        unknown = set(self.trials["split"]) - {"train", "test"}
        if unknown:
            raise DataError(f"{self.where} has the split {unknown.pop()!r}; it must be train or test.")

    @property
    def where(self) -> str:
        """Subject, session and file, for messages."""
        return f"subject {self.group[0]}, session {self.group[1]}, file {self.files[0]}"

    @property
    def group(self) -> tuple[str, str]:
        """Subject and session."""
        return str(self.trials["subject"].iloc[0]), str(self.trials["session"].iloc[0])


@dataclass(frozen=True)
class FmriSource:
    """A whole data set of single-trial responses, ready to be streamed.

    Parameters
    ----------
    parts
        In the order of the trials; parts of one subject and session are consecutive.
    stimuli
        Every image of a trial.
    plan
        The processing.
    unit
        Unit of the responses, for example ``percent signal change``.
    geometry
        One for all subjects, or one for each. Several need an atlas or padding: voxels of two brains do not correspond.
    times : array of shape (n_times,), optional
        Third axis of the responses, in s from the onset.
    read_image
        Returns the image of a row of the stimulus table, uint8 of shape (height, width, 3). If it is given, the images
        are copied into the store one by one; this is for archives that are too large or not a folder of files.
    notes
        Remarks for readers of the store, including ``protocol``; stored in its ``meta.json``.

    Raises
    ------
    DataError
        If parts and geometry do not fit together.
    """

    parts: tuple[BetasPart, ...]
    stimuli: StimulusSet
    plan: BetasPlan
    unit: str
    geometry: Geometry | Mapping[str, Geometry]
    times: np.ndarray | None = None
    read_image: Callable[[int], np.ndarray] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    modality: Literal["fmri"] = "fmri"

    def __post_init__(self) -> None:
        if not self.parts:
            raise DataError("no fMRI file was found; check the root and the list of subjects.")
        seen: list[tuple[str, str]] = []
        for part in self.parts:
            expected = self.find_geometry(part.group[0]).n_voxels
            if part.n_voxels != expected:
                raise DataError(f"{part.where} has {part.n_voxels} voxels, but its geometry {expected}.")
            # Preprocessing standardises a session when its last part is written, so its parts must be consecutive.
            if not seen or seen[-1] != part.group:
                if part.group in seen:
                    raise DataError(f"{part.where} must follow the other files of its session.")
                seen.append(part.group)
        self._check_columns()

    def _check_columns(self) -> None:
        """Several subjects need exactly one option that combines them into one array."""
        plan, names = self.plan, ", ".join(self.subjects)
        if plan.atlas is not None and plan.pad_subjects:
            raise ConfigError(
                "dataset.pad_subjects keeps the voxels of each subject, dataset.atlas averages them: choose one."
            )
        # Parcels of an atlas correspond in all subjects.
        if len(self.subjects) == 1 or plan.atlas is not None:
            return
        if isinstance(self.geometry, Geometry):
            if plan.pad_subjects:
                raise ConfigError(
                    f"the subjects {names} share one mask, so that their columns correspond already; set "
                    "dataset.pad_subjects to false."
                )
        elif not plan.pad_subjects:
            raise ConfigError(
                f"the voxels of the subjects {names} do not correspond: read one subject at a time, average over the "
                "regions of an atlas with dataset.atlas, or set dataset.pad_subjects for an encoder that takes other "
                "voxels of each subject (in_context, or the networks shared_space and voxel_clusters)."
            )

    @property
    def is_padded(self) -> bool:
        """Whether rows of subjects with fewer voxels end in zeros."""
        return self.plan.pad_subjects and len(self.subjects) > 1

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subjects in the order of the parts."""
        return tuple(dict.fromkeys(part.group[0] for part in self.parts))

    @property
    def n_trials(self) -> int:
        """Number of trials of all parts."""
        return sum(len(part.trials) for part in self.parts)

    def find_geometry(self, subject: str) -> Geometry:
        """Return the geometry of one subject."""
        if isinstance(self.geometry, Geometry):
            return self.geometry
        if subject not in self.geometry:
            raise DataError(f"there is no geometry for subject {subject}.")
        return self.geometry[subject]


def count_repetitions(trials: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return the tables with `repetition` numbered from 0 per subject and image, in order of presentation.

    Parameters
    ----------
    trials
        Tables of several sessions, earlier ones first; each keeps its own rows.
    """
    import pandas as pd

    joined = pd.concat(trials, ignore_index=True)
    number = joined.groupby(["subject", "stimulus_id"], sort=False).cumcount().to_numpy()
    stops = np.cumsum([len(table) for table in trials])
    return [
        table.assign(repetition=number[stop - len(table) : stop])
        for table, stop in zip(trials, stops, strict=True)
    ]


def keep_rows(part: BetasPart, keep: np.ndarray) -> BetasPart:
    """Return the part with the trials that a boolean array picks.

    Raises
    ------
    DataError
        If it picks none.
    """
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise DataError(f"{part.where} has no trial of the requested kind.")

    def read(start: int, stop: int) -> np.ndarray:
        # One pass over the file, since its readers go only forward.
        first, last = int(rows[start]), int(rows[stop - 1]) + 1
        return part.read(first, last)[rows[start:stop] - first]

    return replace(part, trials=part.trials.iloc[rows].reset_index(drop=True), read=read)


def number_betas(parts: Sequence[BetasPart]) -> list[BetasPart]:
    """Return the parts with `repetition` counted over all of them; see `count_repetitions`."""
    counted = count_repetitions([part.trials for part in parts])
    return [replace(part, trials=trials) for part, trials in zip(parts, counted, strict=True)]


def join_geometries(geometries: Mapping[str, Geometry]) -> Geometry | Mapping[str, Geometry]:
    """Return the geometry of the only subject, or a mapping from subject to geometry for several."""
    return geometries if len(geometries) > 1 else next(iter(geometries.values()))


def join_sources(sources: Sequence[FmriSource], plan: BetasPlan) -> FmriSource:
    """Combine several single-subject sources of one data set into one source.

    Parameters
    ----------
    sources
        One per subject; an image that two subjects saw has the same id in both.
    plan
        Plan of the combined source.

    Raises
    ------
    DataError
        If an image is a training image of one subject and a test image of another, or units and times differ.
    """
    import pandas as pd

    first = sources[0]
    for other in sources[1:]:
        if other.unit != first.unit or not np.array_equal(other.times, first.times):  # type: ignore[arg-type]
            raise DataError("the subjects have other units or time axes, so they cannot be trained together.")
    geometry = {subject: source.find_geometry(subject) for source in sources for subject in source.subjects}
    splits = pd.concat([part.trials[["stimulus_id", "split"]] for s in sources for part in s.parts])
    # A network that is trained on all subjects has seen the training images of each of them.
    both = set(splits.loc[splits["split"] == "train", "stimulus_id"])
    both &= set(splits.loc[splits["split"] == "test", "stimulus_id"])
    if both:
        raise DataError(
            f"{len(both)} images are trained on in one subject and tested in another, first {min(both)}."
        )
    # An image that two subjects saw is kept once and read through the first of them.
    table = pd.concat(
        [s.stimuli.table.assign(_of=n, _row=range(len(s.stimuli))) for n, s in enumerate(sources)]
    )
    table = table.drop_duplicates("stimulus_id").reset_index(drop=True)
    of, row = table["_of"].to_numpy(), table["_row"].to_numpy()

    def read_image(number: int) -> np.ndarray:
        read = sources[int(of[number])].read_image
        assert read is not None
        return read(int(row[number]))

    return FmriSource(
        tuple(part for source in sources for part in source.parts),
        StimulusSet(table.drop(columns=["_of", "_row"])),
        plan,
        first.unit,
        geometry,
        first.times,
        read_image if all(source.read_image is not None for source in sources) else None,
        {**first.notes, "protocol": "; ".join(str(s.notes.get("protocol", "")) for s in sources)},
    )
