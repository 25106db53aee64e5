"""Checks the training data of later stages: of priors, generators and captions.

A prior, a generator's own training, and captions that are retrieved may know the training images of their fold and
nothing else. The material is taken from the split again: fits that take seconds are made anew and compared, and the ids
that a fit was given are compared with those of the fold. Longer trainings (refiners, diffusion priors, adapters) are
made again with ``--refit``. Images that come out are judged by `braindecode_vis.parts.audit.results`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from braindecode_vis.base import roles
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import BraindecodeVisError, DataError
from braindecode_vis.base.contracts import Context, ImageGenerator
from braindecode_vis.base.digests import hash_once
from braindecode_vis.base.stimuli import resize_image
from braindecode_vis.base.store import hash_file, read_json
from braindecode_vis.parts.audit.choices import describe_advantage
from braindecode_vis.parts.audit.differences import compare_files
from braindecode_vis.parts.audit.recompute import RecomputedRun
from braindecode_vis.pipeline import decoding, preparing
from braindecode_vis.pipeline.leaks.findings import AuditFinding
from braindecode_vis.pipeline.leaks.run_files import AuditedRun, list_first, name_fold
from braindecode_vis.pipeline.reconstruction import read_fits, refit_prior

TOLERANCE = 1e-3  # relative, of means, gains and weights
#: Priors whose fit is a mean, a gain or a table.
CHEAP_PRIORS = ("identity", "mean", "spread", "moments", "neighbours")
N_DRAWS = 4  # of a diffusion prior, whose mean is compared
KNOWN_COMPONENTS, KNOWN_TOLERANCE = (
    32,
    0.02,
)  # that images brought along by weights are compared in, and how near
WORDS, OTHER_CAPTIONS = (
    4,
    0.02,
)  # of a caption that is no single name; share of captions that rounding may change
_WORD = re.compile(r"\w+")


# --- priors and generators ----------------------------------------------------------------------------------


class _Material:
    """The material of one fold's prior and generator, taken from the split again."""

    def __init__(self, run: AuditedRun, again: RecomputedRun, number: int, fits: Path) -> None:
        self.run, self.again, self.number, self.fits = run, again, number, fits
        self.embeddings = decoding.map_for_generator(again, number)[0]
        device = Context(device=again.config.retrieval.device)
        self.data = decoding.make_generator_data(again, number, self.embeddings, device)

    def open_folder(self, name: str) -> Path:
        """Return a new folder for what is written again."""
        folder = self.again.folder.path / f"{name}{self.number}"
        folder.mkdir()
        return folder

    @cached_property
    def predicted(self) -> Embeddings:
        """Predictions of the test trials, as the generator takes them."""
        return decoding.predict_for_generator(self.again, self.number)[0]

    @cached_property
    def generator(self) -> Any:
        """The generator with the training that lies in the run."""
        generator = read_fits(self.fits, self.again.config, self.data)[1]
        generator.bind(self.data.context)
        return generator

    def fit_prior(self) -> Any:
        """Return the prior, fitted again."""
        again = self.again
        # Others are not asked for their images, and a refiner would be trained to be asked for nothing.
        generator = self.generator if again.prior.asks_generator else None
        tested = self.embeddings.select(pd.unique(self.predicted.ids))
        return refit_prior(again.config, again.prior, self.data, generator, tested, self.number)


