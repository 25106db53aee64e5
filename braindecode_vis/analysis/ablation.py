"""Where the information is: only one group of columns, all but one group, and random groups of the same size.

Owns the comparison that regions of sensors, regions of voxels and networks of parcels share. A large group decodes
better because it is large; so every group stands beside random groups of the same number of columns, drawn from all
columns. A drop after leaving a group out says that the encoder used it, not that other groups do not hold the same
information.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.analysis.cuts import Columns, Outside, keep_columns
from braindecode_vis.analysis.drawing import draw_bars
from braindecode_vis.analysis.measure import Measured, describe_result, measure_changes
from braindecode_vis.analysis.study import Change, Findings, Plot, Study
from braindecode_vis.checks import DataError
from braindecode_vis.metrics.uncertainty import compute_p_value
from braindecode_vis.seeds import make_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Condition = tuple[str, str, int]  # mode, group (or size), draw
WHOLE: Condition = ("all", "all", 0)


def ablate(
    study: Study,
    groups: Mapping[str, Columns],
    *,
    metric: str,
    n_random: int,
    outside: Outside,
    kind: str,
    title: str,
    noun: str,
) -> Findings:
    """Decode from only each group, from all but each group, and from random groups of the same sizes.

    Parameters
    ----------
    groups
        Name to the columns of each group.
    n_random
        Random groups per size; 0 draws none.
    outside
        ``cut`` leaves columns out; ``zero`` sets them to zero, for networks that need them all.
    noun
        What a column is called.

    Raises
    ------
    DataError
        If there are fewer than two groups, or one holds every column.
    """
    if len(groups) < 2:
        raise DataError(
            f"the analysis {kind} needs at least two groups of {noun}s, found {', '.join(groups) or 'none'}."
        )
    every = _join(groups)
    kept: dict[Condition, Columns] = {}
    for name, columns in groups.items():
        rest = _invert(columns, every)
        if _count(rest) == 0:
            raise DataError(f"the group {name} holds every {noun}, so nothing can be compared with it.")
        kept["only", name, 0], kept["without", name, 0] = columns, rest
    sizes = {_key(columns) for columns in kept.values()}
    for size in sorted(sizes):
        for draw in range(n_random):
            kept["random", size, draw] = _draw(every, size, study.seed, draw)
    changes: dict[Condition, Change | None] = {WHOLE: partial(keep_columns, keep=every, outside=outside)}
    changes |= {c: partial(keep_columns, keep=columns, outside=outside) for c, columns in kept.items()}
    measured = measure_changes(
        study,
        changes,
        metric,
        permute=lambda condition: condition[0] != "random",
        what=kind.replace("_", " "),
    )
    rows = [
        _make_row(study, condition, columns, measured, n_random)
        for condition, columns in {WHOLE: every, **kept}.items()
        if condition[0] != "random"
    ]
    return _report(pd.DataFrame(rows), metric, kind, title, noun, n_random)


def _make_row(
    study: Study, condition: Condition, columns: Columns, measured: dict[Condition, Measured], n_random: int
) -> dict[str, Any]:
    mode, name, _ = condition
    found, whole = measured[condition], measured[WHOLE]
    row = {"group": name, "mode": mode, "n_columns": _count(columns), **found.as_row(study)}
    draws = [measured["random", _key(columns), d] for d in range(n_random)] if mode != "all" else []
    # A group left out is worth what the score loses; a group alone is worth its score.
    against = found.compare(study, whole.values) if mode != "all" else None
    row |= {
        "difference": found.value - whole.value,
        "difference_low": against.interval.low if against else np.nan,
        "difference_high": against.interval.high if against else np.nan,
        "p_difference": against.p_value if against else np.nan,
    }
    if not draws:
        names = (
            "random",
            "random_low",
            "random_high",
            "p_random",
            "versus_random",
            "versus_low",
            "versus_high",
        )
        return row | dict.fromkeys(names, np.nan)
    level = np.array([d.value for d in draws])
    # A group left out matters if the score falls lower than without as many random columns.
    extreme = compute_p_value(found.value, level, alternative="greater" if mode == "only" else "less")
    mean = np.mean([d.values for d in draws], axis=0)
    versus = found.compare(study, mean)
    low, high = np.quantile(level, [0.025, 0.975])
    return row | {
        "random": float(level.mean()), "random_low": float(low), "random_high": float(high),
        "p_random": float(extreme), "versus_random": found.value - float(level.mean()),
        "versus_low": versus.interval.low if versus else np.nan,
        "versus_high": versus.interval.high if versus else np.nan,
    }  # fmt: skip


def _report(table: pd.DataFrame, metric: str, kind: str, title: str, noun: str, n_random: int) -> Findings:
    whole = table.iloc[0]
    only = table[table["mode"] == "only"].sort_values("value", ascending=False)
    without = table[table["mode"] == "without"].set_index("group").loc[only["group"]].reset_index()

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        words = ("only this group", "all but this group")
        for axes, own, heading in zip(panels, (only, without), words, strict=True):
            labels = [f"{g} ({n})" for g, n in zip(only["group"], only["n_columns"], strict=True)]
            draw_bars(axes, own, labels)
            if n_random:
                place = np.arange(len(own)) + 0.2
                axes.plot(
                    own["random"], place, ls="none", marker="D", ms=4, color="C1", label="random, same size"
                )
                axes.hlines(place, own["random_low"], own["random_high"], color="C1", lw=1)
            axes.axvline(whole["value"], color="C5", lw=0.8, label=f"all {noun}s")
            axes.axvline(whole["chance"], color="C2", lw=1, ls="--", label="chance")
            axes.set_title(heading)
            axes.set_xlabel(metric)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    best = only.iloc[0]
    worst = without.loc[without["value"].idxmin()]
    found = (
        f"{describe_result(whole, f'with all {noun}s {metric}')}; most from {best['group']} alone: "
        f"{describe_result(best, metric)}; the score loses most without {worst['group']}: "
        f"{worst['difference']:+.3f} ({worst['difference_low']:+.3f} to {worst['difference_high']:+.3f})."
    )
    if n_random:
        found += (
            f" Of {n_random} random groups of the size of {best['group']}, the mean is {best['random']:.3f} "
            f"(p = {best['p_random']:.2g} for as much as {best['group']})."
        )
    how = f"An encoder was fitted and tested on each group of {noun}s alone and on all but each group."
    caption = (
        f"Score from one group of {noun}s alone (left) and from all but one (right), 95 % intervals; number of {noun}s "
        "in brackets. Diamonds: mean of random groups of the same size, with the range of 95 % of them."
    )
    size = (7.4, 1.6 + 0.34 * len(only))
    return Findings(title, f"{how} {found}", table, (Plot(kind, caption, found, draw, size),))


# --- sets of columns, common or of each subject -----------------------------------------------------------


def _join(groups: Mapping[str, Columns]) -> Columns:
    """Return every column that can be chosen: all of them, in the groups or not."""
    first = next(iter(groups.values()))
    if isinstance(first, Mapping):
        return {subject: np.ones(len(chosen), bool) for subject, chosen in first.items()}
    return np.ones(len(first), bool)


def _invert(columns: Columns, every: Columns) -> Columns:
    if isinstance(columns, Mapping) and isinstance(every, Mapping):
        return {subject: every[subject] & ~chosen for subject, chosen in columns.items()}
    assert isinstance(columns, np.ndarray)
    assert isinstance(every, np.ndarray)
    return every & ~columns


def _count(columns: Columns) -> int:
    """Return the number of columns; of the subject with fewest where subjects have their own."""
    if isinstance(columns, Mapping):
        return min(int(chosen.sum()) for chosen in columns.values())
    return int(columns.sum())


def _key(columns: Columns) -> str:
    """Return the sizes as text: conditions of the same sizes share their random groups."""
    if isinstance(columns, Mapping):
        return "/".join(f"{subject}={int(chosen.sum())}" for subject, chosen in columns.items())
    return f"{int(columns.sum()):06d}"


def _draw(every: Columns, size: str, seed: int, number: int) -> Columns:
    generator = make_generator(seed, "random groups", size, number)

    def pick(chosen: np.ndarray, n: int) -> np.ndarray:
        out = np.zeros(len(chosen), bool)
        out[generator.choice(np.flatnonzero(chosen), n, replace=False)] = True
        return out

    if isinstance(every, Mapping):
        counts = dict(part.rsplit("=", 1) for part in size.split("/"))
        return {subject: pick(chosen, int(counts[subject])) for subject, chosen in every.items()}
    return pick(every, int(size))
