"""Lists, fetches and checks data sets: what is known about them, and which files are on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from braindecode_vis.base.checks import DataError
from braindecode_vis.base.remote import RemotePath
from braindecode_vis.datasets.manifests import CheckFinding, Manifest, read_manifests

if TYPE_CHECKING:
    from braindecode_vis.config import RunConfig
    from braindecode_vis.datasets.fetching import Plan
    from braindecode_vis.pipeline.runs import ProgressListener


def list_datasets(root: Path | None = None) -> Iterator[tuple[Manifest, str]]:
    """Yield every manifest with a description of what is on disk.

    Parameters
    ----------
    root
        Folder that holds one folder per data set, or one data set; one that does not exist yet holds none.

    Raises
    ------
    DataError
        If it is a file.
    """
    if root is not None and root.expanduser().is_file():
        raise DataError(f"the root {root} is a file; pass the folder that holds the data sets with --root.")
    for manifest in read_manifests().values():
        yield manifest, describe_presence(root, manifest)


def describe_presence(root: Path | None, manifest: Manifest) -> str:
    """Describe how much of a data set is below `root`, without reading it."""
    if not manifest.needs_files:
        return "nothing needed"
    if not manifest.files:
        return f"no list of files; try: braindecode-vis check {manifest.name} --root FOLDER"
    if root is None:
        return "not looked for (pass --root)"
    folders = [root / manifest.name, root]
    # The archive of MUSE-N170 unpacks into a folder of that name.
    folders += [folder / "recordings" for folder in folders]
    # The root may be the data set itself, or hold it under its name; the fuller one counts.
    counts = [sum(_lies_there(folder / entry.path) for entry in manifest.files) for folder in folders]
    best = counts.index(max(counts))
    if counts[best] == 0:
        return "absent"
    total = len(manifest.files)
    amount = "complete" if counts[best] == total else f"{counts[best]} of {total} files"
    return f"{amount} in {folders[best]}"


def _lies_there(path: Path) -> bool:
    # Volumes may lie compressed, as their authors or git-annex left them.
    return path.is_file() or path.with_name(f"{path.name}.gz").is_file()


def fetch_dataset(plan: Plan, *, jobs: int, listener: ProgressListener) -> list[CheckFinding]:
    """Download the missing files of a data set; an error at the end names every file that could not be fetched.

    Parameters
    ----------
    plan
        The files to fetch.
    jobs
        How many files are fetched at the same time.
    listener
        Shows progress.
    """
    import threading

    from braindecode_vis.datasets.fetching import fetch, refuse_failures

    name, lock = plan.manifest.name, threading.Lock()
    sizes = plan.missing.values()
    # Without all sizes the bar shows no share.
    total = None if None in sizes else sum(size or 0 for size in sizes)
    there = {file.path: (file.bytes or 0) - (plan.missing.get(file.path, 0) or 0) for file in plan.files}
    with listener.progress(f"fetching {name} (bytes)", total or None) as advance:

        def progress(path: str, n_bytes: int, size: int | None) -> None:
            # Transfers tell how far a file is, bars want what has been added; several threads tell.
            with lock:
                advance(n_bytes - there.get(path, 0))
                there[path] = n_bytes

        findings = fetch(plan, jobs=jobs, progress=progress)
    refuse_failures(findings, f"files of {name} were not fetched")
    return findings


def check(
    config: RunConfig, *, full: bool = False, listener: ProgressListener | None = None
) -> list[CheckFinding]:
    """Verify the files of a data set and recompute the facts that its manifest declares.

    Parameters
    ----------
    config
        The configuration whose `dataset` is checked.
    full
        Read every byte of every file, and every trial.
    listener
        Shows progress.
    """
    from braindecode_vis.datasets.sources.file_damage import check_data_files, list_data_files
    from braindecode_vis.pipeline.runs import SilentListener

    show, findings = listener or SilentListener(), list(config.dataset.check())
    root = getattr(config.dataset, "root", None)
    if root is None or not root.expanduser().is_dir():
        return findings
    root = root.expanduser()
    if isinstance(root, RemotePath):
        words = (
            "on a server: only the files that the data set reads were checked; fetch the data set to "
            "check all of them"
        )
        findings.append(CheckFinding("files", True, words))
    else:
        paths = list_data_files(root)
        total = sum(path.stat().st_size for path in paths)
        with show.progress("reading files (bytes)" if full else "looking at files (bytes)", total) as advance:
            findings += check_data_files(root, paths=paths, full=full, advance=advance)
    if full:
        from braindecode_vis.preprocessing.whole_check import check_trials

        with show.progress("reading trials", None) as advance:
            findings += check_trials(config.dataset, advance=advance)
    return findings
