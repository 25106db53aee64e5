"""Every transfer goes over a server on the loopback interface that can be told to misbehave."""

import errno
import hashlib
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from braindecode_vis.checks import DataError
from braindecode_vis.datasets import fetching
from braindecode_vis.datasets.fetching import fetch, resolve_url
from braindecode_vis.datasets.manifests import Manifest, ManifestFile

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes


class Entry(ManifestFile):
    url: str | None = None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        state = self.server.state
        state.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if self.path in state.redirects:
            self.send_response(302)
            self.send_header("Location", state.redirects[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path not in state.files:
            self.send_error(state.status)
            return
        content, start = state.files[self.path], 0
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, state.tag)
        if wanted and state.ranges and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if state.tag:
            self.send_header("ETag", state.tag)
        self.send_header("Content-Length", state.length or str(len(content) - start))
        self.end_headers()
        stop = len(content)
        if state.breaks:
            stop = min(stop, start + state.breaks.pop(0))
        self.wfile.write(content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "ALLOW_LOOPBACK", True)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.state = SimpleNamespace(
        files={"/a.bin": CONTENT, "/b.bin": b"bbb"},
        requests=[],
        redirects={},
        length="",
        breaks=[],
        ranges=True,
        tag='"v1"',
        status=404,
    )
    httpd.state.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=partial(httpd.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield httpd.state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def make_manifest(*entries, gate=None):
    return Manifest(
        name="toy", title="Toy set", modality="eeg", subjects=1, stimuli="none", summary="", citation="",
        licence="CC BY-NC 4.0", gate=gate, source={"url": "example.org/toy"}, files=entries,
    )  # fmt: skip


def entry(state, name="a.bin", content=CONTENT, path=None, **changes):
    values = {
        "path": path or f"sub/{name}",
        "url": f"{state.url}/{name}",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return Entry(**{**values, **changes})


def test_files_arrive_whole_and_are_left_alone_afterwards(server, tmp_path):
    manifest = make_manifest(entry(server), entry(server, "b.bin", b"bbb"))
    seen = []
    findings = fetch(manifest, tmp_path, accept_licence=True, progress=lambda *args: seen.append(args))
    assert [finding.ok for finding in findings] == [True, True]
    assert "sha256 as published" in findings[0].message
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["a.bin", "b.bin"]
    assert seen[-2] == ("sub/a.bin", len(CONTENT), len(CONTENT))
    assert seen[-1] == ("sub/b.bin", 3, 3)
    stamp = (tmp_path / "sub/a.bin").stat().st_mtime_ns
    again = fetch(manifest, tmp_path, accept_licence=True)
    assert all("already there" in finding.message for finding in again)
    assert len(server.requests) == 2
    assert (tmp_path / "sub/a.bin").stat().st_mtime_ns == stamp


def test_nothing_moves_before_the_terms_are_accepted(server, tmp_path):
    manifest = make_manifest(entry(server), gate="a form at example.org must be signed")
    with pytest.raises(DataError, match=r"CC BY-NC 4\.0\. Gate: a form .* signed\. .*--accept-licence"):
        fetch(manifest, tmp_path / "new", accept_licence=False)
    assert not server.requests
    assert not (tmp_path / "new").exists()


def test_a_broken_connection_is_taken_up_where_it_stopped(server, tmp_path):
    server.breaks = [300_000, 500_000]
    findings = fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)
    assert findings[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT
    assert server.requests == [
        ("/a.bin", None, None),
        ("/a.bin", "bytes=300000-", '"v1"'),
        ("/a.bin", "bytes=800000-", '"v1"'),
    ]


def test_a_transfer_that_brings_nothing_more_is_told_and_resumed_by_the_next_call(server, tmp_path):
    server.breaks = [400_000, 0]
    findings = fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)
    assert not findings[0].ok
    assert "broke off after 400000 of 1024000 bytes" in findings[0].message
    assert "goes on from there" in findings[0].message
    assert not (tmp_path / "sub/a.bin").exists()
    assert (tmp_path / "sub/a.bin.part").stat().st_size == 400_000
    findings = fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)
    assert findings[0].ok
    assert server.requests[-1][1] == "bytes=400000-"
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_at_its_source_is_not_glued_to_the_old_start(server, tmp_path):
    """The old half and the new half would fit in length; only the version tag and the hash tell."""
    server.breaks = [400_000, 0]
    plain = entry(server, sha256=None, bytes=None)
    assert not fetch(make_manifest(plain), tmp_path, accept_licence=True)[0].ok
    server.files["/a.bin"] = CONTENT[::-1]
    server.tag = '"v2"'
    assert fetch(make_manifest(plain), tmp_path, accept_licence=True)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    server.breaks = [400_000]
    assert fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_starts_again(server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)[0].ok
    (tmp_path / "sub/a.bin").unlink()
    (tmp_path / "sub/a.bin.part").write_bytes(CONTENT + b"more")
    assert fetch(make_manifest(entry(server, bytes=None)), tmp_path, accept_licence=True)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sha256": "0" * 64}, "has sha256 .* where 000"), ({"bytes": 999}, "sends more than the 999 bytes")],
)
def test_wrong_content_is_thrown_away(server, tmp_path, changes, message):
    finding = fetch(make_manifest(entry(server, **changes)), tmp_path, accept_licence=True)[0]
    assert not finding.ok
    assert re.search(message, finding.message)
    assert not list((tmp_path / "sub").iterdir())


