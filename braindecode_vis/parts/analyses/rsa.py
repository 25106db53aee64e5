"""Representational similarity: whether images that are similar in a layer, or in another brain, are similar in the
brain.

Owns the analysis of subjects with each other, with image spaces and with another recording of the same images,
dissimilarity matrices, the comparison of several layers with the brain, and the noise ceiling over subjects. It
compares geometries, so no mapping is fitted and no test image can leak into one. Dissimilarities are those of mean
responses to test images (or all images). With windows of time and another modality, the result is a fusion in the sense
of Cichy.

rsatoolbox gives the same dissimilarities, correlations and ceilings (a test compares them), but no p-value from
permuted images, and takes far longer.

References
----------
Kriegeskorte et al. (2008), doi:10.3389/neuro.06.004.2008; Nili et al. (2014), PLOS Comput. Biol. 10 (noise ceiling);
Cichy et al. (2014), doi:10.1038/nn.3635.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError, check_option
from braindecode_vis.base.contracts import Analysis, ImageEncoder
from braindecode_vis.base.digests import digest_file
from braindecode_vis.base.registry import LayerConfig
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.store import read_responses
from braindecode_vis.parts.analyses.cuts import Window, cut_window, make_sliding_windows, match_window
from braindecode_vis.parts.analyses.measure import add_maximum, find_best
from braindecode_vis.parts.analyses.regions import split_regions
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.report.drawing import draw_bars, draw_curve, draw_matrix, mark_stimulus
from braindecode_vis.scoring.score_row import format_p_value
from braindecode_vis.scoring.uncertainty import compute_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["spearman", "pearson"]


class RsaConfig(Analysis):
    """Compare dissimilarities of images.

    Parameters
    ----------
    distance
        ``correlation``, ``cosine`` or ``euclidean``, for brains and models.
    trials
        ``test`` trials, or ``all``.
    layers
        Image encoders in addition to the spaces of the run.
    other
        Folder of another run or of its responses, or several: the same images (by id) in other subjects or another
        modality. In windows of time, another EEG or MEG is cut to the same window.
    regions
        Compare with every region of interest of other fMRI, or every network of its parcels, instead of all of it.
    width, step
        Windows of time in s; without a width, whole trials.
    """

    kind: Literal["rsa"] = "rsa"
    distance: Literal["correlation", "cosine", "euclidean"] = "correlation"
    trials: Literal["test", "all"] = "test"
    layers: tuple[LayerConfig, ...] = ()
    other: tuple[Path, ...] = ()
    regions: bool = False
    width: float | None = Field(default=None, gt=0)
    step: float = Field(default=0.05, gt=0)

    #: Resamples and shuffles of the images.
    n_resamples: ClassVar[int] = 300
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_resamples"})

    uses_encoder: ClassVar[bool] = False
    not_hashed: ClassVar[frozenset[str]] = frozenset({"other"})
    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"regions"})

    @field_validator("other", mode="before")
    @classmethod
    def _as_several(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _check_regions(self) -> RsaConfig:
        if self.regions and not self.other:
            raise ValueError("regions are those of another run; name its folder in other")
        return self

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and a digest of the other responses."""
        fields = super().hashed_fields()
        if self.other:
            # Not its path: a run that was moved is the same one.
            digests = [digest_file(find_responses(place) / "data.npy") for place in self.other]
            fields["other_sha256"] = digests if len(digests) > 1 else digests[0]
            if self.width is not None:
                fields["other_windows"] = "the same"
        return fields

    def compute(self, study: Study) -> Findings:
        """Compare subjects, models and the other recording, window by window."""
        responses = (
            average_test_trials(study) if self.trials == "test" else average_repetitions(study.responses)
        )
        windows: list[Window | None] = [None]
        if self.width is not None:
            windows = list(make_sliding_windows(responses, self.width, self.step, None, None))
        models = (
            {f"model {k}": v for k, v in collect_layers(study, self.layers, True).items()}
            if study.banks
            else {}
        )
        others = self._read_others()
        rows: list[dict[str, Any]] = []
        with study.progress("dissimilarities", len(windows)) as advance:
            for window in windows:
                parts = {name: match_window(part, window) for name, part in others.items()}
                there = {
                    f"other {name}".replace("{}", who): rows_of
                    for name, part in parts.items()
                    if part is not None
                    for who, rows_of in embed_subjects(part).items()
                }
                rows += self._compare(study, responses, models | there, window)
                advance(1)
        if not rows:
            raise DataError(
                "there is one subject, no image space and no other recording: nothing to compare."
            )
        # Models compete with models, and pairs of subjects with pairs.
        against = [
            [r for r in rows if (r["first"] == "all subjects") == of_models] for of_models in (True, False)
        ]
        return self._report(pd.DataFrame([row for part in against for row in add_maximum(part)]))

    def _read_others(self) -> dict[str, Responses]:
        """Return mean responses to images by name of run and region, with braces in the place of the subject."""
        others: dict[str, Responses] = {}
        for place in self.other:
            found = average_repetitions(read_responses(find_responses(place)))
            name = f"{place.name} {{}}" if len(self.other) > 1 else "{}"
            parts = split_regions(found) if self.regions else {"": found}
            for region, part in parts.items():
                label = f"{name} {region}".strip()
                if label in others:
                    raise DataError(
                        f"two of the other runs are in folders of the name {place.name!r}; rename one, so that their "
                        "rows can be distinguished."
                    )
                others[label] = part
        return others

    def _compare(
        self, study: Study, responses: Responses, models: dict[str, Embeddings], window: Window | None
    ) -> list[dict[str, Any]]:
        brains = embed_subjects(responses if window is None else cut_window(responses, window))
        # The same for all subjects, as `embed_subjects` sees to.
        ids = list(next(iter(brains.values())).ids)
        # Spaces hold every image; another recording may have shown fewer.
        for name, model in models.items():
            if name.startswith("other "):
                there = set(model.ids.tolist())
                ids = [i for i in ids if i in there]
        if len(ids) < 3:
            raise DataError(f"the other recording has {len(ids)} of these images; at least 3 are needed.")
        brains = {name: rows.select(ids) for name, rows in brains.items()}
        rows = []
        if models:
            match = self._match(study, brains, {name: model.select(ids) for name, model in models.items()})
            rows += [{**r, "first": "all subjects"} for r in _list_rows(match, window)]
        for first, second in combinations(brains, 2):
            match = self._match(study, {first: brains[first]}, {f"subject {second}": brains[second]})
            rows += [{**r, "first": f"subject {first}"} for r in _list_rows(match, window)]
        return rows

    def _match(self, study: Study, brain: dict[str, Embeddings], others: dict[str, Embeddings]) -> BrainMatch:
        return compare_layers_with_brain(
            brain, others, metric=self.distance, n_bootstrap=self.n_resamples, n_permutations=self.n_resamples,
            seed=study.seed,
        )  # fmt: skip

    def _report(self, table: pd.DataFrame) -> Findings:
        table = table[["first", "second", *[c for c in table.columns if c not in ("first", "second")]]]
        models = table[table["first"] == "all subjects"]
        pairs = table[table["first"] != "all subjects"]
        in_time = table["start"].notna().any()

        def draw(figure: Figure) -> None:
            n = int(len(models) > 0) + int(len(pairs) > 0)
            panels = list(figure.subplots(1, n, squeeze=False)[0])
            if len(models):
                axes = panels.pop(0)
                if in_time:
                    _draw_times(axes, models)
                else:
                    draw_bars(axes, models, [shorten(s, 24) for s in models["second"]])
                    low, high = models["ceiling_low"].iloc[0], models["ceiling_high"].iloc[0]
                    if pd.notna(low):
                        axes.axvspan(low, high, color="C1", alpha=0.25, lw=0, label="noise ceiling")
                        axes.legend()
                    axes.set_xlabel("Spearman correlation")
            if len(pairs):
                _draw_pairs(figure, panels.pop(0), pairs)

        parts = []
        if len(models):
            best = find_best(models)
            parts.append(f"Closest to the brain: {_say(best)}")
            if pd.notna(best["ceiling_low"]):
                parts.append(f"noise ceiling {best['ceiling_low']:.3f} to {best['ceiling_high']:.3f}")
        if len(pairs):
            best = find_best(pairs)
            parts.append(f"mean over pairs of subjects {pairs['value'].mean():.3f}, largest {_say(best)}")
        found = "; ".join(parts) + "."
        caption = (
            "Spearman correlation of dissimilarities of images with 95 % intervals over images; left: models and other "
            "recordings against the mean over subjects, right: subject against subject."
        )
        how = f"{self.distance.capitalize()} distances between mean responses to {int(table['n'].iloc[0])} images."
        return Findings(
            "Similarity of geometries",
            f"{how} {found}",
            table,
            (Plot("rsa", caption, found, draw, (7.4, 3.6)),),
        )


