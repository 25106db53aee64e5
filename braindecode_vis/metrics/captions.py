"""Captions: whether they say what was seen, where they come from, and a bank of them.

Owns ROUGE-1 and ROUGE-L, the exact-match part of METEOR, and sentence similarity by a local sentence encoder. Words are
runs of letters and digits, lower case, without stemming. METEOR as published also matches stems and synonyms of
WordNet; ``meteor_exact`` does not, so it is lower and has a name of its own. With several references the best counts.
Captions are those of the nearest training image (a decoder that can say nothing new, the control for those that can),
or written by a local network, GIT or BLIP as transformers has them.

References
----------
Lin (2004), ROUGE, ACL W04-1013. Banerjee and Lavie (2005), METEOR, ACL W05-0909; parameters (0.9, 3, 0.5) of Lavie and
Agarwal (2007), ACL W07-0734. Reimers and Gurevych (2019), Sentence-BERT, arXiv:1908.10084 (mean pooling). Wang et al.
(2022), GIT, arXiv:2205.14100; Li et al. (2022), BLIP, arXiv:2201.12086.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from braindecode_vis.arrays import Embeddings, Score
from braindecode_vis.checks import ConfigError, DataError, check_columns, check_file
from braindecode_vis.devices import choose_device
from braindecode_vis.embeddings.weights import check_no_kernels
from braindecode_vis.metrics.score_row import make_score
from braindecode_vis.metrics.uncertainty import permutation_test
from braindecode_vis.retrieval import compute_similarity
from braindecode_vis.store import read_json

CAPTIONERS = ("git", "blip")  # kinds of networks that write captions
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.9, 3.0, 0.5  # Lavie and Agarwal (2007), fitted to English


# --- words in common ------------------------------------------------------------------------------------------


def tokenize(text: str) -> list[str]:
    """Return the words of a text.

    Examples
    --------
    >>> tokenize("A dog's 2nd bone.")
    ['a', 'dog', 's', '2nd', 'bone']
    """
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_1(reference: str, candidate: str) -> float:
    """Return the F1 of words in common, each as often as both have it.

    Examples
    --------
    >>> rouge_1("a dog on the grass", "the dog") == 2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5)
    True
    """
    left, right = tokenize(reference), tokenize(candidate)
    return _f1(sum((Counter(left) & Counter(right)).values()), len(left), len(right))


def rouge_l(reference: str, candidate: str) -> float:
    """Return the F1 of the longest common subsequence of words.

    Examples
    --------
    >>> round(rouge_l("a cat and a dog", "a dog and a cat"), 3)
    0.6
    """
    left, right = tokenize(reference), tokenize(candidate)
    return _f1(_measure_subsequence(left, right), len(left), len(right))


def meteor_exact(reference: str, candidate: str) -> float:
    """Return METEOR with exact matches only.

    With m matched words, P = m / words of the candidate and R = m / words of the reference, the score is
    P R / (0.9 P + 0.1 R) times 1 - 0.5 (chunks / m)^3, where a chunk is a run of matched words adjacent in both. Words
    are matched by taking the longest common run again and again, which matches as many words as can be and keeps chunks
    few (not always fewest).

    Examples
    --------
    >>> meteor_exact("a black cat", "a black cat") == 1 - 0.5 / 27
    True
    """
    left, right = tokenize(reference), tokenize(candidate)
    n_matches, n_chunks = _match_runs(left, right)
    if not n_matches:
        return 0.0
    precision, recall = n_matches / len(right), n_matches / len(left)
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    return mean * (1 - METEOR_GAMMA * (n_chunks / n_matches) ** METEOR_BETA)


def _f1(n_common: int, n_left: int, n_right: int) -> float:
    if not n_common:
        return 0.0
    precision, recall = n_common / n_right, n_common / n_left
    return 2 * precision * recall / (precision + recall)


def _measure_subsequence(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)  # one row of the table of lengths is enough, filled in place
    for word in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _match_runs(left: list[str], right: list[str]) -> tuple[int, int]:
    """Return matched words and chunks, taking the longest run of unmatched words common to both first."""
    free_left, free_right = [True] * len(left), [True] * len(right)
    places: list[tuple[int, int]] = []
    while True:
        best, ends = 0, (0, 0)
        lengths = [0] * (len(right) + 1)
        for i, word in enumerate(left):
            before = lengths
            lengths = [0] * (len(right) + 1)
            for j, other in enumerate(right):
                if word == other and free_left[i] and free_right[j]:
                    lengths[j + 1] = before[j] + 1
                    if lengths[j + 1] > best:
                        best, ends = lengths[j + 1], (i, j)
        if not best:
            break
        for step in range(best):
            free_left[ends[0] - step] = free_right[ends[1] - step] = False
            places.append((ends[0] - step, ends[1] - step))
    places.sort(key=lambda place: place[1])  # in the order of the candidate, chunks are runs of both
    breaks = sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in pairwise(places))
    return len(places), breaks + bool(places)


# --- meaning ------------------------------------------------------------------------------------------------------


def load_parts(folder: Path, tokenizer: Any, network: Any) -> tuple[Any, Any]:
    """Return tokenizer (or processor) and network of a folder of transformers, without fetching anything.

    Raises
    ------
    DataError
        If a file of it is missing or damaged.
    """
    from safetensors import SafetensorError

    try:
        config = folder / "config.json"
        check_no_kernels(read_json(config) if config.is_file() else {}, config)
        # Said, or transformers asks on the terminal whether to run what the folder brings along.
        options = {"local_files_only": True, "trust_remote_code": False}
        first = tokenizer.from_pretrained(folder, **options)
        return first, network.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder} cannot be read ({words}); copy the whole folder again.") from error


class SentenceEncoder:
    """A sentence encoder of transformers from a local folder: unit mean of the last hidden states over real tokens.

    Parameters
    ----------
    folder
        With configuration, weights and tokenizer, for example of ``sentence-transformers/all-MiniLM-L6-v2``.
    batch_size, device
        How it runs.
    """

    def __init__(self, folder: Path, *, batch_size: int = 64, device: str = "auto") -> None:
        self.folder, self.batch_size, self.device = folder.expanduser(), batch_size, device
        self._loaded: tuple[Any, Any] | None = None

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModel, AutoTokenizer

            if not (self.folder / "config.json").is_file():
                raise DataError(
                    f"{self.folder} holds no sentence encoder; bring the whole folder of all-MiniLM-L6-v2 "
                    "(config.json, model.safetensors, tokenizer files)."
                )
            tokenizer, model = load_parts(self.folder, AutoTokenizer, AutoModel)
            self._loaded = (
                tokenizer,
                model.eval().requires_grad_(False).to(choose_device(self.device, setting="device")),
            )
        return self._loaded

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 unit vectors of shape (n_texts, n_features)."""
        import torch

        tokenizer, model = self._load()
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                batch = tokenizer(
                    list(texts[start : start + self.batch_size]),
                    padding=True,
                    truncation=True,
                    return_tensors="pt",
                ).to(model.device)
                states = model(**batch).last_hidden_state  # (n, n_tokens, n_features)
                mask = batch["attention_mask"][..., None].to(states.dtype)
                mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
                rows.append(torch.nn.functional.normalize(mean, dim=1).float().cpu().numpy())
        return np.concatenate(rows)


