"""Downloads of published files: resumable, verified, after the licence was accepted.

Owns the transfer of the files that a manifest lists. A file grows under the name ``<file>.part`` and gets its own name
by one rename, after its size and sha256 were compared with the manifest; a broken transfer goes on where it stopped.
Pooch resolves ``doi:`` addresses of Zenodo, figshare and Dataverse; the transfer itself is ours, since pooch starts
again from zero. A server is not trusted: no byte beyond the published size is kept, and a redirection goes to a public
https address or nowhere. Knows no data set.

References
----------
Uieda et al. (2020), doi:10.21105/joss.01943: pooch.
RFC 9110, sections 13.1.5 and 14: range requests and ``If-Range``.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from braindecode_vis.checks import DataError
from braindecode_vis.datasets.manifests import (
    CheckFinding,
    Manifest,
    ManifestFile,
    check_one_file,
    describe_source,
)
from braindecode_vis.store import hash_file, is_disk_full

PART = ".part"
Progress = Callable[[str, int, int | None], None]
_ATTEMPTS = 5  # broken connections that still brought something, before giving up
_BLOCK_BYTES = 1 << 18
# Archives may take long to answer for a large file.
_TIMEOUT_S = 60.0
# For the tests alone, whose server lies on this machine: its address then passes, with http.
ALLOW_LOOPBACK = False
_REFUSED = {
    401: "the server asks for a login: accept the terms on its page, and bring the file yourself",
    403: "the server forbids it: accept the terms on its page, and bring the file yourself",
    404: "it is no longer at this address: look for a newer release at the source",
    410: "it was withdrawn: look for a newer release at the source",
}


class _TransferError(Exception):
    """One file cannot be had; the text says why and what to do."""


def fetch(
    manifest: Manifest, root: Path, *, accept_licence: bool, progress: Progress | None = None
) -> list[CheckFinding]:
    """Download what is missing of a data set.

    A file that is there and right is left alone; one that is there and wrong is replaced after its download was
    verified. A failed file does not stop the others, except for a full disk.

    Parameters
    ----------
    manifest
        What the data set consists of.
    root
        Folder to fill; made if needed.
    accept_licence
        Whether the user has accepted the licence and terms that the manifest names.
    progress
        Called with the file, the bytes it has so far, and its size if known.

    Returns
    -------
    findings
        One per file: there, fetched, or why not and what to do.

    Raises
    ------
    DataError
        If the licence was not accepted, the root cannot be written, or the manifest points outside it.
    """
    if not accept_licence:
        raise DataError(
            f"{describe_terms(manifest)} Read them, and accept them with --accept-licence to fetch {manifest.name}."
        )
    root = root.expanduser()
    for entry in manifest.files:
        if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
            raise DataError(f"the manifest names the file {entry.path}, which would lie outside {root}.")
    if not manifest.files:
        return [
            CheckFinding(manifest.name, False, f"no file is listed for download; {_describe_own(manifest)}")
        ]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{root} cannot be made ({error.strerror}); choose another --root.") from error
    findings: list[CheckFinding] = []
    full = ""
    for entry in manifest.files:
        target = root / entry.path
        if full:
            findings.append(CheckFinding(entry.path, False, f"not fetched, since {full}"))
            continue
        try:
            findings.append(_fetch_one(manifest, entry, root, target, progress))
        except _TransferError as error:
            findings.append(CheckFinding(entry.path, False, str(error)))
        except OSError as error:
            # A full disk fails every further file too; other errors concern this one alone.
            if not is_disk_full(error, root):
                findings.append(CheckFinding(entry.path, False, f"{target} cannot be written ({error})"))
                continue
            full = f"the disk of {root} is full"
            findings.append(
                CheckFinding(entry.path, False, f"{full}; make room and fetch again: it goes on there")
            )
    return findings


def describe_terms(manifest: Manifest) -> str:
    """Return the licence and the gate of a data set as one or two sentences."""
    text = f"{manifest.title} is available under these terms: {manifest.licence.strip().rstrip('.')}."
    return text if manifest.gate is None else f"{text} Gate: {manifest.gate.strip().rstrip('.')}."


def _describe_own(manifest: Manifest) -> str:
    return f"bring it yourself: {describe_source(manifest)}"


def _fetch_one(
    manifest: Manifest, entry: ManifestFile, root: Path, target: Path, progress: Progress | None
) -> CheckFinding:
    if target.exists():
        there = check_one_file(root, manifest, entry)
        if there.ok and entry.bytes is not None and target.stat().st_size != entry.bytes:
            there = CheckFinding(entry.path, False, f"{target} has not the published size")
        if there.ok:
            return CheckFinding(entry.path, True, f"already there: {there.message}")
    if entry.url is None:
        return CheckFinding(
            entry.path, False, f"has no address to download from; {_describe_own(manifest)}, as {target}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    address = resolve_url(entry.url)
    _check_space(entry, part, target)
    _download(address, part, entry, progress)
    _verify(part, entry, address)
    # One rename, so that a file under its own name is whole and verified.
    part.replace(target)
    _forget(part)
    size = target.stat().st_size
    return CheckFinding(
        entry.path, True, f"fetched {size} bytes" + (", sha256 as published" if entry.sha256 else "")
    )


def resolve_url(url: str) -> str:
    """Return the http address of a file; ``doi:10.5281/zenodo.1/file.npy`` is looked up with pooch."""
    if url.startswith("doi:"):
        from pooch.downloaders import doi_to_repository

        doi, _, name = url.removeprefix("doi:").rpartition("/")
        try:
            return str(doi_to_repository(doi).download_url(name))
        except Exception as error:  # whatever the network and the archive answer
            raise _TransferError(
                f"{url} cannot be looked up ({error}); check the network, and fetch again"
            ) from error
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _TransferError(f"{url} is neither an http nor a doi address; bring the file yourself")
    return url


def _check_space(entry: ManifestFile, part: Path, target: Path) -> None:
    if entry.bytes is None:
        return
    needed = entry.bytes - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise _TransferError(
            f"needs {needed} more bytes, but the disk of {target.parent} has {free} free; make room, or choose another "
            "place with --root"
        )


def _download(url: str, part: Path, entry: ManifestFile, progress: Progress | None) -> None:
    """Fill the part file, going on after broken connections as long as each of them brings something."""
    for attempt in range(1, _ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        if entry.bytes is not None and before == entry.bytes:
            return
        # A part that is longer than the file belongs to another version of it.
        if entry.bytes is not None and before > entry.bytes:
            _forget(part)
            before = 0
        try:
            if _receive(url, part, entry, progress):
                return
            reason = "the server stopped early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is longer than the file, or of another version
                _forget(part)
                continue
            what = _REFUSED.get(error.code, "try again later")
            words = " ".join(str(error.reason).split())[:200]
            raise _TransferError(f"{url} answers {error.code} {words}; {what}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.URLError) and is_disk_full(error, part.parent):
                raise
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        after = part.stat().st_size if part.exists() else 0
        if after <= before or attempt == _ATTEMPTS:
            of = "" if entry.bytes is None else f" of {entry.bytes}"
            raise _TransferError(
                f"{url} broke off after {after}{of} bytes ({reason}); check the network and fetch again: it goes on "
                "from there"
            )
    raise _TransferError(f"{url} refuses to send the file from its start; try again later")


def _receive(url: str, part: Path, entry: ManifestFile, progress: Progress | None) -> bool:
    """Receive what one connection gives, and say whether that was all that the server announced."""
    offset = part.stat().st_size if part.exists() else 0
    validator = _stamp_of(part).read_text() if _stamp_of(part).exists() else ""
    # A packed answer would have other offsets than the file.
    headers = {"User-Agent": "braindecode-vis", "Accept-Encoding": "identity"}
    # Without either, it cannot be told whether the rest belongs to the same file.
    if offset and (validator or entry.sha256):
        headers["Range"] = f"bytes={offset}-"
        if validator:
            # If the file was replaced at its source, the server then sends all of the new one.
            headers["If-Range"] = validator
    request = urllib.request.Request(url, headers=headers)
    with _make_opener().open(request, timeout=_TIMEOUT_S) as answer:
        begins = re.match(r"bytes (\d{1,18})-", answer.headers.get("Content-Range", ""))
        # A server may ignore the range, or answer with another one than was asked for.
        resumed = answer.status == 206 and begins is not None and int(begins[1]) == offset
        if not resumed:
            offset = 0
        _stamp_of(part).write_text(_find_validator(answer.headers))
        # Whatever else a server writes there is no length; the published size then says when it is enough.
        announced = re.fullmatch(r"\d{1,18}", (answer.headers.get("Content-Length") or "").strip())
        total = entry.bytes if announced is None else offset + int(announced[0])
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                if entry.bytes is not None and offset + len(block) > entry.bytes:
                    break
                file.write(block)
                offset += len(block)
                if progress is not None:
                    progress(entry.path, offset, total)
    if block:  # an endless answer would fill the disk
        _forget(part)
        raise _TransferError(
            f"{url} sends more than the {entry.bytes} bytes that are published, so it was thrown away; fetch again, "
            "and if it stays so, the file was changed at its source or on the way"
        )
    return total is None or offset >= total


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to a public https address, and nowhere else."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = headers.get("location") or headers.get("uri") or ""
        if target:
            _check_redirection(req.full_url, target)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _make_opener() -> urllib.request.OpenerDirector:
    """Return an opener that knows http and https alone; the usual one opens files of this machine as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _SafeRedirects,
    ):
        opener.add_handler(handler())
    return opener


