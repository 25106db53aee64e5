"""The steps before a fit: the stages preprocess, embed and pretrain, the trials of a fold, and its unfitted encoder.

What is fitted here is fitted on training trials and training images. A tested subject whose other recordings the
encoder was pretrained on is refused, or named in the protocol. `learning` fits the encoder, and `synthetic` makes
further trials for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError
from braindecode_vis.base.contracts import BrainEncoder, Context, Dataset, ImageEncoder
from braindecode_vis.base.devices import count_launched, is_first
from braindecode_vis.base.locks import is_locked
from braindecode_vis.base.seeds import derive_seed
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import RunConfig, read_config
from braindecode_vis.datasets.corpus.recordings import read_source_card
from braindecode_vis.datasets.manifests import find_manifest
from braindecode_vis.encoders.parcels_config import ParcelsConfig, read_description
from braindecode_vis.pipeline.runs import (
    STAGE_VERSIONS,
    ProgressListener,
    Run,
    keep_config,
    lend_context,
    open_run,
    remember,
)
from braindecode_vis.preprocessing.learnt_statistics import LearntStatistics
from braindecode_vis.preprocessing.selection import average_repetitions, pick_rows
from braindecode_vis.preprocessing.splits import Fold, Split, split_imagined_trials
from braindecode_vis.training.pretraining_config import PretrainConfig
from braindecode_vis.training.pretraining_data import read_learnt

if TYPE_CHECKING:
    from braindecode_vis.training.pretraining_probes import LabelledSet


@dataclass(frozen=True)
class Prepared:
    """What preprocessing gives: responses, stimuli and the split.

    `folds` are those of the split without the test trials that have no picture, whose rows `imagined` keeps; see
    `braindecode_vis.preprocessing.splits`.
    """

    artifact: store.Artifact
    responses: Responses
    stimuli: StimulusSet
    split: Split

    @cached_property
    def _parted(self) -> tuple[tuple[Fold, ...], tuple[np.ndarray, ...]]:
        return split_imagined_trials(self.responses.trials, self.stimuli, self.split.folds)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The folds, tested on trials that show a picture."""
        return self._parted[0]

    @property
    def imagined(self) -> tuple[np.ndarray, ...]:
        """Rows of the test trials of each fold that imagine something without a picture."""
        return self._parted[1]

    @property
    def declared_protocol(self) -> str:
        """What the data set says of its published split, such as which shared images of NSD, and of its estimates."""
        meta = store.read_json(self.artifact.path / "responses" / "meta.json").get("provenance", {})
        keys = ["protocol"] if self.split.protocol.startswith("published") else []
        return "; ".join(str(meta[key]) for key in [*keys, "estimates"] if key in meta)


@dataclass(frozen=True)
class TargetBank:
    """The image encoder of one fold, and the embedding of every image in its space."""

    artifact: store.Artifact
    encoder: ImageEncoder
    embeddings: Embeddings


@remember
def preprocess(run: Run) -> Prepared:
    """Read the recording and its images, and fix the split."""
    config = run.config
    # No path is hashed: a data set that was moved is the same one, as its digests say.
    fields = {
        "dataset": config.dataset.hashed_fields(),
        "split": config.split.hashed_fields(),
        "inputs": config.dataset.hash_inputs(),
        "seed": config.seed,
    }

    def compute(folder: Path) -> dict[str, Any]:
        asked = [STAGE_VERSIONS["preprocess"], *(fields[name] for name in ("dataset", "inputs", "seed"))]
        with lend_context(run, "preprocess", asked) as context:
            # Two processes that a file system without locks lets in would write the same kept trials.
            parts = context.checkpoints if is_locked(run.folder.path) else None
            write_dataset(config.dataset, folder, seed=config.seed, listener=run.listener, parts=parts)
        responses, stimuli = read_dataset(folder)
        concepts = stimuli.concepts_of(responses.stimulus_ids)
        split = config.split.make(
            responses.trials, concepts, seed=config.seed, knows_images=stimuli.knows_images
        )
        check_learnt(config, split, responses.trials)
        store.write_json(folder / "split.json", split.as_json())
        return {"inputs": fields["inputs"], "protocol": split.protocol}

    artifact = run.produce("preprocess", fields, {}, compute)
    if not run.follows:
        keep_config(run)  # not earlier: a run folder holds no configuration whose data set cannot be read
    responses, stimuli = read_dataset(artifact.path)
    concepts = stimuli.concepts_of(responses.stimulus_ids)
    # Read back and not kept, so that a resumed run and a fresh one have the very same folds.
    split = Split.from_json(store.read_json(artifact.path / "split.json"), responses.trials, concepts)
    return Prepared(artifact, responses, stimuli, split)


