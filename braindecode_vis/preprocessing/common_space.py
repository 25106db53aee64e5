"""Functional alignment: maps of the voxels, parcels or channels of several subjects into one space of components.

Has four ways to find the maps, each from the mean responses to training images that two or more subjects have seen.
Only the ids of the images are used as labels, and no test trial is read. A subject with few such images, for example a
new one, does not influence the space: it is mapped into the space of the others. Projected trials are components, which
mix places in the brain.

References
----------
Haxby et al. (2011), hyperalignment, doi:10.1016/j.neuron.2011.08.026; Gower (1975), generalised Procrustes analysis,
doi:10.1007/BF02291478; Chen et al. (2015), shared response model, NIPS 28; Schönemann (1966), doi:10.1007/BF02289451.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from braindecode_vis.base.arrays import Responses, count_own_voxels, iterate_blocks
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.registry import ByKind
from braindecode_vis.base.settings import Settings

FIT_BYTES = 1 << 30  # of mean responses that maps are fitted on; images are thinned evenly beyond it
FEWEST_IMAGES = 2  # one image says nothing once the mean is taken off
FEW = 0.5  # a subject with less than this share of the most images seen is mapped to the space of the others
_PENALTIES = (
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
    100.0,
)  # of `functional_pca`, in units of the mean power of a dimension


_ITERATIONS = 10  # how often the mean, or bases and shared response, are renewed


class CommonSpaceSettings(Settings):
    """What all common spaces have.

    Parameters
    ----------
    n_components
        Dimensions of the common space; fewer if there are fewer images or features.
    """

    n_components: int = Field(default=100, ge=1)


class ProcrustesConfig(CommonSpaceSettings):
    """Each subject is rotated onto one reference subject, after PCA to a common number of dimensions.

    Parameters
    ----------
    reference
        The subject whose principal components are the space; None takes the one with the most images that others have
        seen.
    """

    kind: Literal["procrustes"] = "procrustes"
    reference: str | None = None


class HyperalignmentConfig(CommonSpaceSettings):
    """Each subject is rotated onto the mean of all rotated subjects, repeatedly (generalised Procrustes), after PCA."""

    kind: Literal["hyperalignment"] = "hyperalignment"

    removed_settings: ClassVar[Mapping[str, Any]] = {"n_iterations": 10}


class SharedResponseConfig(CommonSpaceSettings):
    """Orthonormal bases of the subjects and one shared response, in turn (the deterministic model of Chen et al.)."""

    kind: Literal["shared_response"] = "shared_response"

    removed_settings: ClassVar[Mapping[str, Any]] = {"n_iterations": 10}


class FunctionalPcaConfig(CommonSpaceSettings):
    """Principal components of the concatenated responses of all subjects; a ridge maps each subject to them.

    The penalty of a subject is chosen by leaving out one response at a time. Needs images that all subjects with many
    images have seen.
    """

    kind: Literal["functional_pca"] = "functional_pca"


CommonSpaceConfig = ProcrustesConfig | HyperalignmentConfig | SharedResponseConfig | FunctionalPcaConfig
#: Alignments of each subject by its own trials, whatever they showed; one word names them.
OWN_ALIGNMENTS = ("none", "euclidean", "zscore")
COMMON_SPACES: tuple[str, ...] = tuple(c.model_fields["kind"].default for c in get_args(CommonSpaceConfig))


def _name_kind(value: Any) -> Any:
    """Accept the name of a kind as its settings with their defaults."""
    if isinstance(value, str) and value not in (*OWN_ALIGNMENTS, *COMMON_SPACES):
        known = [*OWN_ALIGNMENTS, *COMMON_SPACES]
        raise PydanticCustomError("unknown_kind", "unknown kind {given}", {"given": value, "known": known})
    return {"kind": value} if isinstance(value, str) and value in COMMON_SPACES else value


#: How subjects are made alike before an encoder sees their trials: in one word, or with the settings of its kind.
SubjectAlignment = Annotated[
    Literal["none", "euclidean", "zscore"] | Annotated[CommonSpaceConfig, ByKind()],
    BeforeValidator(_name_kind),
]


def name_alignment(alignment: Any) -> str:
    """Return the kind of an alignment, given as a word, as settings or as their plain fields."""
    if isinstance(alignment, Mapping):
        return str(alignment["kind"])
    return str(getattr(alignment, "kind", alignment))


@dataclass(frozen=True)
class SubjectMap:
    """Linear map of one subject's features: ``(x - centre) @ matrix + offset``.

    Parameters
    ----------
    centre : float32 array of shape (n_features,)
    matrix : float32 array of shape (n_features, n_components)
    offset : float32 array of shape (n_components,)
    """

    centre: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray

    def apply(self, block: np.ndarray) -> np.ndarray:
        """Map trials of shape (n_trials, n_features[, n_times]); padding behind the own features is not read."""
        own = block[:, : len(self.centre)]
        if block.ndim == 2:
            return np.asarray((own - self.centre) @ self.matrix + self.offset)
        # (n_components, n_features) @ (n_trials, n_features, n_times)
        return np.asarray(np.matmul(self.matrix.T, own - self.centre[:, None]) + self.offset[:, None])


@dataclass(frozen=True)
class MeanResponses:
    """Mean response of one subject to each image that it has seen among those of the fit.

    Parameters
    ----------
    rows : int array of shape (n_images,)
        Which images, ascending.
    values : float32 array of shape (n_images, n_times, n_features)
        Standardised over images and times; `n_times` is 1 where trials have no time axis.
    centre, spread : float32 arrays of shape (n_features,)
        Mean that was subtracted, and spread by which the values were divided.
    """

    rows: np.ndarray
    values: np.ndarray
    centre: np.ndarray
    spread: np.ndarray
    _axes: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def find_axes(self, n_components: int) -> np.ndarray:
        """Return the leading principal axes, found once; see `find_axes`."""
        if n_components not in self._axes:
            self._axes[n_components] = find_axes(self.flat(), n_components)
        return self._axes[n_components]

    def flat(self, picked: np.ndarray | None = None) -> np.ndarray:
        """Return the values, or those of some images, as a matrix of shape (n_images * n_times, n_features)."""
        values = self.values if picked is None else self.values[picked]
        return values.reshape(-1, values.shape[-1])


@dataclass
class CommonSpace:
    """Fitted maps, and the mean responses in the common space that a further subject is mapped to.

    Parameters
    ----------
    config
        The settings.
    ids : str array of shape (n_images,)
        Training images of the fit.
    template : float32 array of shape (n_images, n_times, n_components)
        Their responses in the common space.
    maps
        Map of each subject.
    """

    config: CommonSpaceConfig
    ids: np.ndarray
    template: np.ndarray
    maps: dict[str, SubjectMap] = field(default_factory=dict)

    @property
    def n_components(self) -> int:
        """Dimensions of the space."""
        return int(self.template.shape[2])

    def apply(self, block: np.ndarray, subjects: np.ndarray) -> np.ndarray:
        """Return trials of shape (n_trials, n_components[, n_times]), float32.

        Raises
        ------
        DataError
            If a trial is of a subject without a map.
        """
        mapped = np.empty((len(block), self.n_components, *block.shape[2:]), np.float32)
        for subject in sorted({str(s) for s in subjects}):
            if subject not in self.maps:
                raise DataError(self.describe_unknown(subject))
            own = subjects == subject
            mapped[own] = self.maps[subject].apply(block[own])
        return mapped

    def describe_unknown(self, subject: str) -> str:
        """Return the sentence about a subject without a map."""
        return (
            f"subject {subject} has no map into the common space of {', '.join(self.maps)}: {self.config.kind} needs "
            "some of its own training trials, of images that the others have seen; give it some (split.own_trials), "
            "adapt the encoder with some, or set encoder.subject_alignment to none and average over the regions of an "
            "atlas (dataset.atlas)."
        )

    def check(self, responses: Responses) -> None:
        """Raise `DataError` if a subject has other features than its map, or trials have other times."""
        counts, n_features = count_own_voxels(responses), responses.data.shape[1]
        for subject in sorted(set(responses.trials["subject"].astype(str)) & set(self.maps)):
            found, expected = counts.get(subject, n_features), len(self.maps[subject].centre)
            if found != expected:
                raise DataError(
                    f"subject {subject} was aligned by {expected} {responses.dims[1]}s, but these trials have {found}: "
                    "they come from another mask, atlas or montage; prepare them like the training trials."
                )
        n_times = int(np.prod(responses.data.shape[2:]))
        if n_times != self.template.shape[1]:
            raise DataError(
                f"subjects were aligned by trials of {self.template.shape[1]} times, but these have "
                f"{n_times}; cut them like the training trials."
            )

    def add_subject(
        self, data: Any, rows: np.ndarray, name: str, stimuli: np.ndarray, *, n_features: int | None = None
    ) -> None:
        """Map one more subject into the fitted space, by its trials of images that the others have seen.

        Parameters
        ----------
        data : array of shape (n_trials, n_features[, n_times])
        rows
            Training trials of the subject.
        name
            The subject.
        stimuli : array of shape (n_trials,)
            Image of each trial of `data`.
        n_features
            How many of the features are its own, if rows are padded.

        Raises
        ------
        DataError
            If the subject has seen fewer than two of the images.
        """
        means = average_images(data, rows, stimuli, self.ids, n_features=n_features)
        if means is None or len(means.rows) < FEWEST_IMAGES:
            n = 0 if means is None else len(means.rows)
            raise DataError(
                f"subject {name} shares {n} training image(s) with the subjects {', '.join(self.maps) or 'before'} "
                f"that define the common space, but {self.config.kind} needs {FEWEST_IMAGES}; give it trials of "
                "images that they have seen, or set encoder.subject_alignment to none."
            )
        self.maps[name] = fit_map(self.config, means, self.template)

    def as_tensors(self) -> dict[str, np.ndarray]:
        """Return named arrays that `from_tensors` reads."""
        ids = np.frombuffer("\n".join(self.ids.tolist()).encode(), np.uint8).copy()
        named = {"space_ids": ids, "space_template": self.template}
        for subject, one in self.maps.items():
            parts = {"centre": one.centre, "matrix": one.matrix, "offset": one.offset}
            named |= {f"space_{name}/{subject}": array for name, array in parts.items()}
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, np.ndarray], config: CommonSpaceConfig) -> CommonSpace:
        """Return what `as_tensors` gave."""
        ids = np.array(named["space_ids"].tobytes().decode().split("\n"), dtype=object)
        space = cls(config, ids, named["space_template"])
        for key in sorted(name for name in named if name.startswith("space_matrix/")):
            subject = key.partition("/")[2]
            space.maps[subject] = SubjectMap(
                named[f"space_centre/{subject}"], named[key], named[f"space_offset/{subject}"]
            )
        return space


# --- fitting -------------------------------------------------------------------------------------------------------


def fit_common_space(
    config: CommonSpaceConfig,
    data: Any,
    rows: np.ndarray,
    subjects: np.ndarray,
    stimuli: np.ndarray,
    n_own: Mapping[str, int] | None = None,
) -> CommonSpace:
    """Find the space of training trials, and the map of each of their subjects.

    Parameters
    ----------
    config
        How.
    data : array of shape (n_trials, n_features[, n_times])
        Read by ascending row numbers only.
    rows
        The training trials.
    subjects, stimuli : arrays of shape (n_trials,)
        Subject and image of each trial of `data`.
    n_own
        How many features each subject has, if rows are padded.

    Raises
    ------
    DataError
        If there is one subject, if subjects share no training images, or if a trial has more than two axes.
    """
    names = sorted({str(s) for s in subjects[rows]})
    if len(names) < 2:
        raise DataError(
            f"{config.kind} aligns several subjects, but the training trials are of subject {names[0]} alone; read "
            "others too (dataset.subjects), or set encoder.subject_alignment to none."
        )
    if data.ndim > 3:
        raise DataError(
            f"{config.kind} maps features, optionally with times, but trials have the shape {data.shape[1:]}."
        )
    ids = stimuli.astype(str)
    own_rows = {name: rows[subjects[rows] == name] for name in names}
    seen = {name: set(ids[own].tolist()) for name, own in own_rows.items()}
    counts = Counter(i for images in seen.values() for i in images)
    shared = {i for i, n in counts.items() if n > 1}
    for name in names:
        if len(seen[name] & shared) < FEWEST_IMAGES:
            raise DataError(
                f"{config.kind} aligns subjects by training images that two of them have seen, and subject {name} "
                f"shares {len(seen[name] & shared)} of its {len(seen[name])} with another (test images do not count); "
                "choose subjects who saw the same images, average over the regions of an atlas (dataset.atlas), or "
                "take a network with a layer for each subject (encoder.network.kind=shared_space)."
            )
    widths = {name: int((n_own or {}).get(name, data.shape[1])) for name in names}
    bytes_per_image = 4 * sum(widths.values()) * int(np.prod(data.shape[2:]))
    chosen = thin_images(
        {name: sorted(seen[name] & shared) for name in names}, max(len(names), FIT_BYTES // bytes_per_image)
    )
    means = {}
    for name in names:
        found = average_images(data, own_rows[name], stimuli, chosen, n_features=widths[name])
        assert found is not None  # every subject gives images of its own to those chosen
        means[name] = found
    most = max(len(one.rows) for one in means.values())
    founders = {name: one for name, one in means.items() if len(one.rows) >= FEW * most}
    template, known = make_template(config, founders, len(chosen))
    space = CommonSpace(config, chosen[known], template[known].astype(np.float32))
    for name in names:
        if known.all():
            space.maps[name] = fit_map(config, means[name], space.template)
        else:  # without the images that only subjects with few images have seen
            space.add_subject(data, own_rows[name], name, stimuli, n_features=widths[name])
    return space


def thin_images(seen: Mapping[str, Sequence[str]], limit: int) -> np.ndarray:
    """Return at most `limit` images, sorted; each subject gives the same number of them."""
    chosen: set[str] = set()
    for name in sorted(seen, key=lambda name: (len(seen[name]), name)):
        left = [i for i in seen[name] if i not in chosen]
        share = max(FEWEST_IMAGES, limit // len(seen))
        picked = np.unique(np.linspace(0, len(left) - 1, min(len(left), share)).astype(int)) if left else ()
        chosen |= {left[n] for n in picked}
    return np.array(sorted(chosen), dtype=object)


def average_images(
    data: Any, rows: np.ndarray, stimuli: np.ndarray, ids: np.ndarray, *, n_features: int | None = None
) -> MeanResponses | None:
    """Return the standardised mean responses to those of the images `ids` that the trials show; None if there are none.

    Parameters
    ----------
    data : array of shape (n_trials, n_features[, n_times])
    rows
        Trials of one subject.
    stimuli : array of shape (n_trials,)
        Image of each trial of `data`.
    ids : str array of shape (n_images,)
        Sorted.
    n_features
        How many of the features are the subject's own.
    """
    place = {name: number for number, name in enumerate(ids.tolist())}
    rows = np.sort(rows)
    number = np.array([place.get(str(i), -1) for i in stimuli[rows]])
    rows, number = rows[number >= 0], number[number >= 0]
    if not len(rows):
        return None
    found, code, repeated = np.unique(number, return_inverse=True, return_counts=True)
    width = data.shape[1] if n_features is None else n_features
    n_times = int(np.prod(data.shape[2:]))
    sums, done = np.zeros((len(found), width, n_times), np.float32), 0
    for chunk, block in iterate_blocks(data, rows):
        values = np.asarray(block[:, :width], np.float32).reshape(len(chunk), width, n_times)
        np.add.at(sums, code[done : done + len(chunk)], values)
        done += len(chunk)
    # (n_images, n_features, n_times) -> (n_images, n_times, n_features): times are samples of their channel
    means = np.ascontiguousarray((sums / repeated[:, None, None]).transpose(0, 2, 1), dtype=np.float32)
    samples = means.reshape(-1, width)
    centre, spread = samples.mean(axis=0, dtype=np.float64), samples.std(axis=0, dtype=np.float64)
    # A feature that does not vary says nothing, and must not be blown up by rounding.
    spread = np.where(spread > 1e-6 * np.maximum(np.abs(centre), np.finfo(np.float32).tiny), spread, np.inf)
    values = ((means - centre) / spread).astype(np.float32)
    return MeanResponses(found, values, centre.astype(np.float32), spread.astype(np.float32))


def make_template(
    config: CommonSpaceConfig, founders: Mapping[str, MeanResponses], n_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the response to each image in the common space, and for which images it is known.

    Parameters
    ----------
    config
        How.
    founders
        Mean responses of the subjects that define the space.
    n_images
        Number of images, including those that no founder has seen.

    Returns
    -------
    template : array of shape (n_images, n_times, n_components)
    known : bool array of shape (n_images,)
    """
    if config.kind == "functional_pca":
        return _make_pca_template(config, founders, n_images)
    axes = {name: one.find_axes(config.n_components) for name, one in founders.items()}
    n_components = max(len(found) for found in axes.values())
    n_times = next(iter(founders.values())).values.shape[1]
    scores = {}
    for name, one in founders.items():
        padded = np.zeros((len(one.rows), n_times, n_components))
        padded[..., : len(axes[name])] = one.values @ axes[name].T
        scores[name] = padded
    reference = max(sorted(founders), key=lambda name: len(founders[name].rows))
    if config.kind == "procrustes":
        if config.reference is not None and config.reference not in founders:
            raise DataError(
                f"subject_alignment.reference {config.reference!r} is none of the subjects with many training images "
                f"that others have seen ({', '.join(founders)}); name one of these."
            )
        chosen = config.reference or reference
        return _spread({chosen: scores[chosen]}, founders, n_images)
    aligned = {reference: scores[reference]}
    template, known = _spread(aligned, founders, n_images)
    # One after another, the best known images first, as the first pass of Haxby et al.
    while waiting := [name for name in sorted(founders) if name not in aligned]:
        name = max(waiting, key=lambda name: int(known[founders[name].rows].sum()))
        aligned[name] = _rotate(scores[name], founders[name], template, known, name)
        template, known = _spread(aligned, founders, n_images)
    for _ in range(_ITERATIONS):
        for name, one in founders.items():
            if config.kind == "hyperalignment":
                aligned[name] = _rotate(scores[name], one, template, known, name)
            else:
                target = template[one.rows].reshape(-1, n_components)
                basis = find_basis(one.flat(), target - target.mean(axis=0))
                aligned[name] = one.values @ basis + target.mean(axis=0)
        template, known = _spread(aligned, founders, n_images)
    return template, known


