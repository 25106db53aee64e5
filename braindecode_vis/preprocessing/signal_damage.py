"""Finds damaged signal while trials are read: constant, repeated and impossibly large values.

Defines what is damage, how much is only reported and how much is refused, and the sentences. A file half overwritten
with zeros still has the same size and can be read without an error, so only its numbers show the damage. The checks use
values that are in memory anyway, a few hundred per trial. Zeros outside the trials, at the padded ends of a recording,
are not checked; voxels outside the brain and channels without an electrode are the same in all trials and are no
damage. Does not depend on a file format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.store import json_plain
from braindecode_vis.datasets.manifests import find_missing, list_recordings

# Values of a trial that are looked at, evenly spaced over it.
_N_PROBES = 512
# Two trials of fewer values may be equal by chance, as digitised ones are.
_LEAST_COMPARED, _LEAST_DISTINCT = 20, 8
# A trial of fewer values may be constant without a fault.
_LEAST_VALUES = 8
# Neighbouring probes that are equal, beyond what is usual in the file (masked voxels are equal in all trials).
_HELD_SHARE = 0.25
# Artefacts reach some hundred times the usual size; damaged exponents are far above.
_LARGEST_RATIO = 1e4
# Nothing that is digitised stays the same in most channels for so long: 50 ms, and eight samples.
_HELD_S, _HELD_SAMPLES = 0.05, 8
# A channel is told of when it is flat, or at the end of its range, for more than this share of the time or the trials.
_FLAT_SHARE, _CLIPPED_SHARE, _FLAT_S = 0.01, 0.1, 0.25
# Features that are lost in one session alone: some at the edge of the volume always are.
_LOST_TOLD, _LOST_REFUSED = 0.01, 0.2
_N_FEATURES = 4096
# Features that never change in any file: told, and refused where the mask is not the user's own or the whole volume.
_CONSTANT_TOLD, CONSTANT_REFUSED = 0.01, 0.25
#: Deviations within a trial that a unit can have: amplifiers noise below, and nothing biological above.
PLAUSIBLE = {"V": (1e-8, 5e-2), "T": (1e-16, 1e-7), "T/m": (1e-15, 1e-6)}


@dataclass(frozen=True)
class DamageFinding:
    """Damage found in one file.

    Parameters
    ----------
    where
        Subject, session and file.
    what
        What is wrong, as a clause.
    n, of
        Number of damaged trials, volumes or channels, and their total number.
    refused
        Whether this is too much to continue.
    """

    where: str
    what: str
    n: int
    of: int
    refused: bool = False

    def describe(self) -> str:
        """Return the finding as a clause without a full stop."""
        return f"{self.where}: {self.what}"


@dataclass
class DamageWatch:
    """Collects the damage in all files of a data set, and refuses too much damage.

    Parameters
    ----------
    remedy
        What to do about a damaged file.
    most
        Largest share of the trials of a file that may be damaged; a single damaged trial is always accepted.
    refuses
        Whether too much damage raises `DataError`, or is kept as a finding like the rest.
    most_constant
        Largest share of the features that may never change in any file of a subject.
    """

    remedy: str = "fetch it again"
    most: float = 0.01
    refuses: bool = True
    most_constant: float = CONSTANT_REFUSED
    findings: list[DamageFinding] = field(default_factory=list)
    _seen: SeenRows | None = field(default=None, repr=False)
    _held: dict[str, list[tuple[int, int]]] = field(default_factory=dict, repr=False)
    _channels: dict[str, ChannelCounts] = field(default_factory=dict, repr=False)
    _features: dict[str, list[tuple[str, np.ndarray]]] = field(default_factory=dict, repr=False)
    _begun: tuple[int, int, int, int] = field(default=(0, 0, 0, 0), repr=False)

    # --- sessions, which a process that goes on after another one does not read again ---

    def begin_session(self, subject: str) -> None:
        """Record where a session of a subject begins, for `pack_session`."""
        seen = self._see(subject)
        self._begun = (
            len(self.findings), len(seen.files), len(seen.places), len(self._features.get(subject, ()))
        )  # fmt: skip

    def _see(self, subject: str) -> SeenRows:
        # One subject after the other, so that what is remembered does not grow with their number.
        if self._seen is None or self._seen.subject != subject:
            self._seen = SeenRows(subject)
        return self._seen

    def pack_session(self) -> dict[str, Any]:
        """Return the findings of the present session, as arrays and text."""
        assert self._seen is not None
        n_findings, n_files, n_places, n_features = self._begun
        files = self._seen.files[n_files:]
        places = list(self._seen.places.items())[n_places:]
        features = self._features.get(self._seen.subject, [])[n_features:]
        return {
            "findings": json.dumps(json_plain(self.as_json()[n_findings:])),
            "seen_files": np.array([where for where, _ in files], dtype=str),
            **{f"seen_names{n}": np.asarray(names, dtype=str) for n, (_, names) in enumerate(files)},
            "seen_places": np.array(places, dtype=np.uint64).reshape(-1, 2),
            "varying_files": np.array([where for where, _ in features], dtype=str),
            **{f"varying{n}": varying for n, (_, varying) in enumerate(features)},
        }

    def unpack_session(self, packed: Mapping[str, np.ndarray]) -> None:
        """Restore the result of `pack_session` of an earlier process, instead of reading the present session."""
        assert self._seen is not None
        self.findings += [DamageFinding(**found) for found in json.loads(str(packed["findings"]))]
        for n, where in enumerate(packed["seen_files"].tolist()):
            self._seen.files.append((where, packed[f"seen_names{n}"]))
        self._seen.places |= dict(packed["seen_places"].tolist())
        for n, where in enumerate(packed["varying_files"].tolist()):
            self._features.setdefault(self._seen.subject, []).append((where, packed[f"varying{n}"]))

    def settle(self, finding: DamageFinding) -> None:
        """Keep a finding, or raise it as `DataError`."""
        if finding.refused and self.refuses:
            raise DataError(f"{finding.describe()}: the file is damaged; {self.remedy}.")
        self.findings.append(finding)

    def is_too_much(self, n: int, of: int) -> bool:
        """Say whether this many damaged rows are above the limit."""
        return n > max(1.0 if self.most else 0.0, self.most * of) or n == of

    def describe(self) -> list[str]:
        """Return a sentence for each finding that was not an error, for every report on these trials."""
        return [f"{finding.describe()}." for finding in self.findings]

    def as_json(self) -> list[dict[str, Any]]:
        """Return the findings as plain values."""
        return [asdict(finding) for finding in self.findings]

    def open_rows(
        self,
        where: str,
        subject: str,
        names: Sequence[str] | np.ndarray,
        *,
        rows: str = "trials",
        unit: str = "",
        compares_features: bool = False,
    ) -> RowWatch:
        """Return a watch over the trials or volumes of one file, which are given to it in order.

        Parameters
        ----------
        where
            Subject, session and file.
        subject
            Subject; its trials are compared over all files.
        names : sequence of length n_rows
            Image of each row: copies with the same image are not damage, since some publishers repeat averages.
        rows
            Word for the rows.
        unit
            Unit of the values, if they still have one.
        compares_features
            Whether features correspond between the files of a subject.
        """
        seen = self._see(subject)
        seen.files.append((where, names))
        return RowWatch(self, seen, where, names, rows, unit, compares_features)

    # --- continuous samples ---

    def look_at_samples(
        self, where: str, ch_names: Sequence[str], samples: np.ndarray, start: int, sfreq: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Record which channels do not change in a stretch of a recording.

        Parameters
        ----------
        where
            Name of the recording.
        ch_names
            Channels of `samples`.
        samples : array of shape (n_channels, n_samples)
        start
            Number of the first of them in the recording.
        sfreq
            In Hz.

        Returns
        -------
        low, high : arrays of shape (n_channels,)
            Extremes of each channel.
        """
        counts = self._channels.setdefault(where, ChannelCounts(tuple(ch_names)))
        low, high = counts.add(samples, sfreq)
        runs = find_held_runs(samples, low == high, max(_HELD_SAMPLES, round(_HELD_S * sfreq)))
        self._held.setdefault(where, []).extend((start + a, start + b) for a, b in runs)
        return low, high

    def find_held_trials(self, where: str, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return which trials, each from sample `first` to `last`, overlap a stretch without signal."""
        held = np.zeros(len(first), bool)
        for start, stop in self._held.pop(where, ()):
            held |= (first < stop) & (last >= start)
        return held

    def settle_channels(self, where: str) -> None:
        """Report the channels of a recording that are flat or at the end of their range for a long time."""
        counts = self._channels.pop(where, None)
        if counts is not None:
            self._settle_shares(where, counts.ch_names, counts.shares, "of the time")

    def _settle_shares(
        self, where: str, ch_names: Sequence[str], shares: dict[str, np.ndarray], of: str
    ) -> None:
        for what, share in shares.items():
            rows = np.flatnonzero(share > (_FLAT_SHARE if "flat" in what else _CLIPPED_SHARE))
            if len(rows):
                named = ", ".join(f"{ch_names[row]} {share[row]:.1%}" for row in rows[:8])
                more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
                clause = f"{len(rows)} channel(s) {what} for a part {of}: {named}{more}"
                self.settle(DamageFinding(where, clause, len(rows), len(share)))

    # --- voxels ---

    def settle_features(self, subject: str) -> None:
        """Compare the files of a subject: a feature that varies in others and is constant in one was lost there."""
        parts = self._features.pop(subject, [])
        if not parts:
            return
        varies = np.stack([varying for _, varying in parts])  # (n_files, n_features)
        n, of = int((~varies.any(axis=0)).sum()), varies.shape[1]
        if n > _CONSTANT_TOLD * of and of >= _LEAST_COMPARED:
            clause = f"{n / of:.0%} of the features never change: they lie outside the brain, or were lost"
            where = f"subject {subject}, {parts[0][0].rpartition(', ')[2]}"
            self.settle(DamageFinding(where, clause, n, of, n > self.most_constant * of))
        for (where, varying), others in zip(parts, varies.sum(axis=0) - varies > 0, strict=True):
            n, of = int((others & ~varying).sum()), int(others.sum())
            if n > _LOST_TOLD * of:
                clause = (
                    f"{n / of:.0%} of the features never change here, but do in other files of the subject"
                )
                self.settle(DamageFinding(where, clause, n, of, n > _LOST_REFUSED * of))


@dataclass
class ChannelCounts:
    """For how long each channel of a recording was flat, and at the end of its range."""

    ch_names: tuple[str, ...]
    total: int = 0
    flat: np.ndarray = field(init=False)
    clipped: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.flat, self.clipped = np.zeros((2, len(self.ch_names)))

    def add(self, samples: np.ndarray, sfreq: float) -> tuple[np.ndarray, np.ndarray]:
        """Count a stretch of shape (n_channels, n_samples), and return the extremes; ignore short stretches."""
        n, step = samples.shape[1], max(1, round(_FLAT_S * sfreq))
        starts = np.arange(0, n, step)
        # (n_channels, n_steps)
        lows, highs = (f.reduceat(samples, starts, axis=1) for f in (np.minimum, np.maximum))
        low, high = lows.min(axis=1), highs.max(axis=1)
        if n < step:
            return low, high
        self.total += n
        is_flat = low == high
        probes = samples[:, :: max(1, n // 200)]
        at_end = (probes == low[:, None]) | (probes == high[:, None])
        # A coarse converter has few levels, and visits both ends of a quiet stretch often; a clipped one stays there.
        stays = (at_end[:, 1:] & (probes[:, 1:] == probes[:, :-1])).mean(axis=1)
        is_clipped = (stays > 0.5) & ~is_flat
        self.clipped += n * is_clipped
        held = (lows == highs)[:, : n // step]  # a channel may be flat for a part of the stretch alone
        held &= ~held.all(axis=0)  # all of them are the matter of `find_held_runs`
        self.flat += np.where(is_flat, n, step * held.sum(axis=1) * ~is_clipped)
        return low, high

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """Shares of the time with each kind of damage, each of shape (n_channels,)."""
        total = max(1, self.total)
        # What is flat throughout is another finding: channels without an electrode are.
        part = (self.flat < total) * self.flat / total
        return {"are flat": part, "are clipped": self.clipped / total}


class SeenRows:
    """The rows of one subject by a digest of some values, with the place of first appearance."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.files: list[tuple[str, Sequence[str] | np.ndarray]] = []
        # Number of the file and of the row in one number, since a subject has many.
        self.places: dict[int, int] = {}

    def find(self, probes: np.ndarray, row: int) -> tuple[str, str]:
        """Return the file in which these values were seen first and their image; the row itself if they are new."""
        digest = int.from_bytes(hashlib.blake2b(probes.tobytes(), digest_size=8).digest(), "big")
        place = self.places.setdefault(digest, (len(self.files) - 1) << 32 | row)
        where, names = self.files[place >> 32]
        return where, str(names[place & 0xFFFFFFFF])


class RowWatch:
    """Checks the trials or volumes of one file, in their order; see `DamageWatch.open_rows`."""

    def __init__(
        self,
        watch: DamageWatch,
        seen: SeenRows,
        where: str,
        names: Sequence[str] | np.ndarray,
        rows: str,
        unit: str,
        compares_features: bool,
    ) -> None:
        self.watch, self.seen, self.where, self.names = watch, seen, where, names
        self.rows, self.unit, self.compares_features = rows, unit, compares_features
        self.n = 0
        self.constant: list[bool] = []
        self.held: list[np.ndarray] = []
        self.peaks: list[np.ndarray] = []
        self.spread: list[np.ndarray] = []
        self.copies: dict[int, str] = {}
        self.flat: np.ndarray | None = None
        self.low = self.high = np.empty(0)

    def add(self, block: np.ndarray, flat: np.ndarray | None = None) -> None:
        """Check further rows.

        Parameters
        ----------
        block : array of shape (n_rows, ...)
        flat : bool array of shape (n_rows, n_channels), optional
            Which channels do not change within the row.
        """
        rows = block.reshape(len(block), -1)
        probes = np.ascontiguousarray(rows[:, :: max(1, rows.shape[1] // _N_PROBES)])
        size = probes.shape[1]
        equal = (
            (probes[:, 1:] == probes[:, :-1]).mean(axis=1) if size >= _LEAST_VALUES else np.zeros(len(rows))
        )
        for number, row in enumerate(probes):
            # Exactly only where the probes say so.
            is_constant = bool(equal[number] == 1 and rows[number].min() == rows[number].max())
            self.constant.append(is_constant)
            if size >= _LEAST_COMPARED and equal[number] < 0.9:
                self._compare(self.n + number, row)
        if flat is not None:
            equal = np.maximum(equal, flat.mean(axis=1))
            self.flat = flat.sum(axis=0) + (0 if self.flat is None else self.flat)
        self.held.append(equal)
        self.peaks.append(np.abs(probes).max(axis=1))
        if self.unit in PLAUSIBLE:
            self.spread.append(probes.std(axis=1, dtype=np.float64))
        if self.compares_features:
            self._add_features(rows)
        self.n += len(rows)

    def _compare(self, number: int, probes: np.ndarray) -> None:
        where, other = self.seen.find(probes, number)
        # Few distinct values meet by chance.
        if other != str(self.names[number]) and len(np.unique(probes)) >= _LEAST_DISTINCT:
            self.copies[number] = f"of {other}" + ("" if where == self.where else f" in {where}")

    def _add_features(self, rows: np.ndarray) -> None:
        some = rows[:, :: max(1, rows.shape[1] // _N_FEATURES)]
        low, high = some.min(axis=0), some.max(axis=0)
        first = not self.low.size
        self.low, self.high = (
            (low, high) if first else (np.minimum(self.low, low), np.maximum(self.high, high))
        )

    def finish(
        self,
        name_row: Callable[[int], str],
        *,
        held: np.ndarray | None = None,
        ch_names: Sequence[str] = (),
    ) -> None:
        """Report or refuse the damage that was found.

        Parameters
        ----------
        name_row
            Function that gives the name of a row number.
        held : bool array of shape (n_rows,), optional
            Trials that overlap a stretch without signal.
        ch_names
            Channels of the `flat` of `add`.
        """
        if not self.n:
            return
        shares, peaks = np.concatenate(self.held), np.concatenate(self.peaks)
        constant = np.array(self.constant)
        # What masked voxels and unused channels have in common in all rows is usual.
        usual = float(np.quantile(shares[~constant], 0.05)) if (~constant).any() else 0.0
        gone = np.zeros(self.n, bool) if held is None else held.copy()
        gone |= ~constant & (shares > usual + _HELD_SHARE) & (shares > 2 * usual)
        positive = peaks[peaks > 0]
        typical = float(np.median(positive)) if positive.size else 0.0
        large = peaks > _LARGEST_RATIO * typical
        copied = np.zeros(self.n, bool)
        copied[list(self.copies)] = True
        kinds = {
            "have one constant value": constant,
            "do not change in many places at the same time": gone & ~constant,
            f"reach more than {_LARGEST_RATIO:g} times the usual values": large,
            "are copies of rows with another image": copied,
        }
        damaged = np.logical_or.reduce(list(kinds.values()))
        told = [
            f"{int(rows.sum())} {what} ({self._describe_rows(rows, name_row)})"
            for what, rows in kinds.items()
            if rows.any()
        ]
        if told:
            n = int(damaged.sum())
            clause = f"{n} of {self.n} {self.rows} are not recorded data: {', '.join(told)}"
            # A recording that holds its values throughout was brought to its rate without a filter: no part is missing.
            counted = int((damaged & ~gone | constant).sum()) if gone.all() else n
            refused = counted > 0 and self.watch.is_too_much(counted, self.n)
            self.watch.settle(DamageFinding(self.where, clause, n, self.n, refused))
        if self.flat is not None:
            share = self.flat / self.n
            self.watch._settle_shares(
                self.where, ch_names, {"are flat": np.where(share < 1, share, 0)}, "of the trials"
            )
        if self.unit in PLAUSIBLE:
            self._settle_amplitude(~damaged)
        if self.compares_features and self.n > 2 and not damaged.any():
            self.watch._features.setdefault(self.seen.subject, []).append((self.where, self.low < self.high))

    def _describe_rows(self, rows: np.ndarray, name_row: Callable[[int], str]) -> str:
        numbers = np.flatnonzero(rows)
        first = f"the first {name_row(int(numbers[0]))}"
        if copy := self.copies.get(int(numbers[0])):
            first += f", a copy {copy}" if not self.constant[int(numbers[0])] else ""
        return first if len(numbers) == 1 else f"{first}, the last {name_row(int(numbers[-1]))}"

    def _settle_amplitude(self, sound: np.ndarray) -> None:
        spread, unit = np.concatenate(self.spread)[sound], self.unit
        typical = float(np.median(spread)) if spread.size else 0.0
        least, most = PLAUSIBLE[unit]
        if typical and not least <= typical <= most:
            clause = (
                f"trials deviate by {typical:.3g} {unit}, which no brain does ({least:g} to {most:g} {unit} is "
                "expected): the file states another unit than it holds; numbers in that unit are wrong by a constant"
            )
            self.watch.settle(DamageFinding(self.where, clause, self.n, self.n))


def find_held_runs(samples: np.ndarray, flat: np.ndarray, least: int) -> list[tuple[int, int]]:
    """Return where most channels keep their value for `least` samples or more, as first and past-the-last sample.

    Parameters
    ----------
    samples : array of shape (n_channels, n_samples)
    flat : bool array of shape (n_channels,)
        Channels that are flat throughout; they are ignored unless all channels are flat.
    least
        Shortest run.

    Examples
    --------
    >>> signal = np.arange(60.0).reshape(2, 30); signal[:, 10:20] = 0
    >>> find_held_runs(signal, np.array([False, False]), 8)
    [(10, 20)]
    """
    n = samples.shape[1]
    if n < least:
        return []
    if flat.all():
        return [(0, n)]
    step = max(1, least // 4)
    # Pairs of neighbours a quarter of the shortest run apart: any run holds three of them in a row.
    pairs = samples[:, 1::step] == samples[:, :-1:step][:, : samples[:, 1::step].shape[1]]
    still = (pairs.mean(axis=0) - flat.mean()) > 0.5 * (1 - flat.mean())
    runs = []
    for first, last in _list_runs(still, 3):
        low, high = max(0, (first - 1) * step), min(n, last * step + step + 1)
        same = samples[:, low + 1 : high] == samples[:, low : high - 1]
        exact = (same.mean(axis=0) - flat.mean()) > 0.5 * (1 - flat.mean())
        runs += [(low + a, low + b + 1) for a, b in _list_runs(exact, least - 1)]
    return runs


def _list_runs(marks: np.ndarray, least: int) -> list[tuple[int, int]]:
    """Return first and past-the-last place of each run of at least this many marks."""
    if not marks.any():
        return []
    edges = np.flatnonzero(np.diff(np.r_[False, marks, False]))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= least]


def make_watch(config: Any, *, refuses: bool = True) -> DamageWatch:
    """Return a watch whose remedies name the settings of a data set that leave out damaged files.

    Parameters
    ----------
    config
        Settings of the data set.
    refuses
        As in `DamageWatch`.
    """
    fields = getattr(type(config), "model_fields", {})
    remedy = "fetch it again"
    if choice := next((name for name in ("runs", "sessions", "subjects") if name in fields), None):
        remedy += f", or leave it out with --set dataset.{choice}=[...]"
    if "max_dropped" in fields:
        remedy += ", or keep such trials by increasing dataset.max_dropped"
    # A box around the head is mostly air, and whoever names a mask knows what is in it.
    own = getattr(config, "mask_file", None) is not None or getattr(config, "mask", "") in (
        "brain",
        "varying",
    )
    return DamageWatch(
        remedy, float(getattr(config, "max_dropped", 0.01)), refuses, 1.0 if own else CONSTANT_REFUSED
    )


def settle_missing(config: Any, parts: Iterable[Any], watch: DamageWatch) -> None:
    """Refuse a known data set with missing sessions or runs, and report those that were left out by choice.

    Parameters
    ----------
    config
        Settings of the data set.
    parts
        Those of its source.
    watch
        Gets the findings.

    Raises
    ------
    DataError
        If something is missing that the settings do not leave out, and `watch` refuses.
    """
    for found in find_missing(config, list_recordings(parts)):
        where, what = f"subject {found.subject}", found.what
        if not found.chosen and watch.refuses:
            fields = type(config).model_fields
            choices = [
                f"--set dataset.{name}=[...]" for name in ("sessions", "runs", "skip") if name in fields
            ]
            raise DataError(
                f"{where} below {config.root}: {what}, so the data would be smaller than "
                f"{config.manifest.title}; fetch the missing files, or choose what to read with "
                f"{' or '.join(choices)}."
            )
        watch.settle(DamageFinding(where, what, found.n, found.of, not found.chosen))


def settle_blank_images(colours: Sequence[int], n: int, watch: DamageWatch) -> None:
    """Report or refuse pictures of a single colour, as in an overwritten file.

    Parameters
    ----------
    colours
        Colour of each picture with a single colour; an experiment may show plain colours, but each only once.
    n
        Number of all pictures.
    watch
        Gets the finding.
    """
    most = max((list(colours).count(colour) for colour in set(colours)), default=0)
    if most > 1:
        clause = f"{most} of {n} pictures are the same colour throughout"
        watch.settle(DamageFinding("the pictures", clause, most, n, watch.is_too_much(most, n)))
