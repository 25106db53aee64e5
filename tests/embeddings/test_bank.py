import json
import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.stimuli import StimulusSet
from braindecode_vis.base.store import hash_file
from braindecode_vis.embeddings import bank
from braindecode_vis.embeddings.bank import embed_stimuli, iterate_decoded, list_banks

PIXELS = np.random.default_rng(0).integers(0, 256, size=(11, 4, 4, 3), dtype=np.uint8)


class MeanEncoder:
    """The mean colour of each image, and of which images it was asked."""

    def __init__(self, space="mean", tokens=0):
        self.space, self.tokens, self.seen = space, tokens, []

    def fit(self, images):
        return self

    def encode(self, images):
        rows = np.stack([image.astype(np.float32).mean((0, 1)) for image in images])
        self.seen.append(len(rows))
        return np.repeat(rows[:, None], self.tokens, axis=1) if self.tokens else rows


def make_stimuli(pixels=PIXELS):
    return StimulusSet.from_pixels(pixels, [f"image{i}" for i in range(len(pixels))])


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(bank, "CHUNK", 4)


def test_a_finished_bank_is_one_memory_map_with_its_provenance(tmp_path):
    stimuli = make_stimuli()
    embedded = embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path)
    again = embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path)
    assert isinstance(again.vectors, np.memmap)
    np.testing.assert_array_equal(again.vectors, embedded.vectors)
    np.testing.assert_array_equal(again.vectors, PIXELS.astype(np.float32).mean((1, 2)))
    (folder,) = (tmp_path / "embeddings").iterdir()
    assert len(list(folder.glob("*.npy"))) == 1
    description = json.loads((folder / "bank.json").read_text())
    assert description["space"] == "mean"
    assert description["versions"]["numpy"]


def test_a_changed_image_recomputes_only_itself(tmp_path):
    embed_stimuli(MeanEncoder(), make_stimuli(), cache=tmp_path)
    changed = PIXELS.copy()
    changed[5] = 255 - changed[5]
    encoder = MeanEncoder()
    embedded = embed_stimuli(encoder, make_stimuli(changed), cache=tmp_path)
    assert encoder.seen == [1]
    np.testing.assert_array_equal(embedded.vectors, changed.astype(np.float32).mean((1, 2)))


def test_an_image_shares_its_batch_with_the_same_others_wherever_a_run_stopped(tmp_path):
    stimuli, whole, late = make_stimuli(), MeanEncoder(), MeanEncoder()
    embed_stimuli(whole, stimuli, cache=tmp_path / "one")
    assert whole.seen == [4, 4, 3]
    embed_stimuli(MeanEncoder(), stimuli.select(stimuli.ids[4:8]), cache=tmp_path / "two")
    embed_stimuli(late, stimuli, cache=tmp_path / "two")
    assert late.seen == [4, 3]


def _embed_part(arguments):
    cache, first = arguments
    bank.CHUNK = 4
    stimuli = make_stimuli()
    return len(embed_stimuli(MeanEncoder(), stimuli.select(stimuli.ids[first:]), cache=Path(cache)))


@pytest.mark.slow
def test_two_processes_fill_one_bank(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_embed_part, [(str(tmp_path), 0), (str(tmp_path), 4)])
    embedded = embed_stimuli(MeanEncoder(), make_stimuli(), cache=tmp_path)
    np.testing.assert_array_equal(embedded.vectors, PIXELS.astype(np.float32).mean((1, 2)))


def test_a_killed_process_leaves_nothing_half_visible(tmp_path):
    stimuli, encoder = make_stimuli(), MeanEncoder()
    folder = bank.open_bank(tmp_path, encoder.space)
    np.save(folder / "aaaa.npy", np.zeros((4, 3), np.float32))  # died before its .json
    (folder / ".tmp-123-bbbb.npy").write_bytes(b"half")
    embedded = embed_stimuli(encoder, stimuli, cache=tmp_path)
    np.testing.assert_array_equal(embedded.vectors, PIXELS.astype(np.float32).mean((1, 2)))


def test_identical_images_share_a_row(tmp_path):
    pixels = PIXELS[[0, 1, 0, 0, 2]]
    encoder = MeanEncoder()
    embedded = embed_stimuli(encoder, make_stimuli(pixels), cache=tmp_path)
    assert sum(encoder.seen) == 3
    np.testing.assert_array_equal(embedded.vectors, pixels.astype(np.float32).mean((1, 2)))


def test_large_selections_go_through_a_file_and_not_through_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(bank, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(bank, "_COPY_BYTES", 64)
    stimuli = make_stimuli()
    embed_stimuli(MeanEncoder(tokens=5), stimuli, cache=tmp_path)
    some = stimuli.select([f"image{i}" for i in (7, 2, 9, 0)])
    for _ in range(2):
        embedded = embed_stimuli(MeanEncoder(tokens=5), some, cache=tmp_path)
        assert isinstance(embedded.vectors, np.memmap)
        np.testing.assert_array_equal(
            embedded.vectors[:, 3], PIXELS[[7, 2, 9, 0]].astype(np.float32).mean((1, 2))
        )


@pytest.mark.parametrize("damage", ["rows", "hashes", "selection"])
def test_a_changed_bank_is_found_when_it_is_first_read(tmp_path, monkeypatch, damage):
    """Rows of the cache were taken for those of other images: nothing said what the encoder had given."""
    stimuli = make_stimuli()
    embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path)
    (folder,) = (tmp_path / "embeddings").iterdir()
    if damage == "selection":
        monkeypatch.setattr(bank, "IN_MEMORY_BYTES", 10)
        stimuli = stimuli.select(stimuli.ids[::-1])
        embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path)
        folder = folder / "selections"
    (rows,) = folder.glob("*.npy")
    if damage == "hashes":
        index = json.loads(rows.with_suffix(".json").read_text())
        index["sha256"][1:3] = index["sha256"][2:0:-1]
        rows.with_suffix(".json").write_text(json.dumps(index))
    else:
        np.save(rows, np.load(rows)[::-1])
    with pytest.raises(DataError, match=r"is not as it was written\); delete it and its \.json, and embed"):
        embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path)
    for path in (rows, rows.with_suffix(".json")):
        path.unlink()
    again = embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path)
    wanted = np.stack([image.astype(np.float32).mean((0, 1)) for image in stimuli.iterate_images()])
    np.testing.assert_array_equal(again.vectors, wanted)


