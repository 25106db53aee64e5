"""NSD's preprocessed time series, the input of whole-cortex decoders over parcels and time instead of betas.

Owns the pairing of runs with their designs. A session has twelve runs of pictures; if it has fourteen, the first and
the last are rest and are left out. A design file is a column with one number for each volume: the 73KID (from 1) of the
picture that begins there, else 0. Every run is compared with ``nsd_expdesign.mat``, so another meaning of the column is
found. `braindecode_vis.preprocessing.bold` processes the series.

References
----------
Allen et al. (2022), doi:10.1038/s41593-021-00962-x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.checks import DataError, is_there, refuse_damage
from braindecode_vis.datasets.manifests import CheckFinding, collect_findings
from braindecode_vis.datasets.nsd.beta_files import find_mask, find_regions, make_volume_geometry
from braindecode_vis.datasets.nsd.dataset import NsdSettings
from braindecode_vis.datasets.nsd.experiment_design import describe_protocol, make_stimuli, make_trials
from braindecode_vis.datasets.sources.betas_source import count_repetitions
from braindecode_vis.datasets.sources.bold_source import (
    BoldRun,
    BoldSource,
    CleanConfig,
    ModelConfig,
    WindowConfig,
)
from braindecode_vis.datasets.sources.fmri_volumes import read_volume_header

if TYPE_CHECKING:
    import pandas as pd

T_R = 4 / 3
"""Repetition time of the 1.8 mm series in s: they were resampled in time, so volume n is at n times this value."""
# Allen et al. (2022): 3 s of picture, 1 s of pause.
PICTURE_S = 3.0
_FILE = re.compile(r"^timeseries_session(\d+)_run(\d+)\.nii(\.gz)?$")


class NsdTimeseriesConfig(NsdSettings):
    """Place of the bucket's folders, and how a trial is cut from the series; the whole cortex by default.

    Parameters
    ----------
    sessions
        As in `NsdSettings`; by default all sessions whose series exist.
    model
        By default the volumes from the onset to 8 s after it, as a time axis of six, after slow drifts were removed.
    motion
        Regress out the six motion parameters in the files beside the series.
    atlas
        As in `BetasPlan`. A label volume must be in the functional space of the subject.
    """

    kind: Literal["nsd_timeseries"] = "nsd_timeseries"
    mask: str = "cortex"
    # No sets by default: whole-cortex networks read parcels, and every set needs one more volume.
    rois: tuple[str, ...] | None = ()
    model: ModelConfig = Field(
        default=WindowConfig(start=0.0, stop=8.0, keep="times", clean=CleanConfig(scaling="zscore")),
    )
    motion: bool = False

    def hash_inputs(self) -> dict[str, str]:
        """Return the digest of every file that is read."""
        root, design = self.open_design()
        paths = [design.path]
        for session, files in self._find_runs(root).items():
            for path in _leave_out_rest(files, session):
                paths += [path, _beside(path, "design"), *([_beside(path, "motion")] if self.motion else [])]
        return self.hash_files(root, find_regions(root, self.subject, "func1pt8mm"), paths)

    def open_bold(self) -> BoldSource:
        """Return the runs of pictures, lazily."""
        import pandas as pd

        root, design = self.open_design()
        found = self._find_runs(root)
        trials = count_repetitions([make_trials(design, self.subject, session) for session in found])
        runs: list[BoldRun] = []
        for (session, files), table in zip(found.items(), trials, strict=True):
            paths, tables = (
                _leave_out_rest(files, session),
                [own for _, own in table.groupby("run", sort=True)],
            )
            if len(paths) != len(tables):
                raise DataError(
                    f"session {session:02d} in {files[0].parent} has {len(paths)} runs of pictures, the design "
                    f"{len(tables)}; fetch what is missing."
                )
            runs += [self._open_run(path, own) for path, own in zip(paths, tables, strict=True)]
        regions = find_regions(root, self.subject, "func1pt8mm")
        mask, affine = find_mask(regions, root, self.subject, self.mask, self.mask_file)
        geometry = make_volume_geometry(regions, mask, affine, self.rois, {})
        stimuli = make_stimuli(pd.concat(trials))
        notes = {
            "protocol": f"{describe_protocol(trials, len(design.shared))}; time series",
            "model": self.model.hashed_fields(),
        }
        return BoldSource(
            tuple(runs), stimuli, self.model, self.make_plan(), geometry, notes=notes,
            read_image=self.open_pictures(stimuli, root),
        )  # fmt: skip

    @collect_findings("data")
    def check(self) -> Iterator[CheckFinding]:
        """Open every header and design, and pair volumes with trials."""
        source = self.open_bold()
        n_trials = sum(len(run.trials) for run in source.runs)
        yield CheckFinding("time series", True, f"{len(source.runs)} runs of pictures, {n_trials} trials")
        yield CheckFinding("protocol", True, str(source.notes["protocol"]))

    def _find_runs(self, root: Path) -> dict[int, list[Path]]:
        """Return the files of each requested session, in the order of their runs."""
        place = Path(f"ppdata/subj{self.subject:02d}/func1pt8mm/timeseries")
        folder = next(
            (base / place for base in (root / "nsddata_timeseries", root) if (base / place).is_dir()), None
        )
        if folder is None:
            raise DataError(
                f"{root / 'nsddata_timeseries' / place} does not exist; fetch it, or correct the root."
            )
        found: dict[int, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if match := _FILE.match(path.name):
                found.setdefault(int(match[1]), []).append(path)
        wanted = self.list_sessions(sorted(found))
        missing = [session for session in wanted if session not in found]
        if missing or not wanted:
            raise DataError(
                f"{folder} holds no time series of session {missing[0] if missing else 1:02d}; fetch them, or list the "
                "sessions to use with --set dataset.sessions=[...]."
            )
        return {session: found[session] for session in wanted}

    def _open_run(self, path: Path, trials: pd.DataFrame) -> BoldRun:
        import pandas as pd

        header = read_volume_header(path)
        design = _beside(path, "design")
        shown = _read_columns(design, 1)[:, 0]
        if not len(shown) == header.n_volumes:
            raise DataError(
                f"{design} has {len(shown)} rows, but {path.name} {header.n_volumes} volumes: the design must be that "
                "of the 1.8 mm series, with one row for each volume."
            )
        starts = np.flatnonzero(shown)
        expected = trials["nsd_id"].to_numpy() + 1
        if len(starts) != len(expected) or not np.array_equal(shown[starts], expected):
            raise DataError(
                f"{design} begins {len(starts)} pictures, and not the {len(expected)} that nsd_expdesign.mat lists for "
                f"run {trials['run'].iloc[0]} of session {trials['session'].iloc[0]}: a run of another number or "
                "subject, or a column with another meaning."
            )
        files, confounds = [path, design], np.zeros((header.n_volumes, 0))
        if self.motion:
            files.append(_beside(path, "motion"))
            confounds = _read_columns(files[-1], 6)
            if len(confounds) != header.n_volumes:
                raise DataError(
                    f"{files[-1]} has {len(confounds)} rows for {header.n_volumes} volumes; fetch it again."
                )
        # Every picture starts with a volume: 4 s are three steps of 4/3 s.
        timed = trials.assign(onset=T_R * starts, duration=PICTURE_S).reset_index(drop=True)
        others = pd.DataFrame({"onset": [], "duration": [], "trial_type": []})
        return BoldRun(timed, others, header, T_R, 0.0, confounds, tuple(files))


def _leave_out_rest(files: Sequence[Path], session: int) -> list[Path]:
    """Return the twelve runs of pictures of a session, without the resting ones around them."""
    # If there are fourteen runs, the first and the last are rest (Allen et al. 2022).
    numbers = [int(_FILE.match(path.name)[2]) for path in files]  # type: ignore[index]
    if numbers == list(range(1, 15)):
        return list(files[1:-1])
    if numbers == list(range(1, len(numbers) + 1)):
        return list(files)
    raise DataError(
        f"session {session:02d} in {files[0].parent} has the runs {', '.join(map(str, numbers))}; runs are missing, "
        "fetch them."
    )


def _beside(path: Path, kind: str) -> Path:
    """Return the design or the motion parameters of a run."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii").removeprefix("timeseries")
    return path.parent.parent / kind / f"{kind}{stem}.tsv"


def _read_columns(path: Path, n_columns: int) -> np.ndarray:
    """Return a table of numbers without a header."""
    if not is_there(path):
        raise DataError(f"{path} does not exist; fetch it with the time series.")
    with refuse_damage(f"{path} is not a table of numbers", ValueError):
        values = np.loadtxt(path, ndmin=2)
    if values.shape[1] != n_columns:
        raise DataError(f"{path} has {values.shape[1]} columns, not {n_columns}; it is another file.")
    return values
