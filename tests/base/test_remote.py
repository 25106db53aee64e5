"""Addresses of servers are read like folders: through a cache of bounded size that processes share."""

import fcntl
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from braindecode_vis.base import remote
from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.consent import ConsentError, give_consent
from braindecode_vis.base.digests import digest_files, digest_folder
from braindecode_vis.base.remote import RemotePath, bring, bring_all
from braindecode_vis.pipeline.runs import check_run_folder
from tests.datasets.loopback import list_pages, serve

FILES = {
    "sub-01/eeg/a b.tsv": b"onset\n1\n", "sub-01/eeg/x.eeg": bytes(range(256)) * 40, "sub-02/eeg/x.eeg": b"\1" * 5000,
    "top.json": b"{}", "images/cat/1.png": b"cat", "images/dog/1.png": b"dog",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "local"


@pytest.fixture
def root(bucket, folder):
    return RemotePath(bucket.fill(folder, "data"))


def look(root):
    """What a reader may ask of a tree, by places below it."""
    patterns = ("*", "sub-*/eeg/*.eeg", "**/*.png", "images/*/", "no/*", "top.json", "sub-0[2-9]/*")
    found = {p: sorted(path.relative_to(root).as_posix() for path in root.glob(p)) for p in patterns}
    found["rglob"] = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.eeg"))
    found["names"] = sorted(path.name for path in root.iterdir())
    for name in ("sub-01", "sub-01/eeg/a b.tsv", "sub-03", "sub-01/eeg/none"):
        path = root / name
        found[name] = [path.exists(), path.is_dir(), path.is_file(), path.is_symlink()]
    sizes = {name: (root / name).stat().st_size for name in FILES}
    texts = {name: (root / name).read_bytes() for name in FILES}
    numbers = np.fromfile(root / "sub-01/eeg/x.eeg", np.uint8).tolist()
    return found, sizes, texts, numbers


def test_a_bucket_is_read_like_a_folder(root, folder):
    assert look(root) == look(folder)
    assert str(root / "top.json") == f"s3://{root.parts[1]}/data/top.json"
    assert pickle.loads(pickle.dumps(root / "sub-01")) == root / "sub-01"
    # What is looked for beside a bucket would be looked for in somebody else's.
    assert RemotePath("s3://a/b").parent == RemotePath("s3://a") == RemotePath("s3://a").parent
    assert root.resolve() == root.absolute() == root.expanduser() == root
    with pytest.raises(FileNotFoundError):
        (root / "none").read_bytes()
    with pytest.raises(OSError, match="Read-only"):
        (root / "top.json").write_text("")
    with pytest.raises(DataError, match="takes only folders of this machine"):
        os.fspath(root)
    # What takes a path apart as text names nothing here, and reads nothing wrong.
    assert not Path(str(root / "top.json")).exists()


def test_a_web_server_is_read_like_a_folder(bucket, folder, monkeypatch):
    monkeypatch.setattr(remote, "_ATTEMPTS", 1)
    with serve(list_pages(folder.parent)) as pages:
        root = RemotePath(f"{pages.url}/local")
        assert look(root) == look(folder)
        assert digest_folder(root, sorted(FILES)) == digest_folder(root, sorted(FILES))
        listed = [path for path in (*pages.heads, *(path for path, *_ in pages.requests)) if path[-1] == "/"]
        assert len(listed) == len(set(listed))
        remote.forget_listings()
        pages.ranges = False
        assert (root / "top.json").read_bytes() == b"{}"
        pages.refuse["/local/sub-02/eeg/x.eeg"] = 403
        with pytest.raises(DataError, match=r"x\.eeg may not be read: the server denies access"):
            (root / "sub-02/eeg/x.eeg").read_bytes()
        # Of a list without sizes each file is asked for, and a busy server has it none the less.
        pages.refuse["/local/sub-01/eeg/x.eeg"] = 503
        with pytest.raises(DataError, match=r"x\.eeg cannot be read \(503"):
            (root / "sub-01/eeg/x.eeg").stat()
        with pytest.raises(DataError, match="the server does not answer; check the network"):
            RemotePath("http://127.0.0.1:9/x").is_dir()
        remote.forget_listings()
        pages.tag = ""
        with pytest.raises(DataError, match="neither its ETag nor its time"):
            (root / "top.json").read_bytes()
        with pytest.raises(DataError, match="names the file /etc/hostname of another machine"):
            (root / "/etc/hostname").exists()


def test_digests_bring_nothing_and_notice_what_changed(root, bucket, tmp_path):
    paths = {"a": root / "top.json", "b": root / "sub-02/eeg/x.eeg"}
    before = digest_files(paths)
    assert not (tmp_path / "remote").exists()
    assert (root / "top.json").read_bytes() == b"{}"
    bucket.put("data/top.json", b"[]")
    assert digest_files(paths) == before  # as long as the run lasts
    remote.forget_listings()
    after = digest_files(paths)
    assert (after["a"] != before["a"], after["b"]) == (True, before["b"])
    assert (root / "top.json").read_bytes() == b"[]"


def test_what_is_there_is_not_brought_again(root, monkeypatch):
    brought = []
    receive = remote._receive
    monkeypatch.setattr(
        remote, "_receive", lambda path, *more: (brought.append(path.name), receive(path, *more))
    )
    bring_all([root / name for name in FILES])
    assert len(brought) == len(FILES)
    remote.forget_listings()
    bring_all([root / name for name in FILES])
    assert len(brought) == len(FILES)
    assert bring(Path("/here")) == Path("/here")


def count_bytes(cache):
    return sum(path.stat().st_size for path in cache.rglob("files/**/*") if path.is_file())


def test_the_cache_keeps_its_bound_and_what_is_in_use(bucket, tmp_path, monkeypatch):
    for n in range(12):
        bucket.put(f"data/{n:02d}", bytes([n]) * 1000)
    root, cache = RemotePath(f"s3://{bucket.name}/data"), tmp_path / "remote"
    remote.choose_cache(None, 5500 / 2**30)
    parts = [cache / "parts" / f"{digit * 32}.1000.part" for digit in "abc"]
    for path, when in zip(
        parts, (1, 4e9, time.time()), strict=True
    ):  # left by kills, one before the clock was set back
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (when, when))
    used = bring(root / "00")
    assert [path.exists() for path in parts] == [False, False, True]
    remote.release_files()
    with used.open("rb") as other:  # another process would lock it so
        fcntl.flock(other, fcntl.LOCK_SH)
        for n in range(1, 12):
            assert (root / f"{n:02d}").read_bytes() == bytes([n]) * 1000
            os.utime(bring(root / f"{n:02d}"), (1000 + n, 0))
            assert count_bytes(cache) <= 5500
            remote.release_files()
        assert used.exists()
    there = sorted(path.name for path in cache.rglob("files/**/*") if path.is_file())
    assert {"00", "11"} <= set(there)  # in use all the time, and the last
    assert not {"01", "02", "03"} & set(there)
    assert (root / "01").read_bytes() == bytes([1]) * 1000
    monkeypatch.setattr(remote, "_WAIT_S", 0.1)
    held = [(root / f"{n:02d}").open("rb") for n in range(1, 6)]
    with pytest.raises(
        DataError, match=r"of which .* are in use, but 1 kB more are needed: increase remote\.limit_gib"
    ):
        bring(root / "06")
    for file in held:
        assert Path(file.name).exists()
        file.close()
    assert bring(root / "06").exists()


