"""Rules of each host: from a part of a data set to the addresses, sizes and checksums of its files.

Owns one function per host. A host that publishes a list of its files is asked for it if the manifest has only patterns.
The downloads are in `transfer`.

References
----------
OpenNeuro and NSD: the list call of S3, docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html.
NEMAR: ``manifest.json`` of a version, as nemarOrg's own server writes it. figshare: docs.figshare.com. OSF:
developer.osf.io. git-annex: git-annex.branchable.com/internals/hashing.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.manifests import ManifestPart, PartFile, find_label
from braindecode_vis.datasets.transfer import (
    RemoteFile,
    TransferError,
    check_answers,
    follow,
    read_json,
    read_list,
)

#: Where the hosts are; the tests put stand-ins here.
BASES = {
    "github": "https://raw.githubusercontent.com",
    "openneuro": "https://s3.amazonaws.com/openneuro.org",
    "s3": "https://{place}.s3.amazonaws.com",
    "nemar": "https://data.nemar.org",
    "osf": "https://osf.io",
    "osf files": "https://files.osf.io",
    "osf api": "https://api.osf.io",
    "figshare": "https://ndownloader.figshare.com",
    "figshare api": "https://api.figshare.com",
    "huggingface": "https://huggingface.co",
}


def list_files(part: ManifestPart, subjects: Sequence[str] | None = None) -> list[RemoteFile]:
    """Return the files of a part, asking its host if the manifest does not name them.

    Parameters
    ----------
    part
        Part of a manifest.
    subjects
        Subjects whose files are returned, as users write them (``1`` for ``01``); all by default. Shared files are
        always included.

    Returns
    -------
    list of RemoteFile

    Raises
    ------
    DataError
        If the host's list names a place outside the root.
    TransferError
        If the host does not answer.
    """
    found = list(_HOSTS[part.host](part, pick_subjects(part, subjects)))
    for file in found:
        check_inside(file.path)
    # A requested subject may have no files in this part.
    if part.patterns and not found and (subjects is None or not part.list_subjects()):
        raise TransferError(
            f"{describe_place(part)} lists no file like {part.patterns[0]}; look for a newer release at the source"
        )
    return found


def pick_subjects(part: ManifestPart, subjects: Sequence[str] | None) -> list[str]:
    """Return the requested subjects of a part, with the spelling of its files."""
    there = part.list_subjects()
    wanted = {find_label(subject, there) for subject in subjects} if subjects is not None else set(there)
    return [subject for subject in there if subject in wanted]


def describe_place(part: ManifestPart) -> str:
    """Return the address of a part for a browser."""
    base = BASES.get(part.host, "").format(place=part.place)
    return {
        "https": part.place,
        "github": f"https://github.com/{part.place.replace('@', '/tree/')}",
        "s3": f"s3://{part.place}",
        "openneuro": f"https://openneuro.org/datasets/{part.place}",
        "figshare": f"https://doi.org/10.6084/m9.figshare.{part.place}"
        if not part.place.startswith("plus/")
        else f"https://plus.figshare.com/articles/dataset/_/{part.place.removeprefix('plus/')}",
    }.get(part.host, f"{base}/{part.place}" if base else part.place)


def check_inside(path: str) -> None:
    """Raise `DataError` if a path from outside would be outside its target folder."""
    parts = PurePosixPath(path).parts
    strange = "\\" in path or ":" in path.split("/", 1)[0] or not path.isprintable()
    if not parts or parts[0] == "/" or ".." in parts or strange:
        raise DataError(f"the list of files names {path!r}, which would be outside the target folder.")


# --- files that the manifest names ------------------------------------------------------------------------


def _name(
    part: ManifestPart, subjects: Sequence[str], address: Callable[[PartFile], Sequence[str]]
) -> Iterator[RemoteFile]:
    for entry in part.files:
        if entry.subject and entry.subject not in subjects:
            continue
        yield _make(
            part, entry.path, address(entry) if entry.text is None else (), entry.bytes, entry.checksum,
            subject=entry.subject, text=entry.text,
        )  # fmt: skip


def _make(
    part: ManifestPart, path: str, urls: Iterable[str], size: int | None, checksum: str = "", *, subject: str = "",
    text: str | None = None, authorization: str = "",
) -> RemoteFile:  # fmt: skip
    unpack = part.unpack.format(subject=subject) if part.unpack and path.endswith(_ARCHIVES) else None
    return RemoteFile(path, tuple(urls), size, checksum, text, unpack, part.name, authorization)


_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


def _quote(path: str) -> str:
    return urllib.parse.quote(path, safe="/")


# --- files that the host lists ----------------------------------------------------------------------------


def _match(
    part: ManifestPart, subjects: Sequence[str], paths: Iterable[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield path at the host, place below the root and subject of each path that a pattern of the part names."""
    for pattern, subject in _fill(part, subjects):
        # ``*`` does not match a slash, as in a shell.
        form = re.compile(
            "".join("[^/]*" if piece == "*" else re.escape(piece) for piece in re.split(r"(\*)", pattern))
        )
        for path in paths:
            # Some buckets list their folders as empty objects.
            if form.fullmatch(path) and path and not path.endswith("/"):
                local = path.removeprefix(part.drop.format(subject=subject))
                yield (
                    path,
                    f"{part.into.format(subject=subject)}/{local}".lstrip("/") if part.into else local,
                    subject,
                )


