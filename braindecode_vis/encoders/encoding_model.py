"""Linear models from images to responses: ridge on one or several image spaces, with a separate penalty per response.

Owns the encoding direction: features are z-scored and each space is scaled to the same total variance, responses are
centred. A weighting says how much each space counts (one alone, all alike, or shares drawn at random), and each
response (voxel, parcel, channel at a time) takes the weighting and the penalty that predict it best in inner folds of
the training trials. Random weightings under one penalty are banded ridge: a space that counts little is penalised much.
Knows nothing of images, test trials or brains.

One eigendecomposition per weighting and inner fold, of trials or features, whichever are fewer, serves all penalties
and responses; responses are handled in blocks, so that memory beside them stays bounded.

himalaya chooses the same penalties (a test compares them), but gives no out-of-fold predictions.

References
----------
Nunez-Elizalde, Huth and Gallant (2019), doi:10.1016/j.neuroimage.2019.04.012 (banded ridge); Dupré la Tour et al.
(2022), doi:10.1016/j.neuroimage.2022.119728 (random weightings, a penalty per response).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.settings import DeviceSettings
from braindecode_vis.encoders.ridge import Backend, Gram, make_gram, use_backend
from braindecode_vis.preprocessing.alignment import ZScore, fit_zscore
from braindecode_vis.preprocessing.splits import Fold, InnerFoldSettings, make_inner_folds

_WEIGHTINGS = 20  # random shares that ``banded`` tries
_BLOCK_VALUES = 16_000_000  # numbers of a block of responses, 128 MB in double precision

Advance = Callable[[int], None]


class EncodingModelConfig(DeviceSettings, InnerFoldSettings):
    """How image spaces are combined, and the candidates for the inner folds.

    Parameters
    ----------
    combine
        ``best`` uses for each response the one space that predicts it best, ``joint`` all spaces with equal weight,
        ``banded`` the best of these and of 20 random weightings (uniform over all weights that sum to 1). With a single
        space they are the same.
    alphas
        Penalties, in units of the mean of the kernel's diagonal: the total variance of the features is 1.
    device
        Device of the linear algebra; ``auto`` takes a GPU, if there is one, for large problems.
    """

    combine: Literal["best", "joint", "banded"] = "best"
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=tuple(float(10**e) for e in np.linspace(-2, 5, 15)), min_length=1
    )

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"n_weightings": _WEIGHTINGS}


@dataclass(frozen=True)
class EncodingModel:
    """A fitted encoding model; all of it learnt from training trials.

    Parameters
    ----------
    spaces
        Names of the image spaces, in order.
    zscores
        Statistics of the features of each.
    weightings : array of shape (n_weightings, n_spaces)
        Shares of the spaces, each row summing to 1.
    chosen : int array of shape (n_responses,)
        Row of `weightings` of each response.
    alphas : array of shape (n_responses,)
        Penalty of each response.
    mean : float32 array of shape (n_responses,)
        Mean of the training responses.
    inner_explained : array of shape (n_responses,)
        Share of variance that was explained in the inner folds, with the choice that was made by it.
    out_of_fold : float32 array of shape (n_trials, n_responses), or None
        Prediction of each training trial by a fit that has not seen its image.
    solutions
        For each weighting in use: whether coefficients are of trials, and the coefficients of its responses.
    training
        Scaled training features of each space, where coefficients are of trials.
    """

    spaces: tuple[str, ...]
    zscores: tuple[ZScore, ...]
    weightings: np.ndarray
    chosen: np.ndarray
    alphas: np.ndarray
    mean: np.ndarray
    inner_explained: np.ndarray
    out_of_fold: np.ndarray | None
    solutions: Mapping[int, tuple[bool, np.ndarray]]
    training: tuple[np.ndarray, ...]

    def predict(self, features: Mapping[str, Embeddings]) -> np.ndarray:
        """Return the response to each image, float32 of shape (n_images, n_responses).

        Parameters
        ----------
        features
            Embeddings of the same images, in the same order, in each space.
        """
        parts = self.predict_by_space(features)
        total: np.ndarray = parts[0]
        for part in parts[1:]:
            total += part
        return total + self.mean

    def predict_by_space(self, features: Mapping[str, Embeddings]) -> list[np.ndarray]:
        """Return what each space adds to the prediction: float32 arrays of shape (n_images, n_responses)."""
        rows = [
            _scale(features[name].flat(), zscore)
            for name, zscore in zip(self.spaces, self.zscores, strict=True)
        ]
        parts = [np.zeros((len(rows[0]), len(self.mean)), np.float32) for _ in self.spaces]
        for number, (of_trials, coefficients) in self.solutions.items():
            own, shares, start = np.flatnonzero(self.chosen == number), self.weightings[number], 0
            for space in np.flatnonzero(shares):
                if of_trials:
                    kernel = shares[space] * (rows[space] @ self.training[space].T)  # (n_images, n_trials)
                    parts[space][:, own] = kernel.astype(np.float32) @ coefficients
                    continue
                stop = start + rows[space].shape[1]
                weights = np.float32(np.sqrt(shares[space])) * coefficients[start:stop]
                parts[space][:, own] = rows[space] @ weights
                start = stop
        return parts

    @property
    def shares(self) -> np.ndarray:
        """Share of each space in the model of each response, shape (n_responses, n_spaces)."""
        return np.asarray(self.weightings[self.chosen])


def fit_encoding(
    features: Mapping[str, Embeddings],
    responses: np.ndarray,
    *,
    config: EncodingModelConfig | None = None,
    seed: int = 0,
    out_of_fold: bool = False,
    advance: Advance = lambda n: None,
) -> EncodingModel:
    """Choose weighting and penalty of each response on the training trials, then fit on all of them.

    Parameters
    ----------
    features
        Name of each image space to the embedding of the image of each training trial, all in the same order.
    responses : array of shape (n_trials, n_responses)
        What was measured.
    config
        What there is to choose from.
    seed
        Of the inner folds, which part images, and of random weightings.
    out_of_fold
        Also predict the training trials by fits that have not seen their images.
    advance
        Called with the number of steps done, of `count_fits`.

    Returns
    -------
    EncodingModel

    Raises
    ------
    DataError
        If rows do not pair, or there are fewer images than inner folds.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> images = Embeddings(rng.normal(size=(60, 5)), [str(n) for n in range(60)], "toy")
    >>> model = fit_encoding({"toy": images}, images.vectors @ rng.normal(size=(5, 3)))
    >>> model.predict({"toy": images}).shape
    (60, 3)
    """
    config = config or EncodingModelConfig()
    first = next(iter(features.values()), None)
    if first is None or responses.ndim != 2 or any(len(one) != len(responses) for one in features.values()):
        shapes = ", ".join(str(one.vectors.shape) for one in features.values()) or "none"
        raise DataError(
            f"an encoding model needs one response vector per image, got {responses.shape} for features of {shapes}."
        )
    if any((one.ids != first.ids).any() for one in features.values()):
        raise DataError(
            "the image spaces of an encoding model list different images, or the same in a different order."
        )
    n_trials, n_responses = responses.shape
    widths = [int(np.prod(one.vectors.shape[1:])) for one in features.values()]
    small = min(n_trials, sum(widths))
    check_memory(
        12 * n_trials * n_responses + 12 * n_trials * sum(widths) + 40 * small**2 + 4 * 8 * _BLOCK_VALUES,
        what=f"an encoding model of {n_trials} trials, {sum(widths)} features and {n_responses} responses",
        reduce="the subjects (--subject), the image spaces, or choose voxels (selection.*)",
    )
    flat = [one.flat() for one in features.values()]
    zscores = tuple(fit_zscore(each) for each in flat)
    scaled = tuple(_scale(each, zscore) for each, zscore in zip(flat, zscores, strict=True))
    mean = responses.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = np.asarray(responses, dtype=np.float32) - mean
    weightings = list_weightings(len(scaled), config, seed)
    folds = make_inner_folds(
        first.ids, n_folds=config.n_inner_folds, generator=make_generator(seed, "encoding", "inner_folds"),
        setting="n_inner_folds",
    )  # fmt: skip
    with use_backend(config.device, n_trials * (n_responses + sum(widths))) as backend:
        chosen, best, error = np.zeros(n_responses, int), np.zeros(n_responses, int), None
        for number, shares in enumerate(weightings):
            gram = _make_gram(scaled, shares, backend)
            errors = _compute_errors(gram, folds, config.alphas, centred, advance)  # (n_alphas, n_responses)
            which = errors.argmin(axis=0)
            lowest = errors[which, np.arange(n_responses)]
            better = np.ones(n_responses, bool) if error is None else lowest < error
            chosen[better], best[better] = number, which[better]
            error = lowest if error is None else np.where(better, lowest, error)
        alphas = np.asarray(config.alphas)[best]
        solutions, predicted = {}, np.empty((n_trials, n_responses), np.float32) if out_of_fold else None
        for number in np.unique(chosen).tolist():
            gram, own = _make_gram(scaled, weightings[number], backend), np.flatnonzero(chosen == number)
            if predicted is not None:
                predicted[:, own] = (
                    _predict_out_of_fold(gram, folds, alphas[own], centred[:, own]) + mean[own]
                )
            solutions[number] = (gram.products is None, _solve(gram, alphas[own], centred[:, own]))
            advance(1)
    power = _sum_squares(centred, folds)
    explained = np.where(power > 0, 1 - error / np.where(power > 0, power, 1), 0.0)
    keeps = any(of_trials for of_trials, _ in solutions.values())
    return EncodingModel(
        tuple(features), zscores, weightings, chosen, alphas, mean, explained, predicted, solutions,
        scaled if keeps else (),
    )  # fmt: skip


def list_weightings(n_spaces: int, config: EncodingModelConfig, seed: int) -> np.ndarray:
    """Return the shares of the spaces that are tried, shape (n_weightings, n_spaces).

    Examples
    --------
    >>> list_weightings(2, EncodingModelConfig(combine="best"), 0).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if n_spaces == 1:
        return np.ones((1, 1))
    joint, alone = np.full((1, n_spaces), 1 / n_spaces), np.eye(n_spaces)
    if config.combine == "joint":
        return joint
    if config.combine == "best":
        return alone
    drawn = make_generator(seed, "encoding", "weightings").dirichlet(np.ones(n_spaces), _WEIGHTINGS)
    return np.concatenate([joint, alone, drawn])


