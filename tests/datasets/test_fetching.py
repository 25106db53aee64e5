"""Every transfer goes over a server on the loopback interface that can be told to misbehave."""

import errno
import hashlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from types import SimpleNamespace

import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets import fetching, hosts, transfer
from braindecode_vis.datasets.manifests import Manifest, ManifestPart, PartFile, read_manifest
from tests.datasets.loopback import serve

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
    monkeypatch.setattr(transfer, "_PAUSE_S", 0.01)
    with serve({"/a.bin": CONTENT, "/b.bin": b"bbb"}) as state:
        yield state


def make_part(*files, name="data", **changes):
    return ManifestPart(
        **{"name": name, "what": "toys", "host": "https", "files": files, "mark": "verified", **changes}
    )


def make_manifest(*files, parts=(), **changes):
    return Manifest(
        name="toy", title="Toy set", modality="eeg", subjects=1, stimuli="none", summary="", citation="",
        licence="CC BY-NC 4.0", source={"url": "example.org/toy"}, parts=parts or (make_part(*files, **changes),),
    )  # fmt: skip


def fetch(manifest, root, *, jobs=1, progress=None, **choices):
    return fetching.fetch(fetching.make_plan(manifest, root, **choices), jobs=jobs, progress=progress)


def entry(state, name="a.bin", content=CONTENT, path=None, **changes):
    values = {
        "path": path or f"sub/{name}",
        "at": f"{state.url}/{name}",
        "bytes": len(content),
        "checksum": f"sha256:{hashlib.sha256(content).hexdigest()}",
    }
    return PartFile(**{**values, **changes})


def test_files_arrive_whole_and_are_left_alone_afterwards(server, tmp_path):
    manifest = make_manifest(entry(server), entry(server, "b.bin", b"bbb"))
    seen = []
    findings = fetch(manifest, tmp_path, progress=lambda *args: seen.append(args))
    assert [finding.ok for finding in findings] == [True, True]
    assert "sha256 as published" in findings[0].message
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["a.bin", "b.bin"]
    assert seen[-2] == ("sub/a.bin", len(CONTENT), len(CONTENT))
    assert seen[-1] == ("sub/b.bin", 3, 3)
    stamp = (tmp_path / "sub/a.bin").stat().st_mtime_ns
    again = fetch(manifest, tmp_path)
    assert all("already there" in finding.message for finding in again)
    assert len(server.requests) == 2
    assert (tmp_path / "sub/a.bin").stat().st_mtime_ns == stamp


def test_nothing_moves_before_the_terms_are_accepted(server, tmp_path):
    terms = make_part(entry(server), access="terms", gate="sign the form at example.org")
    manifest = make_manifest(parts=(terms, make_part(entry(server, "b.bin", b"bbb"), name="free")))
    with pytest.raises(
        DataError,
        match=r"data of toy .*\(CC BY-NC 4\.0\): sign the form .*--accept-terms; without these, pass --parts free\.",
    ):
        fetch(manifest, tmp_path / "new")
    assert not server.requests
    assert not (tmp_path / "new").exists()
    looked = fetching.make_plan(manifest, tmp_path / "new", only_look=True)
    assert [part.name for part in looked.locked] == ["data"]
    told = "data of toy comes under terms (CC BY-NC 4.0): sign the form at example.org. A fetch needs --accept-terms"
    assert looked.describe()[2].startswith(told)
    assert len(fetch(manifest, tmp_path / "new", parts=["free"])) == 1
    assert len(fetch(manifest, tmp_path / "new", accept_terms=True)) == 2


