"""Prepares trials for an encoder: alignment of subjects, then scaling, with training statistics.

Computes the statistics (in blocks, so that a large memory map is never read whole) and applies them to a block of
trials. A common space of several subjects (`common_space`) is learnt from images that two of them have seen; the other
alignments never use labels. For a subject without training trials, these other alignments compute the statistics from
the subject's own trials, without labels, and the subject is named in `InputTransform.label_free_subjects`, since such a
result must be reported separately.

References
----------
He, Wu (2020), Euclidean Alignment, doi:10.1109/TBME.2019.2913914, arXiv:1808.05464.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Responses, count_own_voxels, iterate_blocks
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.settings import Settings
from braindecode_vis.preprocessing.common_space import (
    OWN_ALIGNMENTS,
    CommonSpace,
    SubjectAlignment,
    fit_common_space,
)

if TYPE_CHECKING:
    pass

#: Trials in double precision that are summed at once for a spread: they stay in the processor's cache.
SPREAD_BYTES = 1 << 18
MEDIAN_BYTES = 512 << 20  # trials that medians are taken from; more than this are thinned evenly


class InputScalingConfig(Settings):
    """How each channel (or voxel, or parcel) is scaled; statistics come from the training trials.

    Parameters
    ----------
    kind
        ``none``; ``zscore`` by mean and standard deviation; ``robust`` by median and interquartile range (the choice
        of Meta's MEG papers and NeuralBench). Channels of a trial with a time axis have one statistic over all times.
    clamp
        Largest absolute value after scaling; None does not clamp. 20 in brainmagick and NeuralBench.
    """

    kind: Literal["none", "zscore", "robust"] = "zscore"
    clamp: float | None = Field(default=None, gt=0)


@dataclass
class InputScale:
    """Centre and spread, of shape (n_channels, 1) with a time axis and (n_features,) without."""

    centre: np.ndarray
    spread: np.ndarray

    def apply(self, block: np.ndarray) -> np.ndarray:
        """Return ``(block - centre) / spread``."""
        return (block - self.centre) / self.spread


@dataclass
class InputTransform:
    """Fitted alignment and scaling.

    Parameters
    ----------
    scaling, alignment
        The settings.
    dims
        Axes of one trial.
    matrices
        Whitening matrix of each subject, shape (n_channels, n_channels) (``euclidean``).
    scales
        Centre and spread of each subject (``zscore`` alignment).
    scale
        Centre and spread of all training trials after alignment (`scaling`).
    space
        Common space of the subjects (``hyperalignment`` and its like).
    label_free_subjects
        Subjects whose alignment came from trials outside the training set, without labels.
    """

    scaling: InputScalingConfig
    alignment: SubjectAlignment
    dims: tuple[str, ...]
    matrices: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, InputScale] = field(default_factory=dict)
    scale: InputScale | None = None
    space: CommonSpace | None = None
    label_free_subjects: tuple[str, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether trials are not changed."""
        return self.alignment == "none" and self.scale is None and self.scaling.clamp is None

    @property
    def uses_images(self) -> bool:
        """Whether the alignment is learnt from the shown images; if an image is left out, it must be learnt again."""
        return self.alignment not in OWN_ALIGNMENTS

    def fit(
        self,
        data: Any,
        rows: np.ndarray,
        subjects: np.ndarray,
        *,
        stimuli: np.ndarray | None = None,
        n_own: Mapping[str, int] | None = None,
    ) -> InputTransform:
        """Learn from training trials.

        Parameters
        ----------
        data : array of shape (n_trials, ...)
            Read by ascending row numbers only.
        rows
            The training trials.
        subjects, stimuli : arrays of shape (n_trials,)
            Subject and image of each trial of `data`; the images are needed only for a common space.
        n_own
            How many features each subject has, if rows are padded.
        """
        if self.uses_images:
            assert stimuli is not None
            self.space = fit_common_space(self.alignment, data, rows, subjects, stimuli, n_own)  # type: ignore[arg-type]
        else:
            for subject in sorted(set(subjects[rows])):
                self.add_subject(data, rows[subjects[rows] == subject], subject)
        if self.scaling.kind == "zscore":
            self.scale = self._fit_moments(self._iterate_aligned(data, rows, subjects))
        elif self.scaling.kind == "robust":
            self.scale = self._fit_quartiles(data, rows, subjects)
        return self

    def add_subject(
        self,
        data: Any,
        rows: np.ndarray,
        subject: str,
        *,
        stimuli: np.ndarray | None = None,
        n_features: int | None = None,
    ) -> None:
        """Learn the alignment of one subject from these trials; `stimuli` and `n_features` are as for `CommonSpace`."""
        if self.alignment == "none":
            return
        if self.space is not None:
            assert stimuli is not None
            self.space.add_subject(data, rows, subject, stimuli, n_features=n_features)
            return
        if len(rows) < 2:
            raise DataError(
                f"aligning subject {subject} needs at least two of its trials, but there is {len(rows)}; "
                "set encoder.subject_alignment to none."
            )
        blocks = (block for _, block in iterate_blocks(data, rows))
        if self.alignment == "zscore":
            self.scales[subject] = self._fit_moments(blocks)
        else:
            self.matrices[subject] = fit_euclidean_alignment(blocks, self.dims)

    def with_subjects_of(self, data: Any, subjects: np.ndarray) -> InputTransform:
        """Return a transform that also knows the subjects of these trials, by their unlabelled trials if new."""
        known = self.matrices if self.alignment == "euclidean" else self.scales
        new = [] if self.alignment == "none" or self.uses_images else sorted(set(subjects) - set(known))
        if not new:
            return self
        grown = replace(self.copy(), label_free_subjects=tuple(sorted({*self.label_free_subjects, *new})))
        for subject in new:
            grown.add_subject(data, np.flatnonzero(subjects == subject), subject)
        return grown

    def extend(self, responses: Responses, rows: np.ndarray | None = None) -> InputTransform:
        """Return a transform that also has the subjects of these training trials; this one does not change."""
        grown, names = self.copy(), responses.trials["subject"].astype(str).to_numpy(dtype=object)
        rows = np.arange(responses.n_trials) if rows is None else rows
        known = {*self.matrices, *self.scales, *(self.space.maps if self.space is not None else ())}
        for name in sorted(set(names[rows]) - known):
            grown.add_subject(
                responses.data, rows[names[rows] == name], name, stimuli=responses.stimulus_ids,
                n_features=count_own_voxels(responses).get(name),
            )  # fmt: skip
        return grown

    def copy(self) -> InputTransform:
        """Return a copy that can learn further subjects."""
        space = self.space and replace(self.space, maps=dict(self.space.maps))
        return replace(self, matrices=dict(self.matrices), scales=dict(self.scales), space=space)

    def read(self, data: Any, rows: np.ndarray, subjects: np.ndarray) -> np.ndarray:
        """Return these trials (ascending row numbers) as a network sees them, float32.

        Every trial is computed separately, so that the result does not depend on the other trials.
        """
        block = np.ascontiguousarray(data[rows], dtype=np.float32)
        return self._finish(self._align(block, subjects[rows]))

    def apply(self, responses: Responses) -> Responses:
        """Return trials as `read` gives them; components of a common space have no names and no places.

        Raises
        ------
        DataError
            If a subject has no map into the common space, or its features differ from those of the map.
        """
        if self.space is not None:
            self.space.check(responses)
        rows = np.arange(responses.n_trials)
        blocks = self._iterate_aligned(
            responses.data, rows, responses.trials["subject"].astype(str).to_numpy(object)
        )
        data = np.concatenate([self._finish(block) for block in blocks])
        coords = dict(responses.coords)
        if self.space is not None:
            coords = {key: value for key, value in coords.items() if key in ("times", "sfreq")}
        return Responses.from_checked(data, responses.dims, responses.trials, responses.unit, coords)

    def _align(self, block: np.ndarray, subjects: np.ndarray) -> np.ndarray:
        if self.alignment == "none":
            return block
        if self.space is not None:
            return self.space.apply(block, subjects)
        aligned = np.empty_like(block)
        for subject in set(subjects):
            chosen = subjects == subject
            if self.alignment == "euclidean":
                # (n_channels, n_channels) @ (n_trials, n_channels, n_times)
                aligned[chosen] = np.matmul(self.matrices[subject], block[chosen])
            else:
                aligned[chosen] = self.scales[subject].apply(block[chosen])
        return aligned

    def _finish(self, block: np.ndarray) -> np.ndarray:
        if self.scale is not None:
            block = self.scale.apply(block)
        if self.scaling.clamp is not None:
            block = np.clip(block, -self.scaling.clamp, self.scaling.clamp)
        return block

    def _iterate_aligned(self, data: Any, rows: np.ndarray, subjects: np.ndarray) -> Iterator[np.ndarray]:
        for chunk, block in iterate_blocks(data, rows):
            yield self._align(block.astype(np.float32), subjects[chunk])

    def _fit_moments(self, blocks: Iterator[np.ndarray]) -> InputScale:
        """Return mean and standard deviation by merging those of blocks (Chan et al. 1983), in float64."""
        count, mean, squares = 0, np.zeros(()), np.zeros(())
        for block in blocks:
            values = self._as_samples(block).astype(np.float64)  # (n_samples, n_features)
            n, centre = len(values), values.mean(axis=0)
            spread = ((values - centre) ** 2).sum(axis=0)
            if count:
                # Running sums of squares would lose all digits to a large mean; merging blocks does not.
                shift = centre - mean
                squares = squares + spread + shift**2 * (count * n / (count + n))
                mean = mean + shift * (n / (count + n))
            else:
                mean, squares = centre, spread
            count += n
        return self._make_scale(mean, np.sqrt(squares / count))

    def _fit_quartiles(self, data: Any, rows: np.ndarray, subjects: np.ndarray) -> InputScale:
        n_aligned = data.shape[1] if self.space is None else self.space.n_components
        trial_bytes = 4 * max(1, n_aligned * int(np.prod(data.shape[2:])))
        # Quartiles need all values at once; every step-th trial keeps them within the bound.
        step = -(-len(rows) * trial_bytes // MEDIAN_BYTES)
        blocks = list(self._iterate_aligned(data, rows[::step], subjects))
        values = self._as_samples(np.concatenate(blocks))
        low, middle, high = np.percentile(values, [25, 50, 75], axis=0)
        return self._make_scale(middle, high - low)

    def _as_samples(self, block: np.ndarray) -> np.ndarray:
        """Return (n_samples, n_features): times are samples of their channel."""
        if self.dims[-1] == "time" and block.ndim == 3:
            # (n_trials, n_channels, n_times) -> (n_trials * n_times, n_channels)
            return block.transpose(0, 2, 1).reshape(-1, block.shape[1])
        return block.reshape(len(block), -1)

    def _make_scale(self, centre: np.ndarray, spread: np.ndarray) -> InputScale:
        # A channel that does not vary keeps its values instead of being blown up by rounding.
        spread = np.where(spread > 1e-12 * np.maximum(np.abs(centre), np.finfo(np.float32).tiny), spread, 1.0)
        if self.dims[-1] == "time":
            centre, spread = centre[:, None], spread[:, None]  # broadcast over times
        return InputScale(centre.astype(np.float32), spread.astype(np.float32))

    def as_tensors(self) -> dict[str, np.ndarray]:
        """Return named arrays that `from_tensors` reads."""
        named = {f"align/{subject}": matrix for subject, matrix in self.matrices.items()}
        for subject, scale in self.scales.items():
            named[f"align_centre/{subject}"], named[f"align_spread/{subject}"] = scale.centre, scale.spread
        if self.space is not None:
            named |= self.space.as_tensors()
        if self.scale is not None:
            named["scale_centre"], named["scale_spread"] = self.scale.centre, self.scale.spread
        return named

    @classmethod
    def from_tensors(
        cls,
        named: dict[str, np.ndarray],
        *,
        scaling: InputScalingConfig,
        alignment: SubjectAlignment,
        dims: tuple[str, ...],
    ) -> InputTransform:
        """Return what `as_tensors` gave."""
        transform = cls(scaling, alignment, dims)
        for name, array in named.items():
            part, _, subject = name.partition("/")
            if part == "align":
                transform.matrices[subject] = array
            elif part == "align_centre":
                transform.scales[subject] = InputScale(array, named[f"align_spread/{subject}"])
        if "space_ids" in named:
            transform.space = CommonSpace.from_tensors(named, alignment)  # type: ignore[arg-type]
        if "scale_centre" in named:
            transform.scale = InputScale(named["scale_centre"], named["scale_spread"])
        return transform


def check_common_features(responses: Responses, *, what: str) -> None:
    """Raise `DataError` if a feature is a different voxel in every subject.

    Parameters
    ----------
    what
        Component that needs common features, for the message.
    """
    counts = count_own_voxels(responses)
    if counts and responses.trials["subject"].nunique() > 1:
        words = ", ".join(f"{n} of subject {subject}" for subject, n in counts.items())
        raise DataError(
            f"{what} needs features that mean the same in every subject, but these are voxels of several brains "
            f"({words}, padded with zeros): read one subject, average over the regions of an atlas with dataset.atlas, "
            "or choose an encoder that aligns subjects (encoder.subject_alignment=hyperalignment) or has a layer for "
            "each (encoder.network.kind=shared_space)."
        )


def fit_euclidean_alignment(blocks: Iterator[np.ndarray], dims: tuple[str, ...]) -> np.ndarray:
    """Return R^(-1/2) for R the mean over trials of X Xᵀ, float32 of shape (n_channels, n_channels).

    Directions with less than 1e-10 of the largest eigenvalue (after an average reference, for example) are left out
    rather than blown up.

    Parameters
    ----------
    blocks
        Trials of one subject, arrays of shape (n_trials, n_channels, n_times).
    dims
        Axes of a trial.
    """
    if dims != ("channel", "time"):
        raise DataError(
            f"Euclidean alignment needs channels x times, but the responses have {', '.join(dims)}; "
            "set encoder.subject_alignment to zscore or none."
        )
    total, count = np.zeros(()), 0
    for block in blocks:
        x = block.astype(np.float64)
        # sum over trials of X X^T, (n_channels, n_channels)
        total = total + np.einsum("ict,idt->cd", x, x, optimize=True)
        count += len(x)
    # symmetric, so that eigenvalues are real and ascending
    values, vectors = np.linalg.eigh(total / count)
    kept = values > 1e-10 * values[-1]
    if not kept.any():
        raise DataError("Euclidean alignment found trials that are all zero; drop that subject.")
    # V diag(1 / sqrt(w)) V^T: the symmetric root, which changes the channels least
    return ((vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T).astype(np.float32)


@dataclass(frozen=True)
class ZScore:
    """Mean and standard deviation of each feature of the training trials.

    Parameters
    ----------
    mean, std : float32 arrays of shape (n_features,)
        Constant features have `std` 1, so that they become 0 and stay finite.
    """

    mean: np.ndarray
    std: np.ndarray

    def apply(self, data: np.ndarray) -> np.ndarray:
        """Return ``(data - mean) / std`` as float32 of the same shape (n_trials, n_features)."""
        scaled = data - self.mean
        scaled /= self.std  # in place: a second copy of all trials would be as large as they are
        return scaled.astype(np.float32, copy=False)


def fit_zscore(data: np.ndarray) -> ZScore:
    """Compute the statistics of training trials, shape (n_trials, n_features).

    Sums run in float64: voxel values can sit on a baseline a thousand times their variation.
    """
    mean = data.mean(axis=0, dtype=np.float64)
    std = np.empty(mean.shape)
    squares, step = np.zeros(mean.shape), max(1, SPREAD_BYTES // (8 * max(1, data.shape[1])))
    for start in range(0, len(data), step):  # numpy would hold all trials in double precision
        block = data[start : start + step] - mean
        block *= block
        squares += block.sum(axis=0)
    std = np.sqrt(squares / len(data))
    # Rounding gives a constant feature a spread of about 1e-16 of its mean: that is none. MEG in tesla is below 1e-12.
    std = np.where(std > 1e-12 * np.maximum(np.finfo(np.float32).tiny, np.abs(mean)), std, 1.0)
    return ZScore(mean.astype(np.float32), std.astype(np.float32))
