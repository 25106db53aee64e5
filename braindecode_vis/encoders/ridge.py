"""Ridge regression from responses to any target space, with nested choice of penalty and features.

Owns the linear brain encoder: z-scored features, centred targets, one penalty for all targets. The penalty and,
if several are offered, the number of features are chosen together by cross-validation inside the training
trials; feature scores are recomputed inside every inner fold. Knows nothing of images or test trials. The final
fit is himalaya's; the inner grid reuses one eigendecomposition for all penalties.

References
----------
Dupre la Tour et al. (2022), himalaya, doi:10.1016/j.neuroimage.2022.119728.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import DataError
from braindecode_vis.devices import choose_device
from braindecode_vis.memory import check_memory
from braindecode_vis.preprocessing.scaling import ZScore, fit_zscore
from braindecode_vis.preprocessing.splits import Fold, make_inner_folds
from braindecode_vis.preprocessing.voxel_geometry import check_common_features
from braindecode_vis.seeds import make_generator
from braindecode_vis.settings import Settings
from braindecode_vis.store import read_json, write_json

Device = Literal["auto", "cpu", "cuda"]
SMALL_PROBLEM = (
    5_000_000  # values of the response matrix; below, one CPU thread is done before a GPU has woken
)


class RidgeConfig(Settings):
    """Candidates that the inner cross-validation chooses from.

    Parameters
    ----------
    alphas
        Penalties, in units of the z-scored features' Gram matrix.
    n_features
        Numbers of features to keep, best first by `score_features`; None keeps all. One entry is a fixed choice.
    n_inner_folds
        Folds of the inner cross-validation, parted by stimulus.
    device
        Where the linear algebra runs; ``auto`` takes a GPU, if there is one, for large problems. Does
        not change the result beyond rounding, so it stays out of the fingerprint.
    """

    kind: Literal["ridge"] = "ridge"
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=tuple(float(10**e) for e in np.linspace(1, 6, 11)), min_length=1
    )
    n_features: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(default=(None,), min_length=1)
    n_inner_folds: int = Field(default=5, ge=2)
    device: Device = "auto"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})

    def build(self, *, seed: int) -> RidgeEncoder:
        """Return the unfitted encoder."""
        return RidgeEncoder(self, seed=seed)

    def read(self, folder: Path) -> RidgeEncoder:
        """Return the fitted encoder that was written into `folder`."""
        return RidgeEncoder.read(self, folder)


@dataclass(frozen=True)
class RidgeFit:
    """Everything that prediction needs; all of it learnt from training trials.

    Parameters
    ----------
    zscore
        Statistics of the kept features.
    kept : int array of shape (n_kept,)
        Numbers of the features in use, ascending.
    weights : float32 array of shape (n_kept, n_targets)
        Linear map of the z-scored features.
    target_mean : float32 array of shape (n_targets,)
        Mean of the training targets.
    alpha, choices
        The chosen penalty, and the inner cross-validation error of every candidate.
    """

    zscore: ZScore
    kept: np.ndarray
    weights: np.ndarray
    target_mean: np.ndarray
    target_shape: tuple[int, ...]
    space: str
    alpha: float
    choices: list[dict[str, Any]]


class RidgeEncoder:
    """The linear brain encoder; see the module for what is chosen and how."""

    def __init__(self, config: RidgeConfig, *, seed: int = 0, fitted: RidgeFit | None = None) -> None:
        self.config = config
        self.seed = seed
        self.fitted = fitted

    def fit(self, responses: Responses, targets: Embeddings) -> RidgeEncoder:
        """Choose penalty and features on the training trials, then fit on all of them.

        Parameters
        ----------
        responses
            Training trials.
        targets
            One row per trial, in the order of `responses`.
        """
        check_common_features(responses, what="ridge")
        if len(targets) != responses.n_trials or (targets.ids != responses.stimulus_ids).any():
            raise DataError("ridge needs one target per trial, in the order of the trials.")
        n_features = int(np.prod(responses.data.shape[1:]))
        n_targets = int(np.prod(targets.vectors.shape[1:]))
        check_memory(
            estimate_ridge_bytes(responses.n_trials, n_features, n_targets),
            what=f"ridge on {responses.n_trials} trials of {n_features} features and {n_targets} targets",
            reduce="the subjects (--subject), choose features (selection.*), or set repeats.train=averaged",
        )
        data, values = responses.as_matrix(), targets.flat()
        generator = make_generator(self.seed, "ridge", "inner_folds")
        with _use_backend(self.config.device, data.size) as backend:
            n_kept, alpha, choices = self._choose(data, values, responses.stimulus_ids, generator, backend)
            kept, zscore, mean, weights = _fit_ridge(data, values, n_kept, alpha)
        self.fitted = RidgeFit(
            zscore, kept, weights, mean, targets.vectors.shape[1:], targets.space, alpha, choices
        )
        return self

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict every training trial by a fit that has not seen its stimulus.

        What follows in the pipeline (a prior, a contrast) must learn from predictions as uncertain as those of
        the test trials; the fitted encoder's own predictions of its training trials are not. Penalty and number
        of features are those already chosen.
        """
        fit = self._require_fit()
        data, values = responses.as_matrix(), targets.flat()
        folds = make_inner_folds(
            responses.stimulus_ids,
            n_folds=self.config.n_inner_folds,
            generator=make_generator(self.seed, "ridge", "out_of_fold"),
            setting="encoder.n_inner_folds",
        )
        predicted = np.empty_like(values)
        with _use_backend(self.config.device, data.size):
            for fold in folds:
                kept, zscore, mean, weights = _fit_ridge(
                    data[fold.train], values[fold.train], len(fit.kept), fit.alpha
                )
                predicted[fold.test] = zscore.apply(_keep(data[fold.test], kept)) @ weights + mean
        return Embeddings(predicted.reshape(targets.vectors.shape), responses.stimulus_ids, fit.space)

    def _choose(
        self,
        data: np.ndarray,
        values: np.ndarray,
        ids: np.ndarray,
        generator: np.random.Generator,
        backend: Any,
    ) -> tuple[int | None, float, list[dict[str, Any]]]:
        sizes = [n for n in self.config.n_features if n is None or n < data.shape[1]] or [None]
        if len(sizes) == 1 and len(self.config.alphas) == 1:
            return sizes[0], self.config.alphas[0], []
        folds = make_inner_folds(
            ids, n_folds=self.config.n_inner_folds, generator=generator, setting="encoder.n_inner_folds"
        )
        errors = compute_inner_errors(data, values, folds, sizes, self.config.alphas, backend=backend)
        best = np.unravel_index(int(np.argmin(errors)), errors.shape)
        choices = [
            {"n_features": size, "alpha": alpha, "mse": float(errors[i, j])}
            for i, size in enumerate(sizes)
            for j, alpha in enumerate(self.config.alphas)
        ]
        return sizes[best[0]], self.config.alphas[best[1]], choices

    def predict(self, responses: Responses) -> Embeddings:
        """Return one predicted embedding per trial, in the target space."""
        fit = self._require_fit()
        data = responses.as_matrix()
        if len(fit.kept) and data.shape[1] <= int(fit.kept[-1]):
            raise DataError(
                f"the encoder was fitted on more features than the {data.shape[1]} of these responses."
            )
        values = fit.zscore.apply(_keep(data, fit.kept)) @ fit.weights + fit.target_mean
        return Embeddings(values.reshape(len(values), *fit.target_shape), responses.stimulus_ids, fit.space)

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return the prediction as a torch module, and these trials as its input."""
        import torch

        from braindecode_vis.encoders.linear_prediction import LinearPrediction

        fit = self._require_fit()
        module = LinearPrediction(
            fit.kept, fit.zscore.mean, fit.zscore.std, fit.weights, fit.target_mean, shape=fit.target_shape
        )
        return module, {"responses": torch.from_numpy(responses.as_matrix().reshape(responses.data.shape))}

    def _require_fit(self) -> RidgeFit:
        if self.fitted is None:
            raise DataError("the ridge encoder has not been fitted; run train first.")
        return self.fitted

    def write(self, folder: Path) -> None:
        """Write the fitted state as safetensors and JSON."""
        from safetensors.numpy import save_file

        fit = self._require_fit()
        tensors = {
            "kept": fit.kept.astype(np.int64), "weights": fit.weights, "target_mean": fit.target_mean,
            "feature_mean": fit.zscore.mean, "feature_std": fit.zscore.std,
        }  # fmt: skip
        save_file(tensors, folder / "ridge.safetensors")
        write_json(
            folder / "ridge.json",
            {
                "space": fit.space, "target_shape": list(fit.target_shape), "alpha": fit.alpha,
                "n_kept": len(fit.kept), "choices": fit.choices,
            },
        )  # fmt: skip

    @classmethod
    def read(cls, config: RidgeConfig, folder: Path) -> RidgeEncoder:
        """Read what `write` wrote."""
        from safetensors.numpy import load_file

        tensors, meta = load_file(folder / "ridge.safetensors"), read_json(folder / "ridge.json")
        fit = RidgeFit(
            ZScore(tensors["feature_mean"], tensors["feature_std"]), tensors["kept"], tensors["weights"],
            tensors["target_mean"], tuple(meta["target_shape"]), meta["space"], meta["alpha"], meta["choices"],
        )  # fmt: skip
        return cls(config, fitted=fit)


def estimate_ridge_bytes(n_trials: int, n_features: int, n_targets: int) -> int:
    """Return about how much memory a fit holds at its peak, on the CPU, with the responses themselves.

    Parameters
    ----------
    n_trials, n_features, n_targets
        Shapes of responses and targets.

    Examples
    --------
    >>> estimate_ridge_bytes(16_540, 17 * 100, 1024) // 10**9  # THINGS-EEG2, averaged
    1
    """
    small = min(n_trials, n_features)
    # Responses, an inner fold's part of them and its z-scores in single precision, and these in double precision; with
    # more trials than features also the singular vectors, two times.
    values = (20 if n_trials <= n_features else 36) * n_trials * n_features
    # Gram matrix, eigenvectors and the solver's own space; targets, predictions and weights in double precision.
    return values + 32 * small**2 + 16 * n_targets * (n_trials + n_features)


def score_features(data: np.ndarray, values: np.ndarray, *, n_components: int = 10) -> np.ndarray:
    """Return how much target variance each feature explains on its own, shape (n_features,).

    The squared correlation of the feature with each leading principal component of the targets, weighted by
    the component's variance.

    Parameters
    ----------
    data : array of shape (n_trials, n_features)
    values : array of shape (n_trials, n_targets)
    n_components
        Number of leading components of the targets that count.
    """
    centred = values - values.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    left, variance = left[:, :n_components], singular[:n_components] ** 2  # (n_trials, n_components)
    scaled = fit_zscore(data).apply(data)
    norms = np.linalg.norm(scaled, axis=0)  # zero for a feature that never changes
    correlation = (scaled.T @ left) / np.where(norms > 0, norms, 1.0)[:, None]  # (n_features, n_components)
    return correlation**2 @ variance


def _select_features(data: np.ndarray, values: np.ndarray, n_kept: int | None) -> np.ndarray:
    if n_kept is None or n_kept >= data.shape[1]:
        return np.arange(data.shape[1])
    order = np.argsort(-score_features(data, values), kind="stable")
    return np.sort(order[:n_kept])


def compute_inner_errors(
    data: np.ndarray,
    values: np.ndarray,
    folds: Sequence[Fold],
    sizes: Sequence[int | None],
    alphas: Sequence[float],
    *,
    backend: Any,
) -> np.ndarray:
    """Return the mean squared error of every candidate over the inner folds, shape (n_sizes, n_alphas).

    Feature scores, z-scores and target means are refitted on the training part of each inner fold.
    """
    errors = np.zeros((len(sizes), len(alphas)))
    for fold in folds:
        order = None
        if any(size is not None for size in sizes):
            order = np.argsort(-score_features(data[fold.train], values[fold.train]), kind="stable")
        mean = values[fold.train].mean(axis=0)
        for row, size in enumerate(sizes):
            kept = slice(None) if size is None or order is None else order[:size]
            own = data[fold.train][:, kept]
            zscore = fit_zscore(own)
            train, held_out = zscore.apply(own), zscore.apply(data[fold.test][:, kept])
            truth = values[fold.test] - mean
            path = iterate_ridge_path(train, values[fold.train] - mean, held_out, alphas, backend=backend)
            for column, predicted in enumerate(path):
                # Folds weigh alike, whatever the number of their trials.
                errors[row, column] += float(((predicted - truth) ** 2).mean()) / len(folds)
    return errors


def iterate_ridge_path(
    train: np.ndarray, values: np.ndarray, held_out: np.ndarray, alphas: Sequence[float], *, backend: Any
) -> Iterator[np.ndarray]:
    """Yield the ridge prediction of `held_out` for each penalty, from one eigendecomposition.

    The smaller of the two Gram matrices is decomposed: trials by trials, or features by features.

    Parameters
    ----------
    train : array of shape (n_train, n_features)
    values : array of shape (n_train, n_targets)
    held_out : array of shape (n_held_out, n_features)
    alphas
        Penalties.
    backend
        A himalaya backend, which decides where the arrays live.
    """
    x, y, z = (backend.asarray(a, dtype="float64") for a in (train, values, held_out))
    if x.shape[0] <= x.shape[1]:  # fewer trials than features: the dual problem
        eigenvalues, q = backend.eigh(x @ x.T)
        left, right = (z @ x.T) @ q, q.T @ y  # (n_held_out, n_train), (n_train, n_targets)
    else:
        eigenvalues, q = backend.eigh(x.T @ x)
        left, right = z @ q, q.T @ (x.T @ y)  # (n_held_out, n_features), (n_features, n_targets)
    eigenvalues[eigenvalues < 0] = 0  # rounding; a Gram matrix has none
    for alpha in alphas:
        yield backend.to_numpy((left / (eigenvalues + alpha)[None]) @ right)  # (n_held_out, n_targets)


def _fit_ridge(
    data: np.ndarray, values: np.ndarray, n_kept: int | None, alpha: float
) -> tuple[np.ndarray, ZScore, np.ndarray, np.ndarray]:
    """Return the kept features, their statistics, the target mean and the weights."""
    kept = _select_features(data, values, n_kept)
    own = _keep(data, kept)
    zscore = fit_zscore(own)
    # Single precision drifts over many trials.
    mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
    return kept, zscore, mean, _solve_ridge(zscore.apply(own), values - mean, alpha)


def _keep(data: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the kept features; all of them without a copy."""
    return data if len(kept) == data.shape[1] else data[:, kept]


