"""The rules that choose which items a gallery shows: by their score or by a seed, never by a hand.

Owns the blocks of a gallery and the sentence that says how they were filled. Works on scores alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from braindecode_vis.checks import check_option
from braindecode_vis.seeds import make_generator

BlockName = Literal["best", "median", "worst", "quantiles", "random"]
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
    k, n = min(n_each, len(scored) // 3), len(scored)
    if name == "best":
        return scored[:k]
    if name == "median":
        return scored[(n - k) // 2 : (n - k) // 2 + k]
    if name == "worst":
        return scored[-k:]
    if name == "quantiles":
        return scored[np.unique(np.linspace(0, n - 1, min(n_each, n)).round().astype(int))]
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
        "The rule alone picks them, never a person."
    )
