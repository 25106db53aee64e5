"""Tables that say what the numbers in a label image mean.

Owns the plain text form that FreeSurfer's colour tables (``.ctab``), Schaefer's ``_order.txt`` and nilearn's ``.tsv``
share: a number and a name at the start of each line.
"""

from __future__ import annotations

import re
from pathlib import Path

from braindecode_vis.checks import DataError


def read_label_table(path: Path) -> dict[int, str]:
    """Read a table with a number and a name at the start of each line.

    ``#`` starts a comment; the first line may be a header.

    Raises
    ------
    DataError
        If a line is neither.
    """
    if not path.is_file():
        raise DataError(f"the label table {path} does not exist; correct its path.")
    names: dict[int, str] = {}
    for number, line in enumerate(path.read_text().splitlines()):
        words = re.split(r"[\t, ]+", line.strip())
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if len(words) < 2 or not words[0].lstrip("-").isdigit():
            if number == 0:
                continue
            raise DataError(f"line {number + 1} of {path} is not a number and a name: {line.strip()!r}.")
        names[int(words[0])] = words[1]
    return names