def check_learnt(config: RunConfig, split: Split, trials: pd.DataFrame) -> None:
    """Raise where whitening or scaling was learnt from declared training trials that a fold tests.

    Most such splits are refused with the configuration; one that turns into another split, for want of images, is not.
    """
    learnt = roles.complete(Dataset, config.dataset).learns_before_split()
    declared = trials["split"].to_numpy(dtype=object) == "train"
    if learnt and any(declared[fold.test].any() for fold in split.folds):
        raise ConfigError(
            f"dataset.{learnt[0]} learns from trials that are declared as training, but the split "
            f"{config.split.kind!r} tests some of them; leave it out, or set split.kind to published."
        )


def write_dataset(
    dataset: Any,
    folder: Path,
    *,
    seed: int,
    listener: ProgressListener,
    learnt: LearntStatistics | None = None,
    transductive: bool = False,
    geometry: Any = None,
    parts: Path | None = None,
) -> None:
    """Let a small data set write itself, and stream a large one through the preprocessing of its modality.

    Parameters
    ----------
    dataset
        Its settings.
    folder
        Gets ``responses`` and ``stimuli``.
    seed
        Root seed of the run, for data sets that are drawn.
    listener
        Shows progress.
    learnt
        Whitening, scaling and standardising of a finished run, which is applied in place of learning any here.
    transductive
        Learn them from all trials, whatever their split.
    geometry
        Voxels of a finished run, in place of a mask that would be found in the images of time series.
    parts
        Keeps finished sessions of a data set that is streamed, for the next call after a kill; None keeps nothing.
    """
    source = roles.find_source(dataset)
    applied: dict[str, Any] = {"parts": parts} if parts is not None else {}
    applied |= {} if learnt is None else {"learnt": learnt}
    applied |= {"transductive": True} if transductive else {}
    # Betas and epochs carry their voxels and channels; only time series look for a mask.
    if source == "open_bold" and geometry is not None:
        applied["geometry"] = geometry
    if source == "write":
        dataset.write(folder, seed=derive_seed(seed, "dataset"))
        return
    # Imported one by one: mne and nilearn take seconds, and no data set needs both.
    with listener.watch("preprocess:") as progress:
        if source == "open_epochs":
            from braindecode_vis.preprocessing.meeg import write_meeg

            write_meeg(dataset, folder, progress=progress, **applied)
        elif source == "open_bold":
            from braindecode_vis.preprocessing.bold import write_bold

            write_bold(dataset, folder, progress=progress, **applied)
        else:
            from braindecode_vis.preprocessing.betas import write_fmri

            write_fmri(dataset, folder, progress=progress, **applied)


def read_dataset(folder: Path) -> tuple[Responses, StimulusSet]:
    """Return what `write_dataset` wrote, as memory maps."""
    return store.read_responses(folder / "responses"), store.read_stimuli(folder / "stimuli")


@remember
def embed(run: Run) -> list[TargetBank]:
    """Encode every image; encoders that are fitted see the training images of their fold only."""
    refuse_categories(run, "embed")
    return [embed_fold(run, number) for number in range(len(preprocess(run).folds))]


def embed_fold(run: Run, number: int) -> TargetBank:
    """Encode every image for one fold."""
    prepared = preprocess(run)
    if not prepared.stimuli.knows_images:
        raise ConfigError(
            f"the encoder {run.config.encoder.kind} predicts pictures, but the data have only the class "
            "of each trial; set encoder.kind to lda, logistic or network_categories, or give pictures "
            "and the picture of each trial."
        )
    # Where nothing is fitted, one artifact serves all folds.
    own = number if run.target.fitted_on_training_images else None
    found: TargetBank = run.once(f"embed {own}", lambda: _embed_images(run, prepared, own))
    return found


