"""Manifests: description, source, files and declared facts of each public data set.

Owns reading ``data_manifests/*.yaml`` (and ``data_manifests/files/*.tsv``, the file lists of large parts), the
comparison of a folder on disk with it, and the base class of the settings of every data set. Reads no data files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import yaml
from pydantic import Field, model_validator

from braindecode_vis.base.checks import BraindecodeVisError, ConfigError, DataError, check_option
from braindecode_vis.base.contracts import Dataset
from braindecode_vis.base.remote import RemotePath, refuse_address
from braindecode_vis.base.settings import Settings
from braindecode_vis.base.store import hash_file, read_json

Config = TypeVar("Config", bound=Settings)
# The truth of a phantom is in this folder beside its data.
_TRUTH = "phantom_truth"

#: Label of a subject, which YAML and the shell may have turned into a number (`find_label`).
Label = Annotated[str, Field(coerce_numbers_to_str=True)]


class ManifestFile(Settings):
    """One file of a data set, with size and hash if the publisher or we know them."""

    path: str
    bytes: int | None = None
    sha256: str | None = None


class PartFile(Settings):
    """One published file of a part.

    Parameters
    ----------
    path
        Path below the root.
    at
        Its name at the host: a path, or an id; the path by default.
    subject
        Subject of the file; empty if all subjects share it.
    bytes
        Its size.
    checksum
        ``sha256:``, ``md5:`` or ``git:`` (the blob of git) and hex digits, all of them or the first ones.
    text
        Its whole content, for a small file of the layout that no host has.
    """

    path: str
    at: str = ""
    subject: str = ""
    bytes: int | None = None
    checksum: str = Field(default="", pattern=r"^$|^(sha256|md5|git):[0-9a-f]{8,64}$")
    text: str | None = None


class ManifestPart(Settings):
    """Some files of a data set that are on one host and are fetched together.

    Parameters
    ----------
    name, what
        Name for ``--parts``, and description of the content.
    host
        Host of the files, which determines their addresses: see `braindecode_vis.datasets.hosts`.
    place
        Place at the host: a repository with its commit, a data set, an article, a bucket.
    files
        The files, if they are known. Those of a larger part are listed in ``data_manifests/files``.
    patterns
        Otherwise patterns that select files of the host's own list: ``*`` matches anything except a slash,
        and ``{subject}`` one of `subjects`.
    subjects
        Subjects with files, as spelled in the file names; empty for shared files.
    into
        Folder below the root for the files that match `patterns`.
    drop
        Start of the paths at the host that is left out below the root.
    unpack
        Folder below the root (``.`` for the root itself) into which archives are unpacked; they are removed after that.
    size
        Approximate bytes of all subjects, if the list of files has no sizes.
    access
        ``open``, ``terms`` (the user must accept terms first), or ``by_hand`` (never fetched here).
    gate
        What the user must read, sign or do.
    default
        Whether it is fetched by default.
    mark
        How sure the address is: read in the owner's own pages or code (``verified``), in somebody else's
        (``second-hand``), or nowhere (``unconfirmed``). None of them was tested when it was written.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    what: str
    host: Literal[
        "https", "github", "openneuro", "s3", "nemar", "osf", "figshare", "huggingface", "annex", "nowhere"
    ]
    place: str = ""
    files: tuple[PartFile, ...] = ()
    patterns: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    into: str = ""
    drop: str = ""
    unpack: str | None = None
    size: int | None = None
    access: Literal["open", "terms", "by_hand"] = "open"
    gate: str = ""
    default: bool = True
    mark: Literal["verified", "second-hand", "unconfirmed"]

    @model_validator(mode="after")
    def _check(self) -> ManifestPart:
        if self.access == "by_hand" and (self.files or self.patterns):
            raise ValueError(f"part {self.name} is downloaded by hand, so that it lists no files")
        if self.access != "open" and not self.gate:
            raise ValueError(f"part {self.name} is not open and must say under gate what to do")
        return self

    def list_subjects(self) -> list[str]:
        """Return the subjects that have files."""
        return list(self.subjects) or list(dict.fromkeys(f.subject for f in self.files if f.subject))

    def count_bytes(self) -> int | None:
        """Return the bytes of all its files, None if unknown."""
        sizes = [entry.bytes if entry.text is None else len(entry.text.encode()) for entry in self.files]
        return self.size if self.patterns or None in sizes or not sizes else sum(filter(None, sizes))


