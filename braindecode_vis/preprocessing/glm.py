"""One amplitude per trial from a BOLD time series: least squares for all voxels and all trials together.

Contains only the computation, no files. The regressors are nilearn's, so that a fit equals the one that nilearn's
`FirstLevelModel` makes trial by trial; three sums replace the loop over trials, because the models of a run differ in
only two regressors. A model that is chosen for each voxel is in `braindecode_vis.preprocessing.glm_by_voxel`.

References
----------
.. [1] Mumford, Turner, Ashby, Poldrack (2012). Deconvolving BOLD activation in event-related designs for multivoxel
   pattern classification analyses. NeuroImage 59, 2636-2643. doi:10.1016/j.neuroimage.2011.08.076
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError, check_option

# Half the digits of float64: what is left of a regressor below this is rounding, as squared norms are compared.
_RANK_TOLERANCE = 1e-8


def make_regressors(
    events: pd.DataFrame, frame_times: np.ndarray, *, hrf_model: str = "glover"
) -> np.ndarray:
    """Return the expected time course of each event, float64 of shape (n_volumes, n_events).

    Parameters
    ----------
    events : DataFrame
        `onset` and `duration` in s.
    frame_times : array of shape (n_volumes,)
        In s.
    hrf_model
        Name of a canonical response in nilearn.
    """
    from nilearn.glm.first_level import compute_regressor

    courses = []
    for onset, duration in zip(events["onset"].astype(float), events["duration"].astype(float), strict=True):
        courses.append(
            compute_regressor(np.array([[onset], [duration], [1.0]]), hrf_model, frame_times)[0][:, 0]
        )
    return np.stack(courses, axis=1) if courses else np.empty((len(frame_times), 0))


def make_drifts(
    frame_times: np.ndarray,
    *,
    drift: Literal["cosine", "polynomial", "none"],
    cutoff: float = 128.0,
    order: int = 1,
) -> np.ndarray:
    """Return slow drifts and a constant, float64 of shape (n_volumes, n_drifts).

    Parameters
    ----------
    frame_times : array of shape (n_volumes,)
        In s, evenly spaced.
    drift
        ``cosine`` up to the period `cutoff` (s), ``polynomial`` up to the degree `order`, or ``none``: constant only.

    Examples
    --------
    >>> make_drifts(np.arange(100.0), drift="polynomial", order=2).shape
    (100, 3)
    """
    check_option("the drift", drift, ("cosine", "polynomial", "none"))
    n = len(frame_times)
    if drift == "polynomial":
        return np.polynomial.legendre.legvander(np.linspace(-1, 1, n), order)
    if drift == "none" or n < 2:
        return np.ones((n, 1))
    t_r = float(frame_times[1] - frame_times[0])
    # As many half periods as fit above the cutoff: the basis of SPM, as nilearn and fMRIPrep make it.
    n_cosines = min(int(np.floor(2 * n * t_r / cutoff)), n - 1)
    phase = np.pi / n * (np.arange(n) + 0.5)
    return np.cos(np.outer(phase, np.arange(n_cosines + 1)))  # the zeroth is the constant


def make_nuisance_basis(nuisance: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of nuisance time courses, shape (n_volumes, rank); they may contain repeats."""
    scale = np.linalg.norm(nuisance, axis=0)
    scaled = nuisance[:, scale > 0] / scale[scale > 0]
    # Unit norms first, so that the rank does not depend on units (mm of motion against scanner units).
    left, values, _ = np.linalg.svd(scaled, full_matrices=False)
    return left[:, values > 1e-10 * values[0]]


