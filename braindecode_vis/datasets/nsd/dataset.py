"""The Natural Scenes Dataset (Allen et al. 2022), with the folders of its bucket.

Owns the configuration, and combines design, betas, regions and images. `open_betas` gives
lazy sessions; of each file it reads the header and one trial. NSD needs a signed agreement and may not be
redistributed, so it is not fetched here.

References
----------
Allen et al. (2022), doi:10.1038/s41593-021-00962-x; the data manual at https://cvnlab.slite.page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from braindecode_vis.base.checks import ConfigError, DataError, is_there
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, compare_facts, read_manifest
from braindecode_vis.datasets.nsd.beta_files import (
    UNIT,
    Regions,
    SessionFile,
    Space,
    SurfaceBetas,
    Version,
    check_scale,
    check_trial_count,
    choose_labels,
    find_beta_folder,
    find_mask,
    find_regions,
    find_sessions,
    make_surface_geometry,
    make_volume_geometry,
    open_volume_session,
)
from braindecode_vis.datasets.nsd.experiment_design import (
    NsdDesign,
    check_behaviour,
    describe_protocol,
    find_design,
    find_images_file,
    make_stimuli,
    make_trials,
    open_images,
    read_design,
)
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    BetasPart,
    FmriSource,
    Geometry,
    count_repetitions,
    join_sources,
)

if TYPE_CHECKING:
    import pandas as pd

# Vertices of fsaverage that a subject's slices did not reach are NaN; more than this share is another problem.
_LARGEST_UNSEEN = 0.2


class NsdSettings(AtlasSettings):
    """Settings of every data set in NSD's own bucket.

    Parameters
    ----------
    root
        Folder with ``nsddata``, ``nsddata_stimuli``, and ``nsddata_betas`` or ``nsddata_timeseries``.
    subject
        1 to 8.
    sessions
        Numbers from 1, or how many sessions from the first one on; by default all that the subject completed. The usual
        protocols are 37 (982 shared images) and 40 (1000).
    mask
        ``nsdgeneral``, ``cortex``, ``brain``, any set of regions, or ``set:region,region``, for example
        ``prf-visualrois:V1v,V1d``.
    mask_file
        A mask volume of your own instead; voxels above 0.
    rois
        Sets of regions that are stored with the responses; by default the known ones that exist.
    images
        ``nsd_stimuli.hdf5``; by default at its usual place below the root.
    image_size
        Width and height of the images that the run stores, in pixels; 425 as published by default (10,000 images are
        then 5.4 GB).
    with_images
        Set to false to read only responses, without the images.
    """

    subject: int = Field(default=1, ge=1, le=8)
    sessions: int | tuple[int, ...] | None = None
    mask: str = "nsdgeneral"
    mask_file: Path | None = None
    rois: tuple[str, ...] | None = None
    images: Path | None = None
    image_size: int | None = Field(default=None, ge=32)
    with_images: bool = True

    # The content of the files is hashed with the inputs; their place does not matter.
    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images", "mask_file"})

    def open_design(self) -> tuple[Path, NsdDesign]:
        """Return the root and the experimental design below it."""
        root = self.find_root()
        design = read_design(find_design(root))
        if self.subject > len(design.images):
            raise DataError(f"{design.path} lists {len(design.images)} subjects, not subject {self.subject}.")
        return root, design

    def list_sessions(self, there: Sequence[int]) -> list[int]:
        """Return the requested sessions, ascending, even if they do not exist; by default all that exist."""
        if self.sessions is None:
            return list(there)
        return sorted(range(1, self.sessions + 1) if isinstance(self.sessions, int) else set(self.sessions))

    def hash_files(self, root: Path, regions: Regions, paths: Sequence[Path]) -> dict[str, str]:
        """Return digests of some files, of the regions, and of the mask, images and atlas that the settings name."""
        paths = [*paths, *(path for name in sorted(regions.files) for path in regions.files[name])]
        if self.mask_file is not None:
            paths.append(self.mask_file.expanduser())
        if self.with_images:
            paths.append(find_images_file(root, self.images))
        return digest_files({"/".join(path.parts[-2:]): path for path in paths}) | self.hash_atlas()

    def open_pictures(self, stimuli: StimulusSet, root: Path) -> Callable[[int], np.ndarray] | None:
        """Return the reader of the images, if they are requested."""
        return open_images(stimuli, root, self.images, self.image_size) if self.with_images else None


class NsdConfig(NsdSettings):
    """Place of the bucket's folders, subjects whose betas are read, and the mask.

    Parameters
    ----------
    subjects
        Several subjects instead of `subject`, for joint training. Their voxels do not correspond, so this needs `atlas`
        or `pad_subjects` in the functional volume; also on fsaverage, where each subject has the vertices that its
        slices covered.
    betas
        Version of the single-trial model.
    space
        ``func1pt8mm`` (NIfTI or HDF5, recognised by content) or ``fsaverage`` (MGH).
    divide_by
        Divisor of the stored betas; 300 in the volume and 1 on the surface by default, as published. A file that does
        not fit it is refused.
    pad_subjects
        As in `BetasPlan`.
    """

    kind: Literal["nsd"] = "nsd"
    subjects: tuple[Annotated[int, Field(ge=1, le=8)], ...] | None = None
    betas: Version = "betas_fithrf_GLMdenoise_RR"
    space: Space = "func1pt8mm"
    divide_by: float | None = Field(default=None, gt=0)
    pad_subjects: bool = False

    @model_validator(mode="after")
    def _check_subjects(self) -> Self:
        if self.subjects is None:
            return self
        if not self.subjects or len(set(self.subjects)) < len(self.subjects):
            raise ValueError("subjects must name at least one subject, and each once")
        if self.mask_file is not None and len(self.subjects) > 1:
            raise ValueError("mask_file is in the space of one subject; choose several with mask")
        return self

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        if self.subjects is not None:
            # Files of different subjects have equal names, so the number of the subject is added.
            own = {config.subject: config.hash_inputs() for config in self._split_subjects()}
            return {
                f"subj{s:02d}/{name}": digest for s, found in own.items() for name, digest in found.items()
            }
        root, design = self.open_design()
        paths = [design.path, *(p for item in self._find_sessions(root, design) for p in item.paths)]
        return self.hash_files(root, find_regions(root, self.subject, self.space), paths)

    def open_betas(self) -> FmriSource:
        """Return the data set as lazy sessions."""
        import pandas as pd

        plan = self.make_plan()
        if self.subjects is not None:
            return join_sources([config.open_betas() for config in self._split_subjects()], plan)
        root, design = self.open_design()
        items = self._find_sessions(root, design)
        numbers = [item.session for item in items]
        checked = check_behaviour(root, design, self.subject, numbers)
        trials = count_repetitions([make_trials(design, self.subject, number) for number in numbers])
        regions = find_regions(root, self.subject, self.space)
        opened = self._open_surface if self.space == "fsaverage" else self._open_volume
        geometry, parts = opened(root, regions, items, trials)
        stimuli = make_stimuli(pd.concat(trials))
        protocol = f"{describe_protocol(trials, len(design.shared))}; {self.betas}, {self.describe_scaling()}"
        notes = {
            "protocol": protocol,
            "betas": self.betas,
            "space": self.space,
            "mask": self.mask if self.mask_file is None else self.mask_file.name,
            "trials_cross_checked_with_responses_tsv": checked,
        }
        read_image = self.open_pictures(stimuli, root)
        return FmriSource(tuple(parts), stimuli, plan, UNIT, geometry, None, read_image, notes)

    def _split_subjects(self) -> list[NsdConfig]:
        """Return a separate configuration for each subject."""
        return [self.model_copy(update={"subject": s, "subjects": None}) for s in self.subjects or ()]

    def describe_scaling(self) -> str:
        """Return a description of how voxels are standardised."""
        if self.zscore == "none":
            return "not standardised"
        return f"z-scored per {self.zscore} with the training trials only"

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Recompute the declared facts of the design, and open every session, mask and image file."""
        try:
            root, design = self.open_design()
        except (DataError, ConfigError) as error:
            yield CheckFinding("design", False, str(error))
            return
        yield from check_design_facts(design, root)
        source = self.open_betas()
        voxels = " and ".join(str(source.find_geometry(s).n_voxels) for s in source.subjects)
        yield CheckFinding(
            "betas", True, f"{len(source.parts)} sessions, {source.n_trials} trials, {voxels} voxels"
        )
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    def find_divisor(self) -> float:
        """Return the divisor of the stored betas."""
        # Published volumes are int16 of percent signal change times 300; surfaces hold percent.
        return self.divide_by or (1.0 if self.space == "fsaverage" else 300.0)

    def _find_sessions(self, root: Path, design: NsdDesign) -> list[SessionFile]:
        last = design.find_sessions(self.subject)
        wanted = self.list_sessions(range(1, last + 1))
        beyond = [number for number in wanted if not 1 <= number <= last]
        if beyond or not wanted:
            raise ConfigError(
                f"dataset.sessions asks for session {beyond[0] if beyond else 'none'}, but subject {self.subject:02d} "
                f"completed sessions 1 to {last}."
            )
        folder = find_beta_folder(root, self.subject, self.space, self.betas)
        return find_sessions(folder, wanted, self.space)

    def _open_volume(
        self, root: Path, regions: Regions, items: list[SessionFile], trials: list[pd.DataFrame]
    ) -> tuple[Geometry, list[BetasPart]]:
        mask, affine = find_mask(regions, root, self.subject, self.mask, self.mask_file)
        # The authors' noise ceiling for this version of the betas, if it was fetched.
        ncsnr = items[0].paths[0].with_name("ncsnr.nii.gz")
        maps = {"ncsnr": ncsnr} if is_there(ncsnr) else {}
        parts = []
        for item, table in zip(items, trials, strict=True):
            read = open_volume_session(item, mask, affine, len(table), divide_by=self.find_divisor())
            parts.append(BetasPart(table, item.paths, int(mask.sum()), read))
        return make_volume_geometry(regions, mask, affine, self.rois, maps), parts

    def _open_surface(
        self, root: Path, regions: Regions, items: list[SessionFile], trials: list[pd.DataFrame]
    ) -> tuple[Geometry, list[BetasPart]]:
        if self.mask_file is not None:
            raise ConfigError(
                "dataset.mask_file is a volume and cannot be used with dataset.space=fsaverage."
            )
        readers = [SurfaceBetas(item.paths, divide_by=self.find_divisor()) for item in items]
        n_vertices = readers[0].n_vertices
        if self.mask == "brain":
            keep = np.ones(sum(n_vertices), bool)
        else:
            keep = choose_labels(regions, self.mask)[0]
        if len(keep) != sum(n_vertices):
            raise DataError(
                f"the regions for {self.mask} have {len(keep)} vertices, the betas {sum(n_vertices)}."
            )
        seen = keep.copy()
        for reader, item, table in zip(readers, items, trials, strict=True):
            check_trial_count(item.paths[0], reader.n_volumes, len(table))
            first = reader(0, 1)[0]
            # Surfaces are not compressed, so trials far apart cost no more than the first ones.
            apart = np.unique(np.linspace(0, len(table) - 1, 5).astype(int))
            sample = np.concatenate([reader(row, row + 1)[:, keep] for row in apart.tolist()])
            check_scale(sample, self.find_divisor(), item.paths[0])
            # One set of vertices for all sessions, since columns must correspond.
            seen &= np.isfinite(first)
        unseen = int(keep.sum() - seen.sum())
        if unseen > _LARGEST_UNSEEN * keep.sum():
            raise DataError(
                f"{unseen} of {int(keep.sum())} vertices of {self.mask} are not finite in {items[0].paths[0].parent}; "
                "fetch these files again."
            )
        for reader in readers:
            reader.vertices = np.flatnonzero(seen)
        parts = [
            BetasPart(table, item.paths, int(seen.sum()), reader)
            for item, table, reader in zip(items, trials, readers, strict=True)
        ]
        return make_surface_geometry(regions, seen, n_vertices, self.rois), parts


def check_design_facts(design: NsdDesign, root: Path | None = None) -> list[CheckFinding]:
    """Compare the design with the manifest; the design of a phantom below `root` is reported, not judged."""
    n_subjects = len(design.images)
    sessions = [design.find_sessions(subject) for subject in range(1, n_subjects + 1)]
    counts = [design.count_showings(n) for n in sessions]
    n_shared = len(design.shared)
    at37 = design.count_showings(37)[:n_shared]
    found = {
        "n_subjects": n_subjects,
        "n_images": len(np.unique(design.images)),
        "n_shared": n_shared,
        "n_trials_per_session": design.n_per_session,
        "sessions_per_subject": sessions,
        "images_seen_per_subject": [int((count > 0).sum()) for count in counts],
        "n_shared_seen_three_times_by_all": int((np.stack(counts)[:, :n_shared] == 3).all(axis=0).sum()),
        "n_shared_seen_in_37_sessions": int((at37 > 0).sum()),
        "n_shared_seen_in_40_sessions": int((design.count_showings(40)[:n_shared] > 0).sum()),
    }
    return compare_facts(found, read_manifest("nsd").facts, root)
