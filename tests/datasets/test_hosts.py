"""Each host's layout, as its documentation or its own code has it, on a server of this machine; no host was reached."""

import hashlib
import json
import re
import urllib.parse

import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets import fetching, hosts, transfer
from braindecode_vis.datasets.hosts import list_files
from braindecode_vis.datasets.manifests import Manifest, ManifestPart, PartFile, read_manifests
from tests.datasets.loopback import serve


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(transfer, "ALLOW_LOOPBACK", True)
    monkeypatch.setattr(transfer, "_PAUSE_S", 0.01)
    with serve() as state:
        for host in hosts.BASES:
            place = "/{place}" if host == "s3" else ""
            monkeypatch.setitem(hosts.BASES, host, f"{state.url}/{host.replace(' ', '-')}{place}")
        hub = f"{state.url}/huggingface"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
        template = hub + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield state


def make_part(host, place, **changes):
    return ManifestPart(
        **{"name": "data", "what": "toys", "host": host, "place": place, "mark": "verified", **changes}
    )


def fetch(part, root, **choices):
    manifest = Manifest(
        name="toy", title="", modality="eeg", subjects=1, stimuli="", summary="", citation="", licence="CC0",
        parts=(part,),
    )  # fmt: skip
    findings = fetching.fetch(fetching.make_plan(manifest, root, **choices))
    assert all(finding.ok for finding in findings), findings
    return sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.name[0] != "." and path.is_file()
    )


def write_bucket(state, base, keys, *, page_size=2):
    """Answer the list call of S3 for a prefix, some keys a page, and serve the objects."""
    prefixes = {key[:n] for key in keys for n in range(len(key) + 1)}
    for prefix in prefixes:
        found = sorted(key for key in keys if key.startswith(prefix))
        token = ""
        for start in range(0, len(found), page_size):
            following = f"t{start}+=" if start + page_size < len(found) else ""
            rows = "".join(
                f"<Contents><Key>{key.replace('&', '&amp;')}</Key><LastModified>2022-12-22T12:40:36.000Z</LastModified>"
                f"<ETag>&quot;x&quot;</ETag><Size>{len(keys[key])}</Size></Contents>"
                for key in found[start : start + page_size]
            )
            more = f"<NextContinuationToken>{following}</NextContinuationToken>" if following else ""
            query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
            state.files[f"{base}?{urllib.parse.urlencode(query)}"] = (
                '<?xml version="1.0" encoding="UTF-8"?>\n'
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>openneuro.org</Name>'
                f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{rows}</ListBucketResult>"
            ).encode()
            token = following
    for key, content in keys.items():
        state.files[f"{base}/{urllib.parse.quote(key)}"] = content


def test_github_at_a_commit(server, tmp_path):
    server.files["/github/owner/repo/0a1b/deep/a%20b.mat"] = b"abc"
    part = make_part("github", "owner/repo@0a1b", files=(PartFile(path="x.mat", at="deep/a b.mat", bytes=3),))
    assert fetch(part, tmp_path) == ["x.mat"]


def test_openneuro_by_names_and_by_the_list_of_its_bucket(server, tmp_path):
    keys = {
        f"ds1/sub-{n}/ses-{s}/func/sub-{n}_run-{r}_bold.nii.gz": f"{n}{s}{r}".encode()
        for n in ("01", "02") for s in (1, 2) for r in (1, 2)
    } | {"ds1/sub-01/ses-1/anat/T1w.nii.gz": b"no", "ds1/sub-01/ses-1/func/": b""}  # fmt: skip
    write_bucket(server, "/openneuro", keys)
    part = make_part(
        "openneuro", "ds1", subjects=("01", "02"), patterns=("sub-{subject}/ses-*/func/*_bold.nii.gz",),
        files=(PartFile(path="sub-01/ses-1/anat/T1w.nii.gz", subject="01"),),
    )  # fmt: skip
    found = fetch(part, tmp_path, subjects=["1"])
    assert len(found) == 5
    assert (tmp_path / "sub-01/ses-2/func/sub-01_run-1_bold.nii.gz").read_bytes() == b"0121"
    # The two files of each of three pages of the one subject that was asked for.
    assert sum("list-type" in path for path, *_ in server.requests) == 3
    assert len(list_files(part)) == 9
    assert {file.bytes for file in list_files(part, ["2"])} == {4}


