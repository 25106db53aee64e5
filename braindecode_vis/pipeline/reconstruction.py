"""Reconstruct the test images of one fold, with every control beside them.

Owns which controls are made and from what, on fitted components. Images keep the size that the generator gives and go
to an `image_files.ImageWriter` batch by batch; `decoding` writes the table beside them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.contracts import GeneratorSettings, ImageGenerator, Prior, PriorSettings
from braindecode_vis.base.memory import check_memory, describe_bytes
from braindecode_vis.base.registry import list_inside
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.stimuli import ImageRows, Images, StimulusSet
from braindecode_vis.config import RunConfig
from braindecode_vis.generation.captions import (
    CaptionDecoder,
    WrittenCaptions,
    fit_decoders,
    read_decoders,
    write_decoders,
)
from braindecode_vis.generation.generator_data import GeneratorData, RepetitionNoise
from braindecode_vis.generation.image_fusion import fuse_branches
from braindecode_vis.generation.inversion import ClassMeanGenerator, MeanImageGenerator, NearestConfig
from braindecode_vis.generation.priors.closed_form import IdentityPrior, MeanPrior
from braindecode_vis.pipeline.image_files import DrawnImages, ImageWriter, name_file, name_stimuli
from braindecode_vis.pipeline.progress import describe_seconds
from braindecode_vis.pipeline.runs import ProgressListener

#: Single trials that the noise of repetitions is measured on; a covariance of embeddings needs no more.
MOST_REPEATED = 2048
#: Bytes that a batch takes beside its own while it is made: numbers in single precision, before and after scaling.
MADE_COPIES = 9
#: Draws of the mean embedding, which is the same for all rows: row after row gets one of them.
MEAN_DRAWS = 8
#: Seconds from which the images of new trials are announced.
LONG_S = 10.0


#: ``decoded`` or ``oracle``, kind of decoder, and for each row the caption of each draw.
Captions = dict[str, dict[str, list[list[str]]]]


@dataclass(frozen=True)
class FoldTexts:
    """Tokens of texts for a generator that takes them: those predicted of each test row, and those of every image."""

    predicted: Embeddings
    true: Embeddings


@dataclass(frozen=True)
class TestedFold:
    """What is known of the test rows of one fold.

    Parameters
    ----------
    number
        Number of the fold, for seeds and the table.
    predicted, true
        Predicted embeddings of the rows, and the true embedding of every test image.
    subjects : array of shape (n_rows,)
        Subject of each row.
    low
        What makes the images of the low-level branch, one per row.
    texts
        Of the text branch; the oracle is given the true ones, and the mean embedding their mean.
    written
        Captions that the brain encoder wrote of the rows. They lead the oracle too, whose embedding no response has;
        the mean embedding is led by the caption of no row in particular.
    """

    number: int
    predicted: Embeddings
    true: Embeddings
    subjects: np.ndarray
    low: DrawnImages | None = None
    texts: FoldTexts | None = None
    written: WrittenCaptions | None = None


@dataclass(frozen=True)
class FoldImages:
    """The table of one fold, what else than generated images its methods show, and what the generator chose.

    Parameters
    ----------
    rows
        One row per test item, with a column for each method that shows stimuli.
    entries
        Method to its entry of ``images.json``; see `image_files`.
    means
        Mean images of the fold, method to a sequence of images that a column of `rows` counts.
    chosen
        What prior and generator chose on their training data.
    captions
        Those that were decoded.
    """

    rows: pd.DataFrame
    entries: dict[str, dict[str, Any]]
    means: dict[str, Iterable[np.ndarray]]
    chosen: dict[str, Any]
    captions: Captions


@dataclass(frozen=True)
class FittedFold:
    """What makes the images of one fold: prior, generator, and decoders of captions by kind."""

    prior: Prior
    generator: ImageGenerator
    decoders: dict[str, CaptionDecoder]


def fit_fold(
    config: RunConfig,
    data: GeneratorData,
    test: StimulusSet,
    tested: Embeddings,
    number: int,
    *,
    prior: Prior,
    writer: ImageWriter,
    fits: Path,
) -> FittedFold:
    """Fit what makes the images of one fold, and write it.

    Parameters
    ----------
    config
        Prior, generator and seed are taken from it.
    data
        Images and embeddings of the training split, and out-of-fold predictions.
    test
        All images of the run.
    tested
        True embeddings of the test images, which a prior may not know.
    number
        Number of the fold, for seeds.
    prior
        The prior, not yet fitted.
    writer
        Will get the images, for which there must be room.
    fits
        Folder that the fitted prior and what the generator has trained are written into, for new recordings.
    """
    prior_settings = roles.complete(PriorSettings, config.prior)
    generator_settings = roles.complete(GeneratorSettings, config.generator)
    generator = roles.build(ImageGenerator, generator_settings, data)
    generator.bind(data.context)
    check_images_fit(config, data, generator, writer)
    known = prior_settings.find_images(data.embeddings, generator, tested)
    fit_prior(config, prior, data, known)
    decoders = fit_decoders(
        config.reconstruction.captions, data, seed=derive_seed(config.seed, "fit captions", number)
    )
    # Right after the fit: what is written is what makes the images, whatever comes later.
    write_fits(fits, prior, generator, decoders)
    write_material(fits, data, known, test)
    return FittedFold(prior, generator, decoders)


def open_fits(
    folder: Path, config: RunConfig, data: GeneratorData, tested: Embeddings, number: int
) -> FittedFold:
    """Return what `fit_fold` wrote, its parameters as there; a prior that wrote nothing is fitted again."""
    prior, generator = read_fits(folder, config, data)
    generator.bind(data.context)
    if prior is None:
        settings = roles.complete(PriorSettings, config.prior)
        prior = refit_prior(config, settings, data, generator, tested, number)
    return FittedFold(prior, generator, read_decoders(folder, config.reconstruction.captions, data))


def draw_images(
    config: RunConfig,
    data: GeneratorData,
    test: StimulusSet,
    fold: TestedFold,
    fitted: FittedFold,
    writer: ImageWriter,
    *,
    first: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> FoldImages:
    """Reconstruct the test images of one fold, and the controls.

    Controls: ``nearest`` (training image nearest to the prediction), ``mean_image``, ``class_mean`` (mean image of
    the decoded class, where the test concepts were trained on), ``mean_embedding`` (the generator without a brain),
    ``shuffled`` (the prediction of another test image) and ``oracle`` (the true embedding). With a low-level branch,
    ``decoded`` is the fused image, and ``high_level`` and ``low_level`` are what went into it.

    Parameters
    ----------
    config
        Prior, generator and seed are taken from it.
    data
        Images and embeddings of the training split, and out-of-fold predictions.
    test
        The images that were seen.
    fold
        Of the test rows.
    fitted
        Prior, generator and decoders of captions.
    writer
        Gets what the generator makes, batch by batch.
    first
        Number of the fold's first row among the rows of all folds.
    advance
        Called with the number of images that are there.
    """
    predicted, training = fold.predicted, data.embeddings.ids
    concepts, true = test.concepts_of(predicted.ids), fold.true.select(predicted.ids)
    drawing = _Drawing(config, data, fold, fitted, writer, first, advance)
    sampled = sample_prior(config, fitted.prior, predicted, fold.number)  # once, for captions and images
    texts = drawing.decode_captions({"decoded": (sampled, predicted), "oracle": (true, true)})
    prompt = config.reconstruction.prompt
    prompts = {
        method: None if prompt is None else own.get(prompt, texts["decoded"][prompt])
        for method, own in texts.items()
    }
    drawing.columns |= {
        "stimulus_id": predicted.ids, "concept": concepts, "subject": fold.subjects, "fold": fold.number,
        "nearest_id": training[NearestConfig().build(data).find_nearest(predicted)].astype(str),
    }  # fmt: skip
    drawing.entries["seen"] = name_stimuli("stimulus_id")
    drawing.draw_decoded(sampled, prompts["decoded"])
    drawing.entries["nearest"] = name_stimuli("nearest_id")
    drawing.add_means(concepts)
    # Of a generator that copies, the image nearest to the mean would be any image.
    if not roles.complete(GeneratorSettings, config.generator).copies_training_images:
        drawing.draw_mean_embedding()
    drawing.draw_oracle(true, prompts["oracle"])
    about = {"generator": fitted.generator.describe(), "prior": fitted.prior.describe()}
    chosen = {name: dict(content) for name, content in about.items() if content}
    captions: Captions = {}
    # One of several processes leaves its share for the one that writes.
    if config.reconstruction.captions and writer.share is None:
        captions = {
            method: {kind: _group(own, len(predicted)) for kind, own in kinds.items()}
            for method, kinds in texts.items()
        }
    return FoldImages(pd.DataFrame(drawing.columns), drawing.entries, drawing.means, chosen, captions)


@dataclass
class _Drawing:
    """The images of one fold while they are made; `columns`, `entries` and `means` are those of its `FoldImages`."""

    config: RunConfig
    data: GeneratorData
    fold: TestedFold
    fitted: FittedFold
    writer: ImageWriter
    first: int
    advance: Callable[[int], None]
    columns: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    means: dict[str, Iterable[np.ndarray]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed of the generator for this fold."""
        return derive_seed(self.config.seed, "generator", self.fold.number)

    def decode_captions(
        self, sources: Mapping[str, tuple[Embeddings, Embeddings]]
    ) -> dict[str, dict[str, Sequence[str]]]:
        """Return captions by method and kind of decoder.

        Parameters
        ----------
        sources
            Method to what it decodes: draws, and one embedding of each row. That of the true embedding is the upper
            bound of captions, as of images.
        """
        asked = [each for each in self.config.reconstruction.captions if not each.reads_responses]
        found: dict[str, dict[str, Sequence[str]]] = {
            method: {
                each.kind: self._decode(method, each.kind, draws if each.reads_draws else single)
                for each in asked
            }
            for method, (draws, single) in sources.items()
        }
        if self.fold.written is not None:
            found["decoded"]["brain"] = self.fold.written.rows
        return found

    def _decode(self, method: str, kind: str, rows: Embeddings) -> Sequence[str]:
        decode = partial(_decode_rows, self.fitted.decoders[kind], rows)
        return self.writer.draw_texts(f"{self.fold.number}-{method}-{kind}", len(rows), decode)

    def draw_decoded(self, sampled: Embeddings, prompts: Sequence[str] | None) -> None:
        """Draw what is decoded of the rows, with a low-level branch also what went into it."""
        n, n_draws = len(self.fold.predicted), self.config.reconstruction.n_draws
        low, texts = self.fold.low, self.fold.texts
        decoded = decode_images(
            self.config, sampled, self.fitted.generator, self.fold.predicted, self.fold.number, low=low is not None,
            prompts=prompts, texts=None if texts is None else texts.predicted,
        )  # fmt: skip
        if isinstance(decoded, np.ndarray):
            self.columns["decoded_id"] = self.data.embeddings.ids[decoded].astype(str)
            self.entries["decoded"] = name_stimuli("decoded_id", repeats=n_draws)
            self.advance(n * n_draws)
            return
        shown = None
        if low is not None:
            self.writer.draw(low, self.first, self.advance, whole=True)
            shown = self.writer.read("low_level")[self.first : self.first + n]
            self.entries["low_level"] = name_file("low_level", repeats=n_draws)
        self.writer.draw(decoded(shown), self.first * n_draws, self.advance)
        self.entries |= {name: name_file(name) for name in ("decoded", *(["high_level"] if low else []))}

    def add_means(self, concepts: np.ndarray) -> None:
        """Add the mean image, and that of the decoded class where the test concepts were trained on."""
        self.columns["mean_image_row"] = 0
        self.entries["mean_image"] = name_file("mean_image", rows="mean_image_row")
        self.means["mean_image"] = [MeanImageGenerator(self.data).mean]
        # Zero-shot splits have no training image of a tested concept, and no class to decode.
        if not set(concepts) <= set(self.data.concepts):
            return
        classes = ClassMeanGenerator(self.data)
        self.columns["decoded_concept"] = classes.classify(self.fold.predicted)
        names, self.columns["class_mean_row"] = np.unique(
            self.columns["decoded_concept"], return_inverse=True
        )
        self.means["class_mean"] = map(classes.average, names)
        self.entries["class_mean"] = name_file("class_mean", rows="class_mean_row")

    def draw_mean_embedding(self) -> None:
        """Draw what the generator makes without a brain: of the mean training embedding."""
        fold, prompt = self.fold, self.config.reconstruction.prompt
        same = _take_mean(fold.predicted.take(slice(MEAN_DRAWS)), self.data.embeddings)
        more: dict[str, Any] = {}
        if prompt == "brain" and fold.written is not None:
            more["prompts"] = [fold.written.mean] * len(same)
        elif prompt is not None:
            more["prompts"] = self._decode("mean_embedding", prompt, same)
        if fold.texts is not None and self.data.texts is not None:
            more["texts"] = _take_mean(fold.texts.predicted.take(slice(MEAN_DRAWS)), self.data.texts)
        drawn = draw_rows("mean_embedding", self.fitted.generator, same, self.seed, **more)
        self._write("mean_embedding", _repeat_images(drawn, len(fold.predicted)))

    def draw_oracle(self, true: Embeddings, prompts: Sequence[str] | None) -> None:
        """Draw the upper bound: what the generator makes of the very embeddings that were to be predicted."""
        copies = self.fitted.generator.find_copies(true)
        if copies is not None:
            self.columns["oracle_id"] = self.data.embeddings.ids[copies].astype(str)
            self.entries["oracle"] = name_stimuli("oracle_id")
            self.advance(len(true))
            return
        more: dict[str, Any] = {"prompts": prompts}
        if self.fold.texts is not None:
            more = {"texts": self.fold.texts.true.select(true.ids)}
        self._write("oracle", draw_rows("oracle", self.fitted.generator, true, self.seed, **more))

    def _write(self, method: str, drawn: DrawnImages) -> None:
        self.writer.draw(drawn, self.first, self.advance)
        self.entries[method] = name_file(method)