def count_fits(n_spaces: int, config: EncodingModelConfig) -> int:
    """Return about how many steps `fit_encoding` counts: inner folds of all weightings."""
    return len(list_weightings(n_spaces, config, 0)) * config.n_inner_folds + 1


def draw_residuals(
    model: EncodingModel, responses: np.ndarray, n: int, generator: np.random.Generator
) -> np.ndarray:
    """Return noise with the covariance of what the model leaves of the training trials, shape (n, n_responses).

    Each draw is a random combination of residuals, so that their covariance needs no matrix of responses by responses
    and no assumption of its rank. Residuals are those of fits that have not seen the image: they hold what the model
    misses beside the noise of the recording.

    Parameters
    ----------
    model
        Fitted with ``out_of_fold``.
    responses : array of shape (n_trials, n_responses)
        What it was fitted on.
    n
        Number of draws.
    generator
        Where they come from.
    """
    if model.out_of_fold is None:
        raise DataError("this encoding model was fitted without out_of_fold, so its residuals are not known.")
    residual = np.asarray(responses, dtype=np.float32) - model.out_of_fold
    residual -= residual.mean(axis=0, dtype=np.float64).astype(np.float32)
    mixing = generator.standard_normal((n, len(residual)), dtype=np.float32)
    return np.asarray(mixing @ residual / np.sqrt(np.float32(max(1, len(residual) - 1))))


