"""Files on a server (``s3://``, ``https://``) as paths, downloaded into a cache of limited size when they are opened.

A `RemotePath` is a `pathlib.Path` whose parts are the address. Names and sizes come from listings, each made once per
process. Opening it opens a file of the cache, which is downloaded first unless the cache has the present version of the
server. Readers therefore need not know where a data set is stored. A library that uses the path as text finds no such
file on this machine, so that it fails and reads nothing wrong: for such readers there is `bring`.

The cache mirrors the addresses: ``files`` has the bytes and ``versions`` their versions on the server (ETag, or time,
and size). Several processes share it. A file is downloaded into ``parts`` and gets its name by one rename; a lock on
each used file prevents its removal by other processes. Only an address that the user gave in the call becomes a
`RemotePath` (`braindecode_vis.base.consent`): an address in a file remains an ordinary path, which `refuse_address`
refuses.

fsspec's caches of whole files have no bound, do not resume, and serve a file that a kill cut off; its cache of blocks
does not see that a file changed on a web server while it is read. Paths of universal_pathlib are no `pathlib.Path`.

References
----------
``fsspec`` and ``s3fs`` (filesystem-spec.readthedocs.io, s3fs.readthedocs.io) connect to the servers. ETag: RFC 9110,
section 8.8.3; that of an S3 object sent in one piece is its md5.
"""

from __future__ import annotations

import errno
import fnmatch
import gc
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

import xxhash

from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError, require
from braindecode_vis.base.consent import ConsentError, may_download
from braindecode_vis.base.locks import find_cache_folder, lock_file
from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.base.redirects import explain_refusal

SCHEMES = ("s3", "https", "http")
#: Defaults of the settings `remote`; a folder of many users' projects has room for more.
LIMIT_GIB = 50.0
#: From these sizes on, readers of HDF5 take the ranges that they need, and who wants the head of a file gets no more.
RANGES_BYTES, HEADS_BYTES = 64 << 20, 4 << 20
#: Who reads further than this into a file that was opened for its head is given all of it.
_HEAD_BYTES = 16 << 20
#: Small reads of ranges are served from blocks; larger ones go to the server as they are.
_BLOCK_BYTES, _N_BLOCKS = 1 << 20, 64
_WINDOW_BYTES, _WINDOWS = 8 << 20, 4  # pieces of one object that are asked for at once
_AT_ONCE = 16  # small files that are asked for at once
_ATTEMPTS = 3
_TIMEOUTS_S = (10, 60)  # to connect, and between two packets
_S3_CONFIG = {
    "connect_timeout": _TIMEOUTS_S[0], "read_timeout": _TIMEOUTS_S[1], "retries": {"max_attempts": 2},
}  # fmt: skip
_KEPT = 0.9  # share of the limit that is left when room is made, so that it is not made for every file
#: Files that this process opened last, and the part of the limit that they may have.
_HELD, _HELD_SHARE = 256, 8
_MANY_FOLDERS = 16  # siblings that were listed one by one, after which one listing brings all below
_TOUCH_S = 60.0
_WAIT_S = 20.0  # for others to release files where no room can be made
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_address(path: Path | str) -> bool:
    """Say whether a path or text is the address of something on a server.

    Examples
    --------
    >>> is_address("s3://openneuro.org/ds003825"), is_address("https:/host/folder"), is_address("/data/things")
    (True, True, False)
    """
    return re.match(rf"({'|'.join(SCHEMES)}):/", str(path)) is not None


def as_path(path: Path | str) -> Path:
    """Return the path that the user gave in this call: a `RemotePath` for an address, otherwise an absolute path."""
    return take_address(path) if is_address(path) else Path(path).expanduser().absolute()


_TAKEN: set[str] = set()  # addresses that the person has named in this process, or allowed to be read


def take_address(path: Path | str) -> RemotePath:
    """Return an address that the user gave or allowed as a path; runs that name it may then read it too.

    Raises
    ------
    ConfigError
        If it holds a password or the like.
    """
    _refuse_secrets(path)
    _TAKEN.add(name_address(path))
    return RemotePath(path)


def _refuse_secrets(path: Path | str) -> None:
    """Raise `ConfigError`, which does not repeat them, for an address with a password or a signature in it.

    Addresses are written into run folders, records, logs and names of the cache.
    """
    scheme, _, rest = name_address(path).partition("://")
    if "@" in rest.partition("/")[0]:
        where = "the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID)" if scheme == "s3" else "~/.netrc"
        raise ConfigError(
            f"an address of {scheme} holds a name or password before its @, which would be written into run folders "
            f"and logs; leave them out of the address, and keep them in {where}."
        )
    if scheme != "s3" and "?" in rest:
        raise ConfigError(
            f"the address {scheme}://{rest.partition('?')[0]} goes on with '?' and a query, which is not "
            "a folder and may hold a signature that would be written into run folders and logs; fetch "
            "the data set first, or give an address without a query."
        )


def revive(text: str) -> Path:
    """Return a path that an artifact of a run holds; an address is read only if the user gave it in this process."""
    if not is_address(text):
        return Path(text)
    place = name_address(text)
    if may_download() or any(place == taken or place.startswith(f"{taken.rstrip('/')}/") for taken in _TAKEN):
        return RemotePath(text)
    return Path(text)


def refuse_address(path: Path | None, key: str) -> None:
    """Raise `ConsentError` if a path is an address that only a file names."""
    if path is not None and is_address(path) and not isinstance(path, RemotePath):
        _refuse_secrets(path)
        place = name_address(path)
        named = f", or name it yourself with --set {key}={place}" if "." in key else ""
        raise ConsentError(
            f"{key} is {place}, which a file asks to read over the network; to allow this, pass --allow-download"
            f"{named}."
        )


def refuse_address_to_write(path: Path) -> None:
    """Raise `ConfigError` for an address where results are to be written."""
    if is_address(path):
        raise ConfigError(
            "--out is an address of a server, which cannot be written; give a folder of this machine."
        )