class PublishedSize(Settings):
    """Published size of a data set, so that a run can be planned before it is downloaded.

    Parameters
    ----------
    n_train_images, n_test_images
        Pictures of the declared split that one subject sees.
    train_repetitions, test_repetitions
        Number of repetitions of each picture.
    n_channels, sfreq
        For EEG and MEG: number of brain channels, and sampling rate in Hz of trials if the settings do not give one.
    n_voxels
        For fMRI: number of voxels in `mask`; runs with another mask are not planned.
    mask
        Value of ``dataset.mask``.
    image_px
        Side of a picture.
    images_are_shared
        Whether all subjects see the same training pictures.
    gigabytes
        Approximate size of the files of one subject that are read.
    """

    n_train_images: int
    n_test_images: int
    train_repetitions: int = 1
    test_repetitions: int = 1
    n_channels: int | None = None
    sfreq: float | None = None
    n_voxels: int | None = None
    mask: str | None = None
    image_px: int
    images_are_shared: bool = True
    gigabytes: float | None = None


class Manifest(Settings):
    """Facts about a data set that are known before it is read.

    `needs_files` is false if the data set is made in memory. `root_holds` are patterns; a correct root matches one of
    them, so a root that is too high or too low is found. `phantoms` are the formats in which simulated subjects can be
    written for its loader, the usual one first. `recordings` are the sessions of each subject (``*``: of all others)
    with the number of their runs, ``null`` if runs are not counted. `plan` uses `size`. `files` are checked on disk,
    `parts` can be fetched.
    """

    name: str
    title: str
    modality: str
    subjects: int
    stimuli: str
    summary: str
    citation: str
    licence: str
    gate: str | None = None
    source: dict[str, Any] | None = None
    files: tuple[ManifestFile, ...] = ()
    parts: tuple[ManifestPart, ...] = ()
    facts: dict[str, Any] = Field(default_factory=dict)
    size: PublishedSize | None = None
    notes: tuple[str, ...] = ()
    root_holds: tuple[str, ...] = ()
    phantoms: tuple[str, ...] = ()
    recordings: dict[str, dict[str, int | None]] = Field(default_factory=dict)
    needs_files: bool = True


@dataclass(frozen=True)
class CheckFinding:
    """One line of a check: the checked item, whether it is correct, and what to do if not."""

    item: str
    ok: bool
    message: str


def look_at(item: str, look: Callable[..., str], *args: Any) -> CheckFinding:
    """Return the finding on one item: the text of ``look(*args)``, or the error that it raises."""
    try:
        return CheckFinding(item, True, look(*args))
    except BraindecodeVisError as error:
        return CheckFinding(item, False, str(error))


def collect_findings(
    item: str,
) -> Callable[[Callable[[Config], Iterator[CheckFinding]]], Callable[[Config], list[CheckFinding]]]:
    """Make a check from a method that yields findings; an error that ends it becomes the last finding, named `item`."""

    def make_check(
        look: Callable[[Config], Iterator[CheckFinding]],
    ) -> Callable[[Config], list[CheckFinding]]:
        @wraps(look)
        def check(self: Config) -> list[CheckFinding]:
            findings: list[CheckFinding] = []
            try:
                findings.extend(look(self))
            except BraindecodeVisError as error:
                findings.append(CheckFinding(item, False, str(error)))
            return findings

        return check

    return make_check


