"""Images against time: reconstructions from a window that slides or grows, and their similarity to the seen image.

In every window the encoder of the run is fitted anew, and those of its branches, while prior, generator and rescaling
stay those of whole trials; all windows of a trial share their noise, so that a strip shows what the brain adds. Images
are scored by their pixels, which need no weights: each is compared with the seen image and with those of the other
trials. A generator that draws plausible images of nothing scores at chance here, however good they look.

References
----------
Benchetrit, Banville and King (2023), arXiv:2310.19812 (images from sliding windows of MEG).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import Images, resize_image
from braindecode_vis.parts.analyses.curves import check_windows, make_curve, report_curve
from braindecode_vis.parts.analyses.cuts import (
    CutAnalysis,
    TimedAnalysis,
    Window,
    cut_window,
    make_growing_windows,
    make_sliding_windows,
)
from braindecode_vis.parts.analyses.measure import Meter, check_retrieval
from braindecode_vis.parts.analyses.study import Findings, Plot, Study
from braindecode_vis.scoring.retrieval import compute_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 64  # pixels of the images that are compared, whatever their own size


class WindowReconstructionsConfig(TimedAnalysis, CutAnalysis):
    """Reconstruct from a short window that slides over the trial (Benchetrit et al.), or from one that grows (ATM).

    Parameters
    ----------
    metric
        ``two_way``, ``<k>_way`` or ``top<k>``: how often an image is more like the seen one than like the other seen
        ones, by the correlation of pixels.
    width, step
        Of the windows and between them, s (250 ms as in the paper; the step is a choice of ours).
    growing
        All windows begin at `tmin` (None is the onset) and end one `step` later each; `width` is of those that slide.
    images
        How many test images of each fold are reconstructed, drawn at random; None takes all, which with a large
        generator takes hours for each window.
    """

    makes_images: ClassVar[bool] = True

    kind: Literal["window_reconstructions"] = "window_reconstructions"
    metric: Annotated[str, Field(pattern=r"^(two_way|top[1-9]\d*|([2-9]|[1-9]\d+)_way)$")] = "two_way"
    width: float = Field(default=0.25, gt=0)
    step: float = Field(default=0.1, gt=0)
    growing: bool = False
    images: int | None = Field(default=40, ge=2)

    #: How many of them stand in the figure.
    shown: ClassVar[int] = 6
    #: Level of the cluster test.
    alpha: ClassVar[float] = 0.05
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"shown", "alpha"})

    hashed_if_set: ClassVar[frozenset[str]] = frozenset({"growing"})

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        if self.growing:
            self.refuse_unused("width", because="growing windows all begin at one time")
        return self

    def compute(self, study: Study) -> Findings:
        """Fit, reconstruct and score in every window."""
        check_retrieval(study, self.kind)
        if study.reconstruct_changed is None:
            raise DataError(f"the analysis {self.kind} needs a run that makes images.")
        if self.growing:
            windows = make_growing_windows(study.responses, self.step, self.tmin or 0.0, self.tmax)
        else:
            windows = make_sliding_windows(study.responses, self.width, self.step, self.tmin, self.tmax)
        check_windows(windows)
        meter = Meter(study, self.metric)
        parts: list[list] = [[] for _ in windows]
        strips: list[tuple[str, list[np.ndarray]]] = []
        with study.progress("windows of images", len(windows) * len(study.folds)) as advance:
            for number, fold in enumerate(study.folds):
                train, test = study.pick(fold.train, "train"), study.pick(fold.test, "test")
                test = self._pick_images(study, number, test)
                gallery = read_seen(study, pd.unique(test.stimulus_ids))
                for place, window in enumerate(windows):
                    change = partial(cut_window, window=window, outside=self.outside)
                    made = study.reconstruct_changed(study, number, train, test, change)
                    queries = describe_pixels(made, test.stimulus_ids)
                    ranked = compute_ranks(queries, gallery, n_top=1, protocol=study.protocol)
                    parts[place].append(meter.measure_ranked(test, queries, gallery, ranked))
                    if number == 0:
                        if (
                            place == 0
                        ):  # a row a trial: a stimulus may stand in several, of repetitions or subjects
                            strips = [(str(name), []) for name in test.stimulus_ids[: self.shown]]
                        for row, (_, images) in enumerate(strips):
                            images.append(made[row])
                    advance(1)
        measured = [meter.join(folds) for folds in parts]
        curve = make_curve(study, windows, measured, alpha=self.alpha)
        chosen = "all test images" if self.images is None else f"{len(measured[0].values)} test trials"
        kind = "growing windows" if self.growing else f"windows of {self.width * 1000:.0f} ms"
        how = (
            f"Images of {chosen} were made from each of {len(windows)} {kind}, by "
            "encoders fitted in the window and the prior and generator of whole trials, and compared by their pixels."
        )
        found = report_curve(
            study, curve, self.metric, name=self.kind, title="Images over time", how=how, by_end=self.growing
        )
        strip = make_strip(study, strips, windows)
        return Findings(found.title, found.summary, found.table, (strip, *found.plots), found.scores)

    def _pick_images(self, study: Study, number: int, test: Responses) -> Responses:
        """Return the trials of some images, the same in every window."""
        ids = np.sort(pd.unique(test.stimulus_ids).astype(str))
        if self.images is None or len(ids) <= self.images:
            return test
        kept = make_generator(study.seed, "window images", number).choice(ids, self.images, replace=False)
        return test.select(np.flatnonzero(np.isin(test.stimulus_ids.astype(str), kept)))


def describe_pixels(images: Images, ids: np.ndarray) -> Embeddings:
    """Return pixels in which a cosine is the correlation of two images.

    Parameters
    ----------
    images : uint8 array of shape (n, height, width, 3), or `ImageRows`
    ids
        Of each.
    """
    small = (
        np.stack([resize_image(image, SIDE, SIDE) for image in images])
        .reshape(len(images), -1)
        .astype(np.float32)
    )
    centred = small - small.mean(axis=1, keepdims=True)
    # An image of one colour resembles nothing: a cosine of zeros would be no number.
    flat = np.linalg.norm(centred, axis=1) < 1e-3
    centred[flat, 0] = 1e-3
    return Embeddings(centred, ids, f"pixels/{SIDE}x{SIDE}/centred")


def read_seen(study: Study, ids: np.ndarray) -> Embeddings:
    """Return the pixels of what was seen."""
    return describe_pixels(
        np.stack([resize_image(study.stimuli.read_image(i), SIDE, SIDE) for i in ids]), ids
    )


def make_strip(study: Study, strips: list[tuple[str, list[np.ndarray]]], windows: list[Window]) -> Plot:
    """Return a figure with a row for each trial: what was seen, and the image of each window."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(strips), len(windows) + 1, squeeze=False)
        for row, (name, images) in enumerate(strips):
            for column, image in enumerate([study.stimuli.read_image(name), *images]):
                axes[row, column].imshow(image)
                axes[row, column].set_axis_off()
        axes[0, 0].set_title("seen", fontsize=7)
        for column, window in enumerate(windows, start=1):
            axes[0, column].set_title(f"{window.centre * 1000:z.0f}", fontsize=7)

    caption = (
        "What was seen, and what the generator makes of each window, named by its middle in ms; all windows of a row "
        "share their noise. Before the onset of the image nothing is known of it."
    )
    alt = f"Strips of {len(windows)} images over time for {len(strips)} trials."
    return Plot("window_images", caption, alt, draw, (0.75 * (len(windows) + 1), 0.8 * len(strips) + 0.3))
