"""``fetch`` and ``load(download=True)`` as a user meets them, from a stand-in of GitHub on this machine."""

import gzip
import hashlib
import json

import pytest

import braindecode_vis as bdv
from braindecode_vis.datasets import fetching, hosts, manifests, transfer
from braindecode_vis.datasets.manifests import (
    Manifest,
    ManifestPart,
    PartFile,
    find_package_data,
    read_manifest,
)
from tests.datasets.loopback import serve


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("BRAINDECODE_VIS_DATA", str(tmp_path / "user"))
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
    with serve() as state:
        monkeypatch.setitem(hosts.BASES, "github", state.url)
        yield state


@pytest.fixture
def toy(server, monkeypatch):
    """A data set of two subjects with one file each, and pictures behind a form."""
    files = []
    for subject in ("01", "02"):
        content = subject.encode() * 50_000
        server.files[f"/owner/toy/{'a' * 40}/data/sub-{subject}.npy"] = content
        digest = hashlib.md5(content).hexdigest()
        at = f"data/sub-{subject}.npy"
        known = {"bytes": 100_000, "checksum": f"md5:{digest}"}
        files.append(PartFile(path=f"sub-{subject}.npy", at=at, subject=subject, **known))
    host = {"host": "github", "place": f"owner/toy@{'a' * 40}", "mark": "verified"}
    parts = (
        ManifestPart(name="data", what="responses", files=tuple(files), **host),
        ManifestPart(name="more", what="extras", files=(PartFile(path="more.txt"),), access="terms",
                     gate="sign the form", default=False, **host),
        ManifestPart(name="images", what="pictures", host="nowhere", access="by_hand", gate="write to the authors",
             mark="verified"),
    )  # fmt: skip
    manifest = Manifest(
        name="digits69", title="Toys", modality="eeg", subjects=2, stimuli="", summary="", citation="", licence="CC0",
        parts=parts,
    )  # fmt: skip
    monkeypatch.setattr(manifests, "_read_manifest", lambda name: manifest)
    return server


def test_the_verb_tells_brings_and_is_quick_the_second_time(toy, command_line, tmp_path):
    root = tmp_path / "root"
    done = command_line("fetch", "digits69", "--root", root)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert "licence: CC0 data: 2 files, 200 kB from https://github.com/owner/toy" in told
    assert "images: by hand: write to the authors" in told
    assert "to fetch: 200 kB, 2 of 2 files; " in told
    assert done.stdout.splitlines()[0] == "sub-01.npy: fetched 100 kB, md5 as published"
    assert done.stdout.splitlines()[-1] == f"next: braindecode-vis check digits69 --root {root}"
    asked = len(toy.requests)
    done = command_line("fetch", "digits69", "--root", root, "--json")
    assert [f["message"] for f in json.loads(done.stdout)["findings"]] == [
        "already there, as it was verified before"
    ] * 2
    assert len(toy.requests) == asked


def test_a_dry_run_and_addresses_fetch_nothing(toy, command_line, tmp_path):
    root = tmp_path / "root"
    done = command_line("fetch", "digits69", "--subjects", "2", "--dry-run", "--root", root)
    line, *rest = done.stdout.splitlines()
    place = f"{toy.url}/owner/toy/{'a' * 40}/data/sub-02.npy"
    assert line.startswith(f"sub-02.npy: {place}, 100000 bytes, md5:")
    assert rest[-1].startswith("to fetch: 100 kB, 1 of 1 files; ")
    told = json.loads(command_line("fetch", "digits69", "--dry-run", "--root", root, "--json").stdout)
    assert [file["urls"] for file in told["files"]][1] == [place]
    assert not toy.requests
    done = command_line("fetch", "digits69", "--check-addresses", "--root", root)
    assert done.stdout.splitlines()[1] == f"{place}: answers, 100000 bytes as published"
    del toy.files[f"/owner/toy/{'a' * 40}/data/sub-02.npy"]
    done = command_line("fetch", "digits69", "--check-addresses", "--root", root)
    assert done.returncode == 2
    assert "1 of 2 addresses of digits69 do not answer as published; first: " in done.stderr
    assert not root.exists()