class DatasetSettings(Dataset):
    """Base class of the settings of every data set, with defaults.

    A data set also has ``check()``, ``hash_inputs()`` and exactly one of ``open_epochs(scratch)`` (EEG, MEG),
    ``open_betas()`` (single-trial fMRI) and ``open_bold()`` (fMRI time series), which give lazy sources for
    `braindecode_vis.preprocessing` to stream, or ``write(folder, seed=...)``, which writes responses and stimuli.
    `scratch` is a folder for converted copies of files that cannot be read in place. Opening reads no samples, and
    raises `DataError` or `ConfigError` if anything is missing, damaged or does not fit together; the message names
    subject, session and file.
    """

    @property
    def manifest(self) -> Manifest:
        """Facts about the data set that are known without its files."""
        return find_manifest(type(self).model_fields["kind"].default)


class RecordedSettings(DatasetSettings):
    """The settings of a data set that is read from a folder.

    Parameters
    ----------
    root
        Folder that holds its files.
    """

    root: Path | None = None

    not_hashed: ClassVar[frozenset[str]] = frozenset({"root"})

    def find_root(self) -> Path:
        """Return `root` if it is a folder; otherwise raise an error that says how to pass the right one."""
        return check_root(self.root, self.manifest)

    def list_declared(self, subject: str) -> Mapping[str, int | None]:
        """Return the sessions that the manifest declares of a subject, each with the number of its runs if declared."""
        declared = self.manifest.recordings
        return declared.get(subject, declared.get("*", {}))

    def check_recordings(self, recordings: Iterable[tuple[str, str, str]]) -> Iterator[CheckFinding]:
        """Yield a finding on declared sessions and runs that are not read."""
        for found in find_missing(self, recordings):
            yield CheckFinding(f"subject {found.subject}", found.chosen, found.what)

    def find_phantom(self) -> Path | None:
        """Return `root` if it is simulated and contains its truth."""
        return self.root if self.root is not None and (self.root / _TRUTH).is_dir() else None


def read_ideal_observer(root: Path, n_repetitions: int) -> float | None:
    """Return the top-1 accuracy of the ideal observer of a simulated data set, over its subjects; None if unknown."""
    people = read_json(root / _TRUTH / "phantom.json")["people"]
    known = [person["ideal_top1"].get(str(n_repetitions)) for person in people]
    return None if None in known or not known else float(np.mean(known))


def read_drive(root: Path) -> str:
    """Return the features that drive higher regions of a phantom; for older phantoms, the embedded network."""
    return str(read_json(root / _TRUTH / "phantom.json")["config"].get("drive", "embedded"))


def find_package_data(folder: str) -> Path:
    """Return the folder of shipped files, inside an installed package or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    # In a wheel the folder is inside the package, in a checkout beside it.
    for candidate in (package / "_data" / folder, package.parent / folder):
        if candidate.is_dir():
            return candidate
    raise DataError(f"the folder {folder} that ships with the package is missing; install the package again.")


@cache
def _list_names() -> list[str]:
    return sorted(path.stem for path in find_package_data("data_manifests").glob("*.yaml"))


@cache
def _read_manifest(name: str) -> Manifest:
    """Read and validate one manifest, once per process; its file has its name."""
    folder = find_package_data("data_manifests")
    # The parser in C, if PyYAML has it, reads all of them in a tenth of the time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load((folder / f"{name}.yaml").read_text(), Loader=loader)
    table = folder / "files" / f"{name}.tsv"
    listed: dict[str, list[dict[str, Any]]] = {}
    if table.is_file():
        header, *lines = table.read_text().splitlines()
        for line in lines:
            row: dict[str, Any] = dict(zip(header.split("\t"), line.split("\t"), strict=True))
            # pydantic reads the number; an empty cell means unknown.
            row["bytes"] = row["bytes"] or None
            listed.setdefault(row.pop("part"), []).append(row)
    for part in content.get("parts", ()):
        part["files"] = [*part.get("files", ()), *listed.pop(part["name"], ())]
    if listed:
        raise DataError(f"{table} lists files of the part {min(listed)}, which {name}.yaml does not name.")
    return Manifest.model_validate(content)


def read_manifests() -> dict[str, Manifest]:
    """Return every manifest by name, sorted."""
    return {name: _read_manifest(name) for name in _list_names()}


def read_manifest(name: str) -> Manifest:
    """Return the manifest called `name`; an unknown name lists the known ones."""
    check_option("the data set", name, _list_names())
    return _read_manifest(name)


def find_manifest(kind: str) -> Manifest:
    """Return the manifest of a data set; one without a manifest, such as a user's own, gets one with only its name."""
    if kind in _list_names():
        return _read_manifest(kind)
    unknown = "not stated"
    return Manifest(
        name=kind, title=kind, modality=unknown, subjects=0, stimuli=unknown, summary="", citation=unknown,
        licence=unknown,
    )  # fmt: skip