def name_address(path: Path | str) -> str:
    """Return an address with both slashes, of which a path keeps only one."""
    scheme, _, rest = str(path).partition(":")
    return f"{scheme}://{rest.lstrip('/')}"


# --- what a server has ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A name in a listing: a folder, or a file with its size in bytes, time in s and ETag, if the server gives them."""

    is_folder: bool
    size: int | None = None
    mtime: float = 0.0
    etag: str = ""

    def describe_version(self) -> str:
        """Return the version of the file: its ETag, or without one its time, and its size."""
        told = f"etag {self.etag}" if self.etag else f"time {self.mtime:.0f}"
        return f"{told}, {self.size} bytes"


_FOLDER = Entry(True)
Result = TypeVar("Result")


class _Server:
    """A bucket, or a web server: its listings, and how bytes are requested."""

    def __init__(self, scheme: str, place: str) -> None:
        self.scheme, self.place, self.address = scheme, place, f"{scheme}://{place}"
        self.listings: dict[tuple[str, ...], dict[str, Entry] | None] = {}
        self.listed_below: dict[tuple[str, ...], int] = {}
        self.lock = threading.RLock()
        self.alone: dict[tuple[str, ...], Entry | None] = {}  # what was asked for, with nothing listed above
        # One connection for all buckets. A fork has none of the threads that speak with the server.
        known = (os.getpid(), scheme)
        if known not in _CONNECTIONS:
            _CONNECTIONS[known] = _open_s3() if scheme == "s3" else _open_http(self.address)
        self.fs, self.how = _CONNECTIONS[known]
        endpoint = (
            str(getattr(self.fs, "endpoint_url", None) or _find_endpoint() or "") if scheme == "s3" else ""
        )
        # Two servers may each have a bucket of this name.
        own = f"@{xxhash.xxh3_64_hexdigest(endpoint.encode())}" if endpoint else ""
        self.folder_name = re.sub(r"[^\w.-]", "_", place) + own

    def name(self, key: Sequence[str], *, folder: bool = False) -> str:
        """Return the library's name of a file or folder."""
        if self.scheme == "s3":
            return "/".join([self.place, *key])
        quoted = "/".join(urllib.parse.quote(part) for part in key)
        return f"{self.address}/{quoted}" + ("/" if folder and quoted else "")

    def ask(self, what: str, call: Callable[[], Result]) -> Result:
        """Return the result of a call; a failure of the server becomes one sentence.

        Raises
        ------
        FileNotFoundError
            If the server has no such file.
        DataError
            For everything else.
        """
        attempts = 1 if self.scheme == "s3" else _ATTEMPTS  # that library tries again by itself
        for attempt in range(1, attempts + 1):
            try:
                return _name_cause(call)
            except FileNotFoundError as error:
                if _classify(error)[0] == "bucket":
                    raise DataError(f"{what} {self._describe('bucket', '')}.") from error
                raise
            except BraindecodeVisError:
                raise
            except Exception as error:
                kind, text = _classify(error)
                if kind == "full":
                    raise
                if kind == "busy" and attempt < attempts:
                    time.sleep(0.3 * attempt)
                    continue
                raise DataError(f"{what} {self._describe(kind, text)}.") from error
        raise AssertionError

    def open_reader(self) -> Callable[[str, int, int], bytes]:
        """Return a function that requests bytes ``(name, start, stop)`` of a file, in the calling thread.

        HDF5 requests bytes while it holds the lock of h5py. Threads of fsspec may wait for this lock when they delete
        an object of h5py, and then HDF5 would wait for them forever.
        """
        known = (os.getpid(), self.scheme)
        if known not in _READERS:
            _READERS[known] = _open_s3_reader(self.fs) if self.scheme == "s3" else _open_http_reader()
        return _READERS[known]

    def _describe(self, kind: str, text: str) -> str:
        if kind == "denied":
            return (
                f"may not be read: the server denies access to {self.how} ({text}); get access, or set "
                "the credentials "
                "in the usual way (AWS_PROFILE, AWS_ACCESS_KEY_ID)"
                if self.scheme == "s3"
                else f"may not be read: the server denies access ({text}); get access, or fetch the data set first"
            )
        if kind == "bucket":
            return f"cannot be read, since there is no bucket called {self.place}; correct the address"
        return f"cannot be read ({text}): the server does not answer; check the network and run the same command again"

    def find_listing(self, key: tuple[str, ...]) -> dict[str, Entry] | None:
        """Return the content of a folder by name, or None if there is no such folder; requested once per process."""
        with self.lock:
            if key in self.listings:
                return self.listings[key]
            parent = self.listings.get(key[:-1]) if key else None
            if parent is not None and not parent.get(key[-1], Entry(False)).is_folder:
                return None
            if key and self._has_many(key[:-1]):
                self._list_below(key[:-1])
            if key not in self.listings:
                self.listings[key] = self._ask_list(key)
            return self.listings[key]

    def _has_many(self, parent: tuple[str, ...]) -> bool:
        """Say whether so many subfolders were listed that one request for all of them is better."""
        self.listed_below[parent] = self.listed_below.get(parent, 0) + 1
        listing = self.listings.get(parent) or {}
        n_folders = sum(entry.is_folder for entry in listing.values())
        return self.scheme == "s3" and self.listed_below[parent] > _MANY_FOLDERS < n_folders

    def _ask_list(self, key: tuple[str, ...]) -> dict[str, Entry] | None:
        name, what = self.name(key, folder=True), "/".join([self.address, *key])
        try:
            rows = self.ask(what, lambda: self.fs.ls(name, detail=True))
        except FileNotFoundError:
            if not key:
                raise DataError(
                    f"{what} {self._describe('bucket', '') if self.scheme == 's3' else 'lists no files'}."
                ) from None
            return None
        found: dict[str, Entry] = {}
        for row in rows:
            path = self._split(str(row["name"]))
            if path[:-1] == list(key) and _is_name(path[-1]):
                found[path[-1]] = self._read_row(row)
        # A bucket has no empty folders, but a file is listed as itself.
        return found or ({} if not key or self.scheme != "s3" else None)

    def _list_below(self, key: tuple[str, ...]) -> None:
        """List everything below a folder by a few large requests instead of thousands for single folders."""
        what = "/".join([self.address, *key])
        rows = self.ask(what, lambda: self.fs.find(self.name(key), detail=True))
        for row in rows.values():
            *folder, name = self._split(str(row["name"]))
            if folder[: len(key)] != list(key) or not all(map(_is_name, [*folder, name])):
                continue
            for depth in range(len(key), len(folder)):
                self._put(tuple(folder[:depth]), folder[depth], _FOLDER)
            self._put(tuple(folder), name, self._read_row(row))

    def _put(self, key: tuple[str, ...], name: str, entry: Entry) -> None:
        listing = self.listings.setdefault(key, {})
        if listing is not None:
            listing.setdefault(name, entry)

    def _split(self, name: str) -> list[str]:
        if self.scheme == "s3":
            return name.rstrip("/").removeprefix(f"{self.place}/").split("/")
        # An address may be given with http where the server says https.
        bare = re.sub(r"^https?://[^/]*/?", "", name).rstrip("/")
        return (
            ["?"] if re.search(r"[?#;]", bare) else [urllib.parse.unquote(part) for part in bare.split("/")]
        )

    @staticmethod
    def _read_row(row: dict[str, Any]) -> Entry:
        if row["type"] == "directory":
            return _FOLDER
        told: Any = row.get("LastModified")
        mtime = told.timestamp() if hasattr(told, "timestamp") else 0.0
        return Entry(False, row["size"], mtime, str(row.get("ETag") or "").strip('"'))

    def look(self, key: tuple[str, ...]) -> Entry | None:
        """Return the entry of an address, or None if there is none."""
        if not key or self.listings.get(key) is not None:
            return None if self.find_listing(key) is None else _FOLDER
        if any(key[:depth] in self.listings for depth in range(len(key))):
            return (self.find_listing(key[:-1]) or {}).get(key[-1])
        # Nobody may list what lies above the root of a data set: it is a folder if it lists something.
        if self.find_listing(key) is not None:
            return _FOLDER
        with self.lock:
            if key not in self.alone:
                self.alone[key] = self._ask_info(key)
            return self.alone[key]

    def _ask_info(self, key: tuple[str, ...]) -> Entry | None:
        try:
            told = self.ask("/".join([self.address, *key]), lambda: self.fs.info(self.name(key)))
        except FileNotFoundError:
            return None
        if self.scheme == "s3":
            return self._read_row(told)
        mtime = 0.0
        with suppress(ValueError, TypeError, OverflowError):
            mtime = (
                parsedate_to_datetime(told["Last-Modified"]).timestamp() if "Last-Modified" in told else 0.0
            )
        size = told.get("size")
        return Entry(False, None if size is None else int(size), mtime, str(told.get("ETag") or ""))

    def complete(self, key: tuple[str, ...], *, anew: bool = False) -> Entry | None:
        """Return a file with its size and version; they are requested if the listing of the server has none."""
        entry = self.look(key)
        if entry is None or entry.is_folder or not (anew or entry.size is None):
            return entry
        found = self._ask_info(key)
        if not anew:
            with self.lock:
                listing = self.listings.get(key[:-1])
                if listing is not None and found is not None:
                    listing[key[-1]] = found
        return found


