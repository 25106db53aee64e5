"""A gallery of a bank: exact ranks are those of brute force, copies of tested images are out, recall is measured."""

import numpy as np
import pytest

from braindecode_vis.base.arrays import Embeddings, MappedRows, read_rows
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.seeds import make_generator
from braindecode_vis.scoring import gallery_scores
from braindecode_vis.scoring.gallery_scores import (
    GalleryTask,
    LargeGalleryConfig,
    choose_candidates,
    index_gallery,
    score_large_gallery,
)
from braindecode_vis.scoring.retrieval import compute_ranks
from tests.constants import replace_constants

N, D, TESTED = 3000, 24, 40


def shift(rows, numbers):
    """Stand in for what an encoder and a centre do."""
    return rows.astype(np.float32) - 0.25


@pytest.fixture
def task(tmp_path):
    """Queries near their images, and a bank in half precision that holds three of these again."""
    rng = np.random.default_rng(0)
    tested = rng.standard_normal((TESTED, D)).astype(np.float32)
    bank = rng.standard_normal((N, D)).astype(np.float16)
    bank[7], bank[2000], bank[2999] = tested[0], 3 * tested[1] - 2 * 0.25, 0.25
    np.save(tmp_path / "vectors.npy", bank)
    held = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    names = [f"t{n}" for n in range(TESTED)]
    ids = np.array(["t2", *(f"b{n}" for n in range(1, N))], dtype=object)
    near = tested - 0.25 + 0.9 * rng.standard_normal((TESTED, D)).astype(np.float32)
    return GalleryTask(
        Embeddings(near, names, "toy"),
        Embeddings(tested - 0.25, names, "toy"),
        Embeddings.from_checked(MappedRows(held, shift), ids, "toy"),
    )


def score(task, search, **constants):
    config = replace_constants(LargeGalleryConfig, **constants)(bank="bank", search=search)
    found = score_large_gallery(
        config,
        [task],
        np.full(TESTED, "01", dtype=object),
        protocol="toy",
        split="test",
        seed=0,
        n_bootstrap=200,
    )
    return {row.metric: row for row in found}


def test_exact_ranks_are_those_of_brute_force_and_copies_of_tested_images_are_out(task):
    found = choose_candidates(task.tested, task.bank)
    # By name, as the same direction (also in half precision), and without a direction.
    assert found.n_same == 4
    assert len(found.gallery) == TESTED + N - 4
    whole = np.asarray(found.gallery.vectors).astype(np.float64)
    left = task.queries.vectors.astype(np.float64)
    cosines = (left / np.linalg.norm(left, axis=1)[:, None]) @ (
        whole / np.linalg.norm(whole, axis=1)[:, None]
    ).T
    above = (cosines > np.diag(cosines[:, :TESTED])[:, None]).sum(axis=1)
    ranked = compute_ranks(task.queries, found.gallery, n_top=10, device="cpu", block_gallery=256)
    np.testing.assert_array_equal(ranked.n_above, above)
    np.testing.assert_array_equal(ranked.top_indices, np.argsort(-cosines, axis=1)[:, :10])
    rows = score(task, "exact")
    assert rows["top1@large-gallery"].value == (above == 0).mean()
    assert rows["top100@large-gallery"].value == (above < 100).mean()
    assert rows["top1@large-gallery"].chance == 1 / (TESTED + N - 4)
    assert rows["top1@large-gallery"].gallery_size == TESTED + N - 4
    assert rows["median_rank@large-gallery"].value == np.median(1 + above)
    assert (
        rows["top10@large-gallery"].ci_low
        <= rows["top10@large-gallery"].value
        <= rows["top10@large-gallery"].ci_high
    )
    assert "large gallery of 3,036 images" in rows["top1@large-gallery"].protocol
    assert "4 of the bank left out" in rows["top1@large-gallery"].protocol


def test_the_recall_of_faiss_is_measured_and_its_scores_are_its_own(task):
    pytest.importorskip("faiss")
    exact = score(task, "exact")
    every = score(task, "faiss", n_probe=1000, n_checked=10)
    recall = every["recall10@large-gallery-faiss"]
    assert (recall.value, recall.n_queries) == (1.0, 10)
    assert "by faiss" in recall.protocol
    for k in (1, 5, 100):
        assert every[f"top{k}@large-gallery-faiss"].value == exact[f"top{k}@large-gallery"].value
        assert every[f"top{k}@large-gallery-faiss"].chance == exact[f"top{k}@large-gallery"].chance
    few = score(task, "faiss", n_probe=1)
    assert 0 < few["recall10@large-gallery-faiss"].value < 0.9
    assert few["top100@large-gallery-faiss"].value < exact["top100@large-gallery"].value
    # What is not found is no candidate.
    found = choose_candidates(task.tested, task.bank)
    rows, similar = index_gallery(found.gallery, n_probe=1, chance=make_generator(0, "x"))(
        task.queries.flat()[:2], 2000
    )
    assert (rows == -1).any()
    assert np.isneginf(similar[rows == -1]).all()


def test_noise_is_at_chance_among_many(task):
    rng = np.random.default_rng(1)
    noise = Embeddings(rng.standard_normal((TESTED, D)).astype(np.float32), task.queries.ids, "toy")
    rows = score(GalleryTask(noise, task.tested, task.bank), "exact")
    assert rows["2_way@large-gallery"].ci_low < 0.5 < rows["2_way@large-gallery"].ci_high


