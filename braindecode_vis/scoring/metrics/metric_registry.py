"""Every metric by its name: how it is computed, which direction is better, its chance level, and words for a report.

A name in a table of scores is ``best_of_<k>_<metric>@<protocol>``; prefix and protocol may be missing, and ``{n}`` in
the name of an entry stands for a whole number (``top5``, ``50_way``). This module is the only one that takes such
names apart: scores, analyses, studies, the command line and the report all ask `find_metric`. A metric from outside
the package is added with `register_metric` and is from then on scored, tested and described like one of ours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from braindecode_vis.base.checks import ConfigError, DataError, suggest
from braindecode_vis.base.stimuli import Images
from braindecode_vis.scoring.metrics import embedding, identification, image
from braindecode_vis.scoring.retrieval import (
    Retrieval,
    compute_k_way_hits,
    compute_reciprocal_ranks,
    compute_relative_ranks,
    compute_top_k_hits,
)

LAST = 9  # place of metrics that have none of their own
Chance = Callable[[int, int | None], float | None]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Parameters
    ----------
    name
        As in the table of scores; ``{n}`` stands for a whole number.
    label
        Short name in words; ``#`` stands for the number.
    meaning
        One sentence for somebody who sees the metric for the first time.
    direction
        1 if higher is better, -1 if lower is better, 0 if unknown.
    chance
        The level without information: a number, a function of n and of the size of the gallery (which returns None
        where it needs a size and has none), or None if it depends on the data and is the mean of a permutation null.
    order
        Place in tables and among the key scores of a report; smaller numbers first, equal ones as they were computed.
    counts_hits
        Whether the metric is a share of hits, so that few or unanimous items get Wilson's interval.
    statistic
        ``mean`` over items, or ``median``.
    n
        The number of a name that spells none, 1 for ``top1``.
    on
        What `compare` takes: ``images``, ``embeddings``, ``retrieval``, or nothing where scores compute it themselves.
    compare
        Of images: ``compare(made, seen)`` on uint8 arrays of shape (n_items, height, width, 3). Of embeddings:
        ``compare(predicted, target)`` on float arrays of shape (n_items, n_features). Of retrieval:
        ``compare(retrieval, n)``. Returns one finite value per item, shape (n_items,).
    tabulate
        The same for every pair: ``tabulate(made, seen)`` of shape (n_made, n_seen), or ``tabulate(order, n)`` for
        retrieval. Without it, `compare` is called once per stimulus.
    permute
        Whether all pairs may be computed for a permutation null. A slow function says False: chance is then the mean
        against the next stimulus, and there is no p-value.

    Examples
    --------
    >>> brightness = Metric("brightness_gap", "Brightness gap", direction=-1, on="images",
    ...                     compare=lambda made, seen: abs(made.mean((1, 2, 3)) - seen.mean((1, 2, 3))))
    """

    name: str
    label: str
    meaning: str = ""
    direction: Literal[1, -1, 0] = 1
    chance: float | Chance | None = None
    order: int = LAST
    counts_hits: bool = False
    statistic: Literal["mean", "median"] = "mean"
    n: int = 0
    on: Literal["images", "embeddings", "retrieval", ""] = ""
    compare: Callable[..., Any] | None = None
    tabulate: Callable[..., Any] | None = None
    permute: bool = True

    @property
    def alternative(self) -> Literal["greater", "less"]:
        """The side of a permutation null on which this metric is better."""
        return "less" if self.direction < 0 else "greater"


class NamedMetric(NamedTuple):
    """A metric as a score row names it.

    Parameters
    ----------
    metric
        What is known of it.
    n
        Its number, 0 for none.
    protocol
        What follows the ``@``.
    n_draws
        Of how many draws the best counts, 0 where none is chosen.
    name
        Without prefix and protocol, for example ``top5``.
    """

    metric: Metric
    n: int
    protocol: str
    n_draws: int
    name: str

    @property
    def label(self) -> str:
        """Short name in words."""
        label = self.metric.label.replace("#", str(self.n))
        # A table holds the identification of several spaces side by side.
        if label.endswith(" in pixels") and self.protocol not in ("", "pixels"):
            label = f"{label.removesuffix('pixels')}features of {self.protocol}"
        return f"Best of {self.n_draws} draws: {label}" if self.n_draws else label

    @property
    def meaning(self) -> str:
        """One sentence for somebody who sees the metric for the first time."""
        meaning = self.metric.meaning.replace("#", str(self.n))
        if not self.n_draws:
            return meaning
        return (
            f"{meaning} For each image the best of {self.n_draws} draws is used, chosen with the seen image."
        ).strip()