def _repeat_images(drawn: DrawnImages, n_images: int) -> DrawnImages:
    """Return what gives so many images, of which all after the first `drawn` repeat these."""
    made: dict[str, dict[int, np.ndarray]] = {name: {} for name in drawn.names}

    def make(rows: range) -> dict[str, np.ndarray]:
        places = [row % drawn.n_images for row in rows]
        for part in drawn.split():
            if set(part) & (set(places) - made[drawn.names[0]].keys()):
                for name, images in drawn.make(part).items():
                    made[name].update(zip(part, images, strict=True))
        return {name: np.stack([images[place] for place in places]) for name, images in made.items()}

    return DrawnImages(drawn.names, n_images, drawn.step, make)


def _decode_rows(decoder: CaptionDecoder, embeddings: Embeddings, rows: range) -> list[str]:
    """Return the captions of some rows."""
    taken = slice(rows.start, rows.stop)
    return decoder.decode(embeddings.take(taken))


def _group(texts: Sequence[str], n_rows: int) -> list[list[str]]:
    """Return the texts of each row, which follow one another."""
    each = len(texts) // max(n_rows, 1)
    return [list(texts[row * each : (row + 1) * each]) for row in range(n_rows)]


def _take_mean(predicted: Embeddings, training: Embeddings) -> Embeddings:
    """Return the mean of the training embeddings in the place of every prediction."""
    mean = MeanPrior().fit(predicted, training, images=training)
    return mean.sample(predicted, n_draws=1, seed=0)