def _embed_images(run: Run, prepared: Prepared, number: int | None) -> TargetBank:
    role, stimuli = roles.find_image_encoder_role(run.target), prepared.stimuli.select_pictured()
    fields = {"target": run.target.hashed_fields(), "fold": number}

    def compute(folder: Path) -> None:
        encoder = roles.build(role, run.target)
        encoder.bind(Context(images=stimuli, device=run.config.retrieval.device))
        # An encoder that serves all folds (number None) is not fitted, and does not look at these images.
        ids = list(pd.unique(prepared.responses.stimulus_ids[prepared.folds[number or 0].train]))
        bank = encoder.embed(stimuli, ids, lambda pretrained: embed_cached(run, pretrained, stimuli))
        encoder.write(folder)
        store.write_embeddings(folder, bank)

    upstream = {"preprocess": prepared.artifact.fingerprint}
    artifact = run.produce("embed", fields, upstream, compute, name_fold(number))
    encoder = roles.read(role, run.target, artifact.path)
    return TargetBank(artifact, encoder, store.read_embeddings(artifact.path))


def embed_cached(run: Run, pretrained: Any, stimuli: StimulusSet) -> Embeddings:
    """Return embeddings of images by a pretrained encoder; what any run has embedded is read from the cache."""
    from braindecode_vis.base.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import embed_stimuli

    with run.listener.progress("encoding images", len(stimuli)) as advance:
        return embed_stimuli(pretrained, stimuli, cache=find_cache_folder(), advance=advance)


def refuse_categories(run: Run, verb: str) -> None:
    """Raise `ConfigError` where the run decodes categories, so that the verb has no image to work with."""
    if run.config.decodes_categories:
        raise ConfigError(
            f"{verb} needs to know which image was seen, but the encoder {run.config.encoder.kind} "
            "decodes categories; "
            "use train, evaluate and report, or another encoder.kind."
        )


def name_fold(number: int | None) -> str:
    """Return the name of a fold's artifact; nothing where one serves all folds."""
    return "" if number is None else f"fold{number:02d}"


@remember
def pretrain(run: Run) -> store.Artifact:
    """Pretrain the encoder of the section ``pretrain`` on trials that no fold tests, without labels.

    Raises
    ------
    ConfigError
        If the configuration has no such section.
    DataError
        If every trial is tested by some fold.
    """
    return _pretrain(run, None)


def pretrain_fold(run: Run, number: int) -> store.Artifact | None:
    """Pretrain the encoder that a fold starts from, on the training trials of this fold; None if it starts anew.

    With one fold, it is what `pretrain` gives.
    """
    if not run.encoder.uses_pretraining:
        return None
    config = run.config.pretrain
    # What is learnt from corpora is the same for all folds.
    of_run = config is None or not config.corpus
    own = number if of_run and len(preprocess(run).split.folds) > 1 else None
    found: store.Artifact = run.once(f"pretrain {own}", lambda: _pretrain(run, own))
    return found


def name_pretraining(run: Run) -> dict[str, str]:
    """Return the fingerprint of what the encoder of each fold starts from; nothing where they start anew."""
    if not run.encoder.uses_pretraining:
        return {}
    found = [pretrain_fold(run, number) for number in range(len(preprocess(run).split.folds))]
    return {f"pretrain{n}": artifact.fingerprint for n, artifact in enumerate(found) if artifact is not None}


def describe_start(run: Run) -> str:
    """Return what the encoder of a run was pretrained on, in words; see `describe_pretraining`."""
    prepared = preprocess(run)
    tested = {
        str(s) for fold in prepared.split.folds for s in prepared.responses.trials["subject"].iloc[fold.test]
    }
    # Asked before anything is pretrained, which may take days, and once more of what was made where corpora are gone.
    made = run.seen.get("pretrain None")
    key = f"start in words {made is not None}"
    folder = None if made is None else made.path
    return str(run.once(key, lambda: describe_pretraining(run.config, tested, folder)))