def find_metric(name: str) -> NamedMetric:
    """Return the metric that a score row names; one that is not known has its own name as label and no direction.

    Examples
    --------
    >>> found = find_metric("best_of_3_ssim@425")
    >>> found.label, found.metric.direction, found.protocol
    ('Best of 3 draws: Structural similarity', 1, '425')
    >>> find_metric("50_way").n
    50
    """
    best = re.fullmatch(r"best_of_(\d+)_(.+)", name)
    n_draws, rest = (int(best[1]), best[2]) if best else (0, name)
    base, _, protocol = rest.partition("@")
    for wanted in (rest, base):  # an entry may be made for one protocol
        key = _normalise(wanted)
        if key in _OUTSIDE:
            return NamedMetric(_OUTSIDE[key], 0, protocol, n_draws, base)
        for pattern, metric in _PATTERNS:
            if found := pattern.fullmatch(key):
                n = int(found[1]) if found.groups() else metric.n
                return NamedMetric(metric, n, protocol, n_draws, base)
    unknown = Metric(base, base.replace("_", " ").capitalize(), direction=0)
    return NamedMetric(unknown, 0, protocol, n_draws, base)


def register_metric(metric: Metric) -> str:
    """Add a metric from outside the package, for this process, and return its name.

    One of the package is there already. A second one of a name takes the place of the first: settings that are built
    twice give two equal functions, and only the settings know that they are the same.

    Raises
    ------
    ConfigError
        If its name is that of a metric of the package or no name at all, or it lacks a direction or a function.
    """
    key = _normalise(metric.name)
    if metric is _BY_NAME.get(metric.name):  # one of ours that a configuration asks for
        return metric.name
    if key not in _OUTSIDE and find_metric(metric.name).metric.direction:
        raise ConfigError(f"a metric named {metric.name!r} already exists; choose another name.")
    if not re.fullmatch(r"[A-Za-z]\w*(@[\w.-]+)?", metric.name):
        raise ConfigError(
            f"{metric.name!r} is not a valid name for a metric; use letters, digits and underscores."
        )
    if metric.direction not in (1, -1):
        raise ConfigError(f"the metric {metric.name!r} must say which direction is better, 1 or -1.")
    if metric.on not in ("images", "embeddings") or not callable(metric.compare):
        raise ConfigError(
            f"the metric {metric.name!r} needs a function `compare` on images or embeddings, named by `on`."
        )
    _OUTSIDE[key] = metric
    return metric.name


def list_metrics(on: str | None = None) -> list[str]:
    """Return the names of all metrics, or of those that compare images or embeddings."""
    return [metric.name for metric in _BY_NAME.values() if on is None or metric.on == on]


def compute_chance(metric: str, *, gallery_size: int | None = None) -> float:
    """Return the chance level that follows from the definition of a metric.

    Parameters
    ----------
    metric
        For example ``top5``, ``50_way`` or ``two_way_identification``; what follows an ``@`` names the protocol and
        is ignored.
    gallery_size
        Number of candidates, needed for ``top{n}`` and ranks.

    Raises
    ------
    ConfigError
        If the metric is unknown, has no analytic chance level, or needs the gallery size.

    Examples
    --------
    >>> compute_chance("top5", gallery_size=200)
    0.025
    """
    found = find_metric(metric)
    if not found.metric.direction:
        raise ConfigError(
            f"metric {metric!r} is unknown, so its chance level must be given; known are {', '.join(_BY_NAME)}"
            f"{suggest(found.metric.name, list(_BY_NAME))}."
        )
    chance = found.metric.chance
    if chance is None:
        raise ConfigError(
            f"the chance level of {metric!r} depends on the data: pass `chance` as the mean of its permutation "
            "null, or None if no level is meaningful."
        )
    level = chance(found.n, gallery_size) if callable(chance) else chance
    if level is None:
        raise ConfigError(f"the chance level of {metric!r} needs the gallery size.")
    return level