def _name_cause(call: Callable[[], Result]) -> Result:
    """Return the result of a call; a busy or denying web server does not count as one without the file."""
    try:
        return call()
    except FileNotFoundError as error:
        # Which fsspec makes of everything that goes wrong when it asks for a size.
        cause = error.__cause__
        if isinstance(cause, BraindecodeVisError):
            raise cause from None
        of_web = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
        if cause is not None and of_web and getattr(cause, "status", None) not in (404, 410):
            raise cause from None
        raise


def _is_name(name: str) -> bool:
    """Say whether a server's name of a file is safe inside a local folder."""
    return name not in ("", ".", "..", "?") and "/" not in name and "\\" not in name and "\0" not in name


def _classify(error: BaseException) -> tuple[str, str]:
    """Return what kind of failure it is (denied, bucket, full, busy) and its text in one line."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    status, chain = getattr(error, "status", None), [error, error.__cause__]
    codes = {str(getattr(each, "response", {}).get("Error", {}).get("Code", "")) for each in chain if each
             and isinstance(getattr(each, "response", None), dict)}  # fmt: skip
    if "NoSuchBucket" in codes or "NoSuchBucket" in text or "bucket does not exist" in text:
        return "bucket", text
    if isinstance(error, PermissionError) or status in (401, 403):
        return "denied", text
    if isinstance(error, OSError) and error.errno in _FULL:
        return "full", text
    return "busy", text


def _open_s3() -> tuple[Any, str]:
    s3fs = require("s3fs", "an address s3://...")
    signs = any(
        os.environ.get(name)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
                     "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    )  # fmt: skip
    own = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws/credentials")
    signs = signs or own.is_file()
    # Without credentials the library would ask a server of Amazon's for some, which only their machines have.
    fs = s3fs.S3FileSystem(
        anon=not signs, skip_instance_cache=True, use_listings_cache=False, default_cache_type="none",
        config_kwargs=_S3_CONFIG,
    )  # fmt: skip
    fs.retries = 2
    return fs, "the credentials that are set" if signs else "anonymous readers"


def _find_endpoint() -> str | None:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _open_http(address: str) -> tuple[Any, str]:
    aiohttp = require("aiohttp", f"the address {address}")
    http = require("fsspec", f"the address {address}") and require("fsspec.implementations.http", "")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUTS_S[0], sock_read=_TIMEOUTS_S[1])
    fs = http.HTTPFileSystem(
        skip_instance_cache=True, use_listings_cache=False, encoded=True, simple_links=False,
        client_kwargs={"timeout": timeout, "trust_env": True, "trace_configs": [_check_redirections(aiohttp)]},
    )  # fmt: skip
    return fs, "everybody"


def _check_redirections(aiohttp: Any) -> Any:
    """Return what makes a session of aiohttp refuse redirections to private places."""

    async def check(session: Any, context: Any, asked: Any) -> None:
        _check_redirection(str(asked.url), asked.response.headers.get("Location", ""))

    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(check)
    return tracing


def _check_redirection(url: str, target: str) -> None:
    if refused := explain_refusal(url, target, same_server=True):
        raise DataError(
            f"{url} sends on to {target[:200]!r}, which is {refused}; if you trust that address, give it yourself."
        )


def _open_s3_reader(fs: Any) -> Callable[[str, int, int], bytes]:
    """Return a function that requests bytes ``(name, start, stop)`` from S3, with credentials and endpoint of `fs`."""
    session = require("botocore.session", "an address s3://...").get_session()
    config, unsigned = require("botocore.config", "").Config, require("botocore", "").UNSIGNED
    client = session.create_client(
        "s3",
        aws_access_key_id=fs.key, aws_secret_access_key=fs.secret, aws_session_token=fs.token,
        endpoint_url=_find_endpoint(),
        config=config(signature_version=unsigned if fs.anon else None, **_S3_CONFIG),
    )  # fmt: skip
    translate = require("s3fs.errors", "").translate_boto_error

    def read(name: str, start: int, stop: int) -> bytes:
        bucket, _, key = name.partition("/")
        try:
            answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        except Exception as error:
            if "InvalidRange" in str(error):  # the object has become shorter
                return b""
            raise translate(error) from error
        with answer["Body"] as body:
            data: bytes = body.read()
        return data

    return read


def _open_http_reader() -> Callable[[str, int, int], bytes]:
    """Return a function that requests bytes ``(name, start, stop)`` by HTTP, with proxies and ``~/.netrc``."""
    requests = require("requests", "an address https://...")

    class Session(requests.Session):  # type: ignore[name-defined]
        def get_redirect_target(self, resp: Any) -> str | None:
            target: str | None = super().get_redirect_target(resp)
            if target is not None:
                _check_redirection(resp.url, target)
            return target

    session = Session()

    def read(name: str, start: int, stop: int) -> bytes:
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with session.get(name, headers=asked, timeout=_TIMEOUTS_S) as answer:
            if answer.status_code in (404, 410):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if answer.status_code in (401, 403):
                raise PermissionError(f"{answer.status_code}, message={answer.reason!r}")
            if answer.status_code == 416:  # the file has become shorter
                return b""
            if not answer.ok:
                raise OSError(f"{answer.status_code}, message={answer.reason!r}")
            data: bytes = answer.content
        return data

    return read


# By process: a fork must not go on with the connections of its parent.
_READERS: dict[tuple[int, str], Callable[[str, int, int], bytes]] = {}
_CONNECTIONS: dict[tuple[int, str], tuple[Any, str]] = {}
_SERVERS: dict[tuple[int, str, str], _Server] = {}
_SERVERS_LOCK = threading.Lock()


def forget_listings() -> None:
    """Forget all listings, so that every server is asked again when it is next needed."""
    with _SERVERS_LOCK:
        _SERVERS.clear()


def _find_server(path: PurePath) -> tuple[_Server, tuple[str, ...]]:
    scheme, place, *key = path.parts
    if scheme.rstrip(":") not in SCHEMES:  # an absolute path was joined to an address
        raise DataError(
            f"a data set on a server names the file {Path(*path.parts)} of another machine; correct the table that "
            "names it."
        )
    known = (os.getpid(), scheme.rstrip(":"), place)
    with _SERVERS_LOCK:
        if known not in _SERVERS:
            _SERVERS[known] = _Server(known[1], place)
        return _SERVERS[known], tuple(key)


# --- paths ---------------------------------------------------------------------------------------------------


if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # that of this system


class RemotePath(_Path):
    """The address of a file or folder on a server; it can be read like any path, but not written.

    Parameters
    ----------
    *parts
        An address such as ``s3://bucket/folder``, or its parts.
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, *rest = self.parts or (".",)
        return f"{scheme}//{'/'.join(rest)}" if rest else scheme

    @property
    def parent(self) -> RemotePath:
        """The parent folder; a bucket or server is its own parent, since other buckets may belong to other people."""
        return self if len(self.parts) <= 2 else super().parent

    def relative_to(self, *other: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Return the relative path from a parent folder, which is not an address."""
        return Path(*super().relative_to(*other, **kwargs).parts)

    def as_posix(self) -> str:
        """Return the address."""
        return str(self)

    def __fspath__(self) -> str:
        if self.is_dir():
            # Who is handed a folder lists it, and would take what was brought so far for all there is.
            raise DataError(
                f"{self} is a folder on a server, but this reader takes only folders of this machine."
            )
        return str(bring(self))

    def is_absolute(self) -> bool:
        """Return True."""
        return True

    def absolute(self) -> RemotePath:
        """Return itself."""
        return self

    def resolve(self, strict: bool = False) -> RemotePath:
        """Return itself."""
        return self

    def expanduser(self) -> RemotePath:
        """Return itself."""
        return self

    def _look(self) -> Entry | None:
        if len(self.parts) < 2:
            return None
        if ".." in self.parts:
            raise DataError(f"the address {self} leads upwards; write it without '..'.")
        server, key = _find_server(self)
        return server.look(key)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Say whether the server lists it."""
        return self._look() is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Say whether it is a folder."""
        found = self._look()
        return found is not None and found.is_folder

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Say whether it is a file."""
        found = self._look()
        return found is not None and not found.is_folder

    def is_symlink(self) -> bool:
        """Return False."""
        return False

    def find_entry(self) -> Entry:
        """Return the server's entry of a file; `FileNotFoundError` if there is none, or a folder."""
        server, key = _find_server(self)
        found = self._look() and server.complete(key)
        if found is None or found.is_folder:
            number = errno.ENOENT if found is None else errno.EISDIR
            raise OSError(number, os.strerror(number), str(self))
        if not found.etag and not found.mtime:
            raise DataError(
                f"{self} cannot be used, since the server gives neither its ETag nor its time, so a "
                "change would not be noticed; fetch the data set first."
            )
        return found

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return size and time on the server."""
        if self.is_dir():
            return os.stat_result((stat.S_IFDIR | 0o555, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        found = self.find_entry()
        size = bring(self).stat().st_size if found.size is None else found.size
        when = int(found.mtime)
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, when, when, when))

    lstat = stat

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield the content of a folder."""
        server, key = _find_server(self)
        listing = server.find_listing(key)
        if listing is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        for name in sorted(listing):
            yield self / name

    def walk_files(self) -> Iterator[RemotePath]:
        """Yield every file below a folder; nothing if there is no such folder."""
        if not self.is_dir():
            return
        server, key = _find_server(self)
        with server.lock:
            if server.scheme == "s3" and any(e.is_folder for e in (server.find_listing(key) or {}).values()):
                server._list_below(key)
        for path in self.iterdir():
            if path.is_dir():
                yield from path.walk_files()
            else:
                yield path

    def glob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """Yield matching paths below a folder; ``**`` matches any number of folders."""
        yield from dict.fromkeys(self._match(PurePath(pattern).parts))

    def rglob(self, pattern: str, **_: Any) -> Generator[RemotePath, None, None]:
        """Yield matching paths at any depth below a folder."""
        yield from dict.fromkeys(self._match(("**", *PurePath(pattern).parts)))

    def _match(self, patterns: Sequence[str]) -> Iterator[RemotePath]:
        if not patterns:
            yield self
            return
        first, rest = patterns[0], patterns[1:]
        if first == "**":
            for path in [self, *self._walk_folders()]:
                if rest or path != self:
                    yield from path._match(rest)
            return
        if not re.search(r"[*?\[]", first):
            path = self / first
            if path.exists():
                yield from path._match(rest)
            return
        if self.is_dir():
            for path in self.iterdir():
                if fnmatch.fnmatchcase(path.name, first) and (not rest or path.is_dir()):
                    yield from path._match(rest)

    def _walk_folders(self) -> Iterator[RemotePath]:
        for path in self.iterdir() if self.is_dir() else ():
            if path.is_dir():
                yield path
                yield from path._walk_folders()

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:  # type: ignore[override]
        """Open the file of the cache for reading; it is downloaded first if needed."""
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        file = open(bring(self), mode, *args, **kwargs)  # noqa: PTH123, SIM115
        _lock(file.fileno(), "shared")  # as long as it is open
        return file

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    touch = mkdir = unlink = rename = replace = write_text = write_bytes = symlink_to = rmdir = chmod = (
        _refuse
    )


# --- the cache -----------------------------------------------------------------------------------------------


_CHOSEN: dict[str, Any] = {}


def choose_cache(folder: Path | None, limit_gib: float | None) -> None:
    """Set folder and size of the cache for files of servers; None takes the value of the environment."""
    _CHOSEN.update(folder=folder, limit_gib=limit_gib)


def find_remote_cache() -> tuple[Path, int]:
    """Return the folder of the cache and its limit in bytes.

    The values of `choose_cache`, or else ``$BRAINDECODE_VIS_REMOTE_CACHE`` and ``$BRAINDECODE_VIS_REMOTE_GIB``, or else
    ``remote`` in the user's cache and `LIMIT_GIB`.
    """
    named = os.environ.get("BRAINDECODE_VIS_REMOTE_CACHE")
    folder = _CHOSEN.get("folder") or (Path(named) if named else find_cache_folder() / "remote")
    value = os.environ.get("BRAINDECODE_VIS_REMOTE_GIB", "")
    limit = _CHOSEN.get("limit_gib")
    if limit is None:
        try:
            limit = float(value) if value else LIMIT_GIB
        except ValueError:
            limit = -1.0
        if not 0 < limit < 1e9:
            raise DataError(
                f"BRAINDECODE_VIS_REMOTE_GIB is {value!r}; give the size of the cache in GiB, such as 50."
            )
    return folder.expanduser().absolute(), int(limit * 2**30)


_IN_USE: OrderedDict[str, int] = OrderedDict()  # open files that carry the shared lock
_TOUCHED: dict[str, float] = {}
_USE_LOCK = threading.Lock()


def bring(path: Path) -> Path:
    """Return the file of the cache for a path, downloaded if needed; a folder is downloaded with all its files.

    Parameters
    ----------
    path
        A path of this machine is returned as it is.

    Raises
    ------
    FileNotFoundError
        If the server has no such file.
    DataError
        If it cannot be downloaded, changed while it was read, or does not fit into the cache.
    """
    if not isinstance(path, RemotePath):
        return path
    if path.is_dir():
        bring_folder(path)
        for inner in path.iterdir():
            if inner.is_dir():
                bring(inner)
        return _place(path)[0]
    entry = path.find_entry()
    local, version = _place(path)
    if not _is_current(local, version, entry):
        _download(path, entry, local, version)
    while not _use(local):  # another process made room meanwhile
        _download(path, entry, local, version)
    return local


def bring_all(paths: Iterable[Path]) -> None:
    """Download many files in parallel, such as the pictures of a subject, since each needs a round trip."""
    remote = [path for path in paths if isinstance(path, RemotePath)]
    if len(remote) < 2:
        for path in remote:
            bring(path)
        return
    limit = find_remote_cache()[1]
    # What does not fit at once is brought when it is opened.
    if sum(path.find_entry().size or 0 for path in remote) > _KEPT * limit:
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(bring, path) for path in remote]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def bring_folder(folder: RemotePath, suffixes: tuple[str, ...] = ("",)) -> None:
    """Download the files of one folder with these endings, and remove those that the server no longer has."""
    listed = list(folder.iterdir())
    files = [path for path in listed if path.name.endswith(suffixes) and path.is_file()]
    local, names = _place(folder)[0], {path.name for path in listed}
    for path in list(local.iterdir()) if local.is_dir() else ():
        if path.name not in names:
            _remove(str(path)) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    bring_all(files)
    for path in files:
        bring(path)


