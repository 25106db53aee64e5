"""Probes of a frozen encoder: the person of a window, the network of a parcel, and the seen image in a labelled set.

Owns the three probes, each with its chance beside it; features are frozen and every probe is linear. Knows neither
steps nor losses. Test trials of a labelled set never come here.

References
----------
Finn et al. (2015), doi:10.1038/nn.4135 (persons are recognised by connectivity). Ortega Caro et al. (2024), BrainLM
(probes of a pretrained encoder of fMRI).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.encoders.parcels import ParcelEncoder, find_interval
from braindecode_vis.encoders.signal import describe_signal
from braindecode_vis.training.pretraining_config import ProbesConfig
from braindecode_vis.training.pretraining_data import NEVER_READ, Material
from braindecode_vis.training.pretraining_model import pool

FEWEST_PERSONS = 2
N_FOLDS = 5
SHARE_LEFT_OUT = 0.2  # of the training images of a labelled set, which the probe is tested on
_PENALTIES = np.logspace(-1, 6, 15)


@dataclass(frozen=True)
class LabelledSet:
    """Training images of a labelled set, of which a part tests the probe.

    Parameters
    ----------
    data : float32 array of shape (n_images, n_parcels, n_times)
        Mean over the training trials of each image, standardised per parcel by those that fit.
    targets : array of shape (n_images, n_features)
        Embedding of each image.
    fits : boolean array of shape (n_images,)
        Images that the ridge is fitted on; the others test it.
    interval_s
        Seconds between samples, if known.
    """

    data: np.ndarray
    targets: np.ndarray
    fits: np.ndarray
    interval_s: float | None


def make_labelled(responses: Responses, embeddings: Embeddings, seed: int) -> LabelledSet:
    """Return the training images of a labelled set.

    Parameters
    ----------
    responses
        Trials; those whose split is ``test`` are never read.
    embeddings
        Of the images.
    seed
        Decides which images test the probe.

    Raises
    ------
    DataError
        If there are fewer than ten training images.
    """
    trials = responses.trials
    allowed = np.flatnonzero(~trials["split"].isin(NEVER_READ).to_numpy())
    ids, of = np.unique(trials["stimulus_id"].to_numpy(str)[allowed], return_inverse=True)
    if len(ids) < 10:
        raise DataError(
            f"the labelled set of pretrain.probes.labelled has {len(ids)} training images; it needs at least 10."
        )
    shape = responses.data.shape[1:]
    data = np.zeros((len(ids), *shape), np.float64)
    np.add.at(data, of, np.asarray(responses.data[allowed], np.float64))
    data /= np.bincount(of).reshape(-1, *[1] * len(shape))
    chosen = make_generator(seed, "pretrain", "labelled").permutation(len(ids))
    fits = np.ones(len(ids), bool)
    fits[chosen[: max(2, round(SHARE_LEFT_OUT * len(ids)))]] = False
    series = data.reshape(len(ids), shape[0], -1)
    mean, std = (f(series[fits], axis=(0, 2))[None, :, None] for f in (np.mean, np.std))
    series = (series - mean) / np.where(std > 0, std, 1.0)
    interval = find_interval(describe_signal(responses.select(allowed[:1])))
    targets = np.asarray(embeddings.select(list(ids)).vectors, np.float64).reshape(len(ids), -1)
    return LabelledSet(series.reshape(data.shape).astype(np.float32), targets, fits, interval)


def check_labelled(labelled: LabelledSet, encoder: ParcelEncoder) -> None:
    """Raise `DataError` unless the encoder can read the trials of a labelled set."""
    shape = labelled.data.shape[1:]
    n_times = shape[1] if len(shape) == 2 else 1
    problem = None
    if shape[0] != encoder.n_parcels:
        problem = f"has {shape[0]} parcels or channels, but the encoder {encoder.n_parcels}"
    elif n_times % encoder.patch_times:
        problem = (
            f"has trials of {n_times} samples, which cannot be divided into patches of {encoder.patch_times}"
        )
    elif encoder.time_position == "learned" and n_times != encoder.patch_times * encoder.n_patches:
        problem = (
            f"has trials of {n_times} samples, but the encoder windows of {encoder.patch_times * encoder.n_patches}, "
            "with learnt time positions; encoder.time_position=seconds can use both"
        )
    elif encoder.time_position == "seconds" and labelled.interval_s is None:
        problem = "does not give the time between samples, which encoder.time_position=seconds needs"
    if problem is not None:
        raise DataError(f"the labelled set of pretrain.probes.labelled {problem}.")


def measure_probes(
    encoder: ParcelEncoder,
    material: Material,
    config: ProbesConfig,
    *,
    seed: int,
    batch_size: int,
    labelled: LabelledSet | None = None,
) -> dict[str, Any]:
    """Return what the probes find.

    Parameters
    ----------
    encoder
        Frozen; it stays in the mode it was in.
    material
        Whose windows are encoded.
    config
        Which probes.
    seed
        Decides windows and folds: the same at every look.
    batch_size
        Windows that are encoded at once.
    labelled
        The labelled set, if there is one.

    Returns
    -------
    dict
        ``identity``, ``network`` and ``top5``, each a share of right answers with its chance and the
        number of answers beside it.
    """
    learning = encoder.training
    encoder.eval()
    found: dict[str, Any] = {}
    try:
        rows, part = choose_rows(material, config.n_windows, seed)
        features, parcels = encode(encoder, material, rows, batch_size)
        found |= probe_identity(features, material.person[rows], material.run[rows], seed)
        found["identity_part"] = part
        found |= _probe_network(encoder, parcels, material.signal.networks, seed)
        if labelled is not None:
            found |= probe_labelled(encoder, labelled, batch_size)
    finally:
        encoder.train(learning)
    return found


def choose_rows(material: Material, n: int, seed: int) -> tuple[np.ndarray, str]:
    """Return at most `n` windows, as many of each person as can be, and whether they are held out or trained on."""
    part, rows = "train", material.measured
    for name, candidates in (("held_out", material.held_out), (part, material.measured)):
        rows, part = candidates, name
        persons = material.person[rows]
        runs = np.unique(np.stack([persons, material.run[rows]]), axis=1)[0]
        several = np.unique(runs)[np.unique(runs, return_counts=True)[1] >= 2]
        if len(several) >= FEWEST_PERSONS:
            rows = rows[np.isin(persons, several)]
            break
    generator = make_generator(seed, "pretrain", "probe_windows")
    rows = generator.permutation(rows)
    # Rank of each window within its person: the first ones of all persons before the second ones.
    persons = material.person[rows]
    order = np.argsort(persons, kind="stable")
    starts = np.searchsorted(persons[order], persons[order])
    rank = np.empty(len(rows), int)
    rank[order] = np.arange(len(rows)) - starts
    return np.sort(rows[np.argsort(rank, kind="stable")[:n]]), part


def encode(
    encoder: ParcelEncoder, material: Material, rows: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean token of each window, (n_rows, width), and of each parcel over windows, (n_parcels, width)."""
    features, total, count = [], 0.0, np.zeros(encoder.n_parcels)
    device = encoder.cls.device
    for start in range(0, len(rows), batch_size):
        part = material.read(rows[start : start + batch_size])
        data = torch.from_numpy(np.asarray(part.data, np.float32)).to(device)
        interval = None if part.interval is None else torch.from_numpy(part.interval).to(device)
        observed, kept = part.observed, None
        if observed is None:
            observed = np.ones((len(data), encoder.n_parcels), bool)
        else:
            n_patches = data[0].numel() // (encoder.n_parcels * encoder.patch_times)
            kept = torch.from_numpy(observed).to(device).repeat_interleave(n_patches, dim=1)
        with torch.no_grad():
            tokens = encoder(data, interval=interval, kept=kept)
            features.append(pool(tokens, kept).cpu().numpy())
            grid = tokens[:, 1:].unflatten(1, (encoder.n_parcels, -1)).mean(dim=2).cpu().numpy()
        total = total + np.einsum("np,npw->pw", observed, grid.astype(np.float64))
        count += observed.sum(axis=0)
    return np.concatenate(features), total / np.maximum(count, 1)[:, None]


