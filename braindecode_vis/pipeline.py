"""The sentence, one function per stage, in order.

    preprocess -> embed -> train -> retrieve -> reconstruct -> evaluate -> report

Owns the order of the stages, what each of them reads and writes in the run folder, and which settings enter its
fingerprint. Each function asks for what it needs from the stage before, which is reused when nothing it
depends on changed. Knows roles and nouns, never a particular encoder or data set.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis import categories, store
from braindecode_vis.arrays import Embeddings, Responses
from braindecode_vis.checks import ConfigError, DataError
from braindecode_vis.config import RunConfig
from braindecode_vis.datasets.manifests import read_manifest
from braindecode_vis.galleries import GallerySource, order_by_gallery, rank_fold, split_by_gallery
from braindecode_vis.phantom.assemble.truth import read_truth
from braindecode_vis.preprocessing.repeats import average_repetitions, pick_rows
from braindecode_vis.preprocessing.selection import Selection, fit_selection
from braindecode_vis.preprocessing.splits import Split
from braindecode_vis.retrieval import Retrieval, read_retrieval, write_retrieval
from braindecode_vis.runs import Run, keep_config, publish_scores, read_scores
from braindecode_vis.seeds import derive_seed, make_generator
from braindecode_vis.stages import Prepared, Reconstructed, Retrieved, RetrievedFold, TargetBank, TrainedFold
from braindecode_vis.stimuli import StimulusSet

#: Data sets of raw BOLD runs, whose single-trial responses are estimated here; the others publish betas.
BOLD_KINDS = ("bids_fmri", "bold5000", "haxby_slices", "nod", "nsd_timeseries")
STAGES = ("preprocess", "embed", "train", "retrieve", "reconstruct", "evaluate", "report")

# --- preprocess -------------------------------------------------------------------------------------------


def preprocess(run: Run) -> Prepared:
    """Read the recording and its images, and fix the split."""
    return run.once("preprocess", lambda: _preprocess(run))


def _preprocess(run: Run) -> Prepared:
    config = run.config
    fields = {
        "dataset": config.dataset.hashed_fields(),
        "split": config.split.hashed_fields(),
        "inputs": config.dataset.hash_inputs(),
        "seed": config.seed,
    }

    def compute(folder: Path) -> dict[str, Any]:
        write_dataset(run, folder)
        responses, stimuli = _read_prepared(folder)
        concepts = stimuli.concepts_of(responses.stimulus_ids)
        split = config.split.make(responses.trials, concepts, seed=config.seed)
        store.write_json(folder / "split.json", split.as_json())
        return {"inputs": fields["inputs"], "protocol": split.protocol}

    artifact = run.produce("preprocess", fields, {}, compute)
    keep_config(run)
    responses, stimuli = _read_prepared(artifact.path)
    concepts = stimuli.concepts_of(responses.stimulus_ids)
    split = Split.from_json(store.read_json(artifact.path / "split.json"), responses.trials, concepts)
    return Prepared(artifact, responses, stimuli, split)


def write_dataset(run: Run, folder: Path) -> None:
    """Let a small data set write itself, and stream a large one through the preprocessing of its modality."""
    dataset: Any = run.config.dataset
    seed = derive_seed(run.config.seed, "dataset")
    if hasattr(dataset, "write"):
        dataset.write(folder, seed=seed)
        return
    with run.listener.progress("reading trials", None) as advance:
        _find_writer(dataset.kind)(dataset, folder, seed=seed, advance=advance)


def _find_writer(kind: str) -> Callable[..., Any]:
    """Return the function that streams a data set of this kind."""
    if read_manifest(kind).modality in ("eeg", "meg"):
        from braindecode_vis.preprocessing.meeg import write_meeg

        return write_meeg
    if kind in BOLD_KINDS:
        from braindecode_vis.preprocessing.bold import write_bold

        return write_bold
    from braindecode_vis.preprocessing.betas import write_fmri

    return write_fmri


def _read_prepared(folder: Path) -> tuple[Responses, StimulusSet]:
    return store.read_responses(folder / "responses"), store.read_stimuli(folder / "stimuli")


# --- embed ------------------------------------------------------------------------------------------------


def embed(run: Run) -> list[TargetBank]:
    """Encode every image; encoders that are fitted see the training images of their fold only."""
    return run.once("embed", lambda: _embed(run))


def _embed(run: Run) -> list[TargetBank]:
    _refuse_categories(run, "embed")
    prepared = preprocess(run)
    folds = prepared.folds
    if not run.config.target.fitted_on_training_images:
        return [_embed_fold(run, prepared, None)] * len(folds)
    return [_embed_fold(run, prepared, number) for number in range(len(folds))]


def _embed_fold(run: Run, prepared: Prepared, number: int | None) -> TargetBank:
    config, stimuli = run.config.target, prepared.stimuli.select_pictured()
    fields = {"target": config.hashed_fields(), "fold": number}

    def compute(folder: Path) -> None:
        from braindecode_vis.embeddings.extract import embed_stimuli, find_cache_folder

        encoder: Any = config.build()
        if config.kind == "layers":
            fold = prepared.folds[number or 0]
            ids = pd.unique(prepared.responses.stimulus_ids[fold.train])
            cache = find_cache_folder()
            bank = encoder.embed(
                stimuli, list(ids), lambda member: embed_stimuli(member, stimuli, cache=cache)
            )
        elif config.kind not in ("pixels", "pca"):
            with run.listener.progress("encoding images", len(stimuli)) as advance:
                bank = embed_stimuli(encoder, stimuli, cache=find_cache_folder(), advance=advance)
        else:
            fold = prepared.folds[number or 0]
            ids = pd.unique(prepared.responses.stimulus_ids[fold.train])
            encoder.fit(stimuli.iterate_images(ids))
            bank = Embeddings(encoder.encode(stimuli.iterate_images()), stimuli.ids, encoder.space)
        encoder.write(folder)
        store.write_embeddings(folder, bank)

    upstream = {"preprocess": prepared.artifact.fingerprint}
    artifact = run.produce("embed", fields, upstream, compute, _name_fold(number))
    return TargetBank(artifact, config.read(artifact.path), store.read_embeddings(artifact.path))


def _refuse_categories(run: Run, verb: str) -> None:
    if run.config.decodes_categories:
        raise ConfigError(
            f"{verb} needs to know which image was seen, but the encoder {run.config.encoder.kind} decodes categories; "
            "use train, evaluate and report, or another encoder.kind."
        )


def _name_fold(number: int | None) -> str:
    return "" if number is None else f"fold{number:02d}"


# --- train ------------------------------------------------------------------------------------------------


def train(run: Run) -> list[Any]:
    """Fit the brain encoder, or the category decoder, of every fold on its training trials."""
    return run.once("train", lambda: _train(run))


def _train(run: Run) -> list[Any]:
    prepared = preprocess(run)
    if run.config.decodes_categories:
        return categories.train_categories(
            run, prepared.responses, prepared.split, prepared.artifact.fingerprint
        )
    return [_train_fold(run, number) for number in range(len(prepared.folds))]


def _train_fold(run: Run, number: int) -> TrainedFold:
    config, prepared, bank = run.config, preprocess(run), embed(run)[number]
    fields = {
        "encoder": config.encoder.hashed_fields(),
        "selection": config.selection.hashed_fields(),
        **({"text": config.text.hashed_fields()} if "text" in getattr(config.encoder, "needs", ()) else {}),
        "repeats": config.repeats.train,
        "seed": config.seed,
        "fold": number,
    }
    upstream = {"preprocess": prepared.artifact.fingerprint, "embed": bank.artifact.fingerprint}

    def compute(folder: Path) -> dict[str, Any]:
        rows = prepared.folds[number].train
        selection = _fit_selection(run, prepared, bank, rows)
        responses = pick_labelled_trials(prepared, rows, config.repeats.train)
        if selection is not None:
            selection.write(folder / "selection")
            responses = selection.apply(responses)
        targets = bank.embeddings.select(list(responses.stimulus_ids))
        encoder: Any = config.encoder.build(seed=derive_seed(config.seed, "train", number))
        if hasattr(encoder, "images"):
            encoder.images = prepared.stimuli
        if "text" in getattr(config.encoder, "needs", ()):
            encoder.text_targets = _embed_concepts(run, prepared)
        with lend_workspace(run, encoder, f"train{number:02d}", [fields, upstream]):
            encoder.fit(responses, targets)
            encoder.write(folder)
            store.write_embeddings(folder / "out_of_fold", encoder.predict_out_of_fold(responses, targets))
        return {"n_trials": responses.n_trials}

    artifact = run.produce("train", fields, upstream, compute, _name_fold(number))
    selection = None if config.selection.is_empty else Selection.read(artifact.path / "selection")
    encoder: Any = config.encoder.read(artifact.path)
    if hasattr(encoder, "images"):
        encoder.images = prepared.stimuli
    out_of_fold = store.read_embeddings(artifact.path / "out_of_fold")
    return TrainedFold(artifact, encoder, out_of_fold, selection)


def _embed_concepts(run: Run, prepared: Prepared) -> Embeddings:
    """Return a text embedding for every image, from the name of its concept."""
    from braindecode_vis.embeddings.concepts import embed_concepts, spread_over_images

    def embed_all() -> Embeddings:
        texts = embed_concepts(run.config.text, run.config.target, prepared.stimuli)
        return spread_over_images(texts, prepared.stimuli)

    return run.once("texts", embed_all)


def _fit_selection(run: Run, prepared: Prepared, bank: TargetBank, rows: np.ndarray) -> Selection | None:
    """Choose columns on single training trials, since their repetitions are what reliability is measured by."""
    config = run.config.selection
    if config.is_empty:
        return None
    responses = prepared.responses.select(rows)
    targets = None
    if config.encoding is not None:
        targets = bank.embeddings.select(list(pd.unique(responses.stimulus_ids)))
    return fit_selection(config, responses, targets, seed=derive_seed(run.config.seed, "selection"))


@contextmanager
def lend_workspace(run: Run, component: Any, name: str, asked: Any) -> Iterator[None]:
    """Give a component that learns for long a folder for its checkpoints, which outlives a killed run.

    Parameters
    ----------
    run
        Its folder holds the workspace until the component is done.
    component
        Anything; only what has an attribute `workspace` is given one.
    name
        First part of the folder's name, for readers.
    asked
        What decides the result, so that other settings start in another folder.
    """
    if not hasattr(component, "workspace"):
        yield
        return
    folder = run.folder.path / "work" / f"{name}-{store.hash_json(store.json_plain(asked))[:12]}"
    component.workspace = folder
    with run.listener.watch(f"{name}:") as show:
        if hasattr(component, "progress"):
            component.progress = show
        yield
    shutil.rmtree(folder, ignore_errors=True)


def pick_trials(responses: Responses, rows: np.ndarray, repeats: str) -> Responses:
    """Return the given trials, their repetitions averaged if `repeats` is ``averaged``."""
    return average_repetitions(responses, rows) if repeats == "averaged" else pick_rows(responses, rows)


def pick_labelled_trials(prepared: Prepared, rows: np.ndarray, repeats: str) -> Responses:
    """Return the given trials with the concept of each in the trial table; see `pick_trials`."""
    responses = pick_trials(prepared.responses, rows, repeats)
    concepts = prepared.stimuli.concepts_of(responses.stimulus_ids)
    return responses.with_trials(responses.trials.assign(concept=concepts))


def pick_test_trials(run: Run, number: int) -> Responses:
    """Return the test trials of one fold as its encoder takes them."""
    prepared, selection = preprocess(run), train(run)[number].selection
    responses = pick_labelled_trials(prepared, prepared.folds[number].test, run.config.repeats.test)
    responses = order_by_gallery(train(run)[number].encoder, responses)
    return responses if selection is None else selection.apply(responses)


# --- retrieve ---------------------------------------------------------------------------------------------


def retrieve(run: Run) -> Retrieved:
    """Open the test trials: predict their embeddings and rank the true images in the gallery."""
    return run.once("retrieve", lambda: _retrieve(run))


def _retrieve(run: Run) -> Retrieved:
    _refuse_categories(run, "retrieve")
    if (number := find_untested(run)) is not None:
        raise DataError(
            f"all {len(preprocess(run).imagined[number])} test trials of fold {number} imagine something without a "
            "picture, so there is no image to retrieve; use analyze --analysis imagery, or test what was seen too "
            "(dataset.test)."
        )
    config, prepared, banks, trained = run.config, preprocess(run), embed(run), train(run)
    fields = {"retrieval": config.retrieval.hashed_fields(), "repeats": config.repeats.test}
    upstream = {f"train{n}": fold.artifact.fingerprint for n, fold in enumerate(trained)}
    whole, protocol = _choose_gallery(config, prepared, banks)

    sources = [
        GallerySource(
            fitted.encoder,
            bank.embeddings,
            list(pd.unique(prepared.responses.stimulus_ids[fold.train])),
            config.retrieval,
        )
        for fold, bank, fitted in zip(prepared.folds, banks, trained, strict=True)
    ]

    def compute(folder: Path) -> dict[str, Any]:
        ranks = []
        for number, source in enumerate(sources):
            responses = pick_test_trials(run, number)
            predicted = source.encoder.predict(responses)
            subjects = responses.trials["subject"].to_numpy(dtype=object)
            ids = whole if whole is not None else list(pd.unique(predicted.ids))
            ranked = rank_fold(source, predicted, subjects, ids, protocol=protocol)
            store.write_embeddings(folder / _name_fold(number), predicted)
            write_retrieval(folder / _name_fold(number), ranked)
            ranks.append(_tabulate_ranks(ranked, subjects, number))
        pd.concat(ranks, ignore_index=True).to_parquet(folder / "ranks.parquet", index=False)
        return {"gallery": protocol}

    artifact = run.produce("retrieve", fields, upstream, compute)
    table = pd.read_parquet(artifact.path / "ranks.parquet")
    folds = []
    for number, source in enumerate(sources):
        subjects = table.loc[table["fold"] == number, "subject"].to_numpy(dtype=object)
        ranked = read_retrieval(artifact.path / _name_fold(number))
        predicted = store.read_embeddings(artifact.path / _name_fold(number))
        parts = split_by_gallery(source, predicted, subjects, ranked)
        folds.append(RetrievedFold(predicted, parts, ranked, subjects))
    return Retrieved(artifact, folds, protocol)


def find_untested(run: Run) -> int | None:
    """Return the first fold that tests nothing but what was imagined without a picture; None without such a fold."""
    if run.config.decodes_categories:
        return None
    return next((n for n, fold in enumerate(preprocess(run).folds) if not len(fold.test)), None)


def _choose_gallery(
    config: RunConfig, prepared: Prepared, banks: list[TargetBank]
) -> tuple[list[str] | None, str]:
    """Return the ids of the common gallery, or None for one gallery per fold, and words for it."""
    folds = prepared.folds
    ids = prepared.responses.stimulus_ids
    shared = len({bank.embeddings.space for bank in banks}) == 1
    if config.retrieval.gallery == "all" and not shared:
        raise DataError(
            f"retrieval.gallery is all, but the target {config.target.kind} has another space in every fold; "
            "set retrieval.gallery to fold."
        )
    if config.retrieval.gallery == "fold" or not shared or len(folds) == 1:
        sizes = sorted({len(pd.unique(ids[fold.test])) for fold in folds})
        size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return None, f"{size} exact test images" + (" of the fold" if len(folds) > 1 else "")
    whole = list(pd.unique(np.concatenate([ids[fold.test] for fold in folds])))
    return whole, f"{len(whole)} exact images of all folds"


def _tabulate_ranks(retrieval: Retrieval, subjects: np.ndarray, fold: int) -> pd.DataFrame:
    names = np.asarray(retrieval.gallery_ids, dtype=object)
    return pd.DataFrame(
        {
            "stimulus_id": retrieval.query_ids,
            "subject": subjects,
            "fold": fold,
            "rank": retrieval.ranks,
            "worst_rank": retrieval.worst_ranks,
            "gallery_size": retrieval.gallery_size,
            "similarity": retrieval.true_similarities,
            "top_ids": [list(names[row]) for row in retrieval.top_indices],
        }
    )


# --- reconstruct ------------------------------------------------------------------------------------------


def reconstruct(run: Run) -> Reconstructed:
    """Turn the predictions into images, with every control beside them."""
    return run.once("reconstruct", lambda: _reconstruct(run))


def _reconstruct(run: Run) -> Reconstructed:
    _refuse_categories(run, "reconstruct")
    config, prepared, banks = run.config, preprocess(run), embed(run)
    trained, retrieved = train(run), retrieve(run)
    fields = {
        "prior": config.prior.hashed_fields(),
        "generator": config.generator.hashed_fields(),
        "reconstruction": config.reconstruction.hashed_fields(),
        "seed": config.seed,
    }

    def compute(folder: Path) -> dict[str, Any]:
        from braindecode_vis.generators.material import TrainingMaterial
        from braindecode_vis.reconstruction import derange, reconstruct_fold

        parts = []
        with run.listener.progress("reconstructing", len(banks)) as advance:
            for number, (fold, bank) in enumerate(zip(prepared.folds, banks, strict=True)):
                train_ids = pd.unique(prepared.responses.stimulus_ids[fold.train])
                predicted, embeddings = _meet_generator(run, number)
                material = TrainingMaterial(
                    bank.encoder,
                    embeddings.select(train_ids),
                    prepared.stimuli.select(train_ids),
                    trained[number].out_of_fold,
                    _measure_noise(run, number),
                )
                prior: Any = config.prior.build(seed=derive_seed(config.seed, "fit prior", number))
                asked = [fields["prior"], trained[number].artifact.fingerprint]
                with lend_workspace(run, prior, f"prior{number:02d}", asked):
                    part = reconstruct_fold(
                        config, material, prepared.stimuli, predicted, embeddings,
                        retrieved.folds[number].subjects, number, prior=prior, low=_make_low_level(run, number),
                    )  # fmt: skip
                parts.append(part)
                advance(1)
        rows = pd.concat([part.rows for part in parts], ignore_index=True)
        # A class shown only in the test part of one fold has no mean there; a control is scored on all items or none.
        methods = [name for name in parts[0].images if all(name in part.images for part in parts)]
        if "class_mean" not in methods:
            rows = rows.drop(columns="decoded_concept", errors="ignore")
        rows.to_parquet(folder / "rows.parquet", index=False)
        images = {name: np.concatenate([part.images[name] for part in parts]) for name in methods}
        # Over all folds: a fold may hold one image only, which has no other to be swapped with.
        order = derange(rows["stimulus_id"].to_numpy(dtype=object), make_generator(config.seed, "shuffled"))
        images["shuffled"] = images["decoded"][order]
        for name, stack in images.items():
            np.save(folder / f"{name}.npy", stack, allow_pickle=False)
        return {"methods": list(images), "chosen": [part.chosen for part in parts]}

    artifact = run.produce("reconstruct", fields, {"retrieve": retrieved.artifact.fingerprint}, compute)
    rows = pd.read_parquet(artifact.path / "rows.parquet")
    methods = store.read_json(artifact.path / store.PROVENANCE)["methods"]
    images = {name: np.load(artifact.path / f"{name}.npy", mmap_mode="r") for name in methods}
    return Reconstructed(
        artifact=artifact,
        ids=rows["stimulus_id"].to_numpy(dtype=object),
        concepts=rows["concept"].to_numpy(dtype=object),
        subjects=rows["subject"].to_numpy(dtype=object),
        seen=images.pop("seen"),
        images=images,
        decoded_concepts=rows["decoded_concept"].to_numpy(dtype=object)
        if "decoded_concept" in rows
        else None,
    )


def _measure_noise(run: Run, number: int) -> Any:
    """Return the noise of single repetitions of a fold's training images, where the generator asks for it."""
    if not getattr(run.config.generator, "weighs_predictions", False):
        return None
    from braindecode_vis.reconstruction import measure_repetition_noise

    prepared, fitted = preprocess(run), train(run)[number]
    fold, repeats = prepared.split.folds[number], run.config.repeats
    trials = pick_labelled_trials(prepared, fold.train, "single")
    if fitted.selection is not None:
        trials = fitted.selection.apply(trials)
    counts = {
        part: _count_repetitions(prepared.responses.trials.iloc[rows], getattr(repeats, part))
        for part, rows in (("train", fold.train), ("test", fold.test))
    }
    predict = getattr(fitted.encoder, "predict_targets", fitted.encoder.predict)
    return measure_repetition_noise(predict, trials, n_train=counts["train"], n_test=counts["test"])


