"""The parcels of a corpus of fMRI: one list of names, and their places in each kind of data.

Owns the reading of an atlas in several forms (label volumes on several grids, surfaces, CIFTI dlabel files), whose
names have to agree, and the way from an image to the parcel of each of its voxels or vertices. Reads no time series.

References
----------
Schaefer et al. (2018), doi:10.1093/cercor/bhx179. Glasser et al. (2016), doi:10.1038/nature18933: 360 areas.
Tzourio-Mazoyer et al. (2002), doi:10.1006/nimg.2001.0978: AAL. Caro et al. (2024), BrainLM, ICLR: A424.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_unique, refuse_damage
from braindecode_vis.base.consent import may_download
from braindecode_vis.base.digests import digest_files
from braindecode_vis.datasets.corpus.corpus_config import FmriChannels
from braindecode_vis.datasets.corpus.recordings import Channels
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.datasets.sources.fmri_volumes import read_label_table
from braindecode_vis.preprocessing.parcellation import (
    Atlas,
    fetch_atlas,
    find_labels,
    find_vertices,
    parse_network,
    read_label_cifti,
    read_label_volume,
    read_surface_labels,
)

# Regions of each atlas as it was published; another number is another atlas under its name.
_COUNTS = {"glasser": 360, "a424": 424, "aal": 116}
_SCHAEFER = re.compile(
    r"(\d+Networks_)?[LR]H[_-](Vis|SomMot|DorsAttn|SalVentAttn|Limbic|Cont|Default|TempPar)"
)
_SURFACE_ENDS = (".annot", ".gii")


@dataclass(frozen=True)
class Placement:
    """The parcel of each place of an image, and how much of each parcel is there.

    Parameters
    ----------
    labels : integer array
        One per voxel (of shape (x, y, z)), vertex or grayordinate: place of the parcel among the channels, counted from
        1; 0 where there is none.
    sizes : integer array of shape (n_channels,)
        Places of each parcel in the whole atlas.
    """

    labels: np.ndarray
    sizes: np.ndarray

    def find_missing(self, min_coverage: float, inside: np.ndarray | None = None) -> np.ndarray:
        """Return which parcels hold less than this share of their places, bool of shape (n_channels,).

        Parameters
        ----------
        inside : bool array of the shape of `labels`, optional
            Places that an image covers.
        """
        labels = self.labels if inside is None else self.labels[inside]
        counts = np.bincount(labels.ravel(), minlength=len(self.sizes) + 1)[1:]
        return counts < np.maximum(1, min_coverage * self.sizes)


@dataclass(frozen=True)
class CorpusAtlas:
    """An atlas in all the forms that were given.

    Parameters
    ----------
    channels
        Its parcels, in the order of the corpus.
    volumes, surfaces
        Labels of voxels, and of the vertices of both hemispheres; numbered by the place among the channels, from 1.
    where
        Its first file, for messages.
    """

    channels: Channels
    volumes: tuple[Atlas, ...] = ()
    surfaces: tuple[Atlas, ...] = ()
    where: str = ""
    _placed: dict[Any, Placement] = field(default_factory=dict, repr=False, compare=False)
    _shared: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)

    def place_volume(self, shape: Sequence[int], affine: np.ndarray, *, resample: bool) -> Placement:
        """Return the parcel of each voxel of a grid.

        Raises
        ------
        DataError
            If the atlas has no volume, or none in the space of the image.
        """
        key = ("volume", tuple(shape), np.round(affine, 3).tobytes(), resample)
        if key not in self._placed:
            if not self.volumes:
                raise DataError(
                    f"the images are volumes, but {self._describe()} has none; add its NIfTI file to channels.files"
                )
            grid = Geometry.from_mask(np.ones(tuple(shape), bool), affine)
            labels = _try_all(
                lambda atlas, again: find_labels(atlas, grid, resample=again, key="channels"),
                self.volumes,
                (False, True) if resample else (False,),
            )
            self._placed[key] = self._place(labels.reshape(tuple(shape)), labels)
        return self._placed[key]

    def place_surface(self, n_vertices: tuple[int, int]) -> Placement:
        """Return the parcel of each vertex, the left hemisphere first; `DataError` if no form of the atlas has them."""
        key = ("surface", n_vertices)
        if key not in self._placed:
            fitting = next((a for a in self.surfaces if a.n_vertices == n_vertices), None)
            if fitting is None:
                there = " or ".join(str(a.n_vertices) for a in self.surfaces) or "none"
                raise DataError(
                    f"the surfaces have {n_vertices} vertices, but {self._describe()} has {there}; it is "
                    "made for another surface; otherwise add its labels on this surface to channels.files"
                )
            self._placed[key] = self._place(fitting.labels, fitting.labels)
        return self._placed[key]

    def place_grayordinates(self, axis: Any) -> Placement:
        """Return the parcel of each grayordinate of a `BrainModelAxis`.

        Parcels that a surface of the atlas holds are taken from the cortex alone; other ones from the voxels.

        Raises
        ------
        DataError
            If the atlas fits neither the surface nor the voxels.
        """
        vertices, pair = find_vertices(axis)
        key = ("gray", pair, vertices.tobytes(), axis.voxel.tobytes())
        if key in self._placed:
            return self._placed[key]
        n = len(self.channels.names)
        labels, totals = np.zeros(len(axis), np.int32), np.zeros(n, int)
        reasons = []
        if any(pair):
            try:
                # A file of one hemisphere is placed on the pair that the atlas has.
                surface = self.place_surface(pair)
                labels[vertices >= 0] = surface.labels[vertices[vertices >= 0]]
                totals = surface.sizes.copy()
            except DataError as error:
                reasons.append(str(error))
        voxels = np.flatnonzero(~axis.surface_mask)
        if len(voxels) and self.volumes:
            i, j, k = axis.voxel[voxels].T
            try:
                volume = self.place_volume(axis.volume_shape, axis.affine, resample=True)
            except DataError as error:
                reasons.append(str(error))
            else:
                # The cortex of a volume reaches into the subcortical voxels of a file where they touch.
                found = volume.labels[i, j, k]
                taken = (found > 0) & (totals[np.maximum(found, 1) - 1] == 0)
                labels[voxels[taken]] = found[taken]
                totals = np.where(totals > 0, totals, volume.sizes)
        if not labels.any():
            raise DataError("; ".join(reasons) or f"no grayordinate lies in a parcel of {self._describe()}")
        self._placed[key] = Placement(labels, totals)
        return self._placed[key]

    def match_names(self, names: Sequence[str]) -> np.ndarray:
        """Return where each channel is among the `names` of parcellated data, -1 where it does not.

        Names agree if they do without the prefix of their networks, ``_ROI`` behind them, case, and the kind of dash.
        Numbers alone, from 0 or 1 on, name the parcels in their order and have to be as many.

        Raises
        ------
        DataError
            If none agrees, a name is there twice, or parcels without names are of another number.
        """
        own = self.channels.names
        if all(re.fullmatch(r"(parcel|roi|region)?[ _-]?\d+", name, re.IGNORECASE) for name in names):
            if len(names) != len(own):
                raise DataError(
                    f"it has {len(names)} parcels without names, but {self._describe()} has {len(own)}; name them in "
                    "the head of the table or its sidecar"
                )
            numbers = [int(re.sub(r"\D", "", name)) for name in names]
            if numbers in ([*range(len(own))], [*range(1, len(own) + 1)]):
                return np.arange(len(own))
        # Schaefer's atlases have names in common: the first visual parcel is another one among 100 than among 400.
        theirs, ours = ({canonical_name(n) for n in group if _SCHAEFER.match(n)} for group in (names, own))
        if ours and theirs and (theirs - ours or (len(theirs) != len(ours) and len(theirs) % 100 == 0)):
            raise DataError(
                f"it has {len(theirs)} parcels of Schaefer, which are not the {len(ours)} of {self._describe()}"
            )
        for key in (str, canonical_name):
            places: dict[str, int] = {}
            twice = ""
            for place, name in enumerate(names):
                twice = name if key(name) in places else twice
                places.setdefault(key(name), place)
            found = np.array([places.get(key(name), -1) for name in own])
            if (found >= 0).any():
                if twice and key(twice) in set(map(key, own)):
                    raise DataError(f"its parcel {twice!r} occurs twice")
                return found
        raise DataError(
            f"none of its {len(names)} parcels (first {names[0]!r}) is one of the {len(own)} of {self._describe()} "
            f"(first {own[0]!r}); it has another atlas"
        )

    def share(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the same object for the same names: thousands of tables have one head."""
        return self._shared.setdefault(names, names)

    def _place(self, labels: np.ndarray, flat: np.ndarray) -> Placement:
        n = len(self.channels.names)
        return Placement(labels, np.bincount(flat.ravel(), minlength=n + 1)[1:])

    def _describe(self) -> str:
        return f"the atlas {self.where}" if self.where else "the atlas"


