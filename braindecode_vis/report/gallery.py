"""Galleries: seen images beside images decoded from the brain response, with facts about each item.

Owns the content of a gallery: images of every method (several draws of one method included), scores, captions and
further facts, checked on creation; and the rules that select the shown items, by score or by a seed, not by hand. How
it is drawn is in `grid` and `page_gallery`. Knows nothing of pages or metrics: every number is given.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from braindecode_vis.base.checks import DataError, check_columns, check_option, check_unique
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import Images
from braindecode_vis.report.words import count_decimals, describe_metric, format_number, write_within_sentence

__all__ = [
    "SEEN",
    "GalleryContent",
    "arrange_rows",
    "describe_rule",
    "name_draw",
    "order_rows",
    "select_items",
]

SEEN = "seen"
_ROW_ORDER = (
    r"^(?:decoded|reconstruct)", r"^high.?level", r"^low.?level", r"^fused", r"^caption", r"^oracle", r"nearest",
    r"class.?mean", r"mean", r"shuffl|permut", r"random|chance",
)  # fmt: skip


def order_rows(names: Iterable[str]) -> list[str]:
    """Return method names as a gallery shows them: the system, its branches, the oracle, then the controls.

    Names that are not known come after the branches of the system, in their given order; draws of one method stay
    together.

    Examples
    --------
    >>> order_rows(["shuffled", "oracle", "nearest", "low_level", "decoded_draw1", "decoded"])
    ['decoded_draw1', 'decoded', 'low_level', 'oracle', 'nearest', 'shuffled']
    """

    def place(name: str) -> float:
        found = (i for i, pattern in enumerate(_ROW_ORDER) if re.search(pattern, name.lower()))
        return next(found, 4.5)

    return sorted(names, key=place)


def arrange_rows(images: Mapping[str, Images]) -> dict[str, Images]:
    """Return the rows of a gallery in order, with the first three draws of ``decoded`` and one of every other method.

    Parameters
    ----------
    images
        Method to images of shape (n_items, height, width, 3) or (n_items, n_draws, height, width, 3); ``seen`` is left
        out, since a gallery takes it apart.
    """
    rows = {}
    for name in order_rows(images):
        stack = images[name]
        if name == SEEN:
            continue
        if stack.ndim == 5:
            # A control needs no second draw to be seen for what it is.
            stack = stack[:, :3] if name == "decoded" else stack[:, 0]
        rows[name] = stack
    return rows


def name_draw(method: str, draw: int) -> str:
    """Return the row label of one draw, counted from 0.

    Examples
    --------
    >>> name_draw("decoded", 0)
    'decoded draw 1'
    """
    return f"{method} draw {draw + 1}"


@dataclass(frozen=True)
class GalleryContent:
    """Images of the same items, row by row, with scores, captions and facts of each item.

    Parameters
    ----------
    ids : sequence of length n_items
        Stimulus id of each item; unique.
    concepts : sequence of length n_items
        What each item depicts.
    seen : uint8 array of shape (n_items, height, width, 3), or `ImageRows`
        The images that were on the screen; pages show thumbnails of them.
    rows
        Method to uint8 images of shape (n_items, height, width, 3), or (n_items, n_draws, height, width, 3) where there
        are several draws, in the order they are shown (see `order_rows`). The first is the system under test, for
        example ``reconstructed``; controls follow. Sizes may differ between methods.
    score : array of shape (n_items,)
        Score of the first method for each item; NaN where it is not defined. It alone decides what is shown first.
    metric
        Name of the score.
    higher_is_better
        Whether a high score is a good one; by default what is known of the metric, otherwise true.
    metrics
        Further metrics by name: an array of shape (n_items,) for the first method, or a mapping of method to such an
        array. Values of single draws have the shape (n_items, n_draws). The score itself may be repeated here, to give
        its values for other methods.
    captions
        Method (or ``seen``) to one text per item: what a captioning model said of the image.
    details
        Further facts on each item (rank, subject, ...): label to a sequence of length n_items.
    filter_by
        Labels of `details` that the page offers as filters, beside the concept.
    row_notes
        Method to one sentence on what its row shows; well-known ones have one already.
    blocks
        Rules that pick the shown items, in order; see `select_items`.
    n_each
        Number of items of each block.
    seed
        Seed of the block ``random``.

    Raises
    ------
    DataError
        If lengths, types or shapes do not fit together.
    ConfigError
        If a block is unknown.
    """

    ids: Sequence[str]
    concepts: Sequence[str]
    seen: Images
    rows: Mapping[str, Images]
    score: np.ndarray
    metric: str
    higher_is_better: bool | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    details: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    filter_by: Sequence[str] = ()
    row_notes: Mapping[str, str] = field(default_factory=dict)
    blocks: Sequence[str] = ("best", "median", "worst")
    n_each: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        score = np.asarray(self.score, dtype=float)  # infinite scores would sort before all others
        object.__setattr__(self, "score", np.where(np.isfinite(score), score, np.nan))
        if self.higher_is_better is None:
            # An unknown metric counts as good when high, as most are.
            object.__setattr__(self, "higher_is_better", describe_metric(self.metric).direction >= 0)
        if not len(self.ids):
            raise DataError("a gallery needs at least one item.")
        if self.n_each < 1:
            raise DataError(f"a gallery shows at least 1 item of each kind, not {self.n_each}.")
        if not self.blocks:
            raise DataError(f"a gallery shows at least one block; known are {', '.join(BLOCKS)}.")
        for block in self.blocks:
            check_option("block of a gallery", block, BLOCKS)
        check_unique(list(self.ids), what="stimulus_id of the gallery")
        self._check_columns()
        self._check_images()
        check_columns(self.details, self.filter_by, what="the details of the gallery")
        object.__setattr__(self, "metrics", self._read_metrics())

    def _check_columns(self) -> None:
        columns: list[tuple[str, Any]] = [("concepts", self.concepts), ("score", self.score)]
        columns += self.details.items()
        columns += [(f"captions of {method}", texts) for method, texts in self.captions.items()]
        for name, column in columns:
            if len(column) != len(self.ids):
                raise DataError(
                    f"the gallery has {len(self.ids)} items, but its {name} has {len(column)} entries."
                )
        check_columns([SEEN, *self.rows], self.captions, what="the rows of the gallery")

    def _check_images(self) -> None:
        n = len(self.ids)
        if SEEN in self.rows:
            raise DataError(f"the gallery row {SEEN!r} is given as `seen`, not among the other rows.")
        for label, images in {SEEN: self.seen, **self.rows}.items():
            fits = images.ndim == 4 or (images.ndim == 5 and images.shape[1] > 0 and label != SEEN)
            if images.dtype != np.uint8 or not fits or images.shape[-1] != 3 or len(images) != n:
                draws = "" if label == SEEN else f" or ({n}, n_draws, height, width, 3)"
                raise DataError(
                    f"the gallery row {label!r} must be uint8 of shape ({n}, height, width, 3){draws}, "
                    f"not {images.dtype} of shape {images.shape}."
                )
        check_unique([label for label, _ in self._list_rows()], what="row of the gallery")

    def _read_metrics(self) -> dict[str, dict[str, np.ndarray]]:
        """Return metric to row label to values of shape (n_items,); the score comes first."""
        first = next(iter(self.rows), SEEN)
        found: dict[str, dict[str, np.ndarray]] = {self.metric: {}}
        for metric, given in self.metrics.items():
            by_method = given if isinstance(given, Mapping) else {first: given}
            check_columns(self.rows, by_method, what="the rows of the gallery")
            for method, values in by_method.items():
                found.setdefault(metric, {}).update(self._read_values(metric, method, values))
        found[self.metric] = {first: self.score, **found[self.metric]}
        found[self.metric][first] = self.score
        return found

    def _read_values(self, metric: str, method: str, values: Any) -> dict[str, np.ndarray]:
        numbers = np.asarray(values, dtype=float)
        numbers = np.where(np.isfinite(numbers), numbers, np.nan)
        if numbers.shape == (len(self.ids),):  # one value per item, draws averaged already
            return {method: numbers}
        draws = self.count_draws(method)
        if numbers.shape == (len(self.ids), draws):
            return {name_draw(method, d) if draws > 1 else method: numbers[:, d] for d in range(draws)}
        raise DataError(
            f"the gallery's {metric} of {method!r} must have the shape ({len(self.ids)},) or "
            f"({len(self.ids)}, {draws}), not {numbers.shape}."
        )

    def __len__(self) -> int:
        return len(self.ids)

    def count_draws(self, method: str) -> int:
        """Return how many draws of a method there are."""
        images = self.rows[method]
        return images.shape[1] if images.ndim == 5 else 1

    def all_rows(self) -> dict[str, Images]:
        """Return row label to images of shape (n_items, height, width, 3), the seen ones first, each draw a row."""
        return dict(self._list_rows())

    def _list_rows(self) -> list[tuple[str, Images]]:
        rows = [(SEEN, self.seen)]
        for method, images in self.rows.items():
            if images.ndim == 4:
                rows.append((method, images))
            elif images.shape[1] == 1:
                rows.append((method, images[:, 0]))
            else:
                rows += [(name_draw(method, d), images[:, d]) for d in range(images.shape[1])]
        return rows

    def average_draws(self, metric: str) -> np.ndarray:
        """Return a metric of the first method, shape (n_items,): as given, or its mean over draws; NaN if unknown."""
        method, known = next(iter(self.rows), SEEN), self.metrics[metric]
        if method in known:
            return known[method]
        draws = [
            known[label] for d in range(self.count_draws(method)) if (label := name_draw(method, d)) in known
        ]
        return np.mean(draws, axis=0) if draws else np.full(len(self), np.nan)

    def find_caption(self, label: str, item: int) -> str:
        """Return the caption of one image, or an empty text; that of a method is at its first draw."""
        for method, texts in self.captions.items():
            if label in (method, name_draw(method, 0)):
                return str(texts[item])
        return ""

    def format_score(self, item: int) -> str:
        """Return the score of an item as text, with as many decimals as every other item."""
        return format_number(float(self.score[item]), self._decimals)

    @functools.cached_property
    def _decimals(self) -> int:
        return count_decimals(self.score)

    def sort_items(self) -> np.ndarray:
        """Return item numbers from best to worst score; items without a score come last."""
        key = -self.score if self.higher_is_better else self.score
        return np.argsort(key, kind="stable")  # NaN sorts last

    def spread_items(self, count: int) -> np.ndarray:
        """Return item numbers evenly spread from the best to the worst score, at most `count`."""
        order = self.sort_items()
        return order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))]

    def select_items(self) -> dict[str, np.ndarray]:
        """Return the item numbers that the rules pick, as `select_items` does."""
        return select_items(
            self.score,
            self.n_each,
            higher_is_better=bool(self.higher_is_better),
            blocks=self.blocks,
            seed=self.seed,
        )


def describe_rule(gallery: GalleryContent, *, short: bool = False) -> str:
    """Return the sentence that says how the shown items were picked."""
    label = write_within_sentence(describe_metric(gallery.metric).label)
    rule = describe_picks(gallery.select_items(), len(gallery), label, gallery.seed, short=short)
    unscored = int((~np.isfinite(gallery.score)).sum())
    return rule + (
        f" {unscored:,} items have no score and are not selected." if unscored and not short else ""
    )


# --- which items are shown -----------------------------------------------------------------------------------------


BLOCKS: Mapping[str, str] = {
    "best": "the {k} best",
    "median": "the {k} around the median",
    "worst": "the {k} worst",
    "quantiles": "{k} at evenly spaced quantiles from best to worst",
    "random": "{k} drawn at random with seed {seed}",
}


def select_items(
    score: Any,
    n_each: int = 4,
    *,
    higher_is_better: bool = True,
    blocks: Sequence[str] = ("best", "median", "worst"),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Pick items by their score or by a seed, and by nothing else.

    Parameters
    ----------
    score : array of shape (n_items,)
        NaN marks an item without a score, which is never picked.
    n_each
        Items of each block; fewer if three blocks of that many would overlap.
    higher_is_better
        Whether a high score is a good one.
    blocks
        What is picked: ``best``, ``median``, ``worst``, ``quantiles`` (ranks at equal distances, the best and the worst
        included) and ``random`` (a draw without replacement among all scored items, whatever else is shown).
    seed
        Decides the draw of ``random``.

    Returns
    -------
    picks
        Block to item numbers, each from better to worse, without overlap among ``best``, ``median`` and ``worst``.
        With fewer than three scored items, ``all`` to all of them. Ties keep the given order.

    Raises
    ------
    ConfigError
        If a block is unknown.

    Examples
    --------
    >>> picks = select_items([0.1, 0.9, 0.5, 0.4, 0.8], 1)
    >>> {name: rows.tolist() for name, rows in picks.items()}
    {'best': [1], 'median': [2], 'worst': [0]}
    >>> select_items([0.1, 0.9, 0.5, 0.4, 0.8], 3, blocks=["quantiles"])["quantiles"].tolist()
    [1, 2, 0]
    """
    for name in blocks:
        check_option("block of a gallery", name, BLOCKS)
    values = np.asarray(score, dtype=float)
    values = np.where(np.isfinite(values), values, np.nan)
    order = np.argsort(-values if higher_is_better else values, kind="stable")
    scored = order[: int(np.isfinite(values).sum())]
    if len(scored) < 3:
        return {"all": order[: 3 * n_each]}
    return {name: _pick(name, scored, n_each, seed) for name in dict.fromkeys(blocks)}


