"""Images of full size from the generator to the page: sizes, memory, and what a killed process leaves."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

import braindecode_vis as bdv
from braindecode_vis import pipeline
from braindecode_vis.base import store
from braindecode_vis.base.checks import DataError, Notice
from braindecode_vis.base.stimuli import (
    ImageRows,
    StimulusSet,
    crop_square,
    find_comparison_size,
    read_image_size,
    resize_image,
    show_as_compared,
)
from braindecode_vis.config import read_config
from braindecode_vis.embeddings.pixels import PixelsConfig
from braindecode_vis.generation.captions import NearestCaptions
from braindecode_vis.generation.inversion import LatentsGenerator
from braindecode_vis.pipeline import decoding, reconstruction
from braindecode_vis.pipeline.image_files import DrawnImages, DrawnTexts, ImageWriter
from braindecode_vis.pipeline.runs import open_run
from braindecode_vis.report.gallery import GalleryContent
from braindecode_vis.report.page import ReportContent, write_report
from braindecode_vis.scoring.metrics.image import (
    compute_image_metric,
    make_image_table,
    tabulate_image_metric,
)
from braindecode_vis.scoring.score_table import compute_scores
from braindecode_vis.scoring.scoring_task import ScoringTask

SMALL = [
    "dataset.n_train=60",
    "dataset.n_test=12",
    "evaluation.n_bootstrap=100",
    "evaluation.n_permutations=100",
]


def make_images(n, height=20, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def test_rows_name_pictures_of_any_size(tmp_path):
    pictures = [make_images(1, 30, 20, seed=1)[0], make_images(1, 16, 16, seed=2)[0]]
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    rows = ImageRows(paths, np.array([[1, 1], [0, 1]]))
    assert (len(rows), rows.ndim, rows.shape) == (2, 5, (2, 2, 16, 16, 3))
    np.testing.assert_array_equal(rows[1, 0], pictures[0])
    np.testing.assert_array_equal(rows[:, 0].crop()[1], crop_square(pictures[0]))
    np.testing.assert_array_equal(np.asarray(rows[0]), [pictures[1]] * 2)
    np.testing.assert_array_equal(rows.resize(8, 8)[1, 0], resize_image(pictures[0], 8, 8))
    with pytest.raises(DataError, match="take them row by row"):
        np.asarray(rows)
    table = make_image_table(
        rows[:, 1], {"decoded": rows, "copies": ImageRows.of(np.stack([pictures[1]] * 2))}
    )
    assert len(table.images) == 2
    assert table.made["decoded"].tolist() == [[0, 1], [0, 0]]
    assert table.made["copies"].tolist() == [[0, 0]]
    assert (find_comparison_size(90, 128), find_comparison_size(90, 129)) == ((90, 128), (128, 128))


@pytest.mark.parametrize("name", ["pixcorr", "ssim"])
def test_metrics_at_425_pixels_read_images_in_full_and_few_at_a_time(name, tmp_path):
    images = [make_images(12, 300, 300, seed) for seed in range(2)]
    rows = []
    for number, stack in enumerate(images):
        np.save(tmp_path / f"{number}.npy", stack)
        rows.append(ImageRows.of(np.load(tmp_path / f"{number}.npy", mmap_mode="r")))
    tracemalloc.start()
    found = compute_image_metric(name, *rows, protocol="425")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, compute_image_metric(name, *images, protocol="425"))
    assert peak < 40e6  # all of them are 78 MB as numbers
    table = tabulate_image_metric(name, rows[0][:3], rows[1][:2], protocol="425")
    np.testing.assert_allclose(table.diagonal(), found[:2], atol=1e-5)


# --- written batch by batch ---------------------------------------------------------------------------------------


def draw(writer, made, n=10, step=4, stop=99):
    images = make_images(n)

    def make(rows):
        made.append(len(rows))
        if len(made) == stop:
            raise KeyboardInterrupt
        return {"decoded": images[rows.start : rows.stop]}

    writer.open("decoded", n)
    writer.draw(DrawnImages(("decoded",), n, step, make), 0)
    return images


def test_what_was_written_is_not_made_again(tmp_path):
    made = []
    with pytest.raises(KeyboardInterrupt), ImageWriter(tmp_path / "kept") as writer:
        draw(writer, made, stop=3)
    path = tmp_path / "kept/decoded.npy"
    broken = np.load(path, mmap_mode="r+")
    broken[1] += 1  # as a power cut may leave a row that was noted
    broken.flush()
    again = []
    with ImageWriter(tmp_path / "kept") as writer:
        images = draw(writer, again)
        writer.move(tmp_path, {"decoded": (5, 2)})
    assert (made, again, writer.n_kept) == ([4, 4, 2], [4, 2], 7)
    np.testing.assert_array_equal(np.load(tmp_path / "decoded.npy"), images.reshape(5, 2, 20, 20, 3))
    assert not list((tmp_path / "kept").iterdir())


def test_a_generator_of_several_sizes_is_told(tmp_path):
    with ImageWriter(tmp_path) as writer:
        writer.open("decoded", 4)
        writer.write("decoded", 0, make_images(2))
        with pytest.raises(DataError, match="20 x 20 pixels, but from row 2 on 20 x 24"):
            writer.write("decoded", 2, make_images(2, 20, 24))
        with pytest.raises(DataError, match="must be uint8"):
            writer.write("decoded", 2, make_images(2).astype(float))


def make_run(folder, *changes):
    return open_run(read_config("synthetic_digits", [*SMALL, "generator={kind: latents}", *changes]), folder)


def test_the_mean_embedding_is_drawn_a_few_times_whatever_the_number_of_rows(tmp_path, monkeypatch):
    """It is the same for all rows, and used to be drawn for each of them."""
    monkeypatch.setattr(reconstruction, "MEAN_DRAWS", 3)
    monkeypatch.setattr(LatentsGenerator, "rows_at_once", 2)
    generate, drawn = LatentsGenerator.generate, []

    def count(self, embeddings, **how):
        drawn.append(len(embeddings))
        return generate(self, embeddings, **how)

    monkeypatch.setattr(LatentsGenerator, "generate", count)
    made = pipeline.reconstruct(make_run(tmp_path / "run"))
    mean = np.asarray(made.images["mean_embedding"])
    assert len(mean) == 12
    np.testing.assert_array_equal(mean, mean[np.arange(12) % 3])
    assert drawn == [2] * 6 + [2, 1] + [2] * 6  # of the predictions, the mean and the true embeddings


def test_a_killed_run_keeps_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(LatentsGenerator, "rows_at_once", 5)
    whole = pipeline.reconstruct(make_run(tmp_path / "whole"))
    generate, calls, fits = LatentsGenerator.generate, [], []
    fit = reconstruction.fit_fold
    monkeypatch.setattr(reconstruction, "fit_fold", lambda *a, **how: fits.append(a) or fit(*a, **how))

    def count(self, embeddings, **how):
        calls.append(how["first_row"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, embeddings, **how)

    monkeypatch.setattr(LatentsGenerator, "generate", count)
    with pytest.raises(KeyboardInterrupt):
        pipeline.reconstruct(make_run(tmp_path / "run"))
    with pytest.warns(Notice, match="17 of 36 images are kept from an earlier call"):
        made = pipeline.reconstruct(make_run(tmp_path / "run"))
    # The batch that was stopped, and what follows; of the eight draws of the mean, the first five are repeated in it.
    assert calls == [0, 5, 10, 0, 5, 0, 5, 0, 5, 10]
    assert len(fits) == 1  # of two fits that differ, a generator trained on a GPU would mix the images
    for name, images in whole.images.items():
        np.testing.assert_array_equal(np.asarray(made.images[name]), np.asarray(images))
    assert not (tmp_path / "run/work").exists()


# --- by several processes -------------------------------------------------------------------------------------------


def list_files(folder):
    (made,) = (folder / "stages/reconstruct").iterdir()
    return {
        str(path.relative_to(made)): path.read_bytes()
        for path in made.rglob("*")
        if path.is_file() and path.name != store.PROVENANCE
    }


def test_processes_that_share_the_images_make_what_one_makes(tmp_path, monkeypatch, recwarn):
    """Three shares, one of which is stopped and given again; the branch's images lead those of every share.

    Captions are shared too: every process used to decode all of them.
    """
    bank = tmp_path / "bank.csv"
    ids = pipeline.preprocess(make_run(tmp_path / "ids")).stimuli.ids
    bank.write_text("\n".join(["id,caption", *(f"{name},number {name}" for name in ids)]))
    changes = (
        f"reconstruction.captions=[{{kind: nearest, bank: {bank}}}]",
        "prior={kind: spread}", "reconstruction.n_draws=2",
        "reconstruction.low_level={target: {kind: taesd, weights: random, image_size: 32, device: cpu}}",
    )  # fmt: skip
    monkeypatch.setattr(LatentsGenerator, "rows_at_once", 5)
    monkeypatch.setattr(DrawnTexts, "step", 5)
    pipeline.reconstruct(make_run(tmp_path / "whole", *changes))
    generate, calls, fits = LatentsGenerator.generate, [], []
    decode, described = NearestCaptions.decode, []
    monkeypatch.setattr(
        NearestCaptions, "decode", lambda self, rows: described.append(len(rows)) or decode(self, rows)
    )

    def count(self, embeddings, **how):
        calls.append(len(embeddings))
        if len(calls) == 9:
            raise KeyboardInterrupt
        return generate(self, embeddings, **how)

    monkeypatch.setattr(LatentsGenerator, "generate", count)
    fit = reconstruction.fit_fold
    monkeypatch.setattr(reconstruction, "fit_fold", lambda *a, **how: fits.append(a) or fit(*a, **how))
    run = tmp_path / "run"
    assert not pipeline.reconstruct_share(make_run(run, *changes), 0, 3)
    with pytest.raises(KeyboardInterrupt):
        pipeline.reconstruct_share(make_run(run, *changes), 1, 3)
    assert not pipeline.reconstruct_share(make_run(run, *changes), 2, 3)
    assert any("has finished its share; " in str(told.message) for told in recwarn)
    assert pipeline.reconstruct_share(make_run(run, *changes), 1, 3)
    # 3 batches of the branch, 5 of both draws, 3 of the oracle, and of the mean embedding the first five draws by each
    # process and the other three by one: no batch of anything else but the stopped one twice.
    assert len(calls) == 3 + 5 + 3 + 3 + 1 + 1
    assert len(fits) == 1
    assert sorted(described) == [2, 2, 5, 5, 5, 5]  # of the predictions and of the true embeddings, each once
    assert list_files(run) == list_files(tmp_path / "whole")
    assert not (run / "work").exists()
    assert pipeline.reconstruct_share(make_run(run, *changes), 0, 3)
    assert len(calls) == 16


def test_one_command_makes_what_a_worker_left(tmp_path, monkeypatch):
    monkeypatch.setattr(LatentsGenerator, "rows_at_once", 5)
    with pytest.warns(
        Notice, match="worker 1 of 2 has finished its share; 19 of 36 images are still missing"
    ):
        pipeline.reconstruct_share(make_run(tmp_path / "run"), 1, 2)
    (part,) = tmp_path.glob("run/work/images-*/part-decoded-0000005-0000010.npz")
    part.write_bytes(part.read_bytes()[:-40])  # as a power cut may leave it
    with pytest.warns(Notice, match="17 of 36 images are kept from an earlier call"):
        pipeline.reconstruct(make_run(tmp_path / "run"))
    pipeline.reconstruct(make_run(tmp_path / "whole"))
    assert list_files(tmp_path / "run") == list_files(tmp_path / "whole")


def test_no_room_for_the_images_is_told_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(LatentsGenerator, "generate", None)
    monkeypatch.setattr(reconstruction.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(
        DataError,
        match=r"36 images of 8 x 8 pixels .* need 7 kB of disk, and .* has 1 kB free; choose another place",
    ):
        pipeline.reconstruct(make_run(tmp_path))


def test_images_of_an_earlier_version_are_read(tmp_path):
    """It kept every image in a file of its own, all in one size."""
    made = pipeline.reconstruct(make_run(tmp_path / "run"))
    folder = tmp_path / "old"
    folder.mkdir()
    for name, images in {"seen": made.seen, **made.images}.items():
        np.save(folder / f"{name}.npy", np.asarray(images))
    images, size = decoding.read_image_rows(folder, None, None, ["seen", *made.images])
    assert size == (8, 8)
    np.testing.assert_array_equal(np.asarray(images["nearest"]), np.asarray(made.images["nearest"]))


# --- photographs ----------------------------------------------------------------------------------------------------


def make_photographs(folder):
    """Six photographs, of 200 x 200 and of 210 x 240 pixels by turns, and noisy squares of them as reconstructions."""
    paths = {"seen": [], "made": []}
    for number, (height, width) in enumerate([(200, 200), (210, 240)] * 3):
        small = Image.fromarray(make_images(1, 6, 6, seed=number)[0])
        seen = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        made = np.clip(seen[:160, :160] + 0.2 * make_images(1, 160, 160, seed=9)[0], 0, 255).astype(np.uint8)
        for name, image in (("seen", seen), ("made", made)):
            paths[name].append(folder / f"{name}{number}.png")
            Image.fromarray(image).save(paths[name][-1])
    return [ImageRows(own, np.arange(6)) for own in paths.values()]


def test_scores_read_photographs_in_full_where_they_name_a_size(tmp_path):
    seen, made = make_photographs(tmp_path)
    ids = np.array([f"p{number}" for number in range(6)], dtype=object)
    task = ScoringTask(
        retrievals=[], seen=seen, images={"decoded": made}, ids=ids, concepts=ids, subjects=np.full(6, "01", object),
        decoded_concepts=None, feature_encoder=None, feature_name="", protocol="toy", split="test", seed=0,
        n_bootstrap=50, n_permutations=50, pair_nulls=False, size=(128, 128),
    )  # fmt: skip
    scores, _ = compute_scores(task)
    found = {score.metric: score.value for score in scores if score.method == "decoded"}
    whole = compute_image_metric("pixcorr", seen.crop(), made, protocol="425")
    assert found["pixcorr@425"] == pytest.approx(whole.mean(), abs=1e-6)
    small = compute_image_metric("pixcorr", seen.resize(128, 128), made.resize(128, 128))
    assert found["pixcorr"] == pytest.approx(small.mean(), abs=1e-6)


def test_images_in_full_size_lie_beside_the_page(tmp_path):
    seen, made = make_photographs(tmp_path)
    ids = [f"p{number}" for number in range(6)]
    gallery = GalleryContent(ids, ids, seen, {"decoded": made}, np.arange(6.0), "pixcorr", n_each=2)
    content = ReportContent(title="Photographs", dataset="toy", gallery=gallery)
    page = write_report(tmp_path / "report.html", content).read_text()
    sizes = {read_image_size(path) for path in (tmp_path / "report_images").iterdir()}
    assert sizes == {(200, 200), (210, 240)}  # of 160 pixels a thumbnail is as large
    assert "report_images/00000.jpg" in page
    assert len(page) < 200_000
    small = GalleryContent(ids, ids, seen.resize(64, 64), {}, np.arange(6.0), "pixcorr")
    write_report(tmp_path / "report.html", ReportContent(title="Small", dataset="toy", gallery=small))
    assert not list((tmp_path / "report_images").iterdir())


@pytest.mark.slow
def test_photographs_keep_their_size_from_the_stimulus_to_the_page(tmp_path):
    """Every image was cut to 128 x 128 pixels before it was stored, and scored from there."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 4, 4, 3), np.uint8)
    sizes = [(200, 200), (210, 240)] * 3
    pictures = {}
    for number, (small, (height, width)) in enumerate(zip(coarse, sizes, strict=True)):
        large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
        Image.fromarray(large).save(tmp_path / f"p{number:02d}.png")
        pictures[f"p{number:02d}"] = large
    shown = np.repeat([*pictures], 2)
    X = coarse.reshape(6, -1)[np.repeat(np.arange(6), 2)] / 255 + 0.1 * rng.normal(size=(12, 48))
    data = bdv.from_arrays(
        X.astype(np.float32), images={name: tmp_path / f"{name}.png" for name in pictures}, shown=shown
    )
    run = bdv.decode(
        data, target={"kind": "pixels", "size": 16}, split=2, out=tmp_path / "run",
        settings={"evaluation.n_permutations": 100, "evaluation.n_bootstrap": 100, "generator.kind": "nearest",
                  "encoder.n_inner_folds": 2},
    )  # fmt: skip
    images = run.reconstructions
    first, second = (int(np.flatnonzero(run.items["stimulus_id"] == name)[0]) for name in ("p00", "p01"))
    np.testing.assert_array_equal(images["seen"][first], pictures["p00"])
    assert images["seen"][second].shape == (210, 240, 3)
    assert {image.shape[:2] for image in images["decoded"]} == set(sizes)
    (folder,) = (tmp_path / "run/stages/reconstruct").iterdir()
    assert sorted(path.name for path in folder.glob("*.npy")) == [
        "mean_image.npy"
    ]  # copies are named, not stored
    rows = run.scores[run.scores["method"] == "decoded"].set_index("metric")
    nearest = images["decoded"]
    whole = [images["seen"].crop(), nearest.crop()]
    expected = compute_image_metric("pixcorr", *whole, protocol="425").mean()
    assert rows.loc["pixcorr@425", "value"] == pytest.approx(expected, abs=1e-6)
    thumbnails = [rows_.resize(128, 128) for rows_ in (images["seen"], nearest)]
    assert rows.loc["pixcorr", "value"] == pytest.approx(
        compute_image_metric("pixcorr", *thumbnails).mean(), abs=1e-6
    )
    page = run.report()
    full = sorted((page.parent / "report_images").iterdir())
    assert {read_image_size(path) for path in full} == set(sizes)
    assert f"report_images/{full[0].name}" in page.read_text()
    assert not run.audit().query("level == 'leak'").size


def test_seen_images_are_read_from_the_stimuli(tmp_path):
    stimuli = StimulusSet.from_pixels(make_images(3), ["a", "b", "c"])
    store.write_stimuli(tmp_path, stimuli)
    read = store.read_stimuli(tmp_path)
    rows = ImageRows(read, read.find_rows(["c", "a"]))
    np.testing.assert_array_equal(np.asarray(rows), stimuli.pixels[[2, 0]])


def test_photographs_are_shown_in_grey_beside_grey_answers_alone():
    """Colours that the decoder of grey pixels never had made its answers look worse than they are."""
    rng = np.random.default_rng(0)
    photographs = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    grey = np.repeat(rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8), 3, axis=-1)
    shown = show_as_compared(photographs, grey)
    assert shown.shape == grey.shape
    image = shown[1]
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    small = PixelsConfig(size=8).build()
    small.fit(photographs)
    # To a level: both round, one before and one after the sum over colours.
    np.testing.assert_allclose(image[..., 0].ravel(), 255 * small.encode([photographs[1]])[0], atol=1.01)
    assert shown[:2].shape == (2, 8, 8, 3)
    for seen, decoded in ((photographs, photographs), (grey, grey), (grey, photographs)):
        assert show_as_compared(seen, decoded) is seen
