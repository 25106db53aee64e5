"""fMRI during the scan: watches a folder in which volumes appear, and writes a recorded run like a scanner.

Owns the folder that is watched (NIfTI, one file a volume or a series that grows, or DICOM: Siemens mosaics and enhanced
files), the order and the completeness of volumes, their way into the voxels of a run, and the table of events that
grows beside them. Knows no motion correction: volumes must lie on the grid of the run. What is made of them is
`braindecode_vis.parts.live.volume_decoder`'s.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, check_option, require
from braindecode_vis.datasets.bids.fmri_dataset import BoldSettings, make_stimulus_id
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, open_stream, read_volume_header
from braindecode_vis.parts.live.stream_roles import Chunk, Marker, StreamInfo
from braindecode_vis.pipeline.finished_run import FinishedRun

_NIFTI = (".nii", ".nii.gz")
_DICOM = (".dcm", ".ima")
#: Columns that name the picture where no other is asked for, the first that is there.
STIMULUS_COLUMNS = ("stimulus_id", "stim_file", "stimulus", "stimulus_name")
# A file that is written has another size or time at the next look, this much later (s).
_SETTLE_S = 0.02
_GRID_MM = 0.01
#: Files of another series that are named before the rest is left out in silence.
MOST_REFUSED = 3


@dataclass(frozen=True)
class _Volume:
    """One volume of a file, in the voxels of the run."""

    number: int
    values: np.ndarray
    file: str
    seen: float


# --- the folder -------------------------------------------------------------------------------------------


class FolderSource:
    """Watches a folder for volumes; a `braindecode_vis.parts.live.stream_roles.StreamSource`.

    A volume is taken once its file is complete: its size no longer changes and is what the header says. Volumes are
    handed on in the order of their numbers (of the file name, or of the DICOM instance), and their times count from the
    first volume of the scan, as the onsets of a BIDS events table do. One that does not come is named after a while,
    and the time axis keeps its place.

    Parameters
    ----------
    folder
        Where the scanner writes.
    geometry
        Voxels of the run; every voxel of the volume without.
    t_r
        Repetition time of the run in s. Volumes whose header says another one are refused.
    markers
        A BIDS table of events, planned as a whole or growing while the scan runs. It need not exist yet.
    stimulus_column
        Its column that names the picture; one of `STIMULUS_COLUMNS` by default.
    trial_types
        Values of its column `trial_type` that are trials; by default every row that names a picture.
    reader
        ``auto``; or ``dcm2niix``, which converts each file by the program of that name on the PATH.
    first
        Number of the first volume; 0 if there is one of that number, else 1.
    patience
        How long a missing volume is waited for once a later one is there, in s; one repetition time by default.
    wait
        How long `connect` waits for the first volume, in s.
    idle
        The scan is over when no volume has come for so long, in s; 10 repetition times, at least 30 s, by default.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        geometry: Geometry | None = None,
        t_r: float | None = None,
        markers: Path | str | None = None,
        stimulus_column: str | None = None,
        trial_types: tuple[str, ...] | None = None,
        reader: Literal["auto", "dcm2niix"] = "auto",
        first: int | None = None,
        patience: float | None = None,
        wait: float = 10.0,
        idle: float | None = None,
    ) -> None:
        check_option("the reader of volumes", reader, ("auto", "dcm2niix"))
        if reader == "dcm2niix" and shutil.which("dcm2niix") is None:
            raise DataError("dcm2niix is not on the PATH; install it, or leave the reader out.")
        self.folder = Path(folder).expanduser()
        self.geometry, self.t_r, self.reader, self.first = geometry, t_r, reader, first
        self.patience, self.wait, self.idle = patience, wait, idle
        table = None if markers is None else Path(markers).expanduser()
        self.events = None if table is None else EventsTable(table, stimulus_column, trial_types)
        self._sizes: dict[
            str, tuple[int, int, float]
        ] = {}  # name: size, time of change, when they were seen first
        self._tried: dict[str, tuple[int, int]] = {}  # files that were found cut short, as they were then
        self._done: set[str] = set()
        self._series: dict[str, int] = {}  # a file of many volumes: how many of them are taken
        self._ready: dict[int, _Volume] = {}
        self._taken: dict[int, str] = {}
        self._notes: list[str] = []
        self._grids: dict[bytes, np.ndarray] = {}
        self._uid = ""
        self._origin: int | None = first
        self._next = 0
        self._n_voxels = 0 if geometry is None else geometry.n_voxels
        self._last = 0.0
        self._begun = self._connected = False
        self._n_refused = 0
        self._opened = 0.0

    # --- the contract -------------------------------------------------------------------------------------

    def connect(self) -> StreamInfo:
        """Look at the folder, and at its first volume if there is one within `wait`.

        Raises
        ------
        DataError
            If there is no such folder, its volumes are not those of the run, or nothing says the repetition time.
        """
        if not self.folder.is_dir():
            beside = self.folder.parent
            there = sorted(p.name for p in beside.iterdir() if p.is_dir())[:8] if beside.is_dir() else []
            raise DataError(
                f"the folder {self.folder} does not exist; give with --stream the folder in which volumes appear"
                + (f" (beside it: {', '.join(there)})." if there else ".")
            )
        until = time.monotonic() + self.wait
        while not self._scan() and time.monotonic() < until:
            time.sleep(_SETTLE_S)
        if self.t_r is None:
            raise DataError(
                f"{self.folder} holds no volume with the repetition time in its header; give it with --tr SECONDS."
            )
        if not self._ready:
            self._notes.append(f"{self.folder} holds no volume yet; waiting for the scanner.")
        self._last, self._connected = time.monotonic(), True
        words = "" if self.events is None else f"events table {self.events.path}"
        return StreamInfo(str(self.folder), "fmri", (), 1 / self.t_r, "", words)

    def read(self, timeout: float) -> Chunk:
        """Return the volumes that have become complete, float32 of shape (n_voxels, n_volumes), and new events."""
        until = time.monotonic() + timeout
        # What lay there when the folder was opened is at hand from now on.
        self._opened = self._opened or time.perf_counter()
        while True:
            self._scan()
            markers = () if self.events is None else tuple(self.events.read())
            volumes = list(self._hand_on())
            is_over = self._is_over()
            if volumes or markers or self._notes or is_over or time.monotonic() >= until:
                break
            time.sleep(min(_SETTLE_S, max(0.0, until - time.monotonic())))
        notes, self._notes = tuple(self._notes), []
        if volumes:
            self._last = time.monotonic()
        samples = np.empty((self._n_voxels, len(volumes)), np.float32)
        for column, volume in enumerate(volumes):
            samples[:, column] = volume.values
        t_r, origin = self.t_r or 0.0, self._origin or 0
        times = np.array([(volume.number - origin) * t_r for volume in volumes])
        return Chunk(
            samples, times, markers, notes, max(volumes[-1].seen, self._opened) if volumes else 0.0, is_over
        )

    def close(self) -> None:
        """Forget what has not been handed on."""
        self._ready.clear()

    # --- order --------------------------------------------------------------------------------------------

    def _hand_on(self) -> Iterator[_Volume]:
        """Yield what can be handed on: the next volume, or a later one if the next is given up."""
        if not self._ready:
            return
        if not self._begun:
            lowest = min(self._ready)
            self._origin = self._next = min(lowest, 1) if self.first is None else self.first
            self._begun = True
        patience = self.t_r if self.patience is None else self.patience
        while self._ready:
            if self._next not in self._ready:
                waited = time.perf_counter() - min(v.seen for v in self._ready.values())
                # At the end of a scan nothing later will come that could wait longer.
                if waited < (patience or 0.0):
                    return
                found = min(self._ready)
                lost = f"volume {self._next} is" if found == self._next + 1 else None
                self._notes.append(
                    f"{lost or f'volumes {self._next} to {found - 1} are'} missing in "
                    f"{self.folder.name}; the scan continues with volume {found}."
                )
                self._next = found
            volume = self._ready.pop(self._next)
            self._taken[self._next] = volume.file
            self._next += 1
            yield volume

    def _is_over(self) -> bool:
        if not self._last or self._ready:
            return False
        idle = max(30.0, 10 * (self.t_r or 0.0)) if self.idle is None else self.idle
        if time.monotonic() - self._last < idle:
            return False
        waiting = sorted(set(self._sizes) - self._done)
        if waiting:
            self._notes.append(f"{waiting[0]} is incomplete and is left out.")
        self._notes.append(f"no volume has come for {idle:g} s: the scan is over.")
        return True

    # --- files --------------------------------------------------------------------------------------------

    def _scan(self) -> bool:
        """Take every file that is complete; return whether a volume is ready."""
        try:
            entries = sorted(self.folder.iterdir())
        except OSError as error:
            raise DataError(f"the folder {self.folder} cannot be read any more ({error}).") from error
        now = time.perf_counter()
        for path in entries:
            name = path.name
            if name in self._done or name.startswith(".") or not _is_volume(path):
                continue
            try:
                stat = path.stat()
            except OSError:  # renamed between listing and looking
                continue
            size = (stat.st_size, stat.st_mtime_ns)
            known = self._sizes.get(name)
            if known is None or known[:2] != size:
                self._sizes[name] = (*size, now)
                # What has lain there since before the session is not being written.
                if time.time() - stat.st_mtime < 1:
                    continue
            elif now - known[2] < _SETTLE_S:
                continue
            if self._tried.get(name) == size:
                continue
            try:
                volumes = list(self._open(path))
            except DataError as error:
                if not self._connected:
                    raise
                # A localiser or another series that falls into the folder ends no scan.
                volumes, self._n_refused = [], self._n_refused + 1
                self._done.add(name)
                if self._n_refused <= MOST_REFUSED:
                    more = (
                        "" if self._n_refused < MOST_REFUSED else ", and further such files without a message"
                    )
                    self._notes.append(f"{name} is left out{more}: {error}")
            for volume in volumes:
                self._file_away(volume)
            if name not in self._done:
                self._tried[name] = size
        return bool(self._ready)

    def _file_away(self, volume: _Volume) -> None:
        other = self._taken.get(volume.number) or (
            self._ready[volume.number].file if volume.number in self._ready else None
        )
        if other is not None:
            self._notes.append(
                f"volume {volume.number} came twice, as {other} and {volume.file}; the first is kept."
            )
        elif self._begun and volume.number < self._next:
            self._notes.append(f"volume {volume.number} ({volume.file}) came too late and is left out.")
        else:
            self._ready[volume.number] = volume

    def _open(self, path: Path) -> Iterator[_Volume]:
        """Yield the complete volumes of a file that have not been taken; notes files that are done with."""
        if path.name.endswith(_NIFTI):
            yield from self._open_nifti(path, path.name)
        elif self.reader == "dcm2niix":
            yield from self._convert(path)
        else:
            yield from self._open_dicom(path)

    def _open_nifti(self, path: Path, name: str, number: int | None = None) -> Iterator[_Volume]:
        try:
            header = read_volume_header(path)
        except DataError:
            return  # the header itself is not complete
        seen = time.perf_counter()
        size = int(np.prod(header.shape)) * header.dtype.itemsize
        n_there = (_measure(path) - header.offset) // size
        is_series = header.n_volumes > 1
        if not is_series and n_there < 1:
            return
        if is_series and path.name.endswith(".gz") and n_there < header.n_volumes:
            return  # a compressed series is written anew each time
        self._check_t_r(_read_t_r(path, header.t_r, header.n_volumes), name)
        rows = self._find_rows(header.shape, header.affine, name)
        read = MaskedVolumes(header, np.ones(header.shape, bool))
        if rows is not None:
            read.flat = np.ravel_multi_index(tuple(rows), header.shape, order="F").astype(np.intp)
        self._n_voxels = read.n_voxels
        if not is_series:
            self._done.add(name)
            if number is None:
                number = _find_number(name)
            if number is None:
                raise DataError(
                    f"{path} has no number in its name, so the order of volumes is not known; names must "
                    "end with the "
                    "number of the volume (vol_0001.nii), or write one growing series."
                )
            yield _Volume(number, read(0, 1)[0], name, seen)
            return
        begin, end = self._series.get(name, 0), min(n_there, header.n_volumes)
        for row in range(begin, end):
            yield _Volume(row, read(row, row + 1)[0], f"{name}, volume {row + 1}", seen)
        read.close()
        self._series[name] = max(begin, end)
        if end == header.n_volumes:
            self._done.add(name)

    def _open_dicom(self, path: Path) -> Iterator[_Volume]:
        require("pydicom", what="reading DICOM volumes")
        from pydicom import dcmread
        from pydicom.errors import InvalidDicomError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # nibabel calls its readers experimental
            from nibabel.nicom import dicomwrappers
        seen = time.perf_counter()
        try:
            head = dcmread(path, defer_size=1024)
            data = dcmread(path)
            expected = head.Rows * head.Columns * head.BitsAllocated // 8 * int(head.get("NumberOfFrames", 1))
            if len(data.PixelData) < expected:
                return
        except (InvalidDicomError, EOFError, OSError, AttributeError, ValueError):
            return  # cut short: it is tried again when it has grown
        uid = str(data.get("SeriesInstanceUID", ""))
        if self._uid and uid != self._uid:
            self._done.add(path.name)
            self._notes.append(
                f"{path.name} belongs to another series ({data.get('SeriesDescription', uid)}) than the volumes before "
                "it, and is left out."
            )
            return
        try:
            wrapper = dicomwrappers.wrapper_from_data(data)
            values, affine = np.asarray(wrapper.get_data(), np.float32), np.asarray(wrapper.affine, float)
        except Exception as error:  # nibabel raises many kinds at files without position or mosaic
            raise DataError(
                f"{path} holds no volume that can be placed ({error}); convert with dcm2niix (--reader dcm2niix)."
            ) from error
        if values.ndim == 4 and values.shape[3] == 1:
            values = values[..., 0]
        if values.ndim != 3:
            raise DataError(
                f"{path} holds one slice or several volumes (shape {values.shape}), not one volume: "
                "mosaics of Siemens and enhanced DICOM of one volume can be read; convert others with "
                "dcm2niix (--reader dcm2niix)."
            )
        self._uid = uid
        # DICOM counts x and y to the left and to the back, NIfTI to the right and to the front.
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        self._check_t_r(_read_dicom_t_r(data), path.name)
        shape = (values.shape[0], values.shape[1], values.shape[2])
        rows = self._find_rows(shape, affine, path.name)
        flat = values.ravel() if rows is None else values[tuple(rows)]
        self._n_voxels = len(flat)
        number = data.get("InstanceNumber") or data.get("AcquisitionNumber") or _find_number(path.name)
        if number is None:
            raise DataError(
                f"{path} has neither an instance nor an acquisition number; its place in the order is not known."
            )
        self._done.add(path.name)
        yield _Volume(int(number), flat, path.name, seen)

    def _convert(self, path: Path) -> Iterator[_Volume]:
        with tempfile.TemporaryDirectory() as folder:
            command = ["dcm2niix", "-s", "y", "-b", "n", "-z", "n", "-f", "volume", "-o", folder, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            made = sorted(Path(folder).glob("*.nii"))
            if not made:
                if done.returncode > 1:  # 0 and 1: nothing was wrong, or the file is no DICOM yet
                    self._notes.append(f"dcm2niix cannot convert {path.name}: {done.stderr.strip()[:120]}")
                return
            number = _find_number(path.name)
            yield from self._open_nifti(made[0], path.name, number)
            self._done.add(path.name)

    # --- what a volume must be ----------------------------------------------------------------------------

    def _check_t_r(self, found: float, name: str) -> None:
        if not found:
            return
        if self.t_r is None:
            self.t_r = found
        elif abs(found / self.t_r - 1) > 1e-3:
            raise DataError(
                f"{name} says a repetition time of {found:g} s, but the run learnt from {self.t_r:g} s; "
                "scan with the repetition time of the run, or use a run of this sequence."
            )

    def _find_rows(self, shape: tuple[int, int, int], affine: np.ndarray, name: str) -> np.ndarray | None:
        """Return the place of every voxel of the run in a volume, int of shape (3, n_voxels); None takes all of it.

        Axes may run in another order or the other way round, which loses nothing; anything else is another grid.
        """
        if self.geometry is None:
            return None
        key = np.array(shape).tobytes() + np.round(affine, 4).tobytes()
        if key not in self._grids:
            self._grids[key] = _match_grid(self.geometry, shape, affine, name)
            if len(self._grids) == 1 and not np.allclose(
                affine, np.asarray(self.geometry.affine), atol=_GRID_MM
            ):
                self._notes.append(
                    "the axes of the volumes have another orientation than those of the run; they are reoriented."
                )
        return self._grids[key]


def _match_grid(geometry: Geometry, shape: tuple[int, int, int], affine: np.ndarray, name: str) -> np.ndarray:
    mask, own = geometry.mask, geometry.affine
    if mask is None or own is None:
        raise DataError(
            "the run has no voxel positions (a surface, or betas without a mask), so it cannot decode "
            "volumes; make a run of volumes with a mask."
        )
    if sorted(shape) != sorted(mask.shape):
        raise DataError(
            f"{name} has volumes of {shape}, but the mask of the run {tuple(mask.shape)}: another resolution or field "
            "of view; scan with the protocol of the run, or resample the mask."
        )
    # Voxels of the mask to those of the volume: flips and swaps of axes if the grid is the same one.
    change = np.linalg.inv(affine) @ np.asarray(own, float)
    turn = np.round(change[:3, :3])
    indices = np.stack(np.unravel_index(geometry.voxel_ids, mask.shape))  # (3, n_voxels)
    exact = change[:3, :3] @ indices + change[:3, 3:]
    rows = np.round(exact).astype(np.int64)
    is_turn = (np.abs(turn).sum(axis=0) == 1).all() and (np.abs(turn).sum(axis=1) == 1).all()
    off = float(np.abs((exact - rows).T @ affine[:3, :3].T).max()) if rows.size else 0.0
    inside = (rows >= 0).all() and (rows < np.array(shape)[:, None]).all()
    if not is_turn or off > _GRID_MM or not inside:
        centre = np.array([*(np.array(shape) / 2), 1.0])
        apart = float(
            np.linalg.norm((affine @ centre - np.asarray(own) @ [*(np.array(mask.shape) / 2), 1.0])[:3])
        )
        raise DataError(
            f"{name} is on another grid than the mask of the run (centres {apart:.2f} mm apart, or other angles): "
            "align the field of view to that of the run, or give registered volumes."
        )
    return rows


def _is_volume(path: Path) -> bool:
    name = path.name.lower()
    # Siemens names end in .IMA or in nothing at all.
    if name.endswith((*_NIFTI, *_DICOM)):
        return True
    return (not path.suffix or path.suffix[1:].isdigit()) and _is_dicom(path)


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _find_number(name: str) -> int | None:
    """Return the last number of a file name, which counts volumes."""
    stem = re.sub(r"(\.nii(\.gz)?|\.dcm|\.ima)$", "", name, flags=re.IGNORECASE)
    found = re.findall(r"\d+", stem)
    return int(found[-1]) if found else None


def _measure(path: Path) -> int:
    """Return how many bytes a file holds, after decompression; those before the end of one that is cut short."""
    if not path.name.endswith(".gz"):
        return path.stat().st_size
    n = 0
    try:
        with open_stream(path) as file:
            while piece := file.read(1 << 22):
                n += len(piece)
    except (EOFError, OSError, zlib.error):
        return 0
    return n


def _read_t_r(path: Path, t_r: float, n_volumes: int) -> float:
    """Return the repetition time of a NIfTI file in s, 0 where it does not say."""
    import nibabel

    header: Any = nibabel.load(path).header
    unit = header.get_xyzt_units()[1] if hasattr(header, "get_xyzt_units") else "unknown"
    if n_volumes == 1:
        t_r = float(header["pixdim"][4])
        # Of a single volume, 1 is what libraries write that know nothing.
        if unit == "unknown" or t_r == 1.0:
            return 0.0
    return t_r * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0)