def test_rows_are_read_in_runs_as_they_stand(tmp_path, monkeypatch):
    values = np.arange(300, dtype=np.float32).reshape(100, 3)
    np.save(tmp_path / "v.npy", values)
    held = np.load(tmp_path / "v.npy", mmap_mode="r")
    for rows in ([], [5], [3, 4, 5, 2, 1, 99, 0], [-1, 0], list(range(100))):
        np.testing.assert_array_equal(read_rows(held, np.array(rows, int)), values[rows])
    mapped = MappedRows(held, lambda block, numbers: block + numbers[:, None], np.array([9, 8]), -values[:1])
    np.testing.assert_array_equal(mapped[:], [-values[0], values[9] + 9, values[8] + 8])
    np.testing.assert_array_equal(mapped[2], values[8] + 8)
    np.testing.assert_array_equal(np.asarray(mapped), mapped[:])
    assert (mapped.shape, mapped.nbytes, mapped.size) == ((3, 3), 36, 9)


def test_a_run_is_scored_in_the_gallery_of_a_bank(tmp_path, monkeypatch):
    from braindecode_vis import pipeline
    from braindecode_vis.config import check_files, read_config
    from braindecode_vis.embeddings import image_bank
    from braindecode_vis.embeddings.image_sources import open_images
    from braindecode_vis.pipeline.runs import open_run

    small = ["dataset.n_train=40", "dataset.n_test=10", "dataset.n_voxels=30", "target.kind=pixels", "target.size=16",
             "evaluation.n_bootstrap=100", "evaluation.n_permutations=100"]  # fmt: skip
    bank = tmp_path / "bank"
    bank.mkdir()
    config = read_config("synthetic_digits", [*small, f"evaluation.gallery={{bank: {bank}}}"])
    with pytest.raises(DataError, match=r"is no bank of images: .*make one with embed --images"):
        check_files(config)
    source = open_images("phantom:300,size=16")
    encoder = pipeline.embed(open_run(read_config("synthetic_digits", small), tmp_path / "run"))[0].encoder
    plan = image_bank.plan_bank(bank, source, encoder)
    image_bank.embed_parts(plan, source, encoder, plan.parts)
    image_bank.finish_bank(plan)
    check_files(config)
    run = open_run(config, tmp_path / "run")
    rows = {row["metric"]: row for row in pipeline.evaluate(run) if "@large-gallery" in row["metric"]}
    assert rows["top1@large-gallery"]["gallery_size"] == 310
    assert rows["top1@large-gallery"]["chance"] == 1 / 310
    page = pipeline.report(run).read_text()
    assert "large-gallery" in page
    # Without the setting the fingerprint is that of earlier versions.
    assert "gallery" not in read_config("synthetic_digits", small).evaluation.hashed_fields()
    with pytest.raises(
        DataError, match=r"the bank is in the space 'pixels/16x16x1' .* embed its images with this run"
    ):
        gallery_scores.check_bank_space(image_bank.read_image_bank(bank), "pixels/8x8x1", (64,))
    monkeypatch.setitem(
        gallery_scores.__dict__, "require", lambda *_, **__: (_ for _ in ()).throw(ConfigError("no"))
    )
    with pytest.raises(ConfigError):
        check_files(
            read_config("synthetic_digits", [*small, f"evaluation.gallery={{bank: {bank}, search: faiss}}"])
        )


def test_short_vectors_are_candidates_and_those_without_a_length_are_not(tmp_path):
    """What is compared are directions; a blank image has none."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, D)).astype(np.float32)
    rows *= (np.geomspace(1e-3, 10, 30) / np.linalg.norm(rows, axis=1))[:, None].astype(np.float32)
    rows[4] = 0
    bank = MappedRows(rows, lambda chosen, numbers: chosen)
    tested = Embeddings(rng.standard_normal((5, D)).astype(np.float32), [f"t{n}" for n in range(5)], "toy")
    names = np.array([f"b{n}" for n in range(30)], dtype=object)
    found = choose_candidates(tested, Embeddings.from_checked(bank, names, "toy"))
    assert found.n_same == 1
    assert found.gallery.ids.tolist() == [*tested.ids, *names[:4], *names[5:]]


def test_faiss_makes_one_cell_of_few_candidates():
    """Cells are learnt from 39 candidates each: one cell of 77 is searched whole, of the two of 78 one is."""
    pytest.importorskip("faiss")
    rows = np.random.default_rng(0).standard_normal((78, D)).astype(np.float32)
    for n, is_whole in ((77, True), (78, False)):
        gallery = Embeddings(rows[:n], [f"b{k}" for k in range(n)], "toy")
        search = index_gallery(gallery, n_probe=1, chance=make_generator(0, "x"))
        units = rows[:4] / np.linalg.norm(rows[:4], axis=1, keepdims=True)
        found, similar = search(units, n)
        np.testing.assert_array_equal(found[:, 0], np.arange(4))  # each finds itself first
        np.testing.assert_allclose(similar[:, 0], 1, rtol=1e-5)
        assert (found >= 0).all() == is_whole