def _pretrain(run: Run, number: int | None) -> store.Artifact:
    config = run.config.pretrain
    if config is None:
        raise ConfigError(
            f"{run.config.name} has no section pretrain; add one, for example --set pretrain.n_epochs=100."
        )
    if config.corpus or config.start_from is not None:
        describe_start(run)
    seed = derive_seed(run.config.seed, "pretrain", *([] if number is None else [number]))
    fields = {"pretrain": config.hashed_fields(), "seed": run.config.seed}
    fields |= {} if number is None else {"fold": number}
    # Corpora are all that is learnt from where they are named.
    upstream = {} if config.corpus else {"preprocess": preprocess(run).artifact.fingerprint}
    responses = None
    if not config.corpus:
        responses, n_others = _keep_training(preprocess(run), number)
        # Earlier versions read these, such as the training trials of a subject whom the fold leaves out.
        fields |= {"n_hidden": n_others} if n_others else {}
    if config.guide == "target":
        upstream["embed"] = embed_fold(run, number or 0).artifact.fingerprint

    def compute(folder: Path) -> dict[str, Any]:
        from braindecode_vis.training.pretraining import pretrain as fit

        with lend_context(run, f"pretrain{number or 0:02d}", [fields, upstream]) as context:
            assert context.checkpoints is not None
            if not run.follows:
                context.checkpoints.mkdir(parents=True, exist_ok=True)
            found = fit(
                config, responses, folder=folder, checkpoints=context.checkpoints, seed=seed,
                progress=run.listener.progress, labelled=read_labelled(config, seed, context.checkpoints),
                guide=find_guide(run, number),
            )  # fmt: skip
        return {**found, "n_processes": count_launched()}

    return run.produce("pretrain", fields, upstream, compute, name_fold(number))


def find_guide(run: Run, number: int | None) -> Embeddings | None:
    """Return the vectors that guide the masks of the pretraining, of images or of what captions say of them."""
    config = run.config.pretrain
    if config is None or config.guide is None:
        return None
    if config.guide == "target":
        return embed_fold(run, number or 0).embeddings
    from braindecode_vis.embeddings.caption_bank import read_caption_bank
    from braindecode_vis.embeddings.sentence_encoder import SentenceEncoder, find_sentence_folder

    assert config.captions is not None  # as its settings say
    shown = {str(name) for name in preprocess(run).stimuli.ids}
    texts = {
        name: found
        for name, found in read_caption_bank(config.captions.expanduser()).items()
        if name in shown
    }
    if not texts:
        raise DataError(
            f"{config.captions} has no caption for the images of the run; correct its ids or pretrain.captions."
        )
    folder = find_sentence_folder(config.sentence_encoder, "pretrain.sentence_encoder")
    vectors = SentenceEncoder(folder, device=config.device).embed_texts(list(texts.values()))
    return Embeddings(vectors, np.array(list(texts), dtype=object), f"sentences/{folder.name}")


def _keep_training(prepared: Prepared, number: int | None) -> tuple[Responses, int]:
    """Return the responses with all but the training trials of a fold declared as test trials; how many are no test.

    Without a fold, where there are several, every trial that some fold tests is declared as a test trial.
    """
    tested, folds = np.zeros(prepared.responses.n_trials, bool), prepared.split.folds
    of_all = number is None and len(folds) > 1
    for fold in folds if of_all else [folds[number or 0]]:
        tested[fold.test] = True
    declared = prepared.responses.trials["split"].to_numpy(dtype=object)
    n_others = 0
    if not of_all:
        others = ~tested & (declared != "test")
        others[folds[number or 0].train] = False
        tested, n_others = tested | others, int(others.sum())
    if tested.all():
        raise DataError(
            "every trial is tested by some fold, so none is left for the pretraining; with "
            "encoder.network.pretrained=pretrain each fold pretrains on its own training trials."
        )
    # Told by the column: pretraining reads no row of the split "test".
    trials = prepared.responses.trials.assign(split=np.where(tested, "test", declared))
    return prepared.responses.with_trials(trials), n_others


def read_labelled(config: PretrainConfig, seed: int, folder: Path) -> LabelledSet | None:
    """Return the labelled set of the probes, if they ask for one; its test trials are never read.

    Parameters
    ----------
    config
        Names a run folder or a configuration file.
    seed
        Decides which training images test the probe.
    folder
        Where a configuration file's responses and embeddings are computed.
    """
    if config.probes is None or config.probes.labelled is None or not is_first():
        return None
    from braindecode_vis.training.pretraining_probes import make_labelled

    source = config.probes.labelled_source
    assert source is not None
    run = open_run(read_config(str(source)), source if source.is_dir() else folder / "labelled")
    with run.hold():
        prepared, bank = preprocess(run), embed_fold(run, 0)
    return make_labelled(prepared.responses.select(prepared.split.folds[0].train), bank.embeddings, seed)


def count_folds(run: Run) -> int:
    """Return how many fits `train` makes."""
    prepared = preprocess(run)
    return len(prepared.split.folds if run.config.decodes_categories else prepared.folds)


