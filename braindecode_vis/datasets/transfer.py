"""Downloads over http: resumed after an interruption, bounded, verified, and renamed when they are complete.

A file grows under the name ``<file>.part`` and gets its own name by one rename, after its size and checksum were
compared with the published ones. A broken transfer continues where it stopped; pooch and requests leave this to their
caller, and huggingface_hub does it without ``If-Range``. A server is not trusted: no byte beyond the published size is
kept, and a redirection must go to a public https address. Contains nothing about a particular data set or host.

References
----------
RFC 9110, sections 13.1.5 and 14: range requests and ``If-Range``.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braindecode_vis.base.redirects import explain_refusal, is_loopback
from braindecode_vis.base.store import is_disk_full

PART = ".part"
Progress = Callable[[str, int, int | None], None]
_ATTEMPTS = 5  # broken connections that still brought something, before giving up
_BLOCK_BYTES = 1 << 18
# Archives may need a long time to answer for a large file.
_TIMEOUT_S = 60.0
# Waiting time before a busy server is asked again.
_PAUSE_S = 2.0
# Largest list of files; the longest known one has 30,000 entries of 1 kB.
_LIST_BYTES = 1 << 26
# Only for the tests, whose server is on this machine: its http address is then allowed.
ALLOW_LOOPBACK = False
_REFUSED = {
    401: "the server requires a login: accept the terms on its page, and download the file yourself",
    403: "the server forbids it: accept the terms on its page, and download the file yourself",
    404: "it is no longer at this address: look for a newer release at the source",
    410: "it was withdrawn: look for a newer release at the source",
}
_BUSY = (429, 502, 503, 504)
_PACKINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")


class TransferError(Exception):
    """A file or list cannot be downloaded; the text gives the reason and what to do."""

    def __init__(self, message: str, *, refused: bool = False, silent: bool = False) -> None:
        super().__init__(message)
        self.refused = refused  # by a server that answered, so that another address may have it
        self.silent = silent  # nobody answered


class StoppedError(Exception):
    """The transfer was stopped; the received part is kept."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at one or several addresses.

    Parameters
    ----------
    path
        Path below the root.
    urls
        Addresses, tried in their order.
    bytes, checksum
        Published values, if they are known; ``sha256:``, ``md5:`` or ``git:`` and hex digits, all of them or the first
        ones.
    text
        Its content, if no download is needed.
    unpack
        Folder below the root into which this archive is unpacked; None if it is not an archive.
    part
        Name of its part of the data set.
    authorization
        Authorization header for the first server; it is not sent to others.
    """

    path: str
    urls: tuple[str, ...] = ()
    bytes: int | None = None
    checksum: str = ""
    text: str | None = None
    unpack: str | None = None
    part: str = ""
    authorization: str = field(default="", repr=False)


def transfer(
    entry: RemoteFile, target: Path, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> None:
    """Download a file to its place, complete and verified.

    Parameters
    ----------
    entry
        The file; its addresses are tried in their order until a server answers.
    target
        Path of the file; its folder is made.
    progress
        Called with the path of the entry, the bytes it has so far, and its size if known.
    stop
        Event that is checked between blocks.

    Raises
    ------
    TransferError
        If it cannot be downloaded, or is not the published file.
    StoppedError
        If `stop` was set.
    OSError
        If it cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART)
    if entry.text is not None:
        part.write_text(entry.text)
        part.replace(target)
        return
    for n, url in enumerate(entry.urls, start=1):
        try:
            _download(url, part, entry, progress, stop)
            break
        except TransferError as error:
            if not error.refused or n == len(entry.urls):
                raise
    _verify(part, entry, url)
    # One rename, so that a file with its own name is complete and verified.
    part.replace(target)
    _forget(part)


def ask(entry: RemoteFile) -> tuple[bool, str]:
    """Ask an address whether it has a file, without fetching it.

    Returns
    -------
    answers, words
        Whether one of the addresses answers with the published size, and a description of the answer.
    """
    words = "has no address"
    for url in entry.urls:
        words = _ask_one(url, entry)
        if words.startswith("answers"):
            return True, words
    return False, words


