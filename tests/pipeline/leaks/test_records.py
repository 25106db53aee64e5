"""What artifacts recorded is compared with what they are: names, epochs, choices, centring, transductive settings."""

import numpy as np
import pytest

from braindecode_vis.base import store
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.parts.audit.choices import _check_epochs, check_held_out, check_logs, check_penalties
from braindecode_vis.pipeline.leaks.records import (
    _check_centre,
    _find_tampering,
    check_chain,
    check_options,
)
from braindecode_vis.pipeline.leaks.run_files import Record, open_audited
from tests.parts.audit.small_runs import read_name, write_artifact, write_bank, write_prepared, write_trained

N, N_TRAIN = 24, 16
ROWS = np.arange(N)
NAMES = np.array([f"i{row:03d}" for row in ROWS], dtype=object)
FOLDS = [(ROWS[:N_TRAIN], ROWS[N_TRAIN:])]


def write_run(folder, *, folds=FOLDS, retrieval=None, write_ranks=None, trained=None, **options):
    """Write a run of every stage up to its ranks, one training for each fold."""
    data = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
    prepared = write_prepared(folder, data, folds, **options)
    vectors = np.random.default_rng(1).normal(size=(N, 7)) * np.arange(1, 8) + 2
    bank = write_bank(folder, prepared, NAMES, vectors.astype(np.float32))
    fits = [write_trained(folder, prepared, bank, number=n, **(trained or {})) for n in range(len(folds))]
    upstream = {f"train{n:02d}": read_name(fit) for n, fit in enumerate(fits)}
    retrieved = write_artifact(
        folder, "retrieve", {"retrieval": retrieval or {}}, {**upstream, "preprocess": read_name(prepared)},
        write=write_ranks,
    )  # fmt: skip
    write_artifact(folder, "evaluate", upstream={"retrieve": read_name(retrieved)})
    return vectors


# --- names --------------------------------------------------------------------------------------------------


def test_the_name_and_the_place_of_an_artifact_are_those_that_its_record_gives(tmp_path):
    """A folder that was renamed, or moved to another stage, whatever its record says."""

    def look(path):
        return _find_tampering(Record(path, store.read_provenance(path / store.PROVENANCE)), reads=True)

    artifact = write_artifact(
        tmp_path, "train", {"seed": 1}, unit="fold00", write=lambda p: (p / "a").write_text("1")
    )
    assert look(artifact) == ""
    renamed = artifact.rename(artifact.with_name("fold01" + artifact.name[6:]))
    assert f"belongs in train/{artifact.name}, not train/{renamed.name}" in look(renamed)
    (tmp_path / "stages" / "retrieve").mkdir()
    moved = renamed.rename(tmp_path / "stages" / "retrieve" / artifact.name)
    assert f"belongs in train/{artifact.name}, not retrieve/" in look(moved)
    back = moved.rename(artifact)
    (back / "b").write_text("2")
    assert look(back) == "b is not a file of the run"
    (back / "b").unlink()
    (back / "a").write_text("2")
    assert "file a was missing or changed" in look(back)
    record = store.read_json(back / store.PROVENANCE)
    store.write_provenance(back / store.PROVENANCE, {**record, "fields": {"seed": 2}})
    assert "make the fingerprint" in look(back)


def test_every_fold_is_trained_once_on_the_trials_that_are_here(tmp_path):
    write_run(tmp_path)
    run = open_audited(tmp_path)
    assert {item.level for item in check_chain(run)} == {
        "ok",
        "warning",
    }  # there are no scores and no settings
    assert "4 artifact(s)" not in check_chain(run)[0].message
    assert "5 artifact(s) have names that match their records" in check_chain(run)[0].message


def test_a_fold_that_was_trained_as_another_is_a_leak(tmp_path):
    write_run(tmp_path, trained={"fields": {"fold": 3}})
    (leak,) = [item for item in check_chain(open_audited(tmp_path)) if item.level == "leak"]
    assert "fold 0 was trained as fold 3" in leak.message


# --- choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "n_kept", "words"),
    [
        (10.0, 4, ""),
        (1.0, 4, "penalty 1 is used, but the inner folds chose 10"),
        (10.0, 5, "5 features are used"),
    ],
)
def test_penalty_and_number_of_features_are_the_best_of_inner_folds(tmp_path, alpha, n_kept, words):
    choices = [
        {"alpha": a, "n_features": n, "mse": abs(a - 10) + abs(n - 4)} for a in (1.0, 10.0) for n in (4, 5)
    ]
    content = {"alpha": alpha, "n_kept": n_kept, "choices": choices}
    write_run(tmp_path, trained={"write": lambda path: store.write_json(path / "ridge.json", content)})
    (found,) = check_penalties(open_audited(tmp_path))
    assert (found.level, words in found.message) == ("leak" if words else "ok", True)