def build_encoder(run: Run, number: int, context: Context | None = None) -> BrainEncoder:
    """Return a new encoder of a fold, with the images and texts that it learns from beside trials.

    Parameters
    ----------
    run
        The run.
    number
        Number of the fold, for the seed.
    context
        Where its checkpoints go, and who gets its progress; see `lend_context`.
    """
    encoder = roles.build(BrainEncoder, run.encoder, seed=derive_seed(run.config.seed, "train", number))
    lent = Context(device=run.config.retrieval.device) if context is None else context
    encoder.bind(lend_stimuli(run, number, lent))
    return encoder


def lend_stimuli(run: Run, number: int, context: Context) -> Context:
    """Return the context with the images of every stimulus, and what the settings of the encoder ask for beside.

    That is their texts, and the encoder that was pretrained for the fold. Training looks at those of its own trials.
    """
    config, stimuli = run.config, preprocess(run).stimuli
    texts = None
    if run.encoder.reads_text:
        from braindecode_vis.embeddings.text import embed_concepts, spread_over_images

        texts = run.once(
            "texts", lambda: spread_over_images(embed_concepts(config.text, config.target, stimuli), stimuli)
        )
    pretrained = pretrain_fold(run, number)
    folder = None if pretrained is None else pretrained.path
    return replace(context, images=stimuli, texts=texts, pretrained=folder)


def pick_trials(responses: Responses, rows: np.ndarray, repeats: str) -> Responses:
    """Return the given trials, their repetitions averaged if `repeats` is ``averaged``."""
    return average_repetitions(responses, rows) if repeats == "averaged" else pick_rows(responses, rows)


def name_classes(prepared: Prepared) -> Responses:
    """Return all trials with their class in the column `concept`: that of the table, or else that of the picture."""
    responses = prepared.responses
    if "concept" in responses.trials:
        return responses
    concepts = prepared.stimuli.concepts_of(responses.stimulus_ids)
    return responses.with_trials(responses.trials.assign(concept=concepts))


def pick_labelled_trials(prepared: Prepared, rows: np.ndarray, repeats: str) -> Responses:
    """Return the given trials with the concept of each in the trial table; see `pick_trials`."""
    responses = pick_trials(prepared.responses, rows, repeats)
    concepts = prepared.stimuli.concepts_of(responses.stimulus_ids)
    return responses.with_trials(responses.trials.assign(concept=concepts))


# --- who an encoder was pretrained on ----------------------------------------------------------------------
# The same person is a subject of the data set at hand with the same label, or whom the corpus calls so
# (``corpus --people``). Two data sets that give one person two labels, without such a table, cannot be seen through.


def describe_pretraining(config: RunConfig, tested: Collection[str], made: Path | None = None) -> str:
    """Return what the encoder of a run was pretrained on, in words for its protocol; empty if that is not known.

    Parameters
    ----------
    config
        Of the run.
    tested
        Labels of the subjects who are tested.
    made
        What the run has pretrained, which knows its corpora where those are gone.

    Raises
    ------
    ConfigError
        If a tested subject is among the persons of a corpus, and ``pretrain.shared_subjects`` does not name them.
    """
    earlier = list_earlier(config, made)
    corpora = list_corpora(config, made) or earlier
    if not corpora:
        return config.pretrain.on_trials if config.uses_pretraining and config.pretrain is not None else ""
    shared = find_shared_subjects([*corpora, *earlier], name_sources(config), tested)
    if shared and (config.pretrain is None or config.pretrain.shared_subjects == "refuse"):
        names = ", ".join(dict.fromkeys(str(corpus["name"]) for corpus in [*corpora, *earlier]))
        raise ConfigError(
            f"subject(s) {', '.join(shared)} are tested here, but the encoder is pretrained on their "
            f"recordings (corpus {names}); hold them out there (corpus --hold-out "
            f"{name_sources(config)[0]}/{shared[0]}), or set pretrain.shared_subjects=named; the "
            "protocol will then say so."
        )
    n, hours = (sum(corpus[key] for corpus in corpora) for key in ("n_persons", "hours"))
    words = f"encoder pretrained without labels on corpora of {n} persons, {hours:.4g} h"
    if config.uses_pretraining and config.pretrain is not None and not config.pretrain.corpus:
        words = f"{config.pretrain.on_trials}, begun from corpora of {n} persons, {hours:.4g} h"
    return f"{words}, recordings of tested subject(s) {', '.join(shared)} among them" if shared else words


