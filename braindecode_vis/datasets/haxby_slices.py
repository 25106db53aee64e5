"""Haxby et al. (2001), subject 1: one slice at full in-plane resolution, or the whole brain at 25 mm.

Owns the small recording that was distributed with PyMVPA for its tests: 12 runs of 8 blocks, one for each category, in
raw scanner units. Only the category of a block is known, so the category is the stimulus; the set has eight rows and no
pictures. The same eight occur in every run: decode by leaving runs out, never images.

References
----------
.. [1] Haxby, Gobbini, Furey, Ishai, Schouten, Pietrini (2001). Science 293, 2425-2430. doi:10.1126/science.1063736
.. [2] Hanke et al. (2009). PyMVPA. Neuroinformatics 7, 37-53. doi:10.1007/s12021-008-9041-y
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from braindecode_vis.base.checks import ConfigError, DataError, check_columns
from braindecode_vis.datasets.bids.fmri_dataset import (
    BoldSettings,
    FmriRecipe,
    hash_bold_inputs,
    prepare_bold,
)
from braindecode_vis.datasets.bids.fmri_files import RunFiles
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings, compare_facts, list_recordings
from braindecode_vis.datasets.sources.betas_source import FmriSettings, ZScoring
from braindecode_vis.datasets.sources.bold_source import BoldSource, CleanConfig, ModelConfig, WindowConfig

if TYPE_CHECKING:
    import pandas as pd

CATEGORIES = ("bottle", "cat", "chair", "face", "house", "scissors", "scrambledpix", "shoe")
MASKS = ("brain", "gray", "white", "vt", "hoc")


class HaxbySlicesConfig(FmriSettings):
    """Folder of the recording, and how a block becomes a response.

    Parameters
    ----------
    root
        Folder of the BIDS tree.
    acq
        ``1slice``: 40 x 20 voxels of 3.1 x 3.75 mm. ``25mm``: 6 x 10 x 10.
    mask
        Region, for ``25mm`` only (all voxels above zero of it); by default the brain for ``25mm``, and in the slice
        every voxel that varies in all runs.
    runs
        Numbers of the runs to read; by default all twelve, which must then exist.
    model
        By default the volumes from 5 s after the onset to 5 s after the offset of a block are averaged, after a
        quadratic trend was removed and each voxel was scaled over its run.
    zscore
        Standardise each voxel over the blocks of a run (``run``), over all (``session``), or not at all. All blocks are
        training trials unless a split is set.
    """

    kind: Literal["haxby_slices"] = "haxby_slices"
    acq: Literal["1slice", "25mm"] = "1slice"
    mask: Literal["brain", "gray", "white", "vt", "hoc"] | None = None
    runs: tuple[int, ...] | None = None
    model: ModelConfig = Field(
        # The response is about 5 s later than its stimulus, at both ends of a block of 24 s.
        default=WindowConfig(
            start=5.0,
            stop=5.0,
            until="offset",
            clean=CleanConfig(drift="polynomial", order=2, scaling="zscore"),
        ),
    )
    zscore: ZScoring = "none"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"runs"})

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        return hash_bold_inputs(self._make_settings(), self._make_recipe())

    def open_bold(self) -> BoldSource:
        """Return the recording as lazy runs."""
        source = prepare_bold(self._make_settings(), self._make_recipe())
        for run in source.runs:
            found = sorted(run.trials["stimulus_id"])
            if found != list(CATEGORIES):
                raise DataError(
                    f"{run.where} has the blocks {', '.join(found)}, but each run shows {', '.join(CATEGORIES)} once."
                )
        return source

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every header and table, and compare with the manifest."""
        source = self.open_bold()
        first = source.runs[0]
        yield from self.check_recordings(list_recordings(source.runs))
        found = {
            **({"n_blocks": sum(len(run.trials) for run in source.runs)} if self.runs is None else {}),
            "n_categories": len(source.stimuli),
            "n_volumes": first.n_volumes,
            "t_r": first.t_r,
            f"shape_{self.acq}": list(first.shape),
        }
        yield from compare_facts(found, self.manifest.facts, self.find_root())

    def _make_settings(self) -> BoldSettings:
        root = self.find_root()
        if self.acq == "1slice" and self.mask is not None:
            raise ConfigError(
                f"dataset.mask is {self.mask}, but the masks have the 25 mm grid only; leave it out for the slice, "
                "or set dataset.acq to 25mm."
            )
        name = self.mask or "brain"
        label = f"sub-001_acq-25mm_label-{name}_mask.nii.gz"
        mask: Literal["varying"] | Path = "varying"
        if self.acq == "25mm":
            mask = root / "derivatives" / "masks" / "sub-001" / "func" / label
        return BoldSettings(
            root=root, raw=True, mask=mask, model=self.model, zscore=self.zscore, untrained="own"
        )

    def _make_recipe(self) -> FmriRecipe:
        runs = None if self.runs is None else tuple(f"{number:02d}" for number in self.runs)
        notes = {
            "acq": self.acq,
            "protocol": "categories: no image is identified",
            "placement": "the slice has no place in the head (its z is 0)"
            if self.acq == "1slice"
            else "head",
        }
        return FmriRecipe("haxby_slices", {"acq": (self.acq,), "run": runs}, read_blocks, notes=notes)


def read_blocks(table: pd.DataFrame, run: RunFiles) -> pd.DataFrame:
    """Return the blocks of one run; the category is stimulus and concept."""
    import pandas as pd

    assert run.events is not None
    check_columns(table.columns, ("trial_type",), what=f"the events table {run.events}")
    return pd.DataFrame(
        {
            "stimulus_id": table["trial_type"],
            "concept": table["trial_type"],
            "path": "",
            "split": "train",
            "trial_type": table["trial_type"],
        }
    )