def count_images(config: RunConfig, n_rows: int) -> dict[str, int]:
    """Return how many images of each method a generator makes of test rows, a copying one included."""
    fused = config.reconstruction.low_level is not None
    n_draws = config.reconstruction.n_draws
    counts = {"decoded": n_rows * n_draws, "oracle": n_rows}
    if fused:
        counts |= {"high_level": n_rows * n_draws, "low_level": n_rows}
    if not roles.complete(GeneratorSettings, config.generator).copies_training_images:
        counts["mean_embedding"] = n_rows
    return counts


def check_images_fit(
    config: RunConfig, data: GeneratorData, generator: ImageGenerator, writer: ImageWriter
) -> None:
    """Refuse images that the disk has no room for, or, where they are made in one call, the memory.

    Parameters
    ----------
    config
        Of the run.
    data, generator
        Say how large the images are; where neither the generator nor its settings do, as large as the stimuli.
    writer
        Knows how many images of each method there will be, and where.
    """
    counts = writer.sizes
    if roles.complete(GeneratorSettings, config.generator).copies_training_images or not counts:
        return
    height, width = generator.image_size or data.image_size
    what = f"{sum(counts.values())} images of {height} x {width} pixels ({', '.join(counts)})"
    reduce = "reconstruction.n_draws, the subjects (--subject), or set repeats.test=averaged"
    above = next(path for path in (writer.folder, *writer.folder.parents) if path.is_dir())
    # What a call that was stopped has written takes no further room; its files are as long as they will be, with holes.
    held = sum(path.stat().st_blocks * 512 for path in writer.folder.glob("*.np[yz]"))
    needed, free = estimate_images_bytes(sum(counts.values()), height, width), shutil.disk_usage(above).free
    if needed > free + held:
        raise DataError(
            f"{what} need {describe_bytes(needed)} of disk, and {above} has {describe_bytes(free)} free; choose "
            f"another place with --out, or reduce {reduce}."
        )
    at_once = generator.rows_at_once or max(counts.values())
    check_memory(MADE_COPIES * estimate_images_bytes(at_once, height, width), what=what, reduce=reduce)