def check_material(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Take the material of priors and generators from the split again, and fit them again where that is cheap."""
    record = run.reconstructed
    if record is None or again.config.decodes_categories:
        return []
    findings = []
    for number in range(len(run.folds)):
        fits, where = record.path / "fits" / preparing.name_fold(number), name_fold(number)
        problems = list(_check_record(run, number, fits))
        material = _Material(run, again, number, fits)
        problems += filter(
            None, (check(material) for check in (_check_prior, _check_training, _check_weights))
        )
        findings += [AuditFinding("material", "leak", text, where) for text in problems]
    text = "priors and generators use only the training images of their fold."
    return findings or [AuditFinding("material", "ok", text)]


def _check_record(run: AuditedRun, number: int, fits: Path) -> Iterator[str]:
    """Yield what the fits say to have been given and the fold does not have."""
    path = fits / "material.json"
    if not path.is_file():
        run.state("material", "by record", "ids of the material", "an earlier version did not write them")
        return
    told = read_json(path)
    train = set(run.responses.stimulus_ids[run.folds[number].train].astype(str).tolist())
    for decoder in sorted((fits / "captions").glob("*")):
        # Retrieved captions are kept by image; decoders that learn say which images they learnt from.
        bank = decoder / "captions.json"
        knows = read_json(bank) if bank.is_file() else read_json(decoder / "decoder.json").get("images", [])
        if foreign := set(map(str, knows)) - train:
            yield (
                f"the decoder of captions {decoder.name} had {len(foreign)} image(s) that the fold does not learn "
                f"from, first {list_first(foreign)}."
            )
    test = set(run.responses.stimulus_ids[run.folds[number].test].astype(str).tolist()) - train
    for name, words in (
        ("images", "the generator"),
        ("predicted", "the prior's predictions"),
        ("known", "the prior"),
    ):
        ids = set(map(str, told.get(name) or []))
        foreign = ids - train if name != "known" else ids & test
        if foreign:
            side = " of the test" if foreign & test else ""
            rest = f"that the fold does not learn from, first {list_first(foreign)}"
            yield f"{words} had {len(foreign)} image(s){side} {rest}."
        elif name == "images" and ids != train:
            yield f"{words} had {len(ids)} of the {len(train)} training images of the fold."


def _check_prior(material: _Material) -> str:
    run, kind = material.run, str(material.again.config.prior.kind)
    folder = material.fits / "prior"
    if not (folder.is_dir() and any(folder.iterdir())):
        run.state("material", "recomputed", f"prior {kind}")  # keeps nothing
        return ""
    if kind not in CHEAP_PRIORS and not run.thorough:
        run.state("material", "by record", f"prior {kind}", "it is trained; add --refit")
        return ""
    made, written = material.fit_prior(), material.open_folder("prior")
    made.write(written)
    difference = compare_files(folder, written, TOLERANCE)
    if not difference:
        run.state("material", "recomputed", f"prior {kind}")
        return ""
    if kind in CHEAP_PRIORS:
        return f"the prior {kind} is not that of the training split: {difference}."
    stored = read_fits(material.fits, material.again.config, material.data)[0]
    truth = material.embeddings.select(list(material.predicted.ids)).flat()

    def measure(prior: Any) -> np.ndarray:
        drawn = prior.sample(material.predicted, n_draws=N_DRAWS, seed=0).flat()
        mean = drawn.reshape(len(truth), N_DRAWS, -1).mean(axis=1)
        return np.asarray(np.square(mean - truth).mean(axis=1))

    return _judge_advantage(run, f"prior {kind}", measure, stored, made)


def _check_training(material: _Material) -> str:
    """Train the generator again, if it was trained in the run."""
    run, kind = material.run, str(material.again.config.generator.kind)
    folder = material.fits / "generator"
    if not (folder.is_dir() and any(folder.iterdir())):
        run.state(
            "material", "recomputed", f"generator {kind}"
        )  # made of the training images whenever it is asked
        return ""
    if not run.thorough:
        run.state("material", "by record", f"generator {kind}", "it is trained; add --refit")
        return ""
    made = roles.build(ImageGenerator, material.again.generator, material.data)
    made.bind(material.data.context)
    written = material.open_folder("generator")
    made.write(written)
    difference = compare_files(folder, written, TOLERANCE)
    if not difference:
        run.state("material", "recomputed", f"generator {kind}")
        return ""
    stimuli, predicted = run.stimuli, material.predicted

    def measure(generator: Any) -> np.ndarray:
        images = generator.generate(predicted, seed=0)
        height, width = images.shape[1:3]
        seen = np.stack([resize_image(stimuli.read_image(name), height, width) for name in predicted.ids])
        return np.asarray(np.square(images.astype(np.float64) - seen).mean(axis=(1, 2, 3)))

    return _judge_advantage(run, f"generator {kind}", measure, material.generator, made)


def _judge_advantage(
    run: AuditedRun, name: str, measure: Callable[[Any], np.ndarray], stored: Any, made: Any
) -> str:
    """Compare what two trainings know of the test; their weights differ, as those of two machines do."""
    text = describe_advantage(measure(stored), measure(made))
    if not text:
        reason = "weights differ, as on another machine; they contain no more information about the test"
        run.state("material", "by record", name, reason)
    return f"{name}: {text}" if text else ""


def _check_weights(material: _Material) -> str:
    """Compare the images that weights of a generator were trained on, which they bring along, with the test's."""
    generator, run = material.again.generator, material.run
    if not generator.knows_images:
        return ""
    tested = material.embeddings.select(pd.unique(material.predicted.ids))
    try:
        known = material.generator.read_known_images()
    except BraindecodeVisError as error:
        run.state("material", "by record", "images of the generator's weights", str(error))
        return ""
    if known.space != tested.space:
        return ""
    # What they bring along is rounded in a few components: known images are compared in those.
    rows, images = tested.flat().astype(np.float64), known.flat().astype(np.float64)
    centre = images.mean(axis=0)
    basis = np.linalg.svd(images - centre, full_matrices=False)[2][: min(KNOWN_COMPONENTS, len(images) - 1)]
    left, right = (rows - centre) @ basis.T, (images - centre) @ basis.T
    usual = float(np.sqrt(np.square(right).sum(axis=1).mean()))
    distances = cdist(left, right).min(axis=1)
    same = np.flatnonzero(distances < KNOWN_TOLERANCE * usual)
    if not len(same):
        return ""
    first = str(tested.ids[int(same[0])])
    return f"the weights of the generator were trained on {len(same)} test image(s), first {first}."


# --- captions -----------------------------------------------------------------------------------------------


def check_captions(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Retrieve captions again, and look for texts of test images among those of training images."""
    findings = _check_descriptions(run, again)
    if run.evaluated is None or not (run.evaluated.path / "captions.json").is_file():
        return findings
    from braindecode_vis.embeddings.caption_bank import read_caption_bank
    from braindecode_vis.scoring.caption_retrieval import retrieve_nearest
    from braindecode_vis.scoring.caption_scores import NEAREST

    config = again.config.evaluation.captions
    try:
        path = Path() if config is None else config.bank.expanduser()
        if (
            not path.is_file()
            or hash_file(path) != run.evaluated.fields["evaluation"]["captions"]["bank_sha256"]
        ):
            raise DataError(f"{path} is not the caption bank of the run")
        bank = read_caption_bank(path)
    except (BraindecodeVisError, KeyError) as error:
        run.state("material", "by record", "captions", str(error))
        return findings
    assert config is not None
    pairs, training = [], []
    findings += _compare_folds(run, bank)
    for number, fold in enumerate(run.folds):
        pairs.append(decoding.predict_for_generator(again, number))
        ids = run.responses.stimulus_ids
        training.append(pairs[-1][1].select(list(pd.unique(ids[fold.train]))))
    # Earlier versions kept one caption a row, the captioner's where there was one.
    sources = run.evaluated.path / "caption_sources.json"
    if sources.is_file() or config.captioner is None:
        stored = (
            read_json(sources)[NEAREST]
            if sources.is_file()
            else read_json(sources.with_name("captions.json"))["decoded"]
        )
        made = retrieve_nearest([queries for queries, _ in pairs], training, bank, device=config.torch_device)
        n_other = sum(a != b for a, b in zip(made, stored, strict=False))
        if len(made) != len(stored) or n_other > OTHER_CAPTIONS * len(made):
            text = f"{n_other} of {len(made)} captions are not those of the nearest training image."
            findings.append(AuditFinding("captions", "leak", text))
    run.state("material", "recomputed", "captions")
    text = "retrieved captions are those of training images."
    return findings or [AuditFinding("captions", "ok", text)]


def _check_descriptions(run: AuditedRun, again: RecomputedRun) -> list[AuditFinding]:
    """Look for descriptions of test images among those of training images, which a mapping of texts learns from."""
    from braindecode_vis.embeddings.caption_bank import read_caption_bank

    config = again.config.evaluation.descriptions
    if run.evaluated is None or config is None or config.captions is None:
        return []
    recorded = (run.evaluated.fields.get("evaluation") or {}).get("descriptions") or {}
    if not config.file.is_file() or hash_once(config.file) != recorded.get("captions_digest"):
        run.state("material", "by record", "descriptions", f"{config.file} is not the file of the run")
        return []
    run.state("material", "recomputed", "descriptions")
    return _compare_folds(run, read_caption_bank(config.file))


def _compare_folds(run: AuditedRun, bank: Mapping[str, Sequence[str]]) -> list[AuditFinding]:
    findings, ids = [], run.responses.stimulus_ids
    for number, fold in enumerate(run.folds):
        train, test = (set(ids[rows].astype(str).tolist()) for rows in (fold.train, fold.test))
        if item := compare_captions(bank, train - test, test - train):
            findings.append(replace(item, where=name_fold(number)))
    return findings


def compare_captions(
    bank: Mapping[str, Sequence[str]], train: Collection[str], test: Collection[str]
) -> AuditFinding | None:
    """Return a finding where test images have the sentences of training images; None where few have, as by chance.

    Case and signs are not compared. A name alone may be the right text of many images; a sentence of `WORDS` words is
    not, but captions of a large bank agree now and then: training images say how often.

    Parameters
    ----------
    bank
        Texts of each image.
    train, test
        Ids of training images and of test images.
    """
    texts = {
        name: {
            " ".join(found)
            for text in bank.get(name, ())
            if len(found := _WORD.findall(text.casefold())) >= WORDS
        }
        for name in (*train, *test)
    }
    n_images = Counter(text for name in train for text in texts[name])
    known, asked = ([name for name in sorted(side) if texts[name]] for side in (train, test))
    same = [name for name in asked if any(n_images[text] for text in texts[name])]
    usual = sum(any(n_images[text] > 1 for text in texts[name]) for name in known) / max(1, len(known))
    most = len(same) > len(asked) / 2
    if len(same) < 3 or not (most or len(same) > 3 * usual * len(asked)):
        return None
    text = (
        f"{len(same)} of {len(asked)} test images have exactly the text of a training image, first {same[0]}; of "
        f"training images {usual:.0%} share one"
    )
    if most:
        return AuditFinding("captions", "leak", f"{text}: texts of training images can be those of the test.")
    return AuditFinding("captions", "warning", f"{text}: look for texts of test images under other ids.")
