"""Maps the channels of a stream to those of a run: by name, a table or interpolation; and finds their unit.

Owns the matrix from the channels of a stream to those that the run learnt from, repaired and referenced as the run did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from braindecode_vis.base.checks import DataError, suggest
from braindecode_vis.datasets.sources.cleaning_options import Cleaning
from braindecode_vis.datasets.sources.meeg_source import Sensors, list_scalp_positions

#: Units as amplifiers and files write them, each with V, T or T/m, and how much of that it is.
UNITS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("v", "volt", "volts"), ("V", 1.0)),
    **dict.fromkeys(("mv", "millivolt", "millivolts"), ("V", 1e-3)),
    **dict.fromkeys(("uv", "\u00b5v", "\u03bcv", "microvolt", "microvolts"), ("V", 1e-6)),
    **dict.fromkeys(("nv", "nanovolt", "nanovolts"), ("V", 1e-9)),
    **dict.fromkeys(("t", "tesla"), ("T", 1.0)),
    "pt": ("T", 1e-12),
    **dict.fromkeys(("ft", "femtotesla"), ("T", 1e-15)),
    "t/m": ("T/m", 1.0),
    "ft/cm": ("T/m", 1e-13),
}
#: Names of the 10-20 system that the 10-10 system changed, and labels of one cap.
_ALIASES = {"t3": "t7", "t4": "t8", "t5": "p7", "t6": "p8", "cb1": "poo7", "cb2": "poo8"}


@dataclass(frozen=True)
class ChannelMap:
    """How the channels of a stream become those of the run.

    Parameters
    ----------
    matrix : array of shape (n_channels, n_stream)
        Picks, interpolates and references.
    ch_names
        Of its rows.
    rows : int array of shape (n_stored,)
        Stream channel of each of them, -1 for one that is interpolated.
    notes
        What was done, one sentence each.
    interpolated
        Channels that the stream lacks.
    """

    matrix: np.ndarray
    ch_names: tuple[str, ...]
    rows: np.ndarray
    notes: tuple[str, ...] = ()
    interpolated: tuple[str, ...] = ()


def find_factor(unit: str) -> float | None:
    """Return what a unit is in V, T or T/m; None for one that is not known.

    Examples
    --------
    >>> find_factor("microvolts")
    1e-06
    """
    found = UNITS.get(unit.strip().lower())
    return None if found is None else found[1]


def simplify(name: str) -> str:
    """Return a channel name without what amplifiers add to it, in lower case and the names of the 10-10 system.

    Examples
    --------
    >>> simplify("EEG T3-Ref"), simplify("Fp1.")
    ('t7', 'fp1')
    """
    plain = re.sub(r"^(eeg|meg)[\s_-]+", "", name.strip().lower())
    plain = re.sub(r"[\s_-]+(ref|le|a1|a2|avg)$", "", plain).rstrip(". ")
    return _ALIASES.get(plain, plain)


def read_pairs(path: Path, what: str) -> dict[str, str]:
    """Return a table of two columns, separated by tab or comma: the name in the stream, and that in the run.

    Parameters
    ----------
    path
        Of the table. A first line that begins with ``stream``, ``code``, ``marker`` or ``name`` is a header.
    what
        ``channels`` or ``events``, for messages.

    Raises
    ------
    DataError
        If it is no such table, or has an entry of the stream twice.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the table of {what} {path} cannot be read ({error}); give a text of two columns."
        ) from None
    table: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in re.split(r"[\t,]", line)]
        if len(cells) != 2 or not all(cells):
            raise DataError(
                f"line {number} of the table of {what} {path} has {len(cells)} columns; give two: in the stream, "
                "in the run."
            )
        if not table and cells[0].lower() in ("stream", "code", "marker", "name"):
            continue
        if cells[0] in table or (what == "channels" and cells[1] in table.values()):
            raise DataError(
                f"line {number} of the table of {what} {path} repeats {cells[0]!r} or {cells[1]!r}."
            )
        table[cells[0]] = cells[1]
    if not table:
        raise DataError(f"the table of {what} {path} is empty; give two columns: in the stream, in the run.")
    return table