def check_root(root: Path | None, manifest: Manifest) -> Path:
    """Return `root` if it is a folder; otherwise raise an error that says how to pass the right one."""
    if root is None:
        brought = f"; braindecode-vis fetch {manifest.name} downloads it" if manifest.parts else ""
        raise DataError(
            f"the data set {manifest.name} needs its folder: pass it with --root DIR "
            f"({describe_source(manifest)}{brought})."
        )
    refuse_address(root, "dataset.root")
    root = root.expanduser()
    if not root.is_dir():
        raise DataError(
            f"the root {root} of the data set {manifest.name} is not a folder; pass the folder that holds "
            f"{manifest.files[0].path if manifest.files else 'its files'} with --root."
        )
    check_level(root, manifest)
    return root


# Parent folders are searched up to this level; higher up, a folder of the same name is probably another data set.
_LEVELS_UP = 2


def check_level(root: Path, manifest: Manifest) -> None:
    """Raise `DataError` if not `root`, but a folder above it or in it, looks like the root of the data set."""
    if not manifest.root_holds or _find_sign(root, manifest.root_holds) is not None:
        return
    # Patterns for files deeper below the root do not help to find a root above.
    direct = [pattern for pattern in manifest.root_holds if not pattern.startswith("*/")]
    # Folders above a remote address are not read: the user did not ask for it, and often has no access.
    above = () if isinstance(root, RemotePath) else root.absolute().parents[:_LEVELS_UP]
    for levels, parent in enumerate(above, start=1):
        if sign := _find_sign(parent, direct):
            raise DataError(
                f"the root {root} of the data set {manifest.name} is "
                f"{'a level' if levels == 1 else f'{levels} levels'} too low: {sign.name} is in {parent}; pass --root "
                f"{parent}."
            )
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = [folder for folder in folders if _find_sign(folder, manifest.root_holds)]
    if inside:
        one = "pass --root" if len(inside) == 1 else "pass one of the folders in it with --root, for example"
        raise DataError(
            f"the root {root} of the data set {manifest.name} is a level too high: "
            f"{_find_sign(inside[0], manifest.root_holds)} is in a folder below it; {one} {inside[0]}."
        )


def _find_sign(folder: Path, patterns: Sequence[str]) -> Path | None:
    """Return the first entry of a folder that matches one of the patterns."""
    try:
        found = (
            path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")
        )
        return next(found, None)
    except OSError:  # a folder that may not be read cannot be meant
        return None


def check_subset(wanted: Sequence[Any] | None, there: Sequence[Any], *, what: str, option: str) -> list[Any]:
    """Return the requested labels in the requested order, all by default; a missing label is an error."""
    if wanted is None:
        return list(there)
    if not wanted:
        raise ConfigError(
            f"{option} lists none; name some of {', '.join(map(str, there))}, or leave it out, which takes all."
        )
    wanted = [find_label(label, there) for label in wanted]
    absent = [label for label in wanted if label not in there]
    if absent:
        raise DataError(
            f"{what} {absent[0]} is not there; found {', '.join(map(str, there))}: fetch it, or list others with "
            f"--set {option}."
        )
    if len(set(wanted)) != len(wanted):
        raise ConfigError(f"{option} names a {what.split()[-1]} twice.")
    return list(wanted)