def _count_repetitions(trials: pd.DataFrame, repeats: str) -> float:
    """Return the harmonic mean of how many repetitions are averaged."""
    if repeats != "averaged":
        return 1.0
    sizes = trials.groupby(["subject", "stimulus_id"]).size().to_numpy()
    return float(len(sizes) / (1 / sizes).sum())


def _make_low_level(run: Run, number: int) -> np.ndarray | None:
    """Return the images of the low-level branch for the test trials of one fold; None without such a branch.

    The branch is a run of its own over the same trials: another target, another encoder, its latents decoded.
    """
    branch = run.config.reconstruction.low_level
    if branch is None:
        return None
    from braindecode_vis.generators.latents import LatentsConfig
    from braindecode_vis.generators.material import TrainingMaterial

    changes = {
        "target": branch.target,
        "encoder": branch.encoder,
        "reconstruction": type(run.config.reconstruction)(),
    }
    low = run.once("low level", lambda: Run(run.config.model_copy(update=changes), run.folder, run.listener))
    prepared, bank, fold = preprocess(low), embed(low)[number], train(low)[number]
    ids = pd.unique(prepared.responses.stimulus_ids[prepared.folds[number].train])
    material = TrainingMaterial(
        bank.encoder, bank.embeddings.select(ids), prepared.stimuli.select(ids), fold.out_of_fold
    )
    generator = LatentsConfig().build(material)
    predicted, _ = _meet_generator(low, number)
    return generator.generate(predicted, seed=derive_seed(low.config.seed, "low level"))