def test_openneuro_at_a_version_or_the_newest(server, tmp_path):
    """A later snapshot may hold other bytes under the same name; a version that is gone leaves the newest."""
    files = tuple(PartFile(path=f"{name}.tsv", at="?versionId=v1", bytes=3) for name in "ab")
    server.files |= {"/openneuro/ds1/a.tsv?versionId=v1": b"old", "/openneuro/ds1/a.tsv": b"newer"}
    server.files["/openneuro/ds1/b.tsv"] = b"now"
    assert fetch(make_part("openneuro", "ds1", files=files), tmp_path) == ["a.tsv", "b.tsv"]
    assert (tmp_path / "a.tsv").read_bytes() == b"old"
    assert (tmp_path / "b.tsv").read_bytes() == b"now"


@pytest.mark.parametrize(
    "content", [b"<html>busy</html", b"<!DOCTYPE x><ListBucketResult/>", b"<a><Contents/></a>"]
)
def test_a_bucket_that_answers_something_else(server, content):
    server.files["/openneuro?list-type=2&prefix=ds1%2Fa"] = content
    with pytest.raises(transfer.TransferError, match="did not answer with a list"):
        list_files(make_part("openneuro", "ds1", patterns=("a*",)))


def test_a_bucket_of_nsd(server, tmp_path):
    key = "nsddata_betas/ppdata/subj01/func1pt8mm/betas_fithrf/betas_session01.nii.gz"
    write_bucket(server, "/s3/natural-scenes-dataset", {key: b"beta"}, page_size=1000)
    pattern = key.replace("01/func", "{subject}/func").replace("session01", "session*")
    part = make_part("s3", "natural-scenes-dataset", subjects=("01", "02"), patterns=(pattern,))
    write_bucket(server, "/s3/natural-scenes-dataset", {key: b"beta"})
    server.files[
        "/s3/natural-scenes-dataset?list-type=2&prefix="
        + urllib.parse.quote(pattern.format(subject="02").partition("*")[0], safe="")
    ] = b"<ListBucketResult/>"
    assert fetch(part, tmp_path) == [key]


def test_nemar_by_the_manifest_of_a_version(server, tmp_path):
    """Rows as nemarOrg's server writes them; a file in git has the blob as its checksum, one in the annex a sha256."""
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    rows = [
        {"path": "dataset_description.json", "size": 2, "checksum_algorithm": "git", "checksum": blob,
         "bytes_url": f"{server.url}/nemar/nm1/v1.0.0/dataset_description.json", "url": "x"},
        {"path": "stimuli/a.zip", "size": 3, "checksum_algorithm": "SHA256",
         "checksum": hashlib.sha256(b"abc").hexdigest(), "bytes_url": "/nemar/nm1/v1.0.0/stimuli/a.zip"},
        {"path": "other.bdf", "size": 3, "checksum_algorithm": "unknown", "checksum": "?"},
    ]  # fmt: skip
    server.files["/nemar/nm1/v1.0.0/manifest.json"] = json.dumps(rows).encode()
    server.files["/nemar/nm1/v1.0.0/dataset_description.json"] = b"{}"
    server.files["/nemar/nm1/v1.0.0/other.bdf"] = b"bdf"
    # The bytes lie in a bucket, to which the address sends on.
    server.redirects["/nemar/nm1/v1.0.0/stimuli/a.zip"] = "/bucket/key?signed=1"
    server.files["/bucket/key?signed=1"] = b"abc"
    part = make_part("nemar", "nm1/v1.0.0", patterns=("*.json", "stimuli/*", "*.bdf"), drop="stimuli/")
    found = list_files(part)
    assert [file.checksum[:4] for file in found] == ["git:", "sha2", ""]
    assert fetch(part, tmp_path) == ["a.zip", "dataset_description.json", "other.bdf"]