def compare_items(metric: Metric, made: Images, true: Images) -> np.ndarray:
    """Return a metric of images or embeddings for each pair of rows, checked.

    Parameters
    ----------
    metric
        With `compare`.
    made, true : arrays of shape (n_items, ...)
        Reconstructions beside what was seen, or predictions beside their targets.

    Raises
    ------
    DataError
        If the function raises, or gives no finite value per item. A metric from outside is code that nobody here has
        tested, so its failure names it.
    """
    assert metric.compare is not None
    return _check(metric, lambda: metric.compare(made, true), (len(made),))  # type: ignore[misc]


def compare_pairs(
    names: Sequence[str], rounds: Sequence[Images], seen: Images, pairs: np.ndarray
) -> dict[str, np.ndarray]:
    """Return what `compare_items` gives of several metrics for pairs of images of several rounds and seen ones.

    Those of one protocol resize each image once; see `image.compute_metrics_of_pairs`, also for the parameters.

    Returns
    -------
    dict
        Name to a float array of shape (n_pairs,).
    """
    found, by_protocol = dict[str, np.ndarray](), defaultdict[image.Protocol, dict[str, str]](dict)
    for name in names:
        metric = find_metric(name).metric
        if isinstance(metric.compare, partial) and metric.compare.func is _compare_images:
            plain, protocol = metric.compare.args
            by_protocol[protocol][name] = plain
            continue
        found[name] = np.empty(len(pairs))
        for number, made in enumerate(rounds):
            places = np.flatnonzero(pairs[:, 0] == number)
            _, rows, columns = pairs[places].T
            if len(places):
                found[name][places] = compare_items(metric, made[rows], seen[columns])
    for protocol, plain in by_protocol.items():
        several = image.compute_metrics_of_pairs(
            tuple(plain.values()), seen, rounds, pairs, protocol=protocol
        )
        found |= {name: several[one] for name, one in plain.items()}
    return {name: found[name] for name in names}


def tabulate_items(metric: Metric, made: Images, true: Images) -> np.ndarray:
    """Return what `compare_items` gives for every row of `made` beside every row of `true`, shape (n_made, n_true)."""
    if metric.tabulate is not None:
        # A product of matrices where there is one: an SSIM of all pairs is three times as fast.
        return _check(metric, lambda: metric.tabulate(made, true), (len(made), len(true)))  # type: ignore[misc]
    columns = [compare_items(metric, made, np.broadcast_to(row, made.shape)) for row in true]
    return np.stack(columns, axis=1)