def _solve_ridge(x: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
    """Return himalaya's weights of shape (n_features, n_targets) for centred `x` and `y`."""
    from himalaya.backend import get_backend
    from himalaya.kernel_ridge import solve_kernel_ridge_eigenvalues
    from himalaya.ridge import solve_ridge_svd

    backend = get_backend()
    xb, yb = backend.asarray(x, dtype="float64"), backend.asarray(y, dtype="float64")
    if x.shape[0] <= x.shape[1]:
        dual = solve_kernel_ridge_eigenvalues(xb @ xb.T, yb, alpha=float(alpha))
        weights = backend.to_numpy(xb).T @ backend.to_numpy(dual)  # primal weights from those of the trials
    else:
        weights = backend.to_numpy(solve_ridge_svd(xb, yb, alpha=float(alpha), warn=False))
    return np.ascontiguousarray(weights, dtype=np.float32)


@contextmanager
def _use_backend(device: Device, n_values: int) -> Iterator[Any]:
    """Switch himalaya to the device and back, since its backend is global to the process.

    A response matrix of few values is solved on the CPU by one thread: its products take less time than waking
    a second thread or a GPU does.
    """
    from himalaya.backend import get_backend, set_backend
    from threadpoolctl import threadpool_limits

    small = n_values < SMALL_PROBLEM
    # Asked only where it matters: a small problem on the CPU never waits for torch to be imported.
    asks = device == "cuda" or (device == "auto" and not small)
    on_gpu = asks and choose_device(device, setting="encoder.device") == "cuda"
    name = "torch_cuda" if on_gpu else "numpy"
    before = get_backend()  # the caller may use himalaya too
    try:
        with threadpool_limits(limits=1 if small else None):
            yield set_backend(name, on_error="raise")
    finally:
        set_backend(before)