def test_a_bank_of_an_earlier_version_has_no_seal_and_is_read(tmp_path):
    first = embed_stimuli(MeanEncoder(), make_stimuli(), cache=tmp_path)
    for index in (tmp_path / "embeddings").glob("*/[!b]*.json"):
        index.write_text(json.dumps({"sha256": json.loads(index.read_text())["sha256"]}))
    again = MeanEncoder()
    np.testing.assert_array_equal(embed_stimuli(again, make_stimuli(), cache=tmp_path).vectors, first.vectors)
    assert not again.seen


def test_small_additions_do_not_rewrite_the_bank(tmp_path):
    embed_stimuli(MeanEncoder(), make_stimuli(PIXELS[:9]), cache=tmp_path)
    embed_stimuli(MeanEncoder(), make_stimuli(PIXELS[:10]), cache=tmp_path)
    (folder,) = (tmp_path / "embeddings").iterdir()
    assert len(list(folder.glob("*.npy"))) == 2
    embedded = embed_stimuli(MeanEncoder(), make_stimuli(), cache=tmp_path)
    assert len(list(folder.glob("*.npy"))) == 3
    np.testing.assert_array_equal(embedded.vectors, PIXELS.astype(np.float32).mean((1, 2)))


def test_banks_are_listed(tmp_path):
    assert list_banks(tmp_path) == []
    embed_stimuli(MeanEncoder("b", tokens=5), make_stimuli(), cache=tmp_path)
    embed_stimuli(MeanEncoder("a"), make_stimuli(PIXELS[:3]), cache=tmp_path)
    first, second = list_banks(tmp_path)
    assert (first.space, first.n_images, first.shape) == ("a", 3, (3,))
    assert (second.space, second.n_images, second.shape) == ("b", 11, (5, 3))
    assert second.n_bytes > 11 * 15 * 4


def test_a_bad_vector_names_its_stimulus(tmp_path):
    class Bad(MeanEncoder):
        def encode(self, images):
            vectors = super().encode(images)
            vectors[2, 1] = np.nan
            return vectors

    with pytest.raises(DataError, match=r"mean gives no finite embedding of stimulus 'image2'; is it blank"):
        embed_stimuli(Bad(), make_stimuli(), cache=tmp_path)


def test_damage_is_named(tmp_path):
    embed_stimuli(MeanEncoder(), make_stimuli(), cache=tmp_path)
    (folder,) = (tmp_path / "embeddings").iterdir()
    (array,) = folder.glob("*.npy")
    array.write_bytes(array.read_bytes()[:100])
    with pytest.raises(DataError, match=r"is damaged .* delete it and its \.json"):
        embed_stimuli(MeanEncoder(), make_stimuli(), cache=tmp_path)
    with pytest.raises(DataError, match=r"is missing 1 image\(s\), first absent"):
        bank.read_rows(folder, ["absent"])


@pytest.mark.parametrize("use", ["read", "merge", "list"])
def test_another_process_may_merge_what_was_just_listed(tmp_path, monkeypatch, use):
    """Jobs of a sweep share the bank: after one has listed its segments, another may merge them."""
    folder, rows = bank.open_bank(tmp_path, "mean"), np.arange(12, dtype=np.float32).reshape(4, 3)
    bank.write_segment(folder, ["a", "b"], rows[:2])
    bank.write_segment(folder, ["c", "d"], rows[2:])
    plain, calls = bank.list_segments, []

    def list_and_be_overtaken(folder):
        found = plain(folder)
        calls.append(folder)
        if len(calls) == 1:
            bank.merge_segments(folder, ["d", "c", "b", "a"])
        return found

    monkeypatch.setattr(bank, "list_segments", list_and_be_overtaken)
    if use == "merge":
        bank.merge_segments(folder, ["a", "b", "c", "d"])
    elif use == "list":
        assert [summary.n_images for summary in list_banks(tmp_path)] == [4]
    np.testing.assert_array_equal(bank.read_rows(folder, ["a", "b", "c", "d"]), rows)
    assert len(plain(folder)) == 1


def test_files_are_decoded_in_order_by_threads(tmp_path):
    rows = []
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        rows.append((f"image{i}", "x", f"{i}.png", hash_file(tmp_path / f"{i}.png")))
    table = pd.DataFrame(rows, columns=["stimulus_id", "concept", "path", "sha256"])
    stimuli = StimulusSet(table, tmp_path)
    for decoders in (0, 3):
        decoded = list(iterate_decoded(stimuli, stimuli.ids, decoders))
        np.testing.assert_array_equal(np.stack(decoded), PIXELS)
    (tmp_path / "6.png").unlink()
    with pytest.raises(DataError, match=r"6\.png, is missing"):
        embed_stimuli(MeanEncoder(), stimuli, cache=tmp_path / "cache")