def _fill(part: ManifestPart, subjects: Sequence[str]) -> Iterator[tuple[str, str]]:
    for pattern in part.patterns:
        if "{subject}" in pattern:
            yield from ((pattern.format(subject=subject), subject) for subject in subjects)
        else:
            yield pattern, ""


def _list_bucket(
    part: ManifestPart, subjects: Sequence[str], base: str, folder: str = ""
) -> Iterator[RemoteFile]:
    """List the keys that begin like each pattern, a thousand keys per call."""
    seen: set[str] = set()
    for start in dict.fromkeys(pattern.partition("*")[0] for pattern, _ in _fill(part, subjects)):
        sizes: dict[str, int] = {}
        token = ""
        while True:
            query = {"list-type": "2", "prefix": folder + start}
            query |= {"continuation-token": token} if token else {}
            url = f"{base}?{urllib.parse.urlencode(query)}"
            content = read_list(url)
            try:
                if b"<!DOCTYPE" in content:
                    raise ValueError("a document type")
                tree = ElementTree.fromstring(content)
                for node in tree.iter():
                    node.tag = node.tag.rpartition("}")[2]
                for node in tree.iter("Contents"):
                    sizes[node.findtext("Key", "").removeprefix(folder)] = int(node.findtext("Size", ""))
            except (ElementTree.ParseError, ValueError) as error:
                raise TransferError(f"{url} did not answer with a list of files; try again later") from error
            before, token = token, tree.findtext("NextContinuationToken", "")
            if not token:
                break
            if token == before:
                raise TransferError(f"{url} answers the same page again and again; try again later")
        for key, path, subject in _match(part, subjects, sizes):
            if key not in seen:
                seen.add(key)
                yield _make(part, path, [f"{base}/{_quote(folder + key)}"], sizes[key], subject=subject)


# --- one function per host ----------------------------------------------------------------------------------