def canonical_name(name: str) -> str:
    """Return what two spellings of a parcel have in common.

    Examples
    --------
    >>> canonical_name("7Networks_LH_Vis_1") == canonical_name("LH-Vis-1"), canonical_name("L_V1_ROI")
    (True, 'l_v1')
    """
    bare = re.sub(r"^\d+Networks_|_ROI$", "", name.strip())
    return re.sub(r"[\s.-]+", "_", bare).lower()


def _try_all(place: Any, atlases: Iterable[Atlas], ways: Sequence[bool]) -> np.ndarray:
    """Return the labels of the first atlas that fits, on the very grid before any other."""
    reasons: list[DataError] = []
    for again in ways:
        for atlas in atlases:
            try:
                labels: np.ndarray = place(atlas, again)
            except DataError as error:
                reasons.append(error)
            else:
                if labels.any():
                    return labels
                reasons.append(DataError(f"no voxel lies in a region of {atlas.where}: another space."))
    raise reasons[-1]


# --- reading ----------------------------------------------------------------------------------------------


def read_corpus_atlas(config: FmriChannels) -> CorpusAtlas:
    """Read the atlas of a corpus in all the forms that are given.

    Raises
    ------
    ConfigError, DataError
        If no file is given and none may be fetched, a file is damaged, or the forms have different names.
    """
    files = [path.expanduser() for path in config.files]
    labels = None if config.labels is None else config.labels.expanduser()
    for path in [*files, *([labels] if labels else [])]:
        if not path.is_file():
            raise DataError(f"the file {path} of the atlas does not exist; correct channels.files or labels.")
    named = {} if labels is None else {k: v for k, v in read_label_table(labels).items() if k > 0}
    forms: list[Atlas] = []
    if not files and labels is None:
        forms = [_fetch(config)]
    surfaces = [path for path in files if path.name.endswith(_SURFACE_ENDS)]
    for path in files:
        if path.name.endswith(".dlabel.nii"):
            forms += read_label_cifti(path)
        elif path not in surfaces:
            values, affine = read_label_volume(path)
            there = [int(label) for label in np.unique(values) if label > 0]
            forms.append(Atlas(values, affine, named or {k: str(k) for k in there}, str(path)))
            if unnamed := sorted(set(there) - set(forms[-1].names)):
                raise DataError(
                    f"label {unnamed[0]} of {path} has no name in {labels}; it is of another atlas."
                )
    for pair in _pair_hemispheres(surfaces):
        values, found, n_vertices = read_surface_labels(pair)
        forms.append(Atlas(values, None, found, str(pair[0]), n_vertices))
    # Names come from the table, else from a form that holds them, else a volume's numbers stand for them.
    forms.sort(key=lambda atlas: all(name.isdigit() for name in atlas.names.values()))
    first = named or forms[0].names
    names = tuple(first[label] for label in sorted(first))
    where = str(files[0] if files else labels or forms[0].where)
    _check_names(config, names, where)
    numbered = [_number(atlas, forms[0] if not named else None, names, where) for atlas in forms]
    _check_present(numbered, names, where)
    told = {} if labels is None else _read_columns(labels)
    volumes = tuple(atlas for atlas in numbered if atlas.affine is not None)
    channels = Channels(
        names,
        tuple(told.get(name, {}).get("network") or parse_network(name) for name in names),
        _find_centres(names, told, volumes),
        _digest(files, labels, forms, names),
    )
    return CorpusAtlas(channels, volumes, tuple(a for a in numbered if a.affine is None), where)