# --- the solution ------------------------------------------------------------------------------------------


def _scale(values: np.ndarray, zscore: ZScore) -> np.ndarray:
    """Return z-scored features whose total variance is 1."""
    return np.asarray(zscore.apply(values) / np.float32(np.sqrt(values.shape[1])))


def _make_gram(scaled: tuple[np.ndarray, ...], shares: np.ndarray, backend: Backend) -> Gram:
    """Return the Gram matrix of weighted spaces, without responses."""
    used = [np.float32(np.sqrt(shares[n])) * scaled[n] for n in np.flatnonzero(shares)]
    data = used[0] if len(used) == 1 else np.concatenate(used, axis=1)
    return make_gram(data, np.empty((len(data), 0), np.float32), backend)


def _iterate_blocks(n_trials: int, n_responses: int) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // max(1, n_trials))
    for start in range(0, n_responses, step):
        yield slice(start, start + step)


@dataclass(frozen=True)
class _Path:
    """What predicts the held-out trials of a fold under any penalty: ``left @ (right / (eigenvalues + alpha))``."""

    eigenvalues: Any
    left: Any  # (n_held_out, n)
    basis: Any  # (n, n_train), takes centred training responses to `right`


def _decompose(gram: Gram, fold: Fold) -> _Path:
    backend = gram.backend
    matrix, _, left, _ = gram.split(fold)
    eigenvalues, vectors = backend.xp.linalg.eigh(matrix)
    basis = vectors.T if gram.products is None else vectors.T @ backend.take(gram.data[fold.train]).T
    return _Path(eigenvalues.clip(0), left @ vectors, basis)


