"""Write ``docs/FETCHING.md``: the parts of each data set that can be fetched, with their addresses, sizes and terms.

    python docs/write_fetching.py

The tables are those of ``data_manifests``; ``tests/datasets/test_hosts.py`` fails if the page is not current.
"""

from __future__ import annotations

from pathlib import Path

from braindecode_vis.base.memory import describe_bytes
from braindecode_vis.datasets.hosts import describe_place
from braindecode_vis.datasets.manifests import Manifest, ManifestPart, read_manifests

PAGE = Path(__file__).resolve().parent / "FETCHING.md"
HEADER = """# Fetching data sets

    # into the user's cache; --root DIR for elsewhere
    braindecode-vis fetch digits69
    # addresses, sizes, checksums and terms; nothing is fetched, and no terms need be accepted
    braindecode-vis fetch nsd --subject 1 --dry-run
    braindecode-vis fetch things_meg --subject 1,2 --root /data/things-meg
    braindecode-vis fetch nsd --subject 1 --parts design,betas --root /data/nsd --accept-terms
    # asks each address whether it answers
    braindecode-vis fetch things_eeg2 --check-addresses

In Python, `bdv.load("digits69", download=True)` fetches and opens a data set in one line. If no folder is given, it is
stored below `$BRAINDECODE_VIS_DATA`, or in `datasets` in the user's cache folder.

The size and the free space are printed before the download starts. Several files are downloaded at once (`--jobs`).
An unfinished file has the ending `.part`; a finished one is compared with the published size and checksum, and then
renamed. If a call was stopped or failed, run it again: it continues where it stopped. A call for files that are already
complete downloads nothing and reads no file again (`.fetched.json` lists what was verified). Archives are unpacked and
then removed. A wrong file is deleted, and the command ends with an error and exit code 2. Only one call at a time can
write into a folder. If a file of your own has the name of a published file, it is replaced. `--parts all` also fetches
the parts that are not fetched by default.

Files with terms of use need `--accept-terms`; read the terms first. Files that need a form, a password or a login
are never fetched: the table says how to get them. The package contains no passwords.

**How sure an address is.** *Verified*: found in its owner's own repository, mirror or code, in stored copies.
*Second-hand*: found in other people's scripts. *Unconfirmed*: neither. No address was contacted while this page was
written: use `--check-addresses` on a machine with a network to test them. A file that differs from the published one is
refused. If a host publishes a list of its files (OpenNeuro and NSD by bucket, NEMAR, figshare, OSF, the Hugging Face
hub), the list with sizes and checksums is read when you fetch; OpenNeuro's and NSD's lists contain only sizes. The
files of the default parts of digits69, haxby_slices, muse_n170, things_eeg1, things_meg and cneuromod_things are listed
in `data_manifests` with their checksums. Most of those on OpenNeuro are listed with the version in the bucket as well,
so that a later snapshot changes nothing.

"""


def write_row(manifest: Manifest, part: ManifestPart) -> str:
    """Return the line of one part."""
    size = part.count_bytes()
    shared = len(part.list_subjects())
    command = (
        f"`fetch {manifest.name} --parts {part.name}`" if not part.default else f"`fetch {manifest.name}`"
    )
    cells = [
        part.name,
        part.what,
        "" if part.access == "by_hand" else "shown when fetched" if size is None else describe_bytes(size),
        str(shared or ""),
        {"open": "open", "terms": f"`--accept-terms`: {part.gate}", "by_hand": f"by hand: {part.gate}"}[
            part.access
        ],
        "" if part.access == "by_hand" else f"{describe_place(part)}, {part.mark}",
        "" if part.access == "by_hand" else command,
    ]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def write_page() -> str:
    """Return the whole page."""
    sections = []
    for manifest in read_manifests().values():
        if manifest.parts:
            rows = "\n".join(write_row(manifest, part) for part in manifest.parts)
            sections.append(
                f"## {manifest.name}\n\n{manifest.title}. Licence: {' '.join(manifest.licence.split())}.\n\n"
                "| part | what | size | subjects | access | from | command |\n|---|---|---|---|---|---|---|\n"
                f"{rows}\n"
            )
    return HEADER + "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(write_page())