def estimate_images_bytes(n_images: int, height: int, width: int) -> int:
    """Return what images take on disk.

    Parameters
    ----------
    n_images
        Images of all methods.
    height, width
        Of each.
    """
    return n_images * height * width * 3


def fit_prior(config: RunConfig, prior: Prior, data: GeneratorData, known: Embeddings) -> None:
    """Fit the prior, mostly on out-of-fold predictions.

    Parameters
    ----------
    config
        Names the prior.
    prior
        Not yet fitted.
    data
        Of the training split.
    known
        Embeddings of the images that the prior may know.
    """
    # Out of fold: an encoder's predictions of its own training trials are closer than those of any new trial.
    pairs = data.predicted
    if not roles.complete(PriorSettings, config.prior).needs_predictions:
        prior.fit(None, data.embeddings, images=known)
    elif pairs is not None and len(pairs):
        prior.fit(pairs, data.embeddings.select(pairs.ids), images=known)
    else:
        raise ConfigError(
            f"the prior {config.prior.kind} learns from predictions of training trials on which the "
            "encoder was not fitted, but there are none; set encoder.selection.hold_out above 0, or "
            "encoder.out_of_fold."
        )


def refit_prior(
    config: RunConfig,
    settings: Any,
    data: GeneratorData,
    generator: ImageGenerator | None,
    tested: Embeddings,
    number: int,
) -> Prior:
    """Return the prior of a finished run's fold, fitted again: the same pairs and seed give the same prior.

    Parameters
    ----------
    config
        Of the run.
    settings
        Those of its prior, in their role.
    data
        Of the training split.
    generator
        May be None if the prior asks no generator for its images.
    tested
        True embeddings of the test images, which a prior may not know.
    number
        Number of the fold, for the seed.
    """
    prior = roles.build(Prior, settings, seed=derive_seed(config.seed, "fit prior", number))
    prior.bind(data.context)
    fit_prior(config, prior, data, settings.find_images(data.embeddings, generator, tested))
    return prior


