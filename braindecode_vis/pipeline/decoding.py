"""The stages retrieve and reconstruct: find the seen images of test trials, and make images, with every control.

Owns the branches of `reconstruct` too: other targets and other encoders over the same trials. The latents of the
low-level branch give colour and layout, the tokens of the text branch are a second condition of the generator. Their
fits are artifacts of their own, and `reconstruct` names them as its upstream.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.contracts import NOTHING_LENT, Context, ImageGenerator, Prior
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.stimuli import ImageRows, StimulusSet, find_comparison_size
from braindecode_vis.generation.captions import WrittenCaptions, write_with_encoder
from braindecode_vis.pipeline.galleries import (
    GalleryPart,
    GallerySource,
    order_by_gallery,
    rank_fold,
    split_by_gallery,
)
from braindecode_vis.pipeline.image_files import (
    DrawnImages,
    ImageWriter,
    Share,
    name_rows_of,
    read_image_rows,
    write_index,
)
from braindecode_vis.pipeline.learning import needs_predictions, pick_test_trials, predict_out_of_fold, train
from braindecode_vis.pipeline.preparing import (
    embed,
    name_fold,
    pick_labelled_trials,
    preprocess,
    refuse_categories,
)
from braindecode_vis.pipeline.runs import STAGE_VERSIONS, Run, lend_context, remember
from braindecode_vis.preprocessing.array_file import ArrayFile
from braindecode_vis.preprocessing.splits import Fold
from braindecode_vis.scoring.retrieval import Retrieval, read_retrieval, write_retrieval

if TYPE_CHECKING:
    from braindecode_vis.generation.generator_data import GeneratorData
    from braindecode_vis.pipeline.reconstruction import FittedFold, FoldImages, FoldTexts, TestedFold


CAPTIONS = "captions.json"  # of `reconstruct`
FEWEST_CANDIDATES = 5  # images of a fold that `retrieval.gallery` auto ranks among themselves


@dataclass(frozen=True)
class RetrievedFold:
    """Predictions of the test trials of one fold, their ranks, and the subject of each.

    `parts` hold predictions and galleries as they were compared; most encoders have one part.
    """

    predicted: Embeddings
    parts: list[GalleryPart]
    retrieval: Retrieval
    subjects: np.ndarray


@dataclass(frozen=True)
class Retrieved:
    """All folds, and the protocol of their gallery."""

    artifact: store.Artifact
    folds: list[RetrievedFold]
    gallery_protocol: str


@dataclass(frozen=True)
class Reconstructed:
    """What was seen and what each method made of it, row by row.

    Parameters
    ----------
    ids, concepts, subjects
        Stimulus, its concept and the subject of each row.
    seen
        The stimuli, each in its own size.
    images
        Method to its images, in the size that the generator gives: ``decoded``, then the controls.
    decoded_concepts
        Name of the decoded class of each row, or None if the test concepts were never trained on.
    size
        Height and width at which pixels are compared where a metric names no size of its own.
    captions
        ``decoded`` or ``oracle``, kind of decoder, and for each row the caption of each draw; empty without decoders.
    """

    artifact: store.Artifact
    ids: np.ndarray
    concepts: np.ndarray
    subjects: np.ndarray
    seen: ImageRows
    images: dict[str, ImageRows]
    decoded_concepts: np.ndarray | None
    size: tuple[int, int]
    captions: dict[str, dict[str, list[list[str]]]] = field(default_factory=dict)


@remember
def retrieve(run: Run) -> Retrieved:
    """Open the test trials: predict their embeddings and rank the true images in the gallery."""
    refuse_categories(run, "retrieve")
    if (number := find_untested(run)) is not None:
        raise DataError(
            f"all {len(preprocess(run).imagined[number])} test trials of fold {number} imagine something without a "
            "picture, so there is no image to retrieve; use analyze --analysis imagery, or also test "
            "seen images (dataset.test)."
        )
    fields, upstream = name_retrieval(run)
    sources, gallery = list_gallery_sources(run), choose_gallery(run)
    protocol = gallery[1]

    def compute(folder: Path) -> dict[str, Any]:
        ranks = []
        for number, source in enumerate(sources):
            responses = pick_test_trials(run, number)
            predicted = source.encoder.predict(responses)
            subjects = responses.trials["subject"].to_numpy(dtype=object)
            at = folder / name_fold(number)
            store.write_embeddings(at, predicted)
            ranks.append(rank_predictions(source, number, predicted, subjects, gallery, at))
        pd.concat(ranks, ignore_index=True).to_parquet(folder / "ranks.parquet", index=False)
        return {"gallery": protocol}

    artifact = run.produce("retrieve", fields, upstream, compute)
    table = pd.read_parquet(artifact.path / "ranks.parquet")
    folds = []
    for number, source in enumerate(sources):
        subjects = table.loc[table["fold"] == number, "subject"].to_numpy(dtype=object)
        ranked = read_retrieval(artifact.path / name_fold(number))
        predicted = store.read_embeddings(artifact.path / name_fold(number))
        parts = split_by_gallery(source, predicted, subjects, ranked)
        folds.append(RetrievedFold(predicted, parts, ranked, subjects))
    return Retrieved(artifact, folds, protocol)


def list_gallery_sources(run: Run) -> list[GallerySource]:
    """Return for each fold what its galleries are made of."""
    prepared = preprocess(run)
    return [
        GallerySource(
            fitted.encoder,
            bank.embeddings,
            list(pd.unique(prepared.responses.stimulus_ids[fold.train])),
            run.config.retrieval,
        )
        for fold, bank, fitted in zip(prepared.folds, embed(run), train(run), strict=True)
    ]


def rank_predictions(
    source: GallerySource,
    number: int,
    predicted: Embeddings,
    subjects: np.ndarray,
    gallery: tuple[list[str] | None, str],
    folder: Path,
) -> pd.DataFrame:
    """Rank the predictions of a fold, write the ranks into `folder`, and return its rows of the table of ranks.

    Parameters
    ----------
    source
        What the galleries of the fold are made of.
    number
        Number of the fold.
    predicted
        Embeddings predicted of its test trials, of n_rows rows.
    subjects : array of shape (n_rows,)
        Subject of each.
    gallery
        As `choose_gallery` returns it.
    folder
        Where ranks go.
    """
    whole, protocol = gallery
    ids = whole if whole is not None else list(pd.unique(predicted.ids))
    ranked = rank_fold(source, predicted, subjects, ids, protocol=protocol)
    write_retrieval(folder, ranked)
    names = np.asarray(ranked.gallery_ids, dtype=object)
    return pd.DataFrame(
        {
            "stimulus_id": ranked.query_ids, "subject": subjects, "fold": number, "rank": ranked.ranks,
            "worst_rank": ranked.worst_ranks, "gallery_size": ranked.gallery_size,
            "similarity": ranked.true_similarities, "top_ids": [list(names[row]) for row in ranked.top_indices],
        }
    )  # fmt: skip


def name_retrieval(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings and the fits that enter the fingerprint of `retrieve`."""
    retrieval = run.config.retrieval.hashed_fields()
    # Earlier versions took the images of all folds by default.
    if len(preprocess(run).folds) > 1 and retrieval["gallery"] == "auto" and choose_gallery(run)[0] is None:
        retrieval["gallery"] = "fold"
    fields = {"retrieval": retrieval, "repeats": run.config.repeats.test}
    # Not of `embed`: each fit names the bank that it was trained against.
    return fields, {f"train{n}": fold.artifact.fingerprint for n, fold in enumerate(train(run))}