def map_channels(
    have: Sequence[str],
    want: Sequence[str],
    cleaning: Cleaning,
    *,
    stream: str,
    modality: str = "eeg",
    table: Mapping[str, str] | None = None,
    interpolate: bool = False,
    bads: Sequence[str] = (),
) -> ChannelMap:
    """Match the channels of a stream to those of a run.

    Parameters
    ----------
    have, want
        Names in the stream and in the run.
    cleaning
        Of the run: its reference, and whether it interpolates bad channels.
    stream
        Name of the stream, for messages.
    modality
        ``eeg`` or ``meg``.
    table
        Names in the stream to names in the run; others are matched as they are.
    interpolate
        Whether channels that the stream lacks are interpolated from the others (spherical splines).
    bads
        Channels of the stream that are not to be trusted: interpolated where the run did that, and never in a
        reference.

    Raises
    ------
    DataError
        If a channel is missing, or two channels of the stream are the same one of the run.
    """
    have, notes = [str(name) for name in have], []
    if unknown := [name for name in table or {} if name not in have]:
        raise DataError(
            f"the table of channels names {unknown[0]!r}, which the stream {stream} does not have"
            f"{suggest(unknown[0], have)}; it has {_list(have)}."
        )
    own = {simplify(name): name for name in want}
    named: list[str] = []
    for name in have:
        given = (table or {}).get(name)
        named.append(given if given is not None else name if name in want else own.get(simplify(name), name))
    for name in want:
        if (twice := [h for h, n in zip(have, named, strict=True) if n == name])[1:]:
            raise DataError(
                f"the channels {' and '.join(twice)} of the stream {stream} are both {name} of the run; "
                "choose one with a table of channels (--channels)."
            )
    renamed = [f"{h} as {n}" for h, n in zip(have, named, strict=True) if h != n]
    if renamed:
        notes.append(f"Channels of the stream were renamed: {_list(renamed)}.")
    missing = [name for name in want if name not in named]
    if missing and not interpolate:
        raise DataError(
            f"the stream {stream} is missing the channel(s) {_list(missing)} of the run; it has "
            f"{_list(have)}: map their names with --channels, or pass --interpolate."
        )
    scalp = {name.lower(): name for name in list_scalp_positions()} if modality == "eeg" else {}
    # Electrodes only: a trigger or an eye channel has no place in a reference or a repair.
    sensors = [
        row
        for row, name in enumerate(named)
        if name in want or (modality == "eeg" and simplify(name) in scalp)
    ]
    repaired = [name for name in want if name in bads and name not in missing] if cleaning.interpolate else []
    names = [named[row] for row in sensors] + missing
    # (n_names, n_stream): channels that are not there are zero until they are interpolated.
    mixing = np.zeros((len(names), len(have)))
    mixing[np.arange(len(sensors)), sensors] = 1
    if missing or repaired:
        mixing = _interpolate(names, [*missing, *repaired], scalp, stream, modality) @ mixing
        what = f"{_list(missing)} missing" if missing else ""
        what += (
            f"{'; ' if missing and repaired else ''}{f'{_list(repaired)} bad in the run' if repaired else ''}"
        )
        notes.append(f"Interpolated from the other channels by spherical splines: {what}.")
    if cleaning.reference != "none":
        if cleaning.reference == "average":
            good = [
                row
                for row, name in enumerate(names)
                if name not in missing and (name not in bads or repaired)
            ]
            notes.append(f"Referenced to the average of {len(good)} electrodes of the stream, as in the run.")
        else:
            lost = [name for name in cleaning.reference if name not in names]
            if lost:
                raise DataError(
                    f"the run is referenced to {_list(cleaning.reference)}, but the stream {stream} has "
                    f"no {lost[0]}, so it cannot be referenced in the same way."
                )
            good = [names.index(name) for name in cleaning.reference]
        mixing = mixing - mixing[good].mean(axis=0)
    rows = np.array([named.index(name) if name in named else -1 for name in want])
    picked = mixing[[names.index(name) for name in want]]
    return ChannelMap(picked, tuple(want), rows, tuple(notes), tuple(missing))


def _interpolate(
    names: Sequence[str], bads: Sequence[str], scalp: Mapping[str, str], stream: str, modality: str
) -> np.ndarray:
    from braindecode_vis.preprocessing.cleaning import make_interpolation

    if modality != "eeg":
        raise DataError(
            f"the stream {stream} has no positions of its coils, so {_list(bads)} cannot be "
            "interpolated; this is possible only for electrodes."
        )
    if unknown := [name for name in names if simplify(name) not in scalp]:
        raise DataError(
            f"{_list(unknown)} of the stream {stream} are not in the 10-05 system, so they cannot be "
            "used for interpolation; map their names with --channels."
        )
    positions = list_scalp_positions()
    places = np.stack([positions[scalp[simplify(name)]] for name in names])

    def read(start: int, stop: int) -> np.ndarray:
        raise AssertionError("only positions are asked for")

    sensors = Sensors(tuple(names), read, places)
    return make_interpolation(sensors, list(bads), f"the stream {stream}", modality)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}"


def find_swapped(stream: np.ndarray, run: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of channels that look swapped, by how channels vary together.

    A pair is named if exchanging both halves the disagreement of their rows with those of the run, and neither fits
    better with any other.

    Parameters
    ----------
    stream, run : arrays of shape (n_channels, n_channels)
        Covariances.

    Examples
    --------
    >>> run = np.exp(-np.abs(np.subtract.outer(np.arange(8), np.arange(8))) / 2)
    >>> order = [0, 5, 2, 3, 4, 1, 6, 7]
    >>> find_swapped(run[np.ix_(order, order)], run)
    [(1, 5)]
    """
    r, s = (c / np.sqrt(np.outer(np.diag(c), np.diag(c)) + 1e-300) for c in (run, stream))
    found: list[tuple[int, int]] = []
    # One after the other: a pair in the wrong places makes its neighbours look wrong, too.
    while len(found) < len(r) // 4:
        # fit[a, b]: how badly channel a of the stream fits the place b of the run, by its ties to all the others.
        fit = (s**2).sum(1)[:, None] + (r**2).sum(1)[None] - 2 * s @ r.T
        for a, b in np.ndindex(fit.shape):
            fit[a, b] -= sum((s[a, c] - r[b, c]) ** 2 for c in {a, b})
        own = np.diag(fit)
        gain = own[:, None] + own[None] - fit - fit.T
        a, b = (int(n) for n in np.unravel_index(np.argmax(np.triu(gain, 1)), gain.shape))
        if gain[a, b] <= 0.5 * (own[a] + own[b]) or gain[a, b] < 1e-3 * len(r):
            break
        order = np.arange(len(r))
        order[[a, b]] = b, a
        s = s[np.ix_(order, order)]
        found.append((a, b))
    return found
