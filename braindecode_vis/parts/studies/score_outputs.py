"""`score`: the full table of scores for outputs of any system, from files or arrays.

Owns what predictions and targets are together: embeddings, a matrix of similarities, classes, or images. Values,
intervals, chance and nulls are those of `braindecode_vis.scoring`, the same as of a run of our own; files are read by
`output_files`, rows matched by `output_rows`, signs of decisions taken together found by `output_signs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.base.checks import ConfigError, DataError, check_finite, check_option, for_python
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.parts.studies import output_signs as signs
from braindecode_vis.parts.studies.output_files import Given, read_given
from braindecode_vis.parts.studies.output_rows import (
    OutputRows,
    check_transposed,
    expand_repetitions,
    find_classes,
    find_images,
    is_one_hot,
    match_rows,
    merge_equal_targets,
    name_rows,
)
from braindecode_vis.parts.studies.scored_outputs import (
    ScoredOutputs,
    Selection,
    check_folder,
    describe_inputs,
    list_warnings,
    tabulate_scores,
)
from braindecode_vis.scoring.description_scores import DescriptionTask, score_descriptions
from braindecode_vis.scoring.metrics.image import split_rounds
from braindecode_vis.scoring.metrics.protocols import ProtocolName
from braindecode_vis.scoring.protocol_scores import ProtocolTask, score_protocols
from braindecode_vis.scoring.retrieval import Retrieval, compute_ranks, rank_similarities
from braindecode_vis.scoring.score_table import compute_scores
from braindecode_vis.scoring.scoring_task import ScoringTask, list_subjects
from braindecode_vis.scoring.units import Units, find_units

Kind = Literal["auto", "embeddings", "similarity", "classes", "images"]
FEATURES = "efficientnet-lite0"
#: Those that need nothing beside predictions and targets.
PROTOCOLS = tuple(
    n for n in get_args(ProtocolName) if n not in ("zero_shot_text", "concept_templates", "composition")
)
#: Top-5 of fewer classes is nearly all of them.
MANY_CLASSES = 10
FEWEST_PER_CLASS = 10
#: Permuted or resampled labels that are held at once (160 MB of whole numbers).
_MOST_DRAWN = 20_000_000


@dataclass(frozen=True)
class Asked:
    """How outputs are scored; see `score`."""

    protocols: tuple[ProtocolName, ...] = ()
    selection: Selection = "not stated"
    distances: bool = False
    size: int | None = None
    features: str | None = FEATURES
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    seed: int = 0
    device: str = "auto"


@for_python
def score(
    predictions: Any,
    targets: Any = None,
    *,
    kind: Kind = "auto",
    ids: Any = None,
    target_ids: Any = None,
    text: Any = None,
    descriptions: Any = None,
    protocols: Sequence[ProtocolName] = (),
    selection: Selection = "not stated",
    distances: bool = False,
    size: int | None = None,
    features: str | None = FEATURES,
    n_bootstrap: int = 10_000,
    n_permutations: int = 10_000,
    seed: int = 0,
    device: str = "auto",
    out: str | Path | None = None,
) -> ScoredOutputs:
    """Score outputs of any system: embeddings, similarities, classes or images.

    Parameters
    ----------
    predictions
        One row per prediction, as an array, a table or a path: embeddings of shape (n_rows, n_features), tokens of
        shape (n_rows, n_tokens, n_features) or repetitions of shape (n_images, n_repetitions, n_features); similarities
        or logits of shape (n_rows, n_gallery); labels of shape (n_rows,) or probabilities of shape (n_rows, n_classes);
        a folder of reconstructions. Files: ``.npy .npz .pt .safetensors .h5 .parquet .csv .txt .json``, with ``::NAME``
        behind the path for one array of several.
    targets
        The truth in the same form: embeddings of the gallery, names of the columns of a matrix (none needed if row k
        belongs to column k), true labels (or one-hot rows), a folder of stimuli.
    kind
        ``embeddings``, ``similarity``, ``classes`` or ``images``; by default guessed from the shapes.
    ids
        Id of the true item of each row of the predictions, or a table with the column ``stimulus_id`` and perhaps
        ``subject``, ``session``, ``run``, ``group`` and ``concept``. Ids may repeat (repetitions). Without ids, row k
        belongs to row k of the targets.
    target_ids
        Id of each row of the targets, column of a matrix, or class.
    text
        Embeddings of the concept names in the space of the predictions, one per row of the targets: adds the table of
        a gallery of names (``@text``).
    descriptions
        Description of each item of the gallery: embeddings in the space of the predictions, one per row of the
        targets, or a CSV file of captions (columns ``id`` and ``caption``) where predictions are sentence vectors of
        all-MiniLM-L6-v2. Adds retrieval by description and by both (``@images``, ``@descriptions``,
        ``@fused-ranks``); without targets, they are the gallery, which then needs no image.
    protocols
        Further ones, see `braindecode_vis.scoring.protocol_scores.score_protocols`: ``relative_median_rank``,
        ``mean_average_precision``, ``within_concept``, ``nsd_300``, ``transductive``, and ``instances``, which is added
        where embeddings have several rows per item.
    selection
        How the model was chosen, if known: ``fixed``, ``validation`` or ``test``.
    distances
        Whether a matrix holds distances, so that small values are near.
    size
        Size in pixels to which images are resized; by default the size of the reconstructions, and 256 if they differ
        or are larger.
    features
        Image encoder for two-way identification of images in its features; None leaves it out.
    n_bootstrap, n_permutations, seed
        Number of resamples for intervals, of permutations for p-values, and their seed.
    device
        Device that computes the ranks.
    out
        Folder to write scores, items and page into; it must be new, or hold the same scores.

    Returns
    -------
    ScoredOutputs
        With `scores`, `items`, `warnings`, `hubs`, `report()` and `save()`.

    Raises
    ------
    ConfigError, DataError
        If rows do not belong together, with what to do.

    Examples
    --------
    >>> import numpy as np
    >>> similarity = np.random.default_rng(0).normal(size=(20, 20)) + 2 * np.eye(20)
    >>> found = score(similarity, n_bootstrap=100, n_permutations=100)
    >>> found.kind, float(found.get("top1")["chance"])
    ('similarity', 0.05)
    """
    check_option("selection", selection, get_args(Selection))
    for name in protocols:
        check_option("protocol", name, PROTOCOLS)
    for count in (n_bootstrap, n_permutations):
        if not isinstance(count, int | np.integer) or count < 1:
            raise ConfigError(
                f"the numbers of resamples and of permutations must be whole numbers from 1, not {count!r}."
            )
    if out is not None:
        check_folder(Path(out))
    given = read_given(predictions, "the predictions")
    said = None if descriptions is None else _read_descriptions(descriptions)
    true = None if targets is None else read_given(targets, "the targets")
    if said is not None and true is None:  # a gallery without images
        true, said = said, None
    chosen = find_kind(given, true, kind, has_ids=ids is not None)
    if chosen != "similarity" and distances:
        raise ConfigError(f"distances applies to a matrix of similarities, but these are {chosen}.")
    if chosen != "embeddings" and text is not None:
        raise ConfigError(f"text applies to embeddings, but these are {chosen}.")
    if chosen != "embeddings" and descriptions is not None:
        raise ConfigError(f"descriptions apply to embeddings, but these are {chosen}.")
    if chosen != "images" and (size is not None or features != FEATURES):
        raise ConfigError(f"size and features apply to folders of images, but these are {chosen}.")
    asked = Asked(
        tuple(protocols), selection, distances, size, features, n_bootstrap, n_permutations, seed, device
    )
    if chosen == "embeddings":
        found = _score_embeddings(given, true, ids, target_ids, text, said, asked)
    elif chosen == "similarity":
        found = _score_similarity(given, true, ids, target_ids, asked)
    else:
        if protocols:
            raise ConfigError(f"the protocol {protocols[0]!r} ranks a gallery, but these are {chosen}.")
        compute = _score_classes if chosen == "classes" else _score_images
        found = compute(given, true, ids, target_ids, asked)
    if out is not None:
        found.save(out)
    return found


def find_kind(given: Given, true: Given | None, kind: str, *, has_ids: bool) -> str:
    """Return what predictions and targets are together, asked for or by their shapes.

    Parameters
    ----------
    given, true
        Predictions and targets.
    kind
        As in `score`.
    has_ids
        Whether the rows of the predictions have ids.

    Raises
    ------
    ConfigError, DataError
        If they are nothing together, or two things.
    """
    check_option("kind", kind, get_args(Kind))
    pictures = [side.pictures is not None for side in (given, true) if side is not None]
    if any(pictures) or kind == "images":
        if len(pictures) < 2 or not all(pictures) or kind not in ("auto", "images"):
            raise DataError(
                "a folder of reconstructions needs a folder of stimuli; give both as folders of images."
            )
        return "images"
    if given.values is None or (true is not None and true.values is None):
        bare = given if given.values is None else true
        raise DataError(
            f"{bare.name if bare else ''} has ids but no values; give values, and the ids as ids."
        )
    if given.is_labels:
        if kind in ("auto", "classes"):
            return "classes"
        raise DataError(f"one value per row in {given.name}: these are classes, not {kind}.")
    if given.values.dtype.kind not in "biuf":
        raise DataError(f"text in {given.values.ndim} dimensions in {given.name}; numbers are expected.")
    if kind != "auto":
        return kind
    if true is None:
        return "similarity"
    assert true.values is not None
    shape, theirs = given.values.shape, true.values.shape
    if true.is_labels:
        return _tell_labels(given, true, has_ids)
    if is_one_hot(true.values) and (shape == theirs or shape == theirs[::-1]):
        return "classes"
    # Repetitions of predictions, or a lone token of targets, have an axis of their own.
    if theirs[1:] in (shape[1:], shape[2:]) or (theirs[1:2] == (1,) and theirs[2:] == shape[1:]):
        return "embeddings"
    check_transposed(given, true)
    if len(shape) == 2 and shape[1] == len(true.values):
        raise ConfigError(
            f"the predictions have {shape[1]} columns, as many as the targets have rows; if they are "
            "similarities to the targets, pass kind similarity."
        )
    raise DataError(
        f"predictions of shape {shape} and targets of shape {theirs} do not match: embeddings need rows "
        "of the same shape."
    )


def _tell_labels(given: Given, true: Given, has_ids: bool) -> str:
    """Return whether names beside a matrix are the classes of its rows or the ids of its columns."""
    assert given.values is not None
    assert true.values is not None
    if given.values.ndim != 2:
        raise DataError(
            f"predictions of shape {given.values.shape} have one label each; classes need a score for each class, "
            "embeddings need embeddings as targets."
        )
    n_rows, n_columns = given.values.shape
    n = len(true.values)
    unique = len(pd.unique(true.values)) == n
    if n == n_rows == n_columns and unique and not has_ids:
        raise ConfigError(
            f"{n} names beside a square matrix may be the classes of its rows or the ids of its columns; "
            "choose with kind classes or similarity."
        )
    if n == n_columns and unique and (has_ids or n != n_rows):
        return "similarity"
    if n == n_rows:
        return "classes"
    if n == n_columns:
        raise DataError(
            f"the predictions have {n_rows} rows and {n_columns} columns for {n} labels: they look transposed; rows "
            "are trials, columns classes."
        )
    raise DataError(
        f"{n} labels belong neither to {n_rows} rows nor to {n_columns} columns of the predictions."
    )


# --- retrieval ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranking:
    """What was ranked, and what is to be said of it."""

    kind: str
    queries: Embeddings
    candidates: Embeddings
    ranked: Retrieval
    rows: OutputRows
    gallery: OutputRows
    words: str
    notes: list[str]
    signs: list[str]
    warnings: list[str]
    matrix: np.ndarray | None = None
    texts: Embeddings | None = None
    described: Embeddings | None = None


def _read_descriptions(descriptions: Any) -> Given:
    """Return embeddings of descriptions; captions of a file are read by all-MiniLM-L6-v2."""
    path = Path(descriptions) if isinstance(descriptions, str | Path) else None
    if path is None or path.suffix.lower() != ".csv" or not path.is_file():
        return read_given(descriptions, "the descriptions")
    from braindecode_vis.embeddings.caption_bank import read_caption_bank
    from braindecode_vis.embeddings.sentence_encoder import MINILM, SentenceEncoder, find_sentence_folder

    bank = read_caption_bank(path)
    sentences = SentenceEncoder(find_sentence_folder(MINILM, "descriptions"))
    return Given(
        str(path), sentences.embed_texts(list(bank.values())), pd.DataFrame({"stimulus_id": list(bank)})
    )


def _place_descriptions(said: Given, gallery: OutputRows, shape: tuple[int, ...]) -> Embeddings:
    """Return descriptions in the order of the gallery."""
    if said.values is None or said.values.shape[1:] != shape:
        held = "no values" if said.values is None else f"rows of shape {said.values.shape[1:]}"
        raise DataError(
            f"{said.name} holds {held}, but predictions have rows of shape {shape}; descriptions are compared in the "
            "space of the predictions."
        )
    if said.ids is not None:
        known = set(said.ids.astype(str).tolist())
        missing = [name for name in gallery.ids.tolist() if str(name) not in known]
        if missing:
            raise DataError(
                f"{said.name} describes {len(gallery.ids) - len(missing)} of {len(gallery.ids)} items of the gallery, "
                f"and not {missing[0]!r}; describe all of them."
            )
        return Embeddings(said.values, said.ids.astype(str), "given").select(list(gallery.ids.astype(str)))
    if len(said.values) != len(gallery.ids):
        raise DataError(
            f"{len(said.values)} descriptions for {len(gallery.ids)} items of the gallery; give one for each target, "
            "in their order, or a table with the column id."
        )
    return Embeddings(said.values, gallery.ids, "given")


def _score_embeddings(
    given: Given,
    true: Given | None,
    ids: Any,
    target_ids: Any,
    text: Any,
    said: Given | None,
    asked: Asked,
) -> ScoredOutputs:
    if true is None:
        raise DataError(
            "predicted embeddings are compared with the embeddings of the images; give these as targets."
        )
    vectors, values, rows, notes = expand_repetitions(given, true, ids)
    for what, array in (("predictions", vectors), ("targets", values)):
        if array.dtype.kind not in "biuf":
            raise DataError(f"the {what} hold {array.dtype}, but embeddings are numbers; look at that array.")
        check_finite(array, what=f"the array of {what}", row_names=range(len(array)), hint="")
    if vectors.shape[1:] != values.shape[1:]:
        check_transposed(given, true)
        raise DataError(
            f"predictions of shape {vectors.shape} and targets of shape {values.shape} have different "
            "numbers of features."
        )
    gallery = name_rows(replace(true, values=values), target_ids, "the targets")
    values, gallery, rows, merged = merge_equal_targets(values, gallery, rows)
    rows, gallery, matched = match_rows(rows, gallery)
    queries = Embeddings(vectors, rows.ids, "given")
    candidates = Embeddings(values, gallery.ids, "given")
    ranked = compute_ranks(queries, candidates, device=asked.device)
    warnings = []
    if (np.abs(ranked.true_similarities - 1) < 1e-6).all():
        warnings.append(
            "Every prediction is its own target (cosine 1): these are targets, or copies of them."
        )
    # A prediction without direction is as similar to everything as to its own image: 0.
    if n_zero := int((ranked.top_similarities[:, 0] == 0).sum()):
        notes.append(f"{n_zero} predictions are zero: they tie with the whole gallery.")
    ranking = _Ranking(
        "embeddings", queries, candidates, ranked, rows, gallery, f"embeddings of shape {vectors.shape[1:]}, cosine",
        [*notes, *merged, *matched], signs.find_vector_signs(vectors), warnings,
        texts=None if text is None else _read_texts(text, gallery, vectors.shape[1:]),
        described=None if said is None else _place_descriptions(said, gallery, vectors.shape[1:]),
    )  # fmt: skip
    return _score_ranking(ranking, asked, given, true)


def _read_texts(text: Any, gallery: OutputRows, shape: tuple[int, ...]) -> Embeddings:
    """Return one text embedding per concept of the gallery."""
    given = read_given(text, "the text embeddings")
    if given.values is None or given.values.shape[1:] != shape:
        raise DataError(f"text embeddings need rows of shape {shape}, as the predictions have.")
    concepts = gallery.concepts
    if given.ids is not None:
        return Embeddings(given.values, given.ids, "given").select(sorted(set(concepts.tolist())))
    if len(given.values) != len(concepts) or len(set(concepts.tolist())) < len(concepts):
        raise DataError(
            f"{len(given.values)} text embeddings for {len(concepts)} images of {len(set(concepts.tolist()))} "
            "concepts: without ids, each image needs its own concept and text; give a table with stimulus_id."
        )
    return Embeddings(given.values, concepts, "given")


def _score_similarity(
    given: Given, true: Given | None, ids: Any, target_ids: Any, asked: Asked
) -> ScoredOutputs:
    matrix = given.values
    assert matrix is not None
    if matrix.ndim != 2:
        raise DataError(
            f"a matrix of similarities has two dimensions, but these have the shape {matrix.shape}."
        )
    for name in asked.protocols:
        if name != "relative_median_rank":
            raise ConfigError(f"the protocol {name!r} compares embeddings, but these are similarities.")
    n_rows, n_columns = matrix.shape
    rows = name_rows(given, ids, "the predictions", other=n_columns)
    source = target_ids
    if source is None and true is not None:
        assert true.values is not None
        if len(true.values) != n_columns:
            raise DataError(f"the matrix has {n_columns} columns, but there are {len(true.values)} targets.")
        # Embeddings of the gallery name nothing, unless their file brings ids.
        source = true.ids if true.ids is not None else true.values if true.is_labels else None
    elif source is None and not rows.has_ids and n_rows != n_columns:
        raise DataError(
            f"without targets, {n_rows} rows and {n_columns} columns are read as similarities, row k to column k; give "
            "targets, or the ids of rows and columns."
        )
    gallery = name_rows(Given(given.name, np.empty(n_columns)), source, "the columns of the matrix")
    rows, gallery, notes = match_rows(rows, gallery)
    check_finite(matrix, what="the matrix of similarities", row_names=rows.ids, hint="")
    if asked.distances:
        matrix = -(matrix if matrix.dtype.kind == "f" else matrix.astype(np.float64))
    ranked = rank_similarities(matrix, rows.ids, gallery.ids, space="given")
    if constant := int((ranked.top_similarities[:, 0] == _find_lowest(matrix)).sum()):
        notes.append(f"{constant} of {n_rows} rows are constant: all their candidates tie.")
    if rows.are_repeated:
        notes.append(
            "Several rows per item are scored separately; to score averaged predictions, average the embeddings and "
            "give their similarities."
        )
    warnings = []
    if not asked.distances and n_columns > 4 and ranked.ranks.mean() > 0.75 * (n_columns + 1):
        warnings.append(
            "The true item is among the least similar ones far more often than by chance: if the matrix "
            "holds distances, pass distances."
        )
    # The values are the matrix; no vectors are behind them here.
    queries, candidates = (
        Embeddings(np.empty((len(part.ids), 0), np.float32), part.ids, "given") for part in (rows, gallery)
    )
    ranking = _Ranking(
        "similarity", queries, candidates, ranked, rows, gallery,
        f"{'distances' if asked.distances else 'similarities'} as given", notes, signs.find_matrix_signs(matrix),
        warnings, matrix,
    )  # fmt: skip
    return _score_ranking(ranking, asked, given, true)


def _find_lowest(matrix: np.ndarray) -> np.ndarray:
    """Return the smallest value of each row, block by block."""
    step = max(1, (1 << 24) // matrix.shape[1])
    return np.concatenate([np.asarray(matrix[s : s + step]).min(axis=1) for s in range(0, len(matrix), step)])


def _score_ranking(ranking: _Ranking, asked: Asked, given: Given, true: Given | None) -> ScoredOutputs:
    """Score ranks, the gallery of texts and further protocols, and put together what is reported of them."""
    ranked, rows, gallery = ranking.ranked, ranking.rows, ranking.gallery
    if ranked.gallery_size < 2:
        raise DataError("a single candidate is always found; give a gallery of at least two.")
    chosen = ranked.gallery_ids[ranked.top_indices[:, 0]]
    subjects = rows.table["subject"].to_numpy(dtype=object)
    # One sign is enough, and the one that tells how the matrix was made says most.
    found = ranking.signs or _find_assignments(chosen, ranked, subjects)
    units, concepts = _find_row_units(rows), gallery.look_up_concepts(rows.ids)
    protocol = "; ".join(
        [
            f"outputs of others: {ranking.words}",
            f"{len(rows.ids)} predictions of {len(set(rows.ids.tolist()))} images",
            f"gallery of {ranked.gallery_size}", _describe_selection(asked), *_mark(found),
        ]
    )  # fmt: skip
    part = (ranking.queries, ranking.candidates, ranked)
    task = ScoringTask(
        retrievals=[part], seen=np.zeros((len(rows.ids), 1, 1, 3), np.uint8), images={}, ids=rows.ids,
        concepts=concepts, subjects=subjects, decoded_concepts=None, feature_encoder=None, feature_name="",
        protocol=protocol, split="test", seed=asked.seed, n_bootstrap=asked.n_bootstrap,
        n_permutations=asked.n_permutations, units=units,
        similarities=None if ranking.matrix is None else [ranking.matrix],
    )  # fmt: skip
    scores, items = compute_scores(task)
    if ranking.texts is not None:
        scores += _score_texts(task, ranking.texts, asked)
    if ranking.described is not None:
        scores += score_descriptions(
            [DescriptionTask(ranking.queries, ranking.described, ranking.candidates, ranking.candidates)], subjects,
            protocol=f"{protocol}; descriptions as candidates too", split="test", seed=asked.seed,
            n_bootstrap=asked.n_bootstrap, units=units,
        )[0]  # fmt: skip
    protocols = list(asked.protocols)
    if ranking.matrix is None and rows.are_repeated and "instances" not in protocols:
        protocols.append("instances")
    if protocols:
        scores += score_protocols(
            ProtocolTask(
                retrievals=[part], concepts=concepts, subjects=subjects,
                concept_of=dict(zip(gallery.ids.tolist(), gallery.concepts.tolist(), strict=True)), protocol=protocol,
                split="test", seed=asked.seed, n_bootstrap=asked.n_bootstrap, device=asked.device, units=units,
            ),
            protocols,
        )  # fmt: skip
    items = items.assign(
        first=chosen,
        similarity_of_first=ranked.top_similarities[:, 0],
        similarity_of_true=ranked.true_similarities,
    )
    return ScoredOutputs(
        ranking.kind, tabulate_scores(scores), items, protocol,
        list_warnings(found, asked.selection, [*ranking.warnings, *task.not_computed]), tuple(ranking.notes),
        transductive=bool(found), hubs=signs.describe_hubs(ranked), ranked=ranked,
        about=describe_inputs(ranking.kind, given, true, asked.selection, asked.seed),
    )  # fmt: skip


def _find_assignments(chosen: np.ndarray, ranked: Retrieval, subjects: np.ndarray) -> list[str]:
    """Return a sentence if the first choices of some subject can only have been made together."""
    hits = ranked.worst_ranks == 1
    for _, own in list_subjects(subjects):
        if sign := signs.find_bijection(chosen[own], hits[own], ranked.gallery_size):
            return [sign]
    return []


def _score_texts(task: ScoringTask, texts: Embeddings, asked: Asked) -> list[Score]:
    """Return the whole table for the gallery of concept names, its metrics marked ``@text``."""
    predicted, _, ranked = task.retrievals[0]
    queries = Embeddings(predicted.vectors, task.concepts, predicted.space)
    by_text = compute_ranks(queries, texts, device=asked.device)
    # Images stay what is resampled, although it is names that are found.
    units = Units("image", ranked.query_ids) if task.units is None else task.units
    scores, _ = compute_scores(
        replace(task, retrievals=[(queries, texts, by_text)], ids=task.concepts, units=units)
    )
    return [replace(one, metric=f"{one.metric}@text") for one in scores]


# --- classes and images -------------------------------------------------------------------------------------------


def _score_classes(
    given: Given, true: Given | None, ids: Any, target_ids: Any, asked: Asked
) -> ScoredOutputs:
    from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
    from braindecode_vis.scoring.label_exchange import exchange_subjects

    if true is None:
        raise DataError("decoded classes are compared with the true classes; give these as targets.")
    decisions, classes, labels, rows, notes = find_classes(given, true, ids, target_ids)
    if len(classes) < 2:
        raise DataError(f"every true and decided label is {classes[0]!r}; classes cannot be distinguished.")
    if decisions.dtype == bool:  # one true column a trial, whose differences are counted
        decisions = decisions.astype(np.float32)
    decided = np.array(classes, dtype=object)[decisions.argmax(axis=1)]
    tied = int(((decisions == decisions.max(axis=1, keepdims=True)).sum(axis=1) > 1).sum())
    if tied:
        notes.append(
            f"{tied} of {len(labels)} trials have several highest scores: the first of these classes is used."
        )
    found = signs.find_balance(decided, labels)
    protocol = "; ".join(
        [
            f"outputs of others: classes of {len(labels)} trials", f"{len(classes)} classes",
            "true labels permuted within each run, decisions kept", _describe_selection(asked), *_mark(found),
        ]
    )  # fmt: skip
    is_graded, n_classes = not given.is_labels and not is_one_hot(decisions), len(classes)
    n_drawn = max(100, _MOST_DRAWN // len(labels))
    if n_drawn < max(asked.n_bootstrap, asked.n_permutations):
        notes.append(
            f"{n_drawn} resamples and permutations in place of more, which would not fit into memory."
        )
    units = _find_row_units(rows)
    repeated = len(set(rows.ids.tolist())) < len(rows.ids)
    if units is None and repeated:
        units = Units("image", rows.ids)
    elif units is None and pd.Series(labels).value_counts().min() < FEWEST_PER_CLASS:
        # Resamples within a class of few trials, as of one, have no spread.
        units = Units("item", rows.ids)
    table = rows.table
    exchanged = exchange_subjects(
        table["subject"].to_numpy(dtype=object), labels, classes, decisions, most=min(n_drawn, asked.n_permutations),
        generator=make_generator(asked.seed, "exchanged labels"),
    )  # fmt: skip
    if exchanged is not None:  # their own words follow, row by row
        protocol = protocol.replace("; true labels permuted within each run, decisions kept", "")
    task = CategoryTask(
        decisions=decisions, classes=tuple(classes), labels=labels,
        runs=table[["session", "run"]].agg("/".join, axis=1).to_numpy(dtype=object),
        subjects=table["subject"].to_numpy(dtype=object), protocol=protocol, split="test", seed=asked.seed,
        n_bootstrap=min(n_drawn, asked.n_bootstrap), n_permutations=min(n_drawn, asked.n_permutations), units=units,
        top=(5,) if is_graded and n_classes >= MANY_CLASSES and exchanged is None else (), exchanged=exchanged,
    )  # fmt: skip
    scores, items = compute_category_scores(task)
    items = items.assign(stimulus_id=rows.ids)
    if n_classes > 50:  # a column for each class would be the matrix again
        items = items[[c for c in items if not str(c).startswith("decision_")]]
    return ScoredOutputs(
        "classes", tabulate_scores(scores), items, protocol, list_warnings(found, asked.selection), tuple(notes),
        transductive=bool(found), about=describe_inputs("classes", given, true, asked.selection, asked.seed),
    )  # fmt: skip


def _score_images(given: Given, true: Given | None, ids: Any, target_ids: Any, asked: Asked) -> ScoredOutputs:
    assert true is not None
    if target_ids is not None:
        raise ConfigError("the stimuli of a folder have the names of their files; leave target_ids out.")
    seen, made, size, rows, notes = find_images(given, true, ids, asked.size)
    encoder = None
    if asked.features is not None:
        from braindecode_vis.base.registry import validate_component

        encoder = validate_component("target", {"kind": asked.features}, trusted=True).build()
    units = _find_row_units(rows)
    protocol = "; ".join(
        [
            f"outputs of others: {len(seen)} reconstructions", f"compared at {size[0]} x {size[1]} pixels",
            *([f"mean of {made.index.shape[1]} draws"] if made.ndim == 5 else []), _describe_selection(asked),
        ]
    )  # fmt: skip
    task = ScoringTask(
        retrievals=[], seen=seen, images={"decoded": made}, ids=rows.ids, concepts=rows.concepts,
        subjects=rows.table["subject"].to_numpy(dtype=object), decoded_concepts=None, feature_encoder=encoder,
        feature_name=asked.features or "", protocol=protocol, split="test", seed=asked.seed,
        n_bootstrap=asked.n_bootstrap, n_permutations=asked.n_permutations, units=units, size=size,
    )  # fmt: skip
    scores, items = compute_scores(task)
    first = split_rounds(task.show_small("decoded"))[0]
    copies = sum(np.array_equal(*pair) for pair in zip(first, task.show_small("seen"), strict=True))
    warnings = [*task.not_computed]
    if copies:
        warnings.append(f"{copies} of {len(seen)} reconstructions are the stimulus itself, pixel by pixel.")
    return ScoredOutputs(
        "images", tabulate_scores(scores), items, protocol, list_warnings([], asked.selection, warnings), tuple(notes),
        images={"seen": seen, "decoded": made},
        about=describe_inputs("images", given, true, asked.selection, asked.seed),
    )  # fmt: skip


# --- what all kinds share -----------------------------------------------------------------------------------------


def _find_row_units(rows: OutputRows) -> Units | None:
    return find_units(rows.table, rows.table, "auto")[0]


def _describe_selection(asked: Asked) -> str:
    return f"selection {asked.selection}"


def _mark(found: Sequence[str]) -> list[str]:
    return ["transductive: decided or scaled over all test items together"] if found else []