def _compute_errors(
    gram: Gram, folds: list[Fold], alphas: tuple[float, ...], responses: np.ndarray, advance: Advance
) -> np.ndarray:
    """Return the sum of squared errors over held-out trials, shape (n_alphas, n_responses)."""
    errors, backend = np.zeros((len(alphas), responses.shape[1])), gram.backend
    for fold in folds:
        path = _decompose(gram, fold)
        for block in _iterate_blocks(*responses.shape):
            learnt = backend.take(responses[fold.train, block])
            mean = learnt.mean(0)
            right, truth = path.basis @ (learnt - mean), backend.take(responses[fold.test, block]) - mean
            for row, alpha in enumerate(alphas):
                predicted = (path.left / (path.eigenvalues + alpha)) @ right
                errors[row, block] += backend.give(((predicted - truth) ** 2).sum(0))
        advance(1)
    return errors


def _predict_out_of_fold(
    gram: Gram, folds: list[Fold], alphas: np.ndarray, responses: np.ndarray
) -> np.ndarray:
    """Return predictions of all trials with a penalty per response; responses and predictions are centred over all."""
    predicted, backend = np.empty(responses.shape, np.float32), gram.backend
    for fold in folds:
        path = _decompose(gram, fold)
        for block in _iterate_blocks(*responses.shape):
            learnt = backend.take(responses[fold.train, block])
            mean = learnt.mean(0)
            right = path.basis @ (learnt - mean)
            right = right / (path.eigenvalues[:, None] + backend.take(alphas[block]))
            predicted[fold.test, block] = backend.give(path.left @ right + mean)
    return predicted


def _solve(gram: Gram, alphas: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Return coefficients of trials or features with a penalty per response, float32 of shape (n, n_responses)."""
    backend = gram.backend
    eigenvalues, vectors = backend.xp.linalg.eigh(gram.matrix)  # features are centred, and so is this
    eigenvalues = eigenvalues.clip(0)
    basis = vectors.T if gram.products is None else vectors.T @ backend.take(gram.data).T
    solved = np.empty((len(gram.matrix), responses.shape[1]), np.float32)
    for block in _iterate_blocks(*responses.shape):
        right = basis @ backend.take(responses[:, block])
        right = right / (eigenvalues[:, None] + backend.take(alphas[block]))
        solved[:, block] = backend.give(vectors @ right)
    return solved


def _sum_squares(responses: np.ndarray, folds: list[Fold]) -> np.ndarray:
    """Return the error of predicting held-out trials by the mean of the others, shape (n_responses,)."""
    total = np.zeros(responses.shape[1])
    for fold in folds:
        mean = responses[fold.train].mean(axis=0, dtype=np.float64)
        total += ((responses[fold.test] - mean) ** 2).sum(axis=0, dtype=np.float64)
    return total
