"""One table beside peers, one of growth, one of start-up; printed, and written for the docs.

    python benchmarks/table.py --quick                          # small sizes, under three minutes
    python benchmarks/table.py --write docs/research/BENCHMARKS.md  # the table of the docs; half an hour on one core
    python benchmarks/table.py --only ridge ranks sessions      # some rows; --list names them
    python benchmarks/table.py --only ridge --large             # sizes of a subject of NSD, too
    python benchmarks/table.py --only pixels --write docs/research/BENCHMARKS.md  # these rows anew

`peers.py` and `growth.py` declare the rows, `measuring.py` says how they are measured. Peers come with
``pip install braindecode_vis[bench]``; one that is not installed has a row that says so. Exit code 1 says that a row
failed or that a peer did not compute the same.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # one core
import argparse
import importlib
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from growth import GROWTHS
from measuring import (
    Curve,
    Pairs,
    carry_sections,
    describe_machine,
    fit_exponent,
    measure_growth,
    measure_row,
    read_clock,
)
from peers import ROWS
from start_up import list_commands, measure, prepare

BUDGET = {"quick": 0.5, "full": 5.0}  # s of the pairs of a row at one size
#: Loaded before the first measurement, so that processes that are forked have them.
LIBRARIES = (
    "torch", "torchvision", "pandas", "sklearn.linear_model", "mne", "nilearn.glm.first_level", "skimage.metrics",
    "himalaya.kernel_ridge", "himalaya.ridge", "torchmetrics.functional.image", "open_clip", "faiss",
)  # fmt: skip
HEAD = """\
# Benchmarks

Written by `{command}` (see [CONTRIBUTING.md](../CONTRIBUTING.md)); do not edit.

{machine}

Time is processor time of one thread, in seconds. Ours and the peers take turns within one process and do the same work
on the same input; a ratio below 1 says that ours takes less. In brackets: quartiles of the ratio over the pairs, and
their number. Memory is the peak beyond the input, each in a fresh process. *Difference* is the largest between the two
results as a share of the largest value (of ranks, the share that differ), beside what counts as the same work; words
stand where numbers would mislead.
"""

LOST = "Rows in which a peer takes less:"
RENEWED = "Rows that were measured again later, by themselves:"
GROWTH = """\
## Growth

Seconds and peak memory by size, each in a fresh process, and the power by which they grow (least squares on logarithms,
with its standard error). In brackets the bound: 1.15 where it is meant to be linear, 0.15 constant. It holds where the
power is not above it, and does not where it is above by more than two standard errors. Fixed costs pull powers down at
small sizes; memory counts from 1 MB.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few pairs")
    parser.add_argument("--large", action="store_true", help="sizes of NSD as well, which take minutes each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of these names")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="beside these peers alone")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the tables here, as Markdown")
    given = parser.parse_args()
    known = [*(row.name for row in ROWS), *(growth.name for growth in GROWTHS), "start-up"]
    if given.list:
        print("\n".join(known))
        return
    wanted = given.only or known
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(known)}")
    if given.write and given.only:
        if others := sorted(set(wanted) - {row.name for row in ROWS}):
            parser.error(f"--write renews rows beside peers alone, not {', '.join(others)}")
        if given.quick or not given.write.is_file():
            parser.error("--write with --only renews rows of a whole table that is there, in its sizes")
    for library in LIBRARIES:
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(library)

    def tell_spent(name: str, since: float) -> None:
        print(f"  {name}: {read_clock() - since:.0f} s", file=sys.stderr, flush=True)

    measured: list[Pairs] = []
    for row in ROWS:
        sizes = row.quick if given.quick else row.full + row.large * given.large
        for size in sizes if row.name in wanted else ():
            since = read_clock()
            budget = BUDGET["quick" if given.quick else "full"]
            found = measure_row(row, size, budget=budget, only=given.peers)
            print("\n".join(map(tell_pairs, found)), flush=True)
            measured += found
            tell_spent(f"{row.name}, {row.size.format(**size)}", since)
    curves: list[Curve] = []
    for growth in GROWTHS:
        if growth.name in wanted:
            sizes = growth.quick if given.quick else growth.full
            since = read_clock()
            curves.append(measure_growth(growth, sizes, repeats=1 if given.quick else 3))
            print(tell_curve(curves[-1]), flush=True)
            tell_spent(growth.name, since)
    start_up = time_start_up(1 if given.quick else 5) if "start-up" in wanted else []
    print("\n".join(f"{name:32s} {seconds:5.2f} s" for name, seconds in start_up))
    print(f"{read_clock():.0f} s of processor time in all")
    if given.write:
        command = "make bench-quick" if given.quick else "make bench"
        page = (
            renew_rows(given.write.read_text(), measured)
            if given.only
            else write_document(measured, curves, start_up, command=command)
        )
        if given.write.is_file():  # what other benchmarks wrote stays
            page = carry_sections(given.write.read_text(), page)
        given.write.write_text(page)
    wrong = [
        pairs
        for pairs in measured
        if pairs.failure.startswith("failed") or not (pairs.failure or pairs.is_same)
    ]
    sys.exit(1 if wrong or any(curve.failure for curve in curves) else 0)


