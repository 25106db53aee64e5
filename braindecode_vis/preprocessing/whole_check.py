"""Reads every trial of a data set and reports damage: the additional work of `check --full`.

Reads like preprocessing, with the same checks, and writes nothing. A damaged file does not stop the reading, so that
all damaged files are listed together. Does not depend on a file format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from braindecode_vis.base.checks import BraindecodeVisError, ConfigError
from braindecode_vis.datasets.manifests import CheckFinding
from braindecode_vis.datasets.sources.betas_source import Geometry
from braindecode_vis.preprocessing.signal_damage import DamageWatch, make_watch, settle_missing

Advance = Callable[[int], Any]


def check_trials(config: Any, *, advance: Advance | None = None) -> list[CheckFinding]:
    """Read all trials of a data set, and name each file with damage.

    Parameters
    ----------
    config
        Settings of a data set that is streamed; others are read whole by their own check.
    advance
        Called with the number of trials or volumes done since the last call.

    Returns
    -------
    list of CheckFinding
        Findings in each file, and then how much was read.
    """
    readers = {"open_epochs": _read_epochs, "open_betas": _read_betas, "open_bold": _read_bold}
    read = next((reader for name, reader in readers.items() if hasattr(config, name)), None)
    if read is None:
        return []
    watch, findings, n = make_watch(config, refuses=False), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for where, blocks in read(config, watch, Path(scratch)):
                try:
                    for size in blocks:
                        n += size
                        if advance is not None:
                            advance(size)
                except BraindecodeVisError as error:
                    findings.append(CheckFinding(where, False, str(error)))
        except ConfigError as error:  # for example a file that is opened on consent alone
            findings.append(CheckFinding("trials", True, f"not read: {error}"))
        except BraindecodeVisError as error:
            findings.append(CheckFinding("trials", False, str(error)))
    findings += [CheckFinding(found.where, not found.refused, found.what) for found in watch.findings]
    if n:
        wrong = sum(not finding.ok for finding in findings)
        said = f"{n} read, every value" + (f"; damage in {wrong} file(s)" if wrong else "")
        findings.append(CheckFinding("trials", not wrong, said))
    return findings


Blocks = Iterator[tuple[str, Iterator[int]]]


def _read_epochs(config: Any, watch: DamageWatch, scratch: Path) -> Blocks:
    from braindecode_vis.preprocessing.epochs import iterate_trials, plan_part

    source = config.open_epochs(scratch)
    settle_missing(config, source.parts, watch)

    def read(part: Any) -> Iterator[int]:
        for block in iterate_trials(plan_part(part, source.plan), source.plan, watch, unit=source.unit):
            yield len(block)

    for part in source.parts:
        yield part.where, read(part)


def _read_betas(config: Any, watch: DamageWatch, scratch: Path) -> Blocks:
    from braindecode_vis.preprocessing.betas import read_blocks

    source = config.open_betas()
    settle_missing(config, source.parts, watch)
    rest = () if source.times is None else (len(source.times),)
    for part in source.parts:
        yield part.where, (len(block) for block in read_blocks(part, rest, watch))
    for subject in source.subjects:
        watch.settle_features(subject)


def _read_bold(config: Any, watch: DamageWatch, scratch: Path) -> Blocks:
    from braindecode_vis.preprocessing.bold import find_geometry, look_at_volumes, read_series

    source = config.open_bold()
    settle_missing(config, source.runs, watch)
    found = find_geometry(source) if isinstance(source.geometry, str) else source.geometry

    def read(run: Any) -> Iterator[int]:
        geometry = found if isinstance(found, Geometry) else found[run.subject]
        assert geometry.mask is not None
        series = read_series(run, geometry.mask)
        look_at_volumes(run, series, watch)
        yield len(series)

    for run in source.runs:
        yield run.where, read(run)