def _pick(name: str, scored: np.ndarray, n_each: int, seed: int) -> np.ndarray:
    k, n = min(n_each, len(scored) // 3), len(scored)  # best, median and worst must not overlap
    if name == "best":
        return scored[:k]
    if name == "median":
        return scored[(n - k) // 2 : (n - k) // 2 + k]
    if name == "worst":
        return scored[-k:]
    if name == "quantiles":
        return scored[np.unique(np.linspace(0, n - 1, min(n_each, n)).round().astype(int))]
    # Among all scored items, also those that other blocks show: a draw that avoids them would not be one.
    places = make_generator(seed, "gallery").choice(n, min(n_each, n), replace=False)
    return scored[np.sort(places)]


def describe_picks(
    picks: Mapping[str, np.ndarray], n_items: int, score: str, seed: int, *, short: bool = False
) -> str:
    """Return the sentence that says how the shown items were picked.

    Parameters
    ----------
    picks
        What `select_items` returned.
    n_items
        Items of the gallery.
    score
        Name of the score, as it reads within a sentence.
    seed
        Seed of the random draw.
    short
        Whether to leave out what is not needed below a picture.
    """
    if "all" in picks:
        k = len(picks["all"])
        if n_items == 1:
            return "The only item."
        return f"All items, best {score} first." if k == n_items else f"The first {k} of {n_items} items."
    parts = [BLOCKS[name].format(k=len(items), seed=seed) for name, items in picks.items()]
    if short:
        listed = ", ".join(part.removeprefix("the ") for part in parts)
        return f"Of {n_items:,} items sorted by {score}: {listed}."
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return (
        f"All {n_items:,} items are sorted by {score}; {listed} are shown. "
        "Items were selected by score, not by hand."
    )
