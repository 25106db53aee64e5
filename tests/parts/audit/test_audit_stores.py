"""The audit on small stores written by hand: sessions, subjects, networks, categories; and its arithmetic."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings, Responses
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import read_config
from braindecode_vis.encoders.ridge import RidgeConfig
from braindecode_vis.parts.audit.design import compute_cramers_v, permute
from braindecode_vis.parts.audit.run import audit_run
from braindecode_vis.parts.audit.statistics import fit_standardised
from braindecode_vis.pipeline.leaks.run_files import open_audited
from braindecode_vis.pipeline.leaks.split_overlap import find_copies
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.preprocessing.splits import LeaveOneSubjectOutConfig
from tests.parts.audit.small_runs import find

N_IMAGES, N_REPEATS = 8, 2
TRAIN = {"kind": "network", "subject_alignment": "none", "epochs": 3, "selection": {"kind": "last"}}


def make_trials(subjects=("01",), sessions=("01", "02")):
    """Each subject sees every image twice in every session; the first six images are for training."""
    rows = [
        (subject, session, "01", f"i{image}", repetition, "train" if image < 6 else "test")
        for subject in subjects
        for session in sessions
        for repetition in range(N_REPEATS)
        for image in range(N_IMAGES)
    ]
    return pd.DataFrame(
        rows, columns=["subject", "session", "run", "stimulus_id", "repetition", "split"], dtype=object
    )


def make_stimuli():
    ids = [f"i{image}" for image in range(N_IMAGES)]
    digests = [f"{image:064d}" for image in range(N_IMAGES)]
    return StimulusSet(pd.DataFrame({"stimulus_id": ids, "concept": ids, "path": ids, "sha256": digests}))


def make_epochs(trials, seed=0):
    """Channels with a mixture of noise of their own in every session."""
    generator = np.random.default_rng(seed)
    data = np.empty((len(trials), 5, 12))
    for _, rows in trials.groupby(["subject", "session"]).indices.items():
        mixing = generator.standard_normal((5, 5))
        data[rows] = np.einsum("ij,njt->nit", mixing, generator.standard_normal((len(rows), 5, 12)))
        data[rows] += generator.standard_normal(5)[:, None]
    return data


def write_prepared(folder, responses, *, split=None, provenance=None):
    """Write an artifact of preprocessing as the pipeline does."""
    config = split or {"kind": "published"}

    def compute(path):
        from pydantic import TypeAdapter

        from braindecode_vis.preprocessing.splits import SplitConfig

        store.write_responses(path / "responses", responses)
        meta = store.read_json(path / "responses" / "meta.json")
        store.write_json(path / "responses" / "meta.json", {**meta, "provenance": provenance or {}})
        store.write_stimuli(path / "stimuli", make_stimuli())
        concepts = make_stimuli().concepts_of(responses.stimulus_ids)
        made = TypeAdapter(SplitConfig).validate_python(config).make(responses.trials, concepts, seed=0)
        store.write_json(path / "split.json", made.as_json())

    fields = {"split": config, "seed": 0, "dataset": {}}
    return store.RunFolder(folder).produce(
        "preprocess", version=1, fields=fields, upstream={}, compute=compute
    )


def write_fold(folder, prepared, number, encoder, record):
    """Write an artifact of a trained network, of which the audit reads the record alone."""

    def compute(path):
        from safetensors.numpy import save_file

        save_file({"model.weight": np.zeros(2, np.float32)}, path / "network.safetensors")
        store.write_json(path / "network.json", record)

    fields = {"encoder": encoder, "seed": 0, "fold": number, "repeats": "single", "selection": {}}
    store.RunFolder(folder).produce(
        "train", version=1, fields=fields, upstream={"preprocess": prepared.fingerprint}, compute=compute,
        unit=f"fold{number:02d}",
    )  # fmt: skip


def make_responses(data, trials, unit="V", **coords):
    return Responses(np.asarray(data, np.float32), ("trial", "channel", "time"), trials, unit, coords)


# --- statistics of preprocessing --------------------------------------------------------------------------


def standardise(data, keys, taught):
    out = np.empty_like(data)
    for key in np.unique(keys):
        rows = np.flatnonzero(keys == key)
        own = data[rows[taught[rows]]] if taught[rows].any() else data[rows]
        mean, std = own.mean(axis=(0, 2), keepdims=True), own.std(axis=(0, 2), keepdims=True)
        out[rows] = (data[rows] - mean) / std
    return out


def test_a_test_subject_scaled_by_trials_of_its_own_is_transductive(tmp_path):
    trials = make_trials(subjects=("01", "02"))
    data = standardise(
        make_epochs(trials), trials["subject"].to_numpy(str), (trials["split"] == "train").to_numpy()
    )
    write_prepared(tmp_path, make_responses(data, trials, "z"), split={"kind": "leave_one_subject_out"})
    audit = audit_run(tmp_path)
    assert "per subject" in find(audit, "standardising", "transductive")[0].message
    assert not audit.leaks


def test_what_the_authors_did_before_is_told(tmp_path):
    trials = make_trials()
    notes = {"standardised": "z-scored per session by its authors, shared images included", "cleaning": {}}
    notes["cleaning"] = {"autoreject": {"reject": "all"}, "ica": {"method": "fastica"}}
    write_prepared(tmp_path, make_responses(make_epochs(trials), trials, "whitened"), provenance=notes)
    audit = audit_run(tmp_path)
    told = [item.message for item in find(audit, "cleaning", "transductive")]
    assert any("shared images included" in text for text in told)
    assert any("autoreject" in text for text in told)
    assert "before they were published" in find(audit, "whitening", "warning")[0].message


# --- networks ---------------------------------------------------------------------------------------------


def audit_network(tmp_path, *, encoder=TRAIN, split=None, subjects=("01",), n_folds=1, **record):
    trials = make_trials(subjects)
    prepared = write_prepared(tmp_path, make_responses(make_epochs(trials), trials), split=split)
    history = [{"epoch": n, "validation_top1": 0.1} for n in range(3)]
    record = {"held_out": ["i0"], "held_out_by": "concept", "history": history, **record}
    for number in range(n_folds):
        write_fold(tmp_path, prepared, number, encoder, record)
    return audit_run(tmp_path)


def test_the_best_epoch_on_the_test_is_found(tmp_path):
    history = [
        {"epoch": n, "validation_top1": 0.1, "scores": {"test_top1": 0.1 + 0.2 * (n == 1)}} for n in range(2)
    ]
    audit = audit_network(tmp_path, history=history)
    assert "'test_top1'" in find(audit, "model-selection", "leak")[0].message
    assert "2 are in the history" in find(audit, "model-selection", "warning")[0].message


def test_alignment_of_an_unknown_subject_is_transductive(tmp_path):
    encoder = {**TRAIN, "subject_alignment": "euclidean"}
    audit = audit_network(
        tmp_path, encoder=encoder, split={"kind": "leave_one_subject_out"}, subjects=("01", "02"), n_folds=2
    )
    found = find(audit, "transductive", "transductive")
    assert [item.where for item in found] == ["fold 0", "fold 1"]
    assert "euclidean alignment of subject(s) 01" in found[0].message


def test_weights_from_elsewhere_are_a_warning(tmp_path):
    encoder = {**TRAIN, "network": {"kind": "parcels", "pretrained_digest": "ab" * 32}}
    (found,) = find(audit_network(tmp_path, encoder=encoder), "transductive", "warning")
    assert "abababababab" in found.message


# --- categories -------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_runs_of_faces_and_houses_pass(shared, tmp_path):
    root = shared / "data" / "muse_n170"
    run = open_run(read_config("muse_n170", ["dataset.sfreq=32"], root=root), tmp_path)
    pipeline.train(run)
    audit = audit_run(tmp_path, refit=True)
    assert not audit.leaks
    assert not audit.list_level("transductive")
    assert "not known" in find(audit, "pixels", "ok")[0].message
    assert "no run is on both sides" in find(audit, "run", "ok")[0].message
    artifact = open_audited(tmp_path).trained[1].path
    record = store.read_json(artifact / store.PROVENANCE)
    store.write_provenance(artifact / store.PROVENANCE, {**record, "n_trials": record["n_trials"] + 1})
    assert find(audit_run(tmp_path), "used-trials", "leak")[0].where == "fold 1"


# --- arithmetic -------------------------------------------------------------------------------------------


def test_copies_are_found_as_by_comparing_all_pairs():
    generator = np.random.default_rng(0)
    data = generator.integers(0, 2, (40, 2, 70)).astype(np.float32)
    data[:, :, 3:] = 0  # alike where a few values are compared first
    data[5], data[6] = 0, 0
    codes = find_copies(data)
    for i in range(40):
        for j in range(i):
            same = np.array_equal(data[i], data[j]) and data[i].min() < data[i].max()
            assert (codes[i] == codes[j]) == same


def test_permutations_keep_their_level():
    generator = np.random.default_rng(2)
    runs = np.repeat(np.arange(4), 12)
    p = [
        permute(lambda c: compute_cramers_v(c, runs), generator.integers(0, 3, 48), 0 * runs, seed, "test").p
        for seed in range(40)
    ]
    assert np.mean(np.array(p) <= 0.2) < 0.4


def test_moments_tell_who_taught_in_half_precision():
    generator = np.random.default_rng(3)
    data = generator.normal(3, 2, (300, 20))
    is_train = np.arange(300) < 240
    groups = np.zeros(300, dtype=object)
    for taught, verdict in ((is_train, "train"), (np.ones(300, bool), "all")):
        scaled = ((data - data[taught].mean(axis=0)) / data[taught].std(axis=0)).astype(np.float16)
        assert fit_standardised(scaled, groups, is_train, "everything").verdict == verdict
    assert fit_standardised(data, groups, is_train, "everything").verdict == "none"


@pytest.mark.parametrize("leaks", [False, True])
def test_a_common_space_of_subjects_must_be_that_of_training_trials(tmp_path, leaks):
    trials = make_trials(("01", "02"))
    responses = make_responses(make_epochs(trials), trials)
    split = {"kind": "leave_one_subject_out", "own_trials": 10}
    prepared = write_prepared(tmp_path, responses, split=split)
    config = RidgeConfig(subject_alignment={"kind": "hyperalignment", "n_components": 3}, alphas=(1.0,))
    concepts = trials["stimulus_id"].to_numpy(dtype=object)
    folds = LeaveOneSubjectOutConfig(own_trials=10).make(trials, concepts, seed=0).folds
    for number, fold in enumerate(folds):
        seen = responses.select(np.sort(np.r_[fold.train, fold.test]) if leaks else fold.train)
        targets = Embeddings(
            np.random.default_rng(0).standard_normal((seen.n_trials, 2)), seen.stimulus_ids, "x"
        )
        encoder = config.build(seed=0).fit(seen, targets)
        fields = {
            "encoder": config.hashed_fields(), "selection": {}, "repeats": "single", "seed": 0, "fold": number,
        }  # fmt: skip
        store.RunFolder(tmp_path).produce(
            "train", version=1, fields=fields, upstream={"preprocess": prepared.fingerprint}, compute=encoder.write,
            unit=f"fold{number:02d}",
        )  # fmt: skip
    audit = audit_run(tmp_path)
    found = find(audit, "encoder-inputs", "leak")
    assert ["those of training and test trials" in item.message for item in found] == [True, True][
        : 2 * leaks
    ]
    assert not find(audit, "transductive", "transductive")
