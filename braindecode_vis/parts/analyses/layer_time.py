"""At which times each layer of a vision network matches the brain: a map of layers by windows of time.

Owns two measures. ``ridge`` decodes each layer from each window and asks for two-way identification in that layer's
space; ``rdm`` correlates dissimilarities of test images in the window and in the layer, and fits nothing. Layers are
banks of image embeddings: those that the study holds, and those of `layers`. Layers with few effective dimensions
identify worse whatever the brain does, so times are compared within a layer, not heights between layers.

References
----------
Cichy et al. (2016), doi:10.1038/srep27755; Benchetrit et al. (2024), arXiv:2310.19812.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.registry import LayerConfig
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.embeddings.efficientnet import EfficientNetConfig
from braindecode_vis.embeddings.pixels import EngineeredConfig
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.analyses.curves import MAX_DRAWS, bootstrap_curves, check_windows
from braindecode_vis.parts.analyses.cuts import TimedAnalysis, Window, cut_window, make_sliding_windows
from braindecode_vis.parts.analyses.measure import add_maximum, check_retrieval, find_best, measure_changes
from braindecode_vis.parts.analyses.rsa import (
    average_test_trials,
    collect_layers,
    compare_layers_with_brain,
    embed_subjects,
    shorten,
)
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.report.drawing import draw_matrix
from braindecode_vis.scoring.score_row import format_p_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LayerTimeConfig(TimedAnalysis):
    """Match layers of vision networks with windows of time.

    Parameters
    ----------
    layers
        Image encoders, in order of depth; each is a layer (`layer` of openclip, timm, torchvision and transformers).
        The default compares Gabor energy and oriented gradients with the last features of the packaged network.
    measure
        ``ridge`` or ``rdm``.
    width, step
        Of the windows, s (100 ms as in ATM; the step is a choice of ours).
    """

    kind: Literal["layer_time"] = "layer_time"
    layers: tuple[LayerConfig, ...] = (
        EngineeredConfig(features=("gabor",)),
        EngineeredConfig(features=("hog",)),
        EfficientNetConfig(),
    )
    measure: Literal["ridge", "rdm"] = "ridge"
    width: float = Field(default=0.1, gt=0)
    step: float = Field(default=0.05, gt=0)

    #: Add the spaces that the run holds already.
    with_targets: ClassVar[bool] = True
    #: Penalties of the ridge, chosen inside the training trials.
    alphas: ClassVar[tuple[float, ...]] = (1e1, 1e2, 1e3, 1e4, 1e5)
    #: Resamples and shuffles of the images for ``rdm``, whose bootstrap is slow.
    n_resamples: ClassVar[int] = 300
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"with_targets", "alphas", "n_resamples"})

    uses_encoder: ClassVar[bool] = False

    def compute(self, study: Study) -> Findings:
        """Compare every layer with every window."""
        check_retrieval(study, self.kind)
        windows = make_sliding_windows(study.responses, self.width, self.step, self.tmin, self.tmax)
        check_windows(windows)
        banks = collect_layers(study, self.layers, self.with_targets)
        if self.measure == "ridge":
            table = self._decode(study, banks, windows)
        else:
            table = self._correlate(study, banks, windows)
        return self._report(table, list(banks), windows)

    def _decode(self, study: Study, banks: dict[str, Embeddings], windows: Sequence[Window]) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        changes = {n: partial(cut_window, window=window) for n, window in enumerate(windows)}
        ridge = RidgeConfig(alphas=self.alphas)
        for name, bank in banks.items():
            # The same trials and folds, with a ridge to this layer in place of the run's encoder and target.
            own = replace(
                study,
                banks=[bank] * len(study.folds),
                build=lambda number: ridge.build(seed=derive_seed(study.seed, "layer", number)),
                fit_seconds=None,  # that of another encoder
            )
            measured = measure_changes(own, changes, "two_way", what=f"layer {name}")
            values = np.stack([m.values for m in measured.values()], axis=1)
            draws = bootstrap_curves(
                values, measured[0].clusters, measured[0].subjects, n_draws=min(MAX_DRAWS, study.n_bootstrap),
                seed=study.seed,
            )  # fmt: skip
            # The peak of each resampled curve: how well the time of the best window is known.
            centres = np.array([w.centre for w in windows])
            low, high = np.quantile(centres[draws.argmax(axis=1)], [0.025, 0.975])
            peak = float(centres[values.mean(axis=0).argmax()])
            for n, window in enumerate(windows):
                rows.append(
                    {
                        "layer": name, "start": window.start, "stop": window.stop, **measured[n].as_row(study),
                        "observed": measured[n].observed, "null": measured[n].null,
                        "peak": peak, "peak_low": float(low), "peak_high": float(high),
                    }
                )  # fmt: skip
        return pd.DataFrame(add_maximum(rows))

    def _correlate(
        self, study: Study, banks: dict[str, Embeddings], windows: Sequence[Window]
    ) -> pd.DataFrame:
        test = average_test_trials(study)
        rows: list[dict[str, Any]] = []
        with study.progress("layers against time", len(windows)) as advance:
            for window in windows:
                match = compare_layers_with_brain(
                    embed_subjects(cut_window(test, window)), banks, n_bootstrap=self.n_resamples,
                    n_permutations=self.n_resamples, seed=study.seed,
                )  # fmt: skip
                for layer in match.layers:
                    rows.append(
                        {
                            "layer": layer.layer, "start": window.start, "stop": window.stop, "value": layer.rho,
                            "ci_low": layer.ci_low, "ci_high": layer.ci_high, "chance": 0.0, "n": match.n_images,
                            "p_value": layer.p_value, "observed": layer.rho, "null": layer.null,
                            "ceiling_low": match.ceiling_low,
                            "ceiling_high": match.ceiling_high, "resampled": "images",
                        }
                    )  # fmt: skip
                advance(1)
        table = pd.DataFrame(add_maximum(rows))
        # Rows came window by window; the map is read layer by layer, in order of depth.
        table["layer"] = pd.Categorical(table["layer"], list(banks))
        table = table.sort_values(["layer", "start"], ignore_index=True).astype({"layer": object})
        table["peak"] = np.nan
        for name in banks:
            own = table[table["layer"] == name]
            best = find_best(own)
            table.loc[own.index, "peak"] = (best["start"] + best["stop"]) / 2
        return table

    def _report(self, table: pd.DataFrame, names: list[str], windows: Sequence[Window]) -> Findings:
        values = table["value"].to_numpy(float).reshape(len(names), len(windows))
        words = "two-way identification" if self.measure == "ridge" else "correlation of dissimilarities"
        labels = [shorten(name) for name in names]

        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            draw_matrix(figure, axes, values, label=words)
            step = max(1, len(windows) // 8)
            ticks = list(range(0, len(windows), step))
            axes.set_xticks(ticks, [f"{windows[t].centre * 1000:z.0f}" for t in ticks])
            axes.set_yticks(range(len(names)), labels)
            axes.plot(values.argmax(axis=1), range(len(names)), "o", color="C2", ms=4)
            axes.set_xlabel("middle of the window (ms)")

        peaks = []
        for name in names:
            own = table[table["layer"] == name]
            best = find_best(own)
            peaks.append(
                f"{shorten(name)} at {float(own['peak'].iloc[0]) * 1000:z.0f} ms ({best['value']:.3f}, "
                f"{best['ci_low']:.3f} to {best['ci_high']:.3f}, chance {best['chance']:.2f}, "
                f"{format_p_value(best['p_maximum'], in_words=True)})"
            )
        found = f"Peak of the {words}: " + "; ".join(peaks) + "."
        how = (
            f"Each layer was compared with windows of {self.width * 1000:.0f} ms; p-values are corrected for "
            f"{values.size} of them (layers times windows) by the largest in each permutation."
        )
        caption = f"{words.capitalize()} by layer (rows) and window (columns); dots mark the best window of each layer."
        size = (7.0, 1.6 + 0.3 * len(names))
        return Findings(
            "Layers against time", f"{how} {found}", table, (Plot("layer_time", caption, found, draw, size),)
        )