def find_address(local: Path) -> Path:
    """Return the address of a file of the cache, also of a removed one; return any other path unchanged."""
    with suppress(ValueError):
        scheme, name, kind, *key = local.relative_to(find_remote_cache()[0]).parts
        for server in list(_SERVERS.values()) if kind == "files" else ():
            if (server.scheme, server.folder_name) == (scheme, name):
                return RemotePath(f"{scheme}:", server.place, *key)
    return local


def _place(path: RemotePath) -> tuple[Path, Path]:
    server, key = _find_server(path)
    folder = find_remote_cache()[0] / server.scheme / server.folder_name
    return folder.joinpath("files", *key), folder.joinpath("versions", *key)


def _is_current(local: Path, version: Path, entry: Entry) -> bool:
    try:
        about = local.stat()
        held = version.read_text()
    except OSError:
        return False
    return held == entry.describe_version() and entry.size in (None, about.st_size)


def _lock(number: int, how: Literal["shared", "alone"]) -> bool:
    """Lock an open file: shared for reading, exclusive for writing or removing; False if others hold it."""
    try:
        return lock_file(number, shared=how == "shared") is not False
    except OSError:  # a file system whose locks fail has none
        return True


def _use(local: Path) -> bool:
    """Protect a file from removal while it is one of the last that this process opened; False if it is gone."""
    name = str(local)
    with _USE_LOCK:
        if name in _IN_USE:
            _IN_USE.move_to_end(name)
            if os.fstat(_IN_USE[name]).st_nlink and local.exists():
                _touch(name)
                return True
            os.close(_IN_USE.pop(name))
        try:
            number = os.open(name, os.O_RDONLY)
        except OSError:
            return False
        while not _lock(number, "shared"):  # held alone for a moment by who looks for what to remove
            time.sleep(0.01)
        if not os.fstat(number).st_nlink:
            os.close(number)
            return False
        _IN_USE[name] = number
        held = sum(os.fstat(each).st_size for each in _IN_USE.values())
        most = find_remote_cache()[1] // _HELD_SHARE
        while len(_IN_USE) > 1 and (len(_IN_USE) > _HELD or held > most):
            first = _IN_USE.popitem(last=False)[1]
            held -= os.fstat(first).st_size
            os.close(first)
        _touch(name)
    return True