def find_untested(run: Run) -> int | None:
    """Return the first fold that tests nothing but what was imagined without a picture; None without such a fold."""
    if run.config.decodes_categories:
        return None
    return next((n for n, fold in enumerate(preprocess(run).folds) if not len(fold.test)), None)


def choose_gallery(run: Run) -> tuple[list[str] | None, str]:
    """Return the ids of the common gallery, or None for one gallery per fold, and words for it."""
    config, prepared, banks = run.config, preprocess(run), embed(run)
    folds = prepared.folds
    ids = prepared.responses.stimulus_ids
    # A target that is fitted on training images has another space in each fold, and no common gallery.
    shared = len({bank.embeddings.space for bank in banks}) == 1
    if config.retrieval.gallery == "all" and not shared:
        raise DataError(
            f"retrieval.gallery is all, but the target {config.target.kind} has a different space in "
            "every fold; set retrieval.gallery to fold."
        )
    counts = [len(pd.unique(ids[fold.test])) for fold in folds]
    within = config.retrieval.gallery == "fold" or (
        config.retrieval.gallery == "auto" and min(counts) >= FEWEST_CANDIDATES
    )
    if within or not shared or len(folds) == 1:
        sizes = sorted(set(counts))
        size = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        images = "image" if size == "1" else "images"
        return None, f"{size} exact test {images}" + (" of the fold" if len(folds) > 1 else "")
    whole = list(pd.unique(np.concatenate([ids[fold.test] for fold in folds])))
    words = f"{len(whole)} exact images of all folds"
    if remembers_candidates(ids, folds):
        words += ", which holds training images of each fold, so that ranks lie below chance"
    return whole, words