def find_shared_subjects(
    corpora: Sequence[Mapping[str, Any]], sources: Sequence[str], tested: Collection[str]
) -> list[str]:
    """Return the tested subjects among the persons that corpora learn from; whom they hold out is not among these.

    Parameters
    ----------
    corpora
        Each with `subjects`: rows of `source`, `subject` and `person`.
    sources
        Names of the data set at hand.
    tested
        Labels of its tested subjects.

    Examples
    --------
    >>> rows = [{"source": "BOLD5000", "subject": "CSI1", "person": "BOLD5000/CSI1"}]
    >>> find_shared_subjects([{"subjects": rows}], ["bold5000"], ["CSI1", "CSI2"])
    ['CSI1']
    """
    learnt = [row for corpus in corpora for row in corpus["subjects"]]
    who = {
        _name_person(name)
        for row in learnt
        for name in (f"{row['source']}/{row['subject']}", str(row["person"]))
    }
    return sorted(
        s for s in {str(s) for s in tested} if {_name_person(f"{source}/{s}") for source in sources} & who
    )


def list_corpora(config: RunConfig, made: Path | None = None) -> list[dict[str, Any]]:
    """Return of each corpus that the encoder comes from its name, hours, persons and subjects, as far as known."""
    named: Any = config.pretrain.corpus if config.uses_pretraining and config.pretrain is not None else ()
    if named and all(Path(folder).expanduser().is_dir() for folder in named):
        return [_describe_corpus(Path(folder).expanduser()) for folder in named]
    folder = getattr(getattr(config.encoder, "network", None), "pretrained", None)
    folder = (made if named else None) if config.uses_pretraining else folder
    return [] if folder is None else _keep_known(read_description(Path(folder)).get("corpora", []))


def list_earlier(config: RunConfig, made: Path | None = None) -> list[dict[str, Any]]:
    """Return the corpora that the encoder, or one of a branch, had learnt from before those of `list_corpora`.

    They are known from ``start_from``, and from the folders or files that encoders start from.
    """
    starts = [made]
    if config.uses_pretraining and config.pretrain is not None:
        starts.append(config.pretrain.start_from)
    for key, settings in config.walk():
        if isinstance(settings, ParcelsConfig) and key.startswith(("encoder.", "reconstruction.")):
            starts.append(settings.pretrained if isinstance(settings.pretrained, Path) else None)
    known = [s for s in starts if s is not None and s.expanduser().exists()]
    found: dict[str, dict[str, Any]] = {}
    for corpus in _keep_known([corpus for start in known for corpus in read_learnt(start)]):
        found.setdefault(store.hash_json(corpus), corpus)
    return list(found.values())


def name_sources(config: RunConfig) -> list[str]:
    """Return what a corpus may call the data set of a run: by its description, by its manifest, by its kind."""
    dataset: Any = config.dataset
    names, root = [], getattr(dataset, "root", None)
    if root is not None:
        with suppress(BraindecodeVisError, OSError):  # the data may lie elsewhere by now
            names.append(read_source_card(Path(root).expanduser()).name)
    with suppress(BraindecodeVisError, KeyError):  # of own data there is no manifest
        names.append(find_manifest(dataset.kind).title)
    return [*names, str(dataset.kind)]


def _describe_corpus(folder: Path) -> dict[str, Any]:
    from braindecode_vis.datasets.corpus.reader import open_corpus

    corpus = open_corpus(folder)
    runs = corpus.runs
    runs = runs[~runs["held_out"].to_numpy(bool)]
    if not len(runs):
        raise DataError(f"the corpus {folder} holds every person out, so no training data are left.")
    return {
        "name": folder.name, "n_persons": int(runs["person"].nunique()), "hours": float(runs["hours"].sum()),
        "subjects": corpus.list_subjects(),
    }  # fmt: skip


def _keep_known(found: Sequence[Any]) -> list[dict[str, Any]]:
    known = {"name", "n_persons", "hours", "subjects"}
    return [corpus for corpus in found if isinstance(corpus, dict) and known <= set(corpus)]


def _name_person(name: str) -> str:
    """Return a name without case, prefixes and leading zeros, which sources spell differently.

    Examples
    --------
    >>> _name_person("BOLD5000/sub-CSI1") == _name_person("bold5000/csi1"), _name_person("NSD/subj01")
    (True, 'nsd/1')
    """
    source, _, subject = name.casefold().rpartition("/")
    return f"{source}/{re.sub(r'^(sub-|subj|sub)', '', subject).lstrip('0')}"
