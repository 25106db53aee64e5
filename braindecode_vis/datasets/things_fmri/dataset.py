"""THINGS-fMRI (Hebart et al. 2023): single-trial betas of three subjects, as tables or as volumes.

Owns the two forms of the published betas. The table is a pandas HDF file of voxels by trials (8 GB), read in place
without PyTables and without a pickle, a few trials of all voxels at a time; it has no catch trials. The volumes hold
one beta per trial and keep the catch trials, which are dropped here by their file names. The raw runs (ds004192) are
read by the data set `bids_fmri`.

References
----------
.. [1] Hebart, M. N. et al. (2023). THINGS-data, a multimodal collection of large-scale datasets for investigating
   object representations in human brain and behavior. eLife 12, e82580. doi:10.7554/eLife.82580
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_columns, is_there, suggest
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    check_subset,
    collect_findings,
    compare_fact,
    list_recordings,
    refuse_other_layout,
)
from braindecode_vis.datasets.sources.betas_source import (
    AtlasSettings,
    BetasPart,
    FmriSource,
    Geometry,
)
from braindecode_vis.datasets.sources.fmri_volumes import (
    MaskedVolumes,
    check_same_space,
    read_volume,
    read_volume_header,
)
from braindecode_vis.datasets.sources.pictured_betas import PicturedSettings
from braindecode_vis.datasets.things_fmri.response_tables import (
    LAYOUT,
    MASKS,
    TABLES,
    VOLUMES,
    TableReader,
    VolumeReader,
    find_regions,
    find_table_files,
    name_conditions,
    open_response_table,
    place_voxels,
    read_table_trials,
    read_volume_runs,
    read_voxels,
)

if TYPE_CHECKING:
    import pandas as pd


class ThingsFmriConfig(AtlasSettings, PicturedSettings):
    """Folder of the betas, and the betas that are read.

    Parameters
    ----------
    root
        Folder with ``betas_csv``, ``betas_vol`` and ``brainmasks``, or some of them.
    form
        ``table`` or ``volume``; ``auto`` prefers the table, which has regions and noise ceilings, and refuses subjects
        with only volumes.
    subjects
        Numbers to read; by default all that exist. Voxels of different subjects do not correspond.
    sessions
        Numbers to read; all by default.
    rois
        Regions of the table whose union is kept, for example ``("V1", "lFFA", "glasser-V4")``.
    min_noise_ceiling
        Keep the voxels of the table whose noise ceiling for single trials (`nc_singletrial`, percent) is at least this.
        It was estimated by the authors from the repeated test images: so test responses choose the voxels; the notes of
        the result mention this.
    images
        Folder of the THINGS images; ``object_images`` or ``images`` below the root by default, if it holds all of
        them. They may not be redistributed, so they are never included with the betas.
    """

    kind: Literal["things_fmri"] = "things_fmri"
    form: Literal["auto", "table", "volume"] = "auto"
    subjects: tuple[int, ...] | None = None
    sessions: tuple[int, ...] | None = None
    rois: tuple[str, ...] = ()
    min_noise_ceiling: float | None = None

    title: ClassVar[str] = "THINGS-fMRI"

    def list_files(self) -> list[Path]:
        """Return tables or volumes, and masks, of every subject."""
        form, subjects = self._find_form()
        root = self.find_root()
        paths: list[Path] = []
        for subject in subjects:
            if form == "table":
                paths += find_table_files(root, subject)
            else:
                paths += sorted((root / VOLUMES / f"sub-{subject}").rglob("*_betas.nii.gz"))
                paths += sorted((root / VOLUMES / f"sub-{subject}").rglob("*_conditions.tsv"))
            mask = self._find_mask(subject)
            paths += [] if mask is None else [mask]
        return paths

    def list_image_folders(self) -> tuple[str, ...]:
        """Return the usual folders of pictures below the root."""
        return ("object_images", "images")

    def open_betas(self) -> FmriSource:
        """Return the betas as lazy parts."""
        form, subjects = self._find_form()
        parts: list[BetasPart] = []
        geometries: dict[str, Geometry] = {}
        for subject in subjects:
            opens = self._open_table if form == "table" else self._open_volumes
            opened, geometries[subject] = opens(subject)
            parts += opened
        parts, shown = self.number_parts(parts)
        shown["path"] = shown["concept"] + "/" + shown["stimulus_id"] + ".jpg"
        notes: dict[str, Any] = {"form": form, "rois_kept": list(self.rois)}
        if self.min_noise_ceiling is not None:
            # The noise ceiling was estimated from responses to the test images, which every report must mention.
            notes["voxels_chosen_with_test_images"] = f"nc_singletrial >= {self.min_noise_ceiling}"
        return self.join_subjects(parts, geometries, shown, notes)

    @collect_findings("layout")
    def check(self) -> Iterator[CheckFinding]:
        """Open every file, pair trials with responses and voxels with regions, and compare with declared counts."""
        import pandas as pd

        source, root = self.open_betas(), self.find_root()
        yield from self.check_recordings(list_recordings(source.parts))
        for subject in source.subjects:
            trials = pd.concat([p.trials for p in source.parts if p.group[0] == subject])
            for split in ("train", "test"):
                n, item = int((trials["split"] == split).sum()), f"subject {subject} {split}"
                if self.sessions is None:
                    yield compare_fact(item, n, self.manifest.facts[f"n_{split}"], root, what="trials")
                else:
                    yield CheckFinding(item, True, f"{n} trials of the chosen sessions")
            n_voxels = source.find_geometry(subject).n_voxels
            yield CheckFinding(f"subject {subject} voxels", True, f"{n_voxels} voxels")

    # --- finding ----------------------------------------------------------------------------------------------

    def _find_form(self) -> tuple[Literal["table", "volume"], list[str]]:
        root = self.find_root()
        tables = self._list(root / TABLES, r"^sub-(\d+)_ResponseData\.h5$") or self._list(
            root, r"^sub-(\d+)_ResponseData\.h5$"
        )
        volumes = self._list(root / VOLUMES, r"^sub-(\d+)$")
        # The table has regions and noise ceilings, the volumes do not.
        form = self.form if self.form != "auto" else ("table" if tables else "volume")
        there = tables if form == "table" else volumes
        if not there:
            name = "betas_csv/sub-01_ResponseData.h5" if form == "table" else "betas_vol/sub-01"
            raise DataError(
                f"{root} holds no {name} of THINGS-fMRI; fetch it from figshare+ (20492835), or pass its folder with "
                "--root. Raw runs (ds004192) are read by the data set bids_fmri."
            )
        if form == "volume" and (self.rois or self.min_noise_ceiling is not None):
            raise ConfigError(
                "dataset.rois and dataset.min_noise_ceiling need the table of betas; set dataset.form."
            )
        wanted = None if self.subjects is None else [f"{number:02d}" for number in self.subjects]
        if self.form == "auto" and tables:
            by_form = {"table": tables, "volume": volumes}
            refuse_other_layout(by_form, wanted, where=root, option="dataset.form")
        return form, check_subset(
            wanted, there, what=f"below {root}, {form} of subject", option="dataset.subjects"
        )

    def _list(self, folder: Path, pattern: str) -> list[str]:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(m[1] for name in names if (m := re.match(pattern, name)))

    def _find_mask(self, subject: str) -> Path | None:
        root = self.find_root()
        places = (root / MASKS, root / VOLUMES / MASKS, root)
        paths = [LAYOUT.place(place, "mask", subject=subject) for place in places]
        return next((path for path in paths if is_there(path)), None)

    def _choose_sessions(self, subject: str, sessions: pd.Series) -> list[int]:
        there = sorted({int(session) for session in sessions})
        return check_subset(
            self.sessions, there, what=f"subject {subject}, session", option="dataset.sessions"
        )

    # --- the table --------------------------------------------------------------------------------------------

    def _open_table(self, subject: str) -> tuple[list[BetasPart], Geometry]:
        root = self.find_root()
        path, stimuli_path, voxels_path = find_table_files(root, subject)
        trials = read_table_trials(stimuli_path, subject)
        voxels = read_voxels(voxels_path)
        table = open_response_table(path, n_trials=len(trials))
        rows = table.find_rows(voxels["voxel_id"].to_numpy())
        keep = self._choose_voxels(voxels, voxels_path)
        geometry, order = place_voxels(
            voxels[keep].reset_index(drop=True), self._find_mask(subject), voxels_path
        )
        rows = rows[keep][order]
        parts, sessions = [], self._choose_sessions(subject, trials["session"])
        for session, chosen in trials.groupby("session", sort=True):
            if int(str(session)) not in sessions:
                continue
            reader = TableReader(table, rows, chosen["column"].to_numpy())
            files = (path, stimuli_path, voxels_path)
            parts.append(
                BetasPart(chosen.drop(columns="column").reset_index(drop=True), files, len(rows), reader)
            )
        return parts, geometry

    def _choose_voxels(self, voxels: pd.DataFrame, path: Path) -> np.ndarray:
        keep = np.ones(len(voxels), bool)
        regions = find_regions(voxels, path)
        if self.rois:
            for name in self.rois:
                if name not in regions:
                    raise ConfigError(
                        f"{path} has no region {name!r}{suggest(name, regions)}; correct dataset.rois."
                    )
            keep = (voxels[list(self.rois)].to_numpy(float) == 1).any(axis=1)
        if self.min_noise_ceiling is not None:
            check_columns(voxels.columns, ("nc_singletrial",), what=str(path))
            keep &= voxels["nc_singletrial"].to_numpy(float) >= self.min_noise_ceiling
        if not keep.any():
            raise ConfigError(
                f"no voxel of {path} is left; lower dataset.min_noise_ceiling or name other regions."
            )
        return keep

    # --- the volumes ------------------------------------------------------------------------------------------

    def _open_volumes(self, subject: str) -> tuple[list[BetasPart], Geometry]:
        import pandas as pd

        root = self.find_root()
        mask_path = self._find_mask(subject)
        if mask_path is None:
            raise DataError(
                f"{root} has no brainmasks/sub-{subject}_space-T1w_brainmask.nii.gz, without which the volumes of "
                f"subject {subject} have no voxels; fetch it from figshare+."
            )
        runs = read_volume_runs(root / VOLUMES / f"sub-{subject}", subject)
        sessions = self._choose_sessions(subject, pd.concat([table["session"] for table in runs.values()]))
        values, affine = read_volume(mask_path)
        geometry = Geometry.from_mask(values > 0, affine)
        parts = []
        for path, table in runs.items():
            if int(table["session"].iloc[0]) not in sessions:
                continue
            header = read_volume_header(path)
            check_same_space(header, values.shape, affine, what=f"the mask {mask_path.name}")
            if header.n_volumes != len(table):
                raise DataError(
                    f"{path} holds {header.n_volumes} betas, but its conditions list {len(table)} trials; they are of "
                    "different runs."
                )
            kept = table[table["stimulus_id"] != ""]
            reader = VolumeReader(MaskedVolumes(header, values > 0), kept["column"].to_numpy())
            trials = kept.drop(columns="column").reset_index(drop=True)
            parts.append(BetasPart(trials, (path, name_conditions(path)), geometry.n_voxels, reader))
        return parts, geometry