def _make_pca_template(
    config: FunctionalPcaConfig, founders: Mapping[str, MeanResponses], n_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal components of the founders' responses side by side."""
    common = set.intersection(*(set(one.rows.tolist()) for one in founders.values()))
    if len(common) < FEWEST_IMAGES:
        raise DataError(
            f"functional_pca needs training images that all of the subjects {', '.join(founders)} have "
            f"seen, but there are only {len(common)}; choose hyperalignment, which needs images that two "
            "subjects have seen, or fewer subjects."
        )
    rows = np.array(sorted(common))
    parts = [one.flat(np.searchsorted(one.rows, rows)) for one in founders.values()]
    beside = np.concatenate(parts, axis=1)
    beside -= beside.mean(axis=0)
    axes = find_axes(beside, config.n_components)
    n_times = next(iter(founders.values())).values.shape[1]
    template = np.zeros((n_images, n_times, len(axes)))
    # Divided, so that one subject or eight give responses of one size.
    template[rows] = (beside @ axes.T).reshape(len(rows), n_times, -1) / np.sqrt(len(founders))
    return template, np.isin(np.arange(n_images), rows)


def _spread(
    aligned: Mapping[str, np.ndarray], founders: Mapping[str, MeanResponses], n_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over subjects of the response to each image, and which images have one."""
    first = next(iter(aligned.values()))
    total, counts = np.zeros((n_images, *first.shape[1:])), np.zeros(n_images)
    for name, values in aligned.items():
        total[founders[name].rows] += values
        counts[founders[name].rows] += 1
    return total / np.maximum(counts, 1)[:, None, None], counts > 0


def _rotate(
    scores: np.ndarray, one: MeanResponses, template: np.ndarray, known: np.ndarray, name: str
) -> np.ndarray:
    """Return all scores of a subject, rotated and moved to fit the template on the images that it knows."""
    both = known[one.rows]
    if int(both.sum()) < FEWEST_IMAGES:
        raise DataError(
            f"subject {name} shares no training images with the subjects that were aligned before it, so "
            "there are two groups of subjects without common images; choose the subjects of one group."
        )
    rotation, centre, offset = find_rotation(
        scores[both].reshape(-1, scores.shape[-1]), template[one.rows[both]].reshape(-1, scores.shape[-1])
    )
    return np.asarray((scores - centre) @ rotation + offset)


def find_rotation(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the orthogonal matrix that takes the centred source nearest to the centred target, and both means.

    Parameters
    ----------
    source, target : arrays of shape (n_samples, n_components)
    """
    from scipy.linalg import orthogonal_procrustes

    centre, offset = source.mean(axis=0), target.mean(axis=0)
    return orthogonal_procrustes(source - centre, target - offset)[0], centre, offset


def find_basis(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the matrix W of shape (n_features, n_components) with orthonormal columns for which |X - S W'| is least.

    If there are fewer samples than components, the undetermined directions are 0.

    Parameters
    ----------
    source : array of shape (n_samples, n_features)
        X, centred.
    target : array of shape (n_samples, n_components)
        S, centred.
    """
    from scipy.linalg import svd

    left, size, right = svd(source.T.astype(np.float64) @ target, full_matrices=False)
    kept = size > 1e-7 * max(float(size[0]), 1e-300)
    return np.asarray(left[:, kept] @ right[kept])


def find_axes(values: np.ndarray, n_components: int) -> np.ndarray:
    """Return the leading principal axes of centred samples, shape (n_components or fewer, n_features).

    Parameters
    ----------
    values : array of shape (n_samples, n_features)
    n_components
        How many at most; directions without variance are left out.
    """
    from scipy.linalg import eigh

    tall = len(values) > values.shape[1]
    wide = values.astype(np.float64)
    # The smaller of the two matrices of products: features by features, or samples by samples.
    gram = wide.T @ wide if tall else wide @ wide.T
    most = min(n_components, len(values) - 1, values.shape[1])
    power, vectors = eigh(gram, subset_by_index=(len(gram) - most, len(gram) - 1), check_finite=False)
    kept = np.flatnonzero(power > 1e-7 * max(float(power[-1]), 1e-300))[
        ::-1
    ]  # ascending, so the last is first
    axes = vectors[:, kept].T if tall else (vectors[:, kept] / np.sqrt(power[kept])).T @ wide
    # The sign of an axis means nothing, but must not depend on the machine.
    largest = np.abs(axes).argmax(axis=1)
    return np.asarray(axes * np.sign(axes[np.arange(len(axes)), largest])[:, None])


def fit_map(config: CommonSpaceConfig, means: MeanResponses, template: np.ndarray) -> SubjectMap:
    """Map one subject to a finished template.

    Parameters
    ----------
    config
        How.
    means
        Mean responses of the subject.
    template : array of shape (n_images, n_times, n_components)
    """
    n_components = template.shape[2]
    source, target = means.flat(), template[means.rows].reshape(-1, n_components).astype(np.float64)
    if config.kind == "functional_pca":
        from sklearn.linear_model import RidgeCV

        # As many dimensions as samples or features share the power of all features.
        unit = max(source.shape)
        ridge = RidgeCV(alphas=[unit * penalty for penalty in _PENALTIES]).fit(source, target)
        matrix, offset = ridge.coef_.reshape(n_components, -1).T, np.ravel(ridge.intercept_)
    elif config.kind == "shared_response":
        offset = target.mean(axis=0)
        matrix = find_basis(source, target - offset)
    else:
        axes = means.find_axes(config.n_components)[:n_components]
        scores = np.zeros((len(source), n_components))
        scores[:, : len(axes)] = source @ axes.T
        rotation, centre, offset = find_rotation(scores, target)
        matrix, offset = axes.T @ rotation[: len(axes)], offset - centre @ rotation
    scaled = matrix / means.spread[:, None].astype(np.float64)  # 0 for features that do not vary
    return SubjectMap(means.centre, scaled.astype(np.float32), np.asarray(offset, np.float32))