def remembers_candidates(ids: np.ndarray, folds: Sequence[Fold]) -> bool:
    """Return whether a gallery of all folds holds images that some fold was trained on and does not test."""
    tested = {str(name) for fold in folds for name in ids[fold.test].tolist()}
    return any(
        not tested.isdisjoint(set(map(str, ids[fold.train])) - set(map(str, ids[fold.test])))
        for fold in folds
    )


@remember
def reconstruct(run: Run) -> Reconstructed:
    """Turn the predictions into images, with every control beside them.

    Where no image file is at hand, as in a gallery that is known in words alone, nothing is made.
    """
    refuse_categories(run, "reconstruct")
    if not preprocess(run).stimuli.has_pixels:
        return _name_rows(run)
    prepared, (fields, upstream) = preprocess(run), name_images(run)
    artifact = run.produce(
        "reconstruct", fields, upstream, lambda folder: _write_images(run, folder, fields, upstream)
    )
    rows = pd.read_parquet(artifact.path / "rows.parquet")
    methods = store.read_json(artifact.path / store.PROVENANCE)["methods"]
    images, size = read_image_rows(artifact.path, rows, prepared.stimuli, methods)
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
        size=size,
        captions=store.read_json(artifact.path / CAPTIONS) if run.config.reconstruction.captions else {},
    )


def _name_rows(run: Run) -> Reconstructed:
    """Return what was seen by its name, without any image."""
    retrieved, stimuli = retrieve(run), preprocess(run).stimuli
    ids = np.concatenate([fold.predicted.ids for fold in retrieved.folds])
    return Reconstructed(
        artifact=retrieved.artifact,
        ids=ids,
        concepts=stimuli.concepts_of(ids),
        subjects=np.concatenate([fold.subjects for fold in retrieved.folds]),
        seen=ImageRows(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(len(ids), np.intp)),
        images={},
        decoded_concepts=None,
        size=(1, 1),
    )


def join_captions(parts: Sequence[Mapping[str, Mapping[str, list[Any]]]]) -> dict[str, dict[str, list[Any]]]:
    """Return the captions of all folds, row after row; see `Reconstructed`."""
    return {
        method: {kind: [row for part in parts for row in part[method][kind]] for kind in kinds}
        for method, kinds in parts[0].items()
    }