PATIENT = {"kind": "training_loss", "min_delta": 0.1, "patience": 2}
EARLY = {"kind": "early_stopping", "monitor": "loss", "patience": 2}


@pytest.mark.parametrize(
    ("rule", "values", "planned", "words"),
    [
        ({"kind": "last"}, [3, 2, 1], 3, ""),
        ({"kind": "last"}, [3, 2, 1], 4, "the last of 4 epochs should be kept, but 3 are in the history"),
        # Stopped two epochs after the best one, or not at all.
        (PATIENT, [5, 4, 3, 3, 2.95], 9, ""),
        (PATIENT, [5, 4, 3, 2.5, 2.45], 9, "lowest in 3"),
        (PATIENT, [5, 4, 3, 2, 1], 5, ""),
        (PATIENT, [5, 4, 3, 2, 2], 5, ""),
        (EARLY, [5, 4, 3, 3.5, 4], 9, ""),
        (EARLY, [5, 4, 3, 3.5], 9, "best in 2"),
        (EARLY, [5, 4, 3, 3.5, 4, 5], 9, "best in 2"),
        (EARLY, [5, 4, 3, 2, 1], 5, ""),
        (EARLY, [5, 4, 3, 3.5], 4, ""),
        ({**EARLY, "monitor": "top5"}, [0.1, 0.4, 0.3, 0.2], 9, ""),
        ({**EARLY, "monitor": "top5"}, [0.1, 0.2, 0.3, 0.4], 9, "best in 3"),
        (EARLY, [], 0, ""),
    ],
)
def test_the_number_of_epochs_is_what_the_rule_makes_of_the_curve(rule, values, planned, words):
    name = {"training_loss": "loss", "last": "loss"}.get(rule["kind"], f"validation_{rule.get('monitor')}")
    found = _check_epochs([{name: value} for value in values], {"epochs": planned}, rule, "fold 0")
    assert [item.level for item in found] == (["warning"] if words else [])
    assert not words or words in found[0].message


@pytest.mark.parametrize(
    ("name", "line", "found"),
    [
        ("work/train00/training.jsonl", '{"epoch": 3, "validation_top5": 0.3, "test_top5": 0.4}', True),
        ("work/train00/training.jsonl", '{"epoch": 3, "validation_top5": 0.3, "latest": 1}', False),
        ("logs/curve.csv", "epoch,train loss,test/accuracy", True),
        ("logs/out.log", "epoch 3 best_test_acc=0.4", True),
    ],
)
def test_logs_with_test_scores_are_found(tmp_path, name, line, found):
    path = tmp_path / "run" / name
    write_run(tmp_path / "run")
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert [item.level for item in check_logs(open_audited(tmp_path / "run"))] == ["leak" if found else "ok"]
    (tmp_path / "sweep.csv").write_text("run\n")
    told = check_logs(open_audited(tmp_path / "run"))[-1]
    assert (told.level, "part of a sweep" in told.message) == ("warning", True)


def test_a_history_with_test_scores_is_found(tmp_path):
    content = {"history": [{"epoch": 0, "validation_top1": 0.1, "scores": {"test_top1": 0.1}}]}
    write_run(tmp_path, trained={"write": lambda path: store.write_json(path / "network.json", content)})
    (found,) = check_logs(open_audited(tmp_path))
    assert (found.level, "contains 'test_top1'" in found.message) == ("leak", True)


@pytest.mark.parametrize(
    ("held", "by", "declared", "words"),
    [
        (["i000", "i001"], "image", ["trial"], []),
        (["i000", "i020"], "image", ["trial"], ["1 validation image(s) are not training images, first i020"]),
        (["i020"], "image", ["trial", "concept"],
         ["1 validation image(s)", "1 concept(s) are in both validation and test, first c5"]),
        (["i000"], "concept", ["trial"], ["1 validation concept(s) are also in training, first c0"]),
    ],
)  # fmt: skip
def test_validation_images_are_training_images_that_were_held_out(tmp_path, held, by, declared, words):
    content = {"held_out": held, "held_out_by": by, "history": [{"loss": 1.0}]}
    write_run(
        tmp_path, concepts=[f"c{row // 4}" for row in ROWS], by=declared,
        trained={
            "fields": {"encoder": {"epochs": 1}},
            "write": lambda path: store.write_json(path / "network.json", content),
        },
    )  # fmt: skip
    found = check_held_out(open_audited(tmp_path))
    assert [item.level for item in found] == (["leak"] * len(words) or ["ok"])
    assert all(text in item.message for text, item in zip(words, found, strict=False))