def time_start_up(repeats: int) -> list[tuple[str, float]]:
    """Return the processor seconds of the commands that compute nothing."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        return [(name, measure(command, folder, repeats)) for name, command in list_commands(folder).items()]


# --- on the screen ----------------------------------------------------------------------------------------


def tell_pairs(pairs: Pairs) -> str:
    head = f"{pairs.row.title}, {pairs.size}: "
    if pairs.failure:
        return f"{head}{pairs.peer} {pairs.failure}"
    ours, theirs = pairs.seconds
    return (
        f"{head}{pairs.ratio:.2f} ({_tell_spread(pairs)}) of {pairs.peer}, {ours:.3g} and {theirs:.3g} s, "
        f"{_tell_memory(pairs.peaks[0])} and {_tell_memory(pairs.peaks[1])} MB, difference {_tell_difference(pairs)}"
    )


def tell_curve(curve: Curve) -> str:
    if curve.failure:
        return f"{curve.growth.title}: {curve.failure}"
    seconds, memory = (_tell_exponent(curve, values) for values in (curve.seconds, curve.peaks))
    return f"{curve.growth.title}: time grows with the power {seconds}, memory {memory}"


def _tell_spread(pairs: Pairs) -> str:
    low, high = np.percentile(pairs.ratios, [25, 75])
    return f"{low:.2f} to {high:.2f}, {len(pairs.ratios)}"


def _tell_memory(peak: float | None) -> str:
    return "-" if peak is None else f"{max(peak, 0):.0f}"


def _tell_difference(pairs: Pairs) -> str:
    if isinstance(pairs.difference, str):
        return pairs.difference
    return f"{pairs.difference:.0e} ({'' if pairs.is_same else 'TOO LARGE, '}{pairs.row.tolerance:.0e})"


def _fit(curve: Curve, values: Sequence[float]) -> tuple[float, float]:
    return fit_exponent(curve.sizes, [max(value, 1.0 if values is curve.peaks else 1e-6) for value in values])


def _tell_exponent(curve: Curve, values: Sequence[float]) -> str:
    return "{:.2f} ± {:.2f}".format(*_fit(curve, values))


# --- for the docs -----------------------------------------------------------------------------------------


def write_document(
    measured: Sequence[Pairs], curves: Sequence[Curve], start_up: Sequence[tuple[str, float]], *, command: str
) -> str:
    """Return the page."""
    parts = [HEAD.format(command=command, machine=describe_machine())]
    lines = [
        "| task | size | peer | ratio | ours, s | peer, s | ours, MB | peer, MB | difference |",
        "|---" * 9 + "|",
    ]
    lines += map(tell_row, measured)
    parts.append("## Beside peers\n\n" + "\n".join(lines))
    parts.append(list_lost(lines))
    asides = {pairs.peer: pairs.row.aside[pairs.peer] for pairs in measured if pairs.peer in pairs.row.aside}
    parts += [f"For information alone: {peer} {words}" for peer, words in asides.items()]
    parts += dict.fromkeys(pairs.row.words for pairs in measured if pairs.row.words)
    lines = ["| what grows | sizes | s | MB | power of time | power of memory |", "|---" * 6 + "|"]
    for curve in curves:
        if curve.failure:
            lines.append(f"| {curve.growth.title} | {curve.failure} | | | | |")
            continue
        told = (
            ", ".join(map(str, curve.sizes)), ", ".join(f"{value:.2g}" for value in curve.seconds),
            ", ".join(_tell_memory(value) for value in curve.peaks),
            _judge(curve, curve.seconds, curve.growth.seconds), _judge(curve, curve.peaks, curve.growth.memory),
        )  # fmt: skip
        lines.append(f"| {curve.growth.title} | {' | '.join(told)} |")
    parts.append(f"{GROWTH}\n" + "\n".join(lines))
    parts += [curve.growth.words for curve in curves if curve.growth.words]
    if start_up:
        lines = [
            "| command | s |",
            "|---|---|",
            *(f"| {name} | {seconds:.2f} |" for name, seconds in start_up),
        ]
        parts.append(
            "## Commands that compute nothing\n\nProcessor time of whole processes, the fastest of several.\n\n"
            + "\n".join(lines)
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def tell_row(pairs: Pairs) -> str:
    """Return a line of the table beside peers."""
    head = f"| {pairs.row.title} | {pairs.size} | {pairs.peer} "
    if pairs.failure:
        return f"{head}| {pairs.failure} | | | | | |"
    mark = "**" if pairs.is_lost else ""
    return (
        f"{head}| {mark}{pairs.ratio:.2f}{mark} ({_tell_spread(pairs)}) "
        f"| {pairs.seconds[0]:.3g} | {pairs.seconds[1]:.3g} "
        f"| {_tell_memory(pairs.peaks[0])} | {_tell_memory(pairs.peaks[1])} | {_tell_difference(pairs)} |"
    )


def list_lost(lines: Sequence[str]) -> str:
    """Return the paragraph on lines of the table in which a peer takes less."""
    lost = [re.match(r"\| (.*?) \| (.*?) \| (.*?) \| \*\*(.*?)\*\*", line) for line in lines]
    told = [f"- {found[1]}, {found[2]}: {found[4]} of {found[3]}" for found in lost if found]
    return f"{LOST}\n\n" + ("\n".join(told) or "- none")


def renew_rows(page: str, measured: Sequence[Pairs]) -> str:
    """Return a page that `write_document` wrote with these rows in the place of theirs, and what was renewed."""
    lines = page.split("\n")
    for pairs in measured:
        line = tell_row(pairs)
        head = line[: line.index(f"| {pairs.peer} ") + len(pairs.peer) + 3]
        places = [place for place, old in enumerate(lines) if old.startswith(head)]
        if len(places) > 1:
            raise SystemExit(f"{len(places)} rows of the table begin with {head!r}; measure the whole table.")
        if places:
            lines[places[0]] = line
            continue
        # A new row stands behind those of its task and size, or at the end.
        alike = (f"| {pairs.row.title} | {pairs.size} |", f"| {pairs.row.title} |", "| ")
        last = lines.index("## Growth") if "## Growth" in lines else len(lines)
        ends = ([n for n, old in enumerate(lines[:last]) if old.startswith(start)] for start in alike)
        lines.insert(next(found for found in ends if found)[-1] + 1, line)
    blocks = "\n".join(lines).split("\n\n")
    place = blocks.index(LOST)
    blocks[place : place + 2] = [list_lost(lines)]
    titles = sorted({pairs.row.title for pairs in measured})
    load = f", load when it ended {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    renewed = [f"- {title}{load}" for title in titles]
    if blocks[place + 1] == RENEWED:
        kept = blocks[place + 2].split("\n")
        renewed = [line for line in kept if not any(line.startswith(f"- {x},") for x in titles)] + renewed
        del blocks[place + 1 : place + 3]
    blocks.insert(place + 1, f"{RENEWED}\n\n" + "\n".join(renewed))
    # What is said of a row may have changed with it.
    for words in {pairs.row.words for pairs in measured if pairs.row.words}:
        start = words.split(":")[0] + ":"
        blocks = [words if block.startswith(start) and "\n" not in block else block for block in blocks]
    return "\n\n".join(blocks)


def _judge(curve: Curve, values: Sequence[float], bound: float | None) -> str:
    power, error = _fit(curve, values)
    if bound is None:
        return _tell_exponent(curve, values)
    verdict = (
        "holds" if power <= bound else "undecided" if power - 2 * error <= bound else "**does not hold**"
    )
    return f"{_tell_exponent(curve, values)}, {verdict} ({bound})"


if __name__ == "__main__":
    main()