def test_a_look_at_a_host_that_does_not_answer_tells_what_is_known(server, tmp_path, monkeypatch):
    """A dry run of NSD needed its terms accepted and its bucket to answer, before it named a single address."""
    monkeypatch.setitem(hosts.BASES, "openneuro", "http://127.0.0.1:9")
    parts = [
        make_part(name=name, host="openneuro", place="ds0", patterns=("sub-*",))
        for name in ("raw", "regions")
    ]
    manifest = make_manifest(parts=(*parts, make_part(entry(server), name="free")))
    plan = fetching.make_plan(manifest, tmp_path, only_look=True)
    raw, regions, free, total = plan.describe()
    assert raw.startswith("raw: files like sub-*, size unknown, from https://openneuro.org/datasets/ds0 ")
    assert regions.partition("; its host lists them")[2] == raw.partition("; its host lists them")[2]
    assert free.startswith("free: 1 file, 1 MB from ")
    assert total.startswith("to fetch: 1 MB and what raw and regions hold, 1 of 1 files; ")
    assert [finding.ok for finding in fetching.check_addresses(plan)] == [True, False, False]
    with pytest.raises(DataError, match="raw of toy cannot be listed"):
        fetching.make_plan(manifest, tmp_path)


def test_a_broken_connection_is_taken_up_where_it_stopped(server, tmp_path):
    server.breaks = [300_000, 500_000]
    findings = fetch(make_manifest(entry(server)), tmp_path)
    assert findings[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT
    assert server.requests == [
        ("/a.bin", None, None),
        ("/a.bin", "bytes=300000-", '"v1"'),
        ("/a.bin", "bytes=800000-", '"v1"'),
    ]


def test_a_transfer_that_brings_nothing_more_is_told_and_resumed_by_the_next_call(server, tmp_path):
    server.breaks = [400_000, 0]
    findings = fetch(make_manifest(entry(server)), tmp_path)
    assert not findings[0].ok
    assert "broke off after 400000 of 1024000 bytes" in findings[0].message
    assert "to continue from there" in findings[0].message
    assert not (tmp_path / "sub/a.bin").exists()
    assert (tmp_path / "sub/a.bin.part").stat().st_size == 400_000
    findings = fetch(make_manifest(entry(server)), tmp_path)
    assert findings[0].ok
    assert server.requests[-1][1] == "bytes=400000-"
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_at_its_source_is_not_glued_to_the_old_start(server, tmp_path):
    """The old half and the new half would fit in length; only the version tag and the hash show it."""
    server.breaks = [400_000, 0]
    plain = entry(server, checksum="", bytes=None)
    assert not fetch(make_manifest(plain), tmp_path)[0].ok
    server.files["/a.bin"] = CONTENT[::-1]
    server.tag = '"v2"'
    assert fetch(make_manifest(plain), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("changes", [{"tag": '"v2"', "knows_if_range": False}, {"shift": 100}])
def test_another_version_or_range_is_not_glued_either(server, tmp_path, changes):
    """Of files without a checksum, as in NSD's bucket, two halves of two versions, or a hole, were kept as the file."""
    server.breaks = [400_000, 0]
    plain = entry(server, checksum="")
    assert not fetch(make_manifest(plain), tmp_path)[0].ok
    server.files["/a.bin"] = CONTENT[::-1]
    vars(server).update(changes)
    assert fetch(make_manifest(plain), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("stamp", [b"\xff\xfe", b'"v1"\r\nX: y', b""])
def test_a_damaged_note_on_the_version_starts_again(server, tmp_path, stamp):
    """It went into a header as it was, and ended in a traceback."""
    server.breaks = [400_000, 0]
    plain = entry(server, checksum="")
    fetch(make_manifest(plain), tmp_path)
    (tmp_path / "sub/a.bin.part.version").write_bytes(stamp)
    assert fetch(make_manifest(plain), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headers": {"Content-Encoding": "gzip"}}, "sends it packed as gzip"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "answers with a web page"),
        ({"ok": 202}, "answers 202 and no file"),
    ],
)
def test_an_answer_that_is_no_file_is_not_kept_as_one(server, tmp_path, changes, message):
    """A page for logging in was kept under the name of a file of which neither size nor checksum is known."""
    vars(server).update(changes)
    plan = fetching.make_plan(make_manifest(entry(server, bytes=None, checksum="")), tmp_path)
    assert message in fetching.check_addresses(plan)[0].message
    (finding,) = fetching.fetch(plan)
    assert not finding.ok
    assert message in finding.message
    assert not list((tmp_path / "sub").iterdir())


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    server.breaks = [400_000]
    assert fetch(make_manifest(entry(server)), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_starts_again(server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(make_manifest(entry(server)), tmp_path)[0].ok
    (tmp_path / "sub/a.bin").unlink()
    (tmp_path / "sub/a.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(make_manifest(entry(server, bytes=None)), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checksum": f"sha256:{'0' * 64}"}, "has the sha256 .* where 000"),
        ({"bytes": 999}, "sends more than the 999 bytes"),
    ],
)
def test_wrong_content_is_thrown_away(server, tmp_path, changes, message):
    finding = fetch(make_manifest(entry(server, **changes)), tmp_path)[0]
    assert not finding.ok
    assert re.search(message, finding.message)
    assert not list((tmp_path / "sub").iterdir())


def test_a_wrong_file_is_replaced_only_by_a_verified_one(server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.bin").write_bytes(b"old")
    bad = entry(server, checksum=f"sha256:{'0' * 64}")
    assert not fetch(make_manifest(bad), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == b"old"
    assert fetch(make_manifest(entry(server)), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "answers 404 .*no longer"), (403, "answers 403 .*accept the terms"), (500, "answers 500 .*later")],
)
def test_a_refusal_is_told_and_the_other_files_still_come(server, tmp_path, status, message):
    server.status = status
    gone = entry(server, "gone.bin")
    findings = fetch(make_manifest(gone, entry(server, "b.bin", b"bbb")), tmp_path)
    assert [finding.ok for finding in findings] == [False, True]
    assert re.search(message, findings[0].message)


def test_nobody_listening_is_told(tmp_path, server):
    lost = entry(server, at="http://127.0.0.1:9/a.bin")
    finding = fetch(make_manifest(lost), tmp_path)[0]
    assert "http://127.0.0.1:9/a.bin does not answer" in finding.message


def test_a_machine_without_a_network_is_told_soon(server, tmp_path):
    """Each of 254 addresses of THINGS-EEG1 was waited for: 78 s, and hours behind a wall that answers nothing."""
    lost = [entry(server, at="http://127.0.0.1:9/a.bin", path=f"{n}.bin") for n in range(8)]
    manifest = make_manifest(*lost, entry(server, "b.bin", b"bbb"))
    plan = fetching.make_plan(manifest, tmp_path)
    for findings in (fetching.check_addresses(plan, jobs=1), fetching.fetch(plan, jobs=1)):
        left = [finding for finding in findings if "not requested, because 127.0.0.1:9" in finding.message]
        assert len(left) == 5
        assert findings[-1].ok  # of another host


def test_one_call_at_a_time_fills_a_folder(server, tmp_path):
    """Two wrote into the same parts, so that both threw them away, and the later one forgot the other's archives."""
    said = []

    def try_as_well(*_):
        if not said:
            said.append("")
            with pytest.raises(DataError, match="is in use by another fetch; wait") as raised:
                fetch(make_manifest(entry(server)), tmp_path)
            said[0] = str(raised.value)

    assert fetch(make_manifest(entry(server)), tmp_path, progress=try_as_well)[0].ok
    assert str(tmp_path) in said[0]
    assert fetch(make_manifest(entry(server)), tmp_path)[0].ok


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", '{"files": []}', "[" * 100_000, '{"files": {"a": 1}}',
     '{"files": {"x.zip": {"checksum": "", "unpacked": 3}}}',
     '{"files": {"x.zip": {"checksum": "", "unpacked": {"\\u0000": [1, 2]}}}}'],
)  # fmt: skip
def test_a_damaged_record_is_as_none(server, tmp_path, text):
    """Some were a traceback."""
    server.files["/x.zip"] = make_zip(a=b"a")
    (tmp_path / fetching.RECORD).write_text(text)
    packed = entry(server, "x.zip", path="x.zip", bytes=None, checksum="")
    assert "unpacked 1 files" in fetch(make_manifest(packed, unpack="x"), tmp_path)[0].message
    assert "as it was verified" in fetch(make_manifest(packed, unpack="x"), tmp_path)[0].message


