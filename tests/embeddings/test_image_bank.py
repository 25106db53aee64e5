"""Any number of images become one bank: from every kind of source, in parts, exactly once; what is wrong is named."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from braindecode_vis.base import store
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.embeddings import image_bank, image_sources
from braindecode_vis.embeddings.image_bank import (
    embed_parts,
    finish_bank,
    plan_bank,
    read_image_bank,
    take_share,
)
from braindecode_vis.embeddings.image_sources import open_images


class MeanColour:
    """An encoder whose vectors say which image they are of."""

    space = "mean-colour"

    def encode(self, images):
        rows = [image.reshape(-1, 3).mean(axis=0) for image in images]
        return np.array(rows, np.float32).reshape(-1, 3)


def paint(n):
    """Return images that differ, uint8 of shape (n, 8, 8, 3)."""
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def pack(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def embed(folder, source, encoder=None, **settings):
    source = open_images(str(source)) if isinstance(source, str) or hasattr(source, "parts") else source
    encoder = encoder or MeanColour()
    dtype = settings.pop("dtype", "float16")
    plan = plan_bank(folder, source, encoder, dtype=dtype)
    embed_parts(plan, source, encoder, plan.parts, **settings)
    finish_bank(plan)
    return read_image_bank(folder)


def write_source(kind, folder, images):
    """Write images as a source of one kind, in several shards, and return what `open_images` is given."""
    folder.mkdir()
    half = len(images) // 2
    halves = (images[:half], images[half:])
    columns = {}
    if kind == "folder":
        (folder / "cats").mkdir()
        for n, image in enumerate(images):
            (folder / "cats" / f"{n:04d}.png").write_bytes(pack(image))
    elif kind in ("tar", "tgz"):
        ending = ".tar" if kind == "tar" else ".tar.gz"
        for number, some in enumerate(halves):
            members = {f"{number}-{n:04d}.png": pack(image) for n, image in enumerate(some)}
            write_tar(folder / f"shard-{number:03d}{ending}", {"0.json": b"{}", **members, "0.txt": b"a cat"})
        return f"{folder}/shard-{{000..001}}{ending}", columns
    elif kind in ("parquet", "arrow"):
        for number, some in enumerate(halves):
            rows = [{"bytes": pack(image), "path": None} for image in some]
            table = pa.table({"label": list(range(len(rows))), "picture": rows})
            if kind == "parquet":
                pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=3)
            else:
                with (
                    pa.OSFile(str(folder / f"part-{number}.arrow"), "wb") as file,
                    pa.ipc.new_stream(file, table.schema) as writer,
                ):
                    writer.write_table(table, max_chunksize=3)
    elif kind == "hdf5":
        for number, some in enumerate(halves):
            with h5py.File(folder / f"{number}.hdf5", "w") as file:
                file["imgBrick"] = some
                file["name"] = [f"{number}-{n}" for n in range(len(some))]
        columns = {"id_column": "name"}
    elif kind == "hdf5 bytes":
        with h5py.File(folder / "all.h5", "w") as file:
            held = file.create_dataset("jpegs", len(images), dtype=h5py.vlen_dtype(np.uint8))
            for n, image in enumerate(images):
                held[n] = np.frombuffer(pack(image), np.uint8)
    return str(folder), columns


@pytest.mark.parametrize("kind", ["folder", "tar", "tgz", "parquet", "arrow", "hdf5", "hdf5 bytes"])
def test_every_source_gives_the_same_vectors_in_order_wherever_its_parts_begin(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(image_bank, "PART", 4)
    images = paint(21)
    text, columns = write_source(kind, tmp_path / "source", images)
    found = embed(tmp_path / "bank", open_images(text, **columns), dtype="float32")
    np.testing.assert_array_equal(found.vectors, MeanColour().encode(images))
    assert len(set(found.ids)) == 21
    assert isinstance(found.vectors, np.memmap)
    # What reads embeddings elsewhere reads a bank too.
    plain = store.read_embeddings(tmp_path / "bank")
    assert plain.space == found.space == "mean-colour"
    assert plain.ids.tolist() == found.ids.tolist()
    names = {
        "folder": "cats/0000",
        "tar": "0-0000",
        "parquet": "part-0/0",
        "hdf5": "0-0",
        "hdf5 bytes": "all/0",
    }
    assert found.ids[0] == names.get(kind, found.ids[0])


def test_phantom_images_are_drawn_and_named_as_in_its_data_sets(tmp_path, monkeypatch):
    from braindecode_vis.datasets.drawn.images import make_concepts, render_scene

    found = embed(tmp_path / "bank", "phantom:3,size=16,seed=5", dtype="float32")
    assert found.ids[0] == make_concepts(1, seed=5)["concept"][0] + "_01b"
    drawn = [render_scene(n, 0, size=16, seed=5) for n in range(3)]
    np.testing.assert_array_equal(found.vectors, MeanColour().encode(drawn))
    monkeypatch.setattr(image_sources, "N_MAX_CONCEPTS", 2)  # all are shown once before one is shown again
    names = open_images("phantom:5,seed=5").name_images("phantom")
    assert [name[-3:] for name in names] == ["01b", "01b", "02s", "02s", "03s"]
    assert names[2] == found.ids[0][:-3] + "02s"


def test_shares_give_the_bank_of_one_process_and_a_call_goes_on_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(image_bank, "PART", 4)
    images = paint(30)
    text, _ = write_source("tar", tmp_path / "source", images)
    embed(tmp_path / "alone", text)
    source, encoder = open_images(text), MeanColour()
    plan = plan_bank(tmp_path / "bank", source, encoder)
    embed_parts(plan, source, encoder, take_share(plan.parts, 1, 3))
    with pytest.raises(DataError, match=r"parts of .* are missing; run the same command again"):
        finish_bank(plan)
    with pytest.raises(DataError, match=r"is not finished; run the command embed again"):
        read_image_bank(tmp_path / "bank")
    kept = {path: path.stat().st_mtime_ns for path in plan.folder.glob("part-*")}
    assert 2 <= len(kept) <= 3 < len(plan.parts)
    again = plan_bank(tmp_path / "bank", open_images(text), encoder)
    assert again.shards == plan.shards
    embed_parts(again, source, encoder, [p for n in range(3) for p in take_share(again.parts, n, 3)])
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    finish_bank(again)
    for name in ("vectors.npy", "ids.json", "images.npy"):
        assert (tmp_path / "bank" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert not list(plan.folder.glob("part-*"))
    assert not (plan.folder / "plan.json").exists()
    # Once more, nothing is done; and the files are known by their digests.
    finish_bank(plan_bank(tmp_path / "bank", open_images(text), encoder))
    with (tmp_path / "bank" / "vectors.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(DataError, match=r"vectors\.npy is damaged; delete the bank"):
        read_image_bank(tmp_path / "bank")


@pytest.mark.slow
def test_kills_double_and_lose_nothing(tmp_path):
    """Two processes are killed again and again wherever they are, also while parts are joined."""
    command = [
        sys.executable, "-P", "-m", "braindecode_vis", "embed", "synthetic_digits", "--set", "target.kind=pixels",
        "--set", "target.size=16", "--images", "phantom:20000,size=16", "--bank",
    ]  # fmt: skip
    chance = np.random.default_rng(0)
    for kill in range(6):
        pair = [
            subprocess.Popen([*command, str(tmp_path / "bank"), "--worker", str(n), "--workers", "2"])
            for n in range(2)
        ]
        time.sleep(4 + 6 * chance.random() + 2 * kill)
        for process in pair:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    subprocess.run([*command, str(tmp_path / "bank")], check=True)
    subprocess.run([*command, str(tmp_path / "alone")], check=True)
    found, alone = (read_image_bank(tmp_path / name) for name in ("bank", "alone"))
    assert found.ids.tolist() == alone.ids.tolist()
    assert len(set(found.ids)) == 20_000
    np.testing.assert_array_equal(found.vectors, alone.vectors)
    assert not list((tmp_path / "bank").glob("part-*"))


@pytest.mark.slow
def test_shares_are_jobs_of_a_cluster(tmp_path):
    words = ["embed", "synthetic_digits", "--set", "target.kind=pixels", "--images", "phantom:2000,size=16"]
    subprocess.run(
        [sys.executable, "-P", "-m", "braindecode_vis", *words, "--bank", str(tmp_path / "bank"), "--workers", "2",
         "--cluster", "local"], check=True,
    )  # fmt: skip
    assert len(set(read_image_bank(tmp_path / "bank").ids)) == 2000
    jobs = json.loads((tmp_path / "bank" / "jobs" / "jobs.json").read_text())
    assert sorted(job["name"] for job in jobs) == ["embed", "share-0", "share-1"]


def test_broken_images_are_named_or_left_out_and_listed(tmp_path):
    images = paint(5)
    members = {f"{n}.png": pack(image) for n, image in enumerate(images)} | {
        "3.png": b"no picture",
        "2.png": b"",
    }
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(
        DataError, match=r"2\.png of .*a\.tar cannot be decoded \(it is empty\); .*--skip-broken"
    ):
        embed(tmp_path / "bank", str(tmp_path / "a.tar"))
    found = embed(tmp_path / "bank", str(tmp_path / "a.tar"), skip_broken=True)
    assert found.ids.tolist() == ["0", "1", "4"]
    manifest = json.loads((tmp_path / "bank" / "manifest.json").read_text())
    assert (manifest["n_images"], manifest["n_broken"]) == (3, 2)
    assert [row[1] for row in manifest["broken"]] == ["2", "3"]
    write_tar(tmp_path / "b.tar", {"1.png": b"no picture"})
    with pytest.raises(DataError, match=r"every image of the source is broken; the image 1\.png of"):
        embed(tmp_path / "none", str(tmp_path / "b.tar"), skip_broken=True)


def test_ids_that_occur_twice_are_named_before_anything_is_computed(tmp_path):
    one = {"cat.png": pack(paint(1)[0])}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "a.tar", one)
    write_tar(tmp_path / "shards" / "b.tar", one)
    with pytest.raises(DataError, match=r"the id 'cat' occurs in a\.tar and in b\.tar; every image needs"):
        plan_bank(tmp_path / "bank", open_images(str(tmp_path / "shards")), MeanColour())
    pq.write_table(pa.table({"image": [b"", b""], "id": ["x", "x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"'x' occurs in t\.parquet and in the same shard once more"):
        plan_bank(tmp_path / "bank", open_images(str(tmp_path / "t.parquet"), id_column="id"), MeanColour())
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_shard_that_changes_between_two_calls_is_named(finished, tmp_path):
    images = paint(6)
    path, folder = tmp_path / "a.tar", tmp_path / "bank"
    members = {f"{n}.png": pack(image) for n, image in enumerate(images)}
    write_tar(path, members)
    source = open_images(str(path))
    plan = plan_bank(folder, source, MeanColour())
    embed_parts(plan, source, MeanColour(), plan.parts)
    if finished:
        finish_bank(plan)
    os.utime(path, ns=(1, 1))  # a copy of the same bytes
    plan_bank(folder, open_images(str(path)), MeanColour())
    write_tar(path, members | {"4.png": pack(images[0])})
    with pytest.raises(
        DataError,
        match=r"the image 4\.png of .*a\.tar has changed since it was embedded; put the earlier file back",
    ):
        plan_bank(folder, open_images(str(path)), MeanColour())
    write_tar(path, members | {"6.png": pack(images[0])})
    with pytest.raises(DataError, match=r"a\.tar has 7 images, and had 6 when"):
        plan_bank(folder, open_images(str(path)), MeanColour())
    path.rename(tmp_path / "b.tar")
    with pytest.raises(DataError, match=r"the shard a\.tar has disappeared since"):
        plan_bank(folder, open_images(str(tmp_path / "b.tar")), MeanColour())


def test_another_request_needs_another_folder(tmp_path):
    source = open_images("phantom:3,size=16")
    plan_bank(tmp_path / "bank", source, MeanColour())
    with pytest.raises(ConfigError, match=r"the dtype \"float16\", not \"float32\"; choose another folder"):
        plan_bank(tmp_path / "bank", source, MeanColour(), dtype="float32")
    with pytest.raises(ConfigError, match=r"with the source .*\"n_images\": 3.*, not .*\"n_images\": 4"):
        plan_bank(tmp_path / "bank", open_images("phantom:4,size=16"), MeanColour())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds other files"):
        plan_bank(tmp_path / "other", source, MeanColour())


def test_numbers_that_half_precision_cannot_hold_are_named(tmp_path):
    class Large(MeanColour):
        def encode(self, images):
            return 1e6 * super().encode(images)

    with pytest.raises(DataError, match=r"no finite embedding of the image .*_01b.*use --dtype float32"):
        embed(tmp_path / "bank", "phantom:2,size=16", Large())


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(image_bank, "PART", 2)
    source, savez, calls = open_images("phantom:6,size=16"), np.savez, []

    def fill(*given, **arrays):
        calls.append(given)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(*given, **arrays)

    monkeypatch.setattr(np, "savez", fill)
    plan = plan_bank(tmp_path / "bank", source, MeanColour())
    with pytest.raises(DataError, match=r"the disk of .* is full; 1 of 3 parts are kept: make room"):
        embed_parts(plan, source, MeanColour(), plan.parts)
    embed_parts(plan, source, MeanColour(), plan.parts)
    monkeypatch.setattr(image_bank.shutil, "disk_usage", lambda folder: type("Use", (), {"free": 10})())
    with pytest.raises(DataError, match=r"to join its parts, and .* are free; all parts are kept"):
        finish_bank(plan)


@pytest.mark.parametrize(
    "content, settings, error, match",
    [
        ({"a.parquet": {"id": [1], "x": ["s"]}}, {}, ConfigError, r"one column of images .* which has none \(id, x\)"),
        ({"a.parquet": {"u": [b""], "v": [b""]}}, {}, ConfigError, r"has several \(u, v\); name it with --column"),
        ({"a.parquet": {"image": [b""]}}, {"column": "imege"}, ConfigError, r"no column 'imege' .did you mean 'image'"),
        ({"a.parquet": {"image": [b""], "x": [1]}}, {"column": "x"}, ConfigError, "holds int64, not bytes of images"),
        ({"a.parquet": b"no table"}, {}, DataError, r"a\.parquet is damaged"),
        ({"a.h5": {"x": np.zeros(3)}}, {}, ConfigError, r"one data set of images .* which has none \(x\)"),
        ({"a.h5": {"x": paint(2)}}, {"column": "y"}, ConfigError, r"no data set 'y'.* it has x"),
        ({"a.h5": {"x": paint(2), "i": [1]}}, {"id_column": "i"}, DataError, r"has 2 images and ids of shape \(1,\)"),
        ({"a.h5": b"no table"}, {}, DataError, r"a\.h5 is damaged"),
        ({"a.tar": {"a.txt": b"text"}}, {}, DataError, r"a\.tar holds no image: none of its members ends in \.png"),
        ({"a.tar": b"x" * 2000}, {}, DataError, r"a\.tar is damaged"),
        ({"a.tar": {"a.png": b""}}, {"column": "x"}, ConfigError, "--column applies to tables and HDF5 files"),
        ({"a.tar": {"a.png": b""}, "b.h5": {"x": paint(1)}}, {}, ConfigError, "files of several kinds"),
        ({"a.tar": {"a.png": b""}, "cat.jpg": b""}, {}, ConfigError, r"holds pictures \(cat\.jpg\) and files of"),
        ({"a.txt": b"text"}, {}, DataError, r"holds neither pictures \(\.png"),
    ],
)  # fmt: skip
def test_bad_sources_are_one_sentence(content, settings, error, match, tmp_path):
    for name, held in content.items():
        path = tmp_path / name
        if isinstance(held, bytes):
            path.write_bytes(held)
        elif name.endswith(".tar"):
            write_tar(path, held)
        elif name.endswith(".parquet"):
            pq.write_table(pa.table(held), path)
        else:
            with h5py.File(path, "w") as file:
                for key, value in held.items():
                    file[key] = value

    def read():
        source = open_images(str(tmp_path), **settings)
        source.name_images(source.list_shards()[0].name)

    with pytest.raises(error, match=match):
        read()


@pytest.mark.parametrize(
    "text, match",
    [
        ("phantom:many", "has no number of images"),
        ("phantom:0", "has no number of images"),
        ("phantom:5,side=3", "no size=PIXELS and no seed=NUMBER"),
        ("phantom:5,size=4", "16 pixels or more"),
        ("/nowhere/at-all", "does not exist; give a folder"),
        ("/nowhere/{0..1}.tar", r"the shard /nowhere/0\.tar of .* is missing"),
        ("/nowhere/*.tar", "does not exist"),
    ],
)
def test_texts_that_name_no_images(text, match):
    with pytest.raises((ConfigError, DataError), match=match):
        open_images(text)


def test_a_truncated_tar_is_named(tmp_path):
    images = paint(40)
    write_tar(tmp_path / "a.tar", {f"{n}.png": pack(image) for n, image in enumerate(images)})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: len(content) // 2 + 700])
    with pytest.raises(DataError, match=r"a\.tar is damaged \(unexpected end of data\)"):
        plan_bank(tmp_path / "bank", open_images(str(tmp_path / "a.tar")), MeanColour())


def test_braces_are_those_of_a_shell():
    assert image_sources._expand_braces("s/{a,b}-{9..11}") == [
        "s/a-9",
        "s/a-10",
        "s/a-11",
        "s/b-9",
        "s/b-10",
        "s/b-11",
    ]


def test_the_verb_shares_images_between_processes(tmp_path, monkeypatch):
    """The command as people give it; its processes are this one, called in turn."""
    from typer.testing import CliRunner

    from braindecode_vis.cli import app
    from braindecode_vis.pipeline import embed_images

    def call(words):
        return CliRunner().invoke(app, words, catch_exceptions=False)

    class Here:
        """A process that is over when it was started."""

        def __init__(self, words, **_):
            call(words)
            self.returncode = 0

        def poll(self):
            return 0

        wait = poll

    words = [
        "embed", "synthetic_digits", "--set", "target.kind=pixels", "--images", "phantom:9,size=16", "--bank",
        str(tmp_path / "bank"),
    ]  # fmt: skip
    monkeypatch.setattr(image_bank, "PART", 2)
    monkeypatch.setattr(embed_images, "make_command", lambda given: list(given))
    # Of this module alone: git is asked for the revision by a process that is one.
    own = types.SimpleNamespace(Popen=Here, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(embed_images, "subprocess", own)
    monkeypatch.setattr(sys, "argv", ["braindecode-vis", *words, "--workers", "2", "--json"])
    done = call([*words, "--workers", "2", "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["n_images"] == 9
    assert read_image_bank(tmp_path / "bank").space == "pixels/16x16x1"
    for more, match in (
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--worker", "1"], "--worker needs the number of workers too"),
        (["--worker", "2", "--workers", "2"], "a number from 0 to --workers minus 1"),
        (["--out", "x"], "--out is for the stages of a run"),
        (["--set", "target.kind=pca"], "instead of a configuration, give the folder of a run"),
    ):
        with pytest.raises(ConfigError, match=match):
            call([*words, *more])
    for less, match in (
        (words[:-2], "needs a folder"),
        ([*words[:4], *words[6:]], "--bank applies only to images that --images names"),
    ):
        with pytest.raises(ConfigError, match=match):
            call(less)


def test_a_pattern_of_pictures_is_told_to_be_a_folder(tmp_path):
    """It was answered that they hold no images."""
    (tmp_path / "owl.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="names single pictures; give their folder instead"):
        open_images(str(tmp_path / "*.png"))
