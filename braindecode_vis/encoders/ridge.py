"""Ridge regression from responses to any target space, with nested choice of penalty and features.

Owns the linear brain encoder: z-scored features, centred targets, one penalty for all targets. The penalty and,
if several are offered, the number of features are chosen together by cross-validation inside the training
trials; means and feature scores are recomputed inside every inner fold, while the scale of a feature is that of all
training trials, as in the final fit. Knows nothing of images or test trials. Where subjects are aligned by what they
were shown (`subject_alignment`), the alignment is learnt anew in every inner fold.

All of it comes from one Gram matrix, trials by trials or features by features, whichever is smaller: that of an inner
fold is a part of it or what a subtraction leaves, one eigendecomposition of it serves all penalties and all targets
(or, for few penalties, one factor a penalty serves all folds), and the final weights are a Cholesky solution. Trials
and targets stay in single precision and are summed in double.
Where there is nothing to choose and the penalty is large (`solve_ridge`), sums are in single precision too, as in
scikit-learn.

himalaya chooses the same penalty and finds the same weights (a test compares them), but it does not choose features and
does not go on after a kill, and takes longer.

References
----------
Hoerl and Kennard (1970), Ridge regression, doi:10.1080/00401706.1970.10488634.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Responses, check_target_rows, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import (
    NOTHING_LENT,
    BrainEncoder,
    Context,
    EncoderSettings,
    FewTrialAdaptation,
)
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.settings import Device, DeviceSettings
from braindecode_vis.base.store import load_tensors, read_json, replace_atomically, write_json, write_tensors
from braindecode_vis.preprocessing.alignment import (
    InputScalingConfig,
    InputTransform,
    ZScore,
    check_common_features,
    fit_zscore,
)
from braindecode_vis.preprocessing.common_space import SubjectAlignment
from braindecode_vis.preprocessing.splits import Fold, InnerFoldSettings, make_inner_folds

SMALL_PROBLEM = (
    5_000_000  # values of the response matrix; below, one CPU thread is done before a GPU has woken
)
#: Penalties of the change of weights in `RidgeEncoder.adapt`, in units of the mean power of a trial.
ADAPTED_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
#: Largest ratio of the largest eigenvalue to the penalty at which a fit in single precision is kept.
SINGLE_CONDITION = 250.0
_EIGH = 9  # n cubed multiplications of a product take as long as the eigendecomposition of n rows
_INVERTED = 12  # matrices that are inverted in the time of the eigendecomposition of one
#: The same of an inverse in double precision, which holds six digits then.
DOUBLE_CONDITION = 1e9
#: What computes the errors of penalties on an inner fold: `_compute_path_errors` and others.
FoldErrors = Callable[["Gram", Fold, Sequence[float]], np.ndarray]
_BLOCK_BYTES = 128 * 1024**2  # of a matrix in double precision that is held for one product


class RidgeConfig(EncoderSettings, DeviceSettings, InnerFoldSettings):
    """Ridge regression from responses to the target; the penalty is chosen in inner folds.

    Parameters
    ----------
    alphas
        Penalties, in units of the z-scored features' Gram matrix.
    n_features
        Candidates for the number of features to keep, the best by `score_features`; None keeps all. One entry is a
        fixed choice.
    subject_alignment
        As in `NetworkEncoderConfig`.
    device
        Device of the linear algebra; ``auto`` takes a GPU, if there is one, for large problems. It changes the result
        only by rounding, so it is not part of the fingerprint.
    """

    kind: Literal["ridge"] = "ridge"
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=tuple(float(10**e) for e in np.linspace(1, 6, 11)), min_length=1
    )
    n_features: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(default=(None,), min_length=1)
    subject_alignment: SubjectAlignment = "none"

    not_hashed: ClassVar[frozenset[str]] = frozenset({"device"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"subject_alignment"})
    may_know_likelihood: ClassVar[bool] = False

    def build(self, *, seed: int) -> RidgeEncoder:
        """Return the unfitted encoder."""
        return RidgeEncoder(self, seed=seed)


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
    transform
        Alignment of the subjects; None without one.
    voxels_of
        The subject whose own voxels these are, where others have others; empty elsewhere.
    """

    zscore: ZScore
    kept: np.ndarray
    weights: np.ndarray
    target_mean: np.ndarray
    target_shape: tuple[int, ...]
    space: str
    alpha: float
    choices: list[dict[str, Any]]
    transform: InputTransform | None = None
    voxels_of: str = ""

    def check_brain(self, responses: Responses) -> None:
        """Raise `DataError` for voxels of another brain than that of the fit, which only look alike."""
        others = set(responses.trials["subject"].astype(str)) - {self.voxels_of}
        if self.voxels_of and others and count_own_voxels(responses):
            names = ", ".join(sorted(others))
            raise DataError(
                f"this ridge was fitted on voxels of subject {self.voxels_of}, but {names} have "
                "different voxels: average over the regions of an atlas (dataset.atlas), or align subjects "
                "(encoder.subject_alignment=hyperalignment, with split.own_trials for a subject who is left out)."
            )