def test_a_wrong_file_is_replaced_only_by_a_verified_one(server, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.bin").write_bytes(b"old")
    bad = entry(server, sha256="0" * 64)
    assert not fetch(make_manifest(bad), tmp_path, accept_licence=True)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == b"old"
    assert fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)[0].ok
    assert (tmp_path / "sub/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "answers 404 .*no longer"), (403, "answers 403 .*accept the terms"), (500, "answers 500 .*later")],
)
def test_a_refusal_is_told_and_the_other_files_still_come(server, tmp_path, status, message):
    server.status = status
    gone = entry(server, "gone.bin")
    findings = fetch(make_manifest(gone, entry(server, "b.bin", b"bbb")), tmp_path, accept_licence=True)
    assert [finding.ok for finding in findings] == [False, True]
    assert re.search(message, findings[0].message)


def test_nobody_listening_is_told(tmp_path, server):
    lost = entry(server, url="http://127.0.0.1:9/a.bin")
    finding = fetch(make_manifest(lost), tmp_path, accept_licence=True)[0]
    assert "broke off after 0 of 1024000 bytes" in finding.message


def test_too_little_space_is_seen_before_the_transfer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    finding = fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)[0]
    assert "needs 1024000 more bytes" in finding.message
    assert "1000 free" in finding.message
    assert not server.requests


def test_a_disk_that_fills_up_stops_everything_and_keeps_the_part(server, tmp_path, monkeypatch):
    def receive(url, part, *_):
        part.write_bytes(CONTENT[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching, "_receive", receive)
    manifest = make_manifest(entry(server), entry(server, "b.bin", b"bbb"))
    findings = fetch(manifest, tmp_path, accept_licence=True)
    assert "is full; make room and fetch again" in findings[0].message
    assert "not fetched, since the disk" in findings[1].message
    monkeypatch.undo()
    assert all(finding.ok for finding in fetch(manifest, tmp_path, accept_licence=True))
    assert server.requests[0][1] == "bytes=1000-"


def test_files_without_an_address_are_to_be_brought(tmp_path):
    manifest = make_manifest(ManifestFile(path="a.bin", bytes=3))
    finding = fetch(manifest, tmp_path, accept_licence=True)[0]
    assert not finding.ok
    assert "bring it yourself: published as url example.org/toy" in finding.message
    (tmp_path / "a.bin").write_bytes(b"abc")
    assert fetch(manifest, tmp_path, accept_licence=True)[0].ok
    assert "no file is listed" in fetch(make_manifest(), tmp_path, accept_licence=True)[0].message


def test_addresses_and_places_are_checked(tmp_path, server, monkeypatch):
    local = fetch(make_manifest(Entry(path="a.bin", url="file:///etc/hosts")), tmp_path, accept_licence=True)
    assert "neither an http nor a doi address" in local[0].message
    with pytest.raises(DataError, match="outside"):
        fetch(make_manifest(entry(server, path="../a.bin")), tmp_path, accept_licence=True)
    repository = SimpleNamespace(download_url=lambda name: f"https://archive.org/{name}")
    monkeypatch.setattr("pooch.downloaders.doi_to_repository", lambda doi: repository)
    assert resolve_url("doi:10.5281/zenodo.1/a.bin") == "https://archive.org/a.bin"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        fetch(make_manifest(entry(server)), tmp_path / "file" / "root", accept_licence=True)


def test_an_endless_answer_stops_at_the_published_size(server, tmp_path, monkeypatch):
    """A server that sends on and on once filled the disk before the size was compared."""
    server.files["/a.bin"] = CONTENT * 20
    received = []
    finding = fetch(
        make_manifest(entry(server)),
        tmp_path,
        accept_licence=True,
        progress=lambda name, n_bytes, total: received.append(n_bytes),
    )[0]
    assert "sends more than the 1024000 bytes that are published" in finding.message
    assert max(received) <= len(CONTENT)
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("length", ["many", "-5", "1e6", "9" * 5000, "\u00b2", "1024000, 1024000"])
def test_a_length_that_is_no_number(server, tmp_path, length):
    """``int`` of such a header was a traceback; the published size says as much."""
    server.length = length
    assert fetch(make_manifest(entry(server)), tmp_path, accept_licence=True)[0].ok
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
        ("https://169.254.169.254/latest/meta-data", "on this machine or in its own network"),
        ("https://10.0.0.1/a.bin", "on this machine or in its own network"),
        ("https://[broken/a.bin", "no address"),
    ],
)
def test_a_redirection_leads_to_a_public_https_address_or_nowhere(
    server, tmp_path, monkeypatch, target, message
):
    server.redirects["/a.bin"] = target
    manifest = make_manifest(entry(server))
    monkeypatch.setattr(fetching, "ALLOW_LOOPBACK", False)
    finding = fetch(manifest, tmp_path, accept_licence=True)[0]
    assert not finding.ok
    assert message in finding.message
    assert len(server.requests) == 1


def test_a_redirection_to_a_public_address_is_followed(server, tmp_path):
    """The stand-in lies on this machine, which the test allows; a chain without end is told."""
    server.redirects["/old.bin"] = "/a.bin"
    moved = entry(server, url=f"{server.url}/old.bin")
    assert fetch(make_manifest(moved), tmp_path, accept_licence=True)[0].ok
    fetching._check_redirection("https://example.org/a", "https://1.1.1.1/b")
    server.redirects["/a.bin"] = "/old.bin"
    finding = fetch(make_manifest(entry(server, path="other.bin")), tmp_path, accept_licence=True)[0]
    assert "answers 302" in finding.message