def _write_images(
    run: Run, folder: Path, fields: Mapping[str, Any], upstream: Mapping[str, str]
) -> dict[str, Any]:
    """Reconstruct the test images of all folds into `folder`; finished images outlive a killed process."""
    from braindecode_vis.pipeline.reconstruction import (
        count_images,
        describe_same_draws,
        draw_images,
    )

    config, prepared, banks, retrieved = run.config, preprocess(run), embed(run), retrieve(run)
    n_rows = sum(len(fold.predicted) for fold in retrieved.folds)
    counts = count_images(config, n_rows)
    if stand_ins := config.reconstruction.describe_stand_ins():
        run.tell(f"{stand_ins}; do not expect the published numbers of the method", "reconstruct:")
    parts: list[FoldImages] = []
    with (
        lend_context(run, "generator", _name_fit(run, "generator")) as lent,
        lend_context(run, "images", ask_images(fields, upstream)) as kept,
        open_writer(run, cast(Path, kept.checkpoints), n_rows) as writer,
    ):
        if writer.n_kept:
            run.tell(
                f"{writer.n_kept} of {sum(counts.values())} images are kept from an earlier call",
                "reconstruct:",
            )
        first = 0
        with run.listener.progress("reconstructing", sum(counts.values())) as advance:
            for number in range(len(banks)):
                predicted, embeddings = predict_for_generator(run, number)
                data = make_generator_data(run, number, embeddings, lent.take_part(name_fold(number)))
                fitted = fit_once(
                    run, number, data, embeddings, predicted, writer, cast(Path, kept.checkpoints)
                )
                made = Path("fits") / name_fold(number)
                shutil.copytree(cast(Path, kept.checkpoints) / made, folder / made)
                fold = make_tested_fold(run, number, predicted, embeddings)
                part = draw_images(
                    config, data, prepared.stimuli, fold, fitted, writer, first=first, advance=advance
                )
                parts.append(part)
                first += len(part.rows)
                if number == 0:
                    size = find_comparison_size(*data.image_size)
        rows = write_images(run, folder, writer, parts, size)
    if config.reconstruction.captions:
        store.write_json(folder / CAPTIONS, join_captions([part.captions for part in parts]))
    images, _ = read_image_rows(folder, rows, prepared.stimuli)
    if same := describe_same_draws(config, images["decoded"]):
        with run.listener.watch("reconstruct:") as show:
            show(0, 0, same)
    return {"methods": ["seen", *images], "chosen": [part.chosen for part in parts]}


def make_tested_fold(run: Run, number: int, predicted: Embeddings, embeddings: Embeddings) -> TestedFold:
    """Return what is known of the test rows of a fold, whose embeddings `predict_for_generator` gives."""
    from braindecode_vis.pipeline.reconstruction import TestedFold

    return TestedFold(
        number,
        predicted,
        embeddings,
        retrieve(run).folds[number].subjects,
        low=make_low_level(run, number),
        texts=make_texts(run, number),
        written=write_test_captions(run, number),
    )


def fit_once(
    run: Run,
    number: int,
    data: GeneratorData,
    embeddings: Embeddings,
    predicted: Embeddings,
    writer: ImageWriter,
    folder: Path,
) -> FittedFold:
    """Return what makes the images of a fold; its fits stay in `folder` as long as the images made with them.

    After a kill, or in another process, those are read: a second fit need not be the first to the last bit, and images
    of both would be mixed.
    """
    from braindecode_vis.pipeline.reconstruction import fit_fold, open_fits

    config, tested = run.config, embeddings.select(pd.unique(predicted.ids))
    if (fits := find_shared_fits(folder, number)) is not None:
        return open_fits(fits, config, data, tested, number)
    fits = folder / "fits" / name_fold(number)
    shutil.rmtree(fits, ignore_errors=True)
    fits.mkdir(parents=True)
    prior = roles.build(Prior, run.prior, seed=derive_seed(config.seed, "fit prior", number))
    with lend_context(run, f"prior{number:02d}", _name_fit(run, "prior", number)) as context:
        prior.bind(replace(context, encoder=train(run)[number].encoder))
        fitted = fit_fold(
            config, data, preprocess(run).stimuli, tested, number, prior=prior, writer=writer, fits=fits
        )
    # Last: it says that all of them are there, and as they were written.
    store.write_json(fits.with_suffix(".json"), store.describe_files(fits))
    return fitted