def _touch(name: str) -> None:
    """Record when a file was last used, since the disk may not record it."""
    now = time.time()
    if abs(now - _TOUCHED.get(name, 0.0)) > _TOUCH_S:  # the clock may be set back
        _TOUCHED[name] = now
        with suppress(OSError):
            os.utime(name, (now, Path(name).stat().st_mtime))


def release_files() -> None:
    """Allow other processes to remove files that this process has used; open files stay readable."""
    with _USE_LOCK:
        while _IN_USE:
            os.close(_IN_USE.popitem()[1])


def _download(path: RemotePath, entry: Entry, local: Path, version: Path) -> None:
    folder, limit = find_remote_cache()
    size = entry.size or 0
    if size > limit:
        raise DataError(
            f"{path} has {describe_bytes(size)}, but the cache {folder} may hold only "
            f"{describe_bytes(limit)}: increase remote.limit_gib, or BRAINDECODE_VIS_REMOTE_GIB."
        )
    told = f"{path}\0{local}\0{entry.describe_version()}"
    part = (
        folder / "parts" / f"{xxhash.xxh3_128_hexdigest(told.encode('utf-8', 'surrogateescape'))}.{size}.part"
    )
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _check_folder(folder)
        with _open_part(part) as file:
            if _is_current(local, version, entry):  # another process has brought it
                part.unlink(missing_ok=True)
                return
            _make_room(size, part)
            _receive(path, entry, file, part)
            os.fsync(file.fileno())  # after a power cut, a file with its final name must hold what it says
            local.parent.mkdir(parents=True, exist_ok=True)
            version.parent.mkdir(parents=True, exist_ok=True)
            # In this order: whatever is stopped in between, no version is told of other bytes.
            version.unlink(missing_ok=True)
            with suppress(OSError):
                os.utime(part, (time.time(), entry.mtime or time.time()))
            part.replace(local)
            temporary = part.with_suffix(".version")
            temporary.write_text(entry.describe_version())
            temporary.replace(version)
    except OSError as error:
        if error.errno in _FULL:
            part.unlink(missing_ok=True)
            raise DataError(
                f"{path} could not be stored, since the disk of the cache {folder} is full; make room, "
                "or choose another folder with remote.cache or BRAINDECODE_VIS_REMOTE_CACHE."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            raise DataError(
                f"the cache {folder} cannot be written ({error.strerror}); name another folder with remote.cache or "
                "BRAINDECODE_VIS_REMOTE_CACHE."
            ) from error
        # Such as a name that is longer than the disk takes, or a file where another address has a folder.
        raise DataError(
            f"{path} cannot be kept in the cache {folder} ({error.strerror or error}); fetch the data set first."
        ) from error


#: All that the cache has at its top.
_OWN_NAMES = frozenset({"parts", "usage.json", "usage.tmp", *SCHEMES})


def _check_folder(folder: Path) -> None:
    """Raise `DataError` if a folder holds other files than the cache, since the cache removes files."""
    others = sorted(name for name in os.listdir(folder) if name not in _OWN_NAMES and name[0] != ".")  # noqa: PTH208
    if others:
        raise DataError(
            f"the cache {folder} holds {others[0]}, which is not a file of the cache; choose a separate folder with "
            "remote.cache or BRAINDECODE_VIS_REMOTE_CACHE."
        )


@contextmanager
def _open_part(part: Path) -> Iterator[IO[bytes]]:
    """Open a partial file to append to it, once no other process is writing it."""
    while True:
        file = part.open("ab")
        try:
            while not _lock(file.fileno(), "alone"):
                time.sleep(0.02)
            # Whoever held it may have given it its name, or thrown it away.
            if os.fstat(file.fileno()).st_nlink and part.exists():
                yield file
                return
        finally:
            file.close()
        # Nothing to write any more: `_download` sees whether it is there now.
        part.touch()


def _receive(path: RemotePath, entry: Entry, file: IO[bytes], part: Path) -> None:
    server, key = _find_server(path)
    name, size = server.name(key), entry.size
    try:
        if server.scheme != "s3" or size is None:
            file.truncate(0)
            server.ask(str(path), lambda: server.fs.get_file(name, str(part)))
        else:
            digest = hashlib.md5(usedforsecurity=False)
            start = file.tell()
            if start > size:
                file.truncate(0)
                start = 0
            with part.open("rb") as before:
                while block := before.read(_BLOCK_BYTES):
                    digest.update(block)
            file.seek(0, os.SEEK_END)
            while start < size:
                stops = [min(size, start + (n + 1) * _WINDOW_BYTES) for n in range(_WINDOWS)]
                ranges = [(a, b) for a, b in zip([start, *stops], stops, strict=False) if b > a]
                starts, ends = [a for a, _ in ranges], [b for _, b in ranges]
                fetch = partial(server.fs.cat_ranges, [name] * len(ranges), starts, ends, on_error="raise")
                pieces = server.ask(str(path), fetch)
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    start += len(piece)
                if start < ends[-1]:  # an object that became shorter
                    break
            file.flush()
            if "-" not in entry.etag and digest.hexdigest() == entry.etag:
                return
    except FileNotFoundError:
        part.unlink(missing_ok=True)
        server.listings.pop(key[:-1], None)
        raise _describe_gone(path) from None
    now = server.complete(key, anew=True)
    if now is None:
        part.unlink(missing_ok=True)
        raise _describe_gone(path)
    if now.describe_version() != entry.describe_version() or (
        size is not None and part.stat().st_size != size
    ):
        found = part.stat().st_size
        part.unlink(missing_ok=True)
        raise _describe_change(
            path,
            f" (before {entry.describe_version()}, now {now.describe_version()}, {found} bytes received)",
        )


def _describe_gone(path: RemotePath) -> DataError:
    return DataError(
        f"{path} was listed by the server but no longer exists; run the same command again to list the files again."
    )


def _describe_change(path: RemotePath, how: str = "") -> DataError:
    return DataError(
        f"{path} changed on the server while it was read{how}; run the same command again to read the new version."
    )


def _make_room(size: int, part: Path) -> None:
    """Reserve space for a file, and remove the least recently used files if it would not fit.

    If other processes use all files of the cache, wait until they release some.
    """
    import filelock

    folder, limit = find_remote_cache()
    count, until = folder / "usage.json", time.monotonic() + _WAIT_S
    while True:
        with filelock.FileLock(folder / ".lock"):
            used = limit + 1  # unless it was counted before
            with suppress(OSError, ValueError, TypeError, KeyError):
                used = int(json.loads(count.read_text())["bytes"])
            if used + size > limit:
                used = _remove_oldest(folder, limit, size, part)
            if used + size <= limit:
                temporary = count.with_suffix(".tmp")
                temporary.write_text(json.dumps({"bytes": used + size}))
                temporary.replace(count)
                break
        if time.monotonic() > until:
            raise DataError(
                f"the cache {folder} may hold {describe_bytes(limit)}, of which {describe_bytes(used)} "
                f"are in use, but {describe_bytes(size)} more are needed: increase remote.limit_gib or "
                "BRAINDECODE_VIS_REMOTE_GIB."
            )
        release_files()
        time.sleep(0.1)
    # A part of it may be there already.
    if shutil.disk_usage(folder).free < size - part.stat().st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _remove_oldest(folder: Path, limit: int, size: int, part: Path) -> int:
    """Make room for a file as far as possible, and return the bytes that the cache then holds."""
    kept: list[tuple[float, int, str]] = []
    used = 0
    for name, about in _scan(folder / "parts"):
        # Of a download that goes on, all is counted that it will bring; the others were killed.
        found = re.fullmatch(r"[0-9a-f]{32}\.(\d+)\.(part|version)", Path(name).name)
        if name == str(part) or found is None:
            continue
        if _is_at_work(name):
            used += int(found[1]) if found[2] == "part" else 0
        elif abs(time.time() - about.st_mtime) > _TOUCH_S:  # of the future, if the clock was set back
            Path(name).unlink(missing_ok=True)
    for scheme in SCHEMES:
        for files in (folder / scheme).glob("*/files"):
            for name, about in _scan(files):
                kept.append((about.st_atime, about.st_size, name))
                used += about.st_size
    if used + size <= limit:
        return used
    for _, n_bytes, name in sorted(kept):
        if used + size <= max(_KEPT * limit, size):
            break
        if _remove(name):
            used -= n_bytes
    return used


def _scan(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                yield f"{place}{os.sep}{name}", os.stat(f"{place}{os.sep}{name}")  # noqa: PTH116


def _is_at_work(name: str) -> bool:
    try:
        with open(name, "ab") as file:  # noqa: PTH123
            return not _lock(file.fileno(), "alone")
    except OSError:
        return True


def _remove(name: str) -> bool:
    """Remove a file of the cache unless a process uses it."""
    if name in _IN_USE:
        return False
    try:
        with open(name, "r+b") as file:  # noqa: PTH123
            if not _lock(file.fileno(), "alone"):
                return False
            folder = find_remote_cache()[0]
            scheme, server, _, *key = Path(name).relative_to(folder).parts
            folder.joinpath(scheme, server, "versions", *key).unlink(missing_ok=True)
            Path(name).unlink()
    except OSError:
        return False
    return True


# --- parts of files ------------------------------------------------------------------------------------------


class _Ranges(io.RawIOBase):
    """Reads requested bytes of a file; if much of it is read, the whole file is downloaded, if this was allowed."""

    def __init__(self, path: RemotePath, entry: Entry, *, until: int | None) -> None:
        self.path, self.entry, self.until = path, entry, until
        self.server, self.key = _find_server(path)
        self.read_range, self.name = self.server.open_reader(), self.server.name(self.key)
        self.size = int(entry.size or 0)
        self.position, self.read_bytes = 0, 0
        self.blocks: OrderedDict[int, bytes] = OrderedDict()
        self.whole: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the file, with zeros after its end, since h5py does not pass a number of bytes."""
        view = memoryview(buffer).cast("B")
        stop = max(self.position, min(self.size, self.position + len(view)))
        n = stop - self.position
        if n and self.until is not None and self.whole is None and stop > self.until:
            self.whole = open(bring(self.path), "rb")  # noqa: PTH123, SIM115
        if n and self.whole is not None:
            self.whole.seek(self.position)
            n = self.whole.readinto(view[:n])  # type: ignore[attr-defined]
        elif n:
            view[:n] = self._take(self.position, stop)
        view[n:] = bytes(len(view) - n)
        self.position += n
        return n

    def _take(self, start: int, stop: int) -> bytes:
        """Return all bytes from `start` to `stop`; a small read may need two blocks."""
        if stop - start >= _BLOCK_BYTES // 4:
            return self._fetch(start, stop)
        numbers = range(start // _BLOCK_BYTES, (stop - 1) // _BLOCK_BYTES + 1)
        first = numbers[0] * _BLOCK_BYTES
        return b"".join(map(self._find_block, numbers))[start - first : stop - first]

    def _find_block(self, number: int) -> bytes:
        if number not in self.blocks:
            first = number * _BLOCK_BYTES
            self.blocks[number] = self._fetch(first, min(self.size, first + _BLOCK_BYTES))
            if len(self.blocks) > _N_BLOCKS:
                self.blocks.popitem(last=False)
        self.blocks.move_to_end(number)
        return self.blocks[number]

    def _fetch(self, start: int, stop: int) -> bytes:
        try:
            data = self.server.ask(str(self.path), lambda: self.read_range(self.name, start, stop))
        except FileNotFoundError:
            raise _describe_gone(self.path) from None
        if len(data) == self.size and stop - start < self.size:  # a server that knows no ranges sends all
            data = data[start:stop]
        if len(data) != stop - start:
            raise _describe_change(self.path)
        self.read_bytes += len(data)
        return data

    def close(self) -> None:
        if not self.closed and self.whole is not None:
            self.whole.close()
        # Ranges of two versions would be mixed up; that the version is still the same shows that they were not.
        if not self.closed and self.read_bytes and self.whole is None:
            super().close()
            self._check_version()
        super().close()

    def __del__(self) -> None:
        self.read_bytes = 0  # nobody would hear of another version
        self.close()

    def _check_version(self) -> None:
        # h5py closes a file while it holds its lock: a thread of fsspec that collected an object of h5py now would wait
        # for the lock, and the lock for its answer.
        collects = gc.isenabled()
        gc.disable()
        try:
            now = self.server.complete(self.key, anew=True)
        finally:
            if collects:
                gc.enable()
        if now is None or now.describe_version() != self.entry.describe_version():
            raise _describe_change(self.path)


def _is_worth_ranges(path: Path, least: int) -> TypeGuard[RemotePath]:
    """Say whether ranges of a file are requested: it is large and not in the cache."""
    if not isinstance(path, RemotePath):
        return False
    entry = path.find_entry()
    return (entry.size or 0) >= least and not _is_current(*_place(path), entry)


def describe_reading(path: RemotePath) -> str:
    """Return the version of a file; for large HDF5 files also the version of the reading by ranges.

    Earlier versions filled reads across two blocks only partly, so results from such files must not be reused.
    """
    entry = path.find_entry()
    by_ranges = path.suffix.lower() in (".hdf5", ".h5") and (entry.size or 0) >= RANGES_BYTES
    return entry.describe_version() + (", ranges 2" if by_ranges else "")


def open_head(path: Path) -> IO[bytes]:
    """Open a file of which only the beginning may be needed; of a large file on a server, only this is downloaded.

    Reading beyond 16 MiB downloads the whole file into the cache.
    """
    if not _is_worth_ranges(path, HEADS_BYTES):
        return path.open("rb")
    return io.BufferedReader(_Ranges(path, path.find_entry(), until=_HEAD_BYTES), 1 << 16)


@contextmanager
def borrow_head(path: Path) -> Iterator[Path]:
    """Yield a local file with the beginning of a path, possibly cut off, for header readers that need a file name."""
    if not _is_worth_ranges(path, HEADS_BYTES):
        yield bring(path)
        return
    with tempfile.TemporaryDirectory(prefix="braindecode-vis-") as folder:
        place = Path(folder) / path.name
        with open_head(path) as file:
            place.write_bytes(file.read(_BLOCK_BYTES))
        yield place


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file for reading; of a large file on a server, only the requested ranges are read."""
    import h5py

    if not _is_worth_ranges(path, RANGES_BYTES):
        return h5py.File(bring(path), "r")

    class RangedFile(h5py.File):
        """HDF5 file that also closes its source, which h5py leaves open."""

        def __init__(self, source: _Ranges) -> None:
            self._source = source
            super().__init__(source, "r")

        def close(self) -> None:
            super().close()
            self._source.close()

    return RangedFile(_Ranges(path, path.find_entry(), until=None))