def _meet_generator(run: Run, number: int) -> tuple[Embeddings, Embeddings]:
    """Return predictions of the test trials, and embeddings of all images, in the space that the generator takes.

    That is the target's space. An encoder that compares in a space it has learnt, and has no second head, cannot go
    back there; copying the nearest training image then works in the learnt space.
    """
    encoder, bank = train(run)[number].encoder, embed(run)[number].embeddings
    if not hasattr(encoder, "predict_targets"):
        return retrieve(run).folds[number].predicted, bank
    one_way = encoder.comparison_space != bank.space and "regression" not in encoder.config.needs
    if one_way and run.config.generator.kind == "nearest":
        return retrieve(run).folds[number].predicted, encoder.map_targets(bank)
    return encoder.predict_targets(pick_test_trials(run, number)), encoder.settle_targets(bank)


# --- evaluate ---------------------------------------------------------------------------------------------


def evaluate(run: Run) -> list[dict[str, Any]]:
    """Score retrieval and reconstructions; write ``scores.json`` and ``scores.parquet`` into the run folder."""
    return run.once("evaluate", lambda: _evaluate(run))


def _evaluate(run: Run) -> list[dict[str, Any]]:
    if run.config.decodes_categories:
        prepared = preprocess(run)
        return categories.evaluate_categories(run, prepared.responses, prepared.split, train(run))
    config, prepared, retrieved, images = run.config, preprocess(run), retrieve(run), reconstruct(run)
    ceilings = find_ceilings(config, prepared)
    fields = {"evaluation": config.evaluation.hashed_fields(), "seed": config.seed, "ceilings": ceilings}
    protocol = describe_protocol(run, prepared, retrieved.gallery_protocol)

    def compute(folder: Path) -> None:
        from braindecode_vis.analysis.scoring import ScoringTask, compute_scores

        parts = [part for fold in retrieved.folds for part in fold.parts]
        features = config.evaluation.features
        task = ScoringTask(
            retrievals=[(p.queries, p.gallery, p.retrieval) for p in parts],
            seen=np.asarray(images.seen),
            images={name: np.asarray(made) for name, made in images.images.items()},
            ids=images.ids,
            concepts=images.concepts,
            subjects=images.subjects,
            decoded_concepts=images.decoded_concepts,
            feature_encoder=None if features is None else features.build(),
            feature_name="" if features is None else features.kind,
            protocol=protocol,
            split="test",
            seed=config.seed,
            n_bootstrap=config.evaluation.n_bootstrap,
            n_permutations=config.evaluation.n_permutations,
            ceilings=ceilings,
            suite=None if config.evaluation.suite is None else config.evaluation.suite.build(),
            best_of=config.evaluation.best_of,
            conditions=_name_conditions(run, images.ids),
        )
        with run.listener.progress("scoring", task.n_steps) as advance:
            scores, items = compute_scores(task, advance=advance)
        if config.evaluation.protocols:
            scores += _score_protocols(run, protocol)
        further, lacking = _score_further(run, protocol, folder)
        scores += further
        store.write_json(folder / "not_computed.json", task.not_computed + lacking)
        store.write_json(folder / "scores.json", [score.as_row() for score in scores])
        items.to_parquet(folder / "items.parquet", index=False)

    upstream = {"retrieve": retrieved.artifact.fingerprint, "reconstruct": images.artifact.fingerprint}
    artifact = run.produce("evaluate", fields, upstream, compute)
    rows = store.read_json(artifact.path / "scores.json")
    for row in rows:
        row["fingerprint"] = artifact.fingerprint
    run.seen["items"] = pd.read_parquet(artifact.path / "items.parquet")
    run.seen["not computed"] = store.read_json(artifact.path / "not_computed.json")
    for name in ("captions", "response_ceilings"):
        path = artifact.path / f"{name}.json"
        run.seen[name] = store.read_json(path) if path.is_file() else None
    publish_scores(run.folder.path, rows)
    return rows