def refuse_other_layout(
    there: Mapping[str, Iterable[Any]], wanted: Iterable[Any] | None, *, where: Path, option: str
) -> None:
    """Refuse subjects that the automatic choice of the layout would leave out because they are in another layout.

    Parameters
    ----------
    there
        Subjects by layout; the first layout is the one that is read.
    wanted
        Requested subjects, None for all.
    where
        Folder of the data set.
    option
        The setting that chooses a layout.

    Raises
    ------
    DataError
        If a requested subject is only in another layout: its file in the first one may be lost.
    """
    (layout, read), *others = ((name, set(subjects)) for name, subjects in there.items())
    chosen = None if wanted is None else set(wanted)
    for other, subjects in others:
        lost = sorted(subjects - read if chosen is None else (subjects - read) & chosen)
        if lost and read:
            raise DataError(
                f"subject {lost[0]} below {where} has files of the layout {other} alone, but subject "
                f"{min(read)} those of {layout}; fetch what is missing, choose with --set dataset.subjects=[...], or "
                f"read the other layout with --set {option}={other}."
            )


def find_label(label: Any, there: Sequence[Any]) -> Any:
    """Return the existing label that differs from the given one only by leading zeros.

    Examples
    --------
    >>> find_label("1", ["01", "02"]), find_label(3, ["01", "02"])
    ('01', 3)
    """
    if label in there or not str(label).isdigit():
        return label
    # YAML and the shell turn ``01`` into 1.
    same = [other for other in there if str(other).isdigit() and int(other) == int(label)]
    return same[0] if len(same) == 1 else label


def describe_source(manifest: Manifest) -> str:
    """Return a text that says where to get the data set."""
    if manifest.source is None:
        return "nothing to download"
    parts = [
        f"{key} {value}"
        for key, value in manifest.source.items()
        if key in ("repository", "path", "url", "doi")
    ]
    return "published as " + ", ".join(parts)


def check_files(root: Path, manifest: Manifest) -> list[CheckFinding]:
    """Compare size and hash of every listed file with the manifest."""
    return [check_one_file(root, manifest, entry) for entry in manifest.files]


def check_one_file(root: Path, manifest: Manifest, entry: ManifestFile) -> CheckFinding:
    """Compare one file with its entry in the manifest."""
    path = root / entry.path
    if not path.is_file():
        return CheckFinding(entry.path, False, f"{path} is missing; {describe_source(manifest)}")
    size = path.stat().st_size
    # The size is compared first: hashing gigabytes only to find a truncated file takes minutes.
    if entry.bytes is not None and size < entry.bytes:
        return CheckFinding(
            entry.path,
            False,
            f"{path} is truncated: {size} of {entry.bytes} bytes, so its sha256 cannot be {entry.sha256}; "
            "copy or fetch it again",
        )
    if entry.sha256 is not None and (found := hash_file(path)) != entry.sha256:
        return CheckFinding(
            entry.path,
            False,
            f"{path} is not the published file: sha256 {found}, expected {entry.sha256}; copy or fetch it again",
        )
    return CheckFinding(
        entry.path, True, f"{size} bytes, sha256 as published" if entry.sha256 else f"{size} bytes"
    )


def compare_fact(item: str, found: Any, declared: Any, root: Path | None, *, what: str = "") -> CheckFinding:
    """Return the finding on one declared fact.

    Parameters
    ----------
    item
        Name of the line.
    found, declared
        The counted value, and that of the manifest.
    root
        Folder of the data set; None if it cannot be simulated.
    what
        Unit of both, for example ``trials``.
    """
    unit = f" {what}" if what else ""
    if found == declared:
        return CheckFinding(item, True, f"{found}{unit} as declared")
    # The sizes of a phantom are chosen by its user, so they are reported and not judged.
    if _is_simulated(root):
        return CheckFinding(item, True, f"{found}{unit}; simulated (the real data set has {declared})")
    return CheckFinding(item, False, f"{found}{unit}, declared {declared}")