def _check(metric: Metric, compute: Callable[[], Any], shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.asarray(compute(), dtype=np.float64)
    except DataError:  # of our own checks, which name what is wrong already
        raise
    except Exception as error:
        raise DataError(
            f"the metric {metric.name!r} failed with {type(error).__name__}: {error}; correct it or "
            "remove it from evaluation.metrics."
        ) from error
    if values.shape != shape or not np.isfinite(values).all():
        raise DataError(
            f"the metric {metric.name!r} must give finite values of shape {shape}, but gave the shape {values.shape} "
            f"with {int((~np.isfinite(values)).sum())} that are not finite."
        )
    return values


# --- what is known ------------------------------------------------------------------------------------------------


def _one_in_n(n: int, size: int | None) -> float:
    return 1.0 / n


def _share_of_gallery(n: int, size: int | None) -> float | None:
    return None if size is None else min(1.0, n / size)


def _middle_rank(n: int, size: int | None) -> float | None:
    return None if size is None else (size + 1) / 2


def _mean_reciprocal(n: int, size: int | None) -> float | None:
    return None if size is None else float((1.0 / np.arange(1, size + 1)).sum() / size)


def _get_ranks(retrieval: Retrieval, n: int) -> np.ndarray:
    return retrieval.ranks


def _without_n(function: Callable[[Any], np.ndarray]) -> Callable[[Any, int], np.ndarray]:
    return lambda given, n: function(given)


def _compare_images(name: str, protocol: image.Protocol, made: Images, seen: Images) -> np.ndarray:
    return image.compute_image_metric(name, seen, made, protocol=protocol)


def _tabulate_images(name: str, protocol: image.Protocol, made: Images, seen: Images) -> np.ndarray:
    return image.tabulate_image_metric(name, seen, made, protocol=protocol)


_TOP: dict[str, Any] = {
    "chance": _share_of_gallery, "counts_hits": True, "on": "retrieval", "compare": compute_top_k_hits,
    "tabulate": identification.make_top_k_table,
}  # fmt: skip
_WAY: dict[str, Any] = {
    "chance": _one_in_n, "counts_hits": True, "on": "retrieval", "compare": compute_k_way_hits,
    "tabulate": identification.make_k_way_table,
}  # fmt: skip
_RANK: dict[str, Any] = {
    "on": "retrieval", "compare": _get_ranks, "tabulate": _without_n(identification.make_rank_table),
}  # fmt: skip
_TWO_WAY = "How often the result is more similar to its own image than to one other image."
_WITHIN = "How often the result is more similar to its own image than to one other image of the same class."
_AMONG = "How often the result is most similar to its own image among # candidates."
_PIXELS = (
    Metric("pixcorr", "Pixel correlation",
           "Correlation between the pixels of the seen and the reconstructed image, averaged over images.", order=3),
    Metric("mse", "Mean squared error", "Average squared difference between pixels that range from 0 to 1.", -1,
           order=5),
    Metric("ssim", "Structural similarity",
           "Agreement of local brightness, contrast and structure; 1 means identical.", order=4),
    Metric("ssim_legacy", "Structural similarity",
           "Agreement of local brightness, contrast and structure, computed as older "
           "published code did (scikit-image up to 0.18); 1 means identical.", order=4),
)  # fmt: skip
#: What follows the name of a pixel metric, how it brings images to one size, and what is said of that.
_SIZES: tuple[tuple[str, image.Protocol, str], ...] = (
    ("", "native", ""),
    ("@native", "native", ""),
    ("@425", "425", " Images are resized to 256 and then 425 pixels, antialiased (torchvision since 0.17)."),
    ("@425-legacy", "425-legacy", " Images are resized to 256 and then 425 pixels without antialiasing (tensors in "
     "torchvision up to 0.16, as MindEye2 ran)."),
)  # fmt: skip
_PIXEL_METRICS = tuple(
    replace(
        metric, name=f"{metric.name}{suffix}", meaning=f"{metric.meaning}{resize}", on="images",
        compare=partial(_compare_images, metric.name, protocol),
        tabulate=partial(_tabulate_images, metric.name, protocol),
    )
    for metric in _PIXELS
    for suffix, protocol, resize in _SIZES
)  # fmt: skip
#: Whose predictions are averaged before they are ranked, as NeuralBench ends its names.
_AVERAGED = {
    "": "",
    "_subject-agg": " The predictions of each subject and image are averaged first.",
    "_instance-agg": " The predictions of each image are averaged over subjects first.",
}
_NEURALBENCH = tuple(
    metric
    for ending, words in _AVERAGED.items()
    for metric in (
        Metric(f"top{{n}}_acc{ending}", f"Top-# accuracy, NeuralBench{ending.replace('_', ' ')}",
               "How often the mean rank of the seen image and those tied with it is among the first #, in a gallery of "
               f"distinct embeddings.{words}", chance=_share_of_gallery, counts_hits=True),
        Metric(f"inv_norm_rank_mean{ending}", f"Retrieval AUC, NeuralBench{ending.replace('_', ' ')}",
               f"Share of the other images that the seen one is preferred to; 1 means always first.{words}",
               chance=0.5),
    )
)  # fmt: skip
_METRICS = (
    Metric("top1", "Top-1 accuracy", "How often the seen image is the best match in the gallery.", order=0, n=1,
           **_TOP),
    Metric("top{n}", "Top-# accuracy", "How often the seen image is among the # best matches in the gallery.", **_TOP),
    Metric("two_way", "Two-way identification in the embedding", _TWO_WAY, order=1, n=2, **_WAY),
    Metric("2_way", "Two-way identification in the embedding", _TWO_WAY, n=2, **_WAY),
    Metric("{n}_way", "#-way identification in the embedding", _AMONG, **_WAY),
    Metric("two_way_identification", "Two-way identification in pixels", _TWO_WAY, chance=0.5, order=1,
           counts_hits=True, n=2),
    Metric("two_way_identification_within_class", "Within-class two-way identification in pixels", _WITHIN, chance=0.5,
           order=1, counts_hits=True, n=2),
    Metric("{n}_way_identification", "#-way identification in pixels", _AMONG, chance=_one_in_n, counts_hits=True),
    Metric("{n}_way_identification_within_class", "Within-class #-way identification in pixels",
           "How often the result is most similar to its own image among # candidates of the same "
           "class.", chance=_one_in_n, counts_hits=True),
    Metric("{n}_way_top1_semantic_accuracy", "#-way semantic accuracy",
           "How often a classifier names the reconstruction as it names the seen image, among # classes.",
           counts_hits=True),
    Metric("rank", "Rank", "Position of the seen image in the sorted gallery; 1 is best.", -1, chance=_middle_rank,
           **_RANK),
    Metric("relative_rank", "Relative rank", "Position of the seen image in the gallery, from 0 (first) to 1 (last).",
           -1, chance=0.5, on="retrieval", compare=_without_n(compute_relative_ranks)),
    Metric("relative_median_rank", "Relative rank",
           "Position of the seen image in the gallery, from 0 (first) to 1 (last).", -1, chance=0.5,
           statistic="median", on="retrieval", compare=_without_n(compute_relative_ranks)),
    Metric("median_rank", "Median rank", "Typical position of the seen image in the sorted gallery; 1 is best.", -1,
           chance=_middle_rank, order=6, statistic="median", **_RANK),
    Metric("mean_rank", "Mean rank", "Average position of the seen image in the sorted gallery; 1 is best.", -1,
           chance=_middle_rank, **_RANK),
    Metric("mean_reciprocal_rank", "Mean reciprocal rank",
           "Average of 1 / rank of the seen image; 1 means always first.", chance=_mean_reciprocal, on="retrieval",
           compare=_without_n(compute_reciprocal_ranks),
           tabulate=_without_n(identification.make_reciprocal_rank_table)),
    Metric("mean_average_precision", "Mean average precision",
           "How early the images of the correct concept come in the sorted gallery; 1 means that all of "
           "them are first."),
    Metric("binding", "Binding",
           "How often the seen item is preferred to one with the same parts in another combination.", chance=0.5,
           counts_hits=True),
    Metric("parts", "Parts", "How often the seen item is preferred to one with other parts.", chance=0.5),
    Metric("recall{n}", "Recall of the approximate search",
           "Share of the # nearest candidates that the approximate search finds.", chance=_share_of_gallery),
    Metric("image_retrieval", "Image retrieval",
           "How often the seen image is found for a response, among a random subset of images."),
    Metric("brain_retrieval", "Brain retrieval",
           "How often the response is found for a seen image, among the responses to a random subset of images."),
    *_NEURALBENCH,
    *_PIXEL_METRICS,
    Metric("lpips", "Perceptual distance", "Distance between network features; 0 means identical.", -1),
    Metric("correlation_distance", "Feature distance",
           "Correlation distance between network features; 0 means identical.", -1, on="embeddings",
           compare=embedding.correlation_distance, tabulate=embedding.tabulate_correlation_distance),
    Metric("brain_correlation", "Brain correlation",
           "Correlation between the response predicted from the reconstruction and the measured response."),
    Metric("encoding_correlation", "Encoding correlation",
           "Correlation between the response predicted from the seen image and the measured response."),
    Metric("brain_score", "Brain-Score",
           "Median correlation of reliable responses with their prediction over their ceiling, squared."),
    Metric("accuracy", "Accuracy", "How often the decoded class is the seen class.", counts_hits=True),
    Metric("balanced_accuracy", "Balanced accuracy", "How often a class is decoded correctly, averaged over classes."),
    Metric("auc", "AUC",
           "Area under the ROC curve: how often a trial of a class gets a higher score for it than another."),
    Metric("rouge1", "ROUGE-1", "Words that the decoded caption shares with a reference caption."),
    Metric("rougeL", "ROUGE-L", "Longest sequence of words that the decoded caption shares with a reference caption."),
    Metric("meteor_exact", "METEOR, exact words",
           "Words that both captions share; words in the same order count more."),
    Metric("sentence_similarity", "Sentence similarity", "Cosine between sentence vectors of two captions."),
)  # fmt: skip

#: What other packages brought, for this process.
_OUTSIDE: dict[str, Metric] = {}


def _normalise(name: str) -> str:
    return name.lower().replace("-", "_")


_BY_NAME: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
_PATTERNS = [
    (re.compile(re.escape(_normalise(metric.name)).replace(r"\{n\}", r"(\d+)")), metric)
    for metric in _METRICS
]
