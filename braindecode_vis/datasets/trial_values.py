"""Checks of an array of trials: finite numbers that vary, a scale without overflow, and no copies.

Pictures and tables are checked in `braindecode_vis.datasets.own_data`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from braindecode_vis.base.checks import DataError, check_finite
from braindecode_vis.base.memory import ROWS_OF_A_MAP, release_pages

if TYPE_CHECKING:
    import pandas as pd

#: Two trials whose values correlate above this are called copies of each other.
COPY_CORRELATION = 0.99
#: Of 1 - r^2: below it, rounding of single precision and a copy cannot be told apart.
SMALLEST_GAP = 1e-11
#: Above this many trials, copies are looked for by exact equality alone unless few of them are asked about.
MAX_CORRELATED = 20_000
#: Of 1 - r^2 of trials without their common part: copies with noise of a tenth of their variation have .01 to .1,
#: different trials of real EEG, fMRI and spikes .12 and more.
LARGEST_GAP = 0.1
#: Values of each trial by which copies of a half of it are looked for, and how many of them must be equal.
_N_PROBES, _N_EQUAL, _LEAST_SHARE = 64, 12, 0.3
_BLOCK_BYTES = 16 << 20  # of trials that are looked at together, and of some copies of them
#: No more pairs of copies than this are listed.
MAX_COPIES = 10_000
#: Squares of values beyond these leave the range of float32 (1.2e-38 to 3.4e38), in which decoders compute.
SMALLEST_SPREAD, LARGEST_VALUE = 1e-17, 1e17
# Trials with fewer values may be constant without an error, and sparse data has a few such trials.
_LEAST_VALUES, _MOST_CONSTANT = 20, 0.1


def check_trials(X: Any) -> np.ndarray:
    """Return trials as an array of finite floats, or raise an error that says why this is not possible.

    Parameters
    ----------
    X : array of shape (n_trials, ...)
        Or anything that NumPy converts to an array: lists, a DataFrame of numbers, a tensor.
    """
    import pandas as pd

    if hasattr(X, "tocsr"):  # scipy's sparse arrays
        raise DataError("sparse data is not supported: pass X.toarray().")
    if isinstance(X, np.ma.MaskedArray):
        if np.ma.is_masked(X):
            raise DataError("X has masked values; fill them, or drop their trials or features first.")
        X = X.data
    if isinstance(X, pd.DataFrame):
        X = _read_numbers(X)
    if not isinstance(X, np.ndarray):
        try:
            X = np.asarray(X)
        except (RuntimeError, TypeError) as error:  # a tensor that is part of a graph, or lies on a GPU
            raise DataError(f"X cannot become an array ({error}); pass X.detach().cpu().numpy().") from error
        except ValueError as error:  # NumPy refuses rows of different lengths
            raise DataError(
                "the trials have different lengths, so they do not form an array; cut or pad them to one "
                "length first."
            ) from error
    if X.dtype.kind == "c":
        raise DataError(
            "Complex data not supported: give the real part, the amplitude or the power of the trials."
        )
    if X.dtype.kind in "Ob":
        try:
            X = X.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"the trials must be numbers, but contain something else ({error}).") from error
    if X.dtype.kind not in "fiu":
        raise DataError(
            f"the trials must be numbers, not {X.dtype}; give an array of shape (n_trials, ...) of floats."
        )
    if not X.ndim:
        raise DataError("the trials are one number; give an array of shape (n_trials, ...) of floats.")
    if not len(X):
        raise DataError("there are 0 sample(s) (no trial) while a minimum of 1 is required.")
    if X.ndim >= 2 and not X.size:
        raise DataError(
            f"0 feature(s) (shape={X.shape}) while a minimum of 1 is required: the trials hold no values."
        )
    if X.ndim < 2:
        raise DataError(
            f"the trials have the shape {X.shape}, with {X.size} value(s); expected (n_trials, n_features) or "
            "(n_trials, n_channels, n_times). Reshape your data."
        )
    if X.dtype.kind != "f":
        X = X.astype(np.float32)
    check_finite(X, what="X, which must hold no NaN or inf,", row_names=np.arange(len(X)), unit="trial")
    return X


def _read_numbers(table: pd.DataFrame) -> np.ndarray:
    """Return the values of a table of numbers, or raise an error that names a column with other values."""
    import pandas as pd

    for name in table.columns:
        column = table[name]
        if isinstance(column, pd.Series) and column.dtype.kind not in "fiub":
            numbers = pd.to_numeric(column, errors="coerce")
            bad = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
            if len(bad) or column.dtype.kind in "mM":
                held = column.iloc[int(bad[0])] if len(bad) else column.iloc[0]
                raise DataError(
                    f"the trials must be numbers, but the column {str(name)!r} of X holds {str(held)!r}; "
                    "drop it from X, and pass this information about the trials as an argument, for example group=..."
                )
            table = table.assign(**{str(name): numbers}) if isinstance(name, str) else table
    return table.to_numpy(dtype=np.float64, na_value=np.nan)


def check_values(X: np.ndarray, dims: Sequence[str], ch_names: Sequence[str] | None = None) -> list[str]:
    """Raise `DataError` if trials do not differ or their scale is impossible; return a remark on constant features.

    Parameters
    ----------
    X : float array of shape (n_trials, ...)
        May be a memory map; it is read in blocks of trials.
    dims
        Names of its axes.
    ch_names : sequence of length n_channels, optional

    Returns
    -------
    list of str
        One sentence if some channels, voxels or features never vary.
    """
    if len(X) < 2:
        return []
    low = high = np.asarray(X[0])
    block = max(1, (64 << 20) // max(1, X[:1].nbytes))
    for start in range(0, len(X), block):
        low = np.minimum(low, X[start : start + block].min(axis=0))
        high = np.maximum(high, X[start : start + block].max(axis=0))
    # As float64: there the difference of the largest float32 values is finite.
    low, high = low.astype(np.float64), high.astype(np.float64)
    largest = float(max(abs(low.min()), abs(high.max())))
    if largest > LARGEST_VALUE:
        raise DataError(
            f"X holds values as large as {largest:.3g}, whose squares are too large to compute; divide X "
            "by a constant, and give its unit."
        )
    spread = float((high - low).max())
    if spread == 0:
        what = f"every value is {low.flat[0]:g}" if np.ptp(low) == 0 else "no value differs between them"
        raise DataError(
            f"all {len(X)} trials are the same ({what}), so that nothing can be decoded; check X."
        )
    if spread < SMALLEST_SPREAD:
        raise DataError(
            f"the trials of X differ by {spread:.3g} at most, too little to compute with; multiply X by a constant "
            f"(for example 1e{-int(np.floor(np.log10(spread)))}), and state its unit."
        )
    over = tuple(axis - 1 for axis in range(1, X.ndim) if dims[axis] == "time")
    constant = np.flatnonzero((low.min(axis=over) == high.max(axis=over)).ravel())
    if not len(constant):
        return []
    name = next((dim for dim in dims[1:] if dim != "time"), "feature")
    names = [str(ch_names[n]) if ch_names is not None and name == "channel" else str(n) for n in constant[:5]]
    return [
        f"{len(constant)} of {low.min(axis=over).size} {name}s never vary and so have no information, first "
        f"{', '.join(names)}: leave out those that are broken or outside the brain."
    ]


def check_constant_trials(X: np.ndarray) -> list[str]:
    """Raise `DataError` if many trials hold a single value, as in an overwritten file; for a few, return a remark.

    Parameters
    ----------
    X : float array of shape (n_trials, ...)
        May be a memory map; it is read in blocks of trials.

    Returns
    -------
    list of str
        One sentence if some trials are constant.
    """
    # A few counts or classes may all be zero.
    if X[:1].size < _LEAST_VALUES:
        return []
    block = max(1, (64 << 20) // max(1, X[:1].nbytes))
    constant = []
    for start in range(0, len(X), block):
        rows = np.asarray(X[start : start + block]).reshape(len(X[start : start + block]), -1)
        constant += (start + np.flatnonzero(rows.min(axis=1) == rows.max(axis=1))).tolist()
    if not constant:
        return []
    told = (
        f"{len(constant)} of {len(X)} trials have the same value everywhere, the first in row "
        f"{constant[0]} and the last in "
        f"row {constant[-1]}"
    )
    if len(constant) > max(1, _MOST_CONSTANT * len(X)):
        raise DataError(
            f"{told}: nothing was recorded there, or a part of the array was overwritten; drop them."
        )
    return [f"{told}; drop them."]


def find_copied_trials(X: Any, tested: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Return pairs of trials that are equal, or too similar to be so by chance; the earlier row first.

    A copy may be scaled, negated, and have noise of a tenth of its variation; or a third of its values or more are
    those of another trial.

    Parameters
    ----------
    X : float array of shape (n_trials, ...)
        May be a memory map; it is read in pieces.
    tested : int array of shape (n_tested,), optional
        At least one row of a pair must be among these; then any number of trials is compared. Without it all rows are
        compared, up to `MAX_CORRELATED`.

    Notes
    -----
    Raw volumes of one brain also correlate above .999, because of their common part. A copy remains a copy, at any
    scale, when directions are removed from the data; so pairs must also correlate without the strongest directions. If
    trials have many independent values, a correlation above `COPY_CORRELATION` is a copy; the fewer there are, or the
    more alike different trials are (two that follow each other, too), the nearer to 1 it must be, and trials that
    correlate by chance are only compared for equality.
    """
    n, size = len(X), int(np.prod(X.shape[1:]))
    seen: dict[bytes, int] = {}
    pairs = []
    picked = np.sort(np.random.default_rng(0).permutation(size)[:_N_PROBES])
    probes = np.full((n, len(picked)), np.nan, np.float32)
    step = min(ROWS_OF_A_MAP, max(1, (256 << 20) // (4 * max(1, size))))  # a trial may have a million values
    for row in range(n):
        if row % step == 0:
            release_pages(X)
        if np.ptp(X[row]) == 0:
            continue  # without a value that varies, nothing was copied
        probes[row] = np.asarray(X[row]).reshape(-1)[picked]
        digest = hashlib.blake2b(np.asarray(X[row], dtype=np.float32).tobytes(), digest_size=16).digest()
        first = seen.setdefault(digest, row)
        if first != row:
            pairs.append((first, row))
    asked = np.ones(n, bool) if tested is None else np.isin(np.arange(n), tested)
    pairs += [pair for pair in _find_half_copies(X, probes, asked) if pair not in pairs]
    if (tested is None and n > MAX_CORRELATED) or size < 4:
        return sorted(pairs)

    def centre(rows: Any, dtype: Any = np.float32) -> np.ndarray:
        flat = np.asarray(X[rows], dtype=dtype).reshape(-1, size)
        flat = flat - flat.mean(axis=1, keepdims=True)
        release_pages(X)
        return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-20))

    spread = np.linspace(0, n - 1, min(n, 150)).astype(int)
    sample = centre(np.unique(np.r_[spread, np.minimum(spread + 1, n - 1)]))  # with what follows each
    n_strong = min(10, len(sample) // 10, size // 10)
    strong = np.zeros((0, size), np.float32)
    if n_strong:
        # Right singular vectors from the small Gram matrix; qr makes them orthonormal to rounding.
        vectors = np.linalg.eigh(sample @ sample.T)[1][:, -n_strong:]
        strong = np.linalg.qr(sample.T @ vectors)[0].T  # (n_strong, size)
    others = np.arange(n) if tested is None else np.unique(tested)
    gap = _find_chance_gap(sample - sample @ strong.T @ strong, n_pairs=n * len(others))
    if gap < SMALLEST_GAP:
        return sorted(pairs)
    # Correlations are estimated in a few random directions, and those near 1 are computed exactly.
    directions = np.random.default_rng(0).normal(size=(size, min(size, 64))).astype(np.float32)
    sketch, n_rows = (
        np.empty((n, directions.shape[1]), np.float32),
        max(1, min(512, _BLOCK_BYTES // (4 * size))),
    )
    for start in range(0, n, n_rows):
        sketch[start : start + n_rows] = _sketch(centre(slice(start, start + n_rows)), strong, directions)
        release_pages(X)
    known, near = set(pairs), 1 - max(gap, 4e-6)  # single precision has 1e-7, and products of it a few
    n_asked = 0
    for start in range(0, len(others), 1024):  # a block of correlations at a time
        rows = others[start : start + 1024]
        # If all are compared with all, each pair is compared once.
        for begin in range(start if tested is None else 0, n, 8192):
            block = sketch[rows] @ sketch[begin : begin + 8192].T  # (n_rows, n_others)
            for i, j in zip(*np.nonzero(np.abs(block) > near), strict=True):
                pair = (min(int(rows[i]), begin + int(j)), max(int(rows[i]), begin + int(j)))
                if pair[0] == pair[1] or pair in known:
                    continue
                n_asked += 1
                if n_asked > 10 * MAX_COPIES or len(known) >= MAX_COPIES:
                    return sorted(known)
                both = centre(list(pair), np.float64)  # a noise of 1e-6 is 5e-13 of a correlation
                rest = both - both @ strong.T @ strong
                # Also in every quarter of the values: two trials that one bad electrode dominates are not copies.
                sign = -1 if _correlate(*rest) < 0 else 1
                parts = [sign * _correlate(*part) for part in np.array_split(both, 4, axis=1)]
                # Half of 1 - r^2 is 1 - r if r is near 1.
                if (
                    sign * _correlate(*both) >= 1 - min(1 - COPY_CORRELATION, gap / 2)
                    and sign * _correlate(*rest) >= 1 - gap / 2
                    and min(parts) > 0.9
                ):
                    known.add(pair)
    return sorted(known)


def _find_half_copies(X: Any, probes: np.ndarray, asked: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of trials of which one is asked about, and that share a part of their values exactly.

    Parameters
    ----------
    X : array of shape (n_trials, ...)
    probes : float32 array of shape (n_trials, n_probes)
        Some values of each trial, NaN in those that are left out.
    asked : bool array of shape (n_trials,)
    """
    n = len(probes)
    codes = []
    for column in probes.T:
        order = np.argsort(column, kind="stable")
        ranked = column[order]
        same = ranked[1:] == ranked[:-1]  # NaN is equal to nothing
        # A value of three trials or more is a count, a zero or a limit of the amplifier.
        alone = same & ~np.r_[False, same[:-1]] & ~np.r_[same[1:], False]
        first, second = np.sort(np.stack([order[:-1][alone], order[1:][alone]]), axis=0)
        codes.append(first.astype(np.int64) * n + second)
    if not codes:
        return []
    pair, count = np.unique(np.concatenate(codes), return_counts=True)
    found = []
    for code in pair[count >= min(_N_EQUAL, 0.2 * len(probes.T) + 2)][:MAX_COPIES]:
        rows = (int(code // n), int(code % n))
        if not asked[list(rows)].any():
            continue
        one, other = (np.asarray(X[row]).reshape(-1) for row in rows)
        # Distinct ones: two trials may have silent channels in common.
        if len(np.unique(one[one == other])) >= _LEAST_SHARE * len(np.unique(one)):
            found.append(rows)
    return found


def _find_chance_gap(rest: np.ndarray, *, n_pairs: int) -> float:
    """Return a bound on 1 - r^2 below which no pair of trials falls by chance; at most a quarter of what is usual.

    Parameters
    ----------
    rest : array of shape (n_sample, n_values)
        A sample of trials without their common part.
    n_pairs
        Number of compared pairs.
    """
    rest = rest / np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-20)
    alike = np.square((rest @ rest.T)[np.triu_indices(len(rest), 1)])
    alike = alike[alike < 0.98]  # copies among the sample say nothing of chance
    # A few pairs of the sample may be copies with noise.
    largest = min(LARGEST_GAP, (1 - float(np.quantile(alike, 0.999))) / 4) if len(alike) else LARGEST_GAP
    n_independent = (
        1 / max(float(alike.mean()), 1e-6) if len(alike) else 1.0
    )  # E[r^2] = 1 / n of random vectors
    if n_independent < 2:
        return 0.0
    # P(1 - r^2 < gap) is about gap^((n - 1) / 2); the expected number of such pairs is a thousandth.
    return float(min(largest, (1e-3 / n_pairs) ** (2 / (n_independent - 1))))


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two vectors; 1 if both are constant, 0 if one is."""
    first, second = first - first.mean(), second - second.mean()
    norms = [float(np.linalg.norm(part)) for part in (first, second)]
    if min(norms) <= 1e-9:
        return float(max(norms) <= 1e-9)
    return float(first @ second) / (norms[0] * norms[1])


def _sketch(unit: np.ndarray, strong: np.ndarray, picked: np.ndarray) -> np.ndarray:
    found = (unit - unit @ strong.T @ strong) @ picked
    return np.asarray(
        found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-20), dtype=np.float32
    )