def test_a_disk_that_fills_up_stops_everything_and_keeps_the_part(server, tmp_path, monkeypatch):
    def receive(url, part, *_):
        part.write_bytes(CONTENT[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "_receive", receive)
    manifest = make_manifest(entry(server), entry(server, "b.bin", b"bbb"))
    findings = fetch(manifest, tmp_path)
    assert "is full; make room and fetch again" in findings[0].message
    assert "not fetched, since the disk" in findings[1].message
    monkeypatch.undo()
    assert all(finding.ok for finding in fetch(manifest, tmp_path))
    assert server.requests[0][1] == "bytes=1000-"


def test_what_is_brought_by_hand_is_said_and_never_asked_for(server, tmp_path):
    hand = ManifestPart(
        name="images",
        what="pictures",
        host="nowhere",
        access="by_hand",
        gate="open example.org",
        mark="verified",
    )
    with pytest.raises(DataError, match=r"toy has nothing to fetch from here; .*images: open example\.org"):
        fetch(make_manifest(parts=(hand,)), tmp_path)
    plan = fetching.make_plan(make_manifest(parts=(hand, make_part(entry(server)))), tmp_path)
    assert plan.describe()[1] == "images: by hand: open example.org"
    assert len(fetching.fetch(plan)) == 1
    with pytest.raises(DataError, match=r"nothing to fetch .*published as url example"):
        fetch(make_manifest(parts=(make_part(default=False),)), tmp_path)
    for name, why in (("synthetic_digits", "made when it is read"), ("arrays", "its files are your own")):
        with pytest.raises(DataError, match=f"{name} has nothing to fetch: .*{why}"):
            fetching.make_plan(read_manifest(name), tmp_path)


def test_addresses_and_places_are_checked(tmp_path, server):
    local = fetch(make_manifest(PartFile(path="a.bin", at="file:///etc/hosts")), tmp_path)
    assert "is not an http address" in local[0].message
    for path in ("../a.bin", "/a.bin", "b/../../a.bin", "c:/a.bin", "b\\..\\a.bin", "a\nb"):
        with pytest.raises(DataError, match="outside"):
            fetch(make_manifest(entry(server, path=path)), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        fetch(make_manifest(entry(server)), tmp_path / "file" / "root")
    assert not server.requests


def test_an_endless_answer_stops_at_the_published_size(server, tmp_path, monkeypatch):
    """A server that sends on and on once filled the disk before the size was compared."""
    server.files["/a.bin"] = CONTENT * 20
    received = []
    finding = fetch(
        make_manifest(entry(server)),
        tmp_path,
        progress=lambda name, n_bytes, total: received.append(n_bytes),
    )[0]
    assert "sends more than the 1024000 bytes that are published" in finding.message
    assert max(received) <= len(CONTENT)
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("length", ["many", "-5", "1e6", "9" * 5000, "\u00b2", "1024000, 1024000"])
def test_a_length_that_is_no_number(server, tmp_path, length):
    """``int`` of such a header was a traceback; the published size says as much."""
    server.length = length
    assert fetch(make_manifest(entry(server)), tmp_path)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://example.org/a.bin", "not https"),
        ("ftp://example.org/a.bin", "not https"),
        ("file:///etc/hosts", "not https"),
        ("https://127.0.0.1/a.bin", "on this machine"),
        ("https://localhost/a.bin", "on this machine"),
        ("https://[::1]/a.bin", "on this machine"),
        ("https://[::ffff:127.0.0.1]/a.bin", "on this machine"),
        ("https://169.254.169.254/latest/meta-data", "on this machine or in its local network"),
        ("https://10.0.0.1/a.bin", "on this machine or in its local network"),
        ("https://[broken/a.bin", "not an address"),
    ],
)
def test_a_redirection_leads_to_a_public_https_address_or_nowhere(
    server, tmp_path, monkeypatch, target, message
):
    server.redirects["/a.bin"] = target
    manifest = make_manifest(entry(server))
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", False)
    finding = fetch(manifest, tmp_path)[0]
    assert not finding.ok
    assert message in finding.message
    assert len(server.requests) == 1