def _ask_one(url: str, entry: RemoteFile) -> str:
    for method in ("HEAD", "GET"):
        request = _make_request(url, entry.authorization)
        request.method = method
        if method == "GET":  # some servers know no HEAD; one byte costs nothing
            request.add_header("Range", "bytes=0-0")
        try:
            with _make_opener().open(request, timeout=_TIMEOUT_S) as answer:
                held = re.search(r"/(\d{1,18})$", answer.headers.get("Content-Range", ""))
                length = re.fullmatch(r"\d{1,18}", (answer.headers.get("Content-Length") or "").strip())
                found = held[1] if held else length[0] if length and answer.status == 200 else None
                if other := _describe_other(answer, entry):
                    return other
        except urllib.error.HTTPError as error:
            error.close()
            if method == "HEAD" and error.code not in (404, 410):
                continue
            return f"says {error.code} {' '.join(str(error.reason).split())[:80]}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            return f"does not answer ({_give_reason(error)})"
        except TransferError as error:
            return str(error)
        if found is None:
            return "answers, without a size"
        if entry.bytes is not None and int(found) != entry.bytes:
            return f"has {found} bytes where {entry.bytes} are published"
        return f"answers, {found} bytes" + ("" if entry.bytes is None else " as published")
    return "does not answer"


def check_answers(url: str) -> None:
    """Raise `TransferError` if no server answers; the content of the answer does not matter.

    Use it before a download by a library that would otherwise try for half a minute and print each try.
    """
    _, words = ask(RemoteFile("", (url,)))
    if (
        words.startswith("does not answer") and "SSL" not in words
    ):  # the library may have certificates of its own
        raise TransferError(f"{url} {words}; check the network and fetch again", silent=True)


def read_list(url: str, *, authorization: str = "") -> bytes:
    """Return the list of files that a host sends, up to a maximal size.

    Raises
    ------
    TransferError
        If it does not answer, refuses, or the answer is too long.
    """
    content, attempt = None, 0
    try:
        while content is None:
            try:
                with _make_opener().open(_make_request(url, authorization), timeout=_TIMEOUT_S) as answer:
                    content = bytes(answer.read(_LIST_BYTES + 1))
            except urllib.error.HTTPError as error:
                error.close()
                attempt += 1
                if error.code not in _BUSY or attempt == _ATTEMPTS:
                    raise TransferError(_describe_refusal(url, error), refused=True) from error
                time.sleep(_find_pause(error, attempt))
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise TransferError(
            f"{url} does not answer ({_give_reason(error)}); check the network and fetch again"
        ) from error
    if len(content) > _LIST_BYTES:
        raise TransferError(f"{url} answers with more than {_LIST_BYTES} bytes, which is not a list of files")
    return content


def read_json(url: str) -> Any:
    """Return the JSON in the answer of a host.

    Raises
    ------
    TransferError
        As in `read_list`, and if it is not JSON.
    """
    try:
        return json.loads(read_list(url))
    except (ValueError, RecursionError) as error:
        raise TransferError(f"{url} did not answer with a list of files; try again later") from error


def follow(url: str, target: str) -> str:
    """Return an address from a list, which may be relative to the address of the list.

    Raises
    ------
    TransferError
        If it is not an address, or leads to this machine or its network.
    """
    _check_redirection(url, target)
    return urllib.parse.urljoin(url, target)


def has_checksum(path: Path, checksum: str) -> bool:
    """Return whether a file has the published checksum, of which only the first digits may be known."""
    return hash_as(path, checksum.partition(":")[0]).startswith(checksum.partition(":")[2])