# --- transductive settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retrieval", "words"),
    [
        ({"centre": "none", "csls": False, "k": 3}, []),
        ({"csls": True}, ["csls True: hubs are discounted"]),
        ({"csls_k": 5}, ["csls_k 5: hubs"]),
        ({"centre": "query"}, ["centre query: statistics of the test queries"]),
        ({"hubness": "csls"}, ["hubness csls: hubs"]),
        ({"query_whitening": True}, ["query_whitening True"]),
        ({"rerank": {"kind": "sinkhorn"}}, ["rerank.kind sinkhorn: queries and candidates"]),
        (
            {"rerank": [{"kind": "hungarian"}], "whitening": "queries"},
            ["rerank.kind hungarian", "whitening queries"],
        ),
    ],
)
def test_retrieval_that_uses_all_queries_is_transductive(tmp_path, retrieval, words):
    write_run(tmp_path, retrieval=retrieval)
    found = check_options(open_audited(tmp_path))
    assert [item.level for item in found] == (["transductive"] * len(words) or ["ok"])
    assert all(text in item.message for text, item in zip(words, found, strict=False))


@pytest.mark.parametrize(
    ("encoder", "subjects", "found"),
    [
        ({"subject_alignment": "euclidean"}, "12",
         [("transductive", "fold 0", "euclidean alignment of subject(s) 1 uses"),
          ("transductive", "fold 1", "euclidean alignment of subject(s) 2 uses")]),
        ({"subject_alignment": "euclidean"}, "11", [("ok", "", "no setting")]),
        ({"subject_alignment": "none"}, "12", [("ok", "", "no setting")]),
        ({"network": {"kind": "parcels", "pretrained_digest": "ab" * 32}}, "11",
         [("warning", "fold 0", "sha256 abababababab)")]),
    ],
)  # fmt: skip
def test_what_encoders_know_of_other_trials_is_told(tmp_path, encoder, subjects, found):
    """Subjects that nothing is learnt from can be aligned by the predicted trials alone; weights may know them."""
    who, halves = np.array(list(subjects), dtype=object)[ROWS % 2], (ROWS[::2], ROWS[1::2])
    folds = [halves[::-1], halves]
    write_run(tmp_path, folds=folds, columns={"subject": who}, trained={"fields": {"encoder": encoder}})
    told = check_options(open_audited(tmp_path))
    assert [(item.level, item.where) for item in told] == [item[:2] for item in found]
    assert all(words in item.message for item, (*_, words) in zip(told, found, strict=True))


@pytest.mark.parametrize("per_split", [False, True])
def test_models_chosen_with_test_trials_are_transductive(tmp_path, per_split):
    model = {"kind": "glm_by_voxel", "denoise": True, "ridge": True, "per_split": per_split}
    write_run(tmp_path, fields={"dataset": {"kind": "bids_fmri", "model": model}})
    (found,) = check_options(open_audited(tmp_path))
    assert found.level == ("ok" if per_split else "transductive")
    assert per_split or "all runs of a person, test trials included" in found.message


@pytest.mark.parametrize("centre", ["none", "mean", "zscore"])
@pytest.mark.parametrize(
    ("by", "level", "words"),
    [
        ("training images", None, ""),
        ("test images", "transductive", "by those of the test images"),
        ("test queries", "transductive", "by those of the test queries"),
        ("nothing known", "warning", "but otherwise"),
    ],
)
def test_what_similarities_are_centred_by_is_known(tmp_path, centre, by, level, words):
    """The second of two folds, since nothing was ranked in the first; one feature is constant."""
    folds = [(ROWS[8:], ROWS[:8]), (ROWS[:N_TRAIN], ROWS[N_TRAIN:])]
    vectors = np.random.default_rng(1).normal(size=(N, 7)) * np.arange(1, 8) + 2
    test = folds[1][1]
    queries = (vectors + np.random.default_rng(2).normal(size=vectors.shape))[test]
    reference = {
        "training images": vectors[:N_TRAIN], "test images": vectors[test], "test queries": queries,
        "nothing known": vectors[:5] - 3,
    }[by]  # fmt: skip
    mean = np.zeros(7) if centre == "none" else reference.mean(axis=0)
    spread = reference.std(axis=0) if centre == "zscore" else np.ones(7)
    rows = zip((queries - mean) / spread, (vectors[test] - mean) / spread, strict=True)
    cosines = np.array([query @ truth / np.sqrt(query @ query * (truth @ truth)) for query, truth in rows])

    def write_ranks(path):
        folder = path / "fold01"
        folder.mkdir()
        (path / "fold00").mkdir()
        np.save(folder / "true_similarities.npy", cosines if centre != "none" or not words else 0.9 * cosines)
        store.write_embeddings(folder, Embeddings(queries.astype(np.float32), NAMES[test], "toy"))
        store.write_json(folder / "retrieval.json", {"query_ids": NAMES[test].tolist()})

    write_run(tmp_path, folds=folds, retrieval={"centre": centre}, write_ranks=write_ranks)
    found = _check_centre(open_audited(tmp_path))
    if centre == "none" and words:  # nothing is subtracted, so that other numbers are of no centre
        level, words = "warning", "but otherwise"
    assert [(item.level, item.where) for item in found] == ([(level, "fold 1")] if level else [])
    assert not found or words in found[0].message
