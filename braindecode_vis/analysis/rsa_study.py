"""Likeness of geometries: subjects with each other, with image spaces, and with another recording of the same images.

Owns the analysis around `braindecode_vis.analysis.rsa`. Nothing is fitted; dissimilarities are those of mean responses
to test images (or all images). With windows of time and another modality, the result is a fusion in the sense of Cichy.

References
----------
Kriegeskorte et al. (2008), doi:10.3389/neuro.06.004.2008; Cichy et al. (2014), doi:10.1038/nn.3635.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.analysis.cuts import Window, cut_window, make_sliding_windows
from braindecode_vis.analysis.drawing import draw_bars, draw_curve, draw_matrix, mark_stimulus
from braindecode_vis.analysis.layer_time import (
    LayerConfig,
    average_test_trials,
    collect_layers,
    embed_subjects,
    shorten,
)
from braindecode_vis.analysis.rsa import BrainMatch, compare_layers_with_brain
from braindecode_vis.analysis.study import Findings, Plot, Study
from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import DataError
from braindecode_vis.preprocessing.repeats import average_repetitions
from braindecode_vis.settings import Settings
from braindecode_vis.store import hash_sampled, read_responses

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RsaConfig(Settings):
    """Compare dissimilarities of images.

    Parameters
    ----------
    distance
        ``correlation``, ``cosine`` or ``euclidean``, for brains and models.
    trials
        ``test`` trials, or ``all``.
    layers
        Image encoders beside the spaces of the run.
    other
        Folder of another run, or of its responses: the same images (by id) in other people or another modality.
    width, step
        Windows of time in s; without a width, whole trials.
    n_resamples
        Resamples and shuffles of the images.
    """

    kind: Literal["rsa"] = "rsa"
    distance: Literal["correlation", "cosine", "euclidean"] = "correlation"
    trials: Literal["test", "all"] = "test"
    layers: tuple[LayerConfig, ...] = ()
    other: Path | None = None
    width: float | None = Field(default=None, gt=0)
    step: float = Field(default=0.05, gt=0)
    n_resamples: int = Field(default=300, ge=100)

    uses_encoder: ClassVar[bool] = False
    not_hashed: ClassVar[frozenset[str]] = frozenset({"other"})

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and a digest of the other responses."""
        fields = super().hashed_fields()
        if self.other is not None:
            fields["other_sha256"] = hash_sampled(find_responses(self.other) / "data.npy")
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
        if self.other is not None:
            there = average_repetitions(read_responses(find_responses(self.other)))
            models |= {f"other {k}": v for k, v in embed_subjects(there).items()}
        rows: list[dict[str, Any]] = []
        with study.progress("dissimilarities", len(windows)) as advance:
            for window in windows:
                rows += self._compare(study, responses, models, window)
                advance(1)
        if not rows:
            raise DataError(
                "there is one subject, no image space and no other recording: nothing to compare."
            )
        return self._report(pd.DataFrame(rows))

    def _compare(
        self, study: Study, responses: Responses, models: dict[str, Embeddings], window: Window | None
    ) -> list[dict[str, Any]]:
        brains = embed_subjects(responses if window is None else cut_window(responses, window))
        ids = list(next(iter(brains.values())).ids)
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
            best = models.loc[models["value"].idxmax()]
            parts.append(f"Closest to the brain: {_say(best)}")
            if pd.notna(best["ceiling_low"]):
                parts.append(f"noise ceiling {best['ceiling_low']:.3f} to {best['ceiling_high']:.3f}")
        if len(pairs):
            best = pairs.loc[pairs["value"].idxmax()]
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
        f"{row['first']} and {row['second']}{when}, {row['value']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f}, p "
        f"= {row['p_value']:.2g})"
    )


def _list_rows(match: BrainMatch, window: Window | None) -> list[dict[str, Any]]:
    return [
        {
            "second": layer.layer, "start": window.start if window else np.nan,
            "stop": window.stop if window else np.nan, "value": layer.rho, "ci_low": layer.ci_low,
            "ci_high": layer.ci_high, "chance": 0.0, "n": match.n_images, "p_value": layer.p_value,
            "ceiling_low": np.nan if match.ceiling_low is None else match.ceiling_low,
            "ceiling_high": np.nan if match.ceiling_high is None else match.ceiling_high,
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
    found = sorted(p.parent for p in place.rglob("responses/meta.json") if (p.parent / "data.npy").is_file())
    if len(found) != 1:
        raise DataError(
            f"{place} holds {len(found)} folders of responses; name the one to compare with, a folder with data.npy "
            "and meta.json."
        )
    return found[0]