def _fetch(config: FmriChannels) -> Atlas:
    name = config.atlas
    if name != "aal" and not name.startswith("schaefer"):
        raise ConfigError(
            f"the atlas {name} cannot be fetched by nilearn: give its files with --set "
            "channels.files=[FILE], and a table "
            "of names with --set channels.labels=FILE."
        )
    return fetch_atlas(name + ("_17" if config.networks == 17 else ""), may_download(), key="channels")


def _digest(files: list[Path], labels: Path | None, forms: list[Atlas], names: tuple[str, ...]) -> str:
    """Return the digest of the numbers and names, whatever folder they lie in."""
    import xxhash

    paths = [*files, *([labels] if labels else [])] or [Path(forms[0].where)]
    found = digest_files({str(place): path for place, path in enumerate(paths)})
    return xxhash.xxh3_128_hexdigest("\n".join([*sorted(found.values()), *names]).encode())


def _pair_hemispheres(files: list[Path]) -> list[tuple[Path, Path]]:
    """Return the files of surfaces as pairs of left and right, recognised by their names."""
    right = re.compile(r"(^|[._-])(rh|R|hemi-R)([._-]|$)")
    pairs: dict[str, dict[bool, Path]] = {}
    for path in files:
        is_right = bool(right.search(path.name))
        bare = re.sub(r"(^|(?<=[._-]))(lh|rh|L|R|hemi-L|hemi-R)(?=[._-])", "", path.name)
        pairs.setdefault(bare, {})[is_right] = path
    for found in pairs.values():
        if set(found) != {False, True}:
            path = next(iter(found.values()))
            raise ConfigError(
                f"channels.files has {path.name}, but not its other hemisphere; their names must differ in lh and rh, "
                "L and R, or hemi-L and hemi-R alone."
            )
    return [(found[False], found[True]) for found in pairs.values()]


