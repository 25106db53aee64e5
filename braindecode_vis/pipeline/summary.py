"""Collects the contents of a run's report: facts, protocol, ranks, gallery and tables, from the results of the
stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import store
from braindecode_vis.base.stimuli import show_as_compared
from braindecode_vis.config import RunConfig
from braindecode_vis.datasets.manifests import Manifest
from braindecode_vis.pipeline.categories import tabulate_confusions, tabulate_runs
from braindecode_vis.pipeline.decoding import Reconstructed, Retrieved, open_branches, reconstruct, retrieve
from braindecode_vis.pipeline.learning import train
from braindecode_vis.pipeline.preparing import Prepared, embed, preprocess
from braindecode_vis.pipeline.runs import Run
from braindecode_vis.pipeline.scoring import evaluate, find_phantom, name_objectives
from braindecode_vis.report.gallery import SEEN, GalleryContent, arrange_rows
from braindecode_vis.report.page import ExtraSection, RankContent
from braindecode_vis.report.words import describe_encoder
from braindecode_vis.scoring.caption_scores import join_sources, name_decoded
from braindecode_vis.scoring.label_exchange import find_exchange
from braindecode_vis.training.auto import FILE as CHOICE
from braindecode_vis.training.auto import AutoConfig


def describe_run(run: Run) -> dict[str, Any]:
    """Return what the page says of the results of a run: scores with the result in a sentence, ranks and gallery.

    An audit makes it again from the files.
    """
    config, rows, prepared = run.config, evaluate(run), preprocess(run)
    items = run.seen["items"]
    folders = [fold.artifact.path for fold in train(run)]
    fitted = folders[0] / f"{config.encoder.kind}.json"
    known = store.read_json(fitted) if fitted.is_file() else {}
    if fitted.name == CHOICE:  # each fold chose for itself
        known = {"chosen": [store.read_json(folder / CHOICE)["chosen"] for folder in folders]}
    if config.decodes_categories:
        parts = describe_categories(config, prepared, items)
        if (exchange := find_exchange(rows)) is not None:
            parts["protocol"]["Null"] = exchange.words
    else:
        space, retrieved, images = embed(run)[0].embeddings.space, retrieve(run), reconstruct(run)
        captions = run.seen.get("captions")
        if captions is None and images.captions:  # nothing to compare them with, but they were decoded
            captions = {"decoded": join_sources(name_decoded(images.captions["decoded"]))}
        parts = describe_images(config, prepared, space, retrieved, images, items, captions=captions)
    design = run.seen["design"]
    if design:
        note = (
            f"Predicted from {', '.join(design)} only, by ridge on the training trials: what the design "
            "of the experiment predicts without a brain."
        )
        if not config.decodes_categories:
            note += (
                " It is scored by retrieval only: images would need another pass of the generator "
                "over all test trials."
            )
        parts["method_notes"] = {"design": note}
    else:
        parts["protocol"]["Control of the design"] = (
            "none: the trials have no order and no duration, and come from one run"
        )
    return {
        **parts,
        "scores": rows,
        "differences": run.seen["differences"],
        "method": describe_encoder(config.encoder.model_dump(mode="json"), known),
        "result": describe_result(prepared, rows, items, simulated=find_phantom(config) is not None),
        "counted": count_trials(prepared),
    }


def describe_result(
    prepared: Prepared, rows: list[dict[str, Any]], items: pd.DataFrame, *, simulated: bool = False
) -> str:
    """Return the result of a run in one sentence: how often what was seen is found, and how often by guessing."""
    decoded = [row for row in rows if row["method"] == "decoded" and row["split"] == "test"]
    name = "accuracy" if "label" in items else "top1"
    found = [row for row in decoded if row["metric"] == name]
    row = next((row for row in found if row["subject"] == "all"), found[0] if len(found) == 1 else None)
    start = f"From {'simulated ' if simulated else ''}{_describe_signal(prepared)}"
    if row is None:
        if found:
            return ""
        return f"{start}, images cannot be distinguished: there is only one candidate."
    n = len(items)
    if name == "accuracy":
        n_classes = items["label"].nunique()
        hits = int((items["label"] == items["decoded"]).sum())
        what = f"the class that was seen, one of {n_classes}, is named in {hits:,} of {n:,} trials"
    else:
        hits = int((items["worst_rank"] <= 1).sum())
        sizes = sorted(set(items["gallery_size"].astype(int)))
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        what = f"the seen image is first of {size} in {hits:,} of {n:,} {'case' if n == 1 else 'cases'}"
    share = f"{100 * row['value']:.0f} %"
    if row["ci_low"] is not None:
        share += f", 95 % interval {100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f} %"
    guessed = n * row["chance"]
    return (
        f"{start}, {what} ({share}); guessing: {guessed:,.0f}."
        if guessed >= 0.95
        else (f"{start}, {what} ({share}); guessing: {guessed:.1g}.")
    )


def _describe_signal(prepared: Prepared) -> str:
    """Return what was recorded and from how many channels or voxels, for example ``17-channel EEG``."""
    responses = prepared.responses
    if responses.coords.get("modality") == "spikes":
        return f"spike counts of {responses.data.shape[1]:,} neurons"
    kind = {"eeg": "EEG", "meg": "MEG", "fmri": "fMRI"}.get(str(responses.coords.get("modality", "")), "")
    if "channel" in responses.dims:
        return f"{responses.data.shape[responses.dims.index('channel')]:,}-channel {kind or 'recordings'}"
    if "voxel" in responses.dims:
        return f"{responses.data.shape[responses.dims.index('voxel')]:,} voxels of {kind or 'fMRI'}"
    return f"{kind} responses".strip()


def count_trials(prepared: Prepared) -> str:
    """Return the number of subjects, of trials kept and of those dropped, as far as the preparation noted it."""
    trials = prepared.responses.trials
    n_subjects, n = trials["subject"].nunique(), len(trials)
    n_test = len(np.unique(np.concatenate([fold.test for fold in prepared.folds])))
    meta = prepared.artifact.path / "responses" / "meta.json"
    noted = store.read_json(meta).get("provenance") if meta.is_file() else None
    noted = noted if isinstance(noted, dict) else {}
    # Each source names what it left out itself (n_targets_dropped, ...); epochs that were rejected are listed.
    counts = [v for key, v in noted.items() if key.endswith("_dropped") and isinstance(v, int)]
    listed = noted.get("dropped")
    if isinstance(listed, list) or counts:
        lost = f"{sum(counts) + len(listed if isinstance(listed, list) else ()):,} dropped"
    else:
        lost = "the data set does not say how many were dropped"
    who = f"{n_subjects} {'subject' if n_subjects == 1 else 'subjects'}"
    return f"{who}; {n:,} trials kept ({n_test:,} tested), {lost}."


def describe_images(
    config: RunConfig,
    prepared: Prepared,
    space: str,
    retrieved: Retrieved,
    images: Reconstructed,
    items: pd.DataFrame,
    *,
    captions: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Return protocol, ranks and gallery of a run that retrieves and reconstructs images.

    `captions` is the text of each row for some of the methods, or for ``seen``.
    """
    # One row per subject and image: a gallery of all repetitions would show each image many times.
    first = items.drop_duplicates(["subject", "stimulus_id"]).index.to_numpy()
    several = items["subject"].nunique() > 1
    names = [f"{i}, {s}" if several else str(i) for i, s in zip(images.ids, images.subjects, strict=True)]
    # The low-level branch has one image per trial, repeated beside the draws of the other.
    made = {
        name: stack[:, 0] if name == "low_level" and stack.ndim == 5 else stack
        for name, stack in images.images.items()
    }
    seen, rows = images.seen[first], {name: stack[first] for name, stack in arrange_rows(made).items()}
    compared = show_as_compared(seen, next(iter(rows.values()))) if rows else seen
    in_grey = (
        "The shown image, in grey and at the size of the decoded images, since the decoder learnt no colours."
    )
    gallery = (
        None
        if not made
        else GalleryContent(
            ids=[names[row] for row in first],
            concepts=[str(c) for c in images.concepts[first]],
            seen=compared,
            rows=rows,
            row_notes={} if compared is seen else {SEEN: in_grey},
            score=items["pixcorr"].to_numpy()[first],
            metric="pixcorr",
            metrics={
                str(name): items[name].to_numpy()[first]
                for name in items
                if name not in ("rank", "gallery_size") and items[name].dtype.kind == "f"
            },
            captions={name: [texts[row] for row in first] for name, texts in (captions or {}).items()},
            filter_by=["subject"] if several else [],
            details={
                "rank": items["rank"].iloc[first].tolist(),
                "subject": items["subject"].iloc[first].tolist(),
            },
        )
    )
    # A curve of ranks needs one chance level; folds with galleries of several sizes have none in common.
    sizes = {fold.retrieval.gallery_size for fold in retrieved.folds}
    ranks = np.concatenate([fold.retrieval.ranks for fold in retrieved.folds])
    caption = f"Gallery: {retrieved.gallery_protocol}."
    low_level, branch = {}, config.reconstruction.low_level
    if branch is not None:
        # Components of training images have a name of their own in each fold.
        fitted = branch.target.fitted_on_training_images
        target = branch.target.kind if fitted else branch.target.build().space
        low_level["Low-level branch"] = f"{branch.encoder.kind} to {target}; {branch.fusion.describe()}"
    if (text := config.reconstruction.text) is not None:
        low_level["Text branch"] = f"{text.encoder.kind} to {text.target.kind}"
    if stand_ins := config.reconstruction.describe_stand_ins():
        low_level["Without weights of a hub"] = stand_ins
    return {
        "protocol": {
            "Data set": config.dataset.kind,
            "Split": prepared.split.protocol,
            **({"Declared": prepared.declared_protocol} if prepared.declared_protocol else {}),
            "Repetitions": f"{config.repeats.train} in training, {config.repeats.test} in test",
            "Target": space,
            "Brain encoder": ", ".join(filter(None, [config.encoder.kind, name_objectives(config)])),
            "Prior": config.prior.kind,
            "Generator": config.generator.kind,
            **low_level,
            "Gallery": retrieved.gallery_protocol,
        },
        "ranks": RankContent(ranks, sizes.pop(), caption) if len(sizes) == 1 else None,
        "gallery": gallery,
    }