class RidgeEncoder(BrainEncoder):
    """The linear brain encoder; see the module for what is chosen and how."""

    def __init__(self, config: RidgeConfig, *, seed: int = 0, fitted: RidgeFit | None = None) -> None:
        self.config = config
        self.seed = seed
        self.fitted = fitted
        self.context = NOTHING_LENT
        #: Subjects whose alignment came from the trials that were predicted: a transductive result.
        self.label_free_subjects: tuple[str, ...] = ()

    def bind(self, context: Context) -> None:
        """Take the listener for the progress of the fit, and the folder that keeps the inner folds of a killed one."""
        self.context = context

    def fit(self, responses: Responses, targets: Embeddings) -> RidgeEncoder:
        """Choose penalty and features on the training trials, then fit on all of them.

        Parameters
        ----------
        responses
            Training trials.
        targets
            One row per trial, in the order of `responses`.
        """
        if not self._uses_images():
            check_common_features(responses, what="ridge")
        check_target_rows(responses, targets, what="ridge")
        n_features = int(np.prod(responses.data.shape[1:]))
        n_targets = int(np.prod(targets.vectors.shape[1:]))
        check_memory(
            estimate_ridge_bytes(responses.n_trials, n_features, n_targets),
            what=f"ridge on {responses.n_trials} trials of {n_features} features and {n_targets} targets",
            reduce="the subjects (--subject), choose features (selection.*), or set repeats.train=averaged",
        )
        transform = self._align(responses)
        aligned = responses if transform is None else transform.apply(responses)
        data, values = aligned.as_matrix(), targets.flat()
        sizes = self._list_sizes(data.shape[1])
        with use_backend(self.config.device, data.size) as backend:
            zscore = fit_zscore(data)
            scaled = zscore.apply(data)
            # Single precision drifts over many trials.
            mean = values.mean(axis=0, dtype=np.float64).astype(np.float32)
            centred = values - mean
            n_kept, alpha, whole = sizes[0], self.config.alphas[0], None
            choices: list[dict[str, Any]] = []
            if len(sizes) * len(self.config.alphas) > 1:
                whole = make_gram(scaled, centred, backend)
                n_kept, alpha, choices = self._choose(whole, responses, sizes)
            kept = _select_features(scaled, values, n_kept)
            is_all = len(kept) == data.shape[1]
            if whole is None:
                self._tell(0, "weights", 0)
                weights = solve_ridge(scaled if is_all else scaled[:, kept], centred, alpha, backend)
            else:
                weights = (whole if is_all else whole.keep(kept)).solve(alpha)
        self.fitted = RidgeFit(
            ZScore(zscore.mean[kept], zscore.std[kept]), kept, weights, mean, targets.vectors.shape[1:],
            targets.space, alpha, choices, transform,
            str(responses.trials["subject"].iloc[0]) if count_own_voxels(responses) and not self._uses_images() else "",
        )  # fmt: skip
        return self

    def _uses_images(self) -> bool:
        return InputTransform(InputScalingConfig(kind="none"), self.config.subject_alignment, ()).uses_images

    def _align(self, responses: Responses, rows: np.ndarray | None = None) -> InputTransform | None:
        """Return the alignment that these training trials, or some of them, give; None without one."""
        if self.config.subject_alignment == "none":
            return None
        transform = InputTransform(
            InputScalingConfig(kind="none"), self.config.subject_alignment, responses.dims[1:]
        )
        names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
        return transform.fit(
            responses.data, np.arange(responses.n_trials) if rows is None else rows, names,
            stimuli=responses.stimulus_ids, n_own=count_own_voxels(responses),
        )  # fmt: skip

    def _make_fold_gram(self, whole: Gram, responses: Responses, fold: Fold) -> Gram:
        """Return the trials for an inner fold: anew where the alignment would otherwise know what is left out."""
        if not self._uses_images():
            return whole
        transform = self._align(responses, fold.train)
        assert transform is not None
        data = transform.apply(responses).as_matrix()
        return make_gram(fit_zscore(data[fold.train]).apply(data), whole.values, whole.backend)

    def predict_out_of_fold(self, responses: Responses, targets: Embeddings) -> Embeddings:
        """Predict every training trial by a fit that has not seen its stimulus.

        What follows in the pipeline (a prior, a contrast) must learn from predictions as uncertain as those of
        the test trials; the fitted encoder's own predictions of its training trials are not. Penalty and number
        of features are those already chosen, and the scale of a feature is that of all training trials.
        """
        fit = self._require_fit()
        aligned = responses if fit.transform is None else fit.transform.apply(responses)
        data, values = aligned.as_matrix(), targets.flat()
        folds = make_inner_folds(
            responses.stimulus_ids,
            n_folds=self.config.n_inner_folds,
            generator=make_generator(self.seed, "ridge", "out_of_fold"),
            setting="encoder.n_inner_folds",
        )
        predicted = np.empty_like(values)
        with use_backend(self.config.device, data.size) as backend:
            scaled = fit_zscore(data).apply(data)
            whole = make_gram(scaled, values, backend)
            for number, fold in enumerate(folds):
                self._tell(number, f"out of fold, {number + 1} of {len(folds)}", len(folds))
                gram = self._make_fold_gram(whole, responses, fold)
                if len(fit.kept) < data.shape[1]:
                    chosen = _select_features(gram.data[fold.train], values[fold.train], len(fit.kept))
                    gram = gram.keep(chosen)
                predicted[fold.test] = gram.predict_fold(fold, fit.alpha)
        return Embeddings(predicted.reshape(targets.vectors.shape), responses.stimulus_ids, fit.space)

    def _list_sizes(self, n_features: int) -> list[int | None]:
        """Return the numbers of features to choose from, None for all."""
        return [n for n in self.config.n_features if n is None or n < n_features] or [None]

    def _choose(
        self, whole: Gram, responses: Responses, sizes: list[int | None]
    ) -> tuple[int | None, float, list[dict[str, Any]]]:
        folds = make_inner_folds(
            responses.stimulus_ids,
            n_folds=self.config.n_inner_folds,
            generator=make_generator(self.seed, "ridge", "inner_folds"),
            setting="encoder.n_inner_folds",
            always=responses.is_synthetic,
        )
        alphas = self.config.alphas
        # Folds weigh alike, whatever the number of their trials.
        if sizes == [None] and not self._uses_images() and is_inverted(whole, folds, alphas):
            centre = cache(whole.centre)  # of all penalties

            def invert(number: int) -> np.ndarray:
                return compute_inverse_errors(whole, folds, alphas[number], centre())

            errors = self._look_at("penalty", invert, len(alphas), (len(folds),)).mean(axis=1)[None]
        else:

            def compute(number: int) -> np.ndarray:
                gram = self._make_fold_gram(whole, responses, folds[number])
                return compute_fold_errors(gram, folds[number], sizes, alphas)

            shape = len(sizes), len(alphas)
            errors = self._look_at("inner_fold", compute, len(folds), shape).mean(axis=0)
        best = np.unravel_index(int(np.argmin(errors)), errors.shape)
        choices = [
            {"n_features": size, "alpha": alpha, "mse": float(errors[i, j])}
            for i, size in enumerate(sizes)
            for j, alpha in enumerate(alphas)
        ]
        return sizes[best[0]], alphas[best[1]], choices

    def _look_at(
        self, what: str, compute: Callable[[int], np.ndarray], n: int, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return the errors of each inner fold or penalty; a fit that was killed finds those that it had."""
        found = []
        for number in range(n):
            self._tell(number, f"{what.replace('_', ' ')} {number + 1} of {n}", n)
            found.append(self._keep(f"{what}{number}.npy", partial(compute, number), shape))
        self._tell(n, "weights", n)
        return np.stack(found)

    def _keep(self, name: str, compute: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        folder = self.context.checkpoints
        if folder is None:
            return compute()
        path = folder / name
        with suppress(OSError, ValueError, EOFError):  # none yet, or cut short
            if (found := np.load(path)).shape == shape:
                return np.asarray(found)
        errors = compute()
        folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as temporary:
            np.save(temporary, errors)
        return errors

    def _tell(self, done: int, text: str, n: int) -> None:
        if self.context.progress is not None:
            self.context.progress(done, n + 1, text)

    def predict(self, responses: Responses) -> Embeddings:
        """Return one predicted embedding per trial, in the target space."""
        fit = self._require_fit()
        if fit.transform is not None:
            names = responses.trials["subject"].astype(str).to_numpy(dtype=object)
            transform = fit.transform.with_subjects_of(responses.data, names)
            self.label_free_subjects = transform.label_free_subjects
            responses = transform.apply(responses)
        fit.check_brain(responses)
        data = responses.as_matrix()
        if len(fit.kept) and data.shape[1] <= int(fit.kept[-1]):
            raise DataError(
                f"the encoder was fitted on more features than these responses have ({data.shape[1]})."
            )
        kept = data if len(fit.kept) == data.shape[1] else data[:, fit.kept]  # all of them without a copy
        values = fit.zscore.apply(kept) @ fit.weights + fit.target_mean
        return Embeddings(values.reshape(len(values), *fit.target_shape), responses.stimulus_ids, fit.space)

    def map_labels(
        self, training: Responses, test: Responses, images: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Return the predictions of each penalty as weights of the targets of images, and its inner error.

        That is a ridge of indicators: column j of the target is one for the trials of image j. None if features are
        chosen or subjects aligned by what was shown, which a relabelling changes.
        """
        n_features = int(np.prod(training.data.shape[1:]))
        if self._list_sizes(n_features) != [None] or self.config.subject_alignment != "none":
            return None
        shown = (training.stimulus_ids.astype(str)[:, None] == np.asarray(images).astype(str)).astype(
            np.float32
        )
        data, alphas = training.as_matrix(), self.config.alphas
        with use_backend(self.config.device, data.size) as backend:
            zscore = fit_zscore(data)
            scaled, new = zscore.apply(data), backend.take(zscore.apply(test.as_matrix()))
            mean = shown.mean(axis=0, dtype=np.float64)
            whole = make_gram(scaled, (shown - mean).astype(np.float32), backend)
            if whole.products is None:
                new, right = new @ backend.take(scaled).T, backend.take(whole.values)
            else:
                right = whole.products
            weights = [
                backend.give(new @ whole._solve(whole.matrix, right, alpha)) + mean for alpha in alphas
            ]
            if len(alphas) == 1:
                return np.stack(weights), None
            folds = make_inner_folds(
                training.stimulus_ids,
                n_folds=self.config.n_inner_folds,
                generator=make_generator(self.seed, "ridge", "inner_folds"),
                setting="encoder.n_inner_folds",
            )
            errors = np.zeros((len(alphas), len(images), len(images)))
            for fold in folds:
                matrix, right, left, centre = whole.split(fold)
                eigenvalues, vectors = backend.xp.linalg.eigh(matrix)
                left, right = left @ vectors, vectors.T @ right
                truth = backend.take(whole.values[fold.test]) - backend.take(centre)
                for number, alpha in enumerate(alphas):
                    rest = backend.give((left * _invert(eigenvalues, alpha)) @ right - truth)
                    errors[number] += rest.T @ rest / (len(rest) * len(folds))
        return np.stack(weights), errors

    def adapt(
        self, responses: Responses, targets: Embeddings, *, penalties: Sequence[float] = ADAPTED_PENALTIES
    ) -> RidgeEncoder:
        """Return a ridge whose weights moved towards new trials, held back by a penalty on the change.

        The penalty is chosen by the error of pictures that are left out, among `penalties` times the mean power of a
        trial; what trials and targets have in common is shifted along, as the mean of a new person differs most.

        Parameters
        ----------
        responses, targets
            Of the new person, row by row. Where subjects are aligned, they give the alignment of a new one too.
        penalties
            To choose from.
        """
        fit = self.align_subjects(responses)._require_fit()
        fit.check_brain(responses)
        data = (responses if fit.transform is None else fit.transform.apply(responses)).as_matrix()
        scaled = fit.zscore.apply(data if len(fit.kept) == data.shape[1] else data[:, fit.kept]).astype(
            np.float64
        )
        rest = targets.flat() - (scaled @ fit.weights + fit.target_mean)
        names = responses.stimulus_ids.astype(str)
        power = float(np.square(scaled).sum()) / len(scaled)

        def solve(rows: np.ndarray, some: Sequence[float]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
            """Return dual coefficients for each penalty, and the means of trials and of what is left to explain."""
            mean, left = scaled[rows].mean(axis=0), rest[rows].mean(axis=0)
            centred = scaled[rows] - mean
            gram, wanted = centred @ centred.T, rest[rows] - left
            unit = power * np.eye(len(rows))
            return [np.linalg.solve(gram + penalty * unit, wanted) for penalty in some], mean, left

        errors = np.zeros(len(penalties))
        for name in np.unique(names):
            held, rows = np.flatnonzero(names == name), np.flatnonzero(names != name)
            if not len(rows):  # a single picture shifts the mean and changes no weight
                break
            duals, mean, left = solve(rows, penalties)
            across = (scaled[held] - mean) @ (scaled[rows] - mean).T  # (n_held, n_rows)
            errors += [float(np.square(rest[held] - (across @ dual + left)).sum()) for dual in duals]
        (dual,), mean, left = solve(np.arange(len(names)), [penalties[int(np.argmin(errors))]])
        change = (scaled - mean).T @ dual  # (n_kept, n_targets)
        weights = (fit.weights + change).astype(np.float32)
        shift = (fit.target_mean + left - mean @ change).astype(np.float32)
        return RidgeEncoder(
            self.config, seed=self.seed, fitted=replace(fit, weights=weights, target_mean=shift)
        )

    @property
    def adaptation(self) -> FewTrialAdaptation:
        """See `adapt`; one fit takes well under a second."""
        return FewTrialAdaptation(self.adapt, is_quick=True)

    def align_subjects(self, responses: Responses) -> RidgeEncoder:
        """Return a ridge of the same weights that also knows the alignment of new subjects, by training trials.

        Parameters
        ----------
        responses
            Training trials; those of known subjects are not looked at.

        Raises
        ------
        DataError
            If a new subject has seen none of the images that the common space was made of.
        """
        fit = self._require_fit()
        if fit.transform is None:
            return self
        grown = fit.transform.extend(responses)
        return RidgeEncoder(self.config, seed=self.seed, fitted=replace(fit, transform=grown))

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return the prediction as a torch module, and these trials as its input."""
        import torch

        from braindecode_vis.encoders.linear_prediction import LinearPrediction

        fit = self._require_fit()
        if fit.transform is not None:
            raise ConfigError(
                "a ridge with encoder.subject_alignment needs the subject of each trial, which an "
                "exported program does not get; choose safetensors, or set encoder.subject_alignment to none."
            )
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
        fit = self._require_fit()
        tensors = {
            "kept": fit.kept.astype(np.int64), "weights": fit.weights, "target_mean": fit.target_mean,
            "feature_mean": fit.zscore.mean, "feature_std": fit.zscore.std,
        }  # fmt: skip
        if fit.transform is not None:
            named = {f"transform.{name}": array for name, array in fit.transform.as_tensors().items()}
            tensors |= {name: np.ascontiguousarray(array) for name, array in named.items()}
        write_tensors(folder / "ridge.safetensors", tensors)
        write_json(
            folder / "ridge.json",
            {
                "space": fit.space, "target_shape": list(fit.target_shape), "alpha": fit.alpha,
                "n_kept": len(fit.kept), "choices": fit.choices, "seed": self.seed,
                **({} if fit.transform is None else {"dims": list(fit.transform.dims)}),
                **({"voxels_of": fit.voxels_of} if fit.voxels_of else {}),
            },
        )  # fmt: skip

    def read(self, folder: Path) -> RidgeEncoder:
        """Read what `write` wrote."""
        tensors, meta = load_tensors(folder / "ridge.safetensors"), read_json(folder / "ridge.json")
        self.fitted = RidgeFit(
            ZScore(tensors["feature_mean"], tensors["feature_std"]), tensors["kept"], tensors["weights"],
            tensors["target_mean"], tuple(meta["target_shape"]), meta["space"], meta["alpha"], meta["choices"],
            _read_transform(self.config, tensors, meta), meta.get("voxels_of", ""),
        )  # fmt: skip
        self.seed = meta.get("seed", 0)  # earlier versions did not keep it
        return self


def _read_transform(
    config: RidgeConfig, tensors: dict[str, np.ndarray], meta: dict[str, Any]
) -> InputTransform | None:
    if config.subject_alignment == "none":
        return None
    start = "transform."
    named = {key.removeprefix(start): array for key, array in tensors.items() if key.startswith(start)}
    return InputTransform.from_tensors(
        named, scaling=InputScalingConfig(kind="none"), alignment=config.subject_alignment,
        dims=tuple(meta["dims"]),
    )  # fmt: skip


def estimate_ridge_bytes(n_trials: int, n_features: int, n_targets: int) -> int:
    """Return about how much memory a fit holds at its peak, on the CPU, with the responses themselves.

    Parameters
    ----------
    n_trials, n_features, n_targets
        Shapes of responses and targets.

    Examples
    --------
    >>> estimate_ridge_bytes(16_540, 17 * 100, 1024) // 10**6  # THINGS-EEG2, averaged
    847
    """
    small = min(n_trials, n_features)
    # Responses and their z-scores in single precision; the Gram matrix, that of a fold, its eigenvectors and the
    # solver's own space in double precision; targets, centred and not, weights, and what two products hold.
    blocks = 2 * min(_BLOCK_BYTES, 8 * n_trials * max(n_features, n_targets))
    return (
        8 * n_trials * n_features
        + 40 * small**2
        + n_targets * (12 * n_trials + 4 * n_features + 16 * (n_features if n_features < n_trials else 0))
        + blocks
    )


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
    from scipy.linalg import eigh

    centred = (values - values.mean(axis=0, dtype=np.float64)).astype(np.float64)
    tall = len(centred) > centred.shape[1]
    gram = centred.T @ centred if tall else centred @ centred.T
    last = len(gram) - 1
    variance, vectors = eigh(
        gram, subset_by_index=(max(0, last + 1 - n_components), last), check_finite=False
    )
    # Scores of the components, times the square root of their variance: (n_trials, n_components)
    scores = centred @ vectors if tall else vectors * np.sqrt(np.maximum(variance, 0))
    scaled = fit_zscore(data).apply(data)
    norms = np.linalg.norm(scaled, axis=0)  # zero for a feature that never changes
    explained = (scaled.T @ scores) / np.where(norms > 0, norms, 1.0)[:, None]  # (n_features, n_components)
    return np.asarray((explained**2).sum(axis=1))


def _select_features(data: np.ndarray, values: np.ndarray, n_kept: int | None) -> np.ndarray:
    if n_kept is None or n_kept >= data.shape[1]:
        return np.arange(data.shape[1])
    return np.sort(_order_features(data, values)[:n_kept])


def _order_features(data: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the features, the best first."""
    return np.argsort(-score_features(data, values), kind="stable")


@dataclass(frozen=True)
class Backend:
    """Where the linear algebra runs: numpy, or torch on a GPU, whose functions have the same names."""

    xp: Any
    device: str = "cpu"
    precision: Literal["float64", "float32"] = "float64"

    def take(self, array: Any) -> Any:
        """Return an array, of numpy or of this backend, in the precision of the sums, where this computes."""
        if self.device == "cpu":
            return np.asarray(array, dtype=self.precision)
        return self.xp.as_tensor(array, device=self.device).to(getattr(self.xp, self.precision))

    def give(self, array: Any) -> np.ndarray:
        """Return an array of this backend as one of numpy."""
        return array if isinstance(array, np.ndarray) else array.cpu().numpy()

    def solve(self, matrix: Any, right: Any) -> Any:
        """Solve a positive definite system, which is overwritten."""
        if self.device != "cpu":
            return self.xp.cholesky_solve(right, self.xp.linalg.cholesky(matrix))
        from scipy.linalg import cho_factor, cho_solve

        # Transposed, as LAPACK has it: a symmetric matrix is then not copied.
        factor = cho_factor(matrix.T, lower=True, overwrite_a=True, check_finite=False)
        return cho_solve(factor, right, check_finite=False)


@dataclass(frozen=True)
class Gram:
    """Scaled training trials with the smaller of their two Gram matrices.

    Parameters
    ----------
    data : float32 array of shape (n_trials, n_features)
        Z-scored.
    values : float32 array of shape (n_trials, n_targets)
    matrix : array of shape (n, n), in the precision of the backend
        Features by features if there are fewer of them than trials, or else trials by trials.
    products : array of shape (n_features, n_targets), in the precision of the backend, or None
        Of features and targets, where the matrix is of features.
    backend
        Where matrix and products lie.
    """

    data: np.ndarray
    values: np.ndarray
    matrix: Any
    products: Any
    backend: Backend

    def keep(self, kept: np.ndarray) -> Gram:
        """Return that of some features, in the order of `kept`."""
        if self.products is None:
            return make_gram(self.data[:, kept], self.values, self.backend)
        matrix = self.matrix[kept][:, kept]
        return Gram(self.data[:, kept], self.values, matrix, self.products[kept], self.backend)

    def split(self, fold: Fold) -> tuple[Any, Any, Any, np.ndarray]:
        """Return the problem of an inner fold, centred by the means of its training part.

        Returns
        -------
        matrix : (n, n)
            Gram matrix of the training part.
        right : (n, n_targets)
            What the inverse of the penalised matrix is multiplied with.
        left : (n_held_out, n)
            What the product is multiplied with, to predict.
        mean : (n_targets,)
            Mean of the training targets, which the prediction leaves out.
        """
        take, train, test = self.backend.take, fold.train, fold.test
        held = take(self.values[test])
        mean = (self.target_sums - held.sum(0)) / len(train)
        if self.products is None:
            matrix, left = self.matrix[train][:, train], self.matrix[test][:, train]
            by_trial, centre = matrix.mean(0), matrix.mean()
            left = left - left.mean(1)[:, None] - by_trial + centre
            matrix -= by_trial + by_trial[:, None] - centre
            return matrix, take(self.values[train]) - mean, left, self.backend.give(mean)
        left = take(self.data[test])
        centre = (self.feature_sums - left.sum(0)) / len(train)
        matrix = self.matrix - left.T @ left - len(train) * centre[:, None] * centre
        right = self.products - left.T @ held - len(train) * centre[:, None] * mean
        return matrix, right, left - centre, self.backend.give(mean)

    @cached_property
    def feature_sums(self) -> Any:
        """Sum of each feature over all trials, from which every fold takes its own."""
        return self.backend.take(self.data.sum(axis=0, dtype=np.float64))

    @cached_property
    def target_sums(self) -> Any:
        """Sum of each target over all trials."""
        return self.backend.take(self.values.sum(axis=0, dtype=np.float64))

    def centre(self) -> tuple[Any, Any]:
        """Return the matrix, and what its inverse is multiplied with, both centred over all trials."""
        n_trials = len(self.data)
        if self.products is None:
            by_trial = self.matrix.mean(0)
            centred = self.matrix - by_trial
            centred -= by_trial[:, None] - by_trial.mean()
            return centred, self.backend.take(self.values) - self.target_sums / n_trials
        mean = self.feature_sums / n_trials
        centred = mean[:, None] * (-n_trials * mean)
        centred += self.matrix
        return centred, self.products - mean[:, None] * self.target_sums

    @cached_property
    def spectrum(self) -> tuple[Any, Any, Any]:
        """Eigenvalues and eigenvectors of the matrix, and the targets along these, both centred over all trials."""
        centred, right = self.centre()
        eigenvalues, vectors = self.backend.xp.linalg.eigh(centred)
        return eigenvalues, vectors, vectors.T @ right

    def predict_fold(self, fold: Fold, alpha: float) -> np.ndarray:
        """Return what the training part of a fold predicts of the rest, shape (n_held_out, n_targets)."""
        matrix, right, left, mean = self.split(fold)
        return self.backend.give(left @ self._solve(matrix, right, alpha)) + mean

    def solve(self, alpha: float) -> np.ndarray:
        """Return the weights of shape (n_features, n_targets), for targets that are centred."""
        if self.products is not None:
            weights = self.backend.give(self._solve(self.matrix, self.products, alpha))
            return np.ascontiguousarray(weights, dtype=np.float32)
        dual = self._solve(self.matrix, self.backend.take(self.values), alpha)  # (n_trials, n_targets)
        weights = np.empty((self.data.shape[1], self.values.shape[1]), dtype=np.float32)
        for part in _iterate_blocks(self.data.shape[1], max(self.data.shape[0], weights.shape[1])):
            weights[part] = self.backend.give(self.backend.take(self.data[:, part]).T @ dual)
        return weights

    def bound_condition(self, alpha: float) -> float:
        """Return about the largest eigenvalue as a share of the penalty, by five steps of power iteration."""
        norm = self.backend.xp.linalg.norm
        vector = self.matrix[int(self.matrix.diagonal().argmax())]
        for _ in range(5):
            vector = self.matrix @ (vector / (norm(vector) + 1e-30))  # all is 0 where no feature ever changes
        return float(norm(vector)) / alpha

    def _solve(self, matrix: Any, right: Any, alpha: float) -> Any:
        penalised, diagonal = matrix + 0.0, np.arange(len(matrix))
        penalised[diagonal, diagonal] += alpha
        try:
            return self.backend.solve(penalised, right)
        except (np.linalg.LinAlgError, RuntimeError):  # a penalty below what rounding leaves of the smallest
            eigenvalues, vectors = self.backend.xp.linalg.eigh(matrix)
            return vectors @ (_invert(eigenvalues, alpha)[:, None] * (vectors.T @ right))


def make_gram(data: np.ndarray, values: np.ndarray, backend: Backend) -> Gram:
    """Compute the smaller Gram matrix of scaled trials.

    Parameters
    ----------
    data : float32 array of shape (n_trials, n_features)
    values : float32 array of shape (n_trials, n_targets)
    backend
        Where to compute.
    """
    (n_trials, n_features), take = data.shape, backend.take
    matrix = products = None
    if n_trials <= n_features:
        for part in _iterate_blocks(n_features, n_trials):
            columns = take(data[:, part])
            matrix = _add(matrix, columns @ columns.T)
        return Gram(data, values, matrix, None, backend)
    for part in _iterate_blocks(n_trials, max(n_features, values.shape[1])):
        rows = take(data[part])
        matrix = _add(matrix, rows.T @ rows)
        products = _add(products, rows.T @ take(values[part]))
    return Gram(data, values, matrix, products, backend)


def solve_ridge(data: np.ndarray, values: np.ndarray, alpha: float, backend: Backend) -> np.ndarray:
    """Return the weights for one penalty, shape (n_features, n_targets), in single precision where that is enough.

    Rounding changes the weights by about 1.2e-7 times the condition of the penalised matrix, which is at most 1 plus
    the largest eigenvalue over the penalty. Up to `SINGLE_CONDITION` the weights of designs of all spectra stayed
    within 1e-4 of those of double precision (norm of the difference) and predictions within 1e-5 of the largest.
    Smaller penalties are solved in double precision. A step of refinement would not pay: it takes two products with
    all targets, as much as double precision takes.

    Parameters
    ----------
    data : float32 array of shape (n_trials, n_features)
        Z-scored.
    values : float32 array of shape (n_trials, n_targets)
        Centred.
    alpha
        Penalty.
    backend
        Where to compute.
    """
    gram = make_gram(data, values, replace(backend, precision="float32"))
    if gram.bound_condition(alpha) > SINGLE_CONDITION:
        gram = make_gram(data, values, backend)
    return gram.solve(alpha)


def _add(total: Any, matrix: Any) -> Any:
    """Return the sum, in place; the first matrix is the sum itself, without another one of zeros."""
    if total is None:
        return matrix
    total += matrix
    return total


def _iterate_blocks(n: int, width: int) -> Iterator[slice]:
    """Yield slices of `n` rows that are `width` wide, so that a block is small in double precision."""
    step = max(1, _BLOCK_BYTES // (8 * max(1, width)))
    for start in range(0, n, step):
        yield slice(start, start + step)


def compute_fold_errors(
    whole: Gram, fold: Fold, sizes: Sequence[int | None], alphas: Sequence[float]
) -> np.ndarray:
    """Return the mean squared error of every candidate on one inner fold, shape (n_sizes, n_alphas).

    Means and feature scores are those of the training part of the fold.

    Parameters
    ----------
    whole
        All training trials.
    fold
        Rows to fit on and to predict.
    sizes
        Numbers of features; None for all.
    alphas
        Penalties.
    """
    errors, order = np.empty((len(sizes), len(alphas))), None
    for row, size in enumerate(sizes):
        gram = whole
        if size is not None:
            if order is None:
                order = _order_features(whole.data[fold.train], whole.values[fold.train])
            gram = whole.keep(order[:size])
        costs = _count_multiplications(gram, fold, len(alphas))
        if gram is not whole:  # the eigendecomposition of all trials would serve one fold
            del costs[_compute_residual_errors]
        errors[row] = min(costs, key=lambda compute: costs[compute])(gram, fold, alphas)
    return errors


def _count_multiplications(gram: Gram, fold: Fold, n_alphas: int) -> dict[FoldErrors, float]:
    """Return about how many multiplications of a product each way takes for an inner fold, beyond what folds share."""
    n_held, n_targets = len(fold.test), gram.values.shape[1]
    n_all = len(gram.matrix)
    n = n_all if gram.products is not None else len(fold.train)
    predict = n * n_held * n_targets
    paths = min(n_alphas * predict, predict + n**2 * (n_held + n_targets) / 2)
    return {
        _compute_residual_errors: n_alphas * float(n_held) * (n_all + n_held) * (n_held + 2 * n_targets),
        _compute_path_errors: _EIGH * float(n) ** 3 + n**2 * (n_held + n_targets) + paths,
        _compute_solved_errors: n_alphas * (n**3 / 6 + n**2 * n_targets + predict),
    }


def _compute_residual_errors(gram: Gram, fold: Fold, alphas: Sequence[float]) -> np.ndarray:
    """Return the error of each penalty on one inner fold, from the eigendecomposition of all trials.

    What a ridge that never saw the held-out trials leaves of them is P^-1 S y there: S is the inverse of the penalised
    matrix of trials, P its held-out block without what belongs to the mean. With Z the held-out trials along the
    eigenvectors of the matrix of features, and d as below, alpha S is 1 - Z diag(d) Z'. This takes one
    eigendecomposition for all folds.
    """
    eigenvalues, vectors, along = gram.spectrum
    backend, n_trials, rest = gram.backend, len(gram.data), None
    if gram.products is None:
        held = vectors[fold.test]  # (n_held_out, n_trials)
    else:
        held = (backend.take(gram.data[fold.test]) - gram.feature_sums / n_trials) @ vectors
        rest = backend.take(gram.values[fold.test]) - gram.target_sums / n_trials
    errors = []
    for alpha in alphas:
        root = _invert(eigenvalues, alpha) ** 0.5
        scaled = held * root
        block, right = scaled @ scaled.T, (scaled * root) @ along
        if rest is None:
            residual = gram._solve(block - 1 / (alpha * n_trials), right, 0.0)
        else:
            residual = gram._solve(-block - 1 / n_trials, rest - right, 1.0)
        errors.append(float((residual**2).mean()))
    return np.array(errors)


def is_inverted(gram: Gram, folds: Sequence[Fold], alphas: Sequence[float]) -> bool:
    """Say whether `compute_inverse_errors` is quicker than eigendecompositions and precise enough."""
    n, n_trials, n_targets = len(gram.matrix), len(gram.data), gram.values.shape[1]
    held = np.array([len(fold.test) for fold in folds], float)
    if gram.products is None:
        # Of all trials, or of each fold.
        cubes = min(n_trials**3, sum(len(fold.train) ** 3 for fold in folds))
        quicker = len(alphas) * n_trials**3 <= _INVERTED * cubes
    else:
        # Multiplications: half of a product for a triangle, a sixth of a cube for a factor.
        each = n**3 / 6 + n**2 * n_trials / 2 + float((held**2 * (n / 2 + held / 6 + n_targets)).sum())
        costs = [_count_multiplications(gram, fold, len(alphas)) for fold in folds]
        products, solved = (
            sum(cost[way] for cost in costs) for way in (_compute_residual_errors, _compute_solved_errors)
        )
        # The factors of folds are smaller, and taking each fold's matrix costs a product.
        others = _EIGH * n**3 * len(folds), _EIGH * n**3 + n**2 * n_trials + products, 1.5 * solved
        quicker = len(alphas) * each < min(others)
    return quicker and gram.backend.device == "cpu" and gram.bound_condition(min(alphas)) <= DOUBLE_CONDITION


def compute_inverse_errors(
    gram: Gram, folds: Sequence[Fold], alpha: float, centred: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the mean squared error of a penalty on every inner fold, shape (n_folds,).

    As `_compute_residual_errors`, from one Cholesky factor for all folds: of a matrix of trials, S is the square of its
    inverse; of a matrix of features, Z S Z' is the square of what it leaves of Z. As in `solve_ridge`, single
    precision is enough for large penalties.

    Parameters
    ----------
    centred
        What `Gram.centre` returns.
    """
    from scipy.linalg import cho_solve, cholesky, get_lapack_funcs, solve_triangular

    n_trials, errors = len(gram.data), np.empty(len(folds))
    is_single = gram.bound_condition(alpha) <= SINGLE_CONDITION
    matrix: np.ndarray = centred[0].astype(np.float32 if is_single else np.float64)
    matrix[np.diag_indices(len(matrix))] += alpha
    # Transposed, as LAPACK has it: a symmetric matrix is then not copied.
    factor = cholesky(matrix.T, lower=True, overwrite_a=True, check_finite=False)
    right = centred[1].astype(factor.dtype, copy=False)
    if gram.products is None:
        along = cho_solve((factor, True), right, check_finite=False)
        (invert,) = get_lapack_funcs(("trtri",), (factor,))
        inverse, _ = invert(factor, lower=1, overwrite_c=1)
    else:
        along = solve_triangular(factor, right, lower=True, check_finite=False)
    for number, fold in enumerate(folds):
        if gram.products is None:
            held = inverse[:, fold.test]
            residual = gram._solve(held.T @ held - 1 / (alpha * n_trials), along[fold.test], 0.0)
        else:
            rows = (gram.data[fold.test] - gram.feature_sums / n_trials).astype(factor.dtype, copy=False)
            held = solve_triangular(factor, rows.T, lower=True, overwrite_b=True, check_finite=False)
            rest = gram.values[fold.test] - gram.target_sums / n_trials - held.T @ along
            residual = gram._solve(-(held.T @ held) - 1 / n_trials, rest, 1.0)
        errors[number] = (residual**2).mean(dtype=np.float64)
    return errors


def _compute_path_errors(gram: Gram, fold: Fold, alphas: Sequence[float]) -> np.ndarray:
    """Return the error of each penalty on one inner fold, from the eigendecomposition of its training part.

    With U the eigenvectors, d = 1 / (eigenvalues + alpha), L = left @ U and R = U.T @ right the prediction is
    L diag(d) R. Its squared distance to the truth T is |T|^2 - 2 d.l + d'Cd, where l sums (L.T @ T) * R over targets
    and C = (L.T @ L) * (R @ R.T): what depends on targets and held-out trials is computed once for all penalties.
    """
    matrix, right, left, mean = gram.split(fold)
    backend = gram.backend
    truth = backend.take(gram.values[fold.test]) - backend.take(mean)
    eigenvalues, vectors = backend.xp.linalg.eigh(matrix)
    del matrix
    left, right = left @ vectors, vectors.T @ right  # (n_held_out, n), (n, n_targets)
    del vectors
    n_held, n_targets = truth.shape
    if len(eigenvalues) * (n_held + n_targets) >= 2 * n_held * n_targets * len(alphas):
        paths = ((left * _invert(eigenvalues, alpha)) @ right for alpha in alphas)
        return np.array([float(((path - truth) ** 2).mean()) for path in paths])
    linear = ((left.T @ truth) * right).sum(1)  # (n,)
    quadratic = (left.T @ left) * (right @ right.T)  # (n, n)
    power = float((truth**2).sum())
    inverses = [_invert(eigenvalues, alpha) for alpha in alphas]
    sums = [power - 2 * float(d @ linear) + float(d @ quadratic @ d) for d in inverses]
    return np.maximum(sums, 0) / (n_held * n_targets)


def _compute_solved_errors(gram: Gram, fold: Fold, alphas: Sequence[float]) -> np.ndarray:
    """Return the error of each penalty on one inner fold, from a Cholesky factor of its training part for each.

    As in `solve_ridge`, single precision is enough for large penalties.
    """
    matrix, right, left, mean = gram.split(fold)
    backend, power = gram.backend, gram.bound_condition(1.0)
    truth = backend.take(gram.values[fold.test]) - backend.take(mean)
    problems: dict[bool, list[Any]] = {}
    errors = []
    for alpha in alphas:
        is_single = power <= SINGLE_CONDITION * alpha
        if is_single not in problems:
            here = replace(backend, precision="float32") if is_single else backend
            problems[is_single] = [here.take(part) for part in (matrix, right, left, truth)]
        penalised, products, held, wanted = problems[is_single]
        error = held @ gram._solve(penalised, products, alpha) - wanted
        errors.append(float((error**2).mean()))
    return np.array(errors)


def _invert(eigenvalues: Any, alpha: float) -> Any:
    """Return 1 / (eigenvalue + alpha), and 0 where that is less than rounding leaves of an eigenvalue of 0."""
    least = float(eigenvalues.max()) * len(eigenvalues) * 2.2e-16
    penalised = eigenvalues.clip(0) + alpha
    return (penalised > least) / penalised.clip(least)


@cache
def _find_pools() -> Any:
    """Return the threads of the linear algebra; to look for them anew took a third of a small fit."""
    import scipy.linalg  # noqa: F401  # with its own BLAS, which is found only once it is loaded
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def use_backend(device: Device, n_values: int) -> Iterator[Backend]:
    """Yield where to compute; a response matrix of few values on the CPU by one thread.

    Its products take less time than waking a second thread or a GPU does.
    """
    small = n_values < SMALL_PROBLEM
    # Asked only where it matters: a small problem on the CPU never waits for torch to be imported.
    asks = device == "cuda" or (device == "auto" and not small)
    with _find_pools().limit(limits=1) if small else nullcontext():
        if asks and (chosen := choose_device(device, setting="encoder.device")) != "cpu":
            import torch

            yield Backend(torch, chosen)
        else:
            yield Backend(np)
