"""The results of an audit: findings, and how each part of a run was verified.

A check adds to both. It returns findings (`AuditFinding`), and reports to `AuditedRun.state` how it verified the part
of the run that it looks at, whatever it found there::

    run.state("prediction", "recomputed", "predictions")
    run.state("score", "by record", "two_way_clip", "its network takes minutes; add --refit")

A part is as well verified as the worst of what was said of it (`Audit.list_status`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Level = Literal["ok", "transductive", "warning", "leak"]
LEVELS: tuple[Level, ...] = get_args(Level)

Part = Literal["chain", "data", "fit", "choice", "prediction", "material", "score"]
#: Names and files of artifacts; trials, responses and stimuli; statistics, features and weights; penalties, epochs and
#: numbers of features; predicted embeddings; what priors and generators were made of, and the images they gave; ranks,
#: scores and the report.
PARTS: tuple[Part, ...] = get_args(Part)

How = Literal["recomputed", "by record", "not verified"]
#: From best to worst.
HOW: tuple[How, ...] = get_args(How)


@dataclass(frozen=True)
class AuditFinding:
    """What one check found.

    Parameters
    ----------
    check
        Name of the check.
    level
        ``ok``; ``transductive`` (unlabelled test trials, or trials of the test subject, were used); ``warning`` (a
        score may mean less than it seems to); ``leak`` (the test reached what was fitted or chosen, or the files are
        not those that the run wrote).
    message
        One sentence, with the first offending ids.
    where
        Fold or file.
    """

    check: str
    level: Level
    message: str
    where: str = ""


@dataclass(frozen=True)
class Verified:
    """How something in a run was verified.

    Parameters
    ----------
    part
        Part of the run that it belongs to.
    how
        ``recomputed`` from what it was made of; ``by record``: only what the run wrote about it was read; or ``not
        verified``.
    what
        What was looked at, in a few words, for example ``predictions``.
    reason
        Why it was not recomputed, and what to do about it.
    """

    part: Part
    how: How
    what: str
    reason: str = ""


@dataclass(frozen=True)
class PartStatus:
    """How one part of a run was verified.

    Parameters
    ----------
    part
        One of `PARTS`.
    how
        The worst of what was said of it; ``not verified`` where nothing was said.
    recomputed
        What was computed again.
    others
        What was not, and why.
    """

    part: Part
    how: How
    recomputed: tuple[str, ...]
    others: tuple[Verified, ...]

    def describe(self) -> str:
        """Return what was recomputed and what was not, with the reasons, in one sentence or two."""
        words = [", ".join(self.recomputed)] if self.recomputed else []
        if self.how != "recomputed" and self.recomputed:
            words = [f"recomputed: {words[0]}"]
        for how in HOW[1:]:
            told = [
                f"{item.what} ({item.reason})" if item.reason else item.what
                for item in self.others
                if item.how == how
            ]
            words += [f"{how}: {', '.join(told)}"] if told else []
        return "; ".join(words) or "not checked"


@dataclass(frozen=True)
class Audit:
    """All findings about one run.

    Parameters
    ----------
    folder
        The run folder.
    findings
        In the order of the checks.
    verified
        How what was looked at was verified.
    """

    folder: Path
    findings: tuple[AuditFinding, ...]
    verified: tuple[Verified, ...] = ()

    @property
    def leaks(self) -> tuple[AuditFinding, ...]:
        """Findings that no score of the run survives."""
        return self.list_level("leak")

    def summarise_leaks(self) -> str:
        """Return one sentence on the leaks, with the first of them; empty without any."""
        if not self.leaks:
            return ""
        first, n = self.leaks[0], len(self.leaks)
        where = f" ({first.where})" if first.where else ""
        count = "1 leak" if n == 1 else f"{n} leaks"
        return f"{count} in {self.folder}, first in {first.check}{where}: {first.message.rstrip('.')}."

    def list_level(self, level: str) -> tuple[AuditFinding, ...]:
        """Return the findings of one of `LEVELS`."""
        return tuple(finding for finding in self.findings if finding.level == level)

    def list_status(self) -> list[PartStatus]:
        """Return how each of `PARTS` was verified."""
        found = []
        for part in PARTS:
            said = [item for item in self.verified if item.part == part]
            worst = max((HOW.index(item.how) for item in said), default=len(HOW) - 1)
            made = dict.fromkeys(item.what for item in said if item.how == HOW[0])
            others = tuple(item for item in said if item.how != HOW[0])
            found.append(PartStatus(part, HOW[worst], tuple(made), others))
        return found

    def summarise(self) -> str:
        """Return how many findings there are of each level, in words."""
        counts = Counter(finding.level for finding in self.findings)
        return ", ".join(f"{counts[level]} {level}" for level in LEVELS)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "run_folder": str(self.folder),
            "scores": [],
            "n_leaks": len(self.leaks),
            "verified": {
                item.part: {
                    "how": item.how,
                    "recomputed": list(item.recomputed),
                    "others": [
                        {"what": other.what, "how": other.how, "reason": other.reason}
                        for other in item.others
                    ],
                }
                for item in self.list_status()
            },
            "findings": [asdict(finding) for finding in self.findings],
        }
