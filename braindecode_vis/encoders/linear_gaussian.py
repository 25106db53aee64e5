"""A linear model from embeddings to responses, inverted by Bayes' rule.

Owns a brain encoder that learns the direction from images to responses: responses are a linear map of the leading
principal components of the embedding, plus Gaussian noise. Noise is measured between repetitions of an image,
separately over channels and over time. The error of the map is estimated by cross-validation over images: equal in all
features or, for a share of it, larger in the patterns with the largest errors. The response then gives the likelihood
of any image, and the prediction is the posterior mean under the distribution of the training images. A decoder that
learns the other direction is shrunk for the noise of its training trials; this one uses the number of averaged
repetitions of each trial (`Responses.n_averaged`). Knows nothing of images or test trials.

References
----------
Schoenmakers, S. et al. (2013). Linear reconstruction of perceived images from human brain activity. NeuroImage 83,
951-961, doi:10.1016/j.neuroimage.2013.07.043. Naselaris, T. et al. (2009). Bayesian reconstruction of natural images
from human brain activity. Neuron 63, 902-915, doi:10.1016/j.neuron.2009.09.006.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, ImageLikelihood, Responses, check_target_rows
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder, EncoderSettings, GeneratorView
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import load_tensors, read_json, write_json, write_tensors
from braindecode_vis.preprocessing.alignment import check_common_features
from braindecode_vis.preprocessing.splits import InnerFoldSettings, make_inner_folds
from braindecode_vis.preprocessing.whitening import make_whitener

_SHRINK = 0.01  # of a covariance toward a multiple of the identity
_PATTERNS = 64  # of what the map misses, at most
# Stretches of equal length over which responses are averaged in time, before anything is measured; no more than there
# are samples.
_BINS = 50
# Candidates of the penalty of the map, relative to the mean variance of the components.
_PENALTIES = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
_SWEEPS = 4  # in which covariances of channels and of times are found; more change nothing that shows


class LinearGaussianConfig(EncoderSettings, InnerFoldSettings):
    """A linear Gaussian model of the response to an image, inverted for the target.

    Parameters
    ----------
    n_components
        Principal components of the training embeddings that are used; fewer if the images span fewer.
    n_times
        Number of time courses over 50 time bins that are kept, those in which images differ most. Not used for
        responses without a time axis.
    misfit
        Share of the map's error that is assigned to the patterns with the largest errors, instead of equally to all
        features. 0 trusts all features equally; 0.25 was best on validation concepts of simulated EEG.
    """

    kind: Literal["linear_gaussian"] = "linear_gaussian"
    n_components: int = Field(default=128, ge=1)
    n_times: int = Field(default=10, ge=1)
    misfit: float = Field(default=0, ge=0, le=1)

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"misfit"})
    removed_settings: ClassVar[Mapping[str, Any]] = {"n_bins": _BINS, "penalties": _PENALTIES}

    def build(self, *, seed: int) -> LinearGaussianEncoder:
        """Return the unfitted encoder."""
        return LinearGaussianEncoder(self, seed=seed)


@dataclass(frozen=True)
class LinearGaussianFit:
    """Everything that prediction needs; all of it learnt from training trials.

    Parameters
    ----------
    response_mean : float32 array of shape (n_inputs,)
    weights : float32 array of shape (n_inputs, n_components + n_patterns)
        From responses without their mean to what speaks for each component, in units of the noise of one repetition,
        and to the patterns of `ImageLikelihood`.
    likelihood
        See `ImageLikelihood`; it also makes embeddings of what speaks for the components.
    target_shape, space
        Of one embedding.
    about
        The chosen penalty and what the map misses, for readers.
    """

    response_mean: np.ndarray
    weights: np.ndarray
    likelihood: ImageLikelihood
    target_shape: tuple[int, ...]
    space: str
    about: dict[str, float]


class LinearGaussianEncoder(BrainEncoder):
    """The brain encoder; see the module for the model."""

    def __init__(self, config: LinearGaussianConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.fitted: LinearGaussianFit | None = None

    def fit(self, responses: Responses, targets: Embeddings) -> LinearGaussianEncoder:
        """Learn map and noise from the training trials.

        Parameters
        ----------
        responses
            Training trials; repetitions of an image show the noise. Where none is repeated, the covariance of all
            responses stands for that of the noise.
        targets
            One row per trial, in the order of `responses`.

        Raises
        ------
        DataError
            If rows do not match, or fewer than two images were shown.
        """
        check_common_features(responses, what="the linear Gaussian model")
        check_target_rows(responses, targets, what="the linear Gaussian model")
        n, shape = responses.n_trials, responses.data.shape[1:]
        n_inputs, side = int(np.prod(shape)), max(shape[0], int(np.prod(shape[1:])))
        check_memory(
            32 * n * n_inputs + 24 * side**2,
            what=f"the linear Gaussian model of {n} trials of {n_inputs} features",
            reduce="the subjects (--subject), or choose channels, times or voxels (dataset.*, selection.*)",
        )
        ids, first, row = np.unique(
            responses.stimulus_ids.astype(str), return_index=True, return_inverse=True
        )
        if len(ids) < 2:
            raise DataError("the linear Gaussian model needs at least two training images.")
        data = responses.as_matrix().reshape(n, shape[0], -1)  # (trial, channel, time), or (trial, voxel, 1)
        mean = data.mean(axis=0, dtype=np.float64).astype(np.float32)
        counts = np.bincount(row)
        bins = _make_bins(data.shape[2], _BINS)
        data = (data - mean) @ bins  # (trial, channel, bin)
        averages = np.zeros((len(ids), *data.shape[1:]), np.float32)
        np.add.at(averages, row, data)
        averages /= counts[:, None, None]
        whiten, courses = self._learn_noise(data, averages, row, counts)
        shown = (np.einsum("cd,ndt->nct", whiten, averages, optimize=True) @ courses).reshape(len(ids), -1)

        values = targets.flat()[first].astype(np.float64)
        centre = values.mean(axis=0)
        _, sizes, directions = np.linalg.svd(values - centre, full_matrices=False)
        n_kept = max(1, min(self.config.n_components, int((sizes > 1e-6 * max(sizes[0], 1e-30)).sum())))
        components = directions[:n_kept]
        scores = (values - centre) @ components.T
        forward, penalty, missed, excess, patterns = self._learn_map(
            scores, shown.astype(np.float64), ids, counts
        )
        # White noise of a training trial has unit variance in these features, that of one repetition as much more as
        # training trials are averages.
        noise = np.array([missed, 1 / (1 / responses.n_averaged).mean()])
        spread = np.maximum((scores**2).mean(axis=0), 1e-12)  # scores are uncorrelated over training images
        read = np.concatenate([forward, patterns])
        back = read.reshape(len(read), len(whiten), -1) @ (bins @ courses).T  # (n_read, channel, time)
        weights = np.einsum("kct,cd->dtk", back, whiten, optimize=True).reshape(-1, len(read))
        likelihood = ImageLikelihood(
            centre.astype(np.float32), components.astype(np.float32), forward @ forward.T, 1 / spread, noise,
            forward @ patterns.T, excess,
        )  # fmt: skip
        about = {"penalty": penalty, "missed": missed, "n_components": float(n_kept)}
        self.fitted = LinearGaussianFit(
            mean.ravel(),
            weights.astype(np.float32),
            likelihood,
            targets.vectors.shape[1:],
            targets.space,
            about,
        )
        return self

    def _learn_noise(
        self, data: np.ndarray, averages: np.ndarray, row: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the whitening of channels, and white courses over time in which images differ most."""
        repeated = counts[row] > 1
        left = data - averages[row] if repeated.any() else data
        left = left[repeated] if repeated.any() else left
        freedom = len(left) - len(np.unique(row[repeated])) if repeated.any() else len(left)
        left = left * np.float32(
            np.sqrt(len(left) / max(1, freedom))
        )  # a mean of its own was taken off each image
        n, n_channels, n_times = left.shape
        over_time = np.eye(n_times)
        for _ in range(_SWEEPS if n_times > 1 else 1):  # each given the other (Dutilleul 1999)
            whitened = left @ np.linalg.inv(over_time).astype(np.float32)
            over_channels = _shrink(np.einsum("nct,ndt->cd", whitened, left, optimize=True) / (n * n_times))
            whitened = np.einsum(
                "cd,ndt->nct", np.linalg.inv(over_channels).astype(np.float32), left, optimize=True
            )
            over_time = _shrink(np.einsum("nct,ncs->ts", whitened, left, optimize=True) / (n * n_channels))
        whiten, root = make_whitener(over_channels).matrix, make_whitener(over_time).matrix
        shown = np.einsum("cd,ndt->nct", whiten, averages, optimize=True) @ root
        # Noise is white there, so that the largest variances over images are those of the signal.
        _, courses = np.linalg.eigh(np.einsum("nct,ncs->ts", shown, shown, optimize=True))
        return whiten, root @ courses[:, ::-1][:, : self.config.n_times]

    def _learn_map(
        self, scores: np.ndarray, shown: np.ndarray, ids: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, float, float, np.ndarray, np.ndarray]:
        """Return map, penalty and what the map misses, noise apart.

        That is the variance in every feature, how much more it is in some patterns, and these as rows.
        """
        folds = make_inner_folds(
            ids, n_folds=self.config.n_inner_folds, generator=make_generator(self.seed, "linear gaussian"),
            setting="encoder.n_inner_folds",
        )  # fmt: skip
        scale = float((scores**2).mean())
        errors = np.zeros(len(_PENALTIES))
        for fold in folds:
            gram, products = (
                scores[fold.train].T @ scores[fold.train],
                scores[fold.train].T @ shown[fold.train],
            )
            for number, penalty in enumerate(_PENALTIES):
                forward = _solve(gram, products, penalty * scale * len(fold.train))
                errors[number] += ((shown[fold.test] - scores[fold.test] @ forward) ** 2).sum()
        best = int(errors.argmin())
        penalty = _PENALTIES[best]
        noise = float((1 / counts).mean())
        missed = max(float(errors[best]) / shown.size - noise, 1e-3)
        forward = _solve(scores.T @ scores, scores.T @ shown, penalty * scale * len(scores))
        excess, patterns = np.zeros(0), np.zeros((0, shown.shape[1]))
        if self.config.misfit:
            left = np.empty_like(shown)
            for fold in folds:
                own = scores[fold.train]
                found = _solve(own.T @ own, own.T @ shown[fold.train], penalty * scale * len(own))
                left[fold.test] = shown[fold.test] - scores[fold.test] @ found
            _, sizes, directions = np.linalg.svd(left, full_matrices=False)
            more = sizes[:_PATTERNS] ** 2 / len(left) - noise
            excess = self.config.misfit * more[more > 0]
            patterns = directions[: len(more)][more > 0]
        return forward, penalty, max((1 - self.config.misfit) * missed, 1e-3), excess, patterns

    def predict(self, responses: Responses) -> Embeddings:
        """Return the mean of the posterior of each trial, in the target space.

        Parameters
        ----------
        responses
            Each trial is taken for the mean of `Responses.n_averaged` repetitions.
        """
        fit = self._require_fit()
        data = responses.as_matrix()
        if data.shape[1] != len(fit.response_mean):
            raise DataError(
                f"the encoder was fitted on {len(fit.response_mean)} features, but these responses have "
                f"{data.shape[1]}."
            )
        known, counts = fit.likelihood, responses.n_averaged
        spoken, patterns = np.split((data - fit.response_mean) @ fit.weights, [len(known.components)], axis=1)
        scores = np.empty_like(spoken)
        for count in np.unique(counts).tolist():
            own = counts == count
            evidence, told = (
                known.find_evidence(count) * known.find_noise(count),
                spoken[own].T.astype(np.float64),
            )
            if len(known.excess):
                told = told - (known.patterns * known.find_damping(count)) @ patterns[own].T
            scores[own] = np.linalg.solve(evidence, told).T
        vectors = (known.mean + scores @ known.components).reshape(len(data), *fit.target_shape)
        return Embeddings(vectors, responses.stimulus_ids, fit.space, counts)

    def as_module(self, responses: Responses) -> tuple[Any, dict[str, Any]]:
        """Return the prediction as a torch module, and these trials as its input.

        The module takes every trial for the mean of as many repetitions as these trials are.

        Raises
        ------
        ConfigError
            If these trials are means of different numbers of repetitions.
        """
        import torch

        from braindecode_vis.encoders.linear_prediction import LinearPrediction, LinearSteps

        fit, known = self._require_fit(), self._require_fit().likelihood
        count, *others = np.unique(responses.n_averaged).tolist()
        if others:
            raise ConfigError(
                "a linear Gaussian model is exported for one number of averaged repetitions, but these trials are "
                f"means of {count:g} to {others[-1]:g}; choose safetensors, or set repeats.test to single."
            )
        # What is read of a trial, (n_components + n_patterns, n_components): scores of `predict` are linear in it.
        solve: np.ndarray = np.eye(len(known.components))
        if len(known.excess):
            solve = np.hstack([solve, -known.patterns * known.find_damping(count)])
        solve = np.linalg.solve(known.find_evidence(count) * known.find_noise(count), solve)
        weights = (fit.weights.astype(np.float64) @ solve.T).astype(np.float32)
        zeros, ones = (np.full(weights.shape[1], value, np.float32) for value in (0, 1))
        module = LinearSteps(
            LinearPrediction(
                None, fit.response_mean, np.ones_like(fit.response_mean), weights, zeros, shape=zeros.shape
            ),
            LinearPrediction(None, zeros, ones, known.components, known.mean, shape=fit.target_shape),
        )
        return module, {"responses": torch.from_numpy(responses.as_matrix().reshape(responses.data.shape))}

    @property
    def generator_view(self) -> GeneratorView:
        """`predict`, made anew, since files of embeddings do not say how many repetitions are behind each."""
        return GeneratorView(self.predict)

    @property
    def likelihood(self) -> ImageLikelihood:
        """How likely images are given a prediction, for a prior that weighs images."""
        return self._require_fit().likelihood

    def _require_fit(self) -> LinearGaussianFit:
        if self.fitted is None:
            raise DataError("the linear Gaussian model has not been fitted; run train first.")
        return self.fitted

    def write(self, folder: Path) -> None:
        """Write the fitted state as safetensors and JSON."""
        fit = self._require_fit()
        known = fit.likelihood
        tensors = {
            "response_mean": fit.response_mean, "weights": fit.weights, "mean": known.mean,
            "components": known.components, "gram": known.gram, "precision": known.precision, "noise": known.noise,
        }  # fmt: skip
        if len(known.excess):
            tensors |= {"patterns": known.patterns, "excess": known.excess}
        write_tensors(
            folder / "linear_gaussian.safetensors",
            {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        )
        about = {"space": fit.space, "target_shape": list(fit.target_shape), "seed": self.seed, **fit.about}
        write_json(folder / "linear_gaussian.json", about)

    def read(self, folder: Path) -> LinearGaussianEncoder:
        """Read what `write` wrote."""
        meta, held = (
            read_json(folder / "linear_gaussian.json"),
            load_tensors(folder / "linear_gaussian.safetensors"),
        )
        likelihood = ImageLikelihood(
            held["mean"], held["components"], held["gram"], held["precision"], held["noise"],
            **{name: held[name] for name in ("patterns", "excess") if name in held},
        )  # fmt: skip
        about = {name: float(meta[name]) for name in ("penalty", "missed", "n_components")}
        self.fitted = LinearGaussianFit(
            held["response_mean"],
            held["weights"],
            likelihood,
            tuple(meta["target_shape"]),
            meta["space"],
            about,
        )
        self.seed = meta["seed"]
        return self


def _make_bins(n_times: int, n_bins: int) -> np.ndarray:
    """Return weights of shape (n_times, n_bins) that average neighbouring samples."""
    number = np.arange(n_times) * min(n_bins, n_times) // n_times
    bins = np.equal.outer(number, np.arange(number[-1] + 1)).astype(np.float32)
    return bins / bins.sum(axis=0)


def _shrink(covariance: np.ndarray) -> np.ndarray:
    """Return a covariance that can be inverted, in double precision."""
    size = len(covariance)
    covariance = covariance.astype(np.float64)
    floor = max(float(np.trace(covariance)) / size, 1e-30)
    return (1 - _SHRINK) * covariance + _SHRINK * floor * np.eye(size)


def _solve(gram: np.ndarray, products: np.ndarray, penalty: float) -> np.ndarray:
    return np.asarray(np.linalg.solve(gram + penalty * np.eye(len(gram)), products))