def describe_categories(config: RunConfig, prepared: Prepared, items: pd.DataFrame) -> dict[str, Any]:
    """Return protocol and tables of a run that decodes categories."""
    return {
        "protocol": {
            "Data set": config.dataset.kind,
            "Split": prepared.split.protocol,
            "Repetitions": "every trial separately",
            "Decoder": config.encoder.kind,
            "Null": "true labels permuted within each run, decisions kept",
        },
        "sections": [
            ExtraSection(
                "Confusions", "Share of the trials of each class.", table=tabulate_confusions(items)
            ),
            ExtraSection(
                "Held-out runs",
                "Each run was decoded by a decoder fitted on the other runs.",
                table=tabulate_runs(items),
            ),
        ],
    }


def describe_tried_encoders(run: Run) -> list[ExtraSection]:
    """Return a section on the encoders that the run, and each branch of its images, tried in inner folds."""
    branches = {f" ({name.replace('_', ' ')} branch)": one for name, one in open_branches(run).items()}
    every = {"": run, **branches}
    return [
        _describe_tried(one, words)
        for words, one in every.items()
        if isinstance(one.config.encoder, AutoConfig)
    ]


def describe_choice(run: Run) -> str:
    """Return which encoder ``auto`` chose, with the number of folds where they differ; empty for other encoders."""
    encoder = run.config.encoder
    if not isinstance(encoder, AutoConfig):
        return ""
    candidates: Any = encoder.candidates  # a word is replaced by its list on reading
    chosen = [int(store.read_json(fold.artifact.path / CHOICE)["chosen"]) for fold in train(run)]
    counts = Counter(describe_encoder(candidates[place].model_dump(mode="json")) for place in chosen)
    if len(counts) == 1:
        return f"auto chose {next(iter(counts))}"
    return "auto chose " + ", ".join(
        f"{name} in {n} of {len(chosen)} folds" for name, n in counts.most_common()
    )


