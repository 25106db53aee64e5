"""Retrieval by several runs together: the same person saw the same images in EEG, MEG and fMRI.

Owns the joint similarity and its comparison with every run alone. The similarity of a prediction with an image is the
mean of the cosines that the runs give, each in the space of its own target, so runs may differ in modality, encoder
and target; nothing is fitted. Only images that all runs test in the same fold take part, and only they are candidates:
each prediction is of a fit that has not seen them, in any run.

References
----------
Cichy, Pantazis, Oliva (2014), doi:10.1038/nn.3635, joined MEG and fMRI by their dissimilarities; a mean of cosines is
our choice, as in `AverageEncoder`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.parts.analyses.measure import (
    FoldValues,
    Measured,
    Meter,
    RetrievalAnalysis,
    add_maximum,
    check_retrieval,
    describe_result,
    find_best,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study, rank_trials
from braindecode_vis.pipeline.finished_run import open_finished
from braindecode_vis.report.drawing import draw_bars
from braindecode_vis.scoring.retrieval import compute_similarity, rank_similarities

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THIS = "this run"
_FEWEST = 3  # images of a person in a fold
_LEAST_SHARE = 0.5  # of the images that all runs test, which must be in the same fold of each


class JointRetrievalConfig(RetrievalAnalysis):
    """Retrieve images by this run and other runs together, for the subjects that all of them have.

    Parameters
    ----------
    others
        Folders of finished runs on the same images (by id) with the same folds: published test images, or
        ``split: {kind: kfold, stratify: false, by_name: true}`` in all of them.
    """

    kind: Literal["joint_retrieval"] = "joint_retrieval"
    others: tuple[Path, ...] = ()

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields, with the results of the other runs in the place of their folders."""
        from braindecode_vis.pipeline.decoding import retrieve

        # A run that was moved is the same one.
        prints = [retrieve(open_finished(place)).artifact.fingerprint for place in self.others]
        return {
            **super().hashed_fields(),
            "others": [f"{p.name} {f}" for p, f in zip(self.others, prints, strict=True)],
        }

    def compute(self, study: Study) -> Findings:
        """Join the similarities of all runs, image by image, and measure every combination of runs."""
        from braindecode_vis.parts.analyses.analyze import make_study

        check_retrieval(study, self.kind)
        if not self.others:
            raise ConfigError(
                "joint_retrieval names no other run; give their folders with --set "
                "analyses=[{kind: joint_retrieval, others: [RUN, RUN]}]."
            )
        studies = {THIS: study}
        for place in self.others:
            if place.name in studies:
                raise DataError(
                    f"two of the other runs are in folders of the name {place.name!r}; rename one, so that their rows "
                    "can be distinguished."
                )
            studies[place.name] = make_study(open_finished(place))
            check_retrieval(studies[place.name], self.kind)
        study = replace(study, unit="image", label=None)  # what the runs have in common
        meter, names = Meter(study, self.metric), list(studies)
        sets = [some for n in range(1, len(names) + 1) for some in combinations(names, n)]
        parts: dict[tuple[str, ...], list[FoldValues]] = {some: [] for some in sets}
        for number, subject, ids in find_common(studies):
            found = {name: _compare(one, number, subject, ids) for name, one in studies.items()}
            for first, second in combinations(names, 2):
                if np.array_equal(found[first], found[second]):
                    raise DataError(
                        f"{first} and {second} give the same predictions, as if they were one run, which would "
                        "count twice; leave one out."
                    )
            for some in sets:
                mean = np.mean([found[name] for name in some], axis=0).astype(np.float32)
                ranked = rank_similarities(mean, ids, ids, protocol=study.protocol)
                people = np.full(len(ids), subject, dtype=object)
                parts[some].append(meter.measure_similarity(mean, ranked, ids, people, ids))
        return self._report(study, {some: meter.join(folds) for some, folds in parts.items()})

    def _report(self, study: Study, measured: dict[tuple[str, ...], Measured]) -> Findings:
        every = max(measured, key=len)
        alone = max((some for some in measured if len(some) == 1), key=lambda some: measured[some].value)
        rows = [
            {
                "runs": " + ".join(some), "n_runs": len(some), **found.as_row(study), "observed": found.observed,
                "null": found.null, "beside": " + ".join(alone), **found.as_difference(study, measured[alone]),
            }
            for some, found in measured.items()
        ]  # fmt: skip
        table = pd.DataFrame(add_maximum(rows))
        together = table[table["runs"] == " + ".join(every)].iloc[0]
        single = table[table["runs"] == " + ".join(alone)].iloc[0]
        text = (
            f"All {len(every)} runs together: {describe_result(together, self.metric)}; the best alone, "
            f"{single['runs']}: {describe_result(single, self.metric)}. Difference {together['difference']:+.3f}"
        )
        if pd.notna(together["difference_low"]):
            text += f" ({together['difference_low']:+.3f} to {together['difference_high']:+.3f})"
        best = find_best(table)
        n_subjects, n_images = (
            len(set(of.tolist())) for of in (measured[every].subjects, measured[every].ids)
        )
        how = (
            f"Mean cosine of the runs, for {n_subjects} subject(s) and {n_images} images that all runs test in one "
            "fold; candidates are the images of the subject and fold."
        )
        caption = f"{self.metric} of every run, and of runs together, with 95 % intervals; the dashed line is chance."

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            draw_bars(axes, table, table["runs"].tolist())
            axes.axvline(float(table["chance"].iloc[0]), color="C2", lw=1, ls="--")
            axes.set_xlabel(self.metric)

        found = f"{text}. Highest of all combinations: {best['runs']}."
        size = (7.0, 1.2 + 0.4 * len(table))
        return Findings(
            "Retrieval by several runs together",
            f"{how} {found}",
            table,
            (Plot("joint", caption, found, draw, size),),
        )