def hash_as(path: Path, algorithm: str) -> str:
    """Return the hex digits of a file by ``sha256``, ``md5``, or ``git``, the blob of git."""
    digest = hashlib.new("sha1" if algorithm == "git" else algorithm, usedforsecurity=False)
    if algorithm == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _make_request(url: str, authorization: str) -> urllib.request.Request:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https") or not url.isascii():
        raise TransferError(f"{url} is not an http address; download the file yourself")
    # A compressed answer would have other offsets than the file.
    request = urllib.request.Request(
        url, headers={"User-Agent": "braindecode-vis", "Accept-Encoding": "identity"}
    )
    if authorization:  # for this server alone, and not for the one that it sends on to
        request.add_unredirected_header("Authorization", authorization)
    return request


def _give_reason(error: Exception) -> str:
    """Return the text of an error of the network as one line: a server may have written some of it."""
    return " ".join(str(getattr(error, "reason", error)).split())[:200] or type(error).__name__


def _describe_other(answer: Any, entry: RemoteFile) -> str:
    """Return a description of an answer that is not a file; empty for one that may be the file."""
    if answer.status not in (200, 206):  # 202 is how some hosts send away what is no browser
        return f"answers {answer.status} and no file"
    packed = (answer.headers.get("Content-Encoding") or "").strip().lower()
    # Some servers send this header for every .gz; if a checksum is known, it decides.
    if packed in _PACKINGS and not entry.checksum and not entry.path.endswith((".gz", ".tgz")):
        return f"sends it packed as {packed}, which was not requested"
    # A login page is an answer like any other; without a published size or checksum, only its type shows it.
    known = entry.checksum or entry.bytes is not None or entry.path.endswith((".html", ".htm"))
    if not known and answer.headers.get_content_type() == "text/html":
        return "answers with a web page and no file"
    return ""


def _find_pause(error: urllib.error.HTTPError, attempt: int) -> float:
    """Return how many seconds to wait for a busy server: the time in its answer, at most a minute."""
    told = re.fullmatch(r"\d{1,3}", (error.headers.get("Retry-After") or "").strip())
    return min(float(told[0]) if told else _PAUSE_S * attempt, 60.0)


def _describe_refusal(url: str, error: urllib.error.HTTPError) -> str:
    what = _REFUSED.get(error.code, "try again later")
    return f"{url} answers {error.code} {' '.join(str(error.reason).split())[:200]}; {what}"


def _download(
    url: str, part: Path, entry: RemoteFile, progress: Progress | None, stop: threading.Event | None
) -> None:
    """Fill the part file; after a broken connection, continue as long as each connection adds some bytes."""
    for attempt in range(1, _ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        if entry.bytes is not None and before == entry.bytes:
            return
        # A part that is longer than the file belongs to another version of it.
        if entry.bytes is not None and before > entry.bytes:
            _forget(part)
            before = 0
        try:
            if _receive(url, part, entry, progress, stop):
                return
            reason = "the server stopped early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is longer than the file, or of another version
                _forget(part)
                continue
            if error.code in _BUSY and attempt < _ATTEMPTS:
                if (stop or threading.Event()).wait(_find_pause(error, attempt)):
                    raise StoppedError from error
                continue
            raise TransferError(_describe_refusal(url, error), refused=True) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, urllib.error.URLError) and is_disk_full(error, part.parent):
                raise
            reason = _give_reason(error)
        after = part.stat().st_size if part.exists() else 0
        if after <= before or attempt == _ATTEMPTS:
            if not after:
                raise TransferError(
                    f"{url} does not answer ({reason}); check the network and fetch again", silent=True
                )
            of = "" if entry.bytes is None else f" of {entry.bytes}"
            raise TransferError(
                f"{url} broke off after {after}{of} bytes ({reason}); check the network and fetch again "
                "to continue from there"
            )
    raise TransferError(f"{url} refuses to send the file from its start; try again later")


