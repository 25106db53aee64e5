"""Scores of captions: of the nearest training image, decoded from embeddings, and of reconstructions by a network.

Owns which captions are compared with which references, and the messages for missing weights. A caption of the nearest
training image can say nothing new; it is the control for captions written by a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from braindecode_vis.base.arrays import Embeddings, Score
from braindecode_vis.base.checks import ConfigError, DataError, check_installed
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.settings import DeviceSettings, NeededWeights
from braindecode_vis.base.stimuli import Images
from braindecode_vis.base.store import hash_file, hash_json
from braindecode_vis.embeddings.caption_bank import caption_images, read_caption_bank
from braindecode_vis.embeddings.published import read_model
from braindecode_vis.embeddings.sentence_encoder import (
    SentenceEncoder,
    find_sentence_folder,
    list_sentence_weights,
)
from braindecode_vis.embeddings.weights import describe_needed
from braindecode_vis.scoring.caption_retrieval import retrieve_nearest
from braindecode_vis.scoring.image_scores import make_blocks
from braindecode_vis.scoring.metrics.caption_metrics import compute_caption_metrics, tabulate_captions
from braindecode_vis.scoring.metrics.image import make_image_table
from braindecode_vis.scoring.score_row import POOLED, make_score
from braindecode_vis.scoring.scoring_task import average, list_subjects
from braindecode_vis.scoring.uncertainty import PermutationResult, move_null, permutation_test, widen_null
from braindecode_vis.scoring.units import Units

NEAREST = "nearest-caption"
#: Kind of a decoder of the run -> what follows the ``@`` of its metrics. GIT describes images too, under its own name.
DECODERS = {
    "nearest": NEAREST, "git": "git-tokens", "minilm": "minilm-vectors", "coca": "coca", "brain": "brain",
}  # fmt: skip
#: Methods whose images a network describes: the system, its ceiling, and the copying control.
DESCRIBED = ("decoded", "oracle", "nearest")
LARGEST_TEXT_TABLE = 400_000  # pairs of captions that are compared for a null, about half a minute


class CaptionScoresConfig(DeviceSettings):
    """Which captions are scored, against which references.

    Parameters
    ----------
    bank
        CSV file with the columns ``id`` and ``caption``: captions of training images, which are retrieved, and of test
        images, which are the references.
    captioner
        Folder of a GIT or BLIP network that describes reconstructions; without it those rows are not computed.
    sentence_encoder
        ``minilm`` (the extra ``text``), or the folder of another sentence encoder, for the similarity of meaning.
    batch_size
        Images at a time, which does not change the result.
    """

    bank: Path
    captioner: Path | None = None
    sentence_encoder: Literal["minilm"] | Path | None = Field(default=None, union_mode="left_to_right")
    batch_size: int = Field(default=8, ge=1)

    #: Length and search of written captions.
    max_new_tokens: ClassVar[int] = 20
    n_beams: ClassVar[int] = 1
    fixed_settings: ClassVar[frozenset[str]] = frozenset({"max_new_tokens", "n_beams"})

    not_hashed: ClassVar[frozenset[str]] = frozenset(
        {"bank", "captioner", "sentence_encoder", "batch_size", "device"}
    )

    @property
    def sentence_folder(self) -> Path | None:
        """Folder of the sentence encoder."""
        if isinstance(self.sentence_encoder, str):
            return find_sentence_folder(self.sentence_encoder, "evaluation.captions.sentence_encoder")
        return self.sentence_encoder

    @property
    def torch_device(self) -> str:
        """``cpu`` or ``cuda``."""
        return choose_device(self.device, setting="evaluation.captions.device")

    def hashed_fields(self) -> dict[str, Any]:
        """Return the plain fields and the digests of every file that is used."""
        folders = {"captioner": self.captioner, "sentence_encoder": self.sentence_folder}
        digests = {
            f"{name}_digest": None if folder is None else _hash_folder(name, folder.expanduser())
            for name, folder in folders.items()
        }
        bank = self.bank.expanduser()
        if not bank.is_file():
            raise ConfigError(
                f"evaluation.captions.bank names {bank}, which is not a file; give a CSV file with the "
                "columns id and caption."
            )
        return {**super().hashed_fields(), **digests, "bank_sha256": hash_file(bank)}

    def check_files(self) -> None:
        """Raise `ConfigError` or `DataError` unless the bank can be read and each folder holds a network to be read."""
        read_caption_bank(self.bank.expanduser())
        for name in ("captioner", "sentence_encoder"):
            if getattr(self, name) is not None:
                check_installed("transformers", f"evaluation.captions.{name}")
            folder = self.captioner if name == "captioner" else self.sentence_folder
            if folder is not None and not (folder.expanduser() / "config.json").is_file():
                raise ConfigError(
                    f"evaluation.captions.{name} names {folder}, which has no config.json and is "
                    "therefore no network; correct it or leave it out."
                )

    def list_weights(self) -> list[NeededWeights]:
        """Return both networks; what one of them scores is left out without it."""
        captioner = describe_needed(
            read_model("git_large_coco"), "captioner", self.captioner, named=self.captioner is not None,
            automatic=False, leaves_out="captions of reconstructions",
        )  # fmt: skip
        sentences = list_sentence_weights(
            self.sentence_encoder, "sentence_encoder", leaves_out="sentence_similarity"
        )
        return [captioner, *sentences]

    @property
    def not_computed(self) -> list[str]:
        """One sentence for each kind of row that lacks its weights."""
        lacking = []
        if self.captioner is None:
            lacking.append(
                "captions of reconstructions not computed: need the folder of a GIT or BLIP network as "
                "evaluation.captions.captioner"
            )
        if self.sentence_encoder is None:
            lacking.append(
                "sentence_similarity not computed: needs the folder of all-MiniLM-L6-v2 as "
                "evaluation.captions.sentence_encoder"
            )
        return lacking


def _hash_folder(name: str, folder: Path) -> str:
    if not folder.is_dir():
        raise ConfigError(
            f"evaluation.captions.{name} names {folder}, which is not a folder; correct it or leave it out."
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_json({str(path.relative_to(folder)): hash_once(path) for path in files})


@dataclass(frozen=True)
class CaptionTask:
    """What is described and compared.

    Parameters
    ----------
    config
        Bank and networks.
    predicted, true, training : sequences of Embeddings, one entry per fold
        Predictions of the test rows, the true embedding of each of those rows, and the training images, in one space.
    ids, subjects : arrays of shape (n_rows,)
        Stimulus and subject of each row, fold by fold.
    seen, images
        As in `ScoringTask`.
    protocol, split, seed, n_bootstrap, n_permutations, units
        As in `ScoringTask`.
    decoded
        Captions that the run has decoded: ``decoded`` or ``oracle``, kind of decoder, and for each row the caption of
        each draw.
    """

    config: CaptionScoresConfig
    predicted: Sequence[Embeddings]
    true: Sequence[Embeddings]
    training: Sequence[Embeddings]
    ids: np.ndarray
    subjects: np.ndarray
    seen: Images
    images: Mapping[str, Images]
    protocol: str
    split: str
    seed: int
    n_bootstrap: int = 10_000
    n_permutations: int = 10_000
    units: Units | None = None
    decoded: Mapping[str, Mapping[str, Sequence[Sequence[str]]]] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptionScores:
    """Score rows, and captions.

    Parameters
    ----------
    scores
        Rows for the table.
    texts
        For the gallery: method to one text per row.
    sources
        Where the captions of the decoded system are from, to one text per row, the first draw.
    """

    scores: list[Score]
    texts: dict[str, list[str]]
    sources: dict[str, list[str]]


def score_caption_task(task: CaptionTask) -> CaptionScores:
    """Score captions of the nearest training image, those that the run decoded, and with a captioner reconstructions'.

    Returns
    -------
    CaptionScores
        Metrics are named ``rouge1@nearest-caption``, ``rouge1@git-tokens`` or ``rouge1@coca`` for the run's own
        decoders, and for a GIT or BLIP folder ``rouge1@<name of the folder>``.

    Raises
    ------
    DataError
        If a test image has no reference, or no training image has a caption.
    """
    bank = read_caption_bank(task.config.bank.expanduser())
    missing = [str(i) for i in task.ids if str(i) not in bank]
    if missing:
        raise DataError(
            f"the caption bank {task.config.bank} has no caption for the test image {missing[0]} (in "
            f"total {len(missing)} of {len(task.ids)} rows have none); every test image needs a reference."
        )
    folder = task.config.sentence_folder
    encoder = None if folder is None else SentenceEncoder(folder, device=task.config.torch_device)
    device = task.config.torch_device
    rounds: dict[tuple[str, str], list[list[str]]] = {
        ("decoded", NEAREST): [retrieve_nearest(task.predicted, task.training, bank, device=device)],
        ("oracle", NEAREST): [retrieve_nearest(task.true, task.training, bank, device=device)],
    }
    texts: dict[str, list[str]] = {}
    for method, kinds in task.decoded.items():
        for kind, rows_of in kinds.items():
            # `nearest` of the run is what is retrieved here too.
            if kind != "nearest":
                rounds[method, DECODERS[kind]] = [list(one) for one in zip(*rows_of, strict=True)]
    if task.config.captioner is not None:
        written = _describe_images(task, task.config.captioner)
        source = task.config.captioner.expanduser().name
        rounds |= {(method, source): several for method, several in written.items() if method != "seen"}
        texts = {method: several[0] for method, several in written.items()}
    sources = {source: several[0] for (method, source), several in rounds.items() if method == "decoded"}
    sources[NEAREST] = sources.pop(NEAREST)  # the control stands last
    texts["decoded"] = join_sources(sources)
    texts["seen"] = [bank[str(i)][0] for i in task.ids]
    references = [bank[str(i)] for i in task.ids]
    stimuli, truth = np.unique(task.ids.astype(str), return_inverse=True)
    scores = []
    for (method, source), several in rounds.items():
        null = None
        if method == "decoded":  # controls need no p-value, and their pairs would cost as much again
            null = _tabulate(task, several, [bank[name] for name in stimuli], truth, encoder)
        for subject, rows in list_subjects(task.subjects):
            pooled = task.ids[rows] if subject == POOLED else None
            units = None if task.units is None else task.units.select(rows, pooled)
            own = {} if units is None else {"stimulus_ids": units.labels, "unit": units.unit}
            scores += score_captions(
                [references[row] for row in rows], [[one[row] for row in rows] for one in several],
                task.ids[rows], seed=task.seed, source=source, encoder=encoder,
                null=None if null is None else null.select(rows), over_folds=len(task.predicted) > 1, method=method,
                protocol=task.protocol, subject=subject, split=task.split, n_boot=task.n_bootstrap,
                subjects=task.subjects[rows] if subject == POOLED else None, **own,
            )  # fmt: skip
    return CaptionScores(scores, texts, sources)


def join_sources(sources: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one text per row: captions of several sources are together, each with its name, as none is best for all.

    Examples
    --------
    >>> join_sources({"coca": ["a star"], "nearest-caption": ["a ball"]})
    ['a star (coca) | a ball (nearest-caption)']
    """
    if len(sources) == 1:
        return list(next(iter(sources.values())))
    named = [[f"{text} ({name})" for text in own] for name, own in sources.items()]
    return [" | ".join(row) for row in zip(*named, strict=True)]


