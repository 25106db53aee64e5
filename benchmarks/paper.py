"""Draw the figure of docs/research/paper.md from the rows of a board.

    braindecode-vis board --entries ENTRIES --out SITE
    python benchmarks/paper.py SITE/entries.json --out docs/images/tracks.png

One panel for each track with an entry: the headline over all subjects of its entries, with 95 % interval, beside the
floors that were computed and the chance level.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

LABELS = {"top1": "top-1", "top5": "top-5", "2_way": "two-way"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="entries.json of a board")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.rows.read_text())
    tracks = list(dict.fromkeys(row["track"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tracks), figsize=(3.1 * len(tracks), 2.6), squeeze=False, layout="constrained"
    )
    for axis, track in zip(axes[0], tracks, strict=True):
        draw_track(axis, track, [row for row in rows if row["track"] == track])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=160)


def draw_track(axis: Any, track: str, rows: list[dict[str, Any]]) -> None:
    """Draw the entries of one track, and the floors that were computed from the first."""
    metric = rows[0]["headline"]
    shown = [
        (f"{row['card']['name']}\n({row['column']})", find_score(row, metric, "decoded")) for row in rows
    ]
    shown += [(name, find_score(rows[0], metric, name)) for name in ("mean image", "shuffled")]
    for place, (_, score) in enumerate(shown):
        colour = "#0d6e74" if place < len(rows) else "#7d8794"
        if score["ci_low"] is not None:
            axis.plot([place, place], [score["ci_low"], score["ci_high"]], color=colour, lw=2)
        axis.plot(place, score["value"], "o", color=colour)
    axis.axhline(shown[0][1]["chance"], color="#b04a12", ls="--", lw=1)
    axis.set_xticks(range(len(shown)), [name for name, _ in shown], fontsize=6.5)
    axis.set_xlim(-0.6, len(shown) - 0.4)
    axis.set_ylim(-0.02, 1.02)
    axis.set_title(f"{track}: {LABELS[metric]}", fontsize=8.5)
    axis.tick_params(axis="y", labelsize=7)


def find_score(row: dict[str, Any], metric: str, method: str) -> dict[str, Any]:
    """Return the score over all subjects, or that of the only one."""
    own = [score for score in row["scores"] if (score["metric"], score["method"]) == (metric, method)]
    return next((score for score in own if score["subject"] == "all"), own[-1])


if __name__ == "__main__":
    main()