def _score_further(run: Run, protocol: str, folder: Path) -> tuple[list[Any], list[str]]:
    """Score captions and responses where that is asked for; say what lacks weights or repetitions."""
    config, scores, lacking = run.config.evaluation, [], []
    if config.captions is not None:
        from braindecode_vis.analysis.caption_scores import score_caption_task

        captions = score_caption_task(_make_caption_task(run, protocol))
        scores += captions.scores
        lacking += config.captions.not_computed
        store.write_json(folder / "captions.json", captions.texts)
    if config.brain is None and config.noise_ceiling is None:
        return scores, lacking
    from braindecode_vis.analysis import response_scores

    responses, folds = preprocess(run).responses, preprocess(run).split.folds
    ceilings: dict[str, Any] = {}
    if config.noise_ceiling is not None:
        tested = np.concatenate([fold.test for fold in folds])
        ceilings, why = response_scores.find_response_ceilings(
            responses, tested, measure=config.noise_ceiling, averaged=True, seed=run.config.seed
        )
        lacking += why
        store.write_json(folder / "response_ceilings.json", response_scores.tabulate_ceilings(ceilings))
    if config.brain is not None:
        images = reconstruct(run)
        pairs = [
            (
                pick_trials(responses, fold.train, run.config.repeats.train),
                average_repetitions(responses, fold.test),
            )
            for fold in folds
        ]
        found, why = response_scores.score_brain(
            response_scores.BrainTask(
                config.brain, pairs, preprocess(run).stimuli, images.ids, images.subjects, np.asarray(images.seen),
                {name: np.asarray(made) for name, made in images.images.items()}, ceilings, protocol, "test",
                run.config.seed, min(config.n_bootstrap, 1000), config.n_permutations,
            )
        )  # fmt: skip
        scores += found
        lacking += why
    return scores, lacking


