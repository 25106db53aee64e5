"""Scores of images beside the seen ones: in pixels, in the features of an image encoder, in the networks of the suite.

Every function takes the rounds of a method, one per draw, and averages over them; a draw is never pooled with another.
A network of the suite is loaded once, sees each distinct image once and is let go before the next one comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from braindecode_vis.base.arrays import Score
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import hash_pixels
from braindecode_vis.scoring.metrics.identification import (
    Order,
    centre_correlations,
    compute_correlations,
    count_order,
    leave_out_images,
    make_identification_table,
)
from braindecode_vis.scoring.metrics.image import ImageTable, make_image_table, split_rounds, tabulate_pixels
from braindecode_vis.scoring.metrics.metric_registry import compare_pairs, find_metric, tabulate_items
from braindecode_vis.scoring.metrics.suite import (
    LPIPS_NETWORKS,
    classify,
    list_pixel_metrics,
    name_comparison,
    name_lpips,
    name_semantic_metric,
    tabulate_semantic,
)
from braindecode_vis.scoring.score_row import POOLED
from braindecode_vis.scoring.scoring_task import (
    LARGEST_TABLE,
    Group,
    ScoredGroup,
    ScoringTask,
    average,
    cross_labels,
    take_rows,
)

#: Pixels of the image pairs that are compared for a null: half a minute of SSIM.
LARGEST_PAIR_TABLE = 500_000_000
#: Images of a control that are compared with the next stimulus for its chance level: their mean is known to 0.004.
LEVEL_ROWS = 1000
SMALLEST_SSIM = 11  # pixels, the window of the metric
SMALLEST_425 = 200  # pixels
Rows = dict[tuple[int, str], list[tuple[Score, np.ndarray]]]
#: Metric to the values of each image beside its own seen image, and of some beside the next.
Compared = dict[str, tuple[np.ndarray, np.ndarray | None]]


def score_images(scored: ScoredGroup, method: str) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield every pixel metric of a method with its value per row.

    Parameters
    ----------
    scored
        The rows.
    method
        Whose images they are.
    """
    import pandas as pd

    rounds = split_rounds(scored.task.show_small(method, scored.rows))
    seen = scored.task.show_small("seen", scored.rows)
    distinct = take_rows(seen, scored.first)
    # Tables of (n_rows, n_stimuli) for each round; that of correlations serves pixcorr and identification.
    correlations, errors = zip(*(tabulate_pixels(one, distinct) for one in rounds), strict=True)
    yield from scored.score_table(method, "pixcorr", correlations)
    yield from scored.score_table(method, "mse", errors)
    # Enlarged thumbnails compare the smoothness of the resize, not the images.
    names = ["ssim"] * (min(seen.shape[1:3]) >= SMALLEST_SSIM) + ["pixcorr@425", "ssim@425"] * is_large(
        scored.task
    )
    yield from score_pairs(scored, method, [*names, *scored.task.list_asked("images")])
    if len(distinct) < 2:
        return
    similarities = list(correlations)
    if scored.task.folding is not None:
        shown = scored.task.show_small("seen")
        similarities = [_correlate_centred(scored, one, shown) for one in rounds]
    candidates, n_candidates = scored.candidates, len(scored.columns)
    if candidates is None:
        # Sorted once for every number of alternatives.
        orders: list[Any] = [count_order(one) for one in similarities]
    else:
        orders, n_candidates = similarities, int(np.unique(candidates, return_counts=True)[1].min())
    yield from score_identification(scored, method, orders, "two_way_identification")
    for n in (10, 50):
        if n < n_candidates:
            yield from score_identification(scored, method, orders, f"{n}_way_identification", n=n)
    names = list(scored.concepts[scored.first])
    counts = pd.Series(names if candidates is None else cross_labels(names, candidates)).value_counts()
    # Where a class has one stimulus, there is nothing to tell it from; one class alone is the plain score.
    if len(set(names)) > 1 and counts.min() > 1:
        yield from score_identification(
            scored, method, similarities, "two_way_identification_within_class", groups=names
        )