def write_fits(
    folder: Path,
    prior: Prior,
    generator: ImageGenerator,
    decoders: Mapping[str, CaptionDecoder] | None = None,
) -> None:
    """Write the fitted prior, what the generator has trained, and decoders of captions below `folder`; see `read_fits`
    and `read_decoders`.
    """
    fitted: dict[str, Any] = {"prior": prior, "generator": generator}
    for name, component in fitted.items():
        (folder / name).mkdir(parents=True)
        component.write(folder / name)
    write_decoders(folder, decoders or {})


def decode_captions(
    captions: Sequence[Any],
    decoders: Mapping[str, CaptionDecoder],
    sampled: Embeddings,
    predicted: Embeddings,
    written: WrittenCaptions | None = None,
) -> dict[str, list[list[str]]]:
    """Return for each decoder the captions of each row: of every draw of the prior, or one of the prediction itself.

    Parameters
    ----------
    captions
        Settings of the decoders.
    decoders
        Fitted, by kind.
    sampled
        The draws of the prior, from `sample_prior`.
    predicted
        Predicted embeddings.
    written
        What the brain encoder wrote of the rows.
    """
    found = {
        settings.kind: _group(
            decoders[settings.kind].decode(sampled if settings.reads_draws else predicted), len(predicted)
        )
        for settings in captions
        if not settings.reads_responses
    }
    return found if written is None else {**found, "brain": _group(written.rows, len(predicted))}


