"""Names of ImageNet images behind the numbers that Kamitani Lab gives them.

Owns the code ``1518878.005958`` for ``n01518878_5958`` and the published stimulus lists. A number that went through
text or a spreadsheet has lost the zeros at its end (``1621127.01902`` is image 19020, not 1902): it is padded to six
digits before it is taken apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.manifests import Finding

_CODE = re.compile(r"(\d{1,8})(?:\.(\d{0,6}))?")
_LISTS = {"train": "stimulus_ImageNetTraining.tsv", "test": "stimulus_ImageNetTest.tsv"}


def decode_stimulus_id(code: float | str) -> str:
    """Return the name of an image, or of a category where the number names no image.

    Raises
    ------
    DataError
        If it is no such number.

    Examples
    --------
    >>> decode_stimulus_id(1518878.005958)
    'n01518878_5958'
    >>> decode_stimulus_id("1621127.01902")  # the last zero is gone
    'n01621127_19020'
    >>> decode_stimulus_id(1443537.0)
    'n01443537'
    """
    finite = isinstance(code, str) or math.isfinite(code)
    text = code.strip() if isinstance(code, str) else f"{code:.6f}"
    match = _CODE.fullmatch(text) if finite else None
    if match is None:
        raise DataError(
            f"the stimulus number {code!r} is not of the form 1518878.005958 (synset before the point, image after it)."
        )
    synset, image = f"n{int(match[1]):08d}", int((match[2] or "").ljust(6, "0"))
    return f"{synset}_{image}" if image else synset


def find_synset(name: str) -> str:
    """Return the synset of an image name.

    Examples
    --------
    >>> find_synset("n01518878_5958")
    'n01518878'
    """
    return name.split("_", 1)[0]


def find_list(root: Path, split: str) -> Path | None:
    """Return the stimulus list of ``train`` or ``test`` below `root` or beside the files, or None."""
    places = [root, root / "data", root / "stimuli", root.parent]
    return next((p / _LISTS[split] for p in places if (p / _LISTS[split]).is_file()), None)


def read_list(path: Path) -> pd.DataFrame:
    """Read a stimulus list: `stimulus_id` (name), `concept` (synset), `code` (text), `category`, `image`.

    Raises
    ------
    DataError
        If a row's number does not decode to its name.
    """
    table = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False)
    if table.shape[1] != 4:
        raise DataError(
            f"{path} has {table.shape[1]} columns, but a stimulus list has four: name, number, category, image."
        )
    table.columns = pd.Index(["stimulus_id", "code", "category", "image"])
    for row, (name, code) in enumerate(zip(table["stimulus_id"], table["code"], strict=True)):
        if decode_stimulus_id(code) != name:
            raise DataError(
                f"row {row + 1} of {path} calls {name} the number {code}, which stands for "
                f"{decode_stimulus_id(code)}; the list is damaged."
            )
    return table.assign(
        category=table["category"].astype(int),
        image=table["image"].astype(int),
        concept=[find_synset(name) for name in table["stimulus_id"]],
    )


def check_names(found: Sequence[str], listed: Sequence[str], *, what: str) -> Finding:
    """Compare the images that a recording names with the published list."""
    unknown = sorted(set(found) - set(listed))
    unseen = sorted(set(listed) - set(found))
    if unknown or unseen:
        text = f"{len(unknown)} image(s) outside the list, {len(unseen)} listed but never shown"
        return Finding(what, False, f"{text}, first {(unknown or unseen)[0]}: it is another release")
    return Finding(what, True, f"{len(set(found))} images, as listed")