def test_a_redirection_to_a_public_address_is_followed(server, tmp_path):
    """The stand-in lies on this machine, which the test allows; a chain without end is reported."""
    server.redirects["/old.bin"] = "/a.bin"
    moved = entry(server, at=f"{server.url}/old.bin")
    assert fetch(make_manifest(moved), tmp_path)[0].ok
    transfer._check_redirection("https://example.org/a", "https://1.1.1.1/b")
    server.redirects["/a.bin"] = "/old.bin"
    finding = fetch(make_manifest(entry(server, path="other.bin")), tmp_path)[0]
    assert "answers 302" in finding.message


def test_a_file_is_verified_by_what_is_known_of_it(server, tmp_path):
    """Hosts publish sha256, md5 or the blob of git; of some, a page shows the first digits alone."""
    blob = hashlib.sha1(b"blob 1024000\0" + CONTENT).hexdigest()
    for n, known in enumerate(
        (f"md5:{hashlib.md5(CONTENT).hexdigest()}", f"git:{blob}", f"git:{blob[:16]}"), start=1
    ):
        right = entry(server, path=f"{n}.bin", checksum=known)
        assert fetch(make_manifest(right), tmp_path)[0].ok, known
        wrong = entry(
            server, path=f"wrong{n}.bin", checksum=f"{known[:-1]}{'0' if known[-1] != '0' else '1'}"
        )
        finding = fetch(make_manifest(wrong), tmp_path)[0]
        assert f"has the {known[:3]} " in finding.message
        assert not list(tmp_path.glob("wrong*"))