def _make_caption_task(run: Run, protocol: str) -> Any:
    """Return predictions, true embeddings and training images of every fold in the space that the generator takes."""
    from braindecode_vis.analysis.caption_scores import CaptionTask

    prepared, images, config = preprocess(run), reconstruct(run), run.config.evaluation
    assert config.captions is not None
    predicted, true, training = [], [], []
    for number, fold in enumerate(prepared.split.folds):
        queries, bank = _meet_generator(run, number)
        predicted.append(queries)
        true.append(bank.select(list(queries.ids)))
        training.append(bank.select(list(pd.unique(prepared.responses.stimulus_ids[fold.train]))))
    return CaptionTask(
        config.captions, predicted, true, training, images.ids, images.subjects, np.asarray(images.seen),
        {name: np.asarray(made) for name, made in images.images.items()}, protocol, "test", run.config.seed,
        config.n_bootstrap,
    )  # fmt: skip


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
            f"evaluation.conditions names {missing[0]!r}, but the trials have the columns {', '.join(trials.columns)}; "
            "averaging keeps only what repetitions share."
        )
    if len(trials) != len(ids):
        raise DataError("conditions and reconstructions list different test items; run both again.")
    return trials[columns].astype(str).agg(" ".join, axis=1).to_numpy(dtype=object)


