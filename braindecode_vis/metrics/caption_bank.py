"""Captions of training images, and the caption of the one that a prediction is nearest to.

A decoder of captions that needs no language model and cannot say anything new: the control for those that can.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from braindecode_vis.arrays import Embeddings
from braindecode_vis.checks import DataError, check_columns, check_file
from braindecode_vis.retrieval import compute_similarity


def read_caption_bank(path: Path) -> dict[str, list[str]]:
    """Return the captions of each image from a table with the columns ``id`` and ``caption``.

    Parameters
    ----------
    path
        CSV file in UTF-8, or in UTF-16 with its mark, as spreadsheets write them; an image with several captions has
        several rows.

    Raises
    ------
    DataError
        If the file, a column or a caption is missing, or its bytes are no such text.
    """
    check_file(path, what="the caption bank", hint="bring a CSV file with the columns id and caption")
    bank: dict[str, list[str]] = {}
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(
            f"the caption bank {path} is no CSV file after line {reader.line_num} ({error}); close its quotes and save "
            "it again."
        ) from error
    check_columns(columns, ["id", "caption"], what=f"the caption bank {path}")
    for number, row in rows:
        name, caption = (row["id"] or "").strip(), (row["caption"] or "").strip()
        if not name or not caption:
            raise DataError(f"{path} lacks an id or a caption in line {number}; fill it in or drop the line.")
        if None in row:
            raise DataError(
                f"{path} has more fields than columns in line {number}; put captions with commas into quotes."
            )
        bank.setdefault(name, []).append(caption)
    if not bank:
        raise DataError(f"{path} holds no caption.")
    return bank


def _read_text(path: Path) -> str:
    """Return the text of a file in UTF-8 or, with its mark, UTF-16; a mark at the start is no part of the text."""
    content = path.read_bytes()
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # In another encoding, a guess would put wrong letters into captions and ids.
        raise DataError(
            f"the caption bank {path} is not encoded in UTF-8 (line {content[: error.start].count(10) + 1}); save it "
            "as UTF-8, for example with iconv -f latin1 -t utf-8."
        ) from error


def retrieve_captions(
    predicted: Embeddings,
    training: Embeddings,
    bank: Mapping[str, Sequence[str]],
    *,
    device: str = "auto",
) -> list[str]:
    """Return for each prediction the first caption of the training image nearest to it by cosine.

    Parameters
    ----------
    predicted, training : Embeddings
        In one space.
    bank
        Captions by id; training images without one are left out.
    device
        Where the similarity is computed.

    Returns
    -------
    list of length n_predictions
        Among equally near images the one whose id comes first.

    Raises
    ------
    DataError
        If no training image has a caption.
    """
    known = np.array([row for row, name in enumerate(training.ids) if str(name) in bank], dtype=np.int64)
    if not known.size:
        raise DataError(
            "the caption bank names none of the training images; its ids belong to another data set."
        )
    known = known[np.argsort(training.ids[known].astype(str), kind="stable")]
    candidates = Embeddings(training.vectors[known], training.ids[known], training.space)
    nearest = np.argmax(compute_similarity(predicted, candidates, device=device), axis=1)
    return [bank[str(candidates.ids[row])][0] for row in nearest]
