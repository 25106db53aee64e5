"""One amplitude per trial, by a model that is chosen for each voxel: the rules of GLMsingle [1]_.

Contains the computation and knows no images. All runs of a person are looked at together: `choose_by_voxel` finds a
response function, noise components and a ridge fraction for each voxel, and `estimate_by_choices` estimates the trials
of any run with them. The published package is not used: it holds all runs, all four of its models and the estimates of
all 20 response functions in memory, takes onsets in whole volumes and one duration for all trials, and cannot apply to
one run what other runs chose, which test runs need. This code reads one run, or some voxels of all runs, at a time; a
test compares it with the package where that is installed. Two things differ on purpose: the estimate of a trial is 0 in
voxels whose response function the end of the run cuts off, and the mixture that finds active voxels has a fixed seed.

References
----------
.. [1] Prince, Charest, Kurzawski, Pyles, Tarr, Kay (2022). Improving the accuracy of single-trial fMRI response
   estimates using GLMsingle. eLife 11, e77599. doi:10.7554/eLife.77599
.. [2] Allen et al. (2022). A massive 7T fMRI dataset to bridge cognitive neuroscience and artificial intelligence.
   Nature Neuroscience 25, 116-126. doi:10.1038/s41593-021-00962-x
.. [3] Rokem, Kay (2020). Fractional ridge regression: a fast, interpretable reparameterization of ridge regression.
   GigaScience 9, giaa133. doi:10.1093/gigascience/giaa133
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base.checks import DataError
from braindecode_vis.preprocessing.glm import (
    check_visible,
    find_axes,
    find_cut_off,
    make_nuisance_basis,
    remove_nuisance,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Each row: peak and undershoot of a double gamma (s), their dispersions (s), weight of the undershoot, onset (s). Our
# fit of the 20 responses that Allen et al. (2022 [2]_) found in voxels of eight people; at most 1e-4 of a peak away.
_LIBRARY = np.array(
    [
        (3.91732, 6.85366, 1.09252, 0.463099, 0.570678, 0),
        (4.0427, 6.9306, 1.03884, 0.525839, 0.54455, 0),
        (4.30114, 6.89914, 1.0174, 0.662749, 0.561041, 0),
        (4.04007, 6.04638, 0.750504, 1.30842, 0.600286, 0),
        (3.78026, 8.24869, 0.600836, 2.74615, 0.455223, 0),
        (3.87865, 10.8178, 0.57929, 4.50668, 0.434558, 0),
        (4.05775, 13.6221, 0.586971, 6.56748, 0.453802, 0),
        (4.26464, 16.8226, 0.623845, 10.0281, 0.486198, 0),
        (4.46956, 19.756, 0.58466, 5.86844, 0.393871, 0),
        (4.66987, 20.4342, 0.580305, 3.2408, 0.318421, 0),
        (4.8516, 20.7428, 0.604335, 1.99421, 0.255068, 0.0639624),
        (4.6823, 20.6079, 0.715193, 1.43386, 0.202075, 0.539617),
        (4.49172, 20.4042, 0.870598, 1.15946, 0.158029, 1.07806),
        (4.41125, 20.2634, 1.05639, 0.967901, 0.114078, 1.53812),
        (4.32719, 20.1623, 1.26532, 0.912837, 0.0807291, 2.0329),
        (4.18033, 20.1098, 1.52456, 0.930342, 0.0536623, 2.62123),
        (4.11521, 21.3524, 1.82896, 1.19882, 0.0280424, 3.14843),
        (4.12754, 16, 2.12646, 1, 0, 3.60211),
        (4.05486, 16, 2.74002, 1, 0, 4.26021),
        (4.22821, 16, 3.15489, 1, 0, 4.59253),
    ]
)  # fmt: skip
# The average response with which GLMsingle finds active voxels, fitted likewise; its table is rounded to 3e-3.
_AVERAGE = np.array([(6.92900, 12.6271, 1.84732, 3.74793, 0.412098, 0.0)])
_STEP_S, _LENGTH_S = 0.1, 50.0
_MOST_COMPONENTS = 10
# The reference stops adding components where the gain is within 5 % of the best.
_STOP = 1.05
_FRACTIONS = np.linspace(1, 0.05, 20)
_CHUNK = 8192
# Columns of a scattered choice of voxels that are in memory at a time, over all runs.
_CHUNK_VALUES = 2**25


def make_courses(parameters: np.ndarray, events: pd.DataFrame, frame_times: np.ndarray) -> np.ndarray:
    """Return the expected time course of each event for several response functions.

    Parameters
    ----------
    parameters : array of shape (n_responses, 6)
        Peak and undershoot (s), their dispersions (s), weight of the undershoot, onset (s).
    events : DataFrame
        `onset` and `duration` in s; durations are rounded to 0.1 s, and 0 counts as 0.1 s.
    frame_times : array of shape (n_volumes,)
        In s, evenly spaced.

    Returns
    -------
    courses : float64 array of shape (n_responses, n_volumes, n_events)
        The response to each event has its peak at 1, measured at the repetition time.
    """
    from scipy.interpolate import PchipInterpolator
    from scipy.stats import gamma

    peak, low, peak_width, low_width, weight, onset = (column[:, None] for column in parameters.T)
    after = _STEP_S * np.arange(round(_LENGTH_S / _STEP_S) + 1) - onset
    impulse = gamma.pdf(after, peak / peak_width, scale=peak_width)
    impulse = impulse - weight * gamma.pdf(after, low / low_width, scale=low_width)
    n_steps = np.maximum(1, np.floor(events["duration"].to_numpy(float) / _STEP_S + 0.5).astype(int))
    t_r = float(frame_times[1] - frame_times[0])
    out = np.zeros((len(parameters), len(frame_times), len(events)))
    for n in np.unique(n_steps):
        response = np.stack([np.convolve(one, np.ones(n)) for one in impulse], axis=1)  # (time, response)
        times = _STEP_S * np.arange(len(response))
        curve = PchipInterpolator(times, response, extrapolate=False)
        size = curve(np.arange(0, times[-1], t_r)).max(axis=0)
        which = np.flatnonzero(n_steps == n)
        since = frame_times[:, None] - events["onset"].to_numpy(float)[which]
        # (n_volumes, n_which, n_responses) -> (n_responses, n_volumes, n_which)
        out[:, :, which] = np.moveaxis(np.nan_to_num(curve(since)) / size, 2, 0)
    return out


@dataclass(frozen=True)
class RunModel:
    """What `choose_by_voxel` knows of one run beside its series.

    Parameters
    ----------
    courses : array of shape (n_responses, n_volumes, n_trials)
        From `make_courses`, for each response function of the library.
    average : array of shape (n_volumes,)
        Expected sum of all trials for the average response.
    drifts : array of shape (n_volumes, n_drifts)
        Orthonormal; contains the constant.
    basis : array of shape (n_volumes, rank)
        Orthonormal: drifts, confounds and events of no interest.
    conditions : array of shape (n_trials,)
        What each trial showed.
    session
        Label of the session.
    """

    courses: np.ndarray
    average: np.ndarray
    drifts: np.ndarray
    basis: np.ndarray
    conditions: np.ndarray
    session: str

    @classmethod
    def make(
        cls, trials: pd.DataFrame, frame_times: np.ndarray, drifts: np.ndarray, basis: np.ndarray
    ) -> RunModel:
        """Return the model of a run.

        Parameters
        ----------
        trials : DataFrame
            `onset` and `duration` in s, `stimulus_id`, `session`.
        frame_times : array of shape (n_volumes,)
            In s.
        drifts, basis
            As above.

        Raises
        ------
        DataError
            If a trial cannot be separated from the other trials or from the nuisance.
        """
        expected = make_courses(_AVERAGE, trials, frame_times)[0]
        clean = remove_nuisance(expected, basis)
        gram = clean.T @ clean
        check_visible(gram, expected)
        find_axes(gram)
        conditions = trials["stimulus_id"].to_numpy(dtype=object)
        courses = make_courses(_LIBRARY, trials, frame_times).astype(np.float32)
        for own in courses:
            own[:, find_cut_off(np.square(own).sum(axis=0))] = 0
        session = str(trials["session"].iloc[0])
        return cls(courses, expected.sum(axis=1), make_nuisance_basis(drifts), basis, conditions, session)

    def widen(self, components: np.ndarray) -> np.ndarray:
        """Return the basis with noise components, orthonormal."""
        return make_nuisance_basis(np.hstack([self.basis, components])) if components.size else self.basis


@dataclass(frozen=True)
class VoxelChoices:
    """What was chosen for the voxels of one person; see `choose_by_voxel`.

    Parameters
    ----------
    response : int array of shape (n_voxels,)
        Number of the response function in the library, from 0.
    mean : array of shape (n_voxels,)
        Mean over all volumes, of which estimates are a percentage.
    pool : bool array of shape (n_voxels,)
        Voxels whose series give the noise components.
    n_components
        Number of noise components in each run.
    fraction, penalty : arrays of shape (n_voxels,)
        Length of the estimates as a fraction of the unregularised ones, and the ridge penalty that gives it.
    scale, shift : arrays of shape (n_voxels,)
        Bring estimates with a penalty to the size of those without.
    """

    response: np.ndarray
    mean: np.ndarray
    pool: np.ndarray
    n_components: int
    fraction: np.ndarray
    penalty: np.ndarray
    scale: np.ndarray
    shift: np.ndarray

    def write(self, path: Path) -> None:
        """Write them to an ``.npz`` file."""
        np.savez(path, **vars(self))

    @classmethod
    def read(cls, path: Path) -> VoxelChoices:
        """Read what `write` has written."""
        with np.load(path, allow_pickle=False) as found:
            return cls.from_arrays(found)

    @classmethod
    def from_arrays(cls, found: Mapping[str, np.ndarray]) -> VoxelChoices:
        """Return choices from an array for each name."""
        arrays: dict[str, Any] = {name: found[name] for name in cls.__dataclass_fields__}
        return cls(**arrays | {"n_components": int(found["n_components"])})


#: Gives the series of a run less the mean of each voxel, float32 of shape (n_volumes, n_chosen).
Load = Callable[[int, np.ndarray], np.ndarray]


def choose_by_voxel(
    models: Sequence[RunModel], load: Load, mean: np.ndarray, *, denoise: bool = True, ridge: bool = True
) -> VoxelChoices:
    """Choose response functions, noise components and ridge fractions by the rules of GLMsingle [1]_.

    The response function of a voxel explains most of its series. Noise components come from voxels that the trials do
    not explain; their number, one for all voxels, and the ridge fraction of each voxel are those whose estimates are
    nearest to the unregularised estimates of the same condition in another run.

    Parameters
    ----------
    models
        One for each run of one person; a condition must recur in another run for `denoise` and `ridge`.
    load
        Gives the series of some voxels of a run.
    mean : array of shape (n_voxels,)
        Mean over all volumes of all runs.
    denoise, ridge
        Whether to use noise components, and ridge fractions; without both, only response functions are chosen.

    Raises
    ------
    DataError
        If no voxel can give noise components.
    """
    voxels = np.arange(len(mean))
    response, explained = _choose_responses(models, load, voxels)
    pairs = pair_repeats(models)
    pool, n_components = np.zeros(len(mean), bool), 0
    if denoise:
        pool, judged = _find_pool(explained, mean)
        noise = [_find_components(load(n, np.flatnonzero(pool)), m.drifts) for n, m in enumerate(models)]
        n_components = _choose_n_components(models, load, noise, pairs, response, judged)
    one, zero = np.ones(len(mean), np.float32), np.zeros(len(mean), np.float32)
    fraction, penalty, scale, shift = one.copy(), zero.copy(), one.copy(), zero.copy()
    if ridge:
        wide = [
            m.widen(noise[n][:, :n_components] if denoise else m.basis[:, :0]) for n, m in enumerate(models)
        ]
        n_trials = sum(len(model.conditions) for model in models)
        for number, chosen in _split_by_response(response, voxels, n_trials):
            axes = [
                _Axes.make(model.courses[number], basis) for model, basis in zip(models, wide, strict=True)
            ]
            series = [load(n, chosen) for n in range(len(models))]
            found = _choose_fractions(axes, series, pairs, _name_sessions(models))
            fraction[chosen], penalty[chosen], scale[chosen], shift[chosen] = found
    return VoxelChoices(response, mean, pool, n_components, fraction, penalty, scale, shift)


def estimate_by_choices(series: np.ndarray, model: RunModel, choices: VoxelChoices) -> np.ndarray:
    """Estimate every trial of a run, which need not be one of those that the choices come from.

    Parameters
    ----------
    series : array of shape (n_volumes, n_voxels)
        Less the mean of each voxel.
    model
        Of the run.
    choices
        Of the person.

    Returns
    -------
    betas : float32 array of shape (n_trials, n_voxels)
        In percent of the mean; 0 where the mean is 0.
    """
    series = series.astype(np.float32, copy=False)
    components = model.basis[:, :0]
    if choices.n_components:
        components = _find_components(series[:, choices.pool], model.drifts)[:, : choices.n_components]
    basis = model.widen(components)
    out = np.empty((len(model.conditions), series.shape[1]), np.float32)
    percent = np.divide(100, np.abs(choices.mean), out=np.zeros_like(choices.mean), where=choices.mean != 0)
    for number, chosen in _split_by_response(choices.response, np.arange(series.shape[1]), len(series)):
        axes = _Axes.make(model.courses[number], basis)
        betas = axes.estimate(axes.rotate(series[:, chosen]), choices.penalty[chosen])
        out[:, chosen] = (betas * choices.scale[chosen] + choices.shift[chosen]) * percent[chosen]
    return out


def pair_repeats(models: Sequence[RunModel]) -> csr_array:
    """Return which trials show the same condition in another run, 0 or 1, shape (n_trials, n_trials)."""
    from scipy.sparse import csr_array

    _, names = np.unique(np.concatenate([m.conditions for m in models]).astype(str), return_inverse=True)
    runs = np.repeat(np.arange(len(models)), [len(m.conditions) for m in models])
    shown = csr_array((np.ones(len(names), np.float32), (np.arange(len(names)), names)))
    _, both = np.unique(np.stack([runs, names]), axis=1, return_inverse=True)
    together = csr_array((np.ones(len(names), np.float32), (np.arange(len(names)), both)))
    pairs = csr_array(shown @ shown.T - together @ together.T)
    pairs.eliminate_zeros()
    return pairs


def _name_sessions(models: Sequence[RunModel]) -> np.ndarray:
    return np.repeat([m.session for m in models], [len(m.conditions) for m in models])


def _split_by_response(
    response: np.ndarray, voxels: np.ndarray, n_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each response function with voxels that have it, as many at a time as memory should hold."""
    size = max(64, _CHUNK_VALUES // max(1, n_rows))
    for number in np.unique(response[voxels]):
        chosen = voxels[response[voxels] == number]
        for start in range(0, len(chosen), size):
            yield int(number), chosen[start : start + size]


def _choose_responses(
    models: Sequence[RunModel], load: Load, voxels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best response function of each voxel, and the percentage that one regressor of all trials explains."""
    n_responses = len(models[0].courses)
    power, cross, seen = (np.zeros(len(voxels)) for _ in range(3))
    gains = np.zeros((n_responses, len(voxels)), np.float32)
    # One amplitude for all runs: its sums come first, and then what it explains.
    clean = [remove_nuisance(model.average[:, None], model.basis)[:, 0] for model in models]
    plain = [remove_nuisance(model.average[:, None], model.drifts)[:, 0] for model in models]
    for n, model in enumerate(models):
        has_confounds = model.basis.shape[1] > model.drifts.shape[1]
        fits: list[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]] = []
        for course in model.courses:
            own = remove_nuisance(course, model.basis)
            if not has_confounds:
                axes = np.linalg.qr(own[:, own.any(axis=0)])[0]
                fits.append((axes.astype(np.float32), None, None))
                continue
            # The series keep their confounds when fits are compared, as in the reference.
            shown = remove_nuisance(course, model.drifts)
            fits.append((_solve(own).T.astype(np.float32), shown.astype(np.float32), shown.T @ shown))
        both = np.stack([clean[n], plain[n]]).astype(np.float32)
        for start in range(0, len(voxels), _CHUNK):
            here = slice(start, start + _CHUNK)
            series = load(n, voxels[here])
            slow = model.drifts.T.astype(np.float32) @ series
            power[here] += _sum_squares(series) - _sum_squares(slow)
            sums = both @ series
            cross[here] += sums[0]
            seen[here] += sums[1]
            for number, (weights, seen_course, gram) in enumerate(fits):
                inside = weights.T @ series  # (trial, voxel)
                if seen_course is None or gram is None:
                    gains[number, here] += _sum_squares(inside)
                else:
                    product = 2 * (seen_course.T @ series) - gram.astype(np.float32) @ inside
                    gains[number, here] += np.einsum("nv,nv->v", inside, product)
    amplitude = cross / sum(float(one @ one) for one in clean)
    gain = 2 * amplitude * seen - amplitude**2 * sum(float(one @ one) for one in plain)
    explained = np.divide(100 * gain, power, out=np.full(len(voxels), np.nan), where=power > 0)
    return gains.argmax(axis=0).astype(np.int8), explained


def _sum_squares(values: np.ndarray) -> np.ndarray:
    return np.einsum("nv,nv->v", values, values)


def _solve(clean: np.ndarray) -> np.ndarray:
    """Return the least-squares weights of volumes for each regressor, shape (n_regressors, n_volumes); 0 for zeros."""
    out, seen = np.zeros(clean.T.shape), clean.any(axis=0)
    out[seen] = np.linalg.solve(clean[:, seen].T @ clean[:, seen], clean[:, seen].T)
    return out


# --- noise components ---------------------------------------------------------------------------------------


def _find_pool(explained: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels that give noise components, and the numbers of those that judge them."""
    cut = find_tail(explained[np.isfinite(explained)])
    # Brighter than a tenth of the brightest, so inside the head.
    pool = (mean > 0.1 * np.percentile(mean, 99)) & (explained < cut)
    if pool.sum() <= _MOST_COMPONENTS:
        raise DataError(
            f"{int(pool.sum())} of {len(mean)} voxels are bright and not explained by the trials, too few to find "
            "noise components; use a mask that reaches beyond active voxels, or set dataset.model.denoise=false."
        )
    judged = np.flatnonzero(explained > cut)
    if not len(judged):
        judged = np.argsort(np.nan_to_num(explained, nan=-np.inf), kind="stable")[::-1][:100]
    return pool, judged


def find_tail(values: np.ndarray) -> float:
    """Return where a value belongs equally to both parts of a mixture of two Gaussians, from above.

    Parameters
    ----------
    values : array of shape (n_values,)
        Finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if len(values) < 2 or np.ptp(values) == 0:
        return float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the cut is read from a grid of 500 steps
        mixture = GaussianMixture(2, tol=1e-10, reg_covar=0, n_init=3, random_state=0).fit(values[:, None])
    low, high = _find_range(values)
    centres = mixture.means_.ravel()
    grid = np.linspace(min(low, centres.min()), max(high, centres.max()), 500)
    shares = mixture.predict_proba(grid[:, None])
    upper = shares[:, 0 if shares[-1, 0] > 0.5 else 1]
    below = np.flatnonzero(upper <= 0.5)
    return float(grid[below[-1] if len(below) else 0])


def _find_range(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and largest value, without outliers five spreads from the median."""
    while True:
        least, low, middle, high, most = np.percentile(values, [0.1, 10, 50, 90, 99.9])
        bounds = middle - 5 * (middle - low), middle + 5 * (high - middle)
        inside = (values >= bounds[0] if least < bounds[0] else True) & (
            values <= bounds[1] if most > bounds[1] else True
        )
        if np.all(inside):
            break
        values = values[inside]
    smallest, largest = values.min(), values.max()
    return (
        float(smallest if smallest >= middle - 1.1 * (middle - least) else least),
        float(largest if largest <= middle + 1.1 * (most - middle) else most),
    )


def _find_components(series: np.ndarray, drifts: np.ndarray) -> np.ndarray:
    """Return the main time courses of the pool in one run, standard deviation 1, shape (n_volumes, n_components)."""
    total = np.zeros((len(series), len(series)))
    slow = drifts.astype(np.float32)
    for start in range(0, series.shape[1], _CHUNK):
        block = remove_nuisance(series[:, start : start + _CHUNK], slow)
        size = np.linalg.norm(block, axis=0)
        block = block[:, size > 0] / size[size > 0]
        total += block @ block.T
    _, vectors = np.linalg.eigh(total)
    main = vectors[:, ::-1][:, :_MOST_COMPONENTS]
    return main / main.std(axis=0, ddof=1)


def _choose_n_components(
    models: Sequence[RunModel],
    load: Load,
    noise: Sequence[np.ndarray],
    pairs: csr_array,
    response: np.ndarray,
    judged: np.ndarray,
) -> int:
    """Return the smallest number of components that is nearly as good as the best one."""
    sessions, n_most = _name_sessions(models), noise[0].shape[1]
    badness = []
    n_rows = sum(len(one) for one in noise)
    for number, chosen in _split_by_response(response, judged, n_rows):
        series = [load(n, chosen) for n in range(len(models))]
        error = _Badness(pairs, sessions)
        rows = []
        for k in range(n_most + 1):
            betas = []
            for model, own, components in zip(models, series, noise, strict=True):
                clean = remove_nuisance(model.courses[number], model.widen(components[:, :k]))
                betas.append(_solve(clean).astype(np.float32) @ own)
            rows.append(error.measure(np.concatenate(betas)))
        badness.append(np.stack(rows))
    curve = -np.median(np.concatenate(badness, axis=1), axis=1)
    gain = curve - curve[0]
    chosen_k, best = 0, -np.inf
    for k, value in enumerate(gain):
        if value > best:
            chosen_k, best = k, value
            if best * _STOP >= gain.max():
                break
    return chosen_k


class _Badness:
    """Squared distance of estimates to the unregularised ones of the same condition in other runs.

    The first estimates measured are the unregularised ones: their mean and standard deviation in each session give the
    units.
    """

    def __init__(self, pairs: csr_array, sessions: np.ndarray) -> None:
        self.pairs = pairs
        self.groups = [np.flatnonzero(sessions == name) for name in np.unique(sessions)]
        self.counts = np.asarray(pairs.sum(axis=1)).ravel().astype(np.float32)
        self.units: list[tuple[np.ndarray, np.ndarray]] = []

    def measure(self, betas: np.ndarray) -> np.ndarray:
        """Return the sum over pairs of trials for each voxel, of betas of shape (n_trials, n_voxels)."""
        if not self.units:
            for rows in self.groups:
                spread = betas[rows].std(axis=0, ddof=1)
                inverse = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
                self.units.append((betas[rows].mean(axis=0), inverse))
            plain = self._standardise(betas)
            self.partners = self.pairs @ plain
            self.fixed = np.einsum("n,nv,nv->v", self.counts, plain, plain)
        values = self._standardise(betas)
        own = np.einsum("n,nv,nv->v", self.counts, values, values)
        return own - 2 * np.einsum("nv,nv->v", values, self.partners) + self.fixed

    def _standardise(self, betas: np.ndarray) -> np.ndarray:
        out = np.empty_like(betas)
        for rows, (mean, inverse) in zip(self.groups, self.units, strict=True):
            out[rows] = (betas[rows] - mean) * inverse
        return out


# --- fractional ridge ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """Singular value decomposition of the regressors of one run: volumes by axes, sizes, and axes by trials."""

    left: np.ndarray
    sizes: np.ndarray
    right: np.ndarray

    @classmethod
    def make(cls, course: np.ndarray, basis: np.ndarray) -> _Axes:
        left, sizes, right = np.linalg.svd(remove_nuisance(course, basis), full_matrices=False)
        return cls(left.astype(np.float32), sizes.astype(np.float32), right.astype(np.float32))

    def rotate(self, series: np.ndarray) -> np.ndarray:
        """Return unregularised estimates along the axes, shape (n_axes, n_voxels)."""
        inverse = np.divide(1, self.sizes, out=np.zeros_like(self.sizes), where=self.sizes > 1e-10)
        return (self.left.T @ series) * inverse[:, None]

    def estimate(self, rotated: np.ndarray, penalty: np.ndarray) -> np.ndarray:
        """Return estimates of trials with the ridge penalty of each voxel, shape (n_trials, n_voxels)."""
        power = np.maximum(np.square(self.sizes), np.finfo(np.float32).tiny)[:, None]
        return self.right.T @ (rotated * (power / (power + penalty)))


def _choose_fractions(
    axes: Sequence[_Axes], series: Sequence[np.ndarray], pairs: csr_array, sessions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return fraction, penalty, scale and shift of voxels that share their regressors."""
    rotated = [own.rotate(block) for own, block in zip(axes, series, strict=True)]
    power = np.square(np.concatenate([own.sizes for own in axes]).astype(np.float64))
    # The grid of fractional ridge [3]_: lengths at these penalties, and between them linear in log(1 + penalty).
    ends = np.floor(np.log10(0.01 * power.min())), np.ceil(np.log10(1e4 * power.max()))
    penalties = np.concatenate([[0], 10 ** np.arange(*ends, 0.2)])
    shrunk = np.square(power / (power + penalties[:, None])).astype(np.float32)
    lengths = np.sqrt(shrunk @ np.square(np.concatenate(rotated)))  # (penalty, voxel)
    lengths = np.divide(lengths, lengths[0], out=np.zeros_like(lengths), where=lengths[0] > 0)
    ticks = np.log1p(penalties)[::-1]
    tried = np.stack([np.interp(_FRACTIONS, own[::-1], ticks) for own in lengths.T], axis=1)
    tried = np.expm1(tried).astype(np.float32)  # (fraction, voxel)

    def estimate(penalty: np.ndarray) -> np.ndarray:
        return np.concatenate([own.estimate(a, penalty) for own, a in zip(axes, rotated, strict=True)])

    error = _Badness(pairs, sessions)
    best = np.stack([error.measure(estimate(penalty)) for penalty in tried]).argmin(axis=0)
    penalty = tried[best, np.arange(len(best))]
    plain, small = estimate(np.zeros_like(penalty)), estimate(penalty)
    centre, small_centre = plain.mean(axis=0), small.mean(axis=0)
    spread = _sum_squares(small - small_centre)
    shared = np.einsum("nv,nv->v", small - small_centre, plain - centre)
    scale = np.divide(shared, spread, out=np.full_like(spread, -1), where=spread > 0)
    is_usable = scale >= 0
    scale = np.where(is_usable, scale, 1)
    shift = np.where(is_usable, centre - scale * small_centre, 0)
    return _FRACTIONS[best], penalty, scale, shift
