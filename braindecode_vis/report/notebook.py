"""What a notebook shows of an object: sentences, a table and a few pictures, as one piece of HTML.

Owns the HTML alone. It is self-contained and has no script, no style sheet and no colour of its own, so that a notebook
shows it in its light or dark theme. Knows nothing of runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base.stimuli import ImageRows
from braindecode_vis.report.page_gallery import encode_thumbnail

#: Pictures that an object shows, and the width of each in pixels.
N_PICTURES, WIDTH = 4, 96


def show_sentences(sentences: Sequence[str], *, label: str = "", strong: bool = False) -> str:
    """Return one paragraph for each sentence, after a label such as ``hint``."""
    tag = "strong" if strong else "span"
    start = f"{label}: " if label else ""
    return "".join(f"<p><{tag}>{escape(start + sentence)}</{tag}></p>" for sentence in sentences)


def show_facts(facts: Mapping[str, Any]) -> str:
    """Return a table of one fact in each row."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def show_table(table: pd.DataFrame, **options: Any) -> str:
    """Return a table without its index; options are those of `pandas.DataFrame.to_html`."""
    shown: str = table.to_html(index=False, border=0, **{"float_format": "{:.3f}".format, **options})
    return shown


def take_pictures(images: ImageRows, n: int) -> list[np.ndarray | None]:
    """Return the first images, of each its first draw; they may differ in size."""
    first = [np.asarray(images[row]) for row in range(n)]
    return [image[0] if image.ndim == 4 else image for image in first]


def show_pictures(names: Sequence[str], rows: Mapping[str, Sequence[np.ndarray | None]], words: str) -> str:
    """Return a table of pictures, one column for each name and one row for each kind of picture.

    Parameters
    ----------
    names
        Of the columns.
    rows
        Kind of picture, for example ``seen``, and for each name the picture, uint8 of shape (height, width, 3); None
        where there is none. A row without any picture is left out.
    words
        The caption: which pictures these are.
    """
    head = "".join(f'<th style="text-align:center">{escape(name)}</th>' for name in names)
    body = ""
    for kind, pictures in rows.items():
        if all(picture is None for picture in pictures):
            continue
        cells = "".join(
            f'<td style="text-align:center">{_show_picture(picture, f"{kind}: {name}")}</td>'
            for name, picture in zip(names, pictures, strict=True)
        )
        body += f'<tr><th style="text-align:left">{escape(kind)}</th>{cells}</tr>'
    return f"<table><caption>{escape(words)}</caption><tr><th></th>{head}</tr>{body}</table>"


def _show_picture(picture: np.ndarray | None, alt: str) -> str:
    if picture is None:
        return ""
    source = encode_thumbnail(picture, 2 * WIDTH)  # twice, for screens of high resolution
    return f'<img src="{source}" alt="{escape(alt, quote=True)}" style="width:{WIDTH}px;max-width:none">'