def probe_identity(features: np.ndarray, person: np.ndarray, run: np.ndarray, seed: int) -> dict[str, Any]:
    """Return how often a window of one half of the runs is given to its person by a fit to the other half.

    Parameters
    ----------
    features : array of shape (n_windows, width)
    person, run : integer arrays of shape (n_windows,)
    seed
        Decides which runs fit.
    """
    fits = np.zeros(len(person), bool)
    generator = make_generator(seed, "pretrain", "probe_runs")
    for one in np.unique(person):
        runs = np.unique(run[person == one])
        chosen = generator.permutation(runs)[: (len(runs) + 1) // 2]
        fits |= np.isin(run, chosen)
    # A person whose runs all fit, or who has no window to fit, cannot be asked about.
    asked = np.intersect1d(person[fits], person[~fits])
    fits, tests = fits & np.isin(person, asked), ~fits & np.isin(person, asked)
    if len(asked) < FEWEST_PERSONS:
        return {"identity": None, "identity_chance": None, "identity_n": 0, "identity_persons": len(asked)}
    predicted = _classify(features[fits], person[fits], features[tests])
    _, counts = np.unique(person[tests], return_counts=True)
    return {
        "identity": float((predicted == person[tests]).mean()),
        "identity_chance": float(counts.max() / counts.sum()),  # naming the commonest person always
        "identity_n": int(tests.sum()),
        "identity_persons": len(asked),
    }


def probe_network(parcels: np.ndarray, networks: np.ndarray, seed: int) -> dict[str, Any]:
    """Return how often the network of a left-out parcel is found from its mean token.

    Parameters
    ----------
    parcels : array of shape (n_parcels, width)
    networks : array of text of shape (n_parcels,)
    seed
        Decides the folds.
    """
    names, number, counts = np.unique(networks, return_inverse=True, return_counts=True)
    fold = np.empty(len(number), int)
    # Each network is dealt out over the folds, so that none is unknown where it is asked for.
    for one in range(len(names)):
        places = make_generator(seed, "pretrain", "probe_parcels", one).permutation(
            np.flatnonzero(number == one)
        )
        fold[places] = (np.arange(len(places)) + one) % N_FOLDS
    right = 0
    for one in range(N_FOLDS):
        tests = fold == one
        if tests.any() and len(np.unique(number[~tests])) > 1:
            right += int((_classify(parcels[~tests], number[~tests], parcels[tests]) == number[tests]).sum())
    return {
        "network": right / len(number),
        "network_chance": float(counts.max() / len(number)),
        "network_n": len(number),
    }


def _probe_network(
    encoder: ParcelEncoder, parcels: np.ndarray, networks: tuple[str, ...], seed: int
) -> dict[str, Any]:
    why = None
    if encoder.network_embedding:
        why = "the encoder gets the networks (encoder.network_embedding)"
    elif len(set(networks)) < 2:
        why = "the networks of the parcels are unknown"
    if why is not None:
        return {"network": None, "network_left_out": why}
    return probe_network(parcels, np.asarray(networks), seed)


def probe_labelled(encoder: ParcelEncoder, labelled: LabelledSet, batch_size: int) -> dict[str, Any]:
    """Return how often the image of a left-out trial is among the five nearest of those that were left out."""
    from sklearn.linear_model import RidgeCV

    device, features = encoder.cls.device, []
    for start in range(0, len(labelled.data), batch_size):
        data = torch.from_numpy(labelled.data[start : start + batch_size]).to(device)
        interval = None
        if encoder.time_position == "seconds":
            interval = torch.full((len(data),), float(labelled.interval_s or 0), device=device)
        # The labelled trials are standardised already; those that the encoder learnt from were by its own numbers.
        data = (data.reshape(len(data), encoder.n_parcels, -1) * encoder.std + encoder.mean).reshape(
            data.shape
        )
        with torch.no_grad():
            features.append(pool(encoder(data, interval=interval), None).cpu().numpy())
    fits, x, y = labelled.fits, _standardise(np.concatenate(features), labelled.fits), labelled.targets
    centre = y[fits].mean(axis=0)
    predicted = RidgeCV(_PENALTIES).fit(x[fits], y[fits] - centre).predict(x[~fits])
    similarity = _unit(predicted) @ _unit(y[~fits] - centre).T
    own = np.diag(similarity)[:, None]
    # Ties count against the answer.
    rank = (similarity >= own).sum(axis=1) - 1
    n = len(rank)
    return {"top5": float((rank < 5).mean()), "top5_chance": min(1.0, 5 / n), "top5_n": n}


def _classify(features: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    both = _standardise(
        np.concatenate([features, asked]), np.arange(len(features) + len(asked)) < len(features)
    )
    model = LogisticRegression(C=0.1, max_iter=300)
    return model.fit(both[: len(features)], labels).predict(both[len(features) :])


def _standardise(features: np.ndarray, fits: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    std = features[fits].std(axis=0)
    return (features - features[fits].mean(axis=0)) / np.where(std > 1e-12, std, 1.0)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
