"""Captions of training images, and the caption of the one that a prediction is nearest to.

A decoder of captions that needs no language model and cannot say anything new: the control for those that can.
"""

from __future__ import annotations

import csv
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
        CSV file; an image with several captions has several rows.

    Raises
    ------
    DataError
        If the file, a column or a caption is missing.
    """
    check_file(path, what="the caption bank", hint="bring a CSV file with the columns id and caption")
    bank: dict[str, list[str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        check_columns(reader.fieldnames or [], ["id", "caption"], what=f"the caption bank {path}")
        for number, row in enumerate(reader, start=2):
            name, caption = (row["id"] or "").strip(), (row["caption"] or "").strip()
            if not name or not caption:
                raise DataError(
                    f"{path} lacks an id or a caption in line {number}; fill it in or drop the line."
                )
            bank.setdefault(name, []).append(caption)
    if not bank:
        raise DataError(f"{path} holds no caption.")
    return bank


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