def test_room_is_made_among_files_of_the_cache_alone(bucket, tmp_path):
    """A cache that was set to a folder of other things removed their files in folders called files or parts."""
    for name in ("0", "1", "parts/x.part", "files/y"):
        bucket.put(f"data/{name}", b"x" * 1000)
    root, home = RemotePath(f"s3://{bucket.name}/data"), tmp_path / "files/parts"
    precious = [home / "study/files/a", home / "parts/b"]
    for path in precious:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"p" * 5000)
        os.utime(path, (1, 1))
    remote.choose_cache(home, 2500 / 2**30)
    with pytest.raises(
        DataError, match="holds study, which is not a file of the cache; choose a separate folder"
    ):
        bring(root / "0")
    shutil.rmtree(home / "study")
    for n in range(8):
        bring(root / ("0", "parts/x.part", "1", "files/y")[n % 4])
        remote.release_files()
        assert count_bytes(home) <= 2500
        left = {p.relative_to(home).as_posix() for p in home.rglob("versions/**/*") if p.is_file()}
        assert {name.replace("/versions/", "/files/", 1) for name in left} == {
            p.relative_to(home).as_posix() for p in home.glob("s3/*/files/**/*") if p.is_file()
        }
    assert precious[1].exists()
    bucket.put("data/" + "n" * 300, b"x")
    remote.forget_listings()
    with pytest.raises(DataError, match=r"cannot be kept in the cache .* \(File name too long\)"):
        bring(root / ("n" * 300))


