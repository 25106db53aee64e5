"""Retrieval by description against brute force, in a run, and with what users forget."""

import numpy as np
import pandas as pd
import pytest

from braindecode_vis import pipeline
from braindecode_vis.base.arrays import Embeddings
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.sentence_encoder import MinilmConfig
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.scoring.description_scores import (
    DescriptionTask,
    choose_weight,
    fuse_ranks,
    fuse_weighted,
    score_descriptions,
)
from braindecode_vis.scoring.retrieval import compute_similarity
from tests.embeddings.test_sentence_encoder import folder  # noqa: F401
from tests.references import assert_close

N = 30


def test_fusions_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    images, texts = rng.random((3, 6)), rng.random((3, 6)).round(1)  # texts tie
    by_ranks, weighted = np.zeros((3, 6)), np.zeros((3, 6))
    for q in range(3):
        for g in range(6):
            for table, weight in ((images, 0.7), (texts, 0.3)):
                row = table[q]
                rank = (
                    1
                    + sum(other > row[g] for other in row)
                    + 0.5 * (sum(other == row[g] for other in row) - 1)
                )
                by_ranks[q, g] += 1 / (60 + rank)
                weighted[q, g] += weight * (row[g] - row.mean()) / row.std()
    assert_close(fuse_ranks(images, texts), by_ranks)
    assert_close(fuse_weighted(images, texts, 0.3), weighted)
    # A gallery in which nothing can be told apart leaves the other one as it is.
    np.testing.assert_array_equal(np.argsort(fuse_weighted(images, np.ones((3, 6)), 0.5)), np.argsort(images))


def test_the_weight_goes_to_what_knows_more():
    rng = np.random.default_rng(0)
    truth = np.arange(N)
    good, useless = np.eye(N) + 0.3 * rng.normal(size=(N, N)), rng.normal(size=(N, N))
    assert choose_weight(useless, good, truth) > 0.8
    assert choose_weight(good, useless, truth) < 0.2
    assert choose_weight(good, good, truth) == 0.5


def test_rows_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    names = [f"i{n}" for n in range(N)]
    images = rng.normal(size=(N, 8)).astype(np.float32)
    texts = images + rng.normal(size=(N, 8)).astype(np.float32)
    texts[1] = texts[0]  # two images of one description
    queries = Embeddings((images + rng.normal(size=(N, 8))).astype(np.float32), names, "toy")
    seen, said = Embeddings(images, names, "toy"), Embeddings(texts, names, "toy")
    subjects = np.full(N, "01", dtype=object)
    asked = dict(protocol="toy", split="test", seed=0, n_bootstrap=100)  # noqa: C408
    scores, gains = score_descriptions([DescriptionTask(queries, said, seen, seen, 0.25)], subjects, **asked)
    rows = {(row.method, row.metric): row for row in scores}
    tables = {"images": compute_similarity(queries, seen), "descriptions": compute_similarity(queries, said)}
    tables["fused-ranks"] = fuse_ranks(*tables.values())
    tables["fused-weighted"] = fuse_weighted(tables["images"], tables["descriptions"], 0.25)
    for label, table in tables.items():
        own = np.diagonal(table)[:, None]
        hits = ((table >= own).sum(axis=1) <= 1).mean()
        assert rows["decoded", f"top1@{label}"].value == hits
        assert rows["decoded", f"top1@{label}"].chance == 1 / N
        assert rows["decoded", f"top1@{label}"].ci_low <= hits <= rows["decoded", f"top1@{label}"].ci_high
    table = compute_similarity(seen, said)
    ceiling = ((table >= np.diagonal(table)[:, None]).sum(axis=1) <= 1).mean()
    assert rows["oracle", "top1@descriptions"].value == ceiling < 1
    gain = next(row for row in gains if row["metric"] == "top1@fused-weighted")
    wanted = rows["decoded", "top1@fused-weighted"].value - rows["decoded", "top1@images"].value
    assert gain["difference"] == pytest.approx(wanted)
    assert gain["ci_low"] <= wanted <= gain["ci_high"]
    # A head of the network's own into another space, which knows the texts better than the target does.
    known = Embeddings(rng.normal(size=(N, 5)).astype(np.float32), names, "sentences")
    said_by_head = Embeddings(known.vectors + 0.01, names, "sentences")
    by_head, gains = score_descriptions(
        [DescriptionTask(queries, said, seen, seen, sentences=(said_by_head, known))], subjects, **asked
    )
    assert next(row for row in by_head if row.metric == "top1@sentences").value == 1
    assert "top1@sentences" in {row["metric"] for row in gains}
    # Of texts alone there is nothing to fuse, and noise is at chance.
    noise = Embeddings(rng.normal(size=(N, 8)).astype(np.float32), names, "toy")
    alone, gains = score_descriptions([DescriptionTask(noise, said)], subjects, **asked)
    assert {row.metric for row in alone} == {"top1@descriptions", "top5@descriptions", "2_way@descriptions"}
    assert not gains
    two_way = next(row for row in alone if row.metric.startswith("2_way"))
    assert two_way.ci_low < 0.5 < two_way.ci_high


