"""Writes predictions on new trials into a folder: embeddings, tables, images, page and provenance.

::

    OUT/
      predictions/       vectors.npy, ids.json: predicted embeddings
      trials.csv         what was predicted: a row per trial, or per picture where repetitions are averaged
      retrieved.csv      the nearest pictures of each trial; classes.csv for a run that decodes categories
      ranks.csv          rank of the true picture, where it is known
      scores.json        scores with interval and chance, where the truth is known
      images/            one PNG per trial (and draw)
      captions.csv       decoded captions by their sources, for a run that decodes some
      predict.html       the page
      provenance.json    the run, its fits, the new trials, versions
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.arrays import SCORE_KEYS
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import ImageRows, Images
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.preparing import preprocess
from braindecode_vis.scoring.metrics.image import split_rounds
from braindecode_vis.scoring.retrieval import describe_common_choice

KIND = "predict"
_NAMES = (
    "predictions", "trials.csv", "retrieved.csv", "classes.csv", "ranks.csv", "scores.json", "images", "captions.csv",
    "predict.html",
    store.PROVENANCE,
)  # fmt: skip
PAGE_ITEMS = 8  # decoded images on the page: the first ones


def check_out(
    out: Path, fingerprint: str | None = None, *, kind: str = KIND, names: Sequence[str] = _NAMES
) -> Path:
    """Return the folder, or raise `DataError` if it holds anything but the same predictions (or scores).

    Parameters
    ----------
    out
        Where predictions are to be written.
    fingerprint
        Of the predictions, once they are known; before that, any predictions may lie there.
    kind
        What the folder is to hold: ``predict``, or ``score`` for scores of outputs.
    names
        Files of that; with any other the folder is left alone.
    """
    path = out.expanduser().absolute()
    if path.is_file():
        raise DataError(f"{path} is a file; give a folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return path
    try:
        record = store.read_json(path / store.PROVENANCE)
    except (OSError, BraindecodeVisError):
        record = {}
    # One file of the user's own is enough to leave the folder alone: it is replaced as a whole.
    others = [entry.name for entry in path.iterdir() if entry.name not in names]
    if record.get("kind") != kind or others:
        raise DataError(
            f"{path} holds other files{f' ({others[0]})' if others else ''}; choose another folder."
        )
    if fingerprint is not None and record.get("fingerprint") != fingerprint:
        what = "predictions of other trials or of another run" if kind == KIND else "scores of other outputs"
        raise DataError(f"{path} holds {what}; choose another folder.")
    return path


def write_predictions(result: Any, out: Path) -> Path:
    """Write predictions into a folder and return its path; readers see all of it or nothing.

    Parameters
    ----------
    result
        The predictions.
    out
        See `check_out`.
    """
    provenance = describe_provenance(result)
    path = check_out(out, provenance["fingerprint"])
    with publish_folder(path) as temporary:
        _write_content(result, temporary)
        _write_page(result, temporary / "predict.html", provenance)
        store.write_json(temporary / store.PROVENANCE, provenance)
    return path


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-being-written")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe_provenance(result: Any) -> dict[str, Any]:
    """Return run, fits, new trials and versions; what decides the result is in its `fingerprint`."""
    run = result.run
    asked = {
        "fits": {f"fold{n:02d}": train(run)[n].artifact.fingerprint for n in result.folds},
        "protocol": result.protocol,
        "trials": store.hash_json(store.json_plain(result.trials.astype(str).to_dict("list"))),
    }
    if result.predicted is not None and result.candidates is not None:
        asked["predictions"] = _digest(result.predicted.vectors)
        asked["gallery"] = _digest(result.candidates.embeddings.vectors)
    else:
        assert result.decisions is not None
        asked["predictions"] = _digest(result.decisions.to_numpy())
    return {
        "kind": KIND,
        "run": str(run.folder.path),
        "run_name": run.config.name,
        "fingerprint": store.hash_json(store.json_plain(asked)),
        **asked,
        "transductive": result.transductive,
        "notes": list(result.notes),
        **store.collect_provenance(),
        "config": run.config.model_dump(mode="json"),
    }


def _digest(values: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()[:16]


def _write_content(result: Any, folder: Path) -> None:
    from PIL import Image

    result.trials.to_csv(folder / "trials.csv", index=False)
    if result.decisions is not None:
        result.classes.to_csv(folder / "classes.csv", index=False)
    else:
        store.write_embeddings(folder / "predictions", result.embeddings)
        result.retrieved.to_csv(folder / "retrieved.csv", index=False)
        if len(result.ranks):
            result.ranks.to_csv(folder / "ranks.csv", index=False)
        if result.makes_images:
            images = result.reconstructions
            (folder / "images").mkdir()
            for draw, made in enumerate(split_rounds(images)):
                for row, image in enumerate(made):
                    name = f"{row:05d}.png" if images.index.ndim == 1 else f"{row:05d}_{draw}.png"
                    Image.fromarray(image).save(folder / "images" / name)
        if len(result.captions):
            result.captions.to_csv(folder / "captions.csv", index=False)
    if len(result.scores):
        store.write_json(folder / "scores.json", store.json_plain(_list_rows(result.scores)))


def _list_rows(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """Return score rows with None for what is not known, as reports take them."""
    plain = scores.astype(object).where(scores.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]


def _write_page(result: Any, path: Path, provenance: dict[str, Any]) -> None:
    from braindecode_vis.report.page import ExtraSection, RankContent, ReportContent, write_report

    sections, ranks = [], None
    if result.decisions is not None:
        sections.append(ExtraSection("Decoded classes", "One row per trial.", table=result.classes))
    else:
        words = result.candidates.words if result.candidates else ""
        if result.makes_images:
            figure = result.gallery(n_items=PAGE_ITEMS)
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=110)
            n = min(PAGE_ITEMS, len(result))
            sections.append(
                ExtraSection(
                    "Decoded images",
                    f"The first {n} of {len(result)} trials, in order: the decoded image, and below it "
                    f"the nearest pictures of the gallery ({words}).",
                    figure=drawn.getvalue(), alt="Decoded images above the nearest pictures of the gallery.",
                )
            )  # fmt: skip
        title = (
            "Nearest descriptions" if result.candidates and result.candidates.texts else "Nearest pictures"
        )
        sections.append(ExtraSection(title, f"By cosine, best first ({words}).", table=result.retrieved))
        if len(result.captions):
            sections.append(
                ExtraSection("Captions", "Decoded from each trial, by source.", table=result.captions)
            )
        if len(result.ranks):
            found = result.ranks
            sizes = found["gallery_size"].unique()
            if len(sizes) == 1:
                ranks = RankContent(
                    found["rank"].to_numpy(), int(sizes[0]), f"Gallery of {found['gallery_size'].iloc[0]}."
                )
    known = int(result.trials["known"].sum())
    warnings = []
    if result.transductive:
        warnings.append(
            "Transductive: statistics were learnt from the new trials themselves, so do not compare "
            "these numbers with others."
        )
    if result.decisions is None:
        firsts = result.retrieved[result.retrieved["place"] == 1].sort_values("trial")
        shown = result.trials["stimulus_id"].where(result.trials["known"], None)
        common = describe_common_choice(
            firsts["picture"].tolist(), shown.iloc[firsts["trial"]].tolist(), what="trials"
        )
        warnings += filter(None, [common])
    fitted = "only the statistics below were" if result.transductive else "nothing was"
    content = ReportContent(
        title=f"{result.run.config.name} on new trials",
        dataset=result.run.config.dataset.kind,
        description=" ".join([f"A finished run was applied to new trials; {fitted} fitted on them.", *result.notes]),
        protocol={"Protocol": result.protocol, "Run": str(result.run.folder.path)},
        facts=[
            ("Trials", len(result)),
            ("Trials whose shown picture is known", known),
            ("Fits", ", ".join(f"{name} {mark}" for name, mark in provenance["fits"].items())),
            ("Fingerprint", provenance["fingerprint"]),
        ],
        scores=_list_rows(result.scores),
        ranks=ranks,
        sections=sections,
        warnings=warnings,
        provenance=provenance,
        command=provenance["command"],
    )  # fmt: skip
    write_report(path, content)


# --- scores where the truth is known ---------------------------------------------------------------------------
# Scores of a finished run on new trials whose true picture or class is known.
#
# Pictures that the run was trained on are scored apart from those that are new to it: finding a picture of the
# training again is another question than finding one that was never seen.


NEW_PICTURES, TRAINED_PICTURES = "new pictures", "pictures of the training"


def score_predictions(result: Any) -> pd.DataFrame:
    """Return the score rows of new trials; an empty table where nothing is known of the truth."""
    rows = _score_categories(result) if result.decisions is not None else _score_pictures(result)
    return pd.DataFrame([score.as_row() for score in rows], columns=list(SCORE_KEYS))


def _score_pictures(result: Any) -> list[Any]:
    from braindecode_vis.scoring.score_table import ScoringTask, compute_scores

    known = result._list_known()
    if not known:
        return []
    rows = np.concatenate([part.rows[own] for part, own, _ in known])
    config, prepared = result.run.config, preprocess(result.run)
    trained = np.concatenate([prepared.responses.stimulus_ids[prepared.folds[n].train] for n in result.folds])
    ids = result.trials["stimulus_id"].to_numpy(dtype=object)[rows]
    # By the ids of the run; a picture under another name counts as new.
    is_trained = np.isin(ids.astype(str), trained.astype(str))
    split = "new trials"
    if (
        is_trained.all() or not is_trained.any()
    ):  # otherwise each kind has rows of its own beside those of both
        split = f"{split}, {TRAINED_PICTURES if is_trained.all() else NEW_PICTURES}"
    # Every picture is read, to know that it is there: for images alone. Without it they are compared with nothing.
    pictures, images = _find_seen(result, ids) if result.makes_images else None, {}
    seen: Images = np.zeros((len(rows), 1, 1, 3), np.uint8)
    if pictures is not None:
        seen, images = pictures, {"decoded": result.reconstructions[rows]}
    evaluation = config.evaluation
    features = evaluation.features if images else None
    task = ScoringTask(
        retrievals=[
            (type(p.queries)(p.queries.vectors[own], p.queries.ids[own], p.queries.space), p.gallery, ranked)
            for p, own, ranked in known
        ],
        seen=seen, images=images, ids=ids, concepts=result.trials["concept"].to_numpy(dtype=object)[rows],
        subjects=result.trials["subject"].to_numpy(dtype=object)[rows], decoded_concepts=None,
        feature_encoder=None if features is None else features.build(),
        feature_name="" if features is None else features.kind, protocol=result.protocol, split=split,
        seed=config.seed, n_bootstrap=evaluation.n_bootstrap, n_permutations=evaluation.n_permutations,
        conditions=np.where(is_trained, TRAINED_PICTURES, NEW_PICTURES).astype(object),
    )  # fmt: skip
    with result.run.listener.progress("scoring", task.n_steps) as advance:
        scores, _ = compute_scores(task, advance=advance)
    if result.candidates.texts:  # another gallery than one of pictures, by its name too
        scores = [replace(score, metric=f"{score.metric}@descriptions") for score in scores]
    return scores


def _find_seen(result: Any, ids: np.ndarray) -> ImageRows | None:
    """Return the true pictures, or None if one is not available."""
    if any(result.read_picture(name) is None for name in map(str, pd.unique(ids))):
        return None
    stimuli = result.candidates.stimuli
    return ImageRows(stimuli, stimuli.find_rows(map(str, ids)))


def _score_categories(result: Any) -> list[Any]:
    from braindecode_vis.scoring.category_scores import CategoryTask, compute_category_scores
    from braindecode_vis.scoring.label_exchange import exchange_subjects

    assert result.decisions is not None
    trials, classes = result.trials, tuple(result.decisions.columns)
    # A class that no decoder has learnt cannot be hit, and would only count as wrong.
    rows = np.flatnonzero(trials["concept"].astype(str).isin(classes))
    if not len(rows):
        return []
    trials = trials.iloc[rows]
    config = result.run.config
    decisions, labels = (
        result.decisions.to_numpy()[rows],
        trials["concept"].astype(str).to_numpy(dtype=object),
    )
    subjects, most = trials["subject"].astype(str).to_numpy(dtype=object), config.evaluation.n_permutations
    task = CategoryTask(
        decisions=decisions, classes=classes, labels=labels,
        runs=trials[["session", "run"]].astype(str).agg("/".join, axis=1).to_numpy(dtype=object),
        subjects=subjects, protocol=result.protocol, split="new trials", seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap, n_permutations=most,
        exchanged=exchange_subjects(
            subjects, labels, classes, decisions, most=most, generator=make_generator(config.seed, "exchanged labels")
        ),
    )  # fmt: skip
    return compute_category_scores(task)[0]
