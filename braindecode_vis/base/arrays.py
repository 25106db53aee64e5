"""Data classes that are passed between the stages: Recording, Responses, Embeddings, Score.

All are frozen and checked on creation. After preprocessing the modality is gone: EEG epochs, MEG epochs and
fMRI betas are all `Responses`. Rows are matched by `stimulus_id`, never by position, and embeddings are
compared only inside one named space. This module depends on no file format and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braindecode_vis.base.checks import DataError, check_columns, check_finite

Modality = Literal["eeg", "meg", "fmri"]
TRIAL_COLUMNS = ("subject", "session", "run", "stimulus_id", "repetition", "split")
EVENT_COLUMNS = ("onset", "stimulus_id")
BLOCK_BYTES = 64 << 20  # of trials that are looked at together


@dataclass(frozen=True)
class Recording:
    """Files of one run of one subject, and what was shown during it; without the samples.

    Parameters
    ----------
    subject, session, run
        BIDS entities, as text.
    modality
        ``eeg``, ``meg`` or ``fmri``.
    files
        Paths that belong together, the data file first.
    events : DataFrame
        Columns `onset` (s from the start of the file, ascending) and `stimulus_id`.
    known_ids
        Ids of the stimulus set; every event must name one of them. None skips the check.
    """

    subject: str
    session: str
    run: str
    modality: Modality
    files: tuple[Path, ...]
    events: pd.DataFrame
    known_ids: frozenset[str] | None = None

    def __post_init__(self) -> None:
        where = f"subject {self.subject}, session {self.session}, run {self.run}"
        check_columns(self.events.columns, EVENT_COLUMNS, what=f"the event table of {where}")
        onsets = self.events["onset"].to_numpy(dtype=float)
        if (np.diff(onsets) < 0).any():
            row = int(np.flatnonzero(np.diff(onsets) < 0)[0]) + 1
            raise DataError(
                f"events of {where} are not sorted by onset: row {row} starts before row {row - 1}."
            )
        if self.known_ids is not None:
            unknown = [i for i in self.events["stimulus_id"] if i not in self.known_ids]
            if unknown:
                raise DataError(
                    f"{len(unknown)} event(s) of {where} name images outside the stimulus set, "
                    f"first {unknown[0]!r}: the image list belongs to another release."
                )


class TrialRows:
    """Some trials (or pictures) of a larger array, or averages of trials, read on demand.

    Can be read like an array: ``len``, ``shape``, ``ndim``, ``dtype``, indexing along all axes, and conversion by
    NumPy. Indexing returns an array in memory.

    Parameters
    ----------
    data : array of shape (n_all, ...)
        Usually a memory map.
    rows : integer array
        Trials of `data`, in any order.
    starts : integer array of shape (n_trials,), optional
        Where in `rows` the trials of each average begin; averages are float32. Without it every row is a trial.

    Examples
    --------
    >>> rows = TrialRows(np.arange(10.0)[:, None], np.array([7, 2, 4]), np.array([0, 1]))
    >>> rows.shape, rows[1:].tolist()
    ((2, 1), [[3.0]])
    """

    def __init__(self, data: np.ndarray, rows: np.ndarray, starts: np.ndarray | None = None) -> None:
        self.data, self.rows, self.starts = data, np.asarray(rows), starts
        self.dtype = data.dtype if starts is None else np.dtype(np.float32)
        self.shape = (len(self.rows) if starts is None else len(starts), *data.shape[1:])
        self.ndim = data.ndim

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory for all trials."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: Any) -> Any:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is Ellipsis:
            rest = [slice(None)] * (self.ndim - 1 - len(rest)) + rest if rest else []
            first = slice(None)
        if isinstance(first, int | np.integer):
            if not -len(self) <= first < len(self):
                raise IndexError(f"trial {first} of {len(self)}")
            one = self._read(np.array([first % len(self)]))[0]
            return one[tuple(rest)] if rest else one
        numbers = np.arange(len(self))[first]
        if not rest:
            return self._read(numbers)
        if any(not isinstance(part, slice) for part in rest) and not isinstance(first, slice):
            return self._read(numbers)[(np.arange(len(numbers)), *rest)]
        # Block by block, so that the parts that are cut away never lie in memory together.
        blocks = [block[(slice(None), *rest)] for _, block in self._iterate(numbers)]
        return np.concatenate(blocks) if blocks else self._read(numbers)[(slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("trials that are read on demand cannot become an array without a copy")
        out = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for start, block in self._iterate(np.arange(len(self))):
            out[start : start + len(block)] = block
        return out

    def _iterate(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        # Blocks of about 32 MiB: large enough for the disk, small beside the memory of a laptop.
        size = max(1, (32 << 20) // max(1, self.nbytes // max(1, len(self))))
        for start in range(0, len(numbers), size):
            yield start, self._read(numbers[start : start + size])

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        if self.starts is None:
            return read_rows(self.data, self.rows[numbers])
        ends = np.append(self.starts[1:], len(self.rows))
        out = np.empty((len(numbers), *self.shape[1:]), np.float32)
        for target, number in enumerate(numbers.tolist()):
            # In the order of the file, since a disk reads forward faster.
            members = np.sort(self.rows[self.starts[number] : ends[number]])
            # Summed in float64: trials may be float16, whose sums overflow.
            out[target] = read_rows(self.data, members).mean(axis=0, dtype=np.float64)
        return out


def read_rows(data: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows of an array; a memory map is read by plain reads, which are much faster than page faults."""
    root = data
    # A slice of a memory map is one itself; only the first knows the file and the offset.
    while isinstance(root.base, np.memmap):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or not data.flags.c_contiguous:
        return np.asarray(data[rows])
    path = Path(root.filename)
    if not path.exists():  # the map outlives the name of its file
        return np.asarray(data[rows])
    row_bytes = data.nbytes // max(1, len(data))
    start = root.offset + data.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    out = np.empty((len(rows), *data.shape[1:]), data.dtype)
    places = np.asarray(rows) % max(1, len(data))
    # Neighbours are read together.
    ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    with path.open("rb", buffering=0) as file:
        first = 0
        for end in ends if len(places) else ():
            file.seek(start + int(places[first]) * row_bytes)
            target = out[first:end].reshape(-1).view(np.uint8).data
            while len(target):  # a read may stop short of two gigabytes
                if not (n := file.readinto(target)):
                    raise DataError(f"{path} ends in the middle of its rows; delete it and run again.")
                target = target[n:]
            first = end
    return out