def test_osf_by_ids_folders_and_list(server, tmp_path):
    server.files["/osf/download/nb8wr/"] = b"zip"
    server.files["/osf-files/v1/resources/jum2f/providers/osfstorage/66d0/?zip="] = b"folder"
    part = make_part(
        "osf", "anp5v",
        files=(PartFile(path="a.zip", at="nb8wr"), PartFile(path="b.zip", at="jum2f/66d0/?zip=")),
    )  # fmt: skip
    assert fetch(part, tmp_path / "ids") == ["a.zip", "b.zip"]
    api = "/osf-api/v2/nodes/kqgs8/files/osfstorage/"

    def row(name, **about):
        return {
            "attributes": {"kind": "file", "materialized_path": f"/{name}", "size": 3, **about},
            "links": {"download": f"/dl/{name}"},
            "relationships": {"files": {"links": {"related": {"href": f"{server.url}{api}folder/"}}}},
        }

    hashes = {"hashes": {"sha256": hashlib.sha256(b"fif").hexdigest()}}
    server.files[api] = json.dumps(
        {"data": [row("top", kind="folder")], "links": {"next": f"{api}?page=2"}}
    ).encode()
    server.files[f"{api}?page=2"] = json.dumps({"data": [row("readme")], "links": {"next": None}}).encode()
    listed = {"data": [row("final/subj01_epo.fif", extra=hashes), row("final/subj02_epo.fif")], "links": {}}
    server.files[f"{api}folder/"] = json.dumps(listed).encode()
    server.files["/dl/final/subj01_epo.fif"] = b"fif"
    part = make_part("osf", "kqgs8", subjects=("01", "02"), patterns=("*/subj{subject}_epo.fif",))
    assert fetch(part, tmp_path / "list", subjects=["1"]) == ["final/subj01_epo.fif"]
    assert list_files(part, ["1"])[0].checksum.startswith("sha256:")


def test_figshare_by_numbers_and_by_names(server, tmp_path):
    rows = [
        {
            "id": 7,
            "name": "Subject1.h5",
            "size": 3,
            "computed_md5": hashlib.md5(b"one").hexdigest(),
            "supplied_md5": "",
        },
        {"id": 8, "name": "CSI1_ses-01.nii.gz", "size": 3, "supplied_md5": hashlib.md5(b"ses").hexdigest()},
    ]
    server.files["/figshare-api/v2/articles/99/files?page_size=1000"] = json.dumps(rows).encode()
    server.files |= {"/figshare/files/7": b"one", "/figshare/files/8": b"ses"}
    numbered = make_part("figshare", "plus/99", files=(PartFile(path="S1.h5", at="7", subject="1"),))
    assert list_files(numbered)[0].checksum == rows[0]["computed_md5"].join(["md5:", ""])
    assert fetch(numbered, tmp_path / "a") == ["S1.h5"]
    named = make_part(
        "figshare", "99", subjects=("CSI1", "CSI2"), patterns=("{subject}_ses-*.nii.gz",), into="betas"
    )
    assert fetch(named, tmp_path / "b") == ["betas/CSI1_ses-01.nii.gz"]
    # Without its list, a number is enough; a pattern is not.
    del server.files["/figshare-api/v2/articles/99/files?page_size=1000"]
    assert fetch(numbered, tmp_path / "c") == ["S1.h5"]
    with pytest.raises(
        DataError, match=r"data of toy cannot be listed: .*99/files\?page_size=1000 answers 404"
    ):
        fetch(named, tmp_path / "d")


