"""vim-1 (Kay et al. 2008): two subjects who saw 1750 natural images twice and 120 others thirteen times.

Owns the two MATLAB files of the CRCNS archive: ``EstimatedResponses.mat`` (HDF5, one response per image and voxel: the
mean of its presentations, z-scored by the authors) and ``Stimuli.mat`` (grey images of 128 pixels; those of 500 are in
``Stimuli_Trn_FullRes_01.mat`` to ``_15.mat`` and ``Stimuli_Val_FullRes.mat``). A few thousand voxels have no response
(NaN) and are left out. Names, shapes and codes of regions are those of published code that opens the files.

References
----------
Kay, Naselaris, Prenger, Gallant (2008), doi:10.1038/nature06713; data: Kay, Naselaris, Gallant (2011),
doi:10.6080/K0QN64NG.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.layout import Array, File, Layout
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, compare_facts
from braindecode_vis.datasets.sources.betas_source import (
    BetasPart,
    BetasSettings,
    FmriSource,
    Geometry,
    Roi,
    ZScoring,
)

if TYPE_CHECKING:
    import pandas as pd

ROIS = {0: "other", 1: "V1", 2: "V2", 3: "V3", 4: "V3A", 5: "V3B", 6: "V4", 7: "LO"}
SHAPE = (64, 64, 18)
"""Volume of the voxel positions, which count from 1 in MATLAB's order."""
SUFFIXES = {"train": "Trn", "test": "Val"}
# Number of presentations in the mean of each response (Kay et al. 2008).
PRESENTATIONS = {"train": 2, "test": 13}

_NO_IMAGES = "fetch it, or leave the images out with --set dataset.with_images=false"
_TRAIN_IMAGES = {"stimTrn": Array(("train_image", "row", "column"), "float32")}
_TEST_IMAGES = {"stimVal": Array(("test_image", "row", "column"), "float32")}
LAYOUT = Layout(
    responses=File(
        "EstimatedResponses.mat",
        "mat73",
        what="the file of responses of vim-1",
        hint="fetch it with a CRCNS account (crcns.org/data-sets/vc/vim-1) and pass its folder with --root",
        arrays={
            "dataTrnS{subject}": Array(("voxel of {subject}", "train_image"), "float32"),
            "dataValS{subject}": Array(("voxel of {subject}", "test_image"), "float32"),
            "roiS{subject}": Array(("voxel of {subject}",), codes=ROIS),
            "voxIdxS{subject}": Array(("voxel of {subject}",)),
        },
    ),
    low=File(
        "Stimuli.mat", "mat5", "the file of images of vim-1", _NO_IMAGES, {**_TRAIN_IMAGES, **_TEST_IMAGES}
    ),
    # Published: 15 files of 120 images, the last one with the rest.
    full_train=File(
        "Stimuli_Trn_FullRes_{number}.mat",
        "mat73",
        "a file of training images of vim-1",
        _NO_IMAGES,
        _TRAIN_IMAGES,
    ),
    full_test=File(
        "Stimuli_Val_FullRes.mat", "mat73", "the file of validation images of vim-1", _NO_IMAGES, _TEST_IMAGES
    ),
)


def encode_places(indices: np.ndarray) -> np.ndarray:
    """Return the numbers in the files of voxels at `indices` of the volume, (n_voxels, 3)."""
    return np.asarray(np.ravel_multi_index(tuple(indices.T), SHAPE, order="F")) + 1


def decode_places(places: np.ndarray) -> np.ndarray:
    """Return the number of each voxel in C order from 0, the order of all masks here."""
    return np.asarray(np.ravel_multi_index(np.unravel_index(places - 1, SHAPE, order="F"), SHAPE))


