"""Synthetic responses: predictions of an encoding model, fitted on training trials, for images that were not shown.

Owns which images may be used, the model that is fitted for them, the noise that is added, and the stage `synthesise`
whose trials join those of the training. Images that any trial shows are left out, by their id, their pixels and their
likeness at 16 pixels, so that neither a tested nor a held-out image comes back under another name; where no tested
concept is trained on, so are images of tested concepts. The images that a network holds out to validate take no part in
the model.

References
----------
Brain-IT, arXiv:2510.25976, trains on synthetic pairs of an encoding network beside real ones, as ``by: network`` does.
A ridge in its place, and noise drawn from residuals, are choices of ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from braindecode_vis.base import roles, store
from braindecode_vis.base.arrays import Embeddings, Responses, count_own_voxels
from braindecode_vis.base.checks import ConfigError, DataError, check_option
from braindecode_vis.base.contracts import ImageEncoder, NetworkSettings
from braindecode_vis.base.seeds import derive_seed, make_generator
from braindecode_vis.base.stimuli import hash_pixels, resize_image
from braindecode_vis.config.models import NOT_AT_HAND, UNSEEN, SyntheticConfig
from braindecode_vis.encoders.encoding_model import draw_residuals, fit_encoding
from braindecode_vis.encoders.signal import TrialPairs
from braindecode_vis.pipeline.runs import Run, remember
from braindecode_vis.preprocessing.alignment import fit_zscore

NETWORK = "network"  # folder of what a network fitted to predict responses, from which the training goes on
PREFIX = "synthetic/"  # of the ids of synthetic trials, unlike any of a data set
_AT_ONCE = 256  # images that are decoded and encoded together
_THUMBNAIL = 16
#: 1 - r of two thumbnails up to which they are one picture, as the audit has it.
_SAME = 0.003
_LEAST_CONTRAST = 2.0


@dataclass(frozen=True)
class SyntheticTrials:
    """Synthetic trials of one fold, the embedding of the image of each, and how they were made."""

    artifact: store.Artifact
    responses: Responses
    targets: Embeddings

    @property
    def fitted(self) -> Path | None:
        """Folder of what the network that predicted them has fitted; None if it was no network."""
        folder = self.artifact.path / NETWORK
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class NewImages:
    """Images that may be used, their embeddings in each space, and how many were left out and why.

    Parameters
    ----------
    ids, digests
        Name and digest of the pixels (or, of a bank, of what was embedded) of each image.
    spaces
        Name of each space to their embeddings; the target's is the first.
    left_out
        Reason to number.
    """

    ids: list[str]
    digests: list[str]
    spaces: Mapping[str, Embeddings]
    left_out: Mapping[str, int]


def add_synthetic(responses: Responses, synthetic: Responses) -> Responses:
    """Return real trials with synthetic ones behind them, distinguished by the column `synthetic`."""
    trials = pd.concat(
        [responses.trials.assign(synthetic=False), synthetic.trials.assign(synthetic=True)], ignore_index=True
    )
    if "n_averaged" in trials:
        trials["n_averaged"] = trials["n_averaged"].fillna(1).astype(int)
    data = np.concatenate([np.asarray(responses.data), np.asarray(synthetic.data, responses.data.dtype)])
    return Responses.from_checked(data, responses.dims, trials, responses.unit, responses.coords)


def join_embeddings(first: Embeddings, second: Embeddings) -> Embeddings:
    """Return the rows of two sets of embeddings of one space."""
    vectors = np.concatenate([np.asarray(first.vectors), np.asarray(second.vectors, first.vectors.dtype)])
    return Embeddings(vectors, np.concatenate([first.ids, second.ids]), first.space)


def read_synthetic(folder: Path) -> tuple[Responses, Embeddings]:
    """Return the trials and targets that the stage, or ``encode --synthesise``, wrote into a folder."""
    return store.read_responses(folder / "responses"), store.read_embeddings(folder / "targets")


def count_synthetic(n_real: int, share: float) -> int:
    """Return how many synthetic trials make this share of the training.

    Examples
    --------
    >>> count_synthetic(100, 0.5), count_synthetic(100, 0.2)
    (100, 25)
    """
    return max(1, round(n_real * share / (1 - share)))


# --- the stage ---------------------------------------------------------------------------------------------


@remember
def synthesise(run: Run) -> list[SyntheticTrials]:
    """Return the synthetic trials of every fold; see `synthesise_fold`."""
    from braindecode_vis.pipeline.preparing import count_folds

    return [synthesise_fold(run, number) for number in range(count_folds(run))]


def hash_settings(run: Run) -> dict[str, Any]:
    """Return what of the section ``synthetic`` enters fingerprints; of images that are gone, the digest on record.

    Raises
    ------
    DataError
        If the images are not available, and the run folder holds no trials that were made with them.
    """
    assert run.config.synthetic is not None
    fields: dict[str, Any] = store.json_plain(run.config.synthetic.hashed_fields())
    if fields["images_digest"] != NOT_AT_HAND:
        return fields
    for path in sorted((run.records / "stages" / "synthesise").glob(f"*/{store.PROVENANCE}")):
        told = store.read_provenance(path)["fields"]["synthetic"]
        if {**told, "images_digest": NOT_AT_HAND} == fields:
            return dict(told)
    run.config.synthetic.check_files()  # which says what is missing
    raise DataError(f"{run.config.synthetic.images} is not available; put it back.")


def synthesise_fold(run: Run, number: int) -> SyntheticTrials:
    """Return the synthetic trials that the training of a fold is given; made once."""
    return run.once(f"synthesise {number}", lambda: _synthesise_fold(run, number))


def _synthesise_fold(run: Run, number: int) -> SyntheticTrials:
    from braindecode_vis.pipeline import preparing

    config, prepared = run.config, preparing.preprocess(run)
    settings = config.synthetic
    assert settings is not None
    bank = preparing.embed_fold(run, number)
    real = preparing.pick_labelled_trials(prepared, prepared.folds[number].train, config.repeats.train)
    held = sorted(map(str, preparing.build_encoder(run, number).list_held_out(real)))
    fields = {
        "synthetic": hash_settings(run), "repeats": config.repeats.train, "seed": config.seed, "fold": number,
        "held_out": store.hash_json(held) if held else "",
        # Only here, so that fingerprints of ridges are those of versions which kept no network.
        **({"kept": NETWORK} if settings.by == "network" else {}),
    }  # fmt: skip
    upstream = {"preprocess": prepared.artifact.fingerprint, "embed": bank.artifact.fingerprint}

    def compute(folder: Path) -> dict[str, Any]:
        learns = np.flatnonzero(~np.isin(real.stimulus_ids.astype(str), held))
        found = draw_synthetic(
            run, number, settings, real.select(learns), share=settings.share, kept=folder / NETWORK
        )
        return write_synthetic(folder, *found, n_held_out=len(held))

    artifact = run.produce("synthesise", fields, upstream, compute, preparing.name_fold(number))
    return SyntheticTrials(artifact, *read_synthetic(artifact.path))


def write_synthetic(
    folder: Path, responses: Responses, targets: Embeddings, about: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Write synthetic trials with their targets and where each image came from; return what is reported of them."""
    store.write_responses(folder / "responses", responses)
    store.write_embeddings(folder / "targets", targets)
    store.write_json(folder / "images.json", {"images": about["images"]})
    return {**{key: value for key, value in about.items() if key != "images"}, **more}