def pick_prompts(config: RunConfig, captions: Mapping[str, list[list[str]]]) -> list[str] | None:
    """Return the texts that lead images, one for each row or for each draw of each row; None if none is to lead.

    Parameters
    ----------
    config
        Names the decoder.
    captions
        From `decode_captions`, or of true embeddings.
    """
    if config.reconstruction.prompt is None or config.reconstruction.prompt not in captions:
        return None
    return [text for texts in captions[config.reconstruction.prompt] for text in texts]


def sample_prior(config: RunConfig, prior: Prior, predicted: Embeddings, number: int) -> Embeddings:
    """Return the draws of the prior that a fold's images are made from, draws of a row next to each other."""
    seed = derive_seed(config.seed, "prior", number)
    return prior.sample(predicted, n_draws=config.reconstruction.n_draws, seed=seed)


def write_material(folder: Path, data: GeneratorData, known: Embeddings, stimuli: StimulusSet) -> None:
    """Write which images of the run the fits below `folder` were given, for an audit.

    Parameters
    ----------
    folder
        Gets ``material.json``.
    data
        What the generator was built from, and the prior was fitted on.
    known
        Images that the prior knows; those from elsewhere are not named.
    stimuli
        All images of the run.
    """
    predicted = [] if data.predicted is None else pd.unique(data.predicted.ids.astype(str)).tolist()
    own = set(stimuli.ids.astype(str).tolist())
    material = {
        "images": data.embeddings.ids.astype(str).tolist(),
        "predicted": predicted,
        "known": [name for name in known.ids.astype(str).tolist() if name in own],
    }
    store.write_json(folder / "material.json", material)


def read_fits(folder: Path, config: RunConfig, data: GeneratorData) -> tuple[Prior | None, ImageGenerator]:
    """Return what `write_fits` wrote; None for a prior that wrote nothing, which is fitted again as fast.

    Parameters
    ----------
    folder
        May be missing: runs of earlier versions kept no fits.
    config
        Names prior and generator.
    data
        The data that the generator was built from.
    """
    settings = roles.complete(GeneratorSettings, config.generator)
    if (folder / "generator").is_dir() and any((folder / "generator").iterdir()):
        generator = roles.read(ImageGenerator, settings, folder / "generator", data)
    else:
        generator = roles.build(ImageGenerator, settings, data)
    prior = None
    if (folder / "prior").is_dir() and any((folder / "prior").iterdir()):
        _check_kind(folder / "prior", config)
        prior_settings = roles.complete(PriorSettings, config.prior)
        prior = roles.read(Prior, prior_settings, folder / "prior")
    return prior, generator


def _check_kind(folder: Path, config: RunConfig) -> None:
    """Raise `DataError` if the prior in a folder says that it is of another kind than the run's."""
    about, kind = folder / "prior.json", config.prior.kind
    # A prior from outside the package may write another file of that name.
    if kind in list_inside("prior") and about.is_file():
        kind = store.read_json(about).get("kind", kind)
    if kind != config.prior.kind:
        raise DataError(
            f"{folder} holds a prior of kind {kind}, but prior.kind of this run is {config.prior.kind}; restore the "
            "folder that the run wrote, or remove the stage and reconstruct again."
        )