def _describe_tried(run: Run, words: str) -> ExtraSection:
    rows, record = [], {}
    for number, fold in enumerate(train(run)):
        record = store.read_json(fold.artifact.path / CHOICE)
        for place, one in enumerate(record["candidates"]):
            settings = run.config.encoder.candidates[place].model_dump(mode="json")
            rows.append(
                {
                    "fold": number, "encoder": describe_encoder(settings), "inner score": one.get("mean"),
                    "ci_low": one.get("ci_low"), "ci_high": one.get("ci_high"), "behind the best": one.get("behind"),
                    "standard error": one.get("standard_error"), "seconds": one["seconds"],
                    "outcome": "chosen" if place == record["chosen"] else one["left_out"] or "not chosen",
                }
            )  # fmt: skip
    measured = (
        "share of trials whose class is decoded correctly (chance depends on the classes)"
        if run.config.decodes_categories
        else "two-way identification of the seen image (chance 0.5)"
    )
    budget = run.config.encoder.budget
    caption = (
        f"Each encoder was fitted in {record['n_folds']} inner folds of the training trials and scored on the "
        f"left-out trials: {measured}, with a 95 % interval that resamples {record['unit']}. The first encoder whose "
        "score is at most one standard error below the best was chosen and fitted on all training trials. "
        f"Budget: {'none' if budget is None else f'{budget:g} s'}. Test trials were not used."
    )
    return ExtraSection(f"Choice of the encoder{words}", caption, table=pd.DataFrame(rows))