def _score_protocols(run: Run, protocol: str) -> list[Any]:
    """Return the score rows of the further protocols that the configuration names."""
    from braindecode_vis.analysis.protocol_scores import ProtocolTask, score_protocols
    from braindecode_vis.metrics.protocols import make_concept_templates

    config, prepared, retrieved = run.config, preprocess(run), retrieve(run)
    wanted, stimuli = config.evaluation.protocols, prepared.stimuli
    parts = [part for fold in retrieved.folds for part in fold.parts]
    ids = list(dict.fromkeys(str(i) for part in parts for i in part.gallery.ids))
    concept_of = {str(i): str(c) for i, c in zip(stimuli.ids, stimuli.concepts_of(stimuli.ids), strict=True)}
    text = templates = None
    if "zero_shot_text" in wanted:
        from braindecode_vis.embeddings.concepts import embed_concepts

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
        others = bank.select([str(i) for i in bank.ids if str(i) not in set(ids)])
        tested = {i: concept_of[i] for i in ids}
        templates = make_concept_templates(others, [concept_of[str(i)] for i in others.ids], tested)
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
        device=config.retrieval.device,
    )
    return score_protocols(task, wanted)


def find_phantom(config: RunConfig) -> Path | None:
    """Return the root of the data set if it is a phantom with its truth beside it."""
    root = getattr(config.dataset, "root", None)
    return root if root is not None and (root / "phantom_truth").is_dir() else None


