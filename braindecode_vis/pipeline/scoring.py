"""The stage evaluate: scores retrieval and reconstructions, and describes the protocol.

`make_scoring_task` collects what is scored; values, intervals and p-values are made by `braindecode_vis.scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError, check_unique
from braindecode_vis.base.contracts import Dataset, GeneratorSettings, ImageEncoderSettings, PriorSettings
from braindecode_vis.base.devices import choose_device
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.base.stimuli import hash_pixels
from braindecode_vis.config import RunConfig
from braindecode_vis.datasets.manifests import read_ideal_observer
from braindecode_vis.embeddings.compositions import (
    CompositionConfig,
    CompositionTest,
    pick_tests,
    read_compositions,
)
from braindecode_vis.embeddings.image_descriptions import (
    Description,
    DescriptionsConfig,
    describe_captions,
    pick_descriptions,
    read_captions_or_attributes,
)
from braindecode_vis.embeddings.text import average_texts, make_unit
from braindecode_vis.pipeline import categories
from braindecode_vis.pipeline.decoding import (
    choose_gallery,
    list_gallery_sources,
    predict_for_generator,
    reconstruct,
    retrieve,
)
from braindecode_vis.pipeline.galleries import (
    GallerySource,
    TextSide,
    map_bank,
    order_by_gallery,
    rank_fold,
    split_by_gallery,
)
from braindecode_vis.pipeline.learning import pick_test_trials, predict_fold, predict_out_of_fold, train
from braindecode_vis.pipeline.preparing import (
    Prepared,
    describe_start,
    embed,
    name_classes,
    pick_trials,
    preprocess,
)
from braindecode_vis.pipeline.relabelling import describe_folding
from braindecode_vis.pipeline.runs import Run, publish_scores, remember
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.report.words import describe_objectives
from braindecode_vis.scoring.design_control import predict_from_design, tabulate_design
from braindecode_vis.scoring.metrics.metric_registry import register_metric
from braindecode_vis.scoring.retrieval import Retrieval, compute_similarity
from braindecode_vis.scoring.units import Units, find_units

if TYPE_CHECKING:
    from braindecode_vis.scoring.gallery_scores import LargeGalleryConfig
    from braindecode_vis.scoring.protocol_scores import CompositionSides
    from braindecode_vis.scoring.scoring_task import ScoringTask

MOST_HELD_OUT = 1000  # images, and trials of these, on which the weight of descriptions is chosen
N_PARTS = 5  # of their concepts, each described by what was learnt from the others


@remember
def evaluate(run: Run) -> list[dict[str, Any]]:
    """Score retrieval and reconstructions; write ``scores.json`` and ``scores.parquet`` into the run folder."""
    if run.config.decodes_categories:
        prepared = preprocess(run)
        return categories.evaluate_categories(run, name_classes(prepared), prepared.split, train(run))
    config, prepared, retrieved, images = run.config, preprocess(run), retrieve(run), reconstruct(run)
    ceilings = find_ceilings(config, prepared)
    fields = {"evaluation": config.evaluation.hashed_fields(), "seed": config.seed, "ceilings": ceilings}
    # Rows of earlier versions did not name them.
    fields |= {"objectives": name_objectives(config)} if name_objectives(config) else {}
    # Also where scores are read again: the report asks for the words of each metric.
    metrics = [register_metric(settings.build()) for settings in config.evaluation.metrics]
    check_unique(metrics, what="metrics of evaluation.metrics")

    def compute(folder: Path) -> None:
        from braindecode_vis.scoring.score_table import compute_scores

        task, unit_note = make_scoring_task(run)
        trials = prepared.responses.trials
        differences: list[dict[str, Any]] = []
        with run.listener.progress("scoring", task.n_steps) as advance:
            scores, items = compute_scores(task, advance=advance, differences=differences)
        lacking: list[str] = []
        if config.evaluation.protocols:
            found, lacking = _score_protocols(run, task.protocol, task.units)
            scores += found
        if config.evaluation.gallery is not None:
            scores += _score_large_gallery(run, config.evaluation.gallery, task)
        if config.evaluation.descriptions is not None:
            described, gains, why = _score_descriptions(run, config.evaluation.descriptions, task)
            lacking += why
            scores += described
            differences += gains
        further, why = _score_further(run, task, folder)
        lacking += why
        scores += further
        store.write_json(
            folder / "not_computed.json", [*task.not_computed, *lacking, *filter(None, [unit_note])]
        )
        store.write_json(folder / "scores.json", [score.as_row() for score in scores])
        store.write_json(folder / "differences.json", differences)
        store.write_json(folder / "design.json", tabulate_design(trials)[1] if task.design else [])
        if task.units is not None:  # what `compare` resamples
            items = items.assign(unit=task.units.unit, cluster=task.units.labels.astype(str))
        items.to_parquet(folder / "items.parquet", index=False)

    upstream = {"retrieve": retrieved.artifact.fingerprint}
    if images.images:
        upstream["reconstruct"] = images.artifact.fingerprint
    if (settings := config.evaluation.descriptions) is not None and settings.weight is None:
        parts = enumerate(predict_out_of_fold(run))
        upstream |= {f"out_of_fold{number}": part.artifact.fingerprint for number, part in parts}
    artifact = run.produce("evaluate", fields, upstream, compute)
    rows = publish_scores(run, artifact)
    run.seen["items"] = pd.read_parquet(artifact.path / "items.parquet")
    run.seen["not computed"] = store.read_json(artifact.path / "not_computed.json")
    for name in ("captions", "caption_sources", "response_ceilings"):
        path = artifact.path / f"{name}.json"
        run.seen[name] = store.read_json(path) if path.is_file() else None
    return rows


def _rank_design(run: Run) -> list[Retrieval]:
    """Return the ranks of the control ``design``, one retrieval per part of a gallery; none without such variables."""
    prepared, retrieved = preprocess(run), retrieve(run)
    trials = prepared.responses.trials
    design, variables = tabulate_design(trials)
    if not variables:
        return []
    # As responses, so that repetitions are averaged just as those of the brain are.
    known = Responses.from_checked(design, ("trial", "feature"), trials, "design", {})
    repeats, ranked = run.config.repeats, []
    for number, (fold, source) in enumerate(zip(prepared.folds, list_gallery_sources(run), strict=True)):
        train_part = pick_trials(known, fold.train, repeats.train)
        test_part = order_by_gallery(source.encoder, pick_trials(known, fold.test, repeats.test))
        own = retrieved.folds[number]
        subjects = train_part.trials["subject"].to_numpy(dtype=object)
        vectors = np.empty_like(own.predicted.vectors, dtype=np.float32)
        for subject, rows in source.list_rows(own.subjects):
            taught = (
                np.arange(len(subjects))
                if subject is None
                else np.flatnonzero(subjects.astype(str) == subject)
            )
            targets = source.map_targets(source.bank.select(source.train_ids), subject)
            shown = pd.Index(targets.ids).get_indexer(pd.Index(train_part.stimulus_ids[taught]))
            vectors[rows] = predict_from_design(
                train_part.as_matrix()[taught], shown, targets.vectors, test_part.as_matrix()[rows]
            )
        predicted = Embeddings(vectors, own.predicted.ids, own.predicted.space)
        found = rank_fold(
            source,
            predicted,
            own.subjects,
            list(own.retrieval.gallery_ids),
            protocol=retrieved.gallery_protocol,
        )
        ranked += [part.retrieval for part in split_by_gallery(source, predicted, own.subjects, found)]
    return ranked


def make_scoring_task(run: Run) -> tuple[ScoringTask, str]:
    """Return what is scored of a run that finds images, and a sentence where intervals could not resample groups."""
    from braindecode_vis.scoring.score_table import ScoringTask

    config, prepared, retrieved, images = run.config, preprocess(run), retrieve(run), reconstruct(run)
    parts = [part for fold in retrieved.folds for part in fold.parts]
    features, suite = (config.evaluation.features, config.evaluation.suite) if images.images else (None, None)
    units, unit_note = _find_run_units(run)
    task = ScoringTask(
        retrievals=[(p.queries, p.gallery, p.retrieval) for p in parts],
        seen=images.seen,
        images=images.images,
        ids=images.ids,
        concepts=images.concepts,
        subjects=images.subjects,
        decoded_concepts=images.decoded_concepts,
        feature_encoder=None if features is None else features.build(),
        feature_name="" if features is None else features.kind,
        protocol="; ".join(
            [
                describe_protocol(run, prepared, retrieved.gallery_protocol),
                # Rows with a size of their own name it.
                *(
                    [f"pixels at {images.size[0]} x {images.size[1]}"]
                    if images.seen.size != images.size
                    else []
                ),
            ]
        ),
        split="test",
        seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap,
        n_permutations=config.evaluation.n_permutations,
        ceilings=find_ceilings(config, prepared),
        suite=None if suite is None else suite.build(),
        best_of=config.evaluation.best_of,
        metrics=[register_metric(settings.build()) for settings in config.evaluation.metrics],
        conditions=_name_conditions(run, images.ids),
        units=units,
        folding=describe_folding(run, units),
        design=_rank_design(run),
        known_features=_find_known_features(run),
        size=images.size,
    )
    return task, unit_note


def _find_known_features(run: Run) -> dict[str, np.ndarray]:
    """Return what the embedding of the run holds of seen and copied images, by their pixels; see `ScoringTask`."""
    prepared, bank, features = preprocess(run), embed(run)[0].embeddings, run.config.evaluation.features
    if features is None or features != run.config.target:
        return {}
    row_of, images = {name: row for row, name in enumerate(bank.ids.tolist())}, reconstruct(run)
    shown = [rows for rows in (images.seen, *images.images.values()) if rows.source is prepared.stimuli]
    places = np.unique(np.concatenate([rows.index.ravel() for rows in shown])) if shown else ()
    ids = [name for name in prepared.stimuli.ids[places].tolist() if name in row_of]
    pictures = prepared.stimuli.iterate_images(ids)
    return {hash_pixels(image): bank.vectors[row_of[name]] for name, image in zip(ids, pictures, strict=True)}


def _score_further(run: Run, task: ScoringTask, folder: Path) -> tuple[list[Any], list[str]]:
    """Score captions and responses where that is asked for; say what lacks weights or repetitions."""
    config, scores, lacking = run.config.evaluation, [], []
    protocol, units = task.protocol, task.units
    prepared, images = preprocess(run), reconstruct(run)
    if config.captions is not None:
        from braindecode_vis.scoring.caption_scores import CaptionTask, score_caption_task

        # Captions are compared in the space that the generator takes, as the images were made from it.
        predicted, true, training = [], [], []
        for number, fold in enumerate(prepared.split.folds):
            queries, bank = predict_for_generator(run, number)
            predicted.append(queries)
            true.append(bank.select(list(queries.ids)))
            training.append(bank.select(list(pd.unique(prepared.responses.stimulus_ids[fold.train]))))
        captions = score_caption_task(
            CaptionTask(
                config.captions, predicted, true, training, images.ids, images.subjects,
                task.show_whole("seen"), {name: task.show_whole(name) for name in images.images}, protocol, "test",
                run.config.seed, config.n_bootstrap, config.n_permutations, units, images.captions,
            )
        )  # fmt: skip
        scores += captions.scores
        lacking += config.captions.not_computed
        store.write_json(folder / "captions.json", captions.texts)
        store.write_json(folder / "caption_sources.json", captions.sources)
    found, why = _score_target(run, task)
    scores += found
    lacking += why
    if config.brain is None and config.noise_ceiling is None:
        return scores, lacking
    from braindecode_vis.scoring import response_scores

    responses, folds = prepared.responses, prepared.split.folds
    ceilings: dict[str, Any] = {}
    if config.noise_ceiling is not None:
        tested = np.concatenate([fold.test for fold in folds])
        ceilings, why = response_scores.find_response_ceilings(
            responses, tested, measure=config.noise_ceiling, averaged=True, seed=run.config.seed
        )
        lacking += why
        store.write_json(folder / "response_ceilings.json", response_scores.tabulate_ceilings(ceilings))
    if config.brain is not None:
        # Test trials are averaged whatever the run does: one prediction is compared with one mean response.
        pairs = [
            (
                pick_trials(responses, fold.train, run.config.repeats.train),
                average_repetitions(responses, fold.test),
            )
            for fold in folds
        ]
        found, why = response_scores.score_brain(
            response_scores.BrainTask(
                config.brain, pairs, prepared.stimuli, images.ids, images.subjects,
                task.show_small("seen"), {name: task.show_small(name) for name in images.images}, ceilings, protocol,
                "test", run.config.seed, min(config.n_bootstrap, 1000), config.n_permutations, units,
            )
        )  # fmt: skip
        scores += found
        lacking += why
    return scores, lacking


def _score_target(run: Run, task: ScoringTask) -> tuple[list[Any], list[str]]:
    """Return the scores of each attribute that the tokens of the target answer for, if they do."""
    prepared, images = preprocess(run), reconstruct(run)
    table = roles.complete(ImageEncoderSettings, run.config.target).read_attributes()
    if table is None:
        return [], []
    from braindecode_vis.scoring.target_scores import TargetTask, score_target

    pairs = [predict_for_generator(run, number) for number in range(len(prepared.folds))]
    own = [bank.embeddings for bank in embed(run)]
    if any(
        predicted.space != bank.space or predicted.vectors.shape[1:] != bank.vectors.shape[1:]
        for (predicted, _), bank in zip(pairs, own, strict=True)
    ):
        return [], [
            f"scores of the parts of target.kind {run.config.target.kind} not computed: the encoder "
            "predicts in its own space; add an objective that predicts the target itself (mse)."
        ]
    stimuli = prepared.stimuli
    concept_of = stimuli.concept_of
    training = [pd.unique(prepared.responses.stimulus_ids[fold.train].astype(str)) for fold in prepared.folds]
    return score_target(
        TargetTask(
            table, [predicted for predicted, _ in pairs], own, training, images.ids, images.concepts, images.subjects,
            concept_of, task.protocol, "test", run.config.seed, run.config.evaluation.n_bootstrap,
            run.config.evaluation.n_permutations, task.units,
        )
    )  # fmt: skip


def _find_run_units(run: Run) -> tuple[Units | None, str]:
    """Return what the intervals of the run resample, if not images, and a sentence where groups could not be."""
    prepared, resample = preprocess(run), run.config.evaluation.resample
    rows = np.concatenate([fold.test for fold in prepared.folds])
    trials = prepared.responses.trials.iloc[rows]
    if resample == "image" or (resample == "auto" and "group" not in trials):
        return None, ""
    tables = [pick_test_trials(run, number).trials for number in range(len(prepared.folds))]
    return find_units(pd.concat(tables, ignore_index=True), trials, resample)


def _name_conditions(run: Run, ids: np.ndarray) -> np.ndarray | None:
    """Return the condition of each test row: the values of the chosen columns of the trial table."""
    columns = list(run.config.evaluation.conditions)
    if not columns:
        return None
    tables = [pick_test_trials(run, number).trials for number in range(len(preprocess(run).folds))]
    trials = pd.concat(tables, ignore_index=True)
    missing = [name for name in columns if name not in trials]
    if missing:
        raise ConfigError(
            f"evaluation.conditions names {missing[0]!r}, but the trials have the columns "
            f"{', '.join(trials.columns)}; averaging keeps only columns with equal values for all repetitions."
        )
    if len(trials) != len(ids):
        raise DataError("conditions and reconstructions list different test items; run both again.")
    return trials[columns].astype(str).agg(" ".join, axis=1).to_numpy(dtype=object)


def _score_protocols(run: Run, protocol: str, units: Units | None) -> tuple[list[Any], list[str]]:
    """Return the score rows of the further protocols that the configuration names, and what was not computed."""
    from braindecode_vis.scoring.metrics.protocols import make_concept_templates
    from braindecode_vis.scoring.protocol_scores import ProtocolTask, score_protocols

    config, prepared, retrieved = run.config, preprocess(run), retrieve(run)
    wanted, stimuli = config.evaluation.protocols, prepared.stimuli
    parts = [part for fold in retrieved.folds for part in fold.parts]
    ids = list(dict.fromkeys(str(i) for part in parts for i in part.gallery.ids))
    concept_of = stimuli.concept_of
    text = templates = None
    if "zero_shot_text" in wanted:
        from braindecode_vis.embeddings.text import embed_concepts

        # Names of tested concepts only: those of others would be candidates that nobody saw.
        texts = embed_concepts(config.text, config.target, stimuli)
        text = texts.select(sorted({concept_of[i] for i in ids}))
    if "concept_templates" in wanted:
        if len(parts) > 1:
            raise ConfigError(
                "the protocol concept_templates needs one fold and one gallery; use split.kind published."
            )
        source = GallerySource(
            train(run)[0].encoder,
            embed(run)[0].embeddings,
            list(pd.unique(prepared.responses.stimulus_ids[prepared.folds[0].train])),
            config.retrieval,
        )
        bank = source.fit_centre(None).apply(source.map_targets(source.bank, None))
        # A template is the mean of images of the concept that were not tested.
        others = bank.select([str(i) for i in bank.ids if str(i) not in set(ids)])
        tested = {i: concept_of[i] for i in ids}
        templates = make_concept_templates(others, [concept_of[str(i)] for i in others.ids], tested)
    compositions, lacking = list[Any](), list[str]()
    if config.evaluation.composition is not None:
        compositions, lacking = _make_compositions(run, config.evaluation.composition)
    task = ProtocolTask(
        retrievals=[(part.queries, part.gallery, part.retrieval) for part in parts],
        concepts=reconstruct(run).concepts,
        subjects=reconstruct(run).subjects,
        concept_of={i: concept_of[i] for i in ids},
        protocol=protocol,
        split="test",
        seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap,
        predicted=[fold.predicted for fold in retrieved.folds],
        text=text,
        templates=templates,
        compositions=compositions,
        device=choose_device(config.retrieval.device, setting="retrieval.device"),
        units=units,
        over_folds=len(retrieved.folds) > 1,
    )
    return score_protocols(task, wanted), lacking


def _make_compositions(run: Run, settings: CompositionConfig) -> tuple[list[CompositionSides], list[str]]:
    """Return what was seen and the same parts bound otherwise, beside the predictions, and what was not compared."""
    path = settings.file.expanduser()
    tests, made, lacking = read_compositions(path), list[Any](), list[str]()
    known = {test.name: describe_captions((test.caption,)) for test in tests if test.caption}
    for number, (source, fold) in enumerate(zip(list_gallery_sources(run), retrieve(run).folds, strict=True)):
        side = open_text_side(run, number, known, settings.encoder)
        sentences = _predict_sentences(run, number) if settings.encoder is None else None
        for (subject, _), part in zip(source.list_rows(fold.subjects), fold.parts, strict=True):
            picked = pick_tests(tests, [str(name) for name in part.gallery.ids], path=path)
            names, subjects = part.queries.ids.astype(str), fold.subjects[part.rows]
            # Of every trial of an image, where repetitions are not averaged.
            asked = [(row, test) for test in picked for row in np.flatnonzero(names == test.name).tolist()]
            images = side.show_images([str(name) for name in part.gallery.ids], subject)
            if images is not None and (shown := [(row, test) for row, test in asked if test.partner]):
                true, swapped = ([getattr(test, k) for _, test in shown] for k in ("name", "partner"))
                both = images.select(true), images.select(swapped)
                made.append(_compare_sides("images", shown, part.queries, both, subjects))
            if not (said := [(row, test) for row, test in asked if test.caption]):
                continue
            texts = [[getattr(test, k) for _, test in said] for k in ("caption", "swapped")]
            ids = [str(place) for place in range(len(said))]
            if sentences is not None:
                predicted, read = sentences
                own = predicted.take(part.rows)
                read_both = [Embeddings(read(one), ids, predicted.space) for one in texts]
                note = "; texts in the space of sentences by the encoder's head"
                made.append(_compare_sides("texts", said, own, read_both, subjects, note))
            elif settings.encoder is not None or not side.learns:
                asked_both = [[describe_captions((text,)) for text in one] for one in texts]
                placed = [side.make_gallery(ids, one, subject) for one in asked_both]
                note = f"; texts {side.describe()}"
                made.append(_compare_sides("texts", said, part.queries, placed, subjects, note))
            else:
                lacking = [
                    "composition of texts not computed: the target encodes no texts and the encoder "
                    "predicts no sentences; set evaluation.composition.encoder to minilm, or add the "
                    "objective composition."
                ]
    if not made:
        raise ConfigError(
            "; ".join(lacking)
            or f"{path} compares images, but the target contains no image information; add captions."
        )
    return made, lacking


def _compare_sides(
    label: str,
    asked: list[tuple[int, CompositionTest]],
    queries: Embeddings,
    both: Sequence[Embeddings],
    subjects: np.ndarray,
    note: str = "",
) -> CompositionSides:
    from braindecode_vis.scoring.protocol_scores import CompositionSides

    rows = np.array([row for row, _ in asked])
    return CompositionSides(
        label, queries.take(rows), both[0], both[1],
        np.array([test.kind for _, test in asked], dtype=object),
        np.array([test.pair for _, test in asked], dtype=object), subjects[rows], note,
    )  # fmt: skip


def _predict_sentences(run: Run, number: int) -> tuple[Embeddings, Callable[[list[str]], np.ndarray]] | None:
    """Return the predictions of a fold in the space of sentences and what reads texts into it; None without a head."""
    predicted = train(run)[number].encoder.predict_sentences(pick_test_trials(run, number))
    if predicted is None:
        return None
    from braindecode_vis.training.descriptions import make_sentence_encoder

    # Of all folds, which would load the network each.
    encoder = run.once("sentence_encoder", lambda: make_sentence_encoder(run.config.encoder, predicted.space))
    return predicted, lambda texts: make_unit(encoder.encode(texts))


def _score_large_gallery(run: Run, settings: LargeGalleryConfig, task: ScoringTask) -> list[Any]:
    """Return the scores of retrieval among the images of a bank."""
    from braindecode_vis.embeddings.image_bank import read_image_bank
    from braindecode_vis.scoring.gallery_scores import GalleryTask, check_bank_space, score_large_gallery

    bank, tasks, subjects = read_image_bank(settings.bank.expanduser()), [], []
    for source, fold in zip(list_gallery_sources(run), retrieve(run).folds, strict=True):
        check_bank_space(bank, source.bank.space, source.bank.vectors.shape[1:])
        for (subject, _), part in zip(source.list_rows(fold.subjects), fold.parts, strict=True):
            tasks.append(GalleryTask(part.queries, part.gallery, map_bank(source, bank, subject)))
            subjects.append(fold.subjects[part.rows])
    config = run.config
    return score_large_gallery(
        settings, tasks, np.concatenate(subjects), protocol=task.protocol, split="test", seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap, units=task.units,
        device=choose_device(config.retrieval.device, setting="retrieval.device"),
        over_folds=task.folding is not None,
    )  # fmt: skip


def find_clip_texts(run: Run) -> Callable[[Sequence[str]], np.ndarray] | None:
    """Return what embeds texts in the space of the targets by the text side of a CLIP network; None without one."""
    if run.config.decodes_categories:
        return None
    from braindecode_vis.embeddings.text import open_clip_texts

    text = open_clip_texts(run.config.text.tower or run.config.target, run.config.text.reading)
    if text is None:
        return None

    def embed_texts(texts: Sequence[str]) -> np.ndarray:
        space = embed(run)[0].embeddings.space
        if text.space != space:
            raise ConfigError(
                f"text.tower embeds into {text.space!r}, but the targets are in {space!r}; leave text.tower out."
            )
        return text.encode(list(texts))

    return embed_texts


def open_text_side(run: Run, number: int, known: Mapping[str, Description], encoder: Any) -> TextSide:
    """Return what brings descriptions into the galleries of a fold.

    Parameters
    ----------
    run, number
        The run, and the fold whose target it is.
    known
        Descriptions by image.
    encoder
        As in `DescriptionsConfig`.
    """
    source, images = list_gallery_sources(run)[number], embed(run)[number].encoder
    return TextSide(source, images, known, encoder, run.once("clip_texts", lambda: find_clip_texts(run)))


def check_texts(run: Run) -> None:
    """Refuse tables of texts that lack tested images, before anything is trained.

    Raises
    ------
    DataError
        As `pick_descriptions` and `pick_tests` do.
    """
    asked, composition = run.config.evaluation.descriptions, run.config.evaluation.composition
    if asked is None and composition is None:
        return
    prepared = preprocess(run)
    tested = [
        list(dict.fromkeys(str(name) for name in prepared.responses.stimulus_ids[fold.test]))
        for fold in prepared.folds
    ]
    if asked is not None:
        known = read_descriptions(run)
        for ids in tested:
            pick_descriptions(known, ids, path=asked.file, what="tested images")
    if composition is not None:
        path = composition.file.expanduser()
        tests = read_compositions(path)
        for ids in tested:
            pick_tests(tests, ids, path=path)


def read_descriptions(run: Run) -> dict[str, Description]:
    """Return the descriptions that the settings name, by image."""
    settings, stimuli = run.config.evaluation.descriptions, preprocess(run).stimuli
    assert settings is not None
    return read_captions_or_attributes(
        settings.file, stimuli.concept_of, attributes=settings.attributes is not None
    )


def _score_descriptions(
    run: Run, settings: DescriptionsConfig, task: ScoringTask
) -> tuple[list[Any], list[dict[str, Any]], list[str]]:
    """Return scores of retrieval by description, paired differences to that by images, and what was not computed."""
    from braindecode_vis.scoring.description_scores import DescriptionTask, score_descriptions

    known, tasks, subjects, weights, lacking = read_descriptions(run), [], [], [], []
    for number, (source, fold) in enumerate(zip(list_gallery_sources(run), retrieve(run).folds, strict=True)):
        side = open_text_side(run, number, known, settings.encoder)
        weight, why = _choose_weight(run, number, side, settings)
        head = _predict_sentences(run, number)
        weights.append(weight)
        lacking += [why] if why and why not in lacking else []
        for (subject, _), part in zip(source.list_rows(fold.subjects), fold.parts, strict=True):
            ids = [str(name) for name in part.gallery.ids]
            asked = pick_descriptions(known, ids, path=settings.file, what="tested images")
            texts, images = side.make_gallery(ids, asked, subject), side.show_images(ids, subject)
            sentences = None
            if head is not None:
                predicted, read = head
                own = predicted.take(part.rows)
                said = make_unit(average_texts([one.texts for one in asked], read))
                sentences = own, Embeddings(said, texts.ids, predicted.space)
            tasks.append(DescriptionTask(part.queries, texts, images, part.gallery, weight, sentences))
            subjects.append(fold.subjects[part.rows])
    ids = list(dict.fromkeys(str(name) for one in tasks for name in one.texts.ids))
    n_shared = len(ids) - len({known[name] for name in ids})
    chosen = [f"{weight:g}" for weight in weights if weight is not None]
    words = (
        f"{task.protocol}; {'captions' if settings.captions else 'attributes'} as candidates {side.describe()}"
        + (f", {n_shared} of {len(ids)} images are described as another one is" if n_shared else "")
    )
    if chosen:
        how = "chosen on training images that were held out" if settings.weight is None else "as given"
        words += f"; weight of texts {', '.join(dict.fromkeys(chosen))}, {how}"
    config = run.config
    scores, differences = score_descriptions(
        tasks, np.concatenate(subjects), protocol=words, split="test", seed=config.seed,
        n_bootstrap=config.evaluation.n_bootstrap, units=task.units, over_folds=task.folding is not None,
    )  # fmt: skip
    return scores, differences, lacking


def _choose_weight(
    run: Run, number: int, side: TextSide, settings: DescriptionsConfig
) -> tuple[float | None, str]:
    """Return the weight of texts beside images, or None and a sentence where nothing was held out to choose it on."""
    from braindecode_vis.scoring import description_scores

    if settings.weight is not None:
        return settings.weight, ""
    source, held = side.source, predict_fold(run, number).predicted
    taught = set(side.taught)
    ids = [name for name in dict.fromkeys(held.ids.astype(str)) if name in taught]
    images = side.show_images(ids[:1], None) if ids else None
    if ids and images is None:
        return None, ""  # without images there is nothing to weigh
    if len(ids) < description_scores.FEWEST_HELD_OUT:
        return None, (
            f"the weight of descriptions was not chosen: {len(ids)} described training images were held "
            "out, but 10 are needed; set encoder.selection.hold_out or encoder.out_of_fold, or give "
            "evaluation.descriptions.weight."
        )
    chance = make_generator(run.config.seed, "description_weight", number)
    if len(ids) > MOST_HELD_OUT:
        ids = [ids[n] for n in np.sort(chance.permutation(len(ids))[:MOST_HELD_OUT])]
    rows = np.flatnonzero(np.isin(held.ids.astype(str), ids))
    rows = rows if len(rows) <= MOST_HELD_OUT else np.sort(chance.permutation(rows)[:MOST_HELD_OUT])
    queries = Embeddings(np.asarray(held.vectors)[rows], held.ids[rows].astype(str), held.space)
    if held.space == source.bank.space:
        queries = source.map_targets(queries, None)
    queries = source.fit_centre(None).apply(queries)
    texts = _describe_held_out(run, side, ids)
    images = side.show_images(ids, None)
    assert images is not None
    truth = pd.Index(ids).get_indexer(pd.Index(queries.ids))
    seen, said = compute_similarity(queries, images), compute_similarity(queries, texts)
    return description_scores.choose_weight(seen, said, truth), ""


def _describe_held_out(run: Run, side: TextSide, ids: list[str]) -> Embeddings:
    """Return descriptions of training images as candidates, read by what was not learnt from their concepts."""
    asked = [side.known[name] for name in ids]
    if not side.learns:
        return side.make_gallery(ids, asked, None)
    concepts = preprocess(run).stimuli.concepts_of(side.taught).astype(str)
    concept_of = dict(zip(side.taught, concepts, strict=True))
    groups = np.array([concept_of[name] for name in ids])
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    space = ""
    for fold in range(N_PARTS):
        names = sorted(set(groups.tolist()))[fold::N_PARTS]
        rows = np.flatnonzero(np.isin(groups, names))
        if len(rows):
            without = [name for name in side.taught if concept_of[name] in set(names)]
            made = side.make_gallery([ids[r] for r in rows], [asked[r] for r in rows], None, without)
            parts.append((rows, np.asarray(made.vectors)))
            space = made.space
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return Embeddings(np.concatenate([vectors for _, vectors in parts])[order], ids, space)


def find_phantom(config: RunConfig) -> Path | None:
    """Return the root of the data set if it is a phantom with its truth beside it."""
    return roles.complete(Dataset, config.dataset).find_phantom()


def find_ceilings(config: RunConfig, prepared: Prepared) -> dict[str, float]:
    """Return the scores of an ideal observer, where the data set is a phantom with its truth beside it."""
    root = find_phantom(config)
    if root is None or not config.split.is_declared:
        return {}
    # The truth knows the ceiling of each subject, not that of all subjects together.
    if prepared.responses.trials["subject"].nunique() > 1:
        return {}
    test = prepared.responses.trials.iloc[prepared.folds[0].test]
    averaged = config.repeats.test == "averaged"
    # The least repeated image: an ideal observer of more repetitions would be a ceiling that none can reach.
    n_repetitions = int(test.groupby(["subject", "stimulus_id"]).size().min()) if averaged else 1
    ideal = read_ideal_observer(root, n_repetitions)
    return {} if ideal is None else {"top1": ideal}


def describe_choices(config: RunConfig) -> list[str]:
    """Return what makes the images of a run those of another protocol than one draw of one branch."""
    low = config.reconstruction.low_level
    words = [
        *roles.complete(PriorSettings, config.prior).describe_choices(),
        *roles.complete(GeneratorSettings, config.generator).describe_choices(),
    ]
    if low is not None:
        words.append(f"images fused with {low.target.kind} by {low.encoder.kind} ({low.fusion.describe()})")
    if config.reconstruction.prompt is not None:
        words.append(f"images led by decoded captions ({config.reconstruction.prompt})")
    if stand_ins := config.reconstruction.describe_stand_ins():
        words.append(stand_ins)
    if (text := config.reconstruction.text) is not None:
        words.append(f"led by {text.target.kind} by {text.encoder.kind} too")
    if config.synthetic is not None:
        words.append(config.synthetic.describe())
    return words


def describe_gallery(run: Run) -> str:
    """Return the gallery of a run in words, without ranking anything."""
    return choose_gallery(run)[1]


def name_objectives(config: RunConfig) -> str:
    """Return kinds and weights of what the encoder of a run learns; see `describe_objectives`."""
    return describe_objectives(config.encoder.model_dump(mode="json"))


def describe_protocol(run: Run, prepared: Prepared, gallery: str) -> str:
    """Return data set, split, averaging, gallery and objectives in one line."""
    config = run.config
    return "; ".join(
        [
            config.dataset.kind,
            *filter(None, [prepared.declared_protocol]),
            prepared.split.protocol,
            f"repetitions {config.repeats.train} in train, {config.repeats.test} in test",
            f"target {config.target.kind}",
            f"gallery of {gallery}",
            {
                "none": "cosine",
                "mean": "cosine after the training mean",
                "zscore": "cosine of training z-scores",
            }[config.retrieval.centre],
            *filter(None, [describe_start(run), name_objectives(config)]),
            *describe_choices(config),
        ]
    )