def name_decoded(captions: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, list[str]]:
    """Return the first caption of each row by the names of their sources.

    Parameters
    ----------
    captions
        Kind of decoder, and for each row the caption of each draw.
    """
    return {DECODERS.get(kind, kind): [draws[0] for draws in rows] for kind, rows in captions.items()}


def _tabulate(
    task: CaptionTask,
    several: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    truth: np.ndarray,
    encoder: SentenceEncoder | None,
) -> CaptionNull:
    """Return the metrics of all captions against all stimuli of their block, rounds averaged, and the blocks."""
    n_texts = sum(len(set(one)) for one in several)
    n_pairs = n_texts * sum(len(texts) for texts in references)
    # Words are compared pair by pair in Python, so stimuli are permuted within blocks that can be afforded.
    size = max(1, LARGEST_TEXT_TABLE * len(references) // n_pairs)
    blocks = make_blocks(len(references), size, task.seed)
    wanted = blocks[truth][:, None] == blocks[None]
    found = [tabulate_captions(references, one, wanted=wanted, encoder=encoder) for one in several]
    tables = {name: average([one[name] for one in found]) for name in found[0]}
    return CaptionNull(tables, truth, blocks, task.n_permutations)


def _describe_images(task: CaptionTask, folder: Path) -> dict[str, list[list[str]]]:
    """Return captions of each method, one list per round of draws; every distinct image is described once."""
    made = {name: stack for name, stack in task.images.items() if name in DESCRIBED}
    table = make_image_table(task.seen, made)
    config = task.config
    captions = caption_images(
        table.images, folder, max_new_tokens=config.max_new_tokens, n_beams=config.n_beams,
        batch_size=config.batch_size, device=config.torch_device,
    )  # fmt: skip
    return {name: [[captions[row] for row in one] for one in several] for name, several in table.made.items()}


@dataclass(frozen=True)
class CaptionNull:
    """What stimuli are permuted in, for chance and p-value.

    Parameters
    ----------
    tables
        Metric to an array of shape (n_items, n_stimuli) from `tabulate_captions`, rounds averaged.
    truth : int array of shape (n_items,)
        Column of the tables that each item saw.
    blocks : array of shape (n_stimuli,), optional
        Stimuli are permuted within their block, where the tables hold these pairs only.
    n_permutations
        Permutations of the stimuli.
    """

    tables: Mapping[str, np.ndarray]
    truth: np.ndarray
    blocks: np.ndarray | None = None
    n_permutations: int = 10_000

    def select(self, rows: np.ndarray) -> CaptionNull:
        """Return that of some items."""
        tables = {name: table[rows] for name, table in self.tables.items()}
        return replace(self, tables=tables, truth=self.truth[rows])

    def permute(self, metric: str, seed: int, *, over_folds: bool) -> PermutationResult:
        """Return a metric under all permutations; after folds, p is of a wider null."""
        found = permutation_test(
            self.tables[metric],
            truth=self.truth,
            groups=self.blocks,
            n_permutations=self.n_permutations,
            seed=seed,
        )
        found = widen_null(found) if over_folds else found
        return (
            found
            if self.blocks is None
            else move_null(found, self.tables[metric], self.truth, self.blocks, None)
        )


def score_captions(
    references: Sequence[Sequence[str]],
    candidates: Sequence[str] | Sequence[Sequence[str]],
    ids: Sequence[object] | np.ndarray,
    *,
    seed: int,
    source: str = "",
    encoder: SentenceEncoder | None = None,
    null: CaptionNull | None = None,
    over_folds: bool = False,
    **details: Any,
) -> list[Score]:
    """Return one row per caption metric; chance is the mean against the references of the next stimulus.

    Parameters
    ----------
    references, encoder
        As for `compute_caption_metrics`.
    candidates : sequence of length n_items, or several of them
        One caption of each item; several rounds of captions are scored one at a time and averaged.
    ids : sequence of length n_items
        Stimulus of each item.
    seed
        Of bootstrap and permutations.
    source
        Where the captions are from, which follows the ``@`` of the metric.
    null
        With it, chance is the mean over all permutations of the stimuli instead, and the row has a p-value.
    over_folds
        Whether the captions are of several folds that train each other: limits and nulls are wider by sqrt 2.
    **details
        The words of the rows, and what their intervals resample if not stimuli; as for `score_row.make_score`.
    """
    names = [str(i) for i in ids]
    rounds: list[Any] = [candidates] if candidates and isinstance(candidates[0], str) else list(candidates)
    values = _average_metrics(references, rounds, encoder)
    distinct = list(dict.fromkeys(names))
    level: dict[str, float | None] = dict.fromkeys(values)
    p_values: dict[str, float | None] = dict.fromkeys(values)
    if len(distinct) > 1 and null is not None:
        for name in values:
            found = null.permute(name, seed, over_folds=over_folds)
            level[name], p_values[name] = found.null_mean, found.p_value
    elif len(distinct) > 1:
        following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
        first = {name: names.index(name) for name in distinct}
        others = [references[first[following[name]]] for name in names]
        mismatched = _average_metrics(others, rounds, encoder)
        level = {name: float(rows.mean()) for name, rows in mismatched.items()}
    return [
        make_score(
            rows, metric=f"{name}@{source}" if source else name, seed=seed, chance=level[name], p_value=p_values[name],
            over_folds=over_folds, **{"stimulus_ids": names, **details},
        )
        for name, rows in values.items()
    ]  # fmt: skip


def _average_metrics(
    references: Sequence[Sequence[str]], rounds: Sequence[Sequence[str]], encoder: SentenceEncoder | None
) -> dict[str, np.ndarray]:
    """Return each metric of each item, the mean over rounds of captions."""
    found = [compute_caption_metrics(references, one, encoder=encoder) for one in rounds]
    return {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}