def find_ceilings(config: RunConfig, prepared: Prepared) -> dict[str, float]:
    """Return the scores of an ideal observer, where the data set is a phantom with its truth beside it."""
    root = find_phantom(config)
    if root is None or config.split.kind != "published":
        return {}
    if prepared.responses.trials["subject"].nunique() > 1:
        return {}
    test = prepared.responses.trials.iloc[prepared.folds[0].test]
    averaged = config.repeats.test == "averaged"
    n_repetitions = int(test.groupby(["subject", "stimulus_id"]).size().min()) if averaged else 1
    truth = read_truth(root)
    if any(str(n_repetitions) not in person["ideal_top1"] for person in truth.people):
        return {}
    return {"top1": truth.get_ideal_top1(n_repetitions)}


def describe_gallery(run: Run) -> str:
    """Return the gallery of a run in words, without ranking anything."""
    return _choose_gallery(run.config, preprocess(run), embed(run))[1]


def describe_protocol(run: Run, prepared: Prepared, gallery: str) -> str:
    """Return data set, split, averaging and gallery in one line."""
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
        ]
    )


# --- report -----------------------------------------------------------------------------------------------


def report(run: Run) -> Path:
    """Write the self-contained ``report.html`` of the run and return its path."""
    return run.once("report", lambda: _report(run))


