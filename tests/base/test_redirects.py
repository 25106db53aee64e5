"""A server may send on to its own files and to public https addresses, and nowhere else."""

from itertools import product

import pytest

from braindecode_vis.base import redirects, remote
from braindecode_vis.base.checks import DataError
from braindecode_vis.base.remote import RemotePath
from tests.datasets.loopback import list_pages, serve

HOSTS = {"public": "1.1.1.1", "private": "10.0.0.7", "loopback": "127.0.0.1"}


@pytest.mark.parametrize(("start", "end", "scheme"), list(product(HOSTS, HOSTS, ("http", "https"))))
@pytest.mark.parametrize("same_server", [False, True])
def test_every_pair_of_places(start, end, scheme, same_server):
    url = f"{scheme}://{HOSTS[start]}/a"
    followed = not redirects.explain_refusal(url, f"{scheme}://{HOSTS[end]}/b", same_server=same_server)
    assert followed == ((end == "public" and scheme == "https") or (same_server and start == end))
    # Another port is another server.
    elsewhere = f"{scheme}://{HOSTS[end]}:8081/b"
    refused = redirects.explain_refusal(url, elsewhere, same_server=same_server)
    assert bool(refused) == (end != "public" or scheme != "https")


def test_names_are_looked_up(monkeypatch):
    answers = {"lab.example": "192.168.1.4", "archive.example": "1.1.1.1"}
    monkeypatch.setattr(
        redirects, "_look_up", lambda host: [(0, 0, 0, "", (answers[host], 0))] if host in answers else []
    )
    for host, refused in (("lab.example", True), ("archive.example", False), ("unknown.example", False)):
        url = f"https://{host}/b"
        assert bool(redirects.explain_refusal("https://a.example", url, same_server=True)) == refused


@pytest.fixture
def secret(tmp_path):
    """A server of this machine whose files nobody asked for."""
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "key.txt").write_text("secret")
    with serve(list_pages(tmp_path)) as pages:
        yield pages


@pytest.mark.parametrize("way", ["listing", "file", "range"])
def test_a_root_that_sends_on_to_this_machine_is_refused(secret, way, monkeypatch):
    monkeypatch.setattr(remote, "_ATTEMPTS", 1)
    with serve({"/data/": b'<a href="a.bin">a.bin</a>', "/data/a.bin": b"1234"}) as pages:
        root = RemotePath(f"{pages.url}/data")
        sent = f"{secret.url}/secret/" + ("" if way == "listing" else "key.txt")
        if way == "listing":
            pages.redirects["/data/"] = sent
        else:
            assert (root / "a.bin").is_file()
            pages.redirects["/data/a.bin"] = sent
        asked = {
            "listing": lambda: list(root.iterdir()),
            "file": lambda: (root / "a.bin").read_bytes(),
            "range": lambda: remote._open_http_reader()(f"{pages.url}/data/a.bin", 0, 4),
        }
        with pytest.raises(DataError, match=r"sends on to .*, which is not https; if you trust that address"):
            asked[way]()
    assert not secret.requests


def test_a_server_may_send_on_to_its_own_files():
    with serve({"/data/": b'<a href="a.bin">a.bin</a>', "/data/b.bin": b"1234"}) as pages:
        pages.redirects["/data/a.bin"] = "/data/b.bin"
        assert remote._open_http_reader()(f"{pages.url}/data/a.bin", 0, 4) == b"1234"
        assert (RemotePath(f"{pages.url}/data") / "a.bin").read_bytes() == b"1234"