def test_addresses_hold_no_passwords(tmp_path):
    """What is read from an address is in run folders, logs and names of the cache."""
    from braindecode_vis.config import check_files, read_config

    there = tmp_path / "x.yaml"
    for address in ("https://me:geheim@host/data", "s3://me:geheim@bucket/data", "https://host/d?sig=geheim"):
        there.write_text(f"name: x\ndataset: {{kind: nsd, root: '{address}'}}\n")
        for ask in (
            lambda address=address: remote.as_path(address),
            lambda: check_files(read_config(there)),
            lambda address=address: read_config(there, [f"dataset.root={address}"]),
        ):
            with pytest.raises(ConfigError, match="written into run folders and logs") as caught:
                ask()
            assert "geheim" not in str(caught.value)
    assert remote.as_path("s3://bucket/a@b?c").name == "a@b?c"
    for out in ("s3://bucket/run", "https:/host/run"):
        with pytest.raises(ConfigError, match="--out is an address of a server, which cannot be written"):
            check_run_folder(Path(out))


def test_a_stopped_download_leaves_nothing_half_visible_and_goes_on(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_WINDOW_BYTES", 1000)
    monkeypatch.setattr(remote, "_WINDOWS", 1)
    content = os.urandom(5500)
    bucket.put("data/x", content)
    path, asked = RemotePath(f"s3://{bucket.name}/data/x"), []
    ask = remote._Server.ask

    def stop(self, what, call):
        asked.append(getattr(call, "args", ()))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ask(self, what, call)

    assert path.stat().st_size == 5500
    monkeypatch.setattr(remote._Server, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        path.read_bytes()
    assert not list((tmp_path / "remote").rglob("files/**/x"))
    assert path.read_bytes() == content
    assert asked[-1][1] == [5000]
    assert [*map(len, asked)] == [3] * len(asked)
    assert len(asked) == 5 + 2  # four pieces, the stop, and the two that were missing


def test_each_failure_is_one_sentence(root, bucket, tmp_path, monkeypatch):
    bucket.put("data/secret", b"x", public=False)
    path = root / "sub-02/eeg/x.eeg"
    with pytest.raises(DataError, match="there is no bucket called no-such-bucket"):
        RemotePath("s3://no-such-bucket/data").is_dir()
    with pytest.raises(
        DataError, match="secret may not be read: the server denies access to anonymous readers"
    ):
        (root / "secret").read_bytes()
    assert path.stat().st_size == 5000
    bucket.put("data/sub-02/eeg/x.eeg", b"other")
    with pytest.raises(DataError, match=r"x\.eeg changed on the server while it was read \(before etag"):
        path.read_bytes()
    bucket.delete("data/sub-02/eeg/x.eeg")
    with pytest.raises(DataError, match="was listed by the server but no longer exists"):
        path.read_bytes()
    remote.choose_cache(None, 1e-6)
    with pytest.raises(
        DataError, match=r"has 10 kB, but the cache .* may hold only 1 kB: increase remote\.limit_gib"
    ):
        (root / "sub-01/eeg/x.eeg").read_bytes()
    remote.choose_cache(None, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(DataError, match="could not be stored, since the disk of the cache"):
            (root / "sub-01/eeg/x.eeg").read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "remote").rglob("files/**/x.eeg"))
    monkeypatch.setenv("BRAINDECODE_VIS_REMOTE_GIB", "much")
    with pytest.raises(DataError, match="BRAINDECODE_VIS_REMOTE_GIB is 'much'"):
        (root / "top.json").read_bytes()
    monkeypatch.delenv("BRAINDECODE_VIS_REMOTE_GIB")
    forget_connections()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the server does not answer; check the network"):
        root.is_dir()
    forget_connections()
    with pytest.raises(DataError, match="leads upwards"):
        (root / "../x").exists()


def forget_connections():
    remote._SERVERS.clear()
    remote._CONNECTIONS.clear()


def test_a_large_folder_is_listed_once(root, monkeypatch):
    server, _ = remote._find_server(root)
    rows = [
        {"name": f"{root.parts[1]}/data/{n}", "type": "file", "size": 1, "ETag": "x"} for n in range(5_000)
    ]
    asked = []
    monkeypatch.setattr(server.fs, "ls", lambda name, detail: (asked.append(name), rows)[1])
    assert root.is_dir()
    assert all((root / f"{n}").is_file() for n in range(0, 5_000, 10))
    digest_folder(root, [str(n) for n in range(500)])
    assert asked == [f"{root.parts[1]}/data"]


def test_many_small_folders_are_listed_together(bucket, monkeypatch):
    monkeypatch.setattr(remote, "_MANY_FOLDERS", 4)
    for n in range(12):
        bucket.put(f"data/{n}/x", b"x")
    root = RemotePath(f"s3://{bucket.name}/data")
    server, _ = remote._find_server(root)
    asked, ls = [], server.fs.ls
    monkeypatch.setattr(
        server.fs, "ls", lambda name, detail: (asked.append(name), ls(name, detail=detail))[1]
    )
    assert [path.name for folder in root.iterdir() for path in folder.iterdir()] == ["x"] * 12
    assert len(asked) < 7


def test_hostile_names_stay_outside(root, monkeypatch):
    server, _ = remote._find_server(root)
    names = ["..", ".", "", "a\\b", "fine"]
    rows = [{"name": f"{root.parts[1]}/data/{n}", "type": "file", "size": 1, "ETag": "x"} for n in names]
    monkeypatch.setattr(server.fs, "ls", lambda name, detail: rows)
    assert [path.name for path in root.iterdir()] == ["fine"]


def test_an_address_in_a_file_needs_consent(tmp_path):
    from braindecode_vis.config import check_files, read_config
    from braindecode_vis.config.models import RemoteConfig
    from braindecode_vis.parts.studies.sweep import list_consents

    there = tmp_path / "decode.yaml"
    there.write_text("name: x\ndataset: {kind: nsd, root: 's3://bucket/nsd', images: 's3://other/x.hdf5'}\n")
    config = read_config(there)
    with pytest.raises(ConsentError, match=r"dataset\.root is s3://bucket/nsd, which a file asks to read"):
        config.dataset.hash_inputs()
    named = read_config(there, root=Path("s3://bucket/nsd"))
    assert (named.dataset.root, str(named.dataset.root)) == (RemotePath("s3://bucket/nsd"), "s3://bucket/nsd")
    with pytest.raises(ConsentError, match=r"dataset\.images is s3://other/x\.hdf5"):
        check_files(named)
    said = read_config(there, ["dataset.root=s3://bucket/nsd", "dataset.images=s3://other/x.hdf5"])
    assert [type(p) for p in (said.dataset.root, said.dataset.images)] == [RemotePath, RemotePath]
    with give_consent(download=True):
        assert isinstance(read_config(there).dataset.images, RemotePath)
    assert said.hashed_fields() == config.hashed_fields()
    # A run of a sweep is named by its folder, whose file cannot keep what was allowed, nor where the cache is.
    said = said.model_copy(update={"remote": RemoteConfig(cache=tmp_path / "c", limit_gib=2)})
    assert list_consents(said) == [
        f"--set=remote.cache={tmp_path}/c",
        "--set=remote.limit_gib=2.0",
        "--set=dataset.images=s3://other/x.hdf5",
        "--set=dataset.root=s3://bucket/nsd",
    ]


def test_own_arrays_and_pictures_may_lie_in_a_bucket(bucket, tmp_path):
    from braindecode_vis.datasets.array_folder import ArraysConfig

    here = tmp_path / "arrays"
    (here / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(here / "data.npy", rng.standard_normal((8, 3, 5)))
    (here / "trials.csv").write_text("stimulus_id\n" + "\n".join(f"p{n % 4}" for n in range(8)))
    for n in range(4):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(here / f"images/p{n}.png")
    there = RemotePath(bucket.fill(here, "arrays"))
    one, other = (ArraysConfig(root=root).read() for root in (here, there))
    assert np.array_equal(one.responses.data, other.responses.data)
    assert other.stimuli.root == RemotePath(f"s3://{bucket.name}")
    for a, b in zip(one.stimuli.iterate_images(), other.stimuli.iterate_images(), strict=True):
        assert np.array_equal(a, b)


SHARE = """
import sys
from braindecode_vis.base.remote import RemotePath, bring
root = RemotePath(sys.argv[1])
for path in root.iterdir():
    assert set(bring(path).read_bytes()) == {int(path.name)}, path
"""


@pytest.mark.slow
def test_processes_share_a_small_cache_and_kills_harm_nothing(bucket, tmp_path, monkeypatch):
    for n in range(60):
        bucket.put(f"data/{n}", bytes([n]) * 100_000)
    monkeypatch.setenv("BRAINDECODE_VIS_REMOTE_GIB", str(3e6 / 2**30))
    root = f"s3://{bucket.name}/data"
    words = [sys.executable, "-P", "-c", SHARE, root]
    started = [subprocess.Popen(words, stderr=subprocess.PIPE) for _ in range(5)]
    time.sleep(1.8)
    for each in started[:2]:
        each.kill()
    ended = [each.communicate()[1].decode()[-400:] for each in started]
    assert [each.returncode for each in started[2:]] == [0, 0, 0], ended
    assert count_bytes(tmp_path / "remote") <= 3e6
    for path in (tmp_path / "remote").rglob("files/**/*"):
        assert not path.is_file() or path.read_bytes() == bytes([int(path.name)]) * 100_000