def iterate_blocks(data: Any, rows: np.ndarray, n_bytes: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield row numbers and trials, about `n_bytes` in float64 at a time; rows are read in ascending order."""
    trial_bytes = 8 * max(1, int(np.prod(data.shape[1:])))
    size = max(1, (n_bytes or BLOCK_BYTES) // trial_bytes)
    # Ascending, as a memory map is read fastest.
    rows = np.sort(rows)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield chunk, read_rows(data, chunk) if isinstance(data, np.ndarray) else np.asarray(data[chunk])


class MappedRows:
    """Rows that are read and mapped on demand, so that a gallery of any size needs bounded memory.

    Can be read like an array: ``len``, ``shape``, ``ndim``, ``dtype``, indexing along the first axis.

    Parameters
    ----------
    data : array of shape (n_all, ...)
        Usually a memory map.
    mapping
        Function of rows of `data` and their row numbers; returns float32 vectors of shape (n, n_features), each
        computed from its row alone.
    rows : int array, optional
        Rows of `data` to use; by default all.
    first : float32 array of shape (n_first, n_features), optional
        Vectors that come before these rows and are mapped already.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self,
        data: np.ndarray,
        mapping: Callable[[np.ndarray, np.ndarray], np.ndarray],
        rows: np.ndarray | None = None,
        first: np.ndarray | None = None,
    ) -> None:
        self.data, self.mapping = data, mapping
        self.rows = np.arange(len(data)) if rows is None else np.asarray(rows)
        n_features = mapping(read_rows(data, np.arange(1)), np.arange(1)).shape[1]
        self.first = np.empty((0, n_features), np.float32) if first is None else first
        self.shape = (len(self.first) + len(self.rows), n_features)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory for all rows."""
        return 4 * self.shape[0] * self.shape[1]

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, int | np.integer):
            one: np.ndarray = self[np.array([index])][0]
            return one
        if isinstance(index, slice):
            wanted = np.arange(*index.indices(len(self)))
        else:  # not by an index of all rows, which would be made anew for every block of a million
            wanted = np.asarray(index)
            wanted = np.flatnonzero(wanted) if wanted.dtype == bool else wanted % len(self)
        out = np.empty((len(wanted), self.shape[1]), np.float32)
        here = wanted < len(self.first)
        out[here] = self.first[wanted[here]]
        if not here.all():
            own = self.rows[wanted[~here] - len(self.first)]
            out[~here] = self.mapping(read_rows(self.data, own), own)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows that are read on demand cannot become an array without a copy")
        return np.asarray(self[:], dtype=dtype)


if TYPE_CHECKING:
    import pandas as pd

    TrialData = np.ndarray  # whoever reads `Responses.data` uses what both kinds offer
    VectorData = Any
else:
    TrialData = np.ndarray | TrialRows
    VectorData = np.ndarray | MappedRows


@dataclass(frozen=True)
class Responses:
    """Labelled brain responses, one row per trial.

    Parameters
    ----------
    data : array of shape (n_trials, ...)
        Finite numbers, possibly a memory map, or `TrialRows` of one.
    dims
        Names of the axes; the first is ``trial``. For example ``("trial", "channel", "time")`` or
        ``("trial", "voxel")``.
    trials : DataFrame of n_trials rows
        Columns `subject, session, run, stimulus_id, repetition, split`; further columns are kept.
    unit
        Unit of `data`, for example ``V``, ``T``, ``percent signal change``, ``z`` or ``arbitrary``.
    coords
        Facts about the other axes: ``ch_names``, ``ch_pos`` (m), ``times`` (s), ``sfreq`` (Hz), ``voxel_id``, ``mask``,
        ``affine`` and the like. Values are lists, numbers, text or arrays.

    Raises
    ------
    DataError
        If an invariant is broken; a non-finite value is reported with the first bad trial.
    """

    data: TrialData
    dims: tuple[str, ...]
    trials: pd.DataFrame
    unit: str
    coords: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_axes()
        check_finite(self.data, what="the responses", row_names=_describe_trials(self.trials), unit="trial")

    @classmethod
    def from_checked(
        cls,
        data: TrialData,
        dims: tuple[str, ...],
        trials: pd.DataFrame,
        unit: str,
        coords: Mapping[str, Any],
    ) -> Responses:
        """Build from values that were found finite when they were written, without reading them again."""
        responses = object.__new__(cls)  # past `__post_init__`, which reads every number
        for name, value in (
            ("data", data),
            ("dims", dims),
            ("trials", trials),
            ("unit", unit),
            ("coords", coords),
        ):
            object.__setattr__(responses, name, value)
        responses._check_axes()
        return responses

    def _check_axes(self) -> None:
        if not self.dims or self.dims[0] != "trial":
            raise DataError(f"the first dimension of Responses must be 'trial', not {self.dims[:1]}.")
        if self.data.ndim != len(self.dims):
            raise DataError(f"Responses of shape {self.data.shape} cannot have the dims {self.dims}.")
        check_columns(self.trials.columns, TRIAL_COLUMNS, what="the trial table")
        if len(self.trials) != len(self.data):
            raise DataError(
                f"the trial table has {len(self.trials)} rows but the data have {len(self.data)} trials."
            )
        for dim, key in (("channel", "ch_names"), ("time", "times"), ("voxel", "voxel_id")):
            if dim in self.dims and key in self.coords:
                expected, found = self.data.shape[self.dims.index(dim)], len(self.coords[key])
                if expected != found:
                    raise DataError(f"the {dim} axis has {expected} entries but {key} lists {found}.")

    @property
    def n_trials(self) -> int:
        """Number of rows."""
        return len(self.data)

    @property
    def stimulus_ids(self) -> np.ndarray:
        """Stimulus id of each trial, shape (n_trials,)."""
        return self.trials["stimulus_id"].to_numpy(dtype=object)

    def select(self, rows: np.ndarray | Sequence[int]) -> Responses:
        """Return the given trials, in this order (row numbers or a boolean mask)."""
        index = np.asarray(rows)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        return replace(self, data=self.data[index], trials=self.trials.iloc[index].reset_index(drop=True))

    def with_trials(self, trials: pd.DataFrame) -> Responses:
        """Return the same data with another trial table of as many rows, without reading the data again."""
        return Responses.from_checked(self.data, self.dims, trials, self.unit, self.coords)

    @property
    def n_averaged(self) -> np.ndarray:
        """Number of repetitions averaged in each trial, shape (n_trials,): the column of this name, or 1."""
        if "n_averaged" in self.trials:
            return self.trials["n_averaged"].to_numpy(dtype=float)
        return np.ones(len(self.trials))

    @property
    def is_synthetic(self) -> np.ndarray:
        """Whether each trial was made by a model, bool of shape (n_trials,): the column `synthetic`, or False."""
        if "synthetic" in self.trials:
            return self.trials["synthetic"].to_numpy(dtype=bool)
        return np.zeros(len(self.trials), dtype=bool)

    def as_matrix(self) -> np.ndarray:
        """Return the data as a float32 matrix of shape (n_trials, n_features)."""
        return np.ascontiguousarray(self.data, dtype=np.float32).reshape(len(self.data), -1)


def count_own_voxels(responses: Responses) -> dict[str, int]:
    """Return how many features each subject has if rows are padded; empty if all subjects share the features."""
    return {str(s): int(n) for s, n in dict(responses.coords.get("n_voxels_of", {})).items()}


def _describe_trials(trials: pd.DataFrame) -> Sequence[str]:
    # A name is made for a bad row only: a hundred thousand of them would take longer than the check itself.
    class _Names(Sequence[str]):
        def __len__(self) -> int:
            return len(trials)

        def __getitem__(self, row: Any) -> Any:
            t = trials.iloc[row]
            return f"subject {t['subject']}, run {t['run']}, stimulus {t['stimulus_id']}"

    return _Names()


@dataclass(frozen=True)
class Embeddings:
    """Vectors in one named space, one row per image or per predicted trial.

    Parameters
    ----------
    vectors : float array of shape (n_rows, n_features) or (n_rows, n_tokens, n_features)
        Finite vectors; their norm is kept as the encoder gives it.
    ids : sequence of length n_rows
        Stimulus id of each row; predictions of repeated trials repeat it.
    space
        Name of the space. Two sets of embeddings may be compared only if it is equal.
    n_averaged : array of shape (n_rows,), optional
        Number of repetitions of each prediction, from an encoder that uses it; not written into files.
    """

    vectors: np.ndarray
    ids: Any  # any sequence on creation, an object array from then on
    space: str
    n_averaged: np.ndarray | None = None

    def __post_init__(self) -> None:
        # Frozen, so that the one attribute that is converted is set past the class's own guard.
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=object))
        if self.vectors.ndim not in (2, 3):
            raise DataError(
                "embeddings must have the shape (n_rows, n_features) or (n_rows, n_tokens, n_features), "
                f"not {self.vectors.shape}."
            )
        if len(self.ids) != len(self.vectors):
            raise DataError(f"{len(self.vectors)} embeddings came with {len(self.ids)} stimulus ids.")
        check_finite(self.vectors, what=f"embeddings in space {self.space!r}", row_names=self.ids)

    @classmethod
    def from_checked(cls, vectors: VectorData, ids: Any, space: str) -> Embeddings:
        """Build from vectors that were found finite when they were written, without reading them again."""
        embeddings = object.__new__(cls)  # past `__post_init__`, which reads every number
        for name, value in (
            ("vectors", vectors), ("ids", np.asarray(ids, dtype=object)), ("space", space), ("n_averaged", None),
        ):  # fmt: skip
            object.__setattr__(embeddings, name, value)
        return embeddings

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, ids: Iterable[str]) -> Embeddings:
        """Return one row per id, in this order; an id may occur several times.

        Raises
        ------
        DataError
            If an id is missing or has several rows.
        """
        import pandas as pd

        index = pd.Index(self.ids)
        if not index.is_unique:
            raise DataError(f"embeddings in space {self.space!r} repeat ids, so rows cannot be picked by id.")
        wanted = list(ids)
        rows = index.get_indexer(pd.Index(wanted, dtype=object))
        if (rows < 0).any():
            missing = wanted[int(np.flatnonzero(rows < 0)[0])]
            raise DataError(f"no embedding of stimulus {missing!r} in space {self.space!r}; embed it first.")
        return Embeddings(self.vectors[rows], np.asarray(wanted, dtype=object), self.space)

    def take(self, rows: Any) -> Embeddings:
        """Return some rows, which a number for each, a mask or a slice names, in that order."""
        return Embeddings(self.vectors[rows], self.ids[rows], self.space)

    def flat(self) -> np.ndarray:
        """Return float32 vectors of shape (n_rows, n_tokens * n_features).

        Examples
        --------
        >>> Embeddings(np.zeros((0, 2, 3)), np.array([], dtype=str), "space").flat().shape
        (0, 6)
        """
        n = math.prod(self.vectors.shape[1:])
        return np.ascontiguousarray(self.vectors, dtype=np.float32).reshape(len(self), n)


def normalise_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows of shape (n, n_features) with length 1; a row of zeros is not changed."""
    # norm: (n, 1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def find_largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the `k` largest values of each row, the largest first, equal ones in their order.

    Parameters
    ----------
    values : array of shape (n_rows, n_columns)
        Finite.
    k
        At most n_columns.

    Returns
    -------
    int array of shape (n_rows, k)
        The same columns as a stable sort of all values, without sorting all of them.

    Examples
    --------
    >>> find_largest(np.array([[1.0, 3.0, 2.0, 3.0]]), 3)
    array([[1, 3, 2]])
    """
    n_rows, n_columns = values.shape
    width = min(64, n_columns // max(1, k))
    if k == 0 or width < 4:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    # The k-th largest of the maxima of groups of columns: at least k values of the row reach it, and few others do.
    n_groups = n_columns // width
    # Groups of columns that lie apart: their maxima are taken along whole rows of memory, in half the time.
    maxima = values[:, : n_groups * width].reshape(n_rows, width, n_groups).max(axis=1)
    bound = np.partition(maxima, n_groups - k, axis=1)[:, n_groups - k]
    rows, columns = np.divmod(np.flatnonzero(values >= bound[:, None]), n_columns)
    order = np.lexsort((columns, -values[rows, columns], rows))
    starts = np.searchsorted(rows, np.arange(n_rows))
    return columns[order][starts[:, None] + np.arange(k)]


@dataclass(frozen=True)
class ImageLikelihood:
    """How likely images are, given the prediction from the mean of some repetitions.

    The log-likelihood of an image with the component scores ``e`` is ``p' E e - e' I e / 2``, up to a constant of
    the trial, where ``p`` are the scores of the prediction, ``I`` is the information of the response about the
    components (`find_information`), and ``E`` the precision of the posterior, ``I + diag(precision)``. The information
    of repetitions about an image adds up, except for errors of the map that all repetitions share.

    Parameters
    ----------
    mean : float32 array of shape (n_features,)
        Mean of the embeddings.
    components : float32 array of shape (n_components, n_features)
        Orthonormal rows; scores are their products with an embedding after the mean is subtracted.
    gram : float64 array of shape (n_components, n_components)
        Products of the responses to the components, in units of the noise of one repetition.
    precision : float64 array of shape (n_components,)
        Precision of the scores over training images.
    noise : float64 array of shape (2,)
        Error variance of the map, which averaging does not reduce, and noise variance of one repetition.
    patterns : float64 array of shape (n_components, n_patterns)
        Products of the responses to the components with patterns of unit length in which the error of the map is
        larger.
    excess : float64 array of shape (n_patterns,)
        Additional error variance in each of these patterns.
    """

    mean: np.ndarray
    components: np.ndarray
    gram: np.ndarray
    precision: np.ndarray
    noise: np.ndarray
    patterns: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    excess: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def find_noise(self, n_averaged: float) -> float:
        """Return the noise variance of the mean of this many repetitions."""
        return float(self.noise[0] + self.noise[1] / n_averaged)

    def find_damping(self, n_averaged: float) -> np.ndarray:
        """Return the share of each pattern that is ignored, for this many repetitions, shape (n_patterns,)."""
        return self.excess / (self.find_noise(n_averaged) + self.excess)

    def find_information(self, n_averaged: float) -> np.ndarray:
        """Return the precision of the mean of this many repetitions, of shape (n_components, n_components)."""
        known = self.gram
        if len(self.excess):  # the inverse of a diagonal and few patterns (Woodbury)
            known = known - (self.patterns * self.find_damping(n_averaged)) @ self.patterns.T
        return np.asarray(known / self.find_noise(n_averaged))

    def find_evidence(self, n_averaged: float) -> np.ndarray:
        """Return the precision of the posterior, shape (n_components, n_components)."""
        return self.find_information(n_averaged) + np.diag(self.precision)

    def combine(self, predicted: np.ndarray, n_trials: int) -> np.ndarray:
        """Return the prediction for the mean of single trials; approximate if the map has larger errors in patterns.

        Parameters
        ----------
        predicted : array of shape (n_features,)
            Mean of the predictions of the single trials.
        n_trials
            Their number.
        """
        scores = self.components @ (predicted - self.mean)
        # Before it was shrunk for the noise of one trial; what it was shrunk away is seen again in the mean of many.
        spoken, n = self.find_evidence(1.0) @ scores, float(n_trials)
        if len(self.excess):
            # The scores of which one trial speaks so; patterns count for less in one trial than in many.
            spoken = (
                self.find_information(n) @ np.linalg.lstsq(self.find_information(1.0), spoken, rcond=None)[0]
            )
        else:
            spoken = spoken * (self.find_noise(1.0) / self.find_noise(n))
        scores = np.linalg.solve(self.find_evidence(n), spoken)
        return np.asarray(self.mean + scores @ self.components)

    def score(self, predicted: np.ndarray, images: np.ndarray, n_averaged: np.ndarray) -> np.ndarray:
        """Return log-likelihoods of shape (n_predicted, n_images), up to a constant of each row.

        Parameters
        ----------
        predicted : array of shape (n_predicted, n_features)
        images : array of shape (n_images, n_features)
        n_averaged : array of shape (n_predicted,)
            Number of repetitions of each prediction.
        """
        rows = (predicted - self.mean) @ self.components.T
        known = ((images - self.mean) @ self.components.T).astype(np.float64)
        found = np.empty((len(rows), len(known)))
        for count in np.unique(n_averaged).tolist():
            own, told = n_averaged == count, self.find_information(count)
            expected = np.einsum("ik,kl,il->i", known, told, known, optimize=True)
            found[own] = rows[own] @ self.find_evidence(count) @ known.T - expected / 2
        return found


def check_same_space(left: Embeddings, right: Embeddings) -> None:
    """Raise `DataError` unless both embeddings belong to the same space and have the same row shape."""
    if left.space != right.space:
        raise DataError(
            f"embeddings of space {left.space!r} cannot be compared with those of space {right.space!r}."
        )
    if left.vectors.shape[1:] != right.vectors.shape[1:]:
        raise DataError(
            f"rows of space {left.space!r} have shapes {left.vectors.shape[1:]} and {right.vectors.shape[1:]}."
        )


def check_target_rows(responses: Responses, targets: Embeddings, *, what: str) -> None:
    """Raise `DataError` unless there is one target per trial, in the order of the trials."""
    if len(targets) != responses.n_trials or (targets.ids != responses.stimulus_ids).any():
        raise DataError(f"{what} needs one target per trial, in the order of the trials.")


SCORE_KEYS = (
    "method", "metric", "value", "ci_low", "ci_high", "chance", "noise_ceiling", "n_queries", "gallery_size",
    "subject", "split", "protocol", "seed", "p_value", "fingerprint", "resampled",
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One score with everything that is needed to interpret it.

    Parameters
    ----------
    method
        ``decoded`` for the system under test, otherwise the name of the control.
    metric
        Name of the metric, with its protocol where several exist (``ssim@28``, ``top1``).
    value
        The score.
    chance
        Score without any information about the brain; None if there is no such level (as for an error like MSE).
    n_queries
        Number of items from which the value is computed.
    protocol
        Name of data set, split, averaging and gallery, as text.
    ci_low, ci_high
        Bounds of the 95 % interval.
    noise_ceiling
        Best value that the noise of the recording allows, if known.
    gallery_size
        Number of candidates, for scores that search a gallery.
    p_value
        p-value from permutations, if they were made.
    resampled
        What the interval resampled, for example ``images``, ``12 groups (t)`` or ``5 subjects and 200 images
        (crossed)``; for a control by permutation, that the interval is that of its null distribution. Without an
        interval, the reason.
    """

    method: str
    metric: str
    value: float
    chance: float | None
    n_queries: int
    protocol: str
    subject: str
    split: str
    seed: int
    ci_low: float | None = None
    ci_high: float | None = None
    noise_ceiling: float | None = None
    gallery_size: int | None = None
    p_value: float | None = None
    fingerprint: str = ""
    resampled: str = ""

    def __post_init__(self) -> None:
        if self.n_queries < 1:
            raise DataError(f"the score {self.metric!r} of {self.method!r} has no query.")
        if not np.isfinite(self.value):
            raise DataError(f"the score {self.metric!r} of {self.method!r} is not finite.")

    def as_row(self) -> dict[str, Any]:
        """Return the plain row that `scores.json` holds."""
        return {key: getattr(self, key) for key in SCORE_KEYS}