def test_the_second_call_reads_no_file(server, tmp_path, monkeypatch):
    """Hashing 33 GB to learn that nothing changed takes minutes; a file that did change is hashed and replaced."""
    manifest = make_manifest(entry(server), entry(server, "b.bin", b"bbb"))
    fetch(manifest, tmp_path)
    monkeypatch.setattr(fetching, "has_checksum", lambda *_: pytest.fail("read again"))
    assert not fetching.make_plan(manifest, tmp_path).missing
    assert all("as it was verified before" in finding.message for finding in fetch(manifest, tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
    (tmp_path / "sub/a.bin").write_bytes(CONTENT[::-1])
    assert "fetched 1 MB" in fetch(manifest, tmp_path)[0].message
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT
    # A damaged record costs reading.
    (tmp_path / fetching.RECORD).write_text("{")
    assert "already there, sha256 as published" in fetch(manifest, tmp_path)[0].message
    assert len(server.requests) == 3


def test_subjects_and_parts_are_chosen(server, tmp_path):
    server.files |= {f"/{n}.bin": b"bbb" for n in ("01", "02")}
    by_subject = [entry(server, f"{n}.bin", b"bbb", subject=n) for n in ("01", "02")]
    extra = make_part(entry(server), name="extra", default=False)
    manifest = make_manifest(parts=(make_part(*by_subject, entry(server, "b.bin", b"bbb")), extra))
    names = [finding.item for finding in fetch(manifest, tmp_path, subjects=["1"])]
    assert names == ["sub/01.bin", "sub/b.bin"]
    assert len(fetch(manifest, tmp_path)) == 3
    assert [f.item for f in fetch(manifest, tmp_path, parts=["extra"])] == ["sub/a.bin"]
    assert len(fetch(manifest, tmp_path, parts=["all"], jobs=4)) == 4
    with pytest.raises(ConfigError, match="--subject names 3, but toy has the subjects 01, 02"):
        fetch(manifest, tmp_path, subjects=["3"])
    for nobody in ({"subjects": []}, {"parts": []}):
        # ``--subject ,`` fetched what all share, ``--parts ""`` said that there is nothing to fetch.
        with pytest.raises(ConfigError, match=r"--(subject|parts) is empty; give names"):
            fetch(manifest, tmp_path, **nobody)
    with pytest.raises(ConfigError, match="are not kept by subject"):
        fetch(manifest, tmp_path, parts=["extra"], subjects=["1"])
    with pytest.raises(ConfigError, match=r"--parts .*must be one of .*did you mean 'extra'"):
        fetch(manifest, tmp_path, parts=["extr"])


def test_the_total_is_told_first_and_compared_with_the_disk(server, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.bin.part").write_bytes(CONTENT[:24_000])
    unknown = entry(server, "b.bin", bytes=None, checksum="")
    plan = fetching.make_plan(make_manifest(entry(server), unknown), tmp_path)
    assert plan.describe()[-1].startswith("to fetch: 1 MB and 1 file of unknown size, 2 of 2 files; ")
    assert plan.missing == {"sub/a.bin": 1_000_000, "sub/b.bin": None}
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=999_999))
    with pytest.raises(DataError, match=r"toy needs 1 MB more, but .* has 1,000 kB free; .*--subject "):
        fetching.fetch(plan)
    assert not server.requests


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.busy = [503, 429]
    assert fetch(make_manifest(entry(server)), tmp_path)[0].ok
    server.busy = [503] * 9
    (tmp_path / "sub/a.bin").unlink()
    assert "answers 503" in fetch(make_manifest(entry(server)), tmp_path)[0].message


def test_addresses_are_asked_without_fetching(server, tmp_path):
    others = [
        entry(server, "b.bin", b"bbb", bytes=4), entry(server, "gone.bin"),
        entry(server, at="http://127.0.0.1:9/x", path="x"), PartFile(path="t.json", text="{}"),
    ]  # fmt: skip
    plan = fetching.make_plan(make_manifest(entry(server), *others), tmp_path)
    for knows_head in (True, False):
        server.knows_head = knows_head
        findings = fetching.check_addresses(plan)
        assert [finding.ok for finding in findings] == [True, False, False, False]
        said = [finding.message for finding in findings]
        assert said[0] == "answers, 1024000 bytes as published"
        assert said[1] == "has 3 bytes where 4 are published"
        assert said[2].startswith("says 404")
        assert said[3].startswith("does not answer (")
    assert not list(tmp_path.iterdir())


# --- archives ---------------------------------------------------------------------------------------------


def make_zip(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def fetch_archive(server, root, content, *, name="x.zip", unpack="sub-01"):
    server.files[f"/{name}"] = content
    return fetch(make_manifest(entry(server, name, content, path=name), unpack=unpack), root)[0]


def test_an_archive_is_unpacked_once_and_its_folder_not_doubled(server, tmp_path):
    """Some publishers pack sub-01/a.npy into sub-01.zip, others a.npy; a reader needs sub-01/a.npy."""
    members = {"sub-01/a.npy": b"a" * 5000, "sub-01/deep/b.npy": b"b", "__MACOSX/sub-01/._a.npy": b"?"}
    packed = make_zip(**members)
    assert "unpacked 2 files" in fetch_archive(server, tmp_path, packed).message
    assert (tmp_path / "sub-01/a.npy").read_bytes() == b"a" * 5000
    assert not (tmp_path / "x.zip").exists()
    asked = len(server.requests)
    assert "as it was verified before" in fetch_archive(server, tmp_path, packed).message
    assert len(server.requests) == asked
    (tmp_path / "sub-01/deep/b.npy").unlink()
    assert "unpacked" in fetch_archive(server, tmp_path, packed).message
    assert (tmp_path / "sub-01/deep/b.npy").is_file()
    assert fetch_archive(server, tmp_path / "flat", make_zip(**{"a.npy": b"a"})).ok
    assert (tmp_path / "flat/sub-01/a.npy").is_file()
    assert fetch_archive(server, tmp_path / "top", packed, unpack=".").ok
    assert (tmp_path / "top/sub-01/a.npy").is_file()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:\\evil", "..\\evil"])
def test_an_archive_writes_nothing_outside_its_folder(server, tmp_path, name):
    finding = fetch_archive(server, tmp_path / "root", make_zip(**{"good": b"1", name: b"evil"}))
    assert not finding.ok
    assert "outside its folder" in finding.message
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.rglob("good"))


def test_tars_links_locks_and_damage(server, tmp_path):
    def make_tar(*infos):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for info, content in infos:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    plain, link = tarfile.TarInfo("./a.npy"), tarfile.TarInfo("b")
    assert fetch_archive(server, tmp_path / "tar", make_tar((plain, b"aa")), name="x.tar.gz").ok
    assert (tmp_path / "tar/sub-01/a.npy").read_bytes() == b"aa"
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    finding = fetch_archive(server, tmp_path / "link", make_tar((link, b"")), name="x.tar.gz")
    assert "holds the link 'b'" in finding.message
    packed = zipfile.ZipInfo("l")
    packed.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(packed, "/etc/passwd")
    assert "holds the link 'l'" in fetch_archive(server, tmp_path / "zip", buffer.getvalue()).message
    content = bytearray(make_zip(a=b"aaaa" * 100))
    content[60] ^= 1  # within the member, so that its checksum does not fit
    finding = fetch_archive(server, tmp_path / "bad", bytes(content))
    assert "is damaged at a" in finding.message
    # Each way of packing has errors of its own; those of lzma, and a way that Python does not know, were tracebacks.
    for way, message in (
        (zipfile.ZIP_LZMA, "is damaged at a"),
        (zipfile.ZIP_BZIP2, "is damaged at a"),
        (9, "unpack it"),
    ):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if way == 9 else way) as archive:
            archive.writestr("a", os.urandom(5000))
        content = bytearray(buffer.getvalue())
        content[60] ^= 0xFF
        content[8] = content[content.index(b"PK\x01\x02") + 10] = way
        finding = fetch_archive(server, tmp_path / f"way{way}", bytes(content))
        assert message in finding.message
    content = bytearray(make_zip(a=b"aaaa"))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert "locked with a password" in fetch_archive(server, tmp_path / "locked", bytes(content)).message
    assert "cannot be unpacked" in fetch_archive(server, tmp_path / "none", b"no archive").message


