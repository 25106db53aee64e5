"""Published weights: the repository, revision and files of each model, and their download into the hub's cache.

Owns reading ``data_manifests/weights/published.yaml`` and the calls of `huggingface_hub`. A model in that list is
always fetched at its pinned revision, with its listed files alone, and compared with the hashes that are known; of
another, the newest revision is taken. Asks for no consent: `weights.find_published` does.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from braindecode_vis.base.checks import BraindecodeVisError, DataError, check_option
from braindecode_vis.base.digests import find_cache_folder, hash_once
from braindecode_vis.base.settings import Settings
from braindecode_vis.datasets.manifests import find_package_data


class WeightFile(Settings):
    """A file of a model: its path (``*`` stands for anything), and size and first digits of its sha256 if known."""

    path: str
    bytes: int | None = None
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{8,64})?$")


class PublishedModel(Settings):
    """Facts about published weights.

    Parameters
    ----------
    name, what
        What it is called here, and what it is.
    needed_by, option
        Settings that need it, and the setting that names its folder or file.
    named
        Whether that setting must name it wherever it lies, since nothing looks for it in the hub's cache.
    repository, revision
        ``owner/name`` on the hub, and the commit; without one, the newest.
    url
        Address of a single file that is not on the hub.
    files
        Files with known names.
    patterns
        Names of all files that are fetched; those of `files` by default.
    size
        Bytes, about, where the files do not say.
    licence, note
        Terms, and what else to know.
    mark
        How sure it is, as for `braindecode_vis.datasets.manifests.Part`.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    what: str
    needed_by: str
    option: str
    named: bool = False
    repository: str = ""
    revision: str = Field(default="", pattern=r"^([0-9a-f]{40})?$")
    url: str = ""
    files: tuple[WeightFile, ...] = ()
    patterns: tuple[str, ...] = ()
    size: int | None = None
    licence: str
    note: str = ""
    mark: Literal["verified", "second-hand", "unconfirmed"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.repository) == bool(self.url):
            raise ValueError(f"{self.name} needs a repository or a url")
        if not (self.files or self.patterns):
            raise ValueError(f"{self.name} names no files")
        return self

    def list_patterns(self) -> list[str]:
        """Return the names of the files that are fetched."""
        return list(self.patterns) or [file.path for file in self.files]

    def list_tensor_files(self) -> list[str]:
        """Return those of them that hold tensors."""
        return [name for name in self.list_patterns() if not name.endswith((".json", ".txt"))]

    def count_bytes(self) -> int | None:
        """Return the bytes of all files, None if nobody has said."""
        sizes = [file.bytes for file in self.files]
        return self.size or (None if None in sizes or not sizes else sum(filter(None, sizes)))

    def describe_place(self) -> str:
        """Return repository and revision, or the address."""
        return self.url or name_repository(self.repository)


@cache
def read_models() -> dict[str, PublishedModel]:
    """Return every known model by name."""
    text = (find_package_data("data_manifests") / "weights" / "published.yaml").read_text()
    rows = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {model.name: model for model in map(PublishedModel.model_validate, rows)}


def read_model(name: str) -> PublishedModel:
    """Return the model called `name`; an unknown name lists the known ones."""
    check_option("the name of the weights", name, read_models())
    return read_models()[name]


def find_model(repository: str) -> PublishedModel | None:
    """Return what is known of a repository of the hub."""
    known = read_models().values() if repository else ()  # single files have no repository
    return next((model for model in known if model.repository == repository), None)


def find_placed(place: str) -> PublishedModel | None:
    """Return what is known of what lies at a place, as `PublishedModel.describe_place` names it."""
    return next((model for model in read_models().values() if model.describe_place() == place), None)


def name_repository(repository: str) -> str:
    """Return the name of what is fetched of a repository of the hub."""
    model = find_model(repository)
    return (
        f"huggingface.co/{repository}, revision {model.revision[:12] if model and model.revision else 'main'}"
    )


def get_snapshot(repository: str, patterns: list[str], *, cached: bool) -> Path:
    """Return the folder of a repository in the hub's cache, fetched unless it is `cached`.

    Parameters
    ----------
    repository
        ``owner/name``.
    patterns
        Names of the files, unless the model is known and says which.
    cached
        Whether it must have been fetched before, at the pinned revision or else at the newest one.

    Raises
    ------
    DataError
        If what came is not what is published.
    """
    from huggingface_hub import snapshot_download

    model = find_model(repository)
    if model is None:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=cached))
    if cached:
        return _find_cached(model, partial(snapshot_download, repository, allow_patterns=patterns))
    return fetch_model(model)


def get_file(repository: str, name: str, *, cached: bool) -> Path:
    """Return a file of a repository in the hub's cache; otherwise as `get_snapshot`."""
    from huggingface_hub import hf_hub_download

    model = find_model(repository)
    if model is None:
        return Path(hf_hub_download(repository, name, local_files_only=cached))
    if not cached:
        return fetch_model(model) / name
    return _find_cached(model, partial(hf_hub_download, repository, name))