def find_common(studies: dict[str, Study]) -> list[tuple[int, str, np.ndarray]]:
    """Return fold, subject and sorted images for which all runs have predictions.

    Raises
    ------
    DataError
        If the runs have other numbers of folds, no subject or image in common, or test images in different folds.
    """
    folds = {name: len(study.folds) for name, study in studies.items()}
    if len(set(folds.values())) > 1:
        counts = ", ".join(f"{name} {n}" for name, n in folds.items())
        raise DataError(f"the runs have different numbers of folds ({counts}); give all of them one split.")
    tested = [
        [set(_list_shown(study.responses, fold.test)) for fold in study.folds] for study in studies.values()
    ]
    somewhere = set.intersection(*(set().union(*sets) for sets in tested))
    if not somewhere:
        raise DataError(
            f"the runs {', '.join(studies)} test no image of one subject in common; subjects and images meet by their "
            "names, which must be the same."
        )
    common = [set.intersection(*sets) for sets in zip(*tested, strict=True)]
    n_common = sum(map(len, common))
    if n_common < _LEAST_SHARE * len(somewhere):
        raise DataError(
            f"only {n_common} of {len(somewhere)} images that all runs test are in the same fold of each; run all with "
            "split={kind: kfold, stratify: false, by_name: true} and one seed."
        )
    found = []
    for number, pairs in enumerate(common):
        for subject in sorted({subject for subject, _ in pairs}):
            ids = np.array(sorted(name for who, name in pairs if who == subject), dtype=object)
            if len(ids) >= _FEWEST:
                found.append((number, subject, ids))
    if not found:
        raise DataError(
            f"no subject has {_FEWEST} images in a fold that all runs test; joint retrieval needs more."
        )
    return found


def _list_shown(responses: Responses, rows: np.ndarray) -> list[tuple[str, str]]:
    trials = responses.trials.iloc[rows]
    return list(zip(trials["subject"].astype(str), trials["stimulus_id"].astype(str), strict=True))


def _compare(study: Study, number: int, subject: str, ids: np.ndarray) -> np.ndarray:
    """Return the mean cosines of a subject's predictions, (n_images, n_images)."""
    test = study.pick(study.folds[number].test, "test")
    shown = _list_shown(test, np.arange(test.n_trials))
    place = {str(name): row for row, name in enumerate(ids)}
    rows = np.array([n for n, (who, name) in enumerate(shown) if who == subject and name in place])
    chosen = test.select(rows)
    queries, gallery, _ = rank_trials(study, number, chosen, study.trained(number))
    similarity = compute_similarity(queries, gallery.select(list(ids)))
    own = np.array([place[str(name)] for name in queries.ids])
    total = np.zeros((len(ids), len(ids)))
    np.add.at(total, own, similarity)
    mean: np.ndarray = total / np.bincount(own, minlength=len(ids))[:, None]
    return mean