# --- stopping ---------------------------------------------------------------------------------------------


_STOPPED = """
import signal, sys, time
from pathlib import Path
from braindecode_vis.datasets import fetching, hosts, transfer
from braindecode_vis.datasets.manifests import Manifest, ManifestPart, PartFile, read_manifest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
transfer.ALLOW_LOOPBACK = True
transfer._BLOCK_BYTES = 1 << 12
files = tuple(PartFile(path=f"{n}.bin", at=f"{sys.argv[1]}/{n}.bin", bytes=4_000_000) for n in range(3))
part = ManifestPart(name="data", what="", host="https", files=files, mark="verified")
manifest = Manifest(name="toy", title="", modality="eeg", subjects=1, stimuli="", summary="", citation="",
    licence="", parts=(part,))
def show(*_):
    print("going", flush=True)
    time.sleep(0.005)  # or all may be there before the signal is
fetching.fetch(fetching.make_plan(manifest, Path(sys.argv[2])), jobs=2, progress=show)
"""


def test_ctrl_c_ends_at_once_and_loses_nothing(server, tmp_path):
    """What came before the signal lies in its parts, and the next call asks for the rest."""
    content = os.urandom(4_000_000)
    server.files |= {f"/{n}.bin": content for n in range(3)}
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    words = [sys.executable, "-c", _STOPPED, server.url, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode != 0
    kept = {path.name: path.stat().st_size for path in tmp_path.glob("*.bin*") if path.suffix != ".version"}
    server.requests.clear()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    files = [entry(server, f"{n}.bin", content, path=f"{n}.bin", checksum=digest) for n in range(3)]
    assert all(finding.ok for finding in fetch(make_manifest(*files), tmp_path))
    asked = {path: wanted for path, wanted, _ in server.requests}
    for name, size in kept.items():
        if name.endswith(".part") and 0 < size < 4_000_000:
            assert asked[f"/{name.removesuffix('.part')}"] == f"bytes={size}-"
        elif name.endswith(".bin"):
            assert f"/{name}" not in asked


def test_several_files_come_at_once(server, tmp_path):
    """Two threads wait for each other at the second file, so that one at a time would never end."""
    barrier = threading.Barrier(2)
    files = [entry(server, path=f"{n}.bin") for n in range(2)]
    first = dict.fromkeys(("0.bin", "1.bin"), True)

    def progress(name, *_):
        if first.pop(name, False):
            barrier.wait()

    assert all(finding.ok for finding in fetch(make_manifest(*files), tmp_path, jobs=2, progress=progress))