def describe_ceilings(rows: list[dict[str, Any]] | None) -> list[ExtraSection]:
    """Return the section on noise ceilings of the responses; none where they were not computed."""
    if not rows:
        return []
    caption = (
        "Highest expected correlation, over the test images, between any prediction of a feature's "
        "response and the mean of its repetitions: the root of its signal share (the share of variance "
        "that is signal). Signal shares of all features are averaged unclipped before the root is taken, "
        "with a 95 % jackknife interval over images; a share below 0 is noise. The ceiling is a limit "
        "for brain correlation, not for retrieval or image scores."
    )
    return [ExtraSection("Noise ceiling of the responses", caption, table=pd.DataFrame(rows))]


def describe_imagined(prepared: Prepared) -> list[str]:
    """Return a warning if test trials imagine something without a picture, which no score of images counts."""
    # Starts with an empty array, for runs without folds of that kind.
    rows = np.concatenate([np.array([], int), *prepared.imagined])
    if not len(rows):
        return []
    n_stimuli = len(pd.unique(prepared.responses.stimulus_ids[rows]))
    return [
        f"{len(rows)} test trials are imagery of {n_stimuli} stimuli without a picture: retrieval and "
        "reconstruction leave them out. The analysis imagery identifies them."
    ]


def list_facts(prepared: Prepared, manifest: Manifest, *, simulated: bool = False) -> list[tuple[str, Any]]:
    """Return what a reader should know of the data, label by label."""
    responses = prepared.responses
    shape = " x ".join(f"{n} {dim}s" for n, dim in zip(responses.data.shape, responses.dims, strict=True))
    return [
        ("Modality", manifest.modality),
        ("Responses", shape),
        ("Unit", responses.unit),
        ("Images", len(prepared.stimuli)),
        ("Licence", "simulated, free of rights" if simulated else manifest.licence),
        ("Citation", f"simulated, in the format of: {manifest.citation}" if simulated else manifest.citation),
    ]