def _check_redirection(url: str, target: str) -> None:
    refusal = f"{url} sends on to {target[:200]!r}"
    try:
        place = urllib.parse.urlsplit(urllib.parse.urljoin(url, target))
        host = place.hostname or ""
        # What cannot be looked up here is left to a proxy, or fails when it is opened.
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in _look_up(host)]
    except ValueError as error:
        raise _TransferError(f"{refusal}, which is no address; bring the file yourself") from error
    if ALLOW_LOOPBACK and addresses and all(address.is_loopback for address in addresses):
        return
    if place.scheme != "https":
        raise _TransferError(f"{refusal}, which is not https; bring the file yourself")
    if host == "localhost" or not all(address.is_global for address in addresses):
        raise _TransferError(
            f"{refusal}, which lies on this machine or in its own network and cannot be a public archive; bring the "
            "file yourself"
        )


def _look_up(host: str) -> list[Any]:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _find_validator(headers: Any) -> str:
    """Return what identifies this version of the file; weak tags do not promise the same bytes."""
    tag = headers.get("ETag") or ""
    found = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
    # It goes back to the server as a header.
    return str(found) if re.fullmatch(r"[ -~]{1,500}", found) else ""


def _stamp_of(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _stamp_of(part).unlink(missing_ok=True)


def _verify(part: Path, entry: ManifestFile, url: str) -> None:
    """Compare the part with the manifest; a wrong one is removed, so that the next fetch starts anew."""
    size = part.stat().st_size
    wrong = ""
    if entry.bytes is not None and size != entry.bytes:
        wrong = f"has {size} bytes where {entry.bytes} are published"
    elif entry.sha256 is not None and (found := hash_file(part)) != entry.sha256:
        wrong = f"has sha256 {found} where {entry.sha256} is published"
    if wrong:
        _forget(part)
        raise _TransferError(
            f"what {url} sent {wrong}, so it was thrown away; fetch again, and if it stays so, the file was changed at "
            "its source or on the way"
        )