# --- scores -------------------------------------------------------------------------------------------------------

_WORD_METRICS: dict[str, Callable[[str, str], float]] = {
    "rouge1": rouge_1,
    "rougeL": rouge_l,
    "meteor_exact": meteor_exact,
}


def compute_caption_metrics(
    references: Sequence[Sequence[str]], candidates: Sequence[str], *, encoder: SentenceEncoder | None = None
) -> dict[str, np.ndarray]:
    """Return each caption metric for each candidate, the best over its references.

    Parameters
    ----------
    references : sequence of length n_items
        One or several captions of what was seen.
    candidates : sequence of length n_items
        The decoded caption.
    encoder
        Adds ``sentence_similarity``, the cosine of sentence vectors.

    Returns
    -------
    dict
        ``rouge1``, ``rougeL``, ``meteor_exact`` and perhaps ``sentence_similarity`` to an array of shape (n_items,).

    Raises
    ------
    DataError
        If the numbers differ or an item has no reference.
    """
    if len(references) != len(candidates) or not len(candidates) or not all(len(r) for r in references):
        raise DataError(
            f"{len(candidates)} captions cannot be compared with {len(references)} lists of references; every item "
            "needs at least one."
        )
    values = {
        name: np.array(
            [
                max(metric(r, text) for r in several)
                for several, text in zip(references, candidates, strict=True)
            ]
        )
        for name, metric in _WORD_METRICS.items()
    }
    if encoder is not None:
        flat = [text for several in references for text in several]
        owner = np.repeat(np.arange(len(references)), [len(several) for several in references])
        left, right = encoder.encode(flat), encoder.encode(candidates)
        cosines = np.einsum("ij,ij->i", left.astype(np.float64), right[owner].astype(np.float64))
        best = np.full(len(candidates), -np.inf)  # the closest of several references counts, as for words
        np.maximum.at(best, owner, cosines)
        values["sentence_similarity"] = best
    return values