def draw_synthetic(
    run: Run,
    number: int,
    settings: SyntheticConfig,
    real: Responses,
    *,
    share: float | None,
    kept: Path | None = None,
) -> tuple[Responses, Embeddings, dict[str, Any]]:
    """Fit the encoding model of each subject and predict new images.

    Parameters
    ----------
    run
        The run; only `real` of its trials are looked at.
    number
        Number of the fold, for its targets and the seed.
    settings
        Images, noise and model.
    real
        Training trials that the model is fitted on.
    share
        Share of synthetic trials; None makes one of every image for every subject.
    kept
        Folder for what a network fits; needed with ``by: network``.

    Returns
    -------
    responses
        Synthetic trials, with the axes and coordinates of the real ones.
    targets
        The target embedding of the image of each.
    about
        What was done, for the record.
    """
    from braindecode_vis.pipeline import preparing

    bank = preparing.embed_fold(run, number)
    subjects = real.trials["subject"].astype(str).to_numpy()
    names = list(dict.fromkeys(subjects.tolist()))
    counts = None if share is None else {w: count_synthetic(int((subjects == w).sum()), share) for w in names}
    seed = derive_seed(run.config.seed, "synthesise", number)
    images = _collect_images(run, number, settings, None if counts is None else max(counts.values()), seed)
    counts = counts or dict.fromkeys(names, len(images.ids))
    _check_enough(settings, counts, len(images.ids))
    learnt = _embed_training(run, number, settings, real)
    owned, shape = count_own_voxels(real), real.data.shape[1:]

    def measure(who: str) -> tuple[np.ndarray, np.ndarray]:
        rows = np.flatnonzero(subjects == who)
        own = np.asarray(real.data[rows], np.float32)[:, : owned.get(who)]  # or all
        return rows, own.reshape(len(rows), -1)

    by_network = (
        None
        if settings.by == "ridge"
        else _fit_network(run, names, measure, learnt, derive_seed(seed, "model"), kept)
    )
    explained, orders, blocks = dict[str, float](), dict[str, np.ndarray](), []
    with run.listener.progress("encoding models", len(names)) as advance:
        for place, who in enumerate(names):
            generator, n = make_generator(seed, "trials", place), counts[who]
            # All images once before any comes again with other noise.
            turns = [generator.permutation(len(images.ids)) for _ in range(-(-n // len(images.ids)))]
            order = orders[who] = np.concatenate(turns)[:n]
            if by_network is None:
                rows, measured = measure(who)
                model = fit_encoding(
                    {name: Embeddings(one.vectors[rows], one.ids[rows], name) for name, one in learnt.items()},
                    measured, config=settings.model, seed=derive_seed(seed, "model", place),
                    out_of_fold=settings.noise == "residual",
                )  # fmt: skip
                explained[who] = float(model.inner_explained.mean())
                made = model.predict({name: images.spaces[name] for name in learnt})[order]
                if settings.noise == "residual":
                    made += draw_residuals(model, measured, n, generator)
            else:
                made = by_network(place, images.spaces[bank.embeddings.space].flat())[order]
            whole = np.zeros((n, *shape), np.float32)
            whole[:, : owned.get(who)] = made.reshape(n, -1, *shape[1:])
            blocks.append(whole)
            advance(1)
    trials = _describe_trials(run, settings, real, images, orders)
    responses = Responses(np.concatenate(blocks), real.dims, trials, real.unit, real.coords)
    target, chosen = images.spaces[bank.embeddings.space], np.concatenate(list(orders.values()))
    about = {
        "n_trials": len(trials), "n_real": real.n_trials, "n_images": len(images.ids), "noise": settings.noise,
        "left_out": dict(images.left_out), "inner_explained": explained,
        "trained_on": store.hash_json(sorted(set(real.stimulus_ids.astype(str).tolist()))),
        "images": [[name, digest] for name, digest in zip(images.ids, images.digests, strict=True)],
    }  # fmt: skip
    vectors = np.asarray(target.vectors)[chosen]
    return responses, Embeddings(vectors, responses.stimulus_ids, target.space), about


def _check_enough(settings: SyntheticConfig, counts: Mapping[str, int], n_images: int) -> None:
    """Raise `DataError` if a subject needs more trials than there are images, and no noise distinguishes them."""
    who = max(counts, key=lambda name: counts[name])
    if settings.noise == "none" and counts[who] > n_images:
        other = ", or synthetic.noise residual" * (settings.by == "ridge")
        raise DataError(
            f"{settings.images} has {n_images} images that were not shown, but synthetic.share {settings.share:g} of "
            f"the training of subject {who} needs {counts[who]} trials, which would repeat without noise; give more "
            f"images or a lower share{other}."
        )


def _describe_trials(
    run: Run, settings: SyntheticConfig, real: Responses, images: NewImages, orders: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Return the table of the trials, with the columns of the real ones; `orders` has the images of each subject."""
    from braindecode_vis.pipeline import preparing

    names = [images.ids[row] for order in orders.values() for row in order]
    if settings.images == UNSEEN:
        concepts = list(preparing.preprocess(run).stimuli.concepts_of(names))
    else:
        concepts = [PREFIX + name_concept(settings.images, name) for name in names]
    trials = pd.DataFrame(
        {
            "subject": np.repeat(list(orders), [len(order) for order in orders.values()]),
            "session": "synthetic", "run": "synthetic", "stimulus_id": [PREFIX + name for name in names],
            "repetition": np.concatenate([_count_turns(order) for order in orders.values()]), "split": "train",
            "concept": concepts, "synthetic": True,
        }
    )  # fmt: skip
    for column in real.trials:
        if column not in trials:
            values = real.trials[column]
            trials[column] = values.iloc[0] if column in ("task", "n_averaged") else pd.NA
    return trials


def _fit_network(
    run: Run,
    names: Sequence[str],
    measure: Callable[[str], tuple[np.ndarray, np.ndarray]],
    learnt: Mapping[str, Embeddings],
    seed: int,
    kept: Path | None,
) -> Callable[[int, np.ndarray], np.ndarray]:
    """Return what predicts responses of a subject, by its number, with the network of the brain encoder."""
    fit = roles.complete(NetworkSettings, run.config.encoder.network).fit_responses
    assert fit is not None  # checked with the configuration
    ((_, targets),) = learnt.items()
    rows, data = zip(*(measure(who) for who in names), strict=True)
    scales, first = [fit_zscore(one) for one in data], np.cumsum([0, *map(len, rows)])
    numbers = np.repeat(np.arange(len(names)), [len(one) for one in rows])

    def read(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        who = numbers[some[0]]  # a fit reads one subject at a time
        own = some - first[who]
        return scales[who].apply(data[who][own]), np.asarray(
            targets.vectors[rows[who][own]], np.float32
        ).reshape(len(own), -1)

    n_features = {who: one.shape[1] for who, one in zip(names, data, strict=True)}
    predict = fit(n_features, TrialPairs(numbers, read), seed, kept)
    return lambda who, images: np.asarray(
        predict(who, images) * scales[who].std + scales[who].mean, np.float32
    )


def _count_turns(order: np.ndarray) -> np.ndarray:
    """Return how often each entry came before."""
    return pd.Series(order).groupby(order).cumcount().to_numpy()


def name_concept(source: str, name: str) -> str:
    """Return what an image shows, as far as its name says: the folder it lies in, or the phantom's word for it.

    Examples
    --------
    >>> name_concept("phantom:9", "red_ring_02s"), name_concept("pictures", "owl/12"), name_concept("pictures", "12")
    ('red_ring', 'owl', '12')
    """
    if source.startswith("phantom:"):
        return name.rpartition("_")[0]
    folder, _, _ = name.rpartition("/")
    return folder.rpartition("/")[2] or name


# --- images ------------------------------------------------------------------------------------------------


def _embed_training(
    run: Run, number: int, settings: SyntheticConfig, real: Responses
) -> dict[str, Embeddings]:
    """Return the embedding of the image of each real trial in the spaces that the model regresses on."""
    from braindecode_vis.base.digests import find_cache_folder
    from braindecode_vis.embeddings.bank import embed_stimuli
    from braindecode_vis.pipeline import preparing

    bank = preparing.embed_fold(run, number).embeddings
    if not settings.features:
        return {bank.space: bank.select(list(real.stimulus_ids))}
    ids = list(pd.unique(real.stimulus_ids))
    stimuli, found = preparing.preprocess(run).stimuli.select(ids), {}
    for config in settings.features:
        encoder = roles.build(ImageEncoder, config)
        with run.listener.progress(f"encoding images: {config.kind}", len(ids)) as advance:
            bank = encoder.embed(
                stimuli,
                ids,
                lambda one: embed_stimuli(one, stimuli, cache=find_cache_folder(), advance=advance),
            )
        found[bank.space] = bank.select(list(real.stimulus_ids))
    return found


def _collect_images(
    run: Run, number: int, settings: SyntheticConfig, n_wanted: int | None, seed: int
) -> NewImages:
    """Choose images that may be used, and embed them in the target's and the model's spaces."""
    from braindecode_vis.embeddings.image_bank import is_image_bank
    from braindecode_vis.pipeline import preparing

    if settings.images != UNSEEN and is_image_bank(Path(settings.images)):
        return _read_bank(run, number, settings, n_wanted, seed)
    shown, left_out = _Shown.open(run), dict[str, int]()
    tested = _list_tested_concepts(run, number)
    names, read = open_source(run, settings)
    if tested:
        concept = (
            (lambda name: preparing.preprocess(run).stimuli.concepts_of([name])[0])
            if settings.images == UNSEEN
            else (lambda name: name_concept(settings.images, name))
        )
        kept = [name for name in names if str(concept(name)) not in tested]
        left_out["of tested concepts"] = len(names) - len(kept)
        names = kept
    if not names:
        raise DataError(
            f"{settings.images} holds no image that may be used: all were shown, or show tested concepts."
        )
    n_wanted, order = len(names) if n_wanted is None else n_wanted, np.arange(len(names))
    if n_wanted < len(names):
        order = make_generator(seed, "images").permutation(len(names))
    encoders = _open_encoders(run, number, settings)
    ids: list[str] = []
    digests: list[str] = []
    rows: list[list[np.ndarray]] = [[] for _ in encoders]
    taken = 0
    while chosen := {names[row] for row in order[taken : taken + n_wanted - len(ids)]}:
        taken += len(chosen)
        copies = _find_copies(run, number, chosen, read)
        with run.listener.progress("encoding new images", len(chosen)) as advance:
            for block in _iterate_blocks(read(chosen)):
                kept_images = []
                for name, pixels, content in block:
                    if reason := shown.recognise(pixels, content) or copies.get(name):
                        left_out[reason] = left_out.get(reason, 0) + 1
                        continue
                    ids.append(name)
                    digests.append(hash_pixels(pixels))
                    kept_images.append(pixels)
                if kept_images:
                    for place, encoder in enumerate(encoders):
                        rows[place].append(np.asarray(encoder.encode(iter(kept_images)), np.float32))
                advance(len(block))
        # Images come again with other noise. Without noise, others take the place of those that were left out.
        if settings.noise != "none":
            break
    if not ids:
        raise DataError(f"{settings.images} holds no image that was not shown; give others.")
    spaces = {}
    for encoder, vectors in zip(encoders, rows, strict=True):
        spaces[encoder.space] = Embeddings(np.concatenate(vectors), ids, encoder.space)
    bank = preparing.embed_fold(run, number).embeddings
    target = next(iter(spaces.values()))
    if target.vectors.shape[1:] != bank.vectors.shape[1:]:
        raise ConfigError(
            f"the target {run.config.target.kind} gives embeddings of shape {bank.vectors.shape[1:]} in the run and "
            f"{target.vectors.shape[1:]} of new images: it combines several inputs, which synthetic "
            "trials do not have; choose another target, or leave synthetic out."
        )
    return NewImages(ids, digests, spaces, left_out)


def _find_copies(run: Run, number: int, chosen: set[str], read: Any) -> dict[str, str]:
    """Return the images that are test pictures with other pixels, by the detector of the audit, and the reason."""
    from braindecode_vis.pipeline import preparing
    from braindecode_vis.pipeline.leaks.likeness import MOST_OTHERS, find_copies

    prepared = preparing.preprocess(run)
    if not prepared.stimuli.has_pixels:
        return {}
    tested = pd.unique(prepared.responses.stimulus_ids[prepared.folds[number].test])
    left = iter(sorted(chosen))
    copies = dict[str, str]()
    while some := set(islice(left, MOST_OTHERS)):
        others = ((name, pixels) for name, pixels, _ in read(some))
        copies |= {
            name: "copies of test pictures" for name, _, _ in find_copies(prepared.stimuli, tested, others)
        }
    return copies


def _open_encoders(run: Run, number: int, settings: SyntheticConfig) -> list[Any]:
    """Return the target's encoder, and those of the model where they are others."""
    from braindecode_vis.pipeline import preparing

    encoders: list[Any] = [preparing.embed_fold(run, number).encoder]
    for config in settings.features:
        encoder = roles.build(ImageEncoder, config)
        stimuli = preparing.preprocess(run).stimuli
        first = stimuli.select_pictured().ids[:1]
        encoder.fit(stimuli.iterate_images(first))  # `pixels` takes its size from it
        if encoder.space not in {one.space for one in encoders}:
            encoders.append(encoder)
    return encoders


def _iterate_blocks(items: Iterable[Any]) -> Iterator[list[Any]]:
    left = iter(items)
    return iter(lambda: list(islice(left, _AT_ONCE)), [])


def open_source(run: Run, settings: SyntheticConfig) -> tuple[list[str], Any]:
    """Return the names of all candidates, and what yields name, pixels and stored bytes of some of them."""
    from braindecode_vis.embeddings.image_sources import load_image, open_images
    from braindecode_vis.pipeline import preparing

    if settings.images == UNSEEN:
        prepared = preparing.preprocess(run)
        stimuli = prepared.stimuli.select_pictured()
        shown = set(prepared.responses.stimulus_ids.tolist())
        names = [name for name in stimuli.ids.tolist() if name not in shown]
        if not names or not stimuli.has_pixels:
            raise DataError(
                "every image of the data set that is available was shown to a subject; set synthetic.images to a "
                "folder of other images."
            )

        def read_unseen(wanted: set[str]) -> Iterator[tuple[str, np.ndarray, bytes]]:
            for name in names:
                if name in wanted:
                    yield name, stimuli.read_image(name), b""

        return names, read_unseen
    source = open_images(settings.images)
    listed = [(shard.name, list(source.name_images(shard.name))) for shard in source.list_shards()]

    def read_files(wanted: set[str]) -> Iterator[tuple[str, np.ndarray, bytes]]:
        for shard, own in listed:
            places = [place for place, name in enumerate(own) if name in wanted]
            if not places:
                continue
            for item in source.read(shard, places[0], places[-1] + 1):
                if item.id in wanted:
                    content = item.read()
                    pixels, _ = load_image(item)
                    yield item.id, pixels, content if isinstance(content, bytes) else b""

    return [name for _, own in listed for name in own], read_files


def _read_bank(
    run: Run, number: int, settings: SyntheticConfig, n_wanted: int | None, seed: int
) -> NewImages:
    """Take embeddings of a finished bank, without those that are a shown image's."""
    from braindecode_vis.embeddings.image_bank import read_image_bank
    from braindecode_vis.pipeline import preparing

    bank, own = read_image_bank(Path(settings.images)), preparing.embed_fold(run, number).embeddings
    if settings.features or bank.space != own.space:
        raise ConfigError(
            f"the bank {settings.images} holds embeddings in {bank.space}, but not in other spaces: it "
            f"can be used only in a run with this target (here {own.space}) and without "
            "synthetic.features; give the images themselves instead."
        )
    digests = np.load(Path(settings.images) / "images.npy", mmap_mode="r", allow_pickle=False)
    n_wanted, order = len(bank) if n_wanted is None else n_wanted, np.arange(len(bank))
    if n_wanted < len(bank):
        order = make_generator(seed, "images").permutation(len(bank))
    tested = _list_tested_concepts(run, number)
    known = store.read_json(Path(settings.images) / "manifest.json")["request"]["source"]["kind"]
    source = "phantom:" if known == "phantom" else settings.images
    seen = own.select(list(np.unique(preparing.preprocess(run).responses.stimulus_ids))).flat()
    left_out = {"of tested concepts": 0, "shown (embedding)": 0}
    rows, taken = np.empty(0, int), 0
    while len(some := np.sort(order[taken : taken + n_wanted - len(rows)])):
        taken += len(some)
        fits = np.array([name_concept(source, name) not in tested for name in bank.ids[some].astype(str)])
        new = ~_find_same(np.asarray(bank.vectors[some], np.float32).reshape(len(some), -1), seen)
        left_out["of tested concepts"] += int((~fits).sum())
        left_out["shown (embedding)"] += int((~new).sum())
        rows = np.concatenate([rows, some[fits & new]])
        if settings.noise != "none":  # as in `_collect_images`
            break
    if not len(rows):
        raise DataError(f"the bank {settings.images} holds no image that was not shown; give another.")
    names = bank.ids[rows].astype(str).tolist()
    return NewImages(
        names, [f"{int(digests[row]):016x}" for row in rows],
        {own.space: Embeddings(np.asarray(bank.vectors[rows], np.float32), names, own.space)}, left_out,
    )  # fmt: skip


def _find_same(vectors: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return which vectors are one of the shown images' but for rounding to half precision."""
    from braindecode_vis.base.arrays import normalise_rows

    shown = normalise_rows(shown.astype(np.float32))
    same = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), 4096):
        block = normalise_rows(vectors[start : start + 4096])
        same[start : start + 4096] = (block @ shown.T).max(axis=1) > 1 - 1e-5
    return same


def _list_tested_concepts(run: Run, number: int) -> set[str]:
    """Return the concepts that a fold tests, where it trains on none of them; empty elsewhere."""
    from braindecode_vis.pipeline import preparing

    prepared = preparing.preprocess(run)
    ids, fold = prepared.responses.stimulus_ids, prepared.folds[number]
    train, test = (
        set(map(str, prepared.stimuli.concepts_of(pd.unique(ids[rows])))) for rows in (fold.train, fold.test)
    )
    return set() if train & test else test


@dataclass(frozen=True)
class _Shown:
    """The images that any trial shows, by digests and thumbnails."""

    digests: frozenset[str]
    thumbnails: np.ndarray

    @classmethod
    def open(cls, run: Run) -> _Shown:
        """Read them once for a run; without pictures at hand, digests of the table are all there is."""
        found: _Shown = run.once("shown images", lambda: cls._read(run))
        return found

    @classmethod
    def _read(cls, run: Run) -> _Shown:
        from braindecode_vis.pipeline import preparing

        prepared = preparing.preprocess(run)
        shown = pd.unique(prepared.responses.stimulus_ids)
        stimuli = prepared.stimuli.select(shown).select_pictured()
        digests = {str(digest) for digest in stimuli.table["sha256"]}
        if not stimuli.has_pixels:
            return cls(frozenset(digests), np.empty((0, _THUMBNAIL * _THUMBNAIL * 3), np.float32))
        small = []
        with run.listener.progress("looking at shown images", len(stimuli)) as advance:
            for image in stimuli.iterate_images():
                digests.add(hash_pixels(image))
                small.append(_shrink(image))
                advance(1)
        return cls(frozenset(digests), np.stack(small))

    def recognise(self, pixels: np.ndarray, content: bytes) -> str:
        """Say in words why an image is one that was shown; empty if it is none."""
        if hash_pixels(pixels) in self.digests or (
            content and hashlib.sha256(content).hexdigest() in self.digests
        ):
            return "shown (pixels)"
        small = _shrink(pixels)
        mirrored = small.reshape(_THUMBNAIL, _THUMBNAIL, 3)[:, ::-1].ravel()
        likeness = max(
            (float((self.thumbnails @ one).max()) for one in (small, mirrored) if len(self.thumbnails)),
            default=0,
        )
        return "shown (likeness)" if likeness >= 1 - _SAME else ""


def _shrink(image: np.ndarray) -> np.ndarray:
    """Return a thumbnail with mean 0 and length 1; zeros where it has no contrast to be compared by."""
    small = resize_image(image, _THUMBNAIL, _THUMBNAIL).astype(np.float32).ravel()
    if small.std() < _LEAST_CONTRAST:
        return np.zeros_like(small)
    small -= small.mean()
    return np.asarray(small / np.linalg.norm(small))


# --- outside a training ------------------------------------------------------------------------------------


def synthesise_into(
    run: Run,
    images: str,
    out: Path,
    *,
    noise: str = "residual",
    fold: int | None = None,
) -> tuple[Path, Sequence[str]]:
    """Write one synthetic response to every new image and subject into a folder.

    Parameters
    ----------
    run
        The run, whose section ``encode`` says what is regressed on.
    images
        As `SyntheticConfig.images`.
    out
        A folder that does not exist: ``responses``, ``targets``, ``images.json`` and ``record.json``.
    noise
        ``residual`` or ``none``.
    fold
        Whose training trials the model is fitted on; may be left out where there is one.

    Returns
    -------
    folder
        What was written.
    sentences
        What was done, in words.

    Raises
    ------
    ConfigError
        If the folder exists, or a fold must be named.
    """
    from braindecode_vis.pipeline import preparing

    preparing.refuse_categories(run, "encode")
    check_option("noise", noise, ("residual", "none"))
    path = out.expanduser().absolute()
    if path.exists():
        raise ConfigError(f"{path} exists; choose another folder with --to, or remove it first.")
    prepared = preparing.preprocess(run)
    n_folds = len(prepared.folds)
    if fold is None and n_folds > 1:
        raise ConfigError(
            f"the run has {n_folds} folds with different training trials; choose one with --fold."
        )
    number = fold or 0
    if number >= n_folds:
        raise ConfigError(f"the run has the folds 0 to {n_folds - 1}, not {number}.")
    asked = run.config.encode
    own = {} if asked is None else {"features": asked.features, "model": asked.model}
    settings = SyntheticConfig.model_validate({"images": images, "noise": noise, **own})
    real = preparing.pick_labelled_trials(prepared, prepared.folds[number].train, run.config.repeats.train)
    responses, targets, about = draw_synthetic(run, number, settings, real, share=None)
    protocol = f"{run.config.dataset.kind}; {prepared.split.protocol}; fold {number}"
    with store.open_scratch(path.parent, path.name) as work:
        folder = work / path.name
        folder.mkdir()
        told = write_synthetic(folder, responses, targets, about)
        record = {
            **told, "protocol": protocol, "fitted_on": "only training trials of the fold", "seed": run.config.seed,
            "settings": settings.hashed_fields(), "preprocess": prepared.artifact.fingerprint,
        }  # fmt: skip
        store.write_json(folder / "record.json", {**store.json_plain(record), **store.collect_provenance()})
        store.move_together(work, path.name)
    left = sum(told["left_out"].values())
    sentences = [
        f"{told['n_trials']} synthetic responses to {told['n_images']} images, {protocol}",
        f"{left} images were left out: "
        + (", ".join(f"{n} {reason}" for reason, n in told["left_out"].items() if n) or "none"),
        "variance explained in inner folds: "
        + ", ".join(f"subject {who} {value:.3f}" for who, value in told["inner_explained"].items()),
    ]
    return path, sentences