def test_a_run_is_scored_by_descriptions(tmp_path):
    small = ["dataset.n_train=60", "dataset.n_test=10", "dataset.n_voxels=60", "target.kind=pixels", "target.size=16",
             "evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]  # fmt: skip
    plain = read_config("synthetic_digits", small)
    prepared = pipeline.preprocess(open_run(plain, tmp_path / "run"))
    table = prepared.stimuli.table
    # Digits are described by their curls and the thirds of the image that are bright.
    pictures = [np.asarray(image)[..., 0] for image in prepared.stimuli.iterate_images()]
    grids = [
        p[: len(p) // 4 * 4, : len(p) // 4 * 4].reshape(4, len(p) // 4, 4, -1).mean(axis=(1, 3))
        for p in pictures
    ]
    words = [
        " ".join(f"part{'abcdefghijklmnop'[n]}" for n in np.flatnonzero(g.ravel() > g.mean())) for g in grids
    ]
    bank = pd.DataFrame({"id": table["stimulus_id"], "caption": words})
    bank.to_csv(tmp_path / "captions.csv", index=False)
    asked = f"evaluation.descriptions={{captions: {tmp_path}/captions.csv}}"
    run = open_run(read_config("synthetic_digits", [*small, asked]), tmp_path / "run")
    rows = {(row["method"], row["metric"]): row for row in pipeline.evaluate(run)}
    image, text = rows["decoded", "top5@images"], rows["decoded", "top5@descriptions"]
    assert image["value"] == rows["decoded", "top5"]["value"]
    assert text["gallery_size"] == image["gallery_size"] == 10
    assert rows["decoded", "2_way@descriptions"]["ci_low"] > 0.5
    assert rows["oracle", "2_way@descriptions"]["value"] >= 0.8
    assert "regression from words of training images" in text["protocol"]
    assert "chosen on training images that were held out" in text["protocol"]
    assert ("decoded", "top1@fused-weighted") in rows
    assert "descriptions" in pipeline.report(run).read_text()
    assert "descriptions" not in plain.evaluation.hashed_fields()
    tested = [str(name) for name in prepared.responses.stimulus_ids[prepared.folds[0].test]]
    bank[bank["id"] != tested[0]].to_csv(tmp_path / "captions.csv", index=False)
    run = open_run(read_config("synthetic_digits", [*small, asked]), tmp_path / "run")
    with pytest.raises(DataError, match=r"captions.csv describes 9 of 10 tested images, and not"):
        pipeline.evaluate(run)
    with pytest.raises(DataError, match=r"captions.csv describes 9 of 10 tested images, and not"):
        pipeline.run_all(open_run(run.config, tmp_path / "other"))
    assert not (tmp_path / "other" / "stages" / "train").exists()
    # A language without spaces: one word for all, and one of each image alone.
    alike = [f"alike {'ab'[n % 2]}{'abcdefghijklmnop'[n % 16] * (n + 1)}" for n in range(len(bank))]
    bank.assign(caption=alike).to_csv(tmp_path / "captions.csv", index=False)
    run = open_run(read_config("synthetic_digits", [*small, asked]), tmp_path / "run")
    with pytest.raises(
        DataError, match=r"10 of 10 descriptions do not distinguish their image from any other"
    ):
        pipeline.evaluate(run)
    bank.assign(caption="a digit").to_csv(tmp_path / "captions.csv", index=False)
    run = open_run(read_config("synthetic_digits", [*small, asked]), tmp_path / "run")
    with pytest.raises(DataError, match=r"training images are all described as 'a digit', so the meaning"):
        pipeline.evaluate(run)
    bank[bank["id"].isin(tested)].to_csv(tmp_path / "captions.csv", index=False)
    run = open_run(read_config("synthetic_digits", [*small, asked]), tmp_path / "run")
    with pytest.raises(DataError, match=r"0 training images are described"):
        pipeline.evaluate(run)


def test_a_run_without_image_files_is_scored_and_predicts(tmp_path, monkeypatch):
    """Images that may not be shown, or never were files, are known by their descriptions alone."""
    import braindecode_vis as bdv

    small = ["dataset.n_train=40", "dataset.n_test=6", "dataset.n_voxels=30", "target.kind=pixels", "target.size=8",
             "evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]  # fmt: skip
    run = open_run(read_config("synthetic_digits", small), tmp_path / "run")
    stimuli = pipeline.preprocess(run).stimuli
    pipeline.embed(run)
    letters = "abcdefgh"
    texts = [" ".join(letters[int(d)] * 3 for d in str(n % 8) + str(n % 3)) for n in range(len(stimuli))]
    bank = pd.DataFrame({"id": stimuli.ids, "caption": texts})
    bank.to_csv(tmp_path / "captions.csv", index=False)
    monkeypatch.setattr(StimulusSet, "has_pixels", property(lambda stimuli: False))
    asked = f"evaluation.descriptions={{captions: {tmp_path}/captions.csv, weight: 0.5}}"
    run = open_run(read_config("synthetic_digits", [*small, asked]), tmp_path / "run")
    metrics = {row["metric"] for row in pipeline.evaluate(run)}
    assert {"top1", "top1@images", "top1@descriptions", "top1@fused-weighted"} <= metrics
    assert "pixcorr" not in metrics
    assert "No image file is available" in pipeline.report(run).read_text()
    prepared = pipeline.preprocess(run)
    test = prepared.responses.select(prepared.folds[0].test)
    found = bdv.open_run(tmp_path / "run").predict(
        test.data, shown=test.stimulus_ids, gallery=tmp_path / "captions.csv", prepared=True
    )
    assert not found.makes_images
    assert "top1@descriptions" in set(found.scores["metric"])
    saved = found.save(tmp_path / "out")
    assert not (saved / "images").exists()
    assert "description" in pd.read_csv(saved / "retrieved.csv")


def test_a_decoder_of_texts_never_sees_a_picture(folder, tmp_path):  # noqa: F811
    import braindecode_vis as bdv

    words = ["a cat", "the dog", "the red grass", "a dog", "the cat", "red grass", "a red dog", "a red cat"]
    names = [f"i{n}" for n in range(len(words))]
    pd.DataFrame({"id": names, "caption": words}).to_csv(tmp_path / "captions.csv", index=False)
    target = {
        "kind": "minilm",
        "weights": str(folder),
        "captions": str(tmp_path / "captions.csv"),
        "device": "cpu",
    }
    rng = np.random.default_rng(0)
    vectors = MinilmConfig(weights=folder, device="cpu").build().encode_texts(words)
    shown = np.tile(np.arange(len(words)), 5)
    X = vectors[shown] @ rng.normal(size=(16, 40)) + 0.01 * rng.normal(size=(len(shown), 40))
    ids = np.array(names)[shown]
    decoder = bdv.Decoder(encoder={"kind": "ridge", "alphas": [0.01]}, target=target).fit(X[:32], ids[:32])
    found = decoder.retrieve(X[32:], gallery=tmp_path / "captions.csv", k=1)
    assert (found["picture"].to_numpy() == ids[32:]).mean() > 0.8
    with pytest.raises(DataError, match=r"or ids together with images="):
        bdv.Decoder(encoder="ridge", target="pixels").fit(X, ids)