def _read_dicom_t_r(data: Any) -> float:
    found = data.get("RepetitionTime")
    if found is None:
        try:
            found = (
                data.SharedFunctionalGroupsSequence[0].MRTimingAndRelatedParametersSequence[0].RepetitionTime
            )
        except (AttributeError, IndexError):
            return 0.0
    return float(found) / 1000


# --- events -----------------------------------------------------------------------------------------------


class EventsTable:
    """A BIDS table of events that may grow: each row that names a picture becomes a marker once.

    Parameters
    ----------
    path
        The table, which need not exist yet.
    stimulus_column, trial_types
        As in `FolderSource`.
    """

    def __init__(
        self, path: Path, stimulus_column: str | None = None, trial_types: tuple[str, ...] | None = None
    ) -> None:
        self.path, self.stimulus_column, self.trial_types = path, stimulus_column, trial_types
        self._position = 0
        self._columns: list[str] | None = None

    def read(self) -> list[Marker]:
        """Return the trials of the rows that were written since the last call; half a row waits for its end.

        Raises
        ------
        DataError
            If no column names the picture, or an onset is no number.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return []
        end = text.rfind(b"\n") + 1
        self._position += end
        markers = []
        for line in text[:end].decode("utf-8-sig").splitlines():
            cells = [cell.strip() for cell in line.split("\t")]
            if not any(cells):
                continue
            if self._columns is None:
                self._columns = self._check_columns(cells)
                continue
            row = dict(zip(self._columns, cells, strict=False))
            shown = row.get(str(self.stimulus_column), "")
            if shown in ("", "n/a") or (
                self.trial_types is not None and row.get("trial_type") not in self.trial_types
            ):
                continue
            try:
                onset = float(row["onset"])
            except ValueError as error:
                raise DataError(
                    f"{self.path} has the onset {row['onset']!r}, which is not a number."
                ) from error
            markers.append(Marker(onset, make_stimulus_id(shown)))
        return markers

    def _check_columns(self, columns: list[str]) -> list[str]:
        if self.stimulus_column is None:
            self.stimulus_column = next((name for name in STIMULUS_COLUMNS if name in columns), None)
        if "onset" not in columns or self.stimulus_column not in columns:
            raise DataError(
                f"{self.path} has the columns {', '.join(columns)}; it needs onset and one that names the picture "
                f"({self.stimulus_column or ', '.join(STIMULUS_COLUMNS)})."
            )
        return columns


# --- a scan that is played ----------------------------------------------------------------------------------


def find_scan(run: FinishedRun, number: int | None = None) -> tuple[Path, Path]:
    """Return image and table of events of a scan of the run's own data set, for `write_volumes`.

    Parameters
    ----------
    run
        A run of BOLD time series.
    number
        Which scan, from 1; by default the first one with test trials, or else the first.

    Raises
    ------
    ConfigError
        If the run read no time series, or there is no such scan.
    """
    dataset = run.config.dataset
    if not isinstance(dataset, BoldSettings):
        raise ConfigError(
            f"{run.folder.path} decodes {dataset.kind}, which has no volumes; give a run of BOLD time "
            "series (bids_fmri)."
        )
    scans = dataset.open_bold().runs
    if number is not None and not 1 <= number <= len(scans):
        raise ConfigError(f"--recording is {number}, but the data set has the scans 1 to {len(scans)}.")
    tested = [scan for scan in scans if (scan.trials["split"] == "test").any()]
    scan = scans[number - 1] if number is not None else (tested or scans)[0]
    return scan.files[0], scan.files[1]


def write_volumes(
    image: Path,
    folder: Path,
    *,
    events: Path | None = None,
    speed: float = 1.0,
    duration: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Path]:
    """Write a recorded run into a folder as a scanner would, volume by volume, and yield each file.

    Parameters
    ----------
    image
        A NIfTI file of many volumes.
    folder
        Made if needed; must hold no volumes.
    events
        Its table of events, which is copied beside the volumes as ``events.tsv`` and grows as they come.
    speed
        1 is that of the scanner; infinity does not wait.
    duration
        Seconds of the scan to write; all by default.
    sleep
        Waits for so many seconds.

    Raises
    ------
    DataError
        If the folder holds volumes, which would be taken for those of this run.
    """
    import nibabel

    header = read_volume_header(image)
    folder.mkdir(parents=True, exist_ok=True)
    if old := next((path for path in sorted(folder.iterdir()) if _is_volume(path)), None):
        raise DataError(f"{folder} holds volumes already, first {old.name}; give an empty folder.")
    t_r = _read_t_r(image, header.t_r, header.n_volumes) or 1.0
    read = MaskedVolumes(header, np.ones(header.shape, bool))
    lines = [] if events is None else events.read_text().splitlines(keepends=True)
    table = folder / "events.tsv"
    if lines:
        table.write_text(lines.pop(0))
    begun = time.monotonic()
    n = header.n_volumes if duration is None else min(header.n_volumes, max(1, round(duration / t_r)))
    for number in range(n):
        due = begun + (number + 1) * t_r / speed - time.monotonic()
        if due > 0:
            sleep(due)
        # What began while this volume was taken is known when it is written.
        while lines and float(lines[0].split("\t", 1)[0]) < (number + 1) * t_r:
            with table.open("a") as file:
                file.write(lines.pop(0))
        made: Any = nibabel.Nifti1Image(read(number, number + 1).reshape(header.shape), header.affine)
        made.header["pixdim"][4] = t_r
        made.header.set_xyzt_units("mm", "sec")
        path = folder / f"vol-{number + 1:05d}.nii"
        made.to_filename(path)
        yield path