def test_huggingface_by_its_own_library(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    blob = hashlib.sha1(b"blob 2\0{}").hexdigest()
    tree = [
        {"type": "directory", "oid": "1" * 40, "size": 0, "path": "raw"},
        {"type": "file", "oid": blob, "size": 2, "path": "raw/about.json"},
        {"type": "file", "oid": "2" * 40, "size": 3, "path": "raw/sub-01.edf",
         "lfs": {"oid": hashlib.sha256(b"edf").hexdigest(), "size": 3, "pointerSize": 100}},
    ]  # fmt: skip
    start = "/huggingface/api/datasets/owner/name/tree/main"
    for query in ("?recursive=True&expand=False", "?recursive=true&expand=false"):
        server.files[f"{start}/raw{query}"] = json.dumps(tree).encode()
    server.redirects["/huggingface/datasets/owner/name/resolve/main/raw/sub-01.edf"] = "/cdn/edf"
    server.files["/cdn/edf"] = b"edf"
    server.files["/huggingface/datasets/owner/name/resolve/main/raw/about.json"] = b"{}"
    part = make_part("huggingface", "owner/name@main", patterns=("raw/*",))
    assert fetch(part, tmp_path) == ["raw/about.json", "raw/sub-01.edf"]
    sent = dict(zip([path for path, *_ in server.requests], server.authorizations, strict=True))
    assert sent["/huggingface/datasets/owner/name/resolve/main/raw/sub-01.edf"] == "Bearer secret"
    assert sent["/cdn/edf"] is None
    assert "secret" not in repr(list_files(part))
    server.files.clear()
    server.status = 401
    with pytest.raises(
        DataError, match=r"owner/name answers 401; if it is gated, accept its terms .* hf auth login"
    ):
        fetch(part, tmp_path / "gated")


def test_an_annex_store_by_key_in_either_layout(server, tmp_path):
    """Folders as in a link of ds004212: .git/annex/objects/QG/7v/SHA256E-s275074400--c1e7...npy."""
    known = "SHA256E-s275074400--c1e78175237f2a198a39d97234de03f676f4e5913272788cd3ac55d720fc6304.npy"
    assert hosts._mix(known) == "QG/7v"
    keys = [f"MD5E-s3--{hashlib.md5(content).hexdigest()}.h5" for content in (b"abc", b"def")]
    server.files[f"/store/{hosts._mix(keys[0])}/{keys[0]}/{keys[0]}"] = b"abc"
    lower = hashlib.md5(keys[1].encode()).hexdigest()
    server.files[f"/store/{lower[:3]}/{lower[3:6]}/{keys[1]}/{keys[1]}"] = b"def"
    files = tuple(PartFile(path=f"{n}.h5", at=key) for n, key in enumerate(keys))
    assert fetch(make_part("annex", f"{server.url}/store", files=files), tmp_path) == ["0.h5", "1.h5"]
    assert list_files(make_part("annex", "x", files=files))[0].bytes == 3


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\b", "a\x00b"])
def test_a_list_that_names_a_place_outside_is_refused(server, tmp_path, name):
    rows = [{"path": name, "size": 1, "checksum_algorithm": "", "checksum": ""}]
    server.files["/nemar/nm1/v1/manifest.json"] = json.dumps(rows).encode()
    part = make_part("nemar", "nm1/v1", patterns=("*", "*/*", "*/*/*", "*/*/*/*"))
    with pytest.raises(DataError, match="outside the target folder"):
        fetch(part, tmp_path / "root")


@pytest.mark.parametrize("content", [b"[1]", b"{}", b"busy", b'[{"path": 3}'])
def test_a_list_that_is_none_is_told(server, tmp_path, content):
    server.files["/nemar/nm1/v1/manifest.json"] = content
    with pytest.raises(
        DataError, match=r"data of toy cannot be listed: .*(did not answer with|lists no file)"
    ):
        fetch(make_part("nemar", "nm1/v1", patterns=("*",)), tmp_path)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((), [], "did not answer with a list"),
        (("data", 0, "attributes"), 3, "lists no file"),
        (("data", 0, "attributes", "extra"), 3, ""),
        (("data", 0, "attributes", "extra", "hashes"), "x", ""),
        (("data", 0, "links", "download"), "http://[bad", "not an address"),
        (("data", 0, "links", "download"), "https://169.254.169.254/x", "in its local network"),
        (("data", 0, "links", "download"), 3, "without its address"),
        (("links",), 3, ""),
        (("links", "next"), "file:///etc/hosts", "not https"),
    ],
)
def test_a_host_may_answer_anything(server, keys, value, message):
    """Lists of another form were a traceback, and an address in one was followed into the network of the user."""
    row = {
        "attributes": {"kind": "file", "materialized_path": "/a.zip", "size": 5, "extra": {"hashes": {}}},
        "links": {"download": f"{server.url}/a.zip"},
    }
    page = {"": {"data": [row], "links": {"next": None}}}
    place = page
    for key in ("", *keys)[:-1]:
        place = place[key]
    place[("", *keys)[-1]] = value
    server.files["/osf-api/v2/nodes/abc/files/osfstorage/"] = json.dumps(page[""]).encode()
    part = make_part("osf", "abc", patterns=("*",))
    if message:
        with pytest.raises(transfer.TransferError, match=message):
            list_files(part)
    else:
        assert [file.path for file in list_files(part)] == ["a.zip"]


