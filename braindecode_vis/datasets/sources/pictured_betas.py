"""Common part of data sets of betas whose pictures may be in a folder beside them.

Owns the settings of that folder, the digests of the files, and the joining of all subjects to one source: trials are
numbered over all sessions, no picture is in both training and test, and pictures are found by name. A data set lists
its files, opens its subjects one by one, and gives the file of each picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from braindecode_vis.base.digests import digest_files
from braindecode_vis.datasets.bids.fmri_files import (
    check_no_overlap,
    find_image_folder,
    hash_image_folder,
    make_named_stimuli,
)
from braindecode_vis.datasets.sources.betas_source import (
    BetasPart,
    BetasSettings,
    FmriSource,
    Geometry,
    join_geometries,
    number_betas,
)

if TYPE_CHECKING:
    import pandas as pd


class PicturedSettings(BetasSettings):
    """The settings of betas of several subjects, and of a folder of pictures.

    Parameters
    ----------
    images
        Folder of the pictures; ``images`` or ``stimuli`` below the root by default, if it holds all of them.
    pad_subjects
        As in `BetasPlan`.
    """

    images: Path | None = None
    pad_subjects: bool = False

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root", "images"})

    #: What the data set is called in messages, and the unit of its betas.
    title: ClassVar[str]
    unit: ClassVar[str] = "authors' units"

    def list_files(self) -> list[Path]:
        """Return every file that is read, except pictures and atlas."""
        raise NotImplementedError

    def list_image_folders(self) -> tuple[str, ...]:
        """Return the usual folders of pictures below the root."""
        return ("images", "stimuli")

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        digests = digest_files({path.name: path for path in self.list_files()})
        return digests | hash_image_folder(self.images, self._find_beside()) | self.hash_atlas()

    def number_parts(self, parts: Sequence[BetasPart]) -> tuple[list[BetasPart], pd.DataFrame]:
        """Return the parts with repetitions counted over all of them, and all of their trials in one table.

        Raises
        ------
        DataError
            If a stimulus is in both training and test trials.
        """
        import pandas as pd

        numbered = number_betas(parts)
        shown = pd.concat([part.trials for part in numbered], ignore_index=True)
        check_no_overlap(shown, title=self.title)
        return numbered, shown

    def join_subjects(
        self,
        parts: Sequence[BetasPart],
        geometries: Mapping[str, Geometry],
        pictures: pd.DataFrame,
        notes: Mapping[str, Any],
    ) -> FmriSource:
        """Return the source of all subjects.

        Parameters
        ----------
        geometries
            Geometry of each subject.
        pictures : DataFrame
            `stimulus_id`, `concept` and `path` of every stimulus, in the form for `make_named_stimuli`.
        notes
            Remarks for readers of the store.
        """
        stimuli = make_named_stimuli(pictures, self.images, title=self.title, beside=self._find_beside())
        geometry = join_geometries(geometries)
        return FmriSource(tuple(parts), stimuli, self.make_plan(), self.unit, geometry, notes=notes)

    def _find_beside(self) -> Path | None:
        return find_image_folder(self.find_root(), self.list_image_folders())