def tabulate_captions(
    references: Sequence[Sequence[str]],
    candidates: Sequence[str],
    *,
    wanted: np.ndarray | None = None,
    encoder: SentenceEncoder | None = None,
) -> dict[str, np.ndarray]:
    """Return what each caption metric would be if each stimulus were the one that was seen.

    Parameters
    ----------
    references : sequence of length n_stimuli
        One or several captions of each stimulus.
    candidates : sequence of length n_items
        The decoded caption; equal ones are compared once.
    wanted : bool array of shape (n_items, n_stimuli), optional
        Which pairs are needed; the others may be 0.
    encoder
        As for `compute_caption_metrics`.

    Returns
    -------
    dict
        The metrics of `compute_caption_metrics` to arrays of shape (n_items, n_stimuli).

    Examples
    --------
    >>> tabulate_captions([["a red car"], ["a cat"]], ["a car"])["rouge1"].tolist()
    [[0.8, 0.5]]
    """
    texts, place = np.unique(np.asarray(candidates, dtype=str), return_inverse=True)
    asked = np.ones((len(candidates), len(references)), bool) if wanted is None else wanted
    pairs = np.zeros((len(texts), len(references)), bool)  # what any item with that text asks for
    np.logical_or.at(pairs, place, asked)
    tables = {name: np.zeros(pairs.shape) for name in _WORD_METRICS}
    for text, stimulus in zip(*np.nonzero(pairs), strict=True):
        for name, metric in _WORD_METRICS.items():
            tables[name][text, stimulus] = max(metric(r, texts[text]) for r in references[stimulus])
    if encoder is not None:
        flat = [text for several in references for text in several]
        starts = np.cumsum([0, *(len(several) for several in references)])[:-1]
        left, right = (encoder.encode(list(some)).astype(np.float64) for some in (texts, flat))
        # (n_texts, n_references), then the closest reference of each stimulus.
        tables["sentence_similarity"] = np.maximum.reduceat(left @ right.T, starts, axis=1)
    return {name: table[place] for name, table in tables.items()}


def score_captions(
    references: Sequence[Sequence[str]],
    candidates: Sequence[str] | Sequence[Sequence[str]],
    ids: Sequence[object] | np.ndarray,
    *,
    method: str,
    protocol: str,
    subject: str,
    split: str,
    seed: int,
    source: str = "",
    subjects: Sequence[object] | np.ndarray | None = None,
    encoder: SentenceEncoder | None = None,
    n_boot: int = 10_000,
    tables: Mapping[str, np.ndarray] | None = None,
    truth: np.ndarray | None = None,
    blocks: np.ndarray | None = None,
    n_permutations: int = 10_000,
    clusters: Sequence[object] | np.ndarray | None = None,
    unit: str = "image",
) -> list[Score]:
    """Return one row per caption metric; chance is the mean against the references of the next stimulus.

    With tables, chance is the mean over all permutations of the stimuli instead, and the row has a p-value.

    Parameters
    ----------
    references, encoder
        As for `compute_caption_metrics`.
    candidates : sequence of length n_items, or several of them
        One caption of each item; several rounds of captions are scored one at a time and averaged.
    ids : sequence of length n_items
        Stimulus of each item.
    source
        Where the captions are from, which follows the ``@`` of the metric.
    method, protocol, subject, split, seed, subjects, n_boot
        As for `braindecode_vis.metrics.score_row.make_score`.
    tables
        Metric to an array of shape (n_items, n_stimuli) from `tabulate_captions`, rounds averaged.
    truth : int array of shape (n_items,)
        Column of the tables that each item saw.
    blocks : array of shape (n_stimuli,), optional
        Stimuli are permuted within their block, where the tables hold these pairs only.
    n_permutations
        Permutations of the stimuli.
    clusters : sequence of length n_items, optional
        What intervals resample, if not stimuli.
    unit
        What they are, in one word.
    """
    names = [str(i) for i in ids]
    rounds: list[Any] = [candidates] if candidates and isinstance(candidates[0], str) else list(candidates)
    values = _average_metrics(references, rounds, encoder)
    distinct = list(dict.fromkeys(names))
    level: dict[str, float | None] = dict.fromkeys(values)
    p_values: dict[str, float | None] = dict.fromkeys(values)
    if len(distinct) > 1 and tables is not None:
        for name in values:
            null = permutation_test(
                tables[name], truth=truth, groups=blocks, n_permutations=n_permutations, seed=seed
            )
            level[name], p_values[name] = null.null_mean, null.p_value
    elif len(distinct) > 1:
        following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
        first = {name: names.index(name) for name in distinct}
        others = [references[first[following[name]]] for name in names]
        mismatched = _average_metrics(others, rounds, encoder)
        level = {name: float(rows.mean()) for name, rows in mismatched.items()}
    return [
        make_score(
            rows, metric=f"{name}@{source}" if source else name, method=method, protocol=protocol, subject=subject,
            split=split, seed=seed, chance=level[name], stimulus_ids=names if clusters is None else clusters, unit=unit,
            subjects=subjects, n_boot=n_boot, p_value=p_values[name],
        )
        for name, rows in values.items()
    ]  # fmt: skip


