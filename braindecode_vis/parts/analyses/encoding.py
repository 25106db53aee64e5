"""How well responses are predicted from images: encoding models per voxel, parcel, or channel and time, with maps.

Owns the fit on each subject's training trials, the comparison with its test responses (repetitions averaged), and the
maps. The noise ceiling, of the same test trials, says what a perfect model would reach; a value divided by it compares
places of different noise, and does not bound a score from above. Subjects are fitted and reported separately.

References
----------
Naselaris et al. (2011), doi:10.1016/j.neuroimage.2010.07.073 (encoding and decoding). Allen et al. (2022),
doi:10.1038/s41593-021-00962-x (ceiling). Dupré la Tour et al. (2022), doi:10.1016/j.neuroimage.2022.119728.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Responses, Score, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.registry import LayerConfig
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.store import write_json
from braindecode_vis.encoders.encoding_model import EncodingModelConfig, count_fits, fit_encoding
from braindecode_vis.parts.analyses.analysis_figures import write_nifti
from braindecode_vis.parts.analyses.brain_score import (
    LEAST_SHARE,
    SubjectScore,
    correlate_predictions,
    pool_subjects,
    score_groups,
)
from braindecode_vis.parts.analyses.cuts import TimedAnalysis, Window, make_sliding_windows
from braindecode_vis.parts.analyses.patterns import list_columns
from braindecode_vis.parts.analyses.rsa import collect_layers, shorten
from braindecode_vis.parts.analyses.study import Attachment, Findings, Plot, Study
from braindecode_vis.preprocessing.noise_ceiling import (
    CeilingMeasure,
    ResponseCeiling,
    compute_noise_ceilings,
    describe_ceiling,
    find_root,
)
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.preprocessing.voxel_geometry import find_networks, inverse_transform, read_geometry
from braindecode_vis.report.drawing import draw_bars, draw_curve, find_flat_positions, place_pattern
from braindecode_vis.report.sensor_groups import assign_regions
from braindecode_vis.scoring.metrics.brain_correlation import (
    WHOLE,
    RegionCorrelation,
    ResponseMaps,
    correlate_responses,
    map_responses,
)
from braindecode_vis.scoring.score_row import format_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_MAPS = 8  # of a head over time, and of subjects


class EncodingConfig(TimedAnalysis):
    """Predict responses from images, and make maps of the accuracy.

    Parameters
    ----------
    features
        Image encoders whose embeddings are the features; list several layers as several entries. Empty takes the run's
        target.
    model
        How several spaces are combined, and the penalties.
    noise_ceiling
        How the ceiling is estimated from repeated test images, as for ``evaluation.noise_ceiling``. None leaves it out.
    width
        Trials with a time axis: samples are averaged over windows of this many seconds; None keeps every sample.
    n_resamples
        Resamples of the images behind the intervals of maps, and shuffles behind their p-values.
    glass
        Draw volumes in nilearn's glass brain; only useful in MNI space.
    judge
        ``brain_score`` adds the scores by Brain-Score's own rule and a file with them; see
        `braindecode_vis.parts.analyses.brain_score`. It needs one image space, one fold and a noise ceiling.
    """

    kind: Literal["encoding"] = "encoding"
    features: tuple[LayerConfig, ...] = ()
    model: EncodingModelConfig = EncodingModelConfig()
    noise_ceiling: CeilingMeasure | None = "ncsnr"
    width: float | None = Field(default=None, gt=0)
    n_resamples: int = Field(default=1000, ge=100)
    glass: bool = False
    judge: Literal["brain_score"] | None = None

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"judge"})

    #: Values are divided by the ceiling where it is at least this (a choice of ours); below, they would be
    #: noise over noise.
    least_ceiling: ClassVar[float] = 0.1
    #: False discovery rate at which a map calls a response significant.
    fdr: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"least_ceiling", "fdr"})

    uses_encoder: ClassVar[bool] = False

    def compute(self, study: Study) -> Findings:
        """Fit each subject's model on its training trials, and compare it with its test responses."""
        if not study.banks:
            raise DataError("encoding predicts responses from images, and this run decodes categories.")
        windows = self._find_windows(study.responses)
        spaces = collect_layers(study, self.features, False) if self.features else None
        names = list(spaces) if spaces is not None else [study.banks[0].space]
        if self.judge is not None and (len(names) > 1 or len(study.folds) > 1):
            raise ConfigError(
                f"Brain-Score fits one image space on one split, but the run has {len(names)} of them and "
                f"{len(study.folds)} folds; set encode.features and split.kind, or leave out encode.judge."
            )
        subjects = list(dict.fromkeys(study.responses.trials["subject"].astype(str)))
        n_steps = len(subjects) * len(study.folds) * count_fits(len(names), self.model)
        found = []
        with study.progress("encoding models", n_steps) as advance:
            for who in subjects:
                part = self._fit_subject(study, who, spaces, windows, advance)
                found += [part] if part is not None else []
        if not found:
            raise DataError(
                "no subject has training and test trials in one fold; an encoding model needs both."
            )
        return self._report(study, found, names, windows)

    def _find_windows(self, responses: Responses) -> list[Window] | None:
        """Return windows of time to average over; None for data without time."""
        if "time" in responses.dims:
            if len(responses.dims) != 3 or responses.dims[2] != "time":
                raise DataError(
                    "encoding takes trials of channels, parcels or voxels, with or without times, not "
                    f"{responses.dims}."
                )
            times = np.asarray(responses.coords["times"], float)
            interval = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
            width = self.width or interval
            return make_sliding_windows(responses, width, width, self.tmin, self.tmax)
        if self.width is not None or self.tmin is not None or self.tmax is not None:
            raise ConfigError(
                "encode.width, tmin and tmax are for trials with a time axis; leave them out here."
            )
        return None

    def _fit_subject(
        self, study: Study, who: str, spaces: Mapping[str, Embeddings] | None, windows: Any, advance: Any
    ) -> _Subject | None:
        """Fit and compare one subject over all folds; None if no fold trains and tests it."""
        parts, shares, judged = [], [], None
        n_own = count_own_voxels(study.responses).get(who)
        is_own = (study.responses.trials["subject"].astype(str) == who).to_numpy()
        tested = []
        for number, fold in enumerate(study.folds):
            rows = [part[is_own[part]] for part in (fold.train, fold.test)]
            if not len(rows[0]) or not len(rows[1]):
                continue
            train, test = study.pick(rows[0], "train"), average_repetitions(study.responses, rows[1])
            banks = {study.banks[number].space: study.banks[number]} if spaces is None else spaces
            learnt, asked = (
                {name: bank.select(list(part.stimulus_ids)) for name, bank in banks.items()}
                for part in (train, test)
            )
            model = fit_encoding(
                learnt, as_columns(train, windows, n_own), config=self.model,
                seed=derive_seed(study.seed, "encoding", number), advance=advance,
            )  # fmt: skip
            predicted = np.stack(model.predict_by_space(asked))  # (n_spaces, n_images, n_responses)
            measured = as_columns(test, windows, n_own) - model.mean
            if len(study.folds) > 1:
                # Folds have different training means, which would correlate over images.
                measured = measured - measured.mean(axis=0)
                predicted = predicted - predicted.mean(axis=1, keepdims=True)
            parts.append((predicted, measured, study.find_clusters(test)))
            if self.judge is not None:
                averaged, (bank,) = average_repetitions(study.responses, rows[0]), banks.values()
                judged = correlate_predictions(
                    *(
                        (bank.select(list(part.stimulus_ids)).flat(), as_columns(part, windows, n_own))
                        for part in (averaged, test)
                    )
                )
            shares.append(model.shares)
            tested.append(rows[1])
        if not parts:
            return None
        by_space = np.concatenate([part[0] for part in parts], axis=1)
        measured, clusters = (np.concatenate([part[n] for part in parts]) for n in (1, 2))
        if len(measured) < 3:
            raise DataError(f"subject {who} has {len(measured)} test images; a correlation needs three.")
        predicted = by_space.sum(axis=0)
        groups = list_groups(study.responses, who, windows)
        maps = map_responses(
            predicted, measured, n_boot=self.n_resamples, n_permutations=self.n_resamples, seed=study.seed,
            clusters=clusters, unit=study.unit, over_folds=len(parts) > 1,
        )  # fmt: skip
        overall = correlate_responses(
            [predicted], measured, regions=groups, n_boot=self.n_resamples,
            n_permutations=self.n_resamples, seed=study.seed, clusters=clusters, unit=study.unit,
            over_folds=len(parts) > 1,
        )  # fmt: skip
        ceiling, source = self._find_ceiling(study, np.concatenate(tested), who, windows)
        # What each space adds: the product measure, whose sum is the variance that all explain together.
        power = np.maximum((measured**2).sum(axis=0), 1e-30)
        added = np.stack([(part * (2 * measured - predicted)).sum(axis=0) / power for part in by_space])
        return _Subject(
            who, maps, overall.regions, groups, ceiling, source, np.mean(shares, axis=0), added, len(measured), judged,
        )  # fmt: skip

    def _find_ceiling(
        self, study: Study, rows: np.ndarray, who: str, windows: list[Window] | None
    ) -> tuple[ResponseCeiling | None, str]:
        """Return the ceiling of the responses, and in words how it was estimated or why there is none."""
        if self.noise_ceiling is None:
            return None, "the noise ceiling was not requested"
        try:
            if windows is not None and self.noise_ceiling == "published":
                raise DataError("no map is published for trials with a time axis; choose ncsnr.")
            responses = study.responses.select(np.sort(rows))
            (found,) = compute_noise_ceilings(
                responses if windows is None else average_windows(responses, windows),
                np.arange(len(rows)), measure=self.noise_ceiling, seed=study.seed,
            )  # fmt: skip
            return found, found.source
        except DataError as error:
            return None, f"no noise ceiling: {error}"

    # --- what is told ---------------------------------------------------------------------------------------

    def _report(
        self, study: Study, found: Sequence[_Subject], names: list[str], windows: list[Window] | None
    ) -> Findings:
        columns = list_columns(study.responses)
        table = pd.concat([self._tabulate(study, one, names, columns, windows) for one in found])
        scores = tuple(score for one in found for score in _make_scores(study, one))
        sentences = []
        for one in found:
            whole, q = one.regions[WHOLE], one.maps.q_value
            bound = "" if one.ceiling is None else f", noise ceiling {describe_ceiling(one.ceiling)}"
            best, p = int(np.argmax(one.maps.correlation)), format_p_value(whole.p_value, in_words=True)
            sentences.append(
                f"subject {one.subject}: mean correlation {whole.value:.3f} ({_describe_limits(whole)}, chance "
                f"{whole.chance:.3f}, {p}{bound}) over "
                f"{len(q)} responses and {one.n_images} test images, {100 * float((q <= self.fdr).mean()):.0f} % of "
                f"them at q <= {self.fdr:g}, at most {one.maps.correlation[best]:.3f}"
            )
            if len(names) > 1:
                order = np.argsort(-one.added.mean(axis=1))
                said = ", ".join(f"{shorten(names[n])} {one.added[n].mean():.3f}" for n in order)
                sentences[-1] += f"; explained by space: {said}"
            if one.ceiling is None:
                sentences[-1] += f" ({one.source.rstrip('.')})"
        how = (
            f"Ridge from {len(names)} image space{'s' * (len(names) > 1)} ({self.model.combine}) to each response, "
            "fitted on training trials with penalties of inner folds. "
            if len(names) > 1
            else f"Ridge from {shorten(names[0])} to each response, fitted on training trials with penalties of inner "
            "folds. "
        )
        plots = [self._plot_map(study, one, windows) for one in found[:_MOST_MAPS]]
        if windows is not None and len(windows) > 1:
            plots.append(_plot_times(found, windows))
        if any(len(one.groups) > 1 for one in found):
            plots.append(_plot_groups(found))
        if len(names) > 1:
            plots.append(_plot_spaces(found, names))
        files = [file for one in found for file in self._make_files(study, one, names, windows)]
        if self.judge is not None:
            rows, sentence, file = _judge(study, found)
            scores, files = (*scores, *rows), [*files, file]
            sentences.append(sentence)
        return Findings(
            "Encoding models", f"{how}{'; '.join(sentences)}.", table.reset_index(drop=True), tuple(plots), scores,
            tuple(files),
        )  # fmt: skip

    def _normalise(self, one: _Subject) -> np.ndarray:
        """Return the correlation divided by its ceiling, NaN where that is too low or not known."""
        if one.ceiling is None:
            return np.full(len(one.maps.correlation), np.nan)
        single = one.ceiling.per_feature
        enough = single >= self.least_ceiling
        return np.where(enough, one.maps.correlation / np.where(enough, single, 1), np.nan)

    def _tabulate(
        self, study: Study, one: _Subject, names: list[str], columns: list[str], windows: list[Window] | None
    ) -> pd.DataFrame:
        n, maps = len(one.maps.correlation), one.maps
        repeated = len(windows) if windows is not None else 1
        table = pd.DataFrame(
            {"subject": one.subject, "column": np.repeat(columns[: n // repeated], repeated)}
        )
        if windows is not None:
            for edge in ("start", "stop"):
                table[edge] = np.tile([getattr(window, edge) for window in windows], n // repeated)
        table = table.assign(
            value=maps.correlation, ci_low=maps.ci_low, ci_high=maps.ci_high, chance=0.0, n=one.n_images,
            p_value=maps.p_value, q_value=maps.q_value, explained=maps.explained,
            **_list_ceilings(one.ceiling), normalised=self._normalise(one),
            resampled=maps.resampled,
        )  # fmt: skip
        if len(names) > 1:
            table["space"] = np.asarray(names, dtype=object)[one.shares.argmax(axis=1)]
        return table

    def _plot_map(self, study: Study, one: _Subject, windows: list[Window] | None) -> Plot:
        values = one.maps.correlation
        best = int(np.argmax(values))
        caption = f"Correlation of predicted and measured responses of subject {one.subject} over {one.n_images} images"
        alt = f"largest correlation {values[best]:.3f}, mean {values.mean():.3f}"
        name = f"map_sub-{one.subject}"
        if windows is not None and study.responses.dims[1] == "channel":
            grid = values.reshape(-1, len(windows))
            places = find_flat_positions(study.responses)
            if places is not None:
                draw = partial(_draw_heads, grid=grid, windows=windows, places=places)
                return Plot(name, f"{caption}, on the head from above.", alt, draw, (7.4, 2.0))
            draw = partial(_draw_grid, grid=grid, windows=windows)
            return Plot(name, f"{caption}; rows are channels.", alt, draw, (7.0, 3.4))
        if windows is not None:
            values = values.reshape(-1, len(windows)).mean(axis=1)
            caption += ", mean over times"
        image = place_pattern(
            study.responses, _fill(study.responses, values), subject=_name_brain(study, one)
        )
        if image is None:
            return Plot(name, f"{caption}.", alt, partial(_draw_histogram, one=one), (7.0, 2.6))
        if self.glass:
            return Plot(
                name,
                f"{caption}, in the glass brain of the MNI template.",
                alt,
                partial(_draw_glass, image=image),
            )
        return Plot(name, f"{caption}, slices in the space of the data.", alt, partial(_draw_slices, image=image),
                    (7.4, 2.2))  # fmt: skip

    def _make_files(
        self, study: Study, one: _Subject, names: list[str], windows: list[Window] | None
    ) -> list[Attachment]:
        """Return the maps of a subject as arrays, and as images or evoked responses where they have a place."""
        maps, end = one.maps, f"sub-{one.subject}"
        arrays = {
            "correlation": maps.correlation, "ci_low": maps.ci_low, "ci_high": maps.ci_high, "p_value": maps.p_value,
            "q_value": maps.q_value, "explained": maps.explained, "normalised": self._normalise(one),
        }  # fmt: skip
        if one.ceiling is not None:
            arrays |= {"ceiling": one.ceiling.per_feature, "share_of_signal": one.ceiling.share}
        if len(names) > 1:
            arrays |= {f"explained_{n}": row for n, row in enumerate(one.added)}
            arrays["space"] = one.shares.argmax(axis=1).astype(np.int16)
        if windows is not None:
            arrays = {key: row.reshape(-1, len(windows)) for key, row in arrays.items()}
        files = [
            Attachment(
                f"encoding_{end}.npz", f"All maps of subject {one.subject} as arrays.",
                partial(_write_arrays, arrays=arrays, spaces=names),
            )
        ]  # fmt: skip
        if study.responses.dims[1] == "channel":
            if windows is not None and "ch_names" in study.responses.coords:
                files.append(
                    Attachment(
                        f"encoding_{end}-ave.fif", f"Correlation of subject {one.subject} as evoked response for MNE.",
                        partial(_write_evoked, responses=study.responses, grid=arrays["correlation"], windows=windows),
                    )
                )  # fmt: skip
            return files
        shown = {
            "correlation": (arrays["correlation"], "Correlation of predicted and measured responses"),
            "significant": (
                np.where(arrays["q_value"] <= self.fdr, arrays["correlation"], 0.0),
                f"The same, 0 where q is above {self.fdr:g}",
            ),
            "explained": (arrays["explained"], "Share of variance explained"),
        }
        if one.ceiling is not None:
            shown |= {
                "ceiling": (arrays["ceiling"], "Noise ceiling of the correlation"),
                "normalised": (
                    np.nan_to_num(arrays["normalised"]),
                    f"Correlation over its ceiling, 0 where that is below {self.least_ceiling:g}",
                ),
            }
        if len(names) > 1:
            listed = ", ".join(f"{n + 1} {name}" for n, name in enumerate(names))
            shown["space"] = (arrays["space"] + 1.0, f"Space with the largest share: {listed}")
        for kind, (values, words) in shown.items():
            times = "" if windows is None else ", times along the last axis"
            caption = f"{words}, subject {one.subject}{times}."
            files += _make_images(study, one, values, f"encoding_{kind}_{end}", caption)
        return files


def _list_ceilings(ceiling: ResponseCeiling | None) -> dict[str, Any]:
    """Return the columns of the table on the ceiling of each response, with 95 % intervals where they are known."""
    if ceiling is None:
        return dict.fromkeys(("ceiling", "ceiling_low", "ceiling_high", "share_of_signal"), np.nan)
    low, high = (np.nan, np.nan) if ceiling.bounds is None else (find_root(bound) for bound in ceiling.bounds)
    return {
        "ceiling": ceiling.per_feature, "ceiling_low": low, "ceiling_high": high, "share_of_signal": ceiling.share,
    }  # fmt: skip


@dataclass(frozen=True)
class _Subject:
    """What was found of one subject; arrays have an entry per response."""

    subject: str
    maps: ResponseMaps
    regions: dict[str, RegionCorrelation]
    groups: dict[str, np.ndarray]
    ceiling: ResponseCeiling | None
    source: str
    shares: np.ndarray  # (n_responses, n_spaces), mean over folds
    added: np.ndarray  # (n_spaces, n_responses)
    n_images: int
    judged: np.ndarray | None  # correlations by Brain-Score's fit


def as_columns(
    responses: Responses, windows: Sequence[Window] | None = None, n_own: int | None = None
) -> np.ndarray:
    """Return trials as float32 of shape (n_trials, n_responses): own voxels of a subject, at all windows of time."""
    if windows is not None:
        responses = average_windows(responses, windows)
    return np.asarray(responses.data[:, :n_own], np.float32).reshape(len(responses.data), -1)


def average_windows(responses: Responses, windows: Sequence[Window]) -> Responses:
    """Return trials with the mean over each window of time in place of its samples."""
    data = np.asarray(responses.data, np.float32)
    if any(window.last - window.first > 1 for window in windows):
        data = np.stack([data[..., w.first : w.last].mean(axis=-1) for w in windows], axis=-1)
    else:
        data = data[..., windows[0].first : windows[-1].last]
    coords = {**responses.coords, "times": [window.centre for window in windows]}
    return replace(responses, data=data, coords=coords)


def list_groups(
    responses: Responses, subject: str, windows: Sequence[Window] | None = None
) -> dict[str, np.ndarray]:
    """Return the responses of each network, region of interest or region of sensors, as boolean arrays.

    Parameters
    ----------
    responses
        With what is known of its columns; empty if nothing is.
    subject
        Whose voxels.
    windows
        Of time, which every channel (parcel, voxel) has.
    """
    groups = _list_groups(responses, subject)
    n_times = 1 if windows is None else len(windows)
    return {name: np.repeat(mask, n_times) for name, mask in groups.items()}


def _list_groups(responses: Responses, subject: str) -> dict[str, np.ndarray]:
    if responses.dims[1] == "channel":
        try:
            assigned = np.asarray(assign_regions(responses))
        except DataError:
            return {}
        return {str(name): assigned == name for name in dict.fromkeys(assigned.tolist())}
    if networks := [str(name) for name in responses.coords.get("parcel_networks", ()) if name]:
        return {name: find_networks(responses, [name]) for name in dict.fromkeys(networks)}
    if responses.dims[1] != "voxel":
        return {}
    try:
        geometry = read_geometry(responses, subject if responses.coords.get("subjects") else None)
    except DataError:
        return {}
    groups: dict[str, np.ndarray] = {}
    for roi in geometry.rois.values():
        for label in sorted({int(value) for value in np.unique(roi.labels) if value > 0}):
            mask = np.asarray(roi.labels == label)
            if mask.any():
                groups.setdefault(roi.names.get(label, str(label)), mask)
    return groups


def _describe_limits(region: RegionCorrelation) -> str:
    low, high = region.interval.low, region.interval.high
    return region.interval.resampled if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _make_scores(study: Study, one: _Subject) -> list[Score]:
    rows = []
    for name, region in one.regions.items():
        mask = one.groups.get(name, slice(None))
        rows.append(
            Score(
                method="decoded", metric=f"encoding_correlation@{name}", value=region.value, chance=region.chance,
                n_queries=one.n_images, protocol=study.protocol_of_refits, subject=one.subject, split="test",
                seed=study.seed,
                ci_low=region.interval.low, ci_high=region.interval.high, p_value=region.p_value,
                noise_ceiling=None if one.ceiling is None else one.ceiling.bound(mask),
                resampled=region.interval.resampled,
            )
        )  # fmt: skip
    return rows


def _judge(study: Study, found: Sequence[_Subject]) -> tuple[list[Score], str, Attachment]:
    """Return Brain-Score's scores of each subject and of all, its sentence, and a file with all of its numbers."""
    by_group: dict[str, dict[str, SubjectScore]] = {}
    for one in found:
        if one.ceiling is None:
            reason = one.source.rstrip(".")
            raise DataError(
                f"Brain-Score divides by a noise ceiling, which subject {one.subject} does not have ({reason})."
            )
        assert one.judged is not None  # as it was asked for
        groups = {WHOLE: np.ones(len(one.judged), bool), **one.groups}
        for name, score in score_groups(one.judged, one.ceiling.share, groups).items():
            by_group.setdefault(name, {})[one.subject] = score
    if WHOLE not in by_group:
        raise DataError(
            f"Brain-Score takes responses of which more than {LEAST_SHARE:.0%} is signal, and no subject has any; "
            "average more repetitions, or leave out encode.judge."
        )
    rows: list[Score] = []
    content: dict[str, Any] = {}
    for name, subjects in by_group.items():
        pooled, error = pool_subjects(subjects)
        shown = subjects if error is None else {**subjects, "all": pooled}
        told = "one subject" if error is None else f"standard error over {len(subjects)} subjects {error:.3f}"
        rows += [
            Score(
                method="decoded", metric=f"brain_score@{name}", value=each.score, chance=0.0,
                n_queries=found[0].n_images, protocol=study.protocol_of_refits, subject=who, split="test",
                seed=study.seed, resampled=told,
            )
            for who, each in shown.items()
        ]  # fmt: skip
        content[name] = {
            **asdict(pooled),
            "error": error,
            "subjects": {k: asdict(v) for k, v in subjects.items()},
        }
    whole = content[WHOLE]
    sentence = (
        f"by Brain-Score's rule {whole['score']:.3f} (median correlation {whole['raw']:.3f}, ceiling "
        f"{whole['ceiling']:.3f}, {rows[0].resampled})"
    )
    file = Attachment(
        "brain_score.json", "Scores by Brain-Score's rule, of each group of responses and subject.",
        partial(write_json, value=content),
    )  # fmt: skip
    return rows, sentence, file


# --- figures -----------------------------------------------------------------------------------------------


def _plot_times(found: Sequence[_Subject], windows: Sequence[Window]) -> Plot:
    centres = np.array([window.centre for window in windows]) * 1000
    grids = [one.maps.correlation.reshape(-1, len(windows)) for one in found]
    mean = np.mean([grid.mean(axis=0) for grid in grids], axis=0)
    peak = int(mean.argmax())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = pd.DataFrame(
            {
                "value": mean,
                "ci_low": np.mean([np.quantile(grid, 0.25, axis=0) for grid in grids], axis=0),
                "ci_high": np.mean([np.quantile(grid, 0.75, axis=0) for grid in grids], axis=0),
            }
        )
        draw_curve(axes, centres, rows, label="correlation")
        shares = [
            one.ceiling.share.reshape(-1, len(windows)).mean(axis=0)
            for one in found
            if one.ceiling is not None
        ]
        if shares:
            ceiling = find_root(np.mean(shares, axis=0))
            axes.plot(centres, ceiling, color="C1", lw=1.2, ls="--", label="noise ceiling")
        axes.axhline(0, color="C4", lw=0.8)
        axes.set_xlabel("time (ms)")
        axes.set_ylabel("correlation")
        axes.legend(fontsize=7)

    caption = (
        "Mean correlation over channels and subjects. The band holds the middle half of the channels; "
        "the dashed line is the noise ceiling, the root of their mean signal share."
    )
    return Plot(
        "times", caption, f"the mean correlation peaks at {centres[peak]:.0f} ms: {mean[peak]:.3f}", draw
    )


def _plot_groups(found: Sequence[_Subject]) -> Plot:
    names = list(dict.fromkeys(name for one in found for name in one.groups))
    rows = pd.DataFrame(
        [
            {
                "name": name,
                **{
                    key: float(np.mean([read(one.regions[name]) for one in found if name in one.regions]))
                    for key, read in (
                        ("value", lambda r: r.value),
                        ("ci_low", lambda r: np.nan if r.interval.low is None else r.interval.low),
                        ("ci_high", lambda r: np.nan if r.interval.high is None else r.interval.high),
                    )
                },
            }
            for name in names
        ]
    ).sort_values("value", ascending=False)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        draw_bars(axes, rows, rows["name"].tolist())
        axes.axvline(0, color="C4", lw=0.8)
        axes.set_xlabel("correlation")

    best = rows.iloc[0]
    caption = "Mean correlation by network or region, with its 95 % interval (means over subjects)."
    return Plot(
        "groups",
        caption,
        f"best in {best['name']}: {best['value']:.3f}",
        draw,
        (7.0, 0.8 + 0.26 * len(names)),
    )


def _plot_spaces(found: Sequence[_Subject], names: list[str]) -> Plot:
    added = np.mean([one.added.mean(axis=1) for one in found], axis=0)
    chosen = np.mean(
        [(one.shares.argmax(axis=1)[:, None] == np.arange(len(names))).mean(axis=0) for one in found], axis=0
    )

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        place = np.arange(len(names))
        left.barh(place, added, color="C0")
        left.set_yticks(place, [shorten(name, 28) for name in names])
        left.invert_yaxis()
        left.set_xlabel("explained variance added")
        right.barh(place, chosen, color="C1")
        right.set_xlabel("responses where it adds most")

    best = int(added.argmax())
    caption = (
        "How much explained variance of test responses each image space adds (left), and the share of "
        "responses for which it adds most (right); means over responses and subjects."
    )
    return Plot("spaces", caption, f"{names[best]} adds most: {added[best]:.3f}", draw,
                (7.4, 1.0 + 0.3 * len(names)))  # fmt: skip


def _limit(values: np.ndarray) -> float:
    return max(float(np.abs(values).max()), 1e-6)


def _draw_heads(figure: Figure, *, grid: np.ndarray, windows: Sequence[Window], places: np.ndarray) -> None:
    import matplotlib
    from mne.viz import plot_topomap

    # Neighbouring windows are averaged into as many maps as fit.
    parts = np.array_split(np.arange(len(windows)), min(_MOST_MAPS, len(windows)))
    maps = [grid[:, part].mean(axis=1) for part in parts]
    reach = max(_limit(one) for one in maps)
    image: Any = None
    axes = np.atleast_1d(figure.subplots(1, len(parts)))
    for ax, part, values in zip(axes, parts, maps, strict=True):
        image, _ = plot_topomap(
            values, places, axes=ax, show=False, cmap=matplotlib.rcParams["image.cmap"], vlim=(-reach, reach),
            contours=0, sensors=False, sphere=(0, 0, 0, 0.095),
        )  # fmt: skip
        for line in ax.lines:
            line.set_color(matplotlib.rcParams["axes.labelcolor"])
        start, stop = windows[part[0]].start, windows[part[-1]].stop
        ax.set_title(f"{start * 1000:z.0f} to\n{stop * 1000:z.0f} ms", fontsize=7)
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.7)
    bar.set_label("correlation")
    bar.outline.set_visible(False)


def _draw_grid(figure: Figure, *, grid: np.ndarray, windows: Sequence[Window]) -> None:
    axes, reach = figure.subplots(), _limit(grid)
    extent = (windows[0].start * 1000, windows[-1].stop * 1000, len(grid) - 0.5, -0.5)
    image = axes.imshow(grid, aspect="auto", vmin=-reach, vmax=reach, extent=extent, interpolation="nearest")
    axes.set_xlabel("time (ms)")
    axes.set_ylabel("channel")
    figure.colorbar(image, ax=axes).set_label("correlation")


def _draw_histogram(figure: Figure, *, one: _Subject) -> None:
    axes = figure.subplots()
    axes.hist(one.maps.correlation, bins=40, color="C0", label="correlation")
    if one.ceiling is not None:
        axes.hist(one.ceiling.per_feature, bins=40, histtype="step", color="C1", label="noise ceiling")
    axes.set_xlabel("correlation")
    axes.set_ylabel("responses")
    axes.legend(fontsize=7)


def _draw_glass(figure: Figure, *, image: Any) -> None:
    from nilearn.plotting import plot_glass_brain

    figure.set_layout_engine("none")  # nilearn places its axes itself
    plot_glass_brain(image, figure=figure, display_mode="lyrz", colorbar=True, plot_abs=False)


def _draw_slices(figure: Figure, *, image: Any) -> None:
    """Draw up to seven axial slices, as many voxels between each and the next."""
    import matplotlib
    from nilearn.plotting import plot_img

    array = np.asarray(image.dataobj)
    there = np.nonzero(array)[2]  # (n_voxels,): the height of each
    heights = (
        np.unique(np.quantile(there, np.linspace(0.05, 0.95, 7)).round().astype(int)) if len(there) else [0]
    )
    cuts = [float((image.affine @ [0, 0, z, 1])[2]) for z in heights]
    figure.set_layout_engine("none")  # nilearn places its axes itself
    reach = _limit(array)
    plot_img(
        image, figure=figure, display_mode="z", cut_coords=cuts, cmap=matplotlib.rcParams["image.cmap"], vmin=-reach,
        vmax=reach, threshold=1e-6, colorbar=True, annotate=False, draw_cross=False, black_bg=False,
    )  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------


def _name_brain(study: Study, one: _Subject) -> str | None:
    """Return the subject where each has a mask of its own."""
    return one.subject if study.responses.coords.get("subjects") else None


def _fill(responses: Responses, values: np.ndarray) -> np.ndarray:
    """Return values of a subject's own voxels in the width of padded rows; times, if any, become rows."""
    filled = np.zeros((responses.data.shape[1], *values.shape[1:]), np.float32)
    filled[: len(values)] = values
    return filled.T


def _make_images(
    study: Study, one: _Subject, values: np.ndarray, name: str, caption: str
) -> list[Attachment]:
    """Return a NIfTI file, or a GIFTI file for each hemisphere; nothing where places are not known."""
    if study.responses.dims[1] not in ("voxel", "parcel"):
        return []
    try:
        image = inverse_transform(
            study.responses, _fill(study.responses, values), subject=_name_brain(study, one)
        )
    except DataError:
        return []
    if isinstance(image, dict):
        return [
            Attachment(
                f"{name}_hemi-{side[0].upper()}.func.gii",
                caption,
                partial(_write_gifti, values=part, side=side),
            )
            for side, part in image.items()
        ]
    return [Attachment(f"{name}.nii.gz", caption, partial(write_nifti, image=image))]


def _write_gifti(path: Path, *, values: np.ndarray, side: str) -> None:
    import nibabel

    arrays = [
        nibabel.gifti.GiftiDataArray(
            np.asarray(row, np.float32), intent="NIFTI_INTENT_NONE", datatype="NIFTI_TYPE_FLOAT32"
        )
        for row in np.atleast_2d(values)
    ]
    meta = nibabel.gifti.GiftiMetaData({"AnatomicalStructurePrimary": f"Cortex{side.capitalize()}"})
    path.write_bytes(nibabel.gifti.GiftiImage(darrays=arrays, meta=meta).to_bytes())


def _write_arrays(path: Path, *, arrays: Mapping[str, np.ndarray], spaces: Sequence[str]) -> None:
    content: dict[str, Any] = {
        key: row if row.dtype.kind in "iu" else row.astype(np.float32) for key, row in arrays.items()
    }
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **content, spaces=np.asarray(spaces, dtype=str))


def _write_evoked(path: Path, *, responses: Responses, grid: np.ndarray, windows: Sequence[Window]) -> None:
    import mne

    from braindecode_vis.preprocessing.epochs import export_epochs

    step = windows[1].centre - windows[0].centre if len(windows) > 1 else 1.0
    first = responses.select(np.arange(1))
    coords = {**first.coords, "sfreq": 1 / step, "times": [window.centre for window in windows]}
    info = export_epochs(replace(first, data=grid[None].astype(np.float32), coords=coords)).info
    evoked = mne.EvokedArray(
        grid.astype(np.float64), info, tmin=windows[0].centre, comment="correlation of predicted responses"
    )
    evoked.save(path, overwrite=True, verbose="error")