def _say(row: pd.Series) -> str:
    when = "" if pd.isna(row["start"]) else f" at {(row['start'] + row['stop']) * 500:.0f} ms"
    return (
        f"{row['first']} and {row['second']}{when}, {row['value']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, "
        f"{format_p_value(row['p_maximum'], in_words=True)}, corrected for all comparisons)"
    )


def _list_rows(match: BrainMatch, window: Window | None) -> list[dict[str, Any]]:
    return [
        {
            "second": layer.layer, "start": window.start if window else np.nan,
            "stop": window.stop if window else np.nan, "value": layer.rho, "ci_low": layer.ci_low,
            "ci_high": layer.ci_high, "chance": 0.0, "n": match.n_images, "p_value": layer.p_value,
            "observed": layer.rho, "null": layer.null,
            "ceiling_low": np.nan if match.ceiling_low is None else match.ceiling_low,
            "ceiling_high": np.nan if match.ceiling_high is None else match.ceiling_high, "resampled": "images",
        }
        for layer in match.layers
    ]  # fmt: skip


def _draw_times(axes: Any, models: pd.DataFrame) -> None:
    mark_stimulus(axes)
    for number, (name, own) in enumerate(models.groupby("second", sort=False)):
        draw_curve(
            axes,
            (own["start"] + own["stop"]) * 500,
            own,
            colour=f"C{number % 6}",
            label=shorten(str(name), 24),
        )
    axes.axhline(0, color="C2", lw=1, ls="--")
    axes.set_xlabel("middle of the window (ms)")
    axes.set_ylabel("Spearman correlation")
    axes.legend(fontsize=7)