def _find_cached(model: PublishedModel, find: Callable[..., str]) -> Path:
    """Return what the hub's cache holds of the pinned revision, or else of the newest."""
    try:
        return Path(find(revision=model.revision or None, local_files_only=True))
    except Exception:  # each version of the library has its own way to say that it holds nothing
        if not model.revision:
            raise
        return Path(find(revision=None, local_files_only=True))


def fetch_model(model: PublishedModel, *, to: Path | None = None) -> Path:
    """Fetch a model of the hub and return its folder.

    Parameters
    ----------
    model
        From `read_model`.
    to
        Plain folder to fetch into, for a machine without a network; the hub's own cache by default.

    Raises
    ------
    DataError
        If what came is not what is published.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            model.repository, revision=model.revision or None, allow_patterns=model.list_patterns(),
            local_dir=None if to is None else to.expanduser(),
        )
    )  # fmt: skip
    check_published(model, folder)
    return folder


def check_published(model: PublishedModel, folder: Path) -> None:
    """Raise `DataError` unless the files of a folder have the size and hash that are known of them."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    known = {file.path for file in model.files}
    # A pattern that matches nothing is no error to the hub's library.
    wanted = [WeightFile(path=pattern) for pattern in _list_weights(model) if pattern not in known]
    for file in (*model.files, *wanted):
        found = [path for name, path in paths.items() if fnmatch(name, file.path)]
        if not found:
            note = f" ({model.note.rstrip('.')})" if model.note else ""
            raise DataError(
                f"{model.describe_place()} has no file {file.path}{note}; look for a newer release, and name its "
                f"folder with {model.option}."
            )
        size = found[0].stat().st_size
        if file.bytes is not None and size != file.bytes:
            wrong = f"{size} bytes instead of {file.bytes}"
        elif file.sha256 and not (digest := hash_once(found[0])).startswith(file.sha256):
            wrong = f"the sha256 {digest} instead of {file.sha256} ({model.mark})"
        else:
            continue
        raise DataError(
            f"{found[0]} of {model.describe_place()} has {wrong}; remove it and fetch it again. If it is "
            "still different, it was changed at its source: compare it with its page, and give its path "
            f"with {model.option} if you trust it."
        )


def find_cached(model: PublishedModel) -> Path | None:
    """Return the folder, or file, of a model that was fetched into its usual place, None if a file of it is missing."""
    if model.url:
        path = find_cache_folder() / "weights" / model.files[0].path
        return path if path.is_file() else None
    try:
        folder = get_snapshot(model.repository, model.list_patterns(), cached=True)
    except Exception:  # each version of the library has its own way to say that it holds nothing
        return None
    return folder if all(any(folder.rglob(pattern)) for pattern in _list_weights(model)) else None


def _list_weights(model: PublishedModel) -> list[str]:
    return [pattern for pattern in model.list_patterns() if pattern.endswith((".safetensors", ".bin"))]


def fetch(model: PublishedModel, *, to: Path | None = None) -> Path:
    """Fetch a model of the hub or a single file, and return its folder or file.

    Parameters
    ----------
    model
        From `read_model`.
    to
        Plain folder to fetch into; by default the hub's own cache, of single files ``weights`` in the user's.

    Raises
    ------
    DataError
        If nobody answers, terms are to be accepted first, or what came is not what is published.
    """
    from braindecode_vis.datasets.transfer import RemoteFile, TransferError, check_answers, transfer

    if model.url:
        (file,) = model.files
        known = f"sha256:{file.sha256}" if file.sha256 else ""
        target = (find_cache_folder() / "weights" if to is None else to.expanduser()) / file.path
        try:
            if not (target.is_file() and known and hash_once(target).startswith(file.sha256)):
                transfer(RemoteFile(file.path, (model.url,), file.bytes, known), target)
        except TransferError as error:
            raise DataError(f"{model.name} was not fetched: {error}.") from error
        return target
    try:
        if to is not None or find_cached(model) is None:
            from huggingface_hub import constants

            check_answers(constants.ENDPOINT)
        return fetch_model(model, to=to)
    except BraindecodeVisError:
        raise
    except TransferError as error:
        raise DataError(f"{model.name} was not fetched: {error}; fetch again to continue.") from error
    except Exception as error:  # of the network, in the words of whichever library carries it
        # The library says that it has nothing in its cache either, because of what the hub said.
        codes = [
            getattr(getattr(each, "response", None), "status_code", None)
            for each in (error, error.__cause__, error.__context__)
        ]
        code = next(filter(None, codes), None)
        what = (
            f"answers {code}; if it is gated, accept its terms on that page and log in with: hf auth login"
            if code in (401, 403)
            else f"does not hold revision {model.revision or 'main'} or its files (404); look for a "
            "newer revision there"
            if code == 404
            else f"does not answer ({type(error).__name__}); check the network and fetch again to continue"
        )
        raise DataError(
            f"{model.name} was not fetched: https://huggingface.co/{model.repository} {what}."
        ) from error
