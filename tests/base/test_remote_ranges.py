"""HDF5 of a server, read by ranges, has the bytes that it has on disk."""

import gc
import json
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from braindecode_vis.base import remote
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.digests import digest_file
from braindecode_vis.base.remote import RemotePath
from tests.datasets.loopback import serve

#: Instead of 1 MiB and 64 MiB, so that small files have many borders; reads of a quarter of a block are not cut.
BLOCK, LEAST = 4096, 40_000

#: In a process of its own, with a time, since a read that hangs cannot be interrupted. Objects of h5py lie in circles,
#: as tracebacks leave them, and whichever thread happens to collect them asks for the lock of h5py.
READ = """
import gc, json, sys
from pathlib import Path
import h5py, numpy as np
from braindecode_vis.base import remote

block, least, pairs = json.loads(sys.argv[1])
if block:
    remote._BLOCK_BYTES, remote.RANGES_BYTES = block, least
gc.set_threshold(20, 2, 2)
brought, bring = [], remote.bring
remote.bring = lambda path: (brought.append(str(path)), bring(path))[1]
wrong, rows = {}, 0
class Circle: pass
for here, there in pairs:
    with h5py.File(here) as mine, remote.open_hdf5(remote.RemotePath(there)) as theirs:
        for name in mine:
            for row in range(len(mine[name])):
                circle = Circle()
                circle.me, circle.data = circle, theirs[name]
                rows += 1
                if not np.array_equal(theirs[name][row], mine[name][row]):
                    wrong[name] = wrong.get(name, 0) + 1
            assert np.array_equal(theirs[name][2:5], mine[name][2:5])
print(json.dumps([rows, wrong, brought]))
"""