def _correlate_centred(scored: ScoredGroup, made: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return correlations of the images of a group with its stimuli after the mean training image of each fold.

    Parameters
    ----------
    scored
        The group.
    made : array of shape (n_rows, ...)
        Pixels or features of its images.
    shown : array of shape (n_all_rows, ...)
        The same of the seen images of all rows of the task.
    """
    own = shown[scored.rows][scored.first]
    found = np.empty((len(made), len(own)))
    for fold in np.unique(scored.fold_numbers):
        rows, centre = scored.fold_numbers == fold, scored.task.find_centre(int(fold))
        mean = shown[centre].mean(axis=0, dtype=np.float64) if len(centre) else 0.0
        found[rows] = compute_correlations(made[rows] - mean, own - mean)
    return found


def is_large(task: ScoringTask) -> bool:
    """Say whether the seen images have the pixels that the protocol of 425 pixels asks for."""
    return min(task.seen.shape[1:3]) >= SMALLEST_425


def score_pairs(scored: ScoredGroup, method: str, names: Sequence[str]) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield the score of each image against its own stimulus, by metrics that look at one pair of images at a time.

    Pairs are dear, so only the system under test gets a permutation null, and only of as many pairs as
    `LARGEST_PAIR_TABLE` allows: beyond that, stimuli are permuted within random blocks of equal size, which is as valid
    as permuting all of them and less sensitive. Then chance is estimated from pairs within blocks, and there is no
    shuffled brain. The chance level of a control is its mean against the next stimulus, as is that of a metric that is
    too slow for all pairs.

    Parameters
    ----------
    scored, method
        The rows and whose images they are.
    names
        Metrics of images, of the package or from outside. Those of a protocol of 425 pixels are given images in full.
    """
    has_table = {
        name: method == "decoded"
        and scored.can_permute
        and scored.task.pair_nulls
        and find_metric(name).metric.permute
        for name in names
    }
    pairs = [name for name in names if not has_table[name]]
    found = _compare_rounds(scored, method, pairs)
    for name in names:
        if has_table[name]:
            yield from _score_pair_table(scored, method, name)
            continue
        own, others = found[name]
        yield scored.score(own, name, method, chance=None if others is None else float(others.mean())), own


def _compare_rounds(scored: ScoredGroup, method: str, names: Sequence[str]) -> Compared:
    """Return metrics of each image beside its own seen image and, if there is one, of some beside the next.

    By name, each the mean over rounds; of many images, `LEVEL_ROWS` evenly spaced ones are beside the next.
    """
    truth, pictures = scored.truth, scored.task.pictures
    made, seen = pictures.made[method][:, scored.rows], pictures.seen[scored.rows[scored.first]]
    some = np.linspace(0, len(truth) - 1, min(len(truth), LEVEL_ROWS)).astype(np.intp)
    sides = [(np.arange(len(truth)), truth)]  # rows, and the stimulus beside each
    sides += [(some, scored.following[truth[some]])] if scored.can_permute else []
    values: Compared = {}
    for whole in (False, True):
        asked = tuple(name for name in names if _reads_whole(name) == whole)
        if not asked:
            continue
        known, found = _compare_missing(scored, method, asked, whole, sides), list[Any]()
        for rows, columns in sides:
            beside = seen[columns].tolist()
            several = [
                [known[pair] for pair in zip(one, beside, strict=True)] for one in made[:, rows].tolist()
            ]
            found.append(np.mean(several, axis=0).T)  # (n_asked, n_rows)
        others = found[1] if scored.can_permute else [None] * len(asked)
        values |= dict(zip(asked, zip(found[0], others, strict=True), strict=True))
    return values


def _compare_missing(
    scored: ScoredGroup,
    method: str,
    asked: tuple[str, ...],
    whole: bool,
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
) -> dict[tuple[int, int], np.ndarray]:
    """Return metrics that read images of one size by pair of pictures; compute those that no group has needed yet.

    Metrics that read images in full find those of all controls at once, so that a seen image is read and resized once
    for them. `sides` are rows of the group with the stimulus beside each.
    """
    known, pictures = scored.task.compared.setdefault(asked, {}), scored.task.pictures
    together = [method] if not whole or method == "decoded" else scored.task.controls
    made = np.concatenate([pictures.made[name][:, scored.rows] for name in together])  # (n_rounds, n_rows)
    seen = pictures.seen[scored.rows[scored.first]]
    rows, columns = (np.concatenate(part) for part in zip(*sides, strict=True))
    numbers = np.arange(len(made))[:, None]
    places = np.stack(np.broadcast_arrays(numbers, rows, columns), axis=-1).reshape(-1, 3)
    # By the seen image: rows that share one follow each other, and so do neighbours.
    places = places[np.lexsort((places[:, 0], places[:, 1], scored.truth[places[:, 1]]))]
    pairs = zip(made[places[:, 0], places[:, 1]].tolist(), seen[places[:, 2]].tolist(), strict=True)
    missing: dict[tuple[int, int], list[int]] = {}
    for pair, place in zip(pairs, places.tolist(), strict=True):
        if pair not in known:
            missing.setdefault(pair, place)
    if missing:
        shown = [_show_rounds(scored, name, whole) for name in together]
        rounds = [one for several, _ in shown for one in several]
        distinct = take_rows(shown[0][1], scored.first)
        found = compare_pairs(asked, rounds, distinct, np.array(list(missing.values())))
        known |= zip(missing, np.stack(list(found.values()), axis=1), strict=True)
    return known


def _reads_whole(name: str) -> bool:
    return find_metric(name).protocol.startswith("425")


def _show_rounds(scored: ScoredGroup, method: str, whole: bool) -> tuple[Sequence[Any], Any]:
    """Return the rounds of a method and the seen images of a group, in their own size or at that of comparison."""
    if whole:
        made, seen = (scored.task.show_whole(name)[scored.rows] for name in (method, "seen"))
    else:
        made, seen = (scored.task.show_small(name, scored.rows) for name in (method, "seen"))
    return split_rounds(made), seen


def _score_pair_table(scored: ScoredGroup, method: str, name: str) -> Iterator[tuple[Score, np.ndarray]]:
    rounds, seen = _show_rounds(scored, method, _reads_whole(name))
    n_stimuli = len(scored.columns)
    n_pixels = 425**2 if _reads_whole(name) else int(np.prod(seen.shape[1:3]))
    n_pairs = LARGEST_PAIR_TABLE // (len(rounds) * len(seen) * n_pixels)
    classes = scored.find_classes(scored.columns, scored.column_folds)  # nothing is permuted across them
    names = np.zeros(n_stimuli, str) if classes is None else np.asarray(classes, str)
    labels = np.empty(n_stimuli, int)
    for number, name_of_class in enumerate(known := np.unique(names)):
        members = np.flatnonzero(names == name_of_class)
        labels[members] = n_stimuli * number + make_blocks(len(members), n_pairs, scored.task.seed)
    blocks = None if len(np.unique(labels)) == len(known) else labels
    yield from scored.score_table(method, name, _tabulate_rounds(scored, method, name, labels), blocks=blocks)


def _tabulate_rounds(scored: ScoredGroup, method: str, name: str, blocks: np.ndarray) -> list[np.ndarray]:
    """Return the table of (n_rows, n_stimuli) of each round, 0 where nothing is permuted: outside the blocks.

    Of pictures that were compared in another group, or in another row, the value is known.
    """
    rounds, seen = _show_rounds(scored, method, _reads_whole(name))
    task, pictures = scored.task, scored.task.pictures
    taken, kept = scored.rows, dict[tuple[str, str], np.ndarray]()
    if len(task.groups) > 1 and pictures.made[method].size * len(pictures.shown) <= LARGEST_TABLE:
        # A larger table is not kept for other groups.
        taken, kept = np.arange(len(pictures.seen)), task.tabulated
    distinct, shown = np.unique(pictures.made[method][:, taken]), np.unique(pictures.seen[taken])
    columns = np.searchsorted(shown, pictures.seen[scored.rows[scored.first]])
    if (method, name) not in kept:
        kept[method, name] = np.full((len(distinct), len(shown)), np.nan)
    known, tables = kept[method, name], list[np.ndarray]()
    of_rounds = np.searchsorted(distinct, pictures.made[method][:, scored.rows])  # (n_rounds, n_rows)
    for made, places in zip(rounds, of_rounds, strict=True):
        for label in np.unique(blocks):
            inside = np.flatnonzero(blocks == label)
            rows = np.flatnonzero(blocks[scored.truth] == label)
            unknown = np.isnan(known[np.ix_(places[rows], columns[inside])]).any(axis=1)
            missing, first = np.unique(places[rows[unknown]], return_index=True)
            if len(missing):
                known[np.ix_(missing, columns[inside])] = tabulate_items(
                    find_metric(name).metric, made[rows[unknown][first]], seen[scored.first[inside]]
                )
        tables.append(np.nan_to_num(known[np.ix_(places, columns)], copy=False))
    return tables


def make_blocks(n_stimuli: int, size: int, seed: int) -> np.ndarray:
    """Return the block of each stimulus: random blocks of about `size` stimuli, at least two in each.

    Examples
    --------
    >>> np.bincount(make_blocks(10, 3, seed=0)).tolist()
    [4, 3, 3]
    """
    n_blocks = max(1, n_stimuli // max(2, size))
    labels = np.empty(n_stimuli, dtype=int)
    order = make_generator(seed, "permutation blocks").permutation(n_stimuli)
    for label, members in enumerate(np.array_split(order, n_blocks)):
        labels[members] = label
    return labels


def score_identification(
    scored: ScoredGroup,
    method: str,
    similarities: Sequence[np.ndarray | Order],
    metric: str,
    *,
    n: int = 2,
    groups: list[Any] | None = None,
) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield n-way identification from the similarity of every image to every stimulus, round by round.

    Parameters
    ----------
    scored, method, metric
        Rows and names.
    similarities
        For each round an array of shape (n_rows, n_stimuli), or its order.
    n
        Number of alternatives.
    groups : list of length n_stimuli, optional
        Class of each stimulus, for identification within the class.
    """
    within, sizes = groups, {len(scored.columns)}
    if (candidates := scored.candidates) is not None:
        within = cross_labels(groups, candidates)
        sizes = set(np.unique(candidates, return_counts=True)[1].tolist())
    tables = [make_identification_table(one, n, groups=within) for one in similarities]
    table, left_out = average(tables), None
    if scored.leaves_images_out:
        left_out = average(
            [
                leave_out_images([one], [scored.truth], [scored.columns], n, groups=[within])
                for one in similarities
            ]
        )
    values = scored.own(table)
    null = scored.permute(table, groups=groups) if scored.can_permute else None
    size = sizes.pop() if len(sizes) == 1 else None
    details: dict[str, Any] = {"gallery_size": size, "p_value": None if null is None else null.p_value}
    # Among images that were trained on, two-way identification alone has its level.
    if n > 2 and candidates is None and scored.column_folds is not None:
        details["chance"] = None if null is None else null.null_mean
    yield scored.score(values, metric, method, left_out=left_out, **details), values
    if method == "decoded" and null is not None:
        yield scored.score_shuffled(null, metric, len(table), gallery_size=size), values
    if n == 2 and null is not None:
        yield from scored.score_best(method, metric, tables, groups=groups)


def score_features(
    scored: ScoredGroup, method: str, features: dict[str, np.ndarray]
) -> Iterator[tuple[Score, np.ndarray]]:
    """Yield two-way identification in the space of the task's image encoder.

    Parameters
    ----------
    scored, method
        The rows and whose images they are.
    features
        From `encode_images`.
    """
    if len(scored.columns) < 2:
        return
    shown = features["seen"][0]
    similarities = [
        compute_correlations(one[scored.rows], shown[scored.rows][scored.first])
        if scored.task.folding is None
        else _correlate_centred(scored, one[scored.rows], shown)
        for one in features[method]
    ]
    metric = f"two_way_identification@{scored.task.feature_name}"
    yield from score_identification(scored, method, similarities, metric)


def encode_images(task: ScoringTask) -> dict[str, np.ndarray] | None:
    """Return features of shape (n_draws, n_rows, ...) of seen and made images, each distinct image encoded once."""
    if task.feature_encoder is None:
        return None
    table = make_image_table(task.show_whole("seen"), {name: task.show_whole(name) for name in task.images})
    features = encode_distinct(task, table)
    return {"seen": features[table.seen][None]} | {name: features[rows] for name, rows in table.made.items()}


def encode_distinct(task: ScoringTask, table: ImageTable) -> np.ndarray:
    """Return the features of the images of a table, (n_distinct, ...); what the task knows is not encoded again."""
    known, hashes = task.known_features, [hash_pixels(image) for image in table.images]
    missing = np.array([row for row, name in enumerate(hashes) if name not in known], dtype=np.intp)
    if len(missing):
        found = task.feature_encoder.encode(table.images[missing])
        known.update(zip((hashes[row] for row in missing), found, strict=True))
    return np.stack([known[name] for name in hashes])


# --- the suite of networks ----------------------------------------------------------------------------------------


def score_suite(
    task: ScoringTask,
    scored_groups: Sequence[ScoredGroup],
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> Rows:
    """Return the scores of the suite, with one value per row of the group.

    Parameters
    ----------
    task
        Its suite says which rows are computed.
    scored_groups
        The groups.
    advance
        Called once per network and once for the classifier.

    Returns
    -------
    dict
        (number of the group, method) to scores with their values, in the order of the suite.
    """
    found: Rows = defaultdict(list)  # networks come one by one, the table of scores group by group
    if task.suite is None:
        return found
    suite = task.suite
    table = make_image_table(
        task.show_whole("seen"), {name: task.show_whole(name) for name in task.images if name != "shuffled"}
    )
    places = [(number, method) for number in range(len(scored_groups)) for method in table.made]
    for number, method in places:
        scored = scored_groups[number]
        names = list_pixel_metrics(suite.config)
        if is_large(task):  # then these rows are in every table
            names = [name for name in names if name not in ("pixcorr@425", "ssim@425")]
        found[number, method] += score_pairs(scored, method, names)
    for network in suite.available:
        if network in LPIPS_NETWORKS:
            pairs, own, following = _list_lpips_pairs(
                table, ScoredGroup(task, Group(POOLED, None, np.arange(len(task.ids))))
            )
            values = suite.compute_lpips(network, table.images, pairs)
            for number, method in places:
                scored = scored_groups[number]
                distances = average(list(values[own[method]][:, scored.rows]))
                level = float(values[following[method]][:, scored.rows].mean())
                score = scored.score(
                    distances, name_lpips(network), method, chance=level if scored.can_permute else None
                )
                found[number, method].append((score, distances))
        else:
            spreads: dict[str, np.ndarray] = {}
            for space, matrix in suite.correlate(network, table, spreads=spreads).items():
                metric, is_two_way = name_comparison(network, space)
                centred = _centre_by_fold(task, table, matrix, spreads[space]) if is_two_way else {}
                for number, method in places:
                    scored = scored_groups[number]
                    columns = table.column[scored.rows][scored.first]
                    similarities = [matrix[one[scored.rows]][:, columns] for one in table.made[method]]
                    for fold, of_fold in centred.items():
                        rows = np.flatnonzero(scored.fold_numbers == fold)
                        for one, similar in zip(table.made[method], similarities, strict=True):
                            similar[rows] = of_fold[one[scored.rows[rows]]][:, columns]
                    if not is_two_way:
                        tables = [1 - one for one in similarities]
                        found[number, method] += scored.score_table(method, metric, tables)
                    elif len(scored.columns) > 1:
                        found[number, method] += score_identification(scored, method, similarities, metric)
        advance(1)
    if suite.config.semantic_ways:
        logits = _classify(task, table)
        for method in table.made:
            known = tabulate_semantic(table, method, suite.config.semantic_ways, logits)
            for number, scored in enumerate(scored_groups):
                columns = table.column[scored.rows][scored.first]  # (n_stimuli,) of this group
                for n, several in known.items():
                    metric = name_semantic_metric(n, 1, "efficientnet-lite0")
                    tables = [one[scored.rows][:, columns] for one in several]
                    found[number, method] += scored.score_table(method, metric, tables)
    advance(1)
    return found


def _centre_by_fold(
    task: ScoringTask, table: ImageTable, correlations: np.ndarray, spreads: np.ndarray
) -> dict[int, np.ndarray]:
    """Return, for each fold with training images among those seen, correlations after their mean features."""
    found = {}
    for fold in np.unique(task.fold_numbers):
        columns = table.column[task.find_centre(int(fold))]
        if len(columns):
            weights = np.bincount(columns, minlength=len(table.shown)) / len(columns)
            found[int(fold)] = centre_correlations(correlations, spreads, table.shown, weights)
    return found


def _classify(task: ScoringTask, table: ImageTable) -> np.ndarray:
    from braindecode_vis.embeddings.efficientnet import EfficientNetConfig

    own, classifier = task.feature_encoder, EfficientNetConfig().build()
    # Its features are those of the scores.
    if isinstance(own, type(classifier)) and own.space == classifier.space:
        return classifier.classify_features(encode_distinct(task, table))
    return classify(table)


def _list_lpips_pairs(
    table: ImageTable, everything: ScoredGroup
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the distinct pairs to compare, and which of them is each image beside its own and the next stimulus.

    Returns
    -------
    pairs : int array of shape (n_pairs, 2)
        Rows of the table's images.
    own, following
        Method to an int array of shape (n_draws, n_rows), rows of `pairs`.
    """
    next_seen = table.seen[everything.first[everything.following[everything.truth]]]
    asked = [
        np.stack([np.broadcast_to(target, rounds.shape), rounds], axis=-1)  # (n_draws, n_rows, 2)
        for target in (table.seen, next_seen)
        for rounds in table.made.values()
    ]
    pairs, inverse = np.unique(
        np.concatenate([block.reshape(-1, 2) for block in asked]), axis=0, return_inverse=True
    )
    ends = np.cumsum([block[..., 0].size for block in asked])[:-1]
    places = [
        part.reshape(block.shape[:-1])
        for block, part in zip(asked, np.split(inverse.ravel(), ends), strict=True)
    ]
    n = len(table.made)
    own, following = (dict(zip(table.made, part, strict=True)) for part in (places[:n], places[n:]))
    return pairs, own, following