def _list_https(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files with a full address, or with the place followed by `at`."""
    return _name(part, subjects, lambda entry: [part.place + (entry.at or _quote(entry.path))])


def _list_github(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files of ``owner/repository@commit``."""
    repository, _, commit = part.place.partition("@")
    start = f"{BASES['github']}/{repository}/{commit}"
    return _name(part, subjects, lambda entry: [f"{start}/{_quote(entry.at or entry.path)}"])


def _list_openneuro(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files of a data set such as ``ds004212``, of the newest snapshot if `at` has no ``?versionId=``."""
    base, folder = BASES["openneuro"], f"{part.place}/"

    def address(entry: PartFile) -> list[str]:
        newest = f"{base}/{folder}{_quote(entry.path)}"
        return [newest + entry.at, newest] if entry.at else [newest]

    yield from _name(part, subjects, address)
    yield from _list_bucket(part, subjects, base, folder)


def _list_s3(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files of a public bucket."""
    base = BASES["s3"].format(place=part.place)
    yield from _name(part, subjects, lambda entry: [f"{base}/{_quote(entry.at or entry.path)}"])
    yield from _list_bucket(part, subjects, base)


def _list_nemar(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files of ``nm000232/v1.0.1`` by its manifest, which also has the place of each file."""
    version = f"{BASES['nemar']}/{part.place}/"
    url = f"{version}manifest.json"
    listed = {str(row.get("path")): row for row in _read_rows(url, read_json(url))}
    for at, path, subject in _match(part, subjects, listed):
        row = listed[at]
        checksum = f"{row.get('checksum_algorithm')}:{row.get('checksum')}".lower()
        known = checksum if re.fullmatch(r"(sha256|md5|git):[0-9a-f]{32,64}", checksum) else ""
        place = follow(url, str(row.get("bytes_url") or version + _quote(at)))
        yield _make(part, path, [place], _read_size(row), known, subject=subject)


def _list_osf(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files by their id or by ``node/id`` (``node/id/?zip=`` for a folder), or those that match patterns."""
    yield from _name(part, subjects, _address_osf)
    if not part.patterns:
        return
    found: dict[str, dict[str, Any]] = {}
    waiting = [f"{BASES['osf api']}/v2/nodes/{part.place}/files/osfstorage/"]
    asked: set[str] = set()
    while waiting:
        url = waiting.pop()
        if url in asked:
            continue
        asked.add(url)
        page = read_json(url)
        for row in _read_rows(url, _get(page, "data")):
            if _get(row, "attributes", "kind") == "folder":
                waiting.append(_follow(url, row, "relationships", "files", "links", "related", "href"))
            else:
                found[str(_get(row, "attributes", "materialized_path") or "").lstrip("/")] = {
                    **row,
                    "page": url,
                }
        if following := _get(page, "links", "next"):
            waiting.append(follow(url, str(following)))
    for at, path, subject in _match(part, subjects, found):
        row = found[at]
        digits = str(_get(row, "attributes", "extra", "hashes", "sha256"))
        known = f"sha256:{digits}" if re.fullmatch(r"[0-9a-f]{64}", digits) else ""
        yield _make(
            part,
            path,
            [_follow(row["page"], row, "links", "download")],
            _read_size({"size": _get(row, "attributes", "size")}),
            known,
            subject=subject,
        )


def _address_osf(entry: PartFile) -> list[str]:
    node, _, rest = entry.at.partition("/")
    if not rest:
        return [f"{BASES['osf']}/download/{node}/"]
    return [f"{BASES['osf files']}/v1/resources/{node}/providers/osfstorage/{rest}"]


def _list_figshare(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files of an article: by their number, or by a pattern of their names; its list has size and md5."""
    article = part.place.removeprefix("plus/")
    listed: dict[str, dict[str, Any]] = {}
    # Files with all facts in the manifest: the host is not asked.
    if part.patterns or any(entry.bytes is None or not entry.checksum for entry in part.files):
        try:
            url = f"{BASES['figshare api']}/v2/articles/{article}/files?page_size=1000"
            listed = {str(row.get("name")): row for row in _read_rows(url, read_json(url))}
        except TransferError:
            if part.patterns:
                raise
    numbered = {str(row.get("id")): row for row in listed.values()}
    for file in _name(part, subjects, lambda entry: [f"{BASES['figshare']}/files/{entry.at}"]):
        row = numbered.get(file.urls[0].rpartition("/")[2], {})
        yield _make(
            part, file.path, file.urls, file.bytes or _read_size(row), file.checksum or _read_md5(row),
            subject=next(entry.subject for entry in part.files if entry.path == file.path),
        )  # fmt: skip
    for at, path, subject in _match(part, subjects, listed):
        row = listed[at]
        if not isinstance(row.get("id"), int):
            raise TransferError(
                f"the list of the article {article} names {at} without its number; try again later"
            )
        url = f"{BASES['figshare']}/files/{row['id']}"
        yield _make(part, path, [url], _read_size(row), _read_md5(row), subject=subject)


def _list_huggingface(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files of a data set ``owner/name@revision`` of the Hugging Face hub."""
    from huggingface_hub import HfApi, constants, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = part.place.partition("@")
    base, revision = constants.ENDPOINT, revision or "main"  # $HF_ENDPOINT, where that is set
    listed: dict[str, Any] = {}
    check_answers(base)
    for start in dict.fromkeys(
        pattern.partition("*")[0].rpartition("/")[0] for pattern, _ in _fill(part, subjects)
    ):
        try:
            for row in HfApi(endpoint=base).list_repo_tree(
                repository, start or None, repo_type="dataset", revision=revision, recursive=True
            ):
                if hasattr(row, "size"):
                    listed[row.path] = row
        except HfHubHTTPError as error:
            code = getattr(error.response, "status_code", "an error")
            raise TransferError(
                f"{base}/datasets/{repository} answers {code}; if it is gated, accept its terms on that page and log "
                "in with: hf auth login",
                refused=True,
            ) from error
        except Exception as error:  # of the network, in the words of whichever library carries it
            raise TransferError(
                f"{base}/datasets/{repository} does not answer ({type(error).__name__}); check the network and fetch "
                "again"
            ) from error
    token = get_token()
    for at, path, subject in _match(part, subjects, listed):
        row = listed[at]
        checksum = f"sha256:{row.lfs.sha256}" if row.lfs else f"git:{row.blob_id}"
        url = hf_hub_url(repository, at, repo_type="dataset", revision=revision, endpoint=base)
        yield _make(
            part,
            path,
            [url],
            row.size,
            checksum,
            subject=subject,
            authorization=f"Bearer {token}" if token else "",
        )


def _list_annex(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return files by their git-annex key, from a store that is open over https; the key has size and checksum."""
    for file in _name(part, subjects, lambda entry: [entry.at]):
        (key,) = file.urls
        known = re.match(r"(SHA256|MD5)E?-s(\d+)--([0-9a-f]+)", key)
        # Two layouts of stores are in use, and only a request shows which one a store has.
        urls = [f"{part.place}/{folder}/{key}/{key}" for folder in (_mix(key), _mix_lower(key))]
        yield _make(
            part, file.path, urls, int(known[2]) if known else file.bytes,
            f"{known[1].lower()}:{known[3]}" if known else file.checksum,
        )  # fmt: skip


def _mix(key: str) -> str:
    """Return the folders in which git-annex stores a key, as in ``QG/7v``."""
    letters = "0123456789zqjxkmvwgpfZQJXKMVWGPF"
    number = int.from_bytes(hashlib.md5(key.encode(), usedforsecurity=False).digest()[:4], "little")
    a, b, c, d = (letters[number >> 6 * n & 31] for n in range(4))
    return f"{b}{a}/{d}{c}"


def _mix_lower(key: str) -> str:
    """Return the folders in which a bare repository stores a key, as in ``5ab/f01``."""
    digits = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
    return f"{digits[:3]}/{digits[3:6]}"


def _read_rows(url: str, rows: Any) -> list[dict[str, Any]]:
    """Return a list of mappings, the form of every host's list."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TransferError(f"{url} did not answer with a list of files; try again later")
    return rows


def _read_size(row: dict[str, Any]) -> int | None:
    size = row.get("size")
    return size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None


def _read_md5(row: dict[str, Any]) -> str:
    digits = str(row.get("computed_md5") or row.get("supplied_md5") or "")
    return f"md5:{digits}" if re.fullmatch(r"[0-9a-f]{32}", digits) else ""


def _follow(url: str, row: dict[str, Any], *keys: str) -> str:
    found = _get(row, *keys)
    if not isinstance(found, str):
        raise TransferError(f"{url} lists a file without its address; try again later")
    return follow(url, found)


def _get(found: Any, *keys: str) -> Any:
    """Return the value below some keys of an answer, None if there is none: an answer may have any form."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _list_nowhere(part: ManifestPart, subjects: Sequence[str]) -> Iterator[RemoteFile]:
    """Return nothing: the user downloads the part by hand."""
    return iter(())


_HOSTS: dict[str, Callable[[ManifestPart, Sequence[str]], Iterator[RemoteFile]]] = {
    "https": _list_https,
    "github": _list_github,
    "openneuro": _list_openneuro,
    "s3": _list_s3,
    "nemar": _list_nemar,
    "osf": _list_osf,
    "figshare": _list_figshare,
    "huggingface": _list_huggingface,
    "annex": _list_annex,
    "nowhere": _list_nowhere,
}