def _check_names(config: FmriChannels, names: tuple[str, ...], where: str) -> None:
    found = re.fullmatch(r"schaefer(\d+)", config.atlas)
    wanted = int(found[1]) if found else _COUNTS.get(config.atlas)
    if wanted is not None and len(names) != wanted:
        raise ConfigError(
            f"{where} has {len(names)} regions, but the atlas {config.atlas} has {wanted}; set channels.atlas to its "
            "right name, or to own."
        )
    prefix = re.match(r"(\d+)Networks_", names[0])
    if found and prefix and int(prefix[1]) != config.networks:
        raise ConfigError(
            f"the parcels of {where} are named after {prefix[1]} networks; set channels.networks={prefix[1]}."
        )
    check_unique([canonical_name(name) for name in names], what=f"the names of the regions of {where}")


def _check_present(forms: Sequence[Atlas], names: tuple[str, ...], where: str) -> None:
    """Raise `DataError` if the files hold few of the regions that the table names: it is of a finer atlas."""
    if not forms:
        return
    there = np.unique(np.concatenate([np.unique(atlas.labels) for atlas in forms]))
    n_absent = len(names) - int((there > 0).sum())
    # A region may be lost where an atlas was brought to a coarser grid.
    if n_absent > 0.05 * len(names):
        raise DataError(
            f"{n_absent} of the {len(names)} named regions have no label in {where}; the table is of another "
            "atlas, or a file is missing in channels.files."
        )


def _number(atlas: Atlas, first: Atlas | None, names: tuple[str, ...], where: str) -> Atlas:
    """Return an atlas whose labels are places among the channels, from 1."""
    places = {canonical_name(name): place for place, name in enumerate(names, start=1)}
    own: Mapping[int, str] = atlas.names
    # A volume of numbers has the numbering of the file that names them.
    if first is not None and atlas is not first and all(name.isdigit() for name in own.values()):
        own = {k: first.names.get(k, "") for k in own}
    table = np.zeros(max([*own, int(atlas.labels.max()), 0]) + 1, np.int32)
    strange = [name for name in own.values() if canonical_name(name) not in places]
    if strange or len(own) < 1:
        raise DataError(
            f"the region {next(iter(strange), '')!r} of {atlas.where} is none of {where}: files of one atlas must name "
            "the same regions; give those of one atlas, and its table as channels.labels."
        )
    for label, name in own.items():
        table[label] = places[canonical_name(name)]
    return replace(atlas, labels=table[np.maximum(atlas.labels, 0)], names=dict(enumerate(names, start=1)))


def _read_columns(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a table with a head says of each region beside its number and name."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    head = [word.strip().lower() for word in re.split(r"[\t,]", lines[0])] if lines else []
    network = next((i for i, word in enumerate(head) if word.startswith("network")), None)
    centre = [head.index(axis) for axis in "xyz"] if set("xyz") <= set(head) else None
    told: dict[str, dict[str, Any]] = {}
    for line in lines[1:] if network is not None or centre is not None else []:
        cells = [cell.strip() for cell in re.split(r"[\t,]", line)]
        if len(cells) < len(head):
            raise DataError(f"a line of {path} has {len(cells)} cells, its head {len(head)}: {line[:60]!r}.")
        entry: dict[str, Any] = {}
        if network is not None and cells[network] not in ("", "n/a"):
            entry["network"] = cells[network]
        if centre is not None:
            with refuse_damage(f"{path} has no numbers in x, y and z: {line[:60]!r}", ValueError):
                entry["centre"] = [float(cells[i]) for i in centre]
        told[cells[1]] = entry
    return told


def _find_centres(
    names: tuple[str, ...], told: Mapping[str, Mapping[str, Any]], volumes: Sequence[Atlas]
) -> np.ndarray | None:
    """Return the centre of each parcel in mm, of the table or of a volume; None if neither knows all."""
    if all("centre" in told.get(name, {}) for name in names):
        return np.array([told[name]["centre"] for name in names])
    for atlas in volumes:
        index = np.nonzero(atlas.labels)
        labels = atlas.labels[index]
        counts = np.bincount(labels, minlength=len(names) + 1)[1:]
        if counts.all():
            sums = np.stack([np.bincount(labels, axis, len(names) + 1)[1:] for axis in index], axis=1)
            assert atlas.affine is not None
            return (sums / counts[:, None]) @ atlas.affine[:3, :3].T + atlas.affine[:3, 3]
    return None
