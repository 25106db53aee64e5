"""Small studies with a known truth: a linear response to known embeddings, in known columns and from a known time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.analyses.study import Study, fit_picked, rank_trials
from braindecode_vis.preprocessing.selection import average_repetitions
from braindecode_vis.preprocessing.splits import Fold

TEN_TWENTY = (
    "Fp1", "F3", "Fz", "F4", "T7", "T8", "C3", "Cz", "C4", "P3", "Pz", "P4", "O1", "Oz", "O2", "PO7",
)  # fmt: skip


def make_images(
    n_train: int, n_test: int, n_features: int, seed: int
) -> tuple[list[str], Embeddings, StimulusSet]:
    """Return ids (training images first), their embeddings, and images of four concepts in two categories."""
    generator = np.random.default_rng(seed)
    ids = [f"train{n:03d}" for n in range(n_train)] + [f"test{n:03d}" for n in range(n_test)]
    bank = Embeddings(generator.standard_normal((len(ids), n_features)).astype(np.float32), ids, "planted")
    names = ["animal_cat", "animal_dog", "tool_saw", "tool_axe"]
    table = pd.DataFrame(
        {"stimulus_id": ids, "concept": [names[n % 4] for n in range(len(ids))], "path": "", "sha256": ids}
    )
    pixels = np.random.default_rng(1).integers(0, 255, (len(ids), 4, 4, 3), dtype=np.uint8)
    return ids, bank, StimulusSet(table, pixels=pixels)


def make_study(
    respond: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    dims: Sequence[str],
    coords: dict,
    *,
    noise: float = 1.0,
    n_train: int = 60,
    n_test: int = 16,
    n_repetitions: int = 2,
    n_features: int = 4,
    subjects: Sequence[str] = ("01",),
    alpha: float = 10.0,
    seed: int = 0,
    averaged: bool = True,
    n_permutations: int = 400,
    n_bootstrap: int = 200,
    modify: Callable[[pd.DataFrame], pd.DataFrame] = lambda trials: trials,
) -> Study:
    """Return a study whose trials are ``respond(embeddings of the trials, generator)`` plus white noise."""
    ids, bank, stimuli = make_images(n_train, n_test, n_features, seed)
    rows = [
        {"subject": s, "session": "01", "run": "01", "stimulus_id": name, "repetition": r,
         "split": "train" if name.startswith("train") else "test"}
        for s in subjects
        for name in ids
        for r in range(1 if name.startswith("train") else n_repetitions)
    ]  # fmt: skip
    trials = modify(pd.DataFrame(rows))
    generator = np.random.default_rng(seed + 100)
    vectors = bank.select(trials["stimulus_id"]).vectors.astype(float)
    clean = respond(vectors, np.random.default_rng(7))
    data = (clean + noise * generator.standard_normal(clean.shape)).astype(np.float32)
    responses = Responses(data, tuple(dims), trials, "arbitrary", coords)
    train = np.flatnonzero((trials["split"] == "train").to_numpy())
    test = np.flatnonzero((trials["split"] == "test").to_numpy())
    config, fitted = RidgeConfig(alphas=(alpha,)), {}

    def pick(chosen, part):
        return average_repetitions(responses, chosen) if averaged else responses.select(chosen)

    def build(number):
        return config.build(seed=seed)

    def trained(number):
        if number not in fitted:
            own = pick(train, "train")
            fitted[number] = build(number).fit(own, bank.select(list(own.stimulus_ids)))
        return fitted[number]

    return Study(
        responses=responses, stimuli=stimuli, folds=[Fold(train, test)], banks=[bank], pick=pick, build=build,
        trained=trained, centre="mean", protocol="planted", seed=seed, n_bootstrap=n_bootstrap,
        n_permutations=n_permutations, spaces={"planted": bank},
    )  # fmt: skip


def make_epochs_study(
    *, onset: float = 0.1, stop: float = 10.0, active: Sequence[int] = (12, 13, 14, 15), gain: float = 1.0,
    n_times: int = 40, sfreq: float = 100.0, tmin: float = -0.1, rotate: bool = False, **options,
) -> Study:  # fmt: skip
    """Return EEG-like trials: from `onset` on, the `active` channels follow the embedding.

    With `rotate`, every sample has a mixing of its own, so that nothing generalises from one time to another.
    """
    times = tmin + np.arange(n_times) / sfreq

    def respond(vectors, generator):
        out = np.zeros((len(vectors), len(TEN_TWENTY), n_times))
        mixing = generator.standard_normal((vectors.shape[1], len(active)))
        for t in np.flatnonzero((times >= onset - 1e-9) & (times < stop - 1e-9)):
            if rotate:
                mixing = generator.standard_normal(mixing.shape)
            out[:, list(active), t] = gain * vectors @ mixing
        return out

    coords = {"ch_names": list(TEN_TWENTY), "times": times, "sfreq": sfreq}
    return make_study(respond, ("trial", "channel", "time"), coords, **options)


def make_parcel_study(gains: dict[str, float], *, n_parcels: int = 8, **options) -> Study:
    """Return trials of parcels, `n_parcels` per network, each following the embedding with the gain of its network."""
    networks = [name for name in gains for _ in range(n_parcels)]

    def respond(vectors, generator):
        mixing = generator.standard_normal((vectors.shape[1], len(networks)))
        return vectors @ mixing * np.array([gains[name] for name in networks])

    coords = {"parcel_names": [f"{n}{i}" for i, n in enumerate(networks)], "parcel_networks": networks}
    return make_study(respond, ("trial", "parcel"), coords, **options)


def refit_and_rank(study):
    """Fit on the training trials of every fold and return the ranks of its test trials."""
    ranked = []
    for number, fold in enumerate(study.folds):
        encoder = fit_picked(study, number, study.pick(fold.train, "train"), None)
        ranked.append(rank_trials(study, number, study.pick(fold.test, "test"), encoder)[2])
    return ranked