def _name_fit(run: Run, part: str, number: int | None = None) -> list[Any]:
    """Return what decides the fit of the prior of a fold, or that of the generator."""
    learnt_from = [fold.artifact.fingerprint for fold in train(run)]
    return [
        getattr(run.config, part).hashed_fields(),
        learnt_from if number is None else learnt_from[number],
    ]


def find_shared_fits(folder: Path, number: int) -> Path | None:
    """Return where processes that share the images of `folder` have the fits of a fold; None if not there or damaged.

    Parameters
    ----------
    folder
        Where the images are kept until all are there.
    number
        Number of the fold.
    """
    fits = folder / "fits" / name_fold(number)
    try:
        whole = store.read_json(fits.with_suffix(".json")) == store.describe_files(fits)
    except (OSError, DataError):
        return None
    return fits if whole else None


def share_fits(run: Run, folder: Path) -> None:
    """Fit what makes the images of every fold for processes that share the work, where no other has."""
    n_rows = sum(len(fold.predicted) for fold in retrieve(run).folds)
    with (
        lend_context(run, "generator", _name_fit(run, "generator")) as lent,
        open_writer(run, folder, n_rows) as writer,
    ):
        for number in range(len(embed(run))):
            if find_shared_fits(folder, number) is None:
                predicted, embeddings = predict_for_generator(run, number)
                data = make_generator_data(run, number, embeddings, lent.take_part(name_fold(number)))
                fit_once(run, number, data, embeddings, predicted, writer, folder)


def open_writer(run: Run, folder: Path, n_rows: int, share: Share | None = None) -> ImageWriter:
    """Return what writes the generated images of so many test rows, and goes on with those in the folder."""
    from braindecode_vis.pipeline.reconstruction import count_images

    writer = ImageWriter(folder, share)
    copies, fused = run.generator.copies_training_images, run.config.reconstruction.low_level is not None
    for name, n_images in count_images(run.config, n_rows).items():
        # A copy is named by its id; blended with the image of a low-level branch it is an image of its own.
        if not copies or (fused and name != "oracle"):
            writer.open(name, n_images)
    return writer


def write_images(
    run: Run, folder: Path, writer: ImageWriter, parts: Sequence[FoldImages], size: tuple[int, int]
) -> pd.DataFrame:
    """Write the images of these folds, of which the writer has those that were generated, and return their table."""
    from braindecode_vis.pipeline.reconstruction import derange

    # A class shown only in the test part of one fold has no mean there; a control is scored on all items or none.
    entries = {
        name: entry for name, entry in parts[0].entries.items() if all(name in part.entries for part in parts)
    }
    rows = pd.concat([part.rows for part in parts], ignore_index=True)
    if "class_mean" not in entries:
        rows = rows.drop(columns=["decoded_concept", "class_mean_row"], errors="ignore")
    for name in ("mean_image", "class_mean"):
        if name in entries:
            _write_means(folder, name, rows, [part.means[name] for part in parts])
    # Over all folds: a fold may hold one image only, which has no other to be swapped with.
    if rows["stimulus_id"].nunique() > 1:
        ids = rows["stimulus_id"].to_numpy(dtype=object)
        rows["shuffled_row"] = derange(ids, make_generator(run.config.seed, "shuffled"))
        entries["shuffled"] = name_rows_of("decoded", "shuffled_row")
    n_draws = run.config.reconstruction.n_draws
    writer.move(
        folder,
        {
            name: (len(rows), n_draws) if name in ("decoded", "high_level") and n_draws > 1 else (len(rows),)
            for name in writer.sizes
        },
    )
    write_index(folder, rows, entries, size)
    return rows


