"""Copies of NSD that other groups shared: MindEye1 and MindEye2 web datasets, and Brain-Diffuser arrays.

Owns the configuration and the choice of the layout, which is recognised by the content of the folder. These copies were
standardised or averaged before they were shared, in some cases with the test images (the notes say so), so nothing is
standardised again by default. The responses have no positions unless the region file is given.

References
----------
Scotti et al. (2023), arXiv:2305.18274; Scotti et al. (2024), arXiv:2403.11207; Ozcelik, VanRullen (2023),
arXiv:2303.05334.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.digests import digest_files
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings
from braindecode_vis.datasets.nsd.experiment_design import name_image
from braindecode_vis.datasets.nsd.repack_files import (
    Repack,
    open_brain_diffuser,
    open_mindeye1,
    open_mindeye2,
)
from braindecode_vis.datasets.sources.betas_source import (
    BetasPlan,
    FmriSettings,
    FmriSource,
    Geometry,
    ZScoring,
)
from braindecode_vis.datasets.sources.fmri_volumes import read_volume
from braindecode_vis.datasets.sources.meeg_source import SampleType

if TYPE_CHECKING:
    import pandas as pd

Layout = Literal["mindeye1", "mindeye2", "brain_diffuser"]


class NsdRepackConfig(FmriSettings):
    """Folder of the copy, and its subject.

    Parameters
    ----------
    root
        MindEye1: the folder with ``train`` and ``test`` with their tars (``webdataset_avg_split``); MindEye2: the
        folder of ``betas_all_subj0X_fp32_renorm.hdf5`` and ``wds``, or of ``betas_subj0X.hdf5`` and ``mindeyev2_wds``
        from its authors' notebook; Brain-Diffuser: the folder of ``nsd_train_fmriavg_nsdgeneral_subX.npy``.
    layout
        Recognised by default.
    subject
        1 to 8.
    test_set
        MindEye2: ``new_test`` (40 sessions, 1000 images) or ``test`` (37 sessions, 982).
    design
        Brain-Diffuser: ``nsd_expdesign.mat``, which is needed to find the image of each row.
    region_file
        ``nsdgeneral.nii.gz`` of the subject, so that the responses get positions in the brain.
    divide_by
        Divisor of the responses; 1 for the shared copies.
    zscore
        ``session`` standardises again, with training trials only; only MindEye2 contains the sessions.
    dtype
        Type of the stored responses, ``float32`` or ``float16``.
    with_images
        Whether the pictures in the copy are read; without them there are trials, but no images for comparison.
    """

    kind: Literal["nsd_repack"] = "nsd_repack"
    layout: Literal["auto"] | Layout = "auto"
    subject: int = Field(default=1, ge=1, le=8)
    test_set: Literal["new_test", "test"] = "new_test"
    design: Path | None = None
    region_file: Path | None = None
    divide_by: float = Field(default=1.0, gt=0)
    # Standardised by their authors before they were shared.
    zscore: ZScoring = "none"
    dtype: SampleType = "float32"
    with_images: bool = True

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "design", "region_file"})

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        paths = self._open().files + ([self.region_file.expanduser()] if self.region_file else [])
        return digest_files({"/".join(path.parts[-3:]): path for path in paths})

    def open_betas(self) -> FmriSource:
        """Return the copy as lazy parts."""
        import pandas as pd

        repack = self._open()
        trials = pd.concat([part.trials for part in repack.parts], ignore_index=True)
        check_parts(trials, self.find_root())
        shown = trials.drop_duplicates("stimulus_id")[["stimulus_id", "concept", "split", "nsd_id"]]
        stimuli = StimulusSet(shown.reset_index(drop=True).assign(path="", sha256=""))
        read_image = self._find_reader(stimuli, repack)
        counts = stimuli.table["split"].value_counts()
        protocol = (
            f"NSD subject {self.subject:02d} as shared with {repack.notes['layout']}: {counts.get('train', 0)} "
            f"training and {counts.get('test', 0)} shared test images; {repack.notes['standardised']}"
        )
        geometry = self._find_geometry(repack.parts[0].n_voxels)
        plan = BetasPlan(zscore=self.zscore, dtype=self.dtype)
        notes = {"protocol": protocol, **repack.notes}
        return FmriSource(
            tuple(repack.parts), stimuli, plan, "arbitrary", geometry, read_image=read_image, notes=notes
        )

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file and pair every response with its image."""
        source = self.open_betas()
        yield CheckFinding("data", True, f"{source.n_trials} responses of {source.parts[0].n_voxels} voxels")
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    def find_layout(self, root: Path) -> Layout:
        """Return the layout of a folder, from its content."""
        if self.layout != "auto":
            return self.layout
        # Recognised by files that only one layout has.
        if any(root.glob("betas_all_subj*.hdf5")) or any(root.glob("betas_subj*.hdf5")):
            return "mindeye2"
        if any(root.glob("**/nsd_train_fmriavg_*.npy")):
            return "brain_diffuser"
        if any(root.glob("**/train/**/*.tar")):
            return "mindeye1"
        raise DataError(
            f"{root} is not a known copy of NSD: neither betas_all_subj0X_fp32_renorm.hdf5 or "
            "betas_subj0X.hdf5 (MindEye2), nor train/*.tar (MindEye1), nor nsd_train_fmriavg_nsdgeneral_subX.npy "
            "(Brain-Diffuser) is below it."
        )

    def _open(self) -> Repack:
        root = self.find_root()
        layout = self.find_layout(root)
        if layout == "brain_diffuser":
            return open_brain_diffuser(root, self.subject, self.design, self.divide_by)
        if layout == "mindeye1":
            return open_mindeye1(root, self.subject, self.divide_by)
        return open_mindeye2(root, self.subject, self.test_set, self.divide_by)

    def _find_reader(self, stimuli: StimulusSet, repack: Repack) -> Callable[[int], np.ndarray] | None:
        if not self.with_images:
            return None
        ids = stimuli.table["nsd_id"].to_numpy()
        missing = [name_image(i + 1) for i in ids if i not in repack.image_of]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(ids)} images are not in {self.root}, first {missing[0]}; fetch the image "
                "files that belong to it, or leave the images out with --set dataset.with_images=false."
            )
        return lambda row: repack.image_of[int(ids[row])]()

    def _find_geometry(self, n_voxels: int) -> Geometry:
        if self.region_file is None:
            return Geometry(np.arange(n_voxels))
        labels, affine = read_volume(self.region_file.expanduser())
        mask = labels > 0  # -1 outside the cortex
        if int(mask.sum()) != n_voxels:
            raise DataError(
                f"{self.region_file} has {int(mask.sum())} voxels above 0, but the responses {n_voxels}: it is of "
                "another subject or region."
            )
        return Geometry.from_mask(mask, affine)


def check_parts(trials: pd.DataFrame, root: Path) -> None:
    """Raise `DataError` if an image is in both parts: a copy of the test files is then used as training data."""
    parts = trials.groupby("split")["stimulus_id"].agg(set)
    for split in ("train", "test"):
        if split not in parts:
            raise DataError(f"{root} holds no {split} responses; fetch both parts.")
    both = parts["train"] & parts["test"]
    if both:
        raise DataError(
            f"{len(both)} image(s) are in both the training and the test part of {root}, first "
            f"{min(both)}: one of the folders contains files of the other."
        )