def _average_metrics(
    references: Sequence[Sequence[str]], rounds: Sequence[Sequence[str]], encoder: SentenceEncoder | None
) -> dict[str, np.ndarray]:
    """Return each metric of each item, the mean over rounds of captions."""
    found = [compute_caption_metrics(references, one, encoder=encoder) for one in rounds]
    return {name: np.mean([one[name] for one in found], axis=0) for name in found[0]}


# --- a bank of captions ---------------------------------------------------------------------------------------------


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
    # Sorted by id, so that ties do not depend on the order of the trials.
    known = known[np.argsort(training.ids[known].astype(str), kind="stable")]
    candidates = Embeddings(training.vectors[known], training.ids[known], training.space)
    nearest = np.argmax(compute_similarity(predicted, candidates, device=device), axis=1)
    return [bank[str(candidates.ids[row])][0] for row in nearest]


# --- written by a network -------------------------------------------------------------------------------------------


def caption_images(
    images: Iterable[np.ndarray],
    weights: Path,
    *,
    max_new_tokens: int = 20,
    n_beams: int = 1,
    batch_size: int = 8,
    device: str = "auto",
) -> list[str]:
    """Return one caption per image, without sampling: the same images give the same captions.

    Parameters
    ----------
    images
        uint8 arrays of shape (height, width, 3).
    weights
        Folder of transformers with configuration, ``.safetensors``, tokenizer and image processor, for example of
        ``microsoft/git-large-coco`` or ``Salesforce/blip-image-captioning-base``.
    max_new_tokens
        Longest caption, word pieces.
    n_beams
        Beams of the search; 1 is greedy.
    batch_size, device
        How it runs.

    Raises
    ------
    DataError
        If the folder holds no network.
    ConfigError
        If it is neither GIT nor BLIP.
    """
    import torch

    processor, model = load_captioner(weights)
    model.to(choose_device(device, setting="device"))
    iterator, captions = iter(images), []
    while batch := list(islice(iterator, batch_size)):
        inputs = processor(images=[np.ascontiguousarray(image) for image in batch], return_tensors="pt")
        with torch.inference_mode():
            # Greedy or beam search, never sampling: a caption must not differ between two evaluations.
            tokens = model.generate(
                pixel_values=inputs["pixel_values"].to(model.device),
                max_new_tokens=max_new_tokens, num_beams=n_beams, do_sample=False,
            )  # fmt: skip
        captions += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return captions


def load_captioner(weights: Path) -> tuple[Any, Any]:
    """Return processor and network of a local folder, in evaluation mode."""
    folder = weights.expanduser()
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} holds no captioning network; bring the whole folder of microsoft/git-large-coco or another GIT "
            "or BLIP."
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CAPTIONERS:
        raise ConfigError(
            f"{folder} holds a network of kind {kind!r}; captions come from {' or '.join(CAPTIONERS)}."
        )
    from transformers import AutoProcessor, BlipForConditionalGeneration, GitForCausalLM

    network: Any = GitForCausalLM if kind == "git" else BlipForConditionalGeneration
    processor, model = load_parts(folder, AutoProcessor, network)
    return processor, model.eval().requires_grad_(False)