def decode_images(
    config: RunConfig,
    sampled: Embeddings,
    generator: ImageGenerator,
    predicted: Embeddings,
    number: int,
    *,
    low: bool = False,
    prompts: Sequence[str] | None = None,
    texts: Embeddings | None = None,
) -> np.ndarray | Callable[[ImageRows | None], DrawnImages]:
    """Return the training image that each row copies, or what draws the decoded images of all rows, draw by draw.


    Parameters
    ----------
    config
        Draws, fusion and seed are taken from it.
    sampled
        The draws of the prior, from `sample_prior`.
    generator
        Fitted.
    predicted
        Predicted embeddings.
    number
        Number of the fold, for seeds.
    low
        Whether images of the low-level branch, one per row, will be given to what is returned.
    prompts
        Text of each row, or of each draw of each row, that leads its image.
    texts
        Tokens that the text branch predicted, one row per row.
    """
    n_draws, branch = config.reconstruction.n_draws, config.reconstruction.low_level
    # A prior's draws pretend to be embeddings of images; without one, predictions are what they are.
    draws_images = roles.complete(PriorSettings, config.prior).draws_images
    decoding = roles.complete(ImageGenerator, generator.for_predictions(draws_images))
    seed = derive_seed(config.seed, "generator", number)
    if texts is not None:
        texts = IdentityPrior().sample(texts, n_draws=n_draws, seed=0)
    more: dict[str, Any] = {"prompts": prompts, "texts": texts}
    if branch is None or not low:
        copies = decoding.find_copies(sampled)
        # Nothing is random in a copy: the draws of a row are one.
        return (
            copies[::n_draws]
            if copies is not None
            else lambda shown: draw_rows("decoded", decoding, sampled, seed, **more)
        )

    def fuse(shown: ImageRows | None) -> DrawnImages:
        assert shown is not None

        def make(rows: range) -> dict[str, np.ndarray]:
            given = np.asarray(shown[np.arange(rows.start, rows.stop) // n_draws])
            part, place = _take_rows(decoding, sampled, rows, **more)
            return fuse_branches(decoding, part, given, branch.fusion, seed=seed, **place)

        return DrawnImages(("decoded", "high_level"), len(sampled), decoding.rows_at_once, make)

    return fuse


def draw_decoded(
    decoded: Callable[[ImageRows | None], DrawnImages],
    n_draws: int,
    low: DrawnImages | None,
    listener: ProgressListener,
) -> ImageRows:
    """Draw what `decode_images` returned, and return the decoded images of each row; they lie in a temporary file."""
    shown = None
    with tempfile.TemporaryDirectory() as folder, ImageWriter(Path(folder)) as writer:
        if low is not None:
            writer.open("low_level", low.n_images)
            writer.draw(low, 0)
            shown = writer.read("low_level")
        drawn = decoded(shown)
        for name in drawn.names:
            writer.open(name, drawn.n_images)
        with _watch_drawing(listener, drawn.n_images * len(drawn.names)) as advance:
            writer.draw(drawn, 0, advance)
        made = writer.read("decoded")  # a map outlives its file
    return made if n_draws == 1 else ImageRows(made.source, made.index.reshape(-1, n_draws))


@contextmanager
def _watch_drawing(listener: ProgressListener, n_images: int) -> Iterator[Callable[[int], None]]:
    """Show how many images of new trials are drawn; if they take long, say early for how long."""
    ends: list[float] = []  # of the first two batches; the first one also loads the generator
    n_drawn = 0
    with listener.progress("reconstructing", n_images) as advance:

        def tell(n: int) -> None:
            nonlocal n_drawn
            advance(n)
            n_drawn += n
            if len(ends) == 2:
                return
            ends.append(time.monotonic())
            left = (ends[-1] - ends[0]) / n * (n_images - n_drawn)
            if len(ends) == 2 and left >= LONG_S:
                with listener.watch("predict:") as show:
                    show(
                        0,
                        0,
                        f"{n_images} images take about {describe_seconds(left)}, measured on {n} of them",
                    )

        yield tell


def draw_rows(
    name: str,
    generator: ImageGenerator,
    embeddings: Embeddings,
    seed: int,
    *,
    prompts: Sequence[str] | None = None,
    texts: Embeddings | None = None,
) -> DrawnImages:
    """Return what draws the images of embeddings as a method, batch by batch where the generator can."""

    def make(rows: range) -> dict[str, np.ndarray]:
        part, more = _take_rows(generator, embeddings, rows, prompts=prompts, texts=texts)
        return {name: np.asarray(generator.generate(part, seed=seed, **more))}

    return DrawnImages((name,), len(embeddings), generator.rows_at_once, make)


def _take_rows(
    generator: ImageGenerator,
    embeddings: Embeddings,
    rows: range,
    *,
    prompts: Sequence[str] | None = None,
    texts: Embeddings | None = None,
) -> tuple[Embeddings, dict[str, Any]]:
    """Return a part of the embeddings, and what `generate` gets beside: prompts, texts, the number of the first row.

    A generator that takes no parts gets all of them.
    """
    more: dict[str, Any] = {} if generator.rows_at_once is None else {"first_row": rows.start}
    taken = slice(None) if generator.rows_at_once is None else slice(rows.start, rows.stop)

    def take(one: Embeddings) -> Embeddings:
        return one.take(taken)

    if prompts is not None:
        each = len(embeddings) // max(len(prompts), 1)  # a text leads all draws of its row, or one
        more["prompts"] = [prompts[row // each] for row in range(len(embeddings))[taken]]
    if texts is not None:
        more["texts"] = take(texts)
    return take(embeddings), more


def describe_same_draws(config: RunConfig, decoded: Images) -> str:
    """Say in one sentence that the draws of every image are the same; an empty text if they are not.

    Parameters
    ----------
    config
        Names the prior and the generator.
    decoded : uint8 array of shape (n_rows, [n_draws,] height, width, 3)
    """
    rows = ImageRows.of(decoded)
    n_draws = rows.index.shape[1] if rows.ndim == 5 else 1
    if n_draws == 1 or any((image != row[0]).any() for row in rows for image in row[1:]):
        return ""
    return (
        f"the {n_draws} draws of every image are identical: neither the prior {config.prior.kind} nor the "
        f"generator {config.generator.kind} draws at random; one draw gives the same result."
    )


def measure_repetition_noise(
    predict: Callable[[Responses], Embeddings], trials: Responses, *, n_train: float, n_test: float
) -> RepetitionNoise | None:
    """Return how predictions of the same training image differ between repetitions; None without repetitions.

    Where the encoder was fitted on averages, its weights do not depend on these differences, so that they are as
    large as those of new trials.

    Parameters
    ----------
    predict
        Of single trials.
    trials
        Single training trials; those shown once, and all after the first `MOST_REPEATED`, are left out.
    n_train, n_test
        Repetitions behind a training and a test trial.
    """
    keys = trials.trials[["subject", "stimulus_id"]]
    groups = keys.groupby(["subject", "stimulus_id"], sort=False)
    rows = np.flatnonzero(groups["subject"].transform("size").to_numpy() > 1)[:MOST_REPEATED]
    vectors = pd.DataFrame(predict(trials.select(rows)).flat()) if len(rows) else pd.DataFrame()
    same = keys.iloc[rows].reset_index(drop=True).groupby(["subject", "stimulus_id"], sort=False)
    counts = same["subject"].transform("size").to_numpy()
    kept = counts > 1  # the limit may have cut a group
    if not kept.any():
        return None
    means = vectors.groupby(same.ngroup().to_numpy()).transform("mean")
    # Deviations from a mean of n repetitions have (n - 1) / n of the variance of one repetition.
    scaled = (vectors - means).to_numpy() * np.sqrt(counts / np.maximum(counts - 1, 1))[:, None]
    return RepetitionNoise(scaled[kept].astype(np.float32), n_train, n_test)


def derange(ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return a row of another image for each row, shape (n_rows,); a single image keeps its own rows."""
    names = ids.astype(str)
    items = generator.permutation(np.unique(names))
    # A random cycle through all images, so that none keeps its own.
    successor = dict(zip(items, np.roll(items, 1), strict=True))
    first = {item: int(np.flatnonzero(names == item)[0]) for item in items}
    return np.array([first[successor[name]] for name in names])