class Vim1Config(BetasSettings):
    """Subject, regions and images to read.

    Parameters
    ----------
    root
        Folder with ``EstimatedResponses.mat`` and the files of the images.
    subject
        1 or 2.
    rois
        Regions whose union is kept: ``V1``, ``V2``, ``V3``, ``V3A``, ``V3B``, ``V4``, ``LO``; every voxel by default.
    resolution
        ``low`` reads the images of 128 pixels, ``full`` those of 500.
    zscore
        ``none`` by default: the authors z-scored every voxel. ``session`` standardises again with the training
        responses.
    with_images
        Whether the images are read; without them there are responses, but no images for comparison.
    """

    kind: Literal["vim1"] = "vim1"
    subject: Literal[1, 2] = 1
    rois: tuple[str, ...] = ()
    resolution: Literal["low", "full"] = "low"
    zscore: ZScoring = "none"
    with_images: bool = True

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root"})

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        stimuli = self._list_stimuli_files() if self.with_images else []
        paths = [self._find_responses(), *(path for _, path in stimuli)]
        return digest_files({path.name: path for path in paths})

    def open_betas(self) -> FmriSource:
        """Return the training and the validation responses as lazy parts."""
        import pandas as pd

        path = self._find_responses()
        table = read_voxels(path, self.subject)
        # A voxel with any gap is left out of both splits, so that train and test have the same columns.
        keep = table.usable & self._choose_regions(table)
        if not keep.any():
            raise ConfigError(
                f"no voxel of subject {self.subject} is in {', '.join(self.rois)}; name other dataset.rois."
            )
        columns = np.flatnonzero(keep)
        trials = [self._make_trials(split, table.counts[split]) for split in SUFFIXES]
        parts = [
            BetasPart(own, (path,), len(columns), partial(_read_rows, path, self.subject, split, columns))
            for split, own in zip(SUFFIXES, trials, strict=True)
        ]
        geometry = Geometry(
            table.ids[keep],
            rois={"visual": Roi(table.regions[keep], {n: name for n, name in ROIS.items() if n})},
        )
        stimuli = self._read_stimuli(pd.concat(trials, ignore_index=True))
        notes: dict[str, Any] = {
            "protocol": (
                f"vim-1 subject {self.subject}: {table.counts['train']} training images (mean of 2 presentations), "
                f"{table.counts['test']} validation images (mean of 13) as published; {len(columns)} voxels"
                + (f" of {', '.join(self.rois)}" if self.rois else "")
            ),
            "voxels_left_out_as_not_finite": int((~table.usable).sum()),
            "presentations": PRESENTATIONS,
        }
        return FmriSource(tuple(parts), stimuli, self.make_plan(), "z", geometry, notes=notes)

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Open responses and images, and compare their counts with the manifest."""
        source = self.open_betas()
        table = read_voxels(self._find_responses(), self.subject)
        found: dict[str, Any] = {"n_train": table.counts["train"], "n_test": table.counts["test"]}
        if self.subject == 1:
            found |= {
                "n_voxels_subject_1": len(table.usable),
                "n_v1_voxels_subject_1": int((table.regions == 1).sum()),
            }
        if source.stimuli.pixels is not None:
            found[f"image_size_{self.resolution}"] = int(source.stimuli.pixels.shape[1])
        yield from compare_facts(found, self.manifest.facts, self.find_root())
        n_left = source.notes["voxels_left_out_as_not_finite"]
        yield CheckFinding(
            "voxels", True, f"{source.parts[0].n_voxels} kept, {n_left} without a response left out"
        )
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    def _find_responses(self) -> Path:
        return LAYOUT.find(self.find_root(), "responses")

    def _list_stimuli_files(self) -> list[tuple[str, Path]]:
        """Return the kind and the path of each file of images."""
        root = self.find_root()
        if self.resolution == "low":
            return [("low", LAYOUT.find(root, "low"))]
        numbers = LAYOUT.list_labels(root, "full_train")
        if not numbers:
            raise DataError(
                f"no Stimuli_Trn_FullRes_01.mat of vim-1 is in {root}; fetch them, or set dataset.resolution=low."
            )
        training = [("full_train", LAYOUT.find(root, "full_train", **labels)) for labels in numbers]
        return [*training, ("full_test", LAYOUT.find(root, "full_test"))]

    def _choose_regions(self, table: VoxelTable) -> np.ndarray:
        if not self.rois:
            return np.ones(len(table.regions), bool)
        codes = {name: code for code, name in ROIS.items() if code}
        for name in self.rois:
            check_option("the region in dataset.rois", name, codes)
        return np.isin(table.regions, [codes[name] for name in self.rois])

    def _make_trials(self, split: str, n: int) -> pd.DataFrame:
        import pandas as pd

        ids = [f"{SUFFIXES[split].lower()}{number:04d}" for number in range(1, n + 1)]
        # An image has no category, so each is its own concept. The file has neither sessions nor runs.
        return pd.DataFrame(
            {
                "subject": f"{self.subject:02d}", "session": "01", "run": SUFFIXES[split].lower(), "stimulus_id": ids,
                "repetition": 0, "split": split, "concept": ids,
            }
        )  # fmt: skip

    def _read_stimuli(self, trials: pd.DataFrame) -> StimulusSet:
        ids = trials["stimulus_id"].tolist()
        if not self.with_images:
            from braindecode_vis.datasets.bids.fmri_files import hash_name

            names = trials[["stimulus_id", "concept"]].assign(
                path="", sha256=[hash_name(name) for name in ids]
            )
            return StimulusSet(names)
        pixels = read_images(self._list_stimuli_files())
        if len(pixels) != len(ids):
            raise DataError(
                f"{self.find_root()} holds {len(pixels)} images, but responses to {len(ids)}: files of images are "
                "missing or of another release."
            )
        return StimulusSet.from_pixels(pixels, ids, source=LAYOUT.files["low"].path)


@dataclass(frozen=True)
class VoxelTable:
    """The voxels of one subject.

    Parameters
    ----------
    ids : integer array of shape (n_voxels,)
        Number in the volume of 64 x 64 x 18, counted in C order.
    regions : integer array of shape (n_voxels,)
        Code of the region, see `ROIS`.
    usable : bool array of shape (n_voxels,)
        Whether every response is finite.
    counts
        Images of each split.
    """

    ids: np.ndarray
    regions: np.ndarray
    usable: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)


def read_voxels(path: Path, subject: int) -> VoxelTable:
    """Read positions and regions of the voxels, and search all responses for gaps.

    Raises
    ------
    DataError
        If an array is missing, lengths differ, or positions are outside the volume.
    """
    with LAYOUT.open(path, "responses") as file:
        regions = file.read(f"roiS{subject}").astype(np.int64)
        places = file.read(f"voxIdxS{subject}").astype(np.int64)
        usable, counts = np.ones(len(regions), bool), {}
        for split, suffix in SUFFIXES.items():
            name, axis = f"data{suffix}S{subject}", f"{split}_image"
            counts[split] = file.measure(name)[axis]
            # 256 images of 25 000 voxels are 26 MB; all of them would be 190 MB per subject.
            for start in range(0, counts[split], 256):
                block = file.read(name, part={axis: slice(start, start + 256)})
                usable &= np.isfinite(block).all(axis=1)
    # A copy that counts from 0 would have a position 0.
    n_places = int(np.prod(SHAPE))
    if places.min() < 1 or places.max() > n_places:
        raise DataError(
            f"{path}: voxIdxS{subject} has {len(places)} places from {places.min()} to {places.max()}; as published "
            f"they count {len(regions)} voxels from 1 to {n_places}."
        )
    return VoxelTable(decode_places(places), regions, usable, counts)


def read_images(files: list[tuple[str, Path]]) -> np.ndarray:
    """Return the images, training before validation, as uint8 of shape (n_images, height, width, 3).

    Stored values are grey levels around 0. One scale is used for all images: from the darkest to the brightest value of
    the training images.

    Parameters
    ----------
    files
        Kind (its name in the layout) and path of each file.

    Raises
    ------
    DataError
        If a file holds no images.
    """
    blocks: dict[str, list[np.ndarray]] = {"stimTrn": [], "stimVal": []}
    for kind, path in files:
        with LAYOUT.open(path, kind) as file:
            for key in LAYOUT.files[kind].arrays:
                blocks[key].append(file.read(key))
    train, test = (np.concatenate(held) for held in blocks.values())
    if train.shape[1:] != test.shape[1:]:
        raise DataError(f"training images have {train.shape[1:]} pixels, validation images {test.shape[1:]}.")
    everything = np.concatenate([train, test]).astype(np.float32)
    if train.dtype != np.uint8:
        # Only from the training images: test images must not determine the scale. Values outside it are clipped.
        low, high = float(train.min()), float(train.max())
        everything = np.clip((everything - low) / max(high - low, 1e-12), 0, 1) * 255
    return np.repeat(np.rint(everything).astype(np.uint8)[..., None], 3, axis=-1)


def _read_rows(
    path: Path, subject: int, split: str, columns: np.ndarray, start: int, stop: int
) -> np.ndarray:
    """Return responses to some images in the kept voxels, float32 of shape (stop - start, len(columns))."""
    axis = f"{split}_image"
    with LAYOUT.open(path, "responses") as file:
        rows = file.read(f"data{SUFFIXES[split]}S{subject}", first=axis, part={axis: slice(start, stop)})
    return np.asarray(rows, np.float32)[:, columns]
