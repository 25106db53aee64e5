"""What is asked of an array of trials: finite numbers that vary, of a scale that can be computed with, and no copies.

Knows neither pictures nor tables: see `braindecode_vis.datasets.own_data`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.checks import DataError, check_finite

#: Two trials whose values correlate above this are called copies of each other.
COPY_CORRELATION = 0.999
#: Above this many trials, copies are looked for by exact equality alone.
MAX_CORRELATED = 20_000
#: No more pairs of copies than this are listed.
MAX_COPIES = 10_000
#: Squares of values beyond these leave the range of float32 (1.2e-38 to 3.4e38), in which decoders compute.
SMALLEST_SPREAD, LARGEST_VALUE = 1e-17, 1e17


def check_trials(X: Any) -> np.ndarray:
    """Return trials as an array of finite floats, or say in a sentence why they are none.

    Parameters
    ----------
    X : array of shape (n_trials, ...)
        Or whatever NumPy takes as one: lists, a DataFrame of numbers, a tensor.
    """
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
                "the trials have different lengths, so they are no array; cut or pad them to one length first."
            ) from error
    if X.dtype.kind == "c":
        raise DataError(
            "Complex data not supported: give the real part, the amplitude or the power of the trials."
        )
    if X.dtype.kind in "Ob":
        try:
            X = X.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"the trials must be numbers, but hold something else ({error}).") from error
    if X.dtype.kind not in "fiu":
        raise DataError(
            f"the trials must be numbers, not {X.dtype}; give an array of shape (n_trials, ...) of floats."
        )
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
    """Return the values of a table of numbers, or name the column that holds something else."""
    for name in table.columns:
        column = table[name]
        if isinstance(column, pd.Series) and column.dtype.kind not in "fiub":
            numbers = pd.to_numeric(column, errors="coerce")
            bad = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
            if len(bad) or column.dtype.kind in "mM":
                held = column.iloc[int(bad[0])] if len(bad) else column.iloc[0]
                raise DataError(
                    f"the trials must be numbers, but the column {str(name)!r} of X holds {str(held)!r}; drop it from "
                    "X, and pass what it says of the trials as an argument, for example group=..."
                )
            table = table.assign(**{str(name): numbers}) if isinstance(name, str) else table
    return table.to_numpy(dtype=np.float64, na_value=np.nan)


def check_values(X: np.ndarray, dims: Sequence[str], ch_names: Sequence[str] | None = None) -> list[str]:
    """Raise `DataError` if trials do not differ or cannot be computed with, and name what is constant.

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
    # As float64, in which the difference of the largest float32 is finite.
    low, high = low.astype(np.float64), high.astype(np.float64)
    largest = float(max(abs(low.min()), abs(high.max())))
    if largest > LARGEST_VALUE:
        raise DataError(
            f"X holds values as large as {largest:.3g}, whose squares cannot be computed with; divide X by a constant, "
            "and state its unit."
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
        f"{len(constant)} of {low.min(axis=over).size} {name}s never vary and tell nothing, first {', '.join(names)}: "
        "leave out what is broken or lies outside the brain."
    ]


def find_copied_trials(X: Any) -> list[tuple[int, int]]:
    """Return pairs of trials that are equal, or correlate above `COPY_CORRELATION`; the earlier row first.

    Parameters
    ----------
    X : float array of shape (n_trials, ...)
        May be a memory map; it is read in pieces.

    Notes
    -----
    Raw volumes of one brain correlate above .999 as well, by what all of them share. A copy remains a copy, whatever
    its scale, when directions are taken out of the data; so pairs must also correlate without the strongest directions.
    Trials of too few independent values for that, which correlate by chance, are compared by equality alone, and so
    are more than `MAX_CORRELATED` trials: all their correlations would take longer than the decoding.
    """
    n, size = len(X), int(np.prod(X.shape[1:]))
    seen: dict[bytes, int] = {}
    pairs = []
    for row in range(n):
        if np.ptp(X[row]) == 0:
            continue  # without a value that varies, nothing was copied
        digest = hashlib.blake2b(np.asarray(X[row], dtype=np.float32).tobytes(), digest_size=16).digest()
        first = seen.setdefault(digest, row)
        if first != row:
            pairs.append((first, row))
    if n > MAX_CORRELATED or size < 20:
        return pairs

    def centre(rows: Any) -> np.ndarray:
        flat = np.asarray(X[rows], dtype=np.float32).reshape(-1, size)
        flat = flat - flat.mean(axis=1, keepdims=True)
        return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-20)

    sample = centre(np.unique(np.linspace(0, n - 1, min(n, 300)).astype(int)))
    n_strong = min(10, len(sample) // 10, size // 10)
    strong = np.zeros((0, size), np.float32)
    if n_strong:
        # Right singular vectors by way of the small Gram matrix; qr makes them orthonormal to rounding.
        vectors = np.linalg.eigh(sample @ sample.T)[1][:, -n_strong:]
        strong = np.linalg.qr(sample.T @ vectors)[0].T  # (n_strong, size)
    rest = sample - sample @ strong.T @ strong
    rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-20)
    alike = np.square((rest @ rest.T)[np.triu_indices(len(rest), 1)])
    alike = alike[alike < 0.98]  # copies among the sample say nothing of chance
    n_independent = (
        1 / max(float(alike.mean()), 1e-6) if len(alike) else 1.0
    )  # E[r^2] = 1 / n of random vectors
    if n * n / 2 * 0.02 ** ((n_independent - 1) / 2) > 1e-3:
        return pairs
    # Correlations of all pairs are looked up in few random directions, and those near 1 computed in full.
    picked = np.random.default_rng(0).normal(size=(size, min(size, 64))).astype(np.float32)
    sketch = np.concatenate(
        [_sketch(centre(slice(start, start + 512)), strong, picked) for start in range(0, n, 512)]
    )
    known = set(pairs)
    for start in range(0, n, 1024):  # a block of correlations at a time
        block = sketch[start : start + 1024] @ sketch[start:].T  # (n_block, n_trials - start)
        for a, b in zip(*np.nonzero(np.triu(block, 1) > 0.95), strict=True):
            pair = (start + int(a), start + int(b))
            if pair not in known and len(known) < MAX_COPIES:
                both = centre(list(pair))
                rest = both - both @ strong.T @ strong
                # In every quarter of the values as well: two trials that one bad electrode dominates are no copies.
                parts = [rest, *np.array_split(both, 4, axis=1)]
                if both[0] @ both[1] > COPY_CORRELATION and min(_correlate(*part) for part in parts) > 0.99:
                    known.add(pair)
    return sorted(known)


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two vectors; 1 where neither of them varies."""
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norm if norm > 1e-12 else 1.0


def _sketch(unit: np.ndarray, strong: np.ndarray, picked: np.ndarray) -> np.ndarray:
    found = (unit - unit @ strong.T @ strong) @ picked
    return np.asarray(
        found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-20), dtype=np.float32
    )