def test_a_bucket_lists_its_folders_and_is_asked_again_when_busy(server, tmp_path):
    """Empty objects that stand for folders were fetched as files of that name; one 503 in a long list ended it."""
    write_bucket(server, "/s3/nsd", {"a/": b"", "a/b/": b"", "a/x.mat": b"x"})
    server.busy = [503, 429]
    assert fetch(make_part("s3", "nsd", patterns=("a/*", "a/b/*")), tmp_path) == ["a/x.mat"]
    again = b"<L><NextContinuationToken>t</NextContinuationToken></L>"
    for token in ("", "&continuation-token=t"):
        server.files[f"/s3/nsd?list-type=2&prefix=b%2F{token}"] = again
    with pytest.raises(transfer.TransferError, match="the same page again and again"):
        list_files(make_part("s3", "nsd", patterns=("b/*",)))


# --- the manifests themselves ----------------------------------------------------------------------------


def list_parts():
    return [(name, part) for name, manifest in read_manifests().items() for part in manifest.parts]


def test_every_public_data_set_says_how_to_get_it():
    """All 22 manifests of public data sets had no address, and `fetch` fetched nothing."""
    own = {"arrays", "bids_fmri", "bids_meeg", "synthetic_digits"}
    assert {name for name, manifest in read_manifests().items() if not manifest.parts} == own
    for name, part in list_parts():
        assert part.access == "by_hand" or part.files or part.patterns, (name, part.name)
        assert (part.host == "nowhere") == (part.access == "by_hand"), (name, part.name)
        if part.host == "github":  # a branch would move
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", part.place), (name, part.name)
        assert all("{subject}" not in pattern or part.subjects for pattern in part.patterns)


def test_paths_are_inside_and_named_once():
    for name, part in list_parts():
        paths = [entry.path for entry in part.files]
        assert len(set(paths)) == len(paths), (name, part.name)
        for path in paths:
            hosts.check_inside(path)


def test_no_secret_is_shipped_and_terms_are_asked_for():
    """The images of THINGS are behind a password that each user reads on their page; NSD has terms."""
    for name, part in list_parts():
        assert not re.search(r"passw\w*\s*[:=]", f"{part.gate} {part.place}"), (name, part.name)
        if part.place == "natural-scenes-dataset" or part.place.startswith("pscotti/"):
            assert part.access == "terms", (name, part.name)


def test_things_meg_is_four_files_and_a_table_a_subject():
    """The whole data set has 1.15 TB."""
    (part,) = [
        part for part in read_manifests()["things_meg"].parts if part.default and part.access == "open"
    ]
    files = list_files(part, ["1"])
    assert len([file for file in files if "P1-epo" in file.path]) == 4
    assert sum(file.bytes for file in files) < 8.3e9
    assert all(file.checksum for file in files)
    newest = (
        "https://s3.amazonaws.com/openneuro.org/ds004212/derivatives/preprocessed/preprocessed_P1-epo.fif"
    )
    assert files[2].urls == (f"{newest}?versionId=_KO81vnVItjzcxrR91AFeHh8sA7YiuB9", newest)


def test_the_listed_files_are_those_that_the_check_compares():
    """A size or hash in `files` that differs from that in `parts` would be fetched and then called damaged."""
    for name, manifest in read_manifests().items():
        entries = {entry.path: entry for part in manifest.parts for entry in part.files}
        for file in manifest.files:
            entry = entries.get(file.path)
            if entry is not None:
                assert file.bytes in (None, entry.bytes), (name, file.path)
                same = (
                    not file.sha256
                    or not entry.checksum.startswith("sha256")
                    or file.sha256 in entry.checksum
                )
                assert same, (name, file.path)