def _is_simulated(root: Path | None) -> bool:
    return root is not None and (root.expanduser() / _TRUTH).is_dir()


@dataclass(frozen=True)
class MissingRecordings:
    """Declared recordings of one subject that are not read.

    Parameters
    ----------
    subject
        Label of the subject.
    what
        Which recordings exist and which are missing, as a clause.
    n, of
        How many sessions or runs are missing, and how many are declared.
    chosen
        Whether the settings choose recordings, so that the rest is left out on purpose.
    """

    subject: str
    what: str
    n: int
    of: int
    chosen: bool


def list_recordings(parts: Iterable[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield subject, session and run of all parts of a source, even if no trial of them is kept.

    Published epochs are one file per subject, without sessions.
    """
    for part in parts:
        recording = getattr(part, "recording", None)
        for run in part.trials["run"].unique() if recording is None else (recording.run,):
            yield *part.group, run


def find_missing(settings: Any, recordings: Iterable[tuple[str, str, str]]) -> list[MissingRecordings]:
    """Return which declared sessions and runs of the subjects that are read are missing.

    Parameters
    ----------
    settings
        Settings of the data set.
    recordings
        Subject, session and run of everything that is read.

    Returns
    -------
    list of MissingRecordings
        Empty if nothing is declared, the data are simulated, or published epochs have no sessions.
    """
    if not isinstance(settings, RecordedSettings) or _is_simulated(settings.root):
        return []
    there: dict[str, dict[str, set[str]]] = {}
    for subject, session, run in recordings:
        there.setdefault(subject, {}).setdefault(session, set()).add(run.lstrip("0"))
    # The option that skips recordings may name runs and sessions; if single runs cannot be named, name sessions.
    skips = bool(getattr(settings, "skip", ()))
    names_runs = next((name for name in ("runs", "skip") if hasattr(settings, name)), "sessions")
    found = []
    for subject, held in there.items():
        declared = settings.list_declared(subject)
        held = {find_label(session, list(declared)): runs for session, runs in held.items()}
        read = [session for session in declared if session in held]
        if not read:
            continue
        if lost := [session for session in declared if session not in held]:
            what = f"{len(read)} of {len(declared)} declared sessions are read, without {', '.join(lost)}"
            chosen = skips or getattr(settings, "sessions", None) is not None
            found.append(MissingRecordings(subject, what, len(lost), len(declared), chosen))
        for session in read:
            n_runs = declared[session] or 0
            absent = [f"{n:02d}" for n in range(1, n_runs + 1) if str(n) not in held[session]]
            if absent:
                what = (
                    f"{n_runs - len(absent)} of {n_runs} declared runs of session {session} are read, without "
                    f"{', '.join(absent)}"
                )
                chosen = bool(getattr(settings, names_runs, None))
                found.append(MissingRecordings(subject, what, len(absent), n_runs, chosen))
    return found


def compare_facts(
    found: Mapping[str, Any], declared: Mapping[str, Any], root: Path | None
) -> list[CheckFinding]:
    """Return the finding on each declared fact that was counted, in the order in which they are declared."""
    return [compare_fact(name, found[name], value, root) for name, value in declared.items() if name in found]


def compare_counts(
    item: str, found: Mapping[str, int], declared: Mapping[str, Any], root: Path | None
) -> CheckFinding:
    """Return one finding on all counts of a subject; those of a phantom below `root` are reported and not judged."""
    off = [
        f"{key} {value} (declared {declared[key]})" for key, value in found.items() if value != declared[key]
    ]
    if off and _is_simulated(root):
        return CheckFinding(item, True, f"simulated: {', '.join(off)}")
    return CheckFinding(item, not off, ", ".join(off) if off else "as declared")