def _receive(
    url: str, part: Path, entry: RemoteFile, progress: Progress | None, stop: threading.Event | None
) -> bool:
    """Receive the bytes of one connection, and return whether these were all that the server announced."""
    offset = part.stat().st_size if part.exists() else 0
    validator = _read_validator(part)
    request = _make_request(url, entry.authorization if url == entry.urls[0] else "")
    # Without either, it is unknown whether the rest belongs to the same file.
    if offset and (validator or entry.checksum):
        request.add_header("Range", f"bytes={offset}-")
        if validator:
            # If the file was replaced at its source, the server then sends all of the new one.
            request.add_header("If-Range", validator)
    with _make_opener().open(request, timeout=_TIMEOUT_S) as answer:
        if other := _describe_other(answer, entry):
            raise TransferError(
                f"{url} {other}; open it in a browser, and download the file yourself", refused=True
            )
        begins = re.match(r"bytes (\d{1,18})-", answer.headers.get("Content-Range", ""))
        start = int(begins[1]) if answer.status == 206 and begins else 0
        now = _find_validator(answer.headers)
        # A server may ignore the range and send all, answer with another range, or continue with another version, since
        # not all of them support `If-Range`.
        if start not in (0, offset) or (start and validator and now and now != validator):
            if not offset:
                raise TransferError(f"{url} sent another part of the file than requested; try again later")
            _forget(part)
            return _receive(url, part, entry, progress, stop)
        resumed, offset = start > 0, start
        _stamp_of(part).write_text(now)
        # Any other value there is not a length; the published size then ends the download.
        announced = re.fullmatch(r"\d{1,18}", (answer.headers.get("Content-Length") or "").strip())
        total = entry.bytes if announced is None else offset + int(announced[0])
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                if stop is not None and stop.is_set():
                    raise StoppedError
                if entry.bytes is not None and offset + len(block) > entry.bytes:
                    break
                file.write(block)
                offset += len(block)
                if progress is not None:
                    progress(entry.path, offset, total)
    if block:  # an endless answer would fill the disk
        _forget(part)
        raise TransferError(
            f"{url} sends more than the {entry.bytes} bytes that are published, so it was thrown away; fetch again, "
            "and if it stays so, the file was changed at its source or on the way"
        )
    return total is None or offset >= total


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection only to a public https address."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = headers.get("location") or headers.get("uri") or ""
        if target:
            _check_redirection(req.full_url, target)
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _make_opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https only; the usual one also opens files of this machine."""
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
    refused = explain_refusal(url, target, same_server=False)
    if refused and not (ALLOW_LOOPBACK and is_loopback(url, target)):
        raise TransferError(
            f"{url} sends on to {target[:200]!r}, which is {refused}; download the file yourself"
        )


def _find_validator(headers: Any) -> str:
    """Return what identifies this version of the file; weak tags do not guarantee the same bytes."""
    tag = headers.get("ETag") or ""
    found = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified") or ""
    return found if _is_header(found) else ""


def _read_validator(part: Path) -> str:
    """Return the identifier of the version of a part; empty if it is damaged."""
    try:
        found = _stamp_of(part).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
    return found if _is_header(found) else ""


def _is_header(text: str) -> bool:
    return re.fullmatch(r"[ -~]{1,500}", text) is not None


def _stamp_of(part: Path) -> Path:
    return part.with_name(part.name + ".version")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _stamp_of(part).unlink(missing_ok=True)


def _verify(part: Path, entry: RemoteFile, url: str) -> None:
    """Compare the part with the manifest; a wrong one is removed, so that the next fetch starts from the beginning."""
    size = part.stat().st_size
    wrong = ""
    if entry.bytes is not None and size != entry.bytes:
        wrong = f"has {size} bytes where {entry.bytes} are published"
    elif entry.checksum:
        algorithm, _, digits = entry.checksum.partition(":")
        if not (found := hash_as(part, algorithm)).startswith(digits):
            wrong = f"has the {algorithm} {found} where {digits} is published"
    if wrong:
        _forget(part)
        raise TransferError(
            f"what {url} sent {wrong}, so it was removed; fetch again, and if this happens again, the "
            "file was changed at its source or during the transfer"
        )