def test_what_goes_wrong_is_one_sentence(toy, command_line, tmp_path):
    def refuse(*words):
        done = command_line("fetch", "digits69", "--root", tmp_path / "root", *words)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert refuse("--parts", "more").endswith("(CC0): sign the form. Do that, and then pass --accept-terms.")
    assert "images: write to the authors" in refuse("--parts", "images")
    assert "answers 404" in refuse("--parts", "more", "--accept-terms")
    toy.files[f"/owner/toy/{'a' * 40}/data/sub-02.npy"] = bytes(100_000)
    sentence = refuse()
    assert "1 of 2 files of digits69 were not fetched; first: sub-02.npy: what http" in sentence
    assert "has the md5 " in sentence
    assert (tmp_path / "root/sub-01.npy").is_file()
    assert not list((tmp_path / "root").glob("sub-02*"))


def test_a_data_set_says_what_can_be_fetched(command_line):
    said = command_line("datasets", "things_meg").stdout
    assert "to fetch: epochs, preprocessed epochs at 200 Hz in four files a subject" in said
    assert "(33.0 GB, 4 subjects, verified address)" in said
    assert "with --parts raw" in said
    assert (
        "images, the THINGS images (by hand): download images_THINGS.zip from https://osf.io/jum2f/" in said
    )


def test_python_speaks_of_arguments(toy, tmp_path):
    (tmp_path / "user").write_text("")
    with pytest.raises(bdv.DataError, match="cannot be made") as raised:
        bdv.load("digits69", download=True)
    assert "--root" not in str(raised.value)
    with pytest.raises(bdv.ConfigError, match="no_such"):
        bdv.load("digits69", download=True, no_such=1)
    with pytest.raises(bdv.ConfigError, match=r"^subjects names 3, but digits69 has the subjects 01, 02\.$"):
        bdv.base.checks.for_python(fetching.make_plan)(read_manifest("digits69"), tmp_path, subjects=["3"])
    assert not toy.requests


@pytest.mark.shared
def test_one_line_of_python_brings_a_real_data_set(server, shared, tmp_path, capsys):
    """The bytes are the published ones; the address is that of the manifest at another host."""
    content = (shared / "data/digits69/digit69_28x28.mat").read_bytes()
    server.files[f"/{read_manifest('digits69').parts[0].place.replace('@', '/')}/digit69_28x28.mat"] = content
    data = bdv.load("digits69", download=True)
    assert data.responses.data.shape == (100, 3092)
    assert (tmp_path / "user/digits69/digit69_28x28.mat").is_file()
    assert "to fetch: 2 MB, 1 of 1 files; " in capsys.readouterr().err
    bdv.load("digits69", download=True)
    assert len(server.requests) == 1
    assert not capsys.readouterr().err
    own = bdv.load("digits69", tmp_path / "mine", download=True)
    assert list(own.stimuli.ids) == list(data.stimuli.ids)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["haxby_slices", "muse_n170"])
def test_small_real_sets_are_complete_when_fetched(server, shared, command_line, tmp_path, name):
    """Files that the publisher has under other names, or not at all, are there for the reader."""
    folder = shared / "data" / name
    (part,) = read_manifest(name).parts
    for entry in part.files:
        path = folder / ("" if name == "haxby_slices" else "recordings") / entry.path
        packed = path.with_name(f"{path.name}.gz")
        if entry.text is None:
            content = gzip.decompress(packed.read_bytes()) if packed.is_file() else path.read_bytes()
            server.files[f"/{part.place.replace('@', '/')}/{entry.at}"] = content
    assert command_line("fetch", name, "--root", tmp_path / "root").returncode == 0
    done = command_line("check", name, "--root", tmp_path / "root")
    assert done.returncode == 0, done.stderr


def test_versions_of_things_eeg1_are_told_apart():
    """Onsets are in seconds since 1.2.0 and in milliseconds in 1.1.0; what is fetched is 1.2.0, as its size says."""
    part = read_manifest("things_eeg1").parts[0]
    (events,) = [entry for entry in part.files if entry.path.endswith("sub-02_task-rsvp_events.tsv")]
    assert events.bytes == 4_131_177  # 3,837,712 in 1.1.0
    assert "1.2.0, onsets in seconds" in part.what
    assert "v1.2.0" in read_manifest("things_eeg1").source["doi"]
    assert (
        "Version 1.1.0 gives onset in milliseconds"
        in (find_package_data("data_manifests") / "things_eeg1.yaml").read_text()
    )


def test_the_folder_of_a_user_is_below_the_cache_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("BRAINDECODE_VIS_DATA", raising=False)
    monkeypatch.setenv("BRAINDECODE_VIS_CACHE", str(tmp_path))
    assert fetching.find_data_folder("digits69") == tmp_path / "datasets/digits69"