def _report(run: Run) -> Path:
    from braindecode_vis import summary
    from braindecode_vis.report.page import ReportContent, write_report

    prepared, rows = preprocess(run), evaluate(run)
    manifest = read_manifest(run.config.dataset.kind)
    provenance = collect_run_provenance(run)
    path = run.folder.path / "report.html"
    analyses = summary.find_analyses(run.folder.path, _describe_question(run))
    digest = store.hash_json(
        [rows, provenance["stages"], provenance["config"], [path.name for path in analyses]]
    )
    written = run.folder.path / "provenance.json"
    if path.is_file() and _read_digests(written) == {"content": digest, "page": store.hash_file(path)}:
        return path
    items = run.seen["items"]
    if run.config.decodes_categories:
        parts = summary.describe_categories(run.config, prepared, items)
    else:
        space = embed(run)[0].embeddings.space
        parts = summary.describe_images(
            run.config,
            prepared,
            space,
            retrieve(run),
            reconstruct(run),
            items,
            captions=run.seen.get("captions"),
        )
    parts["sections"] = [
        *parts.get("sections", []),
        *summary.describe_ceilings(run.seen.get("response_ceilings")),
        *summary.describe_analyses(analyses, run.folder.path),
    ]
    simulated = find_phantom(run.config) is not None
    warnings = [str(text) for text in prepared.responses.coords.get("warnings", [])]
    warnings += [*run.seen.get("not computed", []), *summary.describe_imagined(prepared)]
    if simulated:
        warnings.insert(
            0,
            f"Simulated people and recordings, written in the files of {manifest.title}: no brain was here.",
        )
    content = ReportContent(
        title=run.config.name,
        dataset=f"phantom in the files of {manifest.title}" if simulated else manifest.title,
        description="" if simulated else manifest.summary,
        facts=summary.list_facts(prepared, manifest, simulated=simulated),
        scores=rows,
        warnings=warnings,
        provenance=provenance,
        command=provenance["command"],
        **parts,
    )
    write_report(path, content)
    store.write_json(written, {**provenance, "digests": {"content": digest, "page": store.hash_file(path)}})
    return path


def _describe_question(run: Run) -> dict[str, Any]:
    """Return what an analysis must have been asked of to belong into the report of this run."""
    config = run.config
    return store.json_plain(
        {
            "encoder": config.encoder.hashed_fields(),
            "repeats": config.repeats.hashed_fields(),
            "centre": config.retrieval.centre,
            "selection": None if config.selection.is_empty else config.selection.hashed_fields(),
            "seed": config.seed,
            "preprocess": preprocess(run).artifact.fingerprint,
        }
    )


def _read_digests(path: Path) -> Any:
    """Return what the last report was made of; None if there is no readable record."""
    try:
        return store.read_json(path).get("digests")
    except (OSError, DataError, AttributeError):
        return None


def collect_run_provenance(run: Run) -> dict[str, Any]:
    """Return the configuration, the inputs and the fingerprint of every stage that ran."""
    artifacts: list[store.Artifact] = [preprocess(run).artifact, *[fold.artifact for fold in train(run)]]
    if not run.config.decodes_categories:
        banks = {bank.artifact.path: bank.artifact for bank in embed(run)}
        artifacts[1:1] = banks.values()
        artifacts += [retrieve(run).artifact, reconstruct(run).artifact]
    stages = {}
    for artifact in artifacts:
        record = store.read_json(artifact.path / store.PROVENANCE)
        stages[f"{record['stage']} {record['unit']}".strip()] = {
            key: record[key] for key in ("fingerprint", "version", "created", "seconds")
        }
    return {
        **store.collect_provenance(),
        "seed": run.config.seed,
        "inputs": run.config.dataset.hash_inputs(),
        "config": run.config.model_dump(mode="json"),
        "stages": stages,
    }


def read_run_scores(run: Run) -> list[dict[str, Any]]:
    """Return the rows of this run; none where those in the folder were made with other settings."""
    if "evaluate" in run.seen:
        return run.seen["evaluate"]
    try:
        made_with = RunConfig.model_validate(store.read_json(run.folder.path / "provenance.json")["config"])
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return []
    return read_scores(run.folder.path) if made_with.hashed_fields() == run.config.hashed_fields() else []


def run_all(run: Run) -> list[dict[str, Any]]:
    """Run every stage, reusing what is there, and return the score rows."""
    report(run)
    return evaluate(run)
