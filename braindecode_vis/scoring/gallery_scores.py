"""Retrieval of the seen image among the images of a bank, of which there may be millions.

Owns which images of the bank are candidates, the exact ranks and the approximate ones, and how good the approximation
is. The candidates are the tested images of a fold and all images of the bank but those that are a tested image
themselves: a second copy of the true image would make every hit a tie. Nothing but blocks of the bank is in memory.

Exact ranks are those of `braindecode_vis.scoring.retrieval`. The approximation is faiss's inverted file: directions are
brought to their leading principal axes and a byte for each, sorted into cells, of which the nearest are searched; what
is found there is compared again exactly. How much of the exact answer that finds is a score of its own.

References
----------
Douze et al. (2024), The Faiss library, arXiv:2401.08281.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from braindecode_vis.base.arrays import Embeddings, MappedRows, Score, normalise_rows
from braindecode_vis.base.checks import DataError, require
from braindecode_vis.base.memory import check_memory
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.store import read_json
from braindecode_vis.scoring.metrics.metric_registry import compute_chance, find_metric
from braindecode_vis.scoring.retrieval import TIE_TOLERANCE, compute_ranks
from braindecode_vis.scoring.score_row import POOLED, make_score
from braindecode_vis.scoring.scoring_task import list_subjects
from braindecode_vis.scoring.units import Units

TOP = (1, 5, 10, 100, 1000)
RECALLED = 10  # nearest candidates that the approximation should find
#: Images with a larger cosine than this, in the space of the comparison, are the same image: rounding to half precision
#: takes 1e-6, another compression of a picture more than 1e-4.
SAME = 1 - 1e-5
_BLOCK = 4096
_AXES, _SAMPLE, _AGAIN = 128, 65_536, 500


class LargeGalleryConfig(Settings):
    """A gallery with many more images than the test set.

    Parameters
    ----------
    bank
        Folder that ``embed --images`` has filled, in the space of the target.
    search
        ``exact`` compares every query with every candidate; ``faiss`` compares only the most likely ones (extra
        ``search``), and its recall of the ten nearest is reported with the scores.
    """

    bank: Path
    search: Literal["exact", "faiss"] = "exact"

    #: Of ``faiss``: cells that are searched, of as many as the root of the number of candidates.
    n_probe: ClassVar[int] = 32
    #: Of ``faiss``: queries, drawn at random, that are searched exactly too, for the recall.
    n_checked: ClassVar[int] = 200
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"n_probe", "n_checked"})

    not_hashed: ClassVar[frozenset[str]] = frozenset({"bank"})

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of the bank."""
        fields = super().hashed_fields()
        if self.search == "exact":
            fields = {"search": "exact"}
        return {**fields, "bank_digests": self._read_manifest()["digests"]}

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the bank is there, and faiss where it is asked for."""
        self._read_manifest()
        if self.search == "faiss":
            require("faiss", "evaluation.gallery.search faiss", otherwise="set it to exact")

    def _read_manifest(self) -> dict[str, Any]:
        from braindecode_vis.embeddings.image_bank import MANIFEST, read_image_bank

        path = self.bank.expanduser() / MANIFEST
        if not path.is_file():
            read_image_bank(self.bank.expanduser())  # which says what it is
        found: dict[str, Any] = read_json(path)
        return found


@dataclass(frozen=True)
class GalleryTask:
    """Queries of one fold (or subject) and what they are searched in.

    Parameters
    ----------
    queries
        Predictions as they are compared.
    tested
        The tested images of this part, as they are compared: each query's own is among them.
    bank
        All images of the bank; its vectors are mapped when they are read.
    """

    queries: Embeddings
    tested: Embeddings
    bank: Embeddings


@dataclass(frozen=True)
class _Found:
    """The candidates of a task and how many images of the bank were left out."""

    gallery: Embeddings
    n_same: int


def score_large_gallery(
    config: LargeGalleryConfig,
    tasks: Sequence[GalleryTask],
    subjects: np.ndarray,
    *,
    protocol: str,
    split: str,
    seed: int,
    n_bootstrap: int,
    units: Units | None = None,
    device: str = "auto",
    over_folds: bool = False,
) -> list[Score]:
    """Return scores of retrieval among the images of a bank, with chance and interval.

    Parameters
    ----------
    config
        What is searched, and how.
    tasks
        Parts whose queries, in this order, are the rows below.
    subjects : array of shape (n_rows,)
        Subject of each query.
    protocol, split, seed, n_bootstrap, units
        As in `scoring_task.ScoringTask`.
    device
        Where exact ranks are computed.
    over_folds
        As in `score_row.make_score`.

    Returns
    -------
    list of Score
        ``top1@large-gallery``, ``top5@...``, ``median_rank@...`` and so on; with faiss ``top1@large-gallery-faiss`` and
        ``recall10@large-gallery-faiss``.
    """
    label = "large-gallery" if config.search == "exact" else "large-gallery-faiss"
    values: dict[str, list[np.ndarray]] = {}
    ids, sizes, same = [], [], 0
    for number, task in enumerate(tasks):
        found = choose_candidates(task.tested, task.bank)
        same += found.n_same
        if config.search == "exact":
            own = _rank_exactly(task.queries, found.gallery, device)
        else:
            chance = make_generator(seed, "large_gallery", number)
            own = _rank_by_faiss(task.queries, found.gallery, config, chance, device)
        for name, each in own.items():
            values.setdefault(name, []).append(each)
        ids.append(task.queries.ids.astype(str))
        sizes.append(np.full(len(task.queries), len(found.gallery)))
    names, size = np.concatenate(ids), np.concatenate(sizes)
    words = (
        f"{protocol}; large gallery of {size.min():,} images, those of the bank {config.bank.name} beside those tested"
        + (f"; {same} of the bank left out, which are tested images" if same else "")
        + ("" if config.search == "exact" else f"; by faiss, {config.n_probe} cells, then exactly")
    )
    every = {f"{name}@{label}": np.concatenate(several) for name, several in values.items()}
    return score_values(
        every, subjects=subjects, ids=names, sizes=size, units=units, protocol=words, split=split, seed=seed,
        n_bootstrap=n_bootstrap, over_folds=over_folds,
    )  # fmt: skip


def score_values(
    values: Mapping[str, np.ndarray],
    *,
    subjects: np.ndarray,
    ids: np.ndarray,
    sizes: np.ndarray,
    protocol: str,
    split: str,
    seed: int,
    n_bootstrap: int,
    units: Units | None = None,
    method: str = "decoded",
    has_chance: bool = True,
    over_folds: bool = False,
) -> list[Score]:
    """Return the rows of metrics of retrieval for each subject, and for all of them if there are several.

    Parameters
    ----------
    values
        Metric with its protocol (``top1@large-gallery``), and one value per query; NaN where it is not known.
    subjects, ids, sizes : arrays of shape (n_queries,)
        Subject, stimulus and size of the gallery of each query.
    protocol, split, seed, n_bootstrap, units, method
        As in `scoring_task.ScoringTask` and `Score`.
    has_chance
        Whether chance follows from the sizes of the galleries.
    over_folds
        As in `score_row.make_score`.
    """
    common = int(sizes[0]) if len(set(sizes.tolist())) == 1 else None
    scores = []
    for name, every in values.items():
        metric = find_metric(name).metric
        for subject, rows in list_subjects(subjects):
            rows = rows[np.isfinite(every[rows])]  # recall is known of the queries that were searched exactly
            if not len(rows):
                continue
            levels = (
                [compute_chance(name, gallery_size=int(each)) for each in sizes[rows]] if has_chance else []
            )
            own_units = (
                None if units is None else units.select(rows, ids[rows] if subject == POOLED else None)
            )
            scores.append(
                make_score(
                    every[rows], metric=name, method=method, protocol=protocol, subject=subject,
                    split=split, seed=seed, chance=float(np.mean(levels)) if levels else None, gallery_size=common,
                    stimulus_ids=ids[rows] if own_units is None else own_units.labels,
                    unit="image" if own_units is None else own_units.unit,
                    subjects=subjects[rows] if subject == POOLED else None,
                    statistic=metric.statistic, n_boot=n_bootstrap, over_folds=over_folds,
                )
            )  # fmt: skip
    return scores


def choose_candidates(tested: Embeddings, bank: Embeddings) -> _Found:
    """Return the tested images and those of the bank that are none of them, by id and by what they look like."""
    vectors = bank.vectors
    assert isinstance(vectors, MappedRows)
    own = np.asarray(tested.flat())
    units = normalise_rows(own)
    known = set(tested.ids.astype(str).tolist())
    kept = np.array([str(i) not in known for i in bank.ids])
    for start, block in _iterate(vectors):
        # (n_block, n_tested); a blank image has no direction, and could not be compared.
        length = np.linalg.norm(block, axis=1)
        nearest = (block @ units.T).max(axis=1)
        kept[start : start + len(block)] &= (nearest < SAME * length) & (length > 0)
    rows = np.flatnonzero(kept)
    ids = np.concatenate([tested.ids.astype(str), bank.ids[rows].astype(str)])
    gallery = MappedRows(vectors.data, vectors.mapping, vectors.rows[rows], own)
    return _Found(Embeddings.from_checked(gallery, ids, tested.space), int((~kept).sum()))


def _iterate(vectors: Any) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors), _BLOCK):
        yield start, vectors[start : start + _BLOCK]


def _rank_exactly(queries: Embeddings, gallery: Embeddings, device: str) -> dict[str, np.ndarray]:
    ranked = compute_ranks(queries, gallery, n_top=0, device=device)
    names = [f"top{k}" for k in TOP if k < len(gallery)]
    found = {}
    for name in [*names, "2_way", "median_rank", "mean_reciprocal_rank"]:
        metric, n, *_ = find_metric(name)
        assert metric.compare is not None
        found[name] = metric.compare(ranked, n).astype(float)
    return found


def _rank_by_faiss(
    queries: Embeddings,
    gallery: Embeddings,
    config: LargeGalleryConfig,
    chance: np.random.Generator,
    device: str,
) -> dict[str, np.ndarray]:
    search = index_gallery(gallery, n_probe=config.n_probe, chance=chance)
    tops = [k for k in TOP if k < min(len(gallery), _AGAIN)]
    rows, similar = search(normalise_rows(queries.flat()), max((*tops, RECALLED)))
    row_of = {str(name): row for row, name in enumerate(gallery.ids.tolist())}
    own = np.array([row_of[str(i)] for i in queries.ids])
    mine = rows == own[:, None]
    true = np.where(mine, similar, -np.inf).max(
        axis=1
    )  # of a true image that was not found, nothing is known
    # Ties are lost, as in exact ranks.
    before = ((similar >= true[:, None] - TIE_TOLERANCE) & ~mine).sum(axis=1)
    found = {f"top{k}": (np.isfinite(true) & (before < k)).astype(float) for k in tops}
    checked = np.sort(chance.permutation(len(queries))[: config.n_checked])
    some = queries.take(checked)
    exact = compute_ranks(some, gallery, n_top=RECALLED, device=device).top_indices
    recall = np.full(len(queries), np.nan)
    recall[checked] = [np.isin(a, b[:RECALLED]).mean() for a, b in zip(exact, rows[checked], strict=True)]
    return {**found, f"recall{RECALLED}": recall}


def index_gallery(
    gallery: Embeddings, *, n_probe: int, chance: np.random.Generator
) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Return a search for the most similar candidates that looks at the likeliest ones only.

    Parameters
    ----------
    gallery
        The candidates; its vectors are read twice, block by block.
    n_probe
        Cells that are searched.
    chance
        Draws the candidates that cells and axes are learnt from.

    Returns
    -------
    function
        Takes unit vectors of shape (n_queries, n_features) and a number, and returns rows of the gallery and their
        cosines, both of shape (n_queries, n), the best first; where fewer were found, rows are -1.
    """
    faiss = require("faiss", "evaluation.gallery.search faiss", otherwise="set it to exact")
    n, n_features = gallery.vectors.shape
    n_axes = min(_AXES, n_features)
    check_memory((n_axes + 24.0) * n, what=f"the index of {n} candidates", reduce="the gallery")
    sample = normalise_rows(gallery.vectors[np.sort(chance.choice(n, min(n, _SAMPLE), replace=False))])
    moments = (sample.T @ sample).astype(np.float64)
    # The axes with the largest mean square: products on them are nearest to the whole ones.
    axes = np.linalg.eigh(moments)[1][:, ::-1][:, :n_axes].astype(np.float32)
    n_cells = max(1, min(int(np.sqrt(n)), len(sample) // 39))  # fewer than 39 for each, and faiss warns
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(n_axes), n_axes, n_cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.train(np.ascontiguousarray(sample @ axes))
    for _, block in _iterate(gallery.vectors):
        index.add(np.ascontiguousarray(normalise_rows(block) @ axes))
    index.nprobe = min(n_probe, n_cells)

    def search(units: np.ndarray, n_top: int) -> tuple[np.ndarray, np.ndarray]:
        n_top = min(n_top, n)
        wide = min(n, max(_AGAIN, 2 * n_top))
        likely = index.search(np.ascontiguousarray((units @ axes).astype(np.float32)), wide)[1]
        rows, cosines = np.full((len(units), n_top), -1), np.full((len(units), n_top), -np.inf)
        for number, (unit, near) in enumerate(zip(units.astype(np.float64), likely, strict=True)):
            near = np.sort(near[near >= 0])
            vectors = gallery.vectors[near].astype(np.float64)
            exact = (vectors @ unit) / np.linalg.norm(vectors, axis=1)
            order = np.lexsort((near, -exact.round(10)))[:n_top]
            rows[number, : len(order)], cosines[number, : len(order)] = near[order], exact[order]
        return rows, cosines

    return search


def check_bank_space(bank: Embeddings, space: str, shape: tuple[int, ...]) -> None:
    """Raise `DataError` unless the images of a bank can be compared with targets of this space and shape."""
    if bank.space != space or bank.vectors.shape[1:] != shape:
        raise DataError(
            f"the bank is in the space {bank.space!r} with rows of {bank.vectors.shape[1:]}, but the run "
            f"predicts {space!r} with rows of {shape}; embed its images with this run: embed RUN "
            "--images ... --bank ..."
        )