def remove_nuisance(series: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the part of `series` that an orthonormal `basis` does not explain, shape (n_volumes, n_courses)."""
    return series - basis @ (basis.T @ series)


def fit_trials(
    series: np.ndarray, regressors: np.ndarray, basis: np.ndarray, *, method: Literal["lss", "lsa"] = "lss"
) -> np.ndarray:
    """Estimate the amplitude of every trial in every voxel.

    Parameters
    ----------
    series : array of shape (n_volumes, n_voxels)
    regressors : array of shape (n_volumes, n_trials)
        From `make_regressors`.
    basis : array of shape (n_volumes, rank)
        Drifts, confounds and events of no interest, from `make_nuisance_basis`.
    method
        ``lss``: each trial against the sum of all others. ``lsa``: all trials at once.

    Returns
    -------
    betas : float64 array of shape (n_trials, n_voxels)

    Raises
    ------
    DataError
        If a trial cannot be separated from the other trials or from the nuisance.

    Examples
    --------
    >>> series = np.array([[1.0], [0], [2], [0]])
    >>> trials = np.array([[1.0, 0], [0, 0], [0, 1], [0, 0]])
    >>> fit_trials(series, trials, np.zeros((4, 0)), method="lsa").ravel().tolist()
    [1.0, 2.0]
    """
    check_option("the single-trial method", method, ("lss", "lsa"))
    clean = remove_nuisance(regressors, basis)
    gram = clean.T @ clean
    check_visible(gram, regressors)
    # `clean` is orthogonal to the nuisance already, so the series need not be.
    projected = clean.T @ series  # (trial, voxel)
    if method == "lsa":
        return _solve_all(gram, projected)
    # Least squares separate (Mumford et al. 2012 [1]_): each trial's model has two regressors, itself and the sum of
    # the others. Its 2 x 2 normal equations need sums of the Gram matrix only, so all trials are solved at once.
    total = gram.sum(axis=1)
    own = gram.diagonal()
    cross = total - own
    rest = total.sum() - 2 * total + own  # squared norm of the sum of the others
    determinant = own * rest - cross**2
    if len(own) == 1:
        return projected / own[:, None]
    bad = determinant <= _RANK_TOLERANCE * own * rest
    if bad.any():
        raise DataError(
            f"trial {int(np.flatnonzero(bad)[0])} of the run cannot be distinguished from the sum of the others; "
            "check the onsets, or use fewer drifts and confounds."
        )
    others = projected.sum(axis=0) - projected
    return (rest[:, None] * projected - cross[:, None] * others) / determinant[:, None]


def check_visible(gram: np.ndarray, regressors: np.ndarray) -> None:
    """Raise `DataError` if a trial has no power left in the Gram matrix of trials less nuisance."""
    power = np.square(regressors).sum(axis=0)
    unseen = gram.diagonal() <= _RANK_TOLERANCE * np.maximum(power, np.finfo(float).tiny)
    unseen |= find_cut_off(power)
    if unseen.any():
        raise DataError(
            f"trial {int(np.flatnonzero(unseen)[0])} of the run leaves no trace in the model ({int(unseen.sum())} such "
            "trials): its response falls outside the volumes, or drifts and confounds explain it completely."
        )


def _solve_all(gram: np.ndarray, projected: np.ndarray) -> np.ndarray:
    scale, values, vectors = find_axes(gram)
    inner = vectors.T @ (scale[:, None] * projected)
    return scale[:, None] * (vectors @ (inner / values[:, None]))


def find_cut_off(power: np.ndarray) -> np.ndarray:
    """Return which trials have so little power to begin with that the end of the run cuts off their response."""
    return power < 1e-3 * np.median(power)


def find_axes(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scale, eigenvalues and eigenvectors of a Gram matrix of distinguishable trials."""
    # Scaled to ones on the diagonal: eigenvalues then tell of overlap, not of durations.
    scale = 1 / np.sqrt(gram.diagonal())
    values, vectors = np.linalg.eigh(gram * scale[:, None] * scale)
    if values[0] < _RANK_TOLERANCE * values[-1]:
        raise DataError(
            f"the {len(values)} trials of the run cannot be distinguished in one model (smallest eigenvalue "
            f"{values[0] / values[-1]:.1g} of the largest); set dataset.model to {{kind: glm, trials: lss}}."
        )
    return scale, values, vectors


# --- autocorrelated noise ---------------------------------------------------------------------------------


def fit_trials_ar1(
    series: np.ndarray, regressors: np.ndarray, basis: np.ndarray, *, method: Literal["lss", "lsa"] = "lss"
) -> np.ndarray:
    """Estimate the amplitude of every trial by generalised least squares with first-order autoregressive noise.

    The coefficient of each voxel comes from the residuals of ordinary least squares, is rounded to hundredths as
    nilearn does, and whitens series and model. For ``lsa`` the residuals are those of the full model, so that the
    result is nilearn's. For ``lss`` they are those of one model with all trials in one regressor: one coefficient per
    voxel and run in place of one per trial (a choice of this package).

    Parameters
    ----------
    series, regressors, basis, method
        As for `fit_trials`.

    Returns
    -------
    betas : float64 array of shape (n_trials, n_voxels)
    """
    check_option("the single-trial method", method, ("lss", "lsa"))
    model = regressors if method == "lsa" else regressors.sum(axis=1, keepdims=True)
    coefficients = estimate_ar1(remove_nuisance(series, make_nuisance_basis(np.hstack([basis, model]))))
    betas = np.empty((regressors.shape[1], series.shape[1]))
    # Rounded coefficients fall into about two hundred groups, each of which is one ordinary fit.
    for value in np.unique(coefficients):
        voxels = np.flatnonzero(coefficients == value)
        whitened = make_nuisance_basis(whiten_ar1(basis, value)) if basis.shape[1] else basis
        betas[:, voxels] = fit_trials(
            whiten_ar1(series[:, voxels], value), whiten_ar1(regressors, value), whitened, method=method
        )
    return betas


def estimate_ar1(residuals: np.ndarray) -> np.ndarray:
    """Return the Yule-Walker coefficient of each voxel, cut to hundredths, shape (n_voxels,); 0 where nothing varies.

    Parameters
    ----------
    residuals : array of shape (n_volumes, n_voxels)
        Of an ordinary fit.
    """
    n = len(residuals)
    power = np.einsum("tv,tv->v", residuals, residuals) / n
    lagged = np.einsum("tv,tv->v", residuals[1:], residuals[:-1]) / (n - 1)
    coefficient = np.divide(lagged, power, out=np.zeros_like(power), where=power > np.finfo(float).tiny)
    # Truncated, not rounded: nilearn's binning, so that the results agree to the last digit.
    return np.trunc(np.clip(coefficient, -0.99, 0.99) * 100) / 100


def whiten_ar1(series: np.ndarray, coefficient: float) -> np.ndarray:
    """Return time courses of shape (n_volumes, n_courses) less the prediction from the volume before."""
    white = np.array(series, dtype=np.float64)
    white[1:] -= coefficient * series[:-1]
    return white