def _write_means(folder: Path, name: str, rows: pd.DataFrame, means: Sequence[Iterable[np.ndarray]]) -> None:
    """Write the mean images of all folds as one array, and count them in the column of the table over all folds."""
    n_images, file = 0, None
    column = f"{name}_row"
    folds = rows["fold"].drop_duplicates().tolist()  # in their order
    for number, images in enumerate(means):
        rows.loc[rows["fold"] == folds[number], column] += n_images
        for image in images:
            if file is None:
                # As many as there are rows at most; cut to the images that come.
                file = ArrayFile(folder / f"{name}.npy", (len(rows), *image.shape), np.dtype(np.uint8))
            file.write(n_images, image[None])
            n_images += 1
    assert file is not None
    file.shrink(n_images)
    file.close()


def name_reconstruction(run: Run) -> dict[str, Any]:
    """Return the settings that enter the fingerprint of `reconstruct`."""
    return {
        "prior": run.config.prior.hashed_fields(),
        "generator": run.config.generator.hashed_fields(),
        "reconstruction": run.config.reconstruction.hashed_fields(),
        "seed": run.config.seed,
    }


def name_images(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of `reconstruct`, and make what it reads and return the fingerprints."""
    return name_reconstruction(run), {
        "retrieve": retrieve(run).artifact.fingerprint,
        **name_material(run),
    }


def ask_images(fields: Mapping[str, Any], upstream: Mapping[str, str]) -> list[Any]:
    """Return what decides the images of `reconstruct`; those of a stopped call are kept for the same alone."""
    return [STAGE_VERSIONS["reconstruct"], dict(fields), dict(upstream)]


def name_material(run: Run) -> dict[str, str]:
    """Make what `reconstruct` reads beside `retrieve`, and return the fingerprints as its upstream.

    That are the fits of the branches, and predictions out of fold where a prior or the generator learns from them; of
    earlier versions, where they belong to the fit, they are not named.
    """
    found: dict[str, store.Artifact] = {}
    for name, branch in open_branches(run).items():
        found |= {f"{name}{n}": fold.artifact for n, fold in enumerate(train(branch))}
        if branch.prior.needs_predictions:
            parts = enumerate(predict_out_of_fold(branch))
            found |= {f"{name}_out_of_fold{n}": part.artifact for n, part in parts}
    if needs_predictions(run):
        fits = {fold.artifact.fingerprint for fold in train(run)}
        made = {f"out_of_fold{n}": part.artifact for n, part in enumerate(predict_out_of_fold(run))}
        found |= {name: artifact for name, artifact in made.items() if artifact.fingerprint not in fits}
    return {name: artifact.fingerprint for name, artifact in found.items()}


def make_generator_data(
    run: Run, number: int, embeddings: Embeddings, context: Context = NOTHING_LENT
) -> GeneratorData:
    """Return what the generator of a fold is built from: nothing but its training split.

    Parameters
    ----------
    run
        The run.
    number
        Number of the fold.
    embeddings
        Of all images, in the space that the generator takes.
    context
        What the generator is lent.
    """
    from braindecode_vis.generation.generator_data import GeneratorData

    prepared = preprocess(run)
    ids = pd.unique(prepared.responses.stimulus_ids[prepared.folds[number].train])
    predicted = predict_out_of_fold(run)[number].predicted if needs_predictions(run) else None
    text = open_branch(run, "text")
    bank = None if text is None else embed(text)[number]
    return GeneratorData(
        embed(run)[number].encoder, embeddings.select(ids), prepared.stimuli.select(ids), predicted,
        _measure_noise(run, number), replace(context, encoder=train(run)[number].encoder),
        None if bank is None else bank.encoder,
        None if bank is None else bank.embeddings.select(ids),
        run.once("image size", lambda: _find_image_size(prepared.stimuli)),
    )  # fmt: skip


def _find_image_size(stimuli: StimulusSet) -> tuple[int, int] | None:
    """Return height and width of the first picture, which all folds share; None if it is not available."""
    pictured = stimuli.select_pictured()
    if not len(pictured) or not pictured.has_pixels:
        return None
    try:
        height, width = pictured.read_image(str(pictured.ids[0])).shape[:2]
    except DataError:  # whoever needs the picture says so
        return None
    return height, width


def _measure_noise(run: Run, number: int) -> Any:
    """Return the noise of single repetitions of a fold's training images, where the generator asks for it.

    With another prior than the identity it is given no predictions to weigh.
    """
    if not run.generator.weighs_predictions or run.prior.draws_images:
        return None
    from braindecode_vis.pipeline.reconstruction import measure_repetition_noise

    prepared, fitted = preprocess(run), train(run)[number]
    fold, repeats = prepared.folds[number], run.config.repeats
    trials = pick_labelled_trials(prepared, fold.train, "single")
    if fitted.selection is not None:
        trials = fitted.selection.apply(trials)
    counts = []
    for rows, how in ((fold.train, repeats.train), (fold.test, repeats.test)):
        table = prepared.responses.trials.iloc[rows]
        sizes = table.groupby(["subject", "stimulus_id"]).size().to_numpy()
        # The variance of a mean goes with 1 / n, so that the harmonic mean stands for the average variance.
        counts.append(float(len(sizes) / (1 / sizes).sum()) if how == "averaged" else 1.0)
    return measure_repetition_noise(
        fitted.encoder.predict_for_generator, trials, n_train=counts[0], n_test=counts[1]
    )


def predict_for_generator(run: Run, number: int) -> tuple[Embeddings, Embeddings]:
    """Return predictions of the test trials, and embeddings of all images, in the space that the generator takes.

    That is the target's space. An encoder that compares in a space it has learnt, and has no second head, cannot go
    back there; copying the nearest training image then works in the learnt space.
    """
    embeddings, learnt = map_for_generator(run, number)
    encoder = train(run)[number].encoder
    # Without a prediction of its own for the generator, it is that of `predict`, which `retrieve` has stored.
    if learnt or encoder.generator_view is None:
        return retrieve(run).folds[number].predicted, embeddings
    return encoder.predict_for_generator(pick_test_trials(run, number)), embeddings


def map_for_generator(run: Run, number: int) -> tuple[Embeddings, bool]:
    """Return embeddings of all images in the space that the generator takes, and whether the encoder has learnt it.

    In a learnt space the predictions are those of the comparison; see `predict_for_generator`.
    """
    encoder, bank = train(run)[number].encoder, embed(run)[number].embeddings
    # Any other generator is refused by `predict_for_generator`, which says what is missing.
    if not encoder.predicts_targets and run.generator.copies_training_images:
        return encoder.map_targets(bank), True
    return encoder.map_for_generator(bank), False


# --- branches -----------------------------------------------------------------------------------------


#: Those of `reconstruct` beside the run's own encoder, by their names in its settings.
BRANCHES = ("low_level", "text")


def open_branches(run: Run) -> dict[str, Run]:
    """Return the branches that the run has, by name."""
    opened = {name: open_branch(run, name) for name in BRANCHES}
    return {name: branch for name, branch in opened.items() if branch is not None}


def open_branch(run: Run, name: str) -> Run | None:
    """Return a branch of `BRANCHES` as a run that trains; None without it."""
    branch = getattr(run.config.reconstruction, name)
    if branch is None:
        return None
    # Everything else is shared: data set, split, selection, repetitions and seed.
    changes = {
        "target": branch.target,
        "encoder": branch.encoder,
        "prior": branch.prior,
        "reconstruction": type(run.config.reconstruction)(),
        "synthetic": None,  # a branch learns from real trials alone
    }
    words = name.replace("_", " ")
    opened = run.once(words, lambda: replace(run, config=run.config.model_copy(update=changes), seen={}))
    # The same trials; to prepare them again would put the branch's settings into the folder's config.yaml.
    opened.seen["preprocess"] = preprocess(run)
    return opened


def open_low_level(run: Run) -> Run | None:
    """Return the low-level branch as a run that trains; None without one."""
    return open_branch(run, "low_level")


def predict_branch(run: Run, branch: Run, number: int, trials: Responses) -> Embeddings:
    """Return what the branch of a fold predicts of trials, after its prior.

    Parameters
    ----------
    run, branch
        The run and its branch; see `open_branch`.
    number
        Number of the fold.
    trials
        With every feature.
    """
    fitted = train(branch)[number]
    if fitted.selection is not None:
        trials = fitted.selection.apply(trials)
    return rescale_branch(run, branch, number, fitted.encoder.predict_for_generator(trials))


def rescale_branch(run: Run, branch: Run, number: int, predicted: Embeddings) -> Embeddings:
    """Return predictions of a branch of a fold after its prior; see `predict_branch`."""
    if not branch.prior.needs_predictions:
        return predicted
    # Statistics of training trials alone, predicted by fits that have not seen them.
    pairs, bank = predict_out_of_fold(branch)[number].predicted, embed(branch)[number].embeddings
    ids = pd.unique(preprocess(run).responses.stimulus_ids[preprocess(run).folds[number].train])
    prior = roles.build(Prior, branch.prior, seed=0)
    prior.fit(pairs, bank.select(pairs.ids), images=bank.select(ids))
    return prior.sample(predicted, n_draws=1, seed=0)


def _pick_trials(run: Run, number: int) -> Responses:
    """Return the test trials of a fold, row by row those of the run's own encoder."""
    prepared = preprocess(run)
    trials = pick_labelled_trials(prepared, prepared.folds[number].test, run.config.repeats.test)
    return order_by_gallery(train(run)[number].encoder, trials)


def make_texts(run: Run, number: int) -> FoldTexts | None:
    """Return the tokens that the text branch predicts of the test trials of one fold; None without a branch."""
    from braindecode_vis.pipeline.reconstruction import FoldTexts

    text = open_branch(run, "text")
    if text is None:
        return None
    predicted = predict_branch(run, text, number, _pick_trials(run, number))
    return FoldTexts(predicted, embed(text)[number].embeddings)


def write_test_captions(run: Run, number: int) -> WrittenCaptions | None:
    """Return what the encoder of a fold writes of its test trials; None if no captions of it are asked for."""
    captions = run.config.reconstruction.captions
    if not any(each.reads_responses for each in captions):
        return None
    return write_with_encoder(captions, train(run)[number].encoder, pick_test_trials(run, number))


def make_low_level(run: Run, number: int) -> DrawnImages | None:
    """Return what draws the images of the branch for the test trials of one fold, one for each row of the run itself.

    None without a branch.
    """
    low = open_low_level(run)
    return None if low is None else decode_low_level(run, low, number, _pick_trials(run, number))


def decode_low_level(run: Run, low: Run, number: int, trials: Responses) -> DrawnImages:
    """Return what draws the images that the branch of a fold makes of trials.

    Parameters
    ----------
    run, low
        The run and its branch; see `open_low_level`.
    number
        Number of the fold.
    trials
        With every feature.
    """
    return decode_latents(run, low, number, predict_branch(run, low, number, trials))


def decode_latents(run: Run, low: Run, number: int, predicted: Embeddings) -> DrawnImages:
    """Return what draws the images of latents that the low-level branch of a fold predicted; see `decode_low_level`."""
    from braindecode_vis.generation.generator_data import GeneratorData
    from braindecode_vis.generation.inversion import LatentsConfig
    from braindecode_vis.pipeline.reconstruction import draw_rows

    prepared, bank = preprocess(run), embed(low)[number]
    ids = pd.unique(prepared.responses.stimulus_ids[prepared.folds[number].train])
    data = GeneratorData(bank.encoder, bank.embeddings.select(ids), prepared.stimuli.select(ids))
    generator = roles.build(ImageGenerator, LatentsConfig(), data)
    return draw_rows("low_level", generator, predicted, derive_seed(run.config.seed, "low level"))