@pytest.fixture(autouse=True)
def _collect_nothing():
    """A server of this very process must not collect objects of h5py while their lock waits for its answer."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def write_layouts(folder):
    """Six layouts, chunks of every size around the borders, and files around the least size that is read by ranges."""
    rng = np.random.default_rng(0)

    def draw(n_rows, n_bytes):
        return rng.integers(0, 255, (n_rows, n_bytes), dtype=np.uint8)

    with h5py.File(folder / "layouts.hdf5", "w") as file:
        file.create_dataset("contiguous", data=draw(60, 900))
        file.create_dataset("chunked", data=draw(60, 900), chunks=(1, 900))
        file.create_dataset("gzip", data=draw(60, 900) // 16, chunks=(1, 900), compression=1)
        shuffled = rng.integers(-3000, 3000, (60, 450)).astype(np.int16)
        file.create_dataset("shuffled", data=shuffled, chunks=(1, 450), compression=4, shuffle=True)
        file.create_dataset("checked", data=draw(60, 900), chunks=(1, 900), fletcher32=True)
        file.create_dataset("words", data=["x" * int(n) for n in rng.integers(1, 900, 60)])
    with h5py.File(folder / "borders.hdf5", "w") as file:
        for border in (BLOCK // 4, BLOCK, 2 * BLOCK):
            for size in (border - 1, border, border + 1):
                file.create_dataset(f"chunks{size}", data=draw(6, size), chunks=(1, size))
                file.create_dataset(f"rows{size}", data=draw(6, size))
    for size in (LEAST - 1, LEAST, LEAST + 1, 10 * BLOCK - 1, 10 * BLOCK, 10 * BLOCK + 1):
        path = folder / f"size{size}.hdf5"
        with h5py.File(path, "w") as file:
            file.create_dataset("rows", data=draw(30, 900))
        with path.open("ab") as file:
            file.write(bytes(size - path.stat().st_size))
    return sorted(folder.glob("*.hdf5"))


def read(pairs, block=0, least=0):
    words = [sys.executable, "-P", "-c", READ, json.dumps([block, least, pairs])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("scheme", ["http", pytest.param("s3", marks=pytest.mark.further)])
def test_every_chunk_of_every_layout_has_its_bytes(scheme, bucket, tmp_path):
    """Reads of less than a quarter of a block ended at its border, and h5py left the rest of its buffer as it was.

    76 of 1000 chunks of 80 kB were wrong without an error, and compressed ones were an error. The same read could wait
    for ever, as a thread of fsspec that collected an object of h5py waited for the lock which the reader held.
    """
    paths = write_layouts(tmp_path)
    with serve({f"/{path.name}": path.read_bytes() for path in paths}) as pages:
        there = bucket.fill(tmp_path, "data") if scheme == "s3" else pages.url
        rows, wrong, brought = read([[str(path), f"{there}/{path.name}"] for path in paths], BLOCK, LEAST)
        asked = [wanted for _, wanted, _ in pages.requests if wanted]
    assert (rows, wrong) == (6 * 60 + 2 * 9 * 6 + 6 * 30, {})
    assert brought == [f"{there}/size{LEAST - 1}.hdf5"]  # the only one that is too small
    assert bool(asked) == (scheme == "http")


def test_a_real_size_has_its_bytes(tmp_path):
    """The borders that are in use: 80 MB in chunks of 80 kB, read from blocks of 1 MiB."""
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        data = np.random.default_rng(0).integers(-3000, 3000, (900, 40_000), dtype=np.int16)
        file.create_dataset("betas", data=data, chunks=(1, 40_000))
    assert path.stat().st_size >= remote.RANGES_BYTES
    with serve({"/x.hdf5": path.read_bytes()}) as pages:
        rows, wrong, brought = read([[str(path), f"{pages.url}/x.hdf5"]])
        assert len(pages.requests) < 90
    assert (rows, wrong, brought) == (900, {}, [])


def test_ranges_of_a_large_file_are_read_alone(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RANGES_BYTES", 1000)
    monkeypatch.setattr(remote, "HEADS_BYTES", 1000)
    data = np.random.default_rng(0).integers(0, 255, (300, 100, 100, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("imgBrick", data=data, chunks=(1, 100, 100, 3))
    bucket.put("data/x.hdf5", (tmp_path / "x.hdf5").read_bytes())
    path, read = RemotePath(f"s3://{bucket.name}/data/x.hdf5"), []
    fetch = remote._Ranges._fetch
    monkeypatch.setattr(
        remote._Ranges, "_fetch", lambda self, a, b: (read.append(b - a), fetch(self, a, b))[1]
    )
    with remote.open_hdf5(path) as file:
        assert np.array_equal(file["imgBrick"][150], data[150])
    assert sum(read) < path.stat().st_size / 2
    assert not (tmp_path / "remote").exists()
    with remote.open_head(path) as file:
        assert file.read(8) == b"\x89HDF\r\n\x1a\n"
    monkeypatch.setattr(remote, "_HEAD_BYTES", 1 << 17)
    with remote.open_head(path) as file:  # who reads on is given the whole
        assert file.read() == (tmp_path / "x.hdf5").read_bytes()
    assert list((tmp_path / "remote").rglob("files/**/x.hdf5"))
    remote.release_files()
    shutil.rmtree(tmp_path / "remote")
    file = remote.open_head(path)
    assert file.read(1) == b"\x89"
    bucket.put("data/x.hdf5", b"0" * path.stat().st_size)
    with pytest.raises(DataError, match="changed on the server"):
        file.close()


def test_what_was_misread_is_not_taken_for_what_is_read_now(bucket, tmp_path, monkeypatch):
    """Stages know a file of a server by what the server says of it, and a large HDF5 by how it is read as well."""
    for name in ("x.hdf5", "x.nii"):
        bucket.put(name, bytes(1000))
    large, other = (RemotePath(f"s3://{bucket.name}/{name}") for name in ("x.hdf5", "x.nii"))
    before = digest_file(large)
    assert before == digest_file(other)
    monkeypatch.setattr(remote, "RANGES_BYTES", 1000)
    assert before == digest_file(other) != digest_file(large)


@pytest.mark.parametrize(
    ("misbehave", "sentence"),
    [
        (
            lambda pages: pages.refuse.update({"/x.hdf5": 404}),
            "was listed by the server but no longer exists",
        ),
        (lambda pages: pages.refuse.update({"/x.hdf5": 403}), "may not be read: the server denies access"),
        (lambda pages: pages.refuse.update({"/x.hdf5": 503}), "cannot be read (503"),
        (lambda pages: pages.files.update({"/x.hdf5": bytes(3)}), "changed on the server while it was read"),
        (lambda pages: pages.breaks.extend([5, 5, 5]), "cannot be read"),
    ],
)
def test_a_server_that_fails_meanwhile_is_one_sentence(misbehave, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RANGES_BYTES", 1000)
    monkeypatch.setattr(remote, "_BLOCK_BYTES", BLOCK)
    path = write_layouts(tmp_path)[0]
    with serve({"/x.hdf5": path.read_bytes()}) as pages:
        file = remote.open_hdf5(RemotePath(f"{pages.url}/x.hdf5"))
        misbehave(pages)
        with pytest.raises(DataError, match=re.escape(sentence)):
            file.visititems(lambda _, data: (data[:], None)[1])
    remote.forget_listings()