def _draw_pairs(figure: Any, axes: Any, pairs: pd.DataFrame) -> None:
    mean = pairs.groupby(["first", "second"], sort=False)["value"].mean().reset_index()
    names = list(dict.fromkeys([*mean["first"], *mean["second"]]))
    grid = np.full((len(names), len(names)), np.nan)
    for first, second, value in zip(mean["first"], mean["second"], mean["value"], strict=True):
        a, b = names.index(first), names.index(second)
        grid[a, b] = grid[b, a] = value
    draw_matrix(figure, axes, grid, label="Spearman correlation")
    labels = [name.removeprefix("subject ") for name in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel("subject")


def find_responses(folder: Path) -> Path:
    """Return the folder of responses in a run folder, or the folder itself if it is one.

    Raises
    ------
    DataError
        If there are none, or several.
    """
    place = folder.expanduser()
    if (place / "meta.json").is_file() and (place / "data.npy").is_file():
        return place
    if (place / "config.yaml").is_file():  # earlier settings may have left responses of their own
        return preprocess(open_finished(place)).artifact.path / "responses"
    found = sorted(p.parent for p in place.rglob("responses/meta.json") if (p.parent / "data.npy").is_file())
    if len(found) != 1:
        raise DataError(
            f"{place} holds {len(found)} folders of responses; give the one to compare with, a folder with data.npy "
            "and meta.json."
        )
    return found[0]


# --- layers and brains as rows by image ----------------------------------------------------------------------------


def shorten(name: str, length: int = 34) -> str:
    """Return a space's name at most `length` characters long."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def collect_layers(study: Study, layers: Sequence[Any], with_targets: bool) -> dict[str, Embeddings]:
    """Return the banks of the named layers, then those of the run.

    Raises
    ------
    DataError
        If there is none.
    """
    from braindecode_vis.base.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import embed_stimuli

    banks: dict[str, Embeddings] = {}
    stimuli = study.stimuli.select_pictured()
    for config in layers:
        encoder = roles.build(ImageEncoder, config)
        with study.progress(f"encoding images: {config.kind}", len(stimuli)) as advance:
            embed_cached = partial(embed_stimuli, stimuli=stimuli, cache=find_cache_folder(), advance=advance)
            bank = encoder.embed(stimuli, list(stimuli.ids), embed_cached)
        banks[bank.space] = bank
    if with_targets:
        for name, bank in study.spaces.items():
            banks.setdefault(name, bank)
    if not banks:
        raise DataError("there is no layer to compare; list image encoders in layers.")
    return banks


def average_test_trials(study: Study) -> Responses:
    """Return the test trials of all folds, one per subject and image."""
    rows = np.concatenate([fold.test for fold in study.folds])
    return average_repetitions(study.responses, np.unique(rows))


def embed_subjects(responses: Responses) -> dict[str, Embeddings]:
    """Return each subject's patterns as rows by image; images that not everybody saw are left out.

    Raises
    ------
    DataError
        If fewer than three images remain.
    """
    subjects = responses.trials["subject"].astype(str).to_numpy()
    ids = responses.stimulus_ids
    names = list(dict.fromkeys(subjects.tolist()))
    common = set(ids.tolist())
    for name in names:
        common &= set(ids[subjects == name].tolist())
    shared = [i for i in dict.fromkeys(ids.tolist()) if i in common]
    if len(shared) < 3:  # two images have one dissimilarity, which correlates with nothing
        raise DataError(
            f"{len(names)} subjects have {len(shared)} test images in common; at least 3 are needed."
        )
    # (n_trials, features of all axes)
    data = responses.as_matrix()
    return {s: Embeddings(data[subjects == s], ids[subjects == s], "brain").select(shared) for s in names}


# --- dissimilarities -----------------------------------------------------------------------------------------------


def compute_rdm(vectors: np.ndarray, *, metric: str = "correlation") -> np.ndarray:
    """Return the dissimilarities of all pairs of rows, shape (n_rows * (n_rows - 1) / 2,), in scipy's order.

    Parameters
    ----------
    vectors : float array of shape (n_rows, ...)
    metric
        ``correlation``, ``cosine`` or ``euclidean``.

    Raises
    ------
    DataError
        If a row is constant (correlation) or zero (cosine), naming it.
    """
    from scipy.spatial.distance import pdist

    check_option("metric", metric, ("correlation", "cosine", "euclidean"))
    # (n_rows, n_features)
    flat = np.asarray(vectors, dtype=np.float64).reshape(len(vectors), -1)
    if len(flat) < 3:
        raise DataError("representational similarity needs at least three rows.")
    spread = {"correlation": np.ptp(flat, axis=1), "cosine": np.abs(flat).max(axis=1)}.get(metric)
    if spread is not None and (spread == 0).any():
        raise DataError(
            f"row {int(np.flatnonzero(spread == 0)[0])} is {'constant' if metric == 'correlation' else 'zero'}, so its "
            f"{metric} distance has no value; use euclidean or leave the row out."
        )
    return pdist(flat, metric)


@dataclass(frozen=True)
class LayerMatch:
    """How well one layer's dissimilarities agree with the brain's.

    Parameters
    ----------
    layer
        Name.
    rho
        Spearman (or Pearson) correlation of the dissimilarities, the mean over subjects.
    ci_low, ci_high
        95 % interval over resampled images.
    p_value
        One-sided, from permuted images.
    null : array of shape (n_permutations,)
        `rho` under each permutation; all layers and windows of a seed share them.
    """

    layer: str
    rho: float
    ci_low: float
    ci_high: float
    p_value: float
    null: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class BrainMatch:
    """Every layer against the brain, best first as given, with what any model could reach.

    Parameters
    ----------
    layers
        One entry per layer, in the order given.
    ceiling_low, ceiling_high
        Noise ceiling: each subject against the mean of the others, and against the mean of all. None for one subject.
    n_images, n_subjects
        What the numbers rest on.
    """

    layers: tuple[LayerMatch, ...]
    ceiling_low: float | None
    ceiling_high: float | None
    n_images: int
    n_subjects: int


def compare_layers_with_brain(
    brain: Mapping[str, Embeddings],
    layers: Mapping[str, Embeddings],
    *,
    metric: str = "correlation",
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> BrainMatch:
    """Compare the dissimilarities of images in the brain with those in each layer of a network.

    Parameters
    ----------
    brain
        Mean response pattern per image for each subject, all with the same ids (any order), one row per id.
    layers
        Embeddings of the same images by name of the layer.
    metric
        Of `compute_rdm`.
    n_bootstrap
        Resamples of the images behind the intervals. Dissimilarities keep the rank that they have among all images;
        pairs of an image with its own copy are left out.
    n_permutations
        Shuffles of the images behind the p-values.
    seed
        Root of both.

    Raises
    ------
    DataError
        If a subject or a layer lacks an image.
    """
    from scipy.spatial.distance import squareform

    if not brain or not layers:
        raise DataError("representational similarity needs at least one subject and one layer.")
    ids = list(next(iter(brain.values())).ids)
    subjects, models = (
        {
            name: squareform(compute_rdm(rows.select(ids).vectors, metric=metric))
            for name, rows in side.items()
        }
        for side in (brain, layers)
    )
    return compare_rdms(subjects, models, n_bootstrap=n_bootstrap, n_permutations=n_permutations, seed=seed)


def compare_rdms(
    subjects: Mapping[str, np.ndarray],
    models: Mapping[str, np.ndarray],
    *,
    measure: Measure = "spearman",
    n_bootstrap: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> BrainMatch:
    """Compare dissimilarities that are known already, for example published ones.

    Parameters
    ----------
    subjects, models
        Symmetric matrix of shape (n_images, n_images) by name of the subject or the model, images in one order.
    measure
        ``spearman`` or ``pearson`` correlation of the upper triangles.
    n_bootstrap, n_permutations, seed
        As in `compare_layers_with_brain`.

    Raises
    ------
    DataError
        If a matrix is not square and symmetric, or of another number of images.

    Examples
    --------
    >>> points = np.random.default_rng(0).normal(size=(8, 3))
    >>> distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    >>> found = compare_rdms({"01": distances}, {"same": 2 * distances}, n_bootstrap=9, n_permutations=9)
    >>> round(found.layers[0].rho, 6)  # the last digits depend on the processor
    1.0
    """
    check_option("measure", measure, ("spearman", "pearson"))
    if not subjects or not models:
        raise DataError("representational similarity needs at least one subject and one layer.")
    n = len(next(iter(subjects.values())))
    for name, rdm in {**subjects, **models}.items():
        if rdm.shape != (n, n) or n < 3 or not np.allclose(rdm, rdm.T):
            raise DataError(
                f"the dissimilarities of {name!r} have the shape {rdm.shape}; a finite, symmetric matrix of {n} "
                "images, at least 3, is expected."
            )
    pairs = np.triu_indices(n, 1)
    weigh = _rank if measure == "spearman" else _centre
    # Mean-free and of length one: a correlation is then a product.
    theirs = [_square(weigh(np.asarray(rdm, np.float64)[pairs]), n) for rdm in subjects.values()]
    draws = [make_generator(seed, "rsa bootstrap", b).integers(n, size=n) for b in range(n_bootstrap)]
    draws = [
        draw for draw in draws if len(np.unique(draw)) > 2
    ]  # two images have one dissimilarity, no correlation
    shuffles = [make_generator(seed, "rsa permutation", p).permutation(n) for p in range(n_permutations)]
    mean_subject = np.mean(theirs, axis=0)[
        pairs
    ]  # the mean correlation is the one with the mean of the ranks
    matches = []
    for name, model in models.items():
        own = _square(weigh(np.asarray(model, np.float64)[pairs]), n)
        rho = float(mean_subject @ own[pairs])
        spread = [_resample(theirs, own, draw) for draw in draws]
        low, high = np.percentile(spread, [2.5, 97.5]) if spread else (rho, rho)
        # Images are shuffled and not pairs, since the pairs of one image are not independent.
        null = np.array([mean_subject @ own[np.ix_(shuffle, shuffle)][pairs] for shuffle in shuffles])
        p_value = float(compute_p_value(rho, null))
        matches.append(LayerMatch(name, rho, float(low), float(high), p_value, null))
    several = len(subjects) > 1
    low_ceiling, high_ceiling = (
        compute_noise_ceiling(list(subjects.values()), measure) if several else (None, None)
    )
    return BrainMatch(tuple(matches), low_ceiling, high_ceiling, n, len(subjects))


def _square(pairs: np.ndarray, n: int) -> np.ndarray:
    from scipy.spatial.distance import squareform

    assert len(pairs) == n * (n - 1) // 2
    return squareform(pairs)


def _resample(subjects: Sequence[np.ndarray], model: np.ndarray, draw: np.ndarray) -> float:
    """Return the mean correlation over subjects of the ranks among resampled images."""
    upper = np.triu_indices(len(draw), 1)
    rows, columns = draw[upper[0]], draw[upper[1]]
    distinct = rows != columns  # an image and its own copy have no dissimilarity
    rows, columns = rows[distinct], columns[distinct]
    own = _centre(model[rows, columns])
    return float(np.mean([_centre(subject[rows, columns]) @ own for subject in subjects]))


def _centre(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-12)


def _rank(values: np.ndarray) -> np.ndarray:
    """Return mean-free ranks of length one; all zeros if every value is the same."""
    from scipy.stats import rankdata

    return _centre(rankdata(values))


def compute_noise_ceiling(rdms: Sequence[np.ndarray], measure: Measure = "spearman") -> tuple[float, float]:
    """Return the lower and upper bound of the correlation that any model can reach with these subjects.

    Parameters
    ----------
    rdms : sequence of square arrays of shape (n_images, n_images)
        One per subject, at least two.
    measure
        As in `compare_rdms`.
    """
    if len(rdms) < 2:
        raise DataError("a noise ceiling needs at least two subjects.")
    upper = np.triu_indices(len(rdms[0]), 1)
    weigh = _rank if measure == "spearman" else _centre
    ranks = np.stack([weigh(rdm[upper]) for rdm in rdms])
    total = ranks.sum(axis=0)
    # The mean of the others is a model that any other may be worse than; that of all, one that none can beat.
    lower = float(np.mean([weigh(total - own) @ own for own in ranks]))
    return lower, float(np.mean([weigh(total) @ own for own in ranks]))
